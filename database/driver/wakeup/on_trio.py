"""trio: requests that its tasks can await, and its waker. Imported where trio runs.

See `database.driver.wakeup.waker` for what a wake-up costs, for threads, cancellation and the lifetime of loops.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import copy_context
from typing import Any, cast

import trio

from database.driver.request import COMMIT, Request
from database.driver.wakeup import waker
from database.driver.wakeup.sight import Sight
from database.driver.wakeup.waker import Notice, Timer, Waker

__all__ = ["TrioWaker"]


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
            self._timer: Timer = _call_later_in_trio(waker.GRACE, self._grace_is_over)
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

    __slots__ = ("_answer", "_end_look", "_end_pump", "_reschedule", "_token", "_trio", "_watch")

    library = "trio"

    def __init__(self) -> None:
        super().__init__()
        self.request = _TrioRequest
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
        self._end_look: trio.CancelScope | None = None
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
        if self._end_look is not None:
            self._end_look.cancel()
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
            request.context = None  # workers and tracebacks keep requests, but shall not keep their tasks' context
            task = request.waiter
            if task is not None:
                request.waiter = None
                reschedule(task, answer)

    def _sees(self, sight: Sight) -> bool:
        self._end_look = self._trio.CancelScope()
        self._trio.lowlevel.spawn_system_task(self._look, sight, self._end_look, name="database answers")
        return True

    async def _look(self, sight: Sight, scope: trio.CancelScope) -> None:
        wait_readable = self._trio.lowlevel.wait_readable
        try:
            with scope:
                while True:
                    await wait_readable(sight.descriptor)
                    sight.look()
        finally:
            self._sight = self._end_look = None
            sight.close()

    def next_turn(self, function: Notice) -> None:
        self._token.run_sync_soon(function)

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
        self._trio.lowlevel.spawn_system_task(function, name="database on_commit", context=copy_context())

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
