"""Opens connections: where the server is, who is there, how long it is tried, and how long a connection lives.

Replicas. A connection for read-only transactions is to a replica, or, while none answers, a stand-in: one to the
primary. That no replica answers is remembered for all connections of the pool, so that one transaction finds out and the
others need not; after `REPLICAS_AGAIN` a stand-in whose turn it is tries once more.

Threads. Connections are opened by the workers' threads; `_Replicas` is shared by them, and a lost update does no harm.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from database import errors
from database.engine.adapting import Adapters
from database.engine.contract import Role
from database.postgresql.connection import Connection
from database.postgresql.raw import RawConnection
from database.postgresql.redaction import hide
from database.postgresql.settings import PostgresqlSettings

__all__ = ["Replicas", "describe", "local_settings", "open_connection", "parameters"]

BACKSLASH = "\\"

REPLICAS_AGAIN = 30.0
"""Seconds for which no replica is tried after none has answered."""

REPLICAS_TIMEOUT = 3
"""Seconds for one attempt at a replica, at the most: there is the primary to fall back on."""

ENCODE = (
    "conninfo (or replicas) is a URI with a character in the user or the password that has a meaning there: percent-encode the"
    " password (`/` is %2F, `@` is %40, `?` is %3F, `%` is %25), or give it by password_env or password_file"
)

_logger = logging.getLogger("database.pool")


class Replicas:
    """Whether a replica is worth trying."""

    __slots__ = ("again_at",)

    def __init__(self) -> None:
        self.again_at = 0.0


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
    for key in _PARTS:
        if _is_conninfo(getattr(settings, key)):
            raise errors.ConnectionFailedError(
                describe(settings), f"{key} is a whole connection string: it belongs under `conninfo`"
            )
    if _is_unencoded(settings.conninfo) or _is_unencoded(settings.replicas):
        raise errors.ConnectionFailedError(describe(settings), ENCODE)
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
    merged["client_encoding"] = (
        "UTF8"  # that is what is sent, whatever the environment says, or the database's own encoding is
    )
    # A connection that a firewall has forgotten is noticed within minutes, not after the system's two hours.
    for key, value in (("keepalives_idle", 60), ("keepalives_interval", 10), ("keepalives_count", 3)):
        merged.setdefault(key, value)
    options = [str(merged.get("options") or ""), settings.options or ""]
    if settings.pooler != "none":  # it would refuse them: they go with each transaction, see `local_settings`
        merged.pop("options", None)
        return merged
    options += [f"-c {key}={value}" for key, value in _session_options(settings)]
    if settings.isolation != "READ COMMITTED":
        options.append(f"-c default_transaction_isolation={settings.isolation.lower().replace(' ', BACKSLASH + ' ')}")
    merged["options"] = " ".join(filter(None, options))
    return merged


def _session_options(settings: PostgresqlSettings) -> Iterator[tuple[str, object]]:
    if settings.lock_timeout:
        yield "lock_timeout", settings.lock_timeout
    if settings.statement_timeout:
        yield "statement_timeout", settings.statement_timeout


def local_settings(settings: PostgresqlSettings) -> bytes | None:
    """What each transaction is told behind a pooler, where a connection cannot keep it: one SELECT, or nothing.

    Raises:
        ConnectionFailedError: `options` holds something else than `-c name=value`.
    """
    if settings.pooler == "none":
        return None
    given: dict[str, object] = {}
    rest = settings.options or ""
    with contextlib.suppress(psycopg.Error):
        rest = f"{conninfo_to_dict(settings.conninfo or '').get('options') or ''} {rest}"
    for match in re.finditer(r"(?:-c\s*|--)([\w.-]+)=((?:[^\s\\]|\\.)*)|(\S+)", rest):
        if match[3] is not None:
            raise errors.ConnectionFailedError(
                describe(settings), "behind a pooler, options may hold `-c name=value` and nothing else"
            )
        given[match[1].replace("-", "_")] = re.sub(r"\\(.)", r"\1", match[2])
    given.update(_session_options(settings))
    calls = [f"set_config({_literal(key)}, {_literal(str(value))}, true)" for key, value in given.items()]
    return f"SELECT {', '.join(calls)}".encode() if calls else None


def _literal(text: str) -> str:
    return "E'" + text.replace(BACKSLASH, BACKSLASH * 2).replace("'", "''") + "'"


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
    known: dict[str, Any] = {}
    if not _is_unencoded(settings.conninfo):  # its parts would be the password's
        with contextlib.suppress(psycopg.Error):
            known = conninfo_to_dict(settings.conninfo or "")
    host = _part(settings.host) or known.get("host") or "localhost"
    port = settings.port or known.get("port")
    dbname = _part(settings.dbname) or _part(known.get("dbname")) or settings.name
    return f"postgresql://{host}{f':{port}' if port else ''}/{dbname}"


_PARTS = ("host", "dbname", "user", "application_name", "options")
"""Settings that are a part of a connection string, and are shown."""


def _part(text: str | None) -> str | None:
    return None if _is_conninfo(text) else text


def _is_conninfo(text: str | None) -> bool:
    """Whether a connection string stands where a part of one belongs: a password may be in it."""
    return text is not None and re.search(r"://|\bpassword\s*=", text) is not None


def _is_unencoded(conninfo: str | None) -> bool:
    """Whether a URI's user or password holds characters that libpq would take for something else, and then quote."""
    match = re.match(r"postgres(?:ql)?://", conninfo or "")
    if match is None or conninfo is None:
        return False
    authority, mark, tail = re.fullmatch(r"([^/?]*)([/?]?)(.*)", conninfo[match.end() :], re.DOTALL).groups()  # type: ignore[union-attr]  # it always matches
    path, _, query = ("", "", tail) if mark == "?" else tail.partition("?")
    userinfo, at, _ = authority.rpartition("@")
    if "@" in path or (at and re.search(r"@|\s|%(?![0-9a-fA-F]{2})", userinfo)):
        return True
    if "@" in query and not at:
        keywords = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        for parameter in query.split("&"):
            key, _, _ = parameter.partition("=")
            if "@" in parameter and key not in keywords:
                return True
    return False


