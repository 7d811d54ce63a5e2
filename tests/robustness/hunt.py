"""A hunt for lost, doubled and half-done work, by rude users, under the eyes of an oracle outside.

An episode is one event loop with one database file, in a journal mode and on a loop chosen by its seed. Some tasks make
moves at random: each writes rows with tokens of its own, in one of the ways that the package offers, and behaves as
people do: functions raise in the middle, keep cursors, change the connection, catch what they should not; record classes
and generators raise; tasks are cancelled or left behind at the end of the loop; other threads use a copied context; a
plain connection of `sqlite3` takes locks. What was said to each is held against the file, as a plain connection of
`sqlite3` sees it: what was answered is there at once and for ever, what failed is not, what was cancelled is there as a
whole or not at all.

    python -m tests.robustness.hunt --seconds 3600

A finding names the seed of its episode: `--seed N --episodes 1` does the same moves again (the threads' timing is their own).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import contextvars
import gc
import importlib.util
import logging
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

from database import errors
from database.sqlite3 import close_all, configure, get_db, transactional, transactional_readonly
from tests.contract.support import try_every_text

ABSENT, PRESENT, EITHER = "absent", "present", "either"
INSERT = "INSERT INTO ledger (token, part) VALUES (?, ?)"
db = get_db("default")


class Rude(Exception):
    """Raised by the users' own code."""


class Finding(AssertionError):
    """Something that a user would call a bug."""


class Refusing:
    """A record class that never becomes a record."""

    def __init__(self, **_: Any) -> None:
        raise Rude("record class")


