"""Expedite: mIoU without fine-tuning beside naive up-sampling and token merging, and measured time beside MACs.

python -m bench.expedite fidelity --seeds 0 1 2   # small ViT segmenters on generated scenes (trained for minutes, kept)
python -m bench.expedite speed --threads 1        # ViT-S, Swin-T and Swin-S at 512 pixels, in turns with the plain ones
python -m bench.expedite large                    # ViT-L/16 at 640, alpha 10, 28x28 clusters

Goals: a drop of at most 4 points and at least 2 above naive at alpha 3, 8x8 of 16x16; 1.4x at 512 pixels; ViT-L with at
most .70 of the MACs and 1.25x.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus
from bench._rewrites import in_turns
from bench._segmenter import Segmenter, mean_iou, scenes, segmenter
from lynceus.core.cost import cost
from lynceus.rewrite.expedite import Expedite


class Naive(nn.Module):
    """The segmenter with tokens averaged over a coarse grid before block `alpha`, and copied back (nearest) behind the
    final norm."""

    def __init__(self, net: Segmenter, alpha: int, side: int):
        super().__init__()
        self.net, self.alpha, self.side = net, alpha, side

    def forward(self, image: Tensor) -> Tensor:
        body: Any = self.net.backbone
        x = body.embed(image)
        for i, block in enumerate(body.blocks):
            if i == self.alpha:
                grid = x[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
                pooled = F.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)
                x = torch.cat([x[:, :1], pooled], 1)
            x = block(x)
        x = body.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        x = F.interpolate(x, (16, 16), mode="nearest").flatten(2).transpose(1, 2)
        return decoded(self.net, x, image)


class Merging(nn.Module):
    """Token merging (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461) in the segmenter: in every block `count` tokens
    of one half join their most similar one of the other half, between attention and perceptron; weighted means, sizes
    in the attention's logits; at the end every place takes the token it went into."""

    def __init__(self, net: Segmenter, count: int):
        super().__init__()
        self.net, self.count = net, count

    def forward(self, image: Tensor) -> Tensor:
        body: Any = self.net.backbone
        x = body.embed(image)
        size = x.new_ones(*x.shape[:2], 1)
        source = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)  # the token that each place is in
        for block in body.blocks:
            y = block.norm1(x)
            b, n, c = y.shape
            q, k, v = block.attn.qkv(y).view(b, n, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().transpose(1, 2)[:, None])
            x = x + block.attn.proj(y.transpose(1, 2).reshape(b, n, c))
            x, size, source = merged(x, size, source, k.mean(1), self.count)
            x = x + block.mlp(block.norm2(x))
        x = body.norm(x)
        x = x.gather(1, source[:, 1:, None].expand(-1, -1, x.shape[2]))
        return decoded(self.net, x, image)


