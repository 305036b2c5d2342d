"""LSNet: a large depthwise neighbourhood decides the weights of a small one; attention in the last stage only.

Paper: Wang et al., LSNet: See Large, Focus Small, CVPR 2025, arXiv 2503.23135
Code: jameslahm/lsnet
Licence: MIT

A light family for small machines. Blocks alternate between a re-parameterisable depthwise convolution with
squeeze-excite and a large-small convolution (in the last stage attention); every normalisation is a batch norm, so
the deployment form (`fused`, see `fuse`) is convolutions and little else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.types import Stage
from lynceus.layers.conv_norm import ConvNorm, DepthwiseBranches
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.large_small import LargeSmall
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.offset_attention import OffsetAttention
from lynceus.layers.squeeze_excite import SqueezeExcite


@dataclass(frozen=True, kw_only=True, slots=True)
class LSNetConfig(BackboneConfig):
    """Fields of an LSNet; sequences hold one entry per stage, of which there are four.

    image_size: what the attention's bias table is made for, any other size works too. stem_stride: pixels per place of
    the first stage, 8 (the paper), 4 or 2 (for small images). embed_dim, depth: channels and blocks. key_dim,
    num_heads: width of a key and number of heads, read in the last stage. large_kernel, small_kernel, groups: of the
    large-small convolution. distilled: a second classifier for a teacher's labels.
    drop_path_rate: stochastic depth of attention and perceptrons, which the authors leave at 0.
    dense: the authors' form for detection and segmentation: no classifier, batch norms that never train their
    statistics, and one bias table of `table_grid` cells whose whole matrix of pairs is resized.
    table_grid: side of the table; None follows from image_size (dense: 14).
    fused: the deployment form, see `fuse`.
    """

    image_size: tuple[int, int] = (224, 224)
    stem_stride: int = 8
    embed_dim: tuple[int, ...] = (64, 128, 256, 384)
    depth: tuple[int, ...] = (0, 2, 8, 10)
    key_dim: tuple[int, ...] = (16, 16, 16, 16)
    num_heads: tuple[int, ...] = (3, 3, 3, 4)
    large_kernel: int = 7
    small_kernel: int = 3
    groups: int = 8
    distilled: bool = False
    dense: bool = False
    table_grid: int | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        counts = {len(v) for v in (self.embed_dim, self.depth, self.key_dim, self.num_heads)}
        if counts != {4}:
            raise AdviceError(
                "embed_dim, depth, key_dim and num_heads have one entry for each of the four stages; "
                f"got {self.embed_dim}, {self.depth}, {self.key_dim}, {self.num_heads}."
            )
        if self.stem_stride not in (2, 4, 8):
            raise AdviceError(f"stem_stride is 8, 4 or 2 (1 to 3 of its convolutions halve), not {self.stem_stride}.")
        if self.embed_dim[0] < 4:
            raise AdviceError(f"The stem starts with a quarter of embed_dim[0]={self.embed_dim[0]}; take at least 4.")
        if self.dense and self.distilled:
            raise AdviceError("The dense form has no classifier to distil into: dense=False or distilled=False.")

    def grid(self, stage: int) -> tuple[int, int]:
        """The map of a stage at `image_size`."""
        rows, columns = (max(side // self.stem_stride, 1) for side in self.image_size)
        for _ in range(stage):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return rows, columns

    @property
    def table(self) -> tuple[int, int]:
        """Rows and columns of the attention's bias table."""
        if self.table_grid is not None:
            return self.table_grid, self.table_grid
        return (14, 14) if self.dense else self.grid(3)

    @property
    def value_dim(self) -> int:
        """Width of a value: the share of a head, by way of the ratio that the authors compute it from."""
        width, keys, heads = self.embed_dim[3], self.key_dim[3], self.num_heads[3]
        return int(width / (keys * heads) * keys)


class FeedForward(nn.Module):
    """1x1 to twice the channels, ReLU, 1x1 back, each with batch norm; the last norm starts at weight 0."""

    def __init__(self, dim: int, *, fused: bool = False):
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim, fused=fused)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, norm_weight=0.0, fused=fused)

    def forward(self, x: Float[Tensor, "b h w c"], residual: Tensor | None = None) -> Float[Tensor, "b h w c"]:
        return self.pw2(self.pw1(x, relu=self.act), residual=residual)


