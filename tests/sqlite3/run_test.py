"""`db.run`: what a function does with the connection stays inside its transaction, and the connection comes back clean."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from database import errors, transactional
from tests.contract.support import Engine, eventually, gather

pytestmark = pytest.mark.anyio

Function = Callable[..., Any]
Send = Callable[[Any, Function], Any]


async def _alone(db: Any, function: Function) -> Any:
    return await db.run(function)


async def _grouped(db: Any, function: Function) -> Any:
    results = await gather(
        *(lambda: db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))") for _ in range(3)),
        lambda: db.run(function),
        *(lambda: db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))") for _ in range(3)),
    )
    neighbours = [*results[:3], *results[4:]]
    assert all(not isinstance(each, BaseException) and each.rowcount == 1 for each in neighbours), neighbours
    if isinstance(results[3], BaseException):
        raise results[3]
    return results[3]


async def _in_a_transaction(db: Any, function: Function) -> Any:
    async with db.transaction():
        await db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))")
        try:
            return await db.run(function)
        finally:
            await db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))")


async def _offloaded(db: Any, function: Function) -> Any:
    @transactional(offload=True)
    async def body() -> Any:
        await db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))")
        return await db.run(function)

    return await body()


SENDS: dict[str, Send] = {
    "alone": _alone,
    "grouped": _grouped,
    "transaction": _in_a_transaction,
    "offloaded": _offloaded,
}


async def is_clean(db: Any, engine: Engine, what: str) -> None:
    """The writer and the readers do what they are for, no lock and no snapshot is left, and the outside sees it."""
    with anyio.fail_after(10):
        before = engine.outside("SELECT count(*) FROM jobs")[0][0]
        await gather(*(lambda: db.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))") for _ in range(3)))
        assert engine.outside("SELECT count(*) FROM jobs") == [(before + 3,)], what
        assert await db.fetch_value("SELECT count(*) FROM jobs") == before + 3, what
    other = sqlite3.connect(engine.path(), timeout=0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        assert tuple(other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())[0] == 0, f"{what}: a snapshot is left"
    finally:
        other.close()


def values(engine: Engine) -> list[Any]:
    return [value for (value,) in engine.outside("SELECT value FROM item ORDER BY id")]


@pytest.mark.any_loop
async def test_whatever_is_left_open_ends_with_the_function(db: Any, engine: Engine) -> None:
    """Cursors, iterators and blobs that a function leaves half read, keeps or returns are ended: what it did is kept or
    undone, its neighbours notice nothing, and using them later raises.
    """

    class OwnCursor(sqlite3.Cursor):
        pass

    class Stubborn(sqlite3.Cursor):
        def close(self) -> None:
            raise RuntimeError("not now")

    returning = "UPDATE item SET value = value || '+' RETURNING id"
    makers: dict[str, Callable[[sqlite3.Connection], Any]] = {
        "execute": lambda c: c.execute(returning),
        "cursor": lambda c: c.cursor().execute(returning),
        "own cursor": lambda c: c.cursor(OwnCursor).execute(returning),
        "stubborn": lambda c: c.cursor(Stubborn).execute(returning),
        "behind our back": lambda c: sqlite3.Cursor(c).execute(returning),
        "stubborn behind our back": lambda c: Stubborn(c).execute(returning),
        "map": lambda c: map(tuple, c.execute(returning)),
        "generator": lambda c: (row[0] for row in c.execute(returning)),
        "select": lambda c: c.execute("SELECT id FROM item"),
        "select behind our back": lambda c: sqlite3.Cursor(c).execute("SELECT id FROM item"),
        "stubborn select": lambda c: Stubborn(c).execute("SELECT id FROM item"),
        "dump": lambda c: c.iterdump(),
        "blob": lambda c: c.blobopen("item", "value", 1),
    }
    outside = sqlite3.connect(engine.path())
    outside.executemany("INSERT INTO item (value) VALUES (?)", [("x",)] * 3)
    outside.commit()
    outside.close()
    for how, send in SENDS.items():
        for what, make in makers.items():
            name = f"{what}, {how}"
            kept: list[Any] = []

            def use(connection: sqlite3.Connection, make: Any = make, kept: list[Any] = kept) -> Any:
                thing = make(connection)
                kept.append(thing)
                if hasattr(thing, "__next__"):
                    next(thing)
                return thing

            def failing(connection: sqlite3.Connection, use: Any = use) -> None:
                use(connection)
                raise KeyError("mine")

            before = values(engine)
            with pytest.raises(KeyError, match="mine"):
                await send(db, failing)
            assert values(engine) == before, f"{name}: not undone"
            await is_clean(db, engine, name)
            assert await send(db, use) is kept[1]
            assert "select" in what or what in ("dump", "blob") or values(engine) != before, name
            await is_clean(db, engine, name)
            for thing in kept:
                with pytest.raises((sqlite3.Error, errors.TransactionError)):
                    thing.read() if what == "blob" else next(thing)
    for what in ("select", "select behind our back", "stubborn select"):
        kept = [await db.run(makers[what], readonly=True)]
        await is_clean(db, engine, f"{what}, reader")
        with pytest.raises((sqlite3.Error, errors.TransactionError)):
            next(kept[0])


@pytest.mark.any_loop
async def test_commit_and_rollback_within_a_function(db: Any, engine: Engine) -> None:
    """`commit()`, `with connection:`, `rollback()`, savepoints, scripts and BEGIN/COMMIT as text mean what they say within
    the function; nothing is permanent before it has returned, and all of it is undone when it raises.
    """
    seen: list[Any] = []

    def insert(connection: sqlite3.Connection, value: str) -> None:
        connection.execute("INSERT INTO item (value) VALUES (?)", (value,))

    def everything(connection: sqlite3.Connection) -> None:
        insert(connection, "a")
        connection.commit()
        insert(connection, "lost")
        connection.rollback()
        with connection:
            insert(connection, "b")
        with contextlib.suppress(KeyError), connection:
            insert(connection, "lost")
            raise KeyError
        connection.execute("/* x */ begin immediate transaction")
        insert(connection, "c")
        connection.execute("COMMIT;")
        connection.execute("BEGIN")
        with pytest.raises(sqlite3.OperationalError, match="within a transaction"):
            connection.execute("BEGIN")
        insert(connection, "lost")
        connection.execute("ROLLBACK")
        connection.execute('SAVEPOINT "a b"')
        insert(connection, "d")
        connection.execute("savepoint level_0")
        insert(connection, "lost")
        connection.execute("ROLLBACK TRANSACTION TO SAVEPOINT Level_0")
        connection.execute("RELEASE [a b]")
        for gone in ("RELEASE level_0", "ROLLBACK TO 'a b'", "RELEASE level_1"):
            with pytest.raises(sqlite3.OperationalError, match="no such savepoint"):
                connection.execute(gone)
        connection.executescript(
            "INSERT INTO item (value) VALUES ('e'); COMMIT; INSERT INTO item (value) VALUES ('f; g')"
        )
        connection.commit()
        insert(connection, "lost")
        connection.rollback()
        connection.rollback()
        connection.isolation_level = "IMMEDIATE"
        insert(connection, "h")
        connection.isolation_level = None  # commits, says `sqlite3`
        assert connection.in_transaction
        seen.append(engine.outside("SELECT count(*) FROM item"))

    def failing(connection: sqlite3.Connection) -> None:
        everything(connection)
        connection.commit()
        raise KeyError("mine")

    def at_once(connection: sqlite3.Connection) -> None:
        insert(connection, "lost")
        connection.rollback()
        connection.commit()

    wanted = ["a", "b", "c", "d", "e", "f; g", "h"]
    for how, send in SENDS.items():
        await db.execute("INSERT INTO item (value) VALUES ('before')")
        with pytest.raises(KeyError, match="mine"):
            await send(db, failing)
        assert values(engine) == ["before"], how
        await send(db, at_once)
        assert values(engine) == ["before"], how
        await send(db, everything)
        assert values(engine) == ["before", *wanted], how
        await is_clean(db, engine, how)
        async with db.transaction() as transaction:
            await db.run(everything)
            await transaction.rollback()
        assert values(engine) == ["before", *wanted], how
        assert {str(each) for each in seen} <= {"[(1,)]", f"[({len(wanted) + 1},)]"}, "permanent before it had returned"
        await db.execute("DELETE FROM item")


@pytest.mark.any_loop
async def test_nothing_more_after_the_database_has_rolled_back(db: Any, engine: Engine) -> None:
    """Once SQLite has ended the transaction by itself and the function has caught that, each further statement of the
    function is refused, nothing is kept, and the caller is told.
    """
    await db.execute_script("INSERT INTO item (id, value) VALUES (1, 'kept');" + engine.refusing_trigger)
    refused: list[str] = []

    def function(connection: sqlite3.Connection, blow: str) -> None:
        connection.execute("INSERT INTO item (value) VALUES ('lost')")
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(blow)
        for then in (
            lambda: connection.execute("INSERT INTO item (value) VALUES ('lost')"),
            lambda: connection.cursor().executemany("INSERT INTO item (value) VALUES (?)", [("lost",)]),
            lambda: connection.executescript("INSERT INTO item (value) VALUES ('lost')"),
            connection.commit,
            connection.rollback,
            lambda: connection.execute("BEGIN"),
        ):
            with pytest.raises(errors.TransactionError, match="rolled this transaction back by itself"):
                then()
            refused.append(blow)

    for blow in ("INSERT OR ROLLBACK INTO item (id) VALUES (1)", "INSERT INTO item (value) VALUES ('rollback')"):
        for how, send in SENDS.items():
            with pytest.raises(errors.TransactionError):
                await send(db, lambda connection, blow=blow: function(connection, blow))
            assert values(engine) == ["kept"], (how, blow)
            await is_clean(db, engine, how)
    assert len(refused) >= 6 * 8


async def test_a_cancelled_function_that_catches_the_interruption(db: Any, engine: Engine) -> None:
    """A function whose caller is gone writes nothing more, whatever it catches."""
    running = threading.Event()
    results: list[Any] = []

    def stubborn(connection: sqlite3.Connection, slow: str) -> None:
        connection.execute("INSERT INTO item (value) VALUES ('lost')")
        running.set()
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute(slow).fetchall()
        for _ in range(3):
            try:
                connection.execute("INSERT INTO item (value) VALUES ('lost')")
                results.append("written")
            except Exception as error:
                results.append(error)

    steps = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000000)"
    for slow in (f"INSERT INTO item (value) {steps} SELECT count(*) FROM c", f"{steps} SELECT count(*) FROM c"):
        running.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(db.run, stubborn, slow)
            await eventually(running.is_set)
            tasks.cancel_scope.cancel()
        await is_clean(db, engine, slow)
        assert values(engine) == []
    assert results
    assert all(isinstance(each, errors.TransactionError) for each in results), results


@pytest.mark.any_loop
async def test_the_connection_is_as_it_was(db: Any, engine: Engine) -> None:
    """Whatever a function does to the connection itself, nobody meets it: not its neighbours, not those who come later."""
    await db.execute("INSERT INTO item (value) VALUES ('x')")
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute("CREATE TABLE item (value)")
        another = memory.serialize()
    probes = {
        "upper": ("SELECT upper('a')", "A"),
        "own": ("SELECT count(*) FROM pragma_function_list WHERE name = 'own'", 0),
        "aggregate": ("SELECT sum(1)", 1),
        "collation": ("SELECT count(*) FROM pragma_collation_list WHERE name = 'backwards'", 0),
        "recursive_triggers": ("PRAGMA recursive_triggers", 0),
        "case": ("SELECT 'A' LIKE 'a'", 1),
        "locking": ("PRAGMA locking_mode", "normal"),
        "foreign keys": ("PRAGMA foreign_keys", 1),
        "query_only": ("PRAGMA query_only", 0),
        "cache": ("PRAGMA cache_size", -2000),
        "ignore": ("PRAGMA ignore_check_constraints", 0),
        "journal": ("PRAGMA journal_size_limit", -1),
        "heap": ("PRAGMA soft_heap_limit", 0),
        "files": ("SELECT group_concat(name) FROM pragma_database_list WHERE name <> 'temp'", "main"),
        "temp": ("SELECT count(*) FROM sqlite_temp_master", 0),
        "limit": ("SELECT length(?)", 5000),
        "text": ("SELECT value FROM item", "x"),
    }

    class Sum:
        def step(self, _value: Any) -> None: ...

        def finalize(self) -> str:
            return "hijacked"

    def attributes(connection: Any) -> None:
        connection.row_factory = lambda _cursor, row: list(row)
        connection.text_factory = bytes
        connection.isolation_level = "EXCLUSIVE"
        if hasattr(connection, "autocommit"):
            connection.autocommit = True

    def handlers(connection: Any) -> None:
        connection.set_trace_callback(lambda _sql: None)
        connection.set_progress_handler(lambda: 0, 1)
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
        with pytest.raises(sqlite3.Error):
            sqlite3.Cursor(connection).execute("COMMIT --x")
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)

    def pragmas(connection: Any) -> None:
        for pragma in (
            "recursive_triggers = on;", "case_sensitive_like(1)", "main.locking_mode = EXCLUSIVE", "foreign_keys = 0",
            "cache_size = 77 -- x", "ignore_check_constraints = 1", "journal_size_limit = 7", "query_only = 1",
            "soft_heap_limit = 100000000",  # of the whole process, and refused
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}").fetchall()

    changes: dict[str, Callable[[Any], Any]] = {
        "attributes": attributes,
        "handlers": handlers,
        "pragmas": pragmas,
        "functions": lambda c: (c.create_function("upper", 1, lambda _: "hijacked"), c.create_function("own", 0, int)),
        "aggregate": lambda c: c.create_aggregate("sum", 1, Sum),
        "collation": lambda c: c.create_collation("backwards", lambda a, b: (a < b) - (a > b)),
        "limit": lambda c: c.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000),
        "temporary": lambda c: c.execute("CREATE TEMP TABLE item (value)"),
        "temporary view": lambda c: c.execute("CREATE VIEW temp.item AS SELECT 'hijacked' AS value"),
        "attach": lambda c: c.execute("ATTACH ':memory:' AS more"),
        "deserialize": lambda c: c.deserialize(another),
        "extensions": lambda c: c.enable_load_extension(True),
        "closed": lambda c: c.close(),
    }
    for how, send in SENDS.items():
        for what, change in changes.items():

            def function(connection: Any, change: Any = change) -> None:
                connection.execute("INSERT INTO jobs (name) VALUES (hex(randomblob(8)))")
                with contextlib.suppress(sqlite3.Error, AttributeError):
                    change(connection)

            def failing(connection: Any, function: Any = function) -> None:
                function(connection)
                raise KeyError("mine")

            def reading(connection: Any, change: Any = change) -> None:
                with contextlib.suppress(sqlite3.Error, AttributeError):
                    change(connection)

            await send(db, function)
            with pytest.raises(KeyError):
                await send(db, failing)
            if how == "alone":
                await db.run(reading, readonly=True)
            name = f"{what}, {how}"
            await is_clean(db, engine, name)
            for probe, (sql, wanted) in probes.items():
                params = ("y" * 5000,) if "?" in sql else ()
                assert await db.fetch_value(sql, params) == wanted, (name, probe, "reader")
                async with db.transaction():
                    await db.execute("UPDATE jobs SET enabled = 1 WHERE id = 1")
                    assert await db.fetch_value(sql, params) == wanted, (name, probe, "writer")
            assert (await db.fetch_one("SELECT 1 AS a"))["a"] == 1
            row = await db.run(lambda c: (c.execute("SELECT 'x' AS a").fetchone()["a"], c.isolation_level))
            assert row == ("x", None), name
    with pytest.raises(errors.QueryExecutionError, match="deserialize"):
        await db.run(lambda c: c.deserialize(another))


@pytest.mark.any_loop
async def test_a_connection_that_was_kept(db: Any) -> None:
    """The connection is the function's while it runs; whoever keeps it and uses it elsewhere is told so."""
    kept: list[Any] = [await db.run(lambda connection: connection)]
    for use in (
        lambda: kept[0].execute("SELECT 1"),
        lambda: kept[0].cursor(),
        lambda: kept[0].commit(),
        lambda: kept[0].create_function("upper", 1, str),
    ):
        with pytest.raises(sqlite3.ProgrammingError, match="outside the function given to db.run"):
            use()


