"""`top`: what the pools of running processes are doing, live, and what PostgreSQL's servers are.

The pools' side is read from the sockets that `database.driver.monitor` offers; the server's is asked of the server.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from database.cli.activity import Server
from database.cli.support import ENGINES, Status, Target, choose, clean, duration, fail, out, out_json, size
from database.driver import monitor

__all__ = ["top"]

_TOTALS = (
    "statements_total",
    "commits_total",
    "rollbacks_total",
    "grouped_total",
    "wait_seconds_total",
    "acquired_total",
)


WIDE = 150
"""Columns of the terminal from which all figures are shown."""

_COLUMNS: tuple[tuple[str, Literal["left", "center", "right"], bool], ...] = (
    ("pid", "right", True),
    ("program", "left", False),
    ("database", "left", True),
    ("loop", "left", False),
    ("read", "right", True),
    ("write", "center", True),
    ("wait", "right", True),
    ("queue", "right", True),
    ("stmt/s", "right", True),
    ("commit/s", "right", True),
    ("grouped/s", "right", False),
    ("rollb/s", "right", False),
    ("wait ms", "right", False),
    ("timeouts", "right", False),
    ("WAL", "right", True),
    ("up", "right", False),
)
"""Heading, alignment, and whether a narrow terminal shows it, too."""


def top(target: Target, name: str | None, *, folder: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Shows all pools, again and again, until somebody has seen enough."""
    servers = _servers(target, name) if folder is None else []
    folder = folder or _folder(target, name, needed=not servers)
    engine, colon, rest = (name or "").partition(":")
    if colon and engine in ENGINES:  # processes know databases by their names
        name = rest

    history = _History()

    def picture() -> RenderableType:
        shown = [] if folder is None else [_picture(_look(folder, name), history, folder)]
        return Group(*shown, *(server.picture(server.look()) for server in servers))

    try:
        if as_json:
            processes = [] if folder is None else _look(folder, name)
            out_json({"folder": folder, "processes": processes, "servers": [server.look() for server in servers]})
        elif once or not out().is_terminal:
            out().print(picture())
        else:
            with _keys() as pressed, Live(console=out(), screen=True, auto_refresh=False) as live:
                while True:
                    live.update(picture(), refresh=True)
                    if pressed(interval) in ("q", "Q", "\x1b", "\x04"):
                        return
    finally:
        for server in servers:
            server.close()


def _chosen(target: Target, name: str | None) -> list[tuple[str, Any]]:
    configuration = target.configuration()
    if name is not None:
        return [choose(configuration, name)]
    return [(engine, each) for engine, named in configuration.engines.items() for each in named.values()]


def _servers(target: Target, name: str | None) -> list[Server]:
    return [Server(each) for engine, each in _chosen(target, name) if engine == "postgresql"]


def _folder(target: Target, name: str | None, *, needed: bool) -> str | None:
    configuration = target.configuration()
    folders: set[str] = {found for _, each in _chosen(target, name) if (found := each.monitor) is not None}
    if not folders and not needed:
        return None
    if not folders:
        fail(
            f"{configuration.source}: no process offers a look at its pools, for `monitor` is not set",
            "set `monitor: ./data/monitor` in the configuration and start the program again",
            Status.USAGE,
        )
    if len(folders) > 1:
        fail(
            f"the databases have several folders: {', '.join(sorted(folders))}",
            "name one with --monitor, or a --db",
            Status.USAGE,
        )
    return folders.pop()


def _look(folder: str, name: str | None) -> list[dict[str, Any]]:
    """All processes; with a name, only those that have that database open, and of them only its pools."""
    processes = monitor.read(folder) if Path(folder).is_dir() else []
    if name is None:
        return processes
    found: list[dict[str, Any]] = []
    for process in processes:
        pools = [pool for pool in process["pools"] if pool["database"] == name]
        if pools or "error" in process:
            found.append({**process, "pools": pools})
    return found


