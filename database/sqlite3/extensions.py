"""Loadable extensions: SQLite's own plug-ins, from a file or from a Python package that brings one."""

from __future__ import annotations

import importlib
import os
from typing import Any

from database import errors
from database.sqlite3.library import classes
from database.sqlite3.settings import SqliteSettings

__all__ = ["load", "place"]


def place(extension: str) -> str:
    """The file of an extension.

    Raises:
        ConfigurationError: It is the name of a package that brings none.
    """
    if os.sep in extension or os.path.isfile(extension) or not extension.replace(".", "_").isidentifier():
        return os.path.abspath(extension)  # else the system would look for it in the folders of its libraries
    try:
        package = importlib.import_module(extension)
    except ImportError as error:
        raise errors.ConfigurationError(f"extensions: {extension!r} cannot be imported: {error}") from error
    found = getattr(package, "loadable_path", None)
    if not callable(found):
        raise errors.ConfigurationError(
            f"extensions: the package {extension!r} does not say where its extension is (it has no loadable_path());"
            " give the path of the file"
        )
    return str(found())


def load(raw: Any, settings: SqliteSettings, path: str) -> None:
    """Loads the configured extensions; afterwards none can be loaded, by SQL text neither.

    Raises:
        ConnectionFailedError: One cannot be loaded.
    """
    if not settings.extensions:
        return
    places = [(each, place(each)) for each in settings.extensions]
    raw.enable_load_extension(True)
    try:
        for name, file in places:
            try:
                raw.load_extension(file)
            except classes.Error as error:
                raise errors.ConnectionFailedError(path, f"the extension {name!r} cannot be loaded: {error}") from error
    finally:
        raw.enable_load_extension(False)
