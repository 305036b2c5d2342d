"""Rules that translate the parameter names of one implementation into those of another, and the account of a match.

`match` sets a foreign state against a model under some rules and says, name by name, what found its place and what did
not; `best_table` tries a family's tables and keeps the one that fits. Nothing here loads anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lynceus.core.account import Account, WrongShape, mend
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.names import strip_wrappers
from lynceus.core.positions import resize_table

# buffers that every model rebuilds for itself
REBUILT = ("num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
# tables that may be stored for another grid
TABLES = re.compile(
    r"(pos_?embed(ding)?s?|position_embeddings?|positional_embedding|relative_position_bias_table|rel_pos_[hw]|"
    r"complex_weight|attention_biases)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One rewriting step, applied to every foreign name in order; all matching rules apply, one after the other.

    pattern: regular expression, used with `re.sub` on the whole name (anchor it with ^ and $ where that matters).
    name: its replacement ("\\\\1" groups allowed); None drops the entry (buffers that are always rebuilt).
    transform: applied to the value when the pattern matches: a name of `TRANSFORMS`, or a function Tensor -> Tensor.
      "split_qkv": `name` holds {q,k,v} and the value is cut into as many parts along its first axis; a part without a
        name, as in {q,,v}, is dropped.
      "merge_qkv": several entries take the same `name` and are joined along their first axis, q before k before v.
      "tie": `name` holds {a,b} and both get the same value.
      "resize_positions", "resize_rel_bias": the value is resized to the model's own table.
    """

    pattern: str
    name: str | None
    transform: str | Callable[[Tensor], Tensor] | None = None


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda t: t.transpose(0, 1),
    "squeeze": lambda t: t.squeeze(),
    "hwio_to_oihw": lambda t: t.permute(3, 2, 0, 1),
    "linear_to_conv": lambda t: t[:, :, None, None],
    "conv_to_linear": lambda t: t.flatten(1),
    "unsqueeze": lambda t: t[None],
}
MANY = ("split_qkv", "merge_qkv", "tie")  # transforms that change how many entries there are
SIZED = ("resize_positions", "resize_rel_bias")  # transforms that need the model's own shape


@dataclass(slots=True)
class Translated:
    """A value on its way: its names so far and what was done to it."""

    value: Tensor
    origin: str
    done: list[str] = field(default_factory=list)


