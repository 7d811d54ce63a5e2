"""What is in a database, looked over: tables, transactions, indexes, sequences. For `checkup`; reads only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg

from database.engine.checkup import FAILED, NOTE, OK, WARNING, Finding, bytes_of
from database.postgresql.inquiry import Inquiry

__all__ = ["integrity", "look"]

DEAD_ROWS = 10_000
DEAD_SHARE = 0.3
"""A table is remarked on from this many dead rows on, if they are that part of all: autovacuum comes at a fifth."""

LONG_SECONDS = 3600.0
"""From when on a transaction is old."""

FULL = 0.75
"""From when on a sequence is near its end."""

WRAPAROUND = 2**31
STOPS = 3_000_000
"""Transactions before the end at which the server takes no more writes."""

SHOWN = 5
"""Of what there may be many."""

_OURS = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"
"""Schemas that are not the server's own."""


def look(inquiry: Inquiry) -> Iterator[Finding]:
    """All that is quickly told."""
    yield from _tables(inquiry)
    yield from _transactions(inquiry)
    yield from _wraparound(inquiry)
    yield from _indexes(inquiry)
    yield from _collations(inquiry)
    yield from _references(inquiry)
    yield from _sequences(inquiry)


def _tables(inquiry: Inquiry) -> Iterator[Finding]:
    size, count, live, dead = inquiry.row(
        "SELECT pg_database_size(current_database())::float8, count(*)::int, coalesce(sum(n_live_tup), 0)::int8,"
        " coalesce(sum(n_dead_tup), 0)::int8 FROM pg_stat_user_tables"
    )
    rows = inquiry.rows(
        "SELECT relid::regclass::text, n_live_tup::int8, n_dead_tup::int8,"
        " to_char(greatest(last_vacuum, last_autovacuum) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'),"
        " (SELECT relpages::float8 * 8192 FROM pg_class c WHERE c.oid = relid)"
        " FROM pg_stat_user_tables WHERE n_dead_tup >= $1 AND n_dead_tup >= $2 *"
        " (n_dead_tup + n_live_tup) ORDER BY n_dead_tup DESC",
        DEAD_ROWS,
        DEAD_SHARE,
    )
    for name, alive, left, vacuumed, bytes_ in rows[:SHOWN]:
        yield Finding(
            "tables",
            WARNING,
            f"{name}: {left:,} dead rows beside {alive:,}, {bytes_of(bytes_)},"
            f" {f'last vacuumed {vacuumed} UTC' if vacuumed else 'never vacuumed'}",
            f"VACUUM (ANALYZE) {name}; if it comes back, a transaction holds it up, or autovacuum is too slow for this table",
        )
    if len(rows) > SHOWN:
        yield Finding("tables", WARNING, f"and {len(rows) - SHOWN} more tables like these")
    if not rows:
        yield Finding("tables", OK, f"{count:,}, {bytes_of(size)}, about {live:,} rows, {dead:,} dead ones")


def _transactions(inquiry: Inquiry) -> Iterator[Finding]:
    """What keeps VACUUM from removing anything, in the whole cluster."""
    found = False
    for pid, name, state, seconds in inquiry.rows(
        "SELECT pid, coalesce(nullif(application_name, ''), usename, ''), coalesce(state, ''),"
        " extract(epoch FROM clock_timestamp() - xact_start)::float8 FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        " AND datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'"
        " AND xact_start < clock_timestamp() - make_interval(secs => $1)"
        " ORDER BY xact_start",
        LONG_SECONDS,
    )[:SHOWN]:
        found = True
        yield Finding(
            "transactions",
            WARNING,
            f"process {pid} ({name}, {state}) has had one open for {_hours(seconds)}: VACUUM can remove nothing newer",
            f"end the program's transaction, or SELECT pg_terminate_backend({pid})",
        )
    for gid, database, seconds in inquiry.rows(
        "SELECT gid, database, extract(epoch FROM clock_timestamp() - prepared)::float8 FROM pg_prepared_xacts"
        " WHERE prepared < clock_timestamp() - make_interval(secs => $1) ORDER BY prepared",
        LONG_SECONDS,
    )[:SHOWN]:
        found = True
        yield Finding(
            "transactions",
            WARNING,
            f"{gid!r} in database {database} was prepared {_hours(seconds)} ago, and holds its locks since",
            "COMMIT PREPARED or ROLLBACK PREPARED",
        )
    if not found:
        yield Finding("transactions", OK, "none is older than an hour")


