"""What the comparison on PostgreSQL measures is answered rightly, by each contender that is installed."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import psycopg
import pytest

from tests.benchmarks import postgresql
from tests.postgresql.server import shared

ROWS = 50


@pytest.fixture
def conninfo(tmp_path: Any) -> Any:
    """A database with the tables of the comparison."""
    from tests.conftest import alone

    server = shared()
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS bench")
        connection.execute("CREATE DATABASE bench")
    conninfo = server.conninfo("bench", tcp=True)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        postgresql.prepare(connection, ROWS)
    with alone("postgresql", tmp_path):
        yield conninfo


@pytest.mark.parametrize(
    ("contender", "needs"),
    [
        (postgresql.Ours, "psycopg"),
        (postgresql.OursOffloaded, "psycopg"),
        (postgresql.Psycopg, "psycopg_pool"),
        (postgresql.Asyncpg, "asyncpg"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_contenders_do_what_is_measured(conninfo: str, contender: Any, needs: str) -> None:
    """Selects find their row, updates and transactions are committed, many rows are stored, a stream gives all rows."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")

    async def run() -> None:
        one = contender()
        await one.open(conninfo)
        try:
            assert tuple(await one.select(7)) == (7, "value 7")
            await one.update(8)
            await one.transaction(9)
            await one.insert([(number, "x") for number in range(300)])
            assert await one.stream() == ROWS
            turn = await postgresql.measured(lambda: postgresql.calls(one.select, 3, 30))
            assert turn.per_second > 0
            assert turn.microseconds > 0
        finally:
            await one.close()

    asyncio.run(run())
    with psycopg.connect(conninfo) as connection:
        found = connection.execute("SELECT id, value FROM bench WHERE value NOT LIKE 'value%' ORDER BY id").fetchall()
        assert found == [(8, "x"), (9, "y")]
        assert connection.execute("SELECT count(*), sum(id) FROM bulk").fetchall() == [(300, 44850)]
