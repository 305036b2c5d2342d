"""Requests of the sizes that the paper measures: small (70 x 60), medium (500 x 375), large (3564 x 2880) JPEGs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.serve.load import Request

# kind -> (width, height, JPEG quality): 2-4 kB, about 110 kB, about 1 MB for photographs
SIZES: dict[str, tuple[int, int, int]] = {
    "small": (70, 60, 90),
    "medium": (500, 375, 95),
    "large": (3564, 2880, 80),
}


def photo(kind: str, *, source: bytes | None = None, seed: int = 0) -> bytes:
    """A JPEG of the kind's size: `source` (an image file's bytes) resized to it, or a generated scene with texture.

    A photograph enlarged to "large" has fewer details than a camera's, so its file is nearer 1 MB than 10."""
    from PIL import Image

    if kind not in SIZES:
        raise unknown("size", kind, SIZES)
    width, height, quality = SIZES[kind]
    if source is None:
        image: Any = Image.fromarray(_scene(np.random.default_rng(seed)))
    else:
        image = Image.open(io.BytesIO(source)).convert("RGB")
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _scene(random: np.random.Generator) -> np.ndarray:
    """Coloured blobs at many scales, (375, 500, 3) uint8: its file is about as large as a photograph's."""
    from PIL import Image

    total = np.zeros((375, 500, 3))
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.25), (250, 0.12)):
        noise = random.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        total += weight * np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
    return (total / 1.87).clip(0, 255).astype(np.uint8)


def photos(folder: str | Path, *, count: int | None = None) -> list[bytes]:
    """The JPEG files of a folder as they are, sorted by name, spread evenly when `count` is less."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingError(f"There is no folder {folder}; give one with JPEG files.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise MissingError(f"{folder} holds no .jpg or .jpeg file.")
    if count is not None and count < len(files):
        files = [files[i * len(files) // count] for i in range(count)]
    return [f.read_bytes() for f in files]


def requests(
    mix: Mapping[str, float], *, sources: Sequence[bytes] = (), count: int = 64, seed: int = 0
) -> list[Request]:
    """About `count` requests whose kinds have the shares of `mix`, {"medium": 0.8, "large": 0.2}.

    sources: image files to make them of; medium ones are sent as they are. Without any, scenes are generated."""
    total = sum(mix.values())
    if not mix or total <= 0 or min(mix.values()) < 0:
        raise AdviceError('A mix gives each size its share, as in {"small": 0.5, "large": 0.5}.')
    out = []
    for kind, share in mix.items():
        if kind not in SIZES:
            raise unknown("size", kind, SIZES)
        number = max(1, round(count * share / total)) if share else 0
        distinct = min(number, 4 if kind == "large" else 32)
        bodies = []
        for i in range(distinct):
            source = sources[i * len(sources) // distinct] if sources else None
            raw = kind == "medium" and source is not None
            bodies.append(source if raw and source is not None else photo(kind, source=source, seed=seed + i))
        out += [Request(body=bodies[i % distinct], kind=kind) for i in range(number)]
    return out


def parse_mix(text: str) -> dict[str, float]:
    """small=0.5,large=0.5 -> {"small": 0.5, "large": 0.5}; a name alone is the whole."""
    out: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            out[name.strip()] = float(share) if share else 1.0
        except ValueError:
            raise AdviceError(f"{part!r} is no share; write a mix as small=0.2,medium=0.7,large=0.1.") from None
        if name.strip() not in SIZES:
            raise unknown("size", name.strip(), SIZES)
    return out


def given(bodies: Iterable[bytes], kind: str = "image") -> list[Request]:
    """Image files as requests of one kind."""
    return [Request(body=b, kind=kind) for b in bodies]
