"""Isolation, checked from histories: list-append transactions over all write paths, and what each of them saw.

Every write appends a value that is written once only, so a list says in which order its writers committed. From what
transactions read, the order in which they must have happened follows: a cycle in it, or one against real time, is an
anomaly, and has a name (Adya; the checker Elle by K. Kingsbury and P. Alvaro works like this).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import count, pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional, transactional_readonly
from tests.contract.support import HANGING, Engine, errors, in_turn, usable
from tests.robustness.support import FIGURES

pytestmark = pytest.mark.anyio

HISTORIES = int(os.environ.get("HISTORIES", "4"))
"""Histories for each event loop; more by the environment variable."""

KEYS = 5
READ = "SELECT list FROM lists WHERE key = ?"
APPEND = "UPDATE lists SET list = list || ? || ',' WHERE key = ?"


class Undo(Exception):
    """Raised to undo a transaction."""


@dataclass
class Did:
    """One transaction: what it saw and appended, when it began and was answered, and how it ended."""

    number: int
    path: str
    reads: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    appends: list[tuple[int, int]] = field(default_factory=list)
    began: int = 0
    ended: int = 0
    outcome: str = "unknown"


def parse(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each)


class History:
    """The transactions of one run, with a clock that ticks at every beginning and end."""

    def __init__(self) -> None:
        self.all: list[Did] = []
        self.values = count(1)
        self.clock = count(1)

    def check(self, final: dict[int, tuple[int, ...]]) -> None:
        """Raises AssertionError with the anomaly's name."""
        writer: dict[int, Did] = {}
        for each in self.all:
            for _, value in each.appends:
                writer[value] = each
        committed: set[int] = set()
        for key, values in final.items():
            assert len(set(values)) == len(values), f"duplicated write in {key}: {values}"
            committed |= set(values)
        for each in self.all:
            mine = {value for _, value in each.appends}
            if each.outcome == "done":
                assert mine <= committed, f"lost write: {each}"
            elif each.outcome == "undone":
                assert not mine & committed, f"undone and there: {each}"
            else:
                assert mine <= committed or not mine & committed, f"half done: {each}"
        after: dict[int, set[int]] = {each.number: set() for each in self.all}

        def edge(first: Did, second: Did) -> None:
            if first is not second:
                after[second.number].add(first.number)

        for key, values in final.items():
            for one, other in pairwise(values):
                edge(writer[one], writer[other])  # ww
            for each in self.all:
                own: list[int] = []
                for read_key, seen in each.reads:
                    if read_key != key:
                        continue
                    others = seen[: len(seen) - len(own)] if own and seen[-len(own) :] == tuple(own) else seen
                    dirty = [value for value in others if value not in committed and writer[value] is not each]
                    assert not dirty, f"dirty read (G1a) of {dirty}: {each}"
                    foreign = tuple(value for value in seen if writer[value] is not each)
                    # Every state of a list is a beginning of its last one; of a transaction of several appends, all or none.
                    assert foreign == tuple(value for value in values[: len(foreign)]), (
                        f"not a prefix: {each} of {values}"
                    )
                    if foreign:
                        last = writer[foreign[-1]]
                        edge(last, each)  # wr
                        of_last = [value for k, value in last.appends if k == key]
                        assert foreign[-1] == of_last[-1], f"intermediate read (G1b): {each}"
                    if len(foreign) < len(values):
                        following = writer[values[len(foreign)]]
                        edge(each, following)  # rw: it did not see what came next
            for each in self.all:
                seen_twice: dict[int, tuple[int, ...]] = {}
                if each.path.startswith("readonly"):
                    for read_key, seen in each.reads:
                        assert seen_twice.setdefault(read_key, seen) == seen, f"non-repeatable read: {each}"
        # Real time: who was answered before another began comes first.
        known = [each for each in self.all if each.outcome == "done"]
        for one in known:
            for other in known:
                if one.ended < other.began:
                    edge(one, other)
        try:
            tuple(TopologicalSorter(after).static_order())
        except CycleError as error:
            cycle = [next(each for each in self.all if each.number == number) for number in error.args[1]]
            raise AssertionError(f"a cycle: not serializable in real time: {cycle}") from error


