"""Saliency and owners against scipy's densities, keypoints in (row, column), and what happens where SIFT is silent."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from lynceus.core.errors import AdviceError, MissingError
from lynceus.reengineer.keys.saliency import check
from lynceus.trust.keypoints import detect, log_densities, owners, partition, saliency


def points_of(seed, count, size, scale=3.0):
    draw = np.random.default_rng(seed)
    spots = draw.random((count, 2)) * np.array(size)
    return np.c_[spots, draw.random(count) * scale + 0.3, draw.random(count) + 0.01]


def plain(points, size):
    """Densities of radial distances, keypoint by keypoint, as a definition."""
    row, col = np.mgrid[: size[0], : size[1]]
    return np.stack([norm.pdf(np.hypot(row - r, col - c), 0, s) for r, c, s, _ in points])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_saliency_and_owners_are_those_of_the_definition(seed, count, size):
    points = points_of(seed, count, size)
    dense = plain(points, size)
    total = np.tensordot(points[:, 3], dense, 1)
    got = saliency(points, size)
    assert got.sum() == pytest.approx(1, abs=1e-12)
    if total.sum() > 0:
        np.testing.assert_allclose(got, total / total.sum(), atol=1e-12, rtol=0)
    want = np.where(dense.max(0) > 0, dense.argmax(0), -1)
    np.testing.assert_array_equal(owners(points, size, underflow=True), want)
    everyone = owners(points, size)
    assert everyone.min() >= 0
    clear = dense.max(0) > 1e-280
    np.testing.assert_array_equal(everyone[clear], want[clear])


def test_the_papers_form_is_a_mixture_of_gaussians_along_both_axes():
    points, size = points_of(3, 4, (15, 9)), (15, 9)
    grid = np.stack(np.mgrid[:15, :9], -1)
    weight = points[:, 3] / points[:, 3].sum()
    mixture = sum(
        w * multivariate_normal((r, c), s**2).pdf(grid) for w, (r, c, s, _) in zip(weight, points, strict=True)
    )
    np.testing.assert_allclose(saliency(points, size, form="paper"), mixture / mixture.sum(), atol=1e-13)
    assert not np.allclose(saliency(points, size), saliency(points, size, form="paper"))


def test_densities_do_not_underflow_far_away():
    points = np.array([[1.0, 1.0, 0.5, 1.0], [2.0, 200.0, 0.3, 1.0]])
    assert np.isfinite(log_densities(points, (5, 400))).all()
    assert np.exp(log_densities(points, (5, 400))).max(0).min() == 0
    assert (owners(points, (5, 400), underflow=True) == -1).any()
    assert set(np.unique(owners(points, (5, 400)))) == {0, 1}
    assert np.isfinite(saliency(points, (5, 400))).all()


def test_many_keypoints_go_in_pieces(monkeypatch):
    points = points_of(0, 40, (12, 17))
    whole = saliency(points, (12, 17)), owners(points, (12, 17)), owners(points, (12, 17), underflow=True)
    monkeypatch.setattr("lynceus.trust.keypoints.CHUNK", 12 * 17 * 3)
    pieces = saliency(points, (12, 17)), owners(points, (12, 17)), owners(points, (12, 17), underflow=True)
    np.testing.assert_allclose(pieces[0], whole[0], atol=1e-15)
    np.testing.assert_array_equal(pieces[1], whole[1])
    np.testing.assert_array_equal(pieces[2], whole[2])


@pytest.mark.parametrize("size", [(28, 28), (9, 31), (64, 48)])
def test_records_of_any_size_are_checked(size):
    """A second record, written here from the definition with other sizes and keypoints."""
    points = points_of(size[0], 5, size, scale=1.5)
    dense = plain(points, size)
    total = np.tensordot(points[:, 3], dense, 1)
    owner = np.where(dense.max(0) > 0, dense.argmax(0) + 1, -1)
    counts = [*(np.sum(owner == i + 1) for i in range(5)), np.sum(owner == -1)]
    from lynceus.reengineer.filling import fingerprint

    outputs = {"saliency": total / total.sum(), "owner": owner, "pixels_per_feature": counts}
    names = ("row", "col", "size", "response")
    record = {
        "family": "feature_guided",
        "model": "other",
        "config": {
            "height": size[0],
            "width": size[1],
            "keypoints": [dict(zip(names, map(float, p), strict=True)) for p in points],
        },
        "outputs": {k: fingerprint(v) for k, v in outputs.items()},
    }
    rows = check(record)
    assert {r.output for r in rows} == set(outputs)
    assert all(r.agrees for r in rows), rows
    record["config"]["keypoints"][0]["row"], record["config"]["keypoints"][0]["col"] = points[0, 1], points[0, 0]
    assert not all(r.agrees for r in check(record))
    with pytest.raises(AdviceError, match="keypoints"):
        check({**record, "config": {"height": 3, "width": 3}})


def blob(size, row, column, spread):
    r, c = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    return torch.exp(-((r - row) ** 2 + (c - column) ** 2) / (2 * spread**2)).expand(3, -1, -1)


@pytest.mark.parametrize("detector", ["sift", "gaussians"])
@pytest.mark.parametrize("size", [(40, 60), (120, 170)])
def test_keypoints_are_rows_and_columns(detector, size):
    if detector == "sift":
        pytest.importorskip("cv2")
    row, column = size[0] // 4, (size[1] * 3) // 4
    found = detect(blob(size, row, column, 3.0), detector=detector)
    nearest = np.abs(found.points[:, :2] - (row, column)).max(1).min()
    assert nearest < 1.5, found
    assert (np.diff(found.points[:, 3]) <= 0).all()


@pytest.mark.parametrize("detector", ["auto", "gaussians"])
def test_a_faint_image_lowers_the_contrast_and_a_flat_one_is_one_feature(detector):
    faint = detect(0.4 + 0.03 * blob((40, 40), 12, 25, 3.0), detector=detector)
    assert "lowered" in faint.how
    flat = detect(torch.full((3, 8, 6), 0.3), detector=detector)
    assert len(flat.points) == 1
    assert "one feature" in flat.how
    kept, pixels = partition(flat.points, (8, 6))
    assert kept.tolist() == [0]
    assert len(pixels[0]) == 48
    assert len(detect(torch.rand(1, 1, 1), detector=detector).points) == 1


def test_without_opencv_differences_of_gaussians_take_over(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    image = blob((40, 40), 12, 25, 3.0)
    assert "not installed" in detect(image).how
    with pytest.raises(MissingError, match=r"lynceus\[trust\]"):
        detect(image, detector="sift")


def test_partition_has_every_pixel_once_and_a_limit_is_kept():
    points, size = points_of(5, 6, (30, 20), scale=6), (30, 20)
    _, pixels = partition(points, size)
    assert sorted(np.concatenate(pixels).tolist()) == list(range(600))
    kept, few = partition(points, size, limit=20, seed=1)
    _, again = partition(points, size, limit=20, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(few, again, strict=True))
    for i, mine in zip(kept, few, strict=True):
        assert len(mine) <= 20
        assert (owners(points, size).reshape(-1)[mine] == i).all()


def test_wrong_keypoints_and_images_are_errors_that_advise():
    with pytest.raises(AdviceError, match="Keypoint 1"):
        saliency(np.array([[1.0, 1, 1, 1], [1, 1, 0, 1]]), (4, 4))
    with pytest.raises(AdviceError, match="at least one"):
        owners(np.zeros((0, 4)), (4, 4))
    with pytest.raises(AdviceError, match="detector"):
        detect(torch.rand(3, 8, 8), detector="surf")
    with pytest.raises(AdviceError, match="image"):
        detect(torch.rand(2, 8, 8))
    with pytest.raises(AdviceError, match="whole factor"):
        detect(torch.rand(3, 8, 8), enlarge=0)
