"""ViT-Res and ViT-ResNAS: a transformer in three stages joined by residual spatial reductions, and what search found.

Paper: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, arXiv 2109.00642
Code: yilunliao/vit-search
Licence: none of it is used here (theirs is non-commercial); written from the paper

A network is written in a small language (`resnas_definition`): stages of blocks whose heads, head widths and hidden
widths are free. The super-network from which such networks are cut is `resnas_supernet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones.resnas_definition import BlockDefinition, Definition, parse
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_image, to_map
from lynceus.core.types import Stage
from lynceus.layers.attention import Attention
from lynceus.layers.block import MixerBlock
from lynceus.layers.drop import linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.fused import linear
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.position import resize_position

FOUND = {
    "tiny": "C 176,352,704: 3|704 3|576 3|640 4|576 4|704 // 10|1408 8|1408 8|1280 8|1408 10|1280 10|1024 // "
    "10|2560 10|1792 10|2816 8|2816 8|2560",
    "small": "C 220,440,880: 5|880 5|880 7|800 5|720 5|720 5|720 // 10|1760 10|1440 10|1920 10|1600 12|1600 12|1440 // "
    "16|3200 12|3200 16|2880 12|2240 14|2560",
    "medium": "C 240,640,880: 7|960 6|960 7|800 8|960 7|880 8|880 6|800 // 10|1120 14|1760 14|1920 16|1760 14|1440 "
    "16|1760 16|1920 // 16|3200 10|3840 16|3840 12|3200 16|3520 14|3520",
}
REFERENCE = "C 192,384,768: " + " // ".join(" ".join([f"{h}x64|{m}"] * 4) for h, m in ((3, 768), (6, 1536), (12, 3072)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNASConfig(BackboneConfig):
    """Fields of a ViT-Res.

    definition: the network, see `resnas_definition`. image_size: what the position tables are made for, any other size
    works too. patch_size: pixels per token of the first stage, even for convolutional embeddings; 14 in the paper.
    distilled: a second token with a second classifier. patch_output: `patch_head`, a classifier of every patch of the
    last stage, for training with patch targets. norm_eps: of every LayerNorm. skip: the shortcut of the reductions.
    position_drop, proj_drop, attn_drop: dropout after the positions, in projections and perceptrons, on attention.
    """

    definition: str = REFERENCE
    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 14
    distilled: bool = False
    patch_output: bool = False
    norm_eps: float = 1e-6
    skip: bool = True
    position_drop: float = 0.0
    proj_drop: float = 0.0
    attn_drop: float = 0.0

    def __post_init__(self) -> None:
        if self.patch_output and self.distilled:
            raise AdviceError("patch_output and distilled are two ways to train; take one of them.")
        if self.plan.embedding == "conv" and self.patch_size % 2:
            raise AdviceError(f"A convolutional embedding halves first: patch_size {self.patch_size} must be even.")

    @property
    def plan(self) -> Definition:
        return parse(self.definition)

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of the patches of a stage at `image_size`."""
        rows, columns = (-(-side // self.patch_size) for side in self.image_size)
        for _ in range(stage):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return rows, columns


class ConvNormAct(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU, on an image-like map b c h w."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvNormAct:
        self.folds.forget()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o H W"]:
        return conv_bn(x, self.conv, self.bn, folds=self.folds, name="conv", relu=self.act)


class ConvEmbed(nn.Module):
    """Three 3x3 convolutions at half the resolution, the third beside a shortcut from the first, then patches."""

    def __init__(self, in_chans: int, dim: int, patch: int, *, middle: int):
        super().__init__()
        self.patch = patch
        self.conv1 = ConvNormAct(in_chans, middle, stride=2)
        self.conv2 = ConvNormAct(middle, middle)
        self.conv3 = ConvNormAct(middle, middle)
        self.conv_proj = nn.Conv2d(middle, dim, patch // 2, patch // 2)
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvEmbed:
        self.folds.forget()
        return super().train(mode)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        first = self.conv1(pad_image(image, self.patch))
        x = self.conv3(self.conv2(first)) + first
        return conv_bn(x, self.conv_proj, nn.Identity(), folds=self.folds, name="proj").permute(0, 2, 3, 1)


class Reduction(nn.Module):
    """Half the grid, more channels: a convolution of the normed patches and a linear map of the normed extra tokens,
    both beside a shortcut: the un-normed patches pooled 2x2, the un-normed tokens, channels filled up with zeros.

    grid: of the patches after it, for which its position table is made. extra: tokens in front of the patches.
    """

    def __init__(self, dim: int, out: int, grid: tuple[int, int], *, extra: int, eps: float, skip: bool = True):
        super().__init__()
        self.grid, self.extra, self.skip = grid, extra, skip
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.patch_reduce = nn.Conv2d(dim, out, 3, 2, 1)
        self.token_transform = nn.Linear(dim, out)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], out))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.folds = Folds()

    def train(self, mode: bool = True) -> Reduction:
        self.folds.forget()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b m d"]:
        """x: extra tokens, then a map of `size`; a last odd row or column is halved alone."""
        return self.reduce(x, self.norm(x), size)

    def reduce(self, x: Float[Tensor, "b n c"], normed: Float[Tensor, "b n c"], size: tuple[int, int]) -> Tensor:
        extra = self.extra
        patches = _map(normed, extra, size)
        patches = conv_bn(patches, self.patch_reduce, nn.Identity(), folds=self.folds, name="reduce")
        new = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches + resize_position(self.pos_embed, self.grid, (new[0], new[1]), antialias=False)
        made = torch.cat([linear(self.token_transform, normed[:, :extra]), patches], 1)
        if not self.skip:
            return made
        pooled = _halved(_map(x, extra, size)).flatten(2).transpose(1, 2)
        kept = torch.cat([x[:, :extra], pooled], 1)
        return made + F.pad(kept, (0, made.shape[2] - kept.shape[2]))


def _map(x: Tensor, extra: int, size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    x = x[:, extra:].unflatten(1, size).permute(0, 3, 1, 2)
    if torch.compiler.is_exporting():  # a view's strides would tie the free sizes to each other
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _halved(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
    """Mean of 2x2 cells; at an odd edge of those that are there."""
    h, w = x.shape[-2:]
    if not torch.compiler.is_compiling() and h % 2 == 0 and w % 2 == 0:
        return F.avg_pool2d(x, 2)
    pads = (0, (w + 1) // 2 * 2 - w, 0, (h + 1) // 2 * 2 - h)
    there = F.pad(x.new_ones(1, 1, h, w), pads)
    return F.avg_pool2d(F.pad(x, pads), 2) / F.avg_pool2d(there, 2)


class ResNAS(Backbone):
    """ViT-Res after a definition; maps are the patches at the end of each stage, grids rounded up.

    The classifier reads LayerNorm(class token). In training with `patch_output`, forward gives (logits, patch logits
    (b, n, classes)). `distilled_training` makes a distilled model in train mode return both heads' logits; otherwise
    their mean.
    """

    config: ResNASConfig
    head_name = "cls_head"
    antialias_positions = False  # how tables of another size are loaded: as the authors resize them

    def __init__(self, config: ResNASConfig):
        c, plan = config, config.plan
        ends = [sum(len(s.blocks) + 1 for s in plan.stages[: i + 1]) - 2 for i in range(len(plan.stages))]
        super().__init__(
            c,
            [
                Stage(s.width, c.patch_size * 2**i, f"blocks.{end}" if end >= 0 else "patch_embed")
                for i, (s, end) in enumerate(zip(plan.stages, ends))
            ],
        )
        self.plan, self.ends = plan, ends
        self.prefix = 2 if c.distilled else 1
        self.distilled_training = False
        first = plan.stages[0].width
        if plan.embedding == "conv":
            self.patch_embed: nn.Module = ConvEmbed(c.in_chans, first, c.patch_size, middle=plan.middle)
        else:
            self.patch_embed = PatchEmbed(c.in_chans, first, c.patch_size)
        self.tokens = nn.Parameter(torch.zeros(1, self.prefix, first))
        rows, columns = c.grid(0)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + rows * columns, first))
        self.pos_drop = nn.Dropout(c.position_drop)
        rates = iter(linear_rates(c.drop_path_rate, len(list(plan.blocks()))))
        parts: list[nn.Module] = []
        for i, stage in enumerate(plan.stages):
            if i > 0:
                before = plan.stages[i - 1].width
                parts.append(Reduction(before, stage.width, c.grid(i), extra=self.prefix, eps=c.norm_eps, skip=c.skip))
            parts += [self._block(stage.width, block, next(rates)) for block in stage.blocks]
        self.blocks = nn.ModuleList(parts)
        self.norm = nn.LayerNorm(self.num_features, eps=c.norm_eps)
        self.cls_head = self._classifier()
        if c.distilled:
            self.dst_head = self._classifier()
        if c.patch_output:
            self.patch_head = self._classifier()
        self.init_weights()

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def _block(self, width: int, block: BlockDefinition, rate: float) -> nn.Module:
        if not block.exists:
            return nn.Identity()
        c = self.config
        options: dict[str, Any] = {"attn_drop": c.attn_drop, "proj_drop": c.proj_drop}
        mixer = Attention(width, block.heads, head_dim=block.head_dim, **options)
        return MixerBlock(width, mixer, block.hidden, eps=c.norm_eps, drop=c.proj_drop, drop_path=rate)

    def init_weights(self) -> None:
        """Truncated normals of 0.02 for linear layers, tokens and positions; biases 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        for table in (self.tokens, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def embed(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """The tokens that enter the first block, extra ones in front, and the size of the map in them."""
        x = self.patch_embed(image)
        b, h, w, _ = x.shape
        x = torch.cat([self.tokens.expand(b, -1, -1), x.flatten(1, 2)], 1)
        position = resize_position(self.pos_embed, self.config.grid(0), (h, w), prefix=self.prefix, antialias=False)
        return self.pos_drop(x + position), (h, w)

    def run(
        self, image: Float[Tensor, "b c h w"], wanted: Sequence[int] = (), *, stop: bool = False
    ) -> tuple[Float[Tensor, "b n d"], list[tuple[Tensor, tuple[int, int]]]]:
        """The tokens at the end, and (tokens, size of the map) at the end of the `wanted` stages.

        stop: end with the last wanted stage.
        """
        x, size = self.embed(image)
        kept = []
        last = max(wanted, default=0) if stop else len(self.ends) - 1
        for i in range(last + 1):
            parts = list(self.blocks[self.ends[i - 1] + 1 if i else 0 : self.ends[i] + 1])
            if i:
                x, size = parts.pop(0)(x, size), ((size[0] + 1) // 2, (size[1] + 1) // 2)
            x = self.run_group([p for p in parts if isinstance(p, MixerBlock)], x, i, size)
            kept.append((x, size))
        return x, [kept[i] for i in wanted]

    def _maps(self, found: list[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
        return [to_map(x[:, self.prefix :], *size) for x, size in found]

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self._maps(self.run(image, range(len(self.stages)))[1])

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        return self._maps(self.run(image, range(last + 1), stop=True)[1])

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens of the last stage (b, prefix + n, d) after the final norm."""
        return self.norm(self.run(image)[0])

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found = self.run(image, range(len(self.stages)))
        return self.norm(x), self._maps(found)

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The class token; distilled: the mean of the two tokens."""
        return features[:, 0] if self.prefix == 1 else (features[:, 0] + features[:, 1]) / 2

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits (b, num_classes); in training (logits, patch logits) or both heads', see the class."""
        c = self.config
        if self.training and c.patch_output:
            features = self.forward_features(image)
            return self.forward_head(features), self.forward_patches(features)
        return self.forward_head(self.norm(self.run(image)[0][:, : self.prefix]))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Any:
        if not self.config.distilled or pre_logits or self.num_classes == 0:
            return super().forward_head(features, pre_logits)
        first, second = self.forward_both_heads(features)
        if self.distilled_training and self.training:
            return first, second
        return (first + second) / 2

    def forward_both_heads(self, features: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor]:
        """Logits of the class token and of the distillation token."""
        if not self.config.distilled:
            raise AdviceError(f"{self.name} has one head; create_model(..., distilled=True) has two.")
        first, second = (F.dropout(features[:, i], self.config.drop_rate, self.training) for i in (0, 1))
        return self.cls_head(first), self.dst_head(second)

    def forward_patches(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b m k"]:
        """Logits of every patch of the last stage, from `forward_features`' output."""
        if not self.config.patch_output:
            raise AdviceError(f"{self.name} has no patch head; create_model(..., patch_output=True) has one.")
        return self.patch_head(features[:, self.prefix :])

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        for name in ("dst_head", "patch_head"):
            if hasattr(self, name):
                setattr(self, name, self.new_classifier(num_classes))

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the blocks after level `count` - 1."""
        norm = norm or count < len(self.stages)  # it fits the last stage only
        self.blocks = self.blocks[: self.ends[count - 1] + 1]
        self.stages, self.ends = self.stages[:count], self.ends[:count]
        self.plan = replace(self.plan, stages=self.plan.stages[:count])
        self.config = replace(self.config, definition=self.plan.text())
        if norm:
            self.norm = nn.Identity()  # type: ignore[assignment]

    def mixer_sites(self) -> list[MixerSite]:
        """The attention of every block that is there."""
        sites: list[MixerSite] = []
        depth = len(list(self.plan.blocks()))
        index = place = 0
        for i, stage in enumerate(self.plan.stages):
            place += i > 0
            for block in stage.blocks:
                if block.exists:
                    where = Place(
                        dim=stage.width, heads=block.heads, grid=self.config.grid(i), index=index, depth=depth
                    )
                    sites.append(MixerSite(path=f"blocks.{place}.attn", place=where, call="tokens", extra=self.prefix))
                index, place = index + 1, place + 1
        return sites

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^tokens|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"tokens"}


def _variants() -> dict[str, ResNASConfig]:
    table = {
        # for images of 28 to 64 pixels, from scratch
        "resnas_nano": ResNASConfig(
            image_size=(32, 32),
            patch_size=4,
            definition="C 64,96,128: 2|256 2|256 // 4x24|384 4x24|384 // 4x32|512 4x32|512",
        ),
        "vit_res_tiny": ResNASConfig(drop_path_rate=0.2),
    }
    for name, definition in FOUND.items():
        rate = 0.2 if name == "tiny" else 0.3
        table[f"resnas_{name}"] = ResNASConfig(definition=definition, drop_path_rate=rate)
    for side in (280, 392):  # sizes that the medium net was fine-tuned at
        table[f"resnas_medium_{side}"] = replace(table["resnas_medium"], image_size=(side, side))
    return table


VARIANTS: dict[str, ResNASConfig] = _variants()


def build(config: ResNASConfig) -> ResNAS:
    return ResNAS(config)
