"""Connections that are lost at any moment: what is told of the outcome is true, and `retries` runs again what left nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from database import errors, transactional, transactional_readonly
from tests.contract.support import HANGING, usable
from tests.postgresql.engine import PostgresqlEngine
from tests.postgresql.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


def is_commit(kind: bytes, body: bytes) -> bool:
    """Whether a message of the client's carries COMMIT."""
    return (kind == b"Q" and body.endswith(b"COMMIT\0")) or (kind == b"P" and body.startswith(b"\0COMMIT\0"))


class Fault:
    """Lets the connection of the first COMMIT break at a certain moment; from then on everything passes."""

    def __init__(self, proxy: Proxy, moment: str) -> None:
        self.proxy = proxy
        self.moment = moment
        self.struck = False
        self.told = threading.Event()
        proxy.from_client = self.from_client
        proxy.from_server = self.from_server
        proxy.passed = self.passed

    def from_client(self, kind: bytes, body: bytes) -> bool:
        if b"pg_current_xact_id" in body:
            self.told.clear()
        if self.struck or not is_commit(kind, body):
            return True
        if self.moment == "never sent":
            self.struck = True
            return False
        if self.moment == "held back":  # behind what was to be told before it
            assert self.told.wait(HANGING)
            self.struck = True
            return False
        return True

    def from_server(self, kind: bytes, body: bytes) -> bool:
        if not self.struck and self.moment == "answer lost" and kind == b"C" and body == b"COMMIT\0":
            self.struck = True
            return False
        return True

    def passed(self, kind: bytes, body: bytes) -> None:
        if kind == b"C" and body == b"SELECT 1\0":
            self.told.set()


def ways(db: Any) -> dict[str, Callable[[int, str], Any]]:
    """How a unit of work is written; each stores one job, and may be run again so often."""

    async def store(name: str) -> None:
        await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": name})

    async def decorated(retries: int, name: str) -> None:
        await transactional(retries=retries)(store)(name)

    async def offloaded(retries: int, name: str) -> None:
        await transactional(retries=retries, offload=True)(store)(name)

    return {"decorated": decorated, "offloaded": offloaded}


@pytest.mark.parametrize(
    ("moment", "asks"),
    [
        ("never sent", False),
        ("answer lost", False),
        ("never sent", True),
        ("answer lost", True),
        ("held back", True),
    ],
)
async def test_the_answer_to_commit_is_lost(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, moment: str, asks: bool
) -> None:
    """Unless the server is asked, the outcome is told as unknown and nothing is run again; if it is, the outcome is certain:
    committed is a success, and what was rolled back is run again where `retries` are left.
    """
    db = await make_db(pool_size=1, resolve_commits=asks, conninfo=proxy.conninfo())
    for way, store in ways(db).items():
        for retries in (0, 2):
            name = f"{way} {retries}"
            fault = Fault(proxy, moment)
            try:
                with anyio.fail_after(HANGING):
                    await store(retries, name)
                outcome = "committed"
            except errors.QueryExecutionError as error:
                outcome = error.outcome or ""
            assert fault.struck, name
            kept = name in engine.committed()
            assert kept is (moment == "answer lost" or (outcome == "committed")), (name, outcome)
            if moment == "never sent":  # and with it the question who we are, or its answer
                assert outcome == "unknown" or asks, name
            elif not asks:
                assert outcome == "unknown", name
            elif moment == "answer lost" or retries:
                assert outcome == "committed", name
            else:
                assert outcome == "undone", name
    await usable(db)


