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
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, TypeAlias

import anyio

from database.driver.lease import Lease
from database.driver.pool import aside
from database.driver.request import COMMIT, MANY, ROLLBACK, STATEMENT, UNIT, Control, Request
from database.driver.wakeup import Timer, current_task, task_name
from database.errors import (
    ConnectionPoolExhaustedError,
    PoolClosedError,
    ReadOnlyTransactionError,
    TransactionError,
    TransactionTimeoutError,
)
from database.statements import OTHER, READ

if TYPE_CHECKING:
    from database.driver.backend import Operation, Session
    from database.driver.pool import Pool
    from database.driver.worker import Worker
    from database.handle import Database
    from database.statements import Statement

__all__ = [
    "ISOLATIONS",
    "PROPAGATIONS",
    "Detached",
    "Isolation",
    "Options",
    "Origin",
    "Propagation",
    "Transaction",
    "options_of",
]

PROPAGATIONS: Final = frozenset(
    {"nested", "required", "requires_new", "mandatory", "supports", "not_supported", "never"}
)
Propagation = Literal["nested", "required", "requires_new", "mandatory", "supports", "not_supported", "never"]

ISOLATIONS: Final = frozenset({"read committed", "repeatable read", "serializable"})
Isolation = Literal["read committed", "repeatable read", "serializable"]

Callback = Callable[[], Any]


class Options(NamedTuple):
    """What is asked of a transaction that has to be begun, beyond the ordinary."""

    isolation: str | None = None
    """In capitals; None leaves it to the configuration."""
    replica: bool = True
    """Whether a read-only one may run on a replica."""


def options_of(isolation: str | None, replica: bool) -> Options | None:
    """The options; None where all is as usual.

    Raises:
        ValueError: There is no such isolation.
    """
    if isolation is None and replica:
        return None
    if isolation is not None and isolation not in ISOLATIONS:
        raise ValueError(f"isolation {isolation!r} is unknown; it is one of {', '.join(sorted(ISOLATIONS))}")
    return Options(None if isolation is None else isolation.upper(), replica)


_numbers = itertools.count(1)

INLINE = 1_000_000
"""The savepoint around several statements that an offloaded function sends as one: apart from the one (0) around the
function, which is to undo all of it whatever became of this one."""


class Origin:
    """Where a transaction was begun, described only when somebody asks."""

    __slots__ = ("_code", "_line", "_task", "_what")

    def __init__(self, what: str, code: CodeType | None = None, line: int = 0) -> None:
        self._what = what
        self._code = code
        self._line = line
        self._task: Callable[[], object | None] | None = None

    def set_task(self) -> None:
        """Remembers the running task, once; called when the transaction first asks for a connection."""
        if self._task is None:
            task = current_task()
            self._task = _no_task if task is None else weakref.ref(task)

    def is_of(self, task: object | None) -> bool:
        """Whether that task asked for the connection."""
        return self._task is not None and task is not None and self._task() is task

    def __call__(self) -> str:
        where = "" if self._code is None else f" at {self._code.co_filename}:{self._line} in {self._code.co_qualname}"
        task = "" if self._task is None else f" by task {task_name(self._task())!r}"
        return f"{self._what}{where}{task}"


def _no_task() -> None:
    return None


class Detached:
    """Stands in the context variable for "no transaction", and remembers the one that was stepped out of."""

    __slots__ = ("outer",)

    session: None = None

    def __init__(self, outer: Transaction | None) -> None:
        self.outer = outer


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


class _Joined:
    """What `enter` gives where nothing new was opened: the level that counts, and whether a failure dooms it."""

    __slots__ = ("level",)

    def __init__(self, level: Transaction | None) -> None:
        self.level = level


Entered: TypeAlias = Transaction | _Joined


