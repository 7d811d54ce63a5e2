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
        with sqlite3.connect(tmp_path / "source.db") as connection:
            connection.execute("INSERT INTO pair VALUES ('a', 999, x'00')")
        connection.close()
        assert main([*arguments, "--table", "pair"]) == 1  # found under way, in one value
        assert "table 'pair', column 'note': a BLOB cannot become text" in capsys.readouterr().err
        assert engine.outside("SELECT count(*) FROM parent") == [(ROWS,)]
    finally:
        anyio.run(close_all)
        configure(None)


HARD = {
    "n numeric": ["12345678901234567890123456789.5", "0.10", "-0", "1e-20", "NaN"],
    "big bigint": ["-9223372036854775808", "9223372036854775807"],
    "truth boolean": ["true", "false"],
    "f double precision": ["0.1", "1e300", "-2", "Infinity"],
    "g double precision": ["NaN", "-0", "1.2345678901234568e+17", "5e-324", "-Infinity"],
    "t text": ['{"b": 1, "a": 2}', "2026-01-02T03:04:05+01:00", "1.10", "", " x "],
    "v varchar(9)": ["007", "1.0"],
    "c char(5)": ["ab"],
    "d bytea": ["\\x00ff", "\\x"],
    "doc jsonb": ["null", '"text"', "[]", '{"a": 1.10, "b": [null, {"c": 12345678901234567890123}]}', "7"],
    "raw json": ['{"b": 1,   "a": 1}', "null"],
    "i interval": ["1 year 2 days 03:04:05.5", "-1 mon"],
    "net inet": ["10.0.0.1/8", "::1"],
    "r int4range": ["[1,5)", "empty"],
    "at timestamptz": ["2026-01-02 03:04:05.123456+09", "infinity", "-infinity", "0044-03-15 00:00:00+00 BC"],
    "plain timestamp": ["2026-01-02 03:04:05", "infinity", "20000-01-01 00:00:00"],
    "day date": ["2026-01-02", "infinity", "0044-03-15 BC"],
    "clock time": ["24:00", "03:04:05.5"],
    "ids uuid[]": ["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11,NULL}", "{}"],
    "id uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "words text[]": ['{"a,b",NULL,"NULL"}'],
}
"""Columns of PostgreSQL, and values that do not survive a detour through what Python makes of them."""


def does(engine: Any, sql: str) -> None:
    """Something done on the server by somebody else."""
    from tests.postgresql.engine import oracle

    engine.outside("SELECT 1")  # sets the search path
    oracle().execute(sql)


@pytest.mark.anyio
async def test_copy_keeps_every_value(settings: Any, engine: Any, tmp_path: Path) -> None:
    """Values that Python or JSON would change go to SQLite and back as they were, and both comparisons say so."""
    names = [column.split()[0] for column in HARD]
    columns = ", ".join(HARD)
    does(
        engine,
        f"CREATE TABLE hard (k bigint PRIMARY KEY, {columns}); CREATE TABLE again (k numeric PRIMARY KEY, {columns})",
    )
    number = 0
    for name, values in zip(names, HARD.values(), strict=True):
        for value in values:
            does(engine, f"INSERT INTO hard (k, {name}) VALUES ({-number}, '{value}')")  # keys from 0 down
            number += 1
    with sqlite3.connect(tmp_path / "source.db") as connection:
        plain = ", ".join(
            f"{name} {'INTEGER' if name in ('big', 'truth') else 'REAL' if name == 'f' else 'TEXT'}" for name in names
        )
        connection.execute(f"CREATE TABLE hard (k INTEGER PRIMARY KEY, {plain})")
        connection.execute(f"CREATE TABLE again (k TEXT PRIMARY KEY, {plain})")
    connection.close()
    configure(settings)
    small, big = find("sqlite:default"), find("postgresql:default")
    try:
        assert (await copy(big, small, tables=["hard"], chunk_size=3)).differing == []
        assert (await copy(big, small, tables=["hard"])).tables[0].copied == 0
        await small.execute("INSERT INTO again SELECT * FROM hard")
        report = await copy(small, big, tables=["again"], chunk_size=4)
        assert (report.differing, report.tables[0].copied) == ([], number)
        texts = ", ".join(f"{name}::text" for name in names)
        there, back = (
            engine.outside(f"SELECT k::bigint, {texts} FROM {table} ORDER BY k") for table in ("hard", "again")
        )
        assert there == back
        await small.execute("CREATE TABLE once (k TEXT PRIMARY KEY)")
        does(
            engine, "CREATE TABLE once (k numeric PRIMARY KEY); INSERT INTO once SELECT * FROM generate_series(-5, 15)"
        )
        assert (await copy(big, small, tables=["once"], chunk_size=2)).differing == []
    finally:
        await close_all()


