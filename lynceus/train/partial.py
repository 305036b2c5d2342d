"""Training a part of a network: its last blocks, and perhaps its norms; all else is frozen, statistics included."""

from __future__ import annotations

from typing import Any

from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.train.optim import depths


def last_blocks(backbone: Any, tune: float, *, most: float = 1.0) -> list[str]:
    """Names of the parameters of the last blocks: the share `tune` of the blocks, rounded, at least one; as many of
    them as hold at most the share `most` of the backbone's weights.

    Blocks are the depth groups of `group_matcher`, as timm's layer decay uses them, without the stem and the
    classifier; a norm behind the last block counts to it. Where not even the last block fits, as in pyramids that end
    wide, those layers of these blocks that do, from the end.
    """
    for name, value in (("tune", tune), ("most", most)):
        if not 0 < value <= 1:
            raise AdviceError(f"{name} is a share in (0, 1], not {value}.")
    groups = depth_groups(backbone)
    blocks = groups[1:] or groups
    blocks = blocks[-max(1, round(tune * len(blocks))) :]
    sizes = {n: p.numel() for n, p in backbone.named_parameters()}
    left = most * sum(sizes.values())
    taken: list[str] = []
    for block in reversed(blocks):
        left -= sum(sizes[n] for n in block)
        if left < 0:
            break
        taken = [*block, *taken]
    return taken or _layers(backbone, [n for block in blocks for n in block], sizes, most * sum(sizes.values()))


def _layers(backbone: Any, names: list[str], sizes: dict[str, int], left: float) -> list[str]:
    """The names of those layers that fit into `left` weights, from the end."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    taken: list[str] = []
    for layer in reversed(layers.values()):
        size = sum(sizes[n] for n in layer)
        if size <= left:
            taken, left = [*layer, *taken], left - size
    if not any(backbone.get_parameter(n).ndim > 1 for n in taken):
        least = min(sum(sizes[n] for n in layer) for layer in layers.values()) / sum(sizes.values())
        raise AdviceError(f"No layer of the last blocks is small enough to be tuned; take most >= {least:.2f} or more.")
    return taken


def depth_groups(backbone: Any) -> list[list[str]]:
    """Names of the parameters from the stem to the last block, without the classifier."""
    if not (hasattr(backbone, "group_matcher") and hasattr(backbone, "get_classifier")):
        raise AdviceError(
            f"{type(backbone).__name__} does not say where its blocks are (group_matcher, get_classifier), so its last "
            "ones cannot be tuned alone; take one of lynceus.create_model."
        )
    head = {id(p) for p in backbone.get_classifier().parameters()}
    depth = depths(backbone)
    groups: dict[int, list[str]] = {}
    for name, p in backbone.named_parameters():
        if id(p) not in head:
            groups.setdefault(depth.get(name, max(depth.values())), []).append(name)
    ordered = [groups[at] for at in sorted(groups)]
    # a norm in front of the classifier is a group of its own in some families
    while len(ordered) > 1 and all(backbone.get_parameter(n).ndim <= 1 for n in ordered[-1]):
        last = ordered.pop()
        ordered[-1] += last
    return ordered


def norm_parameters(backbone: nn.Module) -> list[str]:
    """Names of the gains and biases of all norms."""
    return [
        f"{name}.{leaf}"
        for name, module in backbone.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, p in module.named_parameters(recurse=False)
        if p.ndim <= 1
    ]


def train_only(backbone: nn.Module, blocks: list[str]) -> None:
    """Train mode for the modules all of whose parameters are in `blocks`, with what is inside them; eval mode, and so
    unmoved statistics and no dropout, for all others."""
    chosen = set(blocks)
    backbone.eval()
    for name, module in backbone.named_modules():
        inside = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
        if inside and chosen.issuperset(inside):
            module.train()
