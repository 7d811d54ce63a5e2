"""`@transactional` and `@transactional_readonly`."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, overload

import anyio

from database.driver.wakeup import current_loop
from database.errors import DatabaseError, TransactionError
from database.session.database import Database
from database.session.offload import Job, Offloaded, offload, send_job
from database.session.origin import Origin
from database.session.propagation import (
    PROPAGATIONS,
    Entered,
    Isolation,
    Options,
    Propagation,
    enter,
    leave,
    open_root,
    options_of,
    run_behind,
    stop,
)
from database.session.retry import Attempt, is_passing
from database.session.timelimit import TimeLimit
from database.session.transaction import Transaction

__all__ = ["Decorator", "make_decorator"]

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


class Decorator(Protocol):
    """`@transactional`, with or without arguments."""

    @overload
    def __call__(self, function: F, /) -> F: ...
    @overload
    def __call__(
        self,
        *,
        db: str | tuple[str, ...] = ...,
        timeout: float | None = ...,
        retries: int = ...,
        propagation: Propagation = ...,
        offload: bool = ...,
        isolation: Isolation | None = ...,
        replica: bool = ...,
    ) -> Callable[[F], F]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decorates, or makes a decorator."""
        ...


def make_decorator(get_db: Callable[[str], Database], *, readonly: bool) -> Decorator:
    """Makes the decorator of one engine.

    Args:
        get_db: Finds handles by name.
        readonly: Whether its transactions are read-only.
    """
    name = "transactional_readonly" if readonly else "transactional"

    def decorator(
        function: Any = None,
        /,
        *,
        db: str | tuple[str, ...] = "default",
        timeout: float | None = None,
        retries: int = 0,
        propagation: Propagation = "nested",
        offload: bool = False,
        isolation: Isolation | None = None,
        replica: bool = True,
    ) -> Any:
        """Runs a coroutine function in a transaction: commit when it returns, rollback on any exception.

        Args:
            function: The coroutine function, where the decorator is used without arguments.
            db: The database's name; or several, committed in the order named.
            timeout: Seconds for all of it, waiting and `retries` included; then `TransactionTimeoutError`. What is handed to
                `on_commit` runs outside of it.
            retries: How often to run it again after `DatabaseBusyError` (somebody's lock, a deadlock, a serialization
                failure), or where the connection to the server was lost before COMMIT; as long as it has certainly left
                nothing behind, on this database or another.
            propagation: What to do when a transaction is open already; see `db.transaction()`.
            offload: Runs the whole function on the database's own thread: one hop however many statements. It may await
                nothing but this database's calls.
            isolation: `read committed`, `repeatable read` or `serializable`; None leaves it to the configuration. SQLite
                is always serializable.
            replica: Whether a read-only transaction may run on a replica, where any are configured: a replica lags behind,
                so what this task has just written may be missing there.

        Raises:
            TypeError: The function is no coroutine function.
            ValueError: An argument is out of range.
        """
        names = (db,) if isinstance(db, str) else tuple(db)
        _check(name, names, timeout, retries, propagation, offload)
        options = options_of(isolation, replica)

        def decorate(function: Any) -> Any:
            if not inspect.iscoroutinefunction(function):
                raise TypeError(
                    f"@{name} decorates coroutine functions (async def), not {_describe(function)}; for an ordinary"
                    " function that uses a connection there is db.run()"
                )
            databases = [get_db(each) for each in names]
            origin = _make_origin(name, function)
            if timeout is None and retries == 0 and len(databases) == 1 and not offload:
                return _wrap_plainly(databases[0], function, origin, propagation, readonly, options)
            run = _make_runner(databases, function, origin, propagation, offload, readonly, options)
            if timeout is None and retries == 0 and offload:
                return _wrap_offloaded(databases[0], function, run, origin, propagation, readonly, options)
            return _wrap(databases[0], function, run, origin, timeout, retries)

        return decorate if function is None else decorate(function)

    decorator.__name__ = decorator.__qualname__ = name
    return decorator


