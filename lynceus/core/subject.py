"""Subject: what checks see. Whatever the model, it takes RGB pixels in [0, 1] of any size and gives logits (b, k)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, AdviceWarning

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LOOKS = 4  # first calls whose pixels are looked at: a wrong range shows at once, and looking costs time


class Normalise(nn.Module):
    """(pixels - mean) / std per channel; with one number per channel of the model. Grey is copied to three channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        if len(mean) != len(std):
            raise AdviceError(f"mean has {len(mean)} numbers and std {len(std)}; give one of each per channel.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (image - self.mean.to(image.dtype)) / self.std.to(image.dtype)


def owns_pixels(model: Any) -> bool:
    """True for models that take pixels in [0, 1] themselves: whatever a Task built, and every Subject."""
    return bool(getattr(model, "owns_pixels", False))


class Subject:
    """A model as checks see it: RGB in [0, 1], any size, normalisation inside.

    model: a Task's module or another Subject (they normalise themselves), a Backbone or timm model (its own mean and
      std are used), or any callable on (b, 3, h, w) pixels. `mean`/`std` given here override.
    size: the side or (h, w) that images are resized to before the model; None leaves them as they are.
    classes: names of the outputs. needs_grad: False runs under inference mode; checks that ask for gradients refuse it.
    features: for a callable that is no module, a function image -> list of feature maps or vectors.
    probabilities: True for a model that ends in a softmax; the subject then gives the logarithm of what it says, so
      that nothing passes through a softmax twice.
    Warns (AdviceWarning) when the first pixels are far outside [0, 1], and when the model is in training mode.
    """

    owns_pixels = True

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor] | Subject,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
        classes: Sequence[str] | None = None,
        needs_grad: bool = True,
        name: str | None = None,
        features: Callable[[Tensor], list[Tensor]] | None = None,
        probabilities: bool | None = None,
    ):
        if isinstance(model, str):
            raise AdviceError(
                f"Subject takes a model, not the name {model!r}: Subject(lynceus.create_model({model!r}))."
            )
        inner: Any = model.model if isinstance(model, Subject) else model
        if not callable(inner):
            raise AdviceError(f"Subject takes a module or a function of images, not {type(inner).__name__}.")
        self.model: Any = inner
        self.probabilities: bool = bool(probabilities)
        self._features = features
        if isinstance(inner, nn.Module):
            inner.eval()
        normalise: Any = None
        if isinstance(model, Subject):
            normalise, classes, size = model.normalise, classes or model.classes, size or model.size
            self._features = features or model._features
            if probabilities is None:
                self.probabilities = model.probabilities
        if mean is not None or std is not None:
            normalise = Normalise(mean or (0.0,) * 3, std or (1.0,) * 3)
        elif normalise is None and isinstance(inner, nn.Module) and not owns_pixels(inner):
            if isinstance(getattr(inner, "mean", None), Tensor):
                raise AdviceError(
                    f"{name or type(inner).__name__} keeps a tensor `mean` of its own, as models do that normalise "
                    "their pixels themselves. Subject(model, mean=(0.0,) * 3, std=(1.0,) * 3) gives it RGB in [0, 1] "
                    "as they are; other numbers normalise before it."
                )
            config = getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None) or {}
            normalise = Normalise(
                getattr(inner, "mean", None) or config.get("mean", IMAGENET_MEAN),
                getattr(inner, "std", None) or config.get("std", IMAGENET_STD),
            )
        self.normalise: Normalise | None = normalise
        self.size: tuple[int, int] | None = (size, size) if isinstance(size, int) else size
        self.classes: list[str] | None = (
            list(classes) if classes else list(getattr(inner, "classes", None) or []) or None
        )
        self.needs_grad = needs_grad
        self._looked = 0
        self.name = name or getattr(inner, "name", None) or type(inner).__name__

    @property
    def device(self) -> torch.device:
        if isinstance(self.model, nn.Module):
            for p in self.model.parameters():
                return p.device
        return torch.device("cpu")

    def prepare(self, image: Tensor) -> Tensor:
        """Resizes and normalises pixels into what the inner model takes."""
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise AdviceError(
                f"A subject takes images (b, 3, h, w), not {tuple(image.shape)}; add a batch axis with x[None]."
            )
        if image.dtype == torch.uint8:
            image = image.to(torch.float32) / 255
        image = image.to(self.device)
        if self.size is not None and tuple(image.shape[-2:]) != tuple(self.size):
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True, align_corners=False)
        if self.normalise is not None:
            image = self.normalise.to(image.device)(image)
        return image

    def __call__(self, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits (or any output vector) of pixels in [0, 1]."""
        self._warn(image)
        with torch.set_grad_enabled(self.needs_grad and torch.is_grad_enabled()):
            out = self.model(self.prepare(image))
        if isinstance(out, dict):
            out = out.get("logits", out.get("out"))
        if not isinstance(out, Tensor):
            raise AdviceError(f"The model gave a {type(out).__name__}; a subject needs one tensor (b, k) of logits.")
        if out.ndim != 2 or len(out) != len(image):
            raise AdviceError(
                f"{self.name} gives {tuple(out.shape)} for {len(image)} images; a subject needs one row of logits per "
                "image, (b, k). Wrap the model: Subject(lambda x: model(x).flatten(1))."
            )
        if self.probabilities:
            out = out.clamp_min(torch.finfo(out.dtype).tiny).log()
        return out

    def _warn(self, image: Tensor) -> None:
        if isinstance(self.model, nn.Module) and self.model.training:
            warnings.warn(
                f"{self.name} is in training mode: batch norm and dropout change its answers. Call model.eval().",
                AdviceWarning,
                stacklevel=3,
            )
        if self._looked >= LOOKS or not isinstance(image, Tensor) or torch.compiler.is_compiling():
            return
        self._looked += 1
        real = (
            type(image) is Tensor and not image.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(image)
        )
        if real and image.dtype.is_floating_point and image.numel():
            low, high = (float(v) for v in image.detach().aminmax())
            if low < -0.1 or high > 1.1:
                warnings.warn(
                    f"{self.name} was given pixels from {low:.3g} to {high:.3g}. {wrong_range(low, high)}",
                    AdviceWarning,
                    stacklevel=3,
                )

    def features(self, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> list[Tensor]:
        """What the model knows before its classifier: the maps of its stages (fine -> coarse), and last the pooled
        vector (b, c). Raises AdviceError when the subject is only known by its answers."""
        with torch.set_grad_enabled(self.needs_grad and torch.is_grad_enabled()):
            if self._features is not None:
                return list(self._features(self.prepare(image)))
            model, x = self._backbone(image)
            final, maps = model.forward_intermediates(x)
            return [*maps, _pooled(model, final)]

    def embed(self, image: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The pooled vector alone, without the cost of keeping the maps."""
        with torch.set_grad_enabled(self.needs_grad and torch.is_grad_enabled()):
            if self._features is not None:
                return self._features(self.prepare(image))[-1].flatten(1)
            model, x = self._backbone(image)
            return _pooled(model, model.forward_features(x))

    def _backbone(self, image: Tensor) -> tuple[Any, Tensor]:
        model, x = self.model, self.prepare(image)
        if hasattr(model, "backbone"):
            x = model.normalise(x) if hasattr(model, "normalise") else x
            model = model.backbone
        if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            return model, x
        raise AdviceError(
            f"{self.name} is only known by its answers, so it has no features. Give Subject(model, features=function), "
            "or use a check that needs nothing but logits."
        )

    def require(self, needs: frozenset[str]) -> None:
        """Raises, before any long work, when a check asks for what this subject cannot give."""
        if "gradients" in needs and not (self.needs_grad and isinstance(self.model, nn.Module)):
            raise AdviceError(
                f"This check needs gradients, and {self.name} gives none; pass a torch module (python:MODULE:NAME of "
                "one on the command line) with needs_grad=True, or take a check that asks for answers only (game)."
            )
        if "features" in needs and self._features is None and not isinstance(self.model, nn.Module):
            raise AdviceError(
                f"This check needs features, and {self.name} is a plain function; pass Subject(model, features=...)."
            )


def wrong_range(low: float, high: float) -> str:
    """What to do about pixels that are not in [0, 1]."""
    if low < 0:
        return "They look normalised already: give RGB in [0, 1]; Subject(model, mean=, std=) normalises inside."
    return "They look like 0..255: divide them by 255, or give them as uint8."


def _pooled(model: Any, final: Tensor) -> Tensor:
    if hasattr(model, "pool"):
        vector: Tensor = model.pool(final)
    else:
        vector = model.forward_head(final, pre_logits=True)
    return vector
