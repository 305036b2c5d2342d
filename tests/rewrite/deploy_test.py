"""Deploy: what comes back gives the model's answers, says what was tried, and behaves like a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lynceus
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError, OptionError
from lynceus.core.nouns import Rewrite, chain
from lynceus.core.report import Report
from lynceus.rewrite import deploy, ways
from lynceus.rewrite.deploy import Deploy, Deployed
from lynceus.rewrite.ways import WAYS, Way
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

QUICK = ("plain", "eager", "channels_last", "folded", "packed")
EXACT = Deploy(ways=QUICK, seconds=0.0, threads=(1,))


class Net(nn.Module):
    """Convolutions with batch norms and ReLU, then a perceptron: something for every way to change."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.act, self.gelu = nn.ReLU(), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, classes)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = x + self.act(self.bn2(self.conv2(x)))
        return self.fc2(self.gelu(self.fc1(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 20, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fast(net, images):
    return EXACT(net, images[:4], images, quiet=True)


@pytest.mark.parametrize("way", QUICK)
@torch.no_grad()
def test_exact_ways_give_the_same(net, images, way):
    run = deploy.build(way, net, images[:4])
    assert torch.allclose(run(images[:4]), net(images[:4]), atol=1e-5)
    assert torch.allclose(run(images[:1, :, :13, :9]), net(images[:1, :, :13, :9]), atol=1e-5)


@pytest.mark.parametrize("way", ["bf16", "bf16_packed", "mixed", "int8"])
@torch.no_grad()
def test_coarser_ways_are_close(net, images, way):
    a, b = deploy.build(way, net, images)(images), net(images)
    assert a.dtype == b.dtype
    assert 0 < (a - b).abs().max() < 0.2 * b.std()


@pytest.mark.parametrize("name", lynceus.list_models("*nano*"))
@torch.no_grad()
def test_our_families_keep_their_answers(name):
    torch.manual_seed(0)
    model = lynceus.create_model(name, num_classes=7)
    x = torch.randn(2, 3, 40, 36)
    want = model(x)
    for way in ("plain", "packed", "mixed"):
        gap = (deploy.build(way, model, x)(x) - want).abs().max() / want.std()
        assert gap < (1e-4 if way != "mixed" else 0.3), way


@torch.no_grad()
def test_timm_models_are_folded():
    import timm

    model = timm.create_model("resnet18", num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    run = deploy.build("packed", model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in run.modules())
    assert torch.allclose(run(x), model(x), atol=1e-4)


def test_a_norm_that_others_read_around_is_found_out(images):
    """Folding into a convolution that somebody else reads too would be wrong: the comparison sees it."""

    class Shared(Net):
        def forward(self, x):
            y = self.conv1(x)
            return self.fc2(self.fc1((self.bn1(y) - y).mean((2, 3))))

    torch.manual_seed(0)
    model = Shared().eval()
    model.bn1.running_mean.normal_()
    rows = Deploy(ways=("folded",), seconds=0.0, threads=(1,), difference=1e-3)(model, images, quiet=True).report.rows
    assert next(r for r in rows if r["way"] == "folded")["verdict"].startswith("too different")


def test_the_report_tells_everything(fast, net, images):
    report = fast.report
    assert isinstance(report, Report)
    assert {r["way"] for r in report.rows} == set(QUICK)
    assert [r["verdict"] for r in report.rows].count("fastest") == 1
    best = next(r for r in report.rows if r["verdict"] == "fastest")
    assert fast.way == best["way"]
    assert best["images"] == report.summary["images"] == 12
    assert best["agreement"] == 1.0
    assert best["ms"] > 0
    assert "12 of the user's images" in " ".join(report.notes)
    assert "example's 12 images alone" in " ".join(EXACT(net, images, quiet=True).report.notes)
    assert report.figures.keys() == {"speed.plotly"}
    assert Report.from_json(report.json()).rows[0]["way"] == "plain"


def test_the_old_model_and_the_threads_are_untouched(net, images):
    model, threads = copy.deepcopy(net).train(), torch.get_num_threads()
    before = copy.deepcopy(model.state_dict())
    made = Deploy(ways=("packed",), seconds=0.0, threads=(2, 1))(model, images, quiet=True)
    made(images)
    assert torch.get_num_threads() == threads
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in made.parameters()}


def test_other_batches_and_sizes_go_too(fast, net):
    with torch.no_grad():
        for size in ((1, 3, 20, 24), (7, 3, 20, 24), (2, 3, 33, 9)):
            x = torch.randn(size)
            assert torch.allclose(fast(x), net(x), atol=1e-5)


def test_a_way_for_one_shape_falls_back(net, images, monkeypatch):
    """A fixed way runs at its shape, and the fallback everywhere else; it is built once."""
    calls = []

    def build(model, example):
        def run(x):
            calls.append(tuple(x.shape))
            assert x.shape == example.shape
            return model(x)

        return run

    monkeypatch.setitem(WAYS, "stiff", Way(text="one shape", build=build, fixed=True))
    model = Deploy(ways=("stiff",), threads=(1,))(net, None)
    assert torch.allclose(model(images[:4]), net(images[:4]), atol=1e-6)
    assert torch.allclose(model(images[:3]), net(images[:3]), atol=1e-5)
    assert torch.allclose(model(images[:4]), net(images[:4]), atol=1e-6)
    assert calls == [(4, 3, 20, 24)] * 2
    # images that do not fill a batch are judged by filling it
    trial = deploy._Trial(Deploy(ways=("stiff",), seconds=0.0, threads=(1,)), net, images[:5], images, True)
    found = trial._compare("stiff", build(net, images[:5]))
    assert found["images"] == 12
    assert found["agreement"] == 1.0


def test_a_way_that_fails_is_reported(net, images, monkeypatch):
    def build(model, example):
        raise RuntimeError("no such unit\nand more")

    monkeypatch.setitem(WAYS, "broken", Way(text="never works", build=build))
    made = Deploy(ways=("broken",), seconds=0.0, threads=(1,))(net, images, quiet=True)
    row = next(r for r in made.report.rows if r["way"] == "broken")
    assert row["verdict"] == "failed: RuntimeError: no such unit"
    assert made.way in ("plain", "eager")
    alone = Deploy(ways=("broken",))(net, None)
    with pytest.warns(UserWarning, match="no such unit"), torch.no_grad():
        assert torch.allclose(alone(images), net(images), atol=1e-5)


def test_what_changes_answers_is_left_out(net, images, monkeypatch):
    """However fast: a way below the tolerance never wins."""

    def build(model, example):
        return lambda x: model(x).roll(1, 1)

    monkeypatch.setitem(WAYS, "wrong", Way(text="other classes", build=build))
    options = {"ways": ("wrong",), "seconds": 0.0, "threads": (1,)}
    made = Deploy(**options)(net, images, images, quiet=True)
    row = next(r for r in made.report.rows if r["way"] == "wrong")
    assert row["verdict"].startswith("too different")
    assert row["agreement"] < 0.995
    assert made.way != "wrong"
    rows = Deploy(**options, tolerance=0.0)(net, images, images, quiet=True).report.rows
    assert next(r for r in rows if r["way"] == "wrong")["verdict"] in ("ok", "fastest")


def test_ways_without_a_unit_are_skipped_unless_named(net, images, monkeypatch):
    monkeypatch.setattr(ways, "bf16_unit", lambda device: False)
    trial = deploy._Trial(Deploy(seconds=0.0, threads=(1,)), net, images, None, True)
    assert "no unit" in WAYS["bf16"].refuse(trial.model, images)
    made = Deploy(ways=("bf16",), seconds=0.0, threads=(1,))(net, images, quiet=True)
    assert next(r for r in made.report.rows if r["way"] == "bf16")["ms"] > 0


def test_outputs_without_classes(images):
    """One number per image, or several maps: the difference decides."""

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"out": y.mean((1, 2, 3)), "map": y}

    made = Deploy(ways=("packed",), seconds=0.0, threads=(1,))(Maps(), images, quiet=True)
    assert made(images)["map"].shape == (12, 1, 18, 22)
    assert made.report.summary["agreement"] == 1.0


def test_gradients_run_the_plain_model(fast, net, images):
    x = images[:2].clone().requires_grad_()
    fast(x).sum().backward()
    y = images[:2].clone().requires_grad_()
    net(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert not fast(images[:2]).requires_grad
    free = copy.deepcopy(fast).requires_grad_(True)
    free(images[:2]).square().sum().backward()
    assert all(p.grad is not None for p in free.parameters())


@pytest.mark.parametrize("way", ["eager", "packed", "mixed"])
def test_changed_weights_are_seen(net, images, way):
    made, other = Deploy(ways=(way,), threads=(1,))(net, None), copy.deepcopy(net)
    made(images)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    made.original.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert (made(images) - other(images)).abs().max() < 0.05
    double = made.double()(images.double())
    assert torch.allclose(double, copy.deepcopy(other).double()(images.double()), atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_its_cost_is_the_model_s(net, images):
    made = Deploy(ways=("packed",), threads=(1,))(net, None)
    before, after = cost(net, images), cost(made, images)
    assert (before.params, before.macs) == (after.params, after.macs)
    assert before.macs > 0


def test_copies_pickles_and_chains(fast, net, images):
    with torch.no_grad():
        want = fast(images)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), chain(EXACT)(net, images)):
            assert torch.allclose(other(images), want, atol=1e-5)
    assert isinstance(EXACT, Rewrite)


@pytest.mark.parametrize("kind", ["backbone", "task"])
def test_saved_and_loaded(tmp_path, kind):
    torch.manual_seed(0)
    model = lynceus.create_model("resnet_nano", num_classes=3)
    if kind == "task":
        model = Classify(classes=["a", "b", "c"]).build(model).eval()
    x = torch.rand(2, 3, 32, 32)
    made = Deploy(ways=("packed",), seconds=0.0, threads=(1,))(model, x, quiet=True)
    assert made.owns_pixels == (kind == "task")
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, Deployed)
    assert again.way == made.way
    assert again.rewrite == made.rewrite
    assert again.state_dict().keys() == made.state_dict().keys()
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-5)
    if kind == "task":
        assert again.classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ways": ("fast",)}, "no way to run a model 'fast'"),
        ({"ways": ()}, "no way to try"),
        ({"tolerance": 1.5}, "from 0 to 1"),
        ({"threads": (0,)}, "from 1 on"),
        ({"seconds": -1.0}, "at least 0"),
        ({"difference": -1.0}, "at least 0"),
        ({"fallback": "compile"}, "any shape"),
        ({"fallback": "quick"}, "no way to run"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(AdviceError, match=words):
        Deploy(**options)


def test_a_misspelt_way_names_the_nearest():
    with pytest.raises(OptionError, match="'compile'"):
        Deploy(ways=("compiled",))


def test_bad_input(net, images, fast):
    with pytest.raises(AdviceError, match="takes a module"):
        Deploy()("resnet50", images)
    with pytest.raises(AdviceError, match="batch of images"):
        Deploy()(net, images[0])
    with pytest.raises(AdviceError, match="example"):
        Deploy()(net, None)
    with pytest.raises(AdviceError, match="batches"):
        EXACT(net, images, ["a.png"], quiet=True)
    with pytest.raises(AdviceError, match="images is empty"):
        EXACT(net, images, [], quiet=True)
    with pytest.raises(AdviceError, match="inference"):
        fast.train()


def test_the_command_line(tmp_path, capsys):
    from lynceus.cli.__main__ import main

    options = ["--data", "digits", "--limit", "16", "--out", str(tmp_path), "--ways", "eager", "--seconds", "0"]
    assert main(["rewrite", "deploy", "vit_nano", *options, "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "16 of the user's images" in said
    assert "Deploy of vit_nano" in said
    assert isinstance(load_model(tmp_path), Deployed)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_nano", "resnet_nano", "timm:resnet18"])
@pytest.mark.parametrize("way", ["compile", "compile_bf16", "onnx"])
def test_compiled_ways(name, way):
    torch.manual_seed(0)
    model = lynceus.create_model(name, num_classes=6)
    x = torch.randn(2, 3, 48, 40)
    made = Deploy(ways=(way,), seconds=0.0, threads=(1,), tolerance=0.0)(model, x, quiet=True)
    row = next(r for r in made.report.rows if r["way"] == way)
    assert row["verdict"] in ("ok", "fastest")
    assert row["difference"] < (0.3 if "bf16" in way else 1e-4)
    alone = Deploy(ways=(way,), threads=(1,))(model, None)
    with torch.no_grad():
        for size in ((2, 3, 48, 40), (3, 3, 33, 50)):
            y = torch.randn(size)
            assert (alone(y) - model(y)).abs().max() < (0.3 if "bf16" in way else 1e-3)
