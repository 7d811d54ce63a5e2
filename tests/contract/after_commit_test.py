"""`on_commit` and time limits: what runs behind a commit, where, for how long, and what a limit says about it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from database import get_db, transactional, transactional_readonly
from tests.contract.support import (
    HANGING,
    SLOW_SELECT,
    Engine,
    add,
    around_commit,
    errors,
    eventually,
    in_turn,
    names,
    usable,
)

pytestmark = pytest.mark.anyio


class Undo(Exception):
    """Raised by a test to make a transaction roll back."""


class Rude(BaseException):
    """No `Exception`."""


def _decorated(_: Any, body: Callable[[], Any], **options: Any) -> Any:
    @transactional(**options)
    async def work() -> Any:
        return await body()

    return work()


async def _context(db: Any, body: Callable[[], Any], **options: Any) -> Any:
    async with db.transaction(**options):
        return await body()


async def _manual(db: Any, body: Callable[[], Any], timeout: float = 0) -> Any:
    await db.begin()
    try:
        result = await body()
    except BaseException:
        await db.rollback()
        raise
    await db.commit()
    return result


async def _several(db: Any, body: Callable[[], Any], **options: Any) -> Any:
    return await _decorated(db, body, db=("default", "audit"), **options)


async def _offloaded(db: Any, body: Callable[[], Any], **options: Any) -> Any:
    return await _decorated(db, body, offload=True, **options)


async def _retried(db: Any, body: Callable[[], Any], **options: Any) -> Any:
    return await _decorated(db, body, retries=1, **options)


FORMS: dict[str, Any] = {
    "decorator": _decorated,
    "context": _context,
    "manual": _manual,
    "several": _several,
    "offload": _offloaded,
    "retries": _retried,
}


@pytest.mark.parametrize("form", FORMS)
async def test_all_of_them_run(audit: Any, engine: Engine, form: str) -> None:
    """All functions run, in their order, behind the commit, outside it, whatever the first ones raise; the error of the
    first that failed is raised then, one that is no Exception before others.
    """
    db = get_db()
    thread = threading.get_ident()
    for first, second in ((Undo, Undo), (Rude, Undo), (Undo, Rude), (Undo, None), (Rude, None), (None, Rude)):
        seen: list[Any] = []

        def fail(kind: Any, seen: list[Any] = seen) -> None:
            seen.append((threading.get_ident(), db.in_transaction, len(engine.committed())))
            if kind is not None:
                raise kind

        async def last(seen: list[Any] = seen) -> None:
            await anyio.sleep(0)
            fail(None, seen)
            await db.execute("DELETE FROM jobs")

        async def body(first: Any = first, second: Any = second, last: Any = last) -> None:
            await add(db, "a")
            db.on_commit(lambda: fail(first))
            db.on_commit(lambda: fail(second))
            db.on_commit(last)

        raised = Rude if Rude in (first, second) else Undo
        with pytest.raises(raised):
            await FORMS[form](db, body)
        assert seen == [(thread, False, 1)] * 3, (first, second)
        assert engine.committed() == []
    await usable(db)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "manual"])
async def test_outside_the_time_limit(audit: Any, engine: Engine, form: str) -> None:
    """The time of what runs behind the commit does not count: neither is it cut off, nor is anything said to be undone."""
    db = get_db()
    seen: list[str] = []

    async def slow() -> None:
        await anyio.sleep(1.6)
        seen.append("slow")

    async def body() -> str:
        await add(db, "a")
        db.on_commit(slow)
        db.on_commit(lambda: seen.append("after"))
        return "result"

    assert await FORMS[form](db, body, timeout=1.5) == "result"
    assert seen == ["slow", "after"]
    assert engine.committed() == ["a"]


@pytest.mark.parametrize("form", ["decorator", "context", "retries"])
async def test_a_partial_commit_and_the_time_limit(db: Any, engine: Engine, form: str) -> None:
    """Behind a partial commit likewise; the limit goes on afterwards, and its error says what is kept."""
    seen: list[str] = []

    async def slow() -> None:
        assert not db.in_transaction
        await anyio.sleep(1.6)
        seen.append("slow")

    async def body() -> None:
        await add(db, "kept")
        db.on_commit(slow)
        await db.commit()
        assert seen == ["slow"]
        await add(db, "undone")
        await anyio.sleep_forever()

    with anyio.fail_after(HANGING), pytest.raises(errors.TransactionTimeoutError) as caught:
        await FORMS[form](db, body, timeout=1.5)
    assert "commit()" in str(caught.value), "what was committed is kept"
    assert engine.committed() == ["kept"]
    await usable(db)


@pytest.mark.any_loop
async def test_a_partial_commit_of_an_offloaded_function_and_the_time_limit(db: Any, engine: Engine) -> None:
    """The same where the function runs on the database's thread, in the middle of a statement."""

    async def body() -> None:
        await add(db, "kept")
        await db.commit()
        await add(db, "undone")
        await db.fetch_value(SLOW_SELECT)

    await FORMS["offload"](db, lambda: db.fetch_value("SELECT 1"), timeout=HANGING)  # what is done once has been done
    with anyio.fail_after(HANGING), pytest.raises(errors.TransactionTimeoutError) as caught:
        await FORMS["offload"](db, body, timeout=1.5)
    assert "commit()" in str(caught.value), "what was committed is kept"
    assert engine.committed() == ["kept"]
    await usable(db)