def translate(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> tuple[dict[str, Translated], list[str]]:
    """(the state under our names with its history, the names that a rule drops).

    Two names that become one, without "merge_qkv", are an AdviceError.
    """
    out: dict[str, Translated] = {}
    parts: dict[str, list[Translated]] = {}
    dropped: list[str] = []
    for origin, tensor in state.items():
        name: str | None = origin
        entry = Translated(tensor, origin)
        merge = False
        names: list[str | None] | None = None
        for rule in rules:
            if name is None or names is not None or not re.search(rule.pattern, name):
                continue
            if rule.transform in ("split_qkv", "tie"):
                names = _braces(re.sub(rule.pattern, rule.name or "", name))
                entry.done.append(str(rule.transform))
                split = rule.transform == "split_qkv"
                values = list(entry.value.chunk(len(names))) if split else [entry.value] * len(names)
                continue
            if rule.transform == "merge_qkv":
                merge = True
                entry.done.append("merge_qkv")
            elif rule.transform is not None and rule.transform not in SIZED:
                entry.value = _transform(rule.transform)(entry.value)
                entry.done.append(
                    rule.transform
                    if isinstance(rule.transform, str)
                    else rule.transform.__name__.replace("<lambda>", "reshaping")
                )
            name = None if rule.name is None else re.sub(rule.pattern, rule.name, name)
        if name is None:
            dropped.append(origin)
        elif names is not None:
            for new, value in zip(names, values):
                if new is None:
                    continue
                _put(out, new, Translated(value, origin, list(entry.done)))
        elif merge:
            parts.setdefault(name, []).append(entry)
        else:
            _put(out, name, entry)
    for name, found in parts.items():
        found = sorted(found, key=lambda e: _qkv_rank(e.origin))
        joined = torch.cat([e.value for e in found])
        _put(out, name, Translated(joined, " + ".join(e.origin for e in found), ["merge_qkv"]))
    return out, dropped


def apply_rules(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under our names. A rule with name None drops the entry; two names that become one: AdviceError."""
    return {name: entry.value for name, entry in translate(rules, state)[0].items()}


@dataclass(slots=True)
class Matching:
    """A foreign state under a model's names: `values` fits `load_state_dict`; `account` says how it came about."""

    values: dict[str, Tensor]
    account: Account
    table: str = ""


def match(
    state: Mapping[str, Tensor],
    model: nn.Module,
    rules: Sequence[Rule] = (),
    *,
    resize: bool = True,
    ignore: Sequence[str] = (),
    head: str | Sequence[str] | None = None,
) -> Matching:
    """Sets `state` against `model` under `rules`. Strict: whatever finds no place is in the account.

    resize: position tables of another size are resized to the model's, with a line in the account.
    ignore: regular expressions; entries of the file whose names match may find no place.
    head: the classifier's module name, or several; their entries, on both sides, may disagree ("drop head").
    """
    own = {**model.state_dict(keep_vars=True)}
    persistent_buffers = {n for n, _ in model.named_buffers()}
    bare, wrappers = strip_wrappers(state, own)
    entries, dropped = translate(rules, {bare[n]: v for n, v in state.items()})
    account = Account(wrappers=wrappers)
    account.dropped = [(n, "rebuilt by the model" if _rebuilt(n) else "a rule drops it") for n in dropped]
    values: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name not in own:
            why = _why_ignored(name, entry.origin, ignore, head)
            (account.dropped.append((entry.origin, why)) if why else account.unexpected.append(entry.origin))
            if not why:
                account.unplaced[entry.origin] = tuple(entry.value.shape)
                account.translated[entry.origin] = name
            continue
        if _rebuilt(name) and not torch.is_floating_point(own[name]):
            account.dropped.append((entry.origin, "rebuilt by the model"))
            account.untouched.append(name)
            continue
        value, target = entry.value, own[name]
        if value.shape != target.shape:
            resized = resize_table(value, name, target, model) if resize and TABLES.search(name) else None
            if resized is None and _in_head(name, head):
                account.dropped.append((entry.origin, f"head of {value.shape[0]} classes dropped"))
                account.fresh.append(name)
                continue
            if resized is None:
                account.wrong_shape.append(
                    WrongShape(
                        entry.origin, name, tuple(value.shape), tuple(target.shape), mend(value, target, name, model)
                    )
                )
                continue
            value = resized[0]
            entry.done.append(resized[1])
        if value.dtype != target.dtype and value.is_floating_point() and target.is_floating_point():
            account.dtype_changed.append((name, str(value.dtype).split(".")[1], str(target.dtype).split(".")[1]))
        values[name] = value
        if entry.done:
            account.transformed.append((entry.origin, name, ", ".join(entry.done)))
        else:
            account.loaded.append((entry.origin, name))
    _what_is_missing(own, persistent_buffers, values, account, head)
    return Matching(values, account)


def best_table(
    state: Mapping[str, Tensor],
    model: nn.Module,
    sources: Mapping[str, Sequence[Rule]],
    *,
    resize: bool = True,
    ignore: Sequence[str] = (),
    head: str | Sequence[str] | None = None,
) -> Matching:
    """The match under the table of `sources` (or our own names) that leaves the fewest names without a place."""
    best: Matching | None = None
    for table, rules in [*sources.items(), *([] if "ours" in sources else [("ours", ())])]:
        try:
            found = match(state, model, rules, resize=resize, ignore=ignore, head=head)
        except (AdviceError, RuntimeError, IndexError):  # a table made for other names need not even apply
            continue
        found.table = found.account.source = table
        if best is None or found.account.faults < best.account.faults:
            best = found
        if best.account.complete:
            break
    if best is None:
        raise AdviceError(f"None of the name tables {list(sources)} applies to this checkpoint.")
    return best


def _what_is_missing(
    own: dict[str, Tensor],
    buffers: set[str],
    values: dict[str, Tensor],
    account: Account,
    head: str | Sequence[str] | None,
) -> None:
    placed = {id(own[n]) for n in values}
    claimed = {*values, *account.untouched, *account.fresh, *(w.ours for w in account.wrong_shape)}
    for name, target in own.items():
        if name in claimed:
            continue
        if id(target) in placed:
            twin = next(n for n in values if own[n] is target)
            account.tied.append((name, twin))
        elif name in buffers and (_rebuilt(name) or not torch.is_floating_point(target)):
            account.untouched.append(name)
        elif _in_head(name, head):
            account.fresh.append(name)
        else:
            account.missing.append(name)
            account.wanted[name] = tuple(target.shape)


def _in_head(name: str, head: str | Sequence[str] | None) -> bool:
    heads = (head,) if isinstance(head, str) else head or ()
    return name.startswith(tuple(h + "." for h in heads))


def _why_ignored(name: str, origin: str, ignore: Sequence[str], head: str | Sequence[str] | None) -> str:
    if _rebuilt(name):
        return "rebuilt by the model"
    if _in_head(name, head):
        return "head dropped"
    if any(re.search(p, name) or re.search(p, origin) for p in ignore):
        return "ignored as asked"
    return ""


def _rebuilt(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in REBUILT


def _put(out: dict[str, Translated], name: str, entry: Translated) -> None:
    if name in out:
        raise AdviceError(
            f"Both {out[name].origin!r} and {entry.origin!r} become {name!r}; one of the rules is too wide."
        )
    out[name] = entry


def _transform(given: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not isinstance(given, str):
        return given
    if given not in TRANSFORMS:
        raise unknown("transform", given, [*TRANSFORMS, *MANY, *SIZED])
    return TRANSFORMS[given]


def _braces(name: str) -> list[str | None]:
    """ "a.{q,k,v}.b" -> ["a.q.b", "a.k.b", "a.v.b"]; "{a.b,c.d}" -> ["a.b", "c.d"]; "{q,,v}" -> ["q", None, "v"]."""
    found = re.search(r"\{([^{}]+)\}", name)
    if found is None:
        raise AdviceError(f"The rule's name {name!r} must hold the parts in braces, e.g. 'attn.{{q,k,v}}.weight'.")
    parts = [part.strip() for part in found[1].split(",")]
    return [name[: found.start()] + part + name[found.end() :] if part else None for part in parts]


def _qkv_rank(name: str) -> tuple[int, str]:
    for rank, words in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
        if re.search(rf"(^|[._])({'|'.join(words)})(_?(proj|lin|linear))?([._]|$)", name.lower()):
            return rank, ""
    return 3, name
