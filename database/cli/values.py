r"""How values travel in files, and which type of a column keeps them as they are.

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
other objects are stored as the JSON text that stands in the file. In CSV, NULL and the empty text look alike unless
--null tells them apart.

A guessed type (`--create`) has to give back exactly what stood there: `1.10` is no REAL, for that would come back as
`1.1`; a JSON string stays a string whatever it looks like.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, cast

__all__ = [
    "Document",
    "Exact",
    "csv_text",
    "fits",
    "from_csv",
    "from_json",
    "json_text",
    "kind_in_csv",
    "kind_in_json",
    "suiting",
]

# Writing


def csv_text(value: Any, null: str = "") -> Any:
    """What a CSV file shows for a value."""
    if value is None:
        return null
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"\\x{bytes(cast('Any', value)).hex()}"
    if isinstance(value, float) and math.isinf(value):
        return "9e999" if value > 0 else "-9e999"  # which SQLite reads as infinity; `inf` would be text
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def json_text(value: Any) -> str:
    """A value as JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return json.dumps({"$base64": base64.b64encode(cast("Any", value)).decode()})
    if isinstance(value, float):
        if math.isinf(value):
            return "1e999" if value > 0 else "-1e999"  # JSON has no infinity, but whoever reads this gets one
        if math.isnan(value):
            return '"NaN"'
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else json.dumps(str(value))
    return json.dumps(value, ensure_ascii=False, default=str)


# Reading CSV

_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def from_csv(declared: str) -> Callable[[str], Any] | None:
    """What is done to CSV's text before SQLite gets it (sqlite.org/datatype3.html#determination_of_column_affinity)."""
    kind = declared.upper()
    if "INT" in kind:
        return _real
    if not kind or kind == "ANY" or any(word in kind for word in ("CHAR", "CLOB", "TEXT")):
        return None
    return _blob if "BLOB" in kind else _real


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


def kind_in_csv(text: str) -> str:
    """The storage class that gives this text back to the letter: INTEGER, WHOLE (a REAL as `5.0`), ZERO, REAL, BLOB or TEXT.

    ZERO is the one with a sign: see `suiting`.
    """
    if text.startswith("\\x"):
        value = _blob(text)
        return "BLOB" if isinstance(value, bytes) and csv_text(value) == text else "TEXT"
    if text[-1:].isdigit() and text.isascii() and _REAL.fullmatch(text):
        if text.lstrip("-").isdecimal():
            # Leading zeros, plus signs and more than 64 bits would be lost.
            return "INTEGER" if len(text) <= 20 and str(int(text)) == text and fits(int(text)) else "TEXT"
        number = float(text)
        if str(csv_text(number)) == text:
            return _ZERO if text == "-0.0" else "WHOLE" if number.is_integer() else "REAL"
    return "TEXT"


def fits(number: int) -> bool:
    """Whether SQLite has room for it."""
    return -(2**63) <= number < 2**63


# Reading JSON


class Exact(str):
    """A number of JSON's that no float holds, as it was written."""

    __slots__ = ()


class Document(str):
    """An array or object of JSON's, as it was written."""

    __slots__ = ()


def _float(token: str) -> Any:
    number = float(token)
    if repr(number) == token or json_text(number) == token:
        return number
    if math.isinf(number) or Decimal(token) != Decimal(repr(number)):
        return Exact(token)
    return number


_decoder = json.JSONDecoder(parse_float=_float)
_SPACE = re.compile(r"[ \t\n\r]*")


def from_json(line: str) -> dict[str, Any] | None:
    """A line's values by their names; None where it is no object.

    Raises:
        ValueError: It is not JSON, or nested too deeply to be read.
    """
    try:
        record: Any = _decoder.decode(line)
        if not isinstance(record, dict):
            return None
        values = cast("dict[str, Any]", record)
        if any(isinstance(value, (dict, list)) for value in values.values()):
            texts = _texts(line)
            for name, value in values.items():
                if isinstance(value, (dict, list)):
                    values[name] = _stored(value, texts[name])
        return values
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _stored(value: Any, text: str) -> Any:
    if isinstance(value, dict) and len(cast("dict[str, Any]", value)) == 1:
        encoded = cast("dict[str, Any]", value).get("$base64")
        if isinstance(encoded, str):
            try:
                return base64.b64decode(encoded, validate=True)
            except binascii.Error as error:
                raise ValueError(f"$base64: {error}") from None
    return Document(text)


def _texts(line: str) -> dict[str, str]:
    """What stands in the line for each value: written anew, `1.10` or `1e400` within it would be another."""
    found: dict[str, str] = {}
    position = _end_of_space(line, 0) + 1
    while line[position := _end_of_space(line, position)] != "}":
        name, position = _decoder.raw_decode(line, position)
        start = _end_of_space(line, _end_of_space(line, position) + 1)
        _, position = _decoder.raw_decode(line, start)
        found[name] = line[start:position]
        position = _end_of_space(line, position)
        if line[position] == ",":
            position += 1
    return found


def _end_of_space(line: str, position: int) -> int:
    match = _SPACE.match(line, position)
    return position if match is None else match.end()


def kind_in_json(value: Any) -> str:
    """The storage class that holds a value as it is; EXACT for numbers that only text can hold, ZERO for `-0.0`."""
    if isinstance(value, (bool, int)):
        return "INTEGER" if fits(value) else "EXACT"
    if isinstance(value, float):
        return _ZERO if value == 0.0 and math.copysign(1, value) < 0 else "REAL"
    if isinstance(value, bytes):
        return "BLOB"
    return "EXACT" if isinstance(value, Exact) else "TEXT"


# Types

_ZERO = "ZERO"
"""The kind of `-0.0`."""


def suiting(kinds: Iterable[str], *, plain: bool, signed: bool = False) -> str:
    """The type of a column that gives values of these kinds back exactly; `""` is a column without a type.

    Args:
        kinds: As `kind_in_csv` or `kind_in_json` says.
        plain: Whether all values arrive as text, as in CSV; then text keeps everything.
        signed: Whether a REAL column keeps `-0.0`. SQLite's stores whole numbers as integers, of which none is that.
    """
    found = {"WHOLE" if kind == _ZERO and signed else kind for kind in kinds}
    if not found:
        return "TEXT"
    if found == {"INTEGER"}:
        return "INTEGER"
    if found <= {"REAL", "WHOLE"}:
        return "REAL"
    if found == {"BLOB"}:
        return "BLOB"
    if plain:
        return "NUMERIC" if found == {"INTEGER", "REAL"} else "TEXT"
    return "TEXT" if found <= {"TEXT", "EXACT"} else ""
