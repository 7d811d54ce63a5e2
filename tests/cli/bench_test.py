"""`bench` keeps running. No timing is asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from database.cli import bench, contenders
from database.cli.support import Failure

Cli = Callable[..., Any]

QUICK = ("--seconds", "0.05", "--rounds", "1")


def test_quickly(cli: Cli, configure: Callable[..., Path], tmp_path: Path) -> None:
    """All workloads run on all contenders that are installed; figures and chart are shown; nothing is left behind."""
    configure(path="here/x.db", synchronous="OFF")
    (tmp_path / "here").mkdir()
    outcome = cli("bench", *QUICK)
    assert (outcome.status, outcome.err) == (0, "")
    assert "synchronous OFF" in outcome.out
    assert f"{tmp_path}/here" in outcome.out
    for workload in bench.WORKLOADS:
        assert workload.title in outcome.out
    assert "█" in outcome.out
    assert list((tmp_path / "here").iterdir()) == []


def test_json_and_only(cli: Cli, tmp_path: Path) -> None:
    """A part of it, for programs, without any configuration; wrong names are told the right ones."""
    figures = cli("bench", *QUICK, "--only", "write", "--only", "this package", "--folder", tmp_path, "--json").json
    assert [(each["workload"], list(each["rates"])) for each in figures["results"]] == [("write", ["this package"])]
    assert figures["results"][0]["rates"]["this package"] > 0
    outcome = cli("bench", "--only", "everything")
    assert (outcome.status, "there are read, read1" in outcome.err) == (2, True)
    assert cli("bench", "--folder", tmp_path / "nowhere").status == 2


def test_a_contender_that_loses_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was acknowledged and is not in the database ends the measurement."""

    class Forgetful(contenders.Raw):
        async def insert(self, key: int) -> None:
            pass

    write = next(each for each in bench.WORKLOADS if each.name == "write")
    with pytest.raises(Failure, match="acknowledged .* rows and 0 updates, and the database holds 0 and 0"):
        bench._measure(tmp_path, [Forgetful], [write], "OFF", 0.01, 1)
