"""The audit: what it counts, what it refuses before any work, budgets and resuming, diffusion, the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import lynceus
import lynceus.data
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.synth.objects import GLYPHS, objects
from lynceus.trust.edits import Edits, Setting, audit, edit, setting
from lynceus.trust.edits.diffusion import Denoiser, recompose


def centre(image):
    """Class 1 when the middle of the picture is brighter than its border: blind to all else."""
    middle = image[..., 12:20, 12:20].mean((1, 2, 3))
    border = torch.cat([image[..., :4].flatten(1), image[..., -4:].flatten(1)], 1).mean(1)
    return torch.stack([border - middle, middle - border], 1) * 10


def spots(count=12, size=32, **changes):
    """A white square in the middle of a dark picture, or a black one on a bright one."""
    out = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        base, ink, label = (40, 230, 1) if i % 2 else (200, 20, 0)
        image = torch.full((3, size, size), base) + torch.randint(-5, 6, (3, size, size), generator=generator)
        mask = torch.zeros(1, size, size, dtype=torch.bool)
        mask[0, 9:23, 9:23] = True
        image[:, mask[0]] = ink
        out.append(Sample(image=image.to(torch.uint8), masks=mask, label=label, id=f"spot{i}", **changes))
    return out


def test_an_audit_finds_what_a_model_leans_on():
    report = audit(centre, spots(), ("size=0.02", "position=random", "angle=90"), quiet=True)
    rows = {r["setting"]: r for r in report.rows}
    assert report.summary["accuracy"] == 100
    assert rows["identity"]["drop"] == 0
    assert rows["angle=90"]["net drop"] == 0
    assert rows["position=random"]["net drop"] > 15
    assert "net of" in report.answer
    right = report.arrays["right"]
    assert right.shape == (12, 5)
    assert set(np.unique(right)) <= {-1, 0, 1}
    for k, name in enumerate(["identity", "size=0.02", "position=random"], start=1):
        assert rows[name]["drop"] == pytest.approx(100 * (right[:, 0] - right[:, k].astype(float)).mean())
        assert rows[name]["from"] <= rows[name]["net drop"] <= rows[name]["to"]
    assert {"one image in every setting.png", "worst cases beside their originals.png"} <= set(report.figures)


def surroundings(image):
    """Class 1 when the border is dark: blind to the object."""
    border = torch.cat([image[..., :4].flatten(1), image[..., -4:].flatten(1)], 1).mean(1)
    return torch.stack([border - 0.5, 0.5 - border], 1)


def test_drops_are_net_of_what_editing_itself_costs():
    def seams(image):  # sees nothing but that the square's edge is no longer hard
        jump = (image[..., 8, 16] - image[..., 9, 16]).abs().mean(1)
        return torch.stack([jump - 0.65, 0.65 - jump], 1)

    samples = [replace(s, label=0) for s in spots()]
    report = audit(seams, samples, ("angle=360", "background=plain"), quiet=True)
    assert report.rows[0]["drop"] == 100
    assert [r["net drop"] for r in report.rows] == [0, 0, 0]
    assert [r["drop"] for r in report.rows] == [100, 100, 100]


def test_an_adversarial_background_is_the_worst_of_several():
    asked = ("background=random", "background=adversarial", "position=random")
    some = audit(surroundings, spots(20), asked, candidates=12, quiet=True, seed=1)
    drawn, worst, moved = (r["drop"] for r in some.rows[1:])
    assert worst == 100 > drawn > 0 == moved
    margin = some.arrays["margin"]
    single = audit(surroundings, spots(20), asked[1:2], candidates=1, quiet=True, seed=1).arrays["margin"]
    assert (margin[:, 3] <= single[:, 2] + 1e-6).all()


def test_settings_are_read_from_texts():
    assert setting("size=0.1, angle=-30") == Setting(name="size=0.1,angle=-30", size=0.1, angle=-30.0)
    assert setting("position=3x14").position == (3, 14)
    assert setting("background=blurred,complexity=+0.3").complexity == 0.3
    assert setting("size=full").size == "full"
    for text, said in (
        ("sise=0.1", "size"),
        ("size=big", "number"),
        ("size=2", "share"),
        ("complexity=-1", "greater than -1"),
        ("background=plane", "plain"),
        ("size", "number"),
    ):
        with pytest.raises(AdviceError, match=said):
            setting(text)
    with pytest.raises(AdviceError, match="once"):
        audit(centre, spots(), ("size=0.1", "size=0.1"), quiet=True)


def test_what_cannot_be_done_is_counted_and_left_out_of_the_accuracy():
    samples = spots(6)
    tall = torch.zeros(1, 32, 32, dtype=torch.bool)
    tall[0, 1:31, 14:18] = True
    samples[3] = replace(samples[3], masks=tall)
    report = audit(centre, samples, ("size=0.5",), quiet=True)
    row = report.rows[1]
    assert row["images"] == 5
    assert (report.arrays["right"][3, 2], np.isnan(report.arrays["margin"][3, 2])) == (-1, True)
    assert any("1 of 6 images do not count" in n for n in report.notes)


def test_an_oracle_says_which_edits_are_still_what_they_were():
    seen = []

    def oracle(sample):
        seen.append(sample)
        return sample.extra["edit"]["rate"] > 0.1

    report = audit(centre, spots(4), ("size=0.03", "size=0.2"), oracle=oracle, quiet=True)
    assert [r["setting"] for r in report.rows] == ["identity", "size=0.2"]
    assert any("oracle" in n for n in report.notes)
    assert len(seen) >= 12


def test_without_labels_the_models_own_answers_count():
    samples = [replace(s, label=None) for s in spots(6)]
    report = audit(centre, samples, ("position=random",), quiet=True)
    assert report.summary["accuracy"] == 100
    assert any("own answer" in n for n in report.notes)
    kinds = [replace(s, classes=torch.tensor([k % 2])) for k, s in enumerate(samples)]

    class Named(list):
        classes = ("dark", "bright")

    report = audit(centre, Named(kinds), ("position=random",), quiet=True)
    assert any("class of the edited mask" in n for n in report.notes)
    wrong = Named([replace(s, classes=torch.tensor([1 - k % 2])) for k, s in enumerate(samples)])
    assert audit(centre, wrong, ("position=random",), quiet=True).summary["accuracy"] == 0


BROKEN = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4)).eval()
BROKEN[1].weight.data[2, 5] = torch.nan


@pytest.mark.parametrize(
    ("subject", "samples", "said"),
    [
        (centre, [], "no images"),
        (centre, [replace(s, masks=None) for s in spots(2)], "spot0 has no mask"),
        (centre, [*spots(2), replace(spots(1)[0], masks=torch.zeros(1, 32, 32, dtype=torch.bool), id="e")], "e has a"),
        (centre, [*spots(2), replace(spots(1)[0], label=7, id="seven")], "seven has the label 7"),
        (centre, [replace(spots(1)[0], image=spots(1)[0].image.float(), id="loud")], "loud has pixels"),
        (centre, [replace(s, label=torch.ones(2)) for s in spots(2)], "several classes"),
        (Subject(BROKEN), spots(3), "finite"),
        (lambda x: x.flatten(1)[:, :1], spots(3), "one number"),
    ],
)
def test_what_makes_an_audit_meaningless_is_said_before_it_begins(subject, samples, said, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("an edit was made")

    monkeypatch.setattr("lynceus.trust.edits.audits.edit", never)
    with pytest.raises(AdviceError, match=said):
        audit(subject, samples, ("size=0.1",), quiet=True)


def test_pictures_without_an_object_are_left_out():
    none = Sample(image=spots(1)[0].image, masks=torch.zeros(0, 32, 32, dtype=torch.bool), label=0, id="empty")
    report = audit(centre, [none, *spots(4)], ("size=0.1",), quiet=True)
    assert report.summary["images"] == 4
    assert any("1 of 5 images without an object" in n for n in report.notes)


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    samples, asked = spots(8), ("size=0.1", "position=random", "background=random")
    whole = audit(centre, samples, asked, quiet=True, seed=4)
    clock = iter(np.arange(1000) * 1.0)
    monkeypatch.setattr("lynceus.trust.edits.audits.time.monotonic", lambda: next(clock))
    part = Edits(settings=asked, keep=tmp_path, seconds=3.5, quiet=True)(Subject(centre), samples, seed=4)
    monkeypatch.undo()
    assert 0 < part.summary["images"] < 8
    assert any("budget of 3.5 s ended after" in n for n in part.notes)
    made = []
    monkeypatch.setattr("lynceus.trust.edits.audits.edit", lambda *a, **k: made.append(1) or edit(*a, **k))
    rest = Edits(settings=asked, keep=tmp_path, quiet=True)(Subject(centre), samples, seed=4)
    for report in (part, rest):
        np.testing.assert_array_equal(report.arrays["right"], whole.arrays["right"][: len(report.arrays["right"])])
    assert rest.rows == whole.rows
    assert len(made) < 8 * 4 + 40  # pictures of the report are made again


def test_masks_are_guessed_where_asked():
    samples = [replace(s, masks=None) for s in spots(6)]
    report = audit(centre, samples, ("position=random",), masks="threshold", quiet=True)
    assert report.summary["images"] == 6
    assert any("guessed" in n for n in report.notes)
    flat = [Sample(image=torch.full((3, 32, 32), 9, dtype=torch.uint8), label=0)]
    with pytest.raises(AdviceError, match="In none of 1 images"):
        audit(centre, flat, ("position=random",), masks="threshold", quiet=True)


def test_pictures_of_different_sizes_are_edited_each_at_its_own():
    samples = [*spots(3), *spots(3, size=40)]

    def bright(image):
        mean = image.mean((1, 2, 3))
        return torch.stack([mean, 0.5 - mean], 1)

    report = audit(bright, samples, ("background=random", "size=0.3"), quiet=True)
    assert report.summary["images"] == 6
    one_shot = audit(bright, iter(samples), ("background=random", "size=0.3"), quiet=True)
    assert one_shot.rows == report.rows


class Smoother:
    """A denoiser that knows flat pictures: its guess of the clean image is the noisy one's local mean."""

    steps = 20

    def kept(self, t):
        return torch.cos((t.float() + 1) / self.steps * 1.4).square()[:, None, None, None]

    def q_sample(self, x, t, noise):
        return self.kept(t).sqrt() * x + (1 - self.kept(t)).sqrt() * noise

    def denoise(self, x, t):
        return torch.nn.functional.avg_pool2d(
            torch.nn.functional.pad(x / self.kept(t).sqrt(), (2, 2, 2, 2), mode="reflect"), 5, 1
        )


