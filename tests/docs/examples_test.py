"""The examples, run as a user runs them: the job service, its crontab reader, the README's quick start."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import programs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SAMPLE = EXAMPLES / "sample.crontab"
ENTRIES = 37
BACKENDS = [
    pytest.param(["--backend", "asyncio"], id="asyncio"),
    pytest.param(
        ["--backend", "asyncio", "--uvloop"],
        id="asyncio+uvloop",
        marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"),
    ),
    pytest.param(["--backend", "trio"], id="trio"),
]


def load_example(name: str) -> Any:
    """The module of an example, which is no part of the package and of no path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


crontab = load_example("crontab")


# The job service


class Service:
    """The job service on a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "database.yaml"
        self.config.write_text('database:\n  sqlite:\n    path: "./jobs.db"\n')
        self.environment = {k: v for k, v in os.environ.items() if k != "DATABASE_CONFIG"}

    def arguments(self, *arguments: object) -> list[str]:
        return [str(EXAMPLES / "jobu.py"), *map(str, arguments)]

    def run(self, *arguments: object, config: bool = True) -> subprocess.CompletedProcess[str]:
        given = self.arguments(*arguments, *(["--config", self.config] if config else []))
        status, out, err = programs.run(given, self.folder, environment=self.environment)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(given, status, out, err)

    @contextlib.contextmanager
    def started(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        given = self.arguments(*arguments, "--config", self.config)
        with programs.Started(given, self.folder, environment=self.environment) as process:
            try:
                yield process
            finally:
                process.kill()

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.folder / "jobs.db")) as connection:
            return connection.execute(sql).fetchall()


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def read_report(stdout: str) -> dict[str, str]:
    """The report's lines by their label."""
    report: dict[str, str] = {}
    label = ""
    for line in stdout.splitlines():
        label = line[:9].strip() or label
        report[label] = f"{report.get(label, '')} {line[9:]}".strip()
    return report


@pytest.mark.parametrize("backend", BACKENDS)
def test_service_does_every_run_once_and_a_second_start_duplicates_nothing(
    service: Service, backend: list[str]
) -> None:
    """What the report says adds up, is what the database holds, and holds for a second start."""
    for start in (1, 2):
        done = service.run(*backend, "--jobs", 120, "--workers", 5)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("everything adds up\n")
        report = read_report(done.stdout)
        assert report["crontab"].endswith(f"(system format) {ENTRIES} entries, 4 variables, 2 lines skipped")
        new, unchanged = (ENTRIES, 0) if start == 1 else (0, ENTRIES)
        assert report["jobs"].startswith(f"{new} new, 0 changed, {unchanged} unchanged 0 disabled")
        assert report["runs"] == "120 enqueued, 0 left over from an earlier start"
        assert report["states"] == f"0 queued, 0 running, {start * 120} done, 0 failed"
        assert sum(map(int, re.findall(r": (\d+)", report["workers"]))) == 120
        assert re.fullmatch(r"[1-9]\d* snapshots, 0 inconsistent", report["readers"])
        assert "commits_total=" in report["pool"]
        assert service.query("SELECT count(*), count(DISTINCT name) FROM jobs") == [(ENTRIES, ENTRIES)]
        assert service.query("SELECT state, count(*) FROM job_runs GROUP BY state") == [("done", start * 120)]
    echoed = "SELECT count(*) FROM job_runs JOIN jobs ON jobs.id = job_id WHERE output LIKE name || ': %'"
    assert service.query(echoed) == [(240,)]
    assert service.query("PRAGMA integrity_check") == [("ok",)]


def test_service_reports_malformed_lines_by_number(service: Service) -> None:
    """A malformed line is reported on stderr with file, line number and reason, and skipped."""
    done = service.run("--jobs", 1, SAMPLE)
    skipped = [line for line in done.stderr.splitlines() if ": skipped: " in line]
    assert [line.partition(": skipped: ")[0] for line in skipped] == [f"{SAMPLE}:52", f"{SAMPLE}:69"]
    assert "70 is out of range 0-59" in skipped[0]
    assert "unknown shortcut '@fortnightly'" in skipped[1]


