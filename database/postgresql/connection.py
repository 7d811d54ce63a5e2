"""One PostgreSQL connection: opened, used and closed on one worker's thread.

psycopg opens the connection, adapts values and knows the errors; what is sent and when it is waited for is decided here,
on libpq's own functions (`psycopg.pq`), for two reasons. The wait can be left: a statement whose caller has gone is
cancelled by this thread, which alone knows what is running. And much can travel together: BEGIN, SAVEPOINT and RELEASE are
never sent by themselves, they wait in `_prefix` and go out with the next statement, in one round trip (libpq's pipeline
mode); autocommit statements of many tasks do likewise (`run_together`).

Failure inside a transaction. PostgreSQL refuses everything after an error until the transaction, or a savepoint, is rolled
back. On SQLite a failed statement undoes only itself, and so it is here: each statement of a transaction has the savepoint
`statement` before it, which costs no round trip of its own. Serialization failures and deadlocks are for the whole
transaction: it is rolled back at once, so that its locks are free, and the caller's `retries` run it again.

A connection that died while nobody used it (a restarted server, a failover) is noticed before the next statement is
sent, and made again. One that dies under a statement raises, for nobody can know what became of that.

Facts this rests on (postgresql.org/docs/current): protocol-flow.html (pipelining, one error skips to the next Sync);
sql-set-transaction.html (a transaction may turn read-only at any time, never back, except by the end of the savepoint in
which it did); sql-begin.html; libpq-cancel.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.json import JsonbDumper

from database import errors
from database.driver.request import Request
from database.engine.statement import CONTROL, OTHER, READ, Result, Statement
from database.postgresql import analysis
from database.postgresql.analysis import Plan
from database.postgresql.failures import (
    AGAIN,
    MISTYPED,
    Lost,
    clean,
    code_name,
    control_error,
    is_lost,
    kind_of,
    made_from,
    mark_alone,
    mark_broken,
    message_of,
    read_only,
)
from database.postgresql.values import BindError, bind, coercion, row_class
from database.settings import PostgresqlSettings

__all__ = ["Connection", "PostgresqlSession", "may_join"]

TICK = 1
"""Milliseconds between two calls of the progress handler, at the beginning of a wait."""

TICKS = 10
"""Ticks after which there is nothing more to be told to the handler; then the wait is for the socket alone."""

FAREWELL = 10
"""Milliseconds for which a server that has said something unasked is given to close the connection."""

RECANCEL = 40
"""Milliseconds after which a cancellation that had no effect is sent again."""

CANCEL_SECONDS = 5.0
"""How long a cancellation may take to reach the server; then the connection is given up."""

PREPARED = 256
"""Statements that are kept prepared on the server, for each connection."""

MANY = 500
"""Rows of `execute_many` that are sent before the answers are looked at."""

COPY_FROM = 200
"""Rows from which `execute_many` of a plain INSERT is done by COPY."""

QUICK_SECONDS = 0.002
"""A statement that takes longer than this is not sent together with others."""

ENDLESS = 60.0
"""Seconds that are assumed for a statement that had to be stopped after its first row."""

STEPS = 256
"""Rows between two looks at whether the caller is still there."""

_OK = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY})
_FATAL = pq.ExecStatus.FATAL_ERROR
_ABORTED = pq.ExecStatus.PIPELINE_ABORTED
_SYNC = pq.ExecStatus.PIPELINE_SYNC
_CHUNK = pq.ExecStatus.TUPLES_CHUNK
_IDLE = pq.TransactionStatus.IDLE
_INERROR = pq.TransactionStatus.INERROR
_BAD = pq.ConnStatus.BAD
_AUTO = PyFormat.AUTO

_SAVE = b"SAVEPOINT statement"
_RELEASE = b"RELEASE SAVEPOINT statement"
_UNDO = b"ROLLBACK TO SAVEPOINT statement"


class _Cursor(psycopg.RawCursor[Any]):
    """The cursor of the raw connection: takes the placeholders that the rest of the package takes."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """As psycopg's, with `:name` and `?` too. BEGIN, COMMIT and the like are the package's own business."""
        if not isinstance(query, str):
            return super().execute(query, params, **options)
        statement = _known(query)
        if statement is None:  # several statements
            return super().execute(cast("Any", query), params, **options)
        if statement.kind == CONTROL:
            raise control_error(statement.verb)
        plan: Plan = statement.hint
        values = list(bind(plan, params)) if plan.count else None
        return super().execute(cast("Any", plan.sql), values, **options)

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        """As psycopg's, with `:name` and `?` too."""
        plan = analysis.plan_of(query) if isinstance(query, str) else None
        if plan is None:
            super().executemany(cast("Any", query), params_seq, **options)
        else:
            super().executemany(cast("Any", plan.sql), [list(bind(plan, each)) for each in params_seq], **options)


def _known(query: str) -> Statement | None:
    try:
        return analysis.analyse(query)
    except errors.QueryExecutionError:
        if any(analysis.analyse(text).kind == CONTROL for text in analysis.split(query)):
            raise
        return None


class Connection(psycopg.Connection[Any]):
    """psycopg's connection, whose waits the worker can leave."""

    session: PostgresqlSession | None = None

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Drives one of psycopg's generators as the session drives its own statements."""
        session = self.session
        if session is None or timeout is not None:
            return super().wait(gen, interval, timeout)
        return session.drive(gen)

    def commit(self) -> None:
        """Refused: the package has a transaction open around this code."""
        raise control_error("COMMIT")

    def rollback(self) -> None:
        """Refused: the package has a transaction open around this code."""
        raise control_error("ROLLBACK")


def _rows(cursor: Any) -> Callable[[Sequence[Any]], Any]:
    description = cursor.description
    return row_class(tuple(column.name for column in description) if description else ())


