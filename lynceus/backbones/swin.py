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
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerNorm2d
from lynceus.layers.position import resize_position
from lynceus.layers.window import WindowAttention, WindowMlp

EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinConfig(BackboneConfig):
    """Fields of a Swin.

    image_size: what it is made for; it decides where windows shrink, any other size works too. patch_size: side of a
    patch. embed_dim: channels of the first stage, doubled by each. depths, num_heads: blocks and heads per stage.
    window_size: side M of a window. mixer: "attention", or "mlp" for Swin-MLP. mlp_ratio: width of the perceptrons.
    qkv_bias, qk_scale: as in the attention (None: head width ** -0.5). ape: a learned absolute position table.
    patch_norm: LayerNorm after the patches. pos_drop, proj_drop, attn_drop: dropout after the patches, in perceptrons
    and projections, on attention weights.
    dense: the dense form, with a LayerNorm on every map given and no classifier; out_indices: the levels it gives, and
    frozen_stages: how much of it is not trained (-1 nothing, 0 patches, 1 position table too, then stage by stage).
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mixer: Literal["attention", "mlp"] = "attention"
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
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
        if self.mixer not in ("attention", "mlp"):
            raise AdviceError(f"mixer is 'attention' or 'mlp', not {self.mixer!r}.")

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
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.drop_path.active:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        else:
            x = self.mlp(self.norm2(x), residual=x)
        return x


class PatchMerging(nn.Module):
    """Half the map, twice the channels: 2x2 neighbours (row by row inside a column) -> LayerNorm -> Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b (h+1)//2 (w+1)//2 2*c"]:
        b, h, w, c = x.shape
        rows, columns = (h + 1) // 2, (w + 1) // 2
        x = pad_map(x, 2).reshape(b, rows, 2, columns, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(b, rows, columns, 4 * c)
        return linear(self.reduction, self.norm(x))


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that follows them (`downsample`; None at the last)."""

    def __init__(self, config: SwinConfig, stage: int, rates: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, stage, shifted=j % 2 == 1, drop_path=rate) for j, rate in enumerate(rates)
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(config.embed_dim * 2**stage)


class Swin(Backbone):
    """Swin in its classification and dense forms.

    Maps are those leaving each stage before merging: un-normed in the classification form, after `norm0` ... in the
    dense one; sizes are rounded up. The classifier reads the mean of LayerNorm(last map).
    """

    def __init__(self, config: SwinConfig):
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
        rates = linear_rates(config.drop_path_rate, sum(config.depths))
        starts = [sum(config.depths[:i]) for i in range(count)]
        self.layers = nn.ModuleList(
            SwinStage(config, i, rates[starts[i] : starts[i] + config.depths[i]]) for i in range(count)
        )
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

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.patch_embed(image)
        if self.config.ape:
            x = x + self._position(x.shape[1], x.shape[2])
        x = self.pos_drop(x)
        maps = []
        for i, stage in enumerate(cast(Iterable[SwinStage], self.layers)):
            for block in stage.blocks:
                x = self.run_block(block, x)
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

    def train(self, mode: bool = True) -> Swin:
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
