"""The mistakes of a first hour: each gets one paragraph and exit code 2; what only looks like one works."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus import create_model
from lynceus.cli.__main__ import main
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import save_model


def picture(path, size=(32, 32), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight pictures."""
    for name in ("cat", "dog"):
        for i in range(8):
            picture(tmp_path / "photos" / name / f"{i}.png", seed=hash((name, i)) % 2**32)
    return tmp_path / "photos"


@pytest.fixture
def trained(tmp_path):
    """A saved predictor of two classes."""
    save_model(Classify(classes=("cat", "dog")).build(create_model("resnet_nano", num_classes=2)), tmp_path / "trained")
    return tmp_path / "trained"


def told(capsys, argv, *said):
    """Runs a verb that must refuse: exit code 2, one paragraph that holds `said`, no traceback."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err, captured.err
    assert code == 2, captured
    for text in said:
        assert text in captured.err, captured.err
    message = captured.err[captured.err.index("lynceus ") :]
    assert "\n\n" not in message.strip()


def works(capsys, argv):
    code = main([str(a) for a in argv])
    assert code == 0, capsys.readouterr().err
    return capsys.readouterr().out


TRAIN = ("--steps", "1", "--batch-size", "4", "--quiet")


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    told(capsys, ["train", "classify", tmp_path / "empty", "--out", tmp_path / "o"], str(tmp_path / "empty"))
    told(capsys, ["data", tmp_path / "empty"], str(tmp_path / "empty"))


def test_only_one_class(photos, tmp_path, capsys):
    shutil.rmtree(photos / "dog")
    told(capsys, ["train", "classify", photos, "--out", tmp_path / "o"], "cat", "class")


def test_class_folders_one_level_too_deep(photos, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    photos.rename(tmp_path / "deep" / "photos")
    told(capsys, ["train", "classify", tmp_path / "deep", "--out", tmp_path / "o"], str(tmp_path / "deep" / "photos"))


def test_labels_file_missing(tmp_path, capsys):
    told(capsys, ["train", "classify", tmp_path / "labels.csv", "--out", tmp_path / "o"], str(tmp_path / "labels.csv"))


def test_labels_for_unknown_pictures(photos, tmp_path, capsys):
    rows = "".join(f"photos/{c}/{i}.png,{c}\n" for c in ("cat", "dog") for i in range(6, 10))
    (tmp_path / "labels.csv").write_text("path,label\n" + rows)
    told(capsys, ["train", "classify", tmp_path / "labels.csv", "--out", tmp_path / "o"], "8.png")


def test_yolo_class_index_equals_number_of_classes(tmp_path, capsys):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [cat, dog]\n")
    told(capsys, ["data", tmp_path / "data.yaml"], "a.txt", "2")


def test_coco_without_its_images(tmp_path, capsys):
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}],
        "categories": [{"id": 7, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    told(capsys, ["data", tmp_path / "instances.json"], "a.jpg")


@pytest.mark.parametrize(("name", "cut"), [("truncated.jpg", 300), ("zero.jpg", 0)])
def test_one_broken_file_is_named_and_skipped(photos, trained, tmp_path, capsys, caplog, name, cut):
    whole = picture(tmp_path / "whole.jpg", size=(64, 64)).read_bytes()
    (photos / "cat" / name).write_bytes(whole[:cut])
    out = works(capsys, ["data", photos])
    assert name in out
    works(capsys, ["predict", trained, photos, "--out", tmp_path / "p"])
    assert name in caplog.text
    assert name not in (tmp_path / "p" / "predictions.csv").read_text()


def test_a_folder_of_broken_files(photos, tmp_path, capsys):
    for i in range(8):
        (photos / "cat" / f"{i}.png").write_bytes(b"")
    told(capsys, ["train", "classify", photos, *TRAIN, "--out", tmp_path / "o"], "cat", "0.png")


def test_kinds_of_pictures_that_simply_work(trained, tmp_path, capsys):
    folder = tmp_path / "Bilder für später"  # non-ASCII and spaces
    picture(folder / "grey.png", mode="L")
    picture(folder / "cmyk.jpg", mode="CMYK")
    picture(folder / "tiny.png", size=(2, 3))  # smaller than a patch
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64).save(folder / "sixteen.png")
    works(capsys, ["predict", trained, folder, "--out", tmp_path / "p"])
    table = (tmp_path / "p" / "predictions.csv").read_text()
    assert all(name in table for name in ("grey.png", "cmyk.jpg", "tiny.png", "sixteen.png"))


def test_relative_paths_say_where_they_were_looked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(capsys, ["data", "photos"], str(tmp_path / "photos"))
    told(capsys, ["train", "classify", "digits", "--config", "run.yaml"], str(tmp_path / "run.yaml"))


def test_misspelt_model_and_option(tmp_path, capsys):
    told(capsys, ["train", "classify", "digits", "--model", "resnet_nan", "--out", tmp_path / "o"], "resnet_nano")
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit) as end:
        main(["train", "classify", "digits", "--epoch", "3"])
    assert end.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_checkpoint_of_another_kind(tmp_path, capsys):
    save_model(create_model("resnet_nano", num_classes=0), tmp_path / "features")
    told(capsys, ["check", "accuracy", tmp_path / "features", "digits"], "classes")
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    told(capsys, ["predict", tmp_path / "weights.pth", "digits"], "weights.pth")


def test_checkpoint_with_other_classes(photos, tmp_path, capsys):
    save_model(Classify(classes=("dog", "cat")).build(create_model("resnet_nano", num_classes=2)), tmp_path / "m")
    told(capsys, ["check", "accuracy", tmp_path / "m", photos], "cat", "dog")


def test_fresh_network_cannot_predict(tmp_path, capsys):
    told(capsys, ["predict", "resnet_nano", "digits", "--out", tmp_path / "p"], "lynceus train")


def test_batch_too_large_for_memory(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    monkeypatch.setattr("lynceus.tasks.classify.Classifier.forward", full)
    told(capsys, ["train", "classify", "digits", *TRAIN, "--out", tmp_path / "o"], "batch")


def test_resume_with_changed_options(tmp_path, capsys):
    run = ["train", "classify", "digits", "--limit", "40", *TRAIN, "--out", tmp_path / "run"]
    works(capsys, run)
    told(capsys, [*run, "--resume", "--lr", "0.1"], "lr: 0.002 -> 0.1")
    told(capsys, run, "already holds a run")


@pytest.mark.parametrize("verb", [["export", "resnet_nano"], ["train", "classify", "digits"], ["gauntlet", "digits"]])
def test_folder_without_rights(verb, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    told(capsys, [*verb, "--out", tmp_path / "file" / "inside"], "--out")


def test_weights_that_are_not_there(tmp_path, capsys):
    run = ["train", "classify", "digits", *TRAIN, "--weights", tmp_path / "resnet18.pth", "--out", tmp_path / "o"]
    told(capsys, run, "resnet18.pth")


def test_camera_is_said_to_be_unknown(trained, tmp_path, capsys):
    told(capsys, ["predict", trained, "camera:3", "--out", tmp_path / "p"], "camera:3")


def test_loss_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_losses.py").write_text(
        "def half(raw, batch):\n    return {'loss': raw.square().mean()}\n\n"
        "def bare(raw, batch):\n    return raw.mean()\n"
    )
    run = ["train", "classify", "digits", "--limit", "40", *TRAIN]
    works(capsys, [*run, "--loss", "my_losses:half", "--out", "a"])
    told(capsys, [*run, "--loss", "my_losses:bare", "--out", "b"], "dict with 'loss'")
    told(capsys, [*run, "--loss", "my_losses:hlaf", "--out", "c"], "half")
    told(capsys, [*run, "--loss", "no_such:half", "--out", "d"], "no_such")
