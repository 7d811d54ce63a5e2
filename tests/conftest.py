"""Fixtures for every test: the event loops, the engine, and databases that leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from database.session import registry
from database.session.database import Database
from tests import programs, watchdog
from tests.contract.support import HANGING, INLINE_READS, Engine, collected, is_idle, try_every_text, worker_threads
from tests.postgresql.differences import differs, needs_one_connection
from tests.selection import repetitions

MakeDb = Callable[..., Awaitable[Any]]


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(
            ("asyncio", {"use_uvloop": True}),
            id="asyncio+uvloop",
            marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"),
        ),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Each asynchronous test runs on every event loop there is."""
    return request.param


@pytest.fixture(autouse=INLINE_READS)
def all_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `INLINE_READS=1` as much as can be runs on the loop's thread; what is quick is told by its steps."""
    try_every_text(monkeypatch)


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """What a test does to the package's loggers is undone, for these are the process's."""
    names = ["database", *(name for name in logging.root.manager.loggerDict if name.startswith("database."))]
    before = [
        (logger, logger.level, logger.disabled, logger.propagate, [*logger.handlers])
        for logger in map(logging.getLogger, names)
    ]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for logger, level, off, propagate, handlers in before:
        if (logger.level, logger.disabled, logger.propagate, logger.handlers) != (level, off, propagate, handlers):
            logger.setLevel(level)
            logger.disabled, logger.propagate = off, propagate
            logger.handlers[:] = handlers


