"""Section 4 of the contract, sentence by sentence: commit and rollback, nesting, manual mode, several
databases.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import get_db, transactional, transactional_readonly
from tests.contract.support import (
    HANGING,
    SLOW_SELECT,
    Engine,
    add,
    collected,
    errors,
    eventually,
    gather,
    held,
    in_turn,
    is_idle,
    names,
    usable,
    waiting,
)

pytestmark = pytest.mark.anyio


class Undo(Exception):
    """Raised by a test to make a transaction roll back."""


# --- commit when the function returns, rollback on any exception --------------------------------------------


@in_turn(
    "decorate",
    [transactional, transactional(), transactional(db="default"), transactional(timeout=5, retries=1)],
    ids=["bare", "called", "named", "options"],
)
async def test_commit_on_return(db: Any, engine: Engine, decorate: Any) -> None:
    """What a decorated function wrote is invisible outside until it returns, and committed when it has."""

    @decorate
    async def create(name: str, *, again: str) -> str:
        await add(get_db(), name)
        await add(get_db(), again)
        assert engine.committed() == []
        return name + again

    assert await create("a", again="b") == "ab"
    assert engine.committed() == ["a", "b"]
    assert not db.in_transaction


class Abort(BaseException):
    """Not an `Exception`."""


@in_turn("kind", [ValueError, KeyError, Abort])
async def test_rollback_on_any_exception(db: Any, engine: Engine, kind: type[BaseException]) -> None:
    """Any exception undoes all, and the very same exception goes on."""
    raised = kind("mine")

    @transactional
    async def create() -> None:
        await add(db, "a")
        raise raised

    with pytest.raises(kind) as caught:
        await create()
    assert caught.value is raised
    assert engine.committed() == []
    await usable(db)


async def test_rollback_on_cancellation(db: Any, engine: Engine) -> None:
    """Cancellation undoes all, and goes on to the scope it belongs to."""

    @transactional
    async def create() -> None:
        await add(db, "a")
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await create()
    assert scope.cancelled_caught
    assert engine.committed() == []
    await usable(db)


async def test_context_manager(db: Any, engine: Engine) -> None:
    """`async with db.transaction()` does what the decorator does."""
    async with db.transaction():
        await add(db, "a")
        assert engine.committed() == []
    assert engine.committed() == ["a"]
    with pytest.raises(Undo):
        async with db.transaction():
            await add(db, "b")
            raise Undo
    assert engine.committed() == ["a"]


async def test_methods_and_recursion(db: Any, engine: Engine) -> None:
    """Methods, static methods and functions that call themselves can be decorated."""

    class Service:
        prefix = "m"

        @transactional
        async def create(self, depth: int) -> int:
            await add(db, f"{self.prefix}{depth}")
            return depth if depth == 0 else await self.create(depth - 1)

        @staticmethod
        @transactional
        async def static(name: str) -> None:
            await add(db, name)

    assert await Service().create(2) == 0
    await Service.static("s")
    assert engine.committed() == ["m0", "m1", "m2", "s"]


async def test_failed_statement_that_was_caught(db: Any, engine: Engine) -> None:
    """A constraint error undoes its own statement only; the transaction goes on and commits the rest."""
    async with db.transaction():
        await add(db, "a")
        with pytest.raises(errors.IntegrityError):
            await add(db, "a")
        await add(db, "b")
    assert engine.committed() == ["a", "b"]


@pytest.mark.parametrize(
    "sql",
    ["INSERT OR ROLLBACK INTO jobs (name) VALUES ('a')", "INSERT INTO item (value) VALUES ('rollback')"],
    ids=["or-rollback", "raise-rollback"],
)
async def test_statement_that_rolls_back_the_transaction(db: Any, engine: Engine, sql: str) -> None:
    """When the database itself has undone the whole transaction, nothing of it goes on as if it were still
    there.
    """
    await db.execute_script(engine.refusing_trigger)
    with pytest.raises(errors.DatabaseError):
        async with db.transaction():
            await add(db, "a")
            with pytest.raises(errors.QueryExecutionError):
                await db.execute(sql)
            with pytest.raises(errors.TransactionError):
                await add(db, "b")
            assert engine.committed() == []
    assert engine.committed() == []
    await usable(db)


async def test_commit_that_fails(db: Any, engine: Engine) -> None:
    """A constraint that is checked at commit fails there: the error says which, all is undone, the pool is
    whole.
    """

    @transactional
    async def orphan() -> None:
        await add(db, "a")
        await db.execute("INSERT INTO child (parent_id) VALUES (99)")

    with pytest.raises(errors.IntegrityError):
        await orphan()
    assert engine.committed() == []
    await usable(db)


async def test_manual_commit_that_fails(db: Any, engine: Engine) -> None:
    """After a manual commit that failed, nothing is committed and the task is in no transaction that could go
    on.
    """
    await db.begin()
    await add(db, "a")
    await db.execute("INSERT INTO child (parent_id) VALUES (99)")
    with pytest.raises(errors.IntegrityError):
        await db.commit()
    await db.rollback()
    assert engine.committed() == []
    await usable(db)


SMUGGLED = [
    "COMMIT",
    "commit;",
    "/* */ END",
    "END TRANSACTION",
    "-- x\nCOMMIT",
    "ROLLBACK",
    "BEGIN",
    "SAVEPOINT x",
]


@in_turn("sql", SMUGGLED)
async def test_transaction_control_as_sql_text(db: Any, engine: Engine, sql: str) -> None:
    """COMMIT and its like, sent as text in a transaction, are refused; it stays what it was."""
    for method, *rows in (("execute",), ("fetch_all",), ("execute_script",), ("execute_many", [()])):
        with pytest.raises(Undo):
            async with db.transaction():
                await add(db, "a")
                with pytest.raises(errors.DatabaseError):
                    await getattr(db, method)(sql, *rows)
                assert engine.committed() == []
                try:
                    await add(db, "b")
                except errors.TransactionError:
                    pass  # to give the transaction up is one way to refuse
                raise Undo
        assert engine.committed() == []
    await usable(db)


@in_turn("sql", ["BEGIN", "BEGIN IMMEDIATE", "SAVEPOINT x", "BEGIN; SELECT 1"])
async def test_begin_as_sql_text_outside(db: Any, engine: Engine, sql: str) -> None:
    """BEGIN sent as text outside a transaction leaves none open for others to fall into."""
    for call in (db.execute, db.execute_script):
        with pytest.raises(errors.DatabaseError):
            await call(sql)
    await add(db, "a")
    assert engine.committed() == ["a"]
    await usable(db)


# --- BEGIN IMMEDIATE at the first statement; one writer at a time, first come first served ------------------


async def test_nothing_begins_before_the_first_statement(db: Any) -> None:
    """A write transaction without a statement neither waits for the writer nor holds it."""

    @transactional
    async def nothing() -> str:
        return "done"

    async with held(db):
        with anyio.fail_after(HANGING):
            assert await nothing() == "done"

    entered, leave = anyio.Event(), anyio.Event()

    async def idle_transaction() -> None:
        async with db.transaction():
            entered.set()
            await leave.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(idle_transaction)
        await entered.wait()
        with anyio.fail_after(HANGING):
            await add(db, "a")
        leave.set()


async def test_a_read_first_takes_the_write_lock_too(db: Any) -> None:
    """Read-modify-write transactions that run at once lose no update and never see a locked database."""
    await db.execute("INSERT INTO item (id, value) VALUES (1, 0)")

    @transactional
    async def increment() -> None:
        value = int(await db.fetch_value("SELECT value FROM item WHERE id = 1"))
        await anyio.lowlevel.checkpoint()
        await db.execute("UPDATE item SET value = :value WHERE id = 1", {"value": value + 1})

    results = await gather(*[increment] * 25)
    assert results == [None] * 25
    assert int(await db.fetch_value("SELECT value FROM item")) == 25


async def test_writers_are_served_in_their_order(db: Any) -> None:
    """First come, first served: transactions get the writer in the order in which they asked."""
    order: list[int] = []

    async def write(number: int) -> None:
        async with db.transaction():
            await db.execute("INSERT INTO item (value) VALUES (?)", (number,))
            order.append(number)

    async with anyio.create_task_group() as group, held(db):
        for number in range(8):
            group.start_soon(write, number)
            await waiting(db, number + 1)
    assert order == list(range(8))


async def test_an_autocommit_write_waits_for_the_open_transaction(db: Any, engine: Engine) -> None:
    """A single write stands in line behind the open write transaction; reads neither wait nor see its
    work.
    """
    done = anyio.Event()

    async def write() -> None:
        await add(db, "single")
        done.set()

    async with anyio.create_task_group() as group, held(db) as release:
        group.start_soon(write)
        await eventually(lambda: db.stats().waiting + db.stats().queued > 0, "the write waits")
        with anyio.fail_after(HANGING):
            assert await names(db) == []
        assert not done.is_set()
        release.set()
    assert engine.committed() == ["single"]


async def test_interleaved_transactions_do_not_mix(db: Any, engine: Engine) -> None:
    """Of two tasks with a transaction each, one rolling back takes nothing of the other's with it."""

    async def one(name: str, fail: bool) -> None:
        async with db.transaction():
            await add(db, name + "1")
            await anyio.lowlevel.checkpoint()
            await add(db, name + "2")
            if fail:
                raise Undo

    results = await gather(*[lambda n=n: one(str(n), n % 2 == 1) for n in range(10)])
    assert [type(result) for result in results] == [type(None), Undo] * 5
    assert engine.committed() == sorted(f"{n}{part}" for n in range(0, 10, 2) for part in "12")