class World:
    """What was said to whom, and the file as it is seen from outside."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.numbers = iter(range(1, 10**9))
        self.lock = threading.Lock()
        self.units: list[tuple[str, list[str], str]] = []
        """(move, tokens, what must be): tokens of one unit are there all together or not at all."""
        self.told: collections.Counter[str] = collections.Counter()
        """How often the on_commit function of a token was called."""
        self.kept: list[Any] = []
        """Cursors, iterators and connections that functions have kept although they should not."""
        self.moves: collections.Counter[str] = collections.Counter()
        self.oracle = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)

    def tokens(self, count: int) -> list[str]:
        with self.lock:
            return [f"t{next(self.numbers)}" for _ in range(count)]

    def seen(self, tokens: list[str]) -> int:
        marks = ",".join("?" * len(tokens))
        with self.lock:
            found = self.oracle.execute(f"SELECT count(*) FROM ledger WHERE token IN ({marks})", tokens).fetchone()[0]
        return int(found)

    def said(self, move: str, tokens: list[str], outcome: str) -> None:
        """Notes what must be, and looks at once."""
        self.units.append((move, tokens, outcome))
        self.look(move, tokens, outcome)

    def look(self, move: str, tokens: list[str], outcome: str, *, surely: bool = False) -> None:
        try:
            found = self.seen(tokens)
        except sqlite3.OperationalError as error:
            if surely or "locked" not in str(error):
                raise
            return  # without a WAL, a commit waits for a reader, which waits for this very thread: `settle` looks again
        if outcome == PRESENT and found != len(tokens):
            raise Finding(f"{move}: answered, but only {found} of {len(tokens)} rows are in the file")
        if outcome == ABSENT and found:
            raise Finding(f"{move}: failed, but {found} of {len(tokens)} rows are in the file")
        if outcome == EITHER and found not in (0, len(tokens)):
            raise Finding(f"{move}: cancelled, and {found} of {len(tokens)} rows are in the file")

    def settle(self) -> None:
        """At the end: all that was ever said still holds; every row is somebody's, and there once."""
        for move, tokens, outcome in self.units:
            self.look(f"{move} (at the end)", tokens, outcome, surely=True)
        known = {token for _, tokens, _ in self.units for token in tokens}
        rows = [row[0] for row in self.oracle.execute("SELECT token FROM ledger")]
        if len(rows) != len(set(rows)):
            raise Finding(f"rows are doubled: {[k for k, n in collections.Counter(rows).items() if n > 1][:5]}")
        if strange := [row for row in rows if row not in known]:
            raise Finding(f"rows that nobody has answered for: {strange[:5]}")
        for token, times in self.told.items():
            if times != 1:
                raise Finding(f"on_commit ran {times} times for {token}")
            if not self.seen([token]):
                raise Finding(f"on_commit ran for {token}, which is not in the file")
        if (found := self.oracle.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise Finding(f"integrity_check: {found}")
        if orphans := self.oracle.execute("PRAGMA foreign_key_check").fetchall():
            raise Finding(f"orphans: {orphans[:3]}")


Move = Callable[[World, list[str]], Awaitable[str]]
"""Writes the tokens in its way; returns what must have become of them."""

MOVES: dict[str, Move] = {}


def move(function: Move) -> Move:
    MOVES[function.__name__] = function
    return function


# Statements


@move
async def single(world: World, tokens: list[str]) -> str:
    for token in tokens[1:]:  # each is a unit of its own
        await db.execute(INSERT, (token, 0))
        world.look("single", [token], PRESENT)
    await db.execute(INSERT, (tokens[0], 0))
    return PRESENT


@move
async def fails(world: World, tokens: list[str]) -> str:
    with contextlib.suppress(errors.IntegrityError):
        await db.execute("INSERT INTO ledger (token, part) SELECT ?, 0 UNION ALL SELECT NULL, 1", (tokens[0],))
        raise Finding("a NULL was stored")
    world.look("fails", tokens, ABSENT)
    return ABSENT


@move
async def returning(world: World, tokens: list[str]) -> str:
    sql = f"INSERT INTO ledger (token, part) VALUES {','.join('(?, 0)' for _ in tokens)} RETURNING token"
    method = world.rng.choice([db.fetch_one, db.fetch_all, db.fetch_value])
    found = await method(sql, tokens)
    if method == db.fetch_value and found != tokens[0]:
        raise Finding(f"fetch_value of RETURNING gave {found!r}")
    return PRESENT


@move
async def returning_record(world: World, tokens: list[str]) -> str:
    sql = f"INSERT INTO ledger (token, part) VALUES {','.join('(?, 0)' for _ in tokens)} RETURNING token"
    method = world.rng.choice([db.fetch_one, db.fetch_all])
    try:
        await method(sql, tokens, record_class=Refusing)
    except Rude:
        return PRESENT  # only the conversion failed
    raise Finding("the record class's exception did not arrive")


@move
async def orphan(world: World, tokens: list[str]) -> str:
    method = world.rng.choice([db.execute, db.fetch_one, db.fetch_value])
    sql = "INSERT INTO child (parent, token) VALUES (-1, ?)" + ("" if method == db.execute else " RETURNING id")
    try:
        await method(sql, (tokens[0],))
    except errors.IntegrityError:
        return ABSENT
    raise Finding("an orphan was answered")


@move
async def many(world: World, tokens: list[str]) -> str:
    row: list[Any] = ["", 0]
    rude = world.rng.random() < 0.4

    def rows() -> Iterator[list[Any]]:
        for number, token in enumerate(tokens):
            row[:] = [token, number]
            yield row
        if rude:
            raise Rude("generator")

    try:
        await db.execute_many(INSERT, rows())
    except Rude:
        return ABSENT
    return PRESENT


@move
async def batch(world: World, tokens: list[str]) -> str:
    rude, row = world.rng.random() < 0.4, {"token": "", "part": 0}
    try:
        async with db.batch() as collected:
            for token in tokens:
                row["token"] = token
                await collected.execute("INSERT INTO ledger (token, part) VALUES (:token, :part)", row)
            if rude:
                raise Rude("batch")
    except Rude:
        return ABSENT
    return PRESENT


# Functions that get the connection


def _insert(connection: Any, tokens: list[str]) -> None:
    for token in tokens:
        connection.execute(INSERT, (token, 1))


def run_raises_in_the_middle(world: World, connection: Any, tokens: list[str]) -> None:
    _insert(connection, tokens)
    for _ in connection.execute("UPDATE ledger SET part = part + 1 WHERE part > 0 RETURNING token"):
        raise Rude("at the first row")
    raise Rude("no row")


def run_keeps_cursors(world: World, connection: Any, tokens: list[str]) -> Any:
    values = ",".join("(?, 0)" for _ in tokens)
    cursor = connection.execute(f"INSERT INTO ledger (token, part) VALUES {values} RETURNING token", tokens)
    next(cursor)
    rows = connection.execute("SELECT token FROM ledger")
    next(rows)
    world.kept.append(rows)
    return map(str, cursor)


def run_commits(world: World, connection: Any, tokens: list[str]) -> None:
    _insert(connection, tokens[:1])
    connection.commit()
    with connection:
        _insert(connection, tokens[1:])


def run_commits_and_raises(world: World, connection: Any, tokens: list[str]) -> None:
    run_commits(world, connection, tokens)
    raise Rude("after commit()")


def run_rolls_back(world: World, connection: Any, tokens: list[str]) -> None:
    connection.execute(INSERT, (f"undone-{tokens[0]}", 0))
    connection.rollback()
    _insert(connection, tokens)
    connection.commit()
    connection.execute(INSERT, (f"undone-{tokens[0]}", 0))
    connection.rollback()


def run_savepoints(world: World, connection: Any, tokens: list[str]) -> None:
    connection.execute("SAVEPOINT mine")
    _insert(connection, tokens)
    connection.execute("RELEASE mine")
    connection.execute("SAVEPOINT mine")
    connection.execute(INSERT, (f"undone-{tokens[0]}", 0))
    connection.execute("ROLLBACK TO mine")
    connection.execute("RELEASE mine")


def run_script(world: World, connection: Any, tokens: list[str]) -> None:
    connection.executescript("; ".join(f"INSERT INTO ledger (token, part) VALUES ('{token}', 0)" for token in tokens))


def run_goes_on_after_the_end(world: World, connection: Any, tokens: list[str]) -> None:
    _insert(connection, tokens[:1])
    with contextlib.suppress(Exception):
        connection.execute("INSERT OR ROLLBACK INTO ledger (token, part) VALUES (NULL, 0)")
    _insert(connection, tokens[1:] or [f"undone-{tokens[0]}"])


def run_changes_everything(world: World, connection: Any, tokens: list[str]) -> None:
    _insert(connection, tokens)
    changes: list[Callable[[], object]] = [
        lambda: setattr(connection, "row_factory", None),
        lambda: setattr(connection, "text_factory", bytes),
        lambda: setattr(connection, "isolation_level", "DEFERRED"),
        lambda: connection.create_function("upper", 1, lambda _: "hijacked"),
        lambda: connection.create_collation("nocase", lambda a, b: 0),
        lambda: connection.set_progress_handler(lambda: 0, 1),
        lambda: connection.set_trace_callback(lambda _: None),
        lambda: connection.set_authorizer(None),
        lambda: connection.execute("PRAGMA foreign_keys = OFF"),
        lambda: connection.execute("PRAGMA case_sensitive_like = ON"),
        lambda: connection.execute("PRAGMA cache_size = 7"),
        lambda: connection.execute("CREATE TEMP TABLE mine (x)"),
        lambda: connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 40),
    ]
    for change in world.rng.sample(changes, 3):
        with contextlib.suppress(Exception):
            change()


