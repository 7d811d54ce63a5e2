"""What becomes of log records: who sees them, how often, and that no handler harms a statement."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from database import errors, logs
from tests import programs

PROGRAM = """
import logging, sys, anyio
import database
from database.sqlite3 import configure, get_db
from database import errors
{setup}
configure({{"database": {{"sqlite": {{"path": "x.db", "init_sql": "", "logging": {logging}}}}}}})
async def main():
    db = get_db()
    await db.execute("CREATE TABLE IF NOT EXISTS t (a UNIQUE)")
    await db.execute("INSERT OR REPLACE INTO t VALUES (7)")
    try:
        await db.execute("INSERT INTO t VALUES (7)")
    except errors.IntegrityError:
        pass
anyio.run(main)
"""


def outcome(folder: Path, setup: str, settings: str = "{}") -> str:
    """What a program writes to stderr."""
    status, out, err = programs.run(["-c", PROGRAM.format(setup=setup, logging=settings)], folder)
    assert (status, out) == (0, ""), err
    return err


def test_an_application_that_turns_its_own_records_on(tmp_path: Path) -> None:
    """`basicConfig(level=INFO)` shows warnings and errors of the package, and its statements only to those who ask for them."""
    text = outcome(tmp_path, "logging.basicConfig(level=logging.INFO)")
    assert "INFO" not in text
    assert text.count("ERROR:database.query:") == 1
    asked = "logging.basicConfig(level=logging.INFO); logging.getLogger('database.query').setLevel(logging.INFO)"
    text = outcome(tmp_path, asked)
    assert text.count("INFO:database.query:") == 3  # the failed one, too: one record per statement, beside its error
    assert "INFO:database.transaction:" not in text
    kept = "logging.getLogger('database').setLevel(logging.CRITICAL); import database.logs; logging.basicConfig()"
    assert outcome(tmp_path, kept) == ""


def test_the_console_is_told_once(tmp_path: Path) -> None:
    """With `console: true` each statement stands on the console once, whatever handlers the application has of its own."""
    for setup in (
        "",
        "logging.basicConfig()",
        "logging.basicConfig(stream=sys.stderr, level=logging.DEBUG)",
        "logging.basicConfig(filename='app.log', level=logging.DEBUG)",
        "logging.getLogger('database').addHandler(logging.StreamHandler())",
        "logging.basicConfig(); logging.getLogger().handlers[0].setLevel(logging.ERROR)",
        "logging.basicConfig(); logging.getLogger('database').propagate = False",
    ):
        text = outcome(tmp_path, setup, '{"console": True}')
        assert text.count("rows: INSERT OR REPLACE") + text.count("row: INSERT OR REPLACE") == 1, (setup, text)
        assert text.count("UNIQUE constraint failed") == 1, (setup, text)
    assert (tmp_path / "app.log").read_text().count("row: INSERT OR REPLACE") == 1


class Rude(logging.Handler):
    """Handlers like this exist: some end the program at the first ERROR."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1
        raise self.error


@pytest.fixture
def rude(request: pytest.FixtureRequest) -> Iterator[Any]:
    logger = logging.getLogger("database")
    level = logger.level
    handlers: list[logging.Handler] = []

    def add(error: type[BaseException]) -> Rude:
        for handler in handlers:
            logger.removeHandler(handler)
        handlers.append(Rude(error))
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.DEBUG)
        return handlers[-1]  # type: ignore[return-value]

    yield add
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.anyio
async def test_no_handler_ends_a_worker(
    make_db: Any, engine: Any, rude: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Handlers that raise SystemExit and the like, on every record there is, cost nothing but the record."""
    db = await make_db(logging={"slow_ms": 0})
    folder = tmp_path / "migrations"
    folder.mkdir()
    for number, error in enumerate((SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError), 1):
        handler = rude(error)
        (folder / f"{number:04d}_more.sql").write_text(f"CREATE TABLE more_{number} (a INTEGER)")
        with anyio.fail_after(30):
            await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": error.__name__})
            with pytest.raises(errors.IntegrityError):
                await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": error.__name__})
            async with db.transaction():
                assert await db.fetch_value("SELECT count(*) FROM jobs") == number
            if engine.name == "sqlite3":
                assert len((await db.migrate(folder)).applied) == 1
        assert handler.seen >= 5
        assert "an error while logging; the statement is not affected" in capsys.readouterr().err
    monkeypatch.setattr(logging, "raiseExceptions", False)
    await db.execute("INSERT INTO jobs (name) VALUES ('quiet')")
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_not_swallowed(capsys: Any) -> None:
    """A Ctrl-C that strikes the main thread while it logs goes on."""

    @logs.harmless
    def method(_self: None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(None)
    assert capsys.readouterr().err == ""
