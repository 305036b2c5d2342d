"""Certified bounds on what a network answers over a whole region: intervals (IBP) and linear relaxation (CROWN).

IBP: On the Effectiveness of Interval Bound Propagation, arXiv 1810.12715. CROWN: Efficient Neural Network Robustness
Certification with General Activation Functions, NeurIPS 2018, arXiv 1811.00866; CROWN-IBP: ICLR 2020, arXiv 1906.06316;
on general graphs: LiRPA, NeurIPS 2020, arXiv 2002.12920. Figures to compare with: Verified-Intelligence/auto_LiRPA
(BSD-3-Clause); written from the papers.

The bounds are computed in float64 and hold for the network in real arithmetic; a float32 run of it differs by rounding,
so `verify` asks for a margin above 1e-6 of the logits' scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.subject import Subject
from lynceus.trust.bounds_graph import trace
from lynceus.trust.bounds_ops import Convolution, Input, Network, Node, Relu
from lynceus.trust.bounds_patch import Held, Patch, has_windows, joined
from lynceus.trust.bounds_patch import step as window_step

Method = Literal["ibp", "crown-ibp", "crown"]
METHODS = ("ibp", "crown-ibp", "crown")
ENTRIES = 1 << 19  # numbers that one backward pass holds per step: more leaves the cache
PROBE = 64  # neurons of the first pass on patches
FEW = 4  # places of a map that has no windows worth it


@dataclass(frozen=True)
class Box:
    """All points between `lower` and `upper`, each (b, *shape), float64."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        low, high = (torch.as_tensor(v).detach().to(torch.float64) for v in (self.lower, self.upper))
        if low.shape != high.shape or low.ndim < 2:
            raise AdviceError(
                f"A box has two corners of one shape (b, ...), not {tuple(low.shape)} and {tuple(high.shape)}."
            )
        if not bool((low <= high).all()):
            raise AdviceError("A box's lower corner must not be above its upper one, and neither may be NaN.")
        object.__setattr__(self, "lower", low)
        object.__setattr__(self, "upper", high)

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def centre(self) -> Tensor:
        return (self.lower + self.upper) / 2

    def pick(self, at: Tensor) -> Box:
        """The boxes `at` of the batch."""
        return Box(self.lower[at], self.upper[at])

    def least(self, c: Tensor) -> Tensor:
        """The smallest c . x over the box: c (b, s, *shape) -> (b, s)."""
        c = c.flatten(2)
        centre, radius = (v.flatten(1).unsqueeze(-1) for v in (self.centre, (self.upper - self.lower) / 2))
        return (c @ centre - c.abs() @ radius).squeeze(-1)

    def contains(self, x: Tensor) -> Tensor:
        """(b,) bool: is x, (b, *shape), in the box? Exact in float64."""
        x = x.to(torch.float64)
        return ((x >= self.lower) & (x <= self.upper)).flatten(1).all(1)


@dataclass(frozen=True)
class Ball:
    """All points within `eps` of `centre` (b, *shape) in the L-inf or L2 norm, and within `clip` where it is given.

    eps: one number, or (b,). norm: 2 or math.inf. An L-inf ball is a box: `region.box()`."""

    centre: Tensor
    eps: float | Tensor
    norm: float = math.inf
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        centre = torch.as_tensor(self.centre).detach().to(torch.float64)
        if centre.ndim < 2:
            raise AdviceError(f"A ball's centre is a batch (b, ...), not {tuple(centre.shape)}; give x[None].")
        eps = torch.as_tensor(self.eps, dtype=torch.float64, device=centre.device).expand(len(centre))
        if not bool((eps >= 0).all()) or not bool(torch.isfinite(centre).all()):
            raise AdviceError("A ball has a finite centre and a radius that is not negative.")
        if float(self.norm) not in (2.0, math.inf):
            raise AdviceError(f"Balls are of norm 2 or inf, not {self.norm}.")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise AdviceError(f"clip is (lowest, highest) value, not {self.clip}.")
        object.__setattr__(self, "centre", centre)
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "norm", float(self.norm))

    def __len__(self) -> int:
        return len(self.centre)

    def box(self) -> Box:
        """The smallest box around the ball (the ball itself for norm inf), clipped."""
        eps = self._side(self.centre)
        low, high = self.centre - eps, self.centre + eps
        return Box(low, high) if self.clip is None else Box(low.clamp(*self.clip), high.clamp(*self.clip))

    def pick(self, at: Tensor) -> Ball:
        """The balls `at` of the batch."""
        return Ball(self.centre[at], torch.as_tensor(self.eps)[at], self.norm, self.clip)

    def _side(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.eps).reshape(-1, *(1,) * (like.ndim - 1))

    def least(self, c: Tensor) -> Tensor:
        """The smallest c . x over the ball, (b, s, *shape) -> (b, s); a number below it where an L2 ball is clipped."""
        if self.norm == math.inf:
            return self.box().least(c)
        flat = c.flatten(2)
        least = (flat @ self.centre.flatten(1).unsqueeze(-1)).squeeze(-1) - self._side(flat[..., 0]) * flat.norm(dim=-1)
        return least if self.clip is None else torch.maximum(least, self.box().least(c))

    def contains(self, x: Tensor) -> Tensor:
        """(b,) bool: is x, (b, *shape), in the ball and the clip? Computed in float64."""
        inside = self.box().contains(x)
        if self.norm == math.inf:
            return inside
        return inside & ((x.to(torch.float64) - self.centre).flatten(1).norm(dim=1) <= torch.as_tensor(self.eps))


