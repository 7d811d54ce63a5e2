"""`timeout=`: how long a whole transaction may take, and what is said when it takes longer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, Protocol

import anyio

from database.driver.lease import Lease
from database.driver.request import ROLLBACK, Request
from database.driver.wakeup import current_loop
from database.errors import TransactionTimeoutError
from database.session.origin import Origin

__all__ = ["Bounded", "TimeLimit"]


class TimeLimit:
    """Bounds a whole transaction, however often it is run; a commit that has begun is not interrupted.

    Raises `TransactionTimeoutError` in `stop`, saying what the time was spent on. On a worker's thread, inside an
    `offload=True` function, nothing can be cut short: there the time is looked at when the function has returned.
    """

    __slots__ = ("_bounded", "_deadline", "_origin", "_paused_at", "_scope", "_seconds", "callbacks", "result")

    def __init__(self, seconds: float, origin: Origin) -> None:
        self._seconds = seconds
        self._origin = origin
        self._scope: anyio.CancelScope | None = None
        self._deadline = 0.0
        self._paused_at = 0.0
        self._bounded: list[Bounded] = []
        self.result: Any = None
        """What the function has returned."""
        self.callbacks: list[Callable[[], Any]] = []
        """What is to run behind the commit, when the clock has been stopped."""

    def start(self) -> None:
        """The clock runs from here."""
        if current_loop() is None:
            self._deadline = perf_counter() + self._seconds
        else:
            self._scope = anyio.move_on_after(self._seconds)
            self._scope.__enter__()

    def bound(self, *bounded: Bounded) -> None:
        """What it bounds from now on: what the function runs in, or the call that is on its way to the worker."""
        self._bounded = list(bounded)

    def finishing(self, result: Any = None) -> None:
        """The function has returned; what is left to be done is to commit.

        Raises:
            TransactionTimeoutError: On a worker's thread: it took too long.
        """
        self.result = result
        if self._scope is None and perf_counter() > self._deadline:
            raise self._exceeded("in the function itself")

    def pause(self) -> None:
        """The clock stands still."""
        scope = self._scope
        assert scope is not None  # only the loop pauses
        self._deadline, self._paused_at = scope.deadline, anyio.current_time()
        scope.deadline = math.inf

    def go_on(self) -> None:
        """It runs again."""
        assert self._scope is not None
        self._scope.deadline = self._deadline + anyio.current_time() - self._paused_at

    def stop(self, error: BaseException | None) -> bool:
        """The transaction is over, with or without an error.

        Returns:
            Whether the error was only that time ran out during the commit, and that went through.
        """
        if self._scope is None:
            return False
        swallowed = self._scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        if swallowed and error is not None:  # trio's scope says so without an error as well
            if self._bounded and all(each.whole for each in self._bounded):
                self.result = getattr(self._bounded[0], "result", self.result)
                return True
            raise self._exceeded(_doing(error)) from error
        return False

    def left(self) -> None:
        """The generator that the clock runs in has been left: it stops, here, in the task that iterated over that."""
        scope, self._scope = self._scope, None
        if scope is not None:
            with suppress(RuntimeError):  # found by the collector, at another place
                scope.__exit__(None, None, None)

    def _exceeded(self, doing: str) -> TransactionTimeoutError:
        return TransactionTimeoutError(
            f"the transaction begun by {self._origin()} took longer than its timeout of {self._seconds:g} s and"
            f" {self._outcome()}; it was {doing}"
        )

    def _outcome(self) -> str:
        bounded = self._bounded
        committed = any(each.committed for each in bounded)
        if any(getattr(each, "running", False) for each in bounded):
            what = "what it had not yet made permanent by commit() " if committed else ""
            return f"{what}is being rolled back, unless its commit had begun"
        if committed:
            return "what it had not yet made permanent by commit() has been rolled back"
        if any(each.outside for each in bounded):
            return "was stopped; no transaction was open around it, so what its statements had done is kept"
        if any(each.joins for each in bounded):
            return "was stopped; the transaction that it takes part in can only be rolled back"
        return "has been rolled back"


class Bounded(Protocol):
    """What a time limit bounds."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been committed."""
        ...

    @property
    def committed(self) -> bool:
        """Whether anything of it has been."""
        ...

    @property
    def outside(self) -> bool:
        """Whether it stands for "no transaction"."""
        ...

    @property
    def joins(self) -> bool:
        """Whether it is part of a transaction of its caller's, and can be undone only with that."""
        ...


def _doing(error: BaseException | None) -> str:
    """Where a cancellation struck, told from the innermost frames of its traceback.

    The rollback that it led to is cancelled as well; what was going on before that is in the error's context.
    """
    place = "the function itself"
    while error is not None:
        rolling_back = False
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            found = traceback.tb_frame.f_locals
            request = found.get("request", found.get("self"))  # a request is what is awaited
            if isinstance(request, Request):
                if request.kind != ROLLBACK:
                    what = str(request.label or getattr(request.subject, "sql", request.subject))
                    home = request.home
                    waiting = isinstance(home, Lease) and home.worker is None
                    return f"{'waiting for a connection to execute' if waiting else 'executing'}: {what[:200]}"
                rolling_back = True
            place = f"{code.co_qualname} ({code.co_filename}:{traceback.tb_lineno})"
            traceback = traceback.tb_next
        error = error.__context__ if rolling_back else None
    return f"outside the database, in {place}"
