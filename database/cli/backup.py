"""`backup`: a consistent copy, with a progress bar."""

from __future__ import annotations

import os
import time
from datetime import datetime
from importlib import import_module
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from database.cli.support import Status, Target, duration, err, fail, in_thread, out, out_json, run, size
from database.session.database import Database

__all__ = ["backup", "copy", "file_in"]


def backup(target: Target, place: str, *, force: bool, verify: bool, as_json: bool) -> None:
    """Makes a copy of one database."""
    began = time.perf_counter()

    engine, settings = target.settings()

    async def work() -> Path:
        db = target.open()
        file = file_in(place, db.name)
        await copy(db, file, force=force)
        if verify:
            faults = import_module(f"database.{engine}.checkup").faults
            with err().status("verifying …"):
                found = await in_thread(lambda stopped: faults(settings, file, stopped=stopped))
            if found:
                fail(f"{file} is damaged: {found[0]}", "`python -m database check` tells whether the original is, too")
        return file

    file = run(work)
    seconds = time.perf_counter() - began
    length = file.stat().st_size
    if as_json:
        out_json({"path": str(file), "bytes": length, "seconds": round(seconds, 3), "verified": verify})
    else:
        checked = ", verified" if verify else ""
        out().print(f"{file}: {size(length)} in {duration(seconds)}{checked}", markup=False, soft_wrap=True)


def file_in(place: str, name: str) -> Path:
    """The file that a target means: in a folder, one that is named by date; a folder that ends in `/` is made."""
    file = Path(place).expanduser()
    if place.endswith(("/", os.sep)) and not file.exists():
        file.mkdir(parents=True)
    if file.is_dir():
        file /= f"{name}-{datetime.now().strftime('%Y-%m-%dT%H-%M-%S')}.db"  # local time, for people
    return file


async def copy(db: Database, file: Path, *, force: bool) -> None:
    """Backs a database up into a file, showing how far it is."""
    if file.exists() and not force:
        fail(f"{file} exists already", "name another file, or use --force to replace it", Status.USAGE)
    if not file.parent.is_dir():
        fail(f"{file.parent}: no such folder", status=Status.USAGE)
    columns = (TextColumn("backup"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        task = bar.add_task("backup", total=None)

        def progress(_status: int, remaining: int, total: int) -> None:
            bar.update(task, completed=total - remaining, total=total)

        await db.backup(file, progress=progress)
