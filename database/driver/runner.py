"""One connection, and what is being run on it.

A runner executes requests, each in its caller's context, and keeps its result or its error in it; it collects those that it
has answered and posts them in batches, for the wake-up of the event loop is the expensive part. It opens and closes
transactions, waits for other people's locks, maps errors, and replaces a connection that can no longer be trusted. It knows
the backend, the observer and the waker, and no pool: where its work comes from is its subclass's business (`Worker`).

Threads. Everything here runs on the runner's own thread but for what stands under "Any thread", and `__init__`.

Stopping a statement. The loop's thread sets `request.cancelled` and calls `interrupt`. Two things then stop the
statement: the progress handler, which runs on this thread while a statement does, and the engine's own interrupt, for
what the handler does not see (one long step, or the gap between two). The engine's interrupt hits whatever runs at
that moment, so it may only be sent while it is certain *what* runs. Both threads do two things in opposite order, so that
one of them sees the other: the loop's thread sets `cancelled` (or `_stopping`) first and looks at `current` second; the
worker changes `current` first and looks at `cancelled` second. At the beginning it then does not run the request; at the
end it waits for `_guard`, which the loop's thread holds while it looks and interrupts, before it goes on to the next.
Commits are entered under the guard, for they may not be interrupted at all.

The caller's context. What is the user's own (functions, record classes, generators, adapters, handlers of log records)
is called in the copy of its caller's `contextvars` context that each request brings along.

What brings a runner down. An operation may raise what it likes: that is its request's outcome. Observers may not, and a
defect of the driver's own must not either; should it happen all the same, `fail` answers those whose requests had been
taken and gives the connection up. The thread itself lives on, and opens another.

Length. It is the longest room of the driver, for it is one subject: each way to run a request ends in `execute`, and each
error in `translate`. What is long is the list of things that can go wrong between BEGIN and COMMIT.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from time import perf_counter
from typing import Any, cast

from database.driver.observer import Observer
from database.driver.request import ALONE, COMMIT, MANY, STATEMENT, UNIT, Home, Request, text_of
from database.driver.room import Room
from database.driver.wakeup import Notice, Waker
from database.engine.adapting import AS_IS
from database.engine.contract import Alone, Backend, Connection, Interrupted, Role
from database.errors import (
    ConnectionFailedError,
    DatabaseError,
    PoolClosedError,
    QueryExecutionError,
    TransactionError,
)

__all__ = ["CLOSED", "Deadline", "Runner", "again"]

_logger = logging.getLogger("database.pool")

SLOW_TICKS = 8
"""Progress handler calls after which a statement counts as slow: about a millisecond of the CPU's time."""

CLOSED = "the pool was closed while this statement ran"
ENDED_BY_ITSELF = "the database has rolled the transaction back by itself; nothing of it is kept"

Deadline = Callable[["Runner", Sequence[Request], float, float], float]
"""`(runner, requests, began, now)`: until when a runner that has waited since `began` tries again, for those who have sent
these requests. Runner's thread.

Asked only where readers and the writer exclude one another; it raises where there is no use in waiting.
"""


