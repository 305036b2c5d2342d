"""One forward pass of a pruned decoder: cut hidden states, positions and masks before a layer, note what a cache holds.

The decoder's own code runs; hooks stand before its layers. What a call must know travels in a context variable, and
what later calls must know lies in the cache that the caller passes, so one model serves many streams and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.vlm_tokens.choose import Look

# (stage, what the criterion saw, grid marks (b, m)) -> which image tokens stay (b, m)
Stage = Callable[[int, Look, Tensor], Tensor]
KNOWN = frozenset({"position_embeddings", "attention_mask", "position_ids", "past_key_values", "hidden_states"})
HELD = "kept_tokens"  # the attribute of a cache that holds its Held


@dataclass
class Held:
    """What the pruned layers of a cache hold: per stage, the columns of its entries and whether each is real.

    Entries that are not real fill up rows which kept fewer tokens than others of the batch."""

    columns: list[Tensor] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)  # no entry is a filler


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one prefill kept. image: image tokens of the prompt (b, n). layers[K]: tokens present from layer K on."""

    image: Tensor
    layers: dict[int, Tensor]

    def picture(self, layer: int, row: int = 0) -> Tensor:
        """Which of the row's image tokens are there from pruned layer `layer` on, in their order."""
        return self.layers[layer][row][self.image[row]]

    def counts(self, depth: int, row: int = 0) -> list[int]:
        """Tokens of a row in each of `depth` layers."""
        out, now = [], int(self.image.shape[1])
        for i in range(depth):
            if i in self.layers:
                now = int(self.layers[i][row].sum())
            out.append(now)
        return out


@dataclass
class Pass:
    """The state of one forward call of one pruned decoder."""

    owner: object
    layers: tuple[int, ...]
    stage: Stage
    image: Tensor  # (b, n)
    grid: Tensor  # (b, n), marks of the tokens on the grid
    valid: Tensor | None  # (b, n); None: no padding
    past: int  # columns that the cache held before
    pruning: bool
    now: Tensor | None = None  # (b, m): columns of this call's tokens still there, from 0; None: all
    real: Tensor | None = None  # (b, m); None: no fillers
    frozen: Tensor | None = None  # (b, n, d): each token as it was when it was dropped
    chosen: Tensor | None = None
    rope: Any = None
    masks: dict[tuple[int, int], Any] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    token: Any = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def columns(self) -> Tensor:
        b, n = self.size
        return torch.arange(n, device=self.image.device).expand(b, n) if self.now is None else self.now


current: ContextVar[Pass | None] = ContextVar("lynceus_vlm_tokens_pass", default=None)
watched: ContextVar[list[Kept] | None] = ContextVar("lynceus_vlm_tokens_watched", default=None)


@contextmanager
def watch() -> Iterator[list[Kept]]:
    """Inside, every pruned prefill (of this thread) appends what it kept to the list."""
    seen: list[Kept] = []
    token = watched.set(seen)
    try:
        yield seen
    finally:
        watched.reset(token)


