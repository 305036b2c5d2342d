"""Adapt and fuse: adapters into the layers of a model, and out of them again into plain weights.

Paper: Hedegaard et al., Structured Pruning Adapters, Pattern Recognition 2024, arXiv 2211.10155
Code: LukasHedegaard/structured-pruning-adapters (Apache-2.0); written from the paper
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, AdviceWarning, unknown
from lynceus.core.rng import borrowed
from lynceus.rewrite.adapters.attention import HeadAttention, packed, unpacked
from lynceus.rewrite.adapters.layers import (
    CONVS,
    INIT_RANGE,
    RANK,
    Adapted,
    LowRank,
    SPLoPALinear,
    SPLoRALinear,
    resolved_rank,
    splora_conv,
    sppara_conv,
    unfit,
)
from lynceus.rewrite.swap import signed

Kind = Literal["splora", "sppara", "splopa"]
KINDS = ("splora", "sppara", "splopa")
DIGEST = "base_digest"  # buffer of an adapted model: what it was before


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Rewrite: structured pruning adapters in linear, convolutional and attention layers; their weights are frozen.

    Afterwards only adapters, biases, norms and the layers in `full` require gradients. The answers stay nearly the same
    (adapters begin near 0). It trains in few numbers, is pruned by PruneChannels, and fuses into plain layers.

    kind: "splora", low rank beside linear layers, convolutions and attention; "sppara", a full matrix at the central
    tap of convolutions (linear layers stay plain); "splopa", prototypes in blocks of linear layers, for block pruning.
    rank: of splora, whole or a share below 1 of the outputs. init_range: of the factors that begin near 0.
    full: regular expression; layers whose name it finds learn whole, as a new classifier must. names: regular
    expression; only layers whose name it finds are adapted. Layers that cannot be (a kernel without central tap, a
    weight that is cut into no blocks) stay frozen and are named in a warning.
    prototypes, block, prototype_rank, shared: of splopa; shared prototypes serve all layers of equal blocks.
    seed: of the adapters.
    """

    kind: Kind = "splora"
    rank: int | float = 16
    init_range: float = 1e-4
    full: str | None = None
    names: str = ""
    prototypes: int = 64
    block: tuple[int, int] = (32, 32)
    prototype_rank: int = 1
    shared: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of adapter", str(self.kind), KINDS)
        resolved_rank(self.rank, 1)
        if not self.init_range > 0:
            raise AdviceError(f"init_range is above 0, such as {INIT_RANGE}, not {self.init_range}.")
        if self.prototypes < 1 or self.prototype_rank < 1 or min(self.block) < 1:
            raise AdviceError("prototypes, prototype_rank and both sides of block are at least 1.")
        for name in ("full", "names"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise AdviceError(f"{name}={getattr(self, name)!r} is no regular expression: {error}.") from None

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` with adapters, in eval mode.

        example: an input, run once to see it work. AdviceError when no layer can be adapted, or some already are."""
        made = adapt(
            model, self.kind, self.rank, init_range=self.init_range, full=self.full, names=self.names,
            prototypes=self.prototypes, block=self.block, prototype_rank=self.prototype_rank, shared=self.shared,
            seed=self.seed, quiet=example is None,
        )  # fmt: skip
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Rewrite: adapters into the weights; plain torch layers remain, with the same answers."""

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` without adapters, in eval mode. example: an input, run once to see it work."""
        made = fuse(model)
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made


def adapt(
    model: nn.Module,
    kind: Kind = "splora",
    rank: int | float = RANK,
    *,
    init_range: float = INIT_RANGE,
    full: str | None = None,
    names: str = "",
    prototypes: int = 64,
    block: tuple[int, int] = (32, 32),
    prototype_rank: int = 1,
    shared: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> nn.Module:
    """A copy of `model` with adapters; options as of `Adapt`. A bare layer is adapted itself.

    quiet: layers that cannot be adapted are not named in a warning."""
    if any(isinstance(m, Adapted) for m in model.modules()):
        raise AdviceError("This model has adapters already: fuse(model) first, then adapt what comes out.")
    made = unpack_attention(copy.deepcopy(model)) if kind == "splora" else copy.deepcopy(model)
    made.requires_grad_(False)
    reach: dict[str, Any] = dict(made.named_modules())
    skipped: dict[str, str] = {}
    found: dict[tuple[int, int, int], LowRank] = {}
    count = 0
    adaptable: tuple[type[nn.Module], ...] = (nn.Linear, *CONVS, nn.MultiheadAttention)
    with borrowed(seed, "adapters"):
        for name, layer in reach.items():
            own = full is not None and bool(re.search(full, name))
            if own:
                layer.requires_grad_(True)
                continue
            if not re.search(names, name) or not isinstance(layer, adaptable):
                continue
            reason = _unfit(layer, kind, block)
            if reason:
                skipped[name] = reason
            elif reason is None:
                if isinstance(layer, tuple(CONVS)):
                    _conv(layer, kind, rank, init_range)
                elif kind == "splora":
                    SPLoRALinear.add(layer, rank=rank, init_range=init_range)  # type: ignore[arg-type]
                else:
                    key = (*block, prototype_rank)
                    one = SPLoPALinear.add(
                        layer, prototypes=prototypes, block=block, prototype_rank=prototype_rank,  # type: ignore[arg-type]
                        init_range=init_range, shared=found.get(key) if shared else None,
                    )  # fmt: skip
                    found.setdefault(key, one.adapter.prototypes)
                count += 1
    full_rank = max(
        (min(m.rows.shape[-1], m.cols.shape[-2]) for m in made.modules() if isinstance(m, LowRank)), default=0
    )
    if kind == "splora" and full_rank and rank > max(full_rank, RANK):
        raise AdviceError(
            f"rank={rank} is more than any layer of {type(model).__name__} has (at most {full_rank}): adapters would "
            f"be larger than the weights beside them. rank={min(8, full_rank)} is a usual one."
        )
    if not count:
        why = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:4]) or (
            f"no name is found by {names!r}" if names else "there is none of its kind"
        )
        raise AdviceError(f"No layer of {type(model).__name__} can take {kind} adapters ({why}).")
    _learn_small(made)
    inner: Any = getattr(made, "backbone", made)
    inner.register_buffer(DIGEST, base_digest(inner))
    if skipped and not quiet:
        listed = "; ".join(f"{n or 'it'}: {r}" for n, r in list(skipped.items())[:6])
        warnings.warn(
            f"{len(skipped)} of {len(skipped) + count} layers stay frozen without adapter: {listed}. "
            "Adapt(full=...) lets layers learn whole.",
            AdviceWarning,
            stacklevel=3,
        )
    return made


def _unfit(layer: nn.Module, kind: str, block: tuple[int, int]) -> str | None:
    """Why a layer gets no adapter; "" where its kind has none, None where it fits."""
    if isinstance(layer, tuple(CONVS)):
        return "" if kind == "splopa" else unfit(layer)
    if kind == "sppara":
        return ""
    if isinstance(layer, nn.MultiheadAttention):
        return "splopa adapts no packed attention"
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is no plain linear layer"
    if kind == "splopa" and (layer.out_features % block[0] or layer.in_features % block[1]):
        return f"{layer.out_features} x {layer.in_features} is cut into no blocks of {block[0]} x {block[1]}"
    return None


def _conv(layer: nn.Module, kind: str, rank: int | float, init_range: float) -> None:
    if kind == "splora":
        splora_conv(layer, rank=rank, init_range=init_range)
    else:
        sppara_conv(layer, init_range=init_range)


def base_digest(model: nn.Module) -> UInt8[Tensor, " 16"]:
    """Of the frozen weights of an adapted model, before pruning: tells one base from another."""
    found = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            found.update(f"{name}{tuple(p.shape)}".encode())
            found.update(p.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8).clone()


def _learn_small(model: nn.Module) -> None:
    """Biases and norms learn."""
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False):
            if name.endswith("bias") or (norm and p.ndim <= 1):
                p.requires_grad_(True)


def fuse(model: nn.Module, *, pack: bool = True) -> nn.Module:
    """A copy of `model` with its adapters in the weights: plain torch layers, all of which require gradients again.

    pack: attention goes back to torch's nn.MultiheadAttention; where heads no longer fill the tokens' width it stays a
    `HeadAttention` of plain linear layers.
    """
    made = copy.deepcopy(model)
    if not any(isinstance(m, (Adapted, HeadAttention)) for m in made.modules()):
        raise AdviceError(f"{type(model).__name__} has no adapters to fuse; Adapt()(model) puts them in.")
    for module in list(made.modules()):
        if isinstance(module, Adapted):
            module.fuse_()
    for module in made.modules():
        if hasattr(module, DIGEST):
            delattr(module, DIGEST)
    made.requires_grad_(True)
    return _replaced(made, HeadAttention, packed) if pack else made


def unpack_attention(model: nn.Module) -> nn.Module:
    """`model` itself, with every nn.MultiheadAttention in four projections; a bare one comes back as another module."""
    return _replaced(model, nn.MultiheadAttention, unpacked)


def _replaced(model: nn.Module, kind: type[nn.Module], make: Any) -> nn.Module:
    if isinstance(model, kind):
        return make(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            model.set_submodule(name, make(module))
    return model
