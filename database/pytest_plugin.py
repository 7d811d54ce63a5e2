"""Fixtures for pytest: each test gets the configured databases as they were, and what it does is undone.

See `docs/guides/pytest-plugin.md`. The fixture `db` gives the handle; `database_config` and `database_setup` are there to
be overridden. How it is done, and why by copies, stands in `database.sandbox`.

Nothing of the package is imported before a fixture is used: what pytest loads in every project of an environment is
`jobu_database_pytest`, and that executes this file without importing `database`, for the project may have a module of that
name. There is no state here, so it may be loaded under both names.

Event loops. A layer has to be left with its pools closed, and a pool is best closed on its own loop. So a test that runs
under AnyIO's plugin has its layer entered and left by an asynchronous fixture (`_database_anyio`), on the same loop; any
other, and the wider scopes, by an ordinary one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

__all__ = ["layer"]


def _other_database() -> str | None:
    """Where Python finds something else than this package under its name; None: it finds this package."""
    loaded = sys.modules.get("database")
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return None if _is_ours(file) else str(file or "a folder without __init__.py")
    for folder in map(Path, sys.path):
        for found in (folder / "database" / "__init__.py", folder / "database.py"):
            if found.is_file():
                return None if _is_ours(found) else str(found)
    return None


def _is_ours(file: str | Path | None) -> bool:
    return file is not None and Path(file).with_name("sandbox.py").is_file()


_SHADOWED = (
    "the fixtures of jobu-database (db, db_path, …) cannot work here: what Python imports as `database` is {}. Give that"
    " another name if you want to use the package in this project; if not, `-p no:database` leaves the plugin out"
)


class DatabaseShadowedWarning(pytest.PytestWarning):
    """The project has a module with the package's name."""


def pytest_configure(config: pytest.Config) -> None:
    """Says why the fixtures cannot work, where they cannot; the run goes on."""
    other = _other_database()
    if other is not None:
        with contextlib.suppress(DatabaseShadowedWarning):  # where warnings are errors, this one is none
            config.issue_config_time_warning(DatabaseShadowedWarning(_SHADOWED.format(other)), stacklevel=2)


if TYPE_CHECKING:
    from database.sandbox import Sandbox, Setup
    from database.session.database import Database

Sandboxes = dict[str, "Sandbox"]


@pytest.fixture(scope="session")
def database_config() -> Any:
    """The configuration of the databases under test: a path, a mapping, or None for what the project itself uses.

    Override it in a `conftest.py` or a module. Paths in it are not touched: the tests work on databases of their own.
    """
    return None


@pytest.fixture(scope="session")
def database_setup() -> Any:
    """What to do in the new databases, once, before the first test: SQL, a path, an async function of `db`, or a list.

    Override it in a `conftest.py` or a module. `init_sql` has been run by then.
    """
    return None


@pytest.fixture(scope="session")
def _database_sandboxes() -> Generator[Sandboxes, None, None]:
    sandboxes: Sandboxes = {}
    yield sandboxes
    for sandbox in sandboxes.values():
        sandbox.close()


def _sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """The sandbox for what `database_config` and `database_setup` are here."""
    other = _other_database()
    if other is not None:
        raise pytest.UsageError(_SHADOWED.format(other))
    from database import settings  # noqa: PLC0415  - see the top of the module
    from database.errors import ConfigurationError  # noqa: PLC0415
    from database.sandbox import Sandbox  # noqa: PLC0415

    source: Any = request.getfixturevalue("database_config")
    setup: Setup | Iterable[Setup] | None = request.getfixturevalue("database_setup")
    sandboxes: Sandboxes = request.getfixturevalue("_database_sandboxes")
    for sandbox in sandboxes.values():
        if sandbox.depth and source is None:  # a wider scope's layer is in place, and with it its configuration
            return sandbox
    if isinstance(source, settings.Configuration):
        configuration = source
    elif source is not None:
        configuration = settings.read(source)
    else:
        try:
            configuration = settings.current()
        except ConfigurationError:
            if Path(settings.DEFAULT_FILE).exists():
                raise
            configuration = settings.read({"database": {"sqlite": {"path": ":memory:", "init_sql": ""}}})
    key = f"{configuration!r} {setup!r}"
    if key not in sandboxes:
        factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
        sandboxes[key] = Sandbox(configuration, factory.mktemp("database"), setup)
    return sandboxes[key]


