"""SQLite, as `database.engine.contract` describes an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from database import errors
from database.engine.adapting import Adapters
from database.engine.contract import Backend, Engine, Log, Migrations, Role
from database.logs import say
from database.settings import MEMORY
from database.sqlite3 import analysis, files
from database.sqlite3.connection import Connection
from database.sqlite3.failures import BUSY_SLICE, control_error, is_broken, is_busy
from database.sqlite3.library import classes, load
from database.sqlite3.opening import open_connection, resolved
from database.sqlite3.settings import SqliteSettings

__all__ = ["ENGINE"]

WAL_RESET_FIXED = (3, 51, 3)

_logger = logging.getLogger("database.pool")


@cache
def _warn_of_known_bugs(version: str, numbers: tuple[int, ...]) -> None:
    if (3, 7, 0) <= numbers < WAL_RESET_FIXED:
        say(
            _logger,
            logging.WARNING,
            "SQLite %s has the WAL-reset bug (sqlite.org/wal.html#walresetbug): connections that checkpoint at the same"
            " moment can damage a database. Within one process this package keeps clear of it, because only one connection"
            " writes and checkpoints; where several processes write to one file, use SQLite %s or later.",
            version,
            ".".join(map(str, WAL_RESET_FIXED)),
        )


def _backend(settings: SqliteSettings, adapters: Adapters) -> Backend:
    settings = resolved(settings)
    library = load(settings.module)
    if settings.journal_mode == "WAL":
        _warn_of_known_bugs(library.version, library.version_info)
    dispose: Callable[[], None] = lambda: None  # noqa: E731  - replaced below
    shown, settings = settings.path, _absolute(settings)
    path = settings.path
    opened: tuple[tuple[int, int], ...] = ()
    if path == MEMORY:
        from database.sqlite3 import memory  # noqa: PLC0415  - it needs modules that a file does not

        path, dispose = memory.acquire(settings.name)

    def connect(role: Role, progress: Callable[[], bool]) -> Connection:
        nonlocal opened
        for file, identity in zip((path, *settings.attach.values()), opened, strict=False):
            if not os.path.exists(file) or files.identity(Path(file)) == identity:
                continue
            raise errors.ConnectionFailedError(
                shown if file == path else file,
                "another file has been put in its place since this pool opened it: what is written goes to the old one, and is"
                " lost with it. Close the pool before a database is replaced (`await db.close()`), or restart",
            )
        connection = open_connection(settings, path, role, progress, create=not opened, adapters=adapters)
        if role == "writer":
            try:
                _initialise(connection, settings)
                if settings.auto_migrate and settings.migrations is not None:
                    from database.engine.migrations import Order  # noqa: PLC0415  - most programs do without
                    from database.sqlite3.migrate import migrate  # noqa: PLC0415

                    migrate(connection, Order(settings.migrations))
            except BaseException as error:
                connection.close()
                if isinstance(error, classes.Error):
                    raise errors.ConnectionFailedError(shown, f"the schema cannot be made: {error}") from error
                raise
            opened = connection.identities
        return connection

    return Backend(
        description=shown,
        connect=connect,
        is_busy=is_busy,
        is_broken=is_broken,
        busy_timeout=settings.busy_timeout / 1000,
        busy_slice=BUSY_SLICE,
        dispose=dispose,
        as_is=True,
        gauges=lambda: {"wal.size": _size(f"{path}-wal")},
        log=_log(settings, path),
        files=lambda: frozenset(opened),
        excludes=None if settings.journal_mode == "WAL" else lambda connection: connection.excludes,
    )


def _absolute(settings: SqliteSettings) -> SqliteSettings:
    """Where the files are, seen from the working directory of this moment: a program may change that, as daemons do."""

    def place(path: str | None) -> str | None:
        return os.path.abspath(path) if path else path

    if settings.path != MEMORY:
        settings = replace(settings, path=os.path.abspath(settings.path))
    return replace(
        settings,
        attach={name: os.path.abspath(path) for name, path in settings.attach.items()},
        init_sql=None if settings.init_sql is None else place(os.path.expanduser(settings.init_sql)),
        migrations=place(settings.migrations),
        key_file=place(settings.key_file),
        extensions=tuple(os.path.abspath(each) if os.sep in each else each for each in settings.extensions),
    )


def _log(settings: SqliteSettings, path: str) -> Log | None:
    limit: float | None = getattr(settings, "wal_limit", 64)
    if limit is None or settings.journal_mode != "WAL":
        return None
    # Each file has a log of its own; one checkpoint is for all of them (sqlite.org/pragma.html#pragma_wal_checkpoint).
    logs = [f"{file}-wal" for file in (path, *settings.attach.values())]
    return Log(
        limit=int(limit * 2**20),
        size=lambda: max(map(_size, logs)),
        empty=lambda connection: connection.empty_log(),
    )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # there is none: no writes yet, or another journal mode
        return 0


def _initialise(connection: Connection, settings: SqliteSettings) -> None:
    """Runs `init_sql`, all of it in one transaction."""
    if settings.init_sql == "" or (settings.init_sql is None and settings.migrations is not None):
        return
    if settings.init_sql is None:
        from importlib import resources  # noqa: PLC0415  - slow to import, and done once

        source = resources.files("database.sqlite3") / "sql" / "init.sql"
        text = source.read_text("utf-8")
    else:
        text = Path(settings.init_sql).expanduser().read_text("utf-8")
    connection.initialise(_scripts(text), settings.busy_timeout / 1000)


def _scripts(text: str) -> list[str]:
    """The scripts of an aiosql file in their order, or the whole text where it names none."""
    if "-- name:" not in text and "--name:" not in text:
        return [text]
    from aiosql.query_loader import QueryLoader  # noqa: PLC0415  - most files are loaded once, at the first use

    loader = QueryLoader(_adapter(), None, mandatory_parameters=False)
    return [datum.sql for datum in loader.load_query_data_from_sql(text, [])]


def _adapter() -> Any:
    """Makes aiosql's synchronous adapter."""
    from aiosql.adapters.sqlite3 import SQLite3Adapter  # noqa: PLC0415  - only those who use query files pay for it

    return cast("Any", SQLite3Adapter)()


def _migrations() -> Migrations:
    from database.sqlite3 import migrate  # noqa: PLC0415  - few programs ever need it

    return Migrations(migrate.migrate, migrate.applied)


ENGINE = Engine(
    name="sqlite3",
    analyse=analysis.analyse,
    control_error=control_error,
    connection=Connection,
    migrations=_migrations,
    backend=_backend,
    adapter=_adapter,
    pins="the WAL cannot be reset and grows with every write (sqlite.org/wal.html#bigwal)",
)