Region = Box | Ball


@dataclass(kw_only=True)
class Bounds:
    """What is certain over each region of the batch.

    lower, upper: of every logit, (b, k). margin: lower bounds of logit[label] - logit[j] for the other classes j in
      increasing order, (b, k - 1); None without labels. hidden: node -> bounds of what a ReLU reads.
    """

    lower: Tensor
    upper: Tensor
    margin: Tensor | None = None
    hidden: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def safe(self) -> Tensor:
        """(b,) bool: every margin is certainly positive."""
        if self.margin is None:
            raise AdviceError("Without labels there are no margins; call bounds(..., label=labels).")
        return (self.margin > 0).all(1)

    @property
    def unstable(self) -> Tensor:
        """(b,) how many ReLUs may be on either side of zero."""
        counts = [((low < 0) & (high > 0)).flatten(1).sum(1) for low, high in self.hidden.values()]
        return torch.stack(counts).sum(0) if counts else torch.zeros(len(self.lower), dtype=torch.long)


@torch.no_grad()
def bounds(
    model: Subject | nn.Module | Network,
    region: Region,
    *,
    method: Method = "crown",
    label: Tensor | int | None = None,
    intersect: bool = True,
) -> Bounds:
    """Certified lower and upper bounds of every logit over each region of a batch, and of the margins of `label`.

    model: a subject, a module, or the network that `trace` made of one (so that it is read only once).
    region: `Box` or `Ball` over the model's own input: pixels in [0, 1] for a subject.
    method: "ibp": intervals. "crown-ibp": intervals inside, a backward pass for the output. "crown": backward passes
      for every layer.
    label: (b,), or one class for all.
    intersect: keeps the tighter of the interval and the backward bound wherever both are known; False gives the plain
      method of the papers.
    Raises AdviceError naming the layer when the network does something that bounds do not know.
    """
    if method not in METHODS:
        raise unknown("method", str(method), METHODS)
    shape = tuple((region.lower if isinstance(region, Box) else region.centre).shape[1:])
    network = trace(model, shape)
    if network.input_shape != shape:
        raise AdviceError(f"{network.name} was traced for samples of {network.input_shape}, the region is of {shape}.")
    propagation = Propagation(network, region, method=method, intersect=intersect)
    classes = network.nodes[-1].size
    eye = torch.eye(classes, dtype=network.dtype, device=network.device)
    low, high = propagation.logits(eye)
    margin = None
    if label is not None:
        margin = propagation.margins(margin_rows(label, len(region), classes).to(network.device))
    return Bounds(lower=low, upper=high, margin=margin, hidden=propagation.hidden)


def margin_rows(label: Tensor | int, batch: int, classes: int) -> Float[Tensor, "b s k"]:
    """Rows that turn logits into logit[label] - logit[j], j != label in increasing order: (b, k - 1, k)."""
    label = torch.as_tensor(label).reshape(-1).expand(batch).cpu()
    if bool((label < 0).any()) or bool((label >= classes).any()):
        wrong = int(label[(label < 0) | (label >= classes)][0])
        raise AdviceError(f"Label {wrong} is outside the {classes} classes of the model (0 to {classes - 1}).")
    eye = torch.eye(classes, dtype=torch.float64)
    every = torch.arange(classes).expand(batch, -1)
    others = every[every != label[:, None]].reshape(batch, classes - 1)
    return eye[label][:, None] - eye[others]


class Late(Exception):
    """The time for bounds is over."""


