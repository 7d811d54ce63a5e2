"""Sections 2 and 3 of the contract: how many at once, who waits and for how long, and when pools open and
close.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from database import get_db, transactional
from tests.contract.support import (
    HANGING,
    SLOW_SELECT,
    Engine,
    add,
    errors,
    eventually,
    gather,
    held,
    in_turn,
    names,
    usable,
    waiting,
    worker_threads,
)

# --- how many at once ---------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_two_at_once_and_the_third_waits(db: Any) -> None:
    """With pool_size 2 two read-only transactions run at once; the third goes on as soon as one ends."""
    running: list[int] = []
    leave = [anyio.Event() for _ in range(3)]

    async def read(number: int) -> None:
        async with db.transaction(readonly=True):
            await names(db)
            running.append(number)
            await leave[number].wait()
        running.remove(number)

    async with anyio.create_task_group() as group:
        for number in range(2):
            group.start_soon(read, number)
            await eventually(lambda number=number: number in running)
        assert db.stats().readers_in_use == 2
        group.start_soon(read, 2)
        await waiting(db, 1)
        assert running == [0, 1]
        leave[1].set()
        await eventually(lambda: 2 in running, "the third goes on")
        assert 0 in running
        leave[0].set()
        leave[2].set()
    await usable(db)


async def _exhaust(db: Any, *, readonly: bool) -> errors.ConnectionPoolExhaustedError:
    async def wait_in_vain() -> None:
        async with db.transaction(readonly=readonly):
            await db.fetch_value("SELECT 1")

    start = time.monotonic()
    with pytest.raises(errors.ConnectionPoolExhaustedError) as caught:
        await wait_in_vain()
    assert 0.15 < time.monotonic() - start < HANGING
    return caught.value


@pytest.mark.anyio
@pytest.mark.parametrize("readonly", [True, False], ids=["readers", "writer"])
async def test_exhaustion(make_db: Any, readonly: bool) -> None:
    """When nobody lets go the waiter gets an error after pool_timeout that says how long, how many, and who
    holds.
    """
    db = await make_db(pool_timeout=0.2)
    before = db.stats().timeouts_total
    async with held(db, readonly=readonly, count=2 if readonly else 1):
        error = await _exhaust(db, readonly=readonly)
        assert db.stats().waiting == 0
    assert isinstance(error, TimeoutError)
    text = str(error)
    assert "0.2" in text, text
    assert ("2" if readonly else "one") in text, text
    assert "hold_a_connection" in text or "support.py" in text, f"the holders are not named: {text}"
    assert db.stats().timeouts_total == before + 1
    await usable(db)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["read", "write", "run", "stream", "batch", "offload"])
async def test_exhaustion_of_single_calls(make_db: Any, engine: Engine, kind: str) -> None:
    """Calls outside a transaction wait no longer than pool_timeout either; they are not executed later."""
    db = await make_db(pool_timeout=0.5)

    async def stream() -> None:
        async with db.stream("SELECT * FROM jobs") as rows:
            [row async for row in rows]

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute("INSERT INTO jobs (name) VALUES ('x')")

    calls = {
        "read": lambda: names(db),
        "write": lambda: add(db, "x"),
        "run": lambda: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('x')")),
        "stream": stream,
        "batch": batch,
        "offload": lambda: transactional(offload=True)(add)(db, "x"),
    }
    async with held(db), held(db, readonly=True, count=2):
        with anyio.fail_after(HANGING), pytest.raises(errors.ConnectionPoolExhaustedError):
            await calls[kind]()
    await usable(db)
    assert engine.committed() == []
    await calls[kind]()


@pytest.mark.any_loop
@pytest.mark.anyio
async def test_a_slow_statement_is_no_lack_of_connections(make_db: Any) -> None:
    """A statement that runs for longer than pool_timeout is not timed out itself; it has its connection."""
    db = await make_db(pool_timeout=0.25)
    count = SLOW_SELECT.replace("100000000", "1500000")
    assert await db.fetch_value(count) == 1500000
    await db.execute(f"INSERT INTO item (value) {count}")


@pytest.mark.anyio
async def test_a_slow_read_holds_nobody_up(db: Any) -> None:
    """While one slow statement runs, reads of others pass it by."""
    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(db.fetch_value, SLOW_SELECT)
            await eventually(lambda: db.stats().readers_in_use)
            for _ in range(20):
                await names(db)
            assert await gather(*[lambda: names(db)] * 50) == [[]] * 50
            group.cancel_scope.cancel()
    await usable(db)


@pytest.mark.any_loop
@pytest.mark.anyio
async def test_slow_reads_do_not_keep_the_readers(make_db: Any) -> None:
    """Readers that go on with slow statements, one after the other, leave when a transaction waits; and none is lost."""
    db = await make_db(pool_size=3)
    slow = SLOW_SELECT.replace("100000000", "50000")
    done = 0
    stop = False

    async def reader() -> None:
        nonlocal done
        while not stop:
            assert await db.fetch_value(slow) == 50000
            done += 1

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(reader)
        await eventually(lambda: done > 12)
        for _ in range(5):
            before = done
            async with db.transaction(readonly=True):
                await names(db)
            # A few turns of the three that run; they would go on for ever.
            assert done - before < 150
        stop = True
    assert await gather(*[lambda: names(db)] * 50) == [[]] * 50
    await usable(db)
    async with held(db, readonly=True, count=3):
        assert db.stats().readers_in_use == 3


@pytest.mark.anyio
async def test_readers_are_served_in_their_order(make_db: Any) -> None:
    """First come, first served, for readers too."""
    db = await make_db(pool_size=1)
    order: list[int] = []

    async def read(number: int) -> None:
        async with db.transaction(readonly=True):
            await names(db)
            order.append(number)

    async with anyio.create_task_group() as group, held(db, readonly=True):
        for number in range(8):
            group.start_soon(read, number)
            await waiting(db, number + 1)
    assert order == list(range(8))


@pytest.mark.anyio
async def test_single_writes_and_transactions_share_one_line(db: Any) -> None:
    """Single writes do not overtake the transactions that asked before them, nor the other way about."""
    order: list[str] = []

    async def single(name: str) -> None:
        order.append((await db.fetch_one("INSERT INTO jobs (name) VALUES (?) RETURNING name", (name,)))["name"])

    async def whole(name: str) -> None:
        async with db.transaction():
            await add(db, name)
            order.append(name)

    async with anyio.create_task_group() as group, held(db):
        for number, call in enumerate([single, whole, single, whole, whole, single]):
            group.start_soon(call, str(number))
            await eventually(
                lambda number=number: db.stats().waiting + db.stats().queued == number + 1,
                f"{number} in line",
            )
    rows = await db.fetch_all("SELECT name FROM jobs ORDER BY id")
    assert [row["name"] for row in rows] == list("012345")


# --- statistics ---------------------------------------------------------------------------------------------


FIELDS = (
    "readers_open readers_in_use writer_in_use waiting queued acquired_total timeouts_total "
    "wait_seconds_total statements_total commits_total rollbacks_total grouped_total"
)


@pytest.mark.anyio
async def test_stats(db: Any) -> None:
    """PoolStats is a frozen dataclass with the contract's fields; the totals count what happened."""
    before = db.stats()
    assert dataclasses.is_dataclass(before)
    assert {field.name for field in dataclasses.fields(before)} >= set(FIELDS.split())
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.waiting = 7
    async with db.transaction():
        await add(db, "a")
        await add(db, "b")
        assert db.stats().writer_in_use
    with pytest.raises(LookupError):
        async with db.transaction():
            await add(db, "c")
            raise LookupError
    async with db.transaction(readonly=True):
        await names(db)
        assert db.stats().readers_in_use == 1
        assert not db.stats().writer_in_use
    after = db.stats()
    assert after.statements_total - before.statements_total >= 4
    assert after.commits_total - before.commits_total >= 1
    assert after.rollbacks_total - before.rollbacks_total >= 1
    assert after.acquired_total - before.acquired_total >= 3
    assert 1 <= after.readers_open <= after.pool_size
    assert (after.readers_in_use, bool(after.writer_in_use), after.waiting, after.queued) == (0, False, 0, 0)