RUNS: list[tuple[Callable[[World, Any, list[str]], Any], str]] = [
    (run_raises_in_the_middle, ABSENT),
    (run_keeps_cursors, PRESENT),
    (run_commits, PRESENT),
    (run_commits_and_raises, ABSENT),
    (run_rolls_back, PRESENT),
    (run_savepoints, PRESENT),
    (run_script, PRESENT),
    (run_goes_on_after_the_end, ABSENT),
    (run_changes_everything, PRESENT),
]


@move
async def run(world: World, tokens: list[str]) -> str:
    function, outcome = world.rng.choice(RUNS)
    world.moves[function.__name__] += 1

    def call(connection: Any) -> Any:
        return function(world, connection, tokens)

    try:
        world.kept.append(await db.run(call))
    except (Rude, errors.TransactionError, errors.QueryExecutionError):
        if outcome == PRESENT:
            raise
        return ABSENT
    if outcome == ABSENT:
        raise Finding(f"{function.__name__} was answered")
    return PRESENT


@move
async def run_reading(world: World, tokens: list[str]) -> str:
    def call(connection: Any) -> Any:
        with contextlib.suppress(Exception):
            connection.execute(INSERT, (tokens[0], 0))
        with contextlib.suppress(Exception):
            connection.row_factory = None
            connection.text_factory = bytes
        cursor = connection.execute("SELECT token FROM ledger")
        next(cursor, None)
        return cursor

    world.kept.append(await db.run(call, readonly=True))
    return ABSENT