class Propagation:
    """Bounds of one network over one batch of regions. `hidden`: node whose output a ReLU reads -> (lower, upper).

    known: bounds of hidden nodes that are certain already (of a larger region), to be intersected with.
    kernel_rows: an L2 ball seen through a padded convolution gets the norm of the whole kernel at the border too, as
      auto_LiRPA does; False is exact there.
    until: a moment (time.perf_counter) after which `Late` is raised.
    """

    def __init__(
        self,
        network: Network,
        region: Region,
        *,
        method: Method = "crown",
        intersect: bool = True,
        known: dict[int, tuple[Tensor, Tensor]] | None = None,
        kernel_rows: bool = False,
        until: float = math.inf,
    ):
        self.until = until
        self.network, self.region, self.method, self.intersect = network, region, method, intersect
        self.kernel_rows = kernel_rows
        self.batch = len(region)
        self.hidden: dict[int, tuple[Tensor, Tensor]] = {}
        self.intervals: dict[int, tuple[Tensor, Tensor]] = {}
        self._lines: dict[tuple[int, float], Tensor] = {}
        self._widest = 0
        self._read = {network.nodes[i].inputs[0] for i in network.relus}
        self._propagate(known or {})

    def _propagate(self, known: dict[int, tuple[Tensor, Tensor]]) -> None:
        region = self.region
        box = region if isinstance(region, Box) else region.box()
        squares: dict[int, tuple[Tensor, Tensor]] = {}  # of L2 balls: centre and squared reach, coordinates apart
        if isinstance(region, Ball) and region.norm == 2:
            eps = torch.as_tensor(region.eps).reshape(-1, *(1,) * (region.centre.ndim - 1))
            squares[0] = (region.centre, eps.square().expand_as(region.centre))
        self.intervals[0] = (box.lower, box.upper)
        for index, node in enumerate(self.network.nodes):
            if not isinstance(node.op, Input):
                self.intervals[index] = node.op.interval(*(self.intervals[i] for i in node.inputs))
                if len(node.inputs) == 1 and node.inputs[0] in squares and node.op.affine:
                    self._round(index, squares)
            if index in known:
                low, high = self.intervals[index]
                self.intervals[index] = (torch.maximum(low, known[index][0]), torch.minimum(high, known[index][1]))
            if index in self._read:
                self._refine(index)

    def _round(self, index: int, squares: dict[int, tuple[Tensor, Tensor]]) -> None:
        """An L2 ball through one affine operator: the half-width is eps times the norm of the operator's rows."""
        node = self.network.nodes[index]
        centre, square = squares[node.inputs[0]]
        centre, reach = node.op.run(centre), node.op.squared(square)
        if self.kernel_rows and isinstance(node.op, Convolution) and not node.op.rest[3]:
            rows = node.op.weight.square().flatten(1).sum(1)
            reach = (square.amax() * rows).reshape(-1, *(1,) * (reach.ndim - 2)).expand_as(reach)
        if node.op.axis_aligned:
            squares[index] = (centre, reach)
        half = reach.clamp_min(0).sqrt()
        low, high = self.intervals[index]
        ball = self.region
        if isinstance(ball, Ball) and ball.clip is None:
            self.intervals[index] = (centre - half, centre + half)
        else:
            self.intervals[index] = (torch.maximum(low, centre - half), torch.minimum(high, centre + half))

    def _refine(self, index: int) -> None:
        """Bounds of what a ReLU reads: from the intervals, or by a backward pass where the method wants it."""
        low, high = self.intervals[index]
        if self.method == "crown" and not self._exact(index):
            need = (low < 0) & (high > 0) if self.intersect else torch.ones_like(low, dtype=torch.bool)
            image, neuron = need.expand(self.batch, *low.shape[1:]).flatten(1).nonzero(as_tuple=True)
            if len(image):
                below, above = self._hidden_bounds(index, image, neuron)
                shape = low.shape
                low, high = low.flatten(1).clone(), high.flatten(1).clone()
                if self.intersect:
                    below = torch.maximum(below, low[image, neuron])
                    above = torch.maximum(torch.minimum(above, high[image, neuron]), below)  # rounding
                low[image, neuron], high[image, neuron] = below, above
                low, high = low.reshape(shape), high.reshape(shape)
                self.intervals[index] = (low, high)
        self.hidden[index] = (low, high)
        for node in self.network.nodes:
            if isinstance(node.op, Relu) and node.inputs == (index,):
                self._lines[index, node.op.slope] = _relaxed(low, high, node.op.slope)

    def _exact(self, index: int) -> bool:
        """The interval is exact already: at most one affine operator of the input."""
        plain = isinstance(self.region, Box) or self.region.norm == math.inf or self.region.clip is None
        return index == 0 or (self.network.nodes[index].inputs == (0,) and plain)

    def _hidden_bounds(self, index: int, image: Tensor, neuron: Tensor) -> tuple[Tensor, Tensor]:
        """Backward bounds of single neurons of single images: (p,) each."""
        node = self.network.nodes[index]
        offset = self.network.offset(index)
        patches = has_windows(node.op) and len(node.shape) > 2 and node.shape[-1] * node.shape[-2] > FEW
        self._widest = 0 if patches else max(n.size for n in self.network.nodes[: index + 1])
        below, above = [], []
        start = 0
        while start < len(image):
            if time.perf_counter() > self.until:
                raise Late
            step = max(1, ENTRIES // (2 * self._widest)) if self._widest else PROBE  # patches say how wide they get
            at, rows = image[start : start + step], neuron[start : start + step]
            start += step
            held = self._patched(node, rows) if patches else self._whole(node, rows)
            constant = torch.zeros(len(at), 2, dtype=self.network.dtype, device=self.network.device)
            if offset is not None:
                value = offset.flatten()[rows]
                constant = torch.stack([value, -value], 1)
            least = self._concrete(*self._pull(held, constant, at=at), at=at)
            below.append(least[:, 0])
            above.append(-least[:, 1])
        return torch.cat(below), torch.cat(above)

    def _whole(self, node: Node, neurons: Tensor) -> dict[int, Held]:
        """Plus and minus these neurons of `node`, as coefficients of what it reads."""
        rows, place = neurons.unique(return_inverse=True)
        c = torch.zeros(len(rows), node.size, dtype=self.network.dtype, device=self.network.device)
        c[torch.arange(len(rows)), rows] = 1
        held: dict[int, Held] = {}
        for source, part in zip(node.inputs, node.op.back(c.reshape(-1, *node.shape))):
            if part is not None:
                both = torch.stack([part, -part], 1)[place]
                held[source] = both if source not in held else joined(held[source], both, part.shape[1:])
        return held

    def _patched(self, node: Node, neurons: Tensor) -> dict[int, Held]:
        """The same on the windows that each neuron reads."""
        side = node.shape[-2:]
        channel, top = neurons // (side[0] * side[1]), neurons // side[1] % side[0]
        c = torch.zeros(len(neurons), node.size // (side[0] * side[1]), dtype=self.network.dtype, device=neurons.device)
        c[torch.arange(len(neurons)), channel] = 1
        own = Patch(c=c.reshape(-1, 1, *node.shape[:-2], 1, 1), top=top, left=neurons % side[1])
        held: dict[int, Held] = {}
        for source, part in zip(node.inputs, window_step(node, own)):
            if part is not None:
                both = replace(part, c=torch.cat([part.c, -part.c], 1))
                shape = self.network.nodes[source].shape
                held[source] = both if source not in held else joined(held[source], both, shape)
        return held

    def backward(self, index: int, c: Tensor, *, to_input: bool = True) -> Tensor:
        """Lower bounds (b, s) of c . (node's output), c (b or 1, s, *shape), by a backward pass through the relaxed
        network. `to_input` False stops at the first ReLUs and takes their intervals."""
        return self._concrete(*self.pull(index, c, to_input=to_input)).expand(self.batch, -1)

    def pull(self, index: int, c: Tensor, *, to_input: bool = True) -> tuple[dict[int, Tensor], Tensor]:
        """The linear lower bound itself: coefficients of the input (or of where it stopped) and constants (b, s)."""
        constant = torch.zeros(c.shape[:2], dtype=c.dtype, device=c.device)
        ends, constant = self._pull({index: c}, constant, to_input=to_input)
        return {k: v for k, v in ends.items() if isinstance(v, Tensor)}, constant

    def _concrete(self, ends: Mapping[int, Held], least: Tensor, *, at: Tensor | None = None) -> Tensor:
        """The smallest value of a linear bound; `at`: which region each row belongs to."""
        for node, value in ends.items():
            if isinstance(value, Patch):
                assert at is not None
                least = least + _seen(self.region, value, at).least(value.c)
                continue
            if node == 0:
                region = self.region if at is None else self.region.pick(at)
            else:
                low, high = self.intervals[node]
                region = Box(low, high) if at is None else Box(low[at], high[at])
            least = least + region.least(value)
        return least

    def _pull(
        self, held: dict[int, Held], constant: Tensor, *, to_input: bool = True, at: Tensor | None = None
    ) -> tuple[dict[int, Held], Tensor]:
        nodes = self.network.nodes
        ends: dict[int, Held] = {}
        for index in range(max(held), -1, -1):
            if index not in held:
                continue
            c = held.pop(index)
            node = nodes[index]
            if isinstance(c, Patch) and not _narrow(c, node):
                c = c.whole(node.shape)
            size = c.c[0, 0].numel() if isinstance(c, Patch) else c[0, 0].numel()
            self._widest = max(self._widest, size)
            if isinstance(c, Patch) and isinstance(node.op, Input):
                c = c.masked(node.shape)
            if isinstance(node.op, Input) or (isinstance(node.op, Relu) and not to_input):
                ends[index] = c
                continue
            parts: tuple[Held | None, ...]
            if isinstance(node.op, Relu):
                lines = self._lines[node.inputs[0], node.op.slope]
                if isinstance(c, Patch):
                    lines = c.read(lines, at)
                elif at is not None:
                    lines = lines[at]
                rest, extra = _relaxed_back(c.c if isinstance(c, Patch) else c, lines)
                constant = constant + extra
                parts = (replace(c, c=rest) if isinstance(c, Patch) else rest,)
            else:
                offset = self.network.offset(index)
                if isinstance(c, Patch):
                    if offset is not None:
                        there = c.read(offset, None).flatten(1).unsqueeze(-1)
                        constant = constant + (c.c.flatten(2) @ there).squeeze(-1)
                    parts = window_step(node, c)
                else:
                    if offset is not None:
                        constant = constant + c.flatten(2) @ offset.flatten()
                    back = node.op.back(c.reshape(-1, *node.shape))
                    parts = tuple(None if p is None else p.reshape(*c.shape[:2], *p.shape[1:]) for p in back)
            for source, part in zip(node.inputs, parts):
                if part is not None:
                    held[source] = part if source not in held else joined(held[source], part, nodes[source].shape)
        return ends, constant

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of rows (s, k) times the logits, (b, s)."""
        last = len(self.network.nodes) - 1
        if self.method == "ibp":
            low, high = (v.flatten(1) for v in self.intervals[last])
            if not torch.equal(rows, torch.eye(len(rows), dtype=rows.dtype, device=rows.device)):
                raise AdviceError("Intervals bound the logits themselves; ask `margins` for combinations.")
            return low, high
        c = torch.cat([rows, -rows])[None]
        least = self.backward(last, c)
        low, high = least[:, : len(rows)], -least[:, len(rows) :]
        if self.intersect:
            low = torch.maximum(low, self.intervals[last][0].flatten(1))
            high = torch.minimum(high, self.intervals[last][1].flatten(1))
        return low, high

    def margins(self, rows: Tensor) -> Tensor:
        """Lower bounds of rows (b, s, k) times the logits, folded into the last affine operators, (b, s)."""
        last = len(self.network.nodes) - 1
        least = self.backward(last, rows, to_input=self.method != "ibp")
        if self.intersect and self.method != "ibp":
            least = torch.maximum(least, self.backward(last, rows, to_input=False))
        return least


def _narrow(patch: Patch, node: Node) -> bool:
    """Is the window smaller than the map, and can the operator go back through it?"""
    h, w = patch.c.shape[-2:]
    inside = h * w < node.shape[-2] * node.shape[-1]
    return inside and (isinstance(node.op, (Input, Relu)) or has_windows(node.op))


def _seen(region: Region, patch: Patch, at: Tensor) -> Region:
    """What the windows of rows see of their regions."""
    if isinstance(region, Box):
        return Box(patch.read(region.lower, at), patch.read(region.upper, at))
    return Ball(patch.read(region.centre, at), torch.as_tensor(region.eps)[at], region.norm, region.clip)


def _relaxed_back(c: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (n, s, *shape) of a ReLU's output as those of its input, and the constants (n, s) that this costs:
    the line below where they are positive, the chord where they are not."""
    below, turn, above = (v.unsqueeze(1) for v in lines.unbind(1))
    negative = c.clamp_max(0)
    extra = (negative.flatten(2) @ above.flatten(2).transpose(1, 2)).squeeze(-1)
    return (c * below).addcmul_(negative, turn), extra


def _relaxed(low: Tensor, high: Tensor, leak: float) -> Tensor:
    """Lines around max(z, leak z) for z in [low, high], (b, 3, *shape): the slope below (1 or the leak), what the
    chord above it has more, and the chord's height."""
    on, off = low >= 0, high <= 0
    unstable = ~(on | off)
    one, least = torch.ones_like(low), torch.full_like(low, leak)  # bare numbers would be float32 here
    chord = torch.where(
        unstable, (high - leak * low) / torch.where(unstable, high - low, one), torch.where(on, one, least)
    )
    above = torch.where(unstable, high - chord * high, torch.zeros_like(high))
    below = torch.where(on | (unstable & (high > -low)), one, least)
    return torch.stack([below, chord - below, above], 1)