def _hours(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"


def _wraparound(inquiry: Inquiry) -> Iterator[Finding]:
    rows = inquiry.rows(
        "SELECT datname, greatest(age(datfrozenxid)::int8, mxid_age(datminmxid)::int8),"
        " current_setting('autovacuum_freeze_max_age')::int8 FROM pg_database ORDER BY 2 DESC LIMIT 1"
    )
    for name, age, due in rows:
        text = f"the oldest row of database {name} is {age:,} transactions old; at {WRAPAROUND - STOPS:,} writing stops"
        if age > WRAPAROUND / 2:
            yield Finding("wraparound", FAILED, text, "VACUUM FREEZE now, and find out what holds it up")
        elif age > due * 1.5:
            yield Finding(
                "wraparound", WARNING, text, f"autovacuum should have frozen it at {due:,}: find out what holds it up"
            )
        else:
            yield Finding("wraparound", OK, text)


def _indexes(inquiry: Inquiry) -> Iterator[Finding]:
    rows = inquiry.rows(
        "SELECT i.indexrelid::regclass::text, i.indrelid::regclass::text FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid WHERE NOT (i.indisvalid AND i.indisready) AND c.relkind = 'i'"
        " AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = i.indexrelid) ORDER BY 1"
    )
    for index, table in rows:
        yield Finding(
            "indexes",
            WARNING,
            f"{index} on {table} is invalid: a CREATE INDEX CONCURRENTLY failed; it is kept up, and not used",
            f"REINDEX INDEX CONCURRENTLY {index}, or DROP INDEX {index}",
        )
    if not rows:
        count = inquiry.value("SELECT count(*)::int FROM pg_stat_user_indexes")
        yield Finding("indexes", OK, f"{count:,}, all valid")


def _collations(inquiry: Inquiry) -> Iterator[Finding]:
    if inquiry.version < 150_000:
        return
    then, now = inquiry.row(
        "SELECT datcollversion, pg_database_collation_actual_version(oid) FROM pg_database WHERE datname ="
        " current_database()"
    )
    if then is not None and now is not None and then != now:
        yield Finding(
            "indexes",
            WARNING,
            f"the system sorts texts otherwise now ({then} then, {now} now): indexes on texts may find nothing",
            "REINDEX DATABASE CONCURRENTLY, then ALTER DATABASE … REFRESH COLLATION VERSION",
        )


def _references(inquiry: Inquiry) -> Iterator[Finding]:
    open_ = inquiry.rows(
        "SELECT conname, conrelid::regclass::text, contype = 'f' FROM pg_constraint WHERE NOT convalidated AND contype IN"
        " ('f', 'c') ORDER BY 2, 1"
    )
    off = inquiry.rows(
        "SELECT DISTINCT c.conname, c.conrelid::regclass::text FROM pg_trigger t JOIN pg_constraint c ON c.oid = t.tgconstraint"
        " WHERE t.tgisinternal AND t.tgenabled = 'D' AND c.contype = 'f' ORDER BY 2, 1"
    )
    for name, table, reference in open_[:SHOWN]:
        yield Finding(
            "foreign keys" if reference else "constraints",
            NOTE,
            f"{name} of {table} was added NOT VALID: rows that were there before may break it",
            f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}",
        )
    for name, table in off[:SHOWN]:
        yield Finding(
            "foreign keys",
            WARNING,
            f"{name} of {table} is switched off: rows may refer to what does not exist",
            f"ALTER TABLE {table} ENABLE TRIGGER ALL",
        )
    if not open_ and not off:
        yield Finding("foreign keys", OK, "all are in force and validated")


