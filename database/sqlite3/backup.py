"""A copy of a database: written beside its place, moved there when it is complete, and never over one in use."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from database import errors
from database.sqlite3 import files
from database.sqlite3.library import classes

__all__ = ["copy"]

_IN_USE = "a database is in use there; back up to another file"
_FOLDER = "it is a directory: name the file that the copy is to be"


def copy(path: str, run: Callable[[Any], None], connect: Callable[[Path, str], Any]) -> None:
    """Makes the copy.

    Args:
        path: Its place.
        run: Fills the connection that it is given.
        connect: Opens a file as the database's own is opened: of an encrypted one, the copy has the same key.

    Raises:
        ConnectionFailedError: A database is in use there, or nothing can be written.
    """
    if os.path.basename(path) in ("", os.curdir, os.pardir):  # `Path` would make a file of that name
        raise errors.ConnectionFailedError(path, _FOLDER)
    target = Path(path)
    _refuse_database_in_use(target, connect)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{id(target):x}.partial")
    try:
        files.create(partial)
        connection = connect(partial, "rw")
        try:
            run(connection)
        finally:
            connection.close()
        files.sync(partial)
        _refuse_database_in_use(target, connect)
        partial.replace(target)
        files.sync(target.parent)
    except OSError as error:
        raise errors.ConnectionFailedError(str(target), f"the backup cannot be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _refuse_database_in_use(target: Path, connect: Callable[[Path, str], Any]) -> None:
    """Whoever has it open would go on with a file that has no name any more, and all that is written there is lost."""
    if target.is_dir():
        raise errors.ConnectionFailedError(str(target), _FOLDER)
    if target.exists() and not target.is_file():
        raise errors.ConnectionFailedError(str(target), "it is no file, and would be replaced by one: name another")
    for each in {target, Path(os.path.realpath(target))}:
        for suffix in ("-wal", "-shm", "-journal"):
            if each.name.endswith(suffix) and (owner := each.with_name(each.name.removesuffix(suffix))).is_file():
                raise errors.ConnectionFailedError(str(target), f"it belongs to the database {str(owner)!r}")
    # By device and inode: another path, a symbolic or a hard link is the same file.
    if files.is_open(target) or Path(f"{target}-wal").exists() or Path(f"{target}-journal").exists():
        raise errors.ConnectionFailedError(str(target), _IN_USE)
    real = Path(os.path.realpath(target))
    if real != target and (Path(f"{real}-wal").exists() or Path(f"{real}-journal").exists()):
        raise errors.ConnectionFailedError(str(target), _IN_USE)
    if not target.is_file() or not target.stat().st_size:
        return
    # Another process's lock. By SQLite, for closing a file that it has open gives its locks up.
    try:
        probe = connect(target, "rw")
    except classes.Error:
        return  # not to be opened, and replaced all the same if the rights on the directory allow it
    try:
        probe.execute("BEGIN EXCLUSIVE")
        probe.execute("ROLLBACK")
    except classes.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise errors.ConnectionFailedError(str(target), _IN_USE) from error
    except classes.DatabaseError:
        pass  # no database
    finally:
        probe.close()
