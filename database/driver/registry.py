"""The pools of this process: closed at exit, let alone after a fork.

Worker threads are daemons, so that a pool that nobody closed never hangs the interpreter. But a daemon thread that
still runs while the interpreter is taken apart may crash it, and a connection that is not closed leaves its `-wal`
file behind. So at exit all pools are closed and their threads joined.

After a fork the child has the pools' memory, but not their threads, and must neither use nor close the connections:
they belong to the parent, and closing one would drop locks or delete files under its feet.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from database.driver.pool import Pool

__all__ = ["add", "discard", "pools"]

_pools: set[Pool] = set()


def add(pool: Pool) -> None:
    """Registers an open pool."""
    _pools.add(pool)


def discard(pool: Pool) -> None:
    """Forgets a pool that has been closed."""
    _pools.discard(pool)


def pools() -> list[Pool]:
    """The open pools, of all event loops. Any thread."""
    return list(_pools)


@atexit.register
def _close_all() -> None:
    for pool in tuple(_pools):
        pool.close_now()


def _forget_in_child() -> None:
    for pool in _pools:
        for session in pool.disown():
            # An extra reference, never given back: not even the child's own exit may finalize the connection.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.raw))
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
