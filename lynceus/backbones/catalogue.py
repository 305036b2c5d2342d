"""The catalogue of backbones: what there is, what it costs, where it comes from and where it was checked."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lynceus.backbones import create_model
from lynceus.backbones._base import Backbone
from lynceus.backbones._table import FAMILIES, family_module, variants
from lynceus.core.cost import cost
from lynceus.core.errors import unknown
from lynceus.core.progress import track
from lynceus.core.report import Report


@cache
def checked() -> dict[str, list[dict[str, Any]]]:
    """family -> the parity records of the authors' code that it agrees with, and the largest difference found."""
    return json.loads(Path(__file__).with_name("checked.json").read_text())


def header(family: str) -> dict[str, str]:
    """Title, paper, reference code and licence: the docstring that opens the family's file."""
    doc = ast.get_docstring(ast.parse(Path(family_module(family).__file__ or "").read_text())) or ""
    lines = doc.strip().splitlines()
    out = {"title": lines[0].strip() if lines else family}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon and name.strip().lower() in ("paper", "code", "reference", "licence"):
            out[name.strip().lower()] = value.strip()
    return out


def _skeleton(name: str) -> Backbone:
    """The model without memory for its weights: enough to count."""
    with torch.device("meta"):
        if name.startswith("timm:"):
            return create_model(name)
        module = family_module(variants()[name])
        model = module.build(module.VARIANTS[name]).eval()
        model.name = name
        return model


def _row(name: str, macs: bool) -> dict[str, Any]:
    model = _skeleton(name)
    h, w = model.input_size
    family = "timm" if name.startswith("timm:") else variants()[name]
    row: dict[str, Any] = {
        "name": name,
        "family": family,
        "parameters (M)": sum(p.numel() for p in model.parameters()) / 1e6,
        "size": f"{h}x{w}",
        "strides": " ".join(str(s.stride) for s in model.stages),
        "channels": " ".join(str(s.channels) for s in model.stages),
        "parity records": len(checked().get(family, [])),
    }
    if macs:
        row["MACs (G)"] = cost(model, torch.empty(1, model.config.in_chans, h, w, device="meta")).macs / 1e9
    return row


def catalogue(pattern: str = "*", *, macs: bool = False, sort: str = "name") -> Report:
    """One row per model whose name matches a shell pattern ("timm:" patterns look in timm).

    macs: count multiply-adds at the model's own size too. Raises AdviceError for a pattern that matches nothing."""
    if pattern.startswith("timm:"):
        from lynceus.backbones.from_timm import list_timm

        names = [f"timm:{n}" for n in list_timm(pattern.removeprefix("timm:"))]
    else:
        from lynceus.backbones import list_models

        names = list_models(pattern) or list_models(f"*{pattern}*")
    if not names:
        raise unknown("model matching", pattern, variants(), how="A pattern may hold * and ?, in quotes: 'swin_*'.")
    rows = [_row(name, macs) for name in track(names, "counting")]
    if sort not in rows[0]:
        raise unknown("column", sort, rows[0])
    rows.sort(key=lambda r: r[sort])
    return Report(name=f"models {pattern}", rows=rows, summary={"models": float(len(rows))})


def describe(name: str) -> Report:
    """The card of one model: where it comes from, its options, levels, cost, and the records that it agrees with."""
    table = variants()
    if not name.startswith("timm:") and name not in table:
        raise unknown("model", name, table)
    model = _skeleton(name)
    h, w = model.input_size
    count = cost(model, torch.empty(1, model.config.in_chans, h, w, device="meta"))
    rows: list[dict[str, Any]] = []
    if not name.startswith("timm:"):
        rows += [{"kind": "source", "name": k, "value": v} for k, v in header(table[name]).items()]
        for record in checked().get(table[name], []):
            rows.append(
                {
                    "kind": "parity",
                    "name": record["record"],
                    "value": f"{record['reference']}: {record['difference']:.1e} of std",
                }
            )
    rows += [
        {"kind": "level", "name": s.name, "value": f"stride {s.stride}, {s.channels} channels"} for s in model.stages
    ]
    if not name.startswith("timm:"):
        rows += [
            {"kind": "option", "name": f.name, "value": str(getattr(model.config, f.name))}
            for f in fields(model.config)
        ]
    summary = {"parameters": float(sum(p.numel() for p in model.parameters())), "MACs": float(count.macs)}
    notes = [f"MACs at {h}x{w}, one image." + (f" Not counted: {', '.join(count.skipped)}." if count.skipped else "")]
    notes.append(
        "No weights come with it: it starts from random ones, or from a file: create_model(name, weights=FILE)."
    )
    return Report(name=name, rows=rows, summary=summary, notes=notes)


def systems() -> list[dict[str, Any]]:
    """One row per family for the documentation: title, paper, variants, records."""
    names = variants()
    return [
        {
            "family": family,
            **header(family),
            "variants": [n for n, f in names.items() if f == family],
            "records": [r["record"] for r in checked().get(family, [])],
        }
        for family in FAMILIES
    ]