async def test_another_server_is_not_asked(
    make_db: Any, engine: PostgresqlEngine, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart, a crash or a failover the transaction's number may be another's: then the outcome stays unknown."""
    from database.postgresql import levels

    db = await make_db(pool_size=1, resolve_commits=True, conninfo=proxy.conninfo())
    fault = Fault(proxy, "answer lost")
    pass_on = fault.from_server

    def from_server(kind: bytes, body: bytes) -> bool:
        passed = pass_on(kind, body)
        if not passed:  # from now on the server seems to be another one
            monkeypatch.setattr(levels, "_INSTANCE", b"'another'")
        return passed

    proxy.from_server = from_server
    with pytest.raises(errors.QueryExecutionError) as caught:
        async with db.transaction():
            await db.execute("INSERT INTO jobs (name) VALUES ('a')")
    assert caught.value.outcome == "unknown"
    assert engine.committed() == ["a"]


async def test_lost_in_mid_transaction(make_db: Any, engine: PostgresqlEngine) -> None:
    """Ended by the server between or under statements: told that nothing is kept, and run again where `retries` are left."""
    db = await make_db(pool_size=2)
    runs = 0

    async def kill(pid: int) -> None:
        while not engine.outside(f"SELECT FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"):
            await anyio.sleep(0.005)
        engine.outside(f"SELECT pg_terminate_backend({pid})")

    async def work(moment: str) -> None:
        nonlocal runs
        runs += 1
        await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": moment})
        if runs == 1:
            pid = await db.fetch_value("SELECT pg_backend_pid()")
            if moment == "under a statement":
                async with anyio.create_task_group() as group:
                    group.start_soon(kill, pid)
                    try:
                        await db.fetch_value("SELECT pg_sleep(60)")
                    except errors.DatabaseError as error:
                        lost = error
                raise lost
            engine.outside(f"SELECT pg_terminate_backend({pid}, 30000)")
            if moment == "in a function":
                await db.run(lambda connection: connection.execute("SELECT 1"))
            elif moment == "many rows":
                await db.execute_many("INSERT INTO item (value) VALUES (?)", [("x",)] * 300)
            elif moment == "a stream":
                async with db.stream("SELECT 1") as rows:
                    async for _ in rows:
                        pass
        await db.execute("INSERT INTO item (value) VALUES ('end')")

    for moment in ("between statements", "under a statement", "in a function", "many rows", "a stream"):
        for retries in (0, 1):
            runs = 0
            with anyio.fail_after(HANGING):
                if retries:
                    await transactional(retries=retries)(work)(moment)
                    assert (moment, runs) == (moment, 2)
                    assert engine.committed() == [moment]
                else:
                    with pytest.raises(errors.QueryExecutionError) as caught:
                        await transactional(work)(moment)
                    assert caught.value.outcome == "undone", moment
                    assert "nothing of the transaction is kept" in str(caught.value)
                    assert engine.committed() == []
        engine.empty()

    @transactional_readonly(retries=1)
    async def read() -> int:
        nonlocal runs
        runs += 1
        pid = await db.fetch_value("SELECT pg_backend_pid()")
        if runs == 1:
            engine.outside(f"SELECT pg_terminate_backend({pid}, 30000)")
        return await db.fetch_value("SELECT 7")

    runs = 0
    assert (await read(), runs) == (7, 2)
    await usable(db)


async def test_lost_under_the_commit_itself(make_db: Any, engine: PostgresqlEngine) -> None:
    """Ended by the server while it was committing (a deferred trigger): certain where it is asked, and run again then."""
    db = await make_db(pool_size=1, resolve_commits=True)
    await db.execute_script(
        "CREATE SEQUENCE times;"
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('times') = 1 THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION dawdle()"
    )

    async def kill() -> None:
        asleep = "pid <> pg_backend_pid() AND wait_event = 'PgSleep' AND query LIKE '%COMMIT%'"
        while not engine.outside(f"SELECT FROM pg_stat_activity WHERE {asleep}"):
            await anyio.sleep(0.005)
        engine.outside(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {asleep}")

    for retries in (0, 1):
        engine.outside("SELECT setval('times', 1, false)")
        with anyio.fail_after(HANGING):
            async with anyio.create_task_group() as group:
                group.start_soon(kill)
                store = ways(db)["decorated"](retries, "a")
                if retries:
                    await store
                else:
                    with pytest.raises(errors.QueryExecutionError) as caught:
                        await store
                    assert caught.value.outcome == "undone"
        assert engine.committed() == ["a"] * retries
    await usable(db)


async def test_unknown_work_is_never_run_again(make_db: Any, engine: PostgresqlEngine, proxy: Proxy) -> None:
    """A statement, or a transaction of its own within the function, whose outcome is unknown: the function is not run again."""
    db = await make_db(pool_size=2, conninfo=proxy.conninfo())
    runs = 0

    @transactional(retries=3, propagation="supports")
    async def work(inner: Callable[[], Any]) -> None:
        nonlocal runs
        runs += 1
        with pytest.raises(errors.QueryExecutionError) as caught:
            await inner()
        assert caught.value.outcome == "unknown"
        raise errors.DatabaseBusyError("somebody's lock")

    async def alone() -> None:
        proxy.from_server = lambda kind, body: not (kind == b"C" and body.startswith(b"INSERT"))
        try:
            await db.execute("INSERT INTO jobs (name) VALUES ('alone')")
        finally:
            proxy.from_server = lambda kind, body: True

    async def own() -> None:
        Fault(proxy, "answer lost")
        async with db.transaction(propagation="requires_new"):
            await db.execute("INSERT INTO jobs (name) VALUES ('own')")

    async def many() -> None:
        Fault(proxy, "answer lost")
        await db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("many",)])

    for inner in (alone, own, many):
        runs = 0
        with pytest.raises(errors.DatabaseBusyError):
            await work(inner)
        assert (inner.__name__, runs) == (inner.__name__, 1)
    assert engine.committed() == ["alone", "many", "own"]
    await usable(db)


async def test_a_read_that_was_lost_is_told_apart(make_db: Any, proxy: Proxy) -> None:
    """A single SELECT that only reads has left nothing; one that calls a function of the user's may have."""
    db = await make_db(pool_size=1, conninfo=proxy.conninfo())
    await db.execute("CREATE FUNCTION act() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    for sql, outcome in (("SELECT count(*) FROM jobs", "undone"), ("SELECT act()", "unknown")):
        await db.fetch_all(sql)
        proxy.from_server = lambda kind, body: kind != b"D"
        with pytest.raises(errors.QueryExecutionError) as caught:
            await db.fetch_all(sql)
        proxy.from_server = lambda kind, body: True
        assert caught.value.outcome == outcome, sql
    await usable(db)
