"""`kill -9` in the middle of everything: what was acknowledged is there, nothing is half there."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from pathlib import Path

import pytest

from tests.robustness.support import FIGURES, Program

KILLS = int(os.environ.get("KILLS", "12"))
"""Processes killed; more by the environment variable."""

ACCOUNTS = 20

BANK = """
settings["synchronous"] = "FULL"
await_backend = sys.argv[2]
first = int(sys.argv[3])
configure({"database": {"sqlite": settings}})
TAKE = "UPDATE account SET balance = balance - 1 WHERE id = ?"
GIVE = "UPDATE account SET balance = balance + 1 WHERE id = ?"
NOTE = "INSERT INTO ledger (ticket, source, target) VALUES (?, ?, ?)"

def parts(ticket):
    return ticket % 20 + 1, (ticket * 7 + 3) % 20 + 1

async def transfer(ticket):
    source, target = parts(ticket)
    await db.execute(TAKE, (source,))
    await db.execute(NOTE, (ticket, source, target))
    await db.execute(GIVE, (target,))

@transactional
async def interactive(ticket):
    await transfer(ticket)

@transactional
async def nested(ticket):
    try:
        async with db.transaction():
            await transfer(ticket)
            raise ValueError
    except ValueError:
        pass
    await transfer(ticket)

offloaded = transactional(offload=True)(transfer)

async def manual(ticket):
    await db.begin()
    await transfer(ticket)
    await db.commit()

def on_thread(connection, ticket):
    source, target = parts(ticket)
    connection.execute(TAKE, (source,))
    connection.execute(NOTE, (ticket, source, target))
    connection.execute(GIVE, (target,))

async def run(ticket):
    await db.run(on_thread, ticket)

async def batch(ticket):
    source, target = parts(ticket)
    async with db.batch() as batch:
        await batch.execute(TAKE, (source,))
        await batch.execute(NOTE, (ticket, source, target))
        await batch.execute(GIVE, (target,))

async def autocommit(ticket):  # a trigger moves the money: one statement, all or nothing
    await db.execute("INSERT INTO by_trigger (ticket, source, target) VALUES (?, ?, ?)", (ticket, *parts(ticket)))

async def many(ticket):
    await db.execute_many(
        "INSERT INTO by_trigger (ticket, source, target) VALUES (?, ?, ?)",
        [(ticket, *parts(ticket)), (-ticket, *parts(ticket)[::-1])],
    )

PATHS = [interactive, nested, offloaded, manual, run, batch, autocommit, many]

async def client(path, number):
    for step in range(1_000_000):
        ticket = first + number + step * 100
        await path(ticket)
        say(ticket)

async def main():
    await db.fetch_value("SELECT 1")
    await db.open()
    say("ready")
    async with anyio.create_task_group() as group:
        for number in range(16):
            group.start_soon(client, PATHS[number % len(PATHS)], number)

anyio.run(main, backend=await_backend)
"""

SCHEMA = f"""
CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
CREATE TABLE ledger (ticket INTEGER PRIMARY KEY, source INTEGER NOT NULL, target INTEGER NOT NULL);
CREATE TABLE by_trigger (ticket INTEGER PRIMARY KEY, source INTEGER NOT NULL, target INTEGER NOT NULL);
CREATE TRIGGER move AFTER INSERT ON by_trigger BEGIN
    UPDATE account SET balance = balance - 1 WHERE id = new.source;
    UPDATE account SET balance = balance + 1 WHERE id = new.target;
END;
WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {ACCOUNTS})
INSERT INTO account SELECT x, 1000 FROM c;
"""


@pytest.mark.slow
def test_kill_9(tmp_path: Path) -> None:
    """Killed again and again amid transactions on all write paths, the file is whole, every acknowledged transfer is
    in it (synchronous=FULL), and none is there by half.
    """
    path = tmp_path / "test.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SCHEMA)
    connection.close()
    chance = random.Random(1)
    acknowledged: set[int] = set()
    for number in range(KILLS):
        backend = ("asyncio", "trio")[number % 2]
        program = Program(BANK, path, backend, str((number + 1) * 10_000_000))
        program.expect("ready")
        time.sleep(chance.uniform(0.01, 0.15))
        program.kill()
        out, err = program.process.communicate(timeout=20)
        assert err == ""
        acknowledged.update(int(line) for line in out.split("\n")[:-1] if line)  # a line cut short was not said

        connection = sqlite3.connect(path)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            noted = connection.execute(
                "SELECT ticket, source, target FROM ledger UNION ALL SELECT ticket, source, target FROM by_trigger"
            ).fetchall()
            tickets = {row[0] for row in noted}
            lost = acknowledged - tickets
            assert not lost, f"acknowledged and lost: {sorted(lost)[:10]}"
            pairs = {abs(ticket) for ticket in tickets if ticket < 0}
            assert pairs <= tickets, "half of an execute_many"
            expected = dict.fromkeys(range(1, ACCOUNTS + 1), 1000)
            for _, source, target in noted:
                expected[source] -= 1
                expected[target] += 1
            balances = dict(connection.execute("SELECT id, balance FROM account").fetchall())
            assert balances == expected, "a transfer is half there"
            assert sum(balances.values()) == ACCOUNTS * 1000
        finally:
            connection.close()
        FIGURES["kills survived (kill -9)"] += 1
    assert len(acknowledged) > KILLS * 5
    FIGURES["acknowledged transfers found again after kill -9"] += len(acknowledged)


@pytest.mark.slow
def test_kill_9_while_opening_and_closing(tmp_path: Path) -> None:
    """Killed while pools open, run init.sql, close or back up, the next process opens as though nothing had happened."""
    path = tmp_path / "test.db"
    script = tmp_path / "init.sql"
    script.write_text(
        "CREATE TABLE IF NOT EXISTS t (x INTEGER);\n"
        "INSERT INTO t SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM t);\n"
        "CREATE INDEX IF NOT EXISTS t_x ON t (x);\n"
    )
    code = """
    settings["init_sql"] = sys.argv[2]
    settings["synchronous"] = "FULL"
    configure({"database": {"sqlite": settings}})

    async def main():
        for _ in range(100_000):
            await db.execute("INSERT INTO t VALUES (2)")
            await db.backup(sys.argv[1] + ".copy")
            await db.close()
            say("round")

    anyio.run(main)
    """
    chance = random.Random(2)
    rounds = 0
    for _ in range(max(2, KILLS // 3)):
        program = Program(code, path, str(script))
        program.expect("round")
        time.sleep(chance.uniform(0, 0.1))
        program.kill()
        out, err = program.process.communicate(timeout=20)
        assert err == ""
        rounds += 1 + len(out.split("\n")) - 1
        for file in (path, Path(f"{path}.copy")):
            connection = sqlite3.connect(file)
            try:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert connection.execute("SELECT count(*) FROM t WHERE x = 1").fetchone() == (1,)
                found = connection.execute("SELECT count(*) FROM t WHERE x = 2").fetchone()[0]
                assert found >= rounds - (file != path)
            finally:
                connection.close()
        FIGURES["kills survived (kill -9)"] += 1
