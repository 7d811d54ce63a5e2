"""Section 5 of the contract: every await may be cancelled, and nothing is lost, leaked or half done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional
from tests.contract.support import (
    HANGING,
    SLOW_INSERT,
    SLOW_ROWS,
    SLOW_SELECT,
    Engine,
    add,
    at_rest,
    busy,
    case,
    errors,
    eventually,
    gather,
    held,
    idle,
    in_turn,
    is_idle,
    names,
    on_asyncio,
    on_trio,
    stepwise,
    stopped,
    usable,
    waiting,
)

pytestmark = pytest.mark.anyio

Work = Callable[[Any], Awaitable[Any]]


# --- running: really stopped, promptly ----------------------------------------------------------------------


async def _stream(db: Any) -> None:
    # The first row of this one is a hundred million steps away.
    async with db.stream(SLOW_SELECT) as rows:
        async for _ in rows:
            pass


async def _long_stream(db: Any) -> None:
    async with db.stream(SLOW_ROWS) as rows:
        async for _ in rows:
            pass


async def _transaction(db: Any) -> None:
    async with db.transaction():
        await add(db, "undone")
        await db.fetch_value(SLOW_SELECT)


async def _readonly(db: Any) -> None:
    async with db.transaction(readonly=True):
        await db.fetch_value(SLOW_SELECT)


async def _write_in_transaction(db: Any) -> None:
    async with db.transaction():
        await add(db, "undone")
        await db.execute(SLOW_INSERT)


async def _offloaded(db: Any) -> None:
    @transactional(offload=True)
    async def work() -> None:
        await add(db, "undone")
        await db.fetch_value(SLOW_SELECT)

    await work()


async def _manual(db: Any) -> None:
    await db.begin()
    try:
        await add(db, "undone")
        await db.fetch_value(SLOW_SELECT)
        await db.commit()
    finally:
        await db.rollback()


async def _batch(db: Any) -> None:
    async with db.batch() as batch:
        await batch.execute("INSERT INTO jobs (name) VALUES ('undone')")
        await batch.execute(SLOW_INSERT)


SLOW: list[Any] = [
    pytest.param(lambda db: db.fetch_value(SLOW_SELECT), id="fetch_value"),
    pytest.param(lambda db: db.fetch_all(SLOW_ROWS), id="fetch_all"),
    pytest.param(lambda db: db.execute(SLOW_INSERT), id="execute"),
    pytest.param(lambda db: db.execute_many(SLOW_INSERT.replace("(*)", "(*) + ?"), [(1,), (2,)]), id="execute_many"),
    pytest.param(lambda db: db.execute_script(SLOW_INSERT + ";" + SLOW_INSERT), id="execute_script"),
    pytest.param(lambda db: db.run(lambda connection: connection.execute(SLOW_SELECT).fetchall()), id="run"),
    pytest.param(
        lambda db: db.run(lambda connection: connection.execute(SLOW_SELECT).fetchall(), readonly=True),
        id="run-readonly",
    ),
    pytest.param(_stream, id="stream"),
    pytest.param(_long_stream, id="long-stream"),
    pytest.param(_transaction, id="transaction"),
    pytest.param(_readonly, id="readonly"),
    pytest.param(_write_in_transaction, id="write-in-transaction"),
    pytest.param(_offloaded, id="offloaded"),
    pytest.param(_manual, id="manual"),
    pytest.param(_batch, id="batch"),
]


async def _cancelled_while_it_runs(db: Any, work: Callable[[], Awaitable[Any]]) -> None:
    """Cancels the work as soon as a worker has begun its slow statement."""
    pool = db.pool()
    scope = anyio.CancelScope()

    async def cancel() -> None:
        with db.detached():
            await eventually(lambda: any(_runs_slowly(worker) for worker in (pool.writer, *pool.readers())), "it runs")
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        with scope:
            await work()
    assert scope.cancelled_caught


def _runs_slowly(worker: Any) -> bool:
    current = worker.current
    return current is not None and getattr(current.subject, "sql", None) in (SLOW_INSERT, SLOW_SELECT)


@in_turn("work", SLOW)
async def test_a_running_statement_is_really_stopped(db: Any, engine: Engine, work: Work) -> None:
    """Under a deadline a slow statement returns, has stopped working, and its connection is usable."""
    with stopped():
        with anyio.move_on_after(0.04) as scope:
            await work(db)
        assert scope.cancelled_caught
        await idle(db)
    await at_rest()
    assert engine.committed() == []
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]
    await usable(db)


async def test_execute_many_of_many_rows_is_stopped(db: Any, engine: Engine) -> None:
    """A write of a hundred million rows stops between them, and none of them is there."""
    taken = 0

    def rows() -> Iterator[tuple[str]]:
        nonlocal taken
        for taken in range(100_000_000):
            yield (str(taken),)

    with anyio.move_on_after(0.05) as scope, stopped():
        await db.execute_many("INSERT INTO item (value) VALUES (?)", rows())
    assert scope.cancelled_caught
    await idle(db)
    stopped_at = taken
    await at_rest()
    assert taken == stopped_at
    await usable(db)
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]


async def test_slow_values_and_records_are_not_waited_for(db: Any, engine: Engine) -> None:
    """A cancelled call stops soon, too, where it is code of the user's that takes its time: what makes a value that can be
    stored, and what makes a record of a row.
    """
    made = 0
    begun = threading.Event()

    def slow(*_: Any, **__: Any) -> str:
        nonlocal made
        made += 1
        begun.set()
        threading.Event().wait(0.005)
        return f"name {made}"

    class Slow:
        pass

    class Item:
        name = property(slow)

    db.adapt(Slow, slow)
    insert = "INSERT INTO jobs (name) VALUES (:name)"
    rows = (
        "WITH RECURSIVE c (name) AS (SELECT 1 UNION ALL SELECT name + 1 FROM c WHERE name < 400)"
        " SELECT CAST(name AS TEXT) AS value FROM c"
    )
    items = [{"name": Slow()} for _ in range(400)]

    async def batch() -> None:
        async with db.batch() as batch:
            for item in items:
                await batch.execute(insert, item)

    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "list": lambda: db.execute_many(insert, items),
        "objects": lambda: db.execute_many(insert, [Item() for _ in range(400)]),
        "in a transaction": lambda: transactional(db.execute_many)(insert, items),
        "offload": lambda: transactional(offload=True)(db.execute_many)(insert, items),
        "batch": batch,
        "records": lambda: db.fetch_all(rows, record_class=slow),
        "records, offloaded": lambda: transactional(offload=True)(db.fetch_all)(rows, record_class=slow),
        "written records": lambda: db.fetch_all(f"INSERT INTO item (value) {rows} RETURNING value", record_class=slow),
    }
    for name, call in calls.items():
        made = 0
        begun.clear()
        with case(call=name):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:

                async def cancel(scope: anyio.CancelScope = scope) -> None:
                    await eventually(begun.is_set)
                    scope.cancel()

                group.start_soon(cancel)
                with scope:
                    await call()
            await idle(db)
            assert made < 200
            assert engine.committed() == []
    await usable(db)


@pytest.mark.parametrize("work", ["autocommit", "transaction", "offloaded", "run"])
async def test_waiting_for_another_process_can_be_cancelled(make_db: Any, engine: Engine, work: str) -> None:
    """However long `busy_timeout` is, the wait for another process's lock ends with the deadline."""
    db = await make_db(busy_timeout=600_000)

    async def transaction() -> None:
        async with db.transaction():
            await add(db, "a")

    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "autocommit": lambda: add(db, "a"),
        "transaction": transaction,
        "offloaded": lambda: transactional(offload=True)(add)(db, "a"),
        "run": lambda: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('a')")),
    }
    with engine.locked():
        with anyio.fail_after(HANGING), anyio.move_on_after(0.05) as scope:
            await calls[work]()
        assert scope.cancelled_caught
        await eventually(lambda: is_idle(db), "the writer is free again while the lock is still held")
    assert engine.committed() == []
    await usable(db)


