"""What use of PostgreSQL has found: nothing lost, nothing changed, nothing left behind, nothing hung."""

from __future__ import annotations

import array
import contextlib
import datetime
import decimal
import itertools
import logging
import re
import threading
import types
import uuid
from collections import namedtuple
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import psycopg
import psycopg.sql
import pytest

from database import errors
from tests.contract.support import case, gather, usable
from tests.postgresql.engine import PostgresqlEngine, oracle
from tests.postgresql.server import shared

pytestmark = pytest.mark.anyio

HANG = 20
"""Seconds after which something hangs."""


# --- one row of many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fetch_one", "fetch_value"])
async def test_one_row_leaves_the_snapshot_as_it_is(db: Any, engine: PostgresqlEngine, method: str) -> None:
    """Reading one row of many as the first thing of a transaction does not begin the transaction anew."""
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(2000)])
    many = "SELECT value FROM item ORDER BY id"
    xid = "SELECT pg_current_xact_id()::text"
    for options in ({"readonly": True}, {"isolation": "serializable"}, {"isolation": "repeatable read"}):
        for _ in range(2):  # the second time it is known to have many rows
            with anyio.fail_after(HANG):
                async with db.transaction(**options):
                    await getattr(db, method)(many)
                    with db.detached():
                        await db.execute("INSERT INTO jobs (name) VALUES ('new')")
                    assert await db.fetch_value("SELECT count(*) FROM jobs") == 0, options
                    if "isolation" in options:
                        before = await db.fetch_value(xid)
                        await getattr(db, method)(many)
                        assert await db.fetch_value(xid) == before, options
            await db.execute("DELETE FROM jobs")


async def test_one_row_and_then_an_update_of_it(db: Any, engine: PostgresqlEngine) -> None:
    """What was read first and is changed by somebody else meanwhile cannot be overwritten at SERIALIZABLE."""
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [("0",)] * 2000)
    for read in (db.fetch_value, db.fetch_one):
        with pytest.raises(errors.DatabaseError) as caught:
            async with db.transaction(isolation="serializable"):
                found = await read("SELECT value FROM item ORDER BY id")
                value = found if isinstance(found, str) else found[0]
                with db.detached():
                    await db.execute("UPDATE item SET value = 'theirs' WHERE id = 1")
                await db.execute("UPDATE item SET value = :value WHERE id = 1", {"value": value + "!"})
        assert isinstance(caught.value, (errors.DatabaseBusyError, errors.TransactionError))
        assert engine.outside("SELECT value FROM item WHERE id = 1") == [("theirs",)]


async def test_one_row_where_there_is_but_one(db: Any) -> None:
    """A slow SELECT (or a server far away) that gave one row is not read by a cursor again, unless it has had more since."""
    slow = "SELECT (SELECT count(*) FROM pg_cursors WHERE name LIKE 'first%') FROM generate_series(1, :rows), pg_sleep(0.01)"
    for inside in (False, True):
        async with db.transaction() if inside else contextlib.nullcontext():
            for rows, cursors in ((1, {0, 1}), (1, {0}), (1, {0}), (3, {0}), (3, {1}), (1, {1}), (1, {0})):
                assert await db.fetch_value(slow, {"rows": rows}) in cursors, (inside, rows)
            slow += " "  # a statement of its own


async def test_one_row_of_a_select_that_writes(db: Any, engine: PostgresqlEngine) -> None:
    """A SELECT may write: where one row of it is wanted, it is done to its end all the same, and committed."""
    await db.execute_script(
        "CREATE TABLE seen (n int);"
        "CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql AS 'INSERT INTO seen VALUES (n) RETURNING n';"
        "CREATE SEQUENCE counter"
    )
    for method in ("fetch_value", "fetch_one"):
        for inside in (False, True):
            await db.execute("TRUNCATE seen")
            await db.execute("ALTER SEQUENCE counter RESTART")
            for sql in (
                "SELECT note(i) FROM generate_series(1, 3000) i",
                "SELECT nextval('counter') FROM generate_series(1, 3000)",
            ):
                if inside:
                    async with db.transaction():
                        found = await getattr(db, method)(sql)
                else:
                    found = await getattr(db, method)(sql)
                assert (found if method == "fetch_value" else found[0]) == 1
            assert engine.outside("SELECT count(*), max(n) FROM seen") == [(3000, 3000)], (method, inside)
            assert engine.outside("SELECT last_value FROM counter") == [(3000,)], (method, inside)


@pytest.mark.any_loop
async def test_one_row_of_a_select_that_hides_what_it_does(db: Any, engine: PostgresqlEngine) -> None:
    """So it is where a view, an operator, a cast, a domain, an aggregate or a name of the server's own hides a function."""
    await db.execute_script(
        "CREATE TABLE seen (n int); CREATE SEQUENCE counter;"
        "CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql AS 'INSERT INTO seen VALUES (n) RETURNING n';"
        "CREATE VIEW noting AS SELECT note(i) AS n FROM generate_series(1, 50) i; CREATE VIEW over AS SELECT * FROM noting;"
        "CREATE FUNCTION log(text text) RETURNS int LANGUAGE sql AS 'SELECT note(1)';"
        "CREATE FUNCTION stamp(item item) RETURNS int LANGUAGE sql AS 'SELECT note(1)';"
        "CREATE FUNCTION same(a int, b int) RETURNS bool LANGUAGE sql AS 'SELECT note(a) = a';"
        "CREATE OPERATOR === (LEFTARG = int, RIGHTARG = int, FUNCTION = same);"
        "CREATE FUNCTION step(a int, b int) RETURNS int LANGUAGE sql AS 'SELECT note(b)';"
        "CREATE AGGREGATE noted(int) (SFUNC = step, STYPE = int, INITCOND = '0');"
        "CREATE DOMAIN checked AS int CHECK (note(VALUE) = VALUE)"
    )
    await db.execute("INSERT INTO item (value) SELECT 'x' FROM generate_series(1, 50)")
    rows = "FROM generate_series(1, 50) i"
    for sql in (
        "SELECT n FROM noting",
        'TABLE "over"',
        f"SELECT log(i::text) {rows}",
        f"SELECT {engine.schemas['default']}.log(i::text) {rows}",
        "SELECT item.stamp FROM item",
        f"SELECT i === 1 {rows}",
        f"SELECT noted(i) {rows} GROUP BY i",
        f"SELECT i::checked {rows}",
    ):
        for inside in (False, True):
            for method in (db.fetch_one, db.fetch_value):
                with case(sql=sql, inside=inside, method=method.__name__):
                    await db.execute("TRUNCATE seen")
                    async with db.transaction() if inside else contextlib.nullcontext():
                        await method(sql)
                    assert engine.outside("SELECT count(*) FROM seen") == [(50,)]
        await db.execute(f"CREATE TABLE other{sum(map(ord, sql))} (a int)")  # nothing that was learnt is to be of help
    async with db.transaction():  # what the server's own functions do is not done by half either
        await db.fetch_value(f"SELECT pg_advisory_xact_lock(i) {rows}")
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert await db.fetch_value(held) == 50
        await db.fetch_one(f"SELECT lo_create(0) {rows}")
        await db.fetch_one(
            "SELECT lo_put(oid, 0, 'x') FROM pg_largeobject_metadata WHERE lomowner = current_user::regrole"
        )
        assert await db.fetch_value("SELECT count(DISTINCT loid) FROM pg_largeobject") >= 50
        await db.rollback()


# --- many rows -----------------------------------------------------------------------------------------------------

ZONE = datetime.timezone(datetime.timedelta(hours=9))


async def _stored(db: Any, column: str, rows: list[Any], how: str, table: str = "t") -> Any:
    """What is in the column after the rows were written in that way, or the class of the error."""
    await db.execute_script(f"DROP TABLE IF EXISTS {table} CASCADE; CREATE TABLE {table} (v {column})")
    insert = f"INSERT INTO {table} (v) VALUES (?)"
    try:
        if how == "one by one":
            for row in rows:
                await db.execute(insert, (row,))
        elif how == "batch":
            async with db.batch() as batch:
                for row in rows:
                    await batch.execute(insert, (row,))
        else:
            await db.execute_many(insert, [(row,) for row in rows])
    except errors.QueryExecutionError as error:
        return "refused", error.code
    return await db.fetch_all(f"SELECT v::text FROM {table}")


