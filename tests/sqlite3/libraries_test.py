"""Libraries that want a connection of `sqlite3` work unchanged in `db.run`: alone, in a group, inside a transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from typing import Any

import pytest

from tests.contract.support import Engine
from tests.sqlite3.run_test import SENDS, is_clean

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import numpy  # now: it cannot be imported twice, and once failed in the middle of a test  # noqa: F401

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]


async def test_sqlite_utils(db: Any, engine: Engine) -> None:
    """sqlite-utils makes tables, inserts, upserts, transforms, searches, and begins and ends transactions of its own."""
    sqlite_utils = pytest.importorskip("sqlite_utils")

    def work(connection: sqlite3.Connection) -> list[Any]:
        utils = sqlite_utils.Database(connection)
        utils["dogs"].insert_all(
            [{"id": 1, "name": "Cleo", "age": 4}, {"id": 2, "name": "Pancakes", "age": 3}], pk="id"
        )
        utils["dogs"].upsert({"id": 1, "age": 5}, pk="id")
        utils["dogs"].transform(rename={"age": "years"})
        utils["dogs"].enable_fts(["name"], create_triggers=True)
        utils["dogs"].add_column("tag", str)
        utils["dogs"].create_index(["name"])
        with utils.atomic():
            utils["dogs"].insert({"id": 3, "name": "Bo", "years": 1})
        with pytest.raises(KeyError), utils.atomic():
            utils["dogs"].insert({"id": 4, "name": "lost", "years": 1})
            raise KeyError
        utils.begin()
        utils["dogs"].delete(2)
        utils.rollback()
        utils.executescript("UPDATE dogs SET tag = 'a'; UPDATE dogs SET tag = 'b' WHERE id = 2")
        utils.register_function(lambda text: text.upper(), name="shout")
        assert [row["name"] for row in utils["dogs"].search("cleo")] == ["Cleo"]
        return list(utils.query("SELECT id, shout(name) AS name, years, tag FROM dogs ORDER BY id"))

    def failing(connection: sqlite3.Connection) -> None:
        work(connection)
        raise ValueError("mine")

    wanted = [
        {"id": 1, "name": "CLEO", "years": 5, "tag": "a"},
        {"id": 2, "name": "PANCAKES", "years": 3, "tag": "b"},
        {"id": 3, "name": "BO", "years": 1, "tag": "a"},
    ]
    for how, send in SENDS.items():
        with pytest.raises(ValueError, match="mine"):
            await send(db, failing)
        assert engine.outside("SELECT name FROM sqlite_master WHERE name LIKE 'dogs%'") == [], how
        assert await send(db, work) == wanted, how
        await is_clean(db, engine, how)
        assert engine.outside("SELECT id, tag FROM dogs ORDER BY id") == [(1, "a"), (2, "b"), (3, "a")], how
        assert await db.fetch_value("PRAGMA recursive_triggers") == 0
        read = await db.run(lambda connection: list(sqlite_utils.Database(connection)["dogs"].rows), readonly=True)
        assert [row["name"] for row in read] == ["Cleo", "Pancakes", "Bo"]
        await db.execute_script("DROP TABLE dogs; DROP TABLE dogs_fts")


async def test_pandas(db: Any, engine: Engine) -> None:
    """pandas writes a frame and reads it back, commits and rolls back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2, 3], "b": ["x", "y", None], "c": [0.5, None, 2.0]})

    def work(connection: sqlite3.Connection) -> Any:
        frame.to_sql("frame", connection, index=False, if_exists="replace")
        frame.to_sql("frame", connection, index=False, if_exists="append", method="multi")
        with pytest.raises(ValueError, match="already exists"):
            frame.to_sql("frame", connection, index=False, if_exists="fail")
        return pandas.read_sql("SELECT * FROM frame WHERE a > ?", connection, params=(1,))

    def failing(connection: sqlite3.Connection) -> None:
        work(connection)
        raise ValueError("mine")

    for how, send in SENDS.items():
        with pytest.raises(ValueError, match="mine"):
            await send(db, failing)
        assert engine.outside("SELECT name FROM sqlite_master WHERE name = 'frame'") == [], how
        read = await send(db, work)
        assert list(read["a"]) == [2, 3, 2, 3], how
        assert engine.outside("SELECT a, b FROM frame") == [(1, "x"), (2, "y"), (3, None)] * 2, how
        await is_clean(db, engine, how)
        again = await db.run(lambda connection: pandas.read_sql("SELECT * FROM frame", connection), readonly=True)
        assert len(again) == 6
        await db.execute("DROP TABLE frame")


