"""`export`: a query's rows as CSV or JSONL, as they come. How values are written stands in `values`."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from database.cli.dialects import dialect_of
from database.cli.records import check_delimiter, format_of
from database.cli.support import Status, Target, duration, err, fail, quote, remark, run, utf8
from database.cli.values import csv_text, json_text, kind_in_csv
from database.session.database import Database

__all__ = ["Writing", "export_query", "progress"]

CHUNK = 2000
"""Rows written at a time."""


@dataclass(frozen=True)
class Writing:
    """How a file is to be written."""

    output: str = "-"
    format: str | None = None
    null: str = ""
    delimiter: str = ","
    force: bool = False


def export_query(target: Target, query: str, params: list[str], writing: Writing) -> None:
    """Writes a query's rows."""
    values: dict[str, Any] = {}
    for each in params:
        name, mark, value = each.partition("=")
        if not mark or not name.isidentifier():
            fail(f"--param takes NAME=VALUE, not {each!r}", status=Status.USAGE)
        values[name] = _number(utf8(value))
    query = utf8(query)
    kind = format_of(writing.output, writing.format, "csv")
    delimiter = check_delimiter(writing.delimiter)
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
    kind = kind_in_csv(text)
    return int(text) if kind == "INTEGER" else float(text) if kind in ("REAL", "WHOLE", "ZERO") else text


async def _export(
    target: Target, query: str, params: dict[str, Any], writing: Writing, kind: str, delimiter: str
) -> int:
    db = target.open()
    dialect = dialect_of(db)
    total: int | None = None
    table = await db.fetch_value(*dialect.named(query))
    if table is not None:
        query = f"SELECT * FROM {quote(table)}"  # noqa: S608  - quoted
        if err().is_terminal:
            total = await db.fetch_value(f"SELECT count(*) FROM {quote(table)}")  # noqa: S608  - quoted
    elif len(query.split()) == 1:
        fail(f"there is no table {query!r}", "or give a whole SELECT, in quotes", Status.USAGE)
    query, names, documents = await dialect.exact(db, query, params)
    with _output(writing) as file, progress("export", None, total) as bar:
        task = bar.tasks[0].id
        count = 0
        async with db.stream(query, params or None, chunk_size=CHUNK) as rows:
            write: Any = None
            pending: list[Any] = []
            async for row in rows:
                if write is None:
                    columns = names or list(row.keys())
                    write = (
                        _csv_writer(file, columns, writing.null, delimiter)
                        if kind == "csv"
                        else _json_writer(file, columns, documents)
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
            _csv_writer(file, names or await _names(db, query, params), writing.null, delimiter)
        bar.update(task, completed=count, rows=count)
    return count


async def _names(db: Database, query: str, params: dict[str, Any]) -> list[str]:
    """The columns of a result without rows: a row brings its names with it, and there is none."""

    def names(connection: Any) -> list[str]:
        cursor = connection.execute(query, params)
        return [column[0] for column in cursor.description]

    return await db.run(names, readonly=True)


class _Lines:
    """What a `csv.writer` writes to, which quotes the characters of its line end: it gets both, the file only one."""

    def __init__(self, file: IO[str]) -> None:
        self._write = file.write

    def write(self, line: str) -> int:
        return self._write(line[:-2] + "\n")


def _csv_writer(file: IO[str], names: list[str], null: str, delimiter: str) -> Any:
    writer = csv.writer(_Lines(file), delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)

    def write(rows: list[Any]) -> None:
        writer.writerows([csv_text(value, null) for value in row] for row in rows)

    return write


def _json_writer(file: IO[str], names: list[str], documents: frozenset[int]) -> Any:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        fail(f"two columns are named {twice!r}", "give one of them another name: SELECT … AS …", Status.USAGE)

    labels = [f"{json.dumps(name, ensure_ascii=False)}: " for name in names]

    def write(rows: list[Any]) -> None:
        for row in rows:
            texts = (
                _line(value) if number in documents and value is not None else json_text(value)
                for number, value in enumerate(row)
            )
            file.write("{" + ", ".join(label + text for label, text in zip(labels, texts, strict=True)) + "}\n")

    return write


def _line(document: str) -> str:
    """JSON on one line; its strings hold no line ends."""
    return document.replace("\r", " ").replace("\n", " ")


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
def progress(what: str, total_bytes: int | None, total_rows: int | None = None) -> Generator[Progress]:
    """A bar where the total is known, else a count; nothing where stderr is no terminal."""
    total = total_bytes if total_bytes is not None else total_rows
    columns: list[Any] = [SpinnerColumn(), TextColumn(what)]
    if total is not None:
        columns += [BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[rows]:,} rows"))
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        bar.add_task(what, total=total, rows=0)
        yield bar
