"""ConvNeXt: a pyramid of plain convolution pieces, and its isotropic (ViT-shaped) twin.

Paper: Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545
Code: facebookresearch/ConvNeXt
Licence: MIT

7x7 depthwise mixing, one LayerNorm and one GELU per block, a four times wider perceptron, separate down-sampling. The
way from ResNet-50 to here, rung by rung, is in `convnext_ladder.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.depthwise import DepthwiseConv
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.fused import fusable
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerNorm2d

EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNeXtConfig(BackboneConfig):
    """Fields of a ConvNeXt.

    depths, dims: blocks and channels of each stage. patch_size: stride of the stem; every later stage halves the map.
    kernel_size: of the depthwise convolutions (odd). layer_scale: initial value of gamma, 0 for no gamma at all.
    dense: every map leaves through a LayerNorm of its own (`norm0` ...), and there is no classifier.
    isotropic: one resolution; depths and dims have one entry, and the stem has no norm.
    head_init_scale: factor on the fresh classifier (0.001 when fine-tuning). image_size: what the variant was made for.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    patch_size: int = 4
    kernel_size: int = 7
    layer_scale: float = 1e-6
    dense: bool = False
    isotropic: bool = False
    head_init_scale: float = 1.0
    image_size: tuple[int, int] = (224, 224)

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims):
            raise AdviceError(
                f"depths {self.depths} and dims {self.dims} describe different numbers of stages; "
                "give one of each per stage."
            )
        if self.isotropic and (len(self.depths) != 1 or self.dense):
            raise AdviceError("An isotropic ConvNeXt has one stage and no dense form: depths=(18,), dims=(384,).")


class Block(nn.Module):
    """x + gamma * mlp(norm(dwconv(x))) on a map b h w c."""

    def __init__(self, dim: int, *, kernel: int = 7, layer_scale: float = 1e-6, drop_path: float = 0.0):
        super().__init__()
        self.dwconv = DepthwiseConv(dim, kernel)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        y: Tensor = self.norm(self.dwconv(x))
        if self.gamma is None and not self.drop_path.active:
            y = self.mlp(y, residual=x)
            return y
        y = self.mlp(y)
        out: Tensor
        if self.gamma is None or self.drop_path.active:
            out = x + self.drop_path(y if self.gamma is None else y * self.gamma)
            return out
        if fusable(x) and y.is_contiguous() and not self.mlp._forward_hooks:  # y is ours alone: no new memory
            return torch.addcmul(x, y, self.gamma, out=y)
        return torch.addcmul(x, y, self.gamma)