def open_connection(
    settings: PostgresqlSettings,
    role: Role,
    progress: Callable[[], bool],
    known_good: Callable[[], bool],
    replicas: Replicas | None = None,
    adapters: Adapters | None = None,
) -> Connection:
    """Opens a connection; one that has been good before is tried for `reconnect_timeout`.

    Args:
        settings: Where it goes.
        role: `"reader"`: to a replica, or as long as none answers to the primary.
        progress: Whether nobody waits for it any more.
        known_good: Whether it has been good before.
        replicas: What is known of the replicas.
        adapters: How types of the user's are stored.

    Raises:
        ConnectionFailedError: It cannot be opened.
    """

    def connect() -> RawConnection:
        if replicas is not None:
            raw = _replica(settings, replicas)
            if raw is not None:
                return raw
        deadline = time.monotonic() + settings.reconnect_timeout
        pause = 0.05
        while True:
            try:
                raw = _connect(settings, "shared" if replicas is not None else role)
                if replicas is not None:
                    raw.expires = min(raw.expires, replicas.again_at)
                return raw
            except errors.ConnectionFailedError:
                if not known_good() or time.monotonic() + pause > deadline or progress():
                    raise
            until = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311  - not a secret
            while (left := until - time.monotonic()) > 0:
                if progress():
                    break
                time.sleep(min(left, 0.02))
            pause = min(pause * 2, 1.0)

    return Connection(connect, settings, progress, local_settings(settings), adapters)


def _replica(settings: PostgresqlSettings, replicas: Replicas) -> RawConnection | None:
    """A connection to a replica; None while none answers."""
    now = time.monotonic()
    if now < replicas.again_at:
        return None
    known_down = replicas.again_at > 0
    replicas.again_at = now + REPLICAS_AGAIN  # first: the others need not try as well
    try:
        raw = _connect(settings, "reader")
    except errors.ConnectionFailedError as error:
        if error.reason == ENCODE:
            raise
        replicas.again_at = time.monotonic() + REPLICAS_AGAIN
        if not known_down:
            _logger.warning(
                "%s: no replica answers (%s): read-only transactions run on the primary; the replicas are tried again in %g s",
                describe(settings),
                error.reason,
                REPLICAS_AGAIN,
            )
        return None
    replicas.again_at = 0.0
    return raw


def _connect(settings: PostgresqlSettings, role: Role) -> RawConnection:
    wanted = parameters(settings, role)
    if role == "reader":
        wanted["connect_timeout"] = min(int(wanted["connect_timeout"]), REPLICAS_TIMEOUT)
    try:
        raw = RawConnection.connect("", autocommit=True, prepare_threshold=None, **wanted)
    except psycopg.Error as error:
        text = str(error).strip()
        reason = hide(text, [wanted.get("password")])
        if "unsupported startup parameter" in text:
            reason += "; this is a pooler (PgBouncer): put `pooler: transaction` into the database's section"
        raise errors.ConnectionFailedError(describe(settings), reason) from (error if reason == text else None)
    lifetime = settings.max_lifetime
    if lifetime:  # some sooner than others, so that they are not all made again at once
        raw.expires = time.monotonic() + lifetime * random.uniform(0.9, 1.0)  # noqa: S311  - not a secret
    return raw