def test_the_checker_sees_anomalies() -> None:
    """The checker itself finds each anomaly in a history made to have it."""

    def history(*all_: Did) -> History:
        made = History()
        made.all = list(all_)
        return made

    def did(number: int, reads: Any = (), appends: Any = (), outcome: str = "done", path: str = "x") -> Did:
        return Did(number, path, list(reads), list(appends), number * 2, number * 2 + 1, outcome)

    fine = history(did(1, [(1, ())], [(1, 1)]), did(2, [(1, (1,))], [(1, 2)]))
    fine.check({1: (1, 2)})
    bad = {
        "lost write": (history(did(1, [], [(1, 1)])), {1: ()}),
        "duplicated": (history(did(1, [], [(1, 1)])), {1: (1, 1)}),
        "undone and there": (history(did(1, [], [(1, 1)], "undone")), {1: (1,)}),
        "half done": (history(did(1, [], [(1, 1), (2, 2)], "unknown")), {1: (1,), 2: ()}),
        "dirty read": (history(did(1, [], [(1, 1)], "undone"), did(2, [(1, (1,))])), {1: ()}),
        "intermediate": (history(did(1, [], [(1, 1), (1, 2)]), did(2, [(1, (1,))])), {1: (1, 2)}),
        "not a prefix": (history(did(1, [], [(1, 1)]), did(2, [], [(1, 2)]), did(3, [(1, (2,))])), {1: (1, 2)}),
        "non-repeatable": (history(did(2, [], [(1, 1)]), did(1, [(1, ()), (1, (1,))], path="readonly")), {1: (1,)}),
        "a cycle: lost update": (  # both read nothing, both appended
            history(did(1, [(1, ())], [(1, 1)]), did(2, [(1, ())], [(1, 2)])), {1: (1, 2)}),
        "a cycle: stale read": (history(did(1, [], [(1, 1)]), did(2, [(1, ())])), {1: (1,)}),
        "a cycle: long fork": (
            history(
                Did(1, "x", [], [(1, 1)], 1, 9, "done"), Did(2, "x", [], [(2, 2)], 1, 9, "done"),
                Did(3, "readonly", [(1, (1,)), (2, ())], [], 1, 9, "done"),
                Did(4, "readonly", [(1, ()), (2, (2,))], [], 1, 9, "done"),
            ),
            {1: (1,), 2: (2,)},
        ),
    }  # fmt: skip
    for name, (history_, final) in bad.items():
        with pytest.raises(AssertionError, match=name.partition(":")[0]):
            history_.check(final)


