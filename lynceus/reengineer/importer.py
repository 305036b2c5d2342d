"""Bringing a foreign state in: rules first, then proposals, each with its reason; what stays ambiguous is shown.

`map_keys` never loads; `KeyMap.load` does, and refuses an incomplete map unless told. `KeyMap.save` writes every pair
as rules (YAML), so that the next load is deterministic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from lynceus.core.account import Account
from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.files import write_atomic
from lynceus.core.names import depth, similarity, strip_wrappers, tokens
from lynceus.core.rules import MANY, SIZED, TRANSFORMS, Rule, match

Shape = tuple[int, ...]
QKV = re.compile(r"(^|[._])(q|k|v|query|key|value)(?=(_?(proj|lin|linear))?([._]|$))")
TURNS: dict[str, tuple[int, ...]] = {"transpose": (1, 0), "hwio_to_oihw": (3, 2, 0, 1)}


@dataclass(slots=True)
class KeyMap:
    """A foreign state under a model's names. values: what can be loaded. rules: the given and one per proposal."""

    model: nn.Module
    values: dict[str, Tensor]
    account: Account
    rules: list[Rule]

    @property
    def verdict(self) -> str:
        return self.account.verdict

    def text(self, *, expand: bool = False) -> str:
        return self.account.text(expand=expand)

    def load(self, *, partial: bool = False) -> Account:
        """Copies the values into the model. An incomplete map is an AdviceError unless `partial`."""
        if not self.account.complete and not partial:
            raise AdviceError(
                f"The map is not complete; nothing was loaded (load(partial=True) takes what fits).\n{self.text()}"
            )
        self.model.load_state_dict(self.values, strict=False)
        return self.account

    def save(self, path: str | Path) -> Path:
        """Writes the rules; `map_keys(state, model, load_rules(path), propose=False)` gives the same map."""
        return save_rules(self.rules, path)


def map_keys(
    state: Mapping[str, Tensor],
    model: nn.Module,
    rules: Sequence[Rule] | str | Path = (),
    *,
    propose: bool = True,
    resize: bool = True,
) -> KeyMap:
    """Sets a foreign state against `model`: by rules (or a rules file) and exact names, then by proposals.

    Proposals, in this order: the only entry of its shape; equal shapes in equal order of construction with agreeing
    depth numbers; similar names; values that only fit one (gains near 1, shifts near 0). Each carries its reason.
    """
    given = load_rules(rules) if isinstance(rules, (str, Path)) else list(rules)
    found = match(state, model, given, resize=resize)
    account, values = found.account, dict(found.values)
    extra: list[Rule] = []
    if propose and (account.missing or account.wrong_shape) and (account.unexpected or account.wrong_shape):
        bare = strip_wrappers(state, model.state_dict())[0]
        free = {bare[n]: v for n, v in state.items() if bare[n] in set(account.unexpected)}
        own = {n: t for n, t in model.state_dict().items() if n in set(account.missing)}
        extra = _propose(free, own, account, values)
        extra += _turn_misfits(account, values, {bare[n]: v for n, v in state.items()})
    return KeyMap(model, values, account, [*given, *extra])


# rules as YAML -----------------------------------------------------------------------------------------------------
def save_rules(rules: Sequence[Rule], path: str | Path) -> Path:
    """Writes rules as YAML. A transform that is a function cannot be written: an AdviceError."""
    rows = []
    for rule in rules:
        if rule.transform is not None and not isinstance(rule.transform, str):
            raise AdviceError(
                f"The transform of {rule.pattern!r} is a function; written are only: {', '.join(TRANSFORMS)}."
            )
        row = {"pattern": rule.pattern, "name": rule.name}
        rows.append(row | ({"transform": rule.transform} if rule.transform else {}))
    return write_atomic(Path(path), yaml.safe_dump({"rules": rows}, sort_keys=False))


def load_rules(path: str | Path) -> list[Rule]:
    """The rules of a YAML file: a list under "rules", each with pattern, name (null drops) and optionally transform."""
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There is no rules file at {str(path)!r} (looked at {path.resolve()}).")
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))["rules"]
        rules = [Rule(pattern=r["pattern"], name=r["name"], transform=r.get("transform")) for r in rows]
        for rule in rules:
            re.compile(rule.pattern)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, re.error) as error:
        raise AdviceError(
            f"{path} is no rules file ({error}); it holds 'rules:' with '- pattern: ...' and 'name: ...' lines."
        ) from None
    for rule in rules:
        if rule.transform is not None and rule.transform not in (*TRANSFORMS, *MANY, *SIZED):
            raise unknown("transform", str(rule.transform), [*TRANSFORMS, *MANY, *SIZED], how=f"({path})")
    return rules


