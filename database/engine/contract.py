"""What an engine fills in, so that the pool can run any database.

An `Engine` is what the parts that know no engine ask: how SQL text is analysed, which operations there are.
A `Connection` is one connection together with what its thread knows of it; every method of it but `interrupt` is
called on the thread that opened it. A `Backend` opens connections and carries the few figures the pool needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, cast

from database.engine.statement import Statement

__all__ = [
    "BLOCKING",
    "READABLE",
    "WRITABLE",
    "Alone",
    "Backend",
    "Connection",
    "Engine",
    "Interrupted",
    "Log",
    "Migrations",
    "Operation",
    "Role",
    "Stepping",
    "Steps",
    "load",
]

Role = str
"""`"reader"` or `"writer"`; `"shared"` where all connections do both."""

Operation = Callable[[Any, Any, Any, Any], Any]
"""`(connection, statement, parameters, extra) -> result`, run on the connection's own thread."""


Steps = Generator[int, None, Any]
"""Work that is waited for between its steps, by whichever thread: each step says what has to come before the next."""

READABLE: Final = 1
"""The connection's socket has something to be read."""
WRITABLE: Final = 2
"""It takes more."""
BLOCKING: Final = 4
"""Nothing; but the next step may take its time, so it is not one for an event loop's thread."""


class Interrupted(Exception):
    """A step was given up because its caller no longer waits for it."""


class Alone(BaseException):
    """A member of a group wants to commit by itself; it is undone, and run again in a transaction of its own.

    Not an `Exception`, for it passes through a function of the user's.
    """


class Connection(Protocol):
    """One connection, on its own thread."""

    @property
    def raw(self) -> Any:
        """The raw connection, sqlite3's or psycopg's own, which `db.run` hands to the user's function."""
        ...

    plain: bool
    """Whether a statement of plain values calls nothing of the user's, and logs nothing: no function that he registered."""

    patiently: Callable[[Callable[[], None]], None] | None
    """Runs a step of a script again and again while somebody else holds a lock. Set by who runs it, where there is
    `Backend.excludes`: the connection itself cannot know that a lock is this process's own."""

    @property
    def in_transaction(self) -> bool:
        """Whether the *database* says that a transaction is open; it can end one by itself."""
        ...

    def try_lock(self, seconds: float) -> bool:
        """Takes the process-wide right to write, waiting that long at the most; True if there is nothing to take."""
        ...

    def unlock(self) -> None:
        """Gives the right to write back; nothing happens where it is not held."""
        ...

    def begin(self, *, readonly: bool) -> None:
        """Opens a transaction. A writing one takes the write lock now; a read-only one pins its snapshot."""
        ...

    def commit(self) -> None:
        """Commits the open transaction."""
        ...

    def rollback(self) -> None:
        """Rolls the open transaction back; without one, does nothing."""
        ...

    def savepoint(self, number: int) -> None:
        """Opens nesting level `number`."""
        ...

    def release(self, number: int) -> None:
        """Keeps what level `number` did."""
        ...

    def undo(self, number: int) -> None:
        """Undoes what level `number` did, and closes it."""
        ...

    def isolation(self, level: str) -> None:
        """Sets the isolation of the transaction that has just been begun: a level of the SQL standard, in capitals."""
        ...

    def restrict(self, readonly: bool) -> None:
        """Refuses writes from now on, or admits them again."""
        ...

    def share(self, shared: bool) -> None:
        """From now on several callers' statements share the open transaction, each with its own verdict; or no longer."""
        ...

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """Maps an error of sqlite3's or psycopg's to the package's; gives other exceptions back as they are.

        `sql` is None where the error comes out of a function of the user's.
        """
        ...

    def interrupt(self) -> None:
        """Stops the running statement. Called from any thread, while a statement of the victim's runs."""
        ...

    def close(self) -> None:
        """Closes the connection. The writer is closed last."""
        ...

    def disown(self) -> None:
        """In a forked child: the connection is the parent's, and in use there. It is never touched again."""
        ...


class Stepping(Connection, Protocol):
    """A connection to a server, whose statements can be gone through step by step. See `Backend.steps`.

    One thread at a time: who has it is for the driver to see to.
    """

    @property
    def descriptor(self) -> int:
        """Its socket."""
        ...

    def begin_unless(self, *, readonly: bool) -> bool:
        """Opens a transaction, unless something would have to be waited for; whether it did."""
        ...

    def steps(self, operation: Operation | None, statement: Any, params: Any, extra: Any) -> Steps | None:
        """A statement in steps, none of which calls code of the user's; None where it has to be run as a whole."""
        ...

    def committing(self) -> Steps:
        """`commit` in steps."""
        ...

    def walk(self, steps: Steps, wanted: int = BLOCKING) -> Any:
        """Goes through all that is left, on the connection's own thread, and gives the result.

        `wanted` is what the last step was to be followed by.
        """
        ...


