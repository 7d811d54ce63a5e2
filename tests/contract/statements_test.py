"""Section 3 of the contract: what each call of the handle takes, returns and refuses."""

from __future__ import annotations

import threading
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from tests.contract.support import SLOW_ROWS, Engine, add, errors, gather, in_turn, names, usable

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]


@dataclass
class Job:
    id: int
    name: str
    cron_expr: str | None
    handler: str | None
    enabled: int


@dataclass
class NewJob:
    name: str
    cron_expr: str = "@daily"
    handler: str = "echo"


INSERT = "INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler)"


# --- execute ------------------------------------------------------------------------------------------------


async def test_execute_returns_rowcount_and_lastrowid(db: Any) -> None:
    """An INSERT tells how many rows it made and the id of the last."""
    first = await db.execute("INSERT INTO jobs (name) VALUES ('a')")
    second = await db.execute("INSERT INTO jobs (name) VALUES ('b'), ('c')")
    assert (first.rowcount, first.lastrowid) == (1, 1)
    assert (second.rowcount, second.lastrowid) == (2, 3)


async def test_rowcount_of_update_and_delete(db: Any) -> None:
    """UPDATE and DELETE tell how many rows they touched, none included."""
    await db.execute("INSERT INTO jobs (name) VALUES ('a'), ('b'), ('c')")
    assert (await db.execute("UPDATE jobs SET enabled = 0 WHERE name <> 'a'")).rowcount == 2
    assert (await db.execute("UPDATE jobs SET enabled = 0 WHERE name = 'nobody'")).rowcount == 0
    assert (await db.execute("DELETE FROM jobs")).rowcount == 3


async def test_lastrowid_is_ones_own(db: Any) -> None:
    """Writes that run at once, and may share a commit, each get their own id."""

    async def insert(number: int) -> tuple[int, int]:
        result = await db.execute("INSERT INTO item (value) VALUES (?)", (number,))
        return number, result.lastrowid

    results = await gather(*[lambda number=number: insert(number) for number in range(50)])
    for number, rowid in results:
        assert await db.fetch_value("SELECT value FROM item WHERE id = ?", (rowid,)) == str(number)


async def test_a_write_is_committed_when_it_returns(db: Any, engine: Engine) -> None:
    """Outside a transaction each statement is its own: somebody outside sees it at once."""
    await add(db, "a")
    assert engine.committed() == ["a"]


async def test_a_read_sees_the_write_before_it(db: Any) -> None:
    """A task reads its own autocommitted writes, each time."""
    for number in range(20):
        await db.execute("INSERT INTO item (value) VALUES (?)", (number,))
        assert await db.fetch_value("SELECT count(*) FROM item") == number + 1


# --- execute_many, execute_script ---------------------------------------------------------------------------


@in_turn(
    "sql, rows",
    [
        pytest.param("INSERT INTO jobs (name, handler) VALUES (?, ?)", [("a", 1), ("b", 2), ["c", 3]], id="sequences"),
        pytest.param("INSERT INTO jobs (name) VALUES (:name)", [{"name": n} for n in "abc"], id="mappings"),
        pytest.param(INSERT, [NewJob(n) for n in "abc"], id="objects"),
    ],
)
async def test_execute_many_counts_all_rows(db: Any, sql: str, rows: list[Any]) -> None:
    """The rowcount is the total, whatever form the rows have."""
    assert (await db.execute_many(sql, rows)).rowcount == 3
    assert await names(db) == ["a", "b", "c"]


async def test_execute_many_takes_any_iterable(db: Any) -> None:
    """Rows may come from a generator; none at all is no error."""
    assert (await db.execute_many("INSERT INTO item (value) VALUES (?)", ((n,) for n in range(1000)))).rowcount == 1000
    assert (await db.execute_many("INSERT INTO item (value) VALUES (?)", [])).rowcount == 0
    assert await db.fetch_value("SELECT count(*) FROM item") == 1000


