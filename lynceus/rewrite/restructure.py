"""Restructure: layers left out and layers of other sizes, every weight anew; what an architecture search hands back.

A plan names the layers that go and the sizes of those that change; everything else, and how the network calls its
parts, stays. What follows a changed layer takes what comes: numbers of input channels, batch norms, depthwise
convolutions and linear layers are fitted while the network runs once on shapes.

The way of building students in Ashok et al., N2N Learning, ICLR 2018, arXiv 1709.06030.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.rng import borrowed
from lynceus.rewrite.structure import skeleton
from lynceus.rewrite.swap import signed

WIDEST, NARROWEST = 50_000, 10  # inputs of a linear layer; outside, a structure is invalid

Change = tuple[str, int, int, int, int]  # name, kernel, stride, width, padding


class Invalid(AdviceError):
    """No network can be built from this plan; the message says why."""


class _Fits(nn.Module):
    """Stands where a layer was and builds one that takes what comes, as the network runs on shapes."""

    def __init__(self, old: nn.Module, change: Change | None, name: str):
        super().__init__()
        self.old, self.change, self.name = [old], change, name
        self.options: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.options is None:
            self.options = fitted(self.old[0], self.change, x.shape)
            if isinstance(self.old[0], nn.Linear) and not NARROWEST <= x.shape[-1] <= WIDEST:
                raise Invalid(
                    f"{self.name} would read {x.shape[-1]} numbers; {NARROWEST} to {WIDEST} are taken as useful."
                )
            with torch.device("meta"):
                self.made = built(self.old[0], self.options).eval()
        y: Tensor = self.made(x)
        if y.ndim == 4 and 0 in y.shape:
            raise Invalid(f"Nothing is left of the map after {self.name}.")
        return y


def fitted(old: nn.Module, change: Change | None, incoming: Sequence[int]) -> dict[str, Any]:
    """Arguments of the layer that stands in for `old` and reads a tensor of that shape."""
    _, kernel, stride, width, padding = change or ("", 0, 0, 0, 0)
    if isinstance(old, nn.Conv2d):
        inside = incoming[1]
        depthwise = old.groups > 1 and old.groups == old.in_channels == old.out_channels
        options: dict[str, Any] = {
            "in_channels": inside,
            "out_channels": inside if depthwise else width if change else old.out_channels,
            "kernel_size": (kernel, kernel) if change else old.kernel_size,
            "stride": (stride, stride) if change else old.stride,
            "padding": (padding, padding) if change else old.padding,
            "dilation": old.dilation,
            "groups": inside if depthwise else old.groups,
            "bias": old.bias is not None,
            "padding_mode": old.padding_mode,
        }
        if inside % options["groups"]:
            raise Invalid(f"{inside} channels cannot be shared by {old.groups} groups.")
        return options
    if isinstance(old, nn.BatchNorm2d):
        return {
            "num_features": incoming[1],
            "eps": old.eps,
            "momentum": old.momentum,
            "affine": old.affine,
            "track_running_stats": old.track_running_stats,
        }
    if isinstance(old, nn.Linear):
        return {"in_features": incoming[-1], "out_features": old.out_features, "bias": old.bias is not None}
    assert isinstance(old, nn.MaxPool2d)
    return {
        "kernel_size": kernel if change else old.kernel_size,
        "stride": stride if change else old.stride,
        "padding": padding if change else old.padding,
        "dilation": old.dilation,
        "ceil_mode": old.ceil_mode,
    }


def built(old: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """A fresh layer of the type of `old`."""
    kind = next(t for t in (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d) if isinstance(old, t))
    made: nn.Module = kind(**options)
    return made


@dataclass(frozen=True, kw_only=True)
class Bones:
    """A network on shapes alone, and the shape of what it answers two images with."""

    network: nn.Module
    answers: torch.Size

    @classmethod
    def of(cls, model: nn.Module, image: tuple[int, int, int]) -> Bones:
        network = skeleton(model)
        with torch.no_grad():
            return cls(network=network, answers=network(torch.empty(2, *image, device="meta")).shape)


@dataclass(frozen=True, kw_only=True)
class Restructure:
    """Rewrite: without the layers `removed`, with the sizes `changed`; all weights are drawn anew.

    removed: names of layers. changed: (name, kernel, stride, width, padding) of convolutions and max pools; width is
    ignored for the latter. image: channels, height and width on which the network is fitted together.
    seed: of the fresh weights.
    """

    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    image: tuple[int, int, int] = (3, 32, 32)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", tuple(self.removed))
        object.__setattr__(self, "image", tuple(self.image))
        object.__setattr__(self, "changed", tuple((str(c[0]), *map(int, c[1:])) for c in self.changed))

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """The network of this plan with fresh weights, in eval mode; `model` stays as it is.

        example: ignored, `image` says what is fitted. `Invalid` (an AdviceError) when no network comes of it."""
        planned = self.planned(model)
        made = copy.deepcopy(model)
        with borrowed(self.seed, "restructure"):
            for name, options in planned.items():
                old = made.get_submodule(name)
                if options is None:
                    new: nn.Module = nn.Identity()
                elif _same(old, options):
                    new = old
                else:
                    new = built(old, options)
                    like = next(iter(made.parameters()))
                    new.to(like.device, like.dtype)
                made.set_submodule(name, new)
            for module in made.modules():
                if isinstance(module, nn.ReLU | nn.ReLU6):
                    module.inplace = False  # what it reads may now be somebody else's
                reset = getattr(module, "reset_parameters", None)
                if callable(reset) and list(module.parameters(recurse=False)):
                    reset()
        _restage(made, self.image)
        signed(made, self)
        return made.eval()

    def planned(self, model: nn.Module, bones: Bones | None = None) -> dict[str, dict[str, Any] | None]:
        """Arguments of every layer that can differ, None for those that go; `Invalid` when they do not fit together.

        bones: of `model` on `image`, where many plans of one network are looked at."""
        bones = bones or Bones.of(model, self.image)
        made = copy.deepcopy(bones.network)
        wanted = {c[0]: c for c in self.changed}
        unknown = sorted({*wanted, *self.removed} - {n for n, _ in made.named_modules()})
        if unknown:
            raise AdviceError(
                f"{type(model).__name__} has no layer {unknown[0]!r}; `layers_of(model, image)` lists all."
            )
        slots: dict[str, _Fits] = {}
        for name, old in list(made.named_modules()):
            if name in self.removed:
                made.set_submodule(name, nn.Identity())
            elif isinstance(old, nn.Conv2d | nn.BatchNorm2d | nn.Linear | nn.MaxPool2d):
                slots[name] = _Fits(old, wanted.get(name), name)
                made.set_submodule(name, slots[name])
            elif isinstance(old, nn.ReLU | nn.ReLU6):
                old.inplace = False
        try:
            with torch.no_grad():
                shape = made(torch.empty(2, *self.image, device="meta")).shape
        except Invalid:
            raise
        except Exception as error:
            raise Invalid(f"The layers do not fit together: {str(error).splitlines()[0]}") from None
        if shape != bones.answers:
            raise Invalid(f"It would answer with {tuple(shape)} instead of {tuple(bones.answers)}.")
        used = {n: s.options for n, s in slots.items() if s.options is not None}
        return {**used, **dict.fromkeys(self.removed)}

    def parameters(self, model: nn.Module, planned: Mapping[str, dict[str, Any] | None]) -> int:
        """How many numbers the network of `planned` learns."""
        left = sum(p.numel() for p in model.parameters())
        left -= sum(p.numel() for n in planned for p in model.get_submodule(n).parameters())
        return left + sum(_numbers(o) for o in planned.values() if o is not None)


def _numbers(options: Mapping[str, Any]) -> int:
    """Parameters of the layer that has these arguments."""
    o = options
    if "in_channels" in o:
        weights = o["out_channels"] * o["in_channels"] // o["groups"] * o["kernel_size"][0] * o["kernel_size"][1]
        return int(weights + o["out_channels"] * o["bias"])
    if "in_features" in o:
        return int(o["out_features"] * (o["in_features"] + o["bias"]))
    return 2 * int(o["num_features"]) if o.get("affine") else 0


def _same(old: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether `old` is already what the options say."""
    now = {k: getattr(old, k) for k in options}
    if "bias" in now:
        now["bias"] = now["bias"] is not None
    return now == dict(options)


def _restage(model: nn.Module, image: tuple[int, int, int]) -> None:
    """A backbone says how many channels its maps have; after a change it says so anew."""
    inner: Any = getattr(model, "backbone", model)
    if not (hasattr(inner, "stages") and hasattr(inner, "forward_stages")):
        return
    with torch.no_grad():
        maps = skeleton(inner).forward_stages(torch.empty(2, *image, device="meta"))  # type: ignore[operator]
    inner.stages = tuple(replace(stage, channels=m.shape[1]) for stage, m in zip(inner.stages, maps))
