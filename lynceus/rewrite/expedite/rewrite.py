"""Expedite: some blocks of a trained transformer run on clusters of tokens; shapes and weights stay as they are.

Paper: Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, NeurIPS 2022,
arXiv 2210.01035
Code: Expedit-LargeScale-Vision-Transformer/Expedit-Segmenter and Expedit-SAM
Licence: MIT and Apache-2.0
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.backbones.convit import ConViT
from lynceus.backbones.convnext import ConvNeXt
from lynceus.backbones.cvt import CvT
from lynceus.backbones.from_timm import TimmBackbone
from lynceus.backbones.halonet import HaloNet
from lynceus.backbones.hornet import HorNet
from lynceus.backbones.hyena_vit import HyenaViT
from lynceus.backbones.lsnet import LSNet
from lynceus.backbones.plain_mamba import PlainMamba
from lynceus.backbones.resnas import ResNAS
from lynceus.backbones.resnet import ResNet
from lynceus.backbones.sam_vit import SamViT
from lynceus.backbones.soft import Soft
from lynceus.backbones.spartan import SpaRTAN
from lynceus.backbones.swin import Swin, WindowPyramid
from lynceus.backbones.swin_v2 import SwinV2
from lynceus.backbones.vim import Vim
from lynceus.backbones.vit import ViT
from lynceus.backbones.volo import VOLO
from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.expedite.columnar import ExpeditedTimm, ExpeditedViT, plain_timm
from lynceus.rewrite.expedite.operators import Normalise, Route
from lynceus.rewrite.expedite.options import Span
from lynceus.rewrite.expedite.stages import (
    ExpeditedConViT,
    ExpeditedCvT,
    ExpeditedHyenaViT,
    ExpeditedResNAS,
    ExpeditedSoft,
    ExpeditedVOLO,
    coarse_groups,
)
from lynceus.rewrite.expedite.windows import ExpeditedSamViT, ExpeditedSwin, ExpeditedSwinV2, shrink
from lynceus.rewrite.swap import signed

KINDS: dict[type, type] = {
    ViT: ExpeditedViT,
    TimmBackbone: ExpeditedTimm,
    Swin: ExpeditedSwin,
    SwinV2: ExpeditedSwinV2,
    SamViT: ExpeditedSamViT,
    ConViT: ExpeditedConViT,
    HyenaViT: ExpeditedHyenaViT,
    VOLO: ExpeditedVOLO,
    CvT: ExpeditedCvT,
    Soft: ExpeditedSoft,
    ResNAS: ExpeditedResNAS,
}
STAGED = (WindowPyramid, CvT, Soft, ResNAS)
SCAN = (
    "a scan's state takes one step per token and depends on their order, and a cluster would be one step instead of "
    "many. PruneTokens (lynceus rewrite prune_tokens) makes scans shorter and keeps count of the steps"
)
CONVOLUTION = "a convolution sees neighbours in cells of the map; PruneChannels makes such networks smaller"
WHY: dict[type, str] = {
    ConvNeXt: CONVOLUTION,
    HorNet: CONVOLUTION,
    ResNet: CONVOLUTION,
    SpaRTAN: CONVOLUTION,
    Vim: SCAN,
    PlainMamba: SCAN,
    HaloNet: "its windows are measured in cells of the map, and convolutions stand between them",
    LSNet: "all of its blocks but a few are convolutions, which see neighbours in cells of the map",
}
EXPEDITED = tuple(KINDS.values())
NEVER = 10_000  # an alpha behind every network's last block
SAM_SETTINGS: dict[str, Any] = {
    "hourglass_clustering_location": -1,
    "hourglass_num_cluster": 100,
    "hourglass_cluster_iters": 5,
    "hourglass_temperture": 0.01,
    "hourglass_cluster_window_size": 5,
    "hourglass_reconstruction_k": 20,
}


@dataclass(frozen=True, kw_only=True)
class Expedite:
    """Rewrite: token clustering before block `alpha`, `beta` blocks on the clusters, then all tokens rebuilt.

    For our ViT, timm's VisionTransformer, Swin, Swin V2, SAM's encoder, ConViT, Hyena ViT, VOLO, CvT, SOFT and ViT-Res
    (clusters lie on a smaller grid, so convolutions and positions go on); no training is needed, none is hindered.

    alpha: blocks that run on all tokens first; from the depth on nothing changes. None: five twelfths of the depth.
      The authors' Segmenter clusters after block `location` (alpha = location + 1), their SAM before it (alpha =
      location). Where there are stages, blocks of the stage; in VOLO, of the coarse map.
    beta: blocks on clusters; None: all that follow (in the stage).
    clusters: rows and columns of clusters: of the map, or, where attention has windows, of every window. None: .7 of
      the rows and columns that there are.
    stage: of Swin, Swin V2, CvT, SOFT and ViT-Res, counted from 0; None: the one with most blocks.
    iterations, window, temperature, scale, route: of `operators.cluster`. neighbours: centres that a token is rebuilt
      from (-1: all). normalise: their weights sum to one ("sum"), or have length one as in the authors' code ("l2"),
      which makes tokens larger, by about the square root of `neighbours`; a norm behind them hides it.
    temperature: multiplies squared distances, so the right one depends on the width and scale of the features: .02 was
      found for ViT-L, .005 to .01 for SAM. "auto" measures the scale in each image.
    rebuild_temperature: for the weights that tokens are rebuilt with; None: the same.
    """

    alpha: int | None = None
    beta: int | None = None
    clusters: tuple[int, int] | None = None
    stage: int | None = None
    iterations: int = 5
    window: int = 5
    temperature: float | Literal["auto"] = 0.02
    scale: float = 1.0
    neighbours: int = 20
    normalise: Normalise = "sum"
    rebuild_temperature: float | None = None
    route: Route = "auto"

    def __post_init__(self) -> None:
        if self.clusters is not None:
            object.__setattr__(self, "clusters", tuple(int(n) for n in self.clusters))
            if len(self.clusters) != 2 or min(self.clusters) < 1:
                raise AdviceError(f"clusters is (rows, columns), both at least 1, not {self.clusters}.")
        if self.window < 1 or self.window % 2 == 0:
            raise AdviceError(f"window is an odd number of cells, not {self.window}; try window={self.window + 1}.")
        if self.iterations < 0:
            raise AdviceError(f"iterations is 0 or more, not {self.iterations}.")
        if self.neighbours == 0 or self.neighbours < -1:
            raise AdviceError(f"neighbours is 1 or more, or -1 for all centres, not {self.neighbours}.")
        if self.temperature != "auto" and not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise AdviceError(f"temperature is a positive number or 'auto', not {self.temperature!r}.")
        if self.scale <= 0:
            raise AdviceError(f"scale is positive, not {self.scale}.")
        if self.normalise not in ("sum", "l2"):
            raise AdviceError(f"normalise is 'sum' or 'l2', not {self.normalise!r}.")

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` (a Backbone, or what holds one in `.backbone`), in eval mode; its state is the same.

        example: pixels (b, 3, h, w), run once to see it fit. AdviceError for a network without such blocks."""
        self._check(_inner(model))
        made = copy.deepcopy(model)
        inner = _inner(made)
        stage, depth, what = self._blocks(inner)
        span = self.span(depth)
        span.check(depth, what)
        staged, windows = isinstance(inner, STAGED), isinstance(inner, WindowPyramid)
        inner.__class__ = KINDS[type(inner)]
        inner.span = span
        if staged:
            inner.stage = stage
        if windows:
            side = inner.config.window(stage)[0]
            grid = span.grid((side, side))
            if grid[0] != grid[1]:
                raise AdviceError(f"Windows of a Swin are square: clusters={grid} is not; try {(max(grid),) * 2}.")
            for block in inner.layers[stage].blocks[span.alpha : span.end(depth)]:
                shrink(block.attn, grid[0])
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made

    def span(self, depth: int) -> Span:
        """What is done to `depth` blocks."""
        return Span(
            alpha=max(1, round(depth * 5 / 12)) if self.alpha is None else self.alpha,
            beta=self.beta,
            clusters=self.clusters,
            iterations=self.iterations,
            window=self.window,
            temperature=self.temperature,
            scale=self.scale,
            neighbours=self.neighbours,
            normalise=self.normalise,
            rebuild_temperature=self.rebuild_temperature,
            route=self.route,
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Expedite:
        """The options of the authors' configurations: of Expedit-SAM (`hourglass_...`), or of Expedit-Segmenter
        (`cluster_cfg` and `reconstruction_cfg`), which counts blocks differently; weights have length one in both."""
        known = {*SAM_SETTINGS, "cluster_cfg", "reconstruction_cfg"}
        for name in settings:
            if name not in known:
                raise unknown("setting of Expedit", name, known)
        if "cluster_cfg" in settings:
            given = dict(settings["cluster_cfg"])
            stage, back = dict(given.get("stage", {})), dict(settings.get("reconstruction_cfg") or {})
            alpha, last = int(given["location"]) + 1, int(back.get("location", -1))
            return cls(
                alpha=alpha,
                beta=None if last < 0 else last + 1 - alpha,
                clusters=_grid(stage["num_spixels"]),
                iterations=stage.get("n_iters", 5),
                window=stage.get("window_size", 7),
                temperature=stage.get("temperture", 1.0),
                neighbours=back.get("k", 3),
                rebuild_temperature=back.get("temperture", 0.05),
                normalise="l2",
            )
        given = {**SAM_SETTINGS, **settings}
        location = given["hourglass_clustering_location"]
        return cls(
            alpha=location if location >= 0 else NEVER,
            clusters=_grid(given["hourglass_num_cluster"]),
            iterations=given["hourglass_cluster_iters"],
            window=given["hourglass_cluster_window_size"],
            temperature=given["hourglass_temperture"],
            neighbours=given["hourglass_reconstruction_k"],
            normalise="l2",
        )

    def _check(self, inner: Any) -> None:
        name = getattr(inner, "name", type(inner).__name__)
        if isinstance(inner, EXPEDITED):
            raise AdviceError(f"{name} is expedited already; take the model it was made from.")
        if type(inner) not in KINDS:
            ours = [k.__name__ for k in KINDS if k is not TimmBackbone]
            raise AdviceError(
                f"{name} ({type(inner).__name__}) has no span of transformer blocks on one map that could run on "
                f"clusters{_why(inner)}. It works for our {', '.join(ours)}, and for timm's VisionTransformer "
                "(create_model('timm:NAME'))."
            )
        if isinstance(inner, TimmBackbone) and not plain_timm(inner):
            raise AdviceError(
                f"timm's {type(inner.model).__name__} is not its plain VisionTransformer, so its blocks may need "
                "places that clusters have not; take one of `lynceus models 'timm:vit_*'`, or our Swin."
            )
        if self.stage is not None and not isinstance(inner, STAGED):
            kinds = ", ".join(k.__name__ for k in KINDS if issubclass(k, STAGED))
            raise AdviceError(f"{name} has one stage of such blocks; stage={self.stage} is for {kinds}. Leave it out.")

    def _blocks(self, inner: Any) -> tuple[int, int, str]:
        """(stage, blocks in it, what they are called)."""
        if isinstance(inner, VOLO):
            return 0, sum(len(inner.blocks_of(g)) for g in coarse_groups(inner)), f"the coarse map of {inner.name}"
        if not isinstance(inner, STAGED):
            blocks = inner.model.blocks if isinstance(inner, TimmBackbone) else inner.blocks
            return 0, len(blocks), inner.name
        depths = _depths(inner)
        stage = max(range(len(depths)), key=lambda i: depths[i]) if self.stage is None else self.stage
        if not 0 <= stage < len(depths):
            raise AdviceError(f"{inner.name} has stages 0 to {len(depths) - 1}, not {stage}.")
        return stage, depths[stage], f"stage {stage} of {inner.name}"


def _depths(inner: Any) -> tuple[int, ...]:
    """Blocks of every stage."""
    if isinstance(inner, ResNAS):
        return tuple(sum(b.exists for b in s.blocks) for s in inner.plan.stages[: len(inner.stages)])
    return tuple(inner.config.depths[: len(inner.stages)] if isinstance(inner, Soft) else inner.config.depths)


def _why(inner: Any) -> str:
    """What stands in the way: the first layer that mixes tokens, and the reason, where it is known."""
    reason = next((why for kind, why in WHY.items() if isinstance(inner, kind)), None)
    if reason is None:
        return ""
    paths = [s.path for s in inner.mixer_sites()] or [n for n, m in inner.named_modules() if isinstance(m, nn.Conv2d)]
    return f": at {paths[0]} ({type(inner.get_submodule(paths[0])).__name__}), {reason}"


def _inner(model: nn.Module) -> Any:
    return getattr(model, "backbone", model)


def _grid(count: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of clusters, from their number (a square) or both."""
    if not isinstance(count, int):
        return int(count[0]), int(count[1])
    side = math.isqrt(count)
    if side * side != count:
        raise AdviceError(f"{count} clusters make no square; give rows and columns, e.g. {(side, -(-count // side))}.")
    return side, side
