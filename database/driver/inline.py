"""Small reads where they are: on the event loop's own thread, on the connection of a worker whose thread waits.

One task pays some 80 µs for a statement of which SQLite needs 12: the rest is two threads waking each other. So a read
that is known to be quick is run by the caller's thread itself, when nobody else wants the connection. Opt-in
(`inline_reads: true`), for while it runs, the loop does nothing else.

What runs inline. A single autocommit read, when the lane's reader sleeps and its queue is empty; and reads within
transactions (`database.driver.inline_lease`). The text has been quick on the worker. Never a write, a script, a unit of
work, a stream, or a statement that is logged one by one: handlers may block.

What bounds it. SQLite's progress handler stops a statement after `BUDGET` seconds; it is then run again on the worker, and
its text stays there for the next runs, twice as many after each relapse. What the handler does not see (a page that comes
from the disk) is learnt by the clock, as the worker's own runs are. Whatever fails is run again on the worker, which knows
how to wait, to replace the connection, and to say what was wrong. And in one turn of the loop all inline reads together,
and the callers' Python between them, take `TURN` seconds: what comes after that waits for the next turn, so that others have
theirs, or goes to the worker. The Python counts, for it is three quarters of a call; and a timer of asyncio's needs up to three
turns to be heard (it is due, its future is done, its task goes on). So `TURN` times three is the lag.

When much is going on, the lane is better: it answers a hundred tasks with one wake-up. So nothing runs inline outside of
transactions while more than `CROWD` answers are being handed out. Transactions have no lane, and so know no crowd.

Threads. Everything here runs on the loop's thread but for what stands under "Worker's thread". Why that may use the
connection says `database.driver.worker` under "Lending".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, Protocol, cast

from database.driver.line import Line
from database.driver.observer import Observer, aside
from database.driver.read_lane import ReadLane
from database.driver.request import STATEMENT, Request, taken_from
from database.driver.wakeup import Waker
from database.driver.worker import Worker
from database.engine.adapting import AS_IS
from database.engine.contract import Operation
from database.engine.statement import READ, Statement

__all__ = ["BUDGET", "TURN", "Inline", "Waiting"]

BUDGET = 0.0001
"""Seconds after which an inline read is stopped."""

TURN = 0.00005
"""Seconds from the first inline read of a turn of the loop, after which there are no more in it."""

CROWD = 12
"""Answers handed out together from which on those who got them ask the lane again."""

PATIENCE = 5000
"""Reads that then go to the lane before it is tried again: who asks together mostly goes on doing so."""

QUEUE = 1000
"""Requests of transactions that wait for the next turn, at the most."""

NEW = 2
"""Quick runs on the worker that make a text known as quick."""

RELAPSE = 16
"""The same for a text that was not; doubled each time, up to `MOST`."""

MOST = 4096

AGAIN = 4
"""How many more for each run on the worker that was not quick. It may have waited for the GIL."""

STRIKE = 16
"""What an inline read counts that was late, but came to its end, and how many quick ones make up for it."""

STRIKES = 40
"""From more than this on, it is the statement and not the machine."""

TEXTS = 2000
"""Texts that are remembered."""

LOGGED = 0.001
"""A threshold for logging (seconds) below which statements are logged one by one, and so not run here."""

READS = frozenset({"fetch_one", "fetch_all", "fetch_value", "call_aiosql"})
"""The operations that are over when they return; a stream leaves a cursor behind."""


class Waiting(Protocol):
    """Where a request has come from that waits for the next turn of the loop."""

    def resume(self, request: Request) -> bool:
        """Its turn has come: whether it has been answered. Else it has been handed to a worker."""
        ...

    def hand_on(self) -> None:
        """Hands to a worker what waits, instead of letting it wait any longer."""
        ...


class Inline:
    """One pool's."""

    __slots__ = (
        "_crowded",
        "_lane",
        "_last",
        "_line",
        "_next_turn",
        "_quiet",
        "_threshold",
        "_until",
        "_waiting",
        "_waker",
        "queue",
        "texts",
        "total",
    )

    def __init__(self, waker: Waker, lane: ReadLane, line: Line[Any]) -> None:
        self._waker = waker
        self._lane = lane
        self._line = line
        self.queue: deque[Request] = deque()
        """Requests that wait for the loop's next turn. Their homes are `Waiting`."""
        self._next_turn: Callable[[Callable[[], None]], None] = waker.next_turn
        self._until = self._last = 0.0
        """When this turn's time is used up, or 0 where nothing has run in it yet; and when the last read was over."""
        self._waiting = False
        """Whether the next turn has been asked for."""
        self._quiet: bool | None = None
        """Whether nobody wants to hear of each statement; None where it has not been asked in this turn."""
        self._threshold: float | None = None
        """Seconds from which a statement is reported."""
        self._crowded = 0
        """Reads that are still to be left to the lane, since so many were answered together."""
        self.texts: dict[str, list[int]] = {}
        """By text: quick runs on the worker that it still owes, how many it owes after the next relapse, and its strikes."""
        self.total = 0

    # Single reads

    def submit(self, request: Request) -> None:
        """Runs the request here, now or in the loop's next turn, if it is one for that; else hands it to the lane."""
        if not self._read(request):
            self._lane.submit(request)

    def _read(self, request: Request) -> bool:
        if self._waker.crowd > CROWD:
            self._crowded = PATIENCE
            return False
        if self._crowded:
            self._crowded -= 1
            return False
        known = self.texts.get(request.subject.sql)
        if known is None or known[0] > 0:
            self.clock(request)
            return False
        if not self._free():
            return False
        if not self._until or self._last < self._until:
            return self._run(request)
        if len(self.queue) >= CROWD:
            return False
        request.home = self
        self.wait(request)
        return True

    def _free(self) -> bool:
        """Whether the lane has a reader that nobody else wants."""
        lane = self._lane
        worker = lane.resident
        if worker is None or not worker.sleeping or lane.queue or worker.yielding:
            return False
        room = worker.room
        return room is None or not room.held

    def _run(self, request: Request) -> bool:
        worker = self._lane.resident
        assert worker is not None
        lent = worker.lent
        assert lent is not None
        if not self.quiet(worker.observer) or not lent.acquire(blocking=False):
            return False
        try:
            return worker.resting and worker.connection is not None and self.execute(worker, request) is None
        finally:
            lent.release()

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        return taken_from(self.queue, request)

    def stop(self, request: Request) -> None:
        """See `Home`. What runs here runs on the thread that would stop it."""

    def resume(self, request: Request) -> bool:
        """See `Waiting`."""
        if self._free() and self._run(request):
            return True
        self._lane.submit(request)
        self.hand_on()
        return False

    def hand_on(self) -> None:
        """See `Waiting`."""
        mine = [request for request in self.queue if request.home is self]
        for request in mine:
            self.queue.remove(request)
            self._lane.submit(request)

    # All that runs here

    @property
    def spent(self) -> bool:
        """Whether nothing is left of this turn."""
        return self._until != 0.0 and self._last >= self._until

    @property
    def full(self) -> bool:
        """Whether too many wait already for the next turn."""
        return len(self.queue) >= QUEUE

    def wait(self, request: Request) -> None:
        """Has the request wait for the next turn. Its home is set."""
        request.queued_at = perf_counter()
        self.queue.append(request)
        self._come_again()

    def give_up(self) -> None:
        """The pool closes: hands over to workers what has waited for the next turn."""
        while self.queue:
            cast("Waiting", self.queue[0].home).hand_on()

    def quiet(self, observer: Observer) -> bool:
        """Whether statements may run here, because nobody wants to hear of each of them."""
        quiet = self._quiet
        if quiet is None:
            threshold = self._threshold = observer.threshold()
            quiet = self._quiet = threshold is None or threshold >= LOGGED
            self._come_again()
        return quiet

    def execute(self, worker: Worker, request: Request) -> BaseException | None:
        """Runs the request on the connection of a worker that rests, and keeps its result in it.

        The caller holds the lock. Gives the error if there was one; then it is to be run again on the worker.
        """
        result: Any = None
        failure: BaseException | None = None
        connection = worker.connection
        assert connection is not None
        began = perf_counter()
        self._until = self._until or began + TURN
        worker.until = began + BUDGET
        try:
            if request.extra is AS_IS and connection.plain:
                result = request.operation(connection, request.subject, request.params, request.extra)  # type: ignore[misc]
            else:
                result = request.context.run(
                    request.operation, connection, request.subject, request.params, request.extra
                )
        except Exception as error:
            failure = error
        finally:
            worker.until = 0.0
            self._last = perf_counter()
            seconds = self._last - began
        if not self._waiting:
            self._come_again()
        known = self.texts.get(request.subject.sql)
        if known is not None and (seconds > BUDGET or known[1] > RELAPSE or known[2]):
            self._judge(known, seconds, stopped=failure is not None)
        if failure is not None:
            return failure
        request.result = result
        context, request.context = request.context, None
        request.answered = True
        worker.statements += 1
        self.total += 1
        threshold = self._threshold
        if threshold is not None and seconds >= threshold:  # of a page that came from a slow disk nobody could know
            aside(partial(context.run, worker.tell, None, worker.observer.statement, request, seconds, worker.name))
        return None

    def _come_again(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._next_turn(self._turn)

    def _turn(self) -> None:
        self._waiting = False
        self._until = 0.0
        self._quiet = None
        queue = self.queue
        try:
            while queue and not self.spent:
                request = queue.popleft()
                if cast("Waiting", request.home).resume(request):
                    self._waker.answer(request)
        finally:
            if queue:  # or something has been raised out of a task
                self._come_again()

    # Connections for transactions that run here

    def borrow(self) -> tuple[Worker, bool] | None:
        """A reader that nobody wants, and whether it is the lane's. It has not been woken."""
        line = self._line
        if line.leases or line.lanes:
            return None
        worker = line.lend()
        of_lane = worker is None
        if worker is None:
            worker = self._lane.lend()
            if worker is None:
                return None
        room = worker.room
        if room is not None and room.held:
            self.give_back(worker, of_lane=of_lane)
            return None
        return worker, of_lane

    def give_back(self, worker: Worker, *, of_lane: bool) -> None:
        """It has not been woken meanwhile."""
        line = self._line
        if not of_lane or line.leases or line.lanes or not self._lane.take_back(worker):
            line.free(worker)

    # What is quick

    def is_quick(self, request: Request) -> bool | None:
        """Whether the request is a read that is known to be quick; None: it is no read for this place at all."""
        statement = request.subject
        if (
            request.kind != STATEMENT
            or getattr(statement, "kind", None) != READ
            or getattr(request.operation, "__name__", None) not in READS
        ):
            return None
        known = self.texts.get(statement.sql)
        return known is not None and known[0] <= 0

    def clock(self, request: Request) -> None:
        """Has the worker look at the clock when it executes this read."""
        assert request.operation is not None
        request.operation = partial(self._timed, request.operation)

    @staticmethod
    def _judge(known: list[int], seconds: float, *, stopped: bool) -> None:
        """A read has run on the loop's thread. One that was late all the same may have been kept waiting by the machine."""
        if seconds > BUDGET:
            known[2] += STRIKE
            if stopped or known[2] > STRIKES:
                known[0], known[1], known[2] = known[1], min(2 * known[1], MOST), 0
        else:
            known[1] = max(known[1] - 1, RELAPSE)
            known[2] = max(known[2] - 1, 0)

    # Worker's thread, and the loop's: each entry is a list of its own, whose items are assigned, nothing more

    def _timed(self, operation: Operation, connection: Any, statement: Statement, params: Any, extra: Any) -> Any:
        began = perf_counter()
        quick = False
        try:
            result = operation(connection, statement, params, extra)
            quick = perf_counter() - began < BUDGET
        finally:
            self._learn(statement.sql, quick=quick)
        return result

    def _learn(self, text: str, *, quick: bool) -> None:
        """A read has run on the worker."""
        known = self.texts.get(text)
        if known is None:
            if len(self.texts) >= TEXTS:
                self.texts.clear()
            self.texts[text] = [NEW - 1 if quick else RELAPSE, RELAPSE, 0]
        elif not quick:
            known[0] = min(known[0] + AGAIN, MOST)
        elif known[0] > 0:
            known[0] -= 1
