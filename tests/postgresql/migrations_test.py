"""Migrations on PostgreSQL: the same files and record as on SQLite, and what only a server needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest

from database import errors
from tests.contract.support import gather
from tests.postgresql.engine import PostgresqlEngine
from tests.postgresql.server import shared

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two migrations; the second differs on SQLite."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_team.sql").write_text(
        "CREATE TABLE team (id bigint PRIMARY KEY, name text);\nINSERT INTO team VALUES (1, 'a;b');\n"
        "CREATE FUNCTION one() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$;"
    )
    (folder / "0002_owner.postgresql.sql").write_text("ALTER TABLE team ADD COLUMN owner text;")
    (folder / "0002_owner.sqlite.sql").write_text("this is not for this engine")
    return folder


async def test_migrate(make_db: Any, engine: PostgresqlEngine, folder: Path) -> None:
    """Applied once, in order, by whoever comes first; tried without being kept; recorded; told by the status."""
    db = await make_db(schema=False, migrations=str(folder), init_sql=None)
    tried = await db.migrate(dry_run=True)
    assert [each.name for each in tried.applied] == ["0001_team.sql", "0002_owner.postgresql.sql"]
    assert engine.outside("SELECT to_regclass('team')") == [(None,)]
    assert len((await db.migration_status()).pending) == 2
    reports = await gather(*[db.migrate] * 4)
    assert sorted(len(report.applied) for report in reports) == [0, 0, 0, 2]
    assert {report.version for report in reports} == {2}
    status = await db.migration_status()
    assert ([each.number for each in status.applied], status.pending) == ([1, 2], ())
    assert engine.outside("SELECT name, owner FROM team") == [("a;b", None)]
    assert engine.outside("SELECT to_regclass('jobs')") == [(None,)], (
        "a database with migrations has its schema from them"
    )
    assert engine.outside("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    (folder / "0001_team.sql").write_text("SELECT 1")
    with pytest.raises(errors.MigrationError, match="is another file now"):
        await db.migrate()
    assert await db.fetch_value("SELECT 1") == 1


async def test_a_migration_that_fails(make_db: Any, engine: PostgresqlEngine, folder: Path) -> None:
    """Its file is rolled back, those before it stand, and the error names file and line; so does what is refused."""
    db = await make_db(schema=False, migrations=str(folder))
    for number, (sql, line) in enumerate(
        [("SELECT 1;\n-- x\nSELECT missing;", 3), ("SELECT 1;\nCOMMIT;", 2), ("\n\nCREATE TEMP TABLE t (a int)", 3)]
    ):
        (folder / "0003_wrong.sql").write_text(f"CREATE TABLE undone{number} (a int); {sql}")
        with pytest.raises(errors.MigrationError, match=rf"0003_wrong\.sql:{line}: .*rolled back"):
            await db.migrate()
        assert engine.outside(f"SELECT to_regclass('undone{number}')") == [(None,)]
        assert [each.number for each in (await db.migration_status()).applied] == [1, 2]
    (folder / "0003_wrong.sql").write_text(
        "-- no transaction\nCREATE INDEX CONCURRENTLY by_name ON team (name);\nCREATE INDEX CONCURRENTLY x ON team (missing);"
    )
    with pytest.raises(errors.MigrationError, match=r"0003_wrong\.sql:3: .*the 1 statements before it stand"):
        await db.migrate()
    (folder / "0003_wrong.sql").write_text(
        "-- no transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS by_name ON team (name);"
    )
    assert (await db.migrate()).version == 3
    assert engine.outside("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_name'::regclass") == [(True,)]
    assert await db.fetch_value("SELECT 1") == 1


async def test_a_migration_does_not_freeze_a_table(
    make_db: Any, engine: PostgresqlEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody holds the table, the migration gives way again and again, so others still read it; then it goes on."""
    from database.postgresql import migrate

    monkeypatch.setattr(migrate, "LOCK_SECONDS", 0.05)
    db = await make_db(schema=False, migrations=str(folder))
    await db.migrate(to=1)
    with anyio.fail_after(20):
        with psycopg.connect(shared().conninfo(), autocommit=False) as other:
            other.execute(f"SELECT count(*) FROM {engine.schemas['default']}.team")
            async with anyio.create_task_group() as group:
                group.start_soon(db.migrate)
                for _ in range(10):
                    assert await db.fetch_value("SELECT count(*) FROM team") == 1
                    await anyio.sleep(0.01)
                assert len((await db.migration_status()).applied) == 1
                other.rollback()
        assert len((await db.migration_status()).applied) == 2
        with psycopg.connect(shared().conninfo(), autocommit=False) as other:
            (folder / "0003_more.sql").write_text("ALTER TABLE team ADD COLUMN more text")
            other.execute(f"SELECT count(*) FROM {engine.schemas['default']}.team")
            with pytest.raises(errors.MigrationError, match="lock"):
                await db.migrate(wait=0.1)
    assert await db.fetch_value("SELECT 1") == 1


