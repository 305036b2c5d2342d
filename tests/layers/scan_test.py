"""The selective scan: its routes agree with the recurrence and with each other, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError
from lynceus.layers import scan_tiles
from lynceus.layers.scan import scan, selective_scan, selective_step

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def coefficients(kind, b, d, n, length, draw):
    shape = {
        "shared": (b, n, length),
        "grouped": (b, 2 if d % 2 == 0 else 1, n, length),
        "own": (b, d, n, length),
        "constant": (d, n),
    }[kind]
    return draw(*shape)


def case(b, d, n, length, *, b_kind="shared", c_kind="shared", seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": draw(b, d, length),
        "delta": draw(b, d, length),
        "A": -torch.exp(draw(d, n)),
        "B": coefficients(b_kind, b, d, n, length, draw),
        "C": coefficients(c_kind, b, d, n, length, draw),
        "D": draw(d),
        "z": draw(b, d, length),
        "delta_bias": draw(d),
        "initial_state": draw(b, d, n),
    }


def recurrence(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """The definition, written out with one number per place."""
    b, d, length = u.shape
    n = A.shape[1]

    def at(x, i, j, t, k):
        if x.ndim == 2:
            return x[j, k]
        return x[i, k, t] if x.ndim == 3 else x[i, j // (d // x.shape[1]), k, t]

    h = initial_state.clone()
    y = torch.zeros_like(u)
    for i in range(b):
        for j in range(d):
            for t in range(length):
                step = math.log1p(math.exp(float(delta[i, j, t] + delta_bias[j])))
                for k in range(n):
                    h[i, j, k] = math.exp(step * A[j, k]) * h[i, j, k] + step * at(B, i, j, t, k) * u[i, j, t]
                    y[i, j, t] += at(C, i, j, t, k) * h[i, j, k]
                y[i, j, t] = (y[i, j, t] + D[j] * u[i, j, t]) * z[i, j, t] / (1 + math.exp(-z[i, j, t]))
    return y, h


def relative(a, b):
    return float((a - b).abs().max() / (1 + b.abs().max()))


@pytest.mark.parametrize("kind", ["shared", "grouped", "own", "constant"])
@pytest.mark.parametrize("route", ["auto", "sequential", "chunked"])
def test_is_the_recurrence(kind, route):
    given_ = case(2, 4, 3, 19, b_kind=kind, c_kind=kind)
    y, last = selective_scan(**given_, delta_softplus=True, return_last_state=True, route=route)
    want_y, want_last = recurrence(**given_)
    assert relative(y, want_y) < 1e-12
    assert relative(last, want_last) < 1e-12


kinds = st.sampled_from(["shared", "grouped", "own", "constant"])


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(1, 3),
    d=st.sampled_from([1, 2, 6, 64]),
    n=st.sampled_from([1, 5, 16]),
    length=st.sampled_from([1, 2, 13, 16, 31, 64, 150]),
    b_kind=kinds,
    c_kind=kinds,
)
def test_routes_agree_with_gradients(b, d, n, length, b_kind, c_kind):
    if "own" in (b_kind, c_kind) and d == 64:
        d = 6
    given_ = {k: v.requires_grad_() for k, v in case(b, d, n, length, b_kind=b_kind, c_kind=c_kind).items()}
    found = []
    for route in ("sequential", "chunked"):
        y, last = selective_scan(**given_, delta_softplus=True, return_last_state=True, route=route)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum() + last.square().sum(), list(given_.values()))
        found.append([y, last, *gradients])
    for a, b_ in zip(*found):
        assert relative(a, b_) < 1e-10
    with torch.no_grad():  # the path without a graph
        assert relative(selective_scan(**given_, delta_softplus=True), found[0][0]) < 1e-10


@pytest.mark.parametrize(("b", "d", "length"), [(1, 300, 200), (3, 600, 50), (2, 64, 300)])
def test_routes_agree_over_many_tiles(b, d, length):
    """Several tiles per sequence, several images in turn, several chunks side by side."""
    given_ = {k: v.requires_grad_() for k, v in case(b, d, 16, length).items()}
    found = []
    for route in ("sequential", "chunked"):
        y, last = selective_scan(**given_, delta_softplus=True, return_last_state=True, route=route)
        found.append([y, last, *torch.autograd.grad(y.square().sum() + last.sum(), list(given_.values()))])
    for a, c in zip(*found):
        assert relative(a, c) < 1e-10


def test_chunks_are_really_used():
    assert scan_tiles.chunks_of(300, 64 * 16, wide=False) > 1
    assert scan_tiles.chunks_of(300, 600 * 16, wide=False) == 1
    assert scan_tiles.chunks_of(16384, 600 * 16, wide=True) == 128
    assert scan_tiles.steps_of(300 * 16) < 200


@pytest.mark.parametrize("shared", ["delta", "A", "B", "C", "nothing", "everything"])
def test_shared_coefficients_are_those_of_every_sequence(shared):
    """One sequence of coefficients for four of inputs, as PlainMamba's sweeps have."""
    generator = torch.Generator().manual_seed(0)
    t, s, b, n, d = 23, 4, 2, 5, 6
    sizes = {"delta": (t, s, b, d), "A": (s, n, d), "B": (t, s, b, n, 1), "C": (t, s, b, n, 1)}
    values = {}
    for name, size in sizes.items():
        axis = 0 if name == "A" else 1
        size = [1 if i == axis and shared in (name, "everything") else v for i, v in enumerate(size)]
        values[name] = torch.randn(size, generator=generator, dtype=torch.float64)
    values["delta"] = values["delta"].exp()
    values["A"] = -values["A"].exp()
    u = torch.randn(t, s, b, d, generator=generator, dtype=torch.float64).requires_grad_()
    values = {k: v.requires_grad_() for k, v in values.items()}
    found = []
    for route in ("sequential", "chunked"):
        y, last = scan(u, *values.values(), route=route)
        gradients = torch.autograd.grad(y.square().sum() + last.sum(), [u, *values.values()])
        found.append([y, last, *gradients])
    for a, c in zip(*found):
        assert a.shape == c.shape
        assert relative(a, c) < 1e-10


