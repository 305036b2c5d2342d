"""Hand-written digits, side by side, on pieces of real photographs: house numbers without a download."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.decode import resize
from lynceus.data.synth.generated import generated, tight

PHOTOS = ("china", "flower")  # inside scikit-learn, hence always there


def digits_on_photos(
    count: int = 1000, *, size: tuple[int, int] = (32, 96), length: tuple[int, int] = (1, 5), seed: int = 0
) -> Dataset:
    """Pictures of `size` (h, w) with length[0] .. length[1] digits in a row, each about 0.7 of the height.

    boxes, classes (0..9, left to right), masks (the strokes), text (the number).
    """
    make = functools.partial(_digits, size=size, length=length)
    return generated("digits_on_photos", count, seed, make, classes=[str(i) for i in range(10)])


@functools.lru_cache(maxsize=1)
def _material() -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    from sklearn.datasets import load_digits

    from lynceus.data.samples import sample

    bunch = load_digits()
    return bunch.images, bunch.target, [sample(n).image for n in PHOTOS]


def _digits(rng: np.random.Generator, index: int, *, size: tuple[int, int], length: tuple[int, int]) -> Sample:
    glyphs, values, photos = _material()
    h, w = size
    photo = photos[int(rng.integers(len(photos)))]
    top, left = int(rng.integers(photo.shape[1] - h)), int(rng.integers(photo.shape[2] - w))
    image = photo[:, top : top + h, left : left + w].float() * float(rng.uniform(0.4, 0.9))
    number = int(rng.integers(length[0], length[1] + 1))
    side = int(min(rng.uniform(0.6, 0.8) * h, (w - 2) / number))
    x = int(rng.integers(0, w - side * number + 1))
    colour = torch.tensor(rng.uniform(190, 255, 3) if rng.random() < 0.7 else rng.uniform(0, 40, 3)).float()
    masks, boxes, classes = [], [], []
    for k in range(number):
        pick = int(rng.integers(len(glyphs)))
        glyph = torch.from_numpy((glyphs[pick] * (255 / 16)).astype(np.uint8))[None]
        ink = resize(glyph, (side, side))[0].float() / 255
        y = int(np.clip((h - side) / 2 + rng.normal(0, 0.04 * h), 0, h - side))
        place = (slice(y, y + side), slice(x + k * side, x + (k + 1) * side))
        image[:, place[0], place[1]] = image[:, place[0], place[1]] * (1 - ink) + colour[:, None, None] * ink
        mask = torch.zeros((h, w), dtype=torch.bool)
        mask[place] = ink > 0.4
        masks.append(mask)
        boxes.append(tight(mask.numpy()))
        classes.append(int(values[pick]))
    image += torch.from_numpy(rng.normal(0, 4, (3, h, w))).float()
    return Sample(
        image=image.round().clamp(0, 255).to(torch.uint8),
        boxes=torch.from_numpy(np.array(boxes)),
        classes=torch.tensor(classes),
        masks=torch.stack(masks),
        text="".join(map(str, classes)),
    )
