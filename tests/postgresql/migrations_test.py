"""Migrations on PostgreSQL: the same files and the same record, one at a time, and none that freezes a busy table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors
from database.engine.migrations import load
from tests.conftest import make_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    engine = make_engine("postgresql", tmp_path)
    from tests.conftest import handles_of

    with handles_of(engine):
        yield engine
    engine.dispose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_team.sql").write_text(
        "CREATE TABLE team (id INTEGER PRIMARY KEY, name TEXT);\nINSERT INTO team VALUES (1, 'a; b');"
    )
    (folder / "0002_only.sqlite.sql").write_text("nonsense here")
    (folder / "0002_only.postgresql.sql").write_text(
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$;\n"
        "ALTER TABLE team ADD COLUMN owner TEXT;"
    )
    return folder


def names(report: Any) -> list[str]:
    return [migration.name for migration in report.applied]


async def refused(db: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(errors.MigrationError) as caught:
        await db.migrate(folder, **options)
    return str(caught.value).replace(f"{folder}/", "")


async def test_migrate(db: Any, engine: Any, folder: Path) -> None:
    """Each file once, in a transaction of its own; dry runs, baselines, failures and status as on SQLite."""
    assert names(await db.migrate(folder, dry_run=True)) == ["0001_team.sql", "0002_only.postgresql.sql"]
    assert engine.outside("SELECT to_regclass('team')::text") == [(None,)]
    (folder / "0003_bad.sql").write_text(
        "INSERT INTO team VALUES (2, 'lost');\n\n-- a remark\nINSERT INTO nowhere VALUES (1);"
    )
    text = await refused(db, folder)
    assert text.startswith('0003_bad.sql:4: relation "nowhere" does not exist')
    assert engine.outside("SELECT count(*) FROM team") == [(1,)]
    (folder / "0003_bad.sql").write_text("INSERT INTO team VALUES (2, 'kept'); COMMIT;")
    assert "0003_bad.sql:1: COMMIT is the package's own business" in await refused(db, folder)
    (folder / "0003_bad.sql").write_text("INSERT INTO team VALUES (2, 'kept');")
    status = await db.migration_status(folder)
    assert ([each.number for each in status.applied], [each.name for each in status.pending]) == (
        [1, 2],
        ["0003_bad.sql"],
    )
    assert names(await db.migrate(folder)) == ["0003_bad.sql"]
    assert names(await db.migrate(folder)) == []
    (folder / "0003_bad.sql").write_text("SELECT 1")
    assert "is another file now" in await refused(db, folder)
    await db.execute("DROP TABLE database_migrations")
    (await db.migrate(folder, baseline=2))
    assert len(engine.outside("SELECT * FROM database_migrations")) == 2
    (folder / "0003_bad.sql").rename(folder / "0003_other.sqlite.sql")
    (folder / "0004_next.sql").write_text("SELECT 1")
    assert "0003_other.sqlite.sql has no counterpart for postgresql" in await refused(db, folder)
    with pytest.raises(errors.MigrationError, match="0002_only.postgresql.sql has no counterpart for sqlite3"):
        (folder / "0002_only.sqlite.sql").unlink()
        load(folder)


async def test_without_a_transaction(db: Any, engine: Any, folder: Path) -> None:
    """What cannot be in a transaction says so at its head; half-done, it is told with the way to go on."""
    index = "CREATE INDEX CONCURRENTLY team_name ON team (name);\n"
    (folder / "0003_index.sql").write_text(index)
    assert "begin the file with the comment `-- no transaction`" in await refused(db, folder)
    (folder / "0003_index.sql").write_text(f"-- why\n-- no transaction\n{index}SELECT nonsense;")
    assert "0003_index.sql:4: " in await refused(db, folder)
    assert "was begun on" in await refused(db, folder, wait=0)
    await db.execute("DROP INDEX team_name")
    await db.execute("DELETE FROM database_migrations WHERE number = 3")
    (folder / "0003_index.sql").write_text(f"-- no transaction\n{index}")
    assert names(await db.migrate(folder)) == ["0003_index.sql"]
    assert engine.outside("SELECT seconds > 0 FROM database_migrations WHERE number = 3") == [(True,)]
    assert engine.outside("SELECT indisvalid FROM pg_index WHERE indexrelid = 'team_name'::regclass") == [(True,)]


async def test_several_at_once_and_a_busy_table(
    make_db: Any, engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several that start at once each applies what the others have not; nobody waits for ever behind a busy table."""
    monkeypatch.setattr("database.postgresql.migrate.LOCK_SECONDS", 0.1)
    monkeypatch.setattr("database.postgresql.migrate.PAUSE", 0.02)
    db = await make_db()
    done: list[str] = []

    async def one() -> None:
        done.extend(names(await db.migrate(folder)))

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(one)
    assert sorted(done) == ["0001_team.sql", "0002_only.postgresql.sql"]
    (folder / "0003_jobs.sql").write_text("ALTER TABLE jobs ADD COLUMN extra TEXT")
    with engine.locked():
        assert "somebody uses the table all the time" in await refused(db, folder, wait=0.3)
    assert names(await db.migrate(folder)) == ["0003_jobs.sql"]
