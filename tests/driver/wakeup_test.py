"""Which event loop it is that runs the caller."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.robustness.support import Program

pytest.importorskip("trio")

HALF_IMPORTED = """
import importlib.machinery
assert "trio" not in sys.modules
gates = {name: (threading.Event(), threading.Event()) for name in ("trio._core", "trio._core._run", "trio.lowlevel")}

class Gate:  # holds up each of these modules before it is run, with trio half made
    def find_spec(self, name, path=None, target=None):
        if name in gates:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            run = spec.loader.exec_module

            def held(module):  # not in here: Python's global import lock is held
                reached, go = gates[name]
                reached.set()
                assert go.wait(60)
                run(module)

            spec.loader.exec_module = held
            return spec

sys.meta_path.insert(0, Gate())

async def main():
    await db.execute("CREATE TABLE t (n)")
    thread = threading.Thread(target=__import__, args=("trio",))
    thread.start()
    number = 0
    for name, (reached, go) in gates.items():
        assert await asyncio.to_thread(reached.wait, 60), name
        assert "trio" in sys.modules and not hasattr(sys.modules["trio"], "run"), name
        async with db.transaction():
            await db.execute("INSERT INTO t VALUES (?)", (number,))
            number += 1
        assert await db.fetch_value("SELECT count(*) FROM t") == number
        async with db.stream("SELECT n FROM t") as rows:
            assert len([row async for row in rows]) == number
        go.set()
    await asyncio.to_thread(thread.join)
    await db.execute("INSERT INTO t VALUES (?)", (number,))
    import trio

    def elsewhere():  # by the thread that has trio now
        async def insert():
            await db.execute("INSERT INTO t VALUES (-1)")
        trio.run(insert)
    await asyncio.to_thread(elsewhere)
    await close_all()

asyncio.run(main())
"""


def test_trio_that_another_thread_is_just_importing(tmp_path: Path) -> None:
    """A program of asyncio's works on while trio stands in `sys.modules` half made, at any point of its import."""
    path = tmp_path / "x.db"
    Program(HALF_IMPORTED, path, flags=("-W", "error")).end().ok()  # with nothing imported
    outside = sqlite3.connect(path)
    try:
        assert [row[0] for row in outside.execute("SELECT n FROM t ORDER BY n")] == [-1, 0, 1, 2, 3]
    finally:
        outside.close()
