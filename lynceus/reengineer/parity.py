"""Parity with the authors' code: rebuild a record's model, fill it by name, run it in float64, compare fingerprints.

A record (JSON) was measured on the authors' own code and holds `family`, `config` (their constructor's names), `state`
(their parameter names and shapes), `inputs` (shape and seed) and `outputs` (fingerprints). A network family is in
`FAMILIES` with the module that knows how to rebuild and compare it; a family whose records hold no network (losses,
operators, metrics, noise statistics) is listed in `KINDS` with one function record -> list[Row] that states its own
tolerance. A family adds itself by one line in one of the two tables.

A network family's module holds

    SOURCES: dict[str, tuple[Rule, ...]]         # foreign names -> ours; "authors" is tried first
    build(config) -> nn.Module                   # from the record's config; or build(config, record)
    compare(model, inputs, record) -> dict[str, Tensor]
    tolerances(record) -> dict[str, tuple[float, str]]   # optional: output -> (tolerance, why it is not 1e-6)
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.report import Report
from lynceus.core.rules import Matching, best_table
from lynceus.reengineer.filling import filled, fingerprint, gap, image

TOLERANCE = 1e-6  # in units of the output's standard deviation

FAMILIES: dict[str, str] = {
    "bound_propagation": "lynceus.reengineer.keys.bounds",
    "blind_spots": "lynceus.reengineer.keys.level_sets",
    "continual": "lynceus.reengineer.keys.continual",
    "convit": "lynceus.reengineer.keys.convit",
    "convnext": "lynceus.reengineer.keys.convnext",
    "lsnet": "lynceus.reengineer.keys.lsnet",
    "halonet": "lynceus.reengineer.keys.halonet",
    "cvt": "lynceus.reengineer.keys.cvt",
    "hornet": "lynceus.reengineer.keys.hornet",
    "hyena-nd": "lynceus.reengineer.keys.hyena_vit",
    "milan": "lynceus.reengineer.keys.milan",
    "plain-mamba": "lynceus.reengineer.keys.plain_mamba",
    "resnet": "lynceus.reengineer.keys.resnet",
    "soft": "lynceus.reengineer.keys.soft",
    "ssm-token-pruning": "lynceus.reengineer.keys.ssm_token_pruning",
    "spartan": "lynceus.reengineer.keys.spartan",
    "swin": "lynceus.reengineer.keys.swin",
    "swin-v2": "lynceus.reengineer.keys.swin_v2",
    "vim": "lynceus.reengineer.keys.vim",
    "vit-resnas": "lynceus.reengineer.keys.resnas",
    "vit": "lynceus.reengineer.keys.vit",
    "volo": "lynceus.reengineer.keys.volo",
}
KINDS: dict[str, str] = {  # family -> "module:function", a function record -> list[Row]
    "corruptions": "lynceus.reengineer.keys.corruptions:check",
    "corruptions32": "lynceus.reengineer.keys.corruptions:check",
    "losses": "lynceus.reengineer.keys.losses:check",
    "imagenet_e": "lynceus.reengineer.keys.edits:rows",
    "feature_guided": "lynceus.reengineer.keys.saliency:check",
    "fooling": "lynceus.reengineer.keys.evolution:check",
    "expedite": "lynceus.reengineer.keys.expedite:check",
    "spa": "lynceus.reengineer.keys.spa:check",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One compared output; gap and tolerance in units of the output's standard deviation, unless `note` says else."""

    record: str
    output: str
    gap: float
    tolerance: float
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.gap <= self.tolerance


