"""The tool as a whole: how it fails, how it ends, how it is installed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from database.cli import main
from database.cli.support import clean, duration, quote, size

Cli = Callable[..., Any]


def test_help_teaches(cli: Cli) -> None:
    """Every command has help with what it does; without a command there is the list of them."""
    listed = cli("--help").out
    for name in ("check", "stats", "top", "init", "migrate", "backup", "import", "export", "shell", "bench"):
        assert f" {name} " in listed
        outcome = cli(name, "--help")
        assert (outcome.status, outcome.err) == (0, "")
        assert "--" in outcome.out
    assert "Exit status" in listed
    assert cli("--version").out.startswith("jobu-database ")


@pytest.mark.parametrize("arguments", [["nope"], ["check", "--nope"], ["import", "x.csv"], ["top", "--interval", "no"]])
def test_wrong_usage(cli: Cli, arguments: list[str]) -> None:
    """Wrong arguments: status 2, and what is wrong on stderr."""
    outcome = cli(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert "Usage:" in outcome.err


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "stats",
        "top",
        "init",
        "migrate",
        "backup b.db",
        "import a.csv t",
        "export t",
        "shell",
        "bench --config x.yaml",
    ],
)
def test_wrong_configuration(cli: Cli, tmp_path: Path, command: str) -> None:
    """A wrong configuration is one block with file, line and key; a missing one says how to name it. Never a traceback."""
    outcome = cli(*command.split())
    assert (outcome.status, outcome.out) == (2, "")
    assert "no such file" in outcome.err
    file = tmp_path / "config" / "database.yaml"
    file.parent.mkdir()
    file.write_text("database:\n  sqlite:\n    path: x.db\n    pool_sise: 3\n")
    (tmp_path / "x.yaml").write_text(file.read_text())
    outcome = cli(*command.split())
    assert (outcome.status, outcome.out) == (2, "")
    assert "database.yaml:4" in outcome.err or "x.yaml:4" in outcome.err
    assert "did you mean 'pool_size'?" in outcome.err
    assert "Traceback" not in outcome.err


def test_which_configuration(cli: Cli, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config` comes first, then DATABASE_CONFIG, then config/database.yaml; a wrong --db is told the right one."""
    configure(path="standard.db")
    for name in ("environment", "option"):
        (tmp_path / f"{name}.yaml").write_text(f"database: {{sqlite: {{path: {name}.db}}}}")
    assert "standard.db" in cli("check").out
    monkeypatch.setenv("DATABASE_CONFIG", "environment.yaml")
    assert "environment.db" in cli("check").out
    assert "option.db" in cli("check", "--config", "option.yaml").out
    outcome = cli("check", "--db", "defualt")
    assert (outcome.status, "did you mean 'default'?" in outcome.err) == (2, True)


def test_without_the_extra(tmp_path: Path) -> None:
    """Without the extra there is a message that says what to install, and importing the package does not need it."""
    code = (
        "import sys; sys.modules['typer'] = None; import database, database.sqlite3\n"
        "from database.cli import main; sys.exit(main(['check']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: the command-line tool needs 'typer', which is not installed\n"
        "  install the extra `cli` of this package, which brings all that it needs\n"
    )


def test_the_package_does_not_import_the_tool() -> None:
    """Importing the package and its engine brings in neither the tool nor what it needs."""
    code = (
        "import sys, database.sqlite3\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('typer', 'rich', 'prompt_toolkit')"
        " or name in ('database.cli', 'database.driver.monitor', 'database.engine.migrations')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ctrl_c(process: Any, shop: Path) -> None:
    """Ctrl-C ends an export cleanly: status 130, one word on stderr, no half a file."""
    endless = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    export = process("export", endless)
    assert export.stdout.readline() == "x\n"
    export.send_signal(signal.SIGINT)
    _, err = export.communicate(timeout=20)
    assert (export.returncode, err) == (130, "interrupted\n")


def test_a_reader_that_has_gone(process: Any, shop: Path) -> None:
    """`export … | head` ends quietly, as a tool in a pipe should."""
    endless = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    export = process("export", endless)
    assert export.stdout.readline() == "x\n"
    export.stdout.close()
    assert export.stderr.read() == ""
    export.stderr.close()
    export.stdin.close()
    assert export.wait(20) == 141


def test_stubs(cli: Cli, tmp_path: Path) -> None:
    """`stubs` hands its arguments on, and its status back."""
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "a.sql").write_text("-- name: one$\nSELECT 1;\n")
    assert cli("stubs", "sql", "--check").status == 1
    assert cli("stubs", "sql", "-o", "q.pyi").status == 0
    assert "one" in (tmp_path / "q.pyi").read_text()
    assert cli("stubs", "--help").out.startswith("usage: python -m database.stubs")


