"""Offloaded functions inside other transactions, and what the user's own exceptions become of there."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import anyio
import pytest

from database import transactional, transactional_readonly
from tests.contract.support import Engine, add, case, errors, names, usable

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO jobs (name) VALUES (?)"


async def _batch(db: Any) -> None:
    async with db.batch() as batch:
        await batch.execute(INSERT, ("written",))


async def _nested(db: Any) -> None:
    async with db.transaction():
        await add(db, "written")


async def _nested_run(db: Any) -> None:
    async with db.transaction(readonly=True):
        await db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('written')"))


WRITES: dict[str, Any] = {
    "execute": lambda db: add(db, "written"),
    "run": lambda db: db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('written')")),
    "run readonly": lambda db: db.run(
        lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('written')"), readonly=True
    ),
    "script": lambda db: db.execute_script("INSERT INTO jobs (name) VALUES ('written')"),
    "execute_many": lambda db: db.execute_many(INSERT, [("written",)]),
    "batch": _batch,
    "ddl": lambda db: db.execute("CREATE TABLE other (id INTEGER)"),
    "nested": _nested,
    "nested run": _nested_run,
}


@pytest.mark.parametrize("around", ["outside", "write", "readonly"])
async def test_read_only(db: Any, engine: Engine, around: str) -> None:
    """An offloaded read-only function is refused every write, wherever it is called, and what is around it may write
    again afterwards.
    """
    writes = dict(WRITES)
    if engine.name == "sqlite3":
        writes["pragma"] = lambda db: db.execute("PRAGMA user_version = 7")
        writes["explained"] = lambda db: db.fetch_all("PRAGMA user_version = 7")
    wrong: dict[str, Any] = {}

    @transactional_readonly(offload=True)
    async def look(write: Any = None) -> list[str]:
        found = await names(db)
        if write is not None:
            await write(db)
        return found

    async def attempts(visible: list[str]) -> None:
        for name, write in writes.items():
            assert await look() == visible
            try:
                await look(write)
                wrong[name] = "went through"
            except errors.ReadOnlyTransactionError:
                pass
            except Exception as error:
                wrong[name] = error
            if around == "write":
                await db.execute("UPDATE jobs SET enabled = 0")

    if around == "outside":
        await attempts([])
    else:
        async with db.transaction(readonly=around == "readonly"):
            if around == "write":
                await add(db, "outer")
            await attempts(["outer"] if around == "write" else [])
            if around == "write":
                await db.run(lambda connection: connection.execute("INSERT INTO jobs (name) VALUES ('raw')"))
    assert not wrong
    assert engine.committed() == (["outer", "raw"] if around == "write" else [])
    if engine.name == "sqlite3":
        assert engine.outside("PRAGMA user_version") == [(0,)]
    await usable(db)


async def test_read_write_within_read_only(db: Any, engine: Engine) -> None:
    """An offloaded function that may write is refused inside a read-only transaction before it runs, whether it would
    write or not; so is one called by an offloaded read-only function.
    """
    ran: list[int] = []

    @transactional(offload=True)
    async def work() -> None:
        ran.append(1)

    @transactional(offload=True, propagation="required")
    async def joins() -> None:
        ran.append(2)

    @transactional_readonly(offload=True)
    async def look(inner: Any) -> None:
        await inner()

    for inner in (work, joins):
        async with db.transaction(readonly=True):
            await names(db)
            with pytest.raises(errors.ReadOnlyTransactionError):
                await inner()
        async with db.transaction(), db.transaction(readonly=True):
            with pytest.raises(errors.ReadOnlyTransactionError):
                await inner()
        with pytest.raises(errors.ReadOnlyTransactionError):
            await look(inner)
    assert ran == []
    await usable(db)


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
async def test_required_dooms_the_whole(db: Any, engine: Engine, readonly: bool) -> None:
    """`required` that fails offloaded dooms its caller's transaction as it does otherwise; `nested` does not."""
    decorate = transactional_readonly if readonly else transactional

    @decorate(offload=True, propagation="required")
    async def joins(fail: bool) -> list[str]:
        found = await names(db)
        if fail:
            raise ZeroDivisionError
        return found

    @transactional(offload=True)
    async def around(inner: Any) -> None:
        await add(db, "offloaded")
        try:
            await inner(True)
        except ZeroDivisionError:
            pass

    async with db.transaction():
        await add(db, "kept")
        assert await joins(False) == ["kept"]
    with pytest.raises(errors.TransactionError, match="required"):
        async with db.transaction():
            await add(db, "undone")
            with pytest.raises(ZeroDivisionError):
                await joins(True)
            with pytest.raises(errors.TransactionError):
                await add(db, "refused")
    with pytest.raises(errors.TransactionError, match="required"):
        await around(joins)
    with pytest.raises(ZeroDivisionError):
        await joins(True)  # with nothing around it there is nothing to doom
    assert engine.committed() == ["kept"]
    await usable(db)


class Mine(RuntimeError):
    """An exception of the application's."""


def _full_queue() -> None:
    full: asyncio.Queue[int] = asyncio.Queue(1)
    full.put_nowait(1)
    full.put_nowait(2)


def _full_stream() -> None:
    send, receive = anyio.create_memory_object_stream[int](0)
    with send, receive:
        send.send_nowait(1)


def _closed_stream() -> None:
    send, receive = anyio.create_memory_object_stream[int](1)
    receive.close()
    with send:
        send.send_nowait(1)


def _released_lock() -> None:
    asyncio.Lock().release()


