"""The super-network of ViT-ResNAS: one set of weights; every network of a space is a choice of leading channels.

Paper: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, arXiv 2109.00642
Code: yilunliao/vit-search
Licence: none of it is used here (theirs is non-commercial); written from the paper

Which networks a batch runs is passed to `forward` as a `Kept`: for every example and every position the number of
channels that stay. Several networks may share a batch; their examples stand interleaved, network by network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lynceus.backbones.resnas import Reduction, ResNAS, ResNASConfig
from lynceus.backbones.resnas_definition import BlockDefinition, Definition, StageDefinition
from lynceus.core.errors import AdviceError
from lynceus.layers.attention import Attention
from lynceus.layers.block import MixerBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpace:
    """What a block may be: numbers of heads, hidden widths, and whether it is there.

    there: () for always; else what is drawn from, e.g. (True, True, False) leaves it out once in three.
    """

    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    there: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpace:
    """What a stage may be: its widths and its blocks."""

    widths: tuple[int, ...]
    blocks: tuple[BlockSpace, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All networks that the super-network `full` contains; options are kept largest first."""

    full: Definition
    stages: tuple[StageSpace, ...]

    def __post_init__(self) -> None:
        if [len(s.blocks) for s in self.stages] != [len(s.blocks) for s in self.full.stages]:
            raise AdviceError("A space describes every stage and block of its full network, one by one.")
        for stage, full in zip(self.stages, self.full.stages):
            _largest("widths", stage.widths, full.width)
            for block, whole in zip(stage.blocks, full.blocks):
                _largest("heads", block.heads, whole.heads)
                _largest("hidden", block.hidden, whole.hidden)
                if not whole.exists or (block.there and True not in block.there):
                    raise AdviceError("Every block of the full network exists, and may stay.")

    @staticmethod
    def of(full: Definition, keep: Sequence[Any]) -> Space:
        """From the authors' lists: per item of the definition its widths, or {"attn", "mlp", "layer"} of a block.

        "attn" holds products heads * head_dim; "layer" the width or 0, None for a block that is always there.
        """
        stages: list[StageSpace] = []
        rest = iter(keep)
        for stage in full.stages:
            widths = _down(next(rest))
            blocks = []
            for block in stage.blocks:
                said: Mapping[str, Any] = next(rest)
                layer = said.get("layer")
                blocks.append(
                    BlockSpace(
                        heads=_down([k // block.head_dim for k in said["attn"]]),
                        hidden=_down(said["mlp"]),
                        there=() if layer is None else tuple(bool(k) for k in _down(layer)),
                    )
                )
            stages.append(StageSpace(widths=widths, blocks=tuple(blocks)))
        return Space(full=full, stages=tuple(stages))

    def sample(self, generator: torch.Generator) -> Definition:
        """One network, every field drawn on its own."""

        def one(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (), generator=generator))]

        stages, before = [], 0
        for stage, full in zip(self.stages, self.full.stages):
            before = one([w for w in stage.widths if w >= before] or [full.width])
            blocks = []
            for block, whole in zip(stage.blocks, full.blocks):
                changes = {"heads": one(block.heads), "hidden": one(block.hidden)}
                blocks.append(replace(whole, **changes, exists=not block.there or one(block.there)))
            stages.append(StageDefinition(width=before, blocks=tuple(blocks)))
        return replace(self.full, stages=tuple(stages))

    def check(self, definition: Definition) -> None:
        """An AdviceError when the super-network does not contain `definition`."""
        full = self.full
        if (definition.embedding, definition.middle) != (full.embedding, full.middle):
            raise AdviceError("The super-network has another embedding than the definition asks for.")
        if [len(s.blocks) for s in definition.stages] != [len(s.blocks) for s in full.stages]:
            raise AdviceError(
                f"The super-network has {[len(s.blocks) for s in full.stages]} blocks in its stages, the definition "
                f"{[len(s.blocks) for s in definition.stages]}; list absent ones in parentheses."
            )
        for stage, whole, options in zip(definition.stages, full.stages, self.stages):
            for b, w, o in zip(stage.blocks, whole.blocks, options.blocks):
                if b.head_dim != w.head_dim:
                    raise AdviceError(f"Heads of the super-network are {w.head_dim} wide here, not {b.head_dim}.")
                if stage.width > whole.width or b.heads > w.heads or b.hidden > w.hidden:
                    raise AdviceError(f"{b} of width {stage.width} is larger than {w} of width {whole.width}.")
                if not b.exists and not o.there:
                    raise AdviceError("The definition leaves a block out that this space never drops.")

    def resolved(self, definition: Definition) -> Definition:
        """The network that really runs: after a dropped block the next droppable ones fall too, until one that is not
        droppable, or a reduction."""
        stages = []
        for stage, options in zip(definition.stages, self.stages):
            there, blocks = True, []
            for block, option in zip(stage.blocks, options.blocks):
                there = (block.exists and there) if option.there else True
                blocks.append(replace(block, exists=there))
            stages.append(replace(stage, blocks=tuple(blocks)))
        return replace(definition, stages=tuple(stages))


