"""Errors that advise: what was wrong, the nearest valid thing, and the call that mends it.

The command line prints an `AdviceError` as one paragraph and exits with 2; anything else is a defect of the library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdviceError(ValueError):
    """A mistake that the caller can mend; the text says how."""


class OptionError(AdviceError, TypeError):
    """An option that does not exist, or has a value of the wrong kind."""


class MissingError(AdviceError, FileNotFoundError):
    """A file, folder, package or weight that is not there."""


class AdviceWarning(UserWarning):
    """What works but is probably not meant; the text says how to mend it."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The valid names closest to `name`, best first."""
    pool = {n.lower(): n for n in names}
    return [pool[m] for m in difflib.get_close_matches(name.lower(), pool, n=count, cutoff=0.4)]


def unknown(kind: str, name: str, names: Iterable[str], *, how: str = "") -> OptionError:
    """The error for a name that is not among `names`: says the nearest ones, or all of them when they are few."""
    names = sorted(names)
    close = nearest(name, names)
    if close:
        hint = f"Did you mean {' or '.join(repr(c) for c in close)}?"
    else:
        shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        hint = f"There are: {shown}."
    return OptionError(f"There is no {kind} {name!r}. {hint}{' ' + how if how else ''}")


def missing_extra(package: str, extra: str, *, use: str) -> MissingError:
    """The error for an optional package that is not installed."""
    return MissingError(f'{use} needs the package {package!r}, which is not installed: pip install "lynceus[{extra}]"')
