"""Section 6 of the contract: one hierarchy, what each error carries, and what it keeps to itself."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from tests.contract.support import Engine, add, errors, in_turn, names, usable

PARENTS: dict[str, tuple[type[BaseException], ...]] = {
    "DatabaseError": (Exception,),
    "ConfigurationError": (errors.DatabaseError,),
    "ConnectionPoolExhaustedError": (errors.DatabaseError, TimeoutError),
    "ConnectionFailedError": (errors.DatabaseError,),
    "PoolClosedError": (errors.DatabaseError,),
    "MigrationError": (errors.DatabaseError,),
    "TransactionError": (errors.DatabaseError,),
    "ReadOnlyTransactionError": (errors.TransactionError,),
    "TransactionTimeoutError": (errors.TransactionError, TimeoutError),
    "QueryExecutionError": (errors.DatabaseError,),
    "IntegrityError": (errors.QueryExecutionError,),
    "DatabaseBusyError": (errors.QueryExecutionError,),
    "DatabaseCorruptError": (errors.QueryExecutionError,),
}


@pytest.mark.parametrize("name", PARENTS)
def test_hierarchy(name: str) -> None:
    """Each class stands where the contract puts it."""
    assert getattr(errors, name).__bases__ == PARENTS[name]
    assert set(errors.__all__) == set(PARENTS)


SECRET = "hunter2-the-secret"


async def _violate(db: Any) -> errors.IntegrityError:
    await add(db, SECRET)
    with pytest.raises(errors.IntegrityError) as caught:
        await add(db, SECRET)
    return caught.value


@pytest.mark.anyio
async def test_what_a_query_error_carries(db: Any, engine: Engine) -> None:
    """SQL, parameters, code and its name as attributes; the driver's own error as the cause."""
    error = await _violate(db)
    assert error.sql == "INSERT INTO jobs (name) VALUES (:name)"
    assert error.parameters == {"name": SECRET}
    assert (error.code, error.code_name) == engine.code("SQLITE_CONSTRAINT_UNIQUE")
    assert isinstance(error.__cause__, engine.driver_error)


