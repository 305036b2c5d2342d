"""Where the real images of the benches are: $LYNCEUS_TEST_DATA, else ./data."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("LYNCEUS_TEST_DATA", "data"))
CIFAR10 = FOLDER / "cifar10" / "train.parquet"
PHOTOS = FOLDER / "imagenet-sample"
