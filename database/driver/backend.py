"""What an engine fills in, so that the driver can run any database.

A `Session` is one connection together with what its thread knows of it; every method of it but `interrupt` is
called on the thread that opened it. A `Backend` opens sessions and carries the few figures the driver needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Alone", "Backend", "Interrupted", "Observer", "Role", "Session"]

Role = str
"""`"reader"` or `"writer"`."""

Operation = Callable[[Any, Any, Any, Any], Any]
"""`(session, statement, parameters, extra) -> result`, run on the session's own thread."""


class Interrupted(Exception):
    """A step was given up because its caller no longer waits for it."""


class Alone(BaseException):
    """A member of a group wants to commit by itself; it is undone, and run again in a transaction of its own.

    Not an `Exception`, for it passes through a function of the user's.
    """


class Session(Protocol):
    """One connection, on its own thread."""

    @property
    def raw(self) -> Any:
        """The driver's own connection, which `db.run` hands to the user's function."""
        ...

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

    def restrict(self, readonly: bool) -> None:
        """Refuses writes from now on, or admits them again."""
        ...

    def translate(self, error: BaseException, sql: Any, parameters: Any) -> BaseException:
        """Maps the driver's error to the package's; gives other exceptions back as they are.

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


class Observer(Protocol):
    """Hears of statements and transactions, on the worker's thread. Must neither raise nor block for long."""

    def threshold(self) -> float | None:
        """Seconds from which a statement is reported; 0 for all, None for none. Asked once a batch."""
        ...

    def statement(self, request: Any, seconds: float, worker: str) -> None:
        """One statement was executed (or failed)."""
        ...

    def transaction(self, lease: Any, outcome: str, seconds: float) -> None:
        """A transaction was committed or rolled back."""
        ...

    def long_read(self, holder: str, seconds: float) -> None:
        """Somebody has been reading for so long that the WAL cannot be reset. Loop thread."""
        ...

    def lost(self, where: str) -> None:
        """A stream or a transaction was thrown away open. Loop thread."""
        ...

    def failure(self, error: BaseException) -> None:
        """An error is about to be raised to a caller."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """How to reach one database.

    Attributes:
        description: The database's name for messages, without secrets.
        connect: Opens a session; called on the thread that is to own it. The callable it is given is the session's
            progress handler: to be called now and then while a statement runs; if it returns true, the statement is
            to be stopped.
        is_busy: Whether an error means that somebody else holds a lock, and that trying again can help.
        is_broken: Whether the connection that raised this error is to be replaced.
        busy_timeout: Seconds to wait for another process's lock.
        dispose: Called once after the last connection has been closed.
    """

    description: str
    connect: Callable[[Role, Callable[[], bool]], Session]
    is_busy: Callable[[BaseException], bool]
    is_broken: Callable[[BaseException], bool]
    busy_timeout: float
    dispose: Callable[[], None] = lambda: None
