"""A prediction drawn on its picture: segments and masks as colour, boxes as frames, names and scores as text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.plots import COLOURS, to_picture
from lynceus.core.types import Prediction

LEAST = 224  # pictures smaller than this are enlarged by a whole factor, so that text on them can be read
IGNORED = 255


def draw_prediction(prediction: Prediction, *, classes: list[str] | None = None, opacity: float = 0.5) -> Any:
    """A PIL image (RGB) of `prediction.image` with everything that was found on it.

    classes: names of box classes; without them `prediction.extra["classes"]` or the index is written.
    Raises AdviceError when the prediction does not carry its picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    p = prediction
    if p.image is None:
        raise AdviceError("This prediction does not carry its picture; set prediction.image, a (3, h, w) tensor.")
    picture = to_picture(p.image)
    factor = max(1, -(-LEAST // max(picture.size)))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if p.depth is not None:
        picture = _blend(picture, _grey(p.depth), 1.0)
    if p.segments is not None:
        coloured, covered = _coloured(p.segments)
        picture = _blend(picture, coloured, opacity, covered)
    if p.masks is not None and len(p.masks):
        index = torch.full(p.masks.shape[-2:], IGNORED, dtype=torch.long)
        for i, mask in enumerate(p.masks.detach().cpu().bool()):
            index[mask] = i % len(COLOURS)
        coloured, covered = _coloured(index)
        picture = _blend(picture, coloured, opacity, covered)
    names = classes if classes is not None else p.extra.get("classes")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, min(18, picture.height // 24)))
    if p.boxes is not None:
        for i, box in enumerate(p.boxes.detach().cpu().tolist()):
            kind = int(p.classes[i]) if p.classes is not None else None
            colour = COLOURS[(kind if kind is not None else i) % len(COLOURS)]
            x0, y0, x1, y1 = (v * factor for v in box)
            draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour, width=2)
            text = [] if kind is None else [names[kind] if names and kind < len(names) else str(kind)]
            if p.scores is not None and len(p.scores) == len(p.boxes):
                text.append(f"{float(p.scores[i]):.2f}")
            if text:
                _tag(draw, font, (x0, y0), " ".join(text), colour, picture.size)
    if title := caption(p):
        _tag(draw, font, (0, 0), title, "#16191d", picture.size)
    return picture


def caption(prediction: Prediction) -> str:
    """The class name and its probability, or the text that was predicted."""
    p = prediction
    if p.label is None and p.name is None:
        return p.text or ""
    text = p.name if p.name is not None else str(p.label)
    if p.boxes is None and p.label is not None and p.scores is not None and p.label < len(p.scores):
        text += f" {float(p.scores[p.label]):.2f}"
    return text


def _coloured(index: Tensor) -> tuple[Tensor, Tensor]:
    """(3, h, w) uint8 colours of a class map, and (h, w) bool where something is drawn."""
    index = index.detach().cpu().long()
    palette = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], dtype=torch.uint8)
    return palette[index % len(palette)].permute(2, 0, 1), index != IGNORED


def _grey(depth: Tensor) -> Tensor:
    """Near is bright; invalid (nan) is black."""
    d = depth.detach().cpu().float()
    valid = d.isfinite()
    if not valid.any():
        return torch.zeros(3, *d.shape, dtype=torch.uint8)
    low, high = d[valid].min(), d[valid].max()
    near = torch.where(valid, 1 - 0.9 * (d - low) / (high - low).clamp(min=1e-12), torch.zeros_like(d))
    return (near * 255).to(torch.uint8).expand(3, -1, -1)


def _blend(picture: Any, colours: Tensor, opacity: float, covered: Tensor | None = None) -> Any:
    from PIL import Image

    layer = to_picture(colours).resize(picture.size, Image.Resampling.NEAREST)
    if covered is None:
        covered = torch.ones(colours.shape[-2:], dtype=torch.bool)
    alpha = Image.fromarray((covered.float() * 255 * opacity).to(torch.uint8).numpy())
    return Image.composite(layer, picture, alpha.resize(picture.size, Image.Resampling.NEAREST))


def _tag(draw: Any, font: Any, corner: tuple[float, float], text: str, colour: str, size: tuple[int, int]) -> None:
    """White text on a patch, kept inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0.0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    y = max(0.0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 3 - left, y + 3 - top), text, font=font, fill="#ffffff")
