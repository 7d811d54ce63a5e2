"""Looks a database over without changing it: `python -m database check`.

Everything here is synchronous and reads only; connections are opened with `mode=ro`. `stopped` is asked now and then,
and ends the checkup when it says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from database import errors
from database.engine.checkup import FAILED, NOTE, OK, WARNING, Finding, bytes_of, migrations
from database.engine.statement import quoted
from database.settings import MEMORY
from database.settings.model import steps_of
from database.sqlite3 import library as libraries
from database.sqlite3.connection import Connection
from database.sqlite3.encryption import of_attached
from database.sqlite3.engine import WAL_RESET_FIXED
from database.sqlite3.library import classes
from database.sqlite3.migrate import applied
from database.sqlite3.opening import connect, journal_mode, look, open_connection
from database.sqlite3.settings import SqliteSettings

__all__ = ["Finding", "checkup", "faults", "measure"]

LARGE_WAL = 64 * 2**20
"""Bytes from which a WAL is remarked on: sixteen times what the automatic checkpoint lets it grow to."""

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "glusterfs", "vboxsf"})

_BUGS: tuple[tuple[tuple[int, int, int], tuple[int, int, int], str, str], ...] = (
    (
        (3, 7, 0),
        WAL_RESET_FIXED,
        "WAL-reset bug: where several processes write to one file, checkpoints at the same moment can damage it",
        "sqlite.org/wal.html#walresetbug",
    ),
    (
        (3, 0, 0),
        (3, 50, 2),
        "CVE-2025-6965: SQL with very many aggregate terms corrupts memory; matters if others choose the SQL",
        "sqlite.org/cves.html",
    ),
)


def checkup(settings: SqliteSettings, *, quick: bool, stopped: Callable[[], bool]) -> Iterator[Finding]:
    """Looks over one database, finding by finding.

    Args:
        settings: Of the database.
        quick: `PRAGMA quick_check` in place of `integrity_check`: does not compare indexes with their tables.
        stopped: Whether to give up.
    """
    yield from _version(settings)
    if settings.path == MEMORY:
        yield Finding("file", NOTE, f"{MEMORY}: lives in the process that opens it, so there is nothing to look at")
        return
    path = Path(settings.path)
    if not path.is_file():
        text = "it is not a file" if path.exists() else "no such file"
        yield Finding(
            "file", FAILED, f"{path}: {text}", "" if path.exists() else "`python -m database init` creates it"
        )
        return
    yield _file(path)
    yield from _place(path)
    with _Tidied(settings, path):
        try:
            connection = open_connection(settings, str(path), "reader", stopped)
        except errors.ConnectionFailedError as error:
            yield from _unopened(settings, path, error)
            return
        with closing(connection):
            yield from _opened(connection, settings, path, quick=quick, stopped=stopped)


def _opened(
    connection: Connection, settings: SqliteSettings, path: Path, *, quick: bool, stopped: Callable[[], bool]
) -> Iterator[Finding]:
    raw = connection.raw
    try:
        where = yield from _writer(raw, settings, path, stopped)
        yield from _prepared(settings, where)
        yield from _pages(raw, path)
        yield from _wal(path, settings)
        yield from _integrity(raw, quick=quick)
        yield from _references(raw, settings)
        yield from _migrations(connection, settings)
    except classes.OperationalError as error:
        if stopped():
            return
        yield Finding("read", FAILED, str(error))
    except classes.DatabaseError as error:
        yield Finding("integrity", FAILED, str(error), "restore a backup, or try the `.recover` of SQLite's own shell")


class _Tidied:
    """Removes the `-wal` and `-shm` that reading makes beside a database which nobody else has open.

    A read-only connection cannot remove them again; one that may write does, at its close, if it is the last. It is
    opened only where there was no WAL before and the new one is empty, so there is nothing that it could write.
    """

    def __init__(self, settings: SqliteSettings, path: Path) -> None:
        attached = of_attached(settings)
        found = [(path.absolute(), settings), *((Path(each).absolute(), attached) for each in settings.attach.values())]
        self._files = [(file, how) for file, how in found if not _wal_of(file).exists()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        for file, settings in self._files:
            with suppress(OSError, errors.ConnectionFailedError, *classes.Error):
                if _wal_of(file).stat().st_size == 0:
                    with closing(connect(settings, file, "rw")) as raw:
                        raw.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _wal_of(path: Path) -> Path:
    return Path(f"{path}-wal")


def _version(settings: SqliteSettings) -> Iterator[Finding]:
    library = libraries.load(settings.module)
    found = library.version_info
    text = library.version if settings.module == libraries.STANDARD else f"{library.version}, of {settings.module}"
    yield Finding("SQLite", OK, f"{text}, SQLCipher {library.cipher}" if settings.encrypted else text)
    for since, fixed, text, where in _BUGS:
        if since <= found < fixed and (fixed != WAL_RESET_FIXED or settings.journal_mode == "WAL"):
            wanted = ".".join(map(str, fixed))
            level = WARNING if fixed == WAL_RESET_FIXED else NOTE
            hint = f"use SQLite {wanted} or later, or one that its distributor has patched"
            yield Finding("SQLite", level, f"{text} ({where})", hint)


def _file(path: Path) -> Finding:
    status = path.stat()
    text = f"{path}, {bytes_of(status.st_size)}"
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("file", FAILED, f"{text}: this user may not read and write it", "give it the rights")
    if not os.access(path.parent, os.W_OK):
        return Finding("file", FAILED, f"{text}: its folder cannot be written to, which SQLite needs for its journal")
    if os.name == "posix" and status.st_mode & 0o002:
        return Finding("file", WARNING, f"{text}: everybody may write to it", f"chmod o-w {path}")
    return Finding("file", OK, text)


def _place(path: Path) -> Iterator[Finding]:
    usage = shutil.disk_usage(path.parent)
    size = path.stat().st_size
    text = f"{bytes_of(usage.free)} free of {bytes_of(usage.total)}"
    if usage.free < max(size, 100 * 2**20):
        yield Finding(
            "disk", WARNING, text, "a backup, or VACUUM, needs as much room as the database has, and 100 MiB is little"
        )
    else:
        yield Finding("disk", OK, text)
    kind = _file_system(path)
    if kind in _NETWORK:
        yield Finding(
            "disk",
            WARNING,
            f"the file is on a network file system ({kind}), whose locks SQLite cannot rely on",
            "put it on a local disk; WAL works only there (sqlite.org/wal.html)",
        )


def _file_system(path: Path) -> str | None:
    """The type of the file system, where the system tells (Linux)."""
    try:
        with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:
        return None
    real = os.path.realpath(path)
    found = [(point, kind) for point, kind in mounts if real.startswith(point.rstrip("/") + "/")]
    return max(found, key=lambda each: len(each[0]))[1] if found else None


def _unopened(settings: SqliteSettings, path: Path, error: errors.ConnectionFailedError) -> Iterator[Finding]:
    """Why a connection could not be opened as the settings want it."""
    unreadable: tuple[type[BaseException], ...] = (errors.ConnectionFailedError, *classes.Error)
    attached = of_attached(settings)
    files = {"the file's journal_mode": (path, settings)} | {
        f"the journal_mode of {name!r}": (Path(place), attached) for name, place in settings.attach.items()
    }
    for what, (file, how) in files.items():
        try:
            mode = journal_mode(how, file)
        except unreadable:
            continue  # of which the error speaks
        if (mode == "WAL") != (settings.journal_mode == "WAL"):
            yield Finding(
                "PRAGMAs",
                WARNING,
                f"{what} is {mode}, the configuration's {settings.journal_mode}",
                "the next program that opens it with this configuration changes the file; then check again",
            )
            return
    yield Finding("open", FAILED, str(error.reason), _advice(settings, error))


def _advice(settings: SqliteSettings, error: errors.ConnectionFailedError) -> str:
    attached = any(Path(each).absolute() == Path(error.path).absolute() for each in settings.attach.values())
    return "`python -m database init` creates attached files, too" if attached and not Path(error.path).exists() else ""


BOTH, READER = "on a reader and the writer", "on a reader"


def _writer(
    raw: Any, settings: SqliteSettings, path: Path, stopped: Callable[[], bool]
) -> Generator[Finding, None, str]:
    """Opens a connection as the writer's, too, unless that would change a file; gives where all was verified.

    It is closed before the reader is, so that it is not the last one, which would copy the WAL into the database.
    """
    files = [path, *map(Path, settings.attach.values())]
    if not all(os.access(each, os.W_OK) and os.access(each.absolute().parent, os.W_OK) for each in files):
        return READER  # which has been told
    for schema in ("main", *settings.attach):
        mode = str(raw.execute(f"PRAGMA {quoted(schema)}.journal_mode").fetchone()[0]).upper()
        if (mode == "WAL") != (settings.journal_mode == "WAL"):
            yield Finding(
                "PRAGMAs",
                WARNING,
                f"the journal_mode of {schema!r} is {mode}, the configuration's {settings.journal_mode}",
                "the next program that opens it with this configuration changes the file; then check again",
            )
            return READER
    try:
        open_connection(settings, str(path), "writer", stopped, create=False).close()
    except errors.ConnectionFailedError as error:
        yield Finding("writer", FAILED, str(error.reason))
        return READER
    return BOTH


def _prepared(settings: SqliteSettings, where: str) -> Iterator[Finding]:
    """What belongs to a connection. All of it was verified, bit by bit, when the connections were opened."""
    if settings.encrypted:
        source = "key_env" if settings.key_env is not None else "key_file"
        yield Finding("encryption", OK, f"the key of {source} fits, and the file does not show that it is SQLite's")
    yield _pragmas(settings, where)
    if settings.extensions:
        yield Finding("extensions", OK, f"{', '.join(settings.extensions)}: loaded {where}")
    for name, place in settings.attach.items():
        text = f"{name}: {place}, {bytes_of(Path(place).stat().st_size)}, read-only on readers"
        if settings.encrypted:
            text += ", with the same key"
        yield Finding("attached", OK, text)
    for step in steps_of(settings.on_connect):
        yield Finding("on_connect", OK, f"{step if isinstance(step, str) else step.__qualname__}: called {where}")


def _pragmas(settings: SqliteSettings, where: str) -> Finding:
    words = [
        f"journal_mode {settings.journal_mode}",
        f"synchronous {settings.synchronous}",
        f"cache_size {settings.cache_size}",
        f"foreign_keys {'on' if settings.foreign_keys else 'off'}",
        f"wal_autocheckpoint {settings.wal_autocheckpoint}",
        *(
            f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
            for name, value in settings.pragmas.items()
        ),
    ]
    text = f"{', '.join(words)}: as configured, {where}"
    if settings.synchronous == "OFF":
        return Finding("PRAGMAs", WARNING, text, "with synchronous OFF, a power failure can damage the database")
    if settings.journal_mode in ("OFF", "MEMORY"):
        return Finding("PRAGMAs", WARNING, text, "without a journal on disk, a crash can damage the database; use WAL")
    return Finding("PRAGMAs", OK, text)


def _pages(raw: Any, path: Path) -> Iterator[Finding]:
    count, unused, size = (_pragma(raw, name) for name in ("page_count", "freelist_count", "page_size"))
    text = f"{count:,} of {size:,} bytes, {unused:,} of them unused"
    if unused * size > 10 * 2**20 and unused * 4 > count:
        yield Finding("pages", NOTE, text, f"VACUUM would give back {bytes_of(unused * size)}")
    else:
        yield Finding("pages", OK, text)
    if Path(f"{path}-journal").exists():
        yield Finding("journal", NOTE, f"{path}-journal exists: a program writes just now, or was killed while it did")


def _wal(path: Path, settings: SqliteSettings) -> Iterator[Finding]:
    if settings.journal_mode != "WAL":
        return
    try:
        wal = os.stat(f"{path}-wal").st_size
    except OSError:
        wal = 0
    if wal >= LARGE_WAL:
        yield Finding(
            "WAL",
            WARNING,
            f"{bytes_of(wal)}: checkpoints do not get through",
            "look for a transaction or stream that stays open (`python -m database top`)",
        )
    else:
        yield Finding("WAL", OK, bytes_of(wal))


def _integrity(raw: Any, *, quick: bool) -> Iterator[Finding]:
    pragma = "quick_check" if quick else "integrity_check"
    rows = [str(row[0]) for row in raw.execute(f"PRAGMA {pragma}(10)")]
    if rows == ["ok"]:
        yield Finding("integrity", OK, f"{pragma} found nothing wrong")
    else:
        for row in rows:
            yield Finding("integrity", FAILED, row, "restore a backup, or try the `.recover` of SQLite's own shell")


def faults(settings: SqliteSettings, file: Path, *, stopped: Callable[[], bool]) -> list[str]:
    """What `quick_check` finds wrong with a copy that nobody has open; nothing, if it is sound.

    Args:
        settings: Of the database that it is a copy of: it has the same key, functions and extensions.
        file: The copy.
        stopped: Whether to give up.
    """
    unreadable: tuple[type[BaseException], ...] = (errors.ConnectionFailedError, *classes.Error)
    try:
        # Immutable, so that no -wal is made beside it.
        with closing(look(settings, file, "ro&immutable=1")) as raw:
            raw.set_progress_handler(stopped, 10_000)
            found = [str(row[0]) for row in raw.execute("PRAGMA quick_check(10)")]
    except unreadable as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def _references(raw: Any, settings: SqliteSettings) -> Iterator[Finding]:
    broken: dict[tuple[str, str], int] = {}
    for table, _, parent, _ in raw.execute("PRAGMA foreign_key_check"):
        broken[table, parent] = broken.get((table, parent), 0) + 1
    if not broken:
        yield Finding("foreign keys", OK, "every row refers to one that exists")
    for (table, parent), count in broken.items():
        yield Finding(
            "foreign keys",
            FAILED if settings.foreign_keys else NOTE,
            f"{count:,} rows of {table!r} refer to rows of {parent!r} that do not exist",
            f"PRAGMA foreign_key_check({table}) shows which",
        )


def _migrations(connection: Any, settings: SqliteSettings) -> Iterator[Finding]:
    if settings.migrations is not None:
        yield from migrations(applied(connection), settings.migrations, "sqlite3")


def _pragma(raw: Any, name: str) -> int:
    return int(raw.execute(f"PRAGMA {name}").fetchone()[0])


# --- Figures ------------------------------------------------------------------------------------------------


def measure(settings: SqliteSettings, *, count: bool, stopped: Callable[[], bool]) -> dict[str, Any]:
    """A database in figures: `python -m database stats`.

    Args:
        settings: Of the database.
        count: Whether rows are counted, which reads an index of each table from end to end.
        stopped: Whether to give up.

    Raises:
        ConnectionFailedError: It cannot be opened or read.
    """
    path = Path(settings.path)
    try:
        with _Tidied(settings, path), closing(look(settings, path)) as raw:
            raw.set_progress_handler(stopped, 10_000)
            return _measured(raw, path, settings, count=count, stopped=stopped)
    except classes.Error as error:
        raise errors.ConnectionFailedError(str(path), str(error)) from error


def _measured(
    raw: Any, path: Path, settings: SqliteSettings, *, count: bool, stopped: Callable[[], bool]
) -> dict[str, Any]:
    sizes = _sizes(raw)
    objects = raw.execute(
        "SELECT type, name, tbl_name FROM sqlite_schema WHERE type IN ('table', 'index') AND name NOT LIKE"
        " 'sqlite^_%' ESCAPE '^' ORDER BY type DESC, name"
    ).fetchall()
    automatic = raw.execute(
        "SELECT name, tbl_name FROM sqlite_schema WHERE name LIKE 'sqlite^_autoindex^_%' ESCAPE '^'"
    )
    indexes: dict[str, list[str]] = {}
    for name, table in [*automatic, *((name, table) for kind, name, table in objects if kind == "index")]:
        indexes.setdefault(table, []).append(name)
    tables: list[dict[str, Any]] = []
    for kind, name, _ in objects:
        if kind != "table":
            continue
        try:
            rows = raw.execute(f"SELECT count(*) FROM {quoted(name)}").fetchone()[0] if count else None  # noqa: S608 - quoted
        except classes.OperationalError:  # a virtual table whose module is missing here
            if stopped():
                raise
            rows = None
        own = indexes.get(name, [])
        tables.append(
            {
                "name": name,
                "rows": rows,
                "bytes": None if sizes is None else sizes.get(name, 0),
                "indexes": len(own),
                "index_bytes": None if sizes is None else sum(sizes.get(each, 0) for each in own),
            }
        )
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "wal_bytes": Path(f"{path}-wal").stat().st_size if Path(f"{path}-wal").exists() else 0,
        "page_size": _pragma(raw, "page_size"),
        "pages": _pragma(raw, "page_count"),
        "free_pages": _pragma(raw, "freelist_count"),
        "journal_mode": str(raw.execute("PRAGMA journal_mode").fetchone()[0]).upper(),
        "encoding": str(raw.execute("PRAGMA encoding").fetchone()[0]),
        "user_version": _pragma(raw, "user_version"),
        "sqlite": libraries.load(settings.module).version,
        "tables": tables,
    }


def _sizes(raw: Any) -> dict[str, int] | None:
    """Bytes of each table and index; None where this SQLite was built without `dbstat`."""
    try:
        return dict(raw.execute("SELECT name, sum(pgsize) FROM dbstat WHERE aggregate = 1 GROUP BY name").fetchall())
    except classes.OperationalError as error:
        if "dbstat" not in str(error):
            raise
        return None
