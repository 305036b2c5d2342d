"""A report as one HTML page with everything inside, and as a small fragment for notebooks."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lynceus.core.plots import plotly_script
from lynceus.core.rows import is_number, is_numeric, number, scalar, writers

if TYPE_CHECKING:
    from lynceus.core.report import Report

CODE = {"command": "Command", "twin": "The same in Python"}
WHEN = ("date", "device", "seed")  # of the environment, told under the title
SHOWN = 20  # rows in a notebook


def page(report: Report) -> str:
    """The whole report as a self-contained page: no request leaves it, whatever the report holds."""
    stamps = {k: v for k, v in report.environment.items() if k not in CODE and "\n" not in v}
    codes = {k: v for k, v in report.environment.items() if k in CODE or "\n" in v}
    parts = [_view(p) for p in report.parts]
    top = _view(report)
    text: str = _template().render(
        name=report.name,
        when=" · ".join(f"seed {stamps[k]}" if k == "seed" else stamps[k] for k in WHEN if k in stamps),
        top=top,
        parts=parts,
        stamps=stamps,
        codes=[{"title": CODE.get(k, k), "text": v} for k, v in codes.items()],
        plotly=_script_safe_js(plotly_script()) if any(v["drawings"] for v in (top, *parts)) else "",
    )
    return text


def _view(report: Report) -> dict[str, Any]:
    """What the page shows of one report: itself, or a part of it."""
    drawings, pictures = [], []
    for name, data in report.figures.items():
        if name.endswith(".plotly"):
            figure = json.loads(data)
            height = int(figure.get("layout", {}).get("height") or 400)
            drawings.append({"title": title(name), "json": _script_safe(json.dumps(figure)), "height": height})
        elif name.endswith(".png"):
            pictures.append({"title": title(name), "data": base64.b64encode(data).decode()})
    return {
        "name": report.name[:1].upper() + report.name[1:],
        "cards": [{"label": label(k), "value": number(v)} for k, v in report.summary.items()],
        "notes": report.notes,
        "answer": report.answer,
        "drawings": drawings,
        "pictures": pictures,
        "table": table(report.rows),
    }


def fragment(report: Report) -> str:
    """Name, summary and the first rows, for a notebook's output."""
    text: str = (
        _environment()
        .get_template("fragment")
        .render(
            name=report.name,
            cards=[{"label": label(k), "value": number(v)} for k, v in report.summary.items()],
            table=table(report.rows[:SHOWN]),
            more=max(0, len(report.rows) - SHOWN),
            notes=report.notes,
            answer=report.answer,
        )
    )
    return text


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns (label, numeric or not) and cells (text, and the number to sort by)."""
    heads, made = [], []
    for name, write in writers(rows).items():
        values = [row.get(name) for row in rows]
        heads.append({"label": label(name), "numeric": is_numeric(values)})
        made.append(
            [{"text": write(v), "key": repr(float(scalar(v))) if is_number(scalar(v)) else None} for v in values]
        )
    return {"columns": heads, "rows": [list(cells) for cells in zip(*made)]}


def label(name: str) -> str:
    """top1_accuracy -> top1 accuracy; words behind a comma are a name and stay: "accuracy, swin_nano"."""
    first, comma, rest = name.partition(",")
    return first.replace("_", " ") + comma + rest


def title(name: str) -> str:
    """accuracy_by_cost.plotly -> Accuracy by cost."""
    text = label(re.sub(r"\.(plotly|png)$", "", name)).strip()
    return text[:1].upper() + text[1:]


def _script_safe(text: str) -> str:
    """JSON that may stand inside <script>."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script_safe_js(text: str) -> str:
    return re.sub(r"</(script)", r"<\\/\1", text, flags=re.IGNORECASE).replace("<!--", "<\\!--")


@cache
def _environment() -> Any:
    from jinja2 import DictLoader, Environment, StrictUndefined

    here = files("lynceus.core")
    pages = {name: (here / f"{name}.html").read_text(encoding="utf-8") for name in ("report", "fragment")}
    return Environment(
        loader=DictLoader(pages), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _template() -> Any:
    return _environment().get_template("report")
