"""From worker threads back to the event loop: parking a task, and waking it with its answer.

This is the one module that knows asyncio and trio by name. A task that handed a request to a worker parks here;
the worker posts whole batches of answered requests, and one wake-up of the loop delivers them all, for it is the
wake-up that costs (a system call and a thread switch), not the delivery.

What a wake-up costs, and what is done about it. asyncio's own `call_soon_threadsafe` writes to a socket that the loop
reads twice, and a future wakes its task only at the next turn of the loop, behind another system call; each of these calls
gives the GIL away and waits to get it back. So each waker has an eventfd of its own, one write and one read, and `deliver`
resumes the waiting task right there: the request itself is what the task waits for (PEP 492's protocol as asyncio
speaks it), not a future. Where there is no eventfd, or the loop cannot watch one, the loop's own means are used.

Threads. `post` is called by workers, everything else on the loop's own thread. `_posted` is a deque, whose append and
popleft are atomic. A worker appends first and looks at `_scheduled` second; the loop clears `_scheduled` first and
empties the deque second. So whatever a worker appends is either seen by a delivery that is under way, or finds
`_scheduled` cleared and schedules the next one. Two workers scheduling at once cost one empty delivery. The descriptor
is written to and closed under a lock, for its number may be somebody else's as soon as it is closed.

Cancellation. A request that has not begun is withdrawn, and its task goes on at once. One that runs is stopped, and the
task waits for the worker's word that it is over, `GRACE` seconds at the most: so that, when a cancelled call returns,
its connection is quiet again. Should a second cancellation break through (asyncio's `task.cancel()` does) or the
grace be used up, the worker finishes alone; all clean-up is its own, so nothing depends on the waiting.
A commit that has begun is waited for to its end; the cancellation is raised afterwards.

Lifetime. Nothing here keeps an asyncio loop alive: loops are held weakly. The end of a loop is noticed by a sentinel
that only the loop's own timer heap holds (asyncio), or by a system task (trio).
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import weakref
from asyncio import CancelledError
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import Context
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, cast

import anyio

from database.driver.request import COMMIT, Request

if TYPE_CHECKING:
    import trio

__all__ = [
    "AsyncioWaker",
    "Timer",
    "TrioWaker",
    "Waker",
    "create_waker",
    "current_loop",
    "current_task",
    "task_name",
]

GRACE = 0.03
"""Seconds for which a cancelled task waits for its running statement to stop."""

FAR_AWAY = 1e8
"""Seconds, about three years: a timer that never rings, within the range of every loop."""

Notice = Callable[[], None]

_running_loop = asyncio._get_running_loop  # pyright: ignore[reportPrivateUsage]  # documented for event loop makers
_modules = sys.modules


class Timer(Protocol):
    """Something that can be called off."""

    def cancel(self) -> None:
        """Calls it off. Harmless when it is over already."""
        ...


class Waker:
    """One event loop, as workers see it."""

    __slots__ = ("__weakref__", "_delivering", "_descriptor", "_lock", "_posted", "_scheduled", "_sleepers", "loop")

    backend: str
    """AnyIO's name of the loop's kind."""

    request: type[Request]
    """Makes a request that a task of this loop can await."""

    loop: Callable[[], Any]
    """The loop's identity as `current_loop` gives it; None when it is gone."""

    def __init__(self) -> None:
        self._posted: deque[tuple[list[Request], Notice | None]] = deque()
        self._scheduled = False
        self._descriptor = -1
        self._lock = Lock()
        self._delivering = False
        self._sleepers: list[Notice] = []

    def rouse(self, wake: Notice) -> None:
        """Calls the function that wakes a worker; while a batch of answers is delivered, when all of them are. Loop thread.

        Tasks that have got their answers often ask again at once. A worker that woke up for the first of these would
        only stand in line for the GIL, which this thread needs for the others.
        """
        if self._delivering:
            self._sleepers.append(wake)
        else:
            wake()

    def post(self, answered: list[Request], notice: Notice | None = None) -> None:
        """Calls `notice` on the loop's thread, then wakes the tasks of answered requests. Any thread may call.

        In this order, so that whoever is woken finds the pool as it will be: the connection that answered is free.
        """
        self._posted.append((answered, notice))
        if not self._scheduled:
            self._scheduled = True
            with self._lock:
                if self._descriptor >= 0:
                    os.eventfd_write(self._descriptor, 1)
                    return
            self._schedule()

    def deliver(self) -> None:
        """Hands out all that was posted. A callback of the loop's, never called by a task."""
        self._scheduled = False
        posted = self._posted
        self._delivering = True
        try:
            while posted:
                answered, notice = posted.popleft()
                if notice is not None:
                    notice()
                self._wake(answered)
        finally:
            self._delivering = False
            sleepers = self._sleepers
            if sleepers:
                for wake in sleepers:
                    wake()
                sleepers.clear()

    def wake(self, answered: list[Request]) -> None:
        """Has the tasks of these requests go on, at the loop's next turn. Loop thread, also within a task."""
        self.post(answered)

    def dispose(self) -> None:
        """No worker will post any more: gives the descriptor back. What has been posted is still delivered."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Whether the loop is running right now, so that its pools are its own to close."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether the caller runs on this loop; not so where a coroutine of a loop that is gone is thrown away."""
        loop = current_loop()
        return loop is not None and loop is self.loop()

    def _schedule(self) -> None:
        """Has the loop call `deliver` where there is no descriptor."""
        raise NotImplementedError

    def _wake(self, answered: list[Request]) -> None:
        """Marks requests as done and lets their tasks go on."""
        raise NotImplementedError

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Calls the function on the loop's thread after that time."""
        raise NotImplementedError

    def on_end(self, function: Callable[[], None]) -> Timer:
        """Calls the function when this loop ends, on the thread that ends it."""
        raise NotImplementedError

    def spawn(self, function: Callable[[], Awaitable[Any]]) -> None:
        """Runs a coroutine function, which must not raise, in a task that belongs to nobody. Loop thread."""
        raise NotImplementedError

    def on_task_end(self, function: Callable[[], None]) -> Timer:
        """Calls the function when the current task ends."""
        raise NotImplementedError


