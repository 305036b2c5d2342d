"""The delta of an adapted, pruned model: what was learned, and masks as bits. One base model and many small deltas
serve many tasks.

Paper: Hedegaard et al., Structured Pruning Adapters, Pattern Recognition 2024, arXiv 2211.10155
Code: LukasHedegaard/structured-pruning-adapters (its listing of adapter parameters compares whole names, so that it is
empty for a network; here every layer is walked, and norms are kept); written from the paper
"""

from __future__ import annotations

import copy
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core.config import from_dict, to_dict
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.files import write_atomic
from lynceus.rewrite.adapters.adapt import DIGEST, Adapt, Fuse, base_digest
from lynceus.rewrite.adapters.layers import Adapted, SPLoPALinear
from lynceus.rewrite.adapters.prune import KeepChannels, settle, sign
from lynceus.rewrite.dependency import resize_
from lynceus.rewrite.swap import rewrites_of

FORMAT = 1
ABOUT = "about"  # the plain values, as compressed JSON: names of parameters repeat themselves
LARGEST = 2**24  # bytes of it that are read
NEEDED = ("adapt", "masks", "counts", "widths", "parameters", "base")
ANEW = "copy it again, or write it anew with delta(model).save(FILE)."


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What turns a base model into a task's model.

    state: learned tensors by the names of the adapted model's state dict, at their pruned shapes, and the masks:
    "mask.N" (bits, 8 to a byte) and "blocks.NAME" (bits of kept blocks). about: plain values: how it was adapted, what
    the masks cut, and a digest of the base.
    """

    state: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Learned numbers, without masks and statistics of norms."""
        return int(self.about["parameters"])

    def save(self, path: str | Path) -> Path:
        """Writes one .safetensors file."""
        from safetensors.torch import save

        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / "delta.safetensors"
        state = {n: t.detach().cpu().contiguous() for n, t in self.state.items()}
        text = zlib.compress(json.dumps(self.about, separators=(",", ":")).encode(), 9)
        state[ABOUT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return write_atomic(path, save(state, metadata={"format": "lynceus-delta"}))

    @staticmethod
    def load(path: str | Path) -> Delta:
        """Reads such a file, or the delta.safetensors in a folder."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        file = path / "delta.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise MissingError(f"There is no delta at {str(path)!r} (looked at {file.resolve()}).")
        try:
            with safe_open(file, framework="pt") as opened:
                known = (opened.metadata() or {}).get("format") == "lynceus-delta"
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise AdviceError(f"{file.resolve()} is not a whole .safetensors file ({error}).") from None
        if not known or ABOUT not in state:
            raise AdviceError(
                f"{file} is no delta; delta(model).save(FILE) writes one. A whole model is load_model({str(file)!r})."
            )
        try:
            text = zlib.decompressobj().decompress(state.pop(ABOUT).numpy().tobytes(), LARGEST)
            about = dict(json.loads(text))
            newer = int(about.get("format", 0)) > FORMAT
        except (zlib.error, ValueError, TypeError):
            raise AdviceError(f"{file.resolve()} is a damaged delta: {ANEW}") from None
        if newer:
            raise AdviceError(f"{file} was written by a newer lynceus; upgrade: pip install -U lynceus")
        lacking = [k for k in NEEDED if k not in about]
        lacking += [f"mask.{k}" for k in range(len(about.get("masks", ()))) if f"mask.{k}" not in state]
        if lacking:
            raise AdviceError(f"{file.resolve()} is a damaged delta, it lacks {', '.join(lacking)}: {ANEW}")
        return Delta(state=state, about=about)


@dataclass(frozen=True, kw_only=True)
class ApplyDelta:
    """Rewrite: a base model and a delta file give the task's model, fused into plain layers.

    delta: the file that `delta(model).save` or `lynceus train specialise` wrote. The model must be the base that it was
    made from. The result is saved with what the delta holds; the file is not needed again.
    """

    delta: Path

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """The task's model, in eval mode. example: an input, run once to see it work."""
        made = apply_delta(model, Delta.load(self.delta))
        if example is not None:
            with torch.no_grad():
                made(example)
        return made


def delta(model: nn.Module) -> Delta:
    """What an adapted (and perhaps pruned) model learned, as a small state dict with masks.

    model: what Adapt made, trained and pruned since. AdviceError for a fused model, or one without adapters."""
    inner: Any = getattr(model, "backbone", model)
    steps = rewrites_of(model)
    at = next((k for k, s in enumerate(steps) if isinstance(s, Adapt)), None)
    if at is None or not hasattr(inner, DIGEST):
        raise AdviceError(
            f"{type(model).__name__} was not adapted by Adapt, so there is no delta: "
            "delta(PruneChannels(ratio=0.5)(Adapt(rank=8)(model, x), x)). Take it before fusing."
        )
    plan = KeepChannels()
    for step in steps[at + 1 :]:
        if not isinstance(step, KeepChannels):
            raise AdviceError(f"{type(step).__name__} came after the adapters; a delta knows adapters and masks only.")
        plan = step
    state: dict[str, Tensor] = {}
    shared: dict[int, str] = {}
    parameters = 0
    blocks = {f"{n}.adapter.pos_weights": (n, m) for n, m in model.named_modules() if isinstance(m, SPLoPALinear)}
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) in shared:
            continue
        shared[id(p)] = name
        value = p.detach()
        layer, module = blocks.get(name, ("", None))
        if module is not None and module.block_mask is not None:
            value = value[:, module.block_mask]
            state[f"blocks.{layer}"] = torch.from_numpy(np.packbits(module.block_mask.cpu().numpy()))
        state[name] = value.cpu().clone()
        parameters += value.numel()
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            state[name] = value.detach().cpu().clone()
    places = []
    for k, (text, names) in enumerate(plan.masks.items()):
        size, _, bits = text.partition(":")
        state[f"mask.{k}"] = torch.frombuffer(bytearray.fromhex(bits), dtype=torch.uint8).clone()
        places.append([int(size), list(names)])
    about: dict[str, Any] = {
        "format": FORMAT, "adapt": to_dict(steps[at]), "masks": places, "counts": dict(plan.counts),
        "widths": list(plan.widths), "parameters": parameters,
        "base": bytes(getattr(inner, DIGEST).tolist()).hex(),
    }  # fmt: skip
    if hasattr(model, "task"):
        about["task"] = {"name": model.task.name, "options": to_dict(model.task)}  # type: ignore[union-attr]
    return Delta(state=state, about=about)


