"""Looks a database over without changing it: `python -m database check`.

Here stands what is around the database: the server, who connects and how, settings, replicas, poolers, migrations. What
is in it stands in `health`. All is synchronous and read-only; `stopped` ends it.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from database import errors
from database.engine import checkup as findings
from database.engine.checkup import FAILED, NOTE, OK, WARNING, Finding, bytes_of
from database.postgresql import health
from database.postgresql.inquiry import Inquiry, literals
from database.postgresql.migrate import applied
from database.postgresql.opening import REPLICAS_TIMEOUT, parameters
from database.postgresql.settings import PostgresqlSettings

__all__ = ["Finding", "checkup"]

TESTED = (15, 18)
"""The oldest and the newest version that this package's tests run on."""

_ENDS = {
    12: (2024, 11, 21), 13: (2025, 11, 13), 14: (2026, 11, 12), 15: (2027, 11, 11), 16: (2028, 11, 9), 17: (2029, 11, 8),
    18: (2030, 11, 14),
}  # fmt: skip
"""When the last release of each version is made: https://www.postgresql.org/support/versioning/"""

LAG_SECONDS = 10.0
LAG_BYTES = 64 * 2**20
"""What a replica may be behind before it is remarked on."""

HELD_BYTES = 2**30
"""WAL that an unused replication slot may keep before it is remarked on."""

_BAD: tuple[tuple[str, str, str, str], ...] = (
    ("fsync", "off", "a power failure can destroy the whole cluster", WARNING),
    ("full_page_writes", "off", "a power failure can damage pages", WARNING),
    ("synchronous_commit", "off", "a crash loses the last transactions, which were answered as committed", WARNING),
    ("autovacuum", "off", "tables grow without end, and statistics go stale", WARNING),
    ("track_counts", "off", "autovacuum does not see what there is to do", WARNING),
    ("zero_damaged_pages", "on", "damaged pages are emptied", WARNING),
    ("ignore_checksum_failure", "on", "damaged pages are read as if they were sound", WARNING),
    ("ignore_system_indexes", "on", "is for repairing a damaged catalog", WARNING),
    ("standard_conforming_strings", "off", "a backslash in a string is not what this package takes it for", WARNING),
    ("default_transaction_read_only", "on", "nothing can be written", WARNING),
    ("data_checksums", "off", "damage on the disk goes unnoticed (pg_checksums switches them on)", NOTE),
    ("idle_in_transaction_session_timeout", "0", "a client that hangs within a transaction keeps its locks for ever", NOTE),
)  # fmt: skip
"""Setting, the bad value, what it does, and how bad that is."""


def checkup(settings: PostgresqlSettings, *, quick: bool, stopped: Callable[[], bool]) -> Iterator[Finding]:
    """Looks over one database, finding by finding.

    Args:
        settings: Of the database.
        quick: Leaves out what reads indexes and tables from end to end.
        stopped: Whether to give up.
    """
    try:
        inquiry = Inquiry(settings, stopped)
    except errors.ConnectionFailedError as error:
        yield Finding("connect", FAILED, f"{error.path}: {_line(error.reason)}")
        return
    with inquiry:
        try:
            inquiry.snapshot()
            yield from _server(inquiry)
            yield from _role(inquiry)
            yield _encryption(inquiry, settings)
            yield from _settings(inquiry)
            yield from _connections(inquiry, settings)
            yield from _pooler(inquiry, settings)
            yield from _replicas(inquiry, settings, stopped)
            yield from _slots(inquiry)
            yield from health.look(inquiry)
            if settings.migrations is not None:
                yield from findings.migrations(applied(inquiry.session), settings.migrations, "postgresql")
            inquiry.release()
            if not quick:
                yield from health.integrity(inquiry)
        except psycopg.Error as error:
            if not stopped():
                yield Finding("read", FAILED, str(error).strip())


def _line(text: object) -> str:
    return " ".join(str(text).split())


# --- The server, and who is there ---------------------------------------------------------------------------


