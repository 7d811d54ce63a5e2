"""Results that show themselves: what a notebook draws for a list of rows, and for one row.

A result is a list, whatever its number of rows; that its class is `Rows` is for notebooks alone, and costs nothing until one
asks. Nothing in a table is trusted: values come from a database, and a notebook would run what it takes for HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, cast

__all__ = ["Rows", "table"]

SHOWN = 20
"""Rows of a table, at the most."""

LONG = 200
"""Characters of a value, at the most."""


class Rows(list[Any]):
    """The rows of a result. In a notebook it shows itself as a table of the first 20."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        if not self:
            return "<p>no rows</p>"
        shown = table(self[0].keys(), self[:SHOWN])
        return shown if len(self) <= SHOWN else f"{shown}<p>… of {len(self):,} rows</p>"


def table(names: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(_short(name))}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td><em>NULL</em></td>"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<td><em>{len(bytes(cast('Any', value))):,} bytes</em></td>"
    return f"<td>{escape(_short(str(value)))}</td>"


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}…"