def test_entry_point() -> None:
    """The tool is installed under a name of its own."""
    found = [each for each in entry_points(group="console_scripts") if each.name == "jobu-database"]
    assert found[0].load() is main


def test_words() -> None:
    """Figures for people, and names that stay names."""
    assert [size(each) for each in (None, 0, 1023, 1536, 3 * 2**30)] == ["-", "0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [duration(each) for each in (5e-6, 0.0123, 3.21, 125, 7500)] == [
        "5 µs",
        "12.3 ms",
        "3.2 s",
        "2 min 5 s",
        "2 h 5 min",
    ]
    assert quote('a"b') == '"a""b"'
    assert clean("a\x1b[0m\nb\x9b") == "a␛[0m\nb�"
    assert clean("a\nb", lines=False) == "a␊b"


@pytest.mark.shortened
def test_a_terminal_that_knows_no_unicode(shop: Path, pytestconfig: pytest.Config) -> None:
    """Under an ASCII locale every command says what it has to say: likenesses and numbers of characters, no traceback."""
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain.pop("PYTHONIOENCODING", None)
    with closing(sqlite3.connect(shop)) as db:
        db.execute("UPDATE customer SET name = '이름 😀' WHERE id = 2")
        db.commit()
    (shop.parent / "이름.sql").write_text("SELECT '값';", "utf-8")
    sql = "SELECT '이름', name FROM customer WHERE id = 2"
    commands = [
        (["check", "--quick"], "+ SQLite"),
        (["check", "--quick", "--json"], '"verdict": '),
        (["stats"], "customer"),
        (["shell", "--command", ".read 이름.sql"], "\\uac12"),
        (["shell", "--command", sql], "\\uc774"),
        (["shell", "--command", sql, "--mode", "json"], None),
        (["shell", "--command", "SELECT '이름' FROM nowhere"], ""),
        (["export", sql, "--format", "jsonl"], None),
    ]
    for arguments, expected in commands[:: 3 if pytestconfig.getoption("quick") else 1]:
        command = subprocess.Popen(  # an interpreter of its own: the locale is that of its start
            [sys.executable, "-W", "error", "-m", "database", *arguments],
            cwd=shop.parent, env=plain, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            out, err = command.communicate(timeout=60)
        finally:
            command.kill()
            command.wait()
        assert "Traceback" not in err, err
        assert command.returncode == (1 if "nowhere" in arguments[-1] else 0), err
        if expected is None:
            assert list(json.loads(out).values()) == ["이름", "이름 😀"], out
        else:
            assert out.isascii()
            assert expected in out


def test_databases_of_the_same_name(cli: Cli, shop: Path, tmp_path: Path) -> None:
    """Where both engines have a database of one name, each command that takes one takes its engine, too."""
    both = {"sqlite": {"path": "x.db", "init_sql": ""}, "postgresql": {"host": "127.0.0.1", "port": 1, "dbname": "x"}}
    (tmp_path / "config" / "database.yaml").write_text(json.dumps({"database": both}))
    for command in (
        "check --quick", "stats", "backup copies.db", "export customer", "shell --command .tables", "migrate --folder none",
        "import a.csv customer", "init", "top --once",
    ):  # fmt: skip
        (tmp_path / "a.csv").write_text("id,name\n7,x\n")
        arguments = command.split()
        if arguments[0] not in ("check", "init", "top"):
            outcome = cli(*arguments)
            assert outcome.status == 2, command
            assert "say which: --db sqlite:default or --db postgresql:default" in outcome.err, command
        outcome = cli(*arguments, "--db", "sqlite:default")
        assert "several engines" not in outcome.err, command
        if arguments[0] in ("check", "stats", "backup", "export", "shell", "import", "init"):
            assert outcome.status == 0, (command, outcome.err)
        assert "no postgresql database is named 'other'" in cli(*arguments, "--db", "postgresql:other").err
    assert (tmp_path / "copies.db").exists()