def merged(x: Tensor, size: Tensor, source: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` of the odd tokens less; token 0, the class token, stays."""
    metric = F.normalize(metric, dim=-1)
    a, b = metric[:, 1::2], metric[:, ::2]
    count = min(count, a.shape[1])
    scores = a @ b.transpose(1, 2)
    scores[:, :, 0] = -torch.inf
    best, into = scores.max(-1)
    order = best.argsort(1, descending=True)
    gone, stay = order[:, :count], order[:, count:].sort(1).values
    into = into.gather(1, gone)

    def joined(v: Tensor) -> Tensor:
        odd, even = v[:, 1::2], v[:, ::2]
        wide = (-1, -1, v.shape[2])
        even = even.scatter_add(1, into[..., None].expand(wide), odd.gather(1, gone[..., None].expand(wide)))
        return torch.cat([even, odd.gather(1, stay[..., None].expand(wide))], 1)

    weights = joined(size)
    evens = metric.shape[1] - a.shape[1]
    number = torch.empty_like(metric[..., 0], dtype=torch.long)  # old number -> new
    number[:, ::2] = torch.arange(evens)
    number.scatter_(1, 2 * stay + 1, evens + torch.arange(stay.shape[1]).expand_as(stay))
    number.scatter_(1, 2 * gone + 1, into)
    return joined(x * size) / weights, weights, number.gather(1, source)


def decoded(net: Segmenter, tokens: Tensor, image: Tensor) -> Tensor:
    logits = net.decode(tokens).transpose(1, 2).unflatten(2, (16, 16))
    return F.interpolate(logits, image.shape[-2:], mode="bilinear")


def fidelity(seeds: list[int], pictures: int) -> list[dict[str, Any]]:
    """A row per seed and way; points are percent of mean IoU on pictures that nobody was trained on."""
    image, label = scenes(pictures, 7)
    rows = []
    for seed in seeds:
        net = segmenter(seed)
        ways: dict[str, nn.Module] = {"plain": net}
        for alpha in (2, 3, 4):
            for side in (6, 8, 10):
                ways[f"expedite {alpha} {side}x{side}"] = Expedite(alpha=alpha, clusters=(side, side))(net)
        for side in (6, 8, 10):
            ways[f"naive 3 {side}x{side}"] = Naive(net, 3, side)
        ways["expedite 3 8x8 auto"] = Expedite(alpha=3, clusters=(8, 8), temperature="auto", scale=5.0)(net)
        ways["expedite 3 8x8 l2"] = Expedite(alpha=3, clusters=(8, 8), normalise="l2")(net)
        same = cost(ways["expedite 3 8x8"], image[:1]).macs
        merging = min(range(4, 32), key=lambda r: abs(cost(Merging(net, r), image[:1]).macs - same))
        ways[f"ToMe {merging} per block"] = Merging(net, merging)
        first = cost(net, image[:1]).macs
        for name, way in ways.items():
            begun = time.process_time()
            points = mean_iou(way.eval(), image, label)
            spent = time.process_time() - begun
            macs = cost(way, image[:1]).macs / first
            rows.append({"seed": seed, "way": name, "MACs": round(macs, 3), "seconds": spent, "mIoU": points})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def compared(models: dict[str, nn.Module], x: Tensor, repeats: int) -> None:
    """Prints the MACs of each model / those of the first, and how many times as fast it is."""
    times, first = in_turns(models, x, repeats), next(iter(models))
    whole = cost(models[first], x).macs
    for name, model in models.items():
        share = round(cost(model, x).macs / whole, 3)
        print(json.dumps({"model": name, "MACs": share, **times[name].faster(times[first])}), flush=True)


def speed(repeats: int) -> None:
    """Beside every try its bound: the same blocks on one cluster (per window), which costs next to nothing."""
    x = torch.randn(1, 3, 512, 512)
    wanted: dict[str, list[dict[str, Any]]] = {
        "vit_small": [{"alpha": 4, "clusters": (16, 16)}, {"alpha": 5, "clusters": (16, 16)}],
        "swin_tiny_patch4_window7_224": [{"alpha": 1, "clusters": (4, 4)}, {"alpha": 0, "clusters": (4, 4)}],
        "swin_small_patch4_window7_224": [{"alpha": 4, "clusters": (4, 4)}, {"alpha": 2, "clusters": (4, 4)}],
    }
    for name, tries in wanted.items():
        net = lynceus.create_model(name).eval()
        models: dict[str, nn.Module] = {name: net}
        for t in tries:
            models[f"alpha {t['alpha']}, {t['clusters']}"] = Expedite(**t)(net)
            models[f"alpha {t['alpha']}, bound"] = Expedite(alpha=t["alpha"], clusters=(1, 1), iterations=0)(net)
        compared(models, x, repeats)


def large(repeats: int) -> None:
    net = lynceus.create_model("vit_large", image_size=(640, 640), num_classes=0).eval()
    models: dict[str, nn.Module] = {
        "vit_large at 640": net,
        "alpha 10, 28x28": Expedite(alpha=10, clusters=(28, 28))(net),
    }
    compared(models, torch.randn(1, 3, 640, 640), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["fidelity", "speed", "large"], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.threads} thread(s)")
    wanted = args.what or ["fidelity", "speed", "large"]
    if "fidelity" in wanted:
        fidelity(args.seeds, args.pictures)
    if "speed" in wanted:
        speed(args.repeats)
    if "large" in wanted:
        large(min(args.repeats, 3))


if __name__ == "__main__":
    main()
