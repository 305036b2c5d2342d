"""AugMix and robustify on CIFAR-10: what they bring against corruptions, and what they cost.

    python -m bench.trust_robustify                       # everything, about an hour of one core
    python -m bench.trust_robustify --only speed          # AugMix beside torchvision's transform, images per second
    python -m bench.trust_robustify --only small          # a small CNN: plain training and AugMix at equal steps
    python -m bench.trust_robustify --only robustify      # a bigger net: untouched, robustify, full AugMix fine-tuning
    python -m bench.trust_robustify --keep FOLDER         # trained nets are kept there, and found there again

4,000 of the 50,000 training pictures are held out; corruption error is the mean over the 15 corruptions of the
benchmark, severities 1 to 5, of the first `--test` of them. Seconds are processor seconds of one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from bench._nets import ConvNet
from lynceus import FitConfig, fit
from lynceus.backbones.resnet import ResNet, ResNetConfig
from lynceus.core.nouns import Recipe
from lynceus.core.rng import borrowed
from lynceus.data.dataset import Dataset
from lynceus.recipes.supervised import SupervisedConfig
from lynceus.train.checkpoint import load_model

VIEWS = SupervisedConfig(crop=2, flip=0.5)
FIT = FitConfig(
    epochs=5,
    batch_size=128,
    lr=3e-3,
    schedule="one-cycle",
    precision="bf16",
    channels_last=True,
    log_every=20,
    quiet=True,
)
BIG = ResNetConfig(
    block="basic", depths=(1, 1, 2, 8), width=16, stem="cifar", num_classes=10, image_size=(32, 32),
    zero_init_residual=True,
)  # fmt: skip


def small_net() -> nn.Module:
    return ConvNet(24, 10, pooled=True)


def big_net() -> nn.Module:
    """12 residual blocks, 2.5 million weights."""
    return ResNet(BIG)


def kept(
    folder: Path, net: Callable[[], nn.Module], recipe: Callable[[nn.Module], Recipe], data: Dataset, config: FitConfig
) -> tuple[nn.Module, float]:
    """A trained predictor and the processor seconds it took; taken from `folder` when it was trained before."""
    note = folder / "seconds.json"
    with borrowed(0, "bench"):
        fresh = net()
    if note.is_file():
        return load_model(folder, backbone=fresh), float(json.loads(note.read_text())["seconds"])
    began = time.process_time()
    made = recipe(fresh)
    fit(made, data, config=config, out=folder, resume=True)
    seconds = time.process_time() - began
    note.write_text(json.dumps({"seconds": seconds}))
    return made.export(), seconds
