"""Big results: a list that makes its rows when they are looked at, and is a list in everything else."""

from __future__ import annotations

import copy
import operator
import pickle
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from database.sqlite3.values import Row, Rows
from tests.contract.support import in_turn

QUERY = "SELECT value AS id, 'name ' || value AS name FROM json_each('[3, 1, 2, 3]')"


def eager() -> list[Any]:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = Row
    rows = connection.execute(QUERY).fetchall()
    connection.close()
    return rows


def lazy() -> Rows:
    connection = sqlite3.connect(":memory:")
    cursor = connection.execute(QUERY)
    tuples = cursor.fetchall()
    connection.close()
    return Rows(cursor, tuples)


ANOTHER = eager()[1]


def changed(change: Callable[[Any], object]) -> Callable[[Any], object]:
    def of(rows: Any) -> object:
        change(rows)
        return list(rows)

    return of


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "iterated": list,
    "iterated twice": lambda rows: [*rows, *rows],
    "as a tuple": tuple,
    "unpacked": lambda rows: (lambda *each: each)(*rows),
    "length": len,
    "truth": bool,
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "slice": lambda rows: rows[1:3],
    "by name": lambda rows: [row["name"] for row in rows],
    "as mappings": lambda rows: [dict(row) for row in rows],
    "reversed": lambda rows: list(reversed(rows)),
    "sorted": lambda rows: sorted(rows, key=lambda row: row["id"]),
    "sorted in place": changed(lambda rows: rows.sort(key=operator.itemgetter("id"))),
    "contains": lambda rows: (ANOTHER in rows, 7 in rows),
    "index and count": lambda rows: (rows.index(ANOTHER), rows.count(ANOTHER)),
    "added to": lambda rows: rows + [ANOTHER],
    "added": lambda rows: [ANOTHER] + rows,
    "multiplied": lambda rows: (rows * 2, 2 * rows),
    "equal": lambda rows: (rows == eager(), eager() == rows, rows == lazy(), rows != [], rows == [1]),
    "copied": lambda rows: (rows.copy(), copy.copy(rows), copy.deepcopy(rows)),
    "pickled": lambda rows: pickle.loads(pickle.dumps(rows)),
    "extended elsewhere": lambda rows: [0].__iadd__(rows),
    "assigned elsewhere": lambda rows: operator.setitem(other := [0, 0], slice(1, 1), rows) or other,
    "shown": repr,
    "appended": changed(lambda rows: rows.append(ANOTHER)),
    "extended": changed(lambda rows: rows.extend([ANOTHER])),
    "extended in place": changed(lambda rows: rows.__iadd__([ANOTHER])),
    "inserted": changed(lambda rows: rows.insert(1, ANOTHER)),
    "popped": lambda rows: (rows.pop(), rows.pop(0), list(rows)),
    "removed": changed(lambda rows: rows.remove(ANOTHER)),
    "deleted": changed(lambda rows: operator.delitem(rows, 0)),
    "replaced": changed(lambda rows: operator.setitem(rows, 0, ANOTHER)),
    "turned round": changed(lambda rows: rows.reverse()),
    "cleared": changed(lambda rows: rows.clear()),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_as_a_list(operation: Callable[[Any], object]) -> None:
    """Each thing that one does with a list gives the same, row by row, as with a list made at once."""
    wanted, found = operation(eager()), operation(lazy())
    assert found == wanted
    assert repr(found) == repr(wanted)


def test_no_plain_tuple_is_ever_seen() -> None:
    """Whatever way a row is reached, it is a `Row`."""
    rows = lazy()
    assert {type(row) for row in [*rows, rows[0], *rows[1:], *reversed(rows), rows.pop(), *rows.copy()]} == {Row}


@pytest.mark.anyio
@in_turn("count", [0, 1, 63, 64, 65, 1000])
async def test_every_size_of_result(db: Any, count: int) -> None:
    """Whatever its size, a result is a list of rows, the same as streamed, and readable after the pool has gone."""
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, f"value {n}") for n in range(count)])
    sql = "SELECT id, value FROM item ORDER BY id"
    rows = await db.fetch_all(sql)
    async with db.stream(sql, chunk_size=7) as stream:
        streamed = [row async for row in stream]
    made = await db.fetch_all(sql, record_class=lambda **columns: columns)
    await db.close()
    assert isinstance(rows, list)
    assert [tuple(row) for row in rows] == [(n, f"value {n}") for n in range(count)]
    assert [dict(row) for row in streamed] == [dict(row) for row in rows] == made
    assert {type(row) for row in rows} <= {Row}
