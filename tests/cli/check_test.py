"""`check` and `stats`: each thing that can be wrong is found, and looking changes nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections import namedtuple
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from database.sqlite3 import checkup, engine
from tests.cli.conftest import files, rows

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever SQLite the tests run on, it has no known bugs."""
    monkeypatch.setattr(checkup, "_BUGS", ())


def found(outcome: Any, name: str) -> list[tuple[str, str]]:
    return [(each["level"], each["text"]) for each in outcome.json["databases"][0]["findings"] if each["name"] == name]


def change(path: Path, sql: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(sql)


def test_a_sound_database(cli: Cli, shop: Path) -> None:
    """Nothing is wrong, the status says so, and not a byte of the database has changed."""
    before = hashlib.sha256(shop.read_bytes()).digest(), files(shop)
    outcome = cli("check")
    assert (outcome.status, outcome.err) == (0, "")
    assert "everything is as it should be" in outcome.out
    assert "journal_mode WAL, synchronous NORMAL" in outcome.out
    outcome = cli("check", "--json", "--quick")
    assert outcome.json["verdict"] == "ok"
    assert found(outcome, "integrity") == [("ok", "quick_check found nothing wrong")]
    assert found(outcome, "foreign keys") == [("ok", "every row refers to one that exists")]
    assert cli("stats").status == 0
    assert (hashlib.sha256(shop.read_bytes()).digest(), files(shop)) == before


def test_a_damaged_database(cli: Cli, shop: Path) -> None:
    """A page that holds nonsense is found, and the status is 1."""
    (root,) = rows(shop, "SELECT rootpage FROM sqlite_schema WHERE name = 'customer'")[0]
    data = bytearray(shop.read_bytes())
    data[(root - 1) * 4096 : root * 4096] = b"\x0d" + b"\xff" * 4095
    shop.write_bytes(data)
    outcome = cli("check", "--json")
    assert (outcome.status, outcome.json["verdict"]) == (1, "failed")
    assert found(outcome, "integrity")[0][0] == "failed"
    outcome = cli("check")
    assert (outcome.status, outcome.err) == (1, "")
    assert "something is wrong" in outcome.out


def test_no_database(cli: Cli, shop: Path) -> None:
    """A file that holds something else, a missing one and a directory are faults, each with its reason."""
    shop.write_bytes(b"not a database" * 100)
    outcome = cli("check", "--json")
    assert outcome.status == 1
    assert "not an SQLite database" in found(outcome, "open")[0][1] or "not a database" in found(outcome, "open")[0][1]
    shop.unlink()
    assert found(cli("check", "--json"), "file") == [("failed", "x.db: no such file")]
    assert not shop.exists()
    shop.mkdir()
    assert found(cli("check", "--json"), "file") == [("failed", "x.db: it is not a file")]


def test_stats_of_no_database(cli: Cli, shop: Path) -> None:
    """Figures of what is no database are one block on stderr, and status 1."""
    shop.write_bytes(b"not a database" * 100)
    outcome = cli("stats")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: x.db: file is not a database\n  `python -m database check`")


def test_settings_that_risk_the_data(cli: Cli, configure: Callable[..., Path], shop: Path) -> None:
    """Settings with which a power failure damages the database are warned about."""
    configure(synchronous="OFF")
    assert found(cli("check", "--json"), "PRAGMAs")[0][0] == "warning"
    configure(journal_mode="MEMORY")
    assert found(cli("check", "--json"), "PRAGMAs")[0][0] == "warning"


def test_broken_references(cli: Cli, shop: Path) -> None:
    """Rows that refer to nothing are counted; where foreign keys are off, that is only a note."""
    change(shop, 'DELETE FROM customer WHERE id = 2; INSERT INTO "order" VALUES (3, 77, NULL)')
    outcome = cli("check", "--json")
    assert outcome.status == 1
    text = "2 rows of 'order' refer to rows of 'customer' that do not exist"
    assert found(outcome, "foreign keys") == [("failed", text)]


def test_another_journal_mode(cli: Cli, configure: Callable[..., Path], shop: Path) -> None:
    """A file whose journal mode is not the configured one is reported, not converted."""
    configure(journal_mode="DELETE")
    # The reader does not mind; the file keeps its mode.
    outcome = cli("check", "--json")
    assert rows(shop, "PRAGMA journal_mode") == [("wal",)]
    change(shop, "PRAGMA journal_mode = DELETE")
    configure(journal_mode="WAL")
    outcome = cli("check", "--json")
    assert found(outcome, "PRAGMAs") == [("warning", "the file's journal_mode is DELETE, the configuration's WAL")]
    assert rows(shop, "PRAGMA journal_mode") == [("delete",)]
    assert outcome.status == 0
    assert cli("check", "--strict").status == 1


def test_a_large_wal_and_little_room(cli: Cli, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WAL that grows and a disk that fills are warned about."""
    monkeypatch.setattr(checkup, "LARGE_WAL", 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(100, 90, 10))
    with closing(sqlite3.connect(shop)) as db:
        db.execute("UPDATE customer SET balance = 2")
        db.commit()
        outcome = cli("check", "--json")
    assert found(outcome, "WAL")[0][0] == "warning"
    assert found(outcome, "disk") == [("warning", "10 B free of 100 B")]


def test_network_file_systems(cli: Cli, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database on a network file system is warned about."""
    monkeypatch.setattr(checkup, "_file_system", lambda _path: "nfs4")
    assert "network file system (nfs4)" in found(cli("check", "--json"), "disk")[1][1]


def test_known_bugs(cli: Cli, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is named where this SQLite has it and it concerns this database."""
    bug = ((3, 0, 0), engine.WAL_RESET_FIXED, "a bug", "somewhere")
    monkeypatch.setattr(checkup, "_BUGS", (bug,))
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    assert ("warning", "a bug (somewhere)") in found(cli("check", "--json"), "SQLite")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    assert len(found(cli("check", "--json"), "SQLite")) == 1


def test_migrations(cli: Cli, configure: Callable[..., Path], shop: Path, tmp_path: Path) -> None:
    """Pending migrations are warned about; an edited one is a fault."""
    folder = tmp_path / "sql"
    folder.mkdir()
    (folder / "0001_a.sql").write_text("CREATE TABLE a (x)")
    configure(migrations="sql")
    assert found(cli("check", "--json"), "migrations") == [("warning", "0 applied, 1 pending: 0001_a.sql, …")]
    assert cli("migrate").status == 0
    assert found(cli("check", "--json"), "migrations") == [("ok", "1 applied, 0 pending")]
    (folder / "0001_a.sql").write_text("CREATE TABLE a (y)")
    assert found(cli("check", "--json"), "migrations")[0][0] == "failed"


def test_all_databases(cli: Cli, configure: Callable[..., Path], shop: Path) -> None:
    """All configured databases are looked at, or the one that is named; one fault is a fault of the whole."""
    configure(databases={"audit": {"path": "audit.db"}})
    outcome = cli("check", "--json")
    assert [(each["name"], each["verdict"]) for each in outcome.json["databases"]] == [
        ("default", "ok"),
        ("audit", "failed"),
    ]
    assert (outcome.status, outcome.json["verdict"]) == (1, "failed")
    assert cli("check", "--db", "default").status == 0


def test_a_file_without_a_configuration(cli: Cli, shop: Path) -> None:
    """`--path` names a file directly, whatever its journal mode is, and leaves that as it is."""
    change(shop, "PRAGMA journal_mode = DELETE")
    assert cli("check", "--path", shop).status == 0
    assert rows(shop, "PRAGMA journal_mode") == [("delete",)]
    assert cli("check", "--path", shop, "--config", "x.yaml").status == 2


def test_stats(cli: Cli, shop: Path) -> None:
    """Tables with their rows and indexes, largest first; the whole as JSON, too."""
    figures = cli("stats", "--json").json
    assert {each["name"]: (each["rows"], each["indexes"]) for each in figures["tables"]} == {
        "customer": (2, 1),
        "order": (2, 0),
    }
    assert figures["journal_mode"] == "WAL"
    assert figures["bytes"] == shop.stat().st_size
    outcome = cli("stats")
    assert (outcome.status, outcome.err) == (0, "")
    assert "customer" in outcome.out
    assert [each["rows"] for each in cli("stats", "--no-count", "--json").json["tables"]] == [None, None]
    shop.unlink()
    outcome = cli("stats")
    assert (outcome.status, outcome.out) == (2, "")
    assert "has not been created yet" in outcome.err


def test_attached_files(cli: Cli, configure: Callable[..., Path], shop: Path, tmp_path: Path) -> None:
    """An attached file is shown with its size; one that is missing, that is no database, or whose journal mode is another
    is told, and nothing is created or changed.
    """
    configure(attach={"archive": "archive.db"})
    before = files(shop)
    outcome = cli("check", "--json")
    assert outcome.status == 1
    [(level, text)] = found(outcome, "open")
    assert (level, "No such file" in text) == ("failed", True)
    [finding] = [each for each in outcome.json["databases"][0]["findings"] if each["name"] == "open"]
    assert finding["hint"] == "`python -m database init` creates attached files, too"
    assert files(shop) == before
    change(tmp_path / "archive.db", "CREATE TABLE old (x)")
    outcome = cli("check", "--json")
    text = "the journal_mode of 'archive' is DELETE, the configuration's WAL"
    assert found(outcome, "PRAGMAs") == [("warning", text)]
    assert rows(tmp_path / "archive.db", "PRAGMA journal_mode") == [("delete",)]
    change(tmp_path / "archive.db", "PRAGMA journal_mode = WAL")
    outcome = cli("check", "--json")
    size = f"{(tmp_path / 'archive.db').stat().st_size / 1024:.1f} KiB"
    assert found(outcome, "attached") == [("ok", f"archive: archive.db, {size}, read-only on readers")]
    assert outcome.json["verdict"] == "ok"
    assert files(shop) == before | {"archive.db"}
    (tmp_path / "archive.db").write_bytes(b"no database" * 100)
    outcome = cli("check", "--json")
    assert "cannot be attached as 'archive'" in found(outcome, "open")[0][1]


def not_on_the_writer(connection: Any) -> None:
    """Fails on a connection that may write."""
    if writes(connection):
        raise ValueError("not on the writer")


def writes(connection: Any) -> bool:
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE _probe (x)")
    except sqlite3.Error:
        return False
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return True


def fine(connection: Any) -> None:
    connection.create_function("fine", 0, lambda: 1)


def explodes(connection: Any) -> None:
    raise ValueError("not today")


def test_functions_and_pragmas(cli: Cli, configure: Callable[..., Path], shop: Path) -> None:
    """`on_connect` and more PRAGMAs are verified on a reader and the writer; what fails on one of them is told."""
    before = hashlib.sha256(shop.read_bytes()).digest(), files(shop) | {"config"}
    configure(on_connect=f"{__name__}:fine", pragmas={"temp_store": "MEMORY", "recursive_triggers": True})
    outcome = cli("check", "--json")
    assert found(outcome, "on_connect") == [("ok", f"{__name__}:fine: called on a reader and the writer")]
    [(level, text)] = found(outcome, "PRAGMAs")
    assert (level, "temp_store MEMORY, recursive_triggers on: as configured, on a reader and the writer" in text) == (
        "ok",
        True,
    )
    configure(on_connect=f"{__name__}:explodes")
    outcome = cli("check", "--json")
    assert outcome.status == 1
    assert found(outcome, "open") == [("failed", "on_connect: explodes raised ValueError: not today")]
    configure(on_connect=f"{__name__}:not_on_the_writer")
    outcome = cli("check", "--json")
    assert found(outcome, "writer") == [
        ("failed", "on_connect: not_on_the_writer raised ValueError: not on the writer")
    ]
    assert (hashlib.sha256(shop.read_bytes()).digest(), files(shop) | {"config"}) == before


def test_an_extension(cli: Cli, configure: Callable[..., Path], shop: Path, tmp_path: Path) -> None:
    """Extensions are named where they were loaded; one that cannot be loaded is a fault."""
    pytest.importorskip("sqlite_vec")
    module = "sqlite3" if hasattr(sqlite3.Connection, "enable_load_extension") else "pysqlite3"
    if module != "sqlite3":
        pytest.importorskip(module)
    configure(module=module, extensions=["sqlite_vec"])
    outcome = cli("check", "--json")
    assert found(outcome, "extensions") == [("ok", "sqlite_vec: loaded on a reader and the writer")]
    (tmp_path / "nothing.so").write_bytes(b"no library")
    configure(module=module, extensions=["./nothing.so"])
    outcome = cli("check", "--json")
    assert outcome.status == 1
    assert "nothing.so' cannot be loaded" in found(outcome, "open")[0][1]


def test_rights(cli: Cli, shop: Path) -> None:
    """A file that everybody may write to is warned about, with what to do."""
    if os.name != "posix":
        pytest.skip("POSIX rights")
    shop.chmod(0o666)
    outcome = cli("check", "--json")
    assert found(outcome, "file")[0][0] == "warning"
    assert outcome.json["databases"][0]["findings"][1]["hint"] == "chmod o-w x.db"
    shop.chmod(0o600)
    assert found(cli("check", "--json"), "file")[0][0] == "ok"


def test_unused_pages_and_a_journal(cli: Cli, configure: Callable[..., Path], shop: Path) -> None:
    """Much unused room and a journal that lies about are noted."""
    change(shop, "CREATE TABLE big AS SELECT zeroblob(12 << 20) AS x; DROP TABLE big")
    [(level, text)] = found(cli("check", "--json"), "pages")
    assert level == "note", text
    change(shop, "VACUUM")
    assert found(cli("check", "--json"), "pages")[0][0] == "ok"
    change(shop, "PRAGMA journal_mode = DELETE")
    configure(journal_mode="DELETE")
    assert found(cli("check", "--json"), "journal") == []
    Path(f"{shop}-journal").touch()
    assert found(cli("check", "--json"), "journal")[0][0] == "note"
