"""From the cells of a gauntlet to its report: table, answer in words, figures, what the reader must know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lynceus.core.plots import heatmap, lines, scatter
from lynceus.core.report import Report
from lynceus.gauntlet import tables
from lynceus.gauntlet.course import STATIONS
from lynceus.gauntlet.entries import Entry

if TYPE_CHECKING:
    from lynceus.gauntlet.run import GauntletConfig

MAIN = {"scratch": "accuracy", "frozen": "logistic"}  # the metric that the answer compares
SELECTED = (  # of the crop-selection station; the rest is in the notes and in the cells
    "selected: realistic consistency",
    "selected: certified",
    "selected: accuracy",
    "cyclic selected: cyclic consistency",
)


def by_seed(cells: Sequence[dict[str, Any]], *, ranked: bool = True) -> dict[int, dict[str, dict[str, float]]]:
    """seed -> subject -> metric -> value; `ranked` keeps only what counts in the ranking."""
    out: dict[int, dict[str, dict[str, float]]] = {}
    for cell in cells:
        station = STATIONS[cell["station"]]
        if ranked and (not station.group or station.noisy):
            continue
        row = out.setdefault(cell["seed"], {}).setdefault(cell["subject"], {})
        row.update({k: v for k, v in cell["values"].items() if not (ranked and k in station.beside)})
    return out


def protocol(cells: Sequence[dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """metric -> group, and the metrics that are errors."""
    groups, lower = {}, []
    for cell in cells:
        station = STATIONS[cell["station"]]
        for metric in cell["values"]:
            if station.group and metric not in station.beside:
                groups[metric] = station.group
                if metric in station.lower and metric not in lower:
                    lower.append(metric)
    return groups, lower


def outcome(cells: Sequence[dict[str, Any]], entries: Sequence[Entry], config: GauntletConfig, *, data: str) -> Report:
    """The Report of `gauntlet`."""
    groups, lower = protocol(cells)
    seeds = by_seed(cells)
    every = by_seed(cells, ranked=False)
    mean = tables.mean_table(list(seeds.values())) if seeds else {}
    allmean = tables.mean_table(list(every.values()))
    report = Report(name="gauntlet")
    order = [e.name for e in entries]
    ranking: tables.Ranking | None = None
    intervals: dict[str, tuple[float, float]] = {}
    stable: dict[str, tuple[int, int]] = {}
    if len(mean) > 1 and groups:
        ranking = tables.rank(mean, lower_is_better=lower, groups=groups)
        intervals = tables.rank_intervals(list(seeds.values()), lower_is_better=lower, groups=groups)
        stable = tables.leave_one_out(mean, lower_is_better=lower, groups=groups)
        order = list(ranking.subjects) + [n for n in order if n not in ranking.subjects]
    main = MAIN[config.mode]
    if not any(main in row for row in allmean.values()):
        main = next(iter(groups), main)
    values = {n: [t[n][main] for t in every.values() if main in t.get(n, {})] for n in order}
    verdicts = verdict(order, values, allmean, main)
    for i, name in enumerate(order):
        row: dict[str, Any] = {"rank": i + 1, "subject": name}
        if ranking is not None and name in ranking.subjects:
            row["rank"] = ranking.ranks[name]
            row["mean z"] = ranking.score(name)
            row["rank 95%"] = "{:.0f} to {:.0f}".format(*intervals[name])
            row["leave one out"] = "{} to {}".format(*stable[name])
        found = values[name]
        if found:
            row[main] = float(np.mean(found))
            row["sd"] = float(np.std(found, ddof=1)) if len(found) > 1 else None
            row["seeds"] = ", ".join(f"{v:.4f}" for v in found)
        if config.seconds:
            taken = [c["settings"]["steps"] for c in cells if c["subject"] == name and "steps" in c["settings"]]
            row["steps"] = round(float(np.mean(taken))) if taken else None
        here = allmean.get(name, {})
        shown = [m for m in groups if m != main] + ["params", "MACs"]
        if config.mode == "scratch":
            shown = ["calibration error", "realistic consistency", "cyclic consistency", "params", "MACs"]
        row |= {m: here[m] for m in shown if m in here}
        row |= {m: here[m] for m in SELECTED if m in here}
        row |= {m: v for m, v in here.items() if m.startswith("ms, ")}
        row["cells"] = (
            int(ranking.counts[ranking.subjects.index(name)]) if ranking and name in ranking.subjects else len(here)
        )
        row["verdict"] = verdicts.get(name, "")
        report.rows.append(row)
    report.answer = answer(order, values, allmean, verdicts, main, config)
    report.notes = [f"Data: {data}. {budget(config)}"]
    if ranking is not None:
        report.notes += tables.pool_notes(ranking)
        report.summary = {f"mean z, {n}": float(ranking.score(n)) for n in ranking.subjects}
        report.arrays["z"] = ranking.z
        report.notes.append(f"Columns of the array z: {', '.join(ranking.cells)}; rows: {', '.join(ranking.subjects)}.")
    report.notes += crop_notes(order, allmean, config.radius)
    if any(STATIONS[c["station"]].noisy for c in cells):
        report.notes.append("Times (ms) depend on the machine and the moment; they do not count in the ranking.")
    report.summary |= {f"{main}, {n}": float(np.mean(v)) for n, v in values.items() if v}
    draw(report, cells, order, values, allmean, ranking, main)
    return report


def final(heat: Report, report: Report) -> Report:
    """The report of the finalists, with those who left after the first seed (`heat`, all subjects) below them."""
    known = {row["subject"] for row in report.rows}
    for row in heat.rows:
        if row["subject"] not in known:
            gone = {"mean z": None, "rank 95%": None, "leave one out": None, "rank": len(report.rows) + 1}
            report.rows.append({**row, **gone, "verdict": "left after the first seed"})
    report.summary = {**{k: v for k, v in heat.summary.items() if not k.startswith("mean z")}, **report.summary}
    report.figures |= {f"first seed, {name}": figure for name, figure in heat.figures.items() if name[:8] == "accuracy"}
    report.notes.insert(
        1, f"All {len(heat.rows)} subjects ran with the first seed, the {len(known)} best of it with the others too."
    )
    return report


def verdict(
    order: Sequence[str], values: dict[str, list[float]], mean: dict[str, dict[str, float]], main: str
) -> dict[str, str]:
    """One phrase for the subjects that stand out: best, cheapest within noise of the best, steadiest under shifts."""
    present = [n for n in order if values[n]]
    if not present:
        return {}
    best = max(present, key=lambda n: np.mean(values[n]))
    close = within_noise(present, values, best)
    out: dict[str, list[str]] = {}
    out.setdefault(best, []).append(f"best {main}")
    costs = {n: mean[n].get("MACs", 0.0) for n in close if n in mean and "MACs" in mean[n]}
    if costs:
        out.setdefault(min(costs, key=lambda n: costs[n]), []).append("cheapest within noise of the best")
    steady = {n: mean[n]["realistic consistency"] for n in present if "realistic consistency" in mean.get(n, {})}
    if steady:
        out.setdefault(max(steady, key=lambda n: steady[n]), []).append("steadiest when the picture moves")
    for n in present:
        if n not in close and n not in out:
            out[n] = [f"{100 * (np.mean(values[best]) - np.mean(values[n])):.1f} points behind"]
    return {n: ", ".join(v) for n, v in out.items()}


def within_noise(names: Sequence[str], values: dict[str, list[float]], best: str) -> list[str]:
    """Subjects whose mean is within two standard errors of the difference (pooled over seeds) of the best one's."""
    top = values[best]
    out = []
    for n in names:
        v = values[n]
        if len(v) > 1 and len(top) > 1:
            noise = 2 * math.sqrt(np.var(v, ddof=1) / len(v) + np.var(top, ddof=1) / len(top))
        else:
            noise = 0.0
        if n == best or np.mean(top) - np.mean(v) <= noise:
            out.append(n)
    return out


