"""Entering and leaving a transaction: which level a task is in, as `propagation` says.

The current level of a database is kept in a context variable (`Database.current`). `enter` opens a level or joins the
one that is open, `leave` ends what `enter` has begun. `TransactionContext` is what `db.transaction()` gives.

Loop thread, but inside an `offload=True` function, which enters and leaves on the worker's thread.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

import anyio

from database.errors import ReadOnlyTransactionError, TransactionError
from database.session.origin import Origin
from database.session.timelimit import TimeLimit
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from types import TracebackType

    from database.session.database import Database

__all__ = [
    "ISOLATIONS",
    "PROPAGATIONS",
    "Detached",
    "Entered",
    "Isolation",
    "Options",
    "Propagation",
    "TransactionContext",
    "after_all",
    "detached",
    "enter",
    "leave",
    "options_of",
    "refuse_isolation",
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


class Detached:
    """Stands in the context variable for "no transaction", and remembers the one that was stepped out of."""

    __slots__ = ("outer",)

    session: None = None

    def __init__(self, outer: Transaction | None) -> None:
        self.outer = outer


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


class TransactionContext:
    """What `db.transaction()` gives: `async with` it. A class, for it costs a fifth of `@asynccontextmanager`."""

    __slots__ = ("_arguments", "_database", "_entered", "_scope", "_timeout", "_token")

    def __init__(
        self,
        database: Database,
        origin: Origin,
        readonly: bool,
        timeout: float | None,
        propagation: str,
        options: Options | None,
    ) -> None:
        self._database = database
        self._arguments = (origin, readonly, propagation, options)
        self._timeout = timeout
        self._scope: TimeLimit | None = None
        self._entered: Entered | None = None
        self._token: Any = None

    async def __aenter__(self) -> Transaction:
        origin, readonly, propagation, options = self._arguments
        if self._timeout is not None:
            self._scope = TimeLimit(self._timeout, origin)
            self._scope.start()
        try:
            self._entered, self._token = await enter(
                self._database, origin, readonly=readonly, propagation=propagation, options=options
            )
        except BaseException as error:
            if self._scope is not None:
                self._scope.stop(error)
            raise
        if isinstance(self._entered, Transaction):
            return self._entered
        return cast("Transaction", self._entered.level)  # None where the propagation means "no transaction"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._entered is not None
        scope = self._scope
        if scope is not None and error is None:
            scope.finishing([self._entered])
        try:
            await leave(self._entered, self._token, error)
        except BaseException as failure:
            if failure.__context__ is None and failure is not error:
                failure.__context__ = error  # a cancelled rollback knows nothing of what was cancelled first
            if scope is None or not scope.stop(failure):
                raise
            return False
        if scope is not None:
            scope.stop(error)
        return False
