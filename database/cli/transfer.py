r"""`import` and `export`: CSV and JSONL, a row at a time, however large the file.

How values travel
    SQLite      CSV                          JSONL
    NULL        what --null says (nothing)   null
    INTEGER     digits                       a number
    REAL        the shortest digits that     a number; infinity is 1e999
                give the same value;
                infinity is 9e999
    TEXT        the text                     a string
    BLOB        \x and hexadecimal digits    {"$base64": "…"}

The way back: CSV fields are text, and SQLite turns text into a number where the column's type asks for numbers and the
text is one. `\x…` becomes a BLOB in a column whose type is BLOB. JSON's true and false become 1 and 0; its arrays and
other objects are stored as JSON text. In CSV, NULL and the empty text look alike unless --null tells them apart.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import difflib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from database import errors
from database.cli.support import Failure, Status, Target, duration, err, fail, out, out_json, quote, remark, run
from database.session.database import Database

__all__ = ["Reading", "Writing", "export_query", "import_file"]

CHUNK = 2000
"""Rows sent to the database at a time."""

CACHE = 128 * 1024
"""KiB of page cache for an import."""

SAMPLE = 1000
"""Rows from which the types of a new table are guessed."""

_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True)
class Reading:
    """How a file is to be read."""

    file: str
    format: str | None = None
    null: str = ""
    delimiter: str = ","
    encoding: str = "utf-8-sig"
    columns: list[str] | None = None


@dataclass(frozen=True)
class Writing:
    """How a file is to be written."""

    output: str = "-"
    format: str | None = None
    null: str = ""
    delimiter: str = ","
    force: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the table that rows go into."""

    name: str
    type: str
    generated: bool

    @property
    def convert(self) -> Callable[[str], Any] | None:
        """What is done to CSV's text before SQLite gets it (sqlite.org/datatype3.html#determination_of_column_affinity)."""
        kind = self.type.upper()
        if "INT" in kind:
            return _real
        if not kind or kind == "ANY" or any(word in kind for word in ("CHAR", "CLOB", "TEXT")):
            return None
        return _blob if "BLOB" in kind else _real


_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def _real(text: str) -> Any:
    """A float, read exactly: SQLite's own conversion is off by a bit where exponents are large."""
    if ("." in text or "e" in text or "E" in text) and _REAL.fullmatch(text):
        return float(text)
    return text


def _blob(text: str) -> Any:
    if text.startswith("\\x"):
        try:
            return bytes.fromhex(text[2:])
        except ValueError:
            pass  # text that only looks like it
    return text


def _format(name: str, given: str | None, otherwise: str | None = None) -> str:
    if given is not None:
        if given.lower() not in ("csv", "jsonl"):
            fail(f"--format is csv or jsonl, not {given!r}", status=Status.USAGE)
        return given.lower()
    found = _FORMATS.get(Path(name).suffix.lower(), otherwise)
    if found is None:
        fail(f"{name}: neither .csv nor .jsonl", "say what it is with --format", Status.USAGE)
    return found


def _check_delimiter(delimiter: str) -> str:
    found = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
    if len(found) != 1:
        fail(f"--delimiter is one character, or tab, not {delimiter!r}", status=Status.USAGE)
    return found


# --- Reading ------------------------------------------------------------------------------------------------

Record = tuple[int, tuple[str, ...], Sequence[Any]]
"""Line number, columns, values."""


