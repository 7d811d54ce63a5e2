"""What all commands share: which database, how to speak, how to fail."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import io
import json
import os
import sqlite3
import struct
import sys
import threading
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import anyio
import anyio.to_thread
import typer
from rich.console import Console
from rich.text import Text

from database import errors, settings
from database.engine.statement import quoted
from database.session.database import Database
from database.session.registry import close_all, get_db
from database.settings import MEMORY

__all__ = [
    "Failure",
    "Status",
    "Target",
    "Verdict",
    "choose",
    "clean",
    "duration",
    "err",
    "error_block",
    "fail",
    "guarded",
    "in_thread",
    "local",
    "out",
    "out_json",
    "quote",
    "remark",
    "run",
    "size",
    "speak",
    "utf8",
]

P = ParamSpec("P")
T = TypeVar("T")


class Status(IntEnum):
    """Exit statuses. They are part of the interface: docs/guides/command.md."""

    DONE = 0
    FAILED = 1
    """It could not be done, or `check` has found a fault."""
    USAGE = 2
    """Wrong arguments, wrong configuration, nothing there to work on."""
    INTERRUPTED = 130
    """Ctrl-C."""
    PIPE = 141
    """Whoever read the output has stopped reading."""


class Failure(Exception):
    """Something that a command says and ends with.

    Attributes:
        status: The exit status.
        hint: What to do about it, on a line of its own.
    """

    def __init__(self, message: str, hint: str = "", status: Status = Status.FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


class Verdict(Failure):
    """The result has been shown already, and only its exit status is left to be given."""

    def __init__(self) -> None:
        super().__init__("")


def fail(message: str, hint: str = "", status: Status = Status.FAILED) -> NoReturn:
    """Raises `Failure`."""
    raise Failure(message, hint, status)


# --- Output -------------------------------------------------------------------------------------------------


_PLAIN = str.maketrans(
    {"✓": "+", "✗": "x", "·": "-", "→": "->", "…": "...", "µ": "u", "●": "*", "○": "o", "─": "-", "—": "-"}
)


def _speak_plainly(error: UnicodeError) -> tuple[str, int]:
    """What a terminal of another encoding gets for a character that it does not know: a likeness, or its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(
        each if each.isascii() else "".join(f"\\u{unit:04x}" for unit in _units(each))
        for each in text.translate(_PLAIN)
    )
    return plain, error.end


def _units(character: str) -> tuple[int, ...]:
    """A character as JSON escapes it: in units of sixteen bits."""
    encoded = character.encode("utf-16-be", "surrogatepass")
    return struct.unpack(f">{len(encoded) // 2}H", encoded)


codecs.register_error("database.cli", _speak_plainly)


def speak() -> None:
    """Lets stdout and stderr write whatever they are given, whichever language and encoding the terminal is set to."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="database.cli")
    stdin: Any = sys.stdin
    if isinstance(stdin, io.TextIOWrapper) and codecs.lookup(stdin.encoding).name == "ascii":
        stdin.reconfigure(encoding="utf-8")


def utf8(text: str) -> str:
    """An argument of the command line that the locale could not read, read as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    return text


def local(name: str) -> str:
    """A file's name as the locale has it, which may know no such letters: the other way round."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


@functools.cache
def out() -> Console:
    """Where results go: stdout."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 1000  # a file or a pipe has no edge to fold at
    return console


@functools.cache
def err() -> Console:
    """Where errors, remarks and progress bars go: stderr."""
    return Console(stderr=True, highlight=False, emoji=False)


def remark(text: str) -> None:
    """Says something that is no result, on stderr, so that it never gets into a file or a pipe."""
    err().print(Text(clean(text)), soft_wrap=True, style="dim")


def out_json(value: Any) -> None:
    """Writes one JSON document on one line to stdout."""
    print(json.dumps(value, ensure_ascii=False, default=str))


_CONTROLS = {code: 0x2400 + code for code in range(32)} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
_CONTROLS_BUT_LINES = {code: picture for code, picture in _CONTROLS.items() if code not in (9, 10)}


def clean(text: str, *, lines: bool = True) -> str:
    """Text that a terminal shows as it is: control characters, which could command it, become pictures of themselves."""
    return text.translate(_CONTROLS_BUT_LINES if lines else _CONTROLS)


def size(number: float | None) -> str:
    """Bytes for people: `1.4 MiB`."""
    if number is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: `3.2 ms`, `1.5 s`, `2 h 5 min`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def quote(name: str) -> str:
    """An SQL identifier, quoted so that whatever it is it stays a name."""
    if "\0" in name:
        fail("a name cannot hold a NUL character", status=Status.USAGE)
    return quoted(name)


# --- Failing ------------------------------------------------------------------------------------------------


def error_block(error: BaseException) -> str:
    """An error in one readable block: what, then what to do."""
    text = f"error: {clean(str(error) or type(error).__name__)}"
    hint = getattr(error, "hint", "")
    if hint:
        text += f"\n  {clean(hint)}"
    return text


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wraps a command: what goes wrong becomes a block on stderr and an exit status."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (Failure, errors.DatabaseError) as error:
            status = error.status if isinstance(error, Failure) else Status.FAILED
            if isinstance(error, errors.ConfigurationError):
                status = Status.USAGE
            if not isinstance(error, Verdict):
                err().print(Text(error_block(error)), soft_wrap=True, style="red")
            raise typer.Exit(status) from None
        except KeyboardInterrupt:
            err().print("interrupted", style="red")
            raise typer.Exit(Status.INTERRUPTED) from None
        except BrokenPipeError:
            # What is still buffered has nowhere to go, and the interpreter would complain about that at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(Status.PIPE) from None
        except OSError as error:
            err().print(Text(error_block(error)), soft_wrap=True, style="red")
            raise typer.Exit(Status.FAILED) from None

    return wrapper


