"""Moving house: copies tables from one configured database to another, whatever their engines.

    python -m database.copy sqlite:default postgresql:default

The target's tables must be there already (its `init_sql`, a migration), with the columns of the source's. Rows are read in
the order of the primary key and written chunk by chunk, each chunk in one transaction together with a note of how far the
copy has come: interrupted at any moment, it goes on from there when it is started again. A table without a primary key is
copied as one chunk. In the end both sides are read once more and compared, value by value, in an order of no importance.

The copy is no replication. What is written to the source meanwhile may be missing, and the comparison says so: stop the
writers for the last run, which only has to copy what is new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, cast

from database import errors
from database.session import registry
from database.session.database import Database

__all__ = ["Report", "Table", "copy", "main"]

NOTES = "_database_copy"
"""The table of the target that says how far the copy has come. It stays, and may be dropped when all is done."""

ENGINES = {"sqlite": "sqlite3", "sqlite3": "sqlite3", "postgresql": "postgresql"}

Progress = Callable[[str, str, int, int], object]
"""`(what, table, done, total)`, where `what` is `"copy"` or `"compare"`, in rows."""


@dataclass(slots=True)
class Table:
    """One table of the copy."""

    name: str
    columns: list[str]
    key: list[str]
    """The primary key; empty if there is none."""
    needs: set[str] = field(default_factory=set[str])
    """Tables that its foreign keys point to."""
    copied: int = 0
    """Rows copied by this run."""
    rows: int = 0
    """Rows on both sides, when it has been compared."""


@dataclass(slots=True)
class Report:
    """What was done."""

    tables: list[Table]
    differing: list[str]
    """Tables whose rows are not the same on both sides."""


_TABLES = {
    "sqlite3": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite^_%' ESCAPE '^' ORDER BY name",
    "postgresql": "SELECT c.relname AS name FROM pg_catalog.pg_class c WHERE c.relnamespace = current_schema()::regnamespace"
    " AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1",
}
_COLUMNS = {
    "sqlite3": "PRAGMA table_xinfo({})",
    "postgresql": "SELECT a.attname AS name, coalesce(array_position(i.indkey::int2[], a.attnum), -1) + 1 AS pk"
    " FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_index i ON i.indrelid = a.attrelid AND i.indisprimary"
    " WHERE a.attrelid = to_regclass(quote_ident(:name)) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''"
    " ORDER BY a.attnum",
}
_NEEDS = {
    "sqlite3": "PRAGMA foreign_key_list({})",
    "postgresql": "SELECT DISTINCT c.relname AS name FROM pg_catalog.pg_constraint f"
    " JOIN pg_catalog.pg_class c ON c.oid = f.confrelid WHERE f.contype = 'f'"
    " AND f.conrelid = to_regclass(quote_ident(:name))",
}
_SEQUENCES = (
    "SELECT a.attname AS name, pg_get_serial_sequence(quote_ident(:name), a.attname) AS sequence"
    " FROM pg_catalog.pg_attribute a WHERE a.attrelid = to_regclass(quote_ident(:name)) AND a.attnum > 0"
    " AND NOT a.attisdropped AND pg_get_serial_sequence(quote_ident(:name), a.attname) IS NOT NULL"
)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(_quote, names))


async def _ask(db: Database, questions: dict[str, str], name: str) -> list[Any]:
    """Asks the catalog about a table. PRAGMAs take a quoted name, the others a parameter."""
    question = questions[db.engine.name]
    if "{}" in question:
        return await db.fetch_all(question.format(_quote(name)))
    return await db.fetch_all(question, {"name": name})


async def _describe(db: Database, wanted: Sequence[str] | None) -> list[Table]:
    engine = db.engine.name
    names = [str(row["name"]) for row in await db.fetch_all(_TABLES[engine])]
    names = [name for name in names if name != NOTES]
    if wanted is not None:
        known = {name.lower(): name for name in names}
        missing = [name for name in wanted if name.lower() not in known]
        if missing:
            raise errors.ConfigurationError(f"database {db.name!r} has no table {', '.join(map(repr, missing))}")
        names = [known[name.lower()] for name in wanted]
    tables: list[Table] = []
    for name in names:
        rows = await _ask(db, _COLUMNS, name)
        if engine == "sqlite3":
            rows = [row for row in rows if not row["hidden"]]
        key = sorted((row["pk"], str(row["name"])) for row in rows if row["pk"])
        table = Table(name, [str(row["name"]) for row in rows], [column for _, column in key])
        pointed = "table" if engine == "sqlite3" else "name"
        table.needs = {str(row[pointed]) for row in await _ask(db, _NEEDS, name)} - {name}
        tables.append(table)
    return tables


def _in_order(tables: list[Table]) -> list[Table]:
    """Tables behind those that their foreign keys point to; those in a circle come last, for constraints that wait."""
    ordered: list[Table] = []
    left = list(tables)
    while left:
        names = {table.name for table in left}
        free = [table for table in left if not table.needs & names] or left
        ordered += free
        left = [table for table in left if table not in free]
    return ordered


def _paired(source: list[Table], target: list[Table]) -> list[tuple[Table, Table]]:
    """Each table of the source with the target's, in the target's spelling.

    Raises:
        ConfigurationError: A table or a column is missing.
    """
    found = {table.name.lower(): table for table in target}
    missing = [table.name for table in source if table.name.lower() not in found]
    if missing:
        raise errors.ConfigurationError(
            f"the target has no table {', '.join(map(repr, missing))}: create the schema first, or name the tables to copy"
        )
    pairs: list[tuple[Table, Table]] = []
    for table in source:
        other = found[table.name.lower()]
        spelling = {column.lower(): column for column in other.columns}
        lacking = [column for column in table.columns if column.lower() not in spelling]
        if lacking:
            raise errors.ConfigurationError(
                f"table {table.name!r}: the target has no column {', '.join(map(repr, lacking))}"
            )
        columns = [spelling[column.lower()] for column in table.columns]
        pairs.append((table, Table(other.name, columns, other.key, other.needs)))
    return pairs


async def copy(
    source: Database,
    target: Database,
    *,
    tables: Sequence[str] | None = None,
    chunk_size: int = 5000,
    progress: Progress | None = None,
    compare: bool = True,
) -> Report:
    """Copies tables; goes on where an earlier copy between the same databases was interrupted.

    Args:
        source: Where the rows are.
        target: Where they are to be.
        tables: The tables' names; None for all that the source has.
        chunk_size: Rows written in one transaction.
        progress: Called after each chunk.
        compare: Whether both sides are read and compared in the end.

    Raises:
        ConfigurationError: A table or column is missing on the target, or one that has never been copied is not empty there.
        DatabaseError: It cannot be read or written.
    """
    pairs = _paired(await _describe(source, tables), await _describe(target, None))
    await target.execute(
        f"CREATE TABLE IF NOT EXISTS {NOTES} (source TEXT NOT NULL, name TEXT NOT NULL, last TEXT, done INTEGER NOT NULL,"
        " PRIMARY KEY (source, name))"
    )
    order = {table.name: number for number, table in enumerate(_in_order([table for _, table in pairs]))}
    pairs.sort(key=lambda pair: order[pair[1].name])
    report = Report([], [])
    for table, other in pairs:
        await _copy_table(source, target, table, other, chunk_size, progress)
        if target.engine.name == "postgresql":
            await _advance_sequences(target, other)
        report.tables.append(table)
    if compare:
        for table, other in pairs:
            left = await _digest(source, table, progress)
            right = await _digest(target, other, progress)
            table.rows = left[0]
            if left != right:
                report.differing.append(table.name)
    return report


async def _copy_table(
    source: Database, target: Database, table: Table, other: Table, chunk_size: int, progress: Progress | None
) -> None:
    origin = f"{source.engine.name}:{source.name}"
    note = await target.fetch_one(
        f"SELECT last, done FROM {NOTES} WHERE source = :source AND name = :name",
        {"source": origin, "name": other.name},
    )
    if note is None and await target.fetch_value(f"SELECT 1 FROM {_quote(other.name)} LIMIT 1") is not None:
        raise errors.ConfigurationError(
            f"table {other.name!r} is not empty on the target, and no copy has put its rows there: empty it, or leave it out"
        )
    total = int(await source.fetch_value(f"SELECT count(*) FROM {_quote(table.name)}"))
    keep = f"INSERT INTO {NOTES} (source, name, last, done) VALUES (:source, :name, :last, :done) ON CONFLICT (source, name)"
    keep += " DO UPDATE SET last = excluded.last, done = excluded.done"
    marks = ", ".join("?" * len(other.columns))
    overriding = " OVERRIDING SYSTEM VALUE" if target.engine.name == "postgresql" else ""
    insert = f"INSERT INTO {_quote(other.name)} ({_list(other.columns)}){overriding} VALUES ({marks})"
    if not table.key:
        if note is not None and note["done"]:
            return
        async with target.transaction():
            async with source.stream(f"SELECT {_list(table.columns)} FROM {_quote(table.name)}") as rows:
                chunk: list[Any] = []
                async for row in rows:
                    chunk.append(_storable(row))
                    if len(chunk) >= chunk_size:
                        table.copied += (await target.execute_many(insert, chunk)).rowcount
                        chunk.clear()
                table.copied += (await target.execute_many(insert, chunk)).rowcount
            await target.execute(keep, {"source": origin, "name": other.name, "last": None, "done": 1})
        if progress is not None:
            progress("copy", table.name, table.copied, total)
        return
    last = None if note is None or note["last"] is None else _decoded(note["last"])
    done = 0
    if last is not None:
        behind = f"({_list(table.key)}) <= ({', '.join('?' * len(last))})"
        done = int(await source.fetch_value(f"SELECT count(*) FROM {_quote(table.name)} WHERE {behind}", last))
    positions = [table.columns.index(column) for column in table.key]
    while True:
        where = "" if last is None else f" WHERE ({_list(table.key)}) > ({', '.join('?' * len(table.key))})"
        sql = f"SELECT {_list(table.columns)} FROM {_quote(table.name)}{where} ORDER BY {_list(table.key)} LIMIT {chunk_size:d}"
        found = [_storable(row) for row in await source.fetch_all(sql, last)]
        if not found:
            break
        last = [found[-1][position] for position in positions]
        async with target.transaction():
            table.copied += (await target.execute_many(insert, found)).rowcount
            await target.execute(keep, {"source": origin, "name": other.name, "last": _encoded(last), "done": 0})
        done += len(found)
        if progress is not None:
            progress("copy", table.name, done, total)
    if note is None and last is None:
        await target.execute(keep, {"source": origin, "name": other.name, "last": None, "done": 1})


def _storable(row: Any) -> tuple[Any, ...]:
    """A row whose documents are text: the one form that every engine takes."""
    values = tuple(row)
    if any(isinstance(value, (dict, list)) for value in values):
        return tuple(
            json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value for value in values
        )
    return values


def _encoded(key: list[Any]) -> str:
    return json.dumps([{"bytes": part.hex()} if isinstance(part, bytes) else part for part in key], default=str)


def _decoded(text: str) -> list[Any]:
    parts: list[Any] = json.loads(text)
    return [part if not isinstance(part, dict) else bytes.fromhex(str(part["bytes"])) for part in parts]  # pyright: ignore[reportUnknownArgumentType]


async def _advance_sequences(target: Database, table: Table) -> None:
    """The next key that the server makes must be none of those that were copied."""
    for row in await target.fetch_all(_SEQUENCES, {"name": table.name}):
        await target.fetch_value(
            f"SELECT setval(:sequence, (SELECT max({_quote(row['name'])}) FROM {_quote(table.name)}))"
            f" WHERE EXISTS (SELECT 1 FROM {_quote(table.name)})",
            {"sequence": row["sequence"]},
        )


async def _digest(db: Database, table: Table, progress: Progress | None) -> tuple[int, int]:
    """The number of rows, and a sum that changes when any value does; the order of rows does not matter."""
    total = int(await db.fetch_value(f"SELECT count(*) FROM {_quote(table.name)}"))
    count = 0
    digest = 0
    async with db.stream(f"SELECT {_list(table.columns)} FROM {_quote(table.name)}") as rows:
        async for row in rows:
            text = repr([_plain(value) for value in row]).encode("utf-8", "surrogatepass")
            digest = (digest + int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")) % (1 << 128)
            count += 1
            if progress is not None and count % 5000 == 0:
                progress("compare", table.name, count, total)
    if progress is not None:
        progress("compare", table.name, count, total)
    return count, digest


_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")


def _plain(value: Any) -> Any:
    """A value in a form that is the same for both engines."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        if _MOMENT.match(value):
            try:
                return _plain(datetime.fromisoformat(value))
            except ValueError:
                return value
        if value[:1] in ("{", "["):
            try:
                return _plain(json.loads(value))
            except ValueError:
                return value
        return value
    if isinstance(value, datetime):
        return (value if value.tzinfo is None else value.astimezone(UTC)).replace(tzinfo=None).isoformat(" ")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, (float, Decimal)):
        number = float(value)
        return int(value) if abs(number) < 2**63 and number.is_integer() else repr(number)
    if isinstance(value, (bytearray, memoryview)):
        return bytes(cast("Any", value))
    if isinstance(value, (dict, list)):
        document: Any = cast("Any", value)
        return json.dumps(document, sort_keys=True, ensure_ascii=False)
    if value is None or isinstance(value, (int, bytes)):
        return value
    return str(value)


# The command


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
    """Does what the command line says; gives the exit status: 0, 1 if the sides differ, 2 on an error."""
    import anyio  # noqa: PLC0415

    if options.chunk_size < 1:
        print("copy: --chunk-size takes a number from 1 up", file=sys.stderr)
        return 2
    try:
        return anyio.run(_main, options, backend=options.backend)
    except errors.DatabaseError as error:
        print(f"copy: {error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m database.copy SOURCE TARGET`."""
    parser = argparse.ArgumentParser(prog="python -m database.copy", description="Copies tables between databases.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