# --- read-only ----------------------------------------------------------------------------------------------


async def test_readonly_sees_one_snapshot(db: Any) -> None:
    """From its first statement to its end a read-only transaction sees one state, whatever others commit."""
    await add(db, "before")

    @transactional_readonly
    async def look() -> None:
        with db.detached():
            await add(db, "before-the-first-statement")
        assert len(await names(db)) == 2
        with db.detached():
            await add(db, "after")
            assert len(await names(db)) == 3
        assert len(await names(db)) == 2
        assert await db.fetch_value("SELECT count(*) FROM jobs") == 2
        async with db.stream("SELECT name FROM jobs") as rows:
            assert len([row async for row in rows]) == 2

    await look()
    assert len(await names(db)) == 3


async def test_readonly_neither_waits_for_the_writer_nor_holds_it_up(db: Any) -> None:
    """Read-only transactions run beside an open write transaction and beside each other."""
    async with held(db), held(db, readonly=True):
        with anyio.fail_after(HANGING):
            async with db.transaction(readonly=True):
                assert await names(db) == []
    async with held(db, readonly=True, count=2):
        with anyio.fail_after(HANGING):
            await add(db, "a")


INSERT = "INSERT INTO jobs (name) VALUES ('x')"

HOSTILE: list[tuple[str, ...]] = [
    (INSERT,),
    ("UPDATE jobs SET name = 'x'",),
    ("DELETE FROM jobs",),
    ("REPLACE INTO jobs (id, name) VALUES (1, 'x')",),
    ("WITH n AS (SELECT 'x' AS name) INSERT INTO jobs (name) SELECT name FROM n",),
    ("CREATE TABLE t (a)",),
    ("CREATE TEMP TABLE t (a)",),
    ("CREATE TEMP VIEW jobs AS SELECT 'x' AS name",),
    ("CREATE TEMP TRIGGER t AFTER INSERT ON jobs BEGIN DELETE FROM jobs; END",),
    ("CREATE INDEX i ON jobs (enabled)",),
    ("ALTER TABLE jobs RENAME TO gone",),
    ("DROP TABLE jobs",),
    ("ANALYZE",),
    ("PRAGMA user_version = 5",),
    ("PRAGMA application_id = 5",),
    ("PRAGMA query_only = OFF", INSERT),
    ("pragma Query_Only(0)", INSERT),
    ("PRAGMA main.query_only = 0", INSERT),
    ("PRAGMA query_only = OFF; PRAGMA query_only", INSERT),
    ("PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = 'x'"),
    ("PRAGMA query_only = OFF", "PRAGMA writable_schema = ON", "DELETE FROM sqlite_master"),
    ("ATTACH '{directory}/attached.db' AS other", "CREATE TABLE other.t (a)"),
    ("ATTACH ':memory:' AS other", "CREATE TABLE other.t (a)"),
    ("ATTACH 'file:{path}?mode=rw' AS other", "INSERT INTO other.jobs (name) VALUES ('x')"),
    ("PRAGMA query_only = OFF", "ATTACH '{path}' AS other", "INSERT INTO other.jobs (name) VALUES ('x')"),
    ("VACUUM INTO '{directory}/attached.db'",),
    ("COMMIT", INSERT),
    ("ROLLBACK", "BEGIN IMMEDIATE", INSERT),
    ("COMMIT; BEGIN; " + INSERT,),
    ("SAVEPOINT s", "PRAGMA query_only = OFF", INSERT),
]


