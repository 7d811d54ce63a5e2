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
    try:
        measure = importlib.import_module(f"database.{engine}.checkup").measure
    except ModuleNotFoundError:
        fail(f"`stats` does not know the engine {engine} yet", status=Status.USAGE)
    if settings.path == MEMORY:
        fail(f"database {settings.name!r} is {MEMORY}: it lives in the process that opened it", status=Status.USAGE)
    target.open()  # says what is wrong if there is no file

    async def look() -> Any:
        with err().status("counting …"):
            return await in_thread(lambda stopped: measure(settings, count=count, stopped=stopped))

    try:
        figures = run(look)
    except (ConnectionFailedError, OSError) as error:
        fail(f"{settings.path}: {getattr(error, 'reason', error)}", "`python -m database check` looks closer")
    if as_json:
        out_json({"name": settings.name, "engine": engine, **figures})
        return
    free = figures["free_pages"] * figures["page_size"]
    out().print(
        Text.assemble(("database ", "bold"), (clean(settings.name), "bold cyan"), f"  {clean(figures['path'])}")
    )
    out().print(
        f"  {size(figures['bytes'])} and {size(figures['wal_bytes'])} of WAL; {figures['pages']:,} pages of"
        f" {figures['page_size']:,} bytes, {size(free)} unused; journal {figures['journal_mode']};"
        f" {figures['encoding']}; user_version {figures['user_version']}; SQLite {figures['sqlite']}",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("table")
    for heading in ("rows", "size", "indexes", "their size"):
        table.add_column(heading, justify="right")
    for each in sorted(figures["tables"], key=lambda each: -((each["bytes"] or 0) + (each["index_bytes"] or 0))):
        rows = "-" if each["rows"] is None else f"{each['rows']:,}"
        table.add_row(
            Text(clean(each["name"], lines=False)),
            rows,
            size(each["bytes"]),
            str(each["indexes"]),
            size(each["index_bytes"]),
        )
    out().print(table)
