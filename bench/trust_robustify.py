"""AugMix and robustify on CIFAR-10: what they bring against corruptions, and what they cost.

    python -m bench.trust_robustify                       # everything, about an hour of one core
    python -m bench.trust_robustify --only speed          # AugMix beside torchvision's transform, images per second
    python -m bench.trust_robustify --only small          # a small CNN: plain training and AugMix at equal steps
    python -m bench.trust_robustify --only robustify      # a bigger net: untouched, robustify, full AugMix fine-tuning
    python -m bench.trust_robustify --keep FOLDER         # trained nets are kept there, and found there again

4,000 of the 50,000 training pictures are held out, and clean accuracy is theirs; corruption error is the mean over the
15 corruptions of the benchmark, severities 1 to 5, of the first `--test` of them. Seconds are processor seconds of one
thread. The net that is made robust is trained here too, plainly and for minutes: nothing pretrained is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lynceus.data
from bench._data import CIFAR10
from bench._nets import ConvNet
from lynceus import FitConfig, fit
from lynceus.backbones.resnet import ResNet, ResNetConfig
from lynceus.core import rng
from lynceus.core.nouns import Recipe
from lynceus.core.report import environment
from lynceus.data.augmix import augmix
from lynceus.data.corrupt import BENCHMARK, corrupt
from lynceus.data.dataset import Dataset
from lynceus.recipes.augmix import AugMix
from lynceus.recipes.robustify import Robustify, RobustifyConfig
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.rewrite.three_heads import HEADS, ThreeHeads
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model

VIEWS = SupervisedConfig(crop=2, flip=0.5)
FIT = FitConfig(
    epochs=5, batch_size=128, lr=3e-3, schedule="one-cycle", precision="bf16", channels_last=True,
    log_every=20, quiet=True,
)  # fmt: skip
PRETRAIN = replace(FIT, epochs=None, steps=1500)
FULL = replace(FIT, epochs=None, steps=400, lr=1e-3, schedule="cosine")  # AugMix fine-tuning of the whole net
TUNE = replace(FULL, steps=340, lr=2e-3)  # robustify: one picture and one mixture a step, instead of two mixtures
METHOD = RobustifyConfig()
BIG = ResNetConfig(
    block="basic", depths=(1, 1, 2, 8), width=16, stem="cifar", num_classes=10, image_size=(32, 32),
    zero_init_residual=True,
)  # fmt: skip


def small_net() -> nn.Module:
    return ConvNet(24, 10, pooled=True)


def big_net() -> nn.Module:
    """12 residual blocks, 2.5 million weights."""
    return ResNet(BIG)


# training -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Course:
    """The data, where trained nets are kept, and the pictures that are judged by."""

    train: Dataset
    test: Dataset
    task: Classify
    folder: Path
    count: int  # held-out pictures that are corrupted


def timed(recipe: Recipe, course: Course, config: FitConfig, name: str) -> float:
    """Processor seconds of the training; the run is kept, and goes on where it was interrupted."""
    began = time.process_time()
    fit(recipe, course.train, config=config, out=course.folder / name, resume=True)
    seconds = time.process_time() - began
    (course.folder / name / "seconds.json").write_text(json.dumps({"seconds": seconds}))
    return seconds


def kept(
    name: str,
    net: Callable[[], nn.Module],
    recipe: Callable[[nn.Module], Supervised],
    config: FitConfig,
    course: Course,
) -> tuple[nn.Module, float]:
    """A trained predictor and the processor seconds it took; taken from the folder when it was trained before."""
    note = course.folder / name / "seconds.json"
    with rng.borrowed(0, name):
        fresh = net()
    if note.is_file():
        return load_model(course.folder / name, backbone=fresh), float(json.loads(note.read_text())["seconds"])
    made = recipe(fresh)
    seconds = timed(made, course, config, name)
    return made.export(), seconds


# judging ------------------------------------------------------------------------------------------
def corrupted(course: Course) -> dict[str, Tensor]:
    """The corrupted pictures (5, n, 3, 32, 32) by corruption; kept in a file."""
    from safetensors.torch import load_file, save_file

    file = course.folder / f"corrupted-{course.count}.safetensors"
    if not file.is_file():
        assert course.test.images is not None
        some = course.test.images[: course.count]
        made = {}
        for name in BENCHMARK:
            rows = [corrupt(some, name, s, generator=rng.generator(0, name, s), scale="cifar") for s in range(1, 6)]
            made[name] = torch.stack(rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, str(file))
    return load_file(str(file))


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Class numbers, 500 pictures at a time; of a net with three heads also each head's."""
    parts: dict[str, list[Tensor]] = {}
    for part in images.split(500):
        x = part.float().div(255)
        if isinstance(model, ThreeHeads):
            vector = model.vector(x)
            made = model.heads(vector)
            used = model.choice(vector, made).bool()[:, None]
            logits = {"": torch.where(used, made["robust"], made["clean"]), **{f"{k} head": made[k] for k in HEADS}}
        else:
            logits = {"": model(x)}
        for name, value in logits.items():
            parts.setdefault(name, []).append(value.argmax(-1))
    return {name: torch.cat(value) for name, value in parts.items()}