# proposals ---------------------------------------------------------------------------------------------------------
def _propose(
    free: dict[str, Tensor], own: dict[str, Tensor], account: Account, values: dict[str, Tensor]
) -> list[Rule]:
    """Pairs what it can; moves pairs into `values` and `account.guessed`, and returns their rules."""
    extra: list[Rule] = []

    def take(theirs: str, ours: str, reason: str, turn: str = "") -> None:
        value = TRANSFORMS[turn](free[theirs]) if turn else free[theirs]
        values[ours] = value
        account.guessed.append((theirs, ours, reason + (f"; {turn}" if turn else "")))
        _settle(account, theirs, ours)
        extra.append(Rule(pattern=f"^{re.escape(theirs)}$", name=ours, transform=turn or None))
        del free[theirs], own[ours]

    for parts, whole, reason in _joined(free, own):
        values[whole] = torch.cat([free[p] for p in parts])
        account.guessed.append((" + ".join(parts), whole, reason))
        for part in parts:
            _settle(account, part, whole)
            extra.append(Rule(pattern=f"^{re.escape(part)}$", name=whole, transform="merge_qkv"))
            del free[part]
        del own[whole]
    for turn in ("", *TURNS):
        changed = True
        while changed:
            changed = False
            for shape in dict.fromkeys(tuple(t.shape) for t in own.values()):
                ours = [n for n, t in own.items() if tuple(t.shape) == shape]
                theirs = [n for n, t in free.items() if _turned(tuple(t.shape), turn) == shape]
                if turn and shape == _turned(shape, turn):
                    continue  # a square kernel gives no sign of being transposed
                for pair, reason in _pairs(theirs, ours, free):
                    take(*pair, reason, turn)
                    changed = True
    for name, tensor in own.items():
        fits = [n for n, t in free.items() if t.shape == tensor.shape]
        if len(fits) > 1:
            account.ambiguous.append((name, _ranked(name, fits)))
    return extra


def _ranked(name: str, pool: list[str]) -> list[str]:
    return sorted(pool, key=lambda other: similarity(name, other), reverse=True)


def _pairs(theirs: list[str], ours: list[str], values: Mapping[str, Tensor]) -> list[tuple[tuple[str, str], str]]:
    """Pairs among entries of one shape that are safe to propose; the rest is left alone."""
    if not theirs or not ours:
        return []
    if len(theirs) == len(ours) == 1:
        return [((theirs[0], ours[0]), "the only entry of this shape")]
    groups_t, groups_o = _by_depth(theirs), _by_depth(ours)
    pairs: list[tuple[tuple[str, str], str]] = []
    if [len(g) for g in groups_t] == [len(g) for g in groups_o]:
        for number, (a, b) in enumerate(zip(groups_t, groups_o), 1):
            place = f"equal shape, {number} of {len(groups_t)} in order of construction"
            if len(a) == 1:
                if _plausible(values[a[0]], b[0]):
                    pairs.append(((a[0], b[0]), place))
                continue
            pairs += [(p, f"{place}, similar name") for p in _by_words(a, b)]
            done = {n for p, _ in pairs for n in p}
            rest_a, rest_b = [n for n in a if n not in done], [n for n in b if n not in done]
            pairs += [(p, f"{place}, values") for p in _by_values(rest_a, rest_b, values)]
        return pairs
    mutual = _by_words(theirs, ours, numbers=True)
    return [(p, "similar name") for p in mutual]


