"""Does the answer hold when the picture moves by a pixel? Realistic shifts (new scenery enters) beside cyclic ones.

Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image Transformations, ECCV 2024,
arXiv 2404.07153. The authors' repository (ofirshifman/RICS) holds no code; written from the paper.

A stored image is larger than the network's view. A realistic shift (a, b) reads the view a pixels lower and b pixels
further right in the stored image; a cyclic one rolls the view itself. Nothing is resized after the shift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import examine, sensible
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.rewrite.crop_selection import CropSelected, certified

Kind = Literal["realistic", "cyclic", "both"]
Around = Literal["4", "8", "all"]


def shift_set(radius: int = 1, around: Around = "8") -> list[tuple[int, int]]:
    """Shifts (rows, columns) without (0, 0): `radius` pixels in 4 or 8 directions, or "all" up to `radius` pixels."""
    if radius < 1:
        raise AdviceError(f"A shift is at least one pixel, not {radius}.")
    if around not in ("4", "8", "all"):
        raise unknown("set of shifts", str(around), ("4", "8", "all"))
    steps = range(-radius, radius + 1) if around == "all" else (-radius, 0, radius)
    every = [s for s in itertools.product(steps, steps) if s != (0, 0)]
    return [s for s in every if 0 in s] if around == "4" else every


@dataclass(frozen=True, kw_only=True)
class ShiftConsistency:
    """Check: the share of shifts, and of images for all shifts, after which the answer is the same.

    kind: "realistic" (the camera moves), "cyclic" (the picture is rolled), or "both", side by side.
    radius, around: shifts of `radius` pixels in "4" or "8" directions, or "all" up to `radius`.
    view: side n of what the model sees, None: the stored side less twice the radius (or the subject's own size).
    stored: images are first resized to this short side and cut square; None: the model's own size and room to move if
      it has one, else images must be of one size.
    embedding: True reads the outputs as vectors: cosine similarity, and whether the nearest neighbour changes. False
      reads them as classes. features: with classes, also looks at the vectors before the classifier.
    extend: repeats the border pixels this far, for pictures whose surroundings nobody knows: views can then be whole.
    limit: at most this many images. batch_size: images per pass.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    kind: Kind = "both"
    radius: int = 1
    around: Around = "8"
    view: int | None = None
    stored: int | None = None
    embedding: bool = False
    features: bool = False
    extend: int = 0
    limit: int | None = None
    batch_size: int = 64

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per kind of shift. arrays: "realistic" and "cyclic", (images, shifts) bool: same answer or not."""
        sensible(self)
        stored = self.stored
        own = subject.size or getattr(subject.model, "image_size", None)
        if stored is None and own is not None and own[0] == own[1] and getattr(data, "images", None) is None:
            stored = (
                own[0] + 2 * self.radius
            )  # photographs at the size that the model brings them to, with room to move
        images, labels = gather(data, stored=stored, limit=self.limit)
        return shift(
            subject,
            images,
            shift_set(self.radius, self.around),
            kind=self.kind,
            view=self.view,
            labels=labels,
            embedding=self.embedding,
            features=self.features,
            extend=self.extend,
            batch_size=self.batch_size,
            seed=seed,
        )


def shift(
    subject: Subject | nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    shifts: int | Sequence[tuple[int, int]] = 1,
    *,
    kind: Kind = "both",
    view: int | tuple[int, int] | None = None,
    labels: Tensor | None = None,
    embedding: bool = False,
    anchors: Float[Tensor, "k c"] | None = None,
    features: bool = False,
    extend: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> Report:
    """How often the answer, or the feature vector's nearest neighbour, survives each shift.

    subject: any model or function of pixels. images: (b, 3, H, W), uint8 or [0, 1], larger than the view for realistic
      shifts. shifts: (rows, columns) pairs, or r for r pixels in eight directions.
    embedding: the outputs are vectors. anchors: vectors of class texts or prototypes; the nearest one is then the
      answer, else the nearest other image is. labels: (b,) adds accuracy. extend: see ShiftConsistency.
    """
    if kind not in ("realistic", "cyclic", "both"):
        raise unknown("kind of shift", str(kind), ("realistic", "cyclic", "both"))
    subject = subject if isinstance(subject, Subject) else Subject(subject)
    if images.ndim != 4 or len(images) == 0:
        raise AdviceError(f"shift takes a batch of images (b, 3, h, w), not {tuple(images.shape)}.")
    moves = shift_set(shifts) if isinstance(shifts, int) else [(int(a), int(b)) for a, b in shifts]
    if not moves:
        raise AdviceError("shift needs at least one shift, such as [(0, 1)].")
    reach = (max(abs(a) for a, _ in moves), max(abs(b) for _, b in moves))
    report = Report(name="shift consistency", environment=environment(seed))
    if extend:
        images = F.pad(as_float(images), (extend,) * 4, mode="replicate")
        report.notes.append(
            f"Nothing is known beyond the pictures: their border pixels were repeated {extend} px outwards."
        )
    size = _view(subject, images, view, (0, 0) if kind == "cyclic" else reach)
    if subject.size is not None and tuple(subject.size) != size:
        report.notes.append(f"The subject resizes views of {size} to {subject.size} after the shift.")
    if not embedding:
        _try(subject, images, size, reach)
    kinds = ("realistic", "cyclic") if kind == "both" else (kind,)
    base = _answers(subject, images, size, (0, 0), "realistic", batch_size, embedding, features)
    foreign = int((labels >= int(base["classes"])).sum()) if labels is not None and "classes" in base else 0
    if foreign:
        report.notes.append(
            f"No accuracy: {foreign} of {len(images)} labels are none of the {int(base['classes'])} classes that "
            f"{subject.name} gives."
        )
    for name in kinds:
        reference = _Reference(base, anchors)
        rows = [
            reference.compare(_answers(subject, images, size, m, name, batch_size, embedding, features)) for m in moves
        ]
        row: dict[str, object] = {"kind": name, "shifts": _describe(moves), "images": len(images)}
        for key in rows[0]:
            values = torch.stack([r[key] for r in rows], 1)  # (images, shifts)
            if key == "same":
                row["consistency"] = float(values.double().mean())
                row["adversarial"] = float(values.all(1).double().mean())
                report.arrays[name] = values.numpy()
                report.summary[f"{name}_consistency"] = float(row["consistency"])  # type: ignore[arg-type]
                report.summary[f"{name}_adversarial"] = float(row["adversarial"])  # type: ignore[arg-type]
            elif key == "cosine":
                row["cosine"] = float(values.double().mean())
                row["cosine, worst shift"] = float(values.double().amin(1).mean())
            else:
                row["nearest changed"] = float(values.double().mean())
        if labels is not None and "answer" in base and foreign == 0:
            known = labels >= 0
            row["accuracy"] = float((base["answer"][known] == labels[known]).double().mean())
        report.rows.append(row)
    stored = (images.shape[-2], images.shape[-1])
    if labels is not None and size != stored:
        report.notes.append(
            f"Accuracy is that of views of {size}, cut from images of {stored}; views leave room to move."
        )
    _certificate(report, subject, images, max(reach))
    return report


def gather(
    data: Iterable[Sample], *, stored: int | None = None, limit: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Images (b, 3, h, w) of one size and their labels (None when there are none)."""
    images: list[Tensor] = []
    labels: list[int] = []
    for sample in data:
        if limit is not None and len(images) >= limit:
            break
        images.append(sample.image if stored is None else _square(sample.image, stored))
        labels.append(sample.label if isinstance(sample.label, int) else -1)
    if not images:
        raise AdviceError("There are no images to look at; the data set is empty.")
    sizes = {tuple(i.shape) for i in images}
    if len(sizes) > 1:
        few = ", ".join(str(s[1:]) for s in sorted(sizes)[:3])
        raise AdviceError(
            f"Images of different sizes ({few} ...) need ShiftConsistency(stored=SIDE): resized before the shift."
        )
    label = torch.tensor(labels)
    return torch.stack(images), None if bool((label < 0).all()) else label


def _square(image: Tensor, side: int) -> Tensor:
    """Short side resized to `side`, centre cut out: on the whole stored image, before any shift."""
    height, width = image.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    x = F.interpolate(as_float(image)[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return (x[:, top : top + side, left : left + side] * 255).round().clamp(0, 255).to(torch.uint8)


def _view(
    subject: Subject, images: Tensor, view: int | tuple[int, int] | None, reach: tuple[int, int]
) -> tuple[int, int]:
    stored = (images.shape[-2], images.shape[-1])
    room = (stored[0] - 2 * reach[0], stored[1] - 2 * reach[1])
    if view is None:
        own = subject.size or room
        size = (min(own[0], room[0]), min(own[1], room[1]))
    else:
        size = (view, view) if isinstance(view, int) else (int(view[0]), int(view[1]))
    if size[0] > room[0] or size[1] > room[1] or min(size) < 1:
        raise AdviceError(
            f"Stored images of {stored} leave room for views of at most {room} when shifted by {reach} pixels; "
            f"the view is {size}. Give larger images (stored=) or a smaller view."
        )
    return size


@torch.no_grad()
def _answers(
    subject: Subject,
    images: Tensor,
    size: tuple[int, int],
    move: tuple[int, int],
    kind: str,
    batch_size: int,
    embedding: bool,
    features: bool,
) -> dict[str, Tensor]:
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    a, b = move if kind == "realistic" else (0, 0)
    answer, vector = [], []
    for start in range(0, len(images), batch_size):
        x = as_float(images[start : start + batch_size, :, top + a : top + a + size[0], left + b : left + b + size[1]])
        if kind == "cyclic":
            x = torch.roll(x, move, (-2, -1))
        if not embedding:
            logits = subject(x)
            answer.append(logits.argmax(1).cpu())
        if embedding or features:
            vector.append((subject(x) if embedding else subject.embed(x)).flatten(1).double().cpu())
    out = {"answer": torch.cat(answer), "classes": torch.tensor(logits.shape[1])} if answer else {}
    if vector:
        out["vector"] = F.normalize(torch.cat(vector), dim=1)
    return out


def _try(subject: Subject, images: Tensor, size: tuple[int, int], reach: tuple[int, int]) -> None:
    """Asks about a few unmoved views, so that a model that breaks on them, or says NaN, is told before the work."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    few = images[:4]
    try:
        examine(subject, few[..., top : top + size[0], left : left + size[1]])
    except AdviceError:
        whole = (images.shape[-2], images.shape[-1])
        if size == whole or subject.size is not None:
            raise
        examine(subject, few)  # what is wrong with the whole pictures too is said of those
        raise AdviceError(
            f"{subject.name} takes pictures of {whole[0]} x {whole[1]} but not the views of {size[0]} x {size[1]} that "
            f"a realistic shift of {max(reach)} px leaves of them. Choose one: --kind cyclic (rolls the pictures), "
            f"--extend {max(reach)} --view {min(whole)} (repeats their border pixels), or --resize {min(whole)} "
            "(brings each view to the model's size)."
        ) from None


class _Reference:
    """Answers on the unmoved images, and what a moved answer is compared with."""

    def __init__(self, base: dict[str, Tensor], anchors: Tensor | None):
        self.base = base
        if "vector" in base:
            self.anchors = base["vector"] if anchors is None else F.normalize(anchors.double(), dim=1)
            self.others = anchors is None
            self.nearest = self._nearest(base["vector"])

    def _nearest(self, vector: Tensor) -> Tensor:
        near = vector @ self.anchors.T
        if self.others:
            near.fill_diagonal_(-2.0)  # an image is no neighbour of itself
        return near.argmax(1)

    def compare(self, moved: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if "vector" in moved:
            out["cosine"] = (moved["vector"] * self.base["vector"]).sum(1).clamp(-1, 1)
            out["changed"] = self._nearest(moved["vector"]) != self.nearest
        out["same"] = moved["answer"] == self.base["answer"] if "answer" in moved else ~out["changed"]
        return out


def _certificate(report: Report, subject: Subject, images: Tensor, reach: int) -> None:
    """What crop selection can promise, where the subject is one."""
    model = subject.model
    if not isinstance(model, CropSelected):
        return
    flat = int(model.flat(as_float(images)).sum()) if not model.config.cyclic else 0
    if flat:
        report.notes.append(
            f"{flat} of {len(images)} images are flat: every crop scores the same, the centre crop is taken."
        )
    config = model.config
    if config.cyclic or config.top != 1 or config.view is None:
        return
    need = config.view if isinstance(config.view, int) else max(config.view)
    if min(images.shape[-2:]) >= need + 2 * reach:
        sure = certified(model, images, reach)
        report.arrays["certified"] = sure.numpy()
        report.summary["certified"] = float(sure.double().mean())
        for row in report.rows:
            if row["kind"] == "realistic":
                row["certified"] = report.summary["certified"]


def _describe(moves: Sequence[tuple[int, int]]) -> str:
    reach = max(max(abs(a), abs(b)) for a, b in moves)
    for around, text in (
        ("4", f"{reach} px, 4 directions"),
        ("8", f"{reach} px, 8 directions"),
        ("all", f"all up to {reach} px"),
    ):
        if sorted(moves) == sorted(shift_set(reach, around)):  # type: ignore[arg-type]
            return text
    return f"{len(moves)} shifts, up to {reach} px"
