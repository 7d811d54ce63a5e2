"""Where the file is, whatever happens around it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors
from database.sqlite3 import close_all, configure, get_db


@pytest.fixture
async def db(anyio_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A database by a relative path, of which only the writer is open."""
    await close_all()
    monkeypatch.chdir(tmp_path)
    configure(
        {
            "database": {
                "sqlite": {"path": "data/x.db", "attach": {"more": "data/more.db"}, "init_sql": "", "pool_size": 3}
            }
        }
    )
    db = get_db()
    await db.execute("CREATE TABLE item (value TEXT)")
    await db.execute("INSERT INTO item VALUES ('first')")
    yield db
    await close_all()


async def read_by_three(db: Any) -> list[str]:
    """What three readers at once see."""
    found: list[str] = []
    ready = [anyio.Event() for _ in range(3)]

    async def read(mine: anyio.Event) -> None:
        async with db.transaction(readonly=True):
            found.append(await db.fetch_value("SELECT group_concat(value) FROM item"))
            mine.set()
            for other in ready:
                await other.wait()

    async with anyio.create_task_group() as group:
        for event in ready:
            group.start_soon(read, event)
    return found


async def test_a_working_directory_that_changes(db: Any, tmp_path: Path) -> None:
    """A program may change its directory, as daemons do: connections that are opened later open the same files."""
    other = tmp_path / "other"
    other.mkdir()
    os.chdir(other)
    await db.execute("CREATE TABLE more.item2 (value TEXT)")
    assert await read_by_three(db) == ["first"] * 3
    assert list(other.iterdir()) == []
    assert (tmp_path / "data" / "more.db").stat().st_size > 0


async def test_a_file_that_is_replaced(db: Any, tmp_path: Path) -> None:
    """Whoever puts another file in the place of one that is open is told; nobody reads one file and writes another."""
    file = tmp_path / "data" / "x.db"
    file.rename(tmp_path / "old.db")
    plain = sqlite3.connect(file)
    plain.execute("PRAGMA journal_mode = WAL")
    plain.execute("CREATE TABLE item (value TEXT)")
    plain.commit()
    plain.close()
    with pytest.raises(errors.ConnectionFailedError, match="put in its place"):
        await db.fetch_value("SELECT count(*) FROM item")
