"""Cancellations, whose requests travel on a connection of their own and may be late: gates decide when they arrive."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.contract.support import HANGING, eventually, usable
from tests.postgresql.engine import PostgresqlEngine
from tests.postgresql.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

PID = "SELECT pg_backend_pid()"


def naps(pid: int) -> int:
    """How often a process has gone to sleep: once more means that it has woken up and found nothing to do."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])


def next_statements(db: Any, queries: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    """What may come next on the connection, each long enough to be hit."""
    slow = "SELECT 7 FROM pg_sleep(0.05)"

    async def transaction() -> Any:
        async with db.transaction():
            await db.execute("INSERT INTO jobs (name) VALUES ('kept')")
            return await db.fetch_value(slow)

    async def stream() -> Any:
        async with db.stream(slow) as rows:
            return [row[0] async for row in rows][0]

    async def many() -> Any:
        found = await db.execute_many("INSERT INTO item (value) VALUES (?)", [("x",)] * 3000)
        return 7 if found.rowcount == 3000 else found

    async def in_aiosqls_way() -> Any:
        return [7 async for _ in queries.get_all_jobs(db, enabled=1)] or 7

    return {
        "alone": lambda: db.fetch_value(slow),
        "transaction": transaction,
        "stream": stream,
        "many": many,
        "run": lambda: db.run(lambda connection: connection.execute(slow).fetchone()[0]),
        "aiosql": in_aiosqls_way,
    }


async def test_a_late_cancellation_hits_nobody_else(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, queries: Any
) -> None:
    """The request arrives when its statement is over and the next one waits: that one is answered, on the same connection."""
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    await db.execute("INSERT INTO item (value) VALUES ('before')")
    pid = await db.fetch_value(PID)
    for name, call in next_statements(db, queries).items():
        results: list[Any] = []

        async def victim(scope: anyio.CancelScope) -> None:
            with scope:
                await db.execute("UPDATE item SET value = 'after'")

        async def other(call: Callable[[], Awaitable[Any]] = call, results: list[Any] = results) -> None:
            results.append(await call())

        before = proxy.cancels
        proxy.may_cancel.clear()
        scope = anyio.CancelScope()
        with anyio.fail_after(HANGING):
            async with anyio.create_task_group() as group:
                with engine.locked():
                    group.start_soon(victim, scope)
                    waits = "SELECT FROM pg_locks WHERE NOT granted AND pid = "
                    await eventually(lambda: engine.outside(f"{waits}{pid}"), "the victim waits for the lock")  # noqa: B023
                    scope.cancel()
                    await eventually(lambda: proxy.cancels > before, "the cancellation is on its way")  # noqa: B023
                    group.start_soon(other)
                await eventually(
                    lambda: engine.outside("SELECT FROM item WHERE value = 'after'"), "the victim is done on the server"
                )
                proxy.may_cancel.set()
        assert results in ([7], [[7]]), name
        assert await db.fetch_value(PID) == pid, name
        await db.execute("UPDATE item SET value = 'before'")
    await usable(db)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to see the server's process in")
async def test_an_early_cancellation_is_sent_again(make_db: Any, engine: PostgresqlEngine, proxy: Proxy) -> None:
    """The request arrives before its statement has begun, where the server takes no notice: it is stopped all the same."""
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    pid = await db.fetch_value(PID)
    sleep = "SELECT pg_sleep(600)"
    held = threading.Event()
    for inside in (False, True):

        def from_client(kind: bytes, body: bytes) -> bool:
            if kind == b"P" and sleep.encode() in body and not held.is_set():
                before, slept = proxy.delivered, naps(pid)
                held.set()
                for _ in range(5000):  # seconds, against hanging
                    if proxy.delivered > before and naps(pid) > slept:
                        break
                    threading.Event().wait(0.001)
            return True

        async def victim(scope: anyio.CancelScope, inside: bool = inside) -> None:
            with scope:
                if inside:
                    async with db.transaction():
                        await db.fetch_value("SELECT 1")
                        await db.fetch_all(sleep)
                else:
                    await db.fetch_all(sleep)

        held.clear()
        proxy.from_client = from_client
        before = proxy.delivered
        scope = anyio.CancelScope()
        with anyio.fail_after(HANGING):
            async with anyio.create_task_group() as group:
                group.start_soon(victim, scope)
                await eventually(held.is_set, "the statement is held back")
                scope.cancel()
        assert await db.fetch_value(PID) == pid, "the same connection, once the statement has been stopped"
        assert proxy.delivered > before
        assert not engine.outside(f"SELECT FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'")
    await usable(db)


async def test_the_end_of_what_was_cancelled_is_not(make_db: Any, proxy: Proxy) -> None:
    """One row of a slow SELECT is asked for in a transaction of the package's own: its ROLLBACK must not be cancelled, too,
    for whoever comes next would then be in that transaction.
    """
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    pid = await db.fetch_value(PID)
    cancels: list[int] = []
    fetching = threading.Event()

    def from_client(kind: bytes, body: bytes) -> bool:
        if b"FETCH" in body:
            fetching.set()
        elif kind == b"Q" and body.startswith(b"ROLLBACK"):
            cancels.append(proxy.cancels)
            threading.Event().wait(0.2)  # time for what must not come
            cancels.append(proxy.cancels)
        return True

    proxy.from_client = from_client
    before = proxy.cancels
    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(db.fetch_one, "SELECT i, pg_sleep(600) FROM generate_series(1, 3) i")
            await eventually(fetching.is_set, "it runs")
            group.cancel_scope.cancel()
        await eventually(lambda: len(cancels) == 2, "it is rolled back")
        assert await db.fetch_value(PID) == pid
    assert before < cancels[0] == cancels[1]
    await usable(db)


async def test_a_cancellation_that_cannot_be_delivered(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection of a statement that cannot be cancelled is given up, so whatever arrives later hits nobody."""
    from database.postgresql import wire

    monkeypatch.setattr(wire, "CANCEL_SECONDS", 0.2)
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    pid = await db.fetch_value(PID)
    proxy.may_cancel.clear()

    async def victim(scope: anyio.CancelScope) -> None:
        with scope:
            await db.execute("UPDATE item SET value = 'after'")

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()
            with engine.locked():
                group.start_soon(victim, scope)
                await eventually(lambda: engine.outside(f"SELECT FROM pg_locks WHERE NOT granted AND pid = {pid}"))
                scope.cancel()
                await eventually(lambda: proxy.cancels)
                other = await db.fetch_value(PID)
                assert other != pid
        proxy.may_cancel.set()
        await eventually(lambda: proxy.delivered == proxy.cancels)
        assert await db.fetch_value(PID) == other
    await usable(db)
