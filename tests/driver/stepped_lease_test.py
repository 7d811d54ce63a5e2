"""Transactions on a server whose statements are sent and received by the event loop's own thread."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import select
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest

from database import transactional
from database.driver import stepped_lease
from database.driver.wakeup.sight import Sight
from database.postgresql.plan import Plan
from database.postgresql.wire import Wire
from tests.contract.support import HANGING, add, case, errors, eventually, gather, idle, names, on_asyncio, usable
from tests.postgresql.engine import PostgresqlEngine
from tests.postgresql.proxy import Proxy
from tests.postgresql.server import shared

pytestmark = pytest.mark.anyio

COUNT = "SELECT count(*) FROM jobs"
WAITS = "SELECT pid FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
PID = "SELECT pg_backend_pid()"


@pytest.fixture
def engine(tmp_path: Any) -> Iterator[PostgresqlEngine]:
    """PostgreSQL: SQLite has no socket to be waited for."""
    from tests.conftest import alone

    with alone("postgresql", tmp_path) as engine:
        yield engine  # type: ignore[misc]


@pytest.fixture
def proxy(engine: PostgresqlEngine) -> Iterator[Proxy]:
    proxy = Proxy(shared())
    yield proxy
    proxy.close()


class Watched:
    """On which thread answers are received, by what every receiving begins with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = threading.current_thread()
        self.here = self.elsewhere = 0
        received = Wire._received

        def hear(wire: Any, result: Any) -> Any:
            if threading.current_thread() is self.loop:
                self.here += 1
            else:
                self.elsewhere += 1
            return received(wire, result)

        monkeypatch.setattr(Wire, "_received", hear)

    def take(self) -> tuple[bool, bool]:
        """Whether there was any, here and elsewhere."""
        found = self.here > 0, self.elsewhere > 0
        self.here = self.elsewhere = 0
        return found


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Has each call of that function, of one argument, add the argument to the list."""
    calls: list[Any] = []
    function = getattr(owner, name)

    def call(argument: Any) -> None:
        calls.append(argument)
        function(argument)

    monkeypatch.setattr(owner, name, call)
    return calls


async def warm(db: Any) -> None:
    """Its connection is open, and its worker rests; what these statements do is known."""
    for _ in range(2):
        async with db.transaction():
            await add(db, "warm")
            await db.fetch_value(COUNT)
            await db.execute("DELETE FROM jobs")
    await rests(db)


async def rests(db: Any) -> None:
    await idle(db)
    await eventually(lambda: all(worker.resting for worker in db.pool().readers()), "the worker rests")


@pytest.fixture
async def db(make_db: Any) -> Any:
    db = await make_db(pool_size=1)
    await warm(db)
    return db


@pytest.fixture
def watched(db: Any, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


async def test_no_worker_is_woken(db: Any, engine: PostgresqlEngine, watched: Watched) -> None:
    """BEGIN, statements, nested levels and COMMIT; what is counted is what was done."""
    before = db.stats()
    async with db.transaction():
        await add(db, "a")
        async with db.transaction():
            await add(db, "b")
        with pytest.raises(ZeroDivisionError):
            async with db.transaction():
                await add(db, "undone")
                raise ZeroDivisionError
        async with db.transaction(readonly=True):
            assert await names(db) == ["a", "b"]
        await add(db, "c")
        assert engine.committed() == []
        assert db.stats().readers_in_use + db.stats().writer_in_use == 1
    assert watched.take() == (True, False)
    assert engine.committed() == ["a", "b", "c"]
    after = db.stats()
    assert after.acquired_total - before.acquired_total == 1
    assert after.commits_total - before.commits_total == 1
    assert after.statements_total - before.statements_total == 5
    assert after.readers_in_use == after.writer_in_use == 0
    async with db.transaction(readonly=True):
        assert await db.fetch_value(COUNT) == 3
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "refused")
    assert engine.committed() == ["a", "b", "c"]


async def test_begun_and_left_alone(db: Any, engine: PostgresqlEngine, watched: Watched) -> None:
    """A transaction that does nothing, one that is rolled back, and one that fails: none of them leaves anything behind."""
    async with db.transaction():
        pass
    assert watched.take() == (False, False)
    for wrong in (ZeroDivisionError, asyncio.CancelledError):
        with pytest.raises(wrong):
            async with db.transaction():
                await add(db, "undone")
                raise wrong
        await rests(db)
    await db.begin()
    await add(db, "kept")
    await db.commit()
    await db.begin()
    await add(db, "undone")
    await db.rollback()
    assert engine.committed() == ["kept"]
    assert engine.outside("SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []


class Named:
    """A class of records."""

    def __init__(self, name: str) -> None:
        assert threading.current_thread().name.startswith("database-")  # where it may take its time
        self.name = name


@dataclass(frozen=True, slots=True)
class Generated:
    """A class whose making is nobody's code."""

    name: str


