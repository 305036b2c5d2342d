"""Frozen features of a network trained here on some classes, used on others; jitter; retrieval; cache.

    python -m bench.off_the_shelf --cifar cifar10/train.parquet --photos imagenet-sample [--steps 4000] [--out DIR]

The network is `bench._nets.ConvNet`, by default the pooled one; it is kept in --out and trained once."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bench._data import CIFAR10, PHOTOS
from bench._nets import ConvNet, RandomFilters
from lynceus import data
from lynceus.core.subject import Subject
from lynceus.core.types import as_float
from lynceus.gauntlet.baselines import baseline
from lynceus.gauntlet.cells import SupervisedCell
from lynceus.gauntlet.features import Extractor, Features
from lynceus.gauntlet.probes import LinearSVM, jittered_features
from lynceus.gauntlet.ranking import ranked, ranking_metrics
from lynceus.gauntlet.retrieval import Retriever, RetrieverConfig, fit_whitening
from lynceus.gauntlet.views import resized

SEEN = 6  # the first six classes of CIFAR-10 are trained on, the other four are the foreign task
WIDTH = 32


def network(classes: int) -> ConvNet:
    return ConvNet(WIDTH, classes, pooled=True)


def relu(subject: Subject, which: int) -> str:
    """The name of one of the four ReLUs."""
    names = [n for n, m in subject.model.named_modules() if isinstance(m, torch.nn.ReLU)]
    return names[which]


def trained(name: str, images: torch.Tensor, labels: np.ndarray, classes: int, steps: int, out: Path) -> Subject:
    """The small CNN trained on these pictures, or the one that an earlier run left in `out`."""
    file = out / f"{name}-pooled-{steps}.safetensors"
    if file.is_file():
        model = network(classes)
        model.load_state_dict(load_file(file))
        return Subject(model, name=name)
    cell = SupervisedCell(build=lambda capacity, count: network(count), shift=2)
    subject = cell.train(str(WIDTH), images, torch.from_numpy(labels).long(), classes, steps, 128, 0.1, 0)
    save_file(subject.model.state_dict(), file)
    return subject


def svm(train: Features, test: Features, power: float | None = None, seed: int = 0) -> float:
    return 100 * LinearSVM(power=power).on(train, test, seed=seed).summary["accuracy"]


def skimage_hog(part: data.Dataset) -> Features:
    from skimage.feature import hog

    pictures = part.images.permute(0, 2, 3, 1).numpy()
    options = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (2, 2), "channel_axis": -1}
    vectors = [hog(x, **options) for x in pictures]
    return Features(vectors=np.stack(vectors).astype(np.float32), labels=part.labels)


def foreign(cifar: data.Dataset, net: Subject, steps: int, out: Path) -> dict[str, float]:
    """Items 1 and 2: the four classes that the network has never seen."""
    rng = np.random.default_rng(0)
    others = rng.permutation(np.flatnonzero(cifar.labels >= SEEN))
    test, pool = cifar.subset(others[:2000]), cifar.subset(others[2000:])
    few = pool.subset(np.arange(1000))
    torch.manual_seed(0)
    untrained = Subject(network(SEEN), name="untrained")
    grid = {"layer": relu(net, -1), "pool": 2}
    figures = {}
    for label, subject, options in (
        ("trained on 6, pooled", net, {}),
        ("trained on 6, last map 2x2", net, grid),
        ("untrained, pooled", untrained, {}),
        ("untrained, last map 2x2", untrained, grid),
        ("raw pixels 32", Subject(_flat, features=_flats), {}),
        ("HOG (ours)", baseline("HOG"), {}),
    ):
        extractor = Extractor(subject, **options, quiet=True)
        figures[label] = svm(extractor.of(few), extractor.of(test))
        print(f"  SVM, 1000 labels, {label}: {figures[label]:.1f}", flush=True)
    figures["HOG (scikit-image)"] = svm(skimage_hog(few), skimage_hog(test))
    print(f"  SVM, 1000 labels, HOG (scikit-image): {figures['HOG (scikit-image)']:.1f}", flush=True)
    for label, options in (("pooled", {}), ("last map 2x2", grid)):
        extractor = Extractor(net, **options, quiet=True)
        small = test.subset(np.arange(1000))
        views, plain = jittered_features(extractor, small), extractor.of(small)
        rows = []
        for split in range(5):
            part = pool.subset(np.random.default_rng(split + 1).permutation(len(pool))[:200])
            train = jittered_features(extractor, part)
            alone = Features(vectors=train.vectors[:, 0], labels=part.labels)
            rows.append([svm(alone, plain), svm(train, views), svm(alone, plain, 0.5), svm(train, views, 0.5)])
        mean = np.mean(rows, 0)
        names = ("SVM", "aug-SVM", "SVM, power 0.5", "aug-SVM, power 0.5")
        for name, value in zip(names, mean):
            figures[f"200 labels, {label}: {name}"] = float(value)
        gains = np.array(rows)[:, 1] - np.array(rows)[:, 0]
        print(
            f"  200 labels, 5 splits, {label}:", *(f"{n} {v:.1f}" for n, v in zip(names, mean)), "gains", gains.round(1)
        )
    target = trained("target", pool.images, pool.labels - SEEN, 4, steps // 2, out)
    with torch.inference_mode():
        guess = torch.cat([target(as_float(x)).argmax(1) for x in test.images.split(250)])
    figures["trained on the target classes"] = 100 * float((guess.numpy() == test.labels - SEEN).mean())
    print(f"  the same CNN trained on all target pictures: {figures['trained on the target classes']:.1f}")
    return figures


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def _flats(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.flatten(1)]


def crop_attack(image: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A random crop (50-80% of each side), mirrored with p 0.5, brightness 0.6-1.4, JPEG 30."""
    from torchvision.io import decode_jpeg, encode_jpeg

    h, w = image.shape[-2:]
    share = 0.5 + 0.3 * torch.rand(2, generator=draw)
    ch, cw = int(share[0] * h), int(share[1] * w)
    top, left = (int(torch.randint(room + 1, (), generator=draw)) for room in (h - ch, w - cw))
    out = image[:, top : top + ch, left : left + cw]
    if torch.rand((), generator=draw) < 0.5:
        out = out.flip(-1)
    out = (out * (0.6 + 0.8 * torch.rand((), generator=draw))).clamp(0, 1)
    return as_float(decode_jpeg(encode_jpeg((out * 255).round().to(torch.uint8).contiguous(), 30)))


