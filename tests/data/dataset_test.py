"""Dataset: labels without decoding, subsets, stratified splits, fingerprints, skipping; the loader's determinism."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.sources import Pixels


def photos(folder, per_class=6, classes=("cat", "dog", "owl"), size=(90, 70)):
    """A small image folder with pictures that all differ."""
    rng = np.random.default_rng(0)
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(folder / c / f"{i}.jpg", quality=95)
    return folder


def labelled(labels, classes=None):
    n = len(labels)
    images = torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 4, 4).to(torch.uint8).contiguous()
    classes = classes or [str(i) for i in range(max([*labels, 0]) + 1)]
    return Dataset(Pixels(images), name="toy", labels=labels, classes=classes)


def test_digits_are_the_default_set():
    d = data.open("digits")
    assert len(d) == 1797
    assert list(d.counts().values()) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert d.images.shape == (1797, 3, 8, 8)
    assert d.images.dtype == torch.uint8
    assert int(d.images.max()) == 255
    assert isinstance(d[0], Sample)
    assert d[0].label == 0
    assert data.open("digits", size=28).images.shape == (1797, 3, 28, 28)
    train, test = data.open("digits", split="train"), data.open("digits", split="test")
    assert len(train) + len(test) == 1797
    assert not {s.id for s in train} & {s.id for s in test}
    assert min(test.counts().values()) >= 34


def test_a_folder_called_digits_does_not_hide_the_default_set(tmp_path, monkeypatch):
    photos(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(data.open("digits")) == 1797
    assert len(data.open("./digits")) == 18


@given(
    labels=st.lists(st.integers(-1, 4), min_size=1, max_size=80),
    shares=st.sampled_from([(0.8, 0.2), (0.5,), (0.6, 0.2, 0.2), (0.1, 0.1), (1.0,)]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_stratified_partition(labels, shares, seed):
    d = labelled(labels)
    parts = d.split(*shares, seed=seed)
    ids = [s.id for p in parts for s in p]
    assert sorted(ids, key=int) == [str(i) for i in range(len(d))]
    again = d.split(*shares, seed=seed)
    assert [[s.id for s in p] for p in parts] == [[s.id for s in p] for p in again]
    full = [*shares] if sum(shares) > 0.999 else [*shares, 1 - sum(shares)]
    assert len(parts) == len(full)
    for value in set(labels):
        n = labels.count(value)
        counts = [int((p.labels == value).sum()) for p in parts]
        if n >= len(parts):
            assert min(counts) >= 1
        assert all(abs(c - f * n) <= len(parts) for c, f in zip(counts, full))


def test_bad_shares_advise():
    with pytest.raises(AdviceError, match=r"sum to at most 1.*split\(0.8, 0.2\)"):
        labelled([0, 1]).split(0.8, 0.8)


def test_subset_keeps_labels_images_and_order():
    d = data.open("digits")
    s = d.subset([5, 3, 8])
    assert s.labels.tolist() == d.labels[[5, 3, 8]].tolist()
    assert torch.equal(s.images, d.images[[5, 3, 8]])
    assert [x.id for x in s] == ["5", "3", "8"]
    assert len(d.subset(d.labels == 7)) == 179
    assert [x.id for x in s.subset([2])] == ["8"]


def test_take_thins_each_class_alike():
    d = data.open("digits").take(100)
    assert len(d) == 100
    assert set(d.counts().values()) <= {9, 10, 11}
    assert d.labels.tolist() == data.open("digits", limit=100).labels.tolist()


def test_the_fingerprint_sees_what_changes(tmp_path):
    d = data.open("digits")
    prints = {d.fingerprint(), d.subset(range(100)).fingerprint(), d.subset(range(99, -1, -1)).fingerprint()}
    assert len(prints) == 3
    assert data.open("digits").fingerprint() == d.fingerprint()
    root = photos(tmp_path / "a")
    first = data.open(root).fingerprint()
    photos(tmp_path / "b")
    assert data.open(tmp_path / "b").fingerprint() == first, "the place must not matter"
    (root / "cat" / "0.jpg").unlink()
    assert data.open(root).fingerprint() != first
    whole = data.open(tmp_path / "b")
    assert whole.fingerprint(content=True) != whole.fingerprint()


def test_labels_are_known_without_decoding(tmp_path):
    root = photos(tmp_path / "a")
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"\xff\xd8\xff no picture at all")
    d = data.open(root, in_memory=False)
    assert d.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert d.counts() == {"cat": 6, "dog": 6, "owl": 6}
    assert d.images is None


def test_unreadable_pictures_are_named_counted_and_skipped_up_to_a_limit(tmp_path, caplog):
    root = photos(tmp_path / "a", per_class=10)
    bad = root / "cat" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    d = data.open(root)
    with pytest.raises(data.UnreadableError, match=r"cat/3\.jpg cannot be read: the file is cut short"):
        d[3]
    with caplog.at_level(logging.WARNING):
        samples = d.__getitems__(range(len(d)))
    assert len(samples) == 29
    assert list(d.unreadable) == ["cat/3.jpg"]
    assert str(bad) in caplog.text
    for i in (4, 5):
        (root / "cat" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(AdviceError, match=r"of 30 pictures in .* more than the 1 allowed: cat/3\.jpg .*max_bad="):
        data.open(root).__getitems__(range(30))
    assert len(data.open(root, max_bad=3).__getitems__(range(30))) == 27
    for workers in (0, 2):
        d = data.open(root, max_bad=3)
        assert sum(len(b) for b in data.loader(d, 4, workers=workers)) == 27
        assert len(d.unreadable) == 3
    with pytest.raises(AdviceError, match="more than the 1 allowed"):
        list(data.loader(data.open(root), 4))


def noisy(sample, generator):
    """A transform that shows which random numbers a sample got."""
    sample.image = torch.randint(256, sample.image.shape, generator=generator, dtype=torch.uint8)
    return sample


def seen(dataset, **options):
    return [
        (b.ids, b.label.tolist(), b.image.clone()) for b in data.loader(dataset, 7, shuffle=True, seed=3, **options)
    ]


def same(a, b):
    return len(a) == len(b) and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b))


@pytest.mark.parametrize("transform", [None, noisy, data.CropFlip(pad=1)])
def test_workers_and_interruption_change_nothing(transform, tmp_path):
    for d in (data.open("digits").take(60), data.open(photos(tmp_path / "p"), in_memory=True)):
        plain = seen(d, epoch=1, transform=transform)
        assert same(plain, seen(d, epoch=1, transform=transform, workers=2))
        assert same(plain[2:], seen(d, epoch=1, transform=transform, start=2))
        assert not same(plain, seen(d, epoch=2, transform=transform))
        assert sorted(i for ids, _, _ in plain for i in ids) == sorted(s.id for s in d)


def test_start_reads_nothing_that_it_skips(tmp_path):
    root = photos(tmp_path / "a")
    d = data.open(root, in_memory=False)
    for i in range(6):
        (root / "cat" / f"{i}.jpg").unlink()
    batches = list(data.loader(d, 6, start=1))
    assert [b.label.tolist() for b in batches] == [[1] * 6, [2] * 6]


def test_ranks_share_each_batch():
    d = data.open("digits").take(50)
    whole = [b.ids for b in data.loader(d, 8, shuffle=True, seed=1, drop_last=True)]
    parts = [[b.ids for b in data.loader(d, 4, shuffle=True, seed=1, drop_last=True, rank=r, world=2)] for r in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts)]


def test_loader_advises():
    with pytest.raises(AdviceError, match="batch_size must be at least 1"):
        data.loader(data.open("digits"), 0)
    with pytest.raises(AdviceError, match=r"fewer than one batch of 64.*batch_size=10"):
        data.loader(data.open("digits").take(10), 64, drop_last=True)


def test_cifar10_in_memory(cifar10_parquet):
    d = data.open(cifar10_parquet, limit=2000)
    assert d.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert d.images.shape == (2000, 3, 32, 32)
    assert set(d.counts().values()) == {200}
    lazy = data.open(cifar10_parquet, in_memory=False)
    assert len(lazy) == 50_000
    assert torch.equal(lazy.take(2000)[11].image, d[11].image)


def test_imagenet_jpegs_are_read(imagenet_jpegs):
    d = data.open(imagenet_jpegs[0].parent)
    assert len(d) == len(imagenet_jpegs)
    assert d.labels is None
    batch = next(iter(data.loader(d.subset(range(4)), 4, transform=data.EvalView(size=64))))
    assert batch.image.shape == (4, 3, 64, 64)
