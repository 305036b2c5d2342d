"""`lynceus rewrite block_prune`, then `lynceus train distil`: a smaller model that learns back, and mistakes told."""

import pytest
import torch

from lynceus import create_model
from lynceus.cli.__main__ import main
from lynceus.rewrite.block_prune import BlockSparseLinear
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

DIGITS = tuple(str(i) for i in range(10))
SHORT = ["--limit", "60", "--steps", "2", "--batch-size", "16", "--quiet"]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(Classify(classes=DIGITS).build(create_model("vit_nano", num_classes=10, depth=2)), tmp_path / "dense")
    return tmp_path


def test_pruned_distilled_and_loaded(saved, capsys):
    args = ["rewrite", "block_prune", "dense", "--data", "digits", "--limit", "30", "--block", "16", "--flops", "0.6"]
    assert main([*args, "--out", "small"]) == 0
    assert "block sparsity" in capsys.readouterr().out
    assert (
        main(["train", "distil", "digits", "--student", "small", "--teacher", "dense", *SHORT, "--out", "tuned"]) == 0
    )
    assert "lynceus check accuracy tuned digits" in capsys.readouterr().out
    before, after = load_model(saved / "small"), load_model(saved / "tuned")
    for name, module in after.named_modules():
        if isinstance(module, BlockSparseLinear):
            old = before.get_submodule(name).weight
            assert (module.weight[old == 0] == 0).all()
            assert not torch.equal(module.weight, old)


def test_mistakes_are_told(saved, capsys):
    torch.manual_seed(0)
    save_model(Classify(num_classes=3).build(create_model("vit_nano", num_classes=3, depth=1)), saved / "other")
    start = ["train", "distil", "digits", *SHORT, "--out", "tuned"]
    for args, word in (
        (["--student", "dens", "--teacher", "dense"], "dens"),
        (["--student", "dense", "--teacher", "other"], "different questions"),
        (["--student", "dense", "--teacher", "dense", "--weight", "2"], "0 to 1"),
    ):
        assert main([*start, *args]) == 2
        assert word in capsys.readouterr().err
    assert main(["rewrite", "block_prune", "dense", "--flops", "50"]) == 2
    assert "flops=0.5" in capsys.readouterr().err


def test_a_refused_run_changes_nothing_of_the_finished_one(saved, capsys):
    start = ["train", "distil", "digits", "--student", "dense", "--teacher", "dense", *SHORT, "--out", "tuned"]
    assert main(start) == 0
    before = {p.name: p.read_bytes() for p in (saved / "tuned").iterdir() if p.is_file()}
    for more in ([], ["--resume", "--lr", "0.1"]):
        assert main([*start, *more]) == 2
    assert before == {p.name: p.read_bytes() for p in (saved / "tuned").iterdir() if p.is_file()}
    assert main([*start[:-1], "none", "--val", "1.5"]) == 2
    assert not (saved / "none").exists()


@pytest.mark.parametrize("flag", ["--epochs", "--lr", "--val"])
def test_numbers_that_are_none_are_told_and_leave_nothing(saved, capsys, flag):
    start = ["train", "distil", "digits", "--student", "dense", "--teacher", "dense", "--limit", "60", "--out", "none"]
    assert main([*start, flag, "nan"]) == 2
    assert "nan" in capsys.readouterr().err
    assert not (saved / "none").exists()
