"""`offload=True`: a whole transaction function driven on the worker's thread, next to the connection.

The coroutine travels to the worker as one request, in a copy of its caller's context. There it is driven by a single
`send(None)`: calls of its own database never suspend (`OffloadedTransaction.run`), so it either finishes at once, or it
has awaited something that needs an event loop, and this thread has none.

Threads. `Job.drive` and all of `OffloadedTransaction` are the worker's; but the context variable goes wherever contexts
are copied to, so each way in asks whether it is there. The rest is the loop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from sys import modules
from typing import TYPE_CHECKING, Any

from database.driver.request import MANY, STATEMENT, UNIT, Control, Request
from database.driver.wakeup import asyncio_loop, current_loop
from database.driver.worker import here
from database.engine.statement import READ
from database.errors import TransactionError
from database.session.binding import Binding
from database.session.callbacks import Callback
from database.session.level import Level, step_back
from database.session.origin import Origin
from database.session.propagation import (
    Options,
    reading_pool,
    refuse_isolation,
    refuse_writing_in_readonly,
    run_behind,
)
from database.session.retry import attempts
from database.session.sending import submit
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from database.driver.pool import Pool
    from database.driver.runner import Runner
    from database.engine.contract import Operation
    from database.engine.statement import Statement
    from database.session.timelimit import TimeLimit

__all__ = ["Job", "Offloaded", "offload", "send_job"]

BEGIN = "begin"
"""A control of a root that has committed a part of its work: the next one has to be begun first."""

UNITED = 1_000_000
"""The savepoint around several statements that the function sends as one: apart from the one (0) around the function,
which is to undo all of it whatever became of this one."""


class Offloaded:
    """A decorated function: what is the same for all its calls."""

    __slots__ = ("function", "origin", "readonly")

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], origin: Origin, *, readonly: bool) -> None:
        self.function = function
        self.origin = origin
        self.readonly = readonly


class OffloadedTransaction(Transaction):
    """A level of an offloaded function's transaction. It holds no lease: it runs in what its worker has begun."""

    job: Job | None = None
    """Of a root: the call of the function that runs in it."""
    joined = False
    """Of a root: whether it is part of its caller's transaction."""

    worker: Runner
    """Whose thread it runs on; set behind its making, as `connection` is."""

    @property
    def root(self) -> OffloadedTransaction:
        """The outermost level."""
        root = self._root or self
        assert isinstance(root, OffloadedTransaction)
        return root

    def nested(self, origin: Origin, *, readonly: bool, manual: bool) -> OffloadedTransaction:
        """Opens a level within this one."""
        level = OffloadedTransaction(self.binding, self.pool, origin, readonly=readonly, parent=self, manual=manual)
        level.worker, level.connection = self.worker, self.connection
        return level

    @property
    def is_elsewhere(self) -> bool:
        """Whether the caller runs on another thread than this does."""
        return here.worker is not self.worker

    def _belongs_elsewhere(self) -> TransactionError:
        return TransactionError(
            f"{self.origin()} runs with offload=True, on the database's own thread, and its transaction can be used"
            " there alone; nothing was sent from this other thread"
        )

    # Statements

    def execute_here(self, operation: Operation, statement: Statement, params: Any, extra: Any) -> Any:
        """Executes a single statement right here, next to the connection.

        The handle's methods ask for this by themselves: what comes through `send` has to be awaited, which takes longer.
        """
        root = self._root or self
        if self.readonly and statement.kind != READ:
            self.refuse_write(statement)
        worker = self.worker
        if self.ended or root.doom is not None or here.worker is not worker:
            raise self.refusal()
        current = worker.current
        if root.controls or worker.threshold is not None or current is None or current.cancelled:
            return self.root._run(self.pool.request(STATEMENT, operation, statement, params, extra))
        # Most statements: not even a request is made for them, unless they fail.
        worker.statements += 1
        try:
            return operation(self.connection, statement, params, extra)
        except BaseException as error:
            failure = worker.told(error, self.pool.request(STATEMENT, operation, statement, params, extra))
            self.root._survives(failure)
            raise failure from failure.__cause__

    def send(self, request: Request) -> Awaitable[Any]:
        """Executes a request; gives what its answer is to be awaited from."""
        self.check()
        request.result = self.root._run(request)
        request.answered = True
        return request

    async def run(self, request: Request, *, in_turn: bool = True) -> Any:
        """Executes a request within this level."""
        self.check()
        return self.root._run(request)

    def _run(self, request: Request) -> Any:
        """Of a root: executes a request right here, next to the connection."""
        united = request.kind == UNIT or request.kind == MANY
        self._steps(*self.controls, *([("savepoint", UNITED)] if united else ()))
        self.controls.clear()
        try:
            result = self.worker.run_inline(request)
        except BaseException as error:
            if self._survives(error) and united:
                self._steps(("undo", UNITED))
            raise
        if united:
            self._steps(("release", UNITED))
        return result

    def _survives(self, error: BaseException) -> bool:
        """Of a root: whether it is still there after an error."""
        connection = self.connection
        assert connection is not None
        if self.worker.connection is connection and connection.in_transaction:
            return True
        self.fail(f"the transaction has been rolled back after an error: {error}", error)
        return False

    def _steps(self, *steps: Control) -> None:
        """Opens and closes savepoints. Where that fails, nobody knows any more what a level would undo."""
        assert self.connection is not None
        for method, argument in steps:
            try:
                if method == BEGIN:
                    self.worker.begin_again(self.connection, readonly=self.readonly)
                else:
                    self.worker.step(self.connection, method, argument)
            except BaseException as error:
                self.fail(f"the transaction can only be rolled back after an error: {error}", error)
                raise

    # Ending

    def settle(self) -> None:
        """Of a root whose function has returned: sends what was to travel with the next statement."""
        controls, self.controls = self.controls, []
        self._steps(*controls)

    async def commit(self) -> None:
        """Makes permanent what was done so far; see `Transaction.commit`."""
        if self.parent is not None:
            await super().commit()
            return
        self.check()
        if self.top is not self:
            await self.take_turn()
        self._renew(keep=True)
        if self.job is not None and self.callbacks:  # to be run on the loop, when the function is over
            self.job.kept = [*(self.job.kept or ()), *self.callbacks]
            self.callbacks.clear()

    async def _roll_back_root(self) -> None:
        self._renew(keep=False)

    def _renew(self, *, keep: bool) -> None:
        """Of a root: commits or rolls back what there is; the next statement goes on in a new transaction."""
        worker, connection = self.worker, self.connection
        assert connection is not None
        if worker.current is not None and worker.current.cancelled:
            raise worker.called_off()
        if self.controls and self.controls[0][0] == BEGIN:  # nothing was executed since
            return
        if worker.connection is not connection or (worker.grouping and not connection.in_transaction):
            self.fail("the database has ended the transaction after an error; the function can only be left", None)
            raise self.refusal()
        if self.joined or (worker.grouping and not keep):  # there is a savepoint around the function
            steps: list[Control] = [*self.controls, ("release" if keep else "undo", 0), ("savepoint", 0)]
            self.controls.clear()
            self._steps(*steps)
            return
        self.controls.clear()
        try:
            worker.end_part(connection, keep=keep)
        except BaseException as error:
            self.fail(f"the transaction has been rolled back after an error: {error}", error)
            raise
        if keep:
            self.committed = True
            if self.job is not None:
                self.job.committed = True
        self.controls.append((BEGIN, None))  # with the next statement, so that what may go wrong there is its error
        if self.isolation is not None:
            self.controls.append(("isolation", self.isolation))


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
    kept: list[Callback] | None = None
    """Handed to `on_commit` in parts that it has committed by itself."""
    running = False
    """Whether it was still running when its cancelled caller went on."""
    isolation: str | None = None
    """Of the transaction that is begun for it, if one is."""
    outside = False
    """See `TimeLimit`."""

    def __init__(
        self,
        offloaded: Offloaded,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        dooms: bool = False,
    ) -> None:
        self.offloaded = offloaded
        self.binding = binding
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

    def begin_again(self) -> None:
        """What an earlier run has handed over has been undone with it."""
        self.kept = None

    async def hand_on(self, callbacks: list[Callback], limit: TimeLimit | None, *, shield: bool = False) -> None:
        """Runs what is to run behind the commit, or leaves it to those who commit. Loop thread."""
        if self.parent is not None:
            self.parent.callbacks += callbacks
        elif limit is not None:
            limit.callbacks += callbacks
        elif callbacks:
            await run_behind(self.binding, callbacks, shield=shield)

    async def has_failed(self, request: Request, error: BaseException, limit: TimeLimit | None) -> None:
        """It has failed, or its caller has been cancelled: runs what is to run all the same. Loop thread."""
        await self.hand_on(self._failed(request, error), limit, shield=not isinstance(error, Exception))

    def _failed(self, request: Request, error: BaseException) -> list[Callback]:
        self.running = request.cancelled and not request.answered
        if self.parent is None and request.answered and request.error is None:
            self.whole = self.committed = True  # already when its caller was cancelled
            self.result, callbacks = request.result
            return list(callbacks)
        if self.parent is not None and self.dooms and not self.parent.ended:
            self.parent.dooms_the_whole(error)
        return self.kept or []

    @staticmethod
    def drive(connection: Any, job: Job, _params: Any, pool: Pool) -> tuple[Any, list[Callback]]:
        """Runs the function to its end; gives its result and what it handed to `on_commit`. Worker's thread.

        Raises:
            TransactionError: It awaited something else than this database, or left its transaction unusable.
        """
        worker = here.worker
        assert worker is not None
        offloaded = job.offloaded
        binding = job.binding
        parent = job.parent
        root = OffloadedTransaction(binding, pool, offloaded.origin, readonly=offloaded.readonly)
        root.worker, root.connection, root.job = worker, connection, job
        if job.kept is not None:
            job.begin_again()
        if job.isolation is not None:
            root.isolation = job.isolation
            worker.step(connection, "isolation", job.isolation)
        restricted = False
        if parent is not None:
            root.joined = True
            restricted = offloaded.readonly and not parent.readonly
            if restricted:
                worker.step(connection, "restrict", True)
        context = copy_context()  # of the request's, which is a copy of the caller's: it may have to be run again
        context.run(binding.current.set, root)
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
            if restricted and not returned and worker.connection is connection:
                worker.step(connection, "restrict", False)
        if restricted and worker.connection is connection:
            if root.doom is None and root.top is root:
                root.settle()
            worker.step(connection, "restrict", False)
        if root.doom is not None:
            raise root.refusal()
        if root.top is not root:
            raise TransactionError(f"the function returned with a nested level open, begun by {root.top.origin()}")
        if root.controls:
            root.settle()
        kept = job.kept
        return result, root.callbacks if kept is None else [*kept, *root.callbacks]