class _Sentinel:
    """Held by nothing but a far-away timer of its loop, so it dies when the loop is closed or collected."""

    __slots__ = ("__weakref__", "function")

    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def ring(self) -> None:
        """The timer's callback. A process that runs for three years loses only the notice of its loop's end."""

    def __del__(self) -> None:
        if self.function is not None:
            self.function()


class _SentinelTimer:
    """Calls a sentinel off without keeping it alive."""

    __slots__ = ("_handle", "_sentinel")

    def __init__(self, handle: asyncio.TimerHandle, sentinel: _Sentinel) -> None:
        self._handle = weakref.ref(handle)
        self._sentinel = weakref.ref(sentinel)

    def cancel(self) -> None:
        sentinel, handle = self._sentinel(), self._handle()
        if sentinel is not None:
            sentinel.function = None
        if handle is not None:
            handle.cancel()


class _WeakTimer:
    """A timer of asyncio's, not kept alive: its handle leads to its loop, which shall be garbage when nobody wants it."""

    __slots__ = ("_handle",)

    def __init__(self, handle: asyncio.TimerHandle) -> None:
        self._handle = weakref.ref(handle)

    def cancel(self) -> None:
        handle = self._handle()
        if handle is not None:
            handle.cancel()


class _TaskCallback:
    """A task's done-callback that can be taken back."""

    __slots__ = ("_function", "_task")

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        task = asyncio.current_task()
        self._task = None if task is None else weakref.ref(task)
        if task is not None:
            task.add_done_callback(self)

    def __call__(self, _task: asyncio.Task[Any]) -> None:
        self._function()

    def cancel(self) -> None:
        task = None if self._task is None else self._task()
        if task is not None:
            task.remove_done_callback(self)


class _NoLoop:
    """What a future asks of its loop when nobody waits for it."""

    def get_debug(self) -> bool:
        return False


_DONE: asyncio.Future[None] = asyncio.Future(loop=_NoLoop())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
"""What a task's wake-up is told: a future that is done. A real one, for tasks know those best; it belongs to no loop."""
_DONE.set_result(None)