@pytest.mark.parametrize("kind", ["shared", "constant", "grouped"])
def test_gradcheck(kind):
    given_ = {k: v.requires_grad_() for k, v in case(2, 2, 2, 5, b_kind=kind, c_kind=kind).items()}

    def run(*tensors):
        named = dict(zip(NAMES, tensors))
        return selective_scan(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(run, tuple(given_.values()))


def test_second_derivatives_go_the_sequential_way():
    given_ = {k: v.requires_grad_() for k, v in case(1, 2, 2, 4).items()}
    assert torch.autograd.gradgradcheck(
        lambda *t: selective_scan(**dict(zip(NAMES, t)), route="sequential"), tuple(given_.values())
    )


def test_function_transforms():
    """vmap, and forward-mode differentiation, take the ordinary operators."""
    given_ = case(1, 3, 2, 6)
    u = torch.randn(4, *given_["u"].shape, dtype=torch.float64)
    rest = {k: v for k, v in given_.items() if k != "u"}
    many = torch.func.vmap(lambda x: selective_scan(x, **rest))(u)
    for x, y in zip(u, many):
        assert relative(selective_scan(x, **rest), y) < 1e-12
    # linear in u
    _, tangent = torch.func.jvp(lambda x: selective_scan(x, **rest), (given_["u"],), (u[0],))
    without = {**rest, "initial_state": torch.zeros_like(rest["initial_state"])}
    assert relative(tangent, selective_scan(u[0], **without)) < 1e-10


def initial(d, n, length, seed=0):
    """The operator as a fresh mixer has it: A = -(1 ... n), steps between 1e-3 and 0.1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    step = torch.exp(torch.rand(d, generator=generator, dtype=torch.float64) * math.log(100) + math.log(1e-3))
    return {
        "u": draw(1, d, length),
        "delta": 0.5 * draw(1, d, length),
        "A": -torch.arange(1, n + 1, dtype=torch.float64).repeat(d, 1),
        "B": draw(1, n, length),
        "C": draw(1, n, length),
        "D": torch.ones(d, dtype=torch.float64),
        "delta_bias": step + torch.log(-torch.expm1(-step)),
    }


@pytest.mark.parametrize("d", [8, 128])
def test_long_sequences_in_single_precision(d):
    given_ = initial(d, 16, 4096)
    exact, last = selective_scan(**given_, delta_softplus=True, return_last_state=True, route="sequential")
    single, state = selective_scan(
        **{k: v.float() for k, v in given_.items()}, delta_softplus=True, return_last_state=True
    )
    assert single.dtype == torch.float32
    assert (single - exact).norm() / exact.norm() < 1e-4
    assert (single - exact).abs().max() / exact.std() < 1e-4
    assert (state - last).abs().max() / last.std() < 1e-4


def test_steep_decays_do_not_overflow():
    """Steps of thousands make every decay 0; inverses of it, or sums of its logarithm, would not be finite."""
    given_ = initial(16, 16, 500)
    given_["delta"] = given_["delta"] * 3000
    y = selective_scan(**{k: v.float().requires_grad_() for k, v in given_.items()}, delta_softplus=True)
    assert torch.isfinite(y).all()
    exact = selective_scan(**given_, delta_softplus=True, route="sequential")
    assert (y - exact).abs().max() / exact.std() < 1e-4


@pytest.mark.parametrize("kind", ["shared", "grouped"])
def test_step_by_step_is_the_scan(kind):
    given_ = case(3, 4, 5, 12, b_kind=kind, c_kind=kind)
    y, last = selective_scan(**given_, delta_softplus=True, return_last_state=True)
    fixed = {k: given_[k] for k in ("A", "D", "delta_bias")}
    state = given_["initial_state"]
    for t in range(12):
        now = {k: given_[k][..., t] for k in ("u", "delta", "B", "C", "z")}
        out, state = selective_step(state, **now, **fixed, delta_softplus=True)
        assert relative(out, y[..., t]) < 1e-12
    assert relative(state, last) < 1e-12


def test_a_sequence_goes_on_where_it_stopped():
    given_ = case(2, 4, 5, 30)
    y, last = selective_scan(**given_, delta_softplus=True, return_last_state=True)
    state, parts = given_["initial_state"], []
    for some in (slice(0, 7), slice(7, 8), slice(8, 30)):
        now = {k: given_[k][..., some] for k in ("u", "delta", "B", "C", "z")}
        fixed = {k: given_[k] for k in ("A", "D", "delta_bias")}
        part, state = selective_scan(**now, **fixed, initial_state=state, delta_softplus=True, return_last_state=True)
        parts.append(part)
    assert relative(torch.cat(parts, -1), y) < 1e-12
    assert relative(state, last) < 1e-12


def test_sixteen_bits_are_computed_in_thirty_two():
    given_ = {k: v.bfloat16() for k, v in case(2, 8, 4, 40).items()}
    y = selective_scan(**given_, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    wide = selective_scan(**{k: v.float() for k, v in given_.items()}, delta_softplus=True)
    assert torch.equal(y, wide.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**{k: v.float() for k, v in given_.items()}, delta_softplus=True), wide)


def test_memory_of_training_is_a_few_states():
    """What is kept for the backward pass is far below one state per token."""
    b, d, n, length = 2, 96, 16, 512
    given_ = {k: v.requires_grad_() for k, v in case(b, d, n, length, dtype=torch.float32).items()}
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**given_, delta_softplus=True)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) / 4 < 0.7 * b * d * n * length


def test_wrong_shapes_are_told():
    given_ = case(2, 4, 3, 5)
    with pytest.raises(AdviceError, match=r"B has the shape .* it may be \(2, 3, 5\)"):
        selective_scan(**{**given_, "B": given_["B"][:, :2]})
    with pytest.raises(AdviceError, match="route is"):
        selective_scan(**given_, route="fast")


def test_compiles_as_one_operator():
    given_ = {k: v.requires_grad_() for k, v in case(1, 3, 2, 20, dtype=torch.float32).items()}
    run = torch.compile(
        lambda *t: selective_scan(**dict(zip(NAMES, t)), delta_softplus=True), fullgraph=True, backend="aot_eager"
    )
    found = []
    for f in (run, lambda *t: selective_scan(**dict(zip(NAMES, t)), delta_softplus=True)):
        y = f(*given_.values())
        found.append([y, *torch.autograd.grad(y.square().sum(), list(given_.values()))])
    for a, b in zip(*found):
        assert relative(a, b) < 1e-5
    torch._dynamo.reset()


def test_opcheck():
    given_ = case(1, 3, 2, 20)
    u, delta, b, c = (given_[k] for k in ("u", "delta", "B", "C"))
    args = [
        u.permute(2, 0, 1)[:, None].contiguous().requires_grad_(),
        delta.exp().permute(2, 0, 1)[:, None].contiguous().requires_grad_(),
        given_["A"].t()[None].contiguous().requires_grad_(),
        b.permute(2, 0, 1)[:, None, ..., None].contiguous().requires_grad_(),
        c.permute(2, 0, 1)[:, None, ..., None].contiguous().requires_grad_(),
        torch.zeros(1, 1, 2, 3, dtype=torch.float64).requires_grad_(),
    ]
    torch.library.opcheck(torch.ops.lynceus.scan.default, (*args, 1), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.lynceus.scan.default, (*args, 3), test_utils=("test_schema", "test_faketensor"))
