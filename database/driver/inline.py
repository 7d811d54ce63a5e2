"""Small reads where they are: on the event loop's own thread, on the connection of a worker whose thread waits.

One task pays some 80 µs for a statement of which SQLite needs 12: the rest is two threads waking each other. So a read
that is known to be quick is run by the caller's thread itself, when nobody else wants the connection. Opt-in
(`inline_reads: true`), for while it runs, the loop does nothing else.

What runs inline. A single autocommit read, when the lane's reader sleeps and its queue is empty; and reads within
transactions (`database.driver.inline_lease`). The text has been quick on the worker. Never a write, a script, a unit of
work, a stream, or a statement that is logged one by one: handlers may block.

What bounds it. SQLite's progress handler stops a statement after `quick.BUDGET` seconds; it is then run again on the worker,
and its text stays there for a while. What the handler does not see (a page that comes from the disk) is learnt by the clock,
as the worker's own runs are: see `database.driver.quick`. Whatever fails is run again on the worker, which knows how to wait,
to replace the connection, and to say what was wrong. And in one turn of the loop all inline reads together, and the callers'
Python between them, take a limited time: what comes after that waits for the next turn, so that others have theirs, or goes to
the worker. The Python counts, for it is half of a call.

How long a turn is. A timer of asyncio's needs up to three turns to be heard (it is due, its future is done, its task goes on),
so three times the limit is the lag. Where nobody waits there is nobody to be late: so a loop is asked (`Waker.is_alone`), and a
turn is long while nobody stands in line and no timer is due, but short as soon as somebody does.

When much is going on, the lane is better: it answers a hundred tasks with one wake-up. So nothing runs inline outside of
transactions while more than `CROWD` answers are being handed out. Transactions have no lane, and so know no crowd.

Threads. Everything here runs on the loop's thread but for what stands under "Worker's thread". Why that may use the
connection says `database.driver.worker` under "Lending".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextvars import Context
from functools import partial
from time import perf_counter
from typing import Any, Protocol, cast

from database.driver import quick
from database.driver.line import Line
from database.driver.observer import LOGGED, Observer, aside
from database.driver.quick import Quick
from database.driver.read_lane import ReadLane
from database.driver.request import STATEMENT, Request, taken_from
from database.driver.wakeup import Waker
from database.driver.worker import Worker
from database.engine.adapting import AS_IS
from database.engine.contract import Operation
from database.engine.statement import READ, Statement

__all__ = ["ALONE", "HARD_TURN", "TURN", "Done", "Inline", "Waiting"]

TURN = 0.00005
"""Seconds from the first inline read of a turn of the loop, after which there are no more in it where the loop does not say
whether anybody else waits."""

HARD_TURN = 0.000001
"""The same where it does, and somebody waits: one read."""

ALONE = 0.0002
"""How much longer it may take where nobody waits. Whoever comes meanwhile, by a socket, waits for so long at the most."""

SHARE = 0.00005
"""Seconds for which one task may go on reading while others wait for the same."""

CROWD = 12
"""Answers handed out together from which on those who got them ask the lane again."""

PATIENCE = 5000
"""Reads that then go to the lane before it is tried again: who asks together mostly goes on doing so."""

QUEUE = 1000
"""Requests of transactions that wait for the next turn, at the most."""

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


class Done:
    """The answer of a read that has run: to be awaited as a request is."""

    __slots__ = ("result",)
    result: Any

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.result
        yield


class Inline:
    """One pool's."""

    __slots__ = (
        "_crowded",
        "_lane",
        "_last",
        "_line",
        "_next_turn",
        "_quiet",
        "_share",
        "_threshold",
        "_turn_seconds",
        "_until",
        "_waiting",
        "_waker",
        "_workers",
        "queue",
        "quick",
        "total",
    )

    def __init__(self, waker: Waker, lane: ReadLane, line: Line[Any], workers: Callable[[], Iterable[Worker]]) -> None:
        self._waker = waker
        self._lane = lane
        self._line = line
        self._workers = workers
        self.queue: deque[Request] = deque()
        """Requests that wait for the loop's next turn. Their homes are `Waiting`."""
        self._next_turn: Callable[[Callable[[], None]], None] = waker.next_turn
        self._turn_seconds = HARD_TURN if waker.tells_who_waits else TURN
        self._until = self._last = self._share = 0.0
        """When this turn's time is used up, or 0 where nothing has run in it yet; when the last read was over; and until when
        the request that was resumed last, and what its task reads next, come before others that wait."""
        self._waiting = False
        """Whether the next turn has been asked for."""
        self._quiet: bool | None = None
        """Whether nobody wants to hear of each statement; None where it has not been asked in this turn."""
        self._threshold: float | None = None
        """Seconds from which a statement is reported."""
        self._crowded = 0
        """Reads that are still to be left to the lane, since so many were answered together."""
        self.quick = Quick()
        self.total = 0

    # Single reads

    def send(self, operation: Operation, statement: Statement, params: Any, extra: Any) -> Awaitable[Any]:
        """Runs a read here, if it is one for that; else makes a request of it, for the loop's next turn or for the lane.

        Gives what its answer is to be awaited from.
        """
        known = self.quick.texts.get(statement.sql)
        waits = False
        if self._waker.crowd > CROWD:
            self._crowded = PATIENCE
        elif self._crowded:
            self._crowded -= 1
        elif known is None or known[0] > 0:
            operation = self.quick.clocked(operation)
        elif self._free():
            if (self.queue and self.others_first) or (self._until and self._last >= self._until and self.spent):
                waits = len(self.queue) < CROWD
            elif extra is AS_IS:
                done = self._run_at_once(operation, statement, params)
                if done is not None:
                    return done
            else:
                request = self._waker.request(STATEMENT, operation, statement, params, extra)
                if not self._run(request):
                    self._lane.submit(request)
                return request
        request = self._waker.request(STATEMENT, operation, statement, params, extra)
        if waits:
            request.home = self
            self.wait(request)
        else:
            self._lane.submit(request)
        return request

    def _free(self) -> bool:
        """Whether the lane has a reader that nobody else wants."""
        lane = self._lane
        worker = lane.resident
        if worker is None or not worker.sleeping or lane.queue or worker.yielding:
            return False
        room = worker.room
        return room is None or not room.held

    def _run_at_once(self, operation: Operation, statement: Statement, params: Any) -> Done | None:
        """Runs a read of plain values without even a request; None: it is the lane's."""
        worker = self._lane.resident
        assert worker is not None
        lent = worker.lent
        assert lent is not None
        if not (self._quiet or self.quiet(worker.observer)) or not lent.acquire(blocking=False):
            return None
        try:
            connection = worker.connection
            if not worker.resting or connection is None or not connection.plain:
                return None
            done, failure = self.run(worker, operation, connection, statement, params)
            return None if failure is not None else done
        finally:
            lent.release()

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
        """Whether nothing is left of this turn: others wait for theirs, or may."""
        until, last = self._until, self._last
        if not until or last < until:
            return False
        return last >= until + ALONE or not self._waker.is_alone(int(self._waiting))

    @property
    def others_first(self) -> bool:
        """Whether others wait, and the one that has been resumed last has had its share."""
        return bool(self.queue) and self._last >= self._share

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
        if quiet is None:  # once a turn
            threshold = self._threshold = observer.threshold()
            quiet = self._quiet = threshold is None or threshold >= LOGGED
            self._come_again()
        return quiet

    def execute(self, worker: Worker, request: Request) -> BaseException | None:
        """Runs the request on the connection of a worker that rests, and keeps its result in it.

        The caller holds the lock. Gives the error if there was one; then it is to be run again on the worker.
        """
        done, failure = self.run(
            worker,
            request.operation,
            worker.connection,
            request.subject,
            request.params,
            request.extra,
            request.context,
        )
        if failure is None:
            request.result = done.result
            request.answered = True
            request.context = None
        return failure

    def run(
        self,
        worker: Worker,
        operation: Operation | None,
        connection: Any,
        statement: Statement,
        params: Any,
        extra: Any = AS_IS,
        context: Context | None = None,
    ) -> tuple[Done, Exception | None]:
        """Runs a read on the connection of a worker that rests; the caller holds the lock. Gives its answer, or the error.

        Without a `context` it runs in the current one, which is its caller's.
        """
        assert operation is not None
        done = Done()
        failure: Exception | None = None
        began = perf_counter()
        self._until = self._until or began + self._turn_seconds
        worker.until = began + quick.BUDGET
        try:
            if context is None or (extra is AS_IS and connection.plain):
                done.result = operation(connection, statement, params, extra)
            else:
                done.result = context.run(operation, connection, statement, params, extra)
        except Exception as error:
            failure = error
        finally:
            worker.until = 0.0
            self._last = last = perf_counter()
        if not self._waiting:
            self._come_again()
        seconds = last - began
        if seconds > quick.BUDGET:
            if failure is not None or not self._contended():
                self.quick.judge(statement.sql, seconds, stopped=failure is not None)
        elif self.quick.doubts:
            self.quick.judge(statement.sql, seconds, stopped=False)
        if failure is None:
            worker.statements += 1
            self.total += 1
            threshold = self._threshold
            if threshold is not None and seconds >= threshold:  # of a page that came from a slow disk nobody could know
                request = self._waker.request(STATEMENT, operation, statement, params, extra)
                tell = partial(worker.tell, None, worker.observer.statement, request, seconds, worker.name)
                aside(partial((context or request.context).run, tell))
        return done, failure

    def _contended(self) -> bool:
        """Whether a worker is awake, and so wants the GIL: what was late beside it may have waited for that."""
        return not all(worker.resting for worker in self._workers())

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
                self._share = perf_counter() + SHARE
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
        return self.quick.knows(statement.sql)

    def clock(self, request: Request) -> None:
        """Has the worker look at the clock when it executes this read."""
        assert request.operation is not None
        request.operation = self.quick.clocked(request.operation)
