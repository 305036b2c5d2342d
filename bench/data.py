"""The data room beside its peers: decoding and cropping, a loader with workers, pictures in memory, and starting.

python -m bench.data                                  # all of it; JPEGs from --photos, else made from bundled pictures
python -m bench.data --only decode memory --out data.json

All on one core per process. Peers and ours take turns in one process; a figure is the best of the rounds, a ratio the
median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lynceus import data
from lynceus.core.types import Sample
from lynceus.data.geometry import resized_crop
from lynceus.data.views import random_window

ROUNDS = 7


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order turns from round to round."""
    names = list(calls)
    for call in calls.values():
        call()
    out: dict[str, list[float]] = {n: [] for n in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            calls[name]()
            out[name].append(time.perf_counter() - start)
    return out


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> float:
    return statistics.median(p / o for o, p in zip(times[ours], times[peer]))


def jpegs(folder: Path | None, scratch: Path, count: int) -> list[Path]:
    """`count` photographs: those of `folder`, else crops of bundled pictures of ImageNet's usual size."""
    if folder is not None:
        return sorted(folder.rglob("*.[jJ][pP]*[gG]"))[:count]
    rng = np.random.default_rng(0)
    pictures = [data.sample(n).image for n in ("china", "flower", "retina", "hubble", "rocket", "coffee")]
    files = []
    for i in range(count):
        image = pictures[i % len(pictures)]
        top, left = int(rng.integers(image.shape[1] - 375)), int(rng.integers(max(1, image.shape[2] - 500)))
        crop = image[:, top : top + 375, left : left + 500]
        files.append(scratch / f"{i:04d}.jpg")
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(files[-1], quality=90)
    return files


def bench_decode(files: list[Path], rounds: int) -> list[dict[str, Any]]:
    """JPEG file -> random window -> 224 x 224 -> mirrored or not -> tensor; the peer is Pillow + classic transforms."""
    from torchvision import transforms as classic
    from torchvision.transforms import functional as pil

    view = data.TrainView(size=224)
    worst, mean = 0, []
    for i, file in enumerate(files[:30]):  # the same pixels from both, for the same window
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        window = random_window(picture.height, picture.width, view.scale, view.ratio, torch.Generator().manual_seed(i))
        theirs = np.array(pil.resized_crop(picture, *window, [224, 224])).transpose(2, 0, 1).astype(int)
        ours = resized_crop(Sample(image=data.read_image(file)), *window, (224, 224)).image.numpy().astype(int)
        worst, mean = max(worst, np.abs(ours - theirs).max()), [*mean, np.abs(ours - theirs).mean()]
    peer = classic.Compose([classic.RandomResizedCrop(224), classic.RandomHorizontalFlip(), classic.ToTensor()])
    bytes_only = classic.Compose(
        [classic.RandomResizedCrop(224), classic.RandomHorizontalFlip(), classic.PILToTensor()]
    )

    def run_ours() -> None:
        draw = torch.Generator()
        for i, file in enumerate(files):
            view(Sample(image=data.read_image(file)), draw.manual_seed(i)).image.contiguous()

    def run_ours_float() -> None:
        draw = torch.Generator()
        for i, file in enumerate(files):
            image = view(Sample(image=data.read_image(file)), draw.manual_seed(i)).image
            image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def run_peer(transform: Callable[[Any], Any]) -> None:
        for file in files:
            with Image.open(file) as opened:
                transform(opened.convert("RGB"))

    calls = {"ours, uint8": run_ours, "ours, to float": run_ours_float}
    calls |= {"Pillow + classic": lambda: run_peer(peer), "Pillow + classic, uint8": lambda: run_peer(bytes_only)}
    times = take_turns(calls, rounds)
    rows = [{"what": f"224 px train view, {n}", "per_second": len(files) / min(t)} for n, t in times.items()]
    rows[0] |= {"ratio": ratio(times, "ours, uint8", "Pillow + classic"), "goal": 1.6}
    rows[0]["note"] = f"same window as Pillow: greatest difference {worst}, mean {np.mean(mean):.2f} grey levels"
    rows[1] |= {"ratio": ratio(times, "ours, to float", "Pillow + classic")}
    rows[3] |= {"ratio": ratio(times, "ours, uint8", "Pillow + classic, uint8"), "note": "ours, uint8 against this"}
    return rows


def bench_loader(files: list[Path], scratch: Path, rounds: int, workers: int) -> list[dict[str, Any]]:
    """A folder of JPEGs through worker processes; the peer is torchvision's ImageFolder with v2."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = scratch / "folder"
    for k in range(4):
        (root / f"class{k}").mkdir(parents=True, exist_ok=True)
    for repeat in range(4):
        for i, file in enumerate(files):
            os.symlink(file.resolve(), root / f"class{i % 4}" / f"{repeat}_{file.name}")
    transform = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])
    theirs = ImageFolder(root, transform)
    ours = data.open(root, in_memory=False)
    view = data.TrainView(size=224)

    def run_peer() -> None:
        for _ in DataLoader(theirs, 32, shuffle=True, num_workers=workers, prefetch_factor=4 if workers else None):
            pass

    def run_ours() -> None:
        for _ in data.loader(ours, 32, transform=view, shuffle=True, workers=workers):
            pass

    times = take_turns({"ours": run_ours, "ImageFolder + v2": run_peer}, rounds)
    rows = [{"what": f"loader, {workers} workers, {n}", "per_second": len(ours) / min(t)} for n, t in times.items()]
    rows[0] |= {"ratio": ratio(times, "ours", "ImageFolder + v2"), "goal": 0.9}
    return rows


def bench_memory(rounds: int) -> list[dict[str, Any]]:
    """50,000 pictures of 32 x 32 in memory: shuffled batches of 128 with pad-4 crop and mirror, one core."""
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8)
    held = data.open(images.numpy(), labels=np.arange(len(images)) % 10)
    peer = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def run_ours() -> None:
        for _ in data.loader(held, 128, transform=data.CropFlip(pad=4), shuffle=True):
            pass

    def run_alone() -> None:
        draw = torch.Generator().manual_seed(0)
        for batch in images.split(128):
            data.crop_flip(batch, 4, draw)

    def run_peer() -> None:
        for image in images[:2000]:
            peer(image)

    times = take_turns({"loader": run_ours, "crop_flip alone": run_alone, "v2 per picture": run_peer}, rounds)
    counts = {"loader": len(images), "crop_flip alone": len(images), "v2 per picture": 2000}
    rows = [{"what": f"32 px in memory, {n}", "per_second": counts[n] / min(t)} for n, t in times.items()]
    rows[0]["goal_per_second"] = 10_000
    return rows


def bench_start(scratch: Path, count: int) -> list[dict[str, Any]]:
    """Seconds until data.open returns, for `count` pictures: the first time, and again with the index kept."""
    os.environ["LYNCEUS_CACHE"] = str(scratch / "cache")
    small = scratch / "one.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(small)
    smalls = [scratch / f"one{k}.jpg" for k in range(8)]  # a file system allows only so many links to one file
    for copy in smalls:
        copy.write_bytes(small.read_bytes())
    root, classes = scratch / "many", 100
    for k in range(classes):
        (root / "folder" / f"class{k:03d}").mkdir(parents=True)
    (root / "yolo" / "images").mkdir(parents=True)
    (root / "yolo" / "labels").mkdir()
    (root / "coco" / "images").mkdir(parents=True)
    rows, images, annotations = ["path,label"], [], []
    for i in range(count):
        inner = f"class{i % classes:03d}/{i:06d}.jpg"
        source = smalls[i % len(smalls)]
        os.link(source, root / "folder" / inner)
        rows.append(f"folder/{inner},class{i % classes:03d}")
        os.link(source, root / "yolo" / "images" / f"{i:06d}.jpg")
        (root / "yolo" / "labels" / f"{i:06d}.txt").write_text("0 0.5 0.5 0.2 0.3\n1 0.25 0.5 0.2 0.3\n")
        images.append({"id": i, "file_name": f"{i:06d}.jpg", "height": 80, "width": 90})
        annotations += [
            {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": [5, 5, 20, 30], "area": 600, "iscrowd": 0}
            for k in (0, 1)
        ]
    (root / "coco" / "images" / "000000.jpg").write_bytes(small.read_bytes())
    categories = [{"id": k, "name": n} for k, n in enumerate(("a", "b"))]
    (root / "labels.csv").write_text("\n".join(rows))
    (root / "yolo" / "data.yaml").write_text("train: images\nnames: [a, b]\n")
    record = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco" / "a.json").write_text(json.dumps(record))
    import pyarrow as pa
    import pyarrow.parquet as pq

    blob = small.read_bytes()
    table = pa.table(
        {"image": [{"bytes": blob, "path": f"{i}.jpg"} for i in range(count)], "label": np.arange(count) % 9}
    )
    pq.write_table(table, root / "all.parquet")
    sources = {
        "image folder": root / "folder",
        "csv": root / "labels.csv",
        "YOLO": root / "yolo",
        "COCO": root / "coco",
    }
    out = []
    for name, source in (sources | {"parquet": root / "all.parquet"}).items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            opened = data.open(source)
            seconds.append(time.perf_counter() - start)
        assert len(opened) == count
        row = {"what": f"start, {name}, {count:,} pictures", "first_s": seconds[0], "again_s": min(seconds[1:])}
        out.append(row | {"goal_s": 2.0})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=100, help="photographs per round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files", type=int, default=50_000, help="pictures in the start test")
    parser.add_argument("--only", nargs="*", default=["decode", "loader", "memory", "start"])
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        files = jpegs(options.photos, scratch, options.count) if {"decode", "loader"} & set(options.only) else []
        if "decode" in options.only:
            rows += bench_decode(files, options.rounds)
        if "loader" in options.only:
            rows += bench_loader(files, scratch, max(3, options.rounds // 2), options.workers)
        if "memory" in options.only:
            rows += bench_memory(options.rounds)
        if "start" in options.only:
            rows += bench_start(scratch, options.files)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread"
    print(f"\n{machine}")
    for row in rows:
        parts = [f"{row['what']:<52}"]
        if "per_second" in row:
            parts.append(f"{row['per_second']:>10,.0f} /s")
        if "first_s" in row:
            parts.append(f"first {row['first_s']:.2f} s, again {row['again_s']:.2f} s (goal {row['goal_s']:.0f} s)")
        if "ratio" in row:
            parts.append(f"{row['ratio']:.2f} x" + (f" (goal {row['goal']} x)" if "goal" in row else ""))
        if "goal_per_second" in row:
            parts.append(f"(goal {row['goal_per_second']:,} /s)")
        print("  ".join([*parts, row.get("note", "")]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=float))


if __name__ == "__main__":
    main()