def answer(
    order: Sequence[str],
    values: dict[str, list[float]],
    mean: dict[str, dict[str, float]],
    verdicts: dict[str, str],
    main: str,
    config: GauntletConfig,
) -> str:
    """Which one to take, in words."""
    present = [n for n in order if values[n]]
    if not present:
        return "Nothing was measured that could be compared."
    best = max(present, key=lambda n: np.mean(values[n]))
    close = within_noise(present, values, best)
    costs = {n: mean[n]["MACs"] for n in close if "MACs" in mean.get(n, {})}
    take = min(costs, key=lambda n: costs[n]) if costs else best

    def described(n: str) -> str:
        text = f"{100 * np.mean(values[n]):.1f}%"
        if len(values[n]) > 1:
            text += f" ± {100 * np.std(values[n], ddof=1):.1f} over {len(values[n])} seeds"
        return text

    text = f"Take {take}: {main} {described(take)}"
    if take != best:
        text += f", within noise of the best ({best}, {described(best)})"
        if mean[best].get("MACs") and costs[take]:
            text += f" at {costs[take] / mean[best]['MACs']:.0%} of its multiply-adds"
    elif len(close) > 1:
        text += f"; within noise of it: {', '.join(n for n in close if n != best)}"
    steady = {n: mean[n]["realistic consistency"] for n in present if "realistic consistency" in mean.get(n, {})}
    if steady:
        first = max(steady, key=lambda n: steady[n])
        text += f". Most stable when the camera moves by {config.radius} px: {first} "
        text += f"({100 * steady[first]:.1f}% of answers kept"
        text += ")" if first == take else f"; {take} {100 * steady[take]:.1f}%)" if take in steady else ")"
    if len(config.seeds) < 2:
        text += ". One seed tells nothing about noise: differences may be chance"
    return text + "."


