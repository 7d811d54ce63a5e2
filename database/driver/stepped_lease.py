"""Transactions whose statements are sent and received by the event loop's own thread, where the backend can do it in steps.

A statement to a server is mostly waiting, and a loop waits for many sockets at once. A worker's thread waits for one: each
statement of a transaction then wakes that thread, the server wakes it again, it wakes the loop, and all of them stand in line
for the GIL. So here the worker goes on sleeping. Its connection is booked as anybody's is, the loop's thread sends BEGIN with
the first statement, and goes on with it when the socket has something to be read; so with every other statement, and COMMIT.

What hands over. Whatever may take the thread's time, or calls code of the user's: `Stepping.steps` says None, or a step says
that the next one is BLOCKING; a rollback; an error; a cancellation; a second statement while one is under way; a statement
or a transaction that is to be reported, because it was slow; the pool's end. Then the worker is woken, goes on with the
statement where it stands, and attends to the lease to its end. So all that is difficult is done in one place, on one thread.

The socket is watched from the first answer that is waited for until its worker is woken (`Worker.give`), for as many
transactions as come: to begin and to end that costs more than a glance. So it is never closed while it is watched.

Order. What the loop's thread has begun comes before what lies in the mailbox, into which nothing is put before the worker has
been told.

Threads. Methods run on the loop's thread but for what stands under "Worker thread", and `abort`. Whoever touches the
connection, or what is under way, holds the worker's lock; the loop's thread only where the worker is `resting` (see "Lending"
in `database.driver.worker`). `worker.held` is this lease from before BEGIN until its end, so that a worker which is woken, by
whomever, finds it.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any, cast

from database.driver.held_lease import HeldLease
from database.driver.lease import Holder, Lease
from database.driver.observer import LOGGED
from database.driver.request import COMMIT, STATEMENT, Request
from database.driver.roles import Owner
from database.driver.worker import Worker
from database.engine.contract import BLOCKING, READABLE, Connection, Stepping, Steps

__all__ = ["SteppedLease"]

AT_ONCE = frozenset({"savepoint", "release", "undo", "restrict"})
"""Controls that only say what is to be sent with the next statement."""

_DONE, _WAITS, _HANDS_OVER = 0, 1, 2


class SteppedLease(HeldLease):
    """A lease whose statements run in steps on the loop's thread, as long as nothing is difficult."""

    __slots__ = ("_since", "_steps", "_threshold", "_under_way", "_wanted")

    def __init__(self, pool: Owner[Lease], holder: Holder, *, number: int | None, readonly: bool) -> None:
        super().__init__(pool, holder, number=number, readonly=readonly)
        self._under_way: Request | None = None
        """What has been sent, or is about to be, and is not answered."""
        self._steps: Steps | None = None
        """What is left of that."""
        self._wanted = 0
        """What the last step was to be followed by, where it is the worker who goes on."""
        self._since = 0.0
        """When that was begun."""
        self._threshold: float | None = None
        """Seconds from which a statement is reported."""

    def submit(self, request: Request) -> None:
        """Runs the request here, or hands it over."""
        if not self._begun:
            super().submit(request)  # which may be its turn already
        elif self._woken or not self._starts(request):
            super().submit(request)
            self._hand_over()

    def given(self, worker: Worker) -> None:
        """See `Claimant`. The transaction begins here, and the worker goes on sleeping, if nothing is in the way."""
        if not self._begins(worker):
            super().given(worker)

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return request is not self._under_way and super().withdraw(request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        super().stop(request)
        if request is self._under_way:
            self._hand_over()

    def _begins(self, worker: Worker) -> bool:
        pool = self.pool
        lent = worker.lent
        if lent is None or not worker.resting or self.mailbox.qsize() != 1:
            return False
        try:
            threshold = pool.observer.threshold()
        except BaseException:  # which the worker reports
            return False
        if (threshold is not None and threshold < LOGGED) or not lent.acquire(blocking=False):
            return False
        outcome = _WAITS
        request = self.mailbox.get_nowait()
        try:
            connection = cast("Stepping | None", worker.connection)
            if connection is None or not worker.resting or self.doom is not None or request.cancelled:
                return False
            steps = self._steps_of(connection, request)
            if steps is None or not connection.begin_unless(readonly=self.readonly):
                return False
            self._begun = True
            self._threshold = threshold
            self.worker = worker
            self.granted_at = perf_counter()
            self.pending.clear()
            worker.held = self
            worker.acquired += 1
            worker.waited += self.granted_at - self.queued_at
            outcome = self._first_step(worker, connection, request, steps)
        finally:
            if not self._begun:
                self.mailbox.put(request)
            lent.release()
        self._see_to(outcome, request, waited_for=True)
        return True

    def _starts(self, request: Request) -> bool:
        worker = self.worker
        assert worker is not None
        lent = worker.lent
        assert lent is not None
        if self._under_way is not None or self.ended or not lent.acquire(blocking=False):
            return False
        request.home = self
        try:
            connection = cast("Stepping", worker.connection)
            if not worker.resting or self.doom is not None:
                return False
            steps = self._steps_of(connection, request)
            if steps is None:
                return False
            if request.kind == COMMIT:
                self.pool.transactions.discard(self)  # see `Lease.submit`; on whichever thread it ends
            outcome = self._first_step(worker, connection, request, steps)
        finally:
            lent.release()
        self._see_to(outcome, request, waited_for=False)
        return True

    def _steps_of(self, connection: Stepping, request: Request) -> Steps | None:
        controls = request.controls
        if controls is not None and not all(method in AT_ONCE for method, _ in controls):
            return None
        if request.kind == STATEMENT:
            return connection.steps(request.operation, request.subject, request.params, request.extra)
        if request.kind == COMMIT:
            return connection.committing()
        return None

    # Steps. The caller holds the lock, and the worker rests

    def _first_step(self, worker: Worker, connection: Stepping, request: Request, steps: Steps) -> int:
        for method, argument in request.controls or ():
            getattr(connection, method)(argument)
        if request.kind == STATEMENT:
            worker.statements += 1
        self._under_way = request
        self._steps = steps
        self._since = perf_counter()
        return self._step(worker, request, steps)

    def _step(self, worker: Worker, request: Request, steps: Steps) -> int:
        try:
            wanted: int = request.context.run(steps.send, None)
        except StopIteration as stop:
            return self._done(worker, request, stop.value)
        except BaseException as error:
            self._steps = _raising(error)
            self._wanted = BLOCKING
            return _HANDS_OVER
        if wanted == READABLE:
            if worker.watched is None:
                descriptor = cast("Stepping", worker.connection).descriptor
                worker.watched = self.pool.waker.watch(descriptor, partial(_look, worker))
            if worker.watched is not None:
                return _WAITS
        self._wanted = wanted
        return _HANDS_OVER

    def _done(self, worker: Worker, request: Request, result: Any) -> int:
        now = perf_counter()
        threshold = self._threshold
        if request.kind == COMMIT:
            heard = worker.hears_of(now - self.granted_at)
        else:
            heard = threshold is not None and now - self._since >= threshold
        if heard:
            self._steps = _given(result)  # handlers may block: the worker tells them, and then answers
            self._wanted = BLOCKING
            return _HANDS_OVER
        if request.kind == COMMIT:
            worker.commits += 1
            self.committed = True
            self.ended = True
            worker.held = None
        else:
            request.result = result
        self._under_way = self._steps = None
        return _DONE

    def go_on(self, worker: Worker) -> bool:
        """The socket has something to be read: whether that was waited for here."""
        lent = worker.lent
        assert lent is not None
        request, steps = self._under_way, self._steps
        if request is None or steps is None or self.ended or not lent.acquire(blocking=False):
            return False
        try:
            if not worker.resting or self._woken:
                return False
            outcome = self._step(worker, request, steps)
        finally:
            lent.release()
        self._see_to(outcome, request, waited_for=True)
        return True

    # Behind that, without the lock

    def _see_to(self, outcome: int, request: Request, *, waited_for: bool) -> None:
        if outcome == _HANDS_OVER:
            self._hand_over()
        elif outcome == _DONE:
            if self.ended:
                worker = self.worker
                assert worker is not None
                self.pool.free(worker)
            if waited_for:
                self.pool.waker.answer(request)
            else:  # its task has not come to wait for it yet
                request.answered = True
                request.context = None

    # Worker thread

    def _resume(self, worker: Worker, connection: Connection | None) -> Request | None:
        """See `Lease`."""
        request, steps = self._under_way, self._steps
        if request is None or steps is None:
            return None
        worker.current = request  # first: from now on it is the worker's to be stopped
        self._under_way = self._steps = None
        walk = partial(cast("Stepping", connection).walk, steps, self._wanted or READABLE)
        if request.kind == COMMIT:
            try:
                walk()
                worker.commits += 1
                self.committed = True
            except BaseException as error:
                request.error = worker.translate(error, request)
                worker.rollback()
            self.ended = True
            return request
        if self.doom is not None:
            request.cancelled = True
        worker.go_on(request, walk, self._since)
        if connection is not None and (request.error is not None or request.cancelled):
            self._check(worker, connection, request)
        return request


def _look(worker: Worker) -> None:
    """The socket of that worker's connection has something to be read."""
    lease = worker.held
    if not isinstance(lease, SteppedLease) or not lease.go_on(worker):
        worker.look_away()  # it is the worker's; or the server has said something unasked, which whoever comes next finds


def _raising(error: BaseException) -> Steps:
    """What is left where a step has raised."""
    raise error
    yield


def _given(result: Any) -> Steps:
    """What is left where all is done."""
    return result
    yield
