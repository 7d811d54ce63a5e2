"""Transactions: levels, propagation, and who may speak when.

A *root* is a database transaction: from its first statement to its end it holds a lease on one connection. Below it,
*levels* nest: each is a savepoint. The current level is kept in a context variable, so it follows the task, and tasks
started inside take part in it.

BEGIN, SAVEPOINT and RELEASE are never sent by themselves. They wait in `controls` and travel with the next statement;
a level in which nothing was executed costs nothing. Only COMMIT and ROLLBACK are requests of their own.

Whose turn it is. Savepoints nest like brackets, and a statement of another task that fell between them would be undone
with somebody else's level. So only the innermost open level (`top`) may speak; statements of the levels outside it wait
until it ends, first come, first served.

Threads. All of it runs on the thread of the pool's event loop, with one exception: an *inline* root is the transaction of
an `offload=True` function. Its code runs on the worker's thread, next to the connection, and so do its statements. But
the context variable goes wherever contexts are copied to: other threads, other loops, the host of a guest run. So every
way in asks `is_elsewhere`, before anything is handed over.

Who is where. The context variable may be left standing at a level that is over: a generator that held it was closed by
another task, by the collector, or in another order than it was opened. The task that had begun that level is then back
at the level around it (`step_back`), found when it next asks. A task that was only started inside stays where it is, and
is told that the transaction has ended.

What ends a transaction. Its decorator or context manager, `commit()`/`rollback()` after `begin()`, the end of the task
that called `begin()`, or the pool's closing. Whatever happens to the task, the rollback is carried out by the worker.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from database.driver.lease import Lease
from database.driver.observer import aside
from database.driver.request import COMMIT, MANY, ROLLBACK, STATEMENT, UNIT, Control, Request
from database.driver.wakeup import Timer, current_loop, current_task
from database.driver.worker import here
from database.engine.statement import OTHER, READ
from database.errors import (
    ConnectionPoolExhaustedError,
    PoolClosedError,
    ReadOnlyTransactionError,
    TransactionError,
)
from database.session import retry
from database.session.origin import Origin

if TYPE_CHECKING:
    from database.driver.pool import Pool
    from database.driver.worker import Worker
    from database.engine.contract import Operation, Session
    from database.engine.statement import Statement
    from database.session.database import Database

__all__ = ["Detached", "Transaction", "run_callbacks", "step_back"]

Callback = Callable[[], Any]


_numbers = itertools.count(1)

BEGIN = "begin"
"""A control of an inline root that has committed a part of its work: the next one has to be begun first."""

INLINE = 1_000_000
"""The savepoint around several statements that an offloaded function sends as one: apart from the one (0) around the
function, which is to undo all of it whatever became of this one."""


class Transaction:
    """One level of a transaction. `db.transaction()` gives it; there is no need to make one.

    The statements go through the database's handle; this object ends or goes on with its level. What is seldom set has
    its value in the class: one of these is made for every transaction.
    """

    ended = False
    committed = False
    """Whether anything of it has been made permanent already."""
    firm = False
    """Whether its commit follows one on another database, so that no cancellation may come between."""
    whole = False
    """Whether all of it has, its end being over."""
    job: Inline | None = None
    """Of an inline root: the call of the function that runs in it."""
    joined = False
    """Of an inline root: whether it is part of its caller's transaction."""
    limit: Pausable | None = None
    """What bounds its time; of roots."""
    attempt: retry.Attempt | None = None
    """What is run again if this fails, and so undone with it; of roots."""
    outside = joins = False
    """It is a transaction, or a level of one: see `TimeLimit`."""
    dooms = False
    """Whether a failure of this level is one of the whole (`required`)."""
    savepoint = False
    depth = 0
    watch: Timer | None = None
    session: Session | None = None
    """Set where this is an offloaded function's: it runs next to this connection, on its thread."""

    _root: Transaction | None = None

    # Of roots only. That a root is its own root, and mostly the top as well, is not kept in it: what refers to itself is
    # garbage that only the collector finds, and a collection for every few hundred transactions costs more than they do.

    _top: Transaction | None = None
    worker: Worker | None = None
    """Whose thread that is."""
    lease: Lease | None = None
    doom: str | None = None
    doomed_by: BaseException | None = None
    isolation: str | None = None

    def __init__(
        self,
        database: Database,
        pool: Pool,
        origin: Origin,
        *,
        readonly: bool,
        parent: Transaction | None = None,
        around: Transaction | Detached | None = None,
        manual: bool = False,
    ) -> None:
        self.database = database
        self.pool = pool
        self.origin = origin
        self.readonly = readonly
        self.parent = parent
        self.around = around
        """Where the task that began this is when it is over: the parent, or what this root has suspended."""
        self.manual = manual
        self.callbacks: list[Callback] = []
        if parent is None:
            self.number = next(_numbers)
            self.controls: list[Control] = []
            self._turns: deque[tuple[Transaction, anyio.Event]] = deque()
        else:
            root = self._root = parent.root
            self.around = parent
            self.session = parent.session
            self.depth = parent.depth + 1
            self.number = root.number
            # A read-only level has nothing to undo; it only restricts what is sent.
            self.savepoint = not readonly
            root.top = self
            if not readonly:
                root.controls.append(("savepoint", self.depth))
            elif not parent.readonly:
                root.controls.append(("restrict", True))

    @property
    def root(self) -> Transaction:
        """The outermost level."""
        return self._root or self

    @property
    def top(self) -> Transaction:
        """Of a root: its innermost open level."""
        return self._top or self

    @top.setter
    def top(self, level: Transaction) -> None:
        self._top = None if level is self else level

    def __repr__(self) -> str:
        state = "ended" if self.ended else "open"
        kind = "read-only " if self.readonly else ""
        return f"<{state} {kind}transaction {self.number} level {self.depth}, begun by {self.origin()}>"

    def __del__(self) -> None:
        """Thrown away open, its task having gone without leaving the block: rolled back. Any thread."""
        if self.parent is None and not self.ended and self.lease is not None:
            report = partial(aside, partial(self.database.observer.lost, self.origin()))
            self.pool.waker.post([], partial(self.lease.let_go, report))

    # Statements

    @property
    def is_elsewhere(self) -> bool:
        """Whether the caller runs on another event loop than this transaction does, or on another thread than an inline one."""
        if self.session is not None:
            return here.worker is not self.root.worker
        return self.pool.loop() is not current_loop()

    def check(self) -> None:
        """Makes sure that the level can be used, from here.

        Raises:
            TransactionError: It has ended, can only be rolled back, or belongs to another event loop.
        """
        if self.ended or self.root.doom is not None or self.is_elsewhere:
            raise self.refusal()

    def send(self, request: Request) -> Awaitable[Any]:
        """Hands a request over, at once where nothing is in its way; gives what its answer is to be awaited from."""
        root = self._root or self
        lease = root.lease
        if lease is None or lease.worker is None or (root._top or root) is not self:
            if self.session is None:
                return self.run(request)
            self.check()
            request.result = root.run_inline(request)
            request.answered = True
            return request
        if self.ended or root.doom is not None or self.pool.loop() is not current_loop():
            raise self.refusal()
        if root.controls:
            request.controls, root.controls = root.controls, []
        lease.submit(request)
        return request

    async def run(self, request: Request, *, in_turn: bool = True) -> Any:
        """Executes a request within this level."""
        root = self.root
        self.check()
        if self.session is not None:
            return root.run_inline(request)
        if in_turn and root.top is not self:
            await self.take_turn()
        lease = root.lease
        if lease is not None and lease.dropped:
            root._forget(lease)
            lease = None
        if lease is None:
            lease = root.lease = root._new_lease()
            if root.isolation is not None:
                root.controls.insert(0, ("isolation", root.isolation))
        if root.controls:
            request.controls, root.controls = root.controls, []
        lease.submit(request)
        try:
            return await request
        except BaseException:
            if lease.dropped:
                root._forget(lease)
            raise

    def _forget(self, lease: Lease) -> None:
        """Nothing was begun on that lease; the next statement stands in line anew, and opens the levels that are open."""
        if self.lease is lease:
            self.lease = None
            self.controls[:0] = [control for control in lease.unsent if control[0] != "isolation"]

    def _new_lease(self) -> Lease:
        pool = self.pool
        if pool.evicted:  # before this transaction had done anything: it begins on the pool that has come after
            pool = self.pool = self.database.pool()
        if pool.closing:
            raise PoolClosedError(f"the pool of database {self.database.name!r} was closed while this was open")
        return Lease(pool, self.origin, number=self.number, readonly=self.readonly)

    def refusal(self) -> TransactionError:
        """Why this level takes no statement any more, or not from here."""
        root = self.root
        if root.doom is not None:
            error = TransactionError(root.doom)
            error.__cause__ = root.doomed_by
            return error
        if self.ended:
            return TransactionError(
                f"the transaction has ended (begun by {self.origin()}). A task that was started inside a transaction and"
                " goes on after its end steps outside with `with db.detached():`"
            )
        if here.worker is not None:
            return TransactionError(
                f"database {self.database.name!r} cannot be used from here: this code runs on a database's own thread"
                " (offload=True, or db.run), where only the database that runs it may be called; nothing was sent"
            )
        if self.session is not None:
            return TransactionError(
                f"{self.origin()} runs with offload=True, on the database's own thread, and its transaction can be used"
                " there alone; nothing was sent from this other thread"
            )
        return TransactionError(
            f"the transaction begun by {self.origin()} belongs to another event loop and can be used there alone;"
            f" nothing was sent. `with db.detached():` steps outside of it: there this event loop's own connections to"
            f" database {self.database.name!r} are used"
        )

    async def take_turn(self) -> None:
        """Waits until no deeper level of another task is open."""
        root = self.root
        timeout = self.pool.timeout
        while root.top is not self:
            top = root.top
            if top.origin.is_of(current_task()):
                raise TransactionError(
                    f"the nested level begun by {top.origin()} is still open, and this very task has begun it: it has to"
                    f" end before the level around it, begun by {self.origin()}, can go on or be committed"
                )
            turn = (self, anyio.Event())
            root._turns.append(turn)
            try:
                with anyio.move_on_after(timeout) as scope:
                    await turn[1].wait()
            finally:
                if turn in root._turns:
                    root._turns.remove(turn)
                elif root.top is self:
                    root._pass_turn()  # woken and cancelled at once: the next one must not be forgotten
            if scope.cancelled_caught:
                raise ConnectionPoolExhaustedError(
                    f"the level begun by {self.origin()} waited {timeout:g} s for a nested level begun by"
                    f" {top.origin()}, which is still open"
                )
            if self.ended:
                raise self.refusal()

    def _pass_turn(self) -> None:
        """Wakes those whose level is innermost now, or has ended."""
        root = self.root
        for turn in tuple(root._turns):
            if turn[0] is root.top or turn[0].ended:
                root._turns.remove(turn)
                turn[1].set()

    def refuse_write(self, statement: Statement) -> None:
        """For read-only transactions: refuses what writes, as far as that can be seen.

        Raises:
            ReadOnlyTransactionError: It writes.
        """
        asks = statement.kind == OTHER and statement.verb in ("PRAGMA", "EXPLAIN")  # of these, only the engine knows
        if not asks and not self.ended:
            raise ReadOnlyTransactionError(
                f"a read-only transaction refuses this {statement.verb}; nothing was executed: {statement.sql[:500]}"
            )

    # Inline: on the worker's thread

    def execute_here(self, operation: Operation, statement: Statement, params: Any, extra: Any) -> Any:
        """Executes a single statement right here, next to the connection.

        The handle's methods ask for this by themselves: what comes through its `_send` has to be awaited, which takes longer.
        """
        root = self._root or self
        if self.readonly and statement.kind != READ:
            self.refuse_write(statement)
        worker = root.worker
        if self.ended or root.doom is not None or here.worker is not worker:
            raise self.refusal()
        assert worker is not None
        if root.controls or worker.threshold is not None or worker.current.cancelled:  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
            return root.run_inline(self.pool.request(STATEMENT, operation, statement, params, extra))
        # Most statements: not even a request is made for them, unless they fail.
        worker.statements += 1
        try:
            return operation(root.session, statement, params, extra)
        except BaseException as error:
            failure = worker.translate(error, self.pool.request(STATEMENT, operation, statement, params, extra))
            root._check_inline(failure)
            raise failure from failure.__cause__

    def run_inline(self, request: Request) -> Any:
        """Executes a request right here, next to the connection."""
        worker, session = self.worker, self.session
        assert worker is not None
        assert session is not None
        atomic = request.kind == UNIT or request.kind == MANY
        self._steps(*self.controls, *([("savepoint", INLINE)] if atomic else ()))
        self.controls.clear()
        try:
            result = worker.run_inline(request)
        except BaseException as error:
            if self._check_inline(error) and atomic:
                self._steps(("undo", INLINE))
            raise
        if atomic:
            self._steps(("release", INLINE))
        return result

    def _check_inline(self, error: BaseException) -> bool:
        """After an error: whether the transaction is still there."""
        worker, session = self.worker, self.session
        assert worker is not None
        assert session is not None
        if worker.session is session and session.in_transaction:
            return True
        self._fail(f"the transaction has been rolled back after an error: {error}", error)
        return False

    def _fail(self, doom: str, error: BaseException | None) -> None:
        """Of a root: only a rollback is left, and everybody is told why."""
        if self.doom is None:
            self.doom, self.doomed_by = doom, error

    def _steps(self, *steps: Control) -> None:
        """Opens and closes savepoints. Where that fails, nobody knows any more what a level would undo."""
        assert self.worker is not None
        assert self.session is not None
        for method, argument in steps:
            try:
                if method == BEGIN:
                    self.worker.begin_again(self.session, readonly=self.readonly)
                else:
                    self.worker.step(self.session, method, argument)
            except BaseException as error:
                self._fail(f"the transaction can only be rolled back after an error: {error}", error)
                raise

    def settle_inline(self) -> None:
        """Of an inline root whose function has returned: sends what was to travel with the next statement."""
        controls, self.controls = self.controls, []
        self._steps(*controls)

    # Ending

    async def finish(self) -> None:
        """Commits a root, keeps what a level did. The level is over, also if this fails."""
        if self.ended:  # by somebody else: what it did was undone
            raise self.refusal()
        if self.parent is not None:
            self._close_level(keep=True)
            return
        try:
            if self.doom is None and not self.session and self.top is not self:
                await self.take_turn()
            if self.doom is not None:
                raise self.refusal()
            await self._commit_root()
        except BaseException:
            if not self.whole:
                self.callbacks.clear()
            await self.abandon()
            raise
        finally:
            self._end()

    async def abandon(self) -> None:
        """Rolls back a root, undoes what a level did. The level is over."""
        if self.parent is not None:
            self._close_level(keep=False)
            return
        if not self.ended:
            self._end()
            await self._roll_back_root()

    async def commit(self) -> None:
        """Makes permanent what was done so far; the next statement goes on in a new transaction.

        In a nested level: what was done so far will not be undone with this level any more.

        Raises:
            TransactionError: The level has ended or can only be rolled back.
        """
        self.check()
        if self.root.top is not self:
            await self.take_turn()
        if self.parent is not None:
            if self.savepoint:
                self._renew_savepoint(keep=True)
            return
        if self.session is not None:
            self._renew_inline(keep=True)
            if self.job is not None and self.callbacks:  # to be run on the loop, when the function is over
                self.job.kept = [*(self.job.kept or ()), *self.callbacks]
                self.callbacks.clear()
            return
        try:
            await self._commit_root()
        except BaseException:
            if self.whole:  # cancelled, but the commit went through
                self.whole = False
                with anyio.CancelScope(shield=True):
                    await self._run_between()
            self.callbacks.clear()
            await self._roll_back_root()
            raise
        self.whole = False  # there may be more
        if self.callbacks:
            await self._run_between()

    async def rollback(self) -> None:
        """Undoes what was done so far; the next statement goes on in a new transaction, or a new savepoint."""
        root = self.root
        if self.ended or self.is_elsewhere:
            raise self.refusal()
        self._close_deeper()
        self.callbacks.clear()
        if self.parent is None:
            self.doom = self.doomed_by = None
            if self.session is not None:
                self._renew_inline(keep=False)
            else:
                await self._roll_back_root()
        elif root.doom is not None:
            raise self.refusal()
        elif self.savepoint:
            self._renew_savepoint(keep=False)

    async def _commit_root(self) -> None:
        """Commits what there is; `whole` says whether that went through, also where this raises."""
        lease = self.lease
        if lease is None:  # nothing was executed
            self.controls.clear()
            self.committed = self.whole = True
            return
        request = self.pool.request(COMMIT, None, label="COMMIT")
        if self.controls:
            request.controls, self.controls = self.controls, []
        lease.firm = self.firm
        lease.submit(request)
        try:
            await request
        except BaseException as error:
            if not lease.committed:
                if retry.attempts and not self.readonly and retry.is_unknown(error):
                    retry.leave_behind()
                raise
            self._committed()  # cancelled, but the commit had begun and went through
            raise
        self._committed()

    def _committed(self) -> None:
        self.lease = None
        self.committed = self.whole = True
        if retry.attempts and not self.readonly:
            retry.leave_behind()

    async def _roll_back_root(self) -> None:
        lease, self.lease = self.lease, None
        self.controls.clear()
        if lease is not None:
            await give_back(lease, "ROLLBACK")

    def roll_back_unattended(self) -> None:
        """Ends a manual level whose task has gone, without waiting for the outcome."""
        if self.ended:
            return
        aside(partial(self.database.observer.abandoned, self.origin()))
        if self.parent is not None:
            self._close_level(keep=False)
            return
        self._end()
        lease, self.lease = self.lease, None
        if lease is not None and not lease.over() and not self.pool.closed:
            lease.submit(self.pool.request(ROLLBACK, None, label="ROLLBACK"))

    def _renew_inline(self, *, keep: bool) -> None:
        worker, session = self.worker, self.session
        assert worker is not None
        assert session is not None
        if worker.current is not None and worker.current.cancelled:
            raise worker.called_off()
        if self.controls and self.controls[0][0] == BEGIN:  # nothing was executed since
            return
        if worker.session is not session or (worker.grouping and not session.in_transaction):
            self._fail("the database has ended the transaction after an error; the function can only be left", None)
            raise self.refusal()
        if self.joined or (worker.grouping and not keep):  # there is a savepoint around the function
            steps: list[Control] = [*self.controls, ("release" if keep else "undo", 0), ("savepoint", 0)]
            self.controls.clear()
            self._steps(*steps)
            return
        self.controls.clear()
        try:
            worker.end_part(session, keep=keep)
        except BaseException as error:
            self._fail(f"the transaction has been rolled back after an error: {error}", error)
            raise
        if keep:
            self.committed = True
            if self.job is not None:
                self.job.committed = True
        self.controls.append((BEGIN, None))  # with the next statement, so that what may go wrong there is its error
        if self.isolation is not None:
            self.controls.append(("isolation", self.isolation))

    def _renew_savepoint(self, *, keep: bool) -> None:
        controls = self.root.controls
        opening: Control = ("savepoint", self.depth)
        if opening in controls:  # nothing was executed since
            return
        controls.append(("release" if keep else "undo", self.depth))
        controls.append(opening)

    def _close_level(self, *, keep: bool) -> None:
        """Ends a nested level. Loop thread (or inline); nothing is sent, the controls travel with what comes next."""
        root, parent = self.root, self.parent
        assert parent is not None
        if self.ended:
            return
        if keep and root.doom is not None:
            self._close_level(keep=False)
            raise self.refusal()
        self._close_deeper()
        controls = root.controls
        if self.savepoint:
            opening: Control = ("savepoint", self.depth)
            if opening in controls:
                del controls[controls.index(opening) :]
            else:
                controls.append(("release" if keep else "undo", self.depth))
        elif not parent.readonly:
            opening = ("restrict", True)
            if controls and controls[-1] == opening:
                controls.pop()
            else:
                controls.append(("restrict", False))
        if keep:
            parent.callbacks.extend(self.callbacks)
        self._end()

    def _close_deeper(self) -> None:
        """Ends the levels that other tasks have opened inside this one and not closed: they go with it."""
        root = self.root
        while root.top is not self and root.top.parent is not None:
            deeper = root.top
            if self.depth >= deeper.depth:
                break
            deeper._close_level(keep=False)

    def _end(self) -> None:
        self.ended = True
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None
        root = self.root
        if self.parent is not None:
            if root.top is self:
                root.top = self.parent
        else:
            while root.top is not self:
                root.top.ended = True
                root.top = root.top.parent or self
        if root._turns:
            self._pass_turn()

    def dooms_the_whole(self, error: BaseException) -> None:
        """A function that had joined this transaction (`required`) failed: only a rollback is left."""
        self.root._fail(
            "a function that takes part in this transaction (propagation 'required') failed with"
            f" {type(error).__name__}, so the whole of it can only be rolled back",
            error,
        )

    # After the commit

    def on_commit(self, function: Callback) -> None:
        """Runs the function after the outermost commit, never after a rollback of this level."""
        if self.ended or self.is_elsewhere:
            raise self.refusal()
        if retry.attempts:
            retry.leave_behind(self.root.attempt)
        self.callbacks.append(function)

    def take_callbacks(self) -> list[Callback]:
        """What was handed to `on_commit` and is to be run now; nothing where nothing was committed."""
        callbacks: list[Callback] = []
        if self.parent is None and self.whole:
            callbacks, self.callbacks = self.callbacks, callbacks
        return callbacks

    async def _run_between(self) -> None:
        """Runs them behind a partial commit: outside the transaction, and its time limit stands still."""
        callbacks, self.callbacks = self.callbacks, []
        variable = self.database.current
        token = variable.set(Detached(self))
        limit = self.limit
        if limit is not None:
            limit.pause()
        try:
            await run_callbacks(callbacks)
        finally:
            if limit is not None:
                limit.go_on()
            variable.reset(token)


