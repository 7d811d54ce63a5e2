"""What belongs to a connection belongs to every one of them: readers, the writer, and those that take another's place."""

from __future__ import annotations

import importlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors
from database.driver import room
from database.sqlite3 import opening
from tests.contract.support import gather

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

KEY = "it's a 'secret' word"


@pytest.fixture(params=["sqlite3"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """SQLite alone."""
    from tests.conftest import alone

    with alone("sqlite3", tmp_path) as engine:
        yield engine


def drop_in(*names: str) -> str:
    """The first of these that is installed."""
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return name
    pytest.skip(f"needs {' or '.join(names)}")


def with_extensions() -> str:
    """A module that can load extensions: this Python's own, if it was built so, or a drop-in."""
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        return "sqlite3"
    return drop_in("pysqlite3", "sqlcipher3")


async def everywhere(db: Any, sql: str, readers: int = 2) -> list[Any]:
    """A value as the writer and each reader have it; the readers are kept busy, so that each takes its turn."""
    found = [await db.run(lambda connection: connection.execute(sql).fetchone()[0])]
    taken: list[Any] = []
    all_taken = anyio.Event()

    async def read() -> None:
        async with db.transaction(readonly=True):
            taken.append(await db.fetch_value(sql))
            if len(taken) == readers:
                all_taken.set()
            await all_taken.wait()

    with anyio.fail_after(30):
        await gather(*(read for _ in range(readers)))
    return [*found, *taken]


async def test_pragmas(make_db: Any) -> None:
    """More PRAGMAs hold on every connection, also on one that takes the place of another, beside the package's own."""
    db = await make_db(
        pragmas={
            "mmap_size": 1 << 20,
            "temp_store": "memory",
            "Recursive_Triggers": True,
            "case_sensitive_like": "on",
            "cache_spill": True,
            "secure_delete": "FAST",
            "journal_size_limit": -1,
        },
        wal_autocheckpoint=123,
    )
    wanted = {
        "PRAGMA mmap_size": 1 << 20,
        "PRAGMA temp_store": 2,
        "PRAGMA recursive_triggers": 1,
        "PRAGMA secure_delete": 2,
        "PRAGMA wal_autocheckpoint": 123,
        "PRAGMA foreign_keys": 1,
        "SELECT 'a' LIKE 'A'": 0,
    }
    for sql, value in wanted.items():
        assert await everywhere(db, sql) == [value] * 3, sql
    async with db.transaction():  # what holds for a transaction ends with it
        await db.execute("PRAGMA recursive_triggers = OFF")
        await db.execute("PRAGMA mmap_size = 0")
        await db.execute("CREATE TEMP TABLE mine (x)")
        assert await db.fetch_value("PRAGMA mmap_size") == 0
    for sql, value in wanted.items():
        assert await everywhere(db, sql) == [value] * 3, sql


async def test_a_pragma_that_does_not_take(make_db: Any) -> None:
    """What SQLite makes something else of is an error that names it."""
    with pytest.raises(errors.ConnectionFailedError, match=r"PRAGMA mmap_size did not take: it is \d+"):
        await make_db(pragmas={"mmap_size": 1 << 62})


async def test_attach(make_db: Any, engine: Any) -> None:
    """Attached files are there on every connection, made by the writer with their folders, and one transaction takes in
    all of them; readers cannot write to them."""
    archive = engine.directory / "deep" / "down" / "archive.db"
    db = await make_db(attach={"archive": str(archive)}, pool_size=2)
    assert os.name != "posix" or archive.stat().st_mode & 0o077 == 0
    await db.execute("CREATE TABLE archive.old (id INTEGER PRIMARY KEY, value TEXT)")
    await db.execute("INSERT INTO item (id, value) VALUES (1, 'one'), (2, 'two')")
    async with db.transaction():
        await db.execute("INSERT INTO archive.old SELECT id, value FROM item WHERE id = 1")
        await db.execute("DELETE FROM item WHERE id = 1")
    joined = "SELECT (SELECT count(*) FROM item) || ' ' || (SELECT group_concat(value) FROM archive.old)"
    assert await everywhere(db, joined) == ["1 one"] * 3
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            await db.execute("INSERT INTO archive.old VALUES (3, 'three')")
            await db.execute("DELETE FROM item")
            raise ZeroDivisionError
    assert await everywhere(db, joined) == ["1 one"] * 3
    assert await everywhere(db, "PRAGMA archive.journal_mode") == ["wal"] * 3
    assert await everywhere(db, "PRAGMA archive.synchronous") == [0] * 3
    async with db.transaction(readonly=True):
        with pytest.raises(errors.ReadOnlyTransactionError):
            await db.execute("DELETE FROM archive.old")
    with pytest.raises(errors.DatabaseError, match="read"):  # past the package's own look at the text
        await db.run(lambda connection: connection.execute("DELETE FROM archive.old"), readonly=True)
    with pytest.raises(errors.ConnectionFailedError, match="in use"):  # the file is known to be open
        await db.backup(archive)
    await db.close()
    outside = sqlite3.connect(archive)
    assert outside.execute("SELECT value FROM old").fetchall() == [("one",)]
    outside.close()
    assert not Path(f"{archive}-wal").exists()


async def test_attached_to_two(make_db: Any, engine: Any) -> None:
    """Where a file is a database of its own as well, nobody in this process sees it locked: writers take turns."""
    path = engine.path("audit")
    db = await make_db(attach={"audit": str(path)}, busy_timeout=0, audit={"attach": {}})
    audit = engine.public.get_db("audit")
    await audit.execute("CREATE TABLE note (text)")

    async def write(handle: Any, table: str) -> None:
        for number in range(20):
            async with handle.transaction():
                await handle.execute(f"INSERT INTO {table} VALUES (?)", (number,))
                await anyio.sleep(0)

    with anyio.fail_after(30):
        await gather(lambda: write(db, "audit.note"), lambda: write(audit, "note"), lambda: write(db, "audit.note"))
    assert await db.fetch_value("SELECT count(*) FROM audit.note") == 60


async def test_what_is_attached_is_looked_after(make_db: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of an attached file is kept as short as the database's own; and a key of its tables that is checked with the
    commit is checked for each member of a group by itself.
    """
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.005)
    archive = engine.directory / "archive.db"
    db = await make_db(attach={"archive": str(archive)}, pool_size=2, wal_limit=1)
    await db.execute_script("CREATE TABLE archive.old (id INTEGER PRIMARY KEY, value TEXT)")
    await db.execute_many("INSERT INTO archive.old VALUES (?, ?)", [(n, "x" * 1000) for n in range(300)])
    done = False

    async def read(number: int) -> None:
        await anyio.sleep(number * 0.003)
        while not done:
            async with db.transaction(readonly=True):
                await db.fetch_value("SELECT count(*) FROM archive.old")
                await anyio.sleep(0.006)

    sizes: list[int] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(read, 0)
            group.start_soon(read, 1)
            for number in range(60):
                await db.execute("UPDATE archive.old SET value = ?", (chr(97 + number % 26) * 1000,))
                sizes.append(Path(f"{archive}-wal").stat().st_size)
            done = True
    assert max(sizes) < 8 * 2**20, [size // 1024 for size in sizes]

    outside = sqlite3.connect(archive)  # somebody else makes the tables, and later
    outside.executescript(
        "CREATE TABLE mother (id INTEGER PRIMARY KEY);"
        "CREATE TABLE daughter (mother INTEGER REFERENCES mother DEFERRABLE INITIALLY DEFERRED)"
    )
    outside.close()
    neighbour = "INSERT INTO item (value) VALUES ('neighbour')"
    found = await gather(
        lambda: db.execute(neighbour),
        lambda: db.execute("INSERT INTO archive.daughter VALUES (5)"),
        lambda: db.execute("INSERT INTO archive.mother VALUES (7)"),
        lambda: db.execute(neighbour),
    )
    assert [type(each).__name__ for each in found] == ["Result", "IntegrityError", "Result", "Result"]


async def test_attach_what_cannot_be(make_db: Any, engine: Any) -> None:
    """A file that is none is named, with the name that it was to have."""
    broken = engine.directory / "broken.db"
    broken.write_bytes(b"no database" * 100)
    with pytest.raises(errors.ConnectionFailedError, match="attached as 'archive': it is not an SQLite database"):
        await make_db(attach={"archive": str(broken)})
    (engine.directory / "folder").mkdir()
    with pytest.raises(errors.ConnectionFailedError, match="it is a directory"):
        await make_db(attach={"archive": str(engine.directory / "folder")})


def prepare(connection: Any) -> None:
    """For `on_connect`: REGEXP, and a collation that goes by the alphabet, not by the code."""
    connection.create_function("regexp", 2, lambda pattern, text: re.search(pattern, text) is not None)
    connection.create_collation("alphabet", alphabetically)


def alphabetically(one: str, other: str) -> int:
    one, other = (text.casefold().replace("ä", "a") for text in (one, other))
    return (one > other) - (one < other)


def explode(connection: Any) -> None:
    raise ValueError("something is wrong")


not_a_function = 5


async def test_on_connect(make_db: Any, engine: Any) -> None:
    """A function of the configuration's, one of `configure`'s and one of the handle's, in this order, prepare every
    connection on its own thread: REGEXP, a collation in an index, an aggregate."""
    calls: list[tuple[str, str, bool]] = []

    def second(connection: Any) -> None:
        assert connection.execute("SELECT 'abc' REGEXP 'b'").fetchone()[0] == 1
        calls.append(("second", threading.current_thread().name, isinstance(connection, sqlite3.Connection)))

    class Longest:
        def __init__(self) -> None:
            self.found = ""

        def step(self, value: str) -> None:
            self.found = max(self.found, value, key=len)

        def finalize(self) -> str:
            return self.found

    await engine.public.close_all()
    settings = engine.settings(on_connect=f"{__name__}:prepare")
    engine.public.configure(settings, on_connect=second)
    db = engine.public.get_db("default")

    @db.on_connect
    def third(connection: Any) -> None:
        connection.create_aggregate("longest", 1, Longest)
        calls.append(("third", threading.current_thread().name, True))

    try:
        await db.execute("CREATE TABLE word (text TEXT)")
        await db.execute("CREATE INDEX word_text ON word (text COLLATE alphabet)")
        await db.execute_many("INSERT INTO word VALUES (?)", [("Zebra",), ("Äpfel",), ("apfelbaum",), ("birne",)])
        ordered = "SELECT group_concat(text) FROM (SELECT text FROM word ORDER BY text COLLATE alphabet)"
        assert await everywhere(db, ordered) == ["Äpfel,apfelbaum,birne,Zebra"] * 3
        assert (
            "word_text"
            in (await db.fetch_one("EXPLAIN QUERY PLAN SELECT text FROM word ORDER BY text COLLATE alphabet"))["detail"]
        )
        assert await everywhere(db, "SELECT longest(text) FROM word WHERE text REGEXP '^[a-z]'") == ["apfelbaum"] * 3
        threads = ["database-default-writer", "database-default-reader-1", "database-default-reader-2"]
        assert sorted(calls) == sorted((name, thread, True) for name in ("second", "third") for thread in threads)
        assert [name for name, thread, _ in calls if thread == threads[0]] == ["second", "third"]
        calls.clear()
        async with db.transaction():  # the connection is exchanged at its end
            await db.execute("CREATE TEMP TABLE mine (x)")
        assert [name for name, *_ in calls] == ["second", "third"]
        assert await everywhere(db, "SELECT 'abc' REGEXP '^a'") == [1] * 3
        with pytest.raises(errors.ConfigurationError, match="is open"):
            db.on_connect(prepare)
    finally:
        await db.close()
        db.binding.declared.steps.clear()


async def test_on_connect_that_fails(make_db: Any, engine: Any) -> None:
    """Whatever a function does wrong is a ConnectionFailedError that names it, for readers as for the writer; what is no
    function is a ConfigurationError."""

    def leaves(connection: Any) -> None:
        connection.execute("BEGIN")

    def leaving(connection: Any) -> None:
        raise SystemExit(3)

    def only_readers(connection: Any) -> None:
        if threading.current_thread().name.startswith("database-default-reader"):
            raise KeyError("reader")

    async def asynchronous(connection: Any) -> None:
        pass

    lazy: Any = lambda connection: asynchronous(connection)  # noqa: E731
    for function, message in (
        (explode, "on_connect: explode raised ValueError: something is wrong"),
        (leaves, "leaves left a transaction open"),
        (leaving, "leaving raised SystemExit"),
        (lazy, "is a coroutine function"),
        (f"{__name__}:explode", "on_connect: explode raised ValueError"),
    ):
        with pytest.raises(errors.ConnectionFailedError, match=re.escape(message)) as caught:
            await make_db(on_connect=function)
        if "ValueError" in message:
            assert isinstance(caught.value.__cause__, ValueError)
    db = await make_db(on_connect=only_readers)
    await db.execute("INSERT INTO item (value) VALUES ('x')")
    with pytest.raises(errors.ConnectionFailedError, match=r"only_readers raised KeyError: 'reader'"):
        await db.fetch_all("SELECT * FROM item")
    for function in (f"{__name__}:nothing", f"{__name__}:not_a_function", "tests.nothing:x"):
        with pytest.raises(errors.ConfigurationError, match="on_connect"):
            await make_db(on_connect=function)
    for function in (asynchronous, 5):
        with pytest.raises(errors.ConfigurationError, match="on_connect"):
            engine.public.configure(engine.settings(), on_connect=function)


async def test_memory(make_db: Any) -> None:
    """A database in memory has prepared connections, too."""
    db = await make_db(path=":memory:", schema=False, on_connect=prepare, pragmas={"recursive_triggers": True})
    assert await everywhere(db, "SELECT 'abc' REGEXP 'c$'") == [1] * 3
    assert await everywhere(db, "PRAGMA recursive_triggers") == [1] * 3


async def test_nearest_neighbours(make_db: Any) -> None:
    """sqlite-vec: fifty tasks at once ask all readers for the nearest of a hundred vectors; no SQL loads another one."""
    pytest.importorskip("sqlite_vec")
    db = await make_db(module=with_extensions(), extensions=["sqlite_vec"], pool_size=4)
    await db.execute("CREATE VIRTUAL TABLE place USING vec0(position float[2])")
    await db.execute_many(
        "INSERT INTO place (rowid, position) VALUES (?, ?)", [(n, json.dumps([n, n % 10])) for n in range(1, 101)]
    )
    nearest = "SELECT rowid FROM place WHERE position MATCH :at AND k = 3 ORDER BY distance"
    answers: dict[int, list[int]] = {}

    async def ask(n: int) -> None:
        async with db.transaction(readonly=True):
            rows = await db.fetch_all(nearest, {"at": json.dumps([n, n % 10])})
            answers[n] = [row["rowid"] for row in rows]

    with anyio.fail_after(60):
        await gather(*(lambda n=n: ask(n) for n in range(20, 70)))
    assert {n: found[0] for n, found in answers.items()} == {n: n for n in range(20, 70)}
    assert await everywhere(db, "SELECT vec_version() LIKE 'v%'", readers=4) == [1] * 5
    for readonly in (True, False):
        with pytest.raises(errors.DatabaseError, match="not authorized"):
            await db.run(lambda connection: connection.execute("SELECT load_extension('x')"), readonly=readonly)


async def test_an_extension_that_cannot_be_loaded(make_db: Any, engine: Any) -> None:
    """It is named; so is a package that brings none."""
    file = engine.directory / "nothing.so"
    file.write_bytes(b"no library")
    module = with_extensions()
    with pytest.raises(errors.ConnectionFailedError, match=f"the extension '{re.escape(str(file))}' cannot be loaded"):
        await make_db(module=module, extensions=[str(file)])
    with pytest.raises(errors.ConfigurationError, match=r"'json' does not say where its extension is"):
        await make_db(module=module, extensions=["json"])


def test_a_python_that_loads_no_extensions(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said so, with the setting that helps, before anything is opened."""
    from database.sqlite3.library import Library

    monkeypatch.setattr(Library, "loads_extensions", property(lambda self: False))
    with pytest.raises(errors.ConfigurationError, match=r"sqlite\.extensions: .*built without.*module: pysqlite3"):
        engine.public.configure(engine.settings(extensions=["json"]))


@pytest.mark.parametrize("module", ["pysqlite3", "sqlcipher3"])
async def test_a_drop_in(module: str, make_db: Any, engine: Any) -> None:
    """With a drop-in for sqlite3, rows, errors, streams, functions, transactions and backups are as ever."""
    drop_in(module)
    library = importlib.import_module(module)
    db = await make_db(module=module)
    assert await everywhere(db, "SELECT sqlite_version()") == [library.sqlite_version] * 3
    await db.execute_many("INSERT INTO item (id, value) VALUES (?, ?)", [(n, f"v{n}") for n in range(1, 101)])
    rows = await db.fetch_all("SELECT id, value FROM item ORDER BY id")
    assert [dict(row) for row in rows] == [{"id": n, "value": f"v{n}"} for n in range(1, 101)]
    assert repr(rows[0]) == "Row(id=1, value='v1')"
    assert isinstance(rows[0], library.Row)
    async with db.stream("SELECT id FROM item ORDER BY id", chunk_size=7) as stream:
        assert [row["id"] async for row in stream] == list(range(1, 101))
    await db.execute("INSERT INTO item (id, value) VALUES (:id, :value)", dict(rows[0]) | {"id": 500})
    await db.execute("UPDATE item SET value = 'x' WHERE id = :id AND value = :value", rows[1])
    assert await db.fetch_value("SELECT value FROM item WHERE id = 2") == "x"
    with pytest.raises(errors.IntegrityError, match="UNIQUE") as caught:
        await db.execute("INSERT INTO item (id, value) VALUES (1, 'again')")
    assert isinstance(caught.value.__cause__, library.IntegrityError)
    with pytest.raises(errors.QueryExecutionError, match="no such table"):
        await db.fetch_all("SELECT * FROM no_table")
    with pytest.raises(errors.ReadOnlyTransactionError):
        await db.run(lambda connection: connection.execute("DELETE FROM item"), readonly=True)
    with pytest.raises(errors.IntegrityError):
        await db.run(function_that_fails)
    assert await db.run(lambda connection: connection.execute("SELECT count(*) FROM item").fetchone()[0]) == 101
    with anyio.move_on_after(0.1):
        await db.fetch_value("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n")
    copy = engine.directory / "copy.db"
    await db.backup(copy)
    outside = sqlite3.connect(copy)
    assert outside.execute("SELECT count(*) FROM item").fetchone() == (101,)
    outside.close()
    locker = library.connect(
        str(engine.path()), isolation_level=None
    )  # POSIX locks do not tell two libraries of one process apart
    try:
        locker.execute("BEGIN IMMEDIATE")
        db = await make_db(module=module, schema=False, busy_timeout=50)
        with pytest.raises(errors.DatabaseBusyError):
            await db.execute("INSERT INTO item (value) VALUES ('waits')")
        locker.execute("COMMIT")
        await db.execute("INSERT INTO item (value) VALUES ('waits')")
    finally:
        locker.close()


def function_that_fails(connection: Any) -> None:
    connection.execute("INSERT INTO item (id, value) VALUES (900, 'gone')")
    connection.execute("INSERT INTO item (id, value) VALUES (1, 'again')")


@pytest.fixture
def few_rounds() -> Iterator[None]:
    """A key for what is attached is made in fewer rounds, too: by default it takes longer than all else."""
    outside = importlib.import_module(drop_in("sqlcipher3")).connect(":memory:")
    ((rounds,),) = outside.execute("PRAGMA cipher_default_kdf_iter").fetchall()
    outside.execute("PRAGMA cipher_default_kdf_iter = 2000")
    yield
    outside.execute(f"PRAGMA cipher_default_kdf_iter = {rounds}")
    outside.close()


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize("place", ["key_env", "key_file"])
async def test_encryption(
    place: str, make_db: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    """SQLCipher: what is written cannot be read without the key, by its file, its backup or what is attached; it can be
    read with it, migrated and backed up; a wrong key is told, and no key is ever shown."""
    drop_in("sqlcipher3")
    caplog.set_level("DEBUG")
    if place == "key_env":
        monkeypatch.setenv("TEST_KEY", KEY)
        encrypted = {"module": "sqlcipher3", "key_env": "TEST_KEY"}
    else:
        file = engine.directory / "key"
        file.write_text(KEY + "\n")
        encrypted = {"module": "sqlcipher3", "key_file": str(file)}
    encrypted["pragmas"] = {"kdf_iter": 1000, "cipher_page_size": 8192}
    encrypted["attach"] = {"archive": str(engine.directory / "archive.db")}
    migrations = engine.directory / "migrations"
    migrations.mkdir()
    (migrations / "0001_note.sql").write_text("CREATE TABLE note (text TEXT);\n")
    db = await make_db(**encrypted, migrations=str(migrations))
    await db.migrate()
    await db.execute("INSERT INTO note VALUES ('plain text to be found')")
    await db.execute("CREATE TABLE archive.old AS SELECT * FROM note")
    assert await everywhere(db, "SELECT text FROM note") == ["plain text to be found"] * 3
    assert await everywhere(db, "SELECT text FROM archive.old") == ["plain text to be found"] * 3
    copy = engine.directory / "copy.db"
    await db.backup(copy)
    await engine.public.close_all()
    for written in (engine.path(), copy, engine.directory / "archive.db"):
        data = written.read_bytes()
        assert not data.startswith(b"SQLite format 3"), written
        assert b"plain text" not in data, written
        with pytest.raises(sqlite3.DatabaseError):
            outside = sqlite3.connect(written)
            try:
                outside.execute("SELECT * FROM sqlite_master")
            finally:
                outside.close()
    db = await make_db(**encrypted, schema=False)  # opened again
    assert await everywhere(db, "SELECT text FROM note") == ["plain text to be found"] * 3
    db = await make_db(**encrypted | {"path": str(copy)}, schema=False)
    assert await db.fetch_value("SELECT text FROM note") == "plain text to be found"
    await engine.public.close_all()
    if place == "key_env":
        monkeypatch.setenv("TEST_KEY", "another")
    else:
        file.write_text("another")
    texts: list[str] = []
    with pytest.raises(errors.ConnectionFailedError, match="the key does not fit") as caught:
        await (await make_db(**encrypted, schema=False)).open()
    texts.append(repr(caught.value) + str(caught.value.__cause__))
    with pytest.raises(errors.ConnectionFailedError, match="or it is encrypted: then name its key") as caught:
        await (await make_db(schema=False)).open()
    plain = engine.directory / "plain.db"
    outside = sqlite3.connect(plain)
    outside.execute("CREATE TABLE t (x)")
    outside.close()
    with pytest.raises(errors.ConnectionFailedError, match="it is not encrypted, but"):
        await (await make_db(**encrypted | {"path": str(plain), "attach": {}}, schema=False)).open()
    if place == "key_env":
        for value, message in ((None, "is not set"), ("", "is empty")):
            monkeypatch.delenv("TEST_KEY") if value is None else monkeypatch.setenv("TEST_KEY", value)
            with pytest.raises(errors.ConnectionFailedError, match=f"key_env names {message}"):
                await (await make_db(**encrypted, schema=False)).open()
    else:
        file.write_text("\n")
        with pytest.raises(errors.ConnectionFailedError, match="key_file is empty"):
            await (await make_db(**encrypted, schema=False)).open()
        file.unlink()
        with pytest.raises(errors.ConnectionFailedError, match="key_file cannot be read"):
            await (await make_db(**encrypted, schema=False)).open()
    await engine.public.close_all()
    texts += [caplog.text, *map(repr, caplog.records), *capfd.readouterr()]
    assert not [text for text in texts if "secret" in text or "another" in text]


def test_encryption_without_sqlcipher(engine: Any) -> None:
    """A key for an SQLite that cannot encrypt is a mistake of the configuration."""
    for module in ("sqlite3", "pysqlite3"):
        if importlib.util.find_spec(module) is not None:
            with pytest.raises(errors.ConfigurationError, match=r"key_env: encryption needs SQLCipher.*sqlcipher3"):
                engine.public.configure(engine.settings(module=module, key_env="TEST_KEY"))


def test_connections_for_tools(engine: Any) -> None:
    """What looks at a database without a pool has the same connection: `open_prepared`, and `look` at any journal mode."""
    settings = engine_settings(engine, on_connect=prepare, pragmas={"recursive_triggers": True})
    session = opening.open_connection(settings, settings.path, "writer", lambda: False)
    session.close()
    for readonly in (True, False):
        raw = opening.open_prepared(settings, settings.path, readonly=readonly)
        assert raw.execute("SELECT 'abc' REGEXP 'b'").fetchone()[0] == 1
        assert raw.execute("PRAGMA recursive_triggers").fetchone()[0] == 1
        raw.close()
    outside = sqlite3.connect(settings.path)
    outside.execute("PRAGMA journal_mode = DELETE")
    outside.close()
    raw = opening.look(settings, settings.path)
    assert raw.execute("SELECT 'abc' REGEXP 'b'").fetchone()[0] == 1
    raw.close()
    assert opening.journal_mode(settings, settings.path) == "DELETE"


def engine_settings(engine: Any, **more: Any) -> Any:
    from database import settings

    return settings.read(engine.settings(**more)).engines["sqlite3"]["default"]


async def test_dicts_and_lists(make_db: Any) -> None:
    """They raise an error that says how to store them, until it is said; then a list goes into `json_each` as it is."""
    db = await make_db()
    for value in ({"a": 1}, [1, 2], (1, 2), {1}):
        with pytest.raises(errors.QueryExecutionError, match=r"db\.adapt\((dict|list|tuple|set), json\.dumps\)"):
            await db.execute("INSERT INTO item (value) VALUES (?)", (value,))
    try:
        db.adapt(list, json.dumps)
        await db.execute("INSERT INTO item (id) VALUES (1), (2), (3), (4)")
        found = "SELECT count(*) FROM item WHERE id IN (SELECT value FROM json_each(:ids))"
        assert await db.fetch_value(found, {"ids": [1, 2, 3]}) == 3
    finally:
        db.binding.declared.adapters.clear()


async def test_on_connect_cannot_undo_the_configuration(make_db: Any, engine: Any) -> None:
    """What the configuration says holds behind `on_connect`, too: what changes it there is an error that names it; and a
    connection that it has closed is told.
    """
    for sql, message in (
        ("PRAGMA foreign_keys = OFF", "on_connect has changed a setting: PRAGMA foreign_keys is now 0 instead of True"),
        ("PRAGMA cache_size = 10", "PRAGMA cache_size is now 10"),
        ("PRAGMA recursive_triggers = OFF", "PRAGMA recursive_triggers is now 0"),
        ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA locking_mode is now 'exclusive'"),
        ("PRAGMA query_only = ON", "PRAGMA query_only is now 1"),
        ("DETACH archive", "on_connect has detached 'archive'"),
    ):

        def step(connection: Any, sql: str = sql) -> None:
            connection.execute(sql)
            connection.text_factory = bytes

        with pytest.raises(errors.ConnectionFailedError, match=re.escape(message)):
            await make_db(
                on_connect=step,
                pragmas={"recursive_triggers": True},
                attach={"archive": str(engine.directory / "a.db")},
            )
    with pytest.raises(errors.ConnectionFailedError, match="on_connect: .*lambda.* closed the connection"):
        await make_db(on_connect=lambda connection: connection.close())


async def test_what_on_connect_leaves_behind(make_db: Any) -> None:
    """Row factory, isolation level and cursors that it leaves do no harm; a text factory is kept, and foreign keys that are
    checked with the commit still give each its own transaction.
    """
    left: list[Any] = []

    def step(connection: Any) -> None:
        connection.row_factory = lambda _cursor, row: {"mine": row}
        connection.isolation_level = "DEFERRED"
        connection.text_factory = bytes
        left.append(connection.execute("SELECT 1 UNION SELECT 2"))
        left[-1].fetchone()

    db = await make_db(on_connect=step)
    await db.execute("INSERT INTO item (value) VALUES ('a')")
    assert [tuple(row) for row in await db.fetch_all("SELECT value FROM item")] == [(b"a",)]
    with pytest.raises(errors.TransactionError):
        left[0].fetchone()

    async def orphan() -> None:
        with pytest.raises(errors.IntegrityError):
            await db.execute("INSERT INTO child (id, parent_id) VALUES (1, 7)")

    await gather(
        orphan, *(lambda n=n: db.execute("INSERT INTO item (id, value) VALUES (?, 'b')", (n,)) for n in range(10, 30))
    )
    assert await db.fetch_value("SELECT count(*) FROM item") == 21


async def test_the_second_reader_fails(make_db: Any) -> None:
    """A connection that cannot be prepared fails who needed it, and nobody else; the next try may succeed."""
    threads: list[str] = []

    def step(connection: Any) -> None:
        threads.append(threading.current_thread().name)
        if len([name for name in threads if "reader" in name]) == 2:
            raise ValueError("the second")

    db = await make_db(on_connect=step)
    found: list[Any] = []
    both = anyio.Event()

    async def read() -> None:
        try:
            async with db.transaction(readonly=True):
                found.append(await db.fetch_value("SELECT count(*) FROM item"))
                await both.wait()
        except errors.ConnectionFailedError as error:
            found.append(type(error))
            both.set()

    with anyio.fail_after(30):
        await gather(read, read)
    assert sorted(found, key=str) == [0, errors.ConnectionFailedError]
    assert await everywhere(db, "SELECT count(*) FROM item") == [0] * 3


async def test_a_writer_that_was_spoilt(make_db: Any, engine: Any) -> None:
    """After functions of the user's have changed the writer, it is again what the configuration says."""
    db = await make_db(
        on_connect=prepare, pragmas={"recursive_triggers": True}, attach={"archive": str(engine.directory / "a.db")}
    )
    await db.execute("CREATE TABLE archive.old (id INTEGER)")

    def spoil(connection: Any) -> None:
        connection.create_function("regexp", 2, lambda *_: 77)
        connection.execute("PRAGMA recursive_triggers = OFF")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("CREATE TEMP TABLE old (id INTEGER)")

    state = "SELECT ('abc' REGEXP 'b') || (SELECT recursive_triggers FROM pragma_recursive_triggers)"
    state += " || (SELECT count(*) FROM archive.old) || (SELECT temp_store FROM pragma_temp_store)"
    for _ in range(2):
        await db.run(spoil)
        assert await everywhere(db, state) == ["1100"] * 3


async def test_a_connection_that_cannot_be_replaced(make_db: Any, engine: Any) -> None:
    """What was committed is committed. The statement behind it says why there is no connection, no file is made anew in the
    place of one that has gone, and when all is in order again, it goes on.
    """
    archive = engine.directory / "archive.db"
    away = engine.directory / "away.db"
    db = await make_db(attach={"archive": str(archive)})
    await db.execute("CREATE TABLE archive.old (id INTEGER)")
    await db.execute("PRAGMA archive.wal_checkpoint(TRUNCATE)")  # so that all of it is in the file that goes
    archive.rename(away)
    async with db.transaction():
        await db.execute("INSERT INTO item (value) VALUES ('kept')")
        await db.execute("CREATE TEMP TABLE mine (x)")
    for _ in range(2):
        with pytest.raises(errors.ConnectionFailedError) as caught:
            await db.execute("INSERT INTO archive.old VALUES (1)")
        assert caught.value.path == str(archive)
    assert not archive.exists()
    assert engine.outside("SELECT value FROM item") == [("kept",)]
    outside = sqlite3.connect(archive)
    outside.execute("CREATE TABLE old (id INTEGER)")
    outside.close()
    with pytest.raises(errors.ConnectionFailedError, match="another file has been put in its place"):
        await db.execute("INSERT INTO archive.old VALUES (1)")
    archive.unlink()
    away.rename(archive)
    await db.execute("INSERT INTO archive.old VALUES (1)")
    assert await everywhere(db, "SELECT count(*) FROM archive.old") == [1] * 3


async def test_another_key_meanwhile(make_db: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is read anew for a connection that is replaced; a wrong one is told as such, and not shown."""
    drop_in("sqlcipher3")
    monkeypatch.setenv("TEST_KEY", KEY)
    db = await make_db(module="sqlcipher3", key_env="TEST_KEY", pragmas={"kdf_iter": 1000})
    monkeypatch.setenv("TEST_KEY", "no fit")
    async with db.transaction():
        await db.execute("INSERT INTO item (value) VALUES ('kept')")
        await db.execute("CREATE TEMP TABLE mine (x)")
    with pytest.raises(errors.ConnectionFailedError, match="the key does not fit") as caught:
        await db.execute("INSERT INTO item (value) VALUES ('lost')")
    assert "no fit" not in str(caught.value)
    monkeypatch.setenv("TEST_KEY", KEY)
    await db.execute("INSERT INTO item (value) VALUES ('new')")
    assert await everywhere(db, "SELECT group_concat(value) FROM item") == ["kept,new"] * 3


async def test_an_extension_that_has_gone(make_db: Any, engine: Any) -> None:
    """An extension that cannot be loaded when a connection is replaced is named; once it is there, all goes on."""
    module = with_extensions()
    source = Path(pytest.importorskip("sqlite_vec").loadable_path())
    source = source if source.is_file() else next(source.parent.glob(f"{source.name}.*"))
    file = engine.directory / source.name
    file.write_bytes(source.read_bytes())
    again: list[bool] = []

    def gone(_connection: Any) -> None:
        if again:
            raise RuntimeError("gone")

    db = await make_db(module=module, extensions=[str(file)], on_connect=gone)
    file.rename(engine.directory / "away")
    again.append(True)  # the system may have kept the library in memory, and find it without its file
    async with db.transaction():
        await db.execute("CREATE TEMP TABLE mine (x)")
    with pytest.raises(errors.ConnectionFailedError, match="cannot be loaded|on_connect: .*gone"):
        await db.execute("INSERT INTO item (value) VALUES (vec_version())")
    (engine.directory / "away").rename(file)
    again.clear()
    await db.execute("INSERT INTO item (value) VALUES (vec_version())")
    assert await everywhere(db, "SELECT value = vec_version() FROM item") == [1] * 3


async def test_a_hard_link(make_db: Any, engine: Any) -> None:
    """One file under two names cannot be attached to itself: SQLite would damage it (sqlite.org/howtocorrupt.html)."""
    db = await make_db()
    await db.close()
    os.link(engine.path(), engine.directory / "link.db")
    with pytest.raises(errors.ConnectionFailedError, match="hard link"):
        await (await make_db(attach={"archive": str(engine.directory / "link.db")}, schema=False)).open()


SPATIALITE = next(
    (
        str(path)
        for folder in ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib")
        for path in sorted([*Path(folder).glob("mod_spatialite.*"), *Path(folder).glob("*/mod_spatialite.*")])
        if path.suffix in (".so", ".dylib")
    ),
    None,
)


async def test_spatialite(make_db: Any) -> None:
    """SpatiaLite: a table with points and a spatial index, asked on every connection."""
    if SPATIALITE is None:
        pytest.skip("SpatiaLite is not installed (Debian: apt install libsqlite3-mod-spatialite)")
    db = await make_db(module=with_extensions(), extensions=[SPATIALITE])
    async with db.transaction():  # these SELECTs write, which a reader refuses
        assert await db.fetch_value("SELECT InitSpatialMetaDataFull(0, 'NONE')") == 1
        await db.execute("CREATE TABLE town (name TEXT)")
        assert await db.fetch_value("SELECT AddGeometryColumn('town', 'at', 4326, 'POINT', 'XY')") == 1
        assert await db.fetch_value("SELECT CreateSpatialIndex('town', 'at')") == 1
    towns = [("Seoul", 126.98, 37.57), ("Busan", 129.08, 35.18), ("Berlin", 13.4, 52.52)]
    await db.execute_many("INSERT INTO town VALUES (?, MakePoint(?, ?, 4326))", towns)
    near = "SELECT name FROM town ORDER BY ST_Distance(at, MakePoint(13, 52, 4326)) LIMIT 1"
    assert await everywhere(db, near) == ["Berlin"] * 3
    found = "SELECT count(*) FROM town WHERE rowid IN (SELECT rowid FROM SpatialIndex WHERE f_table_name = 'town'"
    found += " AND search_frame = BuildMbr(125, 34, 130, 39, 4326))"
    assert await everywhere(db, found) == [2] * 3
