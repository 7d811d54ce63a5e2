"""Migrations on SQLite: one connection, one transaction for each file. Runs on the writer's thread.

Two processes that start at once: BEGIN IMMEDIATE lets one of them in; it reads the record *inside* its transaction, so
whatever the other one has applied meanwhile is not applied again. Who finds nothing to do never takes the lock.

Foreign keys are not enforced while a migration runs. Changing a table in SQLite beyond what ALTER TABLE can do means to
copy it, drop it and rename the copy (sqlite.org/lang_altertable.html#otheralter); enforced, the drop would delete or
refuse because of the rows that refer to it. The PRAGMA has no effect inside a transaction, so it stands outside. Before
each commit `foreign_key_check` finds what the migration has broken; what was broken before it is none of its business.

A migration changes the database, not the connection, which goes on to serve everybody else. What would change that (most
PRAGMAs, ATTACH), and what SQLite cannot do within a transaction, is refused before the first file runs. The few PRAGMAs
that schema changes are made with, and temporary tables, are put right behind each file.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from database.engine.migrations import TABLE, Applied, Migration, MigrationReport, Order, load, pending
from database.engine.statement import CONTROL, quoted
from database.errors import DatabaseError, MigrationError
from database.logs import say
from database.sqlite3 import analysis
from database.sqlite3.library import classes

if TYPE_CHECKING:
    from database.sqlite3.connection import Connection

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


def applied(
    connection: Connection, _statement: Any = None, _params: Any = None, _extra: Any = None
) -> tuple[Applied, ...]:
    """The database's record; empty where it has none. An operation."""
    if connection.raw.execute(_EXISTS, (TABLE,)).fetchone() is None:
        return ()
    return tuple(Applied(*row) for row in connection.raw.execute(_READ))


def migrate(connection: Connection, order: Order, _params: Any = None, _extra: Any = None) -> MigrationReport:
    """Applies what is pending. An operation.

    Raises:
        MigrationError: A file failed (and was rolled back; those before it stand), or the record contradicts the folder.
    """
    migrations = load(order.folder)
    for option, number in (("to", order.to), ("baseline", order.baseline)):
        if number is not None and not 0 < number <= len(migrations):
            raise MigrationError(f"{order.folder} holds no migration {number}, which `{option}` names")
    record = applied(connection)
    if order.baseline is None:
        left = _wanted(migrations, record, order)
        if not left:
            return MigrationReport((), len(record), order.dry_run)
        for migration in left:
            _check(migration)
    enforced = bool(connection.raw.execute("PRAGMA foreign_keys").fetchone()[0])
    try:
        if order.baseline is not None:
            return _baseline(connection, migrations, order, enforced=enforced)
        if order.dry_run:
            return _try(connection, migrations, order, enforced=enforced)
        return _apply(connection, migrations, order, enforced=enforced)
    finally:
        try:
            connection.rollback()
        finally:
            if enforced:
                _enforce_again(connection)


# What a file may hold

_TOLD = frozenset(
    {"user_version", "application_id", "schema_version", "defer_foreign_keys", "foreign_keys", "optimize"}
)
"""PRAGMAs that may be given a value: they change the database, end with the transaction, or do nothing within one."""

_PUT_RIGHT = ("legacy_alter_table", "writable_schema", "ignore_check_constraints", "recursive_triggers")
"""PRAGMAs of the connection that schema changes are made with."""

_TABLES = frozenset({*analysis.ARGUMENT_PRAGMAS, "incremental_vacuum"})

