"""What the contract's tests share: the engine under test, oracles outside the package, and ways to wait
without sleeping.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os
import sqlite3
import threading
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from _pytest.mark.structures import ParameterSet

from database import errors
from database.driver import inline, quick
from database.engine.contract import BLOCKING, Steps

HANGING = float(os.environ.get("HANGING", "60"))
"""Seconds after which what should have happened long ago never will; nothing takes as long, on however slow a machine."""

INLINE_READS = bool(os.environ.get("INLINE_READS"))
"""Whether all tests are to run with `inline_reads: true`, and every text is tried on the loop's thread at once."""

# 15 seconds of work where nothing stops it: long enough that "came back early" can only mean "was stopped".
_STEPS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000000)"
SLOW_SELECT = f"{_STEPS} SELECT count(*) FROM c"
SLOW_ROWS = f"{_STEPS} SELECT x FROM c"
SLOW_INSERT = f"INSERT INTO item (value) {_STEPS} SELECT count(*) FROM c"

SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    cron_expr TEXT,
    handler TEXT,
    enabled INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE item (id INTEGER PRIMARY KEY, value TEXT);
CREATE TABLE parent (id INTEGER PRIMARY KEY);
CREATE TABLE child (
    id INTEGER PRIMARY KEY,
    parent_id INTEGER NOT NULL REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED
);
"""

QUERIES = """
-- name: get_job_by_id^
SELECT * FROM jobs WHERE id = :id;
-- name: get_all_jobs
SELECT * FROM jobs WHERE enabled = :enabled ORDER BY id;
-- name: count_jobs$
SELECT count(*) FROM jobs;
-- name: insert_job<!
INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler);
-- name: insert_job_returning<!
INSERT INTO jobs (name) VALUES (:name) RETURNING id;
-- name: insert_jobs*!
INSERT INTO jobs (name, cron_expr) VALUES (:name, :cron_expr);
-- name: update_job!
UPDATE jobs SET enabled = :enabled WHERE id = :id;
-- name: delete_job!
DELETE FROM jobs WHERE id = :id;
-- name: create_notes#
CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT);
INSERT INTO note (text) VALUES ('first; with a semicolon');
"""


REFUSING_TRIGGER = """
CREATE TRIGGER refuse BEFORE INSERT ON item WHEN new.value = 'rollback'
BEGIN SELECT RAISE(ROLLBACK, 'refused'); END;
"""
"""Makes the insertion of 'rollback' an error that undoes the whole transaction."""


@dataclass
class Engine:
    """One engine under test: its public module and what the tests need from outside the package.

    Another engine is plugged in by one more of these in `tests/conftest.py`.
    """

    name: str
    directory: Path
    schema: str = SCHEMA
    queries: str = QUERIES
    databases: tuple[str, ...] = ("default", "audit")
    refusing_trigger: str = REFUSING_TRIGGER
    driver_error: type[Exception] = sqlite3.IntegrityError
    pool_size: int = 2
    replica: bool = False
    """Whether read-only transactions run on another server."""
    writers: frozenset[str] = frozenset({"database-default-writer"})
    """The workers that may execute a write."""
    public: types.ModuleType = field(init=False)

    def __post_init__(self) -> None:
        self.public = import_module(f"database.{self.name}")
        self._own = {sql.strip() for sql in SCHEMA.split(";")}

    def path(self, database: str = "default") -> Path:
        return self.directory / ("test.db" if database == "default" else f"{database}.db")

    def settings(self, *, audit: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """The configuration of one test: small, quick, with nothing from the packaged init.sql."""
        section: dict[str, Any] = {
            "path": str(self.path()),
            "pool_size": self.pool_size,
            "pool_timeout": HANGING,
            "init_sql": "",
            "synchronous": "OFF",  # no test pulls the plug, and thousands of files are closed
        }
        if INLINE_READS:
            section["inline_reads"] = True
        section |= more
        if audit is not None:
            section["databases"] = {"audit": {"path": str(self.path("audit")), **audit}}
        return {"database": {"sqlite": section}}

    def code(self, name: str) -> tuple[int | str, str]:
        """The code and the name that an error has on this engine, by SQLite's name of it."""
        return getattr(sqlite3, name), name

    def load_queries(self) -> Any:
        file = self.directory / "queries.sql"
        file.write_text(self.queries)
        return self.public.load_queries(file)

    def outside(self, sql: str, database: str = "default") -> list[tuple[Any, ...]]:
        """What somebody sees who has nothing to do with the package: the committed state."""
        connection = sqlite3.connect(self.path(database), timeout=HANGING)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def committed(self, database: str = "default") -> list[str]:
        """Names of the committed jobs, sorted."""
        return [name for (name,) in self.outside("SELECT name FROM jobs ORDER BY name", database)]

    def empty(self) -> None:
        """Leaves the tables of `schema` in the default database, with nothing in them, and no others."""
        connection = sqlite3.connect(self.path(), timeout=HANGING, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("PRAGMA defer_foreign_keys = ON")
            found = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
            for kind, name, sql in found.fetchall():
                quoted = '"' + name.replace('"', '""') + '"'
                connection.execute(f"DELETE FROM {quoted}" if sql in self._own else f"DROP {kind} IF EXISTS {quoted}")
            connection.execute("DELETE FROM sqlite_sequence")
            connection.execute("COMMIT")
        finally:
            connection.close()

    @contextmanager
    def locked(self, database: str = "default") -> Iterator[sqlite3.Connection]:
        """The database as another process leaves it that keeps the write lock."""
        connection = sqlite3.connect(
            self.path(database), isolation_level=None, timeout=HANGING, check_same_thread=False
        )
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
        finally:
            connection.close()

    def dispose(self) -> None:
        """Removes what the test has left; for SQLite, pytest's directories are enough."""

    def open_files(self) -> list[str]:
        """The database files this process holds open, one entry a descriptor; empty where the OS does not
        tell.
        """
        found: list[str] = []
        try:
            descriptors = os.listdir("/proc/self/fd")
        except OSError:
            return found
        for descriptor in descriptors:
            try:
                target = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:
                continue
            if target.startswith(str(self.directory)):
                found.append(target)
        return found


class _EveryText(dict[str, list[int]]):
    """In the place of what is known of texts: each of them is quick until it turns out not to be."""

    def get(self, key: str, default: Any = None) -> Any:
        return self.setdefault(key, [0, quick.RELAPSE, 0])


def try_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `inline_reads`, each text is tried on the loop's thread at once; what is quick is told by its steps."""
    make = inline.Inline.__init__

    def eager(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        self.quick.texts = _EveryText()

    monkeypatch.setattr(inline.Inline, "__init__", eager)
    monkeypatch.setattr(quick, "BUDGET", 0.02)


def worker_threads() -> set[threading.Thread]:
    """All threads but the main one and those that the event loops keep for themselves."""
    return {
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread()
        and not thread.name.startswith(("AnyIO", "Trio", "trio", "asyncio_", "pytest"))
    }


async def eventually(true: Callable[[], object], what: str = "", within: float = HANGING) -> None:
    """Polls until `true()` holds: for what happens on threads, which no event loop can be asked to wait
    for.
    """
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {within} s: {what or true}")
        await anyio.sleep(0.001)


async def collected(true: Callable[[], object], what: str = "", within: float = HANGING) -> None:
    """As `eventually`, for what happens after something has become garbage; collects it only where it
    must.
    """
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {within} s: {what or true}")
        gc.collect()
        await anyio.sleep(0.001)


def around_commit(
    patch: pytest.MonkeyPatch,
    db: Any,
    *,
    before: Callable[[], object] = lambda: None,
    behind: Callable[[], object] = lambda: None,
) -> None:
    """From now on that is called before or behind each COMMIT, on the worker's thread."""
    connection = db.engine.connection
    in_steps = hasattr(connection, "committing")
    name = "committing" if in_steps else "commit"
    commit = getattr(connection, name)

    def around(self: Any) -> None:
        before()
        commit(self)
        behind()

    def around_in_steps(self: Any) -> Steps:
        yield BLOCKING
        before()
        yield from commit(self)
        behind()

    patch.setattr(connection, name, around_in_steps if in_steps else around)


async def waiting(db: Any, count: int) -> None:
    """Returns once `count` callers wait for a connection of `db`."""
    await eventually(lambda: db.stats().waiting == count, f"{count} waiting, stats {db.stats()}")


async def busy(db: Any) -> None:
    """Returns once a connection of `db` is in use."""
    await eventually(lambda: db.stats().readers_in_use or db.stats().writer_in_use, "a connection in use")


def is_idle(db: Any) -> bool:
    stats = db.stats()
    return not (stats.readers_in_use or stats.writer_in_use or stats.waiting or stats.queued)


async def idle(db: Any) -> None:
    """Holds that the pool becomes whole again: nothing in use, nobody waiting."""
    await eventually(lambda: is_idle(db), f"an idle pool, stats {db.stats()}")


async def usable(db: Any) -> None:
    """Holds that the pool is whole and that reading and writing work."""
    await idle(db)
    assert not db.in_transaction
    with anyio.fail_after(HANGING):
        before = await db.fetch_value("SELECT count(*) FROM item")
        await db.execute("INSERT INTO item (value) VALUES ('usable')")
        assert await db.fetch_value("SELECT count(*) FROM item") == before + 1
        async with db.transaction():
            await db.execute("DELETE FROM item WHERE value = 'usable'")
    await idle(db)


def in_turn(names: str, cases: Iterable[Any], *, ids: Any = None, using: str = "db") -> Callable[[Any], Any]:
    """As `pytest.mark.parametrize`, but all cases in one run of the test: on one event loop and one pool, each beginning
    with the engine's empty tables. What fails says in which case it did. `using`: the fixture that is the default database.
    """

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        arguments = [name.strip() for name in names.split(",")]
        parameters = list(inspect.signature(test).parameters.values())
        fixtures = [each for each in parameters if each.name not in arguments]
        asked = {each.name for each in fixtures}
        both = [each for each in (using, "engine") if each not in asked]
        more = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in both]

        async def all_of_them(**given: Any) -> None:
            wanted = {name: given[name] for name in asked}
            for number, case in enumerate(cases):
                values = case.values if isinstance(case, ParameterSet) else case if len(arguments) > 1 else (case,)
                named = dict(zip(arguments, values, strict=True))
                try:
                    if number:
                        await empty(given[using], given["engine"])
                    await test(**wanted, **named)
                except BaseException as error:
                    label = ids(case) if callable(ids) else ids[number] if ids else getattr(case, "id", None)
                    error.add_note(f"in case {number} of {names}: {label or repr(named)[:500]}")
                    raise

        functools.update_wrapper(all_of_them, test)
        del all_of_them.__wrapped__  # pytest would look for its arguments there
        all_of_them.__signature__ = inspect.Signature(fixtures + more)  # type: ignore[attr-defined]
        return all_of_them

    return decorate


@contextmanager
def case(**what: object) -> Iterator[None]:
    """What fails in the block says in which case: for tests that go through combinations."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {what}")
        raise


def _on(*loops: str) -> pytest.MarkDecorator:
    known = {"asyncio": ("asyncio", {}), "asyncio+uvloop": ("asyncio", {"use_uvloop": True}), "trio": ("trio", {})}
    missing = [loop for loop in loops if "uvloop" in loop and importlib.util.find_spec("uvloop") is None]
    params = [pytest.param(known[loop], id=loop) for loop in loops if loop not in missing]
    return pytest.mark.parametrize("anyio_backend", params, indirect=True)


on_asyncio = _on("asyncio", "asyncio+uvloop")
"""For tests of what only asyncio has. A test that skips itself may be the one that `--quick` has chosen."""
on_trio = _on("trio")


@contextmanager
def stopped() -> Iterator[None]:
    """Holds that what would compute for 15 seconds in the block is stopped: it took little of this process's CPU time. The
    clock would also measure what others do on the machine.
    """
    used = time.process_time()
    yield
    used = time.process_time() - used
    assert used < 4, f"it went on for {used:.1f} seconds of CPU time"


async def at_rest() -> None:
    """Holds that nothing in this process computes any longer: CPU time is asked, not the clock, so that other processes may
    take what time they want.
    """
    for _ in range(100):
        used = time.process_time()
        await anyio.sleep(0.02)
        if time.process_time() - used < 0.01:
            return
    raise AssertionError("somebody is still computing")


async def empty(db: Any, engine: Engine) -> None:
    """Leaves the engine's own tables, with nothing in them, and no others."""
    assert not db.in_transaction
    await idle(db)
    engine.empty()
    await db.execute("DELETE FROM item")  # the writer learns of a changed schema by a statement on it, not by a CREATE


async def add(db: Any, name: str) -> None:
    await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": name})


async def names(db: Any) -> list[str]:
    return [row["name"] for row in await db.fetch_all("SELECT name FROM jobs ORDER BY name")]


async def gather(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Runs all at once; their results in order, an exception standing for the result of the call that raised
    it.
    """
    results: list[Any] = [None] * len(calls)

    async def one(index: int, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            results[index] = await call()
        except Exception as error:
            results[index] = error

    async with anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(one, index, call)
    return results


@asynccontextmanager
async def held(db: Any, *, readonly: bool = False, count: int = 1) -> AsyncIterator[anyio.Event]:
    """`count` other tasks hold a transaction each (and so a connection), until the block or the event ends
    them. Where no connection is the one writer, all that are free are held: only then does a writer wait.
    """
    release = anyio.Event()
    if not db.pool().single_writer:
        if db.stats().pool_size == 0:
            await db.open()
        taken = sum(1 for lease in db.pool().transactions if lease.worker is not None and not lease.ended)
        free = db.stats().pool_size - taken
        count = min(count, free) if readonly else free

    async def hold_a_connection(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with db.transaction(readonly=readonly):
            await db.fetch_value("SELECT 1")
            task_status.started()
            await release.wait()

    async with anyio.create_task_group() as group:
        for _ in range(count):
            await group.start(hold_a_connection)
        try:
            yield release
        finally:
            release.set()


@types.coroutine
def stepwise(coroutine: Coroutine[Any, Any, Any], at_point: Callable[[int], None]) -> Any:
    """Drives `coroutine` and calls `at_point(n)` at its n-th scheduling point, just before it gives way."""
    points = 0

    def resume(step: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
        try:
            return False, step(*args)
        except StopIteration as stop:
            return True, stop.value

    done, value = resume(coroutine.send, None)
    while not done:
        points += 1
        at_point(points)
        try:
            answer = yield value
        except BaseException as error:
            done, value = resume(coroutine.throw, error)
        else:
            done, value = resume(coroutine.send, answer)
    return value


__all__ = [
    "HANGING",
    "SLOW_INSERT",
    "SLOW_ROWS",
    "SLOW_SELECT",
    "Engine",
    "add",
    "at_rest",
    "busy",
    "case",
    "collected",
    "empty",
    "errors",
    "eventually",
    "gather",
    "held",
    "idle",
    "in_turn",
    "is_idle",
    "names",
    "on_asyncio",
    "on_trio",
    "stepwise",
    "stopped",
    "usable",
    "waiting",
    "worker_threads",
]
