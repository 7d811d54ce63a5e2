"""Our own connection class: what `db.run` hands to a function, and what comes back from it clean.

A function gets the very connection that the package works on, in a transaction that the package has opened. So the
connection knows when it is lent (`lend`, `take_back`), and meanwhile answers for the package:

- Nothing that a function or a library does ends the transaction. `commit()`, `with connection:`, and COMMIT as SQL text
  set a savepoint, back to which `rollback()` goes; SAVEPOINT, RELEASE and ROLLBACK TO are the function's own, inside.
  All of it stands on one savepoint more, `base`, so that a function that raises leaves nothing behind.
- Cursors and blobs that it makes are remembered, weakly, and ended with it: one that is left half read would keep its
  lock or its snapshot. A cursor that was made behind our back (`sqlite3.Cursor(connection)`) is looked for only where
  more refers to the connection than before, and a statement really runs.
- What it sets (row and text factory, handlers, limits, functions, PRAGMAs) is put back, or the connection is exchanged
  for a new one as soon as its transaction has ended: see `Connection.alter`.
- Once SQLite has ended the transaction by itself, every further statement is refused: it would be committed at once.

Before `prepared()` the connection is being made what the configuration says, and what is set then is to stay.

Threads. All of it runs on the thread that opened the connection; who calls from another one is told so. Only
`interrupt` may be called from anywhere. The package's own statements go through cursors of the base class
(`plain_cursor`), for which none of this costs anything.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary, ref

from database.engine.contract import Alone
from database.errors import TransactionError
from database.sqlite3 import analysis

__all__ = [
    "CACHED",
    "ENDED_BY_ITSELF",
    "Keeper",
    "Lent",
    "LentCursor",
    "RawConnection",
    "RawCursor",
    "connection_class",
]

if TYPE_CHECKING:
    _Connection = sqlite3.Connection
    _Cursor = sqlite3.Cursor
else:
    _Connection = _Cursor = object

CACHED = 256
"""Statements that each connection keeps prepared, at the most."""
CACHED_CHARACTERS = 2_000_000
"""Characters of new texts, and more, after which it forgets them all: long texts are seldom sent twice."""

ENDED_BY_ITSELF = (
    "SQLite has rolled this transaction back by itself, after an error or an interruption that was caught: nothing of it"
    " is kept, and nothing more can be done in it. Let the error go on, and run the function again"
)
_OVER = (
    "this cursor has ended with the function given to db.run() that made it: fetch its rows inside the function, and return"
    " them as a list"
)
_AWAY = (
    "is used outside the function given to db.run(), or on another thread: it belongs to that function, while it runs"
)

RESTORED_PRAGMAS = frozenset(
    [
        "analysis_limit",
        "automatic_index",
        "busy_timeout",
        "cache_size",
        "cache_spill",
        "cell_size_check",
        "checkpoint_fullfsync",
        "fullfsync",
        "ignore_check_constraints",
        "legacy_alter_table",
        "query_only",
        "read_uncommitted",
        "recursive_triggers",
        "reverse_unordered_selects",
        "trusted_schema",
        "wal_autocheckpoint",
    ]
)
"""Numbers that SQLite tells and takes at any time: put back at once, without a new connection."""
_HARMLESS_PRAGMAS = frozenset({"busy_timeout", "cache_size", "recursive_triggers"})
"""Those that a function which only reads may set as well: libraries do so without being asked."""

_BASE = f"base_{os.urandom(8).hex()}"
_KEPT = f"kept_{os.urandom(8).hex()}"
"""Names of savepoints: no function may hit upon one of them."""

_FORGETFUL = 1000
"""Texts whose kind is remembered, at the most; and no long ones."""
_FIRST = re.compile(r"(?:\s|;|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*([A-Za-z]*)", re.DOTALL)
_SPECIAL = frozenset({"BEGIN", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE", "PRAGMA"})
_known: dict[str, bool] = {}


class Keeper(Protocol):
    """What the raw connection asks of the package's `Connection` that it belongs to."""

    readonly: bool

    def control(self, sql: str, cursor: Any = None) -> None:
        """Executes SQL that controls the transaction, or sets a PRAGMA, although nobody else may."""
        ...

    def owns(self, cursor: Any) -> bool:
        """Whether a cursor is the package's own."""
        ...

    def alter(self) -> None:
        """Something is about to be changed that only a new connection puts right.

        Raises:
            Alone: Others share this transaction, and would see it.
        """
        ...

    def denied(self) -> bool:
        """Whether what has just been refused is to be tried again where nobody else shares the transaction."""
        ...

    def writes(self) -> bool:
        """Whether the transaction that is open may write."""
        ...


