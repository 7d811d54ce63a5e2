"""Programs run in processes of their own, without each of them importing the world anew.

`python -m tests.programs` imports what programs use most and then forks for every program that it is told to run: a
child is `__main__` with nothing run before it, has its own working directory and streams, and ends as any interpreter
does. Whoever asks lives on; when he is gone, so are the server (its standard input ends) and its children.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

from tests import watchdog

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "asyncio", "trio", "anyio._backends._asyncio", "anyio._backends._trio", "uvloop", "yaml", "aiosql", "sqlite3",
    "database.cli", "database.sqlite3.engine", "database.sqlite3.opening", "fastapi", "starlette.testclient",
    "opentelemetry.sdk.trace", "pytest", "_pytest.pytester", "_pytest.doctest", "_pytest.junitxml",
)  # fmt: skip
"""What takes long to import, where it is installed."""
OF_WHOLE = (
    "asyncio",
    "anyio._backends._asyncio",
    "anyio._backends._trio",
    "database.sqlite3.engine",
    "database.sqlite3.opening",
)

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *(
    part for name in ("hypothesispytest", "faker", "randomly", "xdist") for part in ("-p", f"no:{name}")
))  # fmt: skip
"""A small suite of its own: without the plugins that take longer to import than it takes to run."""

PR_SET_PDEATHSIG = 1


def dies_with_us() -> None:
    """In a child, before it becomes another program: when the thread that started it is gone, it is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def interruptible() -> None:
    """In a child: Ctrl-C is what it is at a terminal, though the tests run in the background of a shell, which leaves
    SIGINT ignored to all its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepared() -> None:
    """`preexec_fn` for every process that a test starts."""
    dies_with_us()
    interruptible()


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process whatever it does, with all of its group if it leads one, and takes its pipes away."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait(30)


def pseudo_terminal() -> tuple[int, int]:
    """Both ends of one; skips the test where the system has none to give (a container without /dev/pts)."""
    import pty

    import pytest

    try:
        return pty.openpty()
    except OSError as error:
        pytest.skip(f"there are no pseudo-terminals here: {error}")


def run(
    arguments: list[str], folder: Path, *, timeout: float = 120, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Runs `python -W error ARGUMENTS` in a folder: its status, output and errors. The arguments are `-c CODE …`, `FILE …`,
    `-m pytest …` (see `PYTEST`) or, for any other module, which is imported as nothing has been before, `-m MODULE …`.
    """
    environment = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    if not hasattr(os, "fork") or (arguments[0] == "-m" and arguments[1] != "pytest"):
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr
    if (
        arguments[0] == "-m"
    ):  # in pytest's usual place it would shut the directories of this run to all but its own user
        arguments = [*arguments, f"--basetemp={folder.with_name(f'{folder.name}.base')}"]
    streams = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {
        "arguments": arguments, "folder": str(folder), "streams": list(map(str, streams)), "timeout": timeout,
        "environment": environment,
    }  # fmt: skip
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of programs has died"
    status = int(answer)
    return (status, *(stream.read_text("utf-8") for stream in streams))  # type: ignore[return-value]


class Started(subprocess.Popen[str]):
    """A program that goes on while a test looks at it: `python -W error ARGUMENTS`, with pipes or what is given in their
    place; `terminal`: its standard input is a terminal, and its own. The server's child, it is waited for through the server.

    `whole`: nothing but asyncio, trio and this package has been imported before it, it takes warnings as Python does by
    default, and it ends as an interpreter of its own: what it had is taken apart by Python itself.
    """

    def __init__(
        self, arguments: list[str], folder: Path, *, environment: dict[str, str] | None = None, terminal: bool = False,
        whole: bool = False, **streams: Any,
    ) -> None:  # fmt: skip
        self._server = _server(whole)
        self._request = {
            "arguments": arguments, "folder": str(folder), "terminal": terminal,
            "environment": {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)},
        }  # fmt: skip
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        super().__init__(arguments, text=True, **pipes | streams)
        started.append(self)

    def _execute_child(self, *given: Any) -> None:
        """In the place of fork and exec. Of what is given, the ends of three pipes matter here, the program's and ours."""
        pipes = given[10:16]
        streams = [own if end == -1 else end for own, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        self._ends, theirs = socket.socketpair()
        with theirs:
            server.stdin.write(json.dumps(self._request) + "\n")
            server.stdin.flush()
            socket.send_fds(_descriptors[server.pid], [b"."], [*streams, theirs.fileno()])
            assert server.stdout.readline(), "the server of programs has died"
        self._close_pipe_fds(*pipes)
        self.pid = int(self._ends.recv(64))
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._ends], [], [], 0)[0]:
            return 0, 0
        ended = self._ends.recv(64)
        self._ends.close()
        return self.pid, int(ended or signal.SIGKILL)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