async def enter(
    database: Database,
    origin: Origin,
    *,
    readonly: bool,
    propagation: str,
    manual: bool = False,
    options: Options | None = None,
) -> tuple[Entered, Any]:
    """Opens or joins a transaction as `propagation` says; gives it with the context variable's token.

    Raises:
        TransactionError: The propagation does not allow it here.
    """
    variable = database.current
    found = variable.get()
    level: Transaction | None = None
    if found is not None:
        if isinstance(found, Detached):
            level = None
        elif found.ended and propagation not in ("not_supported", "requires_new"):
            raise found.refusal()
        else:
            level = None if found.ended else found
    if propagation == "nested" or propagation == "required":
        if level is None:
            outer = found.outer if isinstance(found, Detached) else None
            return _open(database, origin, variable, readonly=readonly, outer=outer, manual=manual, options=options)
        if options is not None:
            refuse_isolation(level, options)
        _refuse_writing_in_readonly(level, readonly)
        if propagation == "required" and readonly == level.readonly:
            return _Joined(level), None
        if level.root.top is not level:
            await level.take_turn()
        if level.ended or level.root.doom is not None:
            raise level.refusal()
        nested = Transaction(database, level.pool, origin, readonly=readonly, parent=level, manual=manual)
        nested.dooms = propagation == "required"
        return nested, variable.set(nested)
    return await _enter_rarely(
        database, origin, level, found, readonly=readonly, propagation=propagation, options=options
    )


async def _enter_rarely(
    database: Database,
    origin: Origin,
    level: Transaction | None,
    found: Any,
    *,
    readonly: bool,
    propagation: str,
    options: Options | None,
) -> tuple[Entered, Any]:
    variable = database.current
    if propagation not in PROPAGATIONS:
        raise ValueError(f"propagation {propagation!r} is unknown; it is one of {', '.join(sorted(PROPAGATIONS))}")
    if propagation == "never" and level is not None:
        raise TransactionError(f"propagation 'never': a transaction is open, begun by {level.origin()}")
    if propagation == "mandatory" and level is None:
        raise TransactionError("propagation 'mandatory': no transaction is open, and this function needs one")
    if propagation in ("mandatory", "supports") and level is not None:
        return await enter(database, origin, readonly=readonly, propagation="required", options=options)
    if propagation == "requires_new":
        if level is not None and level.session is not None:
            raise TransactionError("propagation 'requires_new' is not possible inside an offload=True function")
        _refuse_write_within_write(database, level, found, readonly)
        return _open(database, origin, variable, readonly=readonly, outer=level, manual=False, options=options)
    if propagation == "not_supported":
        if level is not None and level.session is not None:
            raise TransactionError("propagation 'not_supported' is not possible inside an offload=True function")
        return _Joined(None), variable.set(Detached(level))
    return _Joined(None), None  # supports or never, with no transaction open


def _open(
    database: Database,
    origin: Origin,
    variable: Any,
    *,
    readonly: bool,
    outer: Transaction | None,
    manual: bool,
    options: Options | None,
) -> tuple[Transaction, Any]:
    pool = database.reading_pool(options) if readonly else database.pool()
    root = Transaction(database, pool, origin, readonly=readonly, outer=outer, manual=manual)
    if options is not None:
        root.isolation = options.isolation
    return root, variable.set(root)


def refuse_isolation(level: Transaction, options: Options) -> None:
    """A transaction has one isolation, from its beginning. Where there is but one anyway, all are content."""
    wanted, root = options.isolation, level.root
    if wanted is not None and wanted != root.isolation and not level.database.engine.single_writer:
        raise TransactionError(
            f"isolation {wanted.lower()!r} can only be chosen where the transaction begins; this one was begun by"
            f" {root.origin()} with {'the configured isolation' if root.isolation is None else root.isolation.lower()}"
        )


def _refuse_writing_in_readonly(level: Transaction, readonly: bool) -> None:
    if level.readonly and not readonly:
        raise ReadOnlyTransactionError(
            f"a read-write transaction cannot be opened within a read-only one (begun by {level.origin()})"
        )


def _refuse_write_within_write(database: Database, level: Transaction | None, found: Any, readonly: bool) -> None:
    if readonly or not database.engine.single_writer:
        return
    outer = found.outer if isinstance(found, Detached) else level
    while outer is not None:
        if not outer.ended and not outer.root.readonly:
            raise TransactionError(
                "propagation 'requires_new': a write transaction within a write transaction on the same database could"
                f" only wait for itself, for there is one writer at a time; the outer one was begun by {outer.origin()}"
            )
        outer = outer.root.outer


