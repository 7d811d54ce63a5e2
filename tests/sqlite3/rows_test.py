"""Results: lists that hold rows, whatever their size and whoever looks into them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from database.sqlite3.values import Row

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

SIZES = (0, 1, 63, 64, 65, 1000)


async def test_every_size_of_result(db: Any) -> None:
    """Whatever its size, a result is a list of rows and of nothing else, the same as streamed, and readable later."""
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, f"value {n}") for n in range(1000)])
    results = []
    for size in SIZES:
        sql = f"SELECT id, value FROM item WHERE id < {size} ORDER BY id"
        rows = await db.fetch_all(sql)
        async with db.stream(sql, chunk_size=7) as stream:
            streamed = [row async for row in stream]
        made = await db.fetch_all(sql, record_class=lambda **columns: columns)
        results.append((size, rows, streamed, made))
    await db.close()
    for size, rows, streamed, made in results:
        assert isinstance(rows, list)
        assert [tuple(row) for row in rows] == [(n, f"value {n}") for n in range(size)]
        assert [dict(row) for row in streamed] == [dict(row) for row in rows] == made
        # What is written in C takes a list's items as they lie there, past every method that a class may have.
        assert {type(list.__getitem__(rows, n)) for n in range(size)} <= {Row}
        assert {type(row) for row in [*rows, *rows[1:], *reversed(rows), *rows.copy()]} <= {Row}
        assert [dict(row) for row in pickle.loads(pickle.dumps(rows))] == made


async def test_one_shape_for_encoders(db: Any) -> None:
    """orjson, msgspec, pydantic and json see the same in a result of one row and of a thousand."""
    orjson = pytest.importorskip("orjson")
    msgspec = pytest.importorskip("msgspec")
    pydantic = pytest.importorskip("pydantic")
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, f"value {n}") for n in range(1000)])

    class Item(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(from_attributes=True)
        id: int
        value: str

    ways = {
        "orjson": lambda rows: json.loads(orjson.dumps(rows, default=dict)),
        "msgspec": lambda rows: json.loads(msgspec.json.encode(rows, enc_hook=dict)),
        "json": lambda rows: json.loads(json.dumps(rows, default=dict)),
        "pydantic": lambda rows: [
            each.model_dump() for each in pydantic.TypeAdapter(list[Item]).validate_python([dict(row) for row in rows])
        ],
    }
    for size in SIZES:
        rows = await db.fetch_all("SELECT id, value FROM item WHERE id < ? ORDER BY id", (size,))
        for name, way in ways.items():
            assert way(rows) == [{"id": n, "value": f"value {n}"} for n in range(size)], (name, size)
        if size:
            with pytest.raises(TypeError):
                orjson.dumps(rows)  # and not: arrays, from a certain size on