def allowed(options: Sequence[Any], epoch: int | None, warmup: int) -> Sequence[Any]:
    """The options of an epoch: the largest first, one more after each equal part of the warm-up; None: all."""
    if epoch is None or warmup <= 0:
        return options
    return options[: min(1 + epoch * (len(options) - 1) // warmup, len(options))]


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """Per example: channels of the attention's output (heads * head_dim), hidden channels, and whether it is there."""

    attention: Int[Tensor, " b"]
    hidden: Int[Tensor, " b"]
    there: Bool[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class Kept:
    """How many leading channels stay, per example: the width of every stage, and every block in order."""

    widths: tuple[Int[Tensor, " b"], ...]
    blocks: tuple[KeptBlock, ...]

    @property
    def batch(self) -> int:
        return self.widths[0].shape[0]


def kept(space: Space, definitions: Sequence[Definition], batch: int) -> Kept:
    """`definitions` for a batch, which must be a multiple of their number: [d1 .. dk, d1 .. dk, ...]."""
    if not definitions or batch % len(definitions):
        raise AdviceError(f"{len(definitions)} networks cannot share a batch of {batch} equally.")
    for d in definitions:
        space.check(d)
    resolved = [space.resolved(d) for d in definitions]

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values).repeat(batch // len(definitions))

    widths = tuple(column([d.stages[i].width for d in resolved]) for i in range(len(space.stages)))
    rows = zip(*[[b for _, b in d.blocks()] for d in resolved])
    blocks = tuple(
        KeptBlock(
            column([b.heads * b.head_dim for b in row]),
            column([b.hidden for b in row]),
            column([int(b.exists) for b in row]).bool(),
        )
        for row in rows
    )
    return Kept(widths, blocks)


def draw(
    space: Space,
    batch: int,
    generator: torch.Generator,
    *,
    per_network: int = 64,
    epoch: int | None = None,
    warmup: int = 30,
    single: bool = False,
) -> Kept:
    """Random networks for a training batch: at every position batch / per_network choices, drawn on its own from a
    permuted cycle of its options, so that all occur equally often; interleaved as in `kept`.

    single: one network for the whole batch. epoch: options grow over `warmup` epochs, see `allowed`; None: all.
    """
    if not single and (per_network < 1 or batch % per_network):
        raise AdviceError(f"A batch of {batch} is no multiple of {per_network} examples per network.")
    count = 1 if single else batch // per_network

    def column(options: Sequence[int], *, grow: bool = True) -> Tensor:
        options = allowed(options, epoch if grow else None, warmup)
        cycle = torch.tensor(list(options)).repeat(math.ceil(count / len(options)))
        order = torch.randperm(len(cycle), generator=generator)[:count]
        return cycle[order].repeat(batch // count)

    widths: list[Tensor] = []
    blocks: list[KeptBlock] = []
    for stage, full in zip(space.stages, space.full.stages):
        width = column(stage.widths)
        if widths:  # a reduction fills up with zeros, so widths do not shrink
            width = torch.maximum(width, widths[-1])
        widths.append(width)
        before = torch.ones(batch, dtype=torch.bool)
        for block, whole in zip(stage.blocks, full.blocks):
            there = torch.ones(batch, dtype=torch.bool)
            if block.there:
                options = sorted(block.there, reverse=True)
                there = column([int(v) for v in options]).bool() & before
            before = there
            blocks.append(KeptBlock(column(block.heads) * whole.head_dim, column(block.hidden), there))
    return Kept(tuple(widths), tuple(blocks))


class SuperNet(ResNAS):
    """ViT-Res whose forward runs, per example, the network that a `Kept` describes.

    Without a `Kept` it is the full network. State names are ViT-Res's.
    """

    def __init__(self, space: Space, config: ResNASConfig | None = None):
        super().__init__(replace(config or ResNASConfig(), definition=space.full.text()))
        self.space = space

    def forward(self, image: Float[Tensor, "b c h w"], kept: Kept | None = None) -> Any:
        """As ViT-Res's; with `kept` (as many examples as images) of the networks chosen."""
        if kept is None:
            return super().forward(image)
        if kept.batch != image.shape[0]:
            raise AdviceError(f"The batch has {image.shape[0]} images, the choice of networks {kept.batch} examples.")
        features = self.masked_features(image, kept)
        logits = self.forward_head(features)
        if self.training and self.config.patch_output:
            return logits, self.forward_patches(features)
        return logits

    def masked_features(self, image: Float[Tensor, "b c h w"], kept: Kept) -> Float[Tensor, "b n d"]:
        """All tokens of the last stage after the final norm; channels that are not kept are 0."""
        x, size = self.embed(image)
        widths, blocks = iter(kept.widths), iter(kept.blocks)
        mask = leading(next(widths), x)
        x = x * mask
        for part in self.blocks:
            if isinstance(part, Reduction):
                x = part.reduce(x, masked_norm(part.norm, x, mask), size)
                size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
                mask = leading(next(widths), x)
                x = x * mask
            else:
                x = self.run_block(_masked_block, x, cast(MixerBlock, part), next(blocks), mask)
        return masked_norm(self.norm, x, mask)


def leading(count: Int[Tensor, " b"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b 1 c"]:
    """1 for the first `count` channels of every example, 0 for the others, in the precision of `x`."""
    place = torch.arange(x.shape[2], device=x.device)
    return (place < count.to(x.device)[:, None]).to(x.dtype)[:, None]


def masked_norm(norm: nn.LayerNorm, x: Float[Tensor, "b n c"], mask: Float[Tensor, "b 1 c"]) -> Float[Tensor, "b n c"]:
    """LayerNorm over the kept channels alone; 0 elsewhere."""
    count = mask.sum(2, keepdim=True)
    centred = (x - (x * mask).sum(2, keepdim=True) / count) * mask
    variance = centred.square().sum(2, keepdim=True) / count
    return torch.addcmul(norm.bias, centred * (variance + norm.eps).rsqrt(), norm.weight) * mask


def _masked_block(x: Tensor, block: MixerBlock, kept: KeptBlock, mask: Tensor) -> Tensor:
    keep = mask * kept.there.to(x.device, x.dtype)[:, None, None]
    attn, mlp = cast(Attention, block.attn), block.mlp
    x = x + keep * block.drop_path(_attend(attn, masked_norm(block.norm1, x, mask), kept.attention))
    y = mlp.drop(mlp.act(mlp.fc1(masked_norm(block.norm2, x, mask))))
    return x + keep * block.drop_path(mlp.drop(mlp.fc2(y * leading(kept.hidden, y))))


def _attend(attn: Attention, x: Tensor, count: Tensor) -> Tensor:
    b, n = x.shape[:2]
    q, k, v = attn.qkv(x).view(b, n, 3, attn.heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop if attn.training else 0.0, scale=attn.scale)
    y = y.transpose(1, 2).reshape(b, n, attn.heads * attn.head_dim)
    made: Tensor = attn.proj_drop(attn.proj(y * leading(count, y)))
    return made


def extract(supernet: SuperNet, definition: Definition, *, listed: bool = True) -> ResNAS:
    """The network cut out of the super-network: leading channels, leading heads (of q, k and v each), its own copy.

    Its logits are those of the super-network with that choice. listed: absent blocks stay in its definition as absent,
    which keeps the rates of stochastic depth; else they are left out for good.
    """
    supernet.space.check(definition)
    definition = supernet.space.resolved(definition)
    like = next(supernet.parameters())
    made = ResNAS(replace(supernet.config, definition=definition.text())).to(like.device, like.dtype)
    whole = supernet.state_dict()
    for name, value in made.state_dict().items():
        source = whole[name]
        if ".attn.qkv." in name:
            source = source.unflatten(0, (3, -1))[:, : value.shape[0] // 3].flatten(0, 1)
        value.copy_(source[tuple(slice(n) for n in value.shape)])
    made.train(supernet.training)
    return made if listed else _without_absent(made, definition)


def _without_absent(model: ResNAS, definition: Definition) -> ResNAS:
    shorter = replace(
        definition,
        stages=tuple(replace(s, blocks=tuple(b for b in s.blocks if b.exists)) for s in definition.stages),
    )
    made = ResNAS(replace(model.config, definition=shorter.text()))
    like = next(model.parameters())
    state = zip(made.state_dict(), model.state_dict().values())  # the order of what is there does not change
    made.to(like.device, like.dtype).load_state_dict(dict(state))
    return made.train(model.training)


# importance -------------------------------------------------------------------------------------------
def importance(block: MixerBlock) -> tuple[Float[Tensor, " heads"], Float[Tensor, " hidden"]]:
    """How much weight, in absolute values, every head (q, k, v, their biases, proj) and hidden channel carries."""
    attn, mlp = cast(Attention, block.attn), block.mlp
    with torch.no_grad():
        shape = (3, attn.heads, attn.head_dim)
        inner = attn.qkv.weight.abs().sum(1) + attn.qkv.bias.abs()
        heads = inner.view(shape).sum((0, 2)) + attn.proj.weight.abs().sum(0).view(shape[1:]).sum(1)
        hidden = mlp.fc1.weight.abs().sum(1) + mlp.fc1.bias.abs() + mlp.fc2.weight.abs().sum(0)
    return heads, hidden


def sort_channels(model: ResNAS) -> None:
    """Puts heads and hidden channels of every block in the order of their importance, in place, largest first.

    The function of the full network does not change. An optimiser's moments are not moved along.
    """
    with torch.no_grad():
        for block in _blocks(model):
            attn, mlp = cast(Attention, block.attn), block.mlp
            heads, hidden = (values.argsort(descending=True, stable=True) for values in importance(block))
            place = torch.arange(attn.heads * attn.head_dim, device=heads.device).view(attn.heads, -1)[heads].flatten()
            rows = torch.cat([place + i * len(place) for i in range(3)])
            attn.qkv.weight.copy_(attn.qkv.weight[rows])
            attn.qkv.bias.copy_(attn.qkv.bias[rows])
            attn.proj.weight.copy_(attn.proj.weight[:, place])
            mlp.fc1.weight.copy_(mlp.fc1.weight[hidden])
            mlp.fc1.bias.copy_(mlp.fc1.bias[hidden])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, hidden])


def _blocks(model: ResNAS) -> Iterator[MixerBlock]:
    return (m for m in model.blocks if isinstance(m, MixerBlock))


def _down(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted((int(v) for v in values), reverse=True))


def _largest(what: str, options: tuple[int, ...], whole: int) -> None:
    if not options or max(options) != whole or min(options) < 1 or list(options) != sorted(options, reverse=True):
        raise AdviceError(f"{what} {options} must fall from the full network's {whole} to no less than 1.")


# the authors' spaces ------------------------------------------------------------------------------------
def _space(
    widths: Sequence[int], blocks: int, heads: Sequence[tuple[int, int]], products: Sequence[Sequence[int]]
) -> Space:
    stages, full = [], []
    for width, (count, head_dim), inner in zip(widths, heads, products):
        hidden = 3 * width
        block = BlockSpace(
            heads=_down([p // head_dim for p in inner]),
            hidden=_down([hidden - hidden * i // 12 for i in range(7)]),
        )
        droppable = replace(block, there=(True, True, False, False))
        options = _down([int(width * f) for f in (1, 7 / 8, 3 / 4, 11 / 16, 5 / 8)])
        stages.append(StageSpace(widths=options, blocks=tuple(droppable if i % 2 else block for i in range(blocks))))
        whole = BlockDefinition(heads=count, head_dim=head_dim, hidden=hidden)
        full.append(StageDefinition(width=width, blocks=(whole,) * blocks))
    return Space(full=Definition(stages=tuple(full)), stages=tuple(stages))


SPACES: dict[str, Space] = {
    "tiny": _space(
        (256, 512, 1024),
        6,
        ((6, 32), (12, 48), (12, 64)),
        ((192, 160, 128, 96), range(288, 577, 96), range(384, 769, 128)),
    ),
    "small": _space(
        (320, 640, 1280),
        7,
        ((8, 32), (16, 48), (16, 64)),
        ((256, 224, 192, 160), (768, 672, 576, 480), (1024, 896, 768, 640)),
    ),
}
SPACES["medium"] = SPACES["small"]  # searched with another budget
