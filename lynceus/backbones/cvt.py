"""CvT: a three-stage transformer whose patches, queries, keys and values come from convolutions; no positions.

Paper: Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, arXiv 2103.15808
Code: leoxiaobin/CvT (microsoft/CvT), whose state names are kept
Licence: MIT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.block import MixerBlock
from lynceus.layers.conv_projection import ConvProjection, Projection
from lynceus.layers.drop import linear_rates
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.mlp import QuickGELU

EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class CvTConfig(BackboneConfig):
    """Fields of a CvT; a tuple has one entry per stage, and () stands for its default in every stage.

    image_size: what it is made for, any other works too. patch_size, patch_stride, patch_padding: of the convolution
    that embeds the map of the stage before. dims, heads, depths: channels, heads and blocks. mlp_ratio: width of the
    perceptrons. class_token: a token in front of the stage's map, which ends with the stage; the classifier reads that
    of the last stage, or, where it has none, the mean of its map.
    projection: what makes queries, keys and values, see `ConvProjection`; kernel, stride_kv, padding_q, padding_kv: of
    it. qkv_bias: in their linear layers. proj_drop, attn_drop: dropout after the embedding, in perceptrons and
    projections, and on attention weights. drop_path_rates: largest stochastic depth of each stage, linear over its own
    blocks; (): drop_path_rate in the last stage only. init: of linear layers, normals of 0.02 or Xavier's uniform.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, ...] = (7, 3, 3)
    patch_stride: tuple[int, ...] = (4, 2, 2)
    patch_padding: tuple[int, ...] = (2, 1, 1)
    dims: tuple[int, ...] = (64, 192, 384)
    heads: tuple[int, ...] = (1, 3, 6)
    depths: tuple[int, ...] = (1, 2, 10)
    mlp_ratio: tuple[float, ...] = ()
    class_token: tuple[bool, ...] = (False, False, True)
    projection: tuple[Projection, ...] = ()
    kernel: tuple[int, ...] = ()
    stride_kv: tuple[int, ...] = ()
    padding_q: tuple[int, ...] = ()
    padding_kv: tuple[int, ...] = ()
    qkv_bias: tuple[bool, ...] = ()
    proj_drop: tuple[float, ...] = ()
    attn_drop: tuple[float, ...] = ()
    drop_path_rates: tuple[float, ...] = ()
    init: Literal["trunc_norm", "xavier"] = "trunc_norm"

    def __post_init__(self) -> None:
        count = len(self.dims)
        for name in (*_NEEDED, *_DEFAULTS, "drop_path_rates"):
            given = getattr(self, name)
            if len(given) != count and (given or name in _NEEDED):
                raise AdviceError(f"{name} {given} must have one entry for each of the {count} stages that dims tells.")
        if self.init not in ("trunc_norm", "xavier"):
            raise AdviceError(f"init is 'trunc_norm' or 'xavier', not {self.init!r}.")

    def of(self, name: str, stage: int) -> Any:
        """The value of a field in a stage, its default where none is given."""
        given = getattr(self, name)
        return given[stage] if given else _DEFAULTS[name]

    def rates(self, stage: int) -> list[float]:
        """Stochastic depth of each block of a stage."""
        last = stage == len(self.dims) - 1
        largest = self.drop_path_rates[stage] if self.drop_path_rates else self.drop_path_rate * last
        return linear_rates(largest, self.depths[stage])

    def grid(self, stage: int) -> tuple[int, int]:
        """The map of a stage at `image_size`."""
        height, width = self.image_size
        for size, stride, padding in zip(self.patch_size[: stage + 1], self.patch_stride, self.patch_padding):
            height, width = ((max(n + 2 * padding, size) - size) // stride + 1 for n in (height, width))
        return height, width


_NEEDED = ("patch_size", "patch_stride", "patch_padding", "dims", "heads", "depths", "class_token")
_DEFAULTS: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "projection": "dw_bn",
    "kernel": 3,
    "stride_kv": 2,
    "padding_q": 1,
    "padding_kv": 1,
    "qkv_bias": True,
    "proj_drop": 0.0,
    "attn_drop": 0.0,
}


_NONE = nn.Identity()  # no batch norm behind the patches