class Detached:
    """Stands in the context variable for "no transaction", and remembers what was stepped out of."""

    __slots__ = ("around", "ended", "origin")

    session: None = None

    def __init__(self, around: Transaction | Detached | None) -> None:
        self.around = around
        self.ended = False
        self.origin = Origin("db.detached()")
        self.origin.set_task()


def step_back(variable: ContextVar[Any], found: Transaction | Detached) -> Transaction | Detached | None:
    """Where a task is whose level is over: where this task had begun it, back at the one around it."""
    task = current_task()
    level: Transaction | Detached | None = found
    while level is not None and level.ended and level.origin.is_of(task):
        level = level.around
    if level is not found:
        variable.set(level)
    return level


async def give_back(lease: Lease, label: str) -> None:
    """Ends a lease, rolling back what is open, and waits until its connection is free."""
    waker = lease.pool.waker
    if waker.is_current():
        if not lease.over():
            request = lease.pool.request(ROLLBACK, None, label=label)
            lease.submit(request)
            await request
    elif waker.running:  # on another thread: that loop sees to it
        waker.post([], partial(lease.let_go, _silently))
    else:  # a coroutine is thrown away, and cannot wait for anything
        lease.let_go(_silently)


def _silently() -> None:
    """Nothing to report."""


class Inline(Protocol):
    """A call of an offloaded function, as its transaction sees it."""

    committed: bool
    kept: list[Callback] | None


class Pausable(Protocol):
    """What bounds the time of a transaction."""

    def pause(self) -> None:
        """The clock stands still."""
        ...

    def go_on(self) -> None:
        """It runs again."""
        ...


async def run_callbacks(callbacks: list[Callback]) -> None:
    """Runs all of them, whatever becomes of one; then raises the first error, one that is no `Exception` before others.

    A cancellation strikes the one that is running. Those behind it are not cancelled any more.
    """
    failure: BaseException | None = None
    # Cancelled a moment ago, when the commit could not be stopped any more: that is not meant for what runs behind it.
    shield = anyio.CancelScope(shield=anyio.current_effective_deadline() == -math.inf)
    with shield:
        for callback in callbacks:
            try:
                result = callback()
                if isinstance(result, Awaitable):
                    await result
            except BaseException as error:
                if isinstance(error, GeneratorExit):  # nothing can be awaited any more
                    raise
                if failure is None or (isinstance(failure, Exception) and not isinstance(error, Exception)):
                    failure = error
                if not isinstance(error, Exception):
                    shield.shield = True
    if failure is not None:
        if isinstance(failure, Exception):
            failure.add_note("raised by a function given to on_commit(); the transaction itself has been committed")
        raise failure
