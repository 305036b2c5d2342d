"""Swin Transformer and Swin-MLP: mixing inside windows whose grid is shifted in every second block.

Paper: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030
Code: microsoft/Swin-Transformer, and SwinTransformer/Swin-Transformer-Object-Detection for the dense form
Licence: MIT and Apache-2.0

Two rules of the authors live here side by side. Classification code: where the map at `image_size` is no larger than
the window, the window becomes as large as that map and is not shifted. Dense code (`dense=True`): the window never
shrinks. Both: maps that are no multiple of the window are zero-padded after the first norm, so any image size goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_map
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.fused import linear
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerNorm2d
from lynceus.layers.pieces import in_pieces
from lynceus.layers.position import resize_position
from lynceus.layers.window import WindowAttention, WindowMlp

EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig(BackboneConfig):
    """Fields that Swin and Swin V2 share.

    image_size: what it is made for; it decides where windows shrink, any other size works too. patch_size: side of a
    patch. embed_dim: channels of the first stage, doubled by each. depths, num_heads: blocks and heads per stage.
    window_size: side M of a window. mlp_ratio: width of the perceptrons. qkv_bias: as in the attention. ape: a learned
    absolute position table. patch_norm: LayerNorm after the patches. pos_drop, proj_drop, attn_drop: dropout after the
    patches, in perceptrons and projections, on attention weights.
    dense: the dense form, with a LayerNorm on every map given and no classifier; out_indices: the levels it gives, and
    frozen_stages: how much of it is not trained (-1 nothing, 0 patches, 1 position table too, then stage by stage).
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    ape: bool = False
    patch_norm: bool = True
    pos_drop: float = 0.0
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    dense: bool = False
    out_indices: tuple[int, ...] | None = None
    frozen_stages: int = -1

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise AdviceError(
                f"depths {self.depths} and num_heads {self.num_heads} describe different numbers of stages; "
                "give one of each per stage."
            )
        if not self.dense and (self.out_indices is not None or self.frozen_stages >= 0):
            raise AdviceError("out_indices and frozen_stages belong to the dense form: dense=True.")
        if self.out_indices is not None and not set(self.out_indices) <= set(range(len(self.depths))):
            raise AdviceError(f"out_indices {self.out_indices} must lie in 0 .. {len(self.depths) - 1}.")

    @property
    def levels(self) -> tuple[int, ...]:
        """Stages whose maps are given."""
        return tuple(range(len(self.depths))) if self.out_indices is None else tuple(sorted(self.out_indices))

    def grid(self, stage: int) -> tuple[int, int]:
        """The map of a stage at `image_size`."""
        step = self.patch_size * 2**stage
        return max(self.image_size[0] // step, 1), max(self.image_size[1] // step, 1)

    def window(self, stage: int) -> tuple[int, int]:
        """(side, shift of the odd blocks) of the windows of a stage."""
        least = min(self.grid(stage))
        if not self.dense and least <= self.window_size:
            return least, 0
        return self.window_size, self.window_size // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinConfig(WindowConfig):
    """Fields of a Swin, beside those of every network of windows.

    mixer: "attention", or "mlp" for Swin-MLP. qk_scale: of the attention's logits (None: head width ** -0.5).
    """

    mixer: Literal["attention", "mlp"] = "attention"
    qk_scale: float | None = None

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        if self.mixer not in ("attention", "mlp"):
            raise AdviceError(f"mixer is 'attention' or 'mlp', not {self.mixer!r}.")


class Block(nn.Module):
    """Window mixer and perceptron, each behind a LayerNorm and beside a shortcut, on a map b h w c."""

    def __init__(self, config: SwinConfig, stage: int, *, shifted: bool, drop_path: float):
        super().__init__()
        dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        window, shift = config.window(stage)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn: nn.Module
        if config.mixer == "attention":
            self.attn = WindowAttention(
                dim,
                heads,
                window,
                shift=shift if shifted else 0,
                qkv_bias=config.qkv_bias,
                scale=config.qk_scale,
                attn_drop=config.attn_drop,
                proj_drop=config.proj_drop,
            )
        else:
            self.attn = WindowMlp(dim, heads, window, shift=shift if shifted else 0)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=config.proj_drop)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return in_pieces(self, self._all, x, width=self.mlp.fc1.out_features)

    def _all(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.drop_path.active:
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return self.mlp(self.norm2(x), residual=x)


def quads(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b (h+1)//2 (w+1)//2 4*c"]:
    """2x2 neighbours as channels, row by row inside a column; odd maps are zero-padded right and bottom."""
    b, h, w, c = x.shape
    rows, columns = (h + 1) // 2, (w + 1) // 2
    x = pad_map(x, 2).reshape(b, rows, 2, columns, 2, c)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(b, rows, columns, 4 * c)


class PatchMerging(nn.Module):
    """Half the map, twice the channels: 2x2 neighbours -> LayerNorm -> Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b (h+1)//2 (w+1)//2 2*c"]:
        return linear(self.reduction, self.norm(quads(x)))


class WindowStage(nn.Module):
    """The blocks of one resolution, and the merging that follows them (`downsample`; None at the last)."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class WindowPyramid(Backbone):
    """What Swin and Swin V2 share: patches, stages of blocks on maps b h w c, merging, both forms, the classifier.

    A network adds `block` and `merging`. Maps are those leaving each stage before merging: un-normed in the
    classification form, after `norm0` ... in the dense one; sizes are rounded up. The classifier reads the mean of
    LayerNorm(last map).
    """

    config: WindowConfig

    def __init__(self, config: WindowConfig):
        count = len(config.depths)
        dims = [config.embed_dim * 2**i for i in range(count)]
        super().__init__(config, [Stage(dims[i], config.patch_size * 2**i, f"layers.{i}") for i in config.levels])
        self.patch_embed = PatchEmbed(
            config.in_chans, dims[0], config.patch_size, norm_eps=EPS if config.patch_norm else None
        )
        if config.ape:
            rows, columns = config.grid(0)
            shape = (1, dims[0], rows, columns) if config.dense else (1, rows * columns, dims[0])
            self.absolute_pos_embed = nn.Parameter(torch.zeros(shape))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(config.pos_drop)
        rates = iter(linear_rates(config.drop_path_rate, sum(config.depths)))
        self.layers = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            blocks = [self.block(i, shifted=j % 2 == 1, drop_path=next(rates)) for j in range(depth)]
            self.layers.append(WindowStage(blocks, self.merging(dims[i]) if i < count - 1 else None))
        self.num_classes = 0 if config.dense else config.num_classes
        if config.dense:
            for i in config.levels:
                self.add_module(f"norm{i}", LayerNorm2d(dims[i], eps=EPS))
            self.head: nn.Module = nn.Identity()
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
            self.head = nn.Linear(dims[-1], self.num_classes) if self.num_classes > 0 else nn.Identity()
        self.apply(_init)
        self.train()

    # what a network adds ---------------------------------------------------------------------------
    def block(self, stage: int, *, shifted: bool, drop_path: float) -> nn.Module:
        """A block of a stage, with its mixer `attn`, on maps b h w c."""
        raise NotImplementedError

    def merging(self, dim: int) -> nn.Module:
        """b h w dim -> b (h+1)//2 (w+1)//2 2*dim."""
        raise NotImplementedError

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_of(self.patch_embed(image))

    def stages_of(self, x: Float[Tensor, "b h w c"]) -> list[Float[Tensor, "b ci hi wi"]]:
        """The maps, from embedded patches (which masked pre-training changes in between)."""
        if self.config.ape:
            x = x + self._position(x.shape[1], x.shape[2])
        x = self.pos_drop(x)
        maps = []
        for i, stage in enumerate(cast(Iterable[WindowStage], self.layers)):
            x = self.run_group(list(stage.blocks), x, i)
            if i in self.config.levels:
                out = x.permute(0, 3, 1, 2)
                maps.append(getattr(self, f"norm{i}")(out) if self.config.dense else out)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _position(self, height: int, width: int) -> Float[Tensor, "1 h w c"]:
        table = self.absolute_pos_embed
        if self.config.dense:
            return F.interpolate(table, (height, width), mode="bicubic").permute(0, 2, 3, 1)
        return resize_position(table, self.config.grid(0), (height, width)).view(1, height, width, -1)

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        if self.config.dense:
            return features.mean((-2, -1))
        tokens: Tensor = self.norm(features.permute(0, 2, 3, 1))
        return tokens.mean((1, 2))

    def train(self, mode: bool = True) -> WindowPyramid:
        """As nn.Module's; frozen parts stay in eval mode and take no gradients."""
        super().train(mode)
        frozen = self.config.frozen_stages
        parts: list[nn.Module] = []
        if frozen >= 0:
            parts.append(self.patch_embed)
        if frozen >= 1 and self.config.ape:
            self.absolute_pos_embed.requires_grad_(False)
        if frozen >= 2:
            parts += [self.pos_drop, *self.layers[: frozen - 1]]
        for part in parts:
            part.eval().requires_grad_(False)
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patches first, then block by block; merging belongs to the first block after it."""
        merging = [
            (rf"^layers\.{i}\.downsample\.", (i + 1,) if coarse else (i + 1, 0)) for i in range(len(self.layers))
        ]
        blocks = (r"^layers\.(\d+)\.blocks\.", None) if coarse else (r"^layers\.(\d+)\.blocks\.(\d+)\.", None)
        return {"stem": r"^(?:patch_embed|absolute_pos_embed)", "blocks": [*merging, blocks, (r"^norm", (99999,))]}

    def mixer_sites(self) -> list[MixerSite]:
        sites: list[MixerSite] = []
        for i, depth in enumerate(self.config.depths):
            for j in range(depth):
                place = Place(
                    dim=self.config.embed_dim * 2**i,
                    heads=self.config.num_heads[i],
                    grid=self.config.grid(i),
                    index=len(sites),
                    depth=sum(self.config.depths),
                )
                sites.append(MixerSite(path=f"layers.{i}.blocks.{j}.attn", place=place))
        return sites


class Swin(WindowPyramid):
    """Swin, and Swin-MLP, in the classification and dense forms."""

    config: SwinConfig

    def block(self, stage: int, *, shifted: bool, drop_path: float) -> nn.Module:
        return Block(self.config, stage, shifted=shifted, drop_path=drop_path)

    def merging(self, dim: int) -> nn.Module:
        return PatchMerging(dim)

    def no_weight_decay(self) -> set[str]:
        names = ("relative_position_bias_table", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _variant(
    width: int, depth: int, heads: int, drop_path: float, *, window: int = 7, size: int = 224, mixer: Any = "attention"
) -> SwinConfig:
    return SwinConfig(
        image_size=(size, size),
        embed_dim=width,
        depths=(2, 2, depth, 2),
        num_heads=tuple(heads * 2**i for i in range(4)),
        window_size=window,
        mixer=mixer,
        drop_path_rate=drop_path,
    )


VARIANTS: dict[str, SwinConfig] = {
    "swin_nano": SwinConfig(
        image_size=(32, 32), patch_size=2, embed_dim=32, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=4
    ),
    "swin_tiny_patch4_window7_224": _variant(96, 6, 3, 0.2),
    "swin_small_patch4_window7_224": _variant(96, 18, 3, 0.3),
    "swin_base_patch4_window7_224": _variant(128, 18, 4, 0.5),
    "swin_large_patch4_window7_224": _variant(192, 18, 6, 0.2),
    "swin_base_patch4_window12_384": _variant(128, 18, 4, 0.5, window=12, size=384),
    "swin_large_patch4_window12_384": _variant(192, 18, 6, 0.2, window=12, size=384),
    "swin_tiny_c24_patch4_window8_256": _variant(96, 6, 4, 0.2, window=8, size=256),
    "swin_mlp_tiny_c24_patch4_window8_256": _variant(96, 6, 4, 0.2, window=8, size=256, mixer="mlp"),
    "swin_mlp_tiny_c12_patch4_window8_256": _variant(96, 6, 8, 0.2, window=8, size=256, mixer="mlp"),
    "swin_mlp_tiny_c6_patch4_window8_256": _variant(96, 6, 16, 0.2, window=8, size=256, mixer="mlp"),
    "swin_mlp_base_patch4_window7_224": _variant(128, 18, 4, 0.5, mixer="mlp"),
}
VARIANTS |= {f"swin_{size}": VARIANTS[f"swin_{size}_patch4_window7_224"] for size in ("tiny", "small", "base", "large")}


def build(config: SwinConfig) -> Swin:
    return Swin(config)
