"""Global-local filter: a circular convolution, at any size, and what its details weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lynceus.core.errors import AdviceError
from lynceus.core.positions import resize_spectrum
from lynceus.core.rules import match
from lynceus.layers.gated_conv import GatedConv
from lynceus.layers.global_filter import GlobalFilter, filtered_by_products


def lively(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
    return module.double()


def relative(a, b):
    return float((a - b).abs().max() / b.std())


def test_is_a_circular_convolution():
    """Every output cell is a sum over all cells with the kernel irfft2(table), wrapped around the border."""
    h, w = 9, 13
    mixer = lively(GlobalFilter(8, (h, w // 2 + 1)))
    x = torch.randn(2, h, w, 4, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(mixer.complex_weight.detach()), s=(h, w))  # c h w
    rows, columns = torch.arange(h), torch.arange(w)
    shifted = kernel[:, (rows[:, None] - rows) % h][:, :, :, (columns[:, None] - columns) % w]  # c r r' s s'
    direct = torch.einsum("cRrSs,brsc->bRSc", shifted, x)
    with torch.no_grad():
        assert (mixer.circular(x) - direct).abs().max() < 1e-10


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 15), st.integers(1, 15), st.tuples(st.integers(1, 9), st.integers(1, 6)))
def test_products_are_the_transform(h, w, table):
    mixer = lively(GlobalFilter(6, table))
    x = torch.randn(2, h, w, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (filtered_by_products(x, mixer.factors(h, w)) - mixer.circular(x)).abs().max() < 1e-10


def test_one_pixel_reaches_every_cell():
    mixer = lively(GlobalFilter(8, (7, 4)))
    x = torch.randn(1, 12, 9, 8, dtype=torch.float64)
    moved = x.clone()
    moved[:, 0, 0, 5] += 1.0
    with torch.no_grad():
        assert (mixer(moved) - mixer(x)).abs().amax(-1).min() > 0


def test_half_precision_goes_through_float32_and_float64_stays():
    mixer = lively(GlobalFilter(8, (6, 4)))
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        exact = mixer(x)
        assert exact.dtype == torch.float64
        single = mixer.float()(x.float())
        assert 1e-9 < relative(single.double(), exact) < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            half = GlobalFilter(8, (6, 4)).to(dtype)
            half.load_state_dict(mixer.state_dict())
            y = half(x.to(dtype))
            assert y.dtype == dtype
            assert relative(y.double(), exact) < 0.15
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(mixer(x.float()).double(), exact) < 0.15


def test_details_weigh_what_the_card_measured():
    """64 channels, order 3, gates by a third: what the tolerance of parity must see."""
    torch.manual_seed(0)
    gated = GatedConv(64, order=3, table=(14, 8), scale=1 / 3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in gated.named_parameters():
            z = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(z / p[0].numel() ** 0.5 if p.ndim > 1 else (1 + 0.1 * z if n.endswith("norm.weight") else 0.1 * z))
    x, other = (torch.randn(2, *s, 64, dtype=torch.float64) for s in [(14, 14), (10, 16)])
    mixer = gated.dwconv

    def joined(near, far):
        return torch.cat([near, far], -1)

    with torch.no_grad():
        y, z = gated(x), gated(other)
        assert mixer.pre_norm.eps == mixer.post_norm.eps == 1e-6  # 1e-5 would hide below the tolerance
        plain = mixer.forward
        mixer.forward = lambda q, scale=1.0: (
            scale
            * mixer.post_norm(
                joined(mixer.dw(mixer.pre_norm(q)[..., :56]), mixer.circular(mixer.pre_norm(q)[..., 56:]))
            )
        )
        assert relative(gated(x), y) > 0.1  # halves behind each other instead of interleaved
        mixer.forward = plain
        gated.scale = 1.0
        assert relative(gated(x), y) > 1.0
        gated.scale = 1 / 3
        own = mixer.factors

        def unaligned(h, w):
            planes = F.interpolate(mixer.complex_weight.permute(3, 0, 1, 2), (h, w // 2 + 1), mode="bilinear")
            return planes.permute(2, 3, 1, 0).contiguous()

        mixer.factors = unaligned
        assert relative(gated(x), y) < 1e-12  # invisible at the table's own size
        assert relative(gated(other), z) > 1e-3
        mixer.factors = own


def test_a_table_of_another_size_is_resized_once_at_loading():
    small, large = lively(GlobalFilter(6, (14, 8))), lively(GlobalFilter(6, (24, 13)), seed=2)
    found = match(small.state_dict(), large)
    assert found.account.complete
    assert "resize_spectrum 14x8 -> 24x13" in found.account.text(expand=True)
    large.load_state_dict(found.values)
    assert torch.equal(large.complex_weight, resize_spectrum(small.complex_weight, (24, 13)))
    x = torch.randn(1, 24, 24, 6, dtype=torch.float64)
    with torch.no_grad():
        assert relative(large(x), small(x)) < 1e-12


def test_odd_widths_advise():
    with pytest.raises(AdviceError, match="odd"):
        GlobalFilter(7, (4, 3))
