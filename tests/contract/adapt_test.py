"""`db.adapt`: how types of the user's are stored, by every way that parameters go, on every engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import pytest

from tests.contract.support import Engine, errors, gather

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

BY_POSITION = "INSERT INTO item (value) VALUES (?)"
BY_NAME = "INSERT INTO item (value) VALUES (:value)"


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


class Tip(Money):
    pass


class Fee(Enum):
    LOW = Money(11)


@dataclass
class Holder:
    value: Any


@contextmanager
def adapting(db: Any) -> Iterator[None]:
    try:
        db.adapt(Money, lambda money: f"{money.cents} ct")
        db.adapt(
            PurePosixPath, lambda path: Money(len(path.parts)).cents and path.name
        )  # in place of the package's own
        db.adapt(date, lambda day: day.year)
        db.adapt(dict, json.dumps)
        db.adapt(list, json.dumps)
        db.adapt(set, sorted)  # and that is stored as the package itself stores it
        yield
    finally:
        db.binding.declared.adapters.clear()


async def values(db: Any) -> list[Any]:
    found = [row["value"] for row in await db.fetch_all("SELECT value FROM item ORDER BY id")]
    await db.execute("DELETE FROM item")
    return found


async def test_every_way_of_parameters(db: Any) -> None:
    """A value is stored as its type's function says, those of subclasses and of Enums' members too, whichever call it is
    given to, alone, in a transaction, or together with others.
    """
    given = [Money(5), Tip(6), Fee.LOW, PurePosixPath("/a/b"), date(2024, 5, 6), {"a": [1]}, [1, None], None, "x"]
    wanted = ["5 ct", "6 ct", "11 ct", "b", "2024", '{"a": [1]}', "[1, null]", None, "x"]

    async def batched(db: Any) -> None:
        async with db.batch() as batch:
            for value in given:
                await batch.execute(BY_POSITION, (value,))

    async def one_by_one(db: Any, sql: str, shape: Any) -> None:
        for value in given:
            await db.execute(sql, shape(value))

    ways: dict[str, Any] = {
        "by position": lambda: one_by_one(db, BY_POSITION, lambda value: (value,)),
        "by name": lambda: one_by_one(db, BY_NAME, lambda value: {"value": value}),
        "by attribute": lambda: one_by_one(db, BY_NAME, Holder),
        "many tuples": lambda: db.execute_many(BY_POSITION, [(value,) for value in given]),
        "many mappings of a generator": lambda: db.execute_many(BY_NAME, ({"value": value} for value in given)),
        "many objects": lambda: db.execute_many(BY_NAME, list(map(Holder, given))),
        "batch": lambda: batched(db),
    }
    with adapting(db):
        for name, way in ways.items():
            await way()
            assert await values(db) == wanted, name
            async with db.transaction():
                await way()
            assert await values(db) == wanted, f"{name}, in a transaction"
        await gather(*(lambda n=n: db.execute(BY_POSITION, (Money(n),)) for n in range(50)))  # that may share a commit
        assert sorted(await values(db)) == sorted(f"{n} ct" for n in range(50))
        assert (await db.execute_many(BY_POSITION, [(Money(n),) for n in range(1000)])).rowcount == 1000
        assert await values(db) == [f"{n} ct" for n in range(1000)]
        await db.execute(BY_POSITION, ("7 ct",))
        find = "SELECT value FROM item WHERE value = :value"
        assert await db.fetch_value(find, {"value": Money(7)}) == "7 ct"
        assert (await db.fetch_one(find, Holder(Money(7))))["value"] == "7 ct"
        async with db.stream(find, {"value": Money(7)}) as rows:
            assert [row["value"] async for row in rows] == ["7 ct"]


async def test_they_are_one_databases_own(audit: Any, engine: Engine) -> None:
    """Another database does not know them; and what is stored as it is takes no function."""
    db = engine.public.get_db()
    with adapting(db):
        await db.execute(BY_POSITION, (Money(1),))
        with pytest.raises(errors.QueryExecutionError, match="Money|cannot adapt"):
            await audit.execute(BY_POSITION, (Money(1),))
        for kind, function in ((int, str), (str, str), (5, str), (Money, 5)):
            with pytest.raises(errors.ConfigurationError, match="'default'"):
                db.adapt(kind, function)


@pytest.mark.parametrize("kind", [ValueError, KeyError, AttributeError, TypeError, OverflowError, RuntimeError])
async def test_a_function_that_raises(db: Any, engine: Engine, kind: type[Exception]) -> None:
    """What it raises arrives as it was raised, from every call; nothing is written, and a transaction goes on."""
    mine = kind("mine")

    def refuse(_money: Money) -> Any:
        raise mine

    calls: list[Any] = [
        lambda: db.execute(BY_POSITION, (Money(1),)),
        lambda: db.execute(BY_NAME, {"value": Money(1)}),
        lambda: db.execute(BY_NAME, Holder(Money(1))),
        lambda: db.execute_many(BY_POSITION, [("a",), (Money(1),)]),
        lambda: db.execute_many(BY_NAME, iter([Holder("a"), Holder(Money(1))])),
        lambda: db.fetch_all("SELECT * FROM item WHERE value = ?", (Money(1),)),
    ]
    try:
        db.adapt(Money, refuse)
        for number, call in enumerate(calls):
            with pytest.raises(kind) as caught:
                await call()
            assert caught.value is mine, number
            async with db.transaction():
                await db.execute(BY_POSITION, (f"before {number}",))
                with pytest.raises(kind) as caught:
                    await call()
                assert caught.value is mine, number
                await db.execute(BY_POSITION, (f"after {number}",))
        with pytest.raises(kind) as caught:
            async with db.batch() as batch:
                await batch.execute(BY_POSITION, (Money(1),))
        assert caught.value is mine
        assert await values(db) == [f"{when} {n}" for n in range(len(calls)) for when in ("before", "after")]
        with pytest.raises(errors.QueryExecutionError, match="no_such|nothing"):
            await db.fetch_all("SELECT * FROM no_such_nothing")  # and it is not remembered
    finally:
        db.binding.declared.adapters.clear()