async def test_one_of_many_that_share_a_connection(db: Any) -> None:
    """Cancelling one caller disturbs none of those whose statements run beside it."""
    stop = anyio.CancelScope()

    async def slow() -> None:
        with stop:
            await db.fetch_value(SLOW_SELECT)

    async def stopper() -> None:
        await eventually(lambda: db.stats().readers_in_use, "the slow one runs")
        stop.cancel()

    with anyio.fail_after(HANGING):
        results = await gather(
            slow,
            stopper,
            *[lambda n=n: db.fetch_value("SELECT :n", {"n": n}) for n in range(50)],
            *[lambda n=n: db.execute("INSERT INTO item (value) VALUES (:n)", {"n": n}) for n in range(50)],
        )
    assert results[2:52] == list(range(50))
    assert not [result for result in results if isinstance(result, BaseException)]
    assert await db.fetch_value("SELECT count(*) FROM item") == 50
    await usable(db)


@on_asyncio
@in_turn("times", [1, 2, 5])
@in_turn("work", SLOW)
async def test_native_cancel(db: Any, engine: Engine, work: Work, times: int) -> None:
    """asyncio's own `task.cancel()`, once or again and again, does what a scope does."""
    task = asyncio.create_task(work(db))
    await busy(db)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with stopped(), pytest.raises(asyncio.CancelledError):
        await task
    assert engine.committed() == []
    await usable(db)
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]


