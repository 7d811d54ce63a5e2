"""What is true on PostgreSQL where the contract cannot be: each test is a row of the table in docs/guides/postgresql.md."""

from __future__ import annotations

import datetime
import re
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest

from database import errors, get_db, transactional, transactional_readonly
from tests.contract.support import HANGING, add, eventually, gather, held, in_turn, names, usable
from tests.postgresql.differences import DIFFERENCES
from tests.postgresql.engine import PostgresqlEngine, oracle

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "postgresql.md"


def test_each_difference_is_a_row_with_a_test() -> None:
    """The guide's table and the tests left out of the contract speak of the same things, and each has a test here."""
    table = GUIDE.read_text("utf-8").partition("## What differs")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == set(DIFFERENCES.values())
    tested = {name.removeprefix("test_").partition("_")[0] for name in globals() if name.startswith("test_")}
    assert rows <= tested


# --- locks: several writers at once ---------------------------------------------------------------------------


async def test_locks_an_update_can_be_lost(db: Any) -> None:
    """By default two transactions that read, then write, do not notice each other: the later one wins."""
    await db.execute("INSERT INTO item (value) VALUES (0)")
    both = [anyio.Event(), anyio.Event()]

    @transactional
    async def increment(mine: int) -> None:
        value = int(await db.fetch_value("SELECT value FROM item WHERE id = 1"))
        both[mine].set()
        await both[1 - mine].wait()
        await db.execute("UPDATE item SET value = :value WHERE id = 1", {"value": value + 1})

    await gather(lambda: increment(0), lambda: increment(1))
    assert await db.fetch_value("SELECT value FROM item") == "1"


@pytest.mark.parametrize("way", ["serializable", "repeatable read", "for update", "one statement"])
async def test_locks_no_update_is_lost(make_db: Any, way: str) -> None:
    """With retries and a stricter isolation, a row lock, or one statement that does both, nothing is lost."""
    db = await make_db(pool_size=6)
    await db.execute("INSERT INTO item (value) VALUES (0)")
    lock = " FOR UPDATE" if way == "for update" else ""
    isolation: Any = way if way in ("serializable", "repeatable read") else None

    @transactional(isolation=isolation, retries=200)
    async def increment() -> None:
        value = int(await db.fetch_value(f"SELECT value FROM item WHERE id = 1{lock}"))
        await anyio.lowlevel.checkpoint()
        await db.execute("UPDATE item SET value = :value WHERE id = 1", {"value": value + 1})

    async def at_once() -> None:
        await db.execute("UPDATE item SET value = CAST(value AS int) + 1 WHERE id = 1")

    results = await gather(*[at_once if way == "one statement" else increment] * 20)
    assert results == [None] * 20
    assert await db.fetch_value("SELECT value FROM item") == "20"


async def test_locks_single_statements_are_run_again(make_db: Any) -> None:
    """A single statement that fails for a serialization failure is run again by itself, alone or among others."""
    db = await make_db(pool_size=6, isolation="serializable")
    await db.execute("INSERT INTO item (value) VALUES (0)")
    update = "UPDATE item SET value = CAST(value AS int) + 1"
    results = await gather(*[lambda: db.execute(update)] * 60)
    assert [result for result in results if isinstance(result, Exception)] == []
    assert await db.fetch_value("SELECT value FROM item") == "60"


async def test_locks_a_deadlock_is_an_error_that_retries_help_with(make_db: Any) -> None:
    """Two transactions that wait for each other: one gets DatabaseBusyError, and `retries` runs it again."""
    db = await make_db(pool_size=4)
    await db.execute("INSERT INTO item (value) VALUES ('0'), ('0')")
    both = [anyio.Event(), anyio.Event()]
    runs = 0

    @transactional(retries=3)
    async def cross(mine: int) -> None:
        nonlocal runs
        runs += 1
        update = "UPDATE item SET value = CAST(value AS int) + 1 WHERE id = :id"
        await db.execute(update, {"id": 1 + mine})
        both[mine].set()
        await both[1 - mine].wait()
        await db.execute(update, {"id": 2 - mine})

    with anyio.fail_after(HANGING):
        assert await gather(lambda: cross(0), lambda: cross(1)) == [None, None]
    assert runs >= 3
    assert [row["value"] for row in await db.fetch_all("SELECT value FROM item ORDER BY id")] == ["2", "2"]
    await usable(db)


