"""What block pruning left of every layer: sparsity, multiply-adds, block multiplications, milliseconds, joules."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.rewrite.block_prune.costs import AT, TILE, milliseconds
from lynceus.rewrite.block_prune.energy import joules_per_image
from lynceus.rewrite.block_prune.sparse import BlockSparseConv, BlockSparseLinear


def sparsity_report(
    model: nn.Module,
    example: Float[Tensor, "b c h w"],
    *,
    facts: dict[str, Any] | None = None,
    timed: bool = False,
    energy: bool = False,
) -> Report:
    """One row per block-sparse layer of `model`, counts per image.

    example: images as the model takes them; one is run. facts: what was asked for and chosen (BlockPrune gives them).
    timed: also the milliseconds of each layer's size, measured on this machine at some sparsities. energy: also joules
    per image, where the machine has a readable counter; where it has none the report says so.
    """
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    if not sparse:
        raise AdviceError(
            f"{type(model).__name__} has no block-sparse layer; BlockPrune(...)(model, images) makes them."
        )
    used = _positions(model, example[:1])
    facts = facts or {}
    timed = timed or facts.get("cost") == "measured"
    rows = []
    plan = getattr(getattr(model, "rewrite", None), "kept", {})
    dropped = 0
    for name, layer in sparse.items():
        o, i = layer.out_features, layer.in_features
        kept, places, of = int(layer.kept.sum()), used.get(name, 0), layer.kept.size
        planned = re.match(r"(\d+)x(\d+):", plan.get(name, ""))
        if planned is not None and (grid := (int(planned[1]), int(planned[2]))) != layer.grid:
            # heads were taken out, always in whole blocks
            o, i = (n + (g - h) * b for n, g, h, b in zip((o, i), grid, layer.grid, layer.block))
            of, dropped = grid[0] * grid[1], dropped + 1
        row: dict[str, Any] = {
            "layer": name,
            "shape": f"{o}x{i}",
            "block": f"{layer.block[0]}x{layer.block[1]}",
            "sparsity": 1 - kept / of,
            "blocks": kept,
            "of": of,
            "macs": layer.weights * places,
            "dense macs": o * i * places,
            "power (weights)": kept * (i // TILE),
            "power (tokens)": kept * -(-places // TILE),
        }
        if timed and places:
            table = milliseconds((o, i), places, layer.block)
            row |= {f"ms at {s:.0%}": t for s, t in zip(AT, table)}
        rows.append(row)
    other = sum(
        used[n] * m.weight.numel()
        for n, m in model.named_modules()
        if n in used and n not in sparse and isinstance(m, (nn.Linear, nn.Conv2d))
    )
    left, dense = (float(sum(r[k] for r in rows)) for k in ("macs", "dense macs"))
    summary: dict[str, float] = {
        "layers": len(rows),
        "macs of these layers left": left / dense if dense else 0.0,
        "macs of all layers left": (left + other) / (dense + other) if dense + other else 0.0,
        "block multiplications (weights)": sum(r["power (weights)"] for r in rows),
        "block multiplications (tokens)": sum(r["power (tokens)"] for r in rows),
    }
    notes = [
        f"Power is counted in multiplications of blocks with {TILE}-wide tiles: blocks x in / {TILE} (weights), and "
        f"blocks x tokens / {TILE} per image (tokens)."
    ]
    if dropped:
        notes.append(f"Attention heads were taken out of {dropped} of these layers; dense counts them as they were.")
    if "cost left" in facts:
        unit = "milliseconds per image" if facts["cost"] == "measured" else "block multiplications"
        notes.append(
            f"Charged while allocating: {facts['cost']} cost, {facts['cost left']:.4g} of {facts['cost dense']:.4g} "
            f"{unit} left; beta {facts['beta']:.3g}, slope {facts['mu']:.3g}."
        )
    if timed:
        notes.append(
            f"Columns 'ms at': measured here, one image, {torch.get_num_threads()} thread(s), random blocks; 0% is the "
            "dense layer."
        )
    if energy:
        joules, source = joules_per_image(model, example)
        if joules is not None:
            summary["joules per image"] = joules
        notes.append(f"Energy: {source}")
    if "flops" in facts:
        summary["flops asked"] = facts["flops asked"]
        summary["flops"] = facts["flops"]
    answer = f"{len(rows)} layers keep {left / dense:.0%} of their multiply-adds." if dense else ""
    return Report(
        name="block sparsity", answer=answer, rows=rows, summary=summary, notes=notes, environment=environment()
    )


def _positions(model: nn.Module, image: Tensor) -> dict[str, int]:
    """How often per image every layer with weights is used: the sparse ones and the dense."""
    found: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (BlockSparseLinear, nn.Linear, nn.Conv2d)):

            def note(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                maps = isinstance(module, (nn.Conv2d, BlockSparseConv))
                found[name] = found.get(name, 0) + out.numel() // out.shape[1 if maps else -1]

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found
