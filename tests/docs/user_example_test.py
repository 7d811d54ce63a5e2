"""The example and the query file that the package was asked for, as they were written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from database import errors
from database.sqlite3 import get_db, load_queries, transactional, transactional_readonly

pytestmark = pytest.mark.anyio

QUERIES = """
-- name: get_job_by_id^
SELECT * FROM jobs WHERE id = :id;
-- name: get_all_jobs
SELECT * FROM jobs WHERE enabled = :enabled;
-- name: insert_job<!
INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler);
-- name: update_job!
UPDATE jobs SET enabled = :enabled WHERE id = :id;
-- name: delete_job!
DELETE FROM jobs WHERE id = :id;
"""
QUERIES_OF_THE_EXAMPLE = """
-- name: select_jobs
SELECT * FROM jobs ORDER BY id;
-- name: update_item!
UPDATE jobs SET handler = :handler WHERE id = :id;
"""


@dataclass
class JobInput:
    name: str
    cron_expr: str = "@daily"
    handler: str = "echo"

    def dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class JobOutput:
    id: int | None


@dataclass
class JobEntity:
    id: int
    name: str
    cron_expr: str
    handler: str
    enabled: int
    created_at: str
    updated_at: str


queries: Any = None
items: list[dict[str, Any]] = []
should_commit_batch = False


# As written, from here ...


@transactional
async def create_job(job_data: JobInput) -> JobOutput:
    db = get_db()
    result = await db.execute(queries.insert_job, job_data.dict())
    return JobOutput(id=result.lastrowid)


@transactional_readonly
async def get_job_list() -> list[JobEntity]:
    db = get_db()
    rows = await db.fetch_all(queries.select_jobs)
    return [JobEntity(**row) for row in rows]


async def batch_process():
    db = get_db()
    try:
        await db.begin()
        for item in items:
            await db.execute(queries.update_item, item)
            if should_commit_batch:
                await db.commit()
                await db.begin()
        await db.commit()
    except Exception:
        await db.rollback()
        raise


# ... to here.


@pytest.fixture(scope="module")
def database_config() -> Any:
    """The package's own tables, and defaults for all else; the pytest plugin gives each test a database of it."""
    return {"database": {"sqlite": {"path": "./data/jobu.db"}}}


@pytest.fixture(autouse=True)
def names_of_the_example(db_function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty database, and the names that the example takes for granted."""
    path = tmp_path / "jobs.sql"
    path.write_text(QUERIES + QUERIES_OF_THE_EXAMPLE)
    monkeypatch.setitem(globals(), "queries", load_queries(path))


def stand_in(monkeypatch: pytest.MonkeyPatch, batch: list[dict[str, Any]], commit: bool) -> None:
    """Supplies what `batch_process` works on."""
    monkeypatch.setitem(globals(), "items", batch)
    monkeypatch.setitem(globals(), "should_commit_batch", commit)


async def test_jobs_are_created_and_listed() -> None:
    """`create_job` answers with the new id; `get_job_list` makes entities of rows."""
    assert await get_job_list() == []
    assert await create_job(JobInput("report", "0 6 * * *", "send")) == JobOutput(id=1)
    assert await create_job(JobInput("backup")) == JobOutput(id=2)
    report, backup = await get_job_list()
    assert (report.id, report.name, report.cron_expr, report.handler) == (1, "report", "0 6 * * *", "send")
    assert (backup.id, backup.name, backup.enabled) == (2, "backup", 1)
    assert backup.created_at == backup.updated_at


async def test_a_job_that_exists_is_refused() -> None:
    """The second job of the same name raises, and leaves nothing behind."""
    await create_job(JobInput("report"))
    with pytest.raises(errors.IntegrityError):
        await create_job(JobInput("report"))
    assert len(await get_job_list()) == 1
    assert await create_job(JobInput("backup")) == JobOutput(id=2)


@pytest.mark.parametrize("commit", [False, True], ids=["in one transaction", "committed item by item"])
async def test_batch_is_processed(monkeypatch: pytest.MonkeyPatch, commit: bool) -> None:
    """A batch is done whole, and no transaction stays open."""
    for number in range(3):
        await create_job(JobInput(f"job {number}"))
    stand_in(monkeypatch, [{"id": number, "handler": f"new {number}"} for number in (1, 2, 3)], commit)
    await batch_process()
    assert not get_db().in_transaction
    assert [job.handler for job in await get_job_list()] == ["new 1", "new 2", "new 3"]


@pytest.mark.parametrize(
    ("commit", "expected"),
    [
        pytest.param(False, ["echo", "echo"], id="in one transaction"),
        pytest.param(True, ["new 1", "echo"], id="committed item by item"),
    ],
)
async def test_batch_that_fails_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, commit: bool, expected: list[str]
) -> None:
    """What was committed before the failing item stays; all else is undone."""
    for number in range(2):
        await create_job(JobInput(f"job {number}"))
    stand_in(monkeypatch, [{"id": 1, "handler": "new 1"}, {"id": 2, "handler": None}], commit)
    with pytest.raises(errors.IntegrityError):
        await batch_process()
    assert not get_db().in_transaction
    assert [job.handler for job in await get_job_list()] == expected


async def test_query_file_works_in_both_styles() -> None:
    """All five queries, passed to the handle and called as aiosql's own."""
    db = get_db()
    first = await db.execute(queries.insert_job, {"name": "a", "cron_expr": "@daily", "handler": "x"})
    second = await queries.insert_job(db, name="b", cron_expr="@hourly", handler="y")
    assert (first.lastrowid, second) == (1, 2)

    row = await db.fetch_one(queries.get_job_by_id, {"id": 1})
    assert row is not None
    assert row["name"] == "a"
    assert (await queries.get_job_by_id(db, id=2))["name"] == "b"
    assert await db.fetch_one(queries.get_job_by_id, {"id": 3}) is None
    assert await queries.get_job_by_id(db, id=3) is None

    assert (await db.execute(queries.update_job, {"id": 1, "enabled": 0})).rowcount == 1
    assert await queries.update_job(db, id=3, enabled=0) == 0
    assert [job.name for job in await db.fetch_all(queries.get_all_jobs, {"enabled": 1}, record_class=JobEntity)] == [
        "b"
    ]
    assert [row["name"] async for row in queries.get_all_jobs(db, enabled=0)] == ["a"]

    assert (await db.execute(queries.delete_job, {"id": 1})).rowcount == 1
    assert await queries.delete_job(db, id=2) == 1
    assert await db.fetch_value("SELECT count(*) FROM jobs") == 0


async def test_updated_at_follows_the_update() -> None:
    """`updated_at` says when a row was last updated, though the query does not mention it."""
    db = get_db()
    await create_job(JobInput("old"))
    await db.execute("UPDATE jobs SET created_at = '2000-01-01 00:00:00', updated_at = '2000-01-01 00:00:00'")
    assert (await db.execute(queries.update_job, {"id": 1, "enabled": 0})).rowcount == 1
    (job,) = await get_job_list()
    assert job.created_at == "2000-01-01 00:00:00"
    assert job.updated_at > "2026"