class PostgresqlSession:
    """See `database.engine.contract.Session`."""

    __slots__ = (
        "_began",
        "_beginning",
        "_cancelled",
        "_failing",
        "_fresh",
        "_impatient",
        "_names",
        "_oids",
        "_open",
        "_pg",
        "_poll",
        "_prefix",
        "_prepared",
        "_progress",
        "_readonly",
        "_restricted",
        "_saved",
        "_settings",
        "_stopped",
        "_streams",
        "_ticks",
        "_transformer",
        "_waker",
        "_woken",
        "raw",
    )

    def __init__(
        self, connect: Callable[[], Connection], settings: PostgresqlSettings, progress: Callable[[], bool]
    ) -> None:
        self._open = connect
        self._settings = settings
        self._progress = progress
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._failing: tuple[Statement, Any] | None = None
        """What has just failed, where the request does not say it: a write of a batch, a query called in aiosql's way."""
        self._ticks = 0
        self._cancelled = 0.0
        """When a cancellation was sent last; 0 if none was."""
        self._stopped = False
        self._impatient = False
        """Whether others wait behind the statement that runs, on this very connection."""
        self._names = 0
        try:
            self._adopt(connect())
        except BaseException:
            self._woken.close()
            self._waker.close()
            raise

    def _adopt(self, raw: Connection) -> None:
        raw.session = self
        raw.row_factory = cast("Any", _rows)
        raw.cursor_factory = cast("Any", _Cursor)
        raw.adapters.register_dumper(dict, JsonbDumper)
        self.raw = raw
        self._pg = raw.pgconn
        self._transformer = Transformer(raw)
        self._poll = _Poll(self._pg.socket, self._woken.fileno())
        self._prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._forget()

    def _forget(self) -> None:
        """No transaction is open."""
        self._began = False
        self._beginning: bytes | None = None
        """The BEGIN of a transaction in which nothing has succeeded yet: until then, beginning anew undoes a failure."""
        self._readonly = False
        self._restricted = 0
        self._saved = False
        """Whether the savepoint `statement` is set, or will be by `_prefix`."""
        self._fresh = False
        """Whether nothing has been executed since it was set."""
        self._prefix: list[bytes] = []
        self._streams: dict[Any, list[Any] | bytes] = {}

    # Waiting

    def _wait(self, *, writing: bool = False) -> None:
        """Waits until the socket is ready; sends a cancellation meanwhile, if the caller has gone."""
        poll = self._poll
        while True:
            pause = TICK if self._ticks < TICKS else RECANCEL if self._cancelled else None
            ready, woken = poll.wait(pause, writing=writing)
            if woken:
                with contextlib.suppress(BlockingIOError):
                    while self._woken.recv(64):
                        pass
            elif ready:
                return
            self._ticks += 1
            if self._progress() or (self._impatient and self._ticks >= TICKS - 2):
                self._cancel()
            if ready:
                return

    def _cancel(self) -> None:
        """Sends a cancellation; again after a while, for one that arrives between two statements is ignored."""
        now = time.monotonic()
        if self._cancelled and now - self._cancelled < RECANCEL / 1000:
            return
        self._cancelled = now
        try:
            self.raw.cancel_safe(timeout=CANCEL_SECONDS)
        except Exception:  # it cannot be reached: then this connection is of no use either
            self._pg.finish()
            raise Lost("the statement could not be cancelled, so its connection was closed") from None

    def _begin_wait(self) -> None:
        self._ticks = 0
        self._cancelled = 0.0

    def _flush(self) -> None:
        pg = self._pg
        while pg.flush():
            self._wait(writing=True)
            pg.consume_input()

    def _result(self) -> pq.abc.PGresult | None:
        pg = self._pg
        while pg.is_busy():
            self._wait()
            pg.consume_input()
        return pg.get_result()

    def drive(self, generator: Any) -> Any:
        """Drives a generator of psycopg's."""
        self._begin_wait()
        try:
            state = next(generator)
            while True:
                if state & 1:  # wants to read, and perhaps to write
                    self._wait(writing=bool(state & 2))
                else:
                    self._wait(writing=True)
                state = generator.send(state)
        except StopIteration as stop:
            return stop.value

    def _lost(self, error: BaseException) -> bool:
        return self.raw.closed or self._pg.status == _BAD or isinstance(error, Lost)

    def _revive(self) -> None:
        """Before the first statement after a pause: is the server still there?

        A server that goes says so first and closes second, so behind anything unasked the end is looked for.
        """
        if self._pg.status != _BAD:
            if not self._poll.readable():
                return
            with contextlib.suppress(psycopg.Error):
                while self._poll.readable(FAREWELL):
                    self._pg.consume_input()
                if self._pg.status != _BAD:
                    return
        with contextlib.suppress(Exception):
            self.raw.session = None
            self.raw.close()
        self._adopt(self._open())

    # Transactions

    @property
    def in_transaction(self) -> bool:
        """See `Session`."""
        return self._began

    def try_lock(self, seconds: float) -> bool:
        """See `Session`. There is nothing to take: the server has locks of its own."""
        return True

    def unlock(self) -> None:
        """See `Session`."""

    def begin(self, *, readonly: bool) -> None:
        """See `Session`. Sent with the first statement; only a dead connection is noticed here."""
        self._revive()
        self._began = True
        self._readonly = readonly
        # Only REPEATABLE READ gives one snapshot for all statements; a read-only transaction never fails for it.
        isolation = self._settings.isolation
        if readonly and isolation == "READ COMMITTED":
            isolation = "REPEATABLE READ"
        self._begin_with(_begin(isolation, readonly=readonly))

    def isolation(self, level: str) -> None:
        """Sets the isolation of the transaction that is about to begin."""
        if not self._prefix or not self._prefix[0].startswith(b"BEGIN"):
            raise errors.TransactionError("the isolation can only be chosen before the transaction's first statement")
        if self._readonly and level == "READ COMMITTED":
            level = "REPEATABLE READ"
        self._begin_with(_begin(level, readonly=self._readonly))

    def _begin_with(self, beginning: bytes) -> None:
        self._prefix = [beginning, *self._prefix[1:]]
        self._beginning = beginning if self._settings.statement_rollback else None

    def commit(self) -> None:
        """See `Session`."""
        prefix = self._prefix
        if prefix and prefix[0].startswith(b"BEGIN"):  # nothing has been executed
            self._forget()
            return
        try:
            result = self._simple([*prefix, b"COMMIT"])
        finally:
            if self._pg.transaction_status == _IDLE or self._pg.status == _BAD:
                self._forget()
        if result.command_status == b"ROLLBACK":
            raise errors.TransactionError("the server has rolled the transaction back; nothing of it is kept")

    def rollback(self) -> None:
        """See `Session`."""
        self._forget()
        if self._pg.status != _BAD and self._pg.transaction_status != _IDLE:
            self._simple([b"ROLLBACK"])

    def _drop_saved(self) -> None:
        """Levels nest like brackets, so the savepoint of the last statement goes before one is opened or closed."""
        if self._saved:
            if self._prefix[-1:] == [_SAVE]:
                self._prefix.pop()
            else:
                self._prefix.append(_RELEASE)
            self._saved = self._fresh = False

    def savepoint(self, number: int) -> None:
        """See `Session`."""
        self._drop_saved()
        self._prefix.append(b"SAVEPOINT level_%d" % number)

    def release(self, number: int) -> None:
        """See `Session`."""
        self._drop_saved()
        if self._prefix[-1:] == [b"SAVEPOINT level_%d" % number]:
            self._prefix.pop()
        else:
            self._prefix.append(b"RELEASE SAVEPOINT level_%d" % number)

    def undo(self, number: int) -> None:
        """See `Session`."""
        opening = b"SAVEPOINT level_%d" % number
        if opening in self._prefix:
            del self._prefix[self._prefix.index(opening) :]
        else:  # whatever waits has happened inside the level
            self._prefix = [b"ROLLBACK TO SAVEPOINT level_%d" % number, b"RELEASE SAVEPOINT level_%d" % number]
        self._saved = self._fresh = False

    def restrict(self, readonly: bool) -> None:
        """See `Session`. A savepoint bounds it: at its end the transaction may write again."""
        self._drop_saved()
        if readonly:
            self._restricted += 1
            self._prefix += [b"SAVEPOINT restricted", b"SET TRANSACTION READ ONLY"]
        else:
            self._restricted = max(self._restricted - 1, 0)
            if b"SAVEPOINT restricted" in self._prefix:
                del self._prefix[self._prefix.index(b"SAVEPOINT restricted") :]
            else:
                # Not RELEASE: that would fail, had the last statement failed.
                self._prefix = [b"ROLLBACK TO SAVEPOINT restricted", b"RELEASE SAVEPOINT restricted"]

    def _save(self) -> None:
        """Before a statement of a transaction: whatever comes of it, the transaction goes on."""
        if not self._settings.statement_rollback or self._fresh:
            return
        if self._beginning is not None and self._prefix and self._prefix[-1] == self._beginning:
            return
        self._beginning = None
        if self._saved:
            self._prefix.append(_RELEASE)
        self._prefix.append(_SAVE)
        self._saved = self._fresh = True

    def _succeeded(self) -> None:
        """Something has been executed that a failure of what comes must not undo."""
        self._fresh = False
        self._beginning = None

    def _settle(self, error: BaseException) -> None:
        """After an error: makes the connection fit for what comes, without sending anything where that can wait."""
        if not self._began:
            return
        if self._pg.status == _BAD:
            self._forget()
            return
        status = self._pg.transaction_status
        if status == _INERROR:
            if str(getattr(error, "sqlstate", "")).startswith("40"):  # "transaction rollback", by the standard
                self.rollback()
            elif self._beginning is not None:
                self._prefix = [b"ROLLBACK", self._beginning]
            elif not self._saved:
                self.rollback()
            else:
                self._prefix = [_UNDO]
                self._fresh = True
        elif status == _IDLE and not (self._prefix and self._prefix[0].startswith(b"BEGIN")):
            self._forget()

    # Sending

    def _simple(self, parts: list[bytes]) -> pq.abc.PGresult:
        """Sends statements without parameters in one text; gives the last one's result."""
        self._begin_wait()
        self._prefix = []
        pg = self._pg
        pg.send_query(b";".join(parts))
        self._flush()
        last: pq.abc.PGresult | None = None
        failed: pq.abc.PGresult | None = None
        while (result := self._result()) is not None:
            last = result
            if result.status == _FATAL:
                failed = result
        if failed is not None:
            raise made_from(failed)
        assert last is not None
        return last

    def send_prefix(self) -> None:
        """Sends what waits, before psycopg's own functions are used."""
        if self._prefix:
            parts = self._prefix
            try:
                self._simple(parts)
            except BaseException:
                if self._pg.status != _BAD:
                    self.rollback()
                raise

    def _dump(self, values: Sequence[Any]) -> tuple[Any, tuple[int, ...], Any]:
        if not values:
            return None, (), None
        transformer = self._transformer
        payload = transformer.dump_sequence(values, [_AUTO] * len(values))
        return payload, transformer.types or (), transformer.formats

    def _run(self, plan: Plan, params: Any, sql: str | None = None, *, first: bool = False) -> pq.abc.PGresult:
        """Executes a statement, in the open transaction or by itself.

        Args:
            plan: The statement's plan.
            params: Its parameters, as the caller gave them.
            sql: Another text than the plan's, with the same parameters.
            first: Whether only the first row is wanted; then the rest need not be computed.
        """
        values = bind(plan, params)
        if self._began:
            self._save()
        else:
            self._revive()
        text = plan.sql if sql is None else sql
        types = tuple(map(type, values))
        started = time.perf_counter()
        known = plan.coercions.get(types)
        try:
            result = self._round_trip(text, values if known is None else _coerced(values, known), plan, first=first)
        except psycopg.Error as error:
            if not self._began:
                mark_alone(error)
            self._settle(error)
            if not self._may_try_again(error, plan, text, types, known):
                raise
            known = plan.coercions.get(types)
            if self._began:
                self._save()
            try:
                result = self._round_trip(text, values if known is None else _coerced(values, known), plan, first=first)
            except BaseException as again:
                self._settle(again)
                raise
        except BaseException as error:
            self._settle(error)
            raise
        if self._stopped:
            self._stopped = False
            plan.took(ENDLESS)
            self._settle(psycopg.errors.QueryCanceled())
        else:
            plan.took(time.perf_counter() - started)
            self._succeeded()
        return result

    def _may_try_again(self, error: psycopg.Error, plan: Plan, text: str, types: tuple[type, ...], known: Any) -> bool:
        """Whether an error is one of preparing, not of executing, and can be helped."""
        state = error.sqlstate
        if self._lost(error) or (self._began and not self._prefix):
            return False
        if state == "0A000" and "cached plan" in str(error):  # the table has another shape since it was prepared
            self._unprepare(text)
            return True
        if state not in MISTYPED or not types or known is not None:
            return False
        wanted = self._wanted_types(text)
        if wanted is None:
            return False
        plan.coercions[types] = tuple(map(coercion, wanted))
        return True

    def _wanted_types(self, text: str) -> list[int] | None:
        """The types that the server wants for a statement's parameters, had they none of their own."""
        try:
            self.send_prefix()
            self._begin_wait()
            pg = self._pg
            pg.send_prepare(b"", text.encode())
            self._flush()
            if not self._fine():
                raise psycopg.ProgrammingError
            pg.send_describe_prepared(b"")
            self._flush()
            result = self._result()
            while self._result() is not None:
                pass
            if result is None or result.status == _FATAL:
                raise psycopg.ProgrammingError
            return [result.param_type(number) for number in range(result.nparams)]
        except psycopg.Error as error:
            self._fresh = False
            self._settle(error)
            return None

    def _fine(self) -> bool:
        fine = True
        while (result := self._result()) is not None:
            fine = fine and result.status != _FATAL
        return fine

    def _unprepare(self, text: str) -> None:
        for key in [key for key in self._prepared if key[0] == text]:
            del self._prepared[key]  # the name on the server is not used again

    def _name(self, text: str, types: tuple[int, ...], plan: Plan) -> tuple[bytes | None, bool]:
        """The name under which a statement is prepared, and whether it still has to be."""
        threshold = self._settings.prepare_threshold
        plan.uses += 1
        if not threshold or plan.uses < threshold:
            return None, False
        key = (text, types)
        name = self._prepared.get(key)
        if name is not None:
            return name, False
        self._names += 1
        name = b"_db_%d" % self._names
        if len(self._prepared) >= PREPARED:
            oldest = next(iter(self._prepared))
            gone = self._prepared.pop(oldest)
            self._prefix.append(b"DEALLOCATE " + gone)
        return name, True

    def _send(self, text: str, payload: Any, types: tuple[int, ...], formats: Any, name: bytes | None) -> None:
        pg = self._pg
        if name is None:
            pg.send_query_params(text.encode(), payload, param_types=types, param_formats=formats)
        else:
            pg.send_query_prepared(name, payload, param_formats=formats)

    def _round_trip(self, text: str, values: Sequence[Any], plan: Plan, *, first: bool = False) -> pq.abc.PGresult:
        payload, types, formats = self._dump(values)
        name, new = self._name(text, types, plan)
        prefix, self._prefix = self._prefix, []
        pg = self._pg
        self._begin_wait()
        if not prefix and not new and not first:
            self._send(text, payload, types, formats, name)
            self._flush()
            result = self._collect(first=False)
            if result.status == _FATAL:
                raise made_from(result)
            return result
        # Also where only the first row is wanted: libpq forgets by itself that rows were to come in chunks, but only from
        # one statement of a pipeline to the next.
        pg.enter_pipeline_mode()
        for part in prefix:
            pg.send_query_params(part, None)
        if new and name is not None:
            pg.send_prepare(name, text.encode(), types)
        self._send(text, payload, types, formats, name)
        pg.pipeline_sync()
        self._flush()
        failed: pq.abc.PGresult | None = None
        for number in range(len(prefix) + new):
            answer = self._result()
            if answer is not None:
                if answer.status == _FATAL:
                    failed = answer
                    if number < len(prefix):
                        self._saved = False  # what was to make the connection fit has failed: only a rollback is left
                self._result()  # the None between two
        result = self._collect(first=first)
        if result.status == _FATAL:
            failed = failed or result
        failed = self._leave_pipeline() or failed
        if failed is not None:
            raise made_from(failed)
        if new and name is not None:
            self._prepared[text, types] = name
        return result

    def _leave_pipeline(self) -> pq.abc.PGresult | None:
        """Waits for the end of a pipeline; gives an error that came no sooner: a constraint checked at the commit."""
        failed: pq.abc.PGresult | None = None
        while (answer := self._result()) is None or answer.status != _SYNC:
            if answer is not None and answer.status == _FATAL:
                failed = answer
        self._pg.exit_pipeline_mode()
        return failed

    def _collect(self, *, first: bool) -> pq.abc.PGresult:
        """The result of the statement that is at hand."""
        if not first:
            result = self._result()
            assert result is not None
            while (more := self._result()) is not None:
                result = more
            return result
        self._pg.set_chunked_rows_mode(2)
        result = self._result()
        assert result is not None
        if result.status != _CHUNK:
            while self._result() is not None:
                pass
            return result
        chunks = 0
        while (more := self._result()) is not None:
            chunks += 1
            if more.status == _FATAL:
                if not self._cancelled or chunks < 32:
                    return more
                self._stopped = True  # by us, for its first row was all that was wanted
            elif chunks == 32:
                self._cancel()
        return result

    # Several statements of several callers, sent together

    def run_together(
        self,
        requests: list[Request],
        begin: Callable[[Request], None],
        end: Callable[[Request, BaseException | None], None],
    ) -> list[Request]:
        """See `Backend.run_together`. A Sync behind each statement makes it a transaction of its own.

        Should one turn out to be slow, or wait for a lock, it is cancelled, so that it holds nobody else's answer back, and
        given back to be run alone; so is one that such a cancellation, or somebody else's, has hit by mistake.
        """
        self._revive()
        pg = self._pg
        sent: list[tuple[Request, tuple[str, tuple[int, ...]] | None]] = []
        again: list[Request] = []
        pg.enter_pipeline_mode()
        for request in requests:
            try:
                plan: Plan = request.sql.hint
                values = bind(plan, request.params)
                values = _coerced(values, plan.coercions.get(tuple(map(type, values))))
                payload, types, formats = self._dump(values)
            except Exception as unfit:
                begin(request)
                end(request, unfit)
                continue
            text = plan.returning if request.operation is PostgresqlSession.execute and plan.returning else plan.sql
            name, new = self._name(text, types, plan)
            for part in self._prefix:
                pg.send_query_params(part, None)
            self._prefix.clear()
            if new and name is not None:
                pg.send_prepare(name, text.encode(), types)
                self._prepared[text, types] = name
            self._send(text, payload, types, formats, name)
            pg.pipeline_sync()
            sent.append((request, (text, types) if new else None))
        position = 0
        try:
            self._begin_wait()
            self._flush()
            for position, (request, prepared) in enumerate(sent):
                begin(request)
                self._begin_wait()
                self._impatient = position + 1 < len(sent)
                started = time.perf_counter()
                result, failed = self._until_sync()
                request.sql.hint.took(time.perf_counter() - started)
                if failed is None and result is not None:
                    end(request, self._deliver(request, result))
                    continue
                if prepared is not None:
                    self._prepared.pop(prepared, None)
                error = psycopg.OperationalError("no answer") if failed is None else made_from(failed)
                if (error.sqlstate == "57014" and not request.cancelled) or self._is_to_be_run_alone(error):
                    again.append(request)
                else:
                    end(request, error)
            pg.exit_pipeline_mode()
        except psycopg.Error as error:
            if not self._lost(error):
                raise
            for request, _ in sent[position:]:  # who knows which of them the server has got to
                if request.sql.kind == READ:
                    again.append(request)
                else:
                    lost = Lost(str(error).strip())
                    begin(request)
                    # In the package's words already: the connection is noticed to be dead before its next use, not here.
                    translated = self.translate(lost, request.sql, request.params)
                    translated.__cause__ = lost
                    end(request, translated)
        finally:
            self._impatient = False
        return again

    def _until_sync(self) -> tuple[pq.abc.PGresult | None, pq.abc.PGresult | None]:
        """The result of one statement of a pipeline, or its failure."""
        result: pq.abc.PGresult | None = None
        failed: pq.abc.PGresult | None = None
        while True:
            answer = self._result()
            if answer is None:
                continue
            status = answer.status
            if status == _SYNC:
                return result, failed
            if status == _FATAL:
                failed = failed or answer
            elif status in _OK:
                result = answer

    def _deliver(self, request: Request, result: pq.abc.PGresult) -> BaseException | None:
        """Makes the request's result of the server's."""
        try:
            operation = request.operation
            if operation is PostgresqlSession.fetch_all:
                request.result = self._load(result, 0, result.ntuples, request.extra)
            elif operation is PostgresqlSession.fetch_one:
                rows = self._load(result, 0, min(result.ntuples, 1), request.extra)
                request.result = rows[0] if rows else None
            elif operation is PostgresqlSession.fetch_value:
                request.result = self._value(result, request.extra)
            else:
                request.result = _done(request.sql, result, self._transformer)
        except BaseException as error:  # a record class that refuses its columns
            return error
        return None

    @staticmethod
    def _is_to_be_run_alone(error: psycopg.Error) -> bool:
        return (
            error.sqlstate in MISTYPED
            or error.sqlstate in AGAIN
            or (error.sqlstate == "0A000" and "cached plan" in str(error))
        )

    # Statements. All take (statement, parameters, extra) and run on the worker's thread.

    def execute(self, statement: Statement, params: Any, _extra: Any = None) -> Result:
        """Runs a statement for what it does."""
        plan: Plan = statement.hint
        insert = plan.insert
        if insert is None or statement.returns_rows or not insert.values or not self._settings.lastrowid:
            return _done(statement, self._run(plan, params), self._transformer)
        sql = self._with_returning(statement, plan)
        if not sql:
            return _done(statement, self._run(plan, params), self._transformer)
        try:
            return _done(statement, self._run(plan, params, sql), self._transformer)
        except psycopg.errors.UndefinedColumn:  # the table was made anew, with another key
            plan.returning = None
            if self._began and not self._saved:
                raise
            return _done(
                statement, self._run(plan, params, self._with_returning(statement, plan) or None), self._transformer
            )

    def _with_returning(self, statement: Statement, plan: Plan) -> str:
        """The statement's text with a RETURNING clause for its table's generated key; `""` if there is none."""
        if plan.returning is None:
            insert = plan.insert
            assert insert is not None
            found = self._run(_KEY, (insert.table,))
            if found.ntuples == 0:
                return ""  # no such table, yet
            column = (found.get_value(0, 0) or b"").decode()
            if not column:
                plan.returning = ""
            else:
                marked = f"{statement.sql[: insert.end]} RETURNING {column}"
                if insert.upsert:
                    marked += ", xmax = 0"  # an updated row has been locked by this very transaction
                plan.returning = analysis.analyse(marked + statement.sql[insert.end :]).hint.sql
        return plan.returning or ""

    def execute_many(self, statement: Statement, rows: Any, _extra: Any = None) -> Result:
        """Runs a statement once for every row of parameters: by COPY where that is the same, else in a pipeline."""
        plan: Plan = statement.hint
        source = iter(rows)
        head: list[Any] = []
        for row in source:
            head.append(bind(plan, row))
            if len(head) >= COPY_FROM:
                break
        if not head:
            return Result(0, None)
        if self._began:
            self._save()
        self.send_prefix()
        try:
            wanted = self._wanted_types(plan.sql) or []
            convert = tuple(map(coercion, wanted))
            rest = self._bound(plan, source)
            if len(head) >= COPY_FROM and plan.insert is not None and plan.insert.columns is not None and wanted:
                count = self._copy(plan.insert.table, plan.insert.columns, wanted, convert, head, rest)
            else:
                count = self._pipeline(plan.sql, wanted, convert, head, rest)
        except psycopg.Error as error:
            self._settle(error)
            raise clean(error) from None
        except BaseException as error:
            self._settle(error)
            raise
        self._succeeded()
        return Result(count, None)

    def _bound(self, plan: Plan, source: Iterator[Any]) -> Iterator[Sequence[Any]]:
        for number, row in enumerate(source):
            if number % STEPS == 0 and self._progress():
                raise psycopg.errors.QueryCanceled("the caller has gone")
            yield bind(plan, row)

    def _copy(
        self,
        table: str,
        columns: str,
        wanted: list[int],
        convert: tuple[Any, ...],
        head: list[Any],
        rest: Iterable[Any],
    ) -> int:
        # The names are the statement's own text, which the analysis has found to be names and nothing else.
        with psycopg.RawCursor(self.raw) as cursor:
            with cursor.copy(cast("Any", f"COPY {table} ({columns}) FROM STDIN")) as copy:
                for values in head:
                    copy.write_row(_for_copy(values, convert))
                for values in rest:
                    copy.write_row(_for_copy(values, convert))
            return max(cursor.rowcount, 0)

    def _pipeline(
        self, sql: str, wanted: list[int], convert: tuple[Any, ...], head: list[Any], rest: Iterable[Any]
    ) -> int:
        pg = self._pg
        pg.enter_pipeline_mode()
        total = 0
        failed: pq.abc.PGresult | None = None
        broken: BaseException | None = None
        pending: list[Any] = list(head)
        source = iter(rest)
        text = sql.encode()
        sent_name: tuple[int, ...] | None = None
        while pending and failed is None and broken is None:
            sent = 0
            self._begin_wait()
            try:
                for values in pending:
                    payload, types, formats = self._dump(_coerced(values, convert) if wanted else values)
                    if types != sent_name:
                        pg.send_prepare(b"", text, types)
                        sent += 1
                        sent_name = types
                    pg.send_query_prepared(b"", payload, param_formats=formats)
                    sent += 1
                pending = []
                for values in source:
                    pending.append(values)
                    if len(pending) >= MANY:
                        break
            except Exception as error:  # of the rows' own making: what was sent is undone by the caller
                broken = error
            pg.pipeline_sync() if not pending or broken else pg.send_flush_request()
            self._flush()
            for _ in range(sent):
                answer = self._result()
                if answer is None:
                    continue
                if answer.status == _FATAL:
                    failed = failed or answer
                elif answer.status in _OK and answer.command_tuples is not None:
                    total += answer.command_tuples
                self._result()
        if failed is not None and pending:
            pg.pipeline_sync()
            self._flush()
        failed = self._leave_pipeline() or failed
        if broken is not None:
            raise broken
        if failed is not None:
            raise made_from(failed)
        return total

    def execute_batch(self, items: Any, _params: Any = None, _extra: Any = None) -> int:
        """Runs (statement, parameters) pairs; gives how many."""
        pg = self._pg
        bound: list[tuple[Statement, Any, Sequence[Any]]] = []
        for number, (statement, params) in enumerate(items):
            try:
                plan: Plan = statement.hint
                values = bind(plan, params)
                kinds = tuple(map(type, values))
                if kinds not in plan.coercions and values:
                    wanted = self._wanted_types(plan.sql)
                    plan.coercions[kinds] = tuple(map(coercion, wanted)) if wanted else (None,) * len(values)
                bound.append((statement, params, _coerced(values, plan.coercions.get(kinds))))
            except Exception as error:
                self._failing = statement, params
                error.add_note(f"this was write {number + 1} of the {len(items)} that a batch sent together")
                raise
        if self._began:
            self._save()
        prefix, self._prefix = self._prefix, []
        failed: tuple[int, pq.abc.PGresult] | None = None
        self._begin_wait()
        pg.enter_pipeline_mode()
        for part in prefix:
            pg.send_query_params(part, None)
        for start in range(0, len(bound), MANY):
            group = bound[start : start + MANY]
            for statement, _params, values in group:
                payload, types, formats = self._dump(values)
                plan = statement.hint
                name = self._prepared.get((plan.sql, types))
                self._send(plan.sql, payload, types, formats, name)
            last = start + MANY >= len(bound)
            pg.pipeline_sync() if last else pg.send_flush_request()
            self._flush()
            for number in range(-len(prefix) if start == 0 else 0, len(group)):
                answer = self._result()
                if answer is None:
                    continue
                if answer.status == _FATAL and failed is None:
                    failed = start + max(number, 0), answer
                self._result()
        late = self._leave_pipeline()
        if late is not None and failed is None:
            failed = len(bound) - 1, late
        if failed is not None:
            number, answer = failed
            refusal = made_from(answer)
            self._failing = bound[number][0], bound[number][1]
            refusal.add_note(f"this was write {number + 1} of the {len(items)} that a batch sent together")
            self._settle(refusal)
            raise refusal
        self._succeeded()
        return len(items)

    def execute_script(self, sql: Any, _params: Any = None, _extra: Any = None) -> None:
        """Runs the statements of a script one after the other, without touching the open transaction."""
        for text in analysis.split(sql):
            statement = analysis.analyse(text)
            if statement.kind == CONTROL:
                raise control_error(statement.verb)
            if (self._readonly or self._restricted) and statement.kind != READ and statement.verb != "EXPLAIN":
                raise read_only(text)
            self._run(Plan(text, None, 0), ())

    def fetch_all(self, statement: Statement, params: Any, record_class: Any) -> list[Any]:
        """All rows."""
        result = self._run(statement.hint, params)
        return self._load(result, 0, result.ntuples, record_class)

    def fetch_one(self, statement: Statement, params: Any, record_class: Any) -> Any:
        """The first row, or None."""
        result = self._run(statement.hint, params, first=self._stoppable(statement))
        rows = self._load(result, 0, min(result.ntuples, 1), record_class)
        return rows[0] if rows else None

    def fetch_value(self, statement: Statement, params: Any, default: Any) -> Any:
        """The first column of the first row, or the default."""
        result = self._run(statement.hint, params, first=self._stoppable(statement))
        return self._value(result, default)

    def _value(self, result: pq.abc.PGresult, default: Any) -> Any:
        if result.ntuples == 0:
            return default
        transformer = self._transformer
        transformer.set_pgresult(result)
        return transformer.load_row(0, tuple)[0]

    def _stoppable(self, statement: Statement) -> bool:
        """Whether a statement is stopped after its first row: not if it does anything, or is quick as it is."""
        seconds = statement.hint.seconds
        return (
            statement.kind == READ
            and (seconds is None or seconds > QUICK_SECONDS)
            and (not self._began or self._settings.statement_rollback)
        )

    def _load(self, result: pq.abc.PGresult, start: int, end: int, record_class: Any) -> list[Any]:
        if start == end:
            return []
        transformer = self._transformer
        transformer.set_pgresult(result)
        names = tuple([(result.fname(number) or b"").decode() for number in range(result.nfields)])
        if record_class is None:
            return transformer.load_rows(start, end, row_class(names))
        rows = transformer.load_rows(start, end, tuple)
        return [record_class(**dict(zip(names, row, strict=True))) for row in rows]

    # Streams: a cursor on the server, known by a number

    def open_stream(self, statement: Statement, params: Any, key: Any) -> None:
        """Begins to read. Outside a transaction it gets one of its own, for a cursor needs that."""
        plan: Plan = statement.hint
        if statement.kind != READ:  # a cursor can only be declared for a statement that reads
            result = self._run(plan, params)
            self._streams[key] = self._load(result, 0, result.ntuples, None)
            return
        own = not self._began
        if own:
            self.begin(readonly=True)
        name = b"stream_%d" % key
        try:
            sql = f"DECLARE {name.decode()} NO SCROLL CURSOR FOR {plan.sql.rstrip().rstrip(';')}"
            self._run(plan, params, sql)
        except BaseException:
            if own:
                with contextlib.suppress(psycopg.Error):
                    self.rollback()
            raise
        self._streams[key] = name

    def read_stream(self, key: Any, size: Any, record_class: Any) -> list[Any]:
        """The next rows; fewer than asked for at the end, when the cursor has been closed."""
        source = self._streams.get(key)
        if source is None:
            raise errors.TransactionError("the transaction in which this stream was opened has ended")
        if isinstance(source, list):
            rows, self._streams[key] = source[:size], source[size:]
            return rows if record_class is None else [record_class(**dict(row)) for row in rows]
        try:
            result = self._run(Plan(f"FETCH FORWARD {int(size)} FROM {source.decode()}", None, 0), ())
            rows = self._load(result, 0, result.ntuples, record_class)
        except BaseException:
            self._streams.pop(key, None)
            raise
        if len(rows) < size:
            self.close_stream(key)
        return rows

    def close_stream(self, key: Any, _params: Any = None, _extra: Any = None) -> None:
        """Stops reading."""
        source = self._streams.pop(key, None)
        if isinstance(source, bytes) and self._began:
            self._prefix.append(
                b"CLOSE " + source
            )  # with whatever comes next; at the latest, the transaction closes it

    # The rest

    def call(self, function: Any, arguments: Any, _extra: Any = None) -> Any:
        """Runs a function of the user's on the raw connection."""
        if self._readonly or self._restricted:
            # The server lets a transaction turn read-write until it has looked at anything.
            self._prefix.append(b"SELECT 1")
        self.send_prefix()
        try:
            result = function(self.raw, *arguments)
        finally:
            self.raw.row_factory = cast("Any", _rows)
            if self._pg.status == _BAD or self._pg.transaction_status == _IDLE:
                self._forget()
        self._succeeded()
        return result

    def call_aiosql(self, statement: Statement, params: Any, extra: Any) -> Any:
        """Runs a method of aiosql's synchronous adapter on the raw connection."""
        method, record = extra
        try:
            return self._call_aiosql(statement, method, params, record)
        except Exception:
            self._failing = statement, params  # the error names the user's parameters, not ours
            raise

    def _call_aiosql(self, statement: Statement, method: Any, params: Any, record: Any) -> Any:
        if method.__name__ == "insert_returning" and not statement.returns_rows:
            return self.execute(statement, params).lastrowid
        if self._began:
            self._save()
        else:
            self._revive()
        self.send_prefix()
        try:
            if record is None:
                result = method(self.raw, "", statement.sql, params)
            else:
                result = method(self.raw, "", statement.sql, params, record[0])
                if isinstance(result, Iterator):
                    result = list(cast("Iterable[Any]", result))
        except BaseException as error:
            self._settle(error)
            raise
        self._succeeded()
        return result

    def backup(self, _path: Any, _progress: Any, _pages: Any) -> None:
        """Refused: a server is backed up by its own tools."""
        raise errors.QueryExecutionError(
            "backup() copies an SQLite file; a PostgreSQL database is backed up with pg_dump (one database, any version)"
            " or pg_basebackup (the whole server, to a point in time)"
        )

    def interrupt(self) -> None:
        """See `Session`. Only wakes the thread: it knows what is running, and sends the cancellation."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def close(self) -> None:
        """See `Session`."""
        self.raw.session = None
        try:
            self.raw.close()
        finally:
            self._woken.close()
            self._waker.close()

    def disown(self) -> None:
        """See `Session`. An extra reference, never given back: libpq must not say goodbye in the parent's name."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.raw))

    def share(self, shared: bool) -> None:
        """See `Session`. Here transactions are not shared."""

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """See `Session`."""
        if self._failing is not None:
            sql, parameters = self._failing
            self._failing = None
        statement = sql if isinstance(sql, Statement) else None
        text = statement.sql if statement is not None else sql if isinstance(sql, str) else None
        if not isinstance(error, psycopg.Error):
            if statement is None or isinstance(error, errors.DatabaseError):
                return error
            if isinstance(error, (BindError, UnicodeEncodeError, OverflowError)):
                return errors.QueryExecutionError(str(error), sql=text, parameters=parameters)
            return error
        state = error.sqlstate
        readonly = self._readonly or bool(self._restricted)
        kind = errors.QueryExecutionError if state is None else kind_of(state)
        message = message_of(error)
        if self._lost(error) or is_lost(error):
            mark_broken(error)
            message = (
                f"the connection to the server was lost ({message}); a statement or a COMMIT that was under way may have"
                " taken effect or not"
            )
        elif state == "25006":
            if readonly:
                return read_only(text)
            mark_broken(error)  # it has become a standby
            message = f"the server takes no writes any more; the next statement looks for one that does ({message})"
        return kind(message, sql=text, parameters=parameters, code=state, code_name=code_name(error))


