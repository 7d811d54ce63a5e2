"""Section 3 of the contract: rows as they come, many writes sent together, and a copy taken at full run."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional
from tests.contract.support import (
    HANGING,
    SLOW_ROWS,
    Engine,
    add,
    errors,
    eventually,
    gather,
    held,
    idle,
    in_turn,
    names,
    usable,
)

pytestmark = pytest.mark.anyio


async def fill(db: Any, count: int) -> None:
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [(str(n),) for n in range(count)])


# --- stream -------------------------------------------------------------------------------------------------


@in_turn("chunk_size", [None, 1, 1000, 100_000])
@in_turn("count", [0, 1, 1000])
async def test_stream_gives_every_row_in_order(db: Any, chunk_size: int | None, count: int) -> None:
    """Each row comes once and in order, whatever the chunk size."""
    await fill(db, count)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    async with db.stream("SELECT id, value FROM item WHERE id > :least ORDER BY id", {"least": 0}, **options) as rows:
        assert [(row[0], row["value"]) async for row in rows] == [(n + 1, str(n)) for n in range(count)]
    await usable(db)


async def test_the_first_row_does_not_wait_for_the_last(db: Any) -> None:
    """Rows come while the statement still runs: this one would take a hundred million steps."""
    with anyio.fail_after(HANGING):
        async with db.stream(SLOW_ROWS) as rows:
            async for row in rows:
                assert row[0] == 1
                break
    await usable(db)


async def test_read_ahead_is_bounded(db: Any) -> None:
    """A slow consumer holds the statement back: no more is computed than a few chunks ahead."""
    computed: list[int] = []

    def install(connection: sqlite3.Connection) -> None:
        connection.create_function("tick", 1, lambda value: computed.append(value) or value)

    await fill(db, 5000)
    async with db.transaction():
        await db.run(install)
        async with db.stream("SELECT tick(id) FROM item", chunk_size=50) as rows:
            async for row in rows:
                assert row[0] == 1
                break
            before = len(computed)
            assert before <= 50 * 8
            count = 0
            async for _ in rows:
                count += 1
                assert len(computed) <= count + 1 + 50 * 8
    assert len(computed) == 5000


@in_turn("leave", ["break", "exception", "cancel", "untouched"])
@in_turn("inside", [False, True], ids=["autocommit", "transaction"])
async def test_stream_left_early(db: Any, leave: str, inside: bool) -> None:
    """A stream that is left early stops its statement and gives back its connection, or its transaction goes
    on.
    """

    # Eight million rows of a real table: a cursor left open would pin its snapshot, and show in `usable`.
    await fill(db, 200)
    sql = "SELECT a.id FROM item a, item b, item c"

    async def consume() -> None:
        with anyio.CancelScope() as scope:
            async with db.stream(sql, chunk_size=10) as rows:
                if leave == "untouched":
                    return
                count = 0
                async for _ in rows:
                    count += 1
                    if count < 25:
                        continue
                    if leave == "break":
                        break
                    if leave == "exception":
                        raise LookupError
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()

    with anyio.fail_after(HANGING):
        for _ in range(4):
            if inside:
                async with db.transaction(readonly=True):
                    await gather(consume)
                    if leave != "cancel":
                        assert await names(db) == []
            else:
                await gather(consume)
            await idle(db)
    await usable(db)


async def test_streams_of_a_readers_own_snapshot(db: Any) -> None:
    """A stream shows one state from its first row to its last, though others write meanwhile."""
    await fill(db, 500)
    seen = 0
    async with db.stream("SELECT id FROM item", chunk_size=5) as rows:
        async for _ in rows:
            seen += 1
            if seen % 50 == 0:
                await db.execute("INSERT INTO item (value) VALUES ('new')")
    assert seen == 500
    assert await db.fetch_value("SELECT count(*) FROM item") == 510


async def test_stream_inside_a_transaction(db: Any, engine: Engine) -> None:
    """Inside a transaction a stream sees its uncommitted rows, and other statements run between its rows."""
    async with db.transaction():
        await fill(db, 100)
        async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=7) as rows:
            async for row in rows:
                await add(db, f"{row['id']:03}")
        assert len(await names(db)) == 100
        assert engine.committed() == []
    assert len(engine.committed()) == 100


async def test_two_streams_in_one_transaction(db: Any) -> None:
    """Two streams of one transaction can be read in turn."""
    async with db.transaction():
        await fill(db, 40)
        async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=3) as up:
            async with db.stream("SELECT id FROM item ORDER BY id DESC", chunk_size=5) as down:
                iterator = aiter(down)
                async for row in up:
                    assert row["id"] + (await anext(iterator))["id"] == 41


async def test_streams_of_many_tasks(db: Any) -> None:
    """More streams at once than connections: they wait for one another, none starves."""
    await fill(db, 300)

    async def consume() -> int:
        async with db.stream("SELECT id FROM item", chunk_size=10) as rows:
            return len([row async for row in rows])

    with anyio.fail_after(HANGING):
        assert await gather(*[consume] * 8) == [300] * 8
    await usable(db)


async def test_stream_of_a_statement_that_fails(db: Any) -> None:
    """Bad SQL, and an error in the middle of the rows, come out of the stream as the common error."""
    with pytest.raises(errors.QueryExecutionError):
        async with db.stream("SELECT nothing FROM nowhere") as rows:
            [row async for row in rows]
    seen = 0
    with pytest.raises(errors.QueryExecutionError):
        async with db.stream(
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100) "
            "SELECT CASE WHEN x = 50 THEN abs(-9223372036854775808) ELSE x END FROM c",
            chunk_size=10,
        ) as rows:
            async for _ in rows:
                seen += 1
    assert seen <= 49
    await usable(db)


async def test_stream_used_after_its_end(db: Any) -> None:
    """Rows kept beyond their block give nothing more: an error, not somebody else's connection."""
    await fill(db, 1000)
    async with db.stream("SELECT id FROM item", chunk_size=10) as rows:
        async for _ in rows:
            break
    with pytest.raises((errors.DatabaseError, StopAsyncIteration, RuntimeError)):
        for _ in range(100):
            await anext(aiter(rows))
    await usable(db)


