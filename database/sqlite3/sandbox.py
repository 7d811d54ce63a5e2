"""SQLite's part of `database.sandbox`: a database is a file, and a copy of it another file; so are files attached to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from database.sqlite3 import files
from database.sqlite3.encryption import of_attached
from database.sqlite3.opening import connect
from database.sqlite3.settings import SqliteSettings

__all__ = ["copy", "discard", "fresh"]


def fresh(settings: SqliteSettings, folder: Path, name: str) -> SqliteSettings:
    """See `database.sandbox.Copier`."""
    attach = {each: str(folder / _attached(place)) for each, place in settings.attach.items()}
    return replace(settings, path=str(folder / f"{name}.db"), attach=attach, synchronous="OFF")


def copy(source: SqliteSettings, folder: Path, name: str, *, like: SqliteSettings, durable: bool) -> SqliteSettings:
    """See `database.sandbox.Copier`."""
    path = folder / f"{name}.db"
    _copy(source, Path(source.path), path)
    attach = {each: str(folder / Path(place).name) for each, place in source.attach.items()}
    for each, place in attach.items():
        if not os.path.exists(place):  # else another database has it attached, too
            _copy(of_attached(source), Path(source.attach[each]), Path(place))
    synchronous = like.synchronous if durable else "OFF"
    return replace(source, path=str(path), attach=attach, init_sql="", synchronous=synchronous)


def discard(settings: SqliteSettings) -> None:
    """See `database.sandbox.Copier`: there are only files, which go with their folder."""


def _attached(place: str) -> str:
    """A name for a file that is attached: the same to whichever database it is."""
    return f"attached-{hashlib.sha256(os.fsencode(os.path.realpath(place))).hexdigest()[:16]}.db"


def _copy(settings: SqliteSettings, source: Path, target: Path) -> None:
    if _in_use(source):
        # What is committed may still be in the write-ahead log, and somebody may be writing.
        files.create(target)
        with (
            contextlib.closing(connect(settings, source, "ro")) as old,
            contextlib.closing(connect(settings, target, "rw")) as new,
        ):
            old.backup(new)
    else:
        shutil.copyfile(source, target)
    target.chmod(0o600)


def _in_use(path: Path) -> bool:
    return any(Path(f"{path}{suffix}").exists() for suffix in ("-wal", "-journal"))
