"""Who does what in a database just now, what they wait for, and who blocks whom: for `top` and `stats`. Reads only.

The server tells that of its own connections. Behind a pooler these are the pooler's, so PgBouncer is asked for its clients
as well, where it lets us: its console knows who waits for a connection.
"""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg
from psycopg import pq

from database.postgresql.figures import totals
from database.postgresql.inquiry import Inquiry
from database.postgresql.opening import parameters
from database.postgresql.settings import PostgresqlSettings

__all__ = ["look"]

_SESSIONS = """
SELECT pid, usename AS role, coalesce(application_name, '') AS application,
    coalesce(host(client_addr), 'socket') AS client, coalesce(state, '') AS state,
    wait_event_type, wait_event, pg_blocking_pids(pid) AS blocked_by,
    extract(epoch FROM clock_timestamp() - state_change)::float8 AS state_seconds,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS transaction_seconds,
    extract(epoch FROM clock_timestamp() - query_start)::float8 AS query_seconds,
    CASE WHEN wait_event_type = 'Lock' THEN (
        SELECT l.mode || coalesce(' on ' || CASE WHEN l.database = (SELECT oid FROM pg_database WHERE datname =
            current_database()) THEN l.relation::regclass::text END, CASE l.locktype WHEN 'transactionid' THEN
            ' on the end of a transaction' ELSE ' on ' || l.locktype END)
        FROM pg_locks l WHERE l.pid = a.pid AND NOT l.granted LIMIT 1) END AS lock,
    (SELECT count(DISTINCT l.relation)::int FROM pg_locks l WHERE l.pid = a.pid AND l.granted AND l.locktype = 'relation')
        AS locked_relations,
    left(coalesce(query, ''), 1000) AS query
FROM pg_stat_activity a
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND coalesce(backend_type, 'client backend') IN ('client backend', 'parallel worker')
ORDER BY pid
"""


def look(inquiry: Inquiry, settings: PostgresqlSettings) -> dict[str, Any]:
    """One look.

    Raises:
        psycopg.Error: The connection is gone, or the server refuses.
    """
    inquiry.snapshot()  # else what stands in the rows would be from several moments
    try:
        sessions = [dict(row) for row in inquiry.rows(_SESSIONS)]
        found: dict[str, Any] = {
            "database": settings.name,
            "server": inquiry.place,
            "version": inquiry.value("SELECT current_setting('server_version')"),
            "time": inquiry.value("SELECT extract(epoch FROM clock_timestamp())::float8"),
            "totals": totals(inquiry),
            "sessions": sessions,
        }
    finally:
        inquiry.release()
    found["blockings"] = _blockings(sessions)
    if settings.pooler != "none":
        found["pooler"] = _pooler(settings)
    return found


def _blockings(sessions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of one who waits and one who has what it waits for; at the root, one who waits for nobody."""
    known = {session["pid"]: session for session in sessions}
    found: list[dict[str, Any]] = []
    for session in sessions:
        for pid in session["blocked_by"]:
            blocker = known.get(pid)
            found.append(
                {
                    "waiting": session["pid"],
                    "seconds": session["query_seconds"],
                    "lock": session["lock"],
                    "blocker": pid,  # 0: a transaction that was prepared, and has no process
                    "root": blocker is None or not blocker["blocked_by"],
                }
            )
    return found


def _pooler(settings: PostgresqlSettings) -> list[dict[str, Any]] | str:
    """What PgBouncer's console says of its pools; or, as text, why it says nothing."""
    wanted: dict[str, Any] = parameters(settings) | {"dbname": "pgbouncer"}
    wanted.pop("target_session_attrs", None)  # it answers no question but its own
    try:
        with contextlib.closing(psycopg.connect("", autocommit=True, **wanted)) as console:
            answer = console.pgconn.exec_(b"SHOW POOLS")
    except psycopg.Error:
        return "its console does not let this role in (PgBouncer: stats_users)"
    if answer.status != pq.ExecStatus.TUPLES_OK:
        return "it has no console that answers SHOW POOLS"
    names = [(answer.fname(column) or b"").decode() for column in range(answer.nfields)]
    pools: list[dict[str, Any]] = []
    for row in range(answer.ntuples):
        values = [(answer.get_value(row, column) or b"").decode() for column in range(answer.nfields)]
        pool: dict[str, Any] = dict(zip(names, values, strict=True))
        if pool.get("database") != "pgbouncer":
            pools.append({key: int(value) if value.isdecimal() else value for key, value in pool.items()})
    return pools
