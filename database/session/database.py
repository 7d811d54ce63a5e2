"""`Database`: what `get_db()` returns.

A handle is made once per name, at import time, and knows nothing yet. At its first use it looks its settings up and opens
a pool for the event loop at hand. A statement then goes one of three ways: within a transaction to its connection;
otherwise, if it reads, to the lane of the readers; if it writes, to the lane of the writer.

Every call costs one hop to a worker's thread and back, so everything before the hop is kept short: what is known of a
statement is cached by its text, and nothing but one `Request` is made for it.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, overload

from database import logs, settings
from database.driver.lease import Lease
from database.driver.observer import aside
from database.driver.pool import DRAIN_SECONDS, Pool, PoolStats
from database.driver.request import ALONE, MANY, SCRIPT, STATEMENT, UNIT, Request
from database.driver.wakeup import create_waker, current_loop
from database.driver.worker import here
from database.engine import contract
from database.engine.contract import Engine
from database.engine.statement import CONTROL, READ, WRITE, Result, Row, Statement
from database.errors import (
    ConfigurationError,
    DatabaseError,
    QueryExecutionError,
    TransactionError,
)
from database.session.batch import Batch
from database.session.origin import Origin
from database.session.propagation import (
    Isolation,
    Options,
    Propagation,
    TransactionContext,
    detached,
    enter,
    options_of,
    refuse_isolation,
    refuse_waiting_for_itself,
    refuse_writing_in_readonly,
    run_behind,
)
from database.session.retry import attempts, leave_behind, note
from database.session.statements import TypedQuery, still
from database.session.stream import Stream
from database.session.transaction import Detached, Transaction, give_back, step_back
from database.settings.model import with_step
from database.settings.rules import unfit_function

if TYPE_CHECKING:
    from database.driver.observer import Observer
    from database.engine.contract import Backend
    from database.engine.migrations import Migration, MigrationReport, MigrationStatus
    from database.session.offload import Job
    from database.session.timelimit import TimeLimit

__all__ = ["Database"]

T = TypeVar("T")
P = ParamSpec("P")
C = TypeVar("C", bound=Callable[[Any], object])
Parameters = Mapping[str, Any] | Sequence[Any] | object | None

_CACHE_LIMIT = 5000
"""Statements whose analysis is remembered; whoever sends more different texts starts anew."""
_CACHE_CHARACTERS = 4_000_000
"""The same for what they hold: some programs put their data into the text."""


Parked = tuple[dict[int, Pool], dict[int, Pool], ContextVar[Transaction | Detached | None]]
Query = str | Callable[..., Any]
"""SQL text, or a query function of `load_queries()`."""


class Database:
    """A database. Get it by `get_db()`, at module level if you like, and use it from any task.

    Outside a transaction every statement is its own. Inside one (`@transactional`, `async with db.transaction()`,
    `await db.begin()`) it belongs to that, also when it is sent by a task that was started in it.
    """

    def __init__(self, name: str, engine: str | None) -> None:
        self.name = name
        self.current: ContextVar[Transaction | Detached | None] = ContextVar(f"database {name}", default=None)
        self._wanted_engine = engine
        self._engine: Engine | None = None
        self._settings: settings.Settings | None = None
        self._observer: logs.LogObserver | None = None
        self._statements: dict[Any, Statement] = {}
        self._characters = 0
        """Of the texts in it."""
        self._pools: dict[int, Pool] = {}
        self._replica_pools: dict[int, Pool] = {}
        """By the identity of their event loop."""
        self._recent: Pool | None = None
        """The one that was used last: mostly there is but one loop."""
        self._operations: Any = None
        self._steps: list[Callable[[Any], object]] = []
        """What `on_connect` was given."""
        self._adapters: dict[type, Callable[[Any], Any]] = {}
        """What `adapt` was given."""

    def __repr__(self) -> str:
        return f"<Database {self.name!r}>"

    # Looking things up

    @property
    def engine(self) -> Engine:
        """The engine that the configuration gives this database."""
        if self._engine is None:
            self._resolve()
        return cast("Engine", self._engine)

    @property
    def observer(self) -> logs.LogObserver:
        """Reports what this database does."""
        if self._observer is None:
            self._resolve()
        return cast("logs.LogObserver", self._observer)

    def _resolve(self) -> None:
        name, self._settings = settings.current().find(self.name, self._wanted_engine)
        for function in self._steps:
            if not hasattr(self._settings, "on_connect"):
                raise ConfigurationError(
                    f"database {self.name!r}: on_connect prepares connections of SQLite, not of {name}"
                )
            self._settings = with_step(self._settings, function)
        if self._engine is None or self._engine.name != name:
            self._engine = contract.load(name)
            self._operations = self._engine.operations
            self._statements.clear()
        self._observer = logs.LogObserver(self.name, self._settings.logging, self._engine.pins)
        if self._adapters:
            self._refuse_adapting()

    def pin(self, engine: str) -> bool:
        """Makes sure that this handle is of that engine; False if it is of another one already."""
        if self._wanted_engine is None and self._engine is None:
            self._wanted_engine = engine
        return engine in (self._wanted_engine, None if self._engine is None else self._engine.name)

    def pool(self) -> Pool:
        """The pool of the running event loop, opened if need be.

        Raises:
            ConfigurationError: The settings are wrong, or none name this database.
            TransactionError: No event loop is running here.
        """
        loop = current_loop()
        pool = self._recent
        if pool is not None and pool.loop() is loop:
            return pool
        pool = self._pools.get(id(loop))
        if pool is None or pool.loop() is not loop:
            pool = self._open_pool(loop)
        self._recent = pool
        return pool

    def reading_pool(self, options: Options | None) -> Pool:
        """The pool for a read-only transaction: the replicas', if there are any and they will do."""
        if self._engine is None:
            self._resolve()
        if cast("Engine", self._engine).replica_backend is None or (options is not None and not options.replica):
            return self.pool()
        self.pool()  # the primary's comes first: it resolves the settings, and prepares the database
        loop = current_loop()
        pool = self._replica_pools.get(id(loop))
        if pool is not None and pool.loop() is loop:
            return pool
        backend = cast("Any", self.engine.replica_backend)(self._settings)
        return self.pool() if backend is None else self._make_pool(loop, backend, self._replica_pools, "-replica")

    def _open_pool(self, loop: object | None) -> Pool:
        if here.worker is not None:  # also where a function has started a loop there
            raise TransactionError(
                f"database {self.name!r} cannot be used from here: this code runs on a database's own thread"
                " (offload=True, or db.run), where only the database that runs it may be called"
            )
        if loop is None:
            raise TransactionError(
                f"database {self.name!r} can only be used inside asyncio or trio, and none is running"
            )
        return self._make_pool(loop, None, self._pools, "")

    def _make_pool(self, loop: object | None, backend: Backend | None, pools: dict[int, Pool], suffix: str) -> Pool:
        ticket = object()
        settings.hold(ticket, self.name)
        try:
            if backend is None:
                self._resolve()
            chosen = cast("settings.Settings", self._settings)
            logs.set_up(chosen.logging)
            key = id(loop)
            monitor = _monitor(chosen)

            def closed(pool: Pool) -> None:
                settings.release(ticket)
                if monitor is not None:
                    monitor.withdraw(pool)
                for each in (self._pools, self._replica_pools):
                    if each.get(key) is pool:
                        del each[key]
                if self._recent is pool:
                    self._recent = None
                if not self._pools:
                    self._statements.clear()  # the next configuration may give this name to another engine

            backend = backend or self.engine.backend(chosen, self._adapters)
            observer = cast("Observer", self.observer)
            instrumentation = logs.instrumentation
            if instrumentation is not None:
                observer = instrumentation.observe(self.name, self.engine.name, backend.description, self.observer)
            pool = Pool(
                backend,
                create_waker(),
                observer,
                name=f"{self.name}{suffix}",
                size=chosen.pool_size,
                timeout=chosen.pool_timeout,
                long_read=chosen.logging.long_read_s,
                inline_reads=getattr(chosen, "inline_reads", False),
                on_closed=closed,
            )
            if instrumentation is not None:
                instrumentation.opened(pool)
        except BaseException:
            settings.release(ticket)
            raise
        pools[key] = pool
        configuration = settings.current()
        if configuration.patterns and (pattern := configuration.pattern_of(self.name, self.engine.name)) is not None:
            from database.session import tenants  # noqa: PLC0415  - few programs have any

            tenants.admit(pool, pattern, chosen.max_open)  # type: ignore[attr-defined]
        if monitor is not None:
            monitor.offer(chosen.monitor, pool)  # type: ignore[attr-defined]
        return pool

    def _analyse(self, query: Query) -> Statement:
        """Analyses a statement the first time it is seen."""
        if self._engine is None:
            self._resolve()
        if isinstance(query, str):
            sql = query
        else:
            sql = getattr(query, "sql", None)  # type: ignore[assignment]
            if not isinstance(sql, str):
                raise QueryExecutionError(
                    f"a query is SQL text or a query function of load_queries(), not {type(query).__name__}"
                )
        statement = self.engine.analyse(sql)
        if not statement.verb:
            raise QueryExecutionError("the statement is empty", sql=sql)
        self._characters += len(sql)
        if len(self._statements) >= _CACHE_LIMIT or self._characters > _CACHE_CHARACTERS:
            self._statements.clear()
            self._characters = len(sql)
        self._statements[query] = statement
        return statement

    def _rows_from(self, method: str, query: Query) -> Statement:
        """The statement, if it gives rows.

        Raises:
            QueryExecutionError: It does not; nothing is executed.
        """
        statement = self._statements.get(query) or self._analyse(query)
        if not statement.returns_rows:
            raise self._unfit(method, statement)
        return statement

    def _unfit(self, method: str, statement: Statement) -> DatabaseError:
        if statement.kind == CONTROL:
            return cast("DatabaseError", self.engine.control_error(statement.verb))
        return QueryExecutionError(
            f"{method}() needs a statement that returns rows, and this {statement.verb} does not: use execute()"
            f"{', or add a RETURNING clause' if statement.kind == WRITE else ''}; nothing was executed",
            sql=statement.sql,
        )

    # Statements

    def level(self) -> Transaction | Detached | None:
        """The level that the caller is in."""
        level = self.current.get()
        if level is not None and level.ended:
            level = step_back(self.current, level)
        return level

    def _send(
        self, level: Transaction | Detached | None, operation: Any, statement: Statement, params: Any, extra: Any
    ) -> Awaitable[Any]:
        """Hands a statement over; gives what its answer is to be awaited from. `level` is the current one."""
        # As they are now; another task may go on to change them. To look for buffers among the values would cost too much.
        kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
        if kind is dict:
            params = params.copy()
        elif kind is not tuple and params is not None:
            params = still(params)
        if level is not None:
            if level.ended:
                level = step_back(self.current, level)
            if level is not None and type(level) is not Detached:
                transaction: Transaction = level  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
                request = transaction.pool.request(STATEMENT, operation, statement, params, extra)
                if statement.kind != READ:
                    if transaction.readonly:
                        transaction.refuse_write(statement)
                    if attempts:
                        note(request, transaction.root.attempt)
                return transaction.send(request)
        pool = self._recent
        if pool is None or pool.loop() is not current_loop():
            pool = self.pool()
        if statement.kind == READ:
            request = pool.request(STATEMENT, operation, statement, params, extra)
            if pool.inline is None or not pool.inline.read(request):
                pool.reads.submit(request)
        else:
            if level is not None:
                refuse_waiting_for_itself(level, pool)
            request = pool.request(STATEMENT if statement.kind == WRITE else ALONE, operation, statement, params, extra)
            if attempts:
                note(request)
            pool.writes.submit(request)
        return request

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
        statement = self._statements.get(query) or self._analyse(query)
        if statement.kind == CONTROL:
            raise self._unfit("execute", statement)
        if type(query) is not str:
            self._check_operation("execute", query)
        level = self.current.get()
        if level is not None and level.session is not None:
            return cast("Result", level.execute_here(self._operations.execute, statement, params, None))
        result: Result = await self._send(level, self._operations.execute, statement, params, None)
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
        statement = self._rows_from("fetch_one", query)
        if type(query) is not str:
            record_class = record_class or self._check_operation("fetch_one", query)
        level = self.current.get()
        if level is not None and level.session is not None:
            return level.execute_here(self._operations.fetch_one, statement, params, record_class)
        return await self._send(level, self._operations.fetch_one, statement, params, record_class)

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
        statement = self._rows_from("fetch_all", query)
        if type(query) is not str:
            record_class = record_class or self._check_operation("fetch_all", query)
        level = self.current.get()
        if level is not None and level.session is not None:
            return cast("list[Any]", level.execute_here(self._operations.fetch_all, statement, params, record_class))
        rows: list[Any] = await self._send(level, self._operations.fetch_all, statement, params, record_class)
        return rows

    async def fetch_value(self, query: Query, params: Parameters = None, *, default: Any = None) -> Any:
        """The first column of the first row; `default` if there is no row. Other arguments and errors as `fetch_one`."""
        statement = self._rows_from("fetch_value", query)
        if type(query) is not str:
            self._check_operation("fetch_value", query)
        level = self.current.get()
        if level is not None and level.session is not None:
            return level.execute_here(self._operations.fetch_value, statement, params, default)
        return await self._send(level, self._operations.fetch_value, statement, params, default)

    @staticmethod
    def _check_operation(method: str, query: Any) -> Callable[..., Any] | None:
        """Holds the operator of an aiosql query against the method; gives its record class."""
        operation = getattr(query, "operation", None)
        name = getattr(operation, "name", "SELECT")
        allowed = _OPERATIONS[method]
        if name not in allowed:
            raise QueryExecutionError(
                f"{method}() does not fit the query {getattr(query, '__name__', '?')!r}, which is declared as"
                f" {name.lower().replace('_', ' ')}: use {_METHODS.get(name, 'another method')}; nothing was executed",
                sql=getattr(query, "sql", None),
            )
        return getattr(query, "record_class", None)

    async def execute_many(self, query: Query, rows: Iterable[Any]) -> Result:
        """Executes a statement once for every row of parameters: all or nothing.

        Args:
            query: An INSERT, UPDATE or DELETE without RETURNING.
            rows: Parameters, each as for `execute`. An iterator is consumed on the database's thread, as it goes.

        Returns:
            The total number of rows changed.
        """
        statement = self._statements.get(query) or self._analyse(query)
        if type(query) is not str:
            self._check_operation("execute_many", query)
        if statement.kind != WRITE or statement.returns_rows:
            if statement.kind == CONTROL:
                raise self._unfit("execute_many", statement)
            raise QueryExecutionError(
                "execute_many() takes an INSERT, UPDATE or DELETE without RETURNING; nothing was executed",
                sql=statement.sql,
            )
        return cast("Result", await self._send_unit(MANY, self._operations.execute_many, statement, rows))

    def _send_unit(
        self, kind: int, operation: Any, what: Any, params: Any, extra: Any = None, *, label: object = None,
        readonly: bool = False, options: Options | None = None,
    ) -> Awaitable[Any]:  # fmt: skip
        """Hands several statements over as one; gives what their answer is to be awaited from."""
        level = self.level()
        if isinstance(level, Transaction):
            if level.readonly and kind == MANY:
                level.refuse_write(cast("Statement", what[0][0] if isinstance(what, list) else what))
            pool = level.pool
        else:
            pool = self.reading_pool(options) if readonly else self.pool()
        request = pool.request(kind, operation, what, params, extra, label)
        return self._send_request(level, pool, request, readonly=readonly)

    def _send_request(
        self, level: Transaction | Detached | None, pool: Pool, request: Request, *, readonly: bool
    ) -> Awaitable[Any]:
        if isinstance(level, Transaction):
            if attempts and not (readonly or level.readonly):
                note(request, level.root.attempt)
            return level.send(request)
        if readonly:
            pool.reads.submit(request)
        else:
            if level is not None:
                refuse_waiting_for_itself(level, pool)
            if attempts:
                note(request)
            pool.writes.submit(request)
        return request

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
        if self._engine is None:
            self._resolve()
        await self._send_unit(SCRIPT, self._operations.execute_script, text, None)

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
        return Stream(self, query, params, chunk_size, record_class, _origin("stream()", 1))

    async def run(self, function: Callable[Concatenate[Any, ...], T], *args: Any, readonly: bool = False) -> T:
        """Runs `function(connection, *args)` on the connection's own thread, in one transaction.

        Args:
            function: An ordinary function. It must neither commit nor roll back (an exception rolls back), nor keep the
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
        if self._engine is None:
            self._resolve()
        name = getattr(function, "__qualname__", repr(function))
        level = self.level()
        operation = self._operations.call
        if readonly and isinstance(level, Transaction) and not level.readonly:
            async with self.transaction(readonly=True):
                return cast("T", await self._send_unit(UNIT, operation, function, args, label=f"db.run({name})"))
        return cast(
            "T",
            await self._send_unit(UNIT, operation, function, args, label=f"db.run({name})", readonly=readonly),
        )

    def is_here(self) -> bool:
        """Whether the caller runs on this database's thread already: then an offloaded function is an ordinary level."""
        level = self.current.get()
        return level is not None and level.session is not None

    async def offload(
        self, job: Job, *, readonly: bool, options: Options | None = None, limit: TimeLimit | None = None
    ) -> Any:
        """Sends a call of a coroutine function to the database's thread; see `database.session.offload`."""
        level = self.level()
        if isinstance(level, Transaction):
            level.check()
            refuse_writing_in_readonly(level, readonly)
            if options is not None:
                refuse_isolation(level, options)
            pool = level.pool
            job.parent = level
            behind: list[Any] | None = level.callbacks
        else:
            pool = self.reading_pool(options) if readonly else self.pool()
            if options is not None:
                job.isolation = options.isolation
            behind = None if limit is None else limit.callbacks
        request = pool.request(UNIT, job.drive, job, None, pool, job)
        try:
            result, callbacks = await self._send_request(level, pool, request, readonly=readonly)
        except BaseException as error:
            callbacks = job.failed(request, error)
            if behind is not None:
                behind += callbacks
            elif callbacks:
                await run_behind(self, callbacks, shield=not isinstance(error, Exception))
            raise
        if job.parent is None:
            job.committed = True
        if callbacks:
            if behind is not None:
                behind += callbacks
            else:
                await run_behind(self, callbacks)
        return result

    async def call_aiosql(
        self, method: Any, sql: str, params: Any, record_class: Any = None, *, record: bool = False
    ) -> Any:
        """Runs a method of aiosql's synchronous adapter on the worker; see `database.session.queries`."""
        statement = self._statements.get(sql) or self._analyse(sql)
        if statement.kind == CONTROL:
            raise self._unfit("this query", statement)
        how = (method, (record_class,) if record else None)
        level = self.current.get()
        if level is not None and level.session is not None:
            return level.execute_here(self._operations.call_aiosql, statement, params, how)
        return await self._send(level, self._operations.call_aiosql, statement, params, how)

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
        return TransactionContext(self, _origin("db.transaction()", 1), readonly, timeout, propagation, options)

    async def begin(self, readonly: bool = False) -> Transaction:
        """Begins a transaction that `commit()` or `rollback()` ends; within one, a nested level of it.

        It belongs to this task and to tasks started from now on. If the task ends first, it is rolled back with a
        warning.
        """
        origin = _origin("db.begin()", 1)
        entered, _ = await enter(self, origin, readonly=readonly, propagation="nested", manual=True)
        level = cast("Transaction", entered)
        if level.session is None:
            level.watch = level.pool.waker.on_task_end(level.roll_back_unattended)
        return level

    async def commit(self) -> None:
        """Commits what `begin()` began; inside a decorated function, what was done so far.

        Raises:
            TransactionError: No transaction is open, or it can only be rolled back.
        """
        level = self._open_level()
        if level is None:
            raise TransactionError("commit(): no transaction is open; call begin() first")
        if not level.manual:
            await level.commit()
            return
        try:
            await level.finish()
        except BaseException:
            self._step_out(level)
            await run_behind(self, level.take_callbacks(), shield=True)
            raise
        self._step_out(level)
        await run_behind(self, level.take_callbacks())

    async def rollback(self) -> None:
        """Rolls back what `begin()` began; inside a decorated function, what was done so far. Else does nothing."""
        level = self._open_level()
        if level is None:
            return
        if not level.manual:
            await level.rollback()
            return
        try:
            await level.abandon()
        finally:
            self._step_out(level)

    async def flush(self) -> None:
        """Returns once everything that was handed over so far has been executed. It does not commit."""
        level = self._open_level()
        if level is not None:
            if level.root.lease is not None or level.session is not None:
                await level.run(level.pool.request(STATEMENT, _nothing, None, None, None, "flush"), in_turn=False)
            return
        await self.open()

    @property
    def in_transaction(self) -> bool:
        """Whether this task is inside an open transaction on this database, and on its event loop."""
        level = self.level()
        return isinstance(level, Transaction) and not level.ended and not level.is_elsewhere

    def _open_level(self) -> Transaction | None:
        level = self.level()
        if not isinstance(level, Transaction):
            return None
        if level.ended or level.is_elsewhere:
            raise level.refusal()
        return level

    def _step_out(self, level: Transaction) -> None:
        if self.current.get() is level:
            self.current.set(level.around)

    def on_commit(self, function: Callable[[], Any]) -> None:
        """Runs a function after the outermost commit, never after a rollback; at once where no transaction is open.

        Args:
            function: An ordinary function, or a coroutine function: awaited behind the commit; in a task of its own
                where no transaction is open, for this method does not wait.
        """
        level = self._open_level()
        if level is not None:
            level.on_commit(function)
            return
        if attempts:
            leave_behind()
        result = function()
        if inspect.isawaitable(result):
            self.pool().waker.spawn(partial(self._await_callback, result))

    async def _await_callback(self, result: Awaitable[Any]) -> None:
        try:
            await result
        except Exception as error:  # nobody waits for it who could be told
            logger = logging.getLogger("database.transaction")
            aside(partial(logger.error, "database %s: an on_commit() function failed", self.name, exc_info=error))

    def detached(self) -> AbstractContextManager[None]:
        """`with db.detached():` steps outside the current transaction: for tasks that outlive it."""
        return detached(self.current)

    def batch(self, size: int = 1000) -> Batch:
        """Many writes, sent together and committed every `size`: `async with db.batch() as batch: ...`.

        Inside a transaction they are sent together all the same, and committed with it.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        return Batch(self, size)

    async def send_batch(self, items: list[tuple[Statement, Any]]) -> None:
        """Executes what a batch has collected, in one transaction."""
        await self._send_unit(MANY, self._operations.execute_batch, items, None, label="batch")

    def batch_statement(self, query: Query) -> Statement:
        """The statement, if it may stand in a batch."""
        statement = self._statements.get(query) or self._analyse(query)
        if statement.kind != WRITE:
            raise (
                self._unfit("batch.execute", statement)
                if statement.kind == CONTROL
                else QueryExecutionError(
                    f"a batch takes INSERT, UPDATE and DELETE, not {statement.verb}; nothing was executed",
                    sql=statement.sql,
                )
            )
        level = self.level()
        if isinstance(level, Transaction) and level.readonly:
            level.refuse_write(statement)
        return statement

    # The rest

    def adapt(self, kind: type[T], function: Callable[[T], Any]) -> None:
        """Says how values of a type of yours are stored by this database; those of subclasses, too.

        `sqlite3.register_adapter` would say so to everybody in the process. Example::

            db.adapt(dict, json.dumps)
            db.adapt(Money, lambda money: money.cents)

        Args:
            kind: The class. It may be one that the package would store otherwise, such as `datetime` or `Decimal`.
            function: Makes of a value what can be stored: a number, a text, bytes, None, or whatever the package knows.

        Raises:
            ConfigurationError: SQLite stores the type as it is; or this database is of an engine that cannot do this.
        """
        if not isinstance(kind, type) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"database {self.name!r}: adapt() takes a class and a function")
        if kind in (int, float, str, bytes, bytearray, bool, type(None)):
            raise ConfigurationError(
                f"database {self.name!r}: {kind.__name__} is stored as it is; convert such values where they are given"
            )
        if self._engine is not None:
            self._refuse_adapting()
        self._adapters[kind] = function

    def _refuse_adapting(self) -> None:
        if not self.engine.adapts:
            raise ConfigurationError(
                f"database {self.name!r}: adapt() is for SQLite; on PostgreSQL, psycopg's own adapters say how types are stored"
            )

    def on_connect(self, function: C) -> C:
        """Has each new connection prepared by a function, before anybody uses it; also serves as a decorator.

        It is called as `function(connection)` with the driver's connection, on the connection's own thread, after what
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
        if self._pools or self._replica_pools:
            raise ConfigurationError(
                f"database {self.name!r} is open: on_connect comes before its first use, or after `await db.close()`"
            )
        if function not in self._steps:
            self._steps.append(function)
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
        target = str(path if isinstance(path, str) else os.fspath(path))
        pool = self.pool()
        lease = Lease(pool, _origin("backup()", 1), number=None, readonly=True, transaction=False)
        request = pool.request(SCRIPT, self._operations.backup, target, progress, 256, f"backup to {target}")
        try:
            lease.submit(request)
            await request
        finally:
            await give_back(lease, "the end of a backup")

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
        from database.engine.migrations import Order  # noqa: PLC0415  - few programs need it, and those once

        path = self._migrations_folder(folder)
        if self.in_transaction:
            raise TransactionError(
                "migrate() opens transactions of its own, and was called inside one; call it outside"
            )
        order = Order(path, dry_run, to, baseline, wait, progress)
        operation = self._migrating("migrate")
        return cast("MigrationReport", await self._send_unit(SCRIPT, operation, order, None, label="migrate()"))

    async def migration_status(self, folder: str | os.PathLike[str] | None = None) -> MigrationStatus:
        """Which migrations the database has had, and which are pending; changes nothing.

        Args:
            folder: As for `migrate`.

        Raises:
            MigrationError: The folder contradicts what was applied.
        """
        from database.engine.migrations import MigrationStatus, load, pending  # noqa: PLC0415  - as above

        path = self._migrations_folder(folder)
        operation = self._migrating("applied_migrations")
        applied = await self._send_unit(SCRIPT, operation, None, None, label="migration_status()", readonly=True)
        return MigrationStatus(applied, pending(load(path, self.engine.name), applied, path))

    def _migrating(self, operation: str) -> Any:
        found = getattr(self._operations, operation, None)
        if found is None:
            raise ConfigurationError(f"database {self.name!r}: the engine {self.engine.name} has no migrations")
        return found

    def _migrations_folder(self, folder: str | os.PathLike[str] | None) -> str:
        self._resolve()  # the configuration may be another one since the last pool was closed
        chosen = getattr(self._settings, "migrations", None) if folder is None else os.fspath(folder)
        if not chosen:
            raise ConfigurationError(
                f"database {self.name!r} has no migrations: set `migrations` in the configuration to their folder, or"
                " name it in the call"
            )
        return str(chosen)

    def prepare_stream(self, query: Query) -> tuple[Statement, Callable[..., Any] | None, Any]:
        """What a stream needs: the statement, the query's record class, the engine's operations."""
        statement = self._rows_from("stream", query)
        record_class = None if type(query) is str else self._check_operation("fetch_all", query)
        return statement, record_class, self._operations

    def stats(self) -> PoolStats:
        """What this database's pool on the running event loop is doing; all zero if none is open.

        Where it has no pool (another thread, another loop), of all its pools together: for a monitor, or a metrics thread.
        """
        loop = current_loop()
        pool = self._pools.get(id(loop))
        if pool is not None and pool.loop() is loop:
            return pool.stats()
        return PoolStats.of(tuple(self._pools.values()))

    async def open(self) -> None:
        """Opens the pool now instead of at its first use: an application that cannot reach its data need not start."""
        level = self.level()
        pool = self.pool()
        if level is not None and type(level) is Detached:
            refuse_waiting_for_itself(level, pool)
        request = pool.request(SCRIPT, _nothing, None, None, None, "open")
        pool.writes.submit(request)
        await request

    async def close(self, drain: float = DRAIN_SECONDS) -> None:
        """Closes this database's pool on this event loop; the next use opens another.

        What waits gets `PoolClosedError`; open transactions are rolled back.

        Args:
            drain: Seconds for which single statements that run already may go on; then they are interrupted.

        Raises:
            TransactionError: Called inside a transaction on this database.
        """
        level = self.level()
        if isinstance(level, Transaction) and not level.ended and level.pool is self._pools.get(id(current_loop())):
            raise TransactionError(f"close() was called inside a transaction, begun by {level.origin()}; end it first")
        loop = current_loop()
        for pools in (self._replica_pools, self._pools):
            pool = pools.get(id(loop))
            if pool is not None and pool.loop() is loop:
                await pool.close(drain)

    def pools(self) -> list[Pool]:
        """The open pools, of all event loops."""
        return [*self._pools.values(), *self._replica_pools.values()]

    def park(self) -> Parked:
        """Puts this handle's pools and transactions aside, as if it had never been used; see `database.sandbox`."""
        parked = self._pools, self._replica_pools, self.current
        self._pools, self._replica_pools, self._recent = {}, {}, None
        self.current = ContextVar(f"database {self.name}", default=None)
        return parked

    def unpark(self, parked: Parked) -> None:
        """Takes up what `park` has put aside. What has been opened since must have been closed."""
        pools, replica_pools, self.current = parked
        self._recent = None
        self._pools = {key: pool for key, pool in pools.items() if not pool.closing}
        self._replica_pools = {key: pool for key, pool in replica_pools.items() if not pool.closing}

    def forget_pools(self) -> None:
        """In a forked child: the pools are the parent's."""
        self._pools.clear()
        self._replica_pools.clear()
        self._recent = None


