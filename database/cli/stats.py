"""`stats`: a database in figures."""

from __future__ import annotations

import importlib
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from database.cli.support import Status, Target, clean, err, fail, in_thread, out, out_json, run, size
from database.errors import ConnectionFailedError
from database.settings import MEMORY

__all__ = ["stats"]


def stats(target: Target, *, count: bool, as_json: bool) -> None:
    """Shows the figures of one database."""
    engine, settings = target.settings()
    if getattr(settings, "path", None) == MEMORY:
        fail(f"database {settings.name!r} is {MEMORY}: it lives in the process that opened it", status=Status.USAGE)
    target.open()  # says what is wrong if there is no file, or an extra is missing
    show = _show_postgresql if engine == "postgresql" else _show_sqlite
    # SQLite's stands beside the checkup, with which it shares the way a file is looked at.
    module = "database.postgresql.figures" if engine == "postgresql" else f"database.{engine}.checkup"
    measure = importlib.import_module(module).measure

    async def look() -> Any:
        with err().status("counting …"):
            return await in_thread(lambda stopped: measure(settings, count=count, stopped=stopped))

    try:
        figures = run(look)
    except (ConnectionFailedError, OSError) as error:
        place = getattr(settings, "path", None) or getattr(error, "path", settings.name)
        fail(f"{place}: {getattr(error, 'reason', error)}", "`python -m database check` looks closer")
    if as_json:
        out_json({"name": settings.name, "engine": engine, **figures})
        return
    out().print(
        Text.assemble(("database ", "bold"), (clean(settings.name), "bold cyan"), f"  {clean(figures['path'])}")
    )
    show(figures)
    _show_tables(figures["tables"])


def _show_sqlite(figures: dict[str, Any]) -> None:
    free = figures["free_pages"] * figures["page_size"]
    out().print(
        f"  {size(figures['bytes'])} and {size(figures['wal_bytes'])} of WAL; {figures['pages']:,} pages of"
        f" {figures['page_size']:,} bytes, {size(free)} unused; journal {figures['journal_mode']};"
        f" {figures['encoding']}; user_version {figures['user_version']}; SQLite {figures['sqlite']}",
        soft_wrap=True,
    )


def _show_postgresql(figures: dict[str, Any]) -> None:
    pages = figures["pages_from_memory"] + figures["pages_read"]
    memory = f", {figures['pages_from_memory'] / pages:.1%} of pages from memory" if pages else ""
    since = f" since {figures['since']} UTC" if figures["since"] else ""
    out().print(
        f"  {size(figures['bytes'])}; PostgreSQL {figures['server']}{', a standby' if figures['standby'] else ''};"
        f" {figures['encoding']}, {figures['collation']}; role {figures['role']}, schema {figures['schema']};"
        f" {figures['connections']} of {figures['max_connections']} connections",
        soft_wrap=True,
        markup=False,
    )
    out().print(
        f"  {figures['commits']:,} commits, {figures['rollbacks']:,} rollbacks, {figures['deadlocks']:,} deadlocks,"
        f" {size(figures['temp_bytes'])} of temporary files{memory}{since}",
        soft_wrap=True,
    )


def _show_tables(tables: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("table")
    server = any("dead_rows" in each for each in tables)
    for heading in ("rows", "size", "indexes", "their size", *(("dead rows", "last vacuum (UTC)") if server else ())):
        table.add_column(heading, justify="right")
    for each in sorted(tables, key=lambda each: -((each["bytes"] or 0) + (each["index_bytes"] or 0))):
        rows = "-" if each["rows"] is None else f"{each['rows']:,}"
        if each["rows"] is None and each.get("estimated_rows"):
            rows = f"about {each['estimated_rows']:,}"
        table.add_row(
            Text(clean(each["name"], lines=False)),
            rows,
            size(each["bytes"]),
            str(each["indexes"]),
            size(each["index_bytes"]),
            *((f"{each['dead_rows']:,}", each["vacuumed_at"] or "-") if server else ()),
        )
    out().print(table)
