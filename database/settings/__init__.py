"""Settings: a YAML file or a mapping goes in, frozen and validated dataclasses come out.

Rooms
    `document` gives values that know file, line and key; `rules` turn them into settings; `reading` walks along the
    schema; `model` is what comes out; `words` are those of messages. An engine's section stands in its folder
    (`database/sqlite3/settings.py`) and is imported when a document has one.

Which configuration counts
    What `configure()` was last given; else the file that the environment variable `DATABASE_CONFIG` names;
    else `config/database.yaml` in the working directory. `configure()` reads at once, so that a mistake is
    reported where the file is named. The other two are looked up at the first `current()` and kept until
    `forget()`.

Who may call it
    Any thread. An open pool `hold()`s the configuration: `configure()` is refused meanwhile, for half of
    the databases would keep their old settings. A pool calls `hold()` first and reads `current()` then; in
    this order, no `configure()` can come between. The lock covers only these decisions, never I/O. Two
    threads that look up the same file at once both read it, and either result will do.
    A forked child inherits the configuration but not the holders: the pools it inherited are not its own.

Values are data, and may be secret: those of keys that look like secrets never get into a message, nor does
anything of a line that speaks of one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from database.errors import ConfigurationError
from database.settings import reading
from database.settings.model import MEMORY, Configuration, LoggingSettings, Settings
from database.settings.reading import DEFAULT_FILE, ENVIRONMENT_VARIABLE
from database.settings.rules import unfit_function

__all__ = [
    "DEFAULT_FILE",
    "ENVIRONMENT_VARIABLE",
    "MEMORY",
    "Configuration",
    "LoggingSettings",
    "Settings",
    "configure",
    "current",
    "forget",
    "hold",
    "install",
    "override",
    "read",
    "release",
    "reset",
]

# Both stand in their engines' folders. These names stay for the code that was written before.
_ENGINES = {"PostgresqlSettings": "postgresql", "SqliteSettings": "sqlite3"}


def __getattr__(name: str) -> Any:
    if name not in _ENGINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"database.{_ENGINES[name]}.settings"), name)
    globals()[name] = found  # asked only once
    return found


class _State:
    """All that this module remembers; the lock guards `configured` against `holders`.

    It is reentrant, and `holders` is copied in one step, because `release()` may be called by a finalizer,
    which the garbage collector runs wherever it likes, within this very code too.
    """

    __slots__ = ("configured", "found", "holders", "lock", "on_connect", "overridden")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.configured: Configuration | None = None
        self.found: Configuration | None = None
        self.overridden: Configuration | None = None
        self.on_connect: Callable[[Any], object] | None = None  # for what is looked up
        # By id, for a reference would keep alive a pool that nobody closed. An id that is used again is
        # that of a new holder, which then takes the place of the lost one.
        self.holders: dict[int, str] = {}

    def refuse_if_held(self) -> None:
        if self.holders:
            copied = list(self.holders.values())
            names = ", ".join(map(repr, sorted(set(copied))))
            raise ConfigurationError(f"configure() while databases are open ({names}): `await close_all()` comes first")


_state = _State()


def configure(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    on_connect: Callable[[Any], object] | None = None,
) -> None:
    """Sets the configuration, in place of `DATABASE_CONFIG` and `config/database.yaml`; the last call wins.

    The source is read and validated at once. If it is wrong, what was configured before stays.

    Args:
        source: A YAML file's path; or a mapping of its structure; or None, which forgets what was configured.
        on_connect: Called with each new connection of each database, after what the configuration names.

    Raises:
        ConfigurationError: The source cannot be read or is wrong, or databases are open.
    """
    if on_connect is not None and (problem := unfit_function(on_connect)):
        raise ConfigurationError(f"configure(on_connect=…): {problem}")
    if _state.overridden is not None:
        if source is not None:
            reading.load(source)
        _state.overridden = _prepared(_state.overridden, on_connect)
        return
    with _state.lock:
        _state.refuse_if_held()
    configuration = None if source is None else _prepared(reading.load(source), on_connect)
    with _state.lock:
        _state.refuse_if_held()  # Again, for a pool may have opened while the file was read.
        _state.configured = configuration
        _state.found = None
        _state.on_connect = on_connect


def _prepared(configuration: Configuration, on_connect: Callable[[Any], object] | None) -> Configuration:
    return configuration if on_connect is None else configuration.with_step(on_connect)


def install(configuration: Configuration) -> None:
    """Like `configure()`, with a configuration that has been read already; the command-line tool adapts some.

    Raises:
        ConfigurationError: Databases are open.
    """
    with _state.lock:
        _state.refuse_if_held()
        _state.configured = configuration
        _state.found = _state.on_connect = None


def current() -> Configuration:
    """Returns the configuration that counts, looking it up at the first call.

    Raises:
        ConfigurationError: There is none, or it is wrong.
    """
    configuration = _state.overridden or _state.configured or _state.found
    if configuration is None:
        configuration = _state.found = _prepared(reading.discover(), _state.on_connect)
    return configuration


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Configuration:
    """Reads and validates a configuration, and changes nothing. Arguments and errors as for `configure`."""
    return reading.load(source)


def override(configuration: Configuration | None) -> Configuration | None:
    """Puts a configuration in place of all others, for `database.sandbox`; returns what was in place before.

    Meanwhile `configure()` only checks what it is given, so that an application that is being tested can start as it
    always does, and cannot reach its real database.
    """
    with _state.lock:
        before, _state.overridden = _state.overridden, configuration
    return before


def forget() -> None:
    """Drops what was looked up, so that the next `current()` looks again; keeps what was configured."""
    _state.found = None


def hold(holder: object, name: str) -> None:
    """Refuses `configure()` from now on; to be called before `current()` is read.

    Args:
        holder: What is open, told apart by identity. No reference is kept; holding twice is holding once.
        name: The database's name, for the message.
    """
    with _state.lock:
        _state.holders[id(holder)] = name


def release(holder: object) -> None:
    """Ends the holder's `hold()`; does nothing if there is none."""
    with _state.lock:
        _state.holders.pop(id(holder), None)


def reset() -> None:
    """Forgets everything, holders included. For tests; applications call `close_all()` and `configure()`."""
    with _state.lock:
        _state.configured = _state.found = _state.overridden = _state.on_connect = None
        _state.holders.clear()


def _after_fork_in_child() -> None:
    _state.lock = threading.RLock()  # Another thread of the parent may have had it.
    _state.holders = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