@pytest.mark.anyio
async def test_copy_compares_exactly(settings: Any, engine: Any) -> None:
    """What only looks alike, or was changed on its way into a column that cannot hold it, counts as different."""
    configure(settings)
    small, big = find("sqlite:default"), find("postgresql:default")
    cases = [  # PostgreSQL's type and value, SQLite's type and value, whether they are the same
        ("text", '{"a": 1, "b": 2}', "TEXT", '{"b": 2, "a": 1}', False),
        ("text", "2026-01-01 00:00:00+00:00", "TEXT", "2026-01-01 01:00:00+01:00", False),
        ("text", "1.0", "TEXT", "1.00", False),
        ("jsonb", '{"a": 1, "b": 2}', "TEXT", '{"b": 2, "a": 1}', True),
        ("jsonb", "null", "TEXT", None, False),
        ("jsonb", '"1"', "TEXT", "1", False),
        ("json", '{"a":1}', "TEXT", '{"a": 1}', False),
        ("numeric", "12345678901234567890123456789", "REAL", 12345678901234567890123456789.0, False),
        ("numeric", "0.5", "REAL", 0.5, True),
        ("double precision", "NaN", "REAL", None, False),
        ("integer", "2", "REAL", 2.0, True),
        ("bigint", "9007199254740993", "REAL", 9007199254740992.0, False),
        ("timestamptz", "2026-01-01 00:00:00+00", "TEXT", "2026-01-01 01:00:00+01:00", True),
        ("timestamp", "2026-01-01 01:00:00", "TEXT", "2026-01-01 01:00:00+01:00", False),
        ("timestamp", "2026-01-01 01:00:00", "TEXT", "2026-01-01 01:00:00.0000001", False),
        ("interval", "24:00:00", "TEXT", "24 hours", True),
        ("interval", "1 day", "TEXT", "24 hours", False),
        ("date", "2026-01-01", "TEXT", "not a day", False),
        ("boolean", "true", "INTEGER", 1, True),
        ("boolean", "true", "INTEGER", 2, False),
        ("text", "5", "INTEGER", 5, True),
    ]
    try:
        await small.execute("CREATE TABLE marks (name TEXT)")  # opens both
        for number, (kind, theirs, declared, ours, _) in enumerate(cases):
            does(engine, f"CREATE TABLE case{number} (v {kind}); INSERT INTO case{number} VALUES ('{theirs}')")
            await small.execute(f"CREATE TABLE case{number} (v {declared})")
            await small.execute(f"INSERT INTO case{number} VALUES (?)", (ours,))
        await big.execute_script(
            "CREATE TABLE _database_copy (source TEXT NOT NULL, name TEXT NOT NULL, last TEXT, done INTEGER NOT NULL,"
            " PRIMARY KEY (source, name));"
            f"INSERT INTO _database_copy SELECT 'sqlite3:default', 'case' || n, NULL, 1 FROM generate_series(0, {len(cases)}) n"
        )
        found = (await copy(small, big, tables=[f"case{number}" for number in range(len(cases))])).differing
        wrong = [case for number, case in enumerate(cases) if (f"case{number}" in found) is case[4]]
        assert wrong == []
    finally:
        await close_all()


@pytest.mark.anyio
async def test_copy_while_others_write(settings: Any, engine: Any, tmp_path: Path) -> None:
    """Parents and children that come in meanwhile, before and behind the last key, never break the copy; the next run has
    them.
    """
    configure(settings)
    source, target = find("sqlite:default"), find("postgresql:default")
    outside = sqlite3.connect(tmp_path / "source.db", isolation_level=None)
    outside.execute("DELETE FROM parent WHERE id IN (7, 1999)")
    outside.execute("DELETE FROM child")
    late = iter([7, 1999, ROWS + 1, ROWS + 2, ROWS + 3])

    def write(what: str, table: str, done: int, total: int) -> None:
        if table in ("parent", "pair") and what == "copy" and (number := next(late, None)) is not None:
            outside.execute("INSERT INTO parent (id, name) VALUES (?, 'late')", (number,))
            outside.execute("INSERT INTO child VALUES (?, ?, 'late')", (number, number))

    try:
        report = await copy(source, target, chunk_size=1000, progress=write)
        assert set(report.differing) == {"parent", "child"}
        assert engine.outside("SELECT count(*) FROM child") == [(0,)]
        report = await copy(source, target, chunk_size=1000)
        assert report.differing == []
        assert [table.copied for table in report.tables if table.copied] == [5, 5] or next(late, None) is not None
        assert engine.outside("SELECT id FROM child ORDER BY id LIMIT 2") == [(7,), (1999,)]
    finally:
        outside.close()
        await close_all()


