"""BlockPrune: linear layers lose whole blocks of weights, as many as a budget of multiply-adds says, where it hurts
least and saves most; what is left runs as block-sparse products.

LPViT: Low-Power Semi-structured Pruning for Vision Transformers, ECCV 2024, arXiv 2407.02068.
Code: Akimoto-Cris/LPViT (no licence; facts only). Where it differs from the paper's text, see `allocate`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, nearest, unknown
from lynceus.core.progress import progress
from lynceus.rewrite.block_prune import heads
from lynceus.rewrite.block_prune.allocate import CLOSE, allocate, smoothed, uniform
from lynceus.rewrite.block_prune.costs import CostModel, costs
from lynceus.rewrite.block_prune.mlp import pair_up
from lynceus.rewrite.block_prune.report import sparsity_report
from lynceus.rewrite.block_prune.scores import (
    Curve,
    Ranking,
    candidates,
    curve,
    fixed_macs,
    gradients,
    positions,
)
from lynceus.rewrite.block_prune.sparse import BlockSparseConv, BlockSparseLinear, matrix_of
from lynceus.rewrite.swap import signed

# the first layer and the classifiers of our families and timm's: small, and the first to ruin accuracy
ENDS = r"patch_embed|(^|\.)(stem|conv_proj|head|heads|head_dist|fc|classifier)(\.|$)"


@dataclass(frozen=True, kw_only=True)
class BlockPrune:
    """Rewrite: linear layers keep only their best blocks of weights. The example is the calibration images.

    block: side, or (rows, columns), of a block of a weight (out, in). flops: share of the multiply-adds of all linear
    layers and convolutions that is left. power: charge `cost`, so that costly layers are pruned more at the same
    distortion. cost: block multiplications as the released code counts them ("weights": blocks x in / 16), per image
    ("tokens": blocks x tokens / 16), or milliseconds of each layer at some sparsities, measured on this machine
    ("measured"). ranking: blocks by mean |w g| ("taylor") or mean |w| ("magnitude"). spread: over layers by their
    distortion ("curves"), or the same sparsity for all ("uniform").
    layers: regular expression that the names of the layers to prune must contain; "" for all. exclude: one that they
    must not contain; by default the patches and the classifier are left whole.
    smooth: weight of the moving average along the curves, in [0, 1). min_keep: least share of a layer that is kept;
    None: min(.05, (1 - flops) / 2). drop_heads: take attention heads out whose blocks are all gone.
    gradient_batch: images per gradient.
    """

    calibration: ClassVar[int] = 512

    block: int | tuple[int, int] = 64
    flops: float = 0.5
    power: bool = True
    cost: Literal["weights", "tokens", "measured"] = "weights"
    ranking: Literal["taylor", "magnitude"] = "taylor"
    spread: Literal["curves", "uniform"] = "curves"
    layers: str = ""
    exclude: str = ENDS
    smooth: float = 0.5
    min_keep: float | None = None
    drop_heads: bool = True
    gradient_batch: int = 32

    def __post_init__(self) -> None:
        if min(self.sides) < 1:
            raise AdviceError(f"A block has sides of at least 1, not {self.block}; block=64 or block=(32, 64).")
        if not 0 < self.flops <= 1:
            hint = f"flops={self.flops / 100:g}" if 1 < self.flops <= 100 else "flops=0.5 leaves half of them"
            raise AdviceError(f"flops is the share of multiply-adds that is left, above 0 and at most 1, not "
                              f"{self.flops}; {hint}.")  # fmt: skip
        for name, value, known in (
            ("cost", self.cost, ("weights", "tokens", "measured")),
            ("ranking", self.ranking, ("taylor", "magnitude")),
            ("spread", self.spread, ("curves", "uniform")),
        ):
            if value not in known:
                raise unknown(name, str(value), known)
        if not 0 <= self.smooth < 1:
            raise AdviceError(f"smooth is at least 0 and below 1, not {self.smooth}.")
        if self.min_keep is not None and not 0 <= self.min_keep < 1:
            raise AdviceError(f"min_keep is a share of a layer's blocks, at least 0 and below 1, not {self.min_keep}.")
        if self.gradient_batch < 1:
            raise AdviceError(f"gradient_batch is at least 1 image, not {self.gradient_batch}.")
        for name in ("layers", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise AdviceError(f"{name}={getattr(self, name)!r} is no regular expression: {error}.") from None

    @property
    def sides(self) -> tuple[int, int]:
        return (self.block, self.block) if isinstance(self.block, int) else (int(self.block[0]), int(self.block[1]))

    def __call__(self, model: nn.Module, example: Float[Tensor, "b c h w"] | None) -> nn.Module:
        """A copy of `model` with block-sparse layers, in eval mode, and its `report`.

        example: calibration images as the model takes them; no labels are needed, and some hundred suffice.
        """
        made = copy.deepcopy(model).eval().requires_grad_(True)
        chosen = candidates(made, self.sides, self.layers, self.exclude)
        if example is None:
            raise AdviceError(
                "BlockPrune looks at images: BlockPrune(...)(model, images). A pruned model's file is opened by "
                "load_model; KeptBlocks(...) repeats a known pruning."
            )
        found = self.curves(made, example, chosen)
        index, facts = self.allocation(made, example, found)
        kept = {c.name: written(c.mask(int(i))) for c, i in zip(found, index)}
        plan = KeptBlocks(block=self.sides, kept=kept, drop_heads=self.drop_heads)
        pruned = plan(model, None)
        pruned.report = sparsity_report(pruned, example[:1], facts=facts)  # type: ignore[assignment]
        return pruned

    def curves(self, model: nn.Module, images: Tensor, chosen: list[str]) -> list[Curve]:
        """One distortion curve per layer."""
        used = positions(model, images)
        idle = [n for n in chosen if n not in used]
        chosen = [n for n in chosen if n in used]
        if not chosen:
            raise AdviceError(f"The model runs none of the layers to prune ({', '.join(idle[:4])}) on these images.")
        found: dict[str, Tensor] = {}
        if self.ranking == "taylor" or self.spread == "curves":
            with progress("calibrating", total=1, unit="pass") as bar:
                found = gradients(model, images, chosen, batch=self.gradient_batch)
                bar.advance()
        out = []
        for name in chosen:
            weight = matrix_of(model.get_submodule(name))
            assert weight is not None
            out.append(
                curve(name, weight, found.get(name), block=self.sides, positions=used[name], ranking=self.ranking)
            )
        return out

    def allocation(self, model: nn.Module, images: Tensor, found: list[Curve]) -> tuple[np.ndarray, dict[str, Any]]:
        """The place of each layer on its curve, and what the report says about the choice."""
        macs = np.stack([c.macs for c in found]).astype(float)
        fixed = fixed_macs(model, positions(model, images), {c.name for c in found})
        charged = self.power and self.spread == "curves"
        cost = costs(found, self.cost, self.sides) if charged else np.zeros_like(macs)
        facts: dict[str, Any] = {"flops asked": self.flops, "block": self.sides, "ranking": self.ranking}
        if self.spread == "uniform":
            index = uniform(macs, flops=self.flops, fixed=fixed)
            share = float(macs[np.arange(len(macs)), index].sum() + fixed) / float(macs[:, 0].sum() + fixed)
            facts["spread"] = "uniform"
        else:
            distortion = smoothed(np.stack([c.distortion for c in found]), self.smooth)
            done = allocate(
                distortion, cost, macs, flops=self.flops, fixed=fixed, power=self.power, min_keep=self.min_keep
            )
            index, share = done.index, done.share
            facts |= {"spread": "curves", "mu": done.mu, "beta": done.beta}
            if charged:
                facts |= {"cost": self.cost, "cost left": float(cost[np.arange(len(cost)), index].sum()),
                          "cost dense": float(cost[:, 0].sum())}  # fmt: skip
        if abs(share - self.flops) > CLOSE:
            raise AdviceError(
                f"Blocks of {self.sides[0]} x {self.sides[1]} leave {share:.1%} of the multiply-adds at best, not "
                f"{self.flops:.0%}: there are too few of them. Take block={max(min(self.sides) // 2, 1)}, or prune "
                "more layers (exclude='')."
            )
        return index, facts | {"flops": share}


@dataclass(frozen=True, kw_only=True)
class KeptBlocks:
    """Rewrite: the plan that BlockPrune made: which blocks of which layers stay. It needs no images.

    block: (rows, columns). kept: layer -> its blocks row by row as "ROWSxCOLUMNS:HEX", one bit each, the first one
    highest. drop_heads: as in BlockPrune.
    """

    block: tuple[int, int]
    kept: Mapping[str, str] = field(default_factory=dict)
    drop_heads: bool = True

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` with the blocks outside the plan gone, in eval mode."""
        made = copy.deepcopy(model)
        masks = {name: read(text, name) for name, text in self.kept.items()}
        for name, mask in masks.items():
            self._check(made, name, mask)
        if self.drop_heads:
            self._drop_heads(made, masks)
        for name, mask in masks.items():
            layer: Any = made.get_submodule(name)
            cls: Any = BlockSparseConv if isinstance(layer, nn.Conv2d) else BlockSparseLinear
            made.set_submodule(name, cls.of(layer, self.block, torch.from_numpy(mask)))
        pair_up(made)
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example[:1])
        return made

    def _check(self, made: nn.Module, name: str, mask: np.ndarray) -> None:
        known = dict(made.named_modules())
        if name not in known:
            close = nearest(name, known)
            raise AdviceError(
                f"The plan prunes {name!r}, which {type(made).__name__} does not have"
                + (f"; its nearest name is {close[0]!r}." if close else ".")
            )
        weight = matrix_of(known[name])
        if weight is None:
            raise AdviceError(
                f"The plan prunes {name!r}, a {type(known[name]).__name__}: only linear layers have blocks."
            )
        need = tuple(-(-s // b) for s, b in zip(weight.shape, self.block))
        if mask.shape != need:
            raise AdviceError(
                f"The plan has {mask.shape[0]} x {mask.shape[1]} blocks for {name!r}, whose weight "
                f"{tuple(weight.shape)} has {need[0]} x {need[1]}: it was made for another model."
            )

    def _drop_heads(self, made: nn.Module, masks: dict[str, np.ndarray]) -> None:
        for name, attention in heads.attentions(made):
            first, second = (f"{name}.{n}" if name else n for n in ("qkv", "proj"))
            if first not in masks or second not in masks:
                continue
            gone = heads.dead(
                masks[first], masks[second], heads=heads.count(attention), head_dim=int(attention.head_dim),
                rows=self.block[0], columns=self.block[1],
            )  # fmt: skip
            if gone:
                masks[first], masks[second] = heads.drop(attention, gone, masks[first], masks[second], self.block)


def prune(
    model: nn.Module,
    calib: Float[Tensor, "n c h w"],
    *,
    block: int | tuple[int, int] = (64, 64),
    flops: float = 0.5,
    power: bool = True,
    cost: CostModel = "weights",
    ranking: Ranking = "taylor",
    layers: str = "",
    exclude: str = ENDS,
) -> nn.Module:
    """`model` with block-sparse layers that keep `flops` of its multiply-adds; calib: images as the model takes them,
    (n, c, h, w), about 2,000 in the paper. See BlockPrune."""
    rewrite = BlockPrune(
        block=block, flops=flops, power=power, cost=cost, ranking=ranking, layers=layers, exclude=exclude
    )
    return rewrite(model, calib)


def written(mask: np.ndarray) -> str:
    """A mask as text."""
    return f"{mask.shape[0]}x{mask.shape[1]}:{np.packbits(mask.ravel()).tobytes().hex()}"


def read(text: str, name: str) -> np.ndarray:
    """The mask that `written` wrote."""
    match = re.fullmatch(r"(\d+)x(\d+):([0-9a-f]*)", text)
    if match is None:
        raise AdviceError(f"The plan for {name!r} is no mask of blocks ('ROWSxCOLUMNS:HEX'): {text[:40]!r}.")
    rows, columns = int(match[1]), int(match[2])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(match[3]), dtype=np.uint8))
    if len(bits) != -(-rows * columns // 8) * 8:
        raise AdviceError(f"The plan for {name!r} has {len(bits)} bits for {rows} x {columns} blocks.")
    return bits[: rows * columns].reshape(rows, columns).astype(bool)
