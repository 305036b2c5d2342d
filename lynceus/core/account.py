"""The account of a match between a checkpoint and a model: what found its place, what did not, what would mend it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lynceus.core.names import listed, similarity


@dataclass(frozen=True, slots=True)
class WrongShape:
    """An entry whose name fits and whose shape does not. hint: what would mend it."""

    theirs: str
    ours: str
    have: tuple[int, ...]
    want: tuple[int, ...]
    hint: str = ""


@dataclass(slots=True)
class Account:
    """Groups of names. "theirs" are the file's names, "ours" the model's.

    loaded: (theirs, ours). transformed: (theirs, ours, what was done). guessed: (theirs, ours, reason), pairs that no
    rule named. missing: in the model only. unexpected: in the file only. untouched: buffers that no file brings.
    tied: (ours, the loaded name that shares its values). dropped: (theirs, why). fresh: ours, left as initialised on
    request. ambiguous: (ours, the names that fit equally well).
    """

    source: str = ""
    wrappers: list[str] = field(default_factory=list)
    loaded: list[tuple[str, str]] = field(default_factory=list)
    transformed: list[tuple[str, str, str]] = field(default_factory=list)
    guessed: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[WrongShape] = field(default_factory=list)
    dtype_changed: list[tuple[str, str, str]] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    tied: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    ambiguous: list[tuple[str, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wanted: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of `missing`
    unplaced: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of `unexpected`
    translated: dict[str, str] = field(default_factory=dict)  # what the rules made of `unexpected`

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.wrong_shape)

    @property
    def complete(self) -> bool:
        return self.faults == 0

    @property
    def verdict(self) -> str:
        """ "complete", "complete but N ignored", or "INCOMPLETE: ..."."""
        if not self.complete:
            counts = [
                (len(self.missing), "missing"),
                (len(self.unexpected), "unexpected"),
                (len(self.wrong_shape), "of wrong shape"),
            ]
            return "INCOMPLETE: " + ", ".join(f"{n} {what}" for n, what in counts if n)
        ignored = [d for d in self.dropped if d[1] != "rebuilt by the model"]
        if ignored or self.fresh:
            left = f" ({len(self.fresh)} of ours left as initialised)" if self.fresh else ""
            return f"complete but {len(ignored)} ignored{left}"
        return "complete"

    def renamed(self) -> list[tuple[str, str]]:
        """(theirs, ours): an unexpected and a missing name of equal shape that are each other's only likely partner."""
        pairs = []
        free = dict(self.unplaced)

        def near(ours: str, theirs: str) -> float:
            return max(similarity(ours, theirs), similarity(ours, self.translated.get(theirs, theirs)))

        for ours, shape in self.wanted.items():
            ranked = sorted(((near(ours, n), n) for n, s in free.items() if s == shape), reverse=True)
            if not ranked or ranked[0][0] < 0.3 or (len(ranked) > 1 and ranked[0][0] - ranked[1][0] < 0.05):
                continue
            theirs = ranked[0][1]
            rivals = [o for o, s in self.wanted.items() if s == shape and o != ours]
            if all(near(o, theirs) < ranked[0][0] for o in rivals):
                pairs.append((theirs, ours))
                del free[theirs]
        return pairs

    def findings(self) -> list[str]:
        """One sentence per thing that is wrong; a renamed entry is one finding, not two."""
        renamed = self.renamed()
        theirs, ours = {a for a, _ in renamed}, {b for _, b in renamed}
        lines = [
            f"renamed? {b} is missing, and {a} of the same shape {list(self.wanted[b])} found no place"
            for a, b in renamed
        ]
        gone = [n for n in self.missing if n not in ours]
        lines += [f"missing: {n} {list(self.wanted[n])} is in the model only" for n in gone]
        lines += [
            f"unexpected: {n} {list(self.unplaced[n])} is in the file only" for n in self.unexpected if n not in theirs
        ]
        lines += [
            f"wrong shape: {w.ours} is {list(w.want)}, the file has {list(w.have)}{'; ' + w.hint if w.hint else ''}"
            for w in self.wrong_shape
        ]
        return lines

    def text(self, *, expand: bool = False, limit: int = 24) -> str:
        """The account on one screen: names as ranges; with `expand` every pair on its own line."""
        lines = []
        if self.source:
            lines.append(
                f"names of: {self.source}"
                + (f"; wrappers taken off: {', '.join(self.wrappers)}" if self.wrappers else "")
            )
        elif self.wrappers:
            lines.append(f"wrappers taken off: {', '.join(self.wrappers)}")
        many = 10**9 if expand else 6
        lines.append(
            f"loaded: {len(self.loaded)}" + (f"  {listed([o for _, o in self.loaded], many)}" if self.loaded else "")
        )
        kinds: dict[str, list[str]] = {}
        for _, name, what in self.transformed:
            kinds.setdefault(what, []).append(name)
        lines += [f"loaded after {what}: {len(names)}  {listed(names, many)}" for what, names in kinds.items()]
        if self.guessed:
            lines.append(f"paired automatically (check these): {len(self.guessed)}")
            shown = self.guessed if expand else self.guessed[:limit]
            lines += [f"  {a} -> {b}  [{why}]" for a, b, why in shown]
            lines += [f"  ... {len(self.guessed) - len(shown)} more"] if len(shown) < len(self.guessed) else []
        if self.tied:
            lines.append(f"tied: {len(self.tied)}  " + ", ".join(f"{a} = {b}" for a, b in self.tied[:4]))
        if self.dtype_changed:
            kinds = {}
            for name, a, b in self.dtype_changed:
                kinds.setdefault(f"{a} -> {b}", []).append(name)
            lines += [f"dtype changed {k}: {len(n)}" for k, n in kinds.items()]
        if self.untouched:
            lines.append(f"buffers that no file brings: {len(self.untouched)}  {listed(self.untouched, 4)}")
        if self.fresh:
            lines.append(f"left as initialised: {len(self.fresh)}  {listed(self.fresh, 4)}")
        kinds = {}
        for name, why in self.dropped:
            kinds.setdefault(why, []).append(name)
        lines += [f"ignored ({why}): {len(names)}  {listed(names, many)}" for why, names in kinds.items()]
        for name, candidates in self.ambiguous:
            lines.append(f"ambiguous: {name} fits {listed(candidates, 4)}; name one by a rule")
        found = self.findings()
        if len(found) > limit and not expand:
            for label, names in (("missing", self.missing), ("unexpected", self.unexpected)):
                if names:
                    lines.append(f"{label}: {len(names)}  {listed(names, limit // 2)}")
            lines += [line for line in found if line.startswith("wrong shape")][: limit // 2]
        else:
            lines += found
        return "\n".join([*lines, *self.notes, f"verdict: {self.verdict}"])


def mend(value: Tensor, target: Tensor, name: str, model: nn.Module) -> str:
    """What would make `value` fit `target`: a transform by name, or dropping the classifier."""
    have, want = tuple(value.shape), tuple(target.shape)
    if len(have) == 2 and have[::-1] == want:
        return "it is transposed (transform 'transpose')"
    if len(have) == 4 and (have[3], have[2], have[0], have[1]) == want:
        return "its axes are HWIO (transform 'hwio_to_oihw')"
    if value.numel() == target.numel():
        if tuple(n for n in have if n != 1) == tuple(n for n in want if n != 1):
            kind = (
                "linear_to_conv"
                if len(have) == 2 and len(want) == 4
                else "conv_to_linear"
                if len(want) == 2
                else "squeeze"
            )
            return f"the same numbers with other unit axes (transform {kind!r})"
        return "the same count of numbers in another order"
    head = getattr(model, "head_name", "head")
    if name.startswith(head + ".") and have[1:] == want[1:]:
        return f"a classifier of {have[0]} classes; drop it with head='drop', or build with num_classes={have[0]}"
    if have[1:] == want[1:] and have[0] * 3 == want[0]:
        return "a third of the rows: q, k and v are stored apart (transform 'merge_qkv')"
    if have[1:] == want[1:] and have[0] == 3 * want[0]:
        return "three times the rows: q, k and v are stored together (transform 'split_qkv')"
    return ""
