"""`import`: a CSV or JSONL file into a table, a row at a time. How values are read stands in `values`.

`--create` guesses types from the first rows. Whatever comes later is held against that guess: a value that the type would
change ends the attempt, the whole file is looked through, and it begins anew with types that keep everything.
"""

from __future__ import annotations

import difflib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.lowlevel

from database import errors
from database.cli.dialects import Column, Dialect, dialect_of
from database.cli.exports import progress
from database.cli.records import Reading, Record, Source
from database.cli.support import Failure, Status, Target, duration, fail, out, out_json, quote, remark, run, utf8
from database.cli.values import kind_in_csv, kind_in_json, suiting
from database.session.database import Database

__all__ = ["import_file"]

CHUNK = 2000
"""Rows sent to the database at a time."""

CACHE = 128 * 1024
"""KiB of page cache for an import."""

SAMPLE = 1000
"""Rows from which the types of a new table are guessed."""


def import_file(
    target: Target, reading: Reading, table: str, *, create: bool, conflict: str, batch: int | None, as_json: bool
) -> None:
    """Reads a file into a table."""
    if conflict not in ("fail", "ignore", "replace"):
        fail(f"--on-conflict is fail, ignore or replace, not {conflict!r}", status=Status.USAGE)
    source = Source(reading)
    began = time.perf_counter()
    result = run(_import, target, source, utf8(table), create, conflict, batch)
    seconds = time.perf_counter() - began
    if as_json:
        out_json({"table": table, **result, "seconds": round(seconds, 3)})
    else:
        left_out = f", {result['read'] - result['stored']:,} left out" if result["read"] != result["stored"] else ""
        rate = result["read"] / seconds if seconds else 0
        out().print(
            f"{table}: {result['stored']:,} rows in {duration(seconds)} ({rate:,.0f} rows/s){left_out}", markup=False
        )


async def _import(
    target: Target, source: Source, table: str, create: bool, conflict: str, batch: int | None
) -> dict[str, int]:
    # Indexes are written to all over the place: with the usual 2 MB of cache, most rows would have pages written twice.
    db = target.open(cache_size=-CACHE)
    kinds: Kinds | None = None
    if create and batch is not None and source.again:
        kinds = await _look_through(source)  # what is committed cannot begin anew
    while True:
        try:
            return await _attempt(db, source, table, create, kinds, conflict, batch)
        except _MisfitError as misfit:
            if kinds is not None or not source.again:
                raise
            remark(f"{misfit}: looking through the whole file for types that keep every value")
            kinds = await _look_through(source)


async def _attempt(
    db: Database, source: Source, table: str, create: bool, kinds: Kinds | None, conflict: str, batch: int | None
) -> dict[str, int]:
    with source.open() as records, progress("import", source.total) as bar:
        task = bar.tasks[0].id
        into: _Inserter | None = None
        done = 0
        try:
            while into is None or into.read > done:
                done = 0 if into is None else into.read
                async with db.transaction():
                    if into is None:
                        into, sample = await _begin(db, source, table, create, kinds, conflict, records)
                        records = itertools.chain(sample, records)  # noqa: PLW2901
                    left = sys.maxsize if batch is None else batch
                    while left and (chunk := list(itertools.islice(records, min(CHUNK, left)))):
                        await into.insert(chunk)
                        left -= len(chunk)
                        bar.update(task, completed=source.position, rows=into.read)
                    await into.end()
        except (Failure, errors.DatabaseError) as error:
            if isinstance(error, _MisfitError) and source.again:
                raise
            status = error.status if isinstance(error, Failure) else Status.FAILED
            raise Failure(f"{error}\n  {_kept(done)}", getattr(error, "hint", ""), status) from error
        except BaseException:
            remark(_kept(done))
            raise
    return {"read": into.read, "stored": into.stored}


def _kept(rows: int) -> str:
    return f"the first {rows:,} rows are stored: they were committed before" if rows else "nothing was stored"


