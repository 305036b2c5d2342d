"""PlainMamba: identical layers of four continuous sweeps over the map, without hierarchy and class token.

Paper: Yang et al., PlainMamba: Improving Non-hierarchical Mamba in Visual Recognition, BMVC 2024, arXiv 2403.17695
Code: ChenhongyiYang/PlainMamba, whose state names are kept (without `backbone.`; `head.fc` is `head`)
Licence: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_image
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.mamba import StepInit
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.layers.position import resize_position
from lynceus.layers.scan_order import Order

WIDTH = 64  # of the stem


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainMambaConfig(BackboneConfig):
    """Fields of a PlainMamba.

    image_size: what the position table is made for (any other size works too). patch_size: an even number, the stride
    of the whole: the stem makes a step of 2, the projection the rest. dim, depth: width and layers. stem_convs: 3x3
    convolutions in the stem. dwconv: layers behind which a 3x3 depthwise convolution, batch norm and GELU take the
    place of the stream (no shortcut). states, conv, expand, rank, layer_scale, steps: of the mixers (rank None: dim /
    16, rounded up). order, directions, reorder_all, double_bias: see `lynceus.layers.plain_scan.PlainMamba2d`; the
    defaults are what the released weights were trained with. rms_norm: before the mixers, else LayerNorm. position: a
    learned table. final_norm: LayerNorm `ln1` at the end; norm_eps: of it and of the maps'. out_indices: layers whose
    maps are given, each but the last layer's through its own LayerNorm; None: four, evenly spaced, as they are.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    dim: int = 192
    depth: int = 24
    stem_convs: int = 1
    dwconv: tuple[int, ...] = ()
    states: int = 16
    conv: int = 7
    expand: float = 2.0
    rank: int | None = None
    layer_scale: float | None = None
    conv_bias: bool = True
    mixer_bias: bool = True
    steps: StepInit | None = None
    order: Order = "snake"
    directions: bool = True
    reorder_all: bool = False
    double_bias: bool = True
    rms_norm: bool = False
    position: bool = True
    position_drop: float = 0.0
    position_mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    final_norm: bool = True
    norm_eps: float = 1e-6
    out_indices: tuple[int, ...] | None = None
    freeze_patch_embed: bool = False

    def __post_init__(self) -> None:
        if self.patch_size < 2 or self.patch_size % 2:
            raise AdviceError(f"patch_size {self.patch_size} is odd; take an even one, e.g. {self.patch_size + 1}.")
        for name, layers in (("dwconv", self.dwconv), ("out_indices", self.out_indices or ())):
            if not all(0 <= i < self.depth for i in layers):
                raise AdviceError(f"{name} {tuple(layers)} must be layers from 0 to {self.depth - 1}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        half = self.patch_size // 2
        high, wide = (max(-(-(side // 2) // half), 1) for side in self.image_size)
        return high, wide

    @property
    def levels(self) -> tuple[int, ...]:
        """Layers whose maps are given."""
        if self.out_indices is not None:
            return tuple(sorted(self.out_indices))
        return tuple(sorted({max(0, round(self.depth * (i + 1) / 4) - 1) for i in range(4)}))


class Stem(nn.Module):
    """7x7 stride 2, `convs` times 3x3 (all with batch norm and ReLU), then patches: an image -> a map of tokens."""

    def __init__(self, config: PlainMambaConfig):
        super().__init__()
        half = self.reach = config.patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, WIDTH, 7, 2, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        )
        self.convs: nn.Sequential | None = None
        if config.stem_convs:
            one = [
                (nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
                for _ in range(config.stem_convs)
            ]
            self.convs = nn.Sequential(*(layer for triple in one for layer in triple))
        self.projection = nn.Conv2d(WIDTH, config.dim, half, half)
        self.frozen = config.freeze_patch_embed
        self.folds = Folds()

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        layers = [*self.stem, *(self.convs or ())]
        x = image
        for i in range(0, len(layers), 3):
            x = conv_bn(x, layers[i], layers[i + 1], folds=self.folds, name=str(i), relu=layers[i + 2])
        return self.projection(pad_image(x, self.reach)).permute(0, 2, 3, 1)

    def train(self, mode: bool = True) -> Stem:
        """As nn.Module's; frozen, it stays in eval mode and takes no gradients."""
        self.folds.forget()
        super().train(mode and not self.frozen)
        if self.frozen:
            self.requires_grad_(False)
        return self


class Layer(nn.Module):
    """x + mixer(norm x) on a map b h w c; then, where asked for, GELU(BN(depthwise 3x3)) in its place."""

    def __init__(self, config: PlainMambaConfig, *, dwconv: bool, drop_path: float):
        super().__init__()
        c = config
        self.norm = (nn.RMSNorm if c.rms_norm else nn.LayerNorm)(c.dim, eps=1e-5)
        self.dw: nn.Sequential | None = None
        if dwconv:
            self.dw = nn.Sequential(
                nn.Conv2d(c.dim, c.dim, 3, 1, 1, groups=c.dim, bias=False), nn.BatchNorm2d(c.dim), nn.GELU()
            )
        self.mamba = PlainMamba2d(
            c.dim,
            states=c.states,
            conv=c.conv,
            expand=c.expand,
            rank=c.rank,
            order=c.order,
            directions=c.directions,
            reorder_all=c.reorder_all,
            double_bias=c.double_bias,
            layer_scale=c.layer_scale,
            conv_bias=c.conv_bias,
            bias=c.mixer_bias,
            steps=c.steps,
        )
        self.drop_path = DropPath(drop_path)
        self.folds = Folds()

    def train(self, mode: bool = True) -> Layer:
        self.folds.forget()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = x + self.drop_path(self.mamba(self.norm(x)))
        if self.dw is None:
            return x
        conv, norm, act = self.dw
        return act(conv_bn(x.permute(0, 3, 1, 2), conv, norm, folds=self.folds, name="dw")).permute(0, 2, 3, 1)


class PlainMamba(Backbone):
    """PlainMamba. The classifier reads the mean of the final tokens."""

    antialias_positions = False

    def __init__(self, config: PlainMambaConfig):
        c = config
        self.levels = c.levels
        super().__init__(c, [Stage(c.dim, c.patch_size, f"layers.{i}") for i in c.levels])
        self.patch_embed = Stem(c)
        self.pos_embed = None
        if c.position:
            self.pos_embed = nn.Parameter(torch.zeros(1, c.grid[0] * c.grid[1], c.dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.drop_after_pos = nn.Dropout(c.position_drop)
        rates = linear_rates(c.drop_path_rate, c.depth)
        self.layers = nn.ModuleList(Layer(c, dwconv=i in c.dwconv, drop_path=rate) for i, rate in enumerate(rates))
        self.ln1 = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.final_norm else nn.Identity()
        for i in c.out_indices or ():
            if i != c.depth - 1:
                self.add_module(f"norm_layer{i}", nn.LayerNorm(c.dim, eps=c.norm_eps))
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        if c.num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.train()

    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        """The map that enters the first layer."""
        x = self.patch_embed(image)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + self.positions(size).view(1, *size, -1)
        return self.drop_after_pos(x)

    def positions(self, size: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        table, old = self.pos_embed, self.config.grid
        assert table is not None
        mode = self.config.position_mode
        if torch.compiler.is_exporting() and mode == "bicubic":
            return resize_position(table, old, size, antialias=False)
        if tuple(size) == tuple(old):
            return table
        # in the table's own precision; 16 bits go through 32
        image = table.to(torch.promote_types(table.dtype, torch.float32)).view(1, *old, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size, mode=mode, align_corners=None if mode == "nearest" else False)
        return image.flatten(2).transpose(1, 2).to(table.dtype)

    def run(
        self, image: Float[Tensor, "b c h w"], wanted: Sequence[int], *, stop: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The map b h w c after the last layer run (after the final norm, if that is the last), and the maps given."""
        x = self.embed(image)
        found: dict[int, Tensor] = {}
        last = max(wanted) if stop and wanted else len(self.layers) - 1
        final = self.config.depth - 1
        for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
            if i > last:
                break
            x = self.run_block(layer, x)
            if i == final and self.config.out_indices is not None:
                x = self.ln1(x)
            if i in wanted:
                own = getattr(self, f"norm_layer{i}", None)
                found[i] = x if own is None else own(x)
        if last == final and self.config.out_indices is None:
            x = self.ln1(x)
        return x, [found[i] for i in wanted]

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return [m.permute(0, 3, 1, 2) for m in self.run(image, self.levels, stop=True)[1]]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d hi wi"]:
        """The last map after the final norm."""
        return self.run(image, ())[0].permute(0, 3, 1, 2)

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found = self.run(image, self.levels)
        return x.permute(0, 3, 1, 2), [m.permute(0, 3, 1, 2) for m in found]

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        if self.config.out_indices is not None:
            return x
        return self.ln1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the layers after level `count` - 1."""
        self.levels = self.levels[:count]
        for i in self.config.out_indices or ():
            if i not in self.levels and hasattr(self, f"norm_layer{i}"):
                delattr(self, f"norm_layer{i}")
        whole = self.levels[-1] == self.config.depth - 1
        self.layers = self.layers[: self.levels[-1] + 1]
        self.stages = self.stages[:count]
        if norm and not whole:
            self.ln1 = nn.Identity()

    def mixer_sites(self) -> list[MixerSite]:
        c, depth = self.config, len(self.layers)
        return [
            MixerSite(path=f"layers.{i}.mamba", place=Place(dim=c.dim, grid=c.grid, index=i, depth=depth))
            for i in range(depth)
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^(?:layers\.|norm_layer)(\d+)", None), (r"^ln1\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        names = (".A_log", ".D", ".direction_Bs")
        return {name for name, _ in self.named_parameters() if name.endswith(names) or name == "pos_embed"}


VARIANTS: dict[str, PlainMambaConfig] = {
    "plain_mamba_nano": PlainMambaConfig(image_size=(32, 32), patch_size=4, dim=128, depth=4, states=8, conv=5),
    "plain_mamba_l1": PlainMambaConfig(dim=192, depth=24, stem_convs=1, dwconv=(0,), drop_path_rate=0.2),
    "plain_mamba_l2": PlainMambaConfig(dim=384, depth=24, stem_convs=2, drop_path_rate=0.2),
    "plain_mamba_l3": PlainMambaConfig(dim=448, depth=36, stem_convs=2, drop_path_rate=0.4),
}


def build(config: PlainMambaConfig) -> PlainMamba:
    return PlainMamba(config)
