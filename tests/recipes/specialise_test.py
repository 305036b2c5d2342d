"""Specialise: from one base to small models of another task, density by density; resumed, and refused."""

import copy
from dataclasses import replace

import pytest
import torch

import lynceus
import lynceus.data
from lynceus.core.errors import AdviceError
from lynceus.recipes.specialise import SpecialiseConfig, specialise
from lynceus.rewrite.adapters import Adapt, Delta, apply_delta
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model
from lynceus.train.fit import FitConfig

SHORT = SpecialiseConfig(left=(0.6, 0.4), step=0.4, before=0.2, between=0.1, finish=0.3)
FIT = FitConfig(lr=1e-2, batch_size=32, quiet=True)


@pytest.fixture(scope="module")
def digits():
    return lynceus.data.open("digits", limit=120)


def base(classes=4):
    torch.manual_seed(0)
    return Classify(num_classes=classes).build(lynceus.create_model("resnet_nano")).eval()


def test_every_density_is_kept_and_the_base_stays(digits, tmp_path):
    model = base()
    before = copy.deepcopy(model.state_dict())
    made, report = specialise(model, digits, adapter=Adapt(rank=2), config=SHORT, fitting=FIT, out=tmp_path)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [s.left for s in made] == [0.6, 0.4]
    x = torch.rand(3, 3, 8, 8)
    for special, row in zip(made, report.rows):
        place = tmp_path / f"left-{round(100 * special.left)}"
        assert torch.equal(load_model(place)(x), special.fused(x))
        assert torch.equal(apply_delta(model, Delta.load(place))(x), special.fused(x))
        assert special.fused.classes == list(digits.classes)
        assert row["learned"] < row["weights"]
        assert 0 < row["macs_share"] < 1
    assert report.rows[1]["macs"] < report.rows[0]["macs"]
    with pytest.raises(AdviceError, match="resume=True"):
        specialise(model, digits, adapter=Adapt(rank=2), config=SHORT, fitting=FIT, out=tmp_path)
    more = replace(SHORT, left=(0.6, 0.4, 0.3))
    again, _ = specialise(model, digits, adapter=Adapt(rank=2), config=more, fitting=FIT, out=tmp_path, resume=True)
    assert torch.equal(again[1].fused(x), made[1].fused(x))
    assert torch.equal(apply_delta(model, Delta.load(tmp_path / "left-30"))(x), again[2].fused(x))


@pytest.mark.parametrize("importance", ["taylor", "lrp"])
def test_fine_tuning_with_importance_of_images(digits, importance):
    config = SpecialiseConfig(left=(0.7,), step=0.3, before=0.1, finish=0.1, importance=importance, images=32)
    made, report = specialise(base(10), digits, adapter=None, config=config, fitting=FIT)
    assert made[0].delta is None
    assert report.rows[0]["learned"] == report.rows[0]["weights"]
    assert sum(p.numel() for p in made[0].fused.parameters()) == report.rows[0]["weights"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left": (0.3, 0.5)}, "falling shares"),
        ({"left": (0.0,)}, "falling shares"),
        ({"step": 1.0}, "step is the share"),
        ({"finish": 0.0}, "finish is above 0"),
        ({"importance": "size"}, "importance is one of"),
        ({"least": 0}, "at least 1"),
        ({"multiple": 0}, "at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(AdviceError, match=message):
        SpecialiseConfig(**options)


def test_lengths_are_said_once(digits):
    with pytest.raises(AdviceError, match="not by FitConfig"):
        specialise(base(), digits, fitting=FitConfig(epochs=3))
    with pytest.raises(AdviceError, match="takes a trained predictor"):
        specialise(lynceus.create_model("resnet_nano"), digits)


def test_ctrl_c_says_how_to_go_on_and_what_is_finished_is_of_one_run(digits, tmp_path, monkeypatch):
    """Training stands still here, so that only the ways in and out are run."""
    trained = []

    def train(model, *args, **options):
        trained.append(args)
        if len(trained) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr("lynceus.recipes.specialise._train", train)
    options = {"adapter": Adapt(rank=2), "config": replace(SHORT, importance="l1"), "fitting": FIT}
    stop = 3  # before the first density, at its end, then at the end of the second
    with pytest.raises(KeyboardInterrupt, match=r"1 of 2 densities finished; go on with .*resume=True"):
        specialise(base(), digits, **options, out=tmp_path / "run")
    for changes in ({"fitting": replace(FIT, seed=1)}, {"adapter": Adapt(rank=4)}):
        with pytest.raises(AdviceError, match=r"other options.*(seed|rank)"):
            specialise(base(), digits, **{**options, **changes}, out=tmp_path / "run", resume=True)
    stop = 0
    options["fitting"] = replace(FIT, workers=1)  # which decides nothing
    made, _ = specialise(base(), digits, **options, out=tmp_path / "run", resume=True)
    unbroken, _ = specialise(base(), digits, **options, out=tmp_path / "unbroken")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(made[1].fused(x), unbroken[1].fused(x))


def test_two_densities_of_one_folder_are_refused(digits, tmp_path):
    config = SpecialiseConfig(left=(0.104, 0.1))
    with pytest.raises(AdviceError, match="whole percents"):
        specialise(base(), digits, config=config, fitting=FIT, out=tmp_path)
