"""Stands between a client and the server, knows the protocol's messages, and lets a test decide what becomes of each.

It goes to the server by its socket file, so that those who count the process's TCP connections to the server see none of it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from tests.postgresql.server import Server

CANCEL = 80877102
"""What a connection begins with that only carries a cancellation."""

ENCRYPTION = (80877103, 80877104)
"""What asks for TLS or GSSAPI, before it begins."""

Look = Callable[[bytes, bytes], bool]
"""`(type, body) -> whether the message is passed on`; where it is not, both sides lose their connection."""


class Proxy:
    """`port` is where clients connect. Threads of its own, so it serves any event loop."""

    def __init__(self, server: Server) -> None:
        self.lead_to(server)
        self.from_client: Look = lambda kind, body: True
        self.from_server: Look = lambda kind, body: True
        self.passed: Callable[[bytes, bytes], None] = lambda kind, body: None
        """Called when a message of the server's has been passed on."""
        self.may_cancel = threading.Event()
        """Cancellations are held back until it is set."""
        self.may_cancel.set()
        self.cancels = 0
        """Cancellations that have come so far."""
        self.delivered = 0
        """Of these, the ones of which the server has said, by closing their connection, that it has acted on them."""
        self.connections = 0
        """Others that have."""
        self.closed = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def lead_to(self, server: Server) -> None:
        """Where connections go from now on."""
        self._target = str(server.sockets / f".s.PGSQL.{server.port}")

    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, name="pytest-proxy", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.add(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            start = _read(client, 8)
            length, code = struct.unpack("!II", start)
            while code in ENCRYPTION:
                client.sendall(b"N")
                start = _read(client, 8)
                length, code = struct.unpack("!II", start)
            start += _read(client, length - 8)
            if code == CANCEL:
                self.cancels += 1
                self.may_cancel.wait()
            else:
                self.connections += 1
            server = socket.socket(socket.AF_UNIX)
            self._sockets.add(server)
            server.connect(self._target)
            server.sendall(start)
            if code == CANCEL:
                server.recv(1)
                self.delivered += 1
                self._drop(server)
                self._drop(client)
                return
            self._start(self._pass, server, client, False)
            self._pass(client, server, True)
            return
        self._drop(client)

    def _pass(self, source: socket.socket, target: socket.socket, outgoing: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                head = _read(source, 5)
                (length,) = struct.unpack("!I", head[1:])
                body = _read(source, length - 4)
                if not (self.from_client if outgoing else self.from_server)(head[:1], body):
                    break
                target.sendall(head + body)
                if not outgoing:
                    self.passed(head[:1], body)
        self._drop(source)
        self._drop(target)

    def _drop(self, end: socket.socket) -> None:
        self._sockets.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def drop_all(self) -> None:
        """Everybody loses the connection, as by a cable that is pulled."""
        for end in list(self._sockets):
            self._drop(end)

    def close(self) -> None:
        self.may_cancel.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_all()


def _read(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = source.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data
