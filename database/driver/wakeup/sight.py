"""Many sockets that a loop watches through one descriptor: an epoll of the waker's own.

Why not each by itself. uvloop (libuv) gives up a descriptor whose connection was reset, and tells nobody who waits for it; trio
would need a task for each; and asyncio's registering costs more than all that comes of it. Where there is no epoll, nothing is
watched, and workers' threads wait as they always can.

Threads. All of it on the loop's thread. A forked child has the same epoll as its parent, and must not change it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from database.driver.wakeup.waker import Notice, Timer

__all__ = ["Sight"]


class Sight:
    """One waker's."""

    __slots__ = ("_epoll", "_pid", "_ready", "descriptor")

    possible = hasattr(select, "epoll")
    """Whether there is such a thing here."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.descriptor = self._epoll.fileno()
        """What the loop has to watch."""
        self._ready: dict[int, Notice] = {}
        self._pid = os.getpid()

    def watch(self, descriptor: int, ready: Notice) -> Timer:
        """Calls the function whenever there is something to be read, or has been an error, until that is called off."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._ready[descriptor] = ready
        return _Watched(self._end, descriptor, ready)

    def look(self) -> None:
        """The loop says that there is something to be seen."""
        for descriptor, _ in self._epoll.poll(0):
            ready = self._ready.get(descriptor)
            if ready is not None:  # else whoever was called before has called it off
                ready()

    def close(self) -> None:
        """Nothing is watched any more."""
        self._ready.clear()
        self._epoll.close()

    def _end(self, descriptor: int, ready: Notice) -> None:
        if self._ready.get(descriptor) is ready and os.getpid() == self._pid:
            del self._ready[descriptor]
            try:
                self._epoll.unregister(descriptor)
            except (OSError, ValueError):  # it has been closed
                pass


class _Watched:
    """Calls it off."""

    __slots__ = ("_descriptor", "_end", "_ready")

    def __init__(self, end: Callable[[int, Notice], None], descriptor: int, ready: Notice) -> None:
        self._end = end
        self._descriptor = descriptor
        self._ready = ready

    def cancel(self) -> None:
        """See `Timer`."""
        self._end(self._descriptor, self._ready)
