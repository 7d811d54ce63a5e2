"""Connections that nobody has used for a while are closed, all but one, where the backend asks for it (`Backend.max_idle`).

The connection that was freed last is given next, so those that a quiet hour does not need stay at the bottom and grow
old. Their workers stay, and open another connection when they are needed again.

Threads. All of it on the loop's thread; a connection is closed by its worker, which is told so by its inbox. Who is given
that worker in the same moment stands behind the word, and finds a new connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from database.driver.roles import Owner
from database.driver.wakeup import Timer
from database.driver.worker import Worker

__all__ = ["Idle"]


class _Retire:
    """Said to a worker whose connection is not needed at the moment."""

    def serve(self, worker: Worker) -> None:
        """Closes it."""
        worker.retreat()


RETIRE = _Retire()


class Idle:
    """One pool's."""

    __slots__ = ("_pool", "_seconds", "_since", "_timer", "_workers")

    def __init__(self, pool: Owner[Any], seconds: float, workers: Callable[[], Iterable[Worker]]) -> None:
        self._pool = pool
        self._seconds = seconds
        self._workers = workers
        """Those that have nothing to do, the one that was freed first at the head."""
        self._since: dict[Worker, float] = {}
        """Since when they have had nothing to do; of those whose connections are open."""
        self._timer: Timer | None = None

    def freed(self, worker: Worker) -> None:
        """A worker has nothing to do any more."""
        self._since[worker] = perf_counter()
        if self._timer is None and len(self._since) > 1:
            self._timer = self._pool.waker.call_later(self._seconds, self._look)

    def end(self) -> None:
        """The pool closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._pool.closing:
            return
        now = perf_counter()
        since = self._since
        for worker in self._workers():
            if worker not in since:
                continue
            if len(since) == 1:
                return
            left = since[worker] + self._seconds - now
            if left > 0:
                self._timer = self._pool.waker.call_later(left, self._look)
                return
            del since[worker]
            worker.give(RETIRE)
