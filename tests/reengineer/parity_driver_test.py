"""The driver behind `lynceus parity`: it tells agreement from small differences, and bad records from wrong models."""

import json
from pathlib import Path

import numpy as np
import pytest

from lynceus.core.errors import AdviceError
from lynceus.reengineer import parity
from lynceus.reengineer.filling import filled, fingerprint, gap, image

RECORDS = Path(__file__).resolve().parents[1] / "parity"
ONE = RECORDS / "resnet" / "resnet18_129x97_10classes.json"


def changed(tmp_path, change, name="r.json"):
    record = json.loads(ONE.read_text())
    change(record)
    path = tmp_path / name
    path.write_text(json.dumps(record))
    return path


def test_our_filling_is_the_rule_of_the_records():
    import importlib.util

    spec = importlib.util.spec_from_file_location("filling", RECORDS / "filling.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for name, shape in [
        ("a.weight", (3, 4)),
        ("pos_embed", (1, 5, 2)),
        ("n.weight", (7,)),
        ("n.bias", (7,)),
        ("s", ()),
        ("bn.running_var", (4,)),
    ]:
        assert np.array_equal(filled(name, shape), theirs.filled(name, shape))
    x = image((2, 3, 5), 4)
    assert np.array_equal(x, theirs.image((2, 3, 5), 4))
    assert fingerprint(x) == theirs.fingerprint(x)


def test_a_record_that_agrees_exits_with_0(capsys):
    report = parity.parity(ONE)
    assert parity.exit_code(report) == 0
    assert 0 < report.summary["largest difference / std"] < 1e-6  # measured, not assumed


@pytest.mark.parametrize("size", [3e-6, 1e-3])
def test_a_small_difference_exits_with_1(tmp_path, size):
    def change(record):
        out = record["outputs"]["stage3"]
        out["values"][7] += size * out["std"]

    report = parity.parity(changed(tmp_path, change))
    assert parity.exit_code(report) == 1
    assert [r["output"] for r in report.rows if r["verdict"] == "DIFFERS"] == ["stage3"]
    worst = next(r for r in report.rows if r["output"] == "stage3")["largest difference / std"]
    assert worst == pytest.approx(size, rel=1e-2)


def test_another_shape_count_or_output_exits_with_1(tmp_path):
    def change(record):
        record["outputs"]["stage1"]["shape"] = [2, 64, 33, 26]
        record["outputs"]["extra"] = record["outputs"]["stem"]
        record["parameters"] += 1

    report = parity.parity([ONE, changed(tmp_path, change)])
    assert parity.exit_code(report) == 1
    assert {r["output"] for r in report.rows if r["verdict"] == "DIFFERS"} == {"parameter count", "stage1", "extra"}
    assert report.summary["agree"] == 1


def test_wrapped_names_and_rebuilt_buffers_are_no_obstacle(tmp_path):
    def buffers(record):
        record["state"]["bn1.num_batches_tracked"] = []

    assert parity.exit_code(parity.parity(changed(tmp_path, buffers))) == 0

    def wrap(record):  # the fill uses the full name, so the numbers differ; that the model is rebuilt is what counts
        record["state"] = {f"module.{k}": v for k, v in record["state"].items()}

    report = parity.parity(changed(tmp_path, wrap))
    assert parity.exit_code(report) == 1
    assert all(r["verdict"] == "DIFFERS" for r in report.rows if r["output"] not in ("parameter count",))


def test_names_that_do_not_fit_are_told(tmp_path):
    def change(record):
        record["state"]["layer1.0.conv9.weight"] = record["state"].pop("layer1.0.conv1.weight")
        del record["state"]["fc.bias"]

    report = parity.parity(changed(tmp_path, change))
    assert parity.exit_code(report) == 2
    text = " ".join(report.notes)
    assert "layer1.0.conv1.weight" in text
    assert "missing: fc.bias [10]" in text


def test_bad_input_advises(tmp_path):
    (tmp_path / "broken.json").write_text('{"family": "resnet", "conf')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    cases = [
        (tmp_path / "absent.json", "no record at"),
        (tmp_path / "broken.json", "not readable JSON"),
        (tmp_path / "list.json", "no parity record"),
        (tmp_path / "binary.json", "not readable JSON"),
        (tmp_path, "is a folder"),
        (
            changed(tmp_path, lambda r: r.update(family="resnett"), "f.json"),
            f"Did you mean 'resnet'.*checked: {', '.join(parity.families())}[.]",
        ),
        (changed(tmp_path, lambda r: r.pop("state"), "s.json"), "without state"),
    ]
    for path, text in cases:
        with pytest.raises(AdviceError, match=rf"(?s){text}"):
            parity.parity([ONE, path])
    with pytest.raises(AdviceError, match="at least one record"):
        parity.parity([])


def test_an_unknown_option_of_the_authors_is_bad_input_not_a_crash(tmp_path):
    report = parity.parity(changed(tmp_path, lambda r: r["config"].update(factory="resnet19")))
    assert parity.exit_code(report) == 2


def test_rounding_of_the_record_is_not_a_difference():
    x = np.random.RandomState(0).standard_normal((4, 100)) * 1e-4 + 1000
    assert gap(fingerprint(x), fingerprint(x)) == 0
    exact = fingerprint(x)
    exact["values"] = [float(v) for v in x.reshape(-1)[np.linspace(0, 399, 48).round().astype(int)]]
    assert gap(exact, fingerprint(x)) < 1e-3  # the ninth digit is 0.01 std here
    broken = fingerprint(x)
    broken["values"][3] = float("nan")
    assert gap(broken, fingerprint(x)) == float("inf")