@pytest.mark.any_loop
async def test_many_rows_are_what_one_row_is(db: Any) -> None:
    """`execute`, a batch, and `execute_many` of few and of many rows store the same values, or refuse the same ones."""
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=ZONE)
    cases: list[tuple[str, list[Any]]] = [
        ("timestamp", [moment, moment.replace(tzinfo=None)]),
        ("timestamptz(0)", [moment]),
        ("numeric(10, 2)", [decimal.Decimal("1.005"), 1.005, 0.1 + 0.2, 7]),
        ("numeric", [0.1 + 0.2, decimal.Decimal("1E+5"), decimal.Decimal("NaN"), 5]),
        ("int", [2.0, 2.5, decimal.Decimal("3"), True]),
        ("float4", [0.1, 16777217]),
        ("text", [1, 1.5, True, moment, datetime.date(2026, 1, 2), uuid.UUID(int=5), "x\\N\t", None]),
        ("varchar(3)", ["abc  "]),
        ("char(5)", ["ab"]),
        ("date", [moment]),
        ("bool", [True, 1]),
        (
            "bytea",
            [b"\\x00\xff", bytearray(b"ab"), memoryview(b"abcd"), memoryview(b"abcdef")[::2], array.array("b", b"xy")],
        ),
        ("jsonb", [{"a": 1}]),
    ]
    refused = [
        ("text", {"a": 1}),
        ("text", [1, 2]),
        ("text", memoryview(b"x")),
        ("text", object()),
        ("int", "x"),
        ("int", {1: 2}),
    ]
    for column, values in cases + [(column, [value]) for column, value in refused]:
        for value in values:
            for count in (1, 201):
                ways = ("one by one", "batch", "many") if count == 1 else ("many",)
                for how in ways:
                    stored = await _stored(db, column, [value] * count, how)
                    if how == "one by one":
                        wanted = stored
                    elif isinstance(wanted, tuple):
                        assert stored == wanted, (column, value, how, count)
                    else:
                        assert stored == wanted * count, (column, value, how, count)


async def test_many_rows_of_changing_types(db: Any) -> None:
    """A row whose type is another one does not change how those before and after it are stored; all or nothing."""
    await db.execute("CREATE TABLE t (v numeric(10, 2))")
    rows = [(decimal.Decimal(1),)] * 300 + [(1.005,), (7,), (None,)] + [(decimal.Decimal("1.005"),)] * 700 + [(True,)]
    assert (await db.execute_many("INSERT INTO t (v) VALUES (?)", rows)).rowcount == len(rows)
    assert await db.fetch_value("SELECT sum(v) FROM t") == 300 + decimal.Decimal("1.01") * 701 + 7 + 1
    with pytest.raises(errors.QueryExecutionError):
        await db.execute_many("INSERT INTO t (v) VALUES (?)", [*rows, (object(),)])
    assert await db.fetch_value("SELECT count(*) FROM t") == len(rows)
    await db.execute("CREATE TABLE n (v int)")
    with pytest.raises(errors.QueryExecutionError):
        await db.execute_many("INSERT INTO n (v) VALUES (?)", [(1,)] * 600 + [("x",)])
    assert await db.fetch_value("SELECT count(*) FROM n") == 0


async def test_many_rows_obey_rules_triggers_and_views(db: Any, engine: PostgresqlEngine) -> None:
    """From 200 rows on a rule is followed, a statement's trigger fires each time, a view takes rows, policies hold."""
    await db.execute_script(
        """
        CREATE TABLE base (v int); CREATE TABLE copy (v int); CREATE VIEW shown AS SELECT v FROM base;
        CREATE TABLE ruled (v int); CREATE RULE also AS ON INSERT TO ruled DO ALSO INSERT INTO copy VALUES (new.v);
        CREATE TABLE fired (v int); CREATE TABLE shots (n int);
        CREATE FUNCTION shoot() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO shots VALUES (1); RETURN NULL; END';
        CREATE TRIGGER each AFTER INSERT ON fired FOR EACH STATEMENT EXECUTE FUNCTION shoot();
        CREATE TABLE counted (id int GENERATED ALWAYS AS IDENTITY, v int);
        CREATE TABLE tree (id bigint PRIMARY KEY, parent bigint REFERENCES tree (id));
        """
    )
    many = [(n,) for n in range(250)]
    for table in ("shown", "ruled", "fired"):
        assert (await db.execute_many(f"INSERT INTO {table} (v) VALUES (?)", many)).rowcount == 250, table
    assert engine.outside(
        "SELECT (SELECT count(*) FROM base), (SELECT count(*) FROM copy), (SELECT count(*) FROM shots)"
    ) == [(250, 250, 250)]
    for rows in (many[:1], many):
        with pytest.raises(errors.QueryExecutionError) as caught:
            await db.execute_many("INSERT INTO counted (id) VALUES (?)", rows)
        assert caught.value.code_name == "generated_always"
        with pytest.raises(errors.QueryExecutionError) as caught:
            await db.execute_many("INSERT INTO missing (v) VALUES (?)", rows)
        assert caught.value.code_name == "undefined_table"
        async with db.transaction():
            with pytest.raises(errors.QueryExecutionError) as caught:
                await db.execute_many("INSERT INTO missing (v) VALUES (?)", rows)
            assert caught.value.code_name == "undefined_table"
    with pytest.raises(errors.IntegrityError):
        await db.execute_many("INSERT INTO tree VALUES (?, ?)", [(n, n + 1) for n in range(250)] + [(250, None)])
    await usable(db)


@pytest.mark.any_loop
async def test_many_rows_obey_policies(make_db: Any, engine: PostgresqlEngine) -> None:
    """Row-level security holds for few rows and for many, which COPY would not be told of."""
    db = await make_db()
    schema = engine.schemas["default"]
    role = f"tenant_{schema}"
    look = oracle()
    await db.execute_script(
        "CREATE TABLE owned (v text, who text DEFAULT current_user); ALTER TABLE owned ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY own ON owned USING (who = current_user) WITH CHECK (v <> 'theirs')"
    )
    look.execute(
        f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT ALL ON {schema}.owned TO {role}"
    )
    try:
        db = await make_db(schema=False, user=role)
        insert = "INSERT INTO owned (v) VALUES (?)"
        for count in (1, 250):
            await db.execute_many(insert, [("mine",)] * count)
            with pytest.raises(errors.QueryExecutionError) as caught:
                await db.execute_many(insert, [("mine",)] * count + [("theirs",)])
            assert caught.value.code_name == "insufficient_privilege"
        assert engine.outside("SELECT v, who, count(*) FROM owned GROUP BY 1, 2") == [("mine", role, 251)]
    finally:
        await engine.public.close_all()
        look.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_many_rows_are_taken_when_they_are_handed_over(db: Any) -> None:
    """A generator that uses one list, dict or bytearray for all its rows; and what it raises comes as it is."""
    await db.execute("CREATE TABLE t (v int, b bytea)")

    def lists(count: int) -> Any:
        row: list[Any] = [0, bytearray(1)]
        for n in range(count):
            row[0] = row[1][0] = n % 256
            yield row

    def dicts(count: int) -> Any:
        row: dict[str, Any] = {"b": bytearray(1)}
        for n in range(count):
            row["v"] = row["b"][0] = n % 256
            yield row

    for rows, insert in (
        (lists, "INSERT INTO t (v, b) VALUES (?, ?)"),
        (dicts, "INSERT INTO t (v, b) VALUES (:v, :b)"),
    ):
        for count in (100, 250, 1100):
            await db.execute("TRUNCATE t")
            await db.execute_many(insert, rows(count))
            stored = [(row["v"], row["b"][0]) for row in await db.fetch_all("SELECT v, b FROM t ORDER BY ctid")]
            assert stored == [(n % 256, n % 256) for n in range(count)]

    def failing(count: int) -> Any:
        yield from lists(count)
        raise OverflowError("mine")

    for count in (1, 300):
        with pytest.raises(OverflowError, match="mine"):
            await db.execute_many("INSERT INTO t (v, b) VALUES (?, ?)", failing(count))
    assert await db.fetch_value("SELECT count(*) FROM t") == 1100