async def test_db_api_code(db: Any, engine: Engine) -> None:
    """What one writes for any DB-API connection: a cursor, commits in between, `closing()`, a rollback in the handler."""
    from contextlib import closing

    def work(connection: sqlite3.Connection) -> list[Any]:
        with closing(connection.cursor()) as cursor:
            cursor.execute("INSERT INTO item (value) VALUES (?)", ("a",))
            connection.commit()
            try:
                cursor.executemany("INSERT INTO item (id, value) VALUES (?, ?)", [(8, "b"), (8, "c")])
                connection.commit()
            except connection.IntegrityError:
                connection.rollback()
            return cursor.execute("SELECT value FROM item").fetchall()

    for how, send in SENDS.items():
        assert [tuple(row) for row in await send(db, work)] == [("a",)], how
        assert engine.outside("SELECT value FROM item") == [("a",)], how
        await db.execute("DELETE FROM item")
        await is_clean(db, engine, how)


async def test_numbers_and_moments_of_numpy_and_pandas(db: Any, engine: Engine) -> None:
    """Their scalars are stored as the numbers, texts and NULLs that they are, in every method; what is none of these raises,
    and never becomes the bytes of its memory.
    """
    import array
    import ctypes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numpy = pytest.importorskip("numpy")
        pandas = pytest.importorskip("pandas")
    moment = "2024-01-02T03:04:05"
    good = [
        (numpy.int64(-5), -5), (numpy.uint8(200), 200), (numpy.bool_(True), 1), (numpy.float32(0.5), 0.5),
        (numpy.float64(2.5), 2.5), (numpy.float64("nan"), None), (numpy.str_("x"), "x"), (numpy.bytes_(b"x"), b"x"),
        (numpy.array(7), 7), (numpy.datetime64("2024-01-02"), "2024-01-02"),
        (numpy.datetime64(moment), "2024-01-02 03:04:05"), (numpy.datetime64(moment, "ns"), "2024-01-02 03:04:05"),
        (numpy.datetime64(f"{moment}.123", "ns"), "2024-01-02 03:04:05.123000"),
        (numpy.datetime64(f"{moment}.123456789"), "2024-01-02 03:04:05.123456789"),
        (numpy.datetime64("2024-01-02T03"), "2024-01-02 03:00:00"), (numpy.datetime64("NaT", "s"), None),
        (pandas.Timestamp(moment), "2024-01-02 03:04:05"), (pandas.NaT, None), (pandas.NA, None), (numpy.ma.masked, None),
        (array.array("B", [1, 2]), b"\1\2"), (memoryview(b"abcdef")[::2], b"ace"), (memoryview(b"ab"), b"ab"),
    ]  # fmt: skip
    bad = [
        numpy.timedelta64(5, "s"), numpy.array([1, 2]), numpy.datetime64("2024"), numpy.longdouble(1),
        numpy.complex128(1), pandas.Timedelta(1), ctypes.c_int(3), numpy.void(b"ab"),
    ]  # fmt: skip
    sql = "INSERT INTO item (value) VALUES (:value)"
    await db.execute("DROP TABLE item")
    await db.execute("CREATE TABLE item (value)")

    async def batched(value: Any) -> None:
        async with db.batch() as batch:
            await batch.execute(sql, {"value": value})

    calls: list[Any] = [
        lambda value: db.execute(sql, {"value": value}),
        lambda value: db.execute("INSERT INTO item VALUES (?)", [value]),
        lambda value: db.execute_many(sql, [{"value": value}]),
        lambda value: db.execute_many("INSERT INTO item VALUES (?)", iter([(value,)])),
        batched,
    ]
    for call in calls:
        for value, wanted in good:
            await call(value)
            (found,) = engine.outside("SELECT value FROM item")
            assert found == (wanted,), (type(value), value)
            assert type(found[0]) is type(wanted), (type(value), value)
            await db.execute("DELETE FROM item")
        for value in bad:
            with pytest.raises(Exception, match=r"convert|supported|cannot be stored|no date"):
                await call(value)
    assert engine.outside("SELECT count(*) FROM item") == [(0,)]
