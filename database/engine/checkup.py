"""What a checkup finds, whichever the engine: `python -m database check`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from database.engine.migrations import load, pending
from database.errors import MigrationError

__all__ = ["FAILED", "NOTE", "OK", "WARNING", "Finding", "bytes_of", "migrations"]

OK, NOTE, WARNING, FAILED = "ok", "note", "warning", "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        level: `"ok"`, `"note"`, `"warning"` or `"failed"`.
        text: How it is.
        hint: What to do about it.
    """

    name: str
    level: str
    text: str
    hint: str = ""


def migrations(record: Iterable[Any], folder: str, engine: str) -> Iterator[Finding]:
    """Where a database stands: its record beside the folder's files."""
    applied = tuple(record)
    try:
        left = pending(load(folder, engine), applied, folder)
    except MigrationError as error:
        yield Finding("migrations", FAILED, str(error))
        return
    text = f"{len(applied)} applied, {len(left)} pending"
    if left:
        yield Finding("migrations", WARNING, f"{text}: {left[0].name}, …", "`python -m database migrate` applies them")
    else:
        yield Finding("migrations", OK, text)


def bytes_of(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
