"""Cancelled everywhere: at each scheduling point in turn, by every means, while waiting, opening, running and ending.

`tests/contract/cancellation_test.py` does this for what one task does with an idle pool. Here are the rest: callers that
wait for others, several databases, callbacks, ends, children; and after each run all that could have been lost is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional, transactional_readonly
from tests.contract.support import (
    HANGING,
    SLOW_ROWS,
    SLOW_SELECT,
    Engine,
    add,
    at_rest,
    case,
    errors,
    gather,
    held,
    idle,
    is_idle,
    names,
    stepwise,
    stopped,
    usable,
    worker_threads,
)
from tests.robustness.support import FIGURES

pytestmark = pytest.mark.anyio

Scenario = Callable[[Any, Any], Awaitable[Any]]


async def write_both(db: Any) -> None:
    await add(db, "a")
    await add(db, "b")


# Scenarios: each writes "a" and "b", or nothing. Those named `waiting…` find the connection taken.


async def waiting_autocommit(db: Any, audit: Any) -> None:
    await db.execute("INSERT INTO jobs (name) VALUES ('a'), ('b')")


async def waiting_transaction(db: Any, audit: Any) -> None:
    async with db.transaction():
        await write_both(db)


async def waiting_manual(db: Any, audit: Any) -> None:
    await db.begin()
    try:
        await write_both(db)
        await db.commit()
    except BaseException:
        with anyio.CancelScope(shield=True):
            if db.in_transaction:
                await db.rollback()
        raise


async def waiting_offload(db: Any, audit: Any) -> None:
    await transactional(offload=True)(write_both)(db)


async def waiting_run(db: Any, audit: Any) -> None:
    await db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('a'), ('b')"))


async def waiting_many(db: Any, audit: Any) -> None:
    await db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("a",), ("b",)])


async def waiting_batch(db: Any, audit: Any) -> None:
    async with db.batch() as batch:
        await batch.execute("INSERT INTO jobs (name) VALUES ('a')")
        await batch.execute("INSERT INTO jobs (name) VALUES ('b')")


async def waiting_readers(db: Any, audit: Any) -> None:
    await names(db)
    async with db.transaction(readonly=True):
        await names(db)
    async with db.stream("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3", chunk_size=1) as rows:
        async for _ in rows:
            pass
    await db.run(lambda connection: connection.execute("SELECT 1").fetchall(), readonly=True)
    await transactional_readonly(offload=True)(names)(db)


async def timeouts(db: Any, audit: Any) -> None:
    await transactional(timeout=30)(write_both)(db)
    async with db.transaction(readonly=True, timeout=30):
        await names(db)


async def retries(db: Any, audit: Any) -> None:
    tries = 0

    @transactional(retries=2)
    async def work() -> None:
        nonlocal tries
        tries += 1
        await add(db, "a")
        if tries < 3:
            raise errors.DatabaseBusyError("made up")
        await add(db, "b")

    await work()


async def two_databases(db: Any, audit: Any) -> None:
    @transactional(db=("default", "audit"))
    async def work() -> None:
        await write_both(db)
        await write_both(audit)

    await work()


async def nested_databases(db: Any, audit: Any) -> None:
    async with audit.transaction(readonly=True):
        await names(audit)
        async with db.transaction():
            await write_both(db)
            await names(audit)


async def requires_new(db: Any, audit: Any) -> None:
    async with db.transaction():
        await add(db, "a")
        async with db.transaction(readonly=True, propagation="requires_new"):
            assert await names(db) == []
        with db.detached():
            assert await names(db) == []
        await add(db, "b")


async def children(db: Any, audit: Any) -> None:
    async with db.transaction():
        async with anyio.create_task_group() as group:
            group.start_soon(add, db, "a")
            group.start_soon(names, db)
            group.start_soon(db.execute_many, "INSERT INTO jobs (name) VALUES (?)", [("b",)])


async def callbacks(db: Any, audit: Any) -> None:
    told: list[str] = []

    async def tell() -> None:
        await names(db)
        told.append("told")

    async with db.transaction():
        await write_both(db)
        db.on_commit(tell)
    assert told == ["told"]


async def undone(db: Any, audit: Any) -> None:
    try:
        async with db.transaction():
            await write_both(db)
            raise ValueError
    except ValueError:
        pass
    try:
        async with db.transaction():
            await add(db, "x")
            try:
                async with db.transaction():
                    await add(db, "y")
                    raise KeyError
            except KeyError:
                pass
            await db.rollback()
    except ValueError:
        pass
    await waiting_transaction(db, audit)


async def streams(db: Any, audit: Any) -> None:
    async with db.transaction():
        await write_both(db)
        async with db.stream(SLOW_ROWS, chunk_size=2) as one, db.stream(SLOW_ROWS, chunk_size=3) as other:
            for _ in range(8):
                await anext(one)
                await anext(other)


async def backup(db: Any, audit: Any) -> None:
    await db.backup(f"{db.directory}/copy.db")
    await waiting_transaction(db, audit)


async def flush(db: Any, audit: Any) -> None:
    await db.flush()
    async with db.transaction():
        await write_both(db)
        await db.flush()


async def closing(db: Any, audit: Any) -> None:
    await waiting_transaction(db, audit)
    async with anyio.create_task_group() as group:
        group.start_soon(gather, lambda: names(db), lambda: db.fetch_value("SELECT 1"))
        await anyio.lowlevel.checkpoint()
        await db.close()
        await db.close()
    await audit.close()


SCENARIOS = [
    waiting_autocommit, waiting_transaction, waiting_manual, waiting_offload, waiting_run, waiting_many, waiting_batch,
    waiting_readers, timeouts, retries, two_databases, nested_databases, requires_new, children, callbacks, undone, streams,
    backup, flush, closing,
]  # fmt: skip


class Handle:
    """The database's handle, and the directory that `backup` needs."""

    def __init__(self, db: Any, directory: str) -> None:
        self._db = db
        self.directory = directory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


