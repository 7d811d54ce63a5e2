"""Generated stubs: what they say agrees with what is loaded, and type checkers make of it what it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from database import stubs
from database.errors import ConfigurationError
from database.sqlite3 import load_queries

JOBS = """
-- name: get_job_by_id^
-- record_class: Job
-- One job; \\ and \"\"\" are harmless here.
-- By its id.
SELECT * FROM jobs WHERE id = :id;
-- name: get_all_jobs
-- record_class: Job
SELECT * FROM jobs WHERE enabled = :enabled AND name <> ':no';
-- name: plain_rows(least)
SELECT * FROM jobs WHERE id > :least AND id > :least;
-- name: count_jobs$
SELECT count(*) FROM jobs WHERE name LIKE ? -- really?
-- name: insert_job<!
INSERT INTO jobs (name, cron_expr) VALUES (:name, :cron_expr);
-- name: update-job!
UPDATE jobs SET enabled = @enabled WHERE id = :id;
-- name: insert_jobs*!
INSERT INTO jobs (name) VALUES (:name);
-- name: create#
CREATE TABLE x (a);
"""
REPORTS = """
-- name: between
SELECT * FROM jobs WHERE created_at BETWEEN :first AND :last;
"""
USE = """
from collections.abc import AsyncIterator
from typing import Any, assert_type

from app.models import Job
from app.queries import queries
from database.sqlite3 import Row, get_db

db = get_db()


async def both_ways() -> None:
    assert_type(await queries.insert_job(db, name="a", cron_expr="b"), int | None)
    assert_type((await db.execute(queries.insert_job, {"name": "a"})).rowcount, int)
    assert_type(await queries.get_job_by_id(db, id=1), Job | None)
    assert_type(await db.fetch_one(queries.get_job_by_id, {"id": 1}), Job | None)
    assert_type(queries.get_all_jobs(db, enabled=1), AsyncIterator[Job])
    assert_type(await db.fetch_all(queries.get_all_jobs, {"enabled": 1}), list[Job])
    assert_type(await db.fetch_one(queries.get_all_jobs, {"enabled": 1}), Job | None)
    assert_type(await db.fetch_all(queries.get_all_jobs, {"enabled": 1}, record_class=dict[str, Any]), list[dict[str, Any]])
    assert_type([job.name async for job in queries.get_all_jobs(db, enabled=1)], list[str])
    async with db.stream(queries.get_all_jobs, {"enabled": 1}) as jobs:
        async for job in jobs:
            assert_type(job, Job)
    assert_type(await db.fetch_all(queries.plain_rows, {"least": 1}), list[Row])
    assert_type([row["name"] async for row in queries.plain_rows(db, least=1)], list[Any])
    async with queries.plain_rows_cursor(db, least=1) as rows:
        assert_type([row async for row in rows], list[Row])
    count: int = await queries.count_jobs(db, "a%")
    assert_type(await db.fetch_value(queries.count_jobs, ("a%",)), Any)
    assert_type(await queries.update_job(db, enabled=count, id=1), int)
    assert_type(await queries.insert_jobs(db, [{"name": "a"}]), int)
    await db.execute_many(queries.insert_jobs, [{"name": "a"}])
    assert_type(await queries.create(db), str)
    await db.execute_script(queries.create)
    assert_type(await db.fetch_all(queries.reports.between, {"first": 1, "last": 2}), list[Row])
    assert_type(queries.available_queries, list[str])


