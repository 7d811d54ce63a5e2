r"""Reads crontab(5) files, the tables of cron(8), as Debian's cron understands them.

A line is blank, a comment (`#` first), a setting (`NAME = value`, either side in matching quotes if need be),
or an entry: five time fields or a shortcut such as `@daily`, in the system's own format (`/etc/crontab` and
`/etc/cron.d/*`) a user name, and the command, which is the rest of the line. Anything else is malformed: it
is returned with its line number and the reason, and the lines around it are read all the same.

In a command the first bare `%` ends the command line; what follows is its standard input, in which each
further `%` is a line break. `\%` is a percent sign. `Entry.command` is the text as it stands in the file;
`split_command` takes it apart.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["system", "user"]

SHORTCUTS = ("@reboot", "@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
MONTHS = {
    "jan": 1, "feb": 2, "mar": 3, "apr": 4, "may": 5, "jun": 6,
    "jul": 7, "aug": 8, "sep": 9, "oct": 10, "nov": 11, "dec": 12,
}  # fmt: skip
DAYS = {"sun": 0, "mon": 1, "tue": 2, "wed": 3, "thu": 4, "fri": 5, "sat": 6}
FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of week", 0, 7, DAYS),  # 0 and 7 are Sunday
)
SETTING = re.compile(
    r"""(?: "(?P<double>[^"]+)" | '(?P<single>[^']+)' | (?P<bare>[A-Za-z_]\w*) )
    [ \t]* = [ \t]* (?P<value>.*)""",
    re.VERBOSE | re.ASCII,
)
ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?")
# Only a system crontab has these in the sixth column; no program is called so.
TELLTALE_ACCOUNTS = frozenset({"root", "www-data", "nobody", "daemon", "postgres"})
# What a command line may start with before it says which program it is about: tests, and words such as these.
TESTS = re.compile(r"(?:(?:if )?(?:test|\[) .*?(?:&&|\|\||; then)\s+)+")
PREAMBLE = frozenset(
    {"bash", "cd", "command", "env", "exec", "if", "ionice", "nice", "sh", "sleep", "sudo", "then", "timeout"}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One job of a crontab."""

    line: int
    name: str
    schedule: str  # five fields with one space between them, or a shortcut
    user: str | None  # None in a user's own crontab
    command: str
    environment: dict[str, str]  # the settings that stand above the entry


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that cron would refuse, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Crontab:
    """What a crontab says."""

    format: Format
    entries: list[Entry]
    settings: dict[str, str]
    malformed: list[Malformed]