@move
async def as_configured(world: World, tokens: list[str]) -> str:
    """Every connection is what the configuration says, whatever the functions before have done."""
    readonly = world.rng.random() < 0.5

    def probe(connection: Any) -> list[Any]:
        return [
            connection.execute("PRAGMA foreign_keys").fetchone()[0],
            connection.execute("PRAGMA cache_size").fetchone()[0],
            connection.execute("SELECT upper('a')").fetchone()[0],
            connection.execute("SELECT 'A' LIKE 'a'").fetchone()[0],
            connection.execute("SELECT count(*) FROM sqlite_temp_master").fetchone()[0],
        ]

    found = await db.run(probe, readonly=readonly)
    if found != [1, -2000, "A", 1, 0]:
        raise Finding(f"a {'reader' if readonly else 'writer'} stays changed: {found}")
    row = await db.fetch_one("SELECT 'x' AS text")
    if row is None or row["text"] != "x":
        raise Finding(f"rows stay changed: {row!r}")
    return ABSENT


# Transactions


async def _fill(world: World, tokens: list[str]) -> None:
    for number, token in enumerate(tokens):
        await db.execute(INSERT, (token, number))
        if world.rng.random() < 0.2:
            await anyio.lowlevel.checkpoint()
    db.on_commit(lambda: world.told.update([tokens[0]]))


@move
async def block(world: World, tokens: list[str]) -> str:
    rude = world.rng.random() < 0.4
    try:
        async with db.transaction():
            await _fill(world, tokens)
            if rude:
                raise Rude("block")
    except Rude:
        return ABSENT
    return PRESENT


@move
async def nested(world: World, tokens: list[str]) -> str:
    async with db.transaction():
        await _fill(world, tokens[:1])
        with contextlib.suppress(Rude):
            async with db.transaction():
                await db.execute(INSERT, (f"undone-{tokens[0]}", 0))
                raise Rude("inner")
        async with db.transaction():
            for token in tokens[1:]:
                await db.execute(INSERT, (token, 0))
    return PRESENT


@move
async def children(world: World, tokens: list[str]) -> str:
    async def child(token: str) -> None:
        async with db.transaction():
            await db.execute(INSERT, (token, 0))

    async with db.transaction():
        await db.execute(INSERT, (tokens[0], 0))
        async with anyio.create_task_group() as group:
            for token in tokens[1:]:
                group.start_soon(child, token)
    return PRESENT


@transactional
async def _decorated(world: World, tokens: list[str], rude: bool) -> None:
    await _fill(world, tokens)
    if rude:
        raise Rude("decorated")


@transactional(offload=True)
async def _offloaded(world: World, tokens: list[str], rude: bool) -> None:
    for token in tokens:
        await db.execute(INSERT, (token, 0))
    if world.rng.random() < 0.2:
        with contextlib.suppress(errors.IntegrityError):
            await db.execute("INSERT INTO ledger (token, part) VALUES (NULL, 0)")
    db.on_commit(lambda: world.told.update([tokens[0]]))
    if rude:
        raise Rude("offloaded")


@move
async def decorated(world: World, tokens: list[str]) -> str:
    function, rude = world.rng.choice([_decorated, _offloaded]), world.rng.random() < 0.4
    try:
        await function(world, tokens, rude)
    except Rude:
        return ABSENT
    return PRESENT


@move
async def manual(world: World, tokens: list[str]) -> str:
    keep = world.rng.random() < 0.6
    await db.begin()
    try:
        await _fill(world, tokens)
    except BaseException:
        await db.rollback()
        raise
    await (db.commit() if keep else db.rollback())
    return PRESENT if keep else ABSENT


