"""The definition language of ViT-Res: what a network is made of, as text, as the authors' tuples, and as dataclasses.

Text:    C 176,352,704: 3|704 3|576 // 10|1408 8|1408 // 10|2560
         widths of the stages, then per block heads|hidden, blocks apart by spaces, stages by //. Heads are 32, 48, 64
         wide in the first, second, third stage and later; 3x64|768 says another width. (3|704) is a block that is
         listed but absent. In front of C: "P" for plain patches, "M32" for middle width 32 in the embedding.
Tuples:  ((4, 176), (1, (176, 3, 32), (176, 704), 1), ..., (3, 176, 352), ..., (2, 704, 1000))
         (4, C) convolutional embedding, (0, C) plain patches, (5, C, middle); (1, (C, heads, head_dim), (C, hidden),
         exists) a block; (3, C, C') a spatial reduction; (2, C, classes) the classifier.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lynceus.core.errors import AdviceError

Embedding = Literal["conv", "plain"]
MIDDLE = 24  # channels inside the convolutional embedding, unless said
HEAD_DIMS = (32, 48, 64)  # of the found networks
_HELP = "e.g. 'C 32,64: 2x16|96 2x16|96 // 4x16|192'"
_BLOCK = re.compile(r"(\()?(\d+)(?:x(\d+))?\|(\d+)(\))?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDefinition:
    """A transformer block: heads of width head_dim, hidden width of the perceptron; exists=False leaves it out."""

    heads: int
    head_dim: int
    hidden: int
    exists: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDefinition:
    """Blocks of one width."""

    width: int
    blocks: tuple[BlockDefinition, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """A whole network but for its classifier: the embedding, and stages joined by spatial reductions."""

    stages: tuple[StageDefinition, ...]
    embedding: Embedding = "conv"
    middle: int = MIDDLE

    def __post_init__(self) -> None:
        widths = [s.width for s in self.stages]
        numbers = [*widths, self.middle, *(n for _, b in self.blocks() for n in (b.heads, b.head_dim, b.hidden))]
        if not widths or min(numbers) < 1:
            raise AdviceError(f"A definition has at least one stage, and all its widths are at least 1; {_HELP}.")
        if widths != sorted(widths):
            raise AdviceError(f"A reduction pads with zeros, so widths never shrink; these do: {widths}.")

    def blocks(self) -> Iterator[tuple[StageDefinition, BlockDefinition]]:
        """Every listed block, absent ones included, with its stage."""
        return ((stage, block) for stage in self.stages for block in stage.blocks)

    def text(self) -> str:
        """The compact form, which `parse` reads."""
        front = "P " if self.embedding == "plain" else "" if self.middle == MIDDLE else f"M{self.middle} "
        stages = []
        for number, stage in enumerate(self.stages):
            usual = HEAD_DIMS[min(number, len(HEAD_DIMS) - 1)]
            blocks = []
            for b in stage.blocks:
                said = f"{b.heads}|{b.hidden}" if b.head_dim == usual else f"{b.heads}x{b.head_dim}|{b.hidden}"
                blocks.append(said if b.exists else f"({said})")
            stages.append(" ".join(blocks))
        return f"{front}C {','.join(str(s.width) for s in self.stages)}: {' // '.join(stages)}".rstrip()

    def items(self, num_classes: int = 1000) -> tuple[tuple[Any, ...], ...]:
        """The authors' tuples."""
        first = self.stages[0].width
        conv = (4, first) if self.middle == MIDDLE else (5, first, self.middle)
        items: list[tuple[Any, ...]] = [conv if self.embedding == "conv" else (0, first)]
        before = first
        for number, stage in enumerate(self.stages):
            if number > 0:
                items.append((3, before, stage.width))
            before = c = stage.width
            items += [(1, (c, b.heads, b.head_dim), (c, b.hidden), int(b.exists)) for b in stage.blocks]
        return (*items, (2, before, num_classes))

    def macs(self, *, image_size: int = 224, patch_size: int = 14, tokens: int = 1, num_classes: int = 1000) -> int:
        """Multiply-adds at a square size, counted as the authors count them: products only, one head per token."""
        side = image_size // patch_size
        first, half = self.stages[0].width, image_size // 2
        if self.embedding == "conv":
            inner = 27 * self.middle + 2 * 9 * self.middle**2
            total = half**2 * inner + side**2 * first * self.middle * (patch_size // 2) ** 2
        else:
            total = side**2 * first * 3 * patch_size**2
        before = first
        for number, stage in enumerate(self.stages):
            c = stage.width
            if number > 0:
                side = (side + 1) // 2
                total += 9 * before * c * side**2 + before * c * tokens
            n = side**2 + tokens
            for b in stage.blocks:
                if b.exists:
                    inner = b.heads * b.head_dim
                    total += 4 * c * inner * n + 2 * n * n * inner + 2 * n * c * b.hidden
            before = c
        return total + tokens * before * num_classes


def parse(definition: str | Sequence[Any]) -> Definition:
    """A definition from compact text, the text of tuples, or nested sequences; see the top of this file."""
    if not isinstance(definition, str):
        return from_items(definition)
    text = definition.strip()
    if text.startswith(("(", "[")):
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise AdviceError(f"{text[:60]!r} is no tuple of tuples of numbers; {_HELP}.") from None
        return from_items(items)
    found = re.match(r"(?:(P)\s+|M(\d+)\s+)?C\s+([\d,\s]+):(.*)$", text, re.DOTALL)
    if found is None:
        raise AdviceError(f"{text[:60]!r} is no definition: it starts with the widths of its stages, {_HELP}.")
    widths = [int(w) for w in found[3].replace(" ", "").split(",") if w]
    parts = found[4].split("//")
    if len(widths) != len(parts):
        raise AdviceError(f"{len(widths)} widths but {len(parts)} stages (apart by //) in {text[:60]!r}; {_HELP}.")
    stages = []
    for number, (width, part) in enumerate(zip(widths, parts)):
        blocks = []
        for word in part.split():
            block = _BLOCK.match(word)
            if block is None or bool(block[1]) != bool(block[5]):
                raise AdviceError(f"A block is heads|hidden or headsxwidth|hidden, not {word!r}; {_HELP}.")
            head_dim = int(block[3]) if block[3] else HEAD_DIMS[min(number, len(HEAD_DIMS) - 1)]
            blocks.append(
                BlockDefinition(heads=int(block[2]), head_dim=head_dim, hidden=int(block[4]), exists=not block[1])
            )
        stages.append(StageDefinition(width=width, blocks=tuple(blocks)))
    return Definition(
        stages=tuple(stages), embedding="plain" if found[1] else "conv", middle=int(found[2]) if found[2] else MIDDLE
    )


def from_items(items: Sequence[Any]) -> Definition:
    """A definition from the authors' tuples (or lists); a classifier at the end is checked and left out."""
    try:
        return _from_items(items)
    except AdviceError:
        raise
    except (TypeError, IndexError, ValueError) as error:
        advice = "a block is (1, (C, heads, head_dim), (C, hidden), 1)"
        raise AdviceError(f"These tuples are no definition ({error}); {advice}.") from None


def _from_items(items: Sequence[Any]) -> Definition:
    if items[0][0] not in (0, 4, 5):
        raise AdviceError(f"A definition starts with an embedding (4, C), (0, C) or (5, C, middle), not {items[0]}.")
    kind, width = items[0][0], items[0][1]
    middle = items[0][2] if kind == 5 else MIDDLE
    stages: list[tuple[int, list[BlockDefinition]]] = [(width, [])]
    for place, item in enumerate(items[1:], 1):
        said = item[1][0] if item[0] == 1 else item[1]
        if said != width or (item[0] == 1 and item[2][0] != width):
            raise AdviceError(f"Item {place}, {tuple(item)}, does not start from the {width} channels before it.")
        if item[0] == 1:
            (_, heads, head_dim), (_, hidden), exists = item[1:]
            block = BlockDefinition(heads=heads, head_dim=head_dim, hidden=hidden, exists=bool(exists))
            stages[-1][1].append(block)
        elif item[0] == 3:
            width = item[2]
            stages.append((width, []))
        elif item[0] != 2 or place != len(items) - 1:
            raise AdviceError(f"Item {place}, {tuple(item)}, is no block (1), reduction (3) or classifier (2, last).")
    return Definition(
        stages=tuple(StageDefinition(width=w, blocks=tuple(b)) for w, b in stages),
        embedding="plain" if kind == 0 else "conv",
        middle=middle,
    )