# ---- before a layer --------------------------------------------------------------------------------------------------
def before_layer(owner: object, index: int) -> Callable[..., Any]:
    """The hook before layer `index`: cuts where it is a pruned one, scores where the next is."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        at = current.get()
        if at is None or at.owner is not owner:
            return args, kwargs
        named = not args
        hidden = kwargs["hidden_states"] if named else args[0]
        if at.pruning and index in at.layers:
            hidden = cut(at, index, hidden)
        if any(k <= index for k in at.layers):
            kwargs = narrowed(at, index, layer, kwargs)
        if at.pruning and index + 1 in at.layers:
            at.chosen = choose(at, index, layer, hidden, kwargs.get("position_embeddings"))
        if named:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    return hook


def choose(at: Pass, index: int, layer: nn.Module, hidden: Tensor, rope: Any) -> Tensor:
    """Tokens (b, m) that stay before layer index + 1; text always does."""
    columns = at.columns()
    image, grid = at.image.gather(1, columns), at.grid.gather(1, columns)
    if at.real is not None:
        image = image & at.real
    last = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
    if at.valid is not None:  # padding on the right: the last real token
        valid = at.valid.gather(1, columns)
        last = last - valid.flip(1).long().argmax(1)
    look = Look(layer=layer, index=index, hidden=hidden, image=image, last=last, rope=rope, columns=columns + at.past)
    stays = ~image | at.stage(at.layers.index(index + 1), look, grid)
    return stays if at.real is None else stays & at.real


def cut(at: Pass, index: int, hidden: Tensor) -> Tensor:
    """Keeps what was chosen, in order and aligned to the right; rows that keep fewer begin with masked fillers."""
    assert at.chosen is not None
    stays, columns = at.chosen, at.columns()
    at.chosen = None
    at.frozen = hidden if at.frozen is None else _into(at.frozen, hidden, columns, at.real)
    counts = stays.sum(1).tolist()
    most = max(counts)
    if min(counts) < hidden.shape[1]:
        picked = stays.long().argsort(dim=1, stable=True)[:, hidden.shape[1] - most :]
        at.now = columns.gather(1, picked)
        at.real = stays.gather(1, picked) if min(counts) < most else None
        hidden = hidden.gather(1, picked[..., None].expand(-1, -1, hidden.shape[-1]))
    now = at.columns()
    real = torch.ones_like(now, dtype=torch.bool) if at.real is None else at.real
    at.kept[index] = torch.zeros_like(at.image).scatter(1, now, real)
    at.rope = None
    return hidden


def restored(at: Pass, out: Tensor, norm: nn.Module) -> Tensor:
    """The decoder's output (b, n, d) for the whole prompt: dropped tokens as they were when dropped, normed."""
    if at.frozen is None or at.now is None:
        return out
    return _into(norm(at.frozen).to(out.dtype), out, at.now, at.real)


def _into(whole: Tensor, part: Tensor, columns: Tensor, real: Tensor | None) -> Tensor:
    index = columns[..., None].expand(-1, -1, whole.shape[-1])
    if real is not None:
        part = torch.where(real[..., None], part, whole.gather(1, index))
    return whole.scatter(1, index, part)


