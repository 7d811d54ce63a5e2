"""Lives of pools, streams and transactions: closed under load, thrown away, forgotten, on many loops at once."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import get_db, transactional
from database.driver.wakeup import on_trio
from tests.contract.support import (
    HANGING,
    SLOW_ROWS,
    SLOW_SELECT,
    Engine,
    add,
    collected,
    errors,
    eventually,
    gather,
    in_turn,
    is_idle,
    names,
    stopped,
    usable,
    worker_threads,
)
from tests.robustness.support import Program

pytestmark = pytest.mark.anyio


def texts(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger]


# --- closing ------------------------------------------------------------------------------------------------


@in_turn("work", ["read", "write", "many", "run", "offload", "stream"])
async def test_close_drains_until_its_deadline(db: Any, engine: Engine, work: str) -> None:
    """A statement that runs when the pool is closed may go on for `drain` seconds, then it is interrupted and its
    caller told; waiters are told at once, and nothing of the interrupted work is kept.
    """

    @transactional(offload=True)
    async def offloaded() -> None:
        await add(db, "undone")
        await db.fetch_value(SLOW_SELECT)

    async def stream() -> None:
        async with db.stream(SLOW_ROWS) as rows:
            async for _ in rows:
                pass

    slow: Any = {
        "read": lambda: db.fetch_value(SLOW_SELECT),
        "write": lambda: db.execute("INSERT INTO item (value) " + SLOW_SELECT),
        "many": lambda: db.execute_many("INSERT INTO item (value) VALUES (?)", ((n,) for n in range(10**9))),
        "run": lambda: db.run(lambda connection: connection.execute(SLOW_SELECT).fetchall()),
        "offload": offloaded,
        "stream": stream,
    }[work]
    results: list[Any] = []

    async def run() -> None:
        results.extend(await gather(slow))

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await eventually(lambda: db.stats().readers_in_use or db.stats().writer_in_use)
            await anyio.sleep(0.02)
            began = time.monotonic()
            with stopped():
                await db.close(drain=0.1)
            took = time.monotonic() - began
            await db.close()  # a second close is nothing
    assert work == "stream" or took > 0.09, "it was not drained"  # streams, like transactions, end at once
    assert [type(each) for each in results] == [errors.PoolClosedError]
    assert engine.committed() == []
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]
    await usable(db)


async def test_close_finishes_what_is_quick(db: Any, engine: Engine) -> None:
    """What ends by itself within the drain time gets its answer, the rest PoolClosedError: never neither nor both."""
    answered: list[Any] = []

    async def write(number: int) -> None:
        answered.append((number, (await gather(lambda: add(db, f"{number:03}")))[0]))

    async with anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(write, number)
        await eventually(lambda: len(answered) > 0)
        await db.close()
    kinds = {type(result) for _, result in answered}
    assert kinds <= {type(None), errors.PoolClosedError}
    assert len(answered) == 200
    assert engine.committed() == sorted(f"{number:03}" for number, result in answered if result is None)
    await usable(db)


async def test_close_gives_up_on_a_function_that_cannot_be_stopped(
    db: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that blocks the worker's thread in Python hangs neither `close` nor the next pool; the log names it."""
    monkeypatch.setattr("database.driver.pool.JOIN_SECONDS", 0.05)
    entered, release = threading.Event(), threading.Event()

    def stubborn(_connection: Any) -> None:
        entered.set()
        release.wait(10)

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(db.run, stubborn)
            await anyio.to_thread.run_sync(entered.wait, 5)
            with anyio.fail_after(HANGING):
                await db.close(drain=0.05)
            group.cancel_scope.cancel()
        assert await names(db) == []
    finally:
        release.set()
    await eventually(
        lambda: any(
            "cannot be closed" in text and "db.run(test_close" in text for text in texts(caplog, "database.pool")
        )
    )


@in_turn("times", range(3))
async def test_close_under_load_loses_nothing(db: Any, engine: Engine, times: int) -> None:
    """Writers on all paths while the pool is closed again and again: what was answered is there, what was refused
    is not.
    """
    done: set[str] = set()
    refused: set[str] = set()

    async def whole(name: str) -> None:
        async with db.transaction():
            await add(db, name)

    paths: list[Any] = [
        lambda name: add(db, name),
        whole,
        lambda name: transactional(offload=True)(add)(db, name),
        lambda name: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES (?)", (name,))),
    ]
    stop = False

    async def writer(number: int) -> None:
        step = 0
        while not stop:
            name = f"{number}.{step}"
            step += 1
            try:
                await paths[number % 4](name)
                done.add(name)
            except errors.PoolClosedError:
                refused.add(name)
            await anyio.sleep(0)

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(writer, number)
            for _ in range(8):
                await anyio.sleep(0.01)
                await db.close()
            stop = True
    found = set(engine.committed())
    assert done <= found
    assert not refused & found
    assert done
    assert refused
    await usable(db)


