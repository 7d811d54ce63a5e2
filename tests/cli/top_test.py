"""`top`: what running processes offer, shown once, as JSON, and live."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell_test import Terminal
from tests.programs import Started

Cli = Callable[..., Any]

SERVICE = """
import sys, time, anyio
from database.driver import monitor
from database.sqlite3 import configure, get_db
configure({"database": {"sqlite": {"path": sys.argv[1], "init_sql": "", "monitor": sys.argv[2]}}})
async def main():
    db = get_db()
    await db.execute("CREATE TABLE IF NOT EXISTS t (x)")
    async with db.transaction():
        await db.execute("INSERT INTO t VALUES (1)")
        while not monitor.read(sys.argv[2]):
            await anyio.sleep(0.01)
        print("ready", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
anyio.run(main, backend=sys.argv[3])
"""


@pytest.fixture
def services(tmp_path: Path, short: Path, configure: Callable[..., Path]) -> Iterator[list[int]]:
    """Two processes, on asyncio and trio, each with an open transaction on a database of its own."""
    configure(monitor=str(short))
    running = []
    for number, backend in enumerate(("asyncio", "trio")):
        arguments = [str(tmp_path / f"{number}.db"), str(short), backend]
        running.append(Started(["-c", SERVICE, *arguments], tmp_path))
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.communicate("\n", timeout=20)
            assert process.returncode == 0


def test_once(cli: Cli, services: list[int]) -> None:
    """One look shows all processes, their loops, and who holds what; as JSON it has the same figures."""
    outcome = cli("top", "--once")
    assert (outcome.status, outcome.err) == (0, "")
    assert "2 processes, 2 pools" in outcome.out
    for pid, loop in zip(services, ("asyncio", "trio"), strict=True):
        assert any(str(pid) in line and loop in line for line in outcome.out.splitlines())
        assert f"{pid} default writer: " in outcome.out
    found = cli("top", "--json", "--db", "default").json["processes"]
    assert sorted(each["pid"] for each in found) == sorted(services)
    assert found[0]["pools"][0]["stats"]["writer_in_use"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_live(services: list[int], tmp_path: Path) -> None:
    """At a terminal the picture is drawn again and again until somebody presses q."""
    terminal = Terminal(tmp_path, "top", "--interval", "0.1")
    with terminal:
        assert terminal.see("2 processes, 2 pools"), terminal.seen
        assert terminal.see("2 processes, 2 pools"), terminal.seen
        terminal.type("q")
        assert terminal.process.wait(20) == 0
    with Terminal(tmp_path, "top", "--interval", "0.1") as terminal:
        assert terminal.see("2 processes, 2 pools"), terminal.seen
        terminal.type("\x03")
        assert terminal.process.wait(20) == 130


def test_nobody_there(cli: Cli, configure: Callable[..., Path], short: Path) -> None:
    """Without a process it says so; without the setting it says what to set."""
    configure(monitor=str(short / "not-there"))
    assert "no process offers a pool here" in cli("top", "--once").out
    assert cli("top", "--json").json["processes"] == []
    configure()
    outcome = cli("top")
    assert (outcome.status, "set `monitor: ./data/monitor`" in outcome.err) == (2, True)
    assert cli("top", "--once", "--monitor", short).status == 0