@in_turn("inside", [False, True], ids=["autocommit", "transaction"])
async def test_execute_many_is_all_or_nothing(db: Any, engine: Engine, inside: bool) -> None:
    """A row in the middle that fails undoes the rows before it, and only those."""
    rows = [("a",), ("b",), ("taken",), ("c",)]
    await add(db, "taken")

    async def insert() -> None:
        with pytest.raises(errors.IntegrityError):
            await db.execute_many("INSERT INTO jobs (name) VALUES (?)", rows)

    if inside:
        async with db.transaction():
            await add(db, "before")
            await insert()
        assert engine.committed() == ["before", "taken"]
    else:
        await insert()
        assert engine.committed() == ["taken"]


async def test_execute_many_with_a_generator_that_fails(db: Any, engine: Engine) -> None:
    """An exception out of the rows' generator goes on, and nothing of it is written."""

    def rows() -> Any:
        yield ("a",)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await db.execute_many("INSERT INTO jobs (name) VALUES (?)", rows())
    assert engine.committed() == []
    await usable(db)


SCRIPT = """
-- a comment; with a semicolon
CREATE TABLE log (text TEXT);
INSERT INTO log VALUES ('one; and a half'), ("two");  /* ; */
CREATE TRIGGER noted AFTER INSERT ON jobs BEGIN
    INSERT INTO log VALUES (new.name);
    INSERT INTO log VALUES ('; end');
END;
INSERT INTO jobs (name) VALUES ('a')
"""


async def test_execute_script(db: Any, engine: Engine) -> None:
    """A script of several statements, with semicolons wherever SQL allows them, runs and returns nothing."""
    assert await db.execute_script(SCRIPT.replace('"two"', "'two'")) is None
    assert engine.outside("SELECT text FROM log") == [("one; and a half",), ("two",), ("a",), ("; end",)]


async def test_script_inside_a_transaction_stays_inside(db: Any, engine: Engine) -> None:
    """A script commits nothing of the transaction it runs in, neither before nor after itself."""
    with pytest.raises(LookupError):
        async with db.transaction():
            await add(db, "before")
            await db.execute_script("INSERT INTO jobs (name) VALUES ('x'); CREATE TABLE t (a TEXT);")
            assert engine.committed() == []
            await add(db, "after")
            raise LookupError
    assert engine.committed() == []
    assert engine.outside("SELECT count(*) FROM sqlite_master WHERE name = 't'") == [(0,)]


async def test_script_that_fails(db: Any) -> None:
    """A script's bad statement raises, and the pool goes on."""
    with pytest.raises(errors.QueryExecutionError):
        await db.execute_script("INSERT INTO item (value) VALUES (1); INSERT INTO nowhere VALUES (1);")
    await usable(db)


@in_turn("script", ["", "  \n", "-- nothing", ";;"])
async def test_empty_script(db: Any, script: str) -> None:
    """A script with nothing in it does nothing."""
    assert await db.execute_script(script) is None


# --- fetch --------------------------------------------------------------------------------------------------


async def test_fetch_one(db: Any) -> None:
    """The first row, or None where there is none."""
    assert await db.fetch_one("SELECT name FROM jobs") is None
    await db.execute("INSERT INTO jobs (name) VALUES ('b'), ('a')")
    assert (await db.fetch_one("SELECT name FROM jobs ORDER BY name"))["name"] == "a"
    await usable(db)


async def test_fetch_all(db: Any) -> None:
    """All rows in a list, an empty one included."""
    assert await db.fetch_all("SELECT * FROM jobs") == []
    await db.execute("INSERT INTO jobs (name) VALUES ('b'), ('a')")
    rows = await db.fetch_all("SELECT id, name FROM jobs ORDER BY name")
    assert isinstance(rows, list)
    assert [tuple(row) for row in rows] == [(2, "a"), (1, "b")]


