"""What the tests of the command-line tool share."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from database import settings
from database.cli import main
from tests import programs

if find_spec("typer") is None:  # the extra `cli` is not installed
    collect_ignore_glob = ["*_test.py"]


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in a directory of its own, with no configuration but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    yield
    settings.reset()


if find_spec("typer") is not None:
    import typer.main

    built = functools.cache(typer.main.get_command)
    """The commands, made of their functions once: a process needs them once, and the making takes longer than most of them."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`cli("check", "--json")` runs a command in this process."""
    monkeypatch.setattr("typer.main.get_command", built)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`process("export", …)` starts a command as it is typed, in a process of its own."""

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        return programs.Started(["-m", "database", *map(str, arguments)], tmp_path, **options)

    return start


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Path]:
    """`configure(path="x.db", …)` writes config/database.yaml; gives the database's path."""

    def write(**values: Any) -> Path:
        values = {"path": "x.db", "init_sql": ""} | values
        file = tmp_path / "config" / "database.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"database": {"sqlite": values}}))  # JSON is YAML, too
        return tmp_path / values["path"]

    return write


@pytest.fixture
def shop(configure: Callable[..., Path]) -> Path:
    """A small database, in WAL mode, with references between its tables."""
    path = configure()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            """
            PRAGMA journal_mode = WAL;
            CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, balance REAL, picture BLOB);
            CREATE TABLE "order" (id INTEGER PRIMARY KEY, customer INTEGER NOT NULL REFERENCES customer, [what? "it"] TEXT);
            INSERT INTO customer VALUES (1, 'Ada', 1.5, x'00ff'), (2, 'Bo', NULL, NULL);
            INSERT INTO "order" VALUES (1, 1, 'tea'), (2, 2, NULL);
            """
        )
    return path


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="jd-"))
    yield path
    shutil.rmtree(path)


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """What somebody sees who has nothing to do with the package."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def files(path: Path) -> set[str]:
    """The names of what lies beside a database."""
    return set(os.listdir(path.parent))
