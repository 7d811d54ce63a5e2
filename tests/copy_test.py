"""Moving house: `database.copy` between SQLite and PostgreSQL, in both directions."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import close_all, configure, errors
from database.copy import copy, find, main
from database.session import registry
from tests.conftest import make_engine

SQLITE_SCHEMA = """
CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES parent (id), "Odd ""name"" x" TEXT);
CREATE TABLE parent (id INTEGER PRIMARY KEY, name TEXT, at TEXT, truth INTEGER, amount REAL, data BLOB, doc TEXT);
CREATE TABLE pair (a TEXT, b INTEGER, note TEXT, PRIMARY KEY (b, a));
CREATE TABLE keyless (value TEXT);
CREATE TABLE empty (id INTEGER PRIMARY KEY);
"""

POSTGRESQL_SCHEMA = """
CREATE TABLE parent (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name TEXT, at TIMESTAMPTZ, truth BOOLEAN,
    amount DOUBLE PRECISION, data BYTEA, doc JSONB, extra TEXT);
CREATE TABLE child (id SERIAL PRIMARY KEY, parent_id BIGINT REFERENCES parent (id), "Odd ""name"" x" TEXT);
CREATE TABLE pair (a TEXT, b INTEGER, note TEXT, PRIMARY KEY (b, a));
CREATE TABLE keyless (value TEXT);
CREATE TABLE empty (id INTEGER PRIMARY KEY);
"""

ROWS = 2345


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio"


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """PostgreSQL, with SQLite beside it."""
    engine = make_engine("postgresql", tmp_path)
    before = dict(registry._handles)
    registry._handles.clear()  # both databases are called "default", and here they are two
    yield engine
    registry._handles.clear()
    registry._handles.update(before)
    engine.dispose()


@pytest.fixture
def settings(engine: Any, tmp_path: Path) -> dict[str, Any]:
    """Both databases in one configuration, the one full, the other with a schema and nothing in it."""
    path = tmp_path / "source.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SQLITE_SCHEMA)
        connection.executemany(
            "INSERT INTO parent VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (n, f"이름 {n}", "2026-01-02 03:04:05", n % 2, n / 8, bytes([n % 256]), '{"b": [1, 2], "a": null}')
                for n in range(1, ROWS + 1)
            ],
        )
        connection.executemany("INSERT INTO child VALUES (?, ?, ?)", [(n, n, f"it's {n}") for n in range(1, 11)])
        connection.executemany("INSERT INTO pair VALUES (?, ?, ?)", [(f"{n % 7}", n // 7, None) for n in range(500)])
        connection.executemany("INSERT INTO keyless VALUES (?)", [("twice",), ("twice",), (None,)])
    connection.close()
    schema = tmp_path / "schema.sql"
    schema.write_text(POSTGRESQL_SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
    target = {**engine.settings(init_sql=str(schema))["database"]["postgresql"]}
    return {"database": {"sqlite": {"path": str(path), "init_sql": ""}, "postgresql": target}}


@pytest.mark.anyio
async def test_copy_there_and_back(settings: Any, engine: Any, tmp_path: Path) -> None:
    """All rows arrive, in the types of the target; foreign keys hold; new keys go on behind those copied; and back."""
    configure(settings)
    try:
        source, target = find("sqlite:default"), find("postgresql:default")
        seen: list[tuple[str, str, int, int]] = []
        report = await copy(source, target, chunk_size=500, progress=lambda *args: seen.append(args))
        assert report.differing == []
        assert {table.name: (table.copied, table.rows) for table in report.tables} == {
            "parent": (ROWS, ROWS), "child": (10, 10), "pair": (500, 500), "keyless": (3, 3), "empty": (0, 0),
        }  # fmt: skip
        assert ("copy", "parent", 1000, ROWS) in seen
        row = await target.fetch_one("SELECT name, truth, amount, data, doc FROM parent WHERE id = 3")
        assert list(row or ()) == ["이름 3", True, 0.375, b"\x03", {"a": None, "b": [1, 2]}]
        assert (await target.execute("INSERT INTO parent (name) VALUES ('new')")).lastrowid == ROWS + 1
        assert (await target.execute("INSERT INTO child (parent_id) VALUES (1)")).lastrowid == 11
        await target.execute("DELETE FROM child WHERE id = 11")
        await target.execute("DELETE FROM parent WHERE name = 'new'")
        await close_all()

        back = {"path": str(tmp_path / "back.db"), "init_sql": ""}
        with sqlite3.connect(tmp_path / "back.db") as connection:
            connection.executescript(SQLITE_SCHEMA.replace("doc TEXT", "doc TEXT, extra TEXT"))
        connection.close()
        configure({"database": {"sqlite": back, "postgresql": settings["database"]["postgresql"]}})
        report = await copy(target, source, tables=["parent", "child"])
        assert report.differing == []
        assert await source.fetch_value("SELECT count(*) FROM parent WHERE truth = 1") == (ROWS + 1) // 2
    finally:
        await close_all()


@pytest.mark.anyio
async def test_copy_goes_on_where_it_was_interrupted(settings: Any, engine: Any) -> None:
    """Interrupted in the middle and started again, it copies only what is missing; and later, only what is new."""
    configure(settings)
    source, target = find("sqlite:default"), find("postgresql:default")

    def interrupt(what: str, table: str, done: int, total: int) -> None:
        if table == "parent" and done >= 1000:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            await copy(source, target, chunk_size=500, progress=interrupt)
        assert engine.outside("SELECT count(*) FROM parent") == [(1000,)]
        report = await copy(source, target, chunk_size=500)
        copied = {table.name: table.copied for table in report.tables}
        assert copied == {"parent": ROWS - 1000, "child": 10, "keyless": 0, "pair": 0, "empty": 0}
        assert report.differing == []
        await source.execute("INSERT INTO child (parent_id) VALUES (5)")
        report = await copy(source, target)
        assert [table.copied for table in report.tables if table.copied] == [1]
        assert report.differing == []
    finally:
        await close_all()


@pytest.mark.anyio
async def test_copy_notices_what_differs(settings: Any) -> None:
    """A value that is not the same on both sides is found, whichever it is."""
    configure(settings)
    source, target = find("sqlite:default"), find("postgresql:default")
    try:
        await copy(source, target)
        await source.execute("UPDATE pair SET note = 'changed' WHERE a = '3' AND b = 4")
        assert (await copy(source, target)).differing == ["pair"]
    finally:
        await close_all()


@pytest.mark.anyio
async def test_copy_refuses_what_cannot_be_right(settings: Any) -> None:
    """A table that is missing, lacks a column, or holds rows that nobody has copied is an error before anything is done."""
    configure(settings)
    source, target = find("sqlite:default"), find("postgresql:default")
    try:
        with pytest.raises(errors.ConfigurationError, match="no table 'nowhere'"):
            await copy(source, target, tables=["nowhere"])
        await source.execute("CREATE TABLE only_here (id INTEGER PRIMARY KEY)")
        with pytest.raises(errors.ConfigurationError, match="only_here"):
            await copy(source, target)
        await source.execute("DROP TABLE only_here")
        await source.execute("ALTER TABLE child ADD COLUMN more TEXT")
        with pytest.raises(errors.ConfigurationError, match="more"):
            await copy(source, target)
        await target.execute("INSERT INTO keyless VALUES ('mine')")
        with pytest.raises(errors.ConfigurationError, match="not empty"):
            await copy(source, target, tables=["keyless"])
        with pytest.raises(errors.ConfigurationError, match="ENGINE:NAME"):
            find("oracle:default")
    finally:
        await close_all()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_copy_command(
    settings: Any, engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    """The command copies, shows progress on stderr and the outcome on stdout, and its status says whether all is well."""
    import yaml

    file = tmp_path / "database.yaml"
    file.write_text(yaml.safe_dump(settings))
    arguments = ["sqlite:default", "postgresql:default", "--config", str(file), "--backend", backend]
    try:
        assert main([*arguments, "--chunk-size", "1000"]) == 0
        out, err = capsys.readouterr()
        assert f"parent: {ROWS} rows copied, the same on both sides" in out
        assert f"copy parent: 1000 of {ROWS} rows" in err
        assert main([*arguments, "--table", "nowhere"]) == 2
        assert "nowhere" in capsys.readouterr().err
        assert engine.outside("SELECT count(*) FROM parent") == [(ROWS,)]
    finally:
        anyio.run(close_all)
        configure(None)
