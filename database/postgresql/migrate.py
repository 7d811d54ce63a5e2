"""Migrations on PostgreSQL: one connection, one transaction for each file. Runs on a connection's thread.

Several processes that start at once: an advisory lock lets one of them in, which the server frees with the session, however
that ends. The record is read again under it. Who finds nothing to do takes no lock at all.

A migration must not freeze a busy table: ALTER TABLE waits for every transaction that has touched the table, and everybody else
waits behind it. So a file's transaction waits for a lock for `LOCK_SECONDS` only, is then rolled back, and tried again after a
pause, as long as `wait` allows.

What cannot run within a transaction (CREATE INDEX CONCURRENTLY) stands in a file whose first line says `-- no transaction`. Its
statements are run one by one; of one that fails, those before it stand, and the error says so.
"""

from __future__ import annotations

import logging
import random
import re
import time
from typing import TYPE_CHECKING, Any

import psycopg

from database.engine.migrations import TABLE, Applied, Migration, MigrationReport, Order, load, pending
from database.engine.statement import CONTROL
from database.errors import DatabaseError, MigrationError
from database.postgresql import analysis
from database.postgresql.failures import control_error
from database.postgresql.plan import Plan

if TYPE_CHECKING:
    from database.postgresql.connection import Connection

__all__ = ["applied", "migrate"]

_logger = logging.getLogger("database.migration")

LOCK_SECONDS = 3.0
"""How long a migration waits for somebody else's lock, with everybody behind it, before it makes room again."""

_LOCK = 0x6A6F6275
_CREATE = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
    number     BIGINT PRIMARY KEY,
    name       TEXT NOT NULL,
    checksum   TEXT NOT NULL,
    applied_at TEXT NOT NULL DEFAULT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
    seconds    DOUBLE PRECISION NOT NULL
)"""
_EXISTS = Plan(
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relname = $1 AND relnamespace = current_schema()::regnamespace)",
    None,
    1,
)
_READ = Plan(f"SELECT number, name, checksum, applied_at, seconds FROM {TABLE} ORDER BY number", None, 0)
_WRITE = Plan(f"INSERT INTO {TABLE} (number, name, checksum, seconds) VALUES ($1, $2, $3, $4)", None, 4)
_TRY = Plan("SELECT pg_try_advisory_lock($1::int, hashtext(current_schema()))", None, 1)
_LOCKED = Plan(
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted"
    " AND classid::bigint = $1::int AND objid::bigint = hashtext(current_schema())::bigint & 4294967295)",
    None,
    1,
)
_UNLOCK = Plan("SELECT pg_advisory_unlock($1::int, hashtext(current_schema()))", None, 1)

_AS_CONFIGURED = tuple(
    Plan(f"RESET {setting}", None, 0) for setting in ("SESSION AUTHORIZATION", "ROLE", "search_path")
)
"""Before the record is written: a file may say SET LOCAL search_path."""

_BLANK = re.compile(r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)
_ALONE = re.compile(r"\s*--\s*no transaction\b", re.IGNORECASE)


def applied(
    connection: Connection, _statement: Any = None, _params: Any = None, _extra: Any = None
) -> tuple[Applied, ...]:
    """The database's record; empty where it has none. An operation."""
    if not connection.value(connection.run(_EXISTS, (TABLE,)), False):
        return ()
    found = connection.run(_READ, ())
    return tuple(Applied(*row) for row in connection.load(found, 0, found.ntuples, None))


def migrate(connection: Connection, order: Order, _params: Any = None, _extra: Any = None) -> MigrationReport:
    """Applies what is pending. An operation.

    Raises:
        MigrationError: A file failed (and was rolled back; those before it stand), or the record contradicts the folder.
    """
    migrations = load(order.folder, "postgresql")
    for option, number in (("to", order.to), ("baseline", order.baseline)):
        if number is not None and not 0 < number <= len(migrations):
            raise MigrationError(f"{order.folder} holds no migration {number}, which `{option}` names")
    record = applied(connection)
    if order.baseline is None and not _wanted(migrations, record, order):
        return MigrationReport((), len(record), order.dry_run)
    deadline = time.monotonic() + order.wait
    _lock(connection, deadline, order)
    try:
        if order.baseline is not None:
            return _baseline(connection, migrations, order)
        if order.dry_run:
            return _try(connection, migrations, order)
        return _apply(connection, migrations, order, deadline)
    finally:
        if connection.began:
            connection.rollback()
        if _is_locked(connection):
            connection.run(_UNLOCK, (_LOCK,))


def _is_locked(connection: Connection) -> bool:
    """Whether this connection has the migrations' lock, still."""
    return bool(connection.value(connection.run(_LOCKED, (_LOCK,)), False))


def _lock(connection: Connection, deadline: float, order: Order) -> None:
    while not connection.value(connection.run(_TRY, (_LOCK,)), False):
        if time.monotonic() > deadline:
            raise MigrationError(
                f"another process has been migrating this database for {order.wait:g} s (`wait`); nothing was applied here"
            )
        _pause(connection)


def _pause(connection: Connection) -> None:
    if connection.progress():
        raise psycopg.errors.QueryCanceled("the caller has gone")
    time.sleep(random.uniform(0.02, 0.08))  # noqa: S311  - not a secret


def _wanted(migrations: tuple[Migration, ...], record: tuple[Applied, ...], order: Order) -> tuple[Migration, ...]:
    left = pending(migrations, record, order.folder)
    return left if order.to is None else tuple(each for each in left if each.number <= order.to)