def apply_delta(base: nn.Module, change: Delta, *, fused: bool = True) -> nn.Module:
    """The task's model: `base` pruned and adapted as the delta says, fused into plain layers, in eval mode.

    base: stays as it is; what the delta was made from: its weights must be the same. A task of other classes gets the
    classifier that the delta holds. fused: False leaves the adapters in, to train on.
    AdviceError when the delta belongs to another base."""
    about = change.about
    made: Any = _for_task(base, about)
    options = dict(about["adapt"])
    adapt = from_dict(Adapt, options, where="the delta")
    made = adapt(made)
    inner: Any = getattr(made, "backbone", made)
    own = bytes(base_digest(inner).tolist()).hex()
    if own != about["base"]:
        raise AdviceError(
            f"This delta belongs to another base: its digest is {about['base'][:12]}, that of this "
            f"{getattr(inner, 'name', type(inner).__name__)} is {own[:12]}. Give apply_delta the model, with the "
            "weights, that was adapted: it stays as it was, so any copy of it will do."
        )
    if about["masks"] or about["counts"]:
        masks = {}
        for k, (size, names) in enumerate(about["masks"]):
            bits = change.state[f"mask.{k}"].numpy().tobytes().hex()
            masks[f"{size}:{bits}"] = tuple(names)
        plan = KeepChannels(masks=masks, counts=dict(about["counts"]), widths=tuple(about["widths"]))
        selection = plan.selection(made)
        flags = {n: p.requires_grad for n, p in made.named_parameters()}
        selection.apply_(made)
        for name, p in made.named_parameters():
            p.requires_grad_(flags[name])
        settle(made, plan.widths)
        sign(made, plan)
    lacking = [n for n, p in made.named_parameters() if p.requires_grad and n not in change.state]
    if lacking:
        raise AdviceError(
            f"The delta lacks {len(lacking)} of the learned tensors, such as {lacking[0]}; it is damaged: {ANEW}"
        )
    _learned(made, change)
    made.eval()
    return Fuse()(made) if fused else made


def _for_task(base: Any, about: dict[str, Any]) -> nn.Module:
    """A copy of the base, with the task's classifier where it has another."""
    task = about.get("task")
    if task is None:
        return copy.deepcopy(base)
    from lynceus.tasks import task_class

    wanted = from_dict(task_class(task["name"]), task["options"], where=task["name"])
    if getattr(base, "task", None) == wanted:
        return copy.deepcopy(base)
    backbone = copy.deepcopy(getattr(base, "backbone", base))
    made: nn.Module = wanted.build(backbone)
    return made


def _learned(model: nn.Module, change: Delta) -> None:
    """Writes the learned tensors into an adapted, pruned model, by name."""
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    with torch.no_grad():
        for name, value in change.state.items():
            if name.startswith(("mask.", "blocks.")):
                continue
            if name not in tensors:
                raise AdviceError(f"The delta holds {name!r}, which this base has nothing of; it is of another model.")
            own = tensors[name]
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            bits = change.state.get(f"blocks.{name.removesuffix('.adapter.pos_weights')}")
            if bits is not None and name.endswith(".adapter.pos_weights"):
                grid = tuple(own.shape[1:])
                mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=grid[0] * grid[1]).astype(bool)).view(grid)
                whole: Any = model.get_submodule(name.removesuffix(".adapter.pos_weights"))
                whole.prune_blocks(mask)
                own.zero_()
                own[:, mask.to(own.device)] = value.to(own)
            elif own.shape != value.shape and not isinstance(layer, Adapted) and own.requires_grad:
                own.data = value.to(own)
                resize_(layer)
            elif own.shape != value.shape:
                raise AdviceError(
                    f"The delta's {name} is {tuple(value.shape)}, the base's {tuple(own.shape)}; it is of another "
                    "model."
                )
            else:
                own.copy_(value)
