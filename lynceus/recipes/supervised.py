"""Supervised: a task on a backbone, learnt from labels.

Mixup: Zhang et al., ICLR 2018, arXiv 1710.09412. CutMix: Yun et al., ICCV 2019, arXiv 1905.04899. Random erasing: Zhong
et al., AAAI 2020, arXiv 1708.04896. Random resized crop: Szegedy et al., CVPR 2015, arXiv 1409.4842. Settings of the
`FINE_TUNE` recipe: Battle of the Backbones, NeurIPS 2023, arXiv 2310.19909.

What to expect on the digits of scikit-learn (1437 to learn from, 360 held out) is printed by `python -m bench.train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.config import to_dict
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Recipe, Task
from lynceus.core.types import Batch, Sample, as_float
from lynceus.train.checkpoint import describe_backbone
from lynceus.train.optim import param_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig:
    """What happens to images before they are learnt from. The defaults change nothing, so that digits stay digits.

    view: side of a random resized crop made of every image in the loader, 0 for none. Photographs need it.
    scale: smallest and largest share of the area in such a crop.
    crop: pixels by which small images are shifted at random in both directions (zeros come in).
    flip: chance of mirroring left and right. 0.5 suits photographs; digits and text need 0.
    mixup, cutmix: parameters of the beta distribution, 0 for none. mix_prob: chance that a batch is mixed.
    switch_prob: chance of cutmix where both are on.
    erase: chance that a rectangle of an image (2% to a third of the area) is set to grey.
    layer_decay: factor on the learning rate per level down from the head, for fine-tuning; 1 for none.
    """

    view: int = 0
    scale: tuple[float, float] = (0.35, 1.0)
    crop: int = 0
    flip: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    erase: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flip", "mix_prob", "switch_prob", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise AdviceError(f"{name} is a chance in [0, 1], not {getattr(self, name)}.")
        for name in ("view", "crop", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise AdviceError(f"{name} cannot be below 0; it is {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise AdviceError(
                f"scale is (smallest, largest) share of the area, 0 < smallest <= largest <= 1, not {self.scale}."
            )


PLAIN = SupervisedConfig()
SMALL = SupervisedConfig(crop=4, flip=0.5)  # natural images of 32 pixels or so
PHOTO = SupervisedConfig(view=224, flip=0.5)
FINE_TUNE = SupervisedConfig(view=224, scale=(0.08, 1.0), flip=0.5, mixup=0.8, cutmix=1.0, erase=0.25, layer_decay=0.75)
PRESETS: dict[str, SupervisedConfig] = {"plain": PLAIN, "small": SMALL, "photo": PHOTO, "fine-tune": FINE_TUNE}


class Supervised(Recipe):
    """Learns `task` on `backbone`; `export()` is the task's predictor.

    task: Classify(...) or any Task. backbone: a lynceus backbone, or a module that the task's `build` accepts.
    loss: (raw outputs, batch) -> {"loss": tensor, ...} in place of the task's own.
    """

    def __init__(
        self,
        task: Task,
        backbone: nn.Module,
        config: SupervisedConfig | None = None,
        *,
        loss: Callable[[Any, Batch], dict[str, Tensor]] | None = None,
    ):
        super().__init__()
        if isinstance(backbone, str):
            raise AdviceError(
                f"Supervised takes a backbone, not its name: Supervised(task, lynceus.create_model({backbone!r}))."
            )
        self.task = task
        self.config = config or SupervisedConfig()
        self.model: Any = task.build(backbone)
        self.loss = loss or task.loss

    @property
    def views(self) -> bool:
        """Whether `transform` makes a view of every sample; if not, batches may be cut straight out of memory."""
        return self.config.view > 0

    # what the loop asks for -----------------------------------------------------------------------
    def transform(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """A random resized crop and flip of one image (generator None: the image as it is)."""
        if generator is None or not self.config.view:
            return sample
        image = random_resized_crop(sample.image, self.config.view, self.config.scale, generator)
        if self.config.flip and float(torch.rand((), generator=generator)) < self.config.flip:
            image = image.flip(-1)
        return Sample(image=image, label=sample.label, id=sample.id, path=sample.path, extra=sample.extra)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Shift, flip, erase and mix a whole batch."""
        if len(set(batch.sizes)) > 1:
            a, b = sorted(set(batch.sizes))[:2]
            raise AdviceError(
                f"The images differ in size ({a[0]} x {a[1]}, {b[0]} x {b[1]} ...), so they make no batch: "
                "SupervisedConfig(view=224) cuts views of one size, or data.open(..., size=64) resizes them all."
            )
        config, image, label = self.config, batch.image, batch.label
        if config.crop:
            image = random_shift(image, config.crop, generator)
        if config.flip and not config.view:
            mirrored = (torch.rand(len(image), generator=generator) < config.flip).to(image.device)
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        if config.erase:
            image = erase(image, config.erase, generator)
        if (config.mixup or config.cutmix) and label is not None:
            if label.ndim == 1:
                if bool((label < 0).any()):
                    raise AdviceError(
                        "Mixing needs a label for every image, and some have none; leave them out, or mixup=0, "
                        "cutmix=0."
                    )
                label = F.one_hot(label, len(self.task.classes)).float()  # type: ignore[attr-defined]
            image, label = mix(image, label, config, generator)
        return Batch(image=image, sizes=batch.sizes, label=label, ids=batch.ids, extra=batch.extra)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model(batch.image), batch)

    def param_groups(self) -> list[dict[str, Any]]:
        """The backbone's groups (no decay where it says so, layer decay), and what the task added around it."""
        backbone = self.model.backbone
        groups = param_groups(backbone, layer_decay=self.config.layer_decay)
        known = {id(p) for p in backbone.parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        plain = [p for p in rest if p.ndim <= 1]
        return groups + [
            g
            for g in ({"params": [p for p in rest if p.ndim > 1]}, {"params": plain, "weight_decay": 0.0})
            if g["params"]
        ]

    def export(self) -> nn.Module:
        """The predictor: pixels in, raw outputs out, in eval mode."""
        model: nn.Module = self.model.eval()
        return model

    # what fit asks for before it starts -----------------------------------------------------------
    def check_data(self, data: Any, labels: Any) -> None:
        """Raises before long work when the task cannot learn from this data."""
        name = str(getattr(data, "name", "the data"))
        classes = getattr(data, "classes", None)
        if classes and hasattr(self.task, "check_classes"):
            self.task.check_classes(classes, what=name)
        if hasattr(self.task, "check_labels"):
            if labels is None:
                first = [data[i] for i in range(min(len(data), 16))]
                if all(getattr(s, "label", None) is None for s in first):
                    raise AdviceError(
                        f"The images of {name} have no labels; put them into one folder per class, or give a "
                        "labels file."
                    )
            else:
                self.task.check_labels(labels, what=name)

    def describe(self) -> dict[str, Any]:
        """What decides the result, as plain values: compared when a run is resumed."""
        return {
            "recipe": "supervised",
            "supervised": to_dict(self.config),
            "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__),
            "task": {"name": self.task.name, **to_dict(self.task)},
            "backbone": describe_backbone(self.model.backbone),
        }


# augmentation: whole batches, numbers from the generator alone ------------------------------------
def random_shift(image: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Every image of (b, c, h, w) moved by up to `by` pixels up, down, left and right; zeros come in."""
    b, _, h, w = image.shape
    top, left = torch.randint(0, 2 * by + 1, (2, b), generator=generator).to(image.device)
    windows = F.pad(image, (by, by, by, by)).unfold(2, h, 1).unfold(3, w, 1)
    return windows[torch.arange(b, device=image.device), :, top, left]


def erase(image: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """A rectangle of 2% to a third of the area, of proportions 0.3 to 3.3, set to mid-grey in a share of the images."""
    b, _, h, w = image.shape
    u = torch.rand((5, b), generator=generator)
    area = (0.02 + u[0] * (1 / 3 - 0.02)) * h * w
    ratio = torch.exp((u[1] * 2 - 1) * math.log(10 / 3))
    high, wide = (area * ratio).sqrt().clamp(1, h), (area / ratio).sqrt().clamp(1, w)
    top, left = u[2] * (h - high), u[3] * (w - wide)
    ys, xs = torch.arange(h)[None, :] + 0.5, torch.arange(w)[None, :] + 0.5
    rows = (ys >= top[:, None]) & (ys < (top + high)[:, None])
    cols = (xs >= left[:, None]) & (xs < (left + wide)[:, None])
    hit = rows[:, :, None] & cols[:, None, :] & (u[4] < chance)[:, None, None]
    grey = 128 if image.dtype == torch.uint8 else 0.5
    return image.masked_fill(hit[:, None].to(image.device), grey)


def mix(image: Tensor, label: Tensor, config: SupervisedConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a batch with itself in reverse order; labels (b, k) become those of the mixture."""
    draws = np.random.default_rng(int(torch.randint(0, 2**62, (), generator=generator)))
    if draws.random() >= config.mix_prob:
        return image, label
    cut = config.cutmix > 0 and (config.mixup == 0 or draws.random() < config.switch_prob)
    alpha = config.cutmix if cut else config.mixup
    keep = float(draws.beta(alpha, alpha))
    if not cut:
        x = as_float(image)
        return x * keep + x.flip(0) * (1 - keep), label * keep + label.flip(0) * (1 - keep)
    h, w = int(image.shape[-2]), int(image.shape[-1])
    side = math.sqrt(1 - keep)
    high, wide = int(h * side), int(w * side)
    y, z = int(draws.integers(h)), int(draws.integers(w))
    top, bottom, left, right = (
        max(0, y - high // 2),
        min(h, y + high // 2),
        max(0, z - wide // 2),
        min(w, z + wide // 2),
    )
    mixed = image.clone()
    mixed[..., top:bottom, left:right] = image.flip(0)[..., top:bottom, left:right]
    keep = 1 - (bottom - top) * (right - left) / (h * w)
    return mixed, label * keep + label.flip(0) * (1 - keep)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a rectangle with `scale` of the area and proportions 3/4 to 4/3."""
    u = torch.rand(4, generator=generator).tolist()
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    ratio = math.exp((u[1] * 2 - 1) * math.log(4 / 3))
    high = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(u[2] * (height - high + 1)), int(u[3] * (width - wide + 1)), high, wide


def random_resized_crop(image: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random rectangle of (c, h, w) (see `random_crop_box`), resized to `size` with antialias."""
    box = random_crop_box(int(image.shape[-2]), int(image.shape[-1]), scale, generator)
    return resized_crop(image, box, size)


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The rectangle (top, left, rows, columns) of (c, h, w), resized to `size` with antialias."""
    from torchvision.transforms.v2 import functional as tv

    made: Tensor = tv.resized_crop(image, *box, [size, size], antialias=True)
    return made
