"""A span of blocks on cluster tokens inside columnar transformers: our ViT and timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones.from_timm import TimmBackbone
from lynceus.backbones.vit import ViT
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import to_map
from lynceus.rewrite.expedite.operators import Clustering
from lynceus.rewrite.expedite.options import Span

Run = Callable[[nn.Module, Tensor, Any], Tensor]


def through(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b n c"],
    size: tuple[int, int],
    span: Span,
    *,
    prefix: int,
    depth: int,
    run: Run,
    wanted: Sequence[int] = (),
    last: int | None = None,
) -> tuple[Tensor, list[Tensor], Clustering | None]:
    """Tokens after block `last` (None: all), those after the `wanted` blocks, and, where the first are still those of
    clusters, the clustering they belong to. What is wanted is given back for the whole map.

    x: `prefix` tokens that are never clustered, then a map of `size`. run(block, x, size): a block on such tokens.
    """
    kept: dict[int, Tensor] = {}
    held: Clustering | None = None
    stop = depth - 1 if last is None else last
    whole, end = size, span.end(depth)
    for i, block in enumerate(blocks):
        if i > stop:
            break
        if i == span.alpha:
            held = span.cluster(x[:, prefix:], whole)
            x, size = torch.cat([x[:, :prefix], held.centres], 1), held.size
        x = run(block, x, size)
        if held is not None and i == end - 1 and end < depth:
            x, size, held = restored(x, held, span, prefix), whole, None
        if i in wanted:
            kept[i] = x if held is None else restored(x, held, span, prefix)
    return x, [kept[i] for i in wanted], held


def restored(x: Float[Tensor, "b m c"], held: Clustering, span: Span, prefix: int) -> Float[Tensor, "b n c"]:
    """Prefix tokens as they are, then all tokens of the map, rebuilt."""
    rebuilt = span.rebuild(held, x[:, prefix:])
    return torch.cat([x[:, :prefix], rebuilt], 1) if prefix else rebuilt


class ExpeditedViT(ViT):
    """A ViT whose blocks `span` run on cluster tokens. Where the span reaches the end, the final norm does so too."""

    span: Span

    def _through(
        self, image: Tensor, wanted: Sequence[int], *, stop: bool = False
    ) -> tuple[Tensor, list[Tensor], Clustering | None]:
        if self.training and self.config.patch_drop > 0:
            raise AdviceError("patch_drop leaves no map to cluster; set patch_drop=0 to train an expedited model.")
        return through(
            self.blocks,
            self.embed(image),
            self.patch_embed.grid(image.shape[-2], image.shape[-1]),
            self.span,
            prefix=self.prefix,
            depth=len(self.blocks),
            run=self.run_block,
            wanted=wanted,
            last=max(wanted) if stop and wanted else None,
        )

    def run(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False) -> tuple[Tensor, list[Tensor]]:
        x, kept, held = self._through(image, wanted, stop=stop)
        return (x if held is None else restored(x, held, self.span, self.prefix)), kept

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self._normed(*self._through(image, ())[::2])

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found, held = self._through(image, self.levels)
        size = self.patch_embed.grid(image.shape[-2], image.shape[-1])
        return self._normed(x, held), [to_map(t[:, self.prefix :], *size) for t in found]

    def _normed(self, x: Tensor, held: Clustering | None) -> Tensor:
        x = self.norm(x)
        return x if held is None else restored(x, held, self.span, self.prefix)


class ExpeditedTimm(TimmBackbone):
    """timm's VisionTransformer with a span of blocks on cluster tokens."""

    span: Span

    def _through(self, image: Tensor, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor], Clustering | None]:
        image, net = self.fitted(image), self.model
        x = net._pos_embed(net.patch_embed(image))
        return through(
            net.blocks,
            net.norm_pre(net.patch_drop(x)),
            self._grid(image),
            self.span,
            prefix=net.num_prefix_tokens,
            depth=len(net.blocks),
            run=lambda block, x, size: self.run_block(block, x),
            wanted=wanted,
        )

    def _grid(self, image: Tensor) -> tuple[int, int]:
        high, wide = self.model.patch_embed.dynamic_feat_size(image.shape[-2:])
        return int(high), int(wide)

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        x, _, held = self._through(image, ())
        return self._normed(x, held)

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found, held = self._through(image, self.levels)
        prefix, size = self.model.num_prefix_tokens, self._grid(self.fitted(image))
        return self._normed(x, held), [to_map(t[:, prefix:], *size) for t in found]

    def _normed(self, x: Tensor, held: Clustering | None) -> Tensor:
        x = self.model.norm(x)
        return x if held is None else restored(x, held, self.span, self.model.num_prefix_tokens)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        return self.forward_head(self.forward_features(image))


def plain_timm(model: TimmBackbone) -> bool:
    """True for timm's plain VisionTransformer, whose passes `ExpeditedTimm` knows."""
    net = model.model
    parts = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "num_prefix_tokens")
    return type(net).__name__ in ("VisionTransformer", "VisionTransformerDistilled") and all(
        hasattr(net, p) for p in parts
    )
