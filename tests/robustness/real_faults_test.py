"""Real faults: full disks, damaged files, directories that vanish or cannot be written to, failing log handlers."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import transactional
from tests.contract.support import HANGING, Engine, errors, gather, idle, names, usable
from tests.robustness.support import FIGURES, Program, leftovers

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO item (value) VALUES (?)"
BIG = "x" * 20_000


@contextlib.contextmanager
def limited_files(engine: Engine, size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "small"
    place.mkdir()
    if not hasattr(libc, "mount") or libc.mount(b"none", bytes(place), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"cannot mount a small file system here: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        assert libc.umount2(bytes(place), 2) == 0


async def write_until_full(db: Any) -> tuple[set[str], set[str]]:
    """Writes on all paths until each has failed; gives the words that were acknowledged and those refused."""
    done: set[str] = set()
    refused: set[str] = set()

    async def whole(word: str) -> None:
        async with db.transaction():
            await db.execute(INSERT, (f"{word}a{BIG}",))
            await db.execute(INSERT, (f"{word}b{BIG}",))

    def run(connection: Any, word: str) -> None:
        connection.execute(INSERT, (f"{word}a{BIG}",))
        connection.execute(INSERT, (f"{word}b{BIG}",))

    async def twice(word: str) -> None:
        await db.execute(INSERT, (f"{word}a{BIG}",))
        await db.execute(INSERT, (f"{word}b{BIG}",))

    paths: list[Callable[[str], Any]] = [
        whole,
        transactional(offload=True)(twice),
        lambda word: db.run(run, word),
        lambda word: db.execute_many(INSERT, [(f"{word}a{BIG}",), (f"{word}b{BIG}",)]),
        lambda word: db.execute("INSERT INTO item (value) VALUES (? || 'a' || ?), (? || 'b' || ?)", (word, BIG) * 2),
    ]

    async def task(number: int) -> None:
        failures = 0
        for step in range(60):
            word = f"{number}.{step}."
            try:
                await paths[number](word)
            except errors.QueryExecutionError:
                refused.add(word)
                failures += 1
                if failures == 3:
                    return
            else:
                done.add(word)
        raise AssertionError("the disk does not fill")

    results = await gather(*[lambda n=n: task(n) for n in range(len(paths))])
    assert results == [None] * len(paths), results
    return done, refused


def words(connection: sqlite3.Connection) -> dict[str, str]:
    """The words found, each with the endings it has."""
    found: dict[str, str] = {}
    for (value,) in connection.execute("SELECT value FROM item ORDER BY id"):
        word, ending = value[: value.rindex(".") + 1], value[value.rindex(".") + 1]
        found[word] = found.get(word, "") + ending
    return found


async def check_full_disk(db: Any, path: Path, limit: Callable[[], Any]) -> None:
    with limit():
        with anyio.fail_after(HANGING):
            done, refused = await write_until_full(db)
        await idle(db)
        assert await db.fetch_value("SELECT count(*) FROM item") == 2 * len(done)  # reading goes on
    connection = sqlite3.connect(path)
    try:
        found = words(connection)
        assert found == dict.fromkeys(done, "ab"), "what was acknowledged, and only that, whole"
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
    FIGURES["writes refused by a full disk"] += len(refused)


async def test_a_full_disk_by_file_size(make_db: Any, engine: Engine) -> None:
    """When files cannot grow any more, writes fail whole, reads go on, and with room again all is well."""
    db = await make_db()
    await check_full_disk(db, engine.path(), lambda: limited_files(engine, 300_000))
    await usable(db)


async def test_a_full_disk_by_pages(make_db: Any, engine: Engine) -> None:
    """SQLITE_FULL refuses writes whole on every path; the limit lifted, all is well."""
    db = await make_db(pragmas={"max_page_count": 120})
    await check_full_disk(db, engine.path(), contextlib.nullcontext)
    db = await make_db(schema=False)
    await usable(db)


async def test_a_full_file_system(make_db: Any, engine: Engine, small_disk: Path) -> None:
    """A file system without a free block: writes fail whole, reads go on, space again and all is well."""
    path = small_disk / "test.db"
    db = await make_db(path=str(path), synchronous="FULL")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 550_000)
    await check_full_disk(db, path, contextlib.nullcontext)
    ballast.unlink()
    await usable(db)
    await db.close()
    assert leftovers(path) == []


@pytest.mark.parametrize("cut", [0, 100, 4096, 5000])
async def test_a_truncated_file(make_db: Any, engine: Engine, cut: int) -> None:
    """A file cut short under an open pool or before it is opened gives the package's error, again and again, and the
    pool neither hangs nor leaks; what is left of the file is not written to.
    """
    db = await make_db()
    await db.execute_many(INSERT, [(BIG,)] * 20)
    await db.close()
    os.truncate(engine.path(), cut)
    for _ in range(3):
        with anyio.fail_after(HANGING):
            results = await gather(
                lambda: db.fetch_value("SELECT sum(length(value)) FROM item"),
                lambda: db.execute(INSERT, ("more",)),
                lambda: names(db),
            )
        assert all(isinstance(result, errors.DatabaseError) for result in results), results
    await db.close()


@pytest.mark.parametrize("offset", [16, 100, 60_000])
async def test_a_scribbled_file(make_db: Any, engine: Engine, offset: int) -> None:
    """Garbage over header or pages is an error of the package's for whoever meets it; nobody hangs."""
    db = await make_db()
    await db.execute_many(INSERT, [(BIG,)] * 20)
    await db.close()
    with engine.path().open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 3000)
    for _ in range(3):
        with anyio.fail_after(HANGING):
            results = await gather(
                lambda: db.fetch_value("SELECT sum(length(value)) FROM item"),
                lambda: db.execute("UPDATE item SET value = value || 'x'"),
                lambda: names(db),
            )
        failures = [result for result in results if isinstance(result, BaseException)]
        assert failures
        assert all(isinstance(result, errors.DatabaseError) for result in failures), results
        assert any(
            isinstance(result, (errors.DatabaseCorruptError, errors.ConnectionFailedError)) for result in failures
        )
    await idle(db)
    await db.close()


