"""A file's records, one by one: CSV and JSONL, however large, with the line on which each stands."""

from __future__ import annotations

import codecs
import csv
import io
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from database.cli import values
from database.cli.support import Status, fail

__all__ = ["Reading", "Record", "Source", "check_delimiter", "format_of"]

_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}

Record = tuple[int, tuple[str, ...], Sequence[Any]]
"""Line number, columns, values."""


@dataclass(frozen=True)
class Reading:
    """How a file is to be read."""

    file: str
    format: str | None = None
    null: str = ""
    delimiter: str = ","
    encoding: str = "utf-8-sig"
    columns: list[str] | None = None


def format_of(name: str, given: str | None, otherwise: str | None = None) -> str:
    """`csv` or `jsonl`: what was asked for, else what the file's ending says."""
    if given is not None:
        if given.lower() not in ("csv", "jsonl"):
            fail(f"--format is csv or jsonl, not {given!r}", status=Status.USAGE)
        return given.lower()
    found = _FORMATS.get(Path(name).suffix.lower(), otherwise)
    if found is None:
        fail(f"{name}: neither .csv nor .jsonl", "say what it is with --format", Status.USAGE)
    return found


def check_delimiter(delimiter: str) -> str:
    """The character between CSV's fields."""
    found = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
    if len(found) != 1:
        fail(f"--delimiter is one character, or tab, not {delimiter!r}", status=Status.USAGE)
    return found


class Source:
    """A file's records, and how far it has been read."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.name = "standard input" if reading.file == "-" else reading.file
        self.format = format_of(reading.file, reading.format, "csv" if reading.file == "-" else None)
        self.delimiter = check_delimiter(reading.delimiter)
        self.total: int | None = None
        self.line = 0
        """The last line that has been read."""
        self._raw: IO[bytes] | None = None

    @property
    def again(self) -> bool:
        """Whether it can be read more than once."""
        return self.reading.file != "-" and Path(self.reading.file).expanduser().is_file()

    @contextmanager
    def open(self) -> Generator[Iterator[Record]]:
        """Opens the file, from its beginning."""
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
        self.line = 0
        lines = self._counted(text)
        records = self._csv(lines) if self.format == "csv" else self._jsonl(lines)
        try:
            yield from records
        except UnicodeDecodeError as error:
            # What stands before the fault in the piece that was being decoded has not become lines yet.
            before = error.object[: error.start].decode(error.encoding, "replace")
            line = self.line + 1 + len(_LINE_END.findall(before))
            place = f"{self.name}:{line}"
            fail(f"{self.name}: not {error.encoding}: {error.reason} ({place})", "say with --encoding what it is")

    def _counted(self, text: IO[str]) -> Iterator[str]:
        for line in text:
            self.line += 1
            yield line

    def _csv(self, lines: Iterator[str]) -> Iterator[Record]:
        csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        names = self.reading.columns
        begins = 1
        try:
            if names is None:
                names = next(reader, None)
                if names is None:
                    fail(f"{self.name}: empty: a header with the columns' names comes first")
            columns = tuple(names)
            null = self.reading.null
            count = len(columns)
            begins = reader.line_num + 1
            for row in reader:
                if len(row) == count:
                    yield reader.line_num, columns, [None if value == null else value for value in row]
                elif row:  # an empty line
                    fail(f"{self.name}:{begins}: {len(row)} fields, but there are {count} columns")
                begins = reader.line_num + 1
        except csv.Error as error:
            # Quotes that are never closed swallow the rest: where they were opened is what helps.
            fail(f"{self.name}: not CSV: {error} ({self.name}:{begins})")

    def _jsonl(self, lines: Iterator[str]) -> Iterator[Record]:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = values.from_json(line)
            except ValueError as error:
                what = str(error)
                fail(f"{self.name}:{self.line}: {what if what.startswith('$base64') else f'not JSON: {what}'}")
            if record is None:
                fail(f'{self.name}:{self.line}: each line has to be an object: {{"column": value, …}}')
            yield self.line, tuple(record), list(record.values())


_LINE_END = re.compile(r"\r\n|\r|\n")
