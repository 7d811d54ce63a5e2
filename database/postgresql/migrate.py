"""Migrations on PostgreSQL: one connection, one transaction for each file. Runs on a worker's thread.

Two processes that start at once: an advisory lock, which ends with its transaction, lets one of them in, and that one reads
the record inside its transaction. Within a file nobody waits longer than `LOCK_SECONDS` for a table: behind such a wait
everybody else would queue. The file is rolled back and tried again after a pause, until the time to wait is used up.

What PostgreSQL cannot do within a transaction (CREATE INDEX CONCURRENTLY) stands in a file that begins with the comment
`-- no transaction`. It is recorded as begun before it runs, for it may stop half-way; then somebody has to look.
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any

from database.engine.migrations import TABLE, Applied, Migration, MigrationReport, Order, load, pending
from database.engine.statement import CONTROL
from database.errors import DatabaseBusyError, DatabaseError, MigrationError
from database.logs import say
from database.postgresql import analysis

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["applied", "migrate"]

_logger = logging.getLogger("database.migration")

LOCK_SECONDS = 3
"""Seconds that a statement of a migration waits for a table."""
PAUSE = 0.2
"""Seconds between two attempts to get a lock."""
_LOCK = 0x6A6F6275_6D696772
_BEGUN = -1.0
"""Stands where the seconds will be, while a file without a transaction runs."""

_CREATE = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} (number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL,"
    " applied_at TEXT NOT NULL DEFAULT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'),"
    " seconds DOUBLE PRECISION NOT NULL)"
)
_READ = f"SELECT number, name, checksum, applied_at, seconds FROM {TABLE} ORDER BY number"
_WRITE = f"INSERT INTO {TABLE} (number, name, checksum, seconds) VALUES (?, ?, ?, ?)"
_FINISH = f"UPDATE {TABLE} SET seconds = ? WHERE number = ?"
_NO_TRANSACTION = re.compile(r"(?:\s|--[^\n]*\n)*?--[ \t]*no transaction[ \t]*(?:\n|\Z)", re.IGNORECASE)
_BLANK = re.compile(r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)


def _ask(session: Any, sql: str, params: tuple[Any, ...] = ()) -> list[Any]:
    found: list[Any] = session.fetch_all(analysis.analyse(sql), params, None)
    return found


def applied(session: Any) -> tuple[Applied, ...]:
    """The database's record; empty where it has none."""
    if _ask(session, f"SELECT to_regclass('{TABLE}')")[0][0] is None:
        return ()
    return tuple(Applied(*row) for row in _ask(session, _READ))


def migrate(session: Any, order: Order) -> MigrationReport:
    """Applies what is pending.

    Raises:
        MigrationError: A file failed (and was rolled back; those before it stand), or the record contradicts the folder.
    """
    migrations = load(order.folder, "postgresql")
    for option, number in (("to", order.to), ("baseline", order.baseline)):
        if number is not None and not 0 < number <= len(migrations):
            raise MigrationError(f"{order.folder} holds no migration {number}, which `{option}` names")
    deadline = time.monotonic() + order.wait
    record = applied(session)
    if order.baseline is None and not _wanted(migrations, record, order) and not _begun(record):
        return MigrationReport((), len(record), order.dry_run)
    try:
        if order.baseline is not None:
            return _baseline(session, migrations, order, deadline)
        return (
            _try(session, migrations, order, deadline)
            if order.dry_run
            else _apply(session, migrations, order, deadline)
        )
    finally:
        session.rollback()


def _wanted(migrations: tuple[Migration, ...], record: tuple[Applied, ...], order: Order) -> tuple[Migration, ...]:
    left = pending(migrations, record, order.folder)
    return left if order.to is None else tuple(each for each in left if each.number <= order.to)


def _begun(record: tuple[Applied, ...]) -> Applied | None:
    return next((each for each in record if each.seconds == _BEGUN), None)


def _begin(session: Any, deadline: float) -> tuple[Applied, ...]:
    """Begins a transaction under the lock, and reads the record as it is then."""
    while True:
        session.begin(readonly=False)
        if _ask(session, "SELECT pg_try_advisory_xact_lock(?)", (_LOCK,))[0][0]:
            session.execute(analysis.analyse(_CREATE), None)
            record = applied(session)
            begun = _begun(record)
            if begun is None:
                return record
            if time.monotonic() >= deadline:
                raise MigrationError(
                    f"{begun.name}, which runs without a transaction, was begun on {begun.applied_at} UTC and has not ended."
                    " Either another process is still at it, or it was stopped half-way. Look at what it has done (an index"
                    " marked INVALID has to be dropped), then take it as done (UPDATE"
                    f" {TABLE} SET seconds = 0 WHERE number = {begun.number}) or have it run again (DELETE FROM {TABLE}"
                    f" WHERE number = {begun.number})"
                )
        session.rollback()
        if time.monotonic() >= deadline:
            raise MigrationError("another process has been migrating this database all the time that there was to wait")
        time.sleep(PAUSE)