def budget(config: GauntletConfig) -> str:
    """The protocol in a sentence."""
    if config.mode == "frozen":
        return "Frozen features: weights as given, the same probes for all."
    rate = (
        f"lr {config.lr[0]:g}"
        if len(config.lr) == 1
        else f"the best of lr {', '.join(f'{v:g}' for v in config.lr)} on a tenth of the training images"
    )
    seeds = ", ".join(map(str, config.seeds))
    length = f"{config.seconds:g} processor seconds of steps" if config.seconds else f"{config.steps} steps"
    return f"Equal budget: {length} of {config.batch_size} images, AdamW, {rate}, seeds {seeds}."


def crop_notes(order: Sequence[str], mean: dict[str, dict[str, float]], radius: int) -> list[str]:
    """What crop selection promised and kept, one sentence per subject."""
    out = []
    for n in order:
        row = mean.get(n, {})
        if "selected: realistic consistency" not in row:
            continue
        share = {k: f"{100 * v:.1f}%" for k, v in row.items()}
        out.append(
            f"{n} with crop selection: {share['selected: realistic consistency']} of answers survive a camera move of "
            f"{radius} px (plain centre crop {share['plain: realistic consistency']}); "
            f"{share['selected: realistic adversarial']} all moves (plain {share['plain: realistic adversarial']}). "
            f"The same crop is chosen in {share['same crop']} of moves; scores that are uniform would promise "
            f"{share['promised, single moves']} of single moves, {share['promised, all shifts']} for all at once, and "
            f"{share.get('selected: certified', 'none')} of these images are certified. Rolled pictures: "
            f"{share['cyclic selected: cyclic consistency']} (plain {share['plain: cyclic consistency']}). Accuracy "
            f"{share['selected: accuracy']}, cyclic {share['cyclic selected: accuracy']}, plain "
            f"{share['plain: accuracy']}, random crops {share['random crop: accuracy']}."
        )
    return out


def draw(
    report: Report,
    cells: Sequence[dict[str, Any]],
    order: Sequence[str],
    values: dict[str, list[float]],
    mean: dict[str, dict[str, float]],
    ranking: tables.Ranking | None,
    main: str,
) -> None:
    """The figures: cost, z-scores, seeds, learning curves, correlations of cells."""
    priced = [n for n in order if values[n] and mean.get(n, {}).get("MACs")]
    if priced:
        report.figures[f"{main} and cost.plotly"] = scatter(
            [mean[n]["MACs"] / 1e6 for n in priced],
            [float(np.mean(values[n])) for n in priced],
            labels=priced,
            x_title="million multiply-adds",
            y_title=main,
            log_x=True,
            y_error=[float(np.std(values[n], ddof=1)) if len(values[n]) > 1 else 0.0 for n in priced],
        )
    steady = [n for n in order if values[n] and "realistic consistency" in mean.get(n, {})]
    if steady:
        report.figures[f"{main} and consistency.plotly"] = scatter(
            [mean[n]["realistic consistency"] for n in steady],
            [float(np.mean(values[n])) for n in steady],
            labels=steady,
            x_title="answers that survive one realistic pixel",
            y_title=main,
        )
    if ranking is not None:
        report.figures["z-scores.plotly"] = heatmap(
            ranking.z, x_names=ranking.cells, y_names=ranking.subjects, x_title="cell", y_title="subject"
        )
        names, spearman = tables.correlations({s: {c: mean[s].get(c) for c in ranking.cells} for s in ranking.subjects})
        report.arrays["spearman"] = spearman
        if len(ranking.subjects) > 3:
            report.figures["correlation of cells.plotly"] = heatmap(
                spearman, x_names=names, y_names=names, low=-1, high=1
            )
    dots = [(n, v) for n in order for v in values[n]]
    if len(dots) > len(order):
        report.figures["seeds.plotly"] = scatter(
            [order.index(n) + 1 for n, _ in dots],
            [v for _, v in dots],
            labels=[n for n, _ in dots],
            groups=[n for n, _ in dots],
            x_title="rank",
            y_title=main,
            show_labels=False,
        )
    curves = {f"{c['subject']}, seed {c['seed']}": c["curve"] for c in cells if "curve" in c}
    if curves:
        first = min(c["seed"] for c in cells)
        some = {k: v for k, v in curves.items() if k.endswith(f"seed {first}")} if len(curves) > 8 else curves
        report.figures["learning curves.plotly"] = lines(
            {k: (v[0], v[1]) for k, v in some.items()},
            x_title="step",
            y_title="training loss",
            log_y=True,
            markers=False,
        )