# --- what cannot be sent -------------------------------------------------------------------------------------------


async def test_text_that_would_be_cut_off(db: Any, engine: PostgresqlEngine) -> None:
    """A NUL or half of a surrogate pair in SQL text is refused by every way in, and nothing is executed."""
    await db.execute("INSERT INTO jobs (name) VALUES ('a')")
    for text in (
        "DELETE FROM jobs \0 WHERE name = 'x'",
        "DELETE FROM jobs WHERE name <> '\0'",
        "DELETE FROM jobs -- \ud800",
    ):
        calls: list[Any] = [
            lambda text=text: db.execute(text),
            lambda text=text: db.execute_many(text, [()]),
            lambda text=text: db.execute_script(f"SELECT 1; {text}"),
            lambda text=text: db.fetch_all(f"{text} RETURNING id"),
            lambda text=text: db.run(lambda connection: connection.execute(text)),
            lambda text=text: db.run(lambda connection: connection.execute(psycopg.sql.SQL(text))),
            lambda text=text: db.run(lambda connection: connection.cursor().executemany(text, [()])),
        ]
        for call in calls:
            with pytest.raises(errors.DatabaseError) as caught:
                await call()
            str(caught.value).encode()
    assert engine.committed() == ["a"]
    await usable(db)


@pytest.mark.any_loop
@pytest.mark.shortened
async def test_parameters_that_cannot_be_sent(db: Any, pytestconfig: pytest.Config) -> None:
    """Too many parameters, a lone surrogate, what nobody can adapt: an error, and the connection goes on; so does closing."""
    marks = ",".join("?" * 65_536)  # nothing else for each: reading the text is what takes long

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    circle: dict[str, Any] = {}
    circle["self"] = circle
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    statements: list[tuple[str, Any]] = [
        ("INSERT INTO item (value) VALUES (?)", ("\ud800",)),
        ("INSERT INTO item (value) VALUES (?)", ("a\0b",)),
        ("INSERT INTO item (value) VALUES (?)", (object(),)),
        ("INSERT INTO item (value) VALUES ($70000)", ("x",)),
        ("INSERT INTO item (value) VALUES (?)", ({"amount": decimal.Decimal(1)},)),
        ("INSERT INTO item (value) VALUES (?)", (circle,)),
        ("INSERT INTO item (value) VALUES (?)", (nested,)),
        ("INSERT INTO item (value) VALUES (?)", (Mute(),)),
    ]
    with anyio.fail_after(HANG):
        for call in (db.execute,) if pytestconfig.getoption("quick") else (db.execute, db.fetch_all):
            with pytest.raises(errors.QueryExecutionError, match="65,535"):
                await call(f"INSERT INTO item (value) SELECT 'x' WHERE 'x' IN ({marks})", ["x"] * 65_536)
        for _ in range(7):  # prepared, after a while
            for sql, params in statements:
                with pytest.raises(errors.QueryExecutionError):
                    await db.execute(sql, params)
                with pytest.raises(errors.QueryExecutionError):
                    await db.execute_many(sql, [params])
                async with db.transaction():
                    with pytest.raises(errors.QueryExecutionError):
                        await db.execute(sql, params)
                    await db.execute("SELECT 1")
                results = await gather(*[lambda sql=sql, params=params: db.execute(sql, params)] * 3)
                assert all(isinstance(result, errors.QueryExecutionError) for result in results)
            await usable(db)
        with pytest.raises(errors.QueryExecutionError):
            async with db.batch() as batch:
                await batch.execute("INSERT INTO item (value) VALUES (?)", ("\ud800",))
        assert await db.fetch_value("SELECT count(*) FROM item") == 0


async def test_copy_as_sql_text(db: Any, engine: PostgresqlEngine) -> None:
    """COPY between client and server is refused as text, with what to use; a dump's script is refused as a whole."""
    dump = "CREATE TABLE dumped (a int);\nCOPY dumped (a) FROM stdin;\n1\n\\.\n"
    with anyio.fail_after(HANG):
        for sql in ("COPY jobs TO STDOUT", "COPY jobs (name) FROM STDIN", "copy (SELECT 1) to stdout"):
            for method in ("execute", "execute_script"):
                with pytest.raises(errors.QueryExecutionError, match=r"cursor\.copy"):
                    await getattr(db, method)(sql)
            with pytest.raises(errors.DatabaseError):
                await db.run(lambda connection, sql=sql: connection.execute(sql.encode()))
        with pytest.raises(errors.QueryExecutionError, match="psql"):
            await db.execute_script(dump)
        assert engine.outside("SELECT to_regclass('dumped')") == [(None,)]
        with pytest.raises(errors.DatabaseError):  # round the filter
            await db.run(lambda connection: connection.pgconn.send_query(b"COPY jobs FROM STDIN"))
        await usable(db)


# --- the raw connection --------------------------------------------------------------------------------------------


def _sql(text: str) -> list[Any]:
    return [text, text.encode(), psycopg.sql.SQL(text), psycopg.sql.Composed([psycopg.sql.SQL(text)])]


async def test_a_function_cannot_end_the_transaction(db: Any, engine: PostgresqlEngine) -> None:
    """COMMIT in whatever form is refused; what goes round that is told as unknown, and a read-only run writes nothing."""

    def named(connection: Any, form: Any) -> None:
        with connection.cursor("named") as cursor:
            cursor.execute(form)

    def forms(connection: Any) -> list[Any]:
        ways: list[Any] = []
        for text in (
            "COMMIT",
            "ROLLBACK",
            "END",
            "BEGIN",
            "SELECT 1; COMMIT",
            "/* x */ commit",
            "SET ROLE postgres",
            "LISTEN x",
        ):
            for form in _sql(text):
                ways += [
                    lambda form=form: connection.execute(form),
                    lambda form=form: connection.cursor().executemany(form, [()]),
                    lambda form=form: connection.cursor().copy(form).__enter__(),
                    lambda form=form: list(connection.cursor().stream(form)),
                    lambda form=form: named(connection, form),
                ]
        return ways

    def attack(connection: Any) -> int:
        connection.execute("INSERT INTO jobs (name) VALUES ('a')")
        for way in forms(connection):
            with pytest.raises(errors.DatabaseError):
                way()
        return 7

    assert await db.run(attack) == 7
    assert engine.committed() == ["a"]

    def around(connection: Any, sql: bytes, name: str, foreign: bool) -> None:
        connection.execute("SELECT 1")
        if foreign:
            psycopg.ClientCursor(connection).execute(sql)
        else:
            connection.pgconn.exec_(sql)
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (f"{name} {next(count)}",))

    count = itertools.count()
    for number, sql in enumerate((b"COMMIT", b"ROLLBACK", b"COMMIT; BEGIN", b"ROLLBACK; BEGIN")):
        for foreign in (False, True):
            for readonly in (False, True):
                name = f"{number} {foreign} {'reads' if readonly else 'writes'}"
                with pytest.raises(errors.DatabaseError) as caught:
                    await db.run(around, sql, name, foreign, readonly=readonly)
                if not readonly:
                    assert "unknown" in str(caught.value), name
                with pytest.raises(errors.TransactionError):
                    async with db.transaction(readonly=readonly):
                        with pytest.raises(errors.DatabaseError):
                            await db.run(around, sql, name, foreign)
    assert not [name for name in engine.committed() if "reads" in name], "a read-only run has written"
    await usable(db)


