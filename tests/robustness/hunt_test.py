"""The hunt by rude users, for a moment; `python -m tests.robustness.hunt` runs it for as long as one likes."""

from __future__ import annotations

import os

import pytest

from tests.robustness.hunt import hunt


@pytest.mark.shortened
def test_a_few_episodes(pytestconfig: pytest.Config) -> None:
    """Nothing lost, doubled or half done, and every connection as configured, whatever the users do."""
    episodes = 6 if pytestconfig.getoption("quick") else 12
    moves = hunt(int(os.environ.get("HUNT_SEED", "1")), episodes=episodes)
    assert moves["episodes"] == episodes


@pytest.mark.slow
def test_for_a_while() -> None:
    """The same for `HUNT_S` seconds."""
    assert hunt(1000, seconds=float(os.environ.get("HUNT_S", "20")))["episodes"] > 10
