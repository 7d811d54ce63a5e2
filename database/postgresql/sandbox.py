"""PostgreSQL's part of `database.sandbox`: a copy is a database of its own on the configured server.

A copy is made by `CREATE DATABASE … TEMPLATE`, which takes the server tens of milliseconds, and hundreds where it really
writes to its disk. So a copy that is thrown away is kept, and given out again once what was done in it is undone: the
server's own counters tell which tables were written to; these few are emptied and filled again from the source, and
sequences are set back. Where anything else has changed (the catalog's tables have counters, too), where somebody is
still connected, or where the server cannot do it (before version 15; a role that may not set
`session_replication_role`), there is a new copy.

The counters are exact once a session has ended, so everybody's sessions end first. That ends transactions which a fixture
of a wider scope has left open; its pool connects anew when it is used again.

Names. Databases are called `jobu_test_<token>_<number>`. As long as the process lives, a session of its own bears its token, so
that those which a killed process has left behind are known, and dropped by the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from database import errors
from database.postgresql.opening import describe, parameters
from database.postgresql.redaction import hide
from database.postgresql.settings import PostgresqlSettings

__all__ = ["copy", "discard", "fresh"]

PREFIX = "jobu_test"

PATIENCE = 5.0
"""Seconds to wait for sessions to end."""

_FIRST_USER_OID = 16384
_STATISTICS = 2619
"""The catalog's table of statistics: ANALYZE changes nothing that a test could see."""

Counters = dict[int, int]
"""Of each table by its OID: the rows that were ever inserted, changed and deleted."""
Sequences = dict[str, tuple[int, bool]]


@dataclass
class _Copy:
    """A database that was copied from another one.

    Attributes:
        name: Its name.
        source: That of the other one.
        source_rows: What had been written to that when it was copied.
        counters: What had been written to it when it was as its source.
        sequences: How far its sequences were then; None: nobody has looked yet.
    """

    name: str
    source: str
    source_rows: int
    counters: Counters = field(default_factory=dict[int, int])
    sequences: Sequences | None = None


def fresh(settings: PostgresqlSettings, folder: Path, name: str) -> PostgresqlSettings:
    """See `database.sandbox.Copier`."""
    server = _server(settings)
    return _like(settings, server.create("template1"), settings.options)


def copy(
    source: PostgresqlSettings, folder: Path, name: str, *, like: PostgresqlSettings, durable: bool
) -> PostgresqlSettings:
    """See `database.sandbox.Copier`."""
    options = like.options if durable else f"{like.options or ''} -c synchronous_commit=off".strip()
    made = _like(source, _server(source).copy(source, str(source.dbname)), options)
    return replace(made, init_sql="", auto_migrate=False)


def discard(settings: PostgresqlSettings) -> None:
    """See `database.sandbox.Copier`."""
    _server(settings).discard(str(settings.dbname))


def _like(settings: PostgresqlSettings, dbname: str, options: str | None) -> PostgresqlSettings:
    # A replica would show what a test has written a moment later.
    return replace(settings, dbname=dbname, replicas=None, options=options)


_servers: dict[str, _Server] = {}


def _server(settings: PostgresqlSettings) -> _Server:
    key = f"{settings.conninfo!r} {settings.host} {settings.port} {settings.user} {os.getpid()}"
    if key not in _servers:
        _servers[key] = _Server(settings)
    return _servers[key]