async def test_locks_a_serialization_failure_ends_the_transaction(db: Any, engine: PostgresqlEngine) -> None:
    """It is for the whole transaction, not for the statement: nothing of it can go on, and the locks are free."""
    await db.execute("INSERT INTO item (value) VALUES ('0')")
    with pytest.raises(errors.TransactionError):
        async with db.transaction(isolation="repeatable read"):
            await db.fetch_value("SELECT count(*) FROM item")
            with db.detached():
                await db.execute("UPDATE item SET value = 'other'")
            with pytest.raises(errors.DatabaseBusyError) as caught:
                await db.execute("UPDATE item SET value = 'mine'")
            assert caught.value.code_name == "serialization_failure"
            with pytest.raises(errors.TransactionError):
                await names(db)
    assert engine.outside("SELECT value FROM item") == [("other",)]
    await usable(db)


# --- writers: no single writer --------------------------------------------------------------------------------


async def test_writers_do_not_wait_for_each_other(db: Any, engine: PostgresqlEngine) -> None:
    """While one transaction writes, another task's single writes and reads go on."""
    async with db.transaction():
        await add(db, "mine")
        with db.detached(), anyio.fail_after(HANGING):
            await add(db, "other")
            assert await names(db) == ["other"]
        assert await names(db) == ["mine", "other"]
    assert engine.committed() == ["mine", "other"]


async def test_writers_requires_new_within_a_write(db: Any, engine: PostgresqlEngine) -> None:
    """A new write transaction within one is possible, takes another connection, and stands by itself."""

    @transactional(propagation="requires_new")
    async def record() -> None:
        await add(db, "recorded")

    with pytest.raises(LookupError):
        async with db.transaction():
            await add(db, "undone")
            await record()
            raise LookupError
    assert engine.committed() == ["recorded"]


async def test_writers_that_need_the_same_row_wait(make_db: Any, engine: PostgresqlEngine) -> None:
    """A write that needs a row somebody has changed waits for that transaction, `lock_timeout` at the most."""
    db = await make_db(busy_timeout=100)
    await add(db, "a")
    async with db.transaction():
        await db.execute("UPDATE jobs SET enabled = 0")
        with db.detached(), pytest.raises(errors.DatabaseBusyError):
            await db.execute("UPDATE jobs SET enabled = 2")
    assert engine.outside("SELECT enabled FROM jobs") == [(0,)]


# --- groups ---------------------------------------------------------------------------------------------------


