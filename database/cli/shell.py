"""`shell`: SQL, line by line. Editing, history and completion are prompt_toolkit's.

All statements run in the one task that reads them, so a transaction begun by BEGIN belongs to the lines that follow.
Ctrl-C stops the statement that runs and nothing else; at the prompt it clears the line; Ctrl-D ends.
"""

from __future__ import annotations

import asyncio
import csv
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import anyio
from rich import box
from rich.table import Table
from rich.text import Text

from database import errors
from database.cli.dialects import dialect_of
from database.cli.support import (
    Failure,
    Status,
    Target,
    clean,
    duration,
    err,
    error_block,
    fail,
    local,
    out,
    remark,
    run,
    utf8,
)
from database.cli.values import csv_text, json_text
from database.engine.statement import CONTROL, READ
from database.session.database import Database

__all__ = ["shell"]

MODES = ("table", "line", "csv", "json")

LIMIT = 1000
"""Rows shown of a result, unless `.limit` says otherwise."""

_HELP = """\
SQL ends with a semicolon and may go over several lines.

.tables [PATTERN]   tables and views           .mode table|line|csv|json
.schema [NAME]      how they were created      .limit N            rows shown; 0: all
.timer on|off       time of each statement     .read FILE          run the statements of a file
.stats              what the pool did so far   .help, .quit

BEGIN, COMMIT and ROLLBACK work as usual; the prompt shows * while a transaction is open.
Tab completes, arrows go through the history, Ctrl-R searches it. Ctrl-C stops what runs, Ctrl-D ends."""

_KEYWORDS = (
    "ALTER TABLE", "AND", "AS", "ASC", "BEGIN", "BETWEEN", "BY", "CASE", "COMMIT", "CREATE", "CREATE INDEX", "CREATE TABLE",
    "DELETE FROM", "DESC", "DISTINCT", "DROP", "ELSE", "END", "EXISTS", "EXPLAIN QUERY PLAN", "FROM", "GROUP BY", "HAVING",
    "IN", "INSERT INTO", "IS", "JOIN", "LEFT JOIN", "LIKE", "LIMIT", "NOT", "NULL", "OFFSET", "ON", "OR", "ORDER BY", "PRAGMA",
    "REPLACE", "RETURNING", "ROLLBACK", "SELECT", "SET", "THEN", "UNION", "UPDATE", "USING", "VALUES", "WHEN", "WHERE", "WITH",
    "count(*)",
)  # fmt: skip


def shell(target: Target, *, readonly: bool, commands: list[str], mode: str) -> None:
    """Runs the given commands, or what a terminal or standard input says."""
    if mode not in MODES:
        fail(f"--mode is one of {', '.join(MODES)}, not {mode!r}", status=Status.USAGE)
    run(_main, target, readonly, commands, mode)


async def _main(target: Target, readonly: bool, commands: list[str], mode: str) -> None:
    db = target.open()
    await db.open()
    session = _Session(db, readonly=readonly, mode=mode)
    try:
        if commands:
            for command in commands:
                await session.feed(utf8(command))
        elif sys.stdin.isatty() and sys.stdout.isatty():
            await _interactive(session)
        else:
            try:
                text = sys.stdin.read()
            except UnicodeDecodeError as error:
                fail(f"standard input: not {error.encoding}: {error.reason}")
            await session.feed(text)
    except _Quit:
        pass
    finally:
        if db.in_transaction:
            with anyio.CancelScope(shield=True), suppress(errors.DatabaseError):
                await db.rollback()
            remark("the open transaction was rolled back")


class _Quit(Exception):
    pass


