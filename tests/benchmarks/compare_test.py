"""The comparison of two checkouts keeps running, and notices which checkout it has imported. No timing is asserted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from . import compare
from .cold import ROOT


@pytest.mark.slow
def test_every_operation_is_answered_rightly_and_gives_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both checkouts are measured at each operation; what they wrote is looked for in the database by `once`."""
    chosen = list({operation: workload for workload, (operation, _) in compare.WORKLOADS.items()}.values())
    command = [str(ROOT), str(ROOT), "--rounds", "1", "--seconds", "0.02", "--dir", str(tmp_path), "--only", *chosen]
    assert compare.main(command) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == compare.HEAD
    assert [row.split()[0] for row in rows] == chosen
    assert list(tmp_path.iterdir()) == []


def test_each_side_imports_its_own_checkout(tmp_path: Path) -> None:
    """A checkout that answers wrongly is found out: it is not the other one's code that runs."""
    changed = tmp_path / "changed"
    shutil.copytree(ROOT / "database", changed / "database", ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "database" / "sqlite3" / "__init__.py").open("a") as file:
        file.write("\nraise ImportError('this is the changed one')\n")
    command = [
        str(ROOT),
        str(changed),
        "--rounds",
        "1",
        "--seconds",
        "0.02",
        "--only",
        "select-1",
        "--dir",
        str(tmp_path),
    ]
    with pytest.raises(RuntimeError, match="this is the changed one"):
        compare.main(command)


def test_a_slice_without_a_call_counts_for_nothing() -> None:
    """Neither side is divided by zero; where no slice had a call on both sides, the row says so."""
    nothing, something = compare.Slice(0.0, 100.0), compare.Slice(10.0, 5.0)
    line = compare.Comparison("select-1", [(nothing, something), (something, something)]).line()
    assert "+0.0" in line
    assert "no call" in compare.Comparison("select-1", [(nothing, something)]).line()
