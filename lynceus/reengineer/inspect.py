"""What is in a checkpoint: names, shapes, dtypes, wrappers, what else is stored, and which of our models it fits.

Nothing that could run code is unpickled. The table is one screen: alike blocks are one line; `expand` gives all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lynceus.backbones._checkpoint import Checkpoint, read_checkpoint
from lynceus.backbones._table import FAMILIES, family_module
from lynceus.backbones._weights import match_weights
from lynceus.core.errors import AdviceError
from lynceus.core.names import grow, siblings, strip_wrappers
from lynceus.core.report import Report

SCREEN = 40  # lines

# (family, source, names that must all occur, names that must not)
SIGNS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("swin-v2", "authors or timm", (r"\.logit_scale$", r"cpb_mlp"), ()),
    ("swin", "torchvision", (r"^features\.\d+\.\d+\.attn\.relative_position_bias_table$",), ()),
    ("swin", "timm", (r"relative_position_bias_table$", r"^head\.fc\."), ()),
    ("swin", "authors or timm", (r"^layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$",), ()),
    ("convnext", "authors", (r"\.dwconv\.weight$", r"\.pwconv1\.weight$"), ()),
    ("convnext", "timm", (r"\.conv_dw\.weight$", r"\.mlp\.fc1\.weight$"), ()),
    ("convnext", "torchvision", (r"\.layer_scale$", r"^features\.0\.0\.weight$"), ()),
    ("convnext", "lynceus", (r"\.dwconv\.weight$", r"\.mlp\.fc1\.weight$"), ()),
    ("vit", "torchvision", (r"^encoder\.layers\.encoder_layer_0\.",), ()),
    ("vit", "the JAX original", (r"Transformer/encoderblock_0/",), ()),
    ("vit", "Hugging Face", (r"embeddings\.cls_token$", r"encoder\.layer\.\d+\."), ()),
    ("vit", "timm or authors", (r"pos_embed$", r"blocks\.\d+\.attn\.qkv\.weight$"), (r"relative_position", r"dwconv")),
    ("resnet", "torchvision or timm", (r"^layer1\.0\.conv1\.weight$", r"^layer4\.0\.bn1\.weight$"), ()),
)


def inspect(source: str | Path | Mapping[str, Tensor], *, entry: str | None = None, expand: bool = False) -> Report:
    """Opens a checkpoint (or takes a state dict) and reports what it holds, loading nothing into any model.

    rows: name (ranges such as blocks.{0..11}.attn), shape, dtype, count. summary: tensors, parameters, bytes. notes:
    format, wrappers taken off, where the weights were found, what else is stored, guessed family and source, and the
    `create_model` call that takes it. entry: which weights of a file that holds several. expand: a row per tensor.
    """
    if isinstance(source, Mapping):
        checkpoint = Checkpoint(Path("state dict"), "in memory", 0, dict(source))
    else:
        checkpoint = read_checkpoint(source, entry=entry)
    bare, wrappers = strip_wrappers(checkpoint.state)
    state = {bare[n]: t for n, t in checkpoint.state.items()}
    report = Report(name=f"inspect {checkpoint.path.name}")
    report.rows = rows(state, expand=expand)
    shared = _shared(state)
    floats = [t for t in state.values() if t.is_floating_point()]
    report.summary = {
        "tensors": float(len(state)),
        "numbers": float(sum(t.numel() for t in state.values())),
        "bytes": float(checkpoint.bytes or sum(t.numel() * t.element_size() for t in state.values())),
    }
    dtypes = {str(t.dtype).removeprefix("torch.") for t in state.values()}
    report.notes.append(
        f"format: {checkpoint.format}; {len(floats)} floating tensors; dtypes {', '.join(sorted(dtypes))}"
    )
    if checkpoint.entry:
        report.notes.append(f"weights under: {' > '.join(checkpoint.entry)}")
    if wrappers:
        report.notes.append(f"wrappers taken off every name: {', '.join(wrappers)}")
    report.notes += [f"listed, not loaded: {name} ({what})" for name, what in list(checkpoint.others.items())[:12]]
    report.notes += [f"one tensor under two names: {a} = {b}" for a, b in shared[:6]]
    family, origin = guess(state)
    report.notes.append(
        f"family: {family}, names of {origin}" if family else "family: not one that is known by its names"
    )
    report.notes += _fit(state, family)
    return report


def guess(names: Mapping[str, Any]) -> tuple[str, str]:
    """(family, source) by names; ("", "") when nothing speaks for one."""
    text = list(names)
    for family, source, must, must_not in SIGNS:
        if all(any(re.search(p, n) for n in text) for p in must) and not any(
            re.search(p, n) for p in must_not for n in text
        ):
            return family, source
    return "", ""


def rows(state: Mapping[str, Tensor], *, expand: bool = False, screen: int = SCREEN) -> list[dict[str, Any]]:
    """The tree as table rows: alike siblings once; the deepest levels folded until it fits `screen` rows."""
    if expand:
        return [
            {"name": n, "shape": str(list(t.shape)), "dtype": str(t.dtype).removeprefix("torch."), "numbers": t.numel()}
            for n, t in state.items()
        ]
    tree = grow({n: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel()) for n, t in state.items()})
    for limit in range(8, 0, -1):
        out: list[dict[str, Any]] = []
        _walk(tree, "", limit, out)
        if len(out) <= screen:
            return out
    return out


def _walk(node: dict[str, Any], path: str, levels: int, out: list[dict[str, Any]]) -> None:
    for key, child in siblings(node):
        name = path + key
        inner = {k: c for k, c in child.items() if k and set(c) != {""}}
        own = {k: c[""] for k, c in child.items() if k and set(c) == {""}}
        if "" in child:
            out.append(_row(name, {"": child[""]}, _many(name)))
        if not inner and own:
            out.append(_row(name, own, _many(name)))
        elif inner and levels <= 1:
            leaves = _leaves(child)
            kinds = ",".join(inner) if len(",".join(inner)) < 50 else f"{len(inner)} modules"
            out.append({"name": f"{name}.{{{kinds}}}", "shape": f"{len(leaves)} tensors", "dtype": "",
                        "numbers": sum(v[2] for v in leaves) * _many(name)})  # fmt: skip
        elif inner:
            if own:
                out.append(_row(name, own, _many(name)))
            _walk(inner, f"{name}.", levels - 1, out)


def _row(name: str, own: dict[str, Any], times: int) -> dict[str, Any]:
    shown = ", ".join(f"{k} {list(v[0])}".strip() for k, v in own.items())
    return {
        "name": name,
        "shape": shown,
        "dtype": ", ".join(sorted({v[1] for v in own.values()})),
        "numbers": sum(v[2] for v in own.values()) * times,
    }


def _many(name: str) -> int:
    times = 1
    for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", name):
        times *= int(b) - int(a) + 1
    return times


def _leaves(node: dict[str, Any]) -> list[Any]:
    return [v for k, v in node.items() if not k] + [x for k, c in node.items() if k for x in _leaves(c)]


def _shared(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    out = []
    for name, tensor in state.items():
        mark = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() > 1 and mark in seen:
            out.append((name, seen[mark]))
        seen.setdefault(mark, name)
    return out


def _fit(state: Mapping[str, Tensor], family: str) -> list[str]:
    """The create_model call of the variant that takes every entry, if there is one; built without memory."""
    if family not in FAMILIES:
        return []
    module = family_module(family)
    classes = _classes(state)
    close: tuple[int, str] | None = None
    for name, config in module.VARIANTS.items():
        with torch.device("meta"):
            model = module.build(type(config)(**{**_fields(config), "num_classes": classes}))
        try:
            account = match_weights(state, model, resize=False).account
        except AdviceError:
            continue
        if account.complete:
            extra = "" if account.source == "ours" else f" (names of {account.source})"
            return [f"fits: lynceus.create_model({name!r}, num_classes={classes}, weights=FILE){extra}"]
        if close is None or account.faults < close[0]:
            close = (account.faults, f"nearest variant: {name} ({account.verdict})")
    return [close[1]] if close else []


def _fields(config: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def _classes(state: Mapping[str, Tensor]) -> int:
    heads = [n for n in state if re.search(r"(^|\.)(head|fc|classifier)(\.\w+)*\.weight$", n) and state[n].ndim == 2]
    heads = [n for n in heads if not re.search(r"blocks|layers?\d*\.\d|mlp|stages", n)]
    return int(state[heads[-1]].shape[0]) if heads else 0
