"""What the parts of the driver ask of one another, where one of them cannot know the other's class.

The parts are made by the pool and ask it for things; if they knew its class, everything here would rest on everything
else. So they are typed against `Owner`, and only `pool.py` knows who they are. A Protocol is an annotation: at run time
nothing of this is there, and nothing is dispatched.

========= ==================================================================== ==========================================
role      asked by                                                             filled in by
========= ==================================================================== ==========================================
Home      a request, of where it waits (it stands beside `Request`)            lanes, leases, `Inline`
Servable  a worker, of what its inbox brings (it stands beside `Worker`)       lanes, leases, what happens before a fork
Claimant  the line for connections, of who stands in it                        leases, the lanes that read
Owner     all of them, of their pool                                           `Pool`
========= ==================================================================== ==========================================

Threads. `Owner`'s methods are called on the loop's thread, where all decisions are made, unless they say "any thread".
Its attributes may be read by any thread; those that change (`opened`, `closing`, `closed`) change once, on the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from database.driver.observer import Observer
from database.driver.request import Request
from database.driver.room import Room
from database.driver.stats import PoolStats
from database.driver.wakeup import Waker
from database.driver.worker import Servable, Worker
from database.engine.contract import Backend, Connection
from database.errors import TransactionError

__all__ = ["Claimant", "Owner"]

LeaseT = TypeVar("LeaseT")


class Claimant(Protocol):
    """Who stands in the pool's line for a connection."""

    @property
    def queued_at(self) -> float:
        """Since when it waits, by `perf_counter`: who has waited longest is next."""
        ...

    def given(self, worker: Worker) -> None:
        """Its turn has come, and it has left the line. Loop thread."""
        ...


class Owner(Protocol[LeaseT]):
    """A pool, as its parts see it. `LeaseT` is the class of its leases."""

    name: str
    size: int
    timeout: float
    """Seconds that somebody may wait for a connection."""
    backend: Backend
    observer: Observer
    waker: Waker
    request: type[Request]
    """Makes a request that a task of the pool's loop can await."""
    room: Room | None
    writer: Worker
    single_writer: bool
    long_read: float | None
    """Seconds from which reading is reported, because it pins the log."""
    opened: bool
    closing: bool
    closed: bool
    transactions: set[LeaseT]
    """Leases that have been granted or wait, for messages and for closing."""
    watch: Callable[[], None]
    """To be called when somebody waits: sees to it that the wait ends in time."""
    watched: bool
    """Whether that is seen to already."""
    watch_reading: Callable[[], None]
    """To be called when a connection is given to somebody: see `long_read`."""

    # Who gets a connection

    def claim(self, lease: LeaseT) -> None:
        """Puts a lease in line for a connection."""
        ...

    def withdraw(self, lease: LeaseT) -> bool:
        """Takes a lease out of its line; False if it has been granted."""
        ...

    def join(self, lane: Claimant) -> None:
        """Puts a lane in line for a connection."""
        ...

    def line_up(self, lane: Claimant) -> None:
        """Likewise, but the line is not served: that is about to happen."""
        ...

    def in_line(self, lane: Claimant) -> bool:
        """Whether the lane stands there."""
        ...

    def free(self, worker: Worker) -> None:
        """A connection that was given to somebody has nothing to do any more."""
        ...

    def first_lease(self) -> LeaseT | None:
        """The lease that gets a connection next. Any thread."""
        ...

    def spare(self) -> Worker | None:
        """A connection that only rests with its lane, and is counted as given already."""
        ...

    def open_another(self) -> Worker | None:
        """One more connection; None where there are as many as there may be."""
        ...

    def own_wait(self, request: Request | None) -> TransactionError | None:
        """What a request is told that waits for another pool to write, if it could only wait for itself. Any thread."""
        ...

    # Workers at work

    def rouse(self, worker: Worker) -> None:
        """Wakes a worker that sleeps with its lane."""
        ...

    def look_now_and_then(self) -> None:
        """A worker has been put to work: from now on somebody looks whether it lets others wait, until all are at rest."""
        ...

    def look(self) -> None:
        """Such a look."""
        ...

    @property
    def working(self) -> bool:
        """Whether a worker has something to do, and so needs the GIL."""
        ...

    # The end, and what is looked at from outside

    def stats(self) -> PoolStats:
        """What the pool is doing. Any thread may ask, and may be told by `RuntimeError` that it came at a bad moment."""
        ...

    def refuse_the_rest(self) -> None:
        """A lane has been left while the pool closes: nobody comes for what is still queued."""
        ...

    # For all the pools of the process together. Any thread

    def readers(self) -> Sequence[Worker]:
        """The workers that read."""
        ...

    def attends(self, worker: Worker) -> bool:
        """Whether the worker attends to a transaction or a stream, and so to nothing else."""
        ...

    def lane_of(self, worker: Worker) -> Servable | None:
        """The lane that the worker stays with, if it does."""
        ...

    def close_now(self) -> None:
        """Closes without a loop: at the loop's end, or at the process's."""
        ...

    def disown(self) -> list[Connection]:
        """In a forked child: this pool is the parent's. Gives the connections that must never be touched."""
        ...
