"""What comes out: frozen and validated dataclasses. An engine's own stand in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

from database.errors import ConfigurationError
from database.settings.words import closest

__all__ = ["DEFAULT", "MEMORY", "Configuration", "LoggingSettings", "Settings"]

DEFAULT = "default"
MEMORY = ":memory:"


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
    """

    engines: Mapping[str, Mapping[str, Settings]]
    source: str

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
