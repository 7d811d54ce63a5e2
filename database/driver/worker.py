"""A runner with a thread of its own: its inbox, its sleep and its end.

A worker serves what its inbox brings: a lane to empty, a lease to attend to, or the word to stop.

Sleep. A worker that has emptied its lane stays with it, asleep at its inbox, so that the next statement costs one wake-up
and nobody's decision. It sets `sleeping` first and looks at the queue second; the loop's thread appends to the queue first
and looks at `sleeping` second, and who finds it set clears it and puts WAKE into the inbox. So whatever is appended is
seen by one of the two. When both see it, a WAKE too many lies in the inbox, and wakes the worker once for nothing.
`sleeping` is set before the last answers are posted: whoever is woken by them finds the worker free.

Lending. With `inline_reads` the loop's thread uses the connection of a worker whose thread waits, at its inbox or at the
mailbox of the lease that it attends to (`database.driver.inline`). What wakes the thread is mostly put there by the loop's
thread, which cannot do two things at once; but not always (an exit, a fork). So there is a lock, `lent`. The worker sets
`resting` before it waits, and when it has been woken it takes the lock, clears `resting`, and goes on; the loop's thread uses
the connection only with the lock in its hands and `resting` set. So one of them waits for the other, for one short read at
the most. What the loop's thread leaves open behind itself, a read-only transaction, stands in `held`: whatever wakes the
worker has it attend to that first, and keep what it was woken for until that has ended.

Threads. Everything here runs on the worker's own thread but for what stands under "Any thread", and `__init__`.

After the end of an orderly process nothing of a worker remains: threads are daemons, so that a forgotten pool never
hangs an exit, and `database.driver.process` stops them at exit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Protocol

from database.driver.observer import Observer
from database.driver.request import Request
from database.driver.room import Room
from database.driver.runner import Deadline, Runner
from database.driver.wakeup import Notice, Timer, Waker
from database.engine.contract import Backend, Role

__all__ = ["STOP", "WAKE", "Servable", "Worker", "here"]


class _Here(local):
    worker: Worker | None = None


here = _Here()
"""`here.worker` is the worker whose thread this is, if it is one."""


class Servable(Protocol):
    """What an inbox brings."""

    def serve(self, worker: Worker) -> Servable | None:
        """Does the work, on the worker's thread; gives what it has taken out of the inbox and left for the worker."""
        ...


