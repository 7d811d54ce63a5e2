"""One SQLite connection: opened, restricted, used and closed on one worker's thread.

The writer is the only connection that writes and checkpoints; readers are opened with `mode=ro`, which no SQL can
change. What else a reader, or a read-only transaction on the writer, must not do (temporary tables, ATTACH, pragmas
that set something) the authorizer refuses: SQLite asks it about every statement that it prepares. It also keeps BEGIN,
COMMIT, SAVEPOINT and the like to this module, so that nothing sent as SQL text, nor a function given the raw
connection, can end a transaction that the package manages.

The statements of this module carry a trailing comment that nobody can guess. `sqlite3`'s statement cache goes by the
text, and what comes out of it is not shown to the authorizer again: so nobody else's text may equal one of ours.

Facts this rests on (sqlite.org/c3ref/set_authorizer.html, /lang_transaction.html, /wal.html):
BEGIN IMMEDIATE on a read-only connection pins its snapshot at once and takes no lock; setting an authorizer anew makes
SQLite prepare all statements again; a connection that closes last checkpoints and removes the `-wal` file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from database import errors
from database.engine.statement import CONTROL, Result, Statement
from database.sqlite3 import analysis, files
from database.sqlite3.analysis import HINT_INSERT, HINT_UPSERT, HINT_VACUUM
from database.sqlite3.failures import BUSY_CODES, Patience, control_error, is_busy, read_only
from database.sqlite3.values import Row, Rows, bind, bind_many

if TYPE_CHECKING:
    from database.engine.migrations import Applied, MigrationReport, Order

__all__ = ["SqliteSession"]

PROGRESS_STEPS = 10_000
"""Steps of SQLite's machine between two calls of the progress handler: some 80 µs of the CPU's time."""

FEW = 64
"""Fewer rows than this are made at once; more, when they are looked at."""

_MARK = f"--{os.urandom(8).hex()}"
_BEGIN = f"BEGIN IMMEDIATE {_MARK}"
_COMMIT = f"COMMIT {_MARK}"
_ROLLBACK = f"ROLLBACK {_MARK}"

_READ_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_WRITE_ACTIONS = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
_SCHEMA_TABLES = frozenset({"sqlite_master", "sqlite_schema"})
_CONTROL_ACTIONS = frozenset({sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT})


_SAVEPOINT = f"SAVEPOINT level_0 {_MARK}"
_RELEASE = f"RELEASE level_0 {_MARK}"
"""Around every unit of a group, so not put together each time."""

_new_tuple: Callable[[type[Result], tuple[int, int | None]], Result] = tuple.__new__  # pyright: ignore


class SqliteSession:
    """See `database.engine.contract.Session`."""

    __slots__ = (
        "_admitting",
        "_cursor",
        "_failing",
        "_identity",
        "_lock",
        "_locked",
        "_patience",
        "_progress",
        "_restricted",
        "_schema_writable",
        "_streams",
        "raw",
        "readonly",
    )

    def __init__(
        self,
        raw: sqlite3.Connection,
        lock: Lock,
        progress: Callable[[], bool],
        *,
        readonly: bool,
        patience: float = 0.0,
        identity: tuple[int, int] = (0, 0),
    ) -> None:
        self.raw = raw
        self.readonly = readonly
        self._patience = patience
        """Seconds to wait for another process's lock, where the driver does not do that: in scripts."""
        self._identity = identity
        self._lock = lock
        self._locked = False
        self._progress = progress
        self._admitting = False
        """Whether BEGIN, COMMIT and the like may be prepared: while this class itself sends them."""
        self._restricted = readonly
        self._schema_writable = False
        """Whether somebody may have switched on `writable_schema`."""
        self._streams: dict[int, sqlite3.Cursor] = {}
        self._failing: tuple[Statement, Any] | None = None
        """What has just failed, where the request does not say it: a write of a batch, a query called in aiosql's way."""
        raw.row_factory = Row
        raw.set_authorizer(self._authorize)
        raw.set_progress_handler(progress, PROGRESS_STEPS)
        self._cursor = raw.cursor()

    # Transactions

    @property
    def in_transaction(self) -> bool:
        """See `Session`. A connection that was given up has none."""
        try:
            return self.raw.in_transaction
        except sqlite3.ProgrammingError:
            return False

    def try_lock(self, seconds: float) -> bool:
        """See `Session`."""
        if self._locked:
            return True
        self._locked = self._lock.acquire(timeout=seconds) if seconds else self._lock.acquire(blocking=False)
        return self._locked

    def unlock(self) -> None:
        """See `Session`."""
        if self._locked:
            self._locked = False
            self._lock.release()

    def _control(self, sql: str) -> None:
        self._admitting = True
        try:
            self._cursor.execute(sql)
        finally:
            self._admitting = False

    def begin(self, *, readonly: bool) -> None:
        """See `Session`."""
        self._control(_BEGIN)
        if readonly and not self.readonly:
            self.restrict(True)

    def commit(self) -> None:
        """See `Session`."""
        self._close_streams()
        self._control(_COMMIT)
        if self._restricted and not self.readonly:
            self.restrict(False)

    def rollback(self) -> None:
        """See `Session`."""
        self._close_streams()
        if self.raw.in_transaction:
            self._control(_ROLLBACK)
        if self._restricted and not self.readonly:
            self.restrict(False)

    def savepoint(self, number: int) -> None:
        """See `Session`."""
        self._control(_SAVEPOINT if number == 0 else f"SAVEPOINT level_{number} {_MARK}")

    def release(self, number: int) -> None:
        """See `Session`."""
        self._control(_RELEASE if number == 0 else f"RELEASE level_{number} {_MARK}")

    def undo(self, number: int) -> None:
        """See `Session`."""
        self._control(f"ROLLBACK TO level_{number} {_MARK}")
        self._control(f"RELEASE level_{number} {_MARK}")

    def isolation(self, level: str) -> None:
        """See `Session`. There is but one level here, and it is the strictest."""

    def restrict(self, readonly: bool) -> None:
        """See `Session`. Setting the authorizer anew has every cached statement checked again."""
        self._restricted = readonly
        self.raw.set_authorizer(self._authorize)

    def _authorize(
        self, action: int, first: str | None, second: str | None, schema: str | None, _by: str | None
    ) -> int:
        if action in _CONTROL_ACTIONS:
            return sqlite3.SQLITE_OK if self._admitting else sqlite3.SQLITE_DENY
        if not self._restricted or action in _READ_ACTIONS:
            if action == sqlite3.SQLITE_PRAGMA and second is not None and str(first).lower() == "writable_schema":
                self._schema_writable = True
            return sqlite3.SQLITE_OK
        # Virtual tables and table-valued functions (FTS5, json_each, pragma_table_info) ask for writes that they never
        # do when they are first used: all of them to update the schema table, where they declare their columns, R*Tree
        # to change its own tables. A reader's file cannot be written, whatever is admitted here.
        if action in _WRITE_ACTIONS:
            if self.readonly:
                return sqlite3.SQLITE_OK if schema == "main" else sqlite3.SQLITE_DENY
            if action == sqlite3.SQLITE_UPDATE and first in _SCHEMA_TABLES and not self._schema_writable:
                return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and first is not None:
            known = analysis.READ_PRAGMAS if second is None else analysis.ARGUMENT_PRAGMAS
            if first.lower() in known:
                return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    # Statements. All take (statement, parameters, extra) and run on the worker's thread.

    def execute(self, statement: Statement, params: Any, _extra: Any = None) -> Result:
        """Runs a statement for what it does."""
        cursor = self._cursor
        hint = statement.hint
        if hint and hint != HINT_INSERT:
            return self._upsert(statement, params) if hint == HINT_UPSERT else self._vacuum(statement, params)
        cursor.execute(statement.sql, bind(params))
        if statement.returns_rows:
            cursor.fetchall()
        rowcount = cursor.rowcount
        # The tuple's own `__new__`: a NamedTuple's is Python code, and this is run for every write.
        return _new_tuple(Result, (rowcount, cursor.lastrowid if hint and rowcount > 0 else None))

    def _upsert(self, statement: Statement, params: Any) -> Result:
        # An update leaves SQLite's last row id as it was; only if it moves has a row been added for certain.
        cursor = self._cursor
        before = cursor.execute("SELECT last_insert_rowid()").fetchone()[0]
        cursor.execute(statement.sql, bind(params))
        if statement.returns_rows:
            cursor.fetchall()
        rowcount, lastrowid = cursor.rowcount, cursor.lastrowid
        return Result(rowcount, lastrowid if rowcount > 0 and lastrowid != before else None)

    def _vacuum(self, statement: Statement, params: Any) -> Result:
        if self._restricted:
            raise read_only(statement.sql)  # VACUUM INTO works on a connection that only reads, and writes a file
        self._admitting = not self.raw.in_transaction  # inside one, SQLite itself says why not
        try:
            self._cursor.execute(statement.sql, bind(params))
        finally:
            self._admitting = False
        return Result(-1, None)

    def execute_many(self, statement: Statement, rows: Any, _extra: Any = None) -> Result:
        """Runs a statement once for every row of parameters."""
        cursor = self.raw.cursor()
        try:
            cursor.executemany(statement.sql, bind_many(rows))
            return Result(max(cursor.rowcount, 0), None)
        finally:
            cursor.close()

    def execute_batch(self, items: Any, _params: Any = None, _extra: Any = None) -> int:
        """Runs (statement, parameters) pairs; gives how many."""
        execute = self._cursor.execute
        for number, (statement, params) in enumerate(items):
            try:
                execute(statement.sql, bind(params))
                if statement.returns_rows:
                    self._cursor.fetchall()
            except Exception as error:
                error.add_note(f"this was write {number + 1} of the {len(items)} that a batch sent together")
                self._failing = statement, params
                raise
        return len(items)

    def execute_script(self, sql: Any, _params: Any = None, _extra: Any = None) -> None:
        """Runs the statements of a script one after the other, without touching the open transaction."""
        cursor = self.raw.cursor()
        try:
            for text in analysis.split(sql):
                statement = analysis.analyse(text)
                if statement.hint == HINT_VACUUM:
                    self._vacuum(statement, None)
                    continue
                patience = Patience(0 if self.raw.in_transaction else self._patience, self._progress)
                while True:  # outside of a transaction each statement is its own, and waits for its own lock
                    try:
                        cursor.execute(text)
                        break
                    except sqlite3.OperationalError as error:
                        patience.wait(error)
                if cursor.description is not None:
                    cursor.fetchall()
        finally:
            cursor.close()

    def fetch_all(self, statement: Statement, params: Any, record_class: Any) -> list[Any]:
        """All rows."""
        cursor = self._cursor
        cursor.execute(statement.sql, bind(params))
        rows = cursor.fetchmany(FEW)
        if len(rows) < FEW:
            return rows if record_class is None else _records(cursor, rows, record_class)
        # From here on it is `Rows` who makes each row, for which it keeps the cursor.
        self._cursor = self.raw.cursor()
        cursor.row_factory = None
        try:
            tuples = [*map(tuple, rows), *cursor.fetchall()]
        finally:
            cursor.close()
        return Rows(cursor, tuples) if record_class is None else _records(cursor, tuples, record_class)

    def fetch_one(self, statement: Statement, params: Any, record_class: Any) -> Any:
        """The first row, or None."""
        cursor = self._cursor
        cursor.execute(statement.sql, bind(params))
        row = cursor.fetchone()
        if row is None:
            return None
        if record_class is not None:
            row = _records(cursor, [row], record_class)[0]
        if cursor.fetchone() is not None:
            self._abandon_cursor()
        return row

    def fetch_value(self, statement: Statement, params: Any, default: Any) -> Any:
        """The first column of the first row, or the default."""
        cursor = self._cursor
        cursor.execute(statement.sql, bind(params))
        row = cursor.fetchone()
        if row is None:
            return default
        if cursor.fetchone() is not None:
            self._abandon_cursor()
        return row[0]

    def _abandon_cursor(self) -> None:
        """A cursor that is left half read pins the WAL: no checkpoint can pass it."""
        self._cursor.close()
        self._cursor = self.raw.cursor()

    # Streams: a cursor of their own, known by a number

    def open_stream(self, statement: Statement, params: Any, key: Any) -> None:
        """Begins to read."""
        cursor = self._streams[key] = self.raw.cursor()
        cursor.row_factory = None  # `Rows` makes each row
        try:
            cursor.execute(statement.sql, bind(params))
        except BaseException:
            self.close_stream(key)
            raise

    def read_stream(self, key: Any, size: Any, record_class: Any) -> list[Any]:
        """The next rows; fewer than asked for at the end, when the cursor has been closed."""
        cursor = self._streams.get(key)
        if cursor is None:
            raise errors.TransactionError("the transaction in which this stream was opened has ended")
        try:
            tuples = cursor.fetchmany(size)
            rows = Rows(cursor, tuples) if record_class is None else _records(cursor, tuples, record_class)
        except BaseException:
            self.close_stream(key)
            raise
        if len(rows) < size:
            self.close_stream(key)
        return rows

    def close_stream(self, key: Any, _params: Any = None, _extra: Any = None) -> None:
        """Stops reading."""
        cursor = self._streams.pop(key, None)
        if cursor is not None:
            cursor.close()

    def _close_streams(self) -> None:
        for key in tuple(self._streams):
            self.close_stream(key)

    # The rest

    def call(self, function: Any, arguments: Any, _extra: Any = None) -> Any:
        """Runs a function of the user's on the raw connection."""
        try:
            result = function(self.raw, *arguments)
            if isinstance(result, sqlite3.Cursor):
                result.close()  # half read, it would keep its snapshot, and pin the WAL, for as long as it is kept
            return result
        finally:
            self.raw.row_factory = Row
            if self._restricted:
                self.raw.set_authorizer(self._authorize)  # whatever the function did to it

    def initialise(self, scripts: list[str], patience: float) -> None:
        """Runs scripts in one transaction of their own; `patience` is for other processes that start just now."""
        waiting = Patience(patience, self._progress)
        while not self.try_lock(0.01) and waiting.left():  # another event loop's pool may be writing
            pass
        try:
            self.begin_patiently(patience)
            try:
                for script in scripts:
                    self.execute_script(script)
                self.commit()
            finally:
                self.rollback()
        finally:
            self.unlock()

    def begin_patiently(self, seconds: float) -> None:
        """Begins a write transaction, waiting that long for other processes, unless the caller goes away."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.begin(readonly=False)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or time.monotonic() >= deadline or self._progress():
                    raise
            time.sleep(0.002)

    def broken_references(self) -> Counter[tuple[str, str]]:
        """How many rows of which table refer to rows of which other that do not exist."""
        return Counter((row[0], row[2]) for row in self.raw.execute("PRAGMA foreign_key_check"))

    def migrate(self, order: Any, _params: Any = None, _extra: Any = None) -> MigrationReport:
        """Applies pending migrations, each in a transaction; `order` is a `migrations.Order`."""
        from database.sqlite3.migrate import migrate  # noqa: PLC0415  - few connections ever need it

        return migrate(self, cast("Order", order))

    def applied_migrations(self, _sql: Any = None, _params: Any = None, _extra: Any = None) -> tuple[Applied, ...]:
        """The database's record of migrations."""
        from database.sqlite3.migrate import applied  # noqa: PLC0415  - few connections ever need it

        return applied(self)

    def call_aiosql(self, statement: Statement, arguments: Any, _extra: Any = None) -> Any:
        """Runs a method of aiosql's synchronous adapter on the raw connection."""
        method, params, record = arguments
        self._failing = None  # of a first try, on which another process's lock lay
        try:
            if record is None:
                self.raw.row_factory = None  # aiosql looks into plain tuples for single values
                return method(self.raw, "", statement.sql, bind(params))
            result = method(self.raw, "", statement.sql, bind(params), record[0])
            if isinstance(result, Iterator):
                rows: list[Any] = list(cast("Iterable[Any]", result))
                return rows
            return result
        except Exception:
            self._failing = statement, params  # the error names the user's parameters, not ours
            raise
        finally:
            self.raw.row_factory = Row

    def backup(self, path: Any, progress: Any, pages: Any) -> None:
        """Copies the database as it is now into a new file, then puts that in its place."""
        target = Path(path)
        if Path(f"{target}-wal").exists() or Path(f"{target}-journal").exists():
            raise errors.ConnectionFailedError(str(target), "a database is in use there; back up to another file")
        partial = target.with_name(f".{target.name}.{os.getpid()}-{id(target):x}.partial")
        try:
            files.create(partial)
            copy = sqlite3.connect(files.uri(partial, "rw"), uri=True, isolation_level=None)
            try:
                self.begin(readonly=True)  # one snapshot for all steps: no write of others starts the copy anew

                def step(status: int, remaining: int, total: int) -> None:
                    if self._progress():
                        raise sqlite3.OperationalError("interrupted")
                    if progress is not None:
                        progress(status, remaining, total)
                    time.sleep(0)

                try:
                    self.raw.backup(copy, pages=pages, progress=step)
                finally:
                    self.rollback()
            finally:
                copy.close()
            files.sync(partial)
            partial.replace(target)
            files.sync(target.parent)
        except OSError as error:
            raise errors.ConnectionFailedError(str(target), f"the backup cannot be written: {error}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()

    def interrupt(self) -> None:
        """See `Session`."""
        self.raw.interrupt()

    def close(self) -> None:
        """See `Session`. The last one out checkpoints, and only one may do so at a time."""
        held = self._locked or self.readonly or self.try_lock(1.0)
        try:
            # A cursor that some traceback keeps alive would keep its statement, and that the files open.
            self._close_streams()
            self._cursor.close()
            self.raw.close()
        finally:
            if held:
                self.unlock()

    def disown(self) -> None:
        """See `Session`. What SQLite knows of locks on this file is inherited and wrong: it cannot be opened here."""
        # An extra reference, never given back: not even the child's own exit may finalize the connection.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.raw))
        files.inherited.add(self._identity)

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """See `Session`."""
        if self._failing is not None:
            sql, parameters = self._failing
            self._failing = None
        statement = sql if isinstance(sql, Statement) else None
        text = statement.sql if statement is not None else sql if isinstance(sql, str) else None
        if not isinstance(error, sqlite3.Error):
            if statement is None or isinstance(error, errors.DatabaseError):
                return error
            if isinstance(error, (OverflowError, UnicodeEncodeError, ValueError, sqlite3.Warning)):
                return errors.QueryExecutionError(
                    f"a parameter cannot be stored: {error}", sql=text, parameters=parameters
                )
            if isinstance(error, TypeError):
                return errors.QueryExecutionError(str(error), sql=text, parameters=parameters)
            return error
        code: int | None = getattr(error, "sqlite_errorcode", None)
        name: str | None = getattr(error, "sqlite_errorname", None)
        primary = None if code is None else code & 0xFF
        if primary == sqlite3.SQLITE_AUTH:
            return self._refused(statement, text)
        if primary == sqlite3.SQLITE_READONLY and self._restricted:
            return read_only(text)
        kind = errors.QueryExecutionError
        message = str(error)
        if primary == sqlite3.SQLITE_CONSTRAINT:
            kind = errors.IntegrityError
        elif primary in BUSY_CODES:
            kind = errors.DatabaseBusyError
            message = f"another process kept its lock for longer than busy_timeout ({message})"
        elif primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            kind = errors.DatabaseCorruptError
        return kind(message, sql=text, parameters=parameters, code=code, code_name=name)

    def _refused(self, statement: Statement | None, text: str | None) -> BaseException:
        if statement is not None and statement.kind == CONTROL:
            return control_error(statement.verb)
        if self._restricted:
            return read_only(text)
        return errors.TransactionError(
            "BEGIN, COMMIT, ROLLBACK, SAVEPOINT and RELEASE are the package's own business: it has a transaction open"
            " around this code. Use db.transaction(), or db.begin() and db.commit(), outside it."
        )


def _records(cursor: sqlite3.Cursor, rows: list[Any], record_class: Any) -> list[Any]:
    names = [column[0] for column in cursor.description]
    return [record_class(**dict(zip(names, row, strict=True))) for row in rows]
