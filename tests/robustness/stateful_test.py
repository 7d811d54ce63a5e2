"""A state machine of hypothesis drives the public API with several tasks and databases against a simple model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from database import errors, transactional
from database.sqlite3 import close_all, configure, get_db
from tests.contract.support import HANGING, SLOW_SELECT
from tests.robustness.faults import FAULTS, Fault, faulty
from tests.robustness.support import FIGURES

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "20"))
"""Runs of the machine for each event loop; more by the environment variable."""

NAMES = ("default", "other")
TASKS = 3
PUT = "INSERT INTO kv (k, v) VALUES (?, ?) ON CONFLICT (k) DO UPDATE SET v = excluded.v"

tasks = st.integers(0, TASKS - 1)
databases = st.sampled_from(NAMES)
keys = st.integers(0, 5)
values = st.integers(0, 99)

_connect = sqlite3.connect  # the real one: what looks from outside does not fail


class Level:
    """What the model knows of one open level."""

    def __init__(self, data: dict[int, int] | None, readonly: bool) -> None:
        self.data = data
        """What it sees; None while it has executed nothing, and so sees whatever is there when it does."""
        self.readonly = readonly


class Open:
    """What the model knows of one open transaction."""

    def __init__(self, readonly: bool) -> None:
        self.levels = [Level(None, readonly)]
        self.dead = False
        """Ended by the database or by the pool's closing; only `rollback` gets out of it."""

    @property
    def top(self) -> Level:
        return self.levels[-1]

    @property
    def begun(self) -> bool:
        return self.levels[0].data is not None


