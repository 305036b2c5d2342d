"""From the bytes of a request to RGB uint8, bounded: sizes are read from the header before a pixel is decoded.

JPEG goes through libjpeg-turbo (simplejpeg), whose pixels are those of `data.decode.read_image`; everything else is
`read_image` itself. EXIF orientation is applied, CMYK and 16 bits become RGB in 8 bits as there. Only formats with a
signature of their own are taken, so that no exotic parser can be reached from outside. Tensors come as .npy.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import missing_extra
from lynceus.data.decode import UnreadableError, from_pillow, image_size, read_image
from lynceus.serve.errors import Corrupt, NotAPicture, TooLarge

NPY = b"\x93NUMPY"
SCANS = 100  # of a progressive JPEG: each costs a pass over all its pixels
_OVER = 1e-3  # what resizing may leave outside [0, 1]
_NPY_HEADER = 256  # bytes; that of a picture has about 100


def kind_of(raw: bytes) -> str:
    """jpeg, png, gif, webp, bmp, tiff, ppm, avif or npy, by the first bytes; "" for anything else."""
    head = raw[:12]
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:6] == NPY:
        return "npy"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return "tiff"
    if head[:2] == b"BM":
        return "bmp"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#":
        return "ppm"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return ""


def decode(
    raw: bytes, *, max_pixels: float = 64e6, strict: bool = True, least: tuple[int, int] | None = None
) -> Tensor:
    """The picture as (3, h, w): uint8, or float32 in [0, 1] where a tensor of floats was sent.

    max_pixels: a larger picture is TooLarge, seen from its header. strict: JPEG data that the decoder would have to
    guess is Corrupt; otherwise it is decoded as `read_image` does. least: (h, w) that are enough: JPEG is then decoded
    at the smallest eighth of its size that reaches them, which changes pixels.
    Raises NotAPicture, Corrupt, TooLarge.
    """
    kind = kind_of(raw)
    if kind == "jpeg":
        return _jpeg(raw, max_pixels, strict, least)
    if kind == "npy":
        return _npy(raw, max_pixels)
    if not kind:
        what = "an empty body" if not raw else "no picture of a kind that is taken"
        raise NotAPicture(f"This is {what}; send JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or a .npy tensor.")
    try:
        h, w = _png_size(raw) if kind == "png" else image_size(raw, name="The picture")
        _bound(h, w, max_pixels)
        return _first_frame(raw) if kind == "gif" else read_image(raw, name="The picture")
    except UnreadableError as error:
        raise Corrupt(str(error)) from None
    except TooLarge:
        raise
    except Exception as error:  # parsers of foreign formats raise whatever they like on foreign bytes
        raise Corrupt(f"The picture cannot be read: {type(error).__name__}.") from None


def _jpeg(raw: bytes, max_pixels: float, strict: bool, least: tuple[int, int] | None) -> Tensor:
    try:
        import simplejpeg
    except ImportError:
        raise missing_extra("simplejpeg", "serve", use="Serving JPEG") from None
    try:
        h, w, space, _ = simplejpeg.decode_jpeg_header(raw, strict=strict)
    except ValueError as error:
        raise Corrupt(f"The JPEG cannot be read: {error}.") from None
    _bound(h, w, max_pixels)
    if raw.count(b"\xff\xda") > SCANS:
        raise TooLarge(f"The JPEG has more than {SCANS} scans.")
    try:
        if space not in ("YCbCr", "Gray", "RGB"):
            return read_image(raw, name="The picture")
        turn = orientation(raw)
        low = (0, 0) if least is None else least if turn < 5 else least[::-1]
        # seven to five eighths of the size take longer than the whole
        pixels = simplejpeg.decode_jpeg(
            raw, "RGB", min_height=low[0], min_width=low[1], min_factor=1 if least is None else 2, strict=strict
        )
    except UnreadableError as error:
        raise Corrupt(str(error)) from None
    except ValueError as error:
        raise Corrupt(f"The JPEG is damaged: {error}.") from None
    return turned(torch.from_numpy(pixels).permute(2, 0, 1), turn)


def orientation(raw: bytes) -> int:
    """EXIF's number of a JPEG, 1 to 8; 1 where there is none, or none that can be read."""
    at = raw.find(b"Exif\x00\x00", 0, 65536)
    if at < 0:
        return 1
    tiff = raw[at + 6 : at + 6 + 65536]
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for i in range(min(count, 512)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def turned(image: Tensor, orientation: int) -> Tensor:
    """The picture (3, h, w) as EXIF says that it is to be looked at."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return image if axes is None else image.flip(axes)


def _png_size(raw: bytes) -> tuple[int, int]:
    if len(raw) < 33 or raw[12:16] != b"IHDR":
        raise Corrupt("The PNG is cut short.")
    w, h = struct.unpack(">II", raw[16:24])
    return h, w


def _first_frame(raw: bytes) -> Tensor:
    """Of a GIF, whatever number of frames it holds."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=["GIF"]) as opened:
        return from_pillow(opened)


def _npy(raw: bytes, max_pixels: float) -> Tensor:
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise Corrupt("The .npy file is of another version than 1.0.")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_NPY_HEADER)
    except Corrupt:
        raise
    except Exception:
        raise Corrupt("The header of the .npy file cannot be read.") from None
    if len(shape) != 3 or fortran or dtype not in (np.dtype(np.uint8), np.dtype("<f4")):
        raise Corrupt(f"A tensor is uint8 or float32, (3, h, w) or (h, w, 3) in C order, not {dtype} {shape}.")
    last = shape[2] == 3 and shape[0] != 3
    h, w = shape[:2] if last else shape[1:]
    if (shape[2] if last else shape[0]) != 3:
        raise Corrupt(f"A tensor has three channels, (3, h, w) or (h, w, 3), not {shape}.")
    _bound(h, w, max_pixels)
    if len(raw) - file.tell() != 3 * h * w * dtype.itemsize:
        raise Corrupt(f"The .npy file holds {len(raw) - file.tell()} bytes of values; {shape} has another number.")
    values = np.frombuffer(raw, dtype, offset=file.tell()).reshape(shape)
    if dtype != np.uint8 and not (np.isfinite(values).all() and values.min() >= -_OVER and values.max() <= 1 + _OVER):
        raise Corrupt("A tensor of floats lies in [0, 1].")
    made = torch.from_numpy(values.copy())
    return made.permute(2, 0, 1) if last else made


def npy(image: Any) -> bytes:
    """A picture (3, h, w) or (h, w, 3), uint8 or float32 in [0, 1], as a body that `decode` reads."""
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _bound(h: int, w: int, max_pixels: float) -> None:
    if h < 1 or w < 1:
        raise Corrupt("The picture has no pixels.")
    if h * w > max_pixels:
        raise TooLarge(f"The picture has {h} x {w} pixels; at most {max_pixels / 1e6:g} million are taken.")
