"""What many tests share: shapes checked at every call, and the big real images, skipped with a reason if absent."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    spec = importlib.util.spec_from_file_location(f"lynceus_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data_folder = _load("data_folder")
_load("shapes").install()


@pytest.fixture(scope="session")
def cifar10_parquet() -> Path:
    """CIFAR-10's 50,000 training pictures as one parquet file."""
    return data_folder.need("cifar10", "train.parquet")


@pytest.fixture(scope="session")
def imagenet_jpegs() -> list[Path]:
    """A sample of ImageNet photographs, one per class, sorted by name."""
    return sorted(data_folder.need("imagenet-sample").glob("*.JPEG"))
