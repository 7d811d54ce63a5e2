"""Virtual tables and table-valued functions can be read wherever tables can, and written nowhere else."""

from __future__ import annotations

import sqlite3
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from database import errors
from tests.contract.support import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

READS = {
    "json_each": ("SELECT value FROM json_each('[1]')", 1),
    "pragma_table_info": ("SELECT name FROM pragma_table_info('plain')", "a"),
    "fts5": ("SELECT count(*) FROM documents WHERE documents MATCH 'hello'", 1),
}
WRITES = [
    "INSERT INTO documents VALUES ('again')",
    "DELETE FROM documents",
    "INSERT INTO documents (documents) VALUES ('rebuild')",
    "CREATE VIRTUAL TABLE more USING fts5 (text)",
    "CREATE TEMP TABLE more (a)",
]


@pytest.fixture(params=["sqlite3"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """Virtual tables are SQLite's."""
    return Engine(request.param, tmp_path)


async def prepare(db: Any) -> None:
    await db.execute_script(
        "CREATE TABLE plain (a); CREATE VIRTUAL TABLE documents USING fts5 (text);"
        " INSERT INTO documents VALUES ('hello world');"
    )


async def enter(stack: AsyncExitStack, db: Any, where: str) -> None:
    if where == "read-only within read-write":
        await stack.enter_async_context(db.transaction())
        await db.execute("INSERT INTO plain VALUES (1)")
    if where != "autocommit":
        await stack.enter_async_context(db.transaction(readonly=True))


@pytest.mark.parametrize("where", ["autocommit", "read-only", "read-only within read-write"])
@pytest.mark.parametrize("what", READS)
async def test_reads(db: Any, where: str, what: str) -> None:
    """Each of them is read at its first use on a connection, which declares its columns as if it wrote the schema."""
    await prepare(db)
    sql, expected = READS[what]
    async with AsyncExitStack() as stack:
        await enter(stack, db, where)
        assert await db.fetch_value(sql) == expected


@pytest.mark.parametrize("where", ["read-only", "read-only within read-write"])
@pytest.mark.parametrize("sql", WRITES)
async def test_writes_are_refused(db: Any, where: str, sql: str) -> None:
    """In a read-only transaction none of them is written, on the raw connection either."""
    await prepare(db)

    def sneak(connection: sqlite3.Connection) -> None:
        connection.execute(sql)

    async with AsyncExitStack() as stack:
        await enter(stack, db, where)
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.execute_script(sql)
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.run(sneak)
    assert await db.fetch_value("SELECT count(*) FROM documents") == 1


async def test_a_writable_schema_is_not_writable_in_read_only(db: Any) -> None:
    """Whoever makes the schema writable in a write transaction still cannot change it in a read-only level of that."""
    await prepare(db)
    async with db.transaction():
        await db.execute("PRAGMA writable_schema = ON")
        await db.execute("INSERT INTO plain VALUES (1)")
        async with db.transaction(readonly=True):
            with pytest.raises(errors.ReadOnlyTransactionError):
                await db.execute_script("UPDATE sqlite_master SET sql = 'CREATE TABLE plain (b)' WHERE name = 'plain'")