@pytest.mark.parametrize("propagation", ["supports", "not_supported", "never"])
async def test_a_time_limit_without_a_transaction(db: Any, engine: Engine, propagation: Any) -> None:
    """Where no transaction is open, nothing is said to be rolled back."""

    async def body() -> None:
        await add(db, "kept")
        await anyio.sleep_forever()

    for form in ("decorator", "context"):
        with anyio.fail_after(HANGING), pytest.raises(errors.TransactionTimeoutError) as caught:
            await FORMS[form](db, body, timeout=1, propagation=propagation)
        assert "has been rolled back" not in str(caught.value)
        assert engine.committed() == ["kept"]
        await db.execute("DELETE FROM jobs")
    await usable(db)


@pytest.mark.parametrize("offload", [False, True], ids=["inside", "offload"])
async def test_a_time_limit_for_all_retries(db: Any, engine: Engine, offload: bool) -> None:
    """`timeout` is for all of it, however often it is run."""
    runs = 0

    @transactional(timeout=1.5, retries=1000, offload=offload)
    async def work() -> None:
        nonlocal runs
        runs += 1
        await add(db, "a")
        if not offload:
            await anyio.sleep(0.4)
        raise errors.DatabaseBusyError("somebody else's lock")

    if offload:
        with anyio.fail_after(HANGING), pytest.raises((errors.TransactionTimeoutError, errors.DatabaseBusyError)):
            await work()
    else:
        with anyio.fail_after(HANGING), pytest.raises(errors.TransactionTimeoutError):
            await work()
        assert 1 < runs <= 5
    assert engine.committed() == []
    await usable(db)


async def test_cancelled_while_they_run(db: Any, engine: Engine) -> None:
    """A cancellation strikes the function that is running; those behind it run all the same."""
    seen: list[str] = []

    async def forever() -> None:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")

    async def after() -> None:
        await anyio.sleep(0.01)
        seen.append("after")

    with anyio.fail_after(HANGING):
        with anyio.CancelScope() as scope:
            async with db.transaction():
                await add(db, "a")
                db.on_commit(forever)
                db.on_commit(after)
                db.on_commit(lambda: seen.append("last"))
    assert scope.cancelled_caught
    assert seen == ["cancelled", "after", "last"]
    assert engine.committed() == ["a"]
    await usable(db)


