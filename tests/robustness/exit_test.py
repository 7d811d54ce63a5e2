"""Interpreters that end in every way: no hang, no noise, no `-wal` left, and a hint where close was forgotten."""

from __future__ import annotations

import signal
import sqlite3
import time
from pathlib import Path
from textwrap import dedent, indent

import pytest

from tests import programs
from tests.contract.support import HANGING
from tests.robustness.support import Program, leftovers

OPEN = """
await db.execute_script("CREATE TABLE IF NOT EXISTS t (x); INSERT INTO t VALUES (1)")
await db.fetch_all("SELECT * FROM t")
"""

SLOWLY = """
async with anyio.create_task_group() as group:
    group.start_soon(db.fetch_value, SLOW)
    while not db.stats().readers_in_use:
        await anyio.sleep(0.001)
    END
"""

ENDS = {
    "returns": (OPEN, 0, ""),
    "raises": (OPEN + "raise RuntimeError('mine')", 1, "RuntimeError: mine"),
    "exits": (OPEN + "sys.exit(3)", 3, ""),
    "exits-in-a-transaction": (
        OPEN + "async with db.transaction():\n    await db.execute('INSERT INTO t VALUES (2)')\n    sys.exit(3)", 3, ""),
    "raises-while-a-statement-runs": (OPEN + SLOWLY.replace("END", "raise RuntimeError('mine')"), 1, "RuntimeError: mine"),
    "exits-in-a-function-on-the-worker": (OPEN + "await db.run(lambda connection: sys.exit(7))", 7, ""),
    "exits-in-a-progress-callback": (
        OPEN + "await db.backup(sys.argv[1] + '.copy', progress=lambda *_: sys.exit(7))", 7, ""),
    "in-an-open-stream": (
        OPEN + "stream = db.stream(SLOW.replace('count(*)', 'x'))\nawait stream.__aenter__()\nawait anext(stream)", 0, ""),
    "in-an-open-manual-transaction": (OPEN + "await db.begin()\nawait db.execute('INSERT INTO t VALUES (2)')", 0, ""),
    "closed": (OPEN + "await close_all()\nawait close_all()", 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("end", ENDS)
def test_end_of_a_program(tmp_path: Path, end: str, backend: str) -> None:
    """However `main` ends with its pool open: promptly, with its own status, with no other word on stderr, and with
    everything in the one database file.
    """
    body, status, message = ENDS[end]
    code = f"async def main():\n{indent(body, '    ')}\n"
    code += f"try:\n    anyio.run(main, backend={backend!r})\nfinally:\n    say('end')\n"
    path = tmp_path / "test.db"
    ended = Program(code, path).end()
    wanted = {status} if not (status in (3, 7) and backend == "trio") else {status, 1}
    assert ended.status in wanted, ended
    if message:
        assert message in ended.err
    elif ended.status == status:
        assert ended.err == ""
    assert "Exception ignored" not in ended.err
    assert "database-" not in ended.err, "a worker's thread has something to say"
    assert leftovers(path) == []
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    finally:
        connection.close()


@pytest.mark.parametrize("what", ["idle", "statement", "transaction", "offload", "waiting"])
@pytest.mark.parametrize("loop", ["never-closed", "running-in-a-thread"])
def test_end_of_the_interpreter(tmp_path: Path, what: str, loop: str) -> None:
    """The interpreter ends while a loop that nobody closed has its pool open, and something running on it: what runs
    (for minutes, if it were let) is interrupted, the process ends, nothing is left behind and nothing is said.
    """
    path = tmp_path / "test.db"
    work = {
        "idle": "pass",
        "statement": "tasks.append(asyncio.ensure_future(db.fetch_value(SLOW)))",
        "transaction": "tasks.append(asyncio.ensure_future(transaction()))",
        "offload": "tasks.append(asyncio.ensure_future(transactional(offload=True)(computing)()))",
        "waiting": "tasks.extend(asyncio.ensure_future(transaction()) for _ in range(3))",
    }[what]
    code = f"""
    tasks = []

    async def computing():
        await db.execute("INSERT INTO t VALUES (2)")
        await db.fetch_value(SLOW)

    async def transaction():
        async with db.transaction():
            await computing()

    async def main():
        {indent(OPEN, "        ").strip()}
        {work}
        while tasks and not (db.stats().writer_in_use or db.stats().readers_in_use):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)

    def begin():
        global loop
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        if sys.argv[2] == "running-in-a-thread":
            ready.set()
            loop.run_forever()

    ready = threading.Event()
    if sys.argv[2] == "running-in-a-thread":
        threading.Thread(target=begin, daemon=True).start()
        ready.wait()
    else:
        begin()
    say("end")
    """
    program = Program(code, path, loop)
    program.expect("end")
    ended = program.end()
    assert ended.status == 0, ended
    assert ended.seconds < HANGING
    # What asyncio itself says of tasks that nobody waited for is not ours to keep back.
    assert "Exception ignored" not in ended.err
    assert "Fatal" not in ended.err
    assert "Traceback" not in ended.err or "PoolClosedError" in ended.err
    if what == "idle":
        assert ended.err == ""
    assert leftovers(path) == []
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    finally:
        connection.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("what", ["statement", "offload", "commit-loop"])
def test_ctrl_c(tmp_path: Path, what: str, backend: str) -> None:
    """Ctrl-C in the middle of something ends the program within a second; the transaction is undone, the file whole."""
    path = tmp_path / "test.db"
    code = """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored

    async def computing():
        await db.execute("INSERT INTO t VALUES (2)")
        await db.fetch_value(SLOW)

    async def committing():
        while True:
            async with db.transaction():
                await db.execute("INSERT INTO u VALUES (1)")
                await db.execute("INSERT INTO u VALUES (2)")

    async def main():
        await db.execute_script("CREATE TABLE t (x); INSERT INTO t VALUES (1); CREATE TABLE u (x)")
        say("ready")
        if sys.argv[2] == "statement":
            await transactional(computing)()
        elif sys.argv[2] == "offload":
            await transactional(offload=True)(computing)()
        else:
            await committing()

    anyio.run(main, backend=BACKEND)
    """
    program = Program(code.replace("BACKEND", repr(backend)), path, what)
    program.expect("ready")
    time.sleep(0.15)  # into whatever it is doing: there is no better moment than any
    program.lines.append("end")
    program.kill(signal.SIGINT)
    ended = program.end()
    assert ended.seconds < HANGING
    assert ended.status in (-signal.SIGINT, 130, 1), ended
    assert "KeyboardInterrupt" in ended.err
    assert "Exception ignored" not in ended.err
    assert leftovers(path) == []
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
        assert connection.execute("SELECT count(*) % 2 FROM u").fetchall() == [(0,)]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()


GARBAGE = """
import gc, warnings
before = threading.active_count()

def forget():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(work())

async def work():
    await db.execute_script("CREATE TABLE IF NOT EXISTS t (x); INSERT INTO t VALUES (1)")
    await db.fetch_all("SELECT * FROM t")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    COLLECT
    texts = [str(each.message) for each in caught if each.category is ResourceWarning]
    deadline = time.monotonic() + 5
    while (threading.active_count() > before or os.path.exists(sys.argv[1] + "-wal")) and time.monotonic() < deadline:
        time.sleep(0.005)
    gc.collect()
    texts = [str(each.message) for each in caught if each.category is ResourceWarning]
assert threading.active_count() == before, threading.enumerate()
assert any("database 'default' was not closed" in text for text in texts), texts
configure({"database": {"sqlite": settings}})  # nothing is open any more
say("fine")
"""

COLLECTS = {
    "main-thread": """
    forget()
    gc.collect()
    """,
    "other-worker": """
    forget()
    gc.disable()
    forget()
    configured = False
    async def other():
        await db.run(lambda connection: gc.collect())
    asyncio.run(other())
    """,
    "own-worker": """
    entered, release = threading.Event(), threading.Event()
    def hold(connection):
        entered.set()
        release.wait(5)
        gc.collect()
    async def holding():
        await work()
        task = asyncio.ensure_future(db.run(hold))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
    def forget_holding():
        loop = asyncio.new_event_loop()
        loop.run_until_complete(holding())
    gc.disable()
    forget_holding()
    release.set()
    """,
}


@pytest.mark.parametrize("who", COLLECTS)
def test_a_loop_that_is_garbage(tmp_path: Path, who: str) -> None:
    """A loop that was thrown away open takes its pool with it, whatever thread the collector runs on: threads end,
    files are closed, and a ResourceWarning says so.
    """
    path = tmp_path / "test.db"
    code = GARBAGE.replace("    COLLECT\n", indent(dedent(COLLECTS[who]), "    "))
    ended = Program(code, path).end().ok()
    assert ended.out == "fine\n"
    assert "Exception ignored" not in ended.err
    assert leftovers(path) == []


@pytest.mark.parametrize("scope", ["function", "module", "session"])
def test_pytest_with_scopes_of_anyio_backend(tmp_path: Path, scope: str) -> None:
    """Test suites whose event loop lives for a test, a module or the session use one handle without a hitch."""
    (tmp_path / "conftest.py").write_text(
        dedent(f"""
        import pytest
        from database.sqlite3 import close_all, configure, get_db

        configure({{"database": {{"sqlite": {{"path": {str(tmp_path / "test.db")!r}, "init_sql": ""}}}}}})

        @pytest.fixture(scope={scope!r}, params=["asyncio", "trio"])
        def anyio_backend(request):
            return request.param

        @pytest.fixture
        async def rolled_back(anyio_backend):
            db = get_db()
            await db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            async with db.transaction() as transaction:
                yield db
                await transaction.rollback()
        """)
    )
    test = dedent("""
        import pytest
        from database.sqlite3 import get_db
        db = get_db()
        pytestmark = pytest.mark.anyio

        @pytest.mark.parametrize("number", range(3))
        async def test_each_sees_only_its_own(rolled_back, number):
            await rolled_back.execute("INSERT INTO t VALUES (?)", (number,))
            assert await rolled_back.fetch_value("SELECT count(*) FROM t") == 1

        async def test_outside():
            await db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            assert await db.fetch_value("SELECT count(*) FROM t") == 0
        """)
    (tmp_path / "test_one.py").write_text(test)
    (tmp_path / "test_two.py").write_text(test)
    status, out, err = programs.run([*programs.PYTEST, str(tmp_path)], tmp_path, timeout=300)
    assert (status, err) == (0, ""), out + err
    assert "16 passed" in out
    assert leftovers(tmp_path / "test.db") == []
