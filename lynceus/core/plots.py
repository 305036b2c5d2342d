"""Figures of a report as bytes: plotly figures as JSON (names end in ".plotly"), pictures as PNG (".png").

No other file knows plotly. Colours of text, axes and background are left to the page, which is light or dark.
All names and labels may be any text: they are escaped here.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError

COLOURS = ("#3b76b5", "#d1603d", "#4b9a6a", "#8b6bb8", "#c2942e", "#5aa6b5", "#b5527d", "#7d8590")
BLUES = [[0.0, "#f7f9fc"], [0.5, "#9bbbde"], [1.0, "#2a5c96"]]  # the page has a dark one beside
Numbers = Sequence[float] | np.ndarray | Tensor


def scatter(
    x: Numbers,
    y: Numbers,
    *,
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    y_error: Numbers | None = None,
    show_labels: bool = True,
) -> bytes:
    """One point per (x, y); `labels` name the points, `groups` colour them, `y_error` is half the height of a bar."""
    xs, ys = _floats(x), _floats(y)
    _same_length(x=xs, y=ys, labels=labels, groups=groups, y_error=y_error)
    errors = _floats(y_error) if y_error is not None else None
    kinds = list(groups) if groups is not None else [""] * len(xs)
    places = _label_places(xs, log_x, beside=errors is not None)
    traces = []
    for colour, group in zip(_colours(), dict.fromkeys(kinds)):
        at = [i for i, g in enumerate(kinds) if g == group]
        names = [_text(labels[i]) for i in at] if labels is not None else None
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers+text" if names and show_labels else "markers",
            "x": [xs[i] for i in at],
            "y": [ys[i] for i in at],
            "name": _text(group),
            "showlegend": bool(group),
            "marker": {"size": 10, "color": colour, "line": {"width": 0}},
            "textposition": [places[i] for i in at],
            "cliponaxis": False,
            "hovertemplate": ("<b>%{text}</b><br>" if names else "") + f"{_axis(x_title, 'x')} %{{x:,.4~g}}<br>"
            f"{_axis(y_title, 'y')} %{{y:,.4~g}}<extra>{_text(group)}</extra>",
        }
        if names:
            trace["text"] = names
        if errors is not None:
            trace["error_y"] = {"array": [errors[i] for i in at], "thickness": 1.2, "width": 4}
        traces.append(trace)
    return _figure(traces, xaxis=_ax(x_title, log_x), yaxis=_ax(y_title, log_y))


def lines(
    series: Mapping[str, tuple[Numbers, Numbers]],
    *,
    bands: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool | None = None,
) -> bytes:
    """One line per name -> (x, y); `bands`: name -> (low, high) is shaded. Few points get markers."""
    traces: list[dict[str, Any]] = []
    for colour, (name, (x, y)) in zip(_colours(), series.items()):
        xs, ys = _floats(x), _floats(y)
        _same_length(x=xs, y=ys)
        if bands and name in bands:
            low, high = (_floats(b) for b in bands[name])
            _same_length(x=xs, low=low, high=high)
            traces.append(
                {
                    "type": "scatter",
                    "x": xs + xs[::-1],
                    "y": high + low[::-1],
                    "fill": "toself",
                    "fillcolor": _faint(colour),
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                    "legendgroup": name,
                }
            )
        dots = markers if markers is not None else len(xs) <= 24
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if dots else "lines",
                "x": xs,
                "y": ys,
                "name": _text(name),
                "legendgroup": name,
                "showlegend": len(series) > 1,
                "line": {"width": 2, "color": colour},
                "marker": {"size": 6},
                "hovertemplate": f"{_axis(x_title, 'x')} %{{x:,.6~g}}<br>{_axis(y_title, 'y')} %{{y:,.4~g}}"
                f"<extra>{_text(name)}</extra>",
            }
        )
    return _figure(traces, xaxis=_ax(x_title, log_x), yaxis=_ax(y_title, log_y), hovermode="closest")


def bars(
    names: Sequence[str],
    values: Numbers | Mapping[str, Numbers],
    *,
    errors: Numbers | Mapping[str, Numbers] | None = None,
    title: str = "",
    horizontal: bool = True,
    log: bool = False,
    stacked: bool = False,
) -> bytes:
    """One bar per name, or one per name and group when `values` maps group -> values. `title` names the numbers.

    stacked: the groups of a name stand on each other in one bar, in their order."""
    groups: Mapping[str, Numbers] = values if isinstance(values, Mapping) else {"": values}
    spread: Mapping[str, Numbers] = (
        errors if isinstance(errors, Mapping) else ({"": errors} if errors is not None else {})
    )
    long, short = ("x", "y") if horizontal else ("y", "x")
    traces = []
    for colour, (group, numbers) in zip(_colours(), groups.items()):
        heights = _floats(numbers)
        _same_length(names=names, values=heights)
        trace: dict[str, Any] = {
            "type": "bar",
            "orientation": "h" if horizontal else "v",
            long: heights,
            short: [_text(n) for n in names],
            "name": _text(group),
            "showlegend": bool(group),
            "marker": {"color": colour},
            "hovertemplate": f"<b>%{{{short}}}</b><br>{_axis(title, 'value')} %{{{long}:,.4~g}}"
            f"<extra>{_text(group)}</extra>",
        }
        if group in spread:
            trace[f"error_{long}"] = {"array": _floats(spread[group]), "thickness": 1.2, "width": 3}
        traces.append(trace)
    category: dict[str, Any] = {"type": "category", "automargin": True, "showgrid": False, "ticksuffix": "  "}
    if horizontal:
        category["autorange"] = "reversed"
    layout = {f"{long}axis": _ax(title, log), f"{short}axis": category, "bargap": 0.35}
    layout["barmode"] = "stack" if stacked else "group"
    if horizontal:
        layout["height"] = max(220, 90 + 26 * len(names) * (1 if stacked else len(groups)))
    return _figure(traces, **layout)


def heatmap(
    values: Any,
    *,
    x_names: Sequence[str] | None = None,
    y_names: Sequence[str] | None = None,
    x_title: str = "",
    y_title: str = "",
    low: float | None = None,
    high: float | None = None,
    text: bool | None = None,
    digits: int = 2,
) -> bytes:
    """A matrix (rows from top to bottom) as colours; `text` writes the numbers too (default: when it is small)."""
    z = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    if z.ndim != 2:
        raise AdviceError(f"A heatmap takes a matrix, not an array of shape {z.shape}.")
    rows, cols = z.shape
    _same_length(y_names=y_names, rows=range(rows))
    _same_length(x_names=x_names, columns=range(cols))
    whole = bool(np.all(np.isfinite(z))) and bool(np.all(z == np.round(z)))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": _nested(z),
        "x": _ticks(x_names, cols),
        "y": _ticks(y_names, rows),
        "colorscale": BLUES,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": f"{_axis(y_title, 'row')} <b>%{{y}}</b><br>{_axis(x_title, 'column')} <b>%{{x}}</b><br>"
        "%{z:,.4~g}<extra></extra>",
    }
    if low is not None:
        trace["zmin"] = low
    if high is not None:
        trace["zmax"] = high
    if text if text is not None else z.size <= 225:
        trace["texttemplate"] = "%{z:,d}" if whole else f"%{{z:.{digits}f}}"
    names = {"type": "category", "automargin": True, "showgrid": False, "ticks": ""}
    across = {**names, "side": "bottom", "title": {"text": _text(x_title)}}
    down = {**names, "autorange": "reversed", "title": {"text": _text(y_title)}}
    return _figure([trace], xaxis=across, yaxis=down, height=max(260, min(900, 130 + 34 * rows)))


def confusion(matrix: Any, classes: Sequence[str], *, normalise: bool = False) -> bytes:
    """Counts (true class down, predicted class across); `normalise` divides each row by its sum."""
    z = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, dtype=float)
    if normalise:
        z = z / np.maximum(z.sum(1, keepdims=True), 1)
    return heatmap(z, x_names=classes, y_names=classes, x_title="predicted", y_title="true", low=0.0)


def image_grid(
    images: Sequence[Tensor] | Tensor,
    captions: Sequence[str] | None = None,
    *,
    columns: int = 8,
    side: int = 112,
) -> bytes:
    """Pictures (3, h, w) or (1, h, w), uint8 or float in [0, 1], in a grid of cells `side` pixels wide, as PNG.

    Small pictures are enlarged without smoothing. `captions` stand below, cut to the cell."""
    from PIL import Image, ImageDraw, ImageFont

    if len(images) == 0:
        raise AdviceError("A grid needs at least one picture; the list was empty.")
    _same_length(images=images, captions=captions)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    gap, foot = 6, 18 if captions is not None else 0
    sheet = Image.new("RGBA", (columns * (side + gap) - gap, rows * (side + foot + gap) - gap), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, image in enumerate(images):
        x, y = (i % columns) * (side + gap), (i // columns) * (side + foot + gap)
        picture = to_picture(image)
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
        if captions is not None:
            text = captions[i].replace("→", ">")  # the font has no arrow
            while text and draw.textlength(text, font=font) > side:
                text = text[:-2] + "…" if len(text) > 2 else ""
            draw.text((x + side / 2, y + side + 3), text, font=font, fill=(128, 134, 142, 255), anchor="ma")
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def to_picture(image: Tensor) -> Any:
    """A tensor (3 or 1, h, w), uint8 or float in [0, 1], as a PIL image in RGB."""
    from PIL import Image

    x = image.detach().cpu()
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise AdviceError(f"A picture is (3, h, w) or (1, h, w), not {tuple(image.shape)}.")
    if x.dtype != torch.uint8:
        x = (x.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def plotly_script() -> str:
    """The text of plotly.js, as the installed package carries it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _figure(traces: list[dict[str, Any]], **layout: Any) -> bytes:
    figure = {"data": traces, "layout": {"margin": {"l": 56, "r": 16, "t": 12, "b": 48}, "height": 400, **layout}}
    return json.dumps(figure, allow_nan=False, separators=(",", ":")).encode()


