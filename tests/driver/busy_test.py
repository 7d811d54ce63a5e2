"""Waiting for locks: whose they are, how long, and what those who wait are told."""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from typing import Any

import anyio
import pytest

from database import errors, transactional
from tests.contract.support import HANGING, Engine, add, eventually, gather, usable

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def only_sqlite(engine: Engine) -> None:
    if engine.name != "sqlite3":
        pytest.skip("locks on files are SQLite's")


def _writes(db: Any, queries: Any) -> dict[str, tuple[Callable[[], Awaitable[Any]], str | None, Any]]:
    """Calls that write: the call, its SQL, and its parameters, as an error is to name them."""
    sql = "INSERT INTO jobs (name) VALUES (:name)"

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute(sql, {"name": "offloaded"})

    async def transaction() -> None:
        async with db.transaction():
            await db.execute(sql, {"name": "transaction"})

    return {
        "execute": (lambda: db.execute(sql, {"name": "a"}), sql, {"name": "a"}),
        "again": (lambda: db.execute(sql, {"name": "b"}), sql, {"name": "b"}),
        "aiosql": (lambda: queries.update_job(db, enabled=1, id=2), queries.update_job.sql, {"enabled": 1, "id": 2}),
        "run": (lambda: db.run(lambda connection: connection.execute(sql, {"name": "run"})), None, None),
        "offload": (offloaded, None, None),
        "transaction": (transaction, sql, {"name": "transaction"}),
    }


async def test_everybody_who_waited_is_told(
    make_db: Any, engine: Engine, queries: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes that wait together for another process's lock get an error each that names their own statement and
    parameters, and that is logged once.
    """
    db = await make_db(busy_timeout=200)
    await add(db, "there")
    calls = _writes(db, queries)
    with engine.locked(), caplog.at_level(logging.ERROR, "database"):
        found = dict(zip(calls, await gather(*[call for call, _, _ in calls.values()]), strict=True))
    for name, (_, sql, parameters) in calls.items():
        error = found[name]
        assert isinstance(error, errors.DatabaseBusyError), (name, error)
        assert "another process" in str(error), name
        if sql is not None:
            assert error.sql == sql, name
            assert dict(error.parameters) == parameters, name
    logged = [record for record in caplog.records if "DatabaseBusyError" in record.getMessage()]
    assert len(logged) == len(calls), [record.getMessage() for record in logged]
    assert engine.committed() == ["there"]
    await usable(db)


async def test_closing_while_a_write_waits_for_another_process(make_db: Any, engine: Engine, queries: Any) -> None:
    """What waits for another process's lock when the pool is closed gets PoolClosedError, soon, and nothing is kept."""
    for together in (False, True):
        db = await make_db(busy_timeout=20_000, schema=not together)
        calls = {name: call for name, (call, _, _) in _writes(db, queries).items()}
        for group in [list(calls)] if together else [[name] for name in calls]:
            found: list[Any] = []
            await db.fetch_value("SELECT 1")
            await db.open()

            async def write(group: list[str] = group, found: list[Any] = found) -> None:
                found.extend(await gather(*[calls[name] for name in group]))

            with engine.locked():
                began = time.monotonic()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(write)
                    await eventually(lambda: db.stats().writer_in_use)
                    await anyio.sleep(0.05)
                    await db.close(drain=0.05)
                assert time.monotonic() - began < 8, group
            assert {type(each) for each in found} == {errors.PoolClosedError}, (group, found)
    assert engine.committed() == []


async def beside_a_reader(reader: Any, sql: str, found: int, *writes: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What becomes of writes that begin beside a read-only transaction, which ends when they have waited for a while."""
    release, reading = anyio.Event(), anyio.Event()

    async def read() -> None:
        async with reader.transaction(readonly=True):
            assert await reader.fetch_value(sql) == found
            reading.set()
            await release.wait()

    outcome: list[Any] = []

    async def write() -> None:
        outcome.extend(await gather(*writes))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await reading.wait()
        group.start_soon(write)
        await anyio.sleep(0.4)  # several times busy_timeout
        assert outcome == []
        release.set()
    return outcome


@pytest.mark.parametrize("mode", ["DELETE", "PERSIST"])
async def test_ones_own_readers_without_a_wal(
    make_db: Any, engine: Engine, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a WAL a write waits for readers of its own process as for everything in the pool; if in vain, the error
    says who they are, and nobody speaks of another process.
    """
    db = await make_db(journal_mode=mode, busy_timeout=50, pool_timeout=10)
    await add(db, "before")
    counted = "SELECT count(*) FROM jobs"
    for pause in (0.002, 0.08):  # between two looks: on a busy machine it is longer than busy_timeout
        monkeypatch.setattr(random, "uniform", lambda _least, _most, pause=pause: pause)
        outcome = await beside_a_reader(
            db, counted, 1, lambda: add(db, "waited"), lambda: transactional(add)(db, "as well")
        )
        assert outcome == [None, None]
        assert engine.committed() == ["as well", "before", "waited"]
        await db.execute("DELETE FROM jobs WHERE name <> 'before'")
    await usable(db)


async def test_ones_own_readers_that_stay(make_db: Any, engine: Engine) -> None:
    """See above: the reader stays until `pool_timeout` is over."""
    db = await make_db(journal_mode="DELETE", busy_timeout=50, pool_timeout=0.3)
    release = anyio.Event()
    reading = anyio.Event()

    async def keep_reading() -> None:
        async with db.stream("SELECT 1 UNION SELECT id FROM jobs", chunk_size=1) as rows:
            async for _ in rows:
                reading.set()
                await release.wait()

    await db.execute_many("INSERT INTO jobs (name) VALUES (:name)", [{"name": f"{n}"} for n in range(100)])
    async with anyio.create_task_group() as group:
        group.start_soon(keep_reading)
        await reading.wait()
        with pytest.raises(errors.DatabaseError) as caught:
            await add(db, "in vain")
        release.set()
    assert "another process" not in str(caught.value)
    assert "keep_reading" in str(caught.value)
    await usable(db)


async def _told_at_once(db: Any) -> None:
    """Whatever writes says that it could only wait for itself: what is committed by itself, as well as what has begun."""
    sql = "INSERT INTO jobs (name) VALUES ('in vain')"

    async def in_parts() -> None:
        await db.execute(sql)
        await db.commit()

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(sql)

    for call in (
        lambda: db.execute(sql),
        lambda: db.fetch_value(f"{sql} RETURNING id"),
        lambda: db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("in vain",)]),
        lambda: db.execute_script(f"SELECT 1; {sql}"),
        lambda: db.execute_script("VACUUM"),
        lambda: db.run(lambda connection: connection.execute(sql).rowcount),
        lambda: transactional(db.execute)(sql),
        lambda: transactional(in_parts)(),
        lambda: transactional(offload=True)(in_parts)(),
        lambda: transactional(offload=True)(db.execute)(sql),
        batch,
    ):
        with pytest.raises(errors.TransactionError, match="wait for itself"):
            await call()