def _own_text() -> None:
    raise Mine("the event loop of our game has stopped")


def _full_plain_queue() -> None:
    full: queue.Queue[int] = queue.Queue(1)
    full.put_nowait(1)
    full.put_nowait(2)


OWN: dict[str, tuple[Any, type[BaseException]]] = {
    "QueueFull": (_full_queue, asyncio.QueueFull),
    "QueueEmpty": (lambda: asyncio.Queue[int]().get_nowait(), asyncio.QueueEmpty),
    "queue.Full": (_full_plain_queue, queue.Full),
    "WouldBlock": (_full_stream, anyio.WouldBlock),
    "BrokenResourceError": (_closed_stream, anyio.BrokenResourceError),
    "a lock that is not held": (_released_lock, RuntimeError),
    "a wrong size": (lambda: anyio.create_memory_object_stream[int](-1), ValueError),
    "a wrong bound": (lambda: asyncio.BoundedSemaphore(-1), ValueError),
    "the application's": (_own_text, Mine),
    "from_thread": (lambda: anyio.from_thread.run_sync(int), RuntimeError),
}


@pytest.mark.parametrize("readonly", [False, True], ids=["write", "readonly"])
async def test_the_users_own_exceptions(db: Any, engine: Engine, readonly: bool) -> None:
    """What the function raises arrives as it was raised, in whichever library it was; only awaiting something else is
    called that.
    """
    decorate = transactional_readonly if readonly else transactional
    wrong: dict[str, Any] = {}
    for name, (call, expected) in OWN.items():

        @decorate(offload=True)
        async def work(call: Any = call) -> None:
            await names(db)
            call()

        try:
            await work()
            wrong[name] = "nothing was raised"
        except errors.DatabaseError as error:
            wrong[name] = error
        except expected:
            pass
    assert not wrong
    await usable(db)


async def _wait_for_lock() -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    await lock.acquire()


async def _timeout() -> None:
    async with asyncio.timeout(1):
        pass


async def _asyncio_tasks() -> None:
    async with asyncio.TaskGroup():
        pass


async def _anyio_tasks() -> None:
    async with anyio.create_task_group():
        pass


async def _anyio_timeout() -> None:
    with anyio.fail_after(1):
        pass


async def _anyio_stream() -> None:
    send, receive = anyio.create_memory_object_stream[int](0)
    with send, receive:
        await receive.receive()


AWAITING: dict[str, Any] = {
    "asyncio.Queue.get": lambda: asyncio.Queue[int]().get(),
    "asyncio.Event.wait": lambda: asyncio.Event().wait(),
    "asyncio.Lock": _wait_for_lock,
    "asyncio.timeout": _timeout,
    "asyncio.TaskGroup": _asyncio_tasks,
    "asyncio.to_thread": lambda: asyncio.to_thread(int),
    "anyio tasks": _anyio_tasks,
    "anyio.fail_after": _anyio_timeout,
    "anyio stream": _anyio_stream,
    "anyio.Lock": lambda: anyio.Lock().acquire(),
}


async def test_awaiting_something_else(db: Any, engine: Engine) -> None:
    """Awaiting anything else says so, however the library complains of the missing event loop."""
    wrong: dict[str, Any] = {}
    for name, wait in AWAITING.items():

        @transactional(offload=True)
        async def work(wait: Any = wait) -> None:
            await add(db, "undone")
            await wait()

        try:
            await work()
            wrong[name] = "went through"
        except errors.TransactionError as error:
            if "awaited something else" not in str(error):
                wrong[name] = error
        except BaseException as error:
            wrong[name] = error
    assert not wrong
    assert engine.committed() == []
    await usable(db)


async def test_several_statements_as_one(db: Any, engine: Engine) -> None:
    """What an offloaded function sends as one, and catches the failure of, is undone as one; the rest of it is kept."""

    def fail(connection: Any) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES ('undone')")
        raise ZeroDivisionError

    async def run() -> None:
        with pytest.raises(ZeroDivisionError):
            await db.run(fail)

    async def many() -> None:
        with pytest.raises(errors.IntegrityError):
            await db.execute_many(INSERT, [("undone",), ("also undone",), ("before",)])

    async def batch() -> None:
        with pytest.raises(errors.IntegrityError):
            async with db.batch() as batch:
                await batch.execute(INSERT, ("undone",))
                await batch.execute(INSERT, ("before",))

    for failing in (run, many, batch):

        @transactional(offload=True)
        async def work(failing: Any = failing) -> None:
            await add(db, "before")
            await failing()
            await add(db, "behind")

        with case(failing=failing.__name__):
            await work()
            assert engine.committed() == ["before", "behind"]
            await db.execute("DELETE FROM jobs")
    await usable(db)


async def test_what_a_function_is_told_that_awaits_something_else(db: Any, engine: Engine) -> None:
    """It may clean up behind itself, and finds out why; neither what it does then nor what it says undoes the refusal."""
    told: list[str] = []

    @transactional(offload=True)
    async def work() -> str:
        await add(db, "undone")
        try:
            await Suspends()
        except errors.TransactionError as error:
            told.append(str(error))
            await add(db, "also undone")
            return "went through"
        return "went on"

    class Suspends:
        def __await__(self) -> Any:
            yield None

    with pytest.raises(errors.TransactionError, match="awaited something else"):
        await work()
    assert len(told) == 1
    assert "awaited something else" in told[0]
    assert engine.committed() == []
    await usable(db)
