"""SpaRTAN: are its channels less alike than a plain perceptron's? Small nets of equal size, trained on digits.

python -m bench.spartan                    # three seeds, about three minutes on one core
python -m bench.spartan --seeds 1 --out figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bench._digits import accuracy, digits, train
from lynceus.backbones.spartan import Block, SpaRTAN, SpaRTANConfig
from lynceus.layers.conv_norm_act import ConvNormAct

SIDE = 32
SMALL = SpaRTANConfig(
    depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), ratios=(4, 4, 2, 2), num_classes=10, drop_path_rate=0.0
)


class ConvMlp(nn.Module):
    """A plain perceptron with the same 3x3 inside: 1x1 -> 3x3, batch norm, GELU -> 1x1, on a map b h w c."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = ConvNormAct(hidden, hidden, 3, groups=hidden, norm_eps=1e-6, act=nn.GELU())
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.fc2(self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def net(*, wave: bool) -> SpaRTAN:
    """The small net; without waves, each channel mixer is a ConvMlp of as many parameters, to the nearest width."""
    model = SpaRTAN(SMALL)
    if not wave:
        for block in model.layers:
            if isinstance(block, Block):
                dim = block.scale_2.shape[1]
                budget = sum(p.numel() for p in block.cmixer.parameters())
                block.cmixer = ConvMlp(dim, round((budget - dim) / (2 * dim + 1 + 9 + 2)))
    return model


def likeness(model: SpaRTAN, images: Tensor) -> list[float]:
    """Per block: mean absolute correlation of two channels behind the 3x3 of the channel mixer, over images and cells.

    Channels that do not vary are left out.
    """
    found: list[float] = []

    def measure(_m: nn.Module, _i: Any, out: Tensor) -> None:
        rows = out.transpose(0, 1).flatten(1).double()
        rows = rows[rows.std(1) > 1e-8]
        table = torch.corrcoef(rows).abs()
        found.append(float((table.sum() - len(table)) / (len(table) * (len(table) - 1))))

    convs = [b.get_submodule("cmixer.conv") for b in model.layers if isinstance(b, Block)]
    handles = [conv.register_forward_hook(measure) for conv in convs]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = digits(SIDE)[2]
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for kind in ("waves", "perceptron"):
            model = cast(SpaRTAN, train(partial(net, wave=kind == "waves"), SIDE, seed=seed, epochs=12))
            blocks = likeness(model, held_out)
            row = {"mixer": kind, "seed": seed, "accuracy": accuracy(model, SIDE), "likeness": statistics.mean(blocks)}
            rows.append({**row, "parameters": sum(p.numel() for p in model.parameters()), "blocks": blocks})
            print(json.dumps(rows[-1]), flush=True)
    for kind in ("waves", "perceptron"):
        mine = [r for r in rows if r["mixer"] == kind]
        for name in ("accuracy", "likeness"):
            values = [r[name] for r in mine]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{kind:11} {name:9} {statistics.mean(values):.4f} +- {spread:.4f} over {len(values)} seeds")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
