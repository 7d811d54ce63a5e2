"""Settings: what is accepted and what it becomes; and what is refused, with file, line, key and advice."""

import errno
import gc
import logging
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from database import settings
from database.errors import ConfigurationError
from database.settings import Configuration, LoggingSettings, document, reading
from database.settings.reading import section
from database.settings.rules import LOGGING_RULES, Section, Unfit
from database.sqlite3.settings import SqliteSettings

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Each test starts in an empty working directory with nothing configured, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_CONFIG", raising=False)
    settings.reset()
    yield
    settings.reset()


def write(text, path="db.yaml"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if text.startswith("\n "):  # A block as it stands in the tests, below its quotes.
        text = textwrap.dedent(text[1:])
    Path(path).write_text(text, encoding="utf-8")
    return path


def load(source):
    """Configures a mapping, or a file with this text, and returns what came of it."""
    settings.configure(write(source) if isinstance(source, str) else source)
    return settings.current()


def sqlite(**keys):
    """A mapping with one SQLite section, which has a path unless it is given."""
    return {"database": {"sqlite": {"path": "x.db", **keys}}}


def default(source):
    return load(source).engines["sqlite3"]["default"]


def refused(source):
    """The message of the error that the source raises."""
    with pytest.raises(ConfigurationError) as caught:
        load(source)
    return str(caught.value)


# --- What is accepted ---------------------------------------------------------------------------------------


def test_the_shipped_file_is_the_defaults():
    """config/database.yaml names every key, with the value that it has anyway."""
    text = (REPOSITORY / "config/database.yaml").read_text(encoding="utf-8")
    assert default(text) == SqliteSettings(name="default", path="./data/jobu.db")
    written = yaml.safe_load(text)["database"]["sqlite"]
    assert {*written} == {f.name for f in fields(SqliteSettings)} - {"name", "max_open"} | {"databases"}
    assert {*written["logging"]} == {f.name for f in fields(LoggingSettings)}


def test_the_example_in_the_shipped_file_works():
    """The commented-out database of config/database.yaml is right as it stands."""
    lines = (REPOSITORY / "config/database.yaml").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip() == "databases:") + 1
    end = lines.index("", start)
    text = "\n".join(lines[:start] + [line.replace("# ", "", 1) for line in lines[start:end]])
    assert load(text).find("audit")[1].synchronous == "FULL"


def test_the_postgresql_section_in_the_shipped_file_works():
    """So is the commented-out section of the other engine: every key is known, and what it shows are the defaults."""
    lines = (REPOSITORY / "config/database.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("  # postgresql:")
    configuration = load("\n".join(["database:", *[line.replace("# ", "", 1) for line in lines[start:]]]))
    engine, default = configuration.find("default")
    audit = configuration.find("audit")[1]
    assert engine == "postgresql"
    assert (audit.dbname, audit.host) == ("audit", default.host)
    known = settings.PostgresqlSettings(name="")
    for key in ("pool_size", "pool_timeout", "connect_timeout", "reconnect_timeout", "lock_timeout", "isolation"):
        assert getattr(default, key) == getattr(known, key)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{host: a}", "postgresql.conninfo: missing"),
        ("{dbname: a, password: hunter2}", "unknown key; did you mean"),
        ("{dbname: a, port: hunter2}", "a port from 1 to 65535"),
        ("{dbname: a, isolation: serialisable}", "did you mean 'SERIALIZABLE'"),
        ("{dbname: a, conninfo: [hunter2]}", "text, or null"),
        ("{dbname: a, sslmode: full}", "one of disable, allow"),
    ],
)
def test_a_wrong_postgresql_section(section: str, message: str):
    """What is wrong in the section is named with file, line and key; what may be a secret is not."""
    with pytest.raises(ConfigurationError) as caught:
        load(f"database:\n  postgresql: {section}")
    assert message in str(caught.value)
    assert ":2: database.postgresql" in str(caught.value)
    if "port" not in section:
        assert "hunter2" not in str(caught.value)


def test_conninfo_is_not_in_the_repr_and_may_be_inherited():
    """A connection string may hold a password: it is in no repr. A database that names only `dbname` shares the rest."""
    configuration = load(
        "database:\n  postgresql: {conninfo: 'host=a password=hunter2', replicas: 'host=b password=hunter2',"
        " databases: {audit: {dbname: audit}}}"
    )
    assert "hunter2" not in repr(configuration)
    assert configuration.find("audit")[1].conninfo == "host=a password=hunter2"


def test_the_contracts_example():
    """The example of the contract means what its comments say, in the file and as a mapping alike."""
    text = """
        database:
          sqlite:
            path: "./data/jobu.db"
            pool_size: 5
            pool_timeout: 30
            busy_timeout: 5000
            journal_mode: "WAL"
            synchronous: "NORMAL"
            cache_size: -2000
            foreign_keys: true
            init_sql: null
            logging: {console: false, level: INFO, parameters: redacted, slow_ms: 200}
            databases:
              audit: {path: "./data/audit.db", synchronous: FULL}
        """
    from_file = load(text)
    assert from_file.engines == {
        "sqlite3": {
            "default": SqliteSettings("default", "./data/jobu.db"),
            "audit": SqliteSettings("audit", "./data/audit.db", synchronous="FULL"),
        }
    }
    assert load(yaml.safe_load(text)).engines == from_file.engines


def test_a_path_is_enough():
    """All but the path has a default."""
    assert default({"database": {"sqlite": {"path": "x.db"}}}) == SqliteSettings("default", "x.db")


def test_rules_and_dataclasses_agree():
    """Each key has a rule and each rule a field, for both the section and its logging."""
    known = section("sqlite")
    assert {*known.rules} == {f.name for f in fields(SqliteSettings)} - {"name", "logging"}
    assert {*LOGGING_RULES} == {f.name for f in fields(LoggingSettings)}