@pytest.mark.anyio
async def test_stats_of_waiting(db: Any) -> None:
    """The time that callers waited is summed up."""
    before = db.stats().wait_seconds_total
    async with anyio.create_task_group() as group, held(db) as release:

        async def wait() -> None:
            async with db.transaction():
                await names(db)

        group.start_soon(wait)
        await waiting(db, 1)
        await anyio.sleep(0.05)
        release.set()
    assert 0.04 < db.stats().wait_seconds_total - before < HANGING


@pytest.mark.anyio
async def test_stats_before_the_first_use(make_db: Any) -> None:
    """Statistics of a pool that is not open are all zero, and asking opens nothing."""
    db = await make_db(schema=False)
    stats = db.stats()
    assert [getattr(stats, field) for field in FIELDS.split()] == [0] * 12
    assert db.stats().readers_open == 0


# --- closing ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_close_and_go_on(db: Any, engine: Engine) -> None:
    """After `close` no thread and no file is open; a second close does nothing; the next use opens again."""
    await add(db, "a")
    await db.close()
    await db.close()
    assert engine.open_files() == []
    await eventually(lambda: not worker_threads(), "no thread")
    assert await names(db) == ["a"]
    await engine.public.close_all()
    await engine.public.close_all()
    assert await names(db) == ["a"]


