"""Edits of objects: geometry, holes, complexity, blending, and whatever can be wrong with a sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.data.synth.objects import GROUNDS, SMOOTH, objects
from lynceus.trust.edits import complexity, edit, find_mask
from lynceus.trust.edits.compose import compose, feathered, soft_edge
from lynceus.trust.edits.fill import diffused
from lynceus.trust.edits.geometry import box_and_rate, largest_scene, object_box, rescale_scene, resize8
from lynceus.trust.edits.remove import grown, margin, remove
from lynceus.trust.edits.scene import Scene
from lynceus.trust.edits.spectrum import change, lowpass, visible_complexity

COUNT, SIDE = 200, 96


@pytest.fixture(scope="module")
def scenes():
    """Objects anywhere, turned anyhow, taken apart once."""
    made = objects(COUNT, size=SIDE, rates=(0.05, 0.12), turn=180, centred=False, seed=5)
    return [Scene.of(made[i]) for i in range(COUNT)]


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def outside(a, b):
    return ~(a.masks[0] | b.masks[0])


def test_wanted_sizes_are_reached_wherever_a_box_that_large_fits(scenes):
    generator = np.random.default_rng(0)
    checked = 0
    for scene in scenes:
        wanted = float(generator.uniform(0.03, 0.3))
        made = edit(scene, size=wanted)
        log = made.extra["edit"]
        assert log["rate"] == pytest.approx(float(made.masks.float().mean()))
        x0, y0, x1, y1 = scene.sample.boxes[0].tolist()
        factor = (wanted / scene.sample.extra["rate"]) ** 0.5
        if factor * max(x1 - x0, y1 - y0) <= SIDE:
            checked += 1
            assert abs(log["rate"] - wanted) <= 0.015, (scene.sample.id, wanted, log)
            assert log["visible"] == 1
        elif abs(log["rate"] - wanted) > 0.015:
            assert any("as large as fits" in n for n in log["notes"])
    assert checked > 150


def test_positions_are_exact_and_what_is_outside_stays_bit_equal(scenes):
    generator = np.random.default_rng(1)
    for scene in scenes:
        sample = scene.sample
        x0, y0, x1, y1 = (int(v) for v in sample.boxes[0])
        row, column = (int(generator.integers(0, SIDE - s + 1)) for s in (y1 - y0, x1 - x0))
        made = edit(scene, position=(row, column))
        rows, columns = np.nonzero(made.masks[0].numpy())
        assert (rows.min(), columns.min()) == (row, column)
        assert made.extra["edit"]["position"] == (row, column)
        assert made.masks.sum() == sample.masks.sum()
        same = outside(sample, made)
        assert torch.equal(made.image[:, same], sample.image[:, same])
        deep = torch.from_numpy(feathered(made.masks[0].numpy(), 2) == 1)
        moved = torch.roll(sample.image, (row - y0, column - x0), (1, 2))
        assert torch.equal(made.image[:, deep], moved[:, deep])  # the object's own pixels


def test_turning_back_gives_the_mask_again_and_leaves_the_rest_alone(scenes):
    generator = np.random.default_rng(2)
    whole = 0
    for scene in scenes:
        sample, angle = scene.sample, float(generator.uniform(-45, 45))
        there = edit(scene, angle=angle)
        same = outside(sample, there)
        assert torch.equal(there.image[:, same], sample.image[:, same])
        back = edit(there, angle=-angle, background=sample.image)
        if there.extra["edit"]["visible"] == 1:  # an object turned out of its picture has lost what was outside
            whole += 1
            assert iou(sample.masks[0], back.masks[0]) >= 0.95
    assert whole > 180


def test_angles_are_counter_clockwise():
    image = torch.zeros(3, 41, 41, dtype=torch.uint8)
    mask = torch.zeros(1, 41, 41, dtype=torch.bool)
    mask[0, 18:23, 8:33] = True
    image[0, 18:23, 20:33] = 255  # red to the right
    turned = edit(Sample(image=image, masks=mask), angle=90)
    assert turned.image[0, 12, 20] > 200  # now it is up
    assert turned.image[0, 28, 20] < 50
    about = edit(Sample(image=image, masks=mask.roll(6, 1), id="low"), angle=180, about="image")
    rows = np.flatnonzero(about.masks[0].any(1).numpy())
    assert rows[0] == 12  # from 24..28 to 12..16 about the middle row 20
    assert rows[-1] == 16


def test_holes_are_filled_better_than_by_a_mean():
    found: dict[str, list[tuple[float, float]]] = {}
    for sample in objects(72, size=96, rates=(0.08, 0.22), turn=180, centred=False, seed=7):
        truth = sample.extra["ground"].permute(1, 2, 0).numpy().astype(float)
        image, mask = sample.image.permute(1, 2, 0).numpy(), sample.masks[0].numpy()
        hole = grown(mask, margin(mask.shape))
        made = remove(image, hole).image
        assert np.array_equal(made[~hole], image[~hole])
        mean = image.copy()
        mean[mask] = image[~mask].mean(0)
        kind = "smooth" if sample.extra["family"] in SMOOTH else "textured"
        found.setdefault(kind, []).append((psnr(made[mask], truth[mask]), psnr(mean[mask], truth[mask])))
    ours = {k: np.mean(v, axis=0) for k, v in found.items()}
    assert ours["smooth"][0] >= 30
    assert ours["textured"][0] >= 24
    for kind in ("smooth", "textured"):
        assert ours[kind][0] - ours[kind][1] >= 4, ours


def psnr(a, b):
    return 10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9))


@pytest.mark.parametrize("method", ["moved", "telea", "ring"])
def test_every_way_to_fill_leaves_the_known_alone_and_forgets_the_object(method):
    if method == "telea":
        pytest.importorskip("cv2")
    sample = objects(1, size=64, seed=3)[0]
    made = Scene.of(sample, method=method, halo="remove")
    mask = sample.masks[0].numpy()
    ground = made.ground.image.astype(float)
    colour = sample.image.permute(1, 2, 0).numpy()[mask].astype(float).mean(0)
    truth = sample.extra["ground"].permute(1, 2, 0).numpy()[mask].astype(float).mean(0)
    assert np.abs(ground[mask].mean(0) - truth).max() < 0.35 * np.abs(colour - truth).max()
    known = ~made.ground.hole
    assert np.array_equal(ground[known], sample.image.permute(1, 2, 0).numpy()[known])


def test_smooth_filling_is_nearly_harmonic():
    y, x = np.mgrid[:40, :50].astype(np.float32)
    plane = (3 * x - 2 * y)[..., None]
    known = np.ones((40, 50), bool)
    known[10:30, 12:40] = False
    made = diffused(np.where(known[..., None], plane, 0), known)
    assert np.array_equal(made[known], plane[known])
    assert np.abs(made - plane).max() < 6  # of a range of 228
    assert np.array_equal(diffused(plane, np.zeros((40, 50), bool)), np.zeros_like(plane))


@pytest.mark.parametrize("share", [-0.6, -0.3, 0.25, 0.5, 1.0])
def test_complexity_outside_the_object_hits_the_wanted_ratio(share):
    for sample in objects(12, size=64, rates=(0.1, 0.2), grounds=[g for g in GROUNDS if g != "gradient"], seed=8):
        made = edit(sample, complexity=share)
        mask = made.masks[0].numpy()
        assert torch.equal(made.masks, sample.masks)
        before = Scene.of(sample).ground.image
        after = made.image.permute(1, 2, 0).numpy()
        ratio = visible_complexity(after, mask) / visible_complexity(before, mask)
        log = made.extra["edit"]
        if not log["notes"]:
            assert abs(ratio - (1 + share)) <= 0.02 * (1 + share)
        else:
            assert share < -0.5  # grain alone cannot fall that far in 8 bits
        assert log["complexity"] == pytest.approx(ratio - 1, abs=1e-6)
        deep = torch.from_numpy(feathered(mask, 2) == 1)
        assert torch.equal(made.image[:, deep], sample.image[:, deep])


def test_busier_takes_the_amplitudes_of_a_donor_and_keeps_the_mean_colour():
    samples = [objects(6, size=64, grounds=[g], seed=1)[0] for g in ("clouds", "checks")]
    calm, busy = (s.extra["ground"].permute(1, 2, 0).numpy() for s in samples)
    made = change(calm, 0.8, donor=busy)
    assert made.ratio == pytest.approx(1.8, rel=0.02)
    logs = [np.log(np.abs(np.fft.rfft2(v.astype(float).mean(2))) + 1) for v in (calm, made.image, busy)]
    alike = np.corrcoef([v.ravel() for v in logs])
    assert alike[1, 2] > alike[0, 2] + 0.1
    assert np.abs(made.image.mean((0, 1)) - calm.mean((0, 1))).max() < 2  # clipped to 0..255


@given(st.integers(1, 3), st.integers(2, 17), st.integers(2, 17), st.integers(0, 99))
def test_complexity_is_the_mean_modulus_of_all_frequencies(c, h, w, seed):
    x = np.random.default_rng(seed).random((c, h, w))
    assert complexity(x) == pytest.approx(np.abs(np.fft.fft2(x)).mean(), rel=1e-9)
    whole = np.fft.fft2(x)
    fy, fx = np.abs(np.fft.fftfreq(h)), np.abs(np.fft.fftfreq(w))
    keep = (fy < 0.2)[:, None] & (fx < 0.2)[None]
    np.testing.assert_allclose(lowpass(x, 0.2), np.fft.ifft2(whole * keep).real, atol=1e-9)


def test_the_box_is_that_of_the_largest_box_not_of_the_largest_area():
    mask = np.zeros((40, 40), bool)
    mask[2:12, 2:12] = True  # area 100, box 100
    mask[np.arange(15, 38), np.arange(15, 38)] = True  # a diagonal: area 23, box 529
    assert object_box(mask) == (15, 15, 23, 23)
    box, rate = box_and_rate(mask.astype(np.uint8) * 255)
    assert box == (15, 15, 23, 23)
    assert rate == pytest.approx(23 / 1600)
    assert object_box(np.zeros((4, 4), bool)) is None


def test_the_reference_way_of_resizing_scenes():
    sample = objects(2, size=96, rates=(0.1, 0.12), seed=2)[1]
    image, mask = sample.image.permute(1, 2, 0).numpy(), sample.masks[0].numpy().astype(np.uint8) * 255
    assert rescale_scene(image, mask, float(sample.extra["rate"]))[0] is image  # close enough already
    for rate in (0.05, 0.2):
        picture, cover = rescale_scene(image, mask, rate)
        assert picture.shape == image.shape
        assert abs(box_and_rate(cover)[1] - rate) <= 0.015
    assert box_and_rate(largest_scene(image, mask)[1])[0] == (0, 0, 96, 96)
    assert rescale_scene(image, np.zeros_like(mask), 0.1) is None
    assert largest_scene(image, np.zeros_like(mask)) is None


@pytest.mark.parametrize("size", [(37, 61), (20, 90), (64, 64)])
def test_eight_bit_resizing_is_that_of_opencv(size):
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (48, 56, 3)).astype(np.uint8)
    theirs = cv2.resize(image, size[::-1]).astype(int)
    assert np.abs(resize8(image, size).astype(int) - theirs).max() <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 40), st.integers(9, 40))
def test_any_mask_of_any_picture_can_be_edited(seed, h, w):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < rng.uniform(0.01, 0.9)
    mask[rng.integers(h), rng.integers(w)] = True
    mask[0, 0] = False
    image = torch.from_numpy(rng.integers(0, 256, (3, h, w)).astype(np.uint8))
    sample = Sample(image=image, masks=torch.from_numpy(mask[None]), label=3, id="odd")
    made = edit(
        sample, angle=float(rng.uniform(-180, 180)), position="random", complexity=float(rng.uniform(-0.5, 0.5))
    )
    assert made.image.shape == image.shape
    assert made.image.dtype == torch.uint8
    assert made.masks.shape == (1, h, w)
    assert made.masks.any()
    assert made.label == 3
    float_ = edit(Sample(image=image.float() / 255, masks=torch.from_numpy(mask[None])), background="plain").image
    assert float_.dtype == torch.float32
    assert float_.min() >= 0
    assert float_.max() <= 1


def test_identity_changes_only_the_edge():
    sample = objects(3, size=64, seed=4)[2]
    made = edit(sample)
    changed = (made.image != sample.image).any(0)
    assert torch.equal(made.masks, sample.masks)
    assert not (changed & ~sample.masks[0]).any()
    assert not (changed & torch.from_numpy(feathered(sample.masks[0].numpy(), 2) == 1)).any()
    assert made.boxes.equal(sample.boxes)


def test_pasting_cuts_hard_and_poisson_takes_the_grounds_colours():
    pytest.importorskip("cv2")
    sample = objects(4, size=64, seed=4)[1]
    pasted = edit(sample, position=(3, 3), blend="paste")
    x0, y0 = (int(v) for v in sample.boxes[0][:2])
    inside = pasted.masks[0]
    moved = sample.image.roll((3 - y0, 3 - x0), (1, 2))
    assert torch.equal(pasted.image[:, inside], moved[:, inside])
    assert pasted.extra["edit"]["blend"] == "paste"
    blended = edit(sample, position=(3, 3), blend="poisson")
    assert blended.extra["edit"]["blend"] == "poisson"
    same = outside(sample, blended)
    assert torch.equal(blended.image[:, same], sample.image[:, same])
    assert not torch.equal(blended.image, pasted.image)
    border = edit(sample, position=(0, 3), blend="poisson")
    assert border.extra["edit"]["blend"] == "feather"  # it touches the border


def test_an_object_cut_by_the_border_stays_at_the_border():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 20:40, 0:18] = True
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    image[:, mask[0]] = 200
    made = edit(Sample(image=image, masks=mask), size=0.03)
    assert made.extra["edit"]["position"][1] == 0
    assert "cut by the picture's border" in made.extra["edit"]["notes"][0]


def test_a_soft_edge_is_seen_and_removed():
    y, x = np.mgrid[:96, :96]
    distance = np.hypot(y - 48, x - 48)
    alpha = np.clip((26 - distance) / 8, 0, 1)[..., None]  # fades from 18 to 26 px
    rng = np.random.default_rng(0)
    image = (40 + rng.normal(0, 4, (96, 96, 3))) * (1 - alpha) + 210 * alpha
    image = image.round().clip(0, 255).astype(np.uint8)
    tight = distance < 21
    sample = Sample(image=torch.from_numpy(image).permute(2, 0, 1), masks=torch.from_numpy(tight[None]), id="soft")
    auto = Scene.of(sample)
    assert soft_edge(image, auto.ground.image, tight) > 0.2 or auto.ground.hole.sum() > tight.sum()
    assert auto.ground.hole.sum() > tight.sum()  # the rim went with it
    kept = Scene.of(sample, halo="keep").ground
    assert np.array_equal(kept.hole, tight)
    assert auto.ground.image[~auto.ground.hole].mean() < kept.image[~kept.hole].mean()
    hard = objects(2, size=96, seed=1)[1]
    assert np.array_equal(Scene.of(hard).ground.hole, hard.masks[0].numpy())


def test_backgrounds_are_what_was_asked_for():
    one, other = (objects(6, size=64, seed=s)[4] for s in (1, 2))
    free = ~(one.masks[0] | other.masks[0])
    plain = edit(one, background="plain")
    assert (plain.image[:, ~one.masks[0]].float().std(1) == 0).all()
    blurred = edit(one, background="blurred")
    assert complexity(blurred.image.numpy()) < complexity(one.image.numpy())
    given_ = edit(one, background=other)
    assert torch.equal(given_.image[:, free], other.image[:, free])
    drawn = edit(one, background="random", donors=[one, other])
    assert torch.equal(drawn.image, given_.image)  # never its own
    picture = torch.full((3, 200, 100), 0.5)
    assert (edit(one, background=picture).image[:, ~one.masks[0]] == 128).all()
    with pytest.raises(AdviceError, match="donors"):
        edit(one, background="random")
    with pytest.raises(AdviceError, match="plain"):
        edit(one, background="plan")


def test_the_same_seed_gives_the_same_edit():
    sample = objects(2, size=64, seed=9)[0]
    a, b, c = (edit(sample, position="random", size=0.1, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.image, b.image)
    assert a.extra["edit"] == b.extra["edit"]
    assert a.extra["edit"]["position"] != c.extra["edit"]["position"]


def test_of_several_masks_the_largest_box_counts_unless_it_is_scenery():
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, 5:10, 5:10] = True
    masks[1, 15:35, 15:35] = True
    masks[2, :, :] = True
    masks[2, 0, 0] = False
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = Sample(image=image, masks=masks, classes=torch.tensor([7, 8, 9]))
    assert edit(sample).classes.tolist() == [8]
    assert edit(sample, which=0).classes.tolist() == [7]
    with pytest.raises(AdviceError, match="no mask 3"):
        edit(sample, which=3)


def test_class_maps_serve_as_masks():
    segments = torch.zeros(32, 32, dtype=torch.long)
    segments[4:20, 6:18] = 2
    segments[25:30, 25:30] = 1
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert edit(Sample(image=image, segments=segments)).masks.sum() == 16 * 12
    black_and_white = torch.where(segments == 2, 255, 0)
    assert edit(Sample(image=image, segments=black_and_white)).masks.sum() == 16 * 12


IMAGE = torch.zeros(3, 16, 16, dtype=torch.uint8)
HALF = torch.zeros(1, 16, 16, dtype=torch.bool)
HALF[0, 4:9, 4:9] = True


@pytest.mark.parametrize(
    ("sample", "options", "said"),
    [
        (Sample(image=IMAGE, id="a7"), {}, "a7 has no mask"),
        (Sample(image=IMAGE, masks=HALF & False, id="a7"), {}, "a7 has a mask without a single pixel"),
        (Sample(image=IMAGE, masks=torch.cat([HALF, HALF & False]), id="a7"), {}, "mask 1 of 2"),
        (Sample(image=IMAGE, masks=HALF | True, id="a7"), {}, "a7 covers the whole picture"),
        (Sample(image=IMAGE, masks=HALF[:, :9], id="a7"), {}, "a7 is .16, 16."),
        (Sample(image=IMAGE.float() - 0.2, masks=HALF, id="a7"), {}, "a7 has pixels from -0.2"),
        (Sample(image=IMAGE.float() * torch.nan, masks=HALF, id="a7"), {}, "a7 has pixels"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"size": 1.5}, "share"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"size": "huge"}, "full"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"position": (14, 0)}, "a7 would leave"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"position": "anywhere"}, "random"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"complexity": -1.0}, "greater than -1"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"blend": "fether"}, "feather"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"method": "tela"}, "telea"),
        (Sample(image=IMAGE, masks=HALF, id="a7"), {"halo": "kep"}, "keep"),
    ],
)
def test_what_cannot_be_edited_is_said(sample, options, said):
    with pytest.raises(AdviceError, match=said):
        edit(sample, **options)


def test_masks_are_guessed():
    sample = next(s for s in objects(12, size=96, rates=(0.15, 0.2), seed=1) if s.extra["family"] == "grain")
    image, truth = sample.image.permute(1, 2, 0).numpy(), sample.masks[0].numpy()
    assert iou(find_mask(image, "threshold"), truth) > 0.8
    with pytest.raises(AdviceError, match="grabcut"):
        find_mask(image, "grabct")
    assert not find_mask(np.zeros((32, 32, 3), np.uint8), "threshold").all()


def test_grabcut_finds_what_stands_in_the_middle():
    pytest.importorskip("cv2")
    sample = next(s for s in objects(12, size=96, rates=(0.15, 0.2), seed=1) if s.extra["family"] == "grain")
    found = find_mask(sample.image.permute(1, 2, 0).numpy(), "grabcut")
    assert iou(found, sample.masks[0].numpy()) > 0.8
    assert not find_mask(np.zeros((32, 32, 3), np.uint8), "grabcut").all()


def test_compose_without_an_object_is_the_ground():
    ground = np.full((8, 8, 3), 7, np.uint8)
    assert np.array_equal(compose(ground, ground + 1, np.zeros((8, 8), bool))[0], ground)