def _apply(session: Any, migrations: tuple[Migration, ...], order: Order, deadline: float) -> MigrationReport:
    done: list[Migration] = []
    while True:
        record = _begin(session, deadline)
        left = _wanted(migrations, record, order)
        if not left:
            session.rollback()
            return MigrationReport(tuple(done), len(record))
        migration = left[0]
        began = time.perf_counter()
        if _NO_TRANSACTION.match(migration.sql):
            _without_transaction(session, migration, began)
        else:
            try:
                _run(session, migration)
            except DatabaseBusyError as error:
                session.rollback()
                if time.monotonic() >= deadline:
                    raise MigrationError(
                        f"{error.args[0]}; the migration was rolled back: somebody uses the table all the time"
                    ) from error
                say(_logger, logging.WARNING, "migration %s waits for a lock: %s", migration.name, error.args[0])
                time.sleep(PAUSE)
                continue
            seconds = time.perf_counter() - began
            session.execute(analysis.analyse(_WRITE), (migration.number, migration.name, migration.checksum, seconds))
            session.commit()
        seconds = time.perf_counter() - began
        done.append(migration)
        say(_logger, logging.INFO, "migration %s applied in %.3f s", migration.name, seconds)
        if order.progress is not None:
            order.progress(migration, seconds)


def _without_transaction(session: Any, migration: Migration, began: float) -> None:
    session.execute(analysis.analyse(_WRITE), (migration.number, migration.name, migration.checksum, _BEGUN))
    session.commit()
    for line, text in _statements(migration):
        try:
            session.execute_script(text)
        except Exception as error:
            reason = _reason(session, error, text)
            raise MigrationError(
                f"{migration.path}:{line}: {reason}; it runs without a transaction, so what stands before this line is done."
                f" Put that right, then have it run again: DELETE FROM {TABLE} WHERE number = {migration.number}"
            ) from error
    session.execute(analysis.analyse(_FINISH), (time.perf_counter() - began, migration.number))


def _try(session: Any, migrations: tuple[Migration, ...], order: Order, deadline: float) -> MigrationReport:
    record = _begin(session, deadline)
    left = _wanted(migrations, record, order)
    for migration in left:
        began = time.perf_counter()
        if not _NO_TRANSACTION.match(migration.sql):  # which cannot be tried
            _run(session, migration)
        if order.progress is not None:
            order.progress(migration, time.perf_counter() - began)
    session.rollback()
    return MigrationReport(left, len(record), dry_run=True)


def _baseline(session: Any, migrations: tuple[Migration, ...], order: Order, deadline: float) -> MigrationReport:
    record = _begin(session, deadline)
    if record:
        raise MigrationError(
            f"a baseline is for a database without a record, and this one has had {record[-1].name} already"
        )
    for migration in migrations[: order.baseline]:
        session.execute(analysis.analyse(_WRITE), (migration.number, migration.name, migration.checksum, 0.0))
    if order.dry_run:
        session.rollback()
    else:
        session.commit()
    return MigrationReport((), 0 if order.dry_run else order.baseline or 0, order.dry_run)


def _statements(migration: Migration) -> Iterator[tuple[int, str]]:
    """Each statement, and the line on which it begins."""
    position = 0
    for text in analysis.split(migration.sql):
        position = migration.sql.index(text, position)
        match = _BLANK.match(text)
        yield migration.sql.count("\n", 0, position + (0 if match is None else match.end())) + 1, text
        position += len(text)


def _run(session: Any, migration: Migration) -> None:
    """One file, inside the open transaction."""
    session.execute_script(f"SET LOCAL lock_timeout = {LOCK_SECONDS * 1000}")
    for line, text in _statements(migration):
        statement = analysis.analyse(text)
        place = f"{migration.path}:{line}"
        if statement.kind == CONTROL:
            raise MigrationError(
                f"{place}: {statement.verb} is the package's own business here, for each file is one transaction: leave it out"
            )
        try:
            session.execute_script(text)
        except Exception as error:
            reason = _reason(session, error, text)
            hint = ""
            if "transaction block" in reason:
                hint = " (begin the file with the comment `-- no transaction`)"
            busy = isinstance(session.translate(error, text, None), DatabaseBusyError)
            kind = DatabaseBusyError if busy else MigrationError
            raise kind(f"{place}: {reason}{hint}; the migration was rolled back, nothing of it is kept") from error


def _reason(session: Any, error: Exception, text: str) -> str:
    translated = session.translate(error, text.lstrip(), None)
    return str(translated.args[0]) if isinstance(translated, DatabaseError) and translated.args else str(translated)
