"""What an error of SQLite's means: to be waited for, to be replaced, to be explained."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, cast
from uuid import UUID

from database import errors
from database.engine.adapting import NONE, Adapters
from database.sqlite3.library import classes

__all__ = [
    "BUSY_SLICE",
    "KEYS_STAY",
    "UNKNOWN",
    "Patience",
    "control_error",
    "explain",
    "is_broken",
    "is_busy",
    "is_foreign",
    "is_undecodable",
    "of_one_connection",
    "read_only",
    "reason",
]

BUSY_SLICE = 0.02
"""Seconds for which SQLite's own busy handler waits: it cannot be interrupted, so the worker waits in slices."""

_BROKEN = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_INTERNAL,
    }
)


def control_error(verb: str) -> errors.TransactionError:
    """Why a transaction cannot be controlled by SQL text, and what to do instead."""
    instead = {
        "BEGIN": "await db.begin(), `async with db.transaction()` or @transactional",
        "COMMIT": "await db.commit()",
        "END": "await db.commit()",
        "ROLLBACK": "await db.rollback()",
        "SAVEPOINT": "a nested `async with db.transaction()`",
        "RELEASE": "a nested `async with db.transaction()`",
    }.get(verb, "the transaction methods of db")
    return errors.TransactionError(
        f"{verb} as SQL text would change the transaction behind the package's back, and was not executed: use {instead}"
    )


def read_only(text: str | None) -> errors.ReadOnlyTransactionError:
    """Why a write is refused."""
    what = "a write" if text is None else f"this statement: {errors.shorten(text)}"
    return errors.ReadOnlyTransactionError(f"a read-only transaction or connection refuses {what}")


def is_busy(error: BaseException) -> bool:
    """Whether somebody else holds a lock. Not BUSY_SNAPSHOT, nor one's own open statement: these never go away by waiting."""
    if isinstance(error, classes.OperationalError):
        code = getattr(error, "sqlite_errorcode", None)
        return is_passing(code) or (
            code is not None
            and code & 0xFF == sqlite3.SQLITE_BUSY
            and code != sqlite3.SQLITE_BUSY_SNAPSHOT
            and not _is_in_its_own_way(error, code)
        )
    return False


_PASSING = frozenset(
    {
        sqlite3.SQLITE_READONLY_CANTLOCK,
        sqlite3.SQLITE_READONLY_RECOVERY,
        sqlite3.SQLITE_READONLY_ROLLBACK,
    }
)
"""What a read-only connection says when it takes a journal for one that was left behind.

It looks for the file first and for its owner second, and between these one commit may end and the next begin. A connection
that can write looks again under a lock; this one cannot, and has to be asked again.
"""


def is_passing(code: int | None) -> bool:
    """Whether this is only for a moment, although SQLite speaks of a file that cannot be written."""
    return code in _PASSING


def _is_in_its_own_way(error: BaseException, code: int | None) -> bool:
    """Whether another statement of this very connection, still open, is what is in the way."""
    # SQLITE_LOCKED is about one connection (or a shared cache, which is not used here); sqlite.org/rescode.html#locked
    return code is not None and (
        code & 0xFF == sqlite3.SQLITE_LOCKED
        or (code & 0xFF == sqlite3.SQLITE_BUSY and "SQL statements in progress" in str(error))
    )


def is_broken(error: BaseException) -> bool:
    """Whether the connection can no longer be trusted."""
    if isinstance(error, classes.Error):
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            return isinstance(error, classes.ProgrammingError) and str(error) == _CLOSED
        return code & 0xFF in _BROKEN
    return False


_CLOSED = "Cannot operate on a closed database."
"""A connection that was to be exchanged, and could not be."""


def is_undecodable(error: BaseException) -> bool:
    """Whether a row could not be made of what SQLite gave, for its TEXT is not UTF-8; the statement itself was fine."""
    return (
        isinstance(error, classes.OperationalError)
        and getattr(error, "sqlite_errorcode", None) is None
        and str(error).startswith("Could not decode")
    )


def is_foreign(error: BaseException) -> bool:
    """Whether neither we nor `sqlite3` has raised it, but code of the user's that we called: a property, an adapter."""
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0] != __name__.partition(".")[0]


_OWN_SETTINGS = frozenset({"busy_timeout", "cache_size", "foreign_keys", "journal_mode", "synchronous"})


