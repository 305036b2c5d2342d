"""Widths that suit the hardware."""

from __future__ import annotations


def divisible(width: float, by: int = 8, *, least: float = 0.9) -> int:
    """The multiple of `by` nearest to a width, at least `by`; one more where it would fall below `least` of it."""
    near = max(by, int(width + by / 2) // by * by)
    return near + by if near < least * width else near
