"""How much a layer's output is distorted when its least blocks go: second-order curves from one calibration pass.

LPViT: Low-Power Semi-structured Pruning for Vision Transformers, ECCV 2024, arXiv 2407.02068.
Code: Akimoto-Cris/LPViT (no licence; facts only).

g = mean over batches of d/dW mean(f(x)^2), no labels. The Hessian is the empirical Fisher, H = g g^T + lambda I. With
dW = W_pruned - W, a layer at sparsity s is distorted by
    delta(s) = mean((dW * g)^2) + 1/2 dW^T H dW = mean((dW * g)^2) + 1/2 (g . dW)^2 + 1/2 lambda |dW|^2.
Kept sets are nested, so one cumulative sum over the blocks in the order of their scores gives the whole curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.block_prune.sparse import areas, blocks_of, matrix_of

LAMBDA = 1e-7
STEPS = 100  # of the grid of sparsities
Ranking = Literal["taylor", "magnitude"]


@dataclass(frozen=True)
class Curve:
    """One layer over the grid of sparsities 0, .01, ..., 1.

    shape: (out, in) of its weight as a matrix. grid: (rows, columns) of blocks. positions: places per image at which
    the weight is used. order: block numbers, the least first; the same ranking serves curves and masks. count: blocks
    kept at each sparsity. distortion: delta. macs: multiply-adds per image that are left.
    """

    name: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    positions: int
    order: np.ndarray
    count: np.ndarray
    distortion: np.ndarray
    macs: np.ndarray

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]

    def mask(self, index: int) -> np.ndarray:
        """The kept blocks (rows, columns) at a place of the grid."""
        kept = np.zeros(self.blocks, dtype=bool)
        kept[self.order[self.blocks - int(self.count[index]) :]] = True
        return kept.reshape(self.grid)


def gradients(
    model: nn.Module, images: Float[Tensor, "n c h w"], names: list[str], *, batch: int = 32
) -> dict[str, Tensor]:
    """g of the named layers' weights, as matrices: mean over batches of d/dW mean(f(x)^2), in eval mode.

    model: left as it is, apart from being run. AdviceError for a layer that no gradient reaches.
    """
    if torch.is_inference_mode_enabled():
        raise AdviceError("Block pruning needs gradients; call it outside torch.inference_mode().")
    layers: list[Any] = [model.get_submodule(n) for n in names]
    weights: list[Tensor] = [layer.weight for layer in layers]
    before = [w.requires_grad for w in weights]
    total: list[Tensor | None] = [None] * len(names)
    parts = images.split(batch)
    try:
        for w in weights:
            w.requires_grad_(True)
        with torch.enable_grad():
            for part in parts:
                out = model(part)
                if not isinstance(out, Tensor):
                    raise AdviceError(f"Block pruning squares one tensor of outputs; the model gives {type(out)}.")
                found = (
                    torch.autograd.grad(out.square().mean(), weights, allow_unused=True)
                    if out.requires_grad
                    else [None] * len(weights)
                )
                for i, g in enumerate(found):
                    if g is not None:
                        so_far = total[i]
                        total[i] = g if so_far is None else so_far + g
    finally:
        for w, needed in zip(weights, before):
            w.requires_grad_(needed)
    made = {}
    for name, g in zip(names, total):
        if g is None or not bool(g.any()):
            raise AdviceError(
                f"No gradient reaches the layer {name!r}: its output does not change the model's. Leave it out with "
                f"exclude={name!r}, or rank by magnitude alone: ranking='magnitude', spread='uniform'."
            )
        if not bool(torch.isfinite(g).all()):
            raise AdviceError(f"The gradient of the layer {name!r} is not finite; are the images pixels in [0, 1]?")
        made[name] = g.flatten(1) / len(parts)
    return made


def block_scores(
    weight: Float[Tensor, "o i"], gradient: Tensor | None, block: tuple[int, int], ranking: Ranking = "taylor"
) -> Float[Tensor, "r c"]:
    """Mean over each block of |w g| (taylor) or |w| (magnitude); at the edges over the part inside."""
    value = weight if ranking == "magnitude" or gradient is None else weight * gradient
    inside = torch.from_numpy(areas((weight.shape[0], weight.shape[1]), block)).to(value)
    return blocks_of(value.abs(), block).sum((-1, -2)) / inside


def curve(
    name: str,
    weight: Float[Tensor, "o i"],
    gradient: Tensor | None,
    *,
    block: tuple[int, int],
    positions: int,
    ranking: Ranking = "taylor",
    steps: int = STEPS,
) -> Curve:
    """The curve of one layer, in float64. gradient: None where only ranking by magnitude is asked for."""
    w = weight.detach().double()
    g = torch.zeros_like(w) if gradient is None else gradient.double()
    score = block_scores(w, gradient if gradient is None else g, block, ranking)
    order = torch.argsort(score.flatten(), stable=True)
    inside = torch.from_numpy(areas((w.shape[0], w.shape[1]), block)).flatten()
    product = blocks_of(w * g, block)
    sums = torch.stack(
        [product.square().sum((-1, -2)), product.sum((-1, -2)), blocks_of(w, block).square().sum((-1, -2))]
    )
    # row k: the sums over the k least blocks
    gone = torch.zeros(3, len(order) + 1, dtype=torch.float64)
    gone[:, 1:] = sums.flatten(1).cpu()[:, order.cpu()].cumsum(1)
    sparsity = np.arange(steps + 1) / steps
    blocks = len(order)
    count = np.maximum(np.floor((1 - sparsity) * blocks + 1e-9).astype(int), 1)  # a layer keeps one block at least
    first, second, third = gone[:, torch.from_numpy(blocks - count)]
    distortion = first / w.numel() + 0.5 * second**2 + 0.5 * LAMBDA * third
    left = np.concatenate([[0], inside.numpy()[order.cpu().numpy()].cumsum()])
    kept = left[-1] - left[blocks - count]
    return Curve(
        name=name,
        shape=(int(w.shape[0]), int(w.shape[1])),
        grid=(-(-w.shape[0] // block[0]), -(-w.shape[1] // block[1])),
        positions=positions,
        order=order.cpu().numpy(),
        count=count,
        distortion=distortion.numpy(),
        macs=kept * positions,
    )


def positions(model: nn.Module, image: Float[Tensor, "b c h w"]) -> dict[str, int]:
    """How often per image every linear layer and convolution uses its weight, from one run."""
    found: dict[str, int] = {}
    hooks = []

    def listen(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            places = out.numel() // (out.shape[1] if isinstance(module, nn.Conv2d) else out.shape[-1])
            found[name] = found.get(name, 0) + places

        hooks.append(module.register_forward_hook(note))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            listen(name, module)
    try:
        with torch.no_grad():
            model(image[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def fixed_macs(model: nn.Module, used: Mapping[str, int], chosen: set[str]) -> float:
    """Multiply-adds per image of the linear layers and convolutions that are not pruned, and all biases."""
    total = 0.0
    for name, module in model.named_modules():
        if name not in used or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        total += used[name] * (module.bias.numel() if module.bias is not None else 0)
        if name not in chosen:
            total += used[name] * module.weight.numel()
    return total


def candidates(model: nn.Module, block: tuple[int, int], layers: str, exclude: str) -> list[str]:
    """Names of the layers to prune: those that `layers` finds, `exclude` does not, and into which a block fits."""
    import re

    able = {n: tuple(m.shape) for n, layer in model.named_modules() if (m := matrix_of(layer)) is not None}
    wanted = [n for n in able if re.search(layers, n) and not (exclude and re.search(exclude, n))]
    fit = [n for n in wanted if able[n][0] >= block[0] and able[n][1] >= block[1]]
    if layers and len(fit) < len(wanted):
        name = next(n for n in wanted if n not in fit)
        shape = able[name]
        good = tuple(min(b, 1 << (s.bit_length() - 1)) for b, s in zip(block, shape))
        raise AdviceError(
            f"The layer {name!r} is {shape[0]} x {shape[1]}: no block of {block[0]} x {block[1]} fits into it. Take "
            f"block={good}, or leave it out: exclude={name!r}."
        )
    if not fit:
        known = ", ".join(f"{n} {s[0]} x {s[1]}" for n, s in list(able.items())[:6])
        raise AdviceError(
            f"There is nothing to prune in {type(model).__name__} by blocks of {block[0]} x {block[1]}, "
            f"layers={layers!r}, exclude={exclude!r}. "
            + (f"Its layers are {known}; take a smaller block, or other names." if able else "It has no linear layer.")
        )
    return fit
