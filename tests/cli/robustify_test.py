"""`lynceus train robustify`: from two saved models to a third, and mistakes told in one paragraph."""

import pytest
import torch

from lynceus import create_model
from lynceus.cli.__main__ import main
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

DIGITS = tuple(str(i) for i in range(10))
SHORT = ["--limit", "60", "--steps", "2", "--batch-size", "16", "--quiet"]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, net in (("big", "resnet_nano"), ("teacher", "convnext_nano")):
        torch.manual_seed(0)
        save_model(Classify(classes=DIGITS).build(create_model(net, num_classes=10)), tmp_path / name)
    return tmp_path


def test_two_models_make_a_third(saved, capsys):
    args = ["train", "robustify", "digits", "--big", "big", "--teacher", "teacher", *SHORT, "--out", "robust"]
    assert main([*args, "--tune", "0.2", "--severity", "2"]) == 0
    assert "lynceus check accuracy robust digits" in capsys.readouterr().out
    robust = load_model(saved / "robust")
    assert robust(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert robust.head_used(torch.rand(2, 3, 8, 8)).shape == (2,)
    assert "tune: 0.2" in (saved / "robust" / "options.yaml").read_text()


def test_mistakes_are_told(saved, capsys):
    start = ["train", "robustify", "digits", *SHORT, "--out", "robust"]
    for args, word in (
        (["--big", "bug", "--teacher", "teacher"], "bug"),
        (["--big", "big", "--teacher", "convnext_nan"], "convnext_nano"),
        (["--big", "big", "--teacher", "teacher", "--most", "2"], "most"),
    ):
        assert main([*start, *args]) == 2
        assert word in capsys.readouterr().err
