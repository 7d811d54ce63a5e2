"""Many sockets that a loop watches through one descriptor: an epoll of the waker's own.

Why not each by itself. uvloop (libuv) gives up a descriptor whose connection was reset, and tells nobody who waits for it; trio
would need a task for each; and asyncio's registering costs more than all that comes of it. Where there is no epoll, nothing is
watched, and workers' threads wait as they always can.

What is registered is a duplicate, which is nobody else's to close. libpq closes its descriptor in the middle of a step, when
the connection breaks; a forked child may still have the same socket open, and then the epoll would go on telling of it for
ever, by a number that cannot be unregistered any more.

Threads. All of it on the loop's thread. A forked child has the same epoll as its parent, and must not change it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

__all__ = ["Sight", "Watched"]

Notice = Callable[[], None]


class Sight:
    """One waker's."""

    __slots__ = ("_epoll", "_pid", "_ready", "descriptor")

    @classmethod
    def make(cls) -> Sight | None:
        """None where there is no such thing, or no descriptor left for it."""
        if not hasattr(select, "epoll"):
            return None
        try:
            return cls()
        except OSError:
            return None

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.descriptor = self._epoll.fileno()
        """What the loop has to watch."""
        self._ready: dict[int, Notice] = {}
        self._pid = os.getpid()

    def watch(self, descriptor: int, ready: Notice) -> Watched | None:
        """Calls the function whenever there is something to be read, or has been an error, until that is called off.

        None where the system has no descriptor left for it.
        """
        try:
            own = os.dup(descriptor)
        except OSError:
            return None
        try:
            self._epoll.register(own, select.EPOLLIN)
        except OSError:
            os.close(own)
            return None
        self._ready[own] = ready
        return Watched(self._end, own, ready)

    def look(self) -> None:
        """The loop says that there is something to be seen."""
        for descriptor, _ in self._epoll.poll(0):
            ready = self._ready.get(descriptor)
            if ready is not None:  # else whoever was called before has called it off
                ready()

    def close(self) -> None:
        """Nothing is watched any more."""
        while self._ready:
            os.close(self._ready.popitem()[0])
        self._epoll.close()

    def _end(self, own: int, ready: Notice) -> None:
        if self._ready.get(own) is ready and os.getpid() == self._pid:
            del self._ready[own]
            self._epoll.unregister(own)
            os.close(own)


class Watched:
    """What is watched, to be called off."""

    __slots__ = ("_end", "_own", "_ready")

    def __init__(self, end: Callable[[int, Notice], None], own: int, ready: Notice) -> None:
        self._end = end
        self._own = own
        self._ready = ready

    def cancel(self) -> None:
        """Calls it off. Harmless when it is over already."""
        self._end(self._own, self._ready)
