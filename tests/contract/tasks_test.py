"""Section 4 of the contract, tasks and offloading: who takes part in a transaction, and what runs beside
whom.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import get_db, transactional, transactional_readonly
from tests.contract.support import HANGING, Engine, add, errors, gather, held, in_turn, names, on_asyncio, usable

pytestmark = pytest.mark.anyio


class Undo(Exception):
    """Raised by a test to make a transaction roll back."""


# --- tasks --------------------------------------------------------------------------------------------------


@in_turn("fail", [False, True], ids=["commit", "rollback"])
async def test_a_task_started_inside_takes_part(db: Any, engine: Engine, fail: bool) -> None:
    """Statements of tasks started in a transaction are committed, or undone, with it."""

    async def work() -> None:
        async with db.transaction():
            await add(db, "parent")
            async with anyio.create_task_group() as group:
                for number in range(10):
                    group.start_soon(add, db, f"child {number}")
            assert len(await names(db)) == 11
            assert engine.committed() == []
            if fail:
                raise Undo

    if fail:
        with pytest.raises(Undo):
            await work()
    else:
        await work()
    assert len(engine.committed()) == (0 if fail else 11)


async def test_a_task_started_inside_a_readonly_transaction(db: Any) -> None:
    """It sees the same snapshot and is refused writes as its parent is."""

    async def child() -> None:
        assert await names(db) == []
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "x")

    async with db.transaction(readonly=True):
        await names(db)
        with db.detached():
            await add(db, "a")
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            group.start_soon(child)


@in_turn("neighbour", ["child", "parent"])
@in_turn("ending", ["rollback", "commit"])
async def test_nested_level_does_not_swallow_anothers_statement(
    db: Any, engine: Engine, ending: str, neighbour: str
) -> None:
    """While one task has a nested level open, a statement of another is neither undone nor kept by it."""
    opened, go_on = anyio.Event(), anyio.Event()

    async def nested() -> None:
        try:
            async with db.transaction():
                await add(db, "nested")
                opened.set()
                await go_on.wait()
                if ending == "rollback":
                    raise Undo
        except Undo:
            pass

    async def let_go() -> None:
        await anyio.wait_all_tasks_blocked()
        await anyio.sleep(0.02)  # time for a statement that does not wait to get where it must not go
        go_on.set()

    async with db.transaction():
        async with anyio.create_task_group() as group:
            group.start_soon(nested)
            await opened.wait()
            with db.detached():
                group.start_soon(let_go)
            if neighbour == "child":
                group.start_soon(add, db, "neighbour")
            else:
                await add(db, "neighbour")
    assert engine.committed() == (["neighbour"] if ending == "rollback" else ["neighbour", "nested"])


async def test_nested_levels_of_two_tasks(db: Any, engine: Engine) -> None:
    """Nested levels that tasks open at once each undo or keep exactly their own statements."""

    async def nested(number: int) -> None:
        async with db.transaction():
            await add(db, f"{number} a")
            await anyio.lowlevel.checkpoint()
            await add(db, f"{number} b")
            if number % 2:
                raise Undo

    async with db.transaction():
        with anyio.fail_after(HANGING):
            results = await gather(*[lambda n=n: nested(n) for n in range(8)])
    assert [type(result) for result in results] == [type(None), Undo] * 4
    assert engine.committed() == sorted(f"{n} {part}" for n in range(0, 8, 2) for part in "ab")


async def test_manual_levels_of_two_tasks(db: Any, engine: Engine) -> None:
    """`begin` in a child task opens a level of that task alone."""

    async def child(name: str, end: str) -> None:
        await db.begin()
        await add(db, name)
        await anyio.lowlevel.checkpoint()
        await getattr(db, end)()

    async with db.transaction():
        with anyio.fail_after(HANGING):
            results = await gather(*[lambda n=n: child(str(n), "rollback" if n % 2 else "commit") for n in range(6)])
        assert results == [None] * 6
        assert db.in_transaction
        await add(db, "parent")
        assert engine.committed() == []
    assert engine.committed() == ["0", "2", "4", "parent"]


async def test_nested_level_opened_within_a_nested_level_by_its_child(db: Any, engine: Engine) -> None:
    """A task started inside a nested level takes part in that level, and is undone with it."""
    async with db.transaction():
        await add(db, "outer")
        with pytest.raises(Undo):
            async with db.transaction():
                async with anyio.create_task_group() as group:
                    group.start_soon(add, db, "child of nested")
                assert await names(db) == ["child of nested", "outer"]
                raise Undo
    assert engine.committed() == ["outer"]


@in_turn("end", ["commit", "rollback"])
@in_turn("readonly", [False, True], ids=["write", "readonly"])
async def test_used_after_the_end(db: Any, engine: Engine, end: str, readonly: bool) -> None:
    """A task started inside a transaction that is over cannot mistake what follows for part of it."""
    over = anyio.Event()
    seen: list[Any] = []

    async def straggler() -> None:
        await over.wait()
        for call in (
            lambda: add(db, "late"),
            lambda: names(db),
            lambda: db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("late",)]),
            lambda: db.execute_script("DELETE FROM jobs"),
            lambda: db.run(lambda connection: connection.execute("DELETE FROM jobs")),
        ):
            seen.extend(await gather(call))
        with db.detached():
            await add(db, "detached")
        seen.extend(await gather(lambda: names(db)))

    async with anyio.create_task_group() as group:
        try:
            async with db.transaction(readonly=readonly):
                await (names(db) if readonly else add(db, "a"))
                group.start_soon(straggler)
                if end == "rollback":
                    raise Undo
        except Undo:
            pass
        over.set()
    assert [type(error) for error in seen] == [errors.TransactionError] * 6
    assert engine.committed() == (["a", "detached"] if end == "commit" and not readonly else ["detached"])
    await usable(db)


async def test_used_while_the_end_is_under_way(db: Any, engine: Engine) -> None:
    """Statements of child tasks that race with the commit are in it, or raise; none is silently lost or
    autocommitted.
    """
    for round_ in range(10):
        results: dict[str, Any] = {}

        async def child(name: str, results: dict[str, Any] = results) -> None:
            (results[name],) = await gather(lambda: add(db, name))

        async with anyio.create_task_group() as group:
            async with db.transaction():
                await add(db, f"parent {round_}")
                for number in range(5):
                    group.start_soon(child, f"child {round_} {number}")
                for _ in range(round_):
                    await anyio.lowlevel.checkpoint()
        committed = engine.committed()
        for name, result in results.items():
            assert (name in committed) == (result is None), (name, result)
            assert result is None or isinstance(result, errors.TransactionError)


async def test_detached(db: Any, engine: Engine) -> None:
    """`detached()` steps outside: it sees what is committed, its own statements are their own, and back
    inside all goes on.
    """
    async with db.transaction():
        await add(db, "a")
        with db.detached():
            assert not db.in_transaction
            assert await names(db) == []
        assert db.in_transaction
        assert await names(db) == ["a"]
    with db.detached():
        await add(db, "b")
    assert engine.committed() == ["a", "b"]


async def test_detached_background_task(db: Any, engine: Engine) -> None:
    """A task started under `detached()` is free of the transaction around it."""
    done = anyio.Event()

    async def background() -> None:
        await add(db, "background")
        assert "background" in engine.committed()
        done.set()

    async with anyio.create_task_group() as group:
        try:
            async with db.transaction():
                await add(db, "undone")
                with db.detached():
                    group.start_soon(background)
                raise Undo
        except Undo:
            pass
        await done.wait()
    assert engine.committed() == ["background"]


async def test_detached_transaction(db: Any, engine: Engine) -> None:
    """A read-only transaction under `detached()` is one of its own."""
    async with db.transaction():
        await add(db, "a")
        with db.detached():
            async with db.transaction(readonly=True):
                assert await names(db) == []
        assert await names(db) == ["a"]
    assert engine.committed() == ["a"]


async def test_detached_write_within_ones_own_write_transaction(make_db: Any, engine: Engine) -> None:
    """A write that could only wait for its own task's transaction ends with an error, not for ever."""
    db = await make_db(pool_timeout=0.1)
    async with db.transaction():
        await add(db, "a")
        with db.detached(), anyio.fail_after(HANGING):
            with pytest.raises((errors.ConnectionPoolExhaustedError, errors.TransactionError)):
                await add(db, "x")
        await add(db, "b")
    assert engine.committed() == ["a", "b"]


