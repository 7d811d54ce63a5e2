"""What is wanted of each workload, as data, and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runner import Results


@dataclass(frozen=True)
class Goal:
    """``metric`` of a contender in a workload, at least or at most ``bound`` times what ``of`` names.

    ``of`` is ``best`` (the fastest interactive neighbour), ``raw``, another contender's name,
    ``own <metric>``, or empty for an absolute bound, given with its ``unit``.
    """

    workload: str
    bound: float
    of: str = ""
    contender: str = "database"
    metric: str = "rate"
    at_most: bool = False
    unit: str = ""

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        metric = "" if self.metric == "rate" else f"{_words(self.metric)} "
        if self.unit == "%":
            return f"{metric}{sign} {self.bound:.0%}"
        of = f" × {_words(self.of)}" if self.of else f" {self.unit}".rstrip()
        return f"{metric}{sign} {self.bound:g}{of}"


def _words(name: str) -> str:
    return name.removeprefix("own ").removesuffix("_ms").replace("_", " ")


@dataclass(frozen=True)
class Verdict:
    """What came of a goal: ``value``, to be compared with its bound; ``None`` where nothing was measured."""

    goal: Goal
    backend: str
    value: float | None
    stdlib: float | None = None
    """The same against the best neighbour on the standard library's ``sqlite3``, where that is another."""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; ``None`` if that cannot be said."""
        if self.value is None:
            return None
        return self.value <= self.goal.bound if self.goal.at_most else self.value >= self.goal.bound


HANDLES, INLINE, OFFLOAD, TUPLES = "database handles", "database inline", "database offload", "database tuples"

GOALS: tuple[Goal, ...] = (
    Goal("seq_read", 1.2, "best"),
    Goal("seq_read", 0.85, "database", HANDLES),
    Goal("seq_read", 3.5, "best", INLINE),
    Goal("seq_read", 0.35, "raw", INLINE),
    Goal("ten_read", 1, "database", INLINE),
    Goal("conc_read", 0.97, "database", INLINE),
    Goal("seq_three", 6, "database", INLINE),
    Goal("seq_three", 5, "best", INLINE),
    *(
        Goal(lag, 1, "database", INLINE, metric="p99_ms", at_most=True)
        for lag in ("loop_lag_1", "loop_lag_10", "loop_lag_reads")
    ),
    Goal("slow_query", 1, "database", INLINE, metric="p99_ms", at_most=True),
    Goal("busy_loop", 1, "database", INLINE, metric="p50_ms", at_most=True),
    Goal("conc_read", 2.5, "best"),
    Goal("conc_read", 0.5, "raw"),
    Goal("conc_read", 0.85, "database", HANDLES),
    Goal("seq_tx", 1.3, "best"),
    Goal("conc_tx", 1.5, "best"),
    Goal("conc_tx", 2, "own p50_ms", metric="p99_ms", at_most=True),
    Goal("conc_tx", 15, "best", OFFLOAD),
    Goal("conc_tx", 1.5, "raw", OFFLOAD),
    Goal("conc_tx_full", 1.2, "best"),
    Goal("conc_tx_full", 15, "best", OFFLOAD),
    Goal("conc_tx_full", 8, "raw", OFFLOAD),
    Goal("conc_insert", 2.5, "best"),
    Goal("conc_insert", 1.1, "raw"),
    Goal("conc_insert_full", 8, "raw"),
    Goal("mixed", 1.5, "best"),
    Goal("mixed", 2, "own read_alone_p99_ms", metric="read_p99_ms", at_most=True),
    Goal("fetch_all", 0.9, "raw"),
    Goal("fetch_all", 0.9, TUPLES),
    Goal("stream", 1.5, "best"),
    Goal("stream", 2048, metric="peak_kib", at_most=True, unit="KiB"),
    Goal("execute_many", 0.9, "raw"),
    Goal("slow_query", 10, metric="p99_ms", at_most=True, unit="ms"),
    Goal("loop_lag_reads", 0.3, metric="p99_ms", at_most=True, unit="ms"),
    Goal("loop_lag_reads", 0.9, metric="kept", unit="%"),
    Goal("loop_lag_rows", 2, metric="p99_ms", at_most=True, unit="ms"),
    Goal("loop_lag_rows", 0.9, metric="kept", unit="%"),
    Goal("busy_loop", 5, metric="p50_ms", at_most=True, unit="ms"),
    Goal("busy_loop", 50, metric="max_ms", at_most=True, unit="ms"),
    Goal("busy_loop", 0.06, metric="burner_loss", at_most=True, unit="%"),
    Goal("cold", 1.3, "anyio, aiosql, yaml", metric="import_ms", at_most=True),
    Goal("cold", 0, metric="unasked", at_most=True, unit="modules"),
)

TRIO = 0.8
"""Under trio, every rate is wanted to be at least this part of asyncio's."""


def judge(goal: Goal, backend: str, results: Results) -> Verdict:
    """Compare a goal with the medians of one event loop."""
    value = results.median(goal.workload, goal.contender, backend, goal.metric)
    stdlib = None
    if goal.of == "best":
        best = results.best_neighbour(goal.workload, backend, goal.metric)
        alike = results.best_neighbour(goal.workload, backend, goal.metric, stdlib=True)
        reference = best[1] if best else None
        if value is not None and alike and best != alike:
            stdlib = value / alike[1]
    elif goal.of.startswith("own "):
        reference = results.median(goal.workload, goal.contender, backend, goal.of.removeprefix("own "))
    elif goal.of:
        reference = results.median(goal.workload, goal.of, backend, goal.metric)
    else:
        reference = 1.0
    if value is None or not reference:
        return Verdict(goal, backend, None)
    return Verdict(goal, backend, value / reference, stdlib)


def verdicts(results: Results) -> list[Verdict]:
    """All goals of the workloads that were run, for each event loop; trio is measured against asyncio."""
    found = []
    for backend in results.backends():
        for goal in GOALS:
            if goal.workload not in results.workloads():
                continue
            if goal.workload == "cold":
                if backend == results.backends()[0]:
                    found.append(judge(goal, backend, results))
            elif backend != "trio" or goal.of != "best":
                found.append(judge(goal, backend, results))
        if backend != "trio":
            continue
        for workload in results.workloads():
            for contender in ("database", OFFLOAD):
                value = results.median(workload, contender, "trio", "rate")
                asyncio = results.median(workload, contender, "asyncio", "rate")
                if value and asyncio:
                    goal = Goal(workload, TRIO, "asyncio", contender)
                    found.append(Verdict(goal, "trio", value / asyncio))
    return found
