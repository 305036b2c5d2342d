"""The worst cases of a classifier with the pixels that their answers rest on, and a test whether those pixels matter.

Maps: `lynceus.explain.attribution` and `grad_cam`. The test is deletion: the tenth of the pixels that a map marks
highest is replaced by the image's mean colour, and the fall of the answer's probability is compared with that of a
random tenth (after Petsiuk et al., RISE, BMVC 2018, arXiv 1806.07421). A map no better than chance is said to be that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core import plots
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import Material, collect, sensible
from lynceus.core.report import Report, environment
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.explain.attribution import flat, integrated_gradients, occlusion, saliency
from lynceus.explain.grad_cam import grad_cam

Method = Literal["auto", "integrated_gradients", "grad_cam", "saliency", "occlusion"]
METHODS = ("integrated_gradients", "grad_cam", "saliency", "occlusion")
COMPLETE = 0.01  # Integrated Gradients doubles its steps until shares and change differ by less than this share
MORE = 8  # times the steps asked for, at most


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Check: which pixels the worst answers rest on.

    method: "auto" takes Integrated Gradients and Grad-CAM where the model has gradients, occlusion where it is a
      function; or one of "integrated_gradients", "grad_cam", "saliency", "occlusion".
    count: how many images; the worst ones: wrong with the greatest confidence, then right with the least.
    limit: at most this many images are looked through. steps: points of the path of Integrated Gradients; doubled, up
      to 8 times as many, while the shares miss the change by more than 1%.
    window: side of the occluded square in pixels; default: an eighth of the image. batch_size: images per pass.
    layer: module whose map Grad-CAM reads; default: the last one that the answer depends on.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    method: Method = "auto"
    count: int = 10
    limit: int | None = None
    steps: int = 50
    window: int | None = None
    batch_size: int = 64
    layer: str | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per image and method. arrays: the maps, (images, h, w), as "maps METHOD"."""
        sensible(self)
        if self.method != "auto" and self.method not in METHODS:
            raise unknown("method", str(self.method), ("auto", *METHODS))
        if self.count < 1:
            raise AdviceError(f"count is how many images to explain, at least 1, not {self.count}.")
        gradients = subject.needs_grad and isinstance(subject.model, torch.nn.Module)
        names: list[str] = [self.method] if self.method != "auto" else []
        if not names:
            names = ["integrated_gradients", "grad_cam"] if gradients else ["occlusion"]
        if any(n != "occlusion" for n in names):
            subject.require(frozenset({"gradients"}))
        found = collect(subject, data, limit=self.limit)
        report = Report(name="attribution", environment=environment(seed), notes=list(found.notes))
        chosen, logits = worst(subject, found, self.count, self.batch_size)
        images, labels = found.images[chosen], found.labels[chosen]
        answers = logits.argmax(1)
        confidence = logits.softmax(1).gather(1, answers[:, None])[:, 0]
        maps: dict[str, Tensor] = {}
        for name in names:
            try:
                maps[name], extra = self._map(subject, images, answers, name, report)
            except AdviceError as error:
                if self.method != "auto" or name != "grad_cam":
                    raise
                report.notes.append(f"No Grad-CAM: {error}")
                continue
            falls = deletion(subject, images, answers, maps[name], seed=seed, batch=self.batch_size)
            inside = _inside(maps[name], [found.masks[i] for i in chosen] if found.masks else [])
            for i, at in enumerate(chosen):
                label = int(labels[i])
                row: dict[str, Any] = {
                    "image": found.ids[at],
                    "true": found.name(label),
                    "answer": found.name(int(answers[i])),
                    "right": bool(label == int(answers[i])) if label >= 0 else None,
                    "confidence": float(confidence[i]),
                    "method": name,
                    "fall, marked tenth": float(falls[0][i]),
                    "fall, random tenth": float(falls[1][i]),
                }
                if inside is not None:
                    row["share on the object"] = inside[i]
                row |= {k: float(v[i]) for k, v in extra.items()}
                report.rows.append(row)
            report.summary[f"{name}_fall"] = float(falls[0].mean())
            report.summary[f"{name}_fall_random"] = float(falls[1].mean())
            if bool(falls[0].mean() <= falls[1].mean()):
                report.notes.append(
                    f"The pixels that {name} marks matter no more than random ones here; its maps say little."
                )
        for name, value in maps.items():
            report.arrays[f"maps {name}"] = value.numpy()
        report.figures["worst_cases.png"] = gallery(images, maps, _captions(found, chosen, answers, confidence))
        wrong = int(((labels >= 0) & (labels != answers)).sum())
        if bool((labels >= 0).any()):
            report.summary["wrong among them"] = float(wrong)
        best = max(maps, key=lambda n: report.summary[f"{n}_fall"] - report.summary[f"{n}_fall_random"])
        report.answer = (
            f"Of the {len(chosen)} worst of {len(found)} images {wrong} are wrong. Without the tenth of the pixels "
            f"that {best} marks, the answer's probability falls by {report.summary[f'{best}_fall']:.2f} (a random "
            f"tenth: {report.summary[f'{best}_fall_random']:.2f})."
        )
        return report

    def _map(
        self, subject: Subject, images: Tensor, answers: Tensor, name: str, report: Report
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if name == "grad_cam":
            return grad_cam(subject, images, answers, layer=self.layer, batch=self.batch_size).cpu(), {}
        if name == "saliency":
            return flat(saliency(subject, images, answers, batch=self.batch_size), signed=False).cpu(), {}
        if name == "occlusion":
            return occlusion(subject, images, answers, window=self.window, batch=self.batch_size).cpu(), {}
        steps = self.steps
        while True:
            maps, delta = integrated_gradients(subject, images, answers, steps=steps, batch=self.batch_size)
            miss = delta.abs() / (maps.flatten(1).sum(1) - delta).abs().clamp_min(1e-12)
            if float(miss.max()) < COMPLETE or steps * 2 > MORE * self.steps:
                break
            steps *= 2
        if steps > self.steps:
            report.notes.append(f"Integrated Gradients took {steps} steps so that shares add up to the change.")
        if float(miss.max()) >= COMPLETE:
            report.notes.append(
                f"After {steps} steps the shares of Integrated Gradients still miss the change by up to "
                f"{float(miss.max()):.1%}: the logit bends sharply on the way from black."
            )
        report.summary["completeness_miss"] = float(miss.max())
        return flat(maps).cpu(), {"completeness miss": miss.cpu()}


@torch.no_grad()
def worst(subject: Subject, found: Material, count: int, batch: int = 64) -> tuple[list[int], Float[Tensor, "k c"]]:
    """Indices of the worst images, and their logits: by the margin of the label's logit over the best other one; images
    without a label by the margin of the answer (the least sure first)."""
    logits = torch.cat([subject(x).float().cpu() for x in found.images.split(batch)])
    label = torch.where(found.labels >= 0, found.labels, logits.argmax(1))
    own = logits.gather(1, label[:, None])[:, 0]
    other = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    order = (own - other).argsort(stable=True)[:count].tolist()
    return order, logits[order]


@torch.no_grad()
def deletion(
    subject: Subject,
    images: Float[Tensor, "b c h w"],
    targets: Int[Tensor, " b"],
    maps: Float[Tensor, "b h w"],
    *,
    share: float = 0.1,
    draws: int = 4,
    seed: int = 0,
    batch: int = 64,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(fall, fall by chance): how far the target's probability falls without the `share` of pixels that `maps` marks
    highest, and without a random share of the same number (mean of `draws`)."""
    count = max(1, round(share * maps[0].numel()))
    mean = images.mean((-2, -1), keepdim=True)

    def probability(x: Tensor) -> Tensor:
        rows = torch.cat([subject(part).float().cpu() for part in x.split(batch)]).softmax(1)
        return rows.gather(1, targets.cpu()[:, None])[:, 0]

    def without(order: Tensor) -> Tensor:
        gone = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :count], True).view(maps.shape)
        return probability(torch.where(gone[:, None].to(images.device), mean, images))

    before = probability(images)
    marked = before - without(maps.flatten(1).argsort(1, descending=True))
    draw = generator(seed, "deletion")
    random = torch.stack([without(torch.rand(maps.flatten(1).shape, generator=draw).argsort(1)) for _ in range(draws)])
    return marked, before - random.mean(0)


def gallery(images: Float[Tensor, "b c h w"], maps: dict[str, Tensor], captions: list[str]) -> bytes:
    """Each image with its maps beside it, two images in a row."""
    cells: list[Tensor] = []
    texts: list[str] = []
    for i, image in enumerate(images):
        cells.append(image.expand(3, -1, -1))
        texts.append(captions[i])
        for name, value in maps.items():
            cells.append(overlay(image, value[i]))
            texts.append(name.replace("_", " "))
    return plots.image_grid(cells, texts, columns=2 * (1 + len(maps)), side=150)


def overlay(image: Float[Tensor, "c h w"], heat: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """A map on the grey image: red speaks for the answer, blue against; the full colour is the 99th percentile."""
    grey = image.detach().cpu().float().mean(0).expand(3, -1, -1) * 0.6 + 0.4
    value = heat.detach().cpu().float()
    top = value.abs().flatten().quantile(0.99).clamp_min(1e-12)
    strength = (value / top).clamp(-1, 1)
    colour = torch.where(
        strength[None] > 0,
        torch.tensor([0.84, 0.19, 0.15])[:, None, None],
        torch.tensor([0.13, 0.4, 0.75])[:, None, None],
    )
    alpha = strength.abs()[None] ** 0.7 * 0.85
    return (grey * (1 - alpha) + colour * alpha).clamp(0, 1)


def _inside(maps: Tensor, masks: list[Tensor | None]) -> list[float] | None:
    """The share of what speaks for the answer that lies on the masked objects."""
    if not masks:
        return None
    out = []
    for heat, mask in zip(maps.clamp_min(0), masks):
        if mask is None or tuple(mask.shape[-2:]) != tuple(heat.shape):
            out.append(float("nan"))
        else:
            out.append(float((heat * mask.any(0)).sum() / heat.sum().clamp_min(1e-12)))
    return out


def _captions(found: Material, chosen: list[int], answers: Tensor, confidence: Tensor) -> list[str]:
    out = []
    for i, at in enumerate(chosen):
        label, answer = int(found.labels[at]), int(answers[i])
        text = f"{found.name(answer)} {float(confidence[i]):.2f}"
        out.append(text if label in (-1, answer) else f"{text}, is {found.name(label)}")
    return out
