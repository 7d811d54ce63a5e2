"""How transactions end when time runs out, another process holds the lock, or they are to be run again."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from database import transactional
from tests.contract.support import (
    HANGING,
    SLOW_SELECT,
    Engine,
    add,
    errors,
    eventually,
    gather,
    held,
    idle,
    stopped,
    usable,
)
from tests.robustness.faults import Cursor, faulty

pytestmark = pytest.mark.anyio


class Gate:
    """Lets a thread wait at a call of SQLite's until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(HANGING)


@contextlib.contextmanager
def gated(monkeypatch: pytest.MonkeyPatch, text: str, *, skip: int = 0) -> Iterator[Gate]:
    """The next statement with that text waits at the gate, on its way to SQLite, once `skip` have passed."""
    gate = Gate()
    real = Cursor.execute
    seen = 0

    def execute(self: Any, sql: str, parameters: Any = ()) -> Any:
        nonlocal seen
        if sql.startswith(text):
            seen += 1
            if seen == skip + 1:
                gate()
        return real(self, sql, parameters)

    monkeypatch.setattr(Cursor, "execute", execute)
    yield gate
    gate.go_on.set()


@pytest.fixture
def slow_commits(anyio_backend: Any) -> Iterator[None]:
    """Connections whose calls can be gated."""
    with faulty():
        yield