def _by_depth(names: list[str]) -> list[list[str]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(depth(name), []).append(name)
    return list(groups.values())


def _by_words(theirs: list[str], ours: list[str], *, numbers: bool = False) -> list[tuple[str, str]]:
    """Pairs that are each other's single best by name, clearly ahead of the second."""

    def score(a: str, b: str) -> float:
        if numbers:
            return similarity(a, b)
        return 0.6 * _word_score(a, b)

    def best(name: str, pool: list[str]) -> str | None:
        ranked = sorted(((score(name, n), n) for n in pool), reverse=True)
        if ranked[0][0] <= 0 or (len(ranked) > 1 and ranked[0][0] - ranked[1][0] < 0.04):
            return None
        if numbers and ranked[0][0] < 0.55:
            return None
        return ranked[0][1]

    chosen = {a: best(a, ours) for a in theirs}
    return [(a, b) for a, b in chosen.items() if b is not None and best(b, theirs) == a]


def _word_score(a: str, b: str) -> float:
    kin = {
        "gamma": "weight",
        "beta": "bias",
        "kernel": "weight",
        "query": "q",
        "key": "k",
        "value": "v",
        "scale": "weight",
    }
    words_a = {kin.get(t, t) for t in tokens(a)}
    words_b = {kin.get(t, t) for t in tokens(b)}
    return len(words_a & words_b) / max(len(words_a | words_b), 1)


def _by_values(theirs: list[str], ours: list[str], values: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Two vectors and two places, a gain and a shift: the values say which is which."""
    gains = [n for n in theirs if _kind(values[n]) == "gain"]
    shifts = [n for n in theirs if _kind(values[n]) == "shift"]
    wants_gain = [n for n in ours if n.endswith("weight")]
    wants_shift = [n for n in ours if n.endswith("bias")]
    if len(theirs) == len(ours) == 2 and len(gains) == len(shifts) == len(wants_gain) == len(wants_shift) == 1:
        return [(gains[0], wants_gain[0]), (shifts[0], wants_shift[0])]
    return []


def _kind(value: Tensor) -> str:
    if value.ndim != 1 or not value.is_floating_point() or value.numel() < 4:
        return ""
    mean = float(value.float().mean())
    return "gain" if abs(mean - 1) < 0.4 else "shift" if abs(mean) < 0.4 else ""


def _plausible(value: Tensor, ours: str) -> bool:
    """False when a vector that looks like a gain would land on a bias, or the reverse."""
    kind = _kind(value)
    return not (kind == "gain" and ours.endswith("bias")) and not (kind == "shift" and ours.endswith("running_var"))


def _joined(free: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[tuple[list[str], str, str]]:
    """(q, k, v entries, our joined parameter, reason), where three separate entries stand for one of ours."""
    triples: dict[str, dict[str, str]] = {}
    for name in free:
        found = QKV.search(name)
        if found:
            stem = name[: found.start(2)] + "{}" + name[found.end(2) :]
            triples.setdefault(stem, {})[found[2][0]] = name
    whole = [[t["q"], t["k"], t["v"]] for t in triples.values() if set(t) == {"q", "k", "v"}]
    out: list[tuple[list[str], str, str]] = []
    wanted = [n for n in own if "qkv" in n.lower() or "in_proj" in n]
    for kind in dict.fromkeys((tuple(own[n].shape)) for n in wanted):
        ours = [n for n in wanted if tuple(own[n].shape) == kind]
        theirs = [t for t in whole if (3 * free[t[0]].shape[0], *free[t[0]].shape[1:]) == kind]
        if len(ours) == len(theirs):
            out += [(t, o, "q, k and v joined, in order of construction") for t, o in zip(theirs, ours)]
    return out


def _turn_misfits(account: Account, values: dict[str, Tensor], state: Mapping[str, Tensor]) -> list[Rule]:
    """Entries whose name fits and whose axes are turned: proposed with the turn."""
    extra = []
    for wrong in list(account.wrong_shape):
        for turn in TURNS:
            if _turned(wrong.have, turn) == wrong.want and wrong.theirs in state:
                values[wrong.ours] = TRANSFORMS[turn](state[wrong.theirs])
                account.guessed.append((wrong.theirs, wrong.ours, f"equal name, axes turned; {turn}"))
                account.wrong_shape.remove(wrong)
                extra.append(Rule(pattern=f"^{re.escape(wrong.ours)}$", name=wrong.ours, transform=turn))
                break
    return extra


def _turned(shape: Shape, turn: str) -> Shape:
    if not turn:
        return shape
    order = TURNS[turn]
    return tuple(shape[i] for i in order) if len(shape) == len(order) else ()


def _settle(account: Account, theirs: str, ours: str) -> None:
    if theirs in account.unexpected:
        account.unexpected.remove(theirs)
        account.unplaced.pop(theirs, None)
    if ours in account.missing:
        account.missing.remove(ours)
        account.wanted.pop(ours, None)