class ConvNeXt(Backbone):
    """ConvNeXt in its classification, dense and isotropic forms.

    Maps are those leaving each stage, before any norm (dense: after `norms`), with floor sizes: 225x250 gives 56x62,
    28x31, 14x15, 7x7. A map too small for the next convolution is zero-padded to it. The classifier reads LayerNorm of
    the global mean.
    """

    def __init__(self, config: ConvNeXtConfig):
        count = len(config.dims)
        strides = [config.patch_size * 2**i for i in range(count)]
        super().__init__(config, [Stage(c, s, f"layers.{i}") for i, (c, s) in enumerate(zip(config.dims, strides))])
        dims = config.dims
        self.downsample = downsampling(config.in_chans, dims, config.patch_size, stem_norm=not config.isotropic)
        rates = iter(linear_rates(config.drop_path_rate, sum(config.depths)))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                Block(dim, kernel=config.kernel_size, layer_scale=config.layer_scale, drop_path=next(rates))
                for _ in range(depth)
            )
            for depth, dim in zip(config.depths, dims)
        )
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=EPS) for c in dims) if config.dense else None
        self.norm = nn.Identity() if config.dense else nn.LayerNorm(dims[-1], eps=EPS)
        classes = 0 if config.dense else config.num_classes
        self.num_classes = classes
        head = nn.Linear(dims[-1], classes) if classes > 0 else nn.Identity()
        self.head = head
        self.apply(init_weights)
        if isinstance(head, nn.Linear):
            head.weight.data.mul_(config.head_init_scale)
            head.bias.data.mul_(config.head_init_scale)

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        x, maps = image, []
        for i, (down, blocks) in enumerate(zip(self.downsample, cast(Iterable[nn.ModuleList], self.layers))):
            x = down(pad_to(x, 2 if i else self.config.patch_size)).permute(0, 2, 3, 1)
            for block in blocks:
                x = self.run_block(block, x)
            x = x.permute(0, 3, 1, 2)
            maps.append(x if self.norms is None else self.norms[i](x))
        return maps

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        vector: Tensor = self.norm(features.mean((-2, -1)))
        return vector

    def mixer_sites(self) -> list[MixerSite]:
        c = self.config
        rows, columns = (n // c.patch_size for n in c.image_size)
        return map_sites("dwconv", c.depths, c.dims, (rows, columns))

    # layer decay -------------------------------------------------------------------------------------
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The authors' grouping (`layer_ids`): blocks of stage 2 by threes, later down-sampling beside its stage."""
        blocks: list[tuple[str, tuple[int, ...]]] = []
        for i, depth in enumerate(self.config.depths):
            down, where = ("downsample", str(i)), ("layers", str(i))
            if coarse:
                blocks.append((rf"^layers\.{i}\." if i == 0 else rf"^(?:downsample|layers)\.{i}\.", (i,)))
                continue
            if i:
                blocks.append((rf"^downsample\.{i}\.", (self._layer_id(down),)))
            blocks += [(rf"^layers\.{i}\.{b}\.", (self._layer_id((*where, str(b))),)) for b in range(depth)]
        return {"stem": r"^downsample\.0\.", "blocks": blocks}

    def layer_ids(self) -> dict[str, int]:
        """Depth group of every parameter as the authors number them: 0 (stem) to 13 (norm and head), gaps included.

        With fewer than 27 blocks in stage 2 some numbers stay empty; the factor is decay ** (13 - id) all the same.
        Isotropic: 0, 1 .. depth (blocks), depth + 1.
        """
        return {name: self._layer_id(name.split(".")) for name, _ in self.named_parameters()}

    def _layer_id(self, parts: Sequence[str]) -> int:
        kind = parts[0]
        if kind not in ("downsample", "layers"):
            return self.last_layer_id
        i = int(parts[1])
        if self.config.isotropic:
            return 0 if kind == "downsample" else int(parts[2]) + 1
        last = len(self.layers) - 1
        if kind == "downsample":
            return 0 if i == 0 else (12 if i == last else i + 1)
        if i == last:
            return 12
        return i + 1 if i < 2 else 3 + int(parts[2]) // 3

    @property
    def last_layer_id(self) -> int:
        return self.config.depths[0] + 1 if self.config.isotropic else 13

    def param_groups(self, *, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: lr * layer_decay ** (last - id), no decay for one-dimensional parameters."""
        ids = self.layer_ids()
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            key = (ids[name], parameter.ndim > 1)
            if key not in groups:
                scale = layer_decay ** (self.last_layer_id - key[0])
                groups[key] = {
                    "params": [],
                    "names": [],
                    "lr": lr * scale,
                    "lr_scale": scale,
                    "weight_decay": weight_decay if key[1] else 0.0,
                }
            groups[key]["params"].append(parameter)
            groups[key]["names"].append(name)
        return [groups[key] for key in sorted(groups)]


def downsampling(in_chans: int, dims: Sequence[int], patch: int, *, stem_norm: bool = True) -> nn.ModuleList:
    """What opens each stage: patches and LayerNorm, then LayerNorm and a 2x2 convolution of stride 2."""
    stem: list[nn.Module] = [nn.Conv2d(in_chans, dims[0], patch, patch)]
    if stem_norm:
        stem.append(LayerNorm2d(dims[0], eps=EPS))
    down = [nn.Sequential(LayerNorm2d(a, eps=EPS), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(dims)]
    return nn.ModuleList([nn.Sequential(*stem), *down])


def map_sites(name: str, depths: Sequence[int], dims: Sequence[int], grid: tuple[int, int]) -> list[MixerSite]:
    """The mixers `layers.<stage>.<block>.<name>` of a pyramid that halves its map from stage to stage.

    grid: rows and columns of the first stage's map at the size that the network is made for.
    """
    sites, index = [], 0
    for i, (depth, dim) in enumerate(zip(depths, dims)):
        size = (max(grid[0] >> i, 1), max(grid[1] >> i, 1))
        for block in range(depth):
            place = Place(dim=dim, grid=size, index=index, depth=sum(depths))
            sites.append(MixerSite(path=f"layers.{i}.{block}.{name}", place=place))
            index += 1
    return sites


def init_weights(module: nn.Module) -> None:
    """Truncated normal .02 and zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pyramid(depths: tuple[int, ...], width: int, drop_path: float) -> ConvNeXtConfig:
    return ConvNeXtConfig(depths=depths, dims=tuple(width * 2**i for i in range(4)), drop_path_rate=drop_path)


def _isotropic(depth: int, dim: int, drop_path: float, layer_scale: float) -> ConvNeXtConfig:
    return ConvNeXtConfig(
        depths=(depth,), dims=(dim,), patch_size=16, isotropic=True, drop_path_rate=drop_path, layer_scale=layer_scale
    )


VARIANTS: dict[str, ConvNeXtConfig] = {
    "convnext_nano": ConvNeXtConfig(
        depths=(1, 1, 3, 1), dims=(32, 64, 128, 192), patch_size=2, layer_scale=1.0, image_size=(32, 32)
    ),
    "convnext_tiny": _pyramid((3, 3, 9, 3), 96, 0.1),
    "convnext_small": _pyramid((3, 3, 27, 3), 96, 0.4),
    "convnext_base": _pyramid((3, 3, 27, 3), 128, 0.5),
    "convnext_large": _pyramid((3, 3, 27, 3), 192, 0.5),
    "convnext_xlarge": _pyramid((3, 3, 27, 3), 256, 0.2),
    "convnext_isotropic_small": _isotropic(18, 384, 0.1, 0.0),
    "convnext_isotropic_base": _isotropic(18, 768, 0.2, 0.0),
    "convnext_isotropic_large": _isotropic(36, 1024, 0.5, 1e-6),
}


def build(config: ConvNeXtConfig) -> ConvNeXt:
    return ConvNeXt(config)