async def test_libraries_commit_and_roll_back_within_a_run(db: Any, engine: PostgresqlEngine) -> None:
    """commit(), rollback(), `with connection:`, transaction() and SAVEPOINT work within the transaction that is open."""

    def add(connection: Any, name: str) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": name})

    def work(connection: Any, fail: bool) -> list[str]:
        add(connection, "1 kept")
        connection.commit()
        add(connection, "undone")
        connection.rollback()
        with connection:
            add(connection, "2 kept")
        with pytest.raises(LookupError), connection:
            add(connection, "undone")
            raise LookupError
        with connection.transaction():
            add(connection, "3 kept")
        connection.commit()
        with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
            add(connection, "1 kept")
        connection.execute("SAVEPOINT mine")
        add(connection, "undone")
        connection.execute(b"ROLLBACK TO SAVEPOINT mine")
        connection.execute("RELEASE mine")
        with pytest.raises(psycopg.errors.UniqueViolation):
            add(connection, "1 kept")
        connection.rollback()  # back to the last commit
        add(connection, "4 kept")
        connection.close()
        assert engine.committed() == []
        if fail:
            raise LookupError
        return [row[0] for row in connection.execute("SELECT name FROM jobs ORDER BY name")]

    kept = ["1 kept", "2 kept", "3 kept", "4 kept"]
    with pytest.raises(LookupError):
        await db.run(work, True)
    assert engine.committed() == []
    assert await db.run(work, False) == kept
    assert sorted(engine.committed()) == kept
    await db.execute("DELETE FROM jobs")
    async with db.transaction():
        await db.execute("INSERT INTO jobs (name) VALUES ('0 around')")
        with pytest.raises(LookupError):
            await db.run(work, True)
        assert await db.fetch_value("SELECT count(*) FROM jobs") == 1
        await db.run(work, False)
        assert engine.committed() == []
    assert sorted(engine.committed()) == ["0 around", *kept]

    def swallow(connection: Any) -> None:
        add(connection, "lost")
        with pytest.raises(psycopg.errors.UniqueViolation):
            add(connection, "lost")

    with pytest.raises(errors.TransactionError, match="rollback"):
        await db.run(swallow)
    assert sorted(engine.committed()) == ["0 around", *kept]
    await usable(db)


async def test_nothing_of_a_run_outlives_it(db: Any, engine: PostgresqlEngine) -> None:
    """Cursors, iterators and the connection itself are of no use behind the function, and what was set on it is as before."""
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(500)])
    kept: list[Any] = []

    class Shout(psycopg.adapt.Dumper):
        oid = 25

        def dump(self, obj: Any) -> bytes:
            return b"HACK"

    def leave(connection: Any) -> Any:
        kept[:] = [
            connection.execute("SELECT value FROM item"),
            connection.cursor("named", scrollable=False),
            connection,
        ]
        kept[1].execute("SELECT value FROM item")
        kept[1].fetchone()
        connection.adapters.register_dumper(str, Shout)
        connection.row_factory = psycopg.rows.dict_row
        connection.cursor_factory = psycopg.Cursor
        connection.server_cursor_factory = psycopg.ServerCursor
        connection.prepare_threshold = 0
        for name, value in (("autocommit", False), ("isolation_level", 4), ("read_only", True), ("deferrable", True)):
            with pytest.raises(psycopg.ProgrammingError):
                setattr(connection, name, value)
        connection.cursor().execute("SELECT 1")
        connection.add_notify_handler(lambda notify: None)
        return map(str, kept[0])

    for inside in (False, True):
        if inside:
            async with db.transaction():
                iterator = await db.run(leave)
                assert (await db.fetch_value("SELECT count(*) FROM item")) == 500
                await db.run(leave)
        else:
            iterator = await db.run(leave)
        for use in (
            lambda: next(iterator),
            lambda: kept[0].fetchall(),
            lambda: kept[1].fetchall(),
            lambda: kept[2].execute("SELECT 1"),
            lambda: kept[2].commit(),
        ):
            with pytest.raises((psycopg.Error, errors.DatabaseError)):
                use()
    for _ in range(3):
        assert await db.fetch_value("SELECT :text", {"text": "plain"}) == "plain"
        assert (
            await db.run(lambda connection: connection.execute("SELECT 1 AS a, :b AS b", {"b": "x"}).fetchone())
        ) == (1, "x")
    await usable(db)


# --- connections that stay changed ---------------------------------------------------------------------------------

STATE = """
SELECT current_setting('search_path'), current_setting('work_mem'), current_user, session_user,
    (SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE '\\_db\\_%'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_listening_channels()), to_regclass('pg_temp.left_behind'),
    (SELECT count(*) FROM pg_proc WHERE pronamespace = pg_my_temp_schema()), to_regtype('pg_temp.left_behind'),
    (SELECT count(*) FROM pg_cursors WHERE is_holdable), current_setting('default_transaction_read_only')
"""


async def test_a_connection_is_as_configured_afterwards(make_db: Any, engine: PostgresqlEngine) -> None:
    """Temporary tables, settings, advisory locks, LISTEN: refused, or gone with the transaction or the statement."""
    db = await make_db(pool_size=1)
    await db.execute_script(
        "CREATE FUNCTION poison() RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM set_config('search_path', 'elsewhere', false); LISTEN news; PERFORM pg_advisory_lock(7); RETURN 1; END $$;"
        "CREATE FUNCTION become() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SET ROLE pg_monitor'; RETURN 1; END $$;"
        "CREATE FUNCTION turn() RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN EXECUTE 'SET SESSION AUTHORIZATION pg_monitor'; RETURN 1; END $$;"
        "CREATE FUNCTION keep() RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN EXECUTE 'PREPARE kept AS SELECT 1'; RETURN 1; END $$;"
        "CREATE FUNCTION adds(a int, b int) RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM set_config('work_mem', '1MB', false); RETURN b; END $$;"
        "CREATE AGGREGATE adding(int) (SFUNC = adds, STYPE = int, INITCOND = '0');"
        "CREATE FUNCTION log(text text) RETURNS int LANGUAGE sql AS 'SELECT poison()';"
        "CREATE PROCEDURE spoil() LANGUAGE plpgsql AS $$ BEGIN SET work_mem = '1MB'; END $$"
    )
    wanted = tuple(await db.fetch_one(STATE))
    refused = [
        "CREATE TEMP TABLE left_behind (a int)",
        "create or replace temporary view left_behind as select 1",
        'CREATE TABLE "pg_temp".left_behind (a int)',
        "SELECT 1 AS a INTO TEMP left_behind",
        "SELECT set_config('search_path', 'elsewhere', false)",
        "SELECT pg_catalog.set_config('work_mem', '1MB', :local::bool IS NULL)",
        "SELECT pg_advisory_lock(7)",
        "SELECT pg_try_advisory_lock_shared(7) FROM jobs",
        "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
        "UPDATE pg_settings SET setting = '1234' WHERE name = 'work_mem'",
        "SELECT U&\"set\\005fconfig\"('work_mem', '1MB', false)",
        'CREATE FUNCTION "pg_temp".left_behind() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$',
        'CREATE TYPE U&"pg\\005ftemp".left_behind AS (a int)',
    ]
    allowed = [
        "DO $$ BEGIN SET work_mem = '1MB'; END $$",
        "DO $$ BEGIN PERFORM set_config('search_path', 'elsewhere', false); END $$",
        "CALL spoil()",
        "SELECT poison()",
        "SELECT * FROM poison()",
        "SELECT become()",
        "SELECT turn()",
        "SELECT keep()",
        "SELECT adding(1)",
        f"SELECT {engine.schemas['default']}.log('x')",
    ]
    params = {"local": None}
    for sql in [*refused, *allowed]:
        given = params if ":local" in sql else None
        with anyio.fail_after(HANG):
            if sql in refused:
                with pytest.raises(errors.QueryExecutionError, match="nothing was executed"):
                    await db.execute(sql, given)
                with pytest.raises(errors.QueryExecutionError):
                    await db.execute_script(sql.replace(":local::bool", "NULL"))
            else:
                for _ in range(2):
                    await db.execute(sql, given)
                    assert tuple(await db.fetch_one(STATE)) == wanted, sql
            for outcome in (True, False):
                try:
                    async with db.transaction():
                        await db.execute("INSERT INTO item (value) VALUES (?)", (sql,))
                        await db.execute(sql, given)
                        if sql in refused[:4]:
                            await db.execute("SELECT * FROM left_behind")
                        if not outcome:
                            raise LookupError
                except LookupError:
                    pass
                assert tuple(await db.fetch_one(STATE)) == wanted, (sql, outcome)
            for form in _sql(sql.replace(":local::bool", "NULL")):
                await db.run(lambda connection, form=form: connection.execute(form))
                assert tuple(await db.fetch_one(STATE)) == wanted, sql
            await db.run(
                lambda connection, sql=sql: psycopg.ClientCursor(connection).execute(
                    sql.replace(":local::bool", "NULL")
                )
            )
            assert tuple(await db.fetch_one(STATE)) == wanted, sql
    assert engine.outside("SELECT count(*) FROM item") == [(len(refused) + len(allowed),)]
    for sent in (
        b"SET search_path = elsewhere",
        b"LISTEN news",
        b"SELECT pg_advisory_lock(7)",
    ):  # libpq's own functions
        for inside in (False, True):
            async with db.transaction() if inside else contextlib.nullcontext():
                await db.run(lambda connection, sent=sent: connection.pgconn.exec_(sent) and None)
            assert tuple(await db.fetch_one(STATE)) == wanted, (sent, inside)
    for path in ("SET LOCAL search_path = 'pg_temp'", "SELECT set_config('search_path', 'pg_temp', true)"):
        async with db.transaction():
            await db.execute(path)
            await db.execute("CREATE TABLE left_behind (a int)")
        assert tuple(await db.fetch_one(STATE)) == wanted, path
    pid = await db.fetch_value("SELECT pg_backend_pid()")
    async with db.transaction():
        await db.execute("SELECT set_config('work_mem', '1MB', true)")
        await db.execute("SET CONSTRAINTS ALL DEFERRED")
    assert tuple(await db.fetch_one(STATE)) == wanted
    assert await db.fetch_value("SELECT pg_backend_pid()") == pid, "put right, not replaced"
    assert await db.run(lambda connection: connection.execute("SELECT 1").fetchone()[0], readonly=True) == 1
    assert tuple(await db.fetch_one(STATE)) == wanted


