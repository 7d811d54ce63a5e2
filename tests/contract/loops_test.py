"""A transaction belongs to its event loop: what happens to calls from another one, or from a worker's thread."""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from database import get_db, transactional, transactional_readonly
from tests.contract.support import Engine, add, errors, names, usable

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

Call = Callable[[Any], Awaitable[Any]]


async def _stream(db: Any) -> None:
    async with db.stream("SELECT name FROM jobs") as rows:
        async for _ in rows:
            pass


async def _batch(db: Any) -> None:
    async with db.batch() as batch:
        await batch.execute("INSERT INTO jobs (name) VALUES ('elsewhere')")


async def _nested(db: Any, **options: Any) -> None:
    async with db.transaction(**options):
        await add(db, "elsewhere")


async def _on_commit(db: Any) -> None:
    db.on_commit(lambda: None)


@transactional
async def _decorated() -> None:
    await add(get_db(), "elsewhere")


@transactional(offload=True)
async def _offloaded() -> None:
    await add(get_db(), "elsewhere")


@transactional_readonly(offload=True)
async def _offloaded_readonly() -> None:
    await names(get_db())


INSERT = "INSERT INTO jobs (name) VALUES (?)"
CALLS: dict[str, Call] = {
    "execute": lambda db: add(db, "elsewhere"),
    "fetch_all": names,
    "fetch_value": lambda db: db.fetch_value("SELECT 1"),
    "execute_many": lambda db: db.execute_many(INSERT, [("elsewhere",)]),
    "execute_script": lambda db: db.execute_script("INSERT INTO jobs (name) VALUES ('elsewhere')"),
    "stream": _stream,
    "batch": _batch,
    "run": lambda db: db.run(lambda connection: None),
    "run readonly": lambda db: db.run(lambda connection: None, readonly=True),
    "nested": _nested,
    "required": lambda db: _nested(db, propagation="required"),
    "mandatory": lambda db: _nested(db, propagation="mandatory"),
    "supports": lambda db: _nested(db, propagation="supports"),
    "begin": lambda db: db.begin(),
    "begin readonly": lambda db: db.begin(True),
    "commit": lambda db: db.commit(),
    "rollback": lambda db: db.rollback(),
    "flush": lambda db: db.flush(),
    "on_commit": _on_commit,
    "decorated": lambda _: _decorated(),
    "offloaded": lambda _: _offloaded(),
    "offloaded readonly": lambda _: _offloaded_readonly(),
}


def on_another_loop(backend: str, call: Call, db: Any) -> dict[str, Any]:
    """Runs the call on an event loop of its own, in the context in which this is called; its outcome."""
    found: dict[str, Any] = {}

    async def main() -> None:
        found["in_transaction"] = db.in_transaction
        try:
            with anyio.fail_after(4):
                found["result"] = await call(db)
        except Exception as error:
            found["error"] = error

    anyio.run(main, backend=backend)
    return found


async def test_a_transaction_from_another_loop(db: Any, engine: Engine, anyio_backend_name: str) -> None:
    """Whatever is called in another thread's event loop, with the transaction's context, is refused at once, and
    sends nothing.
    """
    wrong: dict[str, Any] = {}
    seen: list[str] = []
    async with db.transaction() as tx:
        await add(db, "inside")
        db.on_commit(lambda: seen.append("committed"))
        calls = CALLS | {"tx.commit": lambda _: tx.commit(), "tx.rollback": lambda _: tx.rollback()}
        for name, call in calls.items():
            with anyio.fail_after(8):
                found = await anyio.to_thread.run_sync(on_another_loop, anyio_backend_name, call, db)
            if type(found.get("error")) is not errors.TransactionError or found["in_transaction"]:
                wrong[name] = found
        assert engine.committed() == []
        await add(db, "inside too")
    assert not wrong
    assert engine.committed() == ["inside", "inside too"]
    assert seen == ["committed"]
    await usable(db)


async def test_detached_on_another_loop(db: Any, engine: Engine, anyio_backend_name: str) -> None:
    """`detached()` steps outside there as well: what follows goes to the other loop's own pool."""

    async def outside(db: Any) -> Any:
        with db.detached():
            found = await names(db)
        await db.close()
        return found

    await add(db, "before")
    async with db.transaction():
        await add(db, "inside")
        found = await anyio.to_thread.run_sync(on_another_loop, anyio_backend_name, outside, db)
        assert found.get("result") == ["before"], found
    assert engine.committed() == ["before", "inside"]


