"""A lease's end, seen from two threads."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import nullcontext
from typing import Any

import anyio
import pytest

from database import errors
from database.driver.lease import Lease
from database.driver.request import ROLLBACK, STATEMENT
from database.driver.worker import Worker
from database.session.origin import Origin
from tests.contract.support import Engine, add, eventually, held, usable, waiting


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["scope", "timeout"])
async def test_a_commit_behind_the_statement_that_ends_the_transaction(
    db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A COMMIT waits behind a statement whose failure rolls the transaction back, and a cancellation or a time limit
    strikes just then: that is no success, no `on_commit` function runs, and nothing is kept.
    """
    await db.execute_script(engine.refusing_trigger)
    at_gate, go_on = threading.Event(), threading.Event()
    told: list[str] = []
    lease: Lease | None = None
    left = Worker.left

    def wait(worker: Worker) -> None:
        left(worker)
        if lease is not None and lease.ended and not at_gate.is_set():
            at_gate.set()
            go_on.wait(10)

    monkeypatch.setattr(Worker, "left", wait)
    scope = anyio.CancelScope()

    async def strike() -> None:
        await eventually(at_gate.is_set)
        scope.cancel()
        await anyio.sleep(0.5 if by == "timeout" else 0.01)
        go_on.set()

    running = threading.Event()

    def fail_when_the_commit_waits(connection: Any) -> None:
        running.set()
        while lease is None or lease.mailbox.empty():
            time.sleep(0.001)
        connection.execute("INSERT INTO item (value) VALUES ('rollback')")

    async def fail() -> None:
        with pytest.raises(errors.DatabaseError):
            await db.run(fail_when_the_commit_waits)

    async with anyio.create_task_group() as group:
        group.start_soon(strike)
        expected = pytest.raises(errors.TransactionTimeoutError) if by == "timeout" else nullcontext()
        with scope, expected:
            async with db.transaction(timeout=0.3 if by == "timeout" else None) as tx:
                await add(db, "lost")
                db.on_commit(lambda: told.append("committed"))
                lease = tx.lease
                group.start_soon(fail)
                await eventually(running.is_set)
            told.append("success")
    assert told == []
    assert engine.committed() == []


@pytest.mark.anyio
async def test_statements_that_come_while_a_lease_ends(db: Any) -> None:
    """Requests that reach a lease when it is over are answered, each once, whichever thread finds them."""
    pool = db.pool()
    await db.open()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            lease = Lease(pool, Origin("the test"), number=None, readonly=True)
            first = pool.request(STATEMENT, lambda *_: None)
            lease.submit(first)
            await first
            rollback = pool.request(ROLLBACK, None)
            lease.submit(rollback)
            requests = []
            while not rollback.answered and len(requests) < 2000:
                request = pool.request(STATEMENT, lambda *_: 1)
                lease.submit(request)
                requests.append(request)
                if len(requests) % 10 == 0:
                    await anyio.sleep(0)
            await rollback
            last = pool.request(STATEMENT, lambda *_: 1)
            lease.submit(last)
            requests.append(last)
            await eventually(lambda requests=requests: all(each.answered for each in requests), "all answered")
            assert all(each.error is not None or each.result == 1 for each in requests)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["first first", "last first", "all at once", "timeout"])
@pytest.mark.parametrize("depth", [1, 2])
async def test_levels_survive_those_who_gave_up_waiting(make_db: Any, engine: Engine, how: str, depth: int) -> None:
    """Statements of a nested level that give up waiting for a connection leave the level as it was: the next statement
    opens it, and it can be kept or undone by itself.
    """
    db = await make_db(pool_timeout=0.2 if how == "timeout" else 10)
    scopes = [anyio.CancelScope(), anyio.CancelScope()]

    async def insert(number: int) -> None:
        with scopes[number]:
            try:
                await add(db, f"given up {number}")
            except errors.ConnectionPoolExhaustedError:
                assert how == "timeout"

    async def nested(levels: int) -> None:
        if levels:
            async with db.transaction():
                await nested(levels - 1)
            return
        async with anyio.create_task_group() as group:
            group.start_soon(insert, 0)
            await waiting(db, 1)
            group.start_soon(insert, 1)
            await anyio.sleep(0.01)
            if how != "timeout":
                for scope in scopes if how != "last first" else reversed(scopes):
                    scope.cancel()
                    if how != "all at once":
                        await anyio.sleep(0.01)
        await release()
        await add(db, "kept")
        with pytest.raises(ZeroDivisionError):
            async with db.transaction():
                await add(db, "undone")
                raise ZeroDivisionError

    async with held(db) as event:

        async def release() -> None:
            event.set()

        with anyio.fail_after(10):
            async with db.transaction():
                await nested(depth)
                with pytest.raises(ZeroDivisionError):
                    async with db.transaction():
                        await add(db, "undone as well")
                        raise ZeroDivisionError
    assert engine.committed() == ["kept"]
    await usable(db)


@pytest.mark.anyio
async def test_a_dropped_lease_is_not_used_again(db: Any, engine: Engine) -> None:
    """A statement that is sent in the very moment in which the last one that waited gives up stands in line anew."""
    async with held(db) as event:
        async with db.transaction() as tx:
            scope = anyio.CancelScope()

            async def give_up() -> None:
                with scope:
                    await add(db, "given up")

            async with anyio.create_task_group() as group:
                group.start_soon(give_up)
                await waiting(db, 1)
                lease = tx.root.lease
                waiter = next(iter(lease.pending))
                assert lease.withdraw(waiter)  # as its task's cancellation does, a moment before the task knows
                scope.cancel()
                event.set()
                with anyio.fail_after(5):
                    await add(db, "kept")
    assert engine.committed() == ["kept"]
