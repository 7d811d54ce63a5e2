"""Who hears of what a pool does: statements, transactions, errors, waits."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from typing import Any, Protocol

__all__ = ["LOGGED", "Observer", "aside"]

LOGGED = 0.001
"""A threshold (seconds) below which statements are logged one by one, and so not run on the event loop's thread."""


class Observer(Protocol):
    """Hears of statements and transactions, on a worker's thread, or on one of its own: never on the event loop's.

    It must not raise, and while it blocks, the connection does.
    """

    @property
    def slow_transaction(self) -> float | None:
        """Seconds from which a transaction that keeps others waiting is reported while it does so; None: never."""
        ...

    def threshold(self) -> float | None:
        """Seconds from which a statement is reported; 0 for all, None for none. Asked once a batch."""
        ...

    def statement(self, request: Any, seconds: float, worker: str) -> None:
        """One statement was executed (or failed)."""
        ...

    def hears_of(self, seconds: float) -> bool:
        """Whether a transaction that took so long is to be told of. Asked at the end of each."""
        ...

    def transaction(self, lease: Any, outcome: str, seconds: float) -> None:
        """A transaction was committed or rolled back."""
        ...

    def long_read(self, holder: str, seconds: float) -> None:
        """Somebody has been reading for so long that the WAL cannot be reset."""
        ...

    def lost(self, where: str) -> None:
        """A stream or a transaction was thrown away open."""
        ...

    def committed(self, size: int) -> None:
        """One COMMIT has succeeded, which held that many writes or units of work. Only where `threshold()` is a number."""
        ...

    def holding(self, holder: str, number: int | None, *, readonly: bool, seconds: float, waiting: int) -> None:
        """A connection has been held for that long, and others wait for it. Reported once.

        Args:
            holder: Who holds it, since where.
            number: The transaction's number; None for a single unit of work.
            readonly: Whether it is a reader.
            seconds: For how long, at the least.
            waiting: How many others wait.
        """
        ...

    def failure(self, error: BaseException) -> None:
        """An error is about to be raised to a caller."""
        ...


def aside(function: Callable[[], None]) -> None:
    """Runs what may have to wait (a log handler) on a thread of its own, for an event loop must not. Any thread.

    In the context of the caller, as it would be run here.
    """
    try:
        Thread(target=copy_context().run, args=(function,), name="database-log", daemon=True).start()
    except RuntimeError:  # the interpreter is about to end
        function()
