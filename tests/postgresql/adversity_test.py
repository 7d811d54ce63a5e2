"""What a server does to its clients on a bad day: contention, a full disk, impatience; each with a real one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import errors, transactional
from tests.contract.support import HANGING, add, eventually, gather, usable
from tests.postgresql.engine import PostgresqlEngine, oracle
from tests.postgresql.server import shared

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("offload", [False, True], ids=["interactive", "offloaded"])
async def test_serializable_under_contention(make_db: Any, engine: PostgresqlEngine, offload: bool) -> None:
    """Many at once that each look at all rows and change one: with `retries` all get through, and what each saw held.

    Write skew, which every isolation but this one lets pass: each withdraws from one account if both together allow it.
    """
    db = await make_db(pool_size=6)
    await db.execute("INSERT INTO item (value) VALUES ('50'), ('50')")

    @transactional(isolation="serializable", retries=500, offload=offload)
    async def withdraw(account: int) -> bool:
        rows = await db.fetch_all("SELECT value FROM item")
        if not offload:
            await anyio.lowlevel.checkpoint()
        if sum(int(row["value"]) for row in rows) < 10:
            return False
        await db.execute("UPDATE item SET value = CAST(value AS int) - 10 WHERE id = :id", {"id": account})
        return True

    with anyio.fail_after(HANGING):
        results = await gather(*[lambda n=n: withdraw(n % 2 + 1) for n in range(30)])
    assert [result for result in results if isinstance(result, BaseException)] == []
    assert (results.count(True), results.count(False)) == (10, 20)
    assert engine.outside("SELECT sum(CAST(value AS int)) FROM item") == [(0,)]


async def test_deadlocks_of_many(make_db: Any, engine: PostgresqlEngine) -> None:
    """Transactions that lock the same rows in all orders: with `retries` each is done once, however often it was chosen."""
    db = await make_db(pool_size=4, options=f"-c search_path={engine.schemas['default']} -c deadlock_timeout=20ms")
    await db.execute("INSERT INTO item (value) VALUES ('0'), ('0'), ('0')")
    update = "UPDATE item SET value = CAST(value AS int) + 1 WHERE id = :id"

    @transactional(retries=1000)
    async def work(order: tuple[int, ...]) -> None:
        for number in order:
            await db.execute(update, {"id": number})
            await anyio.lowlevel.checkpoint()

    orders = [(1, 2, 3), (3, 2, 1), (2, 1, 3), (3, 1, 2)] * 5
    with anyio.fail_after(HANGING):
        assert await gather(*[lambda order=order: work(order) for order in orders]) == [None] * len(orders)
    assert engine.outside("SELECT DISTINCT value FROM item") == [(str(len(orders)),)]


async def test_an_impatient_server(make_db: Any, engine: PostgresqlEngine) -> None:
    """`idle_in_transaction_session_timeout` ends the connection: nothing is kept, and it is told; `retries` help."""
    schema = engine.schemas["default"]
    db = await make_db(pool_size=2, options=f"-c search_path={schema} -c idle_in_transaction_session_timeout=100ms")
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        await add(db, "a")
        if runs == 1:
            pid = await db.fetch_value("SELECT pg_backend_pid()")
            await eventually(lambda: not engine.outside(f"SELECT FROM pg_stat_activity WHERE pid = {pid}"))
        await add(db, "b")

    with pytest.raises(errors.QueryExecutionError) as caught:
        await transactional(work)()
    assert caught.value.code_name == "idle_in_transaction_session_timeout"
    assert caught.value.outcome == "undone"
    assert engine.committed() == []
    runs = 0
    await transactional(retries=5)(work)()
    assert engine.committed() == ["a", "b"]
    await usable(db)


@pytest.fixture
def tiny() -> Iterator[str]:
    """A tablespace with room for very little."""
    directory = shared().sockets / f"tiny-{os.getpid()}"
    directory.mkdir(exist_ok=True)
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0777", "tmpfs", str(directory)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system takes root, and the right to mount one")
    try:
        (directory / "space").mkdir(mode=0o777)
        subprocess.run(["chown", "nobody", str(directory / "space")], check=True)
        oracle().execute(f"CREATE TABLESPACE tiny LOCATION '{directory / 'space'}'")
        yield "tiny"
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


async def test_a_full_disk(make_db: Any, engine: PostgresqlEngine, tiny: str) -> None:
    """What finds no room leaves nothing; its transaction goes on, or is undone; with room made, all is as before."""
    db = await make_db(pool_size=2)
    schema = engine.schemas["default"]
    try:
        await db.execute("CREATE TABLE large (id bigint GENERATED BY DEFAULT AS IDENTITY, v text) TABLESPACE tiny")
        await db.execute("CREATE TABLE ballast (v text) TABLESPACE tiny")
        await db.execute("ALTER TABLE ballast ALTER COLUMN v SET STORAGE PLAIN")
        await db.execute("ALTER TABLE large ALTER COLUMN v SET STORAGE PLAIN")
        await db.execute("INSERT INTO ballast SELECT repeat('x', 7000) FROM generate_series(1, 60)")
        await db.execute("INSERT INTO large (v) VALUES ('kept')")
        rows = [("x" * 7000,) for _ in range(300)]
        insert = "INSERT INTO large (v) VALUES (?)"

        async def batch() -> None:
            async with db.batch() as batch:
                for row in rows:
                    await batch.execute(insert, row)

        async def whole() -> None:
            async with db.transaction():
                for row in rows:
                    await db.execute(insert, row)

        for way in (
            lambda: db.execute("INSERT INTO large (v) SELECT repeat('x', 7000) FROM generate_series(1, 300)"),
            lambda: db.execute_many(insert, rows),
            lambda: db.run(lambda connection: connection.cursor().executemany(insert, rows)),
            batch,
            whole,
        ):
            with pytest.raises(errors.QueryExecutionError) as caught:
                await way()
            assert caught.value.code_name == "disk_full"
            assert engine.outside("SELECT v FROM large") == [("kept",)]
        async with db.transaction():
            await add(db, "before")
            with pytest.raises(errors.QueryExecutionError, match="disk_full"):
                await db.execute_many(insert, rows)
            await add(db, "after")
        assert engine.committed() == ["after", "before"]
        await db.execute("DROP TABLE ballast")
        await db.execute_many(insert, rows[:20])
        assert await db.fetch_value("SELECT count(*) FROM large") == 21
    finally:
        await engine.public.close_all()
        oracle().execute(f"DROP TABLE IF EXISTS {schema}.large, {schema}.ballast")
        oracle().execute("DROP TABLESPACE tiny")
