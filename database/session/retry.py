"""`retries`: what may be run again, for it has certainly left nothing behind.

Running a function again is right only if all that its first run did has been undone. Its own transaction was; but it may
have written outside of that: statement by statement, where it has no transaction (`supports`), in a transaction of its own
on this or another database, or into one that its caller has open elsewhere. So while an attempt is under way, each write
that does not belong to a transaction begun in it is noted, with its request, which knows in the end whether it failed.

`attempts` is empty in programs that do not use `retries`, and is what everybody else looks at first. The attempt itself
travels in a context variable, so that tasks started inside count as well. Loop thread; several loops may each have theirs.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Final, Protocol

from database.driver.request import ALONE, SCRIPT, STATEMENT, Request
from database.errors import ConnectionPoolExhaustedError, DatabaseBusyError, QueryExecutionError, TransactionError

__all__ = ["Attempt", "attempts", "is_passing", "is_unknown", "leave_behind", "note"]


class Begun(Protocol):
    """What an attempt has begun: a level of a transaction, or a call of an offloaded function."""

    @property
    def parent(self) -> object | None:
        """What it is a part of, if it is no transaction of its own."""
        ...

    @property
    def committed(self) -> bool:
        """Whether anything of it has been made permanent."""
        ...


class Attempt:
    """One run of a function that may be run again. `with` it."""

    __slots__ = ("_left", "_levels", "_outer", "_sent", "_token")

    def __init__(self) -> None:
        self._outer = _current.get()
        self._levels: list[Begun] = []
        self._sent: list[Request] = []
        self._left = False
        self._token: Token[Attempt | None] | None = None

    def __enter__(self) -> Attempt:
        self._token = _current.set(self)
        attempts.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        attempts.discard(self)
        assert self._token is not None
        try:
            _current.reset(self._token)
        except ValueError:  # thrown away, and closed in a context of somebody else's
            pass

    def begun(self, level: Begun) -> None:
        """The function runs in this."""
        self._levels.append(level)

    def may_be_repeated(self) -> bool:
        """Whether it has certainly left nothing behind.

        Within an outer transaction, only the whole of that could be run again.
        """
        if self._left or any(level.parent is not None or level.committed for level in self._levels):
            return False
        return not any(map(_may_have_left, self._sent))

    def note(self, request: Request, own: Attempt | None) -> None:
        """Notes a request for this attempt and those around it; see `note`."""
        attempt: Attempt | None = self
        while attempt is not None and attempt is not own:
            if not attempt._left:
                attempt._sent.append(request)
            attempt = attempt._outer

    def leave_behind(self, own: Attempt | None) -> None:
        """See `leave_behind`."""
        attempt: Attempt | None = self
        while attempt is not None and attempt is not own:
            attempt._left = True
            attempt._sent.clear()
            attempt = attempt._outer


attempts: Final[set[Attempt]] = set()
"""Those under way, of all event loops."""

_current: ContextVar[Attempt | None] = ContextVar("database attempt", default=None)


def current() -> Attempt | None:
    """The attempt that the caller is part of."""
    return _current.get()


def note(request: Request, own: Attempt | None = None) -> None:
    """A write is about to be sent. `own` is the attempt in which its transaction was begun, if it is in one."""
    attempt = _current.get()
    if attempt is not None:
        attempt.note(request, own)


def leave_behind(own: Attempt | None = None) -> None:
    """Something has been done that no rollback within an attempt, up to `own`, undoes."""
    attempt = _current.get()
    if attempt is not None:
        attempt.leave_behind(own)


def _may_have_left(request: Request) -> bool:
    """Whether a request may have changed something, as far as its outcome tells."""
    error: Any = request.error
    if error is None or request.kind == SCRIPT or getattr(request.label, "committed", False):
        return True
    if is_unknown(error) or getattr(error, "outcome", None) == "done":
        return True
    if request.kind == STATEMENT or request.kind == ALONE:
        # Of others nobody knows: interrupted while it was committed; or done, and only its rows could not be converted.
        return not isinstance(error, (QueryExecutionError, ConnectionPoolExhaustedError))
    return False


def is_passing(error: BaseException) -> bool:
    """Whether the reason may be gone the next time, also where it made the whole transaction impossible.

    It is somebody else's lock, or the connection was lost before anything could be committed.
    """
    cause: BaseException | None = error
    while isinstance(cause, TransactionError):
        cause = cause.__cause__
    return isinstance(cause, DatabaseBusyError) or getattr(cause, "outcome", None) == "undone"


def is_unknown(error: BaseException) -> bool:
    """Whether the connection was lost at a moment in which something may have been committed."""
    return getattr(error, "outcome", None) == "unknown"