def _begin(connection: Connection, *, patient: bool) -> None:
    connection.begin(readonly=False)
    if not patient:
        connection.run(Plan(f"SET LOCAL lock_timeout = {int(LOCK_SECONDS * 1000)}", None, 0), ())
    connection.run(Plan(_CREATE, None, 0), ())


def _apply(connection: Connection, migrations: tuple[Migration, ...], order: Order, deadline: float) -> MigrationReport:
    done: list[Migration] = []
    while True:
        record = applied(connection)
        left = _wanted(migrations, record, order)
        if not left:
            return MigrationReport(tuple(done), len(record))
        migration = left[0]
        if _ALONE.match(migration.sql):
            seconds = _run_alone(connection, migration)
        else:
            seconds = _insist(connection, migration, deadline)
        done.append(migration)
        _logger.info("migration %s applied in %.3f s", migration.name, seconds)
        if order.progress is not None:
            order.progress(migration, seconds)
        if not _is_locked(connection):
            # The connection was put right behind a DO or a function, and with all else that was on it the lock has gone.
            # Whoever has it meanwhile goes on with the next file, hence the record is read again.
            _lock(connection, deadline, order)


def _insist(connection: Connection, migration: Migration, deadline: float) -> float:
    """One file in a transaction of its own, tried again while somebody else has a lock that it needs."""
    while True:
        _begin(connection, patient=False)
        try:
            seconds = _run(connection, migration)
            connection.commit()
            return seconds
        except MigrationError as error:
            connection.rollback()
            busy = getattr(error.__cause__, "sqlstate", None) == "55P03"
            if not busy or time.monotonic() > deadline:
                raise
            _logger.warning(
                "migration %s: somebody else holds a lock that it needs; rolled back, and tried again", migration.name
            )
            for _ in range(10):
                _pause(connection)


def _run(connection: Connection, migration: Migration) -> float:
    """One file, inside the open transaction."""
    began = time.perf_counter()
    changed = False
    for text, offset in _statements(migration):
        try:
            changed = _execute(connection, text) or changed
        except Exception as error:
            raise _failed(
                connection, migration, offset, error, "the migration was rolled back, nothing of it is kept"
            ) from error
    seconds = time.perf_counter() - began
    if changed:
        for setting in _AS_CONFIGURED:
            connection.run(setting, ())
        if connection.local is not None:
            connection.run(Plan(connection.local.decode(), None, 0), ())
    connection.run(_WRITE, (migration.number, migration.name, migration.checksum, seconds))
    return seconds


def _run_alone(connection: Connection, migration: Migration) -> float:
    """A file that says `-- no transaction`: each statement is for good when it is done."""
    connection.execute_script(_CREATE)
    began = time.perf_counter()
    for done, (text, offset) in enumerate(_statements(migration)):
        try:
            _execute(connection, text)
        except Exception as error:
            before = "nothing of it was done" if done == 0 else f"the {done} statements before it stand"
            raise _failed(
                connection,
                migration,
                offset,
                error,
                f"the file runs outside a transaction, so {before}, and it is not recorded. Write it so that it can be run"
                " again (IF NOT EXISTS; DROP INDEX IF EXISTS before CREATE INDEX CONCURRENTLY, for one that failed leaves"
                " an invalid index), and migrate again",
            ) from error
    seconds = time.perf_counter() - began
    connection.run(_WRITE, (migration.number, migration.name, migration.checksum, seconds))
    return seconds


def _statements(migration: Migration) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    position = 0
    for text in analysis.split(migration.sql):
        position = migration.sql.index(text, position)
        blank = _BLANK.match(text)
        found.append((text, position + (blank.end() if blank is not None else 0)))
        position += len(text)
    return found


def _execute(connection: Connection, text: str) -> bool:
    """Executes one statement; gives whether the connection may have other settings since."""
    statement = analysis.analyse(text)
    if statement.kind == CONTROL:
        raise control_error(statement.verb)
    plan = Plan(text, None, 0)
    known: Plan = statement.hint
    if known.refusal is not None:
        raise MigrationError(known.refusal)
    plan.take_from(known)
    connection.run(plan, ())
    return plan.sets or plan.stains


def _try(connection: Connection, migrations: tuple[Migration, ...], order: Order) -> MigrationReport:
    record = applied(connection)
    left = _wanted(migrations, record, order)
    _begin(connection, patient=True)
    for migration in left:
        if _ALONE.match(migration.sql):
            _logger.warning("migration %s runs outside a transaction, so it was not tried", migration.name)
            continue
        seconds = _run(connection, migration)
        if order.progress is not None:
            order.progress(migration, seconds)
    connection.rollback()
    return MigrationReport(left, len(record), dry_run=True)


def _baseline(connection: Connection, migrations: tuple[Migration, ...], order: Order) -> MigrationReport:
    record = applied(connection)
    if record:
        raise MigrationError(
            f"a baseline is for a database without a record, and this one has had {record[-1].name} already"
        )
    _begin(connection, patient=True)
    for migration in migrations[: order.baseline]:
        connection.run(_WRITE, (migration.number, migration.name, migration.checksum, 0.0))
    if order.dry_run:
        connection.rollback()
    else:
        connection.commit()
    return MigrationReport((), 0 if order.dry_run else order.baseline or 0, order.dry_run)


def _failed(
    connection: Connection, migration: Migration, offset: int, error: Exception, outcome: str
) -> MigrationError:
    line = migration.sql.count("\n", 0, offset) + 1
    translated: Any = connection.translate(error, migration.sql[offset:].lstrip(), None)
    reason = translated.args[0] if isinstance(translated, DatabaseError) and translated.args else str(translated)
    return MigrationError(f"{migration.path}:{line}: {reason}; {outcome}")
