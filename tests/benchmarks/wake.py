"""What it costs to wake a thread on this machine: `python -m tests.benchmarks.wake`.

A statement that runs on another thread waits for two wake-ups, whatever the library: of the thread by its queue, and of the
event loop by a descriptor. How long these take is the machine's own affair, and on an idle virtual machine several times
what it is on a busy one, whose cores are awake. So figures of two machines can only be compared beside it.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from statistics import median
from time import perf_counter as clock

ROUNDS = 2_000


def wake(rounds: int = ROUNDS) -> float:
    """The median of what a hop costs, in microseconds: a thread is woken by its queue, and wakes its caller by a pipe."""
    work: SimpleQueue[bool] = SimpleQueue()
    heard, told = os.pipe()

    def answer() -> None:
        while work.get():
            os.write(told, b"x")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    poll = _waits_for(heard)
    times: list[float] = []
    try:
        for _ in range(rounds):
            start = clock()
            work.put(True)
            poll()
            os.read(heard, 1)
            times.append(clock() - start)
    finally:
        work.put(False)
        thread.join()
        os.close(heard)
        os.close(told)
    return median(times) * 1e6


def _waits_for(descriptor: int) -> Callable[[], object]:
    if hasattr(select, "epoll"):
        epoll = select.epoll()
        epoll.register(descriptor, select.EPOLLIN)
        return epoll.poll
    return lambda: select.select([descriptor], [], [])


def main() -> None:
    """Measure, and say it."""
    rounds = [wake() for _ in range(5)]
    sys.stdout.write(
        f"a hop to another thread and back: {median(rounds):.1f} µs (of five times {ROUNDS:,}: {min(rounds):.1f} to"
        f" {max(rounds):.1f})\n"
    )


if __name__ == "__main__":
    main()
