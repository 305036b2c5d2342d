import numpy as np
import pytest
import torch

from lynceus.core.errors import AdviceError
from lynceus.core.ledger import Ledger

PIECE = {"label": 3, "score": 0.1, "gone": None, "nan": float("nan"), "curve": [1, 2.5], "image": np.eye(3, dtype="f4")}


def test_a_second_run_finds_what_the_first_kept(tmp_path):
    first = Ledger(tmp_path, "game", ("options", 0))
    kept = first.put("image 0", PIECE)
    first.put("image 1", torch.arange(4))
    second = Ledger(tmp_path, "game", ("options", 0))
    assert len(second) == 2
    assert "image 0" in second
    np.testing.assert_equal(second.get("image 0"), PIECE)
    np.testing.assert_equal(kept, second.get("image 0"))
    np.testing.assert_array_equal(second.get("image 1"), np.arange(4))
    assert second.get("image 2") is None


def test_other_options_are_another_file(tmp_path):
    Ledger(tmp_path, "game", ("options", 0)).put("image 0", 1)
    assert len(Ledger(tmp_path, "game", ("options", 1))) == 0


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_line_cut_by_a_kill_is_done_again(tmp_path, cut):
    first = Ledger(tmp_path, "game", 0)
    first.put("a", [1, 2])
    first.put("b", [3, 4])
    first.path.write_bytes(first.path.read_bytes()[:-cut])
    second = Ledger(tmp_path, "game", 0)
    assert second.get("a") == [1, 2]
    assert second.get("b") is None
    second.put("b", [3, 4])
    assert Ledger(tmp_path, "game", 0).get("b") == [3, 4]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, "game", 0)
    assert ledger.put("a", (1, 2)) == [1, 2] == ledger.get("a")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(AdviceError, match="object"):
        Ledger(tmp_path, "game", 0).put("a", object())
