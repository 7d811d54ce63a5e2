"""A `sqlite3.Connection` that fails when it is told to: every call that reaches SQLite is counted and can be hit.

It is put below the package, where `sqlite3.connect` is, so all of the package's own code runs as it is.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from database.sqlite3.raw import LentCursor, RawConnection

CODES = {
    "busy": (sqlite3.SQLITE_BUSY, "SQLITE_BUSY", "database is locked"),
    "io": (sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE", "disk I/O error"),
    "full": (sqlite3.SQLITE_FULL, "SQLITE_FULL", "database or disk is full"),
    "corrupt": (sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT", "database disk image is malformed"),
    "interrupt": (sqlite3.SQLITE_INTERRUPT, "SQLITE_INTERRUPT", "interrupted"),
    "memory": (sqlite3.SQLITE_NOMEM, "SQLITE_NOMEM", "out of memory"),
}

Moment = str
"""`before`: SQLite never saw it. `rolled back`: and it has rolled the transaction back, as after a full disk.
`after`: it was carried out, and then reported as failed, as a COMMIT can be whose last sync went wrong."""


def make_error(name: str) -> sqlite3.Error:
    """The error that `sqlite3` raises for a result code."""
    code, code_name, message = CODES[name]
    kind: type[sqlite3.Error] = sqlite3.OperationalError
    if name == "corrupt":
        kind = sqlite3.DatabaseError
    error = kind(message)
    error.sqlite_errorcode = code
    error.sqlite_errorname = code_name
    return error


@dataclass
class Fault:
    """What is to fail, and whether it has."""

    error: str
    moment: Moment = "before"
    at: int | None = None
    """The number of the call that is hit, from 1."""
    when: Callable[[str], bool] | None = None
    """Or which text is hit."""
    times: int = 1
    struck: list[str] = field(default_factory=list)


class Faults:
    """All connections that were opened, their calls, and the fault that waits for its turn."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fault: Fault | None = None
        self.open: set[int] = set()
        self.opened = 0
        self.struck: list[Fault] = []
        self._storm: tuple[random.Random, float, list[tuple[str, Moment]]] | None = None
        self._lock = threading.Lock()

    def plan(self, fault: Fault | None) -> None:
        with self._lock:
            self.calls.clear()
            self.fault = fault
            self._storm = None

    def storm(self, chance: random.Random, rate: float, kinds: list[tuple[str, Moment]]) -> list[Fault]:
        """From now on calls fail at random, until `plan`; gives the list of what struck, which grows."""
        with self._lock:
            self._storm = chance, rate, kinds
            self.struck = []
            return self.struck

    def hit(self, what: str) -> Fault | None:
        with self._lock:
            self.calls.append(what)
            fault = self.fault
            if self._storm is not None:
                chance, rate, kinds = self._storm
                if chance.random() >= rate:
                    return None
                fault = Fault(*chance.choice(kinds), struck=[what])
                self.struck.append(fault)
                return fault
            if fault is None or len(fault.struck) >= fault.times:
                return None
            if fault.at is not None:
                if len(self.calls) != fault.at:
                    return None
            elif fault.when is None or not fault.when(what):
                return None
            fault.struck.append(what)
            return fault

    def through(self, connection: Any, what: str, call: Callable[..., Any], *args: Any) -> Any:
        fault = self.hit(what)
        if fault is None:
            return call(*args)
        if fault.moment == "after":
            call(*args)
        elif fault.moment == "rolled back" and connection.in_transaction:
            sqlite3.Connection.set_authorizer(connection, None)  # SQLite itself asks nobody
            sqlite3.Connection.rollback(connection)
            connection.install()
        raise make_error(fault.error)


FAULTS = Faults()


class Cursor(sqlite3.Cursor):
    """Fails in `execute`, `executemany` and where rows are fetched."""

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        return FAULTS.through(self.connection, sql, super().execute, sql, parameters)

    def executemany(self, sql: str, parameters: Any) -> Any:
        return FAULTS.through(self.connection, sql, super().executemany, sql, parameters)

    def fetchmany(self, size: int | None = 1) -> Any:
        return FAULTS.through(self.connection, "fetch", super().fetchmany, size)

    def fetchone(self) -> Any:
        return FAULTS.through(self.connection, "fetch", super().fetchone)

    def fetchall(self) -> Any:
        return FAULTS.through(self.connection, "fetch", super().fetchall)


class LentFaultyCursor(LentCursor, Cursor):
    """The same for the cursors of a function that has been lent the connection."""


class Connection(RawConnection):
    """Fails like its cursors, and in `close`."""

    cursor_class = LentFaultyCursor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A kept error keeps the frames of this module, and so cursors that `sqlite3` itself would have let go.
        self.cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        FAULTS.open.add(id(self))
        FAULTS.opened += 1

    def plain_cursor(self) -> sqlite3.Cursor:
        made = sqlite3.Connection.cursor(self, Cursor)
        self.cursors.add(made)
        return made

    def cursor(self, factory: Any = None) -> Any:
        made = super().cursor(factory)
        self.cursors.add(made)
        return made

    def close(self) -> None:
        # However it fails: the real close_v2 always frees the connection.
        fault = FAULTS.hit("close")
        for cursor in tuple(self.cursors):
            cursor.close()
        super().close()
        FAULTS.open.discard(id(self))
        if fault is not None:
            raise make_error(fault.error)


@contextmanager
def faulty() -> Iterator[Faults]:
    """Every connection that `sqlite3.connect` opens meanwhile can be made to fail."""
    real = sqlite3.connect

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        fault = FAULTS.hit("connect")
        if fault is not None:
            raise make_error(fault.error)
        if kwargs.get("factory") is RawConnection:
            kwargs["factory"] = Connection
        return real(*args, **kwargs)

    FAULTS.plan(None)
    FAULTS.open.clear()
    FAULTS.opened = 0
    sqlite3.connect = connect  # type: ignore[assignment]
    try:
        yield FAULTS
    finally:
        FAULTS.plan(None)
        sqlite3.connect = real
