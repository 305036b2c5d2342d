"""Export: free axes are really free, the written file agrees with the model, a file that differs is not left."""

import sys

import pytest
import torch
from torch import nn

from lynceus.backbones import create_model
from lynceus.core.errors import AdviceError, MissingError, OptionError
from lynceus.rewrite import export as module
from lynceus.rewrite.export import export, traced
from lynceus.tasks.classify import Classify

NANO = ["convnext_nano", "resnet_nano", "swin_nano", "vit_nano"]


def run_torch(folder, image):
    return torch.export.load(folder / "model.pt2").module()(image)


def run_onnx(folder, image):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


class Small(nn.Module):
    """A convolutional classifier of any size; counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().train()


def test_both_files_agree_at_other_sizes(small, tmp_path):
    report = export(small, torch.rand(2, 3, 32, 40), tmp_path / "out", quiet=True)
    assert small.training, "the mode of the model is its own"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.pt2", "model.onnx"}
    small.eval()
    for size in ((1, 3, 32, 40), (5, 3, 61, 33), (2, 3, 200, 64)):
        image = torch.rand(size)
        with torch.no_grad():
            want = small(image)
        torch.testing.assert_close(run_torch(tmp_path / "out", image), want)
        torch.testing.assert_close(run_onnx(tmp_path / "out", image), want)
    assert [r["format"] for r in report.rows] == ["torch", "onnx"]
    for row in report.rows:
        assert row["free"] == "batch, height, width"
        assert row["difference"] <= 1e-5
        assert row["sizes"] >= 4
        assert row["speed"] == pytest.approx(row["model_ms"] / row["file_ms"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NANO)
def test_every_family_with_every_axis_free(name, tmp_path):
    model = create_model(name, num_classes=4)
    report = export(model, torch.rand(2, 3, *model.input_size), tmp_path, quiet=True)
    assert [r["free"] for r in report.rows] == ["batch, height, width"] * 2
    image = torch.rand(3, 3, 61, 45)
    with torch.no_grad():
        want = model(image)
    scale = want.abs().max()
    assert (run_torch(tmp_path, image) - want).abs().max() <= 1e-5 * scale
    assert (run_onnx(tmp_path, image) - want).abs().max() <= 1e-5 * scale


def test_a_task_s_module_takes_pixels(tmp_path):
    model = Classify(num_classes=3).build(create_model("resnet_nano", num_classes=3)).eval()
    export(model, torch.rand(2, 3, 32, 32), tmp_path, formats=["torch"], quiet=True)
    image = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(run_torch(tmp_path, image), model(image))


class FixedWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 2)

    def forward(self, x):
        return self.layer(x).mean((1, 2))


def test_an_axis_that_cannot_be_freed_is_named_with_its_reason(tmp_path):
    report = export(FixedWidth(), torch.rand(2, 3, 20, 24), tmp_path, formats=("torch",), quiet=True)
    assert report.rows[0]["free"] == "batch, height"
    note = next(n for n in report.notes if "width is fixed at 24" in n)
    assert "specialized" in note or "width" in note
    assert run_torch(tmp_path, torch.rand(1, 3, 64, 24)).shape == (1, 2)


def test_a_model_of_one_size_frees_its_batch(tmp_path):
    with torch.no_grad():
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        report = export(model, torch.rand(1, 3, 8, 8), tmp_path, formats=("torch",), quiet=True)
    assert report.rows[0]["free"] == "batch"
    assert sum("is fixed at 8" in n for n in report.notes) == 2


def test_only_the_axes_asked_for_are_freed(small):
    plan = traced(small.eval(), torch.rand(2, 3, 32, 32), ["batch"])
    assert plan.free == {"batch": 1}
    with pytest.raises(AssertionError, match="Guard"):
        plan.program.module()(torch.rand(2, 3, 40, 32))


def test_a_file_that_differs_is_refused_and_removed(small, tmp_path, monkeypatch):
    real = module._runner
    monkeypatch.setattr(module, "_runner", lambda name, path: lambda x: [y * 1.001 for y in real(name, path)(x)])
    with pytest.raises(AdviceError, match=r"differs from the model by 1\.0e-03"):
        export(small, torch.rand(2, 3, 32, 32), tmp_path, formats=("torch",), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_a_difference(small, tmp_path, monkeypatch):
    real = module._runner
    monkeypatch.setattr(module, "_runner", lambda name, path: lambda x: [y * float("nan") for y in real(name, path)(x)])
    with pytest.raises(AdviceError, match="differs"):
        export(small, torch.rand(2, 3, 32, 32), tmp_path, formats=("torch",), quiet=True)


def test_an_old_file_survives_a_refused_export(small, tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(AdviceError, match="differs"):
        export(small, torch.rand(2, 3, 32, 32), tmp_path, formats=("torch",), tolerance=-1.0, quiet=True)
    assert (tmp_path / "model.pt2").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_advises(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdviceError, match="--out"):
        export(small, torch.rand(2, 3, 32, 32), tmp_path / "file", quiet=True)


class Unexportable(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, x, p: export(m, x, p, formats=("onxx",)), OptionError, "onnx"),
        (lambda m, x, p: export(m, x, p, dynamic=("hight",)), OptionError, "height"),
        (lambda m, x, p: export(m, x, p, formats=()), AdviceError, "nothing to write"),
        (lambda m, x, p: export(m, x[0], p), AdviceError, "b, c, h, w"),
        (lambda m, x, p: export(Unexportable(), x, p, quiet=True), AdviceError, "cannot be exported"),
    ],
)
def test_mistakes_advise(small, tmp_path, call, error, match):
    with pytest.raises(error, match=match):
        call(small, torch.rand(2, 3, 16, 16), tmp_path)


def test_onnx_without_its_packages_names_the_extra(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else sys)
    with pytest.raises(MissingError, match=r"lynceus\[export\]"):
        export(small, torch.rand(2, 3, 16, 16), tmp_path)
