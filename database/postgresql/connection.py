"""One PostgreSQL connection: opened, used and closed on one worker's thread.

What it rests on: `wire` (libpq's waits), `levels` (the transaction), beneath; `together`, `bulk`, `returning` and `raw`
beside. Much travels together: BEGIN, SAVEPOINT and RELEASE go out with the next statement, in one round trip (libpq's
pipeline mode); autocommit statements of many tasks do likewise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import psycopg
from psycopg import pq

from database import errors
from database.driver.request import Request
from database.engine.adapting import NATIVE, taken
from database.engine.contract import BLOCKING, Operation, Steps
from database.engine.records import FIRST, in_pieces, is_generated, of_statement, records
from database.engine.rows import Rows
from database.engine.statement import CONTROL, READ, Result, Statement
from database.postgresql import analysis, bulk
from database.postgresql.failures import (
    Lost,
    clean,
    code_name,
    control_error,
    is_lost,
    kind_of,
    mark_alone,
    mark_broken,
    mark_outcome,
    message_of,
    outcome_of,
    read_only,
)
from database.postgresql.plan import Plan
from database.postgresql.raw import Cursor, RawConnection, ServerCursor, rows
from database.postgresql.redaction import hide
from database.postgresql.returning import AGAIN_AFTER, UNFIT_FOR_RETURNING, done, is_settled, with_returning
from database.postgresql.sending import Sender
from database.postgresql.values import BindError, is_plain, row_class

__all__ = ["Connection", "may_join"]

QUICK_SECONDS = 0.002
"""A statement that takes longer than this is not sent together with others."""

ENDLESS = 60.0
"""Seconds that are assumed for a statement of which only the first row was computed."""

FEW_ROWS = 100
"""Up to so many rows are made of an answer on the event loop's thread."""

FEW_PIECES = 4
"""And of an answer that came in no more pieces than that."""

CURSORS = frozenset({"SELECT", "TABLE", "VALUES"})
"""What a cursor can be declared for."""

UNKNOWN = (
    "the function has ended the transaction behind the package's back (BEGIN, COMMIT and ROLLBACK are the package's): whether"
    " what it did is kept is unknown; its connection was replaced"
)

_IDLE = pq.TransactionStatus.IDLE
_INTRANS = pq.TransactionStatus.INTRANS
_INERROR = pq.TransactionStatus.INERROR
_BAD = pq.ConnStatus.BAD


