"""libpq: what is sent, when it is waited for, and how a wait is left.

psycopg opens the connection, adapts values and knows the errors; what is sent and when it is waited for is decided here,
on libpq's own functions (`psycopg.pq`), because the wait must be left when its caller has gone: the statement is then
cancelled by this thread, which alone knows what is running.

Steps. What a transaction's statements do is written as generators (`receiving`, `flushing` and whatever rests on them), which
say what they wait for and do not wait: `walk` does that for them on the worker's thread; on the event loop's thread many are
waited for at once (`database.driver.stepped_lease`). What they have begun on one thread can be gone on with on the other.
`BLOCKING` stands before what waits by itself all the same: it is seldom, and left to the worker.

Threads. Everything runs on the worker's own thread, or, in steps, on whichever has the connection; but for `interrupt`, which
only wakes the worker.

A connection that died while nobody used it (a restarted server, a failover) is noticed before the next statement is
sent, and made again. One that dies under a statement raises, for nobody can know what became of that.

Facts this rests on (postgresql.org/docs/current): protocol-flow.html (pipelining, one error skips to the next Sync);
libpq-cancel.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import pq

from database.engine.contract import BLOCKING, READABLE, WRITABLE, Steps
from database.postgresql.failures import Lost, made_from

if TYPE_CHECKING:
    from database.postgresql.raw import RawConnection

__all__ = ["Wire"]

TICK = 1
"""Milliseconds between two calls of the progress handler, at the beginning of a wait."""

TICKS = 10
"""Ticks after which there is nothing more to be told to the handler; then the wait is for the socket alone."""

FAREWELL = 10
"""Milliseconds for which a server that has said something unasked is given to close the connection."""

RECANCEL = 40
"""Milliseconds after which a cancellation that had no effect is sent again."""

CANCEL_SECONDS = 5.0
"""How long a cancellation may take to reach the server; then the connection is given up."""

_FATAL = pq.ExecStatus.FATAL_ERROR
_SYNC = pq.ExecStatus.PIPELINE_SYNC
_ODD = frozenset({_FATAL, pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH})
_SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
_BAD = pq.ConnStatus.BAD


class Wire:
    """One connection to the server, and the waits on it."""

    __slots__ = (
        "_waker",
        "_woken",
        "cancelled",
        "farewell",
        "impatient",
        "open",
        "pg",
        "pieces",
        "poll",
        "progress",
        "raw",
        "resolute",
        "struck",
        "ticks",
    )

    def __init__(self, connect: Callable[[], RawConnection], progress: Callable[[], bool]) -> None:
        self.open = connect
        self.progress = progress
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self.farewell: pq.abc.PGresult | None = None
        """What the server has said before it closed the connection."""
        self.ticks = 0
        self.pieces = 0
        """How often something had to be read of the answer to what was sent last, in steps."""
        self.cancelled = 0.0
        """When a cancellation was sent last; 0 if none was."""
        self.struck = False
        """Whether one was sent that may still hit what comes next."""
        self.impatient = False
        """Whether others wait behind the statement that runs, on this very connection."""
        self.resolute = False
        """Whether what runs is not to be cancelled: it is what cleans up."""
        try:
            self.adopt(connect())
        except BaseException:
            self._woken.close()
            self._waker.close()
            raise

    def adopt(self, raw: RawConnection) -> None:
        """Makes a connection, new or made again, the one that is used."""
        raw.session = cast("Any", self)
        self.struck = False
        self.farewell = None
        self.raw = raw
        self.pg = raw.pgconn
        self.poll = Poll(self.pg.socket, self._woken.fileno())

    def wait(self, *, writing: bool = False) -> None:
        """Waits until the socket is ready; sends a cancellation meanwhile, if the caller has gone."""
        poll = self.poll
        while True:
            pause = TICK if self.ticks < TICKS else RECANCEL if self.cancelled else None
            ready, woken = poll.wait(pause, writing=writing)
            if woken:
                self._drain()
            elif ready:
                return
            self.ticks += 1
            if not self.resolute and (self.progress() or (self.impatient and self.ticks >= TICKS - 2)):
                self.cancel()
            if ready:
                return

    def cancel(self) -> None:
        """Sends a cancellation; again after a while, for one that arrives between two statements is ignored."""
        now = time.monotonic()
        if self.cancelled and now - self.cancelled < RECANCEL / 1000:
            return
        self.cancelled = now
        self.struck = True
        try:
            self.raw.cancel_safe(timeout=CANCEL_SECONDS)
        except Exception:  # it cannot be reached: then this connection is of no use either
            self.pg.finish()
            raise Lost("the statement could not be cancelled, so its connection was closed") from None

    def begin_wait(self) -> None:
        """Before each thing that is sent: no wait has begun, nothing has been cancelled."""
        self.ticks = self.pieces = 0
        self.cancelled = 0.0
        if self.struck:
            self.outlast_cancel()

    def next_wait(self) -> None:
        """Within a pipeline: what is waited for now is another statement."""
        self.ticks = 0
        self.cancelled = 0.0

    def walk(self, steps: Steps, wanted: int = BLOCKING) -> Any:
        """See `Stepping`."""
        failure: BaseException | None = None
        try:
            while True:
                if wanted != BLOCKING:
                    try:
                        self.wait(writing=wanted == WRITABLE)
                    except BaseException as error:  # it is told: it may have something to put right
                        failure = error
                if failure is None:
                    wanted = steps.send(None)
                else:
                    wanted = steps.throw(failure)
                    failure = None
        except StopIteration as stop:
            return stop.value

    def flush(self) -> None:
        """Waits until all is sent."""
        self.walk(self.flushing())

    def flushing(self) -> Steps:
        """`flush` in steps."""
        pg = self.pg
        while pg.flush():
            yield WRITABLE
            pg.consume_input()

    def result(self) -> pq.abc.PGresult | None:
        """Waits for the next result; None at the end of a statement's.

        It does not walk through `receiving`: where many statements travel together, it is called three times for each.
        """
        pg = self.pg
        try:
            while pg.is_busy():
                self.wait()
                pg.consume_input()
        except psycopg.OperationalError:
            if self.farewell is not None:
                raise made_from(self.farewell) from None
            raise
        return self._received(pg.get_result())

    def receiving(self) -> Steps:
        """`result` in steps."""
        pg = self.pg
        try:
            while pg.is_busy():
                yield READABLE
                self.pieces += 1
                pg.consume_input()
        except psycopg.OperationalError:
            if self.farewell is not None:
                raise made_from(self.farewell) from None
            raise
        return self._received(pg.get_result())

    def _received(self, result: pq.abc.PGresult | None) -> pq.abc.PGresult | None:
        if result is not None and result.status in _ODD:
            if result.status != _FATAL:  # COPY: libpq would give the same one for ever
                self.abandon()
                raise Lost("the server began a COPY that nobody here can serve, so its connection was closed")
            if result.error_field(_SEVERITY) == b"FATAL":
                self.farewell = result
        return result

    def abandon(self) -> None:
        """Ends a connection of which nobody knows what it would answer next; it is made again before its next use."""
        self.pg.finish()

    def outlast_cancel(self) -> None:
        """After a cancellation: makes sure that it does not hit what comes next.

        The server is told by a signal, which may arrive when the statement that it was meant for is over. A statement that
        does nothing is sent first, and takes the hit.
        """
        self.struck = False
        pg = self.pg
        if pg.status == _BAD:
            return
        pg.send_query(b"SELECT")
        while pg.flush():
            self._sit_out(writing=True)
        while True:
            while pg.is_busy():
                self._sit_out(writing=False)
            if pg.get_result() is None:
                return

    def _sit_out(self, *, writing: bool) -> None:
        _, woken = self.poll.wait(None, writing=writing)
        if woken:
            self._drain()
        self.pg.consume_input()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(64):
                pass

    def drive(self, generator: Any) -> Any:
        """Drives a generator of psycopg's."""
        self.next_wait()
        try:
            state = next(generator)
            while True:
                if state & 1:  # wants to read, and perhaps to write
                    self.wait(writing=bool(state & 2))
                else:
                    self.wait(writing=True)
                state = generator.send(state)
        except StopIteration as stop:
            return stop.value

    def lost(self, error: BaseException) -> bool:
        """Whether the connection is of no use any more."""
        return self.raw.closed or self.pg.status == _BAD or isinstance(error, Lost)

    def revive(self) -> None:
        """Before the first statement after a pause: is the server still there?

        A server that goes says so first and closes second, so behind anything unasked the end is looked for.
        """
        if self.pg.status != _BAD:
            if not self.poll.readable():
                return
            with contextlib.suppress(psycopg.Error):
                while self.poll.readable(FAREWELL):
                    self.pg.consume_input()
                if self.pg.status != _BAD:
                    return
        self.reopen()

    def reopen(self) -> None:
        """Another connection in place of one that is of no use any more."""
        with contextlib.suppress(Exception):
            self.raw.session = None
            self.raw.close()
        self.adopt(self.open())

    def leave_pipeline(self) -> pq.abc.PGresult | None:
        """Waits for the end of a pipeline; gives an error that came no sooner: a constraint checked at the commit."""
        failed: pq.abc.PGresult | None = self.walk(self.leaving_pipeline())
        return failed

    def leaving_pipeline(self) -> Steps:
        """`leave_pipeline` in steps."""
        failed: pq.abc.PGresult | None = None
        while (answer := (yield from self.answering())).status != _SYNC:
            if answer.status == _FATAL:
                failed = answer
        self.pg.exit_pipeline_mode()
        return failed

    def until_sync(self) -> list[pq.abc.PGresult]:
        """The results of what was sent before the next Sync of a pipeline."""
        answers: list[pq.abc.PGresult] = []
        while (answer := self.answer()).status != _SYNC:
            answers.append(answer)
        return answers

    def answer(self) -> pq.abc.PGresult:
        """The next result of a pipeline. Between two statements' comes one None; several in a row mean that none will."""
        for _ in range(4):
            answer = self.result()
            if answer is not None:
                return answer
        raise self._silence()

    def answering(self) -> Steps:
        """`answer` in steps."""
        for _ in range(4):
            answer: pq.abc.PGresult | None = yield from self.receiving()
            if answer is not None:
                return answer
        raise self._silence()

    def _silence(self) -> psycopg.Error:
        self.abandon()
        return Lost("the connection was lost") if self.farewell is None else made_from(self.farewell)

    def interrupt(self) -> None:
        """See `Connection`. Only wakes the thread: it knows what is running, and sends the cancellation."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    @property
    def descriptor(self) -> int:
        """See `Stepping`."""
        return self.pg.socket

    def share(self, shared: bool) -> None:
        """See `Connection`. Here transactions are not shared."""

    def close(self) -> None:
        """See `Connection`."""
        self.raw.session = None
        try:
            self.raw.close()
        finally:
            self._woken.close()
            self._waker.close()

    def disown(self) -> None:
        """See `Connection`. An extra reference, never given back: libpq must not say goodbye in the parent's name."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.raw))


