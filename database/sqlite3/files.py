"""The database's files: how they are named and created, who may write to them, and what a forked child inherits."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from threading import Lock

__all__ = ["Locks", "create", "identity", "inherited", "is_open", "opened", "sync", "uri", "write_lock"]

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


class Locks:
    """The right to write to several files at once: a database and those that are attached to it.

    They are taken in one order by everybody, so that nobody waits in a circle.
    """

    __slots__ = ("_locks",)

    def __init__(self, locks: list[Lock]) -> None:
        self._locks = locks

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As `Lock.acquire`: all of them, or none."""
        deadline = time.monotonic() + timeout
        for number, lock in enumerate(self._locks):
            if not lock.acquire(blocking, timeout if timeout < 0 else max(0.0, deadline - time.monotonic())):
                for held in reversed(self._locks[:number]):
                    held.release()
                return False
        return True

    def release(self) -> None:
        """Gives all of them back."""
        for lock in reversed(self._locks):
            lock.release()


def write_lock(path: Path, *attached: Path) -> Lock | Locks:
    """The right to write to that file, by whatever name it is known, and to those that are attached to it."""
    places = sorted({os.path.realpath(each) for each in (path, *attached)})
    locks = [_write_locks.setdefault(place, Lock()) for place in places]
    return locks[0] if len(locks) == 1 else Locks(locks)


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
