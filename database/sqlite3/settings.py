"""SQLite's section of the configuration: its settings, and the rules that read them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from database.errors import ConfigurationError
from database.settings.model import MEMORY, NAME, LoggingSettings, Step
from database.settings.rules import (
    Section,
    Unfit,
    amount,
    apply,
    boolean,
    choice,
    duration,
    file,
    init_sql,
    migrations,
    monitor,
    path,
    path_text,
    unfit_function,
    whole,
)
from database.settings.words import closest, did_you_mean, no_such_file

if TYPE_CHECKING:
    from database.settings.document import Item
    from database.sqlite3.pragmas import Value

__all__ = ["SECTION", "SqliteSettings"]

MAX_OPEN = 100
"""Databases of a pattern that are open at once on one event loop."""


@dataclass(frozen=True, slots=True)
class SqliteSettings:
    """One SQLite database.

    Attributes:
        name: The name that `get_db()` is called with.
        path: The file, with `~` expanded, relative to the working directory at first use; or `":memory:"`.
        pool_size: Number of reader connections; one writer connection stands beside them.
        pool_timeout: Seconds to wait for a connection.
        busy_timeout: Milliseconds to wait for another process's lock.
        journal_mode: https://www.sqlite.org/pragma.html#pragma_journal_mode, in upper case.
        synchronous: https://www.sqlite.org/pragma.html#pragma_synchronous, by name, in upper case.
        cache_size: Pages, or KiB if negative: https://www.sqlite.org/pragma.html#pragma_cache_size
        foreign_keys: Whether foreign keys are enforced.
        pragmas: More PRAGMAs for every connection, by name.
        extensions: Loadable extensions for every connection: a file, or a package with a `loadable_path()`.
        attach: More files on every connection, by the name that SQL text gives them.
        on_connect: What prepares each new connection: a function, or where it is (`"package.module:function"`); or
            several of them, where code has added some: `configure(on_connect=…)`, `db.on_connect(…)`.
        module: The package that is used in place of `sqlite3`.
        key_env: The environment variable that holds SQLCipher's key; read at each connection.
        key_file: The file that holds it (a mounted secret); read at each connection.
        wal_limit: MiB of the WAL from which on the pool makes room in it; None: never.
        wal_autocheckpoint: Pages in the WAL after which a commit copies them into the database; 0: never.
        inline_reads: Whether small reads run on the event loop's own thread.
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one, or none where
            `migrations` makes the schema.
        migrations: Folder of the numbered SQL files that bring the schema up to date; None: there are none.
        max_open: Of a pattern (`tenant-*`): how many of its databases may be open at once on one event loop; then the one
            that has been at rest for longest is closed.
        auto_migrate: Whether they are applied whenever a pool opens.
        monitor: Folder in which this process offers its pools' statistics on a Unix socket; None: it does not.
        logging: What is logged.
    """

    name: str
    path: str
    pool_size: int = 5
    pool_timeout: float = 30.0
    busy_timeout: int = 5000
    journal_mode: str = "WAL"
    synchronous: str = "NORMAL"
    cache_size: int = -2000
    foreign_keys: bool = True
    pragmas: Mapping[str, Value] = field(default_factory=dict[str, "Value"])
    extensions: tuple[str, ...] = ()
    attach: Mapping[str, str] = field(default_factory=dict[str, str])
    on_connect: Step | tuple[Step, ...] | None = None
    module: str = "sqlite3"
    key_env: str | None = None
    key_file: str | None = None
    wal_limit: float | None = 64
    wal_autocheckpoint: int = 1000
    inline_reads: bool = False
    init_sql: str | None = None
    migrations: str | None = None
    auto_migrate: bool = False
    monitor: str | None = None
    max_open: int = MAX_OPEN
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def named(self, name: str) -> SqliteSettings:
        """The settings of one database of this pattern."""
        return replace(self, name=name, path=self.path.replace(NAME, name))

    @property
    def encrypted(self) -> bool:
        """Whether the file is SQLCipher's."""
        return self.key_env is not None or self.key_file is not None


