"""The neighbours, each as its documentation uses it and in the fastest form its public interface allows.

All get what this package gives itself: WAL (it is stored in the file), the ``synchronous`` asked for,
prepared statements kept, and, where one connection is shared by many tasks, a lock around a transaction,
without which the transactions of two tasks would be mixed up.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from typing import Any

import anyio

from .contenders import BACKENDS, Contender
from .store import ALL, INSERT, NOTE, POINT, SINK, SLOW, UPDATE

BUSY_TIMEOUT = 30.0


class Aiosqlite(Contender):
    """One shared connection, cursors as context managers, as in the README."""

    name = "aiosqlite"
    requires = ("aiosqlite",)
    about = "one shared connection, cursors as context managers, as documented"
    chunk = 64  # the default

    async def open(self) -> None:
        import aiosqlite

        self.db = await aiosqlite.connect(self.path, timeout=BUSY_TIMEOUT, iter_chunk_size=self.chunk)
        await self.db.execute(f"PRAGMA synchronous = {self.synchronous}")
        self.lock = asyncio.Lock()

    async def close(self) -> None:
        await self.db.close()

    async def point(self, key: int) -> Any:
        async with self.db.execute(POINT, (key,)) as cursor:
            return await cursor.fetchone()

    async def three(self, keys: Sequence[int]) -> list[Any]:
        async with self.lock:
            await self.db.execute("BEGIN")
            rows = [await self.point(key) for key in keys]
            await self.db.commit()
        return rows

    async def transact(self, key: int) -> None:
        async with self.lock:
            await self.db.execute(INSERT, (key, NOTE))
            await self.db.execute(UPDATE, (key,))
            await self.db.commit()

    async def insert(self, key: int) -> None:
        async with self.lock:
            await self.db.execute(INSERT, (key, NOTE))
            await self.db.commit()

    async def fetch_all(self) -> Sequence[Any]:
        async with self.db.execute(ALL) as cursor:
            return list(await cursor.fetchall())

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        async with self.db.execute(ALL) as cursor:
            async for row in cursor:
                count += 1
                total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.lock:
            await self.db.executemany(SINK, rows)
            await self.db.commit()

    async def slow(self, n: int) -> int:
        async with self.db.execute(SLOW, (n,)) as cursor:
            row = await cursor.fetchone()
        assert row is not None
        return row[0]


class AiosqliteFastest(Aiosqlite):
    """One shared connection, one hop a query (``execute_fetchall``), an autocommit one for single INSERTs."""

    name = "aiosqlite fastest"
    about = "one shared connection, `execute_fetchall`, autocommit INSERTs; mixed: reads see the open transaction"
    chunk = 1000

    async def open(self) -> None:
        import aiosqlite

        await super().open()
        self.autocommit = await aiosqlite.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
        await self.autocommit.execute(f"PRAGMA synchronous = {self.synchronous}")

    async def close(self) -> None:
        await self.autocommit.close()
        await super().close()

    async def point(self, key: int) -> Any:
        return (await self.db.execute_fetchall(POINT, (key,)))[0]  # type: ignore[index]

    async def insert(self, key: int) -> None:
        await self.autocommit.execute(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        return list(await self.db.execute_fetchall(ALL))

    async def slow(self, n: int) -> int:
        return (await self.db.execute_fetchall(SLOW, (n,)))[0][0]  # type: ignore[index]


class AiosqlitePerUse(Contender):
    """A connection opened for every use: the README's first example, and what web applications often do."""

    name = "aiosqlite per use"
    requires = ("aiosqlite",)
    about = "a connection opened for every use, as in the README's first example (SQLite's default `synchronous`)"

    async def open(self) -> None:
        import aiosqlite

        self.connect = aiosqlite.connect

    async def point(self, key: int) -> Any:
        async with self.connect(self.path) as db, db.execute(POINT, (key,)) as cursor:
            return await cursor.fetchone()

    async def transact(self, key: int) -> None:
        async with self.connect(self.path, timeout=BUSY_TIMEOUT) as db:
            await db.execute(INSERT, (key, NOTE))
            await db.execute(UPDATE, (key,))
            await db.commit()

    async def insert(self, key: int) -> None:
        async with self.connect(self.path, timeout=BUSY_TIMEOUT) as db:
            await db.execute(INSERT, (key, NOTE))
            await db.commit()