def read_crontab(path: Path, format: Format | None = None) -> Crontab:
    """Reads the file; without a format, its place or its content tells which one it is.

    Raises:
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    if format is None and (path.parent.name == "cron.d" or path == Path("/etc/crontab")):
        format = "system"
    return parse_crontab(content, format)


def parse_crontab(content: bytes | str, format: Format | None = None) -> Crontab:
    """Parses a crontab's content; without a format, the content tells which one it is."""
    if isinstance(content, str):
        content = content.encode()
    lines = [line.strip(b" \t\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    crontab = Crontab(format or guess_format(lines), [], {}, [])
    names: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith(b"#"):
            continue
        try:
            text = line.decode()
            if "\0" in text:
                raise ValueError("contains a NUL character")
            if setting := SETTING.fullmatch(text):
                name = setting["double"] or setting["single"] or setting["bare"]
                crontab.settings[name] = _unquote(setting["value"])
                continue
            schedule, rest = _split_schedule(text)
            user, command = _split_user(rest) if crontab.format == "system" else (None, rest)
            if not command or command.startswith("%"):
                raise ValueError("the command is missing")
        except ValueError as error:  # UnicodeDecodeError is one
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            crontab.malformed.append(Malformed(number, reason))
            continue
        name = _make_name(user, command)
        names[name] += 1
        if names[name] > 1:
            name = f"{name}-{names[name]}"
        crontab.entries.append(Entry(number, name, schedule, user, command, dict(crontab.settings)))
    return crontab


def guess_format(lines: list[bytes]) -> Format:
    """Tells the formats apart: by Debian's header comment, else by accounts in most entries' sixth column."""
    accounts = others = telltales = 0
    for line in lines:
        if re.match(rb"#\s*m\s+h\s+dom\s+mon\s+dow\s+user\b", line):
            return "system"
        try:
            _, rest = _split_schedule(line.decode())
            user, _ = _split_user(rest)
        except ValueError:
            others += bool(re.match(rb"[@*0-9]", line))
        else:
            accounts += 1
            telltales += user in TELLTALE_ACCOUNTS
    return "system" if telltales and accounts > others else "user"


def split_command(command: str) -> tuple[str, str | None]:
    r"""Command line and standard input (None: none) of a command, with `%` and `\%` replaced."""
    line, *data = [part.replace("\\%", "%") for part in re.split(r"(?<!\\)%", command)]
    return line, "\n".join(data) if data else None


def _split_schedule(text: str) -> tuple[str, str]:
    if text.startswith("@"):
        shortcut, *rest = re.split(r"[ \t]+", text, maxsplit=1)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"unknown shortcut {shortcut!r} (known: {', '.join(SHORTCUTS)})")
        return shortcut, rest[0] if rest else ""
    words = re.split(r"[ \t]+", text, maxsplit=len(FIELDS))
    if len(words) < len(FIELDS):
        raise ValueError(f"neither a setting nor five time fields and a command: {text[:60]!r}")
    for word, field in zip(words, FIELDS, strict=False):
        _check_field(word, *field)
    return " ".join(words[: len(FIELDS)]), "".join(words[len(FIELDS) :])


def _split_user(rest: str) -> tuple[str, str]:
    user, *command = re.split(r"[ \t]+", rest, maxsplit=1)
    if not ACCOUNT.fullmatch(user):
        raise ValueError(f"expected a user name before the command, found {user!r}")
    if not command:
        raise ValueError(f"the command is missing after user name {user!r}")
    return user, command[0]


def _check_field(text: str, label: str, low: int, high: int, names: dict[str, int]) -> None:
    def value(word: str) -> int:
        number = names.get(word.lower())
        if number is None:
            if not re.fullmatch(r"[0-9]+", word):
                kind = "a number or name" if names else "a number"
                raise ValueError(f"{label} {text!r}: {word!r} is not {kind}")
            number = int(word.lstrip("0")[:4] or "0")  # four digits are out of every range
        if not low <= number <= high:
            raise ValueError(f"{label} {text!r}: {word} is out of range {low}-{high}")
        return number

    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not re.fullmatch(r"0*[1-9][0-9]*", step):
            raise ValueError(f"{label} {text!r}: step {step!r} is not a positive number")
        if span == "*":
            continue
        first, dash, last = span.partition("-")
        start = value(first)
        if dash and value(last) < start:
            hint = " (Sunday may be written 7)" if names is DAYS and value(last) == 0 else ""
            raise ValueError(f"{label} {text!r}: range {span} runs backwards{hint}")
        if slash and not dash:
            raise ValueError(f"{label} {text!r}: a step needs a range or * before it")


def _unquote(value: str) -> str:
    quote = value[:1]
    if quote not in {'"', "'"}:
        return value
    if len(value) < 2 or value.find(quote, 1) != len(value) - 1:
        raise ValueError(f"the value's quotes do not match: {value}")
    return value[1:-1]


def _make_name(user: str | None, command: str) -> str:
    """`user/program-digest`: the same for as long as user and command are, wherever they stand."""
    program = "command"
    for word in re.split(r"[\s;&|(){}\[\]<>`$\"'!]+", TESTS.sub("", command, count=1)):
        base = word.rstrip("/").rpartition("/")[2]
        if re.fullmatch(r"[^\W\d_][\w.+-]*", base) and base not in PREAMBLE:
            program = base[:40]
            break
    digest = hashlib.sha256(f"{user}\n{command}".encode()).hexdigest()[:6]
    return f"{user}/{program}-{digest}" if user else f"{program}-{digest}"
