"""Pictures and labels in the formats people have: `open` is the one door, `Dataset` what it gives.

dataset = data.open("digits")                # or a folder, a .parquet file, a list of paths, an array ...
train, test = dataset.split(0.8, 0.2)
dataset.check()
"""

from lynceus.data.dataset import Dataset as Dataset
from lynceus.data.decode import UnreadableError as UnreadableError
from lynceus.data.decode import read_image as read_image
from lynceus.data.decode import resize as resize
from lynceus.data.door import open_dataset as open_dataset
from lynceus.data.loader import Loader as Loader
from lynceus.data.loader import loader as loader

open = open_dataset

__all__ = ["Dataset", "Loader", "UnreadableError", "loader", "open", "open_dataset", "read_image", "resize"]
