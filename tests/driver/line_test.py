"""The line for connections, by itself: nothing here runs on a thread of its own."""

from __future__ import annotations

from typing import Any

import pytest

from database.driver.line import Line

pytestmark = pytest.mark.anyio


class Claims:
    """Stands in line since a moment, and keeps what it is given."""

    def __init__(self, queued_at: float) -> None:
        self.queued_at = queued_at
        self.workers: list[Any] = []

    def given(self, worker: Any) -> None:
        self.workers.append(worker)


class Owner:
    """A pool of so many connections, each of which is its number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.opened, self.closing = True, False
        self.made = 0
        self.resting: list[Any] = []
        self.watched = self.given = 0

    def open_another(self) -> Any:
        if self.made == self.size:
            return None
        self.made += 1
        return f"connection {self.made}"

    def spare(self) -> Any:
        return self.resting.pop() if self.resting else None

    def watch(self) -> None:
        self.watched += 1

    def watch_reading(self) -> None:
        self.given += 1


@pytest.fixture
def owner() -> Owner:
    return Owner(1)


@pytest.fixture
async def line(anyio_backend: Any, owner: Owner) -> Line[Any]:
    return Line(owner)  # type: ignore[arg-type]


async def test_who_has_waited_longest_is_next(line: Line[Any], owner: Owner) -> None:
    """Leases and lanes are served in the order in which they came, whichever of them they are."""
    holder, first, lane, second, other = (Claims(moment) for moment in (1.0, 2.0, 3.0, 4.0, 5.0))
    line.claim(holder)
    line.claim(first)
    line.claim(second)
    line.join(other)
    line.join(lane)
    assert (len(line), owner.watched) == (4, 4)
    for expected in (first, lane, second, other):
        before = len(line)
        line.free("connection 1")
        assert expected.workers == ["connection 1"]
        assert len(line) == before - 1
    assert (owner.made, owner.given, line.given) == (1, 5, 1)


async def test_a_lane_moves_back_when_its_oldest_statement_is_answered(line: Line[Any]) -> None:
    """A lane stands for its oldest statement: when that has gone, a lease that came before the next one is first."""
    holder, lane, lease = Claims(1.0), Claims(2.0), Claims(3.0)
    line.claim(holder)
    line.join(lane)
    line.claim(lease)
    lane.queued_at = 4.0
    line.free("connection 1")
    assert (lease.workers, lane.workers) == (["connection 1"], [])
    lane.queued_at = float("inf")  # nothing is left in it: it comes and looks
    line.free("connection 1")
    assert lane.workers == ["connection 1"]


async def test_what_is_there_is_given_before_another_is_opened() -> None:
    """An idle connection goes first, then one that rests with its lane and is counted already; then one more is opened."""
    owner = Owner(3)
    line: Line[Any] = Line(owner)  # type: ignore[arg-type]
    line.limiter.acquire_on_behalf_of_nowait("of the lane")
    owner.resting.append("of the lane")
    line.add("idle")
    owner.size = 1  # one more may be opened
    claims = [Claims(float(moment)) for moment in range(4)]
    for each in claims:
        line.claim(each)
    assert [each.workers for each in claims] == [["idle"], ["of the lane"], ["connection 1"], []]
    assert line.given == 3


@pytest.mark.parametrize(("opened", "closing"), [(False, False), (True, True)])
async def test_nothing_is_given_before_the_pool_is_open_or_while_it_closes(
    line: Line[Any], owner: Owner, opened: bool, closing: bool
) -> None:
    """Who claims then waits, and is watched; who waited for the opening is served at once by `serve`."""
    owner.opened, owner.closing = opened, closing
    lease = Claims(1.0)
    line.claim(lease)
    assert (lease.workers, owner.made, owner.watched) == ([], 0, 1)
    owner.opened, owner.closing = True, False
    line.serve()
    assert lease.workers == ["connection 1"]
