"""What a database is asked for once in a while: a copy of itself, and migrations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from database.driver.lease import Lease
from database.driver.request import SCRIPT
from database.errors import ConfigurationError, TransactionError
from database.session.binding import Binding
from database.session.origin import Origin
from database.session.propagation import open_transaction
from database.session.sending import send_unit

if TYPE_CHECKING:
    from database.engine.contract import Migrations
    from database.engine.migrations import Migration, MigrationReport, MigrationStatus

__all__ = ["backup", "migrate", "migration_status"]

PAGES = 256
"""Copied at a time."""


async def backup(
    binding: Binding, path: str | os.PathLike[str], progress: Callable[[int, int, int], object] | None, origin: Origin
) -> None:
    """See `Database.backup`."""
    target = os.fsdecode(path)
    pool = binding.pool()
    lease = Lease(pool, origin, number=None, readonly=True, transaction=False)
    request = pool.request(SCRIPT, binding.connection.backup, target, progress, PAGES, f"backup to {target}")
    try:
        lease.submit(request)
        await request
    finally:
        await lease.give_back("the end of a backup")


async def migrate(
    binding: Binding,
    folder: str | os.PathLike[str] | None,
    dry_run: bool,
    to: int | None,
    baseline: int | None,
    wait: float,
    progress: Callable[[Migration, float], object] | None,
) -> MigrationReport:
    """See `Database.migrate`."""
    from database.engine.migrations import Order  # noqa: PLC0415  - few programs need it, and those once

    path = _folder(binding, folder)
    if open_transaction(binding) is not None:
        raise TransactionError("migrate() opens transactions of its own, and was called inside one; call it outside")
    order = Order(path, dry_run, to, baseline, wait, progress)
    report: MigrationReport = await send_unit(
        binding, SCRIPT, _migrations(binding).migrate, order, None, label="migrate()"
    )
    return report


async def migration_status(binding: Binding, folder: str | os.PathLike[str] | None) -> MigrationStatus:
    """See `Database.migration_status`."""
    from database.engine.migrations import MigrationStatus, load, pending  # noqa: PLC0415  - as above

    path = _folder(binding, folder)
    applied = await send_unit(
        binding,
        SCRIPT,
        _migrations(binding).applied,
        None,
        None,
        label="migration_status()",
        readonly=True,
    )
    return MigrationStatus(applied, pending(load(path, binding.engine.name), applied, path))


def _migrations(binding: Binding) -> Migrations:
    engine = binding.engine
    if engine.migrations is None:
        raise ConfigurationError(f"database {binding.name!r}: the engine {engine.name} has no migrations")
    return engine.migrations()


def _folder(binding: Binding, folder: str | os.PathLike[str] | None) -> str:
    found = binding.resolve().settings  # the configuration may be another one since the last pool was closed
    chosen = getattr(found, "migrations", None) if folder is None else os.fspath(folder)
    if not chosen:
        raise ConfigurationError(
            f"database {binding.name!r} has no migrations: set `migrations` in the configuration to their folder, or"
            " name it in the call"
        )
    return str(chosen)
