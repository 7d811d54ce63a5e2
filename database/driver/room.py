"""Room in the write-ahead log.

A log can only be begun anew while nobody reads from it. Where readers overlap all the time, however short each of them is,
that moment never comes by itself, and the log grows with every write (sqlite.org/wal.html#ckpt). But it is the pool that
grants every snapshot: when the log has passed its limit, new ones are held back for a moment, those that are open end,
the writer empties the log, and everybody goes on. What is held back keeps its place in its line.

Readers that stay open for longer than that cannot be helped; the pool names them (`long_read`), and tries again after
a while, ever more seldom, so that nobody waits often for what is of no use.

Threads. `look` runs on the writer's thread, between two pieces of work, with the right to write in its hands. `wait` runs on
the readers' threads, before a snapshot is taken: on beginning a lease, and between two batches of a lane. Pools of other
event loops on the same file take part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from threading import Event
from time import perf_counter
from typing import Protocol

from database.engine.contract import Connection, Log

__all__ = ["Room", "Writer"]

LOOK_SECONDS = 0.1
"""The log's length is looked at no more often than this."""

HOLD_SECONDS = 0.25
"""New snapshots are held back for no longer than this at a time."""

SHARE = 20
"""After an attempt in vain readers are left alone for so many times as long as it took; twice that after the next one."""

SELDOM_SECONDS = 60.0


class Writer(Protocol):
    """What empties the log."""

    @property
    def connection(self) -> Connection | None:
        """Its connection, if that is open."""
        ...

    @property
    def hurried(self) -> bool:
        """Whether it is to come to its end at once."""
        ...

    def flush(self) -> None:
        """Posts the answers collected so far."""
        ...


class Room:
    """One pool's."""

    __slots__ = ("_failures", "_log", "_open", "_rooms", "held", "next_look")

    def __init__(self, log: Log, rooms: Callable[[], Iterable[Room]]) -> None:
        self._log = log
        self._rooms = rooms
        """Gives those of all pools of this file, this one too."""
        self._open = Event()
        self._failures = 0
        self.held = False
        """Whether new snapshots are held back."""
        self.next_look = 0.0
        """When the writer looks at the log again, by `perf_counter`."""

    # Reader's thread

    def wait(self) -> None:
        """Waits until snapshots are granted again."""
        if self.held:
            self._open.wait(HOLD_SECONDS)

    # Writer's thread

    def look(self, writer: Writer) -> None:
        """Empties the log if it has become too long."""
        began = perf_counter()
        self.next_look = began + LOOK_SECONDS
        connection = writer.connection
        if connection is None or self._log.size() <= self._log.limit:
            return
        writer.flush()  # nobody need wait for this
        empty = self._log.empty
        emptied = empty(connection)
        if not emptied:
            rooms = tuple(self._rooms())
            for room in rooms:
                room._hold()
            try:
                while not emptied and perf_counter() - began < HOLD_SECONDS and not writer.hurried:
                    time.sleep(0.001)
                    emptied = empty(connection)
            finally:
                for room in rooms:
                    room._let_go()
        now = perf_counter()
        if emptied:
            self._failures = 0
            self.next_look = now + LOOK_SECONDS
        else:
            self.next_look = now + min((now - began) * SHARE * 2**self._failures, SELDOM_SECONDS)
            self._failures = min(self._failures + 1, 10)

    def _hold(self) -> None:
        self._open.clear()
        self.held = True

    def _let_go(self) -> None:
        self.held = False
        self._open.set()