# ---- what layers are given besides hidden states ---------------------------------------------------------------------
def narrowed(at: Pass, index: int, layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positions and masks of the tokens that are there in layer `index`."""
    stage = sum(k <= index for k in at.layers) - 1
    out = dict(kwargs)
    n = at.size[1]
    if at.now is not None:
        for name, value in kwargs.items():
            if name not in KNOWN and isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == n:
                raise AdviceError(
                    f"{type(layer).__name__} {index} is given {name!r} per token, which pruning does not know how to "
                    "cut; prune a model of the LLaVA, Mistral or Qwen2-VL kind."
                )
        if kwargs.get("position_embeddings") is not None:
            if at.rope is None:
                at.rope = tuple(_columns_of(r, at.now, -2) for r in kwargs["position_embeddings"])
            out["position_embeddings"] = at.rope
        if kwargs.get("position_ids") is not None:
            # flash attention takes gaps in the positions for packed sequences
            flash = "flash" in str(_implementation(layer))
            out["position_ids"] = None if flash else _columns_of(kwargs["position_ids"], at.now, -1)
    cache = kwargs.get("past_key_values")
    given = kwargs.get("attention_mask")
    key = (stage, id(given))
    if key not in at.masks:
        at.masks[key] = _mask(at, stage, index, layer, given, cache)
    out["attention_mask"] = at.masks[key]
    return out


def _columns_of(value: Tensor, columns: Tensor, dim: int) -> Tensor:
    """`value` with the tokens of dimension `dim` gathered per row; the rows' dimension stands before it."""
    row = value.ndim + dim - 1
    shape = list(value.shape)
    shape[row] = len(columns)
    value = value.expand(shape)
    index = columns.view(*(1,) * row, *columns.shape, *(1,) * (-dim - 1))
    return value.gather(dim, index.expand(*shape[:row], *columns.shape, *shape[row + 2 :]))


def _implementation(layer: nn.Module) -> Any:
    attention = getattr(layer, "self_attn", None)
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def _mask(at: Pass, stage: int, index: int, layer: nn.Module, given: Any, cache: Any) -> Any:
    """The mask of a stage's layers, cut out of the one that the model made for the whole sequence."""
    new = at.columns() + at.past
    columns, real, whole = _with_cache(at, stage, index, cache, new)
    queries, keys = new.shape[1], columns.shape[1]
    if cache is not None and hasattr(cache, "get_mask_sizes"):  # a sliding cache holds the last entries only
        held = cache.get_mask_sizes(queries, index)[0]
        columns, real, keys = columns[:, -held:], real[:, -held:], min(keys, held)
    if given is None:
        if whole and (queries == keys or queries == 1):
            return None
        if "flash" in str(_implementation(layer)):
            return real.long()
        seen = (columns[:, None] <= new[..., None]) & real[:, None]
        return (seen | (columns[:, None] == new[..., None]))[:, None]
    if not isinstance(given, Tensor):
        raise AdviceError(
            f"Attention masks of the kind {type(given).__name__} cannot be cut; load the model with "
            "attn_implementation='sdpa' (or 'eager')."
        )
    total = at.past + at.size[1]
    begin = total - given.shape[-1]
    inside = columns >= begin
    if given.ndim == 2:
        return (given.gather(1, (columns - begin).clamp(min=0)).bool() & real & inside).long()
    b = len(new)
    rows = at.columns()[:, None, :, None].expand(-1, given.shape[1], -1, given.shape[-1])
    mask = given.expand(b, -1, -1, -1)
    if at.now is not None:
        mask = mask.gather(2, rows)
    mask = mask.gather(3, (columns - begin).clamp(min=0)[:, None, None].expand(-1, mask.shape[1], queries, -1))
    seen = (real & inside)[:, None, None].expand(-1, 1, queries, -1)
    own = (columns[:, None] == new[..., None])[:, None]
    if mask.dtype == torch.bool:
        return mask & seen | own
    closed = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
    return torch.where(seen, mask, closed).masked_fill(own & ~seen, 0.0)


def _with_cache(at: Pass, stage: int, index: int, cache: Any, new: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Columns and reality (b, P + m) of a stage's entries once this call's tokens are added, and notes them."""
    mine = torch.ones_like(new, dtype=torch.bool) if at.real is None else at.real
    if cache is None:
        return new, mine, at.real is None
    held: Held | None = getattr(cache, HELD, None)
    before = int(cache.get_seq_length(at.layers[stage]))
    if held is None or not before:
        if before:
            raise AdviceError(
                "The cache was filled by a model that pruned nothing, or by another one; begin with an empty cache."
            )
        if held is None:
            held = Held()
            setattr(cache, HELD, held)
        for values in (held.columns, held.real, held.whole):
            del values[stage:]
    if stage == len(held.columns):
        held.columns.append(new)
        held.real.append(mine)
        held.whole.append(at.real is None)
        return new, mine, at.real is None
    columns, real = held.columns[stage][:, :before], held.real[stage][:, :before]
    if columns.shape[1] < before:
        raise AdviceError(
            f"Layer {index} of the cache holds {before} entries, of which {columns.shape[1]} were written by this "
            "model; begin with an empty cache."
        )
    if len(columns) != len(new):
        if len(new) % len(columns):
            raise AdviceError(f"The cache was filled by a batch of {len(columns)}; this one has {len(new)} rows.")
        columns, real = (t.repeat_interleave(len(new) // len(columns), 0) for t in (columns, real))
    held.columns[stage], held.real[stage] = torch.cat([columns, new], 1), torch.cat([real, mine], 1)
    held.whole[stage] = held.whole[stage] and at.real is None
    return held.columns[stage], held.real[stage], held.whole[stage]


def stages_of(layers: Sequence[int], depth: int) -> list[int]:
    """How many cuts stand before each of `depth` layers."""
    return [sum(k <= i for k in layers) for i in range(depth)]
