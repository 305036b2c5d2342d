"""ViT: the plain columnar transformer over patches, in its ViT, DeiT, distilled, averaged and register forms.

Paper: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929
DeiT: Touvron et al., ICML 2021, arXiv 2012.12877. Registers: Darcet et al., ICLR 2024, arXiv 2309.16588
Code: huggingface/pytorch-image-models, whose state names are kept
Licence: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones._init import init_linears
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import to_map
from lynceus.core.types import Stage
from lynceus.layers.attention import Attention
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.fused import fusable, hooked
from lynceus.layers.mixers import MixerSite, OnTokens, Place
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerScale
from lynceus.layers.position import resize_position, sincos_table

Pool = Literal["token", "avg", "max", "avgmax"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig(BackboneConfig):
    """image_size: what the position table is made for (any other size works too). patch_size: side of a patch.

    pool: what the classifier reads: the class token, or mean / max / half the sum of both over the patch tokens.
    class_token, distilled (a second token and a second classifier), registers: tokens before the patches, in that
    order.
    position: a learned table or none; position_prefix: the table has entries for the tokens before the patches.
    init_values: start of layer scale, None for no layer scale. qk_norm, attn_norm, mlp_norm: LayerNorm of queries and
    keys, before the output projection of attention, before the second layer of the perceptron. pre_norm: LayerNorm
    before the first block (the patch convolution then has no bias). final_norm: LayerNorm at the end; fc_norm: after
    pooling instead of before (None: when pool is not "token"). pool_prefix: pooling includes the tokens before the
    patches. init: "small" is the papers', truncated normals of 0.02; "scratch" learns faster from few small images:
    Xavier, and positions that start as sines and cosines. levels: blocks whose maps are `stages`; None: four, evenly
    spaced.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    init_values: float | None = None
    pool: Pool = "token"
    pool_prefix: bool = False
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    position: Literal["learned", "none"] = "learned"
    position_prefix: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    norm_eps: float = 1e-6
    position_drop: float = 0.0
    patch_drop: float = 0.0
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    init: Literal["small", "scratch"] = "small"
    levels: tuple[int, ...] | None = None


