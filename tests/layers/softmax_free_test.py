"""Softmax-free attention: the Gaussian kernel, both Newton inverses and their gradients, all landmarks, linear cost."""

import pytest
import torch
import torch.nn.functional as F

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.mixers import Place, mixer_config
from lynceus.layers.softmax_free import (
    SoftmaxFreeAttention,
    SoftmaxFreeMixer,
    gaussian_kernel,
    newton_inverse,
    newton_inverse_halved,
    normaliser,
)


def points(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lively(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    return layer.eval()


def test_the_kernel_is_gaussian():
    a, b = points(2, 5, 3), points(2, 7, 3, seed=1)
    want = torch.exp(-torch.cdist(a, b).square() / 2)
    assert torch.allclose(gaussian_kernel(a, b), want, atol=1e-12)
    same = gaussian_kernel(10 * a.float(), 10 * a.float())
    assert same.max() <= 1.0  # also where rounding makes a distance negative
    assert torch.autograd.gradcheck(gaussian_kernel, (a.requires_grad_(), b.requires_grad_()))


def test_gradient_of_the_distance():
    """dL/dq = sum over k of 2 G (q - k), and the opposite for k, of squared distances -2 log kernel."""
    a, b, g = points(4, 3).requires_grad_(), points(5, 3, seed=1).requires_grad_(), points(4, 5, seed=2)
    found = torch.autograd.grad((-2 * gaussian_kernel(a, b).log() * g).sum(), (a, b))
    difference = a[:, None] - b
    assert torch.allclose(found[0], (2 * g[..., None] * difference).sum(1))
    assert torch.allclose(found[1], -(2 * g[..., None] * difference).sum(0))


def test_closed_gradient_is_that_of_the_inverse_once_converged():
    p = points(2, 3, 6, 8)
    kernel = gaussian_kernel(p, p).requires_grad_()  # condition about 5
    g = points(2, 3, 6, 6, seed=1)
    regular = kernel + 0.01 * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.cond(regular.detach()).max() < 20
    (exact,) = torch.autograd.grad((torch.linalg.inv(regular) * g).sum(), kernel)
    inverse = newton_inverse(kernel)
    (found,) = torch.autograd.grad((inverse * g).sum(), kernel)
    assert (inverse - torch.linalg.inv(regular)).abs().max() < 1e-9
    assert (found - exact).abs().max() < 1e-9
    plain = torch.linalg.inv(kernel)
    (exact,) = torch.autograd.grad((plain * g).sum(), kernel)
    for closed in (False, True):
        inverse = newton_inverse_halved(kernel, iterations=40, closed_gradient=closed)
        (found,) = torch.autograd.grad((inverse * g).sum(), kernel)
        assert (inverse - plain).abs().max() < 1e-8
        assert (found - exact).abs().max() < 1e-7


def test_unconverged_the_inverse_is_the_iterate():
    """Ill-conditioned on purpose: an exact inverse would be another number, and so would its gradient."""
    p = points(2, 2, 16, 8, scale=0.25)
    kernel = gaussian_kernel(p, p)
    regular = kernel + 0.01 * torch.eye(16, dtype=torch.float64)
    v = (1.8 / kernel.sum(-1).amax(-1) ** 2)[..., None, None] * regular
    for _ in range(20):
        v = 2 * v - v @ regular @ v
    assert torch.allclose(newton_inverse(kernel), v, atol=1e-12)
    assert (newton_inverse(kernel) - torch.linalg.inv(regular)).abs().max() > 0.1
    k, g = kernel.clone().requires_grad_(), points(2, 2, 16, 16, seed=1)
    (found,) = torch.autograd.grad((newton_inverse(k) * g).sum(), k)
    assert torch.allclose(found, -(v.mT @ g @ v.mT), rtol=1e-10)


@pytest.mark.parametrize("scale", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("step", ["matrix", "batch"])
def test_the_halved_step_is_that_of_the_loop(scale, step):
    p = points(2, 3, 12, 8, scale=scale)
    kernel = gaussian_kernel(p, p)
    groups = [kernel.flatten(0, 1)] if step == "batch" else [k[None] for k in kernel.flatten(0, 1)]
    wanted = []
    for group in groups:
        alpha = 2 / group.sum(-1).max() ** 2
        for _ in range(10):
            far = (torch.eye(12) - alpha * group @ group).abs().sum(-2).max()
            if far <= 1.01:
                break
            alpha = alpha / 2
        v = alpha * group
        for _ in range(20):
            v = 2 * v - v @ group @ v
        wanted.append(v)
    wanted = torch.cat(wanted).view_as(kernel)
    got = newton_inverse_halved(kernel, step=step)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_halved_inverse_through_its_iterations_passes_gradcheck():
    p = points(2, 5, 4)
    kernel = gaussian_kernel(p, p).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: newton_inverse_halved(k, iterations=6), (kernel,))


@pytest.mark.parametrize(("scale", "most"), [(0.25, 0.01), (0.5, 0.01), (1.0, 0.015)])
def test_all_landmarks_give_the_full_kernel(scale, most):
    """Up to the ridge; without it, exactly."""
    q, v = points(64, 8, scale=scale), points(64, 8, seed=1)
    kernel = gaussian_kernel(q, q)
    exact = kernel @ v
    layer = SoftmaxFreeAttention(8, 1, 1, conv=0)
    near = layer.mix(q[None, None], q[None, None], v[None, None])[0, 0]
    assert (near - exact).norm() / exact.norm() <= most
    free = kernel @ torch.linalg.pinv(kernel, hermitian=True, rtol=1e-14) @ (kernel.T @ v)
    assert (free - exact).norm() / exact.norm() < 1e-10


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_the_normalised_kernel_has_a_spectral_norm_of_at_most_one(scale):
    p = points(3, 40, 8, scale=scale)
    kernel = gaussian_kernel(p, p)
    d = normaliser(kernel)
    assert torch.linalg.matrix_norm(d * kernel * d.mT, 2).max() <= 1 + 1e-6


def test_cost_is_linear_at_a_fixed_number_of_landmarks():
    small = cost(SoftmaxFreeAttention(64, 2, 8, conv=9), torch.empty(1, 56, 56, 64, device="meta"))
    large = cost(SoftmaxFreeAttention(64, 2, 16, conv=9), torch.empty(1, 112, 112, 64, device="meta"))
    assert large.macs / small.macs <= 4.05
    assert large.peak_bytes / small.peak_bytes <= 4.05


def test_values_are_convolved_with_one_kernel_per_head():
    layer = lively(SoftmaxFreeAttention(12, 3, 2, conv=5)).double()
    v = points(2, 6, 7, 12)
    seen = v.unflatten(-1, (3, 4)).permute(0, 4, 3, 1, 2).flatten(0, 1)  # b*d heads h w
    want = F.conv2d(seen, layer.conv.weight, padding=2, groups=3).unflatten(0, (2, 4)).permute(0, 3, 4, 2, 1)
    assert torch.allclose(layer.local(v), want.flatten(-2), atol=1e-12)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (9, 7), (8, 8)], ids=str)