def test_recomposing_by_diffusion():
    model = Smoother()
    assert isinstance(model, Denoiser)
    sample = objects(2, size=32, grounds=["clouds"], seed=1)[0]
    ground, layer = sample.extra["ground"][None].float() / 255, sample.image[None].float() / 255
    mask = sample.masks[None]

    def run(**options):
        return recompose(model, ground, layer, mask, generator=torch.Generator().manual_seed(0), **options)

    near, far = run(start=2), run(start=18)
    for out in (near, far):
        assert torch.equal(out[mask.expand_as(out)], layer[mask.expand_as(out)])  # the object, bit by bit
        assert out.min() >= 0
        assert out.max() <= 1
    free = ~mask.expand_as(near)
    assert (near - ground)[free].abs().mean() < (far - ground)[free].abs().mean()  # the fewer steps, the closer
    assert torch.equal(run(start=6), run(start=6))

    def c(x):
        return torch.fft.fft2(torch.where(mask, 0.5, x)).abs().mean()

    assert c(run(start=8, guidance=-20)) < c(run(start=8)) < c(run(start=8, guidance=20))
    target = run(start=8, adversary=lambda x: 30 * x.mean((1, 2, 3)))
    assert target[free].mean() > run(start=8)[free].mean()
    with pytest.raises(AdviceError, match="1 to 20"):
        run(start=21)
    edited = edit(sample, position=(1, 1), diffusion=model, steps=3)
    assert torch.equal(
        edited.image[:, edited.masks[0]], edit(sample, position=(1, 1), blend="paste").image[:, edited.masks[0]]
    )
    assert edited.extra["edit"]["blend"] == "diffusion"