KEYS_STAY = "keys stay"
"""In the place of a PRAGMA's name: dropping a table was refused."""


def of_one_connection(what: str, text: str | None) -> errors.QueryExecutionError:
    """Why a statement that changes one connection is refused outside a transaction, and what to do instead."""
    if what == KEYS_STAY:
        return errors.QueryExecutionError(
            "PRAGMA foreign_keys does nothing within a transaction, which is open around this function: dropping the table"
            " would delete or change the rows that refer to it, and was refused. A migration (`await db.migrate()`) can"
            " make a table anew",
            sql=text,
        )
    if what in ("ATTACH", "DETACH"):
        instead = "name the file in the setting `attach`, which gives it to every connection"
    elif what == "temporary":
        instead = "make it inside a transaction, or within db.run(): it is dropped with the end"
    elif what == "defer_foreign_keys":
        instead = "send it inside the transaction that it is for"
    elif what in _OWN_SETTINGS:
        instead = f"use the setting `{what}`, which holds for every connection"
    else:
        instead = f"use the setting `pragmas: {{{what}: ...}}`, which holds for every connection"
    return errors.QueryExecutionError(
        "this statement changes one connection of the pool, not the database, and was not executed; nobody could say"
        f" whom it would hold for: {instead}",
        sql=text,
    )


def explain(
    error: BaseException,
    text: str | None,
    parameters: Any,
    which: str,
    adapters: Adapters = NONE,
    *,
    done: bool = False,
) -> errors.QueryExecutionError:
    """The package's error for one of `sqlite3`'s that has come out of binding or executing.

    Args:
        error: The error. What its message quotes of the parameters is taken out of it, too: it will be the cause.
        text: The statement.
        parameters: As they were given; `UNKNOWN` if nobody can say any more.
        which: Which of many it was.
        adapters: How types of the user's are stored.
        done: Whether the statement has been executed all the same, and only its rows cannot be read.
    """
    unsupported = _UNSUPPORTED.search(str(error))
    code: int | None = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    quotes = (
        primary is not None
        and primary != sqlite3.SQLITE_CONSTRAINT  # these name tables and columns
        and isinstance(error, classes.Error)
    )
    message = _without_values(error, parameters, adapters, text if quotes else None)
    if parameters is UNKNOWN:
        parameters = None
    kind = errors.QueryExecutionError
    if not isinstance(error, classes.Error):
        if not isinstance(error, TypeError):
            message = f"a parameter cannot be stored: {message}"
        errors.without_text(error)
    elif primary == sqlite3.SQLITE_CONSTRAINT:
        kind = errors.IntegrityError
    elif _is_in_its_own_way(error, code):
        message = (
            f"another statement of the same transaction is still open ({message}): read its stream or cursor to the end, or"
            " leave it, before this one"
        )
    elif primary == sqlite3.SQLITE_BUSY or is_passing(code):
        kind = errors.DatabaseBusyError
        message = f"another process kept its lock for longer than busy_timeout ({message})"
    elif primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        kind = errors.DatabaseCorruptError
    elif unsupported is not None:
        message = _unsupported(unsupported["number"], unsupported["kind"])
        error.args = (message,)
    elif is_undecodable(error):
        column = message.split("'")[1] if message.count("'") > 1 else "?"
        message = f"the column {column!r} holds TEXT that is not UTF-8: select CAST({column} AS BLOB)"
        if done:
            message += ". A statement that writes has been executed all the same"
        error.args = (message,)
    if which:
        message = f"{message} ({which})"
    explained = kind(message, sql=text, parameters=parameters, code=code, code_name=_code_name(error, code))
    if done:
        explained.outcome = "done"
    return explained


_UNSUPPORTED = re.compile(
    r"^Error binding parameter (?P<number>\S+?):? (?:type '(?P<kind>[^']+)' is not supported|- probably unsupported type)"
)


def _unsupported(number: str, kind: str | None) -> str:
    """What to do about a value that `sqlite3` cannot bind; its type is no secret, and itself is not shown."""
    name = (kind or "").rpartition(".")[2]
    what = f"is of type {kind}, which" if kind else "is of a type that"
    if name in ("dict", "list", "tuple", "set", "frozenset"):
        return (
            f"parameter {number} {what} cannot be stored: give json.dumps(value), or say db.adapt({name}, json.dumps) once;"
            " json_each(:values) makes rows of such a text, for IN"
        )
    return (
        f"parameter {number} {what} cannot be stored: convert it to a number, a text or bytes, or say once how, by"
        f" db.adapt({name or 'that type'}, function)"
    )


