"""Swin V2's parity records: microsoft/Swin-Transformer, `SwinTransformerV2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lynceus.backbones.keys.swin_v2 import SOURCES as SOURCES
from lynceus.backbones.swin_v2 import SwinV2, SwinV2Config
from lynceus.reengineer.keys.swin import NAMES, fields_of, outputs_of

_NAMES = {k: v for k, v in NAMES.items() if k != "qk_scale"} | {"pretrained_window_sizes": "pretrained_window_sizes"}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names; the dense form is told as Swin's is."""
    return SwinV2(SwinV2Config(**fields_of(config, record, _NAMES, "Swin V2")))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stage1.. (tokens before any norm; dense: normed maps), features (pooled), logits."""
    assert isinstance(model, SwinV2)
    return outputs_of(model, inputs, record)
