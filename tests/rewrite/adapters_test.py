"""Layers with adapters: training equals inference equals fused, whatever the shape; what learns; what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.core.errors import AdviceError, AdviceWarning
from lynceus.rewrite.adapters import Adapt, adapt, fuse, prune
from lynceus.rewrite.adapters.attention import HeadAttention
from lynceus.rewrite.adapters.layers import SPLoPALinear, SPLoRALinear, resolved_rank


def stirred(model, by=0.1):
    """Adapters away from 0."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model


# the invariant: beside the weight, in the weight, and as the weight --------------------------------
@settings(max_examples=25, deadline=None)
@given(
    inside=st.integers(1, 9),
    outside=st.integers(1, 9),
    lead=st.lists(st.integers(1, 3), max_size=3),
    rank=st.one_of(st.integers(1, 5), st.floats(0.05, 0.95)),
    bias=st.booleans(),
)
def test_a_linear_layer_trains_as_it_runs_as_it_fuses(inside, outside, lead, rank, bias):
    layer = stirred(adapt(nn.Linear(inside, outside, bias=bias), "splora", rank)).double()
    x = torch.randn(*lead, inside, dtype=torch.float64)
    want = layer.train()(x)
    assert torch.allclose(layer.eval()(x), want, atol=1e-12)
    assert torch.equal(fuse(layer)(x), layer(x))


@settings(max_examples=15, deadline=None)
@given(
    nd=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    side=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 4), st.just("same")),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    kind=st.sampled_from(["splora", "sppara"]),
)
def test_a_convolution_trains_as_it_runs_as_it_fuses(nd, groups, side, stride, padding, dilation, mode, kind):
    if padding == "same":
        stride = 1
    elif mode != "zeros":
        padding = min(padding, 2)
    kind_of = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd - 1]
    conv = kind_of(6, 6, side, stride, padding, dilation, groups, padding_mode=mode)
    layer = stirred(adapt(conv, kind, 3)).double()
    x = torch.randn(1, 6, *[9 + i for i in range(nd)], dtype=torch.float64)
    want = layer.train()(x)
    assert torch.allclose(layer.eval()(x), want, atol=1e-12)
    assert torch.equal(fuse(layer)(x), layer(x))
    assert type(fuse(layer)) is kind_of


def test_in_single_precision_training_and_inference_agree_to_1e_6():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10))
    made, x = adapt(net, "splora", 4), torch.rand(4, 3, 8, 8)
    assert torch.allclose(made.train()(x), made.eval()(x), atol=1e-6)
    assert torch.allclose(made(x), net(x), atol=1e-2)  # begins next to the base
    assert not torch.equal(made(x), net(x))


def test_the_tap_counts_not_a_parallel_convolution():
    """Without padding, a 1x1 convolution beside would not even have the size."""
    conv = nn.Conv2d(2, 2, 3, padding=0, bias=False)
    layer = adapt(conv, "sppara")
    with torch.no_grad():
        layer.adapter.copy_(torch.eye(2))
    x = torch.randn(1, 2, 6, 6)
    assert torch.allclose(layer.train()(x), conv(x) + x[:, :, 1:-1, 1:-1], atol=1e-6)


# attention ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_attention_is_torchs(options, batch_first):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64, **options)
    made = adapt(plain, "splora", 3)
    assert isinstance(made, HeadAttention)
    with torch.no_grad():
        for m in made.modules():
            if isinstance(m, SPLoRALinear):
                m.adapter.cols.zero_()
    q, k, v = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((5, 16), (7, plain.kdim), (7, plain.vdim)))
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    causal = torch.triu(torch.ones(5, 7, dtype=torch.bool), 2)
    for asked in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"need_weights": False}):
        want, got = plain(q, k, v, **asked), made(q, k, v, **asked)
        assert torch.allclose(got[0], want[0], atol=1e-12)
        assert (got[1] is None) == (want[1] is None)
        if want[1] is not None:
            assert torch.allclose(got[1], want[1], atol=1e-12)
    back = fuse(stirred(made))
    assert type(back) is nn.MultiheadAttention
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    assert torch.allclose(back(q, k, v)[0], made(q, k, v)[0], atol=1e-12)


def test_torchs_encoder_layer_does_not_pass_the_adapters_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    made, x = stirred(adapt(layer, "splora", 2)).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert not torch.allclose(made(x), layer(x), atol=1e-3)
        assert torch.allclose(made(x), fuse(made).eval()(x), atol=1e-5)


# what learns, what is kept ------------------------------------------------------------------------
def test_only_adapters_biases_and_norms_learn():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    made = adapt(net, "splora", 2)
    learns = {n for n, p in made.named_parameters() if p.requires_grad}
    assert learns == {
        "0.adapter.rows", "0.adapter.cols", "0.bias", "1.weight", "1.bias",
        "3.adapter.rows", "3.adapter.cols", "3.bias",
    }  # fmt: skip
    made.train()(torch.rand(2, 3, 3, 3)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in made.parameters())
    assert torch.equal(made[0].weight, net[0].weight)
    assert made[0].weight.data_ptr() != net[0].weight.data_ptr()


