"""SOFT and SOFT++: pyramids of softmax-free attention, whose cost is linear in the pixels.

Paper: Lu et al., Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341; SOFT, NeurIPS 2021, arXiv 2110.11945
Code: fudan-zvg/SOFT
Licence: MIT

Stages 1 to 3 are post-norm blocks of softmax-free attention, stage 4 ordinary pre-norm attention with a class token.
The paper's Small has 24 million parameters; the code's has twenty blocks in stage 3 and 38.9 million. Both are here:
`soft_small` is the table's (seven blocks), `soft_small_code` the code's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import to_map
from lynceus.core.types import Stage
from lynceus.layers.attention import Attention
from lynceus.layers.block import MixerBlock
from lynceus.layers.drop import linear_rates
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.mlp import Mlp
from lynceus.layers.position import resize_position
from lynceus.layers.softmax_free import SoftmaxFreeAttention

STEM = 32  # channels inside the first embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftConfig(BackboneConfig):
    """Fields of a SOFT.

    image_size: what the position tables are made for; any other size works too. stem_stride: of the first embedding, 1,
    2 or 4; each later one halves the map. dims, depths, heads: per stage; the last stage is the one with softmax.
    ratios: side of a landmark's patch, and value_kernels: side of the convolution of the values (0: none), in all
    stages but the last. normalised: SOFT++. newton_iterations: of the inverse. newton_step: "matrix", or "batch" as the
    authors' SOFT++ (see `layers.softmax_free.newton_inverse_halved`). closed_gradient: SOFT++ learns by the gradient of
    an inverse, not through the iterations. mlp_ratio, qkv_bias, qk_scale: of the last stage, the others have four and a
    bias. position_drop: dropout after the position tables. proj_drop, attn_drop: in the last stage.
    drop_path_rate: stochastic depth in the last stage; in the others, as the authors have it, elementwise dropout.
    """

    image_size: tuple[int, int] = (224, 224)
    stem_stride: Literal[1, 2, 4] = 4
    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (1, 2, 3, 2)
    heads: tuple[int, ...] = (2, 4, 10, 16)
    ratios: tuple[int, ...] = (8, 4, 2)
    value_kernels: tuple[int, ...] = (9, 5, 3)
    normalised: bool = False
    newton_iterations: int = 20
    newton_step: Literal["matrix", "batch"] = "matrix"
    closed_gradient: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    position_drop: float = 0.0
    proj_drop: float = 0.0
    attn_drop: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.dims)
        for name, wanted in (("depths", count), ("heads", count), ("ratios", count - 1), ("value_kernels", count - 1)):
            if len(getattr(self, name)) != wanted:
                raise AdviceError(f"{name} {getattr(self, name)} must have {wanted} entries beside dims {self.dims}.")
        if self.stem_stride not in (1, 2, 4):
            raise AdviceError(f"stem_stride is 1, 2 or 4, not {self.stem_stride}.")
        if self.newton_step not in ("matrix", "batch"):
            raise AdviceError(f"newton_step is 'matrix' or 'batch', not {self.newton_step!r}.")

    def stride(self, stage: int) -> int:
        return self.stem_stride * 2**stage

    def grid(self, stage: int) -> tuple[int, int]:
        """The map of a stage at `image_size`."""
        step = self.stride(stage)
        return -(-self.image_size[0] // step), -(-self.image_size[1] // step)


class ConvEmbed(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, in `proj`: a map b c h w becomes b H W d."""

    def __init__(self, inside: int, widths: tuple[int, ...], strides: tuple[int, ...]):
        super().__init__()
        parts: list[nn.Module] = []
        for width, stride in zip(widths, strides):
            parts += [nn.Conv2d(inside, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            inside = width
        self.proj = nn.Sequential(*parts)
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvEmbed:
        self.folds.forget()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        for i in range(0, len(self.proj), 3):
            x = conv_bn(x, self.proj[i], self.proj[i + 1], folds=self.folds, name=str(i), relu=self.proj[i + 2])
        return x.permute(0, 2, 3, 1)


class SoftBlock(nn.Module):
    """x = norm1(x + drop(attn x)), then x = norm2(x + drop(mlp x)), on a map b h w c; the GELU is the tanh one."""

    def __init__(self, config: SoftConfig, stage: int, *, drop: float):
        super().__init__()
        dim = config.dims[stage]
        self.attn: nn.Module = SoftmaxFreeAttention(
            dim,
            config.heads[stage],
            config.ratios[stage],
            conv=config.value_kernels[stage],
            normalised=config.normalised,
            iterations=config.newton_iterations,
            step=config.newton_step,
            closed_gradient=config.closed_gradient,
        )
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 4 * dim, act=nn.GELU(approximate="tanh"))
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        if self.training and self.drop.p > 0:
            x = self.norm1(x + self.drop(self.attn(x)))
            return self.norm2(x + self.drop(self.mlp(x)))
        own = isinstance(self.attn, SoftmaxFreeAttention)
        x = self.norm1(self.attn(x, residual=x) if own else x + self.attn(x))
        return self.norm2(self.mlp(x, residual=x))


class Soft(Backbone):
    """Embeddings `patch_embed1` ..., position tables `pos_embed1` ..., blocks `block1` ...; sizes are rounded up.

    Maps are those leaving each stage; the classifier reads the class token of the last after the final LayerNorm.
    """

    config: SoftConfig

    def __init__(self, config: SoftConfig):
        c, count = config, len(config.dims)
        super().__init__(c, [Stage(d, c.stride(i), f"block{i + 1}") for i, d in enumerate(c.dims)])
        first = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 1, 2)}[c.stem_stride]
        rates = linear_rates(c.drop_path_rate, sum(c.depths))
        inside = c.in_chans
        for i, dim in enumerate(c.dims):
            last, (h, w) = i == count - 1, c.grid(i)
            embed = ConvEmbed(inside, (STEM, STEM, dim) if i == 0 else (dim,), first if i == 0 else (2,))
            self.add_module(f"patch_embed{i + 1}", embed)
            self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.empty(1, h * w + last, dim)))
            here, rates = rates[: c.depths[i]], rates[c.depths[i] :]
            blocks = [self._softmax_block(r) if last else SoftBlock(c, i, drop=r) for r in here]
            self.add_module(f"block{i + 1}", nn.Sequential(*blocks))
            inside = dim
        self.pos_drop = nn.Dropout(c.position_drop)
        self.cls_token = nn.Parameter(torch.empty(1, 1, inside))
        self.norm: nn.Module = nn.LayerNorm(inside, eps=1e-6)
        self.head = nn.Linear(inside, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def _softmax_block(self, rate: float) -> MixerBlock:
        c, dim = self.config, self.config.dims[-1]
        mixer = Attention(
            dim,
            c.heads[-1],
            qkv_bias=c.qkv_bias,
            scale=c.qk_scale,
            attn_drop=c.attn_drop,
            proj_drop=c.proj_drop,
        )
        return MixerBlock(dim, mixer, int(dim * c.mlp_ratio), eps=1e-6, drop=c.proj_drop, drop_path=rate)

    def init_weights(self) -> None:
        """Linear layers, tables and class token truncated normal of 0.02, biases 0; convolutions torch's default."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for i in range(len(self.stages)):
            nn.init.trunc_normal_(self.get_parameter(f"pos_embed{i + 1}"), std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def embed(self, x: Float[Tensor, "b c h w"], stage: int) -> Float[Tensor, "b H W d"]:
        """What enters the blocks of a stage but the last: the embedded map and its position table."""
        x = self.get_submodule(f"patch_embed{stage + 1}")(x)
        h, w = x.shape[1:3]
        table = self.get_parameter(f"pos_embed{stage + 1}")
        x = x + resize_position(table, self.config.grid(stage), (h, w), linear=True).view(1, h, w, -1)
        return self.pos_drop(x)

    def run(self, image: Tensor, last: int) -> tuple[list[Tensor], Tensor | None]:
        """The maps of stages 0 to `last`, and the tokens that leave the last stage of all (None before it)."""
        x = image
        maps: list[Tensor] = []
        for i in range(last + 1):
            blocks = self.get_submodule(f"block{i + 1}")
            if i == len(self.config.dims) - 1:
                tokens, size = self._tokens(x)
                tokens = self.run_group(list(blocks.children()), tokens, i, size)
                return [*maps, to_map(tokens[:, 1:], *size)], tokens
            x = self.embed(x, i)
            x = self.run_group(list(blocks.children()), x, i)
            x = x.permute(0, 3, 1, 2)
            maps.append(x)
        return maps, None

    def _tokens(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """The class token and the patches of the last stage, with their positions, and the size of its map."""
        number = len(self.config.dims)
        x = self.get_submodule(f"patch_embed{number}")(x)
        b, h, w, _ = x.shape
        table = self.get_parameter(f"pos_embed{number}")
        position = resize_position(table, self.config.grid(number - 1), (h, w), prefix=1, linear=True)
        return torch.cat([self.cls_token.expand(b, -1, -1), x.flatten(1, 2)], 1) + position, (h, w)

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.run(image, len(self.stages) - 1)[0]

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.run(image, last)[0]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        """All tokens (b, 1 + n, d) of the last stage after the final norm; a network cut before it: the last map."""
        return self.features_and_stages(image)[0]

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        maps, tokens = self.run(image, len(self.stages) - 1)
        return maps[-1] if tokens is None else self.norm(tokens), maps

    def pool(self, features: Tensor) -> Float[Tensor, "b d"]:
        """The class token; a network cut before its last stage: the mean of the map."""
        return features[:, 0] if features.ndim == 3 else features.mean((2, 3))

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        if index < len(self.config.dims) - 1:
            return x
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the stages from `count` on, and the final norm if it has nothing to do or `norm` says so."""
        for i in range(count, len(self.stages)):
            delattr(self, f"patch_embed{i + 1}")
            delattr(self, f"block{i + 1}")
            delattr(self, f"pos_embed{i + 1}")
        if count < len(self.config.dims):
            del self.cls_token
            norm = True
        if norm:
            self.norm = nn.Identity()
        self.stages = self.stages[:count]
        self.num_features = self.head_hidden_size = self.stages[-1].channels

    def mixer_sites(self) -> list[MixerSite]:
        """Softmax-free attentions, called on maps, then those of the last stage, on tokens with a class token."""
        sites, index, depth, final = [], 0, sum(self.config.depths), len(self.config.dims) - 1
        for i, (dim, heads) in enumerate(zip(self.config.dims, self.config.heads)):
            for j in range(self.config.depths[i] if i < len(self.stages) else 0):
                place = Place(dim=dim, heads=heads, grid=self.config.grid(i), index=index, depth=depth)
                path = f"block{i + 1}.{j}.attn"
                tokens = i == final
                sites.append(MixerSite(path=path, place=place, call="tokens" if tokens else "map", extra=int(tokens)))
                index += 1
        return sites

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stage by stage: the embedding and table of a stage belong to its first block."""
        first = [
            (rf"^(?:patch_embed|pos_embed){i + 1}", (i,) if coarse else (i, 0)) for i in range(1, len(self.stages))
        ]
        first.append((r"^cls_token", first[-1][1]) if first else (r"^cls_token", (0,)))
        numbers = [
            (rf"^block{i + 1}\.(\d+)\.", (i,)) if coarse else (rf"^block({i + 1})\.(\d+)\.", None)
            for i in range(len(self.stages))
        ]
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": [*first, *numbers, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n == "cls_token" or n.startswith("pos_embed")}


def _sizes() -> dict[str, SoftConfig]:
    """Widths and heads of stage 3 and depths of the five sizes, each with its SOFT++ form."""
    rows: dict[str, tuple[int, tuple[int, ...]]] = {
        "tiny": (320, (1, 2, 3, 2)),
        "small": (320, (1, 3, 7, 4)),
        "small_code": (320, (1, 3, 20, 4)),
        "medium": (288, (1, 3, 29, 5)),
        "large": (320, (1, 3, 40, 5)),
        "huge": (352, (1, 5, 49, 5)),
    }
    table = {}
    for size, (width, depths) in rows.items():
        config = SoftConfig(dims=(64, 128, width, 512), heads=(2, 4, width // 32, 16), depths=depths)
        table[f"soft_{size}"] = config
        table[f"soft_norm_{size}"] = replace(config, normalised=True)
    return table


VARIANTS: dict[str, SoftConfig] = {
    "soft_nano": SoftConfig(
        image_size=(32, 32),
        stem_stride=2,
        dims=(32, 64, 96, 128),
        depths=(1, 1, 2, 1),
        heads=(1, 2, 3, 4),
        ratios=(8, 4, 2),
        value_kernels=(5, 5, 3),
        normalised=True,
    ),
    **_sizes(),
}


def build(config: SoftConfig) -> Soft:
    return Soft(config)
