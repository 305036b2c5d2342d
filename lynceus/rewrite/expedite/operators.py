"""Token clustering and token reconstruction: two operators without parameters around a span of transformer blocks.

Paper: Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, NeurIPS 2022,
arXiv 2210.01035
Code: Expedit-LargeScale-Vision-Transformer/Expedit-Segmenter and Expedit-SAM
Licence: MIT and Apache-2.0

`cluster` makes few centres out of the tokens of a map, as superpixels are made of pixels; what follows runs on those.
`Clustering.rebuild` gives every token back, from the refined centres that it resembled most.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pooling_matrix
from lynceus.layers.fused import without_autocast

Normalise = Literal["sum", "l2"]
Route = Literal["auto", "dense", "gather"]
LARGE = 2**25  # entries of the table tokens x centres from which "auto" gathers, and tokens are rebuilt in pieces


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Centres of the tokens of a map, and what is needed to give the tokens back.

    tokens: as they were. centres: row by row of the grid `size`. temperature: one per image, on squared distances.
    """

    tokens: Float[Tensor, "b n c"]
    centres: Float[Tensor, "b m c"]
    temperature: Float[Tensor, "#b 1 1"]
    size: tuple[int, int]

    def labels(self) -> Int[Tensor, "b n"]:
        """The nearest of all centres, for every token."""
        return squared_distances(self.tokens, self.centres).argmin(-1)

    def weights(
        self, neighbours: int = 20, normalise: Normalise = "sum", temperature: float | None = None
    ) -> Float[Tensor, "b n m"]:
        """How much each token takes of each centre: see `reconstruction_weights`. temperature: None for that of the
        clustering."""
        return reconstruction_weights(
            self.tokens,
            self.centres,
            temperature=self.temperature if temperature is None else temperature,
            neighbours=neighbours,
            normalise=normalise,
        )

    def rebuild(
        self,
        refined: Float[Tensor, "b m d"],
        neighbours: int = 20,
        normalise: Normalise = "sum",
        temperature: float | None = None,
    ) -> Float[Tensor, "b n d"]:
        """All tokens, out of what became of the centres. Large tables are made some thousand tokens at a time."""
        pieces = _pieces(self.tokens, self.centres)
        parts = [self] if pieces == 1 else [replace(self, tokens=some) for some in self.tokens.chunk(pieces, 1)]
        found = [p.weights(neighbours, normalise, temperature).to(refined.dtype) @ refined for p in parts]
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def cluster(
    tokens: Float[Tensor, "b n c"],
    size: tuple[int, int],
    clusters: tuple[int, int],
    *,
    iterations: int = 5,
    window: int = 5,
    temperature: float | Literal["auto"] = 0.02,
    scale: float = 1.0,
    route: Route = "auto",
) -> Clustering:
    """Soft k-means from a grid of means, every token seeing the centres of nearby cells only.

    tokens: of a map of `size` rows and columns, row by row. clusters: rows and columns of centres. iterations: 0 leaves
    the means. window: odd; a token sees the centres of that many rows and columns of cells around its own.
    temperature: factor on squared distances; "auto" takes, image by image, `scale` / mean squared distance of the
    tokens to their nearest mean. route: "dense" makes the table tokens x centres, "gather" one of window**2 columns,
    which takes less memory; "auto" gathers where the table would be huge. No gradient flows through the weights.
    """
    if window < 1 or window % 2 == 0:
        raise AdviceError(f"window is an odd number of cells, not {window}; try window={window + 1}.")
    if route not in ("auto", "dense", "gather"):
        raise AdviceError(f"route is 'auto', 'dense' or 'gather', not {route!r}.")
    kind = torch.promote_types(tokens.dtype, torch.float32)
    with without_autocast(tokens):
        x = tokens.to(kind)
        centres = means(x, size, clusters)
        if temperature == "auto":
            nearest = squared_distances(x.detach(), centres.detach()).amin(-1).mean(-1)
            tau = (scale / nearest.clamp(min=torch.finfo(kind).tiny * 1e4))[:, None, None]
        else:
            tau = x.new_full((1, 1, 1), float(temperature))
        rows, columns = (cells(n, m, x) for n, m in zip(size, clusters))
        gather = route == "gather" or (route == "auto" and _huge(x, centres, window))
        step = _gathered if gather else _dense
        for i in range(iterations):
            with torch.no_grad():
                share = step(x, centres, tau, rows, columns, clusters, window)
            # only the last step's products are differentiated: the others are read by detached weights alone
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == iterations - 1):
                centres = share(x)
            del share  # one table at a time
    return Clustering(tokens=tokens, centres=centres.to(tokens.dtype), temperature=tau, size=clusters)


