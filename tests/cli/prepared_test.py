"""Every command on a database whose connections need preparing: encrypted, with an extension, an attached file, functions."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from database.session.database import Database
from tests.cli.conftest import files

Cli = Callable[..., Any]

KEY = f"x'{'5e5a3e' * 10}c0de'"
"""A key itself, with its quotes, and no passphrase from which SQLCipher would derive one for a tenth of a second each time."""


def prepare(connection: Any) -> None:
    """For `on_connect`: a collation that an index needs, and a function that builds on what is attached."""
    connection.create_collation("alphabet", lambda one, other: (one > other) - (one < other))
    archived = connection.execute("SELECT count(*) FROM archive.sqlite_master").fetchone()[0]
    connection.create_function("archived", 0, lambda: archived)


@pytest.fixture
def vault(configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """An encrypted database with a table, a virtual table of sqlite-vec's and an attached file, made by `init`."""
    for needed in ("sqlcipher3", "sqlite_vec"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    monkeypatch.setenv("TEST_KEY", KEY)
    (tmp_path / "init.sql").write_text(
        "CREATE TABLE word (id INTEGER PRIMARY KEY, text TEXT NOT NULL COLLATE alphabet);\n"
        "CREATE INDEX word_text ON word (text);\n"
        "CREATE VIRTUAL TABLE place USING vec0(position float[2]);\n"
        "CREATE TABLE archive.old (text TEXT);\n"
        "INSERT INTO word (text) VALUES ('plain text to be found');\n"
    )
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_note.sql").write_text("CREATE TABLE note (text TEXT COLLATE alphabet);\n")
    path = configure(
        module="sqlcipher3",
        key_env="TEST_KEY",
        extensions=["sqlite_vec"],
        attach={"archive": "archive.db"},
        on_connect=f"{__name__}:prepare",
        init_sql="init.sql",
        migrations="migrations",
        pragmas={"kdf_iter": 1000},
        monitor=None,
    )
    assert cli("init").status == 0
    return path


def test_each_command(cli: Cli, vault: Path, tmp_path: Path) -> None:
    """check, stats, migrate, import, export, shell and backup work; nothing of theirs lies about unencrypted, and check
    says that it has verified the key, the extension, the attached file and the function.
    """
    (tmp_path / "migrations" / "0002_more.sql").write_text("CREATE INDEX note_text ON note (text);\n")
    outcome = cli("check")
    assert (outcome.status, outcome.err) == (0, ""), outcome.out
    for part in (
        "SQLCipher 4",
        "the key of key_env fits",
        "sqlite_vec: loaded on a reader and the writer",
        "archive: archive.db",
        "with the same key",
        f"{__name__}:prepare: called on a reader and the writer",
        "kdf_iter 1000",
        "1 pending",
    ):
        assert part in outcome.out, part
    assert KEY not in outcome.out
    outcome = cli("migrate", "--backup", "before.db")
    assert outcome.status == 0, outcome
    assert "0002" in outcome.out
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")
    outcome = cli("import", "rows.csv", "word")
    assert outcome.status == 0, outcome
    outcome = cli("import", "rows.csv", "fresh", "--create")
    assert outcome.status == 0, outcome
    outcome = cli("export", "SELECT text, archived() AS archived FROM word ORDER BY text", "--format", "jsonl")
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == ["one", "plain text to be found", "two"]
    assert {json.loads(line)["archived"] for line in outcome.out.splitlines()} == {1}
    sql = "INSERT INTO archive.old SELECT text FROM word; SELECT count(*) AS n, vec_version() AS v FROM archive.old;"
    outcome = cli("shell", "--mode", "json", "--command", sql)
    assert outcome.status == 0, outcome
    assert json.loads(outcome.out)["n"] == 3
    outcome = cli("stats", "--json")
    assert outcome.status == 0, outcome
    assert {each["name"]: each["rows"] for each in outcome.json["tables"]}["word"] == 3
    outcome = cli("backup", "copy.db", "--verify", "--json")
    assert (outcome.status, outcome.json["verified"]) == (0, True), outcome
    for name in ("x.db", "copy.db", "before.db", "archive.db"):
        data = (tmp_path / name).read_bytes()
        assert not data.startswith(b"SQLite format 3"), name
        assert b"plain text" not in data, name
    assert not [name for name in files(vault) if name.endswith(("-wal", "-shm", "-journal", ".partial"))]


def test_a_backup_that_is_damaged(cli: Cli, vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying a copy reads it, with the key: what is damaged in it is found."""
    made = Database.backup

    async def damaging(db: Database, file: Any, **options: Any) -> None:
        await made(db, file, **options)
        data = bytearray(Path(file).read_bytes())
        data[3 * 4096 : 4 * 4096] = bytes(4096)  # a page whose signature is now wrong
        Path(file).write_bytes(data)

    monkeypatch.setattr(Database, "backup", damaging)
    outcome = cli("backup", "copy.db", "--verify")
    assert outcome.status == 1
    assert "copy.db is damaged" in outcome.err
    assert KEY not in outcome.err


def test_without_its_key(cli: Cli, vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong key, or none, each command says so in one block, and changes nothing."""
    before = vault.read_bytes()
    for key, message in (("another", "key does not fit"), (None, "is not set")):
        monkeypatch.setenv("TEST_KEY", key) if key else monkeypatch.delenv("TEST_KEY")
        for command in (
            ("check",), ("stats",), ("migrate",), ("shell", "--command", "SELECT 1"), ("export", "word"), ("backup", "c.db"),
        ):  # fmt: skip
            outcome = cli(*command)
            assert outcome.status == 1, (command, outcome)
            assert message in outcome.out + outcome.err, (command, outcome)
            assert "Traceback" not in outcome.err
            assert "another" not in outcome.out + outcome.err
    assert vault.read_bytes() == before
    assert not (vault.parent / "c.db").exists()
    with closing(sqlite3.connect(vault)) as outside, pytest.raises(sqlite3.DatabaseError):
        outside.execute("SELECT * FROM word")
