"""Databases chosen at run time: a pattern in the configuration."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors, get_db
from database.sqlite3 import close_all, configure
from tests.contract.support import eventually, worker_threads

SCHEMA = "CREATE TABLE IF NOT EXISTS note (text TEXT);"


@pytest.fixture
async def tenants(anyio_backend: Any, tmp_path: Path) -> Any:
    await close_all()
    (tmp_path / "init.sql").write_text(SCHEMA)
    pattern = {"path": str(tmp_path / "data" / "{name}.db"), "max_open": 3}
    configure({"database": {"sqlite": {"init_sql": str(tmp_path / "init.sql"), "databases": {"tenant-*": pattern}}}})
    yield tmp_path / "data"
    await close_all()


def notes(file: Path) -> list[Any]:
    plain = sqlite3.connect(file)
    try:
        return [row[0] for row in plain.execute("SELECT text FROM note ORDER BY rowid")]
    finally:
        plain.close()


async def test_each_name_is_a_file_of_its_own(tenants: Path) -> None:
    """A name that fits the pattern is a database; many of them do not keep more open than `max_open`, and lose nothing."""
    threads = len(worker_threads())
    for number in range(12):
        for part in ("a", "b"):
            await get_db(f"tenant-{number}").execute("INSERT INTO note VALUES (?)", (f"{number}{part}",))
    for number in range(12):
        assert notes(tenants / f"tenant-{number}.db") == [f"{number}a", f"{number}b"]
    await eventually(lambda: len(worker_threads()) - threads <= 3, "only three writers are left")
    assert await get_db("tenant-0").fetch_value("SELECT count(*) FROM note") == 2


async def test_what_is_in_use_stays_open(tenants: Path) -> None:
    """Whoever is in a transaction, or has begun one without a statement, is not closed; the bound is exceeded meanwhile."""
    busy = [get_db(f"tenant-{number}") for number in range(5)]

    async def hold(db: Any, *, begun: bool, done: anyio.Event, ready: anyio.Event) -> None:
        async with db.transaction():
            if begun:
                await db.execute("INSERT INTO note VALUES ('first')")
            ready.set()
            await done.wait()
            await db.execute("INSERT INTO note VALUES ('last')")

    done = anyio.Event()
    async with anyio.create_task_group() as group:
        for number, db in enumerate(busy):
            ready = anyio.Event()
            group.start_soon(
                lambda db=db, number=number, ready=ready: hold(db, begun=number % 2 == 0, done=done, ready=ready)
            )
            await ready.wait()
        for number in range(5, 12):
            await get_db(f"tenant-{number}").execute("INSERT INTO note VALUES ('passing')")
        done.set()
    for number in range(5):
        assert notes(tenants / f"tenant-{number}.db") == (["first", "last"] if number % 2 == 0 else ["last"])


async def test_a_name_cannot_leave_the_folder(tenants: Path) -> None:
    """What stands for the star becomes a part of a file's name, so it is refused where it could be more than that."""
    for name in ("tenant-../x", "tenant-", "tenant-a/b", "tenant-.", "tenant-a\0", "tenant-ä", f"tenant-{'x' * 101}"):
        with pytest.raises(errors.ConfigurationError, match="does not fit"):
            await get_db(name).execute("SELECT 1")
    with pytest.raises(errors.ConfigurationError, match="no database is named"):
        await get_db("someone").execute("SELECT 1")
    assert not tenants.exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"databases": {"t-*": {"path": "one.db"}}}, "stands for the database's name"),
        ({"databases": {"*-*": {"path": "{name}.db"}}}, "one \\*"),
        ({"path": "{name}.db"}, "that a pattern gives"),
        ({"path": "x.db", "max_open": 5}, "only a pattern"),
        ({"databases": {"t-*": {"path": "{name}.db", "max_open": 0}}}, "max_open"),
    ],
)
def test_a_pattern_that_cannot_be(section: dict[str, Any], message: str) -> None:
    """A pattern without a place for the name, or a place for the name without a pattern, is refused where it stands."""
    with pytest.raises(errors.ConfigurationError, match=message):
        configure({"database": {"sqlite": section}})
