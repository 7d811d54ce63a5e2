"""A task that could only wait for itself is told so at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from database import get_db, transactional
from tests.contract.support import Engine, add, errors, names, usable

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO jobs (name) VALUES (?)"


@pytest.fixture
def engine(tmp_path: Any) -> Engine:
    """This is about a database of one writer."""
    return Engine("sqlite3", tmp_path)


async def _transaction(db: Any) -> None:
    async with db.transaction():
        await add(db, "inner")


async def _manual(db: Any) -> None:
    await db.begin()
    try:
        await add(db, "inner")
    finally:
        await db.rollback()


async def _batch(db: Any) -> None:
    async with db.batch() as batch:
        await batch.execute(INSERT, ("inner",))


async def _stream(db: Any) -> None:
    async with db.transaction(), db.stream("INSERT INTO jobs (name) VALUES ('inner') RETURNING id") as rows:
        async for _ in rows:
            pass


@transactional
async def _decorated() -> None:
    await add(get_db(), "inner")


@transactional(offload=True)
async def _offloaded() -> None:
    await add(get_db(), "inner")


WRITES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "execute": lambda db: add(db, "inner"),
    "fetch": lambda db: db.fetch_value("INSERT INTO jobs (name) VALUES ('inner') RETURNING id"),
    "execute_many": lambda db: db.execute_many(INSERT, [("inner",)]),
    "script": lambda db: db.execute_script("INSERT INTO jobs (name) VALUES ('inner')"),
    "run": lambda db: db.run(lambda connection: None),
    "ddl": lambda db: db.execute("CREATE TABLE other (id INTEGER)"),
    "batch": _batch,
    "stream": _stream,
    "transaction": _transaction,
    "begin": _manual,
    "decorated": lambda _: _decorated(),
    "offloaded": lambda _: _offloaded(),
    "flush": lambda db: db.flush(),
}


@asynccontextmanager
async def _detached(db: Any) -> AsyncIterator[None]:
    with db.detached():
        yield


@asynccontextmanager
async def _detached_twice(db: Any) -> AsyncIterator[None]:
    with db.detached(), db.detached():
        yield


@asynccontextmanager
async def _not_supported(db: Any) -> AsyncIterator[None]:
    async with db.transaction(propagation="not_supported"):
        yield


@asynccontextmanager
async def _new_readonly(db: Any) -> AsyncIterator[None]:
    async with db.transaction(readonly=True, propagation="requires_new"):
        assert await names(db) == ["before"]
        with db.detached():
            yield


@asynccontextmanager
async def _detached_readonly(db: Any) -> AsyncIterator[None]:
    async with _detached(db), db.transaction(readonly=True):
        assert await names(db) == ["before"]
        async with _not_supported(db):
            yield


OUTSIDE: list[Any] = [_detached, _detached_twice, _not_supported, _new_readonly, _detached_readonly]


@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("step_out", OUTSIDE)
async def test_a_write_outside_of_ones_own_write_transaction(
    make_db: Any, engine: Engine, step_out: Any, nested: bool
) -> None:
    """Every write, and all that begins one, is refused where the writer is held by the task that asks; reading is
    not, and the transaction goes on.
    """
    db = await make_db(pool_timeout=20)
    await add(db, "before")
    wrong: dict[str, Any] = {}

    async def attempts() -> None:
        async with step_out(db):
            assert not db.in_transaction
            for name, write in WRITES.items():
                try:
                    with anyio.fail_after(2):
                        await write(db)
                    wrong[name] = "went through"
                except errors.TransactionError as error:
                    if "wait for" not in str(error):
                        wrong[name] = error
                except Exception as error:
                    wrong[name] = error
            assert await names(db) == ["before"]

    async with db.transaction():
        await add(db, "outer")
        if nested:
            async with db.transaction():
                await attempts()
        else:
            await attempts()
        await add(db, "outer too")
    assert not wrong
    assert engine.committed() == ["before", "outer", "outer too"]
    await usable(db)


async def test_a_write_to_the_same_file_by_another_name(make_db: Any, engine: Engine) -> None:
    """A file that is attached to one database and is another one as well has one writer: who holds it open there and
    writes here is told so, statement by statement and in a transaction.
    """
    db = await make_db(pool_timeout=20, attach={"audit": str(engine.path("audit"))}, audit={"attach": {}})
    audit = engine.public.get_db("audit")
    for outer, inner in ((db, audit), (audit, db)):
        async with outer.transaction():
            await add(outer, "outer")
            for write in (lambda inner=inner: add(inner, "inner"), lambda inner=inner: _transaction(inner)):
                with anyio.fail_after(2), pytest.raises(errors.TransactionError, match="wait for itself"):
                    await write()
            await outer.execute("UPDATE jobs SET handler = 'goes on'")
        await add(inner, "later")
    assert engine.committed() == engine.committed("audit") == ["later", "outer"]


async def test_a_level_of_a_child_task(make_db: Any, engine: Engine) -> None:
    """So is a task that has opened a level of another task's transaction, which cannot end before that level."""
    db = await make_db(pool_timeout=20)

    async def child() -> None:
        async with db.transaction():
            await add(db, "child")
            with db.detached(), anyio.fail_after(2), pytest.raises(errors.TransactionError, match="wait for"):
                await _transaction(db)

    async with db.transaction():
        await add(db, "parent")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
    assert engine.committed() == ["child", "parent"]


async def test_outside_of_a_transaction_that_holds_nothing(db: Any, engine: Engine) -> None:
    """Where the transaction around has not begun, or has just been committed in part, there is nothing to wait for."""
    async with db.transaction():
        with db.detached():
            await _transaction(db)
        await db.execute("UPDATE jobs SET name = 'first'")
        await db.commit()
        with db.detached():
            await _manual(db)
            await add(db, "second")
            await db.flush()
    assert engine.committed() == ["first", "second"]
