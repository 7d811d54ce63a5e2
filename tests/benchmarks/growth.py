"""How cost grows: with the tasks, the rows of the table, the readers of the pool and the size of a result."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from time import perf_counter as clock
from typing import Any

import anyio

from . import store
from .contenders import Contender, Raw
from .runner import CONTENDERS, NO_LOOP, Runner, on_loop, reason

TASKS = (1, 10, 100, 1_000, 10_000)
ROWS = (1_000, 10_000, 100_000, 1_000_000)
FULL_ROWS = (*ROWS, 10_000_000)
POOL = (1, 2, 4, 8, 16, 32)
RESULT = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
SCAN, QUICK_SCAN = 30_000, 100
QUICK_TASKS, QUICK_ROWS, QUICK_POOL, QUICK_RESULT = (1, 10), (1_000, 2_000), (1, 2), (1, 10, 2_000)

DATABASES, QUICK_DATABASES = (1, 10, 100), (1, 3)

_OPEN = """
import shutil, sys, threading
from pathlib import Path
import anyio
from database.sqlite3 import close_all, configure, get_db

path, count = Path(sys.argv[1]), int(sys.argv[2])

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

async def main():
    names = [f"db{number}" for number in range(count + 1)]
    for name in names:
        shutil.copy(path, path.with_name(name))
    databases = {name: {"path": str(path.with_name(name)), "init_sql": ""} for name in names}
    configure({"database": {"sqlite": {"path": str(path), "init_sql": "", "databases": databases}}})

    async def use(name):
        db = get_db(name)
        await db.fetch_one("SELECT name FROM item WHERE id = 1")
        await db.execute("UPDATE item SET hits = hits + 1 WHERE id = 1")

    await use(names[0])  # what is loaded with the first one is not the others' price
    threads, memory = threading.active_count(), resident()
    for name in names[1:]:
        await use(name)
    print(threading.active_count() - threads, resident() - memory)
    await close_all()
    for name in names:
        path.with_name(name).unlink()

