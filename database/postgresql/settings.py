"""PostgreSQL's section of the configuration: its settings, and the rules that read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from database.settings.model import LoggingSettings
from database.settings.rules import (
    Section,
    Unfit,
    boolean,
    choice,
    duration,
    file,
    init_sql,
    migrations,
    monitor,
    text,
    whole,
)

if TYPE_CHECKING:
    from database.settings.document import Item

__all__ = ["SECTION", "PostgresqlSettings"]


@dataclass(frozen=True, slots=True)
class PostgresqlSettings:
    """One PostgreSQL database.

    What says where it is and who is there goes to libpq, which knows more ways to say so:
    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS

    Attributes:
        name: The name that `get_db()` is called with.
        conninfo: A connection string or URI; the keys below override its parts. Never shown, for it may hold a password.
        host: Name, address or directory of the socket; several, separated by commas, are tried in their order.
        port: A number, or one for each host.
        dbname: The database's name on the server.
        user: The role.
        password_env: The environment variable that holds the password; read at each connection.
        password_file: The file that holds the password (a mounted secret); read at each connection.
        sslmode: How much TLS is asked for.
        sslrootcert: File of the certificate authorities.
        sslcert: File of the client's certificate.
        sslkey: File of its key.
        target_session_attrs: Which server will do; None: one that takes writes, where several hosts are named.
        application_name: What the server's views and logs call these connections.
        options: Command-line options for the server process, such as `-c search_path=app`.
        connect_timeout: Seconds for one attempt to connect to one host.
        reconnect_timeout: Seconds for which a lost connection is tried to be made again, with growing pauses.
        max_lifetime: Seconds after which a connection is made again, a little sooner at random; 0: never.
        max_idle: Seconds of not being used after which a connection is made again before it is used; 0: never.
        pool_size: The most connections of one event loop; reads and writes share them.
        pool_timeout: Seconds to wait for a connection.
        lock_timeout: Milliseconds to wait for another transaction's lock; 0: for ever.
        statement_timeout: Milliseconds that one statement may take; 0: any.
        isolation: Of transactions that may write, and of single statements.
        prepare_threshold: Executions from which a statement is prepared on the server; 0: never.
        statement_rollback: Whether a failed statement undoes only itself and its transaction goes on, as on SQLite.
        lastrowid: Whether an INSERT tells the generated key, as on SQLite.
        resolve_commits: Whether the server is asked what has become of a COMMIT whose answer was lost.
        replicas: What of the connection string is different on the replicas; read-only transactions run there.
        pooler: What stands between: `"transaction"` for a pooler that gives each transaction another server connection
            (PgBouncer and its like); `"none"`.
        pooler_prepares: Whether that pooler keeps track of prepared statements (PgBouncer from 1.21 on, with
            `max_prepared_statements`).
        init_sql: Path of the file that creates the schema; `""`: none; None: the packaged one.
        migrations: Folder of the numbered SQL files that bring the schema up to date; None: there are none.
        auto_migrate: Whether they are applied whenever a pool opens.
        monitor: Folder in which this process offers its pools' statistics on a Unix socket; None: it does not.
        logging: What is logged.
    """

    name: str
    conninfo: str | None = field(default=None, repr=False)
    host: str | None = None
    port: str | None = None
    dbname: str | None = None
    user: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    sslmode: str | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    target_session_attrs: str | None = None
    application_name: str | None = None
    options: str | None = None
    connect_timeout: int = 10
    reconnect_timeout: float = 30.0
    max_lifetime: float = 3600.0
    max_idle: float = 600.0
    pool_size: int = 10
    pool_timeout: float = 30.0
    lock_timeout: int = 30_000
    statement_timeout: int = 0
    isolation: str = "READ COMMITTED"
    prepare_threshold: int = 5
    statement_rollback: bool = True
    lastrowid: bool = True
    resolve_commits: bool = False
    replicas: str | None = field(default=None, repr=False)
    pooler: str = "none"
    pooler_prepares: bool = False
    init_sql: str | None = None
    migrations: str | None = None
    auto_migrate: bool = False
    monitor: str | None = None
    logging: LoggingSettings = field(default_factory=LoggingSettings)


def _ports(item: Item) -> str | None:
    value = item.value
    if value is None:
        return None
    ports = value.split(",") if isinstance(value, str) else [str(value)]
    for port in ports:
        if isinstance(value, bool) or not port.strip().isdecimal() or not 0 < int(port) < 65536:
            raise Unfit("a port from 1 to 65535, or several, separated by commas")
    return ",".join(port.strip() for port in ports)


SECTION = Section(
    engine="postgresql",
    build=PostgresqlSettings,
    rules={
        "conninfo": text,
        "host": text,
        "port": _ports,
        "dbname": text,
        "user": text,
        "password_env": text,
        "password_file": file,
        "sslmode": choice("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
        "sslrootcert": file,
        "sslcert": file,
        "sslkey": file,
        "target_session_attrs": choice("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
        "application_name": text,
        "options": text,
        "connect_timeout": whole(1, 3600),
        "reconnect_timeout": duration("seconds"),
        "max_lifetime": duration("seconds"),
        "max_idle": duration("seconds"),
        "pool_size": whole(1, 1000),
        "pool_timeout": duration("seconds"),
        "lock_timeout": whole(0, 2**31 - 1),
        "statement_timeout": whole(0, 2**31 - 1),
        "isolation": choice("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"),
        "prepare_threshold": whole(0, 1_000_000),
        "statement_rollback": boolean,
        "lastrowid": boolean,
        "resolve_commits": boolean,
        "replicas": text,
        "migrations": migrations,
        "auto_migrate": boolean,
        "monitor": monitor,
        "pooler": choice("none", "transaction"),
        "pooler_prepares": boolean,
        "init_sql": init_sql,
    },
    own=("conninfo", "dbname"),
    identity=lambda settings: None,  # two names for one database do no harm: nobody keeps a lock on it
    private=("migrations",),
    kept=("conninfo",),
)