class Text(str):
    """No plain string."""


async def _records(db: Any) -> Any:
    return [each.name for each in await db.fetch_all("SELECT name FROM jobs", record_class=Named)]


async def _odd_parameters(db: Any) -> Any:
    return [row[0] for row in await db.fetch_all("SELECT name FROM jobs WHERE name = :name", {"name": Text("first")})]


async def _run(db: Any) -> Any:
    return [row[0] for row in await db.run(lambda raw: raw.execute("SELECT name FROM jobs").fetchall())]


async def _stream(db: Any) -> Any:
    async with db.stream("SELECT name FROM jobs") as rows:
        return [row[0] async for row in rows]


async def _many(db: Any) -> Any:
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [("x",)] * 300)
    return await names(db)


async def _script(db: Any) -> Any:
    await db.execute_script("INSERT INTO item (value) VALUES ('x'); DELETE FROM item")
    return await names(db)


async def _many_rows(db: Any) -> Any:
    assert len(await db.fetch_all("SELECT x FROM generate_series(1, 1000) AS x")) == 1000
    return await names(db)


async def _a_long_value(db: Any) -> Any:
    assert len(await db.fetch_value("SELECT repeat('x', 10000000)")) == 10_000_000
    assert await db.fetch_value("SELECT length(:text)", {"text": "x" * 10_000_000}) == 10_000_000
    return await names(db)


async def _several_at_once(db: Any) -> Any:
    found = await gather(*[lambda: names(db)] * 5)
    assert all(each == found[0] for each in found)
    return found[0]


async def _an_error(db: Any) -> Any:
    for _ in range(2):
        with pytest.raises(errors.IntegrityError):
            await add(db, "first")
    return await names(db)


async def _a_wrong_type(db: Any) -> Any:
    assert await db.fetch_value("SELECT name FROM jobs WHERE name = :name", {"name": 5}) is None
    return await names(db)


async def _unfit_parameters(db: Any) -> Any:
    with pytest.raises(errors.QueryExecutionError, match="no value was given for :name"):
        await db.execute("INSERT INTO jobs (name) VALUES (:name)", {})
    return await names(db)


async def _a_savepoint_in_doubt(db: Any) -> Any:
    with pytest.raises(errors.IntegrityError):
        async with db.transaction():
            await db.execute("INSERT INTO item (value) VALUES ('undone')")
            await add(db, "first")
    assert await db.fetch_value("SELECT count(*) FROM item") == 0
    return await names(db)


HANDED_OVER: list[Callable[[Any], Awaitable[Any]]] = [
    _records, _odd_parameters, _run, _stream, _many, _script, _many_rows, _a_long_value, _several_at_once, _an_error,
    _a_wrong_type, _unfit_parameters, _a_savepoint_in_doubt,
]  # fmt: skip


async def test_records_that_are_generated(db: Any, engine: PostgresqlEngine, watched: Watched) -> None:
    """They may be made here, as long as they are few."""
    async with db.transaction():
        await add(db, "a")
        assert await db.fetch_one("SELECT name FROM jobs", record_class=Generated) == Generated("a")
        assert await db.fetch_all("SELECT name FROM jobs", record_class=Generated) == [Generated("a")]
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            await db.fetch_all("SELECT name AS other FROM jobs", record_class=Generated)
        await add(db, "b")
    assert watched.take() == (True, True)
    assert engine.committed() == ["a", "b"]
    await db.execute("DELETE FROM jobs")
    await rests(db)
    watched.take()
    async with db.transaction():
        await add(db, "a")
        assert await db.fetch_all("SELECT name FROM jobs", record_class=Generated) == [Generated("a")]
    assert watched.take() == (True, False)


async def test_what_hands_over(db: Any, engine: PostgresqlEngine, watched: Watched) -> None:
    """In the middle of a transaction; it goes on where it was, and what follows is done as well."""
    for number, work in enumerate(HANDED_OVER):
        with case(work=work.__name__):
            await rests(db)
            watched.take()
            last = f"last {number}"
            async with db.transaction():
                await add(db, "first")
                assert watched.take() == (True, False)
                assert await work(db) == ["first"]
                await add(db, last)
            assert watched.take()[1]
            assert engine.committed() == ["first", last]
            await db.execute("DELETE FROM jobs")
            await db.execute("DELETE FROM item")


