"""From worker threads back to the event loop: parking a task, and waking it with its answer.

This is the one module that knows asyncio and trio by name. A task that handed a request to a worker parks here;
the worker posts whole batches of answered requests, and one wake-up of the loop delivers them all, for it is the
wake-up that costs (a system call and a thread switch), not the delivery.

Threads. `post` is called by workers, everything else on the loop's own thread. `_posted` is a deque, whose append and
popleft are atomic. A worker appends first and looks at `_scheduled` second; the loop clears `_scheduled` first and
empties the deque second. So whatever a worker appends is either seen by a delivery that is under way, or finds
`_scheduled` cleared and schedules the next one. Two workers scheduling at once cost one empty delivery.

Cancellation. A request that has not begun is withdrawn, and its task goes on at once. One that runs is stopped, and the
task waits for the worker's word that it is over, `GRACE` seconds at the most: so that, when a cancelled call returns,
its connection is quiet again. Should a second cancellation break through (asyncio's `task.cancel()` does) or the
grace be used up, the worker finishes alone; all clean-up is its own, so nothing depends on the waiting.

Lifetime. Nothing here keeps an asyncio loop alive: loops are held weakly. The end of a loop is noticed by a sentinel
that only the loop's own timer heap holds (asyncio), or by a system task (trio).
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from asyncio import CancelledError
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from database.driver.request import Request

if TYPE_CHECKING:
    import trio

__all__ = [
    "AsyncioWaker",
    "Timer",
    "TrioWaker",
    "Waker",
    "create_waker",
    "current_loop",
    "current_task_id",
    "current_task_name",
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

    __slots__ = ("__weakref__", "_posted", "_scheduled")

    backend: str
    """AnyIO's name of the loop's kind."""

    def __init__(self) -> None:
        self._posted: deque[tuple[list[Request], Notice | None]] = deque()
        self._scheduled = False

    def post(self, answered: list[Request], notice: Notice | None = None) -> None:
        """Wakes the tasks of answered requests, then calls `notice` on the loop's thread. Any thread may call."""
        self._posted.append((answered, notice))
        if not self._scheduled:
            self._scheduled = True
            self._schedule()

    def deliver(self) -> None:
        """Hands out all that was posted. Loop thread."""
        self._scheduled = False
        posted = self._posted
        while posted:
            answered, notice = posted.popleft()
            self.wake(answered)
            if notice is not None:
                notice()

    @property
    def loop(self) -> object | None:
        """The loop's identity as `current_loop` gives it; None when it is gone."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Whether the loop is running right now, so that its pools are its own to close."""
        raise NotImplementedError

    def _schedule(self) -> None:
        raise NotImplementedError

    def wake(self, answered: list[Request]) -> None:
        """Marks requests as done and lets their tasks go on. Loop thread."""
        raise NotImplementedError

    async def wait(self, request: Request) -> Any:
        """Parks the task until its request is answered; returns the result or raises the error."""
        raise NotImplementedError

    async def wait_through(self, request: Request) -> Any:
        """Like `wait`, for a request that must not be stopped once it has begun: a commit, a rollback.

        A cancellation that arrives meanwhile is raised afterwards (asyncio) or at the next checkpoint (trio).
        """
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