@dataclass(frozen=True, slots=True)
class Log:
    """A write-ahead log that grows while anybody reads from it.

    Attributes:
        limit: Bytes from which on the pool makes room in it.
        size: Its length in bytes. Any thread.
        empty: Empties it, given the writer's connection, which must be outside any transaction; False if somebody still
            reads from it.
    """

    limit: int
    size: Callable[[], int]
    empty: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Backend:
    """How to reach one database.

    Attributes:
        description: The database's name for messages, without secrets.
        connect: Opens a connection; called on the thread that is to own it. The callable it is given is the connection's
            progress handler: to be called now and then while a statement runs; if it returns true, the statement is
            to be stopped.
        is_busy: Whether an error means that somebody else holds a lock, and that trying again can help.
        is_broken: Whether the connection that raised this error is to be replaced.
        busy_timeout: Seconds to wait for another process's lock.
        busy_slice: Of these, the seconds for which a single try waits by itself.
        dispose: Called once after the last connection has been closed.
        gauges: What can be measured of the database from outside, by name (`"wal.size"` in bytes). Any thread may call.
        log: The write-ahead log, if the pool is to keep it short.
        files: What it has open, in whatever form the engine knows it: pools that have something in common share locks and
            a log. Any thread may call.
        excludes: Where readers and the writer exclude one another (SQLite without a WAL): whether a connection keeps a lock
            just now. None where they do not.
        max_idle: Seconds after which a connection that nobody uses is closed, as long as there are others; 0: never.
        as_is: Whether its operations know `adapting.AS_IS`.
        single_writer: Whether one connection does all writing and the others only read. If not, `pool_size` connections
            do both, and whoever needs one takes any.
        steps: Whether its connections are `Stepping`, so that a transaction's statements can be sent and received by the event
            loop's thread, which waits for many sockets at once.
        may_join: Whether an autocommit statement may be sent together with others; None if the engine cannot do that.
        run_together: Executes such statements in one round trip, each its own transaction and its own success or failure.
            It is given the connection, the requests, and what to call before one's answer is waited for and when it is
            there (the error with it); it gives back those of which nothing has happened, to be run again, alone.
    """

    description: str
    connect: Callable[[Role, Callable[[], bool]], Connection]
    is_busy: Callable[[BaseException], bool]
    is_broken: Callable[[BaseException], bool]
    busy_timeout: float
    busy_slice: float = 0.0
    dispose: Callable[[], None] = lambda: None
    gauges: Callable[[], dict[str, float]] = dict
    log: Log | None = None
    files: Callable[[], frozenset[Any]] = frozenset
    excludes: Callable[[Any], bool] | None = None
    as_is: bool = False
    single_writer: bool = True
    max_idle: float = 0.0
    steps: bool = False
    may_join: Callable[[Any], bool] | None = None
    run_together: (
        Callable[[Any, list[Any], Callable[[Any], None], Callable[[Any, BaseException | None], None]], list[Any]] | None
    ) = None


class Migrations(NamedTuple):
    """An engine's operations for migrations. The connection's own thread."""

    migrate: Operation
    """Applies what is pending, given a `migrations.Order`; gives a `MigrationReport`."""
    applied: Operation
    """Gives the database's record: a tuple of `Applied`."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's side of the bargain.

    Attributes:
        name: The package below `database`.
        analyse: Analyses SQL text.
        control_error: The error for BEGIN, COMMIT and the like sent as SQL text, by their verb.
        connection: The connection class; its methods `execute`, `fetch_all`, … are what requests run.
        backend: Makes the backend from a database's settings, and from the functions that say how types of the
            user's are stored; of these, more may come later.
        adapter: aiosql's synchronous adapter for this engine.
        pins: What a snapshot that stays open holds back, for the log.
        migrations: Gives the operations for migrations, imported only then; None if it has none.
        replica_backend: As `backend`, for the database's replicas; None (or it gives None) where there are none.
    """

    name: str
    analyse: Callable[[str], Statement]
    control_error: Callable[[str], BaseException]
    connection: Any
    backend: Callable[[Any, Mapping[type, Callable[[Any], Any]]], Backend]
    adapter: Any
    pins: str
    migrations: Callable[[], Migrations] | None = None
    replica_backend: Callable[[Any, Mapping[type, Callable[[Any], Any]]], Backend | None] | None = None


def load(name: str) -> Engine:
    """Imports an engine when it is first needed."""
    return cast("Engine", importlib.import_module(f"database.{name}.engine").ENGINE)
