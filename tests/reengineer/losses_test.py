"""Loss records: inputs by the records' rule, any size, gradients compared, and a wrong value is seen."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lynceus.core.errors import AdviceError
from lynceus.reengineer.filling import fingerprint
from lynceus.reengineer.keys.losses import check, made
from lynceus.reengineer.parity import check_record

RECORD = Path(__file__).parents[1] / "parity" / "losses" / "augmix_jsd_b5.json"


def record(b, k, scale):
    """A record of other sizes, computed with the divergence as torch's kl_div states it."""
    specs = {n: {"shape": [b, k], "seed": i + 5, "scale": scale} for i, n in enumerate(("clean", "aug1", "aug2"))}
    inputs = {n: made(s).requires_grad_() for n, s in specs.items()}
    p = [x.softmax(1) for x in inputs.values()]
    middle = (sum(p) / 3).clamp(1e-7, 1).log()
    loss = 12 * sum(F.kl_div(middle, q, reduction="batchmean") for q in p) / 3
    loss.backward()
    gradients = {n: fingerprint(x.grad.numpy()) for n, x in inputs.items()}
    return {
        "name": f"augmix_jsd_b{b}", "family": "losses", "options": {}, "inputs": specs,
        "outputs": {"loss": float(loss.detach())}, "gradients": gradients,
    }  # fmt: skip


@pytest.mark.parametrize(("b", "k", "scale"), [(1, 2, 1.0), (3, 10, 4.0), (16, 1000, 1.0)])
def test_other_sizes_agree(b, k, scale):
    rows = check_record(record(b, k, scale))
    assert {r.output for r in rows} == {"loss", *(f"gradient of {n}" for n in ("clean", "aug1", "aug2"))}
    assert all(r.agrees for r in rows), rows


def test_a_wrong_value_or_gradient_is_seen():
    good = json.loads(RECORD.read_text())
    bad = copy.deepcopy(good)
    bad["outputs"]["loss"] *= 1 + 1e-4
    assert not check(bad)[0].agrees
    bad = copy.deepcopy(good)
    bad["gradients"]["aug1"]["values"][3] += 1e-4
    assert [r.agrees for r in check(bad)] == [True, True, False, True]


def test_inputs_of_every_kind():
    spec = {"shape": [4, 6], "seed": 1}
    assert torch.allclose(made({**spec, "as": "normalized"}).norm(dim=-1), torch.ones(4).double())
    assert torch.allclose(made({**spec, "as": "softmax"}).sum(-1), torch.ones(4).double())
    assert made({**spec, "as": "labels"}).shape == (4,)
    assert torch.equal(made({**spec, "as": "onehot"}).argmax(-1), made({**spec, "as": "labels"}))
    assert made({**spec, "as": "mask", "threshold": 0.2}).dtype == torch.bool
    with pytest.raises(AdviceError, match="kind"):
        made({**spec, "as": "smoothed"})


def test_a_loss_that_is_not_here_is_told():
    with pytest.raises(AdviceError, match="augmix_jsd"):
        check({"name": "never_b3", "family": "losses", "inputs": {}, "outputs": {}})