class _Session:
    """What the shell remembers from one line to the next."""

    def __init__(self, db: Database, *, readonly: bool, mode: str) -> None:
        self.db = db
        self.dialect = dialect_of(db)
        self.readonly = readonly
        self.mode = mode
        self.timer = False
        self.limit = LIMIT
        self.words: list[str] = []

    async def feed(self, text: str) -> None:
        """Runs commands and statements.

        Raises:
            Failure, DatabaseError: One has failed; what stands behind it is not run.
        """
        lines: list[str] = []
        for line in text.splitlines(keepends=True):
            if line.lstrip().startswith(".") and not "".join(lines).strip():
                await self.command(line.strip())
                continue
            lines.append(line)
            if self.dialect.complete("".join(lines)):
                await self._statements("".join(lines))
                lines.clear()
        await self._statements("".join(lines))

    async def _statements(self, text: str) -> None:
        for sql in self.dialect.split(text):
            began = time.perf_counter()
            await self.statement(sql.strip().rstrip(";"))
            if self.timer:
                remark(f"({duration(time.perf_counter() - began)})")

    async def statement(self, sql: str) -> None:
        """Runs one statement and shows what it gives."""
        statement = self.db.engine.analyse(sql)
        if not statement.verb:
            return
        if statement.kind == CONTROL:
            await self._control(statement.verb)
            return
        if self.readonly and not self.db.in_transaction:
            async with self.db.transaction(readonly=True):
                await self._run(sql, statement)
        else:
            await self._run(sql, statement)
        if statement.verb in ("CREATE", "DROP", "ALTER"):
            await self.learn()

    async def _run(self, sql: str, statement: Any) -> None:
        if not statement.returns_rows:
            result = await self.db.execute(sql)
            if result.rowcount >= 0:
                last = "" if result.lastrowid is None else f", last row id {result.lastrowid}"
                remark(f"{result.rowcount:,} row{'' if result.rowcount == 1 else 's'} changed{last}")
            return
        rows: list[Any] = []
        more = False
        if statement.kind == READ:
            async with self.db.stream(sql, chunk_size=500) as stream:
                async for row in stream:
                    if self.limit and len(rows) == self.limit:
                        more = True
                        break
                    rows.append(row)
        else:
            rows = await self.db.fetch_all(sql)
        self.show(rows)
        if more:
            remark(f"… and more: the first {self.limit:,} are shown (.limit changes that; `export` writes all)")

    async def _control(self, verb: str) -> None:
        if verb in ("BEGIN", "START"):
            if self.db.in_transaction:
                fail("a transaction is open already", "COMMIT or ROLLBACK ends it")
            await self.db.begin(readonly=self.readonly)
        elif verb in ("COMMIT", "END"):
            await self.db.commit()
        elif verb in ("ROLLBACK", "ABORT"):
            if not self.db.in_transaction:
                fail("no transaction is open")
            await self.db.rollback()
        else:
            fail(f"{verb} is not for this shell", "BEGIN, COMMIT and ROLLBACK are")

    # Commands

    async def command(self, line: str) -> None:
        """Runs a line that begins with a dot."""
        try:
            name, *arguments = shlex.split(line)
        except ValueError as error:
            fail(f"{line}: {error}")
        if name in (".quit", ".exit"):
            raise _Quit
        found: dict[str, Callable[..., Any]] = {
            ".help": self._help, ".tables": self._tables, ".schema": self._schema, ".timer": self._timer, ".mode": self._mode,
            ".limit": self._limit, ".read": self._read, ".stats": self._stats,
        }  # fmt: skip
        if name not in found:
            fail(f"there is no command {name}", ".help lists them")
        try:
            await found[name](*arguments)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            fail(f"{name}: wrong number of arguments", ".help tells how it is used")

    async def _help(self) -> None:
        out().print(_HELP, markup=False)

    async def _tables(self, pattern: str = "%") -> None:
        rows = await self.db.fetch_all(self.dialect.tables, (pattern,))
        for row in rows:
            out().print(clean(row[0], lines=False), markup=False, soft_wrap=True)

    async def _schema(self, name: str = "%") -> None:
        found = await self.dialect.definitions(self.db, name)
        for text in found:
            out().print(clean(text), markup=False, soft_wrap=True)
        if not found and name != "%":
            fail(f"nothing is named {name!r}", ".tables lists what there is")

    async def _timer(self, state: str = "") -> None:
        self.timer = {"on": True, "off": False}.get(state, not self.timer)
        remark(f"timer {'on' if self.timer else 'off'}")

    async def _mode(self, mode: str = "") -> None:
        if mode not in MODES:
            fail(f"there is no mode {mode!r}", f"there are {', '.join(MODES)}")
        self.mode = mode

    async def _limit(self, number: str = "") -> None:
        if not number.isdecimal():
            fail(f".limit takes a number of rows, not {number!r}")
        self.limit = int(number)

    async def _read(self, name: str) -> None:
        try:
            text = await anyio.Path(os.path.expanduser(local(name))).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{name}: {getattr(error, 'strerror', None) or error}")
        await self.feed(text)

    async def _stats(self) -> None:
        stats = self.db.stats()
        for name in type(stats).__dataclass_fields__:
            out().print(f"{name:<20}{getattr(stats, name):>12,}", markup=False)

    async def learn(self) -> None:
        """Learns the names of tables and columns, for completion."""
        with suppress(errors.DatabaseError):
            tables = [str(row[0]) for row in await self.db.fetch_all(self.dialect.tables, ("%",))]
            columns: set[str] = set()
            for table in tables:
                columns.update(column.name for column in await self.dialect.columns(self.db, table))
            self.words = [*tables, *sorted(columns)]

    # Rows

    def show(self, rows: list[Any]) -> None:
        """Shows rows in the chosen way."""
        if not rows:
            if self.mode == "table":
                remark("no rows")
            return
        names = list(rows[0].keys())
        if self.mode == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([csv_text(value) for value in row] for row in rows)
        elif self.mode == "json":
            for row in rows:
                pairs = zip(names, row, strict=True)  # of which two may have one name
                shown = (f"{json_text(name)}: {json_text(_plain(value))}" for name, value in pairs)
                print(f"{{{', '.join(shown)}}}")
        elif self.mode == "line":
            width = max(map(len, names))
            for number, row in enumerate(rows):
                if number:
                    print()
                for name, value in zip(names, row, strict=True):
                    out().print(
                        Text.assemble(
                            (f"{clean(name, lines=False):>{width}}", "cyan"), " = ", _cell(value, lines=True)
                        ),
                        soft_wrap=True,
                    )
        else:
            out().print(_table(names, rows))
            if len(rows) > 1:
                remark(f"{len(rows):,} rows")


