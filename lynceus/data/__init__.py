"""Pictures and labels in the formats people have: `open` is the one door, `Dataset` what it gives.

dataset = data.open("digits")                # or a folder, a .parquet file, COCO, YOLO, a list of paths, an array ...
print(dataset.check().table())
train, test = dataset.train_test()
for batch in data.loader(train, 64, shuffle=True): ...
data.save(dataset, "out", "webdataset")
data.sample("astronaut")                     # a real picture, without a network
data.synth.shapes(1000)                      # generated ones, with boxes and masks
"""

from lynceus.data import synth as synth
from lynceus.data.checks import check as check
from lynceus.data.dataset import Dataset as Dataset
from lynceus.data.decode import UnreadableError as UnreadableError
from lynceus.data.decode import image_size as image_size
from lynceus.data.decode import read_image as read_image
from lynceus.data.decode import resize as resize
from lynceus.data.decode import to_image as to_image
from lynceus.data.door import LAYOUTS as LAYOUTS
from lynceus.data.door import open_dataset as open_dataset
from lynceus.data.loader import Loader as Loader
from lynceus.data.loader import loader as loader
from lynceus.data.samples import sample as sample
from lynceus.data.samples import samples as samples
from lynceus.data.save import save as save
from lynceus.data.views import CropFlip as CropFlip
from lynceus.data.views import EvalView as EvalView
from lynceus.data.views import TrainView as TrainView
from lynceus.data.views import crop_flip as crop_flip

open = open_dataset

__all__ = [
    "LAYOUTS",
    "CropFlip",
    "Dataset",
    "EvalView",
    "Loader",
    "TrainView",
    "UnreadableError",
    "check",
    "crop_flip",
    "image_size",
    "loader",
    "open",
    "open_dataset",
    "read_image",
    "resize",
    "sample",
    "samples",
    "save",
    "synth",
    "to_image",
]
