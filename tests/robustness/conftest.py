"""Prints what the robustness tests have counted."""

from __future__ import annotations

from typing import Any

from tests.robustness.support import FIGURES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a figure, also when output is captured."""
    if FIGURES:
        terminalreporter.section("robustness figures")
        for name, count in sorted(FIGURES.items()):
            terminalreporter.write_line(f"{count:>10,} {name}")