@pytest.mark.any_loop
async def test_read_only_functions(db: Any, engine: Engine) -> None:
    """With `readonly=True` all of it works as well, but for writes, which are refused whatever is tried."""
    await db.execute("INSERT INTO item (value) VALUES ('kept')")

    def polite(connection: sqlite3.Connection) -> list[Any]:
        connection.execute("PRAGMA recursive_triggers=on;")
        connection.execute("BEGIN")
        connection.execute("SAVEPOINT a")
        connection.execute("RELEASE a")
        connection.commit()
        with connection:
            return connection.execute("SELECT value FROM item").fetchall()

    attacks = [
        "INSERT INTO item (value) VALUES (1)", "COMMIT; INSERT INTO item (value) VALUES (1)", "CREATE TEMP TABLE t (x)",
        "PRAGMA query_only = 0", "PRAGMA user_version = 3", "PRAGMA writable_schema = 1", "ATTACH ':memory:' AS more",
        "ROLLBACK; DELETE FROM item", "SAVEPOINT a; DELETE FROM item; RELEASE a", "PRAGMA journal_mode = DELETE",
    ]  # fmt: skip
    calls: list[Callable[[Function], Any]] = [lambda function: db.run(function, readonly=True)]

    async def inside(function: Function) -> Any:
        async with db.transaction():
            await db.execute("UPDATE jobs SET enabled = 1")
            return await db.run(function, readonly=True)

    calls.append(inside)
    for call in calls:
        assert [tuple(row) for row in await call(polite)] == [("kept",)]
        for attack in attacks:
            with pytest.raises(errors.ReadOnlyTransactionError):
                await call(lambda connection, attack=attack: connection.executescript(attack))
        with pytest.raises(errors.ReadOnlyTransactionError):
            await call(lambda connection: connection.blobopen("item", "value", 1).write(b"lost"))
        assert await call(lambda connection: connection.blobopen("item", "value", 1, readonly=True).read()) == b"kept"
    assert values(engine) == ["kept"]
    await is_clean(db, engine, "read-only")