class Machine(RuleBasedStateMachine):
    """Tasks, databases, and what should be in them."""

    backend: tuple[str, dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.directory = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.stack.callback(shutil.rmtree, self.directory)
        self.stack.enter_context(faulty())
        section = {
            "path": str(self.directory / "default.db"),
            "pool_size": TASKS + 1,
            "init_sql": "",
            "synchronous": "OFF",
            "busy_timeout": 100,
            "databases": {"other": {"path": str(self.directory / "other.db")}},
        }
        configure({"database": {"sqlite": section}})
        name, options = self.backend
        self.portal = self.stack.enter_context(start_blocking_portal(name, options))
        self.senders: list[Any] = [self._start() for _ in range(TASKS)]
        self.committed: dict[str, dict[int, int]] = {name: {} for name in NAMES}
        self.open: dict[tuple[int, str], Open] = {}
        for each in NAMES:
            self.do(
                0, lambda each=each: get_db(each).execute("CREATE TABLE kv (k INTEGER PRIMARY KEY, v INTEGER NOT NULL)")
            )

    # Tasks that live on, each with its own context

    def _start(self) -> Any:
        async def streams() -> Any:
            return anyio.create_memory_object_stream[Any](10)

        async def live() -> None:
            async with receive:
                async for call, future in receive:
                    try:
                        with anyio.fail_after(HANGING):
                            future.set_result(await call())
                    except BaseException as error:
                        future.set_exception(error)
                        if not isinstance(error, Exception):
                            raise

        send, receive = self.portal.call(streams)
        self.portal.start_task_soon(live)
        return send

    def do(self, task: int, call: Callable[[], Awaitable[Any]]) -> Any:
        """Has the task do it; its result, or the package's error. Any other error fails the test."""
        future: Future[Any] = Future()
        self.portal.call(self.senders[task].send, (call, future))
        try:
            return future.result(20)
        except errors.DatabaseError as error:
            return error

    # The model

    def holder(self, name: str) -> int | None:
        """Who holds the writer."""
        for (task, other), open_ in self.open.items():
            if other == name and open_.begun and not open_.levels[0].readonly and not open_.dead:
                return task
        return None

    def must_wait(self, task: int, name: str, *, writes: bool) -> bool:
        open_ = self.open.get((task, name))
        if open_ is not None:
            writes = not open_.levels[0].readonly and not open_.begun
        return writes and self.holder(name) not in (None, task)

    def begin_to_see(self, task: int, name: str) -> None:
        open_ = self.open.get((task, name))
        if open_ is not None and not open_.begun:
            for level in open_.levels:
                level.data = dict(self.committed[name])

    def view(self, task: int, name: str) -> dict[int, int]:
        open_ = self.open.get((task, name))
        if open_ is None:
            return self.committed[name]
        assert open_.top.data is not None
        return open_.top.data

    def attempt(self, task: int, name: str, call: Callable[[Any], Awaitable[Any]], *, writes: bool) -> Any:
        """Runs a statement where it can run; where it could only wait, cancels it and holds that nothing happened."""
        db = get_db(name)
        FIGURES["steps of the state machine"] += 1
        if self.must_wait(task, name, writes=writes):

            async def cancelled() -> str:
                with anyio.move_on_after(0.01) as scope:
                    await call(db)
                return "cancelled" if scope.cancelled_caught else "done"

            open_ = self.open.get((task, name))
            result = self.do(task, cancelled)
            if open_ is not None and open_.dead:
                assert isinstance(result, errors.DatabaseError), result
            elif open_ is not None and open_.top.readonly and writes:
                assert isinstance(result, errors.ReadOnlyTransactionError) or result == "cancelled", result
            else:
                assert result == "cancelled", result
            return "waited"
        return self.do(task, lambda: call(db))

    def settle(self, task: int, name: str, result: Any, change: dict[int, int], *, writes: bool = True) -> None:
        """What a statement must have answered, and what is so from now on."""
        if result == "waited":
            return
        open_ = self.open.get((task, name))
        if open_ is not None and open_.dead:
            assert isinstance(result, (errors.TransactionError, errors.PoolClosedError)), result
            return
        if open_ is not None and open_.top.readonly and writes:
            assert isinstance(result, errors.ReadOnlyTransactionError), result
            return
        assert not isinstance(result, errors.DatabaseError), result
        self.begin_to_see(task, name)
        self.view(task, name).update(change)

    # Rules: transactions

    @rule(task=tasks, name=databases, readonly=st.booleans())
    def begin(self, task: int, name: str, readonly: bool) -> None:
        open_ = self.open.get((task, name))
        result = self.do(task, lambda: get_db(name).begin(readonly))
        if open_ is None:
            assert not isinstance(result, BaseException), result
            self.open[task, name] = Open(readonly)
        elif open_.top.readonly and not readonly:
            assert isinstance(result, errors.TransactionError), result
        elif open_.dead:
            # Whether the level is refused now or at its first statement, nothing comes of it.
            if not isinstance(result, BaseException):
                open_.levels.append(Level(open_.top.data, readonly))
        else:
            assert not isinstance(result, BaseException), result
            data = open_.top.data
            open_.levels.append(Level(None if data is None else dict(data), readonly))

    @rule(task=tasks, name=databases)
    def commit(self, task: int, name: str) -> None:
        open_ = self.open.get((task, name))
        result = self.do(task, get_db(name).commit)
        if open_ is None:
            assert isinstance(result, errors.TransactionError), result
            return
        if open_.dead:
            assert isinstance(result, errors.DatabaseError) or len(open_.levels) > 1 or not open_.begun, result
            self.sync(task, name)
            return
        assert result is None, result
        top = open_.levels.pop()
        if not open_.levels:
            del self.open[task, name]
            if top.data is not None and not top.readonly:
                self.committed[name] = top.data
        elif not top.readonly:
            open_.top.data = top.data

    @rule(task=tasks, name=databases)
    def rollback(self, task: int, name: str) -> None:
        open_ = self.open.get((task, name))
        result = self.do(task, get_db(name).rollback)
        assert result is None, result
        if open_ is None:
            return
        if open_.dead:
            self.sync(task, name)
            return
        open_.levels.pop()
        if not open_.levels:
            del self.open[task, name]

    def sync(self, task: int, name: str) -> None:
        """After the end of a level of a dead transaction: how many levels are left, only the task can say."""
        open_ = self.open[task, name]
        open_.levels.pop()

        async def inside() -> bool:
            return bool(get_db(name).in_transaction)

        if not self.do(task, inside):
            del self.open[task, name]
        elif not open_.levels:
            open_.levels = [Level({}, False)]

    # Rules: statements

    @rule(task=tasks, name=databases, key=keys, value=values)
    def put(self, task: int, name: str, key: int, value: int) -> None:
        result = self.attempt(task, name, lambda db: db.execute(PUT, (key, value)), writes=True)
        self.settle(task, name, result, {key: value})

    @rule(
        task=tasks,
        name=databases,
        rows=st.dictionaries(keys, values, min_size=1),
        way=st.sampled_from(["many", "run", "batch", "offload"]),
    )
    def put_several(self, task: int, name: str, rows: dict[int, int], way: str) -> None:
        async def batch(db: Any) -> None:
            async with db.batch() as batch:
                for each in rows.items():
                    await batch.execute(PUT, each)

        async def offloaded() -> None:
            for each in rows.items():
                await get_db(name).execute(PUT, each)

        calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "many": lambda db: db.execute_many(PUT, list(rows.items())),
            "run": lambda db: db.run(lambda connection: connection.executemany(PUT, list(rows.items()))),
            "batch": batch,
            "offload": lambda db: transactional(db=name, offload=True)(offloaded)(),
        }
        result = self.attempt(task, name, calls[way], writes=True)
        self.settle(task, name, result, rows)
        if way in ("run", "offload") and isinstance(result, errors.ReadOnlyTransactionError):
            self.begin_to_see(task, name)  # what a function does shows only when it runs: the transaction has begun

    @rule(task=tasks, name=databases, key=keys)
    def refused(self, task: int, name: str, key: int) -> None:
        """A constraint refuses a statement; its transaction goes on."""
        result = self.attempt(
            task, name, lambda db: db.execute("INSERT INTO kv (k, v) VALUES (?, NULL)", (key,)), writes=True
        )
        open_ = self.open.get((task, name))
        if isinstance(result, errors.IntegrityError):
            assert open_ is None or not (open_.dead or open_.top.readonly)
            self.begin_to_see(task, name)
        else:
            self.settle(task, name, result, {})
            assert result == "waited" or isinstance(result, errors.DatabaseError), "nothing refused it"

    @rule(task=tasks, name=databases, way=st.sampled_from(["all", "stream", "run"]))
    def look(self, task: int, name: str, way: str) -> None:
        """Everybody sees what the model says."""

        async def stream(db: Any) -> list[Any]:
            async with db.stream("SELECT k, v FROM kv", chunk_size=2) as rows:
                return [row async for row in rows]

        calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "all": lambda db: db.fetch_all("SELECT k, v FROM kv"),
            "stream": stream,
            "run": lambda db: db.run(lambda c: c.execute("SELECT k, v FROM kv").fetchall(), readonly=True),
        }
        result = self.attempt(task, name, calls[way], writes=False)
        self.settle(task, name, result, {}, writes=False)
        if isinstance(result, list):
            assert {row["k"]: row["v"] for row in result} == self.view(task, name)

    # Rules: what goes wrong

    @rule(task=tasks, name=databases)
    def cancelled_while_it_runs(self, task: int, name: str) -> None:
        """A statement that was stopped takes its transaction with it."""

        async def cancelled(db: Any) -> str:
            with anyio.move_on_after(0.01) as scope:
                await db.fetch_value(SLOW_SELECT)
            return "stopped" if scope.cancelled_caught else "done"

        result = self.attempt(task, name, cancelled, writes=False)
        self.settle(task, name, result, {}, writes=False)
        open_ = self.open.get((task, name))
        if open_ is not None and result == "stopped":
            # On a busy machine it may have been called off before it ran, which does the transaction no harm.
            open_.dead = isinstance(
                self.do(task, lambda: get_db(name).fetch_value("SELECT 1")), errors.TransactionError
            )

    @rule(
        task=tasks, name=databases, key=keys, value=values, error=st.sampled_from(["full", "io", "memory", "corrupt"]),
        moment=st.sampled_from(["before", "rolled back"]),
    )  # fmt: skip
    def put_that_fails(self, task: int, name: str, key: int, value: int, error: str, moment: str) -> None:
        """A statement that fails of a fault changes nothing; where it took the transaction with it, that is over."""
        fault = Fault(error, moment, when=lambda sql: sql == PUT)
        FAULTS.plan(fault)
        result = self.attempt(task, name, lambda db: db.execute(PUT, (key, value)), writes=True)
        FAULTS.plan(None)
        open_ = self.open.get((task, name))
        if not fault.struck:
            self.settle(task, name, result, {key: value})
            return
        assert isinstance(result, errors.QueryExecutionError), result
        if open_ is not None:
            self.begin_to_see(task, name)
            if error != "full" or moment == "rolled back":
                open_.dead = True

    @rule(task=tasks, name=databases, error=st.sampled_from(["full", "io", "busy"]))
    def commit_that_fails(self, task: int, name: str, error: str) -> None:
        """A commit that fails has committed nothing, and the transaction is over; a busy one is tried again."""
        open_ = self.open.get((task, name))
        if open_ is None or open_.dead or len(open_.levels) > 1 or not open_.begun or open_.levels[0].readonly:
            return
        FAULTS.plan(Fault(error, when=lambda sql: sql.startswith("COMMIT")))
        result = self.do(task, get_db(name).commit)
        FAULTS.plan(None)
        del self.open[task, name]
        if error == "busy":
            assert result is None, result
            assert open_.top.data is not None
            self.committed[name] = open_.top.data
        else:
            assert isinstance(result, errors.QueryExecutionError), result

    @rule(task=tasks, name=databases)
    def close(self, task: int, name: str) -> None:
        """Closing the pool ends everybody's transactions; the next use opens another."""
        if (task, name) in self.open:
            return
        assert self.do(task, get_db(name).close) is None
        for (_, other), open_ in self.open.items():
            if other == name:
                open_.dead = True

    @rule(task=tasks, key=keys, value=values, fail=st.booleans())
    def both(self, task: int, key: int, value: int, fail: bool) -> None:
        """A transaction on two databases: both or none."""
        if any(self.holder(name) is not None or (task, name) in self.open for name in NAMES):
            return

        @transactional(db=NAMES)
        async def work() -> None:
            for name in NAMES:
                await get_db(name).execute(PUT, (key, value))
            if fail:
                raise errors.DatabaseError("mine")

        result = self.do(task, work)
        assert isinstance(result, errors.DatabaseError) if fail else result is None, result
        if not fail:
            for name in NAMES:
                self.committed[name][key] = value

    @invariant()
    def what_is_committed_is_there(self) -> None:
        for name, expected in self.committed.items():
            connection = _connect(self.directory / f"{name}.db")
            try:
                assert dict(connection.execute("SELECT k, v FROM kv").fetchall()) == expected
            finally:
                connection.close()

    def teardown(self) -> None:
        FAULTS.plan(None)
        FIGURES["runs of the state machine"] += 1
        try:
            for task, name in list(self.open):
                for _ in range(10):
                    if (task, name) in self.open:
                        self.rollback(task, name)
            self.portal.call(close_all)
            for sender in self.senders:
                self.portal.call(sender.aclose)
        finally:
            self.stack.close()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(
            ("asyncio", {"use_uvloop": True}),
            id="asyncio+uvloop",
            marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"),
        ),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def test_state_machine(backend: Any, pytestconfig: pytest.Config) -> None:
    """Whatever tasks do, in whatever order, with whatever going wrong: everybody sees what the model says."""
    machine = type("Machine", (Machine,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, EXAMPLES // (7 if pytestconfig.getoption("quick") else 1)),
            stateful_step_count=40,
            deadline=None,
            derandomize="STATEFUL_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            database=None,
        ),
    )
