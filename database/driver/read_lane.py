"""The lane of autocommit reads, where readers only read.

One worker runs them one after the other. The exception is a statement that turns out to be slow: then the worker calls
for another reader to go on with the queue.

The lane's worker is the pool's to take away while it sleeps, and leaves by itself when somebody else waits for a reader and
none is free: the lane takes its turn like everybody.

Threads. As in `lane.py`: `serve` runs on the worker's thread, everything else on the loop's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from time import perf_counter

from database.driver.lane import BATCH_SECONDS, BATCH_SIZE, Lane
from database.driver.lease import Lease
from database.driver.request import UNIT, Request
from database.driver.roles import Owner
from database.driver.worker import WAKE, Servable, Worker

__all__ = ["ReadLane"]


class ReadLane(Lane):
    """Autocommit reads."""

    __slots__ = ("queued_at", "resident", "serving")

    def __init__(self, pool: Owner[Lease]) -> None:
        super().__init__(pool)
        self.queue: deque[Request] = deque()
        self.serving: set[Worker] = set()
        self.resident: Worker | None = None
        """The one of `serving` that is not held up by a slow statement."""
        self.queued_at = 0.0
        """Since when it stands in the pool's line, if it does."""

    # Loop thread

    @property
    def served(self) -> bool:
        """Whether a worker is at the queue, and will empty it."""
        return bool(self.serving)

    def submit(self, request: Request) -> None:
        """Queues a read, and has a reader come if none is at it."""
        request.home = self
        request.queued_at = perf_counter()
        self.queue.append(request)
        worker = self.resident
        if worker is None:
            self._claim()
        elif worker.sleeping:
            worker.sleeping = False
            self.pool.rouse(worker)

    def stop(self, request: Request) -> None:
        """See `Home`."""
        request.cancelled = True
        for worker in tuple(self.serving):
            worker.interrupt(request)

    def given(self, worker: Worker) -> None:
        """The pool gives the lane a reader."""
        self.serving.add(worker)
        self.resident = worker
        worker.yielding = worker.sleeping = False
        worker.inbox.put(self)
        self.pool.look_now_and_then()

    def _claim(self) -> None:
        """Gets in line, unless it stands there."""
        if not self.pool.in_line(self):
            self.queued_at = perf_counter()
            self.pool.join(self)

    @property
    def workers(self) -> AbstractSet[Worker]:
        """Those whose current request has come from here."""
        return self.serving

    @property
    def resting(self) -> int:
        """1 if its reader has nothing to do, else 0."""
        return int(self.resident is not None and self.resident.sleeping)

    @property
    def working(self) -> bool:
        """Whether a worker has something to do here, and so needs the GIL."""
        return any(not worker.sleeping for worker in self.serving)

    def spare(self) -> Worker | None:
        """Gives the reader away if it sleeps; else has it leave at its next opportunity."""
        worker = self.resident
        if worker is None:
            return None
        worker.yielding = True
        if not worker.sleeping:  # looked at second: the worker looks at `yielding` after it has set `sleeping`
            return None
        self.resident = None
        self.serving.discard(worker)
        if self.queue:  # it came when the worker had looked and did not yet count as asleep
            self.queued_at = perf_counter()
            self.pool.line_up(self)
        return worker

    def lend(self) -> Worker | None:
        """Gives the reader away without waking it, if nobody else wants it."""
        worker = self.resident
        if worker is None or not worker.sleeping or worker.yielding or self.queue or worker.connection is None:
            return None
        self.resident = None
        self.serving.discard(worker)
        return worker

    def take_back(self, worker: Worker) -> bool:
        """The reader that was lent is the lane's again, if that has no other by now. It has not been woken."""
        if self.resident is not None or self.queue:
            return False
        self.serving.add(worker)
        self.resident = worker
        return True

    def look(self) -> None:
        """Called every few milliseconds while a worker is at work: sees to those that wait behind one long request.

        SQLite's progress handler tells of a slow statement sooner, but not of a function that spends its time in Python.
        """
        if not self.queue:
            return
        self.pool.watch()
        worker = self.resident
        if worker is None or worker.sleeping or not worker.dwells:
            return
        worker.yielding = True  # when it is through with this, it need not come back
        self.resident = None
        if worker.sleeping:  # it has just got through; looked at second, as in `spare`
            self.serving.discard(worker)
            self.pool.free(worker)
        if self.queue:
            self._claim()

    def _held_up(self, worker: Worker) -> None:
        if worker is self.resident and worker.current is not None:
            self.resident = None
            if self.queue:
                self._claim()

    def _left(self, worker: Worker) -> None:
        if worker not in self.serving:  # it was given away at the very moment
            return
        self.serving.discard(worker)
        if worker is self.resident:
            self.resident = None
        if self.pool.closing and not self.serving:
            self.pool.refuse_the_rest()
        if self.queue and self.resident is None and not self.pool.in_line(self):
            self.queued_at = perf_counter()
            self.pool.line_up(self)  # more came after the worker had looked
        self.pool.free(worker)

    # Worker thread

    def serve(self, worker: Worker) -> Servable | None:
        """Runs what waits, again and again, until the pool wants the worker for something else.

        Or until another reader has taken over behind a slow statement: two busy threads are slower than one. Unless the
        other one is busy with a slow statement, too: then SQLite computes most of the time, and each has a core of its own.
        """
        pool = self.pool
        slow = False

        def on_slow() -> None:
            nonlocal slow
            if not slow:
                slow = True
                pool.waker.post([], lambda: self._held_up(worker))

        worker.attend(on_slow)
        queue = self.queue
        popleft = queue.popleft
        execute = worker.execute
        since = perf_counter()
        request: Request | None = None
        try:
            while True:
                try:
                    request = popleft()
                except IndexError:
                    if slow:
                        break  # whoever has taken over sleeps here
                    request = None
                    word = worker.rest(queue)
                    if word is None:
                        break
                    if word is not WAKE:
                        return word
                    worker.attend(on_slow)
                    since = perf_counter()
                    continue
                if request.kind == UNIT:
                    worker.perform(request, readonly=True)
                else:
                    execute(request)
                answers = worker.answers  # another list, if the request before has been flushed in between
                answers.append(request)
                if ((slow and self._may_go(worker)) or worker.yielding) and not pool.closing:
                    break
                if queue and (len(answers) >= BATCH_SIZE or perf_counter() - since > BATCH_SECONDS):
                    worker.flush()  # where nothing more waits, the worker goes to sleep first: see `Worker`
                    room = worker.room
                    if room is not None and room.held:
                        room.wait()
                    since = perf_counter()
        except BaseException as defect:
            worker.fail(defect, [request])
        worker.finish(lambda: self._left(worker))
        return None

    def _may_go(self, worker: Worker) -> bool:
        """After a slow statement: whether the reader that has taken over copes alone, or somebody else waits for this one."""
        other = self.resident
        return other is None or other is worker or other.ticks == 0 or self.pool.first_lease() is not None
