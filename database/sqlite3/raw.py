"""Our own connection class: what `db.run` hands to a function. How it comes back from it clean stands in `lending`.

It has all methods of `sqlite3.Connection`, and its cursors those of `sqlite3.Cursor`; only that they are watched while the
connection is lent. Who calls from another thread than the connection's is told so; only `interrupt` may be called from
anywhere.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary, ref

from database.errors import TransactionError
from database.sqlite3 import analysis
from database.sqlite3.failures import UNKNOWN
from database.sqlite3.lending import Lending

__all__ = ["Lent", "LentCursor", "RawConnection", "RawCursor", "connection_class"]

if TYPE_CHECKING:
    _Cursor = sqlite3.Cursor
else:
    _Cursor = object

_OVER = (
    "this cursor has ended with the function given to db.run() that made it: fetch its rows inside the function, and return"
    " them as a list"
)


class LentCursor(_Cursor):
    """A cursor of a connection that may be lent: looks at what it executes."""

    __slots__ = ()

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As `sqlite3.Cursor.execute`; what controls the transaction does so inside the one that is open."""
        connection = cast("Lending", self.connection)
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
        connection = cast("Lending", self.connection)
        connection.enter(sql)
        try:
            return super().executemany(sql, parameters)
        except Exception as error:
            connection.failed(error, sql, UNKNOWN)
            raise

    def executescript(self, sql_script: str, /) -> Any:
        """The statements of a script one after the other, inside the transaction that is open."""
        connection = cast("Lending", self.connection)
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


class Lent(Lending):
    """The connection, with all that a function may call: as `sqlite3.Connection`, where this says nothing else."""

    cursor_class: type[Any]

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
        if self.lent or not self.ready:
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
            if not self.ready:  # opened to look at something: a cursor in a traceback would keep the file open
                self.end_cursors()
            super().close()
            return
        self.check()
        for made in self._made:
            cursor = made()
            if cursor is not None:
                self.end(cursor)
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
        if not kwargs.get("readonly") and not self.keeper.writes():  # of blobs, SQLite does not ask the authorizer
            error = self.module.OperationalError(
                "attempt to write a readonly database: open the blob with readonly=True"
            )
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_READONLY, "SQLITE_READONLY"
            raise error
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

    def backup(self, *args: Any, **kwargs: Any) -> None:
        """As `sqlite3.Connection.backup`, where no transaction that may write is open: SQLite would wait for that for ever."""
        if not self.lent:
            self.check()
        else:
            self.usable()
            if self.keeper.writes():
                raise self.module.NotSupportedError(
                    "backup() cannot copy a database within a transaction that may write, which is open around this"
                    " function: use `await db.backup(path)`, or db.run(function, readonly=True) outside of one"
                )
        super().backup(*args, **kwargs)

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
        self.altering()
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