class _AsyncioRequest(Request):
    """A request that an asyncio task can wait for, as if it were a future.

    The task's own wake-up, which it gives to `add_done_callback`, is called by `deliver` and not by the loop's next
    turn. So nothing can come between the answer and the task's going on with it.
    """

    __slots__ = ("_asyncio_future_blocking", "context")
    context: Context | None

    def __await__(self) -> Generator[Any, Any, Any]:
        if not self.answered:
            self._asyncio_future_blocking = True
            try:
                yield self
            except CancelledError:
                self.waiter = None
                yield from self._give_up().__await__()
                raise
        if self.error is not None:
            raise self.error
        return self.result

    # What asyncio asks of a future that a task waits for, and AnyIO's `wait_all_tasks_blocked`

    def done(self) -> bool:
        return self.answered or self.waiter is None

    get_loop = staticmethod(asyncio.get_running_loop)

    def add_done_callback(self, wakeup: Callable[[Any], object], *, context: Context) -> None:
        self.waiter = wakeup
        self.context = context

    def cancel(self, msg: object = None) -> bool:
        wakeup = self.waiter
        if wakeup is None:  # its task has been told already
            return False
        self.waiter = None
        cancelled = self.get_loop().create_future()
        cancelled.add_done_callback(wakeup, context=self.context)
        return cancelled.cancel(msg)

    # After a cancellation

    async def _give_up(self) -> None:
        home = self.home
        if self.answered or home is None or home.withdraw(self):
            return
        if self.kind == COMMIT:  # what has begun must not be stopped
            while not self.answered:
                await self._settled(FAR_AWAY)
        else:
            home.stop(self)
            await self._settled(GRACE)

    async def _settled(self, seconds: float) -> None:
        """Waits for the worker's word, no longer than that and not beyond another native cancellation."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(_: object = None) -> None:
            if not future.done():
                future.set_result(None)

        self.waiter, self.context = settle, Context()
        timer = loop.call_later(seconds, settle)
        try:
            # The shield keeps an AnyIO scope from cancelling again at every turn of the loop.
            with anyio.CancelScope(shield=True):
                await future
        except CancelledError:
            pass  # a second native cancellation; the first one is about to be raised
        finally:
            timer.cancel()
            self.waiter = None


class AsyncioWaker(Waker):
    """asyncio, uvloop and every other loop of that interface."""

    __slots__ = ()

    backend = "asyncio"
    request = _AsyncioRequest

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.loop = weakref.ref(loop)
        if hasattr(os, "eventfd"):
            descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                Context().run(loop.add_reader, descriptor, self._rung, descriptor)
            except NotImplementedError:  # a loop without readers
                os.close(descriptor)
            else:
                self._descriptor = descriptor

    @property
    def running(self) -> bool:
        loop = self.loop()
        return loop is not None and loop.is_running()

    def _rung(self, descriptor: int) -> None:
        try:
            os.eventfd_read(descriptor)
        except BlockingIOError:  # pragma: no cover  - another process of the same descriptor, after a fork, was quicker
            pass
        self.deliver()

    def _schedule(self) -> None:
        loop = self.loop()
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self.deliver)
            except RuntimeError:  # the loop has been closed: nobody is left to be woken
                self._posted.clear()

    def dispose(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            loop = self.loop()
            if loop is not None and not loop.is_closed():
                loop.remove_reader(descriptor)
            os.close(descriptor)
        if self._posted:
            self._schedule()

    def _wake(self, answered: list[Any]) -> None:
        rest = iter(answered)
        try:
            for request in rest:
                request.answered = True
                wakeup = request.waiter
                if wakeup is not None:
                    request.waiter = None
                    request.context.run(wakeup, _DONE)
                    request.context = (
                        None  # workers and tracebacks keep requests, but shall not keep their tasks' context
                    )
        except BaseException:  # SystemExit or KeyboardInterrupt out of a task; the others go on all the same
            self.post(list(rest))
            raise

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        # In a context of nobody's: the timer would keep the caller's, and all that it holds, for its time.
        return _WeakTimer(asyncio.get_running_loop().call_later(seconds, function, context=Context()))

    def on_end(self, function: Callable[[], None]) -> Timer:
        sentinel = _Sentinel(function)
        handle = asyncio.get_running_loop().call_later(FAR_AWAY, sentinel.ring, context=Context())
        return _SentinelTimer(handle, sentinel)

    def spawn(self, function: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.ensure_future(function())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    def on_task_end(self, function: Callable[[], None]) -> Timer:
        return _TaskCallback(function)


_tasks: set[asyncio.Future[Any]] = set()
"""asyncio itself holds tasks only weakly."""


class _TrioTaskWatch:
    """A trio instrument that tells of ended tasks; installed when the first one is watched."""

    def __init__(self) -> None:
        self.watched: dict[trio.lowlevel.Task, dict[object, Callable[[], None]]] = {}

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        for function in self.watched.pop(task, {}).values():
            function()


class _TrioTaskTimer:
    __slots__ = ("_task", "_watch")

    def __init__(self, watch: _TrioTaskWatch, task: trio.lowlevel.Task, function: Callable[[], None]) -> None:
        self._watch, self._task = watch, task
        watch.watched.setdefault(task, {})[self] = function

    def cancel(self) -> None:
        functions = self._watch.watched.get(self._task, {})
        functions.pop(self, None)
        if not functions:
            self._watch.watched.pop(self._task, None)


class _TrioRequest(Request):
    """A request that a trio task can wait for."""

    __slots__ = ("_raise_cancel", "_timer")

    _raise_cancel: Any
    """Set by a cancellation that has to wait for the worker's word."""

    lowlevel: Any
    """`trio.lowlevel`, once there is a pool that needs it."""

    wait: Callable[[Any], Any] | None = None
    """See `_find_trap`."""

    def __await__(self) -> Generator[Any, Any, Any]:
        if not self.answered:
            lowlevel = self.lowlevel
            self.waiter = lowlevel.current_task()
            self._raise_cancel = None
            wait = self.wait
            if wait is None:
                yield from lowlevel.wait_task_rescheduled(self._abort).__await__()
            else:
                (yield wait(self._abort)).unwrap()
            if self._raise_cancel is not None:
                self._timer.cancel()
                self._raise_cancel()
        if self.error is not None:
            raise self.error
        return self.result

    def _abort(self, raise_cancel: Any) -> Any:
        abort = self.lowlevel.Abort
        home = self.home
        if home is None or home.withdraw(self):
            self.waiter = None
            return abort.SUCCEEDED
        if self.kind != COMMIT:  # which must not be stopped; trio cancels at the next checkpoint
            self._raise_cancel = raise_cancel
            home.stop(self)
            self._timer: Timer = _call_later_in_trio(GRACE, self._grace_is_over)
        return abort.FAILED

    def _grace_is_over(self) -> None:
        task, self.waiter = self.waiter, None
        if task is not None:
            self.lowlevel.reschedule(task)


