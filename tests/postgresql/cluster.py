"""A primary and its streaming replica, which has everything before a commit is answered.

`REPLICA=1` puts one beside the shared server: then the read-only transactions of PostgreSQL's tests run on the replica.
"""

from __future__ import annotations

import functools

import psycopg

from tests.postgresql.server import Server, shared


def replica_of(primary: Server, name: str, **options: object) -> Server:
    """A replica that runs; from here on the primary waits for it with each commit."""
    replica = Server(name, hot_standby="on", **options)
    source = primary.conninfo()
    replica.run("pg_basebackup", "-D", replica.data, "-d", source, "-R", "-X", "stream", "-c", "fast")
    replica.start()
    with psycopg.connect(source, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
    with psycopg.connect(source, autocommit=True) as connection:
        while connection.execute("SELECT sync_state FROM pg_stat_replication").fetchone() != ("sync",):
            connection.execute("SELECT pg_sleep(0.01)")
    return replica


@functools.cache
def shared_replica() -> Server:
    """The shared server's."""
    return replica_of(shared(), "shared-replica", max_standby_streaming_delay="-1", hot_standby_feedback="on")
