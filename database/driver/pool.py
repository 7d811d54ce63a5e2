"""The pool: one writer, some readers, and who gets them; or connections that are all alike.

One pool per database and event loop. The writer is opened first (it creates what is missing and is the only one that
writes and checkpoints) and closed last. Readers are opened when they are first needed. A CapacityLimiter counts the
readers that are given to somebody.

Who gets a reader stands in one line, `_line`, first come, first served: leases (read-only transactions, streams) and
the read lane, which takes its turn like everybody else. Writers stand in the line of the write lane, and the writer
serves nothing but that.

Where the backend says that there is no single writer, no connection is special: all stand where the readers do, and
leases that write stand in the same line. The first one is opened first, for it prepares the database.

Threads. Every decision is made in a synchronous function on the loop's thread, so nothing can come between deciding
and acting, and no cancellation can strand a connection: a task that goes away merely takes its request out of a queue.
Workers tell the loop what they did by notices (`Waker.post`), they decide nothing here. The exceptions are
`close_now` and `abandon`, called when the loop has ended.

Time limits. Everything that waits carries the moment from which it waits, and every line is first come, first served
with one limit for all, so the one at the head is always the next to run out of time: one timer for the whole pool. The
same timer reports, while somebody waits, who has kept a connection for longer than `logging.slow_transaction_ms`.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import partial
from threading import Thread, get_ident
from time import perf_counter

import anyio

from database.driver import process
from database.driver.courtesy import Courtesy
from database.driver.inline import Inline
from database.driver.lane import ReadLane, WriteLane
from database.driver.lease import Lease
from database.driver.observer import Observer, aside
from database.driver.request import STATEMENT, Request, text_of
from database.driver.room import Room
from database.driver.shared_lane import SharedLane
from database.driver.wakeup import Timer, Waker
from database.driver.worker import Worker, again, here
from database.engine.contract import Backend, Session
from database.errors import (
    ConnectionPoolExhaustedError,
    PoolClosedError,
    TransactionError,
)

__all__ = ["Pool", "PoolStats"]

DRAIN_SECONDS = 10.0
"""How long a closing pool lets statements go on that run already."""

JOIN_SECONDS = 5.0
"""How long the end of a loop or of the process waits for a worker that was told to stop."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A moment in a pool's life. Totals count from the pool's opening.

    Attributes:
        pool_size: Readers there may be.
        readers_open: Reader connections that are open.
        readers_in_use: Readers that serve somebody.
        writer_in_use: 1 while the writer serves somebody, else 0; where all connections read and write, how many
            serve somebody who writes.
        waiting: Transactions and streams that wait for a connection.
        queued: Autocommit statements that wait for their turn.
        acquired_total: Connections handed to transactions and streams.
        timeouts_total: Waits that ended in `ConnectionPoolExhaustedError`.
        wait_seconds_total: Seconds that transactions and streams have waited for their connections.
        statements_total: Requests executed.
        commits_total: Explicit COMMITs, each of which may hold a group of writes.
        rollbacks_total: Transactions rolled back.
        grouped_total: Writes that shared a commit with others.
        replaced_total: Connections that were given up and opened anew.
        inline_total: Reads that ran on the event loop's own thread (`inline_reads`).
    """

    pool_size: int = 0
    readers_open: int = 0
    readers_in_use: int = 0
    writer_in_use: int = 0
    waiting: int = 0
    queued: int = 0
    acquired_total: int = 0
    timeouts_total: int = 0
    wait_seconds_total: float = 0.0
    statements_total: int = 0
    commits_total: int = 0
    rollbacks_total: int = 0
    grouped_total: int = 0
    replaced_total: int = 0
    inline_total: int = 0

    @staticmethod
    def of(pools: Iterable[Pool]) -> PoolStats:
        """The sums over several pools. Any thread: what belongs to their loops may change while it is looked at."""
        found: list[PoolStats] = []
        for pool in pools:
            for _ in range(20):
                try:
                    found.append(pool.stats())
                    break
                except RuntimeError:  # a collection has changed while it was walked
                    continue
        return PoolStats(*(sum(values) for values in zip(*map(astuple, found), strict=True)))


class Pool:
    """The connections of one database on one event loop. Made on that loop; opens itself."""

    def __init__(
        self,
        backend: Backend,
        waker: Waker,
        observer: Observer,
        *,
        name: str,
        size: int,
        timeout: float,
        long_read: float | None,
        inline_reads: bool = False,
        on_closed: Callable[[Pool], None],
    ) -> None:
        self.backend = backend
        self.waker = waker
        self.observer = observer
        self.name = name
        self.size = size
        self.timeout = timeout
        self.loop = waker.loop
        """Gives the identity of its event loop."""
        self.request = waker.request
        """Makes a request that a task of this loop can await."""
        self.long_read = long_read
        self.reader_limiter = anyio.CapacityLimiter(size)
        self.thread = get_ident()
        self.failure: BaseException | None = None
        self.closing = False
        self.closed = False
        self.evicted = False
        """Whether it is closed only to make room: whoever comes opens another."""
        self.transactions: set[Lease] = set()
        """Leases that have been granted or wait, for messages and for closing."""

        self._on_closed = on_closed
        self._timeouts = 0
        self._timer: Timer | None = None
        self._long_timer: Timer | None = None
        self._long_known: set[Lease | Request] = set()
        self._patience = observer.slow_transaction
        self._seen: tuple[Request, float] | None = None
        """The unit of work that had the writer at the last look, and since when; a time to come if it was reported."""
        self._line: deque[Lease | ReadLane] = deque()
        self._idle: list[Worker] = []
        self._readers: list[Worker] = []
        self.opened = False
        self._disposed = False
        self._closers: list[Request] = []

        self.room = None if backend.log is None else Room(self, backend.log)
        self.single_writer = backend.single_writer
        self.reads: ReadLane
        self.writes: WriteLane | SharedLane
        if self.single_writer:
            self.writer = Worker(f"database-{name}-writer", "writer", self)
            self.reads = ReadLane(self)
            self.writes = WriteLane(self, self.writer)
        else:  # `writer` is only the first among equals here
            self.writer = Worker(f"database-{name}-1", "shared", self)
            self.reads = SharedLane(self, readonly=True)
            self.writes = SharedLane(self, readonly=False)
        self.inline = Inline(waker, self.reads) if inline_reads and self.single_writer else None
        """Runs small reads on the loop's thread; None where nobody asked for that."""
        self._courtesy = Courtesy(self)
        self._end = waker.on_end(self.close_now)
        process.add(self)
        self.writer.start(self._writer_opened, self._writer_closed)

    # Opening

    def _writer_opened(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
            return
        self.opened = True
        if not self.single_writer:
            self._readers.append(self.writer)
            self._idle.append(self.writer)
        if self.closing:
            return
        if isinstance(self.writes, WriteLane):
            self.writer.inbox.put(self.writes)
        self._assign()

    def _fail(self, error: BaseException) -> None:
        """The database cannot be opened: everybody who waits is told, and the next use tries again."""
        self.failure = error
        self.closing = self.closed = True
        self._end.cancel()
        self._forget_timer()
        process.discard(self)
        self._on_closed(self)
        self._dispose()
        self._refuse_all(lambda: again(error))
        self._wake_closers()
        self.waker.dispose()

    # Readers

    def claim_reader(self, claimant: Lease | ReadLane) -> None:
        """Puts somebody in line for a reader and serves the line."""
        self.line_up(claimant)
        self._assign()
        if self._line:
            self.watch()

    def line_up(self, claimant: Lease | ReadLane) -> None:
        """Puts somebody in line for a reader."""
        if isinstance(claimant, ReadLane):
            claimant.claiming = True
            if isinstance(claimant, SharedLane):
                self._line.insert(claimant.position(self._line), claimant)
                return
        self._line.append(claimant)

    def reader_free(self, worker: Worker) -> None:
        """A reader has nothing to do any more."""
        self.reader_limiter.release_on_behalf_of(worker)
        self._idle.append(worker)
        if self._line:
            self._assign()

    def _assign(self) -> None:
        """Gives readers to those first in line, while there are any of both."""
        line = self._line
        while line and self.opened and not self.closing:
            if self._idle:
                worker = self._idle.pop()
                self.reader_limiter.acquire_on_behalf_of_nowait(worker)
            elif (sleeper := self.reads.spare()) is not None:
                worker = sleeper
            elif len(self._readers) < self.size:
                worker = self._add_reader()
                self.reader_limiter.acquire_on_behalf_of_nowait(worker)
            else:
                return
            claimant = line.popleft()
            if self._long_timer is None and self.long_read is not None:
                self._long_timer = self.waker.call_later(self.long_read, self._check_long_reads)
            if isinstance(claimant, SharedLane) and (place := claimant.position(line)):
                line.insert(place, claimant)  # what it stood there for has been done
                claimant = line.popleft()
            if isinstance(claimant, ReadLane):
                claimant.given(worker)
            else:
                worker.inbox.put(claimant)

    def _add_reader(self) -> Worker:
        number = len(self._readers) + 1
        if self.single_writer:
            worker = Worker(f"database-{self.name}-reader-{number}", "reader", self)
        else:
            worker = Worker(f"database-{self.name}-{number}", "shared", self)
        self._readers.append(worker)
        worker.start(None, lambda: self._reader_closed(worker))
        return worker

    def first_lease(self) -> Lease | None:
        """The lease that gets a connection next. Any thread: at most the two lanes stand before it."""
        line = self._line
        try:
            for position in range(3):
                claimant = line[position]
                if isinstance(claimant, Lease):
                    return claimant
        except IndexError:
            pass
        return None

    # Workers at work

    def rouse(self, worker: Worker) -> None:
        """Wakes a worker that sleeps with its lane."""
        self.waker.rouse(worker.wake)
        self._courtesy.begin()

    def look_now_and_then(self) -> None:
        """A worker has been put to work: from now on somebody looks whether it lets others wait, until all are at rest."""
        self._courtesy.begin()

    def look(self) -> None:
        """Such a look. Loop thread."""
        for worker in (self.writer, *self._readers):
            worker.look()
        self.reads.look()

    @property
    def working(self) -> bool:
        """Whether a worker has something to do, and so needs the GIL."""
        if not isinstance(self.writes, WriteLane):  # those wait for a server, not for the GIL
            return False
        lease = self.writes.lease
        if not self.writer.sleeping and (lease is None or not lease.mailbox.empty() or self.writer.current is not None):
            return True
        return any(not worker.sleeping for worker in self.reads.serving)

    # Leaving the line

    def withdraw(self, lease: Lease) -> bool:
        """Takes a lease out of its line; False if it has been granted."""
        line = self._line if lease.readonly or not self.single_writer else self.writes.queue
        try:
            line.remove(lease)  # type: ignore[arg-type]
        except ValueError:
            return False
        self.transactions.discard(lease)
        return True

    def watch(self) -> None:
        """Somebody waits: sees to it that the wait ends in time."""
        if self._timer is None and not self.closed:
            self._timer = self.waker.call_later(self._until_next_look(self.timeout), self._check_waiting)

    def _until_next_look(self, left: float) -> float:
        """Seconds until the timer is to ring, when the next wait ends in `left` seconds."""
        patience = self._patience
        return max(left if patience is None else min(left, max(patience, 0.01)), 0.001)

    def _forget_timer(self) -> None:
        self._courtesy.end()
        for timer in (self._timer, self._long_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._long_timer = None

    def _check_long_reads(self) -> None:
        """Whoever reads for long pins the WAL, which then grows with every write: says who, once each."""
        self._long_timer = None
        if self.closing or self.long_read is None:
            return
        now = perf_counter()
        reading: dict[Lease | Request, tuple[float, Callable[[], str]]] = {
            lease: (lease.granted_at, lease.holder)
            for lease in self.transactions
            if lease.readonly and lease.worker is not None and not lease.ended
        }
        for worker in self.reads.serving:
            current = worker.current
            if current is not None:
                reading[current] = (
                    current.queued_at,
                    partial("the statement {!r}".format, text_of(current)),
                )
        self._long_known.intersection_update(reading)
        next_check: float | None = self.long_read if self.reader_limiter.borrowed_tokens else None
        for reader, (since, holder) in reading.items():
            if reader in self._long_known:
                continue
            left = since + self.long_read - now
            if left > 0:
                next_check = left if next_check is None else min(left, next_check)
            else:
                self._long_known.add(reader)
                aside(partial(self.observer.long_read, holder(), now - since))
        if next_check is not None:
            self._long_timer = self.waker.call_later(max(next_check, 0.001), self._check_long_reads)

    def _check_waiting(self) -> None:
        self._timer = None
        now = perf_counter()
        next_check: float | None = None
        errors: list[tuple[Request | None, BaseException]] = []
        refused: list[Request] = []
        for queue in (self._line, self.reads.queue, self.writes.queue):
            while True:
                try:
                    head = queue[0]
                except IndexError:
                    break
                if isinstance(head, ReadLane):  # its requests are looked at in its own queue
                    waiting = next((item for item in tuple(queue) if not isinstance(item, ReadLane)), None)
                    if waiting is None:
                        break
                    head = waiting
                left = head.queued_at + self.timeout - now
                if left > 0:
                    next_check = left if next_check is None else min(left, next_check)
                    break
                try:
                    queue.remove(head)  # type: ignore[arg-type]
                except ValueError:  # a worker was quicker
                    continue
                self._timeouts += 1
                error = self._exhausted(head, now)
                answered = self._refuse(head, partial(again, error))
                errors.append((next(iter(answered), None), error))
                refused.extend(answered)
        if errors:
            aside(partial(self._report_and_wake, errors, refused))
        if next_check is None:
            self._seen = None
        else:
            if self._patience is not None:
                self._report_holders(now, self._patience)
            self._timer = self.waker.call_later(self._until_next_look(next_check), self._check_waiting)

    def _report_and_wake(self, errors: list[tuple[Request | None, BaseException]], refused: list[Request]) -> None:
        """Logs first and wakes second: who catches the error may count on its having been logged. Any thread."""
        for request, error in errors:
            self.writer.tell(request, self.observer.failure, error)
        self.waker.post(refused)

    def _report_holders(self, now: float, patience: float) -> None:
        """Reports leases that have kept others waiting for too long."""
        for lease in tuple(self.transactions):
            granted = lease.granted_at
            if granted == 0.0 or lease.ended or lease.reported or now - granted < patience:
                continue
            waiting = len(self._line if lease.readonly or not self.single_writer else self.writes.queue)
            if waiting:
                lease.reported = True
                self._report(lease.holder(), lease.number, lease.readonly, now - granted, waiting)
        self._report_unit(now, patience)

    def _report_unit(self, now: float, patience: float) -> None:
        """Likewise what runs on the writer without a lease: `db.run`, `offload=True`, `execute_many`, a slow write."""
        if not isinstance(self.writes, WriteLane):
            return
        current, waiting = self.writer.current, len(self.writes.queue)
        seen = self._seen
        if current is None or not waiting or self.writes.lease is not None:
            self._seen = None
        elif seen is None or seen[0] is not current:
            self._seen = current, now
        elif now - seen[1] >= patience:
            self._seen = current, float("inf")
            what = text_of(current)
            self._report(what[:200], None, False, now - seen[1], waiting)

    def _report(self, holder: str, number: int | None, readonly: bool, seconds: float, waiting: int) -> None:
        holding = self.observer.holding
        aside(lambda: holding(holder, number, readonly=readonly, seconds=seconds, waiting=waiting))

    def _exhausted(self, item: Lease | Request, now: float) -> ConnectionPoolExhaustedError:
        waited = now - item.queued_at
        reading = (isinstance(item, Lease) and item.readonly) or item.home is self.reads
        if not self.single_writer:
            what = f"none of {self.size} connections was"
        else:
            what = f"no reader connection (of {self.size})" if reading else "the one writer connection was not"
        holders = "; ".join(self.holders(readonly=reading)) or "autocommit statements"
        return ConnectionPoolExhaustedError(
            f"database {self.name!r}: {what} free within {waited:.3g} s (pool_timeout is {self.timeout:g} s)."
            f" Held by: {holders}."
        )

    def deadline_of(self, worker: Worker, request: Request | None, began: float, now: float) -> float:
        """Until when a worker tries again, where readers and the writer exclude one another. Worker's thread.

        `busy_timeout` is for other processes. This one's own connections are waited for like everything else here.

        Raises:
            TransactionError: The very task that waits holds what it waits for.
            ConnectionPoolExhaustedError: They have kept their locks for longer than `pool_timeout`.
        """
        deadline = began + self.backend.busy_timeout
        held = self._locked_by(worker)
        if not held:
            return deadline
        task = None if request is None else self.waker.task_of(request)
        for lease, holder in held:
            if task is not None and lease is not None and lease.holder.is_of(task):
                raise TransactionError(
                    f"this could only wait for itself: without a WAL a write excludes reading, and this very task holds"
                    f" {holder} open. End that first, or set journal_mode to WAL"
                )
        until = began + self.timeout
        if now >= max(deadline, until):
            holders = "; ".join(holder for _, holder in held)
            raise ConnectionPoolExhaustedError(
                f"database {self.name!r}: other connections of this process have kept their locks for {now - began:.3g} s"
                f" (pool_timeout is {self.timeout:g} s); without a WAL reading and writing exclude one another. Held by:"
                f" {holders}."
            )
        return (
            now + self.backend.busy_timeout
        )  # they may have ended a moment ago: then it is only others' turn to be waited for

    def _locked_by(self, worker: Worker) -> list[tuple[Lease | None, str]]:
        """Which other connections of this process keep a lock on the file. Any thread."""
        found: list[tuple[Lease | None, str]] = []
        excludes = self.backend.excludes
        assert excludes is not None
        for pool in process.pools():
            if pool.backend.description != self.backend.description:
                continue
            for other in (pool.writer, *pool.readers()):
                session, current = other.session, other.current
                if other is worker or session is None:
                    continue
                lease = next(
                    (each for each in tuple(pool.transactions) if each.worker is other and not each.ended), None
                )
                if lease is not None and excludes(session):
                    found.append((lease, lease.holder()))
                elif current is not None:
                    found.append((None, f"the statement {text_of(current)[:80]!r}"))
        return found

    def holders(self, *, readonly: bool) -> list[str]:
        """Who holds what since when. Any thread."""
        now = perf_counter()
        shared = not self.single_writer
        leases = [
            lease
            for lease in tuple(self.transactions)
            if lease.worker is not None and (shared or lease.readonly is readonly)
        ]
        found = [f"{lease.holder()}, for {now - lease.granted_at:.3g} s" for lease in leases if not lease.ended]
        if isinstance(self.writes, SharedLane):
            workers = self.reads.serving | self.writes.serving
        else:
            workers = self.reads.serving if readonly else {self.writer}
        for worker in tuple(workers):
            current = worker.current
            if current is not None and (readonly or not leases):
                found.append(f"the statement {text_of(current)[:80]!r}")
        return found

    def _refuse(self, item: Lease | Request, error: Callable[[], BaseException]) -> list[Request]:
        """Answers what was taken out of a queue; gives the requests to be woken. Loop thread; no worker has it."""
        if isinstance(item, Lease):
            self.transactions.discard(item)
            requests = item.drop()
        else:
            requests = [item]
        for request in requests:
            request.error = error()
        return requests

    def _refuse_all(self, error: Callable[[], BaseException], *, all_of_them: bool = True) -> None:
        """Refuses what waits; or only what no worker will come to any more: a served lane is emptied first."""
        for queue in (self._line, self.reads.queue, self.writes.queue):
            served = (queue is self.reads.queue and self.reads.served) or (
                queue is self.writes.queue and self.writes.served
            )
            for item in tuple(queue):
                if served and not all_of_them and not isinstance(item, Lease):
                    continue
                try:
                    queue.remove(item)  # type: ignore[arg-type]
                except ValueError:  # a worker was quicker
                    continue
                if isinstance(item, ReadLane):
                    item.claiming = False
                else:
                    self.waker.wake(self._refuse(item, error))

    # Looking

    def stats(self) -> PoolStats:
        """What the pool is doing. Loop thread."""
        workers = (self.writer, *self._readers) if self.single_writer else tuple(self._readers)
        in_use = int(self.reader_limiter.borrowed_tokens) - self.reads.idle
        writing = tuple(self.writes.queue)
        leases = sum(1 for item in writing if isinstance(item, Lease))
        return PoolStats(
            pool_size=self.size,
            readers_open=sum(1 for worker in self._readers if worker.session is not None),
            readers_in_use=in_use - self._writers_in_use(),
            writer_in_use=self._writers_in_use() if isinstance(self.writes, SharedLane) else int(self.writes.active),
            waiting=sum(1 for item in self._line if isinstance(item, Lease)) + leases,
            queued=len(self.reads.queue) + len(writing) - leases,
            acquired_total=sum(worker.acquired for worker in workers),
            timeouts_total=self._timeouts,
            wait_seconds_total=sum(worker.waited for worker in workers),
            statements_total=sum(worker.statements for worker in workers),
            commits_total=sum(worker.commits for worker in workers),
            rollbacks_total=sum(worker.rollbacks for worker in workers),
            grouped_total=self.writer.grouped,
            replaced_total=sum(worker.replaced for worker in workers),
            inline_total=0 if self.inline is None else self.inline.total,
        )

    @property
    def at_rest(self) -> bool:
        """Whether nobody uses it or waits for it. Loop thread."""
        if self.transactions or self._line or self.reads.queue or self.writes.queue or not self.opened:
            return False
        readers = int(self.reader_limiter.borrowed_tokens) - self.reads.idle
        return not readers and not (isinstance(self.writes, WriteLane) and self.writes.active)

    def close_at_rest(self) -> None:
        """Closes a pool that nobody uses; goes on by itself. Loop thread."""
        self.evicted = True
        self._begin_to_close()

    def _writers_in_use(self) -> int:
        """Connections that serve writes among those that could read as well."""
        if not isinstance(self.writes, SharedLane):
            return 0
        leases = sum(1 for lease in self.transactions if lease.worker is not None and not lease.readonly)
        return min(leases + len(self.writes.serving), int(self.reader_limiter.borrowed_tokens))

    # Closing

    async def close(self, drain: float = DRAIN_SECONDS) -> None:
        """Closes all connections, the writer last.

        What waits is refused with `PoolClosedError`, and so is every further statement of open transactions, which
        are rolled back. Autocommit statements that run already are finished, if that takes no longer than `drain`
        seconds; then they are interrupted, and raise `PoolClosedError`. Closing goes on by itself when the caller is
        cancelled.
        """
        self._begin_to_close()
        if not self.closed:
            timer = self.waker.call_later(drain, self._stop_now)
            try:
                request = self.request(STATEMENT, None)
                self._closers.append(request)
                await request
            finally:
                if self.closed:
                    timer.cancel()

    def _stop_now(self) -> None:
        """The time for draining is used up."""
        if not self.closed:
            for worker in (*self._readers, self.writer):
                worker.hurry()
            self._timer = self.waker.call_later(JOIN_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """A function of the user's (`db.run`) cannot be stopped by anybody: its thread is left to itself."""
        self._timer = None
        if not self.closed:
            running = "; ".join([*self.holders(readonly=True), *self.holders(readonly=False)]) or "something"
            error = PoolClosedError(
                f"the pool of database {self.name!r} cannot be closed: still running, and not to be stopped, is"
                f" {running}. Its thread is left to itself"
            )
            aside(partial(self.observer.failure, error))
            self.closed = True
            self._wake_closers()

    def _begin_to_close(self) -> None:
        if self.closing:
            return
        self.closing = True
        self._end.cancel()
        self._forget_timer()
        self._on_closed(self)
        if self.inline is not None:
            self.inline.give_up()
        self._refuse_all(self._closed_error, all_of_them=False)
        self._end_leases()
        if not self.opened:
            self.writer.hurry()  # it may be waiting for another process, and nobody is waiting for it any more
        if self._readers:
            for worker in self._readers:
                worker.stop()
        else:
            self.writer.stop()

    def close_soon(self) -> None:
        """Has the pool closed by its own loop, as soon as that comes to it. Any thread."""
        self.waker.post([], self._begin_to_close)

    def _closed_error(self) -> BaseException:
        return PoolClosedError(f"the pool of database {self.name!r} was closed")

    def refuse_the_rest(self) -> None:
        """A lane has been left while the pool closes: nobody comes for what is still queued."""
        self._refuse_all(self._closed_error)

    def _end_leases(self) -> None:
        for lease in tuple(self.transactions):
            lease.abort(f"the pool of database {self.name!r} was closed while this was open")
        self.transactions.clear()

    def _reader_closed(self, worker: Worker) -> None:
        self._readers.remove(worker)
        if self.closing and not self._readers:
            if self.single_writer:
                self.writer.stop()
            else:
                self._all_closed()

    def _writer_closed(self) -> None:
        if self.writer in self._readers:
            self._reader_closed(self.writer)
        else:
            self._all_closed()

    def _all_closed(self) -> None:
        if self.closed:  # it could not be opened, and everybody has been told
            return
        self.closed = True
        self._forget_timer()
        process.discard(self)
        self._dispose()
        self._wake_closers()
        self.waker.dispose()

    def _wake_closers(self) -> None:
        closers, self._closers = self._closers, []
        self.waker.wake(closers)

    def close_now(self) -> None:
        """Closes without a loop: at the loop's end, or at the process's. Statements that run are interrupted."""
        if self.closed:
            return
        if here.worker is not None and here.worker.pool is self:
            # The loop was garbage, and the collector ran on this of all threads, which cannot wait for itself.
            Thread(target=self.close_now, name=f"database-{self.name}-closing", daemon=True).start()
            return
        forgotten = self.waker.loop() is None
        self.closing = self.closed = True
        self._end.cancel()
        self._on_closed(self)
        # Told, not only forgotten: while trio ends, shielded tasks of it may still wait for an answer.
        self._refuse_all(self._closed_error)
        self._end_leases()
        deadline = time.monotonic() + JOIN_SECONDS
        ended = True
        for group in (tuple(self._readers), (self.writer,)):
            for worker in group:
                worker.stop(now=True)
            for worker in group:
                ended &= worker.join(max(0.1, deadline - time.monotonic()))
        self._dispose()
        process.discard(self)
        if ended:  # else the straggler may still post: better a descriptor too many than one that is somebody else's
            self.waker.dispose()
        if forgotten:
            warnings.warn(
                f"the pool of database {self.name!r} was not closed: its event loop was thrown away open. Close the loop,"
                " or `await db.close()` on it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _dispose(self) -> None:
        """Once: a pool that cannot be opened hears of it, and then of its writer's end."""
        if not self._disposed:
            self._disposed = True
            self.backend.dispose()

    def readers(self) -> list[Worker]:
        """The workers that read. Any thread."""
        return list(self._readers)

    def attends(self, worker: Worker) -> bool:
        """Whether the worker attends to a transaction or a stream, and so to nothing else. Any thread."""
        return any(lease.worker is worker and not lease.ended for lease in tuple(self.transactions))

    def disown(self) -> list[Session]:
        """In a forked child: this pool is the parent's. Gives the sessions that must never be touched."""
        self.closing = self.closed = True
        for lease in self.transactions:
            lease.doom = PoolClosedError("this transaction belongs to the process that this one was forked from")
            lease.ended = True
        return [worker.session for worker in (self.writer, *self._readers) if worker.session is not None]