anyio.run(main)
"""

Measure = Callable[[Any], Awaitable[float]]


class Growth:
    """The studies, with a runner's event loops, contenders and plan."""

    def __init__(self, runner: Runner, *, quick: bool, full: bool) -> None:
        self.runner = runner
        self.quick = quick
        self.rows = QUICK_ROWS if quick else FULL_ROWS if full else ROWS
        self.seconds = runner.plan.seconds / 2
        self.names = {contender.name for contender in runner.contenders}

    def run(self) -> list[dict[str, Any]]:
        """All studies."""
        studies = [self.tasks, self.table, self.pool, self.result]
        if Path("/proc/self/status").exists():  # which tells of the memory
            studies.append(self.databases)
        found = []
        for study in studies:
            started = clock()
            found.append(study())
            self.runner.say(f"growth by {found[-1]['axis']}: {clock() - started:.0f} s")
        return found

    def tasks(self) -> dict[str, Any]:
        """Point selects and transactions of 1 to 10,000 tasks."""
        counts = QUICK_TASKS if self.quick else TASKS
        with self._file(store.ITEMS, 1) as path:
            series = {
                f"{what}{label}": {
                    str(n): self._median(contender, backend, path, self._calls(method, n)) for n in counts
                }
                for what, name, method in (
                    ("point selects", "database", "point"),
                    ("transactions", "database", "transact"),
                    ("offloaded transactions", "database offload", "transact"),
                )
                for contender, backend, label in self._entrants(name)
            }
        return _study("Throughput by number of tasks", "tasks", "per second", counts, series)

    def table(self) -> dict[str, Any]:
        """Point selects of 100 tasks in tables of 1,000 to 1,000,000 rows, or ten times that."""
        series: dict[str, dict[str, float]] = {}
        for n in self.rows:
            with self._file(n, 1) as path:
                for name in ("raw", "database"):
                    for contender, backend, label in self._entrants(name):
                        value = self._median(contender, backend, path, self._calls("point", 100, n))
                        series.setdefault(f"{name}{label}", {})[str(n)] = value
        return _study("Point selects of 100 tasks by rows in the table", "rows", "per second", self.rows, series)

    def pool(self) -> dict[str, Any]:
        """Point selects, and statements of some milliseconds, with 1 to 32 readers.

        Scans, not the recursive query of `slow_query`: that one allocates memory for every step, and two of them at once
        fight over SQLite's allocator, whoever runs them.
        """
        counts = QUICK_POOL if self.quick else POOL
        rows = QUICK_SCAN if self.quick else SCAN
        with self._file(store.ITEMS, rows) as path:
            series = {
                f"{what}{label}": {str(n): self._median(contender, backend, path, measure, readers=n) for n in counts}
                for what, measure in (
                    ("point selects", self._calls("point", 100)),
                    (f"scans of {rows:,} rows", self._calls("scan", 100, argument=rows)),
                )
                for contender, backend, label in self._entrants("database")
            }
        return _study("100 tasks by size of the pool", "readers", "per second", counts, series)

    def result(self) -> dict[str, Any]:
        """Rows a second from results of 1 to 1,000,000 rows, one task."""
        sizes = QUICK_RESULT if self.quick else RESULT

        def measure(n: int) -> Measure:
            async def run(contender: Any) -> float:
                count = 0
                start = clock()
                while (took := clock() - start) < self.seconds or not count:
                    rows = await contender.fetch_first(n)
                    if len(rows) != n or rows[-1][0] != n:
                        raise store.WrongAnswerError(f"{len(rows)} rows of {n}")
                    count += n
                    del rows
                return count / took

            return run

        with self._file(1, max(sizes)) as path:
            series = {
                f"{name}{label}": {str(n): self._median(contender, backend, path, measure(n)) for n in sizes}
                for name in ("raw", "database")
                for contender, backend, label in self._entrants(name)
            }
        return _study(
            "Rows a second by size of the result, one task",
            "rows in the result",
            "rows per second",
            sizes,
            series,
        )

    def databases(self) -> dict[str, Any]:
        """Threads and memory of 1 to 100 databases that are open at once, each having answered one read and one write."""
        counts = QUICK_DATABASES if self.quick else DATABASES
        series: dict[str, dict[str, float]] = {"threads": {}, "KiB": {}, "KiB each": {}}
        with self._file(1, 1) as path:
            for count in counts:
                threads, kib = (
                    int(word)
                    for word in subprocess.run(
                        [sys.executable, "-c", _OPEN, str(path), str(count)],
                        check=True,
                        capture_output=True,
                        text=True,
                        cwd=Path(__file__).parents[2],
                    ).stdout.split()
                )
                series["threads"][str(count)] = threads
                series["KiB"][str(count)] = kib
                series["KiB each"][str(count)] = kib / count
        return _study("Databases open at once", "databases", "beyond what the process has without any", counts, series)

    def _entrants(self, name: str) -> list[tuple[type[Contender], str, str]]:
        contender = CONTENDERS[name]
        if name not in self.names:
            return []
        if contender is Raw:
            return [(contender, NO_LOOP, "")]
        several = len(self.runner.backends) > 1
        return [(contender, backend, f" · {backend}" if several else "") for backend in self.runner.backends]

    def _calls(self, method: str, tasks: int, keys: int = store.ITEMS, *, argument: int | None = None) -> Measure:
        """Calls a second of a method from so many tasks, with random keys or always the same argument."""
        chosen = [argument or random.randint(1, keys) for _ in range(10_007)]

        async def run(contender: Any) -> float:
            call = getattr(contender, method)
            done = 0
            until = clock() + self.seconds
            gate = anyio.Event()

            async def task(first: int) -> None:
                nonlocal done
                turn = first
                await gate.wait()  # starting 10,000 tasks takes longer than what is measured
                while not done or clock() < until:
                    turn += 1
                    key = chosen[turn % 10_007]
                    answer = await call(key)
                    if method == "point" and (answer[0] != key or answer[1] != store.name_of(key)):
                        raise store.WrongAnswerError(f"key {key}: {tuple(answer)}")
                    if method == "scan" and answer != key * (key + 1) / 2 * 3.5:
                        raise store.WrongAnswerError(f"the first {key} rows add up to {answer}")
                    done += 1

            start = clock()
            if isinstance(contender, Raw):
                while not done or clock() < until:
                    key = chosen[done % 10_007]
                    if call(key)[1] != store.name_of(key):
                        raise store.WrongAnswerError(f"key {key}")
                    done += 1
            else:
                async with anyio.create_task_group() as group:
                    for number in range(tasks):
                        group.start_soon(task, number * 41)
                    await anyio.wait_all_tasks_blocked()
                    start = clock()
                    until = start + self.seconds
                    gate.set()
            return done / (clock() - start)

        return run

    def _median(self, contender: type[Contender], backend: str, path: Path, measure: Measure, **options: Any) -> float:
        values: list[float] = []

        async def main() -> None:
            instance = contender(path, "NORMAL", **options)
            await instance.open()
            try:
                values.append(await measure(instance))
            finally:
                await instance.close()

        try:
            for _ in range(self.runner.rounds):
                gc.collect()
                on_loop(backend, main)
        except (Exception, BaseExceptionGroup) as caught:
            self.runner.say(f"  {contender.name} on {backend}: {reason(caught)}")
            return float("nan")
        return median(values)

    def _file(self, items: int, bulk: int) -> _File:
        return _File(self.runner.folder / "growth.db", items, bulk)


class _File:
    """A database file of its own size, removed afterwards."""

    def __init__(self, path: Path, items: int, bulk: int) -> None:
        self.path = path
        self.items = items
        self.bulk = bulk

    def __enter__(self) -> Path:
        store.seed(self.path, items=self.items, bulk=self.bulk)
        return self.path

    def __exit__(self, *_error: object) -> None:
        store.remove(self.path)


def _study(title: str, axis: str, unit: str, x: tuple[int, ...], series: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"title": title, "axis": axis, "unit": unit, "x": list(x), "series": series}