def _check(
    name: str, names: tuple[object, ...], timeout: float | None, retries: int, propagation: str, offload: bool
) -> None:
    if not names or not all(isinstance(each, str) for each in names):
        raise TypeError(f"@{name}: db is a database's name or a tuple of names, not {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"@{name}: db names a database twice: {names!r}")
    if propagation not in PROPAGATIONS:
        raise ValueError(
            f"@{name}: propagation {propagation!r} is unknown; it is one of {', '.join(sorted(PROPAGATIONS))}"
        )
    if retries < 0:
        raise ValueError(f"@{name}: retries must not be negative, but is {retries}")
    if timeout is not None and timeout < 0:
        raise ValueError(f"@{name}: timeout must not be negative, but is {timeout}")
    if offload and len(names) > 1:
        raise ValueError(f"@{name}: offload=True runs on one database's thread; db names {len(names)}")
    if offload and propagation not in ("nested", "required"):
        raise ValueError(f"@{name}: offload=True goes with propagation 'nested' or 'required', not {propagation!r}")


def _describe(function: Any) -> str:
    if inspect.isasyncgenfunction(function):
        return f"the asynchronous generator {function.__qualname__}"
    if isinstance(function, type):
        return f"the class {function.__qualname__}"
    if inspect.isfunction(function):
        return f"the ordinary function {function.__qualname__}"
    return f"a {type(function).__name__}"


Runner = Callable[[tuple[Any, ...], dict[str, Any], Attempt | None, TimeLimit | None], Coroutine[Any, Any, Any]]
"""Runs the function in whatever way was asked for, and wherever it is called. An attempt wants to know what was begun,
a time limit what it bounds.
"""


def _make_origin(name: str, function: Any) -> Callable[[], Origin]:
    what = f"@{name} {function.__qualname__}()"
    code = function.__code__ if hasattr(function, "__code__") else None
    return functools.partial(Origin, what, code, 0 if code is None else code.co_firstlineno)


def _wrap_plainly(
    database: Database,
    function: Any,
    origin: Callable[[], Origin],
    propagation: str,
    readonly: bool,
    options: Options | None,
) -> Any:
    """What most functions ask for: with a coroutine less for every call than `_wrap` has."""
    begins = propagation in ("nested", "required")

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        binding = database.binding
        variable = binding.current
        entered: Entered
        if begins and variable.get() is None:
            entered, token = open_root(
                binding, origin(), variable, None, readonly=readonly, manual=False, options=options
            )
        else:
            entered, token = await enter(binding, origin(), readonly=readonly, propagation=propagation, options=options)
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            await leave(entered, token, error)
            raise
        await leave(entered, token, None)
        return result

    return wrapper


def _wrap_offloaded(
    database: Database, function: Any, run: Runner, origin: Callable[[], Origin], propagation: str, readonly: bool,
    options: Options | None,
) -> Any:  # fmt: skip
    """The same for `offload=True`: two coroutines less for every call."""
    offloaded = Offloaded(function, origin(), readonly=readonly)
    dooms = propagation == "required"

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        binding = database.binding
        level = binding.current.get()
        if level is not None and level.connection is not None:  # on this database's thread already: an ordinary level
            return await run(args, kwargs, None, None)
        job = Job(offloaded, binding, args, kwargs, dooms=dooms)
        request, sent = send_job(job, level, readonly=readonly, options=options)
        try:
            result, callbacks = await sent
        except BaseException as error:
            await job.has_failed(request, error, None)
            raise
        if callbacks:
            await job.hand_on(callbacks, None)
        return result

    return wrapper


def _wrap(
    database: Database, function: Any, run: Runner, origin: Callable[[], Origin], timeout: float | None, retries: int
) -> Any:
    if timeout is None and retries == 0:

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await run(args, kwargs, None, None)

    elif timeout is None:

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await _run_again(run, retries, args, kwargs, None)

    else:

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            limit = TimeLimit(timeout, origin())
            limit.start()
            try:
                if retries:
                    result = await _run_again(run, retries, args, kwargs, limit)
                else:
                    result = await run(args, kwargs, None, limit)
            except BaseException as error:
                if not await stop(database.binding, limit, error):
                    raise
                return limit.result
            await stop(database.binding, limit, None)
            return result

    return wrapper


async def _run_again(run: Runner, retries: int, args: Any, kwargs: Any, limit: TimeLimit | None) -> Any:
    for left in range(retries, -1, -1):
        with Attempt() as attempt:
            try:
                return await run(args, kwargs, attempt, limit)
            except DatabaseError as error:
                if not left or not is_passing(error) or not attempt.may_be_repeated():
                    raise
        if current_loop() is not None:  # those that this one was in the way of go first, or they meet again
            await anyio.sleep(random.uniform(0, 0.001 * 2 ** min(retries - left, 6)))  # noqa: S311  - not a secret
    raise AssertionError


def _make_runner(
    databases: list[Database],
    function: Any,
    origin: Callable[[], Origin],
    propagation: str,
    offloads: bool,
    readonly: bool,
    options: Options | None,
) -> Runner:
    if len(databases) > 1:

        async def run_on_several(args: Any, kwargs: Any, attempt: Attempt | None, limit: TimeLimit | None) -> Any:
            return await _run_on_several(
                databases, function, args, kwargs, origin, readonly, propagation, attempt, limit, options
            )

        return run_on_several

    database = databases[0]
    offloaded = Offloaded(function, origin(), readonly=readonly)
    dooms = propagation == "required"

    async def run(args: Any, kwargs: Any, attempt: Attempt | None, limit: TimeLimit | None) -> Any:
        binding = database.binding
        if offloads:
            level = binding.current.get()
            if level is None or level.connection is None:  # else it runs on this database's thread already
                job = Job(offloaded, binding, args, kwargs, dooms=dooms)
                if attempt is not None:
                    attempt.begun(job)
                if limit is not None:
                    limit.bound(job)
                return await offload(job, level, readonly=readonly, options=options, limit=limit)
        entered, token = await enter(binding, origin(), readonly=readonly, propagation=propagation, options=options)
        if attempt is not None:
            attempt.begun(entered)
        if limit is not None:
            limit.bound(entered)
            if isinstance(entered, Transaction):
                entered.limit = limit
        try:
            result = await function(*args, **kwargs)
            if limit is not None:
                limit.finishing(result)
        except BaseException as error:
            await leave(entered, token, error, limit)
            raise
        await leave(entered, token, None, limit)
        return result

    return run


async def _run_on_several(
    databases: list[Database],
    function: Any,
    args: Any,
    kwargs: Any,
    origin: Callable[[], Origin],
    readonly: bool,
    propagation: str,
    attempt: Attempt | None,
    limit: TimeLimit | None,
    options: Options | None,
) -> Any:
    entered: list[tuple[Database, Any, Any]] = []
    behind = limit or TimeLimit(0, origin())  # which collects what is to run behind all of the commits
    try:
        for database in databases:
            level, token = await enter(
                database.binding, origin(), readonly=readonly, propagation=propagation, options=options
            )
            entered.append((database, level, token))
            if attempt is not None:
                attempt.begun(level)
            if limit is not None and isinstance(level, Transaction):
                level.limit = limit
        if limit is not None:
            limit.bound(*(level for _, level, _ in entered))
        result = await function(*args, **kwargs)
        if limit is not None:
            limit.finishing(result)
    except BaseException as error:
        await _leave_all(entered, error)
        raise
    cancelled = True
    try:
        await _commit_all(entered, behind)
        cancelled = False
    finally:
        if limit is None:
            await run_behind(databases[0].binding, behind.callbacks, shield=cancelled)
    return result


async def _commit_all(entered: list[tuple[Database, Any, Any]], behind: TimeLimit) -> None:
    """Commits in the order named.

    Raises:
        TransactionError: One failed after another had succeeded; it says which.
    """
    committed: list[str] = []
    late: BaseException | None = None
    for position, (database, level, token) in enumerate(entered):
        try:
            # Behind the first commit no deadline and no cancellation shall make a half of the whole.
            if committed and isinstance(level, Transaction):
                level.firm = True
            with anyio.CancelScope(shield=bool(committed)):
                await leave(level, token, None, behind)
        except BaseException as error:
            if isinstance(level, Transaction) and level.whole:
                late = late or error  # a cancellation during the commit
                committed.append(database.name)
                continue
            rest = entered[position + 1 :]
            await _leave_all(rest, error)
            if not committed:
                raise
            lost = [each.name for each, _, _ in entered[position:]]
            half_done = (
                f"the transaction on several databases is half done: committed on {', '.join(map(repr, committed))};"
                f" not committed, and rolled back, on {', '.join(map(repr, lost))}, because of {type(error).__name__}: {error}"
            )
            if not isinstance(error, Exception):
                error.add_note(half_done)
                raise
            raise TransactionError(half_done) from error
        committed.append(database.name)
    if late is not None:
        raise late


async def _leave_all(entered: list[tuple[Database, Any, Any]], error: BaseException) -> None:
    """Rolls all of them back, the last one first, also if one of them fails or a cancellation comes between."""
    failure: BaseException | None = None
    for _, level, token in reversed(entered):
        try:
            await leave(level, token, error)
        except BaseException as another:
            failure = failure or another
    if failure is not None:
        raise failure
