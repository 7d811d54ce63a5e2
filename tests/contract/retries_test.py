"""`retries`: run again is what certainly left nothing behind, and nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio
import pytest

from database import get_db, transactional
from tests.contract.support import Engine, add, around_commit, errors, usable

pytestmark = pytest.mark.anyio

Body = Callable[[Any, str], Awaitable[None]]

BUSY = "somebody else's lock"


async def _requires_new(db: Any, name: str) -> None:
    async with db.transaction(propagation="requires_new"):
        await add(db, name)


async def _manual(db: Any, name: str) -> None:
    await db.begin()
    await add(db, name)
    await db.commit()


async def _batch(db: Any, name: str) -> None:
    async with db.batch() as batch:
        await batch.execute("INSERT INTO jobs (name) VALUES (?)", (name,))


async def _in_a_task(db: Any, name: str) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(add, db, name)


@transactional(offload=True)
async def _offloaded(name: str) -> None:
    await add(get_db(), name)


@transactional(db="audit", offload=True)
async def _offloaded_audit(name: str) -> None:
    await add(get_db("audit"), name)


LEAVING: dict[str, Body] = {
    "execute": add,
    "fetch": lambda db, name: db.fetch_value("INSERT INTO jobs (name) VALUES (:name) RETURNING id", {"name": name}),
    "execute_many": lambda db, name: db.execute_many("INSERT INTO jobs (name) VALUES (?)", [(name,)]),
    "script": lambda db, name: db.execute_script(f"INSERT INTO jobs (name) VALUES ('{name}')"),
    "batch": _batch,
    "run": lambda db, name: db.run(lambda connection: connection.execute(f"INSERT INTO jobs (name) VALUES ('{name}')")),
    "requires_new": _requires_new,
    "task": _in_a_task,
    "offload": lambda db, name: (_offloaded_audit if db.name == "audit" else _offloaded)(name),
}
"""Ways to leave something committed behind."""


@pytest.mark.parametrize("propagation", ["supports", "not_supported", "never"])
async def test_without_a_transaction_of_its_own(db: Any, engine: Engine, propagation: Any) -> None:
    """A function that runs without a transaction is not run again when it may have left something committed; when
    the one thing it tried has certainly failed, it is.
    """
    for what, leave in {**LEAVING, "manual": _manual}.items():
        runs = 0

        @transactional(propagation=propagation, retries=2)
        async def work(leave: Body, what: str) -> None:
            nonlocal runs
            runs += 1
            await leave(db, f"{what} {runs}")
            raise errors.DatabaseBusyError(BUSY)

        with pytest.raises(errors.DatabaseBusyError):
            await work(leave, what)
        assert (what, runs) == (what, 1)
    assert len(engine.committed()) == len(LEAVING) + 1

    runs = 0

    @transactional(propagation=propagation, retries=2)
    async def refused() -> None:
        nonlocal runs
        runs += 1
        with pytest.raises(errors.IntegrityError):
            await add(db, "execute 1")  # UNIQUE
        if runs < 3:
            raise errors.DatabaseBusyError(BUSY)

    await refused()
    assert runs == 3


async def test_a_write_whose_rows_do_not_fit(db: Any, engine: Engine) -> None:
    """A write that is committed, and whose rows only could not be made into records, is left behind like any other."""

    @dataclass
    class Job:
        name: datetime

    runs = 0

    @transactional(propagation="supports", retries=2)
    async def work() -> None:
        nonlocal runs
        runs += 1
        with pytest.raises(errors.QueryExecutionError, match="does not fit"):
            await db.fetch_one(
                "INSERT INTO jobs (name) VALUES (:name) RETURNING name", {"name": f"{runs}"}, record_class=Job
            )
        raise errors.DatabaseBusyError(BUSY)

    with pytest.raises(errors.DatabaseBusyError):
        await work()
    assert engine.committed() == ["1"]


async def test_work_on_another_database(audit: Any, engine: Engine) -> None:
    """What the body has committed on another database, or put into a transaction there that its caller has open, was
    not undone with its own: it is not run again.
    """
    db = get_db()
    runs = 0

    @transactional(retries=2)
    async def work(leave: Body, what: str) -> None:
        nonlocal runs
        runs += 1
        await add(db, f"{what} {runs}")
        await leave(audit, f"{what} {runs}")
        raise errors.DatabaseBusyError(BUSY)

    for what, leave in LEAVING.items():
        runs = 0
        with pytest.raises(errors.DatabaseBusyError):
            await work(leave, what)
        assert (what, runs) == (what, 1)
    runs = 0
    async with audit.transaction():
        with pytest.raises(errors.DatabaseBusyError):
            await work(add, "callers")
    assert runs == 1
    assert engine.committed() == []
    assert len(engine.committed("audit")) == len(LEAVING) + 1

    @transactional(db=("default", "audit"), retries=2)
    async def on_both() -> int:
        nonlocal runs
        runs += 1
        await add(db, "both")
        await add(audit, "both")
        async with audit.transaction():  # a level of what is rolled back with the rest
            await add(audit, "both, nested")
        if runs < 3:
            raise errors.DatabaseBusyError(BUSY)
        return runs

    runs = 0
    assert await on_both() == 3
    assert engine.committed() == ["both"]
    assert {"both", "both, nested"} < set(engine.committed("audit"))


@pytest.mark.parametrize("offload", [False, True], ids=["inside", "offload"])
@pytest.mark.parametrize("propagation", ["nested", "required", "mandatory", "supports"])
async def test_within_an_outer_transaction(db: Any, engine: Engine, propagation: Any, offload: bool) -> None:
    """Within an outer transaction the inner function is not run again, but the whole is, where that asks for it."""
    if offload and propagation not in ("nested", "required"):
        pytest.skip("no such thing")
    runs: list[str] = []

    @transactional(propagation=propagation, retries=2, offload=offload)
    async def inner() -> None:
        runs.append("inner")
        await add(db, "inner")
        if len(runs) < 6:
            raise errors.DatabaseBusyError(BUSY)

    @transactional(retries=2)
    async def outer() -> None:
        runs.append("outer")
        await add(db, "outer")
        await inner()

    await outer()
    assert runs == ["outer", "inner"] * 3
    assert engine.committed() == ["inner", "outer"]
    await usable(db)


async def test_doomed_by_a_lock(db: Any, engine: Engine) -> None:
    """A body that goes on after a part of it was refused for a lock can only be rolled back, and is run again."""
    runs = 0

    @transactional(propagation="required")
    async def inner() -> None:
        if runs < 3:
            raise errors.DatabaseBusyError(BUSY)

    @transactional(retries=2)
    async def outer() -> None:
        nonlocal runs
        runs += 1
        await add(db, "outer")
        try:
            await inner()
        except errors.DatabaseBusyError:
            pass

    await outer()
    assert runs == 3
    assert engine.committed() == ["outer"]


@pytest.mark.parametrize("offload", [False, True], ids=["inside", "offload"])
async def test_a_lock_taken_behind_a_partial_commit(
    make_db: Any, engine: Engine, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `commit()` has made permanent is not done again, although the next part finds the lock taken."""
    db = await make_db(busy_timeout=50)
    parts: list[int] = []
    with ExitStack() as stack:

        @transactional(retries=2, offload=offload)
        async def work() -> None:
            await add(db, f"a{len(parts)}")
            with monkeypatch.context() as patch:
                around_commit(patch, db, behind=lambda: stack.enter_context(engine.locked()))
                await db.commit()
            parts.append(1)
            await add(db, "next")

        with pytest.raises(errors.DatabaseBusyError):
            await work()
    assert engine.committed() == ["a0"]
    await usable(db)