@pytest.fixture
async def narrow(make_db: Any) -> Any:
    """One reader: what an attack leaves on its connection meets the next."""
    return await make_db(pool_size=1)


@in_turn("nested", [False, True], ids=["outermost", "within-read-write"], using="narrow")
@in_turn("statements", HOSTILE, using="narrow")
async def test_readonly_refuses_every_write(
    narrow: Any, engine: Engine, statements: tuple[str, ...], nested: bool
) -> None:
    """Whatever SQL tries it, nothing is written in a read-only transaction, and the refusal says why.

    Nor does the attempt leave anything on the connection for the next who gets it.
    """
    db = narrow
    await add(db, "a")

    @transactional_readonly
    async def attack(method: str) -> None:
        refused: list[errors.DatabaseError] = []
        assert await names(db) == (["a", "outer"] if nested else ["a"])
        for sql in statements:
            sql = sql.format(directory=engine.directory, path=engine.path())
            try:
                await getattr(db, method)(sql)
            except errors.DatabaseError as error:
                refused.append(error)
        assert refused, "nothing was refused"
        # Transaction control sent as text is refused for what it is, before anything behind it is looked at.
        control = any(word in sql for sql in statements for word in ("COMMIT", "ROLLBACK", "SAVEPOINT"))
        kind = errors.TransactionError if control else errors.ReadOnlyTransactionError
        assert any(isinstance(error, kind) for error in refused), refused

    schema = "SELECT * FROM sqlite_master ORDER BY name"
    before = engine.outside(schema)
    for method in ("execute", "execute_script"):
        if nested:
            try:
                async with db.transaction():
                    await add(db, "outer")
                    await attack(method)
            except errors.TransactionError:
                pass
            assert engine.committed() in (["a", "outer"], ["a"])
            await db.execute("DELETE FROM jobs WHERE name = 'outer'")
        else:
            await attack(method)
    assert engine.committed() == ["a"]
    assert engine.outside(schema) == before
    assert engine.outside("PRAGMA user_version") == engine.outside("PRAGMA application_id") == [(0,)]
    assert not (engine.directory / "attached.db").exists()
    async with db.transaction(readonly=True):
        assert await names(db) == ["a"]
        for pragma in ("database_list", "main.table_list", "temp.table_list"):
            assert not [row for row in await db.fetch_all(f"PRAGMA {pragma}") if row["name"] in ("other", "t")]
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "y")
    await usable(db)


@in_turn("nested", [False, True], ids=["outermost", "within-read-write"])
@in_turn("kind", ["execute_many", "returning", "stream", "run", "query", "batch", "own-style"])
async def test_readonly_refuses_on_every_path(db: Any, engine: Engine, queries: Any, kind: str, nested: bool) -> None:
    """Every method that could write is refused in a read-only transaction."""

    async def stream() -> None:
        async with db.stream(INSERT + " RETURNING id") as rows:
            [row async for row in rows]

    async def batch() -> None:
        async with db.batch() as batch:
            await batch.execute(INSERT)

    calls: dict[str, Callable[[], Any]] = {
        "execute_many": lambda: db.execute_many("INSERT INTO jobs (name) VALUES (?)", [("x",), ("y",)]),
        "returning": lambda: db.fetch_all(INSERT + " RETURNING id"),
        "stream": stream,
        "run": lambda: db.run(lambda connection: connection.execute(INSERT)),
        "query": lambda: db.execute(queries.insert_job, {"name": "x", "cron_expr": "", "handler": ""}),
        "batch": batch,
        "own-style": lambda: queries.insert_job(db, name="x", cron_expr="", handler=""),
    }

    @transactional_readonly
    async def attack() -> None:
        with pytest.raises(errors.ReadOnlyTransactionError):
            await calls[kind]()

    if nested:
        async with db.transaction():
            await attack()
            await add(db, "outer")
        assert engine.committed() == ["outer"]
    else:
        await attack()
        assert engine.committed() == []
    await usable(db)


@in_turn(
    "statements",
    [
        ("PRAGMA query_only = OFF", INSERT),
        ("COMMIT", INSERT),
        ("ROLLBACK", "BEGIN IMMEDIATE", INSERT, "COMMIT"),
    ],
    ids=lambda statements: "; ".join(statements),
)
async def test_readonly_refuses_on_the_raw_connection(db: Any, engine: Engine, statements: tuple[str, ...]) -> None:
    """With the driver's own connection in hand, and its authorizer gone, a read-only transaction still cannot
    write.
    """
    await add(db, "a")

    def attack(connection: sqlite3.Connection) -> None:
        connection.set_authorizer(None)
        for sql in statements:
            connection.execute(sql)

    try:
        async with db.transaction(readonly=True):
            assert await names(db) == ["a"]
            with pytest.raises(errors.ReadOnlyTransactionError):
                await db.run(attack)
    except errors.TransactionError:
        pass  # the attack has ended the snapshot itself, and the transaction may say so
    assert engine.committed() == ["a"]
    async with held(db, readonly=True), db.transaction(readonly=True):
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.execute(INSERT)
    await usable(db)


