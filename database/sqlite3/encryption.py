"""SQLCipher: a connection is given its key before anything else, and the key is seen by nobody.

It is read anew for each connection, so that a secret which is mounted again is found. It goes into SQL text, for SQLCipher
takes it no other way, and into no error, log record or `repr`: what fails here is said in words of our own.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from database import errors
from database.sqlite3.library import classes
from database.sqlite3.pragmas import CIPHER, read_back, write
from database.sqlite3.settings import SqliteSettings

__all__ = ["attach", "of_attached", "reason", "unlock"]

_PLAIN = b"SQLite format 3\0"
"""How a file begins that is not encrypted."""

_LOGGING = frozenset({"cipher_log", "cipher_log_level", "cipher_log_source"})


def unlock(raw: Any, settings: SqliteSettings, path: str | Path) -> None:
    """Gives a connection its key and whatever else SQLCipher must know before it looks at the file.

    Args:
        raw: The connection, of which nothing has been asked yet.
        settings: Of the database.
        path: The file, for messages.

    Raises:
        ConnectionFailedError: There is no key, it does not fit, or a PRAGMA of SQLCipher's did not take.
    """
    if not settings.encrypted:
        return
    key = _key(settings, str(path))
    if "cipher_log_level" not in settings.pragmas:
        raw.execute("PRAGMA cipher_log_level = NONE").fetchall()  # it would write to the standard error output
    try:
        raw.execute("PRAGMA key = '" + key.replace("'", "''") + "'").fetchall()
    except classes.Error:
        raise errors.ConnectionFailedError(str(path), "SQLCipher does not take this key") from None
    for name, value in settings.pragmas.items():
        if name in CIPHER:
            raw.execute(write(name, value)).fetchall()
            if name not in _LOGGING:
                read_back(raw, str(path), name, value)


def attach(raw: Any, settings: SqliteSettings, uri: str, name: str) -> None:
    """Attaches a file: an encrypted one with the same passphrase, and SQLCipher's own defaults for all else.

    Without a KEY clause it would get the key that was derived for the database's own file, and fit no other.
    """
    if settings.encrypted:
        raw.execute("ATTACH ? AS ? KEY ?", (uri, name, _key(settings, settings.path)))
    else:
        raw.execute("ATTACH ? AS ?", (uri, name))


def of_attached(settings: SqliteSettings) -> SqliteSettings:
    """The settings with which an attached file is opened by itself: see `attach`."""
    return replace(settings, pragmas={name: value for name, value in settings.pragmas.items() if name not in CIPHER})


def _key(settings: SqliteSettings, path: str) -> str:
    if settings.key_env is not None:
        key = os.environ.get(settings.key_env)
        if not key:  # its name is not shown: somebody may have taken it for the place of the key itself
            what = "is not set" if key is None else "is empty"
            raise errors.ConnectionFailedError(path, f"the environment variable that key_env names {what}")
    else:
        try:
            key = Path(str(settings.key_file)).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.ConnectionFailedError(
                path, f"key_file cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from None
        if not key:
            raise errors.ConnectionFailedError(path, "key_file is empty")
    if "\0" in key:
        raise errors.ConnectionFailedError(path, "the key holds a NUL character")
    return key


def reason(path: Path, settings: SqliteSettings, error: BaseException) -> str | None:
    """What it means that a file is no database: another key, or one too many or too few; None: something else."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_NOTADB:
        return None
    try:
        with path.open("rb") as file:
            plain = file.read(len(_PLAIN)) == _PLAIN
    except OSError:
        return None
    if settings.encrypted:
        if plain:
            return "it is not encrypted, but the configuration names a key (key_env or key_file)"
        return "the key does not fit, or it is no SQLCipher database (made with other cipher settings, perhaps)"
    return f"it is not an SQLite database, or it is encrypted: then name its key, by key_env or key_file ({error})"
