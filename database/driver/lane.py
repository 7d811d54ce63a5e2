"""Lanes: queues that a worker empties in batches.

Autocommit statements need no connection of their own. They wait in a lane; one worker runs them one after the other and
posts the answers together. That is faster than a connection each, for threads fight over the GIL and every wake-up
of the event loop costs as much as several statements. The exception is a statement that turns out to be slow: then
the worker calls for another reader to go on with the queue (`ReadLane`).

Writes share more than the wake-up (`WriteLane`): those that wait together are committed together. A group is bounded
in number and in time, never waits for company, and nobody in it is answered before its commit has succeeded. An
interactive transaction queues in the same lane as a `Lease`, so writers are served first come, first served.

A worker that has emptied a lane stays with it, asleep (`database.driver.worker` says how it is woken), so that a single
statement costs no more decisions than one of a hundred. The read lane's worker is the pool's to take away while it sleeps,
and leaves by itself when somebody else waits for a reader and none is free: the lane takes its turn like everybody.

Threads. `submit` and `withdraw` run on the loop's thread, `serve` on the worker's. Both touch `queue`, a deque: append,
popleft and remove are atomic, so each item is run or withdrawn, never both. Who serves a lane is decided on the loop's
thread alone: a worker that leaves says so, and the loop looks again.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, cast

from database.driver.inline import learning
from database.driver.lease import Lease
from database.driver.request import STATEMENT, UNIT, Request, taken_from
from database.driver.worker import BATCH_SECONDS, BATCH_SIZE, CLOSED, WAKE, Servable, Worker, again
from database.engine.contract import Alone, Interrupted
from database.errors import ConnectionPoolExhaustedError, DatabaseBusyError, DatabaseError, PoolClosedError

if TYPE_CHECKING:
    from database.driver.pool import Pool

__all__ = ["GROUP_SECONDS", "GROUP_SIZE", "ReadLane", "WriteLane"]

GROUP_SIZE = 64
"""Writes that share a commit, at the most."""

GROUP_SECONDS = 0.002
"""Seconds after which a group is committed although more are waiting."""


class ReadLane:
    """Autocommit reads."""

    __slots__ = ("claiming", "pool", "queue", "resident", "serving")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue: deque[Request] = deque()
        self.serving: set[Worker] = set()
        self.resident: Worker | None = None
        """The one of `serving` that is not held up by a slow statement."""
        self.claiming = False
        """Whether the lane stands in the pool's line for a reader."""

    # Loop thread

    @property
    def served(self) -> bool:
        """Whether a worker is at the queue, and will empty it."""
        return bool(self.serving)

    def submit(self, request: Request) -> None:
        """Queues a read, and has a reader come if none is at it."""
        request.home = self
        request.queued_at = perf_counter()
        self.queue.append(request)
        worker = self.resident
        if worker is None:
            if not self.claiming:
                self.pool.claim_reader(self)
        elif worker.sleeping:
            worker.sleeping = False
            self.pool.rouse(worker)

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return taken_from(self.queue, request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        for worker in tuple(self.serving):
            worker.interrupt(request)

    def given(self, worker: Worker) -> None:
        """The pool gives the lane a reader."""
        self.claiming = False
        self.serving.add(worker)
        self.resident = worker
        worker.yielding = worker.sleeping = False
        worker.inbox.put(self)
        self.pool.look_now_and_then()

    @property
    def idle(self) -> bool:
        """Whether its reader has nothing to do."""
        return self.resident is not None and self.resident.sleeping

    def spare(self) -> Worker | None:
        """Gives the reader away if it sleeps; else has it leave at its next opportunity."""
        worker = self.resident
        if worker is None:
            return None
        worker.yielding = True
        if not worker.sleeping:  # looked at second: the worker looks at `yielding` after it has set `sleeping`
            return None
        self.resident = None
        self.serving.discard(worker)
        if self.queue:  # it came when the worker had looked and did not yet count as asleep
            self.pool.line_up(self)
        return worker

    def look(self) -> None:
        """Called every few milliseconds while a worker is at work: sees to those that wait behind one long request.

        SQLite's progress handler tells of a slow statement sooner, but not of a function that spends its time in Python.
        """
        if not self.queue:
            return
        self.pool.watch()
        worker = self.resident
        if worker is None or worker.sleeping or not worker.dwells:
            return
        worker.yielding = True  # when it is through with this, it need not come back
        self.resident = None
        if worker.sleeping:  # it has just got through; looked at second, as in `spare`
            self.serving.discard(worker)
            self.pool.reader_free(worker)
        if self.queue and not self.claiming:
            self.pool.claim_reader(self)

    def _held_up(self, worker: Worker) -> None:
        if worker is self.resident and worker.current is not None:
            self.resident = None
            if self.queue and not self.claiming:
                self.pool.claim_reader(self)

    def _left(self, worker: Worker) -> None:
        if worker not in self.serving:  # it was given away at the very moment
            return
        self.serving.discard(worker)
        if worker is self.resident:
            self.resident = None
        if self.pool.closing and not self.serving:
            self.pool.refuse_the_rest()
        if self.queue and self.resident is None and not self.claiming:
            self.pool.line_up(self)  # more came after the worker had looked
        self.pool.reader_free(worker)
        if self.claiming:
            self.pool.watch()

    # Worker thread

    def serve(self, worker: Worker) -> Servable | None:
        """Runs what waits, again and again, until the pool wants the worker for something else.

        Or until another reader has taken over behind a slow statement: two busy threads are slower than one. Unless the
        other one is busy with a slow statement, too: then SQLite computes most of the time, and each has a core of its own.
        """
        pool = self.pool
        slow = False

        def on_slow() -> None:
            nonlocal slow
            if not slow:
                slow = True
                pool.waker.post([], lambda: self._held_up(worker))

        worker.attend(on_slow)
        queue = self.queue
        popleft = queue.popleft
        inline = pool.inline
        execute = worker.execute if inline is None else learning(inline, worker.execute)
        since = perf_counter()
        request: Request | None = None
        try:
            while True:
                try:
                    request = popleft()
                except IndexError:
                    if slow:
                        break  # whoever has taken over sleeps here
                    request = None
                    word = worker.rest(queue)
                    if word is None:
                        break
                    if word is not WAKE:
                        return word
                    worker.attend(on_slow)
                    since = perf_counter()
                    continue
                if request.kind == UNIT:
                    worker.perform(request, readonly=True)
                else:
                    execute(request)
                answers = worker.answers  # another list, if the request before has been flushed in between
                answers.append(request)
                if ((slow and self._may_go(worker)) or worker.yielding) and not pool.closing:
                    break
                if queue and (len(answers) >= BATCH_SIZE or perf_counter() - since > BATCH_SECONDS):
                    worker.flush()  # where nothing more waits, the worker goes to sleep first: see `Worker`
                    room = worker.room
                    if room is not None and room.held:
                        room.wait()
                    since = perf_counter()
        except BaseException as defect:
            worker.fail(defect, [request])
        worker.finish(lambda: self._left(worker))
        return None

    def _may_go(self, worker: Worker) -> bool:
        """After a slow statement: whether the reader that has taken over copes alone, or somebody else waits for this one."""
        other = self.resident
        return other is None or other is worker or other.ticks == 0 or self.pool.first_lease() is not None


def _was_done(member: Request) -> bool:
    """Whether a write has succeeded although its caller gets an error: only its rows could not be made into records."""
    error = member.error
    return member.kind == STATEMENT and not (isinstance(error, (Alone, Interrupted)) or _is_the_engines(error))


def _is_the_engines(error: BaseException | None) -> bool:
    return isinstance(error, DatabaseError) and error.__cause__ is not None


class WriteLane:
    """Autocommit writes, units of work and interactive write transactions, in the order in which they came."""

    __slots__ = ("lease", "pool", "queue", "worker")

    def __init__(self, pool: Pool, worker: Worker) -> None:
        self.pool = pool
        self.worker = worker
        self.queue: deque[Request | Lease] = deque()
        self.lease: Lease | None = None
        """The transaction that has the writer now. Set on the worker's thread, for messages."""

    # Loop thread

    @property
    def served(self) -> bool:
        """Whether the worker is at the queue, and will empty it."""
        return self.active and self.lease is None

    def submit(self, item: Request | Lease) -> None:
        """Queues a write or a transaction."""
        item.home = self
        item.queued_at = perf_counter()
        self.queue.append(item)
        worker = self.worker
        if worker.sleeping and self.pool.opened:
            worker.sleeping = False
            self.pool.rouse(worker)
        else:
            self.pool.watch()

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return taken_from(self.queue, request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        self.worker.interrupt(request)

    @property
    def active(self) -> bool:
        """Whether the writer is at work."""
        return self.pool.opened and not self.worker.sleeping

    # Worker thread

    def serve(self, worker: Worker) -> Servable | None:
        """Runs what waits, again and again, until the pool closes."""
        worker.attend()
        queue = self.queue
        popleft = queue.popleft
        room = self.pool.room
        while True:
            try:
                item = popleft()
            except IndexError:
                word = worker.rest(queue)
                if word is not WAKE:
                    return word
                worker.attend()
                continue
            try:
                if not self._lock(worker, item):
                    continue
                if isinstance(item, Lease):
                    self.lease = item
                    item.serve(worker)
                    self.lease = None
                elif item.kind <= UNIT and self._is_groupable(queue):
                    self._group(worker, item)
                else:
                    worker.perform(item, readonly=False)
                    worker.answers.append(item)
                if room is not None and perf_counter() > room.next_look:
                    room.look(worker)
            except BaseException as defect:
                self.lease = None
                if isinstance(item, Lease):
                    worker.fail(defect, ())
                    item.fail(worker, defect)
                else:
                    worker.fail(defect, [item])
            finally:
                session = worker.session
                if session is not None:
                    session.unlock()
            if queue and len(worker.answers) >= BATCH_SIZE:
                worker.flush()

    @staticmethod
    def _is_groupable(queue: deque[Request | Lease]) -> bool:
        """Whether what is next in line may share a commit."""
        try:
            return queue[0].kind <= UNIT
        except IndexError:
            return False

    def _lock(self, worker: Worker, item: Request | Lease) -> bool:
        """Takes the process-wide right to write: another event loop's pool may hold it."""
        session = worker.session
        if session is None:  # given up after an error: what is opened anew needs the right as well
            try:
                session = worker.ready()
            except BaseException as failure:
                return self._turn_away(worker, item, worker.translate(failure, None))
        if session.try_lock(0):
            return True
        worker.flush()
        began = perf_counter()
        deadline = item.queued_at + self.pool.timeout
        while not session.try_lock(0.01):
            if item.cancelled:
                error: BaseException = Interrupted()
            elif worker.hurried:
                error = PoolClosedError(CLOSED)
            elif isinstance(item, Lease) and item.doom is not None:
                error = item.refusal()
            elif perf_counter() > deadline:
                error = ConnectionPoolExhaustedError(
                    f"no write transaction on {self.pool.name!r} within {self.pool.timeout:g} s: a pool of another"
                    " event loop in this process, or another name for the same file, is writing"
                )
                worker.tell(item.first() if isinstance(item, Lease) else item, worker.observer.failure, error)
            else:
                continue
            return self._turn_away(worker, item, error)
        worker.locked += perf_counter() - began
        return True

    @staticmethod
    def _turn_away(worker: Worker, item: Request | Lease, error: BaseException) -> bool:
        if isinstance(item, Lease):
            item.fail(worker, error)
        else:
            item.error = error
            worker.answers.append(item)
        return False

    def _group(self, worker: Worker, first: Request) -> None:
        """One transaction for all that waits together."""
        members: list[Request] = []
        try:
            self._run_group(worker, first, members)
        except BaseException as defect:
            worker.fail(defect, [*members, first, worker.current])

    def _run_group(self, worker: Worker, first: Request, members: list[Request]) -> None:
        began = perf_counter()
        try:
            session = worker.begin(first, readonly=False)
            session.share(True)
        except BaseException as error:
            first.error = worker.translate(error, first)
            worker.rollback()
            worker.answers.append(first)
            if isinstance(first.error, (DatabaseBusyError, ConnectionPoolExhaustedError)):
                self._fail_those_who_waited_too(worker, error, began)
            return
        queue = self.queue
        alone: Request | None = None
        request = first
        while True:
            if request.cancelled:
                request.error = Interrupted()
            else:
                if request.kind == STATEMENT:
                    worker.execute(request)
                else:
                    worker.atomically(request)
                if request.error is not None:
                    if worker.session is not session or not session.in_transaction:
                        self._again_alone(worker, members, request)
                        return
                    if type(request.error) is Alone:
                        alone = request
                        break
            members.append(request)
            if len(members) >= GROUP_SIZE or not self._is_groupable(queue) or perf_counter() - began > GROUP_SECONDS:
                break
            try:
                item = queue.popleft()
            except IndexError:
                break
            if item.kind > UNIT:  # what was first in line has just been withdrawn
                queue.appendleft(item)
                break
            request = cast("Request", item)
        self._commit(worker, members)
        if alone is not None:
            alone.error = None
            self._again_alone(worker, [alone], None)

    def _commit(self, worker: Worker, members: list[Request]) -> None:
        session = worker.session
        assert session is not None
        session.share(False)
        try:
            worker.commit(session, len(members))
        except BaseException as error:
            open_still = session.in_transaction
            broken = worker.backend.is_broken(error)
            worker.rollback()
            if open_still and not broken and worker.session is session:
                # Refused, and rolled back by us: certainly nothing is committed. One member is to blame (a deferred
                # foreign key, a row that no longer fitted the disk); alone, each gets its own verdict.
                self._again_alone(worker, members, None)
                return
            translated = worker.translate(error, None)
            for member in members:
                if member.error is None or _was_done(member):
                    member.error = translated
        else:
            worker.grouped += len(members)
        worker.answers.extend(members)

    def _again_alone(self, worker: Worker, members: list[Request], culprit: Request | None) -> None:
        """The whole group was rolled back: runs its members once more, each in a transaction of its own."""
        if worker.session is not None:
            worker.session.share(False)
        worker.rollback()
        if culprit is not None:
            worker.answers.append(culprit)
        for member in members:
            if (member.error is None or _was_done(member)) and not member.cancelled:
                member.result = member.error = None
                if not self._lock(worker, member):  # the connection may be another one by now
                    continue
                worker.perform(member, readonly=False)
            elif member.error is None:
                member.error = Interrupted()  # rolled back with the others, and nobody waits for it
            worker.answers.append(member)

    def _fail_those_who_waited_too(self, worker: Worker, error: BaseException, began: float) -> None:
        """Whoever was in line when the wait for the lock began has waited for as long, and gets the same answer."""
        queue = self.queue
        while queue:
            try:
                item = queue.popleft()
            except IndexError:
                break
            if item.kind > UNIT or item.queued_at > began:
                queue.appendleft(item)
                break
            item = cast("Request", item)
            item.error = Interrupted() if item.cancelled else worker.translate(again(error), item)
            worker.answers.append(item)
