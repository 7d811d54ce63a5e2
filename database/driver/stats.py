"""What a pool counts, for monitors and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Protocol

__all__ = ["PoolStats"]


class Counted(Protocol):
    """A pool."""

    def stats(self) -> PoolStats:
        """What it is doing. Any thread may ask, and may be told by `RuntimeError` that it came at a bad moment."""
        ...


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A moment in a pool's life. Totals count from the pool's opening.

    Attributes:
        pool_size: Readers there may be.
        readers_open: Reader connections that are open.
        readers_in_use: Readers that serve somebody.
        writer_in_use: 1 while the writer serves somebody, else 0; where all connections read and write, how many
            serve somebody who writes.
        waiting: Transactions and streams that wait for a connection.
        queued: Autocommit statements that wait for their turn.
        acquired_total: Connections handed to transactions and streams.
        timeouts_total: Waits that ended in `ConnectionPoolExhaustedError`.
        wait_seconds_total: Seconds that transactions and streams have waited for their connections.
        statements_total: Requests executed.
        commits_total: Explicit COMMITs, each of which may hold a group of writes.
        rollbacks_total: Transactions rolled back.
        grouped_total: Writes that shared a commit with others.
        replaced_total: Connections that were given up and opened anew.
        inline_total: Reads that ran on the event loop's own thread (`inline_reads`).
    """

    pool_size: int = 0
    readers_open: int = 0
    readers_in_use: int = 0
    writer_in_use: int = 0
    waiting: int = 0
    queued: int = 0
    acquired_total: int = 0
    timeouts_total: int = 0
    wait_seconds_total: float = 0.0
    statements_total: int = 0
    commits_total: int = 0
    rollbacks_total: int = 0
    grouped_total: int = 0
    replaced_total: int = 0
    inline_total: int = 0

    @staticmethod
    def of(pools: Iterable[Counted]) -> PoolStats:
        """The sums over several pools. Any thread: what belongs to their loops may change while it is looked at."""
        found: list[PoolStats] = []
        for pool in pools:
            for _ in range(20):
                try:
                    found.append(pool.stats())
                    break
                except RuntimeError:  # a collection has changed while it was walked
                    continue
        return PoolStats(*(sum(values) for values in zip(*map(astuple, found), strict=True)))