async def test_a_scribbled_wal(make_db: Any, engine: Engine) -> None:
    """Garbage in the WAL of a process that was killed: what its checksums do not cover is dropped, never half read."""
    db = await make_db()
    await db.close()
    keeper = sqlite3.connect(engine.path(), isolation_level=None)
    keeper.execute("PRAGMA wal_autocheckpoint = 0")
    for number in range(20):
        keeper.execute("BEGIN")
        keeper.execute(INSERT, (f"{number}a",))
        keeper.execute(INSERT, (f"{number}b",))
        keeper.execute("COMMIT")
    copy = engine.directory / "copy.db"
    shutil.copy(engine.path(), copy)
    wal = Path(f"{engine.path()}-wal").read_bytes()
    keeper.close()
    damaged = bytearray(wal)
    damaged[len(wal) // 2 : len(wal) // 2 + 50] = b"\xa5" * 50
    Path(f"{copy}-wal").write_bytes(damaged)
    db = await make_db(path=str(copy), schema=False)
    found = [row[0] for row in await db.fetch_all("SELECT value FROM item ORDER BY id")]
    whole = [f"{number}{ending}" for number in range(20) for ending in "ab"]
    assert 0 < len(found) < 40
    assert found == whole[: len(found)]
    assert len(found) % 2 == 0, "half a transaction"
    assert await db.fetch_value("PRAGMA integrity_check") == "ok"


async def test_a_deleted_directory(make_db: Any, engine: Engine) -> None:
    """The directory goes away under an open pool: each call ends, with an answer or an error of the package's; the
    pool closes; the next use makes a new, empty database.
    """
    place = engine.directory / "gone"
    db = await make_db(path=str(place / "test.db"))
    await db.execute(INSERT, ("lost with its directory",))
    shutil.rmtree(place)
    with anyio.fail_after(HANGING):
        for _ in range(3):
            results = await gather(
                lambda: db.execute(INSERT, ("more",)),
                lambda: names(db),
                lambda: db.run(lambda c: c.execute("SELECT 1")),
            )
            assert all(
                not isinstance(each, BaseException) or isinstance(each, errors.DatabaseError) for each in results
            )
        await db.close()
    await db.execute_script(engine.schema)
    await usable(db)
    assert (place / "test.db").exists()


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Without the right to write, opening fails at once and says why; given the right, the same handle works."""
    place = tmp_path / "readonly"
    place.mkdir()
    place.chmod(0o777)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(parent.stat().st_mode | 0o011)
        elif not parent.stat().st_mode & 0o001:
            pytest.skip(f"nobody but its owner may enter {parent}")
    code = """
    import database.sqlite3.engine, anyio._backends._asyncio, urllib.parse  # before they cannot be read any more
    place = os.path.dirname(sys.argv[1])
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write anywhere
    os.close(os.open(sys.argv[1], os.O_CREAT, 0o600))
    os.chmod(place, 0o555) if os.stat(place).st_uid == os.geteuid() else None

    async def main():
        if os.stat(place).st_uid != os.geteuid():
            os.seteuid(0)
            os.chmod(place, 0o555)
            os.seteuid(65534)
        for _ in range(3):
            try:
                await db.execute("CREATE TABLE t (x)")
            except errors.ConnectionFailedError as error:
                assert "directory" in str(error), error
            else:
                raise AssertionError("it could be written to")
        os.seteuid(0) if os.getuid() == 0 else None
        os.chmod(place, 0o777)
        os.seteuid(65534) if os.getuid() == 0 else None
        await db.execute("CREATE TABLE t (x)")
        assert await db.fetch_value("SELECT count(*) FROM t") == 0
        await close_all()
        os.seteuid(os.getuid())
        say("fine")

    anyio.run(main)
    """
    assert Program(code, place / "test.db").end().ok().out == "fine\n"


async def test_a_log_handler_that_raises(db: Any, engine: Engine) -> None:
    """A failing handler or filter of the application's costs a log record, never an answer or the worker."""

    class Broken(logging.Handler):
        calls = 0

        def emit(self, record: logging.LogRecord) -> None:
            Broken.calls += 1
            raise RuntimeError("the log host is down")

    logger = logging.getLogger("database")
    handler = Broken()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with anyio.fail_after(HANGING):
            await db.execute(INSERT, ("a",))
            assert await db.fetch_value("SELECT count(*) FROM item") == 1
            async with db.transaction():
                await db.execute(INSERT, ("b",))
            with pytest.raises(errors.QueryExecutionError):
                await db.execute("INSERT INTO nowhere VALUES (1)")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert Broken.calls >= 4
    await usable(db)
