"""Logging: one record per statement, with standard `logging`, silent until somebody configures it.

Loggers: `database.query` (statements), `database.pool` (connections, errors of the pool) and `database.transaction`.
Records are made on the worker's thread, after the statement and before its answer is posted, or on a thread of their own:
a slow handler delays the database, but never the event loop.

Attributes of a `database.query` record, for formatters and shippers: `database` (the name), `sql`, `operation` (its
verb, or None where functions and scripts run), `parameters` (redacted unless `logging.parameters` is `shown`), `rows`,
`duration` (seconds), `waited` (seconds in the queue before that; None inside transactions), `slow`, `transaction` (a
number, or None for autocommit), `worker`, `error` (the exception's class, or None). Records of errors have `database`,
`error`, `sql`, `parameters`, `code` and `code_name`; those of `database.transaction` have `transaction`, `outcome`,
`duration`, `holder`, `readonly`, and `waiting` where somebody is kept waiting.

The logger `database` has the level WARNING until somebody sets another, so that an application which turns its own
records on (`basicConfig(level=INFO)`) does not get one for each of its statements.

Nothing that goes wrong here reaches a statement: an exception of a handler, a filter or somebody's `repr()` is printed
to stderr, as `logging.Handler.handleError` does, and forgotten; on a worker's thread also SystemExit and the like, which
would end the worker. Only a Ctrl-C that strikes the main thread meanwhile goes on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable
from threading import current_thread, main_thread
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from database.driver.lease import Lease
from database.driver.observer import Observer
from database.driver.request import Request
from database.engine.statement import Result, Statement
from database.errors import (
    DatabaseError,
    QueryExecutionError,
    ReadOnlyTransactionError,
    TransactionError,
    redact,
    shorten,
)
from database.settings import LoggingSettings

__all__ = ["ConsoleFormatter", "ForwardHandler", "Instrumentation", "LogObserver", "harmless", "set_up"]

_root = logging.getLogger("database")
_root.addHandler(logging.NullHandler())  # else logging's last resort would print warnings nobody asked for
if _root.level == logging.NOTSET:
    _root.setLevel(logging.WARNING)
_query = logging.getLogger("database.query")
_pool = logging.getLogger("database.pool")
_transaction = logging.getLogger("database.transaction")


class Instrumentation(Protocol):
    """Whoever wants to see more than the log; see `database.otel`."""

    def observe(self, name: str, engine: str, description: str, observer: LogObserver) -> Observer:
        """Puts something before the log's observer; called for each pool that is about to be opened."""
        ...

    def opened(self, pool: Any) -> None:
        """Called once the pool is there, on its loop's thread, before anything is sent to it."""
        ...


instrumentation: Instrumentation | None = None
"""Asked whenever a pool is opened."""

_OF_STATEMENTS = (QueryExecutionError, ReadOnlyTransactionError)

P = ParamSpec("P")
S = TypeVar("S")


