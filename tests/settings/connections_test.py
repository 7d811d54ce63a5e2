"""Settings of what belongs to a connection: inherited, and refused with file, line, key and reason."""

from __future__ import annotations

from typing import Any

import pytest

from database import settings
from database.errors import ConfigurationError


def test_inherited(tmp_path: Any) -> None:
    """More databases inherit them: `pragmas` key by key, the others as a whole; one place of the key replaces the other."""
    section = {
        "path": "a.db",
        "pragmas": {"mmap_size": 5, "temp_store": "MEMORY"},
        "attach": {"archive": "b.db"},
        "wal_limit": None,
        "databases": {"other": {"path": "c.db", "pragmas": {"mmap_size": 0}}, "plain": {"path": "b.db", "attach": {}}},
    }
    found = settings.read({"database": {"sqlite": section}}).engines["sqlite3"]
    other: Any = found["other"]
    plain: Any = found["plain"]
    assert (other.pragmas, other.attach) == ({"mmap_size": 0, "temp_store": "MEMORY"}, {"archive": "b.db"})
    assert (plain.attach, plain.wal_limit, plain.wal_autocheckpoint) == ({}, None, 1000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pragmas: {journal_mode: WAL}", "pragmas.journal_mode: cannot be set: it has a setting of its own"),
        ("pragmas: {locking_mode: EXCLUSIVE}", "pragmas.locking_mode: cannot be set: the package depends on it"),
        ("pragmas: {query_only: true}", "cannot be set: the package depends on it"),
        ("pragmas: {user_version: 3}", "it belongs to the file"),
        ("pragmas: {key: hunter2}", "a key does not belong in a configuration"),
        ("pragmas: {mmap_sise: 3}", "did you mean 'mmap_size'?"),
        ("pragmas: {temp_store: [1]}", "expected true, false, a whole number or a word"),
        ("pragma: {}", "unknown key; did you mean 'pragmas'?"),
        ("wal_limit: 0", "expected a number of MiB, more than 0, or null"),
        ("wal_autocheckpoint: -1", "expected a whole number from 0"),
        ("inline_reads: 1", "expected true or false"),
        ("attach: {main: b.db}", "attach.main: 'main' is SQLite's own name"),
        ("attach: {x: ':memory:'}", "each connection would have its own"),
        ("attach: {x: a.db}", "are the same file"),
        ("extensions: [no_such_package]", "no package of that name is installed"),
        ("extensions: [./no.so]", "no such file"),
        ("module: no_such_module", "'no_such_module' is not installed"),
        ("module: json", "is no drop-in for sqlite3"),
        ("on_connect: hunter", "expected 'package.module:function', a function, or null"),
        ("on_connect: 'no_such_module:x'", "there is no module 'no_such_module'"),
        ("key_env: 'hunter2!'", "expected the name of an environment variable"),
        ("key_env: KEY", "encryption needs SQLCipher"),
    ],
)
def test_refused(line: str, message: str, tmp_path: Any) -> None:
    """What is wrong is named with file and line; what may be a key is never shown."""
    file = tmp_path / "db.yaml"
    file.write_text(f"database:\n  sqlite:\n    path: a.db\n    {line}\n")
    with pytest.raises(ConfigurationError) as caught:
        settings.read(str(file))
    assert str(caught.value).startswith(f"{file}:4: database.sqlite.")
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value).removeprefix(str(file))
