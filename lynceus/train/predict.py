"""predict: a trained model on pictures in any form: file, folder, list, array, Dataset, Samples, PIL images."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic
from lynceus.core.progress import progress
from lynceus.core.subject import Subject
from lynceus.core.types import Prediction, Sample
from lynceus.data import open_dataset
from lynceus.data.decode import UnreadableError, from_pillow, read_image, to_image
from lynceus.train.checkpoint import load_model
from lynceus.train.evaluate import batches, samples


def predict(
    model: nn.Module | Subject | str | Path,
    source: Any,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    keep_images: bool = True,
    quiet: bool = False,
) -> list[Prediction]:
    """What the model says of every picture, in the order of the source.

    model: a module that a Task built, a Subject, or the path of a run folder or .safetensors file.
    source: a file, a folder, a name that lynceus.data.open knows, a list of any of files, PIL images, Samples and
      arrays, an array (n, h, w[, c]) or (h, w[, c]), or a Dataset. Grey, 16-bit and CMYK pictures become RGB; files
      that cannot be read are skipped as far as data.open allows and named in the log.
    device: where to run; None: where the model is, for a path what there is. keep_images: whether a Prediction carries
      its picture, which .show() and .save("x.png") need.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_model(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = model if isinstance(model, Subject) else Subject(model, needs_grad=False)
    if device is not None and isinstance(subject.model, nn.Module):
        subject.model.to(device)
    data = as_samples(source)
    out: list[Prediction] = []
    total = len(data) if hasattr(data, "__len__") else None
    with (
        progress(f"predicting with {subject.name}", total=total, unit="images", quiet=quiet) as bar,
        torch.inference_mode(),
    ):
        originals = samples(data)
        for batch in batches(_Once(data), subject, batch_size):
            raw = subject(batch.pixels())
            for found in decode(subject, raw, batch.sizes):
                sample = next(originals)
                found.id = sample.id or str(len(out))
                if sample.path:
                    found.extra = {**found.extra, "path": sample.path}
                if keep_images:
                    found.image = sample.image
                out.append(found)
            bar.advance(len(batch))
    if not out:
        raise AdviceError("There is no picture to predict: the source is empty.")
    return out


def decode(subject: Subject, raw: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
    """By the task that the model was built with; without one, softmax over the subject's classes."""
    task: Any = getattr(subject.model, "task", None)
    if hasattr(task, "decode"):
        found: list[Prediction] = task.decode(raw, sizes)
        return found
    scores = raw.float().softmax(-1).cpu()
    names = subject.classes
    return [
        Prediction(label=i, name=names[i] if names else None, scores=row)
        for i, row in zip(scores.argmax(-1).tolist(), scores)
    ]


def as_samples(source: Any) -> Any:
    """A dataset or list of Samples out of whatever holds pictures."""
    if isinstance(source, Sample):
        return [source]
    if _is_pillow(source):
        return [Sample(image=from_pillow(source))]
    if isinstance(source, (str, os.PathLike)):
        return open_dataset(source)
    if isinstance(source, (np.ndarray, Tensor)):
        images = to_image(source)
        images = images[None] if images.ndim == 3 else images
        return [Sample(image=image, id=str(i)) for i, image in enumerate(images)]
    if isinstance(source, (list, tuple)):
        if not source:
            raise AdviceError("There is no picture to predict: the list is empty.")
        return [_as_sample(item, i) for i, item in enumerate(source)]
    if hasattr(source, "__getitem__") or hasattr(source, "__iter__"):
        return source
    raise AdviceError(
        f"predict takes a file, a folder, an array, a PIL image, a list or a Dataset, not {type(source).__name__}."
    )


def _as_sample(item: Any, index: int) -> Sample:
    if isinstance(item, Sample):
        return item
    if _is_pillow(item):
        return Sample(image=from_pillow(item), id=str(index))
    if isinstance(item, (str, os.PathLike)):
        return Sample(image=read_image(Path(item)), id=str(item), path=str(item))
    image = to_image(item)
    if image.ndim != 3:
        raise AdviceError(
            f"Item {index} of the list is an array of shape {tuple(np.shape(item))}; each item is one picture."
        )
    return Sample(image=image, id=str(index))


def _is_pillow(value: Any) -> bool:
    return type(value).__module__.startswith("PIL.")


class _Once:
    """Iterates the data without letting `batches` use its memory, so that samples and batches stay in step."""

    def __init__(self, data: Any):
        self.data = data

    def __iter__(self) -> Iterator[Sample]:
        return samples(self.data)


def to_csv(predictions: Sequence[Prediction], path: str | Path) -> Path:
    """One row per picture: id, label, name, confidence, and the probability of every class."""
    names: list[str] = []
    first = next((p for p in predictions if p.scores is not None), None)
    if first is not None and first.scores is not None:
        names = [str(n) for n in first.extra.get("classes", range(len(first.scores)))]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["id", "label", "name", "confidence", *(f"p({n})" for n in names)])
    for p in predictions:
        scores = [] if p.scores is None else [f"{v:.6g}" for v in p.scores.tolist()]
        best = "" if p.scores is None or p.label is None else f"{float(p.scores[p.label]):.6g}"
        writer.writerow([p.id, p.label, p.name, best, *scores])
    return write_atomic(Path(path), text.getvalue())


def save_all(predictions: Sequence[Prediction], folder: str | Path) -> Path:
    """predictions.csv, and one drawn picture per prediction that carries its image, in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for i, p in enumerate(predictions):
        if p.image is not None:
            name = Path(p.id or str(i)).with_suffix("").as_posix().strip("/").replace("/", "_") or str(i)
            name = f"{name}_{i}" if name in used else name
            used.add(name)
            p.save(folder / f"{name}.png")
    return to_csv(predictions, folder / "predictions.csv")


__all__ = ["UnreadableError", "as_samples", "decode", "predict", "save_all", "to_csv"]