async def test_groups_are_the_servers(db: Any) -> None:
    """Writes that wait together travel together, but each is its own commit; one failing disturbs no other."""
    await gather(*[lambda n=n: db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": n}) for n in "abc"])
    rows = [f"{n:02}" for n in range(60)]
    rows[30] = "a"
    results = await gather(
        *[lambda n=n: db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": n}) for n in rows]
    )
    assert [type(result) for result in results if isinstance(result, Exception)] == [errors.IntegrityError]
    assert isinstance(results[30], errors.IntegrityError)
    assert db.stats().grouped_total == 0
    assert await db.fetch_value("SELECT count(*) FROM jobs") == 62


async def test_groups_do_not_hold_anybody_back(make_db: Any) -> None:
    """A statement that has always been quick and now waits for a lock does not keep those sent with it waiting."""
    db = await make_db(pool_size=3)
    await db.execute("INSERT INTO item (value) VALUES ('0'), ('0')")
    update = "UPDATE item SET value = 'x' WHERE id = :id"
    for _ in range(8):
        await db.execute(update, {"id": 2})
    async with db.transaction():
        await db.execute(update, {"id": 1})
        with db.detached():
            async with anyio.create_task_group() as group:
                group.start_soon(db.execute, update, {"id": 1})
                with anyio.fail_after(HANGING):
                    await gather(*[lambda: db.execute(update, {"id": 2})] * 20)
                group.cancel_scope.cancel()
    await usable(db)


# --- files ----------------------------------------------------------------------------------------------------


async def test_files_a_server_that_cannot_be_reached(make_db: Any) -> None:
    """Where SQLite's file cannot be opened, here the server does not answer: the same error, and no password in it."""
    db = await make_db(
        schema=False, conninfo="host=127.0.0.1 port=1 dbname=orders user=app password=hunter2", connect_timeout=2
    )
    for _ in range(2):
        with pytest.raises(errors.ConnectionFailedError) as caught:
            await db.fetch_value("SELECT 1")
        assert caught.value.path == "postgresql://127.0.0.1:1/orders"
        assert "refused" in caught.value.reason
        assert "hunter2" not in str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)


async def test_files_configure_while_open(db: Any, engine: PostgresqlEngine) -> None:
    """While pools are open `configure` is an error; after `close_all` the same handle follows the new settings."""
    await add(db, "a")
    with pytest.raises(errors.ConfigurationError):
        engine.public.configure(engine.settings())
    await engine.public.close_all()
    other = {**engine.settings()["database"]["postgresql"], **engine.section("audit")}
    engine.public.configure({"database": {"postgresql": other}})
    await db.execute_script(engine.schema)
    assert await names(db) == []
    assert engine.committed() == ["a"]


# --- backup ---------------------------------------------------------------------------------------------------


async def test_backup_says_what_to_use_instead(db: Any, tmp_path: Path) -> None:
    """`backup()` raises, and names the server's own tools."""
    with pytest.raises(errors.DatabaseError, match="pg_dump"):
        await db.backup(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    await usable(db)


# --- raw ------------------------------------------------------------------------------------------------------


async def test_raw_connection_is_psycopgs(db: Any, engine: PostgresqlEngine) -> None:
    """`run` hands psycopg's own connection to a function on the connection's thread, with every style of parameters."""

    def work(connection: psycopg.Connection[Any], name: str) -> int:
        assert isinstance(connection, psycopg.Connection)
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (name,))
        connection.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": name * 2})
        connection.execute("INSERT INTO jobs (name) VALUES (%s)", (name * 3,))
        connection.execute("INSERT INTO jobs (name) VALUES (%(name)s)", {"name": name * 4})
        connection.cursor().executemany("INSERT INTO jobs (name) VALUES ($1)", [(name * 5,), (name * 6,)])
        with connection.cursor() as cursor, cursor.copy("COPY jobs (name) FROM STDIN") as copy:
            copy.write_row([name * 7])
        assert engine.committed() == []
        return threading.get_ident()

    assert await db.run(work, "a") != threading.get_ident()
    assert engine.committed() == ["a" * n for n in range(1, 8)]


@pytest.mark.parametrize(
    "statements",
    [
        ("SET TRANSACTION READ WRITE",),
        ("SET transaction_read_only = off",),
        ("SELECT set_config('transaction_read_only', 'off', true)",),
        ("COMMIT",),
        ("ROLLBACK; BEGIN",),
        ("DO $$ BEGIN SET TRANSACTION READ WRITE; END $$",),
    ],
    ids=lambda statements: "; ".join(statements),
)
async def test_raw_readonly_refuses(db: Any, engine: PostgresqlEngine, statements: tuple[str, ...]) -> None:
    """With the driver's own connection in hand a read-only transaction still cannot write."""
    await add(db, "a")

    def attack(connection: psycopg.Connection[Any]) -> None:
        for sql in statements:
            connection.execute(sql)
        connection.execute("INSERT INTO jobs (name) VALUES ('x')")

    for call in (lambda: db.run(attack, readonly=True), lambda: transactional_readonly(db.run)(attack)):
        with pytest.raises(errors.DatabaseError):
            await call()
    assert engine.committed() == ["a"]
    await usable(db)


async def test_raw_read_ahead_is_bounded(db: Any) -> None:
    """A stream is a cursor on the server: no more is computed than a few chunks ahead."""
    await db.execute_script(
        "CREATE SEQUENCE computed;"
        "CREATE FUNCTION tick(value bigint) RETURNS bigint LANGUAGE sql VOLATILE AS"
        " 'SELECT value + 0 * nextval(''computed'')';"
    )
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(3000)])
    async with db.transaction():
        async with db.stream("SELECT tick(id) FROM item", chunk_size=50) as rows:
            count = 0
            async for _ in rows:
                count += 1
                if count % 500 == 1:
                    assert await db.fetch_value("SELECT last_value FROM computed") <= count + 50 * 8
    assert count == 3000


