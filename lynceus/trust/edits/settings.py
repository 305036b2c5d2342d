"""What an audit asks, by a short text: one attribute ("size=0.1"), or several ("position=random,direction=45")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lynceus.core.errors import AdviceError, unknown

IDENTITY = "identity"
STANDARD: tuple[str, ...] = (
    "background=plain",
    "complexity=-0.5",
    "complexity=0.5",
    "background=adversarial",
    "background=random",
    "size=full",
    "size=0.1",
    "size=0.08",
    "size=0.05",
    "position=random",
    "direction=45",
)
BACKGROUNDS = ("plain", "blurred", "random", "adversarial")
WORDS = ("size", "angle", "direction", "position", "background", "complexity")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What to change. direction: a random angle of at most so many degrees either way. The others: see `edit`."""

    name: str
    size: float | Literal["full"] | None = None
    angle: float | None = None
    direction: float | None = None
    position: tuple[int, int] | Literal["random"] | None = None
    background: str | None = None
    complexity: float | None = None


def setting(text: str) -> Setting:
    """Reads NAME=VALUE[,NAME=VALUE ...]; "identity" changes nothing.

    size=SHARE|full, angle=DEGREES, direction=DEGREES, position=random|ROWxCOLUMN, complexity=SHARE,
    background=plain|blurred|random|adversarial.
    """
    if text.strip() == IDENTITY:
        return Setting(name=IDENTITY)
    values: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        word, _, value = part.partition("=")
        if word not in WORDS:
            raise unknown("attribute", word, WORDS, how=f'(in {text!r}; write "size=0.1".)')
        if word == "background":
            if value not in BACKGROUNDS:
                raise unknown("background", value, BACKGROUNDS)
            values[word] = value
        elif (word, value) in (("size", "full"), ("position", "random")):
            values[word] = value
        elif word == "position":
            row, _, column = value.partition("x")
            values[word] = (int(_number(row, text)), int(_number(column, text)))
        else:
            values[word] = _number(value, text)
    size, share = values.get("size"), values.get("complexity")
    if isinstance(size, float) and not 0 < size < 1:
        raise AdviceError(f"size is the share of the pixels that the object covers, 0 to 1; {text!r} says {size}.")
    if share is not None and not share > -1:
        raise AdviceError(f"complexity is a share, greater than -1; {text!r} says {share}.")
    return Setting(name=text.replace(" ", ""), **values)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AdviceError(
            f"{text!r} in {whole!r} is no number; write, for example, size=0.1 or direction=45."
        ) from None
