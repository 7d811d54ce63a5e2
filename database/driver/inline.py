"""Small reads where they are: on the event loop's own thread, on the connection of a worker that is at rest.

One task pays some 80 µs for a statement of which SQLite needs 12: the rest is two threads waking each other. So a read
that is known to be quick is run by the caller's thread itself, when nobody else wants the reader. Opt-in
(`inline_reads: true`), for while it runs, the loop does nothing else.

What runs inline. A single autocommit read whose text has been quick on the worker, when the lane's reader sleeps and
its queue is empty. Never a write, a script, a unit of work, or a statement that is logged one by one: handlers may block.

What bounds it. SQLite's progress handler stops a statement after `BUDGET` seconds; it is then run again on the worker, and
its text stays there for the next runs, twice as many after each relapse. What the handler does not see (a page that comes
from the disk) is learnt by the clock, as the worker's own runs are. Whatever fails is run again on the worker, which knows
how to wait, to replace the connection, and to say what was wrong. And in one turn of the loop all inline reads together
take `TURN` seconds: what comes after that goes to the lane, and its task waits, so that others have their turn.

When much is going on, the lane is better: it answers a hundred tasks with one wake-up. So nothing runs inline while
more than `CROWD` answers are being handed out.

Threads. A worker at rest is blocked at its inbox and touches nothing; it has set `sleeping` last. What wakes it is put there
by the loop's thread, which cannot do two things at once; except for the pool's end at the process's exit, and a fork, which
may come from any thread. So there is a lock, `Worker.lent`: this thread holds it while it uses the connection, and looks at
`sleeping` once more behind it; a worker that has been woken takes it before it does anything. It never waits longer for it
than one inline read takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter

from database.driver.read_lane import Execute, ReadLane
from database.driver.request import Request, taken_from
from database.driver.wakeup import Waker

__all__ = ["BUDGET", "TURN", "Inline"]

BUDGET = 0.0001
"""Seconds after which an inline read is stopped."""

TURN = 0.0002
"""Seconds of inline reads in one turn of the loop."""

CROWD = 12
"""Answers handed out together from which on those who got them ask the lane again."""

PATIENCE = 5000
"""Reads that then go to the lane before it is tried again: who asks together mostly goes on doing so."""

NEW = 2
"""Quick runs on the worker that make a text known as quick."""

RELAPSE = 16
"""The same for a text that was not; doubled each time, up to `MOST`."""

MOST = 4096

TEXTS = 2000
"""Texts that are remembered."""

LOGGED = 0.001
"""A threshold for logging (seconds) below which statements are logged one by one, and so not run here."""


_UNKNOWN = [0, 0]


class Inline:
    """One pool's."""

    __slots__ = ("_crowded", "_lane", "_left", "_next_turn", "_waiting", "_waker", "queue", "texts", "total")

    def __init__(self, waker: Waker, lane: ReadLane) -> None:
        self._waker = waker
        self._lane = lane
        lane.timed = self.timed
        self.queue: deque[Request] = deque()
        """Requests that wait for the loop's next turn."""
        self._next_turn: Callable[[Callable[[], None]], None] = waker.next_turn
        self._left = TURN
        """Seconds left in this turn."""
        self._waiting = False
        """Whether the next turn has been asked for."""
        self._crowded = 0
        """Reads that are still to be left to the lane, since so many were answered together."""
        self.texts: dict[str, list[int]] = {}
        """By text: quick runs on the worker that it still owes, and how many it owes after the next relapse."""
        self.total = 0

    # Loop thread

    def read(self, request: Request) -> bool:
        """Runs the request here, now or in the loop's next turn, if it is one for that; False: it is the lane's."""
        known = self.texts.get(request.subject.sql)
        if self._waker.crowd > CROWD:
            self._crowded = PATIENCE
            return False
        if self._crowded:
            self._crowded -= 1
            return False
        if known is None or known[0] > 0 or not self._free():
            return False
        if self._left > 0:
            return self._run(request)
        if len(self.queue) >= CROWD:
            return False
        request.home = self
        request.queued_at = perf_counter()
        self.queue.append(request)
        return True

    def _free(self) -> bool:
        """Whether the lane has a reader that nobody else wants."""
        lane = self._lane
        worker = lane.resident
        return worker is not None and worker.sleeping and not lane.queue and not worker.yielding

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return taken_from(self.queue, request)

    def stop(self, request: Request) -> None:
        """See `Home`. What runs here runs on the thread that would stop it."""

    def give_up(self) -> None:
        """Hands over to the lane what has waited for the next turn."""
        while self.queue:
            self._lane.submit(self.queue.popleft())

    def _turn(self) -> None:
        self._waiting = False
        self._left = TURN
        queue = self.queue
        while queue and self._left > 0:
            request = queue.popleft()
            if self._free() and self._run(request):
                self._waker.answer(request)
            else:
                self._lane.submit(request)
                self.give_up()
                return

    def _run(self, request: Request) -> bool:
        """Runs it on the connection of a worker that rests; False if that has to do it."""
        worker = self._lane.resident
        assert worker is not None
        threshold = worker.observer.threshold()
        lent = worker.lent
        assert lent is not None
        if (threshold is not None and threshold < LOGGED) or not lent.acquire(blocking=False):
            return False
        try:
            connection = worker.connection
            if connection is None or not worker.sleeping:
                return False
            began = perf_counter()
            worker.until = began + BUDGET
            try:
                result = request.operation(connection, request.subject, request.params, request.extra)  # type: ignore[misc]
            except Exception:
                result = self
            finally:
                worker.until = 0.0
            seconds = perf_counter() - began
        finally:
            lent.release()
        self._left -= seconds
        if not self._waiting:
            self._waiting = True
            self._next_turn(self._turn)
        known = self.texts.get(request.subject.sql, _UNKNOWN)
        if seconds > BUDGET:
            self._relapse(known)
        elif known[1] > RELAPSE:
            known[1] -= 1
        if result is self:
            return False
        request.result = result
        request.answered = True
        worker.statements += 1
        self.total += 1
        return True

    # Worker's thread, and the loop's: each entry is a list of its own, whose items are assigned, nothing more

    @staticmethod
    def _relapse(known: list[int]) -> None:
        known[0] = known[1]
        known[1] = min(2 * known[1], MOST)

    def learn(self, request: Request, seconds: float) -> None:
        """A read has run on the worker, for so long."""
        text = getattr(request.subject, "sql", "")
        if not text:  # no statement
            return
        known = self.texts.get(text)
        if known is None:
            if len(self.texts) >= TEXTS:
                self.texts.clear()
            self.texts[text] = [NEW - 1, RELAPSE] if seconds < BUDGET else [RELAPSE, 2 * RELAPSE]
        elif seconds > BUDGET or request.error is not None:
            self._relapse(known)
        elif known[0] > 0:
            known[0] -= 1

    def timed(self, execute: Execute) -> Execute:
        """The worker's `execute`, with a clock around it: what the lane is to use."""
        texts = self.texts

        def run(request: Request) -> None:
            known = texts.get(getattr(request.subject, "sql", ""))
            if known is not None and known[0] <= 0:  # quick as far as is known: inline, the clock would tell
                execute(request)
                return
            began = perf_counter()
            execute(request)
            self.learn(request, perf_counter() - began)

        return run
