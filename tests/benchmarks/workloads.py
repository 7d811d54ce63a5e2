"""What is measured.

A workload calls one contender from a number of tasks until its time is up, checks every answer as it comes,
and leaves its figures in a `Trial`, together with the number of writes that were acknowledged: the runner
compares it with the database once the contender has closed it.

Rates are per second. Latencies are what a task sees from one answer to the next, in milliseconds.
"""

from __future__ import annotations

import random
import sqlite3
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import fmean
from time import perf_counter as clock
from typing import Any

import anyio

from .contenders import Raw
from .store import ITEMS, SLOW, WrongAnswerError, name_of


@dataclass(frozen=True)
class Plan:
    """How long and how much."""

    seconds: float = 1.0
    bulk: int = 100_000
    repeats: int = 3
    slow_seconds: float = 1.0

    @property
    def warm_up(self) -> float:
        """Seconds of running before anything is timed: pools open, caches fill."""
        return self.seconds / 10


QUICK = Plan(seconds=0.04, bulk=2_000, repeats=1, slow_seconds=0.04)


@dataclass
class Trial:
    """One contender in one round of one workload."""

    plan: Plan
    metrics: dict[str, float] = field(default_factory=dict)
    transactions: int = 0
    inserts: int = 0
    bulk: int = 0

    def latencies(self, seconds: Sequence[float], prefix: str = "") -> None:
        """Record percentiles of latencies."""
        ordered = sorted(seconds)
        for name, fraction in (("p50", 0.50), ("p99", 0.99), ("max", 1.0)):
            value = ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] if ordered else float("nan")
            self.metrics[f"{prefix}{name}_ms"] = value * 1000


@dataclass(frozen=True)
class Workload:
    """A workload: what it needs of a contender, and the function that runs it."""

    name: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[Any, Trial], Awaitable[None]]
    raw: bool = True
    """Whether the raw loop can run it; what is about the event loop it cannot."""
    synchronous: str = "NORMAL"
    unit: str = "per second"
    headline: str = "rate"


NAMES = [name_of(key) for key in range(ITEMS + 1)]
_random = random.Random(3)
KEYS = [_random.randint(1, ITEMS) for _ in range(4099)]  # a prime: tasks that start apart stay apart


def _keys(task: int) -> cycle[int]:
    start = task * 41 % len(KEYS)
    return cycle(KEYS[start:] + KEYS[:start])


# The loops, each with its synchronous twin for `raw`. All do the same work a turn.


async def _read(contender: Any, task: int, until: float, latencies: list[float]) -> None:
    point, done = contender.point, latencies.append
    last = clock()
    for key in _keys(task):
        row = await point(key)
        if row[0] != key or row[1] != NAMES[key]:
            raise WrongAnswerError(f"key {key}: {tuple(row)}")
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


def _read_raw(contender: Raw, task: int, until: float, latencies: list[float]) -> None:
    point, done = contender.point, latencies.append
    last = clock()
    for key in _keys(task):
        row = point(key)
        if row[0] != key or row[1] != NAMES[key]:
            raise WrongAnswerError(f"key {key}: {tuple(row)}")
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


async def _three(contender: Any, task: int, until: float, latencies: list[float]) -> None:
    three, done = contender.three, latencies.append
    keys = _keys(task)
    last = clock()
    while True:
        wanted = next(keys), next(keys), next(keys)
        _check_rows(await three(wanted), wanted)
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


def _three_raw(contender: Raw, task: int, until: float, latencies: list[float]) -> None:
    three, done = contender.three, latencies.append
    keys = _keys(task)
    last = clock()
    while True:
        wanted = next(keys), next(keys), next(keys)
        _check_rows(three(wanted), wanted)
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


def _check_rows(rows: Sequence[Any], keys: Sequence[int]) -> None:
    for row, key in zip(rows, keys, strict=True):
        if row[0] != key or row[1] != NAMES[key]:
            raise WrongAnswerError(f"key {key}: {tuple(row)}")


async def _write(contender: Any, task: int, until: float, latencies: list[float], method: str) -> None:
    write, done = getattr(contender, method), latencies.append
    last = clock()
    for key in _keys(task):
        await write(key)
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


def _write_raw(contender: Raw, task: int, until: float, latencies: list[float], method: str) -> None:
    write, done = getattr(contender, method), latencies.append
    last = clock()
    for key in _keys(task):
        write(key)
        now = clock()
        done(now - last)
        last = now
        if now >= until:
            return