def _find_trap(lowlevel: Any) -> Callable[[Any], Any] | None:
    """What `wait_task_rescheduled` yields to trio, made from an abort function; None if it is not what we know.

    To yield it ourselves saves two coroutines for each statement, a tenth of what a point select costs under trio. Its
    class has no public name, so it is asked for by doing once what trio's own function does.
    """

    def abort(_: Any) -> Any:
        return lowlevel.Abort.SUCCEEDED

    probe = lowlevel.wait_task_rescheduled(abort)
    try:
        trap: Any = probe.send(None)
    except StopIteration:
        return None
    probe.close()
    return (
        cast("Callable[[Any], Any]", type(trap)) if getattr(trap, "__dict__", None) == {"abort_func": abort} else None
    )


@functools.cache
def _make_answer() -> Any:
    """What a trio task is sent when it goes on: nothing. One for all, where trio would make an object for each."""
    from outcome import Outcome  # noqa: PLC0415  - it comes with trio

    class Answer(Outcome):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # generic from 1.3 on
        def unwrap(self) -> None:
            return None

        def send(self, gen: Generator[Any, None, Any]) -> Any:
            return gen.send(None)

        async def asend(self, agen: AsyncGenerator[Any, None]) -> Any:
            return await agen.asend(None)

    return Answer()