# --- values ---------------------------------------------------------------------------------------------------


async def test_values_have_types(db: Any) -> None:
    """Columns have types; NUL is no letter; numbers that are no floats come as Decimal."""
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    values = ["한글 'quoted' \U0001f600", b"\x00\xff" * 1000, 1.5, 2**63 - 1, 2**70, None, True, moment, {"a": [1]}]
    await db.execute(
        "CREATE TABLE anything (a text, b bytea, c float8, d bigint, e numeric, f int, g bool, h timestamptz, i jsonb)"
    )
    await db.execute("INSERT INTO anything VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    assert list(await db.fetch_one("SELECT * FROM anything")) == values
    with pytest.raises(errors.QueryExecutionError):
        await db.execute("INSERT INTO anything (a) VALUES (?)", ("\x00",))
    await usable(db)


@pytest.mark.parametrize("inside", [False, True], ids=["autocommit", "transaction"])
async def test_values_of_another_type_are_converted(db: Any, engine: PostgresqlEngine, inside: bool) -> None:
    """What SQLite would store anywhere is converted where the types leave no doubt, on every way to send it."""
    await db.execute("CREATE TABLE loose (id serial PRIMARY KEY, flag int, truth boolean, text text, number numeric)")
    insert = "INSERT INTO loose (flag, truth, text, number) VALUES (:flag, :truth, :text, :number)"
    row = {"flag": True, "truth": 1, "text": datetime.date(2026, 1, 2), "number": 2}

    async def work() -> None:
        await db.execute(insert, row)
        await db.execute_many(insert, [row, row])
        await db.execute_many(insert, [row] * 300)  # by COPY
        async with db.batch() as batch:
            await batch.execute(insert, row)
        assert await db.fetch_value("SELECT count(*) FROM loose WHERE truth = :one AND text = :day", {
            "one": 1, "day": datetime.date(2026, 1, 2),
        }) == 304  # fmt: skip
        assert await db.fetch_value("SELECT id FROM loose WHERE text <> :five LIMIT 1", {"five": 5}) == 1

    if inside:
        async with db.transaction():
            await work()
    else:
        await work()
    assert engine.outside("SELECT DISTINCT flag, truth, text, number FROM loose") == [(1, True, "2026-01-02", 2)]


# --- syntax ---------------------------------------------------------------------------------------------------


SCRIPT = """
-- a comment; with a semicolon  /* and */
CREATE TABLE log (text TEXT); /* one; /* nested; */ */
INSERT INTO log VALUES ('one; and a half'), (E'it\\'s; two');
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    INSERT INTO log VALUES (NEW.name); INSERT INTO log VALUES ('; end');
    RETURN NEW;
END
$body$;
CREATE FUNCTION plain() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT CASE WHEN true THEN 1 ELSE 2 END; SELECT 3; END;
CREATE TRIGGER noted AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION note();
INSERT INTO jobs (name) VALUES ('a')
"""


async def test_syntax_of_scripts(db: Any, engine: PostgresqlEngine) -> None:
    """A script is split by PostgreSQL's rules: dollar quotes, nested comments, bodies of functions."""
    assert await db.execute_script(SCRIPT) is None
    assert engine.outside("SELECT text FROM log") == [("one; and a half",), ("it's; two",), ("a",), ("; end",)]
    assert await db.fetch_value("SELECT plain()") == 3


HOSTILE: list[tuple[str, ...]] = [
    ("INSERT INTO jobs (name) VALUES ('x')",),
    ("UPDATE jobs SET name = 'x'",),
    ("DELETE FROM jobs",),
    ("MERGE INTO jobs USING (SELECT 1) ON true WHEN MATCHED THEN DELETE",),
    ("TRUNCATE jobs",),
    ("WITH n AS (INSERT INTO jobs (name) VALUES ('x') RETURNING 1) SELECT * FROM n",),
    ("SELECT * INTO copy FROM jobs",),
    ("SELECT * FROM jobs FOR UPDATE",),
    ("SELECT nextval('jobs_id_seq')",),
    ("CREATE TABLE t (a int)",),
    ("CREATE TEMP TABLE t (a int)",),
    ("ALTER TABLE jobs RENAME TO gone",),
    ("DROP TABLE jobs",),
    ("DO $$ BEGIN DELETE FROM jobs; END $$",),
    ("EXPLAIN ANALYZE DELETE FROM jobs",),
    ("SET LOCAL transaction_read_only = off", "DELETE FROM jobs"),
    ("SET TRANSACTION READ WRITE", "DELETE FROM jobs"),
    ("SELECT set_config('transaction_read_only', 'off', true)", "DELETE FROM jobs"),
    ("COMMIT", "DELETE FROM jobs"),
    ("COMMIT; BEGIN; DELETE FROM jobs",),
    ("ABORT", "START TRANSACTION READ WRITE", "DELETE FROM jobs"),
]


@pytest.fixture
async def narrow(make_db: Any) -> Any:
    """One connection: what an attack leaves on it meets the next."""
    return await make_db(pool_size=1)


@in_turn("nested", [False, True], ids=["outermost", "within-read-write"], using="narrow")
@in_turn("statements", HOSTILE, using="narrow")
async def test_syntax_readonly_refuses_every_write(
    narrow: Any, engine: PostgresqlEngine, statements: tuple[str, ...], nested: bool
) -> None:
    """Whatever SQL tries it, nothing is written in a read-only transaction, nor is anything left on the connection."""
    db = narrow
    await add(db, "a")

    @transactional_readonly
    async def attack(method: str, look_first: bool) -> None:
        refused: list[errors.DatabaseError] = []
        if look_first:
            await names(db)
        for sql in statements:
            try:
                await getattr(db, method)(sql)
            except errors.DatabaseError as error:
                refused.append(error)
        assert refused, "nothing was refused"
        assert all(isinstance(error, (errors.TransactionError, errors.QueryExecutionError)) for error in refused)

    for method in ("execute", "fetch_all", "execute_script"):
        for look_first in (False, True):
            if nested:
                async with db.transaction():
                    await add(db, f"{method} {look_first}")
                    await attack(method, look_first)
                    assert f"{method} {look_first}" in await names(db)
                await db.execute("DELETE FROM jobs WHERE name <> 'a'")
            else:
                await attack(method, look_first)
    assert engine.committed() == ["a"]
    tables = engine.outside("SELECT name FROM sqlite_master ORDER BY name")
    assert tables == [("child",), ("item",), ("jobs",), ("parent",)]
    await usable(db)


@pytest.mark.parametrize(
    "sql", ["SET search_path = x", "RESET ALL", "DISCARD ALL", "LISTEN x", "PREPARE p AS SELECT 1"]
)
async def test_syntax_that_would_change_one_connection(db: Any, sql: str) -> None:
    """What would change one connection of the pool for all who come after is refused, inside and outside."""
    with pytest.raises(errors.TransactionError):
        await db.execute(sql)
    async with db.transaction():
        with pytest.raises(errors.TransactionError):
            await db.execute(sql)
        await db.execute("SET LOCAL work_mem = '1MB'")
        assert await db.fetch_value("SHOW work_mem") == "1MB"
    assert await db.fetch_value("SHOW work_mem") != "1MB"


async def test_syntax_of_placeholders(db: Any) -> None:
    """`:name`, `?` and `$1` are placeholders; casts, slices, quotes and jsonb's operators are not."""
    row = await db.fetch_one(
        "SELECT :a::int + :b, ':c', \":d\", (ARRAY[1, 2, 3])[1:2], $$:e ?$$, '{\"a\": 1}'::jsonb ?? 'a' /* :f ? */ -- :g ?"
        '\nFROM (SELECT 5 AS ":d") t',
        {"a": 1, "b": 2},
    )
    assert list(row) == [3, ":c", 5, [1, 2], ":e ?", True]
    assert await db.fetch_value("SELECT $2 - $1", (1, 3)) == 2
    assert await db.fetch_value("SELECT '{\"a\": 1}'::jsonb ?| ARRAY[?]", ("a",)) is True
    with pytest.raises(errors.QueryExecutionError, match="mixed"):
        await db.fetch_value("SELECT :a + ?", {"a": 1})


async def test_get_db_is_held_by_the_configuration(db: Any) -> None:
    """The engine-neutral `get_db` is the handle of the configured engine."""
    assert get_db() is db
    assert db.engine.name == "postgresql"
    async with held(db):
        await eventually(lambda: db.stats().writer_in_use == 2)


@pytest.mark.parametrize("isolation", ["repeatable read", "SERIALIZABLE"])
async def test_isolation_of_the_configuration(make_db: Any, isolation: str) -> None:
    """The configured isolation holds for single statements and transactions, unless one asks for another."""
    db = await make_db(isolation=isolation)
    shown = "SELECT current_setting('transaction_isolation')"

    @transactional(isolation="read committed")
    async def weaker() -> str:
        return await db.fetch_value(shown)

    @transactional(isolation="serializable", offload=True)
    async def offloaded() -> list[str]:
        first = await db.fetch_value(shown)
        await db.commit()
        return [first, await db.fetch_value(shown)]

    @transactional(isolation="serializable")
    async def twice() -> list[str]:
        first = await db.fetch_value(shown)
        await db.commit()
        return [first, await db.fetch_value(shown)]

    assert await db.fetch_value(shown) == isolation.lower()
    assert await weaker() == "read committed"
    assert await offloaded() == await twice() == ["serializable"] * 2
    async with db.transaction():
        assert await db.fetch_value(shown) == isolation.lower()
        with pytest.raises(errors.TransactionError, match="where the transaction begins"):
            await weaker()
    async with db.transaction(readonly=True):
        assert await db.fetch_value(shown) == isolation.lower()
    async with db.transaction(readonly=True, isolation="read committed"):
        assert await db.fetch_value(shown) == "repeatable read", "a read-only transaction is one snapshot"
    with pytest.raises(ValueError, match="serialisable"):
        db.transaction(isolation="serialisable")


async def test_without_statement_rollback(make_db: Any, engine: PostgresqlEngine) -> None:
    """`statement_rollback: false`: a failed statement leaves a transaction that can only be rolled back."""
    db = await make_db(statement_rollback=False)
    with pytest.raises(errors.TransactionError):
        async with db.transaction():
            await add(db, "a")
            with pytest.raises(errors.IntegrityError):
                await add(db, "a")
            with pytest.raises(errors.TransactionError):
                await add(db, "b")
    assert engine.committed() == []
    await usable(db)


async def test_a_table_that_changes_under_a_prepared_statement(db: Any) -> None:
    """A statement that has been prepared is prepared anew when its columns are others now, in a transaction too."""
    for inside in (False, True):
        await db.execute("CREATE TABLE shape (a int)")
        await db.execute("INSERT INTO shape VALUES (1)")
        for _ in range(12):
            assert dict(await db.fetch_one("SELECT * FROM shape")) == {"a": 1}
        await db.execute("ALTER TABLE shape ADD COLUMN b int DEFAULT 2")
        if inside:
            async with db.transaction():
                assert dict(await db.fetch_one("SELECT * FROM shape")) == {"a": 1, "b": 2}
        assert dict(await db.fetch_one("SELECT * FROM shape")) == {"a": 1, "b": 2}
        await db.execute("DROP TABLE shape")


async def test_lastrowid(make_db: Any) -> None:
    """The generated key, whatever it is called; None where there is none, or where a row was updated instead."""
    db = await make_db()
    await db.execute_script(
        'CREATE TABLE odd ("The Key" serial PRIMARY KEY, name text UNIQUE); CREATE TABLE none (name text);'
        "CREATE TABLE two (a int, b int, PRIMARY KEY (a, b))"
    )
    insert = "INSERT INTO odd (name) VALUES (:name) ON CONFLICT (name) DO UPDATE SET name = excluded.name -- as it was"
    assert [(await db.execute(insert, {"name": name})).lastrowid for name in "aab"] == [1, None, 3]
    nothing = "INSERT INTO odd (name) VALUES ('a') ON CONFLICT DO NOTHING;"
    assert tuple(await db.execute(nothing)) == (0, None)
    assert (await db.execute("INSERT INTO none VALUES ('a')")).lastrowid is None
    assert (await db.execute("INSERT INTO two VALUES (1, 2)")).lastrowid is None
    assert (await db.execute("INSERT INTO odd (name) SELECT 'c'")).lastrowid is None, "it might be a million rows"
    await db.execute("DROP TABLE odd")
    await db.execute("CREATE TABLE odd (id serial PRIMARY KEY, name text UNIQUE)")
    assert (await db.execute(insert, {"name": "d"})).lastrowid == 1
    db = await make_db(schema=False, lastrowid=False)
    assert (await db.execute("INSERT INTO odd (name) VALUES ('e')")).lastrowid is None


async def test_a_failure_behind_nothing_but_reads(make_db: Any, engine: PostgresqlEngine) -> None:
    """Behind statements that only read, one that fails undoes only itself, and needs no savepoint for that; behind one that
    does more than its text tells (a view, a policy, an operator), nothing of it is lost.
    """
    db = await make_db(pool_size=1)
    await db.execute_script(
        "CREATE FUNCTION act() RETURNS int LANGUAGE sql AS $$ INSERT INTO item (value) VALUES ('kept') RETURNING 1 $$;"
        "CREATE VIEW acting AS SELECT act() AS a; CREATE TABLE plain (a int); INSERT INTO plain VALUES (1)"
    )
    await add(db, "there")
    number = "SELECT CAST(pg_current_xact_id() AS text)"
    cases = {
        "SELECT a FROM acting": 1,
        "SELECT a FROM plain": 0,
        'TABLE "acting"': 1,
        "SELECT a, CAST(now() AS text) FROM plain": 0,
        number: 0,
    }
    for _ in range(4):  # known, prepared
        for sql, kept in cases.items():
            async with db.transaction():
                first = tuple(await db.fetch_one(sql))
                with pytest.raises(errors.IntegrityError):
                    await add(db, "there")
                if sql in (number, "SELECT a, CAST(now() AS text) FROM plain"):
                    assert tuple(await db.fetch_one(sql)) == first, sql
                await add(db, "after")
            assert engine.outside("SELECT count(*) FROM item") == [(kept,)], sql
            assert engine.committed() == ["after", "there"], sql
            await db.execute("DELETE FROM item")
            await db.execute("DELETE FROM jobs WHERE name = 'after'")
    await db.execute_script(
        "CREATE FUNCTION same(a int, b int) RETURNS bool LANGUAGE sql AS 'SELECT act() = 1';"
        "CREATE OPERATOR === (LEFTARG = int, RIGHTARG = int, FUNCTION = same)"
    )
    async with db.transaction():
        assert await db.fetch_value("SELECT a === 1 FROM plain") is True
        with pytest.raises(errors.IntegrityError):
            await add(db, "there")
    assert engine.outside("SELECT count(*) FROM item") == [(1,)]
    async with db.transaction(isolation="repeatable read"):  # and there the snapshot is kept
        assert await db.fetch_value("SELECT count(*) FROM plain") == 1
        oracle().execute(f"INSERT INTO {engine.schemas['default']}.plain VALUES (2)")
        with pytest.raises(errors.IntegrityError):
            await add(db, "there")
        assert await db.fetch_value("SELECT count(*) FROM plain") == 1
