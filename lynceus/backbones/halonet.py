"""HaloNet: a residual network whose 3x3 convolutions are replaced by blocked local attention, in all or some blocks.

Paper: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021,
arXiv 2103.12731
Code: none by the authors; huggingface/pytorch-image-models for the layer and its hybrids, whose state names are kept
Licence: Apache-2.0

H0 to H7 follow the paper's table; the sources leave the activation open (ReLU here, `activation` changes it). Maps that
are no multiple of the block (H7 at 600 pixels) are padded inside each attention and cropped afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.types import Stage
from lynceus.layers.conv_norm_act import ConvNormAct
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.eca import EfficientChannelAttention
from lynceus.layers.halo import HaloAttention, HaloOptions
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.squeeze_excite import SqueezeExcite
from lynceus.layers.width import divisible

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
}
POOLS = ("max", "avg", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class HaloNetConfig(BackboneConfig):
    """Fields of a HaloNet.

    layout: a word per stage with a letter per block, "a" for attention and "c" for a 3x3 convolution. widths, hidden:
    channels that leave the blocks of a stage, and those between their 1x1 convolutions. strides: of the first blocks.
    attention: options of the attention, one for all stages or one per stage. value_ratio: channels of the values, in
    units of `hidden`.
    stem: one 7x7 or 3x3 convolution, or three 3x3 ("tiered": of 3/8, 1/2 and all of `stem_width`; "deep": all of it);
    the first convolution has `stem_stride`. stem_pool: 3x3 pooling of stride 2 after them; "none": the last
    of three convolutions has stride 2 instead.
    activation: relu, silu (swish), gelu, hard_swish. channel_attention: after the 3x3 convolutions: none, "se", "eca".
    group_width: channels per group of the 3x3 convolutions, 0 for one group. shortcut: where the shape changes, a 1x1
    convolution ("conv"), behind 2x2 means where the stride is 2 ("avg"), or no shortcut at all ("none").
    final_width: channels of a 1x1 convolution before the classifier, 0 for none.
    zero_init_residual: the last batch norm of each block starts at 0.
    """

    layout: tuple[str, ...] = ("aaa", "aaa", "aaaaaaa", "aaa")
    widths: tuple[int, ...] = (32, 64, 128, 256)
    hidden: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    attention: tuple[HaloOptions, ...] = (HaloOptions(heads=8),)
    value_ratio: float = 1.0
    stem: Literal["7x7", "3x3", "tiered", "deep"] = "7x7"
    stem_width: int = 64
    stem_stride: int = 2
    stem_pool: Literal["max", "avg", "none"] = "max"
    activation: str = "relu"
    channel_attention: Literal["none", "se", "eca"] = "none"
    group_width: int = 0
    shortcut: Literal["conv", "avg", "none"] = "conv"
    final_width: int = 0
    zero_init_residual: bool = True
    image_size: tuple[int, int] = (256, 256)

    def __post_init__(self) -> None:
        count = len(self.layout)
        for name in ("widths", "hidden", "strides"):
            if len(getattr(self, name)) != count:
                raise AdviceError(f"{name} {getattr(self, name)} must have an entry per stage: {count}.")
        if len(self.attention) not in (1, count):
            raise AdviceError(f"attention has one entry for all stages or {count}, not {len(self.attention)}.")
        if any(not word or set(word) - {"a", "c"} for word in self.layout):
            raise AdviceError(f"layout holds a word of 'a' and 'c' per stage, e.g. ('cc', 'ca'), not {self.layout}.")
        for name, value, good in (
            ("activation", self.activation, ACTIVATIONS),
            ("channel_attention", self.channel_attention, ("none", "se", "eca")),
            ("stem_pool", self.stem_pool, POOLS),
            ("shortcut", self.shortcut, ("conv", "avg", "none")),
            ("stem", self.stem, ("7x7", "3x3", "tiered", "deep")),
        ):
            if value not in good:
                raise AdviceError(f"{name} is one of {', '.join(good)}; not {value!r}.")

    def options(self, stage: int) -> HaloOptions:
        """The attention of a stage."""
        return self.attention[stage if len(self.attention) > 1 else 0]

    def act(self) -> nn.Module:
        kind = ACTIVATIONS[self.activation]
        return kind(inplace=True) if kind is nn.ReLU else kind()


class Stem(nn.Module):
    """conv1, conv2 ... with norm and activation, then the pool; `stride` is that of all."""

    def __init__(self, config: HaloNetConfig):
        c = config
        super().__init__()
        kernel = 7 if c.stem == "7x7" else 3
        full = c.stem_width
        widths = {"tiered": (3 * full // 8, full // 2, full), "deep": (full, full, full)}.get(c.stem, (full,))
        strides = [c.stem_stride] + [1] * (len(widths) - 1)
        if c.stem_pool == "none" and len(widths) > 1:
            strides[-1] = 2
        self.convs: list[str] = []
        inside = c.in_chans
        for i, (width, stride) in enumerate(zip(widths, strides)):
            self.convs.append(f"conv{i + 1}")
            self.add_module(self.convs[-1], ConvNormAct(inside, width, kernel, stride=stride, act=c.act()))
            inside = width
        pools = {"max": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(3, 2, 1, count_include_pad=False)}
        self.pool: nn.Module = pools.get(c.stem_pool, nn.Identity())
        self.stride = strides[0] * (strides[-1] if len(strides) > 1 else 1) * (1 if c.stem_pool == "none" else 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        if x.is_cpu and not torch.compiler.is_compiling():
            x = x.contiguous(memory_format=torch.channels_last)  # all that follows keeps it
        for name in self.convs:
            x = self.get_submodule(name)(x)
        return self.pool(x)


class Shortcut(ConvNormAct):
    """A 1x1 convolution of the stride, or 2x2 means (ragged at the border) and a 1x1 convolution."""

    def __init__(self, inside: int, outside: int, stride: int, *, mean: bool):
        super().__init__(inside, outside, 1, stride=1 if mean else stride)
        self.mean = mean and stride > 1

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:  # type: ignore[override]
        if self.mean:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return super().forward(x)


class Bottleneck(nn.Module):
    """1x1 convolution, 3x3 convolution or halo attention, 1x1 convolution, beside a shortcut; activation last."""

    def __init__(self, inside: int, stage: int, config: HaloNetConfig, *, kind: str, stride: int, drop_path: float):
        super().__init__()
        c, hidden, out = config, config.hidden[stage], config.widths[stage]
        self.shortcut: nn.Module | None = nn.Identity()
        if inside != out or stride != 1:
            made = Shortcut(inside, out, stride, mean=c.shortcut == "avg")
            self.shortcut = None if c.shortcut == "none" else made
        self.conv1_1x1 = ConvNormAct(inside, hidden, 1, act=c.act())
        self.attends = kind == "a"
        values = hidden
        if self.attends:
            options = c.options(stage)
            values, heads = int(c.value_ratio * hidden), options.heads or 8
            self.self_attn: nn.Module = HaloAttention(
                hidden,
                out=values,
                stride=stride,
                heads=heads,
                head_dim=options.head_dim or divisible(hidden * options.qk_ratio) // heads,
                block_size=options.block_size,
                halo_size=options.halo_size,
                qkv_bias=options.qkv_bias,
                avg_down=options.avg_down,
                scale_position=options.scale_position,
            )
            self.post_attn = nn.BatchNorm2d(values)
            self.post_act = c.act()
        else:
            groups = hidden // c.group_width if c.group_width else 1
            self.conv2_kxk = ConvNormAct(hidden, hidden, 3, stride=stride, groups=groups, act=c.act())
            self.attn: nn.Module = nn.Identity()
            if c.channel_attention != "none":
                se = c.channel_attention == "se"
                self.attn = SqueezeExcite(hidden, ratio=1 / 16) if se else EfficientChannelAttention(hidden)
        self.conv3_1x1 = ConvNormAct(values, out, 1)
        self.drop_path = DropPath(drop_path)
        self.act = c.act()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        skip = None if self.shortcut is None else self.shortcut(x)
        own = isinstance(self.shortcut, Shortcut)
        y = self.conv1_1x1(x)
        if self.attends:
            y = self.self_attn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = self.post_act(self.post_attn(y))
        else:
            y = self.conv2_kxk(y)
            y = self.attn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.drop_path.active or skip is None:
            y = self.drop_path(self.conv3_1x1(y))
            return self.act(y if skip is None else skip + y)
        return self.conv3_1x1(y, residual=skip, act=self.act, own=own)


class HaloNet(Backbone):
    """Stem, stages `layers.0` to `layers.3` and, where it has one, a last 1x1 convolution; sizes are rounded up.

    The classifier reads the mean of the last map, after `final_conv` where there is one. At inference on a CPU,
    convolution, batch norm, sum and activation run as one kernel each.
    """

    config: HaloNetConfig

    def __init__(self, config: HaloNetConfig):
        c = config
        stem = Stem(c)
        stride, inside = stem.stride, c.stem_width
        rates = iter(linear_rates(c.drop_path_rate, sum(map(len, c.layout))))
        layers, stages = [], []
        for i, word in enumerate(c.layout):
            blocks = []
            for j, kind in enumerate(word):
                step = c.strides[i] if j == 0 else 1
                blocks.append(Bottleneck(inside, i, c, kind=kind, stride=step, drop_path=next(rates)))
                inside = c.widths[i]
            stride *= c.strides[i]
            layers.append(nn.Sequential(*blocks))
            stages.append(Stage(inside, stride, f"layers.{i}"))
        super().__init__(c, stages)
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.final_conv = ConvNormAct(inside, c.final_width, 1, act=c.act()) if c.final_width else nn.Identity()
        self.head_hidden_size = c.final_width or inside
        self.head = nn.Linear(self.head_hidden_size, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()
        self._sites = self._find_sites()

    def init_weights(self) -> None:
        """Convolutions Kaiming normal (fan out), projections of the attention by fan-in, classifier normal of 0.01."""
        projections = {id(p) for m in self.modules() if isinstance(m, HaloAttention) for p in (m.q, m.kv)}
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and id(m) not in projections:
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, Bottleneck) and self.config.zero_init_residual and m.shortcut is not None:
                last: Any = m.conv3_1x1.norm
                nn.init.zeros_(last.weight)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def blocks(self) -> Iterator[tuple[str, Bottleneck]]:
        """Every block with its module path."""
        for i, layer in enumerate(self.layers):
            for j, block in enumerate(layer.children()):
                assert isinstance(block, Bottleneck)
                yield f"layers.{i}.{j}", block

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_up_to(image, len(self.stages) - 1)

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.stem(image)
        maps = []
        for layer in self.layers[: last + 1]:
            for block in layer.children():
                x = self.run_block(block, x)
            maps.append(x)
        return maps

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.final_conv(features).mean((2, 3))

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the stages from `count` on, and with them the last convolution."""
        if count == len(self.stages):
            return
        c = self.config
        self.layers = self.layers[:count]
        self.stages = self.stages[:count]
        self.final_conv = nn.Identity()
        self.head_hidden_size = self.num_features = self.stages[-1].channels
        self.config = replace(
            c,
            layout=c.layout[:count],
            widths=c.widths[:count],
            hidden=c.hidden[:count],
            strides=c.strides[:count],
            attention=c.attention[:count],
            final_width=0,
        )

    def mixer_sites(self) -> list[MixerSite]:
        """The attentions that keep the size and the width of their map, whatever stands there now."""
        left = {name for name, _ in self.blocks()}
        return [site for site in self._sites if site.path.rpartition(".")[0] in left]

    def _find_sites(self) -> list[MixerSite]:
        sites, every = [], list(self.blocks())
        strides = {s.name: s.stride for s in self.stages}
        for index, (name, block) in enumerate(every):
            mixer = block.self_attn if block.attends else None
            if (
                not isinstance(mixer, HaloAttention)
                or mixer.stride > 1
                or mixer.q.in_channels != len(block.post_attn.weight)
            ):
                continue
            stride = strides[name.rpartition(".")[0]]
            grid = (-(-self.config.image_size[0] // stride), -(-self.config.image_size[1] // stride))
            place = Place(dim=mixer.q.in_channels, heads=mixer.heads, grid=grid, index=index, depth=len(every))
            sites.append(MixerSite(path=f"{name}.self_attn", place=place))
        return sites

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final_conv", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith(("pos_embed.height_rel", "pos_embed.width_rel"))}


def _paper(
    block: int, halo: int, values: float, width: float, depth: int, size: int, final: int = 0, **options: Any
) -> HaloNetConfig:
    """A row of the paper's table: b, h, r_v, r_b, blocks of stage 3, image side, d_f."""
    hidden = (64, 128, 256, 512)
    return HaloNetConfig(
        layout=("aaa", "aaa", "a" * depth, "aaa"),
        widths=tuple(int(width * h) for h in hidden),
        hidden=hidden,
        attention=tuple(HaloOptions(block_size=block, halo_size=halo, heads=n) for n in (4, 8, 8, 8)),
        value_ratio=values,
        final_width=final,
        image_size=(size, size),
        **options,
    )


def _timm(layout: tuple[str, ...], halo: int, **options: Any) -> HaloNetConfig:
    """timm's hybrids: a tiered stem and bottlenecks of a quarter of the width."""
    start: dict[str, Any] = {
        "layout": layout,
        "widths": (256, 512, 1024, 2048),
        "hidden": (64, 128, 256, 512),
        "attention": (HaloOptions(halo_size=halo, heads=8),),
        "stem": "tiered",
    }
    return HaloNetConfig(**{**start, **options})


VARIANTS: dict[str, HaloNetConfig] = {
    "halonet_nano": HaloNetConfig(
        layout=("ca", "ca", "aa"),
        widths=(64, 128, 256),
        hidden=(48, 96, 160),
        strides=(1, 2, 2),
        attention=(HaloOptions(block_size=4, halo_size=1, heads=4),),
        stem="3x3",
        stem_width=48,
        stem_pool="none",
        image_size=(32, 32),
    ),
    "halonet_h0": _paper(8, 3, 1, 0.5, 7, 256),
    "halonet_h1": _paper(8, 3, 1, 1, 10, 256),
    "halonet_h2": _paper(8, 3, 1, 1.25, 11, 256),
    "halonet_h3": _paper(10, 3, 1, 1.5, 12, 320, 1024),
    "halonet_h4": _paper(12, 2, 1, 3, 12, 384, 1280),
    "halonet_h5": _paper(14, 2, 2.5, 2, 23, 448, 1536),
    "halonet_h6": _paper(8, 4, 3, 2.75, 24, 512, 1536),
    "halonet_h7": _paper(10, 3, 4, 3.5, 26, 600, 2048),
    "halonet26t": _timm(("cc", "cc", "ca", "aa"), 2),
    "halonet50ts": _timm(
        ("ccc", "ccca", "cacaca", "cac"),
        3,
        attention=(HaloOptions(heads=8), HaloOptions(heads=4), HaloOptions(heads=8), HaloOptions(heads=8)),
        activation="silu",
    ),
    "sehalonet33ts": _timm(
        ("cc", "cca", "cca", "aa"),
        3,
        widths=(256, 512, 1024, 1536),
        stem_pool="none",
        activation="silu",
        channel_attention="se",
        final_width=1280,
    ),
    "eca_halonext26ts": _timm(
        ("cc", "cc", "ca", "aa"),
        2,
        attention=(HaloOptions(halo_size=2, heads=8, head_dim=16),),
        activation="silu",
        channel_attention="eca",
        group_width=16,
    ),
}


def build(config: HaloNetConfig) -> HaloNet:
    return HaloNet(config)
