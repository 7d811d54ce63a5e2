"""Two checkouts of this package against one another: has a change made anything slower?

    python -m tests.benchmarks.compare <before> <after> [--rounds 5] [--seconds 0.5] [--only WORKLOAD …] [--backend asyncio]
        [--inline] [--lag]

In each round each checkout has an interpreter of its own, on a fresh copy of one database file. Both are there at the same
time and take turns in slices of a tenth of a second, so that what else the machine does meets both alike. Compared are
neighbouring slices: the table gives medians of both sides, and the median of the changes with how sure that is (the standard
error). Calls per second say what a user sees; the CPU's time per call, of the whole process with its threads, is what to go by
on a machine that others use, too. With `--rounds 10` the uncertainty is that of five divided by 1.4.

With `--inline` the second one has `inline_reads: true`: twice the same checkout says what that setting does. With `--lag` a
ticker of 1 ms runs beside, and what is compared in the last columns is how late its worst 1 % was, in ms.

Statements answered wrongly, or writes that are not in the database afterwards, end the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from . import store
from .contenders import BACKENDS

CHILD = Path(__file__).with_name("compared.py")
STATEMENTS = {"point": store.POINT, "insert": store.INSERT, "update": store.UPDATE, "note": store.NOTE}
KEYS = 1_000
WORKLOADS: dict[str, tuple[str, int]] = {
    f"{operation}-{tasks}": (operation, tasks)
    for operation, tasks in (
        ("select", 1),
        ("select", 10),
        ("select", 100),
        ("insert", 1),
        ("insert", 50),
        ("offloaded", 1),
        ("offloaded", 50),
        ("interactive", 50),
        ("readonly", 1),
        ("readonly", 10),
        ("readonly", 100),
        ("reading", 1),
        ("reading", 10),
    )
}
"""What one task does, and how many tasks do it."""

SLICE = 0.1
"""Seconds of one turn."""


@dataclass(frozen=True)
class Slice:
    """What one interpreter measured in one slice."""

    rate: float
    """Calls per second."""
    cpu: float
    """Microseconds of the CPU's time per call."""
    lags: tuple[float, ...] = ()
    """By how many milliseconds the ticker was late, each time."""


@dataclass(frozen=True)
class Comparison:
    """All slices of one workload on both checkouts, in pairs."""

    workload: str
    pairs: list[tuple[Slice, Slice]]

    def line(self) -> str:
        """A row of the table; changes are those of the second checkout against the first, in per cent."""
        text = f"{self.workload:16}"
        pairs = [pair for pair in self.pairs if pair[0].rate and pair[1].rate]  # a slice may be too short for a call
        if not pairs:
            return f"{text} no call was answered within a slice: see --seconds"
        for name in ("rate", "cpu"):
            before = [getattr(pair[0], name) for pair in pairs]
            after = [getattr(pair[1], name) for pair in pairs]
            changes = [100 * (new / old - 1) for old, new in zip(before, after, strict=True)]
            text += (
                f"{median(before):11,.1f}{median(after):11,.1f}{median(changes):+8.1f} ±{_uncertainty(changes):4.1f}"
            )
        for side in (0, 1):
            lags = sorted(lag for pair in pairs for lag in pair[side].lags)
            if lags:
                text += f"{lags[len(lags) * 99 // 100]:9.2f}"
        return text


HEAD = f"{'workload':16}{'calls/s':>11}{'after':>11}{'% change':>14}{'µs CPU':>11}{'after':>11}{'% change':>14}"


def _uncertainty(values: Sequence[float]) -> float:
    """The standard error of the median, from the quartiles, which outliers do not move."""
    if len(values) < 2:
        return float("nan")
    low, _, high = quantiles(values, n=4)
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))