async def test_a_task_started_outside_is_outside(db: Any, engine: Engine) -> None:
    """A task that was started before the transaction has nothing to do with it."""
    begun, seen = anyio.Event(), []

    async def other() -> None:
        await begun.wait()
        assert not db.in_transaction
        seen.append(await names(db))
        done.set()

    done = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(other)
        async with db.transaction():
            await add(db, "a")
            begun.set()
            await done.wait()
    assert seen == [[]]


@on_asyncio
async def test_native_asyncio_tasks(db: Any, engine: Engine) -> None:
    """asyncio's own tasks and `gather` take part like any other."""
    async with db.transaction():
        await asyncio.gather(*[add(db, str(number)) for number in range(5)])
        await asyncio.create_task(add(db, "task"))
        await asyncio.wait_for(add(db, "wait_for"), 5)
        assert engine.committed() == []
    assert len(engine.committed()) == 7


# --- offload ------------------------------------------------------------------------------------------------


Awaiter = Callable[[], Awaitable[Any]]


async def test_offload_runs_next_to_the_connection(db: Any, engine: Engine, queries: Any) -> None:
    """The body runs on another thread with everything of the database at hand, and commits when it
    returns.
    """

    @transactional(offload=True)
    async def work(first: str, *, second: str) -> tuple[int, list[str]]:
        handle = get_db()
        assert handle.in_transaction
        result = await handle.execute("INSERT INTO jobs (name) VALUES (?)", (first,))
        assert result.lastrowid == 1
        await queries.insert_job(handle, name=second, cron_expr="", handler="")
        await handle.execute_many("INSERT INTO item (value) VALUES (?)", [(1,), (2,)])
        assert await handle.fetch_value("SELECT count(*) FROM item") == 2
        assert (await handle.fetch_one(queries.get_job_by_id, {"id": 2}))["name"] == second
        async with handle.stream("SELECT name FROM jobs ORDER BY id") as rows:
            assert [row["name"] async for row in rows] == [first, second]
        assert engine.committed() == []
        return threading.get_ident(), await names(handle)

    thread, found = await work("a", second="b")
    assert thread != threading.get_ident()
    assert found == engine.committed() == ["a", "b"]
    assert not db.in_transaction
    await usable(db)


