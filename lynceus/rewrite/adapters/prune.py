"""Structured channel pruning: channels and heads out of a model, adapted or plain, with all that is coupled with them.

Paper: Hedegaard et al., Structured Pruning Adapters, Pattern Recognition 2024, arXiv 2211.10155
Code: LukasHedegaard/structured-pruning-adapters, channel-spa-experiments (read for facts only); written from the paper
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.adapters.adapt import fuse, unpack_attention
from lynceus.rewrite.adapters.attention import HeadAttention
from lynceus.rewrite.adapters.importance import CRITERIA, Criterion, Loss, choose, row_scores
from lynceus.rewrite.adapters.layers import Adapted
from lynceus.rewrite.dependency import DependencyGraph, Example, Selection, dependencies
from lynceus.rewrite.swap import rewrites_of, signed

Keep = Mapping[str, Sequence[int] | Tensor]
PREFIX = "backbone."


@dataclass(frozen=True, kw_only=True)
class PruneChannels:
    """Rewrite: removes the least important channels and heads of a model, adapted or plain; what is left is smaller and
    faster, and trains on.

    ratio: share of the prunable channels that goes, in [0, 1). importance: "l1", "l2" of the rows of the weights;
    "gradient", |w dL/dw|; "taylor", its square; "lrp", relevance; the last three look at the example images, with the
    model's own first answers as labels. scope: "global" ranks all layers together, "layer" takes the same share of
    each. least: channels (or heads) that stay in every layer. multiple: what is left of every layer is rounded up to a
    multiple of so many channels, or stays whole; processors like multiples of 8 or 16. names: regular expression; only
    layers whose name it finds are pruned, with all that is coupled with them.
    """

    calibration: ClassVar[int] = 64

    ratio: float = 0.5
    importance: Criterion = "l1"
    scope: Literal["global", "layer"] = "global"
    least: int = 1
    multiple: int = 1
    names: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise AdviceError(f"ratio is the share of channels that goes, in [0, 1), not {self.ratio}; 0.7 leaves 30%.")
        if self.importance not in CRITERIA:
            raise unknown("importance", str(self.importance), CRITERIA)
        if self.scope not in ("global", "layer"):
            raise unknown("scope", str(self.scope), ("global", "layer"))
        if self.least < 1:
            raise AdviceError(f"least is at least 1, not {self.least}; a layer without channels gives nothing.")
        if self.multiple < 1:
            raise AdviceError(f"multiple is at least 1 (any width), not {self.multiple}; 8 suits most processors.")
        try:
            re.compile(self.names)
        except re.error as error:
            raise AdviceError(f"names={self.names!r} is no regular expression: {error}.") from None

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A pruned copy of `model` in eval mode. example: an input (b, 3, h, w); it is needed to follow the channels.

        AdviceError when nothing of the model can be pruned."""
        if example is None:
            raise AdviceError(
                "PruneChannels follows the channels of an example input: PruneChannels(ratio=0.5)(model, example)."
            )
        return prune(
            model, self.ratio, importance=self.importance, example=example, scope=self.scope, least=self.least,
            multiple=self.multiple, names=self.names,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeepChannels:
    """Rewrite: the plan of a pruning, as plain values; needs no data.

    masks: "SIZE:HEX", a bit per index, set where it is kept -> "NAME:AXIS" of all parameters that it cuts. counts:
    heads and groups that are left, by "MODULE.ATTRIBUTE". widths: channels of the levels of a backbone afterwards.
    """

    masks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    widths: tuple[int, ...] = ()

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` without the channels, in eval mode. AdviceError when the plan is of another model."""
        made = unpack_attention(copy.deepcopy(model))
        self.selection(made).apply_(made)
        settle(made, self.widths)
        sign(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made

    def selection(self, model: nn.Module | None = None) -> Selection:
        """The masks as arrays. model: the names are made to fit it, be it a task's module or the backbone in it."""
        masks = {}
        for text, places in self.masks.items():
            for place in places:
                name, _, axis = place.rpartition(":")
                masks[name, int(axis)] = unpacked_bits(text)
        counts = dict(self.counts)
        if model is not None and masks:
            names = model.state_dict().keys()
            first = next(iter(masks))[0]
            if first not in names and PREFIX + first in names:
                masks = {(PREFIX + n, d): m for (n, d), m in masks.items()}
                counts = {PREFIX + n: c for n, c in counts.items()}
            elif first not in names and first.startswith(PREFIX):
                masks = {(n.removeprefix(PREFIX), d): m for (n, d), m in masks.items()}
                counts = {n.removeprefix(PREFIX): c for n, c in counts.items()}
        return Selection(masks=masks, counts=counts)


def prune(
    model: nn.Module,
    ratio: float | None = None,
    *,
    masks: Keep | None = None,
    importance: Criterion = "l1",
    example: Example,
    loss: Loss | None = None,
    scope: Literal["global", "layer"] = "global",
    least: int = 1,
    multiple: int = 1,
    names: str = "",
    graph: DependencyGraph | None = None,
) -> nn.Module:
    """A copy of `model` (adapted or plain) without some channels, in eval mode.

    ratio: share of the prunable channels that goes, the least important ones first; or masks: what is kept, by layer:
    numbers of outputs, or a boolean tensor. multiple: as of `PruneChannels`; masks are taken as they are.
    example: an input, or several as a tuple. loss: model -> scalar, whose
    gradients tell the importance (`importance.row_scores`). graph: of this very model, if it is known.
    AdviceError when a layer cannot be pruned (it says why), or what goes together is torn apart."""
    if (ratio is None) == (masks is None):
        raise AdviceError("Give one of both: ratio, the share of channels that goes, or masks, what is kept by layer.")
    if ratio is not None:
        PruneChannels(
            ratio=ratio, importance=importance, scope=scope, least=least, multiple=multiple, names=names
        )  # fmt: skip
    made = unpack_attention(copy.deepcopy(model))
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    graph = graph or dependencies(made, inputs)
    if not graph.bundles:
        why = sorted({graph.reason(a) for a in graph.roots})[:3]
        raise AdviceError(f"No channel of {type(model).__name__} can be pruned: what they are {'; '.join(why)}.")
    if masks is not None:
        drop = _dropped(graph, masks)
    else:
        chosen = copy.copy(graph)
        chosen.bundles = [b for b in graph.bundles if any(re.search(names, layer) for layer in b.layers)]
        if not chosen.bundles:
            able = ", ".join(b.layers[0] for b in graph.bundles[:6])
            raise AdviceError(f"No prunable layer fits names={names!r}; there are {able} ...")
        plain = fuse(made, pack=False) if _adapted(made) else made
        axes = [
            a for a in graph.roots if any(a.name.removesuffix("weight").rstrip(".") in b.layers for b in chosen.bundles)
        ]
        scores = row_scores(plain, axes, importance, inputs, loss)
        drop = choose(chosen, scores, float(ratio or 0.0), scope=scope, least=least, multiple=multiple)
    flags = {n: p.requires_grad for n, p in made.named_parameters()}
    selection = graph.selection(drop)
    selection.apply_(made)
    for name, p in made.named_parameters():
        p.requires_grad_(flags[name])
    made.eval()
    plan = plan_of(selection, widths=levels(made, inputs))
    settle(made, plan.widths)
    sign(made, plan)
    if not plan.widths:  # it ran already otherwise
        with torch.no_grad():
            made(*inputs)
    return made


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(m, (Adapted, HeadAttention)) for m in model.modules())


def _dropped(graph: DependencyGraph, keep: Keep) -> list[int]:
    """Units that go, from what is kept of layers' outputs."""
    drop: set[int] = set()
    for layer, kept in keep.items():
        bundle, rows = graph.bundle_of(layer), graph.rows(layer)
        mask = np.zeros(len(rows), dtype=bool)
        values = np.asarray(kept.cpu() if isinstance(kept, Tensor) else kept)
        if values.dtype == bool and len(values) != len(rows):
            raise AdviceError(f"{layer!r} has {len(rows)} outputs; its mask has {len(values)}.")
        if values.dtype != bool and len(values) and not 0 <= values.min() <= values.max() < len(rows):
            raise AdviceError(f"{layer!r} has outputs 0 to {len(rows) - 1}; its mask names {int(values.max())}.")
        mask[values if values.dtype == bool else values.astype(int)] = True
        if not mask.any():
            raise AdviceError(f"Nothing would be left of {layer!r}; keep at least one of its {len(rows)} outputs.")
        gone, stay = set(rows[~mask].tolist()), set(rows[mask].tolist())
        torn = gone & stay
        if torn:
            together = np.flatnonzero(rows == next(iter(torn))).tolist()
            shown = f"{together[:6]}{' ...' if len(together) > 6 else ''}"
            raise AdviceError(
                f"The outputs {shown} of {layer!r} go together (a head or a group); keep all of them or none."
            )
        stuck = gone - set(bundle.units.tolist())
        if any(not graph.free[u] for u in stuck):
            at = int(np.flatnonzero(np.isin(rows, list(stuck)))[0])
            why = graph.reasons.get(int(rows[at]), "is used by the code")
            raise AdviceError(f"Output {at} of {layer!r} cannot be pruned: it {why}.")
        drop |= gone
    return sorted(drop)


# the plan, and what a backbone says of itself -----------------------------------------------------
def packed_bits(mask: np.ndarray) -> str:
    """A mask as "SIZE:HEX"."""
    return f"{len(mask)}:{np.packbits(mask).tobytes().hex()}"


def unpacked_bits(text: str) -> np.ndarray:
    size, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8), count=int(size)).astype(bool)


def plan_of(selection: Selection, *, widths: tuple[int, ...] = ()) -> KeepChannels:
    """A selection as plain values, each mask written once."""
    masks: dict[str, list[str]] = {}
    for (name, axis), mask in selection.masks.items():
        masks.setdefault(packed_bits(mask), []).append(f"{name}:{axis}")
    return KeepChannels(
        masks={k: tuple(v) for k, v in masks.items()}, counts=dict(selection.counts), widths=tuple(widths)
    )


def merged(first: KeepChannels, second: KeepChannels) -> KeepChannels:
    """The plan that does both, one after the other."""
    masks, later = dict(first.selection().masks), second.selection().masks
    for key, mask in later.items():
        if key in masks:
            both = masks[key].copy()
            both[masks[key]] = mask
            masks[key] = both
        else:
            masks[key] = mask
    counts = {**first.counts, **second.counts}
    return plan_of(Selection(masks=masks, counts=counts), widths=second.widths or first.widths)


def sign(made: Any, plan: KeepChannels) -> None:
    """Signs a pruned module; a plan right after a plan becomes one."""
    before = rewrites_of(made)
    if before and isinstance(before[-1], KeepChannels):
        plan = merged(before[-1], plan)
        for module in {id(m): m for m in (made, getattr(made, "backbone", made))}.values():
            steps = rewrites_of(module)
            if not steps or not isinstance(steps[-1], KeepChannels):
                continue
            if len(steps) == 1:
                del module.rewrite, module.original
            else:
                module.rewrite, module.original = steps[-2], module.original.original
    signed(made, plan)


def levels(model: Any, inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Channels of a backbone's levels as they are now; nothing for other modules."""
    inner: Any = getattr(model, "backbone", model)
    if not hasattr(inner, "stages") or not hasattr(inner, "forward_stages"):
        return ()
    x = model.prepared(inputs[0][:1]) if hasattr(model, "prepared") else inputs[0][:1]
    with torch.no_grad():
        return tuple(int(m.shape[1]) for m in inner.forward_stages(x))


def settle(model: Any, widths: tuple[int, ...]) -> None:
    """Tells a backbone the channels of its levels, which decoders read."""
    inner: Any = getattr(model, "backbone", model)
    if not widths:
        return
    inner.stages = tuple(type(s)(w, s.stride, s.name) for s, w in zip(inner.stages, widths))
    inner.num_features = widths[-1]
    head = inner.get_classifier()
    inner.head_hidden_size = head.in_features if isinstance(head, nn.Linear) else widths[-1]
