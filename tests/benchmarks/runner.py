"""Rounds: every contender in turn on a fresh database file, then the next round; medians over the rounds."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anyio

from . import cold, store
from .contenders import RAW_AND_OURS, Contender, Raw
from .neighbours import NEIGHBOURS
from .wake import wake
from .workloads import WORKLOADS, Plan, Trial, Workload, slow_steps

CONTENDERS: dict[str, type[Contender]] = {contender.name: contender for contender in (*RAW_AND_OURS, *NEIGHBOURS)}
DISTRIBUTIONS = (
    *("jobu-database", "anyio", "trio", "uvloop", "aiosql", "aiosqlite", "aiosqlitepool", "apsw", "asqlite"),
    "sqlalchemy",
)
NO_LOOP = "none"


@dataclass(frozen=True)
class Sample:
    """One contender's figures in one round, or what went wrong."""

    workload: str
    contender: str
    backend: str
    round: int
    metrics: dict[str, float]
    error: str = ""


@dataclass
class Results:
    """All samples of a run, and where they were taken."""

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)

    def workloads(self) -> list[str]:
        """Names of the workloads that were run, in order."""
        return list(dict.fromkeys(sample.workload for sample in self.samples))

    def backends(self) -> list[str]:
        """The event loops used."""
        found = dict.fromkeys(sample.backend for sample in self.samples if sample.backend != NO_LOOP)
        return list(found) or [NO_LOOP]

    def entrants(self, workload: str) -> list[tuple[str, str]]:
        """Contender and event loop of all who took part in a workload."""
        return list(dict.fromkeys((s.contender, s.backend) for s in self.samples if s.workload == workload))

    def of(self, workload: str, contender: str, backend: str) -> list[Sample]:
        """The rounds of one entrant; what runs without an event loop counts for all of them."""
        return [
            sample
            for sample in self.samples
            if sample.workload == workload and sample.contender == contender and sample.backend in (backend, NO_LOOP)
        ]

    def error(self, workload: str, contender: str, backend: str) -> str:
        """What went wrong in any round, or nothing."""
        return next((s.error for s in self.of(workload, contender, backend) if s.error), "")

    def values(self, workload: str, contender: str, backend: str, metric: str) -> list[float]:
        """One figure of all rounds; empty if any round went wrong."""
        samples = self.of(workload, contender, backend)
        if any(sample.error for sample in samples):
            return []
        return [sample.metrics[metric] for sample in samples if metric in sample.metrics]

    def median(self, workload: str, contender: str, backend: str, metric: str) -> float | None:
        """The median over the rounds; nothing if any round went wrong."""
        values = self.values(workload, contender, backend, metric)
        return median(values) if values else None

    def best_neighbour(
        self, workload: str, backend: str, metric: str = "rate", *, stdlib: bool = False
    ) -> tuple[str, float] | None:
        """The neighbour with the best median, and that; on request only of those on ``sqlite3``."""
        found = [
            (name, value)
            for name, contender in CONTENDERS.items()
            if contender.kind == "neighbour"
            and (contender.stdlib or not stdlib)
            and (value := self.median(workload, name, backend, metric)) is not None
        ]
        if not found:
            return None
        return (max if metric == "rate" else min)(found, key=lambda pair: pair[1])

    def to_json(self) -> str:
        """Everything, every round."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The reverse of `to_json`."""
        data = json.loads(text)
        return cls(**{**data, "samples": [Sample(**sample) for sample in data["samples"]]})


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on. No names of hosts, users or paths."""
    try:
        cpu = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "a hop": f"{wake():.0f} µs",
        "system": f"{platform.system()} {platform.release()}",
        "filesystem": store.filesystem(folder),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "versions": versions,
    }


def on_loop(backend: str, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function on an event loop, or, for ``none``, on no loop at all: it never suspends."""
    if backend == NO_LOOP:
        try:
            function().send(None)
        except StopIteration:
            return
        raise RuntimeError("the raw loop suspended")
    options = {"use_uvloop": True} if backend == "uvloop" else {}
    anyio.run(function, backend="trio" if backend == "trio" else "asyncio", backend_options=options)