@pytest.mark.anyio
async def test_copy_leaves_the_record_of_migrations_alone(settings: Any, engine: Any) -> None:
    """Both sides have a record of their own of the migrations that they have had, and neither stops the copy."""
    configure(settings)
    source, target = find("sqlite:default"), find("postgresql:default")
    try:
        for table in ("child", "parent", "pair"):  # what comes row by row need not be much
            await source.execute(f"DELETE FROM {table}")
        await source.execute("CREATE TABLE database_migrations (number INTEGER PRIMARY KEY)")
        await source.execute("CREATE TABLE nobody (id TEXT PRIMARY KEY, v TEXT)")
        await source.execute("INSERT INTO nobody VALUES (NULL, 'a'), (NULL, 'b'), ('c', 'c')")
        does(engine, "CREATE TABLE nobody (id TEXT, v TEXT)")
        report = await copy(source, target, chunk_size=1)
        assert report.differing == []
        assert {table.name: table.copied for table in report.tables}["nobody"] == 3
    finally:
        await close_all()


def test_copy_command_tells_failures_apart(settings: Any, engine: Any, tmp_path: Path) -> None:
    """What fails under way ends with 1 and a sentence, Ctrl-C with 130 and another; neither with a traceback."""
    import signal
    import subprocess
    import sys

    import yaml

    file = tmp_path / "database.yaml"
    file.write_text(yaml.safe_dump(settings))
    arguments = ["sqlite:default", "postgresql:default", "--config", str(file), "--chunk-size", "1"]
    with sqlite3.connect(tmp_path / "source.db") as connection:
        connection.execute("INSERT INTO child VALUES (999, 99999, 'an orphan')")
    connection.close()
    anyio.run(_open, settings)
    command = [sys.executable, "-c", _INTERRUPTIBLE, *arguments]
    done = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert done.stderr is not None
        for line in done.stderr:
            if line.startswith("copy"):
                break
        done.send_signal(signal.SIGINT)
        rest = done.communicate(timeout=30)[1]
        assert (done.wait(30), rest.splitlines()[-1:]) == (
            130,
            ["copy: interrupted; started again, it goes on from where it was"],
        )
        assert "Traceback" not in rest
    finally:
        done.kill()
        done.communicate()
    done = subprocess.run(
        [sys.executable, "-m", "database.copy", *arguments[:-1], "5000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "child_parent_id_fkey" in done.stderr
    assert "Traceback" not in done.stderr


_INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have left it ignored
from database.copy import main
sys.exit(main())
"""


async def _open(settings: Any) -> None:
    configure(settings)
    await find("postgresql:default").open()
    await close_all()


CIRCLES_SQLITE = """
CREATE TABLE tree (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES Tree (id), name TEXT,
    loud TEXT GENERATED ALWAYS AS (upper(name)) STORED);
CREATE TABLE person (id INTEGER PRIMARY KEY, team_id INTEGER NOT NULL REFERENCES team (id));
CREATE TABLE team (id INTEGER PRIMARY KEY, lead_id INTEGER NOT NULL REFERENCES person (id) DEFERRABLE, boss INTEGER
    REFERENCES boss (id));
CREATE TABLE boss (id INTEGER PRIMARY KEY);
CREATE TABLE badge (id INTEGER PRIMARY KEY, person_id INTEGER NOT NULL REFERENCES person (id));
"""
CIRCLES_POSTGRESQL = """
CREATE TABLE tree (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent_id BIGINT REFERENCES tree (id), name TEXT,
    loud TEXT GENERATED ALWAYS AS (upper(name)) STORED);
CREATE TABLE boss (id SERIAL PRIMARY KEY);
CREATE TABLE team (id SERIAL PRIMARY KEY, lead_id INT NOT NULL, boss INT REFERENCES boss (id));
CREATE TABLE person (id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, team_id INT NOT NULL REFERENCES team (id));
ALTER TABLE team ADD CONSTRAINT leads FOREIGN KEY (lead_id) REFERENCES person (id);
CREATE TABLE badge (id SERIAL PRIMARY KEY, person_id BIGINT NOT NULL REFERENCES person (id));
"""


@pytest.mark.anyio
async def test_copy_of_tables_that_refer_to_themselves_and_in_a_circle(engine: Any, tmp_path: Path) -> None:
    """Children before their parents, over several chunks, with constraints that do not wait: there and back, and the
    constraints, identities, sequences and generated columns are as they were.
    """
    path, back = tmp_path / "circles.db", tmp_path / "back.db"
    for each in (path, back):
        with sqlite3.connect(each) as connection:
            connection.executescript(CIRCLES_SQLITE)
        connection.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.executemany(
            "INSERT INTO tree (id, parent_id, name) VALUES (?, ?, ?)",
            [(n, n + 1 if n < 500 else None, f"node {n}") for n in range(1, 501)],
        )
        connection.executemany("INSERT INTO person VALUES (?, ?)", [(n, 301 - n) for n in range(1, 301)])
        connection.executemany("INSERT INTO team VALUES (?, ?, ?)", [(n, n, n % 7 + 1) for n in range(1, 301)])
        connection.executemany("INSERT INTO boss VALUES (?)", [(n,) for n in range(1, 8)])
        connection.executemany("INSERT INTO badge VALUES (?, ?)", [(n, n) for n in range(1, 301)])
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    postgresql = engine.settings()["database"]["postgresql"]
    does(engine, CIRCLES_POSTGRESQL)
    constraints = (
        "SELECT conname, condeferrable, condeferred, convalidated FROM pg_constraint WHERE contype = 'f'"
        " AND connamespace = current_schema()::regnamespace ORDER BY 1"
    )
    before = engine.outside(constraints)
    for source, target, database in (("sqlite", "postgresql", path), ("postgresql", "sqlite", back)):
        configure({"database": {"sqlite": {"path": str(database), "init_sql": ""}, "postgresql": postgresql}})
        try:
            report = await copy(find(source), find(target), chunk_size=100)
            assert report.differing == []
            assert {table.name: table.copied for table in report.tables} == {
                "tree": 500, "person": 300, "team": 300, "boss": 7, "badge": 300,
            }  # fmt: skip
            again = await copy(find(source), find(target), chunk_size=100)
            assert (again.differing, sum(table.copied for table in again.tables)) == ([], 0)
            if target == "postgresql":
                assert engine.outside(constraints) == before
                assert engine.outside("SELECT loud FROM tree WHERE id = 7") == [("NODE 7",)]
                for table, columns, key in (("tree", "name", 501), ("boss", "", 8), ("badge", "person_id", 301)):
                    insert = (
                        f"INSERT INTO {table} ({columns}) VALUES (1)"
                        if columns
                        else f"INSERT INTO {table} DEFAULT VALUES"
                    )
                    assert await find(target).fetch_value(f"{insert} RETURNING id") == key
                    await find(target).execute(f"DELETE FROM {table} WHERE id = {key}")
        finally:
            await close_all()
    with sqlite3.connect(back) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*), max(loud) FROM tree").fetchall() == [(500, "NODE 99")]
    connection.close()


@pytest.mark.anyio
async def test_copy_of_a_circle_is_whole_or_not_at_all(engine: Any, tmp_path: Path) -> None:
    """A row of a circle whose parent is missing: nothing of the circle is kept, and what does not belong to it is."""
    path = tmp_path / "circles.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(CIRCLES_SQLITE)
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("INSERT INTO boss VALUES (1)")
        connection.execute("INSERT INTO team VALUES (1, 1, 1)")
        connection.execute("INSERT INTO person VALUES (1, 2)")
    connection.close()
    does(engine, CIRCLES_POSTGRESQL)
    postgresql = engine.settings()["database"]["postgresql"]
    configure({"database": {"sqlite": {"path": str(path), "init_sql": ""}, "postgresql": postgresql}})
    try:
        with pytest.raises(errors.IntegrityError):
            await copy(find("sqlite"), find("postgresql"))
        counted = "SELECT (SELECT count(*) FROM boss), (SELECT count(*) FROM team), (SELECT count(*) FROM person)"
        assert engine.outside(counted) == [(1, 0, 0)]
    finally:
        await close_all()
