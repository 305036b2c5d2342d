"""CvT without positions on digits of 16 pixels, beside plain ViTs of its size without and with a position table.

python -m bench.cvt                        # three seeds, some ten minutes of one core
python -m bench.cvt --seeds 0 1 --out cvt.json
python -m bench.cvt --folding              # what folded batch norms save, no training
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lynceus
from bench._digits import accuracy, train
from bench.peers import fill, forward_of, interleaved, median_ratio
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


def vit(patch: int, position: Any) -> ViT:
    """Patches of 2 or 4 pixels: as many tokens as the first or the last stage of the CvT has."""
    return ViT(
        ViTConfig(image_size=(16, 16), patch_size=patch, dim=48, depth=3, heads=2, position=position, num_classes=10)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "cvt": lambda: CvT(MICRO),
    "vit of 2 px, no positions": lambda: vit(2, "none"),
    "vit of 2 px, positions": lambda: vit(2, "learned"),
    "vit of 4 px, no positions": lambda: vit(4, "none"),
    "vit of 4 px, positions": lambda: vit(4, "learned"),
}


def folding(seconds: float) -> dict[str, float]:
    """CvT-13, one picture of 224 px: with batch norms folded, and unfolded because somebody listens to them.

    CPU time on one thread, else wall time.
    """
    model, x = lynceus.create_model("cvt_13"), torch.randn(1, 3, 224, 224)
    fill(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def unfolded() -> torch.Tensor:
        handles = [m.register_forward_hook(lambda *_: None) for m in norms]
        out = forward_of(model, x)()
        for h in handles:
            h.remove()
        return out

    folded = forward_of(model, x)
    difference = float((folded() - unfolded()).abs().max())
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved({"ours": folded, "peer": unfolded}, seconds, clock=clock)
    ms = [1e3 * statistics.median(times[k]) for k in ("ours", "peer")]
    return {"folded ms": ms[0], "unfolded ms": ms[1], "ratio": median_ratio(times), "largest difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folding", action="store_true", help="measure folded batch norms instead")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.folding:
        print(", ".join(f"{k} {v:.3g}" for k, v in folding(10.0).items()))
        return
    rows = []
    for name, make in NETS.items():
        size = sum(p.numel() for p in make().parameters())
        found = [accuracy(train(make, 16, seed=s, epochs=args.epochs), 16) for s in args.seeds]
        rows.append({"model": name, "parameters": size, "seeds": args.seeds, "accuracy": found})
        print(
            f"{name:26}{size:9,} parameters: mean {statistics.mean(found):.1f} %, "
            f"{', '.join(f'{f:.1f}' for f in found)}",
            flush=True,
        )
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