@pytest.fixture(params=["sqlite3", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """The engine under test."""
    engine = make_engine(request.param, tmp_path)
    if request.param == "postgresql" and needs_one_connection(request.node):
        engine.pool_size = 1
    with handles_of(engine):
        yield engine
    engine.dispose()


@contextmanager
def handles_of(engine: Engine) -> Iterator[None]:
    """Lets the engine-neutral handles of this process be of that engine, whichever they have been of.

    An application has one configuration; only here do handles, made at import time by decorated functions of the tests,
    live through two engines.
    """
    before = dict(registry._handles)
    pins: list[tuple[Database, Any]] = []
    for name in engine.databases:
        handle = before.get((None, name)) or registry.get_db(name)
        declared = handle.binding.declared
        pins.append((handle, declared.engine))
        declared.engine = declared.resolved = None
        handle.binding = handle.binding.fresh()
        for key in [key for key in registry._handles if key[1] == name]:
            del registry._handles[key]
        registry._handles[None, name] = registry._handles[engine.name, name] = handle
    try:
        yield
    finally:
        registry._handles.clear()
        registry._handles.update(before)
        for handle, pin in pins:
            handle.binding.declared.engine, handle.binding.declared.resolved = pin, None
            handle.binding = handle.binding.fresh()


def make_engine(name: str, directory: Path) -> Engine:
    """An engine with nothing in its databases; skips where it cannot be had."""
    if name == "sqlite3":
        return Engine(name, directory)
    from tests.postgresql.engine import PostgresqlEngine  # needs psycopg only where it is used

    return PostgresqlEngine(name, directory)


@contextmanager
def alone(name: str, directory: Path) -> Iterator[Engine]:
    """One engine, for tests of what only that has."""
    engine = make_engine(name, directory)
    with handles_of(engine):
        yield engine
    engine.dispose()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick` is what `make test` runs."""
    parser.addoption(
        "--quick",
        action="store_true",
        help="no repetition on other event loops and engines that finds nothing new, and nothing slow",
    )
    parser.addoption(
        "--beyond-quick", action="store_true", help="what `--quick` leaves out or shortens, and nothing else"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The run is watched, and what it starts can be interrupted."""
    watchdog.watch()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", 0):
        os.environ.pop("COVERAGE_PROCESS_START", None)  # this process is measured; what tests start need not be
        os.environ.pop("PYTHONOPTIMIZE", None)  # programs that tests start say with `assert` what is wrong
        if os.environ.pop("PYTHONASYNCIODEBUG", None):  # and shall print nothing, not even what was slow
            asyncio.coroutines._is_debug_mode = lambda: True  # type: ignore[attr-defined]
    # A shell starts what it runs in the background with SIGINT ignored, and all children inherit that, even through exec.
    # Caught and dropped, it stays without effect on this process, and becomes the default again in those that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """No process outlives the test that started it."""
    yield
    left = watchdog.children() - watchdog.lasting | {each.pid for each in programs.started if each.poll() is None}
    programs.started.clear()
    if left:
        found = [watchdog.command(pid) for pid in left]
        for pid in left:
            watchdog.kill(pid)
        raise AssertionError(f"the test has left running, and it has been ended now: {found}")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Reports of tests that use text no encoding knows must come through to the process that prints them."""
    return clean((yield))


def clean(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {clean(key): clean(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(clean, data))
    return data


def searched(item: pytest.Item) -> bool:
    """Whether Hypothesis looks for examples of it, of which `--quick` takes fewer."""
    return getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None) is not None


def shortened(item: pytest.Item) -> bool:
    """Whether `--quick` does less of it."""
    return searched(item) or item.get_closest_marker("shortened") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what must differ on PostgreSQL (`tests/postgresql/differences.py` says why, and where the tests are)
    and, when it shall be quick, what repeats others (`tests/selection.py`).
    """
    out = {item for item in items if differs(item)}
    if config.getoption("beyond_quick"):
        beyond = set(repetitions([item for item in items if item not in out]))
        out |= {item for item in items if item not in beyond and not shortened(item)}
    elif config.getoption("quick"):
        out |= set(repetitions([item for item in items if item not in out]))
        for test in {item.obj for item in items if searched(item)}:
            wanted = test._hypothesis_internal_use_settings
            fewer = type(wanted)(wanted, max_examples=max(10, wanted.max_examples // 8))
            getattr(test, "__func__", test)._hypothesis_internal_use_settings = fewer
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


def pytest_collection_finish() -> None:
    """What is there before the first test stays: tests that collect garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Whoever asks the collector for referrers afterwards (Hypothesis does) shall see everything."""
    gc.unfreeze()


def pytest_unconfigure() -> None:
    """Workers of xdist do not end as other processes do: what was measured is written down here. And what is garbage by now
    says so once; pytest looks for it five times more.
    """
    gc.collect()
    gc.freeze()
    if "coverage" in sys.modules and (measured := sys.modules["coverage"].Coverage.current()) is not None:
        measured.stop()
        measured.save()


@pytest.fixture
def configured(engine: Engine) -> Iterator[Callable[..., None]]:
    """`configured(**settings)` for tests that run their own event loops; all is closed at the end."""

    def configure(**settings: Any) -> None:
        engine.public.configure(engine.settings(**settings))

    yield configure
    anyio.run(engine.public.close_all)


@pytest.fixture
async def make_db(anyio_backend: Any, engine: Engine) -> AsyncIterator[MakeDb]:
    """`await make_db(**settings)`: a fresh configuration, its tables, and the handle of the default database.

    When the test is over every connection must be free again, and closing must leave no thread and no file.
    """
    threads = worker_threads()
    handles: list[Any] = []

    async def make(*, schema: bool = True, **settings: Any) -> Any:
        await engine.public.close_all()
        engine.public.configure(engine.settings(**settings))
        for name in engine.databases if "audit" in settings else engine.databases[:1]:
            handle = engine.public.get_db(name)
            if schema:
                pool = handle.pool()
                timeout, pool.timeout = pool.timeout, HANGING  # a short one is for what the test does, not for opening
                await handle.execute_script(engine.schema)
                pool.timeout = timeout
                pool._watch.end()  # which has looked ahead so far
            if handle not in handles:
                handles.append(handle)
        return engine.public.get_db()

    yield make
    try:
        for handle in handles:
            await collected(lambda handle=handle: is_idle(handle), f"idle at the end: {handle.stats()}")
    finally:
        with anyio.fail_after(HANGING):
            await engine.public.close_all()
    await collected(lambda: worker_threads() <= threads, f"no thread left, have {worker_threads() - threads}")
    await collected(lambda: not engine.open_files(), f"no file left open, have {engine.open_files()}")


@pytest.fixture
async def db(make_db: MakeDb) -> Any:
    """The default database: two readers and the writer, the tables of the contract's tests, nothing in
    them.
    """
    return await make_db()


@pytest.fixture
async def audit(make_db: MakeDb, engine: Engine) -> Any:
    """A second database beside `get_db()`, called "audit"; with the same tables."""
    await make_db(audit={})
    return engine.public.get_db("audit")


@pytest.fixture
def queries(engine: Engine) -> Any:
    """aiosql queries with every operator."""
    return engine.load_queries()