def send_job(
    job: Job, level: Level | None, *, readonly: bool, options: Options | None = None
) -> tuple[Request, Awaitable[Any]]:
    """Sends a call to the database's thread; gives what its outcome is to be awaited from. `level` is the current one."""
    binding = job.binding
    if level is not None and level.ended:
        level = step_back(binding.current, level)
    if isinstance(level, Transaction):
        level.check()
        refuse_writing_in_readonly(level, readonly)
        if options is not None:
            refuse_isolation(level, options)
        pool = level.pool
        job.parent = level
    else:
        recent = binding.recent
        if readonly:
            pool = reading_pool(binding, options)
        elif recent is None or recent.loop() is not (current_loop() if "trio" in modules else asyncio_loop()):
            pool = binding.pool()
        else:
            pool = recent
        if options is not None:
            job.isolation = options.isolation
    request = pool.request(UNIT, Job.drive, job, None, pool, job)
    if level is None and not attempts and not readonly:
        pool.writes.submit(request)
        return request, request
    return request, submit(level, pool, request, readonly=readonly)


async def offload(
    job: Job, level: Level | None, *, readonly: bool, options: Options | None = None, limit: TimeLimit | None = None
) -> Any:
    """Sends a call to the database's thread; gives what the function returns."""
    request, sent = send_job(job, level, readonly=readonly, options=options)
    try:
        result, callbacks = await sent
    except BaseException as error:
        await job.has_failed(request, error, limit)
        raise
    if job.parent is None:
        job.committed = True
    if callbacks:
        await job.hand_on(callbacks, limit)
    return result


def _foreign(job: Job) -> TransactionError:
    name = getattr(job.function, "__qualname__", repr(job.function))
    return TransactionError(
        f"{name}() runs with offload=True, on the database's own thread, where only calls of database"
        f" {job.binding.name!r} may be awaited; it awaited something else, so it has been rolled back."
        " Await that outside, or do without offload=True."
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