class TrioWaker(Waker):
    """trio."""

    __slots__ = ("_answer", "_end_pump", "_reschedule", "_token", "_trio", "_watch")

    backend = "trio"
    request = _TrioRequest

    def __init__(self) -> None:
        super().__init__()
        import trio  # noqa: PLC0415  - only those who run trio have it

        self._trio = trio
        _TrioRequest.lowlevel = trio.lowlevel
        _TrioRequest.wait = _find_trap(trio.lowlevel)
        self._answer = _make_answer()
        token = self._token = trio.lowlevel.current_trio_token()
        self.loop = lambda: token
        self._reschedule = trio.lowlevel.reschedule
        self._watch: _TrioTaskWatch | None = None
        self._end_pump: trio.CancelScope | None = None
        if hasattr(os, "eventfd"):
            self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._end_pump = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._pump, self._descriptor, self._end_pump, name="database wake-ups")

    async def _pump(self, descriptor: int, scope: trio.CancelScope) -> None:
        """Delivers when the descriptor rings; quicker than trio's token, which takes its callbacks through a queue."""
        wait_readable = self._trio.lowlevel.wait_readable
        try:
            with scope:
                while True:
                    await wait_readable(descriptor)
                    os.eventfd_read(descriptor)
                    self.deliver()
        finally:
            self._end_pump = None
            with self._lock:
                self._descriptor = -1
            os.close(descriptor)

    def dispose(self) -> None:
        with self._lock:
            self._descriptor = -1
        if self._end_pump is not None:
            self._end_pump.cancel()
        if self._posted:
            self._schedule()

    @property
    def running(self) -> bool:
        return True  # a trio run that has ended has closed its pools

    def _schedule(self) -> None:
        try:
            self._token.run_sync_soon(self.deliver)
        except self._trio.RunFinishedError:  # nobody is left to be woken
            self._posted.clear()

    def _wake(self, answered: list[Request]) -> None:
        reschedule, answer = self._reschedule, self._answer
        for request in answered:
            request.answered = True
            task = request.waiter
            if task is not None:
                request.waiter = None
                reschedule(task, answer)

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        return _call_later_in_trio(seconds, function)

    def on_end(self, function: Callable[[], None]) -> Timer:
        scope = self._trio.CancelScope()

        async def sleep_and_call() -> None:
            with scope:
                try:
                    await self._trio.sleep_forever()
                finally:
                    if not scope.cancel_called:
                        function()

        self._trio.lowlevel.spawn_system_task(sleep_and_call, name="database end of loop")
        return scope

    def spawn(self, function: Callable[[], Awaitable[Any]]) -> None:
        self._trio.lowlevel.spawn_system_task(function, name="database on_commit")

    def on_task_end(self, function: Callable[[], None]) -> Timer:
        if self._watch is None:
            self._watch = _TrioTaskWatch()
            self._trio.lowlevel.add_instrument(self._watch)  # type: ignore[arg-type]  # instruments are duck-typed
        return _TrioTaskTimer(self._watch, self._trio.lowlevel.current_task(), function)


def _call_later_in_trio(seconds: float, function: Callable[[], None]) -> Timer:
    import trio  # noqa: PLC0415  - it is there: its tasks call this

    scope = trio.CancelScope()

    async def sleep_and_call() -> None:
        with scope:
            await trio.sleep(seconds)
            function()

    trio.lowlevel.spawn_system_task(sleep_and_call, name="database timer")
    return scope


def current_loop() -> object | None:
    """The identity of the event loop that runs the caller: an asyncio loop, a trio token, or None."""
    trio = _modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():  # first, for trio may be asyncio's guest
        token: object = trio.lowlevel.current_trio_token()
        return token
    return _running_loop()


def create_waker() -> Waker:
    """The waker of the running event loop."""
    trio = _modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return TrioWaker()
    return AsyncioWaker()


def current_task() -> object | None:
    """The running task; None outside any. For comparing and for `task_name`; hold it no longer than it runs."""
    trio = _modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        task: object = trio.lowlevel.current_task() if trio.lowlevel.in_trio_task() else None
        return task
    return None if _running_loop() is None else asyncio.current_task()


def task_name(task: Any) -> str:
    """A task's name, for messages."""
    if task is None:  # it has ended, or it was a callback
        return "no task any more"
    return str(task.get_name() if hasattr(task, "get_name") else task.name)
