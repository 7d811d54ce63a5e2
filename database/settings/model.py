"""What comes out: frozen and validated dataclasses. An engine's own stand in its folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias, cast

from database.errors import ConfigurationError
from database.settings.words import closest

__all__ = ["DEFAULT", "MEMORY", "NAME", "Configuration", "LoggingSettings", "Settings", "Step", "steps_of", "with_step"]

DEFAULT = "default"
MEMORY = ":memory:"
NAME = "{name}"
"""What a pattern's path has in place of the database's name."""

Step: TypeAlias = "str | Callable[[Any], object]"
"""What prepares a new connection: a function, or where it is (`"package.module:function"`)."""


@dataclass(frozen=True, slots=True)
class LoggingSettings:
    """What is logged of a database.

    Attributes:
        console: Adds the console handler.
        level: Name of a standard logging level, in upper case.
        parameters: `"redacted"` or `"shown"`.
        slow_ms: Statements that take longer than this many milliseconds are warned about; None: never.
        long_read_s: Read-only transactions and streams that are open for longer than this many seconds are warned
            about, for the WAL grows meanwhile; None: never.
        slow_transaction_ms: Likewise transactions, by the time for which they hold their connection.
    """

    console: bool = False
    level: str = "INFO"
    parameters: str = "redacted"
    slow_ms: float | None = 200.0
    long_read_s: float | None = 60.0
    slow_transaction_ms: float | None = 1000.0


class Settings(Protocol):
    """The settings of one database of any engine: what all engines have in common.

    Attributes:
        name: The name that `get_db()` is called with.
        pool_size: The most connections of one event loop; SQLite has one more, the writer.
        pool_timeout: Seconds to wait for a connection.
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one.
        logging: What is logged.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:  # noqa: D102 - see above; so below
        ...

    @property
    def pool_size(self) -> int:  # noqa: D102
        ...

    @property
    def pool_timeout(self) -> float:  # noqa: D102
        ...

    @property
    def init_sql(self) -> str | None:  # noqa: D102
        ...

    @property
    def logging(self) -> LoggingSettings:  # noqa: D102
        ...


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that was configured.

    Attributes:
        engines: The databases' settings by engine package (`"sqlite3"`) and name.
        source: Where it comes from: the file's path as it was given, or `"configure(mapping)"`.
        patterns: Likewise what stands for many databases, chosen at run time: `"tenant-*"`. By engine and pattern.
    """

    engines: Mapping[str, Mapping[str, Settings]]
    source: str
    patterns: Mapping[str, Mapping[str, Settings]] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, name: str, engine: str | None = None) -> tuple[str, Settings]:
        """Finds a database by its name.

        Args:
            name: The database's name.
            engine: The engine package to look in (`"sqlite3"`); None looks in all.

        Returns:
            The engine package and the settings.

        Raises:
            ConfigurationError: No database has that name, or several engines have one and `engine` is None.
        """
        found = [each for each, databases in self.engines.items() if name in databases and engine in (None, each)]
        if len(found) == 1:
            return found[0], self.engines[found[0]][name]
        if not found and (fitting := self._of_pattern(name, engine)) is not None:
            return fitting
        if found:
            packages = " or ".join(f"database.{each}" for each in found)
            raise ConfigurationError(
                f"{self.source}: several engines have a database named {name!r}; take get_db from {packages}"
            )
        text = f"{self.source}: no {engine + ' ' if engine else ''}database is named {name!r}"
        known = sorted({each for key in self.engines if engine in (None, key) for each in self.engines[key]})
        elsewhere = [each for each, databases in self.engines.items() if name in databases]
        if elsewhere:
            text += f"; {' and '.join(elsewhere)} has one"
        elif meant := closest(str(name), known):
            text += f"; did you mean {meant!r}?"
        elif name == DEFAULT:
            text += "; it takes a path directly below the engine's section"
        raise ConfigurationError(f"{text} (known: {', '.join(map(repr, known)) or 'none'})")

    def pattern_of(self, name: str, engine: str) -> str | None:
        """The pattern by which that database is found; None where its own name stands here."""
        if name in self.engines.get(engine, ()):
            return None
        return next((each for each in self.patterns.get(engine, ()) if fits(name, each)), None)

    def _of_pattern(self, name: str, engine: str | None) -> tuple[str, Settings] | None:
        """The settings of a database that only a pattern knows."""
        for package, patterns in self.patterns.items():
            if engine not in (None, package):
                continue
            for pattern, settings in patterns.items():
                if fits(name, pattern):
                    return package, cast("Any", settings).named(name)
                head, _, tail = pattern.partition("*")
                if name.startswith(head) and name.endswith(tail):
                    raise ConfigurationError(
                        f"{self.source}: the name {name!r} does not fit {pattern!r}: for the * stand letters, digits, `-`,"
                        f" `_` and `.`, {MOST_OF_A_NAME} at the most and no `.` first: it becomes a part of a file's name"
                    )
        return None

    def with_step(self, step: Step) -> Configuration:
        """The same, where one more function prepares the connections of each database that knows such functions."""

        def stepped(of: Mapping[str, Mapping[str, Settings]]) -> Mapping[str, Mapping[str, Settings]]:
            engines: dict[str, Mapping[str, Settings]] = {}
            for engine, databases in of.items():
                engines[engine] = MappingProxyType({name: with_step(each, step) for name, each in databases.items()})
            return MappingProxyType(engines)

        return Configuration(stepped(self.engines), self.source, stepped(self.patterns))


MOST_OF_A_NAME = 100
"""Characters."""

_PART = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MOST_OF_A_NAME - 1}}}")


def fits(name: str, pattern: str) -> bool:
    """Whether a database's name is one of a pattern's: what stands for the `*` is safe in a file's name."""
    head, _, tail = pattern.partition("*")
    part = name[len(head) : len(name) - len(tail)]
    return name.startswith(head) and name.endswith(tail) and _PART.fullmatch(part) is not None


def steps_of(on_connect: Any) -> tuple[Step, ...]:
    """The functions of a setting `on_connect`, or where they are."""
    if on_connect is None:
        return ()
    return cast("tuple[Step, ...]", on_connect) if isinstance(on_connect, tuple) else (on_connect,)


def with_step(settings: Settings, step: Step) -> Settings:
    """The settings of one database, where one more function prepares its connections."""
    if not hasattr(settings, "on_connect"):
        return settings
    steps = steps_of(cast("Any", settings).on_connect)
    if step in steps:  # an application that is configured for each of its tests gives it again and again
        return settings
    return replace(settings, on_connect=(*steps, step) if steps else step)
