"""What verbs share: run folders, the printed report, the Python twin."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic

if TYPE_CHECKING:
    from lynceus.core.report import Report


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, SIGTERM ends the verb as Ctrl-C does, so that the servers that it started end and leave nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt("stopped.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_folder(out: Path | None, verb: str, name: str, *, resume: bool = False) -> Path:
    """`out`, or runs/<verb>/<name> with a number behind it when that is taken. Raises when it cannot be written."""
    if out is None:
        base = Path("runs") / verb / name
        out, number = base, 2
        while out.exists() and not resume:
            out, number = base.with_name(f"{base.name}-{number}"), number + 1
    if out.exists() and not out.is_dir():
        raise AdviceError(f"--out {out} is a file; give a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AdviceError(
            f"{out.resolve()} cannot be written ({error.strerror}). Choose another folder with --out FOLDER."
        ) from None
    return out


@contextmanager
def options_kept(out: Path, text: str) -> Iterator[None]:
    """Within it, options.yaml in `out` holds `text`; after a mistake it is what it was, as is a folder made for it."""
    file = out / "options.yaml"
    before = file.read_bytes() if file.is_file() else None
    write_atomic(file, text)
    try:
        yield
    except AdviceError:
        if before is not None:
            write_atomic(file, before)
        else:
            file.unlink(missing_ok=True)
            if not any(out.iterdir()):
                out.rmdir()
        raise


def show(
    report: Report, *, out: Path | None = None, twin: str = "", quiet: bool = False, command: list[str] | None = None
) -> None:
    """Prints the report's table, writes it to `out`, and ends with the Python twin."""
    if command is not None:
        report.environment.setdefault("command", "lynceus " + " ".join(command))
    if twin:
        report.environment.setdefault("twin", twin)
    if not quiet:
        print(report.table())
    if out is not None:
        page = report.save(out)
        print(f"\nreport: {page.resolve()}")
    if twin and not quiet:
        print(f"\nthe same in Python:\n\n{indent(twin)}")


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines())


def call(name: str, *args: Any, **options: Any) -> str:
    """Source text of a call; options equal to None are left out."""
    parts = [a if isinstance(a, Code) else repr(a) for a in args]
    parts += [f"{k}={v if isinstance(v, Code) else repr(v)}" for k, v in options.items() if v is not None]
    return f"{name}({', '.join(parts)})"


class Code(str):
    """Text that `call` writes without quotes."""
