"""`python -m database.copy SOURCE TARGET`, and `python -m database copy`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from database import errors
from database.copy.work import Progress, copy
from database.session import registry
from database.session.database import Database

__all__ = ["add_arguments", "find", "main", "run"]

ENGINES = {"sqlite": "sqlite3", "sqlite3": "sqlite3", "postgresql": "postgresql"}


def find(place: str) -> Database:
    """The database that `engine:name` means.

    Raises:
        ConfigurationError: There is no such engine.
    """
    engine, _, name = place.partition(":")
    if engine not in ENGINES:
        raise errors.ConfigurationError(f"{place!r}: expected ENGINE:NAME, with sqlite or postgresql as the engine")
    return registry.get_db(name or "default", ENGINES[engine])


async def _main(options: argparse.Namespace) -> int:
    if options.config is not None:
        registry.configure(options.config)
    source, target = find(options.source), find(options.target)
    if source is target:
        raise errors.ConfigurationError("source and target are the same database")
    try:
        with _shown(options.quiet) as progress:
            report = await copy(
                source,
                target,
                tables=options.table or None,
                chunk_size=options.chunk_size,
                progress=progress,
                compare=not options.no_compare,
            )
    finally:
        await registry.close_all()
    for table in report.tables:
        same = (
            "" if options.no_compare else ", differs" if table.name in report.differing else ", the same on both sides"
        )
        print(f"{table.name}: {table.copied} rows copied{same}")
    return 1 if report.differing else 0


class _Bar:
    """A bar where there is a terminal and rich, a line for each tenth where there is not, nothing if it is to be quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._tasks: dict[tuple[str, str], Any] = {}
        self._shown: dict[tuple[str, str], int] = {}
        if not quiet and sys.stderr.isatty():
            try:
                from rich.console import Console  # noqa: PLC0415  - an extra
                from rich.progress import Progress as Bar  # noqa: PLC0415
            except ImportError:
                return
            self._bar = Bar(console=Console(stderr=True))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self._show

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, what: str, table: str, done: int, total: int) -> None:
        key = what, table
        if self._quiet:
            return
        if self._bar is not None:
            if key not in self._tasks:
                self._tasks[key] = self._bar.add_task(f"{what} {table}", total=total)
            self._bar.update(self._tasks[key], completed=done, total=max(done, total))
            return
        tenth = 10 if total <= done else done * 10 // total
        if self._shown.get(key) != tenth:
            self._shown[key] = tenth
            print(f"{what} {table}: {done} of {total} rows", file=sys.stderr, flush=True)


def _shown(quiet: bool) -> _Bar:
    return _Bar(quiet)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to a parser, which may be a sub-command's."""
    parser.add_argument("source", help="where the rows are: sqlite:NAME or postgresql:NAME, as configured")
    parser.add_argument("target", help="where they are to be; its tables must be there")
    parser.add_argument("--table", action="append", metavar="NAME", help="copy only this table; may be repeated")
    parser.add_argument(
        "--chunk-size", type=int, default=5000, metavar="N", help="rows in one transaction (default: 5000)"
    )
    parser.add_argument("--no-compare", action="store_true", help="do not read and compare both sides in the end")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--config", help="settings (default: DATABASE_CONFIG or config/database.yaml)")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; gives the exit status.

    0: done; 1: it failed, or the sides differ; 2: wrong arguments or configuration; 130: Ctrl-C.
    """
    import anyio  # noqa: PLC0415

    if options.chunk_size < 1:
        print("copy: --chunk-size takes a number from 1 up", file=sys.stderr)
        return 2
    try:
        return anyio.run(_main, options, backend=options.backend)
    except errors.ConfigurationError as error:
        print(f"copy: {error}", file=sys.stderr)
        return 2
    except (errors.DatabaseError, OSError) as error:
        print(f"copy: {error}\n  started again, it goes on from where it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("copy: interrupted; started again, it goes on from where it was", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m database.copy SOURCE TARGET`."""
    parser = argparse.ArgumentParser(prog="python -m database.copy", description="Copies tables between databases.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))