@pytest.mark.parametrize("reader", ["stream", "transaction"])
async def test_ones_own_lock(make_db: Any, engine: Engine, reader: str) -> None:
    """A write without a WAL by the very task that is reading could only wait for itself: it is told so at once."""
    db = await make_db(journal_mode="DELETE", busy_timeout=20_000, pool_timeout=20)
    await db.execute_many("INSERT INTO jobs (name) VALUES (:name)", [{"name": f"{n}"} for n in range(3000)])
    began = time.monotonic()
    if reader == "stream":
        async with db.stream("SELECT * FROM jobs", chunk_size=10) as rows:
            async for _ in rows:
                await _told_at_once(db)
                break
    else:
        async with db.transaction(readonly=True):
            await db.fetch_all("SELECT * FROM jobs")
            with db.detached():
                await _told_at_once(db)
    assert time.monotonic() - began < 8
    assert "in vain" not in engine.committed()
    await usable(db)


@pytest.mark.parametrize("kind", ["link", "attached", "attached the other way"])
async def test_ones_own_readers_by_another_name(make_db: Any, engine: Engine, kind: str) -> None:
    """One's own readers are such by whatever name they have the file: a link, or a database that it is attached to."""
    settings: dict[str, Any] = {"journal_mode": "DELETE", "busy_timeout": 50, "pool_timeout": 10}
    if kind == "link":
        link = engine.directory / "link.db"
        db = await make_db(schema=False, audit={"path": str(link)}, **settings)
        await db.execute_script(engine.schema)
        link.symlink_to(engine.path())  # which nobody could know when it was configured
    else:
        attach = {"audit": str(engine.path("audit"))}
        db = await make_db(attach=attach, audit={"attach": {}}, **settings)
    audit = engine.public.get_db("audit")
    reader, writer = (db, audit) if kind == "attached the other way" else (audit, db)
    table = "jobs" if kind == "link" else "audit.jobs"
    sql = f"INSERT INTO {'jobs' if writer is audit else table} (name) VALUES ('waited')"
    counted = f"SELECT count(*) FROM {'jobs' if reader is audit else table}"
    outcome = await beside_a_reader(reader, counted, 0, lambda: writer.execute(sql))
    assert not isinstance(outcome[0], BaseException), outcome
    assert engine.committed("default" if kind == "link" else "audit") == ["waited"]
    await usable(db)