def test_service_follows_the_crontab(service: Service) -> None:
    """A changed schedule changes its job; what has left the crontab is disabled until it is back."""
    path = service.folder / "mine.crontab"
    path.write_text("0 1 * * * first --run\n0 2 * * * second\n")
    service.run("--jobs", 2, path)
    path.write_text("30 1 * * * first --run\n")
    report = read_report(service.run("--jobs", 1, path).stdout)
    assert report["crontab"].endswith("(user format) 1 entries, 0 variables, 0 lines skipped")
    assert report["jobs"].startswith("0 new, 1 changed, 0 unchanged 1 disabled")
    jobs = service.query("SELECT cron_expr, handler, enabled FROM jobs ORDER BY id")
    assert jobs == [("30 1 * * *", "first --run", 1), ("0 2 * * *", "second", 0)]
    path.write_text("30 1 * * * first --run\n0 2 * * * second\n")
    report = read_report(service.run("--jobs", 0, path).stdout)
    assert report["jobs"].startswith("0 new, 1 changed, 1 unchanged 0 disabled")
    assert service.query("SELECT min(enabled), count(*) FROM jobs") == [(1, 2)]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("signals", "status"),
    [
        pytest.param([signal.SIGINT], 130, id="SIGINT"),
        pytest.param([signal.SIGINT] * 3, 130, id="SIGINT at once again"),
        pytest.param([signal.SIGTERM], 143, id="SIGTERM"),
        pytest.param([9], -9, id="SIGKILL"),
    ],
)
def test_service_loses_nothing_when_it_is_stopped(
    service: Service, backend: list[str], signals: list[int], status: int
) -> None:
    """Stopped in the middle it says so in one line, and the next start does what was left, once."""
    with service.started(*backend, "--jobs", 300, "--seconds", 0.06) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.match(r"jobu: [1-9]\d* of 300 runs done", line):
                break
        for signum in signals:
            process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == status, stderr
    assert stdout == ""
    last = stderr.splitlines()[-1:]
    if status < 0:
        assert "interrupted" not in stderr
    else:
        assert "Traceback" not in stderr
        found = re.fullmatch(r"jobu: interrupted: (\d+) runs done, (\d+) left for the next start", last[0])
        assert found is not None, stderr
        assert int(found[1]) + int(found[2]) == 300
        assert 0 < int(found[2]) < 300
    assert service.query("SELECT count(*) FROM job_runs") == [(300,)]
    again = service.run(*backend, "--jobs", 0, "--seconds", 0)
    assert again.returncode == 0, again.stderr
    assert read_report(again.stdout)["states"] == "0 queued, 0 running, 300 done, 0 failed"
    assert service.query("SELECT count(*) FROM job_runs WHERE output IS NULL") == [(0,)]


def test_service_does_not_claim_success_without_work(service: Service) -> None:
    """A crontab without a job, and runs wanted: that does not add up."""
    path = service.folder / "empty.crontab"
    path.write_text("# nothing yet\n")
    done = service.run("--jobs", 3, path)
    assert done.returncode == 1
    assert "jobu: does not add up: no job is enabled" in done.stderr
    assert "everything adds up" not in done.stdout


