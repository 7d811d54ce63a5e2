"""The copy itself: what there is, in which order, chunk by chunk, and whether both sides are the same in the end.

Everything is read from one snapshot of the source, so no row can refer to one that was written after its table had been
read. A later run, which goes on behind the last key, first looks whether rows have come in before that key; then it goes
through the table once more from the start and puts in what is missing. Otherwise their children would have no parents.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from database import errors
from database.copy.columns import Column, Form, Way, form_of, normalised, way
from database.engine.migrations import TABLE as MIGRATIONS
from database.engine.statement import quoted
from database.session.database import Database

__all__ = ["NOTES", "Progress", "Report", "Table", "copy"]

NOTES = "_database_copy"
"""The table of the target that says how far the copy has come. It stays, and may be dropped when all is done."""

COMPARED = 2000
"""Rows that are compared at a time."""

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
    """Tables that its foreign keys point to, itself among them, in lower case."""
    copied: int = 0
    """Rows copied by this run."""
    rows: int = 0
    """Rows on the source, when it has been compared."""
    described: list[Column] = field(default_factory=list[Column], repr=False)
    """What the catalog says of the columns, in their order."""


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
    "postgresql": "SELECT a.attname AS name, format_type(a.atttypid, -1) AS type,"
    " coalesce(array_position(i.indkey::int2[], a.attnum), -1) + 1 AS pk"
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
_IMPATIENT = (
    "SELECT f.conname AS name FROM pg_catalog.pg_constraint f JOIN pg_catalog.pg_class c ON c.oid = f.confrelid"
    " WHERE f.contype = 'f' AND NOT f.condeferrable AND f.conparentid = 0"
    " AND f.conrelid = to_regclass(quote_ident(:name)) AND lower(c.relname) = ANY(:others)"
)
"""Foreign keys that are looked at with each statement."""
_SEQUENCES = (
    "SELECT a.attname AS name, s.seqrelid::regclass::text AS sequence, s.seqincrement AS step, s.seqmin AS least,"
    " s.seqmax AS most FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_sequence s"
    " ON s.seqrelid = CAST(pg_get_serial_sequence(quote_ident(:name), a.attname) AS regclass)"
    " WHERE a.attrelid = to_regclass(quote_ident(:name)) AND a.attnum > 0 AND NOT a.attisdropped"
)


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(quoted, names))


async def _ask(db: Database, questions: dict[str, str], name: str) -> list[Any]:
    """Asks the catalog about a table. PRAGMAs take a quoted name, the others a parameter."""
    question = questions[db.engine.name]
    if "{}" in question:
        return await db.fetch_all(question.format(quoted(name)))
    return await db.fetch_all(question, {"name": name})


async def _describe(db: Database, wanted: Sequence[str] | None) -> list[Table]:
    engine = db.engine.name
    names = [str(row["name"]) for row in await db.fetch_all(_TABLES[engine])]
    names = [name for name in names if name != NOTES]
    if wanted is None:  # each database has a record of its own of the migrations that it has had
        names = [name for name in names if name != MIGRATIONS]
    else:
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
        table.described = [Column(str(row["name"]), _type(engine, row["type"]), engine) for row in rows]
        pointed = "table" if engine == "sqlite3" else "name"
        table.needs = {str(row[pointed]).lower() for row in await _ask(db, _NEEDS, name)}
        tables.append(table)
    return tables


def _type(engine: str, declared: Any) -> str:
    return str(declared) if engine == "postgresql" else str(declared or "").upper()


def _in_order(tables: list[Table]) -> list[list[Table]]:
    """Groups of tables, each behind those that its foreign keys point to. A group of several is a circle."""
    needs = {table.name.lower(): set(table.needs) for table in tables}
    for between, behind in needs.items():  # what each needs in the end
        for wanted in needs.values():
            if between in wanted:
                wanted.update(behind)
    groups: list[list[Table]] = []
    left = list(tables)
    while left:
        names = {table.name.lower() for table in left}
        for table in left:
            name = table.name.lower()
            circle = [
                each
                for each in left
                if each is table or (each.name.lower() in needs[name] and name in needs[each.name.lower()])
            ]
            if not needs[name] & names - {each.name.lower() for each in circle}:
                groups.append(circle)
                left = [each for each in left if each not in circle]
                break
    return groups


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
        described = {column.name: column for column in other.described}
        chosen = [described[column] for column in columns]
        pairs.append((table, Table(other.name, columns, other.key, other.needs, described=chosen)))
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
    groups = _in_order([table for _, table in pairs])
    order = {table.name: number for number, table in enumerate(itertools.chain.from_iterable(groups))}
    pairs.sort(key=lambda pair: order[pair[1].name])
    report = Report([], [])
    coming = iter(pairs)
    async with source.transaction(readonly=True):
        for group in groups:
            async with _waiting(target, group):
                for table, other in itertools.islice(coming, len(group)):
                    await _Copying(source, target, table, other, chunk_size, progress).run()
                    if target.engine.name == "postgresql":
                        await _advance_sequences(target, other)
                    report.tables.append(table)
    if compare:  # with what is there now: what has been written since then is missing, and that is to be seen
        for table, other in pairs:
            columns = list(zip(table.described, other.described, strict=True))
            server = target if target.engine.name == "postgresql" else source
            here = [form_of(one, another, source=True) for one, another in columns]
            there = [form_of(another, one, source=False) for one, another in columns]
            left = await _digest(source, server, table, here, progress)
            right = await _digest(target, server, other, there, progress)
            table.rows = left[0]
            if left != right:
                report.differing.append(table.name)
    return report


@contextlib.asynccontextmanager
async def _waiting(target: Database, group: list[Table]) -> AsyncGenerator[None]:
    """Around the copying of tables that refer to each other, or to themselves: one transaction, so that keys may wait."""
    names = {table.name.lower() for table in group}
    if not any(table.needs & names for table in group):
        yield
        return
    async with target.transaction():
        if target.engine.name == "sqlite3":
            await target.execute("PRAGMA defer_foreign_keys = ON")
            yield
            return
        made: list[tuple[str, str]] = []
        for table in group:
            for row in await target.fetch_all(_IMPATIENT, {"name": table.name, "others": list(names)}):
                alter = f"ALTER TABLE {quoted(table.name)} ALTER CONSTRAINT {quoted(row['name'])} DEFERRABLE"
                with contextlib.suppress(errors.QueryExecutionError):  # somebody else's table: its rows may be in order
                    async with target.transaction():
                        await target.execute(alter)
                    made.append((table.name, row["name"]))
        await target.execute("SET CONSTRAINTS ALL DEFERRED")
        yield
        await target.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for name, constraint in made:
            await target.execute(f"ALTER TABLE {quoted(name)} ALTER CONSTRAINT {quoted(constraint)} NOT DEFERRABLE")


class _Copying:
    """One table on its way."""

    def __init__(
        self, source: Database, target: Database, table: Table, other: Table, chunk_size: int, progress: Progress | None
    ) -> None:
        self.source = source
        self.target = target
        self.table = table
        self.other = other
        self.chunk_size = chunk_size
        self.progress = progress
        self.origin = f"{source.engine.name}:{source.name}"
        self.ways: list[Way] = [
            way(one, another) for one, another in zip(table.described, other.described, strict=True)
        ]
        self.reads = ", ".join(each.read for each in self.ways)
        self.changes = [(number, each.convert) for number, each in enumerate(self.ways) if each.convert is not None]
        marks = ", ".join(each.mark for each in self.ways)
        overriding = " OVERRIDING SYSTEM VALUE" if target.engine.name == "postgresql" else ""
        self.insert = f"INSERT INTO {quoted(other.name)} ({_list(other.columns)}){overriding} VALUES ({marks})"
        self.total = 0

    async def run(self) -> None:
        """Copies what is not there yet."""
        note = await self.target.fetch_one(
            f"SELECT last, done FROM {NOTES} WHERE source = :source AND name = :name",
            {"source": self.origin, "name": self.other.name},
        )
        there = int(await self.target.fetch_value(f"SELECT count(*) FROM {quoted(self.other.name)}"))
        if note is None and there:
            raise errors.ConfigurationError(
                f"table {self.other.name!r} is not empty on the target, and no copy has put its rows there: empty it, or leave"
                " it out"
            )
        self.total = int(await self.source.fetch_value(f"SELECT count(*) FROM {quoted(self.table.name)}"))
        if not self.table.key or await self._has_null_key():
            if note is None or not note["done"]:
                await self._all_at_once()
            return
        last: list[Any] | None = None if note is None or note["last"] is None else _decoded(note["last"])
        done = 0
        if last is not None:
            done = int(
                await self.source.fetch_value(
                    f"SELECT count(*) FROM {quoted(self.table.name)} WHERE {self._compared('<=')}", last
                )
            )
            if done != there:  # rows have come, or gone, before the last key
                await self._by_key(None, 0, f"{self.insert} ON CONFLICT DO NOTHING", until=last)
        last = await self._by_key(last, done, self.insert)
        if note is None and last is None:
            await self._note(None, done=1)

    async def _by_key(
        self, last: list[Any] | None, done: int, insert: str, *, until: list[Any] | None = None
    ) -> list[Any] | None:
        """Copies the rows behind a key, in the key's order, each chunk with its note; gives the last key."""
        parts = len(self.table.key)
        keys = f", {', '.join(self._key_as_read())}"
        order = ", ".join(f"this.{quoted(column)}" for column in self.table.key)
        while True:
            conditions = [self._compared(">")] if last is not None else []
            if until is not None:
                conditions.append(self._compared("<="))
            where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
            rows = await self.source.fetch_all(
                f"SELECT {self.reads}{keys} FROM {quoted(self.table.name)} AS this{where} ORDER BY {order}"
                f" LIMIT {self.chunk_size:d}",
                [*(last or ()), *(until or ())],
            )
            if not rows:
                return last
            found = [tuple(row) for row in rows]
            last = list(found[-1][-parts:])
            await self._store(insert, [self._prepared(row[:-parts]) for row in found], last if until is None else None)
            done += len(found)
            if self.progress is not None:
                self.progress("copy", self.table.name, done, self.total)

    async def _store(self, insert: str, rows: list[Any], last: list[Any] | None) -> None:
        async with self.target.transaction():
            self.table.copied += (await self.target.execute_many(insert, rows)).rowcount
            if last is not None:
                await self._note(_encoded(last), done=0)

    async def _all_at_once(self) -> None:
        """Copies a table without a key: there is nothing by which one could go on."""
        async with self.target.transaction():
            async with self.source.stream(f"SELECT {self.reads} FROM {quoted(self.table.name)}") as rows:
                chunk: list[Any] = []
                async for row in rows:
                    chunk.append(self._prepared(tuple(row)))
                    if len(chunk) >= self.chunk_size:
                        self.table.copied += (await self.target.execute_many(self.insert, chunk)).rowcount
                        chunk.clear()
            if chunk:
                self.table.copied += (await self.target.execute_many(self.insert, chunk)).rowcount
            await self._note(None, done=1)
        if self.progress is not None:
            self.progress("copy", self.table.name, self.table.copied, self.total)

    async def _note(self, last: str | None, *, done: int) -> None:
        await self.target.execute(
            f"INSERT INTO {NOTES} (source, name, last, done) VALUES (:source, :name, :last, :done)"
            " ON CONFLICT (source, name) DO UPDATE SET last = excluded.last, done = excluded.done",
            {"source": self.origin, "name": self.other.name, "last": last, "done": done},
        )

    async def _has_null_key(self) -> bool:
        """SQLite lets a primary key be NULL, and nothing is greater than that."""
        if self.source.engine.name != "sqlite3":
            return False
        missing = " OR ".join(f"{quoted(column)} IS NULL" for column in self.table.key)
        return (
            await self.source.fetch_value(f"SELECT 1 FROM {quoted(self.table.name)} WHERE {missing} LIMIT 1")
            is not None
        )

    def _prepared(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.changes:
            return row
        values = list(row)
        for number, convert in self.changes:
            try:
                values[number] = convert(values[number])
            except errors.DatabaseError as error:
                column = self.table.columns[number]
                raise errors.DatabaseError(f"table {self.table.name!r}, column {column!r}: {error}") from None
        return tuple(values)

    def _key_as_read(self) -> list[str]:
        """PostgreSQL's keys as text, from which each comes back exactly; SQLite's as they are."""
        if self.source.engine.name == "postgresql":
            return [f"CAST({quoted(column)} AS text)" for column in self.table.key]
        return [quoted(column) for column in self.table.key]

    def _compared(self, operator: str) -> str:
        types = {column.name: column.type for column in self.table.described}
        if self.source.engine.name == "postgresql":
            marks = ", ".join(f"CAST(CAST(? AS text) AS {types[column]})" for column in self.table.key)
        else:
            marks = ", ".join("?" * len(self.table.key))
        return f"({_list(self.table.key)}) {operator} ({marks})"


def _encoded(key: list[Any]) -> str:
    return json.dumps([{"bytes": part.hex()} if isinstance(part, bytes) else part for part in key])


def _decoded(text: str) -> list[Any]:
    parts: list[Any] = json.loads(text)
    return [part if not isinstance(part, dict) else bytes.fromhex(str(part["bytes"])) for part in parts]  # pyright: ignore[reportUnknownArgumentType]


async def _advance_sequences(target: Database, table: Table) -> None:
    """The next key that the server makes must be none of those that were copied, and one that the sequence may have."""
    for row in await target.fetch_all(_SEQUENCES, {"name": table.name}):
        furthest = "max" if row["step"] > 0 else "min"
        last = await target.fetch_value(f"SELECT {furthest}({quoted(row['name'])}) FROM {quoted(table.name)}")
        if last is not None and row["least"] <= last <= row["most"]:
            await target.fetch_value(
                "SELECT setval(CAST(CAST(:sequence AS text) AS regclass), :last)",
                {"sequence": row["sequence"], "last": int(last)},
            )


async def _digest(
    db: Database, server: Database, table: Table, forms: list[Form], progress: Progress | None
) -> tuple[int, int]:
    """The number of rows, and a sum that changes when any value does; the order of rows does not matter.

    Args:
        db: Where the table is.
        server: Which of the two is PostgreSQL, if one of them is: it knows how its types are written.
        table: What to read.
        forms: The form of each column.
        progress: Called now and then.
    """
    total = int(await db.fetch_value(f"SELECT count(*) FROM {quoted(table.name)}"))
    count = 0
    digest = 0
    reads = ", ".join(form.read for form in forms)
    chunk: list[tuple[Any, ...]] = []
    async with db.stream(f"SELECT {reads} FROM {quoted(table.name)}") as rows:
        async for row in rows:
            chunk.append(tuple(row))
            if len(chunk) == COMPARED:
                digest += await _sum(server, forms, chunk)
                count += len(chunk)
                chunk.clear()
                if progress is not None:
                    progress("compare", table.name, count, total)
    digest += await _sum(server, forms, chunk)
    count += len(chunk)
    if progress is not None:
        progress("compare", table.name, count, total)
    return count, digest % (1 << 128)


async def _sum(server: Database, forms: list[Form], rows: list[tuple[Any, ...]]) -> int:
    columns: list[Sequence[Any]] = []
    for form, values in zip(forms, zip(*rows, strict=True), strict=False):
        column: Sequence[Any] = values if form.convert is None else list(map(form.convert, values))
        if form.ask is not None:
            column = await normalised(server, form.ask, column)
        columns.append(column)
    total = 0
    for row in zip(*columns, strict=True):
        text = repr(row).encode("utf-8", "surrogatepass")
        total += int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
    return total
