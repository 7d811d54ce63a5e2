"""The lane of those who write, where there is a single writer.

Writes share more than the wake-up: those that wait together are committed together. A group is bounded in number and in
time, never waits for company, and nobody in it is answered before its commit has succeeded. An interactive transaction
queues in the same lane as a `Lease`, so writers are served first come, first served.

The writer's worker never leaves: it stays with the lane, awake or asleep, until the pool closes.

Threads. As in `lane.py`; what stands under "Worker thread" runs on the writer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from time import perf_counter
from typing import Any

from database.driver.lane import BATCH_SIZE, Lane
from database.driver.lease import Lease
from database.driver.request import STATEMENT, UNIT, Request
from database.driver.roles import Owner
from database.driver.runner import CLOSED, again
from database.driver.worker import WAKE, Servable, Worker
from database.engine.contract import Alone, Interrupted
from database.errors import ConnectionPoolExhaustedError, DatabaseBusyError, DatabaseError, PoolClosedError

__all__ = ["GROUP_SECONDS", "GROUP_SIZE", "WriteLane"]

GROUP_SIZE = 64
"""Writes that share a commit, at the most."""

GROUP_SECONDS = 0.002
"""Seconds after which a group is committed although more are waiting."""


class WriteLane(Lane):
    """Autocommit writes, units of work and interactive write transactions, in the order in which they came."""

    __slots__ = ("lease", "worker")

    def __init__(self, pool: Owner[Lease], worker: Worker) -> None:
        super().__init__(pool)
        self.worker = worker
        self.queue: deque[Request | Lease] = deque()
        self.lease: Lease | None = None
        """The transaction that has the writer now. Set on the worker's thread, for messages."""

    # Loop thread

    @property
    def served(self) -> bool:
        """Whether the worker is at the queue, and will empty it."""
        return bool(self.active) and self.lease is None

    def submit(self, request: Request | Lease) -> None:
        """Queues a write or a transaction."""
        request.home = self
        request.queued_at = perf_counter()
        self.queue.append(request)
        worker = self.worker
        if worker.sleeping and self.pool.opened:
            worker.sleeping = False
            self.pool.rouse(worker)
        elif not self.pool.watched:
            self.pool.watch()

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        self.worker.interrupt(request)

    @property
    def workers(self) -> AbstractSet[Worker]:
        """The writer: whatever it does has come from here."""
        return {self.worker}

    @property
    def active(self) -> int:
        """1 while the writer is at work."""
        return int(self.pool.opened and not self.worker.sleeping)

    @property
    def working(self) -> bool:
        """Whether the writer has something to do: a lease whose task thinks leaves it nothing."""
        lease, worker = self.lease, self.worker
        return not worker.sleeping and (lease is None or not lease.mailbox.empty() or worker.current is not None)

    @property
    def unit(self) -> Request | None:
        """What keeps everybody else in the queue waiting, if it is no lease: `db.run`, `offload=True`, a slow write."""
        return self.worker.current if self.lease is None else None

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
                connection = worker.connection
                if connection is not None:
                    connection.unlock()
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
        connection = worker.connection
        if connection is None:  # given up after an error: what is opened anew needs the right as well
            try:
                connection = worker.ready()
            except BaseException as failure:
                return self._turn_away(worker, item, worker.translate(failure, None))
        if connection.try_lock(0):
            return True
        worker.flush()
        began = perf_counter()
        deadline = item.queued_at + self.pool.timeout
        while not connection.try_lock(0.01):
            if item.cancelled:
                error: BaseException = Interrupted()
            elif (own := self.pool.own_wait(item.first() if isinstance(item, Lease) else item)) is not None:
                error = own
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
            connection = worker.begin(first, readonly=False)
            connection.share(True)
        except BaseException as error:
            first.error = worker.translate(error, first)
            worker.rollback()
            worker.answers.append(first)
            if isinstance(first.error, (DatabaseBusyError, ConnectionPoolExhaustedError)):
                self._fail_those_who_waited_too(worker, error, began)
            return
        queue: deque[Any] = self.queue  # only a lease's kind is beyond `UNIT`
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
                    if worker.connection is not connection or not connection.in_transaction:
                        self._again_alone(worker, members, request)
                        return
                    if type(request.error) is Alone:
                        alone = request
                        break
            members.append(request)
            if len(members) >= GROUP_SIZE or perf_counter() - began > GROUP_SECONDS:
                break
            try:
                if queue[0].kind > UNIT:
                    break
                item = queue.popleft()
            except IndexError:
                break
            if item.kind > UNIT:  # what was first in line has just been withdrawn
                queue.appendleft(item)
                break
            request = item
        self._commit(worker, members)
        if alone is not None:
            alone.error = None
            self._again_alone(worker, [alone], None)

    def _commit(self, worker: Worker, members: list[Request]) -> None:
        connection = worker.connection
        assert connection is not None
        connection.share(False)
        try:
            worker.commit(connection, len(members), members)
        except BaseException as error:
            open_still = connection.in_transaction
            broken, busy = worker.backend.is_broken(error), worker.backend.is_busy(error)
            worker.rollback()
            if busy:  # they have all waited for as long (without a WAL, for those who read)
                for member in members:
                    if member.error is None or _was_done(member):
                        member.error = worker.translate(again(error), member)
                worker.answers.extend(members)
                return
            if open_still and not broken and worker.connection is connection:
                # Refused, and rolled back by us: certainly nothing is committed. One member is to blame (a deferred
                # foreign key, a row that no longer fitted the disk); alone, each gets its own verdict.
                self._again_alone(worker, members, None)
                return
            translated = worker.translate(error, None)
            for member in members:
                if member.error is None or _was_done(member):
                    member.error = again(translated)
        else:
            worker.grouped += len(members)
        worker.answers.extend(members)

    def _again_alone(self, worker: Worker, members: list[Request], culprit: Request | None) -> None:
        """The whole group was rolled back: runs its members once more, each in a transaction of its own."""
        if worker.connection is not None:
            worker.connection.share(False)
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
            if isinstance(item, Lease) or item.kind > UNIT or item.queued_at > began:
                queue.appendleft(item)
                break
            item.error = Interrupted() if item.cancelled else worker.translate(again(error), item)
            worker.answers.append(item)


def _was_done(member: Request) -> bool:
    """Whether a write has succeeded although its caller gets an error: only its rows could not be read, or made records of."""
    error = member.error
    return member.kind == STATEMENT and (
        getattr(error, "outcome", None) == "done"
        or not (isinstance(error, (Alone, Interrupted)) or _is_the_engines(error))
    )


def _is_the_engines(error: BaseException | None) -> bool:
    return isinstance(error, DatabaseError) and error.__cause__ is not None
