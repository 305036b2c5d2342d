"""How each ATen operator carries channels: from the labels of its inputs' axes to those of its outputs.

A label of an axis is an array with a number per index (a slot of some parameter's axis), or None where nothing can be
removed. A rule reads operator arguments and gives labels for every output tensor; on the way it ties slots that must go
together (`tie`) and fixes those that must stay (`fix`). Operators without a rule fix whatever they touch, so that what
is unknown is left alone. See `rewrite.dependency`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Label = np.ndarray | None
Axes = tuple[Label, ...]
HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads", "nhead")


class Trace(Protocol):
    """What rules ask of the tracer."""

    def of(self, value: Any) -> Axes: ...
    def tie(self, a: Label, b: Label, why: str) -> Label: ...
    def fix(self, ids: Label, why: str) -> None: ...
    def constant(self, size: int) -> np.ndarray: ...
    def count(self, ids: np.ndarray, names: Sequence[str], size: int, *, needs: str = "") -> bool: ...
    def attribute(self, name: str) -> Any: ...


Rule = Callable[[Trace, str, tuple[Any, ...], dict[str, Any], Any], Any]


def joined(t: Trace, op: str, tensors: Sequence[Tensor], shape: Sequence[int]) -> Axes:
    """Labels of an elementwise result with broadcasting."""
    out: list[Label] = [None] * len(shape)
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        labels = [(x.shape[-back], t.of(x)[-back]) for x in tensors if x.ndim >= back]
        found: Label = None
        for width, ids in labels:
            if ids is not None and width != size:
                t.fix(ids, f"is spread over {size} by {op}")
            elif ids is not None:
                found = ids if found is None else t.tie(found, ids, op)
        if found is not None and size > 1 and any(w == size and ids is None for w, ids in labels):
            t.fix(found, f"meets something of fixed size in {op}")
            found = None
        out[-back] = found
    return tuple(out)


def pointwise(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim > 0]
    return joined(t, op, tensors, out.shape)


def same(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Labels of the first argument, where sizes stay; a labelled axis whose size changes is fixed."""
    labels = t.of(args[0])
    first = out if isinstance(out, Tensor) else out[0]
    if len(labels) != first.ndim:
        return everything(t, op, args, kwargs, out)
    made = []
    for ids, size in zip(labels, first.shape):
        if ids is not None and len(ids) != size:
            t.fix(ids, f"is resized by {op}")
            ids = None
        made.append(ids)
    return tuple(made) if isinstance(out, Tensor) else [tuple(made)]