class ConvEmbed(nn.Module):
    """Overlapping patches through one convolution, then LayerNorm: b i h w -> a map b H W d.

    What is smaller than the kernel is zero-padded right and bottom.
    """

    def __init__(self, in_chans: int, dim: int, size: int, stride: int, padding: int):
        super().__init__()
        self.least = max(size - 2 * padding, 1)
        self.proj = nn.Conv2d(in_chans, dim, size, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self._folds = Folds()

    def train(self, mode: bool = True) -> ConvEmbed:
        self._folds.forget()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b H W d"]:
        if self.least > 1:
            x = pad_to(x, self.least)
        x = conv_bn(x, self.proj, _NONE, folds=self._folds, name="proj")
        return self.norm(x.permute(0, 2, 3, 1))


class CvTStage(nn.Module):
    """Embedding, class token if there is one, blocks. Gives the map b h w c and what became of the token."""

    def __init__(self, config: CvTConfig, stage: int):
        super().__init__()
        c, dim = config, config.dims[stage]
        self.patch_embed = ConvEmbed(
            c.dims[stage - 1] if stage else c.in_chans,
            dim,
            c.patch_size[stage],
            c.patch_stride[stage],
            c.patch_padding[stage],
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if c.class_token[stage] else None
        drop = c.of("proj_drop", stage)
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList()
        for rate in c.rates(stage):
            mixer = ConvProjection(
                dim,
                c.heads[stage],
                projection=c.of("projection", stage),
                kernel=c.of("kernel", stage),
                stride_kv=c.of("stride_kv", stage),
                padding_q=c.of("padding_q", stage),
                padding_kv=c.of("padding_kv", stage),
                qkv_bias=c.of("qkv_bias", stage),
                attn_drop=c.of("attn_drop", stage),
                proj_drop=drop,
            )
            hidden = int(dim * c.of("mlp_ratio", stage))
            self.blocks.append(MixerBlock(dim, mixer, hidden, eps=EPS, drop=drop, drop_path=rate, act=QuickGELU()))


class CvT(Backbone):
    """CvT with any number of stages; maps are those leaving each stage, without its class token and un-normed."""

    config: CvTConfig

    def __init__(self, config: CvTConfig):
        strides = [1]
        for s in config.patch_stride:
            strides.append(strides[-1] * s)
        dims = config.dims
        super().__init__(config, [Stage(d, s, f"stage{i}") for i, (d, s) in enumerate(zip(dims, strides[1:]))])
        for i in range(len(dims)):
            self.add_module(f"stage{i}", CvTStage(config, i))
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if config.init == "xavier" and module is not self.head:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, CvTStage) and module.cls_token is not None:
                nn.init.trunc_normal_(module.cls_token, std=0.02)

    def run(self, image: Float[Tensor, "b c h w"]) -> tuple[list[Tensor], Tensor]:
        """The maps b c h w, and what the last stage ends with: all its tokens, or its map b h w c without a class
        token."""
        x, maps, out = image, [], image
        for i in range(len(self.stages)):
            stage = self.get_submodule(f"stage{i}")
            assert isinstance(stage, CvTStage)
            out, size = stage.patch_embed(x), None
            b, h, w, c = out.shape
            if stage.cls_token is not None:
                out, size = torch.cat([stage.cls_token.expand(b, -1, -1), out.flatten(1, 2)], 1), (h, w)
            out = stage.pos_drop(out)
            out = self.run_group(list(stage.blocks), out, i, size)
            x = (out if size is None else out[:, 1:].reshape(b, h, w, c)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps, out

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.run(image)[0]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        """What the last stage ends with: tokens (b, 1 + n, c), or the map b h w c if it has no class token."""
        return self.run(image)[1]

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        maps, features = self.run(image)
        return features, maps

    def pool(self, features: Float[Tensor, "b *n c"]) -> Float[Tensor, "b c"]:
        """LayerNorm of the class token, or the mean of the normed map."""
        if self.config.class_token[-1]:
            return self.norm(features[:, 0])
        return self.norm(features).mean((1, 2))

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the stages from `count` on."""
        for i in range(count, len(self.stages)):
            delattr(self, f"stage{i}")
        self.stages = self.stages[:count]
        if norm:
            self.norm = nn.Identity()

    def mixer_sites(self) -> list[MixerSite]:
        sites: list[MixerSite] = []
        for i, depth in enumerate(self.config.depths):
            token = self.config.class_token[i]
            for j in range(depth):
                place = Place(
                    dim=self.config.dims[i],
                    heads=self.config.heads[i],
                    grid=self.config.grid(i),
                    index=len(sites),
                    depth=sum(self.config.depths),
                )
                path = f"stage{i}.blocks.{j}.attn"
                sites.append(MixerSite(path=path, place=place, call="tokens" if token else "map", extra=int(token)))
        return sites

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patches first, then block by block; a stage's embedding and token belong to its first block."""
        later = [
            (rf"^stage{i}\.(?:patch_embed|cls_token)", (i,) if coarse else (i, 0)) for i in range(1, len(self.stages))
        ]
        blocks = (r"^stage(\d+)\.blocks\.", None) if coarse else (r"^stage(\d+)\.blocks\.(\d+)\.", None)
        return {"stem": r"^stage0\.(?:patch_embed|cls_token)", "blocks": [*later, blocks, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}


def _w24(side: int) -> CvTConfig:
    return CvTConfig(
        image_size=(side, side), dims=(192, 768, 1024), heads=(3, 12, 16), depths=(2, 2, 20), drop_path_rate=0.3
    )


def _sized(depths: tuple[int, ...], side: int) -> CvTConfig:
    return CvTConfig(image_size=(side, side), depths=depths, drop_path_rate=0.1)


VARIANTS: dict[str, CvTConfig] = {
    "cvt_nano": CvTConfig(
        image_size=(32, 32),
        patch_size=(3, 3, 3),
        patch_stride=(2, 2, 2),
        patch_padding=(1, 1, 1),
        dims=(32, 64, 128),
        heads=(1, 2, 4),
        depths=(1, 2, 4),
        class_token=(False, False, False),
    ),
    "cvt_13": _sized((1, 2, 10), 224),
    "cvt_21": _sized((1, 4, 16), 224),
    "cvt_w24": _w24(384),
    "cvt_13_224": _sized((1, 2, 10), 224),
    "cvt_13_384": _sized((1, 2, 10), 384),
    "cvt_21_224": _sized((1, 4, 16), 224),
    "cvt_21_384": _sized((1, 4, 16), 384),
    "cvt_w24_384": _w24(384),
}


def build(config: CvTConfig) -> CvT:
    return CvT(config)
