"""`bench`: what this disk and this machine give, through this package, plain sqlite3 and whichever peers are installed.

What is compared stands in `contenders`. Each trial has a fresh copy of the same database, contenders take turns
in every round, and the median of the rounds counts. After each trial the database is compared with what was acknowledged.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from database import errors
from database.cli.contenders import CONTENDERS, ITEMS, TASKS, Contender, Ours, Raw, SqlAlchemy
from database.cli.support import Failure, Status, Target, clean, err, fail, out, out_json, run
from database.settings import MEMORY

__all__ = ["bench"]

# --- Workloads ----------------------------------------------------------------------------------------------


class Workload:
    """What is repeated until the time is up, and how many of the unit one turn is worth."""

    def __init__(
        self, name: str, title: str, method: str, *, tasks: int, unit: str, each: int = 1, logs: int = 0, hits: int = 0
    ) -> None:
        self.name = name
        self.title = title
        self.method = method
        self.tasks = tasks
        self.unit = unit
        self.each = each
        self.logs = logs
        self.hits = hits

    async def run(self, contender: Contender, seconds: float) -> tuple[int, float]:
        """Runs for a while; gives the number of turns, and the seconds they took."""
        turn = self._turn(contender)
        tasks = self.tasks if contender.concurrent else 1
        counts = [0] * tasks
        began = time.perf_counter()
        until = began + seconds

        async def work(task: int) -> None:
            key = task * 199 % ITEMS
            while not counts[task] or time.perf_counter() < until:
                key = (key + 7919) % ITEMS
                await turn(key + 1)
                counts[task] += 1

        if tasks == 1:
            await work(0)
        else:
            async with anyio.create_task_group() as group:
                for task in range(tasks):
                    group.start_soon(work, task)
        return sum(counts), time.perf_counter() - began

    def _turn(self, contender: Contender) -> Callable[[int], Awaitable[Any]]:
        method: Any = getattr(contender, self.method)
        if self.method == "point":

            async def point(key: int) -> None:
                row = await method(key)
                if row[0] != key or row[1] != f"item {key}":
                    raise Failure(f"{contender.name} answered {tuple(row)} for key {key}")

            return point
        if self.method == "rows":

            async def rows(_key: int) -> None:
                if await method() != ITEMS:
                    raise Failure(f"{contender.name} did not give all rows")

            return rows
        if self.method == "many":
            return lambda _key: method()
        return method  # type: ignore[no-any-return]


WORKLOADS = (
    Workload("read", f"read a row by its key, {TASKS} tasks", "point", tasks=TASKS, unit="rows"),
    Workload("read1", "read a row by its key, 1 task", "point", tasks=1, unit="rows"),
    Workload("write", f"insert a row, {TASKS} tasks", "insert", tasks=TASKS, unit="commits", logs=1),
    Workload(
        "transaction", f"insert and update, {TASKS} tasks", "transact", tasks=TASKS, unit="transactions", logs=1, hits=1
    ),
    Workload("bulk", "insert 1,000 rows at once", "many", tasks=1, unit="rows", each=1000, logs=1000),
    Workload("all", f"fetch {ITEMS:,} rows at once", "rows", tasks=1, unit="rows", each=ITEMS),
)

# --- The run ------------------------------------------------------------------------------------------------


def bench(
    target: Target, *, folder: str | None, seconds: float, rounds: int, only: Sequence[str], as_json: bool
) -> None:
    """Runs it all, and shows the figures."""
    place, synchronous = _place(target, folder)
    contenders = [each for each in CONTENDERS if each.package is None or find_spec(each.package) is not None]
    if find_spec("aiosqlite") is None:
        contenders = [each for each in contenders if each is not SqlAlchemy]
    workloads = list(WORKLOADS)
    if only:
        known = [*(each.name for each in WORKLOADS), *(each.name for each in CONTENDERS)]
        for name in only:
            if name not in known:
                fail(f"there is no workload or contender {name!r}", f"there are {', '.join(known)}", Status.USAGE)
        workloads = [each for each in workloads if each.name in only] or workloads
        contenders = [each for each in contenders if each.name in only] or contenders
    try:
        work = Path(tempfile.mkdtemp(prefix="jobu-database-bench-", dir=place))
    except OSError as error:
        fail(f"{place}: {error.strerror}", "name a folder that can be written to with --folder", Status.USAGE)
    try:
        rates = _measure(work, contenders, workloads, synchronous, seconds, rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    packages = {each.package: version(each.package) for each in contenders if each.package}
    about = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "folder": str(place),
        "synchronous": synchronous,
        "seconds": seconds,
        "rounds": rounds,
        "packages": packages,
    }
    results = [
        {
            "workload": workload.name,
            "title": workload.title,
            "unit": f"{workload.unit}/s",
            "rates": rates[workload.name],
        }
        for workload in workloads
    ]
    if as_json:
        out_json({**about, "results": results})
    else:
        _show(about, workloads, contenders, rates)


def _place(target: Target, folder: str | None) -> tuple[Path, str]:
    """Where to measure, and with which `synchronous`: as the configured database has it, if there is one."""
    path, synchronous = MEMORY, "NORMAL"
    try:
        engine, settings = target.settings()
        path, synchronous = getattr(settings, "path", MEMORY), getattr(settings, "synchronous", "NORMAL")
    except (Failure, errors.ConfigurationError):
        if target.config is not None:
            raise
    else:
        if engine != "sqlite3" and folder is None:
            fail(
                f"bench measures SQLite on a disk, and database {target.name!r} is on a server ({engine})",
                "--folder . measures this disk all the same; the server is measured by pgbench",
                Status.USAGE,
            )
    if folder is not None:
        place = Path(folder).expanduser()
    elif path == MEMORY:
        place = Path.cwd()
    else:
        place = Path(path).absolute().parent
        while not place.is_dir():
            place = place.parent
    if not place.is_dir():
        fail(f"{place}: no such folder", status=Status.USAGE)
    return place, synchronous


def _seed(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL, hits INTEGER NOT NULL DEFAULT 0)")
        db.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, item INTEGER NOT NULL, note TEXT NOT NULL)")
        db.execute("BEGIN")
        db.executemany("INSERT INTO item VALUES (?, ?, 0)", ((key, f"item {key}") for key in range(1, ITEMS + 1)))
        db.execute("COMMIT")


def _verify(path: Path, name: str, logs: int, hits: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT (SELECT count(*) FROM log), (SELECT sum(hits) FROM item)").fetchone()
    if found != (logs, hits):
        fail(
            f"{name} acknowledged {logs:,} rows and {hits:,} updates, and the database holds {found[0]:,} and {found[1]:,}"
        )


def _measure(
    work: Path,
    contenders: list[type[Contender]],
    workloads: list[Workload],
    synchronous: str,
    seconds: float,
    rounds: int,
) -> dict[str, dict[str, float]]:
    template = work / "template.db"
    _seed(template)
    found: dict[str, dict[str, list[float]]] = {
        each.name: {kind.name: [] for kind in contenders if each.method in kind.methods} for each in workloads
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        task = bar.add_task("", total=rounds * len(workloads) * len(contenders))
        for number in range(rounds):
            turn = number % len(contenders)
            for workload in workloads:
                for kind in contenders[turn:] + contenders[:turn]:
                    if workload.method not in kind.methods:
                        bar.advance(task)
                        continue
                    bar.update(task, description=f"{workload.name}: {kind.name}")
                    path = work / f"{workload.name}.db"
                    shutil.copyfile(template, path)
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())  # so that no write-back disturbs what is timed next
                    contender = kind(str(path), synchronous)
                    turns, took, warm = run(_trial, contender, workload, seconds)
                    _verify(path, kind.name, (turns + warm) * workload.logs, (turns + warm) * workload.hits)
                    found[workload.name][kind.name].append(turns * workload.each / took)
                    for suffix in ("", "-wal", "-shm"):
                        Path(f"{path}{suffix}").unlink(missing_ok=True)
                    bar.advance(task)
    return {
        workload: {contender: statistics.median(each) for contender, each in rates.items()}
        for workload, rates in found.items()
    }


async def _trial(contender: Contender, workload: Workload, seconds: float) -> tuple[int, float, int]:
    await contender.open()
    try:
        warm, _ = await workload.run(contender, seconds / 10)
        turns, took = await workload.run(contender, seconds)
    finally:
        await contender.close()
    return turns, took, warm


# --- Table and chart ----------------------------------------------------------------------------------------

_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def _bar(share: float) -> str:
    full, rest = divmod(round(share * _WIDTH * 8), 8)
    return ("█" * full + _EIGHTHS[rest].strip()) or "▏"


def _show(
    about: dict[str, Any],
    workloads: list[Workload],
    contenders: list[type[Contender]],
    rates: dict[str, dict[str, float]],
) -> None:
    packages = "".join(f", {name} {number}" for name, number in about["packages"].items())
    out().print(
        Text(
            clean(
                f"Python {about['python']}, SQLite {about['sqlite']}{packages}; {about['cpus']} CPUs; {about['folder']};"
                f" WAL, synchronous {about['synchronous']}; median of {about['rounds']} × {about['seconds']:g} s"
            ),
            style="dim",
        ),
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("per second")
    for kind in contenders:
        table.add_column(kind.name, justify="right", style="bold cyan" if kind is Ours else "")
    for workload in workloads:
        found = rates[workload.name]
        table.add_row(
            f"{workload.title} ({workload.unit})",
            *(f"{found[kind.name]:,.0f}" if kind.name in found else "" for kind in contenders),
        )
    out().print(table)
    width = max(len(kind.name) for kind in contenders)
    for workload in workloads:
        best = max(rates[workload.name].values(), default=0)
        if best:
            out().print(Text(f"{workload.title}, {workload.unit} per second", style="bold"))
        for kind in contenders:
            if kind.name not in rates[workload.name]:
                continue
            rate = rates[workload.name][kind.name]
            style = "cyan" if issubclass(kind, Ours) else "yellow" if kind is Raw else "bright_black"
            line = Text.assemble(f"  {kind.name:<{width}} ", (_bar(rate / best), style), f" {rate:,.0f}")
            out().print(line, soft_wrap=True)
