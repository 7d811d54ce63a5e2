"""Databases chosen at run time: how many of a pattern's are open at once.

A pattern (`"tenant-*"`) stands for any number of databases, each with a writer, readers and their threads. So their number
is bounded, for each event loop: when one more is opened, one that is at rest is closed, and opened again when it is next
used. Which one: they stand in a circle, and whoever has done something since the last look gets another round (the
CLOCK algorithm), so that nothing has to be noted for each statement. If none is at rest, the bound is exceeded until one is.

Loop thread: a pool is admitted, looked at and closed by the thread of its own loop.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from database.driver.pool import Pool

__all__ = ["admit"]


class _Seat:
    """A pool in the circle, and how many statements it had executed at the last look."""

    __slots__ = ("pool", "seen")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.seen = -1


_circles: dict[tuple[int, str], deque[_Seat]] = {}
"""By the identity of the event loop and the pattern."""


def admit(pool: Pool, pattern: str, most: int) -> None:
    """A pool of that pattern has been opened; closes others of its event loop that are at rest, if there are too many."""
    for key in [key for key, circle in tuple(_circles.items()) if all(seat.pool.closing for seat in tuple(circle))]:
        _circles.pop(key, None)  # of loops that have ended
    circle = _circles.setdefault((id(pool.loop()), pattern), deque())
    open_ones = [seat for seat in circle if not seat.pool.closing]
    circle.clear()
    circle.extend(open_ones)
    looks = 2 * len(circle)
    while len(circle) >= most and looks:
        looks -= 1
        seat = circle.popleft()
        done = seat.pool.stats().statements_total
        if done == seat.seen and seat.pool.at_rest:
            seat.pool.close_at_rest()
        else:
            seat.seen = done
            circle.append(seat)
    circle.append(_Seat(pool))
