"""Opens connections: where the server is, who is there, and how long it is tried."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from database import errors
from database.engine.contract import Role
from database.postgresql.connection import Connection, PostgresqlSession
from database.settings import PostgresqlSettings

__all__ = ["describe", "open_session", "parameters"]


def parameters(settings: PostgresqlSettings, role: Role = "shared") -> dict[str, Any]:
    """Connection parameters for libpq; the password among them, so they must not be shown.

    Raises:
        ConnectionFailedError: The password cannot be read, or `conninfo` is none.
    """
    given = {
        "host": settings.host,
        "port": settings.port,
        "dbname": settings.dbname,
        "user": settings.user,
        "password": _password(settings),
        "sslmode": settings.sslmode,
        "sslrootcert": settings.sslrootcert,
        "sslcert": settings.sslcert,
        "sslkey": settings.sslkey,
        "target_session_attrs": settings.target_session_attrs,
        "application_name": settings.application_name,
    }
    try:
        merged: dict[str, Any] = conninfo_to_dict(
            settings.conninfo or "", **{key: value for key, value in given.items() if value is not None}
        )
        if role == "reader" and settings.replicas is not None:
            # Also where there is one host: while no replica answers, the primary takes their place.
            merged |= {"target_session_attrs": "prefer-standby"}
            merged |= conninfo_to_dict(settings.replicas)
    except psycopg.Error:
        raise errors.ConnectionFailedError(
            describe(settings), "conninfo (or replicas) is no connection string"
        ) from None  # the error quotes it, and it may hold a password
    if "," in str(merged.get("host", "")):
        merged.setdefault("target_session_attrs", "read-write")
    merged.setdefault("application_name", "jobu-database")
    merged.setdefault("connect_timeout", settings.connect_timeout)
    options = [str(merged.get("options") or ""), settings.options or ""]
    options += [f"-c {key}={value}" for key, value in _session_options(settings)]
    merged["options"] = " ".join(filter(None, options))
    return merged


def _session_options(settings: PostgresqlSettings) -> Iterator[tuple[str, object]]:
    if settings.lock_timeout:
        yield "lock_timeout", settings.lock_timeout
    if settings.statement_timeout:
        yield "statement_timeout", settings.statement_timeout
    if settings.isolation != "READ COMMITTED":
        yield "default_transaction_isolation", settings.isolation.lower().replace(" ", r"\ ")


def _password(settings: PostgresqlSettings) -> str | None:
    if settings.password_env is not None:
        try:
            return os.environ[settings.password_env]
        except KeyError:
            raise errors.ConnectionFailedError(
                describe(settings), f"the environment variable {settings.password_env} (password_env) is not set"
            ) from None
    if settings.password_file is not None:
        try:
            return Path(settings.password_file).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.ConnectionFailedError(
                describe(settings), f"password_file cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from None
    return None


def describe(settings: PostgresqlSettings) -> str:
    """Where the database is, for messages; never with a password."""
    try:
        known = conninfo_to_dict(settings.conninfo or "")
    except psycopg.Error:
        known = {}
    host = settings.host or known.get("host") or "localhost"
    port = settings.port or known.get("port")
    dbname = settings.dbname or known.get("dbname") or settings.name
    return f"postgresql://{host}{f':{port}' if port else ''}/{dbname}"


def open_session(
    settings: PostgresqlSettings, role: Role, progress: Callable[[], bool], known_good: Callable[[], bool]
) -> PostgresqlSession:
    """Opens a connection; one that has been good before is tried for `reconnect_timeout`.

    Raises:
        ConnectionFailedError: It cannot be opened.
    """

    def connect() -> Connection:
        deadline = time.monotonic() + settings.reconnect_timeout
        pause = 0.05
        while True:
            try:
                return _connect(settings, role)
            except errors.ConnectionFailedError:
                if not known_good() or time.monotonic() + pause > deadline or progress():
                    raise
            until = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311  - not a secret
            while (left := until - time.monotonic()) > 0:
                if progress():
                    break
                time.sleep(min(left, 0.02))
            pause = min(pause * 2, 1.0)

    return PostgresqlSession(connect, settings, progress)


def _connect(settings: PostgresqlSettings, role: Role) -> Connection:
    wanted = parameters(settings, role)
    try:
        return Connection.connect("", autocommit=True, prepare_threshold=None, **wanted)
    except psycopg.Error as error:
        raise errors.ConnectionFailedError(describe(settings), str(error).strip()) from error