def families() -> list[str]:
    """Every family whose records can be checked."""
    return sorted([*FAMILIES, *KINDS])


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a JSON file. A missing or unreadable file, or an unknown family, is an advising error."""
    path = Path(path)
    if path.is_dir():
        raise AdviceError(f"{path} is a folder; give its records: lynceus parity {path}/*.json")
    if not path.is_file():
        raise MissingError(f"There is no record at {str(path)!r} (looked at {path.resolve()}).")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdviceError(f"{path} ({path.stat().st_size} bytes) is not readable JSON: {error}.") from None
    if not isinstance(record, dict) or not isinstance(record.get("family"), str):
        raise AdviceError(
            f"{path} is JSON but no parity record: a record has 'family', 'config', 'state', 'inputs' and 'outputs'."
        )
    if record["family"] not in FAMILIES and record["family"] not in KINDS:
        advice = unknown("family", record["family"], families(), how=f"({path} asks for it.)")
        raise AdviceError(f"{advice} Families that can be checked: {', '.join(families())}.")
    if record["family"] in FAMILIES:
        lacking = [k for k in ("config", "state", "inputs", "outputs") if not isinstance(record.get(k), dict)]
        if lacking:
            raise AdviceError(
                f"{path} is a {record['family']} record without {', '.join(lacking)}; it cannot be rebuilt."
            )
    return record


def make_input(spec: Mapping[str, Any]) -> Tensor:
    """A record's input: standard normal of `shape` from `seed`, times `scale`, plus `shift` (float64)."""
    odd = set(spec) - {"shape", "seed", "scale", "shift"}
    if odd or not isinstance(spec.get("shape"), list):
        raise AdviceError(f"An input is given by shape, seed, scale and shift; this one says {dict(spec)}.")
    value = image(spec["shape"], int(spec.get("seed", 0)))
    return torch.from_numpy(value * spec.get("scale", 1.0) + spec.get("shift", 0.0))


