"""Who waits, or holds, for too long: and what is said about it.

Everything that waits carries the moment from which it waits, and every line is first come, first served with one limit for
all, so the one at the head is always the next to run out of time: one timer for the whole pool. The same timer reports,
while somebody waits, who has kept a connection for longer than `logging.slow_transaction_ms`. A second one reports who
has been reading for so long that the write-ahead log cannot be begun anew.

Where readers and the writer exclude one another (SQLite without a WAL), it also says until when a worker waits for a lock
that this process has itself.

Threads. The timers, and all that they do, run on the loop's thread; what waits may be taken out of its queue by a worker
meanwhile, so each item is removed first and refused second. `holders` and `deadline_of` may be called by any thread: they
read single fields, and copies of collections. Whoever hears of anything hears it on a thread of its own (`aside`), for
handlers may block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from database.driver import process
from database.driver.lane import Lane
from database.driver.lease import Lease
from database.driver.line import Line
from database.driver.observer import aside
from database.driver.request import Request, text_of
from database.driver.roles import Owner
from database.driver.runner import Runner, again
from database.driver.wakeup import Timer
from database.errors import ConnectionPoolExhaustedError, TransactionError

__all__ = ["Watch", "refuse"]


class Watch:
    """One pool's."""

    __slots__ = (
        "_known",
        "_line",
        "_patience",
        "_pool",
        "_reading",
        "_reads",
        "_seen",
        "_waiting",
        "_writes",
        "timeouts",
    )

    def __init__(self, pool: Owner[Lease], line: Line[Lease], reads: Lane, writes: Lane) -> None:
        self._pool = pool
        self._line = line
        self._reads = reads
        self._writes = writes
        self._patience = pool.observer.slow_transaction
        self.timeouts = 0
        """Waits that ended in an error."""
        self._waiting: Timer | None = None
        self._seen: tuple[Request, float] | None = None
        """The unit of work that had the writer at the last look, and since when; a time to come if it was reported."""
        self._reading: Timer | None = None
        self._known: set[Lease | Request] = set()
        """Who has been reported for reading for long."""

    def queues(self) -> tuple[deque[Any], ...]:
        """Where leases and requests wait."""
        return self._line.leases, self._reads.queue, self._writes.queue

    def begin(self) -> None:
        """Somebody waits: sees to it that the wait ends in time."""
        if self._waiting is None and not self._pool.closed:
            self._waiting = self._pool.waker.call_later(self._until_next_look(self._pool.timeout), self._check_waiting)
            self._pool.watched = True

    def begin_reading(self) -> None:
        """A connection is given to somebody, who may keep it."""
        if self._reading is None and self._pool.long_read is not None:
            self._reading = self._pool.waker.call_later(self._pool.long_read, self._check_long_reads)

    def end(self) -> None:
        """The pool closes."""
        for timer in (self._waiting, self._reading):
            if timer is not None:
                timer.cancel()
        self._waiting = self._reading = None
        self._pool.watched = False

    def _check_waiting(self) -> None:
        self._waiting = None
        self._pool.watched = False
        now = perf_counter()
        next_check: float | None = None
        errors: list[tuple[Request | None, BaseException]] = []
        refused: list[Request] = []
        pool = self._pool
        for queue in self.queues():
            while True:
                try:
                    head = queue[0]
                except IndexError:
                    break
                left = head.queued_at + pool.timeout - now
                if left > 0:
                    next_check = left if next_check is None else min(left, next_check)
                    break
                try:
                    queue.remove(head)
                except ValueError:  # a worker was quicker
                    continue
                self.timeouts += 1
                error = self._exhausted(head, now)
                if isinstance(head, Lease):
                    pool.transactions.discard(head)
                answered = refuse(head, partial(again, error))
                errors.append((next(iter(answered), None), error))
                refused.extend(answered)
        if errors:
            aside(partial(self._report_and_wake, errors, refused))
        if next_check is None:
            self._seen = None
        else:
            if self._patience is not None:
                self._report_holders(now, self._patience)
            self._waiting = pool.waker.call_later(self._until_next_look(next_check), self._check_waiting)
            pool.watched = True

    def _until_next_look(self, left: float) -> float:
        """Seconds until the timer is to ring, when the next wait ends in `left` seconds."""
        patience = self._patience
        return max(left if patience is None else min(left, max(patience, 0.01)), 0.001)

    def _report_and_wake(self, errors: list[tuple[Request | None, BaseException]], refused: list[Request]) -> None:
        """Logs first and wakes second: who catches the error may count on its having been logged. Any thread."""
        for request, error in errors:
            self._pool.writer.tell(request, self._pool.observer.failure, error)
        self._pool.waker.post(refused)

    def _report_holders(self, now: float, patience: float) -> None:
        """Reports leases that have kept others waiting for too long."""
        for lease in tuple(self._pool.transactions):
            granted = lease.granted_at
            if granted == 0.0 or lease.ended or lease.reported or now - granted < patience:
                continue
            waiting = len(self._line) if lease.readonly or not self._pool.single_writer else len(self._writes.queue)
            if waiting:
                lease.reported = True
                self._report(lease.holder(), lease.number, lease.readonly, now - granted, waiting)
        self._report_unit(now, patience)

    def _report_unit(self, now: float, patience: float) -> None:
        """Likewise what runs on the writer without a lease: `db.run`, `offload=True`, `execute_many`, a slow write."""
        current, waiting = self._writes.unit, len(self._writes.queue)
        seen = self._seen
        if current is None or not waiting:
            self._seen = None
        elif seen is None or seen[0] is not current:
            self._seen = current, now
        elif now - seen[1] >= patience:
            self._seen = current, float("inf")
            what = text_of(current)
            self._report(what[:200], None, False, now - seen[1], waiting)

    def _report(self, holder: str, number: int | None, readonly: bool, seconds: float, waiting: int) -> None:
        holding = self._pool.observer.holding
        aside(lambda: holding(holder, number, readonly=readonly, seconds=seconds, waiting=waiting))

    def _exhausted(self, item: Lease | Request, now: float) -> ConnectionPoolExhaustedError:
        waited = now - item.queued_at
        reading = (isinstance(item, Lease) and item.readonly) or item.home is self._reads
        if not self._pool.single_writer:
            what = f"none of {self._pool.size} connections was"
        else:
            what = f"no reader connection (of {self._pool.size})" if reading else "the one writer connection was not"
        holders = "; ".join(self.holders(readonly=reading)) or "autocommit statements"
        return ConnectionPoolExhaustedError(
            f"database {self._pool.name!r}: {what} free within {waited:.3g} s (pool_timeout is {self._pool.timeout:g} s)."
            f" Held by: {holders}."
        )

    def holders(self, *, readonly: bool) -> list[str]:
        """Who holds what since when. Any thread."""
        now = perf_counter()
        shared = not self._pool.single_writer
        leases = [
            lease
            for lease in tuple(self._pool.transactions)
            if lease.worker is not None and (shared or lease.readonly is readonly)
        ]
        found = [f"{lease.holder()}, for {now - lease.granted_at:.3g} s" for lease in leases if not lease.ended]
        reads, writes = self._reads, self._writes
        lanes = (reads, writes) if shared else (reads,) if readonly else (writes,)
        for worker in [worker for lane in lanes for worker in tuple(lane.workers)]:
            current = worker.current
            if current is not None and (readonly or not leases):
                found.append(f"the statement {text_of(current)[:80]!r}")
        return found

    def _check_long_reads(self) -> None:
        """Who reads for long pins the WAL, which then grows with every write: says who, once each."""
        self._reading = None
        pool = self._pool
        long_read = pool.long_read
        if pool.closing or long_read is None:
            return
        now = perf_counter()
        reading: dict[Lease | Request, tuple[float, Callable[[], str]]] = {
            lease: (lease.granted_at, lease.holder)
            for lease in pool.transactions
            if lease.readonly and lease.worker is not None and not lease.ended
        }
        for worker in tuple(self._reads.workers):
            current = worker.current
            if current is not None:
                reading[current] = (
                    current.queued_at,
                    partial("the statement {!r}".format, text_of(current)),
                )
        self._known.intersection_update(reading)
        next_check: float | None = long_read if self._line.given else None
        for reader, (since, holder) in reading.items():
            if reader in self._known:
                continue
            left = since + long_read - now
            if left > 0:
                next_check = left if next_check is None else min(left, next_check)
            else:
                self._known.add(reader)
                aside(partial(pool.observer.long_read, holder(), now - since))
        if next_check is not None:
            self._reading = pool.waker.call_later(max(next_check, 0.001), self._check_long_reads)

    # Worker thread

    def own_wait(self, request: Request | None) -> TransactionError | None:
        """The right to write is another pool's: is it the very task that waits which has a transaction open there?"""
        pool = self._pool
        task = None if request is None else pool.waker.task_of(request)
        if task is None:
            return None
        for other in process.sharing(pool.backend):
            for lease in tuple(other.transactions) if other is not pool else ():
                if lease.worker is other.writer and not lease.ended and lease.holder.is_of(task):
                    return TransactionError(
                        f"this could only wait for itself: database {pool.name!r} has a file in common with {other.name!r},"
                        f" where this very task holds {lease.holder()} open, and a file has one writer at a time. Write to it"
                        " within that transaction, or end that first"
                    )
        return None

    # Where readers and the writer exclude one another. Worker thread

    def deadline_of(self, worker: Runner, requests: Sequence[Request], began: float, now: float) -> float:
        """Until when a worker tries again: see `Deadline`.

        `busy_timeout` is for other processes. This one's own connections are waited for like everything else here.

        Raises:
            TransactionError: The very task that waits holds what it waits for.
            ConnectionPoolExhaustedError: They have kept their locks for longer than `pool_timeout`.
        """
        deadline = began + self._pool.backend.busy_timeout
        held = self._locked_by(worker)
        if not held:
            return deadline
        tasks = [task for task in map(self._pool.waker.task_of, requests) if task is not None]
        for lease, holder in held:
            if lease is not None and any(map(lease.holder.is_of, tasks)):
                raise TransactionError(
                    f"this could only wait for itself: without a WAL a write excludes reading, and this very task holds"
                    f" {holder} open. End that first, or set journal_mode to WAL"
                )
        until = began + self._pool.timeout
        if now >= max(deadline, until):
            holders = "; ".join(holder for _, holder in held)
            raise ConnectionPoolExhaustedError(
                f"database {self._pool.name!r}: other connections of this process have kept their locks for {now - began:.3g} s"
                f" (pool_timeout is {self._pool.timeout:g} s); without a WAL reading and writing exclude one another. Held by:"
                f" {holders}."
            )
        # They may have ended a moment ago: then it is only others' turn to be waited for.
        return now + self._pool.backend.busy_timeout

    def _locked_by(self, worker: Runner) -> list[tuple[Lease | None, str]]:
        """Which other connections of this process keep a lock on the file. Any thread."""
        found: list[tuple[Lease | None, str]] = []
        backend = self._pool.backend
        excludes = backend.excludes
        assert excludes is not None
        for pool in process.sharing(backend):
            for other in (pool.writer, *pool.readers()):
                connection, current = other.connection, other.current
                if other is worker or connection is None:
                    continue
                lease = next(
                    (each for each in tuple(pool.transactions) if each.worker is other and not each.ended), None
                )
                if lease is not None and excludes(connection):
                    found.append((lease, lease.holder()))
                elif current is not None:
                    found.append((None, f"the statement {text_of(current)[:80]!r}"))
        return found


def refuse(item: Lease | Request, error: Callable[[], BaseException]) -> list[Request]:
    """Answers what was taken out of a queue; gives the requests to be woken. Loop thread; no worker has it."""
    requests = item.drop() if isinstance(item, Lease) else [item]
    for request in requests:
        request.error = error()
    return requests
