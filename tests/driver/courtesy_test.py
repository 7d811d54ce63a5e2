"""A busy event loop gives way to its workers; one that rests is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from database.driver import courtesy


class World:
    """A pool, its loop and the clock, all of them the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.computed = 7.0
        self.working = True
        self.closed = False
        self.waker = self
        self.timer: tuple[float, Callable[[], None]] | None = None
        self.slept = 0
        monkeypatch.setattr(courtesy, "perf_counter", lambda: self.now)
        monkeypatch.setattr(courtesy, "thread_time", lambda: self.computed)
        monkeypatch.setattr(courtesy.time, "sleep", self._sleep)

    def look(self) -> None:
        """What the pool does at each look."""

    def _sleep(self, _seconds: float) -> None:
        self.slept += 1

    def call_later(self, seconds: float, function: Callable[[], None]) -> Any:
        assert self.timer is None, "one timer at a time"
        self.timer = seconds, function
        return self

    def cancel(self) -> None:
        self.timer = None

    def ring(self, late: float = 0.0, *, computing: float = 0.0) -> float:
        """The timer rings, so many seconds late, the loop's thread having computed for that part of the time.

        Returns:
            For how long it had been set.
        """
        assert self.timer is not None
        (seconds, function), self.timer = self.timer, None
        self.now += seconds + late
        self.computed += (seconds + late) * computing
        function()
        return seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_loop_that_rests_is_looked_at_less_and_less_often(world: World) -> None:
    """It is never made to sleep, and hears of us 60 times a second at the most, also if it is half busy."""
    courtesy.Courtesy(world).begin()  # type: ignore[arg-type]
    intervals = [world.ring(computing=0.5) for _ in range(8)]
    assert intervals == sorted(intervals)
    assert intervals[-1] == courtesy.SELDOM
    assert world.slept == 0


@pytest.mark.parametrize(
    ("late", "computing"),
    [
        pytest.param(0.001, 1.0, id="late, having computed all the while"),
        pytest.param(0.0, 0.95, id="in step with the timer"),
        pytest.param(0.05, 0.6, id="on a machine with other work to do"),
    ],
)
def test_a_loop_without_a_rest_sleeps_for_a_moment_each_time(world: World, late: float, computing: float) -> None:
    """A loop that computes gives way once a look, and is looked at again soon; when it rests, it is left alone."""
    courtesy.Courtesy(world).begin()  # type: ignore[arg-type]
    for _ in range(6):
        world.ring()
    for wanted in (1, 2, 3):
        world.ring(late, computing=computing)
        assert world.slept == wanted
        assert world.timer is not None
        assert world.timer[0] == courtesy.SOON
    world.ring()
    assert world.slept == 3


def test_a_loop_that_waited_for_a_worker_is_left_alone(world: World) -> None:
    """It is late because the worker has the GIL: there is nothing to give."""
    courtesy.Courtesy(world).begin()  # type: ignore[arg-type]
    for _ in range(3):
        world.ring(0.001)
    assert world.slept == 0


def test_an_idle_pool_has_no_timer(world: World) -> None:
    """With no worker at work there is nothing to look at until the next one is woken."""
    manners = courtesy.Courtesy(world)  # type: ignore[arg-type]
    manners.begin()
    manners.begin()
    world.working = False
    world.ring(1.0)
    assert (world.timer, world.slept) == (None, 0)
    world.working = True
    manners.begin()
    assert world.timer is not None
    manners.end()
    assert world.timer is None