@move
async def ends_itself(world: World, tokens: list[str]) -> str:
    """The database rolls back by itself; whoever goes on is refused, and nothing is kept."""
    try:
        async with db.transaction():
            await _fill(world, tokens)
            with contextlib.suppress(errors.DatabaseError):
                await db.execute("INSERT OR ROLLBACK INTO ledger (token, part) VALUES (NULL, 0)")
            await db.execute(INSERT, (f"undone-{tokens[0]}", 0))
    except errors.TransactionError:
        return ABSENT
    raise Finding("a transaction that had ended was committed")


async def _in_a_generator(world: World, tokens: list[str]) -> AsyncIterator[int]:
    async with db.transaction():
        await _fill(world, tokens)
        yield 1
        yield 2


@move
async def left_generator(world: World, tokens: list[str]) -> str:
    generator = _in_a_generator(world, tokens)
    async for _ in generator:
        break
    if world.rng.random() < 0.5:
        await generator.aclose()  # type: ignore[attr-defined]
        world.look("left_generator", tokens, ABSENT)
        if db.in_transaction:
            raise Finding("the task is still inside the transaction of a generator that was closed")
        return ABSENT
    await generator.aclose()  # type: ignore[attr-defined]
    world.units.append(("after a generator", [f"after-{tokens[0]}"], EITHER))
    await db.execute(INSERT, (f"after-{tokens[0]}", 0))
    world.said("after a generator", [f"after-{tokens[0]}"], PRESENT)
    return ABSENT


# Reading


@move
async def snapshot(world: World, tokens: list[str]) -> str:
    async with db.transaction(readonly=True):
        first = await db.fetch_value("SELECT count(*) FROM ledger")
        with contextlib.suppress(errors.ReadOnlyTransactionError):
            await db.execute(INSERT, (tokens[0], 0))
            raise Finding("a read-only transaction has written")
        await anyio.lowlevel.checkpoint()
        if (again := await db.fetch_value("SELECT count(*) FROM ledger")) != first:
            raise Finding(f"a snapshot has moved from {first} to {again}")
    return ABSENT


@transactional_readonly(offload=True)
async def _reading_offloaded(tokens: list[str]) -> None:
    await db.fetch_all("SELECT * FROM ledger")
    with contextlib.suppress(errors.DatabaseError):
        await db.execute(INSERT, (tokens[0], 0))
    with contextlib.suppress(errors.DatabaseError):
        await db.run(lambda connection: connection.execute(INSERT, (tokens[0], 0)))


@move
async def reading_offloaded(world: World, tokens: list[str]) -> str:
    await _reading_offloaded(tokens)
    return ABSENT


@move
async def streams(world: World, tokens: list[str]) -> str:
    expected = 500
    sql = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 500) SELECT x FROM c"
    rude = world.rng.choice([None, "break", "raise"])
    seen: list[int] = []
    with contextlib.suppress(Rude):
        async with db.stream(sql, chunk_size=world.rng.choice([1, 7, 100])) as rows:
            async for row in rows:
                seen.append(row[0])
                if len(seen) == 50 and rude == "break":
                    break
                if len(seen) == 50 and rude == "raise":
                    raise Rude("stream")
                if len(seen) == 20:
                    with anyio.move_on_after(0):
                        await anyio.lowlevel.checkpoint()
    wanted = 50 if rude else expected
    if seen != list(range(1, wanted + 1)):
        raise Finding(f"a stream gave {len(seen)} rows, {wanted} expected: {seen[:3]}…{seen[-3:]}")
    return ABSENT


# Other loops, threads and processes


@move
async def other_loop(world: World, tokens: list[str]) -> str:
    """A thread with a copied context and a loop of its own; also in the middle of a transaction."""
    inside = world.rng.random() < 0.5
    library = world.rng.choice(["asyncio", "trio"])
    outcome: list[str] = []
    context = contextvars.copy_context()

    async def main() -> None:
        try:
            await db.execute(INSERT, (tokens[0], 9))
        except errors.TransactionError:
            outcome.append(ABSENT)
        else:
            outcome.append(PRESENT)
        await db.close()

    def run() -> None:
        if importlib.util.find_spec("sniffio"):
            import sniffio

            sniffio.current_async_library_cvar.set(None)  # AnyIO's own belief, which is not what is tried here
        if library == "trio":
            trio.run(main)
        else:
            asyncio.run(main())

    def thread() -> None:
        try:
            context.run(run)
        except BaseException as error:
            outcome.append(f"{type(error).__name__}: {error}")

    if inside:
        async with db.transaction(readonly=True):
            await db.fetch_value("SELECT 1")
            context = contextvars.copy_context()
            await anyio.to_thread.run_sync(thread)
    else:
        await anyio.to_thread.run_sync(thread)
    if outcome not in ([ABSENT], [PRESENT]):
        raise Finding(f"another loop: {outcome}")
    world.said("other_loop", tokens[:1], outcome[0])
    return ABSENT if outcome == [ABSENT] else PRESENT