# --- batch --------------------------------------------------------------------------------------------------


INSERT = "INSERT INTO jobs (name) VALUES (:name)"


async def test_batch_commits_every_size(db: Any, engine: Engine) -> None:
    """Writes are sent together, committed every `size`, the rest at the end."""
    async with db.batch(size=10) as batch:
        for number in range(25):
            await batch.execute(INSERT, {"name": f"{number:02}"})
            assert len(engine.committed()) in ((number + 1) // 10 * 10, number // 10 * 10)
    assert len(engine.committed()) == 25
    await usable(db)


async def test_batch_takes_queries_and_all_kinds_of_writes(db: Any, queries: Any, engine: Engine) -> None:
    """aiosql functions and different statements go into one batch, in their order."""
    async with db.batch() as batch:
        await batch.execute(queries.insert_job, {"name": "a", "cron_expr": "", "handler": ""})
        await batch.execute("INSERT INTO jobs (name) VALUES (?)", ("b",))
        await batch.execute("INSERT INTO jobs (name) VALUES ('c')")
        await batch.execute(queries.update_job, {"id": 1, "enabled": 0})
        await batch.execute(queries.delete_job, {"id": 2})
    assert engine.outside("SELECT name, enabled FROM jobs ORDER BY id") == [("a", 0), ("c", 1)]


async def test_batch_left_by_an_exception(db: Any, engine: Engine) -> None:
    """An exception in the block keeps what was committed before and drops the rest."""
    with pytest.raises(LookupError):
        async with db.batch(size=10) as batch:
            for number in range(25):
                await batch.execute(INSERT, {"name": f"{number:02}"})
            raise LookupError
    assert len(engine.committed()) == 20
    await usable(db)


@in_turn("size", [1, 3, 1000])
async def test_batch_with_a_statement_that_fails(db: Any, engine: Engine, size: int) -> None:
    """A failing write surfaces as the common error no later than the end; its group leaves nothing half
    done.
    """
    with pytest.raises(errors.IntegrityError) as caught:
        async with db.batch(size=size) as batch:
            for name in ("a", "b", "c", "d", "a", "e", "f"):
                await batch.execute(INSERT, {"name": name})
    assert caught.value.parameters == {"name": "a"}
    assert engine.committed() == ["a", "b", "c", "d"][: 4 // size * size]
    await usable(db)


async def test_batch_inside_a_transaction(db: Any, engine: Engine) -> None:
    """Inside a transaction a batch belongs to it: nothing is committed before it is, all is undone with
    it.
    """
    with pytest.raises(LookupError):
        async with db.transaction():
            async with db.batch(size=2) as batch:
                for name in "abcde":
                    await batch.execute(INSERT, {"name": name})
            assert await names(db) == list("abcde")
            assert engine.committed() == []
            raise LookupError
    assert engine.committed() == []


async def test_batch_sent_within_a_read_only_level(db: Any, engine: Engine) -> None:
    """Collected outside, sent inside: refused like any write, and nothing of it is executed."""
    async with db.transaction():
        batch = db.batch()
        await batch.execute("INSERT INTO item (value) VALUES ('a')")
        with pytest.raises(errors.ReadOnlyTransactionError, match="refuses this INSERT"):
            async with db.transaction(readonly=True):
                await batch.flush()
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]


async def test_batches_of_several_tasks(db: Any) -> None:
    """Batches and transactions of several tasks go on side by side."""

    async def work(number: int) -> None:
        async with db.batch(size=7) as batch:
            for step in range(30):
                await batch.execute("INSERT INTO item (value) VALUES (?)", (f"{number} {step}",))

    @transactional
    async def other(number: int) -> None:
        await db.execute("INSERT INTO item (value) VALUES (?)", (f"other {number}",))

    with anyio.fail_after(HANGING):
        results = await gather(*[lambda n=n: work(n) for n in range(5)], *[lambda n=n: other(n) for n in range(20)])
    assert results == [None] * 25
    assert await db.fetch_value("SELECT count(*) FROM item") == 170


async def test_batch_refuses_a_wrong_size(db: Any) -> None:
    """A size that is not positive is refused."""
    with pytest.raises((ValueError, errors.DatabaseError)):
        async with db.batch(size=0) as batch:
            await batch.execute(INSERT, {"name": "a"})
    assert await names(db) == []


# --- backup -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
async def test_backup_is_a_complete_copy(db: Any, tmp_path: Path, kind: type) -> None:
    """The copy is a database of its own with all that was committed; progress is told like sqlite3 does."""
    await fill(db, 2000)
    target, told = tmp_path / "copy.db", []
    await db.backup(kind(target), progress=lambda *args: told.append(args))
    with sqlite3.connect(target) as copy:
        assert copy.execute("SELECT count(*) FROM item").fetchone() == (2000,)
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    copy.close()
    assert told
    assert all(isinstance(value, int) for args in told for value in args)
    status, remaining, total = told[-1]
    assert remaining == 0
    assert total > 0
    assert status == sqlite3.SQLITE_DONE or status == 0
    await usable(db)


async def test_backup_while_others_write(db: Any, tmp_path: Path) -> None:
    """Taken while transfers run, the copy holds one consistent state, and the writers are not kept
    waiting.
    """
    await db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, pad TEXT)")
    await db.execute_many("INSERT INTO account (balance, pad) VALUES (100, ?)", [("x" * 2000,) for _ in range(500)])

    @transactional
    async def transfer(source: int, target: int) -> None:
        await db.execute("UPDATE account SET balance = balance - 10 WHERE id = ?", (source,))
        await db.execute("UPDATE account SET balance = balance + 10 WHERE id = ?", (target,))

    done, transfers = False, 0

    async def writers() -> None:
        nonlocal transfers
        while not done:
            await transfer(transfers % 500 + 1, (transfers * 7) % 500 + 1)
            transfers += 1

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(writers)
            await eventually(lambda: transfers > 5)
            for number in range(3):
                before = transfers
                await db.backup(tmp_path / f"copy{number}.db")
                assert await db.fetch_value("SELECT sum(balance) FROM account") == 50000
                await eventually(lambda before=before: transfers > before)
            done = True
    for number in range(3):
        copy = sqlite3.connect(tmp_path / f"copy{number}.db")
        assert copy.execute("SELECT sum(balance), count(*) FROM account").fetchone() == (50000, 500)
        copy.close()
    await usable(db)


