"""The JSON/ECS formatter, and the example that fills `ForwardHandler`: tried with receivers that hang, refuse and die."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors
from tests.contract.support import HANGING, add, names

pytest.importorskip("ecs_logging")
from database.elk import EcsFormatter  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
spec = importlib.util.spec_from_file_location("example_forward", EXAMPLES / "forward.py")
assert spec is not None
assert spec.loader is not None
forward = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forward)


class Receiver:
    """A TCP receiver of JSON lines; `hangs`: it accepts and never reads."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.lines: list[dict[str, Any]] = []
        self.hangs = hangs
        self._ended = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="pytest receiver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            if self.hangs:
                self._ended.wait()
                return
            with connection.makefile(encoding="utf-8") as file:
                self.lines.extend(json.loads(line) for line in file)

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)
        self._server.close()


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """The package's records go to the handler, all of them."""
    logger = logging.getLogger("database")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(EcsFormatter(extra={"service.name": "jobu"}))
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.mark.anyio
async def test_ecs(db: Any) -> None:
    """A statement, its failure and a transaction are ECS documents; each field has one place and one type."""
    collect = Collect()
    with attached(collect):
        await add(db, "a")
        with pytest.raises(errors.IntegrityError):
            await add(db, "a")
        async with db.transaction():
            await names(db)
    done, error, failed, select, transaction = collect.lines
    assert done["service"]["name"] == "jobu"
    assert done["log"]["logger"] == done["event"]["dataset"] == "database.query"
    assert done["event"]["outcome"] == "success"
    assert isinstance(done["event"]["duration"], int)
    assert done["db"] == {
        "query": {"text": "INSERT INTO jobs (name) VALUES (:name)"}, "operation": {"name": "INSERT"},
        "response": {"returned_rows": 1},
    }  # fmt: skip
    assert done["database"]["name"] == "default"
    assert done["database"]["parameters"] == "<name>"
    assert error["error"] == failed["error"] == {"type": "IntegrityError"}
    assert error["log.level"] == "error"
    assert error["db"]["response"] == {"status_code": "SQLITE_CONSTRAINT_UNIQUE"}
    assert error["event"]["outcome"] == failed["event"]["outcome"] == "failure"
    assert select["database"]["transaction"] == transaction["database"]["transaction"]
    assert transaction["database"]["outcome"] == "committed"
    assert "test_ecs" in transaction["database"]["holder"]


def test_ecs_leaves_other_records_alone() -> None:
    """A record of the application keeps its own fields; the package's record is unchanged for other handlers."""
    formatter = EcsFormatter()
    record = logging.makeLogRecord({"name": "app", "msg": "x", "levelno": logging.INFO, "rows": 3})
    assert json.loads(formatter.format(record))["rows"] == 3
    record = logging.makeLogRecord(
        {"name": "database.query", "msg": "x", "levelno": 20, "parameters": (1, object()), "rows": 3}
    )
    assert json.loads(formatter.format(record))["db"]["response"]["returned_rows"] == 3
    assert (record.rows, record.parameters[0]) == (3, 1)  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_records_arrive(db: Any) -> None:
    """Every record arrives, in order, as JSON."""
    receiver = Receiver()
    handler = forward.Forwarder(forward.JsonLines("127.0.0.1", receiver.port))
    with attached(handler):
        for number in range(50):
            await add(db, f"job {number}")
    await anyio.to_thread.run_sync(handler.close)
    receiver.close()
    assert [line["db"]["query"]["text"] for line in receiver.lines] == ["INSERT INTO jobs (name) VALUES (:name)"] * 50
    times = [line["@timestamp"] for line in receiver.lines]
    assert times == sorted(times)
    assert (handler.sent, handler.dropped) == (50, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["hangs", "refuses", "raises"])
