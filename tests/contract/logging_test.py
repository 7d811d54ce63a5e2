"""Section 7 of the contract: what is logged, by whom, with which attributes, and what is kept out of it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import pytest

from database import logs, transactional
from tests.contract.support import SLOW_INSERT, SLOW_SELECT, Engine, add, errors, eventually, gather, held, names

STANDARD = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}
SECRET = "hunter2-the-secret"


def extras(record: logging.LogRecord) -> dict[str, Any]:
    """The attributes that the package has added."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


def attribute(record: logging.LogRecord, part: str) -> Any:
    """The added attribute whose name contains `part`."""
    found = [value for name, value in extras(record).items() if part in name]
    assert found, f"no {part!r} among {sorted(extras(record))}"
    return found[0]


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    """Captures all that the package logs, from DEBUG up; and puts the loggers back as they were."""
    for name in ("database", "database.query", "database.pool", "database.transaction"):
        caplog.set_level(logging.DEBUG, logger=name)


def of(caplog: pytest.LogCaptureFixture, sql: str) -> list[logging.LogRecord]:
    return [
        record for record in caplog.records if record.name == "database.query" and sql in str(extras(record).values())
    ]


@pytest.mark.anyio
async def test_one_record_a_statement(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each statement is one INFO record with SQL, parameters, rows and duration as attributes."""
    caplog.clear()
    await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": "a"})
    await db.fetch_all("SELECT name FROM jobs UNION ALL SELECT 'b'")
    (insert,) = of(caplog, "INSERT INTO jobs")
    (select,) = of(caplog, "UNION ALL")
    for record in (insert, select):
        assert record.levelno == logging.INFO
        assert 0 <= attribute(record, "duration") < 5000
        assert "param" in str(sorted(extras(record)))
    assert attribute(insert, "sql") == "INSERT INTO jobs (name) VALUES (:name)"
    assert attribute(insert, "row") == 1
    assert attribute(select, "row") == 2
    assert len([record for record in caplog.records if record.name == "database.query"]) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("shown", [False, True], ids=["redacted", "asked-for"])
async def test_parameters(make_db: Any, caplog: pytest.LogCaptureFixture, shown: bool) -> None:
    """Values are in the log only where they were asked for, not in errors either."""
    db = await make_db(logging={"parameters": "shown" if shown else "redacted"})
    caplog.clear()
    await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": SECRET})
    await db.fetch_all("SELECT * FROM jobs WHERE name = ?", (SECRET,))
    if not shown:
        with pytest.raises(errors.IntegrityError):
            await db.execute("INSERT INTO jobs (name) VALUES (?)", [SECRET])
        with pytest.raises(errors.IntegrityError):
            await db.execute_many("INSERT INTO jobs (name) VALUES (?)", [[SECRET]])
    everything = "\n".join(f"{record.getMessage()} {record.exc_text} {extras(record)}" for record in caplog.records)
    assert "INSERT INTO jobs" in everything
    assert (SECRET in everything) == shown


@pytest.mark.anyio
async def test_transaction_id(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Statements of one transaction carry one id, those of another another, single statements none."""
    caplog.clear()
    for _ in range(2):
        async with db.transaction():
            await db.execute("INSERT INTO item (value) VALUES ('inside')")
            await db.fetch_all("SELECT 'inside'")
    await db.fetch_all("SELECT 'outside'")
    ids = [attribute(record, "transaction") for record in of(caplog, "inside")]
    assert len(ids) == 4
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert None not in ids
    (outside,) = of(caplog, "outside")
    assert not attribute(outside, "transaction")


@pytest.mark.anyio
@pytest.mark.parametrize("inside", [False, True], ids=["autocommit", "transaction"])
async def test_slow_statements_are_warnings(make_db: Any, caplog: pytest.LogCaptureFixture, inside: bool) -> None:
    """A statement above slow_ms is a WARNING, one below is not."""
    db = await make_db(logging={"slow_ms": 20})
    caplog.clear()
    slow = SLOW_SELECT.replace("100000000", "400000")
    if inside:
        async with db.transaction():
            await db.fetch_value(slow)
    else:
        await db.fetch_value(slow)
    (record,) = of(caplog, "RECURSIVE")
    assert record.levelno == logging.WARNING
    for number in range(1000):  # on a busy machine, one of them is quick
        await db.fetch_value(f"SELECT 'quick {number}'")
        (record,) = of(caplog, f"quick {number}'")
        if record.levelno < logging.WARNING:
            break
    else:
        raise AssertionError("none of a thousand statements was quick")


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["autocommit", "transaction", "nested", "offload"])
async def test_an_error_is_logged_once(db: Any, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """However many levels an error passes on its way out, it is one ERROR record."""
    await add(db, "a")
    caplog.clear()

    @transactional
    async def once() -> None:
        await add(db, "a")

    @transactional
    async def nested() -> None:
        await once()

    calls = {
        "autocommit": lambda: add(db, "a"),
        "transaction": once,
        "nested": nested,
        "offload": lambda: transactional(offload=True)(add)(db, "a"),
    }
    with pytest.raises(errors.IntegrityError):
        await calls[kind]()
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == 1, [record.getMessage() for record in logged]
    assert logged[0].name.startswith("database.")


@pytest.mark.anyio
async def test_pool_and_transaction_log_likewise(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Exhaustion is on database.pool; begin, commit and rollback on
    database.transaction.
    """
    db = await make_db(pool_timeout=0.1, logging={"slow_transaction_ms": None})
    async with db.transaction():
        await add(db, "a")
    with pytest.raises(LookupError):
        async with db.transaction():
            await add(db, "b")
            raise LookupError
    transactions = [record.getMessage().lower() for record in caplog.records if record.name == "database.transaction"]
    assert any("commit" in text for text in transactions)
    assert any("roll" in text for text in transactions)
    caplog.clear()
    async with held(db):
        with pytest.raises(errors.ConnectionPoolExhaustedError):
            async with db.transaction():
                await names(db)
    exhausted = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in exhausted] == ["database.pool"]


@pytest.mark.anyio
async def test_console(make_db: Any, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """`logging.console: true` shows each statement once on the console; switched off again, it is silent."""
    for _ in range(2):
        db = await make_db(schema=not engine.path().exists(), logging={"console": True, "level": "INFO"})
    capsys.readouterr()
    await db.fetch_value("SELECT 'shown'")
    seen = "".join(capsys.readouterr())
    assert seen.count("SELECT 'shown'") == 1, seen
    db = await make_db(schema=False, logging={"console": False})
    await db.fetch_value("SELECT 'hidden'")
    assert "hidden" not in "".join(capsys.readouterr())


@pytest.mark.anyio
async def test_console_level(make_db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`level: WARNING` keeps ordinary statements off the console."""
    logging.getLogger("database.query").setLevel(logging.NOTSET)
    logging.getLogger("database").setLevel(logging.NOTSET)
    db = await make_db(logging={"console": True, "level": "WARNING"})
    await db.fetch_value("SELECT 'ordinary'")
    assert "ordinary" not in "".join(capsys.readouterr())


SILENT = """
import anyio
from database.{engine} import configure, get_db
from database import errors

async def main():
    db = get_db()
    await db.fetch_value("SELECT 1")
    try:
        await db.execute("SELEKT")
    except errors.QueryExecutionError:
        pass
    await db.begin()
    await db.execute("CREATE TABLE lost (a)")

configure({{"database": {{"sqlite": {{"path": {path!r}, "init_sql": "", "logging": {{"slow_ms": 0}}}}}}}})
anyio.run(main)
"""


def test_silent_until_configured(engine: Engine) -> None:
    """A program that has not configured logging gets no output, errors and warnings included."""
    done = subprocess.run(
        [sys.executable, "-c", SILENT.format(engine=engine.name, path=str(engine.path()))],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_forward_handler_is_an_empty_handler() -> None:
    """ForwardHandler is a logging handler that can be attached, swallows records, and is marked TODO."""
    import inspect

    handler = logs.ForwardHandler()
    assert isinstance(handler, logging.Handler)
    handler.handle(logging.LogRecord("database.query", logging.INFO, "", 0, "message", (), None))
    assert "TODO" in inspect.getsource(logs.ForwardHandler)


@pytest.mark.anyio
async def test_forward_handler_sees_the_records(db: Any) -> None:
    """A subclass that fills the handler in gets each record with its attributes."""
    seen: list[logging.LogRecord] = []

    class Shipper(logs.ForwardHandler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    handler = Shipper()
    logging.getLogger("database").addHandler(handler)
    try:
        await db.fetch_value("SELECT 'shipped'")
    finally:
        logging.getLogger("database").removeHandler(handler)
    assert [attribute(record, "sql") for record in seen if record.name == "database.query"] == ["SELECT 'shipped'"]


class Explosive(str):
    """A value whose description fails, though the database takes it."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("this repr is broken")


class Broken(logging.Handler):
    """A handler that breaks the promise of `logging` that `emit` never raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("this handler is broken")


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["handler", "repr"])
async def test_logging_never_breaks_a_statement(make_db: Any, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A handler or a repr that raises costs the record, and no statement, transaction or error."""
    db = await make_db(logging={"parameters": "shown", "slow_ms": 0, "slow_transaction_ms": 0})
    broken = Broken()
    if kind == "handler":
        logging.getLogger("database").addHandler(broken)
    capsys.readouterr()
    try:
        insert, parameters = "INSERT INTO jobs (name) VALUES (:name)", {"name": Explosive("a")}
        assert (await db.execute(insert, parameters)).rowcount == 1
        async with db.transaction():
            await db.execute(insert, {"name": Explosive("b")})
        with pytest.raises(errors.IntegrityError):
            await db.execute(insert, parameters)
        await transactional(offload=True)(add)(db, "c")
        assert await names(db) == ["a", "b", "c"]
    finally:
        logging.getLogger("database").removeHandler(broken)
    assert f"this {kind} is broken" in capsys.readouterr().err


@pytest.mark.anyio
async def test_structured_attributes(db: Any, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Records carry what a shipper asks for, as values and not as text; those of errors likewise."""
    caplog.clear()
    await add(db, "a")
    with pytest.raises(errors.IntegrityError):
        await add(db, "a")
    done, error, failed = caplog.records
    of_statements = {
        "database": "default", "sql": "INSERT INTO jobs (name) VALUES (:name)", "operation": "INSERT",
        "parameters": "<name>", "slow": False, "transaction": None,
    }  # fmt: skip
    for record in (done, failed):
        found = extras(record)
        assert found["worker"] in engine.writers
        assert of_statements.items() <= found.items()
        assert found["duration"] > 0
        assert found["waited"] > 0
    assert (extras(done)["rows"], extras(done)["error"]) == (1, None)
    assert extras(failed)["error"] == "IntegrityError"
    assert error.levelno == logging.ERROR
    code, code_name = engine.code("SQLITE_CONSTRAINT_UNIQUE")
    assert extras(error) == {
        "database": "default", "error": "IntegrityError", "sql": of_statements["sql"], "parameters": "<name>",
        "code": code, "code_name": code_name,
    }  # fmt: skip


@pytest.mark.anyio
async def test_how_long_it_took(db: Any, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever a statement runs, and also where it fails, its record says how long that took, and no longer than it did."""

    async def both() -> None:
        await db.execute("INSERT INTO item (id, value) VALUES (1, 'timed')")
        with pytest.raises(errors.IntegrityError):
            await db.execute("INSERT INTO item (id, value) VALUES (1, 'timed')")
        await db.execute("DELETE FROM item")

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute("INSERT INTO item (id, value) VALUES (1, 'timed')")
        await db.execute("DELETE FROM item")

    async def together() -> None:
        await gather(*[lambda n=n: db.execute("INSERT INTO item VALUES (?, 'timed')", (n,)) for n in range(10)])
        await db.execute("DELETE FROM item")

    for run in (both, transactional(together), offloaded, together):
        caplog.clear()
        began = time.perf_counter()
        await run()
        spent = time.perf_counter() - began
        records = [record for record in of(caplog, "timed") if record.levelno == logging.INFO]
        assert records
        assert all(0 < extras(record)["duration"] < spent for record in records), run


def slow_ones(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [each for each in caplog.records if each.name == "database.transaction" and each.levelno == logging.WARNING]


@pytest.mark.anyio
async def test_who_held_the_writer(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """While a transaction keeps others waiting, and at its end, a warning names who, where and for how long."""
    db = await make_db(logging={"slow_transaction_ms": 30})
    caplog.clear()
    async with anyio.create_task_group() as group, held(db) as release:
        group.start_soon(add, db, "waits")
        await eventually(lambda: slow_ones(caplog), "a warning while the writer is held")
        (during,) = slow_ones(caplog)
        release.set()
    await eventually(lambda: len(slow_ones(caplog)) == 2, "a warning at the end")
    after = slow_ones(caplog)[1]
    for record in (during, after):
        assert "the writer" in record.getMessage()
        assert "hold_a_connection" in record.getMessage()
        assert "hold_a_connection" in extras(record)["holder"]
        assert "support.py:" in extras(record)["holder"]
        assert extras(record)["duration"] >= 0.03
        assert extras(record)["readonly"] is False
    assert (extras(during)["outcome"], extras(during)["waiting"]) == ("open", 1)
    assert extras(after)["outcome"] == "committed"
    assert extras(after)["duration"] >= extras(during)["duration"]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["run", "offload", "statement"])
async def test_which_unit_of_work_held_the_writer(make_db: Any, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """What keeps the writer without a transaction of its own, on the connection's thread, is named as well, once."""
    db = await make_db(logging={"slow_transaction_ms": 20})
    release = threading.Event()

    def function_that_takes_long(_connection: Any = None) -> None:
        release.wait(5)

    @transactional(offload=True)
    async def offloaded_that_takes_long() -> None:
        await add(db, "a")
        function_that_takes_long()

    async def write_until_released() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await db.execute(SLOW_INSERT)

    scopes: list[anyio.CancelScope] = []
    calls: dict[str, Any] = {
        "run": lambda: db.run(function_that_takes_long),
        "offload": offloaded_that_takes_long,
        "statement": write_until_released,
    }
    caplog.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(calls[kind])
        await eventually(lambda: db.stats().writer_in_use)
        group.start_soon(add, db, "waits")
        await eventually(lambda: slow_ones(caplog), "a warning while the writer is held")
        release.set()
        for scope in scopes:
            scope.cancel()
    (record,) = slow_ones(caplog)
    named = {"run": "function_that_takes_long", "offload": "offloaded_that_takes_long", "statement": SLOW_INSERT[:200]}
    assert named[kind] in record.getMessage()
    assert (extras(record)["transaction"], extras(record)["waiting"]) == (None, 1)
    assert extras(record)["duration"] >= 0.02


@pytest.mark.anyio
async def test_who_held_the_readers(make_db: Any, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Likewise of read-only transactions, when no reader is left; each of them is named once."""
    if engine.replica:
        pytest.skip("single reads do not wait for the replicas' connections")
    db = await make_db(pool_size=2, logging={"slow_transaction_ms": 30})
    caplog.clear()
    async with anyio.create_task_group() as group, held(db, readonly=True, count=2) as release:
        group.start_soon(names, db)
        async with anyio.create_task_group() as more:
            async with held(db):  # its first statement is the writer's: nobody waits for that
                await eventually(lambda: len(slow_ones(caplog)) >= 2, "a warning for each reader")
                more.cancel_scope.cancel()
        release.set()
    assert [extras(record)["readonly"] for record in slow_ones(caplog) if extras(record)["outcome"] == "open"] == [
        True,
        True,
    ]


@pytest.mark.anyio
async def test_slow_transactions_can_be_left_alone(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Below the limit, or with none set, a transaction is no warning."""
    for limit in (None, 60_000):
        db = await make_db(schema=limit is None, logging={"slow_transaction_ms": limit})
        async with db.transaction():
            await db.fetch_value("SELECT 1")
    assert slow_ones(caplog) == []


class Blocking(logging.Handler):
    """A handler that waits for a network, say; remembers on which threads it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.seen: list[tuple[str, int]] = []

    def handle(self, record: logging.LogRecord) -> bool:  # not `emit`: that is called with a lock held
        self.seen.append((record.name, threading.get_ident()))
        if record.name != "database.query":
            self.go_on.wait(5)
        return True

    def count(self, name: str) -> int:
        return [each for each, _ in self.seen].count(name)


@pytest.mark.anyio
async def test_no_handler_ever_runs_on_the_event_loop(make_db: Any) -> None:
    """Statements, errors, exhaustion, holders, transactions left open, failed callbacks: whatever is logged, and however
    long a handler takes, the event loop goes on.
    """
    db = await make_db(pool_timeout=0.5, logging={"slow_transaction_ms": 10, "slow_ms": 0})
    handler = Blocking()

    async def exhausted() -> None:
        with pytest.raises(errors.ConnectionPoolExhaustedError):
            await add(db, "exhausted")

    async def leave_open() -> None:
        await db.begin()
        await add(db, "left open")

    async def fail() -> None:
        raise LookupError

    try:
        async with anyio.create_task_group() as group:
            async with held(db):
                logging.getLogger("database").addHandler(handler)
                group.start_soon(exhausted)
                await eventually(lambda: handler.count("database.transaction"), "the holder, while its handler waits")
                await eventually(lambda: handler.count("database.pool"), "the exhaustion, while its handler waits")
                handler.go_on.set()
            group.start_soon(leave_open)
        await eventually(lambda: handler.count("database.transaction") >= 3, "the transaction left open")
        before = handler.count("database.transaction")
        db.on_commit(fail)
        await eventually(lambda: handler.count("database.transaction") > before, "the failed callback")
        with pytest.raises(errors.QueryExecutionError):
            await db.execute("SELEKT")
    finally:
        handler.go_on.set()
        logging.getLogger("database").removeHandler(handler)
    assert {"database.query", "database.pool", "database.transaction"} <= {name for name, _ in handler.seen}
    assert threading.get_ident() not in {thread for _, thread in handler.seen}