def run(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Runs a coroutine function under asyncio and closes all databases behind it; Ctrl-C stops what runs."""

    async def main() -> T:
        try:
            return await function(*args)
        finally:
            with anyio.CancelScope(shield=True):
                await close_all()

    try:
        return anyio.run(main)
    except BaseExceptionGroup as group:
        # Of tasks that failed together, the first to fail is the one to speak of: the others were cancelled for it.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = cast("BaseException", error.exceptions[0])
        raise error from None


async def in_thread(function: Callable[[Callable[[], bool]], T]) -> T:
    """Runs a function on a thread of its own; it is given `stopped()`, which says whether nobody waits for it any more."""
    stop = threading.Event()

    async def watch() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            stop.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            return await anyio.to_thread.run_sync(function, stop.is_set)
        finally:
            tasks.cancel_scope.cancel()
    raise AssertionError  # the group lets the result or an error through


# --- Which database -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """The database that a command is about.

    Attributes:
        config: The configuration's file; None: `DATABASE_CONFIG`, else `config/database.yaml`.
        name: The database's name in it, or with its engine where several have one of that name: `sqlite:default`.
        path: A database file, in place of a configuration.
    """

    config: str | None = None
    name: str = "default"
    path: str | None = None

    def configuration(self) -> settings.Configuration:
        """The configuration as it was written.

        Raises:
            ConfigurationError: It is missing or wrong.
        """
        if self.path is not None:
            if self.config is not None:
                fail("--path takes the place of a configuration; leave out --config", status=Status.USAGE)
            path = os.path.expanduser(self.path)
            mode = _journal_mode(path)
            settings.configure({"database": {"sqlite": {"path": path, "init_sql": "", "journal_mode": mode}}})
        else:
            settings.configure(self.config)
        try:
            return settings.current()
        except errors.ConfigurationError as error:
            if self.config is None and "no such file" in str(error) and settings.ENVIRONMENT_VARIABLE not in os.environ:
                fail(
                    f"{settings.DEFAULT_FILE}: no such file here",
                    f"name one with --config, or in {settings.ENVIRONMENT_VARIABLE}; or name a database file with --path",
                    Status.USAGE,
                )
            raise

    def settings(self) -> tuple[str, Any]:
        """The engine's package and the database's settings as they were written."""
        return choose(self.configuration(), self.name)

    def open(
        self, *, schema: bool = False, must_exist: bool = True, only: str | None = None, **changes: Any
    ) -> Database:
        """The database's handle, with a configuration that suits a command.

        Nothing is logged to the console, which is the command's, nothing is migrated, and unless `schema` is true no
        init_sql is run: to look at a database must not change it. `changes` are settings that this command needs
        otherwise than they are configured, where the engine has them; `only` is the one engine that it knows.
        """
        configuration = self.configuration()
        engine, chosen = choose(configuration, self.name)
        if only not in (None, engine):
            fail(
                f"database {self.name!r} is of the engine {engine}; this command knows {only} only", status=Status.USAGE
            )
        path = getattr(chosen, "path", None)
        if must_exist and path is not None:
            if path == MEMORY:
                fail(
                    f"database {self.name!r} is {MEMORY}: it lives in the process that opened it, and ends with it",
                    status=Status.USAGE,
                )
            if not Path(path).exists():
                fail(
                    f"{path}: no such file: database {self.name!r} has not been created yet",
                    "`python -m database init` creates it",
                    Status.USAGE,
                )
        quiet = dataclasses.replace(chosen.logging, console=False)
        changes |= {"logging": quiet, "monitor": None, "auto_migrate": False}
        if not schema:
            changes["init_sql"] = ""
        known = {field.name for field in dataclasses.fields(chosen)}
        adapted = dataclasses.replace(chosen, **{key: value for key, value in changes.items() if key in known})
        databases = MappingProxyType({chosen.name: adapted})
        settings.install(settings.Configuration(MappingProxyType({engine: databases}), configuration.source))
        return get_db(chosen.name, engine)


ENGINES = {"sqlite": "sqlite3", "sqlite3": "sqlite3", "postgresql": "postgresql"}
"""Engines as they are written before a database's name, and their packages."""


def choose(configuration: settings.Configuration, name: str) -> tuple[str, Any]:
    """The engine's package and the settings of the database that `NAME` or `ENGINE:NAME` means."""
    having = [engine for engine, named in configuration.engines.items() if name in named]
    if len(having) > 1:
        sections = {package: section for section, package in reversed(ENGINES.items())}
        ways = " or ".join(f"--db {sections.get(engine, engine)}:{name}" for engine in having)
        fail(
            f"{configuration.source}: several engines have a database named {name!r}",
            f"say which: {ways}",
            Status.USAGE,
        )
    section, colon, rest = name.partition(":")
    if not having and colon and section in ENGINES:
        return configuration.find(rest or "default", ENGINES[section])
    return configuration.find(name)


def _journal_mode(path: str) -> str:
    """The journal mode that a file has, so that looking at it leaves it as it is."""
    if not os.path.isfile(path):
        return "WAL"
    try:
        connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        try:
            found = str(connection.execute("PRAGMA journal_mode").fetchone()[0]).upper()
        finally:
            connection.close()
    except sqlite3.Error:
        return "WAL"  # whoever opens it says what is wrong
    return "WAL" if found == "WAL" else "DELETE"  # what else there is belongs to a connection, not to the file