def _ax(title: str, log: bool) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": _text(title)}, "automargin": True, "zeroline": False}
    if log:
        axis |= {"type": "log", "dtick": "D2", "exponentformat": "SI"}
    return axis


def _text(value: Any) -> str:
    return html.escape(str(value), quote=False)


def _axis(title: str, other: str) -> str:
    # braces would be read as part of plotly's template
    return _text(title or other).replace("%{", "% {")


def _floats(values: Numbers) -> list[Any]:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    return [v if math.isfinite(v) else None for v in array.ravel().tolist()]


def _nested(z: np.ndarray) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in z.tolist()]


def _ticks(names: Sequence[str] | None, count: int) -> list[str]:
    return [_text(n) for n in names] if names is not None else [str(i) for i in range(count)]


def _colours() -> Any:
    while True:
        yield from COLOURS


def _label_places(xs: Sequence[float | None], log: bool, *, beside: bool) -> list[str]:
    """Labels stand above their points, or beside error bars, and never run over the right edge."""
    at = [math.log10(x) if log and x and x > 0 else x for x in xs]
    known = [a for a in at if a is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    far = [a is not None and high > low and (a - low) / (high - low) > 0.8 for a in at]
    row = "middle" if beside else "top"
    return [f"{row} {'left' if f else 'right' if beside else 'center'}" for f in far]


def _faint(colour: str) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.15)"


def _same_length(**parts: Any) -> None:
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise AdviceError(
            "A figure's parts must be equally long; here are " + ", ".join(f"{n} {k}" for k, n in lengths.items())
        )
