"""What a database's name means, here and now: its settings, engine and observer, a pool for each event loop, and levels.

A `Database` holds one binding, and everything that works for it takes the binding. So all that a name means can be
exchanged at once, while the handles stay the same objects: a sandbox puts a `fresh` one in its place, and the old one
back (see `database.sandbox`). That is why what is made when a module is imported (decorated functions) asks the handle
for it at every call, and keeps none.

What the program itself has said of a database (`Declared`) outlives that: bindings share it.

Settings are looked up whenever a pool is opened: until then the configuration may change. A pool stands under the
identity of its event loop, which another loop may bear later; so it is always asked whether it is still that loop's.

Threads: any loop's. Each loop finds its own pool; what all share is read and set in single steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from database import logs, settings
from database.driver.pool import Pool, PoolStats
from database.driver.wakeup import create_waker, current_loop
from database.driver.worker import here
from database.engine import contract
from database.engine.contract import Engine
from database.errors import ConfigurationError, TransactionError
from database.session.level import Current, Level, step_back
from database.session.statements import Statements
from database.settings import Settings
from database.settings.model import with_step

if TYPE_CHECKING:
    from database.driver.observer import Observer
    from database.engine.contract import Backend

__all__ = ["Binding", "Declared"]


class Declared:
    """What the program has said of a database, whatever the configuration says of it."""

    __slots__ = ("adapters", "engine", "name", "resolved", "steps")

    def __init__(self, name: str, engine: str | None) -> None:
        self.name = name
        self.engine = engine
        """The engine's package that was asked for; None leaves it to the configuration."""
        self.resolved: str | None = None
        """The one that the configuration gave last."""
        self.steps: list[Callable[[Any], object]] = []
        """What `on_connect` was given."""
        self.adapters: dict[type, Callable[[Any], Any]] = {}
        """What `adapt` was given."""


class _Resolved(NamedTuple):
    """What the configuration says."""

    engine: Engine
    settings: Settings
    observer: logs.LogObserver