async def test_backup_during_an_open_transaction(db: Any, tmp_path: Path) -> None:
    """Another task's uncommitted work is not in the copy, and does not hold it up."""
    begun, over = anyio.Event(), anyio.Event()

    async def writer() -> None:
        async with db.transaction():
            await add(db, "uncommitted")
            begun.set()
            await over.wait()

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as group:
            group.start_soon(writer)
            await begun.wait()
            await db.backup(tmp_path / "copy.db")
            over.set()
    copy = sqlite3.connect(tmp_path / "copy.db")
    assert copy.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    copy.close()


async def test_backup_to_where_it_cannot_be(db: Any, tmp_path: Path) -> None:
    """A target that cannot be written is the common error, and the pool is whole."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.DatabaseError):
        await db.backup(tmp_path / "folder")
    await usable(db)


async def test_backup_whose_progress_fails(db: Any, tmp_path: Path) -> None:
    """An exception in the progress callback goes on to the caller, and the pool is whole."""

    def progress(status: int, remaining: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        await db.backup(tmp_path / "copy.db", progress=progress)
    await usable(db)


async def test_backup_of_memory(make_db: Any, tmp_path: Path) -> None:
    """A database in memory can be saved to a file."""
    db = await make_db(path=":memory:")
    await add(db, "a")
    await db.backup(tmp_path / "saved.db")
    copy = sqlite3.connect(tmp_path / "saved.db")
    assert copy.execute("SELECT name FROM jobs").fetchall() == [("a",)]
    copy.close()


# --- values and rows are those of the moment ----------------------------------------------------------------


async def _make_blobs(db: Any, engine: Engine) -> None:
    await db.execute(f"CREATE TABLE blobs (value {'BLOB' if engine.name == 'sqlite3' else 'BYTEA'})")


class _Job:
    def __init__(self, name: str) -> None:
        self.name = name


async def test_batch_takes_the_values_of_the_moment(db: Any, engine: Engine) -> None:
    """A batch whose caller uses one object again and again has the values that it was given."""
    await _make_blobs(db, engine)
    data: dict[str, Any] = {}
    sequence: list[Any] = [None]
    job = _Job("")
    buffer = bytearray(2)
    async with db.batch() as batch:
        for number in range(3):
            data["name"] = f"dict {number}"
            await batch.execute("INSERT INTO jobs (name) VALUES (:name)", data)
            sequence[0] = f"list {number}"
            await batch.execute("INSERT INTO jobs (name) VALUES (?)", sequence)
            job.name = f"object {number}"
            await batch.execute("INSERT INTO jobs (name) VALUES (:name)", job)
            buffer[:] = b"%02d" % number
            await batch.execute("INSERT INTO blobs (value) VALUES (?)", (buffer,))
            await batch.execute("INSERT INTO blobs (value) VALUES (?)", [memoryview(buffer)])
            await batch.execute("INSERT INTO blobs (value) VALUES (:value)", {"value": buffer})
        data["name"] = sequence[0] = job.name = "late"
        buffer[:] = b"xx"
    assert engine.committed() == [f"{kind} {number}" for kind in ("dict", "list", "object") for number in range(3)]
    values = [bytes(value) for (value,) in engine.outside("SELECT value FROM blobs ORDER BY value")]
    assert values == [b"00"] * 3 + [b"01"] * 3 + [b"02"] * 3


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "transaction"])
async def test_execute_takes_the_values_of_the_moment(db: Any, engine: Engine, inside: bool) -> None:
    """Nor does it matter what another task makes of the object before a connection is free."""

    async def write(data: Any, sql: str) -> None:
        if inside:
            async with db.transaction():
                await db.execute(sql, data)
        else:
            await db.execute(sql, data)

    data: dict[str, Any] = {"name": "dict"}
    sequence: list[Any] = ["list"]
    job = _Job("object")
    rows: list[Any] = [("row",)]
    async with anyio.create_task_group() as tasks:
        async with held(db) as release:
            tasks.start_soon(write, data, "INSERT INTO jobs (name) VALUES (:name)")
            tasks.start_soon(write, sequence, "INSERT INTO jobs (name) VALUES (?)")
            tasks.start_soon(write, job, "INSERT INTO jobs (name) VALUES (:name)")
            tasks.start_soon(db.execute_many, "INSERT INTO jobs (name) VALUES (?)", rows)
            await eventually(lambda: db.stats().waiting + db.stats().queued == 4)
            data["name"] = sequence[0] = job.name = "late"
            rows.append(("late",))
            release.set()
    assert engine.committed() == ["dict", "list", "object", "row"]


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "transaction"])
async def test_stream_cancelled_within_a_chunk(db: Any, inside: bool) -> None:
    """A consumer that is cancelled while rows are under way, catches it and goes on, gets every row once, or an error."""
    await fill(db, 200)
    gate, reached = threading.Event(), threading.Event()

    def slowly(id: int) -> int:
        if id == at:
            reached.set()
            assert gate.wait(5)
        return id

    for at in (1, 18, 100):
        gate.clear()
        reached.clear()
        seen: list[int] = []
        failures: list[BaseException] = []

        async def consume(seen: list[int] = seen, failures: list[BaseException] = failures) -> None:
            async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=64, record_class=slowly) as rows:
                for attempt in range(3):
                    with anyio.CancelScope() as scope:
                        scopes.append(scope)
                        try:
                            async for row in rows:
                                seen.append(row)
                            return
                        except Exception as error:
                            failures.append(error)
                    if attempt == 0:
                        gate.set()
                        await anyio.sleep(0.05)

        scopes: list[anyio.CancelScope] = []

        async def work(consume: Any = consume) -> None:
            if inside:
                with suppress(errors.TransactionError):  # a statement may be interrupted in it
                    async with db.transaction(readonly=True):
                        await consume()
            else:
                await consume()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await eventually(reached.is_set)
            await anyio.sleep(0.01)
            scopes[0].cancel()
        assert seen == list(range(1, len(seen) + 1)), "a gap"
        assert len(seen) == 200 or all(type(error) is errors.TransactionError for error in failures)
        assert len(seen) == 200 or failures
    await usable(db)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "transaction"])
async def test_stream_whose_record_class_fails(db: Any, inside: bool) -> None:
    """What follows the error of a record class is that there are no more rows, not a gap."""
    await fill(db, 200)
    for at in (1, 20, 100):
        calls = 0

        def fail_once(id: int, at: int = at) -> int:
            nonlocal calls
            calls += id == at
            if id == at and calls == 1:
                raise ZeroDivisionError
            return id

        async def read(record_class: Any = fail_once) -> None:
            seen: list[int] = []
            async with db.stream("SELECT id FROM item ORDER BY id", record_class=record_class) as rows:
                with pytest.raises(ZeroDivisionError):
                    async for row in rows:
                        seen.append(row)
                for _ in range(2):
                    with pytest.raises((errors.TransactionError, ZeroDivisionError)):
                        async for row in rows:
                            seen.append(row)
            assert seen == list(range(1, len(seen) + 1))
            assert len(seen) < at

        if inside:
            async with db.transaction(readonly=True):
                await read()
        else:
            await read()
    await usable(db)


async def test_stream_read_in_turns(db: Any) -> None:
    """A stream that is left and taken up again goes on where it was, and has an end."""
    await fill(db, 100)
    async with db.stream("SELECT id FROM item ORDER BY id") as rows:
        seen: list[int] = []
        while True:
            before = len(seen)
            async for row in rows:
                seen.append(row["id"])
                if len(seen) % 7 == 0:
                    break
            if len(seen) == before:
                break
        assert seen == list(range(1, 101))
        assert [row async for row in rows] == []
