"""What an error of SQLite's means: to be waited for, to be replaced, to be explained."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from database import errors

__all__ = ["BUSY_CODES", "BUSY_SLICE", "Patience", "control_error", "is_broken", "is_busy", "read_only", "reason"]

BUSY_SLICE = 0.02
"""Seconds for which SQLite's own busy handler waits: it cannot be interrupted, so the driver waits in slices."""

BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_BROKEN = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_INTERNAL,
    }
)


def control_error(verb: str) -> errors.TransactionError:
    """Why a transaction cannot be controlled by SQL text, and what to do instead."""
    instead = {
        "BEGIN": "await db.begin(), `async with db.transaction()` or @transactional",
        "COMMIT": "await db.commit()",
        "END": "await db.commit()",
        "ROLLBACK": "await db.rollback()",
        "SAVEPOINT": "a nested `async with db.transaction()`",
        "RELEASE": "a nested `async with db.transaction()`",
    }.get(verb, "the transaction methods of db")
    return errors.TransactionError(
        f"{verb} as SQL text would change the transaction behind the package's back, and was not executed: use {instead}"
    )


def read_only(text: str | None) -> errors.ReadOnlyTransactionError:
    """Why a write is refused."""
    what = "a write" if text is None else f"this statement: {errors.shorten(text)}"
    return errors.ReadOnlyTransactionError(f"a read-only transaction or connection refuses {what}")


def is_busy(error: BaseException) -> bool:
    """Whether somebody else holds a lock. Not BUSY_SNAPSHOT: that one never goes away by waiting."""
    if isinstance(error, sqlite3.OperationalError):
        code = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in BUSY_CODES and code != sqlite3.SQLITE_BUSY_SNAPSHOT
    return False


def is_broken(error: BaseException) -> bool:
    """Whether the connection can no longer be trusted."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in _BROKEN
    return False


class Patience:
    """Waits for another process's lock, in slices, until its time is used up or the caller has gone."""

    __slots__ = ("_deadline", "_progress")

    def __init__(self, seconds: float, progress: Callable[[], bool]) -> None:
        self._deadline = time.monotonic() + seconds
        self._progress = progress

    def wait(self, error: sqlite3.OperationalError) -> None:
        """Called after an error: returns when it is time to try again, raises it when there is nothing to wait for."""
        if not is_busy(error) or not self.left():
            raise error
        time.sleep(0.002)

    def left(self) -> bool:
        """Whether there is time left, and a caller who waits."""
        return time.monotonic() < self._deadline and not self._progress()


def reason(path: Path, error: BaseException) -> str:
    """What is wrong, in words that help more than SQLite's "unable to open database file"."""
    if path.is_dir():
        return "it is a directory, not a file"
    if (
        isinstance(error, sqlite3.DatabaseError)
        and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB
    ):
        return f"it is not an SQLite database ({error})"
    for part in (path, *path.parents):
        with contextlib.suppress(OSError):
            if part != path and part.exists() and not part.is_dir():
                return f"{str(part)!r} is a file, not a directory"
    if isinstance(error, PermissionError) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        return f"permission denied ({error})"
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        return f"its directory cannot be written to, which SQLite needs for its journal ({error})"
    return str(error)
