"""A primary with a streaming replica on loopback: where reads go, and what callers see when the primary dies."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextvars import Context
from typing import Any

import anyio
import psycopg
import pytest

from database import errors
from database.postgresql import close_all, configure, get_db, transactional, transactional_readonly
from tests.contract.support import HANGING, eventually
from tests.postgresql.cluster import replica_of
from tests.postgresql.proxy import Proxy
from tests.postgresql.server import Server, shared

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

WORKERS = 8

_numbers = itertools.count(1)


@pytest.fixture(params=[pytest.param(("asyncio", {}), id="asyncio"), pytest.param(("trio", {}), id="trio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Two loops are enough here: each run builds a cluster."""
    return request.param


class Cluster:
    """A primary and its replica, which has everything before a commit is answered."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.primary = Server(f"primary-{number}", wal_level="replica", synchronous_commit="on")
        self.primary.create()
        self.primary.start()
        with psycopg.connect(self.primary.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE TABLE note (id INT PRIMARY KEY, text TEXT)")
        self.replica = replica_of(self.primary, f"replica-{number}")

    @property
    def settings(self) -> dict[str, Any]:
        ports = f"{self.primary.port},{self.replica.port}"
        return {
            "host": "127.0.0.1,127.0.0.1",
            "port": ports,
            "dbname": "postgres",
            "user": "postgres",
            "pool_size": 4,
            "init_sql": "",
            "connect_timeout": 2,
            "reconnect_timeout": 20,
        }

    def stop(self) -> None:
        self.replica.kill()
        self.primary.kill()


@pytest.fixture
async def cluster(anyio_backend: Any) -> AsyncIterator[Cluster]:
    shared()  # skips where there is no server
    cluster = Cluster()  # on this thread: servers die with the thread that starts them
    try:
        yield cluster
    finally:
        with anyio.fail_after(HANGING):
            await close_all()
        cluster.stop()


async def test_reads_go_to_the_replica(cluster: Cluster) -> None:
    """Read-only transactions run on a replica, all else on the primary, and so do they where they must not lag."""
    configure({"database": {"postgresql": {**cluster.settings, "replicas": f"port={cluster.replica.port},1"}}})
    db = get_db()
    asleep = "SELECT pg_is_in_recovery()"

    @transactional_readonly
    async def look() -> bool:
        return await db.fetch_value(asleep)

    @transactional_readonly(replica=False)
    async def look_at_my_own() -> bool:
        return await db.fetch_value(asleep)

    @transactional_readonly(offload=True)
    async def look_at_once() -> bool:
        return await db.fetch_value(asleep)

    assert (await look(), await look_at_my_own(), await look_at_once()) == (True, False, True)
    assert await db.run(lambda connection: connection.execute(asleep).fetchone()[0], readonly=True) is True
    assert await db.fetch_value(asleep) is False
    async with db.transaction():
        assert await db.fetch_value(asleep) is False
        assert await look() is False, "within a transaction that writes, it sees what that has written"
    async with db.transaction(readonly=True, replica=False):
        assert await db.fetch_value(asleep) is False
    async with db.transaction(readonly=True):
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.execute("INSERT INTO note (id) VALUES (1)")
        await db.fetch_value(asleep)
        assert db.stats().readers_in_use == 1, "whoever watches the database sees both of its pools"
        assert await anyio.to_thread.run_sync(lambda: Context().run(db.stats)) == db.stats()
    assert len(db.pools()) == 2, "one for the primary, one for the replicas, however many transactions"


async def test_without_replicas_reads_go_to_the_primary(cluster: Cluster) -> None:
    """While no replica answers, read-only transactions run on the primary."""
    # The replicas' host list holds both: `prefer-standby` takes the primary where there is no standby.
    configure({"database": {"postgresql": {**cluster.settings, "replicas": "application_name=reading"}}})
    db = get_db()
    async with db.transaction(readonly=True):
        assert await db.fetch_value("SELECT pg_is_in_recovery()") is True
    with psycopg.connect(cluster.primary.conninfo(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")
    await anyio.to_thread.run_sync(cluster.replica.stop)
    with anyio.fail_after(HANGING):
        async with db.transaction(readonly=True):
            assert await db.fetch_value("SELECT pg_is_in_recovery()") is False


async def test_failover_under_load(cluster: Cluster) -> None:
    """The primary is killed under load and the replica promoted: callers get the common errors, then answers again,
    with no restart; whatever was answered before is there.
    """
    configure({"database": {"postgresql": cluster.settings}})
    db = get_db()
    answered: set[int] = set()
    failures: list[BaseException] = []
    numbers = itertools.count(1)
    after = 0
    promoted = False
    enough = anyio.Event()

    @transactional
    async def two(first: int, second: int) -> None:
        await db.execute("INSERT INTO note (id, text) VALUES (:id, 'transaction')", {"id": first})
        await db.execute("INSERT INTO note (id, text) VALUES (:id, 'transaction')", {"id": second})

    async def work() -> None:
        nonlocal after
        while not enough.is_set():
            first, second = next(numbers), next(numbers)
            try:
                if first % 4 == 1:
                    await two(first, second)
                    answered.update((first, second))
                else:
                    await db.execute("INSERT INTO note (id, text) VALUES (:id, 'single')", {"id": first})
                    answered.add(first)
                assert await db.fetch_value("SELECT count(*) FROM note WHERE id = :id", {"id": first}) == 1
            except errors.DatabaseError as error:
                failures.append(error)
                await anyio.sleep(0.01)  # as a caller would: a moment's thought before the next try
            else:
                after += promoted
                if after >= 200:
                    enough.set()

    held, killed = anyio.Event(), anyio.Event()

    async def in_the_middle() -> None:
        """Whatever the others were doing at that moment, this one is in a transaction and must notice."""
        with pytest.raises(errors.DatabaseError) as caught:
            async with db.transaction():
                await db.execute("INSERT INTO note (id, text) VALUES (0, 'lost')")
                held.set()
                await killed.wait()
                await db.execute("INSERT INTO note (id, text) VALUES (-1, 'lost')")
        failures.append(caught.value)

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            for _ in range(WORKERS):
                group.start_soon(work)
            await eventually(lambda: len(answered) > 200, "the load is on", within=20)
            group.start_soon(in_the_middle)
            await held.wait()
            await anyio.to_thread.run_sync(cluster.primary.kill)
            killed.set()
            await anyio.to_thread.run_sync(cluster.replica.promote)
            promoted = True
            await enough.wait()

    assert {type(failure) for failure in failures} <= {
        errors.QueryExecutionError,
        errors.ConnectionFailedError,
        errors.TransactionError,
        errors.ConnectionPoolExhaustedError,
    }
    for failure in failures:
        if "connection to the server was lost" in str(failure):
            assert isinstance(failure, errors.QueryExecutionError)
            told = "may have taken effect or not" in str(failure)
            assert told is (failure.outcome == "unknown")
            assert told or failure.outcome == "undone"
    with psycopg.connect(cluster.replica.conninfo()) as connection:
        kept = {number for (number,) in connection.execute("SELECT id FROM note")}
    assert answered <= kept, f"lost: {sorted(answered - kept)}"
    assert not kept & {0, -1}, "a transaction that its caller saw fail"


async def test_one_name_for_whichever_is_the_primary(cluster: Cluster) -> None:
    """Behind one address that moves with the primary: with `retries` nothing but a lost COMMIT is noticed, nothing that was
    answered is missing, and nothing is done twice.
    """
    proxy = Proxy(cluster.primary)
    try:
        configure({"database": {"postgresql": {**cluster.settings, "host": "127.0.0.1", "port": proxy.port}}})
        db = get_db()
        await db.execute("ALTER TABLE note ADD COLUMN unit INT")
        answered: set[int] = set()
        unknown: set[int] = set()
        numbers = itertools.count(1)
        after = 0
        enough = anyio.Event()

        @transactional(retries=20)
        async def two(unit: int) -> None:
            insert = "INSERT INTO note (id, unit) VALUES (:id, :unit)"
            await db.execute(insert, {"id": 2 * unit, "unit": unit})
            await db.execute(insert, {"id": 2 * unit + 1, "unit": unit})

        async def work() -> None:
            nonlocal after
            while not enough.is_set():
                unit = next(numbers)
                try:
                    await two(unit)
                except errors.QueryExecutionError as error:
                    assert error.outcome == "unknown", error  # noqa: PT017  - all others are the test's failure
                    unknown.add(unit)
                else:
                    answered.add(unit)
                    after += moved
                    if after >= 100:
                        enough.set()

        moved = False
        with anyio.fail_after(HANGING):
            async with anyio.create_task_group() as group:
                for _ in range(WORKERS):
                    group.start_soon(work)
                await eventually(lambda: len(answered) > 100, "the load is on")
                await anyio.to_thread.run_sync(cluster.primary.kill)
                await anyio.to_thread.run_sync(cluster.replica.promote)
                proxy.lead_to(cluster.replica)
                moved = True
        with psycopg.connect(cluster.replica.conninfo()) as connection:
            kept = dict(connection.execute("SELECT unit, count(*) FROM note GROUP BY unit").fetchall())
        assert set(kept.values()) == {2}
        assert answered <= set(kept) <= answered | unknown
        assert len(unknown) <= WORKERS
    finally:
        await close_all()
        proxy.close()


async def test_a_primary_that_has_become_a_standby(cluster: Cluster) -> None:
    """A server that takes no writes any more is left, and the transaction run again where the name leads now."""
    proxy = Proxy(cluster.replica)
    try:
        configure({"database": {"postgresql": {**cluster.settings, "host": "127.0.0.1", "port": proxy.port}}})
        db = get_db()
        runs = 0

        @transactional(retries=1)
        async def write() -> None:
            nonlocal runs
            runs += 1
            assert await db.fetch_value("SELECT pg_is_in_recovery()") is (runs == 1)
            proxy.lead_to(cluster.primary)
            await db.execute("INSERT INTO note (id) VALUES (1)")

        await write()
        assert runs == 2
        assert await db.fetch_value("SELECT count(*) FROM note") == 1
    finally:
        await close_all()
        proxy.close()


async def test_a_restarted_server_is_not_noticed(cluster: Cluster) -> None:
    """Connections that die while nobody uses them are made again before the next statement: no caller sees an error."""
    settings = {**cluster.settings, "host": "127.0.0.1", "port": cluster.primary.port}
    configure({"database": {"postgresql": settings}})
    db = get_db()
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(db.run, lambda connection: connection.execute("SELECT pg_sleep(0.05)"))

    def restart() -> None:
        cluster.primary.stop()
        cluster.primary.start()

    restart()
    with anyio.fail_after(HANGING):
        for _ in range(8):
            assert await db.fetch_value("SELECT 1") == 1
            async with db.transaction():
                assert await db.fetch_value("SELECT 2") == 2
