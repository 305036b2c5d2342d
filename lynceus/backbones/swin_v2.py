"""Swin Transformer V2: norms after the branches, cosine attention, and a position bias that follows the window's size.

Paper: Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, arXiv 2111.09883
Code: microsoft/Swin-Transformer
Licence: MIT

Only the differences from Swin stand here; stages, window rules, dense form and classifier are those of
`lynceus.backbones.swin`. Trained weights work with other windows: `VARIANTS[name].rescaled(...)` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones.swin import EPS, WindowConfig, WindowPyramid, quads
from lynceus.core.errors import AdviceError
from lynceus.layers.drop import DropPath
from lynceus.layers.fused import linear
from lynceus.layers.mlp import Mlp
from lynceus.layers.pieces import in_pieces
from lynceus.layers.window_cosine import WindowCosineAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinV2Config(WindowConfig):
    """Fields of a Swin V2, beside those of every network of windows.

    pretrained_window_sizes: per stage, the side of the window that the weights were trained with, 0 for the stage's
    own; () for zeros. A stage whose window had shrunk has its own entry: (12, 12, 12, 6) for weights made at 192.
    """

    pretrained_window_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        if self.pretrained_window_sizes and len(self.pretrained_window_sizes) != len(self.depths):
            raise AdviceError(
                f"pretrained_window_sizes {self.pretrained_window_sizes} must have one entry for each of the "
                f"{len(self.depths)} stages, 0 for the stage's own window."
            )

    def pretrained(self, stage: int) -> int:
        """The side of the window that a stage's bias was trained with."""
        given = self.pretrained_window_sizes[stage] if self.pretrained_window_sizes else 0
        return given if given > 0 else self.window(stage)[0]

    def rescaled(self, *, image_size: tuple[int, int], window_size: int) -> SwinV2Config:
        """For trained weights at another image and window size: the bias keeps the coordinates of the old windows."""
        old = tuple(self.pretrained(i) for i in range(len(self.depths)))
        return replace(self, image_size=image_size, window_size=window_size, pretrained_window_sizes=old)


class Block(nn.Module):
    """x + norm1(attention x), then x + norm2(mlp x), on a map b h w c. Fresh norms are 0: the identity."""

    def __init__(self, config: SwinV2Config, stage: int, *, shifted: bool, drop_path: float):
        super().__init__()
        dim = config.embed_dim * 2**stage
        window, shift = config.window(stage)
        self.attn: nn.Module = WindowCosineAttention(
            dim,
            config.num_heads[stage],
            window,
            shift=shift if shifted else 0,
            pretrained=config.pretrained(stage),
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            proj_drop=config.proj_drop,
        )
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.drop_path = DropPath(drop_path)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=config.proj_drop)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return in_pieces(self, self._all, x, width=self.mlp.fc1.out_features)

    def _all(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Half the map, twice the channels: 2x2 neighbours -> Linear -> LayerNorm (in Swin the other way round)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=EPS)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b (h+1)//2 (w+1)//2 2*c"]:
        return self.norm(linear(self.reduction, quads(x)))


class SwinV2(WindowPyramid):
    """Swin V2 in the classification and dense forms."""

    config: SwinV2Config

    def __init__(self, config: SwinV2Config):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)

    def block(self, stage: int, *, shifted: bool, drop_path: float) -> nn.Module:
        return Block(self.config, stage, shifted=shifted, drop_path=drop_path)

    def merging(self, dim: int) -> nn.Module:
        return PatchMerging(dim)

    def no_weight_decay(self) -> set[str]:
        names = ("cpb_mlp", "logit_scale", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if any(part in name for part in names)}


_SIZES = {  # width, depth of the third stage, heads of the first, drop-path rate
    "tiny": (96, 6, 3, 0.2),
    "small": (96, 18, 3, 0.3),
    "base": (128, 18, 4, 0.5),
    "large": (192, 18, 6, 0.2),
}


def _variant(size: str, side: int, window: int, **options: Any) -> SwinV2Config:
    width, depth, heads, rate = _SIZES[size]
    return SwinV2Config(
        image_size=(side, side),
        embed_dim=width,
        depths=(2, 2, depth, 2),
        num_heads=tuple(heads * 2**i for i in range(4)),
        window_size=window,
        **{"drop_path_rate": rate, **options},
    )


def _variants() -> dict[str, SwinV2Config]:
    table = {
        "swin_v2_nano": SwinV2Config(
            image_size=(32, 32), patch_size=2, embed_dim=32, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=4
        )
    }
    for size in ("tiny", "small", "base"):
        for window in (8, 16):
            config = _variant(size, 256, window)
            # the authors' name, and timm's
            table[f"swinv2_{size}_patch4_window{window}_256"] = table[f"swinv2_{size}_window{window}_256"] = config
        table[f"swin_v2_{size}"] = table[f"swinv2_{size}_window8_256"]
    wide: dict[str, Any] = {"pretrained_window_sizes": (12, 12, 12, 6), "drop_path_rate": 0.2}
    for size in ("base", "large"):
        table[f"swinv2_{size}_patch4_window12_192_22k"] = _variant(size, 192, 12, drop_path_rate=0.2)
        table[f"swinv2_{size}_window12_192"] = table[f"swinv2_{size}_patch4_window12_192_22k"]
        for side, window in ((256, 16), (384, 24)):
            config = _variant(size, side, window, **wide)
            name = f"window12to{window}_192to{side}"
            table[f"swinv2_{size}_patch4_{name}_22kto1k_ft"] = table[f"swinv2_{size}_{name}"] = config
    table["swin_v2_large"] = table["swinv2_large_window12_192"]
    return table


VARIANTS: dict[str, SwinV2Config] = _variants()


def build(config: SwinV2Config) -> SwinV2:
    return SwinV2(config)
