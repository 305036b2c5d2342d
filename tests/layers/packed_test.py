"""Copies of weights in the order of oneDNN's kernels: never stale, never carried along."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynceus.layers import fused, packed

pytestmark = pytest.mark.skipif(not fused.AVAILABLE, reason="this build of torch has no oneDNN")


def _layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 512)


@pytest.mark.parametrize("rows", [64, 200, packed.FEW + 1])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_kept_copy_computes_the_layer(rows, activation):
    layer, x = _layer(), torch.randn(1, rows, 256)
    with torch.no_grad():
        for _ in range(2):
            got = fused.linear(layer, x, activation=activation)
        want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        want = F.gelu(want) if activation == "gelu" else want
    assert (layer in packed._COPIES) == (rows <= packed.FEW)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "one row": lambda layer: layer.weight[3].zero_(),
    "state": lambda layer: layer.load_state_dict(nn.Linear(256, 512).state_dict()),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(512, 256))),
    "new data": lambda layer: setattr(layer.weight, "data", torch.randn(512, 256)),
    "through data": lambda layer: layer.weight.data.normal_(),
    "zeros through data": lambda layer: layer.weight.data.zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_weight_that_was_written_to_is_seen(write):
    layer, x = _layer(), torch.randn(1, 100, 256)
    with torch.no_grad():
        before = fused.linear(layer, x)
        WRITES[write](layer)
        after = fused.linear(layer, x)
        torch.testing.assert_close(after, layer(x), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


def test_an_inference_tensor_is_not_kept():
    with torch.inference_mode():
        layer = _layer()
        x = torch.randn(1, 100, 256)
        torch.testing.assert_close(fused.linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)
    assert layer not in packed._COPIES


def test_a_copy_made_in_inference_mode_serves_without_it():
    layer, x = _layer(), torch.randn(1, 100, 256)
    with torch.inference_mode():
        first = fused.linear(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(fused.linear(layer, x), first.clone(), atol=0, rtol=0)


def test_copies_stay_behind_and_die_with_their_layer():
    layer, x = _layer(), torch.randn(1, 100, 256)
    with torch.no_grad():
        fused.linear(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other not in packed._COPIES
    assert layer in packed._COPIES
    before = len(packed._COPIES)
    del layer
    gc.collect()
    assert len(packed._COPIES) < before


def test_a_large_weight_is_left_alone():
    layer, x = nn.Linear(1024, 2500, bias=False), torch.randn(1, 8, 1024)
    with torch.no_grad():
        torch.testing.assert_close(fused.linear(layer, x), layer(x), atol=1e-4, rtol=1e-4)
    assert layer not in packed._COPIES
