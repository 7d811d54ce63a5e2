"""Logging: one record a statement, with standard `logging`, silent until somebody configures it.

Loggers: `database.query` (statements), `database.pool` (connections, errors of the pool) and `database.transaction`.
Records are made on the worker's thread, after the statement and before its answer is posted: a slow handler delays the
database, but never the event loop.

Attributes of a `database.query` record, for formatters and shippers: `database` (the name), `sql`, `parameters`
(redacted unless `logging.parameters` is `shown`), `rows`, `duration` (seconds), `transaction` (a number, or None for
autocommit), `worker`, `error` (the exception's class, or None).
"""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from database.driver.lease import Lease
from database.driver.request import Request
from database.errors import (
    DatabaseError,
    QueryExecutionError,
    ReadOnlyTransactionError,
    TransactionError,
    redact,
    shorten,
)
from database.settings import LoggingSettings
from database.statements import Result, Statement

__all__ = ["ConsoleFormatter", "ForwardHandler", "LogObserver", "set_up"]

_root = logging.getLogger("database")
_root.addHandler(logging.NullHandler())  # else logging's last resort would print warnings nobody asked for
_query = logging.getLogger("database.query")
_pool = logging.getLogger("database.pool")
_transaction = logging.getLogger("database.transaction")


_OF_STATEMENTS = (QueryExecutionError, ReadOnlyTransactionError)


F = TypeVar("F", bound=Callable[..., None])


def _without_raising(report: F) -> F:
    """A handler or filter of the application's may fail; that costs the record, not the worker whose thread this is."""

    @functools.wraps(report)
    def wrapper(*args: Any) -> None:
        try:
            report(*args)
        except Exception:
            if logging.raiseExceptions and sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
                sys.stderr.write("--- a handler or filter of the logger 'database' has failed ---\n")
                traceback.print_exc()

    return wrapper  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


class ForwardHandler(logging.Handler):
    """Forwards records to a log system: ELK, Loki, Datadog, a message queue.

    Empty on purpose. Fill in `emit`, then `logging.getLogger("database").addHandler(ForwardHandler())`. It runs on a
    worker's thread: put the record into a queue (`logging.handlers.QueueHandler` does that) instead of waiting for a
    network.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one record."""
        # TODO: ship the record, e.g. as JSON: {"@timestamp": record.created, "message": record.getMessage(),
        #       "labels": {"sql": record.sql, "duration": record.duration, "rows": record.rows, ...}}


class ConsoleFormatter(logging.Formatter):
    """A readable line a statement: time, level, duration, rows, SQL, parameters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")


class _ConsoleHandler(logging.StreamHandler[Any]):
    """The handler that `logging.console: true` adds; one for the process."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(ConsoleFormatter())


def set_up(settings: LoggingSettings) -> None:
    """Applies `logging:` of the configuration: adds the console handler, once, and sets its level."""
    if not settings.console:
        return
    level = logging.getLevelNamesMapping()[settings.level]
    handler = next((each for each in _root.handlers if isinstance(each, _ConsoleHandler)), None)
    if handler is None:
        handler = _ConsoleHandler()
        _root.addHandler(handler)
    handler.setLevel(level)
    if _root.level == logging.NOTSET or _root.level > level:
        _root.setLevel(level)


def tear_down() -> None:
    """Takes the console handler away again."""
    for handler in tuple(_root.handlers):
        if isinstance(handler, _ConsoleHandler):
            _root.removeHandler(handler)
            _root.setLevel(logging.NOTSET)


class LogObserver:
    """Reports one database's statements, transactions and errors. See `database.driver.backend.Observer`."""

    __slots__ = ("_name", "_settings", "_slow")

    def __init__(self, name: str, settings: LoggingSettings) -> None:
        self._name = name
        self._settings = settings
        self._slow = None if settings.slow_ms is None else settings.slow_ms / 1000

    def threshold(self) -> float | None:
        """See `Observer`. None where nobody listens, so that timing costs nothing."""
        if _query.isEnabledFor(logging.INFO) and _listened_to(_query):
            return 0.0
        if self._slow is not None and _query.isEnabledFor(logging.WARNING) and _listened_to(_query):
            return self._slow
        return None

    @_without_raising
    def statement(self, request: Request, seconds: float, worker: str) -> None:
        """See `Observer`."""
        slow = self._slow is not None and seconds >= self._slow
        level = logging.WARNING if slow else logging.INFO
        if not _query.isEnabledFor(level):
            return
        statement = request.sql
        if isinstance(statement, Statement):
            sql = statement.sql
        else:
            sql = str(request.label or statement)
        parameters: object = request.params if isinstance(statement, Statement) else None
        shown = repr(parameters) if self._settings.parameters == "shown" else redact(parameters)
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
                "parameters": parameters if self._settings.parameters == "shown" else shown,
                "rows": rows,
                "duration": seconds,
                "transaction": transaction,
                "worker": worker,
                "error": error,
            },
        )

    @_without_raising
    def transaction(self, lease: Lease, outcome: str, seconds: float) -> None:
        """See `Observer`."""
        if _transaction.isEnabledFor(logging.INFO):
            _transaction.info(
                "transaction %s %s after %.3f ms: %s",
                lease.number,
                outcome,
                seconds * 1000,
                lease.holder(),
                extra={
                    "database": self._name,
                    "transaction": lease.number,
                    "outcome": outcome,
                    "duration": seconds,
                },
            )

    @_without_raising
    def failure(self, error: BaseException) -> None:
        """See `Observer`. Each of the package's own errors is logged once, however many hands it passes."""
        if not isinstance(error, DatabaseError) or getattr(error, "reported", False):
            return
        error.reported = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        logger = _query if isinstance(error, _OF_STATEMENTS) else _pool
        if isinstance(error, TransactionError) and logger is _pool:
            logger = _transaction
        logger.error("database %s: %s: %s", self._name, type(error).__name__, error, extra={"database": self._name})

    @_without_raising
    def long_read(self, holder: str, seconds: float) -> None:
        """See `Observer`."""
        _pool.warning(
            "database %s: a reader has kept its snapshot for %.3g s; until it ends, the WAL cannot be reset and grows with"
            " every write (sqlite.org/wal.html#bigwal): %s",
            self._name,
            seconds,
            holder,
            extra={"database": self._name, "duration": seconds},
        )

    @_without_raising
    def lost(self, where: str) -> None:
        """A stream or a transaction was thrown away open."""
        _transaction.warning(
            "database %s: %s was thrown away open, and its connection has been taken back; leave its `async with` block",
            self._name,
            where,
            extra={"database": self._name},
        )

    @_without_raising
    def abandoned(self, where: str) -> None:
        """A transaction was left open by a task that has ended."""
        _transaction.warning(
            "database %s: a transaction was left open by a task that has ended, and has been rolled back; it was begun"
            " by %s",
            self._name,
            where,
            extra={"database": self._name},
        )


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
