"""Report: numbers as text, strict JSON, comparison, and a page that keeps everything inside."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core import plots
from lynceus.core.environment import checkout_commit, environment
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.report import Report
from lynceus.core.rows import compare, identifying, number, text_table, writer

PLAIN = {"environment": {}}


def report(**parts):
    return Report(**{"name": "probe", **PLAIN, **parts})


# numbers -----------------------------------------------------------------------------------------
def test_a_column_has_one_number_of_decimals():
    write = writer([0.97113, 0.5, 0.0021])
    assert [write(v) for v in (0.97113, 0.5, 0.0021)] == ["0.9711", "0.5000", "0.0021"]
    write = writer([1.2, 104.0])
    assert [write(v) for v in (1.2, 104.0)] == ["1.2", "104.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (28589128, "28,589,128"),
        (28589128.0, "28,589,128"),
        (0.98765, "0.9877"),
        (12.3456, "12.35"),
        (1.5e-9, "1.5e-09"),
        (0.0, "0"),
        (-0.25, "-0.2500"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (True, "yes"),
        (None, "–"),
        (np.float32(0.5), "0.5000"),
        ("text", "text"),
        ([1, 2], "1, 2"),
    ],
)
def test_one_number(value, text):
    assert number(value) == text


def test_text_table_fits_its_width_and_loses_nothing():
    rows = [{"model": f"m{i}", **{f"column_{k}": i * k / 7 for k in range(9)}} for i in range(3)]
    text = text_table(rows, width=50)
    assert max(map(len, text.splitlines())) <= 50
    for k in range(9):
        assert f"column_{k}" in text
    assert text.count("m2") >= 2, "the first column stands in every part"


def test_numbers_are_right_aligned():
    lines = text_table([{"n": 5}, {"n": 12345}], width=40).splitlines()
    assert lines[-1].endswith("12,345")
    assert lines[-2] == " " * 5 + "5"


def test_markup_in_text_is_text():
    assert "[bold]x[/bold]" in report(rows=[{"a": "[bold]x[/bold]"}]).table()


def test_table_tells_summary_and_notes():
    text = report(summary={"accuracy": 0.5}, notes=["one was skipped"], answer="Take it.").table()
    assert text.index("Take it.") < text.index("accuracy")
    assert "accuracy  0.5000" in text
    assert "Note: one was skipped" in text


# JSON --------------------------------------------------------------------------------------------
floats = st.floats(width=32)
cells = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | floats | st.text(max_size=8)
keys = st.text(max_size=5).filter(lambda k: k != "$number")


def same(a, b):
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(keys, cells, max_size=4), max_size=4),
    summary=st.dictionaries(keys, floats, max_size=4),
    figure=st.binary(max_size=20),
)
def test_json_comes_back_as_it_was(rows, summary, figure):
    before = report(rows=rows, summary=summary, figures={"a.png": figure})
    text = before.json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    after = Report.from_json(text)
    assert same(before.rows, after.rows)
    assert same(before.summary, after.summary)
    assert after.figures == before.figures
    assert after.json() == text


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "uint8", "complex64"])
def test_arrays_come_back_bit_by_bit(dtype):
    array = np.random.default_rng(0).integers(0, 2, (3, 0 if dtype == "bool" else 4)).astype(dtype)
    if dtype.startswith("float"):
        array[0, 0] = np.nan
    back = Report.from_json(report(arrays={"a": array}).json()).arrays["a"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_an_array_of_objects_is_never_unpickled():
    with pytest.raises(ValueError, match="Object arrays"):
        report(arrays={"a": np.array([object()])}).json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 3}', "<html>", '{"figures": {"a": "&"}, "arrays": {}}'])
def test_other_files_are_refused(text, tmp_path):
    with pytest.raises(AdviceError, match=r"report\.json"):
        Report.from_json(text)
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(AdviceError, match="no report"):
        Report.load(tmp_path)


def test_save_and_load(tmp_path):
    page = report(rows=[{"a": 1}]).save(tmp_path / "run")
    assert page.read_text().startswith("<!doctype html>")
    assert Report.load(tmp_path / "run").rows == [{"a": 1}]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    with pytest.raises(MissingError, match="no report at"):
        Report.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdviceError, match="cannot be written"):
        report().save(tmp_path / "file")


# comparison --------------------------------------------------------------------------------------
def test_against_matches_rows_by_name_not_by_order():
    before = report(
        rows=[{"model": "a", "acc": 0.5, "n": 10}, {"model": "b", "acc": 0.8, "n": 10}], summary={"best": 0.8}
    )
    after = report(
        rows=[{"model": "b", "acc": 0.6, "n": 10}, {"model": "a", "acc": 1.0, "n": 10}], summary={"best": 1.0}
    )
    rows = {(r["model"], r["number"]): r for r in after.against(before).rows}
    assert rows["a", "acc"] == {"model": "a", "number": "acc", "before": 0.5, "after": 1.0, "delta": 0.5, "ratio": 2.0}
    assert rows["b", "acc"]["delta"] == pytest.approx(-0.2)
    assert rows["(summary)", "best"]["ratio"] == pytest.approx(1.25)
    assert after.against(before).summary == {"best (change)": pytest.approx(0.2)}


def test_the_fewest_columns_that_tell_rows_apart():
    rows = [{"model": m, "data": d, "epoch": e, "acc": 0.1} for m in "ab" for d in "xy" for e in (1, 2)]
    assert identifying(rows[:1], rows[:1]) == ["model"]
    assert identifying(rows[::2], rows[::2]) == ["model", "data"]
    assert identifying(rows, rows) == ["model", "data", "epoch"]
    assert identifying(rows + rows, rows) == []


def test_what_has_no_partner_is_told():
    rows, notes = compare([{"model": "a", "x": 1}], [{"model": "b", "x": 1}])
    assert rows == []
    assert notes == ["Only before: a", "Only after: b"]
    rows, notes = compare([{"x": 1.5}, {"x": 1.5}], [{"x": 3.0}])
    assert rows == [{"row": 1, "number": "x", "before": 1.5, "after": 3.0, "delta": 1.5, "ratio": 2.0}]
    assert "position" in notes[0]
    assert "Only before: 2" in notes


def test_a_ratio_to_zero_is_left_out_and_wrong_columns_advise():
    assert compare([{"m": "a", "x": 0}], [{"m": "a", "x": 2}])[0][0]["ratio"] is None
    with pytest.raises(AdviceError, match="do not tell the rows apart"):
        compare([{"m": "a"}, {"m": "a"}], [], by=["m"])


def test_a_different_environment_is_told():
    before, after = report(environment={"torch": "2.0", "date": "1"}), report(environment={"torch": "3.0", "date": "2"})
    assert after.against(before).notes == ["Environment differs: torch 2.0 -> 3.0"]


# the page ----------------------------------------------------------------------------------------
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_user_text_is_escaped_everywhere():
    figure = plots.scatter([1, 2], [1, 2], labels=[NASTY, "b"], groups=[NASTY, "b"], x_title=NASTY)
    page = report(
        name=NASTY,
        rows=[{NASTY: NASTY}],
        summary={NASTY: 1},
        notes=[NASTY],
        environment={NASTY: NASTY, "command": NASTY},
        figures={f"{NASTY}.plotly": figure, f"{NASTY}.png": b""},
    ).html()
    page = page.replace(plots.plotly_script(), "")
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "alert(1)" in page


def test_the_page_asks_for_nothing_from_outside():
    page = report(rows=[{"a": 1}], figures={"a.plotly": plots.bars(["x"], [1])}).html()
    own = page.replace(plots.plotly_script(), "")
    assert len(own) < 40_000
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", own)
    assert "@import" not in own
    assert "default-src 'none'" in own
    assert own.count("http") == 1  # http-equiv


def test_plotly_is_inlined_once_and_only_when_needed():
    assert len(report(rows=[{"a": 1}]).html()) < 40_000
    two = report(figures={f"{i}.plotly": plots.bars(["x"], [1]) for i in range(2)}).html()
    assert 4_000_000 < len(two) < 6_000_000


def test_an_empty_report_has_a_page():
    page = report().html()
    assert "<h1>probe</h1>" in page
    assert "<table" not in page


def test_notebooks_get_a_small_table():
    small = report(rows=[{"a": i, "t": NASTY} for i in range(30)], summary={"best": 1})._repr_html_()
    assert "and 10 more rows" in small
    assert "<script" not in small
    assert len(small) < 10_000


# environment -------------------------------------------------------------------------------------
def test_environment_is_text():
    stamp = environment(seed=3, command="lynceus cost x")
    assert {"lynceus", "python", "torch", "numpy", "device", "threads", "date"} <= stamp.keys()
    assert stamp["seed"] == "3"
    assert all(isinstance(v, str) for v in stamp.values())


def test_commit_is_read_from_a_checkout(tmp_path):
    assert checkout_commit(tmp_path) is None
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert checkout_commit(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\n" + "b" * 40 + " refs/heads/main\n")
    assert checkout_commit(tmp_path) == "b" * 12
    (git / "refs/heads").mkdir(parents=True)
    (git / "refs/heads/main").write_text("a" * 40 + "\n")
    assert checkout_commit(tmp_path) == "a" * 12
    (git / "HEAD").write_text("c" * 40)
    assert checkout_commit(tmp_path) == "c" * 12


def compound():
    parts = [
        Report(name=f"part {i}", answer=f"answer {i}", rows=[{"a": i, "b": "x"}], summary={"n": float(i)}, notes=["n"])
        for i in (1, 2)
    ]
    parts[0].figures["curve.plotly"] = plots.lines({"l": ([0, 1], [1.0, 2.0])})
    return Report(name="whole", summary={"all": 1.0}, rows=[{"check": "one"}], parts=parts)


def test_a_report_of_reports_travels_prints_and_compares():
    whole = compound()
    again = Report.from_json(whole.json())
    assert [p.name for p in again.parts] == ["part 1", "part 2"]
    assert again.parts[0].figures == whole.parts[0].figures
    assert again.json() == whole.json()
    assert "answer 2" in whole.table(width=80)
    whole.parts[1].summary["n"] = 5.0
    change = whole.against(again)
    assert [p.summary for p in change.parts] == [{"n (change)": 0.0}, {"n (change)": 3.0}]
    assert "parts" not in Report(name="plain").to_dict()


def test_sections_of_a_page_have_ids_of_their_own():
    page = compound().html()
    ids = re.findall(r'\bid="([^"]+)"', page.split("<script>")[0])
    assert len(ids) == len(set(ids))
    assert {"rows", "rows-1", "rows-2", "part-1", "part-2"} <= set(ids)
    assert page.count('class="plot"') == 1
    assert "Plotly" in page