def _is_special(sql: str) -> bool:
    """Whether a text is to be looked at: it controls the transaction, or is a PRAGMA."""
    special = cast("re.Match[str]", _FIRST.match(sql))[1].upper() in _SPECIAL
    if len(sql) <= 500:
        if len(_known) >= _FORGETFUL:
            _known.clear()
        _known[sql] = special
    return special


class LentCursor(_Cursor):
    """A cursor of a connection that may be lent: looks at what it executes."""

    __slots__ = ()

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As `sqlite3.Cursor.execute`; what controls the transaction does so inside the one that is open."""
        connection = cast("Lent", self.connection)
        if connection.enter(sql):
            connection.control(self, sql)
            return self
        try:
            return super().execute(sql, parameters)
        except Exception as error:
            connection.failed(error, sql, parameters)
            raise

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Any:
        """As `sqlite3.Cursor.executemany`."""
        connection = cast("Lent", self.connection)
        connection.enter(sql)
        try:
            return super().executemany(sql, parameters)
        except Exception as error:
            connection.failed(error, sql, None)
            raise

    def executescript(self, sql_script: str, /) -> Any:
        """The statements of a script one after the other, inside the transaction that is open."""
        connection = cast("Lent", self.connection)
        if not connection.lent:
            connection.check()
            return super().executescript(sql_script)
        if not isinstance(sql_script, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"executescript() takes SQL text, not {type(sql_script).__name__}")
        for text in analysis.split(sql_script):
            self.execute(text)
            if self.description is not None:
                for _ in self:
                    pass
        return self


class Lent(_Connection):
    """See the head of this module."""

    module: ModuleType
    """`sqlite3`, or the drop-in that this connection comes from."""
    cursor_class: type[Any]
    ended_class: type[Any]

    lent = False
    keeper: Keeper | None = None
    """The package's `Connection`, once this has been prepared."""
    failure: tuple[BaseException, str, Any] | None = None
    """What a function's last failed statement was."""
    cached = 0
    """Characters of SQL that have been prepared since the statement cache was emptied last."""

    _thread = 0
    _based = _kept = _began = False
    _over: str | None = None
    _references = sys.maxsize
    """How many there are at the least while nobody else refers to it: a traceback that is about to go may hold more."""
    _handlers = False
    _guard: Any = None
    _progress: Any = None
    _authorizer: Any = None
    _tick: tuple[Any, int] | None = None
    _trace: Any = None
    _configured: tuple[Any, ...] = ()
    _isolation: str | None = None
    _autocommit: Any = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = get_ident()
        self._made: list[ref[Any]] = []
        self._names: list[str] = []
        self._pragmas: list[tuple[str, int]] = []
        self._limits: list[tuple[int, int]] = []

    def __call__(self, sql: str, /) -> Any:
        """Prepares a statement: what the statement cache calls for a text that it does not hold."""
        self.cached += len(sql)
        if self.cached > CACHED_CHARACTERS:
            self.cached = 0
            cursor = self.plain_cursor()
            for number in range(CACHED):  # nothing else empties the cache
                cursor.execute(f"SELECT {number}").close()
                cursor = self.plain_cursor()
        return super().__call__(sql)

    # For the package

    def plain_cursor(self) -> sqlite3.Cursor:
        """A cursor for the package's own statements, which nothing watches."""
        made: sqlite3.Cursor = super().cursor(self.module.Cursor)
        return made

    def prepared(self, keeper: Keeper, guard: Callable[..., int], progress: Callable[[], bool], steps: int) -> None:
        """The connection is as the configuration wants it: from now on it belongs to that keeper."""
        self._guard, self._progress = guard, (progress, steps)
        self._configured = self.row_factory, self.text_factory, self._authorizer, self._tick, self._trace
        self.install()
        super().create_function("_database_probe", 0, _probe)
        self.keeper = keeper

    def install(self) -> None:
        """Sets the authorizer anew, by which every cached statement is checked again, and the progress handler."""
        guard, authorizer = self._guard, self._authorizer
        if authorizer is None:
            super().set_authorizer(guard)
        else:

            def both(*arguments: Any) -> int:
                return cast("int", guard(*arguments) or authorizer(*arguments))

            super().set_authorizer(both)
        progress, steps = self._progress
        tick = self._tick
        if tick is None:
            super().set_progress_handler(progress, steps)
        else:
            super().set_progress_handler(lambda: progress() or tick[0](), min(tick[1], steps))

    def lend(self) -> None:
        """From now on a function of the user's has the connection."""
        self._isolation, self._autocommit = None, -1
        self._over = self.failure = None
        self._references = min(self._references, sys.getrefcount(self))
        self.lent = True

    def take_back(self, *, keep: bool) -> None:
        """The function is over: ends what it has left open, keeps or undoes what it did, and puts the rest back.

        Raises:
            sqlite3.Error: What it did can neither be kept nor undone; the whole transaction has to be rolled back.
        """
        self.lent = False
        while self._limits:  # first: our own statements are bound by them, too
            super().setlimit(*self._limits.pop())
        living = self.end_cursors() if self._made else 0
        if keep:
            self.failure = None
        configured = self._configured
        self.row_factory, self.text_factory = configured[0], configured[1]
        if self._handlers:
            self._handlers = False
            _, _, self._authorizer, self._tick, self._trace = configured
            super().set_trace_callback(self._trace)
            self.install()
        if sys.getrefcount(self) - living > self._references:
            self._end_strays()
        based, self._based, self._kept, self._began = self._based, False, False, False
        self._names.clear()
        keeper = cast("Keeper", self.keeper)
        if self._pragmas:
            pragmas, self._pragmas = self._pragmas, []
            for name, value in reversed(pragmas):
                keeper.control(f"PRAGMA {name} = {value:d}")
        if based and self.in_transaction:
            if not keep:
                keeper.control(f"ROLLBACK TO {_BASE}")
            keeper.control(f"RELEASE {_BASE}")

    def end_cursors(self) -> int:
        """Ends the cursors that were made by a function, or before the connection was prepared; gives how many lived.

        One that lives on, in a traceback say, would keep the files open behind `close()`.
        """
        living = 0
        for made in self._made:
            cursor = made()
            if cursor is not None:
                living += 1
                self._end(cursor)
                del cursor
        self._made.clear()
        return living

    def _end(self, cursor: Any) -> None:
        with contextlib.suppress(Exception):
            cursor.close()
        with contextlib.suppress(TypeError):  # a class of the user's own, of another shape
            if isinstance(cursor, self.module.Cursor):
                cursor.__class__ = self.ended_class

    def _end_strays(self) -> None:
        """Ends statements of cursors that were made without asking this connection."""
        try:
            super().create_function("_database_probe", 0, _probe)  # refused while a statement runs
        except self.module.Error:
            keeper = cast("Keeper", self.keeper)
            for referrer in gc.get_referrers(self):
                if isinstance(referrer, self.module.Cursor) and not keeper.owns(referrer):
                    self._end(referrer)

    # For cursors

    def check(self) -> None:
        """Refuses whoever is not entitled to use the connection now."""
        if get_ident() != self._thread:
            raise self.module.ProgrammingError(f"this connection {_AWAY}")

    def enter(self, sql: str) -> bool:
        """Called before a statement is executed; whether it is to be done by `control`.

        Raises:
            TransactionError: SQLite has ended the transaction.
        """
        if not self.lent:
            self.check()
            return False
        self.usable()
        if not self._based and cast("Keeper", self.keeper).writes():
            self._base()
        special = _known.get(sql)
        return _is_special(sql) if special is None else special

    def usable(self) -> None:
        """Refuses what would be done outside the transaction."""
        if get_ident() != self._thread:
            self.check()
        if self._over is not None:
            raise TransactionError(self._over)
        if not self.in_transaction:
            self._over = ENDED_BY_ITSELF
            raise TransactionError(self._over)

    def failed(self, error: Exception, sql: str, parameters: Any) -> None:
        """A statement has failed. Remembers it, for the error may reach the caller."""
        if not self.lent:
            return
        if isinstance(error, self.module.Error):
            self.failure = error, sql, parameters
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                self._over = ENDED_BY_ITSELF
            elif cast("Keeper", self.keeper).denied():
                raise Alone

    def control(self, cursor: Any, sql: str) -> None:
        """Does what a text asks for that begins with a word like COMMIT or PRAGMA."""
        what, name = analysis.control(sql)
        if what == "PRAGMA":
            keeper = cast("Keeper", self.keeper)
            if name in RESTORED_PRAGMAS and (name in _HARMLESS_PRAGMAS or keeper.writes()):
                found = self.plain_cursor().execute(f"PRAGMA {name}").fetchone()
                if found is not None and type(found[0]) is int:
                    self._pragmas.append((name, found[0]))
                    keeper.control(sql, cursor)
                    return
            what = ""
        if what == "":  # a question, or nothing that SQLite would understand: it has the word
            try:
                self.module.Cursor.execute(cursor, sql)
            except Exception as error:
                self.failed(error, sql, ())
                raise
        elif what == "BEGIN":
            if self._began or self._names:
                raise self.module.OperationalError("cannot start a transaction within a transaction")
            self.commit()
            self._began = True
        elif what == "COMMIT":
            self.commit()
        elif what == "ROLLBACK":
            self.rollback()
        else:
            self._base()
            self._savepoint(what, name)

    def _savepoint(self, what: str, name: str) -> None:
        folded, names = name.lower(), self._names
        quoted = f'"{name.replace(chr(34), chr(34) * 2)}"'
        control = cast("Keeper", self.keeper).control
        if what == "SAVEPOINT":
            control(f"SAVEPOINT {quoted}")
            names.append(folded)
            return
        if folded not in names:
            raise self.module.OperationalError(f"no such savepoint: {name}")
        position = len(names) - 1 - names[::-1].index(folded)
        control(f"{what} {quoted}")
        del names[position + (what != "RELEASE") :]

    def _base(self) -> None:
        if not self._based:
            cast("Keeper", self.keeper).control(f"SAVEPOINT {_BASE}")
            self._based = True

    def _altering(self) -> None:
        if self.lent:
            self.usable()
            cast("Keeper", self.keeper).alter()
        else:
            self.check()

    # What a function may call

    def cursor(self, factory: Any = None) -> Any:
        """As `sqlite3.Connection.cursor`; it ends with the function."""
        if not self.lent:
            self.check()
        if factory is None or factory is self.module.Cursor:
            cursor = super().cursor(self.cursor_class)
        elif isinstance(factory, type) and issubclass(factory, self.module.Cursor):
            cursor = super().cursor(_watched(factory, self.cursor_class))
        else:
            cursor = super().cursor(factory)
        if self.lent or self.keeper is None:
            made = self._made
            if len(made) >= 64 and not len(made) & (len(made) - 1):
                made[:] = [each for each in made if each() is not None]
            made.append(ref(cursor))
        return cursor

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As `sqlite3.Connection.execute`."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Any:
        """As `sqlite3.Connection.executemany`."""
        return self.cursor().executemany(sql, parameters)

    def executescript(self, sql_script: str, /) -> Any:
        """The statements of a script one after the other, inside the transaction that is open."""
        return self.cursor().executescript(sql_script)

    def commit(self) -> None:
        """Keeps what the function has done so far, as long as the function itself does not raise."""
        if not self.lent:
            self.check()
            super().commit()
            return
        self.usable()
        keeper = cast("Keeper", self.keeper)
        if self._based:
            if self._kept:
                keeper.control(f"RELEASE {_KEPT}")
            keeper.control(f"SAVEPOINT {_KEPT}")
            self._kept = True
        self._names.clear()
        self._began = False

    def rollback(self) -> None:
        """Undoes what the function has done since its last `commit()`, or since its beginning."""
        if not self.lent:
            self.check()
            super().rollback()
            return
        self.usable()
        if self._based:
            cast("Keeper", self.keeper).control(f"ROLLBACK TO {_KEPT if self._kept else _BASE}")
        self._names.clear()
        self._began = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> Literal[False]:
        if kind is None:
            self.commit()
        else:
            self.rollback()
        return False

    def close(self) -> None:
        """Ends the function's use of the connection, which is the pool's; what it has done stays."""
        if not self.lent:
            if self.keeper is None:  # opened to look at something: a cursor in a traceback would keep the file open
                self.end_cursors()
            super().close()
            return
        self.check()
        for made in self._made:
            cursor = made()
            if cursor is not None:
                self._end(cursor)
        self._over = "this function has closed its connection; nothing more can be done with it"

    @property
    def isolation_level(self) -> Any:
        """What `sqlite3` would do on its own; here the transaction is open already, and nothing comes of it."""
        return self._isolation

    @isolation_level.setter
    def isolation_level(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if value is not None and (
            not isinstance(value, str) or value.upper() not in ("", "DEFERRED", "IMMEDIATE", "EXCLUSIVE")
        ):
            raise (ValueError if isinstance(value, str) else TypeError)(
                "isolation_level must be '', 'DEFERRED', 'IMMEDIATE', 'EXCLUSIVE' or None"
            )
        if value is None and self.lent:
            self.commit()
        self._isolation = value

    def blobopen(self, *args: Any, **kwargs: Any) -> Any:
        """As `sqlite3.Connection.blobopen`; it ends with the function."""
        if not self.lent:
            self.check()
            return super().blobopen(*args, **kwargs)
        self.enter("")
        blob = super().blobopen(*args, **kwargs)
        self._made.append(ref(blob))
        return blob

    def set_authorizer(self, authorizer_callback: Any) -> None:
        """As `sqlite3.Connection.set_authorizer`; the package's own is asked first."""
        self.check()
        self._authorizer = authorizer_callback
        self._install_again(lambda: super(Lent, self).set_authorizer(authorizer_callback))

    def set_progress_handler(self, progress_handler: Any, n: int) -> None:
        """As `sqlite3.Connection.set_progress_handler`; the package's own is asked first."""
        self.check()
        self._tick = None if progress_handler is None or n < 1 else (progress_handler, n)
        self._install_again(lambda: super(Lent, self).set_progress_handler(progress_handler, n))

    def set_trace_callback(self, trace_callback: Any) -> None:
        """As `sqlite3.Connection.set_trace_callback`, for as long as the function runs."""
        self.check()
        self._trace = trace_callback
        self._handlers = self.lent
        super().set_trace_callback(trace_callback)

    def setlimit(self, category: int, limit: int, /) -> int:
        """As `sqlite3.Connection.setlimit`; behind the function the limit is what it was."""
        self.check()
        before = super().setlimit(category, limit)
        if self.lent:
            self._limits.append((category, before))
        return before

    def deserialize(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: what the function has done so far would be gone, and the file with it."""
        raise self.module.NotSupportedError(
            "deserialize() would exchange the pool's database for a copy in memory: use a connection of your own,"
            " sqlite3.connect(':memory:')"
        )

    def _install_again(self, otherwise: Callable[[], None]) -> None:
        if self._guard is None:
            otherwise()
        else:
            self._handlers = self.lent
            self.install()


def _altering(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._altering()
        return getattr(super(Lent, self), name)(*args, **kwargs)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"As `sqlite3.Connection.{name}`; behind the transaction the connection is exchanged."
    return method


_ALTERING = (
    "create_aggregate",
    "create_collation",
    "create_function",
    "create_window_function",
    "enable_load_extension",
    "load_extension",
    "setconfig",
)

for _name in _ALTERING:
    setattr(Lent, _name, _altering(_name))


class _Autocommit:
    """`autocommit`, from Python 3.12 on: see `isolation_level`."""

    def __get__(self, connection: Any, _kind: Any) -> Any:
        return self if connection is None else connection._autocommit

    def __set__(self, connection: Any, value: Any) -> None:
        if value is True and connection.lent:
            connection.commit()
        connection._autocommit = value


def _probe() -> None:
    """A function of SQL's that nobody calls: SQLite refuses to replace it while a statement runs."""


def _ended(*_args: Any, **_kwargs: Any) -> Any:
    raise TransactionError(_OVER)


def _ended_class(module: ModuleType) -> type[Any]:
    names = ("execute", "executemany", "executescript", "fetchone", "fetchmany", "fetchall", "__iter__", "__next__")
    return type("EndedCursor", (module.Cursor,), {"__slots__": (), **dict.fromkeys(names, _ended)})


def _watched(factory: Any, cursor_class: Any) -> Any:
    """The user's own class of cursors, which asks ours before it asks `sqlite3`."""
    if issubclass(factory, LentCursor):
        return factory
    watched = _watching.get(factory)
    if watched is None:
        watched = _watching[factory] = type(factory.__name__, (factory, cursor_class), {})
    return watched


_watching: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@functools.cache
def connection_class(module: ModuleType) -> type[Lent]:
    """The class for `connect(factory=...)` of `sqlite3`, or of a drop-in for it."""
    cursor_class = type("RawCursor", (LentCursor, module.Cursor), {"__slots__": ()})
    body: dict[str, Any] = {"module": module, "cursor_class": cursor_class, "ended_class": _ended_class(module)}
    if hasattr(module.Connection, "autocommit"):
        body["autocommit"] = _Autocommit()
    for name in (*_ALTERING, "blobopen"):
        if not hasattr(module.Connection, name) and name in vars(Lent):
            body[name] = _missing(name)
    return type("RawConnection", (Lent, module.Connection), body)


def _missing(name: str) -> Any:
    def get(_self: Any) -> Any:
        raise AttributeError(f"this build of SQLite has no {name}()")

    return property(get)


RawConnection = connection_class(sqlite3)  # pyright: ignore[reportArgumentType]  - a module can be hashed
RawCursor = RawConnection.cursor_class
