"""Optimisers by name and learning-rate schedules as pure functions of the step (so that resuming is exact).

AdamW: Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101. One-cycle: Super-Convergence, arXiv
1708.07120. Cosine: SGDR, ICLR 2017, arXiv 1608.03983. LARS: arXiv 1708.03888. Layer decay: ELECTRA, ICLR
2020, arXiv 2003.10555; BEiT, ICLR 2022, arXiv 2106.08254.
AdamW, Adam and SGD are torch's (fused); every other name is timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from lynceus.core.errors import AdviceError, unknown

Schedule = Literal["cosine", "one-cycle", "linear", "step", "constant"]
SCHEDULES: tuple[str, ...] = ("cosine", "one-cycle", "linear", "step", "constant")
OWN = ("adamw", "adam", "sgd", "nesterov")


def lr_factor(step: int, total: int, schedule: str = "cosine", warmup: float = 0.0, final: float = 0.0) -> float:
    """What the base learning rate is multiplied with at `step` (0 .. total - 1) of `total`.

    cosine, linear, constant: linear warm-up over the share `warmup` of the run, then down to `final` (constant: stays).
    step: x0.1 at 1/3, 2/3 and 8/9 of the run (30, 60, 80 of 90 epochs). one-cycle: cosine up from 1/25 over the share
    `warmup` (0.3 when that is 0), cosine down to `final`, at least 1e-4 / 25.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    total = max(total, 1)
    if schedule == "one-cycle":
        up = max(1.0, (warmup or 0.3) * total - 1)
        down = max(1.0, total - 1 - up)
        floor = max(final, 1e-4 / 25)
        if step <= up:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / up)) / 2
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, (step - up) / down))) / 2
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    part = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, part))) / 2
    if schedule == "linear":
        return final + (1 - final) * (1 - min(1.0, part))
    if schedule == "step":
        return 0.1 ** sum(step >= total * at for at in (1 / 3, 2 / 3, 8 / 9))
    return 1.0


def param_groups(model: Any, *, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Groups of a model's trainable parameters: no decay for one-dimensional ones and `model.no_weight_decay()`;
    with `layer_decay`, "lr_scale" falls by that factor per depth group of `model.group_matcher` from the head down."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise AdviceError("Nothing is left to train: every parameter has requires_grad=False.")
    plain = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if layer_decay is None or layer_decay == 1:
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if p.ndim > 1 and n not in plain]},
            {"params": [p for n, p in named if p.ndim <= 1 or n in plain], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]
    if not 0 < layer_decay <= 1:
        raise AdviceError(f"layer_decay is a factor in (0, 1], not {layer_decay}.")
    if not hasattr(model, "group_matcher"):
        raise AdviceError(
            f"layer_decay needs {type(model).__name__}.group_matcher, which says the depth of each parameter."
        )
    depth = depths(model)
    top = max(depth.values())
    parts: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in named:
        parts.setdefault((depth.get(name, top), p.ndim <= 1 or name in plain), []).append(p)
    out: list[dict[str, Any]] = []
    for (at, bare), params in sorted(parts.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": params, "lr_scale": layer_decay ** (top - at)}
        out.append({**group, "weight_decay": 0.0} if bare else group)
    return out


def depths(model: Any) -> dict[str, int]:
    """Depth group of every parameter, 0 at the stem, by the model's `group_matcher`."""
    from timm.models import group_parameters

    found: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return found


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """The optimiser over parameter groups; a group's own "weight_decay" wins. Unknown names say the nearest one."""
    groups = [dict(g) for g in groups]
    params = [p for g in groups for p in g["params"]]
    if len({id(p) for p in params}) < len(params):
        raise AdviceError("A parameter is in two groups; each one belongs to exactly one.")
    key = name.lower()
    fused = {"fused": True} if all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params) else {}
    if key == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, **fused)
    if key == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, weight_decay=weight_decay, **fused)
    if key in ("sgd", "nesterov"):
        nesterov = key == "nesterov" and momentum > 0
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **fused)
    import timm.optim

    theirs: Any = timm.optim

    names = {*(str(n) for n in theirs.list_optimizers()), *OWN}
    if key not in names:
        raise unknown("optimizer", name, names)
    made: torch.optim.Optimizer = theirs.create_optimizer_v2(
        groups, opt=key, lr=lr, weight_decay=weight_decay, momentum=momentum
    )
    return made


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets every group to lr x its "lr_scale"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
