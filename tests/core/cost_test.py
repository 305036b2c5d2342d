"""Counts against formulas worked out by hand, and against figures of the literature."""

import gc

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lynceus.core.cost import CostCheck, cost, latency
from lynceus.core.counter import Counting
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def macs(function, *shape, dtype=torch.float32):
    return cost(Do(function), torch.zeros(shape, dtype=dtype)).macs


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("convnext_tiny", 4.4555),
        ("deit_tiny_patch16_224", 1.254),
        ("swin_tiny_patch4_window7_224", 4.49),
        ("resnet18", 1.814),
        ("resnet50", 4.089),
    ],
)
def test_figures_of_the_literature(name, giga):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert cost(model, torch.empty(1, 3, 224, 224, device="meta")).macs / 1e9 == pytest.approx(giga, rel=0.001)


@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 0), (4, 2, 3), (8, 1, 1)])
def test_convolution(groups, stride, padding):
    conv = nn.Conv2d(8, 16, 3, stride, padding, groups=groups)
    x = torch.zeros(2, 8, 13, 17)
    assert cost(conv, x).macs == conv(x).numel() * 9 * 8 // groups


def test_linear_and_matmul():
    assert cost(nn.Linear(5, 7), torch.zeros(2, 3, 5)).macs == 2 * 3 * 5 * 7
    assert macs(lambda x: x @ x.mT, 4, 6, 5) == 4 * 6 * 6 * 5
    assert macs(lambda x: torch.einsum("bij,bkj->bik", x, x), 4, 6, 5) == 4 * 6 * 6 * 5
    assert macs(lambda x: x[0] @ x[0, 0], 1, 6, 5) == 30


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted_on_both_paths(masked):
    b, h, n, d = 2, 3, 11, 8

    def attend(x):
        mask = x.new_zeros(n, n) if masked else None
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    want = 2 * b * h * n * n * d
    assert macs(attend, b, h, n, d) == want
    x = torch.rand(b, h, n, d)
    with torch.no_grad(), Counting() as counting:
        attend(x)
    assert counting.flops[""] == 2 * want
    with torch.no_grad(), Counting() as counting, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        attend(x)
    assert counting.flops[""] == 2 * want


def test_attention_of_other_lengths():
    def attend(x):
        return F.scaled_dot_product_attention(x[:, :4], x, x[..., :6])

    x = torch.rand(2, 9, 8)
    assert macs(attend, 2, 9, 8) == 2 * 4 * 9 * (8 + 6)
    with torch.no_grad(), Counting() as counting:
        attend(x[:, None])
    assert counting.flops[""] > 0


def test_torch_s_own_attention_module():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    n, c = 10, 16
    want = n * (4 * c * c + 2 * c * 32) + 2 * n * n * c
    assert cost(layer, torch.zeros(1, n, c)).macs == want
    assert torch.backends.mha.get_fastpath_enabled()


def test_fft():
    x = 64 * 64
    assert macs(torch.fft.fft2, 1, 64, 64, dtype=torch.complex64) == 5 * x * 12 // 2
    there = macs(torch.fft.rfft2, 1, 64, 64)
    assert there == 5 * x * 12 // 4
    back = macs(lambda z: torch.fft.irfft2(torch.fft.rfft2(z)), 1, 64, 64)
    assert back == 2 * there


def test_padding_is_counted_as_it_is_run():
    conv = nn.Conv2d(3, 4, 8, 8)

    def padded(x):
        return conv(F.pad(x, (0, -x.shape[-1] % 8, 0, -x.shape[-2] % 8)))

    assert macs(padded, 1, 3, 30, 17) == macs(padded, 1, 3, 32, 24) == 4 * 4 * 3 * 3 * 64


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.inner(self.inner(x))) @ x.new_zeros(4, 2)


def test_modules_add_up_and_shared_ones_count_each_time():
    model = Twice().train()
    count = cost(model, torch.zeros(1, 4))
    rows = {r["module"]: r for r in count.modules}
    assert rows["inner"]["macs"] == rows["inner.0"]["macs"] == 32
    assert rows["frozen"]["macs"] == 16
    assert count.macs == 32 + 16 + 8
    assert (count.params, count.trainable) == (40, 20)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_not_counted_is_named():
    count = cost(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU()), torch.zeros(1, 3, 4, 4))
    assert set(count.skipped) == {"batch_norm_legit_no_training", "gelu"}
    count = cost(Do(lambda x: F.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False)), torch.zeros(1, 3, 4, 4))
    assert "grid_sampler_2d" in count.skipped
    assert cost(Do(lambda x: x.flatten(1).clone().T), torch.zeros(2, 3)).skipped == {}


def test_a_model_that_looks_at_its_numbers_is_run():
    conv = nn.Conv2d(3, 4, 1)
    count = cost(Do(lambda x: conv(x) if x.sum() > 0 else x), torch.ones(1, 3, 4, 4))
    assert (count.ran, count.macs) == ("real", 3 * 4 * 16)
    with pytest.raises(AdviceError, match="real example"):
        cost(Do(lambda x: conv(x) if x.sum() > 0 else x), torch.ones(1, 3, 4, 4, device="meta"))


def test_the_model_keeps_its_weights_and_buffers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost(model, torch.rand(2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("real", [False, True])
def test_peak_of_live_results(real):
    def chain(x):
        for _ in range(5):
            x = x.relu()  # old and new live together, nothing else
        return x

    def hoard(x):
        return torch.stack([x.relu() for _ in range(5)]).sum()

    x, size = torch.zeros(1, 1000), 4000
    if real:
        for function, want in ((chain, 2), (hoard, 10)):
            gc.collect()
            counting = Counting()
            counting.ignore(nn.Identity(), x)
            with torch.no_grad(), counting:
                function(x)
            assert counting.peak == pytest.approx(want * size, abs=8)
    else:
        assert cost(Do(chain), x).peak_bytes == 2 * size
        assert cost(Do(hoard), x).peak_bytes == pytest.approx(10 * size, abs=8)


def test_latency_restores_threads_and_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    before = torch.get_num_threads()
    measured = latency(model, torch.zeros(8, 4), repeats=5, warmup=1, threads=1)
    assert torch.get_num_threads() == before
    assert model.training
    assert model[1].training
    assert 0 < measured.p10 <= measured.median <= measured.p90
    assert measured.throughput == pytest.approx(8000 / measured.median)
    assert measured.threads == 1
    with pytest.raises(AdviceError, match="repeats"):
        latency(model, torch.zeros(8, 4), repeats=0)


def test_the_check_reports():
    model = timm.create_model("resnet18", num_classes=5)
    data = [Sample(image=torch.zeros(3, 64, 48, dtype=torch.uint8))]
    report = CostCheck(repeats=2, warmup=0, depth=1)(Subject(model), data)
    assert report.summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert report.summary["latency_ms"] > 0
    assert [r["module"] for r in report.rows] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert any("1x3x64x48" in note for note in report.notes)
    assert any(note.startswith("Not counted: batch_norm") for note in report.notes)
    same = CostCheck(size=(64, 48), repeats=0)(Subject(model), [])
    assert same.summary["macs"] == report.summary["macs"]
    assert "latency_ms" not in same.summary


def test_a_plain_function_is_only_timed():
    report = CostCheck(size=16, repeats=2)(Subject(lambda x: x.mean((2, 3))), [])
    assert "macs" not in report.summary
    assert report.summary["latency_ms"] > 0
    assert "plain function" in report.notes[0]
