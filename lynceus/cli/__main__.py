"""The command line: `lynceus VERB ...`. Every verb is a Python function first; torch is imported when work starts."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import lynceus

# verb -> (module, one line)
VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("lynceus.cli.doctor", "what this machine has: versions, device, memory, write rights, missing extras"),
    "demo": ("lynceus.cli.demo", "the gauntlet of four small backbones on real digits, from scratch, in minutes"),
    "models": ("lynceus.cli.models", "find models by name: parameters, MACs, sizes, parity"),
    "info": ("lynceus.cli.info", "the card of one model: options, levels, cost, where it was checked"),
    "cost": ("lynceus.cli.cost", "parameters, MACs, memory and time of a model at a size"),
    "data": ("lynceus.cli.data", "what is in a folder or file of images, and what is wrong with it"),
    "train": ("lynceus.cli.train", "train a model on your images; resumable"),
    "predict": ("lynceus.cli.predict", "what a trained model says of a picture, a folder, a file"),
    "gauntlet": ("lynceus.cli.gauntlet", "which backbone for these images: several through the same course, ranked"),
    "check": ("lynceus.cli.check", "one check of a model: accuracy, probes, shift consistency, scaling, cost"),
    "trust": ("lynceus.cli.trust", "what breaks a model and what provably cannot: one report of all that fits it"),
    "load": ("lynceus.cli.load", "put a load on a server: throughput, latency, the knee of its curve"),
    "profile": ("lynceus.cli.profile", "where the milliseconds of a served model go, from one request to a crowd"),
    "rewrite": ("lynceus.cli.rewrite", "change a model: deploy, prune, adapt, stream, fewer tokens"),
    "search": ("lynceus.cli.search", "find a smaller network from a trained one"),
    "export": ("lynceus.cli.export", "torch.export and ONNX with free sizes, compared with the original"),
    "inspect": ("lynceus.cli.inspect", "what is in a checkpoint file, without running code from it"),
    "serve": ("lynceus.cli.serve", "answer pictures over HTTP, and show where the milliseconds go"),
    "edge": ("lynceus.cli.edge", "run a split model here: a process per device, over TCP, one may die"),
    "parity": ("lynceus.cli.parity", "compare our models with records measured on the authors' code"),
    "diff": ("lynceus.cli.diff", "two models, or two reports: where they begin to differ"),
}
ALIASES = {"list": "models", "--list": "models"}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return (
        f"lynceus {lynceus.__version__}: which vision model should I take for my images, can I trust it, and how do I "
        f"make it small and fast?\n\nusage: lynceus VERB [options]     lynceus VERB --help\n\n{lines}\n\n"
        "Every verb is also a Python function; each run prints its Python twin at the end."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, or 1 when a comparison does not hold, or 2 for a mistake that the text explains."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(lynceus.__version__)
        return 0
    from lynceus.core.errors import AdviceError, AdviceWarning, unknown

    verb = ALIASES.get(args[0], args[0])
    plain = warnings.formatwarning

    def told(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        advice = category is AdviceWarning  # which says what to do, so where it was raised is of no use
        return f"lynceus {verb}: {message}\n" if advice else plain(message, category, filename, lineno, line)

    warnings.formatwarning = told
    try:
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS, how="lynceus --help lists all.")
        return import_module(VERBS[verb][0]).main(args[1:])
    except AdviceError as error:
        print(f"lynceus {verb}: {error}", file=sys.stderr)
    except PermissionError as error:
        print(
            f"lynceus {verb}: no right to write {error.filename}. Choose another folder with --out FOLDER, "
            "or change the rights.",
            file=sys.stderr,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"lynceus {verb}: {str(stop) or 'interrupted.'}", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print(
            f"lynceus {verb}: this is a defect of lynceus, not of your input; please report the lines above.",
            file=sys.stderr,
        )
        return 70
    finally:
        warnings.formatwarning = plain
    return 2


if __name__ == "__main__":
    sys.exit(main())
