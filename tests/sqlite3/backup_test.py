"""`db.backup()` never destroys a database that somebody has open."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any

import anyio
import pytest

from database import errors
from tests.contract.support import Engine, eventually

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE", "MEMORY"])
async def test_never_over_a_database_in_use(make_db: Any, engine: Engine, journal_mode: str) -> None:
    """A backup onto its own file, onto another open database, or onto what lies beside one, is refused, by whatever path or
    link; both live on.
    """
    db = await make_db(journal_mode=journal_mode, audit={"journal_mode": journal_mode})
    audit = engine.public.get_db("audit")
    await db.execute("INSERT INTO item (value) VALUES ('mine')")
    await audit.execute("INSERT INTO item (value) VALUES ('audited')")
    own, other = engine.path(), engine.path("audit")
    (engine.directory / "folder").mkdir()
    names = [own, other, engine.directory / "folder" / ".." / own.name, os.path.relpath(own)]
    for number, file in enumerate((own, other)):
        hard, soft = engine.directory / f"hard{number}.db", engine.directory / f"soft{number}.db"
        os.link(file, hard)
        soft.symlink_to(file)
        names += [hard, soft, str(soft)]
        (beside := engine.directory / f"beside{number}").symlink_to(f"{file}-wal")
        names += [f"{file}-wal", f"{file}-shm", f"{file}-journal", beside, os.fsencode(file)]
    for name in names:
        with pytest.raises(errors.ConnectionFailedError, match="in use|belongs to"):
            await db.backup(name)
    os.mkfifo(pipe := engine.directory / "pipe")
    with pytest.raises(errors.ConnectionFailedError, match="no file"):
        await db.backup(pipe)
    (engine.directory / "file").write_text("a file")
    for place in ("folder", "folder/", "file/", "new/", "new/.", "folder/.."):  # never a file that is called like it
        with pytest.raises(errors.ConnectionFailedError, match="directory"):
            await db.backup(f"{engine.directory}/{place}")
    assert (engine.directory / "file").read_text() == "a file"
    assert not (engine.directory / "new").exists()
    await db.execute("INSERT INTO item (value) VALUES ('more')")
    await audit.execute("INSERT INTO item (value) VALUES ('more')")
    assert engine.outside("SELECT value FROM item") == [("mine",), ("more",)]
    assert engine.outside("SELECT value FROM item", "audit") == [("audited",), ("more",)]
    assert not list(engine.directory.glob(".*partial*"))

    copy = engine.directory / "copy.db"
    for wanted in (2, 3):  # an older copy is replaced
        await db.backup(copy)
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("SELECT count(*) FROM item").fetchone() == (wanted,)
        await db.execute("INSERT INTO item (value) VALUES ('more')")
    await audit.close()
    await db.backup(other)  # nobody has it open any more
    assert engine.outside("SELECT count(*) FROM item", "audit") == [(4,)]


async def test_never_over_what_another_process_holds(db: Any, engine: Engine) -> None:
    """A lock of another process is looked for, in every journal mode; without one the file is replaced."""
    code = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute(f'PRAGMA journal_mode={sys.argv[2]}')\n"
        "c.execute('CREATE TABLE IF NOT EXISTS t (x)'); c.execute(sys.argv[3]); c.execute('SELECT * FROM t').fetchall()\n"
        "print('ready', flush=True); sys.stdin.read(); c.execute('ROLLBACK'); c.close()\n"
    )
    target = engine.directory / "theirs.db"
    for mode, begin in (
        ("DELETE", "BEGIN IMMEDIATE"),
        ("DELETE", "BEGIN"),
        ("WAL", "BEGIN IMMEDIATE"),
        ("MEMORY", "BEGIN EXCLUSIVE"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(target), mode, begin],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(errors.ConnectionFailedError, match="in use"):
                await db.backup(target)
        finally:
            process.communicate("", timeout=10)
        with closing(sqlite3.connect(target)) as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]
    await db.backup(target)


async def test_what_progress_raises(db: Any, engine: Engine) -> None:
    """An error of the caller's progress function arrives as it was raised, and leaves nothing behind."""
    mine = sqlite3.OperationalError("mine")

    def progress(_status: int, _remaining: int, _total: int) -> None:
        raise mine

    with pytest.raises(sqlite3.OperationalError) as caught:
        await db.backup(engine.directory / "copy.db", progress=progress)
    assert caught.value is mine
    assert not list(engine.directory.glob("*copy*"))
    assert not list(engine.directory.glob(".*partial*"))


async def test_it_waits_for_another_process(make_db: Any, engine: Engine) -> None:
    """Without a WAL another process can keep everybody from reading: a backup waits for that as all else does."""
    db = await make_db(journal_mode="DELETE", busy_timeout=20_000)
    await db.execute("INSERT INTO item (value) VALUES ('mine')")
    copy = engine.directory / "copy.db"
    with closing(sqlite3.connect(engine.path(), isolation_level=None)) as outside:
        outside.execute("BEGIN EXCLUSIVE")
        async with anyio.create_task_group() as group:
            group.start_soon(db.backup, copy)
            await eventually(lambda: db.stats().readers_in_use)
            await anyio.sleep(0.1)
            outside.execute("COMMIT")
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT value FROM item").fetchall() == [("mine",)]
