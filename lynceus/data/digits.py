"""scikit-learn's hand-written digits: 1,797 grey pictures of 8 x 8, ten classes, inside the wheel; nothing is
downloaded.

Source: UCI, "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak), CC BY 4.0.
"""

from __future__ import annotations

import numpy as np
import torch

from lynceus.core.errors import unknown
from lynceus.data.dataset import Dataset
from lynceus.data.sources import Pixels

NAMES = [str(i) for i in range(10)]


def digits(*, split: str | None = None) -> Dataset:
    """The digits as uint8 RGB (n, 3, 8, 8), 0..16 scaled to 0..255.

    split: None for all 1,797; "train" and "test" are one fixed stratified cut of 80 % and 20 %.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    whole = Dataset(
        Pixels(images),
        name="digits",
        origin="scikit-learn's digits (bundled)",
        classes=NAMES,
        labels=bunch.target,
        layout="digits",
    )
    if split is None:
        return whole
    parts = dict(zip(("train", "test"), whole.split(0.8, 0.2)))
    parts["val"] = parts["test"]
    if split not in parts:
        raise unknown("split", split, ["train", "test"], how="(digits)")
    out = parts[split]
    out.name = f"digits/{split}"
    return out
