"""What type checkers must know about the public names; checked by `typing_test.py`, never run.

A line that ends in `# error` must be one for every checker.
"""

# pyright: strict, reportUnusedCoroutine=false, reportUnusedVariable=false, reportUnusedFunction=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import database
from database.sqlite3 import (
    close_all,
    configure,
    get_db,
    lifespan,
    load_queries,
    transactional,
    transactional_readonly,
)


@dataclass
class Job:
    id: int
    name: str


db = get_db()
queries = load_queries("jobs.sql")


# --- decorated functions keep parameters and result ---------------------------------------------------------


@transactional
async def create(name: str, *, enabled: bool = True) -> Job:
    return Job(1, name)


@transactional(db=("default", "audit"), timeout=1.5, retries=3, propagation="required")
async def create_with_options(name: str) -> Job:
    return Job(1, name)


@transactional_readonly
async def jobs() -> list[Job]:
    return await db.fetch_all("SELECT * FROM jobs", record_class=Job)


@transactional_readonly(db="audit", offload=True)
async def jobs_with_options(least: int = 0) -> list[Job]:
    return []


@database.transactional
async def neutral(name: str) -> int:
    return 1


class Service:
    @transactional
    async def create(self, name: str) -> Job:
        return Job(1, name)

    @staticmethod
    @transactional_readonly
    async def count() -> int:
        return 0

    @classmethod
    @transactional
    async def make(cls, name: str) -> Job:
        return Job(1, name)


async def calls() -> None:
    assert_type(await create("a", enabled=False), Job)
    assert_type(await create_with_options("a"), Job)
    assert_type(await jobs(), list[Job])
    assert_type(await jobs_with_options(7), list[Job])
    assert_type(await neutral("a"), int)
    assert_type(await Service().create("a"), Job)
    assert_type(await Service.count(), int)
    assert_type(await Service.make("a"), Job)
    awaitable: Callable[[str], Coroutine[Any, Any, Job]] = create_with_options
    assert_type(await awaitable("a"), Job)


async def wrong_calls() -> None:
    await create(7)  # error
    await create("a", enable=True)  # error
    await create()  # error
    await jobs(1)  # error
    await Service().create(7)  # error


# --- what cannot be decorated, and options that do not exist ------------------------------------------------


def plain() -> int:
    return 1


async def generator() -> AsyncIterator[int]:
    yield 1


transactional(plain)  # error
transactional(generator)  # error
transactional_readonly()(plain)  # error
transactional(propagation="neasted")  # error
transactional(timeout="soon")  # error
transactional(isolation=1)  # error


# --- statements ---------------------------------------------------------------------------------------------


async def statements() -> None:
    assert_type(await db.fetch_one("SELECT 1", record_class=Job), Job | None)
    assert_type(await db.fetch_all("SELECT 1", record_class=Job), list[Job])
    async with db.stream("SELECT 1", record_class=Job) as records:
        async for record in records:
            assert_type(record, Job)

    result = await db.execute("INSERT", {"name": "a"})
    assert_type(result.rowcount, int)
    await db.execute(queries.insert_job, Job(1, "a"))
    await db.execute("INSERT", ("a", 1))
    await db.execute_many("INSERT", [("a",), ("b",)])
    await db.execute_many(queries.insert_jobs, ({"name": name} for name in "ab"))
    assert_type(await db.execute_script("CREATE TABLE"), None)

    row = await db.fetch_one("SELECT 1")
    if row is not None:
        assert_type(row["name"], Any)
        assert_type(row[0], Any)
        assert_type(len(row), int)
        Job(**row)
        dict(row)
    for each in await db.fetch_all(queries.get_all_jobs, {"enabled": 1}):
        Job(**each)
    async with db.stream("SELECT 1", chunk_size=10) as rows:
        async for each in rows:
            Job(**each)
    value: int = await db.fetch_value("SELECT 1")
    assert_type(value, int)

    await db.fetch_all("SELECT 1", record_class="Job")  # error
    await db.fetch_all(7)  # error
    (await db.fetch_one("SELECT 1", record_class=Job)).name  # error
    await db.fetch_all("SELECT 1", rows=1)  # error


def work(connection: Any, name: str, times: int = 1) -> bytes:
    return b""


async def the_rest(path: Path) -> None:
    assert_type(await db.run(work, "a"), bytes)
    assert_type(await db.run(work, "a", 2, readonly=True), bytes)
    async with db.transaction(readonly=True, timeout=1, propagation="requires_new"):
        pass
    async with db.batch(size=10) as batch:
        await batch.execute(queries.insert_job, {"name": "a"})
    await db.begin(readonly=True)
    await db.flush()
    await db.commit()
    await db.rollback()
    assert_type(db.in_transaction, bool)
    await db.backup(path)
    assert_type(db.stats().waiting, int)
    with db.detached():
        pass
    db.on_commit(lambda: None)
    db.on_commit(jobs)
    await db.close()
    async with lifespan():
        pass
    configure({"database": {"sqlite": {"path": "x.db"}}})
    configure("config/database.yaml")
    configure(path)
    await close_all()
    neutral_db = database.get_db("audit")
    assert_type(await neutral_db.fetch_all("SELECT 1", record_class=Job), list[Job])

    db.transaction(propagation="neasted")  # error
    await db.run(7)  # error