async def test_readonly_within_read_write_joins(db: Any, engine: Engine) -> None:
    """Within a write transaction a read-only function sees its uncommitted work, cannot write, and harms
    nothing.
    """

    @transactional_readonly
    async def look(write: bool) -> list[str]:
        if write:
            await add(db, "x")
        return await names(db)

    async with db.transaction():
        await add(db, "a")
        assert await look(False) == ["a"]
        with pytest.raises(errors.ReadOnlyTransactionError):
            await look(True)
        await add(db, "b")
        assert await look(False) == ["a", "b"]
    assert engine.committed() == ["a", "b"]


async def test_read_write_within_readonly(db: Any, engine: Engine) -> None:
    """A read-write function called within a read-only one raises, however it is opened."""

    @transactional
    async def write() -> None:
        await add(db, "x")

    @transactional_readonly
    async def look() -> None:
        await names(db)
        with pytest.raises(errors.TransactionError):
            await write()
        with pytest.raises(errors.TransactionError):
            async with db.transaction():
                await add(db, "y")
        with pytest.raises(errors.TransactionError):
            await db.begin()
            await add(db, "z")

    await look()
    assert engine.committed() == []
    await usable(db)


async def test_read_write_within_readonly_within_read_write(db: Any, engine: Engine) -> None:
    """A read-only level forbids writing to all that is nested in it, even where the outermost may write."""
    async with db.transaction():
        await add(db, "a")
        async with db.transaction(readonly=True):
            with pytest.raises(errors.TransactionError):
                async with db.transaction():
                    await add(db, "x")
        await add(db, "b")
    assert engine.committed() == ["a", "b"]


async def test_readonly_within_readonly(db: Any) -> None:
    """A read-only function within a read-only one sees the same snapshot."""
    async with db.transaction(readonly=True):
        assert await names(db) == []
        with db.detached():
            await add(db, "a")
        async with db.transaction(readonly=True):
            assert await names(db) == []


# --- propagation --------------------------------------------------------------------------------------------


async def test_nested_is_a_savepoint(db: Any, engine: Engine) -> None:
    """The default: a nested failure undoes only its own level; a nested success is the outer one's to
    commit.
    """

    @transactional
    async def inner(name: str, fail: bool) -> None:
        await add(db, name)
        if fail:
            raise Undo

    @transactional
    async def outer() -> None:
        await add(db, "outer")
        await inner("kept", False)
        with pytest.raises(Undo):
            await inner("undone", True)
        assert engine.committed() == []
        assert await names(db) == ["kept", "outer"]

    await outer()
    assert engine.committed() == ["kept", "outer"]


async def test_nested_success_in_an_outer_failure(db: Any, engine: Engine) -> None:
    """What an inner level released goes with the outer one's rollback."""
    with pytest.raises(Undo):
        async with db.transaction():
            async with db.transaction():
                await add(db, "inner")
            raise Undo
    assert engine.committed() == []


async def test_deep_nesting(db: Any, engine: Engine) -> None:
    """Levels can be nested deeply; each failure undoes exactly what was done below it."""

    async def level(depth: int) -> None:
        async with db.transaction():
            await add(db, f"{depth:02}")
            if depth < 20:
                try:
                    await level(depth + 1)
                except Undo:
                    await add(db, f"{depth:02}-caught")
            if depth in (5, 12):
                raise Undo

    await level(0)
    assert engine.committed() == [*(f"{depth:02}" for depth in range(5)), "04-caught"]


async def test_nested_with_nothing_open(db: Any, engine: Engine) -> None:
    """`nested` with no transaction open is a new one."""
    async with db.transaction(propagation="nested"):
        await add(db, "a")
    assert engine.committed() == ["a"]


async def test_required(db: Any, engine: Engine) -> None:
    """`required` joins what is open, and is a new transaction where nothing is."""

    @transactional(propagation="required")
    async def inner(name: str) -> None:
        await add(db, name)

    await inner("alone")
    assert engine.committed() == ["alone"]
    async with db.transaction():
        await inner("joined")
        assert engine.committed() == ["alone"]
    assert engine.committed() == ["alone", "joined"]


@in_turn("propagation", ["required", "mandatory", "supports"])
async def test_failure_in_what_joined_dooms_the_whole(db: Any, engine: Engine, propagation: str) -> None:
    """Once a joined function has failed, the outer transaction cannot go on and cannot commit, though it
    caught.
    """

    @transactional(propagation=propagation)
    async def inner() -> None:
        await add(db, "inner")
        raise Undo

    with pytest.raises(errors.TransactionError) as caught:
        async with db.transaction():
            await add(db, "outer")
            with pytest.raises(Undo):
                await inner()
    assert not isinstance(caught.value, errors.ReadOnlyTransactionError)
    assert engine.committed() == []

    with pytest.raises(errors.TransactionError):
        async with db.transaction():
            with pytest.raises(Undo):
                await inner()
            with pytest.raises(errors.TransactionError):
                await add(db, "after")
    assert engine.committed() == []
    await usable(db)


async def test_doomed_transaction_keeps_the_first_exception(db: Any, engine: Engine) -> None:
    """Where the joined function's exception goes on through the outer one, it is that which the caller
    gets.
    """

    @transactional(propagation="required")
    async def inner() -> None:
        await add(db, "inner")
        raise Undo

    with pytest.raises(Undo):
        async with db.transaction():
            await inner()
    assert engine.committed() == []


async def test_mandatory(db: Any, engine: Engine) -> None:
    """`mandatory` joins, and raises where there is nothing to join."""

    @transactional(propagation="mandatory")
    async def inner() -> None:
        await add(db, "a")

    with pytest.raises(errors.TransactionError):
        await inner()
    async with db.transaction():
        await inner()
        assert engine.committed() == []
    assert engine.committed() == ["a"]


async def test_supports(db: Any, engine: Engine) -> None:
    """`supports` joins what is open; with nothing open each statement is its own transaction."""

    @transactional(propagation="supports")
    async def inner(name: str) -> None:
        await add(db, name)
        raise Undo

    with pytest.raises(Undo):
        await inner("kept")
    assert engine.committed() == ["kept"]
    with pytest.raises(Undo):
        async with db.transaction():
            await inner("undone")
    assert engine.committed() == ["kept"]