async def _mix(contender: Any, task: int, until: float, reads: list[float], writes: list[float]) -> None:
    last = clock()
    for turn, key in enumerate(_keys(task), start=task):
        if turn % 10:
            row = await contender.point(key)
            if row[0] != key or row[1] != NAMES[key]:
                raise WrongAnswerError(f"key {key}: {tuple(row)}")
            now = clock()
            reads.append(now - last)
        else:
            await contender.transact(key)
            now = clock()
            writes.append(now - last)
        last = now
        if now >= until:
            return


def _mix_raw(contender: Raw, task: int, until: float, reads: list[float], writes: list[float]) -> None:
    last = clock()
    for turn, key in enumerate(_keys(task), start=task):
        if turn % 10:
            row = contender.point(key)
            if row[0] != key or row[1] != NAMES[key]:
                raise WrongAnswerError(f"key {key}: {tuple(row)}")
            now = clock()
            reads.append(now - last)
        else:
            contender.transact(key)
            now = clock()
            writes.append(now - last)
        last = now
        if now >= until:
            return


_TWINS: dict[Callable[..., Any], Callable[..., None]] = {
    _read: _read_raw,
    _three: _three_raw,
    _write: _write_raw,
    _mix: _mix_raw,
}


async def together(
    loop: Callable[..., Coroutine[Any, Any, None]], tasks: int, contender: Any, seconds: float, *rest: Any
) -> float:
    """Run a loop in so many tasks for so many seconds; returns the seconds taken. `raw` runs the twin."""
    start = clock()
    if isinstance(contender, Raw):
        _TWINS[loop](contender, 0, start + seconds, *rest)
    elif tasks == 1:
        await loop(contender, 0, start + seconds, *rest)
    else:
        async with anyio.create_task_group() as group:
            for task in range(tasks):
                group.start_soon(loop, contender, task, start + seconds, *rest)
    return clock() - start


# The workloads.


def reads(
    tasks: int, loop: Callable[..., Coroutine[Any, Any, None]] = _read
) -> Callable[[Any, Trial], Awaitable[None]]:
    """Point selects from so many tasks, or another way to read."""

    async def run(contender: Any, trial: Trial) -> None:
        await together(loop, tasks, contender, trial.plan.warm_up, [])
        latencies: list[float] = []
        took = await together(loop, tasks, contender, trial.plan.seconds, latencies)
        trial.metrics["rate"] = len(latencies) / took
        trial.latencies(latencies)

    return run


def writes(method: str, counter: str, tasks: int) -> Callable[[Any, Trial], Awaitable[None]]:
    """Writes from so many tasks by the contender's ``method``, counted in the trial's ``counter``."""

    async def run(contender: Any, trial: Trial) -> None:
        warm: list[float] = []
        latencies: list[float] = []
        await together(_write, tasks, contender, trial.plan.warm_up, warm, method)
        took = await together(_write, tasks, contender, trial.plan.seconds, latencies, method)
        setattr(trial, counter, len(warm) + len(latencies))
        trial.metrics["rate"] = len(latencies) / took
        trial.latencies(latencies)

    return run


MIXED_TASKS = 50


async def mixed(contender: Any, trial: Trial) -> None:
    """Nine reads to a transaction; reads alone, from as many tasks, say what the writers cost them."""
    warm: list[float] = []
    await together(_mix, MIXED_TASKS, contender, trial.plan.warm_up, [], warm)
    alone: list[float] = []
    await together(_read, MIXED_TASKS, contender, trial.plan.seconds / 2, alone)
    trial.latencies(alone, "read_alone_")
    read: list[float] = []
    written: list[float] = []
    took = await together(_mix, MIXED_TASKS, contender, trial.plan.seconds, read, written)
    trial.transactions = len(warm) + len(written)
    trial.metrics["rate"] = (len(read) + len(written)) / took
    trial.latencies(read, "read_")
    trial.latencies(written, "write_")


async def fetch_all(contender: Any, trial: Trial) -> None:
    """All rows of a table as a list."""
    wanted = trial.plan.bulk
    took = 0.0
    for turn in range(trial.plan.repeats + 1):
        start = clock()
        rows = await contender.fetch_all()
        if turn:  # the first warms up
            took += clock() - start
        if len(rows) != wanted or sum(row[0] for row in rows) != wanted * (wanted + 1) // 2:
            raise WrongAnswerError(f"{len(rows)} rows of {wanted}, or not their ids")
        if tuple(rows[-1]) != (wanted, name_of(wanted), wanted / 2):
            raise WrongAnswerError(f"last row {tuple(rows[-1])}")
        del rows
    trial.metrics["rate"] = trial.plan.repeats * wanted / took


