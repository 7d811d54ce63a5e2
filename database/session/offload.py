"""`offload=True`: a whole transaction function driven on the worker's thread, next to the connection.

The coroutine travels to the worker as one request, in a copy of its caller's context. There it is driven by a single
`send(None)`: calls of its own database never suspend (`Transaction.run_inline`), so it either finishes at once, or it has
awaited something that needs an event loop, and this thread has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio

from database.driver.worker import here
from database.errors import TransactionError
from database.session.origin import Origin
from database.session.transaction import Transaction, run_callbacks

if TYPE_CHECKING:
    from database.driver.request import Request
    from database.session.database import Database

__all__ = ["Job", "Offloaded"]


class Offloaded:
    """A decorated function: what is the same for all its calls."""

    __slots__ = ("database", "function", "origin", "readonly")

    def __init__(
        self,
        database: Database,
        function: Callable[..., Coroutine[Any, Any, Any]],
        origin: Origin,
        *,
        readonly: bool,
    ) -> None:
        self.database = database
        self.function = function
        self.origin = origin
        self.readonly = readonly


class Job:
    """One call, to be driven. It can be driven again: the group it was part of may have been rolled back.

    What is seldom set has its value in the class: one of these is made for every call.
    """

    parent = None
    committed = False
    """Whether it has committed a part of its work by itself, so that it may not be run again."""
    whole = False
    """Whether it has been committed although its caller was cancelled; then `result` is what it returned."""
    result: Any = None
    running = False
    """Whether it was still running when its cancelled caller went on."""
    isolation: str | None = None
    """Of the transaction that is begun for it, if one is."""

    def __init__(self, offloaded: Offloaded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.offloaded = offloaded
        self.args = args
        self.kwargs = kwargs
        self.context = copy_context()

    def __str__(self) -> str:
        return f"offloaded {self.offloaded.origin()}"

    @property
    def function(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """What is called."""
        return self.offloaded.function

    async def called_off(self, request: Request, *, alone: bool) -> None:
        """Its caller has been cancelled.

        Args:
            request: What it travelled in.
            alone: Whether it was a transaction of its own, not a part of its caller's.
        """
        self.running = request.cancelled and not request.answered
        if alone and request.answered and request.error is None:
            # Committed already: those who wait for the commit are told.
            self.whole = True
            self.result, callbacks = request.result
            with anyio.CancelScope(shield=True):
                await run_callbacks(callbacks)

    @staticmethod
    def drive(session: Any, job: Job, _params: Any, _extra: Any) -> tuple[Any, list[Callable[[], Any]]]:
        """Runs the function to its end; gives its result and what it handed to `on_commit`. Worker's thread.

        Raises:
            TransactionError: It awaited something else than this database, or left its transaction unusable.
        """
        worker = here.worker
        assert worker is not None
        offloaded = job.offloaded
        database = offloaded.database
        root = Transaction(database, worker.pool, offloaded.origin, readonly=offloaded.readonly)
        root.session, root.worker = session, worker
        if job.isolation is not None:
            root.isolation = job.isolation
            worker.step(session, "isolation", job.isolation)
        context = job.context.copy()
        context.run(database.current.set, root)
        coroutine = offloaded.function(*job.args, **job.kwargs)
        try:
            context.run(coroutine.send, None)
        except StopIteration as stop:
            result = stop.value
        except Exception as error:
            if _wants_a_loop(error):
                raise _foreign(job) from error
            raise
        else:
            foreign = _foreign(job)
            with contextlib.suppress(BaseException):
                context.run(coroutine.throw, foreign)  # its own `finally` blocks run; what they do is rolled back
            with contextlib.suppress(BaseException):
                coroutine.close()
            raise foreign
        finally:
            root.ended = True
            if root.committed:
                job.committed = True
        if root.doom is not None:
            raise TransactionError(root.doom)
        if root.top is not root:
            raise TransactionError(f"the function returned with a nested level open, begun by {root.top.origin()}")
        for method, argument in root.controls:
            worker.step(session, method, argument)
        return result, root.callbacks


def _foreign(job: Job) -> TransactionError:
    name = getattr(job.function, "__qualname__", repr(job.function))
    return TransactionError(
        f"{name}() runs with offload=True, on the database's own thread, where only calls of database"
        f" {job.offloaded.database.name!r} may be awaited; it awaited something else, so it has been rolled back."
        " Await that outside, or leave offload=True away."
    )


_LOOPS = frozenset({"anyio", "asyncio", "sniffio", "trio", "uvloop"})


def _wants_a_loop(error: Exception) -> bool:
    """Whether asyncio, trio or AnyIO complains that there is no event loop here.

    They do so in many ways, by no means all of them meant as a message; but the error is always raised in their code.
    """
    if isinstance(error, RuntimeError) and "event loop" in str(error):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in _LOOPS