async def test_not_supported(db: Any, engine: Engine) -> None:
    """`not_supported` steps outside what is open: it sees only what is committed, and afterwards all goes
    on.
    """

    @transactional(propagation="not_supported")
    async def inner() -> list[str]:
        assert not db.in_transaction
        return await names(db)

    assert await inner() == []
    async with db.transaction():
        await add(db, "a")
        assert await inner() == []
        assert db.in_transaction
        await add(db, "b")
    assert await inner() == engine.committed() == ["a", "b"]


async def test_never(db: Any, engine: Engine) -> None:
    """`never` raises within a transaction; without one each statement is its own."""

    @transactional(propagation="never")
    async def inner() -> None:
        await add(db, "a")
        assert engine.committed() == ["a"]

    async with db.transaction():
        with pytest.raises(errors.TransactionError):
            await inner()
    await inner()


async def test_requires_new_takes_another_connection(db: Any, engine: Engine) -> None:
    """A read-only `requires_new` within a write transaction sees only what is committed."""

    @transactional_readonly(propagation="requires_new")
    async def look() -> list[str]:
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "x")
        return await names(db)

    async with db.transaction():
        await add(db, "a")
        assert await look() == []
        assert await names(db) == ["a"]
    assert await look() == engine.committed() == ["a"]


async def test_requires_new_where_it_could_only_deadlock(db: Any, engine: Engine) -> None:
    """A new write transaction within one on the same database raises at once, and the outer one goes on."""

    @transactional(propagation="requires_new")
    async def inner() -> None:
        await add(db, "inner")

    await inner()
    async with db.transaction():
        await add(db, "outer")
        with anyio.fail_after(HANGING), pytest.raises(errors.TransactionError):
            await inner()
        await add(db, "after")
    assert engine.committed() == ["after", "inner", "outer"]


async def test_requires_new_on_another_database(audit: Any, engine: Engine) -> None:
    """On another database `requires_new` is independent: it stays committed when the outer one is undone."""

    @transactional(db="audit", propagation="requires_new")
    async def record() -> None:
        await add(audit, "recorded")

    with pytest.raises(Undo):
        async with get_db().transaction():
            await add(get_db(), "a")
            await record()
            raise Undo
    assert engine.committed() == []
    assert engine.committed("audit") == ["recorded"]


async def test_unknown_propagation(db: Any) -> None:
    """A propagation that does not exist is refused; nothing runs under some other one."""
    with pytest.raises((ValueError, TypeError, errors.DatabaseError)):
        async with db.transaction(propagation="neasted"):
            await add(db, "a")
    with pytest.raises((ValueError, TypeError, errors.DatabaseError)):

        @transactional(propagation="neasted")
        async def function() -> None: ...

        await function()
    assert await names(db) == []


# --- manual -------------------------------------------------------------------------------------------------


async def test_manual_across_function_calls(db: Any, engine: Engine) -> None:
    """`begin` in one function, statements in another, `commit` or `rollback` in a third."""

    async def start() -> None:
        await db.begin()

    async def work(name: str) -> None:
        await add(get_db(), name)

    async def finish(good: bool) -> None:
        await (db.commit() if good else db.rollback())

    await start()
    assert db.in_transaction
    await work("a")
    assert engine.committed() == []
    await finish(True)
    assert not db.in_transaction
    assert engine.committed() == ["a"]
    await start()
    await work("b")
    await finish(False)
    assert engine.committed() == ["a"]
    await usable(db)


async def test_manual_batch_as_in_the_users_example(db: Any, engine: Engine) -> None:
    """The user's batch_process: commit and begin again in the middle; the error undoes only what came
    since.
    """

    async def batch_process(items: list[str]) -> None:
        try:
            await db.begin()
            for number, item in enumerate(items, 1):
                await add(db, item)
                if number % 2 == 0:
                    await db.commit()
                    assert set(items[:number]) <= set(engine.committed())
                    await db.begin()
            await db.commit()
        except Exception:
            await db.rollback()
            raise

    await batch_process(["a", "b", "c"])
    assert engine.committed() == ["a", "b", "c"]
    with pytest.raises(errors.IntegrityError):
        await batch_process(["d", "e", "f", "a"])
    assert engine.committed() == ["a", "b", "c", "d", "e"]
    await usable(db)


async def test_ending_what_is_not_open(db: Any) -> None:
    """`commit` with nothing open raises; `rollback`, which clean-up code calls, does nothing; `flush`
    neither.
    """
    with pytest.raises(errors.TransactionError):
        await db.commit()
    await db.rollback()
    await db.flush()
    await usable(db)


async def test_begin_within_begin(db: Any, engine: Engine) -> None:
    """A second `begin` opens a level that the matching `commit` or `rollback` ends."""
    await db.begin()
    await add(db, "outer")
    await db.begin()
    await add(db, "undone")
    await db.rollback()
    assert db.in_transaction
    await db.begin()
    await add(db, "kept")
    await db.commit()
    assert engine.committed() == []
    assert db.in_transaction
    await db.commit()
    assert engine.committed() == ["kept", "outer"]
    assert not db.in_transaction


async def test_begin_within_a_decorated_function(db: Any, engine: Engine) -> None:
    """`begin` in a decorated function opens a nested level; ending it leaves the decorator's transaction
    open.
    """

    @transactional
    async def work() -> None:
        await add(db, "outer")
        await db.begin()
        await add(db, "undone")
        await db.rollback()
        await db.begin()
        await add(db, "kept")
        await db.commit()
        assert engine.committed() == []
        await add(db, "after")

    await work()
    assert engine.committed() == ["after", "kept", "outer"]