async def test_fetch_value(db: Any) -> None:
    """The first column of the first row; the default only where there is no row, so NULL stays None."""
    assert await db.fetch_value("SELECT name FROM jobs") is None
    assert await db.fetch_value("SELECT name FROM jobs", default="none") == "none"
    assert await db.fetch_value("SELECT NULL, 7", default="none") is None
    assert await db.fetch_value("SELECT 1, 2 UNION ALL SELECT 3, 4 ORDER BY 1") == 1
    assert await db.fetch_value("SELECT :a + :b", {"a": 1, "b": 2}) == 3


@in_turn("method", ["fetch_one", "fetch_value"])
async def test_one_row_does_not_compute_the_others(db: Any, method: str) -> None:
    """Asking for one row of a hundred million is quick, and leaves no half-read cursor behind."""
    found = await getattr(db, method)(SLOW_ROWS)
    assert (found if method == "fetch_value" else found[0]) == 1
    await usable(db)


async def test_returning(db: Any, engine: Engine) -> None:
    """INSERT, UPDATE and DELETE with RETURNING fit the fetch methods, and are committed."""
    assert await db.fetch_value("INSERT INTO jobs (name) VALUES ('a') RETURNING id") == 1
    rows = await db.fetch_all("INSERT INTO jobs (name) VALUES ('b'), ('c') RETURNING id, name")
    assert [dict(row) for row in rows] == [{"id": 2, "name": "b"}, {"id": 3, "name": "c"}]
    assert (await db.fetch_one("UPDATE jobs SET enabled = 0 WHERE id = 1 RETURNING enabled"))["enabled"] == 0
    assert (await db.fetch_one("DELETE FROM jobs WHERE id < 3 RETURNING name"))[0] in "ab"
    assert engine.committed() == ["c"], "RETURNING deletes all of its rows, though only one was asked for"


# --- Row ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def row(db: Any) -> Any:
    return await db.fetch_one("SELECT 7 AS id, 'backup' AS name, NULL AS handler")


async def test_row_is_a_sequence(row: Any) -> None:
    """Positions, negative ones and slices too; length; iteration over values; unpacking."""
    assert (row[0], row[-2], row[2]) == (7, "backup", None)
    assert tuple(row[:2]) == (7, "backup")
    assert len(row) == 3
    assert list(row) == [7, "backup", None]
    number, name, _ = row
    assert (number, name) == (7, "backup")
    with pytest.raises(IndexError):
        row[3]


async def test_row_is_a_mapping(row: Any) -> None:
    """Names, `dict(row)`, `**row`, `keys()`."""
    assert row["name"] == "backup"
    assert dict(row) == {"id": 7, "name": "backup", "handler": None}
    assert {**row} == dict(row)
    assert list(row.keys()) == ["id", "name", "handler"]
    with pytest.raises(LookupError):
        row["nobody"]


async def test_row_makes_an_entity(db: Any) -> None:
    """`JobEntity(**row)` works as it does in the user's example."""
    await add(db, "a")
    assert Job(**await db.fetch_one("SELECT * FROM jobs")) == Job(1, "a", None, None, 1)


async def test_row_shows_names_and_values(row: Any) -> None:
    """The repr of a row can be read."""
    for part in ("id", "7", "name", "'backup'", "handler", "None"):
        assert part in repr(row)


async def test_row_with_the_same_name_twice(db: Any) -> None:
    """Columns of one name are all there by position."""
    assert list(await db.fetch_one("SELECT 1 AS a, 2 AS a")) == [1, 2]


async def test_rows_compare_and_outlive_the_pool(db: Any) -> None:
    """Equal rows are equal, and a row needs no connection any more."""
    one = await db.fetch_one("SELECT 1 AS a, 'x' AS b")
    other = await db.fetch_one("SELECT 1 AS a, 'x' AS b")
    await db.close()
    assert one == other
    assert one["b"] == "x"


# --- parameters ---------------------------------------------------------------------------------------------


class Plain:
    def __init__(self) -> None:
        self.a, self.b = 1, 2


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, 2