def _refuse_below_narrower(request: pytest.FixtureRequest) -> None:
    """A layer of a wider scope would outlive the narrower one that it is a copy of."""
    order = ["session", "package", "module", "class", "function"]
    open_layers: list[str] = request.getfixturevalue("_database_layers")
    name = request.fixturename
    if open_layers and order.index(open_layers[-1]) > order.index(request.scope):
        raise pytest.UsageError(
            f"{name} is requested when a layer of scope {open_layers[-1]!r} is open already: a test, or a fixture, must"
            f" name {name} in its arguments before it uses `db`, not look it up later"
        )
    if open_layers[-1:] == ["function"]:
        raise pytest.UsageError("a test has one database: request either db (db_function) or db_file, not both")


@pytest.fixture(scope="session")
def _database_layers() -> list[str]:
    return []


def layer(
    request: pytest.FixtureRequest, *, durable: bool = False, folder: Path | None = None
) -> Generator[Database, None, None]:
    """Makes further fixtures like `db`: `yield from` it in one of any scope.

    pytest ties a fixture of package scope to the package that defines it; so `db_package` is yours to define.

    Args:
        request: The fixture's `request`.
        durable: Whether files are written as safely as the configuration demands.
        folder: An empty folder for the files, which stay there; None: one that goes with the fixture.
    """
    layers: list[str] = request.getfixturevalue("_database_layers")
    _refuse_below_narrower(request)
    with _sandbox(request).layer(durable=durable, folder=folder) as db:
        layers.append(request.scope)
        yield db
        layers.pop()


@pytest.fixture
def _database_plain(request: pytest.FixtureRequest) -> Generator[Database, None, None]:
    yield from layer(request)


@pytest.fixture
async def _database_anyio(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncGenerator[Database, None]:
    layers: list[str] = request.getfixturevalue("_database_layers")
    _refuse_below_narrower(request)
    innermost = _sandbox(request).layer()
    with innermost as db:
        layers.append("function")
        yield db
        layers.pop()
        await innermost.close()


@pytest.fixture
def db_function(request: pytest.FixtureRequest) -> Database:
    """The same as `db`, for projects that have a fixture `db` of their own."""
    database: Database = request.getfixturevalue(
        "_database_anyio" if "anyio_backend" in request.fixturenames else "_database_plain"
    )
    return database


@pytest.fixture
def db(db_function: Database) -> Database:
    """The default database, as the wider scopes have left it; what the test does to any database is undone."""
    return db_function


@pytest.fixture(scope="class")
def db_class(request: pytest.FixtureRequest) -> Generator[Database, None, None]:
    """Like `db`, for fixtures of class scope: each test starts from what they have done."""
    yield from layer(request)


@pytest.fixture(scope="module")
def db_module(request: pytest.FixtureRequest) -> Generator[Database, None, None]:
    """Like `db`, for fixtures of module scope: each test starts from what they have done."""
    yield from layer(request)


@pytest.fixture(scope="session")
def db_session(request: pytest.FixtureRequest) -> Generator[Database, None, None]:
    """Like `db`, for fixtures of session scope: each test starts from what they have done."""
    yield from layer(request)


@pytest.fixture
def db_file(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Database, None, None]:
    """Like `db`, in files below `tmp_path` that are written as safely as the configuration demands, and that stay there.

    For code that hands the database to another process, or that opens its file itself; see `db_path`.
    """
    yield from layer(request, durable=True, folder=tmp_path / "database")


@pytest.fixture
def db_path(request: pytest.FixtureRequest) -> Path:
    """The file of the default database that the test works on, with `db` or with `db_file`."""
    from database import settings  # noqa: PLC0415  - see the top of the module
    from database.sqlite3.settings import SqliteSettings  # noqa: PLC0415

    if not request.getfixturevalue("_database_layers"):
        raise pytest.UsageError("db_path goes with db or db_file, which must stand before it")
    found = settings.current().find("default")[1]
    if not isinstance(found, SqliteSettings):
        raise pytest.UsageError("db_path goes with a database that is a file")
    return Path(found.path)
