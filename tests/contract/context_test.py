"""Section 7 of the contract: what runs on another thread sees the context variables of its caller."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from database import transactional
from tests.contract.support import Engine, add, errors, eventually, gather, held, usable

request_id: ContextVar[str] = ContextVar("request_id", default="nobody's")


class _Notes(logging.Handler):
    """Keeps what each record's caller was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.levelname, record.getMessage(), request_id.get()))


@pytest.fixture
def notes() -> Iterator[_Notes]:
    logger = logging.getLogger("database")
    handler = _Notes()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.anyio
async def test_records_see_their_callers_context(db: Any, notes: _Notes) -> None:
    """Every record of a statement, a transaction or an error has its caller's context, alone, in a batch with others, in
    a group, in a transaction and when the wait was too long.
    """
    sql = "INSERT INTO jobs (name) VALUES (:name)"

    async def offloaded() -> None:
        await transactional(offload=True)(add)(db, f"{request_id.get()} offloaded")

    async def work(number: int) -> None:
        request_id.set(f"request {number}")
        mine = f"request {number}"
        await db.fetch_value(f"SELECT {number} AS r{number}")
        await db.execute(sql, {"name": mine})
        async with db.transaction():
            await db.execute(f"UPDATE jobs SET handler = 'r{number}' WHERE name = :name", {"name": mine})
        await offloaded()
        for failing in (f"SELECT no_such_column_{number} FROM jobs", f"UPDATE jobs SET no_such_column_{number} = 1"):
            with pytest.raises(errors.QueryExecutionError):
                await (db.fetch_all(failing) if failing.startswith("SELECT") else db.execute(failing))

    async with anyio.create_task_group() as group:
        for number in range(1, 9):
            group.start_soon(work, number)
    strangers = [each for each in notes.seen if each[2] == "nobody's"]
    assert not strangers
    for number in range(1, 9):
        mine = [message for _, message, caller in notes.seen if caller == f"request {number}"]
        for part in (
            f"AS r{number}",
            f"handler = 'r{number}'",
            f"no_such_column_{number} FROM",
            f"no_such_column_{number} = 1",
        ):
            assert any(part in message for message in mine), (part, mine)
        errors_of_mine = [each for each in notes.seen if each[0] == "ERROR" and each[2] == f"request {number}"]
        assert len(errors_of_mine) == 2, errors_of_mine
    await usable(db)


@pytest.mark.anyio
@pytest.mark.parametrize("readonly", [True, False])
async def test_records_of_those_who_waited_too_long(make_db: Any, notes: _Notes, readonly: bool) -> None:
    """The ERROR record of a wait that ran out of time has the context of the one who waited."""
    db = await make_db(pool_timeout=0.5)

    async def wait(number: int) -> None:
        request_id.set(f"request {number}")
        async with db.transaction(readonly=readonly):
            await db.fetch_value("SELECT 1")

    async with held(db, readonly=readonly, count=2 if readonly else 1):
        notes.seen.clear()
        found = await gather(*[lambda n=n: wait(n) for n in range(3)])
    assert {type(each) for each in found} == {errors.ConnectionPoolExhaustedError}
    callers = [caller for level, _, caller in notes.seen if level == "ERROR"]
    assert sorted(callers) == [f"request {number}" for number in range(3)]


@pytest.mark.anyio
async def test_records_of_what_nobody_awaits(db: Any, notes: _Notes) -> None:
    """So has what is said of a transaction that a task has left open, and of an `on_commit` function that fails where nobody
    waits for it; the function itself has it, too.
    """
    seen: list[str] = []

    async def fail() -> None:
        seen.append(request_id.get())
        raise LookupError

    async def leave_open() -> None:
        request_id.set("request 1")
        await db.begin()
        await add(db, "left open")

    async def work() -> None:
        request_id.set("request 2")
        db.on_commit(fail)

    async with anyio.create_task_group() as group:
        group.start_soon(leave_open)
        group.start_soon(work)

    def records() -> list[tuple[str, str]]:
        return sorted((level, caller) for level, _, caller in notes.seen if level != "INFO")

    await eventually(lambda: len(records()) == 2, "both records")
    assert records() == [("ERROR", "request 2"), ("WARNING", "request 1")]
    assert seen == ["request 2"]
    await usable(db)


@pytest.mark.anyio
async def test_code_of_the_users_sees_its_callers_context(db: Any, engine: Engine, tmp_path: Any) -> None:
    """Functions, record classes, generators, values that adapt themselves, properties of parameters and the progress of a
    backup run in their caller's context, inside and outside a transaction; what they set there stays theirs.
    """
    seen: dict[str, str] = {}

    def note(what: str) -> None:
        seen[what] = request_id.get()
        request_id.set(f"changed by {what}")

    class Record:
        def __init__(self, **_columns: Any) -> None:
            note("record_class")

    class Parameters:
        @property
        def name(self) -> str:
            note("property")
            return f"by property of {request_id.get()}"

    class Adapted:
        def __conform__(self, _protocol: object) -> str:
            note("adapter")
            return "adapted"

    def rows() -> Iterator[dict[str, str]]:
        for number in range(3):
            note("generator")
            yield {"name": f"generated {number} {seen['generator']}"}

    async def work() -> None:
        sql = "INSERT INTO jobs (name) VALUES (:name)"
        await db.run(lambda _connection: note("run"))
        await db.run(lambda _connection: note("read-only run"), readonly=True)
        await db.fetch_one("SELECT 1 AS one", record_class=Record)
        await db.execute(sql, Parameters())
        await db.execute_many(sql, rows())
        async with db.stream("SELECT 1 AS one", record_class=Record) as found:
            async for _ in found:
                pass
        if engine.name == "sqlite3":
            await db.fetch_value("SELECT :value", {"value": Adapted()})
        await db.execute("DELETE FROM jobs")

    for inside in (False, True):
        seen.clear()
        token = request_id.set(f"mine {inside}")
        if inside:
            async with db.transaction():
                await work()
        else:
            await work()
            if engine.name == "sqlite3":
                await db.backup(tmp_path / "copy.db", progress=lambda *_: note("backup"))
        generator = seen.pop("generator")
        assert generator in (f"mine {inside}", "changed by generator")
        assert set(seen.values()) == {f"mine {inside}"}, seen
        assert len(seen) >= 4
        assert request_id.get() == f"mine {inside}", "what is set over there stays there"
        request_id.reset(token)
    assert sqlite3 is not None
    await usable(db)
