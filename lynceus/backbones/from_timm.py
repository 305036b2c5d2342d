"""Any timm model in the contract of `Backbone`: create_model("timm:resnet50").

Levels come from the model's own feature_info, normalisation from its configuration. Models made for one size are built
to take any where timm can (sizes that follow the image, padding inside); `TimmBackbone.sizes` says what was reached.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones._groups import inside
from lynceus.core.errors import AdviceError, OptionError, unknown
from lynceus.core.shapes import pad_image
from lynceus.core.types import Stage

LEVELS = 6  # a longer list of feature_info is that of a columnar network: four levels are taken
FREE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}  # timm's ways to take any size
Sizes = Literal["any", "padded", "fixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmConfig(BackboneConfig):
    """architecture: timm's name, with or without the tag of its weights. image_size: what it is built for; None: its
    own. pretrained: download timm's weights of that tag (nothing is downloaded otherwise). options: arguments of timm's
    class.
    """

    architecture: str = "resnet18"
    image_size: tuple[int, int] | None = None
    pretrained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class TimmBackbone(Backbone):
    """A timm model. `model` is the model itself; `sizes` says which images it takes: "any", "padded" (any, padded to a
    multiple of its coarsest stride) or "fixed" (its own size only)."""

    def __init__(self, config: TimmConfig):
        module, options = _planned(config)
        infos = _infos(module)
        chosen = range(len(infos)) if len(infos) <= LEVELS else _spread(len(infos))
        stages = [Stage(infos[i]["num_chs"], infos[i]["reduction"], f"model.{infos[i]['module']}") for i in chosen]
        super().__init__(config, stages)
        self.levels = tuple(chosen)
        self.modules_of_levels = tuple(infos[i]["module"] for i in chosen)
        self.model: Any = _build(config, options, pretrained=config.pretrained)
        cfg = self.model.pretrained_cfg
        self.mean, self.std = _statistics(cfg, config.in_chans)
        self.num_features = int(self.model.num_features)
        self.head_hidden_size = int(getattr(self.model, "head_hidden_size", self.num_features))
        heads = cfg.get("classifier") or "head"
        self.head_name = f"model.{heads if isinstance(heads, str) else heads[0].split('.')[0]}"
        self.size: tuple[int, int] = _size(config, cfg)
        self.multiple = max(s.stride for s in stages)
        self.sizes: Sizes = _sizes(module, config, self.size, self.multiple)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.size

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's own configuration, with what this model really takes."""
        cfg = dict(self.model.pretrained_cfg)
        size = (self.config.in_chans, *self.size)
        return {**cfg, "input_size": size, "mean": self.mean, "std": self.std, "num_classes": self.num_classes}

    default_cfg = pretrained_cfg

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.features_and_stages(image)[1]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        return self.model.forward_features(self.fitted(image))

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        if not hasattr(self.model, "forward_intermediates"):
            return self._listened(self.fitted(image))
        features, maps = self.model.forward_intermediates(self.fitted(image), indices=list(self.levels))
        return features, list(maps)

    def _listened(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """For models without forward_intermediates: the outputs of the levels' modules are caught as they pass."""
        maps: dict[str, Tensor] = {}
        handles = []
        for name in self.modules_of_levels:

            def catch(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                maps[name] = out

            handles.append(self.model.get_submodule(name).register_forward_hook(catch))
        try:
            features = self.model.forward_features(image)
        finally:
            for handle in handles:
                handle.remove()
        return features, [maps[name] for name in self.modules_of_levels]

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        return self.model.forward_head(features, pre_logits=True)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        return self.model(self.fitted(image))

    def fitted(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """The image as timm's model takes it: padded where needed; an AdviceError where no size but one fits."""
        if self.sizes == "padded":
            return pad_image(image, self.multiple)
        if self.sizes == "fixed" and tuple(image.shape[-2:]) != self.size:
            h, w = image.shape[-2:]
            raise AdviceError(
                f"timm's {self.config.architecture} takes images of {self.size[0]}x{self.size[1]} only, not {h}x{w}. "
                f"Build it for yours: create_model('timm:{self.config.architecture}', image_size=({h}, {w})), "
                f"or resize: Subject(model, size={self.size})."
            )
        return image

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier by timm's own rule."""
        self.model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        self.num_classes = num_classes
        self.config = replace(self.config, num_classes=num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return inside(self.model.group_matcher(coarse=coarse), "model")

    def no_weight_decay(self) -> set[str]:
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{n}" for n in names}


def create_timm(
    name: str, *, num_classes: int = 1000, in_chans: int = 3, changes: Mapping[str, Any] | None = None
) -> TimmBackbone:
    """A timm model by its name ("resnet50", "resnet50.a1_in1k"); random weights unless changes say pretrained=True.

    changes: fields of TimmConfig, or arguments of timm's class. An unknown name or argument is an OptionError that
    names the nearest.
    """
    check_timm(name)
    given = dict(changes or {})
    own = {f.name for f in fields(TimmConfig)} - {"architecture", "options"}
    config = {k: given.pop(k) for k in list(given) if k in own}
    allowed = _arguments(name)
    for option in given:
        if allowed is not None and option not in allowed:
            raise unknown(f"option of timm's {name}", option, own | allowed)
    size = config.get("image_size")
    if size is not None:
        config["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    model = TimmBackbone(
        TimmConfig(architecture=name, num_classes=num_classes, in_chans=in_chans, options=given, **config)
    )
    model.name = f"timm:{name}"
    return model


def check_timm(name: str) -> None:
    """Raises the error that names the nearest when timm has no model of that name."""
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(), how="lynceus models 'timm:*PART*' lists them.")


def list_timm(pattern: str = "*") -> list[str]:
    """timm's architectures whose name matches a shell pattern."""
    import timm

    return fnmatch.filter(timm.list_models(), pattern)


def build(config: TimmConfig, *, options: Mapping[str, Any] | None = None) -> TimmBackbone:
    """The model of a configuration, e.g. one read from a file; `options` replaces those of the configuration."""
    given = config.options if options is None else options
    changes = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate, "image_size": config.image_size}
    return create_timm(
        config.architecture,
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        changes={**changes, "pretrained": config.pretrained, **given},
    )


def _arguments(name: str) -> set[str] | None:
    """Names of the arguments of the class behind a timm name; None when it takes anything."""
    parameters: dict[str, inspect.Parameter] = {}
    for cls in type(_skeleton(name)).__mro__:
        if cls is nn.Module:
            break
        known = dict(inspect.signature(cast(Any, cls).__init__).parameters)
        parameters |= known
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            break
    else:
        return None
    return set(parameters) - {"self", "args", "kwargs", "num_classes", "in_chans"}


def _skeleton(name: str, **options: Any) -> Any:
    """The model on the meta device: nothing is allocated or initialised."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **options)


def _planned(config: TimmConfig) -> tuple[Any, dict[str, Any]]:
    """The model without its weights, and the arguments that timm gets, with any size allowed where it can."""
    name, options = config.architecture, dict(config.options)
    allowed = _arguments(name) or set()
    for rate in ("drop_rate", "drop_path_rate"):
        if rate in allowed:
            options.setdefault(rate, getattr(config, rate))
        elif getattr(config, rate):
            raise OptionError(f"timm's {name} has no {rate}.")
    if config.image_size is not None and "img_size" in allowed:
        options["img_size"] = config.image_size
    options |= {"num_classes": config.num_classes, "in_chans": config.in_chans}
    free = {k: v for k, v in FREE.items() if k in allowed and k not in options}
    for extra in (free, {}) if free else ({},):
        try:
            return _skeleton(name, **options, **extra).eval(), {**options, **extra}
        except (TypeError, ValueError, AssertionError) as error:
            last = error
    raise OptionError(f"timm's {name} cannot be built with {options}: {last}")


def _build(config: TimmConfig, options: Mapping[str, Any], *, pretrained: bool) -> Any:
    import timm

    return timm.create_model(config.architecture, pretrained=pretrained, **options)


def _infos(model: nn.Module) -> list[dict[str, Any]]:
    infos = getattr(model, "feature_info", None)
    infos = getattr(infos, "info", infos)
    if not infos:
        raise AdviceError(f"timm's {type(model).__name__} does not say what its levels are; it cannot be a backbone.")
    return list(infos)


def _spread(count: int) -> tuple[int, ...]:
    """Four of `count` blocks, evenly spaced, the last one among them."""
    return tuple(count * (i + 1) // 4 - 1 for i in range(4))


def _statistics(cfg: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel; for another number of channels than three, their averages."""
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def _size(config: TimmConfig, cfg: Mapping[str, Any]) -> tuple[int, int]:
    height, width = config.image_size if config.image_size is not None else cfg["input_size"][-2:]
    return int(height), int(width)


def _sizes(model: Any, config: TimmConfig, size: tuple[int, int], multiple: int) -> Sizes:
    """Which images the model takes, tried on shapes alone."""

    def takes(height: int, width: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.empty(1, config.in_chans, height, width, device="meta"))
        except Exception:
            return False
        return True

    h, w = size
    if not model.default_cfg.get("fixed_input_size"):
        return "padded" if takes(h, w) and not takes(h + 1, w + 3) and takes(h + multiple, w) else "any"
    if takes(h + 1, w + multiple + 5) and takes(h - multiple - 3, w + 2):
        return "any"
    if takes(h + multiple, w + 2 * multiple) and takes(h - multiple, w):
        return "padded"
    return "fixed" if takes(h, w) else "any"