def harmless(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Keeps what goes wrong in an observer's method away from the statement that it reports."""

    @functools.wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except (
            BaseException
        ) as error:  # of a handler (some end the program), a filter, or the repr() of somebody's object
            if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
                raise  # not theirs
            if logging.raiseExceptions and sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
                with contextlib.suppress(Exception):  # nothing is left to tell it to
                    sys.stderr.write("--- database: an error while logging; the statement is not affected ---\n")
                    traceback.print_exc(file=sys.stderr)

    return guarded


@harmless
def say(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Logs something from a place that must not fail for it."""
    logger.log(level, message, *args)


class ForwardHandler(logging.Handler):
    """Forwards records to a log system: ELK, Loki, Datadog, a message queue.

    Empty on purpose. Fill in `emit`, then `logging.getLogger("database").addHandler(ForwardHandler())`. It runs on a
    worker's thread: put the record into a bounded queue and let a thread of yours do the sending, as
    `docs/examples/forward.py` does, instead of waiting for a network.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one record."""
        # TODO: ship the record, e.g. as JSON: {"@timestamp": record.created, "message": record.getMessage(),
        #       "labels": {"sql": record.sql, "duration": record.duration, "rows": record.rows, ...}}


class ConsoleFormatter(logging.Formatter):
    """A readable line per statement: time, level, duration, rows, SQL, parameters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")


class _ConsoleHandler(logging.StreamHandler[Any]):
    """The handler that `logging.console: true` adds; one for the process."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(ConsoleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the record, unless a handler of the application's own prints it on the console as well."""
        if not _printed_by_others(self, record):
            super().emit(record)


def _printed_by_others(handler: logging.Handler, record: logging.LogRecord) -> bool:
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        for other in logger.handlers:
            if other is not handler and record.levelno >= other.level and _is_console(other):
                return True
        logger = logger.parent if logger.propagate else None
    return False


def _is_console(handler: logging.Handler) -> bool:
    """Whether it writes to stderr or stdout: a StreamHandler, or one like rich's, which has a console with a file."""
    stream: Any = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    return stream is not None and stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)


_levels: tuple[int, int] | None = None
"""The level of `database` before the console handler came, and the one that it has set."""


def set_up(settings: LoggingSettings) -> None:
    """Applies `logging:` of the configuration: adds the console handler, once, and sets its level."""
    global _levels  # noqa: PLW0603  - there is one logger `database` in a process
    if not settings.console:
        return
    level = logging.getLevelNamesMapping()[settings.level]
    handler = next((each for each in _root.handlers if isinstance(each, _ConsoleHandler)), None)
    if handler is None:
        handler = _ConsoleHandler()
        _root.addHandler(handler)
    handler.setLevel(level)
    if _root.level == logging.NOTSET or _root.level > level:
        _levels = _root.level if _levels is None else _levels[0], level
        _root.setLevel(level)


def tear_down() -> None:
    """Takes the console handler away again."""
    global _levels  # noqa: PLW0603
    for handler in tuple(_root.handlers):
        if isinstance(handler, _ConsoleHandler):
            _root.removeHandler(handler)
    if _levels is not None:
        before, ours = _levels
        _levels = None
        if _root.level == ours:  # nobody has set another one since
            _root.setLevel(before)


class LogObserver:
    """Reports one database's statements, transactions and errors. See `database.engine.contract.Observer`."""

    __slots__ = ("_name", "_pins", "_settings", "_slow", "slow_transaction")

    def __init__(self, name: str, settings: LoggingSettings, pins: str) -> None:
        self._name = name
        self._pins = pins
        self._settings = settings
        self._slow = None if settings.slow_ms is None else settings.slow_ms / 1000
        slow = settings.slow_transaction_ms
        self.slow_transaction = None if slow is None else slow / 1000

    def threshold(self) -> float | None:
        """See `Observer`. None where nobody listens, so that timing costs nothing."""
        if not _listened_to(_query):  # first, for so it is in most programs
            return None
        if _query.isEnabledFor(logging.INFO):
            return 0.0
        return self._slow if self._slow is not None and _query.isEnabledFor(logging.WARNING) else None

    @harmless
    def statement(self, request: Request, seconds: float, worker: str) -> None:
        """See `Observer`."""
        slow = self._slow is not None and seconds >= self._slow
        level = logging.WARNING if slow else logging.INFO
        if not _query.isEnabledFor(level):
            return
        queued_at: float | None = getattr(request, "queued_at", None)  # within a transaction nothing is queued
        waited = None if queued_at is None else max(0.0, perf_counter() - seconds - queued_at)
        statement = request.subject
        parsed = isinstance(statement, Statement)
        sql = statement.sql if parsed else str(request.label or statement)
        parameters, shown = self._parameters(parameters_of(request))
        rows = _count(request.result)
        home = request.home
        transaction = home.number if isinstance(home, Lease) else None
        error = None if request.error is None else type(request.error).__name__
        _query.log(
            level,
            "%s%.3f ms, %s%s: %s; parameters %s",
            "slow: " if slow else "",
            seconds * 1000,
            "failed" if error else f"{rows} row{'' if rows == 1 else 's'}",
            "" if transaction is None else f", transaction {transaction}",
            shorten(sql),
            shown,
            extra={
                "database": self._name,
                "sql": sql,
                "operation": statement.verb if parsed else None,
                "parameters": parameters,
                "rows": rows,
                "duration": seconds,
                "waited": waited,
                "slow": slow,
                "transaction": transaction,
                "worker": worker,
                "error": error,
            },
        )

    def _parameters(self, parameters: object) -> tuple[object, str]:
        """The parameters for the record's attribute and for its message."""
        if self._settings.parameters == "shown":
            return parameters, repr(parameters)
        redacted = redact(parameters)
        return redacted, redacted

    def hears_of(self, seconds: float) -> bool:
        """See `Observer`."""
        slow = self.slow_transaction
        return (slow is not None and seconds >= slow) or _transaction.isEnabledFor(logging.INFO)

    @harmless
    def transaction(self, lease: Lease, outcome: str, seconds: float) -> None:
        """See `Observer`."""
        slow = self.slow_transaction is not None and seconds >= self.slow_transaction
        level = logging.WARNING if slow else logging.INFO
        if not _transaction.isEnabledFor(level):
            return
        holder = lease.holder()
        if slow:
            _transaction.log(
                level,
                "slow: transaction %s held %s of database %s for %.3f ms, and was %s: %s",
                lease.number,
                _connection(readonly=lease.readonly),
                self._name,
                seconds * 1000,
                outcome,
                holder,
                extra=self._of_transaction(lease, holder, seconds, outcome),
            )
        else:
            _transaction.log(
                level,
                "transaction %s %s after %.3f ms: %s",
                lease.number,
                outcome,
                seconds * 1000,
                holder,
                extra=self._of_transaction(lease, holder, seconds, outcome),
            )

    def committed(self, size: int) -> None:
        """See `Observer`. The transactions' own records say it."""

    @harmless
    def holding(self, holder: str, number: int | None, *, readonly: bool, seconds: float, waiting: int) -> None:
        """See `Observer`."""
        _transaction.warning(
            "database %s: %s has been held for %.3f ms while %d wait%s for it, by %s",
            self._name,
            _connection(readonly=readonly),
            seconds * 1000,
            waiting,
            "s" if waiting == 1 else "",
            holder,
            extra={
                "database": self._name,
                "transaction": number,
                "duration": seconds,
                "holder": holder,
                "readonly": readonly,
                "outcome": "open",
                "waiting": waiting,
            },
        )

    def _of_transaction(self, lease: Lease, holder: str, seconds: float, outcome: str) -> dict[str, object]:
        return {
            "database": self._name,
            "transaction": lease.number,
            "duration": seconds,
            "holder": holder,
            "readonly": lease.readonly,
            "outcome": outcome,
        }

    @harmless
    def failure(self, error: BaseException) -> None:
        """See `Observer`. Each of the package's own errors is logged once, however many hands it passes."""
        if not isinstance(error, DatabaseError) or getattr(error, "reported", False):
            return
        error.reported = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        logger = _query if isinstance(error, _OF_STATEMENTS) else _pool
        if isinstance(error, TransactionError) and logger is _pool:
            logger = _transaction
        extra: dict[str, object] = {"database": self._name, "error": type(error).__name__}
        if isinstance(error, QueryExecutionError):
            extra["sql"] = error.sql
            extra["parameters"] = self._parameters(error.parameters)[0]
            extra["code"] = error.code
            extra["code_name"] = error.code_name
        logger.error("database %s: %s: %s", self._name, type(error).__name__, error, extra=extra)

    @harmless
    def long_read(self, holder: str, seconds: float) -> None:
        """See `Observer`."""
        _pool.warning(
            "database %s: a reader has kept its snapshot for %.3g s; until it ends, %s: %s",
            self._name,
            seconds,
            self._pins,
            holder,
            extra={"database": self._name, "duration": seconds, "holder": holder},
        )

    @harmless
    def lost(self, where: str) -> None:
        """A stream or a transaction was thrown away open."""
        _transaction.warning(
            "database %s: %s was thrown away open, and its connection has been taken back; leave its `async with` block",
            self._name,
            where,
            extra={"database": self._name},
        )

    @harmless
    def abandoned(self, where: str) -> None:
        """A transaction was left open by a task that has ended."""
        _transaction.warning(
            "database %s: a transaction was left open by a task that has ended, and has been rolled back; it was begun"
            " by %s",
            self._name,
            where,
            extra={"database": self._name, "holder": where},
        )


def parameters_of(request: Request) -> object:
    """The user's parameters of a statement; None for what is no statement."""
    return request.params if isinstance(request.subject, Statement) else None


def _connection(*, readonly: bool) -> str:
    return "a reader" if readonly else "the writer"


def _listened_to(logger: logging.Logger) -> bool:
    """Whether any handler but a NullHandler would get the logger's records."""
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            if type(handler) is not logging.NullHandler:
                return True
        current = current.parent if current.propagate else None
    return False


def _count(result: Any) -> int | None:
    if result is None:
        return 0
    if isinstance(result, Result):
        return max(result.rowcount, 0)
    if isinstance(result, list):
        return len(result)  # pyright: ignore[reportUnknownArgumentType]
    return 1
