"""Who gets which connection, among those that are not one's own already.

Where there is a single writer, the line is for readers: leases (read-only transactions, streams) and the read lane, which
takes its turn like everybody else; those that write stand in the write lane's queue, and the writer serves nothing but
that. Where all connections are alike, everybody stands here, leases and both lanes.

First come, first served: leases stand in the order in which they came, each lane says since when it waits, and who has
waited longest gets the next connection. A lane that stands for its oldest statement moves back by itself when that has
been answered.

A `CapacityLimiter` counts the connections that are given to somebody, also one that rests with its lane.

Threads. All of it on the loop's thread, in synchronous functions, so nothing comes between deciding and acting, and no
cancellation can strand a connection: a task that goes away merely takes its lease out of the line. Other threads may look
at the first lease.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import anyio

from database.driver.roles import Claimant, Owner
from database.driver.worker import Worker

__all__ = ["Line"]

LeaseT = TypeVar("LeaseT", bound=Claimant)


class Line(Generic[LeaseT]):
    """One pool's."""

    __slots__ = ("_idle", "_pool", "lanes", "leases", "limiter")

    def __init__(self, pool: Owner[LeaseT]) -> None:
        self._pool = pool
        self._idle: list[Worker] = []
        self.limiter = anyio.CapacityLimiter(pool.size)
        """Counts connections that are given to somebody."""
        self.leases: deque[LeaseT] = deque()
        self.lanes: list[Claimant] = []
        """Two at the most."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self.leases) + len(self.lanes)

    @property
    def given(self) -> int:
        """How many connections are given to somebody."""
        return int(self.limiter.borrowed_tokens)

    def claim(self, lease: LeaseT) -> None:
        """A lease gets in line."""
        self.leases.append(lease)
        self.serve()

    def join(self, lane: Claimant) -> None:
        """A lane gets in line."""
        self.lanes.append(lane)
        self.serve()

    def idle(self) -> tuple[Worker, ...]:
        """Connections that nobody has, the one that was freed first at the head."""
        return tuple(self._idle)

    def add(self, worker: Worker) -> None:
        """One more connection, of which nobody knows yet."""
        self._idle.append(worker)

    def free(self, worker: Worker) -> None:
        """A connection has nothing to do any more."""
        self.limiter.release_on_behalf_of(worker)
        self._idle.append(worker)
        if self.leases or self.lanes:
            self.serve()

    def lend(self) -> Worker | None:
        """Gives away a connection that is open and has nothing to do, without waking its worker."""
        for worker in reversed(self._idle):
            if worker.resting and worker.connection is not None:
                self._idle.remove(worker)
                self.limiter.acquire_on_behalf_of_nowait(worker)
                return worker
        return None

    def serve(self) -> None:
        """Gives connections to those first in line, while there are any of both."""
        pool = self._pool
        while (self.leases or self.lanes) and pool.opened and not pool.closing:
            worker = self._find()
            if worker is None:
                break
            pool.watch_reading()
            self._first().given(worker)
        if self.leases or self.lanes:
            pool.watch()

    def _find(self) -> Worker | None:
        """A connection for the next in line."""
        if self._idle:
            worker = self._idle.pop()
        elif (spare := self._pool.spare()) is not None:
            return spare  # it counts as given already
        elif (another := self._pool.open_another()) is not None:
            worker = another
        else:
            return None
        self.limiter.acquire_on_behalf_of_nowait(worker)
        return worker

    def _first(self) -> Claimant:
        """Takes out of the line who has waited longest."""
        leases, lanes = self.leases, self.lanes
        if lanes:
            lane = min(lanes, key=_queued_at)
            if not leases or lane.queued_at <= leases[0].queued_at:
                lanes.remove(lane)
                return lane
        return leases.popleft()


def _queued_at(claimant: Claimant) -> float:
    return claimant.queued_at