class Block(nn.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x); layer scale and stochastic depth on both branches if asked for.

    A mixer that was put in attention's place (`OnTokens`) is told the rows and columns of the map in the tokens.
    """

    def __init__(self, config: ViTConfig, *, drop_path: float):
        super().__init__()
        c = config
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attn: nn.Module = Attention(
            c.dim,
            c.heads,
            qkv_bias=c.qkv_bias,
            proj_bias=c.proj_bias,
            qk_norm=c.qk_norm,
            scale_norm=c.attn_norm,
            norm_eps=c.norm_eps,
            attn_drop=c.attn_drop,
            proj_drop=c.proj_drop,
        )
        self.ls1 = LayerScale(c.dim, value=c.init_values) if c.init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = Mlp(
            c.dim,
            int(c.dim * c.mlp_ratio),
            bias=c.proj_bias,
            drop=c.proj_drop,
            norm_eps=c.norm_eps if c.mlp_norm else None,
        )
        self.ls2 = LayerScale(c.dim, value=c.init_values) if c.init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int] | None = None) -> Float[Tensor, "b n c"]:
        if isinstance(self.attn, OnTokens):
            if size is None:
                raise AdviceError("patch_drop leaves no full map for the mixer that was put here; set patch_drop=0.")
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size)))
        else:
            x = self._branch(x, self.norm1, self.attn, self.ls1, self.drop_path1)
        return self._branch(x, self.norm2, self.mlp, self.ls2, self.drop_path2)

    def _branch(self, x: Tensor, norm: nn.Module, mixer: nn.Module, scale: nn.Module, drop: nn.Module) -> Tensor:
        if not self.training and fusable(x) and not hooked(mixer, scale, drop):
            if type(scale) is nn.Identity and isinstance(mixer, (Attention, Mlp)):
                return mixer(norm(x), residual=x)
            if type(scale) is LayerScale:
                return torch.addcmul(x, scale.gamma, mixer(norm(x)))
        return x + drop(scale(mixer(norm(x))))


class ViT(Backbone):
    """Columnar transformer over patches; every level has the stride of a patch.

    Images that are no multiple of the patch are zero-padded right and bottom, and the position table is resized to the
    grid. `distilled_training` makes a distilled model in train mode return both logits; otherwise their mean.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig):
        c = config
        if c.pool == "token" and not c.class_token:
            raise AdviceError("pool='token' reads the class token, which class_token=False leaves out; try pool='avg'.")
        if c.distilled and (c.pool != "token" or c.registers):
            raise AdviceError("distilled=True reads the class and distillation tokens: pool='token' and registers=0.")
        levels = c.levels if c.levels is not None else spread(c.depth)
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0 or levels[-1] >= c.depth:
            raise AdviceError(f"levels are increasing block numbers from 0 to {c.depth - 1}, not {levels}.")
        super().__init__(c, [Stage(c.dim, c.patch_size, f"blocks.{i}") for i in levels])
        self.levels: tuple[int, ...] = tuple(levels)
        self.prefix: int = int(c.class_token) + int(c.distilled) + c.registers
        self.grid: tuple[int, int] = (-(-c.image_size[0] // c.patch_size), -(-c.image_size[1] // c.patch_size))
        self.distilled_training = False

        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size, bias=not c.pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, c.registers, c.dim)) if c.registers else None
        rows = self.grid[0] * self.grid[1] + (self.prefix if c.position_prefix else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, c.dim)) if c.position == "learned" else None
        self.pos_drop = nn.Dropout(c.position_drop)
        self.norm_pre = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*[Block(c, drop_path=r) for r in linear_rates(c.drop_path_rate, c.depth)])
        after = c.pool != "token" if c.fc_norm is None else c.fc_norm
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.final_norm and not after else nn.Identity()
        self.fc_norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.final_norm and after else nn.Identity()
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        if c.distilled:
            self.head_dist: nn.Module = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """As `config.init` says; biases 0, class token and registers normal of 1e-6, classifier always small."""
        scratch = self.config.init == "scratch"
        heads = (self.head, getattr(self, "head_dist", None))
        init_linears(self, scratch=scratch, small=heads)
        for table in (self.pos_embed, self.dist_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if scratch and self.pos_embed is not None:
            with torch.no_grad():
                places = sincos_table(*self.grid, self.config.dim)
                self.pos_embed[:, -places.shape[1] :] += places

    # tokens ----------------------------------------------------------------------------------------
    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The tokens that enter the first block: prefix, then patches row by row."""
        x = self.patch_embed(image)
        b, height, width, _ = x.shape
        x = x.flatten(1, 2)
        first = [t.expand(b, -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            return self.norm_pre(self.drop_patches(torch.cat([*first, x], 1)))
        with_prefix = self.config.position_prefix
        prefix = self.prefix if with_prefix else 0
        position = resize_position(self.pos_embed, self.grid, (height, width), prefix=prefix)
        x = torch.cat([*first, x], 1) + position if with_prefix else torch.cat([*first, x + position], 1)
        return self.norm_pre(self.drop_patches(self.pos_drop(x)))

    def drop_patches(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """In training, keeps a random part (1 - patch_drop) of the patch tokens of each image."""
        rate, count = self.config.patch_drop, x.shape[1] - self.prefix
        if not (self.training and rate > 0):
            return x
        keep = torch.rand(x.shape[0], count, device=x.device).argsort(1)[:, : max(1, int(count * (1 - rate)))]
        patches = x[:, self.prefix :].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, : self.prefix], patches], 1)

    def features(
        self,
        image: Float[Tensor, "b c h w"],
        blocks: Sequence[int] | None = None,
        *,
        norm: bool = False,
        prefix: bool = False,
    ) -> list[Any]:
        """What leaves the given blocks (0-based, negative from the end; None: `levels`), as maps (b, d, h/P, w/P).

        norm: through the final norm first. prefix: pairs (map, prefix tokens (b, k, d)) instead of maps.
        """
        found = self.run(image, self.block_numbers(blocks), stop=True)[1]
        if norm:
            found = [self.norm(x) for x in found]
        size = self.patch_embed.grid(image.shape[-2], image.shape[-1])
        maps = [to_map(x[:, self.prefix :], *size) for x in found]
        return [(m, x[:, : self.prefix]) for m, x in zip(maps, found)] if prefix else maps

    def block_numbers(self, blocks: Sequence[int] | None) -> list[int]:
        count = len(self.blocks)
        chosen = [i + count if i < 0 else i for i in (self.levels if blocks is None else blocks)]
        if not chosen or any(not 0 <= i < count for i in chosen):
            raise AdviceError(f"{self.name} has blocks 0 to {count - 1}; {list(blocks or ())} asks for others.")
        return chosen

    def run(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The tokens after the last block run, and those after the `wanted` blocks, in that order."""
        if wanted and self.training and self.config.patch_drop > 0:
            raise AdviceError("patch_drop leaves no full map in training; take maps in eval mode or set patch_drop=0.")
        x = self.embed(image)
        dropped = self.training and self.config.patch_drop > 0
        size = None if dropped else self.patch_embed.grid(image.shape[-2], image.shape[-1])
        kept: dict[int, Tensor] = {}
        last = max(wanted) if stop and wanted else len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i > last:
                break
            x = self.run_block(block, x, size)
            if i in wanted:
                kept[i] = x
        return x, [kept[i] for i in wanted]

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.features(image)

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens (b, prefix + n, d) after the final norm (before `fc_norm`, where that takes its place)."""
        return self.norm(self.run(image, ())[0])

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found = self.run(image, self.levels)
        size = self.patch_embed.grid(image.shape[-2], image.shape[-1])
        return self.norm(x), [to_map(t[:, self.prefix :], *size) for t in found]

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The vector that the classifier reads; distilled: the mean of the two tokens."""
        c = self.config
        if c.distilled:
            return (features[:, 0] + features[:, 1]) / 2
        if c.pool == "token":
            return self.fc_norm(features[:, 0])
        x = features if c.pool_prefix else features[:, self.prefix :]
        if c.pool == "avg":
            x = x.mean(1)
        elif c.pool == "max":
            x = x.amax(1)
        else:
            x = 0.5 * (x.amax(1) + x.mean(1))
        return self.fc_norm(x)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits (b, num_classes); the pair of both heads' logits in `distilled_training`."""
        return self.forward_head(self.forward_features(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Any:
        if not self.config.distilled or pre_logits:
            return super().forward_head(features, pre_logits)
        first, second = self.forward_both_heads(features)
        if self.distilled_training and self.training:
            return first, second
        return (first + second) / 2

    def forward_both_heads(self, features: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor]:
        """Logits of the class token and of the distillation token."""
        if not self.config.distilled:
            raise AdviceError(f"{self.name} has one head; create_model('deit_tiny_distilled') is one that has two.")
        drop = nn.functional.dropout
        first, second = (drop(features[:, i], self.config.drop_rate, self.training) for i in (0, 1))
        return self.head(first), self.head_dist(second)

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.config.distilled:
            self.head_dist = self.new_classifier(num_classes)

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the blocks after level `count` - 1."""
        self.levels = self.levels[:count]
        self.blocks = self.blocks[: self.levels[-1] + 1]
        self.stages = self.stages[:count]
        self.config = replace(self.config, depth=len(self.blocks), levels=self.levels)
        if norm:
            self.norm = nn.Identity()
            self.config = replace(self.config, final_norm=False)

    def mixer_sites(self) -> list[MixerSite]:
        c, depth = self.config, len(self.blocks)
        places = [Place(dim=c.dim, heads=c.heads, grid=self.grid, index=i, depth=depth) for i in range(depth)]
        return [
            MixerSite(path=f"blocks.{i}.attn", place=p, call="tokens", extra=self.prefix) for i, p in enumerate(places)
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^dist_token|^reg_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token", "reg_token"}


def spread(depth: int, count: int = 4) -> tuple[int, ...]:
    """`count` evenly spaced block numbers, the last one included."""
    return tuple(sorted({max(0, round(depth * (i + 1) / count) - 1) for i in range(count)}))


# dim, depth, heads
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "mediumd": (512, 20, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# for images of 28 to 64 pixels, from scratch
NANO = ViTConfig(
    image_size=(32, 32),
    patch_size=4,
    dim=96,
    depth=6,
    heads=3,
    pool="avg",
    class_token=False,
    init="scratch",
)


def _size(name: str, patch: int = 16, side: int = 224, **options: Any) -> ViTConfig:
    dim, depth, heads = _SIZES[name]
    return ViTConfig(dim=dim, depth=depth, heads=heads, patch_size=patch, image_size=(side, side), **options)


def _variants() -> dict[str, ViTConfig]:
    table = {"vit_nano": NANO, "vit_large": _size("large")}
    for size in ("tiny", "small", "base"):
        table[f"vit_{size}"] = table[f"deit_{size}"] = table[f"deit_{size}_patch16_224"] = _size(size)
        table[f"deit_{size}_distilled"] = table[f"deit_{size}_distilled_patch16_224"] = _size(size, distilled=True)
    table["deit_base_patch16_384"] = _size("base", 16, 384)
    table["deit_base_distilled_patch16_384"] = _size("base", 16, 384, distilled=True)
    plain = {
        "tiny": [(16, 224), (16, 384)],
        "small": [(32, 224), (32, 384), (16, 224), (16, 384), (8, 224)],
        "base": [(32, 224), (32, 384), (16, 224), (16, 384), (8, 224)],
        "large": [(32, 224), (32, 384), (16, 224), (16, 384), (14, 224)],
        "huge": [(14, 224)],
    }
    for size, shapes in plain.items():
        table |= {f"vit_{size}_patch{p}_{s}": _size(size, p, s) for p, s in shapes}
    third: dict[str, Any] = {"position_prefix": False, "init_values": 1e-6}
    for size, sides in {"small": (224, 384), "medium": (224,), "base": (224, 384), "large": (224, 384)}.items():
        table |= {f"deit3_{size}_patch16_{s}": _size(size, 16, s, **third) for s in sides}
    table["deit3_huge_patch14_224"] = _size("huge", 14, 224, **third)
    dino: dict[str, Any] = {"patch": 14, "side": 518, "init_values": 1e-5}
    for size in ("small", "base", "large"):
        table[f"vit_{size}_patch14_dinov2"] = _size(size, **dino)
        table[f"vit_{size}_patch14_reg4_dinov2"] = _size(size, **dino, registers=4, position_prefix=False)
        table[f"flexivit_{size}"] = _size(size, 16, 240, position_prefix=False)
    mean: dict[str, Any] = {"class_token": False, "pool": "avg"}
    first: dict[str, Any] = {"init_values": 1e-6, "fc_norm": False}
    for size, sides in {"medium": (240, 256, 384), "betwixt": (256,)}.items():
        for s in sides:
            table[f"vit_{size}_patch16_gap_{s}"] = _size(size, 16, s, qkv_bias=False, **first, **mean)
    table["vit_base_patch16_gap_224"] = ViTConfig(dim=768, depth=12, heads=16, fc_norm=False, **mean)
    mean["position_prefix"] = False
    averaged = {
        "medium": [(1, 256), (4, 256)],
        "mediumd": [(4, 256), (4, 384)],
        "betwixt": [(1, 256), (4, 256), (4, 384)],
    }
    for size, pairs in averaged.items():
        for k, s in pairs:
            table[f"vit_{size}_patch16_reg{k}_gap_{s}"] = _size(size, 16, s, registers=k, init_values=1e-5, **mean)
    table["vit_base_patch16_reg4_gap_256"] = _size("base", 16, 256, registers=4, **mean)
    return table


VARIANTS: dict[str, ViTConfig] = _variants()


def build(config: ViTConfig) -> ViT:
    return ViT(config)
