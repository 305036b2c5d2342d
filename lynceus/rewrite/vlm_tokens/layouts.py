"""How a model's image tokens lie: rows and columns of each picture, in the order of the prompt."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.rewrite.vlm_tokens.choose import Tile, length

TILED = ("llava_next", "llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "glm4v")
HOW = "say how one image's tokens lie, as grid='24x24', or tile after tile, grid='24x24,48x36+1' (+1: newlines)"


def tiles_of(
    model: Any, inputs: dict[str, Any], image: Bool[Tensor, "b n"], grid: tuple[Tile, ...] | None
) -> list[list[Tile]]:
    """Tiles of each row of the batch. inputs: of the model's forward. image: which tokens are the images'.

    grid: the layout of one image as the caller says it. Else: image_grid_thw of Qwen2-VL and its kin (or their
    positions of rows and columns, which is what generate() hands on), image_sizes of LLaVA-NeXT, one square per image
    otherwise."""
    counts = image.sum(1).tolist()
    if grid is not None:
        return _shared(list(grid), counts, "grid= is a layout")
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if inputs.get("image_grid_thw") is not None:
        merge = int(getattr(model.config.vision_config, "spatial_merge_size", 1))
        images: list[list[Tile]] = [
            [(h // merge, w // merge)] * t for t, h, w in inputs["image_grid_thw"].reshape(-1, 3).tolist()
        ]
        return _dealt(images, counts)
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3 and len(positions) >= 3:
        return [_of_positions(positions[-2:, i], image[i]) for i in range(len(image))]
    if kind == "llava_next" and inputs.get("image_sizes") is not None:
        return _dealt([_next_tiles(model, tuple(s)) for s in inputs["image_sizes"].tolist()], counts)
    if kind in TILED:
        raise AdviceError(
            f"How the tiles of {type(model).__name__} lie cannot be told from what its forward is given here; {HOW}. "
            "method='fastv' and 'fastv_norope' need no layout."
        )
    pixels = inputs.get("pixel_values")
    given = len(pixels) if isinstance(pixels, Tensor) and pixels.ndim == 4 else 0
    total = sum(counts)
    one = total // given if given and total % given == 0 else min(c for c in counts if c)
    return _shared([_square(one)], counts, "an image is a square")


def _of_positions(places: Int[Tensor, "2 n"], image: Bool[Tensor, " n"]) -> list[Tile]:
    """One tile per frame of each run of image tokens, from the rows and columns in their positions."""
    out: list[Tile] = []
    at = image.nonzero()[:, 0]
    starts = (at.diff() != 1).nonzero()[:, 0] + 1
    for run in at.tensor_split(starts.tolist()) if len(at) else ():
        rows, columns = ((p.max() - p.min() + 1).item() for p in places[:, run])
        out += [(int(rows), int(columns))] * (len(run) // int(rows * columns))
    if length(out) != len(at):
        raise AdviceError(f"The positions of the {len(at)} image tokens make no rows and columns; {HOW}.")
    return out


def _square(tokens: int) -> Tile:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise AdviceError(
            f"An image of {tokens} tokens is no square (the nearest is {round(tokens**0.5)} x {round(tokens**0.5)}); "
            f"{HOW}. method='fastv' and 'fastv_norope' need no layout."
        )
    return side, side


def _shared(one: list[Tile], counts: list[int], said: str) -> list[list[Tile]]:
    """The same layout for every image; each row holds as many images as its tokens make."""
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
