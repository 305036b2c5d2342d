"""`lynceus train specialise` and `lynceus rewrite apply_delta`: the whole way on the command line."""

import pytest
import torch

import lynceus
from lynceus.cli.__main__ import main
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

SHORT = ["--before", "0.1", "--between", "0.1", "--finish", "0.1", "--step", "0.5", "--quiet"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Classify(num_classes=10).build(lynceus.create_model("resnet_nano"))
    save_model(model, "base")
    return model


@pytest.mark.slow  # the comparison of before and after takes its time
def test_from_a_base_to_a_delta_and_back(base, capsys):
    args = ["train", "specialise", "digits", "--base", "base", "--limit", "100", "--out", "special"]
    assert main([*args, "--left", "0.5", *SHORT, "--rank", "2"]) == 0
    assert "lynceus rewrite apply_delta base --delta special/left-50/delta.safetensors" in capsys.readouterr().out
    assert (
        main(["rewrite", "apply_delta", "base", "--delta", "special/left-50", "--size", "8", "8", "--out", "new"]) == 0
    )
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_model("new")(x), load_model("special/left-50")(x))


@pytest.mark.slow
def test_adapt_prune_and_fuse(base):
    for name, source, more in (
        ("adapt", "base", ["--rank", "2"]),
        ("prune_channels", "adapt", ["--ratio", "0.4"]),
        ("fuse", "prune_channels", []),
    ):
        assert main(["rewrite", name, source, *more, "--size", "8", "8", "--out", name]) == 0
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_model("fuse")(x), load_model("prune_channels")(x))


def test_mistakes_are_told(base, capsys):
    assert main(["train", "specialise", "digits", "--base", "bass", "--out", "no"]) == 2
    assert "bass" in capsys.readouterr().err
    assert main(["rewrite", "fuse", "base", "--size", "8", "8", "--out", "no"]) == 2
    assert "has no adapters to fuse" in capsys.readouterr().err
    assert main(["rewrite", "prune_channels", "base", "--ratio", "1.5", "--size", "8", "8", "--out", "no"]) == 2
    assert "0.7 leaves 30%" in capsys.readouterr().err


def test_a_rank_that_is_none_is_told_before_anything_is_written(base, tmp_path, capsys):
    for rank in ("1.5", "0", "-1"):
        assert main(["train", "specialise", "digits", "--base", "base", "--rank", rank, "--out", "no"]) == 2
        assert "rank is a whole number" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
