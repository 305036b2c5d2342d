"""Cut: the same transformer with fewer channels, heads and hidden units, as a smaller dense network.

Which slice of which parameter belongs to a unit stands in one table per network (`axes`). ViT, DeiT and Swin can be
cut: what is left is an ordinary network of its own family, of width s d, s h heads and s times the hidden units.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.swin import Swin, SwinConfig
from lynceus.backbones.vit import ViT, ViTConfig
from lynceus.core.errors import AdviceError

Axis = tuple[str, int]  # kind and number: c, 4c of a stage; h, a, qkv, m of a block
Key = tuple[str, int]  # ("c", stage), ("h", block) or ("m", block): what can be cut
_LINEAR = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What can be cut from a network.

    widths: channels per stage. heads, head_dims, hidden: per block. stages: the stage of each block. unit: greatest
    common divisor of all head counts; a network can lose 0 to unit - 1 of so many equal shares. steps: path of every
    module between embedding and the last norm, in order. blocks: those that are blocks.
    """

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    hidden: tuple[int, ...]
    stages: tuple[int, ...]
    unit: int
    steps: tuple[str, ...]
    blocks: tuple[str, ...]

    def size(self, key: Key) -> int:
        kind, i = key
        return {"c": self.widths, "h": self.heads, "m": self.hidden}[kind][i]

    def keys(self, kind: str) -> list[Key]:
        return [(kind, i) for i in range(len(self.widths if kind == "c" else self.heads))]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Rewrite: only these channels (per stage), heads and hidden units (per block) stay, in a smaller dense network.

    The norms then run over the channels that are left. What is cut must leave a network of the same family: all blocks
    of a stage lose as many heads, and width, heads and hidden units shrink by one share (`even` gives the counts).
    """

    channels: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    hidden: tuple[tuple[int, ...], ...]

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A cut copy of `model` (ViT, DeiT or Swin, or a classifier on one), in eval mode. example: run once.

        It is an ordinary network of its family, whose file says all, and so carries no `rewrite`."""
        inner: Any = getattr(model, "backbone", model)
        small = self.backbone(inner)
        if inner is model:
            made: nn.Module = small
        else:
            made = _around(model, small)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made

    def backbone(self, inner: nn.Module) -> Any:
        """The cut copy of a backbone alone, unsigned."""
        parts = anatomy(inner)
        config = self.config(inner, parts)
        like = next(inner.parameters())
        small = type(inner)(config).to(device=like.device, dtype=like.dtype)
        small.name, small.mean, small.std = inner.name, inner.mean, inner.std
        rules, state = axes(inner), inner.state_dict()
        own = small.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(self.slice(name, state[name], rules, parts))
        return small.eval()

    def slice(self, name: str, value: Tensor, rules: Mapping[str, tuple[Axis | None, ...]], parts: Anatomy) -> Tensor:
        for dim, axis in enumerate(rules.get(name, ())):
            if axis is not None:
                value = value.index_select(dim, self.index(axis, parts).to(value.device))
        return value

    def index(self, axis: Axis, parts: Anatomy) -> Tensor:
        """Rows of an axis that stay."""
        kind, i = axis
        if kind in ("c", "4c"):
            kept = torch.tensor(self.channels[i])
            return kept if kind == "c" else (torch.arange(4)[:, None] * parts.widths[i] + kept).flatten()
        if kind == "m":
            return torch.tensor(self.hidden[i])
        kept, each = torch.tensor(self.heads[i]), parts.head_dims[i]
        if kind == "h":
            return kept
        wide = (kept[:, None] * each + torch.arange(each)).flatten()
        return wide if kind == "a" else (torch.arange(3)[:, None] * (parts.heads[i] * each) + wide).flatten()

    def config(self, inner: nn.Module, parts: Anatomy) -> Any:
        """The configuration of what is left; AdviceError where it is no network of the family."""
        counts = [("stages", self.channels, parts.widths), ("blocks", self.heads, parts.heads)]
        for what, kept, had in [*counts, ("blocks", self.hidden, parts.hidden)]:
            if len(kept) != len(had):
                raise AdviceError(f"This cut is for {len(kept)} {what}; the network has {len(had)}.")
            for some, count in zip(kept, had):
                if not some or list(some) != sorted(set(some)) or some[0] < 0 or some[-1] >= count:
                    raise AdviceError(
                        f"A cut lists what stays, increasing numbers from 0 to {count - 1} and at least one, not "
                        f"{list(some)[:6]}{' ...' if len(some) > 6 else ''}."
                    )
        heads, stages = [len(h) for h in self.heads], parts.stages
        old: Any = inner.config
        if isinstance(old, ViTConfig):
            config: Any = replace(old, dim=len(self.channels[0]), heads=heads[0])
        else:
            each = [next(h for h, s in zip(heads, stages) if s == i) for i in range(len(parts.widths))]
            config = replace(old, embed_dim=len(self.channels[0]), num_heads=tuple(each))
        ratio = len(self.channels[0]) / parts.widths[0]
        for i, (head, stage) in enumerate(zip(heads, stages)):
            width = len(self.channels[stage])
            wanted = (ratio * parts.widths[stage], ratio * parts.heads[i], int(width * old.mlp_ratio))
            if (width, head, len(self.hidden[i])) != wanted:
                raise AdviceError(
                    f"Block {i} would have width {width}, {head} heads and {len(self.hidden[i])} hidden units; the "
                    f"family wants them cut by one share: {wanted[0]:g}, {wanted[1]:g} and {wanted[2]}. "
                    "even(anatomy(backbone), pruned) gives counts that fit."
                )
        return config

    def then(self, later: Cut) -> Cut:
        """This cut, and `later` of what it leaves, as one cut of the first network."""

        def inside(first: tuple[tuple[int, ...], ...], second: tuple[tuple[int, ...], ...]) -> Any:
            return tuple(tuple(a[i] for i in b) for a, b in zip(first, second))

        return Cut(
            channels=inside(self.channels, later.channels),
            heads=inside(self.heads, later.heads),
            hidden=inside(self.hidden, later.hidden),
        )


