"""`offload=True`: a whole transaction function driven on the worker's thread, next to the connection.

The coroutine travels to the worker as one request, in a copy of its caller's context. There it is driven by a single
`send(None)`: calls of its own database never suspend (`Transaction.run_inline`), so it either finishes at once, or it has
awaited something that needs an event loop, and this thread has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

from database.driver.worker import here
from database.errors import TransactionError
from database.session.origin import Origin
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from database.driver.pool import Pool
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

    parent: Transaction | None = None
    """The level of its caller's transaction that it is part of, if one is open."""
    committed = False
    """Whether anything of it has been committed: all, or a part by itself; so that it may not be run again."""
    whole = False
    """Whether all of it has been, although its caller was cancelled; then `result` is what it returned."""
    result: Any = None
    kept: list[Callable[[], Any]] | None = None
    """Handed to `on_commit` in parts that it has committed by itself."""
    running = False
    """Whether it was still running when its cancelled caller went on."""
    isolation: str | None = None
    """Of the transaction that is begun for it, if one is."""
    outside = False
    """See `TimeLimit`."""

    def __init__(
        self, offloaded: Offloaded, args: tuple[Any, ...], kwargs: dict[str, Any], *, dooms: bool = False
    ) -> None:
        self.offloaded = offloaded
        self.args = args
        self.kwargs = kwargs
        self.dooms = dooms
        """Whether its failure is one of its caller's transaction (`required`)."""

    def __str__(self) -> str:
        return f"offloaded {self.offloaded.origin()}"

    @property
    def joins(self) -> bool:
        """See `TimeLimit`."""
        return self.dooms and self.parent is not None

    @property
    def function(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """What is called."""
        return self.offloaded.function

    def failed(self, request: Request, error: BaseException) -> list[Callable[[], Any]]:
        """It has failed, or its caller has been cancelled; gives what is to run all the same. Loop thread."""
        self.running = request.cancelled and not request.answered
        if self.parent is None and request.answered and request.error is None:
            self.whole = self.committed = True  # already when its caller was cancelled
            self.result, callbacks = request.result
            return list(callbacks)
        if self.parent is not None and self.dooms and not self.parent.ended:
            self.parent.dooms_the_whole(error)
        return self.kept or []

    @staticmethod
    def drive(session: Any, job: Job, _params: Any, pool: Pool) -> tuple[Any, list[Callable[[], Any]]]:
        """Runs the function to its end; gives its result and what it handed to `on_commit`. Worker's thread.

        Raises:
            TransactionError: It awaited something else than this database, or left its transaction unusable.
        """
        worker = here.worker
        assert worker is not None
        offloaded = job.offloaded
        database = offloaded.database
        parent = job.parent
        root = Transaction(database, pool, offloaded.origin, readonly=offloaded.readonly)
        root.session, root.worker, root.job = session, worker, job
        job.kept = None
        if job.isolation is not None:
            root.isolation = job.isolation
            worker.step(session, "isolation", job.isolation)
        restricted = False
        if parent is not None:
            root.joined = True
            restricted = offloaded.readonly and not parent.readonly
            if restricted:
                worker.step(session, "restrict", True)
        context = copy_context()  # of the request's, which is a copy of the caller's: it may have to be run again
        context.run(database.current.set, root)
        coroutine = offloaded.function(*job.args, **job.kwargs)
        returned = False
        try:
            context.run(coroutine.send, None)
        except StopIteration as stop:
            result = stop.value
            returned = True
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
            if restricted and not returned and worker.session is session:
                worker.step(session, "restrict", False)
        if restricted and worker.session is session:
            if root.doom is None and root.top is root:
                root.settle_inline()
            worker.step(session, "restrict", False)
        if root.doom is not None:
            raise root.refusal()
        if root.top is not root:
            raise TransactionError(f"the function returned with a nested level open, begun by {root.top.origin()}")
        root.settle_inline()
        kept = cast("list[Callable[[], Any]] | None", job.kept)  # set by `commit()` meanwhile
        return result, root.callbacks if kept is None else [*kept, *root.callbacks]


def _foreign(job: Job) -> TransactionError:
    name = getattr(job.function, "__qualname__", repr(job.function))
    return TransactionError(
        f"{name}() runs with offload=True, on the database's own thread, where only calls of database"
        f" {job.offloaded.database.name!r} may be awaited; it awaited something else, so it has been rolled back."
        " Await that outside, or leave offload=True away."
    )


_LOOPS = frozenset({"anyio", "asyncio", "sniffio", "trio", "uvloop"})

_COMPLAINTS = (
    "running event loop",
    "asynchronous event loop",
    "async context",
    "async library",
    "inside a task",
    "parent task",
)
"""What asyncio, trio, AnyIO and sniffio say where there is no event loop."""


def _wants_a_loop(error: Exception) -> bool:
    """Whether asyncio, trio or AnyIO complains that there is no event loop here.

    They do so in several ways, not all of them meant as a message: by a RuntimeError that says so, or by stumbling over
    the loop that is None. Everything else that comes out of their code (a full queue, say) is the function's own business.
    """
    if isinstance(error, RuntimeError) and str(error) == "no running event loop":
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))
    if module.partition(".")[0] not in _LOOPS:
        return False
    if isinstance(error, RuntimeError):
        return any(complaint in str(error) for complaint in _COMPLAINTS)
    return isinstance(error, AttributeError) and error.obj is None