@in_turn("kind", [Undo, KeyError, ZeroDivisionError])
async def test_offload_rolls_back(db: Any, engine: Engine, kind: type[Exception]) -> None:
    """An exception in the body undoes all of it and goes on as it is."""
    raised = kind("mine")

    @transactional(offload=True)
    async def work() -> None:
        await add(db, "a")
        raise raised

    with pytest.raises(kind) as caught:
        await work()
    assert caught.value is raised
    assert engine.committed() == []
    await usable(db)


async def test_offload_with_nested_levels(db: Any, engine: Engine) -> None:
    """Savepoints, decorated functions and caught errors work inside an offloaded body as anywhere."""

    @transactional
    async def inner(name: str) -> None:
        await add(db, name)
        if name.startswith("undone"):
            raise Undo

    @transactional(offload=True)
    async def work() -> None:
        await inner("a")
        with pytest.raises(Undo):
            await inner("undone")
        with pytest.raises(Undo):
            async with db.transaction():
                await add(db, "undone too")
                raise Undo
        with pytest.raises(errors.IntegrityError):
            await add(db, "a")
        await add(db, "b")

    await work()
    assert engine.committed() == ["a", "b"]


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


async def test_offload_sees_the_callers_context(db: Any) -> None:
    """Context variables of the caller are visible in the body."""

    @transactional(offload=True)
    async def work() -> str:
        await db.fetch_value("SELECT 1")
        return variable.get()

    variable.set("the caller's")
    assert await work() == "the caller's"


class Foreign:
    """Awaits something that no event loop knows."""

    def __await__(self) -> Any:
        yield "foreign"


