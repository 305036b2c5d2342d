"""The model card of a reproduction: its source, what was checked and how closely, what is claimed and measured.

`python -m lynceus.reengineer.card --records tests/parity --out docs/cards` makes the cards of all families here. A card
is Markdown beside the same JSON; `lint` finds sections that are empty and figures that are claimed without a word on
whether they were measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lynceus.backbones._table import family_module
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.files import write_atomic
from lynceus.reengineer.claims import CLAIMS, PROTOCOL, UNMEASURED
from lynceus.reengineer.parity import FAMILIES, check_record, read_record

CHECKED = ("record", "reference", "outputs", "largest difference / std", "tolerance", "verdict")
COUNTED = ("variant", "parameters claimed", "parameters measured", "MACs claimed (G)", "MACs measured (G)", "remark")
BESIDE = {"sam_vit": ["expedite"]}  # records of a rewrite that hold the network of a family
REQUIRED = ("title", "source", "licence", "checked", "counts", "metrics", "deviations", "data", "use", "date")


@dataclass(kw_only=True)
class Card:
    """source: {"paper", "code", "checkpoint"}. checked: one dict per record (record, reference, outputs, difference,
    tolerance, verdict). counts: per variant claimed and measured parameters and multiply-adds. metrics: per variant
    {"metric", "claimed", "measured", "interval", "protocol", "remark"}. deviations: known differences."""

    title: str
    source: dict[str, str]
    licence: str
    checked: list[dict[str, Any]]
    counts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    deviations: list[str]
    data: str
    use: str
    environment: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def load(cls, path: str | Path) -> Card:
        """The card in a JSON file; an AdviceError when it is not one."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise AdviceError(f"{path} is no model card: {error}") from None

    def markdown(self) -> str:
        """The card as a page."""
        lines = [f"# {self.title}", ""]
        lines += [f"- **{k.capitalize()}**: {v}" for k, v in self.source.items() if v]
        lines += [f"- **Licence of the reference code**: {self.licence}", f"- **Date of this card**: {self.date}", ""]
        lines += ["## Intended use", "", self.use, "", "## Parts checked against the reference", ""]
        lines += _table(self.checked, *CHECKED)
        lines += ["## Counts", ""]
        lines += _table(self.counts, *COUNTED)
        lines += ["## Metrics", ""]
        lines += _table(self.metrics, "variant", "metric", "claimed", "measured", "interval", "protocol", "remark")
        lines += ["## Known deviations", "", *(f"- {d}" for d in self.deviations), "", "## Data", "", self.data, ""]
        if self.environment:
            lines += ["## Measured with", "", ", ".join(f"{k} {v}" for k, v in self.environment.items()), ""]
        return "\n".join(lines)

    def save(self, folder: str | Path, name: str) -> tuple[Path, Path]:
        """Writes NAME.md and NAME.json (atomically)."""
        folder = Path(folder)
        paths = folder / f"{name}.md", folder / f"{name}.json"
        for path, text in zip(paths, (self.markdown(), self.json())):
            write_atomic(path, text if text.endswith("\n") else text + "\n")
        return paths


def slugs(family: str) -> list[str]:
    """The names under which records speak of one of our families, e.g. "swin-v2" for swin_v2."""
    own = [slug for slug, module in FAMILIES.items() if module.rpartition(".")[2] == family]
    return own + BESIDE.get(family, [])


def card(
    family: str,
    *,
    records: Sequence[str | Path] = (),
    checkpoint: str | Path | None = None,
    measured: Mapping[str, Mapping[str, Any]] | None = None,
    variants: Sequence[str] | None = None,
) -> Card:
    """The card of a family: checks its records now, counts its variants now, and sets both beside what is claimed.

    records: parity records (of any family; others are skipped). checkpoint: weights whose hash goes into the card.
    measured: variant -> {"measured", "interval", "protocol"}; without it a metric says why there is none.
    """
    if family not in CLAIMS:
        raise unknown("family with claims", family, CLAIMS)
    claims = CLAIMS[family]
    source = {
        "paper": claims["paper"],
        "code": claims["code"],
        "checkpoint": "none is shipped: weights are the user's own file",
    }
    if checkpoint is not None:
        source["checkpoint"] = f"{Path(checkpoint).name}, sha256 {sha256(checkpoint)}"
    mine = [p for p in records if read_record(p)["family"] in slugs(family)]
    checked = [_checked(p) for p in mine if "cases" not in read_record(p)]  # cases are of operators, not of networks
    counts = [_counted(family, v, claims["counts"][v], claims["macs_note"]) for v in variants or claims["counts"]]
    metrics = []
    for variant, claimed in (claims["metrics"] or {"all": None}).items():
        found = dict((measured or {}).get(variant, {}))
        metrics.append({
            "variant": variant, "metric": "top-1 %", "claimed": claimed, "measured": found.get("measured"),
            "interval": found.get("interval"), "protocol": found.get("protocol", PROTOCOL),
            "remark": claims["metrics_note"] if found else f"{claims['metrics_note']}; {UNMEASURED}",
        })  # fmt: skip
    from lynceus.core.report import environment

    return Card(
        title=f"{family}: a reproduction",
        source=source,
        licence=claims["licence"],
        checked=checked,
        counts=counts,
        metrics=metrics,
        deviations=claims["deviations"],
        data="The records were made on filled weights (a rule of names) and seeded noise: no images, no training.",
        use="A backbone for classification and dense prediction, trained here or from one's own checkpoint.",
        environment={k: v for k, v in environment().items() if k in ("lynceus", "python", "torch", "device")},
    )


