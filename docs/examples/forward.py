"""Ships log records to Logstash (or whatever reads JSON lines from a TCP socket): `ForwardHandler`, filled in.

    logging.getLogger("database").addHandler(Forwarder(JsonLines("logstash.example", 5000)))

A record costs the thread that logs it an append to a queue; formatting and sending are a thread's own business. The
queue is bounded: when the receiver is slow or away, the oldest records are dropped and counted, and the application
goes on. At exit `logging.shutdown()` calls `close()`, which sends what is queued, for as long as `patience` allows.

Put another callable in place of `JsonLines` to ship elsewhere: it gets a list of lines, and raises if it could not
send them. A method `close` of it, if there is one, is called at the end.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic

from database.elk import EcsFormatter
from database.logs import ForwardHandler

Send = Callable[[list[str]], None]


class Forwarder(ForwardHandler):
    """Queues records, and sends them in batches on a thread of its own."""

    def __init__(self, send: Send, *, capacity: int = 10_000, batch: int = 200, patience: float = 5.0) -> None:
        """Makes the handler; its thread starts with the first record.

        Args:
            send: Sends lines, or raises. It is called on the handler's thread alone.
            capacity: Records that are queued at the most; beyond that the oldest are dropped.
            batch: Records that are sent together at the most.
            patience: Seconds that `flush()` and `close()` wait for what is queued, and that lie at the most between
                two tries.
        """
        super().__init__()
        self.setFormatter(EcsFormatter(exclude_fields=["log.original", "process"]))
        self.sent = 0
        self.dropped = 0
        self._send = send
        self._batch = batch
        self._patience = patience
        self._queue: deque[logging.LogRecord] = deque(maxlen=capacity)
        self._begin()
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _begin_anew(this()))

    def _begin(self) -> None:
        self._queue.clear()  # what a forked child inherits is the parent's to send
        self._something = threading.Event()
        self._nothing_left = threading.Event()
        self._nothing_left.set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record. Called by any thread, with the handler's lock held: it must not take long."""
        if record.threadName == _NAME or self._closing.is_set():
            return
        if len(self._queue) == self._queue.maxlen:
            self.dropped += 1
        self._nothing_left.clear()
        self._queue.append(record)
        self._something.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Waits until all that is queued has been sent, `patience` seconds at the most. Not for event loops."""
        self._nothing_left.wait(self._patience)

    def close(self) -> None:
        """Sends what is queued, as long as `patience` allows, and ends the thread; says what is lost."""
        if not self._closing.is_set():
            self.flush()
            self._closing.set()
            self._something.set()
            if self._thread is not None:
                self._thread.join(self._patience)
            close = getattr(self._send, "close", None)
            if close is not None:
                close()
            lost = self.dropped + len(self._queue)
            if lost and sys.stderr is not None:
                print(f"forward: {lost} log records could not be sent", file=sys.stderr)
        super().close()

    def _run(self) -> None:
        while True:
            self._something.wait()
            self._something.clear()
            while self._queue:
                self._send_some()
                if self._closing.is_set():
                    return
            self._nothing_left.set()
            if self._queue:  # one came in between: `emit` clears the event first and appends second
                self._nothing_left.clear()
            if self._closing.is_set():
                return

    def _send_some(self) -> None:
        records = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
        lines: list[str] = []
        for record in records:
            try:
                lines.append(self.format(record))
            except Exception:  # somebody's object cannot be described: the others must not suffer for it
                self.dropped += 1
        pause, until = 0.05, monotonic() + self._patience
        while lines:
            try:
                self._send(lines)
            except Exception as error:
                room = (self._queue.maxlen or 0) - len(self._queue)
                if self._closing.is_set() or (room <= 0 and monotonic() > until):
                    self.dropped += len(lines)
                    return
                if pause == 0.05 and sys.stderr is not None and logging.raiseExceptions:
                    print(f"forward: {type(error).__name__}: {error}; trying again", file=sys.stderr)
                self._closing.wait(pause)
                pause = min(pause * 2, self._patience)
            else:
                self.sent += len(lines)
                return


_NAME = "database-forward"


def _begin_anew(handler: Forwarder | None) -> None:
    if handler is not None:
        handler._begin()


class JsonLines:
    """Sends lines over TCP: Logstash's `tcp` input with `codec => json_lines`, Vector, Fluent Bit, …"""

    def __init__(self, host: str, port: int, *, timeout: float = 5.0) -> None:
        self._address = host, port
        self._timeout = timeout
        self._socket: socket.socket | None = None

    def __call__(self, lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, self._timeout)
            self._socket.sendall(data)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection; another call would open the next."""
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()
