"""Tests; a package so that `tests/sqlite3` can never shadow the standard library's module."""