FOREIGN: list[Any] = [
    pytest.param(lambda: asyncio.sleep(0), id="asyncio.sleep(0)"),
    pytest.param(lambda: asyncio.sleep(0.001), id="asyncio.sleep"),
    pytest.param(lambda: anyio.sleep(0), id="anyio.sleep(0)"),
    pytest.param(lambda: anyio.sleep(0.001), id="anyio.sleep"),
    pytest.param(lambda: anyio.lowlevel.checkpoint(), id="checkpoint"),
    pytest.param(lambda: anyio.Event().wait(), id="event"),
    pytest.param(lambda: anyio.to_thread.run_sync(int), id="to_thread"),
    pytest.param(Foreign, id="foreign"),
]


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
@pytest.mark.parametrize("awaitable", FOREIGN)
async def test_offload_awaits_only_its_database(
    db: Any, engine: Engine, awaitable: Awaiter, readonly: bool, anyio_backend_name: str
) -> None:
    """Awaiting anything else raises TransactionError, and all is undone."""

    async def work() -> None:
        await (names(db) if readonly else add(db, "a"))
        await awaitable()

    decorate = transactional_readonly if readonly else transactional
    with anyio.fail_after(HANGING), pytest.raises(errors.TransactionError):
        await decorate(offload=True)(work)()
    assert engine.committed() == []
    await usable(db)


async def test_offload_does_not_await_another_database(audit: Any, engine: Engine) -> None:
    """Another database's calls are something else, too."""

    @transactional(offload=True)
    async def work() -> None:
        await add(get_db(), "a")
        await add(audit, "b")

    with anyio.fail_after(HANGING), pytest.raises(errors.TransactionError):
        await work()
    assert engine.committed() == []
    assert engine.committed("audit") == []
    await usable(get_db())
    await usable(audit)


async def test_offload_readonly(db: Any, engine: Engine) -> None:
    """An offloaded read-only function reads one snapshot and is refused writes."""

    @transactional_readonly(offload=True)
    async def look(write: bool) -> list[str]:
        found = await names(db)
        if write:
            await add(db, "x")
        return found

    await add(db, "a")
    assert await look(False) == ["a"]
    with pytest.raises(errors.ReadOnlyTransactionError):
        await look(True)
    assert engine.committed() == ["a"]


@in_turn("fail", [False, True], ids=["commit", "rollback"])
async def test_offload_within_a_transaction(db: Any, engine: Engine, fail: bool) -> None:
    """An offloaded function called inside a transaction is a nested level of it."""

    @transactional(offload=True)
    async def inner(name: str) -> None:
        await add(db, name)
        if name == "undone":
            raise Undo

    async def outer() -> None:
        async with db.transaction():
            await add(db, "outer")
            await inner("inner")
            with pytest.raises(Undo):
                await inner("undone")
            assert await names(db) == ["inner", "outer"]
            assert engine.committed() == []
            if fail:
                raise Undo

    if fail:
        with pytest.raises(Undo):
            await outer()
    else:
        await outer()
    assert engine.committed() == ([] if fail else ["inner", "outer"])


async def test_offload_commit_inside(db: Any, engine: Engine) -> None:
    """`commit()` inside an offloaded body means what it means elsewhere: made permanent so far."""

    @transactional(offload=True)
    async def work() -> None:
        await add(db, "kept")
        await db.commit()
        await add(db, "undone")
        raise Undo

    with pytest.raises(Undo):
        await work()
    assert engine.committed() == ["kept"]
    await usable(db)


async def test_offload_on_commit(db: Any, engine: Engine) -> None:
    """Callbacks of an offloaded function run once, after the commit, on the event loop; dropped when it
    fails.
    """
    seen: list[Any] = []

    async def callback() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append((threading.get_ident(), engine.committed()))

    @transactional(offload=True)
    async def work(name: str) -> None:
        db.on_commit(callback)
        await add(db, name)
        if name == "undone":
            raise Undo

    await work("a")
    with pytest.raises(Undo):
        await work("undone")
    assert seen == [(threading.get_ident(), ["a"])]


