"""Exemplars: the images that excite a unit most, and where on them it is excited.

Hernandez et al., Natural Language Descriptions of Deep Visual Features (MILAN), ICLR 2022, arXiv 2201.11114. Reference:
evandez/neuron-descriptions (MIT), which follows Network Dissection (Bau et al., CVPR 2017, arXiv 1704.05796).
Two passes: the first keeps, per unit, the best images and a running quantile over all positions; the second only runs
the chosen images again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.explain.describe.quantile import RunningQuantile
from lynceus.explain.grad_cam import as_map


@dataclass(frozen=True, kw_only=True, slots=True)
class Exemplars:
    """What excites each of u units of a layer.

    units: their channel numbers. levels: (u,) the threshold of each. activations, ids: (u, k) the greatest value on
    each of the k best images, best first, and the images' places in the data. masks: (u, k, 1, s, s), where the map,
    enlarged to s x s, is above the level. Units that are nowhere above 0 are `inactive`: nothing excites them.
    """

    layer: str
    units: list[int]
    levels: Float[Tensor, " u"]
    activations: Float[Tensor, "u k"]
    ids: Int[Tensor, "u k"]
    masks: Bool[Tensor, "u k 1 s s"]

    @property
    def inactive(self) -> list[int]:
        """Units whose greatest activation is not above 0."""
        return [u for u, a in zip(self.units, self.activations[:, 0].tolist()) if a <= 0]

    def images(self, data: Sequence[Sample], unit: int) -> list[Tensor]:
        """The exemplars of a unit, best first."""
        return [as_float(data[int(i)].image) for i in self.ids[self.units.index(unit)]]


@torch.no_grad()
def exemplars(
    subject: Subject,
    layer: str,
    data: Sequence[Sample],
    *,
    k: int = 15,
    quantile: float = 0.99,
    size: int = 224,
    units: Sequence[int] | None = None,
    batch_size: int = 128,
    exact: int = 6144,
    seed: int = 0,
) -> Exemplars:
    """The k best images of each unit of `layer` and the masks of what excites it there.

    layer: a module's name; its own output is read, before whatever follows (an activation in place changes nothing).
      Maps (b, c, h, w), channels-last maps and tokens (without the class token) are read. A vector (b, c) is a map of
      one cell. quantile: of the activations at all positions of all images; the level of a mask. units: which channels;
      None takes all. exact: up to this many positions per unit are all kept; behind that a sketch of fixed size
      is, whose rank is off by about 0.1%.
    Raises AdviceError for an unknown layer, a plain function, too few images, or a wrong quantile.
    """
    if not isinstance(subject.model, nn.Module):
        raise AdviceError(f"{subject.name} is a plain function: it has no layers to look into.")
    names = [n for n, _ in subject.model.named_modules() if n]
    if layer not in names:
        raise unknown("layer", layer, names, how="See subject.model.named_modules().")
    if k < 1 or len(data) < k:
        raise AdviceError(f"{k} exemplars need at least as many images, at least one; there are {len(data)}.")
    if not 0 < quantile < 1:
        raise AdviceError(f"quantile is a share between 0 and 1, not {quantile}.")
    best: Tensor | None = None
    ids = torch.empty(0)
    running: RunningQuantile | None = None
    chosen: list[int] = []
    for start, maps in _maps(subject, layer, data, range(len(data)), batch_size):
        if running is None:
            chosen = list(range(maps.shape[1])) if units is None else [int(u) for u in units]
            if not chosen or max(chosen) >= maps.shape[1] or min(chosen) < 0:
                raise AdviceError(
                    f"The layer {layer!r} has the units 0 to {maps.shape[1] - 1}; units= asks for others."
                )
            running = RunningQuantile(len(chosen), exact=exact, seed=seed)
            best, ids = maps.new_empty(0, len(chosen)), torch.empty(0, len(chosen), dtype=torch.long)
        maps = maps[:, chosen]
        running.add(maps.permute(0, 2, 3, 1).flatten(0, 2))
        assert best is not None
        best = torch.cat([best, maps.amax((-2, -1))])
        ids = torch.cat([ids, torch.arange(start, start + len(maps))[:, None].expand(-1, len(chosen))])
        best, order = best.sort(dim=0, descending=True, stable=True)
        best, ids = best[:k], ids.gather(0, order)[:k]
    assert running is not None
    assert best is not None
    levels = running.quantile(quantile).to(best.dtype)
    masks = torch.empty(len(chosen), k, 1, size, size, dtype=torch.bool)
    wanted = ids.unique().tolist()
    for start, maps in _maps(subject, layer, data, wanted, batch_size):
        for offset, each in enumerate(maps[:, chosen]):
            rank, unit = (ids == wanted[start + offset]).nonzero(as_tuple=True)
            masks[unit, rank] = enlarged(each[unit][:, None], size) > levels[unit].view(-1, 1, 1, 1)
    return Exemplars(layer=layer, units=chosen, levels=levels, activations=best.T, ids=ids.T, masks=masks)


def enlarged(maps: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c s s"]:
    """Maps at size x size, bilinear between the centres of cells; beyond the outermost centres towards 0, unlike
    `F.interpolate`, which repeats the border."""
    places = (torch.arange(size, dtype=maps.dtype, device=maps.device) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _maps(
    subject: Subject, layer: str, data: Sequence[Sample], which: Iterable[int], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """(how many images came before, maps (b, c, h, w) of the layer) batch by batch."""
    order = list(which)
    module = dict(subject.model.named_modules())[layer]
    for start in range(0, len(order), batch_size):
        pictures = [as_float(data[i].image) for i in order[start : start + batch_size]]
        if len({p.shape for p in pictures}) > 1:
            raise AdviceError("Exemplars need images of one size; lynceus.core.guard.fitted brings them to it.")
        images = torch.stack(pictures)
        heard: list[Tensor] = []

        def hear(_module: nn.Module, _args: Any, out: Any, heard: list[Tensor] = heard) -> None:
            if isinstance(out, Tensor):
                heard.append(out.detach().clone())

        handle = module.register_forward_hook(hear)
        try:
            subject(images)
        finally:
            handle.remove()
        if not heard:
            raise AdviceError(f"The layer {layer!r} gives no tensor when the model runs; name another one.")
        out = heard[-1]
        if out.ndim == 2:
            yield start, out[:, :, None, None].cpu()
            continue
        read = as_map(out, images)
        if read is None and out.ndim != 4:
            raise AdviceError(f"The layer {layer!r} gives {tuple(out.shape)}, neither a map nor a grid of tokens.")
        yield start, (out if read is None else read(out)).cpu()
