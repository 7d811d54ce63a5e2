"""Which `sqlite3` a database uses: Python's own, or the drop-in that its `module` names.

A drop-in (pysqlite3, sqlcipher3) brings an SQLite of its own, and classes of its own: its errors are none of
`sqlite3.Error`, its rows none of `sqlite3.Row`. Hence `classes`, which counts in whatever has been
loaded so far; an `except` clause looks them up when something is raised, so that they cost nothing before.

Constants are SQLite's own numbers, the same in each; they are always taken from the standard library, for drop-ins lack
some of them. Loading takes a lock, and happens once for each name; what is loaded is never changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sqlite3
from contextlib import suppress
from threading import Lock
from typing import Any

from database import errors
from database.sqlite3.values import Row, row_class

__all__ = ["STANDARD", "Library", "classes", "installed", "load"]

STANDARD = "sqlite3"

_NEEDED = {
    "Connection": ("backup", "create_function", "cursor", "interrupt", "set_authorizer", "set_progress_handler"),
    "Cursor": ("execute", "executemany", "fetchmany"),
    "Row": ("keys",),
}


class Library:
    """One `sqlite3`, and our classes on top of its own.

    Attributes:
        name: As the configuration names it.
        module: The module: `connect`, `Connection`, `Error` and so on.
        row_class: `values.Row`, on top of this library's own.
    """

    __slots__ = ("_cipher", "module", "name", "row_class")

    def __init__(self, name: str, module: Any, row: type[Any]) -> None:
        self.name = name
        self.module = module
        self.row_class = row
        self._cipher: str | None = None

    @property
    def version(self) -> str:
        """Of its SQLite, as a text."""
        return str(self.module.sqlite_version)

    @property
    def version_info(self) -> tuple[int, ...]:
        """Of its SQLite, as numbers."""
        return tuple(self.module.sqlite_version_info)

    @property
    def loads_extensions(self) -> bool:
        """Whether it was built with the means to load extensions."""
        return hasattr(self.module.Connection, "enable_load_extension")

    @property
    def cipher(self) -> str:
        """The version of SQLCipher that it is; an empty text where it is none."""
        if self._cipher is None:
            raw = self.module.connect(":memory:")
            try:
                row = raw.execute("PRAGMA cipher_version").fetchone()
            finally:
                raw.close()
            self._cipher = "" if row is None else str(row[0])
        return self._cipher


class _Classes:
    """The classes of all libraries that have been loaded so far: `except classes.OperationalError`."""

    __slots__ = ("Cursor", "DatabaseError", "Error", "OperationalError", "ProgrammingError", "Warning")

    def __init__(self) -> None:
        self.Cursor: tuple[type[sqlite3.Cursor], ...] = ()
        self.Error: tuple[type[sqlite3.Error], ...] = ()
        self.DatabaseError: tuple[type[sqlite3.DatabaseError], ...] = ()
        self.OperationalError: tuple[type[sqlite3.OperationalError], ...] = ()
        self.ProgrammingError: tuple[type[sqlite3.ProgrammingError], ...] = ()
        self.Warning: tuple[type[sqlite3.Warning], ...] = ()
        self.add(sqlite3)

    def add(self, module: Any) -> None:
        """Counts a library's classes in."""
        for name in self.__slots__:
            setattr(self, name, (*getattr(self, name), getattr(module, name)))


_lock = Lock()
_loaded: dict[str, Library] = {STANDARD: Library(STANDARD, sqlite3, Row)}

classes = _Classes()


def load(name: str = STANDARD) -> Library:
    """The library of that name, imported if need be.

    Raises:
        ConfigurationError: It is not installed, or it is no drop-in for `sqlite3`.
    """
    found = _loaded.get(name)
    if found is None:
        with _lock:
            found = _loaded.get(name)
            if found is None:
                found = _load(name)
                _loaded[name] = found
    return found


def _load(name: str) -> Library:
    try:
        module: Any = importlib.import_module(name)
        if not hasattr(module, "connect"):  # the classes of some stand one level below
            with suppress(ModuleNotFoundError):
                module = importlib.import_module(f"{name}.dbapi2")
    except ImportError as error:
        if installed(name):
            raise errors.ConfigurationError(f"module: {name!r} cannot be used in place of sqlite3: {error}") from error
        raise errors.ConfigurationError(
            f"module: {name!r} is not installed: `pip install {name.partition('.')[0]}`, or leave `module` out"
        ) from error
    lacking = [
        each for each in ("connect", "sqlite_version", *_NEEDED, *classes.__slots__) if not hasattr(module, each)
    ]
    lacking += [
        f"{kind}.{method}"
        for kind, methods in _NEEDED.items()
        for method in methods
        if hasattr(module, kind) and not hasattr(getattr(module, kind), method)
    ]
    if lacking:
        raise errors.ConfigurationError(
            f"module: {name!r} is no drop-in for sqlite3: it lacks {', '.join(lacking[:3])}"
        )
    if module is sqlite3:
        return Library(name, module, Row)
    classes.add(module)
    return Library(name, module, row_class(module.Row))


def installed(name: str) -> bool:
    """Whether there is a package of that name; it is not imported."""
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