class Aiosqlitepool(Contender):
    """A pool of aiosqlite connections, its README's way and its default size of five."""

    name = "aiosqlitepool"
    requires = ("aiosqlite", "aiosqlitepool")
    about = "pool of aiosqlite connections, as documented"

    async def _connect(self) -> Any:
        import aiosqlite

        connection = await aiosqlite.connect(self.path, timeout=BUSY_TIMEOUT)
        await connection.execute(f"PRAGMA synchronous = {self.synchronous}")
        return connection

    async def open(self) -> None:
        from aiosqlitepool import SQLiteConnectionPool

        self.pool = SQLiteConnectionPool(self._connect, pool_size=self.readers)
        self.lock = asyncio.Lock()

    async def close(self) -> None:
        await self.pool.close()

    async def point(self, key: int) -> Any:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(POINT, (key,))
            return await cursor.fetchone()

    async def transact(self, key: int) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(INSERT, (key, NOTE))
            await connection.execute(UPDATE, (key,))
            await connection.commit()

    async def insert(self, key: int) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(INSERT, (key, NOTE))
            await connection.commit()

    async def fetch_all(self) -> Sequence[Any]:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(ALL)
            return list(await cursor.fetchall())

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        async with self.pool.connection() as connection, connection.execute(ALL) as cursor:
            async for row in cursor:
                count += 1
                total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.executemany(SINK, rows)
            await connection.commit()

    async def slow(self, n: int) -> int:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(SLOW, (n,))
            return (await cursor.fetchone())[0]


class AiosqlitepoolFastest(Aiosqlitepool):
    """The same pool, one hop a query, and writers queueing in the event loop, not in SQLite's busy wait."""

    name = "aiosqlitepool fastest"
    about = "the same, `execute_fetchall`, and a lock among writers instead of SQLite's busy wait"

    async def point(self, key: int) -> Any:
        async with self.pool.connection() as connection:
            return (await connection.execute_fetchall(POINT, (key,)))[0]

    async def transact(self, key: int) -> None:
        async with self.lock:
            await super().transact(key)

    async def insert(self, key: int) -> None:
        async with self.lock:
            await super().insert(key)

    async def fetch_all(self) -> Sequence[Any]:
        async with self.pool.connection() as connection:
            return list(await connection.execute_fetchall(ALL))


