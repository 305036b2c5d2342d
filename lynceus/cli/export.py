"""`lynceus export MODEL`: torch.export and ONNX with free sizes, run and compared with the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._models import open_model, size_of, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Writes model.pt2 (torch.export) and model.onnx with free batch, height and width where the model allows, runs
    both beside the original, and refuses to call it exported when they differ."""

    model: Positional[str]  # a name of `lynceus models`, timm:NAME, or a run folder
    size: tuple[int, int] | None = None  # height and width of the example; default: the size the model was made for
    onnx: bool = True  # write model.onnx
    torch: bool = True  # write model.pt2
    tolerance: float = 1e-5  # largest difference allowed, relative to the output's largest value
    weights: Path | None = None  # checkpoint for a model given by name
    out: Path | None = None  # folder; default: runs/export/MODEL


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus export")
    out = run_folder(options.out, "export", Path(options.model).name.replace(":", "-"))
    import torch

    from lynceus.core.errors import AdviceError
    from lynceus.rewrite.export import Format, export

    wanted: dict[Format, bool] = {"torch": options.torch, "onnx": options.onnx}
    formats = tuple(name for name in wanted if wanted[name])
    if not formats:
        raise AdviceError("Nothing to write: --no-onnx and --no-torch leave no format.")
    model = open_model(options.model, weights=options.weights)
    inner = getattr(model, "backbone", model)
    size = size_of(model, options.size)
    example = torch.rand(2, getattr(getattr(inner, "config", None), "in_chans", 3), *size)
    report = export(model, example, out, formats=formats, tolerance=options.tolerance)
    line, expression = twin_of(options.model, weights=options.weights)
    twin = (
        f"import torch\n{line}\nfrom lynceus.rewrite.export import export\n\n"
        f"export({expression}, torch.rand{tuple(example.shape)!r}, {str(out)!r}, formats={formats!r}, "
        f"tolerance={options.tolerance!r})"
    )
    show(report, out=out, twin=twin)
    return 0
