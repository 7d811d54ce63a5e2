"""Migrations on SQLite: one connection, one transaction for each file. Runs on the writer's thread.

Two processes that start at once: BEGIN IMMEDIATE lets one of them in; it reads the record *inside* its transaction, so
whatever the other one has applied meanwhile is not applied again. Who finds nothing to do never takes the lock.

Foreign keys are not enforced while a migration runs. Changing a table in SQLite beyond what ALTER TABLE can do means to
copy it, drop it and rename the copy (sqlite.org/lang_altertable.html#otheralter); enforced, the drop would delete or
refuse because of the rows that refer to it. The PRAGMA has no effect inside a transaction, so it stands outside. Before
each commit `foreign_key_check` finds what the migration has broken; what was broken before it is none of its business.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from database.engine.migrations import TABLE, Applied, Migration, MigrationReport, Order, load, pending
from database.errors import DatabaseError, MigrationError
from database.sqlite3 import analysis

if TYPE_CHECKING:
    from database.sqlite3.connection import SqliteSession

__all__ = ["applied", "migrate"]

_logger = logging.getLogger("database.migration")

_CREATE = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
    number     INTEGER PRIMARY KEY,
    name       TEXT NOT NULL,
    checksum   TEXT NOT NULL,
    applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    seconds    REAL NOT NULL
)"""
_EXISTS = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"
_READ = f"SELECT number, name, checksum, applied_at, seconds FROM {TABLE} ORDER BY number"  # noqa: S608 - a constant
_WRITE = f"INSERT INTO {TABLE} (number, name, checksum, seconds) VALUES (?, ?, ?, ?)"  # noqa: S608 - a constant

_BLANK = re.compile(r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)


def applied(session: SqliteSession) -> tuple[Applied, ...]:
    """The database's record; empty where it has none."""
    if session.raw.execute(_EXISTS, (TABLE,)).fetchone() is None:
        return ()
    return tuple(Applied(*row) for row in session.raw.execute(_READ))


def migrate(session: SqliteSession, order: Order) -> MigrationReport:
    """Applies what is pending.

    Raises:
        MigrationError: A file failed (and was rolled back; those before it stand), or the record contradicts the folder.
    """
    migrations = load(order.folder)
    for option, number in (("to", order.to), ("baseline", order.baseline)):
        if number is not None and not 0 < number <= len(migrations):
            raise MigrationError(f"{order.folder} holds no migration {number}, which `{option}` names")
    record = applied(session)
    if order.baseline is None and not _wanted(migrations, record, order):
        return MigrationReport((), len(record), order.dry_run)
    enforced = bool(session.raw.execute("PRAGMA foreign_keys").fetchone()[0])
    if enforced:
        session.control("PRAGMA foreign_keys = OFF")
    try:
        if order.baseline is not None:
            return _baseline(session, migrations, order)
        if order.dry_run:
            return _try(session, migrations, order, enforced=enforced)
        return _apply(session, migrations, order, enforced=enforced)
    finally:
        try:
            session.rollback()
        finally:
            if enforced:
                _enforce_again(session)


def _enforce_again(session: SqliteSession) -> None:
    """Enforces foreign keys again; a connection on which that fails must not be used any more."""
    # Whoever cancels interrupts whatever runs at that moment, and that may be this.
    for _ in range(3):
        with suppress(sqlite3.OperationalError):
            session.control("PRAGMA foreign_keys = ON")
            if session.raw.execute("PRAGMA foreign_keys").fetchone()[0]:
                return
    error = sqlite3.InternalError("foreign keys cannot be enforced again")
    error.sqlite_errorcode = sqlite3.SQLITE_INTERNAL  # for which the driver gives a connection up
    raise error


def _wanted(migrations: tuple[Migration, ...], record: tuple[Applied, ...], order: Order) -> tuple[Migration, ...]:
    left = pending(migrations, record, order.folder)
    return left if order.to is None else tuple(each for each in left if each.number <= order.to)