def test_service_says_what_is_wrong_in_one_line(service: Service) -> None:
    """Errors of the environment end it with status 1 and one line; wrong usage with status 2."""
    absent = service.folder / "absent.crontab"
    done = service.run(absent)
    assert (done.returncode, done.stderr) == (1, f"jobu: cannot read {absent}: No such file or directory\n")

    quiet = service.folder / "quiet.crontab"
    quiet.write_text("@daily true\n")
    service.config.write_text("database:\n  sqlite:\n    path: jobs.db\n    poolsize: 2\n")
    done = service.run(quiet)
    assert done.returncode == 1
    assert re.fullmatch(r"jobu: .*database\.yaml.*poolsize.*\n", done.stderr), done.stderr

    service.config.write_text("database:\n  sqlite:\n    path: .\n")
    done = service.run(quiet)
    assert done.returncode == 1
    assert re.fullmatch(r"jobu: cannot open database .*\n", done.stderr), done.stderr

    for wrong in (
        ["--jobs", "-1"],
        ["--workers", "0"],
        ["--backend", "curio"],
        ["--backend", "trio", "--uvloop"],
    ):
        done = service.run(*wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: jobu")


def test_service_reads_its_configuration_from_the_environment(service: Service) -> None:
    """Without --config, DATABASE_CONFIG names the file."""
    service.environment["DATABASE_CONFIG"] = str(service.config)
    assert service.run("--jobs", 5, config=False).returncode == 0
    assert service.query("SELECT count(*) FROM job_runs") == [(5,)]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")
def test_service_shows_a_progress_bar_on_a_terminal(service: Service) -> None:
    """With rich installed and stderr a terminal, a bar runs to 100 %."""
    pytest.importorskip("rich")
    master, slave = programs.pseudo_terminal()
    service.environment |= {"TERM": "xterm", "COLUMNS": "100"}
    process = programs.Started(
        service.arguments("--jobs", 50, "--config", service.config),
        service.folder,
        environment=service.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(master, 65536):
            shown += piece
    os.close(master)
    assert process.wait(timeout=30) == 0, shown
    assert b"100%" in shown
    assert b"runs done" not in shown


# The README


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("anyio.run(main)", id="asyncio"),
        pytest.param(
            'anyio.run(main, backend_options={"use_uvloop": True})',
            id="asyncio+uvloop",
            marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"),
        ),
        pytest.param('anyio.run(main, backend="trio")', id="trio"),
    ],
)
def test_quick_start_of_the_readme_runs(tmp_path: Path, call: str) -> None:
    """The quick start is a complete script, and may be run again."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (script,) = [block for block in blocks if "\nanyio.run(main)" in block]
    path = tmp_path / "quickstart.py"
    path.write_text(script.replace("\nanyio.run(main)", f"\n{call}"), "utf-8")
    for _ in range(2):
        status, out, err = programs.run([str(path)], tmp_path)
        assert (status, err) == (0, "")
        assert sorted(out.splitlines()) == [f"0 {hour} * * *  report-{hour}" for hour in range(5)]


# The crontab reader


def entry(line: str, format: str = "user") -> Any:
    """The only entry of a crontab of one line."""
    parsed = crontab.parse_crontab(line, format)
    assert parsed.malformed == []
    (found,) = parsed.entries
    return found


def reason(line: str, format: str = "user") -> str:
    """Why a line is malformed."""
    parsed = crontab.parse_crontab(line, format)
    assert parsed.entries == []
    (malformed,) = parsed.malformed
    return str(malformed.reason)


def test_crontab_formats_differ_in_the_user_column() -> None:
    """The system's own format has a user name before the command; the user format has not."""
    line = "17 *\t* * *\troot\tcd / && run-parts --report /etc/cron.hourly"
    system = entry(line, "system")
    assert (system.schedule, system.user) == ("17 * * * *", "root")
    assert system.command == "cd / && run-parts --report /etc/cron.hourly"
    user = entry(line, "user")
    assert (user.schedule, user.user) == ("17 * * * *", None)
    assert user.command == "root\tcd / && run-parts --report /etc/cron.hourly"
    assert entry("@daily backup  restic  --all", "system").user == "backup"
    assert "user name before the command, found '/usr/bin/foo'" in reason("5 4 * * * /usr/bin/foo --bar", "system")
    assert "command is missing after user name 'root'" in reason("5 4 * * * root", "system")


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("* * * * * root /bin/true\n", "system"),
        ("# m h dom mon dow user\tcommand\n* * * * * shop /bin/true\n", "system"),
        ("# m h  dom mon dow   command\n* * * * * echo hello\n", "user"),
        ("@daily echo hello\n0 1 * * * backup --all\n", "user"),
        ("* * * * * root /bin/a\n* * * * * root /bin/b\n* * * * * /bin/forgotten user\n", "system"),
        ("0 1 * * * /bin/a b\n0 1 * * * /bin/b c\n0 1 * * * root c\n", "user"),
        ("", "user"),
    ],
)
def test_crontab_format_is_told_from_the_content(content: str, format: str) -> None:
    """Without a given format, the header comment or the sixth column tells."""
    assert crontab.parse_crontab(content).format == format