async def test_ended_on_another_loop(db: Any, engine: Engine, anyio_backend_name: str) -> None:
    """A block that another loop tries to end, and a stream that it reads, are refused there; here they go on."""
    await add(db, "before")
    transaction = db.transaction()
    await transaction.__aenter__()
    await add(db, "inside")
    stream = db.stream("SELECT name FROM jobs")
    with db.detached():
        async with stream:
            found = await anyio.to_thread.run_sync(
                on_another_loop, anyio_backend_name, lambda _: stream.__anext__(), db
            )
            assert type(found.get("error")) is errors.TransactionError, found
            assert [row["name"] async for row in stream] == ["before"]
    found = await anyio.to_thread.run_sync(
        on_another_loop, anyio_backend_name, lambda _: transaction.__aexit__(None, None, None), db
    )
    assert type(found.get("error")) is errors.TransactionError, found
    await add(db, "inside too")
    await transaction.__aexit__(None, None, None)
    assert engine.committed() == ["before", "inside", "inside too"]
    await usable(db)


@pytest.mark.parametrize("inside", ["outside", "write", "readonly"])
async def test_another_database_from_a_workers_thread(audit: Any, engine: Engine, inside: str) -> None:
    """An offloaded function and a `db.run` function that call another database are told so, before anything of it is
    executed, also where the caller has a transaction open on it.
    """
    db = get_db()
    wrong: list[Any] = []

    def drive(coroutine: Any) -> None:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            wrong.append(stop.value)
        finally:
            coroutine.close()

    @transactional(offload=True)
    async def offloaded(call: Call) -> None:
        await call(audit)

    async def attempts() -> None:
        for name, call in CALLS.items():
            if name in ("decorated", "offloaded", "offloaded readonly"):  # of the offloaded function's own database
                continue
            if inside == "outside" and name in ("commit", "rollback", "on_commit", "mandatory"):
                continue
            try:
                with anyio.fail_after(4):
                    await offloaded(call)
                wrong.append(name)
            except errors.TransactionError:
                pass
            except Exception as error:
                wrong.append((name, error))
            if name in ("execute", "fetch_all"):
                with pytest.raises(errors.TransactionError):
                    await db.run(lambda _, call=call: drive(call(audit)))

    if inside == "outside":
        await attempts()
    else:
        async with audit.transaction(readonly=inside == "readonly"):
            assert await names(audit) == []
            await attempts()
            assert await names(audit) == []
    assert not wrong
    assert engine.committed("audit") == []
    assert engine.committed() == []
    await usable(audit)
    await usable(db)


async def test_a_thread_of_an_offloaded_function(db: Any, engine: Engine) -> None:
    """A thread that an offloaded function starts does not reach its connection."""
    found: list[Any] = []

    def elsewhere() -> None:
        for call in (lambda: add(db, "elsewhere"), lambda: names(db), lambda: _batch(db), lambda: _decorated()):
            try:
                asyncio.run(call())
                found.append("went through")
            except errors.TransactionError:
                pass
            except Exception as error:
                found.append(error)

    @transactional(offload=True)
    async def work() -> None:
        await add(db, "inside")
        thread = threading.Thread(target=contextvars.copy_context().run, args=(elsewhere,))
        thread.start()
        thread.join()
        await add(db, "inside too")

    with anyio.fail_after(8):
        await work()
    assert found == []
    assert engine.committed() == ["inside", "inside too"]
    await usable(db)


@pytest.mark.skipif(importlib.util.find_spec("trio") is None, reason="trio is not installed")
def test_trio_as_a_guest(configured: Callable[..., None], engine: Engine) -> None:
    """Called from the host of a guest run, `db` is the host's: its own pool, or refused within the guest's
    transaction; never a call that nobody answers.
    """
    import trio

    configured()
    db = engine.public.get_db()
    found: dict[str, Any] = {}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        await db.execute_script(engine.schema)

        async def host(what: str, done: trio.Event, token: Any) -> None:
            try:
                async with asyncio.timeout(4):
                    found[what] = await names(db)
            except Exception as error:
                found[what] = error
            token.run_sync_soon(done.set)

        async def guest() -> None:
            token = trio.lowlevel.current_trio_token()
            outside = contextvars.copy_context()
            async with db.transaction():
                await add(db, "guest")
                for what, context in (("inside", contextvars.copy_context()), ("outside", outside)):
                    done = trio.Event()
                    tasks.append(loop.create_task(host(what, done, token), context=context))
                    await done.wait()

        tasks: list[Any] = []
        outcomes: list[Any] = []
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: (outcomes.append(outcome), over.set()),
        )
        async with asyncio.timeout(12):
            await over.wait()
        outcomes[0].unwrap()
        await db.close()

    asyncio.run(main())
    assert type(found["inside"]) is errors.TransactionError
    assert found["outside"] == []
    assert engine.committed() == ["guest"]