async def test_commit_within_a_decorated_function(db: Any, engine: Engine) -> None:
    """`commit` makes permanent what was done so far; what follows is a new transaction that the decorator
    ends.
    """

    @transactional
    async def work(fail: bool, *names: str) -> None:
        await add(db, names[0])
        await db.commit()
        assert names[0] in engine.committed()
        await add(db, names[1])
        assert names[1] not in engine.committed()
        if fail:
            raise Undo

    await work(False, "a", "b")
    with pytest.raises(Undo):
        await work(True, "c", "d")
    assert engine.committed() == ["a", "b", "c"]
    await usable(db)


@in_turn("why", ["cancelled", "or-rollback"])
async def test_a_commit_within_that_is_not_even_tried(db: Any, engine: Engine, why: str) -> None:
    """`commit` that is cancelled before it has begun, or finds the transaction rolled back already, leaves no half of the
    whole: though the function has caught that, nothing that follows is kept, until it says `rollback`.
    """
    await db.execute_script(engine.refusing_trigger)

    async def give_up() -> None:
        if why == "or-rollback":
            with pytest.raises(errors.QueryExecutionError):
                await db.execute("INSERT INTO item (value) VALUES ('rollback')")
            with pytest.raises(errors.TransactionError):
                await db.commit()
            return
        running, go_on = threading.Event(), threading.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(db.run, lambda _: (running.set(), go_on.wait(HANGING)))
            await eventually(running.is_set)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await db.commit()
            go_on.set()

    @transactional
    async def work(anew: bool) -> None:
        await add(db, "lost")
        db.on_commit(lambda: told.append("lost"))
        await give_up()
        if anew:
            await db.rollback()
            await add(db, "kept")
            return
        for call in (lambda: add(db, "refused"), lambda: names(db), db.commit):
            with pytest.raises(errors.TransactionError):
                await call()

    told: list[str] = []
    with pytest.raises(errors.TransactionError):
        await work(False)
    assert engine.committed() == []
    await work(True)
    assert engine.committed() == ["kept"]
    assert told == []
    await usable(db)


async def test_commit_within_frees_the_writer(db: Any, engine: Engine) -> None:
    """Between `commit` and the next statement others may write; the function does not deadlock with them."""

    @transactional
    async def work() -> None:
        await add(db, "a")
        await db.commit()
        with db.detached(), anyio.fail_after(HANGING):
            await add(db, "other")
        await add(db, "b")

    await work()
    assert engine.committed() == ["a", "b", "other"]


async def test_rollback_within_a_decorated_function(db: Any, engine: Engine) -> None:
    """`rollback` undoes what was done so far; what follows is a new transaction that the decorator
    commits.
    """

    @transactional
    async def work() -> None:
        await add(db, "undone")
        await db.rollback()
        assert await names(db) == []
        await add(db, "kept")

    await work()
    assert engine.committed() == ["kept"]


async def test_commit_as_the_last_statement(db: Any, engine: Engine) -> None:
    """A decorated function may end right behind its own `commit` or `rollback`."""

    @transactional
    async def work(end: str) -> None:
        await add(db, end)
        await getattr(db, end)()

    await work("commit")
    await work("rollback")
    assert engine.committed() == ["commit"]
    await usable(db)


async def test_commit_within_a_nested_function(db: Any, engine: Engine) -> None:
    """In a nested level `commit` releases what was done so far, to the outer one, and goes on with a fresh
    savepoint.
    """

    @transactional
    async def inner() -> None:
        await add(db, "released")
        await db.commit()
        assert engine.committed() == []
        await add(db, "undone")
        raise Undo

    @transactional
    async def outer(fail: bool) -> None:
        with pytest.raises(Undo):
            await inner()
        assert await names(db) == ["released"]
        if fail:
            raise Undo

    with pytest.raises(Undo):
        await outer(True)
    assert engine.committed() == []
    await outer(False)
    assert engine.committed() == ["released"]


async def test_rollback_within_a_nested_function(db: Any, engine: Engine) -> None:
    """In a nested level `rollback` undoes that level only, and the level goes on."""

    @transactional
    async def inner() -> None:
        await add(db, "undone")
        await db.rollback()
        await add(db, "kept")

    async with db.transaction():
        await add(db, "outer")
        await inner()
        assert await names(db) == ["kept", "outer"]
    assert engine.committed() == ["kept", "outer"]


async def test_manual_readonly(db: Any, engine: Engine) -> None:
    """`begin(readonly=True)` sees one snapshot and refuses writes until it is ended."""
    await db.begin(readonly=True)
    assert await names(db) == []
    with db.detached():
        await add(db, "a")
    assert await names(db) == []
    with pytest.raises(errors.ReadOnlyTransactionError):
        await add(db, "b")
    await db.commit()
    assert await names(db) == engine.committed() == ["a"]
    await usable(db)


async def test_decorated_within_manual(db: Any, engine: Engine) -> None:
    """A decorated function called between `begin` and `rollback` is part of it."""

    @transactional
    async def work(name: str) -> None:
        await add(db, name)

    await db.begin()
    await work("a")
    assert engine.committed() == []
    await db.rollback()
    assert engine.committed() == []


async def test_flush(db: Any, engine: Engine) -> None:
    """`flush` returns when all that was handed over before has been executed, and commits nothing."""
    async with db.transaction():
        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(add, db, str(number))
            await anyio.wait_all_tasks_blocked()
            await db.flush()
            assert await db.fetch_value("SELECT count(*) FROM jobs") == 10
        assert engine.committed() == []
    assert len(engine.committed()) == 10


async def test_manual_transactions_of_two_tasks(db: Any, engine: Engine) -> None:
    """Each task has its own manual transaction; a third task without one is in none."""

    async def one(name: str, end: str) -> None:
        await db.begin()
        await add(db, name)
        await anyio.lowlevel.checkpoint()
        await getattr(db, end)()

    async def reader() -> None:
        assert not db.in_transaction

    assert await gather(lambda: one("a", "commit"), lambda: one("b", "rollback"), reader) == [None] * 3
    assert engine.committed() == ["a"]


# --- several databases --------------------------------------------------------------------------------------


