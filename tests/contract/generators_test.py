"""A transaction held by a generator that somebody leaves, closes or forgets: the task that opened it goes on."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest

from tests.contract.support import Engine, add, collected, errors, names, usable

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")]

Rows = AsyncGenerator[int, None]
Hold = Callable[[Any, str], Rows]


async def _transaction(db: Any, name: str) -> Rows:
    async with db.transaction():
        await add(db, name)
        for number in itertools.count():
            yield number


async def _readonly(db: Any, name: str) -> Rows:
    async with db.transaction(readonly=True):
        await names(db)
        yield 0
        yield 1


async def _not_supported(db: Any, name: str) -> Rows:
    async with db.transaction(propagation="not_supported"):
        yield 0
        yield 1


async def _detached(db: Any, name: str) -> Rows:
    with db.detached():
        yield 0
        yield 1


async def _manual(db: Any, name: str) -> Rows:
    level = await db.begin()
    try:
        await add(db, name)
        yield 0
        yield 1
    finally:
        await level.abandon()


async def _limited(db: Any, name: str) -> Rows:
    async with db.transaction(timeout=60):
        await add(db, name)
        yield 0
        yield 1


HOLDING: dict[str, Hold] = {
    "transaction": _transaction,
    "readonly": _readonly,
    "not_supported": _not_supported,
    "detached": _detached,
    "manual": _manual,
}


async def _break(rows: Rows) -> None:
    async for _ in rows:
        break
    await rows.aclose()


async def _error(rows: Rows) -> None:
    with pytest.raises(ZeroDivisionError):
        await rows.athrow(ZeroDivisionError)


async def _by_another_task(rows: Rows) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rows.aclose)


async def _error_by_another_task(rows: Rows) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_error, rows)


LEAVING: dict[str, Callable[[Rows], Awaitable[None]]] = {
    "break": _break,
    "error": _error,
    "another task": _by_another_task,
    "an error by another task": _error_by_another_task,
}


async def _leaves_everybody_where_he_was(
    db: Any, engine: Engine, around: str, cases: dict[str, Callable[[], Awaitable[None]]]
) -> None:
    """In each case, a generator is iterated over and left; what is executed next belongs to the level around it."""
    expected: list[str] = []

    async def check() -> None:
        for case, leave in cases.items():
            await leave()
            assert db.in_transaction == (around == "inside"), case
            await add(db, f"behind {case}")
            expected.append(f"behind {case}")
            if around == "outside":
                assert f"behind {case}" in engine.committed(), case
            else:
                assert engine.committed() == [], case
            async with db.transaction():
                await names(db)

    if around == "outside":
        await check()
    else:
        async with db.transaction():
            await check()
    assert not db.in_transaction
    assert engine.committed() == sorted(expected)
    await usable(db)


@pytest.mark.parametrize("around", ["outside", "inside"])
async def test_left_generator(db: Any, engine: Engine, around: str) -> None:
    """Whoever ends a generator, and however: the task that began it is back at the level around it."""

    async def left(hold: Hold, leave: Callable[[Rows], Awaitable[None]], case: str) -> None:
        rows = hold(db, f"held {case}")
        assert await rows.__anext__() == 0
        await leave(rows)

    cases = {
        f"{holding} {leaving}": partial(left, hold, leave, f"{holding} {leaving}")
        for (holding, hold), (leaving, leave) in itertools.product(HOLDING.items(), LEAVING.items())
    }
    await _leaves_everybody_where_he_was(db, engine, around, cases)


async def _stacked(db: Any, name: str) -> Rows:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(db.transaction())
        await add(db, name)
        yield 0


async def _by_hand_elsewhere(db: Any, name: str) -> Rows:
    async def begin() -> Any:
        return await db.begin()

    level = await begin()
    try:
        await add(db, name)
        yield 0
    finally:
        await level.abandon()


async def _managed(db: Any, name: str) -> Rows:
    @contextlib.asynccontextmanager
    async def transaction() -> Any:
        async with db.transaction():
            yield

    async with transaction():
        await add(db, name)
        yield 0


class _Unit:
    """A unit of work, as people write them."""

    def __init__(self, db: Any, **options: Any) -> None:
        self.transaction = db.transaction(**options)

    async def __aenter__(self) -> _Unit:
        await self.transaction.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self.transaction.__aexit__(*error)


class _LaterUnit(_Unit):
    """One that asks for its transaction when it is entered, through a base class."""

    def __init__(self, db: Any) -> None:
        self.db = db

    async def __aenter__(self) -> _Unit:
        self.transaction = self.db.transaction(timeout=60)
        return await super().__aenter__()


class _Stack(contextlib.AsyncExitStack):
    """Another way to write one."""

    def __init__(self, db: Any) -> None:
        super().__init__()
        self.db = db

    async def __aenter__(self) -> _Stack:
        await super().__aenter__()
        await self.enter_async_context(self.db.transaction())
        return self


async def _in_a_unit(db: Any, name: str, unit: Any = _Unit) -> Rows:
    async with unit(db):
        await add(db, name)
        yield 0
        yield 1


async def _by_a_function(db: Any, name: str) -> Rows:
    def transaction() -> Any:
        return db.transaction()

    async with transaction():
        await add(db, name)
        yield 0


async def _by_a_coroutine(db: Any, name: str) -> Rows:
    stack = contextlib.AsyncExitStack()

    async def enter() -> None:
        await stack.enter_async_context(db.transaction())

    await enter()
    async with stack:
        await add(db, name)
        yield 0


async def _detached_by_a_manager(db: Any, name: str) -> Rows:
    @contextlib.contextmanager
    def outside() -> Any:
        with db.detached():
            yield

    with outside():
        yield 0


async def _in_a_unit_by_hand(db: Any, name: str) -> Rows:
    await db.begin()
    try:
        await add(db, name)
        yield 0
    except BaseException:
        await db.rollback()  # says nothing, though all has been undone when Python gets to it
        raise
    await db.commit()


async def _in_a_readonly_unit(db: Any, name: str) -> Rows:
    async with _Unit(db, readonly=True):
        await names(db)
        yield 0


async def _one_after_the_other(db: Any, name: str) -> Rows:
    for number in range(3):
        async with db.transaction():
            await add(db, f"{name}, {number}")
            yield number
    yield 3


async def _wrapped(rows: Rows) -> Rows:
    async for number in rows:
        yield number


async def _leave_by_break(make: Callable[[], Rows]) -> None:
    async for _ in make():
        break


async def _leave_by_error(make: Callable[[], Rows]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in make():
            raise ZeroDivisionError


async def _leave_by_return(make: Callable[[], Rows]) -> None:
    async def first() -> int:
        async for number in make():
            return number
        raise AssertionError

    assert await first() == 0


async def _leave_a_wrapper(make: Callable[[], Rows]) -> None:
    async for _ in _wrapped(_wrapped(make())):
        break


NOT_CLOSED = [_leave_by_break, _leave_by_error, _leave_by_return, _leave_a_wrapper]
HELD_ONLY_BY_ITS_CONSUMER = HOLDING | {
    "limited": _limited,
    "stacked": _stacked,
    "by hand elsewhere": _by_hand_elsewhere,
    "managed": _managed,
    "unit": _in_a_unit,
    "later unit": partial(_in_a_unit, unit=_LaterUnit),
    "stack": partial(_in_a_unit, unit=_Stack),
    "unit by hand": _in_a_unit_by_hand,
    "readonly unit": _in_a_readonly_unit,
    "by a function": _by_a_function,
    "by a coroutine": _by_a_coroutine,
    "detached by a manager": _detached_by_a_manager,
    "one after the other": _one_after_the_other,
}


@pytest.mark.parametrize("around", ["outside", "inside"])
async def test_left_and_not_closed_yet(db: Any, engine: Engine, around: str) -> None:
    """Who breaks off is at once where he was before, though Python closes the generator only later: what he executes next
    is not part of what will be rolled back."""
    cases = {
        f"{holding} {leave.__name__}": partial(leave, partial(hold, db, f"held {holding} {leave.__name__}"))
        for (holding, hold), leave in itertools.product(HELD_ONLY_BY_ITS_CONSUMER.items(), NOT_CLOSED)
    }
    await _leaves_everybody_where_he_was(db, engine, around, cases)


async def test_a_generator_without_a_transaction(db: Any, engine: Engine) -> None:
    """Where its propagation means that there is none, a generator executes by itself, and nothing ends with it."""

    async def rows(propagation: Any) -> Rows:
        async with db.transaction(propagation=propagation):
            for number in range(3):
                await add(db, f"{propagation} {number}")
                yield number

    for propagation in ("supports", "never", "not_supported"):
        async for number in rows(propagation):
            assert not db.in_transaction
            if number == 1:
                break
        assert not db.in_transaction
        assert engine.committed() == [f"{propagation} {number}" for number in range(2)]
        await db.execute("DELETE FROM jobs")
    await usable(db)


@pytest.mark.parametrize("propagation", ["required", "supports", "mandatory"])
async def test_left_while_it_takes_part(db: Any, engine: Engine, propagation: Any) -> None:
    """A generator that takes part in its consumer's transaction has not failed when it is left: nothing is doomed by that,
    whenever Python closes it. An error that is thrown into it is another matter.
    """

    async def rows(name: str) -> Rows:
        async with db.transaction(propagation=propagation):
            await add(db, name)
            yield 0

    async with db.transaction():
        await _leave_by_break(lambda: rows("left"))
        for _ in range(5):
            await anyio.sleep(0)
        await add(db, "behind")
        closed = rows("closed")
        await closed.__anext__()
        await closed.aclose()
        await add(db, "behind closed")
    kept = ["behind", "behind closed", "closed", "left"]
    assert engine.committed() == kept
    with pytest.raises(errors.TransactionError, match="ZeroDivisionError"):
        async with db.transaction():
            thrown = rows("thrown into")
            await thrown.__anext__()
            await _error(thrown)
    assert engine.committed() == kept
    await usable(db)


async def test_what_goes_on_is_not_left(db: Any, engine: Engine) -> None:
    """A generator that somebody still refers to keeps its transaction, and so does one that a context manager is made of."""

    @contextlib.asynccontextmanager
    async def transaction() -> Any:
        async with db.transaction():
            yield

    async with transaction():
        gc.collect()
        await add(db, "managed")
    assert engine.committed() == ["managed"]
    rows = _one_after_the_other(db, "kept")
    async for _ in rows:
        break
    gc.collect()
    assert db.in_transaction
    assert [number async for number in rows] == [1, 2, 3]
    assert engine.committed() == ["kept, 0", "kept, 1", "kept, 2", "managed"]
    assert not db.in_transaction
    await usable(db)


@pytest.mark.parametrize("hold", [pytest.param(hold, id=name) for name, hold in HOLDING.items() if name != "manual"])
async def test_generator_that_became_garbage(db: Any, engine: Engine, hold: Hold) -> None:
    """Nor does it matter that the collector ends it, in a task of nobody's."""
    rows = hold(db, "held")
    await rows.__anext__()
    inside = db.in_transaction
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del rows
        gc.collect()
        await collected(lambda: inside is False or not db.in_transaction, "the end of the transaction")
        for _ in range(5):
            await anyio.sleep(0)
    await add(db, "behind")
    assert engine.committed() == ["behind"]
    await usable(db)