@pytest.mark.parametrize("offload", [False, True], ids=["inside", "offload"])
async def test_a_callback_that_finds_a_lock(db: Any, engine: Engine, offload: bool) -> None:
    """An `on_commit` function that fails for a lock fails behind the commit: nothing is run again."""
    runs = 0

    def callback() -> None:
        raise errors.DatabaseBusyError(BUSY)

    @transactional(retries=2, offload=offload)
    async def work() -> None:
        nonlocal runs
        runs += 1
        await db.execute("INSERT INTO item (value) VALUES ('x')")
        db.on_commit(callback)

    with pytest.raises(errors.DatabaseBusyError):
        await work()
    assert runs == 1
    assert engine.outside("SELECT count(*) FROM item") == [(1,)]


async def test_callbacks_given_to_an_outer_transaction(audit: Any) -> None:
    """What a body has left with a transaction of its caller's on another database is left there once."""
    seen: list[str] = []

    @transactional(retries=2)
    async def work() -> None:
        audit.on_commit(lambda: seen.append("x"))
        raise errors.DatabaseBusyError(BUSY)

    async with audit.transaction():
        with pytest.raises(errors.DatabaseBusyError):
            await work()
    assert seen == ["x"]
    with pytest.raises(errors.DatabaseBusyError):
        await work()  # at once, and so no less
    assert seen == ["x", "x"]
