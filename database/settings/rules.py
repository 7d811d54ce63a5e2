"""Rules: a value's way from the document to the settings; and the section that an engine makes of them.

A rule turns an item's value into a setting, or raises `Unfit`, which the walk turns into a `ConfigurationError` that
names file, line and key. The rules here are the engines' common ones; an engine keeps its own beside its section.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from database.settings.model import MEMORY
from database.settings.words import closest, did_you_mean, is_path, no_such_file

if TYPE_CHECKING:
    from database.settings.document import Item
    from database.settings.model import Settings

__all__ = [
    "LOGGING_RULES",
    "Rule",
    "Section",
    "Unfit",
    "amount",
    "apply",
    "boolean",
    "choice",
    "duration",
    "file",
    "init_sql",
    "migrations",
    "monitor",
    "path",
    "path_text",
    "text",
    "unfit_function",
    "whole",
]

T = TypeVar("T")

MONITOR_PATH_LIMIT = 70
"""Bytes: the system allows a socket's path 103 (macOS) or 107 (Linux), of which its name takes up to 32."""


class Unfit(Exception):
    """Raised by rules; says what they expected, and perhaps what was meant."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.hint = hint


Rule: TypeAlias = "Callable[[Item], object]"


def apply(rule: Callable[[Item], T], item: Item) -> T:
    """What the rule makes of the item.

    Raises:
        ConfigurationError: It does not fit; the error names file, line and key.
    """
    try:
        return rule(item)
    except Unfit as unfit:
        hint = unfit.hint and f"; {unfit.hint}"
        raise item.error(f"expected {unfit.expected}, got {item.shown()}{hint}") from None


def boolean(item: Item) -> bool:
    """True or false."""
    if not isinstance(item.value, bool):
        raise Unfit("true or false")
    return item.value


def whole(low: int, high: int) -> Rule:
    """A whole number within bounds, which it may be itself."""

    def rule(item: Item) -> int:
        # A boolean is an int to Python, but not to whoever wrote `true`.
        if isinstance(item.value, bool) or not isinstance(item.value, int) or not low <= item.value <= high:
            raise Unfit(f"a whole number from {low} to {high}")
        return item.value

    return rule


def duration(unit: str, *, optional: bool = False) -> Rule:
    """A time, 0 or more; `optional`: or None."""

    def rule(item: Item) -> float | None:
        if item.value is None and optional:
            return None
        if isinstance(item.value, (int, float)) and not isinstance(item.value, bool):
            try:
                number = float(item.value)
            except OverflowError:
                number = -1.0
            if 0 <= number < float("inf"):  # Not true of NaN either.
                return number
        raise Unfit(f"a number of {unit}, 0 or more{', or null' if optional else ''}")

    return rule


def amount(unit: str, *, optional: bool = False) -> Rule:
    """A number above 0; `optional`: or None."""

    def rule(item: Item) -> float | None:
        value = item.value
        if value is None and optional:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**53:
            return value
        raise Unfit(f"a number of {unit}, more than 0{', or null' if optional else ''}")

    return rule


def choice(*choices: str, numbered: bool = False) -> Rule:
    """A word, case-insensitive; `numbered`: its number counts as well."""
    words = {choice.lower(): choice for choice in choices}

    def rule(item: Item) -> str:
        word = item.value
        if isinstance(word, bool):
            # YAML 1.1 takes a bare OFF for false, and whoever gives a mapping may have got it from YAML.
            word = item.text or ("" if word else "OFF")
        elif numbered and isinstance(word, int) and 0 <= word < len(choices):
            return choices[word]
        if not isinstance(word, str):
            raise Unfit(f"one of {', '.join(choices)}")
        if word.lower() not in words:
            raise Unfit(f"one of {', '.join(choices)}", did_you_mean(closest(word, choices)))
        return words[word.lower()]

    return rule


def path_text(item: Item, expected: str) -> str:
    """A path as text, with `~` expanded; `expected` is what the message says otherwise."""
    value = item.value
    path = os.fspath(value) if is_path(value) else value
    if not isinstance(path, str) or not path.strip():
        raise Unfit(expected)
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # A lone surrogate.
        raise Unfit(f"{expected} that the file system can name") from None
    if b"\0" in encoded:
        raise Unfit(f"{expected} without NUL characters")
    return path if path == MEMORY else os.path.expanduser(path)


def path(item: Item) -> str:
    """The path of a database."""
    return path_text(item, f"a path or {MEMORY!r}")


def migrations(item: Item) -> str | None:
    """The folder of migrations."""
    if item.value is None:
        return None
    expected = "the path of a folder of SQL files, or null for none"
    path = path_text(item, expected)
    if not os.path.isdir(path):
        raise Unfit(expected, "it is a file" if os.path.exists(path) else no_such_file(path))
    return path


def monitor(item: Item) -> str | None:
    """The folder of the sockets by which processes show their pools."""
    if item.value is None:
        return None
    expected = "the path of a folder for Unix sockets, or null"
    path = path_text(item, expected)
    if path == MEMORY:
        raise Unfit(expected)
    import socket  # noqa: PLC0415 - few need it

    if not hasattr(socket, "AF_UNIX"):
        raise Unfit("null, because this system's Python has no Unix sockets")
    if os.path.exists(path) and not os.path.isdir(path):
        raise Unfit(expected, "it is a file")
    try:
        length = len(os.fsencode(os.path.abspath(path)))
    except OSError:  # The working directory has been removed.
        length = len(os.fsencode(path))
    if length > MONITOR_PATH_LIMIT:
        raise Unfit(
            f"{expected}; a path of at most {MONITOR_PATH_LIMIT} bytes, because a socket's path must be short",
            f"in full it has {length}",
        )
    return path


def init_sql(item: Item) -> str | None:
    """The path of an SQL file that there is; an empty one for none."""
    if item.value is None:
        return None
    if item.value == "":
        return ""
    expected = "the path of an SQL file, '' for none, or null for the packaged one"
    path = path_text(item, expected)
    if not os.path.isfile(path):
        raise Unfit(expected, "it is a directory" if os.path.isdir(path) else no_such_file(path))
    return path


def text(item: Item) -> str | None:
    """Text that says something, or None."""
    if item.value is None:
        return None
    if not isinstance(item.value, str) or not item.value.strip() or "\0" in item.value:
        raise Unfit("text, or null")
    return item.value


def file(item: Item) -> str | None:
    """The path of a file, which may appear later; or None."""
    return None if item.value is None else path_text(item, "a file's path, or null")


def unfit_function(function: object) -> str | None:
    """Why a function cannot prepare a connection; None: it can."""
    if not callable(function):
        return f"expected a function that takes a connection, got a value of type {type(function).__name__}"
    import inspect  # noqa: PLC0415 - few configure any

    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "it is called on the connection's own thread, where nothing can be awaited: make it a plain `def`"
    return None


@dataclass(frozen=True, slots=True)
class Section:
    """An engine's part of the document.

    Attributes:
        engine: The engine's package below `database`.
        build: Makes one database's settings of name, values and logging.
        rules: One for each key but `logging` and `databases`, which all engines have.
        own: Keys of which each database must give one, for they are not inherited.
        identity: What no two databases may have in common, if there is such a thing; it is shown in messages.
        private: Keys that are not inherited either, but may be left out.
        kept: Keys of `own` that are inherited nevertheless, where a database gives the other one.
        merged: Mappings that are inherited entry by entry.
        replaces: Pairs of keys of which a database that gives one does not inherit the other.
        check: Looks whether a database's settings go together: the key at fault and why, or None.
    """

    engine: str
    build: Callable[..., Settings]
    rules: Mapping[str, Rule]
    own: tuple[str, ...]
    identity: Callable[[Any], str | None]
    private: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    replaces: tuple[tuple[str, str], ...] = ()
    check: Callable[[Any], tuple[str, str] | None] = lambda settings: None


LOGGING_RULES: Mapping[str, Rule] = {
    "console": boolean,
    "level": choice("CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET"),
    "parameters": choice("redacted", "shown"),
    "slow_ms": duration("milliseconds", optional=True),
    "long_read_s": duration("seconds", optional=True),
    "slow_transaction_ms": duration("milliseconds", optional=True),
}
