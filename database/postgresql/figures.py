"""A database in figures: `python -m database stats`. Reads only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from database.errors import ConnectionFailedError
from database.postgresql.inquiry import Inquiry
from database.postgresql.opening import describe
from database.postgresql.settings import PostgresqlSettings

__all__ = ["measure", "totals"]

_TABLES = """
SELECT c.oid::regclass::text AS name, c.relkind::text AS kind, greatest(c.reltuples, 0)::int8 AS estimate,
    pg_table_size(c.oid)::int8 AS bytes,
    (SELECT count(*)::int FROM pg_index i WHERE i.indrelid = c.oid) AS indexes, pg_indexes_size(c.oid)::int8 AS index_bytes,
    coalesce(s.n_dead_tup, 0)::int8 AS dead_rows, coalesce(s.seq_scan, 0)::int8 AS scans,
    coalesce(s.idx_scan, 0)::int8 AS index_scans,
    to_char(greatest(s.last_vacuum, s.last_autovacuum) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS vacuumed_at
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_stat_user_tables s ON s.relid = c.oid
WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND n.nspname NOT LIKE 'pg\\_%'
    AND n.nspname <> 'information_schema' ORDER BY 1
"""


def measure(settings: PostgresqlSettings, *, count: bool, stopped: Callable[[], bool]) -> dict[str, Any]:
    """A database in figures.

    Args:
        settings: Of the database.
        count: Whether rows are counted, which reads each table, or an index of it, from end to end; else they are estimated.
        stopped: Whether to give up.

    Raises:
        ConnectionFailedError: There is no connection to be had, or the server refuses.
    """
    try:
        return _measure(settings, count, stopped)
    except psycopg.Error as error:
        raise ConnectionFailedError(describe(settings), " ".join(str(error).split())) from error


def _measure(settings: PostgresqlSettings, count: bool, stopped: Callable[[], bool]) -> dict[str, Any]:
    with Inquiry(settings, stopped) as inquiry:
        inquiry.snapshot()
        about = inquiry.row(
            "SELECT current_database() AS database, current_setting('server_version') AS server,"
            " pg_database_size(current_database())::int8 AS bytes, pg_encoding_to_char(encoding) AS encoding,"
            " datcollate AS collation, current_user AS role, current_schema() AS schema, pg_is_in_recovery() AS standby"
            " FROM pg_database WHERE datname = current_database()"
        )
        tables: list[dict[str, Any]] = []
        for found in inquiry.rows(_TABLES):
            table = dict(found)
            estimate = table.pop("estimate")
            table["rows"] = _rows(inquiry, table["name"]) if count else None
            table["estimated_rows"] = estimate
            tables.append(table)
        return {"path": inquiry.place, **dict(about), **totals(inquiry), "tables": tables}


def totals(inquiry: Inquiry) -> dict[str, Any]:
    """What has happened in this database since its statistics were set to nought, and who is connected."""
    found = inquiry.row(
        "SELECT xact_commit::int8 AS commits, xact_rollback::int8 AS rollbacks, deadlocks::int8, conflicts::int8,"
        " temp_bytes::int8, blks_hit::int8 AS pages_from_memory, blks_read::int8 AS pages_read,"
        " to_char(stats_reset AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS since,"
        " current_setting('max_connections')::int AS max_connections,"
        " (SELECT count(*)::int FROM pg_stat_activity WHERE datid IS NOT NULL"
        " AND coalesce(backend_type, 'client backend') = 'client backend') AS connections"
        " FROM pg_stat_database WHERE datname = current_database()"
    )
    return dict(found)


def _rows(inquiry: Inquiry, name: str) -> int | None:
    try:
        return int(inquiry.value(f"SELECT count(*) FROM {name}"))  # noqa: S608  - regclass quotes it
    except psycopg.errors.InsufficientPrivilege:
        return None
