"""What this process's pools are doing, offered to whoever may read it: `python -m database top`.

The setting `monitor` names a folder. Where it is set, the first pool that opens starts one thread, which listens on a
Unix socket in that folder; whoever connects is sent one snapshot, as JSON, and the connection is closed. Without the
setting this module is not even imported.

Threads. A snapshot is taken on the listening thread, so that nothing of it ever holds the event loop up, and so that it
can be had while the loop is busy: that is when somebody wants to look. What it reads belongs to the loop's thread and
may change under its hands. Single fields are read atomically; where a collection changes while it is walked, Python
raises `RuntimeError`, and the snapshot is taken again. `offer` and `withdraw` may be called by any thread, `withdraw`
by a finalizer too; the lock, which is reentrant for that reason, covers the table of servers and nothing slow.

Files. The folder is made with mode 0700, a socket has mode 0600 before anybody can find it: it is bound under another
name and renamed when it listens. So whatever refuses a connection belongs to a process that is gone: it was killed, else
it would have removed its socket. Whoever finds one, a reader or a process that begins, removes it. A name is made of the
process's number and something random, for processes in different containers may have the same number.

A snapshot holds no parameters of statements and no arguments of the program, which may be secret; SQL text it does hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from database.errors import shorten

if TYPE_CHECKING:
    from database.driver.pool import Pool

__all__ = ["FORMAT", "offer", "read", "snapshot", "withdraw"]

FORMAT = 1
"""The snapshot's version; a reader leaves others alone."""

SUFFIX = ".sock"

_PATIENCE = 2.0
"""Seconds after which a reader that does not read, or a process that does not answer, is given up."""

_logger = logging.getLogger("database.pool")


class _Server:
    """One socket, and the pools that it tells of. All but `__init__`, `stop` and `forget` runs on its thread."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()
        self.pools: dict[Pool, float] = {}
        """When each was opened, in seconds since the epoch."""
        self.wake, self._woken = socket.socketpair()
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        """Where the socket is, once it is there."""
        self._thread = threading.Thread(target=self._run, name="database-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Removes the socket and ends its thread. Does not wait for that: the process may end sooner."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):
            self.wake.send(b"x")

    def forget(self) -> None:
        """In a forked child: closes the copies of the parent's descriptors; the file is the parent's."""
        for each in (self.wake, self._woken, self._socket):
            if each is not None:
                each.close()

    def _run(self) -> None:
        path = self.folder / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        try:
            self._socket = _listen(path)
        except (OSError, ValueError) as error:
            # The data is what counts: a process that cannot be watched works all the same.
            _logger.warning("monitor: no socket can be offered in %s: %s", self.folder, error)
            self.wake.close()
            self._woken.close()
            return
        self._path = path
        try:
            for stale in self.folder.glob(f"*{SUFFIX}"):
                if stale != path:
                    _remove_if_stale(stale)
            self._serve(self._socket)
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            self.forget()

    def _serve(self, listening: socket.socket) -> None:
        with selectors.PollSelector() as selector:
            selector.register(listening, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                try:
                    client, _ = listening.accept()
                except OSError:  # it has gone again
                    continue
                with client, contextlib.suppress(OSError):
                    client.settimeout(_PATIENCE)
                    client.sendall(json.dumps(snapshot(self.pools)).encode())


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    hidden = path.with_name(f".{path.stem}")
    try:
        if sys.platform == "linux":
            os.fchmod(listening.fileno(), 0o600)  # the mode that the file is made with
        listening.bind(str(hidden))
        hidden.chmod(0o600)
        listening.listen(16)
        listening.setblocking(False)
        hidden.rename(path)
    except BaseException:
        listening.close()
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise
    return listening


# --- The side of the pools ----------------------------------------------------------------------------------

_lock = threading.RLock()
_servers: dict[str, _Server] = {}


def offer(folder: str, pool: Pool) -> None:
    """Tells of a pool from now on. Starts the folder's thread if there is none; never waits, never raises."""
    with _lock:
        server = _servers.get(folder)
        if server is None:
            try:
                server = _Server(folder)
                server.start()
            except (OSError, RuntimeError) as error:  # no descriptors, no threads
                _logger.warning("monitor: no socket can be offered in %s: %s", folder, error)
                return
            _servers[folder] = server
        server.pools = {**server.pools, pool: time.time()}  # another dict, for the thread may be walking this one


def withdraw(pool: Pool) -> None:
    """Ends `offer()`. With a folder's last pool its socket goes, too."""
    with _lock:
        for folder, server in tuple(_servers.items()):
            if pool in server.pools:
                server.pools = {each: since for each, since in server.pools.items() if each is not pool}
                if not server.pools:
                    del _servers[folder]
                    server.stop()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603  - another thread of the parent may have had it
    _lock = threading.RLock()
    for server in _servers.values():
        server.forget()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def snapshot(pools: dict[Pool, float]) -> dict[str, Any]:
    """What the process looks like now, in values that JSON knows. Any thread."""
    return {
        "format": FORMAT,
        "pid": os.getpid(),
        "program": os.path.basename(sys.argv[0]) if sys.argv else "",
        "time": time.time(),
        "pools": [_describe(pool, since) for pool, since in pools.items()],
    }


def _describe(pool: Pool, since: float) -> dict[str, Any]:
    for _ in range(20):
        try:
            stats = dataclasses.asdict(pool.stats())
            held: dict[str, list[str]] = {
                "writer": pool.holders(readonly=False),
                "readers": pool.holders(readonly=True),
            }
            break
        except RuntimeError:  # something changed while it was looked at
            continue
    else:
        stats = {}
        held = dict[str, list[str]]()
    path = pool.backend.description
    return {
        "database": pool.name,
        "path": os.path.abspath(path) if os.path.exists(path) else path,
        "loop": pool.waker.library,
        "opened": since,
        "stats": stats,
        "held_by": {role: [shorten(text, 200) for text in texts] for role, texts in held.items()},
        "bytes": _size(path),
        "wal_bytes": _size(f"{path}-wal"),
    }


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


# --- The side of the reader ---------------------------------------------------------------------------------


def read(folder: str) -> list[dict[str, Any]]:
    """The snapshots of all processes that offer one in that folder; removes the sockets of those that are gone.

    A process that does not answer gives `{"pid": …, "error": …}`.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            answer = _ask(path)
        except ConnectionRefusedError:
            _remove_if_stale(path)
        except FileNotFoundError:  # it has just ended
            continue
        except (OSError, ValueError) as error:
            reason = "does not answer" if isinstance(error, TimeoutError) else str(error)
            found.append({"pid": path.name.split("-")[0], "error": reason, "pools": []})
        else:
            if answer is not None:
                found.append(answer)
    return found


def _ask(path: Path) -> dict[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_PATIENCE)
        client.connect(str(path))
        chunks: list[bytes] = []
        while chunk := client.recv(65536):
            chunks.append(chunk)
    if not chunks:  # it is just closing
        return None
    answer: object = json.loads(b"".join(chunks))
    if not isinstance(answer, dict) or cast("dict[str, Any]", answer).get("format") != FORMAT:
        raise ValueError("another version of this package")
    return cast("dict[str, Any]", answer)


def _remove_if_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_PATIENCE)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            pass
