"""Every record beside this file, through the driver that `lynceus parity` uses."""

import json
from pathlib import Path

import pytest

from lynceus.reengineer import parity

HERE = Path(__file__).parent
SLOW = {
    "vit_resnas_small_280_10classes",
    "halonet50ts",
    "soft_tiny_224",
    "resnet50",
    "swin_small_patch4_window7_224",
    "swin_tiny_patch4_window7_224x448",
    "vit_small_patch16_224",
    "volo_d1_224",
    "volo_d2_224",
}
RECORDS = sorted(p for p in HERE.glob("*/*.json") if json.loads(p.read_text()).get("family") in parity.families())


def cases(slow):
    return [p for p in RECORDS if (p.stem in SLOW) == slow]


def check(path):
    report = parity.parity(path)
    wrong = [r for r in report.rows if r["verdict"] != "agrees"]
    assert not wrong, (wrong, report.notes)
    assert report.rows
    assert parity.exit_code(report) == 0


def test_the_records_are_here():
    assert {p.parent.name for p in RECORDS} >= {"convnext", "resnet", "swin", "vit"}


@pytest.mark.parametrize("path", cases(False), ids=lambda p: p.stem)
def test_agrees_with_the_authors(path):
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", cases(True), ids=lambda p: p.stem)
def test_agrees_with_the_authors_larger(path):
    check(path)
