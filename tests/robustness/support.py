"""What these tests share: programs run in a process of their own, and figures for the summary."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.contract.support import HANGING
from tests.programs import Started, prepared

ROOT = Path(__file__).resolve().parents[2]

FIGURES: Counter[str] = Counter()
"""What was counted while the tests ran; `conftest.py` prints it at the end."""


@dataclass
class Ended:
    """How a program ended."""

    status: int
    out: str
    err: str
    seconds: float
    """From its printing a line `end` (or else from its start) to its end."""

    def ok(self) -> Ended:
        assert self.status == 0, f"status {self.status}\n{self.out}\n{self.err}"
        return self


PREAMBLE = """
import anyio, asyncio, os, signal, sys, threading, time
from database import errors
from database.sqlite3 import close_all, configure, get_db, transactional, transactional_readonly
settings = {"path": sys.argv[1], "pool_size": 2, "init_sql": "", "busy_timeout": 10000}
configure({"database": {"sqlite": settings}})
db = get_db()
SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 1000000000) SELECT count(*) FROM c"
def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
"""


class Program:
    """A Python program on a database, in a process of its own: with flags for the interpreter one that is started anew."""

    def __init__(self, code: str, path: Path, *arguments: str, flags: tuple[str, ...] = ()) -> None:
        code = PREAMBLE + textwrap.dedent(code)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}
        environment.pop("COVERAGE_PROCESS_START", None)
        if flags:
            source = path.with_name(f"program-{time.monotonic_ns()}.py")  # multiprocessing wants a file
            source.write_text(code)
            self.process = subprocess.Popen(
                [sys.executable, *flags, str(source), str(path), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=path.parent,
                start_new_session=True,
                preexec_fn=prepared,
            )
        else:
            self.process = Started(
                ["-c", code, str(path), *arguments], path.parent, environment=environment, whole=True
            )
        self.began = time.monotonic()
        self.lines: list[str] = []

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.lines.append(line)
        return line.strip()

    def expect(self, line: str) -> Program:
        found = self.line()
        if found != line:
            raise AssertionError(f"expected {line!r}, got {found!r}: {self.end(5)}")
        return self

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self.process.send_signal(signum)

    def end(self, within: float = HANGING) -> Ended:
        """Waits for its end; a program that hangs is killed, with all that it started, and fails the test."""
        began = time.monotonic() if any(line.strip() == "end" for line in self.lines) else self.began
        hung = False
        try:
            out, err = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
        assert not hung, f"hangs after {within} s\n{''.join(self.lines)}{out}\n{err}"
        return Ended(self.process.returncode, "".join(self.lines) + out, err, time.monotonic() - began)


def leftovers(path: Path) -> list[str]:
    """What stands beside the database file that an orderly close would have removed."""
    return sorted(each.name for each in path.parent.glob(f"{path.name}-*"))