async def test_ones_own_open_statement(make_db: Any, engine: Engine) -> None:
    """A statement that another open statement of the same transaction is in the way of says so, at once."""
    db = await make_db(busy_timeout=20_000)
    await db.execute_many("INSERT INTO jobs (name) VALUES (:name)", [{"name": f"{n}"} for n in range(3000)])
    began = time.monotonic()
    for in_the_way, sql in (
        ("SELECT * FROM jobs", "DROP TABLE jobs"),
        ("UPDATE jobs SET enabled = 0 RETURNING id", "DROP TABLE jobs"),
        ("UPDATE jobs SET enabled = 0 RETURNING id", None),
    ):
        caught: list[errors.DatabaseError] = []
        with suppress(errors.TransactionError):
            async with db.transaction(), db.stream(in_the_way, chunk_size=10) as rows:
                async for _ in rows:
                    try:
                        if sql is None:
                            async with db.transaction():
                                await db.execute("INSERT INTO item (value) VALUES ('x')")
                        else:
                            await db.execute(sql)
                    except errors.DatabaseError as error:
                        caught.append(error)
                    break
        for error in caught:
            assert "another process" not in str(error), in_the_way
            assert "still open" in str(error), in_the_way
            assert type(error) is errors.QueryExecutionError, in_the_way
        assert caught or sql is None, (in_the_way, sql)
        assert await db.fetch_value("SELECT count(*) FROM jobs") == 3000
    assert time.monotonic() - began < 8
    await usable(db)


async def test_ones_own_reader_and_then_another_process(make_db: Any, engine: Engine) -> None:
    """The time for others is counted from when one's own readers have ended, and comes to an end."""
    db = await make_db(journal_mode="DELETE", busy_timeout=50, pool_timeout=10)
    await add(db, "before")
    with closing(sqlite3.connect(engine.path(), isolation_level=None)) as outside, anyio.fail_after(HANGING):
        outside.execute("BEGIN")
        outside.execute("SELECT * FROM jobs").fetchall()
        (error,) = await beside_a_reader(db, "SELECT count(*) FROM jobs", 1, lambda: add(db, "refused"))
    assert isinstance(error, errors.DatabaseBusyError)
    assert "another process" in str(error)
    await usable(db)


async def test_a_group_that_cannot_be_committed_has_waited_once(
    make_db: Any, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a WAL a reader of another process is in the way of the commit. All of a group have waited for it together:
    each is told so, with its own statement, and none of them waits once more by itself.
    """
    db = await make_db(journal_mode="DELETE", busy_timeout=300)
    await add(db, "there")
    sql = "INSERT INTO jobs (name) VALUES (:name)"
    with closing(sqlite3.connect(engine.path(), isolation_level=None)) as outside:
        outside.execute("BEGIN")
        outside.execute("SELECT * FROM jobs").fetchall()
        before = db.stats()
        with caplog.at_level(logging.ERROR, "database"):
            found = await gather(*[lambda n=n: db.execute(sql, {"name": f"name {n}"}) for n in range(12)])
        after = db.stats()
    for number, error in enumerate(found):
        assert isinstance(error, errors.DatabaseBusyError), error
        assert error.sql == sql
        assert error.parameters == {"name": f"name {number}"}
    assert len({id(error) for error in found}) == len(found)
    assert after.statements_total - before.statements_total == len(found)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == len(found)
    assert engine.committed() == ["there"]
    assert await db.execute(sql, {"name": "later"})
    assert sorted(engine.committed()) == ["later", "there"]
