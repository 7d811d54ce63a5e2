"""Lanes: queues that a worker empties in batches.

Autocommit statements need no connection of their own. They wait in a lane; one worker runs them one after the other and
posts the answers together. That is faster than a connection each, for threads fight over the GIL and every wake-up
of the event loop costs as much as several statements.

Where there is a single writer, a database has a `ReadLane` and a `WriteLane`; where all connections are alike, two of
`SharedLane`. What the pool wants to know of a lane the lane answers itself; this is what they have in common.

A worker that has emptied a lane stays with it, asleep (`database.driver.worker` says how it is woken), so that a single
statement costs no more decisions than one of a hundred.

Threads. `submit` and `withdraw` run on the loop's thread, `serve` on the worker's. Both touch `queue`, a deque: append,
popleft and remove are atomic, so each item is run or withdrawn, never both. Who serves a lane is decided on the loop's
thread alone: a worker that leaves says so, and the loop looks again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from typing import Any

from database.driver.lease import Lease
from database.driver.request import LEASE, Request, taken_from
from database.driver.roles import Owner
from database.driver.worker import Servable, Worker

__all__ = ["BATCH_SECONDS", "BATCH_SIZE", "Lane"]

BATCH_SECONDS = 0.001
"""An answer is not held back for longer than this for the sake of a batch."""

BATCH_SIZE = 128


class Lane:
    """A queue of requests and the workers that are at it."""

    __slots__ = ("pool", "queue")

    def __init__(self, pool: Owner[Lease]) -> None:
        self.pool = pool
        self.queue: deque[Any] = deque()
        """Requests; in a `WriteLane` leases, too, which stand in line with them."""

    # Loop thread

    def submit(self, request: Request) -> None:
        """Queues a request, and has a worker come if those at the queue are not enough."""
        raise NotImplementedError

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return taken_from(self.queue, request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        raise NotImplementedError

    def look(self) -> None:
        """Called every few milliseconds while a worker is at work."""

    # What the pool asks. Loop thread, or any thread for messages

    @property
    def served(self) -> bool:
        """Whether a worker is at the queue, and will empty it."""
        raise NotImplementedError

    @property
    def workers(self) -> AbstractSet[Worker]:
        """Those whose current request has come from here."""
        raise NotImplementedError

    @property
    def resting(self) -> int:
        """How many connections are given to it that have nothing to do."""
        return 0

    def spare(self) -> Worker | None:
        """Gives away a connection that rests here; None if there is none."""
        return None

    @property
    def working(self) -> bool:
        """Whether a worker has something to do here, and so needs the GIL."""
        return False

    @property
    def unit(self) -> Request | None:
        """What keeps everybody else in the queue waiting, if it is no lease."""
        return None

    @property
    def leases(self) -> int:
        """How many leases stand in the queue."""
        return sum(1 for item in tuple(self.queue) if item.kind == LEASE)

    # Worker thread

    def serve(self, worker: Worker) -> Servable | None:
        """See `Servable`."""
        raise NotImplementedError
