"""From labelled images to a trained classifier in one call: what `lynceus train classify` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lynceus.backbones import create_model
from lynceus.backbones._weights import load_weights
from lynceus.core.config import changed
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.report import Report
from lynceus.core.rng import borrowed
from lynceus.data import Dataset, open_dataset
from lynceus.recipes.augmix import AugMix
from lynceus.recipes.supervised import PHOTO, PRESETS, Supervised, SupervisedConfig
from lynceus.tasks.classify import Classify
from lynceus.train.fit import FitConfig, fit

NANO = 64  # side at which the nano variants see photographs; small enough for minutes on a CPU


def view_of(data: Dataset, backbone: nn.Module, size: int | None) -> int:
    """The side at which a backbone sees these images: `size`; 0 (as they are) when they all are one small size in
    memory; else 64 for nano variants and the size that the variant was made for."""
    if size is not None:
        return size
    if data.images is not None:
        return 0
    return (
        NANO
        if str(getattr(backbone, "name", "")).endswith("_nano")
        else max(getattr(backbone, "input_size", (224, 224)))
    )


def recipe_config(preset: str, view: int, changes: dict[str, Any] | None = None) -> SupervisedConfig:
    """The augmentation of a preset at a size. "auto": random resized crops and flips where images must be brought to
    one size, nothing where they are small and equal (digits must not be mirrored)."""
    if preset == "auto":
        config = replace(PHOTO, view=view) if view else PRESETS["plain"]
    elif preset in PRESETS:
        config = PRESETS[preset]
        config = replace(config, view=view) if view or config.view else config
    else:
        raise unknown("preset", preset, ["auto", *PRESETS])
    return changed(config, changes or {})


def train_classifier(
    data: Dataset | str,
    model: str | nn.Module = "resnet_nano",
    *,
    held_out: Dataset | float = 0.2,
    size: int | None = None,
    preset: Literal["auto", "plain", "small", "photo", "fine-tune"] = "auto",
    augment: dict[str, Any] | None = None,
    config: FitConfig | None = None,
    weights: str | Path | None = None,
    label_smoothing: float = 0.0,
    loss: Callable[[Any, Any], dict[str, Any]] | None = None,
    recipe: Literal["supervised", "augmix"] = "supervised",
    out: str | Path | None = None,
    resume: bool | Literal["changed"] = False,
) -> tuple[nn.Module, Report]:
    """Trains `model` on labelled images; gives the predictor (pixels in [0, 1] in, logits out) and the Report.

    data: a Dataset, or whatever data.open takes. held_out: a Dataset to evaluate on, or the share of `data` set aside
      (the format's own val or test split is used where there is one).
    model: a name, or a backbone of your own. weights: a checkpoint to start from; its head is replaced.
    size: side of the square that images are brought to; None decides by the images and the model.
    preset: augmentation. augment: fields of SupervisedConfig that differ from the preset.
    loss: a function (raw outputs, batch) -> {"loss": tensor, ...} in place of cross-entropy.
    recipe: "augmix" also asks for one answer for a picture and mixtures of its changes, for robustness; a step costs
      three times as much.
    out, resume: the run folder, and whether to go on with the run in it (see `fit`).
    """
    config = config or FitConfig()
    data = open_dataset(data) if not isinstance(data, Dataset) else data
    if not data.classes:
        raise AdviceError(
            f"{data.origin} has no labels, so there is nothing to learn. "
            "Give each class its own folder: photos/cat, photos/dog."
        )
    if isinstance(held_out, Dataset):
        train, test = data, held_out
    else:
        if not 0 < held_out < 1:
            raise AdviceError(f"held_out is a share between 0 and 1, or a Dataset, not {held_out}.")
        train, test = data.train_test(held_out, seed=config.seed)
    with borrowed(config.seed, "model"):
        backbone = model if isinstance(model, nn.Module) else create_model(model, num_classes=len(data.classes))
    if weights is not None:
        load_weights(backbone, weights, head="drop")
    view = view_of(data, backbone, size)
    task = Classify(classes=tuple(data.classes), label_smoothing=label_smoothing, image_size=view or None)
    views = recipe_config(preset, view, augment)
    if recipe not in ("supervised", "augmix"):
        raise unknown("recipe", recipe, ["supervised", "augmix"])
    learner = (
        AugMix(task, backbone, views=views, loss=loss) if recipe == "augmix"
        else Supervised(task, backbone, views, loss=loss)
    )  # fmt: skip
    report = fit(learner, train, config=config, held_out=test, out=out, resume=resume)
    return learner.export(), report