def test_crontab_format_is_told_from_the_place(tmp_path: Path) -> None:
    """A file in cron.d has the user column, whatever it looks like; a given format outranks that."""
    path = tmp_path / "cron.d" / "shop"
    path.parent.mkdir()
    path.write_text("0 1 * * * shop reprice\n")
    assert crontab.read_crontab(path).entries[0].user == "shop"
    assert crontab.read_crontab(path, "user").entries[0].command == "shop reprice"


@pytest.mark.parametrize(
    "schedule",
    [
        "* * * * *",
        "*/5 * * * *",
        "0 0-23/2 * * *",
        "1,2,5,9 0-4,8-12 1-31 1-12 0-7",
        "5-55/10 09 01,15 JAN,apr Mon-FRI",
        "0 22 * * 1-5",
        "0 0 29 feb sun",
        "0 0 * * 5-7",
        "00059 023 * * *",
        *["@reboot", "@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"],
    ],
)
def test_crontab_takes_what_cron_takes(schedule: str) -> None:
    """Numbers, names, lists, ranges, steps and shortcuts."""
    assert entry(f"  {schedule}   echo  hi ").schedule == schedule
    assert entry(f"{schedule}\techo  hi").command == "echo  hi"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("60 * * * * x", "minute '60': 60 is out of range 0-59"),
        ("* 24 * * * x", "hour '24': 24 is out of range 0-23"),
        ("* * 0 * * x", "day of month '0': 0 is out of range 1-31"),
        ("* * * 13 * x", "month '13': 13 is out of range 1-12"),
        ("* * * * 8 x", "day of week '8': 8 is out of range 0-7"),
        ("99999999999999999999 * * * * x", "is out of range 0-59"),
        ("* * * * fun x", "day of week 'fun': 'fun' is not a number or name"),
        ("* * jan * * x", "day of month 'jan': 'jan' is not a number"),
        ("1,,2 * * * * x", "minute '1,,2': '' is not a number"),
        ("٣ * * * * x", "is not a number"),
        ("-5 * * * * x", "'' is not a number"),
        ("*/0 * * * * x", "step '0' is not a positive number"),
        ("*/ * * * * x", "step '' is not a positive number"),
        ("*/x * * * * x", "step 'x' is not a positive number"),
        ("5/10 * * * * x", "a step needs a range or * before it"),
        ("30-10 * * * * x", "range 30-10 runs backwards"),
        ("0 0 * * fri-sun x", "range fri-sun runs backwards (Sunday may be written 7)"),
        ("@sometimes x", "unknown shortcut '@sometimes'"),
        ("@daily", "the command is missing"),
        ("* * * * *", "the command is missing"),
        ("* * * * * %only input", "the command is missing"),
        ("* * * *", "neither a setting nor five time fields and a command"),
        ("every day at noon run this", "minute 'every': 'every' is not a number"),
        ("NAME", "neither a setting nor five time fields and a command"),
        ("NAME = 'open", "the value's quotes do not match"),
        ('NAME = "a" b', "the value's quotes do not match"),
        ("NAME = '", "the value's quotes do not match"),
        ("@daily a\0b", "contains a NUL character"),
    ],
)
def test_crontab_says_why_a_line_is_malformed(line: str, expected: str) -> None:
    """Each malformed line has its reason."""
    assert expected in reason(line)