_KEY = Plan(
    "SELECT (SELECT quote_ident(a.attname) FROM pg_catalog.pg_index i JOIN pg_catalog.pg_attribute a"
    " ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] WHERE i.indrelid = c.oid AND i.indisprimary"
    " AND i.indnatts = 1 AND a.atttypid IN (20, 21, 23)) FROM pg_catalog.pg_class c"
    " WHERE c.oid = to_regclass($1::text) AND c.relkind IN ('r', 'p')",
    None,
    1,
)
"""The column that is a table's primary key by itself and a whole number."""


def _begin(isolation: str, *, readonly: bool) -> bytes:
    return f"BEGIN ISOLATION LEVEL {isolation}{' READ ONLY' if readonly else ''}".encode()


def _coerced(values: Sequence[Any], known: Any) -> Sequence[Any]:
    if known is None:
        return values
    return [value if convert is None else convert(value) for value, convert in zip(values, known, strict=True)]


def _for_copy(values: Sequence[Any], convert: tuple[Any, ...]) -> Sequence[Any]:
    return [value if change is None else change(value) for value, change in zip(values, convert, strict=True)]


def _done(statement: Statement, result: pq.abc.PGresult, transformer: Any) -> Result:
    """What a statement did. A row that came back tells the key of what was inserted last."""
    count = result.command_tuples
    if statement.kind == READ or count is None or statement.kind == OTHER:
        return Result(-1, None)
    key: int | None = None
    if statement.verb == "INSERT" and result.ntuples:
        transformer.set_pgresult(result)
        row = transformer.load_row(result.ntuples - 1, tuple)
        inserted = len(row) < 2 or statement.returns_rows or row[1] is True
        key = row[0] if inserted and type(row[0]) is int else None
    return Result(count, key)


