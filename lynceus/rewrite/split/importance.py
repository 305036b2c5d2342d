"""How much a class needs each unit of a transformer: KL(p || q), p what the whole network says of the class's images,
q what it says with one residual channel, head or hidden unit gone; averaged over the images, in double precision.

A channel that is gone is gone from the norms too: they run over the channels that are left, as they do once it is cut.
Three ways to the same number, and two baselines: "exact" runs the whole network once per unit; "fast" gives the same
numbers, many units in one batch and from the block on where the unit sits; "taylor" is the second-order estimate
1/2 sum_y p_y (d log q_y / d gate)^2 (the first order of a KL at its minimum is 0), its sum over classes by random signs
s_y: the mean of (sum_y s_y sqrt(p_y) d log q_y / d gate)^2, a few backward passes for all units.
"magnitude" is the norm of a unit's weights, "random" a draw.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import unknown
from lynceus.core.rng import generator
from lynceus.rewrite.split.cut import Anatomy, Axis, Cut, Key, anatomy, axes, even, whole
from lynceus.rewrite.split.part import Part

How = Literal["taylor", "fast", "exact", "magnitude", "random"]
HOWS = ("taylor", "fast", "exact", "magnitude", "random")
PASSES = 4  # draws of signs per image in "taylor"; no more than there are classes


class Gates:
    """Masks over units, read by the gated layers: key -> (1 or b, units)."""

    def __init__(self, parts: Anatomy):
        self.parts = parts
        self.masks: dict[Key, Tensor] = {}

    def on(self, axis: Axis, x: Tensor) -> Tensor | None:
        """The mask of an axis, spread over x (b or b windows, ..., axis); None where all stays."""
        kind, i = axis
        mask = self.masks.get(({"4c": "c", "a": "h"}.get(kind, kind), i))
        if mask is None:
            return None
        if kind == "4c":
            mask = mask.repeat(1, 4)
        elif kind == "a":
            mask = mask.repeat_interleave(self.parts.head_dims[i], 1)
        if len(mask) > 1 and len(x) != len(mask):  # windows, image by image
            mask = mask.repeat_interleave(len(x) // len(mask), 0)
        return mask.view(len(mask), *([1] * (x.ndim - 2)), -1)


class GatedNorm(nn.Module):
    """LayerNorm over the channels whose gate is open; the others leave as 0."""

    gates: Gates

    def __init__(self, norm: nn.LayerNorm, gates: Gates, axis: Axis):
        super().__init__()
        self.norm, self.axis = norm, axis
        self.__dict__["gates"] = gates

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gates.on(self.axis, x)
        if gate is None:
            out: Tensor = self.norm(x)
            return out
        count = gate.sum(-1, keepdim=True)
        centred = x - (x * gate).sum(-1, keepdim=True) / count
        variance = (centred.square() * gate).sum(-1, keepdim=True) / count
        y = centred * (variance + self.norm.eps).rsqrt() * self.norm.weight
        return (y if self.norm.bias is None else y + self.norm.bias) * gate


class GatedInput(nn.Module):
    """A linear layer whose closed inputs are 0."""

    gates: Gates

    def __init__(self, layer: nn.Module, gates: Gates, axis: Axis):
        super().__init__()
        self.layer, self.axis = layer, axis
        self.__dict__["gates"] = gates

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gates.on(self.axis, x)
        out: Tensor = self.layer(x if gate is None else x * gate)
        return out


class Gated:
    """A copy of a part and its head in which channels, heads and hidden units can be closed, per image."""

    def __init__(self, part: Part, head: nn.Linear):
        self.part = copy.deepcopy(part).eval().requires_grad_(False)
        self.head = copy.deepcopy(head).requires_grad_(False)
        inner = self.part.backbone
        self.parts = anatomy(inner)
        self.gates = Gates(self.parts)
        rules = axes(inner)
        last = len(self.parts.widths) - 1
        for name, module in list(inner.named_modules()):
            if isinstance(module, nn.LayerNorm) and name + ".weight" in rules and rules[name + ".weight"]:
                inner.set_submodule(name, GatedNorm(module, self.gates, rules[name + ".weight"][0]))  # type: ignore[arg-type]
            elif name.endswith((".attn.proj", ".mlp.fc2")):
                inner.set_submodule(name, GatedInput(module, self.gates, rules[name + ".weight"][1]))  # type: ignore[arg-type]
        self.last: Axis = ("c", last)
        self.inner = inner

    def begin(self, image: Tensor) -> Tensor:
        """Prepared images to what enters the first step."""
        if hasattr(self.inner, "embed"):
            return self.inner.embed(image)
        x = self.inner.patch_embed(image)
        if self.inner.config.ape:
            x = x + self.inner._position(x.shape[1], x.shape[2])
        return x

    def step(self, i: int, x: Tensor) -> Tensor:
        out: Tensor = self.inner.get_submodule(self.parts.steps[i])(x)
        return out

    def finish(self, x: Tensor) -> Float[Tensor, "b k"]:
        """Log-probabilities, in double, of what leaves the last step."""
        features = self.inner.norm(x) if hasattr(self.inner, "embed") else x.permute(0, 3, 1, 2)
        vector = self.part.pooled(features)
        gate = self.gates.masks.get(self.last)
        if gate is not None:  # a network without a last norm reads the stream itself
            vector = vector * gate.repeat(1, vector.shape[1] // gate.shape[1])
        return self.head(vector).double().log_softmax(-1)

    def run(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        for i in range(first, len(self.parts.steps) if last is None else last):
            x = self.step(i, x)
        return x

    def __call__(self, image: Tensor, masks: dict[Key, Tensor]) -> Float[Tensor, "b k"]:
        """Log-probabilities of prepared images under these masks."""
        self.gates.masks = masks
        with torch.enable_grad():  # nothing takes gradients; the kernels and pieces of inference would pass gates by
            return self.finish(self.run(self.begin(image)))


class Probe:
    """Importance of the units of one network, on one set of images.

    part, head: the network. image: as it takes them. reference: log-probabilities (n, k) in double that the whole
    network says of them, over the classes of `head`. batch: images in one pass. Units are closed on top of what
    `closed` holds already, so that heads are judged after channels are chosen.
    """

    def __init__(self, part: Part, head: nn.Linear, image: Tensor, reference: Tensor, *, batch: int = 256):
        self.net, self.plain = Gated(part, head), part.backbone
        self.parts = self.net.parts
        with torch.no_grad():
            self.image = part.prepared(image).to(head.weight.dtype)
        self.reference, self.batch = reference.double(), batch
        self.closed: dict[Key, Tensor] = {}

    def keep(self, key: Key, kept: Any) -> None:
        """Closes all other units of a key."""
        mask = torch.zeros(1, self.parts.size(key), dtype=self.image.dtype, device=self.image.device)
        mask[0, list(kept)] = 1
        self.closed[key] = mask

    def _open(self, key: Key) -> Tensor:
        like = self.image
        start = self.closed.get(key)
        return torch.ones(1, self.parts.size(key), dtype=like.dtype, device=like.device) if start is None else start

    def _kl(self, rows: slice, log_q: Tensor) -> Tensor:
        log_p = self.reference[rows]
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.image), self.batch):
            yield slice(start, start + self.batch)

    def kl(self) -> float:
        """KL(reference || the network with what is closed), averaged over the images."""
        return float(self._mean(self.closed))

    def _mean(self, masks: dict[Key, Tensor]) -> Tensor:
        return torch.cat([self._kl(r, self.net(self.image[r], masks)) for r in self._chunks()]).mean()

    def exact(self, key: Key) -> Float[Tensor, " units"]:
        """One pass through the whole network per unit."""
        start, out = self._open(key), []
        for unit in range(self.parts.size(key)):
            mask = start.clone()
            mask[0, unit] = 0
            out.append(self._mean({**self.closed, key: mask}))
        return torch.stack(out)

    def fast(self, key: Key) -> Float[Tensor, " units"]:
        """The same numbers: what lies before the unit is run once, and many units go through in one batch."""
        count, start = self.parts.size(key), self._open(key)
        first = 0 if key[0] == "c" else self.parts.steps.index(self.parts.blocks[key[1]])
        total = torch.zeros(count, dtype=torch.float64, device=self.image.device)
        with torch.enable_grad():
            for rows in self._chunks():
                self.net.gates.masks = dict(self.closed)
                x = self.net.begin(self.image[rows])
                # the embedding's own norm reads the channels too
                image = self.image[rows] if key[0] == "c" else None
                x = x if image is not None else self.net.run(x, 0, first)
                n = len(x)
                for some in torch.arange(count, device=x.device).split(max(1, self.batch // n)):
                    mask = start.repeat(len(some), 1)
                    mask[torch.arange(len(some)), some] = 0
                    self.net.gates.masks = {**self.closed, key: mask.repeat_interleave(n, 0)}
                    if image is not None:
                        entered = self.net.begin(image.repeat(len(some), 1, 1, 1))
                    else:
                        entered = x.repeat(len(some), *[1] * (x.ndim - 1))
                    log_q = self.net.finish(self.net.run(entered, first)).view(len(some), n, -1)
                    log_p = self.reference[rows]
                    total[some] += (log_p.exp() * (log_p - log_q)).sum((-2, -1))
        return total / len(self.image)

    def taylor(self, keys: list[Key], *, seed: int = 0) -> dict[Key, Float[Tensor, " units"]]:
        """The second-order estimate for all units of `keys` at once."""
        draw = generator(seed, "signs")
        total = {k: torch.zeros(self.parts.size(k), dtype=torch.float64, device=self.image.device) for k in keys}
        with torch.enable_grad():
            for rows in self._chunks():
                n = len(self.image[rows])
                gates = {k: self._open(k).expand(n, -1).clone().requires_grad_(True) for k in keys}
                self.net.gates.masks = {**self.closed, **gates}
                log_q = self.net.finish(self.net.run(self.net.begin(self.image[rows])))
                weight, count = self.reference[rows].exp().sqrt(), log_q.shape[1]
                passes = min(PASSES, count)
                for j in range(passes):
                    if passes == count:  # few classes: one by one, exactly
                        signed, share = weight[:, j] * log_q[:, j], 0.5
                    else:
                        signs = torch.randint(0, 2, weight.shape, generator=draw).to(weight) * 2 - 1
                        signed, share = (signs * weight * log_q).sum(1), 0.5 / passes
                    grads = torch.autograd.grad(signed.sum(), list(gates.values()), retain_graph=j + 1 < passes)
                    for key, grad in zip(keys, grads):
                        total[key] += share * grad.double().square().sum(0)
        return {k: v / len(self.image) for k, v in total.items()}

    def scores(self, keys: list[Key], how: How, *, seed: int = 0) -> dict[Key, Float[Tensor, " units"]]:
        """Importance of every unit of `keys`; the least important go first."""
        if how == "taylor":
            return self.taylor(keys, seed=seed)
        if how == "magnitude":
            return {k: magnitude(self.plain, k) for k in keys}
        if how == "random":
            return {k: torch.rand(self.parts.size(k), generator=generator(seed, "units", *k)).double() for k in keys}
        if how not in HOWS:
            raise unknown("measure of importance", how, HOWS)
        return {k: self.fast(k) if how == "fast" else self.exact(k) for k in keys}


def magnitude(backbone: nn.Module, key: Key) -> Float[Tensor, " units"]:
    """Norm of all weights that belong to each unit of a plain (ungated) backbone."""
    parts = anatomy(backbone)
    count = parts.size(key)
    total = torch.zeros(count, dtype=torch.float64)
    rules = axes(backbone)
    for name, value in backbone.named_parameters():
        for dim, axis in enumerate(rules.get(name, ())):
            if axis is None or ({"4c": "c", "a": "h", "qkv": "h"}.get(axis[0], axis[0]), axis[1]) != key:
                continue
            rows = value.detach().double().cpu().movedim(dim, 0).reshape(value.shape[dim], -1).square().sum(1)
            # qkv: 3 x heads x dims; a: heads x dims; 4c: 4 x channels
            rows = rows.view(-1, count, parts.head_dims[axis[1]]).sum(-1) if axis[0] in ("qkv", "a") else rows
            total += rows.view(-1, count).sum(0)
    return total.sqrt()


def choose(probe: Probe, pruned: int, how: How, *, seed: int = 0, turns: int = 4) -> Cut:
    """What stays when `pruned` shares go: channels first, then heads, then hidden units, each judged with what went
    before it closed. Each kind
    goes in `turns` steps, and what is left is measured again before each."""
    parts = probe.parts
    widths, heads, hidden = even(parts, pruned, probe.net.inner.config.mlp_ratio)
    cut = whole(parts)
    for kind, name, counts in (("c", "channels", widths), ("h", "heads", heads), ("m", "hidden", hidden)):
        keys = parts.keys(kind)
        wanted = {k: n for k, n in zip(keys, counts) if n < parts.size(k)}
        chosen: dict[Key, tuple[int, ...]] = {k: tuple(range(parts.size(k))) for k in keys}
        if wanted:
            for turn in range(1, turns + 1):
                for key, score in probe.scores(list(wanted), how, seed=seed).items():
                    left = torch.tensor(chosen[key])
                    count = parts.size(key) - round((parts.size(key) - wanted[key]) * turn / turns)
                    best = score[left].argsort(descending=True, stable=True)[:count].cpu()
                    chosen[key] = tuple(sorted(left[best].tolist()))
                for key in wanted:
                    probe.keep(key, chosen[key])
        for key, kept in chosen.items():
            if len(kept) < parts.size(key):
                probe.keep(key, kept)
        cut = replace(cut, **{name: tuple(chosen[k] for k in keys)})
    return cut
