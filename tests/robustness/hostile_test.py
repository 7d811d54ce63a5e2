"""SQL, values and names that attack: they come back as they went in, or are refused with a clear error, and harm nobody."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import anyio
import pytest

from database import transactional
from tests.contract.support import HANGING, Engine, errors, gather, in_turn, usable

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

MEBI = 1024 * 1024

VALUES: dict[str, Any] = {
    "nul": "before\0after",
    "only-nul": "\0",
    "blob-nul": b"\0\0",
    "empty": "",
    "empty-blob": b"",
    "astral": "\U0010ffff\U0001f4a9",
    "combining": "e\u0301" * 1000,
    "quotes": "'; DROP TABLE item; --",
    "newlines": "a\r\nb\u2028c",
    "biggest": 2**63 - 1,
    "smallest": -(2**63),
    "tiny": 5e-324,
    "huge": 1.7976931348623157e308,
    "infinity": math.inf,
    "minus-infinity": -math.inf,
    "bool": True,
    "none": None,
}


@in_turn("name", VALUES)
async def test_values_come_back(db: Any, name: str) -> None:
    """What can be stored comes back as it was, as named and as positional parameter, on every path."""
    value = VALUES[name]

    def run(connection: Any) -> Any:
        return connection.execute("SELECT ?", (value,)).fetchone()[0]

    await db.execute("CREATE TABLE anything (x)")
    await db.execute("INSERT INTO anything VALUES (:x)", {"x": value})
    await db.execute_many("INSERT INTO anything VALUES (?)", [(value,)])
    async with db.batch() as batch:
        await batch.execute("INSERT INTO anything VALUES (?)", (value,))
    found = [row["x"] for row in await db.fetch_all("SELECT x FROM anything")]
    async with db.stream("SELECT x FROM anything") as rows:
        found += [row["x"] async for row in rows]
    found.append(await db.run(run, readonly=True))
    assert found == [value] * 7
    assert {type(each) for each in found} <= {type(value), int}


async def test_nan_is_null(db: Any) -> None:
    """SQLite knows no NaN and stores NULL: a column that is NOT NULL refuses it."""
    await db.execute("CREATE TABLE number (x REAL, y REAL NOT NULL DEFAULT 0)")
    await db.execute("INSERT INTO number (x) VALUES (?)", (math.nan,))
    assert await db.fetch_value("SELECT x FROM number", default="no row") is None
    with pytest.raises(errors.IntegrityError):
        await db.execute("INSERT INTO number (y) VALUES (?)", (math.nan,))


@in_turn(
    "value", [2**63, -(2**63) - 1, 10**40, "\ud800", "a\udfffb", object(), [1], {1}, 1j, print],
    ids=["2**63", "-2**63-1", "10**40", "surrogate", "surrogate-within", "object", "list", "set", "complex", "function"],
)  # fmt: skip
async def test_values_that_cannot_be_stored(db: Any, engine: Engine, value: Any) -> None:
    """They are refused with the package's error on every path, their transaction can go on, and nothing is stored."""
    insert = "INSERT INTO item (value) VALUES (?)"

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute(insert, (value,))

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(insert, ("first",))
            await batch.execute(insert, (value,))

    results = await gather(
        lambda: db.execute(insert, (value,)),
        lambda: db.execute("INSERT INTO item (value) VALUES (:v)", {"v": value}),
        lambda: db.execute_many(insert, [("first",), (value,)]),
        lambda: db.fetch_value("SELECT ?", (value,)),
        offloaded,
        batch,
    )
    assert [type(each).__mro__[-4] for each in results] == [errors.DatabaseError] * 6, results
    async with db.transaction():
        with pytest.raises(errors.QueryExecutionError):
            await db.execute(insert, (value,))
        await db.execute(insert, ("kept",))
    assert engine.outside("SELECT value FROM item") == [("kept",)]
    await db.execute("DELETE FROM item")
    await usable(db)