class Checkout:
    """One checkout at one workload, in an interpreter of its own; the database is looked at when that has ended."""

    def __init__(
        self,
        checkout: Path,
        workload: str,
        path: Path,
        backend: str,
        settings: dict[str, object] | None = None,
        *,
        lag: bool = False,
    ) -> None:
        self.operation, tasks = WORKLOADS[workload]
        self.path = path
        self.title = f"{checkout} at {workload}"
        order = {
            "checkout": str(checkout.resolve()),
            "path": str(path),
            "operation": self.operation,
            "tasks": tasks,
            "backend": backend,
            "settings": settings or {},
            "lag": lag,
            "statements": STATEMENTS,
            "names": [store.name_of(key) for key in range(KEYS + 1)],
        }
        self.errors = path.with_suffix(".err")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), json.dumps(order)],
                cwd=path.parent,
                env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.title}: {self.errors.read_text().strip()}")
        return json.loads(line)

    def measure(self, seconds: float) -> Slice:
        """One slice."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended, and `_answer` says why
            pass
        calls, passed, computed, lags = self._answer()
        return Slice(calls / passed, 1e6 * computed / max(calls, 1), tuple(1000 * lag for lag in lags))

    def finish(self) -> None:
        """Has it close its pool, and looks whether all is there that was acknowledged."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        answered = self._answer()
        self.process.wait()
        store.verify(
            self.path,
            transactions=answered if self.operation in {"offloaded", "interactive", "reading"} else 0,
            inserts=answered if self.operation == "insert" else 0,
            bulk=0,
        )

    def end(self) -> None:
        """Ends it, however far it has come."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        store.remove(self.path)


def compare(
    before: Path,
    after: Path,
    workload: str,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
    backend: str = "asyncio",
    inline: bool = False,
    lag: bool = False,
) -> Comparison:
    """One workload on both checkouts, which take turns."""
    template = folder / "template.db"
    if not template.exists():
        store.seed(template, items=KEYS, bulk=0)
    slices = max(1, round(seconds / SLICE))
    pairs: list[tuple[Slice, Slice]] = []
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            sides: list[Checkout] = []
            for checkout in (before, after):
                path = folder / f"{len(sides)}.db"
                store.copy(template, path)
                settings: dict[str, object] = {"inline_reads": True} if inline and sides else {}
                sides.append(Checkout(checkout, workload, path, backend, settings, lag=lag))
                stack.callback(sides[-1].end)
            for side in sides:  # not counted: the pool opens, caches fill
                side.measure(min(seconds, SLICE))
            for turn in range(slices):
                order = sides if turn % 2 == 0 else sides[::-1]  # who begins changes
                found = {side: side.measure(min(seconds, SLICE)) for side in order}
                pairs.append((found[sides[0]], found[sides[1]]))
            for side in sides:
                side.finish()
    return Comparison(workload, pairs)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compare",
        description="Compare two checkouts of this package, which take turns.",
    )
    found.add_argument("before", type=Path, help="a checkout, for instance made by `git worktree add ../before main`")
    found.add_argument("after", type=Path, help="another one")
    found.add_argument("--rounds", type=int, default=5, help="default: 5")
    found.add_argument("--seconds", type=float, default=0.5, help="of one checkout in one round; default: 0.5")
    found.add_argument(
        "--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD", help=", ".join(WORKLOADS)
    )
    found.add_argument("--backend", choices=BACKENDS, default="asyncio", help="the event loop; default: asyncio")
    found.add_argument("--inline", action="store_true", help="the second one has inline_reads: true")
    found.add_argument("--lag", action="store_true", help="how late a ticker of 1 ms is beside (worst 1 %%, in ms)")
    found.add_argument("--dir", type=Path, default=None, help="where the database files go; default: a real disk")
    return found


def main(command: Sequence[str] | None = None) -> int:
    """Compare, a line for each workload as soon as it is measured."""
    arguments = parser().parse_args(command)
    for checkout in (arguments.before, arguments.after):
        if not (checkout / "database" / "__init__.py").is_file():
            parser().error(f"{checkout} is no checkout of this package")
    folder = store.working_folder(arguments.dir)
    try:
        print(HEAD + ("  lag p99    after" if arguments.lag else ""), flush=True)
        for workload in arguments.only:
            done = compare(
                arguments.before,
                arguments.after,
                workload,
                folder,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                backend=arguments.backend,
                inline=arguments.inline,
                lag=arguments.lag,
            )
            print(done.line(), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