def lint(given: Card | str | Path) -> list[str]:
    """What is wrong with a card, one sentence each; nothing when it is fit to be published."""
    one = given if isinstance(given, Card) else Card.load(given)
    values = asdict(one)
    wrong = [f"the section {name!r} is empty" for name in REQUIRED if not values[name]]
    wrong += [f"source: {k!r} is not given" for k in ("paper", "code", "checkpoint") if not one.source.get(k)]
    for row in one.checked:
        if row.get("verdict") != "agrees":
            wrong.append(f"record {row.get('record')}: {row.get('verdict')}")
        elif not row.get("outputs") or not isinstance(row.get("largest difference / std"), float):
            wrong.append(f"record {row.get('record')}: no outputs or no difference")
    for row in one.counts:
        claimed, got = row.get("parameters claimed"), row.get("parameters measured")
        if claimed is None or got is None:
            wrong.append(f"{row.get('variant')}: parameters are not both claimed and measured")
        elif claimed != got and not row.get("remark"):
            wrong.append(f"{row.get('variant')}: {got:,} parameters instead of {claimed:,}, and no remark says why")
        if row.get("MACs measured (G)") is None:
            wrong.append(f"{row.get('variant')}: multiply-adds are not measured")
    for row in one.metrics:
        if row.get("measured") is None and "not measured" not in str(row.get("remark")):
            wrong.append(f"{row.get('variant')}: {row.get('metric')} is claimed; nothing says whether it was measured")
        if row.get("measured") is not None and (not row.get("interval") or not row.get("protocol")):
            wrong.append(f"{row.get('variant')}: {row.get('metric')} is measured without interval or protocol")
    try:
        datetime.fromisoformat(one.date)
    except (TypeError, ValueError):
        wrong.append(f"the date {one.date!r} is no date")
    return wrong


def sha256(path: str | Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checked(path: str | Path) -> dict[str, Any]:
    record, rows = read_record(path), check_record(path)
    outputs = [r for r in rows if r.output != "parameter count"]
    return {
        "record": Path(path).stem,
        "reference": record.get("reference", ""),
        "outputs": ", ".join(r.output for r in outputs),
        "largest difference / std": max((r.gap for r in outputs), default=math.inf),
        "tolerance": max((r.tolerance for r in outputs), default=0.0),
        "verdict": "agrees" if all(r.agrees for r in rows) else "DIFFERS",
    }


def _counted(family: str, variant: str, claimed: tuple[int, float | None], note: str) -> dict[str, Any]:
    parameters, macs = claimed
    module = family_module(family)
    if variant not in module.VARIANTS:
        raise unknown("variant", variant, module.VARIANTS)
    with torch.device("meta"):
        model = module.build(module.VARIANTS[variant]).eval()
    found = cost(model, torch.empty(1, 3, *model.input_size, device="meta"))
    return {
        "variant": variant,
        "parameters claimed": parameters,
        "parameters measured": found.params,
        "MACs claimed (G)": macs,
        "MACs measured (G)": round(found.macs / 1e9, 4),
        "remark": note if macs is not None else "no claim to compare",
    }


def _table(rows: Sequence[Mapping[str, Any]], *columns: str) -> list[str]:
    if not rows:
        return ["(nothing)", ""]

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*head, *(f"| {' | '.join(text(r.get(c)) for c in columns)} |" for r in rows), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the cards of all families; with --checked also the list that `lynceus models` shows. Exits 1 on lint."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lynceus.reengineer.card", description=main.__doc__)
    parser.add_argument("--records", type=Path, required=True, help="folder with FAMILY/*.json parity records")
    parser.add_argument("--out", type=Path, default=Path("docs/cards"))
    parser.add_argument("--checked", type=Path, help="also write the records and differences of each family (JSON)")
    given = parser.parse_args(arguments)
    listed: dict[str, list[dict[str, Any]]] = {}
    bad = 0
    for family in sorted(CLAIMS):
        records = [path for slug in slugs(family) for path in sorted((given.records / slug).glob("*.json"))]
        made = card(family, records=records)
        made.save(given.out, family)
        listed[family] = [
            {"record": r["record"], "reference": r["reference"], "difference": r["largest difference / std"]}
            for r in made.checked
            if r["verdict"] == "agrees"
        ]
        wrong = lint(made)
        bad += len(wrong)
        print(
            f"{family}: {len(made.checked)} records, {len(made.counts)} variants" + "".join(f"\n  {w}" for w in wrong)
        )
    if given.checked is not None:
        write_atomic(given.checked, json.dumps(listed, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