def test_settings_are_frozen():
    """Nobody can change settings that others read, nor the mappings that hold them."""
    configuration = load(sqlite())
    with pytest.raises(FrozenInstanceError):
        default(sqlite()).path = "y.db"
    with pytest.raises(FrozenInstanceError):
        configuration.source = "y"
    with pytest.raises(TypeError):
        configuration.engines["sqlite3"]["new"] = None
    with pytest.raises(TypeError):
        configuration.engines["new"] = {}


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("path", '":memory:"', ":memory:"),
        ("path", "a b?#%ü.db", "a b?#%ü.db"),
        ("pool_size", "1", 1),
        ("pool_size", "1000", 1000),
        ("pool_timeout", "0", 0.0),
        ("pool_timeout", "2.5", 2.5),
        ("busy_timeout", "0", 0),
        ("busy_timeout", "2147483647", 2147483647),
        ("cache_size", "-64_000", -64000),
        ("foreign_keys", "no", False),
        ("journal_mode", "OFF", "OFF"),
        ("journal_mode", "Off", "OFF"),
        ("journal_mode", '"off"', "OFF"),
        ("journal_mode", "truncate", "TRUNCATE"),
        ("synchronous", "OFF", "OFF"),
        ("synchronous", "off", "OFF"),
        ("synchronous", "Extra", "EXTRA"),
        ("synchronous", "0", "OFF"),
        ("synchronous", "3", "EXTRA"),
        ("init_sql", '""', ""),
        ("init_sql", "~", None),
        ("init_sql", "", None),
    ],
)
def test_values(key, written, value):
    """A value within its bounds is taken, words in any case, and a bare OFF is the word and not a boolean."""
    path = "" if key == "path" else "path: x.db"
    got = getattr(default(f"database:\n sqlite:\n  {path}\n  {key}: {written}\n"), key)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("console", "yes", True),
        ("level", "debug", "DEBUG"),
        ("level", "Warn", "WARN"),
        ("parameters", "SHOWN", "shown"),
        ("slow_ms", "0", 0.0),
        ("slow_ms", "null", None),
        ("slow_ms", "0.5", 0.5),
        ("long_read_s", "0.5", 0.5),
        ("long_read_s", "null", None),
        ("slow_transaction_ms", "null", None),
        ("slow_transaction_ms", "2500", 2500.0),
    ],
)
def test_logging_values(key, written, value):
    """The same goes for the values below `logging`."""
    got = getattr(default(f"database: {{sqlite: {{path: x, logging: {{{key}: {written}}}}}}}").logging, key)
    assert (got, type(got)) == (value, type(value))


def test_levels_are_those_of_logging():
    """Each level that the standard library names is taken, and each one taken is known to it."""
    for level in logging.getLevelNamesMapping().keys() & {
        "CRITICAL",
        "ERROR",
        "WARNING",
        "INFO",
        "DEBUG",
        "NOTSET",
    }:
        assert default(sqlite(logging={"level": level})).logging.level == level
    for level in ("WARN", "FATAL"):
        assert logging.getLevelNamesMapping()[default(sqlite(logging={"level": level})).logging.level]


def test_false_in_a_mapping_is_off():
    """A mapping that somebody else loaded from YAML has False where OFF was written."""
    assert default(sqlite(synchronous=False)).synchronous == "OFF"
    assert default(sqlite(journal_mode=False)).journal_mode == "OFF"


def test_the_home_directory(monkeypatch):
    """`~` is expanded, in the path of a database, of its SQL file and of the configuration."""
    home = Path("home").absolute()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    write("select 1;", home / "init.sql")
    write("database: {sqlite: {path: ~/x.db, init_sql: ~/init.sql}}", home / "db.yaml")
    settings.configure("~/db.yaml")
    got = settings.current().find("default")[1]
    assert (Path(got.path), Path(got.init_sql)) == (home / "x.db", home / "init.sql")


def test_path_objects():
    """Paths may be path objects, in a mapping and for the file itself."""
    write("select 1;", "init.sql")
    got = default(sqlite(path=Path("x.db"), init_sql=Path("init.sql")))
    assert (got.path, got.init_sql) == ("x.db", "init.sql")
    settings.configure(Path(write("database: {sqlite: {path: y.db}}")))
    assert settings.current().find("default")[1].path == "y.db"


def test_relative_paths_stay_relative():
    """A relative path is resolved when the database is opened, not when the file is read."""
    assert default(sqlite(path="./a/../x.db")).path == "./a/../x.db"


def test_a_mapping_is_copied():
    """What happens to the mapping after `configure()` changes nothing."""
    mapping = sqlite()
    settings.configure(mapping)
    mapping["database"]["sqlite"]["path"] = "y.db"
    assert settings.current().find("default")[1].path == "x.db"


def test_byte_order_mark_and_line_ends():
    """A file as an editor on Windows leaves it is read like any other, with the right lines."""
    Path("db.yaml").write_bytes(b"\xef\xbb\xbfdatabase:\r\n  sqlite:\r\n    path: x.db\r\n")
    settings.configure("db.yaml")
    Path("db.yaml").write_bytes(b"\xef\xbb\xbfdatabase:\r\n  sqlite:\r\n    paht: x.db\r\n")
    with pytest.raises(ConfigurationError, match=r"^db.yaml:3: "):
        settings.configure("db.yaml")


# --- Inheritance --------------------------------------------------------------------------------------------


def test_databases_inherit_key_by_key():
    """A database below `databases` has all that stands above but the path; `logging` is merged."""
    write("select 1;", "init.sql")
    configuration = load(
        """
        database:
          sqlite:
            path: main.db
            pool_size: 7
            synchronous: OFF
            init_sql: init.sql
            logging: {level: debug, slow_ms: 10}
            databases:
              plain: {path: plain.db}
              own:
                path: own.db
                pool_size: 2
                init_sql: null
                logging: {slow_ms: null, console: true}
        """
    )
    common = {"synchronous": "OFF"}
    assert configuration.engines["sqlite3"] == {
        "default": SqliteSettings(
            "default",
            "main.db",
            7,
            init_sql="init.sql",
            logging=LoggingSettings(False, "DEBUG", slow_ms=10),
            **common,
        ),
        "plain": SqliteSettings(
            "plain",
            "plain.db",
            7,
            init_sql="init.sql",
            logging=LoggingSettings(False, "DEBUG", slow_ms=10),
            **common,
        ),
        "own": SqliteSettings(
            "own", "own.db", 2, init_sql=None, logging=LoggingSettings(True, "DEBUG", slow_ms=None), **common
        ),
    }


def test_migrations_are_not_inherited():
    """Each database has a schema of its own, so a folder of migrations is for the database that names it."""
    os.mkdir("sql")
    configuration = load(
        "database: {sqlite: {path: x, migrations: sql, auto_migrate: true, monitor: /run, databases: {a: {path: y}}}}"
    )
    common = {"auto_migrate": True, "monitor": "/run"}
    assert configuration.engines["sqlite3"] == {
        "default": SqliteSettings("default", "x", migrations="sql", **common),
        "a": SqliteSettings("a", "y", **common),
    }


def test_no_default_database():
    """Without a path of its own the section only gives defaults to its databases."""
    configuration = load({"database": {"sqlite": {"pool_size": 2, "databases": {"audit": {"path": "a.db"}}}}})
    assert configuration.engines == {"sqlite3": {"audit": SqliteSettings("audit", "a.db", 2)}}
    with pytest.raises(ConfigurationError) as caught:
        configuration.find("default")
    assert str(caught.value) == (
        "configure(mapping): no database is named 'default'; "
        "it takes a path directly below the engine's section (known: 'audit')"
    )


