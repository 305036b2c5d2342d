"""The two ways of writing a fooling image as genes, by name or by their configuration."""

from __future__ import annotations

from lynceus.core.errors import unknown
from lynceus.trust.cppn import PatternConfig, Patterns
from lynceus.trust.evolution import Encoding
from lynceus.trust.pixels import PixelConfig, Pixels


def encoding_of(
    encoding: str | PixelConfig | PatternConfig, shape: tuple[int, int, int], grey: bool = False
) -> Encoding:
    """ "pixels", "cppn", or the configuration of one, for images of `shape`."""
    if isinstance(encoding, PixelConfig) or encoding == "pixels":
        return Pixels(shape, encoding if isinstance(encoding, PixelConfig) else None, grey=grey)
    if isinstance(encoding, PatternConfig) or encoding == "cppn":
        return Patterns(shape, encoding if isinstance(encoding, PatternConfig) else None, grey=grey)
    raise unknown("encoding", str(encoding), ("pixels", "cppn"))