def _plain(value: Any) -> Any:
    return f"\\x{value.hex()}" if isinstance(value, bytes) else value


def _cell(value: Any, *, lines: bool = False) -> Text:
    if value is None:
        return Text("NULL", style="dim italic")
    if isinstance(value, bytes):
        start = value[:16].hex()
        return Text(f"x'{start}{'…' if len(value) > 16 else ''}' ({len(value):,} bytes)", style="magenta")
    if isinstance(value, (int, float)):
        return Text(str(value))
    return Text(clean(str(value), lines=lines))


def _table(names: list[str], rows: list[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, name in enumerate(names):
        numbers = all(isinstance(row[index], (int, float, type(None))) for row in rows)
        table.add_column(Text(clean(name, lines=False)), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return table


# --- At a terminal ------------------------------------------------------------------------------------------


async def _interactive(session: _Session) -> None:
    prompt = _prompt(session)
    await session.learn()
    where = await session.dialect.banner(session.db)
    remark(f"{where}{' (read-only)' if session.readonly else ''}; .help helps, Ctrl-D ends")
    while True:
        star = "*" if session.db.in_transaction else ""
        try:
            text = await prompt(f"{session.db.name}{star}> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            with _interruptible() as scope:
                await session.feed(text)
            if scope.cancelled_caught:
                err().print("interrupted", style="red")
        except _Quit:
            return
        except (Failure, errors.DatabaseError) as error:
            err().print(Text(error_block(error)), soft_wrap=True, style="red")


@contextmanager
def _interruptible() -> Generator[anyio.CancelScope]:
    """A scope around what runs, which Ctrl-C cancels instead of the program."""
    # For each input anew: the prompt has a handler of its own, and leaves none behind.
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:
        try:
            loop.add_signal_handler(signal.SIGINT, scope.cancel)
        except NotImplementedError:  # Windows: there it ends the program
            yield scope
            return
        try:
            yield scope
        finally:
            loop.remove_signal_handler(signal.SIGINT)


def _prompt(session: _Session) -> Callable[[str], Any]:
    from prompt_toolkit import PromptSession  # noqa: PLC0415  - a sixth of a second, for those who need it
    from prompt_toolkit.completion import WordCompleter  # noqa: PLC0415
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415
    from prompt_toolkit.lexers import PygmentsLexer  # noqa: PLC0415

    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: Any) -> None:  # pyright: ignore[reportUnusedFunction]  - a key's
        """Ends the input where a statement ends; else begins another line."""
        buffer = event.current_buffer
        text = buffer.text.strip()
        if not text or text.startswith(".") or session.dialect.complete(text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    history = _history()
    commands = [".help", ".limit", ".mode", ".quit", ".read", ".schema", ".stats", ".tables", ".timer"]

    def words() -> list[str]:
        return [*session.words, *_KEYWORDS, *commands]

    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=WordCompleter(words, ignore_case=True, WORD=True),
        complete_while_typing=False,
        lexer=PygmentsLexer(cast("Any", import_module("pygments.lexers.sql")).SqlLexer),
        multiline=True,
        key_bindings=bindings,
        prompt_continuation=lambda width, _line, _wrapped: " " * max(width - 2, 0) + "> ",
        enable_history_search=True,
    )
    return prompt.prompt_async


def _history() -> Path | None:
    """The history's file, which only its owner can read: SQL may hold what others should not see."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(base).expanduser() / "jobu-database" / "shell-history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return None
    return path
