"""Reads within transactions on the event loop's own thread: `inline_reads: true`."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional_readonly
from database.driver import inline
from database.driver import quick as texts
from database.sqlite3.connection import Connection
from tests.contract.support import add, collected, errors, eventually, gather, idle, on_asyncio
from tests.driver.inline_test import NAME, counted_turns, quick

pytestmark = pytest.mark.anyio

WHERE = "SELECT name FROM jobs WHERE id = ?"
COUNT = "SELECT count(*) FROM jobs"


@pytest.fixture
def engine(tmp_path: Any) -> Any:
    """SQLite: a server has nothing to be asked inline."""
    from tests.conftest import alone

    with alone("sqlite3", tmp_path) as engine:
        yield engine


@pytest.fixture
async def db(make_db: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(texts, "BUDGET", 0.02)  # see `inline_test`
    db = await make_db(inline_reads=True)
    for name in "abc":
        await add(db, name)
    return db


class Watched:
    """On which thread statements begin, by what SQLite tells of it."""

    def __init__(self, db: Any) -> None:
        self.threads: list[tuple[str, bool]] = []
        self.loop = threading.current_thread()
        pool = db.pool()
        for worker in (pool.writer, *pool.readers()):
            if worker.connection is not None:
                sqlite3.Connection.set_trace_callback(worker.connection.raw, self.hear)

    def hear(self, sql: str) -> None:
        self.threads.append((sql.split()[0], threading.current_thread() is self.loop))

    def take(self) -> list[tuple[str, bool]]:
        found, self.threads = self.threads, []
        return found


async def known(db: Any, *texts: str) -> None:
    """Until these are known as quick."""
    for text in texts:
        for _ in range(4):
            await db.fetch_value(text, (1,) if "?" in text else None)
    await eventually(lambda: db.pool().reads.resident is not None and db.pool().reads.resident.resting)


async def test_a_read_only_transaction_needs_no_worker(db: Any, engine: Any) -> None:
    """BEGIN, reads and COMMIT run on the loop's thread, on one snapshot; the reader goes back, and is counted."""
    await known(db, NAME, COUNT)
    watched = Watched(db)
    before = db.stats()
    async with db.transaction(readonly=True):
        assert await db.fetch_value(COUNT) == 3
        assert db.stats().readers_in_use == 1
        outside = sqlite3.connect(engine.path(), isolation_level=None)
        outside.execute("INSERT INTO jobs (name) VALUES ('outside')")
        outside.close()
        assert await db.fetch_value(COUNT) == 3
        assert tuple(await db.fetch_one(NAME, (2,))) == ("b",)
    assert watched.take() == [("BEGIN", True), *[("SELECT", True)] * 3, ("COMMIT", True)]
    after = db.stats()
    assert await db.fetch_value(COUNT) == 4
    assert after.inline_total - before.inline_total == 3
    assert after.statements_total - before.statements_total == 3
    assert (after.acquired_total - before.acquired_total, after.commits_total - before.commits_total) == (1, 1)
    assert after.readers_in_use == 0
    with pytest.raises(ZeroDivisionError):
        async with db.transaction(readonly=True):
            await db.fetch_value(COUNT)
            raise ZeroDivisionError
    assert ("ROLLBACK", True) in watched.take()
    await idle(db)


async def test_selects_of_a_write_transaction(db: Any, engine: Any) -> None:
    """They see what the transaction has written, run on the loop's thread, and writes stay with the writer."""
    await known(db, NAME, COUNT)
    watched = Watched(db)
    async with db.transaction():
        await add(db, "d")
        await eventually(lambda: db.pool().writer.resting)
        assert await db.fetch_value(COUNT) == 4
        assert await db.fetch_value(NAME, (4,)) == "d"
        async with db.transaction():
            await add(db, "never")
            await eventually(lambda: db.pool().writer.resting)
            assert await db.fetch_value(COUNT) == 5
            await db.rollback()
            assert await db.fetch_value(COUNT) == 4  # with the controls, on the worker
    found = watched.take()
    assert all(not here for verb, here in found if verb != "SELECT")
    assert sum(here for _, here in found) == 3
    assert engine.committed() == ["a", "b", "c", "d"]


