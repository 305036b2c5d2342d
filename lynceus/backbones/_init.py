"""How linear layers start, for the families that offer a choice."""

from collections.abc import Container

from torch import nn


def init_linears(model: nn.Module, *, scratch: bool, small: Container[nn.Module | None]) -> None:
    """Biases 0; weights Xavier uniform if `scratch`, else, and for those in `small`, truncated normal of 0.02."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            if scratch and m not in small:
                nn.init.xavier_uniform_(m.weight)
            else:
                nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
