"""asyncio, uvloop and every other loop of that interface: requests that their tasks can await, and the loop's waker.

See `database.driver.wakeup.waker` for what a wake-up costs, for threads, cancellation and the lifetime of loops.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from typing import Any

import anyio

from database.driver.request import COMMIT, Request
from database.driver.wakeup import waker
from database.driver.wakeup.sight import Sight
from database.driver.wakeup.waker import FAR_AWAY, Notice, Timer, Waker

__all__ = ["AsyncioWaker"]


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

    __slots__ = ("_asyncio_future_blocking", "_wakeup_context")
    _wakeup_context: Context | None
    """The waiting task's own context, in which its wake-up is called."""

    get_loop: Callable[[], Any]
    """The loop of the pool that the request was made for, set by `AsyncioWaker`: a task of another loop that awaits the
    request is told so by asyncio, and a task is cancelled also while its loop does not run."""

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

    def add_done_callback(self, wakeup: Callable[[Any], object], *, context: Context) -> None:
        self.waiter = wakeup
        self._wakeup_context = context

    def cancel(self, msg: object = None) -> bool:
        wakeup = self.waiter
        if wakeup is None:  # its task has been told already
            return False
        self.waiter = None
        # Also between two runs of the loop: `asyncio.run` cancels what is left behind its main task.
        cancelled: asyncio.Future[None] = self.get_loop().create_future()
        cancelled.add_done_callback(wakeup, context=self._wakeup_context)
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
            await self._settled(waker.GRACE)

    async def _settled(self, seconds: float) -> None:
        """Waits for the worker's word, no longer than that and not beyond another native cancellation."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(_: object = None) -> None:
            if not future.done():
                future.set_result(None)

        self._wakeup_context = Context()
        self.waiter = settle
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


_NOBODYS = Context()
"""A context for callbacks that concern no task."""


class AsyncioWaker(Waker):
    """asyncio, uvloop and every other loop of that interface."""

    __slots__ = ()

    library = "asyncio"

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.loop = weakref.ref(loop)
        # A class for each loop: asyncio asks a request for its loop, and no request needs a slot for the answer.
        self.request = type(
            "AsyncioRequest", (_AsyncioRequest,), {"__slots__": (), "get_loop": staticmethod(self.loop)}
        )
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

    # asyncio's own loops keep their callbacks and timers in `_ready` and `_scheduled`, and have no other way to ask for them.
    # Whoever has neither (uvloop) is not asked.

    @property
    def tells_who_waits(self) -> bool:  # type: ignore[override]
        loop: Any = self.loop()
        return hasattr(getattr(loop, "_ready", None), "__len__") and isinstance(getattr(loop, "_scheduled", None), list)

    def is_alone(self, own: int) -> bool:
        loop: Any = self.loop()
        try:
            if len(loop._ready) > own:
                return False
            timers = loop._scheduled
            return not timers or timers[0].when() > loop.time()
        except AttributeError:
            return False

    def task_of(self, request: Request) -> object | None:
        return getattr(request.waiter, "__self__", None)  # it is the task's own bound method

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
        sight, self._sight = self._sight, None
        loop = self.loop()
        if loop is not None and loop.is_closed():
            loop = None
        if descriptor >= 0:
            if loop is not None:
                loop.remove_reader(descriptor)
            os.close(descriptor)
        if sight is not None:
            if loop is not None:
                loop.remove_reader(sight.descriptor)
            sight.close()
        if self._posted:
            self._schedule()

    def _wake(self, answered: list[Any]) -> None:
        rest = iter(answered)
        try:
            for request in rest:
                request.answered = True
                request.context = None  # workers and tracebacks keep requests, but shall not keep their tasks' context
                wakeup = request.waiter
                if wakeup is not None:
                    request.waiter = None
                    request._wakeup_context.run(wakeup, _DONE)
                    request._wakeup_context = None  # deleting takes longer
        except BaseException:  # SystemExit or KeyboardInterrupt out of a task; the others go on all the same
            self.post(list(rest))
            raise

    def _sees(self, sight: Sight) -> bool:
        try:
            Context().run(asyncio.get_running_loop().add_reader, sight.descriptor, sight.look)
        except NotImplementedError:  # a loop without readers
            sight.close()
            return False
        return True

    def next_turn(self, function: Notice) -> None:
        asyncio.get_running_loop().call_soon(function, context=_NOBODYS)

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
