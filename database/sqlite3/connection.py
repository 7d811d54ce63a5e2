"""One SQLite connection: opened, restricted, used and closed on one worker's thread.

The writer is the only connection that writes and checkpoints; readers are opened with `mode=ro`, which no SQL can
change. What else a reader, or a read-only transaction on the writer, must not do (temporary tables, ATTACH, pragmas
that set something) the authorizer refuses: SQLite asks it about every statement that it prepares. It also keeps BEGIN,
COMMIT, SAVEPOINT and the like to this module, so that nothing sent as SQL text, nor a function given the raw
connection, can end a transaction that the package manages.

A statement is over before it is answered (`fetch_one`, `_end`): in autocommit SQLite commits with the last step of a
write, so a write is always stepped to its end, whoever wants how many of its rows, and the error of that step is the
statement's. Only then are rows converted, by the user's classes: their errors are the user's own. A SELECT may stop early.

What changes the connection instead of the database (a PRAGMA, ATTACH, a temporary table) the authorizer sees, whatever
it is spelled like. Outside a transaction it is refused; in a transaction that others share, put off until it has one of
its own (`Alone`); in one of its own it holds until the end, and then the connection is exchanged for a new one.

The statements of this module carry a trailing comment that nobody can guess. `sqlite3`'s statement cache goes by the
text, and what comes out of it is not shown to the authorizer again: so nobody else's text may equal one of ours.

Facts this rests on (sqlite.org/c3ref/set_authorizer.html, /lang_transaction.html, /wal.html):
BEGIN IMMEDIATE on a read-only connection pins its snapshot at once and takes no lock; setting an authorizer anew makes
SQLite prepare all statements again; a connection that closes last checkpoints and removes the `-wal` file.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from database import errors
from database.engine.contract import Alone, Interrupted
from database.engine.records import records
from database.engine.statement import CONTROL, READ, Result, Statement
from database.sqlite3 import analysis, files
from database.sqlite3.analysis import HINT_INSERT, HINT_UPSERT, HINT_VACUUM
from database.sqlite3.failures import (
    Patience,
    control_error,
    explain,
    is_busy,
    is_undecodable,
    of_one_connection,
    read_only,
)
from database.sqlite3.guard import MARK, Guard
from database.sqlite3.library import classes
from database.sqlite3.raw import ENDED_BY_ITSELF, Lent
from database.sqlite3.values import Adapters, Chunk, Feed, Row, bind

if TYPE_CHECKING:
    from database.engine.migrations import Applied, MigrationReport, Order

__all__ = ["Connection"]

PROGRESS_STEPS = 10_000
"""Steps of SQLite's machine between two calls of the progress handler: some 80 µs of the CPU's time."""

REMEMBERED = 500
"""Texts of INSERTs of which it is known whether their table has row ids; and no long ones."""

_BEGIN = f"BEGIN IMMEDIATE {MARK}"
_COMMIT = f"COMMIT {MARK}"
_ROLLBACK = f"ROLLBACK {MARK}"

_SAVEPOINT = f"SAVEPOINT level_0 {MARK}"
_RELEASE = f"RELEASE level_0 {MARK}"
"""Around every unit of a group, so not put together each time."""

_new_tuple: Callable[[type[Result], tuple[int, int | None]], Result] = tuple.__new__  # pyright: ignore


class Connection(Guard):
    """See `database.engine.contract.Connection`."""

    __slots__ = (
        "_adapters",
        "_connect",
        "_counts",
        "_failing",
        "_lock",
        "_locked",
        "_patience",
        "_progress",
        "_reopen",
        "_row_class",
        "_streams",
        "_users",
        "identities",
    )

    def __init__(
        self,
        raw: Lent,
        lock: Lock | files.Locks,
        progress: Callable[[], bool],
        *,
        readonly: bool,
        patience: float = 0.0,
        connect: Callable[[Path, str], Any],
        identities: tuple[tuple[int, int], ...] = (),
        row_class: type[Any] = Row,
        adapters: Adapters | None = None,
        reopen: Callable[[], Lent] | None = None,
    ) -> None:
        super().__init__(readonly=readonly)
        self._patience = patience
        """Seconds to wait for another process's lock, where the worker does not do that: in scripts."""
        self.identities = identities
        """Of its files: the database and what is attached to it."""
        self._row_class = row_class
        """`Row`, on top of the library that this connection is of."""
        self._adapters: Adapters = {} if adapters is None else adapters
        """How types of the user's are stored."""
        self._connect = connect
        """Opens another file in the same way, with the same key."""
        self._reopen = reopen
        """Opens a new connection, just as this one was opened."""
        self._lock = lock
        self._locked = False
        self._progress = progress
        self._streams: dict[int, sqlite3.Cursor] = {}
        self._counts: dict[int, int] = {}
        """Of streams of records: how many have been made."""
        self._failing: tuple[Any, Any, str] | None = None
        """What has just failed, and which of many it was, where the request does not say it."""
        self._users: BaseException | None = None
        """What the user's own code has just raised."""
        files.opened.update(identities)
        self._take(raw)

    def _take(self, raw: Lent) -> None:
        self.raw = raw
        raw.row_factory = self._row_class
        raw.prepared(self, self._authorize, self._progress, PROGRESS_STEPS)
        self._cursor = raw.plain_cursor()

    def _exchange(self) -> None:
        """Replaces the connection by a new one, which is as the configuration says."""
        self._changed = self._schema_writable = False
        self._rowids.clear()
        if self._reopen is None:
            return
        old = self.raw
        self._cursor.close()
        with contextlib.suppress(*classes.Error):
            if old.plain_cursor().execute("PRAGMA locking_mode").fetchone()[0] == "exclusive":
                old.close()  # nobody else could open the file
        try:
            self._take(self._reopen())
        except Exception:
            # What was to be done is done. The next statement fails for a closed connection, and the pool opens another.
            self._changed = False
        finally:
            old.close()

    # Transactions

    @property
    def in_transaction(self) -> bool:
        """See `Connection`. A connection that was given up has none."""
        try:
            return self.raw.in_transaction
        except classes.ProgrammingError:
            return False

    @property
    def excludes(self) -> bool:
        """Whether it keeps a lock on the file while nothing runs: for a transaction, or for a stream. Any thread."""
        return bool(self._streams) or self.in_transaction

    def try_lock(self, seconds: float) -> bool:
        """See `Connection`."""
        if self._locked:
            return True
        self._locked = self._lock.acquire(timeout=seconds) if seconds else self._lock.acquire(blocking=False)
        return self._locked

    def unlock(self) -> None:
        """See `Connection`."""
        if self._locked:
            self._locked = False
            self._lock.release()

    def _control(self, sql: str) -> None:
        self._admitting = True
        try:
            self._cursor.execute(sql)
        finally:
            self._admitting = False

    def empty_log(self) -> bool:
        """Checkpoints, and cuts the WAL off; False if somebody reads from it. Outside any transaction."""
        self._admitting = True
        try:
            busy = self._cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]
        except classes.OperationalError:  # another process holds a lock: there will be another time
            return False
        finally:
            self._admitting = False
        return not busy

    def owns(self, cursor: Any) -> bool:
        """See `Keeper`."""
        return cursor is self._cursor or any(cursor is each for each in self._streams.values())

    # Within a transaction

    def begin(self, *, readonly: bool) -> None:
        """See `Connection`."""
        self._control(_BEGIN)
        if readonly and not self.readonly:
            self.restrict(True)

    def commit(self) -> None:
        """See `Connection`."""
        self._close_streams()
        self._control(_COMMIT)
        if self._restricted and not self.readonly:
            self.restrict(False)
        if self._changed:
            self._exchange()

    def rollback(self) -> None:
        """See `Connection`."""
        self._close_streams()
        if self.raw.in_transaction:
            self._control(_ROLLBACK)
        if self._restricted and not self.readonly:
            self.restrict(False)
        if self._changed:
            self._exchange()

    def savepoint(self, number: int) -> None:
        """See `Connection`."""
        self._control(_SAVEPOINT if number == 0 else f"SAVEPOINT level_{number} {MARK}")

    def release(self, number: int) -> None:
        """See `Connection`."""
        self._control(_RELEASE if number == 0 else f"RELEASE level_{number} {MARK}")

    def undo(self, number: int) -> None:
        """See `Connection`."""
        self._control(f"ROLLBACK TO level_{number} {MARK}")
        self._control(f"RELEASE level_{number} {MARK}")

    def isolation(self, level: str) -> None:
        """See `Connection`. There is but one level here, and it is the strictest."""

    # Statements. All take (statement, parameters, extra) and run on the worker's thread.

    def execute(self, statement: Statement, params: Any, _extra: Any = None) -> Result:
        """Runs a statement for what it does."""
        cursor = self._cursor
        hint = statement.hint
        if hint and hint != HINT_INSERT:
            return self._vacuum(statement, params) if hint == HINT_VACUUM else self._count(statement, params)
        sql = statement.sql
        known: bool | None = True
        if hint:
            known = self._rowids.get(sql)
            if known is None:
                known = self._has_rowids(sql)  # before: behind a write nothing more may fail
        cursor.execute(sql, bind(params, sql, self._adapters))
        if statement.returns_rows:
            self._end(statement)
        rowcount = cursor.rowcount
        # The tuple's own `__new__`: a NamedTuple's is Python code, and this is run for every write.
        return _new_tuple(Result, (rowcount, cursor.lastrowid if hint and known and rowcount > 0 else None))

    def _count(self, statement: Statement, params: Any) -> Result:
        """Runs an upsert, or a write that begins with WITH, which `sqlite3` does not know for one."""
        cursor, sql = self._cursor, statement.sql
        inserts = statement.verb in ("INSERT", "REPLACE")
        known = inserts and self._has_rowids(sql)
        before = cursor.execute("SELECT last_insert_rowid()").fetchall()[0][0]
        total = self.raw.total_changes
        cursor.execute(sql, bind(params, sql, self._adapters))
        if statement.returns_rows:
            self._end(statement)
        rowcount, lastrowid = cursor.rowcount, cursor.lastrowid
        if statement.hint != HINT_UPSERT:
            try:
                rowcount = self.raw.plain_cursor().execute("SELECT changes()").fetchall()[0][0]
            except classes.Error:  # interrupted, but the write is done: so what is known without a statement
                rowcount = self.raw.total_changes - total
        if not known or rowcount <= 0:
            return Result(rowcount, None)
        if lastrowid == before and (statement.hint == HINT_UPSERT or "CONFLICT" in sql.upper()):
            lastrowid = None  # an update leaves it as it was; only if it moves has a row been added for certain
        return Result(rowcount, lastrowid)

    def _has_rowids(self, sql: str) -> bool:
        """Whether `last_insert_rowid()` is of this INSERT: a table WITHOUT ROWID, or a view, leaves another's."""
        known = self._rowids.get(sql)
        if known is None:
            known = True
            table = analysis.target(sql)
            if table is not None:
                try:
                    probe = f"SELECT rowid, _rowid_, oid FROM {table} LIMIT 0"  # noqa: S608  - quoted as a name
                    self.raw.plain_cursor().execute(probe).close()
                except classes.OperationalError as error:
                    if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:
                        raise
                    known = "no such column" not in str(error)
                    if known:  # there is no such table: the INSERT itself will say so
                        return True
            if len(self._rowids) >= REMEMBERED:
                self._rowids.clear()
            if len(sql) <= 10_000:
                self._rowids[sql] = known
        return known

    def _end(self, statement: Statement) -> None:
        """Steps the statement to its end, whatever is in its rows: nobody looks at those that are left.

        Raises:
            sqlite3.Error: What the end of the statement has to say; outside a transaction that is its commit's error.
        """
        cursor = self._cursor
        if statement.kind == READ:
            self._cursor = self.raw.plain_cursor()
            cursor.close()  # left half read it would pin the WAL: no checkpoint can pass it
            return
        raw = self.raw
        factory, raw.text_factory = raw.text_factory, bytes  # of TEXT that is not UTF-8, too
        try:
            for _ in cursor:
                pass
        finally:
            raw.text_factory = factory

    def _vacuum(self, statement: Statement, params: Any) -> Result:
        if self._restricted:
            raise read_only(statement.sql)  # VACUUM INTO works on a connection that only reads, and writes a file
        self._admitting = not self.raw.in_transaction  # inside one, SQLite itself says why not
        try:
            self._cursor.execute(statement.sql, bind(params, statement.sql, self._adapters))
        finally:
            self._admitting = False
        return Result(-1, None)

    def execute_many(self, statement: Statement, rows: Any, _extra: Any = None) -> Result:
        """Runs a statement once for every row of parameters."""
        cursor, sql = self.raw.plain_cursor(), statement.sql
        feed = Feed(rows, sql, self._progress, self._adapters)
        try:
            if statement.hint == analysis.HINT_WITH:
                count = 0
                for row in feed:
                    count += cursor.execute(sql, row).execute("SELECT changes()").fetchall()[0][0]
                return Result(count, None)
            cursor.executemany(sql, iter(feed))
            return Result(max(cursor.rowcount, 0), None)
        except BaseException as error:
            if feed.raised is not None:
                self._users = error
            elif feed.number:
                self._failing = statement, feed.row(), f"row {feed.number} of execute_many()"
            raise
        finally:
            cursor.close()

    def execute_batch(self, items: Any, _params: Any = None, _extra: Any = None) -> int:
        """Runs (statement, parameters) pairs; gives how many."""
        for number, (statement, params) in enumerate(items):
            if number % 16 == 0 and self._progress():
                raise Interrupted
            try:
                sql = statement.sql
                self._cursor.execute(sql, bind(params, sql, self._adapters))
                if statement.returns_rows:
                    self._end(statement)
            except Exception:
                self._failing = statement, params, f"write {number + 1} of the {len(items)} that a batch sent together"
                raise
        return len(items)

    def execute_script(self, sql: Any, _params: Any = None, _extra: Any = None) -> None:
        """Runs the statements of a script one after the other, without touching the open transaction."""
        cursor = self.raw.plain_cursor()
        statement: Statement | None = None
        try:
            for text in analysis.split(sql):
                if self._progress():
                    raise Interrupted
                statement = analysis.analyse(text)
                if statement.hint == HINT_VACUUM:
                    self._vacuum(statement, None)
                    continue
                patience = Patience(0 if self.raw.in_transaction else self._patience, self._progress)
                while True:  # outside of a transaction each statement is its own, and waits for its own lock
                    try:
                        cursor.execute(text)
                        if cursor.description is not None:
                            cursor.fetchall()
                        break
                    except classes.OperationalError as error:
                        if is_undecodable(error):
                            break
                        patience.wait(error)
        except Exception:
            self._failing = statement or sql, None, ""
            raise
        finally:
            cursor.close()

    def fetch_all(self, statement: Statement, params: Any, record_class: Any) -> list[Any]:
        """All rows."""
        cursor = self._cursor
        sql = statement.sql
        cursor.execute(sql, bind(params, sql, self._adapters))
        try:
            if record_class is None:
                return cursor.fetchall()
            cursor.row_factory = None
            try:
                tuples = cursor.fetchall()
            finally:
                cursor.row_factory = self._row_class
        except Exception:
            self._end(statement)
            raise
        return self._records(_names(cursor), tuples, record_class)

    def fetch_one(self, statement: Statement, params: Any, record_class: Any) -> Any:
        """The first row, or None."""
        row = self._first(statement, params)
        if row is None or record_class is None:
            return row
        return self._records(row.keys(), [row], record_class)[0]

    def fetch_value(self, statement: Statement, params: Any, default: Any) -> Any:
        """The first column of the first row, or the default."""
        row = self._first(statement, params)
        return default if row is None else row[0]

    def _first(self, statement: Statement, params: Any) -> Any:
        """The first row; the statement is over when it is given back."""
        cursor = self._cursor
        sql = statement.sql
        cursor.execute(sql, bind(params, sql, self._adapters))
        row = None
        try:
            row = cursor.fetchone()
            if row is not None and cursor.fetchone() is not None:
                self._end(statement)
        except Exception as error:
            self._end(statement)
            if row is None or not is_undecodable(error):  # nobody asked for what is in the second row
                raise
        return row

    # Streams: a cursor of their own, known by a number

    def open_stream(self, statement: Statement, params: Any, key: Any) -> None:
        """Begins to read."""
        cursor = self._streams[key] = self.raw.plain_cursor()
        cursor.row_factory = None  # `Chunk` makes each row
        try:
            cursor.execute(statement.sql, bind(params, statement.sql, self._adapters))
        except BaseException:
            self.close_stream(key)
            raise

    def read_stream(self, key: Any, size: Any, record_class: Any) -> list[Any] | Chunk:
        """The next rows; fewer than asked for at the end, when the cursor has been closed."""
        cursor = self._streams.get(key)
        if cursor is None:
            raise errors.TransactionError("the transaction in which this stream was opened has ended")
        try:
            tuples = cursor.fetchmany(size)
            rows = (
                Chunk(cursor, tuples, self._row_class)
                if record_class is None
                else self._records(_names(cursor), tuples, record_class, key)
            )
        except BaseException:
            self.close_stream(key)
            raise
        if len(rows) < size:
            self.close_stream(key)
        return rows

    def close_stream(self, key: Any, _params: Any = None, _extra: Any = None) -> None:
        """Stops reading."""
        cursor = self._streams.pop(key, None)
        self._counts.pop(key, None)
        if cursor is not None:
            cursor.close()

    def _close_streams(self) -> None:
        for key in tuple(self._streams):
            self.close_stream(key)

    # User code

    def _records(self, names: list[str], rows: list[Any], record_class: Any, stream: int | None = None) -> list[Any]:
        try:
            if stream is None:
                return records(names, rows, record_class)
            before = self._counts.get(stream, 0)
            self._counts[stream] = before + len(rows)
            return records(names, rows, record_class, before=before)
        except BaseException as error:
            self._users = error
            raise

    def call(self, function: Any, arguments: Any, _extra: Any = None) -> Any:
        """Runs a function of the user's on the raw connection. Its caller keeps or undoes what it did."""
        raw = self.raw
        raw.lend()
        try:
            result = function(raw, *arguments)
        except BaseException:
            raw.take_back(keep=False)
            raise
        raw.take_back(keep=True)
        if not raw.in_transaction:  # and the function has taken no notice of it
            raise errors.TransactionError(ENDED_BY_ITSELF)
        return result

    # The rest

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
            except classes.OperationalError as error:
                if not is_busy(error) or time.monotonic() >= deadline or self._progress():
                    raise
            time.sleep(0.002)

    def broken_references(self) -> Counter[tuple[str, str]]:
        """How many rows of which table refer to rows of which other that do not exist."""
        return Counter((row[0], row[2]) for row in self.raw.plain_cursor().execute("PRAGMA foreign_key_check"))

    def migrate(self, order: Any, _params: Any = None, _extra: Any = None) -> MigrationReport:
        """Applies pending migrations, each in a transaction; `order` is a `migrations.Order`."""
        from database.sqlite3.migrate import migrate  # noqa: PLC0415  - few connections ever need it

        return migrate(self, cast("Order", order))

    def applied_migrations(self, _sql: Any = None, _params: Any = None, _extra: Any = None) -> tuple[Applied, ...]:
        """The database's record of migrations."""
        from database.sqlite3.migrate import applied  # noqa: PLC0415  - few connections ever need it

        return applied(self)

    def call_aiosql(self, statement: Statement, params: Any, extra: Any) -> Any:
        """Does what a method of aiosql's synchronous adapter would do, with our ends of statements."""
        method, record = extra
        name = method.__name__
        if name == "select":
            return self.fetch_all(statement, params, record[0])
        if name == "select_one":
            return self.fetch_one(statement, params, record[0])
        if name == "select_value":
            return self.fetch_value(statement, params, None)
        result = self.execute(statement, params)
        return result.lastrowid if name == "insert_returning" else result.rowcount

    def backup(self, path: Any, progress: Any, pages: Any) -> None:
        """Copies the database as it is now into a new file, then puts that in its place."""
        from database.sqlite3.backup import copy  # noqa: PLC0415  - seldom needed

        def step(status: int, remaining: int, total: int) -> None:
            if self._progress():
                raise sqlite3.OperationalError("interrupted")
            if progress is not None:
                try:
                    progress(status, remaining, total)
                except BaseException as error:
                    self._users = error
                    raise
            time.sleep(0)

        def run(target: sqlite3.Connection) -> None:
            self.begin(readonly=True)  # one snapshot for all steps: no write of others starts the copy anew
            try:
                self.raw.module.Connection.backup(self.raw, target, pages=pages, progress=step)
            finally:
                self.rollback()

        copy(path, run, self._connect)

    def interrupt(self) -> None:
        """See `Connection`."""
        with contextlib.suppress(*classes.ProgrammingError):  # it is just being exchanged
            self.raw.interrupt()

    def close(self) -> None:
        """See `Connection`. The last one out checkpoints, and only one may do so at a time."""
        held = self._locked or self.readonly or self.try_lock(1.0)
        files.opened.subtract(self.identities)
        try:
            # A cursor that some traceback keeps alive would keep its statement, and that the files open.
            self._close_streams()
            with contextlib.suppress(*classes.ProgrammingError):
                self._cursor.close()
            self.raw.close()
        finally:
            if held:
                self.unlock()

    def disown(self) -> None:
        """See `Connection`. What SQLite knows of locks on this file is inherited and wrong: it cannot be opened here."""
        # An extra reference, never given back: not even the child's own exit may finalize the connection.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.raw))
        files.inherited.update(self.identities)

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """See `Connection`."""
        if error is self._users:
            self._users = None
            return error
        which = ""
        failure, self.raw.failure = self.raw.failure, None
        if self._failing is not None:
            sql, parameters, which = self._failing
            self._failing = None
        elif failure is not None and failure[0] is error:
            _, sql, parameters = failure
        statement = sql if isinstance(sql, Statement) else None
        text = statement.sql if statement is not None else sql if isinstance(sql, str) else None
        if not isinstance(error, classes.Error):
            if statement is None or not isinstance(error, (OverflowError, ValueError, TypeError, *classes.Warning)):
                return error
            return explain(error, text, parameters, which)
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary == sqlite3.SQLITE_AUTH:
            refused, self._refused = self._refused, None
            if self.denied():
                return Alone()
            if refused is not None:
                return of_one_connection(refused, text)
            return self._forbidden(statement, text)
        if primary == sqlite3.SQLITE_READONLY and self._restricted and not is_busy(error):
            return read_only(text)
        return explain(error, text, parameters, which)

    def _forbidden(self, statement: Statement | None, text: str | None) -> BaseException:
        if statement is not None and statement.kind == CONTROL:
            return control_error(statement.verb)
        if self._restricted:
            return read_only(text)
        return errors.TransactionError(
            "BEGIN, COMMIT, ROLLBACK, SAVEPOINT and RELEASE are the package's own business: it has a transaction open"
            " around this code. Use db.transaction(), or db.begin() and db.commit(), outside it."
        )


def _names(cursor: sqlite3.Cursor) -> list[str]:
    return [column[0] for column in cursor.description]
