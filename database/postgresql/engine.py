"""PostgreSQL, as `database.engine.contract` describes an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, cast

from database import errors
from database.engine.contract import Backend, Engine, Role
from database.postgresql import analysis
from database.settings import PostgresqlSettings

try:
    import psycopg

    from database.postgresql.connection import PostgresqlSession, may_join
    from database.postgresql.failures import control_error, is_broken, is_busy
    from database.postgresql.opening import describe, open_session
except ImportError as error:
    raise errors.ConfigurationError(
        "PostgreSQL needs the extra `postgresql`: pip install 'jobu-database[postgresql]'"
        f" (psycopg cannot be imported: {error})"
    ) from error

__all__ = ["ENGINE"]

PATIENCE = 2.0
"""Seconds for which a single statement is run again after deadlocks and serialization failures."""

_INIT_LOCK = 0x6A6F6275
"""The advisory lock under which `init_sql` runs, for many processes may start at once."""


def _backend(settings: PostgresqlSettings) -> Backend:
    good = False

    def connect(role: Role, progress: Callable[[], bool]) -> PostgresqlSession:
        nonlocal good
        session = open_session(settings, role, progress, lambda: good)
        if not good:
            try:
                _initialise(session, settings)
            except BaseException as error:
                session.close()
                if isinstance(error, (psycopg.Error, OSError, errors.DatabaseError)):
                    raise errors.ConnectionFailedError(describe(settings), f"init_sql failed: {error}") from error
                raise
            good = True
        return session

    return _shared(describe(settings), connect)


def _replica_backend(settings: PostgresqlSettings) -> Backend | None:
    """The replicas' connections: those of read-only transactions."""
    if settings.replicas is None:
        return None
    good = False

    def connect(_role: Role, progress: Callable[[], bool]) -> PostgresqlSession:
        nonlocal good
        session = open_session(settings, "reader", progress, lambda: good)
        good = True
        return session

    return _shared(f"{describe(settings)} (replicas)", connect)


def _shared(description: str, connect: Callable[[Role, Callable[[], bool]], PostgresqlSession]) -> Backend:
    """A backend whose connections are all alike."""
    return Backend(
        description=description,
        connect=connect,
        is_busy=is_busy,
        is_broken=is_broken,
        busy_timeout=PATIENCE,
        single_writer=False,
        may_join=may_join,
        run_together=PostgresqlSession.run_together,
    )


def _initialise(session: PostgresqlSession, settings: PostgresqlSettings) -> None:
    """Runs `init_sql`, all of it in one transaction."""
    if settings.init_sql == "":
        return
    if settings.init_sql is None:
        text = (resources.files("database.postgresql") / "sql" / "init.sql").read_text("utf-8")
    else:
        text = Path(settings.init_sql).expanduser().read_text("utf-8")
    session.begin(readonly=False)
    try:
        session.execute_script(f"SELECT pg_advisory_xact_lock({_INIT_LOCK}); {text}")
        session.commit()
    finally:
        session.rollback()


def _adapter() -> Any:
    """Makes aiosql's synchronous adapter."""
    from aiosql.adapters.pyformat import PyFormatAdapter  # noqa: PLC0415  - only those who use query files pay for it

    return cast("Any", PyFormatAdapter)()


ENGINE = Engine(
    name="postgresql",
    analyse=analysis.analyse,
    control_error=control_error,
    operations=PostgresqlSession,
    backend=cast("Any", _backend),
    adapter=_adapter,
    replica_backend=cast("Any", _replica_backend),
)