class _History:
    """The last totals of each pool, for what happened since."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[float, dict[str, float]]] = {}

    def rates(self, process: dict[str, Any], pool: dict[str, Any]) -> dict[str, float]:
        """Totals per second: since the last look, or at the first one since the pool was opened."""
        key = (process["pid"], pool["database"], pool["opened"])
        now, totals = process["time"], {each: pool["stats"].get(each, 0) for each in _TOTALS}
        since, before = self._seen.get(key, (pool["opened"], dict.fromkeys(_TOTALS, 0)))
        self._seen[key] = now, totals
        seconds = max(now - since, 1e-6)
        return {each: max(totals[each] - before[each], 0) / seconds for each in _TOTALS}


def _picture(processes: list[dict[str, Any]], history: _History, folder: str) -> RenderableType:
    pools = sum(len(process["pools"]) for process in processes)
    head = Text.assemble(
        ("database top", "bold"),
        f"  {time.strftime('%H:%M:%S')}  {len(processes)} process{'' if len(processes) == 1 else 'es'},"
        f" {pools} pool{'' if pools == 1 else 's'}  ",
        (clean(folder), "dim"),
    )
    if not processes:
        return Group(
            head,
            Text("\nno process offers a pool here: none is running, or none has used its database yet", style="dim"),
        )
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    columns = [each for each in _COLUMNS if each[2] or out().width >= WIDE]
    for heading, justify, _ in columns:
        table.add_column(heading, justify=justify, no_wrap=True)
    notes: list[Text] = []
    for process in processes:
        pid = str(process["pid"])
        if "error" in process:
            notes.append(Text(f"{pid}: {clean(process['error'])}", style="yellow"))
            continue
        for pool in process["pools"]:
            cells = _cells(process, pool, history.rates(process, pool))
            table.add_row(*(cells[heading] for heading, _, _ in columns))
            for role, holders in pool["held_by"].items():
                notes.extend(
                    Text.assemble((f"{pid} {clean(pool['database'])} {role}: ", "cyan"), clean(holder, lines=False))
                    for holder in holders[:10]
                )
    held = Text("held by" if notes else "no transaction is open", style="bold" if notes else "dim")
    return Group(head, table, held, *notes)


def _cells(process: dict[str, Any], pool: dict[str, Any], rates: dict[str, float]) -> dict[str, Text | str]:
    stats = pool["stats"]
    waiting, queued, timeouts = (stats.get(name, 0) for name in ("waiting", "queued", "timeouts_total"))
    acquired = rates["acquired_total"]
    return {
        "pid": str(process["pid"]),
        "program": Text(clean(process["program"], lines=False)),
        "database": Text(clean(pool["database"], lines=False), style="cyan"),
        "loop": pool["loop"],
        "read": f"{stats.get('readers_in_use', 0)}/{stats.get('readers_open', 0)}/{stats.get('pool_size', 0)}",
        "write": Text("●", style="green") if stats.get("writer_in_use") else Text("○", style="dim"),
        "wait": Text(str(waiting), style="yellow" if waiting else ""),
        "queue": Text(str(queued), style="yellow" if queued > 100 else ""),
        "stmt/s": f"{rates['statements_total']:,.0f}",
        "commit/s": f"{rates['commits_total']:,.0f}",
        "grouped/s": f"{rates['grouped_total']:,.0f}",
        "rollb/s": f"{rates['rollbacks_total']:,.0f}",
        "wait ms": f"{rates['wait_seconds_total'] / acquired * 1000:.2f}" if acquired else "-",
        "timeouts": Text(str(timeouts), style="red" if timeouts else ""),
        "WAL": size(pool["wal_bytes"]),
        "up": duration(process["time"] - pool["opened"]),
    }


@contextmanager
def _keys() -> Generator[Any]:
    """Gives `pressed(seconds)`: the key that was pressed within that time, or `""`."""
    if sys.platform == "win32" or not sys.stdin.isatty():

        def sleep(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield sleep
        return
    import termios  # noqa: PLC0415  - not on Windows
    import tty  # noqa: PLC0415

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
