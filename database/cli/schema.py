"""`init` and `migrate`: the schema's beginning and its way from there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rich.text import Text

from database.cli.backup import copy, file_in
from database.cli.support import Status, Target, Verdict, choose, clean, duration, fail, out, out_json, remark, run
from database.engine.migrations import Migration, MigrationReport, MigrationStatus
from database.settings import MEMORY

__all__ = ["init", "migrate"]


def init(target: Target, *, every: bool, as_json: bool) -> None:
    """Creates the databases of a configuration, or one of them."""
    configuration = target.configuration()
    if every:
        chosen = [(engine, each) for engine, named in configuration.engines.items() for each in named.values()]
    else:
        chosen = [choose(configuration, target.name)]
    results: list[dict[str, Any]] = []
    for engine, settings in chosen:
        path: str | None = getattr(settings, "path", None)
        if path == MEMORY:
            remark(f"{settings.name}: {MEMORY} needs no init")
            continue
        new = path is not None and not Path(path).exists()
        place = path or importlib.import_module(f"database.{engine}.opening").describe(settings)
        applied = run(_init, Target(target.config, f"{engine}:{settings.name}", target.path), settings)
        results.append(
            {"name": settings.name, "path": place, "created": new, "migrations": [each.name for each in applied]}
        )
        if not as_json:
            verb = "created" if new else "was there already; opened" if path is not None else "is ready"
            out().print(
                Text.assemble(("✓ ", "green"), (clean(settings.name), "cyan"), f" {verb}: {clean(place)}"),
                soft_wrap=True,
            )
            for migration in applied:
                out().print(f"  migration {migration.name} applied", markup=False)
    if as_json:
        out_json(results)


async def _init(target: Target, settings: Any) -> tuple[Migration, ...]:
    db = target.open(schema=True, must_exist=False)
    if getattr(settings, "migrations", None) is None:
        await db.open()
        return ()
    return (await db.migrate()).applied


def migrate(
    target: Target,
    folder: str | None,
    *,
    dry_run: bool,
    check: bool,
    to: int | None,
    baseline: int | None,
    backup: str | None,
    wait: float,
    as_json: bool,
) -> None:
    """Applies migrations, or tells about them."""
    if folder is None and getattr(target.settings()[1], "migrations", None) is None:
        fail(
            f"database {target.name!r} has no migrations",
            "set `migrations` in the configuration to their folder, or name it with --folder",
            Status.USAGE,
        )
    if check:
        _show(run(_status, target, folder), as_json=as_json)
        return

    def progress(migration: Migration, seconds: float) -> None:
        if not as_json:
            verb = "would be applied" if dry_run else "applied"
            out().print(
                Text.assemble(("✓ ", "green"), f"{clean(migration.name)} {verb} ({duration(seconds)})"), soft_wrap=True
            )

    async def work() -> MigrationReport:
        db = target.open(must_exist=False)
        if backup is not None and not dry_run and (await db.migration_status(folder)).pending:
            await copy(db, file_in(backup, db), force=False)
        return await db.migrate(folder, dry_run=dry_run, to=to, baseline=baseline, wait=wait, progress=progress)

    report = run(work)
    if as_json:
        out_json(
            {
                "applied": [each.name for each in report.applied],
                "version": report.version,
                "dry_run": report.dry_run,
                "baseline": baseline,
            }
        )
    elif baseline is not None:
        out().print(
            f"recorded as applied, without running them: migrations 1 to {baseline}{' (dry run)' if dry_run else ''}"
        )
    elif dry_run:
        out().print(
            f"dry run: {len(report.applied)} would be applied, all rolled back; the database is at {report.version}"
        )
    elif report.applied:
        out().print(f"the database is at {report.version}")
    else:
        out().print(f"nothing to do: the database is at {report.version}")


async def _status(target: Target, folder: str | None) -> MigrationStatus:
    return await target.open().migration_status(folder)


def _show(status: MigrationStatus, *, as_json: bool) -> None:
    if as_json:
        out_json(
            {
                "applied": [
                    {"number": each.number, "name": each.name, "applied_at": each.applied_at, "seconds": each.seconds}
                    for each in status.applied
                ],
                "pending": [each.name for each in status.pending],
            }
        )
    else:
        for each in status.applied:
            took = "recorded by a baseline" if not each.seconds else duration(each.seconds)
            out().print(
                Text.assemble(("✓ ", "green"), f"{clean(each.name)}  {each.applied_at} UTC, {took}"), soft_wrap=True
            )
        for migration in status.pending:
            out().print(Text.assemble(("· ", "yellow"), f"{clean(migration.name)}  pending"), soft_wrap=True)
        out().print(f"{len(status.applied)} applied, {len(status.pending)} pending")
    if status.pending:
        raise Verdict
