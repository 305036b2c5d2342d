"""Structured pruning adapters: adapt a frozen model in few learned numbers while pruning it, and fuse what is left."""

from lynceus.rewrite.adapters.adapt import Adapt as Adapt
from lynceus.rewrite.adapters.adapt import Fuse as Fuse
from lynceus.rewrite.adapters.adapt import adapt as adapt
from lynceus.rewrite.adapters.adapt import fuse as fuse
from lynceus.rewrite.adapters.delta import ApplyDelta as ApplyDelta
from lynceus.rewrite.adapters.delta import Delta as Delta
from lynceus.rewrite.adapters.delta import apply_delta as apply_delta
from lynceus.rewrite.adapters.delta import delta as delta
from lynceus.rewrite.adapters.prune import KeepChannels as KeepChannels
from lynceus.rewrite.adapters.prune import PruneChannels as PruneChannels
from lynceus.rewrite.adapters.prune import prune as prune