class Runner:
    """Runs requests on one connection."""

    __slots__ = (
        "_deadline",
        "_guard",
        "_last",
        "_on_slow",
        "_opened",
        "_stopping",
        "acquired",
        "answers",
        "backend",
        "commits",
        "connection",
        "current",
        "grouped",
        "grouping",
        "locked",
        "name",
        "observer",
        "replaced",
        "retried",
        "role",
        "rollbacks",
        "room",
        "statements",
        "threshold",
        "ticks",
        "until",
        "waited",
        "waker",
    )

    def __init__(
        self,
        name: str,
        role: Role,
        backend: Backend,
        waker: Waker,
        observer: Observer,
        *,
        deadline: Deadline,
        room: Room | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.backend = backend
        self.waker = waker
        self.observer = observer
        self.room = room
        """Where it waits before it takes a snapshot."""
        self._deadline = None if backend.excludes is None else deadline
        self.connection: Connection | None = None
        self._last: Connection | None = None
        self.current: Request | None = None
        self.answers: list[Request] = []
        self.threshold: float | None = None
        self.statements = self.commits = self.rollbacks = self.replaced = self.grouped = self.acquired = 0
        self.waited = 0.0
        self.locked = self.retried = 0.0
        """Seconds of waiting for somebody else's lock, before a statement and during it; observers set them back."""
        self.grouping = False
        """Whether what runs is surrounded by a savepoint, not by a transaction of its own."""
        self._guard = Lock()
        self.until = 0.0
        """When what the loop's thread runs on the connection is to be stopped; 0 where nothing is."""
        self.ticks = 0
        """How often the progress handler has been called by the running statement."""
        self._on_slow: Callable[[], None] | None = None
        self._stopping = False
        self._opened = role == "writer"  # a reader opens at its first request, the writer at once

    # Any thread

    def interrupt(self, request: Request) -> None:
        """Stops the request if it is the one that runs. Its `cancelled` has been set."""
        with self._guard:
            connection = self.connection
            if self.current is request and connection is not None:
                connection.interrupt()

    def interrupt_current(self, home: Home) -> None:
        """Stops what runs, if it has come from there and is no commit."""
        with self._guard:
            current, connection = self.current, self.connection
            if current is not None and current.home is home and current.kind < COMMIT and connection is not None:
                current.cancelled = True
                if self.current is current:  # looked at once more, after `cancelled` has been set
                    connection.interrupt()

    def call_off(self, request: Request) -> bool:
        """Keeps the request from being run; False if it runs, or has run, already."""
        with self._guard:
            if request.kind < COMMIT:
                request.cancelled = True
            if self.current is request or request.result is not None or request.error is not None:
                return False
            request.cancelled = True
            return True

    def hurry(self) -> None:
        """Stops what runs, and what is to run, but for a commit that has begun."""
        self._stopping = True
        with self._guard:
            current = self.current
            if current is not None and current.kind < COMMIT and self.connection is not None:
                self.connection.interrupt()

    @property
    def hurried(self) -> bool:
        """Whether it is to come to its end at once."""
        return self._stopping

    # The runner's thread

    def attend(self, on_slow: Callable[[], None] | None = None, *, snapshot: bool = True) -> None:
        """Called when a lane or a lease begins to be served: settles what is looked up once a batch.

        Without `snapshot` there is one already.
        """
        self._on_slow = on_slow
        room = self.room
        if room is not None and room.held and snapshot:
            room.wait()
        try:
            self.threshold = self.observer.threshold()
        except BaseException as error:
            self.threshold = None
            _report(f"what hears of {self.name} has raised", error)

    def tell(self, request: Request | None, hears: Callable[..., None], *arguments: Any) -> None:
        """Has the observer hear of something, in the caller's context; whatever it raises ends here."""
        try:
            if request is None or request.context is None:
                hears(*arguments)
            else:
                request.context.run(hears, *arguments)
        except BaseException as error:
            _report(f"what hears of {self.name} has raised", error)

    def hears_of(self, seconds: float) -> bool:
        """See `Observer`; where even that raises, there is nothing to be told. Any thread."""
        try:
            return self.observer.hears_of(seconds)
        except BaseException as error:
            _report(f"what hears of {self.name} has raised", error)
            return False

    def fail(self, defect: BaseException, requests: Iterable[Request | None]) -> None:
        """Something has brought this worker down that is no statement's doing: answers those that it had taken.

        Whether they took effect nobody knows any more. The connection is given up, and with it what is not committed.
        """
        _report(f"{self.name} has been brought down", defect)
        self.left()
        self.grouping = False
        self.discard()
        for request in requests:
            if request is None or request.answered or request in self.answers:
                continue
            request.result = None
            request.error = QueryExecutionError(
                f"the database's thread was brought down by {type(defect).__name__}; whether this was executed is not known",
                sql=text_of(request),
                parameters=request.params,
            )
            request.error.__cause__ = defect
            self.answers.append(request)

    def flush(self) -> None:
        """Posts the answers collected so far."""
        answers = self.answers
        if answers:
            self.answers = []
            self.waker.post(answers)

    def finish(self, notice: Notice) -> None:
        """Posts the answers together with a notice to the pool."""
        answers, self.answers = self.answers, []
        self.waker.post(answers, notice)

    def _open(self) -> BaseException | None:
        try:
            connection = self.connection = self._last = self.backend.connect(self.role, self._progress)
            if self._deadline is not None:
                connection.patiently = lambda step: self.patiently(self.current, step)
        except BaseException as error:
            if not isinstance(error, DatabaseError):
                failed = ConnectionFailedError(self.backend.description, f"{type(error).__name__}: {error}")
                failed.__cause__ = error
                error = failed
            self.tell(None, self.observer.failure, error)
            return error
        return None

    def _close(self) -> None:
        with self._guard:
            connection, self.connection = self.connection, None
        if connection is not None:
            try:
                connection.close()
            except BaseException as error:
                self.tell(None, self.observer.failure, error)

    def ready(self) -> Connection:
        """The connection; opened anew if the last one had to be given up.

        Raises:
            DatabaseError: It cannot be opened.
        """
        connection = self.connection
        if connection is None:
            error = self._open()
            if error is not None:
                raise error
            connection = self.connection
            assert connection is not None
            self.replaced += self._opened
            self._opened = True
        return connection

    def discard(self) -> None:
        """Gives the connection up: the next request opens another."""
        self._close()

    def retreat(self) -> None:
        """Closes the connection before a fork; the next request opens another, which does not count as replaced."""
        self._close()
        self._opened = False

    def _progress(self) -> bool:
        """The connection's progress handler: true stops the statement."""
        request = self.current
        if request is None:
            if self.until:  # on the loop's thread
                return perf_counter() > self.until
            return self._stopping and self.connection is None  # while a connection is opened, not while it commits
        if request.kind >= COMMIT:
            return False
        if request.cancelled or self._stopping:
            return True
        self.ticks += 1
        if self.ticks == 1:
            self.flush()  # what is answered already need not wait for this one
        elif self.ticks == SLOW_TICKS and self._on_slow is not None:
            self._on_slow()
        return False

    def enter(self, request: Request) -> bool:
        """Marks a commit as begun, from when on nothing stops it; False if it was called off before that."""
        with self._guard:
            if request.cancelled:
                return False
            self.current = request
            return True

    def turn_to(self, request: Request) -> None:
        """Of several requests that were sent together, this one is waited for now."""
        self.ticks = 0
        self.current = request

    def left(self) -> None:
        """Nothing is current any more, and whoever was about to interrupt has done so."""
        with self._guard:
            self.current = None

    def execute(self, request: Request) -> None:
        """Runs the request and keeps its result or its error in it."""
        self.ticks = 0
        self.statements += 1
        threshold = self.threshold
        started = 0.0 if threshold is None else perf_counter()
        self.current = request
        if request.cancelled:  # called off a moment ago
            self.left()
            request.error = Interrupted()
            return
        try:
            connection = self.connection or self.ready()
            extra = request.extra
            if extra is AS_IS and connection.plain:  # most statements: it is a step into C and out of it that is saved
                request.result = request.operation(connection, request.subject, request.params, extra)  # type: ignore[misc]
            else:
                request.result = request.context.run(
                    request.operation, connection, request.subject, request.params, extra
                )
            self.current = None
            if request.cancelled or self._stopping:
                self.left()
        except BaseException as error:
            # The same once more, and not `finally`: most statements succeed, and pay for every line.
            self.left()
            self._failed(request, error, started)
        if threshold is not None:
            self._has_taken(request, started, request)

    def go_on(self, request: Request, operation: Callable[[], Any], started: float) -> None:
        """Runs what is left of a request that was begun on another thread, and has been counted there."""
        self.ticks = 0
        self.current = request
        try:
            assert request.context is not None
            request.result = request.context.run(operation)
            self.current = None
            if request.cancelled or self._stopping:
                self.left()
        except BaseException as error:
            self.left()
            self._failed(request, error, started)
        if self.threshold is not None:
            self._has_taken(request, started, request)

    def _has_taken(self, request: Request, started: float, whose: Request | None) -> None:
        """Tells, in the context of that one, of a statement that took long enough. There is a threshold."""
        seconds = perf_counter() - started
        if seconds >= cast("float", self.threshold):
            self.tell(whose, self.observer.statement, request, seconds, self.name)

    def run_inline(self, request: Request) -> Any:
        """Runs a request from within another one: a statement of a function that was sent to this thread."""
        current = self.current
        if current is not None and current.cancelled:
            raise self.called_off()
        self.statements += 1
        threshold = self.threshold
        started = 0.0 if threshold is None else perf_counter()
        try:
            result = request.result = request.operation(self.connection, request.subject, request.params, request.extra)  # type: ignore[misc]
        except BaseException as error:
            request.error = self.told(error, request)
            result = None
        if threshold is not None:
            self._has_taken(request, started, None)  # within the caller's context
        if request.error is not None:
            raise request.error
        return result

    def told(self, error: BaseException, request: Request) -> BaseException:
        """What a function that runs here is told of its statement's error."""
        return self.called_off() if isinstance(error, Interrupted) else self.translate(error, request)

    @staticmethod
    def called_off() -> BaseException:
        """What a function is told whose caller has gone."""
        return TransactionError("the caller of this function was cancelled; what it did is rolled back")

    def step(self, connection: Any, method: str, argument: Any) -> None:
        """Runs one of the connection's own methods, with its errors mapped."""
        try:
            getattr(connection, method)(argument)
        except BaseException as error:
            raise self.translate(error, None) from error

    def end_part(self, connection: Connection, *, keep: bool) -> None:
        """Commits the open transaction of a function that runs here, or rolls it back.

        Raises:
            Alone: A member of a group wants to commit, which in a group nobody can do before all do.
        """
        if self.grouping and keep:
            raise Alone
        try:
            if keep:
                self.commit(connection, asked=() if self.current is None else (self.current,))
            else:
                connection.rollback()
                self.rollbacks += 1
        except BaseException as error:
            raise self.translate(error, None) from error

    def begin_again(self, connection: Connection, *, readonly: bool) -> None:
        """Opens the next one."""
        try:
            self.begin(self.current, readonly=readonly)
        except BaseException as error:
            raise self.translate(error, None) from error

    def _failed(self, request: Request, error: BaseException, started: float) -> None:
        if isinstance(error, Interrupted):  # the operation has looked by itself, in the middle of its work
            error = QueryExecutionError("interrupted: its caller no longer waits", sql=text_of(request))
        # Only a single statement may be run again: it is atomic, so the failed try has left nothing behind.
        again = request.kind == STATEMENT or request.kind == ALONE
        if again and self.backend.is_busy(error) and not request.cancelled:
            connection = self.connection
            assert connection is not None
            before = self.locked
            if started:  # somebody observes: the first try was waiting, too
                self.locked += perf_counter() - started
            try:
                assert request.context is not None
                request.result = self.patiently(
                    request,
                    request.context.run,
                    request.operation,
                    connection,
                    request.subject,
                    request.params,
                    request.extra,
                )
            except BaseException as still:
                error = still
            else:
                return
            finally:
                self.retried = self.locked - before
                self.locked = before
        request.error = self.translate(error, request)

    def translate(self, error: BaseException, request: Request | None) -> BaseException:
        """The package's error for the driver's; gives up a connection that can no longer be trusted."""
        if isinstance(error, Interrupted):
            return error
        connection = self._last  # also if it has been given up meanwhile: it knows its errors
        translated = error
        if self._stopping:
            translated = error if isinstance(error, PoolClosedError) else PoolClosedError(CLOSED)
        elif connection is not None:
            try:
                if request is None:
                    translated = connection.translate(error, None, None)
                else:
                    translated = connection.translate(error, request.subject, request.params)
            except BaseException as defect:  # somebody's error that cannot even be shown
                _report(f"{self.name} cannot translate an error of {type(error)}", defect)
            if self.connection is not None and self.backend.is_broken(error):
                self.discard()
        if translated is not error and translated.__cause__ is None:
            translated.__cause__ = error
        if request is None or not request.cancelled:
            self.tell(request, self.observer.failure, translated)
        return translated

    def patiently(self, request: Request | None, step: Any, *arguments: Any, asked: Sequence[Request] = ()) -> Any:
        """Runs a step again and again while somebody else holds a lock, until `busy_timeout` is used up.

        Between two tries the thread sleeps for a random few milliseconds: short enough that a cancellation is heeded
        at once (SQLite's own busy handler cannot be interrupted) and that no process starves behind another.

        Args:
            request: What is given up when it is cancelled.
            step: What is tried.
            *arguments: Its arguments.
            asked: Whose wait it is, where nothing is given up any more: what is committed.

        Raises:
            Interrupted: The request was cancelled meanwhile, or its transaction ended from outside.
            PoolClosedError: The pool closes, and has no time left.
        """
        began = until = perf_counter()
        timeout = self.backend.busy_timeout
        deadline = began + timeout
        own = False  # whether connections of this process kept their locks at the last look
        if self._on_slow is not None:
            self._on_slow()  # whoever waits behind this one need not wait for a lock of somebody else's
        try:
            while True:
                until = perf_counter()
                try:
                    return step(*arguments)
                except BaseException as error:
                    until = perf_counter()
                    if not self.backend.is_busy(error):
                        raise
                    if self._deadline is not None:
                        whose = asked or (() if request is None else (request,))
                        found = self._deadline(self, whose, began, until)
                        held = found > began + timeout
                        if own and not held:  # they have ended since: from now on it is others' turn
                            found = until + timeout
                        own = held
                        deadline = max(deadline, found)
                    if until >= deadline:
                        raise
                self.flush()
                if self._stopping:
                    raise PoolClosedError(CLOSED)
                if request is not None and (request.cancelled or getattr(request.home, "doom", None) is not None):
                    raise Interrupted
                time.sleep(random.uniform(0.0005, 0.004))  # noqa: S311  - not a secret
        finally:
            # Of the last try, what it may have waited by itself; the rest is work.
            self.locked += until - began + min(perf_counter() - until, self.backend.busy_slice)

    def begin(self, request: Request | None, *, readonly: bool) -> Connection:
        """Opens a transaction, waiting for other processes as long as `busy_timeout` allows."""
        connection = self.connection or self.ready()
        began = 0.0 if self.threshold is None else perf_counter()
        try:
            connection.begin(readonly=readonly)
        except BaseException as error:
            if not self.backend.is_busy(error):
                self.rollback()  # should it have begun all the same, the next statement would not be committed
                raise
            if began:
                self.locked += perf_counter() - began
            self.patiently(request, _begin, connection, readonly)
        return connection

    def commit(self, connection: Connection, size: int = 1, asked: Sequence[Request] = ()) -> None:
        """Commits `size` writes of those who asked. Nothing can interrupt it but for what is current."""
        try:
            connection.commit()
        except BaseException as error:
            if not self.backend.is_busy(error):
                raise
            self.patiently(None, connection.commit, asked=asked)
        self.commits += 1
        if self.threshold is not None:
            self.tell(None, self.observer.committed, size)

    def rollback(self) -> None:
        """Rolls back what is open, if anything is; gives the connection up if even that fails."""
        connection = self.connection
        if connection is None:
            return
        try:
            self.rollbacks += connection.in_transaction
            connection.rollback()
        except BaseException as error:
            self.tell(None, self.observer.failure, error)
            self.discard()

    def atomically(self, request: Request) -> None:
        """Runs the request between SAVEPOINT and RELEASE of the open transaction; undone if it fails."""
        connection = self.connection
        if connection is None:
            self.execute(request)  # which reports why the connection is gone
            return
        try:
            connection.savepoint(0)
        except BaseException as error:
            request.error = self.translate(error, request)
            return
        self.grouping = True
        self.execute(request)
        self.grouping = False
        if request.cancelled and request.error is None:
            request.error = Interrupted()
        if self.connection is not connection or not connection.in_transaction:
            if request.error is None:  # a function that took no notice of it
                request.error = self.translate(TransactionError(ENDED_BY_ITSELF), request)
            return
        try:
            if request.error is None:
                connection.release(0)
            else:
                connection.undo(0)
        except BaseException as error:
            if request.error is None:
                request.error = self.translate(error, request)
            self.rollback()  # neither kept nor undone: what remains is the whole

    def in_transaction_of_its_own(self, request: Request, *, readonly: bool) -> None:
        """BEGIN, the request, COMMIT; rolled back if any of it fails."""
        try:
            connection = self.begin(request, readonly=readonly)
        except BaseException as error:
            request.error = self.translate(error, request)
            return
        self.execute(request)
        if request.error is None and not request.cancelled:
            if not connection.in_transaction:
                request.error = self.translate(TransactionError(ENDED_BY_ITSELF), request)
                return
            try:
                self.commit(connection, asked=(request,))
            except BaseException as error:
                request.error = self.translate(error, request)
            else:
                return
        elif request.error is None:
            request.error = Interrupted()
        self.rollback()

    def perform(self, request: Request, *, readonly: bool) -> None:
        """Runs a request outside any transaction, in one of its own where its kind needs one."""
        if request.kind == UNIT or request.kind == MANY:
            self.in_transaction_of_its_own(request, readonly=readonly)
        else:
            self.execute(request)
            if request.error is not None:
                self.rollback()  # nothing is open after a failed statement, unless a script opened it


def _begin(connection: Connection, readonly: bool) -> None:
    connection.begin(readonly=readonly)


def _report(what: str, error: BaseException) -> None:
    """Tells of what must never happen; where even that raises, there is nobody left to tell."""
    with contextlib.suppress(BaseException):
        _logger.critical("%s", what, exc_info=error)


def again(error: BaseException) -> BaseException:
    """A fresh copy of an error that several tasks are to raise, for a raised error grows a traceback."""
    if isinstance(error, ConnectionFailedError):
        copy: DatabaseError = ConnectionFailedError(error.path, error.reason)
    elif isinstance(error, DatabaseError):
        copy = type(error)(*error.args)
    else:
        return error
    copy.__cause__ = error.__cause__
    return copy
