"""Entering and leaving a transaction: which level a task is in, as `propagation` says.

The current level of a database is kept in a context variable (`Binding.current`). `enter` opens a level or joins the
one that is open, `leave` ends what `enter` has begun. `TransactionContext` is what `db.transaction()` gives.

Loop thread, but inside an `offload=True` function, which enters and leaves on the worker's thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

import anyio

from database.driver.wakeup import current_task
from database.errors import ReadOnlyTransactionError, TransactionError, TransactionTimeoutError
from database.session import retry
from database.session.binding import Binding
from database.session.callbacks import Callback, run_callbacks
from database.session.generators import Generators, around, enters, watch
from database.session.level import Detached, Level, detached, step_back, step_out
from database.session.origin import Origin
from database.session.timelimit import TimeLimit
from database.session.transaction import Root, Transaction

if TYPE_CHECKING:
    from types import TracebackType

    from database.driver.pool import Pool

__all__ = [
    "ISOLATIONS",
    "PROPAGATIONS",
    "Entered",
    "Isolation",
    "Options",
    "Propagation",
    "TransactionContext",
    "enter",
    "leave",
    "open_root",
    "open_transaction",
    "options_of",
    "reading_pool",
    "refuse_isolation",
    "refuse_waiting_for_itself",
    "refuse_writing_in_readonly",
    "run_behind",
    "stop",
    "watch_generators",
]

PROPAGATIONS: Final = frozenset(
    {"nested", "required", "requires_new", "mandatory", "supports", "not_supported", "never"}
)
Propagation = Literal["nested", "required", "requires_new", "mandatory", "supports", "not_supported", "never"]

ISOLATIONS: Final = frozenset({"read committed", "repeatable read", "serializable"})
Isolation = Literal["read committed", "repeatable read", "serializable"]


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


def reading_pool(binding: Binding, options: Options | None) -> Pool:
    """The pool for a read-only transaction."""
    return binding.reading_pool(replica=options is None or options.replica)


def open_transaction(binding: Binding) -> Transaction | None:
    """The level that this task is in, if it is open and can be used from here."""
    level = binding.level()
    return level if isinstance(level, Transaction) and not level.ended and not level.is_elsewhere else None


class _Joined:
    """What `enter` gives where nothing new was opened: the level that counts, and whether a failure dooms it.

    Without a level: there is no transaction, or the task has stepped out of one.
    """

    __slots__ = ("level", "stepped_out")

    whole = committed = False

    def __init__(self, level: Transaction | None, stepped_out: Detached | None = None) -> None:
        self.level = level
        self.stepped_out = stepped_out

    @property
    def parent(self) -> Transaction | None:
        """What it takes part in."""
        return self.level

    @property
    def outside(self) -> bool:
        """Whether there is no transaction."""
        return self.level is None

    @property
    def joins(self) -> bool:
        """Whether there is one, of the caller's."""
        return self.level is not None


Entered: TypeAlias = Transaction | _Joined