FAILURES: list[Any] = [
    pytest.param("raise", id="exception"),
    pytest.param("constraint", id="constraint"),
    pytest.param("rollback", id="raise-rollback"),
    pytest.param("deferred", id="deferred-constraint"),
    pytest.param("foreign", id="awaits-something-else"),
]


@in_turn("failure", FAILURES)
async def test_group_of_offloaded_transactions(db: Any, engine: Engine, failure: str) -> None:
    """Of many at once, committed in groups, those that fail undo only themselves; an answer means
    committed.
    """
    await db.execute_script(engine.refusing_trigger)

    @transactional(offload=True)
    async def work(number: int) -> int:
        await add(db, f"{number:02} a")
        if number % 5 == 3:
            if failure == "raise":
                raise Undo
            if failure == "constraint":
                await add(db, f"{number:02} a")
            elif failure == "rollback":
                await db.execute("INSERT INTO item (value) VALUES ('rollback')")
            elif failure == "deferred":
                await db.execute("INSERT INTO child (parent_id) VALUES (99)")
            else:
                await Foreign()
        await add(db, f"{number:02} b")
        return number

    async def check(number: int) -> int:
        result = await work(number)
        assert {f"{number:02} a", f"{number:02} b"} <= set(engine.committed()), "answered before it was committed"
        return result

    async with held(db) as release:  # all of them gather behind a transaction, so that they make a group
        async with anyio.create_task_group() as group:
            results: list[Any] = []

            async def all_of_them() -> None:
                results.extend(await gather(*[lambda n=n: check(n) for n in range(20)]))

            group.start_soon(all_of_them)
            await anyio.wait_all_tasks_blocked()
            release.set()
    good = [number for number in range(20) if number % 5 != 3]
    assert [result for result in results if isinstance(result, int)] == good
    for number, result in enumerate(results):
        if number % 5 == 3:
            assert isinstance(result, (Undo, errors.DatabaseError)), result
    assert engine.committed() == sorted(f"{number:02} {part}" for number in good for part in "ab")
    await usable(db)


@in_turn("failure", ["constraint", "rollback", "deferred"])
async def test_group_of_all_kinds(db: Any, engine: Engine, failure: str) -> None:
    """Single writes, `run` and offloaded functions share commits; each failure is its own caller's alone."""
    await db.execute_script(engine.refusing_trigger)
    bad = {
        "constraint": "INSERT INTO jobs (name) VALUES ('taken')",
        "rollback": "INSERT INTO item (value) VALUES ('rollback')",
        "deferred": "INSERT INTO child (parent_id) VALUES (99)",
    }[failure]
    await add(db, "taken")

    @transactional(offload=True)
    async def offloaded(name: str, fail: bool) -> None:
        await add(db, name)
        if fail:
            await db.execute(bad)

    def run(connection: Any, name: str, fail: bool) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES (?)", (name,))
        if fail:
            connection.execute(bad)

    calls = []
    for number in range(30):
        fail = number % 7 == 2
        name = f"{number:02}{' bad' if fail else ''}"
        kind = number % 3
        if kind == 0:
            calls.append(lambda name=name, fail=fail: db.execute(bad) if fail else add(db, name))
        elif kind == 1:
            calls.append(lambda name=name, fail=fail: offloaded(name, fail))
        else:
            calls.append(lambda name=name, fail=fail: db.run(run, name, fail))
    results = await gather(*calls)
    for number, result in enumerate(results):
        assert isinstance(result, errors.QueryExecutionError) == (number % 7 == 2), (number, result)
    assert engine.committed() == [f"{n:02}" for n in range(30) if n % 7 != 2] + ["taken"]
    await usable(db)


async def test_writes_at_once_share_commits(db: Any) -> None:
    """Single writes that wait together are committed in groups, and the statistics say so."""
    before = db.stats()
    await gather(*[lambda n=n: db.execute("INSERT INTO item (value) VALUES (?)", (n,)) for n in range(200)])
    after = db.stats()
    assert await db.fetch_value("SELECT count(*) FROM item") == 200
    assert after.grouped_total > before.grouped_total
    assert after.commits_total - before.commits_total < 200
