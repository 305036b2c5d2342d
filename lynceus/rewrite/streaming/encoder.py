"""A transformer encoder over the last n tokens of a stream: embedding, recycling positions, layers, classes.

Hedegaard, Bakhtiarnia, Iosifidis, Continual Transformers: Redundancy-Free Attention for Online Inference, ICLR 2023,
arXiv 2201.06268. Reference code: LukasHedegaard/continual-inference and LukasHedegaard/CoOadTR.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.encoder_nodes import RecyclingPositions


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """inputs: channels of a token. window: tokens that attention looks at. positions: entries of the table of
    positions, which a stream goes round; None: 2 window - 1; 0: no positions. norm_first: norms before attention and
    perceptron."""

    num_classes: int = 21
    inputs: int = 3072
    dim: int = 1024
    heads: int = 8
    feedforward: int = 1024
    layers: int = 1
    window: int = 64
    positions: int | None = None
    activation: Literal["relu", "gelu"] = "gelu"
    norm_first: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise AdviceError(f"{self.dim} channels do not share out over {self.heads} heads.")
        if min(self.layers, self.window, self.inputs, self.num_classes) < 1:
            raise AdviceError("layers, window, inputs and num_classes are at least 1.")
        if self.positions and self.positions < self.window:
            raise AdviceError(
                f"A table of {self.positions} positions repeats inside a window of {self.window}; take "
                f"{self.window} to {2 * self.window}."
            )
        if self.activation not in ("relu", "gelu"):
            raise AdviceError(f"activation is 'relu' or 'gelu', not {self.activation!r}.")


class SequenceEncoder(nn.Module):
    """Tokens (b, t, inputs) to the scores of the newest one, (b, classes)."""

    time_axis = 1
    clip_rank = 3
    builder = "lynceus.rewrite.streaming.encoder:build"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __init__(self, config: EncoderConfig, name: str = "encoder"):
        super().__init__()
        self.config, self.name, self.window = config, name, config.window
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, config.feedforward, config.dropout, config.activation,
            batch_first=True, norm_first=config.norm_first,
        )  # fmt: skip
        self.embed = nn.Linear(config.inputs, config.dim)
        size = 2 * config.window - 1 if config.positions is None else config.positions
        self.positions = RecyclingPositions(config.dim, size) if size else None
        self.encoder = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(config.dim), enable_nested_tensor=False)
        self.head = nn.Linear(config.dim, config.num_classes)

    def as_containers(self) -> nn.Module:
        """The same for each token, for a converter."""
        names = ("embed", "positions", "encoder", "head")
        return nn.Sequential(OrderedDict((n, m) for n in names if (m := getattr(self, n)) is not None))

    def forward(self, x: Float[Tensor, "b t inputs"], start: int = 0) -> Float[Tensor, "b classes"]:
        """start: the number of the first token in its stream."""
        x = self.embed(x)
        if self.positions is not None:
            x = self.positions(x, start)
        y: Tensor = self.head(self.encoder(x)[:, -1])
        return y


VARIANTS: dict[str, EncoderConfig] = {
    "encoder_nano": EncoderConfig(num_classes=10, inputs=8, dim=16, heads=2, feedforward=32, window=6),
    "encoder_b1": EncoderConfig(),
    "encoder_b2": EncoderConfig(layers=2),
}


def build(config: EncoderConfig, name: str = "encoder") -> SequenceEncoder:
    return SequenceEncoder(config, name)


def frame_shape(config: EncoderConfig) -> tuple[int, ...]:
    """(inputs,) of a token."""
    return (config.inputs,)
