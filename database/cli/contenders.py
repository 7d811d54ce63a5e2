"""`bench`: the ways to use SQLite that are compared: plain sqlite3, this package, and whichever peers are installed.

Each gets what this package gives itself: WAL, the configured `synchronous`, prepared statements kept, the fastest way that
its documentation shows; and, where tasks share one connection, a lock around each transaction, without which transactions
of two tasks would be mixed up.
"""

from __future__ import annotations

import asyncio
import sqlite3
from importlib import import_module
from typing import Any, ClassVar

from database.session.registry import close_all, configure
from database.sqlite3 import get_db, transactional

__all__ = ["CONTENDERS", "ITEMS", "TASKS", "Contender"]

ITEMS = 10_000
TASKS = 50

_POINT = "SELECT id, name FROM item WHERE id = ?"
_INSERT = "INSERT INTO log (item, note) VALUES (?, 'a line of the log')"
_UPDATE = "UPDATE item SET hits = hits + 1 WHERE id = ?"
_ALL = "SELECT id, name, hits FROM item"
_MANY = "INSERT INTO log (item, note) VALUES (?, 'a line of the log')"
_BULK = [(key,) for key in range(1000)]


class Contender:
    """One way to use SQLite, on one database file."""

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    """What has to be installed."""
    concurrent: ClassVar[bool] = True
    """Whether several tasks mean anything to it."""
    methods: ClassVar[tuple[str, ...]] = ("point", "insert", "transact", "many", "rows")
    """What it does in a way of its own."""

    def __init__(self, path: str, synchronous: str) -> None:
        self.path = path
        self.synchronous = synchronous

    async def open(self) -> None:
        """Makes ready."""

    async def close(self) -> None:
        """Lets go of everything."""

    async def point(self, key: int) -> Any:
        """A row by its key: (id, name)."""
        raise NotImplementedError

    async def insert(self, key: int) -> None:
        """One INSERT, committed when it returns."""
        raise NotImplementedError

    async def transact(self, key: int) -> None:
        """A transaction: an INSERT and an UPDATE."""
        raise NotImplementedError

    async def rows(self) -> int:
        """All rows of a table, at once; gives how many."""
        raise NotImplementedError

    async def many(self) -> None:
        """A thousand rows in one transaction."""
        raise NotImplementedError


