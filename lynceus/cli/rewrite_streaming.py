"""`lynceus rewrite streaming MODEL`: a network of video, skeletons or tokens that is run one frame at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from lynceus.cli._models import is_name
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import merged, parse, with_options
from lynceus.core.errors import AdviceError

if TYPE_CHECKING:
    from torch import nn

TARGET = "lynceus.rewrite.streaming.model:Streaming"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Converts a clip model, saves it to a folder, and measures a step beside the clip: FLOPs, time, memory, and
    whether they agree."""

    model: Positional[str]  # x3d_s, st_gcn_star_ntu, encoder_b1 ..., or the folder of a saved network
    weights: Path | None = None  # checkpoint for a network given by name
    num_classes: int | None = None  # classes of a network given by name
    frames: int | None = None  # of the clip that a step is measured beside; default: what the network is made for
    frame: tuple[int, ...] | None = None  # channels, then height and width (joints, skeletons); default: the network's
    batch: int = 1  # streams that run in step with each other
    repeats: int = 10  # timed turns
    export: bool = False  # also write step.pt2: the step as a graph from tensors to tensors, with its state
    seed: int = 0  # of the frames, and of the weights of a bare name
    out: Path | None = None  # folder; default: runs/rewrite/streaming


def main(argv: Sequence[str]) -> int:
    options = parse(
        with_options(Options, rewrite=TARGET), argv, prog="lynceus rewrite streaming",
        description="A network of video, skeletons or tokens, run one frame at a time.",
    )  # fmt: skip
    if options.batch < 1:
        raise AdviceError(f"--batch is at least 1, not {options.batch}.")
    import torch

    from lynceus.rewrite.streaming.names import frame_shape
    from lynceus.rewrite.streaming.report import measure
    from lynceus.train.checkpoint import save_model

    model, expression = opened(options)
    rewrite = merged(options, "rewrite")
    stream = rewrite(model)
    shape = options.frame or frame_shape(model)
    if shape is None:
        raise AdviceError("What a frame looks like is not known of this network: --frame 3 224 224.")
    out = run_folder(options.out, "rewrite", "streaming")
    like = (options.batch, *shape)
    state = stream.start(like)
    report = measure(stream, like, frames=options.frames, repeats=options.repeats, seed=options.seed)
    if is_name(options.model) and options.weights is None:
        report.notes.append("The weights are fresh ones: what is measured is cost and agreement, not accuracy.")
    save_model(stream, out)
    twin = (
        f"import torch\n{expression}\n"
        "from lynceus.rewrite.streaming import Streaming\n"
        "from lynceus.rewrite.streaming.report import measure\n"
        "from lynceus.train.checkpoint import save_model\n\n"
        f"stream = {rewrite!r}(model)\nsave_model(stream, {str(out)!r})\n"
        f"print(measure(stream, {like!r}, frames={options.frames!r}, repeats={options.repeats}).table())\n\n"
        f"state = stream.start({like!r})\noutput, state = stream.step(torch.randn{like!r}, state)"
    )
    if options.export:
        module = stream.step_module()
        program = torch.export.export(module, module.inputs(torch.zeros(like), state))
        torch.export.save(program, str(out / "step.pt2"))
        twin += f"\n\nstep = torch.export.load({str(out / 'step.pt2')!r}).module()"
    show(report, out=out, twin=twin)
    print(f"\nthe stream: {out}  (in Python: stream = lynceus.train.checkpoint.load_model({str(out)!r}))")
    return 0


def opened(options: Any) -> tuple[nn.Module, str]:
    """The network that is named, and the line of Python that makes it."""
    from lynceus.core.rng import borrowed
    from lynceus.rewrite.streaming.names import create, known, variants

    text = options.model
    if is_name(text):
        found = known(text)
        if found is None:
            _explain(text, list(variants()))
        changes = {} if options.num_classes is None else {"num_classes": options.num_classes}
        with borrowed(options.seed, "weights"):
            model = create(text, weights=options.weights, **changes)
        told = changes | ({} if options.weights is None else {"weights": str(options.weights)})
        more = "".join(f", {k}={v!r}" for k, v in told.items())
        line = f"from lynceus.rewrite.streaming.names import create\n\nmodel = create({text!r}{more})"
        return model, line
    if options.weights is not None or options.num_classes is not None:
        raise AdviceError("--weights and --num-classes go with a name; a folder has its own.")
    from lynceus.cli._models import open_model

    model = open_model(text)
    if not hasattr(model, "time_axis"):
        if hasattr(model, "step"):
            raise AdviceError(f"{text} is a stream already: load_model({text!r}).step(frame, state).")
        _explain(text, list(variants()))
    return model, f"from lynceus.train.checkpoint import load_model\n\nmodel = load_model({text!r})"


def _explain(text: str, names: list[str]) -> None:
    from lynceus.backbones._table import variants
    from lynceus.core.errors import unknown

    if is_name(text) and not text.startswith("timm:") and text not in variants():
        raise unknown("network of sequences", text, names)
    raise AdviceError(
        f"{text} looks at one image at a time, so there is nothing for a stream to remember: run it on every frame "
        f"as it is (lynceus predict). Networks of sequences are {', '.join(names)}; in Python, "
        "lynceus.rewrite.streaming.convert takes your own."
    )