@pytest.mark.anyio
async def test_an_orderly_close_leaves_no_wal(db: Any, engine: Engine) -> None:
    """After close only the database file itself is left."""
    await add(db, "a")
    async with db.transaction(readonly=True):
        await names(db)
    await db.close()
    assert [file.name for file in engine.directory.iterdir()] == ["test.db"]


@pytest.mark.anyio
async def test_close_tells_those_who_wait(db: Any) -> None:
    """Waiters get PoolClosedError at once, not after their timeout."""

    async def wait() -> None:
        async with db.transaction():
            await names(db)

    results: list[Any] = []

    async def all_of_them() -> None:
        results.extend(await gather(wait, wait, lambda: add(db, "a"), lambda: db.run(print)))

    begun, closed = anyio.Event(), anyio.Event()

    async def holder() -> None:
        async with db.transaction():
            await names(db)
            begun.set()
            await closed.wait()

    holders: list[Any] = []

    async def hold() -> None:
        holders.extend(await gather(holder))

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(hold)
            await begun.wait()
            group.start_soon(all_of_them)
            await eventually(lambda: db.stats().waiting + db.stats().queued == 4)
            await db.close()
            closed.set()
    assert [type(result) for result in results] == [errors.PoolClosedError] * 4
    assert [type(result) for result in holders] == [errors.PoolClosedError]
    await usable(db)


@pytest.mark.anyio
@in_turn("what", ["write", "readonly", "stream"])
async def test_close_during_a_transaction(db: Any, engine: Engine, what: str) -> None:
    """What was open when the pool was closed gets PoolClosedError at its next step; nothing of it is
    committed.
    """
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(5000)])
    with pytest.raises(errors.PoolClosedError):
        if what == "stream":
            async with db.stream("SELECT * FROM item", chunk_size=10) as rows:
                async for _ in rows:
                    await db.close()
        else:
            async with db.transaction(readonly=what == "readonly"):
                await (names(db) if what == "readonly" else add(db, "x"))
                with db.detached():
                    await db.close()
                await names(db)
    assert engine.committed() == []
    await usable(db)


@pytest.mark.anyio
async def test_close_lets_running_work_finish(db: Any, engine: Engine) -> None:
    """Work that runs already when the pool is closed is drained: its callers get their answers."""
    count = SLOW_SELECT.replace("100000000", "300000")
    running = [threading.Event(), threading.Event()]
    results: list[Any] = []

    def read(connection: Any) -> int:
        running[0].set()
        return connection.execute(count).fetchone()[0]

    def write(connection: Any) -> int:
        running[1].set()
        return connection.execute(f"INSERT INTO jobs (name) {count}").rowcount

    async def both() -> None:
        results.extend(await gather(lambda: db.run(read, readonly=True), lambda: db.run(write)))

    async with anyio.create_task_group() as group:
        group.start_soon(both)
        await eventually(lambda: running[0].is_set() and running[1].is_set())
        with anyio.fail_after(HANGING):
            await db.close()
    assert results == [300000, 1]
    assert engine.committed() == ["300000"]
    await usable(db)


@pytest.mark.anyio
async def test_close_under_load(db: Any, engine: Engine) -> None:
    """Closing again and again while others work: each call succeeds or is told PoolClosedError, and nothing
    hangs.
    """
    done: list[str] = []

    async def work(name: str) -> None:
        async with db.transaction():
            await add(db, name)
        done.append(name)

    async def closer() -> None:
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
            await db.close()

    with anyio.fail_after(HANGING):
        results = await gather(closer, *[lambda n=n: work(f"{n:02}") for n in range(40)])
    assert not [result for result in results if result is not None and not isinstance(result, errors.PoolClosedError)]
    assert engine.committed() == sorted(done)
    await usable(db)


