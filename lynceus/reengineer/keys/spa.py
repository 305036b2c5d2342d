"""Records of structured pruning adapters: one adapted layer or a small net, its fused weights, and its pruned outputs.

LukasHedegaard/structured-pruning-adapters; the state names are theirs. A record's kind says what is rebuilt; every
output is compared, and pruned ones twice: adapters pruned, then fused, and fused, then pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.reengineer.parity import Row, authors_state, compare_outputs, make_input


class Mlp(nn.Module):
    """fc1 - ReLU - fc2."""

    def __init__(self, inside: int, hidden: int, outside: int, bias: bool = True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inside, hidden, bias=bias), nn.Linear(hidden, outside, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Cnn(nn.Module):
    """conv1 (k, "same") - bn1 - ReLU - conv2 (k, stride 2, groups) - ReLU - conv3 (1x1) - ReLU - mean - fc."""

    def __init__(self, inside: int, hidden: int, classes: int, kernel: int = 3, groups: int = 1):
        super().__init__()
        half = kernel // 2
        self.conv1 = nn.Conv2d(inside, hidden, kernel, padding=half, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, kernel, stride=2, padding=half, groups=groups)
        self.conv3 = nn.Conv2d(hidden, 2 * hidden, 1)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv3(self.conv2(x).relu()).relu()
        return self.fc(x.mean((2, 3)))


class One(nn.Module):
    """A single linear layer `fc`."""

    def __init__(self, inside: int, outside: int, bias: bool = True):
        super().__init__()
        self.fc = nn.Linear(inside, outside, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Attention(nn.Module):
    """Attention `attn` of query (b, n, d) to keys and values."""

    def __init__(self, embed: int, heads: int, kdim: int | None, vdim: int | None, *, batch_first: bool, **more: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(embed, heads, kdim=kdim, vdim=vdim, batch_first=batch_first, **more)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attn(query, key, value, need_weights=False)[0]


def build(record: Mapping[str, Any]) -> nn.Module:
    """The record's adapted model with its weights, in float64 and eval mode."""
    from lynceus.rewrite.adapters import adapt

    c, state = record["config"], authors_state(record)
    kind = str(c.get("kind", "")).lower()
    adapter, _, what = kind.partition(" ")
    if adapter not in ("splora", "sppara", "splopa"):
        raise unknown("kind of adapter", adapter, ("splora", "sppara", "splopa"), how=f"The record says {kind!r}.")
    bias = any(name in state for name in ("fc.bias", "fc1.bias"))
    options: dict[str, Any] = {}
    base: nn.Module
    if adapter == "splopa":
        base = One(c["in_features"], c["out_features"], bias)
        block = tuple(c.get("block_shape", (32, 32)))
        options = {"prototypes": c.get("prototypes", c.get("num_prototypes", 64)), "block": block}
        options["prototype_rank"] = c.get("prototype_rank", 1)
    elif what in ("cnn", "conv"):
        base = Cnn(c["in_channels"], c["hidden"], c["classes"], c.get("kernel", 3), c.get("groups", 1))
    elif what == "attention":
        base = Attention(
            c["embed"],
            c["heads"],
            c.get("kdim"),
            c.get("vdim", c.get("kdim")),
            batch_first=bool(c.get("batch_first", True)),
            bias="attn.in_proj_bias" in state,
            add_bias_kv="attn.bias_k" in state,
            add_zero_attn=bool(c.get("add_zero_attn", False)),
        )
    elif what == "linear" and "hidden" in c:
        base = Mlp(c["in_features"], c["hidden"], c["out_features"], bias)
    elif what == "linear":
        base = One(c["in_features"], c["out_features"], bias)
    else:
        raise AdviceError(f"The record is of the unknown kind {c.get('kind')!r}; linear, cnn and attention are known.")
    rank = c.get("rank") or 16
    model = adapt(base, adapter, rank, quiet=True, **options).double()  # type: ignore[arg-type]
    missing, extra = model.load_state_dict(state, strict=False)
    missing = [n for n in missing if not n.endswith(("num_batches_tracked", "base_digest"))]
    shapes = [n for n, v in model.state_dict().items() if n in state and v.shape != state[n].shape]
    if missing or extra or shapes:
        raise AdviceError(f"The record's names do not fit: missing {missing}, too many {list(extra)}, shapes {shapes}.")
    return model.eval()


def check(record: Mapping[str, Any]) -> list[Row]:
    """Every output of a record, its parameter count, and the counts of learned parameters that it states."""
    from lynceus.rewrite.adapters import fuse, prune
    from lynceus.rewrite.adapters.layers import Adapted, SPLoRALinear

    name, c = str(record.get("model", record["family"])), record["config"]
    model = build(record)
    inputs = {k: make_input(v) for k, v in record["inputs"].items()}
    args = _arguments(inputs)
    rows = []
    with torch.no_grad():
        fused = fuse(model)
        outputs: dict[str, Any] = {"output": model(*args)}
        for layer, module in model.named_modules():
            if isinstance(module, Adapted):
                outputs[f"fused_{_short(layer)}"] = module.adapted_weight()
        if "fc" in dict(model.named_modules()) and "fused" in record["outputs"]:
            outputs["fused"] = model.get_submodule("fc").adapted_weight()  # type: ignore[operator]
        keep = {k.removeprefix("keep_"): list(v) for k, v in c.items() if k.startswith("keep_")}
        if keep:
            masks = {("fc1" if layer == "hidden" else layer): kept for layer, kept in keep.items()}
            small = prune(model, masks=masks, example=args)
            outputs["pruned_output"] = fuse(small)(*args)
            turned = {"pruned_output": prune(fused, masks=masks, example=args)(*args)}
            wanted = {k: v for k, v in record["outputs"].items() if k == "pruned_output"}
            rows += compare_outputs(name, turned, wanted, note="fused, then pruned")
            for layer, count in c.get("adapter_parameters_after_mask", {}).items():
                module = small.get_submodule(layer)
                have = sum(p.numel() for p in module.parameters() if p.requires_grad)
                rows.append(_count(name, f"learned after mask, {layer}", have, count))
        turned = {"output": fused(*args)}
        rows += compare_outputs(name, turned, {"output": record["outputs"]["output"]}, note="fused")
    for layer, rank in c.get("resolved_rank", {}).items():
        module = model.get_submodule(layer)
        rows.append(
            _count(name, f"rank, {layer}", module.adapter.rank if isinstance(module, SPLoRALinear) else 0, rank)
        )
    if isinstance(record.get("parameters"), int):
        have = sum(p.numel() for p in model.parameters())
        rows.insert(0, _count(name, "parameter count", have, record["parameters"]))
    return rows + compare_outputs(name, outputs, record["outputs"])


def _arguments(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """x alone; or query, key and value, the last two perhaps one."""
    if "query" not in inputs:
        return tuple(inputs.values())
    both = inputs.get("key_value", inputs["query"])
    return inputs["query"], inputs.get("key", both), inputs.get("value", inputs.get("key", both))


def _short(layer: str) -> str:
    """attn.q_proj is q in the records; fc1 stays."""
    return layer.rpartition(".")[2].removesuffix("_proj")


def _count(name: str, output: str, have: int, want: int) -> Row:
    note = f"{have:,}" if have == want else f"{have:,} instead of {want:,}"
    return Row(record=name, output=output, gap=abs(have - want) / max(want, 1), tolerance=0.0, note=note)