def _begin(session: SqliteSession, order: Order) -> tuple[Applied, ...]:
    """Takes the write lock, and reads the record as it is under it."""
    session.begin_patiently(order.wait)
    session.raw.execute(_CREATE)
    return applied(session)


def _apply(
    session: SqliteSession, migrations: tuple[Migration, ...], order: Order, *, enforced: bool
) -> MigrationReport:
    done: list[Migration] = []
    tolerated: Counter[tuple[str, str]] | None = None
    while True:
        record = _begin(session, order)
        left = _wanted(migrations, record, order)
        if not left:  # another process has been quicker
            session.rollback()
            return MigrationReport(tuple(done), len(record))
        try:
            seconds = _run(session, left[0], tolerated, enforced=enforced)
        except _BrokenError:
            session.rollback()
            if tolerated is not None:
                raise
            tolerated = session.broken_references()  # what was broken before: looked for only when it matters
            continue
        session.commit()
        done.append(left[0])
        _logger.info("migration %s applied in %.3f s", left[0].name, seconds)
        if order.progress is not None:
            order.progress(left[0], seconds)


def _try(session: SqliteSession, migrations: tuple[Migration, ...], order: Order, *, enforced: bool) -> MigrationReport:
    record = _begin(session, order)
    left = _wanted(migrations, record, order)
    tolerated = session.broken_references() if enforced else None
    for migration in left:
        seconds = _run(session, migration, tolerated, enforced=enforced)
        if order.progress is not None:
            order.progress(migration, seconds)
    session.rollback()
    return MigrationReport(left, len(record), dry_run=True)


def _baseline(session: SqliteSession, migrations: tuple[Migration, ...], order: Order) -> MigrationReport:
    record = _begin(session, order)
    if record:
        raise MigrationError(
            f"a baseline is for a database without a record, and this one has had {record[-1].name} already"
        )
    for migration in migrations[: order.baseline]:
        session.raw.execute(_WRITE, (migration.number, migration.name, migration.checksum, 0.0))
    if order.dry_run:
        session.rollback()
    else:
        session.commit()
    return MigrationReport((), 0 if order.dry_run else order.baseline or 0, order.dry_run)


class _BrokenError(MigrationError):
    """Rows refer to rows that do not exist."""


def _run(
    session: SqliteSession, migration: Migration, tolerated: Counter[tuple[str, str]] | None, *, enforced: bool
) -> float:
    """One file, inside the open transaction."""
    began = time.perf_counter()
    position = 0
    cursor = session.raw.cursor()
    try:
        for text in analysis.split(migration.sql):
            position = migration.sql.index(text, position)
            try:
                cursor.execute(text)
                if cursor.description is not None:
                    cursor.fetchall()
            except Exception as error:
                raise _failed(session, migration, position + _BLANK.match(text).end(), error) from error  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
            if not session.in_transaction:
                raise MigrationError(
                    f"{migration.path}: the database has ended the transaction by itself; nothing is kept"
                )
            position += len(text)
    finally:
        cursor.close()
    if enforced and (broken := session.broken_references() - (tolerated or Counter())):
        (table, parent), count = broken.most_common(1)[0]
        raise _BrokenError(
            f"{migration.path}: rolled back, for afterwards {count} rows of {table!r} refer to rows of {parent!r} that do"
            " not exist (PRAGMA foreign_key_check shows them)"
        )
    seconds = time.perf_counter() - began
    session.raw.execute(_WRITE, (migration.number, migration.name, migration.checksum, seconds))
    return seconds


def _failed(session: SqliteSession, migration: Migration, offset: int, error: Exception) -> MigrationError:
    line = migration.sql.count("\n", 0, offset) + 1
    translated = session.translate(error, migration.sql[offset:].lstrip(), None)
    reason = translated.args[0] if isinstance(translated, DatabaseError) and translated.args else str(translated)
    return MigrationError(f"{migration.path}:{line}: {reason}; the migration was rolled back, nothing of it is kept")
