"""The nineteen corruptions: any size, seeds, severities, and each filter beside scipy, OpenCV or a plain loop."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lynceus.data
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.rng import generator
from lynceus.data.corrupt import (
    ALEXNET,
    BENCHMARK,
    CORRUPTIONS,
    DETERMINISTIC,
    GROUPS,
    SEVERITIES,
    chosen,
    corrupt,
    corrupt_dataset,
    filters,
    natural_scale,
    read_corrupted,
    spatter,
    weather,
)
from lynceus.data.corrupt.blur import _swapped, _taken
from lynceus.data.corrupt.draws import Draws, OfficialDraws

SCALES = ("imagenet", "cifar")


def scene(h, w, count=1, seed=0):
    """Something like a photograph: soft shapes, edges, a little grain. (b, 3, h, w) uint8."""
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:h, :w] / 32.0
    out = []
    for _ in range(count):
        a, b, c, d = rng.uniform(0.4, 1.6, 4)
        base = 120 + 70 * np.sin(a * i + b) * np.cos(c * j + d)
        base = base + 60 * ((i - a) ** 2 + (j - c) ** 2 < 0.5 + d / 4)
        tint = rng.uniform(0.7, 1.0, 3)
        out.append(base[None] * tint[:, None, None] + rng.normal(0, 4, (3, h, w)))
    return torch.from_numpy(np.clip(np.stack(out), 0, 255).astype(np.uint8))


def test_the_tables_are_whole():
    assert len(CORRUPTIONS) == 19
    assert len(BENCHMARK) == 15
    assert set(ALEXNET) == set(BENCHMARK)
    for scale in SCALES:
        assert set(SEVERITIES[scale]) == set(CORRUPTIONS)
        assert all(len(v) == 5 for v in SEVERITIES[scale].values())
    assert chosen(("fog", "noise")) == (*GROUPS["noise"], "fog")
    assert chosen("all") == CORRUPTIONS


@pytest.mark.parametrize("name", CORRUPTIONS)
@settings(max_examples=6, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 70), severity=st.integers(1, 5), scale=st.sampled_from(SCALES))
def test_any_size_goes(name, h, w, severity, scale):
    x = scene(h, w, 2)
    out = corrupt(x, name, severity, generator=generator(1), scale=scale)
    assert out.shape == x.shape
    assert out.dtype == torch.uint8
    again = corrupt(x, name, severity, generator=generator(1), scale=scale)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_sizes_up_to_512_and_rectangles(name):
    for h, w in ((32, 32), (300, 130), (37, 512)):
        x = scene(h, w)
        out = corrupt(x, name, 3)
        assert out.shape == x.shape
        assert not torch.equal(out, x)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_depends_on_its_seed_only(name):
    """Not on its batch, its type, or whether it stands alone."""
    x = scene(40, 33, 3)
    out = corrupt(x, name, 4, generator=generator(5))
    assert torch.equal(corrupt(x[0], name, 4, generator=generator(5)), out[0])
    as_float = corrupt(x.float() / 255, name, 4, generator=generator(5))
    torch.testing.assert_close(as_float * 255, out.float(), atol=1e-3, rtol=0)
    three = [generator(i) for i in range(3)]
    many = corrupt(x, name, 4, generator=three)
    torch.testing.assert_close(corrupt(x[1:2], name, 4, generator=[generator(1)]), many[1:2], atol=0, rtol=0)
    same = torch.equal(out, corrupt(x, name, 4, generator=generator(6)))
    assert same == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_0_returns_the_input(name):
    x = scene(16, 16)
    assert torch.equal(corrupt(x, name, 0), x)


# The authors' own functions, measured on photographs, do not move pixels further with every severity for these.
UNORDERED = {
    "imagenet": {"glass_blur", "snow", "frost", "fog", "spatter"},  # light water, then dark mud: the picture decides
    "cifar": {"glass_blur", "motion_blur", "frost", "spatter"},
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("saturate", "elastic_transform")])
def test_pictures_get_worse_with_severity(name, scale):
    side = 32 if scale == "cifar" else 128
    x = scene(side, side, 24, seed=3)
    means = []
    for severity in range(1, 6):
        out = corrupt(x, name, severity, generator=generator(0), scale=scale)
        means.append(float((out.float() - x.float()).abs().mean()))
    if name in UNORDERED[scale]:
        assert means[4] > means[0], means
    else:
        assert sorted(means) == means, means


def test_the_two_without_an_order():
    """Saturate fades colours at 1 and 2, then overdoes them; elastic's large affine moves are at 1 and 2 (ImageNet)."""
    x = scene(128, 128, 8, seed=3)

    def colour(v):
        return float((v.float().amax(1) - v.float().amin(1)).mean())

    grown = [colour(corrupt(x, "saturate", s)) for s in range(1, 6)]
    assert grown[1] < grown[0] < colour(x) < grown[2] < grown[3] < grown[4]
    moved = [float((corrupt(x, "elastic_transform", s).float() - x.float()).abs().mean()) for s in range(1, 6)]
    assert min(moved[:2]) > max(moved[2:])