@pytest.mark.parametrize("form", ["decorator", "context", "offload"])
async def test_time_runs_out_during_the_commit(
    slow_commits: None, make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A commit that has begun goes through, and then the transaction has not timed out: nobody is told it was undone."""
    monkeypatch.setattr(
        "database.driver.wakeup.waker.GRACE", 5
    )  # what a cancelled caller of `offload` waits for its worker
    db = await make_db()
    results: list[Any] = []
    told: list[str] = []

    async def body() -> str:
        await add(db, "a")
        db.on_commit(lambda: told.append("committed"))
        return "result"

    async def work(seconds: float, gate: Gate) -> None:
        try:
            if form == "context":
                async with db.transaction(timeout=seconds):
                    await body()
                results.append("result")
            else:
                results.append(await transactional(timeout=seconds, offload=form == "offload")(body)())
        except errors.TransactionTimeoutError:
            if gate.reached.is_set():
                raise
            gate.reached.set()  # the machine is so busy that the time has run out before

    for seconds in (0.15, 1.5, 15.0):
        with gated(monkeypatch, "COMMIT") as gate:
            async with anyio.create_task_group() as group:
                group.start_soon(work, seconds, gate)
                await anyio.to_thread.run_sync(gate.reached.wait, HANGING)
                await anyio.sleep(seconds * 2)  # well behind the deadline
                gate.go_on.set()
        if results:
            break
    assert results == ["result"]
    assert told == ["committed"]
    assert engine.committed() == ["a"]
    await usable(db)


async def test_a_deadline_behind_the_first_of_two_commits(
    slow_commits: None, make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction on two databases, cancelled while the first commit runs, is committed on both: no half of it."""
    db = await make_db(audit={})
    audit = engine.public.get_db("audit")

    @transactional(db=("default", "audit"))
    async def both() -> None:
        await add(db, "a")
        await add(audit, "a")

    scope = anyio.CancelScope()

    async def work() -> None:
        with scope:
            await both()

    with gated(monkeypatch, "COMMIT") as gate:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await anyio.to_thread.run_sync(gate.reached.wait, HANGING)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
            gate.go_on.set()
    assert engine.committed() == ["a"]
    assert engine.committed("audit") == ["a"]
    await usable(db)


async def test_a_failing_callback_does_not_tear_two_databases(make_db: Any, engine: Engine) -> None:
    """An on_commit() function that fails behind the first commit is told of, when both are committed."""
    db = await make_db(audit={})
    audit = engine.public.get_db("audit")

    @transactional(db=("default", "audit"))
    async def both() -> None:
        await add(db, "a")
        await add(audit, "a")
        db.on_commit(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        await both()
    assert engine.committed() == engine.committed("audit") == ["a"]


@pytest.mark.parametrize("doing", ["statement", "waiting", "outside"])
async def test_timeout_says_what_it_was_doing(make_db: Any, engine: Engine, doing: str) -> None:
    """`timeout` bounds waiting, statements and what is done between them, and the message tells which it was."""
    db = await make_db()

    @transactional(timeout=0.1)
    async def work() -> None:
        await add(db, "undone")
        if doing == "statement":
            await db.fetch_value(SLOW_SELECT)
        await anyio.sleep(3600)

    async with contextlib.AsyncExitStack() as stack:
        if doing == "waiting":
            await stack.enter_async_context(held(db))
        with anyio.fail_after(HANGING), stopped(), pytest.raises(errors.TransactionTimeoutError) as caught:
            await work()
    expected = {
        "statement": "executing: WITH RECURSIVE",
        "waiting": "waiting for a connection to execute: INSERT INTO jobs",
        "outside": "outside the database, in",
    }[doing]
    assert expected in str(caught.value), caught.value
    assert isinstance(caught.value, TimeoutError)
    assert engine.committed() == []
    await usable(db)


@pytest.mark.parametrize("path", ["autocommit", "script", "transaction", "offload", "run", "batch", "opening"])
async def test_every_path_waits_for_another_process(make_db: Any, engine: Engine, path: str) -> None:
    """Whatever writes, it waits for another process's lock as long as `busy_timeout` says, and goes on once it is free."""
    db = await make_db(busy_timeout=60_000)

    async def transaction() -> None:
        async with db.transaction():
            await add(db, "a")

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute("INSERT INTO jobs (name) VALUES ('a')")

    calls: dict[str, Any] = {
        "autocommit": lambda: add(db, "a"),
        "script": lambda: db.execute_script("INSERT INTO jobs (name) VALUES ('a');"),
        "transaction": transaction,
        "offload": lambda: transactional(offload=True)(add)(db, "a"),
        "run": lambda: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('a')")),
        "batch": batch,
        "opening": lambda: add(db, "a"),
    }
    done: list[int] = []

    async def work() -> None:
        await calls[path]()
        done.append(1)

    if path == "opening":
        await db.close()
    async with anyio.create_task_group() as group:
        with engine.locked():
            group.start_soon(work)
            await anyio.sleep(0.15)  # many times what SQLite's own busy handler would wait
            assert not done
    assert engine.committed() == ["a"]
    await usable(db)


async def test_begin_behind_a_commit_inside_offload_waits(
    slow_commits: None, make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction that follows a `commit()` inside an offloaded function waits for another process like any other."""
    db = await make_db(busy_timeout=60_000)

    @transactional(offload=True)
    async def offloaded() -> None:
        await add(db, "a")
        await db.commit()
        await add(db, "b")

    outside = sqlite3.connect(engine.path(), isolation_level=None, check_same_thread=False)
    with gated(monkeypatch, "BEGIN", skip=1) as gate:
        async with anyio.create_task_group() as group:
            group.start_soon(offloaded)
            await anyio.to_thread.run_sync(gate.reached.wait, HANGING)
            outside.execute("BEGIN IMMEDIATE")
            gate.go_on.set()
            await anyio.sleep(0.15)
            assert engine.committed() == ["a"]
            outside.execute("COMMIT")
    outside.close()
    assert engine.committed() == ["a", "b"]


@pytest.mark.parametrize("end", ["close", "cancel"])
async def test_closing_while_another_process_keeps_the_pool_from_opening(
    make_db: Any, engine: Engine, end: str
) -> None:
    """A pool that waits for another process's lock in order to open closes at once, with `busy_timeout` ten minutes."""
    script = engine.directory / "init.sql"
    script.write_text("CREATE TABLE IF NOT EXISTS made_by_init (x);")
    db = await make_db()
    await make_db(busy_timeout=600_000, init_sql=str(script), schema=False)
    results: list[Any] = []

    async def use() -> None:
        try:
            await db.fetch_value("SELECT 1")
        except errors.DatabaseError as error:
            results.append(error)

    with engine.locked():
        began = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(use)
            await eventually(lambda: db.pools())
            await anyio.sleep(0.05)
            if end == "cancel":
                group.cancel_scope.cancel()
            else:
                await db.close()
        with anyio.fail_after(HANGING):
            await db.close()
        assert time.monotonic() - began < HANGING
    assert [type(each) for each in results] == ([errors.PoolClosedError] if end == "close" else [])
    await usable(db)


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in-a-group"])
async def test_retries_of_an_offloaded_function_that_has_committed(make_db: Any, engine: Engine, company: bool) -> None:
    """`retries=` does not run an offloaded function again once it has committed something, and does otherwise."""
    db = await make_db()
    runs: list[str] = []
    busy = errors.DatabaseBusyError("made up")

    @transactional(offload=True, retries=3)
    async def committing() -> None:
        runs.append("committing")
        await db.execute("INSERT INTO item (value) VALUES ('kept')")
        await db.commit()
        await db.execute("INSERT INTO item (value) VALUES ('undone')")
        raise busy

    @transactional(offload=True, retries=3)
    async def trying() -> None:
        runs.append("trying")
        await db.execute("INSERT INTO item (value) VALUES ('undone')")
        raise busy

    async with held(db) as release:
        results: list[Any] = []
        calls: list[Any] = [committing, trying]
        if company:
            calls = [
                lambda: db.execute("INSERT INTO item (value) VALUES ('company 1')"),
                *calls,
                lambda: db.execute("INSERT INTO item (value) VALUES ('company 2')"),
            ]
        else:
            release.set()

        async def all_at_once() -> None:
            if company:
                results.extend(await gather(*calls))
            else:
                for call in calls:
                    results.extend(await gather(call))

        async with anyio.create_task_group() as group:
            group.start_soon(all_at_once)
            if company:
                await eventually(lambda: db.stats().queued == 4)
                release.set()
    assert [type(each).__name__ for each in results].count("DatabaseBusyError") == 2
    # In a group it is run once more, by itself, when it asks to commit: only there does commit() mean what it says.
    assert runs.count("committing") == (2 if company else 1)
    assert runs.count("trying") == 4
    values = [value for (value,) in engine.outside("SELECT value FROM item ORDER BY value")]
    assert values == (["company 1", "company 2", "kept"] if company else ["kept"])


async def test_commit_inside_a_group_is_a_commit(
    slow_commits: None, make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an offloaded function has committed stays, though the group it shared is rolled back by the database."""
    db = await make_db()
    seen: list[int] = []

    @transactional(offload=True)
    async def committing() -> None:
        await db.execute("INSERT INTO item (value) VALUES ('kept')")
        await db.commit()
        seen.append(engine.outside("SELECT count(*) FROM item WHERE value = 'kept'")[0][0])
        raise ValueError

    def roll_back_all(connection: Any) -> None:
        connection.execute("INSERT INTO item (id, value) VALUES (1, 'first')")
        connection.execute("INSERT OR ROLLBACK INTO item (id, value) VALUES (1, 'again')")

    async with anyio.create_task_group() as group, held(db) as release:

        async def all_at_once() -> None:
            results = await gather(
                committing, lambda: db.run(roll_back_all), lambda: db.execute("INSERT INTO item VALUES (9, 'other')")
            )
            assert [type(each).__name__ for each in results] == ["ValueError", "IntegrityError", "Result"]

        group.start_soon(all_at_once)
        await eventually(lambda: db.stats().queued == 3)
        release.set()
    assert seen == [1]
    assert [value for (value,) in engine.outside("SELECT value FROM item ORDER BY value")] == ["kept", "other"]
    await idle(db)


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
async def test_a_doomed_transaction_holds_nobody_up(make_db: Any, engine: Engine, readonly: bool) -> None:
    """A transaction that the database has rolled back gives its connection away at once, not when its task ends it;
    until then it is refused everything, and commits nothing.
    """
    db = await make_db(pool_size=1)
    async with anyio.create_task_group() as group:
        doomed, go_on = anyio.Event(), anyio.Event()

        async def dawdle() -> None:
            with pytest.raises(errors.TransactionError):
                async with db.transaction(readonly=readonly):
                    if not readonly:
                        await add(db, "undone")
                    with anyio.fail_after(HANGING), pytest.raises(errors.TransactionError):
                        while True:  # a select that is cancelled before it runs dooms nothing
                            with anyio.move_on_after(0.02):
                                await db.fetch_value(SLOW_SELECT)
                    doomed.set()
                    await go_on.wait()
                    with pytest.raises(errors.TransactionError):
                        await db.fetch_value("SELECT 1")

        group.start_soon(dawdle)
        await doomed.wait()
        with anyio.fail_after(HANGING):
            async with db.transaction(readonly=readonly):
                await db.fetch_value("SELECT 1")
            await add(db, "kept")
        go_on.set()
    assert engine.committed() == ["kept"]
    await usable(db)
