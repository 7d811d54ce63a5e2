"""No process outlives the test that started it, nor the run.

After each test the children that it leaves running are ended, and it fails. And a run that is killed cannot clean up
behind itself, so somebody else does: a small process (this module, as a program) that waits for the run's end, however
it comes, and then kills whatever carries the run's mark in its environment, which all of them inherit.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import time

MARK = "DATABASE_TESTS_RUN"
lasting: set[int] = set()
"""Processes that stay for the whole run: servers that tests share."""


_started = False


def _hear(event: str, _arguments: object) -> None:
    global _started
    if event in _STARTS:
        _started = True


_STARTS = frozenset(["subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "pty.spawn"])


def children() -> set[int]:
    """The children of this process that are still running, where the system says so (Linux); looked for only when one may
    have been started since the last call.
    """
    global _started
    if not _started:
        return set()
    _started = False
    found: set[int] = set()
    own = str(os.getpid())
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if parent == own and state != "Z":
                found.add(int(path.split("/")[2]))
    return found


def command(pid: int) -> str:
    """How a process was started, in short."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "?"


def kill(pid: int) -> None:
    """Ends a child of ours, with its group if it leads one."""
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.waitpid(pid, 0)


def watch() -> None:
    """Marks this run, and has somebody wait for its end: the pipe closes with this process; nobody inherits it."""
    sys.addaudithook(_hear)
    if MARK in os.environ or not os.path.isdir("/proc/self"):
        return
    environment = dict(os.environ)
    os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, os.environ[MARK]],
            stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        process.returncode = 0  # it ends after us: nobody waits for it
        lasting.add(process.pid)
    os.close(reading)
    _kept.append(writing)


_kept: list[int] = []


def main(mark: str) -> None:
    """Waits until the run is over, then kills what is left of it."""
    sys.stdin.buffer.read()
    wanted = f"{MARK}={mark}".encode()
    for _ in range(20):
        found = False
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError, ValueError):
                with open(path, "rb") as file:
                    if wanted not in file.read().split(b"\0"):
                        continue
                found = True
                os.kill(int(path.split("/")[2]), signal.SIGKILL)
        if not found:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
