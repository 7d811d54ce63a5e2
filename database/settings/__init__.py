"""Settings: a YAML file or a mapping goes in, frozen and validated dataclasses come out.

How it works
    A document (a file's YAML nodes, or a mapping) is walked along the schema, never beyond it, so that
    aliases which lead in circles or multiply are harmless. The walk hands out `_Item`s: a value that knows
    the keys it stands under and, in a file, the line. Rules turn an item's value into a setting or raise
    `_Unfit`, which the walk turns into a `ConfigurationError` that names file, line and key. The line is
    the key's own, also where an alias brings the value from elsewhere; a key that came through `<<` has the
    line where it was written.

    An engine's section is one entry of `_SECTIONS`: its package, its dataclass, and a rule for each key.

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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from database.errors import ConfigurationError

if TYPE_CHECKING:
    import yaml
# Imported where a file is read: importing it takes longer than all else here, and a mapping needs none.

__all__ = [
    "DEFAULT_FILE",
    "ENVIRONMENT_VARIABLE",
    "MEMORY",
    "Configuration",
    "LoggingSettings",
    "PostgresqlSettings",
    "Settings",
    "SqliteSettings",
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

DEFAULT_FILE = "config/database.yaml"
ENVIRONMENT_VARIABLE = "DATABASE_CONFIG"
MEMORY = ":memory:"

MONITOR_PATH_LIMIT = 70
"""Bytes: the system allows a socket's path 103 (macOS) or 107 (Linux), of which its name takes up to 32."""

_DEFAULT = "default"
_EXAMPLE = 'configure({"database": {"sqlite": {"path": "./data/jobu.db"}}})'


# --- What comes out -----------------------------------------------------------------------------------------


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
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one, or none where
            `migrations` makes the schema.
        migrations: Folder of the numbered SQL files that bring the schema up to date; None: there are none.
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
    init_sql: str | None = None
    migrations: str | None = None
    auto_migrate: bool = False
    monitor: str | None = None
    logging: LoggingSettings = LoggingSettings()


@dataclass(frozen=True, slots=True)
class PostgresqlSettings:
    """One PostgreSQL database.

    What says where it is and who is there goes to libpq, which knows more ways to say so:
    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS

    Attributes:
        name: The name that `get_db()` is called with.
        conninfo: A connection string or URI; the keys below override its parts. Never shown, for it may hold a password.
        host: Name, address or directory of the socket; several, separated by commas, are tried in their order.
        port: A number, or one for each host.
        dbname: The database's name on the server.
        user: The role.
        password_env: The environment variable that holds the password; read at each connection.
        password_file: The file that holds the password (a mounted secret); read at each connection.
        sslmode: How much TLS is asked for.
        sslrootcert: File of the certificate authorities.
        sslcert: File of the client's certificate.
        sslkey: File of its key.
        target_session_attrs: Which server will do; None: one that takes writes, where several hosts are named.
        application_name: What the server's views and logs call these connections.
        options: Command-line options for the server process, such as `-c search_path=app`.
        connect_timeout: Seconds for one attempt to connect to one host.
        reconnect_timeout: Seconds for which a lost connection is tried to be made again, with growing pauses.
        pool_size: The most connections of one event loop; reads and writes share them.
        pool_timeout: Seconds to wait for a connection.
        lock_timeout: Milliseconds to wait for another transaction's lock; 0: for ever.
        statement_timeout: Milliseconds that one statement may take; 0: any.
        isolation: Of transactions that may write, and of single statements.
        prepare_threshold: Executions from which a statement is prepared on the server; 0: never.
        statement_rollback: Whether a failed statement undoes only itself and its transaction goes on, as on SQLite.
        lastrowid: Whether an INSERT tells the generated key, as on SQLite.
        replicas: What of the connection string is different on the replicas; read-only transactions run there.
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one.
        logging: What is logged.
    """

    name: str
    conninfo: str | None = field(default=None, repr=False)
    host: str | None = None
    port: str | None = None
    dbname: str | None = None
    user: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    sslmode: str | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    target_session_attrs: str | None = None
    application_name: str | None = None
    options: str | None = None
    connect_timeout: int = 10
    reconnect_timeout: float = 30.0
    pool_size: int = 10
    pool_timeout: float = 30.0
    lock_timeout: int = 30_000
    statement_timeout: int = 0
    isolation: str = "READ COMMITTED"
    prepare_threshold: int = 5
    statement_rollback: bool = True
    lastrowid: bool = True
    replicas: str | None = field(default=None, repr=False)
    init_sql: str | None = None
    logging: LoggingSettings = LoggingSettings()


