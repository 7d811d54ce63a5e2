"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .contenders import Contender
from .goals import Verdict, verdicts
from .runner import CONTENDERS, Results
from .workloads import WORKLOADS

_TITLES = {
    "rate": "per second",
    "kept": "throughput kept",
    "burner_loss": "burner loses",
    "peak_kib": "peak KiB",
    "slow_s": "slow query s",
    "rate_before": "per second before",
    "import_ms": "import ms",
    "first_query_ms": "first query ms",
    "unasked": "unasked-for modules",
}
_PERCENT = {"kept", "burner_loss"}


def number(value: float | None, metric: str = "rate") -> str:
    """A figure for people."""
    if value is None or value != value:
        return "–"
    if metric in _PERCENT:
        return f"{value:.1%}"
    if metric == "rate" or metric.startswith("rate_"):
        return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,.0f}"
    if metric == "unasked":
        return f"{value:.0f}"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title_of(workload: str) -> str:
    """What a workload is, in words."""
    return WORKLOADS[workload].title if workload in WORKLOADS else "import, and the first query of a new process"


def _label(contender: str, backend: str, results: Results) -> str:
    several = len(results.backends()) > 1
    return f"{contender} · {backend}" if several and backend not in {"none", "asyncio"} else contender


def _headline(workload: str) -> str:
    return WORKLOADS[workload].headline if workload in WORKLOADS else "import_ms"


def summary(results: Results) -> str:
    """One line for each goal-bearing contender: figures, ratios, goals, met or not."""
    rows = []
    order = results.workloads()
    judged: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in verdicts(results):
        judged.setdefault((verdict.goal.workload, verdict.goal.contender, verdict.backend), []).append(verdict)
    for (workload, contender, backend), some in sorted(judged.items(), key=lambda item: order.index(item[0][0])):
        metric = _headline(workload)
        value = results.median(workload, contender, backend, metric)
        raw = results.median(workload, "raw", backend, metric)
        best = results.best_neighbour(workload, backend, metric)
        error = results.error(workload, contender, backend)
        rows.append(
            [
                workload + (" (p99 ms)" if metric == "p99_ms" else " (import ms)" if workload == "cold" else ""),
                _label(contender, backend, results),
                error or number(value, metric),
                number(raw, metric),
                _best(results, workload, backend, metric),
                f"{value / best[1]:.2f}" if value and best else "–",
                f"{value / raw:.2f}" if value and raw else "–",
                " · ".join(str(verdict.goal) for verdict in some),
                " · ".join(_verdict(verdict) for verdict in some),
            ]
        )
    head = [
        "workload",
        "contender",
        "measured",
        "raw",
        "best neighbour",
        "÷ best",
        "÷ raw",
        "goal",
        "outcome",
    ]
    return table(head, rows)


def _best(results: Results, workload: str, backend: str, metric: str) -> str:
    best = results.best_neighbour(workload, backend, metric)
    if best is None:
        return "–"
    text = f"{number(best[1], metric)} ({best[0]})"
    alike = results.best_neighbour(workload, backend, metric, stdlib=True)
    return text if alike is None or alike == best else f"{text}; {number(alike[1], metric)} ({alike[0]})"


def _verdict(verdict: Verdict) -> str:
    if verdict.met is None:
        return "–"
    value = verdict.value
    assert value is not None
    text = f"{value:.1%}" if verdict.goal.unit == "%" else f"{value:.3g}"
    if verdict.met:
        return "met"
    beside = f"; {verdict.stdlib:.3g} on the standard library's sqlite3" if verdict.stdlib is not None else ""
    return f"**not met** ({text}{beside})"


def details(results: Results, workload: str) -> str:
    """All figures of all contenders in one workload, with the spread of the rounds."""
    headline = _headline(workload)
    entrants = results.entrants(workload)
    metrics = list(
        dict.fromkeys(
            metric
            for sample in results.samples
            if sample.workload == workload
            for metric in (headline, *sample.metrics)
        )
    )
    rows = []
    for contender, backend in entrants:
        error = results.error(workload, contender, backend)
        values = results.values(workload, contender, backend, headline)
        spread = f"{number(min(values), headline)} to {number(max(values), headline)}" if values else "–"
        figures = [number(results.median(workload, contender, backend, metric), metric) for metric in metrics]
        rows.append([_label(contender, backend, results), error or figures[0], spread, *figures[1:]])
    titles = [_TITLES.get(metric, metric.removesuffix("_ms").replace("_", " ") + " ms") for metric in metrics]
    unit = WORKLOADS[workload].unit if workload in WORKLOADS else "ms"
    head = ["contender", f"{unit}" if headline == "rate" else titles[0], "rounds from to", *titles[1:]]
    return f"### {workload}: {title_of(workload)}\n\n{table(head, rows)}"


def surroundings(results: Results) -> str:
    """Machine and versions."""
    where = dict(results.machine)
    versions = where.pop("versions", {})
    lines = [f"{key}: {value}" for key, value in where.items()]
    lines.append(", ".join(f"{name} {number}" for name, number in versions.items()))
    lines.append(f"medians of {results.settings.get('rounds')} interleaved rounds")
    return " · ".join(lines)


def legend(results: Results) -> str:
    """What the contenders are."""
    taking_part = {sample.contender for sample in results.samples}
    shown: list[type[Contender]] = [c for name, c in CONTENDERS.items() if name in taking_part]
    return "\n".join(f"- **{contender.name}**: {contender.about}" for contender in shown)


def growth(results: Results) -> str:
    """How cost grows."""
    parts = []
    for study in results.growth:
        names = list(study["series"])
        rows = [[f"{x:,}", *(number(study["series"][name].get(str(x))) for name in names)] for x in study["x"]]
        parts.append(f"### {study['title']} ({study['unit']})\n\n{table([study['axis'], *names], rows)}")
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """The whole report."""
    parts = ["## Benchmark", surroundings(results)]
    if results.samples:
        parts += [summary(results), legend(results)]
        parts += [details(results, workload) for workload in results.workloads()]
    if results.growth:
        parts += ["## Growth", growth(results)]
    return "\n\n".join(parts) + "\n"
