"""Hyena N-D: what the card demands of the layer, and what the records do not cover."""

import copy

import pytest
import torch
from torch import nn

from lynceus.core.errors import AdviceError, OptionError
from lynceus.layers.hyena import Hyena, HyenaFilter, HyenaMixer, RowHyena, directions, position_features
from lynceus.layers.long_conv import causal_conv
from lynceus.layers.mixers import Place


def layer(grid, dim=6, **options):
    torch.manual_seed(0)
    made = Hyena(dim, grid, width=16, **options).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(m, x):
    """The formula of the card for the standard direction, with convolutions by direct sums where they exist."""
    axes = tuple(range(1, m.axes + 1))
    wide = m.short_filter(m.in_proj(x).movedim(-1, 1)).movedim(1, -1)
    *gates, v = wide.split(m.dim, -1)
    kernels = m.kernels(x.shape[1:-1])
    side = torch.tensor(x.shape[1:-1]).double().log().mean().exp()
    for gate, k, bias in zip(gates[:0:-1], kernels, m.biases()):
        v = v * gate
        turn = axes if m.direction == "seq" and k is kernels[0] else ()
        way = "fft" if m.axes == 3 else "direct"
        y = causal_conv(v.flip(turn) if turn else v, k, way=way)
        v = (y.flip(turn) if turn else y) / (2 * side) + bias * v
    return m.out_proj(v * gates[0])