def _pragmas(item: Item) -> dict[str, Value]:
    from database.sqlite3.pragmas import CIPHER, CONFIGURABLE, REFUSED  # noqa: PLC0415 - few configure any

    found: dict[str, Value] = {}
    for given, below in item.entries().items():
        name = given.lower()
        if name in REFUSED:
            raise below.error(f"cannot be set: {REFUSED[name]}")
        if name in found:
            raise below.error("stands twice")
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or (
            name not in CONFIGURABLE and name not in CIPHER and not _pragma_exists(name)
        ):
            meant = closest(name, CONFIGURABLE)
            raise below.error(
                f"SQLite has no PRAGMA of that name; {did_you_mean(meant) or 'see sqlite.org/pragma.html'}"
            )
        found[name] = apply(_pragma_value, below)
    return found


def _pragma_exists(name: str) -> bool:
    """Whether this SQLite, newer than this list, has it."""
    import sqlite3  # noqa: PLC0415 - few configure any

    raw = sqlite3.connect(":memory:")
    try:
        return bool(raw.execute("SELECT count(*) FROM pragma_pragma_list WHERE name = ?", (name,)).fetchone()[0])
    except sqlite3.Error:
        return False
    finally:
        raw.close()


def _pragma_value(item: Item) -> Value:
    value = item.value
    if isinstance(value, bool) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value.strip()
    raise Unfit("true, false, a whole number or a word")


def _extensions(item: Item) -> tuple[str, ...]:
    return tuple(apply(_extension, each) for each in item.elements("a list of extensions"))


def _extension(item: Item) -> str:
    expected = "the path of a loadable extension, or the name of an installed package that brings one"
    found = path_text(item, expected)
    if os.path.isfile(found):
        return found
    if os.path.isdir(found) and os.sep in found:
        raise Unfit(expected, "it is a directory")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", found) or found.endswith((".so", ".dll", ".dylib")):
        for suffix in (".so", ".dylib", ".dll"):  # which SQLite adds, too
            if os.path.isfile(found + suffix):
                return found
        raise Unfit(expected, no_such_file(found))
    from database.sqlite3.library import installed  # noqa: PLC0415 - few configure any

    if not installed(found):
        raise Unfit(expected, f"no package of that name is installed; `pip install {found.replace('_', '-')}`")
    return found


MOST_ATTACHED = 10
"""https://www.sqlite.org/limits.html, number 11"""


def _attach(item: Item) -> dict[str, str]:
    found: dict[str, str] = {}
    entries = item.entries()
    for name, below in entries.items():
        if not re.fullmatch(r"[^\W\d]\w*", name):
            raise below.error("expected a name of letters, digits and underscores, as SQL text will give it")
        if name.lower() in ("main", "temp"):
            raise below.error(f"{name!r} is SQLite's own name for the database itself; take another")
        if name.lower() in map(str.lower, found):
            raise below.error("stands twice; SQLite does not tell upper case from lower case")
        found[name] = apply(_attached, below)
    if len(found) > MOST_ATTACHED:
        raise item.error(f"expected at most {MOST_ATTACHED} files, got {len(found)}: SQLite attaches no more")
    return found


def _attached(item: Item) -> str:
    expected = "the path of a database's file"
    found = path_text(item, expected)
    if found == MEMORY:
        raise Unfit(expected, "each connection would have its own, and tasks would see different data")
    return found


def _on_connect(item: Item) -> Step | None:
    value = item.value
    if value is None:
        return None
    expected = "'package.module:function', a function, or null"
    if callable(value):
        if problem := unfit_function(value):
            raise Unfit(expected, problem)
        return value
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", value):
        raise Unfit(expected)
    from database.sqlite3.library import installed  # noqa: PLC0415 - few configure any

    if not installed(value.partition(":")[0]):
        raise Unfit(expected, f"there is no module {value.partition('.')[0].partition(':')[0]!r}")
    return value


def _module(item: Item) -> str:
    value = item.value
    expected = "the name of a package that can be used in place of sqlite3, such as 'pysqlite3' or 'sqlcipher3'"
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", value):
        raise Unfit(expected)
    from database.sqlite3 import library  # noqa: PLC0415 - a program that has no SQLite need not import it

    try:
        library.load(value)
    except ConfigurationError as error:
        raise item.error(str(error).removeprefix("module: ")) from error.__cause__
    return value