@pytest.fixture
def pictures(tmp_path):
    """images/CLASS/*.png with black and white masks/CLASS/*.png."""
    made = objects(12, size=32, seed=3)
    for i in range(12):
        sample = made[i]
        kind = list(GLYPHS)[sample.label]
        for folder, array in (
            ("images", sample.image.permute(1, 2, 0).numpy()),
            ("masks", sample.masks[0].numpy().astype(np.uint8) * 255),
        ):
            (tmp_path / "set" / folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "set" / folder / kind / f"{i}.png")
    return tmp_path / "set"


def test_folders_of_pictures_and_masks_have_labels(pictures):
    data = lynceus.data.open(pictures)
    assert data.classes == sorted(GLYPHS)
    assert data[0].label == 0
    assert edit(data[0], size=0.1).extra["edit"]["rate"] == pytest.approx(0.1, abs=0.015)


def test_the_command_line_opens_masks(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    flags = ["--settings", "size=0.1", "position=random", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["check", "edits", "resnet_nano", str(pictures), "--resize", "32", *flags]) == 0
    assert "position=random" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["summary"]["images"] == 12
    assert main(["check", "edits", "resnet_nano", "digits", "--limit", "4", "--quiet"]) == 2
    assert "masks" in capsys.readouterr().err


def test_coco_masks_serve_an_audit(tmp_path):
    lynceus.data.save(lynceus.data.synth.shapes(8, size=48, objects=(1, 3), seed=1), tmp_path / "coco", "coco")
    data = lynceus.data.open(tmp_path / "coco")
    subject = Subject(lambda x: x.mean((2, 3)), name="colour")
    report = audit(subject, data, ("position=random", "size=0.05"), quiet=True)
    assert report.summary["images"] == 8
    assert any("class of the edited mask" in n for n in report.notes)


@pytest.mark.slow
def test_audits_find_what_was_planted():
    """Nets trained on generated scenes: on centred upright objects and one ground; on all varied; on grounds that go
    with the classes."""
    from bench.trust_edits import audits

    narrow, varied, ground = audits()
    for setting_ in ("size=0.05", "position=random", "direction=45", "background=random"):
        assert narrow[f"{setting_} drop"] >= 20, narrow
        assert varied[f"{setting_} drop"] <= 6, varied
    assert narrow["identity drop"] <= 2
    assert varied["identity drop"] <= 2
    assert ground["background=random drop"] >= 30, ground
    assert ground["size=0.05 drop"] <= 8, ground


@pytest.mark.slow
def test_photographs_are_edited_without_an_exception(imagenet_jpegs):
    pytest.importorskip("cv2")
    from bench.trust_edits import real

    (row,) = real(50, folder=imagenet_jpegs[0].parent)
    assert row["pictures"] >= 50
    assert row["exceptions"] == 0, row


@pytest.mark.slow
def test_a_net_that_looks_for_seams_sees_few(imagenet_jpegs):
    pytest.importorskip("cv2")
    from bench.trust_edits import seams

    told = {row["blend"]: row["told apart %"] for row in seams(folder=imagenet_jpegs[0].parent)}
    assert told["feather"] <= 65, told
    assert told["paste"] >= 80, told
