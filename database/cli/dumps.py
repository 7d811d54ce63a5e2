"""`backup` on PostgreSQL: runs the server's own `pg_dump`, and holds what it wrote against `pg_restore`.

The file appears under its name when it is complete and has been read. The password goes by the environment, never on a
command line, where everybody on the machine could read it.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from database.cli.support import Status, fail, in_thread

__all__ = ["dump"]

_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/usr/local/pgsql/bin",
)
"""Where distributions put several versions side by side, outside PATH."""

_TABLE = re.compile(r'dumping contents of table "(.*)"')

LAST = 20
"""Lines of what a program said that are kept for an error."""


@dataclass(frozen=True)
class _Programs:
    folder: Path
    version: int


async def dump(
    settings: Any, file: Path, *, force: bool, verify: bool, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Writes a dump of one database into a file, in pg_dump's custom format.

    Args:
        settings: Of the database.
        file: Where to.
        force: Whether an existing file is replaced.
        verify: Whether all of it is read again, not its table of contents alone.
        progress: Called with the bytes of the tables that are done, and of all.

    Returns:
        What else there is to tell: the program.
    """
    if settings.pooler != "none":
        fail(
            f"database {settings.name!r} is behind a pooler, which pg_dump cannot go through: what it sets on a connection"
            " would reach the pooler's other clients",
            "give a configuration that connects to the server itself (--config), without `pooler`",
            Status.USAGE,
        )
    server, sizes = await in_thread(lambda stopped: _ask(settings, stopped))
    programs = await anyio.to_thread.run_sync(_find, server // 10_000)
    if programs is None:
        fail(
            f"no pg_dump of PostgreSQL {server // 10_000} or later is installed here",
            "install the client programs, or run it where they are, with the password in PGPASSWORD or ~/.pgpass:\n  "
            + _command(settings, file),
        )
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    environment, conninfo = _connection(settings)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        await _run(
            [
                programs.folder / "pg_dump",
                "--format=custom",
                "--verbose",
                "--no-password",
                f"--file={partial}",
                *([f"--lock-wait-timeout={settings.lock_timeout}"] if settings.lock_timeout else []),
                *([f"--dbname={conninfo}"] if conninfo else []),
            ],
            environment,
            _Counter(sizes, progress),
        )
        restore: list[str | Path] = [programs.folder / "pg_restore"]
        await _run([*restore, "--list", partial], environment, None)
        if verify:
            await _run([*restore, f"--file={os.devnull}", partial], environment, None)
        _name(partial, file, force=force)
    finally:
        partial.unlink(missing_ok=True)
    return {"program": f"pg_dump {programs.version}"}


def _ask(settings: Any, stopped: Callable[[], bool]) -> tuple[int, dict[str, int]]:
    """The server's version, and roughly the bytes of each table, without waiting for anybody's lock."""
    from database.postgresql.inquiry import Inquiry  # noqa: PLC0415  - an extra

    with Inquiry(settings, stopped) as inquiry:
        rows = inquiry.rows(
            "SELECT n.nspname || '.' || c.relname, c.relpages::int8 * 8192 FROM pg_class c JOIN pg_namespace n"
            " ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%'"
            " AND n.nspname <> 'information_schema'"
        )
        return inquiry.version, {row[0]: row[1] for row in rows}


def _find(major: int) -> _Programs | None:
    """The programs of the server's own version; else of the next later one, for pg_dump reads no newer server."""
    found = [Path(place) for pattern in _PLACES for place in glob.glob(pattern)]
    if (path := shutil.which("pg_dump")) is not None:
        found.insert(0, Path(path).parent)
    versions: list[tuple[int, int, Path]] = []
    for order, folder in enumerate(found):
        if not ((folder / "pg_dump").exists() and (folder / "pg_restore").exists()):
            continue
        try:
            told = subprocess.run(  # noqa: S603  - a program of PostgreSQL's
                [folder / "pg_dump", "--version"], capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            continue
        match = re.search(r"(\d+)", told.stdout)
        if match is not None and int(match[1]) >= major:
            versions.append((int(match[1]), order, folder))
    if not versions:
        return None
    version, _, folder = min(versions)
    return _Programs(folder, version)


def _connection(settings: Any) -> tuple[dict[str, str], str]:
    """The environment that tells libpq's programs where to connect; and what has no variable, for the command line."""
    from psycopg import pq  # noqa: PLC0415  - an extra
    from psycopg.conninfo import make_conninfo  # noqa: PLC0415

    from database.postgresql.opening import parameters  # noqa: PLC0415

    known = {option.keyword.decode(): option for option in pq.Conninfo.get_defaults()}
    environment = {**os.environ, "LC_ALL": "C"}  # the progress is read from its messages
    rest: dict[str, Any] = {}
    for key, value in parameters(settings).items():
        option = known[key]
        if option.envvar:
            environment[option.envvar.decode()] = str(value)
        elif option.dispchar.startswith(b"*"):
            fail(
                f"{key} cannot be given to pg_dump without showing it to everybody on this machine", status=Status.USAGE
            )
        else:
            rest[key] = value
    return environment, make_conninfo(**rest) if rest else ""


def _command(settings: Any, file: Path) -> str:
    """What to type elsewhere; without the password."""
    from database.postgresql.opening import parameters  # noqa: PLC0415  - an extra

    wanted = parameters(settings)
    options = {"--host": "host", "--port": "port", "--username": "user", "--dbname": "dbname"}
    return " ".join(
        [
            "pg_dump --format=custom",
            *(f"{option}={shlex.quote(str(wanted[key]))}" for option, key in options.items() if wanted.get(key)),
            f"--file={shlex.quote(file.name)}",
        ]
    )


class _Counter:
    """Knows from what pg_dump says how far it is."""

    def __init__(self, sizes: dict[str, int], progress: Callable[[int, int], None]) -> None:
        self._sizes = sizes
        self._total = sum(sizes.values())
        self._progress = progress
        self._done = 0
        self._running = 0

    def read(self, line: str) -> None:
        """Takes a line of its messages."""
        match = _TABLE.search(line)
        if match is not None:  # so the one before is done
            self._done += self._running
            self._running = self._sizes.get(match[1], 0)
            self._progress(self._done, self._total)


async def _run(command: list[Any], environment: dict[str, str], counter: _Counter | None) -> None:
    """Runs a program to its end; a cancellation ends it."""
    said: list[str] = []
    async with _started(command, environment) as process:
        assert process.stderr is not None
        lines = BufferedByteReceiveStream(process.stderr)
        while True:
            try:
                line = (await lines.receive_until(b"\n", 2**20)).decode(errors="replace")
            except (anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.EndOfStream, anyio.ClosedResourceError):
                break
            if counter is not None:
                counter.read(line)
            said = [*said[1 - LAST :], line]
        said += [lines.buffer.decode(errors="replace")] if lines.buffer else []
        status = await process.wait()
    if status != 0:
        name = Path(command[0]).name
        wrong = [line.strip() for line in said if ": error:" in line or ": fatal:" in line or "detail:" in line]
        fail(f"{name} failed ({status}): {' '.join(wrong) or (said[-1].strip() if said else 'it says nothing')}")


@asynccontextmanager
async def _started(command: list[Any], environment: dict[str, str]) -> AsyncGenerator[Process]:
    # In a session of its own: Ctrl-C is for this program, which then ends that one.
    process = await anyio.open_process(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()
                with anyio.move_on_after(5):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
            await process.aclose()


def _name(partial: Path, file: Path, *, force: bool) -> None:
    """Gives the complete file its name; without `force` only if nobody else has it by now."""
    if force:
        partial.replace(file)
    else:
        try:
            os.link(partial, file)
        except FileExistsError:
            fail(f"{file} exists by now", "name another file, or use --force to replace it", Status.USAGE)
        except OSError:  # a file system without links
            partial.replace(file)
    if os.name == "posix":
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
