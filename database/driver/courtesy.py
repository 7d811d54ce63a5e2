"""Giving way: an event loop that never rests lets its workers have the GIL.

A thread that waits for the GIL gets it when the holder rests (waits for I/O) or, after `sys.getswitchinterval()`, 5 ms,
when it is made to. A loop that is busy computing rests only for the microseconds of a `select` that finds something
to do, too short for a waiting thread to wake up; so a worker gets the GIL every 5 ms, needs it several times for one
statement, and a point select takes tens of milliseconds, at times a second.

So while a worker has something to do, a timer looks now and then whether the loop has rested since the last time. It has
not if its thread has computed nearly all the while; or if the timer rings late and the thread has computed for much of the
time, for on a machine with other work to do nobody computes all the while. (A loop that is late without having computed
was waiting for the GIL itself; and punctuality alone proves nothing, for timers and slices of work may be in step.)

A loop that has rested is looked at half as often the next time. One that has not sleeps for a moment: some 60 µs, the
least that an operating system's timer gives, and enough for a worker to execute a statement. An idle loop has no timer at all.

Loop thread.
"""

from __future__ import annotations

import time
from time import perf_counter, thread_time
from typing import Any

from database.driver.roles import Owner
from database.driver.wakeup import Timer

__all__ = ["Courtesy"]

SOON = 0.0016
"""Seconds to the next look at a loop that is busy."""
SELDOM = 0.016
"""Seconds to the next look at a loop that has rested again and again."""
LATE = 0.0004
"""Seconds of delay that mean something."""
MOST = 0.75
"""Part of the time that a loop without a rest computes, at the least."""
MUCH = 0.4
"""The same of a loop that is late: it may not have had the CPU all the while."""
MOMENT = 1e-6
"""Seconds to sleep; in fact as long as the operating system's timers are coarse (Linux: 50 µs more)."""


class Courtesy:
    """One pool's."""

    __slots__ = ("_computed", "_due", "_pool", "_seconds", "_timer")

    def __init__(self, pool: Owner[Any]) -> None:
        self._pool = pool
        self._timer: Timer | None = None
        self._seconds = SOON
        self._due = 0.0
        self._computed = 0.0
        """Seconds of the CPU's time that the loop's thread had used at the last look."""

    def begin(self) -> None:
        """A worker has been woken."""
        if self._timer is None:
            self._seconds = 2 * SOON
            self._look_again()

    def end(self) -> None:
        """The pool closes."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _look_again(self) -> None:
        self._computed = thread_time()
        self._due = perf_counter() + self._seconds
        self._timer = self._pool.waker.call_later(self._seconds, self._look)

    def _look(self) -> None:
        if self._timer is None or self._pool.closed:
            return
        self._pool.look()
        if not self._pool.working:
            self._timer = None
            return
        late = perf_counter() - self._due
        computed = thread_time() - self._computed
        if computed < (MOST if late < LATE else MUCH) * (self._seconds + late):
            self._seconds = min(2 * self._seconds, SELDOM)
        else:
            self._seconds = SOON
            time.sleep(MOMENT)
        self._look_again()
