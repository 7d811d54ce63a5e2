"""How one column's values travel from one database to another, and what makes two of them the same.

Nothing that a column held may change unseen. So a value travels in a form from which it can be told exactly, and the
comparison is exact as well: where both columns are of one type, values must be equal to the last character. Only where the
types differ (a text with a time in SQLite, `timestamptz` in PostgreSQL) is there a form in between, and that is the one of
PostgreSQL's column: numbers are compared as numbers, and for everything else the server itself says how it writes what the
other side holds. So `{"b": 1, "a": 2}` is what `jsonb` makes of it, and `1 day` is what `interval` makes of it, but two
columns of text that hold `{"a":1}` and `{"a": 1}` differ.

PostgreSQL's types that Python has no exact counterpart for (interval, inet, ranges, arrays, json, and times, which may be
infinite or before our era) are read and written as the server's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from database import errors
from database.engine.statement import quoted
from database.session.database import Database

__all__ = ["Column", "Form", "Way", "form_of", "normalised", "way"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column as its catalog describes it.

    Attributes:
        name: Its name.
        type: PostgreSQL's name of its type, without a length; on SQLite what the table says, in capitals.
        engine: The engine's package.
    """

    name: str
    type: str
    engine: str

    @property
    def kind(self) -> str:
        """What family of values it holds: `integer`, `float`, `numeric`, `boolean`, `text`, `bytes`, or `other`."""
        return _KINDS.get(self.type, "other")

    @property
    def affinity(self) -> str:
        """SQLite's affinity (sqlite.org/datatype3.html#determination_of_column_affinity)."""
        kind = self.type
        if "INT" in kind:
            return "INTEGER"
        if any(word in kind for word in ("CHAR", "CLOB", "TEXT")):
            return "TEXT"
        if not kind or "BLOB" in kind:
            return "BLOB"
        return "REAL" if any(word in kind for word in ("REAL", "FLOA", "DOUB")) else "NUMERIC"


_KINDS = {
    "smallint": "integer", "integer": "integer", "bigint": "integer",
    "real": "float", "double precision": "float", "numeric": "numeric", "boolean": "boolean",
    "text": "text", "character varying": "text", "bytea": "bytes",
}  # fmt: skip
_TIMES = {
    "timestamp without time zone": datetime.fromisoformat,
    "timestamp with time zone": datetime.fromisoformat,
    "date": date.fromisoformat,
}

_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_MOMENT = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)(?P<time>[ T]\d\d:\d\d(?::\d\d(?:\.(?P<fraction>\d+))?)?)?\s*(?P<zone>Z|[+-][\d:]+)?"
)
_NOWHERE = re.compile(r"Z|[+-][0:]+")


@dataclass(frozen=True, slots=True)
class Way:
    """How a column's values are copied.

    Attributes:
        read: What to select.
        mark: What stands for the value in INSERT.
        convert: What is done to each value between the two; None: nothing.
    """

    read: str
    mark: str
    convert: Callable[[Any], Any] | None


@dataclass(frozen=True, slots=True)
class Form:
    """How a column's values are compared with those of its counterpart.

    Attributes:
        read: What to select.
        convert: What is done to each value; None: nothing.
        ask: The type of PostgreSQL whose text is the form of both: values that are not in it yet go to the server.
    """

    read: str
    convert: Callable[[Any], Any] | None = None
    ask: str | None = None


def way(source: Column, target: Column) -> Way:
    """How values get from one column to the other."""
    name = quoted(source.name)
    if target.engine != "postgresql":
        if source.engine != "postgresql":
            return Way(name, "?", None)
        if source.kind == "float" and target.affinity == "TEXT":  # SQLite itself would write fifteen digits of it
            return Way(f"CAST({name} AS text)", "?", None)
        if source.kind != "other":
            return Way(name, "?", None)
        parse = _TIMES.get(source.type)
        return Way(f"CAST({name} AS text)", "?", None if parse is None else _parsing(parse))
    if source.engine == "postgresql":
        if source.type == target.type and source.kind != "other":
            return Way(name, "?", None)
        return Way(f"CAST({name} AS text)", _cast(target.type), None)
    if target.kind == "other":
        return Way(name, _cast(target.type), _as_server_text(target.type))
    return Way(name, "?", _CONVERTERS[target.kind])


def _cast(kind: str) -> str:
    return f"CAST(CAST(? AS text) AS {kind})"