async def stream(contender: Any, trial: Trial) -> None:
    """All rows one by one; once more, off the clock, for the peak of Python's memory."""
    wanted = trial.plan.bulk
    took = 0.0
    for turn in range(trial.plan.repeats + 1):
        start = clock()
        answer = await contender.stream()
        if turn:
            took += clock() - start
        if answer != (wanted, wanted * (wanted + 1) // 2):
            raise WrongAnswerError(f"rows and sum of ids {answer}, {wanted} rows")
    trial.metrics["rate"] = trial.plan.repeats * wanted / took
    tracemalloc.start()
    try:
        await contender.stream()
        trial.metrics["peak_kib"] = tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


async def execute_many(contender: Any, trial: Trial) -> None:
    """Many rows in one call, all or nothing."""
    rows = [(name_of(key), key / 2) for key in range(trial.plan.bulk)]
    await contender.insert_many(rows[:1])
    start = clock()
    for _ in range(trial.plan.repeats):
        await contender.insert_many(rows)
    trial.metrics["rate"] = trial.plan.repeats * len(rows) / (clock() - start)
    trial.bulk = trial.plan.repeats * len(rows) + 1


_steps_a_second: list[float] = []


def slow_steps(seconds: float) -> int:
    """How far the slow statement has to count to take so long on this machine, alone."""
    if not _steps_a_second:
        connection = sqlite3.connect(":memory:")
        times = []
        for _ in range(5):
            start = clock()
            connection.execute(SLOW, (500_000,)).fetchone()
            times.append(clock() - start)
        connection.close()
        _steps_a_second.append(500_000 / min(times))
    return int(_steps_a_second[0] * seconds)


async def slow_query(contender: Any, trial: Trial) -> None:
    """Point selects of 100 tasks while one statement computes for a second, then as long again without it."""
    steps = slow_steps(trial.plan.slow_seconds)
    await together(_read, 100, contender, trial.plan.warm_up, [])
    before: list[float] = []
    beside: list[float] = []
    current = before
    running = True

    async def reader(task: int) -> None:
        last = clock()
        for key in _keys(task):
            row = await contender.point(key)
            if row[0] != key or row[1] != NAMES[key]:
                raise WrongAnswerError(f"key {key}: {tuple(row)}")
            now = clock()
            current.append(now - last)
            last = now
            if not running:
                return

    async with anyio.create_task_group() as group:
        for task in range(100):
            group.start_soon(reader, task)
        await anyio.sleep(trial.plan.slow_seconds / 5)
        current = beside
        start = clock()
        answer = await contender.slow(steps)
        took = clock() - start
        running = False
    if answer != steps:
        raise WrongAnswerError(f"the slow statement answered {answer}, not {steps}")
    trial.latencies(beside)
    trial.metrics["rate"] = len(beside) / took
    trial.metrics["slow_s"] = took
    trial.metrics["rate_before"] = len(before) / (trial.plan.slow_seconds / 5)


async def _tick(lags: list[float], until: float) -> None:
    while (start := clock()) < until:
        await anyio.sleep(0.001)
        lags.append(max(0.0, clock() - start - 0.001))


async def _with_ticker(work: Callable[[float], Awaitable[float]], trial: Trial) -> None:
    """Time ``work(seconds)``, which returns a rate, without and with a ticker; idle first."""
    seconds = trial.plan.seconds
    await work(trial.plan.warm_up)
    idle: list[float] = []
    await _tick(idle, clock() + seconds / 4)
    trial.latencies(idle, "idle_")
    # Without, with, without: what drifts meanwhile (a growing heap, another process) falls out.
    without = await work(seconds / 2)
    lags: list[float] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_tick, lags, clock() + seconds)
        rate = await work(seconds)
    without = (without + await work(seconds / 2)) / 2
    trial.latencies(lags)
    trial.metrics["rate"] = rate
    trial.metrics["kept"] = rate / without


