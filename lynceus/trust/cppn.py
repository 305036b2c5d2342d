"""Pattern-producing networks: small graphs that compute a picture from the coordinates of its pixels, at any size.

Compositional pattern-producing networks: Stanley, Genetic Programming and Evolvable Machines 8 (2007) 131-162. As
genomes of fooling images: Nguyen, Yosinski & Clune, CVPR 2015, arXiv 1412.1897. Reference code:
Evolving-AI-Lab/fooling, GPL of its sferes part; written anew from the papers.

Inputs are x, y, the distance to the centre and 1; a node is a weighted sum and one of four functions. There is one
output for grey pictures, or three: hue, lightness and saturation. An output o becomes the 8-bit value trunc(255 |o|).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from lynceus.core import rng
from lynceus.core.errors import AdviceError, unknown
from lynceus.trust.evolution import polynomial_mutation
from lynceus.trust.pixels import Hue, check_hue, check_shape, check_shares, hls_to_rgb

INPUTS = ("x", "y", "d", "1")
FUNCTIONS = ("sine", "sigmoid", "gaussian", "linear")
FORMULAS = ("sin({})", "2 / (1 + exp(-({}))) - 1", "exp(-({}) ** 2)", "min(max({}, -3), 3) / 3")
GAIN = 20.0  # a gene g in [0, 1] is the weight 20 g - 10
BLOCK = 1 << 18  # values of all nodes held at once
Coordinates = Literal["raw", "unit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternConfig:
    """How pattern networks vary and what they see.

    rate: chance that a weight mutates; eta: of the polynomial steps. function_rate: chance that a node's function is
    drawn anew. add, delete, split: chances that a connection is added, deleted, split by a new node. remove: chance
    that a hidden node is removed.
    coordinates: "raw" gives pixel indices (the authors'), "unit" -1 to 1: smoother pictures. hue: see `hls_to_rgb`.
    """

    rate: float = 0.1
    eta: float = 15.0
    function_rate: float = 0.1
    add: float = 0.5
    delete: float = 0.3
    split: float = 0.5
    remove: float = 0.2
    coordinates: Coordinates = "raw"
    hue: Hue = "wrapped"

    def __post_init__(self) -> None:
        check_shares(self, ("rate", "function_rate", "add", "delete", "split", "remove"))
        check_hue(self.hue)
        if self.coordinates not in ("raw", "unit"):
            raise unknown("kind of coordinates", str(self.coordinates), ("raw", "unit"))


@dataclass(eq=False, slots=True)
class Pattern:
    """One genome. Nodes are the four inputs, then the outputs, then hidden ones; connections go source -> target."""

    outputs: int
    function: np.ndarray  # (nodes,) index into FUNCTIONS; the inputs' are not used
    source: np.ndarray  # (connections,)
    target: np.ndarray
    gene: np.ndarray  # (connections,) in [0, 1]

    @property
    def first_hidden(self) -> int:
        return len(INPUTS) + self.outputs

    @property
    def weight(self) -> np.ndarray:
        return np.asarray(GAIN * self.gene - GAIN / 2)

    def copy(self) -> Pattern:
        return Pattern(self.outputs, self.function.copy(), self.source, self.target, self.gene.copy())


def random_pattern(outputs: int, draw: np.random.Generator) -> Pattern:
    """Every input connected to every output; no hidden node."""
    inputs = len(INPUTS)
    return Pattern(
        outputs,
        draw.integers(len(FUNCTIONS), size=inputs + outputs),
        np.tile(np.arange(inputs), outputs),
        np.repeat(np.arange(inputs, inputs + outputs), inputs),
        draw.random(inputs * outputs),
    )


# mutation ----------------------------------------------------------------------------------------------------------
def mutate(patterns: Sequence[Pattern], config: PatternConfig, draw: np.random.Generator) -> list[Pattern]:
    """A changed copy of each: weights, functions, then connections added, deleted, split, then a node removed."""
    made = [p.copy() for p in patterns]
    genes = np.concatenate([p.gene for p in made]) if made else np.zeros(0)
    chosen = draw.random(len(genes)) < config.rate
    steps = torch.from_numpy(draw.random(int(chosen.sum())))
    genes[chosen] = polynomial_mutation(torch.from_numpy(genes[chosen]), steps, eta=config.eta).numpy()
    functions = np.concatenate([p.function for p in made]) if made else np.zeros(0, int)
    fresh = draw.random(len(functions)) < config.function_rate
    functions[fresh] = draw.integers(len(FUNCTIONS), size=int(fresh.sum()))
    decisions = draw.random((len(made), 4)) < (config.add, config.delete, config.split, config.remove)
    edge = node = 0
    for pattern, (add, delete, split, remove) in zip(made, decisions.tolist()):
        pattern.gene = genes[edge : edge + len(pattern.gene)]
        pattern.function = functions[node : node + len(pattern.function)]
        edge, node = edge + len(pattern.gene), node + len(pattern.function)
        if add:
            _add(pattern, draw)
        if delete:
            _delete(pattern, draw)
        if split:
            _split(pattern, draw)
        if remove:
            _remove(pattern, draw)
    return made


def _add(p: Pattern, draw: np.random.Generator) -> None:
    """A connection that closes no circle; one that is there already is refused."""
    inputs = len(INPUTS)
    sources = np.r_[:inputs, p.first_hidden : len(p.function)]
    source = int(sources[draw.integers(len(sources))])
    barred = ancestors(p, source)
    barred[:inputs] = True
    barred[source] = True
    targets = np.flatnonzero(~barred)
    target, gene = int(targets[draw.integers(len(targets))]), draw.random()
    if not bool(((p.source == source) & (p.target == target)).any()):
        p.source, p.target = np.append(p.source, source), np.append(p.target, target)
        p.gene = np.append(p.gene, gene)


def ancestors(p: Pattern, node: int) -> np.ndarray:
    """(nodes,) bool: those from which connections lead to `node`."""
    feeds: dict[int, list[int]] = {}
    for s, t in zip(p.source.tolist(), p.target.tolist()):
        feeds.setdefault(t, []).append(s)
    found = np.zeros(len(p.function), dtype=bool)
    todo = list(feeds.get(node, ()))
    while todo:
        at = todo.pop()
        if not found[at]:
            found[at] = True
            todo.extend(feeds.get(at, ()))
    return found


def _delete(p: Pattern, draw: np.random.Generator) -> None:
    if len(p.source):
        _keep(p, np.arange(len(p.source)) != draw.integers(len(p.source)))


def _split(p: Pattern, draw: np.random.Generator) -> None:
    """A node in the middle of a connection; both halves get its weight."""
    if not len(p.source):
        return
    at, new = int(draw.integers(len(p.source))), len(p.function)
    source, target, gene = p.source[at], p.target[at], p.gene[at]
    _keep(p, np.arange(len(p.source)) != at)
    p.function = np.append(p.function, draw.integers(len(FUNCTIONS)))
    p.source, p.target = np.append(p.source, [source, new]), np.append(p.target, [new, target])
    p.gene = np.append(p.gene, [gene, gene])


def _remove(p: Pattern, draw: np.random.Generator) -> None:
    hidden = len(p.function) - p.first_hidden
    if hidden:
        gone = p.first_hidden + int(draw.integers(hidden))
        _keep(p, (p.source != gone) & (p.target != gone))
        p.source, p.target = p.source - (p.source > gone), p.target - (p.target > gone)
        p.function = np.delete(p.function, gone)


def _keep(p: Pattern, kept: np.ndarray) -> None:
    p.source, p.target, p.gene = p.source[kept], p.target[kept], p.gene[kept]


# rendering ---------------------------------------------------------------------------------------------------------
def grid(
    size: tuple[int, int], *, native: tuple[int, int] | None = None, coordinates: Coordinates = "raw"
) -> Float64[Tensor, "4 p"]:
    """x, y, distance to the centre and 1 of every pixel, row by row. A picture of another size than the `native` one
    shows the same scene: its pixels lie between the same corners."""
    h, w = native or size
    unit_y, unit_x = (torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1).double() for n in size)
    y, x = (v.flatten() for v in torch.meshgrid(unit_y, unit_x, indexing="ij"))
    distance = (x.square() + y.square()).sqrt()
    if coordinates == "raw":
        x, y = (x + 1) / 2 * (w - 1), (y + 1) / 2 * (h - 1)
        if size == (h, w):  # exactly whole numbers
            x, y = x.round(), y.round()
    return torch.stack([x, y, distance, torch.ones_like(x)])


def values(patterns: Sequence[Pattern], pixels: Float64[Tensor, "4 p"]) -> Float64[Tensor, "b o p"]:
    """The outputs of all patterns at all pixels, level by level: one gather-and-add and four functions per level for
    the whole population. Nodes that lead to no output are not computed."""
    plan = _Plan(patterns)
    count = pixels.shape[1]
    out = torch.empty(len(patterns) * patterns[0].outputs, count, dtype=torch.float64)
    block = max(64, BLOCK // plan.rows)
    for start in range(0, count, block):
        part = pixels[:, start : start + block]
        table = torch.empty(plan.rows, part.shape[1], dtype=torch.float64)
        table[: len(INPUTS)] = part
        for first, edges, offsets, groups in plan.levels:
            sums = F.embedding_bag(
                plan.source[edges], table[:first], offsets, mode="sum", per_sample_weights=plan.weight[edges]
            )
            for function, a, b in groups:
                _apply(function, sums[a - first : b - first], table[a:b])
        out[:, start : start + block] = table[plan.out]
    return out.view(len(patterns), -1, count)


def _apply(function: int, sums: Tensor, out: Tensor) -> None:
    if function == 0:
        torch.sin(sums, out=out)
    elif function == 1:
        torch.tanh(sums.mul_(0.5), out=out)  # 2 / (1 + e^-p) - 1
    elif function == 2:
        torch.exp(sums.square_().neg_(), out=out)
    else:
        torch.div(sums.clamp_(-3, 3), 3, out=out)


class _Plan:
    """A population as one graph: rows (the inputs, then every node in use by level and function) and their edges."""

    def __init__(self, patterns: Sequence[Pattern]):
        inputs, outputs = len(INPUTS), patterns[0].outputs
        sizes = np.array([len(p.function) for p in patterns])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(starts[:-1], [len(p.source) for p in patterns])
        source = np.concatenate([p.source for p in patterns]) + shift
        target = np.concatenate([p.target for p in patterns]) + shift
        weight = np.concatenate([p.weight for p in patterns])
        function = np.concatenate([p.function for p in patterns])
        local = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        used = (local >= inputs) & (local < inputs + outputs)
        while True:
            before = int(used.sum())
            used[source[used[target]]] = True
            if int(used.sum()) == before:
                break
        kept = used[target]
        source, target, weight = source[kept], target[kept], weight[kept]
        level = np.where(local < inputs, 0, 1)
        while True:
            deeper = level.copy()
            np.maximum.at(deeper, target, level[source] + 1)
            if np.array_equal(deeper, level):
                break
            level = deeper
        nodes = np.flatnonzero(used & (local >= inputs))
        order = nodes[np.lexsort((function[nodes], level[nodes]))]
        row = np.where(local < inputs, local, -1)
        row[order] = inputs + np.arange(len(order))
        edge_order = np.argsort(row[target], kind="stable")
        rows_of_edges = row[target][edge_order]
        self.rows = inputs + len(order)
        self.source = torch.from_numpy(row[source][edge_order])
        self.weight = torch.from_numpy(weight[edge_order])
        self.out = torch.from_numpy(row[(starts[:-1, None] + inputs + np.arange(outputs)).ravel()])
        ends = np.searchsorted(rows_of_edges, np.arange(self.rows + 1))  # first edge of each row
        self.levels = []
        levels, functions = level[order], function[order]
        cuts = inputs + np.flatnonzero(np.r_[True, levels[1:] != levels[:-1], True])
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
            kinds = functions[first - inputs : last - inputs]
            marks = first + np.flatnonzero(np.r_[True, kinds[1:] != kinds[:-1], True])
            groups = [(int(kinds[a - first]), a, b) for a, b in zip(marks[:-1].tolist(), marks[1:].tolist())]
            edges = slice(int(ends[first]), int(ends[last]))
            offsets = torch.from_numpy(ends[first:last] - ends[first])
            self.levels.append((first, edges, offsets, groups))


def picture(
    values: Float64[Tensor, "b o p"], size: tuple[int, int], *, channels: int, hue: Hue
) -> UInt8[Tensor, "b c h w"]:
    """Outputs as 8-bit images: cut off, not rounded."""
    bits = (values.abs() * 255).clamp(0, 255).to(torch.uint8).view(len(values), -1, *size)
    return hls_to_rgb(bits, hue=hue) if bits.shape[1] == 3 else bits.expand(-1, channels, -1, -1)


# the encoding ------------------------------------------------------------------------------------------------------
class Patterns:
    """Populations are lists of `Pattern`. There is no recombination: a pair is copied in random order.

    grey: one output, shown in all channels."""

    def __init__(self, shape: tuple[int, int, int], config: PatternConfig | None = None, *, grey: bool = False):
        self.shape = check_shape(shape)
        self.config = config or PatternConfig()
        self.outputs = 1 if grey or shape[0] == 1 else 3
        self.pixels = grid(self.shape[1:], coordinates=self.config.coordinates)

    def describe(self) -> str:
        return f"patterns {self.shape} outputs={self.outputs} {self.config}"

    def initial(self, count: int, seed: int) -> list[Pattern]:
        draw = rng.numpy_generator(seed, "patterns")
        return [random_pattern(self.outputs, draw) for _ in range(count)]

    def offspring(
        self, parents: list[Pattern], pairs: Int64[Tensor, "n 2"], generation: int, seed: int
    ) -> list[Pattern]:
        draw = rng.numpy_generator(seed, "children")
        order = draw.permuted(pairs.numpy(), axis=1).ravel().tolist()
        return mutate([parents[i] for i in order], self.config, draw)

    def render(self, population: Sequence[Pattern]) -> UInt8[Tensor, "b c h w"]:
        made = values(population, self.pixels)
        return picture(made, self.shape[1:], channels=self.shape[0], hue=self.config.hue)

    def select(self, populations: Sequence[list[Pattern]], index: Int64[Tensor, " n"]) -> list[Pattern]:
        together = [p for population in populations for p in population]
        return [together[i] for i in index.tolist()]

    def expression(self, pattern: Pattern) -> Expression:
        return Expression(pattern, self.shape, self.config.coordinates, self.config.hue)

    def pack(self, population: Sequence[Pattern]) -> dict[str, np.ndarray]:
        return {
            "nodes": np.array([len(p.function) for p in population]),
            "edges": np.array([len(p.source) for p in population]),
            **{
                name: np.concatenate([getattr(p, name) for p in population])
                for name in ("function", "source", "target", "gene")
            },
        }

    def unpack(self, packed: dict[str, np.ndarray]) -> list[Pattern]:
        nodes, edges = np.cumsum(packed["nodes"])[:-1], np.cumsum(packed["edges"])[:-1]
        parts = [np.split(packed["function"], nodes)]
        parts += [np.split(packed[name], edges) for name in ("source", "target", "gene")]
        made = [Pattern(self.outputs, *part) for part in zip(*parts)]
        for p in made:
            _check(p)
        return made


# what leaves the search --------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, slots=True)
class Expression:
    """A pattern that draws itself at any size. `shape` (c, h, w) is the one at which it was evolved."""

    pattern: Pattern
    shape: tuple[int, int, int]
    coordinates: Coordinates = "raw"
    hue: Hue = "wrapped"

    def render(self, height: int | None = None, width: int | None = None) -> UInt8[Tensor, "c h w"]:
        """The picture; without a size as it was evolved, without `width` a square."""
        if height is None:
            size = (self.shape[1], self.shape[2])
        else:
            size = (height, width if width is not None else height)
        if min(size) < 1:
            raise AdviceError(f"A picture has at least one pixel each way, not {size}.")
        pixels = grid(size, native=self.shape[1:], coordinates=self.coordinates)
        return picture(values([self.pattern], pixels), size, channels=self.shape[0], hue=self.hue)[0]

    def formula(self) -> str:
        """The network as lines of arithmetic, valid in Python with `from math import sin, exp`: x, y, d -> outputs."""
        p = self.pattern
        names = [*INPUTS, *(("h", "l", "s") if p.outputs == 3 else ("grey",))]
        names += [f"n{i}" for i in range(len(p.function) - len(names))]
        lines, done = [], set(range(len(INPUTS)))
        wanted = _used(p)
        while todo := [n for n in wanted if n not in done]:
            for node in todo:
                into = np.flatnonzero(p.target == node)
                if not all(int(p.source[e]) in done for e in into):
                    continue
                terms = [f"{float(p.weight[e])!r} * {names[p.source[e]]}" for e in into]
                lines.append(f"{names[node]} = {FORMULAS[p.function[node]].format(' + '.join(terms) or '0')}")
                done.add(node)
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything needed to draw it elsewhere, as JSON."""
        p = self.pattern
        nodes: list[dict[str, Any]] = []
        for node in range(len(INPUTS), len(p.function)):
            into = np.flatnonzero(p.target == node)
            nodes.append(
                {
                    "node": node,
                    "function": FUNCTIONS[p.function[node]],
                    "inputs": [[int(p.source[e]), float(p.gene[e])] for e in into],
                }
            )
        about = {"inputs": list(INPUTS), "outputs": p.outputs, "gain": GAIN}
        frame = {"shape": list(self.shape), "coordinates": self.coordinates, "hue": self.hue}
        return json.dumps({"pattern": about, "frame": frame, "nodes": nodes, "formula": self.formula()})

    @classmethod
    def from_json(cls, text: str) -> Expression:
        """What `to_json` wrote. Raises AdviceError for anything else, circles included."""
        try:
            data = json.loads(text)
            outputs, frame, nodes = int(data["pattern"]["outputs"]), data["frame"], data["nodes"]
            function = [0] * len(INPUTS) + [FUNCTIONS.index(n["function"]) for n in nodes]
            edges = [(int(s), n["node"], float(g)) for n in nodes for s, g in n["inputs"]]
            source, target, gene = (np.array(part) for part in zip(*edges)) if edges else (np.zeros(0, int),) * 3
            pattern = Pattern(outputs, np.array(function), source, target, gene.astype(float))
            if [n["node"] for n in nodes] != list(range(len(INPUTS), len(function))):
                raise ValueError("nodes are not numbered through")
            _check(pattern)
            shape = check_shape(tuple(frame["shape"]))
            check_hue(frame["hue"])
            if frame["coordinates"] not in ("raw", "unit"):
                raise ValueError("unknown coordinates")
            return cls(pattern, shape, frame["coordinates"], frame["hue"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise AdviceError(f"This is no pattern of lynceus ({error}); give what Expression.to_json wrote.") from None


def _used(p: Pattern) -> list[int]:
    """Nodes (no inputs) that lead to an output, outputs included."""
    used = np.zeros(len(p.function), dtype=bool)
    for output in range(len(INPUTS), p.first_hidden):
        used |= ancestors(p, output)
        used[output] = True
    return [int(n) for n in np.flatnonzero(used) if n >= len(INPUTS)]


def _check(p: Pattern) -> None:
    """Raises ValueError for a graph that cannot be computed."""
    count = len(p.function)
    whole = all(np.issubdtype(part.dtype, np.integer) for part in (p.function, p.source, p.target))
    if not whole or p.outputs not in (1, 3) or count < p.first_hidden:
        raise ValueError("no graph")
    if len(p.function) and (p.function.min() < 0 or p.function.max() >= len(FUNCTIONS)):
        raise ValueError("an unknown function")
    if len(p.source):
        if min(p.source.min(), p.target.min()) < 0 or max(p.source.max(), p.target.max()) >= count:
            raise ValueError("a connection to no node")
        outputs = (p.source >= len(INPUTS)) & (p.source < p.first_hidden)
        if p.target.min() < len(INPUTS) or bool(outputs.any()):
            raise ValueError("a connection into an input or out of an output")
        if not np.isfinite(p.gene).all():
            raise ValueError("a weight that is no number")
    if any(ancestors(p, n)[n] for n in range(p.first_hidden, count)):
        raise ValueError("a circle")
