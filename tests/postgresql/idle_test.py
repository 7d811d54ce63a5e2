"""Connections that nobody uses: closed, kept alive, found dead before they are used, made again when they are old."""

from __future__ import annotations

import os
import socket
from typing import Any

import anyio
import pytest

from tests.contract.support import HANGING, eventually, gather, usable
from tests.postgresql.engine import PostgresqlEngine

pytestmark = pytest.mark.anyio


def pids(engine: PostgresqlEngine) -> set[int]:
    """The server's processes of this test's connections."""
    name = engine.schemas["default"]
    return {pid for (pid,) in engine.outside(f"SELECT pid FROM pg_stat_activity WHERE application_name = '{name}'")}


async def crowd(db: Any, count: int) -> None:
    """So many transactions at once that each has a connection of its own."""
    here = 0
    all_here = anyio.Event()

    async def one() -> None:
        nonlocal here
        async with db.transaction():
            await db.fetch_value("SELECT 1")
            here += 1
            if here == count:
                all_here.set()
            await all_here.wait()

    with anyio.fail_after(HANGING):
        await gather(*[one] * count)


async def test_a_quiet_pool_shrinks(make_db: Any, engine: PostgresqlEngine) -> None:
    """What nobody has used for `max_idle` is closed but for one connection, and opened again when it is needed."""
    db = await make_db(pool_size=5, max_idle=0.1, application_name=engine.schemas["default"])
    for _ in range(2):
        await crowd(db, 5)
        await eventually(lambda: len(pids(engine)) == 1, "one connection is left")
        await eventually(lambda: db.stats().readers_open == 1)
        await usable(db)
    assert db.stats().replaced_total <= 4  # the one that was left, made again for its age before it was used


async def test_what_is_in_use_stays(make_db: Any, engine: PostgresqlEngine) -> None:
    """A transaction that takes longer than `max_idle` keeps its connection, while those beside it are closed."""
    db = await make_db(pool_size=4, max_idle=0.1, application_name=engine.schemas["default"])
    await crowd(db, 4)
    async with db.transaction():
        pid = await db.fetch_value("SELECT pg_backend_pid()")
        await eventually(lambda: len(pids(engine)) <= 2)
        assert await db.fetch_value("SELECT pg_backend_pid()") == pid


async def test_closed_while_idle(make_db: Any, engine: PostgresqlEngine) -> None:
    """Connections that the server has ended meanwhile are made again before their next statement: no caller sees an error."""
    db = await make_db(pool_size=4, application_name=engine.schemas["default"])
    ways = [
        lambda: db.fetch_value("SELECT 1"),
        lambda: db.execute("INSERT INTO jobs (name) VALUES (gen_random_uuid())"),
        lambda: db.execute_many("INSERT INTO item (value) VALUES (?)", [("x",)] * 300),
        lambda: db.run(lambda connection: connection.execute("SELECT 1").fetchone()),
        lambda: crowd(db, 4),
    ]
    for way in ways:
        await crowd(db, 4)
        before = pids(engine)
        assert len(before) == 4
        for pid in before:
            engine.outside(f"SELECT pg_terminate_backend({pid}, 30000)")
        results = await gather(*[way] * 4) if way is not ways[-1] else await gather(way)
        assert [result for result in results if isinstance(result, BaseException)] == []
    await usable(db)


async def test_keepalives_and_lifetimes(make_db: Any) -> None:
    """A dead peer is noticed by the system within minutes; connections are not all made again in the same moment."""
    db = await make_db(pool_size=4, max_lifetime=1000)
    expires: list[float] = []

    def look(connection: Any) -> tuple[int, int, float]:
        with socket.socket(fileno=os.dup(connection.fileno())) as link:
            alive = link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        expires.append(connection.expires)
        return alive, idle, connection.expires - connection.used_at

    here = 0
    all_here = anyio.Event()

    async def one() -> None:
        nonlocal here
        async with db.transaction():
            alive, idle, left = await db.run(look)
            here += 1
            if here == 4:
                all_here.set()
            await all_here.wait()
        assert alive
        assert idle == 60
        assert 0 < left <= 1000

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(one)
    assert len(set(expires)) == 4
    assert max(expires) - min(expires) > 0.5  # opened within moments of each other, spread over a hundred seconds