def whole(parts: Anatomy) -> Cut:
    """The cut that leaves everything."""
    return Cut(
        channels=tuple(tuple(range(n)) for n in parts.widths),
        heads=tuple(tuple(range(n)) for n in parts.heads),
        hidden=tuple(tuple(range(n)) for n in parts.hidden),
    )


def even(parts: Anatomy, pruned: int, mlp_ratio: float) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """How many channels per stage, heads and hidden units per block stay when `pruned` of `unit` shares go."""
    if not 0 <= pruned < parts.unit:
        raise AdviceError(
            f"{pruned} of {parts.unit} shares of heads cannot be pruned; take 0 to {parts.unit - 1}"
            + (", since the head counts of its stages have no common divisor." if parts.unit == 1 else ".")
        )
    left = parts.unit - pruned
    widths = tuple(n * left // parts.unit for n in parts.widths)
    heads = tuple(n * left // parts.unit for n in parts.heads)
    return widths, heads, tuple(int(widths[s] * mlp_ratio) for s in parts.stages)


def anatomy(backbone: nn.Module) -> Anatomy:
    """What can be cut from a ViT, DeiT or Swin; AdviceError that names the layer which cannot, for others."""
    c: Any = getattr(backbone, "config", None)
    # a subclass could read its channels in its own way
    if type(backbone) is ViT and isinstance(c, ViTConfig):
        _as_built(backbone)
        paths = tuple(f"blocks.{i}" for i in range(len(backbone.blocks)))
        n = len(paths)
        return Anatomy(
            widths=(c.dim,),
            heads=(c.heads,) * n,
            head_dims=(c.dim // c.heads,) * n,
            hidden=(int(c.dim * c.mlp_ratio),) * n,
            stages=(0,) * n,
            unit=c.heads,
            steps=paths,
            blocks=paths,
        )
    if type(backbone) is Swin and isinstance(c, SwinConfig) and c.mixer == "attention" and not c.dense:
        _as_built(backbone)
        widths = tuple(c.embed_dim * 2**i for i in range(len(c.depths)))
        steps: list[str] = []
        blocks: list[str] = []
        stages: list[int] = []
        for i, depth in enumerate(c.depths):
            own = [f"layers.{i}.blocks.{j}" for j in range(depth)]
            blocks += own
            stages += [i] * depth
            steps += own + ([f"layers.{i}.downsample"] if i + 1 < len(c.depths) else [])
        return Anatomy(
            widths=widths,
            heads=tuple(c.num_heads[s] for s in stages),
            head_dims=tuple(widths[s] // c.num_heads[s] for s in stages),
            hidden=tuple(int(widths[s] * c.mlp_ratio) for s in stages),
            stages=tuple(stages),
            unit=math.gcd(*c.num_heads),
            steps=tuple(steps),
            blocks=tuple(blocks),
        )
    name = getattr(backbone, "name", type(backbone).__name__)
    why = ""
    if isinstance(c, SwinConfig):
        why = " (Swin-MLP and the dense form cannot: their heads are their channels, or they have no classifier)"
    raise AdviceError(
        f"{name} ({type(backbone).__name__}) cannot be split: ViT, DeiT and Swin of this library can{why}. timm's "
        "weights of those go in: create_model('vit_small_patch16_224', weights=FILE)."
    )


def axes(backbone: nn.Module) -> dict[str, tuple[Axis | None, ...]]:
    """Which axis of which parameter (and buffer) runs over channels, heads or hidden units; others are left out."""
    vit = isinstance(backbone, ViT)
    block = _VIT_BLOCK if vit else _SWIN_BLOCK
    rest = _VIT_REST if vit else _SWIN_REST
    parts = anatomy(backbone)
    last, stages, paths = len(parts.widths) - 1, parts.stages, parts.blocks
    out: dict[str, tuple[Axis | None, ...]] = {}
    for name in backbone.state_dict():
        own = next((i for i, path in enumerate(paths) if name.startswith(path + ".")), None)
        if own is not None:
            at = {"h": own, "a": own, "qkv": own, "m": own, "c": stages[own]}
            out[name] = _found(block, name.removeprefix(paths[own] + "."), at)
        else:
            stage = int(m.group(1)) if (m := re.match(r"layers\.(\d+)\.", name)) else 0
            out[name] = _found(rest, name, {"c": stage, "4c": stage, "c+": stage + 1, "c-": last})
    return out


_C = (r"^(norm1|norm2)\.", ("c",))
_BLOCK: list[tuple[str, tuple[str | None, ...]]] = [
    _C,
    (r"^attn\.qkv\.weight", ("qkv", "c")),
    (r"^attn\.qkv\.bias", ("qkv",)),
    (r"^attn\.proj\.weight", ("c", "a")),
    (r"^attn\.proj\.bias", ("c",)),
    (r"^mlp\.fc1\.weight", ("m", "c")),
    (r"^mlp\.fc1\.bias", ("m",)),
    (r"^mlp\.fc2\.weight", ("c", "m")),
    (r"^mlp\.fc2\.bias", ("c",)),
]
_VIT_BLOCK = [
    *_BLOCK,
    (r"^attn\.norm\.", ("a",)),
    (r"^attn\.[qk]_norm\.", ()),
    (r"^mlp\.norm\.", ("m",)),
    (r"^ls[12]\.gamma", ("c",)),
]
_SWIN_BLOCK = [*_BLOCK, (r"^attn\.relative_position_bias_table", (None, "h"))]
_VIT_REST: list[tuple[str, tuple[str | None, ...]]] = [
    (r"^(cls_token|dist_token|reg_token|pos_embed)$", (None, None, "c")),
    (r"^patch_embed\.proj\.", ("c",)),
    (r"^(norm_pre|norm|fc_norm)\.", ("c",)),
    (r"^(head|head_dist)\.weight", (None, "c")),
    (r"^(head|head_dist)\.bias", ()),
]
_SWIN_REST: list[tuple[str, tuple[str | None, ...]]] = [
    (r"^patch_embed\.(proj|norm)\.", ("c",)),
    (r"^absolute_pos_embed", (None, None, "c")),
    (r"^layers\.\d+\.downsample\.norm\.", ("4c",)),
    (r"^layers\.\d+\.downsample\.reduction\.weight", ("c+", "4c")),
    (r"^norm\.", ("c-",)),
    (r"^head\.weight", (None, "c-")),
    (r"^head\.bias", ()),
]


def _found(
    rules: list[tuple[str, tuple[str | None, ...]]], name: str, number: Mapping[str, int]
) -> tuple[Axis | None, ...]:
    for pattern, kinds in rules:
        if re.search(pattern, name):
            return tuple(None if k is None else (k.rstrip("+-"), number[k]) for k in kinds)
    raise AdviceError(f"The parameter {name} belongs to a layer that this library does not know how to cut.")


def _as_built(backbone: Any) -> None:
    """Names the first layer that is not what the configuration builds: a mixer swapped in, a packed linear."""
    with torch.device("meta"):
        plain = type(backbone)(replace(backbone.config, num_classes=backbone.num_classes))
    own = dict(backbone.named_modules())
    for name, module in plain.named_modules():
        if name.split(".")[0] in ("head", "head_dist"):
            continue
        if type(own.get(name)) is not type(module):
            raise AdviceError(
                f"{backbone.name}: the layer {name} is a {type(own.get(name)).__name__}, where {type(module).__name__} "
                "is expected, and cannot be cut; split the model before other rewrites change its layers."
            )


def _around(model: Any, small: nn.Module) -> nn.Module:
    """A classifier like `model` on another backbone."""
    memo: dict[int, Any] = {id(model.backbone): nn.Identity()}
    made: Any = copy.deepcopy(model, memo)
    made.backbone = small
    for name in ("rewrite", "original"):
        made.__dict__.pop(name, None)
    return made