def judged(model: nn.Module, course: Course) -> dict[str, dict[str, float]]:
    """Clean accuracy and mean corruption error, in percent, of the net's answers ("") and of each of its heads."""
    assert course.test.images is not None
    assert course.test.labels is not None
    truth = torch.from_numpy(course.test.labels)
    found: dict[str, dict[str, float]] = {
        name: {"clean accuracy": 100 * float((told == truth).float().mean()), "mean corruption error": 0.0}
        for name, told in answers(model, course.test.images).items()
    }
    some, files = truth[: course.count], corrupted(course)
    for corruption, images in files.items():
        for name, told in answers(model, images.flatten(0, 1)).items():
            error = 100 * float((told != some.repeat(len(images))).float().mean())
            found[name][f"error {corruption}"] = error
            found[name]["mean corruption error"] += error / len(files)
    return found


def probed(model: nn.Module) -> float:
    """Accuracy of a linear probe of the frozen feature on the digits at 32 pixels, five folds, in percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net: Any = model
    digits = lynceus.data.open("digits", size=32)
    assert digits.images is not None
    with torch.inference_mode():
        x = torch.cat([
            net.backbone.forward_head(net.backbone.forward_features(net.prepared(part)), pre_logits=True)
            for part in digits.images.split(300)
        ])  # fmt: skip
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return 100 * float(cross_val_score(probe, x.numpy(), digits.labels, cv=folds).mean())


# the three tables ---------------------------------------------------------------------------------
def speed(course: Course) -> list[dict[str, Any]]:
    """Images per processor second of AugMix, ours on batches and torchvision's image by image, the same changes."""
    from torchvision.transforms import v2

    assert course.test.images is not None
    rows = []
    for side in (32, 224):
        x = nn.functional.interpolate(course.test.images[:256].float(), (side, side), mode="bilinear").to(torch.uint8)
        draw, theirs = torch.Generator().manual_seed(0), v2.AugMix(all_ops=False)
        batch = 256 if side == 32 else 32

        def ours(i: int, x: Tensor = x, batch: int = batch, draw: torch.Generator = draw) -> int:
            return len(augmix(x[:batch], draw))

        def other(i: int, x: Tensor = x, theirs: Any = theirs) -> int:
            theirs(x[i % len(x)])
            return 1

        rates = []
        for work in (ours, other):
            work(0)
            began, done, i = time.process_time(), 0, 0
            while time.process_time() - began < 3:
                done, i = done + work(i), i + 1
            rates.append(done / (time.process_time() - began))
        rows.append({"side": side, "lynceus": rates[0], "torchvision": rates[1], "ratio": rates[0] / rates[1]})
        print({k: round(v, 1) for k, v in rows[-1].items()}, flush=True)
    return rows