@pytest.mark.anyio
async def test_a_query_called_in_aiosqls_way_carries_the_same(
    db: Any, queries: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error has the parameters that it was called with, and the log their names."""
    caplog.set_level("INFO", logger="database.query")
    await queries.insert_job(db, name="a", cron_expr="", handler="")
    with pytest.raises(errors.IntegrityError) as caught:
        await queries.insert_job(db, name="a", cron_expr="", handler="")
    assert caught.value.parameters == {"name": "a", "cron_expr": "", "handler": ""}
    assert "INSERT" in str(caught.value.sql)
    for record in caplog.records:
        assert record.parameters == "<name, cron_expr, handler>"  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_parameters_are_redacted(db: Any) -> None:
    """The message shows the SQL and names of parameters, no value."""
    error = await _violate(db)
    assert "INSERT INTO jobs" in str(error)
    assert "UNIQUE" in str(error).upper()
    assert "name" in str(error)
    for text in (str(error), repr(error), str(error.__cause__)):
        assert SECRET not in text


@pytest.mark.anyio
@pytest.mark.any_loop
async def test_text_that_cannot_be_encoded_is_not_shown(db: Any) -> None:
    """Half of a surrogate pair is named with its place; the text around it is in no message and no cause."""
    insert, row = "INSERT INTO jobs (name) VALUES (:name)", {"name": f"{SECRET}\ud800"}
    for call in (db.execute(insert, row), db.execute_many(insert, [row]), db.fetch_all("SELECT :name", row)):
        with pytest.raises(errors.QueryExecutionError, match=f"position {len(SECRET)}") as caught:
            await call
        error: BaseException | None = caught.value
        while error is not None:
            assert SECRET not in f"{error} {error!r}".replace(repr(row), "")
            error = error.__cause__ or error.__context__


@pytest.mark.anyio
@in_turn("call", ["execute", "execute_many", "offload", "transaction", "run", "fetch", "batch"])
async def test_the_same_on_every_path(db: Any, engine: Engine, call: str) -> None:
    """Every way to write raises the same class with code and cause, and without values in its text."""
    from database import transactional

    await add(db, SECRET)
    sql, params = "INSERT INTO jobs (name) VALUES (:name)", {"name": SECRET}

    async def transaction() -> None:
        async with db.transaction():
            await db.execute(sql, params)

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(sql, params)

    calls = {
        "execute": lambda: db.execute(sql, params),
        "execute_many": lambda: db.execute_many(sql, [params]),
        "offload": lambda: transactional(offload=True)(add)(db, SECRET),
        "transaction": transaction,
        "run": lambda: db.run(lambda connection: connection.execute(sql, params)),
        "fetch": lambda: db.fetch_all(sql + " RETURNING id", params),
        "batch": batch,
    }
    with pytest.raises(errors.IntegrityError) as caught:
        await calls[call]()
    assert (caught.value.code, caught.value.code_name) == engine.code("SQLITE_CONSTRAINT_UNIQUE")
    assert isinstance(caught.value.__cause__, engine.driver_error)
    assert SECRET not in str(caught.value)
    if call != "run":
        assert caught.value.sql is not None
        assert caught.value.sql.startswith(sql)
    await usable(db)


@pytest.mark.anyio
@in_turn("call", ["fetch_all", "execute", "execute_script", "stream", "run"])
async def test_an_error_that_is_kept_keeps_nothing_open(db: Any, engine: Engine, call: str) -> None:
    """An error that is kept (by a log, a debugger) holds no connection: after close the files are closed."""
    bad = "SELECT abs(-9223372036854775808)"

    async def stream() -> None:
        async with db.stream(bad) as rows:
            [row async for row in rows]

    calls = {
        "fetch_all": lambda: db.fetch_all(bad),
        "execute": lambda: add(db, "a"),
        "execute_script": lambda: db.execute_script(f"CREATE TABLE t AS {bad}"),
        "stream": stream,
        "run": lambda: db.run(lambda connection: connection.execute(bad).fetchall()),
    }
    await add(db, "a")
    with pytest.raises(errors.QueryExecutionError) as kept:
        await calls[call]()
    await db.close()
    assert engine.open_files() == []
    assert kept.value.__cause__ is not None


@pytest.mark.anyio
async def test_errors_can_be_pickled(db: Any) -> None:
    """A query error crosses process borders with all that it carries."""
    error = await _violate(db)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.IntegrityError
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("name", PARENTS)
def test_every_class_can_be_pickled(name: str) -> None:
    """Each error survives a pickle."""
    kind = getattr(errors, name)
    error = kind("path", "reason") if kind is errors.ConnectionFailedError else kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))


CONSTRAINTS = [
    ("INSERT INTO jobs (name) VALUES (NULL)", "SQLITE_CONSTRAINT_NOTNULL"),
    ("INSERT INTO item (id) VALUES (1), (1)", "SQLITE_CONSTRAINT_PRIMARYKEY"),
    ("INSERT INTO strict_child VALUES (7)", "SQLITE_CONSTRAINT_FOREIGNKEY"),
    ("INSERT INTO checked VALUES (-1)", "SQLITE_CONSTRAINT_CHECK"),
    ("INSERT INTO child (parent_id) VALUES (99)", "SQLITE_CONSTRAINT_FOREIGNKEY"),
]


@pytest.mark.anyio
@in_turn("sql, code_name", CONSTRAINTS, ids=[code for _, code in CONSTRAINTS[:-1]] + ["deferred"])
async def test_constraints(db: Any, engine: Engine, sql: str, code_name: str) -> None:
    """Every kind of constraint is an IntegrityError that says which, foreign keys included."""
    await db.execute_script(
        "CREATE TABLE strict_child (id INTEGER REFERENCES parent (id));CREATE TABLE checked (n INTEGER CHECK (n > 0));"
    )
    with pytest.raises(errors.IntegrityError) as caught:
        await db.execute(sql)
    assert (caught.value.code, caught.value.code_name) == engine.code(code_name)
    await usable(db)


@pytest.mark.anyio
async def test_one_handler_for_all(db: Any) -> None:
    """`except DatabaseError` around business code catches what the package raises."""
    caught = []
    for sql, params in (("SELEKT", None), ("SELECT ?", ()), ("INSERT INTO nowhere VALUES (1)", None)):
        try:
            await db.fetch_all(sql, params)
        except errors.DatabaseError as error:
            caught.append(error)
    assert len(caught) == 3


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["autocommit", "transaction", "offload", "run"])
async def test_busy(make_db: Any, engine: Engine, kind: str) -> None:
    """Another process's lock is waited for as long as busy_timeout says, then it is a DatabaseBusyError."""
    from database import transactional

    db = await make_db(busy_timeout=150)

    async def transaction() -> None:
        async with db.transaction():
            await add(db, "a")

    calls = {
        "autocommit": lambda: add(db, "a"),
        "transaction": transaction,
        "offload": lambda: transactional(offload=True)(add)(db, "a"),
        "run": lambda: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('a')")),
    }
    with engine.locked():
        start = time.monotonic()
        with pytest.raises(errors.DatabaseBusyError) as caught:
            await calls[kind]()
        assert 0.12 < time.monotonic() - start < 60
        assert str(caught.value.code_name).startswith(engine.code("SQLITE_BUSY")[1])
        assert await names(db) == []
    await calls[kind]()
    assert engine.committed() == ["a"]


@pytest.mark.anyio
async def test_a_lock_that_is_let_go_in_time(make_db: Any, engine: Engine) -> None:
    """A lock that is released within busy_timeout is no error, only a wait."""
    import anyio

    db = await make_db(busy_timeout=5000)
    with engine.locked() as other:

        async def let_go() -> None:
            await anyio.sleep(0.1)
            other.rollback()

        async with anyio.create_task_group() as group:
            group.start_soon(let_go)
            await add(db, "a")
    assert engine.committed() == ["a"]


# --- databases that cannot be opened ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_directory_as_path(make_db: Any, tmp_path: Path) -> None:
    """A path that is a directory cannot be opened; the error names path and reason."""
    (tmp_path / "folder").mkdir()
    db = await make_db(schema=False, path=str(tmp_path / "folder"))
    for _ in range(2):
        with pytest.raises(errors.ConnectionFailedError) as caught:
            await db.fetch_value("SELECT 1")
        assert caught.value.path == str(tmp_path / "folder")
        assert caught.value.reason
        assert "folder" in str(caught.value)


@pytest.mark.anyio
async def test_a_file_as_parent_folder(make_db: Any, tmp_path: Path) -> None:
    """Parent folders that cannot be created are the same error."""
    (tmp_path / "file").write_text("")
    db = await make_db(schema=False, path=str(tmp_path / "file" / "x.db"))
    with pytest.raises(errors.ConnectionFailedError):
        await db.execute("SELECT 1")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content", [b"this is no database at all, but it is long enough " * 50, b"SQLite format 3\0" * 99]
)
async def test_a_file_that_is_no_database(make_db: Any, tmp_path: Path, content: bytes) -> None:
    """A file that is no database says so, to every caller, and is left as it was."""
    path = tmp_path / "none.db"
    path.write_bytes(content)
    db = await make_db(schema=False, path=str(path))
    for call in (db.fetch_value, db.execute):
        with pytest.raises((errors.DatabaseCorruptError, errors.ConnectionFailedError)) as caught:
            await call("SELECT 1 FROM sqlite_master")
        assert caught.value.__cause__ is not None
    with pytest.raises((errors.DatabaseCorruptError, errors.ConnectionFailedError)):
        async with db.transaction():
            await add(db, "a")
    assert path.read_bytes() == content


