"""This package on PostgreSQL beside psycopg's AsyncConnectionPool and asyncpg, under asyncio or uvloop.

    python -m tests.benchmarks.postgresql [--quick] [--uvloop] [--json FILE]

One server on loopback, started for the run, on the same machine (so it competes for the same cores), with fsync off: what is
compared is the client side, and no disk. Ten connections each, prepared statements as each library does it by default.
Contenders take turns, and the median of the rounds counts. Beside it stands the CPU time that this process (not the server)
took per operation, which other work on the machine touches less.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from database.postgresql import close_all, configure, get_db, transactional
from tests.postgresql.server import shared

CONNECTIONS = 10
ROWS = 10_000

Call = Callable[[int], Awaitable[Any]]

SELECT = "SELECT id, value FROM bench WHERE id = {}"
UPDATE = "UPDATE bench SET value = {} WHERE id = {}"
INSERT = "INSERT INTO bulk (id, value) VALUES ({}, {})"


class Ours:
    """This package, as its guide shows it."""

    name = "database"

    async def open(self, conninfo: str) -> None:
        configure({"database": {"postgresql": {"conninfo": conninfo, "init_sql": "", "pool_size": CONNECTIONS}}})
        self.db = get_db()
        self.transaction = self.decorated()
        await self.db.open()

    def decorated(self) -> Call:
        """The function, decorated: not when this module is imported, for then its name would mean PostgreSQL to all tests."""
        return transactional(self.select_and_update)

    async def close(self) -> None:
        await close_all()

    async def select(self, number: int) -> Any:
        return await self.db.fetch_one(SELECT.format(":id"), {"id": number})

    async def update(self, number: int) -> None:
        await self.db.execute(UPDATE.format(":value", ":id"), {"id": number, "value": "x"})

    async def select_and_update(self, number: int) -> None:
        """The body of the transaction."""
        await self.db.fetch_one(SELECT.format(":id"), {"id": number})
        await self.db.execute(UPDATE.format(":value", ":id"), {"id": number, "value": "y"})

    async def insert(self, rows: list[tuple[int, str]]) -> None:
        await self.db.execute_many(INSERT.format("?", "?"), rows)

    async def stream(self) -> int:
        async with self.db.stream("SELECT id, value FROM bench") as rows:
            return len([row async for row in rows])


class OursOffloaded(Ours):
    """The same with `offload=True`: the whole function on the connection's thread."""

    name = "database, offload"

    def decorated(self) -> Call:
        """See `Ours`."""
        return transactional(offload=True)(self.select_and_update)


class Psycopg:
    """psycopg's own pool."""

    name = "psycopg_pool"

    async def open(self, conninfo: str) -> None:
        from psycopg_pool import AsyncConnectionPool

        self.pool = AsyncConnectionPool(conninfo, min_size=CONNECTIONS, max_size=CONNECTIONS, open=False)
        await self.pool.open(wait=True)

    async def close(self) -> None:
        await self.pool.close()

    async def select(self, number: int) -> Any:
        async with self.pool.connection() as connection:
            return await (await connection.execute(SELECT.format("%s"), (number,))).fetchone()

    async def update(self, number: int) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(UPDATE.format("%s", "%s"), ("x", number))

    async def transaction(self, number: int) -> None:
        async with self.pool.connection() as connection:
            await (await connection.execute(SELECT.format("%s"), (number,))).fetchone()
            await connection.execute(UPDATE.format("%s", "%s"), ("y", number))

    async def insert(self, rows: list[tuple[int, str]]) -> None:
        async with self.pool.connection() as connection, connection.cursor() as cursor:
            await cursor.executemany(INSERT.format("%s", "%s"), rows)

    async def stream(self) -> int:
        async with self.pool.connection() as connection, connection.cursor("bench") as cursor:
            cursor.itersize = 1000
            await cursor.execute("SELECT id, value FROM bench")
            return len([row async for row in cursor])