def _parsing(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A time as the application would have stored it; one that Python does not know stays the server's text."""

    def convert(value: Any) -> Any:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError:
            return value

    return convert


def _as_server_text(kind: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            return _in_utc(value) if kind == "timestamp with time zone" else value
        if isinstance(value, bytes):
            if kind == "uuid" and len(value) == 16:
                return str(UUID(bytes=value))
            raise errors.DatabaseError(f"a BLOB cannot become {kind}: change the column's type on the target")
        return repr(value) if isinstance(value, float) else str(value)

    return convert


def _in_utc(text: str) -> str:
    """A time without a zone means UTC: that is what SQLite's own functions write."""
    match = _MOMENT.fullmatch(text)
    if match is None or match["zone"] is not None:
        return text
    return f"{text}+00" if match["time"] else f"{text} 00:00+00"


def _to_integer(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value


def _to_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, (int, str)) else value
    except (ValueError, OverflowError):
        return value


def _to_numeric(value: Any) -> Any:
    try:
        return (
            Decimal(repr(value) if isinstance(value, float) else value)
            if isinstance(value, (int, float, str))
            else value
        )
    except InvalidOperation:
        return value


def _to_boolean(value: Any) -> Any:
    if isinstance(value, str):
        return {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}.get(value.lower(), value)
    return bool(value) if value in (0, 1) else value


def _to_text(value: Any) -> Any:
    if isinstance(value, bytes):
        raise errors.DatabaseError("a BLOB cannot become text: make the column BYTEA on the target")
    return repr(value) if isinstance(value, (int, float)) else value


def _to_bytes(value: Any) -> Any:
    if isinstance(value, (int, float)):
        value = repr(value)
    return value.encode() if isinstance(value, str) else value


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "integer": _to_integer,
    "float": _to_float,
    "numeric": _to_numeric,
    "boolean": _to_boolean,
    "text": _to_text,
    "bytes": _to_bytes,
}


# Comparing


def form_of(column: Column, other: Column, *, source: bool) -> Form:
    """The form in which a column is compared with its counterpart; `source` says on which side it is."""
    name = quoted(column.name)
    if column.engine != "postgresql" and other.engine != "postgresql":
        return Form(name, _exact if column.affinity == other.affinity else _loose)
    if column.engine == other.engine:
        if column.type == other.type:
            return Form(name, _exact) if column.kind in ("text", "bytes", "integer") else Form(f"CAST({name} AS text)")
        # The target's type is the common one.
        return Form(f"CAST({name} AS text)", None, other.type if source else None)
    kind = column if column.engine == "postgresql" else other
    if kind.kind == "other":
        if column is kind:
            return Form(f"CAST({name} AS text)")
        return Form(name, _comparable(kind.type), kind.type)
    if kind.kind in ("text", "bytes"):
        return Form(name, _exact if column is kind else _CONVERTERS_OF_TEXT[kind.kind])
    if kind.kind == "boolean":
        return Form(name, _boolean)
    return Form(name, _number)


def _exact(value: Any) -> Any:
    """The value, such that no two of different types are the same."""
    return value if value is None or isinstance(value, (str, bytes)) else repr(value).encode()


def _loose(value: Any) -> Any:
    """Numbers as numbers, also where one column holds them as text."""
    return _number(value) if isinstance(value, (int, float, str)) else value


def _number(value: Any) -> Any:
    """A number by its value: an integer, a float by its shortest digits, a decimal, or a text that is one of these."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        value = int(value)
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except (InvalidOperation, ValueError, TypeError):
        return value
    if not number.is_finite():
        return ("number", str(number))
    if number == 0:
        return ("number", "0")
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).rstrip("0")
    return ("number", sign, text, int(exponent) + len(digits) - len(text))


def _boolean(value: Any) -> Any:
    value = _to_boolean(value)
    return ("boolean", value) if isinstance(value, bool) else value


def _text(value: Any) -> Any:
    return repr(value) if isinstance(value, (int, float)) else value


_CONVERTERS_OF_TEXT: dict[str, Callable[[Any], Any]] = {"text": _text, "bytes": _to_bytes}


def _comparable(kind: str) -> Callable[[Any], Any]:
    """Text for the server to write in its own way; what it would silently leave out is no text, and so never equal."""

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, bytes):
            return str(UUID(bytes=value)) if kind == "uuid" and value is not None and len(value) == 16 else value
        text = value if isinstance(value, str) else repr(value)
        match = _MOMENT.match(text) if kind in _TIMES else None
        if match is not None:
            zone = match["zone"]
            if (match["fraction"] or "")[6:].strip("0"):
                return ("finer than a microsecond", text)
            if kind != "timestamp with time zone" and zone is not None and not _NOWHERE.fullmatch(zone):
                return ("a zone that the column drops", text)
            if kind == "date" and (match["time"] or "").strip(" T0:."):
                return ("a time that the column drops", text)
        return _in_utc(text) if kind == "timestamp with time zone" else text

    return convert


async def normalised(server: Database, kind: str, values: Sequence[Any]) -> list[Any]:
    """The values as the server writes them when they are of that type; what is no text, or is not of that type, stays."""
    texts = list({value for value in values if isinstance(value, str)})
    known: dict[str, Any] = {}
    if texts:
        try:
            known = dict(zip(texts, await _ask(server, kind, texts), strict=True))
        except errors.DatabaseError:
            for text in texts:
                try:
                    known[text] = (await _ask(server, kind, [text]))[0]
                except errors.QueryExecutionError:
                    known[text] = ("not of this type", text)
    return [known.get(value, value) if isinstance(value, str) else value for value in values]


async def _ask(server: Database, kind: str, texts: list[str]) -> list[Any]:
    sql = (
        f"SELECT CAST(CAST(each.value AS {kind}) AS text) FROM json_array_elements_text(CAST(CAST(? AS text) AS json))"  # noqa: S608
        " WITH ORDINALITY AS each (value, number) ORDER BY each.number"
    )
    return [row[0] for row in await server.fetch_all(sql, (json.dumps(texts, ensure_ascii=False),))]