class Inherited(Slotted):
    def __init__(self) -> None:
        super().__init__()
        self.more = 3


class Keyed:
    """What `dict()` takes for a mapping, as a pandas Series is; its attributes are something else."""

    a = b = "an attribute"

    def keys(self) -> list[str]:
        return ["a", "b"]

    def __getitem__(self, name: str) -> int:
        return {"a": 1, "b": 2}[name]


class Computed:
    a = 1

    @property
    def b(self) -> int:
        return 2


@dataclass(frozen=True, slots=True)
class Frozen:
    a: int = 1
    b: int = 2


@in_turn(
    "params",
    [
        pytest.param({"a": 1, "b": 2}, id="dict"),
        pytest.param({"a": 1, "b": 2, "more": object()}, id="more-than-needed"),
        pytest.param(MappingProxyType({"a": 1, "b": 2}), id="mappingproxy"),
        pytest.param(UserDict({"a": 1, "b": 2}), id="UserDict"),
        pytest.param(Plain(), id="object"),
        pytest.param(Slotted(), id="slots"),
        pytest.param(Inherited(), id="slots-of-a-parent"),
        pytest.param(SimpleNamespace(a=1, b=2), id="SimpleNamespace"),
        pytest.param(Keyed(), id="keys"),
        pytest.param(Computed(), id="property"),
        pytest.param(Frozen(), id="dataclass"),
    ],
)
async def test_named_parameters(db: Any, params: Any) -> None:
    """Names are taken from a mapping or from the attributes of any object."""
    assert list(await db.fetch_one("SELECT :a, :b, :a + :b", params)) == [1, 2, 3]


async def test_a_model_of_pydantics(db: Any) -> None:
    """So are extra fields, and what is computed from private attributes, which pydantic keeps in places of its own."""
    pydantic = pytest.importorskip("pydantic")

    class Loose(pydantic.BaseModel, extra="allow"):  # type: ignore[name-defined, misc]
        a: int
        _private: int = pydantic.PrivateAttr(default=3)

        @property
        def c(self) -> int:
            return self._private

    assert list(await db.fetch_one("SELECT :a, :b, :c", Loose(a=1, b=2))) == [1, 2, 3]


Pair = namedtuple("Pair", "a b")


@in_turn("params", [(1, 2), [1, 2], range(1, 3), Pair(1, 2)], ids=["tuple", "list", "range", "namedtuple"])
async def test_positional_parameters(db: Any, params: Any) -> None:
    """Positions are taken from any sequence."""
    assert list(await db.fetch_one("SELECT ?, ?", params)) == [1, 2]


async def test_a_row_as_parameters(db: Any) -> None:
    """A row that was fetched can be the parameters of the next statement, by its names."""
    row = await db.fetch_one('SELECT 1 AS a, 2 AS "B"')
    assert list(await db.fetch_one("SELECT :b, :a", row)) == [2, 1]


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        pytest.param("SELECT :a, :b", {"a": 1}, id="name-missing"),
        pytest.param("SELECT :a, :c", Frozen(), id="attribute-missing"),
        pytest.param("SELECT ?, ?", (1,), id="too-few"),
        pytest.param("SELECT ?", (1, 2), id="too-many"),
        pytest.param("SELECT :a", None, id="none"),
        pytest.param("SELECT ?", (object(),), id="type"),
        pytest.param("SELECT ?", (2**63,), id="too-large"),
        pytest.param("SELECT ?", ("\ud800",), id="surrogate"),
    ],
)
async def test_wrong_parameters(db: Any, sql: str, params: Any) -> None:
    """Parameters that do not fit their statement are the common error, not the driver's."""
    with pytest.raises(errors.QueryExecutionError):
        await db.fetch_one(sql, params)
    await usable(db)


