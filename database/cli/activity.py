"""What a PostgreSQL server does, shown: for `top` and `stats`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from database.cli.support import clean, duration, out

__all__ = ["Server", "blockings", "sessions"]

IDLE_SHOWN = 5
"""Connections shown that do nothing."""


class Server:
    """One database's server, looked at again and again over one connection."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._inquiry: Any = None
        self._before: tuple[float, dict[str, Any]] | None = None

    def look(self) -> dict[str, Any]:
        """One look; what is wrong stands under `error`."""
        import psycopg  # noqa: PLC0415  - an extra

        from database import errors  # noqa: PLC0415
        from database.postgresql import activity  # noqa: PLC0415
        from database.postgresql.inquiry import Inquiry  # noqa: PLC0415

        try:
            if self._inquiry is None:
                self._inquiry = Inquiry(self.settings, lambda: False)
            return activity.look(self._inquiry, self.settings)
        except (psycopg.Error, errors.DatabaseError) as error:
            self.close()
            return {"database": self.settings.name, "error": str(error).strip()}

    def close(self) -> None:
        """Ends the connection."""
        inquiry, self._inquiry = self._inquiry, None
        if inquiry is not None:
            inquiry.__exit__(None, None, None)

    def picture(self, found: dict[str, Any]) -> RenderableType:
        """A look, for people."""
        if "error" in found:
            return Text(f"{clean(found['database'])}: {clean(found['error'])}", style="red")
        return Group(self._head(found), *_pooler(found), sessions(found), blockings(found))

    def _head(self, found: dict[str, Any]) -> Text:
        totals = found["totals"]
        states = [session["state"] for session in found["sessions"]]
        waiting = sum(1 for session in found["sessions"] if session["blocked_by"])
        idle = sum(1 for state in states if state.startswith("idle in transaction"))
        then, before = self._before or (found["time"], totals)
        self._before = found["time"], totals
        seconds = max(found["time"] - then, 1e-6)
        text = Text.assemble(
            (f"{clean(found['database'])}", "bold cyan"),
            f"  {clean(found['server'])}, PostgreSQL {found['version']}\n"
            f"  {totals['connections']} of {totals['max_connections']} connections; here {states.count('active')} active,"
            f" {states.count('idle')} idle, ",
            (f"{idle} idle in transaction", "yellow" if idle else ""),
            ", ",
            (f"{waiting} blocked", "red" if waiting else ""),
        )
        if then != found["time"]:
            commits, rollbacks = ((totals[key] - before[key]) / seconds for key in ("commits", "rollbacks"))
            text.append(f"; {commits:,.0f} commits/s, {rollbacks:,.0f} rollbacks/s")
        pages = totals["pages_from_memory"] + totals["pages_read"]
        if pages:
            text.append(f"; {totals['pages_from_memory'] / pages:.1%} of pages from memory")
        text.append(f"; {totals['deadlocks']:,} deadlocks")
        return text


def _pooler(found: dict[str, Any]) -> list[Text]:
    pools = found.get("pooler")
    if pools is None:
        return []
    if isinstance(pools, str):
        return [Text(f"  pooler: {pools}", style="dim")]
    lines: list[Text] = []
    for pool in pools:
        waiting = pool.get("cl_waiting", 0)
        lines.append(
            Text.assemble(
                f"  pooler {clean(str(pool.get('database')))}/{clean(str(pool.get('user')))}:"
                f" {pool.get('cl_active', 0)} clients, ",
                (f"{waiting} waiting", "red" if waiting else ""),
                f" (longest {pool.get('maxwait', 0)} s); servers: {pool.get('sv_active', 0)} active,"
                f" {pool.get('sv_idle', 0)} idle; {pool.get('pool_mode', '')} mode",
            )
        )
    return lines


def _since(seconds: float | None) -> str:
    return "-" if seconds is None else duration(max(seconds, 0))


def _wait(session: dict[str, Any]) -> str:
    if session["blocked_by"]:
        return f"pid {', '.join(map(str, session['blocked_by']))}"
    if session["state"] != "active" or session["wait_event"] is None:
        return ""
    return f"{session['wait_event_type']}: {session['wait_event']}"


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], Any], bool], ...] = (
    ("pid", lambda each: str(each["pid"]), True),
    ("role", lambda each: each["role"] or "", False),
    ("program", lambda each: each["application"], True),
    ("client", lambda each: each["client"], False),
    ("state", lambda each: each["state"], True),
    ("for", lambda each: duration(max(each["state_seconds"] or 0, 0)), True),
    ("transaction", lambda each: _since(each["transaction_seconds"]), True),
    ("waits for", _wait, True),
    ("SQL", lambda each: " ".join(each["query"].split()), True),
)  # fmt: skip
"""Heading, cell, and whether a narrow terminal shows it, too."""


def sessions(found: dict[str, Any], wide: int = 150) -> RenderableType:
    """The connections: those that wait first, then those that work; of the idle ones a few."""
    order = {"active": 1, "idle in transaction": 2, "idle in transaction (aborted)": 2}
    shown = sorted(
        found["sessions"],
        key=lambda each: (
            0 if each["blocked_by"] else order.get(each["state"], 3),
            -(each["transaction_seconds"] or 0),
            each["pid"],
        ),
    )
    idle = [each for each in shown if each["state"] == "idle"]
    left_out = idle[IDLE_SHOWN:]
    if not shown:
        return Text("nobody else is connected", style="dim")
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    columns = [each for each in _COLUMNS if each[2] or out().width >= wide]
    for heading, _, _ in columns:
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("pid", "for", "transaction") else "left")
    for session in shown:
        if session in left_out:
            continue
        style = "red" if session["blocked_by"] else "dim" if session["state"] == "idle" else ""
        table.add_row(*(Text(clean(str(cell(session)), lines=False), style=style) for _, cell, _ in columns))
    return Group(table, Text(f"and {len(left_out)} more that are idle", style="dim")) if left_out else table


def blockings(found: dict[str, Any]) -> RenderableType:
    """Who blocks whom, a line each."""
    known = {session["pid"]: session for session in found["sessions"]}
    if not found["blockings"]:
        return Text("nobody waits for a lock", style="dim")
    lines: list[Text] = [Text("who blocks whom", style="bold")]
    for each in found["blockings"]:
        blocker = known.get(each["blocker"])
        if blocker is None:
            what = (
                "a prepared transaction"
                if each["blocker"] == 0
                else f"{each['blocker']} (of another database, or gone)"
            )
        else:
            since = blocker["transaction_seconds"]
            open_ = "" if since is None else f", transaction open for {duration(max(since, 0))}"
            what = f"{each['blocker']} ({blocker['application'] or blocker['role']}, {blocker['state']}{open_})"
        lines.append(
            Text.assemble(
                (f"{each['waiting']}", "red"),
                f" waits {duration(max(each['seconds'] or 0, 0))} for {clean(each['lock'] or 'a lock')}, held by ",
                (clean(what, lines=False), "bold" if each["root"] else ""),
                *([f": {clean(' '.join(blocker['query'].split())[:200], lines=False)}"] if blocker is not None else []),
            )
        )
    return Group(*lines)
