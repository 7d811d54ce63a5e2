"""Behind PgBouncer in transaction mode: `pooler: transaction`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors, transactional
from tests.contract.support import SLOW_SELECT, add, gather, usable
from tests.postgresql.engine import PostgresqlEngine
from tests.postgresql.pooler import pooler, prepares

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["", "prepares"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """PostgreSQL behind the pooler."""
    from tests.conftest import handles_of

    pooler()
    if request.param and not prepares():
        pytest.skip("this PgBouncer keeps no track of prepared statements: 1.21 does, and PGBOUNCER may name it")
    engine = PostgresqlEngine("postgresql", tmp_path)
    engine.pooler, engine.pooler_prepares = True, request.param
    with handles_of(engine):
        yield engine
    engine.dispose()


async def test_the_configuration_is_told(make_db: Any) -> None:
    """Without the setting the error says which line to put into the configuration."""
    db = await make_db(schema=False, pooler="none")
    with pytest.raises(errors.ConnectionFailedError, match="pooler: transaction"):
        await db.fetch_value("SELECT 1")


async def test_everything_that_a_pooler_allows(make_db: Any, engine: PostgresqlEngine) -> None:
    """Statements alone and together, transactions, levels, streams, many rows, functions, scripts: each with its settings."""
    db = await make_db(pool_size=6, lock_timeout=1234, statement_timeout=5678)
    settings = "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
    told = ("1234ms", "5678ms")
    assert tuple(await db.fetch_one(settings)) == told
    for _ in range(12):  # often enough to be prepared, were that allowed
        results = await gather(*[lambda: db.fetch_one(settings)] * 20)
        assert {tuple(result) for result in results} == {told}
        await gather(*[lambda n=n: db.execute("INSERT INTO item (value) VALUES (:v)", {"v": n}) for n in range(10)])
    assert await db.fetch_value("SELECT count(*) FROM item") == 120
    for options in ({}, {"readonly": True}, {"isolation": "serializable"}):
        async with db.transaction(**options):
            assert tuple(await db.fetch_one(settings)) == told
            async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=10) as rows:
                assert len([row async for row in rows]) == 120
    async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=10) as rows:
        assert len([row async for row in rows]) == 120
    for count in (10, 700):
        await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(count)])
    assert await db.run(lambda connection: connection.execute("SELECT count(*) FROM item").fetchone()[0]) == 830
    assert await db.run(lambda connection: connection.execute("SELECT 1").fetchone()[0], readonly=True) == 1
    async with db.transaction():
        await add(db, "kept")
        with pytest.raises(errors.IntegrityError):
            await add(db, "kept")
        with pytest.raises(LookupError):
            async with db.transaction():
                await add(db, "undone")
                raise LookupError

    @transactional(offload=True, retries=2)
    async def offloaded(name: str) -> None:
        await add(db, name)
        assert tuple(await db.fetch_one(settings)) == told

    await gather(*[lambda n=n: offloaded(f"o{n}") for n in range(20)])
    assert len(engine.committed()) == 21
    async with db.batch() as batch:
        for n in range(30):
            await batch.execute("INSERT INTO jobs (name) VALUES (?)", (f"b{n}",))
    assert len(engine.committed()) == 51
    await db.execute(f"VACUUM {engine.schemas['default']}.item")
    for outside in ("CREATE TEMP TABLE t (a int)", "SELECT pg_advisory_lock(1)"):
        with pytest.raises(errors.QueryExecutionError):
            await db.execute(outside)
        async with db.transaction():
            with pytest.raises(errors.QueryExecutionError):
                await db.execute(outside)
    await usable(db)


async def test_cancellation(make_db: Any) -> None:
    """A statement is cancelled on the server through the pooler, and nobody else's is."""
    db = await make_db(pool_size=4)

    async def other() -> None:
        for _ in range(20):
            await db.fetch_value("SELECT pg_sleep(0.01)")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(other)
            for _ in range(3):
                with anyio.move_on_after(0.05):
                    await db.fetch_value(SLOW_SELECT)
    await usable(db)


async def test_prepared_through_the_pooler(make_db: Any, engine: PostgresqlEngine) -> None:
    """With `pooler_prepares` statements are prepared on whichever server connection they meet: more of them than the pooler
    keeps, and after their table has changed. Without it none is.
    """
    db = await make_db(pool_size=6)
    mark = engine.schemas["default"]
    known = f"SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'PGBOUNCER%' AND statement LIKE '%/* {mark}%'"
    for n in range(60):
        select = f"SELECT value, {n} FROM item /* {mark} */ WHERE id = :id"
        for _ in range(6):
            await gather(*[lambda select=select: db.fetch_one(select, {"id": 1})] * 3)
    assert (await db.fetch_value(known) > 0) is engine.pooler_prepares
    every = "SELECT * FROM item WHERE id = :id"
    for inside in (False, True):
        await db.execute("INSERT INTO item (id, value) VALUES (:id, 'x')", {"id": 100 + inside})
        for _ in range(10):
            assert await db.fetch_one(every, {"id": 100 + inside}) is not None
        await db.execute(f"ALTER TABLE item ADD COLUMN more_{inside} int DEFAULT 7")
        if inside:
            async with db.transaction():
                assert (await db.fetch_one(every, {"id": 101}))["more_true"] == 7
        results = await gather(*[lambda: db.fetch_one(every, {"id": 100})] * 20)
        assert {row[f"more_{inside}"] for row in results} == {7}
    await usable(db)
