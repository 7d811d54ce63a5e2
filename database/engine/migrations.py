"""Migrations: a folder of numbered SQL files, and what a database says of those it has seen.

    sql/migrations/0001_jobs.sql
    sql/migrations/0002_owner.sql

Where the SQL must differ, a file says by its name for which engine it is, and each engine has one of that number:

    sql/migrations/0003_search.sqlite.sql
    sql/migrations/0003_search.postgresql.sql

What is here knows no engine: it reads the folder, holds it against the database's record, and says what is left to do.
An engine does the rest (its module `migrate`: see `contract.Migrations`), because it alone can take its lock and knows what
its schema changes need.

The rules exist so that two databases with the same record have the same schema. Numbers have no gaps and no
duplicates, so everybody applies the same files in the same order; a file that has been applied never changes, which
its checksum proves; nothing is applied before something that has been.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from database.errors import MigrationError

__all__ = ["TABLE", "Applied", "Migration", "MigrationReport", "MigrationStatus", "Order", "load", "pending"]

TABLE = "database_migrations"
"""The table that holds the record, in every engine."""

_NAME = re.compile(r"(?P<number>[0-9]+)_(?P<name>\w[\w.-]*)\.sql")
_SECTIONS = {"sqlite": "sqlite3", "sqlite3": "sqlite3", "postgresql": "postgresql"}
"""What stands before `.sql` in the name of a file for one engine, and the engine's package."""
_COMMENTS = re.compile(r"--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Migration:
    """A file of the folder.

    Attributes:
        number: The number that its name begins with.
        name: The file's name.
        path: Where it is.
        sql: What it holds.
        checksum: SHA-256 of that; line ends and a byte order mark do not count, for version control changes them.
    """

    number: int
    name: str
    path: str
    sql: str = field(repr=False)
    checksum: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Applied:
    """What the database has recorded of a migration.

    Attributes:
        number: Its number.
        name: The name that its file had.
        checksum: The checksum that its file had.
        applied_at: When, in UTC, as the database wrote it.
        seconds: How long it took; 0 for a baseline.
    """

    number: int
    name: str
    checksum: str
    applied_at: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What `db.migrate()` did.

    Attributes:
        applied: What was applied now; in a dry run, what would be, and has been tried.
        version: The database's last migration, afterwards; 0 if there is none.
        dry_run: Whether all was rolled back.
    """

    applied: tuple[Migration, ...]
    version: int
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """Where a database stands.

    Attributes:
        applied: Its record.
        pending: What `migrate()` would apply.
    """

    applied: tuple[Applied, ...]
    pending: tuple[Migration, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What an engine is asked to do. See `Database.migrate`."""

    folder: str
    dry_run: bool = False
    to: int | None = None
    baseline: int | None = None
    wait: float = 60.0
    progress: Callable[[Migration, float], object] | None = None


def load(folder: str | os.PathLike[str], engine: str = "sqlite3") -> tuple[Migration, ...]:
    """Reads a folder: all files that end in `.sql`, but for hidden ones and those of other engines; no subfolders.

    Where the SQL must differ, `0003_x.sqlite.sql` stands beside `0003_x.postgresql.sql`, and each engine reads its own.

    Raises:
        MigrationError: It cannot be read; a name is no `0001_name.sql`; a number is missing or given twice; a file
            holds nothing.
    """
    path = Path(folder).expanduser()
    try:
        files = sorted(each for each in path.iterdir() if each.suffix.lower() == ".sql" and each.is_file())
    except OSError as error:
        raise MigrationError(f"{path}: the folder of migrations cannot be read: {error.strerror or error}") from error
    files = [file for file in files if not file.name.startswith(".")]
    others = [file for file in files if _SECTIONS.get(Path(file.stem).suffix[1:], engine) != engine]
    found = sorted((_read(file) for file in files if file not in others), key=lambda each: each.number)
    expected = 1
    previous: Migration | None = None
    for migration in found:
        if previous is not None and migration.number == previous.number:
            raise MigrationError(
                f"{path}: {previous.name} and {migration.name} have the same number; renumber the one that no database"
                " has seen yet"
            )
        for other in others if migration.number != expected else ():
            if (match := _NAME.fullmatch(other.name)) is not None and int(match["number"]) == expected:
                raise MigrationError(
                    f"{path}: {other.name} has no counterpart for {engine}: add one of that number, if only with `SELECT 1`"
                )
        if migration.number != expected:
            raise MigrationError(
                f"{path}: there is no migration {expected:04d} before {migration.name}; numbers begin at 1 and have no gaps"
            )
        previous = migration
        expected += 1
    return tuple(found)


def _read(path: Path) -> Migration:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise MigrationError(f"{path}: not a migration's name; expected a number, `_` and a name: 0001_create_jobs.sql")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MigrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MigrationError(f"{path}: not UTF-8: {error.reason}") from None
    sql = text.replace("\r\n", "\n")
    if not _COMMENTS.sub("", sql).strip(" \t\n;"):
        raise MigrationError(f"{path}: holds no statement")
    checksum = hashlib.sha256(sql.encode()).hexdigest()
    return Migration(int(match["number"]), path.name, str(path), sql, checksum)


def pending(migrations: Sequence[Migration], applied: Sequence[Applied], folder: str) -> tuple[Migration, ...]:
    """What is left to apply, in order.

    Raises:
        MigrationError: Folder and record contradict one another.
    """
    by_number = {migration.number: migration for migration in migrations}
    for record in applied:
        migration = by_number.get(record.number)
        if migration is None:
            last = f"its last is {migrations[-1].name}" if migrations else "it is empty"
            raise MigrationError(
                f"the database has had migration {record.name}, which {folder} does not hold ({last}): this program is"
                " older than the database, or the file was removed; bring it back"
            )
        if migration.checksum != record.checksum:
            renamed = "" if migration.name == record.name else f" as {record.name}"
            raise MigrationError(
                f"{migration.path} was applied{renamed} on {record.applied_at} UTC and is another file now (checksum"
                f" {migration.checksum[:12]}, recorded {record.checksum[:12]}): restore it, and put the change into a new"
                f" migration, number {len(migrations) + 1:04d}"
            )
    seen = {record.number for record in applied}
    left = tuple(migration for migration in migrations if migration.number not in seen)
    last_applied = max(seen, default=0)
    if left and left[0].number < last_applied:
        raise MigrationError(
            f"{left[0].path} is out of order: the database has had migrations up to {last_applied:04d} already; give it"
            f" the number {len(migrations) + 1:04d} or higher, at the end"
        )
    return left