async def test_what_hands_over(db: Any, engine: Any) -> None:
    """What is not for the loop's thread goes on with the same snapshot on the reader's, and everything behind it."""
    await known(db, NAME, COUNT)
    steps = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < ?) SELECT count(*) FROM c"
    await known(db, steps)

    async def unknown() -> None:
        assert await db.fetch_value("SELECT count(*) AS never_seen FROM jobs") == 3

    async def slow() -> None:
        assert await db.fetch_value(steps, (300_000,)) == 300_000

    async def stream() -> None:
        async with db.stream(WHERE.replace("= ?", "> 0")) as rows:
            assert [row[0] async for row in rows] == ["a", "b", "c"]

    async def unit() -> None:
        assert await db.run(lambda connection: connection.execute(COUNT).fetchone()[0], readonly=True) == 3

    async def write() -> None:
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "refused")

    async def hidden_write() -> None:
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.fetch_value("PRAGMA user_version = 3")

    async def error() -> None:
        with pytest.raises(errors.QueryExecutionError):
            await db.fetch_value(NAME, (object(),))

    async def mine() -> None:
        def refuse(**_: Any) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await db.fetch_one(NAME, (1,), record_class=refuse)

    for hand_over in (unknown, slow, stream, unit, write, hidden_write, error, mine):
        begun = db.stats()
        async with db.transaction(readonly=True):
            assert await db.fetch_value(COUNT) == 3
            outside = sqlite3.connect(engine.path(), isolation_level=None)
            outside.execute("INSERT INTO jobs (name) VALUES ('outside')")
            await hand_over()
            assert await db.fetch_value(COUNT) == 3, hand_over
            assert await db.fetch_value(NAME, (3,)) == "c"
            outside.execute("DELETE FROM jobs WHERE name = 'outside'")
            outside.close()
        ended = db.stats()
        assert ended.acquired_total - begun.acquired_total == 1, hand_over
        assert ended.commits_total - begun.commits_total == 1, hand_over
        await idle(db)
    assert engine.committed() == ["a", "b", "c"]


@pytest.mark.any_loop
async def test_what_was_slow_is_not_tried_again(db: Any) -> None:
    """A text that has had to be stopped on the loop's thread goes to the worker at once from then on."""
    steps = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < ?) SELECT count(*) FROM c"
    for transaction in (False, True):
        await known(db, COUNT, text := f"{steps} -- {transaction}")
        watched = Watched(db)
        for expected in ([True, False], [False]):
            async with db.transaction(readonly=True) if transaction else contextlib.nullcontext():
                if transaction:
                    await db.fetch_value(COUNT)
                watched.take()
                assert await db.fetch_value(text, (300_000,)) == 300_000
                assert [here for verb, here in watched.take() if verb == "WITH"] == expected
            await idle(db)
            await eventually(lambda: all(worker.resting for worker in db.pool().readers()))