def _server(inquiry: Inquiry) -> Iterator[Finding]:
    version, recovering = inquiry.row("SELECT current_setting('server_version'), pg_is_in_recovery()")
    text = f"PostgreSQL {version}, {inquiry.place}"
    yield _supported(inquiry.version // 10_000, text, datetime.datetime.now(datetime.UTC).date())
    if recovering:
        yield Finding(
            "server", WARNING, "it is a standby, and takes no writes", "name the primary in `host`, or all servers"
        )
    failures = inquiry.value("SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()")
    if failures:
        yield Finding(
            "server", FAILED, f"{failures:,} pages had a wrong checksum: the disk is damaged", "restore a backup"
        )
    pending = [row[0] for row in inquiry.rows("SELECT name FROM pg_settings WHERE pending_restart ORDER BY 1")]
    if pending:
        yield Finding("server", NOTE, f"changed, but not in force before a restart: {', '.join(pending)}")


def _supported(major: int, text: str, today: datetime.date) -> Finding:
    end = _ENDS.get(major)
    if (end is not None and datetime.date(*end) < today) or major < min(_ENDS):
        since = f" since {datetime.date(*end)}" if end is not None else ""
        return Finding(
            "server", WARNING, f"{text}: no longer supported by its makers{since}", "move to a newer version"
        )
    if not TESTED[0] <= major <= TESTED[1]:
        return Finding("server", NOTE, f"{text}: this package is tested with {TESTED[0]} to {TESTED[1]}")
    return Finding("server", OK, text)


def _role(inquiry: Inquiry) -> Iterator[Finding]:
    user, superuser, schema, path = inquiry.row(
        "SELECT current_user, rolsuper, current_schema(), current_setting('search_path') FROM pg_roles WHERE rolname ="
        " current_user"
    )
    if schema is None:
        yield Finding(
            "role",
            FAILED,
            f"{user}: none of the schemas of its search_path ({path}) is there, or may be used",
            "create one",
        )
        return
    creates = inquiry.value("SELECT has_schema_privilege($1::text, 'CREATE')", schema)
    text = f"{user}, schema {schema}{'' if creates else ' (may create nothing there)'}"
    if superuser:
        yield Finding(
            "role",
            NOTE,
            f"{text}: a superuser, whom no right and no policy holds back",
            "give programs a role of their own",
        )
    else:
        yield Finding("role", OK, text)


def _encryption(inquiry: Inquiry, settings: PostgresqlSettings) -> Finding:
    if inquiry.socket:
        return Finding("encryption", OK, "a socket of this machine: nothing leaves it")
    mode = str(parameters(settings).get("sslmode") or "prefer")
    if inquiry.encrypted:
        if mode in ("verify-ca", "verify-full"):
            return Finding("encryption", OK, f"TLS, sslmode {mode}")
        return Finding(
            "encryption",
            NOTE,
            f"TLS, but with sslmode {mode} nobody looks whose server that is",
            "sslmode: verify-full, and sslrootcert",
        )
    if _is_loopback(inquiry.address):
        return Finding("encryption", OK, f"none, and none needed: {inquiry.address} is this machine")
    return Finding(
        "encryption",
        WARNING,
        f"none (sslmode {mode}): who is in between reads everything, and may read the password",
        "sslmode: verify-full, and sslrootcert",
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


# --- Settings -----------------------------------------------------------------------------------------------


def _settings(inquiry: Inquiry) -> Iterator[Finding]:
    names = [name for name, *_ in _BAD]
    found = {
        row[0]: row[1]
        for row in inquiry.rows(f"SELECT name, setting FROM pg_settings WHERE name IN ({literals(names)})")  # noqa: S608  - ours
    }
    sound = True
    for name, bad, what, level in _BAD:
        if found.get(name) == bad:
            sound = sound and level != WARNING
            yield Finding("settings", level, f"{name} is {bad}: {what}")
    encoding = inquiry.value("SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()")
    if encoding != "UTF8":
        sound = False
        yield Finding("settings", WARNING, f"the database's encoding is {encoding}: not every text can be stored")
    if sound:
        yield Finding("settings", OK, "fsync, full_page_writes, synchronous_commit, autovacuum on; encoding UTF8")


def _connections(inquiry: Inquiry, settings: PostgresqlSettings) -> Iterator[Finding]:
    most, reserved, used = inquiry.row(
        "SELECT current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int"
        " + coalesce(current_setting('reserved_connections', true)::int, 0),"
        " (SELECT count(*)::int FROM pg_stat_activity WHERE datid IS NOT NULL"
        " AND coalesce(backend_type, 'client backend') = 'client backend')"
    )
    limits = inquiry.row(
        "SELECT datconnlimit, rolconnlimit FROM pg_database, pg_roles WHERE datname = current_database()"
        " AND rolname = current_user"
    )
    room = min([most - reserved, *(limit for limit in limits if limit >= 0)])
    text = f"{used} of {most} in use"
    if settings.pooler != "none":
        yield Finding("connections", OK, f"{text}; how many this program takes is the pooler's to say")
    elif settings.pool_size > room:
        yield Finding(
            "connections",
            WARNING,
            f"pool_size is {settings.pool_size}, but there is room for {room} (max_connections {most}, {reserved} of them"
            " reserved, and the limits of database and role): some will wait for a connection, and fail",
            "a smaller pool_size, a larger max_connections, or a pooler",
        )
    elif used > room * 0.8:
        yield Finding(
            "connections", WARNING, f"{text}: little room is left", "`python -m database top` shows whose they are"
        )
    else:
        fit = room // settings.pool_size
        yield Finding(
            "connections", OK, f"{text}; there is room for {fit} event loop{'' if fit == 1 else 's'} with pool_size"
            f" {settings.pool_size}"
        )  # fmt: skip


def _pooler(inquiry: Inquiry, settings: PostgresqlSettings) -> Iterator[Finding]:
    """A pooler gives itself away by the process at the other end: a connection of the server's own has that number."""
    told = inquiry.session.raw.pgconn.backend_pid
    between = inquiry.value("SELECT pg_backend_pid()") != told
    if settings.pooler != "none":
        text = "transaction, as configured"
        if settings.pooler_prepares:
            text += "; it keeps track of prepared statements"
        yield Finding("pooler", OK, text)
    elif between:
        yield Finding(
            "pooler",
            WARNING,
            "something stands between here and the server, and hands out its own connections",
            "if it does so for each transaction, put `pooler: transaction` into the database's section",
        )


# --- Replicas -----------------------------------------------------------------------------------------------


def _replicas(inquiry: Inquiry, settings: PostgresqlSettings, stopped: Callable[[], bool]) -> Iterator[Finding]:
    if settings.replicas is not None:
        yield from _configured(inquiry, settings, stopped)
    try:
        rows = inquiry.rows(
            "SELECT coalesce(nullif(application_name, ''), client_addr::text, pid::text), state, sync_state,"
            " pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)::float8, extract(epoch FROM replay_lag)::float8"
            " FROM pg_stat_replication WHERE NOT pg_is_in_recovery() ORDER BY 1"
        )
    except psycopg.errors.ObjectNotInPrerequisiteState:  # a standby has none of its own to tell of
        return
    for name, state, sync, behind, lag in rows:
        if state is None:
            yield Finding(
                "replication",
                NOTE,
                f"{name} is there, but this role may not see how it is",
                "GRANT pg_monitor TO the role",
            )
        elif state == "backup":
            yield Finding("replication", OK, f"{name}: a base backup is being taken")
        else:
            yield _lagging("replication", f"{name}, {state}, {sync}", behind, lag)


def _lagging(name: str, text: str, behind: float | None, seconds: float | None) -> Finding:
    words = [] if behind is None else [f"{bytes_of(max(behind, 0))} behind"]
    if seconds:
        words.append(f"{seconds:.1f} s")
    text = f"{text}: {', '.join(words) or 'how far it is behind is unknown'}"
    if (behind or 0) > LAG_BYTES or (seconds or 0) > LAG_SECONDS:
        return Finding(
            name, WARNING, text, "read-only transactions on it see what was; look at its disk and its queries"
        )
    return Finding(name, OK, text)


def _configured(inquiry: Inquiry, settings: PostgresqlSettings, stopped: Callable[[], bool]) -> Iterator[Finding]:
    """Each server that `replicas` names, by itself: the pool takes whichever answers first."""
    wanted = parameters(settings, "reader")
    hosts = str(wanted.get("host") or "").split(",")
    ports = str(wanted.get("port") or "").split(",")
    here = _identity(inquiry)
    for number, host in enumerate(hosts):
        port = ports[number] if len(ports) == len(hosts) else ports[0]
        one = {**({"host": host} if host else {}), **({"port": port} if port else {}), "target_session_attrs": "any"}
        info = make_conninfo(settings.replicas or "", **one)
        place = make_conninfo(**{key: value for key, value in one.items() if key in ("host", "port")})
        alone = replace(
            settings,
            conninfo=make_conninfo(settings.conninfo or "", **conninfo_to_dict(info)),
            host=None,
            port=None,
            target_session_attrs=None,
            replicas=None,
            connect_timeout=min(settings.connect_timeout, REPLICAS_TIMEOUT),
        )
        try:
            replica = Inquiry(alone, stopped)
        except errors.ConnectionFailedError as error:
            yield Finding(
                "replicas", WARNING, f"{place} does not answer: {_line(error.reason)}",
                "while none answers, read-only transactions run on the primary",
            )  # fmt: skip
            continue
        with replica:
            yield _replica(inquiry, replica, here, place)


def _identity(inquiry: Inquiry) -> Any:
    try:
        return inquiry.value("SELECT system_identifier FROM pg_control_system()")
    except psycopg.Error:
        return None  # not for this role


def _replica(primary: Inquiry, replica: Inquiry, identity: Any, place: str) -> Finding:
    other = _identity(replica)
    if identity is not None and other is not None and identity != other:
        return Finding("replicas", FAILED, f"{place} belongs to another cluster: read-only transactions see other data")
    recovering = replica.value("SELECT pg_is_in_recovery()")
    if not recovering:
        return Finding("replicas", NOTE, f"{place} is no standby: it is the primary, or has been made one")
    position, seconds, receiving = replica.row(
        "SELECT pg_last_wal_replay_lsn()::text, CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0 ELSE"
        " extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::float8,"
        " EXISTS (SELECT FROM pg_stat_wal_receiver)"
    )
    if not receiving:
        return Finding("replicas", WARNING, f"{place} receives nothing: its connection to the primary is down")
    behind: float | None = None
    if position is not None:
        try:
            behind = primary.value("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), $1::pg_lsn)::float8", position)
        except psycopg.errors.ObjectNotInPrerequisiteState:
            behind = None
    return _lagging("replicas", f"{place} answers", behind, seconds)


def _slots(inquiry: Inquiry) -> Iterator[Finding]:
    rows = inquiry.rows(
        "SELECT slot_name, active, coalesce(wal_status, ''), pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN"
        " pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn)::float8 FROM pg_replication_slots ORDER BY 1"
        if inquiry.version >= 130_000
        else "SELECT slot_name, active, '', NULL::float8 FROM pg_replication_slots ORDER BY 1"
    )
    for name, active, status, held in rows:
        if status == "lost":
            yield Finding(
                "slots", WARNING, f"{name} is lost: the WAL that it needs was removed", "build its replica anew"
            )
        elif not active and (held or 0) > HELD_BYTES:
            yield Finding(
                "slots", WARNING, f"nobody uses {name}, and for it {bytes_of(held)} of WAL are kept: the disk fills up",
                f"start its replica, or SELECT pg_drop_replication_slot('{name}')",
            )  # fmt: skip