def test_two_of_rank_on_9_to_4_leave_14_numbers():
    layer = adapt(nn.Linear(9, 4), "splora", 2)
    net = nn.Sequential(nn.Linear(5, 9), layer, nn.Linear(4, 3))
    small = prune(net, masks={"0": [0, 2, 3, 5], "1": [0, 2]}, example=torch.rand(2, 5))
    assert sum(p.numel() for p in small[1].parameters() if p.requires_grad) == 2 * 4 + 2 * 2 + 2 == 14


@pytest.mark.parametrize(
    ("rank", "outside", "want"), [(4, 9, 4), (0.25, 32, 8), (0.1, 3, 1), (0.01, 4, 1), (2.0, 9, 2)]
)
def test_ranks(rank, outside, want):
    assert resolved_rank(rank, outside) == want


def test_the_kept_weight_is_dropped_when_anything_changes():
    made, x = adapt(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "splora", 2).eval(), torch.rand(4, 6)
    with torch.no_grad():
        before = made(x)
        assert made[0].kept.entry is not None
        state = {k: v + 0.3 if v.is_floating_point() else v for k, v in made.state_dict().items()}
        made.load_state_dict(state)
        after = made(x)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, fuse(made)(x))
        small = prune(made, masks={"0": [1, 2, 5]}, example=x)
        assert torch.allclose(small(x), fuse(small)(x))
        made.train()
        assert made[0].kept.entry is None
        made[0].adapter.rows.data.mul_(2)  # not seen by torch's counters
        assert torch.allclose(made.eval()(x), fuse(made)(x))


def test_gradients_reach_the_adapters_in_eval_mode_too():
    made = adapt(nn.Conv2d(2, 3, 3), "splora", 1).eval()
    with torch.no_grad():
        made(torch.rand(1, 2, 5, 5))
    made(torch.rand(1, 2, 5, 5)).sum().backward()
    assert made.adapter.rows.grad is not None


# prototypes in blocks -----------------------------------------------------------------------------
def test_prototypes_make_the_sum_of_kronecker_products():
    layer = stirred(adapt(nn.Linear(8, 6), "splopa", block=(3, 2), prototypes=4, prototype_rank=2))
    adapter = layer.adapter
    want = sum(torch.kron(p, q) for p, q in zip(adapter.pos_weights, adapter.prototypes()))
    assert torch.allclose(layer.adapted_weight(), layer.weight + want, atol=1e-6)


def test_prototypes_are_shared_by_equal_blocks_and_pruned_blocks_are_zero():
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    made = stirred(adapt(net, "splopa", block=(4, 4), prototypes=3))
    assert made[0].adapter.prototypes is made[2].adapter.prototypes
    assert adapt(net, "splopa", block=(4, 4), prototypes=3, shared=False)[2].adapter.prototypes is not None
    keep = torch.tensor([[True, False], [True, True], [False, True]])
    made[0].prune_blocks(keep)
    weight = fuse(made)[0].weight
    assert torch.equal(weight[:4, 4:], torch.zeros(4, 4))
    assert bool((weight[4:8] != 0).all())
    x = torch.rand(2, 8)
    assert torch.allclose(made.train()(x), made.eval()(x), atol=1e-6)
    with pytest.raises(AdviceError, match="3 x 2 blocks"):
        made[0].prune_blocks(torch.ones(2, 2, dtype=torch.bool))


# what is refused ----------------------------------------------------------------------------------
def test_layers_that_cannot_be_adapted_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 3))
    with pytest.warns(AdviceWarning, match=r"2 of 3 layers stay frozen.*0: its kernel of 4 x 4"):
        made = adapt(net)
    assert not made[0].weight.requires_grad
    with pytest.raises(AdviceError, match=r"No layer of Sequential can take splora adapters.*4 x 4"):
        adapt(net[:1])
    with pytest.raises(AdviceError, match="cut into no blocks of 32 x 32"):
        adapt(nn.Linear(30, 64), "splopa")
    with pytest.raises(AdviceError, match=r"e\.g\. 2 x 32"):
        SPLoPALinear.add(nn.Linear(64, 30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lora"}, "splora"),
        ({"rank": 0}, "rank is a whole number"),
        ({"init_range": 0.0}, "init_range is above 0"),
        ({"full": "("}, "no regular expression"),
        ({"prototypes": 0}, "at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(AdviceError, match=message):
        Adapt(**options)


def test_adapters_do_not_stack_and_fuse_needs_some():
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(AdviceError, match="has adapters already"):
        adapt(adapt(net))
    with pytest.raises(AdviceError, match="no adapters to fuse"):
        fuse(net)


def test_layers_in_full_learn_whole():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    made = Adapt(rank=1, full="^1$")(net)
    assert type(made[1]) is nn.Linear
    assert made[1].weight.requires_grad
    copied = copy.deepcopy(made)
    assert torch.equal(copied(torch.ones(1, 6)), made(torch.ones(1, 6)))