async def enter(
    binding: Binding,
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
    variable = binding.current
    found = variable.get()
    if found is not None and found.ended:
        found = step_back(variable, found)
    level = found if isinstance(found, Transaction) else None
    if level is not None and propagation not in ("not_supported", "requires_new"):
        level.check()
    if propagation == "nested" or propagation == "required":
        if level is None:
            return open_root(binding, origin, variable, found, readonly=readonly, manual=manual, options=options)
        if options is not None:
            refuse_isolation(level, options)
        refuse_writing_in_readonly(level, readonly)
        if propagation == "required" and readonly == level.readonly:
            return _Joined(level), None
        if level.root.top is not level:
            await level.take_turn()
        if level.ended or level.root.doom is not None:
            raise level.refusal()
        if level.connection is None:
            origin.set_task()
        nested = level.nested(origin, readonly=readonly, manual=manual)
        nested.dooms = propagation == "required"
        return nested, variable.set(nested)
    return await _enter_rarely(
        binding, origin, level, found, readonly=readonly, propagation=propagation, options=options
    )


async def _enter_rarely(
    binding: Binding,
    origin: Origin,
    level: Transaction | None,
    found: Level | None,
    *,
    readonly: bool,
    propagation: str,
    options: Options | None,
) -> tuple[Entered, Any]:
    variable = binding.current
    if propagation not in PROPAGATIONS:
        raise ValueError(f"propagation {propagation!r} is unknown; it is one of {', '.join(sorted(PROPAGATIONS))}")
    if propagation == "never" and level is not None:
        raise TransactionError(f"propagation 'never': a transaction is open, begun by {level.origin()}")
    if propagation == "mandatory" and level is None:
        raise TransactionError("propagation 'mandatory': no transaction is open, and this function needs one")
    if propagation in ("mandatory", "supports") and level is not None:
        return await enter(binding, origin, readonly=readonly, propagation="required", options=options)
    if propagation == "requires_new":
        if level is not None and level.connection is not None:
            raise TransactionError("propagation 'requires_new' is not possible inside an offload=True function")
        if not readonly:
            _refuse_write_within_write(found)
        return open_root(binding, origin, variable, found, readonly=readonly, manual=False, options=options)
    if propagation == "not_supported":
        if level is not None and level.connection is not None:
            raise TransactionError("propagation 'not_supported' is not possible inside an offload=True function")
        stepped_out = Detached(found)
        return _Joined(None, stepped_out), variable.set(stepped_out)
    return _Joined(None), None  # supports or never, with no transaction open


def open_root(
    binding: Binding,
    origin: Origin,
    variable: Any,
    found: Level | None,
    *,
    readonly: bool,
    manual: bool,
    options: Options | None,
) -> tuple[Transaction, Any]:
    """Opens a transaction of its own, at once: `enter` where none is open, without its coroutine."""
    pool = reading_pool(binding, options) if readonly else binding.pool()
    if not readonly and found is not None:
        refuse_waiting_for_itself(found, pool)
    origin.set_task()
    root = Root(binding, pool, origin, readonly=readonly, around=found, manual=manual)
    if options is not None:
        root.isolation = options.isolation
    if retry.attempts:
        root.attempt = retry.current()
    return root, variable.set(root)


def refuse_isolation(level: Transaction, options: Options) -> None:
    """A transaction has one isolation, from its beginning. Where there is but one anyway, all are content."""
    wanted, root = options.isolation, level.root
    if wanted is not None and wanted != root.isolation and not level.pool.single_writer:
        raise TransactionError(
            f"isolation {wanted.lower()!r} can only be chosen where the transaction begins; this one was begun by"
            f" {root.origin()} with {'the configured isolation' if root.isolation is None else root.isolation.lower()}"
        )


def refuse_writing_in_readonly(level: Transaction, readonly: bool) -> None:
    """A transaction that may write cannot be part of one that may not.

    Raises:
        ReadOnlyTransactionError: It is asked for all the same.
    """
    if level.readonly and not readonly:
        raise ReadOnlyTransactionError(
            f"a read-write transaction cannot be opened within a read-only one (begun by {level.origin()})"
        )


def _around(found: Level | None) -> Iterator[Transaction]:
    """The open levels that may write, from the innermost outwards, also those that were stepped out of."""
    while found is not None:
        if isinstance(found, Transaction) and not found.ended and not found.root.readonly:
            yield found
        found = found.around


def _refuse_write_within_write(found: Level | None) -> None:
    for outer in _around(found):
        if outer.pool.single_writer:
            raise TransactionError(
                "propagation 'requires_new': a write transaction within a write transaction on the same database could"
                f" only wait for itself: there is one writer at a time; the outer one was begun by {outer.origin()}"
            )


def refuse_waiting_for_itself(found: Level, pool: Pool) -> None:
    """A write that does not belong to the transaction which this task holds open could only wait for that.

    Raises:
        TransactionError: So it is.
    """
    if not pool.single_writer:
        return
    task = None
    for level in _around(found):
        lease = level.root.lease
        if lease is not None and not lease.ended:
            task = task or current_task()
            if level.origin.is_of(task):
                raise TransactionError(
                    "a write outside the transaction could only wait for the transaction, which this very task holds open"
                    f" (begun by {level.origin()}): there is one writer at a time"
                )


def watch_generators(entered: Entered, generators: Generators) -> None:
    """What `enter` has begun in async generators ends when one of them is left."""
    level = entered.stepped_out if isinstance(entered, _Joined) else entered
    if level is not None and level.connection is None:  # on a worker's thread, Python closes generators at once
        watch(level, generators)


async def leave(entered: Entered, token: Any, error: BaseException | None, limit: TimeLimit | None = None) -> None:
    """Ends what `enter` has begun: kept if there was no error.

    What was handed to `on_commit` runs behind it. Where there is a time limit, it is handed on to that, for it is to be
    run when the clock has been stopped.
    """
    if isinstance(entered, _Joined):
        if token is not None:
            assert entered.stepped_out is not None
            entered.stepped_out.ended = True
            step_out(entered.stepped_out, token)
        if error is not None and entered.level is not None and not isinstance(error, GeneratorExit):
            entered.level.dooms_the_whole(error)  # a generator that is left has not failed
        return
    if error is None and entered.is_elsewhere:
        raise entered.refusal()
    try:
        if error is None:
            await entered.finish()
        else:
            await entered.abandon()
            if entered.dooms and not isinstance(error, GeneratorExit):
                entered.dooms_the_whole(error)
    except BaseException:
        step_out(entered, token)
        if entered.callbacks:  # the commit went through, and then a cancellation struck
            callbacks = entered.take_callbacks()
            if limit is not None:
                limit.callbacks += callbacks
            else:
                await run_behind(entered.binding, callbacks, shield=True)
        raise
    step_out(entered, token)
    if error is None and entered.callbacks:
        callbacks = entered.take_callbacks()
        if limit is not None:
            limit.callbacks += callbacks
        else:
            await run_behind(entered.binding, callbacks)


async def run_behind(binding: Binding, callbacks: list[Callback], *, shield: bool = False) -> None:
    """Runs what was handed to `on_commit`, outside of any transaction on its database."""
    if not callbacks:
        return
    with anyio.CancelScope(shield=shield):
        if open_transaction(binding) is not None:  # the one that was suspended (`requires_new`)
            with detached(binding.current):
                await run_callbacks(callbacks)
        else:
            await run_callbacks(callbacks)


class TransactionContext:
    """What `db.transaction()` gives: `async with` it. A class, for it costs a fifth of `@asynccontextmanager`."""

    __slots__ = ("_arguments", "_binding", "_entered", "_limit", "_timeout", "_token")

    def __init__(
        self,
        binding: Binding,
        origin: Origin,
        readonly: bool,
        timeout: float | None,
        propagation: str,
        options: Options | None,
    ) -> None:
        self._binding = binding
        self._arguments = (origin, readonly, propagation, options)
        self._timeout = timeout
        self._limit: TimeLimit | None = None
        self._entered: Entered | None = None
        self._token: Any = None

    async def __aenter__(self) -> Transaction:
        origin, readonly, propagation, options = self._arguments
        limit: TimeLimit | None = None
        if self._timeout is not None:
            limit = self._limit = TimeLimit(self._timeout, origin)
            limit.start()
        variable = self._binding.current
        try:
            if propagation == "nested" and variable.get() is None:
                self._entered, self._token = open_root(
                    self._binding, origin, variable, None, readonly=readonly, manual=False, options=options
                )
            else:
                self._entered, self._token = await enter(
                    self._binding, origin, readonly=readonly, propagation=propagation, options=options
                )
        except BaseException as error:
            if limit is not None:
                limit.stop(error)
            raise
        if limit is not None:
            limit.bound(self._entered)
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  - no other way to see who enters
        if enters(frame) and (generators := around(frame)):
            watch_generators(self._entered, generators)
        if isinstance(self._entered, Transaction):
            self._entered.limit = limit
            return self._entered
        return cast("Transaction", self._entered.level)  # None where the propagation means "no transaction"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._entered is not None
        limit = self._limit
        if limit is None:
            try:
                await leave(self._entered, self._token, error)
            except BaseException as failure:
                _add_context(failure, error)
                raise
            return False
        late: BaseException | None = None
        try:
            if error is None:
                try:
                    limit.finishing()
                except TransactionTimeoutError as exceeded:
                    late = exceeded
            await leave(self._entered, self._token, error or late, limit)
        except BaseException as failure:
            _add_context(failure, error)
            if not await stop(self._binding, limit, failure):
                raise
            return False
        await stop(self._binding, limit, error)
        if late is not None:
            raise late
        return False


def _add_context(failure: BaseException, error: BaseException | None) -> None:
    """A cancelled rollback knows nothing of what was cancelled first."""
    if failure.__context__ is None and failure is not error:
        failure.__context__ = error


async def stop(binding: Binding, limit: TimeLimit, error: BaseException | None) -> bool:
    """Stops the clock, then runs what is to run behind the commit.

    Returns:
        Whether the error was only that time ran out during the commit, and that went through.
    """
    cancelled = error is not None
    try:
        settled = limit.stop(error)
        cancelled = cancelled and not settled
        return settled
    finally:
        if limit.callbacks:
            await run_behind(binding, limit.callbacks, shield=cancelled)