@pytest.mark.any_loop
async def test_values_are_read_as_they_are_written(make_db: Any) -> None:
    """SET LOCAL of what values look like holds to the end of its transaction or level, and not a moment longer."""
    db = await make_db(pool_size=1)
    values = "SELECT timestamptz '2026-02-03 04:05:06+00' AS at, interval '1 day' AS long, date '2026-02-03' AS day"
    usual = tuple(await db.fetch_one(values))
    assert usual[1:] == (datetime.timedelta(days=1), datetime.date(2026, 2, 3))
    local = {
        "timezone": ("Asia/Seoul", "at", "2026-02-03 13:05:06+09:00"),
        "datestyle": ("German", "at", "03.02.2026 04:05:06 UTC"),
        "intervalstyle": ("iso_8601", "long", "P1D"),
    }

    async def read(name: str, column: str, seen: str, how: str) -> None:
        value = local[name][0]
        if how == "SET":
            await db.execute(f"SET LOCAL {name} = '{value}'")
        elif how == "run":
            await db.run(lambda connection: connection.execute(f"SET LOCAL {name} = '{value}'"))
        else:
            await db.fetch_value(f"SELECT set_config('{name}', :value, true)", {"value": value})
        assert str((await db.fetch_one(values))[column]) == seen

    for name, (_, column, seen) in local.items():
        for how in ("SET", "set_config", "run"):
            for anew in (False, True):  # whether these types are met for the first time
                with case(name=name, how=how, anew=anew):
                    if anew:
                        await db.close()
                    async with db.transaction():
                        await read(name, column, seen, how)
                    assert tuple(await db.fetch_one(values)) == usual
                    with contextlib.suppress(LookupError):
                        async with db.transaction():
                            await db.execute("INSERT INTO item (value) VALUES ('x')")
                            with contextlib.suppress(LookupError):
                                async with db.transaction():
                                    await read(name, column, seen, how)
                                    raise LookupError
                            assert tuple(await db.fetch_one(values)) == usual
                            await read(name, column, seen, how)
                            raise LookupError
                    found = tuple(await db.fetch_one(values))
                    assert (found, str(found[0].tzinfo)) == (usual, str(usual[0].tzinfo))
    for sql in ("SET LOCAL client_encoding = 'LATIN1'", "SELECT set_config('client_encoding', 'LATIN1', true)"):
        async with db.transaction():
            with pytest.raises(errors.QueryExecutionError, match="UTF8"):
                await db.execute(sql)


