"""The table of contracts: what it measures is really compared, and what does not hold is said."""

import json

import pytest
import torch
from torch import nn

from lynceus.backbones import FAMILIES
from lynceus.core.errors import OptionError
from lynceus.reengineer import contracts


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).repeat(1, 4)


FREE = dict.fromkeys(contracts.AXES, 1)


def test_equal_functions_have_no_reason():
    gap, reason = contracts._gap(Mean(), Mean(), FREE)
    assert gap == 0
    assert reason == ""


def test_a_difference_is_measured_and_named():
    gap, reason = contracts._gap(lambda x: Mean()(x) * (1 + 1e-2), Mean(), FREE)
    assert gap > 1e-3
    assert "differ by" in reason


def test_a_size_that_fails_is_named():
    def run(x):
        if x.shape[-1] == 301:
            raise RuntimeError("no such size\nmore")
        return Mean()(x)

    gap, reason = contracts._gap(run, Mean(), FREE)
    assert gap == 0
    assert reason == "at 225x301: RuntimeError: no such size"


def test_fixed_axes_keep_the_size_of_the_example():
    seen = []
    contracts._gap(lambda x: seen.append(tuple(x.shape)) or Mean()(x), Mean(), {"batch": 1})
    assert {s[2:] for s in seen} == {contracts.SIZES[0][1:]}
    assert {s[0] for s in seen} == {1, 2, 3}


def test_lively_models_have_no_silent_scale():
    model = contracts.lively("convnext_nano")
    scales = [p for n, p in model.named_parameters() if "gamma" in n]
    assert scales
    assert all(float(p.abs().min()) == 0.5 for p in scales)


def test_an_unknown_family_names_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="swin"):
        contracts.main(["--out", str(tmp_path / "c.json"), "--family", "swim"])


def test_rows_measured_anew_replace_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(contracts, "measured", lambda name, backend: {"model": name, "failed": backend})
    out = tmp_path / "c.json"
    assert contracts.main(["--out", str(out), "--family", "vit", "swin", "--backend", "first"]) == 0
    assert contracts.main(["--out", str(out), "--family", "vit", "--backend", "second"]) == 0
    made = json.loads(out.read_text())
    assert {k: v["failed"] for k, v in made["families"].items()} == {"swin": "first", "vit": "second"}
    assert list(made["families"]) == sorted(made["families"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_contracts_of_a_family(family):
    row = contracts.measured(f"{family}_nano", backend="aot_eager")
    assert "failed" not in row
    for kind in ("export", "onnx", "compile"):
        part = row[kind]
        # a contract that does not hold has its reason
        assert part["reason"] or part["difference"] <= contracts.AGREES
    assert torch.tensor(row["parameters"]) <= 1_500_000
