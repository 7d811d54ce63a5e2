"""A connection and its transactions: the lock, BEGIN, the levels, and what becomes of it in the end.

The writer is the only connection that writes and checkpoints; readers are opened with `mode=ro`, which no SQL can
change. The statements of this module carry a trailing comment that nobody can guess. `sqlite3`'s statement cache goes by
the text, and what comes out of it is not shown to the authorizer again: so nobody else's text may equal one of ours.

A connection that a transaction has changed (a PRAGMA, ATTACH, a temporary table) is exchanged for a new one behind it.

Threads. All of it runs on the connection's own thread, but `interrupt` and `excludes`.

Facts this rests on (sqlite.org/lang_transaction.html, /wal.html): BEGIN IMMEDIATE on a read-only connection pins its snapshot
at once and takes no lock; a connection that closes last checkpoints and removes the `-wal` file.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

from database.engine.contract import Interrupted
from database.errors import ConnectionFailedError
from database.sqlite3 import files
from database.sqlite3.failures import is_busy
from database.sqlite3.guard import MARK, Guard
from database.sqlite3.library import classes
from database.sqlite3.raw import Lent

__all__ = ["Levels"]

PROGRESS_STEPS = 10_000
"""Steps of SQLite's machine between two calls of the progress handler: some 80 µs of the CPU's time."""

_BEGIN = f"BEGIN IMMEDIATE {MARK}"
_COMMIT = f"COMMIT {MARK}"
_ROLLBACK = f"ROLLBACK {MARK}"

_SAVEPOINT = f"SAVEPOINT level_0 {MARK}"
_RELEASE = f"RELEASE level_0 {MARK}"
"""Around every unit of a group, so not put together each time."""


class Levels(Guard):
    """A connection with its open transaction and savepoints, and the cursors that end with it."""

    __slots__ = (
        "_counts",
        "_lock",
        "_locked",
        "_progress",
        "_reopen",
        "_row_class",
        "_streams",
        "_unopened",
        "identities",
    )

    def __init__(
        self,
        raw: Lent,
        lock: Lock | files.Locks,
        progress: Callable[[], bool],
        *,
        readonly: bool,
        identities: tuple[tuple[int, int], ...],
        row_class: type[Any],
        reopen: Callable[[], Lent] | None,
    ) -> None:
        super().__init__(readonly=readonly)
        self.identities = identities
        self._unopened: ConnectionFailedError | None = None
        """Why there is no new connection in the place of the one that was given up."""
        """Of its files: the database and what is attached to it."""
        self._row_class = row_class
        """`Row`, on top of the library that this connection is of."""
        self._reopen = reopen
        """Opens a new connection, just as this one was opened."""
        self._lock = lock
        self._locked = False
        self._progress = progress
        self._streams: dict[int, sqlite3.Cursor] = {}
        self._counts: dict[int, int] = {}
        """Of streams of records: how many have been made."""
        files.opened.update(identities)
        self._take(raw)

    def _take(self, raw: Lent) -> None:
        self.raw = raw
        raw.row_factory = self._row_class
        raw.prepared(self, self._authorize, self._progress, PROGRESS_STEPS)
        self.plain = raw.plain
        self._cursor = raw.plain_cursor()

    def _exchange(self) -> None:
        """Replaces the connection by a new one, which is as the configuration says."""
        self._changed = self._schema_writable = False
        self._rowids.clear()
        if self._reopen is None:
            return
        old = self.raw
        self._cursor.close()
        with contextlib.suppress(*classes.Error):
            if old.plain_cursor().execute("PRAGMA locking_mode").fetchone()[0] == "exclusive":
                old.close()  # nobody else could open the file
        try:
            self._take(self._reopen())
        except ConnectionFailedError as error:
            # What was to be done is done. The next statement fails for a closed connection, and the pool opens another.
            self._unopened = error
        finally:
            old.close()

    def _control(self, sql: str) -> None:
        self._admitting = True
        try:
            self._cursor.execute(sql)
        finally:
            self._admitting = False

    def owns(self, cursor: Any) -> bool:
        """See `Keeper`."""
        return cursor is self._cursor or any(cursor is each for each in self._streams.values())

    def close_stream(self, key: Any, _params: Any = None, _extra: Any = None) -> None:
        """Stops reading."""
        cursor = self._streams.pop(key, None)
        self._counts.pop(key, None)
        if cursor is not None:
            cursor.close()

    def _close_streams(self) -> None:
        for key in tuple(self._streams):
            self.close_stream(key)

    # Transactions

    @property
    def in_transaction(self) -> bool:
        """See `Connection`. A connection that was given up has none."""
        try:
            return self.raw.in_transaction
        except classes.ProgrammingError:
            return False

    @property
    def excludes(self) -> bool:
        """Whether it keeps a lock on the file while nothing runs: for a transaction, or for a stream. Any thread."""
        return bool(self._streams) or self.in_transaction

    def try_lock(self, seconds: float) -> bool:
        """See `Connection`."""
        if self._locked:
            return True
        self._locked = self._lock.acquire(timeout=seconds) if seconds else self._lock.acquire(blocking=False)
        return self._locked

    def unlock(self) -> None:
        """See `Connection`."""
        if self._locked:
            self._locked = False
            self._lock.release()

    def begin(self, *, readonly: bool) -> None:
        """See `Connection`."""
        self._control(_BEGIN)
        if readonly and not self.readonly:
            self.restrict(True)

    def begin_patiently(self, seconds: float, *, readonly: bool = False) -> None:
        """Begins a transaction, waiting that long for other processes, unless the caller goes away."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.begin(readonly=readonly)
            except classes.OperationalError as error:
                if not is_busy(error) or time.monotonic() >= deadline or self._progress():
                    raise
            else:
                if not self._progress():
                    return
                self.rollback()  # gone since the last try
                raise Interrupted
            time.sleep(0.002)

    def commit(self) -> None:
        """See `Connection`."""
        self._close_streams()
        self._control(_COMMIT)
        if self._restricted and not self.readonly:
            self.restrict(False)
        if self._changed:
            self._exchange()

    def rollback(self) -> None:
        """See `Connection`."""
        self._close_streams()
        if self.raw.in_transaction:
            self._control(_ROLLBACK)
        if self._restricted and not self.readonly:
            self.restrict(False)
        if self._changed:
            self._exchange()

    def savepoint(self, number: int) -> None:
        """See `Connection`."""
        self._control(_SAVEPOINT if number == 0 else f"SAVEPOINT level_{number} {MARK}")

    def release(self, number: int) -> None:
        """See `Connection`."""
        self._control(_RELEASE if number == 0 else f"RELEASE level_{number} {MARK}")

    def undo(self, number: int) -> None:
        """See `Connection`."""
        self._control(f"ROLLBACK TO level_{number} {MARK}")
        self._control(f"RELEASE level_{number} {MARK}")

    def isolation(self, level: str) -> None:
        """See `Connection`. There is but one level here, and it is the strictest."""

    # The rest

    def empty_log(self) -> bool:
        """Checkpoints, and cuts the WAL off; False if somebody reads from it. Outside any transaction."""
        self._admitting = True
        try:
            busy = self._cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]
        except classes.OperationalError:  # another process holds a lock: there will be another time
            return False
        finally:
            self._admitting = False
        return not busy

    def interrupt(self) -> None:
        """See `Connection`."""
        with contextlib.suppress(*classes.ProgrammingError):  # it is just being exchanged
            self.raw.interrupt()

    def close(self) -> None:
        """See `Connection`. The last one out checkpoints, and only one may do so at a time."""
        held = self._locked or self.readonly or self.try_lock(1.0)
        files.opened.subtract(self.identities)
        try:
            # A cursor that some traceback keeps alive would keep its statement, and that the files open.
            self._close_streams()
            with contextlib.suppress(*classes.ProgrammingError):
                self._cursor.close()
            self.raw.close()
        finally:
            if held:
                self.unlock()

    def disown(self) -> None:
        """See `Connection`. What SQLite knows of locks on this file is inherited and wrong: it cannot be opened here."""
        # An extra reference, never given back: not even the child's own exit may finalize the connection.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.raw))
        files.inherited.update(self.identities)
