"""Mamba and PlainMamba mixers: causality, reach, halving, orders, the loops that they replace."""

import math

import pytest
import torch
import torch.nn.functional as F

from lynceus.core.errors import AdviceError
from lynceus.layers.mamba import Mamba, MambaMixer
from lynceus.layers.mixers import Place, mixer_config
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.layers.scan_order import sweeps
from lynceus.reengineer.filling import filled


def double(mixer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return mixer.double().eval()


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branch(mixer, x, end):
    """One branch of Vim's mixer, from the formulas: causal convolution, steps, recurrence; on the given order."""
    conv, proj, steps = (getattr(mixer, n + end) for n in ("conv1d", "x_proj", "dt_proj"))
    log = mixer.A_b_log if end else mixer.A_log
    skip = mixer.D_b if end else mixer.D
    k = conv.kernel_size[0]
    padded = F.pad(x, (0, 0, k - 1, 0))
    u = sum(padded[:, i : i + x.shape[1]] * conv.weight[:, 0, i] for i in range(k)) + conv.bias
    u = F.silu(u)
    r, b, c = proj(u).split([mixer.rank, mixer.states, mixer.states], -1)
    delta = F.softplus(r @ steps.weight.t() + steps.bias)
    h = x.new_zeros(x.shape[0], x.shape[2], mixer.states)
    out = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * -log.exp()) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1) + skip * u[:, t])
    return torch.stack(out, 1)


@pytest.mark.parametrize("halve", [True, False])
def test_both_ways_is_the_formula(halve):
    mixer = double(Mamba(12, states=4, halve=halve))
    x = tokens(2, 9, 12)
    inner, z = mixer.in_proj(x).chunk(2, -1)
    y = branch(mixer, inner, "") * F.silu(z) + (branch(mixer, inner.flip(1), "_b") * F.silu(z.flip(1))).flip(1)
    want = mixer.out_proj(y / 2 if halve else y)
    with torch.no_grad():
        assert (mixer(x) - want).abs().max() < 1e-12
    assert (mixer(x) - want).abs().max() < 1e-12


def reach(mixer, x):
    """For each token: which tokens its output depends on (n, n)."""
    n = x.shape[1]
    jacobian = torch.autograd.functional.jacobian(lambda v: mixer(v).sum((0, 2)), x)
    return jacobian.abs().sum((1, 3)).reshape(n, n)


def test_forward_only_sees_the_past():
    seen = reach(double(Mamba(8, states=3, direction="none")), tokens(1, 10, 8))
    assert torch.equal(seen.triu(1), torch.zeros_like(seen))
    assert (seen.tril() + torch.ones_like(seen).triu(1) > 0).all()


@pytest.mark.parametrize("direction", ["v1", "v2"])
def test_both_ways_sees_everything(direction):
    assert (reach(double(Mamba(8, states=3, direction=direction)), tokens(1, 10, 8)) > 0).all()


def test_token_by_token_is_the_sequence():
    mixer = double(Mamba(8, states=5, direction="none", layer_scale=0.5))
    x = tokens(3, 11, 8)
    state = mixer.start(3)
    for t in range(11):
        y, state = mixer.step(x[:, t], state)
        assert (y - mixer(x)[:, t]).abs().max() < 1e-12
    with pytest.raises(AdviceError, match="direction='none'"):
        Mamba(8).step(x[:, 0].float(), state)


def test_maps_are_read_row_by_row():
    mixer = double(Mamba(8))
    x = tokens(2, 3, 5, 8)
    assert torch.equal(mixer(x), mixer(x.flatten(1, 2)).view(x.shape))


def test_fresh_steps_and_decays():
    torch.manual_seed(0)
    mixer = Mamba(64)
    for layer in (mixer.dt_proj, mixer.dt_proj_b):
        step = F.softplus(layer.bias)
        assert step.min() >= 1e-4 * 0.999
        assert step.max() <= 0.1 * 1.001
        assert step.std() > 0.01
        assert layer.weight.abs().max() <= mixer.rank**-0.5
    assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().repeat(128, 1))
    assert torch.equal(mixer.D, torch.ones(128))


def test_rank_and_projections():
    mixer = Mamba(50)
    assert mixer.rank == 4  # 50 / 16 rounded up
    assert mixer.in_proj.bias is None
    assert mixer.out_proj.bias is None
    with pytest.raises(AdviceError, match="direction is"):
        Mamba(8, direction="v3")


