"""A sentence for a set of regions: an attention LSTM, and a language model that says how likely the sentence is anyway.

MILAN's decoder (Hernandez et al., ICLR 2022, arXiv 2201.11114; reference evandez/neuron-descriptions, MIT), after Show,
Attend and Tell (Xu et al., ICML 2015, arXiv 1502.03044). A description maximises log p(d | regions) - lambda log p(d):
what is specific to the regions, not merely likely. Fitting and beam search come with the rest of the system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError

SPECIAL = 4  # start, stop, pad, unknown: behind the words


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerConfig:
    """vocabulary: words, without the four special tokens start, stop, pad and unknown, which follow them in this order.

    feature_size: length of a region's vector. embedding, hidden: widths of decoder and language model.
    attention: width of the attention; None: the smaller of `hidden` and `feature_size`. lm_layers: of the language
    model, 0 for none. length: tokens of a description. weight: lambda, of the language model in the objective.
    """

    vocabulary: int
    feature_size: int
    embedding: int = 128
    hidden: int = 512
    attention: int | None = None
    lm_layers: int = 2
    length: int = 15
    weight: float = 0.2
    dropout: float = 0.5

    @property
    def start(self) -> int:
        return self.vocabulary

    @property
    def stop(self) -> int:
        return self.vocabulary + 1

    @property
    def pad(self) -> int:
        return self.vocabulary + 2

    @property
    def tokens(self) -> int:
        return self.vocabulary + SPECIAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """tokens: (b, t) as chosen or given. scores: (b, t, k), of every token at every step: log p(w | regions), less
    lambda log p(w) when the language model takes part. attention: (b, t, n), over regions, sums to 1."""

    tokens: Int[Tensor, "b t"]
    scores: Float[Tensor, "b t k"]
    attention: Float[Tensor, "b t n"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        """The sum of the tokens' scores over all positions."""
        return self.scores.gather(2, self.tokens[..., None])[..., 0].sum(1)


class LanguageModel(nn.Module):
    """How likely a description is without any picture."""

    def __init__(self, config: CaptionerConfig):
        super().__init__()
        self.config = config
        dropout = config.dropout if config.lm_layers > 1 else 0.0
        self.embedding = nn.Embedding(config.tokens, config.embedding)
        self.lstm = nn.LSTM(config.embedding, config.hidden, config.lm_layers, dropout=dropout, batch_first=True)
        self.output = nn.Linear(config.hidden, config.tokens)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t k"]:
        """log p of the next token behind each of `tokens`, which begin with start."""
        return self.output(self.lstm(self.embedding(tokens))[0]).log_softmax(-1)

    def log_probability(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, " b"]:
        """log p of descriptions (without start), up to the first stop and with it; nothing behind it counts."""
        start = torch.full_like(tokens[:, :1], self.config.start)
        steps = self(torch.cat([start, tokens[:, :-1]], 1)).gather(2, tokens[..., None])[..., 0]
        stopped = (tokens == self.config.stop).long()
        return (steps * (stopped.cumsum(1) - stopped == 0)).sum(1)


class Attend(nn.Module):
    """Additive attention of one query over the regions."""

    def __init__(self, query: int, key: int, hidden: int):
        super().__init__()
        self.query, self.key, self.score = nn.Linear(query, hidden), nn.Linear(key, hidden), nn.Linear(hidden, 1)

    def forward(self, query: Float[Tensor, "b q"], keys: Float[Tensor, "b n f"]) -> Float[Tensor, "b n"]:
        return self.score((self.query(query)[:, None] + self.key(keys)).tanh())[..., 0].softmax(1)


class Captioner(nn.Module):
    """Regions (b, n, f) -> tokens, with the language model `lm` beside (None where lm_layers is 0)."""

    def __init__(self, config: CaptionerConfig):
        super().__init__()
        self.config = config
        f, hidden = config.feature_size, config.hidden
        self.init_hidden, self.init_cell = nn.Linear(f, hidden), nn.Linear(f, hidden)
        self.embedding = nn.Embedding(config.tokens, config.embedding)
        self.attend = Attend(hidden, f, config.attention or min(hidden, f))
        self.gate = nn.Linear(hidden, f)
        self.lstm = nn.LSTMCell(config.embedding + f, hidden)
        self.output = nn.Linear(hidden, config.tokens)
        self.lm = LanguageModel(config) if config.lm_layers else None

    def forward(self, features: Float[Tensor, "b n f"], tokens: Int[Tensor, "b t"]) -> Decoded:
        """The scores of given tokens (without start): log p(w | regions) at each step."""
        return self._decode(features, tokens, 0.0)

    def objective(
        self, features: Float[Tensor, "b n f"], tokens: Int[Tensor, "b t"], *, weight: float | None = None
    ) -> Float[Tensor, " b"]:
        """log p(d | regions) - lambda log p(d) of whole descriptions; weight: lambda, None: the configuration's."""
        weight = self.config.weight if weight is None else weight
        total = self(features, tokens).total
        return total - weight * self._model().log_probability(tokens) if weight else total

    def steps(
        self, features: Float[Tensor, "b n f"], tokens: Int[Tensor, "b t"], *, weight: float | None = None
    ) -> Decoded:
        """The scores of given tokens with the language model taken off at each step."""
        return self._decode(features, tokens, self.config.weight if weight is None else weight)

    def greedy(self, features: Float[Tensor, "b n f"], *, weight: float | None = None) -> Decoded:
        """The best token at each step, always `length` of them: whatever follows stop means nothing.

        weight: lambda; 0 takes the likeliest word, None the configuration's.
        """
        weight = self.config.weight if weight is None else weight
        return self._decode(features, None, weight if self.lm is not None else 0.0)

    def _model(self) -> LanguageModel:
        if self.lm is None:
            raise AdviceError("This captioner has no language model (lm_layers=0); score with weight=0.")
        return self.lm

    def _decode(self, features: Tensor, tokens: Tensor | None, weight: float) -> Decoded:
        if features.shape[-1] != self.config.feature_size:
            raise AdviceError(
                f"Regions are vectors of {self.config.feature_size} numbers, these have {features.shape[-1]}."
            )
        mean = features.mean(1)
        h, c = self.init_hidden(mean).tanh(), self.init_cell(mean).tanh()
        last = torch.full((len(features),), self.config.start, device=features.device)
        memory: tuple[Tensor, Tensor] | None = None
        chosen, scores, looks = [], [], []
        for step in range(self.config.length if tokens is None else tokens.shape[1]):
            look = self.attend(h, features)
            context = torch.einsum("bn,bnf->bf", look, features) * self.gate(h).sigmoid()
            h, c = self.lstm(torch.cat([self.embedding(last), context], 1), (h, c))
            score = self.output(F.dropout(h, self.config.dropout, self.training)).log_softmax(1)
            if weight:
                model = self._model()
                out, memory = model.lstm(model.embedding(last)[:, None], memory)
                score = score - weight * model.output(out[:, 0]).log_softmax(1)
            last = score.argmax(1) if tokens is None else tokens[:, step]
            chosen.append(last)
            scores.append(score)
            looks.append(look)
        return Decoded(tokens=torch.stack(chosen, 1), scores=torch.stack(scores, 1), attention=torch.stack(looks, 1))