def test_sections_that_are_commented_out():
    """A section with nothing but comments in it is as good as none."""
    assert default("database:\n sqlite:\n  path: x.db\n  logging:\n  databases:\n") == SqliteSettings("default", "x.db")


def test_several_memories():
    """Each `:memory:` is a database of its own."""
    databases = load(sqlite(path=":memory:", databases={"a": {"path": ":memory:"}})).engines["sqlite3"]
    assert {name: each.path for name, each in databases.items()} == {"default": ":memory:", "a": ":memory:"}


def test_anchors_and_merge_keys():
    """Anchors, aliases and `<<` work as everywhere in YAML, and an overridden key is no duplicate."""
    text = """
        database:
          sqlite:
            path: main.db
            logging: &logging {level: DEBUG, slow_ms: 1}
            databases:
              a: &a
                <<: &fast {synchronous: OFF, pool_size: &two 2}
                path: a.db
                pool_size: 3
              b:
                <<: [*a, *fast]
                path: b.db
                logging: {<<: *logging, slow_ms: 5}
                busy_timeout: *two
        """
    databases = load(text).engines["sqlite3"]
    logged = LoggingSettings(level="DEBUG", slow_ms=1)
    assert databases["a"] == SqliteSettings("a", "a.db", 3, synchronous="OFF", logging=logged)
    assert databases["b"] == SqliteSettings(
        "b", "b.db", 3, busy_timeout=2, synchronous="OFF", logging=LoggingSettings(level="DEBUG", slow_ms=5)
    )
    plain = yaml.safe_load(Path("db.yaml").read_text())
    assert load(plain).engines["sqlite3"] == databases


# --- What is refused: one line of the file, one message -----------------------------------------------------

