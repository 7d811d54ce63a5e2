"""SQLite's section of the configuration: its settings, and the rules that read them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from database.settings.model import MEMORY, LoggingSettings
from database.settings.rules import (
    Section,
    Unfit,
    boolean,
    choice,
    duration,
    init_sql,
    migrations,
    path,
    path_text,
    whole,
)

if TYPE_CHECKING:
    from database.settings.document import Item

__all__ = ["MONITOR_PATH_LIMIT", "SECTION", "SqliteSettings"]

MONITOR_PATH_LIMIT = 70
"""Bytes: the system allows a socket's path 103 (macOS) or 107 (Linux), of which its name takes up to 32."""


@dataclass(frozen=True, slots=True)
class SqliteSettings:
    """One SQLite database.

    Attributes:
        name: The name that `get_db()` is called with.
        path: The file, with `~` expanded, relative to the working directory at first use; or `":memory:"`.
        pool_size: Number of reader connections; one writer connection stands beside them.
        pool_timeout: Seconds to wait for a connection.
        busy_timeout: Milliseconds to wait for another process's lock.
        journal_mode: https://www.sqlite.org/pragma.html#pragma_journal_mode, in upper case.
        synchronous: https://www.sqlite.org/pragma.html#pragma_synchronous, by name, in upper case.
        cache_size: Pages, or KiB if negative: https://www.sqlite.org/pragma.html#pragma_cache_size
        foreign_keys: Whether foreign keys are enforced.
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one, or none where
            `migrations` makes the schema.
        migrations: Folder of the numbered SQL files that bring the schema up to date; None: there are none.
        auto_migrate: Whether they are applied whenever a pool opens.
        monitor: Folder in which this process offers its pools' statistics on a Unix socket; None: it does not.
        logging: What is logged.
    """

    name: str
    path: str
    pool_size: int = 5
    pool_timeout: float = 30.0
    busy_timeout: int = 5000
    journal_mode: str = "WAL"
    synchronous: str = "NORMAL"
    cache_size: int = -2000
    foreign_keys: bool = True
    init_sql: str | None = None
    migrations: str | None = None
    auto_migrate: bool = False
    monitor: str | None = None
    logging: LoggingSettings = field(default_factory=LoggingSettings)


def _monitor(item: Item) -> str | None:
    if item.value is None:
        return None
    expected = "the path of a folder for Unix sockets, or null"
    path = path_text(item, expected)
    if path == MEMORY:
        raise Unfit(expected)
    import socket  # noqa: PLC0415 - few need it

    if not hasattr(socket, "AF_UNIX"):
        raise Unfit("null, for this system's Python has no Unix sockets")
    if os.path.exists(path) and not os.path.isdir(path):
        raise Unfit(expected, "it is a file")
    try:
        length = len(os.fsencode(os.path.abspath(path)))
    except OSError:  # The working directory has been removed.
        length = len(os.fsencode(path))
    if length > MONITOR_PATH_LIMIT:
        raise Unfit(
            f"{expected}; a path of at most {MONITOR_PATH_LIMIT} bytes, for a socket's path must be short",
            f"in full it has {length}",
        )
    return path


def _file_identity(settings: SqliteSettings) -> str | None:
    if settings.path == MEMORY:
        return None
    try:
        return os.path.normcase(os.path.realpath(settings.path))
    except OSError:  # The working directory has been removed; opening the database will say so.
        return os.path.normcase(os.path.normpath(settings.path))


SECTION = Section(
    engine="sqlite3",
    build=SqliteSettings,
    rules={
        "path": path,
        "pool_size": whole(1, 1000),
        "pool_timeout": duration("seconds"),
        "busy_timeout": whole(0, 2**31 - 1),
        "journal_mode": choice("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"),
        "synchronous": choice("OFF", "NORMAL", "FULL", "EXTRA", numbered=True),
        "cache_size": whole(-(2**31) + 1, 2**31 - 1),  # SQLite takes what does not fit 32 bits for 0.
        "foreign_keys": boolean,
        "init_sql": init_sql,
        "migrations": migrations,
        "auto_migrate": boolean,
        "monitor": _monitor,
    },
    own=("path",),
    identity=_file_identity,
    private=("migrations",),
)