async def test_a_receiver_that_fails_holds_nobody_up(db: Any, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Statements go on while nothing can be sent; the queue stays bounded, and what is dropped is counted."""
    receiver = Receiver(hangs=True) if kind == "hangs" else None
    if kind == "raises":

        def send(_lines: list[str]) -> None:
            raise RuntimeError("no")
    else:
        port = receiver.port if receiver is not None else free_port()
        send = forward.JsonLines("127.0.0.1", port, timeout=0.2)
    handler = forward.Forwarder(send, capacity=20, batch=5, patience=0.2)
    with attached(handler), anyio.fail_after(HANGING):
        for number in range(200):
            await db.fetch_value(f"SELECT {number}, '{'x' * 100_000 if kind == 'hangs' else ''}'")
        assert len(handler._queue) <= 20
    await anyio.to_thread.run_sync(handler.close)
    assert (
        handler.sent + handler.dropped + len(handler._queue) >= 200
    )  # more where something was slow and is told of, too
    assert handler.dropped >= 150 - (150 if kind == "hangs" else 0)
    # A receiver that hangs has room for some, in buffers of its system's; where the loop is slow enough, for all.
    assert handler.sent == 200 or "log records could not be sent" in capsys.readouterr().err
    assert handler.sent == 0 or kind == "hangs"
    if receiver is not None:
        receiver.close()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.anyio
async def test_it_tries_again(db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A receiver that comes back gets what was queued meanwhile, each record once."""
    away = threading.Event()
    got: list[str] = []

    def send(lines: list[str]) -> None:
        if not away.is_set():
            away.set()
            raise ConnectionError("away")
        got.extend(lines)

    handler = forward.Forwarder(send)
    with attached(handler):
        for number in range(10):
            await db.fetch_value(f"SELECT {number}")
    await anyio.to_thread.run_sync(handler.close)
    assert [json.loads(line)["db"]["query"]["text"] for line in got] == [f"SELECT {number}" for number in range(10)]
    assert "ConnectionError: away; trying again" in capsys.readouterr().err


PROGRAM = """
import logging, sys
sys.path.insert(0, {examples!r})
import anyio
from forward import Forwarder, JsonLines
from database.sqlite3 import configure, get_db

async def main():
    for number in range(100):
        await get_db().fetch_value(f"SELECT {{number}}")

configure({{"database": {{"sqlite": {{"path": ":memory:", "init_sql": ""}}}}}})
logger = logging.getLogger("database")
logger.setLevel(logging.INFO)
logger.addHandler(Forwarder(JsonLines("127.0.0.1", {port})))
anyio.run(main)
"""


FORKING = """
import logging, os, sys
sys.path.insert(0, {examples!r})
from forward import Forwarder

def send(lines):
    with open({path!r}, "a") as file:
        file.writelines(f"{{os.getpid()}} {{line}}\\n" for line in lines)

handler = Forwarder(send)
logger = logging.getLogger("database")
logger.setLevel(logging.INFO)
logger.addHandler(handler)
logger.info("the parent's")
handler.flush()
child = os.fork()
logger.info("the child's" if child == 0 else "the parent's")
handler.flush()
if child == 0:
    logging.shutdown()
    os._exit(0)
os.waitpid(child, 0)
print(child)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_sends_its_own(tmp_path: Path) -> None:
    """The handler works in a forked child, where its thread is gone, and sends nothing of the parent's twice."""
    path = tmp_path / "sent"
    done = subprocess.run(
        [sys.executable, "-c", FORKING.format(examples=str(EXAMPLES), path=str(path))],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    sent = [line.split(" ", 1) for line in path.read_text().splitlines()]
    owners = [("child" if pid == done.stdout.strip() else "parent", json.loads(line)["message"]) for pid, line in sent]
    assert sorted(owners) == [("child", "the child's"), ("parent", "the parent's"), ("parent", "the parent's")]


def test_flushed_at_exit() -> None:
    """A program that just ends has all its records sent."""
    receiver = Receiver()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(examples=str(EXAMPLES), port=receiver.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    receiver.close()
    queries = [line["db"]["query"]["text"] for line in receiver.lines if "query" in line.get("db", {})]
    assert queries == [f"SELECT {number}" for number in range(100)]
