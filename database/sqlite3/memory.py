"""`:memory:` databases, which several connections share.

SQLite's own in-memory databases belong to one connection; sharing their cache brings table locks and dirty reads. So
`:memory:` is a private file in a file system that lives in memory (`/dev/shm` where there is one, else the directory
for temporary files), with the same snapshots, readers and writer as any other database, and gone with its last pool.

A process that is killed cannot clean up. Each directory therefore holds a locked file; the next process to make one
removes those whose lock nobody holds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # pragma: no cover  - Windows: temporary directories of killed processes stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["acquire"]

PREFIX = "jobu-database-memory-"

_lock = Lock()
_open: dict[str, tuple[Path, int, int]] = {}
"""By name: the directory, its lock file's descriptor, and how many pools share it."""


def acquire(name: str) -> tuple[str, Callable[[], None]]:
    """A path for the in-memory database of that name, and the function that gives it back."""
    with _lock:
        if name in _open:
            directory, descriptor, users = _open[name]
        else:
            _sweep()
            directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
            descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            users = 0
        _open[name] = directory, descriptor, users + 1
    return str(directory / "memory.db"), lambda: _give_back(name, directory)


def _give_back(name: str, directory: Path) -> None:
    with _lock:
        if name not in _open or _open[name][0] != directory:  # a forked child's copy
            return
        _, descriptor, users = _open[name]
        if users > 1:
            _open[name] = directory, descriptor, users - 1
            return
        del _open[name]
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _parent() -> str | None:
    shared = Path("/dev/shm")  # noqa: S108  - mkdtemp makes a private directory in it
    return str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None


def _sweep() -> None:
    if fcntl is None:
        return
    for directory in Path(_parent() or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(directory / "lock", os.O_RDWR)
        except OSError:  # somebody else's, or just being made
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(descriptor)


def _forget_in_child() -> None:
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
