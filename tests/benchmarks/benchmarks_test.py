"""The benchmark keeps running: every workload once, briefly, all answers checked. No timing is asserted."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from . import charts, report
from .__main__ import ALL_WORKLOADS, BASE, load
from .contenders import Raw
from .goals import GOALS, judge
from .growth import Growth
from .neighbours import NEIGHBOURS
from .runner import CONTENDERS, NO_LOOP, Results, Runner, Sample
from .store import WrongAnswerError, verify
from .workloads import QUICK, WORKLOADS, Trial


def _runner(folder: Path, contenders: tuple[str, ...], backend: str = "asyncio") -> Runner:
    return Runner(folder, plan=QUICK, contenders=contenders, backends=[backend], rounds=1, say=lambda _line: None)


@pytest.fixture
def measured() -> Results:
    """Results made up: ours at three times the best neighbour, which is at half of raw."""
    rates = {"raw": 40.0, "database": 60.0, "aiosqlite": 20.0, "apsw": 15.0, "apsw async_run": 30.0}
    return Results(
        machine={"cpu": "any", "versions": {"anyio": "4"}},
        settings={"rounds": 1},
        samples=[
            Sample(
                "conc_tx",
                name,
                NO_LOOP if name == "raw" else "asyncio",
                0,
                {"rate": rate, "p50_ms": 1, "p99_ms": 3},
            )
            for name, rate in rates.items()
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_workload_is_answered_rightly_by_raw_and_by_this_package(tmp_path: Path, backend: str) -> None:
    results = _runner(tmp_path, BASE, backend).run(ALL_WORKLOADS)
    assert [sample for sample in results.samples if sample.error] == []
    assert set(results.workloads()) == set(ALL_WORKLOADS)
    assert all(results.median(name, "database", backend, "rate") for name in WORKLOADS)


@pytest.mark.slow  # other packages than this one; the same workloads, answered by this one, are the test above
@pytest.mark.parametrize("neighbour", [contender.name for contender in NEIGHBOURS])
def test_a_neighbour_answers_rightly(tmp_path: Path, neighbour: str) -> None:
    if not CONTENDERS[neighbour].installed():
        pytest.skip(f"{neighbour} is not installed")
    results = _runner(tmp_path, (neighbour,)).run(
        ["conc_read", "conc_tx", "conc_insert", "fetch_all", "stream", "execute_many"]
    )
    assert [sample for sample in results.samples if sample.error] == []


def test_growth_is_measured_in_all_its_directions(tmp_path: Path) -> None:
    studies = Growth(_runner(tmp_path, BASE), quick=True, full=False).run()
    axes = ["tasks", "rows", "readers", "rows in the result"]
    assert [study["axis"] for study in studies] == [*axes, *(["databases"] if sys.platform == "linux" else [])]
    for study in studies:
        for name, points in study["series"].items():
            assert list(points) == [str(x) for x in study["x"]], name
            assert all(value > 0 for value in points.values()), (study["title"], name, points)


def test_every_goal_names_a_workload_and_a_contender_there_are() -> None:
    for goal in GOALS:
        assert goal.workload in ALL_WORKLOADS
        assert goal.contender in CONTENDERS
        assert goal.of in {"", "best", "anyio, aiosql, yaml"} or goal.of in CONTENDERS or goal.of.startswith("own ")


def test_goals_are_judged_by_medians_against_interactive_neighbours(measured: Results) -> None:
    met = {(goal.of, judge(goal, "asyncio", measured).met) for goal in GOALS if goal.workload == "conc_tx"}
    assert met == {("best", True), ("own p50_ms", False), ("best", None), ("raw", None)}


def test_a_wrong_answer_is_reported_and_never_timed(measured: Results) -> None:
    measured.samples.append(Sample("conc_tx", "aiosqlite", "asyncio", 1, {"rate": 1e9}, "WRONG: rows"))
    assert measured.best_neighbour("conc_tx", "asyncio") == ("apsw", 15.0)
    assert "| aiosqlite | WRONG: rows |" in report.markdown(measured)


def test_a_lost_write_is_noticed(tmp_path: Path) -> None:
    runner = _runner(tmp_path, ("raw",))
    with runner.fresh() as path:
        raw = Raw(path, "NORMAL")
        raw.transact(1)
        raw.connection.close()
        verify(path, transactions=1, inserts=0, bulk=0)
        with pytest.raises(WrongAnswerError):
            verify(path, transactions=2, inserts=0, bulk=0)


def test_an_answer_of_another_row_is_noticed(tmp_path: Path) -> None:
    class Liar(Raw):
        name = "raw"

        def point(self, key: int) -> object:
            return super().point(key % 10_000 + 1)

    sample = _runner(tmp_path, ("raw",)).once(WORKLOADS["seq_read"], Liar, NO_LOOP, 0)
    assert sample.error.startswith("WRONG")


def test_results_survive_json_and_runs_can_be_put_together(measured: Results, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(measured.to_json())
    assert Results.from_json(file.read_text()) == measured
    assert len(load([file, file]).samples) == 2 * len(measured.samples)


def test_charts_are_well_formed(measured: Results, tmp_path: Path) -> None:
    measured.growth.append(
        {
            "title": "t",
            "axis": "rows",
            "unit": "per second",
            "x": [1, 10],
            "series": {"raw": {"1": 5.0, "10": 50.0}},
        }
    )
    files = charts.write(measured, tmp_path)
    assert [file.name for file in files] == ["conc_tx.svg", "growth_rows.svg"]
    for file in files:
        assert ET.parse(file).getroot().tag.endswith("svg")


def test_percentiles_are_those_of_the_sorted_latencies() -> None:
    trial = Trial(QUICK)
    trial.latencies([0.001 * turn for turn in range(100, 0, -1)])
    assert trial.metrics == pytest.approx({"p50_ms": 51, "p99_ms": 100, "max_ms": 100})
