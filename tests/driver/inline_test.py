"""Small reads on the event loop's own thread: `inline_reads: true`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database.driver import inline
from database.driver import quick as texts
from tests.contract.support import SLOW_SELECT, add, errors, gather, names

pytestmark = pytest.mark.anyio

NAME = "SELECT name FROM jobs WHERE id = ?"


@pytest.fixture
def engine(tmp_path: Any) -> Any:
    """SQLite: a server has nothing to be asked inline."""
    from tests.conftest import alone

    with alone("sqlite3", tmp_path) as engine:
        yield engine


@pytest.fixture
async def db(make_db: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        texts, "BUDGET", 0.02
    )  # what is quick here is told by the number of its steps, not by a busy machine
    db = await make_db(inline_reads=True)
    for name in "abc":
        await add(db, name)
    return db


async def quick(db: Any, times: int = 40) -> None:
    """Until the text is known as quick, and then some."""
    for number in range(times):
        assert await db.fetch_value(NAME, (number % 3 + 1,)) == "abc"[number % 3]


@asynccontextmanager
async def counted_turns() -> AsyncIterator[list[None]]:
    """An item for each turn that another task has had meanwhile."""
    turns: list[None] = []
    done = False

    async def count() -> None:
        while not done:
            turns.append(None)
            await anyio.sleep(0)

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        await anyio.lowlevel.checkpoint()
        yield turns
        done = True


async def test_what_is_quick_runs_on_the_loops_thread(db: Any) -> None:
    """A text that was quick on the worker runs inline, sees what was committed before, and counts as a statement."""
    before = db.stats()
    await quick(db)
    after = db.stats()
    assert after.inline_total - before.inline_total > 10
    assert after.statements_total - before.statements_total == 40
    for name in ("d", "e", "f"):
        await add(db, name)
        assert await db.fetch_value("SELECT count(*) FROM jobs WHERE name = ?", (name,)) == 1


async def test_long_texts_are_not_remembered(db: Any) -> None:
    """A text that is as long as the data in it is not kept in order to know it again: it goes to the worker."""
    for number in range(3):
        for _ in range(10):
            assert await db.fetch_value(f"SELECT length('{'x' * 100_000}') + {number}") == 100_000 + number
    assert not db.pool().inline.quick.texts
    assert db.stats().inline_total == 0


async def test_many_tasks_get_what_they_asked_for(db: Any) -> None:
    """Whether inline, in the next turn, or on the worker: each task gets its own answer."""
    for tasks in (2, 10, 60):

        async def ask(number: int) -> list[Any]:
            return [await db.fetch_one("SELECT ? AS number, ? AS turn", (number, turn)) for turn in range(30)]

        found = await gather(*[lambda n=n: ask(n) for n in range(tasks)])
        assert [[tuple(row) for row in rows] for rows in found] == [[(n, t) for t in range(30)] for n in range(tasks)]
    assert db.stats().inline_total > 0


@pytest.mark.any_loop
async def test_what_turns_out_to_be_slow_goes_to_the_worker(db: Any) -> None:
    """A text that was quick and is slow with other values is stopped, and run where it keeps nobody waiting."""
    steps = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < ?) SELECT count(*) FROM c"
    for _ in range(10):
        assert await db.fetch_value(steps, (3,)) == 3
    async with counted_turns() as turns:
        assert await db.fetch_value(steps, (300_000,)) == 300_000
    assert len(turns) > 3


async def test_others_have_their_turn(db: Any) -> None:
    """A task that does nothing but read does not keep the loop for itself."""
    await quick(db)
    async with counted_turns() as turns:
        await quick(db, 600)
    assert len(turns) > 10


async def test_errors_cancellation_and_closing(db: Any) -> None:
    """What fails, is cancelled or finds the pool closing behaves as it does without `inline_reads`."""
    for _ in range(5):
        with pytest.raises(errors.QueryExecutionError, match="nowhere"):
            await db.fetch_value("SELECT x FROM nowhere")
        with pytest.raises(errors.QueryExecutionError):
            await db.fetch_value(NAME, (object(),))
    await quick(db)

    class Mine(Exception):
        pass

    def refuse(**_: Any) -> None:
        raise Mine

    for _ in range(5):
        with pytest.raises(Mine):
            await db.fetch_one(NAME, (1,), record_class=refuse)
    with anyio.move_on_after(0.02):
        await db.fetch_value(SLOW_SELECT)
    reading = True

    async def read() -> None:
        while reading:
            try:
                await db.fetch_value(NAME, (1,))
            except errors.PoolClosedError:
                return
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(read)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        await db.close()
        reading = False
    assert await names(db) == ["a", "b", "c"]


async def test_a_reader_that_is_wanted_elsewhere(db: Any) -> None:
    """Transactions and streams take the reader as they always do; inline reads go on around them."""
    await quick(db)
    for _ in range(20):
        async with db.transaction(readonly=True):
            assert len(await db.fetch_all("SELECT * FROM jobs")) == 3
            with db.detached():
                await quick(db, 3)
        async with db.stream("SELECT id FROM jobs") as rows:
            assert [row[0] async for row in rows] == [1, 2, 3]
    assert db.stats().inline_total > 0


async def test_a_turn_is_long_only_while_nobody_waits(
    db: Any, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loop tells who waits, reads of one task follow one another as long as nobody does, and one by one if not:
    neither a task nor a timer waits for more than one of them. Elsewhere the turn's time is all there is.
    """
    tells = db.pool().waker.tells_who_waits
    assert tells is (anyio_backend == ("asyncio", {}))
    monkeypatch.setattr(inline, "ALONE", 60.0)
    await quick(db)
    waited = 0
    wait = inline.Inline.wait

    def counted(self: Any, request: Any) -> None:
        nonlocal waited
        waited += 1
        wait(self, request)

    monkeypatch.setattr(inline.Inline, "wait", counted)
    await anyio.sleep(0)
    await quick(db, 500)
    assert waited < 5 if tells else waited > 5
    async with counted_turns() as turns:
        waited = 0
        await quick(db, 500)
    assert waited > 400 if tells else waited > 5
    assert len(turns) >= waited

    if tells:
        rung: list[None] = []
        asyncio.get_running_loop().call_later(0.01, rung.append, None)
        for _ in range(100_000):
            await quick(db, 1)
            if rung:
                break
        assert rung