def retrieval(folder: str, net: Subject, seeds: int) -> dict[str, float]:
    """Item 3: recall@1 of the original photograph from an attacked crop."""
    files = sorted(str(p) for p in Path(folder).iterdir() if p.suffix.lower() in (".jpeg", ".jpg", ".png"))[:200]
    whole = data.open(files)
    # a side of 384 is enough for crops that are read at 96 pixels
    images = [resized(as_float(s.image)[None], (384, 384))[0] for s in (whole[i] for i in range(len(whole)))]
    figures, own = {}, np.eye(len(images), dtype=bool)
    chains = {"plain": RetrieverConfig(reference_levels=1, query_levels=1, dims=0)}
    for dims in (64, 128, 500):
        chains[f"whitened {dims}"] = RetrieverConfig(reference_levels=1, query_levels=1, dims=dims)
    chains["spatial 3/1"] = RetrieverConfig(reference_levels=3, query_levels=1, dims=0)
    chains["spatial 3/1, whitened 128"] = RetrieverConfig(reference_levels=3, query_levels=1, dims=128)
    chains["full 3/2, whitened 128"] = RetrieverConfig(reference_levels=3, query_levels=2, dims=128)
    chains["full 3/2, dims chosen on references"] = RetrieverConfig(reference_levels=3, query_levels=2)
    chains["full 3/2, 128, signed square"] = RetrieverConfig(reference_levels=3, query_levels=2, dims=128, power=2.0)
    subjects = {
        "random filters": Extractor(Subject(RandomFilters(), mean=(0.5,) * 3, std=(0.25,) * 3), quiet=True),
        "trained on CIFAR-10": Extractor(net, relu(net, 2), pool=2, quiet=True),
    }
    queries = []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        queries.append([crop_attack(image, draw) for image in images])
    for name, extractor in subjects.items():
        base = {v: Retriever(extractor, RetrieverConfig(), quiet=True).vectors(images, v) for v in (1, 3)}
        query = {
            v: [Retriever(extractor, RetrieverConfig(), quiet=True).vectors(q, v) for q in queries] for v in (1, 2)
        }
        for chain, config in chains.items():
            retriever = Retriever(extractor, config).fit_vectors(base[config.reference_levels])
            found = [ranking_metrics(ranked(retriever.vector_distances(q), own))[0] for q in query[config.query_levels]]
            recall, precision = (float(np.mean([f[k] for f in found])) for k in ("R@1", "mAP"))
            figures[f"{name}: {chain}"] = recall
            print(
                f"  {name}, {chain} ({retriever.dims} numbers): recall@1 {recall:.3f}, mAP {precision:.3f}", flush=True
            )
    x = base[3].reshape(-1, base[3].shape[-1])
    white = fit_whitening(x, 500)
    y = white(x)
    figures["whitening: largest |covariance - 1|"] = float(np.abs(np.cov(y.T) - np.eye(y.shape[1])).max())
    print(f"  whitened covariance is the identity within {figures['whitening: largest |covariance - 1|']:.1e}")
    return figures