@move
async def neighbour(world: World, tokens: list[str]) -> str:
    """A plain connection takes the write lock for a moment, as another process would, and writes."""
    keep = world.rng.random() < 0.5
    hold = world.rng.random() * 0.004

    def lock() -> str:
        plain = sqlite3.connect(world.path, isolation_level=None, timeout=10)
        try:
            plain.execute("BEGIN IMMEDIATE")
            plain.executemany(INSERT, [(token, 5) for token in tokens])
            time.sleep(hold)  # how long others wait, not for what this test waits
            plain.execute("COMMIT" if keep else "ROLLBACK")
        except sqlite3.OperationalError as error:
            # Without a WAL, SQLite lets readers in before it: on a busy machine for long.
            if "locked" not in str(error):
                raise
            return ABSENT
        finally:
            plain.close()
        return PRESENT if keep else ABSENT

    return await anyio.to_thread.run_sync(lock)


@move
async def backup(world: World, tokens: list[str]) -> str:
    target = world.path.with_name(f"copy-{tokens[0]}.db")
    if world.rng.random() < 0.3:
        try:
            await db.backup(world.path)
        except errors.DatabaseError:
            return ABSENT
        raise Finding("a live database was overwritten by its backup")
    await db.backup(target)
    copy = sqlite3.connect(target)
    try:
        if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            raise Finding("the copy is damaged")
    finally:
        copy.close()
    return ABSENT


# An episode

SINGLE = {"single", "fails", "returning_record", "orphan", "other_loop", "backup"}
"""Moves whose tokens are not one unit, or that need but one."""

EXPECTED = (errors.DatabaseBusyError, errors.PoolClosedError)


async def task(world: World, moves: int) -> None:
    rng = world.rng
    for _ in range(moves):
        name = rng.choice(list(MOVES))
        tokens = world.tokens(1 if name in SINGLE else rng.choice([1, 2, 5, 70]))
        world.moves[name] += 1
        outcome: str | None = None
        try:
            with anyio.CancelScope() as scope:
                if rng.random() < 0.3:
                    scope.deadline = anyio.current_time() + rng.random() * 0.003
                outcome = await MOVES[name](world, tokens)
        except EXPECTED:
            outcome = ABSENT if name != "run" else EITHER
        if outcome is not None:
            world.said(name, tokens, outcome)
        else:  # cancelled: as a whole or not at all, once the worker is done with it
            world.moves["cancelled"] += 1
            with anyio.fail_after(30):
                await db.execute("DELETE FROM ledger WHERE token = 'nobody'")
            world.units.append((name, tokens, EITHER))
        if db.in_transaction:
            raise Finding(f"after {name}, the task is still inside a transaction")


SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (token TEXT NOT NULL, part INTEGER);
CREATE INDEX IF NOT EXISTS by_token ON ledger (token);
CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS child (id INTEGER PRIMARY KEY, token TEXT,
    parent INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);
"""


async def main(world: World, tasks: int, moves: int) -> str:
    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(task, world, moves)
        if world.rng.random() < 0.5:
            await db.close()
    return "the result"


async def leaving(world: World, tasks: int, moves: int) -> str:
    """asyncio: ends while tasks of it still wait for the database."""
    result = await main(world, tasks, moves)
    ended: list[int] = []

    async def abandoned(number: int) -> None:
        try:
            while True:
                token = world.tokens(1)
                world.units.append(("abandoned", token, EITHER))
                await db.execute(INSERT, (token[0], 0))
        finally:
            ended.append(number)

    world.kept.append([asyncio.ensure_future(abandoned(number)) for number in range(3)])
    world.kept.append(ended)
    for _ in range(world.rng.randrange(8)):
        await asyncio.sleep(0)
    return result


def episode(seed: int, directory: Path) -> World:
    """One; in every other of those with `inline_reads`, as much as can be runs on the loop's thread."""
    with pytest.MonkeyPatch.context() as patch:
        if seed % 2:
            try_every_text(patch)
        return _episode(seed, directory)


