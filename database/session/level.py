"""Where a task stands: what the context variable of a database holds, and the way back when that is over.

The current level follows the task, and tasks that are started inside take part in it. It is a `Transaction`, or the
`Detached` that stands for "no transaction" (`with db.detached()`), or None: the task has never entered one.

Who is where. The context variable may be left standing at a level that is over: a generator that held it was closed by
another task, by the collector, or in another order than it was opened. The task that had begun that level is then back
at the level around it (`step_back`), found when it next asks. A task that was only started inside stays where it is, and
is told that the transaction has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from database.driver.wakeup import current_task
from database.session.generators import around, watch
from database.session.origin import Origin

if TYPE_CHECKING:
    from database.engine.contract import Connection, Operation
    from database.engine.statement import Statement

__all__ = ["Current", "Detached", "Level", "detached", "step_back", "step_out"]


class Level:
    """What a task may be in."""

    __slots__ = ()

    connection: Connection | None = None
    """Set where this is an offloaded function's: it runs next to this connection, on its thread."""

    around: Level | None
    """Where the task that began this is when it is over."""
    ended: bool
    origin: Origin
    watched: tuple[Any, ...]
    """Looks after the generators that it was begun in."""

    def left(self) -> None:
        """A generator that holds this has been left: it is over. Any thread."""
        raise NotImplementedError

    def execute_here(self, operation: Operation, statement: Statement, params: Any, extra: Any) -> Any:
        """Executes a single statement right here. Only where there is a `connection`."""
        raise NotImplementedError


Current = ContextVar[Level | None]


class Detached(Level):
    """Stands in the context variable for "no transaction", and remembers what was stepped out of."""

    __slots__ = ("__weakref__", "around", "ended", "origin", "watched")

    def __init__(self, around: Level | None) -> None:
        self.around = around
        self.ended = False
        self.watched: tuple[Any, ...] = ()
        self.origin = Origin("db.detached()")
        self.origin.set_task()

    def left(self) -> None:
        """See `Level`."""
        self.ended = True


def step_back(variable: Current, found: Level) -> Level | None:
    """Where a task is whose level is over: where this task had begun it, back at the one around it."""
    task = current_task()
    level: Level | None = found
    while level is not None and level.ended and level.origin.is_of(task):
        level = level.around
    if level is not found:
        variable.set(level)
    return level


def step_out(level: Level, token: Any) -> None:
    """Puts the task back to where it was, unless it is somewhere else by now: `step_back` sees to the rest."""
    if token.var.get() is level:
        try:
            token.var.reset(token)
        except ValueError:  # ended in another context than it was begun in (a fixture, a generator)
            pass


@contextmanager
def detached(variable: Current, *, of_user: bool = False) -> Generator[None, None, None]:
    """Steps outside the current transaction; where it is the user's, no longer than the async generators that he does so in."""
    found = variable.get()
    if found is not None and found.ended:
        found = step_back(variable, found)
    outside = Detached(found)
    if of_user and (generators := around(sys._getframe(1))):  # pyright: ignore[reportPrivateUsage]
        watch(outside, generators)
        generators = ()
    token = variable.set(outside)
    try:
        yield
    finally:
        outside.ended = True
        step_out(outside, token)
