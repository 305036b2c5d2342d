"""Continual inference: clip models run one frame at a time. See `model` for the idea, `convert` for what is taken."""

from lynceus.rewrite.streaming.attention import WindowAttention as WindowAttention
from lynceus.rewrite.streaming.branches import Parallel as Parallel
from lynceus.rewrite.streaming.branches import Residual as Residual
from lynceus.rewrite.streaming.encoder_nodes import RecyclingPositions as RecyclingPositions
from lynceus.rewrite.streaming.model import State as State
from lynceus.rewrite.streaming.model import Stream as Stream
from lynceus.rewrite.streaming.model import Streaming as Streaming
from lynceus.rewrite.streaming.model import StreamingModel as StreamingModel
from lynceus.rewrite.streaming.model import convert as convert
from lynceus.rewrite.streaming.pointwise import EachFrame as EachFrame
