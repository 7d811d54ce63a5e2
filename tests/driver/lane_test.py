"""Lanes: who is at the queue, and that nobody in it is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import errors, transactional_readonly
from database.driver.worker import Worker
from tests.contract.support import HANGING, Engine, add, eventually, gather, usable, waiting


@pytest.mark.anyio
async def test_a_read_that_comes_as_the_reader_is_given_away(
    make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read is queued when the lane's reader has just seen an empty queue, and that reader is given to a transaction
    before it looks again: the read is answered once a reader is free.
    """
    if engine.name != "sqlite3":
        pytest.skip("only a reader that stays with its lane can be given away")
    db = await make_db(pool_size=1, pool_timeout=60)
    gates = [(threading.Event(), threading.Event()) for _ in range(2)]
    armed = False
    rest, flush = Worker.rest, Worker.flush

    def wait(number: int) -> None:
        at_gate, go_on = gates[number]
        at_gate.set()
        go_on.wait(10)

    def gated_rest(self: Worker, queue: Any) -> Any:
        if armed and self.role == "reader" and not gates[0][0].is_set():
            flush(self)
            wait(0)
        return rest(self, queue)

    def gated_flush(self: Worker) -> None:
        if armed and self.role == "reader" and self.sleeping and not gates[1][0].is_set():
            wait(1)
        flush(self)

    monkeypatch.setattr(Worker, "rest", gated_rest)
    monkeypatch.setattr(Worker, "flush", gated_flush)
    await db.fetch_value("SELECT 1")
    armed = True
    answers: list[int] = []

    async def read(number: int) -> None:
        answers.append(await db.fetch_value(f"SELECT {number}"))

    async def transaction() -> None:
        async with db.transaction(readonly=True):
            answers.append(await db.fetch_value("SELECT 3"))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(read, 1)
            await eventually(gates[0][0].is_set)  # the queue is empty, and the reader about to sleep
            group.start_soon(read, 2)
            await eventually(lambda: db.stats().queued == 1)
            gates[0][1].set()
            await eventually(gates[1][0].is_set)  # it counts as asleep
            group.start_soon(transaction)
            await anyio.sleep(0.01)
            gates[1][1].set()
    assert sorted(answers) == [1, 2, 3]
    await usable(db)


def _units(db: Any, wait: Callable[[], None]) -> Iterator[tuple[str, Callable[[], Awaitable[Any]]]]:
    """Calls on the read lane that spend their time in Python."""

    @transactional_readonly(offload=True)
    async def offloaded() -> None:
        await db.fetch_value("SELECT 1")
        wait()

    class Record:
        def __init__(self, **_columns: Any) -> None:
            wait()

    yield "run", lambda: db.run(lambda _connection: wait(), readonly=True)
    yield "offload", offloaded
    yield "record_class", lambda: db.fetch_all("SELECT 1 AS one", record_class=Record)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["run", "offload", "record_class"])
@pytest.mark.parametrize("first", [True, False], ids=["behind it", "before it"])
async def test_python_code_on_a_reader_holds_no_other_read_up(db: Any, kind: str, first: bool) -> None:
    """While a function computes on a reader, other reads are answered by another reader, those that come with it and
    those that come later; afterwards no reader is kept.
    """
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(20), "nobody let it go on"

    call = dict(_units(db, wait))[kind]
    if not first:
        await db.fetch_value("SELECT 0")
    async with anyio.create_task_group() as group:
        group.start_soon(call)
        with anyio.fail_after(5):
            assert await gather(*[lambda n=n: db.fetch_value(f"SELECT {n}") for n in range(5)]) == [*range(5)]
            await eventually(inside.is_set)
            for number in range(20):
                assert await db.fetch_value(f"SELECT {number}") == number
        go_on.set()
    await usable(db)
    assert db.stats().readers_open <= 2