async def test_a_blob_of_50_mb(db: Any) -> None:
    """A blob of 50 MB goes in and out while others are served; one beyond SQLite's limit is refused."""
    blob = bytes(range(256)) * (50 * MEBI // 256)
    await db.execute("CREATE TABLE big (x BLOB)")
    with anyio.fail_after(HANGING):
        results = await gather(
            lambda: db.execute("INSERT INTO big VALUES (?)", (blob,)), *[lambda: db.fetch_value("SELECT 1")] * 20
        )
        assert results[1:] == [1] * 20
        assert await db.fetch_value("SELECT x FROM big") == blob
        async with db.stream("SELECT x FROM big") as rows:
            assert [len(row["x"]) async for row in rows] == [len(blob)]
        with pytest.raises(errors.QueryExecutionError):
            await db.execute("INSERT INTO big SELECT zeroblob(2000000000)")
    await usable(db)


async def test_999_columns(db: Any) -> None:
    """A table of 999 columns, 999 parameters, and one more than SQLite takes."""
    columns = [f"c{number}" for number in range(999)]
    await db.execute(f"CREATE TABLE wide ({', '.join(columns)})")
    marks = ", ".join("?" * 999)
    await db.execute(f"INSERT INTO wide VALUES ({marks})", tuple(range(999)))
    await db.execute(
        f"INSERT INTO wide VALUES ({', '.join(f':{name}' for name in columns)})",
        dict(zip(columns, range(999), strict=True)),
    )
    rows = await db.fetch_all("SELECT * FROM wide")
    assert [tuple(row) for row in rows] == [tuple(range(999))] * 2
    assert list(dict(rows[0])) == columns
    assert repr(rows[0]).startswith("Row(c0=0, ")
    with pytest.raises(errors.QueryExecutionError):
        await db.fetch_value("SELECT " + ", ".join("?" * 40_000), tuple(range(40_000)))
    await usable(db)


@in_turn("name", ['a"b', "a b", "select", "a;b", "é", "a]b", "a`b", "a'b", "--", "/*", "0", "\U0001f4a9"])
async def test_names_that_need_quoting(db: Any, name: str) -> None:
    """Tables and columns of any name work when they are quoted as SQL wants it; rows know the names."""
    quoted = '"' + name.replace('"', '""') + '"'
    await db.execute(f"CREATE TABLE {quoted} ({quoted} TEXT)")
    await db.execute_script(f"INSERT INTO {quoted} VALUES ('1;'); INSERT INTO {quoted} ({quoted}) VALUES ('2');")
    row = await db.fetch_one(f"SELECT {quoted} FROM {quoted} WHERE {quoted} = ?", ("2",))
    assert row[name] == "2"
    assert dict(row) == {name: "2"}
    async with db.transaction():
        result = await db.execute(f"UPDATE {quoted} SET {quoted} = 'new'")
        assert result.rowcount == 2


@in_turn(
    "sql",
    [
        "SELECT 1\0; DELETE FROM item", "SELECT '\ud800'", "SELECT 1; DELETE FROM item", "SELECT 1 garbage more",
        "DELETE FROM item; SELECT 1", "INSERT INTO item (value) VALUES ('x') garbage", "SELECT (1", "SELECT 'unclosed",
        ";", "--", "", " ", "/*", "\ufeff", "SELECT * FROM item WHERE", "EXPLAIN", "PRAGMA", "ATTACH", "x" * 2_000_000,
        "SELECT " + "(" * 5000 + "1" + ")" * 5000, "SELECT 1" + " UNION SELECT 1" * 2000,
    ],
    ids=lambda sql: repr(sql[:25]),
)  # fmt: skip
async def test_texts_that_are_no_statement(db: Any, engine: Engine, sql: str) -> None:
    """Text that is not one whole statement is refused on every path, and nothing of it is executed."""
    await db.execute("INSERT INTO item (value) VALUES ('kept')")

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute(sql)

    async def stream() -> None:
        async with db.stream(sql) as rows:
            async for _ in rows:
                pass

    with anyio.fail_after(HANGING):
        results = await gather(
            lambda: db.execute(sql), lambda: db.fetch_all(sql), lambda: db.execute_many(sql, [()]), stream, offloaded
        )
    wrong = [each for each in results if not isinstance(each, errors.DatabaseError)]
    assert not wrong, wrong
    assert engine.outside("SELECT value FROM item") == [("kept",)]
    await db.execute("DELETE FROM item")
    await usable(db)


@in_turn(
    "sql",
    [
        "COMMIT", "END", "ROLLBACK", "SAVEPOINT s", "RELEASE level_1", "ROLLBACK TO level_1", "BEGIN", "COMMIT --*",
        "commit;", "/* x */ COMMIT", "-- x\nROLLBACK", "BEGIN IMMEDIATE --*", "ROLLBACK --*", "RELEASE level_0 --*",
    ],
)  # fmt: skip
@in_turn("path", ["execute", "script", "run", "run-script", "offload", "batch", "aiosql"])
async def test_control_of_transactions_as_text(db: Any, engine: Engine, sql: str, path: str) -> None:
    """BEGIN, COMMIT and the like sent as text inside a transaction are refused with a word on what to use instead, and
    the transaction is what it was. In a function given to `db.run()` they have their meaning within the function.
    """
    refused = pytest.raises(errors.TransactionError, match=r"as SQL text|package's own business")
    if path in ("run", "run-script"):
        refused = (
            pytest.raises(errors.QueryExecutionError, match="no such savepoint") if "level" in sql else nullcontext()
        )

    async def send() -> None:
        if path == "execute":
            await db.execute(sql)
        elif path == "script":
            await db.execute_script(f"SELECT 1; {sql}")
        elif path == "batch":
            async with db.batch() as batch:
                await batch.execute(sql)
        elif path == "offload":
            await transactional(offload=True)(db.execute)(sql)
        elif path == "aiosql":
            await db.call_aiosql(None, sql, None)
        elif path == "run":
            await db.run(lambda connection: connection.execute(sql))
        else:
            await db.run(lambda connection: connection.executescript(f"SELECT 1; {sql}"))

    async with db.transaction() as transaction:  # so that the connection has sent all of its own
        async with db.transaction():
            await db.execute("DELETE FROM item")
        await transaction.commit()
        await db.execute("DELETE FROM item")
        await transaction.rollback()

    def all_undone() -> bool:
        return engine.outside("SELECT count(*) FROM item") == [(0,)]

    async with db.transaction() as transaction:
        await db.execute("INSERT INTO item (value) VALUES ('outer')")
        async with db.transaction():
            await db.execute("INSERT INTO item (value) VALUES ('inner')")
            with refused:
                await send()
        assert all_undone(), "it was committed"
        assert await db.fetch_value("SELECT count(*) FROM item") == 2
        await transaction.rollback()
    assert all_undone()
    await usable(db)


async def test_a_read_only_transaction_that_is_attacked(db: Any, engine: Engine) -> None:
    """Whatever is tried to get round it, alone or in turn, a read-only transaction writes nothing and goes on reading."""
    attacks = [
        "PRAGMA query_only = OFF", "PRAGMA query_only(0)", "PRAGMA writable_schema = ON", "PRAGMA journal_mode = DELETE",
        f"ATTACH '{engine.directory}/other.db' AS other", "ATTACH ':memory:' AS other", "CREATE TEMP TABLE t (x)",
        "VACUUM", f"VACUUM INTO '{engine.directory}/copy.db'", "REINDEX", "ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)",
        "PRAGMA user_version = 7", "WITH x AS (SELECT 1) INSERT INTO item (value) SELECT * FROM x",
        "INSERT INTO item (value) VALUES (1) RETURNING id", "UPDATE sqlite_schema SET sql = ''", "DROP TABLE item",
        "DETACH main", "PRAGMA optimize", "PRAGMA incremental_vacuum", "SELECT load_extension('x')",
    ]  # fmt: skip
    await db.execute("INSERT INTO item (value) VALUES ('kept')")
    for inside in (False, True):
        async with db.transaction(readonly=not inside) as outer:
            async with db.transaction(readonly=True):
                for attack in attacks:
                    for call in (
                        lambda sql=attack: db.execute(sql),
                        lambda sql=attack: db.fetch_all(sql),
                        lambda sql=attack: db.execute_script(sql),
                        lambda sql=attack: db.run(lambda connection: connection.execute(sql).fetchall(), readonly=True),
                    ):
                        (result,) = await gather(call)
                        assert isinstance(result, errors.DatabaseError), (attack, result)
                    with pytest.raises(errors.DatabaseError):
                        await db.execute("INSERT INTO item (value) VALUES ('never')")
                assert await db.fetch_value("SELECT count(*) FROM item") == 1
            if inside:
                await db.execute("INSERT INTO item (value) VALUES ('after')")  # the writer is admitted again
                await outer.rollback()
    assert engine.outside("SELECT value FROM item") == [("kept",)]
    assert sorted(path.name for path in engine.directory.iterdir()) == ["test.db", "test.db-shm", "test.db-wal"]
    await usable(db)
