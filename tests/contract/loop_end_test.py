"""Section 5 of the contract: an event loop that ends while tasks wait for the database."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from database import get_db, transactional
from tests.contract.support import SLOW_SELECT, Engine, around_commit, errors, eventually

LOOPS = [
    "run",
    "debug",
    "runner",
    "two",
    pytest.param(
        "uvloop", marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
    ),
]


def run(kind: str, *mains: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Runs them on one event loop, or on one each where that kind of running knows no more than one."""
    if kind in ("run", "debug"):
        return [asyncio.run(main(), debug=kind == "debug") for main in mains]  # type: ignore[arg-type]
    factory = None
    if kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    if kind == "two":
        loop = asyncio.new_event_loop()
        try:
            results = [loop.run_until_complete(main()) for main in mains]
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
                task.cancel()  # and once more: it is told but once
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            return results
        finally:
            loop.close()
    with asyncio.Runner(loop_factory=factory) as runner:
        return [runner.run(main()) for main in mains]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LOOPS)
def test_the_end_of_a_loop_cancels_those_who_wait(configured: Any, engine: Engine, kind: str) -> None:
    """Tasks in every call of ours are cancelled like any others when the loop ends: the result of main comes back, every
    `finally` runs, open transactions are rolled back, and the next loop works.
    """
    configured(pool_timeout=20)
    db = get_db()
    ended: list[str] = []
    started: set[str] = set()

    async def read() -> None:
        await db.fetch_value(SLOW_SELECT)

    async def write() -> None:
        await db.execute("INSERT INTO jobs (name) VALUES ('write')")  # behind the transaction that holds the writer

    async def unit() -> None:
        await db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('unit')"))

    async def inside() -> None:
        async with db.transaction():
            await db.execute("INSERT INTO jobs (name) VALUES ('inside')")
            started.add("inside waits")
            await db.fetch_value(SLOW_SELECT)

    async def stream() -> None:
        async with db.stream(SLOW_SELECT) as rows:
            async for _ in rows:
                pass

    async def many() -> None:
        await db.execute_many("INSERT INTO jobs (name) VALUES (:name)", ({"name": f"many {n}"} for n in range(10)))

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute("INSERT INTO jobs (name) VALUES ('offloaded')")

    async def manual() -> None:
        await db.begin()
        await db.execute("INSERT INTO jobs (name) VALUES ('manual')")

    async def elsewhere() -> None:
        await asyncio.sleep(100)

    async def task(name: str, body: Callable[[], Awaitable[Any]]) -> None:
        started.add(name)
        try:
            await body()
        finally:
            ended.append(name)

    bodies = {each.__name__: each for each in (read, write, unit, stream, many, offloaded, manual, elsewhere)}
    tasks: list[asyncio.Task[None]] = []

    async def main() -> str:
        await db.execute_script(engine.schema)
        tasks.append(asyncio.create_task(task("inside", inside)))
        await eventually(lambda: "inside waits" in started)
        tasks.extend(asyncio.create_task(task(name, body)) for name, body in bodies.items())
        await eventually(lambda: started >= {*bodies, "inside"})
        for each in bodies:
            assert each not in ended
        return "result"

    async def again() -> set[str]:
        return {name for (name,) in await db.fetch_all("SELECT name FROM jobs")}

    assert run(kind, main) == ["result"]
    assert sorted(ended) == sorted({*bodies, "inside"}), "every finally has run"
    assert all(each.cancelled() for each in tasks), tasks
    kept = asyncio.run(again())
    assert not kept & {"inside", "manual"}, "transactions that were cancelled are rolled back"
    many = {f"many {n}" for n in range(10)}
    assert kept & many in (set(), many), "a write has happened, or has not"


@pytest.mark.parametrize("kind", LOOPS)
def test_the_end_of_a_loop_and_a_commit_under_way(configured: Any, engine: Engine, kind: str) -> None:
    """A commit that has begun when the loop ends is waited for, also through a storm of cancellations: it is kept, and
    the task cancelled afterwards.
    """
    configured()
    db = get_db()
    begun, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def wait() -> None:
        begun.set()
        go_on.wait(10)

    async def background() -> None:
        async with db.transaction():
            await db.execute("INSERT INTO jobs (name) VALUES ('kept')")
            db.on_commit(lambda: told.append("committed"))
            around_commit(patched, db, before=wait)

    async def main() -> str:
        await db.execute_script(engine.schema)
        task = asyncio.create_task(background())
        await eventually(begun.is_set)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        threading.Timer(0.05, go_on.set).start()
        return "result"

    with pytest.MonkeyPatch.context() as patched:
        assert run(kind, main) == ["result"]
    assert engine.committed() == ["kept"]
    assert told == ["committed"]


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_a_task_that_outlives_its_pool(configured: Any, engine: Engine, kind: str) -> None:
    """Who asks the database in a `finally` while the loop ends gets an answer or an error, and never hangs."""
    configured()
    db = get_db()
    heard: list[object] = []

    async def late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    heard.append(await db.fetch_value("SELECT 1"))
                except errors.DatabaseError as error:
                    heard.append(type(error))

    async def main() -> None:
        await db.execute_script(engine.schema)
        if kind == "asyncio":
            main.task = asyncio.create_task(late())  # type: ignore[attr-defined]
        else:
            import trio

            trio.lowlevel.spawn_system_task(late)
        await anyio.sleep(0.01)

    anyio.run(main, backend=kind)
    assert len(heard) == 1
    assert heard[0] in (1, errors.PoolClosedError)
