"""Swin V2 and Swin on digits of 16 pixels, then untrained with twice the window on digits of 32.

python -m bench.swin_v2                    # three seeds, some ten minutes of one core
python -m bench.swin_v2 --seeds 0 1 --out swin_v2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench._digits import accuracy, train
from lynceus.backbones.swin import Swin, SwinConfig
from lynceus.backbones.swin_v2 import SwinV2, SwinV2Config
from lynceus.core.rules import match

MICRO: dict[str, Any] = {
    "image_size": (16, 16),
    "patch_size": 2,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 10,
}


def enlarged(model: nn.Module) -> nn.Module:
    """The same weights for 32 pixels and windows of 8: V2 tells its old windows, V1's tables are resized."""
    if isinstance(model, SwinV2):
        large: nn.Module = SwinV2(model.config.rescaled(image_size=(32, 32), window_size=8))
    else:
        assert isinstance(model, Swin)
        large = Swin(replace(model.config, image_size=(32, 32), window_size=8))
    large.load_state_dict(match(model.state_dict(), large).values, strict=True)
    return large.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for seed in args.seeds:
        for name, make in (
            ("swin_v2", lambda: SwinV2(SwinV2Config(**MICRO))),
            ("swin", lambda: Swin(SwinConfig(**MICRO))),
        ):
            model = train(make, 16, seed=seed, epochs=args.epochs)
            rows.append(
                {"model": name, "seed": seed, "at 16": accuracy(model, 16), "at 32": accuracy(enlarged(model), 32)}
            )
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    for name in ("swin_v2", "swin"):
        for side in ("at 16", "at 32"):
            found = [float(r[side]) for r in rows if r["model"] == name]
            print(f"{name:8} {side}: mean {statistics.mean(found):.1f} %, {min(found):.1f} to {max(found):.1f}")
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
