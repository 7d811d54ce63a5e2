"""The pool: one writer, some readers, and who gets them; or connections that are all alike.

One pool per database and event loop. The writer is opened first (it creates what is missing and is the only one that
writes and checkpoints) and closed last. Readers are opened when they are first needed.

Who gets a reader stands in one line (`Line`). Writers stand in the line of the write lane, and the writer serves nothing
but that. Who waits or holds for too long is seen by `Watch`.

Where the backend says that there is no single writer, no connection is special: all stand where the readers do, and
leases that write stand in the same line. The first one is opened first, for it prepares the database.

The pool makes the parts and is their `Owner`: they ask it, it asks them, and none of them knows its class.

Threads. Every decision is made in a synchronous function on the loop's thread, so nothing can come between deciding
and acting, and no cancellation can strand a connection: a task that goes away merely takes its request out of a queue.
Workers tell the loop what they did by notices (`Waker.post`), they decide nothing here. The exceptions are
`close_now` and `abandon`, called when the loop has ended.

Length. Opening, closing and the end of a loop or a process share one state, in which no step may be missed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock, Thread, get_ident

from database.driver import process
from database.driver.courtesy import Courtesy
from database.driver.idle import Idle
from database.driver.inline import Inline
from database.driver.inline_lease import InlineLease
from database.driver.lease import Holder, Lease
from database.driver.line import Line
from database.driver.observer import Observer, aside
from database.driver.read_lane import ReadLane
from database.driver.request import STATEMENT, Request
from database.driver.roles import Claimant
from database.driver.room import Room
from database.driver.runner import Runner, again
from database.driver.shared_lane import SharedLane
from database.driver.stats import PoolStats
from database.driver.stepped_lease import SteppedLease
from database.driver.wakeup import Timer, Waker
from database.driver.watch import Watch, refuse
from database.driver.worker import Servable, Worker, here
from database.driver.write_lane import WriteLane
from database.engine.contract import Backend, Connection, Role
from database.errors import PoolClosedError, TransactionError

__all__ = ["Pool", "PoolStats"]

DRAIN_SECONDS = 10.0
"""How long a closing pool lets statements go on that run already."""

JOIN_SECONDS = 5.0
"""How long the end of a loop or of the process waits for a worker that was told to stop."""


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
        self.single_writer = backend.single_writer
        self.as_is = backend.as_is
        self.thread = get_ident()
        self.failure: BaseException | None = None
        self.opened = self.closing = self.closed = False
        self.evicted = False
        """Whether it is closed only to make room: whoever comes opens another."""
        self.transactions: set[Lease] = set()
        """Leases that have been granted or wait, for messages and for closing."""

        self._on_closed = on_closed
        self._closing_timer: Timer | None = None
        self._disposed = False
        self._closers: list[Request] = []
        self._readers: list[Worker] = []

        self.room = None if backend.log is None else Room(backend.log, self._rooms)
        self._line: Line[Lease] = Line(self)
        self._idle = Idle(self, backend.max_idle, self._line.idle) if backend.max_idle else None
        self.reads: ReadLane | SharedLane
        self.writes: WriteLane | SharedLane
        self._writers: WriteLane | None = None
        """Where leases that write stand, if not in the line."""
        # Where readers may have to wait for the writer's lock, the loop would have to, too.
        reads_inline = inline_reads and self.single_writer and backend.excludes is None
        self._lends = reads_inline or backend.steps
        self.inline: Inline | None = None
        """Runs small reads on the loop's thread; None where nobody asked for that."""
        if self.single_writer:
            self.writer = self._make_worker("writer", "writer")
            self.reads = ReadLane(self)
            self.writes = self._writers = WriteLane(self, self.writer)
            if reads_inline:
                self.inline = Inline(waker, self.reads, self._line, lambda: (self.writer, *self._readers))
        else:  # `writer` is only the first among equals here
            self.writer = self._make_worker("1", "shared")
            self.reads = SharedLane(self, readonly=True)
            self.writes = SharedLane(self, readonly=False)
        self._watch = Watch(self, self._line, self.reads, self.writes)
        self.watched = False
        self.watch: Callable[[], None] = self._watch.begin
        self.watch_reading: Callable[[], None] = self._watch.begin_reading
        self._courtesy = Courtesy(self)
        self._end = waker.on_end(self.close_now)
        process.add(self)
        self.writer.start(self._writer_opened, self._writer_closed)

    def _make_worker(self, title: str, role: Role) -> Worker:
        worker = Worker(
            f"database-{self.name}-{title}",
            role,
            self.backend,
            self.waker,
            self.observer,
            deadline=self._deadline_of,
            room=self.room if role == "reader" else None,
        )
        if self._lends:
            worker.lent = Lock()
        return worker

    # Opening

    def _writer_opened(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
            return
        self.opened = True
        if not self.single_writer:
            self._readers.append(self.writer)
            self._line.add(self.writer)
        if self.closing:
            return
        if self.single_writer:
            self.writer.inbox.put(self.writes)
        self._line.serve()

    def _fail(self, error: BaseException) -> None:
        """The database cannot be opened: everybody who waits is told, and the next use tries again."""
        self.failure = error
        self.closing = self.closed = True
        self._end.cancel()
        self._forget_timers()
        process.discard(self)
        self._on_closed(self)
        self._dispose()
        self._refuse_all(lambda: again(error))
        self._wake_closers()
        self.waker.dispose()

    # Who gets a connection. See `Owner`

    def lease(self, holder: Holder, *, number: int | None, readonly: bool) -> Lease:
        """Makes a lease for a transaction. It stands in no line yet."""
        if self.backend.steps:
            return SteppedLease(self, holder, number=number, readonly=readonly)
        inline = self.inline
        if inline is None:
            return Lease(self, holder, number=number, readonly=readonly)
        return InlineLease(self, holder, inline, number=number, readonly=readonly)

    def claim(self, lease: Lease) -> None:
        """Puts a lease in line for a connection."""
        writers = self._writers
        if writers is None or lease.readonly:
            self._line.claim(lease)
        else:
            writers.submit(lease)

    def withdraw(self, lease: Lease) -> bool:
        """Takes a lease out of its line; False if it has been granted."""
        writers = self._writers
        try:
            (self._line.leases if writers is None or lease.readonly else writers.queue).remove(lease)
        except ValueError:
            return False
        self.transactions.discard(lease)
        return True

    def join(self, lane: Claimant) -> None:
        """Puts a lane in line for a connection."""
        self._line.join(lane)

    def line_up(self, lane: Claimant) -> None:
        """Likewise, but the line is not served: that is about to happen."""
        self._line.lanes.append(lane)

    def in_line(self, lane: Claimant) -> bool:
        """Whether the lane stands there."""
        return lane in self._line.lanes

    def free(self, worker: Worker) -> None:
        """A connection that was given to somebody has nothing to do any more."""
        if self._idle is not None:
            self._idle.freed(worker)
        self._line.free(worker)

    def first_lease(self) -> Lease | None:
        """The lease that gets a connection next. Any thread."""
        try:
            return self._line.leases[0]
        except IndexError:
            return None

    def spare(self) -> Worker | None:
        """A connection that only rests with its lane, and is counted as given already."""
        return self.reads.spare()

    def open_another(self) -> Worker | None:
        """One more connection; None where there are as many as there may be."""
        number = len(self._readers) + 1
        if number > self.size:
            return None
        if self.single_writer:
            worker = self._make_worker(f"reader-{number}", "reader")
        else:
            worker = self._make_worker(f"{number}", "shared")
        self._readers.append(worker)
        worker.start(None, lambda: self._reader_closed(worker))
        return worker

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
        return self.reads.working or self.writes.working

    # Waiting and holding. See `Watch`

    def _deadline_of(self, runner: Runner, requests: Sequence[Request], began: float, now: float) -> float:
        return self._watch.deadline_of(runner, requests, began, now)  # there are workers before there is a watch

    def own_wait(self, request: Request | None) -> TransactionError | None:
        """See `Owner`. Any thread."""
        return self._watch.own_wait(request)

    def holders(self, *, readonly: bool) -> list[str]:
        """Who holds what since when. Any thread."""
        return self._watch.holders(readonly=readonly)

    def _refuse_all(self, error: Callable[[], BaseException], *, all_of_them: bool = True) -> None:
        """Refuses what waits; or only what no worker will come to any more: a served lane is emptied first."""
        self._line.lanes.clear()
        for queue in (*self._watch.queues(), *(() if self.inline is None else (self.inline.queue,))):
            served = any(queue is lane.queue and lane.served for lane in (self.reads, self.writes))
            for item in tuple(queue):
                if served and not all_of_them and not isinstance(item, Lease):
                    continue
                try:
                    queue.remove(item)
                except ValueError:  # a worker was quicker
                    continue
                if isinstance(item, Lease):
                    self.transactions.discard(item)
                self.waker.wake(refuse(item, error))

    # Looking

    def stats(self) -> PoolStats:
        """What the pool is doing. Loop thread."""
        workers = (self.writer, *self._readers) if self.single_writer else tuple(self._readers)
        in_use = self._line.given - self.reads.resting
        writing = self._writing()
        leases = self.writes.leases
        return PoolStats(
            pool_size=self.size,
            readers_open=sum(1 for worker in self._readers if worker.connection is not None),
            readers_in_use=in_use if self.single_writer else in_use - writing,
            writer_in_use=writing,
            waiting=len(self._line.leases) + leases,
            queued=len(self.reads.queue) + len(self.writes.queue) - leases,
            acquired_total=sum(worker.acquired for worker in workers),
            timeouts_total=self._watch.timeouts,
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
        if self.inline is not None and self.inline.queue:
            return False
        return self._line.given == self.reads.resting and not self.writes.active

    def close_at_rest(self) -> None:
        """Closes a pool that nobody uses; goes on by itself. Loop thread."""
        self.evicted = True
        self._begin_to_close()

    def _writing(self) -> int:
        """Connections that serve writes."""
        if self.single_writer:
            return self.writes.active
        leases = sum(1 for lease in self.transactions if lease.worker is not None and not lease.readonly)
        return min(leases + self.writes.active, self._line.given)

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
            self._closing_timer = self.waker.call_later(JOIN_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """A function of the user's (`db.run`) cannot be stopped by anybody: its thread is left to itself."""
        self._closing_timer = None
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
        self._forget_timers()
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
        self._forget_timers()
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
        if here.worker is not None and here.worker in (self.writer, *self._readers):
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

    def _forget_timers(self) -> None:
        self._courtesy.end()
        self._watch.end()
        if self._idle is not None:
            self._idle.end()
        if self._closing_timer is not None:
            self._closing_timer.cancel()
            self._closing_timer = None

    def _dispose(self) -> None:
        """Once: a pool that cannot be opened hears of it, and then of its writer's end."""
        if not self._disposed:
            self._disposed = True
            self.backend.dispose()

    def readers(self) -> list[Worker]:
        """The workers that read. Any thread."""
        return list(self._readers)

    def lane_of(self, worker: Worker) -> Servable | None:
        """The lane that the worker stays with, if it does. Any thread."""
        if worker is self.writer:
            return self.writes if self.opened else None
        return self.reads if worker in self.reads.workers else None

    def _rooms(self) -> list[Room]:
        """Those of all pools of this file. Any thread."""
        return [pool.room for pool in process.sharing(self.backend) if pool.room is not None]

    def attends(self, worker: Worker) -> bool:
        """Whether the worker attends to a transaction or a stream, and so to nothing else. Any thread."""
        return any(lease.worker is worker and not lease.ended for lease in tuple(self.transactions))

    def disown(self) -> list[Connection]:
        """In a forked child: this pool is the parent's. Gives the connections that must never be touched."""
        self.closing = self.closed = True
        for lease in self.transactions:
            lease.doom = PoolClosedError("this transaction belongs to the process that this one was forked from")
            lease.ended = True
        return [worker.connection for worker in (self.writer, *self._readers) if worker.connection is not None]
