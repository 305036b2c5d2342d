"""Real pictures that come inside the wheels of scikit-learn, scikit-image and matplotlib: they need no network.

Only names known to be inside the wheels are listed, so that nothing asks scikit-image to download.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lynceus.core.errors import missing_extra, unknown
from lynceus.core.types import Sample
from lynceus.data.decode import image_size, read_image, to_image


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """One bundled picture: size is (h, w) in pixels, path its file."""

    name: str
    package: str
    size: tuple[int, int]
    licence: str
    path: str


_SILENT = "not stated by scikit-image (itself BSD-3-Clause)"
# as the packages' own documentation states it
_SKIMAGE = {
    "astronaut": ("astronaut.png", "NASA, public domain"),
    "brick": ("brick.png", "CC0 (CC0Textures)"),
    "camera": ("camera.png", "CC0 (Lav Varshney)"),
    "cell": ("cell.png", "CC0"),
    "chelsea": ("chelsea.png", "CC0 (Stefan van der Walt)"),
    "checkerboard": ("chessboard_GRAY.png", _SILENT),
    "clock": ("clock_motion.png", "public domain (Stefan van der Walt)"),
    "coffee": ("coffee.png", "CC0 (Rachel Michetti)"),
    "coins": ("coins.png", "no known copyright restrictions"),
    "colorwheel": ("color.png", _SILENT),
    "grass": ("grass.png", "CC0 (linolafett)"),
    "gravel": ("gravel.png", "CC0 (CC0Textures)"),
    "horse": ("horse.png", "CC0 (Andreas Preuss)"),
    "hubble": ("hubble_deep_field.jpg", "NASA, public domain"),
    "immunohistochemistry": ("ihc.png", "no known copyright restrictions"),
    "logo": ("logo.png", _SILENT),
    "microaneurysms": ("microaneurysms.png", "CC0 (Andreas Maier)"),
    "moon": ("moon.png", _SILENT),
    "motorcycle_left": ("motorcycle_left.png", "not stated by scikit-image; Middlebury stereo 2014"),
    "motorcycle_right": ("motorcycle_right.png", "not stated by scikit-image; Middlebury stereo 2014"),
    "page": ("page.png", _SILENT),
    "phantom": ("phantom.png", _SILENT),
    "retina": ("retina.jpg", "CC0 (Wikimedia Commons)"),
    "rocket": ("rocket.jpg", "SpaceX, public domain"),
    "text": ("text.png", "no known copyright restrictions, public domain"),
}
_SKLEARN = {
    "china": ("china.jpg", "CC BY 2.0 (danielbuechele)"),
    "flower": ("flower.jpg", "CC BY 2.0 (flickr: vultilion; the README says danielbuechele)"),
}
_MATPLOTLIB = {
    "grace_hopper": ("grace_hopper.jpg", "not stated by matplotlib; a photograph of the US Navy"),
    "present": ("Minduka_Present_Blue_Pack.png", "not stated by matplotlib"),
    "matplotlib_logo": ("logo2.png", "not stated; matplotlib itself is BSD-like"),
}
_PLACES = {
    "skimage": ("scikit-image", "data", _SKIMAGE),
    "sklearn": ("scikit-learn", "datasets/images", _SKLEARN),
    "matplotlib": ("matplotlib", "mpl-data/sample_data", _MATPLOTLIB),
}
ALIASES = {"cat": "chelsea", "hubble_deep_field": "hubble", "stereo_motorcycle": "motorcycle_left"}


def _folder(module: str, inner: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent / inner if spec is not None and spec.origin else None


def samples() -> list[SampleInfo]:
    """The bundled pictures that are on this machine, by name, each with its size and a note on its licence.

    The 25 of scikit-image and 3 of matplotlib come with `pip install "lynceus[samples]"`; 2 of scikit-learn always do.
    """
    out = []
    for module, (package, inner, names) in _PLACES.items():
        folder = _folder(module, inner)
        for name, (file, licence) in names.items():
            path = folder / file if folder is not None else None
            if path is not None and path.is_file():
                out.append(SampleInfo(name, package, image_size(path), licence, str(path)))
    return sorted(out, key=lambda s: s.name)


def sample(name: str) -> Sample:
    """One bundled picture as a Sample, e.g. sample("astronaut"). extra["disparity"] (pixels): of "motorcycle_left"."""
    name = ALIASES.get(name, name)
    for module, (package, inner, names) in _PLACES.items():
        if name in names:
            folder = _folder(module, inner)
            path = folder / names[name][0] if folder is not None else None
            if path is None or not path.is_file():
                raise missing_extra(package, "samples", use=f"The picture {name!r}")
            image = read_image(path)
            extra: dict[str, Any] = {"licence": names[name][1], "package": package}
            disparity = path.parent / "motorcycle_disp.npz"
            if name == "motorcycle_left" and disparity.is_file():
                with np.load(disparity, allow_pickle=False) as stored:
                    extra["disparity"] = torch.from_numpy(stored["arr_0"].astype(np.float32))
            return Sample(image=image, id=name, path=str(path), extra=extra)
    known = [*ALIASES, *(n for _, _, names in _PLACES.values() for n in names)]
    raise unknown("bundled picture", name, known, how="lynceus.data.samples() lists them.")


def faces() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-image's 200 grey patches as RGB uint8 (200, 3, 25, 25), and labels: 1 for 100 faces, 0 for the rest."""
    folder = _folder("skimage", "data")
    path = folder / "lfw_subset.npy" if folder is not None else None
    if path is None or not path.is_file():
        raise missing_extra("scikit-image", "samples", use="The face patches")
    patches = np.load(path, allow_pickle=False)
    return to_image(patches[:, None]), torch.cat(
        [torch.ones(100, dtype=torch.long), torch.zeros(100, dtype=torch.long)]
    )