@pytest.mark.any_loop
async def test_a_table_that_is_made_anew_without_foreign_keys(db: Any, engine: Engine) -> None:
    """Within a transaction SQLite takes no notice of `PRAGMA foreign_keys = OFF`. Where dropping a table would then take the
    rows of others with it, that is refused; where it would not, all goes its way.
    """
    await db.execute_script(
        "CREATE TABLE owner (id INTEGER PRIMARY KEY, name); CREATE TABLE dog (owner REFERENCES owner (id) ON DELETE CASCADE);"
        "INSERT INTO owner VALUES (1, 'Ada'); INSERT INTO dog VALUES (1)"
    )

    def anew(connection: sqlite3.Connection, table: str, off: str) -> None:
        connection.text_factory = bytes
        connection.execute(off)
        connection.execute(f"CREATE TABLE fresh AS SELECT * FROM {table}")
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"ALTER TABLE fresh RENAME TO {table}")
        connection.execute("PRAGMA foreign_keys = ON;")

    for how, send in SENDS.items():
        for off in ("PRAGMA foreign_keys = OFF", "pragma main.foreign_keys(0);", "PRAGMA foreign_keys = 'no'"):
            with pytest.raises(errors.QueryExecutionError, match="does nothing within a transaction"):
                await send(db, lambda connection, off=off: anew(connection, "Owner", off))
            assert engine.outside("SELECT owner, name FROM dog, owner") == [(1, "Ada")], how
            await send(db, lambda connection, off=off: anew(connection, "dog", off))
            assert engine.outside("SELECT owner FROM dog") == [(1,)]
            await db.execute_script(
                "DROP TABLE dog; CREATE TABLE dog (owner REFERENCES owner (id) ON DELETE CASCADE); INSERT INTO dog VALUES (1)"
            )
        await is_clean(db, engine, how)
    await db.run(
        lambda connection: connection.execute("DROP TABLE owner")
    )  # without the PRAGMA it is what was asked for
    assert engine.outside("SELECT owner FROM dog") == []