RANGE = "expected a whole number from 1 to 1000"
MODES = "expected one of DELETE, TRUNCATE, PERSIST, MEMORY, WAL, OFF"
LEVELS = "expected one of CRITICAL, FATAL, ERROR, WARNING, WARN, INFO, DEBUG, NOTSET"
KEYS = (
    "unknown key; known: path, pool_size, pool_timeout, busy_timeout, journal_mode, synchronous, cache_size, "
    "foreign_keys, pragmas, extensions, attach, on_connect, module, key_env, key_file, wal_limit, wal_autocheckpoint, "
    "inline_reads, init_sql, migrations, auto_migrate, monitor, max_open, logging"
)
SYNCHRONOUS = "expected one of OFF, NORMAL, FULL, EXTRA"
SQL_FOLDER = "expected the path of a folder of SQL files, or null for none"
SOCKETS = "expected the path of a folder for Unix sockets, or null"
SQL_FILE = "expected the path of an SQL file, '' for none, or null for the packaged one"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pool_sise: 5", "pool_sise: unknown key; did you mean 'pool_size'?"),
        ("Pool-Size: 5", "Pool-Size: unknown key; did you mean 'pool_size'?"),
        ("PATH: y.db", "PATH: unknown key; did you mean 'path'?"),
        (
            "zzz: 5",
            f"zzz: {KEYS}, databases",
        ),
        (
            "'a b.c': 5",
            f"'a b.c': {KEYS}, databases",
        ),
        ("pool_size: five", f"pool_size: {RANGE}, got 'five' (str)"),
        ("pool_size: '5'", f"pool_size: {RANGE}, got '5' (str)"),
        ("pool_size: true", f"pool_size: {RANGE}, got true (bool)"),
        ("pool_size: 5.0", f"pool_size: {RANGE}, got 5.0 (float)"),
        ("pool_size: 0", f"pool_size: {RANGE}, got 0 (int)"),
        ("pool_size: 1001", f"pool_size: {RANGE}, got 1001 (int)"),
        ("pool_size:", f"pool_size: {RANGE}, got null"),
        ("pool_size: [5]", f"pool_size: {RANGE}, got a list"),
        ("pool_size: {a: 5}", f"pool_size: {RANGE}, got a mapping"),
        ("pool_size: 2024-01-01", f"pool_size: {RANGE}, got 2024-01-01 (date)"),
        (f"pool_size: {10**30}", f"pool_size: {RANGE}, got a number of 100 bits (int)"),
        ("pool_timeout: -1", "pool_timeout: expected a number of seconds, 0 or more, got -1 (int)"),
        ("pool_timeout: .inf", "pool_timeout: expected a number of seconds, 0 or more, got .inf (float)"),
        ("pool_timeout: .nan", "pool_timeout: expected a number of seconds, 0 or more, got .nan (float)"),
        ("pool_timeout: on", "pool_timeout: expected a number of seconds, 0 or more, got on (bool)"),
        ("pool_timeout: 1e3", "pool_timeout: expected a number of seconds, 0 or more, got '1e3' (str)"),
        ("pool_timeout: null", "pool_timeout: expected a number of seconds, 0 or more, got null"),
        ("busy_timeout: -1", "busy_timeout: expected a whole number from 0 to 2147483647, got -1 (int)"),
        (
            "busy_timeout: 2147483648",
            "busy_timeout: expected a whole number from 0 to 2147483647, got 2147483648 (int)",
        ),
        ("busy_timeout: 1.5", "busy_timeout: expected a whole number from 0 to 2147483647, got 1.5 (float)"),
        (
            "cache_size: 2147483648",
            "cache_size: expected a whole number from -2147483647 to 2147483647, got 2147483648 (int)",
        ),
        ("journal_mode: WALL", f"journal_mode: {MODES}, got 'WALL' (str); did you mean 'WAL'?"),
        ("journal_mode: on", f"journal_mode: {MODES}, got on (bool)"),
        ("journal_mode: false", f"journal_mode: {MODES}, got false (bool)"),
        ("journal_mode: 1", f"journal_mode: {MODES}, got 1 (int)"),
        ("synchronous: null", f"synchronous: {SYNCHRONOUS}, got null"),
        ("synchronous: 4", f"synchronous: {SYNCHRONOUS}, got 4 (int)"),
        ("synchronous: no", f"synchronous: {SYNCHRONOUS}, got no (bool)"),
        ("foreign_keys: 1", "foreign_keys: expected true or false, got 1 (int)"),
        ("foreign_keys: 'true'", "foreign_keys: expected true or false, got 'true' (str)"),
        ("init_sql: 5", f"init_sql: {SQL_FILE}, got 5 (int)"),
        ("init_sql: no", f"init_sql: {SQL_FILE}, got no (bool)"),
        ("init_sql: .", f"init_sql: {SQL_FILE}, got '.' (str); it is a directory"),
        ('init_sql: "a\\0b"', f"init_sql: {SQL_FILE} without NUL characters, got 'a\\x00b' (str)"),
        ("init_sql: /no/such", f"init_sql: {SQL_FILE}, got '/no/such' (str); no such file"),
        ("migrations: 5", f"migrations: {SQL_FOLDER}, got 5 (int)"),
        ("migrations: db.yaml", f"migrations: {SQL_FOLDER}, got 'db.yaml' (str); it is a file"),
        ("migrations: /no/such", f"migrations: {SQL_FOLDER}, got '/no/such' (str); no such file"),
        ("auto_migrate: always", "auto_migrate: expected true or false, got 'always' (str)"),
        ("monitor: 5", f"monitor: {SOCKETS}, got 5 (int)"),
        ("monitor: db.yaml", f"monitor: {SOCKETS}, got 'db.yaml' (str); it is a file"),
        (
            f"monitor: /{'x' * 70}",
            f"monitor: {SOCKETS}; a path of at most 70 bytes, because a socket's path must be short,"
            f" got '/{'x' * 70}' (str); in full it has 71",
        ),
        ("logging: 5", "logging: expected a mapping, got 5 (int)"),
        ("logging: {slow: 5}", "logging.slow: unknown key; did you mean 'slow_ms'?"),
        (
            "logging: {databases: 5}",
            "logging.databases: unknown key; known: console, level, parameters, slow_ms, long_read_s, slow_transaction_ms",
        ),
        ("logging: {console: 1}", "logging.console: expected true or false, got 1 (int)"),
        (
            "logging: {level: TRACE}",
            f"logging.level: {LEVELS}, got 'TRACE' (str)",
        ),
        (
            "logging: {level: 10}",
            f"logging.level: {LEVELS}, got 10 (int)",
        ),
        (
            "logging: {parameters: redact}",
            "logging.parameters: expected one of redacted, shown, got 'redact' (str); did you mean 'redacted'?",
        ),
        (
            "logging: {parameters: off}",
            "logging.parameters: expected one of redacted, shown, got off (bool)",
        ),
        (
            "logging: {long_read_s: true}",
            "logging.long_read_s: expected a number of seconds, 0 or more, or null, got true (bool)",
        ),
        (
            "logging: {slow_ms: -1}",
            "logging.slow_ms: expected a number of milliseconds, 0 or more, or null, got -1 (int)",
        ),
        ("databases: [a]", "databases: expected a mapping, got a list"),
        ("databases: {a: y.db}", "databases.a: expected a mapping, got 'y.db' (str)"),
        ("databases: {a: }", "databases.a.path: missing; it is what `databases` do not inherit"),
        (
            "databases: {a: {pool_size: 1}}",
            "databases.a.path: missing; it is what `databases` do not inherit",
        ),
        ("databases: {a: {paht: y}}", "databases.a.paht: unknown key; did you mean 'path'?"),
        (
            "databases: {a: {path: y, databases: {}}}",
            f"databases.a.databases: {KEYS}",
        ),
        (
            "databases: {a: {path: y, logging: {level: 1}}}",
            f"databases.a.logging.level: {LEVELS}, got 1 (int)",
        ),
        (
            "databases: {default: {path: y}}",
            "databases.default: the database 'default' is configured by the keys of database.sqlite itself",
        ),
        ("databases: {'': {path: y}}", "databases.'': expected a name of printable characters"),
        ('databases: {"a\\tb": {path: y}}', "databases.'a\\tb': expected a name of printable characters"),
        (
            "databases: {2024: {path: y}}",
            "databases: expected keys that are strings, got 2024 (int); put it in quotes",
        ),
        (
            "databases: {on: {path: y}}",
            "databases: expected keys that are strings, got on (bool); put it in quotes",
        ),
        (
            "databases: {[a]: {path: y}}",
            "databases: expected keys that are strings, got a list; put it in quotes",
        ),
        (
            "pool_size: !!int five",
            "pool_size: a value that YAML cannot read as what it claims to be; put it in quotes",
        ),
        (
            "pool_size: 2024-13-01",
            "pool_size: a value that YAML cannot read as what it claims to be; put it in quotes",
        ),
        (
            "pool_size: !!python/name:os.system x",
            "pool_size: a value that YAML cannot read as what it claims to be; put it in quotes",
        ),
        (
            "logging: !!map x",
            "logging: a value that YAML cannot read as what it claims to be; put it in quotes",
        ),
        ("logging: !!set {level}", "logging: expected a plain mapping, got one with a YAML tag"),
        (
            "logging: !!python/object/apply:os.system {a: b}",
            "logging: expected a plain mapping, got one with a YAML tag",
        ),
        (
            "logging: {<<: 5}",
            "logging.<<: expected a mapping or list of mappings for merging, but found scalar",
        ),
        ("logging: {level: INFO, level: DEBUG}", "logging.level: duplicate key; first on line 6"),
        ("path: y.db", "path: duplicate key; first on line 4"),
        ("'path': y.db", "path: duplicate key; first on line 4"),
    ],
)
def test_a_wrong_line(line, message):
    """Whatever is wrong with a line: the message has file, line, full key and what would be right."""
    text = f"# comment\ndatabase:\n  sqlite:\n    path: x.db\n    # comment\n    {line}\n"
    assert refused(text) == f"db.yaml:6: database.sqlite.{message}"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "expected a path or ':memory:', got null"),
        ('""', "expected a path or ':memory:', got '' (str)"),
        ("'  '", "expected a path or ':memory:', got '  ' (str)"),
        ("5", "expected a path or ':memory:', got 5 (int)"),
        ('"a\\0b"', "expected a path or ':memory:' without NUL characters, got 'a\\x00b' (str)"),
        ('"a\\ud800b"', "expected a path or ':memory:' that the file system can name, got 'a\\ud800b' (str)"),
    ],
)
def test_a_wrong_path(written, message):
    """A path is a non-empty string that the file system can take."""
    assert refused(f"database:\n sqlite:\n  path: {written}\n") == f"db.yaml:3: database.sqlite.path: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: database: missing; the file is empty"),
        ("# nothing\n", "1: database: missing; the file is empty"),
        ("---\n...\n", "2: database: missing; all settings stand below it"),
        ("{}", "1: database: missing; all settings stand below it"),
        ("\n\n- database\n", "3: expected a mapping, got a list"),
        ("database", "1: expected a mapping, got 'database' (str)"),
        ("databse:\n", "1: databse: unknown key; did you mean 'database'?"),
        ("database: {}\nother: 1\n", "2: other: unknown key; known: database"),
        ("sqlite: {path: x}", "1: sqlite: unknown key; known: database"),
        ("\ndatabase:\n", "2: database: empty; expected one of sqlite, postgresql"),
        ("database: []", "1: database: expected a mapping, got a list"),
        ("database:\n  sqlite3: {path: x}\n", "2: database.sqlite3: unknown key; did you mean 'sqlite'?"),
        ("database:\n  sqlite: x.db\n", "2: database.sqlite: expected a mapping, got 'x.db' (str)"),
        (
            "database:\n  sqlite:\n",
            "2: database.sqlite.path: missing; without it, there must be `databases`",
        ),
        (
            "database:\n  sqlite:\n    databases: {}\n",
            "2: database.sqlite.path: missing; without it, there must be `databases`",
        ),
        ("1: 2", "1: expected keys that are strings, got 1 (int); put it in quotes"),
    ],
)
def test_a_wrong_structure(text, message):
    """A file that is no configuration as a whole says so at the place where it stops being one."""
    assert refused(text) == f"db.yaml:{message}"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "database: missing; all settings stand below it"),
        ({"database": None}, "database: empty; expected one of sqlite, postgresql"),
        ({"database": []}, "database: expected a mapping, got a list"),
        ({"database": {"sqlite": ()}}, "database.sqlite: expected a mapping, got a list"),
        ({1: 2}, "expected keys that are strings, got 1 (int); put it in quotes"),
        (sqlite(pool_size="five"), f"database.sqlite.pool_size: {RANGE}, got 'five' (str)"),
        (sqlite(pool_size=True), f"database.sqlite.pool_size: {RANGE}, got True (bool)"),
        (sqlite(pool_size=None), f"database.sqlite.pool_size: {RANGE}, got None"),
        (sqlite(pool_size=object()), f"database.sqlite.pool_size: {RANGE}, got a value of type object"),
        (sqlite(pool_size=10**5000), f"database.sqlite.pool_size: {RANGE}, got a number of 16610 bits (int)"),
        (
            sqlite(pool_timeout=10**400),
            "database.sqlite.pool_timeout: expected a number of seconds, 0 or more, got a number of 1329 bits (int)",
        ),
        (
            sqlite(pool_timeout=math.inf),
            "database.sqlite.pool_timeout: expected a number of seconds, 0 or more, got inf (float)",
        ),
        (sqlite(synchronous=True), f"database.sqlite.synchronous: {SYNCHRONOUS}, got True (bool)"),
        (
            sqlite(path=b"x.db"),
            "database.sqlite.path: expected a path or ':memory:', got a value of type bytes",
        ),
        (sqlite(pool_size="x" * 1000), f"database.sqlite.pool_size: {RANGE}, got '{'x' * 80}…' (str)"),
    ],
)
def test_a_wrong_mapping(mapping, message):
    """A mapping has no lines, but the rest of the message."""
    assert refused(mapping) == f"configure(mapping): {message}"


