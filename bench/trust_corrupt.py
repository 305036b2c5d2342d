"""The corruption suite: beside imagecorruptions on the same photographs, within its time, and on CIFAR-10.

    python -m bench.trust_corrupt peer --peer FOLDER [--side 224] [--photos 150] [--severity 3] [--out FILE.json]
    python -m bench.trust_corrupt time [--threads 4]
    python -m bench.trust_corrupt cifar [--count 10000] [--threads 1]
    python -m bench.trust_corrupt severity [--count 2000]

peer: FOLDER holds imagecorruptions, scikit-image and opencv (pip install --target FOLDER ...). What current numpy,
  scipy, scikit-image and setuptools took away from imagecorruptions 1.1.2 is put back for this process. One thread
  each, picture by picture in turn; medians over the photographs of the processor time; how much alike results look.
time: 200 pictures x 15 corruptions x severity 3, in wall time (the photographs, the first fifty twice).
cifar: time to write CIFAR-10-C of the last pictures.
severity: error of a small CNN on held-out CIFAR-10 pictures, all corruptions and severities, and where it falls.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench._data import PHOTOS
from lynceus.core.rng import generator
from lynceus.data.corrupt import BENCHMARK, CORRUPTIONS, DETERMINISTIC, corrupt

OTHER = {  # where imagecorruptions is not the authors' suite
    "elastic_transform": "imagecorruptions has constants of its own",
    "frost": "ours is made, theirs are photographs",
    "snow": "imagecorruptions cuts a corner of the flakes, we the centre as the authors do",
}


def photographs(count: int, side: int | None) -> list[np.ndarray]:
    """RGB uint8 (h, w, 3); with a side: short side 256/224 of it, centre cut, as ImageNet-C is made."""
    out = []
    for path in sorted(PHOTOS.glob("*.JPEG"))[:count]:
        picture = Image.open(path).convert("RGB")
        if side is not None:
            scale = side * 256 / 224 / min(picture.size)
            wide, high = (max(side, round(n * scale)) for n in picture.size)
            left, top = (wide - side) // 2, (high - side) // 2
            resized = picture.resize((wide, high), Image.Resampling.BILINEAR)
            picture = resized.crop((left, top, left + side, top + side))
        out.append(np.array(picture))
    if not out:
        raise SystemExit(f"There are no photographs in {PHOTOS}; set LYNCEUS_TEST_DATA.")
    return out


def peer_of(folder: str) -> Callable[[np.ndarray, int, str], np.ndarray]:
    """imagecorruptions.corrupt, made to run with the libraries of today."""
    sys.path.insert(0, folder)
    import scipy.ndimage
    import skimage.filters

    np.float_ = np.float64
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda name, path: str(Path(folder) / "imagecorruptions" / path)
    old = types.ModuleType("scipy.ndimage.interpolation")
    old.map_coordinates, old.zoom = scipy.ndimage.map_coordinates, scipy.ndimage.zoom
    sys.modules |= {"pkg_resources": resources, "scipy.ndimage.interpolation": old}
    now = skimage.filters.gaussian

    def gaussian(*args: Any, multichannel: bool = False, **options: Any) -> np.ndarray:
        return now(*args, **options, **({"channel_axis": -1} if multichannel else {}))

    skimage.filters.gaussian = gaussian
    import cv2
    import imagecorruptions

    cv2.setNumThreads(1)
    return lambda picture, severity, name: np.asarray(imagecorruptions.corrupt(picture, severity, name))


def beside_the_peer(o: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    peer = peer_of(o.peer)
    pictures = photographs(o.photos, o.side)
    rows = []
    for name in o.corruptions or CORRUPTIONS:
        ours, theirs, look = [], [], []
        for i, picture in enumerate(pictures):
            x = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
            draw = generator(0, name, i)
            if i == 0:  # tables, caches
                corrupt(x, name, o.severity, generator=generator(1))
            np.random.seed(i)
            begin = time.thread_time()
            b = peer(picture, o.severity, name)
            middle = time.thread_time()
            a = corrupt(x, name, o.severity, generator=draw)
            end = time.thread_time()
            theirs.append(middle - begin)
            ours.append(end - middle)
            clean, a, b = picture.astype(float), a.permute(1, 2, 0).numpy().astype(float), b.astype(float)
            numbers = [(v.mean(), v.std(), ((v - clean) ** 2).mean()) for v in (a, b)]
            look.append([*numbers[0], *numbers[1], np.abs(a - b).max(), (np.abs(a - b) > 1).mean()])
        mean = np.mean(look, 0)
        row = {
            "corruption": name,
            "peer ms": 1e3 * float(np.median(theirs)),
            "ours ms": 1e3 * float(np.median(ours)),
            "ratio": float(np.median(theirs) / np.median(ours)),
            "mean": mean[0] / mean[3] - 1,
            "std": mean[1] / mean[4] - 1,
            "mse": mean[2] / mean[5] - 1,
        }
        if name in DETERMINISTIC:
            row |= {"largest": float(np.max([v[6] for v in look])), "share above 1": float(mean[7])}
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    total = [sum(r[k] for r in rows) for k in ("peer ms", "ours ms")]
    bench = [sum(r[k] for r in rows if r["corruption"] in BENCHMARK) for k in ("peer ms", "ours ms")]
    quick = [sum(r[k] for r in rows if r["corruption"] != "glass_blur") for k in ("peer ms", "ours ms")]
    ratios = {
        "all": total[0] / max(total[1], 1e-9),
        "benchmark 15": bench[0] / max(bench[1], 1e-9),
        "all but glass": quick[0] / max(quick[1], 1e-9),
        "geometric mean": float(np.exp(np.mean([np.log(r["ratio"]) for r in rows]))),
    }
    print("peer over ours:", {k: round(v, 2) for k, v in ratios.items()}, "; not the same thing:", OTHER)
    return {"rows": rows, "ratios": ratios, "photographs": len(pictures), "side": o.side, "severity": o.severity}


def in_time(o: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(o.threads)
    pictures = photographs(200, None)
    pictures = (pictures * 2)[:200]
    begin, cpu = time.perf_counter(), time.process_time()
    parts = {}
    for name in BENCHMARK:
        start = time.perf_counter()
        for i, picture in enumerate(pictures):
            corrupt(torch.from_numpy(picture).permute(2, 0, 1), name, 3, generator=generator(0, name, i))
        parts[name] = time.perf_counter() - start
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print({k: round(v, 2) for k, v in parts.items()})
    print(f"200 pictures x 15 x severity 3, native sizes: {wall:.1f} s (goal < 180), {cpu:.1f} s of processor time")
    return {"seconds": wall, "processor seconds": cpu, "threads": o.threads, "parts": parts}


def on_cifar(o: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    import lynceus.data
    from bench import _trust
    from lynceus.data.corrupt import corrupt_dataset

    torch.set_num_threads(o.threads)
    pictures = lynceus.data.open(_trust.CIFAR10).subset(range(50_000 - o.count, 50_000))
    begin, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        target = corrupt_dataset(pictures, Path(folder) / "cifar-10-c", corruptions="all")
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        size = sum(f.stat().st_size for f in target.glob("*.npy"))
    print(
        f"CIFAR-10-C of {o.count} pictures, 19 corruptions, 5 severities: {wall:.1f} s, {cpu:.1f} s of processor time, "
        f"{size / 2**20:.0f} MB"
    )
    return {"seconds": wall, "processor seconds": cpu, "count": o.count}


def by_severity(o: argparse.Namespace) -> dict[str, Any]:
    import lynceus.data
    from bench import _trust
    from lynceus.core.subject import Subject
    from lynceus.trust.corrupted import Corrupted

    torch.set_num_threads(o.threads)
    net = Subject(_trust.cifar_cnn(), mean=(0.0,) * 3, std=(1.0,) * 3, name="small CNN")  # it centres pixels itself
    held = lynceus.data.open(_trust.CIFAR10).subset(range(50_000 - o.count, 50_000))
    begin = time.process_time()
    report = Corrupted(corruptions=("all",), batch_size=250)(net, held)
    print(report.table(width=120))
    # differences below two standard errors of a paired comparison of o.count answers are no fall
    slack = 2 * (0.5 / o.count) ** 0.5
    falls = [
        f"{r['corruption']} {s}->{s + 1} ({r[f'severity {s}']:.3f} -> {r[f'severity {s + 1}']:.3f})"
        for r in report.rows
        for s in range(1, 5)
        if r[f"severity {s + 1}"] < r[f"severity {s}"] - slack
    ]
    print(f"error falls by more than {slack:.3f} at:", ", ".join(falls) or "none")
    print(f"{time.process_time() - begin:.1f} s of processor time")
    return {"count": o.count, "summary": report.summary, "rows": report.rows, "falls": falls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="time", choices=("peer", "time", "cifar", "severity"))
    parser.add_argument("--peer", default="")
    parser.add_argument("--side", type=int, default=224, help="0: native sizes")
    parser.add_argument("--photos", type=int, default=150)
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--corruptions", nargs="*")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    o.side = o.side or None
    found = {"peer": beside_the_peer, "time": in_time, "cifar": on_cifar, "severity": by_severity}[o.what](o)
    found["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    if o.out:
        o.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