async def _begin(
    db: Database,
    source: Source,
    table: str,
    create: bool,
    kinds: Kinds | None,
    conflict: str,
    records: Iterator[Record],
) -> tuple[_Inserter, list[Record]]:
    """Creates the table if it is to be created; gives what was read for that as well."""
    dialect = dialect_of(db)
    sample: list[Record] = []
    types: dict[str, str] | None = None
    if create:
        if await db.fetch_value(*dialect.named(table)) is not None:
            fail(f"{table!r} exists already", "leave --create out to add the rows to it", Status.USAGE)
        if kinds is None:
            sample = list(itertools.islice(records, SAMPLE))
            kinds = _kinds(sample, source.format)
        if not kinds:
            fail("without a row there is nothing to guess the columns' types from")
        if "" in kinds:
            fail("a column has no name", "give names with --columns", Status.USAGE)
        types = {
            name: suiting(found, plain=source.format == "csv", signed=dialect.signed)
            for name, (_, found) in kinds.items()
        }
        definitions = ", ".join(
            f"{quote(spelling)} {dialect.type(types[name])}".strip() for name, (spelling, _) in kinds.items()
        )
        await db.execute(f"CREATE TABLE {quote(table)} ({definitions})")
    columns = await dialect.columns(db, table)
    if not columns:
        names = [str(row[0]) for row in await db.fetch_all(dialect.tables, ("%",))]
        close = difflib.get_close_matches(table, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else "--create makes it"
        fail(f"there is no table {table!r}", hint, Status.USAGE)
    return _Inserter(db, source, table, columns, dialect, conflict, types), sample


# The types of a new table

Kinds = dict[str, tuple[str, set[str]]]
"""Of each column, by its name in lower case: its name, and the kinds of values that stand in it."""


class _MisfitError(Failure):
    """A value that the guessed type of its column would change."""


def _kinds(records: Iterable[Record], form: str, found: Kinds | None = None) -> Kinds:
    kind_of: Callable[[Any], str] = kind_in_csv if form == "csv" else kind_in_json
    found = {} if found is None else found
    for _, columns, values in records:
        for name, value in zip(columns, values, strict=True):
            spelling = name.strip()
            kinds = found.setdefault(spelling.lower(), (spelling, set()))[1]
            if value is not None:
                kinds.add(kind_of(value))
    return found


async def _look_through(source: Source) -> Kinds:
    """The kinds of all values in a file."""
    found: Kinds = {}
    with source.open() as records:
        while chunk := list(itertools.islice(records, CHUNK)):
            _kinds(chunk, source.format, found)
            await anyio.lowlevel.checkpoint()
    return found


Converters = list[tuple[int, Callable[[Any], Any]]]
"""What to do to the value at an index."""


@dataclass(frozen=True)
class _Way:
    """How rows with the same columns get into the table."""

    sql: str
    converters: Converters
    columns: list[Column]
    copy: str


class _Inserter:
    """Sends records to a table; those with the same columns together."""

    def __init__(
        self,
        db: Database,
        source: Source,
        table: str,
        columns: Sequence[Column],
        dialect: Dialect,
        conflict: str,
        types: dict[str, str] | None,
    ) -> None:
        self.db = db
        self.source = source.name
        self.format = source.format
        """CSV's values are all text; JSON has types of its own."""
        self.table = table
        self.columns = {column.name.lower(): column for column in columns}
        self.dialect = dialect
        self.conflict = conflict
        self.types = types
        """The guessed types, against which all values are held."""
        self.read = 0
        self.stored = 0
        self._known: dict[tuple[str, ...], _Way] = {}

    async def insert(self, records: list[Record]) -> None:
        """Sends some records, in their order.

        Raises:
            Failure: One cannot be stored; says which line.
        """
        if self.types is not None:
            self._hold_against(records, self.types)
        for names, group in itertools.groupby(records, key=lambda record: record[1]):
            way = self._known.get(names) or await self._way(names, records[0][0])
            rows = list(group)
            try:
                async with self.db.transaction():  # a savepoint: what failed can be tried again, row by row
                    parameters = (values for _, values in self._parameters(rows, way.converters))
                    if way.copy:
                        self.stored += await self.db.run(_copy, way.copy, parameters)
                    else:
                        self.stored += (await self.db.execute_many(way.sql, parameters)).rowcount
            except errors.QueryExecutionError:
                await self._find_culprit(way.sql, rows, way.converters)
                raise
        self.read += len(records)

    async def end(self) -> None:
        """Before a commit: what has to follow the rows."""
        given = {column.name: column for way in self._known.values() for column in way.columns}
        await self.dialect.stored(self.db, self.table, given.values())

    def _hold_against(self, records: list[Record], types: dict[str, str]) -> None:
        plain, signed = self.format == "csv", self.dialect.signed
        for record in records:
            for name, (spelling, kinds) in _kinds([record], self.format).items():
                kind = types.get(name)
                if kind is None:
                    what = f"column {spelling!r} does not occur in the first {SAMPLE:,} rows"
                elif kind and kinds and suiting({*kinds, *_HELD[kind]}, plain=plain, signed=signed) != kind:
                    what = f"column {spelling!r} is {kind} by its first {SAMPLE:,} rows, which would change this value"
                else:
                    continue
                raise _MisfitError(
                    f"{self.source}:{record[0]}: {what}", "create the table first, and import without --create"
                )

    async def _find_culprit(self, sql: str, rows: list[Record], converters: Converters) -> None:
        """Sends rows one by one until the one fails that made all fail; the caller's transaction is lost anyway."""
        for line, values in self._parameters(rows, converters):
            try:
                await self.db.execute(sql, values)
            except errors.QueryExecutionError as error:
                code = f" [{error.code_name}]" if error.code_name else ""
                raise Failure(f"{self.source}:{line}: {error.args[0]}{code}") from error

    @staticmethod
    def _parameters(group: Iterable[Record], converters: Converters) -> Iterator[tuple[int, Sequence[Any]]]:
        for line, _, values in group:
            if converters:
                values = list(values)  # noqa: PLW2901
                for index, convert in converters:
                    value = values[index]
                    if value is not None:
                        values[index] = convert(value)
            yield line, values

    async def _way(self, names: tuple[str, ...], line: int) -> _Way:
        found: list[Column] = []
        for name in names:
            column = self.columns.get(name.strip().lower())
            if column is None:
                close = difflib.get_close_matches(name.lower(), self.columns, 1)
                known = ", ".join(each.name for each in self.columns.values())
                hint = f"did you mean {self.columns[close[0]].name!r}?" if close else f"it has {known}"
                raise Failure(f"{self.source}:{line}: table {self.table!r} has no column {name!r}", hint, Status.USAGE)
            if column.generated:
                raise Failure(f"column {column.name!r} is generated, and cannot be given a value", status=Status.USAGE)
            if column in found:
                raise Failure(f"{self.source}:{line}: column {column.name!r} stands there twice", status=Status.USAGE)
            found.append(column)
        sql = self.dialect.insert(self.table, list(self.columns.values()), found, self.conflict)
        converters: Converters = []
        for index, column in enumerate(found):
            convert = self.dialect.converter(column, plain=self.format == "csv")
            if convert is not None:
                converters.append((index, convert))
        copy = await self.dialect.bulk(self.db, self.table, found, self.conflict)
        self._known[names] = _Way(sql, converters, found, copy)
        return self._known[names]


def _copy(connection: Any, sql: str, rows: Iterable[Sequence[Any]]) -> int:
    """Sends rows by COPY; on the connection's thread."""
    with connection.cursor() as cursor:
        with cursor.copy(sql) as copy:
            for row in rows:
                copy.write_row(row)
        return int(cursor.rowcount)


_HELD: dict[str, set[str]] = {
    "INTEGER": {"INTEGER"},
    "REAL": {"REAL"},
    "BLOB": {"BLOB"},
    "NUMERIC": {"INTEGER", "REAL"},
    "TEXT": {"TEXT"},
}
"""Kinds that a guessed type stands for."""