class _Source:
    """A file's records, one by one, and how far it has been read."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.name = "standard input" if reading.file == "-" else reading.file
        self.format = _format(reading.file, reading.format, "csv" if reading.file == "-" else None)
        self.delimiter = _check_delimiter(reading.delimiter)
        self.total: int | None = None
        self._raw: IO[bytes] | None = None

    @contextmanager
    def open(self) -> Generator[Iterator[Record]]:
        try:
            codecs.lookup(self.reading.encoding)
        except LookupError:
            fail(f"--encoding {self.reading.encoding!r} is unknown", status=Status.USAGE)
        if self.reading.file == "-":
            self._raw = sys.stdin.buffer
        else:
            path = Path(self.reading.file).expanduser()
            try:
                self._raw = path.open("rb")
            except OSError as error:
                fail(f"{self.name}: {error.strerror}", status=Status.USAGE)
            self.total = path.stat().st_size
        text = io.TextIOWrapper(cast("Any", self._raw), self.reading.encoding, newline="")
        try:
            yield self._records(text)
        finally:
            binary = text.detach()
            if self.reading.file != "-":
                binary.close()

    @property
    def position(self) -> int:
        """Bytes read so far."""
        try:
            return 0 if self._raw is None or self.total is None else self._raw.tell()
        except (OSError, ValueError):
            return 0

    def _records(self, text: IO[str]) -> Iterator[Record]:
        records = self._csv(text) if self.format == "csv" else self._jsonl(text)
        try:
            yield from records
        except UnicodeDecodeError as error:
            fail(f"{self.name}: not {error.encoding}: {error.reason}", "say with --encoding what it is")
        except csv.Error as error:
            fail(f"{self.name}: not CSV: {error}")

    def _csv(self, text: IO[str]) -> Iterator[Record]:
        csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
        reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        names = self.reading.columns
        if names is None:
            names = next(reader, None)
            if names is None:
                fail(f"{self.name}: empty: a header with the columns' names comes first")
        columns = tuple(names)
        null = self.reading.null
        count = len(columns)
        for row in reader:
            if len(row) != count:
                if not row:  # an empty line
                    continue
                fail(f"{self.name}:{reader.line_num}: {len(row)} fields, but there are {count} columns")
            yield reader.line_num, columns, [None if value == null else value for value in row]

    def _jsonl(self, text: IO[str]) -> Iterator[Record]:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                fail(f"{self.name}:{number}: not JSON: {error}")
            if not isinstance(record, dict):
                fail(f'{self.name}:{number}: each line has to be an object: {{"column": value, …}}')
            try:
                values = [_from_json(value) for value in cast("dict[str, Any]", record).values()]
            except ValueError as error:
                fail(f"{self.name}:{number}: {error}")
            yield number, tuple(cast("dict[str, Any]", record)), values


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        record = cast("dict[str, Any]", value)
        if len(record) == 1 and isinstance(record.get("$base64"), str):
            try:
                return base64.b64decode(record["$base64"], validate=True)
            except binascii.Error as error:
                raise ValueError(f"$base64: {error}") from None
        return json.dumps(record, ensure_ascii=False)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return value


# --- Import -------------------------------------------------------------------------------------------------


def import_file(
    target: Target, reading: Reading, table: str, *, create: bool, conflict: str, batch: int | None, as_json: bool
) -> None:
    """Reads a file into a table."""
    verbs = {"fail": "INSERT", "ignore": "INSERT OR IGNORE", "replace": "INSERT OR REPLACE"}
    if conflict not in verbs:
        fail(f"--on-conflict is fail, ignore or replace, not {conflict!r}", status=Status.USAGE)
    source = _Source(reading)
    began = time.perf_counter()
    result = run(_import, target, source, table, create, verbs[conflict], batch)
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
    target: Target, source: _Source, table: str, create: bool, verb: str, batch: int | None
) -> dict[str, int]:
    # Indexes are written to all over the place: with the usual 2 MB of cache, most rows would have pages written twice.
    db = target.open(only="sqlite3", cache_size=-CACHE)
    with source.open() as records, _progress("import", source.total) as bar:
        task = bar.tasks[0].id
        into: _Inserter | None = None
        done = 0
        try:
            while into is None or into.read > done:
                done = 0 if into is None else into.read
                async with db.transaction():
                    if into is None:
                        sample = await _create_table(db, table, records) if create else []
                        into = _Inserter(db, source, table, await _columns(db, table), verb)
                        records = itertools.chain(sample, records)  # noqa: PLW2901
                    left = sys.maxsize if batch is None else batch
                    while left and (chunk := list(itertools.islice(records, min(CHUNK, left)))):
                        await into.insert(chunk)
                        left -= len(chunk)
                        bar.update(task, completed=source.position, rows=into.read)
        except (Failure, errors.DatabaseError) as error:
            status = error.status if isinstance(error, Failure) else Status.FAILED
            raise Failure(f"{error}\n  {_kept(done)}", getattr(error, "hint", ""), status) from error
        except BaseException:
            remark(_kept(done))
            raise
    return {"read": into.read, "stored": into.stored}


def _kept(rows: int) -> str:
    return f"the first {rows:,} rows are stored, for they were committed before" if rows else "nothing was stored"


async def _columns(db: Database, table: str) -> dict[str, Column]:
    """The table's columns by their names in lower case."""
    rows = await db.fetch_all("SELECT name, type, hidden FROM pragma_table_xinfo(?)", (table,))
    if not rows:
        names = [row[0] for row in await db.fetch_all("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        close = difflib.get_close_matches(table, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else "--create makes it"
        fail(f"there is no table {table!r}", hint, Status.USAGE)
    return {name.lower(): Column(name, kind, hidden in (2, 3)) for name, kind, hidden in (tuple(row) for row in rows)}


Converters = list[tuple[int, Callable[[str], Any]]]
"""What to do to the value at an index, where it is text."""


class _Inserter:
    """Sends records to a table; those with the same columns together."""

    def __init__(self, db: Database, source: _Source, table: str, columns: dict[str, Column], verb: str) -> None:
        self.db = db
        self.source = source.name
        self.plain = source.format == "csv"
        """Whether all values are text; JSON has types of its own."""
        self.table = table
        self.columns = columns
        self.verb = verb
        self.read = 0
        self.stored = 0
        self._known: dict[tuple[str, ...], tuple[str, Converters]] = {}

    async def insert(self, records: list[Record]) -> None:
        """Sends some records, in their order.

        Raises:
            Failure: One cannot be stored; says which line.
        """
        for names, group in itertools.groupby(records, key=lambda record: record[1]):
            sql, converters = self._known.get(names) or self._statement(names, records[0][0])
            rows = list(group)
            try:
                async with self.db.transaction():  # a savepoint: what failed can be tried again, row by row
                    parameters = (values for _, values in self._parameters(rows, converters))
                    self.stored += (await self.db.execute_many(sql, parameters)).rowcount
            except errors.QueryExecutionError:
                await self._find_culprit(sql, rows, converters)
                raise
        self.read += len(records)

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
                    if type(value) is str:
                        values[index] = convert(value)
            yield line, values

    def _statement(self, names: tuple[str, ...], line: int) -> tuple[str, Converters]:
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
        if found:
            columns = ", ".join(quote(column.name) for column in found)
            what = f"({columns}) VALUES ({', '.join('?' * len(found))})"
        else:
            what = "DEFAULT VALUES"
        sql = f"{self.verb} INTO {quote(self.table)} {what}"
        converters: Converters = []
        if self.plain:
            converters = [(index, column.convert) for index, column in enumerate(found) if column.convert is not None]
        self._known[names] = sql, converters
        return self._known[names]


async def _create_table(db: Database, table: str, records: Iterator[Record]) -> list[Record]:
    """Creates the table by the first records; gives them back."""
    sample = list(itertools.islice(records, SAMPLE))
    if not sample:
        fail("without a row there is nothing to guess the columns' types from")
    names: dict[str, list[Any]] = {}
    for _, columns, values in sample:
        for name, value in zip(columns, values, strict=True):
            names.setdefault(name.strip(), []).append(value)
    if any(not name for name in names):
        fail("a column has no name", "give names with --columns", Status.USAGE)
    definitions = ", ".join(f"{quote(name)} {_guess(values)}" for name, values in names.items())
    if await db.fetch_value("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)):
        fail(f"{table!r} exists already", "leave --create out to add the rows to it", Status.USAGE)
    await db.execute(f"CREATE TABLE {quote(table)} ({definitions})")
    return sample


def _guess(values: list[Any]) -> str:
    """A type that holds all of the values as they are."""
    kinds = {_kind(value) for value in values if value is not None}
    if kinds <= {"INTEGER"}:
        return "INTEGER" if kinds else "TEXT"
    if kinds <= {"INTEGER", "REAL"}:
        return "REAL"
    return "BLOB" if kinds == {"BLOB"} else "TEXT"


def _kind(value: Any) -> str:
    if isinstance(value, (bool, int)):
        return "INTEGER"
    if isinstance(value, float):
        return "REAL"
    if isinstance(value, bytes):
        return "BLOB"
    text = str(value)
    if text.startswith("\\x"):
        try:
            bytes.fromhex(text[2:])
            return "BLOB"
        except ValueError:
            return "TEXT"
    try:
        number = int(text)
    except ValueError:
        pass
    else:
        # What a number would lose has to stay text: leading zeros, plus signs, underscores, more than 64 bits.
        return "INTEGER" if str(number) == text and -(2**63) <= number < 2**63 else "TEXT"
    try:
        float(text)
    except ValueError:
        return "TEXT"
    plain = text.lower().lstrip("-")
    leading_zero = len(plain) > 1 and plain[0] == "0" and plain[1] != "."
    return "REAL" if plain[:1].isdigit() and not leading_zero and "_" not in plain else "TEXT"


# --- Export -------------------------------------------------------------------------------------------------


def export_query(target: Target, query: str, params: list[str], writing: Writing) -> None:
    """Writes a query's rows."""
    values: dict[str, Any] = {}
    for each in params:
        name, mark, value = each.partition("=")
        if not mark or not name.isidentifier():
            fail(f"--param takes NAME=VALUE, not {each!r}", status=Status.USAGE)
        values[name] = _number(value)
    kind = _format(writing.output, writing.format, "csv")
    delimiter = _check_delimiter(writing.delimiter)
    if writing.output == "-" and isinstance(stdout := cast("Any", sys.stdout), io.TextIOWrapper):
        stdout.reconfigure(encoding="utf-8", newline="")  # whatever the terminal speaks, the file is UTF-8
    began = time.perf_counter()
    rows = run(_export, target, query, values, writing, kind, delimiter)
    seconds = time.perf_counter() - began
    if writing.output != "-" or err().is_terminal:
        place = "" if writing.output == "-" else f"{writing.output}: "
        remark(f"{place}{rows:,} rows in {duration(seconds)}")


def _number(text: str) -> Any:
    """A parameter's value: a number where it is written as one, else text."""
    kind = _kind(text)
    return int(text) if kind == "INTEGER" else float(text) if kind == "REAL" else text


async def _export(
    target: Target, query: str, params: dict[str, Any], writing: Writing, kind: str, delimiter: str
) -> int:
    db = target.open(only="sqlite3")
    total: int | None = None
    table = await db.fetch_value(
        "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE", (query,)
    )
    if table is not None:
        query = f"SELECT * FROM {quote(table)}"  # noqa: S608  - quoted
        if err().is_terminal:
            total = await db.fetch_value(f"SELECT count(*) FROM {quote(table)}")  # noqa: S608  - quoted
    elif len(query.split()) == 1:
        fail(f"there is no table {query!r}", "or give a whole SELECT, in quotes", Status.USAGE)
    with _output(writing) as file, _progress("export", None, total) as bar:
        task = bar.tasks[0].id
        count = 0
        async with db.stream(query, params or None, chunk_size=CHUNK) as rows:
            write: Any = None
            pending: list[Any] = []
            async for row in rows:
                if write is None:
                    names = list(row.keys())
                    write = (
                        _csv_writer(file, names, writing.null, delimiter)
                        if kind == "csv"
                        else _json_writer(file, names)
                    )
                pending.append(row)
                if len(pending) == CHUNK:
                    write(pending)
                    count += len(pending)
                    pending.clear()
                    bar.update(task, completed=count, rows=count)
            if write is not None:
                write(pending)
                count += len(pending)
        if write is None and kind == "csv":
            await _header(db, query, params, file, writing.null, delimiter)
        bar.update(task, completed=count, rows=count)
    return count


async def _header(db: Database, query: str, params: dict[str, Any], file: IO[str], null: str, delimiter: str) -> None:
    """The header of a result without rows: a row brings its names with it, and there is none."""

    def names(connection: Any) -> list[str]:
        cursor = connection.execute(query, params)
        return [column[0] for column in cursor.description]

    _csv_writer(file, await db.run(names, readonly=True), null, delimiter)


class _Lines:
    """What a `csv.writer` writes to, which quotes the characters of its line end: it gets both, the file only one."""

    def __init__(self, file: IO[str]) -> None:
        self._write = file.write

    def write(self, line: str) -> int:
        return self._write(line[:-2] + "\n")


def _csv_writer(file: IO[str], names: list[str], null: str, delimiter: str) -> Any:
    writer = csv.writer(_Lines(file), delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)

    def show(value: Any) -> Any:
        if value is None:
            return null
        if type(value) is bytes:
            return f"\\x{value.hex()}"
        if value in (math.inf, -math.inf):
            return "9e999" if value > 0 else "-9e999"  # which SQLite reads as infinity; `inf` would be text
        return value

    def write(rows: list[Any]) -> None:
        writer.writerows([show(value) for value in row] for row in rows)

    return write


def _json_writer(file: IO[str], names: list[str]) -> Any:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        fail(f"two columns are named {twice!r}", "give one of them another name: SELECT … AS …", Status.USAGE)

    labels = [f"{json.dumps(name, ensure_ascii=False)}: " for name in names]

    def show(value: Any) -> str:
        if type(value) is bytes:
            value = {"$base64": base64.b64encode(value).decode()}
        elif value in (math.inf, -math.inf):
            return "1e999" if value > 0 else "-1e999"  # JSON has no infinity, but whoever reads this gets one
        return json.dumps(value, ensure_ascii=False)

    def write(rows: list[Any]) -> None:
        for row in rows:
            file.write("{" + ", ".join(label + show(value) for label, value in zip(labels, row, strict=True)) + "}\n")

    return write


@contextmanager
def _output(writing: Writing) -> Generator[IO[str]]:
    """Standard output, or a file that gets its name when it is complete."""
    if writing.output == "-":
        yield sys.stdout
        return
    path = Path(writing.output).expanduser()
    if path.exists() and not writing.force:
        fail(f"{path} exists already", "name another file, or use --force to replace it", Status.USAGE)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _progress(what: str, total_bytes: int | None, total_rows: int | None = None) -> Generator[Progress]:
    """A bar where the total is known, else a count; nothing where stderr is no terminal."""
    total = total_bytes if total_bytes is not None else total_rows
    columns: list[Any] = [SpinnerColumn(), TextColumn(what)]
    if total is not None:
        columns += [BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[rows]:,} rows"))
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        bar.add_task(what, total=total, rows=0)
        yield bar
