"""`Database`: what `get_db()` returns.

The API on one page: signatures and docstrings. What they do stands beside this:

- `binding`: what a name means: settings, engine, and a pool for each event loop;
- `statements`: what is known of a query; `sending`: which way a statement goes;
- `propagation` and `transaction`: `db.transaction()`; `manual`: `begin`, `commit`, `rollback`, `flush`, `on_commit`;
- `stream`, `batch`, `maintenance`.

A handle is made once per name, at import time, and knows nothing yet. At its first use its binding looks the settings up
and opens a pool for the event loop at hand.

The bodies of `execute`, `fetch_*` and `call_aiosql` say the same five times: to share them would cost a coroutine per
statement. Longer than most modules, for two thirds are docstrings and overloads.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

from database.driver.pool import DRAIN_SECONDS, Pool, PoolStats
from database.driver.request import MANY, SCRIPT, UNIT
from database.engine.contract import Engine
from database.engine.statement import CONTROL, Result, Row
from database.errors import ConfigurationError, QueryExecutionError, TransactionError
from database.session import generators, maintenance, manual
from database.session.batch import Batch
from database.session.binding import Binding, Declared
from database.session.level import detached
from database.session.origin import Origin
from database.session.propagation import Isolation, Propagation, TransactionContext, open_transaction, options_of
from database.session.sending import reach, send, send_unit
from database.session.statements import Query, TypedQuery, check_operation
from database.session.stream import Stream
from database.session.transaction import Transaction
from database.settings.rules import unfit_function

if TYPE_CHECKING:
    from database.engine.migrations import Migration, MigrationReport, MigrationStatus

__all__ = ["Database"]

T = TypeVar("T")
P = ParamSpec("P")
C = TypeVar("C", bound=Callable[[Any], object])
Parameters = Mapping[str, Any] | Sequence[Any] | object | None


class Database:
    """A database. Get it by `get_db()`, at module level if you like, and use it from any task.

    Outside a transaction every statement is its own. Inside one (`@transactional`, `async with db.transaction()`,
    `await db.begin()`) it belongs to that, also when it is sent by a task that was started in it.
    """

    def __init__(self, name: str, engine: str | None) -> None:
        self.name = name
        self.binding = Binding(Declared(name, engine))
        """What the name means now. For the package: it may be exchanged."""

    def __repr__(self) -> str:
        return f"<Database {self.name!r}>"

    # Statements

    async def execute(self, query: Query, params: Parameters = None) -> Result:
        """Executes a statement for what it does.

        Args:
            query: SQL text with `:name` or `?` placeholders, or a query function of `load_queries()`.
            params: A mapping, a sequence, or an object with attributes.

        Returns:
            The number of rows changed, and the row id of an INSERT.

        Raises:
            QueryExecutionError: It failed, or one of the subclasses says why.
            ReadOnlyTransactionError: It writes, and the transaction is read-only.
        """
        binding = self.binding
        statement = binding.statements.get(query) or binding.statements.learn(query)
        if statement.kind == CONTROL:
            raise binding.statements.unfit("execute", statement)
        if type(query) is not str:
            check_operation("execute", query)
        level = binding.current.get()
        if level is not None and level.connection is not None:
            done: Result = level.execute_here(binding.connection.execute, statement, params, None)
            return done
        result: Result = await send(binding, level, binding.connection.execute, statement, params, None)
        return result

    @overload
    async def fetch_one(
        self, query: Query, params: Parameters = None, *, record_class: Callable[..., T]
    ) -> T | None: ...
    @overload
    async def fetch_one(  # type: ignore[overload-overlap]  # whatever is a TypedQuery is one before it is a Query
        self, query: TypedQuery[T], params: Parameters = None, *, record_class: None = None
    ) -> T | None: ...
    @overload
    async def fetch_one(self, query: Query, params: Parameters = None, *, record_class: None = None) -> Row | None: ...
    async def fetch_one(
        self, query: Query, params: Parameters = None, *, record_class: Callable[..., Any] | None = None
    ) -> Any:
        """The first row, or None.

        Args:
            query: As for `execute`; it must return rows.
            params: As for `execute`.
            record_class: What to make of the row: called with its columns as keyword arguments.

        Raises:
            QueryExecutionError: It failed, or returns no rows (then nothing is executed).
        """
        binding = self.binding
        statement = binding.statements.get(query)
        if statement is None or not statement.returns_rows:
            statement = binding.statements.with_rows("fetch_one", query)
        if type(query) is not str:
            record_class = record_class or check_operation("fetch_one", query)
        level = binding.current.get()
        if level is not None and level.connection is not None:
            return level.execute_here(binding.connection.fetch_one, statement, params, record_class)
        return await send(binding, level, binding.connection.fetch_one, statement, params, record_class)

    @overload
    async def fetch_all(
        self, query: Query, params: Parameters = None, *, record_class: Callable[..., T]
    ) -> list[T]: ...
    @overload
    async def fetch_all(  # type: ignore[overload-overlap]
        self, query: TypedQuery[T], params: Parameters = None, *, record_class: None = None
    ) -> list[T]: ...
    @overload
    async def fetch_all(self, query: Query, params: Parameters = None, *, record_class: None = None) -> list[Row]: ...
    async def fetch_all(
        self, query: Query, params: Parameters = None, *, record_class: Callable[..., Any] | None = None
    ) -> list[Any]:
        """All rows. Arguments and errors as for `fetch_one`."""
        binding = self.binding
        statement = binding.statements.get(query)
        if statement is None or not statement.returns_rows:
            statement = binding.statements.with_rows("fetch_all", query)
        if type(query) is not str:
            record_class = record_class or check_operation("fetch_all", query)
        level = binding.current.get()
        if level is not None and level.connection is not None:
            found: list[Any] = level.execute_here(binding.connection.fetch_all, statement, params, record_class)
            return found
        rows: list[Any] = await send(binding, level, binding.connection.fetch_all, statement, params, record_class)
        return rows

    async def fetch_value(self, query: Query, params: Parameters = None, *, default: Any = None) -> Any:
        """The first column of the first row; `default` if there is no row. Other arguments and errors as `fetch_one`."""
        binding = self.binding
        statement = binding.statements.get(query)
        if statement is None or not statement.returns_rows:
            statement = binding.statements.with_rows("fetch_value", query)
        if type(query) is not str:
            check_operation("fetch_value", query)
        level = binding.current.get()
        if level is not None and level.connection is not None:
            return level.execute_here(binding.connection.fetch_value, statement, params, default)
        return await send(binding, level, binding.connection.fetch_value, statement, params, default)

    async def execute_many(self, query: Query, rows: Iterable[Any]) -> Result:
        """Executes a statement once for every row of parameters: all or nothing.

        Args:
            query: An INSERT, UPDATE or DELETE without RETURNING.
            rows: Parameters, each as for `execute`. An iterator is consumed on the database's thread, as it goes.

        Returns:
            The total number of rows changed.
        """
        binding = self.binding
        statement = binding.statements.for_many(query)
        if type(rows) is list:
            rows = [*rows]  # while this waits for the writer, others may add to it
        result: Result = await send_unit(binding, MANY, binding.connection.execute_many, statement, rows)
        return result

    async def execute_script(self, sql: str | Callable[..., Any]) -> None:
        """Executes the statements of a script one after the other.

        Inside a transaction it stays inside it, and BEGIN, COMMIT and the like are refused. Outside, each statement is
        its own transaction.

        Args:
            sql: The script, or an aiosql query function with the `#` operator.
        """
        text = sql if isinstance(sql, str) else getattr(sql, "sql", None)
        if not isinstance(text, str):
            raise QueryExecutionError(f"a script is SQL text or an aiosql script, not {type(sql).__name__}")
        binding = self.binding
        await send_unit(binding, SCRIPT, binding.engine.connection.execute_script, text, None)

    @overload
    def stream(
        self, query: Query, params: Parameters = None, *, chunk_size: int = 1000, record_class: Callable[..., T]
    ) -> Stream[T]: ...
    @overload
    def stream(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, query: TypedQuery[T], params: Parameters = None, *, chunk_size: int = 1000, record_class: None = None
    ) -> Stream[T]: ...
    @overload
    def stream(
        self, query: Query, params: Parameters = None, *, chunk_size: int = 1000, record_class: None = None
    ) -> Stream[Row]: ...
    def stream(
        self,
        query: Query,
        params: Parameters = None,
        *,
        chunk_size: int = 1000,
        record_class: Callable[..., Any] | None = None,
    ) -> Stream[Any]:
        """Rows as they come: `async with db.stream(sql) as rows: async for row in rows: ...`.

        It reads ahead by one chunk at the most. Outside a transaction it keeps one reader, and that reader's snapshot,
        until the block ends.

        Args:
            query: As for `fetch_all`. A statement that writes can be streamed inside a transaction only.
            params: As for `execute`.
            chunk_size: The most rows to fetch at a time; the first chunks are smaller.
            record_class: As for `fetch_one`.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        return Stream(self.binding, query, params, chunk_size, record_class, _origin("stream()", 1))

    async def run(self, function: Callable[Concatenate[Any, ...], T], *args: Any, readonly: bool = False) -> T:
        """Runs `function(connection, *args)` on the connection's own thread, in one transaction.

        Args:
            function: An ordinary function. `commit()` and `rollback()` of the connection are about what it has done so
                far; nothing is permanent before it has returned, and an exception undoes all of it. It must not keep the
                connection. It may be run a second time, if the group of writes that it was in had to be rolled back.
            *args: Its further arguments.
            readonly: Runs it on a reader; writes are refused.

        Returns:
            What the function returns.
        """
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                "db.run() takes an ordinary function; for a coroutine function use @transactional(offload=True)"
            )
        binding = self.binding
        operation = binding.engine.connection.call
        label = f"db.run({getattr(function, '__qualname__', repr(function))})"
        level = binding.level()
        if readonly and isinstance(level, Transaction) and not level.readonly:
            async with self.transaction(readonly=True):
                within: T = await send_unit(binding, UNIT, operation, function, args, label=label)
                return within
        result: T = await send_unit(binding, UNIT, operation, function, args, label=label, readonly=readonly)
        return result

    async def call_aiosql(
        self, method: Any, sql: str, params: Any, record_class: Any = None, *, record: bool = False
    ) -> Any:
        """Runs a method of aiosql's synchronous adapter on the worker; see `database.session.queries`."""
        binding = self.binding
        statement = binding.statements.get(sql) or binding.statements.learn(sql)
        if statement.kind == CONTROL:
            raise binding.statements.unfit("this query", statement)
        how = (method, (record_class,) if record else None)
        level = binding.current.get()
        if level is not None and level.connection is not None:
            return level.execute_here(binding.connection.call_aiosql, statement, params, how)
        return await send(binding, level, binding.connection.call_aiosql, statement, params, how)

    # Transactions

    def transaction(
        self,
        readonly: bool = False,
        timeout: float | None = None,
        propagation: Propagation = "nested",
        *,
        isolation: Isolation | None = None,
        replica: bool = True,
    ) -> TransactionContext:
        """A transaction: `async with db.transaction() as tx: ...`. Commits at the end, rolls back on any exception.

        Args:
            readonly: Sees one snapshot from its first statement to its end, and refuses writes.
            timeout: Seconds for all of it, waiting included; then `TransactionTimeoutError`.
            propagation: What to do when a transaction is open already: `nested` (a savepoint), `required` (join),
                `requires_new`, `mandatory`, `supports`, `not_supported` or `never`.
            isolation: `read committed`, `repeatable read` or `serializable`; see `@transactional`.
            replica: Whether a read-only transaction may run on a replica, if there are any.
        """
        options = options_of(isolation, replica)
        return TransactionContext(self.binding, _origin("db.transaction()", 1), readonly, timeout, propagation, options)

    async def begin(self, readonly: bool = False) -> Transaction:
        """Begins a transaction that `commit()` or `rollback()` ends; within one, a nested level of it.

        It belongs to this task and to tasks started from now on. If the task ends first, it is rolled back with a
        warning.
        """
        held = generators.around(sys._getframe(1), outlives=True)  # pyright: ignore[reportPrivateUsage]
        return await manual.begin(self.binding, _origin("db.begin()", 1), held, readonly=readonly)

    async def commit(self) -> None:
        """Commits what `begin()` began; inside a decorated function, what was done so far.

        Raises:
            TransactionError: No transaction is open, or it can only be rolled back.
        """
        await manual.commit(self.binding)

    async def rollback(self) -> None:
        """Rolls back what `begin()` began; inside a decorated function, what was done so far. Else does nothing."""
        await manual.rollback(self.binding)

    async def flush(self) -> None:
        """Returns once everything that was handed over so far has been executed. It does not commit."""
        await manual.flush(self.binding)

    @property
    def in_transaction(self) -> bool:
        """Whether this task is inside an open transaction on this database, and on its event loop."""
        return open_transaction(self.binding) is not None

    def on_commit(self, function: Callable[[], Any]) -> None:
        """Runs a function after the outermost commit, never after a rollback; at once where no transaction is open.

        Args:
            function: An ordinary function, or a coroutine function: awaited behind the commit; in a task of its own
                where no transaction is open, for this method does not wait.
        """
        manual.on_commit(self.binding, function)

    def detached(self) -> AbstractContextManager[None]:
        """`with db.detached():` steps outside the current transaction: for tasks that outlive it."""
        return detached(self.binding.current, of_user=True)

    def batch(self, size: int = 1000) -> Batch:
        """Many writes, sent together and committed every `size`: `async with db.batch() as batch: ...`.

        Inside a transaction they are sent together all the same, and committed with it.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        return Batch(self.binding, size)

    # The rest

    def adapt(self, kind: type[T], function: Callable[[T], Any]) -> None:
        """Says how values of a type of yours are stored by this database; those of subclasses, too.

        `sqlite3.register_adapter`, or psycopg's adapters, would say so to others in the process as well. Example::

            db.adapt(dict, json.dumps)
            db.adapt(Money, lambda money: money.cents)

        Args:
            kind: The class. It may be one that the package would store otherwise, such as `datetime` or `Decimal`.
            function: Makes of a value what can be stored: a number, a text, bytes, None, or whatever the package knows.

        Raises:
            ConfigurationError: The type is stored as it is.
        """
        if not isinstance(kind, type) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"database {self.name!r}: adapt() takes a class and a function")
        if kind in (int, float, str, bytes, bytearray, bool, type(None)):
            raise ConfigurationError(
                f"database {self.name!r}: {kind.__name__} is stored as it is; convert such values where they are given"
            )
        declared = self.binding.declared
        declared.adapters[kind] = function

    def on_connect(self, function: C) -> C:
        """Has each new connection prepared by a function, before anybody uses it; also serves as a decorator.

        It is called as `function(connection)` with `sqlite3`'s connection, on the connection's own thread, after what
        the configuration's `on_connect` names: for the writer, for each reader, and for one that takes the place of
        another. Functions, aggregates, collations and the like belong here.

        Example::

            @db.on_connect
            def prepare(connection: sqlite3.Connection) -> None:
                connection.create_function("reverse", 1, lambda text: text[::-1], deterministic=True)

        Args:
            function: A plain function; what it raises becomes a `ConnectionFailedError` that names it.

        Returns:
            The function.

        Raises:
            ConfigurationError: A pool of this database is open, or it is no plain function.
        """
        if problem := unfit_function(function):
            raise ConfigurationError(f"database {self.name!r}: on_connect: {problem}")
        if self.binding.pools():
            raise ConfigurationError(
                f"database {self.name!r} is open: on_connect comes before its first use, or after `await db.close()`"
            )
        steps = self.binding.declared.steps
        if function not in steps:
            steps.append(function)
        return function

    async def backup(
        self, path: str | os.PathLike[str], *, progress: Callable[[int, int, int], object] | None = None
    ) -> None:
        """Copies the database, as it is at one moment, while others read and write.

        The copy is written beside its place and moved there when it is complete.

        Args:
            path: The copy; an existing file is replaced, unless it is a database in use.
            progress: Called on the database's thread as `progress(status, remaining, total)`, in pages.
        """
        await maintenance.backup(self.binding, path, progress, _origin("backup()", 1))

    async def migrate(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        dry_run: bool = False,
        to: int | None = None,
        baseline: int | None = None,
        wait: float = 60.0,
        progress: Callable[[Migration, float], object] | None = None,
    ) -> MigrationReport:
        """Applies the pending migrations, in order, each in a transaction of its own.

        Any number of processes may call it at once: one applies a migration, the others wait and find it applied.

        Args:
            folder: The folder of numbered SQL files; None: the one that the setting `migrations` names.
            dry_run: Applies them all in one transaction, which is rolled back.
            to: The last migration to apply; None: all.
            baseline: Instead of applying anything, records migrations up to this number as applied, on a database
                that has no record yet: one that was there before its migrations were.
            wait: Seconds to wait for other processes.
            progress: Called on the database's thread, with each migration that was applied and the seconds it took.

        Raises:
            MigrationError: One failed, and was rolled back, or the folder contradicts what was applied.
            TransactionError: Called inside a transaction.
        """
        return await maintenance.migrate(self.binding, folder, dry_run, to, baseline, wait, progress)

    async def migration_status(self, folder: str | os.PathLike[str] | None = None) -> MigrationStatus:
        """Which migrations the database has had, and which are pending; changes nothing.

        Args:
            folder: As for `migrate`.

        Raises:
            MigrationError: The folder contradicts what was applied.
        """
        return await maintenance.migration_status(self.binding, folder)

    def stats(self) -> PoolStats:
        """What this database's pool on the running event loop is doing; all zero if none is open.

        Where it has no pool (another thread, another loop), of all its pools together: for a monitor, or a metrics thread.
        """
        return self.binding.stats()

    async def open(self) -> None:
        """Opens the pool now instead of at its first use: an application that cannot reach its data need not start."""
        await reach(self.binding)

    async def close(self, drain: float = DRAIN_SECONDS) -> None:
        """Closes this database's pool on this event loop; the next use opens another.

        What waits gets `PoolClosedError`; open transactions are rolled back.

        Args:
            drain: Seconds for which single statements that run already may go on; then they are interrupted.

        Raises:
            TransactionError: Called inside a transaction on this database.
        """
        binding = self.binding
        level = binding.level()
        if isinstance(level, Transaction) and not level.ended and level.pool is binding.opened():
            raise TransactionError(f"close() was called inside a transaction, begun by {level.origin()}; end it first")
        for pool in (binding.opened_replicas(), binding.opened()):
            if pool is not None:
                await pool.close(drain)

    # For the package

    @property
    def engine(self) -> Engine:
        """The engine that the configuration gives this database."""
        return self.binding.engine

    def pool(self) -> Pool:
        """The pool of the running event loop, opened if need be."""
        return self.binding.pool()

    def pools(self) -> list[Pool]:
        """The open pools, of all event loops."""
        return self.binding.pools()

    def pin(self, engine: str) -> bool:
        """Makes sure that this handle is of that engine; False if it is of another one already."""
        declared = self.binding.declared
        if declared.engine is None and declared.resolved is None:
            declared.engine = engine
        return engine in (declared.engine, declared.resolved)


def _origin(what: str, depth: int) -> Origin:
    frame = sys._getframe(depth + 1)  # pyright: ignore[reportPrivateUsage]  - no other way to see who calls
    return Origin(what, frame.f_code, frame.f_lineno)