@pytest.mark.anyio
@pytest.mark.parametrize("as_starlette", [False, True], ids=["plain", "app"])
async def test_lifespan(make_db: Any, engine: Engine, as_starlette: bool) -> None:
    """`async with lifespan():` closes on the way out; `lifespan(app)` is what Starlette calls."""
    db = await make_db()
    app = object()
    async with engine.public.lifespan(app) if as_starlette else engine.public.lifespan():
        await add(db, "a")
        assert engine.open_files()
    assert engine.open_files() == []
    with pytest.raises(LookupError):
        async with engine.public.lifespan():
            await add(db, "b")
            raise LookupError
    assert engine.open_files() == []
    assert engine.committed() == ["a", "b"]


# --- configuring --------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_configure_while_open(db: Any, engine: Engine) -> None:
    """While pools are open `configure` is an error; after `close_all` the same handle follows the new
    settings.
    """
    await add(db, "a")
    other = engine.directory / "deeper" / "other.db"
    with pytest.raises(errors.ConfigurationError):
        engine.public.configure(engine.settings(path=str(other)))
    assert await names(db) == ["a"]
    await engine.public.close_all()
    engine.public.configure(engine.settings(path=str(engine.directory / "never.db")))
    engine.public.configure(engine.settings(path=str(other)))
    await db.execute_script(engine.schema)
    assert await names(db) == []
    assert other.exists()
    assert not (engine.directory / "never.db").exists()


def test_handles(configured: Any, engine: Engine) -> None:
    """`get_db` needs neither loop nor configuration, and gives the same object for the same name."""
    configured()
    db = get_db()
    assert db is get_db("default")
    assert db is engine.public.get_db()
    assert get_db("audit") is not db
    assert get_db("audit") is get_db("audit")
    assert not engine.open_files()


# --- event loops and threads --------------------------------------------------------------------------------


BACKENDS = ["asyncio", "trio"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_loop_after_the_other(configured: Any, engine: Engine, backend: str) -> None:
    """Run after run, without closing anything, each loop has its own pool, which closes when the loop
    ends.
    """
    configured()
    db = get_db()

    async def work(number: int) -> None:
        if number == 0:
            await db.execute_script(engine.schema)
        async with db.transaction():
            await add(db, str(number))
        assert len(await names(db)) == number + 1

    for number in range(5):
        anyio.run(work, number, backend=backend)
        deadline = time.monotonic() + 3
        while (worker_threads() or engine.open_files()) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.005)
        assert not worker_threads()
        assert not engine.open_files()
    assert len(engine.committed()) == 5


def test_asyncio_after_trio_after_asyncio(configured: Any, engine: Engine) -> None:
    """The handle that one kind of event loop has used works under the other."""
    configured()
    db = get_db()

    async def work(number: int) -> None:
        if number == 0:
            await db.execute_script(engine.schema)
        await add(db, str(number))

    for number in range(6):
        anyio.run(work, number, backend=BACKENDS[number % 2])
    assert engine.committed() == list("012345")


