"""Lending a connection to a function, and taking it back clean: what `db.run` rests on.

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

Threads. All of it runs on the thread that opened the connection. The package's own statements go through cursors of the
base class (`plain_cursor`), for which none of this costs anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Generator
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import ref

from database.engine.adapting import PLAIN
from database.engine.contract import Alone
from database.engine.statement import quoted
from database.errors import TransactionError
from database.sqlite3 import analysis

__all__ = ["CACHED", "ENDED_BY_ITSELF", "Keeper", "Lending"]

if TYPE_CHECKING:
    _Connection = sqlite3.Connection
else:
    _Connection = object

CACHED = 256
"""Statements that each connection keeps prepared, at the most."""
CACHED_CHARACTERS = 2_000_000
"""Characters of new texts, and more, after which it forgets them all: long texts are seldom sent twice."""

ENDED_BY_ITSELF = (
    "SQLite has rolled this transaction back by itself, after an error or an interruption that was caught: nothing of it"
    " is kept, and nothing more can be done in it. Let the error go on, and run the function again"
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
        "journal_size_limit",
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

_ON = re.compile(r"""(?:\bON|\bTRUE|\bYES|[1-9])[\s;)'"]*\Z""", re.IGNORECASE)
_REFERRED = (
    'SELECT lower(k."table") FROM sqlite_master AS t, pragma_foreign_key_list(t.name) AS k'
    " WHERE t.type = 'table' AND k.on_delete NOT IN ('NO ACTION', 'RESTRICT')"
)
"""Tables whose rows take others with them."""

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


class Lending(_Connection):
    """The connection, as the package and our cursors see it: see the head of this module."""

    module: ModuleType
    """`sqlite3`, or the drop-in that this connection comes from."""
    ended_class: type[Any]

    lent = False
    keeper: Keeper
    """The package's `Connection`, once this is `ready`."""
    ready = False
    """Whether it has been prepared."""
    plain = True
    """Whether a statement of plain values calls nothing of the user's on it."""
    failure: tuple[BaseException, str, Any] | None = None
    """What a function's last failed statement was."""
    forbidden = False
    """Whether it was the user's authorizer that has just refused something."""
    cached = 0
    """Characters of SQL that have been prepared since the statement cache was emptied last."""

    protected: frozenset[str] = frozenset()
    """Tables that must not be dropped now: see `_without_keys`."""

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
        if any(kind in PLAIN for kind, _ in getattr(self.module, "adapters", ())):
            self.plain = False  # somebody has told the library how to store texts or numbers
        self.keeper, self.ready = keeper, True

    def install(self) -> None:
        """Sets the authorizer anew, by which every cached statement is checked again, and the progress handler."""
        guard, authorizer = self._guard, self._authorizer
        if authorizer is None:
            super().set_authorizer(guard)
        else:

            def both(*arguments: Any) -> int:
                found: int = guard(*arguments)
                if not found:
                    found = authorizer(*arguments)
                    self.forbidden = found == sqlite3.SQLITE_DENY
                return found

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
        self.protected = frozenset()
        keeper = self.keeper
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
                self.end(cursor)
                del cursor
        self._made.clear()
        return living

    def end(self, cursor: Any) -> None:
        """Ends a cursor or a blob: what is done with it from now on is refused."""
        if not isinstance(cursor, self.module.Cursor):
            with contextlib.suppress(Exception):
                cursor.close()
            return
        with contextlib.suppress(Exception):
            self.module.Cursor.close(cursor)  # a class of the user's own may do something else in its `close`, or raise
        with contextlib.suppress(TypeError):  # a class of another shape
            cursor.__class__ = self.ended_class

    def _end_strays(self) -> None:
        """Ends statements of cursors that were made without asking this connection."""
        try:
            super().create_function("_database_probe", 0, _probe)  # refused while a statement runs
        except self.module.Error:
            keeper = self.keeper
            for referrer in gc.get_referrers(self):
                if isinstance(referrer, self.module.Cursor) and not keeper.owns(referrer):
                    self.end(referrer)

    # For cursors

    @contextlib.contextmanager
    def as_text(self) -> Generator[None]:
        """TEXT comes as `str` meanwhile: a user may have set another `text_factory`."""
        factory, self.text_factory = self.text_factory, str
        try:
            yield
        finally:
            self.text_factory = factory

    def is_here(self) -> bool:
        """Whether the caller runs on the connection's own thread."""
        return get_ident() == self._thread

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
        if not self._based and self.keeper.writes():
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
            elif self.keeper.denied():
                raise Alone

    # The function's transaction, inside the package's

    def control(self, cursor: Any, sql: str) -> None:
        """Does what a text asks for that begins with a word like COMMIT or PRAGMA."""
        what, name = analysis.control(sql)
        if what == "PRAGMA":
            keeper = self.keeper
            if name == "foreign_keys":
                self._without_keys(sql)
            attached = "." in sql[: re.search("[=(]", sql).start()]  # type: ignore[union-attr]  # of one file among several
            if name in RESTORED_PRAGMAS and not attached and (name in _HARMLESS_PRAGMAS or keeper.writes()):
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

    def _without_keys(self, sql: str) -> None:
        """`PRAGMA foreign_keys` does nothing within a transaction (sqlite.org/pragma.html#pragma_foreign_keys).

        Who then drops a table, in order to make it anew, takes it that the rows which refer to it stay.
        """
        self.protected = frozenset()
        if _ON.search(sql):
            return
        with self.as_text():
            cursor = self.plain_cursor()
            cursor.row_factory = None
            if cursor.execute("PRAGMA foreign_keys").fetchall() == [(1,)]:
                self.protected = frozenset(table for (table,) in cursor.execute(_REFERRED))
        if self.protected:
            self.install()  # and what is cached is looked at again

    def _savepoint(self, what: str, name: str) -> None:
        folded, names = name.lower(), self._names
        control = self.keeper.control
        if what == "SAVEPOINT":
            control(f"SAVEPOINT {quoted(name)}")
            names.append(folded)
            return
        if folded not in names:
            raise self.module.OperationalError(f"no such savepoint: {name}")
        position = len(names) - 1 - names[::-1].index(folded)
        control(f"{what} {quoted(name)}")
        del names[position + (what != "RELEASE") :]

    def _base(self) -> None:
        if not self._based:
            self.keeper.control(f"SAVEPOINT {_BASE}")
            self._based = True

    def commit(self) -> None:
        """Keeps what the function has done so far, as long as the function itself does not raise."""
        if not self.lent:
            self.check()
            super().commit()
            return
        self.usable()
        keeper = self.keeper
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
            self.keeper.control(f"ROLLBACK TO {_KEPT if self._kept else _BASE}")
        self._names.clear()
        self._began = False

    def altering(self) -> None:
        """A function is about to change the connection itself: see `Keeper.alter`."""
        if self.lent:
            self.usable()
            self.keeper.alter()
        else:
            self.check()


def _probe() -> None:
    """A function of SQL's that nobody calls: SQLite refuses to replace it while a statement runs."""