class Asyncpg:
    """asyncpg and its pool."""

    name = "asyncpg"

    async def open(self, conninfo: str) -> None:
        import asyncpg

        known = dict(part.split("=") for part in conninfo.split())
        self.pool = await asyncpg.create_pool(
            host=known["host"], port=int(known["port"]), user=known["user"], database=known["dbname"],
            min_size=CONNECTIONS, max_size=CONNECTIONS,
        )  # fmt: skip

    async def close(self) -> None:
        await self.pool.close()

    async def select(self, number: int) -> Any:
        return await self.pool.fetchrow(SELECT.format("$1"), number)

    async def update(self, number: int) -> None:
        await self.pool.execute(UPDATE.format("$1", "$2"), "x", number)

    async def transaction(self, number: int) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.fetchrow(SELECT.format("$1"), number)
            await connection.execute(UPDATE.format("$1", "$2"), "y", number)

    async def insert(self, rows: list[tuple[int, str]]) -> None:
        await self.pool.executemany(INSERT.format("$1", "$2"), rows)

    async def stream(self) -> int:
        async with self.pool.acquire() as connection, connection.transaction():
            return len([row async for row in connection.cursor("SELECT id, value FROM bench", prefetch=1000)])


class Measured(NamedTuple):
    """What one turn of a contender gave."""

    per_second: float
    microseconds: float
    """Of this process's CPU, per operation."""


async def measured(work: Callable[[], Awaitable[int]]) -> Measured:
    """Does the work, which says how many operations it was."""
    cpu, start = time.process_time(), time.perf_counter()
    count = await work()
    return Measured(count / (time.perf_counter() - start), (time.process_time() - cpu) / count * 1e6)


async def calls(call: Call, tasks: int, total: int) -> int:
    """Calls so often, by so many tasks at once."""
    numbers = iter(range(total))

    async def work() -> None:
        for number in numbers:
            await call(number * 7919 % ROWS + 1)

    await asyncio.gather(*[work() for _ in range(tasks)])
    return total


def _workloads(quick: bool) -> Iterator[tuple[str, Callable[[Any], Awaitable[int]]]]:
    scale = 1 if quick else 4

    for tasks, total in ((1, 300 * scale), (100, 2000 * scale)):
        for kind in ("select", "update", "transaction"):

            async def call(contender: Any, kind: str = kind, tasks: int = tasks, total: int = total) -> int:
                return await calls(getattr(contender, kind), tasks, total)

            yield f"{kind}, {tasks} task{'s' if tasks > 1 else ''}", call

    rows = [(number, "x") for number in range(10_000 * scale)]

    async def insert(contender: Any) -> int:
        await contender.insert(rows)
        return len(rows)

    yield "insert many, rows", insert

    async def stream(contender: Any) -> int:
        return sum([await contender.stream() for _ in range(4 * scale)])

    yield "stream, rows", stream


def prepare(connection: Any, rows: int) -> None:
    """Makes the tables."""
    connection.execute("CREATE TABLE bench (id INT PRIMARY KEY, value TEXT)")
    connection.execute("CREATE TABLE bulk (id INT, value TEXT)")
    connection.execute(f"INSERT INTO bench SELECT g, 'value ' || g FROM generate_series(1, {rows}) g")
    connection.execute("VACUUM ANALYZE bench")


async def run(*, quick: bool) -> dict[str, dict[str, Measured]]:
    """Medians by workload and contender."""
    import psycopg

    server = shared()
    conninfo = server.conninfo(tcp=True)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        prepare(connection, ROWS)
    results: dict[str, dict[str, Measured]] = {}
    contenders: list[Any] = [Ours(), OursOffloaded(), Psycopg(), Asyncpg()]
    for name, work in _workloads(quick):
        found: dict[str, list[Measured]] = {}
        for _ in range(1 if quick else 5):
            for contender in contenders:
                if isinstance(contender, OursOffloaded) and not name.startswith("transaction"):
                    continue
                await contender.open(conninfo)
                try:
                    await calls(contender.select, 10, 100)  # every connection is awake
                    found.setdefault(contender.name, []).append(await measured(partial(work, contender)))
                finally:
                    await contender.close()
        results[name] = {
            contender: Measured(median(each.per_second for each in turns), median(each.microseconds for each in turns))
            for contender, turns in found.items()
        }
    return results


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--uvloop", action="store_true", help="all of them on uvloop")
    parser.add_argument("--json", metavar="FILE", help="writes the numbers")
    options = parser.parse_args()
    factory = importlib.import_module("uvloop").new_event_loop if options.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        results = runner.run(run(quick=options.quick))
    names = ["database", "database, offload", "psycopg_pool", "asyncpg"]
    loop = "uvloop" if options.uvloop else "asyncio"
    print(f"operations a second (µs of this process's CPU for each); {loop}, Python {platform.python_version()}")
    print("\n| workload | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
    for workload, found in results.items():
        shown = [f"{found[name][0]:,.0f} ({found[name][1]:.3g})" if name in found else "" for name in names]
        print(f"| {workload} | {' | '.join(shown)} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
