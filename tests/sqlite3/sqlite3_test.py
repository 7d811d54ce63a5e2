"""The user's own five groups of cases, on `database.sqlite3` as business code imports it.

1. the pool; 2. transactions; 3. the pool's limit: wait, then time out; 4. read-only; 5. logging.

`tests/contract/` holds all the rest of what is promised.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict, dataclass
from typing import Any

import anyio
import pytest

from database import errors
from database.sqlite3 import close_all, get_db, transactional, transactional_readonly
from tests.contract.support import HANGING, Engine, gather, held, idle, in_turn, waiting

pytestmark = pytest.mark.anyio


# --- business code, as the user writes it -------------------------------------------------------------------


@dataclass
class JobInput:
    name: str
    cron_expr: str = "*/5 * * * *"
    handler: str = "echo"

    def dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class JobOutput:
    id: int


@dataclass
class JobEntity:
    id: int
    name: str
    cron_expr: str
    handler: str
    enabled: int


INSERT_JOB = "INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler)"
SELECT_JOBS = "SELECT * FROM jobs ORDER BY id"


@transactional
async def create_job(job_data: JobInput) -> JobOutput:
    db = get_db()
    result = await db.execute(INSERT_JOB, job_data.dict())
    return JobOutput(id=result.lastrowid)


@transactional
async def create_jobs(*jobs: JobInput) -> list[JobOutput]:
    return [await create_job(job) for job in jobs]


@transactional_readonly
async def get_job_list() -> list[JobEntity]:
    db = get_db()
    rows = await db.fetch_all(SELECT_JOBS)
    return [JobEntity(**row) for row in rows]


async def job_names() -> list[str]:
    return [job.name for job in await get_job_list()]


# --- 1. the pool --------------------------------------------------------------------------------------------


async def test_pool_is_one_per_name(db: Any) -> None:
    """`get_db()` is a singleton, and every caller works on the same database."""
    assert get_db() is get_db() is db
    await create_job(JobInput("a"))
    assert await gather(job_names, job_names, job_names) == [["a"]] * 3


async def test_pool_opens_at_first_use_and_closes(make_db: Any, engine: Engine) -> None:
    """Nothing is open before the first statement, nothing after `close_all()`, and the next statement opens
    again.
    """
    db = await make_db(schema=False)
    assert engine.open_files() == []
    await db.execute_script(engine.schema)
    assert engine.open_files() != []
    await close_all()
    assert engine.open_files() == []
    assert await job_names() == []


async def test_pool_applies_its_settings_to_each_connection(make_db: Any) -> None:
    """Every PRAGMA of the settings is in force on all readers and on the writer."""
    db = await make_db(synchronous="FULL", cache_size=-4321, foreign_keys=True, journal_mode="WAL")

    def pragmas(connection: Any) -> list[Any]:
        wanted = ("journal_mode", "synchronous", "cache_size", "foreign_keys")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in wanted]

    expected = ["wal", 2, -4321, 1]
    assert await db.run(pragmas) == expected
    async with held(db, readonly=True):
        assert await db.run(pragmas, readonly=True) == expected


async def test_pool_works_off_the_event_loops_thread(db: Any) -> None:
    """Each connection lives on a thread of its own, which is not the event loop's."""
    writer = await db.run(lambda connection: threading.get_ident())
    assert writer != threading.get_ident()
    assert await db.run(lambda connection: threading.get_ident()) == writer
    assert await db.run(lambda connection: threading.get_ident(), readonly=True) != writer


async def test_pool_serves_many_tasks_at_once(db: Any) -> None:
    """A hundred tasks that read and write at once all get their answers from two readers and a writer."""
    results = await gather(
        *[lambda n=n: create_job(JobInput(f"{n:03}")) for n in range(50)],
        *[get_job_list] * 50,
    )
    assert sorted(result.id for result in results[:50]) == list(range(1, 51))
    assert len(await job_names()) == 50
    stats = db.stats()
    assert (stats.readers_in_use, bool(stats.writer_in_use), stats.waiting) == (0, False, 0)
    assert stats.readers_open <= 2


