"""`lynceus edge FOLDER PICTURES`: runs a plan of `lynceus rewrite split` on this machine, one process per device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the fused sub-models say of pictures, asked over TCP from processes pinned to cores; a row per picture, a
    table of the devices, and the measured latency beside the predicted one."""

    folder: Positional[str]  # of a plan
    source: Positional[str]  # a picture, a folder, or whatever `lynceus data` reads
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many pictures
    batch: int = 16  # pictures in one request
    deadline: float = 5.0  # seconds that an answer may take
    kill: tuple[str, ...] = ()  # devices whose process is ended half-way, to see what is lost
    repeats: int = 10  # measurements of latency on one picture; 0 for none
    unshaped: bool = False  # let messages pass at once, whatever the links' rates and delays
    out: Path | None = None  # folder; default: runs/edge/FOLDER


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus edge")
    from lynceus.core.errors import AdviceError
    from lynceus.rewrite.split import Plan
    from lynceus.serve.edge import EdgeConfig, deploy

    if not 1 <= options.batch <= 256 or options.repeats < 0:
        raise AdviceError(f"--batch is 1 to 256 and --repeats is 0 or more; not {options.batch} and {options.repeats}.")
    plan = Plan.load(options.folder)
    for name in options.kill:
        plan.on(name)
    out = run_folder(options.out, "edge", Path(options.folder).resolve().name)
    names, image, label = _pictures(options, plan)
    config = EdgeConfig(deadline=options.deadline, shaped=not options.unshaped)
    rows: list[dict[str, Any]] = []
    right = 0
    with deploy(plan, folder=options.folder, config=config) as cluster:
        timed = None
        if options.repeats:
            one = image[:1]
            timed = cluster.timed(one, repeats=options.repeats, plan=cluster.calibrated(one, repeats=options.repeats))
        pieces = image.split(options.batch)
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2:
                for name in options.kill:
                    cluster.kill(name)
            answer = cluster.ask(piece)
            for row in answer.logits.softmax(1):
                i, best = len(rows), int(row.argmax())
                entry = {"picture": names[i], "answer": plan.names[best], "confidence": float(row[best])}
                if label[i] is not None:
                    right += best == label[i]
                    entry["right"] = best == label[i]
                rows.append({**entry, "without": ", ".join(answer.missing)})
        status = cluster.status()
    from lynceus.core.report import Report

    report = Report(name=f"Edge: {plan.net.name}", rows=rows, parts=[status], answer=status.answer)
    report.summary["pictures"] = float(len(rows))
    known = sum(v is not None for v in label)
    if known:
        report.summary["accuracy"] = right / known
    if timed is not None:
        report.summary |= {
            "measured ms": 1e3 * timed.wall,
            "predicted ms": 1e3 * timed.predicted,
            "measured / predicted": timed.wall / timed.predicted,
        }
        report.notes.append(
            "Latency of one picture, median; "
            + ("devices share cores, so they were asked one by one and the slowest counts." if timed.simulated
               else "all devices at once, each on a core of its own.")
            + " Predicted with the speeds that the devices have here."
        )  # fmt: skip
    twin = (
        "from lynceus.rewrite.split import Plan\nfrom lynceus.serve.edge import deploy\n\n"
        f"plan = Plan.load({options.folder!r})\nwith deploy(plan, folder={options.folder!r}) as cluster:\n"
        "    print(cluster(images), cluster.status())  # images: as the plan's model takes them"
    )
    show(report, out=out, twin=twin)
    return 0


def _pictures(options: Options, plan: Any) -> tuple[list[str], Any, list[int | None]]:
    """Names, images as the plan takes them, and labels where they are known and are the plan's classes."""
    import torch

    import lynceus.data
    from lynceus.core.errors import AdviceError
    from lynceus.core.subject import Subject
    from lynceus.tasks.classify import resized

    data = lynceus.data.open(options.source, split=options.split, limit=options.limit)
    subject, size = Subject(plan.net), plan.image_shape[1:]
    bytewise = plan.image_bytes == plan.image_shape[0] * size[0] * size[1]
    same = list(getattr(data, "classes", None) or ()) == list(plan.names)
    names: list[str] = []
    images, labels = [], []
    for sample in data:
        x = sample.image[None]
        if tuple(x.shape[-2:]) != tuple(size):
            x = resized(x, size)
            x = (255 * x).round().to(torch.uint8) if bytewise else x
        images.append(x if bytewise else subject.prepare(x))
        names.append(sample.id)
        labels.append(sample.label if same and isinstance(sample.label, int) else None)
    if not images:
        raise AdviceError(f"There is no picture in {options.source}.")
    return names, torch.cat(images), labels