async def test_more_than_may_wait_for_the_next_turn(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds no room where requests wait for the loop's next turn is handed to workers; everybody is answered."""
    monkeypatch.setattr(inline, "TURN", 1e-9)
    monkeypatch.setattr(inline, "QUEUE", 1)
    await known(db, NAME, COUNT)
    most = 0

    async def ask(number: int) -> list[Any]:
        nonlocal most
        found = []
        async with db.transaction(readonly=True):
            for _ in range(3):
                found.append(await db.fetch_value(NAME, (number % 3 + 1,)))
                most = max(most, len(db.pool().inline.queue))
        return found

    found = await gather(*[lambda n=n: ask(n) for n in range(12)])
    assert found == [["abc"[number % 3]] * 3 for number in range(12)]
    assert most <= 1
    await idle(db)


async def test_a_transaction_that_is_gone(db: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a failing read has rolled the transaction back, it is doomed, although a second run would succeed."""
    await known(db, COUNT)
    loop, original = threading.current_thread(), Connection.fetch_value

    def fetch_value(self: Any, *arguments: Any) -> Any:
        if threading.current_thread() is loop:
            self.rollback()  # what SQLite does by itself after some errors
            raise sqlite3.OperationalError("disk I/O error")
        return original(self, *arguments)

    monkeypatch.setattr(Connection, "fetch_value", fetch_value)
    with pytest.raises(errors.TransactionError):
        async with db.transaction():
            await add(db, "first")
            await eventually(lambda: db.pool().writer.resting)
            with pytest.raises(errors.QueryExecutionError, match="disk I/O"):
                await db.fetch_value(COUNT)
            with pytest.raises(errors.TransactionError):
                await add(db, "second")
    assert engine.committed() == ["a", "b", "c"]
    await idle(db)


@on_asyncio  # whose tasks run in the order in which they were started
async def test_order(db: Any) -> None:
    """What tasks of one transaction hand over is executed in that order, on whichever thread."""
    await known(db, NAME, COUNT)
    for _ in range(30):
        async with db.transaction():
            await db.fetch_value(COUNT)  # it has its connection
            found: list[int] = []
            requests = [
                db.execute("INSERT INTO jobs (name) VALUES ('d')"),
                db.fetch_value(COUNT),
                db.execute("INSERT INTO jobs (name) VALUES ('e')"),
                db.fetch_value(COUNT),
            ]

            async def each(number: int) -> None:
                if answer := await requests[number]:  # noqa: B023
                    found.append(answer if isinstance(answer, int) else 0)  # noqa: B023

            await gather(*[lambda n=n: each(n) for n in range(4)])
            assert [answer for answer in found if answer] == [4, 5]
            assert await db.fetch_value(COUNT) == 5
            await db.rollback()


async def test_many_transactions_together(db: Any) -> None:
    """More than there are readers: each gets its own answers, in one snapshot, and nobody starves."""
    await known(db, NAME)

    @transactional_readonly
    async def ask(number: int) -> list[Any]:
        return [tuple(await db.fetch_one("SELECT ? AS number, ? AS turn", (number, turn))) for turn in range(5)]

    for tasks in (1, 3, 20):

        async def work(number: int) -> list[Any]:
            return [await ask(number) for _ in range(6)]

        async with counted_turns() as turns:
            found = await gather(*[lambda n=n: work(n) for n in range(tasks)])
        assert found == [[[(n, t) for t in range(5)]] * 6 for n in range(tasks)]
        assert turns
    assert db.stats().inline_total > 100
    await idle(db)


async def test_others_have_their_turn(db: Any) -> None:
    """A transaction that does nothing but read does not keep the loop for itself."""
    await known(db, NAME)
    async with counted_turns() as turns, db.transaction(readonly=True):
        for _ in range(600):
            await db.fetch_value(NAME, (1,))
    assert len(turns) > 10


async def test_cancelled_while_it_waits_for_the_next_turn(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind: neither a reader that is booked, nor a transaction that begins for nobody."""
    monkeypatch.setattr(inline, "TURN", 1e-9)
    monkeypatch.setattr(inline, "HARD_TURN", 1e-9)
    monkeypatch.setattr(inline, "ALONE", 0.0)
    await known(db, NAME)
    for reads in (0, 1, 2):
        for _ in range(10):
            with anyio.CancelScope() as scope:

                async def cancel() -> None:
                    scope.cancel()  # noqa: B023

                async with anyio.create_task_group() as group:
                    group.start_soon(cancel)
                    await db.fetch_value(NAME, (1,))  # the turn is used up
                    async with db.transaction(readonly=True):
                        for _ in range(reads + 1):
                            await db.fetch_value(NAME, (1,))
        await idle(db)
        assert not db.pool().transactions
        assert not db.pool().inline.queue
    await quick(db, 3)


async def test_closing_ends_what_sleeps(db: Any) -> None:
    """A pool closes under a transaction that holds a sleeping reader."""
    await known(db, NAME)
    with pytest.raises(errors.PoolClosedError):
        async with db.transaction(readonly=True):
            await db.fetch_value(NAME, (1,))
            with db.detached():
                await db.close()
            await db.fetch_value(NAME, (1,))
    assert not db.pool().transactions
    await known(db, NAME)


async def test_exhaustion_names_who_holds_a_sleeping_reader(make_db: Any) -> None:
    """The report says what was begun where, since when; and the reader is free again behind it."""
    db = await make_db(inline_reads=True, pool_size=1)
    await add(db, "a")
    await known(db, NAME)
    timeout, db.pool().timeout = db.pool().timeout, 0.05
    async with db.transaction(readonly=True):
        await db.fetch_value(NAME, (1,))
        with db.detached(), pytest.raises(errors.ConnectionPoolExhaustedError, match="inline_transactions_test"):
            await db.fetch_value(NAME, (1,))
        db.pool().timeout = timeout
        assert await db.fetch_value(NAME, (1,)) == "a"
    await quick(db, 0)
    assert await db.fetch_value(NAME, (1,)) == "a"


async def test_a_vanished_task(db: Any) -> None:
    """A transaction that is thrown away open gives its sleeping reader back."""
    await known(db, NAME)

    async def forget() -> None:
        await db.transaction(readonly=True).__aenter__()
        await db.fetch_value(NAME, (1,))

    for _ in range(4):
        async with anyio.create_task_group() as group:
            group.start_soon(forget)
        await collected(lambda: not db.pool().transactions and not db.stats().readers_in_use)


async def test_records_are_not_written_on_the_loop(db: Any) -> None:
    """Where somebody hears of transactions, they are told by the worker's thread, as always."""
    await known(db, NAME)
    heard: list[tuple[str, str]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.getMessage(), threading.current_thread().name))

    logger = logging.getLogger("database.transaction")
    logger.addHandler(Handler())
    logger.setLevel(logging.INFO)
    async with db.transaction(readonly=True):
        await db.fetch_value(NAME, (1,))
    await eventually(lambda: heard)
    (message, thread), *_ = heard
    assert "committed" in message
    assert "reader" in thread


async def test_room_is_respected(db: Any) -> None:
    """While new snapshots are held back, a transaction waits on its worker, and the loop does not."""
    await known(db, NAME)
    room = db.pool().room
    room._hold()
    try:
        async with counted_turns() as turns, db.transaction(readonly=True):
            before = db.stats().inline_total
            assert await db.fetch_value(NAME, (1,)) == "a"
            assert db.stats().inline_total == before
        assert turns
    finally:
        room._let_go()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
async def test_fork_under_a_sleeping_reader(db: Any) -> None:
    """The parent's transaction goes on; in the child it has ended, as any transaction."""
    await known(db, NAME)
    async with db.transaction(readonly=True):
        await db.fetch_value(NAME, (1,))
        pool = db.pool()
        (lease,) = pool.transactions
        pid = os.fork()
        if pid == 0:
            os._exit(0 if pool.closed and lease.ended else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert await db.fetch_value(NAME, (2,)) == "b"
    await idle(db)
    assert await db.fetch_value(NAME, (2,)) == "b"


async def test_a_snapshot_that_stays_is_reported(make_db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Who pins the log is named, also where no worker is awake."""
    db = await make_db(inline_reads=True, logging={"long_read_s": 0.02})
    await add(db, "a")
    await known(db, NAME)
    async with db.transaction(readonly=True):
        await db.fetch_value(NAME, (1,))
        await eventually(lambda: any("inline_transactions_test" in each.getMessage() for each in caplog.records))