_SEQUENCES = f"""
SELECT c.oid::regclass::text, a.attrelid::regclass::text, a.attname, s.last_value::float8,
    least(s.max_value, CASE a.atttypid WHEN 'int2'::regtype THEN 32767 WHEN 'int4'::regtype THEN 2147483647
        ELSE s.max_value END)::float8, s.increment_by > 0 AND NOT s.cycle
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_sequences s ON s.schemaname = n.nspname AND s.sequencename = c.relname
LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
    AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE c.relkind = 'S' AND {_OURS} ORDER BY 1
"""  # noqa: S608  - ours


def _sequences(inquiry: Inquiry) -> Iterator[Finding]:
    fullest = 0.0
    named = ""
    rows = inquiry.rows(_SEQUENCES)
    found = False
    for sequence, table, column, last, most, ends in rows:
        if not ends or last is None or most <= 0:
            continue
        share = last / most
        if share >= FULL:
            found = True
            owner = f" (of {table}.{column})" if table else ""
            yield Finding(
                "sequences",
                WARNING,
                f"{sequence}{owner} is at {last:,.0f} of {most:,.0f}: {share:.1%}",
                f"ALTER TABLE {table} ALTER COLUMN {column} TYPE bigint; ALTER SEQUENCE {sequence} AS bigint"
                if table and most < 2**62
                else "a larger MAXVALUE",
            )
        if share > fullest:
            fullest, named = share, sequence
    if not found:
        text = f"{len(rows):,}" + (f", the fullest is {named} at {fullest:.1%}" if named else "")
        yield Finding("sequences", OK, text)


# --- What reads everything ----------------------------------------------------------------------------------

_INDEXES = f"""
SELECT i.indexrelid, i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_am m ON m.oid = c.relam JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE m.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence <> 't' AND i.indisvalid AND i.indisready AND {_OURS}
ORDER BY pg_relation_size(i.indexrelid)
"""  # noqa: S608  - ours
_TABLES = f"""
SELECT c.oid, c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND {_OURS} ORDER BY pg_relation_size(c.oid)
"""  # noqa: S608  - ours


def integrity(inquiry: Inquiry) -> Iterator[Finding]:
    """Compares indexes with their tables, by the server's own extension."""
    schema = inquiry.value(
        "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace"
        " WHERE extname = 'amcheck'"
    )
    if schema is None:
        yield Finding(
            "integrity",
            NOTE,
            "not looked at: the extension amcheck is not there",
            "CREATE EXTENSION amcheck, as a superuser; it comes with the server",
        )
        return
    damaged = 0
    counts: list[int] = []
    try:
        indexes = inquiry.rows(_INDEXES)
        for oid, name in indexes:
            text = _damage(inquiry, f"SELECT {schema}.bt_index_check($1::oid::regclass, true)", oid)
            if text:
                damaged += 1
                yield Finding(
                    "integrity", FAILED, f"index {name}: {text}", f"REINDEX INDEX {name}, and look for the cause"
                )
        counts.append(len(indexes))
        tables = inquiry.rows(_TABLES) if inquiry.version >= 140_000 else []
        for oid, name in tables:
            look_at = f"SELECT msg FROM {schema}.verify_heapam($1::oid::regclass, on_error_stop => true)"  # noqa: S608  - quoted
            text = _damage(inquiry, look_at, oid)
            if text:
                damaged += 1
                yield Finding("integrity", FAILED, f"table {name}: {text}", "restore a backup")
        counts.append(len(tables))
    except psycopg.errors.InsufficientPrivilege as error:
        yield Finding(
            "integrity", NOTE, f"not looked at: {str(error).strip()}", "GRANT EXECUTE ON its functions to this role"
        )
        return
    if not damaged:
        yield Finding("integrity", OK, f"amcheck found nothing wrong in {counts[0]:,} indexes and {counts[1]:,} tables")


def _damage(inquiry: Inquiry, sql: str, oid: Any) -> str:
    """What is wrong; empty: nothing, or it has gone meanwhile, or somebody has it locked."""
    try:
        found = inquiry.rows(sql, oid)
    except (psycopg.errors.IndexCorrupted, psycopg.errors.DataCorrupted) as error:
        return str(error.diag.message_primary or error).strip()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject, psycopg.errors.LockNotAvailable):
        return ""
    return "; ".join(str(row[0]) for row in found[:1] if row[0])
