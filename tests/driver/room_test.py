"""The write-ahead log stays short, whoever reads."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import anyio
import pytest

from database.driver import room
from tests.contract.support import HANGING, Engine, usable

pytestmark = pytest.mark.anyio

MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def only_sqlite(engine: Engine) -> None:
    if engine.name != "sqlite3":
        pytest.skip("SQLite's log is read from; PostgreSQL's is not")


def _log(engine: Engine) -> int:
    path = engine.path().with_name(engine.path().name + "-wal")
    return path.stat().st_size if path.exists() else 0


async def _small(make_db: Any, engine: Engine, **settings: Any) -> Any:
    return await make_db(wal_limit=1, **settings)


@pytest.mark.parametrize("reader", ["transactions", "statements", "streams", "offloaded"])
async def test_overlapping_readers_do_not_let_the_log_grow(
    make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """Readers that overlap all the time, each of them short, see their snapshots and are never refused; the log is emptied
    again and again, and its file stays near the limit.
    """
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.005)
    db = await _small(make_db, engine, pool_size=4)
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, "x" * 1000) for n in range(300)])
    done = False
    reads = 0

    async def read(number: int) -> None:
        nonlocal reads
        await anyio.sleep(number * 0.002)
        while not done:
            if reader == "statements":
                await db.fetch_value("SELECT sum(length(a.value) + b.id) FROM item a, item b WHERE b.id < 10")
            elif reader == "streams":
                async with db.stream("SELECT * FROM item", chunk_size=100) as rows:
                    async for _ in rows:
                        pass
                    await anyio.sleep(0.005)
            elif reader == "offloaded":
                await db.run(lambda connection: connection.execute("SELECT * FROM item").fetchall(), readonly=True)
            else:
                async with db.transaction(readonly=True):
                    first = await db.fetch_value("SELECT sum(length(value)) FROM item")
                    await anyio.sleep(0.005)
                    assert await db.fetch_value("SELECT sum(length(value)) FROM item") == first
            reads += 1

    sizes: list[int] = [0]
    emptied = number = 0
    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for each in range(4):
                group.start_soon(read, each)
            while number < 60 or (number < 600 and (emptied < 5 or reads <= 8)):  # a busy machine takes longer
                await db.execute("UPDATE item SET value = ?", (chr(97 + number % 26) * (1000 + number % 60),))
                number += 1
                sizes.append(_log(engine))
                emptied += sizes[-1] < sizes[-2]
            done = True
    assert emptied >= 5, [size // 1024 for size in sizes]
    assert reads > 8
    await usable(db)


async def test_a_reader_that_stays(make_db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only transaction that stays open keeps its snapshot; others are held back for a moment only, and seldom; when it
    has ended, the log is emptied.
    """
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(room, "HOLD_SECONDS", 0.05)
    db = await _small(make_db, engine, pool_size=3)
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, "x" * 1000) for n in range(300)])
    release = anyio.Event()
    began = time.monotonic()
    async with anyio.create_task_group() as group:

        async def stay(*, task_status: Any) -> None:
            async with db.transaction(readonly=True):
                before = await db.fetch_value("SELECT sum(length(value)) FROM item")
                task_status.started()
                await release.wait()
                assert await db.fetch_value("SELECT sum(length(value)) FROM item") == before

        await group.start(stay)
        for number in range(20):
            await db.execute("UPDATE item SET value = ?", (chr(97 + number) * (1001 + number),))
            assert await db.fetch_value("SELECT length(value) FROM item WHERE id = 1") == 1001 + number
        assert _log(engine) > MEBIBYTE
        release.set()
    assert time.monotonic() - began < 10
    db.pool().room.next_look = 0.0
    await db.execute("UPDATE item SET value = 'short'")
    await db.flush()
    assert _log(engine) <= MEBIBYTE
    await usable(db)


async def test_no_limit(make_db: Any) -> None:
    """`wal_limit: null` leaves the log to SQLite; without a WAL there is none."""
    db = await make_db(wal_limit=None)
    await db.open()
    assert db.pool().room is None
    assert replace is not None
    db = await make_db(journal_mode="DELETE", schema=False)
    await db.open()
    assert db.pool().room is None