Settings: TypeAlias = SqliteSettings | PostgresqlSettings
"""The settings of one database of any engine."""


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
        elif meant := _closest(str(name), known):
            text += f"; did you mean {meant!r}?"
        elif name == _DEFAULT:
            text += "; it takes a path directly below the engine's section"
        raise ConfigurationError(f"{text} (known: {', '.join(map(repr, known)) or 'none'})")


# --- Which configuration counts -----------------------------------------------------------------------------


class _State:
    """All that this module remembers; the lock guards `configured` against `holders`.

    It is reentrant, and `holders` is copied in one step, because `release()` may be called by a finalizer,
    which the garbage collector runs wherever it likes, within this very code too.
    """

    __slots__ = ("configured", "found", "holders", "lock", "overridden")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.configured: Configuration | None = None
        self.found: Configuration | None = None
        self.overridden: Configuration | None = None
        # By id, for a reference would keep alive a pool that nobody closed. An id that is used again is
        # that of a new holder, which then takes the place of the lost one.
        self.holders: dict[int, str] = {}

    def refuse_if_held(self) -> None:
        if self.holders:
            copied = list(self.holders.values())
            names = ", ".join(map(repr, sorted(set(copied))))
            raise ConfigurationError(f"configure() while databases are open ({names}): `await close_all()` comes first")


_state = _State()


def configure(source: str | os.PathLike[str] | Mapping[str, Any] | None = None) -> None:
    """Sets the configuration, in place of `DATABASE_CONFIG` and `config/database.yaml`; the last call wins.

    The source is read and validated at once. If it is wrong, what was configured before stays.

    Args:
        source: A YAML file's path; or a mapping of its structure; or None, which forgets what was configured.

    Raises:
        ConfigurationError: The source cannot be read or is wrong, or databases are open.
    """
    if _state.overridden is not None:
        if source is not None:
            _load(source)
        return
    with _state.lock:
        _state.refuse_if_held()
    configuration = None if source is None else _load(source)
    with _state.lock:
        _state.refuse_if_held()  # Again, for a pool may have opened while the file was read.
        _state.configured = configuration
        _state.found = None


def install(configuration: Configuration) -> None:
    """Like `configure()`, with a configuration that has been read already; the command-line tool adapts some.

    Raises:
        ConfigurationError: Databases are open.
    """
    with _state.lock:
        _state.refuse_if_held()
        _state.configured = configuration
        _state.found = None


def current() -> Configuration:
    """Returns the configuration that counts, looking it up at the first call.

    Raises:
        ConfigurationError: There is none, or it is wrong.
    """
    configuration = _state.overridden or _state.configured or _state.found
    if configuration is None:
        configuration = _state.found = _discover()
    return configuration


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Configuration:
    """Reads and validates a configuration, and changes nothing. Arguments and errors as for `configure`."""
    return _load(source)


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
        _state.configured = _state.found = _state.overridden = None
        _state.holders.clear()


def _after_fork_in_child() -> None:
    _state.lock = threading.RLock()  # Another thread of the parent may have had it.
    _state.holders = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# --- Where it comes from ------------------------------------------------------------------------------------


def _load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Configuration:
    if isinstance(source, Mapping):
        return _read_document(_MappingItem("configure(mapping)", (), source))
    path = os.fspath(source) if _is_path(source) else source
    if not _is_text(path) or not path:
        raise ConfigurationError(f"configure() takes a path, a mapping or None, not {_show(path)}")
    return _load_file(path, "configure() names it")


def _discover() -> Configuration:
    if path := os.environ.get(ENVIRONMENT_VARIABLE):
        return _load_file(path, f"{ENVIRONMENT_VARIABLE} names it: correct or unset it")
    return _load_file(
        DEFAULT_FILE,
        f"create it, set {ENVIRONMENT_VARIABLE} to another file, or call {_EXAMPLE} before the first use",
    )


