"""The loop: learning, accumulation, averaging, budgets, what is logged, and what is refused."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lynceus.core.config import from_dict, load_yaml
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Recipe
from lynceus.core.report import Report
from lynceus.core.types import Sample
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.tasks.classify import Classify
from lynceus.train.fit import FitConfig, fit

QUICK = FitConfig(steps=8, batch_size=40, quiet=True, device="cpu")


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        if a[key].is_floating_point():
            torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def trained(worker, data, config, **options):
    recipe = worker.recipe(**options)
    report = fit(recipe, data, config=config)
    return recipe.state_dict(), report


def test_it_learns(worker, small):
    plain = worker.recipe(crop=0, mixup=0, cutmix=0, flip=0, erase=0)
    config = FitConfig(epochs=15, batch_size=16, lr=1e-2, quiet=True, device="cpu")
    report = fit(plain, small[0], config=config, held_out=small[1])
    assert report.summary["accuracy"] > 0.8
    assert report.summary["steps"] == 15 * (400 // 16)
    model = plain.export()
    assert not model.training
    with torch.no_grad():
        right = (model(small[1].images).argmax(1).numpy() == small[1].labels).mean()
    assert right == pytest.approx(report.summary["accuracy"])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(worker, small):
    a, _ = trained(worker, small[0], QUICK)
    torch.manual_seed(12345)  # the caller's global state does not matter
    b, _ = trained(worker, small[0], QUICK)
    c, _ = trained(worker, small[0], replace(QUICK, seed=1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_the_callers_random_state_is_given_back(worker, small):
    made = worker.recipe()
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    fit(made, small[0], config=QUICK)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulation_equals_the_large_batch(worker, small, parts):
    whole, _ = trained(worker, small[0], QUICK, dropout=0.0)
    split, _ = trained(worker, small[0], replace(QUICK, accumulate=parts), dropout=0.0)
    close(whole, split, 2e-5)


def test_another_batch_size_differs_so_the_comparison_can_fail(worker, small):
    whole, _ = trained(worker, small[0], QUICK, dropout=0.0)
    other, _ = trained(worker, small[0], replace(QUICK, batch_size=20), dropout=0.0)
    assert any(float((whole[k] - other[k]).abs().max()) > 1e-3 for k in whole if whole[k].is_floating_point())


@pytest.mark.parametrize("workers", [0, 2])
def test_views_from_the_loader_do_not_depend_on_workers(worker, small, workers):
    samples = [small[0][i] for i in range(120)]
    a, _ = trained(worker, samples, QUICK, view=8, crop=0)
    b, _ = trained(worker, samples, replace(QUICK, workers=workers), view=8, crop=0)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_samples_in_a_list_and_images_in_memory_are_the_same_to_it(worker, small):
    a, _ = trained(worker, small[0], QUICK)
    b, _ = trained(worker, [small[0][i] for i in range(len(small[0]))], QUICK)
    c, _ = trained(worker, iter([small[0][i] for i in range(len(small[0]))]), QUICK)
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)


def test_two_processes_equal_one(worker, forked, tmp_path):
    """gloo; a network without batch statistics and without dropout, whose masks are drawn per process."""
    options = ["--steps", "12", "--batch", "32", "--dropout", "0", "--weights"]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    forked.wait(forked.start([tmp_path / "a", *options, one]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        forked.start([tmp_path / "b", *options, two], {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)
    ]
    for rank in ranks:
        forked.wait(rank)
    a, b = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    close(a["model"], b["model"], 2e-5)
    assert a["summary"]["accuracy"] == pytest.approx(b["summary"]["accuracy"], abs=0.011)
    assert json.loads((tmp_path / "b/environment.json").read_text())["processes"] == "2"


@pytest.mark.slow
def test_two_processes_equal_one_through_torchrun(worker_file, tmp_path):
    options = ["--steps", "30", "--batch", "33", "--dropout", "0", "--accumulate", "2", "--weights"]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, worker_file, tmp_path / "a", *options, one], check=True, env=env)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, worker_file, tmp_path / "b", *options, two], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    close(torch.load(one, weights_only=True)["model"], torch.load(two, weights_only=True)["model"], 1e-4)


def test_averaged_weights_follow_the_formula(worker, small):
    class Track(Supervised):
        seen: list

        def after_step(self, step, total):
            self.seen.append([p.detach().clone() for p in self.parameters()])

    torch.manual_seed(0)
    toy = worker.Toy(worker.ToyConfig(num_classes=10))
    recipe = Track(Classify(num_classes=10), toy)
    recipe.seen = [[p.detach().clone() for p in recipe.parameters()]]
    fit(recipe, small[0], config=replace(QUICK, ema=0.5))
    average = recipe.seen[0]
    for step, values in enumerate(recipe.seen[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = [a * decay + v * (1 - decay) for a, v in zip(average, values)]
    for mine, theirs in zip(recipe.parameters(), average):
        torch.testing.assert_close(mine.data, theirs, rtol=1e-5, atol=1e-6)


def test_batch_statistics_are_averaged_too(worker, small):
    recipe = worker.recipe(norm="batch")
    fit(recipe, small[0], config=replace(QUICK, ema=0.9))
    assert int(recipe.model.backbone.norm.num_batches_tracked) == 8


def test_bf16_and_channels_last_train(worker, small):
    state, report = trained(worker, small[0], replace(QUICK, precision="bf16", channels_last=True))
    assert np.isfinite(report.summary["train_loss"])
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())


def test_settings_of_one_run_do_not_leak_into_the_next(worker, small):
    before = dict(os.environ)
    first, _ = trained(worker, small[0], QUICK)
    trained(worker, small[0], replace(QUICK, precision="bf16"))
    again, _ = trained(worker, small[0], QUICK)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert dict(os.environ) == before


def test_fp16_on_a_cpu_says_what_to_use(worker, small):
    with pytest.raises(AdviceError, match="bf16"):
        fit(worker.recipe(), small[0], config=replace(QUICK, precision="fp16"))


def test_a_device_that_is_not_there(worker, small):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so asking for it is no mistake")
    with pytest.raises(AdviceError, match="no cuda device"):
        fit(worker.recipe(), small[0], config=replace(QUICK, device="cuda"))


def test_a_budget_of_seconds_stops_early_and_says_so(worker, small):
    report = fit(worker.recipe(), small[0], config=FitConfig(epochs=10_000, seconds=0.5, quiet=True, device="cpu"))
    assert report.summary["steps"] < 60_000
    assert any("0.5 seconds" in note for note in report.notes)


def test_the_run_folder(worker, small, tmp_path):
    config = FitConfig(epochs=2, batch_size=40, evaluate_every=1, log_every=4, quiet=True, device="cpu", seed=11)
    report = fit(worker.recipe(), small[0], config=config, held_out=small[1], out=tmp_path)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml", "environment.json", "log.csv", "metrics.csv", "report.html", "report.json",
        "checkpoints/last.pt", "checkpoints/last.safetensors", "checkpoints/best.safetensors",
    }  # fmt: skip
    assert from_dict(FitConfig, load_yaml(tmp_path / "config.yaml")["fit"]) == config
    assert json.loads((tmp_path / "environment.json").read_text())["seed"] == "11"
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].split(",") == ["step", "epoch", "lr", "loss", "accuracy", "images_per_second", "seconds"]
    assert [r.split(",")[0] for r in rows[1:]] == ["4", "8", "12", "16", "20"]
    metrics = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(metrics) == 3
    back = Report.load(tmp_path)
    assert back.summary["accuracy"] == report.summary["accuracy"]
    assert {
        "loss.plotly",
        "accuracy.plotly",
        "confusion matrix.plotly",
        "calibration.plotly",
        "worst pictures.png",
    } <= set(back.figures)
    assert back.arrays["confusion"].sum() == 100
    assert len(back.rows) == 10


def test_logged_losses_are_those_of_the_steps(worker, small):
    class Count(Recipe):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
            self.register_buffer("n", torch.zeros(()))

        def forward(self, batch):
            self.n += 1
            return {"loss": (self.w * 0).sum() + self.n, "twice": self.n * 2}

        def export(self):
            return nn.Identity()

    report = fit(
        Count(), small[0], config=FitConfig(steps=7, batch_size=40, log_every=3, quiet=True, device="cpu", clip=0)
    )
    assert report.arrays["log.loss"].tolist() == [2, 5, 7]
    assert report.arrays["log.twice"].tolist() == [4, 10, 14]


def test_any_check_or_function_may_evaluate(worker, small):
    seen = []

    def evaluate(subject, data):
        seen.append((len(data), subject(data.images[:2]).shape[-1]))
        return {"accuracy": len(seen)}

    config = replace(QUICK, steps=None, epochs=3, evaluate_every=1)
    report = fit(worker.recipe(), small[0], config=config, evaluate=evaluate, held_out=small[1])
    assert seen == [(100, 10)] * 3
    assert report.summary["accuracy"] == 3


class Broken(Recipe):
    """Gives a loss that is wrong in some way from a step on."""

    def __init__(self, how, at=3):
        super().__init__()
        self.net = nn.Linear(3 * 64, 10)
        self.how, self.at, self.step = how, at, 0

    def forward(self, batch):
        self.step += 1
        loss = nn.functional.cross_entropy(self.net(batch.pixels().flatten(1)), batch.label)
        if self.step > self.at:
            if self.how == "loss":
                loss = loss * float("nan")
            elif self.how == "gradient":  # finite forward, infinite derivative
                loss = loss + (self.net.weight * 0).abs().sum().sqrt()
            elif self.how == "weight":
                with torch.no_grad():
                    self.net.bias[2] = float("inf")
                loss = loss + self.net.bias.sum() * 1.0
            elif self.how == "kind":
                return loss
            elif self.how == "shape":
                return {"loss": loss.expand(2)}
            elif self.how == "memory":
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."
                )
        return {"loss": loss, "extra": loss * 2}

    def export(self):
        return self.net


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("loss", r"diverged at step 3 of 8.*lr .*loss = nan.*extra = nan.*Try lr=0\.0005"),
        ("gradient", r"diverged at step 3 of 8.*first gradient that is not finite is that of net\.weight"),
        ("weight", r"diverged at step 3.*first weight that is not finite is net\.bias"),
        ("kind", "dict with 'loss'"),
        ("shape", "one number"),
        ("memory", "accumulate=2"),
    ],
)
def test_what_goes_wrong_is_explained(small, how, text):
    with pytest.raises(AdviceError, match=text):
        fit(Broken(how), small[0], config=QUICK)


def test_images_that_are_not_finite_are_named(worker, small):
    samples = [Sample(image=torch.rand(3, 8, 8), label=i % 10, id=f"picture{i}") for i in range(40)]
    samples[17].image[0, 0, 0] = float("nan")
    plain = worker.recipe(crop=0, mixup=0, cutmix=0, flip=0, erase=0)
    with pytest.raises(AdviceError, match=r"images themselves are not finite.*picture17"):
        fit(plain, samples, config=QUICK)


def test_a_bad_checkpoint_never_replaces_a_good_one(small, tmp_path):
    with pytest.raises(AdviceError, match="last good checkpoint"):
        fit(Broken("weight"), small[0], config=replace(QUICK, save_every=1), out=tmp_path)
    state = torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(v).all() for v in state["recipe"].values())


def toy(worker, classes=10):
    return worker.Toy(worker.ToyConfig(num_classes=classes))


@pytest.mark.parametrize(
    ("data", "classes", "text"),
    [
        ([], 10, "empty"),
        ("digits", 10, "data.open"),
        (3, 10, "not int"),
        ([Sample(image=torch.zeros(3, 8, 8, dtype=torch.uint8), label=1)] * 9, 10, "one class"),
        ([Sample(image=torch.zeros(3, 8, 8, dtype=torch.uint8), label=i) for i in range(12)], 10, "label 11.*0 to 9"),
        ([Sample(image=torch.zeros(3, 8, 8, dtype=torch.uint8))] * 9, 10, "label"),
        ([Sample(image=torch.zeros(3, 8, 8 + i, dtype=torch.uint8), label=i) for i in range(4)], 4, "differ in size"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused_before_long_work(worker, data, classes, text):
    recipe = Supervised(Classify(num_classes=classes), toy(worker, classes))
    with pytest.raises(AdviceError, match=text):
        fit(recipe, data, config=QUICK)


def test_another_class_list_is_refused(worker, digits):
    recipe = Supervised(Classify(classes=list("abcdefghij")), toy(worker))
    with pytest.raises(AdviceError, match="class list"):
        fit(recipe, digits, config=QUICK)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"epochs": 0},
        {"batch_size": 0},
        {"schedule": "cosin"},
        {"warmup": 5},
        {"ema": 1.0},
        {"precision": "half"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(AdviceError):
        FitConfig(**options)


def test_a_name_is_no_backbone():
    with pytest.raises(AdviceError, match="create_model"):
        Supervised(Classify(num_classes=3), "vit_nano", SupervisedConfig())