def reconstruction_weights(
    tokens: Float[Tensor, "b n c"],
    centres: Float[Tensor, "b m c"],
    *,
    temperature: float | Float[Tensor, "#b 1 1"] = 0.02,
    neighbours: int = 20,
    normalise: Normalise = "sum",
) -> Float[Tensor, "b n m"]:
    """exp(-temperature * squared distance) of every token to its `neighbours` nearest centres (ties with the last
    included; negative: all), each row divided by its sum or, as in the authors' code, by its length."""
    if normalise not in ("sum", "l2"):
        raise AdviceError(f"normalise is 'sum' or 'l2', not {normalise!r}.")
    kind = torch.promote_types(tokens.dtype, torch.float32)
    with without_autocast(tokens):
        table = squared_distances(tokens.to(kind), centres.to(kind))
        count = table.shape[-1]
        if 0 < neighbours < count:
            last = table.detach().topk(neighbours, largest=False, sorted=False).values.amax(-1, keepdim=True)
            far = table.detach() > last
        else:
            far = None
        # the nearest centre gets weight 1 whatever the scale, so that no row is empty: normalising undoes the factor
        table = in_place(torch.Tensor.sub_, torch.sub, table, table.detach().amin(-1, keepdim=True))
        table = in_place(torch.Tensor.mul_, torch.mul, table, -1 * temperature)
        weights = in_place(torch.Tensor.exp_, torch.exp, table)
        if far is not None:
            weights = in_place(torch.Tensor.masked_fill_, torch.masked_fill, weights, far, 0)
        if normalise == "sum":
            total = weights.sum(-1, keepdim=True)
        else:
            total = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        return in_place(torch.Tensor.div_, torch.div, weights, total)