class Connection(Sender):
    """See `database.engine.contract.Connection`."""

    __slots__ = ()

    patiently: Callable[[Callable[[], None]], None] | None = None
    """See `Connection`."""
    plain = False
    """The server's notices may come with every statement, and are logged."""

    def adopt(self, raw: RawConnection) -> None:
        """See `Wire`."""
        raw.row_factory = cast("Any", rows)
        raw.cursor_factory = cast("Any", Cursor)
        raw.server_cursor_factory = cast("Any", ServerCursor)
        super().adopt(raw)

    # Statements. All take (statement, parameters, extra) and run on the worker's thread.

    def execute(self, statement: Statement, params: Any, _extra: Any = None) -> Result:
        """Runs a statement for what it does."""
        result: Result = self.walk(self.executing(statement, params, None))
        return result

    def executing(self, statement: Statement, params: Any, _extra: Any) -> Steps:
        """`execute` in steps."""
        plan: Plan = statement.hint
        insert = plan.insert
        if insert is None or statement.returns_rows or not insert.values or not self.settings.lastrowid:
            return done(statement, (yield from self.running(plan, params)), self.transformer)
        if not is_settled(plan):
            yield BLOCKING
        sql = with_returning(self, plan, statement)
        if not sql:
            return done(statement, (yield from self.running(plan, params)), self.transformer)
        try:
            return done(statement, (yield from self.running(plan, params, sql)), self.transformer)
        except UNFIT_FOR_RETURNING as error:
            # The table was made anew, with another key; or this role may not read what it may insert.
            if self.lost(error) or (self.began and not self.prefix):
                raise
            yield BLOCKING
            plan.returning = None if isinstance(error, psycopg.errors.UndefinedColumn) else ""
            plan.look_again = time.monotonic() + AGAIN_AFTER
            sql = with_returning(self, plan, statement)
            return done(statement, (yield from self.running(plan, params, sql or None)), self.transformer)

    def execute_many(self, statement: Statement, rows: Any, _extra: Any = None) -> Result:
        """Runs a statement once for every row of parameters."""
        return bulk.execute_many(self, statement, rows)

    def execute_batch(self, items: Any, _params: Any = None, _extra: Any = None) -> int:
        """Runs (statement, parameters) pairs; gives how many."""
        return bulk.execute_batch(self, items)

    def execute_script(self, sql: Any, _params: Any = None, _extra: Any = None) -> None:
        """Runs the statements of a script one after the other, without touching the open transaction."""
        plans: list[Plan] = []
        for text in analysis.split(sql):
            statement = analysis.analyse(text)
            if statement.kind == CONTROL:
                raise control_error(statement.verb)
            if (self.readonly or self.restricted) and statement.kind != READ and statement.verb != "EXPLAIN":
                raise read_only(text)
            plan = Plan(text, None, 0)  # placeholders are the script's own: there are no parameters
            known: Plan = statement.hint
            plan.take_from(known)
            if known.refusal is not None and not self.began:
                raise errors.QueryExecutionError(f"{known.refusal}; nothing was executed", sql=text)
            plans.append(plan)
        for plan in plans:
            self.run(plan, ())

    def fetch_all(self, statement: Statement, params: Any, record_class: Any) -> list[Any]:
        """All rows."""
        found: list[Any] = self.walk(self.fetching_all(statement, params, record_class))
        return found

    def fetching_all(self, statement: Statement, params: Any, record_class: Any) -> Steps:
        """`fetch_all` in steps."""
        result = yield from self.running(statement.hint, params)
        if result.ntuples > FEW_ROWS or self.pieces > FEW_PIECES:
            yield BLOCKING
        return self.load(result, 0, result.ntuples, record_class)

    def fetch_one(self, statement: Statement, params: Any, record_class: Any) -> Any:
        """The first row, or None."""
        return self.walk(self.fetching_one(statement, params, record_class))

    def fetching_one(self, statement: Statement, params: Any, record_class: Any) -> Steps:
        """`fetch_one` in steps."""
        result = yield from self._fetching_first(statement, params)
        found = self.load(result, 0, min(result.ntuples, 1), record_class)
        return found[0] if found else None

    def fetch_value(self, statement: Statement, params: Any, default: Any) -> Any:
        """The first column of the first row, or the default."""
        return self.walk(self.fetching_value(statement, params, default))

    def fetching_value(self, statement: Statement, params: Any, default: Any) -> Steps:
        """`fetch_value` in steps."""
        result = yield from self._fetching_first(statement, params)
        return self.value(result, default)

    def _fetching_first(self, statement: Statement, params: Any) -> Steps:
        """Executes a statement of which only the first row is wanted.

        A cursor computes no more than that, but takes a round trip more. Not where the statement does anything, for it is to
        be done to the end (what hides behind a view or an operator is found out where there are more rows); nor where it is
        known to be quick as it is, or had one row the last time: a server far away makes every statement slow. Nothing is
        cancelled for this: a cancellation would undo what was done.
        """
        plan: Plan = statement.hint
        seconds = plan.seconds
        if (
            statement.kind != READ
            or statement.verb not in CURSORS
            or (seconds is not None and (seconds <= QUICK_SECONDS or not plan.many))
        ):
            result = yield from self.running(plan, params)
            plan.many = result.ntuples > 1
            if self.pieces > FEW_PIECES:
                yield BLOCKING
            return result
        yield BLOCKING
        return self._first_by_cursor(plan, params)

    def _first_by_cursor(self, plan: Plan, params: Any) -> pq.abc.PGresult:
        if plan.calls:
            self.look_at_calls(plan)
        if plan.acts:
            return self.run(plan, params)
        own = not self.began
        if own:
            self.revive()
            self.began = True
            self.begin_with(b"BEGIN")
        started = time.perf_counter()
        try:
            name = self._declare(plan, params, "first")
            result = self.run(Plan(f"FETCH FORWARD 2 FROM {name}", None, 0), ())
            if result.ntuples > 1 and not self.only_reads(plan):
                plan.acts = True
                self.run(Plan(f"MOVE FORWARD ALL FROM {name}", None, 0), ())
            if own:
                self.commit()
            else:
                self.prefix.append(b"CLOSE " + name.encode())
        except BaseException as error:
            if own:
                if isinstance(error, psycopg.Error):
                    mark_alone(error)
                with contextlib.suppress(psycopg.Error):
                    self.rollback()
            raise
        plan.many = result.ntuples > 1
        plan.took(ENDLESS if plan.many else time.perf_counter() - started)
        return result

    def steps(self, operation: Operation | None, statement: Any, params: Any, extra: Any) -> Steps | None:
        """See `Stepping`. Code of the user's are classes of records, functions that store a type, properties of parameters."""
        make = _STEPS.get(operation)
        if make is None:
            return None
        if extra is not None and operation is not Connection.fetch_value and not is_generated(extra):
            return None
        if params is not None:
            kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
            if kind is not dict and kind is not tuple and kind is not list:
                return None
            fit = NATIVE.issuperset if self.adapters else is_plain
            if not fit(map(type, params.values() if kind is dict else params)):
                return None
        return make(self, statement, params, extra)

    def _declare(self, plan: Plan, params: Any, kind: str) -> str:
        """Opens a cursor, within the transaction; gives its name."""
        self.names += 1
        name = f"{kind}_{self.names}"
        self.run(plan, params, f"DECLARE {name} NO SCROLL CURSOR FOR {plan.sql.rstrip().rstrip(';')}", timed=False)
        return name

    def value(self, result: pq.abc.PGresult, default: Any) -> Any:
        """The first column of the first row."""
        if result.ntuples == 0:
            return default
        transformer = self.transformer
        transformer.set_pgresult(result)
        return transformer.load_row(0, tuple)[0]

    def load(self, result: pq.abc.PGresult, start: int, end: int, record_class: Any) -> list[Any]:
        """Rows of a result, as the caller wants them."""
        if start == end:
            return Rows() if record_class is None else []
        transformer = self.transformer
        transformer.set_pgresult(result)
        names = tuple([(result.fname(number) or b"").decode() for number in range(result.nfields)])
        if record_class is None:
            return Rows(transformer.load_rows(start, end, row_class(names)))
        return self.made(names, transformer.load_rows(start, end, tuple), record_class)

    def made(self, names: Sequence[str], rows: list[Any], record_class: Any) -> list[Any]:
        """Rows as the user's class has them; what that raises goes to the caller as it is."""

        def make(piece: list[Any], before: int) -> list[Any]:
            try:
                return records(names, piece, record_class, before=before)
            except BaseException as error:
                self.theirs = error
                raise

        return make(rows, 0) if len(rows) <= FIRST else in_pieces(make, rows, self.progress)

    # Streams: a cursor on the server, known by a number

    def open_stream(self, statement: Statement, params: Any, key: Any) -> None:
        """Begins to read. Outside a transaction it gets one of its own, for a cursor needs that."""
        plan: Plan = statement.hint
        if statement.kind != READ or statement.verb not in CURSORS:
            result = self.run(plan, params)
            self.streams[key] = self.load(result, 0, result.ntuples, None)
            return
        own = not self.began
        if own:
            self.begin(readonly=True)
        try:
            name = self._declare(plan, params, "stream")
        except BaseException:
            if own:
                with contextlib.suppress(psycopg.Error):
                    self.rollback()
            raise
        self.streams[key] = name.encode(), statement, params

    def read_stream(self, key: Any, size: Any, record_class: Any) -> list[Any]:
        """The next rows; fewer than asked for at the end, when the cursor has been closed."""
        source = self.streams.get(key)
        if source is None:
            raise errors.TransactionError("the transaction in which this stream was opened has ended")
        if isinstance(source, list):
            found, self.streams[key] = source[:size], source[size:]
            return found if record_class is None or not found else self.made(found[0].keys(), found, record_class)
        name, statement, params = source
        try:
            result = self.run(Plan(f"FETCH FORWARD {int(size)} FROM {name.decode()}", None, 0), ())
            found = self.load(result, 0, result.ntuples, record_class)
        except BaseException:
            self.streams.pop(key, None)
            self.failing = statement, params  # whose values the server may quote
            raise
        if len(found) < size:
            self.close_stream(key)
        return found

    def close_stream(self, key: Any, _params: Any = None, _extra: Any = None) -> None:
        """Stops reading."""
        source = self.streams.pop(key, None)
        if isinstance(source, tuple) and self.began:
            self.prefix.append(
                b"CLOSE " + source[0]
            )  # with whatever comes next; at the latest, the transaction closes it

    # The rest

    def call(self, function: Any, arguments: Any, _extra: Any = None) -> Any:
        """Runs a function of the user's on the raw connection, which it has on loan."""
        if self.readonly or self.restricted:
            self.guard()
            self.prefix.append(
                b"SELECT 1"
            )  # the server lets a transaction turn read-write until it has looked at anything
        self.prefix.append(b"SAVEPOINT run")
        self.send_prefix()
        self.succeeded()
        raw = self.raw
        raw.lend()
        try:
            result = function(raw, *arguments)
        except BaseException as error:
            raw.take_back()
            self._after_a_failed_call(error)
            raise
        raw.take_back()
        self._after_a_call()
        return result

    def _after_a_failed_call(self, error: BaseException) -> None:
        status = self.pg.transaction_status
        ended = status == _IDLE and self.pg.status != _BAD
        if status in (_INTRANS, _INERROR):
            try:
                self.simple([b"ROLLBACK TO SAVEPOINT run"])
                return
            except psycopg.errors.InvalidSavepointSpecification:
                ended = True
            except psycopg.Error:  # the connection is gone, too
                pass
        elif self.pg.status == _BAD:
            mark_outcome(error, "undone")
        self.abandon()
        self.forget()
        if ended:
            if isinstance(error, psycopg.Error):
                raise errors.TransactionError(UNKNOWN) from error
            error.add_note(UNKNOWN)

    def _after_a_call(self) -> None:
        """Is it still the transaction of before? Then the savepoint is there."""
        pg = self.pg
        status = pg.transaction_status
        if pg.status == _BAD:
            self.forget()
            lost = Lost("the connection was lost")
            mark_outcome(lost, "undone")
            raise lost
        if status == _INERROR:
            raise errors.TransactionError(
                "a statement of the function has failed, and it went on: PostgreSQL refuses everything after that, so"
                " nothing of it is kept. Put `with connection.transaction():` around what may fail, or call rollback()"
            )
        if status == _INTRANS:
            try:
                self.simple([b"RELEASE SAVEPOINT run"])
                return
            except psycopg.errors.InvalidSavepointSpecification:
                pass
        self.abandon()
        self.forget()
        if status not in (_IDLE, _INTRANS):
            raise errors.TransactionError(
                "the function has left a COPY, a stream or a pipeline open on the connection; nothing of it is kept"
            )
        raise errors.TransactionError(UNKNOWN)

    def call_aiosql(self, statement: Statement, params: Any, extra: Any) -> Any:
        """Runs a method of aiosql's synchronous adapter on the raw connection."""
        method, record = extra
        try:
            return self._call_aiosql(statement, method, params, record)
        except Exception:
            self.failing = statement, params  # the error names the user's parameters, not ours
            raise

    def _call_aiosql(self, statement: Statement, method: Any, params: Any, record: Any) -> Any:
        plan: Plan = statement.hint
        if method.__name__ == "insert_returning" and not statement.returns_rows:
            return self.execute(statement, params).lastrowid
        if not self.began:
            self.revive()
        self.admit(plan)
        own = self.local is not None and not self.began and not plan.alone
        if own:  # behind a pooler, where what the connection is told holds for a transaction
            self.began = True
            self.begin_with(b"BEGIN")
        if self.began:
            self.save()
        self.send_prefix()
        self.raw.lent = self.raw.vouched = True
        try:
            if record is None:
                result = method(self.raw, "", statement.sql, params)
            else:
                result = method(self.raw, "", statement.sql, params, self._theirs(record[0]))
            if isinstance(result, Iterator):
                result = list(cast("Iterable[Any]", result))
            if own:
                self.commit()
        except BaseException as error:
            self.settle(error)
            if own:
                self.rollback()
            raise
        finally:
            self.raw.lent = self.raw.vouched = False
            if self.stained and not self.began:
                self.put_right()
        self.succeeded()
        return result

    def _theirs(self, record_class: Any) -> Any:
        if record_class is None:
            return None

        def make(**values: Any) -> Any:
            try:
                return record_class(**values)
            except BaseException as error:
                self.theirs = error
                raise

        return make

    def backup(self, _path: Any, _progress: Any, _pages: Any) -> None:
        """Refused: a server is backed up by its own tools."""
        raise errors.QueryExecutionError(
            "backup() copies an SQLite file; a PostgreSQL database is backed up with pg_dump (one database, any version)"
            " or pg_basebackup (the whole server, to a point in time)"
        )

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """See `Connection`."""
        theirs = taken() or (error if error is self.theirs else None)
        if theirs is not None:
            self.theirs = self.failing = None
            return of_statement(theirs, sql, parameters)
        if self.failing is not None:
            sql, parameters = self.failing
            self.failing = None
        statement = sql if isinstance(sql, Statement) else None
        text = statement.sql if statement is not None else sql if isinstance(sql, str) else None
        if not isinstance(error, psycopg.Error):
            if statement is None or isinstance(error, errors.DatabaseError):
                return error
            if isinstance(error, (BindError, UnicodeEncodeError, OverflowError)):
                message = hide(str(error), parameters)
                errors.without_text(error)
                return errors.QueryExecutionError(message, sql=text, parameters=parameters)
            return error
        state = error.sqlstate
        readonly = self.readonly or bool(self.restricted)
        kind = errors.QueryExecutionError if state is None else kind_of(state)
        clean(error, parameters)
        message = hide(message_of(error), parameters)
        outcome = outcome_of(error)
        if outcome is not None or self.lost(error) or is_lost(error):
            mark_broken(error)
            message = f"the connection to the server was lost ({message})"
            if outcome == "undone":
                message += "; COMMIT was not reached, so nothing of the transaction is kept"
            elif outcome == "unknown":
                message += " while COMMIT was under way: whether the transaction is kept is unknown, it may have taken"
                message += " effect or not"
            elif statement is not None and _only_reads(statement):
                outcome = "undone"
                message += "; the statement only reads"
            else:
                outcome = "unknown"
                message += "; a statement that was under way may have taken effect or not"
        elif state == "25006":
            if readonly:
                return read_only(text)
            mark_broken(error)  # it has become a standby
            outcome = "undone"
            message = f"the server takes no writes any more; the next statement looks for one that does ({message})"
        translated = kind(message, sql=text, parameters=parameters, code=state, code_name=code_name(error))
        if outcome is not None:
            translated.outcome = outcome
        return translated


def _only_reads(statement: Statement) -> bool:
    plan: Plan = statement.hint
    return statement.kind == READ and not plan.acts and not plan.calls


def may_join(request: Request) -> bool:
    """Whether a statement is known to be quick, and how it is sent is settled."""
    operation = request.operation
    plan: Plan = request.subject.hint
    seconds = plan.seconds
    if seconds is None or seconds > QUICK_SECONDS or operation not in _JOINABLE or plan.stains or plan.calls:
        return False
    insert = plan.insert
    return insert is None or operation is not Connection.execute or plan.returning is not None or not insert.values


_STEPS: dict[Any, Callable[[Connection, Statement, Any, Any], Steps]] = {
    Connection.execute: Connection.executing,
    Connection.fetch_all: Connection.fetching_all,
    Connection.fetch_one: Connection.fetching_one,
    Connection.fetch_value: Connection.fetching_value,
}

_JOINABLE = frozenset(
    {
        Connection.execute,
        Connection.fetch_all,
        Connection.fetch_one,
        Connection.fetch_value,
    }
)