class Block(nn.Module):
    """x + mixer(x), squeeze-excite in even blocks, then x + perceptron(x), on a map b h w c."""

    def __init__(self, config: LSNetConfig, stage: int, index: int, *, drop_path: float):
        super().__init__()
        c, dim = config, config.embed_dim[stage]
        self.mixer: nn.Module
        self.se: nn.Module = nn.Identity()
        if index % 2 == 0:
            self.mixer = DepthwiseBranches(dim, fused=c.fused)
            self.se = SqueezeExcite(dim)
        elif stage == 3:
            self.mixer = OffsetAttention(
                dim,
                c.num_heads[stage],
                key_dim=c.key_dim[stage],
                value_dim=c.value_dim,
                grid=c.table,
                resize="matrix" if c.dense else "table",
                fused=c.fused,
            )
        else:
            self.mixer = LargeSmall(
                dim, large_kernel=c.large_kernel, small_kernel=c.small_kernel, groups=c.groups, fused=c.fused
            )
        self.ffn = FeedForward(dim, fused=c.fused)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = self.se(self.mix(x))
        if self.drop_path.active:
            return x + self.drop_path(self.ffn(x))
        made: Tensor = self.ffn(x, residual=x)
        return made

    def mix(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """x + mixer(x); a mixer of another family, put here by a rewrite, need not know residuals."""
        mixer = self.mixer
        if isinstance(mixer, (DepthwiseBranches, LargeSmall)):
            return mixer(x, residual=x)
        if isinstance(mixer, OffsetAttention) and not self.drop_path.active:
            return mixer(x, residual=x)
        return x + self.drop_path(mixer(x))


class LSNet(Backbone):
    """LSNet in its classification and dense forms; maps are those leaving each stage, sizes rounded up.

    The classifier reads BatchNorm1d(mean over the last map). `distilled_training` makes a distilled model in train
    mode return both logits; otherwise their mean.
    """

    config: LSNetConfig

    def __init__(self, config: LSNetConfig):
        c = config
        super().__init__(c, [Stage(d, c.stem_stride * 2**i, f"blocks{i + 1}") for i, d in enumerate(c.embed_dim)])
        self.distilled_training = False
        first = c.embed_dim[0]
        steps = [2 if c.stem_stride >= 2**i else 1 for i in (1, 2, 3)]
        self.patch_embed = nn.Sequential(
            ConvNorm(c.in_chans, first // 4, 3, stride=steps[0], fused=c.fused),
            nn.ReLU(),
            ConvNorm(first // 4, first // 2, 3, stride=steps[1], fused=c.fused),
            nn.ReLU(),
            ConvNorm(first // 2, first, 3, stride=steps[2], fused=c.fused),
        )
        rates = iter(linear_rates(c.drop_path_rate, sum(c.depth)))
        for i, dim in enumerate(c.embed_dim):
            parts: list[nn.Module] = []
            if i > 0:
                before = c.embed_dim[i - 1]
                parts += [
                    ConvNorm(before, before, 3, stride=2, groups=before, fused=c.fused),
                    ConvNorm(before, dim, fused=c.fused),
                ]
            parts += [Block(c, i, j, drop_path=next(rates)) for j in range(c.depth[i])]
            self.add_module(f"blocks{i + 1}", nn.Sequential(*parts))
        self.num_classes = 0 if c.dense else c.num_classes
        self.norm, self.head = self._classifier()
        if c.distilled:
            self.norm_dist, self.head_dist = self._classifier()
        self.train()

    def _classifier(self) -> tuple[nn.Module, nn.Module]:
        if self.num_classes <= 0:
            return nn.Identity(), nn.Identity()
        norm: nn.Module = nn.Identity() if self.config.fused else nn.BatchNorm1d(self.num_features)
        head = nn.Linear(self.num_features, self.num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return norm, head

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_up_to(image, len(self.stages) - 1)

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        stem, x = self.patch_embed, image.permute(0, 2, 3, 1)
        x = stem[4](stem[2](stem[0](x, relu=stem[1]), relu=stem[3]))
        maps = []
        for i in range(last + 1):
            for part in getattr(self, f"blocks{i + 1}"):
                x = self.run_block(part, x) if isinstance(part, Block) else part(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits (b, num_classes); the pair of both heads' logits in `distilled_training`."""
        return self.forward_head(self.forward_features(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Any:
        """The mean over the map (pre_logits, or no classifier), or logits."""
        x = self.pool(features)
        if pre_logits or self.num_classes <= 0:
            return x
        first = self._logits(x, self.norm, self.head)
        if not self.config.distilled:
            return first
        second = self._logits(x, self.norm_dist, self.head_dist)
        return (first, second) if self.distilled_training and self.training else (first + second) / 2

    def _logits(self, x: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
        made: Tensor = head(nn.functional.dropout(norm(x), self.config.drop_rate, self.training))
        return made

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; the norm before it keeps its statistics where there is one."""
        like = next(self.parameters())
        had = self.num_classes > 0
        super().reset_classifier(num_classes, global_pool)
        fresh = [part.to(like.device, like.dtype).train(self.training) for part in self._classifier()]
        if not had or num_classes <= 0:
            self.norm = fresh[0]
        if self.config.distilled:
            self.head_dist = fresh[1]
            if not had or num_classes <= 0:
                self.norm_dist = copy.deepcopy(fresh[0])

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Drops the stages from `count` on."""
        for i in range(count, len(self.stages)):
            delattr(self, f"blocks{i + 1}")
        self.stages = self.stages[:count]

    def train(self, mode: bool = True) -> LSNet:
        """As nn.Module's; in the dense form batch norms stay in eval mode."""
        super().train(mode)
        if self.config.dense:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def mixer_sites(self) -> list[MixerSite]:
        sites: list[MixerSite] = []
        for name, part in self.named_modules():
            if isinstance(part, Block):
                stage = int(name.split(".")[0].removeprefix("blocks")) - 1
                heads = self.config.num_heads[stage] if stage == 3 else 1
                place = Place(
                    dim=self.config.embed_dim[stage],
                    heads=heads,
                    grid=self.config.grid(stage),
                    index=len(sites),
                    depth=sum(self.config.depth),
                )
                sites.append(MixerSite(path=f"{name}.mixer", place=place))
        return sites

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}


def fuse(model: LSNet) -> LSNet:
    """The deployment form: every convolution holds its batch norm, each depthwise sum is one 3x3, the norm before the
    classifier is part of it. Only the norm behind each aggregation is left, and it equals `model` in eval mode.

    A new model in eval mode; `model` is untouched. Its `config` has fused=True, so it is saved and built like others.
    """
    if model.config.fused:
        return copy.deepcopy(model).eval()
    made = LSNet(replace(model.config, fused=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, part in reversed(list(model.named_modules())):  # a sum of branches after the branches themselves
            if isinstance(part, (ConvNorm, DepthwiseBranches)):
                state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
                state |= {f"{name}.{k}": v for k, v in part.folded_state().items()}
        pairs = [("norm", "head"), ("norm_dist", "head_dist")] if model.num_classes > 0 else []
        for norm, head in pairs[: 1 + model.config.distilled]:
            bn, linear = getattr(model, norm), getattr(model, head)
            scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
            shift = bn.bias.double() - bn.running_mean.double() * scale
            weight, bias = linear.weight.double(), linear.bias.double()
            state[f"{head}.weight"] = (weight * scale).to(linear.weight.dtype)
            state[f"{head}.bias"] = (bias + weight @ shift).to(linear.bias.dtype)
            state = {k: v for k, v in state.items() if not k.startswith(f"{norm}.")}
    like = next(model.parameters())
    made.to(like.device, like.dtype).load_state_dict(state)
    made.name = model.name
    return made.eval()


def _variant(dims: tuple[int, ...], depth: tuple[int, ...], **options: Any) -> LSNetConfig:
    return LSNetConfig(embed_dim=dims, depth=depth, **options)


_SIZES = {
    "t": ((64, 128, 256, 384), (0, 2, 8, 10)),
    "s": ((96, 192, 320, 448), (1, 2, 8, 10)),
    "b": ((128, 256, 384, 512), (4, 6, 8, 10)),
}
VARIANTS: dict[str, LSNetConfig] = {
    "lsnet_nano": LSNetConfig(
        image_size=(32, 32), stem_stride=2, embed_dim=(32, 48, 64, 96), depth=(1, 2, 2, 2), num_heads=(3, 3, 3, 4)
    ),
}
for _size, _fields in _SIZES.items():
    VARIANTS[f"lsnet_{_size}"] = _variant(*_fields)
    VARIANTS[f"lsnet_{_size}_distill"] = _variant(*_fields, distilled=True)
    VARIANTS[f"lsnet_{_size}_dense"] = _variant(*_fields, dense=True)


def build(config: LSNetConfig) -> LSNet:
    return LSNet(config)
