"""One sample edited: its object larger or smaller, turned, elsewhere, on another or a busier ground.

ImageNet-E: Benchmarking Neural Network Robustness via Attribute Editing, CVPR 2023, arXiv 2303.17096. Reference code:
alibaba/easyrobust, benchmarks/imagenet-e (Apache-2.0), which recomposes by a diffusion model; see `diffusion` for that
way. Here the object is cut out, the hole filled, and the object put back by blending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rng import generator, numpy_generator
from lynceus.core.types import Sample
from lynceus.trust.edits.compose import Blend, compose, soft_edge, touches
from lynceus.trust.edits.diffusion import PER_SHARE, Denoiser, recompose
from lynceus.trust.edits.geometry import (
    Cutout,
    box_and_rate,
    centroid,
    cut,
    inside,
    object_box,
    placed,
    resized,
    scene_box,
    shifted,
    turned,
)
from lynceus.trust.edits.remove import METHODS, Ground, Method, grown, margin, remove
from lynceus.trust.edits.spectrum import change, visible_complexity

Halo = Literal["auto", "keep", "remove"]
SOFT = 0.2  # share of the object in the ring outside its mask from which the ring counts as part of it
NEAR = 0.015  # a size that differs by no more counts as reached
LARGE = 0.6  # of several masks, those with a larger share of the pixels are taken for scenery


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A sample taken apart: 8-bit pixels, the main object's mask, and (made when asked for) the ground behind it.

    `edit` and `audit` make it with `Scene.of(sample)`; keeping one makes several edits of a sample cheaper.
    """

    sample: Sample
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    which: int
    method: Method = "moved"
    halo: Halo = "auto"
    seed: int = 0

    @classmethod
    def of(
        cls,
        sample: Sample,
        *,
        which: int | None = None,
        method: Method = "moved",
        halo: Halo = "auto",
        seed: int = 0,
        name: str = "",
    ) -> Scene:
        """which: index of the mask to edit; None takes the one with the largest box that is no scenery."""
        name = name or sample.id or sample.path or "the sample"
        if halo not in ("auto", "keep", "remove"):
            raise unknown("halo", str(halo), ("auto", "keep", "remove"))
        if method not in METHODS:
            raise unknown("way to fill a hole", str(method), METHODS)
        image = pixels(sample.image, name)
        at, mask = main_mask(sample, name, which=which)
        return cls(sample=sample, image=image, mask=mask, which=at, method=method, halo=halo, seed=seed)

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    @cached_property
    def cutout(self) -> Cutout:
        return cut(self.image, self.mask)

    @cached_property
    def ground(self) -> Ground:
        """The picture without the object. `hole`: the mask, and the rim around it where the object shows there."""
        hole = grown(self.mask, margin(self.size))
        made = remove(self.image, hole, method=self.method, rng=numpy_generator(self.seed, "hole", self.sample.id))
        soft = soft_edge(self.image, made.image, self.mask) if self.halo == "auto" else float(self.halo == "remove")
        if soft >= SOFT:
            return made
        # the mask is exact: what is outside it is scenery and stays as it is
        image = np.where(self.mask[..., None], made.image, self.image)
        return Ground(image, self.mask, made.moved)


