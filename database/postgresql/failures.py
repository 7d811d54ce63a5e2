"""Errors of psycopg's and of the server's, and what the package makes of them.

No text of an error made here holds a value: DETAIL and CONTEXT, where the server quotes rows, are left to `diag`, and values of
the parameters are replaced (`redaction`).
"""

from __future__ import annotations

import re
from typing import Any, cast

import psycopg
from psycopg import pq

from database import errors
from database.postgresql.redaction import HIDDEN, hide

__all__ = [
    "AGAIN",
    "MISTYPED",
    "STALE",
    "Lost",
    "clean",
    "code_name",
    "control_error",
    "is_broken",
    "is_busy",
    "is_lost",
    "kind_of",
    "made_from",
    "mark_alone",
    "mark_broken",
    "mark_outcome",
    "message_of",
    "outcome_of",
    "read_only",
]

MISTYPED = frozenset({"42804", "42883", "42725", "42P08", "42P18"})
"""A parameter's type does not fit where it stands. Found out before anything is executed."""

STALE = MISTYPED | {"22P02", "22P03", "22007", "26000"}
"""What a parameter's type gives that was right when the statement was prepared; or the name is gone with a `DISCARD`."""

AGAIN = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: nothing is wrong with the transaction, only with the moment."""

_BUSY = AGAIN | {"55P03"}
_CORRUPT = frozenset({"XX001", "XX002"})
_LOST = frozenset({"57P01", "57P02", "57P03", "57P05", "08000", "08003", "08006"})


class Lost(psycopg.OperationalError):
    """The connection broke."""

    sqlstate = "08006"


_VALUE = re.compile(r'(: |=)"?.*$', re.DOTALL)
_QUOTES = re.compile(r'"[^"]*"')


def message_of(error: psycopg.Error) -> str:
    """What the server says, without DETAIL and CONTEXT, where values stand."""
    if getattr(error, "cleaned", False):
        return str(error)
    primary = error.diag.message_primary or (str(error).strip() or type(error).__name__)
    return without_value(primary) if (error.sqlstate or "")[:2] == "22" else primary


def without_value(primary: str) -> str:
    """A message about data: 'invalid input syntax for type integer: "the value"', 'value "the value" is out of range'."""
    return _QUOTES.sub(HIDDEN, _VALUE.sub("", primary))


def made_from(result: pq.abc.PGresult) -> psycopg.Error:
    """The error of psycopg's for a result, whose text holds no values; `diag` still has all that the server said."""
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    kind: type[psycopg.Error]
    try:
        kind = psycopg.errors.lookup(state)
    except KeyError:
        kind = psycopg.DatabaseError
    primary = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message).decode(
        "utf-8", "replace"
    )
    if state[:2] == "22":
        primary = without_value(primary)
    error = kind(primary.strip(), info=cast("Any", result))
    if error.sqlstate is None and state:
        error.sqlstate = state
    return error


def clean(error: psycopg.Error, parameters: Any) -> None:
    """Takes DETAIL and CONTEXT out of the error's text, and whatever else of it is a value: all of them go to logs."""
    text = message_of(error)
    error.args = (hide(text, parameters), *error.args[1:])
    error.cleaned = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def code_name(error: psycopg.Error) -> str | None:
    """PostgreSQL's own name of the condition: `unique_violation`."""
    if error.sqlstate is None:
        return None
    if isinstance(error, Lost):
        return "connection_failure"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def mark_broken(error: BaseException) -> None:
    """Notes that the connection which raised this can no longer be used."""
    error.broken = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def is_broken(error: BaseException) -> bool:
    """Whether the connection can no longer be used; `translate` has looked at it."""
    return getattr(error, "broken", False)


def mark_outcome(error: BaseException, outcome: str) -> None:
    """Notes, with the error that a lost connection gives, what has become of the transaction: `QueryExecutionError.outcome`."""
    error.outcome = outcome  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def outcome_of(error: BaseException) -> str | None:
    """What is known of it; None where no transaction was open."""
    return getattr(error, "outcome", None)


def control_error(verb: str) -> errors.TransactionError:
    """Why a transaction, or a connection of the pool, cannot be controlled by SQL text, and what to do instead."""
    instead = {
        "BEGIN": "await db.begin(), `async with db.transaction()` or @transactional",
        "START": "await db.begin(), `async with db.transaction()` or @transactional",
        "COMMIT": "await db.commit()",
        "END": "await db.commit()",
        "ROLLBACK": "await db.rollback()",
        "ABORT": "await db.rollback()",
        "SAVEPOINT": "a nested `async with db.transaction()`",
        "RELEASE": "a nested `async with db.transaction()`",
        "SET": "SET LOCAL within a transaction, the decorator's `isolation`, or `options` of the configuration",
        "RESET": "SET LOCAL, which ends with its transaction",
    }.get(verb)
    if instead is None:
        return errors.TransactionError(
            f"{verb} as SQL text would change one connection of the pool for all who come after, and was not executed"
        )
    return errors.TransactionError(
        f"{verb} as SQL text would change the transaction, or a connection of the pool, behind the package's back, and was"
        f" not executed: use {instead}"
    )


def read_only(text: str | None) -> errors.ReadOnlyTransactionError:
    """The error for a write where none is allowed."""
    what = "a write" if text is None else f"this statement: {errors.shorten(text)}"
    return errors.ReadOnlyTransactionError(f"a read-only transaction or connection refuses {what}")


def mark_alone(error: BaseException) -> None:
    """Notes that a statement outside any transaction raised this: nothing of it is left, so it may be run again."""
    error.alone = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def is_busy(error: BaseException) -> bool:
    """Whether a single statement was in somebody's way (a deadlock, a serialization failure), and is to be run again."""
    return getattr(error, "alone", False) and getattr(error, "sqlstate", None) in AGAIN


def is_lost(error: BaseException) -> bool:
    """Whether the server says that this connection is at its end."""
    return isinstance(error, Lost) or getattr(error, "sqlstate", None) in _LOST


def kind_of(state: str) -> type[errors.QueryExecutionError]:
    """The package's class for a condition of the server's."""
    if state[:2] == "23":
        return errors.IntegrityError
    if state in _BUSY:
        return errors.DatabaseBusyError
    if state in _CORRUPT:
        return errors.DatabaseCorruptError
    return errors.QueryExecutionError