@pytest.mark.parametrize("grid", [(11,), (6, 6), (5, 8), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("form", ["joint", "product", "direct"])
@pytest.mark.parametrize("order", [2, 3])
def test_is_the_formula_on_any_axes(grid, form, order):
    m, x = layer(grid, form=form, order=order), draw(2, *grid, 6)
    with torch.no_grad():
        assert (m(x) - by_hand(m, x)).abs().max() < 1e-12
    y = m(x)  # with gradients another way is taken
    assert (y.detach() - by_hand(m, x).detach()).abs().max() < 1e-12


def test_standard_mode_is_causal_but_for_the_short_filter():
    """The gradient is exactly zero outside the quadrant that the 3 x 3 filter widens by one cell."""
    m, x = layer((7, 9)), draw(1, 7, 9, 6).requires_grad_()
    out = m.out_proj.weight.new_zeros(())
    with torch.no_grad():
        _ = m(x)
    wide = m.short_filter(m.in_proj(x).movedim(-1, 1)).movedim(1, -1)
    x0, x1, v = wide.split(6, -1)
    y = x0 * causal_conv(v * x1, m.whole_kernels((7, 9))[0], way="direct")
    out = m.out_proj(y)[0, 3, 4].sum()
    out.backward()
    reached = x.grad[0].abs().sum(-1)
    assert (reached[:5, :6] > 0).all()
    assert (reached[5:] == 0).all()
    assert (reached[:, 6:] == 0).all()
    x.grad = None
    m(x)[0, 3, 4].sum().backward()  # the transform leaves nothing but rounding there
    assert x.grad[0].abs().sum(-1)[5:].max() < 1e-13 * reached.max()


def test_two_seq_blocks_reach_everywhere():
    first, second = layer((5, 6), direction="seq"), layer((5, 6), direction="standard")
    x = draw(1, 5, 6, 6).requires_grad_()
    for row, column in [(0, 0), (4, 5), (0, 5), (2, 3)]:
        x.grad = None
        second(first(x) + x)[0, row, column].sum().backward()
        assert (x.grad[0].abs().sum(-1) > 1e-9 * x.grad.abs().max()).all()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_directions(axes):
    turns = directions(axes)
    assert len(turns) == len(set(turns)) == 2**axes
    assert turns[0] == ()
    if axes == 2:
        assert turns == [(), (0, 1), (1,), (0,)]


@pytest.mark.parametrize("direction", ["4dir", "4dirp", "parallel", "seq"])
@pytest.mark.parametrize("grid", [(9,), (4, 5), (2, 3, 4)], ids=str)
def test_every_direction_on_every_axis_count(direction, grid):
    m, x = layer(grid, direction=direction), draw(2, *grid, 6)
    y = m(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@pytest.mark.parametrize("direction", ["4dir", "4dirp"])
@pytest.mark.parametrize("order", [2, 3])
def test_directions_are_turned_maps(direction, order):
    """Turning the kernels equals turning the maps, running, and turning back."""
    m, x = layer((4, 6), direction=direction, order=order), draw(2, 4, 6, 6)
    *gates, v = m.short_filter(m.in_proj(x).movedim(-1, 1)).movedim(1, -1).split(6, -1)
    kernels = m.whole_kernels((4, 6))
    looks = []
    for turn in m.turns:
        turn = [axis + 1 for axis in turn]
        y = v.flip(turn)
        for gate, k in zip(gates[:0:-1], kernels):
            y = causal_conv(y * gate.flip(turn), k, way="direct")
        looks.append((y * gates[0].flip(turn)).flip(turn))
    y = torch.stack(looks, -1)
    want = m.out_proj(m.linear_mix(y).squeeze(-1) if direction == "4dir" else m.linear_mix(y.flatten(-2)))
    assert (m(x) - want).abs().max() < 1e-12


@pytest.mark.parametrize("decay", ["standard", "learn", "symmetric", "no"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_windows(decay, axes):
    grid = (5, 4, 3)[:axes]
    f = HyenaFilter(8, max(grid), axes=axes, width=16, decay=decay).double()
    bare = HyenaFilter(8, max(grid), axes=axes, width=16, decay="no").double()
    bare.load_state_dict(f.state_dict(), strict=False)
    window = f(grid) / bare(grid)
    if decay == "no":
        assert (window == 1).all()
        return
    corner = (0,) * axes
    added = f.modulation.shift[0, 0] if decay != "standard" else 0.0
    assert torch.allclose(window[corner], 1.0 + torch.as_tensor(added, dtype=torch.float64).expand(8))
    assert (window[corner] >= window - 1e-12).all()
    assert sum(n.endswith("deltas") for n, _ in f.named_parameters()) == (
        0 if decay == "standard" else 1 if decay == "symmetric" or axes == 1 else axes
    )


def test_sqrt_decay_is_the_root_of_the_window():
    plain, root = (HyenaFilter(8, 5, width=16, sqrt_decay=s).double() for s in (False, True))
    bare = HyenaFilter(8, 5, width=16, decay="no").double()
    for f in (root, bare):
        f.load_state_dict(plain.state_dict(), strict=False)
    square = (root((5, 5)) / bare((5, 5))) ** 2
    assert torch.allclose(square, plain((5, 5)) / bare((5, 5)))


def test_one_frequency_vector_under_many_names():
    f = HyenaFilter(8, 5, width=16, form="product")
    assert sum(n.endswith("freq") for n, _ in f.named_parameters()) == 1
    names = [n for n in f.state_dict() if n.endswith("freq")]
    assert len(names) == 6
    state = {n: torch.full((1, 16), float(i)) if n in names else v for i, (n, v) in enumerate(f.state_dict().items())}
    last = state[names[-1]]
    f.load_state_dict(state, assign=True)
    assert names[-1].startswith("Ximplicit_filter")
    assert all(torch.equal(f.state_dict()[n], last) for n in names)


def test_other_grids_ask_the_network_again():
    """Untrained positions of another length are those that a filter made for it starts with; trained ones follow."""
    f, other = HyenaFilter(8, 7, width=16), HyenaFilter(8, 12, width=16)
    other.load_state_dict({n: v for n, v in f.state_dict().items() if n != "pos_emb.z"}, strict=False)
    assert torch.equal(f((12, 12)), other((12, 12)))
    with torch.no_grad():
        f.pos_emb.z[0, :, 1] += torch.linspace(0, 3, 7)
    gone = f.pos_emb.table(13)[:, 1] - position_features(13, 3)[:, 1].float()
    assert torch.allclose(gone, torch.linspace(0, 3, 13), atol=1e-5)
    assert torch.equal(f.pos_emb.table(7), f.pos_emb.z[0])


def test_a_free_table_is_resized():
    m = layer((5, 5), form="direct")
    assert m(draw(1, 9, 4, 6)).shape == (1, 9, 4, 6)
    with torch.no_grad():
        m.filter.fill_(0.5)
    assert torch.allclose(m.kernels((9, 4)), torch.full((1, 9, 4, 6), 0.5, dtype=torch.float64))


def test_kept_kernels_follow_the_weights():
    m = layer((6, 6)).float()
    x = draw(2, 6, 6, 6).float()
    with torch.no_grad():
        first = m(x)
        assert m._kept is not None
        assert torch.equal(m(x), first)
        m.filter_fn.implicit_filter[0].weight.mul_(2)
        second = m(x)
        fresh = copy.deepcopy(m)
        fresh._kept = None
        assert torch.equal(fresh(x), second)
        assert not torch.equal(first, second)
        assert m(draw(1, 4, 9, 6).float()).shape == (1, 4, 9, 6)
        assert torch.allclose(m(x), second)
    assert torch.allclose(m(x).detach(), second, atol=1e-5)


def test_half_precision_is_carried_out_in_float32():
    m, x = layer((8, 8)).float(), draw(2, 8, 8, 6).float()
    with torch.no_grad():
        want = m(x)
        half = copy.deepcopy(m).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = m(x)
    assert half.dtype == torch.bfloat16
    for y in (half, cast):
        assert (y.float() - want).abs().max() < 0.1 * want.std()


def test_rows_as_one_sequence():
    torch.manual_seed(0)
    m = RowHyena(6, (3, 5), width=16).double()
    x = draw(1, 3, 5, 6).requires_grad_()
    with torch.no_grad():
        assert torch.allclose(m(x), super(RowHyena, m).forward(x.flatten(1, 2)).view_as(x))
    m(x)[0, 1, 2].sum().backward()
    reached = x.grad[0].abs().sum(-1).flatten()
    assert reached[:8].min() > 1e-9
    assert reached[8:].max() < 1e-14


def test_the_mixer_turns_in_even_blocks():
    for index in range(3):
        made = HyenaMixer().build(Place(dim=8, index=index))
        assert made.direction == ("seq" if index % 2 == 0 else "standard")
    made = HyenaMixer(direction="4dir", order=3, form="product").build(Place(dim=8, grid=(4, 6), index=1))
    assert (made.direction, made.order, made.form, made.grid) == ("4dir", 3, "product", (4, 6))
    assert all((m.bias is None) or not m.bias.any() for m in made.modules() if isinstance(m, nn.Linear))


def test_mistakes_are_told():
    with pytest.raises(OptionError, match="joint"):
        Hyena(4, (3, 3), form="jiont")
    with pytest.raises(OptionError, match="4dir"):
        Hyena(4, (3, 3), direction="4dirr")
    with pytest.raises(AdviceError, match="at least 2"):
        Hyena(4, (3, 3), order=1)
    with pytest.raises(AdviceError, match="one to three"):
        Hyena(4, (3, 3, 3, 3))
    with pytest.raises(AdviceError, match="joint"):
        Hyena(4, (3, 3), form="product", decay="symmetric")
    with pytest.raises(AdviceError, match="odd number"):
        Hyena(4, (3, 3), features=4)
    with pytest.raises(AdviceError, match="2 axes"):
        Hyena(4, (3, 3))(torch.zeros(1, 9, 4))
