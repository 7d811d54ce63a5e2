"""What is compared: raw ``sqlite3`` and this package (the neighbours are in ``neighbours.py``).

A contender defines the methods it has something to say about; a workload runs it if it has the ones it needs:

===================  ==============================================================
``point(key)``       one row of ``item`` by its key
``three(keys)``      three rows of ``item`` in one read-only transaction
``transact(key)``    a short transaction: an INSERT and an UPDATE
``insert(key)``      a single INSERT, committed when it returns
``fetch_all()``      all rows of ``bulk``
``fetch_first(n)``   the first ``n`` rows of ``bulk``
``stream()``         all rows of ``bulk`` one by one: their number and sum of ids
``insert_many(..)``  rows into ``sink``, all or nothing
``slow(n)``          a statement that computes for a while
``scan(n)``          a statement that reads ``n`` rows of ``bulk`` and adds them up; ours only
===================  ==============================================================
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from .store import ALL, FIRST, INSERT, NOTE, POINT, SCAN, SINK, SLOW, UPDATE

Kind = Literal["raw", "ours", "neighbour", "offloading neighbour"]
BACKENDS = ("asyncio", "uvloop", "trio")
READERS = 5


class Contender:
    """One way to use SQLite. One instance lives for one run on one database file."""

    name: ClassVar[str]
    kind: ClassVar[Kind] = "neighbour"
    """The best neighbour is chosen from ``neighbour``; a function sent to the thread is not interactive."""
    stdlib: ClassVar[bool] = True
    """Whether it stands on the standard library's ``sqlite3`` and the same SQLite as the others."""
    requires: ClassVar[tuple[str, ...]] = ()
    backends: ClassVar[tuple[str, ...]] = ("asyncio", "uvloop")
    about: ClassVar[str] = ""

    def __init__(self, path: Path, synchronous: str, *, readers: int = READERS) -> None:
        self.path = str(path)
        self.synchronous = synchronous
        self.readers = readers

    @classmethod
    def installed(cls) -> bool:
        """Whether everything this contender needs can be imported."""
        return all(_importable(module) for module in cls.requires)

    @classmethod
    def supports(cls, needs: Sequence[str]) -> bool:
        """Whether it has all the methods a workload needs."""
        return all(hasattr(cls, method) for method in needs)

    async def open(self) -> None:
        """Make ready, on the running event loop."""

    async def close(self) -> None:
        """Let go of everything."""


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class Raw(Contender):
    """The yardstick: the standard library in a plain loop, no thread and no event loop.

    What is called once a turn is synchronous; what handles many rows a call is a coroutine that never
    suspends.
    """

    name = "raw"
    kind = "raw"
    backends = ("none",)
    about = "plain `sqlite3` in a synchronous loop, no threads"

    def __init__(self, path: Path, synchronous: str, *, readers: int = READERS) -> None:
        super().__init__(path, synchronous, readers=readers)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(f"PRAGMA synchronous = {synchronous}")
        self.execute = self.connection.execute

    async def close(self) -> None:
        self.connection.close()

    def point(self, key: int) -> Any:
        return self.execute(POINT, (key,)).fetchone()

    def three(self, keys: Sequence[int]) -> list[Any]:
        self.execute("BEGIN")
        rows = [self.execute(POINT, (key,)).fetchone() for key in keys]
        self.execute("COMMIT")
        return rows

    def transact(self, key: int) -> None:
        self.execute("BEGIN IMMEDIATE")
        self.execute(INSERT, (key, NOTE))
        self.execute(UPDATE, (key,))
        self.execute("COMMIT")

    def insert(self, key: int) -> None:
        self.execute(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        return self.execute(ALL).fetchall()

    async def fetch_first(self, n: int) -> Sequence[Any]:
        return self.execute(FIRST, (n,)).fetchall()

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        for row in self.execute(ALL):
            count += 1
            total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        self.execute("BEGIN IMMEDIATE")
        self.connection.executemany(SINK, rows)
        self.execute("COMMIT")


class _Ours(Contender):
    kind = "ours"
    requires = ("database.sqlite3",)
    backends = BACKENDS
    settings: ClassVar[dict[str, Any]] = {}

    async def open(self) -> None:
        from database.sqlite3 import configure, get_db

        configure(
            {
                "database": {
                    "sqlite": {
                        "path": self.path,
                        "synchronous": self.synchronous,
                        "pool_size": self.readers,
                        "init_sql": "",
                        **self.settings,
                    }
                }
            }
        )
        self.db = get_db()

    async def close(self) -> None:
        from database.sqlite3 import close_all

        await close_all()


class Ours(_Ours):
    """This package with SQL text."""

    name = "database"
    about = "this package: SQL text, `@transactional`"

    async def open(self) -> None:
        from database.sqlite3 import transactional, transactional_readonly

        await super().open()
        db = self.db

        @transactional
        async def transaction(key: int) -> None:
            await db.execute(INSERT, (key, NOTE))
            await db.execute(UPDATE, (key,))

        @transactional_readonly
        async def reading(keys: Sequence[int]) -> list[Any]:
            return [await db.fetch_one(POINT, (key,)) for key in keys]

        self._transaction = transaction
        self._reading = reading

    async def point(self, key: int) -> Any:
        return await self.db.fetch_one(POINT, (key,))

    async def three(self, keys: Sequence[int]) -> list[Any]:
        return await self._reading(keys)

    async def transact(self, key: int) -> None:
        await self._transaction(key)

    async def insert(self, key: int) -> None:
        await self.db.execute(INSERT, (key, NOTE))

    async def fetch_all(self) -> Sequence[Any]:
        return await self.db.fetch_all(ALL)

    async def fetch_first(self, n: int) -> Sequence[Any]:
        return await self.db.fetch_all(FIRST, (n,))

    async def stream(self) -> tuple[int, int]:
        count = total = 0
        async with self.db.stream(ALL) as rows:
            async for row in rows:
                count += 1
                total += row[0]
        return count, total

    async def insert_many(self, rows: Sequence[Any]) -> None:
        await self.db.execute_many(SINK, rows)

    async def slow(self, n: int) -> int:
        value: int = await self.db.fetch_value(SLOW, (n,))
        return value

    async def scan(self, n: int) -> float:
        value: float = await self.db.fetch_value(SCAN, (n,))
        return value


class OursInline(Ours):
    """This package, with small reads on the event loop's own thread."""

    name = "database inline"
    about = "this package: SQL text, `@transactional`, `inline_reads: true`"
    settings: ClassVar[dict[str, Any]] = {"inline_reads": True}


class OursHandles(_Ours):
    """This package with aiosql query functions in place of SQL text."""

    name = "database handles"
    about = "this package: aiosql query functions"

    async def open(self) -> None:
        from database.sqlite3 import load_queries, transactional

        await super().open()
        db, queries = self.db, load_queries(Path(__file__).with_name("queries.sql"))

        @transactional
        async def transaction(key: int) -> None:
            await db.execute(queries.add_log, {"item": key, "note": NOTE})
            await db.execute(queries.count_hit, {"key": key})

        self._queries = queries
        self._transaction = transaction

    async def point(self, key: int) -> Any:
        return await self.db.fetch_one(self._queries.get_item, {"key": key})

    async def transact(self, key: int) -> None:
        await self._transaction(key)

    async def insert(self, key: int) -> None:
        await self.db.execute(self._queries.add_log, {"item": key, "note": NOTE})


class OursOffload(_Ours):
    """This package, the transaction function executed whole on the database's thread."""

    name = "database offload"
    about = "this package: `@transactional(offload=True)`"

    async def open(self) -> None:
        from database.sqlite3 import transactional

        await super().open()
        db = self.db

        @transactional(offload=True)
        async def transaction(key: int) -> None:
            await db.execute(INSERT, (key, NOTE))
            await db.execute(UPDATE, (key,))

        self._transaction = transaction

    async def transact(self, key: int) -> None:
        await self._transaction(key)


class OursTuples(_Ours):
    """This package, plain tuples through ``db.run``: what ``Row`` is measured against."""

    name = "database tuples"
    about = "this package: plain tuples through `db.run`"

    @staticmethod
    def _all(connection: sqlite3.Connection) -> list[Any]:
        cursor = connection.cursor()
        cursor.row_factory = None
        return cursor.execute(ALL).fetchall()

    async def fetch_all(self) -> Sequence[Any]:
        return await self.db.run(self._all, readonly=True)


RAW_AND_OURS: tuple[type[Contender], ...] = (Raw, Ours, OursInline, OursHandles, OursOffload, OursTuples)