def may_join(request: Request) -> bool:
    """Whether a statement is known to be quick, and how it is sent is settled."""
    operation = request.operation
    plan: Plan = request.sql.hint
    seconds = plan.seconds
    if seconds is None or seconds > QUICK_SECONDS or operation not in _JOINABLE:
        return False
    insert = plan.insert
    return (
        insert is None or operation is not PostgresqlSession.execute or plan.returning is not None or not insert.values
    )


_JOINABLE = frozenset(
    {
        PostgresqlSession.execute,
        PostgresqlSession.fetch_all,
        PostgresqlSession.fetch_one,
        PostgresqlSession.fetch_value,
    }
)


class _Poll:
    """Waits for the server's socket and for the word of another thread."""

    __slots__ = ("_poll", "_server", "_woken", "_writing")

    def __init__(self, server: int, woken: int) -> None:
        self._server = server
        self._woken = woken
        self._writing = False
        self._poll: Any = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(server, select.POLLIN)
            self._poll.register(woken, select.POLLIN)

    def wait(self, milliseconds: int | None, *, writing: bool) -> tuple[bool, bool]:
        """Whether the server's socket is ready, and whether another thread has called."""
        if self._poll is None:  # Windows
            sockets, outgoing = [self._server, self._woken], [self._server] if writing else []
            seconds = None if milliseconds is None else milliseconds / 1000
            readable, writable, _ = select.select(sockets, outgoing, [], seconds)
            return self._server in readable or bool(writable), self._woken in readable
        if writing != self._writing:
            self._writing = writing
            self._poll.modify(self._server, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
        ready = woken = False
        for descriptor, _ in self._poll.poll(milliseconds):
            if descriptor == self._server:
                ready = True
            else:
                woken = True
        return ready, woken

    def readable(self, milliseconds: int = 0) -> bool:
        """Whether the server has said something unasked."""
        if self._poll is None:
            return bool(select.select([self._server], [], [], milliseconds / 1000)[0])
        if self._writing:
            self._writing = False
            self._poll.modify(self._server, select.POLLIN)
        return any(descriptor == self._server for descriptor, _ in self._poll.poll(milliseconds))