def test_crontab_reads_settings() -> None:
    """Spaces around the sign are optional; quotes keep blanks; an entry has what stands above it."""
    content = 'A=1\n B = two words \nC=\' kept \'\nD=""\nE=\n"F G" = it\'s # all\n@daily x\nA=2\n@daily y\n'
    parsed = crontab.parse_crontab(content, "user")
    first = {"A": "1", "B": "two words", "C": " kept ", "D": "", "E": "", "F G": "it's # all"}
    assert parsed.settings == first | {"A": "2"}
    assert [e.environment for e in parsed.entries] == [first, first | {"A": "2"}]
    assert [e.line for e in parsed.entries] == [7, 9]
    assert entry("* * * * * FOO=bar run").command == "FOO=bar run"


@pytest.mark.parametrize(
    ("command", "line", "data"),
    [
        ("date", "date", None),
        (r"date +\%Y\%m", "date +%Y%m", None),
        ("mail joe%Joe,%%Where?%", "mail joe", "Joe,\n\nWhere?\n"),
        (r"cat%100\% sure", "cat", "100% sure"),
        ("cat%", "cat", ""),
    ],
)
def test_crontab_percent_ends_the_command_line(command: str, line: str, data: str | None) -> None:
    r"""A bare % starts the standard input and is a line break in it; \% is a percent sign."""
    assert crontab.split_command(command) == (line, data)


def test_crontab_names_are_unique_readable_and_stable() -> None:
    """A name says user and program, outlives its schedule and neighbours, and differs between entries."""
    command = "test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }"
    name = entry(f"25 6 * * * root {command}", "system").name
    assert re.fullmatch(r"root/run-parts-[0-9a-f]{6}", name)
    content = f"@daily backup {command}\n1 1 * * * root {command}\n2 2 * * * root {command}\n@daily root other\n"
    names = [e.name for e in crontab.parse_crontab(content, "system").entries]
    assert names[1:3] == [name, f"{name}-2"]
    assert len(set(names)) == 4
    assert entry("@daily 'größe'").name.startswith("größe-")
    assert entry("@daily -").name.startswith("command-")


def test_crontab_survives_bytes_from_anywhere() -> None:
    """A byte order mark and CRLF are taken; a line that is no UTF-8 is malformed, and only that line."""
    parsed = crontab.parse_crontab(b"\xef\xbb\xbf@daily one\r\n@daily caf\xe9\r\n\r\n@daily three", "user")
    assert [(e.line, e.command) for e in parsed.entries] == [(1, "one"), (4, "three")]
    assert [(m.line, m.reason) for m in parsed.malformed] == [(2, "is not UTF-8 text")]


WORDS = st.sampled_from(
    ["*", "*/5", "1-5", "0", "mon", "@daily", "root", "A=1", "#", '"', "%", "\\", "=", "é", "\n", "\t"]
)


@settings(deadline=None)
@given(st.one_of(st.binary(), st.text(), st.lists(WORDS, max_size=30).map(" ".join)))
def test_crontab_never_raises(content: bytes | str) -> None:
    """Whatever the content, each line is an entry, malformed, or neither, and names are unique."""
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    for format in ("system", "user", None):
        parsed = crontab.parse_crontab(content, format)
        lines = [x.line for x in (*parsed.entries, *parsed.malformed)]
        assert len(set(lines)) == len(lines)
        assert len({e.name for e in parsed.entries}) == len(parsed.entries)


def test_sample_crontab_is_what_the_documentation_says() -> None:
    """At least 30 entries, comments, settings, shortcuts, names, percent signs, and two malformed lines."""
    parsed = crontab.read_crontab(SAMPLE)
    assert parsed.format == "system"
    assert len(parsed.entries) == ENTRIES >= 30
    assert [m.line for m in parsed.malformed] == [52, 69]
    assert parsed.settings["BACKUP_LABEL"] == "nightly, full  "
    assert {e.schedule for e in parsed.entries} >= {"@reboot", "@daily", "0 9,13,17 * * MON-FRI"}
    assert any(crontab.split_command(e.command)[1] for e in parsed.entries)