@pytest.mark.parametrize("around", ["outside", "inside"])
async def test_two_generators_in_any_order(db: Any, engine: Engine, around: str) -> None:
    """Two that were begun one within the other, and are closed in the wrong order, leave the task where it was."""
    if engine.name == "postgresql":
        pytest.skip("three connections at once; this is not about them")
    wrong: list[Any] = []

    async def check() -> None:
        for first, second in itertools.product(HOLDING, HOLDING):
            if second in ("transaction", "manual") and (
                first == "readonly" or (around == "inside" and first in ("not_supported", "detached"))
            ):
                continue  # not possible at all
            a, b = HOLDING[first](db, "a"), HOLDING[second](db, "b")
            await a.__anext__()
            try:
                await b.__anext__()
                await a.aclose()
                await b.aclose()
            except Exception as error:
                wrong.append((first, second, error))
            if db.in_transaction != (around == "inside"):
                wrong.append((first, second))
            await add(db, "behind")
            await db.execute("DELETE FROM jobs WHERE name = 'behind'")

    if around == "outside":
        await check()
    else:
        async with db.transaction():
            await check()
    assert not wrong
    assert engine.committed() == []
    await usable(db)


async def test_the_outer_one_ends_first(db: Any, engine: Engine) -> None:
    """The outer of two levels of one task that ends well before the inner one is refused at once, for nobody can say
    what would have to be kept; all is undone, and the task goes on.
    """

    async def hold(name: str) -> Rows:
        async with db.transaction():
            await add(db, name)
            yield 0

    a, b = hold("a"), hold("b")
    await a.__anext__()
    await b.__anext__()
    with anyio.fail_after(2), pytest.raises(errors.TransactionError, match="still open"):
        await a.__anext__()
    with pytest.raises(errors.TransactionError):
        await b.__anext__()
    assert not db.in_transaction
    await add(db, "behind")
    assert engine.committed() == ["behind"]

    with anyio.fail_after(2), pytest.raises(errors.TransactionError, match="still open"):
        async with db.transaction():
            await db.begin()
            await add(db, "forgotten")
    assert not db.in_transaction
    with anyio.fail_after(2), pytest.raises(errors.TransactionError, match="still open"):
        async with db.transaction() as outer:
            async with db.transaction():
                await outer.commit()
    assert engine.committed() == ["behind"]
    await usable(db)