def test_a_missing_init_sql():
    """A relative path that is not there says from where it was looked for."""
    assert refused(sqlite(init_sql="no.sql")) == (
        f"configure(mapping): database.sqlite.init_sql: {SQL_FILE}, got 'no.sql' (str); no such file in {os.getcwd()!r}"
    )


@pytest.mark.parametrize("other", ["./x.db", "sub/../x.db", "link/x.db", "{cwd}/x.db"])
def test_two_names_for_one_file(other):
    """Two databases for one file, however written, are an error that names both, on the second's line."""
    Path("sub").mkdir()
    Path("link").symlink_to(".", target_is_directory=True)
    other = other.format(cwd=os.getcwd())
    text = f"""
        database:
          sqlite:
            path: x.db
            databases:
              audit:
                pool_size: 1
                path: "{other}"
        """
    same = os.path.realpath("x.db")
    assert refused(text) == (
        f"db.yaml:7: database.sqlite.databases.audit.path: 'audit' and 'default' are the same database, {same!r}"
    )
    two = {"database": {"sqlite": {"databases": {"a": {"path": "x.db"}, "b": {"path": other}}}}}
    assert refused(two) == (
        f"configure(mapping): database.sqlite.databases.b.path: 'b' and 'a' are the same database, {same!r}"
    )


def test_the_line_of_an_alias():
    """An alias is wrong where it is used; a key that was merged, where it was written."""
    assert (
        refused(
            """
        database:
          sqlite:
            path: &name x.db
            pool_size: *name
        """
        )
        == f"db.yaml:4: database.sqlite.pool_size: {RANGE}, got 'x.db' (str)"
    )
    assert refused(
        """
        database:
          sqlite:
            path: x.db
            logging: &a
              slow_ms: 5
            databases:
              b:
                path: y.db
                <<: *a
        """
    ) == "db.yaml:5: database.sqlite.databases.b.slow_ms: unknown key; known: " + ", ".join(
        [*section("sqlite").rules, "logging"]
    )


def test_duplicates_name_both_lines():
    """A key that stands twice is an error with both lines, at any depth, also in what is merged."""
    assert (
        refused("database:\n sqlite:\n  path: x\n  logging:\n   slow_ms: 1\n   level: INFO\n   slow_ms: 2\n")
        == "db.yaml:7: database.sqlite.logging.slow_ms: duplicate key; first on line 5"
    )
    assert (
        refused("database:\n sqlite:\n  path: x\n  logging:\n   <<: {level: INFO,\n    level: INFO}\n")
        == "db.yaml:6: database.sqlite.logging.<<.level: duplicate key; first on line 5"
    )
    assert (
        refused("database:\n sqlite: {path: x}\n sqlite: {path: y}\n")
        == "db.yaml:3: database.sqlite: duplicate key; first on line 2"
    )
    assert refused("- - a: 1\n    a: 2\n") == "db.yaml:2: a: duplicate key; first on line 1"


def test_several_merge_keys():
    """Two merge keys in one mapping are no duplicates, for safe_load takes them."""
    assert default("database: {sqlite: {<<: {path: x}, <<: {pool_size: 2}}}") == SqliteSettings("default", "x", 2)


@pytest.mark.parametrize(
    "text",
    [
        "&a {database: *a}",
        "database: &a {sqlite: *a}",
        "database: {sqlite: &a {path: x, databases: *a}}",
        "database: {sqlite: &a {path: x, databases: {b: *a}}}",
        "database: {sqlite: &a {path: x, <<: *a, databases: {b: {<<: *a}}}}",
        "&a [*a]",
        "&a {*a : *a}",
    ],
)
def test_circles(text):
    """Aliases that lead in circles end in an error like any other."""
    assert refused(text).startswith("db.yaml:1: ")


def test_multiplying_aliases():
    """Aliases that multiply a billionfold cost nothing, for nobody follows them."""
    lines = ["database:", " sqlite:", "  path: x", "  a0: &a0 {k: v}"]
    for n in range(40):
        lines.append(f"  a{n + 1}: &a{n + 1} {{" + ", ".join(f"k{k}: *a{n}" for k in range(10)) + "}")
    assert refused("\n".join(lines)).startswith("db.yaml:4: database.sqlite.a0: unknown key")