async def test_databases_are_apart(audit: Any, engine: Engine) -> None:
    """A transaction on one database says nothing about another."""
    db = get_db()
    with pytest.raises(Undo):
        async with db.transaction():
            assert not audit.in_transaction
            await add(db, "a")
            await add(audit, "b")
            raise Undo
    assert engine.committed() == []
    assert engine.committed("audit") == ["b"]


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("form", ["tuple", "nested"])
async def test_two_databases_at_once(audit: Any, engine: Engine, form: str, fail: bool) -> None:
    """A tuple of names, or nesting, opens a transaction on each; an exception undoes both."""

    async def work() -> None:
        await add(get_db(), "a")
        await add(audit, "b")
        assert engine.committed() == engine.committed("audit") == []
        if fail:
            raise Undo

    if form == "tuple":
        call = transactional(db=("default", "audit"))(work)
    else:
        call = transactional(db="audit")(transactional(work))
    if fail:
        with pytest.raises(Undo):
            await call()
    else:
        await call()
    assert engine.committed() == ([] if fail else ["a"])
    assert engine.committed("audit") == ([] if fail else ["b"])
    await usable(audit)
    await usable(get_db())


@pytest.mark.parametrize("order", [("default", "audit"), ("audit", "default")], ids=" then ".join)
async def test_second_commit_fails(audit: Any, engine: Engine, order: tuple[str, str]) -> None:
    """Commits happen in the order named; the error says which databases are committed and which are not."""

    @transactional(db=order)
    async def work() -> None:
        for name in order:
            await add(get_db(name), "a")
        await get_db(order[1]).execute("INSERT INTO child (parent_id) VALUES (99)")

    with pytest.raises(errors.TransactionError) as caught:
        await work()
    text = str(caught.value)
    done, failed = text.find(order[0]), text.find(order[1])
    assert done >= 0, text
    assert failed >= 0, text
    assert "committed" in text
    assert "not" in text
    assert engine.committed(order[0]) == ["a"]
    assert engine.committed(order[1]) == []
    await usable(audit)
    await usable(get_db())


async def test_first_commit_fails(audit: Any, engine: Engine) -> None:
    """When the first commit fails the others are not tried: nothing is committed anywhere."""

    @transactional(db=("default", "audit"))
    async def work() -> None:
        await add(get_db(), "a")
        await add(audit, "b")
        await get_db().execute("INSERT INTO child (parent_id) VALUES (99)")

    with pytest.raises(errors.DatabaseError):
        await work()
    assert engine.committed() == engine.committed("audit") == []
    await usable(audit)


async def test_readonly_tuple(audit: Any) -> None:
    """A read-only tuple refuses writes on each of its databases."""

    @transactional_readonly(db=("default", "audit"))
    async def look() -> None:
        for handle in (get_db(), audit):
            assert await names(handle) == []
            with pytest.raises(errors.ReadOnlyTransactionError):
                await add(handle, "x")

    await look()


async def test_unknown_database(db: Any) -> None:
    """A database that the configuration does not know is a ConfigurationError that names it."""
    with pytest.raises(errors.ConfigurationError, match="adit"):
        await get_db("adit").fetch_value("SELECT 1")

    @transactional(db=("default", "adit"))
    async def work() -> None:
        await add(db, "a")

    with pytest.raises(errors.ConfigurationError, match="adit"):
        await work()
    assert await names(db) == []


# --- on_commit ----------------------------------------------------------------------------------------------


async def test_on_commit_runs_after_the_outermost_commit(db: Any, engine: Engine) -> None:
    """Callbacks, plain and async, run in their order, once, when all is committed."""
    seen: list[Any] = []

    async def later() -> None:
        seen.append(("async", engine.committed(), db.in_transaction))

    async with db.transaction():
        db.on_commit(lambda: seen.append(("plain", engine.committed())))
        async with db.transaction():
            await add(db, "a")
            db.on_commit(later)
        assert seen == []
    assert seen == [("plain", ["a"]), ("async", ["a"], False)]
    await usable(db)
    assert len(seen) == 2


async def test_on_commit_never_runs_after_a_rollback(db: Any) -> None:
    """A rollback drops the callbacks; those of a nested level go with that level alone."""
    seen: list[str] = []
    with pytest.raises(Undo):
        async with db.transaction():
            await add(db, "a")
            db.on_commit(lambda: seen.append("undone"))
            raise Undo
    async with db.transaction():
        db.on_commit(lambda: seen.append("outer"))
        with pytest.raises(Undo):
            async with db.transaction():
                db.on_commit(lambda: seen.append("nested"))
                async with db.transaction():
                    await add(db, "b")
                    db.on_commit(lambda: seen.append("nested deeper"))
                raise Undo
        db.on_commit(lambda: seen.append("after"))
    assert seen == ["outer", "after"]


async def test_on_commit_and_a_commit_that_fails(db: Any) -> None:
    """A commit that failed is none: its callbacks do not run, nor with the next transaction."""
    seen: list[str] = []
    with pytest.raises(errors.IntegrityError):
        async with db.transaction():
            await db.execute("INSERT INTO child (parent_id) VALUES (99)")
            db.on_commit(lambda: seen.append("x"))
    await usable(db)
    assert seen == []


async def test_on_commit_in_manual_mode(db: Any) -> None:
    """`commit()` runs the callbacks of what it commits, `rollback()` drops them; inside a decorator too."""
    seen: list[str] = []
    await db.begin()
    db.on_commit(lambda: seen.append("committed"))
    await add(db, "a")
    await db.commit()
    assert seen == ["committed"]
    await db.begin()
    db.on_commit(lambda: seen.append("rolled back"))
    await db.rollback()

    @transactional
    async def work() -> None:
        await add(db, "b")
        db.on_commit(lambda: seen.append("first"))
        await db.commit()
        assert seen == ["committed", "first"]
        db.on_commit(lambda: seen.append("second"))
        await db.rollback()
        db.on_commit(lambda: seen.append("third"))

    await work()
    assert seen == ["committed", "first", "third"]


async def test_on_commit_outside_runs_at_once(db: Any) -> None:
    """Outside a transaction all is committed already, so the callback runs at once."""
    seen: list[str] = []
    db.on_commit(lambda: seen.append("now"))
    assert seen == ["now"]