def _episode(seed: int, directory: Path) -> World:
    rng = random.Random(seed)
    path = directory / f"hunt-{seed}.db"
    mode = rng.choice(["WAL", "WAL", "WAL", "DELETE", "TRUNCATE", "PERSIST"])
    loop = rng.choice(["asyncio", "uvloop", "trio"])
    if loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        loop = "asyncio"
    configure(
        {
            "database": {
                "sqlite": {
                    "path": str(path),
                    "pool_size": rng.choice([1, 2, 3]),
                    "journal_mode": mode,
                    "synchronous": "OFF",
                    "init_sql": "",
                    "busy_timeout": 10000,
                    "inline_reads": rng.random() < 0.4,
                }
            }
        }
    )
    plain = sqlite3.connect(path)
    plain.execute(f"PRAGMA journal_mode = {mode}")
    plain.executescript(SCHEMA)
    plain.close()
    world = World(path, rng)
    tasks, moves = rng.choice([(1, 40), (4, 12), (12, 5)])
    before = set(threading.enumerate())
    try:
        if loop == "trio":
            result = anyio.run(main, world, tasks, moves, backend="trio")
        else:
            result = anyio.run(
                leaving, world, tasks, moves, backend="asyncio", backend_options={"use_uvloop": loop == "uvloop"}
            )
        if result != "the result":
            raise Finding(f"the result of main() is lost: {result!r}")
        ends = [each for each in world.kept if isinstance(each, list) and each and isinstance(each[0], int)]
        if loop != "trio" and world.kept and sorted(ends[-1] if ends else []) != [0, 1, 2]:
            raise Finding(f"tasks that were left behind did not end: {ends}")
        anyio.run(close_all)
        world.kept.clear()
        world.settle()
        deadline = time.monotonic() + 10
        while left := [each for each in set(threading.enumerate()) - before if each.name.startswith("database-")]:
            if time.monotonic() > deadline:
                raise Finding(f"threads are left: {left}")
            left[0].join(0.1)
    except BaseException as error:
        error.add_note(f"episode {seed}: {loop}, journal_mode {mode}, {tasks} tasks")
        raise
    finally:
        world.oracle.close()
        for each in directory.glob("*"):
            each.unlink()
    return world


def hunt(first: int, *, seconds: float | None = None, episodes: int | None = None) -> collections.Counter[str]:
    """Runs episodes until the time or their number is used up; gives how often each move was made."""
    moves: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    logger = logging.getLogger("database")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            seed = first
            while (episodes is None or seed < first + episodes) and (
                seconds is None or time.monotonic() - began < seconds
            ):
                moves.update(episode(seed, Path(folder)).moves)
                moves["episodes"] += 1
                seed += 1
                if seed % 50 == 0:
                    gc.collect()
    finally:
        logger.setLevel(level)
    return moves


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--go-on", action="store_true", help="report findings and go on")
    arguments = parser.parse_args()
    if not arguments.go_on:
        found = hunt(arguments.seed, seconds=arguments.seconds, episodes=arguments.episodes)
        print(dict(found))
        return
    began, seed, findings = time.monotonic(), arguments.seed, 0
    total: collections.Counter[str] = collections.Counter()
    while time.monotonic() - began < (arguments.seconds or 60):
        try:
            total.update(hunt(seed, episodes=1))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            findings += 1
            _report(seed, error)
        seed += 1
    print(dict(total), f"{findings} findings", file=sys.stderr)


def _report(seed: int, error: BaseException) -> None:
    leaf = error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    notes = "; ".join([*getattr(leaf, "__notes__", []), *getattr(error, "__notes__", [])])
    print(f"seed {seed}: {type(leaf).__name__}: {str(leaf)[:300]} [{notes}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _main()