async def wrong() -> None:
    await queries.insert_job(db, nam="a", cron_expr="b")  # error
    await queries.insert_job(db, name="a")  # error
    await queries.insert_job(name="a", cron_expr="b")  # error
    await queries.get_all_jobs(db, enabled=1)  # error
    await queries.get_job(db, id=1)  # error
    (await db.fetch_all(queries.get_all_jobs))[0].nam  # error
    await queries.reports.betwixt(db)  # error
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A package with query files, record classes and a module that loads them; its stub is not there yet."""
    app = tmp_path / "app"
    (app / "sql" / "reports").mkdir(parents=True)
    (app / "__init__.py").touch()
    (app / "sql" / "jobs.sql").write_text(JOBS)
    (app / "sql" / "reports" / "all.sql").write_text(REPORTS)
    (app / "models.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Job:\n    id: int\n    name: str\n"
    )
    (app / "queries.py").write_text(
        "from pathlib import Path\nfrom app.models import Job\nfrom database.sqlite3 import load_queries\n"
        'queries = load_queries(Path(__file__).with_name("sql"), {"Job": Job})\n'
    )
    (tmp_path / "use.py").write_text(USE)
    return app


def command(app: Path, *more: str) -> list[str]:
    output = str(app / "queries.pyi")
    return [str(app / "sql"), "--output", output, "--record-class", "Job=app.models:Job", *more]


def test_the_stub_says_what_is_loaded(app: Path) -> None:
    """Each query that aiosql makes has its line, with its parameters, and none has a line that is not there."""
    text = stubs.generate(app / "sql", record_classes={"*": "app.models"})
    queries = load_queries(app / "sql")
    described: set[str] = set()
    for prefix, body in re.findall(r"class (?:Queries|_folder_(\w+)):\n((?: .*\n)+)", text):
        names = re.findall(r"    (\w+): _(?!folder)", body)
        described |= {f"{prefix}.{name}" if prefix else name for name in names}
    assert described == set(queries.available_queries)
    assert "*, enabled: Any) -> AsyncIterator[app.models.Job]" in text
    assert "*, least: Any) -> AsyncIterator[Row]" in text
    assert text == stubs.generate(app / "sql", record_classes={"*": "app.models"})


def test_check(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check writes nothing, passes if the stub is up to date, else fails and shows what has changed."""
    assert stubs.main(command(app, "--check")) == 1
    assert not (app / "queries.pyi").exists()
    assert stubs.main(command(app)) == 0
    before = (app / "queries.pyi").stat().st_mtime_ns
    assert stubs.main(command(app)) == 0
    assert stubs.main(command(app, "--check")) == 0
    assert (app / "queries.pyi").stat().st_mtime_ns == before
    capsys.readouterr()
    (app / "sql" / "more.sql").write_text("-- name: added!\nDELETE FROM jobs WHERE id = :which;")
    assert stubs.main(command(app, "--check")) == 1
    shown = capsys.readouterr()
    assert "+    async def __call__(self, db: Database, /, *, which: Any) -> int: ..." in shown.out
    assert "queries.pyi is out of date" in shown.err


def test_where_the_stub_goes(app: Path) -> None:
    """Without --output it stands beside the files; in a package that holds them, it is the package's own."""
    arguments = [str(app / "sql"), "--record-class", "*=app.models"]
    assert stubs.main(arguments) == 0
    assert (app / "sql.pyi").exists()
    (app / "sql" / "__init__.py").touch()
    assert stubs.main([*arguments, "--name", "sql"]) == 0
    assert (app / "sql" / "__init__.pyi").read_text().endswith("\nsql: Queries\n")
    assert stubs.main([str(app / "sql" / "reports" / "all.sql")]) == 0
    assert "between: _between\n" in (app / "sql" / "reports" / "all.pyi").read_text()


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "-- name: a\n-- record_class: Job\nSELECT 1;",
            "q.sql:1: query 'a' has the record class 'Job', and nobody says",
        ),
        ("-- name: class!\nDELETE FROM a;", "q.sql:1: 'class' cannot be written as queries.class"),
        ("-- name: a b\nSELECT 1;", "queries cannot be loaded from .*q.sql.*invalid query name"),
        ("-- name: a\nSELECT :from;", "queries cannot be loaded from .*q.sql.*'from' is not a valid parameter name"),
        (None, "queries cannot be loaded from .*q.sql"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], sql: str | None, message: str) -> None:
    """What cannot be described is refused with file, line and reason, and nothing is written."""
    file = tmp_path / "q.sql"
    if sql is not None:
        file.write_text(sql)
    assert stubs.main([str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "q.pyi").exists()
    with pytest.raises(ConfigurationError, match=message):
        stubs.generate(file)


HARD_NAMES = """
-- name: by_db
SELECT :db, :_db, :cls, :Any, :args, :kwargs;
-- name: list
SELECT 1;
-- name: str!
DELETE FROM jobs WHERE id = :rows;
-- name: Database^
SELECT :Database;
"""


def test_names_that_mean_something_in_python(tmp_path: Path) -> None:
    """Parameters and queries may be called like what a stub needs for itself; the stub stays valid and says what is loaded."""
    (tmp_path / "q.sql").write_text(HARD_NAMES)
    queries = load_queries(tmp_path / "q.sql")
    for engine in ("sqlite3", "sqlite", "postgresql"):
        text = stubs.generate(tmp_path / "q.sql", engine=engine)
        compile(text, "q.pyi", "exec")
        for name in ("by_db", "list", "str", "Database"):
            assert hasattr(queries, name)
            assert f"    {name}: _{name}\n" in text
        assert "_database: Database, /, *, db: Any, _db: Any, cls: Any, Any: Any, args: Any, kwargs: Any" in text
        face = "postgresql" if engine == "postgresql" else "sqlite3"
        imports = re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE)
        assert [each for each in imports if each.startswith("database")] == [f"database.{face}"]
        assert "    available_queries: builtins.list[builtins.str]" in text


