"""How a model's image tokens lie: rows and columns of each picture, in the order of the prompt."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.rewrite.vlm_tokens.choose import Tile, length

HOW = "say how one image's tokens lie, as grid='24x24', or tile after tile, grid='24x24,48x36+1' (+1: newlines)"


def tiles_of(model: Any, inputs: dict[str, Any], counts: list[int], grid: tuple[Tile, ...] | None) -> list[list[Tile]]:
    """Tiles of each row of the batch. inputs: of the model's forward. counts: image tokens of each row.

    grid: the layout of one image as the caller says it. Else: image_grid_thw of Qwen2-VL and its kin, image_sizes of
    LLaVA-NeXT, and one square per image for all others."""
    if grid is not None:
        return _shared([list(grid)], counts, "grid= is a layout")
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if inputs.get("image_grid_thw") is not None:
        merge = int(getattr(model.config.vision_config, "spatial_merge_size", 1))
        images: list[list[Tile]] = [
            [(h // merge, w // merge)] * t for t, h, w in inputs["image_grid_thw"].reshape(-1, 3).tolist()
        ]
        return _dealt(images, counts)
    if kind == "llava_next" and inputs.get("image_sizes") is not None:
        return _dealt([_next_tiles(model, tuple(s)) for s in inputs["image_sizes"].tolist()], counts)
    if kind == "llava_onevision":
        raise AdviceError(f"The tiles of {type(model).__name__} cannot be told from its inputs; {HOW}.")
    pixels = inputs.get("pixel_values")
    images_given = len(pixels) if isinstance(pixels, Tensor) and pixels.ndim == 4 else None
    total = sum(counts)
    if images_given and total % images_given == 0:
        return _shared([[_square(total // images_given)]], counts, "an image is a square")
    single = min((c for c in counts if c), default=0)
    return _shared([[_square(single)]], counts, "an image is a square")


def _square(tokens: int) -> Tile:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise AdviceError(
            f"An image of {tokens} tokens is no square (the nearest is {round(tokens**0.5)} x {round(tokens**0.5)}); "
            f"{HOW}. method='fastv' and 'fastv_norope' need no layout."
        )
    return side, side


def _shared(image: list[list[Tile]], counts: list[int], said: str) -> list[list[Tile]]:
    """The same layout for every image; each row holds as many images as its tokens make."""
    one = image[0]
    size = length(one)
    wrong = [c for c in counts if size == 0 or c % size]
    if wrong:
        raise AdviceError(f"{said} of {size} tokens, but a row of the batch holds {wrong[0]} image tokens; {HOW}.")
    return [one * (c // size) for c in counts]


def _dealt(images: list[list[Tile]], counts: list[int]) -> list[list[Tile]]:
    """Images in the order of the batch, given to the rows by their numbers of tokens."""
    out: list[list[Tile]] = []
    rest = list(images)
    for count in counts:
        mine: list[Tile] = []
        while length(mine) < count and rest:
            mine += rest.pop(0)
        if length(mine) != count:
            raise AdviceError(
                f"The images' sizes make {length(mine)} tokens where a row of the prompt has {count}; {HOW}."
            )
        out.append(mine)
    return out


def _next_tiles(model: Any, size: tuple[int, int]) -> list[Tile]:
    """LLaVA-NeXT: the whole image small, then all crops merged and unpadded, each row with a newline token."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    merged = unpad_image(torch.empty(1, rows * side, columns * side), size)
    newline = 1 if getattr(model, "image_newline", None) is not None else 0
    return [(side, side), (int(merged.shape[1]), int(merged.shape[2]), newline)]