async def leave(entered: Entered, token: Any, error: BaseException | None) -> None:
    """Ends what `enter` has begun: kept if there was no error."""
    if isinstance(entered, _Joined):
        if token is not None:
            _reset(token)
        if error is not None and entered.level is not None:
            entered.level.dooms_the_whole(error)
        return
    try:
        if error is None:
            await entered.finish()
        else:
            await entered.abandon()
            if entered.dooms:
                entered.dooms_the_whole(error)
    except BaseException as failure:
        _reset(token)
        await after_all(entered, failure)
        raise
    _reset(token)
    if error is None and entered.callbacks:
        await entered.run_callbacks()


async def after_all(level: Transaction, failure: BaseException) -> None:
    """A cancellation struck while the commit was under way, but it went through: those who wait for it are told."""
    if level.callbacks and level.committed and not isinstance(failure, Exception):
        with anyio.CancelScope(shield=True):
            await level.run_callbacks()


def _reset(token: Any) -> None:
    try:
        token.var.reset(token)
    except ValueError:  # ended in another context than it was begun in (a fixture, a generator): nothing to restore
        pass


class TimeLimit:
    """Bounds a whole transaction; a commit that has begun is not interrupted.

    Raises `TransactionTimeoutError` in `stop`, saying what the time was spent on.
    """

    __slots__ = ("_bounded", "_origin", "_scope", "_seconds", "result")

    def __init__(self, seconds: float, origin: Origin) -> None:
        self._seconds = seconds
        self._origin = origin
        self._scope = anyio.move_on_after(seconds)
        self._bounded: list[Bounded] = []
        self.result: Any = None
        """What the function has returned."""

    def start(self) -> None:
        """The clock runs from here."""
        self._scope.__enter__()

    def finishing(self, levels: Iterable[object], result: Any = None) -> None:
        """The function has returned; what is left to be done is to commit these."""
        self._bounded = [level for level in levels if isinstance(level, Transaction) and level.parent is None]
        self.result = result

    def offloading(self, job: Bounded) -> None:
        """The function is on its way to the database's thread."""
        self._bounded = [job]

    def stop(self, error: BaseException | None) -> bool:
        """The transaction is over, with or without an error.

        Returns:
            Whether the error was only that time ran out during the commit, and that went through.
        """
        swallowed = self._scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        if swallowed and error is not None:  # trio's scope says so without an error as well
            committed = [each for each in self._bounded if each.whole]
            if committed and len(committed) == len(self._bounded):
                self.result = getattr(committed[0], "result", self.result)
                return True
            running = any(getattr(each, "running", False) for each in self._bounded)
            outcome = "is being rolled back, unless its commit had begun" if running else "has been rolled back"
            raise TransactionTimeoutError(
                f"the transaction begun by {self._origin()} took longer than its timeout of {self._seconds:g} s and"
                f" {outcome}; it was {_doing(error)}"
            ) from error
        return False


class Bounded(Protocol):
    """What a time limit bounds."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been committed."""
        ...


def _doing(error: BaseException | None) -> str:
    """Where a cancellation struck, told from the innermost frames of its traceback.

    The rollback that it led to is cancelled as well; what was going on before that is in the error's context.
    """
    place = "the function itself"
    while error is not None:
        rolling_back = False
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            found = traceback.tb_frame.f_locals
            request = found.get("request", found.get("self"))  # a request is what is awaited
            if isinstance(request, Request):
                if request.kind != ROLLBACK:
                    what = str(request.label or getattr(request.sql, "sql", request.sql))
                    home = request.home
                    waiting = isinstance(home, Lease) and home.worker is None
                    return f"{'waiting for a connection to execute' if waiting else 'executing'}: {what[:200]}"
                rolling_back = True
            place = f"{code.co_qualname} ({code.co_filename}:{traceback.tb_lineno})"
            traceback = traceback.tb_next
        error = error.__context__ if rolling_back else None
    return f"outside the database, in {place}"


@contextmanager
def detached(variable: Any) -> Generator[None, None, None]:
    """Steps outside the current transaction."""
    found = variable.get()
    outer = found if isinstance(found, Transaction) and not found.ended else None
    token = variable.set(Detached(outer))
    try:
        yield
    finally:
        _reset(token)
