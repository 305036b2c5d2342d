"""Parameter names: wrappers taken off, many names written as few ("blocks.{0..11}.attn.{weight,bias}"), similarity."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# what training frameworks put before every name
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "state_dict.",
    "net.",
    "network.",
    "encoder.",
    "backbone.",
    "teacher.",
    "student.",
    "ema.",
)


def strip_wrappers(names: Iterable[str], known: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """({full name: bare name}, wrappers taken off, outermost first).

    A wrapper comes off when every name carries it; never when `known` (the names that are wanted) carry it too.
    """
    full = list(names)
    bare = list(full)
    wanted = list(known)
    removed: list[str] = []
    while bare:
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in bare)), None)
        if wrapper is None or (wanted and all(n.startswith(wrapper) for n in wanted)):
            break
        bare = [n.removeprefix(wrapper) for n in bare]
        removed.append(wrapper)
    return dict(zip(full, bare)), removed


def tokens(name: str) -> list[str]:
    """Words and numbers of a name, lower case: "layer1.0.bn2" -> ["layer", "1", "0", "bn", "2"]."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def depth(name: str) -> tuple[int, ...]:
    """The numbers in a name, in order."""
    return tuple(int(t) for t in tokens(name) if t.isdigit())


_KIN = {
    "gamma": "weight",
    "beta": "bias",
    "kernel": "weight",
    "ls": "scale",
    "conv": "conv",
    "dw": "dwconv",
    "fc": "fc",
}


def similarity(a: str, b: str) -> float:
    """0 .. 1: shared words (0.6), equal depth numbers in order (0.4)."""
    words_a = {_KIN.get(t, t) for t in tokens(a) if not t.isdigit()}
    words_b = {_KIN.get(t, t) for t in tokens(b) if not t.isdigit()}
    shared = len(words_a & words_b) / max(len(words_a | words_b), 1)
    da, db = depth(a), depth(b)
    if da == db:
        numbers = 1.0
    elif da and db:
        short, long = sorted((da, db), key=len)
        numbers = 0.5 if long[-len(short) :] == short or long[: len(short)] == short else 0.0
    else:
        numbers = 0.0
    return 0.6 * shared + 0.4 * numbers


# a dotted tree in which siblings that look alike are written once ---------------------------------------------------
Tree = dict[str, Any]


def grow(leaves: Mapping[str, Any]) -> Tree:
    """Nested dicts by the dots of the names; a leaf is kept under the key "" of its node."""
    root: Tree = {}
    for name, value in leaves.items():
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[""] = value
    return root


def ranges(names: Iterable[str]) -> list[str]:
    """Few patterns for many names, in order of first appearance: numbers as {0..11}, siblings as {weight,bias}."""
    out: list[str] = []

    def walk(node: Tree, path: str) -> None:
        grouped = siblings(node)
        leaves = [key for key, child in grouped if set(child) == {""}]
        if leaves:
            out.append(path + (leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"))
        for key, child in grouped:
            if set(child) == {""}:
                continue
            if "" in child:
                out.append(path + key)
            walk(child, path + key + ".")

    walk(grow(dict.fromkeys(names)), "")
    return out


def outline(leaves: Mapping[str, Any], show: Callable[[Any], str] = str, *, expand: bool = False) -> list[str]:
    """The tree as lines; alike siblings (same names and values below) are one line, unless `expand`."""
    lines: list[str] = []

    def walk(node: Tree, indent: str, path: str) -> None:
        grouped = [(k, c) for k, c in node.items() if k] if expand else siblings(node)
        for key, child in grouped:
            below = [k for k in child if k]
            label = path + key
            if len(below) == 1 and "" not in child and set(child[below[0]]) != {""}:
                walk(child, indent, label + ".")
                continue
            own = [(k, child[k][""]) for k in below if set(child[k]) == {""}]
            rest = {k: child[k] for k in below if set(child[k]) != {""}}
            text = "  ".join(([show(child[""])] if "" in child else []) + [f"{k} {show(v)}" for k, v in own])
            lines.append(f"{indent}{label}  {text}".rstrip())
            walk(rest, indent + "  ", "")

    walk(grow(leaves), "", "")
    return lines


def siblings(node: Tree) -> list[tuple[str, Tree]]:
    """Children, with runs of consecutive numbers whose subtrees are equal merged into one key {a..b}."""
    out: list[tuple[str, Tree]] = []
    run: list[int] = []
    kept: Tree = {}
    mark: Any = None

    def close() -> None:
        if run:
            out.append((str(run[0]) if len(run) == 1 else "{" + f"{run[0]}..{run[-1]}" + "}", kept))
            run.clear()

    for key, child in node.items():
        if not key:
            continue
        if key.isdigit():
            sign = _signature(child)
            if run and int(key) == run[-1] + 1 and sign == mark:
                run.append(int(key))
                continue
            close()
            run.append(int(key))
            kept, mark = child, sign
            continue
        close()
        out.append((key, child))
    close()
    return out


def _signature(node: Tree) -> Any:
    return tuple(
        (k, _signature(v) if isinstance(v, dict) and k else repr(v))
        for k, v in sorted(node.items(), key=lambda p: p[0])
    )


def listed(names: Sequence[str], limit: int = 12) -> str:
    """The names as few patterns on one line, at most `limit` of them."""
    few = ranges(names)
    return ", ".join(few[:limit]) + (f", ... ({len(few) - limit} more patterns)" if len(few) > limit else "")