@pytest.mark.parametrize("other", BACKENDS)
def test_two_loops_in_two_threads(configured: Any, engine: Engine, other: str) -> None:
    """Two loops at once share a handle, each with a pool of its own, and lose nothing of each other's."""
    configured(busy_timeout=10_000)
    db = get_db()
    anyio.run(db.execute_script, engine.schema)
    together = threading.Barrier(2, timeout=10)
    failures: list[BaseException] = []

    async def work(name: str) -> None:
        await names(db)
        together.wait()
        assert db.stats().readers_open <= 2
        await gather(*[lambda n=n: add(db, f"{name} {n}") for n in range(20)])

        @transactional
        async def whole(number: int) -> None:
            await names(db)
            await add(db, f"{name} whole {number}")

        results = await gather(*[lambda n=n: whole(n) for n in range(20)])
        assert results == [None] * 20
        together.wait()
        assert len(await names(db)) == 80

    def run(backend: str, name: str) -> None:
        try:
            anyio.run(work, name, backend=backend)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=run, args=args) for args in ((BACKENDS[0], "one"), (other, "two"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert len(engine.committed()) == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_fork(configured: Any, engine: Engine) -> None:
    """A forked child opens a pool of its own and never touches what it inherited; the parent does not
    notice.
    """
    configured()
    db = get_db()
    opened, go_on = threading.Event(), threading.Event()

    async def parent() -> None:
        await db.execute_script(engine.schema)
        await add(db, "before")
        opened.set()
        while not go_on.is_set():
            await anyio.sleep(0.005)
        await add(db, "after")
        assert await names(db) == ["after", "before", "child"]

    failures: list[BaseException] = []

    def run() -> None:
        try:
            anyio.run(parent)
        except BaseException as error:
            failures.append(error)
            opened.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert opened.wait(10)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:

            async def child() -> None:
                assert db.stats().readers_open == 0
                with anyio.fail_after(HANGING):
                    assert await names(db) == ["before"]
                    async with db.transaction():
                        await add(db, "child")
                    await db.close()

            asyncio.run(child())
            gc.collect()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + HANGING
    result = (0, 0)
    while result[0] == 0 and time.monotonic() < deadline:
        result = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)
    if result[0] == 0:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    go_on.set()
    thread.join(10)
    assert result == (pid, 0)
    assert failures == []


# --- :memory: and odd paths ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_memory(make_db: Any, engine: Engine) -> None:
    """ ":memory:" is like a file: every task sees the same data, transactions are isolated, readers have
    snapshots.
    """
    db = await make_db(path=":memory:")
    await gather(*[lambda n=n: add(db, str(n)) for n in range(5)])
    assert await gather(*[lambda: names(db)] * 5) == [list("01234")] * 5
    with anyio.fail_after(HANGING):
        async with db.transaction():
            await add(db, "5")
            with db.detached():
                assert await names(db) == list("01234")
        async with db.transaction(readonly=True):
            assert len(await names(db)) == 6
            with db.detached():
                await add(db, "6")
                assert len(await names(db)) == 7
            assert len(await names(db)) == 6
            with pytest.raises(errors.ReadOnlyTransactionError):
                await add(db, "x")
        with pytest.raises(errors.IntegrityError):
            await add(db, "0")
    await usable(db)
    await db.close()
    with pytest.raises(errors.QueryExecutionError):
        await names(db)
    assert not Path(":memory:").exists()
    assert list(engine.directory.iterdir()) == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name", ["with space.db", "a?mode=ro.db", "a#b.db", "100%41.db", "작업 ü.db", "file:x.db", "a&b=c.db"]
)
async def test_odd_paths(make_db: Any, engine: Engine, name: str) -> None:
    """A path is a path, whatever letters are in it; its parents are created."""
    path = engine.directory / "new" / "er" / name
    db = await make_db(path=str(path))
    await add(db, "a")
    async with db.transaction(readonly=True):
        assert await names(db) == ["a"]
    assert path.exists()
    await db.close()
    assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("other", ["asyncio", "trio"])
def test_stats_from_elsewhere(configured: Any, engine: Engine, other: str) -> None:
    """Asked from a thread without a loop, or from a loop on which nobody uses the database, `stats()` gives the sums over
    its pools; asked from a loop that uses it, that loop's alone.
    """
    configured()
    db = get_db()
    found: dict[str, Any] = {}
    ready, leave = threading.Barrier(3), threading.Event()

    async def use(times: int) -> None:
        for _ in range(times):
            await db.fetch_value("SELECT 1")
        await anyio.to_thread.run_sync(ready.wait)
        found[f"own {times}"] = db.stats().statements_total
        await anyio.to_thread.run_sync(leave.wait)

    async def look() -> None:
        found["loop"] = db.stats().statements_total

    threads = [threading.Thread(target=anyio.run, args=(use, times)) for times in (3, 4)]
    for thread in threads:
        thread.start()
    try:
        ready.wait(20)
        found["thread"] = db.stats().statements_total
        found["readers"] = db.stats().readers_open
        anyio.run(look, backend=other)
        while len(found) < 5:
            time.sleep(0.001)
    finally:
        leave.set()
        for thread in threads:
            thread.join(20)
    assert found.pop("readers") >= 2  # one for each loop; a shared connection that is slow calls for another
    assert found == {"own 3": 3, "own 4": 4, "thread": 7, "loop": 7}
    assert db.stats() == type(db.stats())()
