"""What brings a worker down, and what becomes of those it worked for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from database import errors, transactional, transactional_readonly
from tests.contract.support import Engine, add, gather, held, names, usable


class Fatal(BaseException):
    """Nobody expects it."""


class _Exits(logging.Handler):
    """A handler as people write them to end a program at its first error."""

    def __init__(self, kind: type[BaseException], level: int) -> None:
        super().__init__(level)
        self.kind = kind
        self.count = 0

    def handle(self, record: logging.LogRecord) -> bool:
        self.count += 1
        raise self.kind("a handler's")


@contextmanager
def handler(kind: type[BaseException], level: int = logging.ERROR) -> Iterator[_Exits]:
    logger = logging.getLogger("database")
    each = _Exits(kind, level)
    before = logger.level
    logger.addHandler(each)
    logger.setLevel(level)
    try:
        yield each
    finally:
        logger.removeHandler(each)
        logger.setLevel(before)


def _calls(db: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every way to a worker, each of which fails."""

    async def transaction() -> None:
        async with db.transaction():
            await add(db, "undone")
            await db.execute("INSERT INTO jobs (name) VALUES (NULL)")

    async def reading() -> None:
        async with db.transaction(readonly=True):
            await db.fetch_value("SELECT no_such_column FROM jobs")

    async def stream() -> None:
        async with db.stream("SELECT no_such_column FROM jobs") as rows:
            async for _ in rows:
                pass

    @transactional(offload=True)
    async def offloaded() -> None:
        await db.execute("INSERT INTO jobs (name) VALUES (NULL)")

    @transactional_readonly(offload=True)
    async def offloaded_read() -> None:
        await db.fetch_value("SELECT no_such_column FROM jobs")

    return {
        "read": lambda: db.fetch_value("SELECT no_such_column FROM jobs"),
        "write": lambda: db.execute("INSERT INTO jobs (name) VALUES (NULL)"),
        "many": lambda: db.execute_many("INSERT INTO jobs (name) VALUES (:name)", [{"name": None}]),
        "script": lambda: db.execute_script("INSERT INTO jobs (name) VALUES (NULL)"),
        "run": lambda: db.run(lambda connection: connection.execute("SELECT no_such_column FROM jobs")),
        "transaction": transaction,
        "read-only transaction": reading,
        "stream": stream,
        "offload": offloaded,
        "read-only offload": offloaded_read,
    }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Fatal])
async def test_a_handler_that_ends_the_program(
    db: Any, engine: Engine, kind: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a log handler raises, every caller gets its own error, nobody else notices, and the workers live on."""
    with handler(kind) as exits, anyio.fail_after(20):
        for name, call in _calls(db).items():
            before = exits.count
            found = await gather(call, lambda: db.fetch_value("SELECT 1"), call, lambda n=name: add(db, n))
            assert isinstance(found[0], errors.DatabaseError), (name, found)
            assert isinstance(found[2], errors.DatabaseError), (name, found)
            assert found[1] == 1, (name, found)
            assert found[3] is None, (name, found)
            assert exits.count > before, name
    with handler(kind, logging.DEBUG) as exits, anyio.fail_after(20):  # records of statements and transactions as well
        async with db.transaction():
            await add(db, "logged")
        assert await db.fetch_value("SELECT 1") == 1
    assert engine.committed() == sorted([*_calls(db), "logged"])
    assert "an error while logging" in capsys.readouterr().err
    await usable(db)


@pytest.mark.anyio
async def test_a_handler_that_ends_the_program_and_those_who_wait(make_db: Any) -> None:
    """Waits that run out of time are answered, although the handler of their record raises."""
    db = await make_db(pool_timeout=0.5)
    async with held(db):
        with handler(SystemExit), anyio.fail_after(10):
            found = await gather(lambda: add(db, "x"), lambda: add(db, "y"))
    assert [type(each) for each in found] == [errors.ConnectionPoolExhaustedError] * 2
    await usable(db)


def _caught(call: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """A call that gives what it raises, also where that is `Fatal`."""

    async def caught() -> Any:
        try:
            return await call()
        except (Exception, Fatal) as error:
            return error

    return caught


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["translate", "execute", "begin", "share", "observer"])
async def test_what_brings_a_worker_down(
    db: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Should a worker be brought down all the same, all that it was asked and has not answered fails, its connection is
    replaced, and what comes next works.
    """
    await add(db, "before")
    armed = True

    def fatal(*_arguments: Any, **_more: Any) -> Any:
        if armed:
            raise Fatal("a defect")
        return None

    for name, call in _calls(db).items():
        await db.fetch_value("SELECT 1")
        operations = db.binding.connection
        with monkeypatch.context() as patched, anyio.fail_after(20):
            if where == "translate":
                patched.setattr(operations, "translate", fatal)
            elif where == "begin":
                patched.setattr(operations, "begin", fatal)
                patched.setattr(operations, "rollback", fatal)
            elif where == "share":  # when a group is about to be committed, and no request is current
                share = operations.share
                patched.setattr(operations, "share", lambda self, on: share(self, on) if on else fatal())
            elif where == "execute":
                from database.driver.worker import Worker

                patched.setattr(Worker, "execute", fatal)
            else:
                observer = type(db.pool().observer)
                patched.setattr(observer, "failure", fatal)
                patched.setattr(observer, "threshold", fatal)
            one: Callable[[], Awaitable[Any]] = lambda: db.fetch_value("SELECT 1")  # noqa: E731
            found = await gather(*map(_caught, (call, call, one, lambda: add(db, "x"), call)))
        assert isinstance(found[0], BaseException), (name, found)
        assert not isinstance(found[0], TimeoutError), (name, found)
        with anyio.fail_after(5):
            assert "before" in await names(db), name
            await db.execute("DELETE FROM jobs WHERE name != 'before'")
            await usable(db)
    assert engine.committed() == ["before"]
