"""One SQLite connection: its statements, run on one worker's thread. Its transactions stand in `levels`.

What a reader, or a read-only transaction on the writer, must not do (temporary tables, ATTACH, pragmas that set something)
the authorizer refuses: SQLite asks it about every statement that it prepares. It also keeps BEGIN, COMMIT, SAVEPOINT and
the like to `levels`, so that nothing sent as SQL text, nor a function given the raw connection, can end a transaction that
the package manages: see `guard`.

A statement is over before it is answered (`fetch_one`, `_end`): in autocommit SQLite commits with the last step of a
write, so a write is always stepped to its end, however many of its rows are wanted, and the error of that step is the
statement's. Only then are rows converted, by the user's classes: their errors are the user's own. A SELECT may stop early.

What changes the connection instead of the database (a PRAGMA, ATTACH, a temporary table) the authorizer sees, whatever
it is spelled like. Outside a transaction it is refused; in a transaction that others share, put off until it has one of
its own (`Alone`); in one of its own it holds until the end, and then the connection is exchanged for a new one.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from database import errors
from database.engine.adapting import AS_IS, Adapters, taken
from database.engine.contract import Alone, Interrupted
from database.engine.records import FIRST, in_pieces, of_statement, records
from database.engine.rows import Rows
from database.engine.statement import CONTROL, READ, Result, Statement
from database.sqlite3 import analysis, files
from database.sqlite3.analysis import HINT_INSERT, HINT_UPSERT, HINT_VACUUM
from database.sqlite3.failures import (
    Patience,
    control_error,
    explain,
    is_broken,
    is_busy,
    is_foreign,
    is_undecodable,
    of_one_connection,
    read_only,
)
from database.sqlite3.lending import ENDED_BY_ITSELF
from database.sqlite3.levels import Levels
from database.sqlite3.library import classes
from database.sqlite3.raw import Lent
from database.sqlite3.values import Chunk, Feed, Row, bind

__all__ = ["Connection"]

REMEMBERED = 500
"""Texts of INSERTs of which it is known whether their table has row ids; and no long ones."""

_new_tuple: Callable[[type[Result], tuple[int, int | None]], Result] = tuple.__new__  # pyright: ignore


class Connection(Levels):
    """See `database.engine.contract.Connection`."""

    __slots__ = ("_adapters", "_connect", "_failing", "_patience", "_users", "patiently")

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
        self._patience = patience
        """Seconds to wait for another process's lock, where the worker does not do that: in scripts."""
        self._adapters: Adapters = {} if adapters is None else adapters
        """How types of the user's are stored."""
        self._connect = connect
        """Opens another file in the same way, with the same key."""
        self._failing: tuple[Any, Any, str] | None = None
        """What has just failed, and which of many it was, where the request does not say it."""
        self._users: BaseException | None = None
        """What the user's own code has just raised."""
        self.patiently: Callable[[Callable[[], None]], None] | None = None
        """See `Connection`."""
        super().__init__(
            raw, lock, progress, readonly=readonly, identities=identities, row_class=row_class, reopen=reopen
        )

    # Statements. All take (statement, parameters, extra) and run on the worker's thread.

    def execute(self, statement: Statement, params: Any, extra: Any = None) -> Result:
        """Runs a statement for what it does."""
        cursor = self._cursor
        hint = statement.hint
        sql = statement.sql
        inserts: bool | None = False
        if hint:
            if hint != HINT_INSERT:
                return self._vacuum(statement, params) if hint == HINT_VACUUM else self._count(statement, params)
            inserts = self._rowids.get(sql)
            if inserts is None:
                inserts = self._has_rowids(sql)  # before: behind a write nothing more may fail
        cursor.execute(sql, (() if params is None else params) if extra is AS_IS else bind(params, sql, self._adapters))
        if statement.returns_rows:
            self._end(statement)
        rowcount = cursor.rowcount
        # The tuple's own `__new__`: a NamedTuple's is Python code, and this is run for every write.
        return _new_tuple(Result, (rowcount, cursor.lastrowid if inserts and rowcount > 0 else None))

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
                try:
                    self._step_of_script(cursor, statement)
                except classes.OperationalError as error:
                    if not is_busy(error) or self.raw.in_transaction:
                        raise
                    # Outside of a transaction each statement is its own, and waits for its own lock.
                    wait = self.patiently or self._wait
                    wait(partial(self._step_of_script, cursor, statement))
        except Exception:
            self._failing = statement or sql, None, ""
            raise
        finally:
            cursor.close()

    def _step_of_script(self, cursor: sqlite3.Cursor, statement: Statement) -> None:
        if statement.hint == HINT_VACUUM:
            self._vacuum(statement, None)
            return
        cursor.execute(statement.sql)
        if cursor.description is not None:
            try:
                cursor.fetchall()
            except classes.OperationalError as error:
                if not is_undecodable(error):
                    raise

    def _wait(self, step: Callable[[], None]) -> None:
        """Tries a step until other processes have let it, `busy_timeout` is used up, or nobody waits any more."""
        patience = Patience(self._patience, self._progress)
        while True:
            try:
                step()
                return
            except classes.OperationalError as error:
                patience.wait(error)

    def fetch_all(self, statement: Statement, params: Any, record_class: Any) -> list[Any]:
        """All rows."""
        cursor = self._cursor
        sql = statement.sql
        cursor.execute(
            sql, (() if params is None else params) if record_class is AS_IS else bind(params, sql, self._adapters)
        )
        try:
            if record_class is AS_IS or record_class is None:
                return Rows(cursor)  # reads as `fetchall` does, without another list
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
        """The first row, or None; the statement is over when it is given back."""
        cursor = self._cursor
        sql = statement.sql
        cursor.execute(
            sql, (() if params is None else params) if record_class is AS_IS else bind(params, sql, self._adapters)
        )
        row = None
        try:
            row = cursor.fetchone()
            if row is not None and cursor.fetchone() is not None:
                self._end(statement)
        except Exception as error:
            self._end(statement)
            if row is None or not is_undecodable(error):  # nobody asked for what is in the second row
                raise
        if row is None or record_class is AS_IS or record_class is None:
            return row
        return self._records(row.keys(), [row], record_class)[0]

    def fetch_value(self, statement: Statement, params: Any, default: Any) -> Any:
        """The first column of the first row, or the default."""
        if default is AS_IS:
            row = self.fetch_one(statement, params, AS_IS)
            return None if row is None else row[0]
        row = self.fetch_one(statement, params, None)
        return default if row is None else row[0]

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

    # User code

    def _records(self, names: list[str], rows: list[Any], record_class: Any, stream: int | None = None) -> list[Any]:
        before = 0
        if stream is not None:
            before = self._counts.get(stream, 0)
            self._counts[stream] = before + len(rows)
        # On the loop's thread nobody can have called it off, and it is not for a clock to have it done twice.
        if len(rows) <= FIRST or not self.raw.is_here():
            return self._made(names, rows, record_class, before)
        return in_pieces(
            lambda piece, begun: self._made(names, piece, record_class, before + begun), rows, self._progress
        )

    def _made(self, names: list[str], rows: list[Any], record_class: Any, before: int) -> list[Any]:
        try:
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

    def broken_references(self) -> Counter[tuple[str, str]]:
        """How many rows of which table refer to rows of which other that do not exist."""
        return Counter((row[0], row[2]) for row in self.raw.plain_cursor().execute("PRAGMA foreign_key_check"))

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
            # One snapshot for all steps: no write of others starts the copy anew.
            self.begin_patiently(self._patience, readonly=True)
            try:
                self.raw.module.Connection.backup(self.raw, target, pages=pages, progress=step)
            finally:
                self.rollback()

        copy(path, run, self._connect)

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """See `Connection`."""
        theirs = taken() or (error if error is self._users else None)
        if theirs is not None:
            self._users = self._failing = self.raw.failure = None
            return of_statement(theirs, sql, parameters)
        which = ""
        failure, self.raw.failure = self.raw.failure, None
        if self._failing is not None:
            sql, parameters, which = self._failing
            self._failing = None
        elif failure is not None and failure[0] is error:
            _, sql, parameters = failure
        statement = sql if isinstance(sql, Statement) else None
        text = statement.sql if statement is not None else sql if isinstance(sql, str) else None
        adapters = self._adapters
        if not isinstance(error, classes.Error):
            if statement is None or not isinstance(error, (OverflowError, ValueError, TypeError, *classes.Warning)):
                return error
            if is_foreign(error):
                return error
            return explain(error, text, parameters, which, adapters)
        if self._unopened is not None and is_broken(error):
            return self._unopened
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        forbidden, self.raw.forbidden = self.raw.forbidden, False
        if primary == sqlite3.SQLITE_AUTH and not forbidden:
            refused, self._refused = self._refused, None
            if self.denied():
                return Alone()
            if refused is not None:
                return of_one_connection(refused, text)
            return self._forbidden(statement, text)
        if primary == sqlite3.SQLITE_READONLY and self._restricted and not is_busy(error):
            return read_only(text)
        done = statement is not None and is_undecodable(error)
        return explain(error, text, parameters, which, adapters, done=done)

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
