"""Opening a connection, and making it what the configuration says it is.

There is one way to do it, whoever the connection is for: a pool's readers and writer, one that takes the place of
another, the commands of `python -m database`, a backup's check. `connect` opens the file and gives SQLCipher its key;
`prepare` does all else, in this order: the package's PRAGMAs, attached files, the user's PRAGMAs, extensions, and last
`on_connect`, which may build on them. All of it on the connection's own thread.

On a reader, everything is opened with `mode=ro`, attached files too. The writer makes what is missing: folders, files
that only their owner can read, the journal mode. It is opened before the readers are.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from database import errors
from database.engine.adapting import Adapters
from database.engine.contract import Role
from database.settings.model import steps_of
from database.settings.rules import unfit_function
from database.sqlite3 import encryption, extensions, files
from database.sqlite3.connection import Connection
from database.sqlite3.failures import BUSY_SLICE, Patience, is_busy, reason
from database.sqlite3.lending import CACHED
from database.sqlite3.library import classes, load
from database.sqlite3.pragmas import CIPHER, Value, read_back, write
from database.sqlite3.raw import Lent, connection_class
from database.sqlite3.settings import SqliteSettings

__all__ = ["connect", "journal_mode", "look", "open_connection", "open_prepared", "prepare", "resolved"]

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")


def open_connection(
    settings: SqliteSettings,
    path: str,
    role: Role,
    progress: Callable[[], bool],
    *,
    create: bool = True,
    adapters: Adapters | None = None,
) -> Connection:
    """Opens a connection and applies the settings, each read back.

    Args:
        settings: Of the database.
        path: Its file.
        role: `"reader"` or `"writer"`.
        progress: See `Backend.connect`.
        create: Whether the writer makes the files that are missing.
        adapters: How types of the user's are stored.

    Raises:
        ConnectionFailedError: It cannot be opened, it is no database, or something of the settings did not take.
    """
    readonly = role == "reader"
    file = Path(path).absolute()
    attached = [Path(each).absolute() for each in settings.attach.values()]
    identities: list[tuple[int, int]] = []
    for each in (file, *attached):
        try:
            if create and not readonly:
                each.parent.mkdir(parents=True, exist_ok=True)
                files.create(each, exist_ok=True)
            identities.append(files.identity(each))
        except OSError as error:
            raise errors.ConnectionFailedError(path if each is file else str(each), reason(each, error)) from error
        if identities[-1] in files.inherited:
            raise errors.ConnectionFailedError(path if each is file else str(each), _FORKED)
    for number, each in enumerate(attached, 1):
        if identities[number] in identities[:number]:
            raise errors.ConnectionFailedError(
                str(each),
                "it is attached twice, or the database itself, by another name of the same file (a hard link)",
            )

    def reopen() -> Lent:
        return open_prepared(settings, path, progress, readonly=readonly)

    return Connection(
        reopen(),
        files.write_lock(file, *attached),
        progress,
        readonly=readonly,
        patience=settings.busy_timeout / 1000,
        identities=tuple(identities),
        row_class=load(settings.module).row_class,
        connect=partial(connect, settings),
        reopen=reopen,
        adapters=adapters,
    )


def open_prepared(
    settings: SqliteSettings, path: str, progress: Callable[[], bool] = lambda: False, *, readonly: bool
) -> Lent:
    """A raw connection, as the pool's are, without what the pool keeps about it.

    Raises:
        ConnectionFailedError: As for `open_connection`; no file is made that there is not.
    """
    file = Path(path).absolute()
    raw: Lent | None = None
    try:
        raw = connect(settings, file, "ro" if readonly else "rw", timeout=min(BUSY_SLICE, settings.busy_timeout / 1000))
        prepare(raw, settings, path, progress, readonly=readonly)
        return raw
    except BaseException as error:
        if raw is not None:
            raw.end_cursors()
            raw.close()
        if isinstance(error, (OSError, *classes.Error)):
            raise errors.ConnectionFailedError(path, _reason(file, settings, error)) from error
        raise


def connect(settings: SqliteSettings, file: Path, mode: str, *, timeout: float = 0.0) -> Lent:
    """A connection that has its key, and nothing else; `mode` is SQLite's: `ro`, `rw`, or with more parameters.

    Raises:
        ConnectionFailedError: There is no key, or it is none.
        sqlite3.Error: The file cannot be opened; that of the `module` in use.
    """
    module = load(settings.module).module
    raw: Lent = module.connect(
        files.uri(file, mode),
        uri=True,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,  # for `interrupt`; all else happens on the worker's thread
        cached_statements=CACHED,
        factory=connection_class(module),
    )
    try:
        encryption.unlock(raw, settings, file)
    except BaseException:
        raw.end_cursors()
        raw.close()
        raise
    return raw


def look(settings: SqliteSettings, path: str | Path, mode: str = "ro") -> Lent:
    """A connection for looking only: with key, attached files, extensions and functions, whatever journal mode a file has.

    Raises:
        ConnectionFailedError: There is no key, or it does not fit; an extension cannot be loaded, or `on_connect` failed.
        sqlite3.Error: The file cannot be read.
    """
    file = Path(path).absolute()
    raw: Lent | None = None
    try:
        raw = connect(settings, file, mode, timeout=settings.busy_timeout / 1000)
        raw.execute("SELECT count(*) FROM sqlite_master").fetchall()
        for name, place in settings.attach.items():
            try:
                encryption.attach(raw, settings, files.uri(Path(place), "ro"), name)
            except classes.Error as error:
                raise _not_attached(settings, name, place, error) from error
        extensions.load(raw, settings, str(path))
        _run_steps(raw, settings, str(path))
        return raw
    except BaseException as error:
        if raw is not None:
            raw.end_cursors()
            raw.close()
        if settings.encrypted and isinstance(error, classes.Error):
            raise errors.ConnectionFailedError(str(path), _reason(file, settings, error)) from error
        raise


def journal_mode(settings: SqliteSettings, path: str | Path) -> str:
    """The journal mode that a file has, where that belongs to the file: `WAL`, or `DELETE` for all others.

    Raises:
        ConnectionFailedError, sqlite3.Error: It cannot be opened.
    """
    raw = connect(settings, Path(path).absolute(), "ro")
    try:
        return "WAL" if raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal" else "DELETE"
    finally:
        raw.close()


def prepare(
    raw: Lent, settings: SqliteSettings, path: str, progress: Callable[[], bool] = lambda: False, *, readonly: bool
) -> None:
    """Makes a connection what the configuration says.

    Raises:
        ConnectionFailedError: Something did not take, an extension cannot be loaded, or `on_connect` failed.
        sqlite3.Error: The file is no database, or somebody keeps it locked.
    """
    _apply(raw, settings, path, progress, readonly=readonly)
    extensions.load(raw, settings, path)
    if settings.on_connect is not None:
        _run_steps(raw, settings, path)
        _look_again(raw, settings, path)
    raw.end_cursors()


def own_pragmas(settings: SqliteSettings) -> list[tuple[str, Value]]:
    """The PRAGMAs of a connection that have a setting of their own; the journal mode is the file's."""
    return [
        ("cache_size", settings.cache_size),
        ("foreign_keys", settings.foreign_keys),
        ("synchronous", SYNCHRONOUS.index(settings.synchronous)),
        ("wal_autocheckpoint", settings.wal_autocheckpoint),
    ]


