"""A small training run as a program of its own, so that tests can kill it, and run it as several processes.

python worker.py OUT --steps 60 [--ema 0.99] [--resume] [--weights FILE] ...
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from lynceus.backbones import Backbone, BackboneConfig
from lynceus.core.types import Stage
from lynceus.data import open_dataset
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.tasks.classify import Classify
from lynceus.train.fit import FitConfig, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig(BackboneConfig):
    """norm: "layer" or "batch"."""

    width: int = 32
    norm: str = "layer"
    dropout: float = 0.1


class Toy(Backbone):
    """A patch convolution, a norm, a residual perceptron with dropout."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, config):
        super().__init__(config, [Stage(config.width, 4, "stem")])
        w = config.width
        self.stem = nn.Conv2d(config.in_chans, w, 4, 4)
        self.norm = nn.GroupNorm(1, w) if config.norm == "layer" else nn.BatchNorm2d(w)
        self.mlp = nn.Sequential(nn.Conv2d(w, 2 * w, 1), nn.GELU(), nn.Dropout(config.dropout), nn.Conv2d(2 * w, w, 1))
        self.head = nn.Linear(w, config.num_classes)

    def forward_stages(self, image):
        x = self.norm(self.stem(image))
        return [x + self.mlp(x)]

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": [(r"^(?:norm|mlp)", (0,))]}


def recipe(seed=0, **options):
    """A recipe with everything random switched on: shift, mixup or cutmix, dropout."""
    torch.manual_seed(seed)
    toy = Toy(ToyConfig(num_classes=10, **{k: options.pop(k) for k in ("norm", "dropout", "width") if k in options}))
    defaults = {"crop": 1, "mixup": 0.2, "cutmix": 1.0, "flip": 0.1, "erase": 0.1}
    task = Classify(num_classes=10, label_smoothing=0.05)
    return Supervised(task, toy, SupervisedConfig(**{**defaults, **options}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--loader", action="store_true", help="a list of views made per sample, not from memory")
    parser.add_argument("--weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_dataset("digits")
    train, test = data.subset(range(400)), data.subset(range(400, 500))
    made = recipe(width=args.width, dropout=args.dropout, **({"view": 8, "crop": 0} if args.loader else {}))
    config = FitConfig(
        steps=args.steps, batch_size=args.batch, accumulate=args.accumulate, ema=args.ema, save_every=args.save_every,
        evaluate_every=2, log_every=1, seed=3, quiet=True, device="cpu",
    )  # fmt: skip
    report = fit(made, train, config=config, held_out=test, out=args.out, resume=args.resume)
    if args.weights and int(__import__("os").environ.get("RANK", "0")) == 0:
        torch.save({"model": made.state_dict(), "summary": report.summary}, args.weights)


if __name__ == "__main__":
    main()