def lag_of_reads(tasks: int) -> Callable[[Any, Trial], Awaitable[None]]:
    """How late a 1 ms ticker is while so many tasks read."""

    async def run(contender: Any, trial: Trial) -> None:
        async def work(seconds: float) -> float:
            latencies: list[float] = []
            took = await together(_read, tasks, contender, seconds, latencies)
            return len(latencies) / took

        await _with_ticker(work, trial)

    return run


async def loop_lag_rows(contender: Any, trial: Trial) -> None:
    """How late a 1 ms ticker is while big results are fetched one after the other."""

    async def work(seconds: float) -> float:
        start = clock()
        count = 0
        while clock() - start < seconds:
            rows = await contender.fetch_all()
            count += len(rows)
            del rows
        took = clock() - start
        if count % trial.plan.bulk:
            raise WrongAnswerError(f"{count} rows, not a multiple of {trial.plan.bulk}")
        return count / took

    await _with_ticker(work, trial)


async def busy_loop(contender: Any, trial: Trial) -> None:
    """Point selects of one task while another burns the event loop in slices of 1 ms."""
    seconds = trial.plan.seconds

    async def burn(until: float) -> float:
        """Turns of a loop a second."""
        turns = 0
        start = clock()
        while (now := clock()) < until:
            while clock() < now + 0.001:
                turns += 1
            await anyio.sleep(0)
        return turns / (clock() - start)

    await together(_read, 1, contender, trial.plan.warm_up, [])
    alone = [await burn(clock() + seconds / 2)]
    latencies: list[float] = []
    until = clock() + 2 * seconds
    async with anyio.create_task_group() as group:
        group.start_soon(_read, contender, 0, until, latencies)
        beside = await burn(until)
    alone.append(await burn(clock() + seconds / 2))
    trial.latencies(latencies)
    trial.metrics["rate"] = len(latencies) / (2 * seconds)
    trial.metrics["burner_loss"] = max(0.0, 1 - beside / fmean(alone))


_MS: dict[str, Any] = {"raw": False, "unit": "ms", "headline": "p99_ms"}

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("seq_read", "one task, point selects", ("point",), reads(1)),
        Workload("ten_read", "10 tasks, point selects", ("point",), reads(10)),
        Workload("conc_read", "100 tasks, point selects", ("point",), reads(100)),
        Workload("seq_three", "one task, three selects in a read-only transaction", ("three",), reads(1, _three)),
        Workload("conc_three", "100 tasks, three selects in a read-only transaction", ("three",), reads(100, _three)),
        Workload("seq_tx", "one task, INSERT and UPDATE", ("transact",), writes("transact", "transactions", 1)),
        Workload("conc_tx", "50 tasks, INSERT and UPDATE", ("transact",), writes("transact", "transactions", 50)),
        Workload(
            "conc_tx_full",
            "50 tasks, INSERT and UPDATE, synchronous=FULL",
            ("transact",),
            writes("transact", "transactions", 50),
            synchronous="FULL",
        ),
        Workload("conc_insert", "100 tasks, single INSERTs", ("insert",), writes("insert", "inserts", 100)),
        Workload(
            "conc_insert_full",
            "100 tasks, single INSERTs, synchronous=FULL",
            ("insert",),
            writes("insert", "inserts", 100),
            synchronous="FULL",
        ),
        Workload("mixed", "50 tasks, nine reads to a transaction", ("point", "transact"), mixed),
        Workload("fetch_all", "100,000 rows as a list", ("fetch_all",), fetch_all, unit="rows per second"),
        Workload("stream", "100,000 rows one by one", ("stream",), stream, unit="rows per second"),
        Workload("execute_many", "100,000 rows in one call", ("insert_many",), execute_many, unit="rows per second"),
        Workload(
            "slow_query",
            "point selects of 100 tasks beside 1 s of work",
            ("point", "slow"),
            slow_query,
            **_MS,
        ),
        Workload("loop_lag_1", "1 ms ticker while one task reads", ("point",), lag_of_reads(1), **_MS),
        Workload("loop_lag_10", "1 ms ticker while 10 tasks read", ("point",), lag_of_reads(10), **_MS),
        Workload("loop_lag_reads", "1 ms ticker while 100 tasks read", ("point",), lag_of_reads(100), **_MS),
        Workload("loop_lag_rows", "1 ms ticker while 100,000-row reads run", ("fetch_all",), loop_lag_rows, **_MS),
        Workload("busy_loop", "point selects beside a burner in 1 ms slices", ("point",), busy_loop, **_MS),
    )
}
