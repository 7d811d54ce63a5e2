"""A statement is over before it is answered: committed or undone, its lock free, its error the statement's own."""

from __future__ import annotations

import sqlite3
from array import array
from collections import UserList, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import pytest

from database import errors, transactional
from database.engine.statement import Result
from tests.contract.support import Engine, gather

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]


@contextmanager
def unlocked(engine: Engine) -> Iterator[None]:
    """What stands inside leaves nobody's lock behind: another connection can write at once."""
    yield
    other = sqlite3.connect(engine.path(), timeout=0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    finally:
        other.close()


async def collect(rows: AsyncIterator[Any]) -> list[Any]:
    return [row async for row in rows]


async def ways(db: Any, queries: Any, sql: str, name: str) -> AsyncIterator[tuple[str, Any]]:
    """Every way to send a write that gives rows, by name."""
    yield "execute", lambda: db.execute(sql)
    yield "fetch_value", lambda: db.fetch_value(sql)
    yield "fetch_one", lambda: db.fetch_one(sql)
    yield "fetch_all", lambda: db.fetch_all(sql)
    yield "aiosql select", lambda: collect(getattr(queries, f"{name}_select")(db))
    for operator in ("one", "value", "insert"):
        yield f"aiosql {operator}", lambda operator=operator: getattr(queries, f"{name}_{operator}")(db)


async def test_an_error_of_the_commit_is_the_error_of_the_write(make_db: Any, engine: Engine) -> None:
    """A write with RETURNING whose commit fails (a deferred foreign key, a full disk, a neighbour who reads with journal
    mode DELETE) raises, however few of its rows were asked for, and has stored nothing.
    """
    orphans = "INSERT INTO child (parent_id) VALUES (7), (8), (9) RETURNING id"
    big = "INSERT INTO item (value) SELECT hex(zeroblob(3000)) FROM (VALUES (1), (2), (3), (4)) RETURNING id"
    file = engine.directory / "writes.sql"
    file.write_text(
        "".join(
            f"-- name: {name}_one^\n{sql};\n-- name: {name}_value$\n{sql};\n-- name: {name}_insert<!\n{sql};\n"
            f"-- name: {name}_select\n{sql};\n"
            for name, sql in (("orphans", orphans), ("big", big))
        )
    )
    queries = engine.public.load_queries(file)
    db = await make_db()
    async for way, call in ways(db, queries, orphans, "orphans"):
        with unlocked(engine), pytest.raises(errors.IntegrityError):
            await call()
        assert engine.outside("SELECT count(*) FROM child") == [(0,)], way

    db = await make_db(schema=False, pragmas={"max_page_count": 12})
    async for way, call in ways(db, queries, big, "big"):
        with unlocked(engine), pytest.raises(errors.QueryExecutionError, match="full"):
            await call()
        assert engine.outside("SELECT count(*) FROM item") == [(0,)], way

    db = await make_db(schema=False, journal_mode="DELETE", busy_timeout=100)
    await db.open()
    reader = sqlite3.connect(engine.path(), isolation_level=None)
    try:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM item").fetchone()
        async for way, call in ways(db, queries, big, "big"):
            with pytest.raises(errors.DatabaseBusyError):
                await call()
            assert reader.execute("SELECT count(*) FROM item").fetchone() == (0,), way
    finally:
        reader.close()
    async for _, call in ways(db, queries, big, "big"):
        with unlocked(engine):
            await call()
    assert engine.outside("SELECT count(*) FROM item") == [(4 * 8,)]


async def test_or_fail_leaves_nothing_behind(db: Any, engine: Engine) -> None:
    """`OR FAIL`, which in SQLite keeps the rows before the one that fails, is all or nothing outside of a transaction, alone
    and in a group; inside one it means what it means in SQLite.
    """
    await db.execute("INSERT INTO item (id, value) VALUES (1, 'a'), (2, 'a')")
    before = engine.outside("SELECT id, value FROM item")
    for sql in (
        "INSERT OR FAIL INTO item (id) VALUES (8), (9), (1)",
        "insert or fail INTO item (id) VALUES (8), (9), (1) RETURNING id",
        "WITH v (n) AS (VALUES (8), (9), (1)) INSERT OR FAIL INTO item (id) SELECT n FROM v",
        "UPDATE OR /* x */ FAIL item SET id = 7",
    ):
        calls: list[Any] = [lambda sql=sql: db.execute(sql)]
        if "RETURNING" in sql:
            calls += [lambda sql=sql: db.fetch_all(sql), lambda sql=sql: db.fetch_one(sql)]
        else:
            calls.append(lambda sql=sql: db.execute_many(sql, [()]))
        for call in calls:
            with unlocked(engine), pytest.raises(errors.IntegrityError):
                await call()
            assert engine.outside("SELECT id, value FROM item") == before, sql
            results = await gather(*[lambda: db.execute("INSERT INTO parent DEFAULT VALUES")] * 2, call)
            assert [type(each) for each in results[:2]] == [Result, Result]
            assert isinstance(results[2], errors.IntegrityError)
            assert engine.outside("SELECT id, value FROM item") == before, sql
    async with db.transaction():
        with pytest.raises(errors.IntegrityError):
            await db.execute("INSERT OR FAIL INTO item (id) VALUES (8), (1)")
    assert engine.outside("SELECT id FROM item") == [(1,), (2,), (8,)]
    async with db.batch() as batch:
        await batch.execute("INSERT OR FAIL INTO item (id) VALUES (9)")
    with pytest.raises(errors.ReadOnlyTransactionError):
        async with db.transaction(readonly=True):
            await db.execute("INSERT OR FAIL INTO item (id) VALUES (10)")
    assert (await db.execute("INSERT OR FAIL INTO item (id) VALUES (30)")) == (1, 30)


async def test_a_write_whose_rows_cannot_be_made_is_done(db: Any, engine: Engine) -> None:
    """`record_class` is called behind the commit: its error arrives as it was raised, and the write is done."""
    await db.execute("INSERT INTO item (id, value) VALUES (1, 'a'), (2, 'b')")

    class OwnError(Exception):
        pass

    for error in (OwnError("own"), ValueError("token-4711"), sqlite3.OperationalError("of another database")):

        def refuse(error: Exception = error, **_columns: Any) -> Any:
            raise error

        for number, call in enumerate(
            (
                lambda refuse=refuse: db.fetch_one(
                    "UPDATE item SET value = value || '+' RETURNING *", record_class=refuse
                ),
                lambda refuse=refuse: db.fetch_all(
                    "UPDATE item SET value = value || '+' RETURNING *", record_class=refuse
                ),
            )
        ):
            await db.execute("UPDATE item SET value = ''")
            with unlocked(engine), pytest.raises(type(error)) as caught:
                await call()
            assert caught.value is error
            assert engine.outside("SELECT value FROM item") == [("+",), ("+",)], (error, number)


async def test_no_value_of_a_row_or_a_parameter_gets_into_a_message(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Neither an error of a record class nor SQLite's own message brings a value into an error's text or into the log."""
    await db.execute("INSERT INTO item (value) VALUES ('token-4711')")
    await db.execute("CREATE VIRTUAL TABLE notes USING fts5 (body)")

    class Picky:
        def __init__(self, value: str) -> None:
            raise ValueError(f"no good: {value}")

    with pytest.raises(ValueError, match="token-4711"):  # the user's own, and for the user alone
        await db.fetch_one("SELECT value FROM item", record_class=Picky)
    asked = {
        "SELECT * FROM notes WHERE notes MATCH ?": ("secretcolumn:x", 'tooth "unclosed4711', "sec4711ret AND AND"),
        "SELECT json_extract('{}', ?)": ("$.[hidden4711", "$[hidden4711]x"),
        "SELECT json(?)": ("{hidden4711",),
    }
    for sql, values in asked.items():
        for value in values:
            for call in (
                lambda sql=sql, value=value: db.fetch_all(sql, (value,)),
                lambda sql=sql, value=value: db.run(lambda connection: connection.execute(sql, (value,)).fetchall()),
            ):
                (error,) = await gather(call)
                if isinstance(error, errors.QueryExecutionError):
                    said = f"{error} {error.__cause__}"
                    assert not any(piece in said for piece in ("4711", "secret", "hidden")), said
    assert not any(piece in caplog.text for piece in ("4711", "secretcolumn", "hidden"))
    with pytest.raises(errors.QueryExecutionError, match="no such column: nowhere"):  # of the statement, and needed
        await db.fetch_all("SELECT nowhere FROM item WHERE value = :nowhere", {"nowhere": "x"})


async def test_values_that_only_the_users_code_knows(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is a value quoted that code of the user's has made, or that nobody can name: of a property, of `__slots__`, of an
    adapter, of a sequence of some class, of a raw connection's `executemany`.
    """
    await db.execute("CREATE VIRTUAL TABLE notes USING fts5 (body)")
    query, secret = "SELECT * FROM notes WHERE notes MATCH :q", "hidden4711:x"

    @dataclass(slots=True)
    class Slots:
        q: str

    class Owner:
        q = secret

    class Computed:
        @property
        def q(self) -> str:
            return secret

    class Own:
        pass

    class Conforms:
        def __conform__(self, _protocol: object) -> str:
            return secret

    class OnlyOne(Sequence[str]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            return [secret][index]

    def many(connection: Any) -> None:
        connection.executemany("INSERT INTO notes (notes) VALUES (?)", [("hidden4711",)])

    db.adapt(Own, lambda _own: secret)
    for params in (
        Slots(secret),
        Owner(),
        Computed(),
        {"q": Own()},
        {"q": Conforms()},
        {"q": memoryview(secret.encode())},
    ):
        with pytest.raises(errors.QueryExecutionError, match="no such column") as caught:
            await db.fetch_all(query, params)
        assert "4711" not in f"{caught.value} {caught.value.__cause__!r}", type(params)
    for call in (
        lambda: db.fetch_all(query.replace(":q", "?"), OnlyOne()),
        lambda: db.run(many),
        lambda: db.execute("INSERT INTO item (value) VALUES (?)", ("hidden4711\udc80",)),
    ):
        (error,) = await gather(call)
        assert isinstance(error, errors.QueryExecutionError)
        assert "4711" not in f"{error} {error.__cause__!r}"
    assert "4711" not in caplog.text
    with pytest.raises(errors.QueryExecutionError, match="no such column: nowhere"):
        await db.fetch_all("SELECT nowhere FROM item WHERE value = :q", Slots("x"))
    with pytest.raises(errors.IntegrityError, match=r"NOT NULL constraint failed: jobs\.name"):
        await db.execute("INSERT INTO jobs (handler) VALUES (:q)", Slots("x"))


async def test_what_is_raised_where_values_are_made(
    make_db: Any, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A ValueError of the user's own code, called while values are bound or rows are read, arrives as it was raised, and is
    nowhere in the log.
    """

    class Mine(ValueError):
        pass

    def fail(*_: Any) -> Any:
        raise Mine("token-4711")

    class Item:
        value = property(fail)

    class Conforms:
        __conform__ = fail

    class Values(Sequence[Any]):
        __getitem__ = fail

        def __len__(self) -> int:
            return 1

    def picky(text: bytes) -> str:
        return fail() if b"4711" in text else text.decode()

    db = await make_db()
    await db.close()
    db = await make_db(schema=False, on_connect=lambda connection: setattr(connection, "text_factory", picky))
    await db.execute("INSERT INTO item (value) VALUES ('token-4711')")
    names, positions = "INSERT INTO item (value) VALUES (:value)", "INSERT INTO item (value) VALUES (?)"

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(names, Item())

    for call in (
        lambda: db.execute(names, Item()),
        lambda: db.execute(positions, (Conforms(),)),
        lambda: db.execute(positions, Values()),
        lambda: db.fetch_all("SELECT :value", Item()),
        lambda: db.execute_many(names, [Item()]),
        lambda: db.execute_many(positions, iter([(Conforms(),)])),
        lambda: transactional(db.execute)(names, Item()),
        lambda: transactional(offload=True)(db.execute)(names, Item()),
        batch,
        lambda: db.fetch_all("SELECT value FROM item"),
        lambda: db.fetch_value("SELECT value FROM item"),
    ):
        with unlocked(engine), pytest.raises(Mine):
            await call()
    assert "4711" not in caplog.text
    assert engine.outside("SELECT count(*) FROM item") == [(1,)]


async def test_text_that_is_not_utf8(db: Any, engine: Engine) -> None:
    """Says which column it is, without what is in it; a write is done, a second row that nobody asked for does no harm, and
    no lock and no snapshot stays.
    """
    outside = sqlite3.connect(engine.path())
    outside.execute("INSERT INTO item (id, value) VALUES (1, 'good'), (2, CAST(x'ff6869' AS TEXT))")
    outside.commit()
    outside.close()
    write = "UPDATE item SET id = id + 10 WHERE id % 10 = 2 RETURNING value"
    for call in (
        lambda: db.fetch_all("SELECT id, value FROM item"),
        lambda: db.fetch_value("SELECT value FROM item ORDER BY id DESC"),
        lambda: db.fetch_one(write),
        lambda: db.fetch_all(write),
        lambda: db.fetch_value(write),
    ):
        with (
            unlocked(engine),
            pytest.raises(errors.QueryExecutionError, match=r"'value' holds TEXT .* not UTF-8") as caught,
        ):
            await call()
        assert "hi" not in str(caught.value).replace("which", "").split("SQL:")[0]
    assert engine.outside("SELECT id FROM item ORDER BY id") == [(1,), (32,)]
    await db.execute(write)
    assert await db.fetch_value("SELECT value FROM item ORDER BY id") == "good"
    engine.outside("PRAGMA wal_checkpoint(TRUNCATE)")
    assert engine.outside("SELECT id FROM item ORDER BY id") == [(1,), (42,)]
    for blow in ("INSERT OR ROLLBACK INTO item (id) VALUES (1)", write.replace("id + 10", "1").replace("% 10", "% 5")):
        results = await gather(  # it stays done, also where the group that it was in is rolled back
            lambda: db.execute("INSERT INTO item (id) VALUES (0)"), lambda: db.fetch_value(write),
            lambda blow=blow: db.execute(blow.replace("UPDATE", "UPDATE OR ROLLBACK")),
        )  # fmt: skip
        assert isinstance(results[1], errors.QueryExecutionError)
        assert isinstance(results[2], errors.IntegrityError), results
        (number,) = engine.outside("SELECT max(id) FROM item")[0]
        assert number % 10 == 2
        assert number > 42, "said to be done"
        await db.execute_script("DELETE FROM item WHERE id = 0; UPDATE item SET id = 42 WHERE id > 42")
    with pytest.raises(errors.QueryExecutionError, match="AS BLOB") as caught:
        await db.run(lambda connection: connection.execute(write).fetchall())
    assert "all the same" not in str(caught.value), "of a function nothing is kept"
    assert engine.outside("SELECT id FROM item ORDER BY id") == [(1,), (42,)]


async def test_what_a_write_says_of_itself(db: Any) -> None:
    """`rowcount` of a write that begins with WITH is the number; `lastrowid` is that of this INSERT, or None."""
    await db.execute_script(
        "CREATE TABLE keyed (k TEXT PRIMARY KEY, n) WITHOUT ROWID; CREATE TABLE plain (id INTEGER PRIMARY KEY, n);"
        "CREATE VIEW both AS SELECT * FROM plain;"
        "CREATE TRIGGER put INSTEAD OF INSERT ON both BEGIN INSERT INTO plain (n) VALUES (new.n); END;"
        'CREATE TABLE "odd "" name" (k PRIMARY KEY) WITHOUT ROWID;'
    )

    async def results() -> list[tuple[int, int | None]]:
        with_rows = "WITH v (n) AS (VALUES (1), (2), (3))"
        return [
            tuple(await db.execute(sql))
            for sql in (
                "INSERT INTO plain (id, n) VALUES (70, 1)",
                "INSERT INTO keyed VALUES ('a', 1)",
                'INSERT INTO "odd "" name" VALUES (1)',
                "INSERT OR IGNORE INTO main.keyed VALUES ('a', 1)",
                "INSERT INTO both (n) VALUES (1)",
                f"{with_rows} INSERT INTO plain (n) SELECT n FROM v",
                f"{with_rows} INSERT INTO keyed SELECT n, n FROM v",
                "WITH v AS (SELECT 'into' AS k) INSERT INTO keyed SELECT k, 1 FROM v",
                'WITH "into" AS (SELECT 5 AS k) INSERT INTO keyed SELECT k, 1 FROM "into"',
                f"{with_rows} UPDATE plain SET n = 0 WHERE id IN (SELECT n + 70 FROM v) RETURNING n",
                f"{with_rows} DELETE FROM plain WHERE id IN (SELECT n + 700 FROM v)",
                "WITH replace (n) AS (VALUES (1)) DELETE FROM plain",
                "DELETE FROM keyed",
                'DELETE FROM "odd "" name"',
            )
        ]

    wanted = [
        (1, 70),
        (1, None),
        (1, None),
        (0, None),
        (0, None),
        (3, 74),
        (3, None),
        (1, None),
        (1, None),
        (3, None),
        (0, None),
        (5, None),
    ]
    wanted += [(6, None), (1, None)]
    assert await results() == wanted
    assert await transactional(offload=True)(results)() == wanted
    async with db.transaction():
        assert await results() == wanted
    many = await db.execute_many("WITH w AS (SELECT 1) INSERT INTO plain (n) VALUES (?)", [(1,), (2,)])
    assert many.rowcount == 2
    assert await db.fetch_value("WITH replace AS (SELECT 5 AS n) SELECT n FROM replace") == 5
    async with db.transaction(readonly=True):
        assert await db.fetch_value("WITH replace AS (SELECT 5 AS n) SELECT n FROM replace") == 5
    await db.execute_script("DROP TABLE keyed; CREATE TABLE keyed (k TEXT, n)")
    assert (await db.execute("INSERT INTO keyed VALUES ('a', 1)")).lastrowid == 1


async def test_code_names_that_python_does_not_know(db: Any) -> None:
    """A code that this Python calls "unknown" has SQLite's own name all the same."""
    await db.execute("CREATE TABLE typed (n INTEGER) STRICT")
    with pytest.raises(errors.IntegrityError) as caught:
        await db.execute("INSERT INTO typed VALUES ('x')")
    assert caught.value.code_name == "SQLITE_CONSTRAINT_DATATYPE"


class Pair(NamedTuple):
    b: Any
    a: Any


class RowOfOthers(Sequence[Any]):
    """As SQLAlchemy's: no tuple, but with what a NamedTuple has."""

    _fields = ("b", "a")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, position: Any) -> Any:
        return ("B", "A")[position]


async def test_names_or_positions_as_the_sql_asks(db: Any, engine: Engine) -> None:
    """A NamedTuple or a row, also another library's, goes by name to `:name`, by position to `?`, in every method."""
    await db.execute("CREATE TABLE pair (a, b)")
    row = await db.fetch_one("SELECT 'B' AS b, 'A' AS a")
    for params in (Pair("B", "A"), row, RowOfOthers()):
        for sql, wanted in (
            ("INSERT INTO pair (a, b) VALUES (:a, :b)", ("A", "B")),
            ("INSERT INTO pair (a, b) VALUES (?, ?)", ("B", "A")),
            ("INSERT INTO pair (a, b) VALUES (?, ?) -- :a", ("B", "A")),
            ("INSERT INTO pair (a, b) VALUES (@a, $b)", ("A", "B")),
        ):

            async def batched(sql: str = sql, params: Any = params) -> None:
                async with db.batch() as batch:
                    await batch.execute(sql, params)

            async def streamed(sql: str = sql, params: Any = params) -> None:
                async with db.transaction(), db.stream(sql.split(" --")[0] + " RETURNING a", params) as rows:
                    await collect(rows)

            for call in (
                lambda sql=sql, params=params: db.execute(sql, params),
                lambda sql=sql, params=params: db.fetch_one(sql.split(" --")[0] + " RETURNING a", params),
                streamed,
                lambda sql=sql, params=params: db.execute_many(sql, [params, params]),
                lambda sql=sql, params=params: db.execute_many(sql, iter([params])),
                batched,
            ):
                await call()
                assert set(engine.outside("SELECT a, b FROM pair")) == {wanted}, (params, sql)
                await db.execute("DELETE FROM pair")


class Single(NamedTuple):
    value: Any


@dataclass(frozen=True, slots=True)
class Fixed:
    value: Any = None


class Slotted:
    __slots__ = ("value",)


class Grown(Slotted):
    """Has both: what its parent keeps in slots, and a `__dict__`."""


async def test_values_are_those_of_the_moment_of_handing_over(db: Any, engine: Engine) -> None:
    """A generator or a batch may use one object for all its rows: dict, list, bytearray, memoryview or any object."""

    @dataclass
    class Item:
        value: Any = None

    names, positions = "INSERT INTO item (value) VALUES (:value)", "INSERT INTO item (value) VALUES (?)"
    shared: dict[str, tuple[str, Any, Any]] = {
        "dict": (names, {"value": 0}, lambda it, n: it.__setitem__("value", n)),
        "list": (positions, [0], lambda it, n: it.__setitem__(0, n)),
        "object": (names, Item(), lambda it, n: setattr(it, "value", n)),
    }
    buffer = bytearray(b"0")
    for name, (sql, params, put) in list(shared.items()):
        for kind, raw in (("bytearray", buffer), ("memoryview", memoryview(buffer))):

            def fill(it: Any, n: int, put: Any = put, raw: Any = raw) -> None:
                buffer[:] = b"%d" % n
                put(it, raw)

            shared[f"{kind} in a {name}"] = sql, params, fill
    shared["bytearray in a tuple"] = positions, (buffer,), lambda _, n: buffer.__setitem__(slice(None), b"%d" % n)
    for kind in (UserList, deque, type("OwnList", (list,), {}), lambda values: array("q", values)):
        shared[str(kind)] = positions, kind([0]), lambda it, n: it.__setitem__(0, n)
    fixed = Fixed(buffer), Single(buffer)
    for each in fixed:
        shared[f"bytearray in {each}"] = names, each, lambda _, n: buffer.__setitem__(slice(None), b"%d" % n)
    shared["SimpleNamespace"] = names, SimpleNamespace(), lambda it, n: setattr(it, "value", n)
    shared["slots of a parent"] = names, Grown(), lambda it, n: setattr(it, "value", n)
    db.adapt(list, lambda value: value[0] if isinstance(value[0], int) else value[0]["n"])
    flat, deep = [0], [{"n": 0}]
    shared["a list that is adapted"] = positions, (flat,), lambda _, n: flat.__setitem__(0, n)
    shared["a document"] = names, {"value": deep}, lambda _, n: deep[0].__setitem__("n", n)
    for name, (sql, params, put) in shared.items():

        def rows(params: Any = params, put: Any = put) -> Iterator[Any]:
            for number in range(3):
                put(params, number)
                yield params

        await db.execute_many(sql, rows())
        async with db.batch(size=100) as batch:
            for each in rows():
                await batch.execute(sql, each)
        stored = [int(value) for (value,) in engine.outside("SELECT value FROM item ORDER BY id")]
        assert stored == [0, 1, 2, 0, 1, 2], name
        await db.execute("DELETE FROM item")
    db.binding.declared.adapters.clear()


async def test_which_row_failed(db: Any) -> None:
    """`execute_many` and a batch say which row it was, and what the caller's own iterator raises arrives as it is."""
    sql = "INSERT INTO item (id, value) VALUES (?, 'x')"
    for count in (3, 501, 1203):
        rows = [(n,) for n in range(count)]
        for bad, kind in (((0,), errors.IntegrityError), ((object(),), errors.QueryExecutionError)):
            for given in ([*rows, bad, (9999,)], iter([*rows, bad, (9999,)])):
                with pytest.raises(kind, match=rf"\(row {count + 1} of execute_many\(\)\)") as caught:
                    await db.execute_many(sql, given)
                assert caught.value.parameters == bad
                assert caught.value.sql == sql
    with pytest.raises(errors.IntegrityError, match="write 3 of the 3 that a batch sent together"):
        async with db.batch() as batch:
            for number in (1, 2, 1):
                await batch.execute(sql, (number,))

    def failing() -> Iterator[Any]:
        yield (1,)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        await db.execute_many(sql, failing())
    assert await db.fetch_value("SELECT count(*) FROM item") == 0


async def test_deferred_keys_in_a_group(db: Any, engine: Engine) -> None:
    """What fails alone fails in a group as well, whatever its neighbours do: an orphan whose parent a neighbour supplies
    behind it, by a statement, a function or an offloaded transaction; and `defer_foreign_keys` is for its own transaction.
    """
    await db.execute_script(
        "CREATE TABLE strict_child (id INTEGER PRIMARY KEY, parent_id INTEGER NOT NULL REFERENCES parent (id));"
        "CREATE TABLE log (number INTEGER PRIMARY KEY, who TEXT, id INTEGER);"
        "CREATE TRIGGER log_parent AFTER INSERT ON parent BEGIN INSERT INTO log (who, id) VALUES ('parent', new.id); END;"
        "CREATE TRIGGER log_child AFTER INSERT ON child BEGIN INSERT INTO log (who, id) VALUES ('child', new.parent_id); END;"
        "INSERT INTO parent VALUES (0)"
    )
    orphan, parent = "INSERT INTO child (parent_id) VALUES (?)", "INSERT INTO parent VALUES (?)"
    strict = "INSERT INTO strict_child (parent_id) VALUES (?)"

    @transactional(offload=True)
    async def offloaded(number: int) -> None:
        await db.execute(orphan, (number,))

    @transactional(offload=True)
    async def deferring(number: int) -> None:
        await db.execute("PRAGMA defer_foreign_keys = ON")
        await db.execute(strict, (number,))
        await db.execute(parent, (number,))

    def run(connection: sqlite3.Connection, number: int) -> None:
        connection.execute("PRAGMA defer_foreign_keys = ON")
        connection.execute(strict, (number,))
        connection.execute(parent, (number,))

    for base in (100, 200, 300):  # the first time statements are new, then they are prepared
        calls: dict[str, Any] = {
            "neighbour": lambda: db.execute("INSERT INTO item (value) VALUES ('neighbour')"),
            "statement": lambda base=base: db.execute(orphan, (base + 1,)),
            "parent 1": lambda base=base: db.execute(parent, (base + 1,)),
            "offloaded": lambda base=base: offloaded(base + 2),
            "parent 2": lambda base=base: db.execute(parent, (base + 2,)),
            "function": lambda base=base: db.run(lambda connection: connection.execute(orphan, (base + 3,)).rowcount),
            "parent 3": lambda base=base: db.execute(parent, (base + 3,)),
            "deferring": lambda base=base: deferring(base + 4),
            "strict": lambda base=base: db.execute(strict, (base + 9,)),
            "deferring in a function": lambda base=base: db.run(run, base + 5),
            "strict again": lambda base=base: db.execute(strict, (base + 9,)),
            "another neighbour": lambda: db.execute("INSERT INTO item (value) VALUES ('neighbour')"),
        }
        results = dict(zip(calls, await gather(*calls.values()), strict=True))
        failed = {name for name, result in results.items() if isinstance(result, BaseException)}
        assert {"strict", "strict again"} <= failed <= {"strict", "strict again", "statement", "offloaded", "function"}
        assert all(isinstance(results[name], errors.IntegrityError) for name in failed), results
    log = engine.outside("SELECT who, id FROM log ORDER BY number")
    for position, (who, number) in enumerate(log):  # tasks may start in any order, but somebody has come first
        assert who == "parent" or ("parent", number) in log[:position], (number, log)
    assert engine.outside("SELECT count(*) FROM item") == engine.outside("SELECT count(*) FROM strict_child") == [(6,)]
    assert engine.outside("PRAGMA foreign_key_check") == []
    assert db.stats().grouped_total > 0

    def make(
        connection: sqlite3.Connection,
    ) -> None:  # the very member of a group that leaves an orphan has made the table
        connection.execute("CREATE TABLE mother (id INTEGER PRIMARY KEY)")
        connection.execute("CREATE TABLE daughter (mother INTEGER REFERENCES mother DEFERRABLE INITIALLY DEFERRED)")
        connection.execute("INSERT INTO daughter VALUES (1)")

    neighbour = "INSERT INTO item (value) VALUES ('neighbour')"
    found = await gather(
        lambda: db.execute(neighbour),
        lambda: db.run(make),
        lambda: db.execute(neighbour),
        lambda: db.run(lambda connection: connection.execute("INSERT INTO mother VALUES (1)").rowcount),
    )
    assert isinstance(found[1], errors.IntegrityError), found
    assert engine.outside("SELECT count(*) FROM item") == [(8,)]


async def test_no_memory_for_long_texts(db: Any) -> None:
    """What is remembered of statements is bounded by what they hold, not only by their number."""
    import resource

    text = "SELECT '" + "x" * 100_000 + "', {}"
    for number in range(30):
        await db.fetch_value(text.format(number))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(30, 400):
        await db.fetch_value(text.format(number))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, f"{grown / 1024:.0f} MiB more for statements that are sent once"  # 40 MB of text alone
    with anyio.fail_after(10):
        assert await db.fetch_value("SELECT 1") == 1
