"""Block-sparse layers: packed equals masked, whatever the shapes, blocks, order and path."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.mlp import Mlp
from lynceus.rewrite.block_prune import BlockSparseConv, BlockSparseLinear, BlockSparseMlp, kernel
from lynceus.rewrite.block_prune.mlp import hidden_order, pair_up
from lynceus.rewrite.block_prune.runs import program, runs, tour
from lynceus.rewrite.block_prune.sparse import matrix_of


def random_mask(rows, columns, share, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=draw) < share


def masked(weight, kept, block):
    """The dense weight with zeros where blocks are gone, made without the code under test."""
    wide = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight * wide[: weight.shape[0], : weight.shape[1]]


def sparse_pair(out, inn, block, share=0.5, seed=0, bias=True):
    torch.manual_seed(seed)
    dense = nn.Linear(inn, out, bias=bias)
    kept = random_mask(-(-out // block[0]), -(-inn // block[1]), share, seed)
    sparse = BlockSparseLinear.of(dense, block, kept)
    with torch.no_grad():
        dense.weight.copy_(masked(dense.weight, kept, block))
    return dense, sparse


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 90),
    inn=st.integers(1, 90),
    block=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    share=st.floats(0, 1),
    lead=st.lists(st.integers(1, 5), max_size=3),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
)
def test_packed_equals_masked(out, inn, block, share, lead, seed, bias):
    dense, sparse = sparse_pair(out, inn, block, share, seed, bias)
    x = torch.randn(*lead, inn)
    want = dense(x)
    assert torch.allclose(sparse(x), want, atol=1e-5)  # with gradients
    order = np.random.default_rng(seed).permutation(sparse.grid[0]).tolist()
    with torch.no_grad():
        assert torch.allclose(sparse(x), want, atol=1e-5)
        for row_order in (None, order):  # the steps themselves, also where the layer would think them too slow
            steps = program(sparse.weight, sparse.bias, sparse.kept, block, row_order=row_order)
            assert torch.allclose(steps(x.reshape(-1, inn)).view(want.shape), want, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("block", [(64, 64), (32, 64), (64, 32), (32, 32)], ids=str)
def test_wide_layers_run_in_steps_and_are_exact(block, share):
    for out, inn in ((768, 192), (192, 768), (2304, 96)):
        dense, sparse = sparse_pair(out, inn, block, share)
        x = torch.randn(2, 700, inn)
        with torch.no_grad():
            assert sparse.program()[0].worth(1400, out * inn)
            assert (sparse(x) - dense(x)).abs().max() < 1e-4


@pytest.mark.parametrize("out", [384, 376])  # whole blocks, and one that is cut off
def test_few_tokens_take_reordered_outputs_and_are_exact(out):
    dense, sparse = sparse_pair(out, 192, (32, 32))
    few, many = sparse.program(197)[0], sparse.program(1400)[0]
    assert many.back is None
    assert (few.back is not None) == (out == 384)
    assert few.back is None or len(few.steps) < len(many.steps)
    x = torch.randn(1400, 192)
    with torch.no_grad():
        want = dense(x)
        for count in (1, 197, 1400, 197):
            assert torch.allclose(sparse(x[:count]), want[:count], atol=1e-5)
            for steps in (few, many):
                assert torch.allclose(steps(x[:count]), want[:count], atol=1e-5)


def test_gradients_equal_those_of_the_masked_layer():
    dense, sparse = sparse_pair(48, 40, (16, 16))
    x = torch.randn(5, 40)
    dense(x).square().sum().backward()
    sparse(x).square().sum().backward()
    kept = torch.from_numpy(sparse.kept)
    blocks = F.pad(dense.weight.grad, (0, 8)).unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2)
    assert torch.allclose(sparse.blocks.grad, blocks[kept], atol=1e-5)
    assert torch.allclose(sparse.bias.grad, dense.bias.grad, atol=1e-5)


def test_new_weights_are_seen():
    _, sparse = sparse_pair(256, 256, (32, 32))
    x = torch.randn(600, 256)
    with torch.no_grad():
        before = sparse(x)
        sparse.blocks.mul_(2)
        twice = sparse(x)
        assert torch.allclose(twice - sparse.bias, 2 * (before - sparse.bias), atol=1e-4)
        sparse.blocks.data.zero_()
        sparse.eval()
        assert torch.allclose(sparse(x), sparse.bias.expand(600, -1), atol=1e-6)


def test_copies_move_and_count_for_themselves():
    _, sparse = sparse_pair(256, 256, (32, 32))
    x = torch.randn(600, 256)
    with torch.no_grad():
        want = sparse(x)
        other = copy.deepcopy(sparse)
        other.blocks.zero_()
        assert torch.equal(sparse(x), want)
        assert torch.allclose(sparse.double()(x.double()).float(), want, atol=1e-5)
    counted = cost(nn.Sequential(sparse.float()), x)
    assert counted.macs == 600 * sparse.weights


def test_a_layer_without_blocks_and_one_with_all():
    x = torch.randn(3, 64)
    for share in (0.0, 1.1):
        dense, sparse = sparse_pair(64, 64, (16, 16), share)
        with torch.no_grad():
            assert torch.allclose(sparse(x), dense(x), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    dim=st.integers(8, 80),
    hidden=st.integers(8, 120),
    blocks=st.sampled_from([((16, 16), (16, 16)), ((8, 16), (8, 16)), ((16, 8), (16, 8)), ((12, 20), (12, 20))]),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 100),
)
def test_the_perceptron_equals_the_masked_one(dim, hidden, blocks, share, seed):
    torch.manual_seed(seed)
    plain = Mlp(dim, hidden).eval()
    block = blocks[0]
    made = nn.Sequential(copy.deepcopy(plain))
    for name in ("fc1", "fc2"):
        layer = getattr(plain, name)
        kept = random_mask(-(-layer.out_features // block[0]), -(-layer.in_features // block[1]), share, seed)
        setattr(made[0], name, BlockSparseLinear.of(layer, block, kept))
        with torch.no_grad():
            layer.weight.copy_(masked(layer.weight, kept, block))
    pair_up(made)
    assert isinstance(made[0], BlockSparseMlp)
    x, more = torch.randn(2, 7, dim), torch.randn(2, 7, dim)
    want = plain(x, residual=more)
    assert torch.allclose(made[0](x, residual=more), want, atol=1e-5)
    with torch.no_grad():
        first, second = made[0].programs()
        middle = F.gelu(first(x.reshape(-1, dim)))
        assert torch.allclose(second(middle).view(2, 7, dim) + more, want, atol=1e-5)


def test_the_fused_perceptron_is_taken_and_exact():
    torch.manual_seed(0)
    plain = Mlp(192, 768).eval()
    made = nn.Sequential(copy.deepcopy(plain))
    for name in ("fc1", "fc2"):
        layer = getattr(plain, name)
        kept = random_mask(layer.out_features // 32, layer.in_features // 32, 0.3, 1)
        setattr(made[0], name, BlockSparseLinear.of(layer, (32, 32), kept))
        with torch.no_grad():
            layer.weight.copy_(masked(layer.weight, kept, (32, 32)))
    pair_up(made)
    x = torch.randn(3, 400, 192)
    with torch.no_grad():
        assert (made(x) - plain(x)).abs().max() < 1e-4
        assert made[0]._packed.value is not None


def test_patches_are_a_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 48, 4, 4)
    kept = random_mask(3, 3, 0.6)
    sparse = BlockSparseConv.of(conv, (16, 16), kept)
    with torch.no_grad():
        conv.weight.copy_(masked(conv.weight.flatten(1), kept, (16, 16)).view_as(conv.weight))
        x = torch.randn(2, 3, 18, 21)
        assert torch.allclose(sparse(x), conv(x), atol=1e-5)
    assert matrix_of(nn.Conv2d(3, 8, 3)) is None
    assert matrix_of(nn.Conv2d(8, 8, 2, 2, groups=2)) is None


def test_neighbours_and_stretches():
    rows = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 1]], dtype=bool)
    order = tour(rows)
    assert sorted(order) == [0, 1, 2, 3]
    assert sum(len(runs(rows[order][:, j])) for j in range(3)) == 3
    assert runs([True, False, True, True]) == [(0, 1), (2, 4)]
    first, second = hidden_order(np.ones((5, 2), bool), np.ones((2, 3), bool), 16, 32, 70)
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert sorted(second) == [0, 1, 2]


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(AdviceError, match="has 2 x 2 blocks of 16 x 16, not 3 x 2"):
        BlockSparseLinear(32, 32, (16, 16), torch.ones(3, 2, dtype=torch.bool))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [(64, 64), (32, 64), (16, 16)], ids=str)
def test_the_kernel_equals_masked_dense_on_a_gpu(block, dtype):
    dense, sparse = sparse_pair(400, 328, block)
    dense, sparse, x = dense.cuda().to(dtype), sparse.cuda().to(dtype), torch.randn(3, 77, 328).cuda().to(dtype)
    with torch.no_grad():
        assert kernel.usable(x, sparse.blocks, sparse.bias)
        want = dense.double()(x.double())
        assert (sparse(x).double() - want).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


INTERPRETED = """
import torch
from lynceus.rewrite.block_prune import BlockSparseLinear, kernel
for out, inn, block, bias in ((100, 70, (16, 32), True), (64, 64, (32, 16), False)):
    torch.manual_seed(0)
    dense, kept = torch.nn.Linear(inn, out, bias=bias), torch.rand(-(-out // block[0]), -(-inn // block[1])) < 0.5
    sparse, x = BlockSparseLinear.of(dense, block, kept), torch.randn(2, 33, inn)
    with torch.no_grad():
        want = torch.nn.functional.linear(x, sparse.weight, sparse.bias)
        assert (kernel.multiply(x, sparse) - want).abs().max() < 1e-5
"""


@pytest.mark.slow
def test_the_kernel_is_right_in_tritons_interpreter():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
