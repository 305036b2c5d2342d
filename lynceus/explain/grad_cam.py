"""Grad-CAM: where on the last map the answer comes from, for convolutional and token networks.

Selvaraju et al., ICCV 2017, arXiv 1610.02391. The map's channels are weighted by the mean gradient of the target's
logit, summed, and cut at 0. A backbone of this library is read without hooks (its last map goes into its own head).
Otherwise a forward hook takes the map of one module and hands a copy on, so that in-place activations behind it change
nothing; a module that runs several times in a pass is read at its last run. No backward hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.subject import Subject

Grid = Callable[[Tensor], Tensor]  # whatever a module gave -> map (b, c, h, w)
PREFIX = 8  # class and register tokens that may stand before the patches


def grad_cam(
    subject: Subject,
    images: Float[Tensor, "b c h w"],
    targets: Int[Tensor, " b"] | None = None,
    *,
    layer: str | None = None,
    batch: int = 64,
    keep_negative: bool = False,
) -> Float[Tensor, "b h w"]:
    """Heat maps at the size of the images, from the map of `layer`.

    layer: a module's name in `subject.model.named_modules()`; None takes the last map that the target's logit depends
      on: behind the last stage, or before the last attention where only a class token is read. targets: None takes the
      answers. keep_negative: leaves what speaks against the target in the map.
    Raises AdviceError for a plain function, an unknown layer, or a model without maps.
    """
    subject.require(frozenset({"gradients"}))
    if layer is not None:
        names = dict(subject.model.named_modules())
        if layer not in names or not layer:
            raise unknown("layer", layer, [n for n in names if n], how="See subject.model.named_modules().")
    parts, at = [], layer
    for start in range(0, len(images), batch):
        x = images[start : start + batch]
        wanted = None if targets is None else targets[start : start + batch]
        read = None if at is not None else _through_stages(subject, x, wanted)
        if read is None:
            if at is None:
                at = last_map(subject, x)
            read = _through_hook(subject, x, wanted, at)
        maps, gradient = read
        heat = (maps * gradient.mean((-2, -1), keepdim=True)).sum(1, keepdim=True)
        heat = heat if keep_negative else heat.relu()
        parts.append(F.interpolate(heat, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0])
    return torch.cat(parts)


def last_map(subject: Subject, images: Float[Tensor, "b c h w"]) -> str:
    """The name of the last module whose map (more than one cell) moves the logit of the answer."""
    model = subject.model
    seen: dict[str, tuple[int, int]] = {}  # name -> (when it last finished, channels)
    few = images[:2]

    def listen(name: str) -> Any:
        def hear(_module: nn.Module, _args: Any, out: Any) -> None:
            grid = as_map(out, few) if isinstance(out, Tensor) else None
            if grid is not None:
                seen.pop(name, None)
                seen[name] = (len(seen), int(grid(out).shape[1]))

        return hear

    handles = [m.register_forward_hook(listen(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            subject(few)
    finally:
        for handle in handles:
            handle.remove()
    order = list(seen)[::-1]
    for name in order:
        if seen[name][1] != seen[order[0]][1]:
            continue  # queries, hidden units: not the stream that the classifier reads
        _, gradient = _through_hook(subject, few, None, name)
        if bool(gradient.abs().sum() > 0):
            return name
    raise AdviceError(
        f"{subject.name} has no map (b, c, h, w) or tokens (b, n, c) that its answer depends on (behind a classifier "
        "of zeros nothing does); give layer=NAME of one."
    )


def _through_stages(subject: Subject, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Map and gradient of a Backbone of ours whose head reads its last map; None for everything else."""
    model: Any = subject.model
    net = getattr(model, "backbone", model)
    if not (hasattr(net, "forward_stages") and hasattr(net, "forward_head") and hasattr(net, "forward_features")):
        return None
    x = subject.prepare(images)
    if net is not model:
        if not hasattr(model, "prepared"):
            return None
        x = model.prepared(x)
    with torch.enable_grad():
        features = net.forward_features(x.detach().requires_grad_())
        if features.ndim != 4 or features.shape[-1] * features.shape[-2] < 2:
            return None
        gradient = _slope(net.forward_head(features), features, targets)
    if tuple(features.shape[-2:]) == tuple(images.shape[-2:]) or not bool(gradient.abs().sum() > 0):
        return None
    return features.detach(), gradient


def _through_hook(subject: Subject, images: Tensor, targets: Tensor | None, layer: str) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []

    def hear(_module: nn.Module, _args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        kept.append(out if out.requires_grad else out.detach().requires_grad_())
        return kept[-1].clone()

    handle = dict(subject.model.named_modules())[layer].register_forward_hook(hear)
    try:
        with torch.enable_grad():
            out = subject(images.detach().clone().requires_grad_())
            if not kept:
                raise AdviceError(f"The layer {layer!r} gave no tensor in this pass; choose another one.")
            gradient = _slope(out, kept[-1], targets)
    finally:
        handle.remove()
    grid = as_map(kept[-1], images)
    if grid is None:
        raise AdviceError(
            f"The layer {layer!r} gives {tuple(kept[-1].shape)}, which is no map (b, c, h, w) and no grid of tokens; "
            "choose a convolution, a stage or a block."
        )
    return grid(kept[-1].detach()), grid(gradient)


def _slope(outputs: Tensor, of: Tensor, targets: Tensor | None) -> Tensor:
    chosen = outputs.argmax(1) if targets is None else targets.to(outputs.device).long()
    if int(chosen.max()) >= outputs.shape[1] or int(chosen.min()) < 0:
        raise AdviceError(f"The targets reach {int(chosen.max())}; the subject has {outputs.shape[1]} classes.")
    score = outputs.gather(1, chosen[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, of, allow_unused=True)
    return torch.zeros_like(of) if gradient is None else gradient.detach()


def as_map(out: Tensor, images: Tensor) -> Grid | None:
    """How a module's output is read as a map of these images; None if it is none, or has a single cell."""
    height, width = int(images.shape[-2]), int(images.shape[-1])
    if len(out) != len(images):
        return None
    if out.ndim == 4:
        first = _fits(out.shape[2], out.shape[3], height, width)
        last = _fits(out.shape[1], out.shape[2], height, width)
        if first is None and last is None:
            return None
        if last is None or (first is not None and first <= last):
            return _as_is
        return _channels_first
    if out.ndim == 3:
        for extra in range(PREFIX + 1):
            count = out.shape[1] - extra
            rows = max(1, round((max(count, 1) * height / width) ** 0.5))
            if count % rows == 0 and (gap := _fits(rows, count // rows, height, width)) is not None and gap < 0.1:
                return _Tokens(extra, rows)
    return None


def _fits(rows: int, columns: int, height: int, width: int) -> float | None:
    """How many cells a map is off the proportions of the image; None when it cannot be its map."""
    if rows * columns < 2 or rows > height or columns > width:
        return None
    scale = (rows * columns / (height * width)) ** 0.5
    gap = max(abs(rows - height * scale), abs(columns - width * scale))
    return gap if gap < 1 else None


def _as_is(x: Tensor) -> Tensor:
    return x


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class _Tokens:
    def __init__(self, extra: int, rows: int):
        self.extra, self.rows = extra, rows

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, self.extra :].unflatten(1, (self.rows, -1)).permute(0, 3, 1, 2)