class AsyncioWaker(Waker):
    """asyncio, uvloop and every other loop of that interface."""

    __slots__ = ("_loop",)

    backend = "asyncio"

    def __init__(self) -> None:
        super().__init__()
        self._loop = weakref.ref(asyncio.get_running_loop())

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop()

    @property
    def running(self) -> bool:
        loop = self._loop()
        return loop is not None and loop.is_running()

    def _schedule(self) -> None:
        loop = self._loop()
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self.deliver)
            except RuntimeError:  # the loop has been closed: nobody is left to be woken
                self._posted.clear()

    def wake(self, answered: list[Request]) -> None:
        for request in answered:
            request.done = True
            waiter = request.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def wait(self, request: Request) -> Any:
        future = request.waiter = _running_loop().create_future()  # type: ignore[union-attr]
        try:
            await future
        except CancelledError:
            await self._give_up(request)
            raise
        if request.error is not None:
            raise request.error
        return request.result

    async def _give_up(self, request: Request) -> None:
        home = request.home
        if request.done or home is None or home.withdraw(request):
            request.waiter = None
            return
        home.stop(request)
        loop = asyncio.get_running_loop()
        future = request.waiter = loop.create_future()
        timer = loop.call_later(GRACE, _settle, future)
        try:
            # The shield keeps an AnyIO scope from cancelling again at every turn of the loop.
            with anyio.CancelScope(shield=True):
                await future
        except CancelledError:
            pass  # a second native cancellation; the first one is about to be raised
        finally:
            timer.cancel()
            request.waiter = None

    async def wait_through(self, request: Request) -> Any:
        cancellation: CancelledError | None = None
        loop = asyncio.get_running_loop()
        while not request.done:
            future = request.waiter = loop.create_future()
            try:
                if cancellation is None:
                    await future
                else:
                    with anyio.CancelScope(shield=True):
                        await future
            except CancelledError as error:
                if cancellation is None:
                    cancellation = error
                    if request.home is not None and request.home.withdraw(request):
                        raise
        if cancellation is not None:
            raise cancellation
        if request.error is not None:
            raise request.error
        return request.result

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, function)

    def on_end(self, function: Callable[[], None]) -> Timer:
        sentinel = _Sentinel(function)
        handle = asyncio.get_running_loop().call_later(FAR_AWAY, sentinel.ring)
        return _SentinelTimer(handle, sentinel)

    def spawn(self, function: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.ensure_future(function())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    def on_task_end(self, function: Callable[[], None]) -> Timer:
        return _TaskCallback(function)


_tasks: set[asyncio.Future[Any]] = set()
"""asyncio itself holds tasks only weakly."""


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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


class TrioWaker(Waker):
    """trio."""

    __slots__ = ("_token", "_trio", "_watch")

    backend = "trio"

    def __init__(self) -> None:
        super().__init__()
        import trio  # noqa: PLC0415  - only those who run trio have it

        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()
        self._watch: _TrioTaskWatch | None = None

    @property
    def loop(self) -> object | None:
        return self._token

    @property
    def running(self) -> bool:
        return True  # a trio run that has ended has closed its pools

    def _schedule(self) -> None:
        try:
            self._token.run_sync_soon(self.deliver)
        except self._trio.RunFinishedError:  # nobody is left to be woken
            self._posted.clear()

    def wake(self, answered: list[Request]) -> None:
        reschedule = self._trio.lowlevel.reschedule
        for request in answered:
            request.done = True
            task = request.waiter
            if task is not None:
                request.waiter = None
                reschedule(task)

    async def wait(self, request: Request) -> Any:
        lowlevel = self._trio.lowlevel
        request.waiter = lowlevel.current_task()
        raise_cancel: Any = None
        timer: Timer | None = None

        def abort(raise_it: Any) -> Any:
            nonlocal raise_cancel, timer
            home = request.home
            if home is None or home.withdraw(request):
                request.waiter = None
                return lowlevel.Abort.SUCCEEDED
            raise_cancel = raise_it
            home.stop(request)
            timer = self.call_later(GRACE, lambda: self.wake([request]))
            return lowlevel.Abort.FAILED

        await lowlevel.wait_task_rescheduled(abort)
        if raise_cancel is not None:
            if timer is not None:
                timer.cancel()
            raise_cancel()
        if request.error is not None:
            raise request.error
        return request.result

    async def wait_through(self, request: Request) -> Any:
        lowlevel = self._trio.lowlevel
        request.waiter = lowlevel.current_task()

        def abort(_raise_it: Any) -> Any:
            if request.home is not None and request.home.withdraw(request):
                request.waiter = None
                return lowlevel.Abort.SUCCEEDED
            return lowlevel.Abort.FAILED

        await lowlevel.wait_task_rescheduled(abort)
        if request.error is not None:
            raise request.error
        return request.result

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        scope = self._trio.CancelScope()

        async def sleep_and_call() -> None:
            with scope:
                await self._trio.sleep(seconds)
                function()

        self._trio.lowlevel.spawn_system_task(sleep_and_call, name="database timer")
        return scope

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


def current_task_name() -> str:
    """The running task's name, for messages."""
    try:
        return anyio.get_current_task().name or "?"
    except Exception:  # outside any task: a callback, a worker's thread
        return "no task"


def current_task_id() -> int:
    """A number for the running task, the same as long as it lives."""
    try:
        return anyio.get_current_task().id
    except Exception:  # outside any task
        return 0