class _Server:
    """One server, and this process's databases on it. Used by one thread at a time, as sandboxes are."""

    def __init__(self, settings: PostgresqlSettings) -> None:
        self._settings = settings
        self._token = secrets.token_hex(6)
        self._numbers = iter(range(1, 10**9))
        self._process = os.getpid()
        self._made: set[str] = set()
        self._copies: dict[str, _Copy] = {}
        self._spare: dict[str, _Copy] = {}
        """By their source: copies that nobody uses."""
        self._connection = self._open()
        self._ends_by_itself = self._connection.info.server_version >= 130_000
        self._undoes = self._connection.info.server_version >= 150_000 and self._value(
            "SELECT has_parameter_privilege('session_replication_role', 'SET')"
            " AND current_setting('track_counts')::boolean"
        )
        self._drop_what_was_left()
        atexit.register(self.close)

    def _open(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Connects to a database that is not in the way; the configured one need not be there."""
        try:
            return self._connect("postgres", application_name=f"{PREFIX} {self._token}")
        except errors.ConnectionFailedError:
            own = parameters(self._settings).get("dbname")
            if own in (None, "postgres"):
                raise
            return self._connect(str(own), application_name=f"{PREFIX} {self._token}")

    def _connect(self, dbname: str, **more: Any) -> psycopg.Connection[tuple[Any, ...]]:
        wanted: dict[str, Any] = {**parameters(self._settings), "dbname": dbname, **more}
        wanted.pop("options", None)  # a search_path, say, that is not meant for us
        try:
            return psycopg.connect("", autocommit=True, **wanted)
        except psycopg.Error as error:
            place = describe(replace(self._settings, dbname=dbname))
            raise errors.ConnectionFailedError(place, hide(str(error).strip(), [wanted.get("password")])) from None

    def _value(self, query: str, *values: Any) -> Any:
        row = self._connection.execute(query.encode(), values).fetchone()
        return row[0] if row is not None else None

    # Making and dropping

    def create(self, template: str) -> str:
        """Another database."""
        name = f"{PREFIX}_{self._token}_{next(self._numbers)}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection.execute(statement)
                break
            except psycopg.errors.ObjectInUse:  # somebody is connected to the template just now
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except psycopg.errors.InsufficientPrivilege as error:
                raise errors.DatabaseError(
                    f"tests on PostgreSQL make databases of their own, and {self._connection.info.user!r} may not:"
                    " ALTER ROLE … CREATEDB"
                ) from error
        self._made.add(name)
        return name

    def copy(self, settings: PostgresqlSettings, source: str) -> str:
        """A copy of a database, whose sessions end for it."""
        self._end_sessions(source)
        spare = self._spare.pop(source, None)
        if spare is not None:
            try:
                undone = self._undo(spare)
            except (psycopg.Error, errors.ConnectionFailedError):
                undone = False
            if undone:
                self._copies[spare.name] = spare
                return spare.name
            self._drop(spare.name)
        made = _Copy(self.create(source), source, self._rows_written(source))
        self._copies[made.name] = made
        return made.name

    def discard(self, name: str) -> None:
        """A database that nobody needs any longer."""
        if (spare := self._spare.pop(name, None)) is not None:
            self._drop(spare.name)
        copy = self._copies.pop(name, None)
        if copy is not None and self._undoes and copy.source in self._made and copy.source not in self._spare:
            if copy.sequences is None:
                copy.sequences = self._sequences_of(copy.source)
            self._spare[copy.source] = copy
        else:
            self._drop(name)

    def _drop(self, name: str) -> None:
        force = " WITH (FORCE)" if self._ends_by_itself else ""
        if not force:
            self._end_sessions(name)
        self._connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}" + force).format(sql.Identifier(name)))
        self._made.discard(name)

    def _drop_what_was_left(self) -> None:
        """Databases of processes that were killed: nobody's session bears their token any more."""
        names = self._connection.execute(
            "SELECT datname FROM pg_database d WHERE datname LIKE %s AND datdba = current_user::regrole AND NOT EXISTS"
            " (SELECT FROM pg_stat_activity a WHERE a.application_name = %s || ' ' || split_part(d.datname, '_', 3))",
            (PREFIX.replace("_", "\\_") + "\\_%", PREFIX),
        ).fetchall()
        for (name,) in names:
            with contextlib.suppress(psycopg.Error):  # another one was quicker
                self._drop(name)

    def close(self) -> None:
        """Drops all that was made, at the end of the process."""
        if os.getpid() != self._process:  # a fork: it is the parent's
            return
        with contextlib.suppress(psycopg.Error):
            for name in list(self._made):
                self._drop(name)
        self._connection.close()

    def _end_sessions(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._value(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
            " AND coalesce(backend_type, 'client backend') = 'client backend'",
            name,
        ):
            if time.monotonic() > deadline:
                raise errors.DatabaseError(f"sessions of the test database {name} do not end")
            time.sleep(0.002)

    # Undoing

    def _rows_written(self, name: str) -> int:
        found = self._value(
            "SELECT tup_inserted + tup_updated + tup_deleted FROM pg_stat_database WHERE datname = %s", name
        )
        return int(found or 0)

    def _undo(self, copy: _Copy) -> bool:
        """Makes a copy as its source is; False: that cannot be done."""
        if self._rows_written(copy.source) != copy.source_rows:
            return False
        self._end_sessions(copy.name)
        with contextlib.closing(self._connect(copy.name)) as target:
            now = _counters(target)
            changed = {oid for oid, count in now.items() if count != copy.counters.get(oid, 0)}
            if any(oid not in now for oid in copy.counters):  # dropped; or a crash has set all to nought
                return False
            if any(oid < _FIRST_USER_OID and oid != _STATISTICS for oid in changed):
                return False
            tables = _tables(target, sorted(changed))
            with target.transaction():
                if tables:
                    target.execute("SET LOCAL session_replication_role = replica")  # no triggers, no foreign keys
                    with contextlib.closing(self._connect(copy.source)) as source:
                        for table, columns in tables:
                            _refill(source, target, table, columns)
                assert copy.sequences is not None
                _set_back(target, copy.sequences)
            target.execute("SELECT pg_stat_force_next_flush()")
            copy.counters = _counters(target)
        return True

    def _sequences_of(self, name: str) -> Sequences:
        with contextlib.closing(self._connect(name)) as connection:
            return _sequences(connection)


def _counters(connection: psycopg.Connection[Any]) -> Counters:
    rows = connection.execute(
        # What the whole cluster shares (roles, databases) no copy has of its own. TOAST goes with its table.
        "SELECT relid::int8, n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_all_tables s JOIN pg_class c ON c.oid = s.relid"
        " WHERE n_tup_ins + n_tup_upd + n_tup_del > 0 AND NOT c.relisshared AND c.relkind <> 't'"
    )
    return dict(rows.fetchall())


def _tables(connection: psycopg.Connection[Any], oids: list[int]) -> list[tuple[str, str]]:
    """Names of tables and of their columns that hold something, as SQL."""
    if not oids:
        return []
    return connection.execute(
        "SELECT a.attrelid::regclass::text, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a"
        " JOIN pg_class c ON c.oid = a.attrelid WHERE a.attrelid = ANY(%s::oid[]) AND c.relkind = 'r' AND a.attnum > 0"
        " AND NOT a.attisdropped AND a.attgenerated = '' GROUP BY a.attrelid",
        (oids,),
    ).fetchall()


def _refill(source: psycopg.Connection[Any], target: psycopg.Connection[Any], table: str, columns: str) -> None:
    target.execute(f"DELETE FROM ONLY {table}".encode())  # noqa: S608  - the server has quoted it
    with (
        source.cursor() as there,
        target.cursor() as here,
        there.copy(f"COPY (SELECT {columns} FROM ONLY {table}) TO STDOUT (FORMAT binary)".encode()) as out,  # noqa: S608  - likewise
        here.copy(f"COPY {table} ({columns}) FROM STDIN (FORMAT binary)".encode()) as into,
    ):
        for data in out:
            into.write(data)


def _sequences(connection: psycopg.Connection[Any]) -> Sequences:
    names = [
        name
        for (name,) in connection.execute("SELECT oid::regclass::text FROM pg_class WHERE relkind = 'S' ORDER BY oid")
    ]
    if not names:
        return {}
    query = " UNION ALL ".join(f"SELECT {sql.quote(name)}, last_value, is_called FROM {name}" for name in names)  # noqa: S608  - likewise
    rows: list[tuple[str, int, bool]] = connection.execute(query.encode()).fetchall()
    return {name: (last, called) for name, last, called in rows}


def _set_back(target: psycopg.Connection[Any], wanted: Sequences) -> None:
    for name, state in _sequences(target).items():
        if wanted[name] != state:
            target.execute("SELECT setval(%s::regclass, %s, %s)", (name, *wanted[name]))
