"""Faults at every call that reaches SQLite: errors are mapped, nothing is half done, and the pool stays whole."""

from __future__ import annotations

import os
import random
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import errors, transactional
from tests.contract.support import HANGING, Engine, gather, held, idle, usable
from tests.robustness.faults import FAULTS, Fault, Faults, faulty
from tests.robustness.support import FIGURES

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO item (value) VALUES (?)"

KINDS: list[tuple[str, str]] = [
    *((error, "before") for error in ("busy", "io", "full", "corrupt", "interrupt", "memory")),
    *((error, "rolled back") for error in ("io", "full", "interrupt", "memory")),
    *((error, "after") for error in ("io", "full")),
]


@pytest.fixture
def faults(anyio_backend: Any) -> Iterator[Faults]:
    """The connections of this test can fail."""
    with faulty() as found:
        yield found


class Outcomes:
    """What callers were told of their units of work; each writes a word with the endings it is given."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.told: dict[str, tuple[tuple[str, ...], bool]] = {}

    async def unit(self, word: str, endings: str, work: Callable[[], Awaitable[Any]]) -> None:
        done = False
        try:
            with anyio.fail_after(HANGING):
                await work()
            done = True
        except errors.DatabaseError as error:
            error.__str__()
        except BaseExceptionGroup as group:  # a task group was between
            if group.split(errors.DatabaseError)[1] is not None:
                raise
        finally:
            word = f"{self.prefix}{word}"
            self.told[word] = tuple(f"{word}{ending}" for ending in endings), done

    def check(self, found: Counter[str], fault: Fault) -> None:
        where = f"{fault.error} {fault.moment} {fault.struck}"
        for word, (values, done) in self.told.items():
            counts = {found[value] for value in values}
            assert counts <= {0, 1}, f"{word} was written twice: {where}"
            assert len(counts) <= 1, f"{word} is half done: {where}"
            if done:
                assert counts <= {1}, f"{word} was acknowledged and is lost: {where}"
            elif fault.moment != "after":  # else nobody can know whether it was committed
                assert counts <= {0}, f"{word} was refused, and is there all the same: {where}"


async def write(db: Any, value: str) -> None:
    await db.execute(INSERT, (value,))


async def _autocommit(db: Any, outcomes: Outcomes) -> None:
    await outcomes.unit("one", " ", lambda: write(db, "one "))
    await outcomes.unit("read", "", lambda: db.fetch_all("SELECT * FROM item"))
    await outcomes.unit("row", "", lambda: db.fetch_one("SELECT * FROM item"))
    await outcomes.unit("many", "ab", lambda: db.execute_many(INSERT, [("manya",), ("manyb",)]))
    await outcomes.unit("upsert", " ", lambda: db.execute(
        "INSERT INTO item (value) VALUES ('upsert ') ON CONFLICT (id) DO UPDATE SET value = 'never'"))  # fmt: skip


async def _transaction(db: Any, outcomes: Outcomes) -> None:
    async def work() -> None:
        async with db.transaction():
            await write(db, "ta")
            async with db.transaction():
                await write(db, "tb")
            try:
                async with db.transaction():
                    await write(db, "never")
                    raise ValueError
            except ValueError:
                pass
            await write(db, "tc")

    await outcomes.unit("t", "abc", work)


async def _undone(db: Any, outcomes: Outcomes) -> None:
    async def work() -> None:
        try:
            async with db.transaction():
                await write(db, "never")
                raise ValueError
        except ValueError:
            pass

    await outcomes.unit("undone", "", work)


async def _readonly(db: Any, outcomes: Outcomes) -> None:
    async def work() -> None:
        async with db.transaction(readonly=True):
            await db.fetch_all("SELECT * FROM item")
            await db.fetch_value("SELECT count(*) FROM item")

    await outcomes.unit("readonly", "", work)

    async def inside() -> None:
        async with db.transaction():
            await write(db, "inside ")
            async with db.transaction(readonly=True):
                await db.fetch_value("SELECT count(*) FROM item")

    await outcomes.unit("inside", " ", inside)


async def _manual(db: Any, outcomes: Outcomes) -> None:
    async def work() -> None:
        await db.begin()
        try:
            await write(db, "ma")
            await db.begin()
            await write(db, "mb")
            await db.commit()
            await db.commit()
        finally:
            while db.in_transaction:
                await db.rollback()

    await outcomes.unit("m", "ab", work)


async def _renewed(db: Any, outcomes: Outcomes) -> None:
    @transactional
    async def work() -> None:
        await write(db, "first ")
        await db.commit()
        outcomes.told["first"] = ("first ",), True
        await write(db, "second ")

    outcomes.told["first"] = ("first ",), False
    await outcomes.unit("second", " ", work)
    assert outcomes.told["first"][1] or not outcomes.told["second"][1]


async def _threads(db: Any, outcomes: Outcomes) -> None:
    def run(connection: Any) -> None:
        connection.execute(INSERT, ("ra",))
        connection.execute(INSERT, ("rb",))

    @transactional(offload=True)
    async def offloaded() -> None:
        await write(db, "oa")
        async with db.transaction():
            await write(db, "ob")
        await db.execute_many(INSERT, [("oc",)])

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(INSERT, ("ba",))
            await batch.execute(INSERT, ("bb",))

    async def script() -> None:
        async with db.transaction():
            await db.execute_script("INSERT INTO item (value) VALUES ('sa'); INSERT INTO item (value) VALUES ('sb')")

    await outcomes.unit("r", "ab", lambda: db.run(run))
    await outcomes.unit("o", "abc", offloaded)
    await outcomes.unit("b", "ab", batch)
    await outcomes.unit("s", "ab", script)


async def _stream(db: Any, outcomes: Outcomes) -> None:
    async def work() -> None:
        async with db.stream("SELECT * FROM item", chunk_size=2) as rows:
            async for _ in rows:
                pass

    async def early() -> None:
        async with db.stream("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3", chunk_size=1) as rows:
            async for _ in rows:
                break

    async def inside() -> None:
        async with db.transaction():
            await write(db, "si")
            async with db.stream("SELECT * FROM item", chunk_size=2) as rows:
                async for _ in rows:
                    pass
            await write(db, "sj")

    await outcomes.unit("stream", "", work)
    await outcomes.unit("early", "", early)
    await outcomes.unit("s", "ij", inside)


async def _opening(db: Any, outcomes: Outcomes) -> None:
    await db.close()
    await outcomes.unit("opened", " ", lambda: write(db, "opened "))
    await outcomes.unit("read", "", lambda: db.fetch_all("SELECT * FROM item"))
    await db.close()


async def _group(db: Any, outcomes: Outcomes) -> None:
    """Six writes of all kinds that wait behind a transaction, and so share a commit."""

    def run(connection: Any, word: str) -> None:
        connection.execute(INSERT, (f"{word}a",))
        connection.execute(INSERT, (f"{word}b",))

    @transactional(offload=True)
    async def offloaded(word: str) -> None:
        await write(db, f"{word}a")
        await write(db, f"{word}b")

    works: dict[str, tuple[Any, str]] = {
        "w": (lambda word: write(db, f"{word}a"), "a"),
        "r": (lambda word: db.run(run, word), "ab"),
        "o": (offloaded, "ab"),
    }

    async def first() -> None:
        async with db.transaction():
            await write(db, "f ")
            with db.detached():
                for word in ("w0", "r0", "o0", "o1", "w1", "r1"):
                    work, endings = works[word[0]]
                    group.start_soon(outcomes.unit, word, endings, partial(work, word))
            while db.stats().queued < 6:
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        await outcomes.unit("f", " ", first)


SCENARIOS = {
    name: scenario
    for name, scenario in list(globals().items())
    if name in ("_autocommit", "_transaction", "_undone", "_readonly", "_manual", "_renewed", "_threads", "_stream",
                "_opening", "_group")
}  # fmt: skip


async def values(db: Any, engine: Engine) -> Counter[str]:
    FAULTS.plan(None)
    await idle(db)
    return Counter(value for (value,) in engine.outside("SELECT value FROM item"))


@pytest.mark.shortened
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=[name[1:] for name in SCENARIOS])
async def test_a_fault_at_every_call(
    make_db: Any, engine: Engine, faults: Faults, scenario: Any, anyio_backend: Any, pytestconfig: pytest.Config
) -> None:
    """Whatever fails, wherever: callers get the package's errors, what was answered is there once, what was
    refused is not, and the pool has its connections afterwards.
    """
    db = await make_db(busy_timeout=1000)
    whole = anyio_backend == ("asyncio", {})  # elsewhere every third place will do: faults are the worker's business
    turns = (
        6 if pytestconfig.getoption("quick") else 1
    )  # each place meets every sixth kind, the next place the next ones

    async def run(fault: Fault) -> int:
        outcomes = Outcomes()
        await idle(db)
        faults.plan(fault)
        try:
            await scenario(db, outcomes)
        except errors.DatabaseError:
            if not fault.struck:
                raise
        calls = len(faults.calls)
        found = await values(db, engine)
        outcomes.check(found, fault)
        assert found["never"] == 0
        assert len(faults.open) <= 3, "more connections than the pool has"
        with anyio.fail_after(HANGING):
            async with held(db, readonly=True, count=2), held(db):
                pass
        await usable(db)
        await db.execute("DELETE FROM item")
        assert db.stats().readers_open == 2
        return calls

    calls = await run(Fault("io", at=0))  # counts them, and fails nowhere
    injected = 0
    for at in range(1, calls + 1):
        if not whole and at % 3:
            continue
        for error, moment in KINDS[at // (1 if whole else 3) % turns :: turns]:
            fault = Fault(error, moment, at=at)
            await run(fault)
            injected += bool(fault.struck)
    assert injected >= calls // 3 // (1 if whole else turns)
    FIGURES["faults injected, each at one call"] += injected


@pytest.mark.parametrize("seed", range(int(os.environ.get("STORM_SEEDS", "8"))))
async def test_a_storm_of_faults(make_db: Any, engine: Engine, faults: Faults, seed: int) -> None:
    """Many tasks on all write paths while every twentieth call fails, clean-up and reopening included: no answer
    is wrong, nothing hangs, and when the storm is over the pool is whole.
    """
    db = await make_db(busy_timeout=200)
    chance = random.Random(seed)
    kinds = KINDS if seed % 2 else [kind for kind in KINDS if kind[1] != "after"]
    told: dict[str, bool] = {}

    async def attempt(word: str, work: Callable[[], Awaitable[Any]]) -> None:
        told[word] = False
        try:
            await work()
            told[word] = True
        except errors.DatabaseError as error:
            error.__str__()

    async def whole(word: str) -> None:
        async with db.transaction():
            await write(db, f"{word}-a")
            async with db.transaction():
                await write(db, f"{word}-b")
            async with db.stream("SELECT 1 UNION ALL SELECT 2") as rows:
                async for _ in rows:
                    pass
            await write(db, f"{word}-c")

    @transactional(offload=True)
    async def offloaded(word: str) -> None:
        await write(db, f"{word}-a")
        await db.execute_many(INSERT, [(f"{word}-b",), (f"{word}-c",)])

    def run(connection: Any, word: str) -> None:
        for ending in "abc":
            connection.execute(INSERT, (f"{word}-{ending}",))

    async def swallowing(connection_word: str) -> None:
        def run_on(connection: Any) -> None:
            try:
                run(connection, connection_word)
            except sqlite3.Error:  # takes no notice of what the database may have done
                pass

        await db.run(run_on)

    async def batch(word: str) -> None:
        async with db.batch() as batch:
            for ending in "abc":
                await batch.execute(INSERT, (f"{word}-{ending}",))

    async def manual(word: str) -> None:
        await db.begin()
        try:
            for ending in "abc":
                await write(db, f"{word}-{ending}")
            await db.commit()
        finally:
            if db.in_transaction:
                await db.rollback()

    paths: list[Any] = [
        whole, offloaded, lambda word: db.run(run, word), batch, manual,
        lambda word: db.execute_many(INSERT, [(f"{word}-{ending}",) for ending in "abc"]),
        lambda word: db.execute("INSERT INTO item (value) VALUES (:w || '-a'), (:w || '-b'), (:w || '-c')", {"w": word}),
    ]  # fmt: skip

    async def task(number: int) -> None:
        for step in range(12):
            path = paths[(number + step) % len(paths)]
            await attempt(f"{number}.{step}", lambda p=path, s=step: p(f"{number}.{s}"))
            if step % 4 == 0:
                await attempt("read", lambda: db.fetch_all("SELECT * FROM item"))
                await attempt("swallowing", lambda s=step: swallowing(f"ignored{number}.{s}"))

    struck = faults.storm(chance, 0.05, kinds)
    with anyio.fail_after(HANGING):
        assert set(await gather(*[lambda n=n: task(n) for n in range(8)])) == {None}
    found = await values(db, engine)
    assert len(struck) > 10
    FIGURES["faults injected, in storms"] += len(struck)
    after = any(fault.moment == "after" for fault in struck)
    for word, done in told.items():
        if word[0].isdigit():
            counts = {found[f"{word}-{ending}"] for ending in "abc"}
            assert counts in ({0}, {1}), f"{word}: {counts}"
            assert counts == {1} or not done, f"{word} was acknowledged and is lost"
            assert counts == {0} or done or after, f"{word} was refused, and is there all the same"
    assert len(faults.open) <= 3
    with anyio.fail_after(HANGING):
        async with held(db, readonly=True, count=2), held(db):
            pass
    await usable(db)
    assert db.stats().readers_open == 2