_NAME = r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|`(?:[^`]|``)*`|\[[^\]]*\]|[^\W\d]\w*)"""
_GAP = r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*"
_BLANK = re.compile(_GAP, re.DOTALL)
_PRAGMA = re.compile(
    rf"{_GAP}PRAGMA{_GAP}(?:{_NAME}{_GAP}\.{_GAP})?(?P<name>{_NAME}){_GAP}(?P<value>[=(])?", re.DOTALL | re.IGNORECASE
)

_EXPLAIN = re.compile(rf"\A{_GAP}EXPLAIN(?:{_GAP}QUERY{_GAP}PLAN)?", re.DOTALL | re.IGNORECASE)


def _check(migration: Migration) -> None:
    """Refuses what a migration must not hold.

    Raises:
        MigrationError: Names file and line.
    """
    position = 0
    for text in analysis.split(migration.sql):
        position = migration.sql.index(text, position)
        why = _refusal(text)
        if why:
            offset = position + _start(text)
            line = migration.sql.count("\n", 0, offset) + 1
            raise MigrationError(f"{migration.path}:{line}: {why}; nothing was applied")
        position += len(text)


def _refusal(text: str) -> str:
    """Why a statement cannot stand in a migration; empty if it can."""
    verb = analysis.analyse(text).verb
    if verb == "VACUUM":
        return "VACUUM cannot be done within a transaction: run it outside migrations, with `python -m database shell`"
    if verb in ("ATTACH", "DETACH"):
        return f"{verb} would stay with the connection: name the other file in the configuration, under `attach`"
    if verb == "EXPLAIN":  # some PRAGMAs take effect while they are compiled
        return _refusal(_EXPLAIN.sub("", text, count=1))
    if verb != "PRAGMA":
        return ""
    match = _PRAGMA.match(text)
    if match is None:  # a syntax error: SQLite says which
        return ""
    name = match["name"].strip("\"'`[]").lower()
    if (
        name in _TOLD
        or name in _PUT_RIGHT
        or name in _TABLES
        or (match["value"] is None and name in analysis.READ_PRAGMAS)
    ):
        return ""
    where = f"set `{name}`" if name in _SETTINGS else "set it under `pragmas`"
    if name in ("journal_mode", "auto_vacuum", "page_size", "encoding", "wal_checkpoint"):
        within = f"PRAGMA {name} has no effect within a transaction"
        return (
            f"{within}: {where} in the configuration" if name in _SETTINGS else f"{within}: run it outside migrations"
        )
    return f"PRAGMA {name} would change the connection, not the database: {where} in the configuration"


_SETTINGS = frozenset({"journal_mode", "synchronous", "cache_size", "busy_timeout"})


def _start(text: str) -> int:
    """Where a statement begins, behind blanks and comments."""
    match = _BLANK.match(text)
    return 0 if match is None else match.end()


def _temporary(raw: sqlite3.Connection) -> set[tuple[str, str]]:
    rows = raw.execute("SELECT type, name FROM temp.sqlite_master WHERE name NOT LIKE 'sqlite^_%' ESCAPE '^'")
    return {(str(row[0]), str(row[1])) for row in rows}


def _drop_temporary(raw: sqlite3.Connection, before: set[tuple[str, str]]) -> None:
    """Drops what a file has left in the connection's own schema, inside the file's transaction."""
    for kind, name in sorted(_temporary(raw) - before, key=lambda each: each[0] == "table"):
        raw.execute(f"DROP {kind} IF EXISTS temp.{quoted(name)}")


def _put_right(connection: Connection, before: dict[str, int]) -> None:
    """Sets PRAGMAs back between the files of a dry run. Otherwise the raw connection is a new one after each file."""
    for name, value in before.items():
        connection.control(f"PRAGMA {name} = {value}")


def _enforce_again(connection: Connection) -> None:
    """Enforces foreign keys again; a connection on which that fails must not be used any more."""
    # Whoever cancels interrupts whatever runs at that moment, and that may be this.
    for _ in range(3):
        with suppress(*classes.OperationalError):
            connection.control("PRAGMA foreign_keys = ON")
            if connection.raw.execute("PRAGMA foreign_keys").fetchone()[0]:
                return
    error = sqlite3.InternalError("foreign keys cannot be enforced again")
    error.sqlite_errorcode = sqlite3.SQLITE_INTERNAL  # for which the pool gives a connection up
    raise error


def _wanted(migrations: tuple[Migration, ...], record: tuple[Applied, ...], order: Order) -> tuple[Migration, ...]:
    left = pending(migrations, record, order.folder)
    return left if order.to is None else tuple(each for each in left if each.number <= order.to)


def _begin(connection: Connection, order: Order, *, enforced: bool) -> tuple[Applied, ...]:
    """Takes the write lock, and reads the record as it is under it."""
    if enforced:  # for each file: behind the one before, the raw connection may be a new one
        connection.control("PRAGMA foreign_keys = OFF")
    connection.begin_patiently(order.wait)
    connection.raw.execute(_CREATE)
    return applied(connection)


