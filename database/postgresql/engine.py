"""PostgreSQL, as `database.engine.contract` describes an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, cast

from database import errors
from database.engine.adapting import Adapters
from database.engine.contract import Backend, Engine, Migrations, Role
from database.postgresql import analysis
from database.postgresql.plan import Plan
from database.postgresql.settings import PostgresqlSettings
from database.postgresql.together import run_together

try:
    import psycopg

    from database.postgresql.connection import Connection, may_join
    from database.postgresql.failures import control_error, is_broken, is_busy
    from database.postgresql.opening import Replicas, describe, open_connection
except ImportError as error:
    raise errors.ConfigurationError(
        f"PostgreSQL needs the extra `postgresql` of this package: install it (psycopg cannot be imported: {error})"
    ) from error

__all__ = ["ENGINE"]

PATIENCE = 2.0
"""Seconds for which a single statement is run again after deadlocks and serialization failures."""

_INIT_LOCK = 0x6A6F6275
"""The advisory lock under which `init_sql` runs, for many processes may start at once."""


def _backend(settings: PostgresqlSettings, adapters: Adapters) -> Backend:
    good = False

    def connect(role: Role, progress: Callable[[], bool]) -> Connection:
        nonlocal good
        session = open_connection(settings, role, progress, lambda: good, adapters=adapters)
        if not good:
            try:
                _initialise(session, settings)
                if settings.auto_migrate and settings.migrations is not None:
                    from database.engine.migrations import Order  # noqa: PLC0415  - most programs do without
                    from database.postgresql.migrate import migrate  # noqa: PLC0415

                    migrate(session, Order(settings.migrations))
            except BaseException as error:
                session.close()
                if isinstance(error, errors.MigrationError):
                    raise
                if isinstance(error, (psycopg.Error, OSError, errors.DatabaseError)):
                    raise errors.ConnectionFailedError(describe(settings), f"init_sql failed: {error}") from error
                raise
            good = True
        return session

    return _shared(describe(settings), connect, settings)


def _replica_backend(settings: PostgresqlSettings, adapters: Adapters) -> Backend | None:
    """The replicas' connections: those of read-only transactions."""
    if settings.replicas is None:
        return None
    good = False
    replicas = Replicas()

    def connect(_role: Role, progress: Callable[[], bool]) -> Connection:
        nonlocal good
        session = open_connection(settings, "reader", progress, lambda: good, replicas, adapters)
        good = True
        return session

    return _shared(f"{describe(settings)} (replicas)", connect, settings)


def _shared(
    description: str, connect: Callable[[Role, Callable[[], bool]], Connection], settings: PostgresqlSettings
) -> Backend:
    """A backend whose connections are all alike."""
    return Backend(
        description=description,
        connect=connect,
        is_busy=is_busy,
        is_broken=is_broken,
        busy_timeout=PATIENCE,
        single_writer=False,
        max_idle=settings.max_idle,
        steps=True,
        may_join=may_join,
        run_together=run_together,
    )


def _initialise(session: Connection, settings: PostgresqlSettings) -> None:
    """Runs `init_sql`, all of it in one transaction."""
    if settings.init_sql == "" or (settings.init_sql is None and settings.migrations is not None):
        return
    if settings.init_sql is None:
        text = (resources.files("database.postgresql") / "sql" / "init.sql").read_text("utf-8")
    else:
        text = Path(settings.init_sql).expanduser().read_text("utf-8")
    missing = [
        each for each in analysis.split(text) if not _is_there(session, each, packaged=settings.init_sql is None)
    ]
    if not missing:  # so nothing waits for a lock, and a role that may create nothing can connect
        return
    session.begin(readonly=False)
    try:
        session.execute_script(f"SELECT pg_advisory_xact_lock({_INIT_LOCK});\n{';'.join(missing)}")
        session.commit()
    finally:
        session.rollback()


_LOOK = {
    "TABLE": "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relname = $1 AND $3::text IS NULL AND"
    " c.relnamespace = quote_ident(coalesce($2::text, current_schema()))::regnamespace)",
    "FUNCTION": "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.proname = $1 AND p.prosrc = $3 AND"
    " p.pronamespace = quote_ident(coalesce($2::text, current_schema()))::regnamespace)",
    "SCHEMA": "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = $1 AND $2::text IS NULL AND $3::text IS"
    " NULL)",
    "EXTENSION": "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension e WHERE e.extname = $1 AND $2::text IS NULL AND"
    " $3::text IS NULL)",
    "TRIGGER": "SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid"
    " WHERE t.tgname = $1 AND $3::text IS NULL AND"
    " c.relnamespace = quote_ident(coalesce($2::text, current_schema()))::regnamespace)",
}
_LOOKS = {
    kind: Plan(sql, None, 3)
    for kind, sql in (_LOOK | dict.fromkeys(("INDEX", "SEQUENCE", "VIEW"), _LOOK["TABLE"])).items()
}


def _is_there(session: Connection, text: str, *, packaged: bool) -> bool:
    """Whether a statement of `init_sql` has nothing to do: what it makes is there.

    IF NOT EXISTS takes its lock first and looks second, so a second process would wait behind any long transaction, and
    all the world behind it. OR REPLACE is looked at in the packaged file only, of which we know that nothing else hides in it.
    """
    made = analysis.made_by(text)
    if made is None or made.kind not in _LOOKS or (made.replaces and not packaged):
        return False
    body = made.body if made.kind == "FUNCTION" else None
    try:
        return bool(session.value(session.run(_LOOKS[made.kind], (made.name, made.schema, body)), False))
    except psycopg.errors.InvalidSchemaName:
        return False


def _adapter() -> Any:
    """Makes aiosql's synchronous adapter. The SQL of files stays as it is: the analysis knows `:name`."""
    from aiosql.adapters.generic import GenericAdapter  # noqa: PLC0415  - only those who use query files pay for it

    return cast("Any", GenericAdapter)()


def _migrations() -> Migrations:
    from database.postgresql import migrate  # noqa: PLC0415  - few programs ever need it

    return Migrations(migrate.migrate, migrate.applied)


ENGINE = Engine(
    name="postgresql",
    analyse=analysis.analyse,
    control_error=control_error,
    connection=Connection,
    migrations=_migrations,
    backend=cast("Any", _backend),
    adapter=_adapter,
    pins="VACUUM cannot remove the rows that were changed since (postgresql.org/docs/current/routine-vacuuming.html)",
    replica_backend=cast("Any", _replica_backend),
)
