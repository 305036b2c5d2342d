"""VlmTokens: a vision-language model that drops most image tokens while they pass through its language model.

FEATHER: Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration, ICCV 2025,
arXiv 2412.13180, code markendo/FEATHER (MIT). FastV: An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024,
arXiv 2403.06764, code pkunlp-icler/FastV. No training; the weights stay as they are.

`prune(model)` gives a LLaVA-like model of `transformers` whose forward and generate() prune while the prompt is read.
Layers are numbered from 0; pruning at layer K scores with the input of layer K-1 and cuts just before K. Kept tokens
keep their order and positions; caches of layers before K stay whole, later ones are short.

Any decoder can be pruned that keeps the plain protocol: `decoder.layers`, each called as layer(hidden (b, n, d),
position_embeddings=(cos, sin), attention_mask=None or bool (b, 1, q, k), past_key_values=cache or None), `decoder.norm`
behind them, the result a tensor (b, n, d) or what holds it as last_hidden_state. The pruned decoder is told
image_tokens=(b, n) bool. Layers with input_layernorm and self_attn (q_proj and k_proj, or queries(x) and keys(x)) can
be scored by the built-in criteria; others need criterion=.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.swap import signed
from lynceus.rewrite.vlm_tokens import layouts
from lynceus.rewrite.vlm_tokens.choose import (
    Criterion,
    Look,
    Tile,
    final_share,
    image_attention,
    last_attention,
    length,
    on_grid,
    share,
    top,
)
from lynceus.rewrite.vlm_tokens.passes import Kept, Pass, before_layer, current, restored, watch, watched

__all__ = ["Criterion", "Kept", "Look", "VlmTokens", "image_attention", "last_attention", "prune", "unpruned", "watch"]

METHODS = ("feather", "fastv", "fastv_norope", "uniform")
Method = Literal["feather", "fastv", "fastv_norope", "uniform"]
BIDIRECTIONAL = ("gemma3", "gemma3n", "paligemma", "gemma4")  # image tokens see later ones


@dataclass(frozen=True, kw_only=True)
class VlmTokens:
    """Rewrite: fewer image tokens in the later layers of a vision-language model.

    method: feather (attention without RoPE plus a uniform grid, then a harder cut), fastv (attention with RoPE),
    fastv_norope, or uniform (the grid alone).
    layers: where tokens are cut; None: as in the papers for 32 layers, scaled to this model's depth: (8, 16) for
    feather, (3,) for the others.
    ratio: share of the image tokens dropped by score, 0 to 1; None: 0.7 for feather (whose second cut keeps
    (1 - ratio)^2 of what is there), 0.75 for fastv.
    stride: every which row and column the grid keeps; None: 3 for feather, 2 for uniform.
    last: uniform also keeps this share of the tokens at the end of each tile.
    grid: layout of one image's tokens, such as 24x24, or 24x24,48x36+1 for two tiles,
    the second with one newline token behind each row; None: read from the model's inputs, a square for plain LLaVA.
    criterion: a function of `Look` that gives scores, in place of the method's own.
    """

    method: Method = "feather"
    layers: tuple[int, ...] | None = None
    ratio: float | None = None
    stride: int | None = None
    last: float = 0.0
    grid: str | None = None
    criterion: Callable[..., Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("pruning method", self.method, METHODS)
        if self.layers is not None:
            layers = tuple(int(k) for k in self.layers)
            object.__setattr__(self, "layers", layers)
            if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
                raise AdviceError(
                    f"layers are rising numbers from 1 on (the layer before scores), not {layers}: layers=(8, 16)."
                )
            most = {"feather": 2, "uniform": 1}.get(self.method, len(layers))
            if len(layers) > most:
                raise AdviceError(
                    f"{self.method} prunes at {'one layer' if most == 1 else 'one or two layers'}, not at {layers}; "
                    "method='fastv_norope' takes any number."
                )
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            near = min(1.0, max(0.0, self.ratio))
            raise AdviceError(f"ratio is the share of image tokens dropped, 0 to 1, not {self.ratio}: ratio={near:g}.")
        if self.ratio is not None and self.method == "uniform":
            raise AdviceError("uniform keeps the grid of stride=, whatever the ratio; leave ratio out.")
        if self.stride is not None and (self.stride < 1 or self.method not in ("feather", "uniform")):
            raise AdviceError(
                f"stride is at least 1, and of feather and uniform only, not stride={self.stride} of {self.method}."
            )
        if self.last and (not 0 <= self.last <= 1 or self.method != "uniform"):
            raise AdviceError(
                f"last is a share from 0 to 1, and of uniform only, not last={self.last} of {self.method}."
            )
        if self.criterion is not None and self.method == "uniform":
            raise AdviceError("uniform scores nothing; give criterion= with method='fastv_norope' or 'feather'.")
        parse_grid(self.grid)

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A deep copy of `model` that prunes, in eval mode; `prune` makes one that shares the weights."""
        whole = self.on(model)
        return _attached(copy.deepcopy(model).eval(), whole)

    def on(self, model: nn.Module) -> VlmTokens:
        """These options with every None filled in for `model`; AdviceError where they do not fit it."""
        depth = len(decoder_of(model).layers)
        default = self.default_layers(depth)
        layers = self.layers if self.layers is not None else default
        if layers[-1] >= depth:
            raise AdviceError(
                f"layers={layers} ask for layer {layers[-1]}, but the decoder has layers 0 to {depth - 1}; for this "
                f"depth the paper's places are layers={default}."
            )
        ratio = self.ratio if self.ratio is not None else {"feather": 0.7, "uniform": None}.get(self.method, 0.75)
        stride = self.stride if self.stride is not None else {"feather": 3, "uniform": 2}.get(self.method)
        return replace(self, layers=layers, ratio=ratio, stride=stride)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The paper's places for 32 layers, scaled to `depth`."""
        if depth < 2:
            raise AdviceError(f"A decoder of {depth} layer cannot be pruned: the layer before the cut scores.")
        if self.method != "feather":
            return (min(depth - 1, max(1, round(3 * depth / 32))),)
        first = max(1, depth // 4)
        return tuple(k for k in (first, max(first + 1, depth // 2)) if k < depth)

    def stays(self, stage: int, look: Look, grid: Tensor) -> Tensor:
        """Which image tokens (b, m) stay at the cut number `stage`. grid: marks of the tokens on the uniform grid."""
        if self.method == "uniform":
            return grid & look.image
        counts = look.image.sum(1)
        if self.criterion is not None:
            scores = self.criterion(look)
        else:
            scores = last_attention(look, rope=self.method == "fastv")
        assert self.ratio is not None
        keep = 1 - self.ratio
        if self.method != "feather":
            return top(scores, look.image, share(counts, keep))
        if stage == 0:
            return top(scores, look.image, share(counts, keep)) | (grid & look.image)
        return top(scores, look.image, share(counts, keep * keep))


def prune(
    model: nn.Module,
    *,
    method: Method = "feather",
    layers: tuple[int, ...] | None = None,
    ratio: float | None = None,
    stride: int | None = None,
    last: float = 0.0,
    grid: str | None = None,
    criterion: Criterion | None = None,
) -> nn.Module:
    """`model` pruning its image tokens, as `VlmTokens` describes; it shares the weights with `model`, which itself goes
    on as before. `unpruned` gives the plain model back; `VlmTokens(...)(model)` copies the weights."""
    by = VlmTokens(
        method=method, layers=layers, ratio=ratio, stride=stride, last=last, grid=grid, criterion=criterion
    ).on(model)
    return _attached(_sharing(model).eval(), by)


def unpruned(model: nn.Module) -> nn.Module:
    """The plain model that shares the weights of a pruned one."""
    if not isinstance(getattr(model, "rewrite", None), VlmTokens):
        raise AdviceError(f"This {type(model).__name__} was not pruned; there is nothing to undo.")
    made = _sharing(model)
    for handle in made._pruning:  # type: ignore[union-attr]
        handle.remove()
    del made._pruning, made.rewrite, made.original
    return made


def parse_grid(text: str | None) -> tuple[Tile, ...] | None:
    """ "24x24,48x36+1" -> ((24, 24), (48, 36, 1))."""
    if text is None:
        return None
    out: list[Tile] = []
    for part in str(text).replace(" ", "").split(","):
        rows, _, rest = part.partition("x")
        columns, plus, extra = rest.partition("+")
        if not (rows.isdigit() and columns.isdigit() and (extra.isdigit() or not plus)) or "0" in (rows, columns):
            raise AdviceError(f"grid is written ROWSxCOLUMNS[+NEWLINES],..., such as grid='24x24', not {text!r}.")
        out.append((int(rows), int(columns), int(extra)) if plus else (int(rows), int(columns)))
    return tuple(out)


# ---- the parts of a model --------------------------------------------------------------------------------------------
def holder_of(model: nn.Module) -> nn.Module:
    """What is given the prompt's token numbers: the part of a transformers model that has a language_model; for a plain
    decoder itself."""
    for part in (model, getattr(model, "model", None)):
        if isinstance(getattr(part, "language_model", None), nn.Module):
            return part  # type: ignore[return-value]
    if isinstance(getattr(model, "layers", None), nn.ModuleList):
        return model
    raise AdviceError(
        f"{type(model).__name__} has no language_model that image tokens pass through. VlmTokens prunes LLaVA-like "
        "models of transformers (LlavaForConditionalGeneration ...), or a decoder with .layers that is called with "
        "image_tokens=: prune(model.model)."
    )


def decoder_of(model: nn.Module) -> Any:
    """The stack of layers; AdviceError for models whose image tokens cannot be dropped."""
    holder = holder_of(model)
    if holder is model and not hasattr(holder, "language_model"):
        return holder
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    decoder: Any = holder.language_model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        decoder = getattr(decoder, "model", decoder)
    if image_token(config) is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise AdviceError(
            f"{type(model).__name__} has no image tokens in its prompt (no image_token_id in its config), so there is "
            "nothing to prune; LlavaForConditionalGeneration and its kin have."
        )
    if kind in BIDIRECTIONAL or hasattr(decoder, "_deepstack_process"):
        why = "adds image features again in later layers" if kind not in BIDIRECTIONAL else "reads images both ways"
        raise AdviceError(
            f"{type(model).__name__} {why}, so its image tokens cannot be dropped on the way; LLaVA, LLaVA-NeXT, "
            "Qwen2-VL and Mistral-like models can be pruned."
        )
    return decoder


def image_token(config: Any) -> int | None:
    """Number of the word that stands for a piece of the image; None where the model has none."""
    found = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return None if found is None else int(found)


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers are the same tensors."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


# ---- hooks -----------------------------------------------------------------------------------------------------------
def _attached(made: nn.Module, by: VlmTokens) -> nn.Module:
    if isinstance(getattr(made, "rewrite", None), VlmTokens):
        raise AdviceError(f"This {type(made).__name__} prunes already ({made.rewrite}); start from unpruned(model).")
    assert by.layers is not None
    holder, decoder, key = holder_of(made), decoder_of(made), object()
    handles = [
        holder.register_forward_pre_hook(_begin(key, by), with_kwargs=True),
        holder.register_forward_hook(_end(key, decoder is holder), always_call=True),
    ]
    if decoder is not holder:
        handles.append(decoder.register_forward_hook(_whole(key)))
    for index in range(by.layers[0] - 1, len(decoder.layers)):
        handles.append(decoder.layers[index].register_forward_pre_hook(before_layer(key, index), with_kwargs=True))
    made._pruning = handles  # type: ignore[assignment]
    signed(made, by)
    return made


def _begin(key: object, by: VlmTokens) -> Callable[..., Any]:
    """Before the model reads a prompt: where its image tokens are, and how they lie."""

    def hook(holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plain = not hasattr(holder, "language_model")
        if plain and "image_tokens" in kwargs:
            kwargs = dict(kwargs)
            image = kwargs.pop("image_tokens")
        else:
            image = None
        first = args[0] if args else None
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and getattr(cache, "is_compileable", False):
            raise AdviceError(
                f"{type(cache).__name__} gives every layer the same room, but pruned layers hold fewer tokens; use "
                "transformers.DynamicCache(), or generate(cache_implementation='dynamic')."
            )
        if plain:
            embeds: Any = kwargs.get("inputs_embeds", first)
            shape = None if embeds is None else embeds.shape[:2]
            if shape is None:
                shape = kwargs["input_ids"].shape[:2]
                embeds = kwargs["input_ids"]
            if image is None:
                image = torch.zeros(shape, dtype=torch.bool, device=embeds.device)
        else:
            image = _image_tokens(holder, kwargs, first)
        n = image.shape[1]
        pruning = n > 1 and bool(image.any())
        if n > 1 and not past and not pruning:
            raise AdviceError(
                "The prompt holds no image, so there is nothing to prune: "
                + (
                    "say which tokens are the image's with image_tokens=."
                    if plain
                    else f"put the image's tokens (number {image_token(holder.config)}) into it with the model's "
                    "processor and give pixel_values, or read plain text with unpruned(model)."
                )
            )
        mask = kwargs.get("attention_mask")
        valid = None
        if pruning and isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -n:].bool()
            image, valid = image & valid, None if bool(valid.all()) else valid
        grid = torch.zeros_like(image)
        if pruning and by.method in ("feather", "uniform"):
            tiles = layouts.tiles_of(holder, kwargs, image, parse_grid(by.grid))
            assert by.stride is not None
            marks = torch.cat([on_grid(t, by.stride) for t in tiles])
            if by.last:
                marks |= torch.cat([final_share([length([t]) for t in row], by.last) for row in tiles])
            grid[image] = marks.to(image.device)
        assert by.layers is not None
        at = Pass(
            owner=key, layers=by.layers, stage=by.stays, image=image, grid=grid, valid=valid, past=past, pruning=pruning
        )
        at.token = current.set(at)
        return args, kwargs

    return hook


def _image_tokens(holder: Any, kwargs: dict[str, Any], first: Any) -> Tensor:
    """(b, n) bool: the placeholders of the image, found as the model itself finds them."""
    number = image_token(holder.config)
    ids = kwargs.get("input_ids", first)
    if ids is not None:
        return ids == number
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise AdviceError("A pruned model needs input_ids (or inputs_embeds) as a keyword: model(input_ids=...).")
    word = holder.get_input_embeddings()(torch.tensor(number or 0, device=embeds.device))
    return (embeds == word).all(-1)


def _whole(key: object) -> Callable[..., Any]:
    """Behind the decoder: outputs for the whole prompt, so that labels and slices of logits fit."""

    def hook(decoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        at = current.get()
        if at is None or at.owner is not key or not at.pruning:
            return output
        seen = watched.get()
        if seen is not None:
            seen.append(Kept(image=at.image, layers=dict(at.kept)))
        norm = getattr(decoder, "norm", None) or nn.Identity()
        if isinstance(output, Tensor):
            return restored(at, output, norm)
        if isinstance(output, tuple):
            return (restored(at, output[0], norm), *output[1:])
        output.last_hidden_state = restored(at, output.last_hidden_state, norm)
        return output

    return hook


def _end(key: object, plain: bool) -> Callable[..., Any]:
    """Behind the model, also when it failed."""

    def hook(holder: Any, args: tuple[Any, ...], output: Any) -> Any:
        at = current.get()
        if at is None or at.owner is not key:
            return output
        if plain and output is not None:
            output = _whole(key)(holder, args, output)
        current.reset(at.token)
        return output

    return hook