# --- 2. transactions ----------------------------------------------------------------------------------------


async def test_transaction_commits(db: Any, engine: Engine) -> None:
    """What a decorated function has done is permanent when it returns."""
    assert await create_job(JobInput("a")) == JobOutput(id=1)
    assert engine.committed() == ["a"]


async def test_transaction_rolls_back_on_an_exception(db: Any, engine: Engine) -> None:
    """The third job cannot be created, so the first two are not there either; the exception reaches the
    caller.
    """
    with pytest.raises(errors.IntegrityError):
        await create_jobs(JobInput("a"), JobInput("b"), JobInput("a"))
    assert engine.committed() == []


async def test_transaction_by_hand(db: Any, engine: Engine) -> None:
    """begin, flush, commit and rollback work without a decorator, as in the user's batch process."""
    await db.begin()
    await db.execute(INSERT_JOB, JobInput("a"))
    await db.flush()
    assert engine.committed() == []
    await db.commit()
    await db.begin()
    await db.execute(INSERT_JOB, JobInput("b"))
    await db.rollback()
    assert engine.committed() == ["a"]


async def test_transaction_by_hand_inside_a_decorated_function(db: Any, engine: Engine) -> None:
    """`commit()` inside makes permanent what was done so far; the exception undoes only what came after."""

    @transactional
    async def import_jobs() -> None:
        await create_job(JobInput("a"))
        await db.commit()
        await create_job(JobInput("b"))
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        await import_jobs()
    assert engine.committed() == ["a"]


async def test_transactions_of_several_tasks(db: Any, engine: Engine) -> None:
    """Transactions of tasks that run at once do not mix: each is there completely or not at all."""
    results = await gather(
        *[lambda n=n: create_jobs(JobInput(f"{n}a"), JobInput(f"{n}b" if n % 2 else f"{n}a")) for n in range(10)]
    )
    assert [isinstance(result, errors.IntegrityError) for result in results] == [True, False] * 5
    assert engine.committed() == sorted(f"{n}{part}" for n in range(1, 10, 2) for part in "ab")


async def test_transaction_on_two_databases(audit: Any, engine: Engine) -> None:
    """A transaction on a tuple of databases is undone on each when the function fails."""

    @transactional(db=("default", "audit"))
    async def create(name: str) -> None:
        await get_db().execute(INSERT_JOB, JobInput(name))
        await get_db("audit").execute(INSERT_JOB, JobInput(f"created {name}"))
        if name == "bad":
            raise ValueError(name)

    await create("good")
    with pytest.raises(ValueError):
        await create("bad")
    assert engine.committed() == ["good"]
    assert engine.committed("audit") == ["created good"]


# --- 3. the pool's limit ------------------------------------------------------------------------------------


async def test_limit_waits_for_a_connection(db: Any) -> None:
    """With both readers taken, a third read-only transaction waits, and goes on as soon as one is free."""
    done = anyio.Event()

    async def third() -> None:
        await get_job_list()
        done.set()

    async with anyio.create_task_group() as group, held(db, readonly=True, count=2) as release:
        group.start_soon(third)
        await waiting(db, 1)
        assert not done.is_set()
        release.set()
        with anyio.fail_after(HANGING):
            await done.wait()
    await idle(db)


async def test_limit_times_out(make_db: Any) -> None:
    """When no reader becomes free, the third gets ConnectionPoolExhaustedError after pool_timeout; then all
    is well.
    """
    db = await make_db(pool_timeout=0.15)
    async with held(db, readonly=True, count=2):
        with anyio.fail_after(HANGING), pytest.raises(errors.ConnectionPoolExhaustedError) as caught:
            await get_job_list()
        assert "0.15" in str(caught.value)
    assert await get_job_list() == []
    assert db.stats().timeouts_total == 1


async def test_limit_of_writers(make_db: Any) -> None:
    """The one writer is a limit too: a second one waits, then times out, and nothing of it was written."""
    db = await make_db(pool_timeout=0.15)
    async with held(db):
        with anyio.fail_after(HANGING), pytest.raises(errors.ConnectionPoolExhaustedError):
            await create_job(JobInput("late"))
        assert await job_names() == []
    await create_job(JobInput("a"))
    assert await job_names() == ["a"]