@pytest.mark.any_loop
async def test_a_copy_within_a_function(db: Any, engine: Engine) -> None:
    """`Connection.backup` works in a function that reads; in one that may write, where SQLite would wait for its own
    transaction for ever, it is refused at once.
    """
    await db.execute("INSERT INTO item (value) VALUES ('kept')")

    def copy(connection: sqlite3.Connection) -> Any:
        with contextlib.closing(sqlite3.connect(":memory:")) as target:
            connection.backup(target, pages=1)
            return target.execute("SELECT value FROM item").fetchall()

    async with db.transaction(readonly=True):
        assert await db.run(copy) == [("kept",)]
    assert await db.run(copy, readonly=True) == [("kept",)]
    for how, send in SENDS.items():
        with anyio.fail_after(10), pytest.raises(errors.QueryExecutionError, match=r"db\.backup"):
            await send(db, copy)
        await is_clean(db, engine, how)


@pytest.mark.any_loop
async def test_sql_text_that_changes_one_connection(db: Any, engine: Engine) -> None:
    """Outside a transaction it is refused, whatever it is spelled like and however it is sent, and names what to use;
    inside one it holds until the end, and nobody else ever sees it.
    """
    changing = {
        "PRAGMA foreign_keys = OFF": "`foreign_keys`",
        "pragma main.foreign_keys(0) ;": "`foreign_keys`",
        "/* x */ PRAGMA -- y\n \"case_sensitive_like\" = 'on'": "pragmas: {case_sensitive_like",
        "PRAGMA recursive_triggers=1": "pragmas: {recursive_triggers",
        "EXPLAIN PRAGMA recursive_triggers=1": "pragmas: {recursive_triggers",
        "PRAGMA locking_mode=EXCLUSIVE": "pragmas: {locking_mode",
        f"ATTACH '{engine.path('audit')}' AS other": "`attach`",
        "DETACH other": "`attach`",
        "CREATE TEMP TABLE t (x)": "inside a transaction",
        "CREATE TEMPORARY VIEW v AS SELECT 1": "inside a transaction",
        "CREATE TABLE temp.t (x)": "inside a transaction",
        "CREATE TEMP TRIGGER g AFTER INSERT ON item BEGIN SELECT 1; END": "inside a transaction",
        "CREATE TRIGGER temp.g AFTER INSERT ON main.item BEGIN SELECT 1; END": "inside a transaction",
        "PRAGMA defer_foreign_keys = ON": "inside the transaction",
    }

    async def streamed(sql: str) -> None:
        async with db.stream(sql) as rows:
            async for _ in rows:
                pass

    file = engine.directory / "changing.sql"
    file.write_text("".join(f"-- name: change{n}!\n{sql.strip(' ;')};\n" for n, sql in enumerate(changing)))
    queries = engine.public.load_queries(file)
    for number, (sql, remedy) in enumerate(changing.items()):
        calls = [lambda sql=sql: db.execute(sql), lambda sql=sql: db.execute_script(f"SELECT 1; {sql}")]
        calls.append(lambda number=number: getattr(queries, f"change{number}")(db))
        if "PRAGMA" in sql.upper() and "EXPLAIN" not in sql:
            calls += [lambda sql=sql: db.fetch_all(sql), lambda sql=sql: db.fetch_value(sql)]
        for call in calls:
            with pytest.raises(errors.QueryExecutionError) as caught:
                await call()
            assert remedy in str(caught.value), (sql, str(caught.value))
    for sql in (
        "PRAGMA user_version = 5", "PRAGMA application_id(7)", "PRAGMA optimize", "PRAGMA wal_checkpoint(TRUNCATE)",
        "PRAGMA incremental_vacuum(3)", "PRAGMA journal_size_limit = 1000", "PRAGMA auto_vacuum = 2", "VACUUM",
        "PRAGMA table_info(item)", "PRAGMA integrity_check(1)", "ANALYZE",
    ):  # fmt: skip
        await db.execute(sql)

    async def see() -> tuple[Any, ...]:
        return (
            await db.fetch_value("SELECT 'A' LIKE 'a'"),
            await db.fetch_value("PRAGMA recursive_triggers"),
            await db.fetch_value("SELECT count(*) FROM sqlite_temp_master"),
        )

    async def change() -> tuple[Any, ...]:
        await db.execute("PRAGMA case_sensitive_like = ON")
        await db.fetch_all("PRAGMA recursive_triggers = 1")
        await db.execute_script("CREATE TEMP TABLE t (x); CREATE TEMP VIEW v AS SELECT * FROM t")
        return await see()

    @transactional
    async def plain() -> tuple[Any, ...]:
        return await change()

    @transactional(offload=True)
    async def offloaded() -> tuple[Any, ...]:
        return await change()

    @transactional(offload=True)
    async def neighbour() -> tuple[Any, ...]:
        await db.execute("INSERT INTO item (value) VALUES (NULL)")
        return await see()

    as_configured, changed = (1, 0, 0), (0, 1, 2)
    for way in (plain, offloaded):
        for _ in range(2):
            results = await gather(neighbour, way, neighbour, way, neighbour)
            assert results == [as_configured, changed, as_configured, changed, as_configured], (way, results)
        with pytest.raises(KeyError):
            async with db.transaction():
                await change()
                raise KeyError
        assert await see() == as_configured == await neighbour()


