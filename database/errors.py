"""One hierarchy of errors for all engines.

The package logs an error once, where it happens, and raises it; handling is the application's, in one place:

    try:
        await create_job(job)
    except errors.IntegrityError: ...      # somebody else was first
    except errors.DatabaseError: ...       # anything else that this package can raise

```
DatabaseError
├── ConfigurationError
├── ConnectionPoolExhaustedError   (also TimeoutError)
├── ConnectionFailedError
├── PoolClosedError
├── MigrationError
├── TransactionError
│   ├── ReadOnlyTransactionError
│   └── TransactionTimeoutError    (also TimeoutError)
└── QueryExecutionError
    ├── IntegrityError
    ├── DatabaseBusyError
    └── DatabaseCorruptError
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

__all__ = [
    "ConfigurationError",
    "ConnectionFailedError",
    "ConnectionPoolExhaustedError",
    "DatabaseBusyError",
    "DatabaseCorruptError",
    "DatabaseError",
    "IntegrityError",
    "MigrationError",
    "PoolClosedError",
    "QueryExecutionError",
    "ReadOnlyTransactionError",
    "TransactionError",
    "TransactionTimeoutError",
]


class DatabaseError(Exception):
    """Everything that this package raises on purpose, but for `TypeError` on misuse of the decorators."""


class ConfigurationError(DatabaseError):
    """The settings are wrong; the message names file, line and key, and says what would be right."""


class ConnectionPoolExhaustedError(DatabaseError, TimeoutError):
    """No connection became free within `pool_timeout`; the message names who holds what since when."""


class ConnectionFailedError(DatabaseError):
    """The database cannot be opened.

    Attributes:
        path: What was to be opened.
        reason: Why it could not.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot open database {self.path!r}: {self.reason}"


class PoolClosedError(DatabaseError):
    """The pool was closed while this call waited, or while its transaction or stream was open."""


class MigrationError(DatabaseError):
    """A migration failed and was rolled back, or folder and database contradict one another; the message says where."""


class TransactionError(DatabaseError):
    """A transaction was misused, or cannot go on; nothing of it has been committed unless the message says so."""


class ReadOnlyTransactionError(TransactionError):
    """A write was tried in a read-only transaction or on a read-only connection."""


class TransactionTimeoutError(TransactionError, TimeoutError):
    """The transaction took longer than its `timeout`; it has been rolled back."""


class QueryExecutionError(DatabaseError):
    """A statement failed. The driver's own error is `__cause__`.

    Attributes:
        sql: The statement's text.
        parameters: Its parameters as they were given. `str()` of the error shows only their number or names,
            for messages go to logs, and parameters are where secrets are.
        code: The engine's error code (SQLite: the extended result code), if there is one.
        code_name: The code's name (`"SQLITE_CONSTRAINT_UNIQUE"`), if there is one.
        outcome: Where the connection to a server was lost: `"undone"`, nothing of it is kept, so it may be run again;
            `"unknown"`, it may have taken effect or not. `"done"`: it has been executed, and only what it returned could not
            be read. Else None.
    """

    outcome: str | None = None

    def __init__(
        self,
        message: str,
        *,
        sql: str | None = None,
        parameters: object = None,
        code: int | str | None = None,
        code_name: str | None = None,
    ) -> None:
        super().__init__(message)
        self.sql = sql
        self.parameters = parameters
        self.code = code
        self.code_name = code_name

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword arguments are lost by the default, and errors do cross process borders.
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))

    def __str__(self) -> str:
        text = super().__str__()
        if self.code_name:
            text += f" [{self.code_name}]"
        if self.sql is not None:
            text += f"\n  SQL: {shorten(self.sql)}"
            if self.parameters is not None:
                text += f"\n  parameters: {redact(self.parameters)}"
        return text


class IntegrityError(QueryExecutionError):
    """A constraint (unique, not null, check, foreign key) refused the statement."""


class DatabaseBusyError(QueryExecutionError):
    """Another process kept its lock for longer than `busy_timeout`."""


class DatabaseCorruptError(QueryExecutionError):
    """The file is damaged or is no database."""


def redact(parameters: object) -> str:
    """Describes parameters without their values: `<2 values>` or `<id, name>`."""
    if parameters is None:
        return "none"
    if isinstance(parameters, Mapping):
        return f"<{', '.join(map(str, cast('Iterable[object]', parameters)))}>"
    if isinstance(parameters, Sequence) and not isinstance(parameters, (str, bytes)):
        count = len(cast("Collection[object]", parameters))
        return f"<{count} value{'' if count == 1 else 's'}>"
    return f"<{type(parameters).__name__}>"


def shorten(sql: str, limit: int = 500) -> str:
    """One line of SQL for a message: white space folded, cut after `limit` characters."""
    line = " ".join(sql[: limit * 4].split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _rebuild(kind: type[QueryExecutionError], args: tuple[Any, ...], state: dict[str, Any]) -> QueryExecutionError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