def _load_file(path: str, advice: str) -> Configuration:
    import yaml  # noqa: PLC0415 - see the top of the module

    text = _read_text(path, advice)
    try:
        # No object is ever constructed but by SafeLoader, and from scalars only.
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigurationError(f"{path}:1: database: missing; the file is empty")
        _refuse_duplicates(path, node)
        return _read_document(_YamlItem(path, (), loader, node))
    except yaml.YAMLError as error:
        # `from None`: the YAML error quotes the line, and that line may hold a password.
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise ConfigurationError(f"{path}:1: not a configuration: it is nested too deeply") from None


def _read_text(path: str, advice: str) -> str:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"{path}: {_no_such_file(path)}; {advice}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # NUL or a lone surrogate
        raise ConfigurationError(f"{path!r}: not a file name: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        # `from None`: the repr of the decoding error is the whole file, passwords included.
        raise ConfigurationError(f"{path}:{line}: not UTF-8: {error.reason}") from None


def _no_such_file(path: str) -> str:
    try:
        return "no such file" if os.path.isabs(os.path.expanduser(path)) else f"no such file in {os.getcwd()!r}"
    except OSError:  # The working directory has been removed.
        return "no such file, nor is there a working directory"


def _syntax_error(path: str, text: str, error: yaml.YAMLError) -> ConfigurationError:
    import yaml  # noqa: PLC0415 - see the top of the module

    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, cast("int", error.position)) + 1
        return ConfigurationError(f"{path}:{line}: not valid YAML: {error.reason}")
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigurationError(f"{path}:1: not valid YAML")
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    line = marks[0].line + 1 if marks else 1
    lines = text.splitlines()
    near = [each for mark in marks for each in lines[max(0, mark.line - 1) : mark.line + 1]]
    if any(_names_secret(each) or _holds_secret(each) for each in near):
        # The problem may quote a part of the value, as with an unquoted `*` or `!` at its beginning.
        problem = "the details are withheld, for hereabouts stands a secret; perhaps it needs quotes"
    else:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in problem:
            problem += " (YAML is indented with spaces, not tabs)"
        if any(f" {MEMORY}" in each for each in near):
            problem += f' (put quotes round it: "{MEMORY}")'
    return ConfigurationError(f"{path}:{line}: not valid YAML: {problem}")


def _refuse_duplicates(path: str, root: yaml.Node) -> None:
    # Before any merge key is resolved, for that is done in place, and a key that overrides a merged one would
    # then look like a duplicate. Visits each node once, however many aliases lead to it, in the file's order.
    import yaml  # noqa: PLC0415 - see the top of the module

    seen: set[int] = set()
    todo: list[tuple[yaml.Node, tuple[str, ...]]] = [(root, ())]
    while todo:
        node, keys = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        children: list[tuple[yaml.Node, tuple[str, ...]]] = []
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in _pairs(node):
                if not isinstance(key, yaml.ScalarNode):
                    continue  # Refused by the walk.
                word = cast("str", key.value)
                below = (*keys, word)
                if (first := lines.get((key.tag, word))) is not None:
                    raise ConfigurationError(
                        f"{path}:{_line(key)}: {_dotted(below)}: duplicate key; first on line {first}"
                    )
                if key.tag != "tag:yaml.org,2002:merge":  # Several of them are fine, as in safe_load.
                    lines[key.tag, word] = _line(key)
                children.append((value, below))
        elif isinstance(node, yaml.SequenceNode):
            children.extend((each, keys) for each in cast("list[yaml.Node]", node.value))
        todo.extend(reversed(children))


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    return cast("list[tuple[yaml.Node, yaml.Node]]", node.value)


def _line(node: yaml.Node) -> int:
    return cast("int", node.start_mark.line) + 1


# --- Items: values that know where they stand ---------------------------------------------------------------