@pytest.mark.anyio
async def test_it_can_be_opened_later(make_db: Any, engine: Engine) -> None:
    """What could not be opened is tried again at the next use; the reason may be gone by then."""
    path = engine.directory / "later.db"
    path.mkdir()
    db = await make_db(schema=False, path=str(path))
    with pytest.raises(errors.ConnectionFailedError):
        await db.fetch_value("SELECT 1")
    path.rmdir()
    await db.execute_script(engine.schema)
    await usable(db)


@pytest.mark.anyio
async def test_a_scribbled_file(make_db: Any, engine: Engine) -> None:
    """A page overwritten with garbage is a DatabaseCorruptError for those who read it; the pool lives on."""
    db = await make_db(cache_size=0)
    await db.execute_many("INSERT INTO jobs (name) VALUES (?)", [(f"{n:05}" * 20,) for n in range(2000)])
    await db.close()
    path = engine.path()
    content = bytearray(path.read_bytes())
    content[4096 * 6 :] = b"\xa5" * (len(content) - 4096 * 6)
    path.write_bytes(bytes(content))
    with pytest.raises(errors.DatabaseCorruptError) as caught:
        await db.fetch_all("SELECT * FROM jobs ORDER BY name")
    assert str(caught.value.code_name).startswith("SQLITE_CORRUPT")
    assert await db.fetch_value("SELECT 1") == 1
