"""The layouts: each is recognised from a tiny fixture, read rightly, and written where it can be."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.data.boxes import decode_rle, encode_rle
from lynceus.data.formats.masks import to_boxes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LYNCEUS_CACHE", str(tmp_path / "cache"))


def picture(path, size=(40, 30), value=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(path.name)) % 2**32)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) if value is None else None
    image = Image.fromarray(pixels) if pixels is not None else Image.new("RGB", size, (value,) * 3)
    image.convert(mode).save(path)
    return path


def folder(root):
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            for i in range(2):
                picture(root / split / c / f"{i}.png")
    picture(root / "train" / "cat" / "inner" / "9.png")
    picture(root / "train" / "cat" / ".hidden.png")


def test_image_folder(tmp_path):
    folder(tmp_path)
    d = data.open(tmp_path)
    assert d.layout == "folder"
    assert d.classes == ["cat", "dog"]
    assert len(d) == 9
    assert len(data.open(tmp_path, split="train")) == 5
    assert len(data.open(tmp_path, split="test")) == 4, "val stands for test when it is alone"
    train, test = d.train_test()
    assert (len(train), len(test)) == (5, 4)
    assert d[0].path.endswith("train/cat/0.png")
    with pytest.raises(AdviceError, match=r"no split 'trian'.*'train'"):
        data.open(tmp_path, split="trian")


def test_class_order_is_torchvisions_and_numbers_are_warned_of(tmp_path):
    from torchvision.datasets import ImageFolder

    for c in ("10", "2", "1"):
        picture(tmp_path / c / "a.png")
    d = data.open(tmp_path)
    assert d.classes == ImageFolder(tmp_path).classes == ["1", "10", "2"]
    assert any('"10" comes before "2"' in n for n in d.notes)


def test_flat_folder_list_file_and_single_picture(tmp_path):
    names = [picture(tmp_path / "p" / f"{i}.png") for i in range(3)]
    assert data.open(tmp_path / "p").labels is None
    assert len(data.open([str(n) for n in names])) == 3
    assert len(data.open(names[0])) == 1
    (tmp_path / "list.txt").write_text("p/0.png\np/2.png\n")
    assert [s.path for s in data.open(tmp_path / "list.txt")] == [str(names[0]), str(names[2])]
    named = data.open(names, labels=["dog", "cat", "dog"])
    assert (named.classes, named.labels.tolist()) == (["cat", "dog"], [1, 0, 1])
    folder(tmp_path / "f")
    assert data.open(tmp_path / "f", labels=False).labels is None


def test_csv_and_tsv(tmp_path):
    for i in range(4):
        picture(tmp_path / "pics" / f"{i} a.png")
    rows = [f"pics/{i} a.png,{'cat' if i % 2 else 'dog'},{'train' if i < 3 else 'test'}" for i in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    d = data.open(tmp_path / "labels.csv")
    assert (d.layout, d.classes, d.labels.tolist()) == ("csv", ["cat", "dog"], [1, 0, 1, 0])
    assert len(data.open(tmp_path, split="test")) == 1
    (tmp_path / "several.tsv").write_text("file\ttags\npics/0 a.png\tred|round\npics/1 a.png\tround\npics/2 a.png\t\n")
    d = data.open(tmp_path / "several.tsv")
    assert d.classes == ["red", "round"]
    assert [s.label.tolist() for s in d] == [[1, 1], [0, 1], [0, 0]]
    assert next(iter(data.loader(d, 3))).label.shape == (3, 2)
    (tmp_path / "bare.csv").write_text("pics/0 a.png,1\npics/1 a.png,0\n")
    assert data.open(tmp_path / "bare.csv").labels.tolist() == [1, 0]
    odd = tmp_path / "odd.csv"
    odd.write_text("where,what\npics/0 a.png,x\npics/1 a.png,y\n")
    assert data.open(odd, columns={"image": "where", "label": "what"}).classes == ["x", "y"]


def coco(root, **changes):
    for n in ("a.png", "b.png", "c.png"):
        picture(root / "images" / n)
    record = {
        "images": [{"id": 7, "file_name": "a.png", "height": 30, "width": 40}]
        + [{"id": k, "file_name": n, "height": 30, "width": 40} for k, n in ((9, "b.png"), (8, "c.png"))],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 5], "area": 50, "iscrowd": 0}
            | {"segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]},
            {"id": 2, "image_id": 8, "category_id": 13, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 1}
            | {"segmentation": {"size": [30, 40], "counts": [0, 4, 26, 4, 26, 4, 26, 4, 30 * 40 - 94]}},
        ],
    } | changes
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "instances_val.json").write_text(json.dumps(record))
    return root


def test_coco(tmp_path):
    for source in (coco(tmp_path), tmp_path / "annotations" / "instances_val.json"):
        d = data.open(source)
        assert (d.layout, d.classes) == ("coco", ["person", "sign", "toothbrush"])
        assert d.inverse == {0: 1, 1: 13, 2: 90}
        assert d[0].boxes.tolist() == [[2, 3, 12, 8]]
        assert d[0].classes.tolist() == [2]
        assert d[0].masks.sum() == 50
        assert d[0].masks[0, 3:8, 2:12].all()
        assert d[1].boxes.shape == (0, 4), "a picture without annotation is kept"
        assert d[2].extra["iscrowd"].tolist() == [1]
        assert d[2].masks[0, :4, :4].all()
        assert d[2].masks.sum() == 16


def test_run_lengths_agree_with_the_reference():
    from pycocotools import mask as reference

    rng = np.random.default_rng(0)
    for k in range(20):
        mask = rng.random((17, 23)) < (0, 0.05, 0.5, 0.97, 1)[k % 5]
        ours = encode_rle(torch.from_numpy(mask))
        assert (decode_rle(json.dumps(ours), mask.shape).numpy() == mask).all()
        packed = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = json.dumps({"size": list(packed["size"]), "counts": packed["counts"].decode()})
        assert (decode_rle(text, mask.shape).numpy() == mask).all()
        assert (reference.decode(reference.frPyObjects(ours, 17, 23)) == mask).all()


def yolo(root, names=("ball", "cube"), lines="1 0.5 0.5 0.25 0.2\n"):
    for split in ("train", "val"):
        for i in range(2):
            picture(root / "images" / split / f"{i}.png")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "0.txt").write_text(lines)
    listed = json.dumps(list(names))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {listed}\n")
    return root


def test_yolo(tmp_path, monkeypatch):
    yolo(tmp_path / "set")
    monkeypatch.chdir("/")
    for source in (tmp_path / "set", tmp_path / "set" / "data.yaml"):
        d = data.open(source)
        assert (d.layout, d.classes, len(d)) == ("yolo", ["ball", "cube"], 4)
        sample = data.open(source, split="val")[0]
        assert torch.allclose(sample.boxes, torch.tensor([[15.0, 12, 25, 18]]))
        assert sample.classes.tolist() == [1]
        assert d[1].boxes.shape == (0, 4)
        assert "background" in d.notes[0]
    outline = tmp_path / "polygons"
    yolo(outline, lines="0 0.25 0.2 0.75 0.2 0.75 0.8 0.25 0.8\n")
    sample = data.open(outline)[0]
    assert torch.allclose(sample.boxes, torch.tensor([[10.0, 6, 30, 24]]))
    assert int(sample.masks.sum()) == 20 * 18


def voc(root):
    picture(root / "JPEGImages" / "x.png")
    picture(root / "JPEGImages" / "y.png")
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    for name, objects in (("x", f"<object><name>dog</name><difficult>1</difficult>{box}</object>"), ("y", "")):
        (root / "Annotations").mkdir(exist_ok=True)
        text = f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("x\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("y\n")
    return root


def test_voc(tmp_path):
    d = data.open(voc(tmp_path))
    assert d.layout == "voc"
    assert len(d.classes) == 20, "names of VOC's own classes keep VOC's order"
    assert d[0].boxes.tolist() == [[2, 3, 12, 8]]
    assert d.classes[int(d[0].classes[0])] == "dog"
    assert d[0].extra["difficult"].tolist() == [1]
    assert len(data.open(tmp_path, split="val")) == 1
    assert d[1].boxes.shape == (0, 4)


def masks(root, palette=False, value=2):
    ids = np.zeros((30, 40), np.uint8)
    ids[5:10, 6:20] = value
    ids[0] = 255
    for i in range(2):
        picture(root / "images" / f"{i}.jpg")
        (root / "masks").mkdir(exist_ok=True)
        mask = Image.fromarray(ids)
        if palette:
            mask = mask.convert("P") if not palette else Image.frombytes("P", (40, 30), ids.tobytes())
            mask.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
        mask.save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("sky\ngrass\nroad\n")
    return root


@pytest.mark.parametrize("palette", [False, True])
def test_masks(tmp_path, palette):
    d = data.open(masks(tmp_path, palette))
    assert (d.layout, d.classes) == ("masks", ["sky", "grass", "road"])
    segments = d[0].segments
    assert segments.shape == (30, 40)
    assert segments.unique().tolist() == [0, 2, 255]
    assert segments[5:10, 6:20].unique().tolist() == [2]


def test_anomaly(tmp_path):
    for i in range(2):
        picture(tmp_path / "train" / "good" / f"{i}.png")
    picture(tmp_path / "test" / "good" / "5.png")
    picture(tmp_path / "test" / "crack" / "6.png")
    picture(tmp_path / "ground_truth" / "crack" / "6_mask.png", value=255, mode="L")
    d = data.open(tmp_path)
    assert (d.layout, d.classes) == ("anomaly", ["good", "crack"])
    assert len(data.open(tmp_path, split="train")) == 2
    test = data.open(tmp_path, split="test")
    assert sorted((s.label, int(s.segments.max())) for s in test) == [(0, 0), (1, 1)]


def hub_table(n=4):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.fromarray(np.full((9, 8, 3), 20 * i, np.uint8)) for i in range(n)]
    return datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(n)]}, features=features)


def test_hugging_face_on_disk_as_parquet_and_as_object(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = hub_table()
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([3, 1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "three" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "three" / "data" / "train-00000-of-00001.parquet")
    table.to_parquet(tmp_path / "three" / "data" / "test-00000-of-00001.parquet")
    for source in (tmp_path / "one", tmp_path / "three" / "data" / "test-00000-of-00001.parquet", table):
        d = data.open(source)
        assert (d.classes, d.labels.tolist()) == (["no", "yes"], [0, 1, 0, 1])
        assert d.images[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    d = data.open(tmp_path / "two", split="test")
    assert d.images[:, 0, 0, 0].tolist() == [60, 20]
    assert len(data.open(tmp_path / "three")) == 8
    assert len(data.open(tmp_path / "three", split="train")) == 4


def test_parquet_of_paths(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(3):
        picture(tmp_path / "p" / f"{i}.png")
    table = pa.table({"image": [f"p/{i}.png" for i in range(3)], "label": ["b", "a", "b"]})
    pq.write_table(table, tmp_path / "t.parquet")
    d = data.open(tmp_path / "t.parquet")
    assert (d.classes, d.labels.tolist()) == (["a", "b"], [1, 0, 1])
    assert d[0].image.shape == (3, 30, 40)
    (tmp_path / "p" / "0.png").unlink()
    with pytest.raises(AdviceError, match=r"holds paths and no bytes, and .*/p/0\.png is not there"):
        data.open(tmp_path / "t.parquet")


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 9), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_webdataset(tmp_path):
    for shard in range(3):
        keys = range(shard * 2, shard * 2 + 2)
        members = [(f"{k:04d}.{e}", c) for k in keys for e, c in (("png", png(k)), ("cls", str(k % 2).encode()))]
        tar(tmp_path / f"set-{shard:06d}.tar", [*members, (f"{shard * 2:04d}.txt", b"hello")])
    for source in (tmp_path, f"{tmp_path}/set-{{000000..000002}}.tar"):
        d = data.open(source)
        assert (d.layout, d.labels.tolist()) == ("webdataset", [0, 1] * 3)
        assert [int(s.image[0, 0, 0]) for s in d] == list(range(6))
        assert d[2].text == "hello"
    assert len(data.open(tmp_path / "set-000001.tar")) == 2
    ids = [i for b in data.loader(data.open(tmp_path), 2, workers=2, shuffle=True) for i in b.ids]
    assert sorted(ids) == [f"{k:04d}" for k in range(6)]
    with pytest.raises(AdviceError, match=r"1 of 4 shards are not there, the first .*set-000003\.tar"):
        data.open(f"{tmp_path}/set-{{000000..000003}}.tar")


def test_numpy_files(tmp_path):
    images = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1, 2, 0, 1, 2], classes=["x", "y", "z"])
    d = data.open(tmp_path / "a.npz")
    assert (d.classes, d.labels.tolist()) == (["x", "y", "z"], [0, 1, 2, 0, 1, 2])
    assert torch.equal(d.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    np.savez(tmp_path / "k.npz", x_train=images, y_train=np.arange(6), x_test=images[:2], y_test=np.arange(2))
    assert len(data.open(tmp_path / "k.npz", split="test")) == 2
    np.save(tmp_path / "b.npy", images[..., 0])
    assert data.open(tmp_path / "b.npy").images.shape == (6, 3, 8, 8)
    assert data.open(images, labels=list("ababab")).classes == ["a", "b"]
    np.savez(tmp_path / "evil.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(AdviceError, match="could run code when read, so it is refused"):
        data.open(tmp_path / "evil.npz")


def test_mnist_cifar_svhn_and_hdf5(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    mnist = tmp_path / "mnist"
    mnist.mkdir()
    for split in ("train", "t10k"):
        head = b"\0\0\x08\x03" + np.array([5, 28, 28], ">i4").tobytes()
        (mnist / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        with gzip.open(mnist / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(b"\0\0\x08\x01" + np.array([5], ">i4").tobytes() + labels.tobytes())
    d = data.open(mnist, split="train")
    assert d.labels.tolist() == labels.tolist()
    assert torch.equal(d.images[:, 0], torch.from_numpy(images))

    pixels = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)
    python = tmp_path / "cifar-10-batches-py"
    python.mkdir()
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (python / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2))
    names = [n.encode() for n in "abcdefghij"]
    (python / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    d = data.open(python)
    assert (len(d), d.classes) == (15, list("abcdefghij"))
    assert torch.equal(data.open(python, split="test").images.reshape(5, -1), torch.from_numpy(pixels))
    (python / "data_batch_1").write_bytes(pickle.dumps({b"data": pytest.approx, b"labels": []}))
    with pytest.raises(AdviceError, match=r"data_batch_1 is refused.*not allowed.*binary version"):
        data.open(python)

    binary = tmp_path / "cifar-10-batches-bin"
    binary.mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (binary / name).write_bytes(np.concatenate([labels[:, None], pixels], axis=1).tobytes())
    d = data.open(binary, split="train")
    assert d.labels.tolist() == labels.tolist()
    assert d.classes[:2] == ["airplane", "automobile"]

    from scipy.io import savemat

    svhn = tmp_path / "svhn"
    svhn.mkdir()
    stack = np.moveaxis(pixels.reshape(5, 3, 32, 32), (0, 1), (3, 2))
    savemat(svhn / "train_32x32.mat", {"X": stack, "y": np.array([[10], [1], [2], [3], [10]])})
    d = data.open(svhn)
    assert d.labels.tolist() == [0, 1, 2, 3, 0]
    assert torch.equal(d.images.reshape(5, -1), torch.from_numpy(pixels))

    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    assert data.open(tmp_path / "a.h5").labels.tolist() == labels.tolist()


def test_svhn_photographs(tmp_path):
    h5py = pytest.importorskip("h5py")
    picture(tmp_path / "1.png")
    with h5py.File(tmp_path / "digitStruct.mat", "w") as file:
        kind = h5py.special_dtype(ref=h5py.Reference)
        name = file.create_dataset("n", data=np.array([[ord(c)] for c in "1.png"], np.uint16))
        box = file.create_group("b")
        for key, values in zip(("left", "top", "width", "height", "label"), ((5, 12), (3, 4), (6, 6), (9, 9), (10, 7))):
            refs = [file.create_dataset(f"{key}{k}", data=np.array([[float(v)]])).ref for k, v in enumerate(values)]
            box.create_dataset(key, data=np.array(refs, dtype=kind).reshape(-1, 1), dtype=kind)
        group = file.create_group("digitStruct")
        group.create_dataset("name", data=np.array([[name.ref]], dtype=kind), dtype=kind)
        group.create_dataset("bbox", data=np.array([[box.ref]], dtype=kind), dtype=kind)
    d = data.open(tmp_path)
    assert d[0].classes.tolist() == [0, 7]
    assert d[0].boxes.tolist() == [[4, 2, 10, 11], [11, 3, 17, 12]]


def test_torchvision_datasets(tmp_path):
    from torchvision.datasets import CocoDetection, FakeData, ImageFolder, wrap_dataset_for_transforms_v2

    for c in ("a", "b"):
        for i in range(2):
            picture(tmp_path / "f" / c / f"{i}.png")
    d = data.open(ImageFolder(tmp_path / "f"))
    assert (d.classes, d.labels.tolist()) == (["a", "b"], [0, 0, 1, 1])
    assert torch.equal(d[0].image, data.open(tmp_path / "f")[0].image)
    assert len(data.open(FakeData(3, (3, 8, 8), 4))) == 3
    root = coco(tmp_path / "c")
    wrapped = wrap_dataset_for_transforms_v2(
        CocoDetection(root / "images", root / "annotations" / "instances_val.json"), target_keys="all"
    )
    d = data.open(wrapped)
    sizes = sorted(tuple(s.boxes.shape) for s in d)
    assert sizes == [(0, 4), (1, 4), (1, 4)], "pictures with nothing but an image id have empty boxes"


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc", "webdataset"])
def test_200_generated_scenes_survive_a_round_trip(tmp_path, layout):
    scenes = data.synth.shapes(200, size=48, seed=1)
    back = data.open(data.save(scenes, tmp_path / layout, layout), in_memory=False)
    assert back.layout == layout
    assert len(back) == 200
    assert back.classes == scenes.classes
    empty = 0
    for before, after in zip(scenes, back):
        assert torch.equal(before.image, after.image)
        assert torch.equal(before.classes, after.classes)
        assert torch.allclose(before.boxes, after.boxes, atol=0.5)
        if layout == "coco":
            assert torch.equal(before.masks, after.masks)
        empty += len(before.boxes) == 0
    assert empty > 10


def test_coco_to_yolo_to_voc_to_coco(tmp_path):
    scenes = data.synth.shapes(40, size=48, seed=2)
    current = scenes
    for layout in ("coco", "yolo", "voc", "coco"):
        current = data.open(data.save(current, tmp_path / f"{layout}{len(list(tmp_path.iterdir()))}", layout))
    for before, after in zip(scenes, current):
        assert torch.allclose(before.boxes, after.boxes, atol=0.5)
        assert torch.equal(before.classes, after.classes)


def test_masks_keep_boxes_of_200_scenes(tmp_path):
    scenes = data.synth.shapes(200, size=64, objects=(0, 1), seed=3)
    back = to_boxes(data.open(data.save(scenes, tmp_path / "m", "masks"), in_memory=False))
    assert back.classes == scenes.classes
    for before, after in zip(scenes, back):
        assert torch.allclose(before.boxes, after.boxes, atol=0.5)
        assert torch.equal(before.classes, after.classes)
        assert torch.equal(before.masks, after.masks)


@pytest.mark.parametrize("layout", ["folder", "csv", "parquet", "webdataset", "array"])
def test_labelled_sets_survive_a_round_trip(tmp_path, layout):
    before = data.open("digits").take(50)
    back = data.open(data.save(before, tmp_path / layout, layout))
    assert back.classes == before.classes
    pairs = sorted((int(y), x.flatten().tolist()) for x, y in zip(back.images, back.labels))
    assert pairs == sorted((int(y), x.flatten().tolist()) for x, y in zip(before.images, before.labels))
    with pytest.raises(AdviceError, match="is not empty; nothing is overwritten"):
        data.save(before, tmp_path / layout, layout)


def test_the_index_is_cached_and_a_change_is_seen(tmp_path):
    import os

    root = yolo(tmp_path / "y")
    assert data.open(root)[0].classes.tolist() == [1]
    assert list((tmp_path / "cache" / "index").glob("*.npz"))
    file = root / "labels" / "train" / "0.txt"
    file.write_text("0 0.5 0.5 0.25 0.2\n")
    os.utime(file, ns=(1, 1))
    assert data.open(root)[0].classes.tolist() == [0]


def test_an_unknown_layout_or_kind_advises(tmp_path):
    folder(tmp_path)
    with pytest.raises(AdviceError, match=r"no layout 'cocoo'.*'coco'"):
        data.open(tmp_path, layout="cocoo")
    with pytest.raises(AdviceError, match="takes a path, a list of paths, an array or a dataset; got int"):
        data.open(3)
    with pytest.raises(AdviceError, match=r"nothing is downloaded"):
        data.open("https://example.com/x.zip")
    with pytest.raises(AdviceError, match="has no boxes"):
        data.save(data.open("digits"), tmp_path / "new", "coco")


def test_filled_outlines_are_the_pixels_whose_centre_is_inside():
    from matplotlib.path import Path as Outline

    from lynceus.data.boxes import fill

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :50] + 0.5
    for _ in range(30):
        polygon = rng.uniform(-5, 55, (int(rng.integers(3, 4)), 2))
        inside = Outline(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(40, 50)
        assert (fill([polygon], (40, 50)).numpy() == inside).all()
    star = [np.array([[0, 0], [40, 40], [40, 0], [0, 40]], dtype=float)]
    assert 0 < int(fill(star, (40, 40)).sum()) < 1600


@pytest.mark.parametrize("name", ["../elsewhere", "..", "", "a/b", "a\\b"])
def test_a_class_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    from lynceus.data.formats.write import class_folder

    with pytest.raises(AdviceError, match="cannot be a folder's name"):
        class_folder(tmp_path, name)
    assert class_folder(tmp_path, "..cat") == tmp_path / "..cat"
