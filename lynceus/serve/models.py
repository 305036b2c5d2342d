"""The models behind the door: by name and version, each with its preprocessing, reloaded without a pause."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, AdviceWarning, MissingError
from lynceus.core.subject import Subject
from lynceus.core.types import Prediction
from lynceus.serve.config import ServeConfig
from lynceus.serve.errors import ModelFailed, UnknownModel
from lynceus.serve.preprocess import pixels, prepare

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,79}")
Row = dict[str, Any] | ModelFailed


def open_model(source: str) -> Any:
    """What a source names: a run folder or .safetensors file, python:MODULE:NAME, or the name of a fresh network."""
    if source.startswith("python:"):
        _, _, place = source.partition(":")
        module, _, name = place.partition(":")
        if not module or not name:
            raise AdviceError(f"{source!r} names no function; write python:MODULE:NAME, such as python:mine:model.")
        try:
            found = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            raise MissingError(f"There is no Python module {error.name!r}, asked for by {source!r}.") from None
        except AttributeError:
            raise AdviceError(f"The module {module!r} has no {name!r}, asked for by {source!r}.") from None
        if isinstance(found, type) or not callable(found):
            raise AdviceError(f"{source!r} is no model or function of pixels, but {type(found).__name__}.")
        return found
    path = Path(source)
    if not source.startswith("timm:") and (path.exists() or "/" in source or source.endswith(".safetensors")):
        from lynceus.train.checkpoint import load_model

        return load_model(source)
    from lynceus.backbones import create_model

    made = create_model(source)
    text = f"{source} is a fresh network that knows nothing; serve the run folder of a trained one for real answers."
    warnings.warn(text, AdviceWarning, stacklevel=2)
    return made


class Served:
    """One version of one model: pictures in, answers out.

    model: a module, a Subject, or a function of pixels (b, 3, h, w) in [0, 1] that gives logits (b, k) or one
    Prediction per picture. What needs a fixed size takes config.size, else the task's, else the network's own.
    """

    def __init__(self, name: str, model: Any, config: ServeConfig, *, version: str = "1", source: str = ""):
        self.name, self.version, self.source = name, version, source
        self.loaded = time.time()
        self.device = _device(config.device)
        self.exact, self.placement = config.exact, config.placement
        inner = model.model if isinstance(model, Subject) else model
        self.task: Any = getattr(inner, "task", None)
        self.size, self.policy = _geometry(model, inner, self.task, config)
        # what Deploy makes is built at its first call, from tensors that tell their version
        self._mode = torch.inference_mode if config.way == "eager" else torch.no_grad
        if config.way != "eager" and isinstance(inner, nn.Module):
            from lynceus.rewrite.deploy import Deploy

            inner = Deploy(ways=(config.way,), threads=(config.threads or torch.get_num_threads(),))(inner, None)
            model = Subject(inner, size=self.size) if not isinstance(model, Subject) else model
            if isinstance(model, Subject):
                model.model = inner
        if isinstance(inner, nn.Module):
            inner.to(self.device).eval()
            self.subject = model if isinstance(model, Subject) else Subject(model, needs_grad=False)
        else:
            self.subject = model if isinstance(model, Subject) else Subject(model, needs_grad=False, name=name)
        self.classes = self.subject.classes

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    def info(self) -> dict[str, Any]:
        """What the door tells of this model."""
        inner = self.subject.model
        count = sum(p.numel() for p in inner.parameters()) if isinstance(inner, nn.Module) else None
        return {
            "name": self.name,
            "version": self.version,
            "source": self.source or type(inner).__name__,
            "size": list(self.size) if self.size else None,
            "resize": self.policy,
            "parameters": count,
            "classes": self.classes,
            "device": str(self.device),
            "loaded": self.loaded,
        }

    def prepare(self, image: Tensor) -> Tensor:
        """One decoded picture (3, h, w) as it waits for its batch."""
        if self.placement in ("batch", "device"):
            return image
        return prepare(image, self.size, self.policy, exact=self.exact)

    def to_device(self, batch: Tensor) -> Tensor:
        """The collated batch where and as the model takes it: float pixels in [0, 1] of its size."""
        if self.placement == "device":
            batch = batch.to(self.device)
        if self.placement in ("batch", "device"):
            batch = prepare(batch, self.size, self.policy, exact=self.exact)
        batch = pixels(batch)
        return batch if batch.device == self.device else batch.to(self.device)

    def run(self, batch: Tensor) -> Any:
        """The raw outputs of float pixels (b, 3, h, w), finished: an asynchronous device is waited for."""
        with self._mode():
            raw = self.subject.model(self.subject.prepare(batch))
            if isinstance(raw, dict):
                raw = raw.get("logits", raw.get("out"))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return raw

    def rows(self, raw: Any, sizes: list[tuple[int, int]]) -> list[Row]:
        """One answer per picture, as plain values; ModelFailed for those whose numbers are not finite.

        Raises ModelFailed when the outputs are not one per picture."""
        with torch.inference_mode():
            if isinstance(raw, Tensor) and raw.ndim == 2 and len(raw) == len(sizes):
                return self._scores(raw)
            found = raw
            if hasattr(self.task, "decode") and not _is_predictions(raw):
                found = self.task.decode(raw, sizes)
        if not _is_predictions(found) or len(found) != len(sizes):
            raise ModelFailed(
                f"{self.name} gave {_shape(raw)} for {len(sizes)} pictures; one row of logits, or one Prediction, for "
                "each picture is needed."
            )
        # a function knows its own input only; a task was told the size of the picture
        to = [self._back(size) if self.task is None else (1.0, 1.0) for size in sizes]
        return [_plain(p, scale) for p, scale in zip(found, to)]

    def _back(self, size: tuple[int, int]) -> tuple[float, float]:
        """From pixels of the model's input to those of a picture: factors of y and x."""
        return (1.0, 1.0) if self.size is None else (size[0] / self.size[0], size[1] / self.size[1])

    def _scores(self, raw: Tensor) -> list[Row]:
        raw = raw.float()
        finite = torch.isfinite(raw).all(1).tolist()
        if hasattr(self.task, "probabilities"):
            scores = self.task.probabilities(raw)
        else:
            scores = raw.exp() if self.subject.probabilities else raw.softmax(-1)
        scores = scores.cpu()
        names = self.classes
        best = scores.argmax(-1).tolist()
        made: list[Row] = []
        for good, i, row in zip(finite, best, scores.tolist()):
            if not good:
                made.append(ModelFailed(f"{self.name} gave numbers that are not finite for this picture."))
            else:
                name = names[i] if names and i < len(names) else None
                made.append({"label": i, "name": name, "confidence": row[i], "scores": row})
        return made

    def warm_up(self, batch: int = 1) -> None:
        """Runs the model once, so that the first request does not pay for it; what fails here fails loading."""
        h, w = self.size or (224, 224)
        raw = self.run(torch.full((batch, 3, h, w), 0.5, device=self.device))
        self.rows(raw, [(h, w)] * batch)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise AdviceError(f"This machine has no device {name!r}; it has {', '.join(there)}.") from None
    return device


