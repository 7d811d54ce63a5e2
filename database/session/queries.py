"""aiosql: query files, in both calling styles.

aiosql reads the files and makes the functions. It asks its adapter whether it is asynchronous, and this one is: each of
its methods sends the method of the same name of aiosql's own *synchronous* adapter to a worker, where it runs on the
connection. So `await queries.insert_job(db, name=...)` works with a `Database` where aiosql expects a connection, and
the functions, carrying their SQL and their operator, can be handed to `db.execute` and `db.fetch_*` as well.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from database.errors import ConfigurationError
from database.session.loading import loader

if TYPE_CHECKING:
    from database.engine.statement import Row
    from database.session.database import Database
    from database.session.stream import Stream

__all__ = ["LoadedQueries", "LoadedQuery", "load_queries"]

if TYPE_CHECKING:

    class LoadedQuery:
        """A query function of whose parameters nothing is known; or a folder of them. `database.stubs` makes it known."""

        sql: str
        operation: Any
        record_class: Callable[..., Row] | None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Executes it: `await queries.insert_job(db, name="x")`."""

        def __getattr__(self, name: str) -> LoadedQuery: ...

    class LoadedQueries:
        """What `load_queries()` returns: the queries are its attributes."""

        available_queries: list[str]

        def __getattr__(self, name: str) -> LoadedQuery: ...

else:
    LoadedQuery = LoadedQueries = Any


class _Rows:
    """The rows of a select, all fetched at the first step: a half-read cursor would keep its connection.

    No generator, for one that is left half read is garbage that trio complains about.
    """

    def __init__(self, fetch: Callable[[], Awaitable[list[Any]]]) -> None:
        self._fetch = fetch
        self._rows: Iterator[Any] | None = None

    def __aiter__(self) -> _Rows:
        return self

    async def __anext__(self) -> Any:
        if self._rows is None:
            self._rows = iter(await self._fetch())
        for row in self._rows:
            return row
        raise StopAsyncIteration


class _Adapter:
    """aiosql's asynchronous adapter protocol over the synchronous one of each database's engine.

    `conn` is a `Database`. The SQL stays as it is written: engines know `:name`.
    """

    is_aio_driver = True

    def __init__(self) -> None:
        self._adapters: dict[str, Any] = {}

    def _method(self, conn: Database, name: str) -> Any:
        """The method of the synchronous adapter that fits the database."""
        engine = conn.engine
        adapter = self._adapters.get(engine.name)
        if adapter is None:
            adapter = self._adapters[engine.name] = engine.adapter()
        return getattr(adapter, name)

    def process_sql(self, query_name: str, op_type: Any, sql: str) -> str:
        return sql

    def select(
        self, conn: Database, _name: str, sql: str, parameters: Any, record_class: Any = None
    ) -> AsyncIterator[Any]:
        return _Rows(lambda: conn.call_aiosql(self._method(conn, "select"), sql, parameters, record_class, record=True))

    async def select_one(self, conn: Database, _name: str, sql: str, parameters: Any, record_class: Any = None) -> Any:
        return await conn.call_aiosql(self._method(conn, "select_one"), sql, parameters, record_class, record=True)

    async def select_value(self, conn: Database, _name: str, sql: str, parameters: Any) -> Any:
        return await conn.call_aiosql(self._method(conn, "select_value"), sql, parameters)

    def select_cursor(self, conn: Database, _name: str, sql: str, parameters: Any) -> Stream[Any]:
        return conn.stream(sql, parameters)

    async def insert_returning(self, conn: Database, _name: str, sql: str, parameters: Any) -> Any:
        return await conn.call_aiosql(self._method(conn, "insert_returning"), sql, parameters)

    async def insert_update_delete(self, conn: Database, _name: str, sql: str, parameters: Any) -> Any:
        return await conn.call_aiosql(self._method(conn, "insert_update_delete"), sql, parameters)

    async def insert_update_delete_many(self, conn: Database, _name: str, sql: str, parameters: Any) -> Any:
        return (await conn.execute_many(sql, parameters)).rowcount

    async def execute_script(self, conn: Database, sql: str) -> str:
        # Not by the synchronous adapter: `executescript` would commit the open transaction.
        await conn.execute_script(sql)
        return "DONE"


def load_queries(path: str | os.PathLike[str], record_classes: Mapping[str, Any] | None = None) -> LoadedQueries:
    """Loads an aiosql file, or a folder of them, with all operators (`^ $ ! <! *! #` and none), for databases of any engine.

    Args:
        path: The file or folder.
        record_classes: Classes by the names that `-- record_class:` comments give.

    Returns:
        aiosql's `Queries`. Type checkers take every name for a query of it; `python -m database.stubs` tells them more.

    Raises:
        ConfigurationError: It cannot be read, or aiosql cannot parse it.
    """
    import aiosql  # noqa: PLC0415  - only those who use query files pay for it
    from aiosql.utils import SQLLoadException, SQLParseException  # noqa: PLC0415

    class RecordingQueries(aiosql.aiosql.Queries):  # type: ignore[misc, name-defined]
        """Keeps each query's record class where `db.fetch_all(queries.name)` finds it."""

        def load_from_list(self, query_data: Any) -> Any:
            super().load_from_list(query_data)
            for datum in query_data:
                getattr(self, datum.query_name.rpartition(".")[2]).__func__.record_class = datum.record_class
            return self

        def load_from_tree(self, query_data_tree: Any) -> Any:
            for name, value in query_data_tree.items():
                if isinstance(value, dict):
                    child = RecordingQueries(self.driver_adapter, self._kwargs_only).load_from_tree(value)
                    self.add_child_queries(name, child)
                else:
                    self.load_from_list([value])
            return self

    try:
        load: Any = aiosql.from_path  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return cast(
            "LoadedQueries",
            load(
                Path(path),
                _Adapter,
                record_classes=dict(record_classes or {}),
                kwargs_only=False,
                mandatory_parameters=False,
                queries_cls=RecordingQueries,
                loader_cls=loader(),
            ),
        )
    except (SQLLoadException, SQLParseException, OSError, ValueError) as error:
        raise ConfigurationError(f"queries cannot be loaded from {os.fspath(path)!r}: {error}") from error
