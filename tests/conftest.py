"""What many tests share: the big real images, skipped with a reason where they are not."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("data_folder", Path(__file__).parent / "data_folder.py")
data_folder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(data_folder)


@pytest.fixture(scope="session")
def cifar10_parquet() -> Path:
    """CIFAR-10's 50,000 training pictures as one parquet file."""
    return data_folder.need("cifar10", "train.parquet")


@pytest.fixture(scope="session")
def imagenet_jpegs() -> list[Path]:
    """A sample of ImageNet photographs, one per class, sorted by name."""
    return sorted(data_folder.need("imagenet-sample").glob("*.JPEG"))