class _Item:
    """A value of the document.

    Attributes:
        source: The document, as messages name it.
        keys: The keys that lead here.
        line: The line of the last of them, counted from 1; None in a mapping.
        text: The scalar as the file has it, without quotes; None in a mapping and for whatever is no scalar.
        value: The scalar; an empty mapping or list stands for any.
    """

    __slots__ = ("keys", "line", "source", "text", "value")

    value: object

    def __init__(self, source: str, keys: tuple[str, ...], line: int | None, text: str | None, value: object) -> None:
        self.source = source
        self.keys = keys
        self.line = line
        self.text = text
        self.value = value

    def error(self, text: str, *below: str) -> ConfigurationError:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        keys = (*self.keys, *below)
        return ConfigurationError(f"{place}: {_dotted(keys)}: {text}" if keys else f"{place}: {text}")

    def shown(self) -> str:
        if any(map(_names_secret, self.keys[-1:])) or _holds_secret(self.text or self.value):
            return "something else (not shown here, for it may be a secret)"
        return _show(self.value, self.text)

    def entries(self) -> dict[str, _Item]:
        """The mapping's values by key; a section whose lines are all commented out is null, and so empty."""
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping):
            raise self.error(f"expected a mapping, got {self.shown()}")
        entries: dict[str, _Item] = {}
        for key, item in self.children():
            if not isinstance(key.value, str):
                raise key.error(f"expected keys that are strings, got {_show(key.value, key.text)}; put it in quotes")
            entries[key.value] = item
        return entries

    def fields(self, known: Collection[str]) -> dict[str, _Item]:
        """The mapping's values by key, which must be a known one."""
        entries = self.entries()
        for key, item in entries.items():
            if key not in known:
                meant = _closest(key, known)
                raise item.error(f"unknown key; {_did_you_mean(meant) or 'known: ' + ', '.join(known)}")
        return entries

    def children(self) -> Iterator[tuple[_Item, _Item]]:
        """The mapping's keys and values; of equal keys, the last counts."""
        raise NotImplementedError


class _MappingItem(_Item):
    __slots__ = ()

    def __init__(self, source: str, keys: tuple[str, ...], value: object) -> None:
        super().__init__(source, keys, None, None, value)

    def children(self) -> Iterator[tuple[_Item, _Item]]:
        for key, value in cast("Mapping[object, object]", self.value).items():
            word = key if isinstance(key, str) else ""
            yield (
                _MappingItem(self.source, self.keys, key),
                _MappingItem(self.source, (*self.keys, word), value),
            )


class _YamlItem(_Item):
    __slots__ = ("loader", "node")

    def __init__(
        self,
        source: str,
        keys: tuple[str, ...],
        loader: yaml.SafeLoader,
        node: yaml.Node,
        line: int | None = None,
    ) -> None:
        import yaml  # noqa: PLC0415 - see the top of the module

        super().__init__(source, keys, line or _line(node), None, None)
        self.loader: Any = loader  # The stubs leave it half typed, which pyright refuses.
        self.node = node
        if isinstance(node, yaml.ScalarNode):
            self.text = cast("str", node.value)
            self.value = self.construct()
        elif isinstance(node, yaml.SequenceNode):
            self.value = []
        elif node.tag == "tag:yaml.org,2002:map":
            self.value = {}
        else:
            raise self.error("expected a plain mapping, got one with a YAML tag")

    def construct(self) -> object:
        try:
            return self.loader.construct_object(self.node, deep=True)
        except Exception:  # PyYAML lets out whatever int(), date() and the like raise.
            # No cause, no tag: with a tag of its own (`!x`), the value itself is part of it.
            raise self.error("a value that YAML cannot read as what it claims to be; put it in quotes") from None

    def children(self) -> Iterator[tuple[_Item, _Item]]:
        import yaml  # noqa: PLC0415 - see the top of the module

        node = cast("yaml.MappingNode", self.node)
        try:
            # Resolves merge keys, in place; the second time there are none.
            self.loader.flatten_mapping(node)
        except yaml.constructor.ConstructorError as error:
            line = self.line if error.problem_mark is None else error.problem_mark.line + 1
            raise ConfigurationError(f"{self.source}:{line}: {_dotted((*self.keys, '<<'))}: {error.problem}") from None
        for key, value in _pairs(node):
            item = _YamlItem(self.source, self.keys, self.loader, key)
            word = item.value if isinstance(item.value, str) else ""
            yield item, _YamlItem(self.source, (*self.keys, word), self.loader, value, item.line)


# --- Rules: a value's way from the document to the settings -------------------------------------------------


