"""The pools of this process: closed at exit, made to step aside for a fork.

Worker threads are daemons, so that a pool that nobody closed never hangs the interpreter. But a daemon thread that
still runs while the interpreter is taken apart may crash it, and a connection that is not closed leaves its `-wal`
file behind. So at exit all pools are closed and their threads joined.

Fork. A child has the pools' memory, but not their threads, and must neither use nor close the parent's connections.
That is not enough, though: what a process knows of its file locks is kept per file, not per connection, by SQLite. A
child that inherits this knowledge believes that it holds locks which only the parent has; it would write to a WAL that
the parent, on closing, deletes under its feet (commits that were answered are lost), or find the file locked for ever.
So before a fork every worker closes its connection and waits at a safe place (no thread is inside the engine, whose
mutexes a child inherits locked); behind it the parent's workers open their connections anew. A worker that attends to a
transaction cannot do that. Then the child gets an error when it opens the same database, instead of a damaged one.
"""

from __future__ import annotations

import atexit
import os
import time
from threading import Event
from typing import Any

from database.driver.roles import Owner
from database.driver.worker import Servable, Worker, here
from database.engine.contract import Backend
from database.errors import DatabaseError

__all__ = ["add", "discard", "pools", "sharing"]

FORK_SECONDS = 1.0
"""How long a fork waits for running statements to end."""

_pools: set[Owner[Any]] = set()


def add(pool: Owner[Any]) -> None:
    """Registers an open pool."""
    _pools.add(pool)


def discard(pool: Owner[Any]) -> None:
    """Forgets a pool that has been closed."""
    _pools.discard(pool)


def pools() -> list[Owner[Any]]:
    """The open pools, of all event loops. Any thread."""
    return list(_pools)


def sharing(backend: Backend) -> list[Owner[Any]]:
    """Of these, those that have a file in common with that backend: its own pool, and others by whatever name. Any thread."""
    files = backend.files()
    return [pool for pool in pools() if pool.backend is backend or not files.isdisjoint(pool.backend.files())]


@atexit.register
def _close_all() -> None:
    for pool in tuple(_pools):
        pool.close_now()


class _Retreat:
    """What a worker finds in its inbox before a fork: it closes its connection and waits until the fork is over."""

    __slots__ = ("back", "before", "gone", "over", "pool", "void")

    def __init__(self, pool: Owner[Any], before: _Retreat | None) -> None:
        self.pool = pool
        self.before = before
        """The writer's retreat: readers come back behind it, for it creates what they open."""
        self.gone = Event()
        self.over = Event()
        self.back = Event()
        self.void = False
        """It came too late, and nobody waits for it any more."""

    def serve(self, worker: Worker) -> Servable | None:
        """Worker thread. Gives the lane that the worker was staying with."""
        if not self.void:
            self._step_aside(worker)
        return self.pool.lane_of(worker)

    def _step_aside(self, worker: Worker) -> None:
        opened = worker.connection is not None
        worker.retreat()
        self.gone.set()
        self.over.wait()
        try:
            if opened and worker.role == "writer":
                worker.ready()
        except DatabaseError:  # logged; the next request tries again, and is told
            pass
        finally:
            self.back.set()
        if self.before is not None:
            self.before.back.wait()


_retreats: list[_Retreat] = []


def _step_aside() -> None:
    deadline = time.monotonic() + FORK_SECONDS
    for pool in tuple(_pools):
        if not pool.single_writer:  # a connection to a server has no locks on files that a child could upset
            continue
        # A fork may happen on a worker's own thread, which cannot wait for itself.
        free = [each for each in (*pool.readers(), pool.writer) if each is not here.worker and not pool.attends(each)]
        writer = _Retreat(pool, None)
        if pool.writer not in free:
            writer.back.set()
        readers = [(worker, _Retreat(pool, writer)) for worker in free if worker is not pool.writer]
        for group in (readers, [(pool.writer, writer)] if pool.writer in free else []):  # the writer closes last
            for worker, retreat in group:
                worker.inbox.put(retreat)
            for _, retreat in group:
                if not retreat.gone.wait(max(0.0, deadline - time.monotonic())):
                    retreat.void = True
                _retreats.append(retreat)


def _go_on() -> None:
    for retreat in _retreats:
        if retreat.void:
            retreat.back.set()
        retreat.over.set()
    _retreats.clear()


def _forget_in_child() -> None:
    _retreats.clear()
    for pool in _pools:
        for connection in pool.disown():
            connection.disown()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_step_aside, after_in_parent=_go_on, after_in_child=_forget_in_child)
