"""`init`, `migrate` and `backup`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import rows

Cli = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, configure: Callable[..., Path]) -> Path:
    folder = tmp_path / "sql"
    folder.mkdir()
    (folder / "0001_team.sql").write_text("CREATE TABLE team (id INTEGER PRIMARY KEY, name TEXT);")
    (folder / "0002_rows.sql").write_text("INSERT INTO team (name) VALUES ('red');")
    configure(migrations="sql")
    return folder


def test_init(cli: Cli, configure: Callable[..., Path], tmp_path: Path) -> None:
    """Every configured database is created, by its `init_sql`; the second time nothing happens."""
    (tmp_path / "my.sql").write_text("CREATE TABLE IF NOT EXISTS t (x); CREATE TABLE IF NOT EXISTS u (x);")
    path = configure(path="new/x.db", init_sql="my.sql", databases={"memory": {"path": ":memory:"}})
    outcome = cli("init")
    assert (outcome.status, outcome.out) == (0, "✓ default created: new/x.db\n")
    assert outcome.err == "memory: :memory: needs no init\n"
    assert rows(path, "SELECT name FROM sqlite_schema") == [("t",), ("u",)]
    outcome = cli("init", "--json", "--db", "default")
    assert outcome.json == [{"name": "default", "path": "new/x.db", "created": False, "migrations": []}]


@pytest.mark.parametrize("automatic", [False, True])
def test_init_migrates(cli: Cli, folder: Path, configure: Callable[..., Path], automatic: bool) -> None:
    """Where there are migrations, `init` applies them and says which, also where a pool would do it by itself."""
    path = configure(migrations="sql", auto_migrate=automatic)
    assert cli("init", "--json").json[0]["migrations"] == ["0001_team.sql", "0002_rows.sql"]
    assert rows(path, "SELECT name FROM team") == [("red",)]


def test_migrate(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """The way of a database: dry run, first migration, the rest, nothing left."""
    path = tmp_path / "x.db"
    outcome = cli("migrate", "--dry-run")
    assert (outcome.status, outcome.err) == (0, "")
    assert "2 would be applied, all rolled back; the database is at 0" in outcome.out
    assert rows(path, "SELECT * FROM sqlite_schema") == []
    assert cli("migrate", "--to", 1, "--json").json == {
        "applied": ["0001_team.sql"], "version": 1, "dry_run": False, "baseline": None,
    }  # fmt: skip
    outcome = cli("migrate", "--check")
    assert (outcome.status, outcome.err) == (1, "")
    assert "0002_rows.sql  pending\n1 applied, 1 pending\n" in outcome.out
    assert cli("migrate", "--check", "--json").json["pending"] == ["0002_rows.sql"]
    assert "✓ 0002_rows.sql applied (" in cli("migrate").out
    assert cli("migrate").out == "nothing to do: the database is at 2\n"
    assert cli("migrate", "--check").status == 0


def test_migrate_fails(cli: Cli, folder: Path) -> None:
    """A failure is one block on stderr with file and line, and status 1."""
    (folder / "0003_bad.sql").write_text("-- fine so far\nINSERT INTO nowhere VALUES (1);")
    outcome = cli("migrate")
    assert outcome.status == 1
    assert outcome.err.startswith("error: sql/0003_bad.sql:2: no such table: nowhere; the migration was rolled back")
    assert "Traceback" not in outcome.err
    assert cli("migrate", "--dry-run").status == 1


def test_migrate_without_migrations(cli: Cli, configure: Callable[..., Path], folder: Path) -> None:
    """Without the setting the folder has to be named; a folder that is named needs no setting."""
    path = configure()
    outcome = cli("migrate")
    assert (outcome.status, "set `migrations`" in outcome.err) == (2, True)
    assert not path.exists()
    assert cli("migrate", "--folder", folder).status == 0


def test_migrate_an_existing_database(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """A baseline records what is there already; a backup is made first when something is pending, and only then."""
    with closing(sqlite3.connect(tmp_path / "x.db")) as db:
        db.execute("CREATE TABLE team (id INTEGER PRIMARY KEY, name TEXT)")
    assert "recorded as applied, without running them: migrations 1 to 1" in cli("migrate", "--baseline", 1).out
    assert cli("migrate", "--backup", "before.db").status == 0
    assert rows(tmp_path / "before.db", "SELECT * FROM team") == []
    assert rows(tmp_path / "x.db", "SELECT name FROM team") == [("red",)]
    assert cli("migrate", "--backup", "again.db").status == 0
    assert not (tmp_path / "again.db").exists()


def test_backup(cli: Cli, shop: Path, tmp_path: Path) -> None:
    """A copy that stands by itself; an existing file is kept unless one insists; a folder gives it a name."""
    outcome = cli("backup", "copy.db", "--verify")
    assert (outcome.status, outcome.err) == (0, "")
    assert ", verified" in outcome.out
    assert not list(tmp_path.glob("copy.db-*"))
    assert rows(tmp_path / "copy.db", "SELECT name FROM customer ORDER BY id") == [("Ada",), ("Bo",)]
    outcome = cli("backup", "copy.db")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "error: copy.db exists already\n  name another file, or use --force to replace it\n"
    assert cli("backup", "copy.db", "--force").status == 0
    (tmp_path / "backups").mkdir()
    made = cli("backup", "backups", "--json").json
    assert Path(made["path"]).name.startswith("default-20")
    assert rows(Path(made["path"]), "SELECT count(*) FROM customer") == [(2,)]
    assert "no such folder" in cli("backup", "nowhere/x.db").err


def test_verify_finds_damage(cli: Cli, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is damaged is not called verified: it says what is wrong, and the status is 1."""
    from database.session.database import Database

    async def copy(_db: Database, path: Path, *, progress: Any) -> None:
        progress(0, 0, 1)
        Path(path).write_bytes(shop.read_bytes()[:4096] + b"x" * 8192)

    monkeypatch.setattr(Database, "backup", copy)
    outcome = cli("backup", "copy.db", "--verify")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: copy.db is damaged: ")


def test_backup_into_a_folder(cli: Cli, shop: Path, tmp_path: Path) -> None:
    """A target that ends in a slash, or is a folder, gets a file with the database's name; never a file called like it."""
    for place in ("copies/", "deep/er/", "copies", ".", f"{tmp_path}/copies/"):
        outcome = cli("backup", place, "--db", "sqlite:default", "--force", "--json")
        assert outcome.status == 0, outcome.err
        file = Path(outcome.json["path"])
        assert file.name.startswith("default-20")
        assert file.suffix == ".db"
        assert file.resolve().parent == (tmp_path / place).resolve()
        assert rows(file, "SELECT count(*) FROM customer") == [(2,)]
    assert cli("backup", "nowhere/copy.db").status == 2
    (tmp_path / "file").write_text("")
    assert "file" in cli("backup", "file/").err
    assert (tmp_path / "file").read_text() == ""
