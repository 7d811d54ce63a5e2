"""Which reads are quick enough for the event loop's own thread: learnt text by text.

A text is quick when it has been so on a worker a few times. What turns out not to be, on the loop's thread, goes back to
the worker, for twice as long after each relapse. So a text that is seldom quick is seldom tried.

What a worker's clock says is not all: beside other busy threads most of the time that a read takes is waiting for the GIL,
and that says nothing about the read. So of what took longer it counts how long its thread has computed, and whether a page had
to come from a disk.

Threads. `knows` and `judge` are the loop's; what `clocked` makes runs on workers. Each entry is a list of its own, whose
items are assigned, nothing more.
"""

from __future__ import annotations

import sys
from functools import partial
from time import perf_counter, thread_time
from typing import Any

from database.engine.contract import Operation
from database.engine.statement import Statement

if sys.platform != "win32":
    import resource

__all__ = ["BUDGET", "RELAPSE", "Quick"]

BUDGET = 0.0001
"""Seconds that a quick read takes at the most, and after which one is stopped on the loop's thread."""

QUICK = 2
"""How many times that a run may have computed which was kept waiting: fighting for the GIL is work, too."""

SLOW = 5
"""How many times that it must have computed to count as slow."""

NEW = 2
"""Quick runs on the worker that make a text known as quick."""

RELAPSE = 16
"""The same for a text that was not; doubled each time, up to `MOST`."""

MOST = 4096

AGAIN = 4
"""How many more for each run on the worker that was slow."""

STRIKE = 16
"""What a read on the loop's thread counts that was late, but came to its end, and how many quick ones make up for it."""

STRIKES = 40
"""From more than this on, it is the statement and not the machine."""

TEXTS = 2000
"""Texts that are remembered, at the most."""
LENGTH = 10_000
"""Characters of the longest of them: a longer one holds data, and will hardly be sent again."""


class Quick:
    """One pool's."""

    __slots__ = ("doubts", "texts")

    def __init__(self) -> None:
        self.texts: dict[str, list[int]] = {}
        """By text: quick runs on the worker that it still owes, how many it owes after the next relapse, and its strikes."""
        self.doubts = False
        """Whether any read has ever been late on the loop's thread: as long as none has, there is nothing to judge."""

    def knows(self, text: str) -> bool:
        """Whether the text is known to be quick."""
        known = self.texts.get(text)
        return known is not None and known[0] <= 0

    def judge(self, text: str, seconds: float, *, stopped: bool) -> None:
        """A read has run on the loop's thread, with nobody in its way but the machine."""
        known = self.texts.get(text)
        if known is None:
            return
        if seconds > BUDGET:
            self.doubts = True
            known[2] += STRIKE
            if stopped or known[2] > STRIKES:
                known[0], known[1], known[2] = known[1], min(2 * known[1], MOST), 0
        elif known[2] or known[1] > RELAPSE:
            known[1] = max(known[1] - 1, RELAPSE)
            known[2] = max(known[2] - 1, 0)

    def clocked(self, operation: Operation) -> Operation:
        """The operation, watched when a worker executes it."""
        return partial(self._timed, operation)

    def _timed(self, operation: Operation, connection: Any, statement: Statement, params: Any, extra: Any) -> Any:
        pages, computed, began = _pages(), thread_time(), perf_counter()
        quick: bool | None = False
        try:
            result = operation(connection, statement, params, extra)
            quick = perf_counter() - began < BUDGET
            if not quick and _pages() == pages:  # it has waited for the GIL, or for a processor; or computed
                computed = thread_time() - computed
                quick = None if QUICK * BUDGET < computed < SLOW * BUDGET else computed < QUICK * BUDGET
        finally:
            if quick is not None:
                self._learn(statement.sql, quick=quick)
        return result

    def _learn(self, text: str, *, quick: bool) -> None:
        known = self.texts.get(text)
        if known is None:
            if len(text) > LENGTH:
                return
            if len(self.texts) >= TEXTS:
                self.texts.clear()
            self.texts[text] = [NEW - 1 if quick else RELAPSE, RELAPSE, 0]
        elif not quick:
            known[0] = min(known[0] + AGAIN, MOST)
        elif known[0] > 0:
            known[0] -= 1


def _pages() -> int:
    """How often this thread has waited for a disk."""
    if sys.platform == "win32":
        return int(perf_counter() * 1e9)  # nobody knows: what has waited is slow
    used = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))  # of a thread: Linux, FreeBSD
    return used.ru_inblock + used.ru_majflt