async def test_values_survive(db: Any) -> None:
    """Text with NUL and any letter, blobs, floats and the largest integers come back as they went in."""
    values = ["한글 \x00 'quoted' \U0001f600", b"\x00\xff" * 1000, 1.5, 2**63 - 1, -(2**63), None, ""]
    await db.execute("CREATE TABLE anything (a, b, c, d, e, f, g)")
    await db.execute("INSERT INTO anything VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    assert list(await db.fetch_one("SELECT * FROM anything")) == values


# --- record_class -------------------------------------------------------------------------------------------


async def test_record_class(db: Any, queries: Any) -> None:
    """fetch_one, fetch_all and stream make records of the class asked for; no row stays None."""
    assert await db.fetch_one("SELECT * FROM jobs", record_class=Job) is None
    await db.execute_many(INSERT, [NewJob("a"), NewJob("b")])
    expected = [Job(1, "a", "@daily", "echo", 1), Job(2, "b", "@daily", "echo", 1)]
    assert await db.fetch_one("SELECT * FROM jobs WHERE id = :id", {"id": 2}, record_class=Job) == expected[1]
    assert await db.fetch_all("SELECT * FROM jobs ORDER BY id", record_class=Job) == expected
    assert await db.fetch_all(queries.get_all_jobs, {"enabled": 1}, record_class=Job) == expected
    async with db.stream("SELECT * FROM jobs ORDER BY id", record_class=Job) as rows:
        assert [row async for row in rows] == expected


async def test_record_class_that_does_not_fit(db: Any) -> None:
    """A class that refuses a row raises, and the connection is free again."""
    await add(db, "a")
    for call in (db.fetch_one, db.fetch_all):
        with pytest.raises((TypeError, errors.DatabaseError)):
            await call("SELECT * FROM jobs", record_class=NewJob)
    with pytest.raises((TypeError, errors.DatabaseError)):
        async with db.stream("SELECT * FROM jobs", record_class=NewJob) as rows:
            [row async for row in rows]
    await usable(db)


# --- aiosql -------------------------------------------------------------------------------------------------


NEW = {"name": "a", "cron_expr": "@daily", "handler": "echo"}


async def test_queries_through_the_handle(db: Any, queries: Any, engine: Engine) -> None:
    """Every operator's function is taken by the method that fits it."""
    assert (await db.execute(queries.insert_job, NEW)).lastrowid == 1
    assert (await db.execute(queries.insert_job, NewJob("b"))).lastrowid == 2
    assert (await db.execute_many(queries.insert_jobs, [{"name": n, "cron_expr": "*"} for n in "cd"])).rowcount == 2
    assert (await db.execute(queries.update_job, {"id": 2, "enabled": 0})).rowcount == 1
    assert (await db.fetch_one(queries.get_job_by_id, {"id": 1}))["name"] == "a"
    assert await db.fetch_one(queries.get_job_by_id, {"id": 99}) is None
    assert [row["name"] for row in await db.fetch_all(queries.get_all_jobs, {"enabled": 1})] == [
        "a",
        "c",
        "d",
    ]
    assert await db.fetch_value(queries.count_jobs) == 4
    assert (await db.execute(queries.delete_job, {"id": 4})).rowcount == 1
    assert await db.execute_script(queries.create_notes) is None
    async with db.stream(queries.get_all_jobs, {"enabled": 1}) as rows:
        assert [row["name"] async for row in rows] == ["a", "c"]
    assert engine.outside("SELECT text FROM note") == [("first; with a semicolon",)]
    assert engine.committed() == ["a", "b", "c"]


async def test_queries_in_their_own_style(db: Any, queries: Any, engine: Engine) -> None:
    """aiosql's own way to call works for every operator, with its results."""
    assert await queries.insert_job(db, **NEW) == 1
    await queries.insert_jobs(db, [{"name": n, "cron_expr": "*"} for n in "bc"])
    assert await queries.update_job(db, id=2, enabled=0) == 1
    assert (await queries.get_job_by_id(db, id=1))["name"] == "a"
    assert await queries.get_job_by_id(db, id=99) is None
    assert [row["name"] async for row in queries.get_all_jobs(db, enabled=1)] == ["a", "c"]
    assert await queries.count_jobs(db) == 3
    assert await queries.delete_job(db, id=3) == 1
    await queries.create_notes(db)
    assert engine.outside("SELECT text FROM note") == [("first; with a semicolon",)]
    assert engine.committed() == ["a", "b"]


async def test_insert_returning_query(db: Any, queries: Any) -> None:
    """`<!` with RETURNING gives the id in both styles, and its row to the fetch methods."""
    assert (await db.execute(queries.insert_job_returning, {"name": "a"})).lastrowid == 1
    assert await queries.insert_job_returning(db, name="b") in (2, (2,))
    assert await db.fetch_value(queries.insert_job_returning, {"name": "c"}) == 3


async def test_queries_in_their_own_style_belong_to_the_transaction(db: Any, queries: Any, engine: Engine) -> None:
    """Called in aiosql's style inside a transaction, queries take part in it, scripts included."""
    with pytest.raises(LookupError):
        async with db.transaction():
            await queries.insert_job(db, **NEW)
            await queries.create_notes(db)
            await queries.insert_jobs(db, [{"name": "b", "cron_expr": "*"}])
            assert [row["name"] async for row in queries.get_all_jobs(db, enabled=1)] == ["a", "b"]
            assert engine.committed() == []
            raise LookupError
    assert engine.committed() == []
    assert engine.outside("SELECT count(*) FROM sqlite_master WHERE name = 'note'") == [(0,)]


async def test_a_query_left_half_read(db: Any, queries: Any) -> None:
    """Leaving aiosql's asynchronous loop early frees the connection."""
    await db.execute_many(queries.insert_jobs, [{"name": str(n), "cron_expr": "*"} for n in range(2000)])
    rows = queries.get_all_jobs(db, enabled=1)
    async for row in rows:
        assert row["name"] == "0"
        break
    await rows.aclose()
    await usable(db)


async def test_unknown_query_name(queries: Any) -> None:
    """A name that is not in the file is an AttributeError that says so."""
    with pytest.raises(AttributeError, match="no_such_query"):
        queries.no_such_query  # noqa: B018


async def test_query_with_wrong_parameters(db: Any, queries: Any) -> None:
    """A parameter that a query needs and does not get is the common error in both styles."""
    with pytest.raises(errors.QueryExecutionError):
        await db.fetch_one(queries.get_job_by_id, {})
    with pytest.raises(errors.QueryExecutionError):
        await queries.get_job_by_id(db)
    await usable(db)


# --- an operation that does not fit its method --------------------------------------------------------------


Call = Callable[[Any, Any], Any]


async def _stream(db: Any, query: Any, params: Any = None) -> None:
    async with db.stream(query, params) as rows:
        async for _ in rows:
            pass


MISMATCHES: list[Any] = [
    pytest.param(lambda db, q: db.fetch_all("INSERT INTO jobs (name) VALUES ('x')"), id="fetch_all-insert"),
    pytest.param(lambda db, q: db.fetch_one("UPDATE jobs SET name = 'x'"), id="fetch_one-update"),
    pytest.param(lambda db, q: db.fetch_value("DELETE FROM jobs"), id="fetch_value-delete"),
    pytest.param(lambda db, q: db.fetch_all("CREATE TABLE x (a)"), id="fetch_all-create"),
    pytest.param(lambda db, q: db.fetch_all("  -- SELECT\n/* RETURNING */ DELETE FROM jobs"), id="fetch_all-comments"),
    pytest.param(lambda db, q: db.fetch_all("DELETE FROM jobs WHERE name <> 'RETURNING'"), id="fetch_all-in-quotes"),
    pytest.param(
        lambda db, q: db.fetch_all("WITH n AS (SELECT 'x' AS name) INSERT INTO jobs (name) SELECT name FROM n"),
        id="fetch_all-with-insert",
    ),
    pytest.param(lambda db, q: db.fetch_all(q.insert_job, NEW), id="fetch_all-<!"),
    pytest.param(lambda db, q: db.fetch_one(q.update_job, {"id": 1, "enabled": 0}), id="fetch_one-!"),
    pytest.param(lambda db, q: db.fetch_value(q.delete_job, {"id": 1}), id="fetch_value-!"),
    pytest.param(lambda db, q: db.fetch_all(q.insert_jobs, {"name": "x", "cron_expr": "*"}), id="fetch_all-*!"),
    pytest.param(lambda db, q: db.fetch_all(q.create_notes), id="fetch_all-#"),
    pytest.param(lambda db, q: _stream(db, "DELETE FROM jobs"), id="stream-delete"),
    pytest.param(lambda db, q: _stream(db, q.delete_job, {"id": 1}), id="stream-!"),
    pytest.param(lambda db, q: db.execute_many(q.get_job_by_id, [{"id": 1}]), id="execute_many-^"),
    pytest.param(lambda db, q: db.execute_many("SELECT ?", [(1,)]), id="execute_many-select"),
]


@in_turn("call", MISMATCHES)
@in_turn("inside", [False, True], ids=["autocommit", "transaction"])
async def test_operation_that_does_not_fit(db: Any, queries: Any, engine: Engine, call: Call, inside: bool) -> None:
    """An operation that does not fit its method raises, and nothing of it is executed."""
    await add(db, "a")
    schema = "SELECT count(*) FROM sqlite_master"
    before = engine.outside(schema)
    if inside:
        async with db.transaction():
            with pytest.raises(errors.DatabaseError):
                await call(db, queries)
            assert [tuple(row) for row in await db.fetch_all("SELECT name, enabled FROM jobs")] == [("a", 1)]
    else:
        with pytest.raises(errors.DatabaseError):
            await call(db, queries)
    assert engine.outside("SELECT name, enabled FROM jobs") == [("a", 1)]
    assert engine.outside(schema) == before
    await usable(db)


@in_turn("method", ["execute", "fetch_all", "fetch_one", "fetch_value"])
async def test_several_statements_in_one(db: Any, engine: Engine, method: str) -> None:
    """A second statement behind the first raises, and neither is executed."""
    await add(db, "a")
    first = "INSERT INTO jobs (name) VALUES ('b') RETURNING 1" if method != "execute" else "DELETE FROM jobs"
    with pytest.raises(errors.QueryExecutionError):
        await getattr(db, method)(f"{first}; DELETE FROM jobs")
    assert engine.committed() == ["a"]


@in_turn("tail", [";", " ; ", ";\n-- that was all", ";/* end */"])
async def test_a_statement_may_end_in_a_semicolon(db: Any, tail: str) -> None:
    """What stands behind the last semicolon and is no statement does no harm."""
    await db.execute("INSERT INTO jobs (name) VALUES ('a')" + tail)
    assert await db.fetch_value("SELECT name FROM jobs" + tail) == "a"


@in_turn("sql", ["", "  ", "-- nothing", "SELEKT 1", "SELECT 1 FROM nowhere", "SELECT nothing"])
async def test_bad_sql(db: Any, sql: str) -> None:
    """SQL that is none raises the common error (or, empty, does nothing) and leaves the pool whole."""
    if sql.strip() and not sql.startswith("--"):
        with pytest.raises(errors.QueryExecutionError) as caught:
            await db.fetch_all(sql)
        assert caught.value.sql == sql
    else:
        with pytest.raises(errors.DatabaseError):
            await db.fetch_all(sql)
    await usable(db)


# --- run ----------------------------------------------------------------------------------------------------


async def test_run_in_one_transaction_on_another_thread(db: Any, engine: Engine) -> None:
    """`run` hands the driver's own connection to a function on the connection's thread, and commits."""
    import sqlite3

    def work(connection: sqlite3.Connection, first: str, second: str) -> tuple[int, bool, list[str]]:
        assert isinstance(connection, sqlite3.Connection)
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (first,))
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (second,))
        return threading.get_ident(), connection.in_transaction, engine.committed()

    thread, in_transaction, outside = await db.run(work, "a", "b")
    assert thread != threading.get_ident()
    assert in_transaction
    assert outside == []
    assert engine.committed() == ["a", "b"]