async def test_auto_migrate_and_a_baseline(make_db: Any, engine: PostgresqlEngine, folder: Path) -> None:
    """Applied when the pool opens; a database that was there first is given its record."""
    db = await make_db(schema=False, migrations=str(folder), auto_migrate=True)
    assert await db.fetch_value("SELECT name FROM team") == "a;b"
    await db.execute("DROP TABLE database_migrations")
    assert (await db.migrate(baseline=2)).version == 2
    assert (await db.migrate()).applied == ()
    (folder / "0003_wrong.sql").write_text("SELECT missing")
    db = await make_db(schema=False, migrations=str(folder), auto_migrate=True)
    with pytest.raises(errors.MigrationError, match="0003_wrong"):
        await db.fetch_value("SELECT 1")


async def test_what_a_migration_leaves_on_the_connection(make_db: Any, engine: PostgresqlEngine, folder: Path) -> None:
    """What DO, a function or SET LOCAL has set is gone with its file; the record is written where it belongs; and each
    file is applied once by whoever comes, although the lock goes with all else that was on the connection.
    """
    db = await make_db(schema=False, migrations=str(folder), pool_size=4)
    poison = "PERFORM set_config('work_mem', '1234kB', false), set_config('search_path', 'pg_catalog', false);"
    more = [
        f"DO $$ BEGIN {poison} END $$;",
        f"CREATE FUNCTION poison() RETURNS int LANGUAGE plpgsql AS $$ BEGIN {poison} RETURN 1; END $$;",
        "SELECT poison();",
        "SET LOCAL search_path = pg_catalog; SET LOCAL ROLE pg_monitor; SELECT 1;",
        "-- no transaction\nSELECT poison();",
        "SELECT set_config('search_path', 'pg_temp', true); CREATE TABLE left_behind (a int);",
    ]
    for number, sql in enumerate(more, 3):
        (folder / f"{number:04}_more.sql").write_text(f"{sql}")
    (folder / "0009_last.sql").write_text(
        "CREATE TABLE seen AS SELECT current_setting('work_mem') AS m, current_user::text AS u"
    )
    state = (
        "SELECT current_setting('work_mem'), current_setting('search_path'), current_user::text,"
        " to_regclass('pg_temp.left_behind')::text"
    )
    before = await gather(*[lambda: db.fetch_one(state)] * 8)
    await db.migrate(dry_run=True)
    reports = await gather(*[db.migrate] * 4)
    assert sum(len(report.applied) for report in reports) == 9, reports
    assert {report.version for report in reports} == {9}
    assert await gather(*[lambda: db.fetch_one(state)] * 8) == before
    assert engine.outside("SELECT m, u FROM seen") == [(before[0][0], before[0][2])]
    assert engine.outside("SELECT count(*) FROM database_migrations") == [(9,)]
    assert engine.outside("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
