"""The database under test: schema, statements, seeding, and the check that what was acknowledged is there."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

ITEMS = 10_000
NOTE = "a line of the log"

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL, hits INTEGER NOT NULL DEFAULT 0);
CREATE TABLE log (id INTEGER PRIMARY KEY, item INTEGER NOT NULL, note TEXT NOT NULL);
CREATE TABLE bulk (id INTEGER PRIMARY KEY, name TEXT NOT NULL, value REAL NOT NULL);
CREATE TABLE sink (id INTEGER PRIMARY KEY, name TEXT NOT NULL, value REAL NOT NULL);
"""

POINT = "SELECT id, name FROM item WHERE id = ?"
INSERT = "INSERT INTO log (item, note) VALUES (?, ?)"
UPDATE = "UPDATE item SET hits = hits + 1 WHERE id = ?"
ALL = "SELECT id, name, value FROM bulk"
FIRST = "SELECT id, name, value FROM bulk WHERE id <= ?"
SCAN = "SELECT sum(id * 3 + value) FROM bulk WHERE id <= ?"
SINK = "INSERT INTO sink (name, value) VALUES (?, ?)"
SLOW = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < ?) SELECT count(*) FROM n"


class WrongAnswerError(Exception):
    """A contender answered something else than the database holds."""


def name_of(key: int) -> str:
    """The name that stands in the row ``key`` of ``item`` and of ``bulk``."""
    return f"item {key:06}"


def seed(path: Path, *, items: int = ITEMS, bulk: int = 100_000) -> None:
    """Write a new database file, checkpointed into one file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO item (id, name) VALUES (?, ?)", ((key, name_of(key)) for key in range(1, items + 1))
        )
        connection.executemany(
            "INSERT INTO bulk VALUES (?, ?, ?)", ((key, name_of(key), key / 2) for key in range(1, bulk + 1))
        )
        connection.execute("COMMIT")


def copy(template: Path, path: Path) -> None:
    """Copy the seeded file and push it to the disk, so that no write-back disturbs what is timed next."""
    shutil.copyfile(template, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a database file and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def verify(path: Path, *, transactions: int, inserts: int, bulk: int) -> None:
    """Compare the closed database with what its contender acknowledged."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(
            "SELECT (SELECT count(*) FROM log), (SELECT sum(hits) FROM item), (SELECT count(*) FROM sink)"
        ).fetchone()
        (integrity,) = connection.execute("PRAGMA quick_check").fetchone()
    wanted = (transactions + inserts, transactions, bulk)
    if found != wanted:
        raise WrongAnswerError(f"rows in log, updates, rows in sink: {found}, acknowledged: {wanted}")
    if integrity != "ok":
        raise WrongAnswerError(f"quick_check: {integrity}")


def filesystem(path: Path) -> str:
    """The type of the file system ``path`` is on, ``unknown`` where there is no ``/proc/mounts``."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    path = path.resolve()
    found = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(found)[1] if found else "unknown"


def working_folder(parent: Path | None) -> Path:
    """A new folder on a real disk: below ``parent``, else the temporary folder unless that is memory."""
    if parent is None and filesystem(Path(tempfile.gettempdir())) in {"tmpfs", "ramfs"}:
        parent = Path.cwd()
    return Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