def cache(cifar: data.Dataset) -> dict[str, float]:
    """Item 5: the second pass, from memory and from disk by a fresh extractor."""
    import lynceus

    figures, part = {}, cifar.subset(np.arange(1000))
    for name in ("resnet_nano", "vit_nano", "convnext_nano", "swin_nano"):
        subject = Subject(lynceus.create_model(name))
        with tempfile.TemporaryDirectory() as folder:
            first, clock = Extractor(subject, cache=folder, quiet=True), []
            for extractor in (first, first, None):
                start = time.perf_counter()
                (extractor or Extractor(subject, cache=folder, quiet=True)).of(part)
                clock.append(time.perf_counter() - start)
        figures[f"cache, {name}: memory"], figures[f"cache, {name}: disk"] = clock[0] / clock[1], clock[0] / clock[2]
        print(
            f"  {name}: second pass {clock[0] / clock[1]:.0f}x (memory), {clock[0] / clock[2]:.0f}x (disk)", flush=True
        )
    return figures


def digits(cifar: data.Dataset, steps: int, out: Path) -> dict[str, float]:
    """Item 6: digits, where features of another world need not win."""
    grey = (cifar.images.float().mean(1, keepdim=True).round().to(torch.uint8)).expand(-1, 3, -1, -1)
    net = trained("grey", grey[:20000], cifar.labels[:20000], 10, steps // 2, out)
    net.size = (32, 32)
    whole = data.open("digits")
    train, test = whole.split(0.7, 0.3)
    raw, features = (Extractor(s, quiet=True) for s in (baseline("raw pixels"), net))
    figures = {
        "digits: raw pixels": svm(raw.of(train), raw.of(test)),
        "digits: CNN trained on grey CIFAR-10": svm(features.of(train), features.of(test)),
    }
    print("  " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar", type=Path, default=CIFAR10, help="CIFAR-10 as a parquet file or an image folder")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="a folder of photographs")
    parser.add_argument(
        "--steps", type=int, default=4000, help="updates of 128 for the network, 10 minutes on one core"
    )
    parser.add_argument("--seeds", type=int, default=3, help="draws of the attacked crops")
    parser.add_argument("--out", default="runs/shelf")
    args = parser.parse_args()
    out, start = Path(args.out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    cifar = data.open(args.cifar)
    known = cifar.subset(np.flatnonzero(cifar.labels < SEEN))
    figures: dict[str, float] = {}
    print("cache"), figures.update(cache(cifar))
    net = trained("six", known.images, known.labels, SEEN, args.steps, out)
    print("retrieval"), figures.update(retrieval(args.photos, net, args.seeds))
    print("foreign classes"), figures.update(foreign(cifar, net, args.steps, out))
    print("digits"), figures.update(digits(cifar, args.steps, out))
    figures["seconds"] = time.time() - start
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(f"{figures['seconds']:.0f} s, {out / 'figures.json'}")


if __name__ == "__main__":
    main()
