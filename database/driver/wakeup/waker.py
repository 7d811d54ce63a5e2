"""From worker threads back to the event loop: parking a task, and waking it with its answer.

This is the one package that knows asyncio and trio by name. A task that handed a request to a worker parks here;
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
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from threading import Lock
from typing import Any, Protocol

from database.driver.request import Request
from database.driver.wakeup.sight import Sight

__all__ = [
    "FAR_AWAY",
    "GRACE",
    "Notice",
    "Timer",
    "Waker",
    "asyncio_loop",
    "current_loop",
    "current_task",
    "in_trio",
    "task_name",
]

GRACE = 0.03
"""Seconds for which a cancelled task waits for its running statement to stop."""

FAR_AWAY = 1e8
"""Seconds, about three years: a timer that never rings, within the range of every loop."""

Notice = Callable[[], None]

_running_loop = asyncio._get_running_loop  # pyright: ignore[reportPrivateUsage]  # documented for event loop makers
asyncio_loop = _running_loop
"""asyncio's running loop, or None. Where trio has not been imported, it is `current_loop`, with a call less."""
_modules = sys.modules


class Timer(Protocol):
    """Something that can be called off."""

    def cancel(self) -> None:
        """Calls it off. Harmless when it is over already."""
        ...


class Waker:
    """One event loop, as workers see it."""

    __slots__ = (
        "__weakref__",
        "_delivering",
        "_descriptor",
        "_lock",
        "_posted",
        "_scheduled",
        "_sight",
        "_sleepers",
        "crowd",
        "loop",
        "request",
    )

    library: str
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
        self.crowd = 0
        """Answers that are being handed out together."""
        self._sleepers: list[Notice] = []
        self._sight: Sight | None = None
        """Where sockets are watched, once there are any."""

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
                self.crowd = len(answered)
                self._wake(answered)
        finally:
            self._delivering = False
            self.crowd = 0
            sleepers = self._sleepers
            if sleepers:
                for wake in sleepers:
                    wake()
                sleepers.clear()
            if posted:  # something raised
                self.post([])

    def wake(self, answered: list[Request]) -> None:
        """Has the tasks of these requests go on, at the loop's next turn. Loop thread, also within a task."""
        self.post(answered)

    def answer(self, request: Request) -> None:
        """Has the task of this request go on. Loop thread, in a callback of the loop's."""
        self._wake([request])

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

    tells_who_waits = False
    """Whether `is_alone` knows anything."""

    def is_alone(self, own: int) -> bool:
        """Whether nobody waits for the loop's next turn, but for `own` callbacks, and no timer is due; False: unknown.

        Loop thread. Who waits for a socket is not counted.
        """
        return False

    def task_of(self, request: Request) -> object | None:
        """The task that waits for the request, if one does. Any thread; for comparing."""
        waiter: object | None = request.waiter
        return waiter

    def _schedule(self) -> None:
        """Has the loop call `deliver` where there is no descriptor."""
        raise NotImplementedError

    def _wake(self, answered: list[Request]) -> None:
        """Marks requests as done and lets their tasks go on."""
        raise NotImplementedError

    def watch(self, descriptor: int, ready: Notice) -> Timer | None:
        """Calls the function whenever the descriptor has something to be read, until that is called off. Loop thread.

        None where the loop has no such means, or no descriptor left for it.
        """
        sight = self._sight
        if sight is None:
            sight = Sight.make()
            if sight is None or not self._sees(sight):
                return None
            self._sight = sight
        return sight.watch(descriptor, ready)

    def _sees(self, sight: Sight) -> bool:
        """Has the loop call `sight.look`; False where it cannot, and then the sight is closed."""
        raise NotImplementedError

    def next_turn(self, function: Notice) -> None:
        """Calls the function at the loop's next turn. Loop thread."""
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


_lowlevel: Any = None
"""`trio.lowlevel`, once trio has been imported as a whole."""


def in_trio() -> bool:
    """Whether the caller runs in trio, which may be asyncio's guest, so it is asked first.

    A trio that another thread is importing just now stands in `sys.modules` half made. Nobody can be running in it yet.
    """
    global _lowlevel  # noqa: PLW0603
    if _lowlevel is None:
        if "trio" not in _modules:
            return False
        lowlevel = getattr(_modules["trio"], "lowlevel", None)
        if not all(hasattr(lowlevel, name) for name in ("in_trio_run", "current_trio_token", "in_trio_task")):
            return False
        _lowlevel = lowlevel
    # Where trio is asyncio's guest, both run on this thread: then its tasks are trio's, and nothing else.
    return bool(_lowlevel.in_trio_task() or (_lowlevel.in_trio_run() and _running_loop() is None))


def current_loop() -> object | None:
    """The identity of the event loop that runs the caller: an asyncio loop, a trio token, or None."""
    if (_lowlevel is not None or "trio" in _modules) and in_trio():
        token: object = _lowlevel.current_trio_token()  # pyright: ignore[reportOptionalMemberAccess]
        return token
    return _running_loop()


def current_task() -> object | None:
    """The running task; None outside any. For comparing and for `task_name`; hold it no longer than it runs."""
    if in_trio():
        task: object = _lowlevel.current_task() if _lowlevel.in_trio_task() else None
        return task
    return None if _running_loop() is None else asyncio.current_task()


def task_name(task: Any) -> str:
    """A task's name, for messages."""
    if task is None:  # it has ended, or it was a callback
        return "no task any more"
    return str(task.get_name() if hasattr(task, "get_name") else task.name)
