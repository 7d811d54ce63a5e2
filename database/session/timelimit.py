"""`timeout=`: how long a whole transaction may take, and what is said when it takes longer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import anyio

from database.driver.lease import Lease
from database.driver.request import ROLLBACK, Request
from database.errors import TransactionTimeoutError
from database.session.origin import Origin
from database.session.transaction import Transaction

__all__ = ["Bounded", "TimeLimit"]


class TimeLimit:
    """Bounds a whole transaction; a commit that has begun is not interrupted.

    Raises `TransactionTimeoutError` in `stop`, saying what the time was spent on.
    """

    __slots__ = ("_bounded", "_origin", "_scope", "_seconds", "result")

    def __init__(self, seconds: float, origin: Origin) -> None:
        self._seconds = seconds
        self._origin = origin
        self._scope = anyio.move_on_after(seconds)
        self._bounded: list[Bounded] = []
        self.result: Any = None
        """What the function has returned."""

    def start(self) -> None:
        """The clock runs from here."""
        self._scope.__enter__()

    def finishing(self, levels: Iterable[object], result: Any = None) -> None:
        """The function has returned; what is left to be done is to commit these."""
        self._bounded = [level for level in levels if isinstance(level, Transaction) and level.parent is None]
        self.result = result

    def offloading(self, job: Bounded) -> None:
        """The function is on its way to the database's thread."""
        self._bounded = [job]

    def stop(self, error: BaseException | None) -> bool:
        """The transaction is over, with or without an error.

        Returns:
            Whether the error was only that time ran out during the commit, and that went through.
        """
        swallowed = self._scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        if swallowed and error is not None:  # trio's scope says so without an error as well
            committed = [each for each in self._bounded if each.whole]
            if committed and len(committed) == len(self._bounded):
                self.result = getattr(committed[0], "result", self.result)
                return True
            running = any(getattr(each, "running", False) for each in self._bounded)
            outcome = "is being rolled back, unless its commit had begun" if running else "has been rolled back"
            raise TransactionTimeoutError(
                f"the transaction begun by {self._origin()} took longer than its timeout of {self._seconds:g} s and"
                f" {outcome}; it was {_doing(error)}"
            ) from error
        return False


class Bounded(Protocol):
    """What a time limit bounds."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been committed."""
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
                    what = str(request.label or getattr(request.sql, "sql", request.sql))
                    home = request.home
                    waiting = isinstance(home, Lease) and home.worker is None
                    return f"{'waiting for a connection to execute' if waiting else 'executing'}: {what[:200]}"
                rolling_back = True
            place = f"{code.co_qualname} ({code.co_filename}:{traceback.tb_lineno})"
            traceback = traceback.tb_next
        error = error.__context__ if rolling_back else None
    return f"outside the database, in {place}"