@in_turn("readonly", [False, True], ids=["writing", "reading"])
async def test_closing_hits_no_stranger(db: Any, readonly: bool) -> None:
    """A transaction whose worker has ended it is forgotten; closing the pool does not stop whatever runs there now."""
    for _ in range(5):
        with anyio.move_on_after(0.02):
            async with db.transaction(readonly=readonly):
                await db.fetch_value(SLOW_SELECT)
    await eventually(lambda: is_idle(db))
    assert not db.pool().transactions
    bounded = SLOW_SELECT.replace("100000000", "500000")
    found: list[Any] = []

    async def stranger() -> None:
        if readonly:
            found.append(await db.fetch_value(bounded))
        else:
            found.append((await db.execute(f"INSERT INTO item (value) {bounded}")).rowcount)

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(stranger)
            await eventually(lambda: db.stats().readers_in_use if readonly else db.stats().writer_in_use)
            await anyio.sleep(0.02)
            await db.close()
    assert found == [500000 if readonly else 1]


# --- thrown away --------------------------------------------------------------------------------------------


async def thrown_away(caplog: pytest.LogCaptureFixture, number: int) -> list[str]:
    """The warnings of what was thrown away open, which are so many. (On a busy machine there may be some of slow ones.)"""

    def found() -> list[str]:
        return [text for text in texts(caplog, "database.transaction") if "thrown away open" in text]

    await eventually(lambda: len(found()) == number)
    return found()