# --- 4. read-only -------------------------------------------------------------------------------------------


async def test_readonly_reads(db: Any) -> None:
    """A read-only function reads what is committed."""
    await create_jobs(JobInput("a"), JobInput("b"))
    assert await get_job_list() == [
        JobEntity(1, "a", "*/5 * * * *", "echo", 1),
        JobEntity(2, "b", "*/5 * * * *", "echo", 1),
    ]


@in_turn(
    "sql",
    [
        "INSERT INTO jobs (name) VALUES ('x')",
        "UPDATE jobs SET name = 'x'",
        "DELETE FROM jobs",
        "DROP TABLE jobs",
        "CREATE TABLE x (a)",
    ],
)
async def test_readonly_refuses_writes(db: Any, engine: Engine, sql: str) -> None:
    """A write in a read-only function raises ReadOnlyTransactionError and changes nothing."""

    @transactional_readonly
    async def look() -> None:
        await get_db().execute(sql)

    await create_job(JobInput("a"))
    with pytest.raises(errors.ReadOnlyTransactionError):
        await look()
    assert engine.committed() == ["a"]


async def test_readonly_looks_at_the_schema(db: Any) -> None:
    """Table-valued pragmas work on readers, although SQLite declares their columns to itself as if it wrote; the schema
    cannot be changed that way.
    """
    sql = "SELECT name FROM pragma_table_info(?) WHERE pk"
    assert await db.fetch_value(sql, ("jobs",)) == "id"
    async with db.transaction(readonly=True):
        assert await db.fetch_value(sql, ("jobs",)) == "id"
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.execute("UPDATE sqlite_master SET sql = ''")
    with pytest.raises(errors.DatabaseError):
        await db.run(lambda raw: raw.execute("UPDATE sqlite_master SET sql = ''"), readonly=True)
    assert await db.fetch_value(sql, ("jobs",)) == "id"


async def test_readonly_cannot_call_what_writes(db: Any, engine: Engine) -> None:
    """A read-only function that calls a transactional one gets a TransactionError."""

    @transactional_readonly
    async def look() -> None:
        await create_job(JobInput("x"))

    with pytest.raises(errors.TransactionError):
        await look()
    assert engine.committed() == []


async def test_readonly_sees_one_state(db: Any) -> None:
    """What others commit while a read-only function runs does not show up in it."""

    @transactional_readonly
    async def look() -> tuple[int, int]:
        before = len(await get_job_list())
        with db.detached():
            await create_job(JobInput("meanwhile"))
        return before, len(await get_job_list())

    assert await look() == (0, 0)
    assert await job_names() == ["meanwhile"]


# --- 5. logging ---------------------------------------------------------------------------------------------


async def test_logging_shows_sql_and_result(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each statement is logged on `database.query`, with its SQL and the number of its rows, without
    values.
    """
    caplog.set_level(logging.INFO, logger="database.query")
    caplog.clear()
    await create_job(JobInput("secret-name"))
    await get_job_list()
    texts = [record.getMessage() for record in caplog.records if record.name == "database.query"]
    assert sum("INSERT INTO jobs" in text for text in texts) == 1
    assert sum("SELECT * FROM jobs" in text for text in texts) == 1
    assert "secret-name" not in caplog.text


async def test_logging_on_the_console(make_db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`logging.console: true` prints the statements, and the values where `parameters: shown` asks for
    them.
    """
    await make_db(logging={"console": True, "level": "INFO", "parameters": "shown"})
    await create_job(JobInput("seen-on-the-console"))
    out = "".join(capsys.readouterr())
    assert "INSERT INTO jobs" in out
    assert "seen-on-the-console" in out


async def test_logging_of_an_error(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error is logged once, though it goes through two transactional functions, and is raised."""
    await create_job(JobInput("a"))
    caplog.clear()
    with pytest.raises(errors.IntegrityError):
        await create_jobs(JobInput("b"), JobInput("a"))
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