@in_turn("seed", range(HISTORIES))
async def test_histories(db: Any, engine: Engine, seed: int) -> None:
    """Among many tasks on all paths, some cancelled and some undone, every history is strictly serializable."""
    await db.execute_script("CREATE TABLE lists (key INTEGER PRIMARY KEY, list TEXT NOT NULL)")
    await db.execute_many("INSERT INTO lists VALUES (?, '')", [(key,) for key in range(KEYS)])
    chance = random.Random(seed)
    history = History()

    Plan = list[tuple[str, int]]

    async def steps(did: Did, plan: Plan, fail: bool) -> None:
        for what, key in plan:
            if what == "read":
                did.reads.append((key, parse(await db.fetch_value(READ, (key,)))))
            else:
                value = next(history.values)
                did.appends.append((key, value))
                await db.execute(APPEND, (value, key))
        if fail:
            raise Undo

    async def nested(did: Did, plan: Plan, fail: bool) -> None:
        async with db.transaction():
            try:
                async with db.transaction():
                    await db.execute(APPEND, (0, 0))  # undone, and never to be seen
                    raise Undo
            except Undo:
                pass
            async with db.transaction():
                await steps(did, plan, fail)

    async def manual(did: Did, plan: Plan, fail: bool) -> None:
        await db.begin()
        try:
            await steps(did, plan, fail)
            await db.commit()
        finally:
            if db.in_transaction:
                await db.rollback()

    def on_thread(connection: Any, did: Did, plan: Plan, fail: bool) -> None:
        did.reads.clear()
        did.appends.clear()
        for what, key in plan:
            if what == "read":
                did.reads.append((key, parse(connection.execute(READ, (key,)).fetchone()[0])))
            else:
                value = next(history.values)
                did.appends.append((key, value))
                connection.execute(APPEND, (value, key))
        if fail:
            raise Undo

    @transactional(offload=True)
    async def offloaded(did: Did, plan: Plan, fail: bool) -> None:
        did.reads.clear()  # it may be run again
        did.appends.clear()
        await steps(did, plan, fail)

    async def batch(did: Did, plan: Plan, fail: bool) -> None:
        async with db.batch() as batch:
            for _, key in plan:
                value = next(history.values)
                did.appends.append((key, value))
                await batch.execute(APPEND, (value, key))
            if fail:
                raise Undo

    async def autocommit(did: Did, plan: Plan, fail: bool) -> None:
        value, key = next(history.values), plan[0][1]
        if fail:
            did.appends.append((key, value))
            try:
                await db.execute("UPDATE lists SET list = NULL WHERE key = ?", (key,))
            except errors.IntegrityError as error:
                raise Undo from error
        did.appends.append((key, value))
        text = await db.fetch_value(
            "UPDATE lists SET list = list || ? || ',' WHERE key = ? RETURNING list", (value, key)
        )
        did.reads.append((key, parse(text)))

    @transactional_readonly
    async def readonly(did: Did, plan: Plan, fail: bool) -> None:
        for _, key in plan + plan:
            did.reads.append((key, parse(await db.fetch_value(READ, (key,)))))
            await anyio.lowlevel.checkpoint()

    async def readonly_stream(did: Did, plan: Plan, fail: bool) -> None:
        async with db.transaction(readonly=True):
            async with db.stream("SELECT key, list FROM lists ORDER BY key", chunk_size=1) as rows:
                async for row in rows:
                    did.reads.append((row["key"], parse(row["list"])))
            for row in await db.fetch_all("SELECT key, list FROM lists"):
                did.reads.append((row["key"], parse(row["list"])))

    async def readonly_statement(did: Did, plan: Plan, fail: bool) -> None:
        did.reads = [(row["key"], parse(row["list"])) for row in await db.fetch_all("SELECT key, list FROM lists")]

    async def readonly_thread(did: Did, plan: Plan, fail: bool) -> None:
        def look(connection: Any) -> Any:
            sql = "SELECT key, list FROM lists"
            return connection.execute(sql).fetchall() + connection.execute(sql).fetchall()

        did.reads = [(row["key"], parse(row["list"])) for row in await db.run(look, readonly=True)]

    paths: dict[str, Any] = {
        "interactive": transactional(steps), "nested": nested, "manual": manual, "offloaded": offloaded,
        "thread": lambda did, plan, fail: db.run(on_thread, did, plan, fail), "batch": batch, "autocommit": autocommit,
        "readonly": readonly, "readonly stream": readonly_stream, "readonly statement": readonly_statement,
        "readonly thread": readonly_thread,
    }  # fmt: skip

    async def client(number: int) -> None:
        for _ in range(12):
            path = chance.choice(list(paths))
            plan = [
                (chance.choice(["read", "append", "append"]), chance.randrange(KEYS))
                for _ in range(chance.randint(1, 4))
            ]
            did = Did(len(history.all), path)
            history.all.append(did)
            fail = chance.random() < 0.15 and not path.startswith("readonly")
            patience = chance.uniform(0, 0.004) if chance.random() < 0.25 else None
            did.began = next(history.clock)
            with anyio.move_on_after(patience):
                try:
                    await paths[path](did, plan, fail)
                    did.outcome = "done"
                except Undo:
                    did.outcome = "undone"
            did.ended = next(history.clock)
            if chance.random() < 0.2:
                await anyio.lowlevel.checkpoint()

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(client, number)
    await usable(db)
    final = {key: parse(text) for key, text in engine.outside("SELECT key, list FROM lists")}
    history.check(final)
    done = sum(each.outcome == "done" for each in history.all)
    assert done > 100
    FIGURES["histories checked"] += 1
    FIGURES["transactions in the histories"] += len(history.all)
