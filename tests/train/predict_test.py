"""predict takes pictures in any form and gives the same answers; Evaluate counts what predict says."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus import Subject, create_model
from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import save_model
from lynceus.train.evaluate import Evaluate
from lynceus.train.predict import predict, save_all, to_csv


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classify(num_classes=10, image_size=16).build(create_model("convnext_nano")).eval()


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 20, 26, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{i}.png")
    return root


def scores(predictions):
    return torch.stack([p.scores for p in predictions])


def test_every_form_of_source_gives_the_same(model, pictures, folder):
    from lynceus.data import open_dataset

    array = predict(model, pictures)
    files = sorted(folder.glob("*.png"))
    as_tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    sources = {
        "folder": folder,
        "folder name": str(folder),
        "paths": files,
        "PIL": [Image.open(f) for f in files],
        "samples": [Sample(image=t) for t in as_tensor],
        "tensor": as_tensor,
        "dataset": open_dataset(folder),
        "mixed": [files[0], Image.open(files[1]), pictures[2], Sample(image=as_tensor[3]), str(files[4])],
    }
    for name, source in sources.items():
        found = predict(model, source, quiet=True)
        torch.testing.assert_close(scores(found), scores(array), rtol=1e-5, atol=1e-6, msg=name)
        assert [p.label for p in found] == [p.label for p in array], name
    one = predict(model, files[2])
    assert len(one) == 1
    torch.testing.assert_close(one[0].scores, array[2].scores, rtol=1e-5, atol=1e-6)
    assert predict(model, Image.open(files[2]))[0].label == one[0].label


def test_batches_do_not_matter(model, pictures):
    torch.testing.assert_close(
        scores(predict(model, pictures, batch_size=2)), scores(predict(model, pictures)), rtol=1e-5, atol=1e-6
    )


def test_pictures_of_many_sizes_with_and_without_a_size_of_the_model(model, pictures):
    mixed = [pictures[0], pictures[1][:12], pictures[2][:, :9], pictures[3]]
    assert [p.label for p in predict(model, mixed)] == [predict(model, p[None])[0].label for p in mixed]
    free = Classify(num_classes=10).build(create_model("resnet_nano")).eval()
    torch.testing.assert_close(
        scores(predict(free, mixed)), torch.cat([scores(predict(free, p[None])) for p in mixed]), rtol=1e-4, atol=1e-5
    )


def test_odd_pictures(model, tmp_path):
    ramp = np.linspace(0, 255, 20 * 26).reshape(20, 26)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.repeat(ramp.astype(np.uint8)[..., None], 3, 2)).convert("CMYK").save(
        tmp_path / "print.jpg", quality=95
    )
    found = {p.id: p for p in predict(model, [tmp_path / n for n in ("grey.png", "deep.png", "print.jpg")])}
    grey, deep, cmyk = found.values()
    torch.testing.assert_close(grey.scores, deep.scores, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(grey.scores, cmyk.scores, rtol=0.2, atol=0.02)


def test_a_path_is_as_good_as_the_model(model, pictures, tmp_path):
    save_model(model, tmp_path)
    assert torch.equal(scores(predict(tmp_path, pictures)), scores(predict(model, pictures)))


def test_results_can_be_kept(model, pictures, folder, tmp_path):
    found = predict(model, folder)
    json.loads(found[0].to_json())
    assert found[0].extra["path"].endswith("0.png")
    table = save_all(found, tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert [r["id"] for r in rows] == [p.id for p in found]
    assert sum(float(rows[0][f"p({i})"]) for i in range(10)) == pytest.approx(1, abs=1e-4)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert predict(model, pictures, keep_images=False)[0].image is None
    assert to_csv(found, tmp_path / "other.csv").is_file()


@pytest.mark.parametrize(("source", "text"), [([], "empty"), (3, "not int"), ("no/such/folder", "no/such/folder")])
def test_what_is_no_source(model, source, text):
    with pytest.raises(AdviceError, match=text):
        predict(model, source)


def test_evaluate_counts_what_predict_says(model, digits):
    part = digits.subset(range(150))
    report = Evaluate(quiet=True)(Subject(model), part)
    found = predict(model, part)
    right = np.mean([p.label == t for p, t in zip(found, part.labels)])
    assert report.summary["accuracy"] == pytest.approx(right)
    assert report.arrays["confusion"].sum() == 150
    assert np.trace(report.arrays["confusion"]) == round(right * 150)
    assert sum(r["images"] for r in report.rows) == 150
    # the worst pictures are those with the highest loss
    loss = -np.log(report.arrays["scores"][np.arange(150), part.labels])
    assert report.arrays["worst"].tolist() == np.argsort(-loss, kind="stable")[:12].tolist()
    assert report.figures["worst pictures.png"].startswith(b"\x89PNG")


def test_evaluate_takes_samples_and_plain_models(model, digits):
    part = digits.subset(range(40))
    whole = Evaluate(quiet=True)(Subject(model), part).summary["accuracy"]
    assert Evaluate(quiet=True, batch_size=7)(model, [part[i] for i in range(40)]).summary["accuracy"] == pytest.approx(
        whole
    )
    assert Evaluate(quiet=True)(Subject(lambda x: model(x), classes=list("0123456789")), iter(part)).summary[
        "accuracy"
    ] == pytest.approx(whole)


def test_evaluate_refuses_what_it_cannot_measure(model, digits):
    with pytest.raises(AdviceError, match="label"):
        Evaluate(quiet=True)(model, [Sample(image=torch.zeros(3, 8, 8))] * 2)
    with pytest.raises(AdviceError, match="empty"):
        Evaluate(quiet=True)(model, [])
    three = Classify(num_classes=3).build(create_model("resnet_nano")).eval()
    with pytest.raises(AdviceError, match="label 9"):
        Evaluate(quiet=True)(three, digits)