_NAMES = {
    261: "SQLITE_BUSY_RECOVERY", 517: "SQLITE_BUSY_SNAPSHOT", 773: "SQLITE_BUSY_TIMEOUT",
    257: "SQLITE_ERROR_MISSING_COLLSEQ", 513: "SQLITE_ERROR_RETRY", 769: "SQLITE_ERROR_SNAPSHOT",
    3091: "SQLITE_CONSTRAINT_DATATYPE", 2835: "SQLITE_CONSTRAINT_PINNED", 2579: "SQLITE_CONSTRAINT_ROWID",
    779: "SQLITE_CORRUPT_INDEX", 523: "SQLITE_CORRUPT_SEQUENCE", 526: "SQLITE_CANTOPEN_ISDIR",
    1550: "SQLITE_CANTOPEN_SYMLINK", 1294: "SQLITE_CANTOPEN_DIRTYWAL", 1288: "SQLITE_READONLY_CANTINIT",
    1544: "SQLITE_READONLY_DIRECTORY", 7178: "SQLITE_IOERR_ROLLBACK_ATOMIC", 7434: "SQLITE_IOERR_BEGIN_ATOMIC",
    7690: "SQLITE_IOERR_COMMIT_ATOMIC", 7946: "SQLITE_IOERR_ROLLBACK_ATOMIC", 8202: "SQLITE_IOERR_DATA",
    8458: "SQLITE_IOERR_CORRUPTFS", 8714: "SQLITE_IOERR_IN_PAGE", 283: "SQLITE_NOTICE_RECOVER_WAL",
    539: "SQLITE_NOTICE_RECOVER_ROLLBACK", 795: "SQLITE_NOTICE_RBU", 518: "SQLITE_LOCKED_VTAB",
}  # fmt: skip
"""Codes that some version of Python calls "unknown" (sqlite.org/rescode.html)."""


def _code_name(error: BaseException, code: int | None) -> str | None:
    name: str | None = getattr(error, "sqlite_errorname", None)
    if code is not None and (name is None or name == "unknown"):
        return _NAMES.get(code) or _PRIMARY.get(code & 0xFF)
    return name


_PRIMARY = {
    value: name
    for name, value in vars(sqlite3).items()
    if name.startswith("SQLITE_") and name in (
        "SQLITE_ERROR", "SQLITE_INTERNAL", "SQLITE_PERM", "SQLITE_ABORT", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_NOMEM",
        "SQLITE_READONLY", "SQLITE_INTERRUPT", "SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_NOTFOUND", "SQLITE_FULL",
        "SQLITE_CANTOPEN", "SQLITE_PROTOCOL", "SQLITE_EMPTY", "SQLITE_SCHEMA", "SQLITE_TOOBIG", "SQLITE_CONSTRAINT",
        "SQLITE_MISMATCH", "SQLITE_MISUSE", "SQLITE_NOLFS", "SQLITE_AUTH", "SQLITE_FORMAT", "SQLITE_RANGE", "SQLITE_NOTADB",
    )
}  # fmt: skip

REDACTED = "<redacted>"
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"|(?<=: )([^:]+)\Z")
_VALUES = 1000
"""Values that a message is compared with, at the most."""


UNKNOWN = object()
"""In the place of parameters: there were some."""


def _without_values(error: BaseException, parameters: Any, adapters: Adapters, sql: str | None) -> str:
    """The error's message, without what it quotes of the parameters: a path, a full-text query, or a piece of one.

    What has been bound in the place of a value of the user's own class, only his code could say, and that is not asked once
    more. Then nothing stays that is quoted and does not stand in the SQL, if that is given.
    """
    message = str(error)
    values: list[str] = []
    all_known = True
    try:
        for known, value in _texts(parameters, adapters):
            all_known = all_known and known
            values.append(value)
    except Exception:  # values of the user's own classes: an error is not to become another one
        all_known = False
    else:
        if not values:
            return message
    clean = message
    if not all_known and sql is not None:
        clean = _without_quoted(clean, lambda text: text not in sql)
    values = [value for value in values if value]
    for value in sorted(values, key=len, reverse=True):
        if len(value) > 3 or (value in clean and not value.isalpha()):
            clean = clean.replace(value, REDACTED)
    words = {word for value in values for word in _WORD.findall(value)}
    clean = _without_quoted(clean, lambda text: text != REDACTED and any(text in value for value in values))
    clean = _WORD.sub(lambda found: REDACTED if found[0] in words and found[0] not in _COMMON else found[0], clean)
    clean = clean.replace(f"<{REDACTED}>", REDACTED)
    if clean != message:
        error.args = (clean,)
    return clean


