"""`backup`: a consistent copy, with a progress bar."""

from __future__ import annotations

import os
import time
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from database import settings
from database.cli.support import Status, Target, duration, err, fail, in_thread, out, out_json, run, size
from database.session.database import Database

__all__ = ["backup", "copy", "file_in"]


def backup(target: Target, place: str, *, force: bool, verify: bool, as_json: bool) -> None:
    """Makes a copy of one database."""
    began = time.perf_counter()

    async def work() -> tuple[Path, dict[str, Any]]:
        db = target.open()
        file = file_in(place, db)
        return file, await copy(db, file, force=force, verify=verify)

    file, more = run(work)
    seconds = time.perf_counter() - began
    length = file.stat().st_size
    if as_json:
        out_json({"path": str(file), "bytes": length, "seconds": round(seconds, 3), "verified": verify, **more})
    else:
        checked = ", verified" if verify else ""
        out().print(f"{file}: {size(length)} in {duration(seconds)}{checked}", markup=False, soft_wrap=True)


def file_in(place: str, db: Database) -> Path:
    """The file that a target means: in a folder, one that is named by date; a folder that ends in `/` is made."""
    file = Path(place).expanduser()
    if place.endswith(("/", os.sep)) and not file.exists():
        file.mkdir(parents=True)
    if file.is_dir():
        ending = "dump" if db.engine.name == "postgresql" else "db"
        file /= f"{db.name}-{datetime.now().strftime('%Y-%m-%dT%H-%M-%S')}.{ending}"  # local time, for people
    return file


async def copy(db: Database, file: Path, *, force: bool, verify: bool = False) -> dict[str, Any]:
    """Backs a database up into a file, showing how far it is; gives what else there is to tell."""
    if file.exists() and not force:
        fail(f"{file} exists already", "name another file, or use --force to replace it", Status.USAGE)
    if not file.parent.is_dir():
        fail(f"{file.parent}: no such folder", status=Status.USAGE)
    columns = (TextColumn("backup"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        task = bar.add_task("backup", total=None)
        if db.engine.name == "postgresql":
            from database.cli.dumps import dump  # noqa: PLC0415  - for those who use it

            return await dump(
                settings.current().find(db.name, "postgresql")[1],
                file,
                force=force,
                verify=verify,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

        def progress(_status: int, remaining: int, total: int) -> None:
            bar.update(task, completed=total - remaining, total=total)

        await db.backup(file, progress=progress)
    if verify:
        faults = import_module(f"database.{db.engine.name}.checkup").faults
        chosen = settings.current().find(db.name, db.engine.name)[1]
        with err().status("verifying …"):
            found = await in_thread(lambda stopped: faults(chosen, file, stopped=stopped))
        if found:
            fail(f"{file} is damaged: {found[0]}", "`python -m database check` tells whether the original is, too")
    return {}