MEANS = {"asyncio": ("scope", "native", "native-repeated", "native-for-ever"), "trio": ("scope", "trio-scope")}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_cancelled_at_every_point(
    make_db: Any, engine: Engine, scenario: Scenario, anyio_backend_name: str
) -> None:
    """Cancelled at each of its scheduling points in turn, by every means: the pool is whole, nothing is half done,
    neighbours get their answers, what returned is committed, and neither thread, descriptor nor connection is left over.
    """
    db = Handle(await make_db(audit={}), str(engine.directory))
    audit = engine.public.get_db("audit")
    waits = scenario.__name__.startswith("waiting")
    count = 2 if scenario is waiting_readers else 1

    async def run(point: int, means: str) -> int:
        reached = 0
        returned = False
        scope: Any = anyio.CancelScope()
        if means == "trio-scope":
            import trio

            scope = trio.CancelScope()

        def at(number: int) -> None:
            nonlocal reached
            reached = number
            if means.endswith("scope"):
                if number == point:
                    scope.cancel()
                return
            last = {"native": point, "native-repeated": point + 3, "native-for-ever": 10**6}[means]
            if point <= number <= last:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

        async def body() -> None:
            nonlocal returned
            with scope:
                await stepwise(scenario(db, audit), at)  # type: ignore[arg-type]
                returned = True

        async def cancelled() -> None:
            if means.endswith("scope"):
                await body()
                return
            task = asyncio.create_task(body())
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

        neighbours: list[Any] = []

        async def neighbour() -> None:
            neighbours.append(await db.fetch_value("SELECT 1"))
            async with db.transaction():
                neighbours.append((await db.execute("INSERT INTO item (value) VALUES ('neighbour')")).rowcount)

        async def holding(*, task_status: Any) -> None:
            async with db.transaction(readonly=scenario is waiting_readers):
                await db.fetch_value("SELECT 1")
                task_status.started()
                for _ in range(200):  # until somebody waits, and a little longer
                    await anyio.sleep(0)
                    if db.stats().waiting + db.stats().queued:
                        break
                for _ in range(3):
                    await anyio.sleep(0)

        async def all_of_it() -> None:
            async with anyio.create_task_group() as group:
                if waits:
                    for _ in range(count):
                        await group.start(holding)
                if scenario is not closing:
                    group.start_soon(neighbour)
                await cancelled()

        with anyio.fail_after(HANGING):
            await all_of_it()
        await idle(db)
        await idle(audit)
        assert scenario is closing or neighbours == [1, 1]
        found = engine.committed()
        assert found in ([], ["a", "b"])
        if scenario is two_databases:
            assert engine.committed("audit") == found, "one of two databases is committed"
        if returned and scenario is not waiting_readers:
            assert found == ["a", "b"], "it returned, and is not committed"
        await usable(db)
        for handle in (db, audit):
            await handle.execute("DELETE FROM jobs")
            await handle.execute("DELETE FROM item")
        return reached

    await run(10**9, "scope")
    for handle in (db, audit):  # opens all there is
        async with held(handle, readonly=True, count=2), held(handle):
            pass
    threads, files = len(worker_threads()), descriptors()
    for means in MEANS[anyio_backend_name]:
        point, reached = 0, 1
        while reached > point:
            point += 1
            with case(means=means, point=point):
                reached = await run(point, means)
            FIGURES["scheduling points cancelled at"] += 1
            assert point < 400
    if scenario is not closing:
        assert len(worker_threads()) == threads, "threads leak"
        assert descriptors() == files, "descriptors leak"
        assert db.stats().readers_open == audit.stats().readers_open == 2, "connections leak"


