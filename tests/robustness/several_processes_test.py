"""Several processes on one file: no update lost, nobody starved, no error but DatabaseBusyError after its time."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from tests.robustness.support import FIGURES, Program

PROCESSES_S = float(os.environ.get("PROCESSES_S", "2.5"))
"""Seconds for which the processes work."""

WRITER = """
number, seconds = int(sys.argv[2]), float(sys.argv[3])
settings["busy_timeout"] = 20000
configure({"database": {"sqlite": settings}})

async def add_one():
    value = await db.fetch_value("SELECT value FROM counter WHERE id = 1")
    await db.execute("UPDATE counter SET value = ? WHERE id = 1", (value + 1,))

def add_on_thread(connection):
    (value,) = connection.execute("SELECT value FROM counter WHERE id = 1").fetchone()
    connection.execute("UPDATE counter SET value = ? WHERE id = 1", (value + 1,))

async def batch():
    async with db.batch() as batch:
        await batch.execute("UPDATE counter SET value = value + 1 WHERE id = 1")

PATHS = [
    transactional(add_one), transactional(offload=True)(add_one), lambda: db.run(add_on_thread), batch,
    lambda: db.execute("UPDATE counter SET value = value + 1 WHERE id = 1"),
]
done = [0] * len(PATHS)

async def client(which, until):
    while time.monotonic() < until:
        await PATHS[which]()
        done[which] += 1
        await anyio.sleep(0.0005)

async def main():
    await db.open()
    say("ready")
    sys.stdin.readline()
    until = time.monotonic() + seconds
    async with anyio.create_task_group() as group:
        for which in range(len(PATHS)):
            group.start_soon(client, which, until)
    say("done", sum(done), min(done))
    await close_all()

anyio.run(main, backend=("asyncio", "trio")[number % 2])
"""

READER = """
number, seconds = int(sys.argv[2]), float(sys.argv[3])

@transactional_readonly
async def look():
    first = await db.fetch_value("SELECT value FROM counter WHERE id = 1")
    await anyio.sleep(0.001)
    second = await db.fetch_value("SELECT value FROM counter WHERE id = 1")
    assert first == second, "not one snapshot"
    return first

async def main():
    await db.open()
    say("ready")
    sys.stdin.readline()
    until, last, looks = time.monotonic() + seconds, 0, 0
    while time.monotonic() < until:
        value = await look()
        assert value >= last, "time went backwards"
        last = value
        looks += 1
    say("done", looks, last)
    await close_all()

anyio.run(main, backend=("asyncio", "trio")[number % 2])
"""


@pytest.mark.slow
def test_four_writers_and_four_readers(tmp_path: Path) -> None:
    """Four processes that write on all paths and four that read: the counter is the sum of what was acknowledged,
    every writer and every path of it gets its share, snapshots hold, and nobody sees an error.
    """
    path = tmp_path / "test.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(
        "CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER); INSERT INTO counter VALUES (1, 0)"
    )
    connection.close()
    programs = [Program(code, path, str(number), str(PROCESSES_S)) for code in (WRITER, READER) for number in range(4)]
    for each in programs:
        each.expect("ready")
    for each in programs:
        assert each.process.stdin is not None
        each.process.stdin.write("go\n")
        each.process.stdin.flush()
    ended = [each.end(PROCESSES_S + 40).ok() for each in programs]
    assert [each.err for each in ended] == [""] * 8
    counts = [tuple(map(int, each.out.split()[-2:])) for each in ended]
    writers, readers = counts[:4], counts[4:]
    connection = sqlite3.connect(path)
    try:
        (value,) = connection.execute("SELECT value FROM counter").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
    total = sum(done for done, _ in writers)
    assert value == total, "an update was lost"
    fair = total / 4
    assert all(done > fair / 5 for done, _ in writers), f"a process starved: {writers}"
    assert all(least >= 1 for _, least in writers), f"a path starved: {writers}"
    assert all(looks > 5 for looks, _ in readers), readers
    FIGURES["updates by four processes, none lost"] += total


def test_busy_after_the_configured_time(tmp_path: Path) -> None:
    """A process that keeps its lock: others get DatabaseBusyError after `busy_timeout`, not sooner, and not never;
    `retries=` runs the function again, and the second time, the lock being free, it succeeds.
    """
    path = tmp_path / "test.db"
    holder = Program(
        """
        async def main():
            await db.execute_script("CREATE TABLE t (x)")
            async with db.transaction():
                await db.execute("INSERT INTO t VALUES ('held')")
                say("held")
                sys.stdin.readline()
            await close_all()
        anyio.run(main)
        """,
        path,
    ).expect("held")
    waiter = Program(
        """
        settings["busy_timeout"] = 300
        configure({"database": {"sqlite": settings}})
        runs = []

        async def measured(call):
            began = time.monotonic()
            try:
                await call()
            except errors.DatabaseBusyError:
                seconds = time.monotonic() - began
                assert 0.29 < seconds < 60, seconds
                return
            raise AssertionError("it was not busy")

        async def add():
            runs.append(1)
            await db.execute("INSERT INTO t VALUES ('added')")

        @transactional(retries=20)
        async def stubborn():
            if len(runs) == 1:
                say("again")
                sys.stdin.readline()  # until the other process has let go
            await add()

        async def main():
            script = lambda: db.execute_script("INSERT INTO t VALUES (1)")
            for call in (add, transactional(add), transactional(offload=True)(add), script):
                await measured(call)
            runs.clear()
            await stubborn()
            assert await db.fetch_value("SELECT count(*) FROM t WHERE x = 'added'") == 1
            assert len(runs) >= 2, runs
            await close_all()
            say("fine")
        anyio.run(main)
        """,
        path,
    )
    waiter.expect("again")
    for program in (holder, waiter):
        assert program.process.stdin is not None
        program.process.stdin.write("go\n")
        program.process.stdin.flush()
        if program is holder:
            holder.end().ok()
    ended = waiter.end().ok()
    assert "fine" in ended.out
    assert ended.err == ""