async def test_a_partial_commit_of_an_offloaded_function(db: Any, engine: Engine) -> None:
    """What is to run behind a partial commit runs on the loop, outside the transaction: not on the worker's thread, not
    into the next part, and also when the rest fails; what belongs to the part that failed does not run.
    """
    for fail in (False, True):
        seen: list[Any] = []

        async def callback(name: str, seen: list[Any] = seen) -> None:
            seen.append((name, threading.get_ident()))
            assert not db.in_transaction
            await add(db, f"behind {name}")

        @transactional(offload=True)
        async def work(fail: bool = fail, callback: Any = callback) -> None:
            await add(db, "first")
            db.on_commit(lambda: callback("first"))
            await db.commit()
            await add(db, "second")
            db.on_commit(lambda: callback("second"))
            if fail:
                raise Undo

        if fail:
            with pytest.raises(Undo):
                await work()
        else:
            await work()
        parts = ["first"] if fail else ["first", "second"]
        assert seen == [(name, threading.get_ident()) for name in parts]
        assert engine.committed() == sorted([*parts, *(f"behind {name}" for name in parts)])
        await db.execute("DELETE FROM jobs")
    await usable(db)


async def test_a_partial_commit_runs_them_outside(db: Any, engine: Engine) -> None:
    """What a function behind a partial commit writes is its own, and stays when the next part is undone."""

    async def callback() -> None:
        assert not db.in_transaction
        await add(db, "callback")
        async with db.transaction():
            await add(db, "callback's transaction")

    with pytest.raises(Undo):
        async with db.transaction():
            await add(db, "first")
            db.on_commit(callback)
            await db.commit()
            assert db.in_transaction
            await add(db, "second")
            raise Undo
    assert engine.committed() == ["callback", "callback's transaction", "first"]


async def test_asked_for_on_the_databases_thread(audit: Any, engine: Engine) -> None:
    """Code of the user's that runs on the database's own thread has no transaction of its task's around it: there it is
    refused, instead of being run at once, on that thread, whatever becomes of the work.
    """
    db = get_db()
    seen: list[int] = []
    insert = "INSERT INTO jobs (name) VALUES (:name)"

    def later() -> None:
        seen.append(threading.get_ident())

    async def later_too() -> None:
        later()

    def run(connection: Any) -> None:
        connection.execute("INSERT INTO jobs (name) VALUES ('undone')")
        db.on_commit(later)

    def generator() -> Any:
        yield {"name": "undone"}
        db.on_commit(later)

    def record(**_columns: Any) -> Any:
        db.on_commit(later)

    @transactional(offload=True)
    async def another() -> None:
        await add(db, "undone")
        audit.on_commit(later_too)

    @transactional(offload=True)
    async def outside() -> None:
        await add(db, "undone")
        with db.detached():
            db.on_commit(later)

    for call in (
        lambda: db.run(run),
        lambda: db.run(lambda _: db.on_commit(later_too)),
        lambda: db.run(lambda _: audit.on_commit(later), readonly=True),
        lambda: db.execute_many(insert, generator()),
        lambda: db.fetch_all("INSERT INTO item (value) VALUES ('done') RETURNING id", record_class=record),
        another,
        outside,
    ):
        with pytest.raises(errors.TransactionError, match="on_commit"):
            await call()
    assert seen == []
    assert engine.committed() == engine.committed("audit") == []
    await usable(db)


