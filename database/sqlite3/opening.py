"""Opening a connection, and making it what the configuration says it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from database import errors
from database.engine.contract import Role
from database.settings import SqliteSettings
from database.sqlite3 import files
from database.sqlite3.connection import SqliteSession
from database.sqlite3.failures import BUSY_SLICE, Patience, reason
from database.sqlite3.raw import CACHED, Lent, RawConnection

__all__ = ["open_session"]


def open_session(settings: SqliteSettings, path: str, role: Role, progress: Callable[[], bool]) -> SqliteSession:
    """Opens a connection and applies the settings, each read back.

    Raises:
        ConnectionFailedError: It cannot be opened, it is no database, or a PRAGMA did not take.
    """
    readonly = role == "reader"
    file = Path(path).absolute()
    try:
        if not readonly:
            file.parent.mkdir(parents=True, exist_ok=True)
            files.create(file, exist_ok=True)
        identity = files.identity(file)
        if identity in files.inherited:
            raise errors.ConnectionFailedError(str(path), _FORKED)
    except OSError as error:
        raise errors.ConnectionFailedError(str(path), reason(file, error)) from error

    def connect() -> Lent:
        return _connect(settings, file, path, progress, readonly=readonly)

    return SqliteSession(
        connect(),
        files.write_lock(file),
        progress,
        readonly=readonly,
        patience=settings.busy_timeout / 1000,
        identity=identity,
        reopen=connect,
    )


def _connect(settings: SqliteSettings, file: Path, path: str, progress: Callable[[], bool], *, readonly: bool) -> Lent:
    try:
        raw = sqlite3.connect(
            files.uri(file, "ro" if readonly else "rw"),
            uri=True,
            timeout=min(BUSY_SLICE, settings.busy_timeout / 1000),
            isolation_level=None,
            check_same_thread=False,  # for `interrupt`; all else happens on the worker's thread
            cached_statements=CACHED,
            factory=RawConnection,
        )
    except (OSError, sqlite3.Error) as error:
        raise errors.ConnectionFailedError(str(path), reason(file, error)) from error
    try:
        _apply(raw, settings, path, progress, readonly=readonly)
    except BaseException as error:
        raw.close()
        if isinstance(error, sqlite3.Error):
            raise errors.ConnectionFailedError(str(path), reason(file, error)) from error
        raise
    return raw


def _apply(
    raw: sqlite3.Connection, settings: SqliteSettings, path: str, progress: Callable[[], bool], *, readonly: bool
) -> None:
    wanted: list[tuple[str, object, object]] = [
        ("cache_size", settings.cache_size, settings.cache_size),
        ("foreign_keys", int(settings.foreign_keys), int(settings.foreign_keys)),
        ("synchronous", settings.synchronous, ("OFF", "NORMAL", "FULL", "EXTRA").index(settings.synchronous)),
    ]
    # The journal mode is the file's, or the writer's to set; a reader only sees that it is as it should be.
    journal = (settings.journal_mode, settings.journal_mode.lower())
    patience = Patience(settings.busy_timeout / 1000, progress)
    while True:
        try:
            if readonly:
                if settings.journal_mode == "WAL":
                    _expect(path, "journal_mode", raw.execute("PRAGMA journal_mode").fetchone()[0], journal[1])
            else:
                _expect(
                    path,
                    "journal_mode",
                    raw.execute(f"PRAGMA journal_mode = {journal[0]}").fetchone()[0],
                    journal[1],
                )
            for name, value, shown in wanted:
                raw.execute(f"PRAGMA {name} = {value}")  # names and values were checked against fixed lists and types
                _expect(path, name, raw.execute(f"PRAGMA {name}").fetchone()[0], shown)
            return
        except sqlite3.OperationalError as error:
            patience.wait(error)


def _expect(path: str, name: str, found: object, wanted: object) -> None:
    if str(found).lower() != str(wanted).lower():
        raise errors.ConnectionFailedError(
            path,
            f"PRAGMA {name} did not take: it is {found!r} instead of {wanted!r}; change {name} in the configuration",
        )


_FORKED = (
    "this process was forked while its parent had a transaction or a statement running on this database. SQLite keeps"
    " its locks per process, so using the file here could lose data. Fork when the database is at rest, or start the"
    " process by multiprocessing's 'spawn' or 'forkserver'"
)