def _key_env(item: Item) -> str | None:
    value = item.value
    if value is not None and (not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*", value)):
        # Not shown: it may be the key itself.
        raise item.error("expected the name of an environment variable, which holds the key; or null")
    return value


def _file_identity(settings: SqliteSettings) -> str | None:
    return None if settings.path == MEMORY else _identity(settings.path)


def _identity(path: str) -> str:
    try:
        return os.path.normcase(os.path.realpath(path))
    except OSError:  # The working directory has been removed; opening the database will say so.
        return os.path.normcase(os.path.normpath(path))


def _check(settings: SqliteSettings) -> tuple[str, str] | None:
    """What does not go together: the key at fault, and why."""
    if (fault := _check_pattern(settings)) is not None:
        return fault
    if settings.attach:
        places = {_identity(settings.path): f"the database itself ({settings.name!r})"}
        for name, attached in settings.attach.items():
            if (other := places.setdefault(_identity(attached), repr(name))) != repr(name):
                hint = "; where it is inherited, say `attach: {}` there" if settings.name != "default" else ""
                return "attach", f"{name!r} and {other} are the same file, {_identity(attached)!r}{hint}"
    if not (settings.encrypted or settings.extensions or settings.pragmas):
        return None
    from database.sqlite3 import library  # noqa: PLC0415 - most configurations have none of these
    from database.sqlite3.pragmas import CIPHER  # noqa: PLC0415

    found = library.load(settings.module)
    if settings.encrypted:
        key = "key_file" if settings.key_env is None else "key_env"
        if settings.key_env is not None and settings.key_file is not None:
            return key, "key_file says where the key is, too; give one of them"
        if not found.cipher:
            return key, (
                f"encryption needs SQLCipher, and {settings.module!r} is an ordinary SQLite:"
                " `pip install sqlcipher3`, and set `module: sqlcipher3`"
            )
    if settings.extensions and not found.loads_extensions:
        where = "this Python's sqlite3" if settings.module == library.STANDARD else repr(settings.module)
        return "extensions", (
            f"{where} was built without the means to load extensions (enable_load_extension): set `module` to a drop-in"
            " that has them, such as `module: pysqlite3` (`pip install pysqlite3`)"
        )
    for name in settings.pragmas:
        if name in CIPHER and not settings.encrypted:
            return "pragmas", f"{name} is SQLCipher's, and there is neither key_env nor key_file"
    return None


def _check_pattern(settings: SqliteSettings) -> tuple[str, str] | None:
    """A pattern stands for a file each; what is no pattern is one file."""
    if "*" not in settings.name:
        if NAME in settings.path:
            return (
                "path",
                f"{NAME} stands for the name of a database that a pattern gives (`databases: {{tenant-*: …}}`)",
            )
        if settings.max_open != MAX_OPEN:
            return "max_open", "only a pattern (`databases: {tenant-*: …}`) stands for several databases"
        return None
    if settings.name.count("*") != 1:
        return "path", f"expected one * in the pattern {settings.name!r}"
    if NAME not in settings.path:
        return "path", f"expected {NAME} in it, which stands for the database's name: ./data/{NAME}.db"
    return None


SECTION = Section(
    engine="sqlite3",
    build=SqliteSettings,
    rules={
        "path": path,
        "pool_size": whole(1, 1000),
        "pool_timeout": duration("seconds"),
        "busy_timeout": whole(0, 2**31 - 1),
        "journal_mode": choice("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"),
        "synchronous": choice("OFF", "NORMAL", "FULL", "EXTRA", numbered=True),
        "cache_size": whole(-(2**31) + 1, 2**31 - 1),  # SQLite takes what does not fit 32 bits for 0.
        "foreign_keys": boolean,
        "pragmas": _pragmas,
        "extensions": _extensions,
        "attach": _attach,
        "on_connect": _on_connect,
        "module": _module,
        "key_env": _key_env,
        "key_file": file,
        "wal_limit": amount("MiB", optional=True),
        "wal_autocheckpoint": whole(0, 2**31 - 1),
        "inline_reads": boolean,
        "init_sql": init_sql,
        "migrations": migrations,
        "auto_migrate": boolean,
        "monitor": monitor,
        "max_open": whole(1, 100_000),
    },
    own=("path",),
    identity=_file_identity,
    private=("migrations", "max_open"),
    merged=("pragmas",),
    replaces=(("key_env", "key_file"),),
    check=_check,
)
