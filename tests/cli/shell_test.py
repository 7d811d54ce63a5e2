"""`shell`: without a terminal, and with one."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import rows
from tests.programs import Started, pseudo_terminal

Cli = Callable[..., Any]

ENDLESS = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n;"


@pytest.fixture
def typed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(text: str, *options: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return cli("shell", *options)

    return run


def test_statements(typed: Any, shop: Path) -> None:
    """Statements over several lines, several on one, triggers, comments, and a last one without its semicolon."""
    outcome = typed(
        """
        CREATE TABLE log (x); -- a remark; with a semicolon
        CREATE TRIGGER t AFTER INSERT ON customer BEGIN
            INSERT INTO log VALUES (NEW.name);
        END;
        INSERT INTO customer (name) VALUES ('Cy'); SELECT x AS "who?"
        FROM log
        """
    )
    assert (outcome.status, outcome.out.split()) == (0, ["who?", "────", "Cy"])
    assert "1 row changed, last row id 3" in outcome.err


def test_input_that_is_no_text(cli: Cli, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input of another encoding is an error with a sentence, and nothing is executed."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"DELETE FROM customer; SELECT '\xff';"), "utf-8"))
    outcome = cli("shell")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "error: standard input: not utf-8: invalid start byte\n"
    assert len(rows(shop, "SELECT * FROM customer")) == 2


def test_an_error_ends_it(typed: Any, shop: Path) -> None:
    """Without a terminal the first error ends the shell, with status 1, and an open transaction is rolled back."""
    outcome = typed('BEGIN; DELETE FROM "order"; SELECT nope; DELETE FROM customer;')
    assert outcome.status == 1
    assert "the open transaction was rolled back" in outcome.err
    assert "error: no such column: nope" in outcome.err
    assert "Traceback" not in outcome.err
    assert len(rows(shop, 'SELECT * FROM "order"')) == 2


def test_transactions(typed: Any, shop: Path) -> None:
    """BEGIN, COMMIT and ROLLBACK do what they say."""
    assert typed("BEGIN; INSERT INTO customer (name) VALUES ('x'); ROLLBACK;").status == 0
    assert typed("BEGIN; INSERT INTO customer (name) VALUES ('y'); COMMIT;").status == 0
    assert rows(shop, "SELECT name FROM customer WHERE id > 2") == [("y",)]
    assert "a transaction is open already" in typed("BEGIN; BEGIN;").err
    assert "no transaction is open" in typed("COMMIT;").err
    assert "no transaction is open" in typed("ROLLBACK;").err
    assert "SAVEPOINT is not for this shell" in typed("SAVEPOINT x;").err


def test_readonly(typed: Any, shop: Path) -> None:
    """With --readonly everything that writes is refused, in a transaction and outside."""
    for text in (
        "DELETE FROM customer;",
        "BEGIN; DELETE FROM customer;",
        "DELETE FROM customer RETURNING id;",
        "DROP TABLE customer;",
    ):
        assert "refuses" in typed(text, "--readonly").err
    assert typed("BEGIN; SELECT 1; COMMIT;", "--readonly").status == 0
    assert len(rows(shop, "SELECT * FROM customer")) == 2


def test_modes(typed: Any, shop: Path) -> None:
    """Rows as a table, as CSV, as JSON, line by line; NULL and BLOBs are told apart from text."""
    sql = "SELECT id, name, picture FROM customer;"
    table = typed(sql).out
    assert "x'00ff' (2 bytes)" in table
    assert "NULL" in table
    assert typed(f".mode csv\n{sql}").out == "id,name,picture\n1,Ada,\\x00ff\n2,Bo,\n"
    lines = typed(sql, "--mode", "json").out.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["Ada", "Bo"]
    line = typed("SELECT 9e999 AS up, -9e999 AS down, x'00' AS b", "--mode", "json").out
    assert line == '{"up": 1e999, "down": -1e999, "b": "\\\\x00"}\n'
    assert typed("SELECT 1 AS a, 2 AS a", "--mode", "json").out == '{"a": 1, "a": 2}\n'
    assert "     id = 2\n   name = Bo\npicture = NULL\n" in typed(f".mode line\n{sql}").out
    assert typed(".mode what").status == 1
    assert typed("", "--mode", "what").status == 2


def test_what_could_command_a_terminal(typed: Any, shop: Path) -> None:
    """Control characters in a value are shown, not sent to the terminal."""
    outcome = typed("SELECT 'a' || char(27) || '[31mred' || char(7) AS x;")
    assert "\x1b" not in outcome.out
    assert "a␛[31mred␇" in outcome.out


def test_commands(typed: Any, cli: Cli, shop: Path, tmp_path: Path) -> None:
    """The commands that begin with a dot."""
    assert typed(".tables").out == "customer\norder\n"
    assert typed(".tables c%").out == "customer\n"
    assert typed(".schema customer").out.startswith("CREATE TABLE customer (")
    assert "nothing is named 'nope'" in typed(".schema nope").err
    assert ".timer on|off" in typed(".help").out
    assert typed(".timer on\nSELECT 1;").err.startswith("timer on\n(")
    assert "the first 1 are shown" in typed(".limit 1\nSELECT id FROM customer;").err
    assert "statements_total" in typed(".stats").out
    assert "there is no command .nope" in typed(".nope").err
    assert "wrong number of arguments" in typed(".read").err
    (tmp_path / "x.sql").write_text("SELECT 'from a file';")
    assert "from a file" in typed(".read x.sql").out
    assert "No such file" in typed(".read y.sql").err
    assert (
        cli("shell", "--command", "SELECT 1 AS a", "--command", ".tables", "--mode", "csv").out
        == "a\n1\ncustomer\norder\n"
    )
    assert typed(".quit\nSELECT 1;").out == ""


class Terminal:
    """A command at a pseudo-terminal, as somebody sits at it."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.descriptor, other = pseudo_terminal()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(directory / "state")}
        self.process = Started(
            ["-m", "database", *arguments], directory, environment=environment, terminal=True,
            stdin=other, stdout=other, stderr=other,
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.descriptor)

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def see(self, text: str, within: float = 20.0) -> bool:
        """Waits until the text has been written since the last call."""
        deadline = time.monotonic() + within
        while text not in self.seen:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if select.select([self.descriptor], [], [], left)[0]:
                try:
                    self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
                except OSError:  # Linux says so when the other side has gone
                    return text in self.seen
        self.seen = self.seen.split(text, 1)[1]
        return True


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_at_a_terminal(shop: Path, tmp_path: Path) -> None:
    """A statement over two lines, a transaction's star in the prompt, Ctrl-C that stops a statement and nothing else, an
    error that does not end it, Ctrl-D that does; the history is for its owner's eyes.
    """
    with Terminal(tmp_path, "shell") as terminal:
        assert terminal.see("default>"), terminal.seen
        terminal.type("SELECT name\r")
        terminal.type("FROM customer;\r")
        assert terminal.see("Ada"), terminal.seen
        assert terminal.see("default>"), terminal.seen
        terminal.type("BEGIN;\r")
        assert terminal.see("default*>"), terminal.seen
        terminal.type("ROLLBACK;\r")
        assert terminal.see("default>"), terminal.seen
        terminal.type(f"{ENDLESS}\r")
        while not terminal.see("interrupted", within=0.3):  # until then the prompt may not have handed it over
            terminal.type("\x03")
        assert terminal.see("default>"), terminal.seen
        terminal.type("SELECT nope;\r")
        assert terminal.see("error: no such column: nope"), terminal.seen
        assert terminal.see("default>"), terminal.seen
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    history = tmp_path / "state" / "jobu-database" / "shell-history"
    assert "+FROM customer;" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_without_a_terminal(process: Any, shop: Path) -> None:
    """Ctrl-C ends a shell that reads from a pipe: status 130, one word, nothing kept open."""
    shell = process("shell")
    shell.stdin.write("SELECT 'going';\n" + ENDLESS)
    shell.stdin.close()
    while "going" not in shell.stdout.readline():
        pass
    shell.send_signal(signal.SIGINT)
    assert shell.wait(20) == 130
    assert shell.stderr.read().splitlines()[-1] == "interrupted"
    shell.stdout.close()
    shell.stderr.close()
    assert not Path(f"{shop}-wal").exists()