async def test_run_rolls_back(db: Any, engine: Engine) -> None:
    """An exception in the function undoes all of it and goes on as it is."""

    def work(connection: Any) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES ('a')")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await db.run(work)
    assert engine.committed() == []
    await usable(db)


async def test_run_maps_the_drivers_errors(db: Any, engine: Engine) -> None:
    """An error of the driver inside the function becomes the common one."""

    def work(connection: Any) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES ('a')")
        connection.execute("INSERT INTO jobs (name) VALUES ('a')")

    with pytest.raises(errors.IntegrityError) as caught:
        await db.run(work)
    assert caught.value.__cause__ is not None
    assert engine.committed() == []


async def test_run_readonly(db: Any, engine: Engine) -> None:
    """`readonly=True` reads, and refuses to write."""
    await add(db, "a")
    assert await db.run(lambda c: c.execute("SELECT count(*) FROM jobs").fetchone()[0], readonly=True) == 1
    with pytest.raises(errors.ReadOnlyTransactionError):
        await db.run(lambda c: c.execute("DELETE FROM jobs"), readonly=True)
    assert engine.committed() == ["a"]
    await usable(db)


async def test_run_inside_a_transaction(db: Any, engine: Engine) -> None:
    """Inside a transaction `run` belongs to it; failing, it undoes only itself."""

    def insert(connection: Any, name: str, fail: bool) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (name,))
        if fail:
            raise LookupError

    async with db.transaction():
        await add(db, "a")
        await db.run(insert, "b", False)
        with pytest.raises(LookupError):
            await db.run(insert, "c", True)
        assert await names(db) == ["a", "b"]
        assert engine.committed() == []
    assert engine.committed() == ["a", "b"]


