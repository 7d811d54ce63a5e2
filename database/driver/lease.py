"""A lease: one worker's undivided attention, from BEGIN to COMMIT or for the length of a stream.

An interactive transaction leases its connection. Its statements go to the lease's mailbox, and the worker attends to
nothing else until the request that ends the lease. BEGIN travels with the first statement: whoever has begun nothing
holds nothing. When the worker is done it goes straight on to whatever is next in its lane, with no trip to the event
loop in between.

Threads. The loop's thread puts requests into the mailbox and reads the worker's fields for messages; everything
below "Worker thread" runs there. The worker owns the rollback: whatever happens to the tasks, a lease ends with a clean
connection, or a discarded one.

Failure. When the database rolls a transaction back by itself (an interrupted write, a full disk, ON CONFLICT ROLLBACK),
the next statement would silently autocommit. So after every error the worker asks the connection whether the
transaction is still there; if not, the lease is doomed: it ends, and every further statement is refused with the
reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final, Protocol

from database.driver.request import COMMIT, LEASE, MANY, ROLLBACK, UNIT, Control, Home, Request
from database.driver.roles import Owner
from database.driver.worker import Worker
from database.engine.contract import Connection, Interrupted, Operation
from database.engine.statement import Statement
from database.errors import PoolClosedError, TransactionError

__all__ = ["Holder", "Lease"]

INTERRUPTED = "a statement of this transaction was interrupted, so the whole of it has been rolled back"


class Holder(Protocol):
    """Who holds a lease, for messages; and whether it is a certain task."""

    def __call__(self) -> str:
        """What was begun where, by whom."""
        ...

    def is_of(self, task: object | None) -> bool:
        """Whether that task asked for the connection. Any thread."""
        ...


class Lease:
    """What a transaction or a stream holds of the pool."""

    kind: Final = LEASE

    __slots__ = (
        "cancelled",
        "carried",
        "committed",
        "doom",
        "dropped",
        "ended",
        "firm",
        "granted_at",
        "holder",
        "home",
        "mailbox",
        "number",
        "pending",
        "pool",
        "queued_at",
        "readonly",
        "reported",
        "transaction",
        "unsent",
        "worker",
    )

    def __init__(
        self,
        pool: Owner[Lease],
        holder: Holder,
        *,
        number: int | None,
        readonly: bool,
        transaction: bool = True,
    ) -> None:
        self.pool = pool
        self.number = number
        """The transaction's number in logs, if it is one."""
        self.holder = holder
        """Describes who holds this, for messages."""
        self.readonly = readonly
        self.transaction = transaction
        """False for a stream outside any transaction: its one statement is its own snapshot."""
        self.mailbox: SimpleQueue[Request] = SimpleQueue()
        self.home: Home | None = None
        self.queued_at = 0.0
        self.pending: set[Request] = set()
        """Requests handed over before the lease was granted. Loop thread."""
        self.dropped = False
        """Given up before it was granted; nothing has been begun. Set by `drop`."""
        self.unsent: list[Control] = []
        """Controls of the requests that went with it: they are still to be sent, before anything else."""
        self.cancelled = False
        self.reported = False
        """Whether it was reported already that this keeps others waiting. Loop thread."""

        self.worker: Worker | None = None
        self.carried: list[Control] = []
        """Controls of requests that were called off before the transaction began. Worker thread."""
        self.granted_at = 0.0
        self.doom: BaseException | str | None = None
        self.ended = False
        self.committed = False
        """Set behind a commit that has succeeded, before `ended`: nothing else says that something is permanent."""
        self.firm = False
        """Its commit is not withdrawn by a cancellation, for it follows one on another database."""

    # Loop thread

    def submit(self, request: Request) -> None:
        """Hands a request over; the first one also queues for a connection."""
        request.home = self
        if self.worker is None:
            self.pending.add(request)
        elif self.pending:
            self.pending.clear()  # granted; and each of these refers to this lease
        transactions = self.pool.transactions
        if request.kind >= COMMIT:
            transactions.discard(self)  # it is about to end; whoever closes the pool need not see to it
        self.mailbox.put(request)
        if self.ended:  # looked at after the put: the worker looks at the mailbox after it has set `ended`
            self.pool.waker.wake(self._answer_the_rest())
        elif self.queued_at == 0.0:
            self.queued_at = perf_counter()
            transactions.add(self)
            self.pool.claim(self)

    def read(self, _operation: Operation, _statement: Statement, _params: Any) -> Awaitable[Any] | None:
        """Runs a read of plain values at once, if that is possible."""
        return None

    def commits_at_once(self) -> bool:
        """Commits at once, if that is possible; False: ask for it as for everything else."""
        return False

    def given(self, worker: Worker) -> None:
        """See `Claimant`."""
        worker.give(self)

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        worker = self.worker
        if worker is None:
            request.cancelled = True
            self.pending.discard(request)
            if not self.pending and self.pool.withdraw(self):
                self.drop()
            return True
        if request.answered or (self.firm and request.kind == COMMIT):
            return False
        return worker.call_off(request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        if self.worker is not None:
            self.worker.interrupt(request)

    def first(self) -> Request | None:
        """One of those that wait for its connection."""
        return next(iter(self.pending), None)

    def drop(self) -> list[Request]:
        """It has been taken out of its line: nothing of it has been begun, and nothing will be. Gives what it was asked.

        What was asked first carries what all of them rest on (the opening of a nested level), whoever gives up first.
        """
        self.dropped = True
        requests: list[Request] = []
        while not self.mailbox.empty():
            request = self.mailbox.get_nowait()
            self.unsent.extend(request.controls or ())
            requests.append(request)
        return requests

    def over(self) -> bool:
        """Whether there is nothing to end any more: it is over, or can be taken out of its line, where it has begun nothing."""
        if self.ended:
            self.pool.transactions.discard(self)  # by its worker, and whoever closes the pool need not see to it
            return True
        if self.dropped or self.queued_at == 0.0:
            return True
        return self.worker is None and not self.pending and self.pool.withdraw(self)

    def let_go(self, report: Callable[[], None]) -> None:
        """Ends a lease whose holder is garbage: rolled back if there is anything, without waiting for that."""
        if self.ended or self.dropped or self.queued_at == 0.0 or self.pool.closed:
            self.pool.transactions.discard(self)
            return
        report()
        if not self.over():
            self.submit(self.pool.request(ROLLBACK, None, label="ROLLBACK"))

    def abort(self, reason: str) -> None:
        """Ends the lease from outside: its running statement is stopped, and what comes is refused. Any thread."""
        self.doom = PoolClosedError(reason)
        self.mailbox.put(self.pool.request(ROLLBACK, None))
        if self.worker is not None:
            self.worker.interrupt_current(self)

    async def give_back(self, label: str) -> None:
        """Ends this, rolling back what is open, and waits until its connection is free. Any thread."""
        waker = self.pool.waker
        if waker.is_current():
            if not self.over():
                request = self.pool.request(ROLLBACK, None, label=label)
                self.submit(request)
                await request
        elif waker.running:  # on another thread: that loop sees to it
            waker.post([], partial(self.let_go, _silently))
        else:  # a coroutine is thrown away, and cannot wait for anything
            self.let_go(_silently)

    # Worker thread

    def serve(self, worker: Worker) -> None:
        """Attends to this lease alone until it ends."""
        self.worker = worker
        self.granted_at = perf_counter()
        worker.acquired += 1
        worker.waited += self.granted_at - self.queued_at
        worker.attend()
        self._attend(worker, None if self.transaction else worker.connection)

    def _attend(self, worker: Worker, connection: Connection | None) -> None:
        """Runs what the mailbox brings; a transaction begins with the first request, unless there is a connection."""
        mailbox = self.mailbox
        get, empty = mailbox.get, mailbox.empty
        lends = worker.lent is not None
        request: Request | None = None
        try:
            request = self._resume(worker, connection)
            if request is not None:
                worker.answers.append(request)
                worker.left()
            while not self.ended:
                if lends:
                    self._rests(worker)  # before it answers: who is woken finds the connection free
                if worker.answers and empty():
                    worker.flush()
                request = get()
                if lends:
                    self._wakes(worker)
                if request.kind >= COMMIT:
                    self._end(worker, connection, request)
                elif self.doom is not None:
                    request.error = self.refusal()
                elif connection is None:
                    connection = self._begin(worker, request)
                    if connection is not None:
                        self._run(worker, connection, request)
                else:
                    self._run(worker, connection, request)
                worker.answers.append(request)
                worker.left()
        except BaseException as defect:
            self.doom = defect
            worker.fail(defect, [request])
            self.ended = True
        worker.answers.extend(self._answer_the_rest())
        if self.transaction and connection is not None and request is not None:
            seconds = perf_counter() - self.granted_at
            if worker.hears_of(seconds):
                outcome = "committed" if self.committed else "rolled back"
                worker.tell(request, worker.observer.transaction, self, outcome, seconds)
        if worker.role != "writer":  # the writer goes on with its lane
            worker.resting = lends  # it touches nothing on its way to the inbox: whoever comes next need not wake it
            worker.finish(lambda: self.pool.free(worker))

    def _resume(self, worker: Worker, connection: Connection | None) -> Request | None:
        """Goes on with what is under way already; gives it, answered."""
        return None

    def _rests(self, worker: Worker) -> None:
        """All that the worker has taken is done: the connection is lent until it takes the next request."""
        worker.resting = True

    def _wakes(self, worker: Worker) -> None:
        """It has taken one."""
        lent = worker.lent
        assert lent is not None
        with lent:  # waits for the loop's thread to be done
            worker.resting = False

    def _answer_the_rest(self) -> list[Request]:
        """Refuses what came too late, for nobody reads this mailbox any more; gives it, to be woken.

        Either thread, both at once too: `get_nowait` is atomic, and each sees to what it has found.
        """
        late: list[Request] = []
        while True:
            try:
                request = self.mailbox.get_nowait()
            except Empty:
                return late
            request.error = None if request.kind == ROLLBACK else self.refusal()
            late.append(request)

    def refusal(self) -> BaseException:
        """Why a statement cannot be run any more; a new error each time, for several tasks may raise it."""
        doom = self.doom
        if isinstance(doom, PoolClosedError):
            return PoolClosedError(*doom.args)
        if isinstance(doom, str):
            return TransactionError(doom)
        if isinstance(doom, BaseException):
            error = TransactionError(f"the transaction has been rolled back after an error: {doom}")
            error.__cause__ = doom
            return error
        return TransactionError("the transaction has ended")

    def fail(self, worker: Worker, error: BaseException) -> None:
        """The lease cannot be granted: answers all it was given with the error."""
        self.worker = worker
        self.doom = error
        self.ended = True
        late = self._answer_the_rest()
        if late and late[0].error is not None:
            late[0].error = error
        worker.answers.extend(late)

    def _begin(self, worker: Worker, request: Request) -> Connection | None:
        try:
            if request.cancelled:
                raise Interrupted
            if not self.transaction:
                return worker.connection or worker.ready()
            return worker.begin(request, readonly=self.readonly)
        except Interrupted as interrupted:  # nothing was begun: the next statement may try again
            request.error = interrupted if self.doom is None else self.refusal()
            self.carried.extend(request.controls or ())
        except BaseException as error:
            request.error = self.doom = worker.translate(error, request)
            self.ended = True
        return None

    def _run(self, worker: Worker, connection: Connection, request: Request) -> None:
        if (request.controls is not None or self.carried) and not self._control(worker, connection, request):
            return
        if request.cancelled:
            request.error = Interrupted()
            return
        if request.kind == UNIT or request.kind == MANY:
            worker.atomically(request)
        else:
            worker.execute(request)
        if request.error is not None or request.cancelled:
            self._check(worker, connection, request)

    def _control(self, worker: Worker, connection: Connection, request: Request) -> bool:
        controls = [*self.carried, *(request.controls or ())]
        self.carried.clear()
        try:
            for method, argument in controls:
                getattr(connection, method)(argument)
        except BaseException as error:
            request.error = self.doom = worker.translate(error, request)
            worker.rollback()
            self.ended = True
            return False
        return True

    def _check(self, worker: Worker, connection: Connection, request: Request) -> None:
        """After an error: is the transaction still there, and may it go on?"""
        if not self.transaction:
            if isinstance(self.doom, PoolClosedError):
                request.error = self.refusal()
            return
        if isinstance(self.doom, PoolClosedError):
            request.error = self.refusal()
        elif request.cancelled and not isinstance(request.error, Interrupted):
            self.doom = INTERRUPTED
        elif worker.connection is not connection or not connection.in_transaction:
            self.doom = request.error
        else:
            return
        # Now, so that the locks are free before the tasks have found out; and the connection, for whatever they do until
        # they end their transaction, it has nothing to do with that any more.
        worker.rollback()
        self.ended = True

    def _end(self, worker: Worker, connection: Connection | None, request: Request) -> None:
        if request.kind == ROLLBACK:
            worker.rollback()  # also without a transaction: it closes the cursors of streams
        elif request.cancelled:
            request.error = Interrupted()
            return
        elif self.doom is not None:
            request.error = self.refusal()
        elif connection is not None and self.transaction:
            if not worker.enter(request):
                request.error = Interrupted()
                return
            if (request.controls is not None or self.carried) and not self._control(worker, connection, request):
                self.ended = True
                return
            try:
                worker.commit(connection, asked=(request,))
                self.committed = True
            except BaseException as error:
                request.error = worker.translate(error, request)
                worker.rollback()
            else:
                self.committed = True
        self.ended = True


def _silently() -> None:
    """Nothing to report."""