def _monitor(chosen: settings.Settings) -> Any:
    """The module that offers a pool's statistics; None where nobody wants them, and then it is not even imported."""
    if getattr(chosen, "monitor", None) is None:
        return None
    from database.driver import monitor  # noqa: PLC0415  - most processes are not watched

    return monitor


def _origin(what: str, depth: int) -> Origin:
    frame = sys._getframe(depth + 1)  # pyright: ignore[reportPrivateUsage]  - no other way to see who calls
    return Origin(what, frame.f_code, frame.f_lineno)


def _nothing(_session: Any, _statement: Any, _params: Any, _extra: Any) -> None:
    """The operation of a request that only wants to be reached."""


_OPERATIONS = {
    "execute": frozenset({"INSERT_RETURNING", "INSERT_UPDATE_DELETE", "INSERT_UPDATE_DELETE_MANY"}),
    "execute_many": frozenset({"INSERT_RETURNING", "INSERT_UPDATE_DELETE", "INSERT_UPDATE_DELETE_MANY"}),
    "fetch_one": frozenset({"SELECT", "SELECT_ONE", "SELECT_VALUE", "INSERT_RETURNING"}),
    "fetch_all": frozenset({"SELECT", "SELECT_ONE", "SELECT_VALUE", "INSERT_RETURNING"}),
    "fetch_value": frozenset({"SELECT", "SELECT_ONE", "SELECT_VALUE", "INSERT_RETURNING"}),
}
_METHODS = {
    "INSERT_RETURNING": "execute()",
    "INSERT_UPDATE_DELETE": "execute()",
    "INSERT_UPDATE_DELETE_MANY": "execute_many()",
    "SCRIPT": "execute_script()",
    "SELECT": "fetch_all()",
    "SELECT_ONE": "fetch_one()",
    "SELECT_VALUE": "fetch_value()",
}
