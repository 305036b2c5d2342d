"""Decoding: every mode and orientation becomes RGB uint8; what is not whole is named."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data.decode import UnreadableError, image_size, read_image, resize, to_image

RNG = np.random.default_rng(0)
SMOOTH = np.array(Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50, 40), Image.BICUBIC))


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(raw):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(raw)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_lossless_kinds_agree_with_pillow(mode, kind):
    if kind in ("WEBP", "GIF", "BMP") and mode in ("LA", "1", "P", "RGBA"):
        mode = "RGB"
    raw = encoded(Image.fromarray(SMOOTH).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = read_image(raw)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 40, 50)
    assert image_size(raw) == (40, 50)
    assert torch.equal(image, reference(raw))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_within_two_grey_levels_of_pillow(mode):
    raw = encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=92)
    assert (read_image(raw).int() - reference(raw).int()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_divided_by_257(kind):
    values = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    image = read_image(encoded(Image.fromarray(values), kind))
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    assert (image.int() - expected.int()).abs().max() == 0
    assert image.shape[0] == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(SMOOTH), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    image = read_image(raw)
    turned = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    assert image.shape[1:] == turned.shape[:2]
    assert image_size(raw) == tuple(turned.shape[:2])
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - turned).max() <= 2


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.99), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"]))
def test_a_cut_file_is_never_half_a_picture(share, kind):
    raw = encoded(Image.fromarray(SMOOTH), kind)
    cut = raw[: int(share * (len(raw) - 3))]
    with pytest.raises(UnreadableError, match=r"^cut\.x cannot be read: "):
        read_image(cut, name="cut.x")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04rest", "zip archive; unpack"),
        (b"hello", "no picture"),
    ],
)
def test_what_is_no_picture_says_what_it_is(content, why, tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(UnreadableError, match=why) as caught:
        read_image(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match=str(tmp_path / "no.jpg")):
        read_image("no.jpg")


@pytest.mark.parametrize("name", ["größe äöü.png", "with space.png", "日本語/猫.png", "emoji 🐈.png"])
def test_any_path(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(SMOOTH).save(file)
    assert read_image(file).shape == (3, 40, 50)
    assert read_image(str(file), size=20).shape == (3, 20, 25)
    assert read_image(file, size=(8, 9)).shape == (3, 8, 9)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4), (3, 5, 6), (1, 5, 6)])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "i8", "?"])
def test_arrays_of_one_picture(shape, kind):
    top = {"u1": 255, "u2": 65535, "f4": 1, "i8": 255, "?": 1}[kind]
    image = to_image((np.ones(shape) * top).astype(kind))
    assert image.shape == (3, 5, 6)
    assert (image == 255).all()


def test_arrays_of_many_and_of_the_wrong_kind():
    assert to_image(np.zeros((7, 5, 6), np.uint8)).shape == (7, 3, 5, 6)
    assert to_image(np.zeros((7, 5, 6, 3), np.uint8)).shape == (7, 3, 5, 6)
    assert to_image(torch.zeros(7, 3, 5, 6)).shape == (7, 3, 5, 6)
    with pytest.raises(AdviceError, match=r"\[0, 1\].*0 \.\. 200"):
        to_image(np.linspace(0, 200, 75).reshape(5, 5, 3))
    with pytest.raises(AdviceError, match=r"got \(5,\)"):
        to_image(np.zeros(5, np.uint8))


def test_resize_keeps_the_shape_of_the_picture():
    image = read_image(encoded(Image.fromarray(SMOOTH), "PNG"))
    assert resize(image, 20).shape == (3, 20, 25)
    assert resize(image.transpose(1, 2), 20).shape == (3, 25, 20)
    assert resize(image, (40, 50)) is image
