"""Section 4 of the contract: what can be decorated, and what a decorated function still is."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

from database import get_db, transactional, transactional_readonly
from tests.contract.support import Engine, add, errors, gather, in_turn, names

DECORATORS = [
    pytest.param(transactional, id="transactional"),
    pytest.param(transactional(), id="transactional()"),
    pytest.param(transactional(db=("default", "audit"), timeout=1, retries=1), id="with-options"),
    pytest.param(transactional_readonly, id="readonly"),
    pytest.param(transactional_readonly(timeout=1), id="readonly-with-options"),
]


def plain() -> None: ...


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


class Service:
    async def method(self) -> None: ...


class Callable:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize("decorate", DECORATORS)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(plain, id="function"),
        pytest.param(lambda: None, id="lambda"),
        pytest.param(generator, id="generator"),
        pytest.param(async_generator, id="async-generator"),
        pytest.param(Service, id="class"),
        pytest.param(Service(), id="object"),
        pytest.param(Callable(), id="callable-object"),
        pytest.param(functools.partial(plain), id="partial"),
        pytest.param(len, id="builtin"),
        pytest.param(7, id="number"),
    ],
)
def test_only_coroutine_functions(decorate: Any, target: Any) -> None:
    """Anything but a coroutine function raises TypeError where it is decorated, not when it is called."""
    with pytest.raises(TypeError):
        decorate(target)


def test_the_error_names_the_function() -> None:
    """The TypeError says which function was meant and what it would have to be."""
    with pytest.raises(TypeError, match="plain.*") as caught:
        transactional(plain)
    assert "async" in str(caught.value) or "coroutine" in str(caught.value)


@pytest.mark.parametrize("decorate", [transactional, transactional_readonly])
def test_unknown_option(decorate: Any) -> None:
    """An option that does not exist is a TypeError at once."""
    with pytest.raises(TypeError):
        decorate(isolation_levle="serializable")


async def documented(first: int, /, second: str = "b", *rest: int, key: bool, **more: Any) -> dict[str, Any]:
    """What it does."""
    return {"first": first, "second": second, "rest": rest, "key": key, **more}


@pytest.mark.parametrize("decorate", DECORATORS)
def test_the_function_is_kept(decorate: Any) -> None:
    """Name, docstring, module, signature and annotations are those of the function; it is still a coroutine
    function.
    """
    decorated = decorate(documented)
    assert decorated is not documented
    assert decorated.__name__ == "documented"
    assert decorated.__qualname__ == documented.__qualname__
    assert decorated.__doc__ == "What it does."
    assert decorated.__module__ == __name__
    assert decorated.__wrapped__ is documented
    assert inspect.signature(decorated) == inspect.signature(documented)
    assert decorated.__annotations__ == documented.__annotations__
    assert inspect.iscoroutinefunction(decorated)


@pytest.mark.anyio
@in_turn("decorate", [transactional, transactional_readonly, transactional(offload=True)])
async def test_arguments_and_result(db: Any, decorate: Any) -> None:
    """All kinds of arguments, options' names among them, go through, and the result comes back."""
    assert await decorate(documented)(1, "x", 2, 3, key=True, db="mine", timeout=0) == {
        "first": 1,
        "second": "x",
        "rest": (2, 3),
        "key": True,
        "db": "mine",
        "timeout": 0,
    }


def test_decorating_touches_nothing() -> None:
    """Decorating needs no configuration, opens nothing and starts no thread."""
    before = threading.active_count()
    transactional(db="nobody-has-configured-this")(documented)
    get_db("default")
    assert threading.active_count() == before


@pytest.mark.anyio
async def test_calls_at_once_are_apart(db: Any, engine: Engine) -> None:
    """One decorated function called many times at once is a transaction each time."""

    @transactional
    async def create(name: str, fail: bool) -> str:
        await add(db, name)
        await anyio.lowlevel.checkpoint()
        if fail:
            raise LookupError(name)
        return name

    results = await gather(*[lambda n=n: create(str(n), n % 3 == 0) for n in range(9)])
    assert [str(result) for result in results if isinstance(result, str)] == ["1", "2", "4", "5", "7", "8"]
    assert engine.committed() == ["1", "2", "4", "5", "7", "8"]


@pytest.mark.anyio
async def test_stacked_decorators(db: Any, engine: Engine) -> None:
    """Decorators can be stacked; read-only on the inside keeps refusing."""

    @transactional
    @transactional_readonly
    async def look() -> list[str]:
        with pytest.raises(errors.ReadOnlyTransactionError):
            await add(db, "x")
        return await names(db)

    assert await look() == []
    assert engine.committed() == []


@pytest.mark.anyio
async def test_calling_without_awaiting_does_nothing(db: Any) -> None:
    """A decorated call that is closed without having been awaited has opened nothing."""
    coroutine = transactional(documented)(1, key=True)
    coroutine.close()
    assert not db.in_transaction
