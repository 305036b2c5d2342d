"""`rewrite.deploy` beside timm's fp32 eager: equal weights, answers judged on pictures, interleaved timing.

python -m bench.deploy --threads 1                  # Swin-T, ConvNeXt-T, ViT-S, HorNet-T at batch 8
python -m bench.deploy --models vit_small_patch16_224 --ways eager packed mixed --out deploy.json

There are no trained weights here, and a fresh network's answers are ties that any rounding turns. So each network gets
random weights and a classifier fitted by ridge regression on its features of enlarged digits, 10 classes; the answers
are judged on other digits. Goal: 1.3 times timm, 3 times where the CPU has AMX.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones import PEERS
from bench.peers import Absent, Peer, forward_of, interleaved, median_ratio, pair
from lynceus.rewrite.deploy import Deploy

MODELS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224", "hornet_tiny_7x7")
TIMM_FOR = {"hornet_tiny_7x7": "timm:convnext_tiny"}  # timm has no HorNet: the same budget stands in


def digits(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Normalised pictures (n, 3, size, size) and labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[:count]
    image = torch.from_numpy(found.images).float()[order, None] / 16
    image = F.interpolate(image, (size, size), mode="bicubic").expand(-1, 3, -1, -1)
    return (image - 0.45) / 0.23, torch.from_numpy(found.target)[order]


def fit(ours: Any, theirs: Any, image: Tensor, label: Tensor, half: int, batch: int) -> float:
    """The same 10-class head on both networks, from the first `half` pictures; accuracy on the others."""
    with torch.inference_mode():
        vectors = torch.cat([ours.forward_head(ours.forward_features(x), pre_logits=True) for x in image.split(batch)])
    mean, scale = vectors[:half].mean(0), vectors[:half].std(0) + 1e-6
    a = F.pad((vectors[:half] - mean) / scale, (0, 1), value=1.0).double()
    target = 2.0 * F.one_hot(label[:half], 10).double() - 1
    # as much ridge as pictures: less would let the head live on what rounding changes
    weight = torch.linalg.solve(a.T @ a + half * torch.eye(a.shape[1]), a.T @ target).float()
    for model in (ours, theirs):
        if model is None:
            continue
        model.reset_classifier(10)
        head = model.get_classifier()
        with torch.no_grad():
            head.weight.copy_((weight[:-1] / scale[:, None]).T)
            head.bias.copy_(weight[-1] - (mean / scale) @ weight[:-1])
        model.eval()
    with torch.inference_mode():
        answers = ours.get_classifier()(vectors[half:]).argmax(1)
    return float((answers == label[half:]).float().mean())


def measure(name: str, args: argparse.Namespace, workdir: str) -> dict[str, Any]:
    peer = next((p for p in PEERS if p.ours == name and p.peer.startswith(("timm", "authors"))), None)
    stand_in = TIMM_FOR.get(name)
    if stand_in is not None:  # another network: its weights and answers are its own
        _, theirs = pair(Peer(stand_in.partition(":")[2], stand_in), workdir)
        ours = filled(name)
        shared = None
    else:
        assert peer is not None
        ours, theirs = pair(peer, workdir)
        shared = theirs
    image, label = digits(args.fit + args.images, args.size)
    accuracy = fit(ours, shared, image, label, args.fit, args.batch)
    example, judges = image[: args.batch].clone(), image[args.fit :]
    begun = time.perf_counter()
    config = Deploy(ways=args.ways, seconds=args.seconds, threads=tuple(args.deploy_threads or [args.threads]))
    fast = config(ours, example, judges)
    spent = time.perf_counter() - begun
    assert fast.report is not None
    print(fast.report.table(width=170), flush=True)
    a, b = fast(example), forward_of(theirs, example)()
    difference = float((a - b).abs().max() / b.std()) if shared is not None else float("nan")
    runs = {"ours": forward_of(fast, example), "peer": forward_of(theirs, example)}
    times = interleaved(runs, args.compare, clock=time.process_time if args.cpu_time else time.perf_counter)
    ours_ms, peer_ms = (1e3 * statistics.median(times[k]) for k in ("ours", "peer"))
    return {
        "model": name,
        "peer": stand_in or (peer.peer if peer is not None else ""),
        "way": fast.way,
        "threads": fast.rewrite.threads,
        "agreement": fast.report.summary["agreement"],
        "images": int(fast.report.summary["images"]),
        "accuracy": accuracy,
        "difference": difference,
        "ours_ms": ours_ms,
        "peer_ms": peer_ms,
        "ratio": median_ratio(times),
        "deploy_s": spent,
        "rows": fast.report.rows,
    }


def filled(name: str) -> nn.Module:
    import lynceus
    from bench.peers import fill

    model = lynceus.create_model(name)
    fill(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--ways", nargs="*", help="default: all that suit the machine")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=200, help="pictures to judge on")
    parser.add_argument("--fit", type=int, default=600, help="pictures to fit the heads on")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per way")
    parser.add_argument("--compare", type=float, default=20.0, help="seconds of timing beside timm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--deploy-threads", type=int, nargs="*", help="thread counts to try; default: --threads")
    parser.add_argument("--cpu-time", action="store_true", help="beside timm, count CPU time; one thread only")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time is fair on one thread only: add --threads 1")
    torch.set_num_threads(args.threads)
    args.ways = tuple(args.ways) if args.ways else None
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    rows = []
    with tempfile.TemporaryDirectory() as workdir:
        for name in args.models:
            try:
                rows.append(measure(name, args, workdir))
            except Absent as error:
                print(f"{name}: skipped: {error}")
                continue
            r = rows[-1]
            print(
                f"\n{name}: {r['way']} {r['ours_ms']:.0f} ms, {r['peer']} fp32 eager {r['peer_ms']:.0f} ms: "
                f"{r['ratio']:.2f} times; {r['agreement']:.2%} of {r['images']} answers kept "
                f"(accuracy {r['accuracy']:.1%}), difference {r['difference']:.1e}\n",
                flush=True,
            )
    if rows:
        mean = statistics.geometric_mean([r["ratio"] for r in rows])
        print(f"geometric mean {mean:.2f}, lowest {min(r['ratio'] for r in rows):.2f}; goal {3.0 if amx else 1.3}")
    if args.out:
        environment = {"torch": torch.__version__, "threads": args.threads, "machine": platform.platform(), "amx": amx}
        with open(args.out, "w") as file:
            json.dump({"environment": environment, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
