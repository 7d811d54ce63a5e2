"""Databases for tests: copies that stand in for the configured ones, and are thrown away.

A `Sandbox` prepares its databases once: it creates them as the configuration says, and runs what the tests need in them.
`layer()` then puts copies of them in place of the real ones; layers nest, each a copy of the one below. Whatever happens
in a layer ends with it. Nothing is simulated: within a layer, code commits, rolls back, waits, is cancelled and reads on
other connections as it does in production, on however many event loops and threads. That is why a layer is a copy, and
not a transaction around the test: within one, `VACUUM` could not run, readers would see what is not committed, and an
interrupted write would take the whole test's data with it.

Handles stay the same objects, so that code which has called `get_db()` at import time works on the copies too. `enter`
and `leave` exchange what is behind them: the configuration, and each handle's binding, with its pools.

Threads. One sandbox at a time is in place in a process. Layers are entered and left by one thread, while no event loop of
its own is running. Pools that the layer's tests have opened on other threads' loops are closed by those.

How to copy a database is an engine's business: its module `sandbox` has the functions of `Copier`.
"""

from __future__ import annotations

import importlib
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import Context
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast
from urllib.parse import quote

import anyio

from database import settings
from database.errors import DatabaseError
from database.session import registry
from database.session.binding import Binding
from database.session.database import Database
from database.settings import Configuration, Settings

__all__ = ["Layer", "Sandbox", "Setup"]

CLOSE_SECONDS = 5.0

Setup = str | Path | Callable[[Database], Awaitable[object]]
"""SQL text; an SQL file, or a folder of them, run in the order of their names; or an asynchronous function of the handle."""


class Copier(Protocol):
    """What an engine's module `sandbox` offers."""

    def fresh(self, settings: Any, folder: Path, name: str) -> Any:
        """The settings of a new database in that folder that is otherwise like this one."""
        ...

    def copy(self, source: Any, folder: Path, name: str, *, like: Any, durable: bool) -> Any:
        """Copies a database, which may be in use, and gives the copy's settings.

        Args:
            source: The settings of what is to be copied.
            folder: Where the copy may keep its files.
            name: A file name that no other database of the layer has.
            like: The settings that the user gave.
            durable: Whether the copy is to be as safe as those demand; else it is to be quick.
        """
        ...

    def discard(self, settings: Any) -> None:
        """Throws away what `fresh` or `copy` gave, but for files in the folder; nobody has it open any more."""
        ...


class Sandbox:
    """The databases of a configuration, prepared once, and the layers above them."""

    def __init__(
        self, configuration: Configuration, folder: Path, setup: Setup | Iterable[Setup] | None = None
    ) -> None:
        """Remembers what to do; the databases are prepared when the first layer is entered.

        Args:
            configuration: The databases.
            folder: An empty folder for all files.
            setup: What to do in them once they are created, once for all layers.
        """
        self._wanted = configuration
        self._folder = folder
        self._setup = setup
        self._numbers = iter(range(1, 10**9))
        self._layers: list[Layer] = []
        self._base: Configuration | None = None

    @property
    def depth(self) -> int:
        """How many layers are open."""
        return len(self._layers)

    def layer(self, *, durable: bool = False, folder: Path | None = None) -> Layer:
        """Another layer above those that are open: `with sandbox.layer() as db: ...`.

        Args:
            durable: Whether files are written as safely as the configuration demands; else they are written quickly.
            folder: An empty folder for the copies, which stays; None: one that goes with the layer.
        """
        return Layer(self, durable=durable, folder=folder)

    def copy(self, folder: Path, *, durable: bool) -> Configuration:
        """Copies what is innermost now."""
        below = self._layers[-1].configuration if self._layers else self._prepared()
        folder.mkdir(parents=True, exist_ok=True)

        def one(engine: str, name: str, source: Settings) -> Settings:
            like = self._wanted.engines[engine][name]
            return cast("Settings", _copier(engine).copy(source, folder, _file(name), like=like, durable=durable))

        return _each(below, one)

    def new_folder(self) -> Path:
        """A name for a folder that is not there yet."""
        return self._folder / f"layer-{next(self._numbers)}"

    def entered(self, layer: Layer) -> None:
        """The layer is innermost now."""
        self._layers.append(layer)

    def left(self, layer: Layer) -> None:
        """The layer is over.

        Raises:
            RuntimeError: It is not the innermost.
        """
        if self._layers[-1:] != [layer]:
            raise RuntimeError("layers of a database sandbox must be left in the reverse order of their beginning")
        self._layers.pop()

    def close(self) -> None:
        """Throws the prepared databases away, when all layers are left. The folder stays."""
        base, self._base = self._base, None
        if base is not None:
            _discard(base)

    def _prepared(self) -> Configuration:
        if self._base is None:
            folder = self._folder / "base"
            folder.mkdir(parents=True, exist_ok=True)

            def one(engine: str, name: str, source: Settings) -> Settings:
                return cast("Settings", _copier(engine).fresh(source, folder, _file(name)))

            base = _each(self._wanted, one)
            with _Exchanged(base):
                _run_elsewhere(lambda: self._prepare(base))
            self._base = base
        return self._base

    async def _prepare(self, base: Configuration) -> None:
        databases = [registry.get_db(name, engine) for engine, found in base.engines.items() for name in found]
        try:
            for database in databases:
                await database.open()
            setups = self._setup
            if setups is None:
                setups = []
            elif isinstance(setups, (str, Path)) or callable(setups):
                setups = [setups]
            for setup in setups:
                if isinstance(setup, str):
                    await databases[0].execute_script(setup)
                elif isinstance(setup, Path):
                    files = sorted(setup.glob("*.sql")) if setup.is_dir() else [setup]
                    for file in files:
                        await databases[0].execute_script(file.read_text("utf-8"))
                else:
                    await setup(databases[0])
        finally:
            for database in registry.handles():
                await database.close()


