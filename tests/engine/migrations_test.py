"""Migrations: what is applied, recorded, refused; and that processes which start at once do not get in one another's way."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from database import errors
from database.engine.migrations import load
from database.sqlite3.failures import is_broken
from database.sqlite3.migrate import _enforce_again
from tests.contract.support import HANGING, SLOW_INSERT, eventually
from tests.programs import Started

pytestmark = pytest.mark.anyio

JOBS = "CREATE TABLE team (id INTEGER PRIMARY KEY, name TEXT);\nINSERT INTO team (name) VALUES ('red; blue');\n"
OWNER = """-- name: add_owner#
ALTER TABLE team ADD COLUMN owner TEXT;
CREATE TRIGGER named AFTER INSERT ON team BEGIN
    UPDATE team SET owner = 'nobody; yet' WHERE id = NEW.id;
END;
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_team.sql").write_text(JOBS)
    (folder / "0002_owner.sql").write_text(OWNER)
    (folder / "README.md").write_text("not a migration")
    (folder / ".0003_draft.sql").write_text("not one either")
    return folder


def names(report: Any) -> list[str]:
    return [migration.name for migration in report.applied]


async def refused(db: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(errors.MigrationError) as caught:
        await db.migrate(folder, **options)
    return str(caught.value).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


async def test_applies_what_is_pending_once(db: Any, folder: Path) -> None:
    """Each file is applied once, in order, with triggers and semicolons in strings; later files are added to those."""
    seen: list[str] = []
    report = await db.migrate(folder, progress=lambda migration, _: seen.append(migration.name))
    assert names(report) == seen == ["0001_team.sql", "0002_owner.sql"]
    assert (report.version, report.dry_run) == (2, False)
    assert names(await db.migrate(folder)) == []
    (folder / "0003_more.sql").write_text("INSERT INTO team (name) VALUES ('green')")
    status = await db.migration_status(folder)
    assert [each.name for each in status.applied] == ["0001_team.sql", "0002_owner.sql"]
    assert [each.name for each in status.pending] == ["0003_more.sql"]
    assert names(await db.migrate(folder)) == ["0003_more.sql"]
    assert [tuple(row) for row in await db.fetch_all("SELECT name, owner FROM team")] == [
        ("red; blue", None),
        ("green", "nobody; yet"),
    ]


async def test_a_failure_undoes_its_file_and_names_its_line(db: Any, folder: Path) -> None:
    """A file that fails half-way leaves nothing behind, those before it stand, and the message says where it failed."""
    (folder / "0003_bad.sql").write_text(
        "INSERT INTO team (name) VALUES ('lost');\n\n-- a remark\nINSERT INTO nowhere VALUES (1);"
    )
    text = await refused(db, folder)
    assert text.startswith("0003_bad.sql:4: no such table: nowhere; the migration was rolled back")
    assert await db.fetch_value("SELECT count(*) FROM team") == 1
    assert len((await db.migration_status(folder)).applied) == 2
    (folder / "0003_bad.sql").write_text("INSERT INTO team (name) VALUES ('kept');")
    assert names(await db.migrate(folder)) == ["0003_bad.sql"]


async def test_a_migration_cannot_end_its_transaction(db: Any, folder: Path) -> None:
    """COMMIT and the like in a file are refused, or all-or-nothing would be lost."""
    for verb in ("COMMIT", "BEGIN", "SAVEPOINT mine", "/* ; */ end", "ROLLBACK"):
        (folder / "0003_bad.sql").write_text(f"INSERT INTO team (name) VALUES ('lost');\n{verb};")
        text = await refused(db, folder)
        assert "package's own business" in text
        assert text.startswith("0003_bad.sql:2: ")
    assert await db.fetch_value("SELECT count(*) FROM team") == 1


REFUSED = [
    ("PRAGMA query_only=1", "PRAGMA query_only would change the connection, not the database"),
    (
        "pragma/**/main . [journal_mode] = DELETE",
        "PRAGMA journal_mode has no effect within a transaction: set `journal_mode`",
    ),
    ('PRAGMA "synchronous" (off)', "set `synchronous` in the configuration"),
    ("PRAGMA temp_store = 2", "set it under `pragmas` in the configuration"),
    ("PRAGMA case_sensitive_like = 1", "PRAGMA case_sensitive_like would change"),
    ("EXPLAIN QUERY PLAN PRAGMA locking_mode = EXCLUSIVE", "PRAGMA locking_mode would change"),
    ("PRAGMA wal_checkpoint", "PRAGMA wal_checkpoint has no effect within a transaction"),
    ("ATTACH ':memory:' AS other", "ATTACH would stay with the connection: name the other file"),
    ("DETACH other", "DETACH would stay"),
    ("VACUUM", "VACUUM cannot be done within a transaction"),
]


async def test_what_changes_the_connection_is_refused_before_anything_runs(db: Any, folder: Path) -> None:
    """A PRAGMA of the connection, ATTACH or VACUUM is named with file and line, and no file is applied."""
    for sql, message in REFUSED:
        (folder / "0003_bad.sql").write_text(f"INSERT INTO team (name) VALUES ('; lost');\n-- a remark;\n\n{sql};\n")
        for options in ({}, {"dry_run": True}):
            text = await refused(db, folder, **options)
            assert text.startswith("0003_bad.sql:4: "), (sql, text)
            assert message in text, (sql, text)
        assert (await db.migration_status(folder)).applied == (), sql
    assert await db.fetch_value("SELECT count(*) FROM sqlite_schema WHERE name = 'team'") == 0


async def test_the_connection_is_as_configured_afterwards(db: Any, folder: Path) -> None:
    """What schema changes need of the connection is put right behind each file, also behind one that fails or is tried."""
    (folder / "0003_bare.sql").write_text(
        "PRAGMA foreign_keys = OFF; PRAGMA legacy_alter_table = ON; PRAGMA writable_schema = ON;"
        "PRAGMA ignore_check_constraints = 1; PRAGMA recursive_triggers(1); PRAGMA user_version = 7; PRAGMA table_info(team);"
        "CREATE TEMP TABLE kept AS SELECT name FROM team; CREATE INDEX temp.i ON kept (name);"
        "CREATE TEMP VIEW seen AS SELECT * FROM kept; INSERT INTO team (name) SELECT name || '!' FROM seen;"
    )

    def state(raw: Any) -> list[Any]:
        pragmas = (
            "foreign_keys",
            "legacy_alter_table",
            "writable_schema",
            "ignore_check_constraints",
            "recursive_triggers",
        )
        temporary = raw.execute("SELECT name FROM sqlite_temp_master").fetchall()
        return [[raw.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas], temporary]

    before = await db.run(state)
    await db.migrate(folder, dry_run=True)
    assert await db.run(state) == before
    await db.migrate(folder)
    assert await db.run(state) == before
    assert await db.fetch_value("SELECT count(*) FROM team WHERE name LIKE '%!'") == 1
    assert await db.run(lambda raw: raw.execute("PRAGMA user_version").fetchone()[0]) == 7
    for sql in (
        "SELECT * FROM kept",
        "nonsense",
    ):  # the next file finds nothing of it, nor does a failure leave anything
        (folder / "0004_next.sql").write_text(f"CREATE TEMP TABLE more (a); PRAGMA legacy_alter_table = 1; {sql};")
        assert "0004_next.sql:1: " in await refused(db, folder)
        assert await db.run(state) == before


async def test_an_edited_file_is_refused(db: Any, folder: Path) -> None:
    """A file that was applied must stay as it was; another line end is no change."""
    await db.migrate(folder)
    (folder / "0001_team.sql").write_bytes(b"\xef\xbb\xbf" + JOBS.replace("\n", "\r\n").encode())
    assert names(await db.migrate(folder)) == []
    (folder / "0001_team.sql").write_text(JOBS + "-- harmless?\n")
    text = await refused(db, folder)
    assert text.startswith("0001_team.sql was applied on ")
    assert "put the change into a new migration, number 0003" in text


async def test_gaps_duplicates_and_bad_names(folder: Path) -> None:
    """A folder whose order is in doubt is refused before anything is applied."""

    def message() -> str:
        with pytest.raises(errors.MigrationError) as caught:
            load(folder)
        return str(caught.value)

    (folder / "0004_gap.sql").write_text("SELECT 1")
    assert "there is no migration 0003 before 0004_gap.sql" in message()
    (folder / "0004_gap.sql").rename(folder / "2_again.sql")
    assert "0002_owner.sql and 2_again.sql have the same number" in message()
    (folder / "2_again.sql").rename(folder / "0003-dash.sql")
    assert "not a migration's name; expected a number, `_` and a name" in message()
    (folder / "0003-dash.sql").unlink()
    (folder / "0003_empty.sql").write_text("-- nothing yet\n;")
    assert "0003_empty.sql: holds no statement" in message()
    with pytest.raises(errors.MigrationError, match="cannot be read"):
        load(folder / "missing")


async def test_record_and_folder_contradict(db: Any, folder: Path) -> None:
    """A migration that the folder no longer holds, and one that comes before applied ones, are refused."""
    await db.migrate(folder)
    (folder / "0002_owner.sql").rename(folder / "kept")
    assert "this program is older than the database" in await refused(db, folder)
    (folder / "kept").rename(folder / "0002_owner.sql")
    await db.execute("DELETE FROM database_migrations WHERE number = 1")
    assert "0001_team.sql is out of order" in await refused(db, folder)


async def test_dry_run(db: Any, folder: Path) -> None:
    """A dry run finds what would fail, and leaves nothing behind, not even the record."""
    report = await db.migrate(folder, dry_run=True)
    assert (names(report), report.version, report.dry_run) == (["0001_team.sql", "0002_owner.sql"], 0, True)
    assert await db.fetch_value("SELECT count(*) FROM sqlite_schema WHERE name IN ('team', 'database_migrations')") == 0
    (folder / "0003_bad.sql").write_text("INSERT INTO team (nme) VALUES (1)")
    assert "0003_bad.sql:1: table team has no column named nme" in await refused(db, folder, dry_run=True)
    assert names(await db.migrate(folder, to=2)) == ["0001_team.sql", "0002_owner.sql"]


async def test_baseline(db: Any, folder: Path) -> None:
    """A database that had its tables before it had migrations gets a record without running them, once."""
    await db.execute_script(JOBS)
    report = await db.migrate(folder, baseline=1)
    assert (names(report), report.version) == ([], 1)
    assert names(await db.migrate(folder)) == ["0002_owner.sql"]
    assert "has had 0002_owner.sql already" in await refused(db, folder, baseline=1)
    assert "holds no migration 9" in await refused(db, folder, to=9)


async def test_a_table_is_rebuilt_although_others_refer_to_it(db: Any, folder: Path) -> None:
    """SQLite's way of changing a table (copy, drop, rename) keeps the rows that refer to it, and foreign keys hold again."""
    (folder / "0003_member.sql").write_text(
        "CREATE TABLE member (id INTEGER PRIMARY KEY, team INTEGER NOT NULL REFERENCES team ON DELETE CASCADE);"
        "INSERT INTO member (team) VALUES (1)"
    )
    (folder / "0004_rebuild.sql").write_text(
        "CREATE TABLE new_team (id INTEGER PRIMARY KEY, name TEXT NOT NULL);"
        "INSERT INTO new_team SELECT id, name FROM team; DROP TABLE team; ALTER TABLE new_team RENAME TO team;"
    )
    await db.migrate(folder)
    assert await db.fetch_value("SELECT count(*) FROM member") == 1
    with pytest.raises(errors.IntegrityError):
        await db.execute("INSERT INTO member (team) VALUES (99)")


async def test_a_migration_that_breaks_references_is_rolled_back(db: Any, engine: Any, folder: Path) -> None:
    """What a migration breaks is found before its commit; what was broken before it does not stop it."""
    (folder / "0003_member.sql").write_text(
        "CREATE TABLE member (id INTEGER PRIMARY KEY, team INTEGER NOT NULL REFERENCES team);"
    )
    await db.migrate(folder)
    await db.execute("INSERT INTO member (team) VALUES (1)")
    (folder / "0004_break.sql").write_text("DELETE FROM team")
    assert "1 rows of 'member' refer to rows of 'team' that do not exist" in await refused(db, folder)
    assert "1 rows of 'member'" in await refused(db, folder, dry_run=True)
    assert await db.fetch_value("SELECT count(*) FROM team") == 1

    outside = sqlite3.connect(engine.path())
    outside.execute("INSERT INTO member (team) VALUES (77)")
    outside.commit()
    outside.close()
    (folder / "0004_break.sql").write_text("INSERT INTO team (name) VALUES ('new')")
    assert names(await db.migrate(folder)) == ["0004_break.sql"]


async def test_inside_a_transaction(db: Any, folder: Path) -> None:
    """It cannot be part of a transaction, and says so instead of waiting for itself."""
    async with db.transaction():
        with pytest.raises(errors.TransactionError, match="migrate\\(\\) opens transactions of its own"):
            await db.migrate(folder)


async def test_without_a_folder(db: Any) -> None:
    """Without the setting and without a folder there is a message that says what to set."""
    with pytest.raises(errors.ConfigurationError, match="set `migrations`"):
        await db.migrate()


async def test_by_the_setting(make_db: Any, folder: Path) -> None:
    """With `auto_migrate` whoever opens the database finds it migrated; packaged tables are not made then."""
    db = await make_db(schema=False, migrations=str(folder), auto_migrate=True, init_sql=None)
    assert await db.fetch_value("SELECT name FROM team") == "red; blue"
    assert await db.fetch_value("SELECT count(*) FROM sqlite_schema WHERE name = 'jobs'") == 0
    assert names(await db.migrate()) == []
    (folder / "0003_bad.sql").write_text("nonsense")
    await db.close()
    with pytest.raises(errors.MigrationError, match="0003_bad.sql:1: near"):
        await db.fetch_value("SELECT 1")
    (folder / "0003_bad.sql").unlink()


async def test_it_waits_for_another_process_only_so_long(db: Any, engine: Any, folder: Path) -> None:
    """A lock that another process keeps ends the wait after `wait` seconds, with nothing applied."""
    with engine.locked():
        with pytest.raises(errors.DatabaseBusyError):
            await db.migrate(folder, wait=0.05)
    assert names(await db.migrate(folder)) == ["0001_team.sql", "0002_owner.sql"]


async def test_cancelled_while_it_waits(db: Any, engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for another process's lock can be cancelled at once, and then gets none, also if it is free just then."""
    waits, may_go_on = threading.Event(), threading.Event()

    def sleep(_seconds: float) -> None:
        waits.set()
        may_go_on.wait(HANGING)

    monkeypatch.setattr("database.sqlite3.levels.time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    with anyio.fail_after(HANGING):
        with engine.locked():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: db.migrate(folder, wait=60))
                await eventually(waits.is_set)
                tasks.cancel_scope.cancel()
        may_go_on.set()
        assert len((await db.migrate(folder)).applied) == 2


async def test_cancelled_while_a_migration_runs(db: Any, folder: Path) -> None:
    """A migration that is cancelled is rolled back, those before it stand, and foreign keys are enforced again."""
    (folder / "0003_slow.sql").write_text(
        f"INSERT INTO team (name) VALUES ('lost');\n{SLOW_INSERT.replace('item', 'slow')}"
    )
    (folder / "0002_owner.sql").write_text("CREATE TABLE slow (value);")
    seen = anyio.Event()
    token = anyio.lowlevel.current_token()

    def progress(migration: Any, _seconds: float) -> None:
        if migration.number == 2:
            anyio.from_thread.run_sync(seen.set, token=token)

    async with anyio.create_task_group() as tasks:

        async def cancel() -> None:
            await seen.wait()
            await eventually(lambda: db.stats().writer_in_use)
            tasks.cancel_scope.cancel()

        tasks.start_soon(cancel)
        await db.migrate(folder, progress=progress)
    assert tasks.cancel_scope.cancelled_caught
    assert len((await db.migration_status(folder)).applied) == 2
    assert await db.fetch_value("SELECT count(*) FROM team") == 1
    assert await db.run(lambda raw: raw.execute("PRAGMA foreign_keys").fetchone()[0]) == 1


async def test_foreign_keys_that_cannot_be_enforced_again() -> None:
    """A connection that lost its foreign keys raises the error for which the driver gives it up."""

    class Deaf:
        def control(self, _sql: str) -> None:
            raise sqlite3.OperationalError("interrupted")

    with pytest.raises(sqlite3.InternalError) as caught:
        _enforce_again(Deaf())  # type: ignore[arg-type]
    assert is_broken(caught.value)


PROCESS = """
import json, sys, anyio
from database.sqlite3 import close_all, configure, get_db
configure({"database": {"sqlite": {"path": sys.argv[1], "init_sql": "", "migrations": sys.argv[2]}}})
async def main():
    sys.stdin.readline()  # all processes begin at once
    report = await get_db().migrate()
    print(json.dumps([migration.name for migration in report.applied]), report.version)
    await close_all()
print("ready", flush=True)
anyio.run(main)
"""


def test_processes_that_start_at_once(tmp_path: Path, folder: Path) -> None:
    """Of several processes each migration is applied by exactly one, and all of them find all applied."""
    for number in range(3, 21):
        (folder / f"{number:04d}_row.sql").write_text(f"INSERT INTO team (name) VALUES ('{number}')")
    processes = [Started(["-c", PROCESS, str(tmp_path / "x.db"), str(folder)], tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    applied: list[str] = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        own, version = out.rsplit(" ", 1)
        applied += json.loads(own)
        assert version == "20\n"
    assert sorted(applied) == sorted(migration.name for migration in load(folder))
    connection = sqlite3.connect(tmp_path / "x.db")
    assert connection.execute("SELECT count(*) FROM team").fetchone() == (19,)
    connection.close()
