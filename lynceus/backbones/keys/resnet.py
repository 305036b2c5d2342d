"""Foreign parameter names of ResNet -> ours, which are torchvision's and timm's."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "torchvision": (),
    "timm": (),
}