async def test_a_child_of_what_a_generator_held(db: Any, engine: Engine) -> None:
    """A task that was started inside is told all the same that the transaction is over."""
    rows = _transaction(db, "held")
    await rows.__anext__()
    over = anyio.Event()

    async def child() -> None:
        await over.wait()
        assert not db.in_transaction
        with pytest.raises(errors.TransactionError):
            await add(db, "late")
        with db.detached():
            await add(db, "detached")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
        await anyio.sleep(0)
        await rows.aclose()
        over.set()
    await add(db, "behind")
    assert engine.committed() == ["behind", "detached"]


async def test_a_level_whose_transaction_was_undone(db: Any, engine: Engine) -> None:
    """A nested level of another task that ends well after its transaction has been undone does not pass for kept."""
    begun, over = anyio.Event(), anyio.Event()
    outcome: list[Any] = []

    async def child() -> None:
        try:
            async with db.transaction():
                await add(db, "child")
                begun.set()
                await over.wait()
        except errors.TransactionError as error:
            outcome.append(error)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(ZeroDivisionError):
            async with db.transaction():
                await add(db, "parent")
                tasks.start_soon(child)
                await begun.wait()
                raise ZeroDivisionError
        over.set()
    assert len(outcome) == 1
    assert engine.committed() == []
    await usable(db)
