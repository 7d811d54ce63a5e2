"""One piece of work for a worker, and the place where its outcome is put."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextvars import copy_context
from enum import IntEnum
from typing import Any, Final, Protocol

from database.engine.contract import Operation
from database.engine.statement import Statement

__all__ = [
    "ALONE",
    "COMMIT",
    "LEASE",
    "MANY",
    "ROLLBACK",
    "SCRIPT",
    "STATEMENT",
    "UNIT",
    "Control",
    "Home",
    "Kind",
    "Request",
    "taken_from",
    "text_of",
]


class Kind(IntEnum):
    """How a request has to be run. The order matters: up to `UNIT`, requests may share a commit."""

    STATEMENT = 0
    """A single statement, atomic by itself."""
    UNIT = 1
    """Several statements as one: a function of the user's, which needs a savepoint or a transaction around it."""
    MANY = 2
    """Like UNIT, but long: it gets a transaction of its own, so that it holds nobody else's answer back."""
    ALONE = 3
    """A statement that may not run in a transaction (VACUUM, most PRAGMAs), or that should not (DDL)."""
    SCRIPT = 4
    """Several statements in one text, run one after the other as they come; never run again."""
    COMMIT = 5
    ROLLBACK = 6
    LEASE = 7
    """No request: what a `Lease` is, which stands in line with them."""


# The hot path compares these by value; looking an enum's member up would cost as much as the comparison.
STATEMENT: Final = 0
UNIT: Final = 1
MANY: Final = 2
ALONE: Final = 3
SCRIPT: Final = 4
COMMIT: Final = 5
ROLLBACK: Final = 6
LEASE: Final = 7

Control = tuple[str, Any]
"""A connection's method and its argument, to be called before the request: `("savepoint", 1)`."""


class Home(Protocol):
    """Where a request waits to be run."""

    def withdraw(self, request: Request) -> bool:
        """Takes a request back; False if it runs, or has run, already. Loop thread."""
        ...

    def stop(self, request: Request) -> None:
        """Has a running request stopped, and returns at once. Loop thread."""
        ...


class Request:
    """What is to be run, and how it went.

    The loop's thread fills in the upper half and hands the request over; from then until the answer is delivered
    the lower half belongs to the worker, but for `cancelled`, which only the loop's thread sets and only the
    worker heeds, and `waiter`, which workers never touch. `trace` is unset unless an observer sets it.
    """

    trace: Any

    __slots__ = (
        "answered",
        "cancelled",
        "context",
        "controls",
        "error",
        "extra",
        "home",
        "kind",
        "label",
        "operation",
        "params",
        "queued_at",
        "result",
        "subject",
        "trace",
        "waiter",
    )

    def __init__(
        self,
        kind: int,
        operation: Operation | None,
        subject: Any = None,
        params: Any = None,
        extra: Any = None,
        label: object = None,
    ) -> None:
        self.kind = kind
        self.operation = operation
        self.subject = subject
        """What the operation is about: mostly an analysed statement; a function, a job, rows, a script."""
        self.params = params
        self.extra = extra
        self.label = label
        self.controls: Sequence[Control] | None = None
        self.home: Home | None = None
        self.queued_at: float
        """Set where it is queued."""
        self.waiter: Any = None
        self.context: Any = copy_context()
        """A copy of the caller's, in which everything of the user's is called: functions, handlers. None once answered."""

        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled = self.answered = False

    def __await__(self) -> Generator[Any, Any, Any]:
        """Waits for the answer, once: gives the result or raises the error. Each event loop has its own way."""
        raise NotImplementedError


def text_of(request: Request) -> str:
    """What is to be run, for messages: a statement's text, or else the name of the work."""
    statement = request.subject
    return statement.sql if isinstance(statement, Statement) else str(request.label or statement)


def taken_from(queue: deque[Any], request: Request) -> bool:
    """Takes a request back that nobody has begun; False if it is not in the queue any more. `remove` is atomic."""
    try:
        queue.remove(request)
    except ValueError:
        return False
    return True
