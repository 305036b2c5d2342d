"""`lynceus rewrite NAME`: the printed Python does the same, mistakes leave nothing behind, no trained run is hidden."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lynceus
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError, AdviceWarning
from lynceus.core.report import Report
from lynceus.data import open as open_data
from lynceus.rewrite.adapters import Adapt
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import save_model
from lynceus.train.evaluate import first_images


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(6):  # two sizes, none of them square
        place = tmp_path / "photos" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shape = ((16, 20), (24, 16))[i % 2]
        Image.fromarray(rng.integers(0, 255, (*shape, 3)).astype("uint8")).save(place / f"{i}.png")
    torch.manual_seed(0)
    save_model(Classify(num_classes=2, image_size=16).build(lynceus.create_model("vit_nano")), "base")
    return tmp_path


def printed(text: str) -> str:
    """The Python twin in what a verb printed."""
    after = text.split("the same in Python:")[1].splitlines()
    return "\n".join(line[4:] for line in after if line.startswith("    "))


@pytest.mark.parametrize(
    "words",
    [
        ["block_prune", "base", "--data", "photos", "--block", "16", "--batch", "2"],
        ["prune_channels", "resnet_nano", "--importance", "taylor", "--data", "photos", "--size", "16", "24"],
        ["adapt", "resnet_nano", "--rank", "4", "--size", "16", "16", "--seed", "3"],
    ],
)
def test_the_printed_python_makes_the_same_model(here, capsys, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdviceWarning)  # pixels are not normalised twice
        assert main(["rewrite", *words, "--out", "new"]) == 0
    twin = printed(capsys.readouterr().out)
    first = load_file("new/model.safetensors")
    (here / "new" / "model.safetensors").unlink()
    exec(compile(twin, "twin", "exec"), {})
    again = load_file("new/model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_choice_made_on_noise_is_said(here):
    assert main(["rewrite", "block_prune", "base", "--block", "16", "--out", "new"]) == 0
    assert any("noise" in n for n in Report.load("new").notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["expedite", "vit_nan"], "vit_nano"),
        (["expedite", "vit_nano", "--batch", "0"], "at least 1 image"),
        (["expedite", "vit_nano", "--size", "-3", "7"], "--size 224 224"),
        (["prune_tokens", "resnet_nano"], "no state-space model"),
        (["prune_tokens", "plain_mamba_nano", "--blocks"], "names no cut"),
        (["adapt", "resnet_nano", "--rank", "1.5"], "whole number"),
        (["adapt", "resnet_nano", "--rank", "100000"], "more than any layer"),
        (["adapt", "resnet_nano", "--names", "nosuch"], "nosuch"),
    ],
)
def test_a_mistake_is_told_and_leaves_no_folder(here, capsys, words, said):
    assert main(["rewrite", *words, "--out", "new"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "new").exists()


def test_neither_the_model_nor_a_trained_run_is_written_over(here, capsys):
    before = (here / "base" / "model.safetensors").read_bytes()
    assert main(["rewrite", "adapt", "base", "--rank", "2", "--out", "base"]) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert (here / "base" / "model.safetensors").read_bytes() == before
    (here / "run" / "checkpoints").mkdir(parents=True)
    assert main(["rewrite", "adapt", "base", "--rank", "2", "--out", "run"]) == 2
    assert "would be loaded instead" in capsys.readouterr().err


def test_first_images_come_in_one_size(here):
    data, bare = open_data("photos"), lynceus.create_model("vit_nano")
    trained = Classify(num_classes=2, image_size=16).build(lynceus.create_model("vit_nano"))
    assert first_images(data, bare, 5).shape == (5, 3, 16, 20)
    assert first_images(data, trained, 9).shape == (6, 3, 16, 16)
    assert first_images(data, bare, 5, size=(8, 12)).shape == (5, 3, 8, 12)


@pytest.mark.parametrize("rank", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_rank_that_is_none(rank):
    with pytest.raises(AdviceError, match="whole number"):
        Adapt(rank=rank)


def test_ctrl_c_while_it_is_measured_says_where_the_model_is(here, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lynceus.gauntlet.compare.compare", stopped)
    assert main(["rewrite", "adapt", "base", "--rank", "2", "--out", "new"]) == 130
    assert capsys.readouterr().err == "lynceus rewrite: interrupted; the changed model is in new, measured it is not.\n"
    assert (here / "new" / "model.safetensors").is_file()
