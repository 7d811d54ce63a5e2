"""The database's files: how they are named and created, who may write to them, and what a forked child inherits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from threading import Lock

__all__ = ["create", "identity", "inherited", "is_open", "opened", "sync", "uri", "write_lock"]

_write_locks: dict[str, Lock] = {}
"""The right to write to a file, within this process: each event loop's pool has a writer of its own."""


inherited: set[tuple[int, int]] = set()
"""Files that the parent had open, in the middle of something, when this process was forked: device and inode."""

opened: Counter[tuple[int, int]] = Counter()
"""Device and inode of what this process has open, and how often. Any thread; only ever looked at as a hint or a refusal."""


def _renew_locks() -> None:
    _write_locks.clear()  # after a fork: whoever held one is in the parent
    opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def write_lock(path: Path) -> Lock:
    """The right to write to that file, by whatever name it is known."""
    return _write_locks.setdefault(os.path.realpath(path), Lock())


def uri(path: Path, mode: str) -> str:
    """The file as SQLite is told of it: `ro`, `rw`."""
    return f"{path.absolute().as_uri()}?mode={mode}"


def identity(path: Path) -> tuple[int, int]:
    """Device and inode."""
    status = path.stat()
    return status.st_dev, status.st_ino


def is_open(path: Path) -> bool:
    """Whether this process has that file open as a database, under whatever name."""
    try:
        return opened[identity(path)] > 0
    except OSError:
        return False


def create(path: Path, *, exist_ok: bool = False) -> None:
    """Creates an empty file that only its owner can read: SQLite gives the same rights to what it puts beside it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if not exist_ok:
            raise


def sync(path: Path) -> None:
    """Has the operating system write it to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
