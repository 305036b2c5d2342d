"""The ranking code: the published rows, invariances, missing cells, intervals, correlations, a large real table."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError
from lynceus.gauntlet import tables

SETS = ("CUB", "iNat", "ObjectNet", "INSTRE", "GLD", "rOxford", "rParis", "Copydays")
MRR = {  # released retrieval table of hsouri/bob-retrieval
    "convnext_base_in22ft1k": (0.896, 0.413, 0.516, 0.943, 0.529, 0.839, 0.993, 0.916),
    "clip-vit_large_14": (0.846, 0.261, 0.467, 0.978, 0.582, 0.822, 0.969, 0.944),
    "dino vit_base": (0.723, 0.213, 0.292, 0.912, 0.433, 0.849, 0.986, 0.911),
    "resnet50": (0.604, 0.132, 0.278, 0.841, 0.372, 0.648, 0.974, 0.865),
    "mae vit_base": (0.143, 0.011, 0.035, 0.340, 0.072, 0.331, 0.808, 0.612),
    "vicreg-resnet50": (0.453, 0.106, 0.176, 0.858, 0.416, 0.802, 0.971, 0.893),
    "sscd-resnet50_disc": (0.349, 0.060, 0.106, 0.893, 0.418, 0.900, 0.990, 0.954),
}
TABLE = {name: dict(zip(SETS, row)) for name, row in MRR.items()}
WANT = {
    "convnext_base_in22ft1k": 0.9590,
    "clip-vit_large_14": 0.7838,
    "dino vit_base": 0.3948,
    "sscd-resnet50_disc": -0.0130,
    "vicreg-resnet50": -0.0625,
    "resnet50": -0.0635,
    "mae vit_base": -1.9986,
}


def test_the_published_rows():
    ranking = tables.rank(TABLE)
    assert ranking.subjects == tuple(WANT)
    for name, value in WANT.items():
        assert ranking.score(name) == pytest.approx(value, abs=1e-4)
    assert list(ranking.ranks.values()) == [1, 2, 3, 4, 5, 6, 7]


@settings(max_examples=25, deadline=None)
@given(
    scale=st.lists(st.floats(0.01, 100), min_size=8, max_size=8),
    move=st.lists(st.floats(-50, 50), min_size=8, max_size=8),
    order=st.permutations(range(8)),
    flip=st.sets(st.integers(0, 7)),
)
def test_affine_changes_order_and_flipped_errors_change_nothing(scale, move, order, flip):
    changed = {
        name: {SETS[j]: (-1 if j in flip else 1) * scale[j] * row[SETS[j]] + move[j] for j in order}
        for name, row in TABLE.items()
    }
    ranking = tables.rank(changed, lower_is_better=[SETS[j] for j in flip])
    for name in TABLE:
        assert ranking.score(name) == pytest.approx(tables.rank(TABLE).score(name), abs=1e-8)


def test_missing_cells_are_left_out_and_counted():
    table = {k: dict(v) for k, v in TABLE.items()}
    del table["resnet50"]["CUB"]
    table["mae vit_base"]["iNat"] = None
    table["dino vit_base"]["GLD"] = float("nan")
    ranking = tables.rank(table)
    counts = dict(zip(ranking.subjects, ranking.counts))
    assert counts["resnet50"] == counts["mae vit_base"] == counts["dino vit_base"] == 7
    assert counts["clip-vit_large_14"] == 8
    row = ranking.z[ranking.subjects.index("resnet50")]
    assert ranking.score("resnet50") == pytest.approx(np.nanmean(row))
    column = [v["CUB"] for k, v in table.items() if k != "resnet50"]
    z = (table["dino vit_base"]["CUB"] - np.mean(column)) / np.std(column)
    assert ranking.z[ranking.subjects.index("dino vit_base"), ranking.cells.index("CUB")] == pytest.approx(z)
    assert "resnet50" in " ".join(tables.pool_notes(ranking))


def test_cells_that_tell_nothing_are_dropped():
    table = {k: {**v, "same": 0.1 + 0.2, "alone": 1.0 if k == "resnet50" else None} for k, v in TABLE.items()}
    ranking = tables.rank(table)
    assert set(ranking.dropped) == {"same", "alone"}
    assert ranking.score("resnet50") == pytest.approx(WANT["resnet50"], abs=1e-4)


def test_groups_are_averaged_first():
    table = {"a": {"x1": 1, "x2": 1, "x3": 1, "y": 0}, "b": {"x1": 0, "x2": 0, "x3": 0, "y": 1}}
    groups = {"x1": "x", "x2": "x", "x3": "x", "y": "y"}
    assert tables.rank(table).score("a") == pytest.approx(0.5)
    assert tables.rank(table, groups=groups).score("a") == pytest.approx(0)


def test_intervals_are_honest_about_noise():
    rng = np.random.default_rng(0)
    seeds = [
        {
            s: {f"c{j}": m + 0.02 * rng.standard_normal() for j in range(4)}
            for s, m in (("bad", 0.0), ("a", 1.0), ("b", 1.0))
        }
        for _ in range(3)
    ]
    interval = tables.rank_intervals(seeds, draws=400)
    assert interval["bad"] == (3, 3)
    assert interval["a"] == (1, 2)
    assert interval["b"] == (1, 2)
    assert interval == tables.rank_intervals(seeds, draws=400)
    alone = tables.rank_intervals(TABLE, draws=300)
    assert alone["mae vit_base"] == (7, 7)
    assert alone["convnext_base_in22ft1k"][0] == 1
    mean = tables.mean_table(seeds)
    assert mean["a"]["c0"] == pytest.approx(np.mean([t["a"]["c0"] for t in seeds]))


def test_leaving_one_out():
    out = tables.leave_one_out(TABLE)
    assert out["mae vit_base"] == (7, 7)
    ranks = tables.rank(TABLE).ranks
    assert all(low <= ranks[s] <= high for s, (low, high) in out.items())
    gone = {k: v for k, v in TABLE.items() if k != "mae vit_base"}
    assert any(low != high for low, high in out.values()) == (
        any(tables.leave_one_out(TABLE)[s] != (r, r) for s, r in ranks.items())
    )
    assert set(tables.rank(gone).subjects) == set(gone)


def test_correlations_equal_scipys():
    from scipy.stats import spearmanr

    cells, got = tables.correlations(TABLE)
    values = np.array(list(MRR.values()))
    assert cells == list(SETS)
    assert np.allclose(got, spearmanr(values).statistic)


def test_report_and_markdown():
    report = tables.report(TABLE, draws=50)
    assert report.rows[0]["subject"] == "convnext_base_in22ft1k"
    assert "pool of 7" in report.notes[0]
    text = tables.markdown(report.rows)
    assert text.count("\n") == 9
    assert text.startswith("| rank | subject |")


def test_size_classes():
    out = tables.inside(TABLE, {s: ("vit" if "vit" in s else "conv") for s in TABLE})
    assert out["vit"].subjects[0] == "clip-vit_large_14"
    assert len(out["conv"].subjects) == 4


def test_mistakes_are_advised():
    with pytest.raises(AdviceError, match="no subject"):
        tables.rank({})
    with pytest.raises(AdviceError, match="CUB"):
        tables.rank(TABLE, lower_is_better=["CUP"])
    with pytest.raises(AdviceError, match="infinite"):
        tables.rank({"a": {"x": float("inf")}, "b": {"x": 1}})


def test_timms_results_tables():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("data_folder", Path(__file__).parents[1] / "data_folder.py")
    helper = module_from_spec(spec)
    spec.loader.exec_module(helper)
    folder = helper.need("timm-results")
    names = {"imagenet": "imagenet", "real": "imagenet-real", "v2": "imagenetv2-matched-frequency"}
    names |= {"sketch": "sketch", "a": "imagenet-a", "r": "imagenet-r"}
    table: dict[str, dict[str, float]] = {}
    for cell, name in names.items():
        with open(folder / f"results-{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                table.setdefault(row["model"], {})[cell] = float(row["top1"])
                table[row["model"]][f"{cell} error"] = float(row["top1_err"])
    assert len(table) >= 1200
    errors = [f"{cell} error" for cell in names]
    ranking = tables.rank(table, lower_is_better=errors, groups={c: c.split()[0] for c in [*names, *errors]})
    alone = tables.rank({s: {c: v for c, v in row.items() if c in names} for s, row in table.items()})
    assert ranking.subjects[:20] == alone.subjects[:20]
    assert np.allclose(
        [ranking.score(s) for s in list(table)[:200]], [alone.score(s) for s in list(table)[:200]], atol=2e-3
    )
    assert ranking.score("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k") > 1.5
    cells, spearman = tables.correlations({s: {c: row.get(c) for c in names} for s, row in table.items()})
    assert spearman[cells.index("imagenet"), cells.index("v2")] > 0.97
    assert spearman[cells.index("imagenet"), cells.index("a")] < spearman[cells.index("imagenet"), cells.index("v2")]