@on_asyncio
async def test_asyncio_wait_for(db: Any) -> None:
    """`asyncio.wait_for` and `asyncio.timeout` bound a statement as scopes do."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(db.fetch_value(SLOW_SELECT), 0.1)
    await usable(db)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await _transaction(db)
    await usable(db)


@on_trio
async def test_trio_scope(db: Any) -> None:
    """trio's own scopes do what AnyIO's do."""
    import trio

    with trio.move_on_after(0.1) as scope:
        await _write_in_transaction(db)
    assert scope.cancelled_caught
    await usable(db)


# --- a transaction whose statement was interrupted ----------------------------------------------------------


@in_turn("slow", [SLOW_SELECT, SLOW_INSERT], ids=["select", "insert"])
async def test_an_interrupted_statement_dooms_its_transaction(db: Any, engine: Engine, slow: str) -> None:
    """After a statement was stopped, its transaction can neither go on nor commit; nothing of it is
    autocommitted.
    """
    with pytest.raises(errors.TransactionError):
        async with db.transaction():
            await add(db, "before")
            await _cancelled_while_it_runs(
                db, lambda: db.execute(slow) if slow is SLOW_INSERT else db.fetch_value(slow)
            )
            with pytest.raises(errors.TransactionError):
                await add(db, "after")
            with pytest.raises(errors.TransactionError):
                await names(db)
            assert engine.committed() == []
    assert engine.committed() == []
    await usable(db)


async def test_an_interrupted_statement_in_a_nested_level(db: Any, engine: Engine) -> None:
    """The transaction is rolled back as a whole, not only the nested level in which it happened."""
    with pytest.raises(errors.TransactionError):
        async with db.transaction():
            await add(db, "outer")

            async def nested() -> None:
                async with db.transaction():
                    await db.execute(SLOW_INSERT)

            await _cancelled_while_it_runs(db, nested)
            await add(db, "after")
    assert engine.committed() == []
    await usable(db)


async def test_an_interrupted_manual_transaction(db: Any, engine: Engine) -> None:
    """In manual mode `commit` of an interrupted transaction raises, `rollback` clears it away."""
    await db.begin()
    await add(db, "before")
    await _cancelled_while_it_runs(db, lambda: db.execute(SLOW_INSERT))
    with pytest.raises(errors.TransactionError):
        await add(db, "after")
    with pytest.raises(errors.TransactionError):
        await db.commit()
    await db.rollback()
    assert engine.committed() == []
    await usable(db)


# --- waiting ------------------------------------------------------------------------------------------------


@in_turn("readonly", [False, True], ids=["write", "readonly"])
async def test_a_cancelled_waiter_leaves_the_queue(db: Any, readonly: bool) -> None:
    """A waiter that is cancelled is gone at once, and those behind it keep their order."""
    order: list[int] = []
    scopes = [anyio.CancelScope() for _ in range(5)]

    async def wait(number: int) -> None:
        with scopes[number]:
            async with db.transaction(readonly=readonly):
                await db.fetch_value("SELECT 1")
                order.append(number)

    async with anyio.create_task_group() as group, held(db, readonly=readonly, count=2 if readonly else 1):
        for number in range(5):
            group.start_soon(wait, number)
            await waiting(db, number + 1)
        scopes[0].cancel()
        scopes[2].cancel()
        await waiting(db, 3)
    assert order == [1, 3, 4] if not readonly else set(order) == {1, 3, 4}
    await usable(db)


async def test_autocommit_callers_that_wait_can_be_cancelled(db: Any, engine: Engine) -> None:
    """Single statements that stand in line leave it when cancelled, and are not executed afterwards."""
    async with held(db), held(db, readonly=True, count=2):
        with anyio.move_on_after(0.05) as scope:
            await gather(lambda: add(db, "a"), lambda: add(db, "b"), lambda: names(db), lambda: db.run(print))
        assert scope.cancelled_caught
        await eventually(lambda: db.stats().waiting + db.stats().queued == 0, "nobody waits")
    await usable(db)
    assert engine.committed() == []


async def test_cancelled_in_the_moment_of_release(db: Any) -> None:
    """A waiter cancelled in the very step in which the connection becomes free never keeps it."""
    for delay in range(12):
        scope = anyio.CancelScope()

        async def wait(scope: anyio.CancelScope = scope) -> None:
            with scope:
                async with db.transaction():
                    await db.fetch_value("SELECT 1")

        async with anyio.create_task_group() as group, held(db) as release:
            group.start_soon(wait)
            await waiting(db, 1)
            release.set()
            for _ in range(delay):
                await anyio.lowlevel.checkpoint()
            scope.cancel()
        await idle(db)
    await usable(db)


# --- all or nothing -----------------------------------------------------------------------------------------


@in_turn("delay", [0.0, 0.001, 0.003, 0.01, 0.03, 0.06])
async def test_a_single_write_happens_completely_or_not_at_all(db: Any, engine: Engine, delay: float) -> None:
    """Wherever the deadline falls in a single write of many rows, afterwards there are all of them or
    none.
    """
    rows = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 60000) SELECT x FROM c"
    with anyio.move_on_after(delay):
        await db.execute(f"INSERT INTO item (value) {rows}")
    await idle(db)
    ((first,),) = engine.outside("SELECT count(*) FROM item")
    assert first in (0, 60000)
    with anyio.move_on_after(delay):
        await db.execute_many("INSERT INTO item (value) VALUES (?)", [(1,)] * 60000)
    await idle(db)
    ((second,),) = engine.outside("SELECT count(*) FROM item")
    assert second - first in (0, 60000)
    await usable(db)


async def test_a_commit_that_has_begun_is_never_interrupted(db: Any, engine: Engine) -> None:
    """Cancelled around its commit, a transaction is committed or not, and where it returned it is
    committed.
    """
    for number in range(30):
        returned = False
        with anyio.CancelScope() as scope:
            async with db.transaction():
                await add(db, f"{number:02} a")
                await add(db, f"{number:02} b")
                if number % 2:
                    scope.cancel()
                else:
                    scope.deadline = anyio.current_time() + number * 0.00002
            returned = True
        await idle(db)
        found = [name for name in engine.committed() if name.startswith(f"{number:02}")]
        assert len(found) in (0, 2)
        if returned:
            assert len(found) == 2
    await usable(db)


# --- systematically: at every scheduling point --------------------------------------------------------------


async def _scenario_write(db: Any) -> None:
    await db.execute("INSERT INTO jobs (name) VALUES ('a'), ('b')")


async def _scenario_read(db: Any) -> None:
    await db.fetch_all("SELECT * FROM jobs")
    await db.fetch_one("SELECT * FROM jobs")


async def _scenario_transaction(db: Any) -> None:
    async with db.transaction():
        await add(db, "a")
        async with db.transaction():
            await names(db)
        await add(db, "b")


async def _scenario_readonly(db: Any) -> None:
    async with db.transaction(readonly=True):
        await names(db)
        await names(db)


async def _scenario_manual(db: Any) -> None:
    try:
        await db.begin()
        await add(db, "a")
        await db.begin()
        await add(db, "b")
        await db.commit()
        await db.flush()
        await db.commit()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await db.rollback()
            await db.rollback()
        raise


async def _scenario_many(db: Any) -> None:
    await db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("a",), ("b",)])


async def _scenario_script(db: Any) -> None:
    async with db.transaction():
        await db.execute_script("INSERT INTO jobs (name) VALUES ('a'); INSERT INTO jobs (name) VALUES ('b');")


async def _scenario_run(db: Any) -> None:
    await db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('a'), ('b')"))


async def _scenario_offload(db: Any) -> None:
    @transactional(offload=True)
    async def work() -> None:
        await add(db, "a")
        await add(db, "b")

    await work()


async def _scenario_stream(db: Any) -> None:
    async with db.stream(SLOW_ROWS, chunk_size=10) as rows:
        count = 0
        async for _ in rows:
            count += 1
            if count == 35:
                break


async def _scenario_stream_in_transaction(db: Any) -> None:
    async with db.transaction():
        await db.execute("INSERT INTO jobs (name) VALUES ('a'), ('b')")
        await _scenario_stream(db)


async def _scenario_batch(db: Any) -> None:
    async with db.batch(size=10) as batch:
        await batch.execute("INSERT INTO jobs (name) VALUES ('a')")
        await batch.execute("INSERT INTO jobs (name) VALUES ('b')")


async def _scenario_close(db: Any) -> None:
    await names(db)
    await db.close()


async def _scenario_waiting(db: Any) -> None:
    async with held(db), anyio.create_task_group() as group:
        group.start_soon(_scenario_write, db)
        await eventually(lambda: db.stats().waiting + db.stats().queued, "the write waits")
        group.cancel_scope.cancel()
    await _scenario_write(db)


SCENARIOS = {
    name.removeprefix("_scenario_"): function
    for name, function in list(globals().items())
    if name.startswith("_scenario_")
}


@pytest.mark.shortened
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_cancelled_at_every_point(
    db: Any, engine: Engine, scenario: Work, anyio_backend_name: str, pytestconfig: pytest.Config
) -> None:
    """A scenario cancelled at each of its scheduling points in turn, by a scope and by asyncio's own means, with the pool
    open or still to be opened, leaves a whole pool and all or nothing.
    """
    quick = pytestconfig.getoption("quick")  # each of the means, and one of them also with the pool still to be opened
    for means in ("scope", "native", "native-repeated") if anyio_backend_name == "asyncio" else ("scope",):
        for fresh in (False, True):
            if quick and fresh and anyio_backend_name == "asyncio" and means != "native-repeated":
                continue
            with case(means=means, fresh=fresh):
                await _at_every_point(db, engine, scenario, means, fresh)


async def _at_every_point(db: Any, engine: Engine, scenario: Work, means: str, fresh: bool) -> None:
    for point in range(1, 200):
        if fresh:
            await db.close()
        reached = 0
        scope = anyio.CancelScope()

        def at(number: int, point: int = point, scope: anyio.CancelScope = scope) -> None:
            nonlocal reached
            reached = number
            if means == "scope":
                if number == point:
                    scope.cancel()
            elif number == point or (means == "native-repeated" and point < number < point + 4):
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

        async def body(scope: anyio.CancelScope = scope, at: Any = at) -> None:
            with scope:
                await stepwise(scenario(db), at)

        with anyio.fail_after(HANGING):
            if means == "scope":
                await body()
            else:
                task = asyncio.create_task(body())
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()
        await usable(db)
        assert engine.committed() in ([], ["a", "b"])
        await db.execute("DELETE FROM jobs")
        if reached < point:
            break
    else:
        pytest.fail("the scenario has no end")