class _Word:
    """Something said to a worker, nothing to be served."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def serve(self, worker: Worker) -> Servable | None:
        """Nothing to do."""
        return None


WAKE: Servable = _Word("WAKE")
"""There is something in the lane."""
STOP: Servable = _Word("STOP")
"""The end, once all that came before is done."""


class Worker(Runner):
    """A runner on its own thread."""

    __slots__ = (
        "__weakref__",
        "_before",
        "_kept",
        "_thread",
        "dwells",
        "held",
        "inbox",
        "lent",
        "resting",
        "sleeping",
        "watched",
        "yielding",
    )

    def __init__(
        self,
        name: str,
        role: Role,
        backend: Backend,
        waker: Waker,
        observer: Observer,
        *,
        deadline: Deadline,
        room: Room | None = None,
    ) -> None:
        super().__init__(name, role, backend, waker, observer, deadline=deadline, room=room)
        self.inbox: SimpleQueue[Servable] = SimpleQueue()
        self.sleeping = True
        """Whether it waits at its inbox, its lane being empty."""
        self.yielding = False
        """Whether it is to leave its lane at the next opportunity. Set by the loop's thread."""
        self._before: Request | None = None
        """What was current at the last look."""
        self.dwells = False
        """Whether it still was at the next one."""
        self.lent: Lock | None = None
        """Held by the loop's thread while it uses the connection. None where it never does."""
        self.resting = False
        """Whether the thread waits, and touches nothing before it has taken `lent`. Only where there is that lock."""
        self.held: Servable | None = None
        """The lease that has the connection while the thread waits; behind the lock."""
        self.watched: Timer | None = None
        """Ends the loop's watching of the connection's socket; None where it is not watched. Loop thread."""
        self._kept: Servable | None = None
        """What the thread was woken for when it had to attend to that."""
        self._thread: Thread | None = None

    # Any thread

    def start(self, opened: Callable[[BaseException | None], None] | None, closed: Notice) -> None:
        """Starts the thread, which opens the connection; `closed` is called on the loop at its end.

        With `opened`, that is called on the loop with the outcome, and a failure ends the thread; without it, each
        request tries to open the connection once more and is told the reason if that fails.
        """
        self._thread = Thread(target=self._run, args=(opened, closed), name=self.name, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Called now and then: has the worker been at one thing since the last time? Loop thread.

        Then those whose answers it has collected are woken, for who knows how long it takes: a function in Python tells
        nobody. The worker posts the same answers again when it gets to that, which wakes nobody twice.
        """
        current, before = self.current, self._before
        self._before = current
        self.dwells = current is not None and current is before
        if self.dwells and self.answers:
            self.waker.wake(list(self.answers))

    def give(self, item: Servable) -> None:
        """Gives it something to serve. Loop thread."""
        if self.watched is not None:
            self.look_away()
        self.inbox.put(item)

    def look_away(self) -> None:
        """From now on the connection's socket is the worker's to watch. Loop thread."""
        watched, self.watched = self.watched, None
        if watched is not None:
            watched.cancel()

    def wake(self) -> None:
        """Tells it that there is something in its lane."""
        self.inbox.put(WAKE)

    def stop(self, *, now: bool = False) -> None:
        """Ends the thread once it has done what its inbox holds. Loop thread, unless `now`.

        That also stops what it is doing: the loop has ended, or does not matter any more.
        """
        if now:
            self.hurry()
        else:
            self.look_away()
        self.inbox.put(STOP)

    def join(self, seconds: float) -> bool:
        """Waits for the thread's end; False if it did not come in time."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # The worker's thread

    def _run(self, opened: Callable[[BaseException | None], None] | None, closed: Notice) -> None:
        here.worker = self
        error = None if opened is None else self._open()
        if opened is not None:
            self.waker.post([], lambda: opened(error))
        if error is None:
            receive = self.receive
            item = receive()
            while item is not STOP:
                try:
                    left = item.serve(self)
                except BaseException as defect:  # what is served sees to its requests; this is for the rest
                    left = None
                    self.fail(defect, ())
                    self.flush()
                del item  # so that an idle worker keeps nothing alive
                item = left or receive()
            self._close()
        self.waker.post([], closed)

    def rest(self, queue: Collection[object]) -> Servable | None:
        """The lane is empty: posts the answers, and sleeps until there is something to do. See "Sleep" above.

        Returns:
            WAKE to look at the lane again, None to leave it, or what is to be served in its place.
        """
        self.sleeping = True
        self.resting = self.lent is not None
        self.flush()
        if self.yielding:
            return None  # touches nothing on its way to the inbox, and so goes on resting
        if queue and self.sleeping and self._take_back():
            self.sleeping = False
            return WAKE
        return self.receive()

    def receive(self) -> Servable:
        """Waits for what the inbox brings."""
        lent = self.lent
        if lent is None:
            return self.inbox.get()
        item, self._kept = self._kept, None
        self.resting = True
        if item is None:
            item = self.inbox.get()
        with lent:  # waits for the loop's thread to be done
            self.resting = False
            held, self.held = self.held, None
        if held is None:
            return item
        if item is not WAKE:
            self._kept = item
        return held

    def _take_back(self) -> bool:
        """Whether the connection is this thread's again, without its having been woken."""
        lent = self.lent
        if lent is not None:
            with lent:
                if self.held is not None:
                    return False
                self.resting = False
        return True