@pytest.mark.any_loop
async def test_the_encoding_is_what_is_sent(make_db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever encoding the environment or the connection string names, texts are stored as they are."""
    from psycopg.conninfo import make_conninfo

    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    for conninfo in (shared().conninfo(tcp=True), make_conninfo(shared().conninfo(tcp=True), client_encoding="LATIN1")):
        db = await make_db(schema=False, conninfo=conninfo)
        assert await db.fetch_value("SELECT 'é한' || :text || octet_length('é한')", {"text": "ü"}) == "é한ü5"


# --- values in messages --------------------------------------------------------------------------------------------


async def test_no_value_in_messages(
    db: Any, engine: PostgresqlEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the server quotes of parameters is in no message, no cause and no log, whichever way the statement went."""
    caplog.set_level(logging.DEBUG)
    await db.execute_script(
        "CREATE TABLE t (v int, name text UNIQUE);"
        "CREATE FUNCTION complain(who text) RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no account of % here', who; END $$"
    )
    await db.execute("INSERT INTO t VALUES (1, ?)", ("hunter2",))
    statements: list[tuple[str, Any]] = [
        ("SELECT CAST(CAST(:v AS text) AS int)", "98765432109876"),
        ("SELECT CAST(CAST(:v AS text) AS int)", "hunter2"),
        ("SELECT CAST(CAST(:v AS text) AS regclass)", "hunter2"),
        ("SELECT CAST(CAST(:v AS text) AS regclass)", "HUNTER2"),
        ("SELECT to_tsquery(:v)", "hunter2 hunter2"),
        ("SELECT CAST(CAST(:v AS text) AS json)", "{hunter2}"),
        ("SELECT CAST(CAST(:v AS text) AS date)", "hunter2"),
        ("SELECT complain(:v)", "hunter2"),
        ("INSERT INTO t VALUES (2, :v)", "hunter2"),
        ("SELECT 'a' ~ :v", "(hunter2"),
        ("SELECT CAST(CAST(:v AS text) AS numeric(3))", "98765432109876"),
    ]
    for sql, value in statements:
        (tmp_path / "q.sql").write_text(f"-- name: ask\n{sql};\n-- name: first^\n{sql};\n-- name: act!\n{sql};\n")
        queries = engine.public.load_queries(tmp_path / "q.sql")

        async def streamed(sql: str = sql, value: Any = value) -> None:
            async with db.stream(sql, {"v": value}) as rows:
                async for _ in rows:
                    pass

        async def called(queries: Any = queries, value: Any = value) -> None:
            async for _ in queries.ask(db, v=value):
                pass

        ways: list[Any] = [
            streamed,
            called,
            lambda queries=queries, value=value: queries.first(db, v=value),
            lambda queries=queries, value=value: queries.act(db, v=value),
            lambda sql=sql, value=value: db.execute(sql, {"v": value}),
            lambda sql=sql, value=value: db.execute_many(sql, [{"v": value}]),
            lambda sql=sql, value=value: db.run(lambda connection: connection.execute(sql, {"v": value})),
            lambda sql=sql, value=value: db.run(
                lambda connection: connection.cursor().executemany(sql, [{"v": value}])
            ),
        ]
        for way in ways:
            with pytest.raises(errors.QueryExecutionError) as caught:
                await way()
            error: BaseException | None = caught.value
            while error is not None:
                text = f"{error} {error!r}".casefold() + str(error.__dict__.get("__notes__", ""))
                assert "hunter2" not in text.replace(str(getattr(error, "parameters", "")).casefold(), ""), (sql, text)
                assert "98765432109876" not in text, (sql, text)
                error = error.__cause__ or error.__context__
    logged = "\n".join(
        logging.Formatter().format(record) for record in caplog.records if record.name.startswith("database")
    )
    assert "hunter2" not in logged.casefold()
    assert "98765432109876" not in logged


async def test_a_failure_with_a_large_value(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is held, with its locks, until the error has been translated: that takes no longer for a long value."""
    longest = 0
    escape = re.escape

    def counted(pattern: str) -> str:
        nonlocal longest
        longest = max(longest, len(pattern))
        return escape(pattern)

    monkeypatch.setattr(re, "escape", counted)
    with pytest.raises(errors.QueryExecutionError) as caught:
        await db.fetch_value("SELECT CAST(:name AS int)", {"name": "hunter2 " * 1000})
    assert "hunter2" not in str(caught.value)
    assert longest < 1000


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://app:hun/ter2@127.0.0.1:1/orders",
        "postgresql://app:hun@ter2@127.0.0.1:1/orders",
        "postgresql://app:hun?ter2@127.0.0.1:1/orders",
        "postgres://app:hun#ter2/x@127.0.0.1:1/orders",
        "postgresql://app:1/ter2@127.0.0.1:1/orders",
        "postgresql://app:hun ter2@127.0.0.1:1/orders",
        "postgresql://app:hun%ter2@127.0.0.1:1/orders",
    ],
)
async def test_a_password_that_is_not_encoded(make_db: Any, caplog: pytest.LogCaptureFixture, conninfo: str) -> None:
    """A URI whose password holds `/`, `@`, `?` … is refused with what to do, and no part of it is shown."""
    caplog.set_level(logging.DEBUG)
    for settings in ({"conninfo": conninfo}, {"replicas": conninfo}):
        db = await make_db(schema=False, connect_timeout=2, reconnect_timeout=0, **settings)
        with pytest.raises(errors.ConnectionFailedError) as caught:
            async with db.transaction(readonly=True):
                await db.fetch_value("SELECT 1")
        text = f"{caught.value} {caught.value!r} {caught.value.path} {caught.value.__cause__}" + "".join(
            logging.Formatter().format(record) for record in caplog.records if record.name.startswith("database")
        )
        assert "ter2" not in text
        assert "hun" not in text
        assert "percent-encode" in str(caught.value)


@pytest.mark.any_loop
async def test_a_connection_string_in_the_place_of_a_part(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Under `host`, `dbname` and the like it is refused with where it belongs, and no part of it is shown."""
    caplog.set_level(logging.DEBUG)
    for text in ("postgresql://app:hunter2@127.0.0.1:1/orders", "host=127.0.0.1 port=1 user=app password = hunter2"):
        for key in ("host", "dbname", "user", "application_name", "options"):
            db = await make_db(schema=False, reconnect_timeout=0, **{key: text})
            with pytest.raises(errors.ConnectionFailedError, match=f"{key} is a whole connection string") as caught:
                await db.fetch_value("SELECT 1")
            said = f"{caught.value} {caught.value!r} {caught.value.path} {caught.value.__cause__} {caplog.text}"
            assert "hunter2" not in said, key


async def test_uris_that_are_right(make_db: Any) -> None:
    """An encoded password, an `@` in an option's value, sockets and several hosts are taken as they are."""
    server = shared()
    for conninfo in (
        f"postgresql://postgres:a%2Fb%40c@127.0.0.1:{server.port}/postgres?application_name=me@home",
        f"postgresql://postgres@/postgres?host={server.sockets}&port={server.port}",
        f"postgresql://postgres@127.0.0.1:1,127.0.0.1:{server.port}/postgres?target_session_attrs=any",
        f"postgresql://127.0.0.1:{server.port}/postgres?user=postgres",
    ):
        db = await make_db(schema=False, conninfo=conninfo, options=None)
        assert await db.fetch_value("SELECT 1") == 1


# --- types, names, what was learnt -----------------------------------------------------------------------------------


async def test_numbers_have_room(db: Any) -> None:
    """Whole numbers are not `smallint`; infinite and other times that Python cannot hold come as text, and nothing raises."""
    assert await db.fetch_value("SELECT :a * :b", {"a": 300, "b": 300}) == 90_000
    assert await db.fetch_value("SELECT ? + ?", (32_767, 1)) == 32_768
    assert await db.fetch_value("SELECT substr('abcdef', :start, :count)", {"start": 2, "count": 3}) == "bcd"
    assert await db.fetch_value("SELECT (ARRAY[1, 2, 3])[:n]", {"n": 2}) == 2
    await db.execute("CREATE FUNCTION small(n smallint) RETURNS int LANGUAGE sql AS 'SELECT n + 1'")
    assert await db.fetch_value("SELECT small(:n)", {"n": 5}) == 6
    await db.execute("CREATE TABLE times (a timestamptz, b timestamp, c date, d time, e interval)")
    insert = (
        "INSERT INTO times VALUES ('infinity', '-infinity', '0044-03-15 BC', '24:00', '1 year') RETURNING a, b, c, d"
    )
    for inside in (False, True):
        if inside:
            async with db.transaction():
                row = await db.fetch_one(insert)
        else:
            row = await db.fetch_one(insert)
        assert list(row) == ["infinity", "-infinity", "0044-03-15 BC", "24:00:00"]
    assert await db.fetch_value("SELECT count(*) FROM times") == 2
    if await db.run(lambda connection: connection.info.server_version) >= 170_000:
        endless = "SELECT interval 'infinity', interval '-infinity', ARRAY[interval 'infinity', '0']"
        assert list(await db.fetch_one(endless)) == ["infinity", "-infinity", ["infinity", datetime.timedelta()]]
    assert await db.fetch_value("SELECT date '2026-01-02'") == datetime.date(2026, 1, 2)


async def test_parameters_by_name_and_by_position(db: Any) -> None:
    """A named tuple, and a row of any kind, is taken as the placeholders ask; pandas' missing values are NULL."""
    Pair = namedtuple("Pair", "b a")  # noqa: PYI024

    class NaTType(datetime.datetime):
        pass

    pair = Pair(b=2, a=1)
    assert tuple(await db.fetch_one("SELECT :a::int, :b::int", pair)) == (1, 2)
    assert tuple(await db.fetch_one("SELECT ?::int, ?::int", pair)) == (2, 1)
    row = await db.fetch_one("SELECT 2 AS b, 1 AS a")
    assert tuple(await db.fetch_one("SELECT :a::int, :b::int", row)) == (1, 2)
    assert tuple(await db.fetch_one("SELECT ?::int, ?::int", row)) == (2, 1)
    assert await db.fetch_value("SELECT :a::timestamp IS NULL", {"a": NaTType(2026, 1, 1)}) is True


async def test_streams_of_what_no_cursor_can_be_declared_for(db: Any) -> None:
    """SHOW and EXPLAIN can be streamed, inside and outside; jsonb's `@?` and `@@` are operators."""
    for sql in (
        "SHOW search_path",
        "EXPLAIN SELECT 1",
        "EXPLAIN (COSTS off) SELECT 1",
        "VALUES (1), (2)",
        "TABLE jobs",
    ):
        async with db.stream(sql) as rows:
            outside = [tuple(row) async for row in rows]
        async with db.transaction():
            async with db.stream(sql) as rows:
                assert [tuple(row) async for row in rows] == outside
        first = await db.fetch_one(sql)
        assert (None if first is None else tuple(first)) == (outside[0] if outside else None)
    json = """ '{"a": 1}'::jsonb """
    found = await db.fetch_one(f"SELECT {json} @? '$.a', {json} @@ '$.a == 1', {json} ?? :key", {"key": "a"})
    assert tuple(found) == (True, True, True)


async def test_query_files_are_left_as_they_are(db: Any, tmp_path: Path) -> None:
    """`:hh` within dollar quotes and escape strings and slices are text, in both calling styles."""
    (tmp_path / "q.sql").write_text(
        "-- name: tell$\nSELECT $$at 12:hh$$ || E'it\\'s :hh' || (ARRAY['a', 'b', 'c'])[1:2]::text || :x;\n"
        "-- name: make#\nCREATE FUNCTION clock() RETURNS text LANGUAGE sql AS $f$ SELECT to_char(now(), 'HH24:mi :ss') $f$;\n"
        "-- name: add!\nINSERT INTO item (value) VALUES ($$:hh$$ || :x);\n"
        "-- name: literal$\n-- What it is.\nSELECT $$a:b.c /* kept */  \n-- kept :d.e$$ || E'\\':f.g /* kept */' || :x;\n"
        "-- name: sliced$\nSELECT/* a /* nested */ :comment.more */(t.v)[t.lo:t.hi]::text || :job.name -- :end.of\n"
        "FROM (SELECT ARRAY[1, 2, 3] AS v, 1 AS lo, 2 AS hi) t;\n"
    )
    queries = __import__("database.postgresql").postgresql.load_queries(tmp_path / "q.sql")
    told = "at 12:hhit's :hh{a,b}!"
    assert await db.fetch_value(queries.tell, {"x": "!"}) == told
    assert await queries.tell(db, x="!") == told
    literal = "a:b.c /* kept */  \n-- kept :d.e':f.g /* kept */!"
    assert await db.fetch_value(queries.literal, {"x": "!"}) == await queries.literal(db, x="!") == literal
    assert queries.literal.__doc__ == "What it is."
    assert await queries.sliced(db, job=types.SimpleNamespace(name="!")) == "{1,2}!"
    await queries.make(db)
    assert ":" in await db.fetch_value("SELECT clock()")
    assert await queries.add(db, x="1") == 1
    await db.execute(queries.add, {"x": "2"})
    assert [row[0] for row in await db.fetch_all("SELECT value FROM item ORDER BY id")] == [":hh1", ":hh2"]


async def _prepared(db: Any) -> int:
    return await db.fetch_value("SELECT count(*) FROM pg_prepared_statements")


@pytest.mark.any_loop
async def test_names_of_prepared_statements(make_db: Any) -> None:
    """A statement that fails, or whose numbers are now small, now large, is prepared once; names given up are gone."""
    db = await make_db(pool_size=1)
    await db.execute("CREATE TABLE t (a int PRIMARY KEY, b bigint, c numeric)")
    insert = "INSERT INTO t VALUES (:a, :b, :c)"
    for _ in range(60):
        await gather(*[lambda: db.execute(insert, {"a": 1, "b": 1, "c": 1})] * 5)
    assert await _prepared(db) < 8
    sizes = [1, 300, 70_000, 2**40]
    for n in range(120):
        await db.fetch_one(
            "SELECT :x::bigint, :y::bigint, :z::bigint",
            {"x": sizes[n % 4], "y": sizes[n // 4 % 4], "z": sizes[n // 16 % 4]},
        )
        await gather(
            *[
                lambda n=n, k=k: db.execute(insert, {"a": 10 + n * 3 + k, "b": sizes[(n + k) % 4], "c": sizes[n % 4]})
                for k in range(3)
            ]
        )
    assert await _prepared(db) < 40  # not one for each mixture of sizes, of which there were hundreds
    assert await db.fetch_value("SELECT count(*) FROM t") == 361
    for n in range(300):
        for _ in range(6 if n < 290 else 1):
            await db.fetch_value(f"SELECT {n}")
    assert await _prepared(db) <= 262
    await usable(db)


async def test_statements_whose_preparing_fails_together(make_db: Any) -> None:
    """Of statements that are sent together, one whose PREPARE fails costs the others nothing but a second try."""
    db = await make_db(pool_size=1)
    await db.execute("CREATE TABLE t (a text)")
    select = "SELECT count(*) FROM t WHERE a = :a"
    for round in range(3):
        for _ in range(8):
            assert await db.fetch_value(select, {"a": "x"}) == 0
        results = await gather(*[lambda n=n: db.fetch_value(select, {"a": n if n % 2 else str(n)}) for n in range(40)])
        assert results == [0] * 40, round
        await db.execute("DROP TABLE t")
        results = await gather(*[lambda n=n: db.fetch_value(select, {"a": str(n)}) for n in range(20)])
        assert {getattr(result, "code_name", result) for result in results} == {"undefined_table"}
        await db.execute("CREATE TABLE t (a text)")
        await db.execute(f"CREATE TABLE other{round} (a int)")


async def test_what_was_learnt_is_forgotten_when_it_is_wrong(make_db: Any) -> None:
    """A column's type changes under a running service, or a table was missing once: the statement works all the same."""
    db = await make_db(pool_size=1)
    insert, select = "INSERT INTO t (a) VALUES (:a)", "SELECT count(*) FROM t WHERE a = :a"

    async def batch(value: Any) -> None:
        async with db.batch() as batch:
            await batch.execute(insert, {"a": value})

    async def alone(value: Any) -> None:
        await db.execute(insert, {"a": value})

    async def within(value: Any) -> None:
        async with db.transaction():
            await db.execute(insert, {"a": value})

    async def many(value: Any) -> None:
        await db.execute_many(insert, [{"a": value}])

    for write in (alone, within, batch, many):
        with pytest.raises(errors.QueryExecutionError):
            await write(1)  # there is no such table
        await db.execute("CREATE TABLE t (a int)")
        for n in range(8):
            await write(n)
            await db.fetch_value(select, {"a": n})
        await db.execute("ALTER TABLE t ALTER COLUMN a TYPE text")
        for value in (8, "nine", 10):
            await write(value)
            assert await db.fetch_value(select, {"a": value}) == 1, (write, value)
        await db.execute("DELETE FROM t WHERE a = 'nine'")
        await db.execute("ALTER TABLE t ALTER COLUMN a TYPE bool USING a::int > 5")
        for _ in range(3):
            await write(True)
            assert await db.fetch_value(select, {"a": True}) > 0
        await db.execute("DROP TABLE t")


async def test_an_insert_where_returning_cannot_be(make_db: Any, engine: PostgresqlEngine) -> None:
    """A role that may insert and not read, a rule INSTEAD, a policy: the row is stored, without its key; batches as well."""
    db = await make_db()
    await db.execute_script(
        "CREATE TABLE blind (id serial PRIMARY KEY, v text); CREATE TABLE target (v text);"
        "CREATE TABLE ruled (id serial PRIMARY KEY, v text);"
        "CREATE RULE elsewhere AS ON INSERT TO ruled DO INSTEAD INSERT INTO target VALUES (new.v);"
        "CREATE TABLE hidden (id serial PRIMARY KEY, v text); ALTER TABLE hidden ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY only_in ON hidden FOR INSERT WITH CHECK (true)"
    )
    schema = engine.schemas["default"]
    role = f"writer_{schema}"
    look = oracle()
    look.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {role}")
    look.execute(f"GRANT INSERT ON {schema}.blind, {schema}.hidden, {schema}.ruled, {schema}.target TO {role}")
    look.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}")
    try:
        db = await make_db(schema=False, user=role)
        for _ in range(4):
            for table in ("blind", "ruled", "hidden"):
                result = await db.execute(f"INSERT INTO {table} (v) VALUES (?)", ("x",))
                assert result.lastrowid is None
                async with db.transaction():
                    await db.execute(f"INSERT INTO {table} (v) VALUES (?)", ("x",))
                await gather(*[lambda table=table: db.execute(f"INSERT INTO {table} (v) VALUES (?)", ("x",))] * 3)
        upsert = "INSERT INTO blind (v) VALUES (?) ON CONFLICT DO NOTHING"
        assert (await db.execute(upsert, ("y",))).rowcount == 1
        for table, count in (("blind", 21), ("target", 20), ("hidden", 20)):
            assert engine.outside(f"SELECT count(*) FROM {table}") == [(count,)], table
    finally:
        await engine.public.close_all()
        look.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


# --- errors of the user's own code -----------------------------------------------------------------------------------


async def test_errors_of_record_classes_arrive_as_they_were_raised(
    db: Any, engine: PostgresqlEngine, queries: Any
) -> None:
    """Whatever a record class raises is the caller's; the statement is committed, and the transaction goes on."""
    for kind in (
        OverflowError,
        TypeError,
        ValueError,
        psycopg.DataError,
        errors.QueryExecutionError,
        KeyboardInterrupt,
    ):

        def fail(**values: Any) -> Any:
            raise kind("mine")  # noqa: B023

        await db.execute("DELETE FROM jobs")
        insert = "INSERT INTO jobs (name) VALUES (:name) RETURNING id"
        if kind is not KeyboardInterrupt:
            for method in ("fetch_one", "fetch_all"):
                with pytest.raises(kind, match="^mine") as caught:
                    await getattr(db, method)(insert, {"name": method}, record_class=fail)
                assert type(caught.value) is kind
            async with db.transaction():
                with pytest.raises(kind, match="^mine"):
                    await db.fetch_one(insert, {"name": "inside"}, record_class=fail)
                with pytest.raises(kind, match="^mine"):
                    async with db.stream("SELECT * FROM jobs", record_class=fail) as rows:
                        async for _ in rows:
                            pass
                await db.execute("INSERT INTO jobs (name) VALUES ('after')")
            assert sorted(engine.committed()) == ["after", "fetch_all", "fetch_one", "inside"]
    await usable(db)


# --- servers, roles, connections -------------------------------------------------------------------------------------


async def test_a_second_process_starts_beside_a_long_transaction(
    make_db: Any, engine: PostgresqlEngine, tmp_path: Path
) -> None:
    """Where all that `init_sql` makes is there, nothing waits for a lock, and a role that may create nothing connects."""
    schema = engine.schemas["default"]
    role = f"reader_{schema}"
    db = await make_db(schema=False, init_sql=None)
    assert await db.fetch_value("SELECT count(*) FROM job_runs") == 0
    await engine.public.close_all()
    look = oracle()
    look.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {role}")
    look.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
    try:
        with psycopg.connect(shared().conninfo()) as other:
            other.execute(f"LOCK TABLE {schema}.jobs, {schema}.job_runs IN ROW EXCLUSIVE MODE")
            with anyio.fail_after(HANG):
                db = await make_db(schema=False, init_sql=None)
                assert await db.fetch_value("SELECT count(*) FROM job_runs") == 0
        db = await make_db(schema=False, init_sql=None, user=role)
        assert await db.fetch_value("SELECT count(*) FROM job_runs") == 0
        await engine.public.close_all()
        (tmp_path / "init.sql").write_text(
            f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE EXTENSION IF NOT EXISTS plpgsql;"
            "CREATE TABLE IF NOT EXISTS jobs (a int)"
        )
        db = await make_db(schema=False, init_sql=str(tmp_path / "init.sql"), user=role)
        assert await db.fetch_value("SELECT count(*) FROM job_runs") == 0
        await engine.public.close_all()
        look.execute(f"DROP INDEX {schema}.job_runs_by_job")
        db = await make_db(schema=False, init_sql=None)
        assert await db.fetch_value("SELECT count(*) FROM pg_indexes WHERE indexname = 'job_runs_by_job'") >= 1
        assert engine.outside("SELECT to_regclass('job_runs_by_job') IS NULL") == [(False,)]
    finally:
        await engine.public.close_all()
        look.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_replica_that_is_down(
    make_db: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Read-only transactions run on the primary while no replica answers: found out once, tried again, and taken back."""
    from database.postgresql import opening

    tried: list[str] = []
    up = False
    connect = opening._connect

    def counted(settings: Any, role: str) -> Any:
        tried.append(role)
        if role == "reader" and not up:
            raise errors.ConnectionFailedError("here", "down")
        raw = connect(settings, "shared")
        raw.execute(psycopg.sql.SQL("SET application_name = {}").format(role))
        return raw

    where = "SELECT current_setting('application_name')"

    async def read() -> str:
        async with db.transaction(readonly=True):
            return await db.fetch_value(where)

    monkeypatch.setattr(opening, "_connect", counted)
    db = await make_db(schema=False, replicas="host=127.0.0.1 port=1", reconnect_timeout=30)
    with anyio.fail_after(HANG):
        assert await gather(*[read] * 20) == ["shared"] * 20
        wait = "SELECT pg_sleep(0.02)"
        await gather(*[lambda: db.run(lambda connection: connection.execute(wait) and None, readonly=True)] * 6)
        assert tried.count("reader") == 1
        assert [record.levelname for record in caplog.records if "no replica answers" in record.message] == ["WARNING"]
        monkeypatch.setattr(opening, "REPLICAS_AGAIN", 0.05)
        db = await make_db(schema=False, replicas="host=127.0.0.1 port=1", reconnect_timeout=30)
        while tried.count("reader") < 4:
            assert await read() == "shared"
        up = True
        while await read() != "reader":
            pass


async def test_connections_grow_old(make_db: Any) -> None:
    """A connection is made again when it is old, or was idle for long; in a transaction it stays; keepalives are set."""
    pid = "SELECT pg_backend_pid()"
    for settings in ({"max_lifetime": 0.001, "max_idle": 0}, {"max_lifetime": 0, "max_idle": 0.001}):
        db = await make_db(pool_size=1, schema=False, **settings)
        seen: set[int] = set()
        for _ in range(3):
            await anyio.sleep(0.01)
            async with db.transaction():
                first = await db.fetch_value(pid)
                await anyio.sleep(0.01)
                assert await db.fetch_value(pid) == first
            seen.add(first)
        assert len(seen) == 3, settings
    db = await make_db(pool_size=1, schema=False, max_lifetime=0, max_idle=0)
    assert len({await db.fetch_value(pid) for _ in range(3)}) == 1
    parameters = await db.run(lambda connection: connection.info.get_parameters())
    assert parameters["keepalives_idle"] == "60"


async def test_a_cancellation_never_hits_the_next_statement(engine: PostgresqlEngine) -> None:
    """However close to the end of its statement a cancellation is sent, what comes next is not cancelled."""
    from database.engine.contract import Role
    from database.postgresql.opening import open_connection
    from database.postgresql.settings import PostgresqlSettings

    gone = False

    def progress() -> bool:
        return gone

    role: Role = "shared"
    settings = PostgresqlSettings("default", conninfo=shared().conninfo(tcp=True))
    connection = open_connection(settings, role, progress, lambda: False)
    analyse = __import__("database.postgresql.analysis").postgresql.analysis.analyse
    quick, slow = analyse("SELECT pg_sleep(0.0005)"), analyse("SELECT pg_sleep(0.003)")
    try:
        cancelled = 0
        for number in range(200):
            gone = True
            try:
                connection.execute(quick if number % 2 else slow, None)
            except psycopg.errors.QueryCanceled:
                cancelled += 1
            gone = False
            assert connection.fetch_value(slow, None, None) == ""
            connection.begin(readonly=False)
            assert connection.fetch_value(quick, None, None) == ""
            connection.commit()
        assert cancelled
    finally:
        connection.close()


async def test_a_slow_generator_of_a_cancelled_call(db: Any) -> None:
    """A cancelled `execute_many` takes no more rows from its generator, and nothing of it is stored."""
    for count in (2, 300):
        taken = 0
        scope = anyio.CancelScope()
        started = anyio.Event()
        token = anyio.lowlevel.current_token()

        def rows(count: int = count) -> Any:
            nonlocal taken
            for n in range(10_000):
                taken += 1
                if n == count:
                    anyio.from_thread.run_sync(started.set, token=token)
                if n >= count:
                    threading.Event().wait(0.002)
                yield (str(n),)

        async def call() -> None:
            with scope:
                await db.execute_many("INSERT INTO item (value) VALUES (?)", rows())

        with anyio.fail_after(HANG):
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await started.wait()
                scope.cancel()
        assert taken < 5000
        assert await db.fetch_value("SELECT count(*) FROM item") == 0
    await usable(db)


async def test_a_connection_lost_while_committing(db: Any, engine: PostgresqlEngine) -> None:
    """Where COMMIT was under way, the error says that the outcome is unknown; the next call finds the server again."""
    await db.execute_script(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(30); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION dawdle()"
    )
    pid = 0

    async def kill() -> None:
        asleep = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
        while engine.outside(asleep) != [(1,)]:
            await anyio.sleep(0.01)
        engine.outside(f"SELECT pg_terminate_backend({pid})")

    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            with pytest.raises(errors.DatabaseError) as caught:
                async with db.transaction():
                    pid = await db.fetch_value("SELECT pg_backend_pid()")
                    await db.execute("INSERT INTO jobs (name) VALUES ('a')")
                    group.start_soon(kill)
        assert "unknown" in str(caught.value)
        assert engine.committed() == []
        await usable(db)


async def test_a_long_read_is_reported_in_the_words_of_this_engine(
    make_db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What a snapshot holds back here is VACUUM; nothing is said of SQLite's files."""
    db = await make_db(logging={"long_read_s": 0.01})
    with anyio.fail_after(HANG):
        async with db.transaction(readonly=True):
            await db.fetch_value("SELECT 1")
            while not any("kept its snapshot" in record.message for record in caplog.records):
                await anyio.sleep(0.01)
    assert "VACUUM" in caplog.text
    assert "sqlite" not in caplog.text.casefold()
