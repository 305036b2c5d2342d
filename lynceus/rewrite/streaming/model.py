"""Continual inference: a trained clip model, run one frame at a time with the same weights and the same outputs.

Hedegaard, Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022, arXiv 2106.00050, and Continual Inference:
a library, ECCV Workshops 2022, arXiv 2204.03418. Reference code: LukasHedegaard/continual-inference (Apache-2.0).

    stream = convert(model, window=16)
    state = stream.start((1, 3, 112, 112))
    for frame in camera:                        # (1, 3, 112, 112)
        output, state = stream.step(frame, state)   # None while it warms up

A state is a value: it is never written to, so it can be kept, gone back to, saved, and any number of streams share one
model. Layers padded in time see zeros before the first frame and none in between, so their stream equals the clip model
on the whole stream, not on each window of it; without padding it equals both.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.clock import Clock, Rate, SteadyClock, TracedClock
from lynceus.rewrite.streaming.convert import Walk, axes_of, node_of
from lynceus.rewrite.streaming.node import Fill, Node


@dataclass(frozen=True, slots=True)
class State:
    """What one stream remembers: a value that no step writes to.

    tensors: what the layers hold, in the order of the network. frames: how many frames were seen. of: the structure of
    the model it belongs to. like: shape (b, c, ...) of a frame.
    """

    tensors: tuple[Tensor, ...]
    frames: int
    of: str
    like: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Memory of the tensors, each counted once."""
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in self.tensors}.values())


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Rewrite: the same model with a `step` that takes one frame; see `convert`.

    window: frames of a clip, for layers that look at all of it (global pooling, attention); None: what the model itself
    says it is. fill: what padded layers
    see before the first frame: "zeros" as in the clip model, or "replicate", the first frame again.
    """

    window: int | None = None
    fill: Literal["zeros", "replicate"] = "zeros"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise AdviceError(f"window is the number of frames in a clip, at least 1, not {self.window}.")
        if self.fill not in ("zeros", "replicate"):
            raise AdviceError(f"fill is 'zeros' or 'replicate', not {self.fill!r}.")

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> StreamingModel:
        """A copy of `model` that can be stepped, in eval mode. example: a clip (b, c, t, ...), run once to see it fit.

        AdviceError naming the first module that cannot be streamed."""
        if isinstance(model, StreamingModel):
            raise AdviceError("This model was converted already; its clip model is model.model.")
        made = StreamingModel(copy.deepcopy(model).eval(), self)
        if example is not None:
            with torch.no_grad():
                made(example)
                made.start(example.select(made.time, 0))
        return made


def convert(model: nn.Module, *, window: int | None = None, fill: Fill = "zeros") -> StreamingModel:
    """A copy of a clip model that can be stepped frame by frame; `model` stays as it is.

    model: of nn.Conv1d/2d/3d (time is the first axis behind the channels), batch norms, pooling, activations, linear
    layers, nn.TransformerEncoder(Layer), nn.Sequential, and `Residual`, `Parallel`, `EachFrame` of this package.
    window, fill: see `Streaming`. Raises AdviceError naming the first module that cannot be streamed.
    """
    return Streaming(window=window, fill=fill)(model)


class StreamingModel(nn.Module):
    """What `convert` makes. `forward` is the clip model's; `step` takes one frame.

    model: the clip model, which owns all weights. delay: frames before the first output. receptive_field, padding,
    stride: over time, in frames. time: the axis of time in clips.
    """

    def __init__(self, model: nn.Module, by: Streaming):
        super().__init__()
        for m in model.modules():
            if getattr(m, "inplace", False):
                m.inplace = False  # type: ignore[assignment]  # what a layer holds must not be overwritten
        self.model = model
        self.rewrite = by
        self.time, rank = axes_of(model)
        window = getattr(model, "window", None) if by.window is None else by.window
        walk = Walk(window=window, fill=by.fill, time=self.time, rank=rank)
        self._node: Node = node_of(model, walk)
        self.rate: Rate = walk.rate
        self.structure = hashlib.blake2b(self._node.describe().encode(), digest_size=8).hexdigest()
        self.name = f"{getattr(model, 'name', type(model).__name__)}, streaming"
        self.owns_pixels = bool(getattr(model, "owns_pixels", False))
        self._compiled: dict[int, Any] = {}
        self.eval()

    @property
    def original(self) -> Any:
        """The clip model, or where a file cannot say how to build it, its name: load_model(path, backbone=...)."""
        says = any(hasattr(self.model, n) for n in ("task", "config", "rewrite"))
        return self.model if says else _Bare(type(self.model).__name__)

    @property
    def delay(self) -> int:
        return self.rate.delay

    @property
    def receptive_field(self) -> int:
        return self.rate.reach

    @property
    def padding(self) -> int:
        return self.rate.padding

    @property
    def stride(self) -> int:
        return self.rate.stride

    def forward(self, x: Tensor, *options: Any) -> Any:
        """The clip model."""
        return self.model(x, *options)

    # states -----------------------------------------------------------------------------------------
    def start(self, like: Tensor | Sequence[int]) -> State:
        """The state before the first frame. like: a frame, or its shape (b, c, ...), which stays fixed."""
        if isinstance(like, Tensor):
            frame = torch.zeros_like(like)
        else:
            p = next(self.parameters(), torch.empty(0))
            frame = torch.zeros(*like, dtype=p.dtype, device=p.device)
        self._evaluating()
        try:
            with torch.no_grad():
                held, _ = self._node.begin(frame)
        except RuntimeError as error:
            raise AdviceError(
                f"{self.name} takes no frames of shape {tuple(frame.shape)}, {frame.dtype} ({error}); a frame has the "
                "axes of a clip without time."
            ) from error
        return State(held, 0, self.structure, tuple(frame.shape))

    def check_state(self, frame: Tensor, state: State) -> None:
        """An AdviceError when the state is of another model, batch or frame size, or the model is in training mode."""
        if state.of != self.structure:
            raise AdviceError(
                f"This state belongs to another model than {self.name} (structure {state.of}, here {self.structure}); "
                "start a stream of this one: state = stream.start(frame)."
            )
        if tuple(frame.shape) != state.like:
            what = "batch" if tuple(frame.shape)[1:] == state.like[1:] else "frame"
            raise AdviceError(
                f"The stream was started for frames of {state.like}, and this {what} makes them {tuple(frame.shape)}; "
                "the state fixes both: state = stream.start(frame)."
            )
        if state.tensors and state.tensors[0].dtype != frame.dtype:
            raise AdviceError(
                f"The state holds {state.tensors[0].dtype}, the frame is {frame.dtype}; convert the frame, or start "
                "anew."
            )
        if self.training:
            self._evaluating()

    def _evaluating(self) -> None:
        if any(m.training for m in self.modules()):
            wrong = next(n for n, m in self.named_modules() if m.training)
            raise AdviceError(
                f"{wrong or self.name} is in training mode, where batch norms and dropout look at the whole batch of "
                "clips; call stream.eval() before stepping, and train on clips."
            )

    # steps ------------------------------------------------------------------------------------------
    def step(
        self, frame: Float[Tensor, b * channels_and_space], state: State, *, grad: bool = False
    ) -> tuple[Float[Tensor, b * rest] | None, State]:
        """One frame (b, c, ...): the output, or None when there is none for this frame; and the state after it.

        The state given is left as it was. grad: keep what gradients need, of this step and through the state of all
        before it. AdviceError when the state belongs to another model, batch or frame size."""
        self.check_state(frame, state)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            if self._compiled and state.frames >= self._steady:
                return self._step_compiled(frame, state)
            y, held = self._node(frame.clone(), state.tensors, Clock(state.frames))
        return y, State(held, state.frames + 1, state.of, state.like)

    def steps(
        self, frames: Tensor, state: State, *, pad_end: bool = False, grad: bool = False
    ) -> tuple[Tensor | None, State]:
        """Several frames at once, as a clip (b, c, t, ...): the outputs stacked where the clip has time (None when
        there are none), and the state after them. Layers see all frames together, as in a clip.

        pad_end: outputs as if the stream ended here, with the padding that clips have there; from a fresh state they
        are the clip model's. The state is the same either way, so the stream can go on."""
        if not frames.shape[self.time]:
            return None, state
        self.check_state(frames.select(self.time, 0), state)
        xs = frames.movedim(self.time, 0)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            ys, held = self._node.many(xs.clone(), state.tensors, state.frames, False)
            if pad_end:
                ys, _ = self._node.many(xs, state.tensors, state.frames, True)
        after = State(held, state.frames + len(xs), state.of, state.like)
        return (None if ys is None else ys.movedim(0, min(self.time, ys.ndim - 1))), after

    def stream(self, like: Tensor | Sequence[int]) -> Stream:
        """A holder of one stream's state; see `start` for `like`."""
        return Stream(self, self.start(like))

    # graphs -----------------------------------------------------------------------------------------
    @property
    def _steady(self) -> int:
        """Frames after which every layer has seen its whole reach."""
        return self.rate.reach + self.rate.padding

    def compile_step(self, **options: Any) -> StreamingModel:
        """From now on torch.compile runs the steps of warmed-up streams, one graph per phase of the temporal strides.

        options: of torch.compile. Warming up stays eager. Returns the model itself."""
        self._compiled = {
            phase: torch.compile(_Phase(self._node, phase), **options) for phase in range(self.rate.stride)
        }
        return self

    def _step_compiled(self, frame: Tensor, state: State) -> tuple[Tensor | None, State]:
        phase = (state.frames - self.rate.delay) % self.rate.stride
        y, held = self._compiled[phase](frame, torch.tensor(state.frames), state.tensors)
        return y, State(held, state.frames + 1, state.of, state.like)

    def step_module(self) -> StepModule:
        """The step as a module of tensors alone, for torch.export: see `StepModule`."""
        self._evaluating()
        return StepModule(self)


