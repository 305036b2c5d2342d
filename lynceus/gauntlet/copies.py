"""Ranking by cosine: pictures of the same class, and the originals of attacked photographs (copy detection).

Protocol of Battle of the Backbones, arXiv 2310.19909 (bob-retrieval, after Copydays): unit features, cosine ranking,
mean average precision and mean reciprocal rank, precision at 1, 5, 10. Queries without a positive are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import as_float
from lynceus.gauntlet.features import FeatureBank
from lynceus.gauntlet.ranking import ranking_metrics


def _means(relevant: Bool[np.ndarray, "q n"]) -> dict[str, float]:
    """mAP, MRR and P@1, P@5, P@10 of relevance lists, best match first. Lists without a positive are left out."""
    means, _ = ranking_metrics(relevant.astype(np.int64))
    if not means["queries"]:
        raise AdviceError("No query has a positive; nothing can be found.")
    return {k: means[k] for k in ("mAP", "MRR", "P@1", "P@5", "P@10")}


def class_ranking(
    base: Float[np.ndarray, "n c"], base_labels: Any, query: Float[np.ndarray, "q c"], labels: Any
) -> dict[str, float]:
    """Queries among the base; positives share the label."""
    a = F.normalize(torch.from_numpy(np.ascontiguousarray(query)).double(), dim=1)
    b = F.normalize(torch.from_numpy(np.ascontiguousarray(base)).double(), dim=1)
    parts = []
    for rows, mine in zip(a.split(512), np.array_split(np.asarray(labels), np.arange(512, len(a), 512))):
        order = (rows @ b.T).argsort(dim=1, descending=True, stable=True).numpy()
        parts.append(np.asarray(base_labels)[order] == mine[:, None])
    return _means(np.concatenate(parts))


# ---- attacks: uint8 (3, h, w) -> uint8 (3, h', w') -------------------------------------------------------------------
def _crop(x: Tensor, draw: torch.Generator) -> Tensor:
    h, w = x.shape[-2:]
    a, b = int(0.7 * h), int(0.7 * w)
    top = int(torch.randint(0, h - a + 1, (), generator=draw))
    left = int(torch.randint(0, w - b + 1, (), generator=draw))
    return x[:, top : top + a, left : left + b]


def _jpeg(x: Tensor, draw: torch.Generator) -> Tensor:
    from torchvision.io import decode_jpeg, encode_jpeg

    return decode_jpeg(encode_jpeg(x, quality=8))


def _blur(x: Tensor, draw: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    return tv.gaussian_blur(x, [15, 15], [3.0, 3.0])


def _rotate(x: Tensor, draw: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    return tv.rotate(x, float(torch.rand((), generator=draw)) * 40 - 20, interpolation=tv.InterpolationMode.BILINEAR)


def _overlay(x: Tensor, draw: torch.Generator) -> Tensor:
    out, (h, w) = x.clone(), x.shape[-2:]
    top, left = (int(torch.randint(0, max(1, s // 2), (), generator=draw)) for s in (h, w))
    out[:, top : top + h // 3, left : left + w // 2] = torch.randint(0, 256, (3, 1, 1), generator=draw).to(torch.uint8)
    return out


def _resize(x: Tensor, draw: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    return tv.resize(x, [max(24, min(x.shape[-2:]) // 6)], antialias=True)


def _grey(x: Tensor, draw: torch.Generator) -> Tensor:
    return as_float(x).mean(0, keepdim=True).expand(3, -1, -1).mul(255).round().to(torch.uint8)


def _noise(x: Tensor, draw: torch.Generator) -> Tensor:
    return (as_float(x) + 0.2 * torch.randn(x.shape, generator=draw)).clamp(0, 1).mul(255).round().to(torch.uint8)


ATTACKS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop": _crop,
    "jpeg": _jpeg,
    "blur": _blur,
    "rotate": _rotate,
    "overlay": _overlay,
    "resize": _resize,
    "grey": _grey,
    "noise": _noise,
}


def photographs(source: Any) -> list[Tensor]:
    """uint8 (3, h, w) pictures of a folder, a list of paths, or tensors as they are."""
    from lynceus.data.decode import read_image

    if isinstance(source, (str, Path)):
        folder = Path(source)
        source = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not source:
            raise MissingError(
                f"There is no photograph in {folder.resolve()}; copy detection wants .jpg or .png files."
            )
    return [x if isinstance(x, Tensor) else read_image(x) for x in source]


def attacked(pictures: Sequence[Tensor], *, seed: int = 0, size: int = 64) -> dict[str, Tensor]:
    """Attack -> (n, 3, size, size); "original" too. Attacks act at a short side of 256, then all is resized."""
    from torchvision.transforms.v2 import functional as tv

    whole = [tv.resize(p, [256], antialias=True) if min(p.shape[-2:]) > 256 else p for p in pictures]
    out = {"original": torch.stack([_square(p, size) for p in whole])}
    for name, attack in ATTACKS.items():
        draws = [generator(seed, "attack", name, i) for i in range(len(whole))]
        out[name] = torch.stack([_square(attack(p, d), size) for p, d in zip(whole, draws)])
    return out


def _square(x: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    return tv.resize(x, [size, size], antialias=True)


def copy_detection(
    subject: Subject, source: Any, *, seed: int = 0, size: int | None = None, bank: FeatureBank | None = None
) -> dict[str, float]:
    """Attacked photographs as queries among the originals: mAP (each has one positive), MRR, and MRR per attack."""
    side = size or (subject.size[0] if subject.size else 64)
    views = attacked(photographs(source), seed=seed, size=side)
    extract = (bank or FeatureBank(quiet=True)).extractor(subject)
    vectors = {name: F.normalize(extract(x).double(), dim=1) for name, x in views.items()}
    base = vectors.pop("original")
    found, out = [], {}
    for name, query in vectors.items():
        order = (query @ base.T).argsort(dim=1, descending=True, stable=True)
        relevant = (order == torch.arange(len(base))[:, None]).numpy()
        found.append(relevant)
        out[f"copies MRR, {name}"] = _means(relevant)["MRR"]
    every = _means(np.concatenate(found))
    return {"copies mAP": every["mAP"], "copies MRR": every["MRR"]} | out