def in_place(inner: Callable[..., Tensor], outer: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """One of two forms of an operation: the first overwrites x, where no gradient is to come back through it."""
    return (outer if torch.is_grad_enabled() and x.requires_grad else inner)(x, *args)


def naive_unpool(refined: Float[Tensor, "b m c"], labels: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Every token takes over its nearest centre: the rival of `Clustering.rebuild`."""
    return refined.gather(1, labels[..., None].expand(-1, -1, refined.shape[-1]))


def means(tokens: Float[Tensor, "b n c"], size: tuple[int, int], clusters: tuple[int, int]) -> Float[Tensor, "b m c"]:
    """The means over the cells of a grid (adaptive average pooling), row by row."""
    x = tokens.unflatten(1, size)
    if torch.compiler.is_exporting():  # as two products, which every runtime has
        for axis in (0, 1):
            matrix = pooling_matrix(size[axis], clusters[axis], tokens)
            x = torch.tensordot(matrix, x, dims=([1], [axis + 1])).movedim(0, axis + 1)
        return x.flatten(1, 2)
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), clusters).flatten(2).transpose(1, 2)


def cells(size: int, count: int, like: Tensor) -> Int[Tensor, " n"]:
    """The cell that each place of a line belongs to: the line of cells, resized to the nearest."""
    line = torch.arange(count, device=like.device, dtype=like.dtype)
    return F.interpolate(line[None, None], size=size, mode="nearest")[0, 0].long()


def squared_distances(tokens: Float[Tensor, "b n c"], centres: Float[Tensor, "b m c"]) -> Float[Tensor, "b n m"]:
    """|x - s|^2 by expansion, never negative."""
    table = tokens @ centres.transpose(1, 2)
    table = in_place(torch.Tensor.mul_, torch.mul, table, -2)
    table = in_place(torch.Tensor.add_, torch.add, table, tokens.square().sum(-1, keepdim=True))
    table = in_place(torch.Tensor.add_, torch.add, table, centres.square().sum(-1)[:, None])
    return in_place(torch.Tensor.clamp_, torch.clamp, table, 0)


class _Share:
    """A step's weights q, ready to average tokens: sum over p of q_ip x_p / sum over p of q_ip."""

    def __init__(self, weights: Float[Tensor, "b n m"]):
        self.weights = weights

    def __call__(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        total = self.weights.sum(1)[..., None].clamp(min=1e-16)
        return self.weights.transpose(1, 2) @ x / total


class _NearShare:
    """The same, of weights for the centres around each token's cell alone, a column per move from cell to centre."""

    def __init__(self, weights: Float[Tensor, "b n k"], near: Near, count: int):
        self.weights, self.near, self.count = weights, near, count

    def __call__(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        sums, total = x.new_zeros(x.shape[0], self.count, x.shape[2]), x.new_zeros(x.shape[0], self.count)
        for (at, _), weight in zip(self.near, self.weights.unbind(-1)):
            sums = sums.index_add(1, at, x * weight[..., None])
            total = total.index_add(1, at, weight)
        return sums / total[..., None].clamp(min=1e-16)


def _dense(
    x: Tensor, centres: Tensor, tau: Tensor, rows: Tensor, columns: Tensor, clusters: tuple[int, int], window: int
) -> _Share:
    # |x|^2 is the same for all centres of a token, so the softmax does not see it
    logits = torch.baddbmm(centres.square().sum(-1)[:, None], x, centres.transpose(1, 2), beta=-1, alpha=2)
    logits.mul_(tau).masked_fill_(~allowed(rows, columns, clusters, window), torch.finfo(logits.dtype).min)
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return _Share(logits.div_(logits.sum(-1, keepdim=True)))


def _gathered(
    x: Tensor, centres: Tensor, tau: Tensor, rows: Tensor, columns: Tensor, clusters: tuple[int, int], window: int
) -> _NearShare:
    near, lengths = Near(rows, columns, clusters, window), centres.square().sum(-1)
    logits = x.new_empty(*x.shape[:2], window**2)
    for (at, valid), column in zip(near, logits.unbind(-1)):
        inner = (x * centres[:, at]).sum(-1).mul_(2).sub_(lengths[:, at]).mul_(tau[..., 0])
        column.copy_(inner.masked_fill_(~valid, torch.finfo(inner.dtype).min))
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return _NearShare(logits.div_(logits.sum(-1, keepdim=True)), near, centres.shape[1])


class Near:
    """The window**2 centres around every token's cell, one move from the cell at a time: their numbers (n,), and which
    of them exist."""

    def __init__(self, rows: Int[Tensor, " H"], columns: Int[Tensor, " W"], clusters: tuple[int, int], window: int):
        self.rows, self.columns, self.clusters, self.window = rows, columns, clusters, window

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]]:
        moves = range(-(self.window // 2), self.window // 2 + 1)
        high, wide = self.clusters
        for down, across in itertools.product(moves, moves):
            row, column = self.rows + down, self.columns + across
            inside = ((row >= 0) & (row < high))[:, None] & ((column >= 0) & (column < wide))
            number = row.clamp(0, high - 1)[:, None] * wide + column.clamp(0, wide - 1)
            yield number.flatten(), inside.flatten()


def allowed(
    rows: Int[Tensor, " H"], columns: Int[Tensor, " W"], clusters: tuple[int, int], window: int
) -> Bool[Tensor, "n m"]:
    """True where a token may see a centre: at most window // 2 rows and columns of cells away from its own."""
    far = window // 2
    down = (rows[:, None] - torch.arange(clusters[0], device=rows.device)).abs() <= far
    across = (columns[:, None] - torch.arange(clusters[1], device=rows.device)).abs() <= far
    both = down[:, None, :, None] & across[None, :, None, :]
    return both.flatten(2).flatten(0, 1)


def _huge(x: Tensor, centres: Tensor, window: int) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.shape[0] * x.shape[1] * centres.shape[1] > LARGE and centres.shape[1] > 4 * window**2


def _pieces(tokens: Tensor, centres: Tensor) -> int:
    """In how many parts the tokens of large tables are rebuilt."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return 1
    return min(-(-tokens.shape[0] * tokens.shape[1] * centres.shape[1] // LARGE), tokens.shape[1])