@dataclass(frozen=True)
class _Bare:
    """A model of which only the name is known."""

    name: str
    config: None = None
    stages: tuple[()] = ()


class _Phase:
    def __init__(self, node: Node, phase: int):
        self.node, self.phase = node, phase

    def __call__(self, frame: Tensor, frames: Tensor, held: tuple[Tensor, ...]) -> Any:
        return self.node(frame, held, SteadyClock(frames, self.phase + self.node.leaves.delay))


class StepModule(nn.Module):
    """One step from tensors to tensors: (frame, frames, *state) -> (output, ready, frames + 1, *state).

    frames: how many were seen, an integer tensor without axes. ready: a boolean; while it is False the output means
    nothing yet. The state is that of `start(...)`, flat: module.inputs(frame, state) puts the arguments together.
    Every layer is computed at every step, also those that temporal strides would let rest.
    """

    def __init__(self, stream: StreamingModel):
        super().__init__()
        self.model = stream.model
        self._node, self.rate = stream._node, stream.rate

    def forward(self, frame: Tensor, frames: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        clock = TracedClock(frames)
        y, new = self._node(frame, held, clock)
        assert y is not None
        return (y, clock.arrived(self.rate), frames + 1, *new)

    @staticmethod
    def inputs(frame: Tensor, state: State) -> tuple[Tensor, ...]:
        """The arguments for a frame and a state. Each tensor is a copy: exporters take no two that share memory."""
        return (frame, torch.tensor(state.frames), *[t.clone() for t in state.tensors])


class Stream:
    """One stream of one model, with its state inside.

    camera = stream.stream((1, 3, 112, 112))
    output = camera.step(frame)
    """

    def __init__(self, model: StreamingModel, state: State):
        self.model = model
        self._first = self._state = state

    def step(self, frame: Tensor, *, update_state: bool = True) -> Tensor | None:
        """The output for a frame, or None while there is none. update_state=False: as if the frame had not been."""
        y, state = self.model.step(frame, self._state)
        if update_state:
            self._state = state
        return y

    def steps(self, frames: Tensor, *, pad_end: bool = False, update_state: bool = True) -> Tensor | None:
        """Several frames at once, as a clip; see `StreamingModel.steps`."""
        y, state = self.model.steps(frames, self._state, pad_end=pad_end)
        if update_state:
            self._state = state
        return y

    def clean_state(self) -> None:
        """Back to before the first frame."""
        self._state = State(self._first.tensors, 0, self._first.of, self._first.like)

    def get_state(self) -> State:
        return self._state

    def set_state(self, state: State) -> None:
        """Goes on from a state of the same model, batch and frame size; an AdviceError for others."""
        if state.of != self.model.structure or state.like != self._first.like:
            raise AdviceError(
                f"This state is of another {'model' if state.of != self.model.structure else 'batch or frame size'} "
                f"({state.like}; this stream has {self._first.like})."
            )
        self._state = state