@pytest.mark.filterwarnings(
    "ignore:Async generator:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # trio's word on it
async def test_a_stream_thrown_away(db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A stream that was begun and is garbage gives its reader back; a warning says where it was opened."""

    async def forget() -> None:
        stream = db.stream(SLOW_ROWS)
        await stream.__aenter__()
        await anext(stream)

    for _ in range(4):  # more than there are readers
        with anyio.fail_after(HANGING):
            await forget()
        await collected(lambda: is_idle(db), "the reader is back")
    assert all("lifetimes_test.py" in text for text in await thrown_away(caplog, 4))
    await usable(db)


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio's word on it
async def test_an_abandoned_generator(db: Any) -> None:
    """An asynchronous generator around a stream that is left early closes it, at the latest when it is collected."""

    async def rows() -> Any:
        async with db.stream(SLOW_ROWS) as stream:
            async for row in stream:
                yield row

    async def first() -> Any:
        async for row in rows():
            return row[0]
        return None

    for _ in range(4):
        with anyio.fail_after(HANGING):
            assert await first() == 1
        await collected(lambda: is_idle(db), "the reader is back")
    await usable(db)


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
async def test_a_transaction_thrown_away(
    db: Any, engine: Engine, readonly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction whose task is gone without leaving its block is rolled back, and a warning says where it began."""

    async def forget() -> None:
        await db.transaction(readonly=readonly).__aenter__()
        if readonly:
            await names(db)
        else:
            await add(db, "undone")

    for _ in range(3):
        async with anyio.create_task_group() as group:
            group.start_soon(forget)
        with anyio.fail_after(HANGING):
            await collected(lambda: is_idle(db), "the connection is back")
    assert engine.committed() == []
    found = await thrown_away(caplog, 3)
    assert all("lifetimes_test.py" in text for text in found)
    await usable(db)


# --- readers that pin the WAL -------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["transaction", "stream", "statement"])
async def test_a_long_reader_is_named(make_db: Any, reader: str, caplog: pytest.LogCaptureFixture) -> None:
    """A reader older than `logging.long_read_s` is warned about, once, by name, while it still reads."""
    db = await make_db(logging={"long_read_s": 0.05})

    async def hold() -> None:
        if reader == "transaction":
            async with db.transaction(readonly=True):
                await names(db)
                await anyio.sleep(60)
        elif reader == "stream":
            async with db.stream(SLOW_ROWS) as rows:
                await anext(rows)
                await anyio.sleep(60)
        else:
            await db.fetch_value(SLOW_SELECT)

    def warnings() -> list[str]:
        return [text for text in texts(caplog, "database.pool") if "kept its snapshot" in text]

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await eventually(warnings)
        await anyio.sleep(0.15)
        group.cancel_scope.cancel()
    (text,) = warnings()
    assert ("WITH RECURSIVE" if reader == "statement" else "lifetimes_test.py") in text
    async with db.transaction(readonly=True):
        await names(db)
    await anyio.sleep(0.1)
    assert len(warnings()) == 1, "a quick reader was warned about"


async def test_no_warning_where_none_is_wanted(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """`long_read_s: null` warns about nobody."""
    db = await make_db(logging={"long_read_s": None})
    async with db.transaction(readonly=True):
        await names(db)
        await anyio.sleep(0.1)
    assert texts(caplog, "database.pool") == []


@pytest.mark.any_loop
async def test_the_wal_stays_small_under_load(make_db: Any, engine: Engine) -> None:
    """While readers come and go without a pause, each ending, the WAL is reset now and then: it does not grow with
    what is written.
    """
    db = await make_db(pool_size=4)
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [("x" * 1000,)] * 500)
    stop = False
    written = 0
    largest = 0

    async def read() -> None:
        while not stop:
            async with db.transaction(readonly=True):
                await db.fetch_value("SELECT count(*) FROM item")
                await db.fetch_value("SELECT sum(length(value)) FROM item")

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(read)
        while written * 1000 / 4096 <= 4000:
            result = await db.execute("UPDATE item SET value = value || '' WHERE id % 7 = ?", (written % 7,))
            written += result.rowcount
            largest = max(largest, Path(f"{engine.path()}-wal").stat().st_size)
        stop = True
    pages = written * 1000 / 4096
    assert largest < max(30_000_000, pages * 4096 / 2), f"{largest:,} bytes of WAL after {written:,} rows"


# --- many loops ---------------------------------------------------------------------------------------------


def test_many_runs_in_a_row(configured: Any, engine: Engine) -> None:
    """Sixty loops, one after the other, of all kinds, leave no thread, no descriptor and no memory behind."""
    configured()
    db = get_db()
    anyio.run(db.execute_script, engine.schema)

    async def work(number: int) -> None:
        await add(db, str(number))
        await names(db)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    for number in range(60):
        anyio.run(work, number, backend=("asyncio", "trio")[number % 2])
        if number == 10:
            gc.collect()
            before = descriptors()
    gc.collect()
    assert not worker_threads()
    assert descriptors() <= before
    assert len(engine.committed()) == 60


def test_two_loops_one_closing_all_the_time(configured: Any, engine: Engine) -> None:
    """While one loop opens and closes its pool again and again, the other one's commits are all there."""
    configured(busy_timeout=10_000)
    db = get_db()
    anyio.run(db.execute_script, engine.schema)
    stop = threading.Event()
    failures: list[BaseException] = []

    async def write() -> int:
        count = 0
        until = time.monotonic() + 1
        while time.monotonic() < until:
            await gather(*[lambda n=n: add(db, f"writer {count}.{n}") for n in range(5)])
            count += 1
        return count * 5

    async def close_again_and_again() -> int:
        count = 0
        while not stop.is_set():
            async with db.transaction():
                await add(db, f"closer {count}")
            await names(db)
            await db.close()
            count += 1
        return count

    counts: dict[str, int] = {}

    def run(name: str, function: Any, backend: str) -> None:
        try:
            counts[name] = anyio.run(function, backend=backend)
        except BaseException as error:
            failures.append(error)
        finally:
            stop.set()

    threads = [
        threading.Thread(target=run, args=("writer", write, "asyncio")),
        threading.Thread(target=run, args=("closer", close_again_and_again, "trio")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert len(engine.committed()) == sum(counts.values())
    assert min(counts.values()) > 3
    assert engine.outside("PRAGMA integrity_check") == [("ok",)]


def test_a_memory_database_that_one_loop_cannot_open(configured: Any, engine: Engine) -> None:
    """The failure of one loop's pool to open `:memory:` takes nothing from another loop that uses it."""
    script = engine.directory / "init.sql"
    script.write_text("CREATE TABLE IF NOT EXISTS t (x);")
    configured(path=":memory:", init_sql=str(script))
    db = get_db()
    opened, failed = threading.Event(), threading.Event()
    results: list[Any] = []

    async def keep() -> None:
        await db.execute("INSERT INTO t VALUES ('kept')")
        opened.set()
        await anyio.to_thread.run_sync(failed.wait, 10)
        await db.close()
        results.append("closed")

    async def look() -> None:
        results.append(await db.fetch_value("SELECT count(*) FROM t"))

    thread = threading.Thread(target=anyio.run, args=(keep,))
    thread.start()
    assert opened.wait(10)
    script.write_text("CREATE TABLE nonsense (;")
    for _ in range(3):
        with pytest.raises(errors.ConnectionFailedError):
            anyio.run(look)
    script.write_text("CREATE TABLE IF NOT EXISTS t (x);")
    anyio.run(look)
    failed.set()
    thread.join(10)
    assert results == [1, "closed"]


# --- the layout that keeps clear of SQLite's bug ------------------------------------------------------------


async def test_only_the_writer_checkpoints(db: Any) -> None:
    """Readers are `mode=ro`: none of them can write, nor checkpoint, whatever is asked of it on the raw connection."""

    def checkpoint(connection: Any) -> Any:
        connection.set_authorizer(None)
        return connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def write(connection: Any) -> None:
        connection.set_authorizer(None)
        connection.execute("PRAGMA query_only = OFF")
        connection.execute("INSERT INTO item (value) VALUES ('never')")

    await db.execute("INSERT INTO item (value) VALUES ('a')")
    with pytest.raises((errors.QueryExecutionError, errors.ReadOnlyTransactionError)):
        await db.run(write, readonly=True)
    with contextlib.suppress(errors.DatabaseError):
        assert tuple(await db.run(checkpoint, readonly=True)) != (0, 0, 0), "a reader has checkpointed"
    assert await db.fetch_value("SELECT count(*) FROM item") == 1


@pytest.mark.parametrize("version", [(3, 40, 1), (3, 51, 2), (3, 51, 3)])
def test_the_startup_check_warns_once(tmp_path: Path, version: tuple[int, int, int]) -> None:
    """A SQLite with the WAL-reset bug is warned about once a process, however many databases and loops; a mended one
    is not.
    """
    code = f"""
    import logging, sqlite3
    sqlite3.sqlite_version_info = {version}
    records = []
    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())
    logging.getLogger("database.pool").addHandler(Handler())
    settings["databases"] = {{"other": {{"path": sys.argv[1] + "2"}}}}
    configure({{"database": {{"sqlite": settings}}}})
    async def main():
        await db.fetch_value("SELECT 1")
        await get_db("other").fetch_value("SELECT 1")
    anyio.run(main)
    anyio.run(main, backend="trio")
    say(len([text for text in records if "WAL-reset" in text]), len(records))
    """
    ended = Program(code, tmp_path / "test.db").end().ok()
    assert ended.out == ("1 1\n" if version < (3, 51, 3) else "0 0\n")
    assert ended.err == ""


# --- garbage ------------------------------------------------------------------------------------------------


@in_turn("work", ["statement", "interactive", "nested", "offload", "manual", "stream", "rolled back"])
async def test_leaves_nothing_to_the_garbage_collector(db: Any, work: str) -> None:
    """What a call has used is freed when it returns: nothing of it refers to itself, so the collector has no work."""

    numbers = itertools.count()

    @transactional
    async def interactive() -> None:
        await add(db, str(next(numbers)))
        await names(db)

    @transactional
    async def nested() -> None:
        await add(db, str(next(numbers)))
        await interactive()

    @transactional(offload=True)
    async def offloaded() -> None:
        await add(db, str(next(numbers)))
        await interactive()

    async def manual() -> None:
        await db.begin()
        await add(db, str(next(numbers)))
        await db.commit()

    async def stream() -> None:
        async with db.stream("SELECT id FROM jobs") as rows:
            async for _ in rows:
                pass

    async def rolled_back() -> None:
        await db.begin()
        await add(db, str(next(numbers)))
        await db.rollback()

    works: dict[str, Any] = {
        "statement": lambda: add(db, str(next(numbers))), "interactive": interactive, "nested": nested, "offload": offloaded,
        "manual": manual, "stream": stream, "rolled back": rolled_back,
    }  # fmt: skip
    ours = ("database.",)
    for _ in range(3):
        await works[work]()
    await eventually(lambda: is_idle(db))
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(20):
            await works[work]()
        await eventually(lambda: is_idle(db))
        gc.collect()
        found = {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith(ours)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert found == set()


async def test_trio_of_another_making(db: Any, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should trio change what a waiting task yields, its own function is used, and cancellation works all the same."""
    if anyio_backend[0] != "trio":
        pytest.skip("trio only")
    await db.open()
    lowlevel = on_trio._TrioRequest.lowlevel
    assert on_trio._find_trap(lowlevel) is on_trio._TrioRequest.wait is not None

    class Trap:
        def __init__(self, abort: Any) -> None:
            self.abort = abort

    class Other:
        Abort = lowlevel.Abort

        @staticmethod
        async def wait_task_rescheduled(abort: Any) -> None:
            await Yielded(Trap(abort))

    class Yielded:
        def __init__(self, what: Any) -> None:
            self.what = what

        def __await__(self) -> Any:
            yield self.what

    assert on_trio._find_trap(Other) is None
    monkeypatch.setattr(on_trio._TrioRequest, "wait", None)
    await add(db, "a")
    with anyio.move_on_after(0.05) as scope:
        await db.fetch_value(SLOW_SELECT)
    assert scope.cancelled_caught
    assert await names(db) == ["a"]
