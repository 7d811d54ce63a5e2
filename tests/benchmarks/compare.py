"""Two checkouts of this package against one another: has a change made anything slower?

    python -m tests.benchmarks.compare <before> <after> [--rounds 5] [--seconds 0.5] [--only WORKLOAD …] [--backend asyncio]

Each measurement is an interpreter of its own, on a fresh copy of one database file. The two checkouts take turns within
each round, and who begins changes from round to round, so that what else the machine does meets both alike. Medians over
the rounds are compared: calls per second, and the CPU's time per call of the whole process, both threads, which is what to go
by on a machine that others use, too. The least of the CPU's times stands beside it: noise only ever adds to that.

Statements answered wrongly, or writes that are not in the database afterwards, end the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import store
from .contenders import BACKENDS

CHILD = Path(__file__).with_name("compared.py")
STATEMENTS = {"point": store.POINT, "insert": store.INSERT, "update": store.UPDATE, "note": store.NOTE}
KEYS = 1_000
WORKLOADS: dict[str, tuple[str, int]] = {
    f"{operation}-{tasks}": (operation, tasks)
    for operation, tasks in (
        ("select", 1),
        ("select", 100),
        ("insert", 1),
        ("insert", 50),
        ("offloaded", 1),
        ("offloaded", 50),
        ("interactive", 50),
    )
}
"""What one task does, and how many tasks do it."""


@dataclass(frozen=True)
class Measured:
    """What one interpreter measured."""

    rate: float
    """Calls per second."""
    cpu: float
    """Microseconds of the CPU's time per call."""


@dataclass(frozen=True)
class Comparison:
    """All rounds of one workload on both checkouts."""

    workload: str
    before: list[Measured]
    after: list[Measured]

    def line(self) -> str:
        """A row of the table; changes in per cent, what is slower or dearer with a plus before the CPU's time."""
        rates = [median(each.rate for each in side) for side in (self.before, self.after)]
        times = [median(each.cpu for each in side) for side in (self.before, self.after)]
        least = [min(each.cpu for each in side) for side in (self.before, self.after)]
        return (
            f"{self.workload:16}{rates[0]:10,.0f}{rates[1]:10,.0f}{_change(*rates):>9}"
            f"{times[0]:10.1f}{times[1]:10.1f}{_change(*times):>9}{least[0]:10.1f}{least[1]:10.1f}{_change(*least):>9}"
        )


HEAD = (
    f"{'workload':16}{'before/s':>10}{'after/s':>10}{'change':>9}"
    f"{'µs CPU':>10}{'after':>10}{'change':>9}{'least':>10}{'after':>10}{'change':>9}"
)


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def once(checkout: Path, workload: str, template: Path, *, seconds: float, backend: str) -> Measured:
    """One checkout at one workload, in an interpreter of its own; the database is looked at afterwards."""
    operation, tasks = WORKLOADS[workload]
    path = template.with_name("compare.db")
    store.remove(path)
    store.copy(template, path)
    order = {
        "checkout": str(checkout.resolve()),
        "path": str(path),
        "operation": operation,
        "tasks": tasks,
        "seconds": seconds,
        "backend": backend,
        "statements": STATEMENTS,
        "names": [store.name_of(key) for key in range(KEYS + 1)],
    }
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD), json.dumps(order)],
        cwd=template.parent,
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        capture_output=True,
        text=True,
        timeout=60 + 10 * seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{checkout} at {workload}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    answered = found["answered"]
    store.verify(
        path,
        transactions=answered if operation in {"offloaded", "interactive"} else 0,
        inserts=answered if operation == "insert" else 0,
        bulk=0,
    )
    store.remove(path)
    return Measured(found["calls"] / found["seconds"], 1e6 * found["cpu"] / found["calls"])


def compare(
    before: Path, after: Path, workload: str, folder: Path, *, rounds: int, seconds: float, backend: str = "asyncio"
) -> Comparison:
    """One workload on both checkouts, which take turns."""
    template = folder / "template.db"
    if not template.exists():
        store.seed(template, items=KEYS, bulk=0)
    found: dict[bool, list[Measured]] = {False: [], True: []}
    for turn in range(rounds):
        for second in (False, True) if turn % 2 == 0 else (True, False):
            checkout = after if second else before
            found[second].append(once(checkout, workload, template, seconds=seconds, backend=backend))
    return Comparison(workload, found[False], found[True])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compare",
        description="Compare two checkouts of this package, which take turns. Changes of the CPU's time beyond noise are real.",
    )
    found.add_argument("before", type=Path, help="a checkout, for instance made by `git worktree add ../before main`")
    found.add_argument("after", type=Path, help="another one")
    found.add_argument("--rounds", type=int, default=5, help="default: 5")
    found.add_argument("--seconds", type=float, default=0.5, help="of one checkout in one round; default: 0.5")
    found.add_argument(
        "--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD", help=", ".join(WORKLOADS)
    )
    found.add_argument("--backend", choices=BACKENDS, default="asyncio", help="the event loop; default: asyncio")
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
        print(HEAD, flush=True)
        for workload in arguments.only:
            done = compare(
                arguments.before,
                arguments.after,
                workload,
                folder,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                backend=arguments.backend,
            )
            print(done.line(), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
