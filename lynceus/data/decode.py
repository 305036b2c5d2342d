"""From a file or its bytes to RGB uint8: torchvision's decoders first, Pillow for what they do not know.

JPEG, PNG, GIF and WebP go through torchvision's image operators; BMP, TIFF, PPM and the rest through Pillow. EXIF
orientation is applied, CMYK becomes RGB, grey becomes three equal channels, transparency is dropped, 16-bit values are
divided by 257, bilevel becomes 0 and 255. What cannot be decoded whole is `UnreadableError`, never a grey half.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io  # noqa: F401  (registers torch.ops.image)
from jaxtyping import UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError

EXTENSIONS = frozenset(
    {*(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp")}
    | {*(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif")}
)
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class UnreadableError(AdviceError):
    """A picture that cannot be decoded: `where` names it, `why` says what is wrong with it."""

    def __init__(self, where: str, why: str):
        self.where, self.why = where, why
        super().__init__(f"{where} cannot be read: {why}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return UnreadableError, (self.where, self.why)


def is_image(path: str | Path) -> bool:
    """Whether the name ends as a picture's does, and does not start with a dot."""
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def read_image(
    source: str | Path | bytes, *, size: int | tuple[int, int] | None = None, name: str = ""
) -> UInt8[Tensor, "3 h w"]:
    """The picture in a file, or in the bytes of one, as RGB.

    size: (h, w), or the length of the shorter side, to resize to (bilinear with antialiasing).
    name: what to call bytes in an error. Raises MissingError for a path that is not there, else UnreadableError.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        raw, where = bytes(source), name or "the picture"
    else:
        where = name or os.path.abspath(source)
        try:
            with open(source, "rb") as file:
                raw = file.read()
        except FileNotFoundError:
            raise MissingError(f"There is no file {where} (looked from {os.getcwd()}).") from None
        except OSError as error:
            raise UnreadableError(where, error.strerror or str(error)) from None
    image = _decode(raw, where)
    return image if size is None else resize(image, size)


def resize(image: UInt8[Tensor, "*b c h w"], size: int | tuple[int, int]) -> UInt8[Tensor, "*b c h2 w2"]:
    """Bilinear with antialiasing on uint8, to (h, w) or to a shorter side of `size`."""
    from torchvision.transforms.v2 import functional as F

    h, w = image.shape[-2:]
    if isinstance(size, int):
        short = min(h, w)
        size = (max(1, round(h * size / short)), max(1, round(w * size / short)))
    return image if (h, w) == tuple(size) else F.resize(image, list(size), antialias=True)


def _decode(raw: bytes, where: str) -> Tensor:
    if not raw:
        raise UnreadableError(where, "the file is empty (0 bytes); copy it again or delete it")
    fast = raw[:3] == b"\xff\xd8\xff" or raw[:8] == b"\x89PNG\r\n\x1a\n" or raw[:4] in (b"GIF8", b"RIFF")
    operator = getattr(torch.ops.image, "decode_image", None)
    if not (fast and operator is not None):
        return _decode_pillow(raw, where)
    try:
        # bytearray: torch warns about read-only memory otherwise, and the copy is cheap beside the decoding
        image: Tensor = operator(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _RGB, True)
    except RuntimeError as error:
        why = str(error).split(", ")[-1].splitlines()[0].rstrip(". ")
        if "truncated" in why or "bound" in why:
            raise UnreadableError(where, "the file is cut short; copy it again or delete it") from None
        return _decode_pillow(raw, where)
    if image.ndim == 4:  # a moving GIF: its first frame
        image = image[0]
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) + 128).div(257, rounding_mode="floor").to(torch.uint8)
    if image.shape[0] != 3:
        image = image[:3] if image.shape[0] == 4 else image[:1].expand(3, -1, -1).contiguous()
    return image


def _decode_pillow(raw: bytes, where: str) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            return from_pillow(picture)
    except UnidentifiedImageError:
        head = raw[:64].lstrip().lower()
        why = "it is no picture"
        if head.startswith((b"<!doctype", b"<html", b"<?xml")):
            why = "it is a web page, not a picture (a failed download?)"
        elif head.startswith(b"version https://git-lfs"):
            why = "it is a Git LFS pointer, not the picture; run `git lfs pull`"
        elif raw[:4] == b"PK\x03\x04":
            why = "it is a zip archive; unpack it"
        raise UnreadableError(where, why) from None
    except Image.DecompressionBombError as error:
        raise UnreadableError(where, str(error).rstrip(".")) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        why = str(error)
        if "truncated" in why or "not processed" in why:
            why = "the file is cut short; copy it again or delete it"
        raise UnreadableError(where, why.rstrip(".") or type(error).__name__) from None


def from_pillow(picture: Any) -> UInt8[Tensor, "3 h w"]:
    """A PIL image of any mode as RGB uint8; 16-bit is divided by 257, float is taken as [0, 1] or else as 0..255."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F":
            values = values * 255 if values.size and values.max() <= 1 else values
        elif picture.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257
        grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def image_size(source: str | Path | bytes, *, name: str = "") -> tuple[int, int]:
    """(h, w) as `read_image` gives it, from the header only. Raises UnreadableError."""
    from PIL import Image, UnidentifiedImageError

    where = name or (os.path.abspath(source) if isinstance(source, str | Path) else "the picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            w, h = opened.size
            # Pillow has turned the size of a TIFF already
            turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise MissingError(f"There is no file {where} (looked from {os.getcwd()}).") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        empty = isinstance(source, str | Path) and os.path.getsize(source) == 0
        why = "the file is empty (0 bytes); copy it again or delete it" if empty else str(error) or "it is no picture"
        raise UnreadableError(where, why.split(": <")[0].rstrip(".")) from None
    return (w, h) if turned else (h, w)


def to_image(array: Any) -> UInt8[Tensor, "*b 3 h w"]:
    """An array or tensor of one picture or many as RGB uint8 with channels first.

    Takes (h, w), (h, w, 1|3|4), (1|3, h, w) and the same with a leading batch axis; uint8 as it is, uint16 divided by
    257, bool as 0 and 255, float in [0, 1] times 255. Raises AdviceError for other shapes or ranges.
    """
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    x = np.asarray(array)
    if x.dtype == bool:
        x = x.astype(np.uint8) * 255
    elif x.dtype == np.uint16:
        x = np.rint(x / 257).astype(np.uint8)
    elif np.issubdtype(x.dtype, np.floating):
        low, high = (float(np.nanmin(x)), float(np.nanmax(x))) if x.size else (0.0, 0.0)
        if not np.isfinite(x).all() or low < -1e-3 or high > 1 + 1e-3:
            raise AdviceError(
                f"A float picture must lie in [0, 1]; this one spans {low:g} .. {high:g}. "
                "Divide by its largest value, or pass uint8 in 0..255."
            )
        x = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    elif np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8:
        if x.size and (x.min() < 0 or x.max() > 255):
            raise AdviceError(f"An integer picture must lie in 0..255; this one spans {x.min()} .. {x.max()}.")
        x = x.astype(np.uint8)
    elif x.dtype != np.uint8:
        raise AdviceError(f"A picture must be of numbers; this array is of {x.dtype}.")
    if x.ndim == 2:
        x = x[None]
    elif x.ndim in (3, 4) and x.shape[-1] in (1, 3, 4) and x.shape[-3] not in (1, 3):
        x = np.moveaxis(x, -1, -3)
    elif x.ndim == 3 and x.shape[0] not in (1, 3, 4):
        x = x[:, None]  # many grey pictures (n, h, w)
    if x.ndim not in (3, 4) or x.shape[-3] not in (1, 3, 4):
        raise AdviceError(
            f"A picture is (h, w), (h, w, 3) or (3, h, w), many have n before that; got {tuple(np.shape(array))}."
        )
    x = x[..., :3, :, :]
    if x.shape[-3] == 1:
        x = np.repeat(x, 3, axis=-3)
    return torch.from_numpy(np.ascontiguousarray(x))