async def test_the_first_statement_hands_over(db: Any, engine: PostgresqlEngine) -> None:
    """So that the worker goes on with a transaction whose BEGIN is all there is of it."""
    for work in (_a_wrong_type, _unfit_parameters, _a_long_value, _many_rows, _several_at_once, _run):
        with case(work=work.__name__):
            await rests(db)
            async with db.transaction():
                assert await work(db) == []
                await add(db, "a")
            assert engine.committed() == ["a"]
            await db.execute("DELETE FROM jobs")


async def test_slow_statements_and_transactions_are_reported(
    make_db: Any, engine: PostgresqlEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Before their callers go on, and never on the loop's thread, for handlers may block."""
    db = await make_db(pool_size=1, logging={"slow_ms": 30, "slow_transaction_ms": 30})
    await warm(db)
    caplog.clear()
    threads: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            threads.append(threading.current_thread().name)

    handler = Handler()
    logging.getLogger("database").addHandler(handler)
    try:
        async with db.transaction():
            await add(db, "a")
            with locked(engine, seconds=0.05):
                await db.execute("UPDATE item SET value = 'b'")
            assert "UPDATE item" in caplog.text
    finally:
        logging.getLogger("database").removeHandler(handler)
    assert caplog.records[-1].name == "database.transaction"
    assert all(name.startswith("database-") for name in threads), threads
    assert engine.committed() == ["a"]


async def test_a_slow_commit_is_reported(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction of which only the COMMIT takes long is a slow one all the same."""
    db = await make_db(pool_size=1, conninfo=proxy.conninfo(), logging={"slow_transaction_ms": 500})
    await warm(db)
    caplog.clear()
    pool = db.pool()

    def from_client(kind: bytes, body: bytes) -> bool:
        if kind == b"Q" and body.endswith(b"COMMIT\0"):
            for worker in pool.readers():
                worker.held.granted_at -= 1  # as if COMMIT had been under way for so long
        return True

    proxy.from_client = from_client
    before = db.stats()
    async with db.transaction():
        await add(db, "a")
    assert [record.name for record in caplog.records] == ["database.transaction"]
    assert engine.committed() == ["a"]
    await rests(db)
    after = db.stats()
    assert (after.commits_total, after.rollbacks_total) == (before.commits_total + 1, before.rollbacks_total)
    assert pool.transactions == set()


async def test_a_commit_that_is_handed_over_leaves_nothing_behind(make_db: Any, engine: PostgresqlEngine) -> None:
    """The pool knows of no transaction any more, on whichever thread it has ended."""
    db = await make_db(pool_size=1, resolve_commits=True)
    await warm(db)
    async with db.transaction():
        await add(db, "a")
    await rests(db)
    assert db.pool().transactions == set()
    assert db.pool().at_rest
    assert engine.committed() == ["a"]


async def test_what_hears_of_it_raises(
    db: Any, engine: PostgresqlEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That is reported by the worker, and costs neither the transaction nor the connection."""

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    for number, name in enumerate(("threshold", "hears_of")):
        await rests(db)
        caplog.clear()
        with monkeypatch.context() as patch, anyio.fail_after(HANGING):
            patch.setattr(type(db.pool().observer), name, fail)
            async with db.transaction():
                await add(db, f"a{number}")
        assert "has raised" in caplog.text, name
        assert f"a{number}" in engine.committed()
        await usable(db)


async def test_a_loop_that_is_late_makes_no_statement_slow(
    db: Any, engine: PostgresqlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that is known to be quick stays so, and travels with others, whatever the loop does before it receives."""
    sql = "SELECT count(*) FROM item"
    for _ in range(3):
        await db.fetch_value(sql)
    await rests(db)
    learnt: list[float] = []
    took = Plan.took
    monkeypatch.setattr(Plan, "took", lambda self, seconds: (learnt.append(seconds), took(self, seconds)))

    async def be_late() -> None:
        threading.Event().wait(0.1)

    async with db.transaction():
        await add(db, "a")
        async with anyio.create_task_group() as group:
            group.start_soon(be_late)
            group.start_soon(be_late)
            assert await db.fetch_value(sql) == 0
    await db.fetch_value(sql)
    assert learnt
    assert max(learnt) < 0.1


@contextmanager
def locked(engine: PostgresqlEngine, *, seconds: float | None = None) -> Iterator[None]:
    """Writing to `item` has to wait; or does for so long, from when somebody waits."""
    with psycopg.connect(engine.server.conninfo()) as connection:
        connection.execute(f"SET search_path = {engine.schemas['default']}; LOCK TABLE item IN EXCLUSIVE MODE")
        if seconds is None:
            yield
            connection.rollback()
            return

        def release() -> None:
            with psycopg.connect(engine.server.conninfo(), autocommit=True) as other:
                while not other.execute(WAITS).fetchall():
                    pass
                threading.Event().wait(seconds)
            connection.rollback()

        thread = threading.Thread(target=release)
        thread.start()
        yield
        thread.join()


async def blocked(engine: PostgresqlEngine, within: Callable[[], Awaitable[Any]]) -> None:
    """Does something while a statement waits for a lock, on the server."""
    await eventually(lambda: engine.outside(WAITS), "it waits for the lock")
    await within()


@pytest.mark.every_loop
async def test_cancelled_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """The worker stops what the loop's thread has sent; all of the transaction is undone, and the connection is as it was."""
    async with db.transaction():
        pid = await db.fetch_value(PID)

    async def work() -> None:
        async with db.transaction():
            await db.execute("INSERT INTO parent DEFAULT VALUES")
            await db.execute("UPDATE item SET value = 'b'")

    for _ in range(3):
        await rests(db)
        with anyio.fail_after(HANGING), locked(engine):
            async with anyio.create_task_group() as group:
                group.start_soon(work)

                async def cancel(group: Any = group) -> None:
                    group.cancel_scope.cancel()

                await blocked(engine, cancel)
        assert engine.outside("SELECT FROM parent") == []
        assert await db.fetch_value(PID) == pid
    await usable(db)


@on_asyncio
async def test_cancelled_twice_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """By `task.cancel()`, which breaks through: the worker finishes alone."""
    for times in (1, 2, 5):
        await rests(db)

        async def work() -> None:
            async with db.transaction():
                await db.execute("INSERT INTO parent DEFAULT VALUES")
                await db.execute("UPDATE item SET value = 'b'")

        with locked(engine):
            task = asyncio.ensure_future(work())
            await eventually(lambda: engine.outside(WAITS), "it waits for the lock")
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(db)
        assert engine.outside("SELECT FROM parent") == []
    await usable(db)


async def test_time_runs_out_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """The transaction's own limit."""

    @transactional(timeout=0.1)
    async def work() -> None:
        await add(db, "undone")
        await db.execute("UPDATE item SET value = 'b'")

    with locked(engine):
        with pytest.raises(errors.TransactionTimeoutError):
            await work()
    await usable(db)


@pytest.mark.every_loop
async def test_cancelled_at_every_turn(db: Any, engine: PostgresqlEngine) -> None:
    """After each number of turns of the loop: all of it or nothing is kept, and the answer says which."""
    kept = undone = 0
    for turns in range(40):
        for name in ("a", "b"):
            await add(db, f"{name} {turns} before")

        async def work(turns: int = turns) -> None:
            async with db.transaction():
                await add(db, f"a {turns}")
                await db.fetch_value(COUNT)
                await add(db, f"b {turns}")

        finished = False
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel(turns: int = turns, scope: anyio.CancelScope = scope) -> None:
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                group.start_soon(cancel)
                await work()
                finished = True
        await rests(db)
        found = {name for name in engine.committed() if name in (f"a {turns}", f"b {turns}")}
        assert len(found) in (0, 2), (turns, found)
        if finished:
            assert found, turns
        kept += bool(found)
        undone += not found
    assert undone
    await usable(db)


async def test_commit_under_way_is_not_withdrawn(make_db: Any, engine: PostgresqlEngine, proxy: Proxy) -> None:
    """A cancellation is raised when the answer is there; what is committed is told to those who asked."""
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    await warm(db)
    sent, goes_on = threading.Event(), threading.Event()

    def from_client(kind: bytes, body: bytes) -> bool:
        if kind == b"Q" and body.endswith(b"COMMIT\0"):
            sent.set()
            assert goes_on.wait(HANGING)
        return True

    told: list[str] = []

    async def work() -> None:
        async with db.transaction():
            await add(db, "a")
            db.on_commit(lambda: told.append("committed"))

    proxy.from_client = from_client
    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await eventually(sent.is_set, "COMMIT is under way")
            group.cancel_scope.cancel()
            goes_on.set()
    assert engine.committed() == ["a"]
    assert told == ["committed"]
    await usable(db)


@pytest.mark.every_loop
async def test_closed_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """What runs is stopped, and told why; nothing of it is kept."""
    caught: list[BaseException] = []

    async def work() -> None:
        try:
            async with db.transaction():
                await db.execute("INSERT INTO parent DEFAULT VALUES")
                await db.execute("UPDATE item SET value = 'b'")
        except errors.PoolClosedError as error:
            caught.append(error)

    with anyio.fail_after(HANGING), locked(engine):
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await blocked(engine, db.close)
    assert len(caught) == 1
    assert engine.outside("SELECT FROM parent") == []
    await usable(db)


async def test_closed_between_statements(db: Any, engine: PostgresqlEngine) -> None:
    """The transaction is rolled back, and its connection does not outlive the pool."""

    async def close() -> None:
        with db.detached():
            await db.close()

    with anyio.fail_after(HANGING), pytest.raises(errors.PoolClosedError):
        async with db.transaction():
            await add(db, "undone")
            await close()
            await add(db, "refused")
    await usable(db)


@pytest.mark.every_loop
async def test_lost_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """The server ends the connection while a statement waits, or between two: undone, and the next one has another."""
    for moment in ("waits", "between", "commit"):
        with case(moment=moment):
            await rests(db)

            async def work(moment: str = moment) -> None:
                async with db.transaction():
                    await db.execute("INSERT INTO parent DEFAULT VALUES")
                    pid = await db.fetch_value(PID)
                    if moment != "waits":
                        engine.outside(f"SELECT pg_terminate_backend({pid}, 5000)")
                    if moment != "commit":
                        await db.execute("UPDATE item SET value = 'b'")

            async def terminate() -> None:
                engine.outside(f"SELECT pg_terminate_backend(pid, 5000) FROM ({WAITS}) AS waits")

            caught: list[errors.DatabaseError] = []

            async def told(caught: list[errors.DatabaseError] = caught, work: Any = work) -> None:
                try:
                    await work()
                except errors.DatabaseError as error:
                    caught.append(error)

            with anyio.fail_after(HANGING), locked(engine):
                async with anyio.create_task_group() as group:
                    group.start_soon(told)
                    if moment == "waits":
                        await blocked(engine, terminate)
            assert [error.outcome for error in caught] == ["unknown" if moment == "commit" else "undone"]
            assert engine.outside("SELECT FROM parent") == []
            await usable(db)


@pytest.mark.every_loop
async def test_what_the_server_says_unasked(db: Any, engine: PostgresqlEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is watched and closed while nobody uses it: the loop looks once; the next transaction has another."""
    if engine.pooler:
        pytest.skip("the pooler keeps its side of the connection")
    looks = counted(monkeypatch, stepped_lease, "_look")
    for worker in db.pool().readers():
        worker.look_away()
    async with db.transaction():
        pid = await db.fetch_value(PID)
    await rests(db)
    async with db.transaction():
        await db.execute("DELETE FROM jobs")
    assert any(worker.watched is not None for worker in db.pool().readers())
    looks.clear()
    engine.outside(f"SELECT pg_terminate_backend({pid}, 5000)")
    await eventually(lambda: looks, "the loop has seen it")
    for _ in range(100):
        await anyio.lowlevel.checkpoint()
    assert len(looks) == 1
    async with db.transaction():
        assert await db.fetch_value(PID) != pid
        await add(db, "a")
    assert engine.committed() == ["a"]


@pytest.mark.every_loop
async def test_a_descriptor_is_not_watched_for_somebody_else(
    db: Any, engine: PostgresqlEngine, watched: Watched
) -> None:
    """A connection is made again, by its worker, and its number is the next one's: that is watched, too."""
    for _ in range(5):
        async with db.transaction():
            pid = await db.fetch_value(PID)
            await add(db, f"{pid}")
        engine.outside(f"SELECT pg_terminate_backend({pid}, 5000)")
        async with db.transaction():  # on the worker, which notices
            assert await db.fetch_value(PID) != pid
        await rests(db)
        watched.take()
        with anyio.fail_after(HANGING):
            async with db.transaction():
                await add(db, f"again {pid}")
        assert watched.take() == (True, False)
    assert len(engine.committed()) == 10


@pytest.mark.every_loop
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_a_broken_connection_that_a_child_has_open_as_well(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is told of its end once, and not at each turn as long as the child lives."""
    looks = counted(monkeypatch, Sight, "look")
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    await warm(db)
    ends, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(ends, 1)
        os._exit(0)
    try:
        proxy.from_client = lambda kind, body: b"DELETE" not in body
        with pytest.raises(errors.QueryExecutionError, match="lost"):
            async with db.transaction():
                await add(db, "undone")
                await db.execute("DELETE FROM jobs")
        await rests(db)
        assert looks
        looks.clear()
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert looks == []
    finally:
        os.close(end)
        os.close(ends)
        os.waitpid(child, 0)
    proxy.from_client = lambda kind, body: True
    await usable(db)


async def test_no_descriptor_is_left(make_db: Any, engine: PostgresqlEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be watched is waited for by the worker."""
    for where, name in ((os, "dup"), (select, "epoll")):
        with case(name=name):
            db = await make_db(pool_size=1, schema=name == "dup")
            await warm(db)
            with monkeypatch.context() as patch:
                for worker in db.pool().readers():
                    worker.look_away()
                db.pool().waker._sight = None

                def full(*_: Any) -> Any:
                    raise OSError(errno.EMFILE, "too many open files")

                patch.setattr(where, name, full)
                async with db.transaction():
                    await add(db, name)
                    await add(db, f"{name} again")
                await rests(db)
            assert engine.committed() == [name, f"{name} again"]
            watched = Watched(monkeypatch)
            async with db.transaction():
                await db.execute("DELETE FROM jobs")
            assert watched.take()[0]


async def test_many_tasks_and_few_connections(make_db: Any, engine: PostgresqlEngine) -> None:
    """Each has its transaction in its turn, among autocommit statements, streams and functions on the same connections."""
    db = await make_db(pool_size=3)

    async def transaction(number: int) -> None:
        async with db.transaction():
            await add(db, f"a {number}")
            await db.fetch_value(COUNT)
            await add(db, f"b {number}")
            if number % 7 == 0:
                raise ZeroDivisionError

    async def work(number: int) -> None:
        for round_ in range(5):
            each = number * 100 + round_
            if number % 4 == 0:
                await db.execute("INSERT INTO item (value) VALUES ('x')")
            elif number % 4 == 1:
                async with db.stream("SELECT name FROM jobs") as rows:
                    async for _ in rows:
                        pass
            try:
                await transaction(each)
            except ZeroDivisionError:
                assert each % 7 == 0

    with anyio.fail_after(HANGING):
        await gather(*[lambda number=number: work(number) for number in range(30)])
    wanted = {f"{name} {n * 100 + r}" for name in "ab" for n in range(30) for r in range(5) if (n * 100 + r) % 7}
    assert set(engine.committed()) == wanted


def test_a_loop_that_ends_under_way(engine: PostgresqlEngine, configured: Callable[..., None]) -> None:
    """By `asyncio.run`, which cancels what is left, or closed in the middle of its tasks: nothing stays open on the server."""
    from database import get_db

    configured(pool_size=1)

    async def schema() -> None:
        await get_db().execute_script(engine.schema)
        await get_db().close()

    async def stuck() -> None:
        await warm(get_db())
        async with get_db().transaction():
            await get_db().execute("INSERT INTO parent DEFAULT VALUES")
            await get_db().execute("UPDATE item SET value = 'b'")

    async def under_way() -> Any:
        task = asyncio.ensure_future(stuck())
        await eventually(lambda: engine.outside(WAITS), "it waits for the lock")
        return task

    asyncio.run(schema())
    with locked(engine):
        asyncio.run(under_way())
    assert engine.outside("SELECT FROM parent") == []
    with locked(engine):
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(under_way())
        loop.close()
        task._log_destroy_pending = False
        del loop, task
        gc.collect()
    assert engine.outside("SELECT FROM parent") == []
    assert engine.outside("SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_a_fork_under_way(db: Any, engine: PostgresqlEngine) -> None:
    """The child throws away what it finds, and says nothing to the server in its parent's name."""
    done: list[str] = []

    async def work() -> None:
        async with db.transaction():
            await add(db, "a")
            await db.execute("UPDATE item SET value = 'b'")
            done.append("b")

    async def fork() -> None:
        leases: list[Any] = list(db.pool().transactions)
        assert len(leases) == 1
        assert leases[0]._steps is not None
        child = os.fork()
        if child == 0:
            try:
                leases[0]._steps = None
                gc.collect()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async with anyio.create_task_group() as group:
        with locked(engine):
            group.start_soon(work)
            await blocked(engine, fork)
    assert done == ["b"]
    assert engine.committed() == ["a"]