def small(course: Course) -> dict[str, Any]:
    """A small CNN, plain and with AugMix, for the same steps."""
    arms = {
        "plain": lambda net: Supervised(course.task, net, VIEWS),
        "augmix": lambda net: AugMix(course.task, net, views=VIEWS),
    }
    found: dict[str, Any] = {}
    for name, recipe in arms.items():
        model, seconds = kept(name, small_net, recipe, FIT, course)
        found[name] = {**judged(model, course)[""], "seconds": seconds}
        told(name, found[name])
    gain = found["plain"]["mean corruption error"] - found["augmix"]["mean corruption error"]
    loss = found["plain"]["clean accuracy"] - found["augmix"]["clean accuracy"]
    print(f"AugMix: mean corruption error {-gain:+.1f} points, clean accuracy {-loss:+.1f} points", flush=True)
    return {**found, "corruption gain": gain, "clean loss": loss}


def robust(course: Course) -> dict[str, Any]:
    """The big net as it is, fully fine-tuned with AugMix, and robustified by the small CNN; the card's four numbers."""
    teacher, taught = kept("augmix", small_net, lambda net: AugMix(course.task, net, views=VIEWS), FIT, course)
    big, _ = kept("big", big_net, lambda net: Supervised(course.task, net, VIEWS), PRETRAIN, course)

    def again() -> nn.Module:
        return copy.deepcopy(big).backbone  # type: ignore[return-value]

    full, full_seconds = kept("full", again, lambda net: AugMix(course.task, net, views=VIEWS), FULL, course)
    made, share, seconds = robustified(big, teacher, course)
    models: dict[str, nn.Module] = {"teacher": teacher, "big": big, "full": full, "robustify": made}
    found: dict[str, Any] = {}
    for name, model in models.items():
        for part, row in judged(model, course).items():
            found[f"{name} {part}".strip()] = row
        found[name]["probe on digits"] = probed(model)
    for name, row in found.items():
        told(name, row)
    start, best, ours = (100 - found[k]["mean corruption error"] for k in ("big", "full", "robustify"))
    four = {
        "share of weights tuned (<= 25%)": 100 * share,
        "share of full fine-tuning's gain (>= 50%)": 100 * (ours - start) / (best - start),
        "training time, of full fine-tuning's (<= 50%)": 100 * seconds / full_seconds,
        "the same with the teacher's training": 100 * (seconds + taught) / full_seconds,
        "clean accuracy, points (>= -1)": found["robustify"]["clean accuracy"] - found["big"]["clean accuracy"],
        "probe on digits, points (>= -1)": found["robustify"]["probe on digits"] - found["big"]["probe on digits"],
    }
    for name, value in four.items():
        print(f"{name:48}{value:8.1f}", flush=True)
    return {**found, "seconds": {"full": full_seconds, "robustify": seconds, "teacher": taught}, "four": four}


def robustified(big: nn.Module, teacher: nn.Module, course: Course) -> tuple[nn.Module, float, float]:
    """The three-headed net, the share of the big one's weights that learnt, and the processor seconds."""
    recipe = Robustify(big, teacher, METHOD, views=VIEWS)
    note = course.folder / "robustify" / "seconds.json"
    if note.is_file():
        seconds = float(json.loads(note.read_text())["seconds"])
        saved = load_model(course.folder / "robustify", backbone=big_net())
        return saved, recipe.share, seconds
    seconds = timed(recipe, course, TUNE, "robustify")
    return recipe.export(), recipe.share, seconds


def told(name: str, row: dict[str, float]) -> None:
    shown = {k: round(v, 1) for k, v in row.items() if not k.startswith("error ")}
    print(f"{name:22}", "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("speed", "small", "robustify"))
    parser.add_argument("--data", type=Path, default=CIFAR10)
    parser.add_argument("--keep", type=Path, help="folder of the trained nets; default: a temporary one")
    parser.add_argument("--test", type=int, default=1000, help="held-out pictures that are corrupted")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = lynceus.data.open(options.data)
    test, train = whole.split(4000 / len(whole), seed=1)
    found: dict[str, Any] = {"environment": environment(0), "test": options.test}
    with tempfile.TemporaryDirectory() as folder:
        course = Course(train, test, Classify(classes=whole.classes), options.keep or Path(folder), options.test)
        for name, table in (("speed", speed), ("small", small), ("robustify", robust)):
            if options.only in (None, name):
                found[name] = table(course)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