# --- Files that cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "database:\n  sqlite: [\n",
            "3: not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        (
            "database:\n  sqlite:\n\tpath: x\n",
            "3: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token (YAML is indented with spaces, not tabs)",
        ),
        (
            "database:\n  sqlite:\n    path: :memory:\n",
            '3: not valid YAML: mapping values are not allowed here (put quotes round it: ":memory:")',
        ),
        ("database:\n  sqlite: *nobody\n", "2: not valid YAML: found undefined alias 'nobody'"),
        (
            "database: {}\n---\ndatabase: {}\n",
            "2: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("database:\n  x: \x07\n", "2: not valid YAML: special characters are not allowed"),
    ],
)
def test_syntax(text, message):
    """What is no YAML is reported with its line and without Python's own long story."""
    assert refused(text) == f"db.yaml:{message}"


def test_nested_too_deeply():
    """A file that is nested beyond all measure is an error, not a crash."""
    # deeper than Python calls; PyYAML takes time by the square of the depth
    assert refused("[" * sys.getrecursionlimit()) == "db.yaml:1: not a configuration: it is nested too deeply"


def test_not_utf8():
    """Bytes that are no UTF-8 are reported with their line."""
    Path("db.yaml").write_bytes(b"database:\n  sqlite:\n    path: \xfc.db\n")
    with pytest.raises(ConfigurationError) as caught:
        settings.configure("db.yaml")
    assert str(caught.value) == "db.yaml:3: not UTF-8: invalid start byte"


def test_a_missing_file():
    """The file that `configure()` names must be there."""
    with pytest.raises(ConfigurationError) as caught:
        settings.configure("no/such.yaml")
    assert str(caught.value) == f"no/such.yaml: no such file in {os.getcwd()!r}; configure() names it"
    path = os.path.abspath("no.yaml")
    with pytest.raises(ConfigurationError) as caught:
        settings.configure(path)
    assert str(caught.value) == f"{path}: no such file; configure() names it"


def test_a_file_below_a_file():
    """A path that leads through a file is a missing file."""
    write("", "file")
    with pytest.raises(ConfigurationError, match=r"^file/db.yaml: no such file in "):
        settings.configure("file/db.yaml")


def test_a_directory():
    """A directory is no configuration."""
    Path("dir").mkdir()
    with pytest.raises(ConfigurationError, match=r"^dir: cannot be read: \w"):
        settings.configure("dir")


def test_no_permission(monkeypatch):
    """A file that may not be read is reported as such, with the system's error as the cause."""

    def denied(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(document, "open", denied, raising=False)  # Root may read everything, and tests run as root.
    assert refused("database: {}") == "db.yaml: cannot be read: Permission denied"


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_impossible_file_names(path):
    """What cannot be a file name is a configuration error, not a ValueError."""
    with pytest.raises(ConfigurationError, match=r"not a file name"):
        settings.configure(path)


@pytest.mark.parametrize("source", [5, b"db.yaml", "", ["db.yaml"], True])
def test_impossible_sources(source):
    """`configure()` says what it takes."""
    with pytest.raises(ConfigurationError, match=r"^configure\(\) takes a path, a mapping or None, not "):
        settings.configure(source)


def test_without_a_working_directory():
    """A working directory that has been removed makes no other errors than a missing file."""
    code = """
        import os, tempfile
        import database.sqlite3  # Python 3.13.0 cannot import `socket` from nowhere (SystemError), and who runs has this
        from database import errors, settings
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)
        two = {"path": "x.db", "databases": {"a": {"path": "./y.db"}}}
        settings.configure({"database": {"sqlite": two}})
        settings.configure(None)
        try:
            settings.current()
        except errors.ConfigurationError as error:
            print(error)
        """
    if sys.platform == "win32":
        pytest.skip("Windows does not remove a working directory")
    printed = python(code)
    assert printed.startswith("config/database.yaml: no such file, nor is there a working directory; create it")


# --- Secrets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What another engine's settings might look like."""

    name: str
    dbname: str
    host: str = ""
    password: str = ""
    logging: LoggingSettings = LoggingSettings()


@pytest.fixture
def server(monkeypatch):
    """Adds an engine's section, which takes one entry in the table."""

    def word(item):
        if not isinstance(item.value, str):
            raise Unfit("a string")
        return item.value

    served = Section(
        engine="server",
        build=ServerSettings,
        rules={"dbname": word, "host": word, "password": word},
        own=("dbname",),
        identity=lambda _: None,
    )
    monkeypatch.setitem(reading.SECTIONS, "srv", served)


@pytest.mark.usefixtures("server")
def test_another_engine():
    """A section in the table is all that an engine needs to be read, inherited and found."""
    configuration = load(
        """
        database:
          sqlite: {path: x.db, databases: {audit: {path: a.db}}}
          srv:
            dbname: main
            host: localhost
            databases:
              orders: {dbname: orders, logging: {level: DEBUG}}
        """
    )
    orders = ServerSettings("orders", "orders", "localhost", logging=LoggingSettings(level="DEBUG"))
    assert configuration.find("orders") == ("server", orders)
    assert configuration.find("audit") == ("sqlite3", SqliteSettings("audit", "a.db"))
    assert configuration.find("default", "server") == (
        "server",
        ServerSettings("default", "main", "localhost"),
    )
    assert configuration.find("default", "sqlite3") == ("sqlite3", SqliteSettings("default", "x.db"))
    assert message(configuration, "default") == (
        "db.yaml: several engines have a database named 'default'; take get_db from database.sqlite3 or database.server"
    )
    assert message(configuration, "orders", "sqlite3") == (
        "db.yaml: no sqlite3 database is named 'orders'; server has one (known: 'audit', 'default')"
    )
    assert message(configuration, "x", "other") == "db.yaml: no other database is named 'x' (known: none)"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "text",
    [
        "password: {hunter2: hunter2}",
        "password: [hunter2]",
        "password: !!int hunter2",
        "password: !hunter2 x",
        "password: 1234",
        "password: !!float 1234",
        "password: *hunter2",
        "password:\n      *hunter2",
        "password: @hunter2",
        "password: 'hunter2",
        "password: hunter2: x",
        "password: %hunter2",
        "password: a\n    password: hunter2",
        "pasword: hunter2",
        "api_token: hunter2",
        "host: [password=hunter2",
        "logging: server://me:hunter2@host/db",
        "logging: host=x password=hunter2",
        "databases: {a: 'server://me:hunter2@host/db'}",
    ],
)
def test_secrets_stay_secret(text):
    """However wrong the line of a password is, neither the message nor a traceback shows the password."""
    import traceback

    source = write(f"database:\n  srv:\n    dbname: x\n    {text}\n")
    with pytest.raises(ConfigurationError) as caught:
        settings.configure(source)
    # The frames' own lines are this test's and the package's; what they print of the error is what counts.
    printed = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith(("db.yaml:4: ", "db.yaml:5: "))
    assert "hunter2" not in printed.replace(repr(source), "")
    assert "1234" not in printed


