"""A span of blocks on cluster tokens in networks of several stages (CvT, SOFT, ViT-Res, VOLO) and in those of maps
(ConViT, Hyena ViT). Centres lie on a smaller grid, on which convolutions and positions go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone
from lynceus.backbones.convit import ConViT
from lynceus.backbones.cvt import CvT
from lynceus.backbones.hyena_vit import HyenaViT
from lynceus.backbones.resnas import ResNAS
from lynceus.backbones.soft import Soft
from lynceus.backbones.volo import VOLO
from lynceus.core.shapes import to_map
from lynceus.layers.gated_position import GatedPositionAttention
from lynceus.rewrite.expedite.columnar import restored, through
from lynceus.rewrite.expedite.operators import Clustering
from lynceus.rewrite.expedite.options import Span


class OnMaps(Backbone):
    """A network whose blocks take maps."""

    span: Span

    def run_on_map(self, block: nn.Module, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """A block of maps, on the tokens of one."""
        return self.run_block(block, x.unflatten(1, size)).flatten(1, 2)


class Staged(OnMaps):
    """A network of stages, with some blocks of stage `stage` on cluster tokens; the stage ends with all of them."""

    stage: int

    def run_group(
        self, blocks: Sequence[nn.Module], x: Tensor, group: int, size: tuple[int, int] | None = None
    ) -> Tensor:
        if group != self.stage or self.span.alpha >= len(blocks):
            return super().run_group(blocks, x, group, size)
        if size is None:
            whole = (x.shape[1], x.shape[2])
            return self._through(blocks, x.flatten(1, 2), whole, prefix=0, maps=True).unflatten(1, whole)
        return self._through(blocks, x, size, prefix=x.shape[1] - size[0] * size[1])

    def _through(
        self, blocks: Sequence[nn.Module], x: Tensor, size: tuple[int, int], *, prefix: int, maps: bool = False
    ) -> Float[Tensor, "b n c"]:
        run = self.run_on_map if maps else self.run_block
        x, _, held = through(blocks, x, size, self.span, prefix=prefix, depth=len(blocks), run=run)
        return x if held is None else restored(x, held, self.span, prefix)


class ExpeditedCvT(Staged, CvT):
    """See `Staged`; the convolutions that make queries, keys and values run on the grid of clusters."""


class ExpeditedSoft(Staged, Soft):
    """See `Staged`; landmarks are made on the grid of clusters."""


class ExpeditedResNAS(Staged, ResNAS):
    """See `Staged`."""


class ExpeditedVOLO(OnMaps, VOLO):
    """The groups of blocks on the coarse map count as one: the span may go from one into the next."""

    def run(self, x: Float[Tensor, "b h w c"], last: int | None = None) -> list[Float[Tensor, "b hi wi ci"]]:
        stop, groups = len(self.ends) - 1 if last is None else last, coarse_groups(self)
        maps = super().run(x, min(stop, groups[0] - 1)) if groups[0] else []
        if stop < groups[0]:
            return maps
        x = self.entered(maps[-1] if maps else x, groups[0])
        size = (x.shape[1], x.shape[2])
        blocks = [self.blocks_of(g) for g in groups]
        ends = [sum(map(len, blocks[: i + 1])) - 1 for i in range(stop - groups[0] + 1)]
        _, found, _ = through(
            [b for group in blocks for b in group],
            x.flatten(1, 2),
            size,
            self.span,
            prefix=0,
            depth=sum(map(len, blocks)),
            run=self.run_on_map,
            wanted=ends,
            last=ends[-1],
        )
        return [*maps, *(t.unflatten(1, size) for t in found)]


def coarse_groups(model: VOLO) -> range:
    """The groups behind the last downsampling and the position table."""
    count = len(model.ends)
    down = [i for i in range(len(model.network)) if i not in model.ends]
    first = next((g for g in range(count) if model.ends[g] >= 2 and model.ends[g] > max(down, default=-1)), count - 1)
    return range(first, count)


class ExpeditedHyenaViT(OnMaps, HyenaViT):
    """Some blocks on the grid of clusters; long convolutions have the length of that grid."""

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.embed(image)
        size = (x.shape[1], x.shape[2])
        wanted = self.levels[: last + 1]
        _, found, _ = through(
            self.blocks,
            x.flatten(1, 2),
            size,
            self.span,
            prefix=0,
            depth=len(self.blocks),
            run=self.run_on_map,
            wanted=wanted,
            last=wanted[-1],
        )
        return [to_map(t, *size) for t in found]


class ExpeditedConViT(ConViT):
    """Some blocks on cluster tokens. Gated positional attention asks of clusters what it asked of their cells on
    average; the class token joins as before and is never clustered."""

    span: Span

    def run(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(image)
        whole = size = (x.shape[1], x.shape[2])
        kept: dict[int, Tensor] = {}
        held: Clustering | None = None
        depth = len(self.blocks)
        last, end = max(wanted) if stop and wanted else depth - 1, self.span.end(depth)
        for i, block in enumerate(self.blocks):
            if i > last:
                break
            if i == self.config.local_layers:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
            if i == self.span.alpha:
                tokens = x.flatten(1, 2) if x.ndim == 4 else x[:, 1:]
                held = self.span.cluster(tokens, whole)
                x, size = _in_place_of(x, held.centres, held.size), held.size
            gated = held is not None and isinstance(block.attn, GatedPositionAttention)
            x = self.run_block(block, x, *(([whole] if gated else []) if x.ndim == 4 else [size]))
            if held is not None and (i == end - 1 or i == last):
                x, size, held = self._rebuilt(x, held, whole), whole, None
            if i in wanted:
                kept[i] = x if held is None else self._rebuilt(x, held, whole)
        return x, [kept[i] for i in wanted]

    def _rebuilt(self, x: Tensor, held: Clustering, whole: tuple[int, int]) -> Tensor:
        tokens = x.flatten(1, 2) if x.ndim == 4 else x[:, 1:]
        return _in_place_of(x, self.span.rebuild(held, tokens), whole)


def _in_place_of(x: Tensor, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Tensor:
    """Tokens in the form of x: a map b h w c, or behind its class token."""
    return tokens.unflatten(1, size) if x.ndim == 4 else torch.cat([x[:, :1], tokens], 1)
