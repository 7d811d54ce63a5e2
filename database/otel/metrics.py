"""What the pools are doing, read on the exporter's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from database.driver.roles import Owner

__all__ = ["GAUGES", "Attributes", "wal_size"]

Attributes = dict[str, str | int | float]


def _count(pool: Owner[Any]) -> list[tuple[float, Attributes]]:
    stats = pool.stats()
    writers = 0 if pool.writer.connection is None else 1
    return [
        (stats.readers_in_use, {"db.client.connection.state": "used", "database.role": "reader"}),
        (
            max(0, stats.readers_open - stats.readers_in_use),
            {"db.client.connection.state": "idle", "database.role": "reader"},
        ),
        (stats.writer_in_use, {"db.client.connection.state": "used", "database.role": "writer"}),
        (
            max(0, writers - stats.writer_in_use),
            {"db.client.connection.state": "idle", "database.role": "writer"},
        ),
    ]


def _max(pool: Owner[Any]) -> list[tuple[float, Attributes]]:
    return [(pool.size, {"database.role": "reader"}), (1, {"database.role": "writer"})]


def _pending(pool: Owner[Any]) -> list[tuple[float, Attributes]]:
    stats = pool.stats()
    return [(stats.waiting + stats.queued, {})]


def wal_size(pool: Owner[Any]) -> list[tuple[float, Attributes]]:
    """The length of the write-ahead log, where the engine has one."""
    gauges = pool.backend.gauges()
    return [(gauges["wal.size"], {})] if "wal.size" in gauges else []


GAUGES: Final = (
    ("db.client.connection.count", "{connection}", "Connections by what they are doing.", _count),
    ("db.client.connection.max", "{connection}", "The most connections there may be.", _max),
    ("db.client.connection.pending_requests", "{request}", "Statements and transactions that wait.", _pending),
)
