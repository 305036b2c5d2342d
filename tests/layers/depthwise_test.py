import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.layers import depthwise
from lynceus.layers.depthwise import DepthwiseConv, correlation, depthwise_conv2d


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 3, 5, 7, 11]),
    st.booleans(), st.integers(1, 400),
)  # fmt: skip
def test_the_correlation_is_the_gradient_of_the_kernel(b, c, h, w, side, last, room):
    draw = torch.Generator().manual_seed(b + 7 * c + 49 * h + 343 * w)
    x, grad = (torch.randn(b, c, h, w, generator=draw, dtype=torch.float64) for _ in range(2))
    if last:
        x, grad = (v.to(memory_format=torch.channels_last) for v in (x, grad))
    weight = torch.randn(c, 1, side, side, generator=draw, dtype=torch.float64).requires_grad_()
    F.conv2d(x, weight, padding=side // 2, groups=c).backward(grad)
    before, depthwise.ROOM = depthwise.ROOM, room
    try:
        assert torch.allclose(correlation(x, grad, side), weight.grad, atol=1e-10)
    finally:
        depthwise.ROOM = before


@pytest.mark.parametrize("bias", [True, False])
def test_fast_and_plain_gradients_agree(bias):
    torch.manual_seed(0)
    layer = DepthwiseConv(6, 7, bias=bias)
    x = torch.randn(3, 9, 14, 6, requires_grad=True)
    pull = torch.randn(3, 9, 14, 6)
    layer(x).backward(pull)
    fast = [x.grad, *(p.grad for p in layer.parameters())]
    double = layer.double()
    x64 = x.detach().double().requires_grad_()
    double.zero_grad()
    double(x64).backward(pull.double())  # float64 takes the plain way
    plain = [x64.grad, *(p.grad for p in double.parameters())]
    for a, b in zip(fast, plain):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-4)


def test_it_is_the_fast_way_that_training_takes():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 7, 7, requires_grad=True)
    assert type(depthwise_conv2d(x, weight).grad_fn).__name__ == "_DepthwiseBackward"
    small = torch.randn(4, 1, 3, 3, requires_grad=True)
    assert "Convolution" in type(depthwise_conv2d(x, small).grad_fn).__name__


def test_gradients_of_gradients():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(3, 1, 5, 5, requires_grad=True)

    def second(convolve):
        (g,) = torch.autograd.grad(convolve(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), weight)[0]

    want = second(lambda x, w: F.conv2d(x, w, padding=2, groups=3))
    assert torch.allclose(second(depthwise_conv2d), want, rtol=0, atol=1e-5 * float(want.std()))


def test_function_transforms_and_compilers_take_the_plain_way():
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(3, 1, 5, 5, requires_grad=True)
    per_image = torch.func.vmap(torch.func.grad(lambda w, x: depthwise_conv2d(x[None], w).sum()), (None, 0))(weight, x)
    depthwise_conv2d(x, weight).sum().backward()
    assert torch.allclose(per_image.sum(0), weight.grad, atol=1e-4)