def authors_state(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The record's parameters and statistics under the authors' names, filled (float64)."""
    state = {}
    for name, shape in record["state"].items():
        if isinstance(shape, dict):
            shape = shape.get("shape")
        if not isinstance(shape, list):
            raise AdviceError(f"The record's state gives no shape for {name!r} but {shape!r}.")
        state[name] = torch.from_numpy(filled(name, shape))
    return state


def rebuild(record: Mapping[str, Any]) -> tuple[nn.Module, Matching, int]:
    """Our model in float64 and eval mode, holding the record's weights; how the names matched; its parameter count.

    Raises AdviceError with the full account when a parameter of ours got nothing, or one of theirs went nowhere.
    """
    module = import_module(FAMILIES[record["family"]])
    model: nn.Module = _call(module.build, record["config"], record)
    count = sum(p.numel() for p in model.parameters())
    matching = best_table(authors_state(record), model, module.SOURCES, resize=False)
    if not matching.account.complete:
        raise AdviceError("The record's names do not all find their place.\n" + matching.account.text(expand=True))
    # assign keeps one copy of the weights in memory; untouched buffers stay as the model built them
    model.load_state_dict(matching.values, strict=False, assign=True)
    return model.double().eval(), matching, count


def check_record(path: str | Path | Mapping[str, Any]) -> list[Row]:
    """Rebuilds one record and compares every output and the parameter count.

    Raises AdviceError when the file is no record, its family is unknown, or its weights do not fit our model.
    """
    record = read_record(path) if isinstance(path, (str, Path)) else dict(path)
    name = str(record.get("model") or record.get("name") or record["family"])
    if record["family"] in KINDS:
        return list(_named(KINDS[record["family"]])(record))
    module = import_module(FAMILIES[record["family"]])
    model, _matching, count = rebuild(record)
    inputs = {k: make_input(v) for k, v in record["inputs"].items()}
    with torch.no_grad():
        outputs = module.compare(model, inputs, record)
    return [
        *_count_row(record, name, count),
        *compare_outputs(name, outputs, record["outputs"], tolerances=_tolerances(module, record)),
    ]


def compare_outputs(
    name: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    tolerances: Mapping[str, tuple[float, str]] | None = None,
    note: str = "",
) -> list[Row]:
    """A row per recorded output. `theirs` holds fingerprints or plain numbers; `ours` tensors, arrays or numbers."""
    rows = []
    for output, want in theirs.items():
        tolerance, why = (tolerances or {}).get(output, (TOLERANCE, ""))
        if output not in ours:
            rows.append(
                Row(
                    record=name, output=output, gap=math.inf, tolerance=tolerance, note="our compare() does not give it"
                )
            )
            continue
        have = ours[output].detach().double().cpu().numpy() if isinstance(ours[output], Tensor) else ours[output]
        if isinstance(want, dict):
            got = fingerprint(have, len(want["values"]), exact=True)
            remark = why or note
            if got["shape"] != list(want["shape"]):
                remark = f"shape {got['shape']} instead of {want['shape']}"
            rows.append(Row(record=name, output=output, gap=gap(got, want), tolerance=tolerance, note=remark))
        else:
            number = abs(float(have) - float(want)) / max(abs(float(want)), 1e-12)
            rows.append(
                Row(record=name, output=output, gap=number, tolerance=tolerance, note=why or "relative difference")
            )
    return rows


def parity(
    paths: Sequence[str | Path] | str | Path, *, progress: Callable[[int, int, str], None] | None = None
) -> Report:
    """Checks records and returns the table. summary["exit_code"] is 0 when all agree, 1 when some differ, 2 when a
    record could not be rebuilt.

    paths: record files. progress: called with (done, total, name) before each record.
    Raises AdviceError before any work when a file is no record or of a family that nobody rebuilds.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise AdviceError("parity needs at least one record: lynceus parity FILE.json [FILE.json ...]")
    records = [(Path(p), read_record(p)) for p in paths]
    report = Report(name="parity")
    bad = differ = 0
    for done, (path, record) in enumerate(records):
        if progress is not None:
            progress(done, len(records), path.stem)
        began = time.perf_counter()
        try:
            rows = check_record(record)
        except AdviceError as error:
            bad += 1
            report.rows.append(_line(path.stem, "-", math.inf, TOLERANCE, "cannot be rebuilt"))
            report.notes.append(f"{path.stem}: {error}")
            continue
        differ += not all(r.agrees for r in rows)
        for r in rows:
            report.rows.append(
                _line(path.stem, r.output, r.gap, r.tolerance, "agrees" if r.agrees else "DIFFERS", r.note)
            )
        verdict = "agrees" if all(r.agrees for r in rows) else "DIFFERS"
        report.notes.append(f"{path.stem}: {verdict} ({time.perf_counter() - began:.1f} s)")
    gaps = [r["largest difference / std"] for r in report.rows if r["output"] != "-"]
    report.summary = {
        "records": float(len(records)),
        "agree": float(len(records) - bad - differ),
        "largest difference / std": max(gaps, default=math.inf),
        "exit_code": 2.0 if bad else 1.0 if differ else 0.0,
    }
    return report


def _line(record: str, output: str, largest: float, tolerance: float, verdict: str, note: str = "") -> dict[str, Any]:
    return {
        "record": record,
        "output": output,
        "largest difference / std": largest,
        "tolerance": tolerance,
        "verdict": verdict,
        "note": note,
    }


def exit_code(report: Report) -> int:
    """What the command line exits with."""
    return int(report.summary["exit_code"])


def _count_row(record: Mapping[str, Any], name: str, count: int) -> list[Row]:
    claimed = record.get("parameters")
    if not isinstance(claimed, int):
        return []
    note = f"{count:,}" if count == claimed else f"{count:,} instead of {claimed:,}"
    return [
        Row(record=name, output="parameter count", gap=abs(count - claimed) / max(claimed, 1), tolerance=0.0, note=note)
    ]


def _tolerances(module: Any, record: Mapping[str, Any]) -> Mapping[str, tuple[float, str]]:
    given = getattr(module, "tolerances", None)
    return given(record) if given is not None else {}


def _call(build: Callable[..., nn.Module], config: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    return build(config, record) if len(inspect.signature(build).parameters) > 1 else build(config)


def _named(where: str) -> Callable[..., Any]:
    module, _, function = where.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
