"""Transactions whose reads run on the event loop's own thread, where the pool has `inline_reads`.

Two things are saved. In a transaction that a worker attends to, a quick read runs here while the worker waits for the next
request. And a read-only transaction need not have a worker's attention at all: BEGIN, its reads, and COMMIT run here, on the
connection of a reader that goes on sleeping; it is booked as anybody's connection is, so nobody else gets it.

What hands over. A read-only transaction that sleeps so far goes to its worker with the first request that is not for this
place: a text that is slow or unknown, a stream, a write (which the engine refuses), a unit of work; an error; the pool's
end. Then the lease itself is what the worker serves, begun already. It does not come back.

Order. What was handed over first is executed first. So nothing runs here before the worker has done with all that lies in
the mailbox, which two counters say: the loop's thread counts what it puts there, the worker what it has done. A request that
waits for the loop's next turn goes to the mailbox before whatever comes behind it.

Failure. A read that fails here is run again on the worker, whose error is the caller's. But some errors (a disk that cannot
be read, no memory) roll the transaction back, and then the second run would succeed outside of any. So where the transaction
is gone, the worker is given the error itself in the place of the statement, and dooms the lease as it would have done.

Threads. Methods run on the loop's thread but for what stands under "Worker thread", and `abort`. What runs here holds the
worker's lock (see "Lending" in `database.driver.worker`); behind it, `ended` and `doom` are looked at once more, for another
thread may be closing the pool. `worker.held` is this lease from before BEGIN until its end, so that a worker which is woken,
by whomever, finds it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import Any

from database.driver.held_lease import HeldLease
from database.driver.inline import Inline
from database.driver.lease import Holder, Lease
from database.driver.request import COMMIT, STATEMENT, Request, taken_from
from database.driver.roles import Owner
from database.driver.worker import Worker
from database.engine.adapting import AS_IS
from database.engine.contract import Connection, Operation
from database.engine.statement import READ, Statement

__all__ = ["InlineLease"]


class InlineLease(HeldLease):
    """A lease whose reads may run on the loop's thread."""

    __slots__ = (
        "_failure",
        "_granted",
        "_inline",
        "_of_lane",
        "_sent",
        "_served",
        "_taken",
        "_waiting",
    )

    def __init__(
        self, pool: Owner[Lease], holder: Holder, inline: Inline, *, number: int | None, readonly: bool
    ) -> None:
        super().__init__(pool, holder, number=number, readonly=readonly)
        self._inline = inline
        self._waiting: Request | None = None
        """What waits for the loop's next turn."""
        self._sent = 0
        """Requests that were put into the mailbox."""
        self._served = self._taken = 0
        """Those that the worker has done with, and those that it has taken. Worker thread."""
        self._granted: Worker | None = None
        """The reader on which it is to begin in the loop's next turn."""
        self._of_lane = False
        """Whether the sleeping worker is to go back to its lane."""
        self._failure: BaseException | None = None
        """What went wrong with its end."""

    def submit(self, request: Request) -> None:
        """Runs the request here, now or in the loop's next turn, or hands it over."""
        request.home = self
        if self._waiting is not None:
            self.hand_on()
        elif not self.readonly and getattr(request.subject, "kind", None) != READ:
            self._sent += 1
            super().submit(request)
            return
        elif self._runs(request):
            return
        self._send(request)

    def read(self, operation: Operation, statement: Statement, params: Any) -> Awaitable[Any] | None:
        """See `Lease`. Without even a request, unless the read fails: then that is the worker's to do again, and to report."""
        inline = self._inline
        if (
            self.ended
            or self._sent != self._served
            or self._waiting is not None
            or not inline.quick.knows(statement.sql)
        ):
            return None
        if (inline.queue and inline.others_first) or inline.spent:
            return None
        worker = self.worker
        if worker is None:
            if not (self.readonly and self.queued_at == 0.0 and self._may_begin()):
                return None
            worker = self._begins_here()
            if worker is None:
                return None
        lent = worker.lent
        assert lent is not None
        if not worker.resting or not inline.quiet(worker.observer) or not lent.acquire(blocking=False):
            return None
        try:
            connection = self._usable(worker)
            if connection is None or not connection.plain:
                return None
            done, failure = inline.run(worker, operation, connection, statement, params)
            if failure is None:
                return done
            request = self.pool.request(STATEMENT, operation, statement, params, AS_IS)
            if not connection.in_transaction:
                request.operation = partial(_fail, failure)
        finally:
            lent.release()
        request.home = self
        self._send(request)
        return request

    def commits_at_once(self) -> bool:
        """See `Lease`."""
        worker = self.worker
        if worker is None or worker.held is not self or self._waiting is not None or self._sent != self._served:
            return False
        return not self.ended and self._end_here(worker, COMMIT)

    def _send(self, request: Request) -> None:
        self._sent += 1
        super().submit(request)
        granted = self._granted
        if granted is not None:
            self._granted = None
            super().given(granted)
        self._hand_over()

    def given(self, worker: Worker) -> None:
        """See `Claimant`. A read-only transaction begins here in the loop's next turn, if possible: no worker is woken.

        Another's BEGIN wakes the worker, and takes the first statement along.
        """
        if self.readonly and self._sent == 1 and worker.resting and worker.connection is not None and self._may_begin():
            request = self.mailbox.get_nowait()
            if self._inline.is_quick(request) and request.controls is None and not self._inline.full:
                self._sent = 0
                self.pending.clear()
                self._granted = worker
                self._waiting = request
                self._inline.wait(request)
                return
            self.mailbox.put(request)
        super().given(worker)

    def _runs(self, request: Request, *, in_turn: bool = False) -> bool:
        """Runs it here, or has it wait for its turn, unless that has come; False: it is the worker's."""
        if self.ended or request.controls is not None or self._sent != self._served:
            return False
        worker = self.worker
        if request.kind >= COMMIT:
            if worker is None or worker.held is not self or not self._end_here(worker, request.kind):
                return False
            request.answered = True
            request.context = None
            return True
        quick = self._inline.is_quick(request)
        if not quick:
            if quick is False:
                self._inline.clock(request)
            return False
        if worker is None:
            if not (self.readonly and (self.queued_at == 0.0 or self._granted is not None) and self._may_begin()):
                return False
        elif not worker.resting:
            return False
        if not in_turn and (self._inline.others_first or self._inline.spent):
            if self._inline.full:
                return False
            self._waiting = request
            self._inline.wait(request)
            return True
        worker = worker or self._begins_here()
        return worker is not None and self._run_here(worker, request)

    def _may_begin(self) -> bool:
        pool = self.pool
        observer = pool.observer
        return pool.opened and not pool.closing and self._inline.quiet(observer) and not pool.writer.hears_of(0.0)

    def _begins_here(self) -> Worker | None:
        """Begins the transaction on a reader that sleeps, if there is one."""
        granted = self._granted
        pool = self.pool
        now = perf_counter()
        if granted is None:
            found = self._inline.borrow()
            if found is None:
                return None
            worker, self._of_lane = found
            pool.transactions.add(self)  # first, so that whoever closes the pool sees it
            self.queued_at = now
        else:
            worker = granted
        begun = False
        lent = worker.lent
        assert lent is not None
        if lent.acquire(blocking=False):
            try:
                connection = worker.connection
                if worker.resting and connection is not None and not pool.closing and self.doom is None:
                    worker.held = self
                    begun = self._begun = self._opens(connection)
                    if not begun:
                        worker.held = None
            finally:
                lent.release()
        if not begun:
            if granted is None:
                pool.transactions.discard(self)
                self.queued_at = 0.0
                self._inline.give_back(worker, of_lane=self._of_lane)
            return None
        self._granted = None
        self.granted_at = now
        self.worker = worker
        worker.acquired += 1
        worker.waited += now - self.queued_at
        pool.watch_reading()
        return worker

    @staticmethod
    def _opens(connection: Connection) -> bool:
        try:
            connection.begin(readonly=True)
        except Exception:  # somebody's lock: the worker knows how to wait
            return False
        return True

    def _run_here(self, worker: Worker, request: Request) -> bool:
        inline = self._inline
        lent = worker.lent
        assert lent is not None
        if not inline.quiet(worker.observer) or not lent.acquire(blocking=False):
            return False
        try:
            connection = self._usable(worker)
            if connection is None:
                return False
            error = inline.execute(worker, request)
            if error is None:
                return True
            if not connection.in_transaction:
                request.operation = partial(_fail, error)
            return False
        finally:
            lent.release()

    def _usable(self, worker: Worker) -> Connection | None:
        """The connection, if it may be used here now. The caller holds the lock."""
        if not worker.resting or self.ended or self.doom is not None or self.carried:
            return None
        return worker.connection

    def _end_here(self, worker: Worker, kind: int) -> bool:
        """COMMIT or ROLLBACK of what was begun here; the worker has not been woken."""
        lent = worker.lent
        assert lent is not None
        if self._failure is not None:
            return False
        if worker.hears_of(perf_counter() - self.granted_at) or not lent.acquire(blocking=False):
            return False
        try:
            connection = worker.connection
            if worker.held is not self or self.doom is not None or connection is None:
                return False
            try:
                if kind == COMMIT:
                    connection.commit()
                    worker.commits += 1
                    self.committed = True
                else:
                    connection.rollback()
                    worker.rollbacks += 1
            except Exception as error:
                self._failure = error
                return False
            self.ended = True
            worker.held = None
        finally:
            lent.release()
        self.pool.transactions.discard(self)
        self._inline.give_back(worker, of_lane=self._of_lane)
        return True

    # While a request waits for the loop's next turn

    def resume(self, request: Request) -> bool:
        """See `Waiting`."""
        self._waiting = None
        if self._runs(request, in_turn=True):
            return request.answered
        self._send(request)
        return False

    def hand_on(self) -> None:
        """See `Waiting`."""
        request, self._waiting = self._waiting, None
        if request is not None and taken_from(self._inline.queue, request):
            self._send(request)

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        if request is not self._waiting:
            return super().withdraw(request)
        self._waiting = None
        request.cancelled = True
        taken = taken_from(self._inline.queue, request)
        granted, self._granted = self._granted, None
        if granted is not None:  # as if it had never been asked for
            self.queued_at = 0.0
            self.pool.transactions.discard(self)
            self.pool.free(granted)
        return taken

    def over(self) -> bool:
        """See `Lease`."""
        self.hand_on()  # somebody may still wait for it
        return super().over()

    def let_go(self, report: Callable[[], None]) -> None:
        """See `Lease`."""
        if not self.pool.closed:
            self.hand_on()
        super().let_go(report)

    # Worker thread

    def _rests(self, worker: Worker) -> None:
        self._served = self._taken
        worker.resting = True

    def _wakes(self, worker: Worker) -> None:
        super()._wakes(worker)
        self._taken += 1

    def _end(self, worker: Worker, connection: Connection | None, request: Request) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            request.error = worker.translate(failure, request)
            worker.rollback()
            self.ended = True
        else:
            super()._end(worker, connection, request)


def _fail(error: BaseException, *_: Any) -> Any:
    """The operation of a request that has failed already."""
    raise error