def more_pragmas(settings: SqliteSettings) -> list[tuple[str, Value]]:
    """The others that were configured, but for those that only count before the file is looked at."""
    return [(name, value) for name, value in settings.pragmas.items() if name not in CIPHER]


def _apply(raw: Any, settings: SqliteSettings, path: str, progress: Callable[[], bool], *, readonly: bool) -> None:
    attached: set[str] = set()
    patience = Patience(settings.busy_timeout / 1000, progress)
    while True:
        try:
            _journal(raw, settings, path, readonly=readonly)
            _set(raw, path, own_pragmas(settings))
            for name, place in settings.attach.items():
                _attach(raw, settings, name, place, attached, readonly=readonly)
            _set(raw, path, more_pragmas(settings))
            return
        except classes.OperationalError as error:
            patience.wait(error)


def _set(raw: Any, path: str, pragmas: list[tuple[str, Value]], schema: str | None = None) -> None:
    for name, value in pragmas:
        raw.execute(write(name, value, schema)).fetchall()
        read_back(raw, path, name, value, schema)


def _journal(raw: Any, settings: SqliteSettings, path: str, *, readonly: bool, schema: str | None = None) -> None:
    """The journal mode is the file's, or the writer's to set; a reader only sees that it is as it should be."""
    if not readonly:
        raw.execute(write("journal_mode", settings.journal_mode, schema)).fetchall()
    elif settings.journal_mode != "WAL":
        return
    read_back(raw, path, "journal_mode", settings.journal_mode, schema)