def test_scales_are_not_mixed():
    x = scene(32, 32)
    for name in CORRUPTIONS:
        mild = (corrupt(x, name, 3, scale="cifar").float() - x.float()).abs().mean()
        hard = (corrupt(x, name, 3, scale="imagenet").float() - x.float()).abs().mean()
        assert mild != hard
    assert natural_scale(32, 32) == "cifar"
    assert natural_scale(224, 300) == "imagenet"


@pytest.mark.parametrize("make", [Draws, OfficialDraws])
def test_fog_is_as_large_as_the_picture(make):
    source = [generator(0)] if make is Draws else np.random.RandomState(0)
    map_ = weather.plasma(512, 2.0, make(source, torch.device("cpu")))
    assert map_.shape == (1, 512, 512)
    assert float(map_.min()) == 0
    assert float(map_.max()) == 1
    out = corrupt(torch.full((1, 3, 300, 520), 100, dtype=torch.uint8), "fog", 3)
    assert float(out[..., 260:].float().std()) > 1  # the far side has fog of its own


def test_frost_differs_by_seed_and_looks_like_ice():
    kinds = weather.frost_texture(96, 96, Draws([generator(i) for i in range(24)], torch.device("cpu")))
    means = kinds.mean((2, 3))
    assert bool((means[:, 2] > means[:, 0]).all())  # blue rather than red
    assert float(means.mean(1).max() - means.mean(1).min()) > 0.2  # thin and thick
    assert bool((kinds.std((2, 3)) > 0.03).all())


@pytest.mark.parametrize(("name", "rate"), [("shot_noise", 12), ("shot_noise", 100)])
def test_counts_are_poisson(name, rate):
    x = torch.full((1, 3, 200, 200), 153 / 255)
    counts = Draws([generator(0)], torch.device("cpu")).poisson(x, rate)
    want = 0.6 * rate
    assert abs(float(counts.mean()) / want - 1) < 0.01
    assert abs(float(counts.var()) / want - 1) < 0.03
    from scipy.stats import poisson

    for k in (int(want), int(want + 3 * want**0.5)):
        assert abs(float((counts <= k).float().mean()) - poisson.cdf(k, want)) < 0.005


def test_salt_and_pepper_are_equal_parts():
    x = torch.full((1, 3, 200, 200), 128, dtype=torch.uint8)
    out = corrupt(x, "impulse_noise", 5)
    share = [float((out == v).float().mean()) for v in (0, 255)]
    assert share == pytest.approx([0.135, 0.135], abs=0.004)


# glass ---------------------------------------------------------------------------------------------------------------
def walk(offset, reach, h, w, swap):
    """The loop as the authors wrote it, on pixel numbers."""
    content = np.arange(h * w).reshape(h, w, 1)
    step = 0
    for i in range(h - reach, reach, -1):
        for j in range(w - reach, reach, -1):
            across, down = offset[step]
            step += 1
            a, b = (i, j), (i + down, j + across)
            if swap:
                content[a], content[b] = content[b].copy(), content[a].copy()
            else:
                content[a], content[b] = content[b], content[a]  # views: the second copy sees the first
    return content.reshape(-1)


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(5, 17), w=st.integers(5, 17), reach=st.integers(1, 2), seed=st.integers(0, 999), swap=st.booleans()
)
def test_glass_without_a_loop_is_the_loop(h, w, reach, seed, swap):
    rows, columns = h - 2 * reach, w - 2 * reach
    offset = torch.from_numpy(np.random.RandomState(seed).randint(-reach, reach, (2, rows * columns, 2)))
    picture = offset.view(2, rows, columns, 2).flip(1, 2)
    got = (_swapped if swap else _taken)(picture, reach, h, w)
    for i in range(2):
        np.testing.assert_array_equal(got[i].numpy(), walk(offset[i].numpy(), reach, h, w, swap))


def test_a_real_swap_loses_no_pixel():
    offset = torch.from_numpy(np.random.RandomState(0).randint(-2, 2, (1, 16, 16, 2)))
    assert sorted(_swapped(offset, 2, 20, 20)[0].tolist()) == list(range(400))
    assert len(set(_taken(offset, 2, 20, 20)[0].tolist())) < 400  # the authors' copies do
    x = scene(48, 48)
    assert not torch.equal(corrupt(x, "glass_blur", 3), corrupt(x, "glass_blur", 3, swap=True))