# --- promptly -----------------------------------------------------------------------------------------------


async def _stream(db: Any) -> None:
    async with db.stream(SLOW_SELECT) as rows:
        async for _ in rows:
            pass


@transactional(offload=True)
async def _computes_in_sql(db: Any) -> None:
    await add(db, "undone")
    await db.fetch_value(SLOW_SELECT)


LONG: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "select": lambda db: db.fetch_value(SLOW_SELECT),
    "stream": _stream,
    "million-rows": lambda db: db.execute_many("INSERT INTO item (value) VALUES (?)", [("x",)] * 10_000_000),
    "run": lambda db: db.run(lambda connection: connection.execute(SLOW_SELECT).fetchall()),
    "offload": _computes_in_sql,
    "lock": lambda db: add(db, "undone"),
    "lock-transaction": lambda db: _locked(db),
    "lock-offload": lambda db: transactional(offload=True)(add)(db, "undone"),
}


async def _locked(db: Any) -> None:
    async with db.transaction():
        await add(db, "undone")


@pytest.mark.parametrize("what", LONG)
async def test_returns_at_its_deadline(make_db: Any, engine: Engine, what: str) -> None:
    """`move_on_after(0.1)` around fifteen seconds of anything returns long before them, the CPU is idle again, and the
    connection is usable. How long it takes (a few milliseconds on a machine at rest) is among the figures.
    """
    db = await make_db(busy_timeout=600_000)
    with engine.locked() if what.startswith("lock") else contextlib.nullcontext(), stopped():
        began = time.perf_counter()
        with anyio.move_on_after(0.1) as scope:
            await LONG[what](db)
        late = time.perf_counter() - began - 0.1
        assert scope.cancelled_caught
        assert late < HANGING
        await idle(db)
    await at_rest()
    await usable(db)
    figure = "µs behind its deadline, at the most, that a long call returned"
    FIGURES[figure] = max(FIGURES[figure], int(late * 1e6))
    assert engine.committed() == []
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]


async def test_a_storm_of_cancellations(db: Any, engine: Engine) -> None:
    """Hundreds of tasks on all paths, each cancelled at a random moment: all or nothing, and then a whole pool."""
    chance = random.Random(7)
    before = threading.active_count()
    returned: set[int] = set()
    insert = "INSERT INTO jobs (name) VALUES (?)"

    async def whole(number: int) -> None:
        async with db.transaction():
            await add(db, f"{number}a")
            await add(db, f"{number}b")

    @transactional(offload=True)
    async def offloaded(number: int) -> None:
        await add(db, f"{number}a")
        await add(db, f"{number}b")

    paths: list[Any] = [
        whole,
        offloaded,
        lambda number: db.execute_many(insert, [(f"{number}a",), (f"{number}b",)]),
        lambda number: db.execute("INSERT INTO jobs (name) VALUES (?), (?)", (f"{number}a", f"{number}b")),
    ]

    async def task(number: int) -> None:
        with anyio.move_on_after(chance.uniform(0, 0.03)):
            await paths[number % 4](number)
            returned.add(number)

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for number in range(400):
                group.start_soon(task, number)
    await usable(db)
    found = set(engine.committed())
    for number in range(400):
        pair = {f"{number}a", f"{number}b"}
        assert pair <= found or not pair & found
        assert pair <= found or number not in returned
    assert is_idle(db)
    assert threading.active_count() <= before + 2
