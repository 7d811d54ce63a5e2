"""`db.stream()`: rows as they come, with the next chunk fetched while the last one is consumed."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from database.driver.lease import Lease
from database.driver.observer import aside
from database.driver.pool import Pool
from database.driver.request import STATEMENT, Request
from database.driver.wakeup import current_loop
from database.engine.statement import READ, WRITES, Statement
from database.errors import PoolClosedError, QueryExecutionError, ReadOnlyTransactionError, TransactionError
from database.session.binding import Binding
from database.session.origin import Origin
from database.session.statements import check_operation, still
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from types import TracebackType

    from database.session.statements import Query

__all__ = ["Stream"]

T = TypeVar("T")

FIRST_CHUNK = 16
"""Rows in the first chunk, so that the first row comes early; each further chunk is four times as large."""

_keys = itertools.count(1)


class Stream(Generic[T]):
    """An asynchronous context manager that gives itself, an asynchronous iterator over rows."""

    __slots__ = (
        "_binding",
        "_chunk_size",
        "_done",
        "_failure",
        "_generator",
        "_key",
        "_lease",
        "_level",
        "_next",
        "_origin",
        "_params",
        "_pending",
        "_pool",
        "_query",
        "_record_class",
        "_rows",
        "_size",
        "_state",
        "_statement",
    )

    def __init__(
        self,
        binding: Binding,
        query: Query,
        params: Any,
        chunk_size: int,
        record_class: Callable[..., Any] | None,
        origin: Origin,
    ) -> None:
        self._binding = binding
        self._query = query
        self._params = still(params)
        self._chunk_size = chunk_size
        self._record_class = record_class
        self._origin = origin
        self._key = next(_keys)
        self._size = min(FIRST_CHUNK, chunk_size)
        self._level: Transaction | None = None
        self._lease: Lease | None = None
        self._pool: Pool | None = None
        self._pending: tuple[Request, int] | None = None
        self._rows: Any = iter(())
        self._generator: Any = None
        self._done = False
        self._failure: BaseException | None = None
        self._state = "new"

    async def __aenter__(self) -> Stream[T]:
        if self._state != "new":
            raise TransactionError("a stream can be entered only once; call db.stream() again")
        self._state = "open"
        binding, query = self._binding, self._query
        statement = binding.statements.with_rows("stream", query)
        if type(query) is not str:
            record_class = check_operation("fetch_all", query)
            self._record_class = self._record_class or record_class
        level = binding.level()
        if isinstance(level, Transaction):
            if level.readonly and statement.kind in WRITES and not level.ended:
                raise ReadOnlyTransactionError(f"a read-only transaction refuses this {statement.verb}")
            self._level = level
        else:
            if statement.kind != READ:
                raise QueryExecutionError(
                    "stream() of a statement that writes needs a transaction around it; nothing was executed",
                    sql=statement.sql,
                )
            self._pool = binding.pool()
            self._origin.set_task()
            self._lease = Lease(self._pool, self._origin, number=None, readonly=True, transaction=False)
        try:
            await self._open(statement)
        except BaseException:
            await self._close()
            raise
        return self

    def __del__(self) -> None:
        """Thrown away between its first row and its end: takes the connection back. Any thread."""
        lease, pool = self._lease, self._pool
        if lease is not None and pool is not None and self._state == "open" and not lease.ended:
            pool.waker.post(
                [], partial(lease.let_go, partial(aside, partial(self._binding.observer.lost, self._origin())))
            )

    async def _open(self, statement: Statement) -> None:
        request = self._make(STATEMENT, self._binding.connection.open_stream, statement, self._params, self._key)
        if self._level is not None:
            await self._level.run(request)
        else:
            await self._send(request)

    def _make(self, *arguments: Any) -> Request:
        pool = self._pool if self._level is None else self._level.pool
        assert pool is not None
        return pool.request(*arguments)

    async def _send(self, request: Request) -> Any:
        lease = self._lease
        assert lease is not None
        self._check()
        if lease.doom is not None:
            raise lease.refusal()
        lease.submit(request)
        return await request

    def __aiter__(self) -> AsyncGenerator[T, None]:
        # A generator gives a row in half the time that a coroutine of ours would take. It ends with any exception, also
        # with a cancellation that the caller catches, so there may have to be another. The rows are the stream's.
        generator: AsyncGenerator[T, None] | None = self._generator
        if generator is None or self._generator.ag_frame is None:
            generator = self._generator = self._generate()
        return generator

    def __anext__(self) -> Awaitable[T]:
        return self.__aiter__().__anext__()

    async def _generate(self) -> AsyncGenerator[T, None]:
        while True:
            for row in self._rows:
                yield row
            if self._state != "open":
                raise TransactionError("the stream is over: its rows can be read only inside its `async with` block")
            if self._done:
                return
            await self._fetch()

    async def _fetch(self) -> None:
        """Makes the next chunk current and, outside a transaction, asks for the one behind it.

        A chunk that failed, or whose reading was called off, is gone: the cursor has moved on, nobody knows how far. Then
        the stream is over. One that was answered in the moment of a cancellation is kept for the reader that goes on.
        """
        if self._state != "open":
            raise TransactionError("the stream is over: its rows can be read only inside its `async with` block")
        if self._failure is not None:
            error = TransactionError(
                f"the stream cannot go on: rows were lost when its reading ended with {type(self._failure).__name__}."
                " Open another one"
            )
            error.__cause__ = self._failure
            raise error
        self._check()
        if self._pending is None:
            self._ask()
        request, size = cast("tuple[Request, int]", self._pending)
        try:
            rows = await self._answer(request)
        except BaseException as error:
            if not request.answered or request.error is not None:
                self._failure = error
                self._pending = None
            raise
        self._pending = None
        if len(rows) < size:
            self._done = True
        elif self._level is None:
            self._ask()
        self._rows = iter(rows)

    async def _answer(self, request: Request) -> Any:
        if request.answered:  # while the last chunk was consumed, or just when the one who waited was cancelled
            if request.error is not None:
                raise request.error
            return request.result
        if self._level is not None:
            return await self._level.run(request, in_turn=False)
        return await request

    def _check(self) -> None:
        """Makes sure that the stream is read on its own event loop; within a transaction that sees to it."""
        pool = self._pool
        if pool is not None and pool.loop() is not current_loop():
            raise TransactionError(
                f"the stream begun by {self._origin()} belongs to another event loop and can be read there alone"
            )

    def _request(self, size: int) -> Request:
        return self._make(
            STATEMENT, self._binding.connection.read_stream, self._key, size, self._record_class, "stream"
        )

    def _grow(self) -> int:
        size = self._size
        self._size = min(size * 4, self._chunk_size)
        return size

    def _ask(self) -> None:
        lease = self._lease
        if lease is not None and lease.doom is not None:
            raise lease.refusal()
        size = self._grow()
        request = self._request(size)
        if lease is not None:
            lease.submit(request)
        self._pending = request, size

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        """Gives the connection back. In a transaction the cursor is closed, at the latest when that ends."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._rows = iter(())
        generator = self._generator
        if generator is not None and generator.ag_frame is not None and not generator.ag_running:
            await generator.aclose()
        level = self._level
        if level is not None:
            if not self._done and not level.ended and level.root.doom is None:
                request = self._make(STATEMENT, self._binding.connection.close_stream, self._key, None, None, "stream")
                try:
                    await level.run(request, in_turn=False)
                except (TransactionError, PoolClosedError):
                    pass  # the transaction is over, and its cursors with it
            return
        lease = self._lease
        if lease is None:
            return
        pending = self._pending
        if pending is not None and not pending[0].answered and lease.pool.waker.is_current():
            lease.stop(pending[0])
        self._lease = None
        await lease.give_back("the end of a stream")
