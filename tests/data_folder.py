"""Where the big real images of the tests are: $LYNCEUS_TEST_DATA, else a folder beside the repository."""

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    given = os.environ.get("LYNCEUS_TEST_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[1] / "../shared/data"


def need(*parts: str) -> Path:
    """The path below the data folder; skips the test, with the reason, when it is not there."""
    path = data_folder().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)}: set LYNCEUS_TEST_DATA to the folder that holds it")
    return path.resolve()