def _attach(raw: Any, settings: SqliteSettings, name: str, place: str, attached: set[str], *, readonly: bool) -> None:
    file = Path(place).absolute()
    try:
        if name not in attached:
            encryption.attach(raw, settings, files.uri(file, "ro" if readonly else "rw"), name)
            attached.add(name)
        _journal(raw, settings, place, readonly=readonly, schema=name)
        _set(raw, place, [each for each in own_pragmas(settings) if each[0] in ("cache_size", "synchronous")], name)
    except classes.Error as error:
        if isinstance(error, classes.OperationalError) and file.exists() and is_busy(error):
            raise  # it is waited for
        raise _not_attached(settings, name, place, error) from error


def _not_attached(
    settings: SqliteSettings, name: str, place: str, error: BaseException
) -> errors.ConnectionFailedError:
    why = _reason(Path(place).absolute(), settings, error)
    return errors.ConnectionFailedError(place, f"it cannot be attached as {name!r}: {why}")


def _reason(file: Path, settings: SqliteSettings, error: BaseException) -> str:
    return (not file.is_dir() and encryption.reason(file, settings, error)) or reason(file, error)


# What code does to each connection


def resolved(settings: SqliteSettings) -> SqliteSettings:
    """The settings with functions in place of their names.

    Importing a module may take the lock of one that is being imported by this thread: so a pool does it on the event
    loop's thread, which is the one that could wait for itself.

    Raises:
        ConfigurationError: A name leads to no function.
    """
    steps = steps_of(settings.on_connect)
    if not any(isinstance(step, str) for step in steps):
        return settings
    return replace(settings, on_connect=tuple(_function(step) if isinstance(step, str) else step for step in steps))


def _function(name: str) -> Callable[[Any], object]:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise errors.ConfigurationError(f"on_connect: {module!r} cannot be imported: {error}") from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise errors.ConfigurationError(
                f"on_connect: there is no {attributes!r} in the module {module!r}"
            ) from None
    if problem := unfit_function(found):
        raise errors.ConfigurationError(f"on_connect: {name!r}: {problem}")
    return cast("Callable[[Any], object]", found)


def _run_steps(raw: Any, settings: SqliteSettings, path: str) -> None:
    for step in steps_of(resolved(settings).on_connect):
        raw.plain = False
        function = cast("Callable[[Any], object]", step)
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        try:
            result = function(raw)
        except (Exception, SystemExit) as error:
            raise errors.ConnectionFailedError(
                path, f"on_connect: {name} raised {type(error).__name__}: {error}"
            ) from error
        if inspect.iscoroutine(result):
            result.close()
            raise errors.ConnectionFailedError(
                path, f"on_connect: {name} is a coroutine function; make it a plain `def`"
            )
        try:
            open_still = raw.in_transaction
        except classes.ProgrammingError as error:
            raise errors.ConnectionFailedError(path, f"on_connect: {name} closed the connection") from error
        if open_still:
            raise errors.ConnectionFailedError(path, f"on_connect: {name} left a transaction open; commit or roll back")
        raw.isolation_level = None  # the package begins and ends transactions itself


_AS_IT_WAS: list[tuple[str, Value]] = [("locking_mode", "normal"), ("query_only", False), ("read_uncommitted", False)]
"""What the package depends on, and no configuration can set."""


def _look_again(raw: Any, settings: SqliteSettings, path: str) -> None:
    """Behind functions of the user's, whether the connection still is what the configuration says."""
    cursor = raw.plain_cursor()
    cursor.row_factory = None  # whatever they have set
    with contextlib.closing(cursor), raw.as_text():
        for name, value in (*own_pragmas(settings), *more_pragmas(settings), *_AS_IT_WAS):
            try:
                read_back(cursor, path, name, value)
            except errors.ConnectionFailedError as error:
                raise errors.ConnectionFailedError(
                    path,
                    f"on_connect has changed a setting: {str(error.reason).replace('did not take: it is', 'is now')}",
                ) from None
        there = {row[0].lower() for row in cursor.execute("SELECT name FROM pragma_database_list")}
    if missing := [name for name in settings.attach if name.lower() not in there]:
        raise errors.ConnectionFailedError(path, f"on_connect has detached {missing[0]!r}")


_FORKED = (
    "this process was forked while its parent had a transaction or a statement running on this database. SQLite keeps"
    " its locks per process, so using the file here could lose data. Fork when the database is at rest, or start the"
    " process by multiprocessing's 'spawn' or 'forkserver'"
)