class Layer:
    """Copies that stand in for the databases of a sandbox, until it is left. `with` it; it gives the first handle."""

    def __init__(self, sandbox: Sandbox, *, durable: bool, folder: Path | None) -> None:
        self._sandbox = sandbox
        self._durable = durable
        self._given = folder
        self._folder = folder or sandbox.new_folder()
        self._exchanged: _Exchanged | None = None
        self.configuration: Configuration

    def __enter__(self) -> Database:
        self.configuration = self._sandbox.copy(self._folder, durable=self._durable)
        self._exchanged = _Exchanged(self.configuration)
        self._exchanged.__enter__()
        self._sandbox.entered(self)
        engine, databases = next(iter(self.configuration.engines.items()))
        return registry.get_db(next(iter(databases)), engine)

    async def close(self) -> None:
        """Closes the pools of the running event loop. Needed where that goes on beyond the layer's end."""
        for database in registry.handles():
            database.binding.forget_levels()  # whatever was left open
            await database.close()

    def __exit__(self, *_: object) -> None:
        if self._exchanged is None:
            return
        self._sandbox.left(self)
        exchanged, self._exchanged = self._exchanged, None
        exchanged.__exit__()
        _discard(self.configuration)
        if self._given is None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _discard(configuration: Configuration) -> None:
    """Throws the databases of a configuration away that an engine has made."""
    for engine, databases in configuration.engines.items():
        for found in databases.values():
            _copier(engine).discard(found)


class _Exchanged:
    """Everything behind the handles is another; `with` it."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._before: Configuration | None = None
        self._parked: list[tuple[Database, Binding]] = []

    def __enter__(self) -> None:
        self._before = settings.override(self._configuration)
        self._parked = [(database, database.binding) for database in registry.handles()]
        for database, binding in self._parked:
            database.binding = binding.fresh()

    def __exit__(self, *_: object) -> None:
        parked = {id(database): found for database, found in self._parked}
        for database in registry.handles():
            for pool in database.pools():
                _close(pool)
            found = parked.get(id(database))
            if found is None:  # made meanwhile
                database.binding = database.binding.fresh()
            else:
                found.forget_pools(closing=True)
                database.binding = found
        settings.override(self._before)


def _close(pool: Any) -> None:
    """Closes a pool from outside its loop, which may have ended, be paused, or run on another thread."""
    waker = pool.waker
    if not waker.running:
        pool.close_now()
        return
    pool.close_soon()
    if pool.thread == threading.get_ident():  # trio, paused here by a test runner: the loop comes to it when it goes on
        return
    deadline = time.monotonic() + CLOSE_SECONDS
    while not pool.closed and time.monotonic() < deadline:
        time.sleep(0.001)


def _run_elsewhere(function: Callable[[], Awaitable[None]]) -> None:
    """Runs a coroutine function on an event loop of its own, wherever the caller may be."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            # A new context, so that nothing takes this for the inside of the caller's event loop.
            Context().run(anyio.run, function)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="database sandbox")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _each(configuration: Configuration, function: Callable[[str, str, Settings], Settings]) -> Configuration:
    engines = {
        engine: MappingProxyType({name: function(engine, name, found) for name, found in databases.items()})
        for engine, databases in configuration.engines.items()
    }
    return replace(configuration, engines=MappingProxyType(engines))


def _copier(engine: str) -> Copier:
    try:
        return cast("Copier", importlib.import_module(f"database.{engine}.sandbox"))
    except ModuleNotFoundError as error:
        raise DatabaseError(f"databases of {engine} cannot be copied for tests yet") from error


def _file(name: str) -> str:
    return quote(name, safe="")