class _Unfit(Exception):
    """Raised by rules; says what they expected, and perhaps what was meant."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.hint = hint


_Rule: TypeAlias = Callable[[_Item], object]


def _boolean(item: _Item) -> bool:
    if not isinstance(item.value, bool):
        raise _Unfit("true or false")
    return item.value


def _whole(low: int, high: int) -> _Rule:
    def rule(item: _Item) -> int:
        # A boolean is an int to Python, but not to whoever wrote `true`.
        if isinstance(item.value, bool) or not isinstance(item.value, int) or not low <= item.value <= high:
            raise _Unfit(f"a whole number from {low} to {high}")
        return item.value

    return rule


def _duration(unit: str, *, optional: bool = False) -> _Rule:
    def rule(item: _Item) -> float | None:
        if item.value is None and optional:
            return None
        if isinstance(item.value, (int, float)) and not isinstance(item.value, bool):
            try:
                number = float(item.value)
            except OverflowError:
                number = -1.0
            if 0 <= number < float("inf"):  # Not true of NaN either.
                return number
        raise _Unfit(f"a number of {unit}, 0 or more{', or null' if optional else ''}")

    return rule


def _choice(*choices: str, numbered: bool = False) -> _Rule:
    """A word, case-insensitive; `numbered`: its number counts as well."""
    words = {choice.lower(): choice for choice in choices}

    def rule(item: _Item) -> str:
        word = item.value
        if isinstance(word, bool):
            # YAML 1.1 takes a bare OFF for false, and whoever gives a mapping may have got it from YAML.
            word = item.text or ("" if word else "OFF")
        elif numbered and isinstance(word, int) and 0 <= word < len(choices):
            return choices[word]
        if not isinstance(word, str):
            raise _Unfit(f"one of {', '.join(choices)}")
        if word.lower() not in words:
            raise _Unfit(f"one of {', '.join(choices)}", _did_you_mean(_closest(word, choices)))
        return words[word.lower()]

    return rule


def _path_text(item: _Item, expected: str) -> str:
    value = item.value
    path = os.fspath(value) if _is_path(value) else value
    if not isinstance(path, str) or not path.strip():
        raise _Unfit(expected)
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # A lone surrogate.
        raise _Unfit(f"{expected} that the file system can name") from None
    if b"\0" in encoded:
        raise _Unfit(f"{expected} without NUL characters")
    return path if path == MEMORY else os.path.expanduser(path)


def _path(item: _Item) -> str:
    return _path_text(item, f"a path or {MEMORY!r}")


def _init_sql(item: _Item) -> str | None:
    if item.value is None:
        return None
    if item.value == "":
        return ""
    expected = "the path of an SQL file, '' for none, or null for the packaged one"
    path = _path_text(item, expected)
    if not os.path.isfile(path):
        raise _Unfit(expected, "it is a directory" if os.path.isdir(path) else _no_such_file(path))
    return path


def _migrations(item: _Item) -> str | None:
    if item.value is None:
        return None
    expected = "the path of a folder of SQL files, or null for none"
    path = _path_text(item, expected)
    if not os.path.isdir(path):
        raise _Unfit(expected, "it is a file" if os.path.exists(path) else _no_such_file(path))
    return path


def _monitor(item: _Item) -> str | None:
    if item.value is None:
        return None
    expected = "the path of a folder for Unix sockets, or null"
    path = _path_text(item, expected)
    if path == MEMORY:
        raise _Unfit(expected)
    import socket  # noqa: PLC0415 - few need it

    if not hasattr(socket, "AF_UNIX"):
        raise _Unfit("null, for this system's Python has no Unix sockets")
    if os.path.exists(path) and not os.path.isdir(path):
        raise _Unfit(expected, "it is a file")
    try:
        length = len(os.fsencode(os.path.abspath(path)))
    except OSError:  # The working directory has been removed.
        length = len(os.fsencode(path))
    if length > MONITOR_PATH_LIMIT:
        raise _Unfit(
            f"{expected}; a path of at most {MONITOR_PATH_LIMIT} bytes, for a socket's path must be short",
            f"in full it has {length}",
        )
    return path


def _text(item: _Item) -> str | None:
    if item.value is None:
        return None
    if not isinstance(item.value, str) or not item.value.strip() or "\0" in item.value:
        raise _Unfit("text, or null")
    return item.value


def _ports(item: _Item) -> str | None:
    value = item.value
    if value is None:
        return None
    ports = value.split(",") if isinstance(value, str) else [str(value)]
    for port in ports:
        if isinstance(value, bool) or not port.strip().isdecimal() or not 0 < int(port) < 65536:
            raise _Unfit("a port from 1 to 65535, or several, separated by commas")
    return ",".join(port.strip() for port in ports)


def _file(item: _Item) -> str | None:
    return None if item.value is None else _path_text(item, "a file's path, or null")


# --- The schema ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Section:
    """An engine's part of the document.

    Attributes:
        engine: The engine's package below `database`.
        build: Makes one database's settings of name, values and logging.
        rules: One for each key but `logging` and `databases`, which all engines have.
        own: Keys of which each database must give one, for they are not inherited.
        identity: What no two databases may have in common, if there is such a thing; it is shown in messages.
        private: Keys that are not inherited either, but may be left out.
        kept: Keys of `own` that are inherited nevertheless, where a database gives the other one.
    """

    engine: str
    build: Callable[..., Settings]
    rules: Mapping[str, _Rule]
    own: tuple[str, ...]
    identity: Callable[[Any], str | None]
    private: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def _file_identity(settings: SqliteSettings) -> str | None:
    if settings.path == MEMORY:
        return None
    try:
        return os.path.normcase(os.path.realpath(settings.path))
    except OSError:  # The working directory has been removed; opening the database will say so.
        return os.path.normcase(os.path.normpath(settings.path))


_LOGGING_RULES: Mapping[str, _Rule] = {
    "console": _boolean,
    "level": _choice("CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET"),
    "parameters": _choice("redacted", "shown"),
    "slow_ms": _duration("milliseconds", optional=True),
    "long_read_s": _duration("seconds", optional=True),
    "slow_transaction_ms": _duration("milliseconds", optional=True),
}

_SECTIONS: dict[str, _Section] = {
    "sqlite": _Section(
        engine="sqlite3",
        build=SqliteSettings,
        rules={
            "path": _path,
            "pool_size": _whole(1, 1000),
            "pool_timeout": _duration("seconds"),
            "busy_timeout": _whole(0, 2**31 - 1),
            "journal_mode": _choice("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"),
            "synchronous": _choice("OFF", "NORMAL", "FULL", "EXTRA", numbered=True),
            "cache_size": _whole(-(2**31) + 1, 2**31 - 1),  # SQLite takes what does not fit 32 bits for 0.
            "foreign_keys": _boolean,
            "init_sql": _init_sql,
            "migrations": _migrations,
            "auto_migrate": _boolean,
            "monitor": _monitor,
        },
        own=("path",),
        identity=_file_identity,
        private=("migrations",),
    ),
    "postgresql": _Section(
        engine="postgresql",
        build=PostgresqlSettings,
        rules={
            "conninfo": _text,
            "host": _text,
            "port": _ports,
            "dbname": _text,
            "user": _text,
            "password_env": _text,
            "password_file": _file,
            "sslmode": _choice("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
            "sslrootcert": _file,
            "sslcert": _file,
            "sslkey": _file,
            "target_session_attrs": _choice("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
            "application_name": _text,
            "options": _text,
            "connect_timeout": _whole(1, 3600),
            "reconnect_timeout": _duration("seconds"),
            "pool_size": _whole(1, 1000),
            "pool_timeout": _duration("seconds"),
            "lock_timeout": _whole(0, 2**31 - 1),
            "statement_timeout": _whole(0, 2**31 - 1),
            "isolation": _choice("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"),
            "prepare_threshold": _whole(0, 1_000_000),
            "statement_rollback": _boolean,
            "lastrowid": _boolean,
            "replicas": _text,
            "init_sql": _init_sql,
        },
        own=("conninfo", "dbname"),
        identity=lambda settings: None,  # two names for one database do no harm: nobody keeps a lock on it
        kept=("conninfo",),
    ),
}


# --- The walk -----------------------------------------------------------------------------------------------


def _read_document(root: _Item) -> Configuration:
    fields = root.fields(["database"])
    if "database" not in fields:
        raise root.error("missing; all settings stand below it", "database")
    sections = fields["database"].fields(_SECTIONS)
    if not sections:
        raise fields["database"].error(f"empty; expected one of {', '.join(_SECTIONS)}")
    engines: dict[str, Mapping[str, Settings]] = {
        _SECTIONS[key].engine: MappingProxyType(_read_section(_SECTIONS[key], item)) for key, item in sections.items()
    }
    return Configuration(MappingProxyType(engines), root.source)


def _read_section(section: _Section, item: _Item) -> dict[str, Settings]:
    fields = item.fields([*section.rules, "logging", "databases"])
    values, logging = _read_values(section, fields)
    others = fields["databases"].entries() if "databases" in fields else {}
    databases: dict[str, Settings] = {}
    places: dict[str, str] = {}  # identity -> the database that has it

    def add(name: str, item: _Item, own: Mapping[str, _Item], values: dict[str, Any], logging: dict[str, Any]) -> None:
        settings = section.build(name=name, **values, logging=LoggingSettings(**logging))
        databases[name] = settings
        identity = section.identity(settings)
        if identity is not None and (other := places.setdefault(identity, name)) != name:
            key = next(each for each in section.own if each in own)
            raise own[key].error(f"{name!r} and {other!r} are the same database, {identity!r}")

    if any(key in fields for key in section.own):
        add(_DEFAULT, item, fields, values, logging)
    elif not others:
        raise item.error("missing; without it, there must be `databases`", section.own[0])
    private = (*section.own, *section.private)
    inherited = {key: value for key, value in values.items() if key not in private or key in section.kept}
    for name, other in others.items():
        if name == _DEFAULT:
            raise other.error(f"the database {_DEFAULT!r} is configured by the keys of {_dotted(item.keys)} itself")
        if not name.strip() or not name.isprintable():
            raise other.error("expected a name of printable characters")
        own = other.fields([*section.rules, "logging"])
        if not any(key in own for key in section.own):
            raise other.error("missing; it is what `databases` do not inherit", section.own[0])
        own_values, own_logging = _read_values(section, own)
        add(name, other, own, inherited | own_values, logging | own_logging)
    return databases


def _read_values(section: _Section, fields: Mapping[str, _Item]) -> tuple[dict[str, Any], dict[str, Any]]:
    values = {key: _apply(section.rules[key], item) for key, item in fields.items() if key in section.rules}
    logging = fields["logging"].fields(_LOGGING_RULES) if "logging" in fields else {}
    return values, {key: _apply(_LOGGING_RULES[key], item) for key, item in logging.items()}


def _apply(rule: _Rule, item: _Item) -> object:
    try:
        return rule(item)
    except _Unfit as unfit:
        hint = unfit.hint and f"; {unfit.hint}"
        raise item.error(f"expected {unfit.expected}, got {item.shown()}{hint}") from None


# --- Words for messages -------------------------------------------------------------------------------------


def _show(value: object, text: str | None = None) -> str:
    """A value for a message; `text` is how the file has it. Never calls a stranger's `repr()`."""
    kind = type(value).__name__
    if value is None:
        return "None" if text is None else "null"
    if isinstance(value, str):
        return f"{str.__repr__(value if len(value) <= 80 else value[:80] + '…')} ({kind})"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits ({kind})"
    if text is not None:
        return f"{text if len(text) <= 80 else text[:80] + '…'} ({kind})"
    if isinstance(value, (bool, int, float)):
        return f"{value!r} ({kind})"
    return f"a value of type {kind}"


def _dotted(keys: tuple[str, ...]) -> str:
    plain = str.maketrans("-<", "__")
    return ".".join(key if key.translate(plain).isidentifier() else repr(key) for key in keys)


def _did_you_mean(word: str | None) -> str:
    return f"did you mean {word!r}?" if word else ""


def _is_path(value: object) -> TypeGuard[os.PathLike[Any]]:
    return isinstance(value, os.PathLike)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)


def _closest(word: str, known: Collection[str]) -> str | None:
    import difflib  # noqa: PLC0415 - only needed when something is wrong

    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word[:80].lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def _names_secret(key: str) -> bool:
    words = ("passw", "passphrase", "pwd", "secret", "token", "credential", "conninfo")
    return any(word in key.lower() for word in words)


def _holds_secret(value: object) -> bool:
    """Whether a value that stands where it should not looks like a connection string."""
    return isinstance(value, str) and (("://" in value and "@" in value) or "password=" in value.lower())
