"""What the game found, as reports: of one picture, and of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lynceus.core import plots
from lynceus.core.report import Report
from lynceus.trust.guard import Material
from lynceus.trust.oracle import NOTHING, Oracle
from lynceus.trust.tree import Tree

SHOWN = 8  # pictures of a gallery


def feature_rows(
    report: Report, points: np.ndarray, own: list[int], features: list[np.ndarray], tree: Tree | None
) -> None:
    best = set(tree.oracle.best or ()) if tree is not None else set()
    children = tree.start.children or [] if tree is not None else []
    nodes = {c.feature: c for c in children}
    for k, (i, pixels) in enumerate(zip(own, features, strict=True)):
        row: dict[str, Any] = {
            "feature": int(i),
            "row": float(points[i, 0]),
            "column": float(points[i, 1]),
            "size": float(points[i, 2]),
            "response": float(points[i, 3]),
            "pixels": len(pixels),
        }
        if tree is not None:
            node = nodes.get(k)
            row["plays"] = node.visits if node else 0
            row["mean reward"] = node.total / node.visits if node and node.visits else 0.0
            row["value"] = node.value if node else 0.0
            row["painted"] = len(best.intersection(pixels.tolist()))
        report.rows.append(row)


def findings(report: Report, oracle: Oracle, tree: Tree | None, mode: str) -> None:
    found = oracle.best is not None
    state = oracle.best or NOTHING
    picture = oracle.picture(state)
    change = (picture - oracle.image).double()
    report.summary = {
        "success": float(found),
        "severity": oracle.severity,
        "queries": float(oracle.spent),
        "queries to the first example": float(oracle.curve[0][0]) if found else math.inf,
        "l0": float(change.ne(0).any(0).sum()) if found else math.inf,
        "l1": float(change.abs().sum()) if found else math.inf,
        "l2": float(change.square().sum().sqrt()) if found else math.inf,
        "class": float(oracle.original),
        "class found": float(oracle.answers[state].label),
        "images per batch": float(np.mean(oracle.batches)),
        "seconds": oracle.elapsed,
    }
    w = oracle.image.shape[2]
    report.arrays["image"] = picture.numpy()
    report.arrays["pixels"] = np.array([divmod(p, w) for p in sorted(state)], dtype=np.int64).reshape(-1, 2)
    report.arrays["curve"] = np.array(oracle.curve, dtype=np.float64).reshape(-1, 2)
    if tree is not None:
        report.summary |= {"plays": float(tree.plays), "won plays": float(tree.wins)}
        cut_off = tree.tighten and mode == "cooperative"  # then the tree knows nothing of what cannot beat the best
        report.summary["value"] = tree.reward(oracle.severity) if cut_off and found else tree.start.value
        report.summary["solved"] = float(tree.finished)
        if tree.finished and mode == "cooperative" and oracle.confidence == 0:
            what = "No smaller example exists" if found else "No example exists"
            report.notes.append(f"{what} among the sets of pixels of the game: every one that could be was asked.")
    names = oracle.subject.classes
    name = (lambda k: names[k]) if names and len(names) > oracle.original else str
    if found:
        report.answer = (
            f"{len(state)} painted pixels turn {name(oracle.original)} into {name(oracle.answers[state].label)} "
            f"({oracle.norm.upper()} severity {oracle.severity:.4g}, {oracle.spent:,} queries)."
        )
    else:
        report.answer = f"No example was found in {oracle.spent:,} queries; that proves nothing by itself."
    cut = oracle.late and not (tree is not None and tree.finished)
    report.summary["cut"] = float(cut)
    if cut:
        of = "" if oracle.queries is None else f" of {oracle.queries:,}"
        report.notes.append(f"The seconds ended the search after {oracle.spent:,}{of} queries.")


def figures(report: Report, oracle: Oracle, map_: np.ndarray) -> None:
    original = oracle.image
    heat = torch.from_numpy(map_ / map_.max()).float()[None]
    found = oracle.best is not None
    pictures = [original, oracle.picture(oracle.best or NOTHING), heat]
    words = ["original", "example" if found else "none found", "saliency"]
    report.figures["pictures.png"] = plots.image_grid([p.expand(3, -1, -1) for p in pictures], words, columns=3)
    if oracle.curve:
        queries, severity = zip(*[*oracle.curve, (oracle.spent, oracle.severity)], strict=True)
        report.figures["severity over queries.plotly"] = plots.lines(
            {oracle.norm.upper(): (queries, severity)}, x_title="queries", y_title="severity of the best example"
        )


def gathered(
    material: Material,
    wrong: Sequence[bool],
    given: Sequence[int],
    pieces: Mapping[int, Mapping[str, Any]],
    *,
    norm: str,
    queries: int | None,
) -> Report:
    """The report of many searches. wrong: pictures that the model answers wrongly as they are, which are not searched.
    given: its answers. pieces: picture -> summary and arrays of its search; those that are missing were not reached."""
    report = Report(name="game on features", notes=list(material.notes))
    for i, name in enumerate(material.ids):
        row: dict[str, Any] = {"image": name, "class": material.name(given[i])}
        if wrong[i]:
            row |= {"result": f"wrong already, it is {material.name(int(material.labels[i]))}"}
        elif (piece := pieces.get(i)) is None:
            row |= {"result": "not reached"}
        elif piece["success"]:
            row |= {
                "result": f"becomes {material.name(int(piece['class found']))}",
                "severity": piece["severity"],
                "pixels": int(piece["l0"]),
                "first at query": int(piece["queries to the first example"]),
                "queries": int(piece["queries"]),
            }
        else:
            row |= {"result": "none found", "queries": int(piece["queries"])}
        report.rows.append(row)
    found = [p for p in pieces.values() if p["success"]]
    severity = np.array([float(pieces[i]["severity"]) if i in pieces else math.nan for i in range(len(material))])
    report.arrays["severity"] = severity
    report.summary = {
        "images": float(len(material)),
        "wrong already": float(sum(wrong)),
        "searched": float(len(pieces)),
        "found": float(len(found)),
        "found (share)": len(found) / len(pieces) if pieces else math.nan,
        "severity (mean)": float(np.mean([p["severity"] for p in found])) if found else math.nan,
        "severity (median)": float(np.median([p["severity"] for p in found])) if found else math.nan,
        "pixels (mean)": float(np.mean([p["l0"] for p in found])) if found else math.nan,
        "first at query (median)": (
            float(np.median([p["queries to the first example"] for p in pieces.values()])) if found else math.nan
        ),
        "queries": float(sum(p["queries"] for p in pieces.values())),
        "proven smallest": float(sum(p.get("solved", 0.0) for p in found)),
    }
    if len(found) and pieces:
        report.answer = (
            f"{len(found)} of {len(pieces)} pictures change class, after {report.summary['pixels (mean)']:.3g} painted "
            f"pixels on average."
        )
    elif pieces:
        report.answer = f"No picture of {len(pieces)} changed class; that proves nothing by itself."
    elif all(wrong):
        report.answer = "The model answers every picture wrongly as it is; nothing was left to search."
    report.notes.append(
        "Besides the searches' queries, every picture was asked once for its class and a few for a probe of the model."
    )
    if cut := sum(bool(p["cut"]) for p in pieces.values()):
        report.notes.append(f"The seconds ended {cut} searches before their {queries or 'last'} queries.")
    if missing := len(material) - sum(wrong) - len(pieces):
        report.notes.append(f"The seconds ended before {missing} pictures were searched; run again with keep to go on.")
    _gallery(report, material, pieces, norm)
    return report


def _gallery(report: Report, material: Material, pieces: Mapping[int, Mapping[str, Any]], norm: str) -> None:
    shown = [i for i, p in pieces.items() if p["success"]][:SHOWN]
    pictures, words = [], []
    for i in shown:
        piece, image = pieces[i], material.images[i]
        heat = torch.from_numpy(np.asarray(piece["saliency"]) / np.max(piece["saliency"])).float()[None]
        pictures += [p.expand(3, -1, -1) for p in (image, torch.from_numpy(np.asarray(piece["image"])), heat)]
        words += [material.name(int(piece["class"])), material.name(int(piece["class found"])), "saliency"]
    if pictures:
        report.figures["examples.png"] = plots.image_grid(pictures, words, columns=6)
        report.arrays["examples"] = np.stack([np.asarray(pieces[i]["image"]) for i in shown])
        report.arrays["example of"] = np.array(shown)
    curves = [np.asarray(p["curve"]) for p in pieces.values() if p["success"]]
    if curves:
        first = np.sort([c[0, 0] for c in curves])
        share = np.arange(1, len(first) + 1) / len(pieces)
        report.figures["found over queries.plotly"] = plots.lines(
            {"pictures": (first, share)}, x_title="queries", y_title="share of pictures with an example"
        )
        at = np.unique(np.concatenate([c[:, 0] for c in curves]))
        at = at[at >= max(c[0, 0] for c in curves)]
        mean = [float(np.mean([c[np.searchsorted(c[:, 0], q, side="right") - 1, 1] for c in curves])) for q in at]
        report.figures["severity over queries.plotly"] = plots.lines(
            {norm.upper(): (at, mean)}, x_title="queries", y_title="mean severity, once all are found"
        )
