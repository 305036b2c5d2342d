"""Plan: sub-models, where each runs, what each costs, and the fusion; a folder of safetensors and JSON on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import lynceus
from lynceus.backbones.swin import Swin, SwinConfig
from lynceus.backbones.vit import ViT, ViTConfig
from lynceus.core.config import from_dict, to_dict
from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.report import Report
from lynceus.core.types import as_float
from lynceus.rewrite.split.assign import Budget, Device, Load, energy, seconds
from lynceus.rewrite.split.cut import Cut
from lynceus.rewrite.split.fused import Fused, Fusion, Parts, joined
from lynceus.rewrite.split.part import Part
from lynceus.rewrite.split.retrain import outputs
from lynceus.tasks.classify import Classifier, Classify

FORMAT = 1
KINDS: dict[str, tuple[type, type]] = {"vit": (ViT, ViTConfig), "swin": (Swin, SwinConfig)}


@dataclass(frozen=True, kw_only=True)
class Share:
    """One sub-model. classes: those that it owns. pruned of unit: shares of the heads (and of width and hidden units)
    that are gone. device: name of where it runs. cut: what stayed of the split model. bytes: of its weights. flops: of
    one image."""

    classes: tuple[int, ...]
    pruned: int
    unit: int
    device: str
    cut: Cut
    bytes: int
    flops: float


@dataclass(kw_only=True)
class Plan:
    """How a model runs on several devices at once.

    net: all of it as one module, in one process. heads: each sub-model's own classifier: its classes, then "other".
    shares: one per sub-model. devices, budget: the limits that were kept. names: of the classes. dense: bytes, flops
    and parameters of the split model without its classifier. image_shape, image_bytes: of one image on the wire.
    measured: accuracies and latencies found so far, by name.
    """

    net: Fused
    heads: nn.ModuleList
    shares: tuple[Share, ...]
    devices: tuple[Device, ...]
    budget: Budget
    names: tuple[str, ...]
    dense: dict[str, float]
    image_shape: tuple[int, ...]
    image_bytes: int
    fusion_flops: float
    fusion_speed: float = 10e9
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        have = {d.name for d in self.devices}
        for share in self.shares:
            if share.device not in have:
                raise unknown("device of this plan", share.device, have)

    # what runs where -----------------------------------------------------------------------------
    @property
    def used(self) -> tuple[Device, ...]:
        """The devices that hold a sub-model."""
        return tuple(d for d in self.devices if any(s.device == d.name for s in self.shares))

    def on(self, device: str) -> list[int]:
        """Numbers of the sub-models on a device."""
        if device not in {d.name for d in self.devices}:
            raise unknown("device of this plan", device, [d.name for d in self.devices])
        return [i for i, s in enumerate(self.shares) if s.device == device]

    def with_devices(self, devices: Iterable[Device]) -> Plan:
        """The same plan with other figures of the same devices, such as measured speeds."""
        return replace(self, devices=tuple(devices))

    # latency -------------------------------------------------------------------------------------
    def latency(self, batch: int = 1) -> float:
        """Seconds by the latency model: the slowest device, and the fusion."""
        return (
            max(self.device_latency(d.name, batch) for d in self.used) + batch * self.fusion_flops / self.fusion_speed
        )

    def device_latency(self, device: str, batch: int = 1) -> float:
        """Seconds until a device's features are back, by the latency model: its FLOPs / its speed + bytes / its rate,
        and the delay of its link both ways."""
        mine = self.on(device)
        it = next(d for d in self.devices if d.name == device)
        flops = sum(self.shares[i].flops for i in mine)
        return seconds(batch * flops, batch * self.image_bytes, batch * self.feature_bytes(device), it)

    def feature_bytes(self, device: str) -> int:
        """What a device sends back for one image."""
        widths = self.net.fusion.widths
        return sum(widths[i] for i in self.on(device)) * self.net.fusion.fc1.weight.element_size()

    # answers -------------------------------------------------------------------------------------
    def __call__(self, image: Tensor) -> Float[Tensor, "b classes"]:
        """Logits, all sub-models run in this process."""
        with torch.no_grad():
            out: Tensor = self.net(as_float(image))
        return out

    def scores(self, image: Tensor) -> Float[Tensor, "b classes"]:
        """Without the fusion: log-probability that each class has in the sub-model that owns it."""
        with torch.no_grad():
            said = [h(f).log_softmax(-1) for h, f in zip(self.heads, self.net.features(as_float(image)))]
        return joined(said, self.net.groups, len(self.names))

    def evaluate(self, data: Any, *, dense: nn.Module | None = None) -> Report:
        """Accuracies on labelled images (as `split` takes them): of the plan, of its parts without fusion, and of what
        is left when one device does not answer. dense: the split model, to stand beside them."""
        from lynceus.rewrite.split.make import collected

        image, label = collected(data, dense if dense is not None else self.net.parts[0].net)  # type: ignore[arg-type]
        features = [outputs(part, image) for part in self.net.parts]
        heads = [h(f).log_softmax(-1).detach() for h, f in zip(self.heads, features)]

        def right(logits: Tensor) -> float:
            return float((logits.argmax(1) == label).double().mean())

        found: dict[str, float] = {}
        if dense is not None:
            found["dense"] = right(outputs(dense.eval(), image))
        with torch.no_grad():
            found["fused"] = right(self.net.fusion(torch.cat(features, 1)))
            found["no fusion"] = right(joined(heads, self.net.groups, len(self.names)))
            for device in self.used:
                mine = self.on(device.name)
                left = [torch.zeros_like(f) if i in mine else f for i, f in enumerate(features)]
                found[f"without {device.name}"] = right(self.net.fusion(torch.cat(left, 1)))
        self.measured |= {f"accuracy, {k}": v for k, v in found.items()}
        rows = [{"answers of": k, "accuracy": v, "difference": v - found["fused"]} for k, v in found.items()]
        return Report(
            name=f"Accuracy of {self.net.name}",
            rows=rows,
            summary={"images": float(len(label)), **{k: v for k, v in found.items() if "without" not in k}},
            answer=f"{found['fused']:.2%} of {len(label)} images are named rightly by the fused sub-models.",
            notes=["A device that does not answer counts as a feature of zeros."],
        )

    # what it looks like --------------------------------------------------------------------------
    def report(self) -> Report:
        """One row per sub-model: classes, shares pruned, size, FLOPs, device, energy (a model), predicted latency."""
        rows = []
        for i, s in enumerate(self.shares):
            device = next(d for d in self.devices if d.name == s.device)
            rows.append(
                {
                    "sub-model": i,
                    "classes": ", ".join(self.names[c] for c in s.classes),
                    "pruned": f"{s.pruned} of {s.unit}",
                    "kB": s.bytes / 1e3,
                    "of dense": s.bytes / self.dense["bytes"],
                    "MFLOPs": s.flops / 1e6,
                    "device": s.device,
                    "ms": 1e3 * self.device_latency(s.device),
                    "J (model)": energy(Load(bytes=s.bytes, flops=s.flops), device, self.budget),
                }
            )
        slowest = max(self.used, key=lambda d: self.device_latency(d.name))
        alone = self.dense["flops"] / slowest.speed
        total, latency = sum(s.bytes for s in self.shares), self.latency()
        summary = {
            "sub-models": float(len(self.shares)),
            "total kB": total / 1e3,
            "of dense": total / self.dense["bytes"],
            "wire bytes per image": float(sum(self.feature_bytes(d.name) for d in self.used)),
            "predicted ms": 1e3 * latency,
            "times as fast as dense": alone / latency,
            **self.measured,
        }
        notes = [
            "ms is the latency model of the device: FLOPs / speed + bytes / rate + the link's delay both ways + "
            "overhead. Speeds are those given; Cluster.calibrated() measures them.",
            f"Energy is a model, not a measurement: joules per 10^9 FLOPs, for {self.budget.samples} images.",
        ]
        idle = [d.name for d in self.devices if d not in self.used]
        if idle:
            notes.append(f"Without a sub-model: {', '.join(idle)}.")
        return Report(
            name=f"Plan of {self.net.name}",
            rows=rows,
            summary=summary,
            notes=notes,
            answer=(
                f"{len(self.shares)} sub-models on {len(self.used)} devices, the largest "
                f"{max(s.bytes for s in self.shares) / self.dense['bytes']:.1%} of the dense weights; "
                f"{1e3 * latency:.3g} ms predicted, {slowest.name} is the slowest."
            ),
        )

    # disk ----------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Writes plan.json, a .safetensors file per sub-model and one of the fusion; returns the folder."""
        folder = Path(folder)
        described = {
            "format": FORMAT,
            "lynceus": lynceus.__version__,
            "devices": [_finite(to_dict(d)) for d in self.devices],
            "budget": _finite(to_dict(self.budget)),
            "shares": to_dict(self.shares),
            "names": list(self.names),
            "dense": self.dense,
            "image_shape": list(self.image_shape),
            "image_bytes": self.image_bytes,
            "fusion_flops": self.fusion_flops,
            "fusion_speed": self.fusion_speed,
            "measured": self.measured,
            "nets": [describe(part.net) for part in self.net.parts],
            "original": describe(self.net.original),
            "rewrite": to_dict(self.net.rewrite),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, (part, head) in enumerate(zip(self.net.parts, self.heads)):
                state = {f"part.{k}": v for k, v in part.state_dict().items()}
                _write(folder / f"part{i}.safetensors", state | {f"head.{k}": v for k, v in head.state_dict().items()})
            _write(folder / "fusion.safetensors", dict(self.net.fusion.state_dict()))
            text = folder / ".plan.json.part"
            text.write_text(json.dumps(described, indent=1), encoding="utf-8")
            os.replace(text, folder / "plan.json")
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise AdviceError(f"The plan cannot be written to {folder.resolve()}: {error.strerror}.") from None
        return folder

    @staticmethod
    def load(folder: str | Path) -> Plan:
        """The plan that `save` wrote, in eval mode. Nothing is unpickled."""
        folder, d = Path(folder), read(folder)
        loaded = [load_part(folder, i, d) for i in range(len(d["shares"]))]
        by = from_dict(Parts, d["rewrite"], where="plan")
        fusion = load_fusion(folder, d)
        net = Fused([part for part, _ in loaded], by.groups, fusion)
        net.rewrite = by
        with torch.device("meta"):
            net.__dict__["original"] = build(d["original"])
        return Plan(
            net=net.eval(),
            heads=nn.ModuleList([head for _, head in loaded]),
            shares=tuple(from_dict(Share, s, where="share") for s in d["shares"]),
            devices=tuple(from_dict(Device, x, where="device") for x in d["devices"]),
            budget=from_dict(Budget, d["budget"], where="budget"),
            names=tuple(d["names"]),
            dense={k: float(v) for k, v in d["dense"].items()},
            image_shape=tuple(int(n) for n in d["image_shape"]),
            image_bytes=int(d["image_bytes"]),
            fusion_flops=float(d["fusion_flops"]),
            fusion_speed=float(d["fusion_speed"]),
            measured={k: float(v) for k, v in d["measured"].items()},
        )


def read(folder: str | Path) -> dict[str, Any]:
    """plan.json of a folder. MissingError or AdviceError when it is not there or no plan."""
    path = Path(folder) / "plan.json"
    if not path.is_file():
        raise MissingError(
            f"There is no plan in {Path(folder).resolve()} (no plan.json); plan.save(FOLDER) or "
            "`lynceus rewrite split` writes one."
        )
    try:
        d: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if d["format"] > FORMAT:
            raise AdviceError(f"{path} was written by a newer lynceus ({d['lynceus']}): pip install -U lynceus")
        if not d["shares"] or len(d["nets"]) != len(d["shares"]):
            raise ValueError("its sub-models are not all described")
    except AdviceError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise AdviceError(f"{path} is no plan of lynceus, or broken ({error}); make it again.") from None
    return d


def load_part(folder: str | Path, number: int, described: dict[str, Any]) -> tuple[Part, nn.Linear]:
    """A sub-model of a plan's folder and its classifier."""
    state = _read(Path(folder) / f"part{number}.safetensors")
    part = Part(build(described["nets"][number]))
    own = {k.removeprefix("part."): v for k, v in state.items() if k.startswith("part.")}
    _fill(part, own, Path(folder))
    weight = state["head.weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    _fill(head, {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}, Path(folder))
    return part.eval(), head


def load_fusion(folder: str | Path, described: dict[str, Any]) -> Fusion:
    """The fusion of a plan's folder."""
    state = _read(Path(folder) / "fusion.safetensors")
    widths = [Part(_on_meta(net)).width for net in described["nets"]]
    fusion = Fusion(widths, len(described["names"]), described["rewrite"]["ratio"]).to(state["fc1.weight"].dtype)
    _fill(fusion, state, Path(folder))
    return fusion.eval()


def describe(net: Any) -> dict[str, Any]:
    """A backbone, or a classifier on one, as plain values."""
    inner = getattr(net, "backbone", net)
    kind = next(k for k, (cls, _) in KINDS.items() if isinstance(inner, cls))
    dtype = next(inner.parameters()).dtype
    return {
        "kind": kind,
        "config": to_dict(replace(inner.config, num_classes=inner.num_classes)),
        "name": inner.name,
        "mean": list(inner.mean),
        "std": list(inner.std),
        "dtype": str(dtype).removeprefix("torch."),
        "task": None if inner is net else to_dict(net.task),
    }


def build(d: dict[str, Any]) -> nn.Module:
    """What `describe` described, freshly initialised."""
    if d["kind"] not in KINDS:
        raise unknown("kind of network in a plan", d["kind"], KINDS)
    cls, config = KINDS[d["kind"]]
    inner = cls(from_dict(config, d["config"], where="plan"))
    inner.name, inner.mean, inner.std = d["name"], tuple(d["mean"]), tuple(d["std"])
    dtype = getattr(torch, str(d["dtype"]), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        inner = inner.to(dtype)
    if d["task"] is None:
        made: nn.Module = inner
    else:
        made = Classifier(inner, from_dict(Classify, d["task"], where="plan"))
    return made.eval()


def _on_meta(d: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build(d)


def _fill(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [k for k, v in own.items() if state[k].shape != v.shape]
    if wrong:
        raise AdviceError(
            f"The weights in {folder} do not fit its plan.json: {len(wrong)} entries differ, first {wrong[0]}."
        )
    module.load_state_dict(state)


def _write(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, part)
    os.replace(part, path)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingError(f"{path.parent.resolve()} has no {path.name}; the copy of the plan is not whole.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdviceError(f"{path} is not a whole .safetensors file ({error}); make or copy the plan again.") from None


def _finite(d: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what is unlimited is left out."""
    return {k: v for k, v in d.items() if v != float("inf") and v is not None}