class Raw(Contender):
    """The ceiling: the standard library in a loop, without an event loop in between."""

    name = "sqlite3 in a loop"
    concurrent = False

    async def open(self) -> None:
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute(f"PRAGMA synchronous = {self.synchronous}")

    async def close(self) -> None:
        self.db.close()

    async def point(self, key: int) -> Any:
        return self.db.execute(_POINT, (key,)).fetchone()

    async def insert(self, key: int) -> None:
        self.db.execute(_INSERT, (key,))

    async def transact(self, key: int) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute(_INSERT, (key,))
        self.db.execute(_UPDATE, (key,))
        self.db.execute("COMMIT")

    async def rows(self) -> int:
        return len(self.db.execute(_ALL).fetchall())

    async def many(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany(_MANY, _BULK)
        self.db.execute("COMMIT")


class Ours(Contender):
    """This package."""

    name = "this package"

    async def open(self) -> None:
        configure({"database": {"sqlite": {"path": self.path, "synchronous": self.synchronous, "init_sql": ""}}})
        self.db = get_db()

        @transactional
        async def transact(key: int) -> None:
            await self.db.execute(_INSERT, (key,))
            await self.db.execute(_UPDATE, (key,))

        self._transact = transact

    async def close(self) -> None:
        await close_all()

    async def point(self, key: int) -> Any:
        return await self.db.fetch_one(_POINT, (key,))

    async def insert(self, key: int) -> None:
        await self.db.execute(_INSERT, (key,))

    async def transact(self, key: int) -> None:
        await self._transact(key)

    async def rows(self) -> int:
        return len(await self.db.fetch_all(_ALL))

    async def many(self) -> None:
        await self.db.execute_many(_MANY, _BULK)


class Offload(Ours):
    """This package, a transaction function sent whole to the database's thread."""

    name = "this package, offload"
    methods = ("transact",)

    async def open(self) -> None:
        await super().open()

        @transactional(offload=True)
        async def transact(key: int) -> None:
            await self.db.execute(_INSERT, (key,))
            await self.db.execute(_UPDATE, (key,))

        self._transact = transact


class Aiosqlite(Contender):
    """One shared connection, one hop a query where its interface has that."""

    name = "aiosqlite"
    package = "aiosqlite"

    async def open(self) -> None:
        aiosqlite: Any = import_module("aiosqlite")
        self.db: Any = await aiosqlite.connect(self.path, isolation_level=None)
        await self.db.execute(f"PRAGMA synchronous = {self.synchronous}")
        self.lock = asyncio.Lock()

    async def close(self) -> None:
        await self.db.close()

    async def point(self, key: int) -> Any:
        return (await self.db.execute_fetchall(_POINT, (key,)))[0]

    async def insert(self, key: int) -> None:
        async with self.lock:
            await self.db.execute(_INSERT, (key,))

    async def transact(self, key: int) -> None:
        async with self.lock:
            await self.db.execute("BEGIN IMMEDIATE")
            await self.db.execute(_INSERT, (key,))
            await self.db.execute(_UPDATE, (key,))
            await self.db.commit()

    async def rows(self) -> int:
        return len(await self.db.execute_fetchall(_ALL))

    async def many(self) -> None:
        async with self.lock:
            await self.db.execute("BEGIN IMMEDIATE")
            await self.db.executemany(_MANY, _BULK)
            await self.db.commit()


class SqlAlchemy(Contender):
    """SQLAlchemy's asyncio engine on aiosqlite, with SQL text and a pool of its own."""

    name = "SQLAlchemy + aiosqlite"
    package = "sqlalchemy"

    async def open(self) -> None:
        sqlalchemy: Any = import_module("sqlalchemy")
        engine: Any = import_module("sqlalchemy.ext.asyncio").create_async_engine(
            f"sqlite+aiosqlite:///{self.path}",
            connect_args={"timeout": 30},
            pool_size=5,
            max_overflow=0,
            pool_timeout=120,
        )

        def connected(connection: Any, _record: Any) -> None:
            connection.isolation_level = None
            connection.execute(f"PRAGMA synchronous = {self.synchronous}").close()

        def begun(connection: Any) -> None:
            if connection.get_execution_options().get("writes"):  # a single SELECT is its own transaction
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        sqlalchemy.event.listen(engine.sync_engine, "connect", connected)
        sqlalchemy.event.listen(engine.sync_engine, "begin", begun)
        self.engine = engine
        self.writer: Any = engine.execution_options(writes=True)
        self.sql = {sql: sqlalchemy.text(sql.replace("?", ":key")) for sql in (_POINT, _INSERT, _UPDATE, _ALL)}
        self.lock = asyncio.Lock()  # else its connections would meet each other's lock in SQLite, and wait by sleeping

    async def close(self) -> None:
        await self.engine.dispose()

    async def point(self, key: int) -> Any:
        async with self.engine.connect() as connection:
            return (await connection.execute(self.sql[_POINT], {"key": key})).one()

    async def insert(self, key: int) -> None:
        async with self.lock, self.writer.begin() as connection:
            await connection.execute(self.sql[_INSERT], {"key": key})

    async def transact(self, key: int) -> None:
        async with self.lock, self.writer.begin() as connection:
            await connection.execute(self.sql[_INSERT], {"key": key})
            await connection.execute(self.sql[_UPDATE], {"key": key})

    async def rows(self) -> int:
        async with self.engine.connect() as connection:
            return len((await connection.execute(self.sql[_ALL])).all())

    async def many(self) -> None:
        async with self.lock, self.writer.begin() as connection:
            await connection.execute(self.sql[_INSERT], [{"key": key} for (key,) in _BULK])


CONTENDERS: tuple[type[Contender], ...] = (Raw, Ours, Offload, Aiosqlite, SqlAlchemy)