def _without_quoted(message: str, secret: Callable[[str], bool]) -> str:
    def replaced(found: re.Match[str]) -> str:
        text = found[1] or found[2] or found[3] or ""
        return found[0].replace(text, REDACTED) if text and secret(text) else found[0]

    return _QUOTED.sub(replaced, message)


_COMMON = frozenset(
    {
        "redacted", "near", "syntax", "error", "no", "such", "column", "table", "function", "failed", "constraint",
        "UNIQUE", "CHECK", "FOREIGN", "KEY", "NOT", "NULL", "to", "of", "a", "an", "in", "is", "the", "bad", "JSON",
        "path", "malformed", "fts5", "parameter", "binding", "Error", "value", "type", "supported", "unterminated",
        "string", "expected", "not", "supplied", "for", "You", "did", "supply", "number", "bindings", "statement",
        "current", "Incorrect", "uses", "there", "are", "Python", "int", "too", "large", "convert", "SQLite",
        "INTEGER", "utf", "codec", "can", "encode", "character", "position", "surrogates", "allowed", "name", "id",
    }
)  # fmt: skip
"""Words of SQLite's and Python's own messages: no secrets, and without them no message could be read."""


_KNOWN = (int, float, str, Enum, date, time_of_day, Decimal, UUID, PurePath)
"""What is bound as the text that `str` gives, but for subclasses that say otherwise, and for what the user has said."""


def _texts(parameters: Any, adapters: Adapters) -> Iterator[tuple[bool, str]]:
    """The values as texts, each with whether it is certain that this is what was bound."""
    if parameters is None or isinstance(parameters, (str, bytes)):
        return
    if parameters is UNKNOWN:
        yield False, ""
        return
    if isinstance(parameters, Mapping):
        values = cast("Any", parameters).values()
    elif isinstance(parameters, (Sequence, sqlite3.Row)):
        values = cast("Any", parameters)
        if type(values) not in (tuple, list):  # of the user's own, perhaps
            yield isinstance(values, sqlite3.Row), ""
    else:
        yield False, ""  # it may have properties
        values = cast("Any", vars(parameters)).values()
    for value in islice(cast("Iterable[Any]", values), _VALUES):
        if isinstance(value, (bytes, bytearray, memoryview, array)):
            yield True, bytes(cast("bytes", value)).decode("utf-8", "replace")
        elif value is not None and not isinstance(value, bool):
            known = isinstance(value, _KNOWN) and not (
                adapters and any(each in adapters for each in type(value).__mro__)
            )
            yield known, str(getattr(value, "value", value))


class Patience:
    """Waits for another process's lock, in slices, until its time is used up or the caller has gone."""

    __slots__ = ("_deadline", "_progress")

    def __init__(self, seconds: float, progress: Callable[[], bool]) -> None:
        self._deadline = time.monotonic() + seconds
        self._progress = progress

    def wait(self, error: sqlite3.OperationalError) -> None:
        """Called after an error: returns when it is time to try again, raises it when there is nothing to wait for."""
        if not is_busy(error) or not self.left():
            raise error
        time.sleep(0.002)

    def left(self) -> bool:
        """Whether there is time left, and a caller who waits."""
        return time.monotonic() < self._deadline and not self._progress()


def reason(path: Path, error: BaseException) -> str:
    """What is wrong, in words that help more than SQLite's "unable to open database file"."""
    if path.is_dir():
        return "it is a directory, not a file"
    if (
        isinstance(error, classes.DatabaseError)
        and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB
    ):
        return f"it is not an SQLite database ({error})"
    for part in (path, *path.parents):
        with contextlib.suppress(OSError):
            if part != path and part.exists() and not part.is_dir():
                return f"{str(part)!r} is a file, not a directory"
    if isinstance(error, PermissionError) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        return f"permission denied ({error})"
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        return f"its directory cannot be written to, which SQLite needs for its journal ({error})"
    return str(error)
