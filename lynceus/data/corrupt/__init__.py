"""Common corruptions: nineteen ways in which a good picture becomes a bad one, at five severities."""

from lynceus.data.corrupt.dataset import corrupt_dataset as corrupt_dataset
from lynceus.data.corrupt.dataset import read_corrupted as read_corrupted
from lynceus.data.corrupt.suite import chosen as chosen
from lynceus.data.corrupt.suite import corrupt as corrupt
from lynceus.data.corrupt.suite import natural_scale as natural_scale
from lynceus.data.corrupt.suite import picture_generators as picture_generators
from lynceus.data.corrupt.tables import ALEXNET as ALEXNET
from lynceus.data.corrupt.tables import ALEXNET_CLEAN as ALEXNET_CLEAN
from lynceus.data.corrupt.tables import BENCHMARK as BENCHMARK
from lynceus.data.corrupt.tables import CORRUPTIONS as CORRUPTIONS
from lynceus.data.corrupt.tables import DETERMINISTIC as DETERMINISTIC
from lynceus.data.corrupt.tables import GROUPS as GROUPS
from lynceus.data.corrupt.tables import SEVERITIES as SEVERITIES
from lynceus.data.corrupt.tables import Scale as Scale

__all__ = [
    "ALEXNET",
    "ALEXNET_CLEAN",
    "BENCHMARK",
    "CORRUPTIONS",
    "DETERMINISTIC",
    "GROUPS",
    "SEVERITIES",
    "Scale",
    "chosen",
    "corrupt",
    "corrupt_dataset",
    "natural_scale",
    "picture_generators",
    "read_corrupted",
]
