"""One checkout at one workload: the program that ``compare.py`` starts in an interpreter of its own.

It rests on nothing but the public contract, so that it runs on every checkout, and on no module beside it: what it imports
as ``database`` is the checkout that stands in ``PYTHONPATH``. It is told what to do, and tells what came of it, in JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import anyio

import database
from database.sqlite3 import close_all, configure, get_db, transactional, transactional_readonly


def operations(point: str, insert: str, update: str, note: str) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """What one task does again and again, by name; each is given the key of a row, and gives that row's name or nothing."""
    db = get_db()

    async def select(key: int) -> Any:
        row = await db.fetch_one(point, (key,))
        return row and row["name"]

    async def add(key: int) -> None:
        await db.execute(insert, (key, note))

    @transactional(offload=True)
    async def offloaded(key: int) -> Any:
        row = await db.fetch_one(point, (key,))
        await db.execute(update, (key,))
        await db.execute(insert, (key, note))
        return row and row["name"]

    async def interactive(key: int) -> Any:
        async with db.transaction():
            row = await db.fetch_one(point, (key,))
            await db.execute(update, (key,))
            await db.execute(insert, (key, note))
        return row and row["name"]

    @transactional_readonly
    async def readonly(key: int) -> Any:
        await db.fetch_one(point, (1,))
        await db.fetch_one(point, (2,))
        row = await db.fetch_one(point, (key,))
        return row and row["name"]

    async def reading(key: int) -> Any:
        async with db.transaction():
            await db.execute(update, (key,))
            await db.fetch_one(point, (1,))
            row = await db.fetch_one(point, (key,))
            await db.execute(insert, (key, note))
        return row and row["name"]

    return {
        "select": select,
        "insert": add,
        "offloaded": offloaded,
        "interactive": interactive,
        "readonly": readonly,
        "reading": reading,
    }


async def measure(order: dict[str, Any]) -> None:
    """For each line of the input, which gives seconds, measures for so long; at its end, tells of all calls answered."""
    operation = operations(**order["statements"])[order["operation"]]
    names: list[str] = order["names"]
    answered = 0
    end = 0.0

    async def work(task: int) -> None:
        nonlocal answered
        key = task
        while perf_counter() < end:
            key = key % (len(names) - 1) + 1
            name = await operation(key)
            if name is not None and name != names[key]:
                raise RuntimeError(f"key {key}: {name}")
            answered += 1

    async def tick(lags: list[float]) -> None:
        while (start := perf_counter()) < end:
            await anyio.sleep(0.001)
            lags.append(max(0.0, perf_counter() - start - 0.001))

    try:
        for line in iter(sys.stdin.readline, ""):
            before = answered
            computed, start = process_time(), perf_counter()
            end = start + float(line)
            lags: list[float] = []
            async with anyio.create_task_group() as group:
                for task in range(order["tasks"]):
                    group.start_soon(work, task * 97)
                if order["lag"]:
                    group.start_soon(tick, lags)
            seconds, computed = perf_counter() - start, process_time() - computed
            print(json.dumps([answered - before, seconds, computed, lags]), flush=True)
    finally:
        await close_all()
    print(json.dumps(answered))


def main() -> None:
    """Take the order from the command line."""
    order = json.loads(sys.argv[1])
    found = Path(str(database.__file__)).resolve()
    if not found.is_relative_to(Path(order["checkout"]).resolve()):
        raise SystemExit(f"imported {found}, not what is in {order['checkout']}")
    configure({"database": {"sqlite": {"path": order["path"], "init_sql": "", **order["settings"]}}})
    backend = order["backend"]
    options = {"use_uvloop": True} if backend == "uvloop" else {}
    anyio.run(measure, order, backend="trio" if backend == "trio" else "asyncio", backend_options=options)


if __name__ == "__main__":
    main()
