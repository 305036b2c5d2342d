"""How far attention looks, layer by layer and head by head, and what ConViT's gates have become.

Non-locality is the mean over queries and images of sum_j attention_ij * distance_ij, in steps of the grid (d'Ascoli et
al., ICML 2021, arXiv 2103.10697). It is read off every global attention on a map: ConViT, ViT, VOLO and their kin.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.core.subject import Normalise
from lynceus.core.types import as_float
from lynceus.layers.attention import Attention
from lynceus.layers.gated_position import GatedPositionAttention, non_locality


@torch.no_grad()
def locality(model: nn.Module, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Report:
    """A row per layer and head: how far it looks, and for gated positional attention its gate, the offset that it looks
    at by position (dx, dy) and the squared width of that look.

    model: a backbone, or what a Task built on one. image: pixels, uint8 or in [0, 1]; a few dozen are enough, since the
    table of attention is b x heads x cells x cells. Attention to a class token has no distance: it is left out, and the
    rest brought to a sum of 1. summary: "distance LAYER" and "gate LAYER", means over heads.
    Raises AdviceError for a network without global attention.
    """
    net: Any = getattr(model, "backbone", model)
    layers: dict[str, Any] = {
        n: m for n, m in net.named_modules() if isinstance(m, (Attention, GatedPositionAttention))
    }
    if not layers:
        raise AdviceError(
            f"{getattr(net, 'name', type(net).__name__)} has no attention among all cells of a map to look at; "
            "ConViT, ViT and VOLO have."
        )
    inputs: dict[str, Tensor] = {}
    handles = [m.register_forward_pre_hook(_listener(inputs, n)) for n, m in layers.items()]
    training = net.training
    try:
        x = as_float(image)
        prepared: Any = getattr(model, "prepared", None)
        if prepared is not None:
            x = prepared(x)
        elif hasattr(net, "mean"):
            x = Normalise(net.mean, net.std).to(x.device)(x)
        sizes = [(int(m.shape[-2]), int(m.shape[-1])) for m in net.eval().forward_stages(x)]
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    report = Report(name="locality of attention", environment=environment(0))
    for name, layer in layers.items():
        if name not in inputs:
            continue
        seen: Any = inputs[name]
        size = _size(seen, sizes, name)
        table = layer.attention(seen).float()
        extra = table.shape[-1] - size[0] * size[1]
        if extra:
            table = table[:, :, extra:, extra:]
            table = table / table.sum(-1, keepdim=True)
        far = non_locality(table, *size)
        gated = isinstance(layer, GatedPositionAttention)
        for head, distance in enumerate(far.tolist()):
            row: dict[str, Any] = {"layer": name, "head": head, "distance": distance}
            if gated:
                dx, dy = layer.centres()[head].tolist()
                row |= {"gate": float(layer.gate[head]), "dx": dx, "dy": dy, "span": float(layer.spans()[head])}
            report.rows.append(row)
        report.summary[f"distance {name}"] = float(far.mean())
        if gated:
            report.summary[f"gate {name}"] = float(layer.gate.mean())
    return report


def _listener(inputs: dict[str, Tensor], name: str) -> Any:
    def hear(_module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name] = args[0]

    return hear


def _size(x: Tensor, sizes: list[tuple[int, int]], name: str) -> tuple[int, int]:
    """Rows and columns of the map that a mixer was given, alone or behind a few other tokens."""
    if x.ndim == 4:
        return int(x.shape[1]), int(x.shape[2])
    fitting = [s for s in sizes if s[0] * s[1] <= x.shape[1]]
    if not fitting:
        raise AdviceError(f"{name} sees {x.shape[1]} tokens, fewer than any map of the network has cells.")
    return max(fitting, key=lambda s: s[0] * s[1])
