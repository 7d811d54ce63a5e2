"""PgBouncer in transaction mode before the shared server, if the system has it (Debian: `apt install pgbouncer`).

`PGBOUNCER` names another program than the system's: Debian 12 has version 1.18, and statements are prepared from 1.21 on.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import subprocess
import time

import psycopg
import pytest

from tests import watchdog
from tests.postgresql.server import _as_user, _dies_with_us, _home, _root, free_port, shared

STARTUP_SECONDS = 20.0


def _program() -> str:
    program = os.environ.get("PGBOUNCER")
    program = program or shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed: apt install pgbouncer")
    return program


@functools.cache
def prepares() -> bool:
    """Whether it keeps track of prepared statements."""
    shown = subprocess.run([_program(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"(\d+)\.(\d+)", shown)
    assert version is not None, shown
    return (int(version[1]), int(version[2])) >= (1, 21)


@functools.cache
def pooler() -> str:
    """Starts it once, and gives its connection string; skips where there is none."""
    program = _program()
    server = shared()
    port = free_port()
    home = _home() / "pooler"
    home.mkdir()
    (home / "users").write_text('"postgres" ""\n')
    (home / "ini").write_text(
        f"[databases]\n* = host={server.sockets} port={server.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"auth_file = {home / 'users'}\npool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 200\n"
        + ("max_prepared_statements = 50\n" if prepares() else "")
    )
    if _root():
        shutil.chown(home, "nobody")
        for path in home.iterdir():
            shutil.chown(path, "nobody")
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [program, str(home / "ini")],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd="/",
            preexec_fn=_dies_with_us,
            start_new_session=True,
            **_as_user(),
        )
    watchdog.lasting.add(process.pid)
    atexit.register(_end, process)
    conninfo = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            psycopg.connect(conninfo).close()
            return conninfo
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"pgbouncer did not start:\n{(home / 'log').read_text()[-2000:]}") from None
            time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