@in_turn("behind", ["nothing more", "more", "an error that passes"])
async def test_a_partial_commit_that_is_cancelled(
    db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    """A cancellation strikes while a part is being committed, which goes through: what is to run behind it runs, and the
    function, having left something behind, is not run again.
    """
    seen: list[str] = []
    begun, go_on = threading.Event(), threading.Event()
    await add(db, "before")

    def wait() -> None:
        begun.set()
        go_on.wait(HANGING)

    async def cancel(scope: anyio.CancelScope) -> None:
        await eventually(begun.is_set)
        scope.cancel()
        await anyio.sleep(0)  # it has struck
        go_on.set()

    @transactional(retries=1)
    async def work() -> None:
        seen.append("work")
        await add(db, "part")
        db.on_commit(lambda: seen.append("part"))
        with monkeypatch.context() as patch:
            around_commit(patch, db, before=wait)
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope:
                    tasks.start_soon(cancel, scope)
                    await db.commit()
                    await anyio.sleep(0)  # trio lets what has been committed return, and cancels here
        assert scope.cancelled_caught
        assert engine.committed() == ["before", "part"]
        assert seen == ["work", "part"]
        if behind != "nothing more":
            await add(db, "more")
            db.on_commit(lambda: seen.append("more"))
        if behind == "an error that passes":
            raise errors.DatabaseBusyError("somebody's lock")

    if behind == "an error that passes":
        with pytest.raises(errors.DatabaseBusyError):
            await work()
    else:
        await work()
    more = ["more"] if behind == "more" else []
    assert seen == ["work", "part", *more]
    assert engine.committed() == ["before", *more, "part"]
    await usable(db)


async def test_an_offloaded_commit_within_a_transaction(db: Any, engine: Engine) -> None:
    """There `commit()` keeps what was done so far within the caller's transaction, which alone can make it permanent."""
    seen: list[str] = []

    @transactional(offload=True)
    async def inner(fail: bool) -> None:
        await add(db, f"kept {fail}")
        db.on_commit(lambda: seen.append(f"kept {fail}"))
        await db.commit()
        await add(db, f"more {fail}")
        db.on_commit(lambda: seen.append(f"more {fail}"))
        if fail:
            raise Undo

    async with db.transaction():
        await inner(False)
        with pytest.raises(Undo):
            await inner(True)
        assert engine.committed() == []
        assert seen == []
    assert engine.committed() == ["kept False", "kept True", "more False"]
    assert seen == ["kept False", "more False", "kept True"]
    with pytest.raises(Undo):
        async with db.transaction():
            await db.execute("DELETE FROM jobs")
            await inner(False)
            raise Undo
    assert engine.committed() == ["kept False", "kept True", "more False"]


async def test_a_level_that_takes_too_long_within_a_transaction(db: Any, engine: Engine) -> None:
    """The limit of a nested level undoes that level."""
    async with db.transaction():
        await add(db, "outer")
        with pytest.raises(errors.TransactionTimeoutError):
            async with db.transaction(timeout=0.05):
                await add(db, "inner")
                await anyio.sleep(5)
    assert engine.committed() == ["outer"]


async def test_a_limited_helper_of_an_offloaded_function(db: Any, engine: Engine) -> None:
    """A function with a time limit works inside an offloaded one; where it has taken too long, it is undone."""

    @transactional(timeout=30)
    async def quick() -> None:
        await add(db, "quick")

    @transactional(timeout=0.01)
    async def slow() -> None:
        await add(db, "slow")
        event = threading.Event()
        event.wait(0.05)

    @transactional_readonly(timeout=30)
    async def look() -> list[str]:
        return await names(db)

    @transactional(offload=True)
    async def work() -> list[str]:
        await quick()
        async with db.transaction(timeout=30):
            await add(db, "block")
        try:
            await slow()
        except errors.TransactionTimeoutError:
            await add(db, "went on")
        return await look()

    assert sorted(await work()) == ["block", "quick", "went on"]
    assert engine.committed() == ["block", "quick", "went on"]
    await usable(db)


async def test_what_ran_into_the_limit(db: Any, engine: Engine) -> None:
    """An ordinary limit says what it always said."""
    for form in ("decorator", "context", "retries"):
        with pytest.raises(errors.TransactionTimeoutError, match="has been rolled back"):
            await FORMS[form](db, lambda: db.fetch_value(SLOW_SELECT), timeout=0.05)
    await usable(db)