def everything(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """No rule: nothing that goes in may change."""
    for a in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(a, Tensor):
            for ids in t.of(a):
                t.fix(ids, f"goes through {op}")
    return None


# shape --------------------------------------------------------------------------------------------
def reshape(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    return reshaped(t, op, t.of(args[0]), tuple(args[0].shape), tuple(out.shape))


def reshaped(t: Trace, op: str, labels: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes:
    """Labels after a reshape: axes of equal products are taken together, then told apart again."""
    out: list[Label] = [None] * len(after)
    if all(ids is None for ids in labels) or 0 in before:
        return tuple(out)
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0, a, b = i, j, 1, 1
        if i < len(before):
            a, i = before[i], i + 1
        if j < len(after):
            b, j = after[j], j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        for k, ids in enumerate(_block(t, op, labels[i0:i], before[i0:i], after[j0:j])):
            out[j0 + k] = ids
    return tuple(out)


def _block(t: Trace, op: str, labels: Sequence[Label], before: Sequence[int], after: Sequence[int]) -> list[Label]:
    none: list[Label] = [None] * len(after)
    known = [k for k, ids in enumerate(labels) if ids is not None]
    if not known:
        return none
    if len(known) > 1:
        for k in known:
            t.fix(labels[k], f"is merged with another by {op}")
        return none
    ids: Any = labels[known[0]]
    lying = ids.reshape([-1 if k == known[0] else 1 for k in range(len(before))])
    cells = np.broadcast_to(lying, before).reshape(after)
    vary = [k for k in range(len(after)) if after[k] > 1 and not (cells == cells.take([0], axis=k)).all()]
    if not vary:
        t.fix(ids, f"is a single one in {op}")
        return none
    if len(vary) == 1:
        none[vary[0]] = np.moveaxis(cells, vary[0], 0).reshape(after[vary[0]], -1)[:, 0]
        return none
    # heads: the axis in front of one of the width of a head; all of a head go together
    width = t.attribute("head_dim")
    for k in reversed(vary[:-1]):
        if isinstance(width, int) and k + 1 < len(after) and after[k + 1] == width:
            heads = np.moveaxis(cells, k, 0).reshape(after[k], -1)
            if t.count(heads[:, 0], HEADS, after[k], needs="head_dim"):
                for column in range(1, heads.shape[1]):
                    t.tie(heads[:, 0], heads[:, column], "a head")
                none[k] = heads[:, 0]
                return none
    t.fix(ids, f"is split into {' x '.join(map(str, after))}")
    return none


def permute(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = t.of(args[0])
    return tuple(labels[d] for d in args[1])


def transpose(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = list(t.of(args[0]))
    if len(labels) >= 2:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, 1)
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def expand(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    return joined(t, op, [args[0]], out.shape)


def unsqueeze(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = list(t.of(args[0]))
    labels.insert(args[1] % out.ndim, None)
    return tuple(labels)


def squeeze(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    return reshaped(t, op, t.of(args[0]), tuple(args[0].shape), tuple(out.shape))


def part(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """slice: a labelled axis may only be taken whole."""
    labels = list(t.of(args[0]))
    axis = (args[1] if len(args) > 1 else 0) % len(labels)
    if labels[axis] is not None and out.shape[axis] != args[0].shape[axis]:
        t.fix(labels[axis], "is cut at a fixed place")
        labels[axis] = None
    return tuple(labels)


def select(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = list(t.of(args[0]))
    axis = (args[1] if len(args) > 1 else 0) % len(labels)
    t.fix(labels.pop(axis), f"is taken apart by {op}")
    return tuple(labels) if isinstance(out, Tensor) else [tuple(labels)] * len(out)


def split(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Equal pieces stay equal: what stands at the same place in them goes together."""
    labels = t.of(args[0])
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(labels)
    ids = labels[axis]
    pieces: list[Label] = [None] * len(out)
    if ids is not None:
        sizes = [piece.shape[axis] for piece in out]
        if len(out) == 1:
            pieces = [ids]
        elif len(set(sizes)) == 1:
            pieces = list(ids.reshape(len(out), -1))
            for piece in pieces[1:]:
                t.tie(pieces[0], piece, op)
        else:
            t.fix(ids, f"is cut into pieces of {', '.join(map(str, sizes))}")
    return [(*labels[:axis], piece, *labels[axis + 1 :]) for piece in pieces]


def cat(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    tensors = [x for x in args[0] if x.ndim == out.ndim]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    made: list[Label] = []
    for d in range(out.ndim):
        labels = [t.of(x)[d] for x in tensors]
        if d == axis:
            along = [t.constant(x.shape[d]) if ids is None else ids for x, ids in zip(tensors, labels)]
            made.append(None if all(ids is None for ids in labels) else np.concatenate(along))
            continue
        found = next((ids for ids in labels if ids is not None), None)
        if found is not None:
            for ids in labels:
                if ids is None:
                    t.fix(found, f"meets something of fixed size in {op}")
                else:
                    t.tie(found, ids, op)
            found = None if any(ids is None for ids in labels) else found
        made.append(found)
    return tuple(made)


def stack(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    labels = list(joined(t, op, args[0], args[0][0].shape))
    labels.insert(axis, None)
    return tuple(labels)


def pad(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels, pads = list(t.of(args[0])), args[1]
    for k in range(len(pads) // 2):
        ids = labels[-1 - k]
        if ids is not None and (pads[2 * k] or pads[2 * k + 1]):
            if min(pads[2 * k], pads[2 * k + 1]) < 0:
                t.fix(ids, "is cut at a fixed place")
                labels[-1 - k] = None
            else:
                labels[-1 - k] = np.concatenate([t.constant(pads[2 * k]), ids, t.constant(pads[2 * k + 1])])
    return tuple(labels)


def roll(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = t.of(args[0])
    given: Any = args[-1] if len(args) > 1 else kwargs.get("dims", ())
    axes: list[int] = list(given)
    for d in axes or range(len(labels)):
        t.fix(labels[d], f"is reordered by {op}")
    return tuple(None if d in [a % len(labels) for a in axes] else ids for d, ids in enumerate(labels))


def index(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = list(t.of(args[0]))
    chosen = [d for d, where in enumerate(args[1]) if where is not None]
    if (
        not chosen
        or chosen != list(range(chosen[0], chosen[-1] + 1))
        or any(args[1][d].dtype == torch.bool for d in chosen)
    ):
        return everything(t, op, args, kwargs, out)
    for d in chosen:
        t.fix(labels[d], "is looked up by number")
    between = out.ndim - (len(labels) - len(chosen))
    return (*labels[: chosen[0]], *[None] * between, *labels[chosen[-1] + 1 :])


def reduce(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    first = out if isinstance(out, Tensor) else out[0]
    labels = t.of(args[0])
    axes: Any = args[1] if len(args) > 1 else kwargs.get("dim")
    if op.startswith("linalg_vector_norm"):
        axes = args[2] if len(args) > 2 else kwargs.get("dim")
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    gone = set(range(len(labels))) if not axes else {a % len(labels) for a in axes}
    kept = [None if d in gone else ids for d, ids in enumerate(labels)]
    if first.ndim != len(labels):
        kept = [ids for d, ids in enumerate(kept) if d not in gone]
    made = tuple(kept)
    return made if isinstance(out, Tensor) else [made] * len(out)


# products -----------------------------------------------------------------------------------------
def contract(t: Trace, op: str, a: Label, b: Label, size: int) -> None:
    if a is not None and b is not None:
        t.tie(a, b, op)
    elif size > 1:
        t.fix(b if a is None else a, f"meets something of fixed size in {op}")


def matmul(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """mm, bmm, addmm, baddbmm."""
    added = args[0] if op.startswith(("addmm", "baddbmm")) else None
    x, y = args[-2:] if added is None else args[1:3]
    a, b = t.of(x), t.of(y)
    contract(t, op, a[-1], b[-2], x.shape[-1])
    made: Axes = (a[-2], b[-1])
    if out.ndim == 3:  # only the axis of the batch is shared, whatever sizes the others happen to have
        contract(t, op, a[0], b[0], out.shape[0])
        made = (a[0] if b[0] is not None else None, *made)
    return made if added is None else _plus(t, op, added, made, out.shape)


def _plus(t: Trace, op: str, added: Tensor, labels: Axes, shape: Sequence[int]) -> Axes:
    made = list(labels)
    for back in range(1, added.ndim + 1):
        ids, other = t.of(added)[-back], made[-back]
        if added.shape[-back] != shape[-back]:
            t.fix(ids, f"is spread by {op}")
        elif ids is not None and other is not None:
            t.tie(other, ids, op)
        elif shape[-back] > 1:
            t.fix(ids, f"meets something of fixed size in {op}")
            t.fix(other, f"meets something of fixed size in {op}")
            made[-back] = None
    return tuple(made)


def convolution(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    x, weight, bias = args[:3]
    transposed, groups = bool(args[6]), int(args[8])
    inside, w = t.of(x)[1], list(t.of(weight))
    if transposed:
        w[0], w[1] = w[1], w[0]
    rows, columns = w[0], w[1]
    for ids in w[2:]:
        t.fix(ids, "is a side of a kernel")
    if transposed and groups > 1:
        for ids in (inside, rows, columns):
            t.fix(ids, "belongs to a grouped transposed convolution")
        rows = None
    elif groups > 1:
        rows = _grouped(t, inside, rows, columns, x.shape[1], out.shape[1], groups)
    else:
        contract(t, op, inside, columns, x.shape[1])
    if bias is not None and rows is not None:
        t.tie(rows, t.of(bias)[0], op)
    elif bias is not None:
        t.fix(t.of(bias)[0], "belongs to a layer that stays")
    return (None, rows, *[None] * (out.ndim - 2))


def _grouped(t: Trace, inside: Label, rows: Label, columns: Label, width: int, outside: int, groups: int) -> Label:
    """Labels of a grouped convolution's outputs. Whole groups go where there are more groups than channels in one,
    inputs with outputs; elsewhere the same channel of every group goes, inputs and outputs apart."""
    if inside is None or rows is None:
        for ids in (inside, rows, columns):
            t.fix(ids, "meets something of fixed size in a grouped convolution")
        return None
    entering, leaving = inside.reshape(groups, -1), rows.reshape(groups, -1)
    if groups >= width // groups:
        t.fix(columns, "is inside a group")
        for cells in (entering, leaving):
            for k in range(cells.shape[1]):
                t.tie(entering[:, 0], cells[:, k], "a group")
        if not t.count(entering[:, 0], ("groups",), groups):
            t.fix(inside, "belongs to a grouped convolution that is no module")
        return rows
    for cells in (entering, leaving):
        for k in range(1, groups):
            t.tie(cells[0], cells[k], "its place in a group")
    contract(t, "a grouped convolution", entering[0], columns, width // groups)
    return rows


def attention(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Fused attention of q, k, v (b, g, n, d)."""
    q, k, v = (t.of(a) for a in args[:3])
    mask = next((a for a in (*args[3:], *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 4), None)
    contract(t, op, q[-1], k[-1], args[0].shape[-1])
    contract(t, op, k[-2], v[-2], args[1].shape[-2])
    heads: Label = q[1]
    for other in (k[1], v[1]):
        contract(t, op, heads, other, args[0].shape[1])
    if mask is not None:
        table = t.of(mask)
        if mask.shape[1] == args[0].shape[1]:
            contract(t, op, heads, table[1], mask.shape[1])
        for ids in table[2:]:
            t.fix(ids, "is a place of an attention table")
    return [(q[0], heads, q[2], v[-1])]


# norms --------------------------------------------------------------------------------------------
def batch_norm(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = list(t.of(args[0]))
    for value in args[1:5]:
        if isinstance(value, Tensor):
            contract(t, op, labels[1], t.of(value)[0], value.shape[0])
    return [tuple(labels)]


def layer_norm(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = t.of(args[0])
    for value in args[2:4]:
        if isinstance(value, Tensor):
            for back in range(1, value.ndim + 1):
                contract(t, op, labels[-back], t.of(value)[-back], value.shape[-back])
    return [labels]


def group_norm(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    labels = t.of(args[0])
    ids, groups = labels[1], int(args[6])
    for value in args[1:3]:
        if isinstance(value, Tensor):
            contract(t, op, ids, t.of(value)[0], value.shape[0])
    if ids is not None and groups > 1:
        cells = ids.reshape(groups, -1)
        if cells.shape[1] == 1 and not t.count(ids, ("num_groups",), groups):
            t.fix(ids, "belongs to a group norm that is no module")
        for k in range(1, groups):
            if cells.shape[1] > 1:
                t.tie(cells[0], cells[k], "its place in a group")
    return [labels]


def fresh(t: Trace, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """A new tensor that only has the shape of another."""
    return None


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(reshape, "view _unsafe_view reshape _reshape_alias _reshape_copy view_copy flatten unflatten"),
    **_table(permute, "permute"),
    **_table(transpose, "t transpose"),
    **_table(expand, "expand"),
    **_table(unsqueeze, "unsqueeze"),
    **_table(squeeze, "squeeze"),
    **_table(part, "slice"),
    **_table(select, "select unbind"),
    **_table(split, "split split_with_sizes chunk"),
    **_table(cat, "cat"),
    **_table(stack, "stack"),
    **_table(pad, "constant_pad_nd"),
    **_table(roll, "roll flip"),
    **_table(index, "index"),
    **_table(reduce, "mean sum amax amin var std var_mean linalg_vector_norm logsumexp prod"),
    **_table(matmul, "mm bmm addmm baddbmm"),
    **_table(convolution, "convolution"),
    **_table(
        attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    **_table(batch_norm, "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training"),
    **_table(layer_norm, "native_layer_norm"),
    **_table(group_norm, "native_group_norm"),
    **_table(
        same,
        "clone alias detach contiguous as_strided _to_copy lift_fresh dropout native_dropout cumsum "
        "_softmax _log_softmax _safe_softmax max_pool2d_with_indices max_pool1d max_pool3d_with_indices "
        "avg_pool1d avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d upsample_bilinear2d upsample_nearest2d "
        "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    ),
    **_table(pointwise, "hardswish hardsigmoid hardtanh leaky_relu elu celu selu silu mish softplus gelu"),
    **_table(fresh, "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full rand_like"),
}


def rule_of(func: Any) -> Rule:
    """The rule of an ATen overload; elementwise ones know themselves."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in func.tags else everything