class Asqlite(Contender):
    """asqlite's pool, as documented."""

    name = "asqlite"
    requires = ("asqlite",)
    about = "asqlite's own pool, as documented; a lock among writers"

    def _init(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA synchronous = {self.synchronous}")

    async def open(self) -> None:
        import asqlite

        self.pool = await asqlite.create_pool(self.path, init=self._init, size=self.readers, timeout=BUSY_TIMEOUT)
        self.lock = asyncio.Lock()

    async def close(self) -> None:
        await self.pool.close()

    async def point(self, key: int) -> Any:
        async with self.pool.acquire() as connection:
            return await connection.fetchone(POINT, (key,))

    async def transact(self, key: int) -> None:
        async with self.lock, self.pool.acquire() as connection, connection.transaction():
            await connection.execute(INSERT, (key, NOTE))
            await connection.execute(UPDATE, (key,))

    async def insert(self, key: int) -> None:
        async with self.lock, self.pool.acquire() as connection:
            await connection.execute(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        async with self.pool.acquire() as connection:
            return await connection.fetchall(ALL)

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.lock, self.pool.acquire() as connection, connection.transaction():
            await connection.executemany(SINK, rows)

    async def slow(self, n: int) -> int:
        async with self.pool.acquire() as connection:
            return (await connection.fetchone(SLOW, (n,)))[0]


class _Apsw(Contender):
    """APSW's asynchronous mode, one shared connection. It brings an SQLite of its own."""

    stdlib = False
    requires = ("apsw.aio",)
    backends = BACKENDS
    prefetch: int | None = None

    async def open(self) -> None:
        import apsw
        import apsw.aio
        import sniffio

        controller = apsw.aio.Trio if sniffio.current_async_library() == "trio" else apsw.aio.AsyncIO
        apsw.async_controller.set(controller)  # type: ignore[arg-type]
        if self.prefetch is not None:
            apsw.async_cursor_prefetch.set(self.prefetch)
        self.db = await apsw.Connection.as_async(self.path)
        await self.db.set_busy_timeout(int(BUSY_TIMEOUT * 1000))
        await self.db.pragma("synchronous", self.synchronous)
        self.lock = anyio.Lock()

    async def close(self) -> None:
        await self.db.aclose()


class Apsw(_Apsw):
    """As documented."""

    name = "apsw"
    about = "APSW's async mode (with its own, newer SQLite), one shared connection, as documented"

    async def point(self, key: int) -> Any:
        cursor = await self.db.execute(POINT, (key,))
        return await cursor.fetchone()

    async def three(self, keys: Sequence[int]) -> list[Any]:
        async with self.lock, self.db:
            return [await self.point(key) for key in keys]

    async def transact(self, key: int) -> None:
        async with self.lock, self.db:
            await self.db.execute(INSERT, (key, NOTE))
            await self.db.execute(UPDATE, (key,))

    async def insert(self, key: int) -> None:
        await self.db.execute(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        return await (await self.db.execute(ALL)).fetchall()

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        async for row in await self.db.execute(ALL):
            count += 1
            total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.lock, self.db:
            await self.db.executemany(SINK, rows)

    async def slow(self, n: int) -> int:
        cursor = await self.db.execute(SLOW, (n,))
        return (await cursor.fetchone())[0]  # type: ignore[index]


class ApswFastest(Apsw):
    """The same with two statements to a hop, rows fetched by the thousand, a lock without checkpoints."""

    name = "apsw fastest"
    about = "the same, BEGIN and COMMIT in one hop with their neighbours; reads see the open transaction (dirty)"
    prefetch = 1000

    async def open(self) -> None:
        await super().open()
        self.lock = anyio.Lock(fast_acquire=True)

    async def point(self, key: int) -> Any:
        return (await (await self.db.execute(POINT, (key,))).fetchall())[0]

    async def three(self, keys: Sequence[int]) -> list[Any]:
        first, second, third = keys
        async with self.lock:
            rows = [
                (await (await self.db.execute(f"BEGIN; {POINT}", (first,))).fetchall())[0],
                await self.point(second),
            ]
            return [*rows, (await (await self.db.execute(f"{POINT}; COMMIT", (third,))).fetchall())[0]]

    async def transact(self, key: int) -> None:
        async with self.lock:
            await self.db.execute(f"BEGIN IMMEDIATE; {INSERT}", (key, NOTE))
            await self.db.execute(f"{UPDATE}; COMMIT", (key,))


class ApswRun(_Apsw):
    """The transaction as a synchronous function sent to the connection's thread: one hop, not interactive."""

    name = "apsw async_run"
    kind = "offloading neighbour"
    about = "APSW, the transaction a synchronous function on the connection's thread (not interactive)"

    def _transaction(self, key: int) -> None:
        self.db.execute(f"BEGIN IMMEDIATE; {INSERT}; {UPDATE}; COMMIT", (key, NOTE, key))  # type: ignore[unused-coroutine]

    async def transact(self, key: int) -> None:
        await self.db.async_run(self._transaction, key)


class SQLAlchemy(Contender):
    """SQLAlchemy's asyncio extension over aiosqlite, as documented: Core constructs, its default pool."""

    name = "sqlalchemy"
    requires = ("sqlalchemy.ext.asyncio", "aiosqlite")
    about = "SQLAlchemy Core's asyncio extension, as documented"

    async def open(self) -> None:
        import sqlalchemy as sa

        self.engine = self._engine()
        metadata = sa.MetaData()

        def table(title: str, **columns: Any) -> sa.Table:
            key = sa.Column("id", sa.Integer, primary_key=True)
            return sa.Table(title, metadata, key, *(sa.Column(name, kind) for name, kind in columns.items()))

        self.item = table("item", name=sa.Text, hits=sa.Integer)
        self.log = table("log", item=sa.Integer, note=sa.Text)
        self.bulk = table("bulk", name=sa.Text, value=sa.Float)
        self.sink = table("sink", name=sa.Text, value=sa.Float)
        self.sa = sa
        self.lock = asyncio.Lock()

    def _engine(self, **options: Any) -> Any:
        import sqlalchemy as sa
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(
            f"sqlite+aiosqlite:///{self.path}", connect_args={"timeout": BUSY_TIMEOUT}, **options
        )

        @sa.event.listens_for(engine.sync_engine, "connect")
        def set_synchronous(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA synchronous = {self.synchronous}")
            cursor.close()

        return engine

    async def close(self) -> None:
        await self.engine.dispose()

    async def point(self, key: int) -> Any:
        async with self.engine.connect() as connection:
            query = self.sa.select(self.item.c.id, self.item.c.name).where(self.item.c.id == key)
            return (await connection.execute(query)).one()

    async def transact(self, key: int) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(self.log.insert().values(item=key, note=NOTE))
            update = self.item.update().where(self.item.c.id == key).values(hits=self.item.c.hits + 1)
            await connection.execute(update)

    async def insert(self, key: int) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(self.log.insert().values(item=key, note=NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        async with self.engine.connect() as connection:
            return (await connection.execute(self.bulk.select())).all()

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        async with self.engine.connect() as connection, connection.stream(self.bulk.select()) as rows:
            async for row in rows:
                count += 1
                total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(self.sink.insert(), [{"name": name, "value": value} for name, value in rows])

    async def slow(self, n: int) -> int:
        async with self.engine.connect() as connection:
            return (await connection.exec_driver_sql(SLOW, (n,))).scalar_one()


class SQLAlchemyFastest(SQLAlchemy):
    """The same, SQL given to the driver as it is, autocommit for single statements, a lock among writers."""

    name = "sqlalchemy fastest"
    about = "the same, `exec_driver_sql`, driver-level autocommit, a lock among writers"

    async def open(self) -> None:
        await super().open()
        self.autocommit = self._engine(isolation_level="AUTOCOMMIT", pool_reset_on_return=None)

    async def close(self) -> None:
        await self.autocommit.dispose()
        await super().close()

    async def point(self, key: int) -> Any:
        async with self.autocommit.connect() as connection:
            return (await connection.exec_driver_sql(POINT, (key,))).one()

    async def transact(self, key: int) -> None:
        async with self.lock, self.engine.begin() as connection:
            await connection.exec_driver_sql(INSERT, (key, NOTE))
            await connection.exec_driver_sql(UPDATE, (key,))

    async def insert(self, key: int) -> None:
        async with self.lock, self.autocommit.connect() as connection:
            await connection.exec_driver_sql(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        async with self.engine.connect() as connection:
            return (await connection.exec_driver_sql(ALL)).all()

    async def insert_many(self, rows: Sequence[Any]) -> None:
        async with self.lock, self.engine.begin() as connection:
            await connection.exec_driver_sql(SINK, list(rows))


NEIGHBOURS: tuple[type[Contender], ...] = (
    Aiosqlite,
    AiosqliteFastest,
    AiosqlitePerUse,
    Aiosqlitepool,
    AiosqlitepoolFastest,
    Asqlite,
    Apsw,
    ApswFastest,
    ApswRun,
    SQLAlchemy,
    SQLAlchemyFastest,
)