# --- find ---------------------------------------------------------------------------------------------------


def message(configuration, *args):
    with pytest.raises(ConfigurationError) as caught:
        configuration.find(*args)
    return str(caught.value)


def test_find():
    """A database is found by its name, with and without its engine."""
    configuration = load(sqlite(databases={"audit": {"path": "a.db"}}))
    assert configuration.find("audit") == ("sqlite3", SqliteSettings("audit", "a.db"))
    assert configuration.find("default", "sqlite3") == ("sqlite3", SqliteSettings("default", "x.db"))


def test_find_suggests():
    """An unknown name is an error that says where it looked, what may have been meant, and what there is."""
    configuration = load("database: {sqlite: {path: x, databases: {audit: {path: y}}}}")
    known = "(known: 'audit', 'default')"
    assert message(configuration, "Audti") == f"db.yaml: no database is named 'Audti'; did you mean 'audit'? {known}"
    assert message(configuration, "zzz") == f"db.yaml: no database is named 'zzz' {known}"
    assert message(configuration, "audit", "postgresql") == (
        "db.yaml: no postgresql database is named 'audit'; sqlite3 has one (known: none)"
    )
    assert message(configuration, 5) == f"db.yaml: no database is named 5 {known}"


# --- Which configuration counts -----------------------------------------------------------------------------


def path_now():
    return settings.current().find("default")[1].path


def test_order_of_precedence(monkeypatch):
    """What was configured comes before DATABASE_CONFIG, and that before config/database.yaml."""
    write("database: {sqlite: {path: default}}", "config/database.yaml")
    write("database: {sqlite: {path: environment}}", "env.yaml")
    assert (path_now(), settings.current().source) == ("default", "config/database.yaml")
    settings.forget()
    monkeypatch.setenv("DATABASE_CONFIG", "env.yaml")
    assert (path_now(), settings.current().source) == ("environment", "env.yaml")
    settings.configure(sqlite(path="configured"))
    assert (path_now(), settings.current().source) == ("configured", "configure(mapping)")
    settings.configure(None)
    assert path_now() == "environment"


def test_the_last_configure_wins():
    """`configure()` may be called again, and replaces all that was configured."""
    settings.configure(sqlite(path="one", databases={"a": {"path": "a"}}))
    settings.configure(sqlite(path="two"))
    assert [*settings.current().engines["sqlite3"]] == ["default"]
    assert path_now() == "two"


def test_a_wrong_configure_changes_nothing():
    """A source that is refused leaves in place what was configured before."""
    settings.configure(sqlite(path="one"))
    with pytest.raises(ConfigurationError):
        settings.configure(sqlite(pool_size=0))
    assert path_now() == "one"


def test_looked_up_once_until_forgotten():
    """The file is read at first use and not again, until `forget()`; what was configured outlives that."""
    write("database: {sqlite: {path: one}}", "config/database.yaml")
    first = settings.current()
    write("database: {sqlite: {path: two}}", "config/database.yaml")
    assert settings.current() is first
    settings.forget()
    assert path_now() == "two"
    settings.configure(sqlite(path="three"))
    settings.forget()
    assert path_now() == "three"


def test_configured_files_are_read_at_once():
    """A file is read by `configure()`, so that it may change or vanish later."""
    settings.configure(write("database: {sqlite: {path: one}}"))
    Path("db.yaml").unlink()
    assert path_now() == "one"


def test_no_configuration():
    """With nothing configured, the error says where it looked and names three ways out, one by example."""
    with pytest.raises(ConfigurationError) as caught:
        settings.current()
    assert str(caught.value) == (
        f"config/database.yaml: no such file in {os.getcwd()!r}; "
        "create it, set DATABASE_CONFIG to another file, "
        'or call configure({"database": {"sqlite": {"path": "./data/jobu.db"}}}) before the first use'
    )
    eval(str(caught.value).split("or call ")[1].split(" before")[0], {"configure": settings.configure})
    assert path_now() == "./data/jobu.db"


def test_a_missing_file_is_not_remembered():
    """Once the file is there, the next use finds it."""
    with pytest.raises(ConfigurationError):
        settings.current()
    write("database: {sqlite: {path: one}}", "config/database.yaml")
    assert path_now() == "one"


def test_the_environment_names_a_missing_file(monkeypatch):
    """DATABASE_CONFIG does not fall back on the default file; when empty, it counts as unset."""
    write("database: {sqlite: {path: default}}", "config/database.yaml")
    monkeypatch.setenv("DATABASE_CONFIG", "no.yaml")
    with pytest.raises(ConfigurationError) as caught:
        settings.current()
    assert str(caught.value) == (
        f"no.yaml: no such file in {os.getcwd()!r}; DATABASE_CONFIG names it: correct or unset it"
    )
    monkeypatch.setenv("DATABASE_CONFIG", "")
    assert path_now() == "default"


# --- Holders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, sqlite(path="two"), sqlite(pool_size=0)])
def test_configure_is_refused_while_databases_are_open(source):
    """While pools are open, `configure()` names them and says what to do, and changes nothing."""
    settings.configure(sqlite(path="one"))
    pools = [object(), object(), object()]
    for pool, name in zip(pools, ["default", "audit", "default"], strict=True):
        settings.hold(pool, name)
    with pytest.raises(ConfigurationError) as caught:
        settings.configure(source)
    assert str(caught.value) == (
        "configure() while databases are open ('audit', 'default'): `await close_all()` comes first"
    )
    assert path_now() == "one"
    for pool in pools:
        settings.release(pool)
    settings.configure(sqlite(path="two"))
    assert path_now() == "two"


def test_holding_twice_is_holding_once():
    """Holders are told apart by identity; neither a second hold nor a second release does harm."""
    one, two = [], []
    settings.hold(one, "a")
    settings.hold(one, "a")
    settings.hold(two, "b")
    settings.release(one)
    settings.release(one)
    with pytest.raises(ConfigurationError, match=r"\('b'\)"):
        settings.configure(None)
    settings.release(two)
    settings.configure(None)


def test_a_pool_that_opens_while_the_file_is_read(monkeypatch):
    """A pool that opened meanwhile wins: `configure()` is refused although none was open when it began."""
    pool = object()
    monkeypatch.setattr(reading, "load", lambda source: settings.hold(pool, "default"))
    with pytest.raises(ConfigurationError, match="close_all"):
        settings.configure(sqlite())
    assert settings._state.configured is None


