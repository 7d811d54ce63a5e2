"""Opening an SQLite connection."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from database import errors
from database.sqlite3 import opening
from database.sqlite3.settings import SqliteSettings


class Stubborn:
    """A connection on which one PRAGMA does not take."""

    def __init__(self, raw: sqlite3.Connection, pragma: str) -> None:
        self.raw = raw
        self.pragma = pragma

    def execute(self, sql: str) -> Any:
        if self.pragma in sql:
            sql = "SELECT 'something else'"
        return self.raw.execute(sql)


@pytest.mark.parametrize("pragma", ["journal_mode", "synchronous", "cache_size", "foreign_keys"])
def test_a_pragma_that_does_not_take(pragma: str, tmp_path: Any) -> None:
    """Each PRAGMA is read back; what did not take is an error that names it."""
    raw = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    try:
        with pytest.raises(errors.ConnectionFailedError, match=f"PRAGMA {pragma} did not take"):
            opening._apply(
                Stubborn(raw, pragma), SqliteSettings("default", "x.db"), "x.db", lambda: False, readonly=False
            )
    finally:
        raw.close()
