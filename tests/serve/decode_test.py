"""Bytes to pixels: the very pixels of read_image for every format, bounded, and never a guess."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from serve_kit import encode, picture, png_bomb

from lynceus.data.decode import read_image
from lynceus.serve.decode import decode, kind_of, npy
from lynceus.serve.errors import Corrupt, NotAPicture, TooLarge

COLOUR = picture(47, 61)
KINDS = {
    "jpeg": encode(COLOUR),
    "progressive": encode(COLOUR, progressive=True, quality=80),
    "grey jpeg": encode(COLOUR[..., 0]),
    "4:4:4": encode(COLOUR, subsampling=0),
    "png": encode(COLOUR, "PNG"),
    "grey png": encode(COLOUR[..., 0], "PNG"),
    "16 bit png": encode((COLOUR[..., 0].astype(np.uint16) << 8) + 77, "PNG"),
    "rgba png": encode(np.dstack([COLOUR, COLOUR[..., :1]]), "PNG"),
    "webp": encode(COLOUR, "WEBP"),
    "gif": encode(COLOUR, "GIF"),
    "bmp": encode(COLOUR, "BMP"),
    "tiff": encode(COLOUR, "TIFF"),
    "16 bit tiff": encode(COLOUR[..., 0].astype(np.uint16) * 200, "TIFF"),
    "ppm": encode(COLOUR, "PPM"),
}


def cmyk():
    out = io.BytesIO()
    Image.fromarray(COLOUR).convert("CMYK").save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize("raw", [*KINDS.values(), cmyk()], ids=[*KINDS, "cmyk"])
def test_pixels_are_those_of_read_image(raw):
    assert torch.equal(decode(raw), read_image(raw))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("order", ["II", "MM"])
def test_every_exif_orientation(turn, order):
    plain = encode(COLOUR)
    o = "<" if order == "II" else ">"
    tiff = (
        order.encode() + struct.pack(o + "HIH", 42, 8, 1) + struct.pack(o + "HHIHH", 0x0112, 3, 1, turn, 0) + bytes(4)
    )
    exif = b"Exif\0\0" + tiff
    raw = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert torch.equal(decode(raw), read_image(raw))


def test_real_photographs(imagenet_jpegs):
    for path in imagenet_jpegs:
        raw = path.read_bytes()
        assert torch.equal(decode(raw), read_image(raw)), path.name


def test_small_decoding_reaches_what_is_asked_for():
    raw = encode(picture(700, 900), quality=95)
    small = decode(raw, least=(100, 120))
    assert small.shape[1] >= 100
    assert small.shape[2] >= 120
    assert small.shape[1] < 350
    assert decode(raw, least=(400, 400)).shape == (3, 700, 900)  # five eighths would take longer than all


def test_cut_and_flipped_jpegs_are_corrupt_or_decode_as_offline():
    raw = encode(picture(90, 120), quality=90)
    r = np.random.default_rng(0)
    refused = 0
    for i in range(300):
        bad = bytearray(raw[: int(r.integers(2, len(raw) - 2))] if i % 2 else raw)
        if i % 2 == 0:
            for _ in range(8):
                bad[int(r.integers(2, len(bad)))] ^= 1 << int(r.integers(8))
        try:
            made = decode(bytes(bad), max_pixels=1e6)
        except (Corrupt, TooLarge, NotAPicture):
            refused += 1
            continue
        assert i % 2 == 0  # what is cut short is always seen
        assert torch.equal(made, read_image(bytes(bad)))
    assert refused > 200


def test_not_strict_is_read_image():
    raw = bytearray(encode(picture(90, 120), quality=90))
    raw[len(raw) // 2] ^= 0x41
    raw = bytes(raw)
    with pytest.raises(Corrupt):
        decode(raw)
    assert torch.equal(decode(raw, strict=False), read_image(raw))


@pytest.mark.parametrize(
    "raw",
    [
        png_bomb(50000, 50000),
        png_bomb(2**31 - 1, 1),
        encode(picture(20, 20)).replace(struct.pack(">HH", 20, 20), struct.pack(">HH", 65000, 65000), 1),
        encode(picture(20, 20), "BMP").replace(struct.pack("<ii", 20, 20), struct.pack("<ii", 40000, 40000), 1),
        encode(picture(20, 20), "GIF").replace(struct.pack("<HH", 20, 20), struct.pack("<HH", 60000, 60000), 1),
        b"P6\n60000 60000\n255\n" + bytes(100),
    ],
    ids=["png", "thin png", "jpeg", "bmp", "gif", "ppm"],
)
def test_bombs_are_seen_before_they_unfold(raw):
    with pytest.raises((TooLarge, Corrupt)):
        decode(raw, max_pixels=64e6)


def test_a_gif_of_many_frames_costs_one():
    frames = [Image.fromarray(picture(30, 40, s)) for s in range(30)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert torch.equal(decode(out.getvalue()), read_image(out.getvalue()))


def test_many_scans_are_refused():
    raw = encode(picture(20, 20), progressive=True)
    scan = raw[raw.index(b"\xff\xda") : raw.rindex(b"\xff\xd9")]
    with pytest.raises((TooLarge, Corrupt)):
        decode(raw[:-2] + scan * 200 + raw[-2:])


@pytest.mark.parametrize("raw", [b"", b"x", b"%!PS-Adobe-3.0 EPSF\n", b"<svg/>", b"GIF", bytes(1000), b"\xff\xd8\xff"])
def test_what_is_no_picture(raw):
    with pytest.raises((NotAPicture, Corrupt)):
        decode(raw)


def test_tensors_come_as_npy():
    for image in (torch.from_numpy(COLOUR), torch.from_numpy(COLOUR).permute(2, 0, 1).float().div(255)):
        made = decode(npy(image))
        want = image if image.shape[0] == 3 else image.permute(2, 0, 1)
        assert torch.equal(made, want)
        assert kind_of(npy(image)) == "npy"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.full((3, 4, 4), 2, np.float32),
        np.full((3, 4, 4), np.nan, np.float32),
        np.zeros((3, 4, 4), np.float64),
    ],
)
def test_other_tensors_are_refused(array):
    with pytest.raises(Corrupt):
        decode(npy(array))


def test_npy_headers_lie_in_vain():
    raw = npy(np.zeros((3, 4, 4), np.uint8))
    for bad in (
        raw[:-1],
        raw + b"x",
        raw.replace(b"(3, 4, 4)", b"(3, 9, 9)"),
        raw.replace(b"'|u1'", b"'|O8'"),
        raw[:20],
    ):
        with pytest.raises(Corrupt):
            decode(bad)
    with pytest.raises(Corrupt):
        decode(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)