started: list[Started] = []
"""Those of the present test."""
_descriptors: dict[int, socket.socket] = {}
"""By a server's process id: the socket on which it is given pipes."""


@functools.cache
def _server(whole: bool = False) -> subprocess.Popen[str]:
    ours, theirs = socket.socketpair()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.programs", str(theirs.fileno()), *["whole"] * whole], pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=prepared,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"},
    )  # fmt: skip
    theirs.close()
    _descriptors[server.pid] = ours
    atexit.register(end, server)
    watchdog.lasting.add(server.pid)
    return server


def _main(arguments: list[str]) -> None:
    """In a child: becomes the program."""
    sys.path[0] = ""
    if arguments[0] == "-m":
        # Pytest reads its plugins' sources anew, to explain what fails in them; here they have been imported before.
        plain = ["-W", "ignore::pytest.PytestAssertRewriteWarning"] if arguments[1] == "pytest" else []
        sys.argv = [arguments[1], *plain, *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _become(request: dict[str, Any], parent: int, streams: list[int]) -> list[str]:
    dies_with_us()
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    if request.get("terminal"):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        was = getattr(sys, name)
        stream = open(descriptor, "w" if descriptor else "r", encoding=was.encoding, errors=was.errors, closefd=False)
        if descriptor:
            stream.reconfigure(line_buffering=descriptor == 2 or stream.isatty())
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return list(request["arguments"])


def _files(request: dict[str, Any]) -> list[int]:
    """Nothing to read, and two files to write."""
    return [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for stream in request["streams"]),
    ]


def _ended(child: int, timeout: float) -> int:
    """Waits for a child, and kills it with all that it started when its time is over."""
    until = time.monotonic() + timeout
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        late = time.monotonic() > until
        if pid or late:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status if pid else os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _serve() -> list[str]:
    """Answers requests until there are no more; returns in each child, with its arguments."""
    import warnings

    whole = "whole" in sys.argv
    for name in OF_WHOLE if whole else IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if not whole:
        warnings.resetwarnings()
        warnings.simplefilter("error")
        sys.warnoptions[:] = ["error"]
    gc.collect()
    gc.freeze()
    server = os.getpid()
    descriptors = socket.socket(fileno=int(sys.argv[1]))
    attendants: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        attendants = {pid for pid in attendants if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        request = json.loads(line)
        if "timeout" in request:
            child = os.fork()
            if child == 0:
                descriptors.close()
                return _become(request, server, _files(request))
            print(_ended(child, request["timeout"]), flush=True)
        else:
            *streams, ends = socket.recv_fds(descriptors, 1, 4)[1]
            attendant = os.fork()
            if attendant == 0:
                descriptors.close()
                _attend(request, server, streams, ends)
                return list(request["arguments"])
            for descriptor in (*streams, ends):
                os.close(descriptor)
            attendants.add(attendant)
            print("started", flush=True)
    os._exit(0)


def _attend(request: dict[str, Any], server: int, streams: list[int], ends: int) -> None:
    """In a child: starts the program, tells who it is and in the end how it ended; returns in the program."""
    dies_with_us()
    if os.getppid() != server:
        os._exit(1)
    attendant = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(ends)
        _become(request, attendant, streams)
        return
    for descriptor in (0, 1, *streams):
        os.close(descriptor)
    os.write(ends, b"%d" % child)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(OSError):
        os.write(ends, b"%d" % status)
    os._exit(0)


def _end_of_child() -> NoReturn:
    """Ends as an interpreter does, but for taking apart what the server had imported: that takes longer than most programs
    (`robustness/exit_test.py` is about whole interpreters).
    """
    arguments = _serve()
    status: Any = 0
    try:
        _main(arguments)
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        if status is not None:
            print(status, file=sys.stderr)
        status = int(status is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()  # what was left open says so
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    from tests import programs  # this module by its own name: `__main__` is the program's

    if "whole" in sys.argv:
        programs._main(programs._serve())
    else:
        programs._end_of_child()
