"""What beginners really have: each broken input gives one message with the file's name and what to do about it."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus import data
from lynceus.core.errors import AdviceError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LYNCEUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    return folder


def picture(path, size=(40, 30), mode="RGB", seed=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(str(path))) % 2**32 if seed is None else seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def classes(root, names=("cat", "dog"), count=4):
    for c in names:
        for i in range(count):
            picture(root / c / f"{i}.jpg", quality=95)
    return root


def advice(call, *parts):
    """The one message of `call`: one paragraph that holds every part."""
    with pytest.raises(AdviceError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"
    return text


def test_an_empty_folder(root):
    advice(lambda: data.open(root), root, "is empty", "one folder per class")


def test_a_folder_without_pictures(root):
    (root / "notes.docx").write_text("x")
    advice(lambda: data.open(root), root, "no picture", "notes.docx", ".jpg")


def test_only_one_class(root):
    classes(root, ("cat",))
    advice(lambda: data.open(root), root, "only one class, 'cat'", "labels=False")
    assert len(data.open(root, labels=False)) == 4


def test_an_empty_class(root):
    classes(root)
    (root / "owl").mkdir()
    d = data.open(root)
    assert d.classes == ["cat", "dog"]
    assert any("owl" in n for n in d.notes)
    assert any("owl" in row["first"] for row in d.check().rows)
    for i in range(4):
        (root / "dog" / f"{i}.jpg").unlink()
    advice(lambda: data.open(root), "only one class, 'cat'", "dog, owl hold no picture")


def test_class_folders_one_level_too_deep(root):
    classes(root / "archive")
    advice(
        lambda: data.open(root), root, "one level too deep", "'archive'", "cat, dog", f"Open {root / 'archive'} instead"
    )
    assert data.open(root / "archive").classes == ["cat", "dog"]


def test_a_zip_inside(root):
    (root / "images.zip").write_bytes(b"PK\x03\x04")
    advice(lambda: data.open(root), "images.zip", "Unpack it", "python -m zipfile -e")
    advice(lambda: data.open(root / "images.zip"), root / "images.zip", "archive", "unpack")


def test_a_path_that_is_not_there(root, monkeypatch):
    classes(root / "train_images")
    advice(lambda: data.open(root / "train_imags"), root / "train_imags", "Did you mean", root / "train_images")
    monkeypatch.chdir(root)
    advice(lambda: data.open("nowhere/x"), root / "nowhere" / "x", f"'nowhere/x' relative to {root}")
    assert len(data.open("train_images")) == 8, "a relative path is taken from where one stands"


def test_windows_separators(root, monkeypatch):
    classes(root / "set")
    monkeypatch.chdir(root)
    (root / "set" / "x").mkdir()
    advice(lambda: data.open("set\\cat"), "write the path with /", "'set/cat'")
    (root / "labels.csv").write_text("path,label\nset\\cat\\0.jpg,cat\nset\\dog\\0.jpg,dog\n")
    d = data.open(root / "labels.csv")
    assert d[0].image.shape == (3, 30, 40)
    assert any("Windows separators" in n and "labels.csv" in n and "Write /" in n for n in d.notes)


def test_swapped_columns(root):
    classes(root)
    (root / "labels.csv").write_text("path,label\ncat,cat/0.jpg\ndog,dog/0.jpg\n")
    advice(lambda: data.open(root / "labels.csv"), root / "labels.csv", "swapped", "columns=")


def test_labels_for_unknown_pictures(root):
    classes(root)
    (root / "labels.csv").write_text("path,label\ncat/0.jpg,cat\ncat/77.jpg,cat\ndog/0.jpg,dog\n")
    advice(lambda: data.open(root / "labels.csv"), "labels.csv, line 3", root / "cat" / "77.jpg", "delete the row")


def test_a_csv_of_another_folder(root, monkeypatch):
    classes(root / "pics")
    (root / "tables").mkdir()
    (root / "tables" / "labels.csv").write_text("path,label\npics/cat/0.jpg,cat\npics/dog/0.jpg,dog\n")
    monkeypatch.chdir(root)
    advice(lambda: data.open("tables/labels.csv"), "line 2", "relative to the file, not to", root)


def test_a_csv_without_known_columns_or_with_ragged_rows(root):
    (root / "a.csv").write_text("foo,bar\n1,2\n")
    advice(lambda: data.open(root / "a.csv"), root / "a.csv", "no column of paths", "foo, bar", "columns=")
    classes(root)
    (root / "b.csv").write_text("path,label\ncat/0.jpg\n")
    advice(lambda: data.open(root / "b.csv"), "b.csv, line 2", "1 columns, the header has 2")


def test_a_missing_labels_folder(root):
    picture(root / "images" / "train" / "0.jpg")
    advice(lambda: data.open(root), root, "no labels beside it", "labels/ (YOLO)", root / "images")
    (root / "data.yaml").write_text("train: images/train\nnames: [a, b]\n")
    advice(lambda: data.open(root), root / "data.yaml", "no label files", "image.txt", root / "labels" / "train")


def yolo(root, line, names=("a", "b"), path="."):
    picture(root / "images" / "train" / "p.jpg")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "p.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    (root / "data.yaml").write_text(f"path: {path}\ntrain: images/train\nnames: {json.dumps(list(names))}\n")
    return root


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("80 0.5 0.5 0.1 0.1", ["p.txt, line 2", "class index 80", "names 80 classes", "0 to 79"]),
        ("0 320 240 50 60", ["p.txt, line 2", "outside 0..1", "Divide"]),
        ("0 0.5 0.5", ["p.txt, line 2", "class cx cy w h"]),
        ("cat 0.5 0.5 0.1 0.1", ["p.txt, line 2", "not numbers"]),
        ("0.5 0.5 0.5 0.1 0.1", ["p.txt, line 2", "not a whole number"]),
    ],
)
def test_yolo_lines(root, line, parts):
    yolo(root, line, names=[f"c{i}" for i in range(80)])
    advice(lambda: data.open(root), *parts)


def test_yaml_paths_are_relative_to_the_yaml(root, monkeypatch, tmp_path):
    yolo(root, "1 0.5 0.5 0.2 0.2")
    monkeypatch.chdir(tmp_path)
    assert len(data.open(root / "data.yaml")) == 1
    (root / "data.yaml").write_text("path: elsewhere\ntrain: pics\nnames: [a, b]\n")
    advice(lambda: data.open(root), root / "data.yaml", "train", root / "elsewhere" / "pics", "relative to the file")
    (root / "data.yaml").write_text("train: images/train\nnc: 3\nnames: [a, b]\n")
    advice(lambda: data.open(root), root / "data.yaml", "nc is 3", "2 entries")


def coco(root, pictures=True, **annotation):
    if pictures:
        picture(root / "images" / "p.jpg")
    one = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0} | annotation
    record = {"images": [{"id": 1, "file_name": "p.jpg", "height": 30, "width": 40}], "annotations": [one]}
    record["categories"] = [{"id": 1, "name": "x"}]
    root.mkdir(exist_ok=True)
    (root / "a.json").write_text(json.dumps(record))
    return root / "a.json"


def test_coco_without_pictures(root):
    file = coco(root, pictures=False)
    advice(lambda: data.open(file), file, "'p.jpg'", "Put them into", root / "images")


def test_coco_with_what_does_not_fit(root):
    advice(lambda: data.open(coco(root, category_id=2)), "a.json", "annotation 5", "category 2")
    advice(lambda: data.open(coco(root, image_id=9)), "a.json", "annotation 5", "picture 9")
    file = coco(root)
    file.write_text(file.read_text()[:-30])
    advice(lambda: data.open(file, layout="coco"), file, "no valid JSON", "copied whole")
    (root / "b.json").write_text('{"a": 1}')
    advice(lambda: data.open(root / "b.json"), root / "b.json", "no COCO file")


def test_boxes_that_are_wrong_are_found_by_the_check(root):
    file = coco(root, bbox=[35, 20, 20, 5])
    report = data.open(file).check()
    assert any(r["problem"] == "box outside" and "p.jpg" in r["first"] for r in report.rows)
    file = coco(root, bbox=[5, 5, 0, 5])
    advice(lambda: data.open(file).check(strict=True), "degenerate box", "p.jpg", "positive width")


def masks(root, size=(40, 30), value=1, mode="L"):
    picture(root / "images" / "p.jpg")
    (root / "masks").mkdir()
    Image.new(mode, size, value).save(root / "masks" / "p.png")
    (root / "classes.txt").write_text("sky\nroad\n")
    return root


def test_masks(root, tmp_path):
    d = data.open(masks(root, size=(30, 40)))
    advice(lambda: d[0], root / "masks" / "p.png", "40 x 30", "30 x 40", "picture's size")
    other = masks(tmp_path / "b", value=2)
    advice(lambda: data.open(other)[0], other / "masks" / "p.png", "value 2", "2 classes", "0 to 1")
    advice(lambda: data.open(other).check(strict=True), other / "masks" / "p.png", "value 2")
    colour = masks(tmp_path / "c", mode="RGB", value=(9, 8, 7))
    advice(lambda: data.open(colour)[0], colour / "masks" / "p.png", "colour picture", "one number per pixel")
    picture(root / "images" / "q.jpg")
    advice(lambda: data.open(root), "q.jpg", root / "masks" / "q.png")


def test_voc(root):
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    (root / "Annotations" / "a.xml").write_text("<annotation><filename>a.jpg</filename></annotation>")
    advice(lambda: data.open(root), root / "Annotations" / "a.xml", "'a.jpg'", root / "JPEGImages")
    (root / "Annotations" / "a.xml").write_text("<annotation><file")
    advice(lambda: data.open(root), root / "Annotations" / "a.xml", "no valid XML")


def test_truncated_and_empty_files_are_named_and_skipped(root, caplog):
    classes(root, count=20)
    cut = root / "cat" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (root / "dog" / "7.jpg").write_bytes(b"")
    d = data.open(root, in_memory=False)
    assert len(d) == 39
    assert d.unreadable == {"dog/7.jpg": "the file is empty (0 bytes); copy it again or delete it"}
    assert sum(len(b) for b in data.loader(d, 8)) == 38
    assert set(d.unreadable) == {"dog/7.jpg", "cat/3.jpg"}
    assert str(cut) in caplog.text
    report = data.open(root).check()
    assert report.summary["unreadable"] == 2
    assert len(data.open(root)) == 38, "small pictures are decoded when opened, so that both are known"
    advice(lambda: data.open(root).check(strict=True), "cat/3.jpg", "dog/7.jpg", "copy these files again")
    advice(lambda: data.open(root, max_bad=1), "2 of 40", "more than the 1 allowed", "max_bad=")


def test_grey_16_bit_cmyk_and_rotated_files_are_read_rightly_and_told(root):
    classes(root)
    picture(root / "cat" / "grey.png", mode="L")
    picture(root / "cat" / "cmyk.jpg", mode="CMYK", quality=95)
    Image.fromarray(np.full((30, 40), 0x8080, np.uint16)).save(root / "cat" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "cat" / "phone.jpg", exif=exif)
    d = data.open(root, in_memory=False)
    by = {s.id: s.image for s in d}
    assert all(i.dtype == torch.uint8 and i.shape[0] == 3 for i in by.values())
    assert by["cat/deep.png"].unique().tolist() == [0x80]
    assert by["cat/phone.jpg"].shape == (3, 40, 30)
    with Image.open(root / "cat" / "cmyk.jpg") as opened:
        expected = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    assert (by["cat/cmyk.jpg"].int() - expected.int()).abs().max() <= 2
    said = {r["problem"]: r["first"] for r in d.check().rows if r["problem"]}
    assert "grey.png" in said["grey"]
    assert "cmyk.jpg" in said["CMYK"]
    assert "deep.png" in said["16-bit or float"]
    assert "phone.jpg (orientation 6)" in said["EXIF rotated"]
    d.check(strict=True)


def test_names_with_spaces_and_other_letters(tmp_path):
    root = classes(tmp_path / "Bilder für später 写真", ("Kühe und Kälber", "кошки"))
    d = data.open(root)
    assert d.classes == ["Kühe und Kälber", "кошки"]
    assert len(d.__getitems__(range(8))) == 8


def test_a_picture_in_two_splits_or_two_classes(root):
    for split in ("train", "test"):
        classes(root / split)
    os.replace(root / "train" / "cat" / "0.jpg", root / "x.jpg")
    for place in ("train/cat/0.jpg", "test/cat/1.jpg"):
        (root / place).write_bytes((root / "x.jpg").read_bytes())
    (root / "x.jpg").unlink()
    text = advice(
        lambda: data.open(root).check(strict=True), "duplicate across splits", "train/cat/0.jpg", "test/cat/1.jpg"
    )
    assert "delete the picture from one of the splits" in text
    (root / "train" / "dog" / "0.jpg").write_bytes((root / "train" / "cat" / "1.jpg").read_bytes())
    assert "one picture, two classes" in data.open(root).check().summary


def test_splits_with_different_classes(root):
    classes(root / "train", ("cat", "dog", "owl"))
    classes(root / "test", ("cat", "dog"))
    d = data.open(root)
    assert any("split test has no picture of: owl" in n for n in d.notes)
    advice(lambda: d.check(strict=True), "class missing in split", "owl in test")


def test_strict_shows_the_first_five(root):
    classes(root, count=8)
    for i in range(7):
        (root / "cat" / f"{i}.jpg").write_bytes(b"nothing")
    d = data.open(root, max_bad=10)
    text = advice(lambda: d.check(strict=True), "7 problems", "cat/4.jpg", "...")
    assert "cat/5.jpg" not in text


def test_a_label_beyond_the_class_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture(tmp_path / "p.png")
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [(tmp_path / "p.png").read_bytes()] * 2, "label": [0, 2]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(info)}), tmp_path / "t.parquet")
    advice(lambda: data.open(tmp_path / "t.parquet"), tmp_path / "t.parquet", "row 1", "label 2", "from 0 to 1")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    advice(
        lambda: data.open(tmp_path / "bad.parquet"), tmp_path / "bad.parquet", "no readable parquet", "Copy it again"
    )
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "c.parquet")
    advice(lambda: data.open(tmp_path / "c.parquet"), tmp_path / "c.parquet", "a, b", "columns=")


def test_a_count_of_labels_that_does_not_fit():
    advice(lambda: data.open(np.zeros((5, 8, 8), np.uint8), labels=[0, 1]), "2 labels for 5 pictures")
