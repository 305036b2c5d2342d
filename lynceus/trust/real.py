"""Generated images beside real ones: does the model see the difference, and would a nearest neighbour agree?

Scores: the largest softmax probability (Hendrycks & Gimpel, ICLR 2017, arXiv 1610.02136) and the energy -logsumexp of
the logits (Liu et al., NeurIPS 2020, arXiv 2010.03759).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.plots import lines
from lynceus.core.subject import Subject
from lynceus.core.types import as_float
from lynceus.trust.evolution import log_odds, logits_of

BINS = 30


def auroc(low: Float64[Tensor, " n"], high: Float64[Tensor, " m"]) -> float:
    """The chance that a value of `high` is above one of `low`; equal ones count half. 0.5 tells nothing apart."""
    both, inverse = torch.cat([low, high]).unique(return_inverse=True)
    count = torch.bincount(inverse, minlength=len(both)).double()
    rank = count.cumsum(0) - (count - 1) / 2  # mean rank of each value, from 1
    ranks = rank[inverse[len(low) :]]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def scores(subject: Subject, images: Tensor, *, batch_size: int = 256) -> dict[str, Float64[Tensor, " n"]]:
    """Per image: "confidence", log odds of the largest softmax probability, and "energy"."""
    confidence, energy = [], []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            logits = logits_of(subject, as_float(images[start : start + batch_size]), start).cpu()
            confidence.append(log_odds(logits).amax(1))
            energy.append(-logits.double().logsumexp(1))
    return {"confidence": torch.cat(confidence).clone(), "energy": torch.cat(energy).clone()}


def told_apart(
    subject: Subject, fooling: UInt8[Tensor, "b c h w"], real: Tensor, *, batch_size: int = 256
) -> tuple[dict[str, float], dict[str, bytes], dict[str, np.ndarray]]:
    """Summary (AUROC of real over fooling images by each score), histograms, and the scores themselves."""
    ours = scores(subject, fooling, batch_size=batch_size)
    theirs = scores(subject, real, batch_size=batch_size)
    summary = {
        "auroc_max_softmax": auroc(ours["confidence"], theirs["confidence"]),
        "auroc_energy": auroc(-ours["energy"], -theirs["energy"]),
    }
    figures = {
        "max_softmax_of_real_and_fooling_images.plotly": histogram(
            {"fooling": ours["confidence"].sigmoid(), "real": theirs["confidence"].sigmoid()},
            title="largest softmax probability",
            ends=(0.0, 1.0),
        ),
        "energy_of_real_and_fooling_images.plotly": histogram(
            {"fooling": ours["energy"], "real": theirs["energy"]}, title="energy, -logsumexp of the logits"
        ),
    }
    arrays = {f"{kind}_{k}": v.numpy() for kind, part in (("fooling", ours), ("real", theirs)) for k, v in part.items()}
    return summary, figures, arrays


def histogram(series: dict[str, Tensor], *, title: str, ends: tuple[float, float] | None = None) -> bytes:
    """Shares of images per bin, as steps, one line per name."""
    together = torch.cat(list(series.values()))
    low, high = ends if ends is not None else (float(together.min()), float(together.max()))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    drawn = {}
    for name, values in series.items():
        share = np.histogram(values.numpy(), edges)[0] / len(values)
        drawn[name] = (np.repeat(edges, 2)[1:-1], np.repeat(share, 2))
    return lines(drawn, x_title=title, y_title="share of images", markers=False)


def resemblance(
    images: UInt8[Tensor, "b c h w"], meant: Int64[Tensor, " b"], real: Tensor, labels: Int64[Tensor, " n"]
) -> list[dict[str, Any]]:
    """Per generated image: "correlation", the largest with a real image of the class it is meant for (None where there
    is none), and "nearest", the class of the nearest real image by pixels."""
    a, b = (as_float(x).double().flatten(1) for x in (images, real))
    if a.shape[1] != b.shape[1]:
        raise AdviceError(f"Real images {tuple(real.shape[1:])} and generated ones {tuple(images.shape[1:])} differ.")
    nearest = labels[torch.cdist(a, b).argmin(1)]
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    # a picture of one colour resembles nothing
    a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (a, b))
    correlation = (a @ b.T).masked_fill(labels[None] != meant[:, None], -2)
    best = correlation.amax(1).tolist()
    return [{"correlation": v if v >= -1.5 else None, "nearest": int(n)} for v, n in zip(best, nearest.tolist())]