def pixels(image: Tensor, name: str = "the sample") -> UInt8[np.ndarray, "h w 3"]:
    """A picture (3 or 1, h, w), uint8 or float in [0, 1], as an 8-bit array (h, w, 3)."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise AdviceError(f"{name} is no picture (3, h, w) but {tuple(image.shape)}.")
    x = image.detach().cpu()
    if x.dtype != torch.uint8:
        if not x.dtype.is_floating_point:
            raise AdviceError(f"{name} has pixels of type {x.dtype}; give uint8 in 0..255 or float in [0, 1].")
        low, high = (float(v) for v in x.aminmax())
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise AdviceError(f"{name} has pixels from {low:.3g} to {high:.3g}; give uint8, or float in [0, 1].")
        x = (x.float() * 255).round().clamp(0, 255).to(torch.uint8)
    out: np.ndarray = x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return out


def main_mask(sample: Sample, name: str = "", *, which: int | None = None) -> tuple[int, np.ndarray]:
    """Index and pixels (within its box) of the mask to edit. Class maps (`segments`, 0 is ground) serve as masks too.

    Raises AdviceError, naming the sample, when it has no mask or an empty one.
    """
    name = name or sample.id or sample.path or "the sample"
    size = tuple(sample.image.shape[-2:])
    masks = object_masks(sample)
    if masks is None or len(masks) == 0:
        raise AdviceError(
            f"{name} has no mask, and edits need to know the object. Open data with masks (COCO, folders images/ and "
            'masks/), set Sample(masks=(k, h, w) bool), or guess them: Edits(masks="grabcut"), --masks grabcut.'
        )
    if tuple(masks.shape[-2:]) != size:
        raise AdviceError(f"{name} is {size} and its masks are {tuple(masks.shape[-2:])}; bring them to one size.")
    if which is not None and not 0 <= which < len(masks):
        raise AdviceError(f"{name} has {len(masks)} masks; there is no mask {which}.")
    chosen = [which] if which is not None else range(len(masks))
    found = []
    for k in chosen:
        mask = masks[k].detach().cpu().numpy()
        box, rate = box_and_rate(mask)
        if box is None:
            raise AdviceError(
                f"{name} has a mask without a single pixel (mask {k} of {len(masks)}); an edit needs an object. "
                "Leave the sample out, or mend its mask."
            )
        found.append((rate <= LARGE, box[2] * box[3], k, mask, box))
    best = max(found, key=lambda f: (f[0], f[1]))
    if best[3].all():
        raise AdviceError(f"The mask of {name} covers the whole picture; there is no ground to edit the object on.")
    return best[2], inside(best[3], best[4])


def object_masks(sample: Sample) -> Bool[Tensor, "k h w"] | None:
    """The sample's masks, or one per class of its class map; None without either.

    255 is no class of a map, except where nothing but 0 and 255 is: that is a black and white mask."""
    if sample.masks is not None:
        return sample.masks.bool()
    if sample.segments is None:
        return None
    every = [int(v) for v in sample.segments.unique()]
    values = [v for v in every if v not in (0, 255)] or [v for v in every if v == 255]
    if not values:
        return torch.zeros((1, *sample.segments.shape), dtype=torch.bool)
    return torch.stack([sample.segments == v for v in values])


Background = Literal["plain", "blurred", "random"] | Tensor | Sample


def edit(
    sample: Sample | Scene,
    *,
    size: float | Literal["full"] | None = None,
    angle: float | None = None,
    position: tuple[int, int] | Literal["random"] | None = None,
    background: Background | None = None,
    complexity: float | None = None,
    donors: Sequence[Sample | Scene] = (),
    about: Literal["centroid", "image"] = "centroid",
    blend: Blend = "feather",
    method: Method = "moved",
    halo: Halo = "auto",
    which: int | None = None,
    diffusion: Denoiser | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Sample:
    """The sample with one or more attributes of its object or ground changed; with none, taken apart and recomposed.

    size: share of all pixels that the object covers, or "full": the largest that fits. Its place stays, unless it would
      leave the picture; an object cut by the border stays at that border.
    angle: degrees, counter-clockwise, about the mask's centroid (`about`: or the image's centre); what leaves is lost.
    position: (row, column) of the upper left corner of the object's box, or "random": anywhere inside.
    background: "plain" (the ground's mean colour), "blurred", "random" (the ground of one of `donors`), a picture
      (3, h, w), or a Sample, whose own object is removed first. complexity: share by which the ground's complexity
      rises (> 0) or falls (-1 < share < 0) where the object does not hide it; a random donor lends its amplitudes.
    blend: "feather", "poisson" or "paste". method: how the hole is filled: "moved", "telea" or "ring". halo: whether
      the pixels just outside the mask belong to the object: "auto" looks, "keep" leaves them bit-equal.
    diffusion: an object that noises and denoises: the ground is then made anew, from its noised self at step `steps`,
      and the object pasted; `complexity` guides it. See `lynceus.trust.edits.diffusion`.
    Returns a Sample: image (as the input's type), masks (1, h, w), box, label, and extra["edit"]: what was reached
      ("rate", "angle", "position", "visible", "complexity", "blend", "notes"). Depth, flow and other objects' masks
      do not hold any more and are left out.
    """
    scene = sample if isinstance(sample, Scene) else Scene.of(sample, which=which, method=method, halo=halo, seed=seed)
    rng = numpy_generator(seed, "edit", scene.sample.id)
    log: dict[str, Any] = {"notes": []}
    piece = scene.cutout
    if size is not None:
        piece = _sized(scene, piece, size, log)
    if angle is not None and angle % 360:
        h, w = scene.size
        centre = centroid(piece) if about == "centroid" else ((h - 1) / 2, (w - 1) / 2)
        piece = turned(piece, angle, centre)
        log["angle"] = float(angle)
    if position is not None:
        piece = _moved_to(scene, piece, position, rng)
    ground = _background(scene, background, donors, rng)
    layer, mask = placed(piece, scene.size, ground)
    if not mask.any():
        raise AdviceError(f"After this edit nothing of the object of {_name(scene)} is inside the picture.")
    if complexity is not None and not complexity > -1:
        raise AdviceError(f"complexity is a share, greater than -1 (0.5: half as much again); got {complexity}.")
    if diffusion is not None:
        image = _diffused(scene, ground, layer, mask, diffusion, steps, complexity or 0.0, seed)
        log["blend"] = "diffusion"
        log["complexity"] = visible_complexity(image, mask) / max(visible_complexity(ground, mask), 1e-12) - 1
        return _result(scene, image, mask, piece, log)
    if complexity is not None:
        donor = _donor_ground(scene, donors, rng) if donors and complexity > 0 else None
        made = change(ground, complexity, hidden=mask, donor=donor)
        ground, log["complexity"] = made.image, made.ratio - 1
        if abs(made.ratio - made.wanted) > 0.02 * made.wanted:
            log["notes"].append(f"complexity changed by {made.ratio - 1:+.2f} instead of {complexity:+.2f}")
    image, log["blend"] = compose(ground, layer, mask, blend=blend)
    return _result(scene, image, mask, piece, log)


def _diffused(
    scene: Scene,
    ground: np.ndarray,
    layer: np.ndarray,
    mask: np.ndarray,
    model: Denoiser,
    steps: int,
    share: float,
    seed: int,
) -> UInt8[np.ndarray, "h w 3"]:
    back, front = (torch.from_numpy(x.astype(np.float32) / 255).permute(2, 0, 1)[None] for x in (ground, layer))
    made = recompose(
        model,
        back,
        front,
        torch.from_numpy(mask[None, None].copy()),
        start=steps,
        guidance=PER_SHARE * share,
        generator=generator(seed, "diffusion", scene.sample.id),
    )
    out: np.ndarray = (made[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return out


def _name(scene: Scene) -> str:
    return scene.sample.id or scene.sample.path or "the sample"


def _sized(scene: Scene, piece: Cutout, size: float | str, log: dict[str, Any]) -> Cutout:
    h, w = scene.size
    x, y, bw, bh = scene_box(piece)
    most = min(h / bh, w / bw)
    rate = float(piece.solid.sum() / (h * w))
    if isinstance(size, str):
        if size != "full":
            raise AdviceError(f'size is a share of the pixels, such as 0.1, or "full"; got {size!r}.')
        factor, wanted = most, None
    else:
        if not 0 < size < 1:
            raise AdviceError(f"size is the share of the picture's pixels that the object covers, 0 to 1; got {size}.")
        factor, wanted = math.sqrt(size / rate), float(size)
    anchor = (_anchor(y, bh, h), _anchor(x, bw, w))
    best: tuple[float, Cutout] | None = None
    for _ in range(6):
        capped = min(factor, most)
        made = _fitted(resized(piece, capped, anchor), (h, w), push=capped > 1)
        if wanted is None:
            best = (0.0, made)
            break
        have = float(made.solid.sum() / (h * w))
        if best is None or abs(have - wanted) < best[0]:
            best = (abs(have - wanted), made)
        if have == 0:
            factor *= 1.5
        elif abs(have - wanted) <= 0.01 * wanted or (factor > most and have < wanted):
            break
        else:
            factor = capped * math.sqrt(wanted / have)
    assert best is not None
    if not best[1].solid.any():
        raise AdviceError(f"At the size {size} nothing is left of the object of {_name(scene)}; ask for a larger one.")
    if best[0] > NEAR:
        log["notes"].append(
            f"size {best[1].solid.sum() / (h * w):.3f} instead of {wanted}: the box is as large as fits"
        )
    return best[1]


def _anchor(start: int, length: int, whole: int) -> float:
    """The coordinate that stays when the object is resized: a border that it touches, else its box's middle."""
    first, last = start <= 0, start + length >= whole
    if first == last:
        return start + length / 2
    return 0.0 if first else float(whole)


def _fitted(piece: Cutout, size: tuple[int, int], *, push: bool) -> Cutout:
    """Pushed back inside the picture along the axes where its box has room."""
    if not push or not piece.solid.any():
        return piece
    x, y, w, h = scene_box(piece)
    return shifted(piece, _into(y, h, size[0]) - y, _into(x, w, size[1]) - x)


def _into(start: int, length: int, whole: int) -> int:
    return min(max(start, 0), whole - length) if length <= whole else (whole - length) // 2


def _moved_to(scene: Scene, piece: Cutout, position: tuple[int, int] | str, rng: np.random.Generator) -> Cutout:
    h, w = scene.size
    x, y, bw, bh = scene_box(piece)
    room = (max(h - bh, 0), max(w - bw, 0))
    if isinstance(position, str):
        if position != "random":
            raise AdviceError(f'position is (row, column) or "random"; got {position!r}.')
        row, column = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
    else:
        row, column = int(position[0]), int(position[1])
        if not (0 <= row <= room[0] and 0 <= column <= room[1]):
            raise AdviceError(
                f"The object's box ({bh} x {bw}) of {_name(scene)} would leave its picture ({h} x {w}) at {position}; "
                f"its upper left corner can be at (0, 0) to {room}."
            )
    return shifted(piece, row - y, column - x)


def _background(
    scene: Scene, background: Background | None, donors: Sequence[Sample | Scene], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(background, Tensor):
        return fitted(pixels(background, "the background"), scene.size)
    if isinstance(background, Sample):
        return fitted(Scene.of(background, method=scene.method, halo=scene.halo).ground.image, scene.size)
    if background is None:
        return scene.ground.image
    if background == "plain":
        colour = scene.image[~scene.mask].mean(0).round().astype(np.uint8)
        return np.broadcast_to(colour, scene.image.shape).copy()
    if background == "blurred":
        from scipy.ndimage import gaussian_filter

        sigma = 0.05 * min(scene.size)
        return gaussian_filter(scene.ground.image, (sigma, sigma, 0), mode="nearest", truncate=3.0)
    if background == "random":
        if not donors:
            raise AdviceError('background="random" takes the ground of another sample: give donors=[sample, ...].')
        return _donor_ground(scene, donors, rng)
    raise unknown("background", str(background), ("plain", "blurred", "random"))


def _donor_ground(
    scene: Scene, donors: Sequence[Sample | Scene], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """The ground of one of the donors, drawn among those that are other samples than this one."""
    others = [d for d in donors if (d.sample if isinstance(d, Scene) else d) is not scene.sample] or list(donors)
    return donor_image(others[int(rng.integers(len(others)))], scene)


def donor_image(donor: Sample | Scene, scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    """A donor's ground at the scene's size; a donor without masks is all ground."""
    if isinstance(donor, Sample):
        if donor.masks is None and donor.segments is None:
            return fitted(pixels(donor.image, donor.id or "the donor"), scene.size)
        donor = Scene.of(donor, method=scene.method, halo=scene.halo)
    return fitted(donor.ground.image, scene.size)


def fitted(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Resized to cover `size`, the middle cut out."""
    h, w = image.shape[:2]
    if (h, w) == tuple(size):
        return image
    scale = max(size[0] / h, size[1] / w)
    whole = (max(size[0], round(h * scale)), max(size[1], round(w * scale)))
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    made = F.interpolate(x, whole, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    cut_out = made[:, top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8)
    out: np.ndarray = cut_out.permute(1, 2, 0).contiguous().numpy()
    return out


def _result(scene: Scene, image: np.ndarray, mask: np.ndarray, piece: Cutout, log: dict[str, Any]) -> Sample:
    sample = scene.sample
    picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
    if sample.image.dtype != torch.uint8:
        picture = (picture.to(torch.float32) / 255).to(sample.image.dtype)
    if sample.image.shape[0] == 1:
        picture = picture[:1]
    box = object_box(mask)
    assert box is not None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    log["rate"] = float(mask.mean())
    log["position"] = (int(rows[0]), int(columns[0]))
    log["visible"] = float(mask.sum() / max(piece.solid.sum(), 1))
    if touches(scene.mask):
        log["notes"].append("the object is cut by the picture's border")
    classes = sample.classes[scene.which : scene.which + 1] if sample.classes is not None else None
    return Sample(
        image=picture,
        label=sample.label,
        boxes=torch.tensor([corners], dtype=torch.float32),
        classes=classes,
        masks=torch.from_numpy(mask[None].copy()),
        text=sample.text,
        id=sample.id,
        path=sample.path,
        extra={"edit": log},
    )
