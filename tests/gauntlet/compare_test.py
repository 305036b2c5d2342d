"""Models beside each other: what is measured, and what the command line makes of it."""

import json
import shutil

import pytest
import torch

import lynceus.data
from lynceus import create_model
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.gauntlet.compare import compare, compare_all
from lynceus.rewrite.swap import Swap
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import save_model
from lynceus.train.evaluate import first_images


def classifier(name="resnet_nano"):
    torch.manual_seed(0)
    return Classify(num_classes=10).build(create_model(name)).eval()


def test_a_model_beside_itself_agrees_and_costs_the_same():
    model, data = classifier(), lynceus.data.open("digits", split="val", limit=40)
    example = torch.rand(2, 3, 32, 32)
    report = compare(model, model, data, example, repeats=3)
    before, after = report.rows
    assert report.summary["agreement"] == 1
    assert report.summary["accuracy lost"] == report.summary["MACs saved"] == report.summary["memory MB saved"] == 0
    assert before["MACs"] == after["MACs"] > 0
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6
    assert before["weights MB"] == pytest.approx(held)
    assert before["memory MB"] > held


def test_three_models_are_drawn():
    models = {"a": classifier(), "b": classifier("vit_nano"), "c": classifier("swin_nano")}
    data = lynceus.data.open("digits", split="val", limit=40)
    report = compare_all(models, data, torch.rand(2, 3, 32, 32), repeats=2)
    assert [r["model"] for r in report.rows] == ["a", "b", "c"]
    assert "accuracy against time" in report.html().lower()  # the page shows figures by the kind in their name
    assert set(report.figures) == {"accuracy against time.plotly"}
    assert report.rows[0]["speed"] == 1


def test_where_the_time_goes_is_said_when_macs_fall_and_time_does_not():
    small = classifier("vit_nano")

    class Slow(torch.nn.Module):
        owns_pixels = True

        def __init__(self):
            super().__init__()
            self.inner = small

        def forward(self, image):
            for _ in range(400):
                image = image.sort(dim=-1).values
            return self.inner(image)

    big = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7, padding=3), torch.nn.Conv2d(64, 64, 7, padding=3))
    big = torch.nn.Sequential(*big, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    note = compare(big, Slow(), None, torch.rand(1, 3, 32, 32), repeats=3).notes[-1]
    assert "fewer MACs" in note
    assert "sort" in note


def test_one_model_is_no_comparison():
    with pytest.raises(AdviceError, match="two or more"):
        compare_all({"a": classifier()}, None, torch.rand(1, 3, 32, 32))


def test_the_command_compares_run_folders(tmp_path, capsys):
    model = classifier("vit_nano")
    save_model(model, tmp_path / "plain")
    save_model(Swap(mixer="hyena")(model, torch.rand(1, 3, 32, 32)), tmp_path / "swapped")
    shutil.copytree(tmp_path / "swapped", tmp_path / "2")
    names = [str(tmp_path / "plain"), str(tmp_path / "swapped")]
    out = ["--data", "digits", "--limit", "20", "--repeats", "2", "--out", str(tmp_path / "out")]
    assert main(["rewrite", "compare", *names, *out]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["plain", "swapped"]
    assert "swapped" in capsys.readouterr().out
    assert main(["rewrite", "compare", names[0], str(tmp_path / "2"), *out]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["plain", "2 (swap)"]
    assert list(rows[1])[2:4] == ["accuracy", "agreement"]  # seen without scrolling
    twin = capsys.readouterr().out.split("the same in Python:")[1]
    lines = [line[4:] for line in twin.splitlines() if line.startswith("    ")]
    space = {}
    exec("\n".join([*lines[:-1], "made = " + lines[-1].removeprefix("print(").replace(".table())", "")]), space)
    assert torch.equal(space["example"], first_images(lynceus.data.open("digits", limit=20), model, 8))
    assert [r.get("accuracy") for r in space["made"].rows] == [r["accuracy"] for r in rows]
    assert main(["rewrite", "compare", names[0]]) == 2