def reason(error: BaseException) -> str:
    """The first of the errors in a group, in one line, marked as wrong if it is an answer that was."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")
    return f"WRONG: {text}" if isinstance(error, store.WrongAnswerError) else f"FAILED: {text}"


class Runner:
    """Knows the contenders, event loops and plan of a run, and where its database files are."""

    def __init__(
        self,
        folder: Path,
        *,
        plan: Plan,
        contenders: Sequence[str],
        backends: Sequence[str],
        rounds: int,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.contenders = [CONTENDERS[name] for name in contenders if CONTENDERS[name].installed()]
        self.backends = list(backends)
        self.rounds = rounds
        self.say = say
        self.template = folder / "template.db"
        for module in {module for contender in self.contenders for module in contender.requires}:
            import_module(module)  # all of them first: a later import would change the heap between two rounds
        self.results = Results(
            machine(folder),
            {**asdict(plan), "rounds": rounds, "backends": self.backends, "contenders": list(contenders)},
        )
        store.seed(self.template, bulk=plan.bulk)

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A fresh copy of the database file."""
        path = self.folder / "benchmark.db"
        store.remove(path)
        store.copy(self.template, path)
        try:
            yield path
        finally:
            store.remove(path)

    def entrants(self, workload: Workload) -> list[tuple[type[Contender], str]]:
        """Who takes part in a workload, and on which event loop."""
        return [
            (contender, backend)
            for contender in self.contenders
            if contender.supports(workload.needs)
            for backend in (self.backends if contender is not Raw else [NO_LOOP] if workload.raw else [])
            if backend in contender.backends
        ]

    def run(self, workloads: Iterable[str]) -> Results:
        """All rounds of the workloads named."""
        for name in workloads:
            started = perf_counter()
            if name == "cold":
                self._run_cold()
            else:
                entrants = self.entrants(WORKLOADS[name])
                for turn in range(self.rounds):
                    # Who begins changes from round to round: nobody always follows the same neighbour.
                    first = turn % max(1, len(entrants))
                    for contender, backend in entrants[first:] + entrants[:first]:
                        if self.results.error(name, contender.name, backend):
                            continue  # it will not be reported anyway
                        sample = self.once(WORKLOADS[name], contender, backend, turn)
                        self.results.samples.append(sample)
                        if sample.error:
                            self.say(f"  {contender.name} on {backend}: {sample.error}")
                self._sort(name, entrants)
            self.say(f"{name}: {perf_counter() - started:.0f} s")
        return self.results

    def _sort(self, workload: str, entrants: list[tuple[type[Contender], str]]) -> None:
        order = {(contender.name, backend): place for place, (contender, backend) in enumerate(entrants)}
        mine = [sample for sample in self.results.samples if sample.workload == workload]
        others = [sample for sample in self.results.samples if sample.workload != workload]
        self.results.samples = others + sorted(mine, key=lambda s: (order[s.contender, s.backend], s.round))

    def once(self, workload: Workload, contender: type[Contender], backend: str, turn: int) -> Sample:
        """One contender, once."""
        trial = Trial(self.plan)
        slow_steps(1)  # calibrated before anything runs
        error = ""
        with self.fresh() as path:

            async def main() -> None:
                instance = contender(path, workload.synchronous)
                await instance.open()
                try:
                    await workload.run(instance, trial)
                finally:
                    await instance.close()

            async def within_time() -> None:
                with anyio.fail_after(20 + 10 * self.plan.seconds):
                    await main()

            gc.collect()
            try:
                on_loop(backend, main if backend == NO_LOOP else within_time)
                store.verify(path, transactions=trial.transactions, inserts=trial.inserts, bulk=trial.bulk)
            except (Exception, BaseExceptionGroup) as caught:
                error = reason(caught)
        return Sample(workload.name, contender.name, backend, turn, trial.metrics, error)

    def _run_cold(self) -> None:
        names = cold.programs({contender.name for contender in self.contenders})
        rounds = range(max(2, self.rounds * 3) if self.rounds > 1 else 1)
        with self.fresh() as path:
            for name in names:  # once unrecorded: byte code gets compiled, files get cached
                try:
                    cold.run(name, path)
                except (RuntimeError, store.WrongAnswerError):
                    continue
            found: dict[str, list[Sample]] = {name: [] for name in names}
            for turn in rounds:
                for name in names:
                    metrics, error = {}, ""
                    try:
                        metrics = cold.run(name, path)
                    except (RuntimeError, store.WrongAnswerError) as caught:
                        error = reason(caught)
                    found[name].append(Sample("cold", name, NO_LOOP, turn, metrics, error))
        self.results.samples += [sample for samples in found.values() for sample in samples]

    def clean_up(self) -> None:
        """Remove the folder with the database files."""
        shutil.rmtree(self.folder, ignore_errors=True)
