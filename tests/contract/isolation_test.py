"""Sections 4 and 5 of the contract under load: what many tasks see and keep, over all write paths, some
cancelled.
"""

from __future__ import annotations

import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from database import transactional, transactional_readonly
from tests.contract.support import HANGING, Engine, errors, gather, usable

pytestmark = pytest.mark.anyio

ACCOUNTS = 10
TOTAL = ACCOUNTS * 100

TAKE = "UPDATE account SET balance = balance - 1 WHERE id = ?"
GIVE = "UPDATE account SET balance = balance + 1 WHERE id = ?"
NOTE = "INSERT INTO ledger (ticket) VALUES (?)"


class Undo(Exception):
    """Raised in the middle of a transfer."""


@pytest.fixture
async def bank(db: Any) -> Any:
    """Accounts whose balances must always add up, and a ledger of the transfers made."""
    await db.execute_script(
        "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);"
        "CREATE TABLE ledger (id INTEGER PRIMARY KEY, ticket INTEGER NOT NULL UNIQUE);"
    )
    await db.execute_many("INSERT INTO account (balance) VALUES (?)", [(100,)] * ACCOUNTS)
    return db


async def transfer(db: Any, ticket: int, fail: bool) -> None:
    source, target = ticket % ACCOUNTS + 1, (ticket * 7 + 3) % ACCOUNTS + 1
    await db.execute(TAKE, (source,))
    await db.execute(NOTE, (ticket,))
    if fail:
        raise Undo
    await db.execute(GIVE, (target,))


def run_transfer(connection: Any, ticket: int, fail: bool) -> None:
    connection.execute(TAKE, (ticket % ACCOUNTS + 1,))
    connection.execute(NOTE, (ticket,))
    if fail:
        raise Undo
    connection.execute(GIVE, ((ticket * 7 + 3) % ACCOUNTS + 1,))


async def manual(db: Any, ticket: int, fail: bool) -> None:
    await db.begin()
    try:
        await transfer(db, ticket, fail)
        await db.commit()
    finally:
        await db.rollback()


async def nested(db: Any, ticket: int, fail: bool) -> None:
    async with db.transaction():
        try:
            async with db.transaction():
                await transfer(db, ticket, True)
        except Undo:
            pass
        async with db.transaction():
            await transfer(db, ticket, fail)


PATHS: list[Any] = [
    transactional(transfer),
    transactional(offload=True)(transfer),
    lambda db, ticket, fail: db.run(run_transfer, ticket, fail),
    manual,
    nested,
]


@transactional_readonly
async def look(db: Any) -> tuple[int, int]:
    """The sum of balances and the number of transfers, twice; both times the same."""
    seen = []
    for _ in range(2):
        balance = await db.fetch_value("SELECT sum(balance) FROM account")
        await anyio.lowlevel.checkpoint()
        seen.append((balance, await db.fetch_value("SELECT count(*) FROM ledger")))
    assert seen[0] == seen[1], "not one snapshot"
    return seen[0]


@pytest.mark.parametrize("cancel", [False, True], ids=["undisturbed", "cancelled"])
@pytest.mark.parametrize("seed", range(4))
async def test_transfers(bank: Any, engine: Engine, seed: int, cancel: bool) -> None:
    """However writers fail or are cancelled: no sum is ever wrong, what was answered is there, the rest
    is not.
    """
    chance = random.Random(seed)
    outcomes: dict[int, str] = {}

    async def writer(ticket: int, path: Any, fail: bool, patience: float | None) -> None:
        outcomes[ticket] = "unanswered"
        with anyio.move_on_after(patience):
            try:
                await path(bank, ticket, fail)
            except Undo:
                outcomes[ticket] = "undone"
            else:
                outcomes[ticket] = "done"

    async def reader(*, task_status: Any) -> None:
        last = 0
        task_status.started()
        while True:
            balance, count = await look(bank)
            assert balance == TOTAL, "a transfer was seen half done"
            assert count >= last, "time went backwards"
            last = count
            one = await bank.fetch_one(
                "SELECT (SELECT sum(balance) FROM account) AS balance, (SELECT count(*) FROM ledger) AS count"
            )
            assert one["balance"] == TOTAL
            assert one["count"] >= last
            last = one["count"]

    with anyio.fail_after(HANGING):
        async with anyio.create_task_group() as readers:
            await readers.start(reader)
            await readers.start(reader)
            async with anyio.create_task_group() as writers:
                for ticket in range(120):
                    patience = chance.uniform(0, 0.01) if cancel and chance.random() < 0.5 else None
                    writers.start_soon(writer, ticket, chance.choice(PATHS), chance.random() < 0.2, patience)
            readers.cancel_scope.cancel()

    await usable(bank)
    ledger = {ticket for (ticket,) in engine.outside("SELECT ticket FROM ledger")}
    assert {ticket for ticket, outcome in outcomes.items() if outcome == "done"} <= ledger
    assert not {ticket for ticket, outcome in outcomes.items() if outcome == "undone"} & ledger
    assert cancel or "unanswered" not in outcomes.values()
    expected = [100] * ACCOUNTS
    for ticket in ledger:
        expected[ticket % ACCOUNTS] -= 1
        expected[(ticket * 7 + 3) % ACCOUNTS] += 1
    assert [balance for (balance,) in engine.outside("SELECT balance FROM account ORDER BY id")] == expected


async def test_no_update_is_lost(bank: Any) -> None:
    """Read-modify-write over every kind of transaction loses nothing, single writes between them included."""

    async def add_one(handle: Any) -> None:
        value = await handle.fetch_value("SELECT balance FROM account WHERE id = 1")
        await handle.execute("UPDATE account SET balance = ? WHERE id = 1", (value + 1,))

    def run(connection: Any) -> None:
        (value,) = connection.execute("SELECT balance FROM account WHERE id = 1").fetchone()
        connection.execute("UPDATE account SET balance = ? WHERE id = 1", (value + 1,))

    async def by_hand() -> None:
        await bank.begin()
        await add_one(bank)
        await bank.commit()

    kinds = [
        lambda: transactional(add_one)(bank),
        lambda: transactional(offload=True)(add_one)(bank),
        lambda: bank.run(run),
        by_hand,
        lambda: bank.execute(GIVE, (1,)),
    ]
    results = await gather(*[kinds[number % 5] for number in range(100)])
    assert not [result for result in results if isinstance(result, errors.DatabaseError)]
    assert await bank.fetch_value("SELECT balance FROM account WHERE id = 1") == 200


async def test_a_read_sees_what_its_own_task_was_told(bank: Any) -> None:
    """Among many tasks, each finds its own write the moment it was answered, on every write path."""

    async def work(number: int) -> None:
        for step in range(5):
            ticket = number * 100 + step
            await PATHS[(number + step) % len(PATHS)](bank, ticket, False)
            assert await bank.fetch_value("SELECT count(*) FROM ledger WHERE ticket = ?", (ticket,)) == 1
            async with bank.transaction(readonly=True):
                assert await bank.fetch_value("SELECT count(*) FROM ledger WHERE ticket = ?", (ticket,)) == 1

    with anyio.fail_after(HANGING):
        assert await gather(*[lambda n=n: work(n) for n in range(20)]) == [None] * 20
    await usable(bank)
