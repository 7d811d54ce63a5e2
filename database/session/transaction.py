"""One level of a transaction, on the event loop's thread: the statements within it, and its end.

A *root* is a database transaction: from its first statement to its end it holds a lease on one connection. Below it,
*levels* nest: each is a savepoint. Which level a task is in says the context variable of the database: see `level`. How
it gets there, as `propagation` says, stands in `propagation`; the transaction of an `offload=True` function, which runs
on the worker's thread, in `offload`.

BEGIN, SAVEPOINT and RELEASE are never sent by themselves. They wait in `controls` and travel with the next statement;
a level in which nothing was executed costs nothing. Only COMMIT and ROLLBACK are requests of their own.

Whose turn it is. Savepoints nest like brackets, and a statement of another task that fell between them would be undone
with somebody else's level. So only the innermost open level (`top`) may speak; statements of the levels outside it wait
until it ends, first come, first served.

Threads. All of it runs on the thread of the pool's event loop. But the context variable goes wherever contexts are copied
to: other threads, other loops, the host of a guest run. So every way in asks `is_elsewhere`, before anything is handed
over.

What ends a transaction. Its decorator or context manager, `commit()`/`rollback()` after `begin()`, the end of the task
that called `begin()`, or the pool's closing. Whatever happens to the task, the rollback is carried out by the worker.

Longer than most modules, for it is one class, and each of its methods has to know the others' states.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable
from functools import partial
from sys import modules
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from database.driver.observer import aside
from database.driver.request import COMMIT, ROLLBACK, Control, Request
from database.driver.wakeup import Timer, asyncio_loop, current_loop, current_task
from database.driver.worker import here
from database.engine.statement import OTHER
from database.errors import (
    ConnectionPoolExhaustedError,
    PoolClosedError,
    ReadOnlyTransactionError,
    TransactionError,
)
from database.session import retry
from database.session.binding import Binding
from database.session.callbacks import Callback, run_callbacks
from database.session.level import Detached, Level
from database.session.origin import Origin

if TYPE_CHECKING:
    from database.driver.lease import Lease
    from database.driver.pool import Pool
    from database.engine.contract import Operation
    from database.engine.statement import Statement

__all__ = ["Root", "Transaction"]

_numbers = itertools.count(1)


class Transaction(Level):
    """One level of a transaction. `db.transaction()` gives it; there is no need to make one.

    The statements go through the database's handle; this object ends or goes on with its level. What is seldom set has
    its value in the class: one of these is made for every transaction.
    """

    ended = False
    undone = False
    """Whether it was ended, and undone, behind the back of who has begun it."""
    committed = False
    """Whether anything of it has been made permanent already."""
    firm = False
    """Whether its commit follows one on another database, so that no cancellation may come between."""
    whole = False
    """Whether all of it has, its end being over."""
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
    _root: Transaction | None = None

    # Of roots only. That a root is its own root, and mostly the top as well, is not kept in it: what refers to itself is
    # garbage that only the collector finds, and a collection for every few hundred transactions costs more than they do.

    _top: Transaction | None = None
    lease: Lease | None = None
    watched: tuple[Any, ...] = ()
    _turns: deque[tuple[Transaction, anyio.Event]] | None = None
    """Who waits for a deeper level to end."""
    doom: str | None = None
    doomed_by: BaseException | None = None
    isolation: str | None = None

    def __init__(
        self,
        binding: Binding,
        pool: Pool,
        origin: Origin,
        *,
        readonly: bool,
        parent: Transaction | None = None,
        around: Level | None = None,
        manual: bool = False,
    ) -> None:
        self.binding = binding
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
        else:
            root = self._root = parent.root
            self.around = parent
            self.depth = parent.depth + 1
            self.number = root.number
            # A read-only level has nothing to undo; it only restricts what is sent.
            self.savepoint = not readonly
            root.top = self
            if not readonly:
                root.controls.append(("savepoint", self.depth))
            elif not parent.readonly:
                root.controls.append(("restrict", True))

    def nested(self, origin: Origin, *, readonly: bool, manual: bool) -> Transaction:
        """Opens a level within this one."""
        return Transaction(self.binding, self.pool, origin, readonly=readonly, parent=self, manual=manual)

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

    # Statements

    @property
    def is_elsewhere(self) -> bool:
        """Whether the caller runs on another event loop than this transaction does."""
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
            return self.run(request)
        if self.ended or root.doom is not None:
            raise self.refusal()
        # `is_elsewhere`, without its calls where nobody has imported trio
        if (self.pool.loop() is not asyncio_loop() or "trio" in modules) and self.is_elsewhere:
            raise self.refusal()
        if root.controls:
            request.controls, root.controls = root.controls, []
        lease.submit(request)
        return request

    def read(self, operation: Operation, statement: Statement, params: Any) -> Awaitable[Any] | None:
        """Runs a read of plain values at once, where that is possible (`inline_reads`); None: it is to be sent."""
        root = self._root or self
        if self.ended or root.doom is not None or root.controls or (root._top or root) is not self:
            return None
        if (self.pool.loop() is not asyncio_loop() or "trio" in modules) and self.is_elsewhere:
            return None
        lease = root.lease
        if lease is None:
            if not root.readonly or root.isolation is not None:
                return None
            lease = root.lease = root._new_lease()
        return lease.read(operation, statement, params)

    async def run(self, request: Request, *, in_turn: bool = True) -> Any:
        """Executes a request within this level."""
        root = self.root
        self.check()
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
            pool = self.pool = self.binding.pool()
        if pool.closing:
            raise PoolClosedError(f"the pool of database {self.binding.name!r} was closed while this was open")
        return pool.lease(self.origin, number=self.number, readonly=self.readonly)

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
                f"database {self.binding.name!r} cannot be used from here: this code runs on a database's own thread"
                " (offload=True, or db.run), where only the database that runs it may be called; nothing was sent"
            )
        return self._belongs_elsewhere()

    def _belongs_elsewhere(self) -> TransactionError:
        return TransactionError(
            f"the transaction begun by {self.origin()} belongs to another event loop and can be used there alone;"
            f" nothing was sent. `with db.detached():` steps outside of it: there this event loop's own connections to"
            f" database {self.binding.name!r} are used"
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
            turns = root._turns
            if turns is None:
                turns = root._turns = deque()
            turns.append(turn)
            try:
                with anyio.move_on_after(timeout) as scope:
                    await turn[1].wait()
            finally:
                if turn in turns:
                    turns.remove(turn)
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
        turns = root._turns or deque()
        for turn in tuple(turns):
            if turn[0] is root.top or turn[0].ended:
                turns.remove(turn)
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

    # Ending

    async def finish(self) -> None:
        """Commits a root, keeps what a level did. The level is over, also if this fails."""
        if self.ended:  # by somebody else: what it did was undone
            raise self.refusal()
        if self.parent is not None:
            self._close_level(keep=True)
            return
        lease: Lease | None = None
        try:
            if self.doom is None and self.top is not self:
                await self.take_turn()
            if self.doom is not None:
                raise self.refusal()
            lease = self.lease
            if lease is None:
                self._nothing_to_commit()
            else:
                if self.controls or not lease.commits_at_once():
                    await self._commit_of(lease)
                self._committed()
        except BaseException as error:
            if lease is not None and lease.committed:  # cancelled, but the commit had begun and went through
                self._committed()
            elif retry.attempts and not self.readonly and retry.is_unknown(error):
                retry.leave_behind()
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
        lease = self.lease
        try:
            if lease is None:
                self._nothing_to_commit()
            else:
                await self._commit_of(lease)
                self._committed()
        except BaseException as error:
            if lease is not None and lease.committed:  # cancelled, but it went through
                self._committed()
                self.whole = False
                with anyio.CancelScope(shield=True):
                    await self._run_between()
            else:
                if retry.attempts and not self.readonly and retry.is_unknown(error):
                    retry.leave_behind()
                self._lose(error)
            self.callbacks.clear()
            await self._roll_back_root()
            raise
        self.whole = False  # there may be more
        if self.callbacks:
            await self._run_between()

    def _lose(self, error: BaseException) -> None:
        """Of a root: the commit of a part has not even been tried, for a cancellation or an earlier error has undone that.

        Were the next statement to go on in a new transaction, half of the whole would be kept. Whoever wants that says so,
        by `rollback()`.
        """
        if not isinstance(error, Exception):
            self.fail("a commit() of this transaction was cancelled, so the whole of it has been rolled back", None)
        elif isinstance(error, TransactionError) and self.lease is not None and self.lease.doom is not None:
            self.fail(str(error), error.__cause__)

    async def rollback(self) -> None:
        """Undoes what was done so far; the next statement goes on in a new transaction, or a new savepoint."""
        root = self.root
        if self.ended or self.is_elsewhere:
            raise self.refusal()
        self._close_deeper()
        self.callbacks.clear()
        if self.parent is None:
            self.doom = self.doomed_by = None
            await self._roll_back_root()
        elif root.doom is not None:
            raise self.refusal()
        elif self.savepoint:
            self._renew_savepoint(keep=False)

    def _nothing_to_commit(self) -> None:
        """Nothing was executed."""
        self.controls.clear()
        self.committed = self.whole = True

    def _commit_of(self, lease: Lease) -> Request:
        """Asks for the commit of a root; gives what its answer is to be awaited from, behind which `_committed` is called."""
        request = self.pool.request(COMMIT, None, label="COMMIT")
        if self.controls:
            request.controls, self.controls = self.controls, []
        lease.firm = self.firm
        lease.submit(request)
        return request

    def _committed(self) -> None:
        self.lease = None
        self.committed = self.whole = True
        if retry.attempts and not self.readonly:
            retry.leave_behind()

    async def _roll_back_root(self) -> None:
        lease, self.lease = self.lease, None
        self.controls.clear()
        if lease is not None:
            await lease.give_back("ROLLBACK")

    def roll_back_unattended(self) -> None:
        """Ends a manual level whose task has gone, without waiting for the outcome."""
        if not self.ended:
            aside(partial(self.binding.observer.abandoned, self.origin()))
            self._roll_back_unattended()

    def left(self) -> None:
        """See `Level`."""
        if self.is_elsewhere:
            self.pool.waker.post([], self._roll_back_unattended)
            return
        if self.limit is not None and self.origin.is_of(current_task()):
            self.limit.left()
        self._roll_back_unattended()

    def _roll_back_unattended(self) -> None:
        if self.ended:
            return
        self.undone = True
        if self.parent is not None:
            self._close_level(keep=False)
            return
        self._end()
        lease, self.lease = self.lease, None
        if lease is not None and not lease.over() and not self.pool.closed:
            lease.submit(self.pool.request(ROLLBACK, None, label="ROLLBACK"))

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

    def fail(self, doom: str, error: BaseException | None) -> None:
        """Of a root: only a rollback is left, and everybody is told why."""
        if self.doom is None:
            self.doom, self.doomed_by = doom, error

    def dooms_the_whole(self, error: BaseException) -> None:
        """A function that had joined this transaction (`required`) failed: only a rollback is left."""
        self.root.fail(
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
        variable = self.binding.current
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


class Root(Transaction):
    """The outermost level, which holds the lease. A class of its own, because what has `__del__` costs more."""

    def __del__(self) -> None:
        """Thrown away open, its task having gone without leaving the block: rolled back. Any thread."""
        if not self.ended and self.lease is not None:
            report = partial(aside, partial(self.binding.observer.lost, self.origin()))
            self.pool.waker.post([], partial(self.lease.let_go, report))


class Pausable(Protocol):
    """What bounds the time of a transaction."""

    def pause(self) -> None:
        """The clock stands still."""
        ...

    def go_on(self) -> None:
        """It runs again."""
        ...

    def left(self) -> None:
        """It is needed no more, and nobody comes to stop it."""
        ...