def test_postgresql_names(tmp_path: Path) -> None:
    """What only looks like a parameter in PostgreSQL's SQL (a slice, a cast, a literal) is none."""
    (tmp_path / "q.sql").write_text(
        "-- name: a\nSELECT (:ids)[1:2], now()::date, $$ :hh $$, E'it\\'s :no', to_char(now(), 'HH:MI') FROM t\n"
        "WHERE id = :id;\n"
        "-- name: b!\nDELETE FROM t WHERE id = $1;\n"
    )
    text = stubs.generate(tmp_path / "q.sql", engine="postgresql")
    assert "db: Database, /, *, ids: Any, id: Any) -> AsyncIterator[Row]" in text
    assert "db: Database, /, *args: Any) -> int" in text
    with pytest.raises(ConfigurationError, match="there is no engine 'mysql'; there are postgresql, sqlite3"):
        stubs.generate(tmp_path / "q.sql", engine="mysql")


@pytest.mark.parametrize("name", ["from", "class", "self", "None", "lambda"])
def test_parameters_that_cannot_be_are_named_with_file_and_query(tmp_path: Path, name: str) -> None:
    """In a folder of many, the one query that stops it is named with its file and line, by the stub and when it is loaded."""
    (tmp_path / "sql" / "deep").mkdir(parents=True)
    (tmp_path / "sql" / "good.sql").write_text("-- name: good\nSELECT 1;\n")
    (tmp_path / "sql" / "deep" / "bad.sql").write_text(
        f"-- name: fine\nSELECT 1;\n\n-- name: wrong^\nSELECT :{name};\n"
    )
    for read in (stubs.generate, load_queries):
        with pytest.raises(ConfigurationError) as caught:
            read(tmp_path / "sql")
        assert "bad.sql:4: query 'wrong^': " in str(caught.value)
        assert "keyword argument" in str(caught.value)
        assert name in str(caught.value)


def test_a_keyword_as_parameter_is_a_configuration_error(tmp_path: Path) -> None:
    """`load_queries()` says so too, instead of letting aiosql's ValueError out."""
    (tmp_path / "q.sql").write_text("-- name: a\nSELECT :from;")
    with pytest.raises(ConfigurationError, match="'from' is not a valid parameter name"):
        load_queries(tmp_path / "q.sql")


def test_the_command() -> None:
    """`python -m database.stubs --help` explains itself with an example; a malformed option is wrong usage."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "database.stubs", "--help"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--record-class Job=app.models:Job" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "database.stubs", "x", "--record-class", "Job"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--record-class takes NAME=MODULE:CLASS, not 'Job'" in done.stderr
