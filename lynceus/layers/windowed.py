"""Any map mixer inside windows: it sees one window at a time, and every second block's windows lie half a side off."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.shapes import pad_map
from lynceus.layers.mixers import MixerConfig, Place
from lynceus.layers.window import from_windows, to_windows


class Windowed(nn.Module):
    """`mixer` inside windows of M x M cells. shift: how far they lie up and left; the border is filled with zeros, so
    no cells meet that are no neighbours."""

    def __init__(self, mixer: nn.Module, window: int, *, shift: int = 0):
        super().__init__()
        self.mixer, self.window, self.shift = mixer, window, shift

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        b, h, w, c = x.shape
        m, s = self.window, self.shift
        x = pad_map(F.pad(x, (0, 0, s, 0, s, 0)) if s else x, m)
        size = (b, x.shape[1], x.shape[2])
        windows = self.mixer(to_windows(x, m).view(-1, m, m, c))
        return from_windows(windows.reshape(-1, m * m, c), size, m)[:, s : s + h, s : s + w]


def windowed(config: MixerConfig, place: Place, window: int) -> Windowed:
    """A mixer for the windows of a place."""
    inner = replace(place, grid=(window, window))
    return Windowed(config.build(inner), window, shift=window // 2 if place.index % 2 else 0)