def _geometry(model: Any, inner: Any, task: Any, config: ServeConfig) -> tuple[tuple[int, int] | None, str]:
    policy = getattr(task, "resize", "squash")
    if config.size is not None:
        return (config.size, config.size), policy
    size: Any = getattr(task, "size", None)
    if size is None and isinstance(model, Subject):
        size = model.size
    if size is None and task is None and isinstance(inner, nn.Module) and not isinstance(model, Subject):
        cfg = getattr(inner, "pretrained_cfg", None) or {}
        size = getattr(inner, "image_size", None) or (cfg.get("input_size") or (3, 224, 224))[1:]
    if size is None:
        return None, policy
    h, w = (size, size) if isinstance(size, int) else size
    return (int(h), int(w)), policy


def _is_predictions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, Prediction) for v in value)


def _plain(found: Prediction, scale: tuple[float, float]) -> Row:
    for value in (found.scores, found.boxes, found.depth):
        if value is not None and not bool(torch.isfinite(value).all()):
            return ModelFailed("The model gave numbers that are not finite for this picture.")
    made = found.to_dict()
    if found.boxes is not None and scale != (1.0, 1.0):
        made["boxes"] = (found.boxes * torch.tensor([scale[1], scale[0]] * 2)).tolist()
    return made


def _shape(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class Card:
    """What the front knows of a model that workers hold."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.name, self.version = str(values["name"]), str(values["version"])

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    def info(self) -> dict[str, Any]:
        return self.values


class Cards:
    """Models by name and version, as workers told of them; `find` is Registry's."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Any]] = {}

    def learn(self, infos: list[dict[str, Any]]) -> None:
        for values in infos:
            card = Card(values)
            self._models.setdefault(card.name, {})[card.version] = card

    def names(self) -> list[str]:
        return list(self._models)

    def all(self) -> list[Any]:
        return [m for versions in self._models.values() for m in versions.values()]

    def find(self, name: str | None = None, version: str | None = None) -> Any:
        """The first model, or that of a name (NAME or NAME@VERSION), in its newest version or the one given."""
        if name is None:
            name = next(iter(self._models))
        elif name not in self._models and "@" in name:
            name, _, version = name.rpartition("@")
        versions = self._models.get(name)
        if versions is None:
            raise UnknownModel(f"There is no model of this name; there are: {', '.join(self._models)}.")
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise UnknownModel(f"There is no such version of {name}; there are: {', '.join(versions)}.")
        return versions[version]


class Registry(Cards):
    """Models by name and version. `open` is how a source becomes a model again when it is reloaded."""

    def __init__(self, config: ServeConfig, *, open: Callable[[str], Any] = open_model):
        super().__init__()
        self.config, self._open = config, open
        self._lock = threading.Lock()

    @classmethod
    def of(cls, models: Any, config: ServeConfig) -> Registry:
        """From a model, a mapping of names to models, or the sources of config.models; loaded and warmed up."""
        made = cls(config)
        if models is None:
            if not config.models:
                raise AdviceError(
                    "There is no model to serve; give one, such as `lynceus serve runs/train/resnet_nano`."
                )
            for text in config.models:
                name, version, source = parse(text)
                made.add(name, made._open(source), version=version, source=source)
            return made
        table = models if isinstance(models, Mapping) else {spare_name(models): models}
        for text, model in table.items():
            name, version, _ = parse(f"{text}=-")
            if isinstance(model, str):
                made.add(name, made._open(model), version=version, source=model)
            else:
                made.add(name, model, version=version)
        return made

    def add(self, name: str, model: Any, *, version: str = "", source: str = "") -> Served:
        """A new version; it answers requests that name no version from now on."""
        if not NAME.fullmatch(name):
            raise AdviceError(f"{name!r} is no name of a model: letters, digits and _ . : - only, at most 80.")
        version = version or str(1 + len(self._models.get(name, {})))
        if version in self._models.get(name, {}):
            raise AdviceError(f"There are two models {name}@{version}; name them apart: {name}@OTHER=...")
        made = Served(name, model, self.config, version=version, source=source)
        made.warm_up()
        with self._lock:
            self._models.setdefault(name, {})[version] = made
        return made

    def reload(self, name: str | None = None, version: str | None = None) -> Served:
        """Reads the weights of a model again from where they came; requests on the way keep the old ones."""
        old = self.find(name, version)
        if not old.source:
            raise AdviceError(f"{old.name} was given as an object, so there is no file to read it from again.")
        made = Served(old.name, self._open(old.source), self.config, version=old.version, source=old.source)
        made.warm_up()
        with self._lock:
            self._models[old.name][old.version] = made
        return made


def parse(text: str) -> tuple[str, str, str]:
    """(name, version or "", source) of NAME@VERSION=SOURCE, NAME=SOURCE or SOURCE."""
    alias, equals, source = text.partition("=")
    if not equals:
        alias, source = _plain_name(text), text
        return alias, "", source
    name, _, version = alias.partition("@")
    if not source:
        raise AdviceError(f"{text!r} names no model behind its =.")
    return name, version, source


def _plain_name(source: str) -> str:
    if source.startswith("python:"):
        return source.rpartition(":")[2]
    if source.startswith("timm:"):
        return source
    path = Path(source)
    return (path.stem if path.suffix == ".safetensors" else path.resolve().name if "/" in source else source) or "model"


def spare_name(model: Any) -> str:
    """What a model is called that was given without a name."""
    if isinstance(model, str):
        return parse(model)[0]
    name = str(getattr(model, "name", None) or type(model).__name__)
    return re.sub(r"[^A-Za-z0-9_.:\-]", "_", name)[:80].lstrip("_.:-") or "model"


def is_fresh(source: str) -> bool:
    """Whether a source is the bare name of a network, whose weights are drawn anew each time."""
    path = Path(source)
    file = path.exists() or "/" in source or source.endswith(".safetensors")
    return source.startswith("timm:") or not (source.startswith("python:") or file)