@pytest.mark.parametrize("name", ["mamba", "plain_mamba"])
def test_registered_mixers_train_on_any_map(name):
    mixer = mixer_config(name, {"states": 4}).build(Place(dim=16, grid=(4, 4), depth=4))
    for size in ((1, 1), (3, 7), (8, 2)):
        y = mixer(torch.randn(2, *size, 16))
        assert y.shape == (2, *size, 16)
        y.square().sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_out_proj_is_scaled_by_depth():
    torch.manual_seed(0)
    one = MambaMixer().build(Place(dim=32, depth=1)).out_proj.weight
    torch.manual_seed(0)
    many = MambaMixer().build(Place(dim=32, depth=25)).out_proj.weight
    assert torch.allclose(one, 5 * many)


# PlainMamba ---------------------------------------------------------------------------------------
def plain_by_formula(mixer, x, *, orders=None, codes=None):
    """Four scans in a loop; `orders` and `codes` replace the sweeps."""
    b, h, w, _ = x.shape
    found = sweeps(h, w)
    orders = found.order if orders is None else orders
    codes = found.codes if codes is None else codes
    inner, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv2d(inner)).flatten(1, 2)
    r, b_, c_ = mixer.x_proj(u).split([mixer.rank, mixer.states, mixer.states], -1)
    delta = mixer.dt_proj(r)
    if mixer.double_bias:
        delta = delta + mixer.dt_proj.bias
    delta = F.softplus(delta)
    a = -mixer.A_log.exp()
    total = torch.zeros_like(u)
    for order, code in zip(orders, codes):
        state = u.new_zeros(b, u.shape[2], mixer.states)
        for t, place in enumerate(order.tolist()):
            own = place if mixer.reorder_all else t
            weights = b_[:, own]
            if mixer.direction_Bs is not None:
                weights = weights + mixer.direction_Bs[code[t]]
            state = torch.exp(delta[:, own, :, None] * a) * state
            state = state + (delta[:, own] * u[:, place])[..., None] * weights[:, None]
            total[:, place] += (state * c_[:, own, None]).sum(-1) + mixer.D * u[:, place]
    return mixer.out_proj(total.view(z.shape) * F.silu(z))


@pytest.mark.parametrize("options", [{}, {"reorder_all": True}, {"double_bias": False}, {"directions": False}])
def test_plain_is_four_scans(options):
    mixer = double(PlainMamba2d(10, states=3, conv=3, **options))
    x = tokens(2, 4, 3, 10)
    with torch.no_grad():
        assert (mixer(x) - plain_by_formula(mixer, x)).abs().max() < 1e-11


def recorded(**options):
    """A mixer with the weights of the parity records."""
    mixer = PlainMamba2d(48, **options).double()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.from_numpy(filled(name, p.shape)))
    return mixer.eval()


def test_released_quirks_matter():
    """What the released networks do differs from what one would write; the card's measured effects, in rms / std."""
    x = tokens(2, 5, 6, 48)
    with torch.no_grad():
        reference = recorded()
        y = reference(x)

        def effect(other):
            return float((other(x) - y).square().mean().sqrt() / y.std())

        swapped = recorded()
        swapped.direction_Bs[3:] = swapped.direction_Bs[3:].flip(0)  # up and down
        found = {
            "same": effect(recorded()),
            "bias once": effect(recorded(double_bias=False)),
            "all permuted": effect(recorded(reorder_all=True)),
            "no directions": effect(recorded(directions=False)),
            "up and down": effect(swapped),
            "raster": effect(recorded(order="raster")),
        }
    assert found.pop("same") == 0
    card = {"bias once": 0.055, "all permuted": 1.6, "no directions": 0.54, "up and down": 0.7, "raster": 0.94}
    for name, effect_ in found.items():
        assert card[name] / 2 < effect_ < card[name] * 2, name


def test_every_place_reaches_every_other():
    mixer = double(PlainMamba2d(8, states=3, conv=3))
    seen = reach(lambda v: mixer(v.view(1, 3, 4, 8)).flatten(1, 2), tokens(1, 12, 8))
    assert (seen > 0).all()


def test_plain_starts_as_the_authors():
    torch.manual_seed(0)
    mixer = PlainMamba2d(64)
    step = F.softplus(mixer.dt_proj.bias)
    assert 1e-4 <= step.min() <= step.max() <= 0.1001
    assert math.isclose(float(mixer.in_proj.weight.std()), 0.02, rel_tol=0.1)
    assert not mixer.in_proj.bias.any()
    assert 0 < mixer.direction_Bs.abs().max() < 0.1
    with pytest.raises(AdviceError, match="order is"):
        PlainMamba2d(8, order="spiral")
