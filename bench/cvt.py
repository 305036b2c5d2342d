"""CvT without positions on digits of 16 pixels, beside plain ViTs of its size without and with a position table.

python -m bench.cvt                        # three seeds, some ten minutes of one core
python -m bench.cvt --seeds 0 1 --out cvt.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench._digits import accuracy, train
from lynceus.backbones.cvt import CvT, CvTConfig
from lynceus.backbones.vit import ViT, ViTConfig

MICRO = CvTConfig(
    image_size=(16, 16),
    patch_size=(3, 3),
    patch_stride=(2, 2),
    patch_padding=(1, 1),
    dims=(24, 48),
    heads=(1, 2),
    depths=(1, 2),
    class_token=(False, True),
    num_classes=10,
)


def vit(position: Any) -> ViT:
    """Patches of 4 pixels, so as many tokens as the last stage of the CvT has."""
    return ViT(
        ViTConfig(image_size=(16, 16), patch_size=4, dim=48, depth=3, heads=2, position=position, num_classes=10)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "cvt": lambda: CvT(MICRO),
    "vit without positions": lambda: vit("none"),
    "vit with positions": lambda: vit("learned"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, make in NETS.items():
        size = sum(p.numel() for p in make().parameters())
        found = [accuracy(train(make, 16, seed=s, epochs=args.epochs), 16) for s in args.seeds]
        rows.append({"model": name, "parameters": size, "seeds": args.seeds, "accuracy": found})
        print(
            f"{name:24}{size:9,} parameters: mean {statistics.mean(found):.1f} %, "
            f"{', '.join(f'{f:.1f}' for f in found)}",
            flush=True,
        )
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
