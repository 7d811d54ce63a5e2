"""Transactions: levels, propagation, and who may speak when.

A *root* is a database transaction: from its first statement to its end it holds a lease on one connection. Below it,
*levels* nest: each is a savepoint. The current level is kept in a context variable, so it follows the task, and tasks
started inside take part in it.

BEGIN, SAVEPOINT and RELEASE are never sent by themselves. They wait in `controls` and travel with the next statement;
a level in which nothing was executed costs nothing. Only COMMIT and ROLLBACK are requests of their own.

Whose turn it is. Savepoints nest like brackets, and a statement of another task that fell between them would be undone
with somebody else's level. So only the innermost open level (`top`) may speak; statements of the levels outside it wait
until it ends, first come, first served.

Threads. All of it runs on the loop's thread, with one exception: an *inline* root is the transaction of an
`offload=True` function. Its code runs on the worker's thread, next to the connection, and so do its statements.

What ends a transaction. Its decorator or context manager, `commit()`/`rollback()` after `begin()`, the end of the task
that called `begin()`, or the pool's closing. Whatever happens to the task, the rollback is carried out by the worker.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from database.driver.lease import Lease
from database.driver.observer import aside
from database.driver.request import COMMIT, MANY, ROLLBACK, STATEMENT, UNIT, Control, Request
from database.driver.wakeup import Timer
from database.engine.statement import OTHER, READ
from database.errors import (
    ConnectionPoolExhaustedError,
    PoolClosedError,
    ReadOnlyTransactionError,
    TransactionError,
)
from database.session.origin import Origin

if TYPE_CHECKING:
    from database.driver.pool import Pool
    from database.driver.worker import Worker
    from database.engine.contract import Operation, Session
    from database.engine.statement import Statement
    from database.session.database import Database

__all__ = ["Transaction", "run_callbacks"]

Callback = Callable[[], Any]


_numbers = itertools.count(1)

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
    isolation: str | None = None

    def __init__(
        self,
        database: Database,
        pool: Pool,
        origin: Origin,
        *,
        readonly: bool,
        parent: Transaction | None = None,
        outer: Transaction | None = None,
        manual: bool = False,
    ) -> None:
        self.database = database
        self.pool = pool
        self.origin = origin
        self.readonly = readonly
        self.parent = parent
        self.outer = outer
        """The transaction that this root has suspended (`requires_new`)."""
        self.manual = manual
        self.callbacks: list[Callback] = []
        if parent is None:
            self.number = next(_numbers)
            self.controls: list[Control] = []
            self._turns: deque[tuple[Transaction, anyio.Event]] = deque()
        else:
            root = self._root = parent.root
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

    def send(self, request: Request) -> Awaitable[Any]:
        """Hands a request over, at once where nothing is in its way; gives what its answer is to be awaited from."""
        root = self._root or self
        if self.ended or root.doom is not None:
            raise self.refusal()
        if self.session is not None:
            request.result = root.run_inline(request)
            request.answered = True
            return request
        lease = root.lease
        if lease is None or lease.worker is None or (root._top or root) is not self:
            return self.run(request)
        if root.controls:
            request.controls, root.controls = root.controls, []
        lease.submit(request)
        return request

    async def run(self, request: Request, *, in_turn: bool = True) -> Any:
        """Executes a request within this level."""
        root = self.root
        if self.ended or root.doom is not None:
            raise self.refusal()
        if self.session is not None:
            return root.run_inline(request)
        if in_turn and root.top is not self:
            await self.take_turn()
        if root.controls:
            request.controls, root.controls = root.controls, []
        lease = root.lease
        if lease is None:
            lease = root.lease = root._new_lease()
            if root.isolation is not None:
                request.controls = [("isolation", root.isolation), *(request.controls or ())]
        lease.submit(request)
        try:
            return await request
        except BaseException:
            if lease.dropped:  # nothing was begun; the next statement stands in line anew
                if root.lease is lease:
                    root.lease = None
                root.controls[:0] = request.controls or ()
            raise

    def _new_lease(self) -> Lease:
        pool = self.pool
        if pool.evicted:  # before this transaction had done anything: it begins on the pool that has come after
            pool = self.pool = self.database.pool()
        if pool.closing:
            raise PoolClosedError(f"the pool of database {self.database.name!r} was closed while this was open")
        self.origin.set_task()
        return Lease(pool, self.origin, number=self.number, readonly=self.readonly)

    def refusal(self) -> TransactionError:
        """Why this level takes no statement any more."""
        if self.root.doom is not None:
            return TransactionError(self.root.doom)
        return TransactionError(
            f"the transaction has ended (begun by {self.origin()}). A task that was started inside a transaction and"
            " goes on after its end steps outside with `with db.detached():`"
        )

    async def take_turn(self) -> None:
        """Waits until no deeper level of another task is open."""
        root = self.root
        timeout = self.pool.timeout
        while root.top is not self:
            top = root.top
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
        if self.ended or root.doom is not None:
            raise self.refusal()
        worker = root.worker
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
        self.doom = f"the transaction has been rolled back after an error: {error}"
        return False

    def _steps(self, *steps: Control) -> None:
        """Opens and closes savepoints. Where that fails, nobody knows any more what a level would undo."""
        assert self.worker is not None
        for method, argument in steps:
            try:
                self.worker.step(self.session, method, argument)
            except BaseException as error:
                self.doom = f"the transaction can only be rolled back after an error: {error}"
                raise

    # Ending

    async def finish(self) -> None:
        """Commits a root, keeps what a level did. The level is over, also if this fails."""
        if self.parent is not None:
            self._close_level(keep=True)
            return
        try:
            if self.doom is None and not self.session and self.top is not self:
                await self.take_turn()
            if self.doom is not None:
                raise TransactionError(self.doom)
            await self._commit_root()
            self.whole = True
        except BaseException:
            self.whole = self.committed and self.lease is None  # cancelled behind a commit that went through
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
        root = self.root
        if self.ended or root.doom is not None:
            raise self.refusal()
        if root.top is not self:
            await self.take_turn()
        if self.parent is None:
            if self.session is not None:
                self._renew_inline(keep=True)
            else:
                try:
                    await self._commit_root()
                except BaseException:
                    await self._roll_back_root()
                    raise
            await self.run_callbacks()
        elif self.savepoint:
            self._renew_savepoint(keep=True)

    async def rollback(self) -> None:
        """Undoes what was done so far; the next statement goes on in a new transaction, or a new savepoint."""
        root = self.root
        if self.ended:
            raise self.refusal()
        self._close_deeper()
        self.callbacks.clear()
        if self.parent is None:
            self.doom = None
            if self.session is not None:
                self._renew_inline(keep=False)
            else:
                await self._roll_back_root()
        elif root.doom is not None:
            raise self.refusal()
        elif self.savepoint:
            self._renew_savepoint(keep=False)

    async def _commit_root(self) -> None:
        lease = self.lease
        if lease is None:  # nothing was executed
            self.controls.clear()
            self.committed = True
            return
        request = self.pool.request(COMMIT, None, label="COMMIT")
        if self.controls:
            request.controls, self.controls = self.controls, []
        lease.firm = self.firm
        lease.submit(request)
        try:
            await request
        except BaseException:
            if not (lease.ended and request.error is None):
                raise
            self.lease = None  # cancelled, but the commit had begun and went through
            self.committed = True
            raise
        self.lease = None
        self.committed = True

    async def _roll_back_root(self) -> None:
        lease, self.lease = self.lease, None
        self.controls.clear()
        if lease is None or lease.over():
            return
        request = self.pool.request(ROLLBACK, None, label="ROLLBACK")
        lease.submit(request)
        if self.pool.waker.is_current():  # else a coroutine is thrown away, and cannot wait for anything
            await request

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
        worker = self.worker
        assert worker is not None
        self.controls.clear()
        session = self.session
        assert session is not None
        if worker.session is not session or (worker.grouping and not session.in_transaction):
            self.doom = "the database has ended the transaction after an error; the function can only be left"
            raise self.refusal()
        try:
            worker.renew(session, keep=keep, readonly=self.readonly)
            self.committed |= keep
            if self.isolation is not None:
                worker.step(session, "isolation", self.isolation)
        except BaseException as error:
            self.doom = f"the transaction has been rolled back after an error: {error}"
            raise

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
            raise TransactionError(root.doom)
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
        if self.root.doom is None:
            self.root.doom = (
                "a function that takes part in this transaction (propagation 'required') failed with"
                f" {type(error).__name__}, so the whole of it can only be rolled back"
            )

    # After the commit

    def on_commit(self, function: Callback) -> None:
        """Runs the function after the outermost commit, never after a rollback of this level."""
        if self.ended:
            raise self.refusal()
        self.callbacks.append(function)

    async def run_callbacks(self) -> None:
        """Runs what was handed to `on_commit`; called outside the transaction, when it has been committed."""
        if self.callbacks and self.parent is None and self.committed:
            callbacks, self.callbacks = self.callbacks, []
            await run_callbacks(callbacks)


async def run_callbacks(callbacks: list[Callback]) -> None:
    """Runs all of them, also those behind one that fails; raises the first error."""
    failure: BaseException | None = None
    for callback in callbacks:
        try:
            result = callback()
            if isinstance(result, Awaitable):
                await result
        except Exception as error:
            failure = failure or error
    if failure is not None:
        failure.add_note("raised by a function given to on_commit(); the transaction itself has been committed")
        raise failure
