"""Robust inference by crop selection (RICS): the image chooses its own crop, so a small shift changes nothing.

Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image Transformations, ECCV 2024,
arXiv 2404.07153. The authors' repository (ofirshifman/RICS) holds no code; written from the paper's idea.

Every crop of a view gets a score that depends on its own pixels only (one fixed zero-mean filter at its centre), and
the crop with the largest score is fed. After a shift the same physical crop is usually chosen again, and then the
network sees the same bits. Pixels and filter are rounded to small integers, so that scores are exact in any order of
summation, in float32 as in float64: equal pixels have equal scores, on every machine and in every batch.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.rng import generator
from lynceus.core.subject import Normalise, Subject
from lynceus.core.types import as_float

Score = Literal["noise", "log", "laplacian_noise"] | Callable[[Tensor], Tensor]
_GREY = (299.0, 587.0, 114.0)
_LEVELS = 1020  # grey levels: 4 x 8 bit; below 2^11, so that TF32 keeps them whole too
_EXACT = 2**24  # whole numbers up to here are exact in float32


# ---- how often the same crop is chosen, for scores whose argmax is uniform over the candidates ---------------------
def probability_axis(candidates: int, shift: int) -> float:
    """P(same crop) after a shift of `shift` pixels along one axis, with `candidates` x `candidates` corners."""
    return max(0.0, (candidates - shift) / (candidates + shift))


def probability_shift(candidates: int, shift: tuple[int, int]) -> float:
    """P(same crop) after the shift (a, b)."""
    both = max(0, candidates - abs(shift[0])) * max(0, candidates - abs(shift[1]))
    return both / (2 * candidates**2 - both)


def probability_all(candidates: int, shift: int) -> float:
    """P(the same crop for every shift of up to `shift` pixels in both axes at once): adversarial robustness."""
    return (max(0, candidates - 2 * shift) / (candidates + 2 * shift)) ** 2


def candidates_needed(level: float, shift: int = 1) -> int:
    """The smallest number of candidates per axis with `probability_axis` >= level; view = input_size + it - 1."""
    if not 0 <= level < 1:
        raise AdviceError(f"level is a probability below 1, not {level}; certainty needs the cyclic variant.")
    return max(1, math.ceil(shift * (1 + level) / (1 - level) - 1e-9))


# ---- scores --------------------------------------------------------------------------------------------------------
_KERNELS = {"noise": 5, "log": 9, "laplacian_noise": 11}


def score_filter(score: str, kernel: int | None = None, seed: int = 0) -> Float[Tensor, "k k"]:
    """The filter of a named score: whole numbers with sum 0, small enough that its scores are exact in float32.

    "noise": Gaussian noise; "log": Laplacian of Gaussian; "laplacian_noise": noise after a Laplacian (two wider).
    kernel: odd side (default 5, 9, 11).
    """
    if score not in _KERNELS:
        from lynceus.core.errors import unknown

        raise unknown("score", score, _KERNELS, how="Or give a function of the grey window, and kernel=.")
    side = kernel or _KERNELS[score]
    if side < 3 or side % 2 == 0:
        raise AdviceError(f"kernel is an odd number from 3, not {side}.")
    if score == "log":
        y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) - side // 2] * 2, indexing="ij")
        r = (x * x + y * y) / (2 * (side / 6.5) ** 2)
        weight = (1 - r) * torch.exp(-r)
    else:
        weight = torch.randn(side, side, generator=generator(seed, "crop_selection", side), dtype=torch.float64)
        if score == "laplacian_noise":
            laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
            weight = F.conv2d(weight[None, None], laplacian[None, None], padding=2)[0, 0]
    weight = weight - weight.mean()
    scale = min(0.95 * _EXACT / _LEVELS / float(weight.abs().sum()), 1000 / float(weight.abs().max()))
    whole = (weight * scale).round()
    surplus = int(whole.sum())  # rounding left a remainder: take it from the largest weights, one each
    order = whole.abs().flatten().argsort(descending=True)[: abs(surplus)]
    whole.view(-1)[order] -= math.copysign(1.0, surplus)
    return whole


@dataclass(frozen=True, kw_only=True)
class CropSelection:
    """Rewrite: the model reads the crop that the image itself chooses, instead of the centre crop.

    input_size: side m (or (h, w)) of the crop that the model is fed; never resized afterwards.
    view: side n of the part of the image that crops are taken from, cut from its centre; None takes the whole image.
    cyclic: candidates are all corners of the torus; a roll of the image then changes nothing at all.
    score: "noise", "log", "laplacian_noise", or a function grey window (b, 1, h, w) of whole numbers 0..1020, float64
      -> scores (b, h-k+1, w-k+1) that are equivariant; `kernel` is its k.
    kernel: side k of the filter. seed: of the noise. top: average the outputs of this many best local maxima.
    smooth: a score whose maximum walks with the border of the candidates is refused, or only warned about.
    """

    input_size: int | tuple[int, int]
    view: int | tuple[int, int] | None = None
    cyclic: bool = False
    score: Score = "noise"
    kernel: int | None = None
    seed: int = 0
    top: int = 1
    smooth: Literal["refuse", "warn"] = "refuse"

    def __post_init__(self) -> None:
        if not callable(self.score):
            score_filter(self.score, self.kernel, self.seed)
        if self.top < 1:
            raise AdviceError(f"top is at least 1, not {self.top}.")
        if self.view is not None and (_pair(self.view)[0] < self.crop[0] or _pair(self.view)[1] < self.crop[1]):
            raise AdviceError(
                f"view {self.view} is smaller than input_size {self.input_size}; crops must fit into the view."
            )
        if callable(self.score) and self.kernel is None:
            raise AdviceError("A score function needs kernel=, the side of the window that one score reads.")
        if self.side > min(self.crop):
            raise AdviceError(
                f"kernel {self.side} is larger than the crop {self.crop}; a score may only read its own crop."
            )

    @property
    def crop(self) -> tuple[int, int]:
        return _pair(self.input_size)

    @property
    def side(self) -> int:
        """Side of the window that one score reads."""
        if callable(self.score):
            return int(self.kernel or 0)
        return (self.kernel or _KERNELS.get(self.score, 0)) + (2 if self.score == "laplacian_noise" else 0)

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> CropSelected:
        """A module around a copy of `model`, in eval mode. example: pixels (b, 3, h, w), run once to see it fit."""
        if not self.cyclic and (self.view is None or _pair(self.view) != self.crop):
            self._refuse_smooth()
        chosen = CropSelected(model, self)
        if example is not None:
            with torch.no_grad():
                chosen(example)
        return chosen

    def _refuse_smooth(self) -> None:
        rate, bound = natural_rate(self)
        if rate >= 0.75 * bound:
            return
        text = (
            f"This score is too smooth: on images with natural (1/f) spectra the same crop is kept in {rate:.0%} of "
            f"one-pixel shifts, where {bound:.0%} is possible. Use a zero-mean high-pass score such as 'noise'"
        )
        if self.smooth == "refuse":
            raise AdviceError(f"{text}, or smooth='warn' to go on.")
        warnings.warn(f"{text}.", stacklevel=3)


class CropSelected(nn.Module):
    """What `CropSelection` makes: pixels (b, 3, h, w) in [0, 1], at least the view -> the model's output."""

    owns_pixels = True
    filter: Tensor | None

    def __init__(self, model: nn.Module | Callable[[Tensor], Tensor], config: CropSelection):
        super().__init__()
        subject = model if isinstance(model, Subject) else None
        inner = subject.model if subject is not None else model
        if isinstance(inner, nn.Module):
            inner = copy.deepcopy(inner).eval()
        view = Subject(inner) if subject is None else subject
        if view.size is not None and tuple(view.size) != config.crop:
            raise AdviceError(
                f"The subject resizes to {view.size}; crop selection feeds {config.crop} and never resizes after."
            )
        self.config = config
        self.model: Any = inner
        self.normalise: Normalise | None = copy.deepcopy(view.normalise)
        self.classes = view.classes
        self.name = f"{view.name}, {'cyclic ' if config.cyclic else ''}crop selection"
        weight = None if callable(config.score) else score_filter(config.score, config.kernel, config.seed)
        self.register_buffer("filter", weight)
        self.eval()

    @property
    def rewrite(self) -> CropSelection:
        """What made this module; with `original` it is all that a file needs to hold."""
        return self.config

    @property
    def original(self) -> Any:
        return self.model

    # -- selection ------------------------------------------------------------------------------------------------
    def view(self, image: Tensor) -> Tensor:
        """The centre of the image that crops are taken from."""
        height, width = _pair(self.config.view) if self.config.view is not None else (image.shape[-2], image.shape[-1])
        if not torch.compiler.is_compiling():
            need = (height, width) if self.config.view is not None else self.config.crop
            if image.ndim != 4 or image.shape[-2] < need[0] or image.shape[-1] < need[1]:
                raise AdviceError(
                    f"Crop selection takes images (b, 3, h, w) of at least {need}, not {tuple(image.shape)}."
                )
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        if torch.compiler.is_exporting():  # a slice would pin the free height and width to the example's
            rows = top + torch.arange(height, device=image.device)
            return image.index_select(-2, rows).index_select(-1, left + torch.arange(width, device=image.device))
        return image[..., top : top + height, left : left + width]

    def scores(self, view: Float[Tensor, "b c h w"]) -> Float[Tensor, "b u v"]:
        """The score of every candidate corner (u, v): whole numbers when the score is a named one."""
        (m, n), k = self.config.crop, self.config.side
        a, b = (m - k) // 2, (n - k) // 2
        if self.config.cyclic:
            grey = whole_grey(view)
            grey = torch.cat([grey, grey[..., : k - 1, :]], -2)
            grey = torch.cat([grey, grey[..., : k - 1]], -1)
            return torch.roll(self._filtered(grey), (-a, -b), (-2, -1))
        rows, columns = view.shape[-2] - m + k, view.shape[-1] - n + k
        return self._filtered(whole_grey(view[..., a : a + rows, b : b + columns]))

    def _filtered(self, grey: Tensor) -> Tensor:
        if self.filter is None:
            assert callable(self.config.score)
            return self.config.score(grey)
        weight = self.filter
        if torch.compiler.is_exporting() or (grey.device.type == "cpu" and not _reduced_precision()):
            grey, weight = (
                grey.float(),
                weight.float(),
            )  # whole numbers: as exact as double, faster, and ONNX runtimes have it
        return F.conv2d(grey, weight[None, None].to(grey.dtype))[:, 0]

    def select(self, image: Float[Tensor, "b c h w"]) -> Int[Tensor, "b 2"]:
        """The chosen corner (u, v) inside the view, for every image at once."""
        view = self.view(image)
        corners = self._corners(view, self.scores(view), 1)[0]
        return corners[:, 0]

    def _corners(self, view: Tensor, scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Corners (b, top, 2), best first, and whether each is a real one (an image may have fewer local maxima)."""
        rows, columns = scores.shape[-2], scores.shape[-1]
        flat = scores.flatten(1)
        if top == 1:
            best, index = flat.max(1).values[:, None], flat.argmax(1)[:, None]
        else:
            grown = F.max_pool2d(scores[:, None], 3, 1, 1)[:, 0].flatten(1)
            low = torch.full_like(flat, -math.inf)
            best, index = torch.where(flat == grown, flat, low).topk(min(top, rows * columns), 1)
        real = best > -math.inf
        centre = ((rows - 1) // 2) * columns + (columns - 1) // 2
        # a flat image gives no reason to prefer a crop: take the centre
        index = torch.where(self._flat(flat)[:, None], torch.full_like(index, centre), index)
        if self.config.cyclic and top == 1 and not torch.compiler.is_compiling():
            index = _ties_by_bytes(view, flat, index, self.config.crop)
        return torch.stack([torch.div(index, columns, rounding_mode="floor"), index % columns], -1), real

    def _flat(self, flat: Tensor) -> Tensor:
        return flat.amax(1) == flat.amin(1)

    def flat(self, image: Float[Tensor, "b c h w"]) -> Bool[Tensor, " b"]:
        """Images whose candidates all have the same score: they get the centre crop."""
        return self._flat(self.scores(self.view(image)).flatten(1))

    def crops(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c m n"]:
        """What the model is fed, before normalisation."""
        view = self.view(image)
        return _cut(view, self._corners(view, self.scores(view), 1)[0][:, 0], self.config.crop)

    # -- the model ---------------------------------------------------------------------------------------------------
    def _run(self, crops: Tensor) -> Tensor:
        return self.model(crops if self.normalise is None else self.normalise(crops))

    def forward(self, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Any:
        image = as_float(image)
        view = self.view(image)
        top = self.config.top
        corners, real = self._corners(view, self.scores(view), top)
        if top == 1:
            return self._run(_cut(view, corners[:, 0], self.config.crop))
        batch, count = corners.shape[:2]
        crops = _cut(view.repeat_interleave(count, 0), corners.flatten(0, 1), self.config.crop)
        out = self._run(crops)
        weight = (real / real.sum(1, keepdim=True)).to(out.dtype)
        return (out.unflatten(0, (batch, count)) * weight[..., None]).sum(1)

    def embed(self, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The pooled vector of the chosen crop, when the model has features."""
        crops = self.crops(as_float(image))
        return Subject(self.model).embed(crops)


def crop_selection(
    model: nn.Module,
    *,
    input_size: int | tuple[int, int],
    view: int | tuple[int, int] | None = None,
    cyclic: bool = False,
    score: Score = "noise",
    kernel: int | None = None,
    seed: int = 0,
    top: int = 1,
) -> CropSelected:
    """`model` reading the crop of `input_size` that each image chooses inside its central `view`. See CropSelection."""
    config = CropSelection(
        input_size=input_size, view=view, cyclic=cyclic, score=score, kernel=kernel, seed=seed, top=top
    )
    return config(model)


# ---- certificates --------------------------------------------------------------------------------------------------
def certified(
    model: CropSelected, stored: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"], shift: int
) -> Bool[Tensor, " b"]:
    """True for images whose answer no realistic shift of up to `shift` pixels in both axes can change. Exact.

    stored: images with known surroundings, at least the view plus `shift` on every side; the view is their centre.
    Certified if and only if the best crop of all shifted views together lies inside every one of them.
    """
    config = model.config
    if config.cyclic or config.top != 1 or config.view is None:
        raise AdviceError("The certificate is for realistic shifts of a CropSelection with view=, top=1, cyclic=False.")
    (height, width), d = _pair(config.view), shift
    if stored.shape[-2] < height + 2 * d or stored.shape[-1] < width + 2 * d:
        raise AdviceError(f"Shifts of {d} px around a view of {(height, width)} need stored images {2 * d} px larger.")
    top, left = (stored.shape[-2] - height) // 2 - d, (stored.shape[-1] - width) // 2 - d
    union = stored[..., top : top + height + 2 * d, left : left + width + 2 * d]
    scores = model.scores(as_float(union))
    rows, columns = scores.shape[-2], scores.shape[-1]  # (K + 2d) each
    if rows <= 4 * d or columns <= 4 * d:
        return torch.zeros(len(stored), dtype=torch.bool)
    inside = scores[:, 2 * d : rows - 2 * d, 2 * d : columns - 2 * d]
    outside = scores.clone()
    outside[:, 2 * d : rows - 2 * d, 2 * d : columns - 2 * d] = -math.inf
    # strictly: a tie with a crop outside would be decided by its place, and that changes with the shift
    return inside.amax((1, 2)) > outside.amax((1, 2))


def margins(model: CropSelected, image: Float[Tensor, "b c h w"]) -> Int[Tensor, " b"]:
    """Distance of the chosen corner from the border of the candidates: no shift up to it can push the crop out of view
    (an entering crop may still win; `certified` knows, given the surroundings)."""
    view = model.view(as_float(image))
    rows, columns = view.shape[-2] - model.config.crop[0], view.shape[-1] - model.config.crop[1]
    u, v = model.select(image).unbind(-1)
    return torch.stack([u, rows - u, v, columns - v]).amin(0)


def certificate(
    model: CropSelected,
    stored: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"],
    *,
    shifts: tuple[int, ...] = (1, 2),
) -> Report:
    """Share of images certified for each shift, beside the bound for uniform scores. One row per shift."""
    report = Report(name="crop selection certificate")
    view = _pair(model.config.view or 0)
    count = min(view[0] - model.config.crop[0], view[1] - model.config.crop[1]) + 1
    for shift in shifts:
        sure = certified(model, stored, shift)
        report.rows.append(
            {
                "shift": shift,
                "images": len(stored),
                "certified": float(sure.float().mean()),
                "uniform score": probability_all(count, shift),
            }
        )
        report.arrays[f"certified_{shift}"] = sure.numpy()
    flat = int(model.flat(as_float(stored)).sum())
    if flat:
        report.notes.append(
            f"{flat} of {len(stored)} images are flat: all crops score the same, the centre crop is taken."
        )
    report.summary = {f"certified_{r['shift']}px": r["certified"] for r in report.rows}
    return report


# ---- measured, not assumed -----------------------------------------------------------------------------------------
def same_crop(
    model: CropSelected, stored: Float[Tensor, "b c h w"], shifts: list[tuple[int, int]]
) -> Bool[Tensor, "b s"]:
    """Whether the same physical crop is chosen after each realistic shift of the central view; no network is run."""
    config = model.config
    height, width = _pair(config.view) if config.view is not None else (stored.shape[-2] - 2, stored.shape[-1] - 2)
    top, left = (stored.shape[-2] - height) // 2, (stored.shape[-1] - width) // 2

    def corner(a: int, b: int) -> Tensor:
        view = stored[..., top + a : top + a + height, left + b : left + b + width]
        return model.select(view) + torch.tensor([a, b], device=view.device)

    still = corner(0, 0)
    return torch.stack([(corner(a, b) == still).all(-1) for a, b in shifts], 1)


@lru_cache(maxsize=64)
def natural_rate(config: CropSelection) -> tuple[float, float]:
    """(measured same-crop rate, bound) for one-pixel shifts along an axis, on 48 synthetic images of 1/f spectrum."""
    m, side = 24, config.side
    m = max(m, side)
    height, width = _pair(config.view) if config.view is not None else (config.crop[0] + 16, config.crop[1] + 16)
    count = max(2, min(height - config.crop[0], width - config.crop[1], 32) + 1)
    size = m + count + 1
    frequency = torch.fft.fftfreq(2 * size, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    radius[0, 0] = math.inf
    noise = torch.randn(2, 48, 2 * size, 2 * size, generator=generator(0, "pink"), dtype=torch.float64)
    pink, contrast = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real[..., :size, :size]
    # texture is uneven in real images, at all scales: a smooth score of its strength walks just as a smooth mean does
    pink, contrast = (x / x.std((1, 2), keepdim=True) for x in (pink - pink.mean((1, 2), keepdim=True), contrast))
    coarse = F.avg_pool2d(pink[:, None], 5, 1, 2)[:, 0]
    pink = (0.5 + 0.15 * (coarse + (pink - coarse) * contrast.exp())).clamp(0, 1)
    probe = CropSelection(input_size=m, view=size - 2, score=config.score, kernel=config.kernel, seed=config.seed)
    model = CropSelected(nn.Identity(), probe)
    same = same_crop(model, pink[:, None].expand(-1, 3, -1, -1).float(), [(1, 0), (-1, 0), (0, 1), (0, -1)])
    return float(same.double().mean()), probability_axis(count, 1)


# ---- parts ---------------------------------------------------------------------------------------------------------
def whole_grey(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Grey in whole numbers 0..1020, float64: a fixed function of each pixel, whatever its place."""
    channels = (image.to(torch.float64) * 255).round()
    if image.shape[1] == 1:
        return channels * 4
    weight = torch.tensor(_GREY, dtype=torch.float64, device=image.device).view(1, 3, 1, 1)
    return ((channels * weight).sum(1, keepdim=True) / 250).floor()


def _cut(view: Tensor, corner: Tensor, crop: tuple[int, int]) -> Tensor:
    """view[i, :, u:u+m, v:v+n] for every image at once, wrapping around."""
    width = view.shape[-1]
    rows = (corner[:, :1] + torch.arange(crop[0], device=view.device)) % view.shape[-2]
    columns = (corner[:, 1:] + torch.arange(crop[1], device=view.device)) % width
    place = (rows[:, :, None] * width + columns[:, None]).flatten(1)
    crops = view.flatten(2).gather(2, place[:, None].expand(-1, view.shape[1], -1))
    return crops.unflatten(2, crop)


def _ties_by_bytes(view: Tensor, flat: Tensor, index: Tensor, crop: tuple[int, int]) -> Tensor:
    """Where several corners of the torus share the best score, the crop with the largest bytes: no roll changes it."""
    tied = flat == flat.amax(1, keepdim=True)
    many = (tied.sum(1) > 1).nonzero()[:, 0].tolist()
    if not many:
        return index
    index = index.clone()
    height, width = view.shape[-2:]
    for i in many:
        corners = tied[i].nonzero()[:, 0].cpu().numpy()
        image = np.ascontiguousarray(view[i].detach().cpu().numpy()).view(f"u{view.element_size()}")
        if (image == image[:, :1, :1]).all():
            continue
        columns = np.arange(crop[1])
        for y in range(crop[0]):
            if len(corners) == 1:
                break
            u, v = corners // width, corners % width
            rows = image[:, ((u + y) % height)[:, None], (v[:, None] + columns) % width]
            rows = rows.transpose(1, 0, 2).reshape(len(corners), -1)
            while (differ := (rows != rows[0]).any(0)).any():
                column = rows[:, int(differ.argmax())]
                keep = column == column.max()
                corners, rows = corners[keep], rows[keep]
        index[i, 0] = int(corners[0])
    return index


def _reduced_precision() -> bool:
    return getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", "none") in ("bf16", "tf32")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
