"""The pictures in the body of a request: raw, multipart/form-data, or base64 in JSON. Bounded, and quick to say no."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from lynceus.serve.errors import NotAPicture, Refused, TooLarge

RAW = ("application/octet-stream", "application/x-npy", "application/x-www-form-urlencoded", "binary/octet-stream")
_BOUNDARY = re.compile(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;",]{1,70}))', re.IGNORECASE)
_PARAMETER = re.compile(rb';\s*(name|filename)="([^"\r\n]{0,1000})"', re.IGNORECASE)
_HEAD = 8192  # bytes of the head of one part


class UnsupportedType(NotAPicture):
    kind = "unsupported_type"


def pictures(content_type: str, body: bytes, *, max_images: int) -> tuple[list[bytes], bool]:
    """(encoded pictures, whether a list is to be answered). Raises Refused with the status that fits.

    multipart: every part with a file name, or called file, image or images, is a picture; a form of one is answered
    as one. JSON: {"image": BASE64} is one, {"images": [BASE64, ...]} many; a data: URL is taken too.
    """
    if not body:
        raise Refused("The body is empty; send a picture.")
    kind = content_type.partition(";")[0].strip().lower()
    if not kind or kind in RAW or kind.startswith("image/"):
        return [body], False
    if kind == "multipart/form-data":
        found = _parts(content_type, body, max_images)
        return found, len(found) > 1
    if kind == "application/json":
        return _from_json(body, max_images)
    raise UnsupportedType(
        f"The content type {kind[:80]!r} is not taken; send image/*, application/octet-stream, multipart/form-data or "
        "application/json."
    )


def _parts(content_type: str, body: bytes, most: int) -> list[bytes]:
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise Refused("multipart/form-data needs its boundary.")
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    if body.startswith(mark):
        body = b"\r\n" + body
    mark = b"\r\n" + mark
    if body.count(mark) > most + 16:
        raise TooLarge(f"The form has too many parts; at most {most} pictures are taken in one request.")
    pieces = body.split(mark)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise Refused("The form is cut short, or its boundary is another.")
    out: list[bytes] = []
    for piece in pieces[1:-1]:
        head, gap, value = piece.partition(b"\r\n\r\n")
        if not gap or len(head) > _HEAD:
            raise Refused("A part of the form has no head of its own.")
        names = {k.lower(): v for k, v in _PARAMETER.findall(head)}
        if b"filename" in names or names.get(b"name") in (b"file", b"files", b"image", b"images"):
            out.append(value)
    if not out:
        raise Refused("The form has no file; send the picture as a file, or in a field called image.")
    if len(out) > most:
        raise TooLarge(f"{len(out)} pictures are too many; at most {most} are taken in one request.")
    return out


def _from_json(body: bytes, most: int) -> tuple[list[bytes], bool]:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("The body is no JSON.") from None
    if not isinstance(value, dict) or ("image" in value) == ("images" in value):
        raise Refused('JSON is {"image": BASE64} or {"images": [BASE64, ...]}.')
    many = "images" in value
    texts = value["images"] if many else [value["image"]]
    if not isinstance(texts, list) or not texts:
        raise Refused('"images" is a list of at least one picture.')
    if len(texts) > most:
        raise TooLarge(f"{len(texts)} pictures are too many; at most {most} are taken in one request.")
    return [_decoded(text) for text in texts], many


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str) or not text:
        raise Refused("A picture in JSON is text in base64.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("A picture in JSON is not valid base64.") from None