def test_any_map(normalised, size):
    layer = lively(SoftmaxFreeAttention(12, 3, 4, normalised=normalised))
    x = torch.randn(2, *size, 12)
    with torch.no_grad():
        y = layer(x)
        z = layer.landmarks(torch.randn(2, 3, size[0] * size[1], 4), *size)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert z.shape[2] == max(size[0] // 4, 1) * max(size[1] // 4, 1)  # a remainder is left out
    want = layer.double()(x.double())
    if not normalised:  # without a ridge, landmarks that are nearly equal amplify the rounding of float32
        assert (y - want).abs().max() < 1e-4 * want.abs().max()


def test_the_last_columns_that_fill_no_patch_make_no_landmark():
    layer = lively(SoftmaxFreeAttention(12, 3, 4))
    q = torch.randn(1, 3, 9 * 8, 4)
    changed = q.clone()
    changed[:, :, 64:] += 1  # the ninth row
    with torch.no_grad():
        assert torch.equal(layer.landmarks(q, 9, 8), layer.landmarks(changed, 9, 8))


@pytest.mark.parametrize("normalised", [False, True])
def test_kernels_stay_in_float32_under_autocast(normalised):
    layer = lively(SoftmaxFreeAttention(32, 2, 2, normalised=normalised))
    x = torch.randn(2, 8, 8, 32)
    q, z, v = (torch.randn(2, 2, n, 16) for n in (64, 16, 64))
    with torch.no_grad():
        y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.mix(q, z, v), layer.mix(q, z, v).float())
            assert (layer(x).float() - y).abs().max() < 0.1 * y.std() * 5
        exact = layer.mix(q, z, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.mix(q, z, v), exact)
        assert torch.isfinite(layer.bfloat16()(x.bfloat16())).all()


def test_the_step_of_the_batch_couples_images_and_that_of_the_matrix_does_not():
    x = torch.randn(3, 8, 8, 12, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0])[:, None, None, None]
    couples = {}
    for step in ("matrix", "batch"):
        layer = lively(SoftmaxFreeAttention(12, 3, 1, normalised=True, iterations=6, step=step)).double()
        with torch.no_grad():
            couples[step] = float((layer(x)[2:] - layer(x[2:])).abs().max())
    assert couples["matrix"] < 1e-10
    assert couples["batch"] > 1e-6


def test_the_mixer_takes_its_place():
    config = mixer_config("softmax_free", {"conv": 5})
    assert config == SoftmaxFreeMixer(conv=5)
    mixer = config.build(Place(dim=24, heads=3, grid=(28, 28)))
    assert mixer.ratio == 4
    assert mixer(torch.randn(2, 5, 9, 24)).shape == (2, 5, 9, 24)


def test_bad_options_advise():
    with pytest.raises(AdviceError, match="dim=8"):
        SoftmaxFreeAttention(10, 4, 2)
    with pytest.raises(AdviceError, match="odd"):
        SoftmaxFreeAttention(8, 4, 2, conv=4)
    with pytest.raises(AdviceError, match="at least 1"):
        SoftmaxFreeAttention(8, 4, 0)