def test_words_that_control() -> None:
    """What a text does to a transaction is read as SQLite's grammar reads it; nonsense is left to SQLite."""
    from database.sqlite3.analysis import control

    wanted: dict[str, tuple[str, str]] = {
        "BEGIN": ("BEGIN", ""),
        ";; begin exclusive transaction -- x": ("BEGIN", ""),
        "END TRANSACTION;": ("COMMIT", ""),
        "ROLLBACK": ("ROLLBACK", ""),
        "rollback to x": ("ROLLBACK TO", "x"),
        'ROLLBACK TRANSACTION TO SAVEPOINT "a""b"': ("ROLLBACK TO", 'a"b'),
        "SAVEPOINT savepoint": ("SAVEPOINT", "savepoint"),
        "RELEASE SAVEPOINT [x y]": ("RELEASE", "x y"),
        "COMMIT x": ("", ""),
        "BEGIN BEGIN": ("", ""),
        "ROLLBACK x": ("", ""),
        "PRAGMA a.b = 1": ("PRAGMA", "b"),
        "PRAGMA b": ("", ""),
        "SELECT 1": ("", ""),
    }
    assert {text: control(text) for text in wanted} == wanted


async def test_functions_of_sql_see_their_callers_context(make_db: Any) -> None:
    """A function that `on_connect` or `db.run` has made for SQL is the user's code, whatever statement calls it: autocommit or
    not, with parameters or without, of a reader and of the writer.
    """
    caller: ContextVar[str] = ContextVar("caller", default="nobody")

    def made(connection: Any, name: str) -> None:
        connection.create_function(name, 0, caller.get)

    statements: list[tuple[str, Any]] = [
        ("SELECT {}() AS who", None),
        ("SELECT {}() AS who WHERE 1 = ?", (1,)),
        (
            "INSERT INTO jobs (name) VALUES ({}() || ' ' || hex(randomblob(4))) RETURNING substr(name, 1, length(name) - 9)",
            None,
        ),
        ("SELECT {}() AS who WHERE 1 = :one", {"one": 1}),
    ]

    async def work(db: Any, function: str, number: int) -> None:
        caller.set(f"task {number}")
        for _ in range(3):
            for sql, params in statements:
                assert await db.fetch_value(sql.format(function), params) == f"task {number}"

    db = await make_db(on_connect=lambda connection: made(connection, "always"))
    assert set(await gather(*(lambda n=n: work(db, "always", n) for n in range(8)))) == {None}
    async with db.transaction():
        assert set(await gather(*(lambda n=n: work(db, "always", n) for n in range(3)))) == {None}

    db = await make_db(schema=False)
    async with db.transaction():
        await db.fetch_value("SELECT 1 WHERE 1 = ?", (1,))
        await db.run(made, "for_now")
        assert set(await gather(*(lambda n=n: work(db, "for_now", n) for n in range(3)))) == {None}
    with pytest.raises(errors.QueryExecutionError, match="no such function"):
        await db.fetch_value("SELECT for_now()")


@pytest.mark.any_loop
async def test_what_a_functions_own_authorizer_refuses(db: Any) -> None:
    """It is that which has refused: there is no word of transactions, or of connections that only read."""

    def strict(connection: Any) -> None:
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
        connection.execute("SELECT * FROM item")

    for readonly in (False, True):
        with pytest.raises(errors.QueryExecutionError, match="not authorized") as caught:
            await db.run(strict, readonly=readonly)
        assert caught.value.code_name == "SQLITE_AUTH"
    with pytest.raises(errors.ReadOnlyTransactionError):
        await db.run(lambda connection: connection.execute("DELETE FROM item"), readonly=True)
