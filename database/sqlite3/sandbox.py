"""SQLite's part of `database.sandbox`: a database is a file, and a copy of it another file."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

from database.settings import SqliteSettings

__all__ = ["copy", "fresh"]


def fresh(settings: SqliteSettings, folder: Path, name: str) -> SqliteSettings:
    """See `database.sandbox.Copier`."""
    return replace(settings, path=str(folder / f"{name}.db"), synchronous="OFF")


def copy(source: SqliteSettings, folder: Path, name: str, *, like: SqliteSettings, durable: bool) -> SqliteSettings:
    """See `database.sandbox.Copier`."""
    path = folder / f"{name}.db"
    if _in_use(source.path):
        # What is committed may still be in the write-ahead log, and somebody may be writing.
        with (
            contextlib.closing(sqlite3.connect(f"{Path(source.path).as_uri()}?mode=ro", uri=True)) as old,
            contextlib.closing(sqlite3.connect(path)) as new,
        ):
            old.backup(new)
    else:
        shutil.copyfile(source.path, path)
    path.chmod(0o600)
    return replace(source, path=str(path), init_sql="", synchronous=like.synchronous if durable else "OFF")


def _in_use(path: str) -> bool:
    return any(Path(f"{path}{suffix}").exists() for suffix in ("-wal", "-journal"))
