"""The lanes of a database whose connections all read and write: no single writer, no connections that only read.

Autocommit statements wait here as in the other lanes (`lane.py`), but a connection's answer comes from a server, so a
worker waits more than it works. Two things follow. Statements that are known to be quick are sent together, in one round
trip (`Backend.run_together`), each still its own transaction. And where statements are slow, or unknown, further workers
join in, as many as the pool has.

Reads and writes have a lane each only because units of work are begun read-only or not; both stand in the pool's one line,
together with the transactions, first come, first served: a lane gets in line where its oldest statement belongs, and its
workers leave when a transaction has waited longer than that.

Threads. As in `lane.py`: `submit`, `withdraw` and the notices run on the loop's thread, `serve` on a worker's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from time import perf_counter

from database.driver.lane import BATCH_SECONDS, BATCH_SIZE, Lane
from database.driver.lease import Lease
from database.driver.request import STATEMENT, Request
from database.driver.roles import Owner
from database.driver.worker import Servable, Worker
from database.engine.contract import Interrupted

__all__ = ["SharedLane"]

TOGETHER = 64
"""Statements that are sent together, at the most."""

ENOUGH = 32
"""Quick statements in the queue for each worker, from which one more worker is worth its wake-up."""


class SharedLane(Lane):
    """Autocommit statements on connections that are everybody's."""

    __slots__ = ("alone", "busy", "readonly", "serving", "slowly")

    def __init__(self, pool: Owner[Lease], *, readonly: bool) -> None:
        super().__init__(pool)
        self.readonly = readonly
        self.queue: deque[Request] = deque()
        self.serving: set[Worker] = set()
        self.busy: set[Worker] = set()
        """Those of `serving` that are about something that takes its time."""
        self.alone: set[Request] = set()
        """Statements in the queue that are not to be sent together with others again."""
        self.slowly = True
        """Whether statements are run one by one at the moment, so that each may need a worker. Set by the workers."""

    # Loop thread

    def submit(self, request: Request) -> None:
        """Queues a statement, and has one more worker come if those at it have enough to do."""
        request.home = self
        request.queued_at = perf_counter()
        self.queue.append(request)
        self._call_for_help()

    def _call_for_help(self) -> None:
        working = len(self.serving) - len(self.busy)
        if len(self.queue) > working * (1 if self.slowly else ENOUGH) and not self.pool.in_line(self):
            self.pool.join(self)

    def withdraw(self, request: Request) -> bool:
        """See `Home`."""
        self.alone.discard(request)
        return super().withdraw(request)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        for worker in tuple(self.serving):
            worker.interrupt(request)

    @property
    def queued_at(self) -> float:
        """Since when its oldest statement waits, which is what it stands in the pool's line for."""
        try:
            return self.queue[0].queued_at
        except IndexError:  # a worker was quicker
            return float("inf")

    def given(self, worker: Worker) -> None:
        """The pool gives the lane a connection."""
        self.serving.add(worker)
        worker.give(self)
        if self.queue:
            self._call_for_help()

    def look(self) -> None:
        """Called every few milliseconds while a worker is at work."""
        if self.queue:
            self.pool.watch()

    @property
    def served(self) -> bool:
        """Whether a worker is at the queue, and will empty it."""
        return bool(self.serving)

    @property
    def workers(self) -> AbstractSet[Worker]:
        """Those whose current request has come from here."""
        return self.serving

    @property
    def active(self) -> int:
        """How many connections are at work here: a worker with nothing to do leaves."""
        return len(self.serving)

    def _occupied(self, worker: Worker) -> None:
        """A worker is about something that may take its time: others see to the queue."""
        if worker in self.serving:
            self.busy.add(worker)
            if self.queue:
                self._call_for_help()

    def _left(self, worker: Worker) -> None:
        self.serving.discard(worker)
        self.busy.discard(worker)
        if self.pool.closing and not self.serving:
            self.pool.refuse_the_rest()
        if self.queue and len(self.serving) == len(self.busy) and not self.pool.in_line(self):
            self.pool.line_up(self)  # more came after the worker had looked, or a transaction's turn came first
        self.pool.free(worker)

    # Worker thread

    def serve(self, worker: Worker) -> Servable | None:
        """Runs what waits until nothing does, or until somebody else's turn has come."""
        pool = self.pool
        backend = pool.backend
        may_join = backend.may_join
        slow = False

        def on_slow() -> None:
            nonlocal slow
            if not slow:
                slow = True
                pool.waker.post([], lambda: self._occupied(worker))

        worker.attend(on_slow)
        queue = self.queue
        since = perf_counter()
        request: Request | None = None
        try:
            while True:
                try:
                    request = queue.popleft()
                except IndexError:
                    break
                if request.kind != STATEMENT:
                    on_slow()
                    worker.flush()  # what is answered already need not wait for this one
                    worker.perform(request, readonly=self.readonly)
                    worker.answers.append(request)
                elif may_join is not None and may_join(request) and not self._is_alone(request):
                    self.slowly = False
                    if queue:
                        self._together(worker, request)
                    else:
                        worker.execute(request)
                        worker.answers.append(request)
                else:
                    self.slowly = True
                    if queue:
                        pool.waker.post([], self._call_for_help)
                    worker.execute(request)
                    worker.answers.append(request)
                now = perf_counter()
                if len(worker.answers) >= BATCH_SIZE or now - since > BATCH_SECONDS:
                    worker.flush()
                    since = now
                if (slow and not pool.closing) or not self._my_turn():
                    break  # whoever was called goes on
        except BaseException as defect:
            worker.fail(defect, [request])
        worker.resting = worker.lent is not None  # it touches nothing on its way to the inbox
        worker.finish(lambda: self._left(worker))
        return None

    def _my_turn(self) -> bool:
        """Whether no transaction that waits for a connection has come before the next statement."""
        first = self.pool.first_lease()
        if first is None:
            return True
        try:
            return self.queue[0].queued_at < first.queued_at
        except IndexError:
            return True

    def _is_alone(self, request: Request) -> bool:
        if request in self.alone:
            self.alone.discard(request)
            return True
        return False

    def _together(self, worker: Worker, first: Request) -> None:
        """Sends what waits and is quick in one go; runs alone what could not be answered that way."""
        backend = self.pool.backend
        may_join, run_together = backend.may_join, backend.run_together
        assert may_join is not None
        assert run_together is not None
        requests = [first]
        queue = self.queue
        while len(requests) < TOGETHER and self._my_turn():
            try:
                request = queue.popleft()
            except IndexError:
                break
            if request.kind != STATEMENT or not may_join(request) or request in self.alone:
                queue.appendleft(request)
                break
            requests.append(request)
        again: list[Request] = []
        answered: set[Request] = set()
        threshold = worker.threshold
        began = 0.0

        def begin(request: Request) -> None:
            nonlocal began
            began = perf_counter()
            worker.turn_to(request)

        def end(request: Request, error: BaseException | None) -> None:
            worker.left()
            worker.statements += 1
            if error is not None:
                request.error = worker.translate(error, request)
            if threshold is not None:
                seconds = perf_counter() - began
                if seconds >= threshold:
                    worker.tell(request, worker.observer.statement, request, seconds, worker.name)
            answered.add(request)
            worker.answers.append(request)

        try:
            connection = worker.ready()
            again = run_together(connection, requests, begin, end)
        except BaseException as error:
            worker.left()
            translated = worker.translate(error, None)
            for request in requests:
                if request not in answered:
                    request.error = translated
                    worker.answers.append(request)
            return
        for request in reversed(again):
            if request.cancelled:
                request.error = Interrupted()
                worker.answers.append(request)
            else:  # back to the queue, not run here: one of them may wait for a lock, and the others not
                self.alone.add(request)
                queue.appendleft(request)
