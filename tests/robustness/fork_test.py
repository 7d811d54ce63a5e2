"""Forks of every kind: SQLite keeps its locks per process, so a child must inherit nothing of them."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from textwrap import dedent

import pytest

from tests.robustness.support import Program, leftovers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

CLOSES_FIRST = """
    to_child, to_parent = os.pipe(), os.pipe()

    async def add(who, times=1):
        for _ in range(times):
            await db.execute("INSERT INTO t VALUES (?)", (who,))

    async def child():
        await add("child before")
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)  # the parent has closed its pool meanwhile
        await add("child after", 3)
        async with db.transaction():
            await add("child transaction")
        await close_all()

    async def main():
        await db.execute_script("CREATE TABLE t (who TEXT)")
        await add("parent")
        await db.fetch_all("SELECT * FROM t")
        FORK
        os.read(to_parent[0], 1)
        await add("parent after")
        assert len(await db.fetch_all("SELECT * FROM t")) == 3, await db.fetch_all("SELECT * FROM t")
        assert db.stats().replaced_total == 0
        await close_all()
        os.write(to_child[1], b"x")
        say("child", os.waitpid(pid, 0)[1])

    anyio.run(main, backend=BACKEND)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_parent_closes_while_the_child_goes_on(tmp_path: Path, backend: str) -> None:
    """After the parent has closed, what a forked child commits is still there: its locks are its own."""
    path = tmp_path / "test.db"
    code = CLOSES_FIRST.replace("FORK", "pid = fork()").replace("BACKEND", repr(backend))
    helper = """
    def fork():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                # A fresh thread has no running loop: the parent's stays behind.
                thread = threading.Thread(target=run_child)
                thread.start()
                thread.join()
                status = outcome[0]
            finally:
                os._exit(status)
        return pid
    outcome = [1]
    def run_child():
        anyio.run(child, backend=BACKEND)
        outcome[0] = 0
    """.replace("BACKEND", repr(backend))
    ended = Program(dedent(helper) + dedent(code), path, flags=("-W", "ignore::DeprecationWarning")).end().ok()
    assert "child 0" in ended.out, ended
    assert ended.err == ""
    connection = sqlite3.connect(path)
    try:
        found = dict(connection.execute("SELECT who, count(*) FROM t GROUP BY who").fetchall())
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
    assert found == {
        "parent": 1,
        "child before": 1,
        "parent after": 1,
        "child after": 3,
        "child transaction": 1,
    }
    assert leftovers(path) == []


@pytest.mark.parametrize("what", ["write", "read", "stream"])
def test_fork_in_the_middle_of_something(tmp_path: Path, what: str) -> None:
    """Forked while a transaction is open, the child is told why it cannot open the database; the parent goes on."""
    path = tmp_path / "test.db"
    code = """
    from database.driver import process
    process.FORK_SECONDS = 600  # what a fork waits for what is about to come to rest

    def child_process():
        status = 1
        async def child():
            try:
                await db.fetch_all("SELECT * FROM t")
            except errors.ConnectionFailedError as error:
                assert "forked" in str(error), error
                return 0
            return 2
        def run():
            nonlocal status
            status = anyio.run(child)
        try:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        finally:
            os._exit(status)

    async def fork():
        await db.fetch_all("SELECT * FROM t")
        began = time.monotonic()
        pid = os.fork() or child_process()
        assert time.monotonic() - began < 60, "it waited for what could not come"
        say("child", os.waitpid(pid, 0)[1])

    async def main():
        await db.execute_script("CREATE TABLE t (who TEXT); INSERT INTO t VALUES ('a'), ('b')")
        WHAT
        await db.execute("INSERT INTO t VALUES ('after')")
        assert await db.fetch_value("SELECT count(*) FROM t") == 4 - (sys.argv[2] != "write")
        assert db.stats().replaced_total == 0
        await close_all()
    """
    ways = {
        "write": """async with db.transaction():
            await db.execute("INSERT INTO t VALUES ('c')")
            await fork()""",
        "read": """async with db.transaction(readonly=True):
            await fork()""",
        "stream": """async with db.stream("SELECT * FROM t") as rows:
            await fork()
            assert len([row async for row in rows]) == 2""",
    }
    program = dedent(code).replace("WHAT", ways[what]) + "\nanyio.run(main)\n"
    ended = Program(program, path, what, flags=("-W", "ignore::DeprecationWarning")).end().ok()
    assert "child 0" in ended.out, ended
    assert leftovers(path) == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """Under every start method of multiprocessing, parent and children write to one database and lose nothing."""
    path = tmp_path / "test.db"
    code = """
    import multiprocessing

    async def work(number, times):
        for _ in range(times):
            async with db.transaction():
                value = await db.fetch_value("SELECT value FROM counter")
                await db.execute("UPDATE counter SET value = ?", (value + 1,))
            await db.execute("UPDATE counter SET value = value + 1")

    def child(number):
        asyncio.run(work(number, 20))

    async def main():
        await db.execute_script("CREATE TABLE counter (value INTEGER); INSERT INTO counter VALUES (0)")
        await work(0, 5)
        context = multiprocessing.get_context(sys.argv[2])
        children = [context.Process(target=child, args=(number,)) for number in range(2)]
        for each in children:
            each.start()
        await work(0, 20)
        for each in children:
            await anyio.to_thread.run_sync(each.join)
        assert [each.exitcode for each in children] == [0, 0], [each.exitcode for each in children]
        say("value", await db.fetch_value("SELECT value FROM counter"))

    if __name__ == "__main__":
        asyncio.run(main())
    """
    ended = Program(code, path, method, flags=("-W", "ignore::DeprecationWarning")).end().ok()
    assert ended.err == ""
    assert f"value {2 * (5 + 20 + 20 + 20)}" in ended.out
    assert leftovers(path) == []


def test_prefork_server(tmp_path: Path) -> None:
    """A master that has used the pool forks workers, as gunicorn does; all of them write, and all of it is there."""
    path = tmp_path / "test.db"
    code = """
    async def prepare():
        await db.execute_script("CREATE TABLE t (worker INTEGER, number INTEGER)")
        await db.execute("INSERT INTO t VALUES (0, 0)")

    async def serve(worker):
        async with anyio.create_task_group() as group:
            for number in range(25):
                group.start_soon(db.execute, "INSERT INTO t VALUES (?, ?)", (worker, number))
        assert await db.fetch_value("SELECT count(*) FROM t WHERE worker = ?", (worker,)) == 25

    loop = asyncio.new_event_loop()  # kept: the master's loop is alive, and its pool open, when it forks
    loop.run_until_complete(prepare())
    pids = []
    for worker in range(1, 4):
        pid = os.fork()
        if pid == 0:
            asyncio.run(serve(worker))
            sys.exit(0)  # the whole of the interpreter's exit, with what it inherited
        pids.append(pid)
    loop.run_until_complete(serve(4))
    say("workers", *[os.waitpid(pid, 0)[1] for pid in pids])
    loop.run_until_complete(close_all())
    loop.close()
    """
    ended = Program(code, path, flags=("-W", "ignore::DeprecationWarning")).end().ok()
    assert ended.out == "workers 0 0 0\n"
    assert ended.err == ""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (101,)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