@pytest.mark.anyio
@pytest.mark.parametrize("readonly", [True, False])
async def test_what_is_answered_does_not_wait_for_python_code(
    db: Any, monkeypatch: pytest.MonkeyPatch, readonly: bool
) -> None:
    """Statements that were executed just before a function that takes its time are answered while it runs."""
    inside, go_on = threading.Event(), threading.Event()
    answered = 0

    def wait(_connection: Any) -> None:
        inside.set()
        assert go_on.wait(20), "nobody let it go on"

    async def statement(number: int) -> None:
        nonlocal answered
        await (db.fetch_value(f"SELECT {number}") if readonly else db.execute_script("DELETE FROM item WHERE id = 1"))
        answered += 1

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(statement, number)
        if db.engine.name == "sqlite3":
            await anyio.lowlevel.checkpoint()
        group.start_soon(lambda: db.run(wait, readonly=readonly))
        await eventually(inside.is_set)
        try:
            await eventually(lambda: answered >= 1, "those before it are answered", within=10)
            if readonly:
                await eventually(lambda: answered == 5, "all of them", within=10)
        finally:
            go_on.set()
    await usable(db)


@pytest.mark.anyio
async def test_python_code_on_the_only_reader(make_db: Any) -> None:
    """Where there is no other reader, reads behind a function wait for `pool_timeout`, and the error names it."""
    db = await make_db(pool_size=1, pool_timeout=0.5)
    inside, go_on = threading.Event(), threading.Event()

    def compute(_connection: Any) -> None:
        inside.set()
        go_on.wait(20)

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: db.run(compute, readonly=True))
        await eventually(inside.is_set)
        try:
            with anyio.fail_after(5), pytest.raises(errors.ConnectionPoolExhaustedError, match="compute"):
                await db.fetch_value("SELECT 1")
        finally:
            go_on.set()
    await usable(db)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["transaction", "stream"])
async def test_a_reader_leaves_its_queue_when_it_is_somebodys_turn(make_db: Any, kind: str) -> None:
    """Who asks for the only reader gets it before the reads that came later, although they wait in the reader's own queue."""
    db = await make_db(pool_size=1)
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def compute(_connection: Any) -> None:
        inside.set()
        go_on.wait(20)

    async def claim() -> None:
        if kind == "transaction":
            async with db.transaction(readonly=True):
                assert await db.fetch_value("SELECT 2") == 2
        else:
            async with db.stream("SELECT 2") as rows:
                assert [row[0] async for row in rows] == [2]
        order.append(kind)

    async def read() -> None:
        assert await db.fetch_value("SELECT 3") == 3
        order.append("read")

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: db.run(compute, readonly=True))
        await eventually(inside.is_set)
        group.start_soon(claim)
        await waiting(db, 1)
        for _ in range(3):
            group.start_soon(read)
        await eventually(lambda: db.stats().queued == 3)
        go_on.set()
    assert order == [kind, *["read"] * 3]
    await usable(db)


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["generator", "endless generator", "list", "batch", "in a transaction"])
async def test_many_writes_that_are_cancelled_stop(db: Any, engine: Engine, what: str) -> None:
    """A cancelled execute_many or batch stops at its next row, however slowly its rows come, and leaves nothing."""
    seen = threading.Event()
    taken = 0

    def rows(pause: float) -> Iterator[dict[str, str]]:
        nonlocal taken
        for number in range(10**9):
            taken = number
            if number == 3:
                seen.set()
            if pause:
                threading.Event().wait(pause)
            yield {"name": f"many {number}"}

    async def run() -> None:
        sql = "INSERT INTO jobs (name) VALUES (:name)"
        if what == "batch":
            async with db.batch(size=10**6) as batch:
                for number in range(300_000):
                    await batch.execute(sql, {"name": f"many {number}"})
                seen.set()
        elif what == "list":
            many = [{"name": f"many {number}"} for number in range(500_000)]
            seen.set()
            await db.execute_many(sql, many)
        elif what == "in a transaction":
            async with db.transaction():
                await add(db, "before")
                await db.execute_many(sql, rows(0.01))
        else:
            await db.execute_many(sql, rows(0.01 if what == "generator" else 0))

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await eventually(seen.is_set)
            await eventually(lambda: db.stats().writer_in_use or not engine.name)
            scope.cancel()

        group.start_soon(cancel)
        with anyio.fail_after(HANGING), scope:
            await run()
    await eventually(lambda: not db.stats().writer_in_use, "the writer is free again")
    assert taken < 10**9 - 1
    assert engine.committed() == []
    await usable(db)