async def test_on_commit_outside_with_an_async_function(db: Any, engine: Engine) -> None:
    """Outside a transaction an async callback runs too, without being awaited by the caller."""
    done = anyio.Event()

    async def callback() -> None:
        await add(db, "a")
        done.set()

    db.on_commit(callback)
    with anyio.fail_after(HANGING):
        await done.wait()
    assert engine.committed() == ["a"]


async def test_on_commit_callback_may_use_the_database(db: Any, engine: Engine) -> None:
    """A callback is outside the transaction that it follows: what it writes is its own."""

    async def follow_up() -> None:
        await add(db, "follow-up")
        assert "follow-up" in engine.committed()

    async with db.transaction():
        await add(db, "a")
        db.on_commit(follow_up)
    assert engine.committed() == ["a", "follow-up"]


# --- retries and timeout ------------------------------------------------------------------------------------


async def test_retries_run_the_function_again_when_busy(db: Any, engine: Engine) -> None:
    """`retries=n` runs the function up to n times more on DatabaseBusyError, from a clean start each time."""
    runs = 0

    @transactional(retries=2)
    async def work(good_at: int) -> int:
        nonlocal runs
        runs += 1
        await db.execute("INSERT INTO item (value) VALUES ('x')")
        if runs < good_at:
            raise errors.DatabaseBusyError("busy")
        return runs

    assert await work(3) == 3
    assert engine.outside("SELECT count(*) FROM item") == [(1,)]
    runs = 0
    with pytest.raises(errors.DatabaseBusyError):
        await work(99)
    assert runs == 3
    assert engine.outside("SELECT count(*) FROM item") == [(1,)]


async def test_retries_against_another_process_lock(make_db: Any, engine: Engine) -> None:
    """The real thing: somebody else's lock makes the first run fail, the second one finds it gone."""
    db = await make_db(busy_timeout=50)
    runs = 0
    with engine.locked() as other:

        @transactional(retries=1)
        async def work() -> None:
            nonlocal runs
            runs += 1
            if runs == 2:
                other.rollback()
            await add(db, "a")

        await work()
    assert runs == 2
    assert engine.committed() == ["a"]


@in_turn("kind", [ValueError, errors.TransactionError, errors.QueryExecutionError])
async def test_other_errors_are_not_retried(db: Any, kind: type[Exception]) -> None:
    """Only a busy database is a reason to try again."""
    runs = 0

    @transactional(retries=5)
    async def work() -> None:
        nonlocal runs
        runs += 1
        raise kind("no")

    with pytest.raises(kind):
        await work()
    assert runs == 1


async def test_what_is_committed_is_not_run_again(db: Any, engine: Engine) -> None:
    """After a `commit()` inside, a busy database is not a reason to run the function again."""
    runs = 0

    @transactional(retries=5)
    async def work() -> None:
        nonlocal runs
        runs += 1
        await add(db, f"a{runs}")
        await db.commit()
        raise errors.DatabaseBusyError("busy")

    with pytest.raises(errors.DatabaseBusyError):
        await work()
    assert runs == 1
    assert engine.committed() == ["a1"]


@in_turn("doing", ["sleeping", "statement", "waiting"])
@in_turn("form", ["decorator", "context manager"])
async def test_timeout(db: Any, engine: Engine, doing: str, form: str) -> None:
    """`timeout` bounds the whole transaction, whatever it is doing, undoes it, and says what it was doing."""
    said = {
        "sleeping": "it was outside the database, in ",
        "statement": f"it was executing: {SLOW_SELECT[:50]}",
        "waiting": "it was waiting for a connection to execute: INSERT",
    }

    async def work() -> None:
        if doing == "waiting":
            await add(db, "a")
            return
        await add(db, "a")
        if doing == "statement":
            await db.fetch_value(SLOW_SELECT)
        await anyio.sleep(10)

    async def with_block() -> None:
        async with db.transaction(timeout=0.1):
            await work()

    call = transactional(timeout=0.1)(work) if form == "decorator" else with_block

    async def attempt() -> None:
        with anyio.fail_after(HANGING), pytest.raises(errors.TransactionTimeoutError) as caught:
            await call()
        assert isinstance(caught.value, TimeoutError)
        assert "0.1" in str(caught.value)
        assert said[doing] in str(caught.value)

    if doing == "waiting":
        async with held(db):
            await attempt()
    else:
        await attempt()
    assert engine.committed() == []
    await usable(db)


async def test_timeout_that_is_not_reached(db: Any, engine: Engine) -> None:
    """A transaction that keeps within its time commits as if there were none."""
    async with db.transaction(timeout=5):
        await add(db, "a")
    assert engine.committed() == ["a"]


# --- a transaction left open --------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
async def test_transaction_left_open_by_a_task_that_ended(
    db: Any, engine: Engine, caplog: pytest.LogCaptureFixture, readonly: bool
) -> None:
    """It is rolled back, its connection freed for others, and a warning names where it began."""

    async def forgetful() -> None:
        await db.begin(readonly=readonly)
        await (names(db) if readonly else add(db, "lost"))

    async with anyio.create_task_group() as group:
        group.start_soon(forgetful)
    await collected(lambda: is_idle(db), "the connection comes back")
    assert engine.committed() == []
    with anyio.fail_after(HANGING):
        await add(db, "a")
    assert engine.committed() == ["a"]
    await eventually(lambda: [record for record in caplog.records if record.levelname == "WARNING"], "the warning")
    texts = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and record.name.startswith("database")
    ]
    assert len(texts) == 1
    assert "transactions_test.py" in texts[0]
    await usable(db)


async def test_transaction_left_open_while_others_wait(db: Any, engine: Engine) -> None:
    """Those who wait for the connection of a task that ended get it, without closing anything."""

    async def forgetful() -> None:
        await db.begin()
        await add(db, "lost")

    async with anyio.create_task_group() as group:
        group.start_soon(forgetful)
    with anyio.fail_after(HANGING):
        await add(db, "a")
    assert engine.committed() == ["a"]