@in_turn("ending", ["commit", "rollback"])
async def test_run_that_ends_its_transaction_itself(db: Any, engine: Engine, ending: str) -> None:
    """A function that commits or rolls back on the raw connection breaks nobody else's transaction."""

    def work(connection: Any) -> None:
        connection.execute("INSERT INTO item (value) VALUES ('run')")
        getattr(connection, ending)()

    try:
        await db.run(work)
    except errors.DatabaseError:
        pass
    with pytest.raises(LookupError):
        async with db.transaction():
            await add(db, "a")
            raise LookupError
    assert engine.committed() == []
    await usable(db)


async def test_in_transaction(db: Any) -> None:
    """`in_transaction` says whether this task is in one."""
    assert not db.in_transaction
    async with db.transaction():
        assert db.in_transaction
        async with db.transaction():
            assert db.in_transaction
        assert db.in_transaction
    assert not db.in_transaction


@pytest.mark.anyio
@pytest.mark.parametrize("script", [False, True], ids=["statement", "script"])
async def test_vacuum(db: Any, engine: Engine, script: bool) -> None:
    """VACUUM, which begins and commits by itself, runs outside transactions; inside one it is refused with the reason."""
    if engine.name != "sqlite3":
        pytest.skip("SQLite's own")
    run = db.execute_script if script else db.execute
    await add(db, "a")
    await run("VACUUM")
    target = engine.directory / "vacuumed.db"
    await run(f"VACUUM INTO '{target}'")
    assert target.stat().st_size > 0
    async with db.transaction():
        await add(db, "b")
        with pytest.raises(errors.QueryExecutionError, match="VACUUM from within a transaction"):
            await run("VACUUM")
        await add(db, "c")
    assert await names(db) == ["a", "b", "c"]
    async with db.transaction(readonly=True):
        with pytest.raises(errors.ReadOnlyTransactionError):
            await run(f"VACUUM INTO '{engine.directory / 'other.db'}'")
    assert not (engine.directory / "other.db").exists()
