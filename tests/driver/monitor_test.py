"""The socket on which a process tells of its pools: there when it was asked for, for its owner alone, gone with them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from database.driver import monitor
from database.driver.pool import PoolStats
from tests.contract.support import eventually
from tests.programs import Started

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path that is not there yet, and short, for the system allows a socket's path a hundred bytes."""
    parent = Path(tempfile.mkdtemp(prefix="jd-"))
    yield parent / "monitor"
    shutil.rmtree(parent)


async def look(folder: Path) -> list[dict[str, Any]]:
    return await anyio.to_thread.run_sync(monitor.read, str(folder))


def sockets(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.sock"))


async def test_a_pool_is_offered_while_it_is_open(make_db: Any, folder: Path) -> None:
    """The socket comes with the pool, has what the pool has, is for its owner alone, and goes with the pool."""
    db = await make_db(monitor=str(folder))
    await eventually(lambda: sockets(folder), "a socket")
    (path,) = sockets(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    await db.execute("INSERT INTO jobs (name) VALUES ('a')")
    async with db.transaction():
        await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": "very secret"})
        (process,) = await look(folder)
        (pool,) = process["pools"]
        assert (process["pid"], pool["database"], pool["stats"]["writer_in_use"]) == (os.getpid(), "default", 1)
        assert "test_a_pool_is_offered_while_it_is_open" in pool["held_by"]["writer"][0]
        assert "very secret" not in json.dumps(process)
    assert pool["stats"]["pool_size"] == 2
    assert pool["wal_bytes"] > 0
    await db.close()
    await eventually(lambda: not list(folder.iterdir()), "nothing left in the folder")
    assert await look(folder) == []


async def test_nothing_where_nothing_was_asked_for(db: Any, folder: Path) -> None:
    """Without the setting there is no thread and no file."""
    await db.fetch_value("SELECT 1")
    assert not [thread for thread in threading.enumerate() if thread.name == "database-monitor"]
    assert not folder.exists()


async def test_several_pools_share_a_socket(make_db: Any, engine: Any, folder: Path) -> None:
    """All pools of a process stand in one answer; the socket stays until the last of them closes."""
    db = await make_db(monitor=str(folder), audit={})
    audit = engine.public.get_db("audit")
    await audit.open()
    await eventually(lambda: sockets(folder), "a socket")
    assert len(sockets(folder)) == 1
    (process,) = await look(folder)
    assert sorted(pool["database"] for pool in process["pools"]) == ["audit", "default"]
    await db.close()
    (process,) = await look(folder)
    assert [pool["database"] for pool in process["pools"]] == ["audit"]


async def test_it_answers_while_the_event_loop_is_busy(make_db: Any, folder: Path) -> None:
    """A loop that does not turn is what somebody wants to look into: the answer does not need it."""
    await make_db(monitor=str(folder))
    await eventually(lambda: sockets(folder), "a socket")
    (process,) = monitor.read(str(folder))  # on the loop's own thread, which therefore does not turn
    assert process["pools"]


async def test_somebody_who_connects_and_does_not_read(
    make_db: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that hangs or goes away costs others a moment at most, and the database nothing."""
    monkeypatch.setattr(monitor, "_PATIENCE", 0.2)
    db = await make_db(monitor=str(folder))
    await eventually(lambda: sockets(folder), "a socket")
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as gone:
        idle.connect(str(sockets(folder)[0]))
        gone.connect(str(sockets(folder)[0]))
        gone.close()
        assert await db.fetch_value("SELECT 1") == 1
        assert len(await look(folder)) == 1


async def test_a_folder_that_cannot_be_made(make_db: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that cannot be watched works all the same, and says so in its log."""
    await anyio.Path(folder.parent).mkdir(exist_ok=True)
    folder.write_text("a file")
    db = await make_db(monitor=str(folder.parent / "fine"))
    await db.close()
    monitor.offer(str(folder / "below"), pool := object())  # type: ignore[arg-type]
    await eventually(lambda: "no socket can be offered" in caplog.text, "a warning")
    monitor.withdraw(pool)  # type: ignore[arg-type]


def test_what_changes_while_it_is_looked_at() -> None:
    """Collections belong to another thread: one that changes under the walk is walked again, and not for ever."""

    class Pool:
        name, waker = "default", SimpleNamespace(library="asyncio")
        backend = SimpleNamespace(description="nowhere.db")

        def __init__(self, failures: int) -> None:
            self.failures = failures

        def stats(self) -> PoolStats:
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("deque mutated during iteration")
            return PoolStats(waiting=3)

        def holders(self, *, readonly: bool) -> list[str]:
            return []

    (pool,) = monitor.snapshot({Pool(5): 1.0})["pools"]  # type: ignore[dict-item]
    assert pool["stats"]["waiting"] == 3
    (pool,) = monitor.snapshot({Pool(10**9): 1.0})["pools"]  # type: ignore[dict-item]
    assert pool["stats"] == {}


KILLED = """
import os, sys, anyio
from database.sqlite3 import configure, get_db
configure({"database": {"sqlite": {"path": sys.argv[1], "init_sql": "", "monitor": sys.argv[2]}}})
async def main():
    await get_db().open()
    while not os.path.isdir(sys.argv[2]) or not os.listdir(sys.argv[2]) or any(n[0] == "." for n in os.listdir(sys.argv[2])):
        await anyio.sleep(0.01)
    print("ready", flush=True)
    await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.any_loop
async def test_what_a_killed_process_leaves(make_db: Any, folder: Path, tmp_path: Path) -> None:
    """A socket whose process was killed is removed by whoever finds it: a reader, or a process that starts."""
    for finder in ("reader", "process"):
        with Started(["-c", KILLED, str(tmp_path / "other.db"), str(folder)], tmp_path) as process:
            assert process.stdout is not None
            assert await anyio.to_thread.run_sync(process.stdout.readline) == "ready\n"
            assert [each["pid"] for each in await look(folder)] == [process.pid]
            process.kill()
        (stale,) = sockets(folder)
        if finder == "reader":
            assert await look(folder) == []
        else:
            await make_db(monitor=str(folder))
        await eventually(lambda: not stale.exists(), "the stale socket is gone")  # noqa: B023


async def test_a_process_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process, or one of another version, is shown as such; its socket is left alone."""
    monkeypatch.setattr(monitor, "_PATIENCE", 0.1)
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(folder / "77-abc.sock"))
        stopped.listen()
        assert await look(folder) == [{"pid": "77", "error": "does not answer", "pools": []}]

        def answer() -> None:
            client, _ = stopped.accept()
            client.sendall(b'{"format": 99}')
            client.close()

        stopped.accept()[0].close()  # the one that was not answered
        thread = threading.Thread(target=answer)
        thread.start()
        (process,) = await look(folder)
        thread.join()
        assert process["error"] == "another version of this package"
    assert len(sockets(folder)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork(folder: Path, tmp_path: Path) -> None:
    """A forked child leaves its parent's socket alone, and has one of its own when it opens a pool."""
    code = f"""
import os, sys, time, anyio
from database.driver import monitor
from database.sqlite3 import configure, get_db
folder = {str(folder)!r}
configure({{"database": {{"sqlite": {{"path": {str(tmp_path / "x.db")!r}, "init_sql": "", "monitor": folder}}}}}})
def pids(wanted):
    while len(found := sorted(each["pid"] for each in monitor.read(folder))) != wanted if os.path.isdir(folder) else True:
        time.sleep(0.01)
    return found
async def main():
    await get_db().open()
    assert pids(1) == [os.getpid()]
    child = os.fork()
    if not child:
        try:
            async def other():
                await get_db().open()
                assert pids(2) == sorted([os.getppid(), os.getpid()])
            import threading
            thread = threading.Thread(target=lambda: anyio.run(other, backend="trio"))
            thread.start(); thread.join()
            os._exit(0 if pids(1) == [os.getppid()] else 3)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert pids(1) == [os.getpid()]
anyio.run(main)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]  # that there are threads, from 3.12 on
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    deadline = time.monotonic() + 5
    while sockets(folder) and time.monotonic() < deadline:
        os.sched_yield() if hasattr(os, "sched_yield") else None
    assert sockets(folder) == []