def test_holders_are_not_kept_alive():
    """The settings hold no reference to a pool, so that a lost one can be collected."""
    collected = []

    class Pool:
        def __del__(self):
            collected.append(settings.release(self))

    settings.hold(Pool(), "default")
    gc.collect()
    assert collected == [None]
    settings.configure(None)


def test_release_within_the_lock():
    """A finalizer may release while this thread is deciding: there is no deadlock."""
    pool = object()
    settings.hold(pool, "default")

    def decide():
        with settings._state.lock:
            settings.release(pool)

    thread = threading.Thread(target=decide, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert not settings._state.holders


def test_sections_of_other_engines_are_not_imported():
    """A program that has no server need not pay for the definition of a server's settings; both read alike."""
    printed = python(
        """
        import sys
        from database import settings
        settings.read({"database": {"sqlite": {"path": "one"}}})
        print("database.postgresql.settings" in sys.modules, "yaml" in sys.modules)
        settings.read({"database": {"postgresql": {"dbname": "one"}}})
        print("database.postgresql.settings" in sys.modules, "psycopg" in sys.modules)
        """
    )
    assert printed.split() == ["False", "False", "True", "False"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child():
    """A forked child has the configuration, but neither the holders nor a lock that nobody will release."""
    assert (
        python(
            """
            import os, threading
            from database import settings
            settings.configure({"database": {"sqlite": {"path": "one"}}})
            settings.hold(settings, "default")
            thread = threading.Thread(target=settings._state.lock.acquire)
            thread.start()
            thread.join()
            child = os.fork()
            if not child:
                assert settings.current().find("default")[1].path == "one"
                settings.configure({"database": {"sqlite": {"path": "two"}}})
                assert settings.current().find("default")[1].path == "two"
                os._exit(0)
            print(os.waitpid(child, 0)[1])
            """
        )
        == "0\n"
    )


# --- The module itself --------------------------------------------------------------------------------------


def python(code):
    """What a fresh interpreter prints when it runs the code."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    environment.pop("DATABASE_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_yaml_is_imported_for_files_only():
    """Neither the import nor a configuration by mapping needs yaml, which takes long to import."""
    assert (
        python(
            """
            import sys
            from database import settings
            settings.configure({"database": {"sqlite": {"path": "x"}}})
            settings.current().find("default")
            print({"yaml", "difflib", "trio", "sqlite3"} & {*sys.modules})
            """
        )
        == "set()\n"
    )


def test_all_is_right():
    """`__all__` names what there is, and all of it is documented."""
    assert sorted(settings.__all__, key=lambda name: (not name.isupper(), name)) == settings.__all__
    for name in settings.__all__:
        assert getattr(settings, name).__doc__


# --- Anything at all ----------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["database", "sqlite", "databases", "default", "audit", "logging", *section("sqlite").rules]
    + [*LOGGING_RULES, "OFF", "wal", ":memory:", "~", "~root", "", ".", "\0", "\ud800", "<<"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    WORDS,
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS | WORDS, inner, max_size=4),
    max_leaves=12,
)
SECTIONS = st.dictionaries(WORDS, VALUES | st.dictionaries(WORDS, VALUES, max_size=3), max_size=5)
DOCUMENTS = st.one_of(
    st.dictionaries(WORDS | SCALARS, VALUES, max_size=3),
    st.builds(lambda section: {"database": {"sqlite": section}}, SECTIONS),
    st.builds(lambda section: {"database": {"sqlite": {"path": "x", **section}}}, SECTIONS),
)
RELAXED = hypothesis_settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(configure):
    """Only a ConfigurationError may come of it, and whatever is accepted is within its bounds."""
    settings.reset()
    try:
        configure()
    except ConfigurationError:
        return
    for each in settings.current().engines["sqlite3"].values():
        assert each.path
        assert 1 <= each.pool_size <= 1000
        assert 0 <= each.pool_timeout < math.inf
        assert 0 <= each.busy_timeout < 2**31
        assert each.journal_mode in {"DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"}
        assert each.synchronous in {"OFF", "NORMAL", "FULL", "EXTRA"}
        assert isinstance(each.foreign_keys, bool)
        assert each.logging.parameters in {"redacted", "shown"}
        # What came out goes in again and comes out the same.
        again = asdict(each)
        del again["name"]
        assert default({"database": {"sqlite": again}}) == SqliteSettings(
            **{**again, "name": "default", "logging": each.logging}
        )


@RELAXED
@given(mapping=DOCUMENTS)
@example(mapping=sqlite(path="~\0"))
@example(mapping=sqlite(path="~\ud800"))
@example(mapping=sqlite(databases={"\ud800": {"path": "y"}}))
def test_any_mapping(mapping):
    """No mapping, however odd, raises anything but a ConfigurationError."""
    survives(lambda: settings.configure(mapping))


@RELAXED
@given(document=DOCUMENTS, flow=st.booleans())
def test_any_yaml(document, flow):
    """No YAML file, however odd, raises anything but a ConfigurationError, and each one names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "db.yaml")
        path.write_text(yaml.dump(document, default_flow_style=flow), encoding="utf-8", errors="replace")
        survives(lambda: settings.configure(path))


LINES = st.lists(
    st.sampled_from(
        [
            "database:",
            " sqlite:",
            "  path: x",
            "  logging: &a",
            "   level: INFO",
            "  <<: *a",
            "  databases:",
            "   a:",
        ]
        + [
            "    path: y",
            "    <<: [*a, *a]",
            "  ? x",
            "  - x",
            "---",
            "...",
            "%YAML 1.1",
            "  x: !!int y",
            "\t",
            "  'a",
        ]
        + [
            "  pool_size: !!bool maybe",
            "  pool_size: !!float",
            "  pool_size: !!timestamp x",
            "  : y",
            "  ? [a]",
            "\x00",
        ]
        + [
            "  pool_size: !!binary ü",
            "  logging: !!omap [a]",
            "  logging: !!pairs x",
            "  =: x",
            "  logging: *a",
            "&a",
        ]
    ),
    max_size=12,
)


@RELAXED
@given(lines=LINES, junk=st.binary(max_size=4))
def test_any_file(lines, junk):
    """No file, YAML or not, raises anything but a ConfigurationError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "db.yaml")
        path.write_bytes("\n".join(lines).encode() + junk)
        survives(lambda: settings.configure(path))


def test_configuration_can_be_built_by_hand():
    """A configuration is a plain record, so that tests of other modules need no file."""
    configuration = Configuration({"sqlite3": {"default": SqliteSettings("default", "x")}}, "by hand")
    assert configuration.find("default")[0] == "sqlite3"