class Poll:
    """Waits for the server's socket and for the word of another thread."""

    __slots__ = ("_poll", "_server", "_woken", "_writing")

    def __init__(self, server: int, woken: int) -> None:
        self._server = server
        self._woken = woken
        self._writing = False
        self._poll: Any = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(server, select.POLLIN)
            self._poll.register(woken, select.POLLIN)

    def wait(self, milliseconds: int | None, *, writing: bool) -> tuple[bool, bool]:
        """Whether the server's socket is ready, and whether another thread has called."""
        if self._poll is None:  # Windows
            sockets, outgoing = [self._server, self._woken], [self._server] if writing else []
            seconds = None if milliseconds is None else milliseconds / 1000
            readable, writable, _ = select.select(sockets, outgoing, [], seconds)
            return self._server in readable or bool(writable), self._woken in readable
        if writing != self._writing:
            self._writing = writing
            self._poll.modify(self._server, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
        ready = woken = False
        for descriptor, _ in self._poll.poll(milliseconds):
            if descriptor == self._server:
                ready = True
            else:
                woken = True
        return ready, woken

    def readable(self, milliseconds: int = 0) -> bool:
        """Whether the server has said something unasked."""
        if self._poll is None:
            return bool(select.select([self._server], [], [], milliseconds / 1000)[0])
        if self._writing:
            self._writing = False
            self._poll.modify(self._server, select.POLLIN)
        return any(descriptor == self._server for descriptor, _ in self._poll.poll(milliseconds))