# filters beside scipy and OpenCV -------------------------------------------------------------------------------------
@pytest.mark.parametrize("border", ["nearest", "reflect", "mirror"])
@pytest.mark.parametrize("sigma", [0.25, 0.7, 3.0, 6.0, 40.0])
def test_gaussians_are_scipys(border, sigma):
    from scipy.ndimage import gaussian_filter

    x = torch.rand(1, 3, 130, 61, generator=generator(0))
    want = np.stack([gaussian_filter(c.double().numpy(), sigma, mode=border) for c in x[0]])
    np.testing.assert_allclose(filters.gaussian(x, sigma, border=border)[0].numpy(), want, atol=2e-6)


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (100, 64), (8, 8)])
@pytest.mark.parametrize("factor", [1.0, 1.01, 1.13, 1.24, 1.75, 2.5, 4.5])
def test_zooms_are_scipys(size, factor):
    from scipy.ndimage import zoom

    x = torch.rand(1, 1, *size, generator=generator(1))
    crop = [int(np.ceil(n / factor)) for n in size]
    top, left = ((n - c) // 2 for n, c in zip(size, crop))
    want = zoom(x[0, 0].numpy()[top : top + crop[0], left : left + crop[1]], factor, order=1)
    top, left = ((g - n) // 2 for g, n in zip(want.shape, size))
    want = want[top : top + size[0], left : left + size[1]]
    np.testing.assert_allclose(filters.clipped_zoom(x, factor)[0, 0].numpy(), want, atol=1e-5)


@pytest.mark.parametrize(("radius", "sigma"), [(4, 0.5), (8, 0.5), (10, 0.5), (1.5, 0.1)])
def test_disks_are_opencvs(radius, sigma):
    cv2 = pytest.importorskip("cv2")
    half = 8 if radius <= 8 else radius
    grid = np.arange(-half, half + 1)
    disk = ((grid[:, None] ** 2 + grid**2) <= radius**2).astype(np.float32)
    size = (3, 3) if radius <= 8 else (5, 5)
    want = cv2.GaussianBlur(disk / disk.sum(), ksize=size, sigmaX=sigma)
    kernel = filters.disk(radius, sigma)
    np.testing.assert_allclose(kernel.numpy(), want, atol=1e-7)
    x = torch.rand(1, 1, 60, 45, generator=generator(2))
    x = (x * 255).round() / 255
    blurred = cv2.filter2D(x[0, 0].double().numpy(), -1, want)
    np.testing.assert_allclose(filters.correlate(x, kernel)[0, 0].numpy(), blurred, atol=2e-6)


def drops(seed):
    noise = torch.randn(1, 1, 75, 64, generator=generator(seed)) * 0.3 + 0.65
    layer = filters.gaussian(noise, 2.0)
    return layer.masked_fill(layer < 0.68, 0.0).mul(255).floor()


@pytest.mark.parametrize("seed", range(4))
def test_edges_and_distances_are_opencvs(seed):
    cv2 = pytest.importorskip("cv2")
    layer = drops(seed)
    grey = layer[0, 0].numpy().astype(np.uint8)
    edges = cv2.Canny(grey, 50, 150)
    ours = spatter.canny(layer, 50, 150)
    np.testing.assert_array_equal(ours[0, 0].numpy() * 255, edges)
    distance = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    np.testing.assert_allclose(spatter.chamfer(ours).clamp(max=20)[0, 0].numpy(), distance, atol=1e-4)
    np.testing.assert_array_equal(spatter.equalise(layer)[0, 0].numpy(), cv2.equalizeHist(grey))


def test_motion_blur_is_a_one_sided_gaussian_along_the_line():
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 20] = 1.0
    out = filters.line_blur(x, 5, 3.0, torch.tensor([0.0]))[0, 0]
    taps = np.exp(-0.5 * (np.arange(11) / 3.0) ** 2)
    np.testing.assert_allclose(out[20, 10:21].flip(0).numpy(), taps / taps.sum(), atol=1e-6)
    assert float(out.sum()) == pytest.approx(1.0, abs=1e-5)
    steep = filters.line_blur(x, 5, 3.0, torch.tensor([-90.0]))[0, 0]
    assert float(steep[20:31, 20].sum()) == pytest.approx(1.0, abs=1e-5)


def test_photographs_of_any_size(imagenet_jpegs):
    """Real pictures at their own sizes: each comes out whole, changed, and nearer to its old self when milder."""
    for path in imagenet_jpegs[:2]:
        x = lynceus.data.read_image(path)
        for name in CORRUPTIONS:
            mild, hard = (corrupt(x, name, s, scale=c) for s, c in ((1, "cifar"), (5, "imagenet")))
            near, far = ((v.float() - x.float()).pow(2).mean() for v in (mild, hard))
            assert 0 < near < far, name


# mistakes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("image", "name", "severity", "word"),
    [
        (scene(8, 8), "gausian_noise", 1, "gaussian_noise"),
        (scene(8, 8), "fog", 6, "1 to 5"),
        (scene(8, 8), "fog", 1.5, "1 to 5"),
        (scene(8, 8)[:, :1], "fog", 1, "expand"),
        (scene(8, 8).permute(0, 2, 3, 1), "fog", 1, "channels-last"),
        (scene(8, 8).float(), "fog", 1, "divide by 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "fog", 1, r"\[0, 1\]"),
        (scene(8, 8).float() / 255 - 0.9, "fog", 1, "normalisation"),
    ],
)
def test_mistakes_are_explained(image, name, severity, word):
    with pytest.raises(AdviceError, match=word):
        corrupt.__wrapped__(image, name, severity) if hasattr(corrupt, "__wrapped__") else corrupt(
            image, name, severity
        )


def test_generators_must_be_as_many_as_pictures():
    with pytest.raises(AdviceError, match="2 generators for 3"):
        corrupt(scene(8, 8, 3), "fog", 1, generator=[generator(0), generator(1)])
    with pytest.raises(AdviceError, match="scale"):
        corrupt(scene(8, 8), "fog", 1, scale="tiny")


# copies of data sets -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    return lynceus.data.open("digits").take(30)


def test_arrays_like_cifar_10_c(digits, tmp_path):
    folder = corrupt_dataset(digits, tmp_path / "c", corruptions=("fog", "shot_noise"), severities=(2, 5), quiet=True)
    fog = np.load(folder / "fog.npy")
    assert fog.shape == (60, 8, 8, 3)
    assert fog.dtype == np.uint8
    back = read_corrupted(folder, "shot_noise", 5)
    assert len(back) == 30
    assert back.classes == digits.classes
    assert [back[i].label for i in range(30)] == [digits[i].label for i in range(30)]
    # the same pictures again when it goes on, and in other batches
    (folder / "shot_noise.npy").unlink()
    manifest = json.loads((folder / "corrupted.json").read_text())
    (folder / "corrupted.json").write_text(json.dumps({**manifest, "done": ["fog"]}))
    corrupt_dataset(digits, folder, corruptions=("fog", "shot_noise"), severities=(2, 5), batch_size=7, quiet=True)
    assert torch.equal(read_corrupted(folder, "shot_noise", 5)[3].image, back[3].image)
    with pytest.raises(AdviceError, match="seed"):
        corrupt_dataset(digits, folder, corruptions="fog", severities=(2, 5), seed=1, quiet=True)
    with pytest.raises(AdviceError, match="severities"):
        read_corrupted(folder, "fog", 3)
    with pytest.raises(MissingError, match="shot_noise"):
        read_corrupted(folder, "snow", 5)


def test_folders_like_imagenet_c_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "c"
    words = f"data corrupt digits --limit 12 --out {out} --corruptions pixelate --severities 3 --layout folder"
    assert main(words.split()) == 0
    assert "corrupt_dataset" in capsys.readouterr().out
    opened = lynceus.data.open(out / "pixelate" / "3")
    assert len(opened) == 12
    assert main(words.split()) == 0  # finished: nothing to do
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("x")
    assert main(f"data corrupt digits --limit 5 --out {tmp_path / 'full'} --corruptions fog".split()) == 2
    assert "not empty" in capsys.readouterr().err


def test_one_size_for_an_array(tmp_path):
    from PIL import Image

    for name, side in (("a", 20), ("b", 30)):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(side, side)[0].permute(1, 2, 0).numpy()).save(tmp_path / "in" / name / "x.png")
    photos = lynceus.data.open(tmp_path / "in")
    with pytest.raises(AdviceError, match="side="):
        corrupt_dataset(photos, tmp_path / "out", corruptions="fog", quiet=True)
    folder = corrupt_dataset(photos, tmp_path / "cut", corruptions="fog", side=16, quiet=True)
    assert np.load(folder / "fog.npy").shape == (10, 16, 16, 3)
    with pytest.raises(AdviceError, match="quality"):
        corrupt_dataset(photos, tmp_path / "q", quality=85, quiet=True)