class Binding:
    """What a name means."""

    recent: Pool | None = None
    """The pool that was used last: mostly there is but one loop."""
    connection: Any = None
    """The engine's connection class, whose methods are what requests run; known once a statement has been analysed."""
    _resolved: _Resolved | None = None

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.name = declared.name
        self.current: Current = ContextVar(f"database {self.name}", default=None)
        self.statements = Statements(self._engine_anew)
        self._pools: dict[int, Pool] = {}
        self._replica_pools: dict[int, Pool] = {}
        """By the identity of their event loop."""

    def fresh(self) -> Binding:
        """Another one for the same database, as if this had never been used."""
        return Binding(self.declared)

    # What the configuration says

    @property
    def engine(self) -> Engine:
        """The engine that the configuration gives this database."""
        return (self._resolved or self.resolve()).engine

    def _engine_anew(self) -> Engine:
        """The same; while no pool is open, the configuration may have given the name to another engine since."""
        return (self._resolved if self._resolved and self._pools else self.resolve()).engine

    @property
    def settings(self) -> Settings:
        """The settings, as they were found last."""
        return (self._resolved or self.resolve()).settings

    @property
    def observer(self) -> logs.LogObserver:
        """Reports what this database does."""
        return (self._resolved or self.resolve()).observer

    def resolve(self) -> _Resolved:
        """Looks the settings up anew: the configuration may be another one since the last pool was closed.

        Raises:
            ConfigurationError: They are wrong, or none name this database.
        """
        declared = self.declared
        name, found = settings.current().find(self.name, declared.engine)
        for function in declared.steps:
            if not hasattr(found, "on_connect"):
                raise ConfigurationError(
                    f"database {self.name!r}: on_connect prepares connections of SQLite, not of {name}"
                )
            found = with_step(found, function)
        before = self._resolved
        if before is None or before.engine.name != name:
            engine = contract.load(name)
            self.connection = engine.connection
            self.statements.clear()
        else:
            engine = before.engine
        declared.resolved = name
        resolved = self._resolved = _Resolved(engine, found, logs.LogObserver(self.name, found.logging, engine.pins))
        return resolved

    # Where a task is

    def level(self) -> Level | None:
        """The level that the caller is in."""
        level = self.current.get()
        if level is not None and level.ended:
            level = step_back(self.current, level)
        return level

    def forget_levels(self) -> None:
        """Whatever transactions are open, no task is in them any more."""
        self.current = ContextVar(f"database {self.name}", default=None)

    # Pools

    def pool(self) -> Pool:
        """The pool of the running event loop, opened if need be.

        Raises:
            ConfigurationError: The settings are wrong, or none name this database.
            TransactionError: No event loop is running here.
        """
        loop = current_loop()
        pool = self.recent
        if pool is not None and pool.loop() is loop:
            return pool
        pool = self._of(loop, self._pools) or self._open_pool(loop)
        self.recent = pool
        return pool

    def reading_pool(self, *, replica: bool = True) -> Pool:
        """The pool for a read-only transaction: the replicas', if there are any and they will do."""
        make = self.engine.replica_backend
        if make is None or not replica:
            return self.pool()
        primary = self.pool()  # comes first: it resolves the settings, and prepares the database
        loop = current_loop()
        pool = self._of(loop, self._replica_pools)
        if pool is not None:
            return pool
        backend = make(self.settings, self.declared.adapters)
        return primary if backend is None else self._make_pool(loop, backend, self._replica_pools, "-replica")

    @staticmethod
    def _of(loop: object | None, pools: dict[int, Pool]) -> Pool | None:
        pool = pools.get(id(loop))
        return pool if pool is not None and pool.loop() is loop else None

    def opened(self) -> Pool | None:
        """The pool of the running event loop, if it is open."""
        return self._of(current_loop(), self._pools)

    def opened_replicas(self) -> Pool | None:
        """The replicas' pool of the running event loop, if it is open."""
        return self._of(current_loop(), self._replica_pools)

    def pools(self) -> list[Pool]:
        """The open pools, of all event loops."""
        return [*self._pools.values(), *self._replica_pools.values()]

    def stats(self) -> PoolStats:
        """The running event loop's statistics, its replicas' pool's with its pool's; where it has none, all loops' together."""
        pool = self.opened()
        if pool is None:
            return PoolStats.of(tuple(self.pools()))
        replicas = self.opened_replicas()
        return pool.stats() if replicas is None else PoolStats.of((pool, replicas))

    def forget_pools(self, *, closing: bool = False) -> None:
        """In a forked child: the pools are the parent's. With `closing`: only of those that are about to be closed."""
        for pools in (self._pools, self._replica_pools):
            for key in [key for key, pool in pools.items() if pool.closing or not closing]:
                del pools[key]
        self.recent = None

    def _open_pool(self, loop: object | None) -> Pool:
        if here.worker is not None:  # also where a function has started a loop there
            raise TransactionError(
                f"database {self.name!r} cannot be used from here: this code runs on a database's own thread"
                " (offload=True, or db.run), where only the database that runs it may be called"
            )
        if loop is None:
            raise TransactionError(
                f"database {self.name!r} can only be used inside asyncio or trio, and none is running"
            )
        return self._make_pool(loop, None, self._pools, "")

    def _make_pool(self, loop: object | None, backend: Backend | None, pools: dict[int, Pool], suffix: str) -> Pool:
        ticket = object()
        settings.hold(ticket, self.name)
        try:
            if backend is None:
                self.resolve()
            engine, chosen, observer = self._resolved or self.resolve()
            logs.set_up(chosen.logging)
            key = id(loop)
            monitor = _monitor(chosen)

            def closed(pool: Pool) -> None:
                settings.release(ticket)
                if monitor is not None:
                    monitor.withdraw(pool)
                if pools.get(key) is pool:
                    del pools[key]
                if self.recent is pool:
                    self.recent = None
                if not self._pools:
                    self.statements.clear()  # the next configuration may give this name to another engine

            backend = backend or engine.backend(chosen, self.declared.adapters)
            watcher: Observer = observer
            instrumentation = logs.instrumentation
            if instrumentation is not None:
                watcher = instrumentation.observe(self.name, engine.name, backend.description, observer)
            pool = Pool(
                backend,
                create_waker(),
                watcher,
                name=f"{self.name}{suffix}",
                size=chosen.pool_size,
                timeout=chosen.pool_timeout,
                long_read=chosen.logging.long_read_s,
                inline_reads=getattr(chosen, "inline_reads", False),
                on_closed=closed,
            )
            if instrumentation is not None:
                instrumentation.opened(pool)
        except BaseException:
            settings.release(ticket)
            raise
        pools[key] = pool
        configuration = settings.current()
        if configuration.patterns and (pattern := configuration.pattern_of(self.name, engine.name)) is not None:
            from database.session import tenants  # noqa: PLC0415  - few programs have any

            tenants.admit(pool, pattern, chosen.max_open)  # type: ignore[attr-defined]
        if monitor is not None:
            monitor.offer(chosen.monitor, pool)  # type: ignore[attr-defined]
        return pool


def _monitor(chosen: Settings) -> Any:
    """The module that offers a pool's statistics; None where nobody wants them, and then it is not even imported."""
    if getattr(chosen, "monitor", None) is None:
        return None
    from database.driver import monitor  # noqa: PLC0415  - most processes are not watched

    return monitor
