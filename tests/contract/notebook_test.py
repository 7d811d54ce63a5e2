"""Results in a notebook: they show themselves as tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


class Shown(HTMLParser):
    """What a browser makes of it: the texts of all cells, row by row, and every tag there is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.rest = ""
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data
        else:
            self.rest += data


async def test_a_result_shows_itself(db: Any) -> None:
    """A result of any size, none and one included, is a table of its columns with 20 rows at most, and says how many
    there are; so is a single row. It is a list all the same.
    """
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, f"v{n}") for n in range(1, 1501)])
    sql = "SELECT id, value FROM item WHERE id <= ? ORDER BY id"
    for size in (1, 2, 20, 21, 1500):
        rows = await db.fetch_all(sql, (size,))
        assert isinstance(rows, list)
        shown = Shown(rows._repr_html_())
        assert shown.rows == [["id", "value"], *([str(n), f"v{n}"] for n in range(1, min(size, 20) + 1))], size
        assert shown.rest == ("" if size <= 20 else f"… of {size:,} rows")
    assert "no rows" in (await db.fetch_all(sql, (0,)))._repr_html_()
    row = await db.fetch_one(sql, (1,))
    assert Shown(row._repr_html_()).rows == [["id", "value"], ["1", "v1"]]
    async with db.stream(sql, (1,)) as stream:
        assert [Shown(row._repr_html_()).rows async for row in stream] == [[["id", "value"], ["1", "v1"]]]


async def test_nothing_in_a_table_is_trusted(db: Any) -> None:
    """Names and values are shown as they are, and never taken for HTML; long ones are cut, bytes are counted."""
    bad = "<script>alert('x')</script>&amp;\"'"
    quoted = bad.replace('"', '""')
    await db.execute("INSERT INTO item (id, value) VALUES (1, ?)", (bad,))
    await db.execute("INSERT INTO item (id, value) VALUES (2, ?)", ("<b>" * 10_000,))
    await db.execute("INSERT INTO item (id, value) VALUES (3, NULL)")
    rows = await db.fetch_all(
        f"SELECT value AS \"{quoted[:40]}\", CAST('abc' AS {BYTES[db.engine.name]}) AS b FROM item ORDER BY id"
    )
    html = rows._repr_html_()
    shown = Shown(html)
    assert shown.tags == {"table", "thead", "tbody", "tr", "th", "td", "em"}
    assert shown.rows[0] == [bad[:40].replace('""', '"'), "b"]
    assert [row[0] for row in shown.rows[1:]] == [bad, ("<b>" * 10_000)[:200] + "…", "NULL"]
    assert {row[1] for row in shown.rows[1:]} == {"3 bytes"}
    assert not re.search(r"<(script|b)\b", html)


BYTES = {"sqlite3": "BLOB", "postgresql": "bytea"}