def _apply(
    connection: Connection,
    migrations: tuple[Migration, ...],
    order: Order,
    *,
    enforced: bool,
) -> MigrationReport:
    done: list[Migration] = []
    tolerated: Counter[tuple[str, str]] | None = None
    while True:
        record = _begin(connection, order, enforced=enforced)
        left = _wanted(migrations, record, order)
        if not left:  # another process has been quicker
            connection.rollback()
            return MigrationReport(tuple(done), len(record))
        try:
            seconds = _run(connection, left[0], tolerated, enforced=enforced)
        except _BrokenError:
            connection.rollback()
            if tolerated is not None:
                raise
            tolerated = connection.broken_references()  # what was broken before: looked for only when it matters
            continue
        connection.commit()
        done.append(left[0])
        say(_logger, logging.INFO, "migration %s applied in %.3f s", left[0].name, seconds)
        if order.progress is not None:
            order.progress(left[0], seconds)


def _try(
    connection: Connection,
    migrations: tuple[Migration, ...],
    order: Order,
    *,
    enforced: bool,
) -> MigrationReport:
    record = _begin(connection, order, enforced=enforced)
    left = _wanted(migrations, record, order)
    tolerated = connection.broken_references() if enforced else None
    before = {name: int(connection.raw.execute(f"PRAGMA {name}").fetchone()[0]) for name in _PUT_RIGHT}
    for migration in left:
        seconds = _run(connection, migration, tolerated, enforced=enforced)
        _put_right(connection, before)
        if order.progress is not None:
            order.progress(migration, seconds)
    connection.rollback()
    return MigrationReport(left, len(record), dry_run=True)


def _baseline(
    connection: Connection, migrations: tuple[Migration, ...], order: Order, *, enforced: bool
) -> MigrationReport:
    record = _begin(connection, order, enforced=enforced)
    if record:
        raise MigrationError(
            f"a baseline is for a database without a record, and this one has had {record[-1].name} already"
        )
    for migration in migrations[: order.baseline]:
        connection.raw.execute(_WRITE, (migration.number, migration.name, migration.checksum, 0.0))
    if order.dry_run:
        connection.rollback()
    else:
        connection.commit()
    return MigrationReport((), 0 if order.dry_run else order.baseline or 0, order.dry_run)


class _BrokenError(MigrationError):
    """Rows refer to rows that do not exist."""


def _run(
    connection: Connection, migration: Migration, tolerated: Counter[tuple[str, str]] | None, *, enforced: bool
) -> float:
    """One file, inside the open transaction."""
    began = time.perf_counter()
    position = 0
    temporary = _temporary(connection.raw)
    cursor = connection.raw.cursor()
    try:
        for text in analysis.split(migration.sql):
            position = migration.sql.index(text, position)
            try:
                statement = analysis.analyse(text)
                if statement.kind == CONTROL:
                    raise MigrationError(
                        f"{statement.verb} is the package's own business here (each file is one transaction): leave it out,"
                        " and split the file where a part is to stand although the next one fails"
                    )
                cursor.execute(text)
                if cursor.description is not None:
                    cursor.fetchall()
            except Exception as error:
                raise _failed(connection, migration, position + _start(text), error) from error
            if not connection.in_transaction:
                raise MigrationError(
                    f"{migration.path}: the database has ended the transaction by itself; nothing is kept"
                )
            position += len(text)
    finally:
        cursor.close()
    _drop_temporary(connection.raw, temporary)
    if enforced and (broken := connection.broken_references() - (tolerated or Counter())):
        (table, parent), count = broken.most_common(1)[0]
        raise _BrokenError(
            f"{migration.path}: rolled back: afterwards {count} rows of {table!r} refer to rows of {parent!r} that do"
            " not exist (PRAGMA foreign_key_check shows them)"
        )
    seconds = time.perf_counter() - began
    connection.raw.execute(_WRITE, (migration.number, migration.name, migration.checksum, seconds))
    return seconds


def _failed(connection: Connection, migration: Migration, offset: int, error: Exception) -> MigrationError:
    line = migration.sql.count("\n", 0, offset) + 1
    translated = connection.translate(error, migration.sql[offset:].lstrip(), None)
    reason = translated.args[0] if isinstance(translated, DatabaseError) and translated.args else str(translated)
    return MigrationError(f"{migration.path}:{line}: {reason}; the migration was rolled back, nothing of it is kept")
