"""`import` and `export`: what comes out goes in again, and what does not fit is refused with its line."""

from __future__ import annotations

import io
import json
import math
import re
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import files, rows

Cli = Callable[..., Any]

INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, width=64)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))  # CSV in Python 3.11 has no NUL


def of_types(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    nullable = [st.none() | each for each in (INTEGERS, FLOATS, texts, st.binary())]
    return st.lists(st.tuples(*nullable), min_size=1, max_size=20)


CREATE = 'CREATE TABLE [t "x"; --] (i INTEGER, [r, "eal"] REAL, "order" TEXT, b BLOB)'


@pytest.mark.parametrize(
    ("file", "options"),
    [("x.csv", ["--null", "\\N"]), ("x.jsonl", []), ("x.csv", ["--null", "\\N", "--delimiter", "tab"])],
    ids=["csv", "jsonl", "tsv"],
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=of_types(TEXTS.filter(lambda text: text != "\\N")))
def test_there_and_back(cli: Cli, configure: Callable[..., Path], file: str, options: list[str], values: Any) -> None:
    """Whatever SQLite holds comes back as it was, NULL and the empty text told apart, under names that need quotes."""
    path = configure()
    path.unlink(missing_ok=True)
    Path(file).unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.execute(CREATE)
        db.execute(CREATE.replace("[t ", "[u "))
        db.executemany('INSERT INTO [t "x"; --] VALUES (?, ?, ?, ?)', values)
        db.commit()
    assert re.fullmatch(r".*: [0-9,]+ rows in [0-9.]+ m?s\n", cli("export", 't "x"; --', "-o", file, *options).err)
    outcome = cli("import", file, 'u "x"; --', *options)
    assert (outcome.status, outcome.err) == (0, "")
    assert rows(path, 'SELECT * FROM [u "x"; --]') == rows(path, 'SELECT * FROM [t "x"; --]')


def test_export_csv(cli: Cli, shop: Path) -> None:
    """CSV on standard output: a header, quotes where they are needed, NULL as nothing, BLOBs as hexadecimal digits."""
    outcome = cli("export", "customer")
    assert (outcome.status, outcome.out) == (0, "id,name,balance,picture\n1,Ada,1.5,\\x00ff\n2,Bo,,\n")
    outcome = cli(
        "export", "SELECT name FROM customer WHERE id = :id AND name = :name", "--param", "id=1", "--param", "name=Ada"
    )
    assert outcome.out == "name\nAda\n"
    assert cli("export", "SELECT id AS a, name FROM customer WHERE 0").out == "a,name\n"


def test_export_jsonl(cli: Cli, shop: Path) -> None:
    """JSONL: one object a line, with the types of the values; infinity in a form that readers of JSON take."""
    lines = cli("export", "SELECT *, 9e999 AS inf FROM customer", "--format", "jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": 1, "name": "Ada", "balance": 1.5, "picture": {"$base64": "AP8="}, "inf": math.inf},
        {"id": 2, "name": "Bo", "balance": None, "picture": None, "inf": math.inf},
    ]
    outcome = cli("export", "SELECT 1 AS a, 2 AS a", "--format", "jsonl")
    assert (outcome.status, "two columns are named 'a'" in outcome.err) == (2, True)


def test_export_refuses(cli: Cli, shop: Path, tmp_path: Path) -> None:
    """A failed export leaves no file, an existing one is kept, and a query that writes is not run."""
    (tmp_path / "kept.csv").write_text("kept")
    assert cli("export", "customer", "-o", "kept.csv").status == 2
    assert (tmp_path / "kept.csv").read_text() == "kept"
    before = files(shop)
    outcome = cli("export", "SELECT nope FROM customer", "-o", "new.csv")
    assert (outcome.status, outcome.err.splitlines()[0]) == (1, "error: no such column: nope [SQLITE_ERROR]")
    assert files(shop) == before
    assert cli("export", "DELETE FROM customer RETURNING id").status == 1
    assert len(rows(shop, "SELECT * FROM customer")) == 2
    assert "there is no table 'custmer'" in cli("export", "custmer").err
    assert cli("export", "customer", "--param", "x").status == 2
    assert cli("export", "customer", "--format", "xml").status == 2
    assert cli("export", "customer", "-o", "new.csv", "--delimiter", "ab").status == 2


@pytest.fixture
def people(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "people.csv") -> Path:
        (tmp_path / name).write_text(text, "utf-8", newline="")
        return tmp_path / name

    return write


def test_import_is_all_or_nothing(cli: Cli, shop: Path, people: Any) -> None:
    """A row that does not fit is named by its line, and nothing of the file is stored."""
    people("id,name\n3,Cy\n4,Di\n5,Ada\n6,Ed\n")
    outcome = cli("import", "people.csv", "customer")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        "error: people.csv:4: UNIQUE constraint failed: customer.name [SQLITE_CONSTRAINT_UNIQUE]\n  nothing was stored\n"
    )
    assert len(rows(shop, "SELECT * FROM customer")) == 2
    people("id,name\n3,Cy\n4\n")
    assert (
        "people.csv:3: 1 fields, but there are 2 columns\n  nothing was stored"
        in cli("import", "people.csv", "customer").err
    )
    people('id,name\n3,Cy\n4,"D"i\n')
    assert "people.csv: not CSV" in cli("import", "people.csv", "customer").err
    assert len(rows(shop, "SELECT * FROM customer")) == 2


def test_import_in_batches(cli: Cli, shop: Path, people: Any) -> None:
    """With --batch what was committed stays, and the message says how much that is."""
    people("id,name\n3,Cy\n4,Di\n5,Ada\n6,Ed\n")
    outcome = cli("import", "people.csv", "customer", "--batch", 1)
    assert outcome.status == 1
    assert "people.csv:4" in outcome.err
    assert "the first 2 rows are stored: they were committed before" in outcome.err
    assert rows(shop, "SELECT name FROM customer ORDER BY id") == [("Ada",), ("Bo",), ("Cy",), ("Di",)]
    people("id,name\n7,Fay\n8,Guy\n")
    assert cli("import", "people.csv", "customer", "--batch", 2, "--json").json["stored"] == 2


def test_import_conflicts(cli: Cli, shop: Path, people: Any) -> None:
    """Rows that are there already are left out or replaced, if one says so."""
    people("id,name\n3,Cy\n2,Bob\n")
    outcome = cli("import", "people.csv", "customer", "--on-conflict", "ignore")
    assert "1 rows" in outcome.out
    assert ", 1 left out" in outcome.out
    assert cli("import", "people.csv", "customer", "--on-conflict", "replace").status == 0
    assert rows(shop, "SELECT name FROM customer ORDER BY id") == [("Ada",), ("Bob",), ("Cy",)]
    assert cli("import", "people.csv", "customer", "--on-conflict", "what").status == 2


def test_import_types(cli: Cli, shop: Path, people: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields become what their column asks for; an empty one is NULL, or what --null says; a header may be given."""
    people("7,007,1e2,\\x0A\n8,,,\n")
    outcome = cli("import", "people.csv", "customer", "--columns", "id, name, balance, picture", "--null", "-")
    assert outcome.status == 0
    assert rows(shop, "SELECT * FROM customer WHERE id > 6") == [(7, "007", 100.0, b"\n"), (8, "", "", "")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"id": 9, "name": "x"}\n{"name": [1]}\n')))
    assert cli("import", "-", "customer", "--format", "jsonl").status == 0
    assert rows(shop, "SELECT * FROM customer WHERE id > 8") == [(9, "x", None, None), (10, "[1]", None, None)]


def test_import_says_what_is_wrong(cli: Cli, shop: Path, people: Any) -> None:
    """Wrong names get the right ones suggested; wrong files are named with what is wrong with them."""
    people("id,nmae\n3,Cy\n")
    outcome = cli("import", "people.csv", "customer")
    assert (outcome.status, "has no column 'nmae'" in outcome.err, "did you mean 'name'?" in outcome.err) == (
        2,
        True,
        True,
    )
    outcome = cli("import", "people.csv", "custmer")
    assert (outcome.status, "did you mean 'customer'?" in outcome.err) == (2, True)
    assert "neither .csv nor .jsonl" in cli("import", "people.txt", "customer").err
    assert "No such file" in cli("import", "nowhere.csv", "customer").err
    people("")
    assert "a header" in cli("import", "people.csv", "customer").err
    people('{"id": 1}\n[1]\n', "people.jsonl")
    assert "people.jsonl:2: each line has to be an object" in cli("import", "people.jsonl", "customer").err
    people('{"id": 1', "people.jsonl")
    assert "people.jsonl:1: not JSON" in cli("import", "people.jsonl", "customer").err
    people('{"picture": {"$base64": "!"}}', "people.jsonl")
    assert "people.jsonl:1: $base64" in cli("import", "people.jsonl", "customer").err
    Path("people.csv").write_bytes(b"id,name\n3,\xff\n")
    assert "people.csv: not utf-8" in cli("import", "people.csv", "customer").err
    assert cli("import", "people.csv", "customer", "--encoding", "latin-1").status == 0
    assert cli("import", "people.csv", "customer", "--encoding", "klingon").status == 2
    assert rows(shop, "SELECT name FROM customer WHERE id = 3") == [("ÿ",)]


def test_import_generated_columns(cli: Cli, shop: Path, people: Any) -> None:
    """A generated column cannot be given a value, and is refused before anything is tried."""
    with closing(sqlite3.connect(shop)) as db:
        db.execute("CREATE TABLE g (a, b AS (a + 1))")
    people("a,b\n1,2\n")
    assert "column 'b' is generated" in cli("import", "people.csv", "g").err
    people("a\n1\n")
    assert cli("import", "people.csv", "g").status == 0


def test_import_leaves_out_what_a_line_leaves_out(cli: Cli, shop: Path, people: Any) -> None:
    """A key that a line of JSONL leaves out gets its column's default, null is NULL, and an empty object all defaults."""
    with closing(sqlite3.connect(shop)) as db:
        db.execute("CREATE TABLE d (a DEFAULT 7, b)")
    people('{"b": 1}\n{"a": null, "b": true}\n\n{}\n{"b": {"x": [1]}, "a": "\\\\x00"}\n', "people.jsonl")
    assert cli("import", "people.jsonl", "d").status == 0
    assert rows(shop, "SELECT a, b FROM d") == [(7, 1), (None, 1), (7, None), ("\\x00", '{"x": [1]}')]


def test_import_creates_a_table(cli: Cli, shop: Path, people: Any) -> None:
    """Types are guessed so that no value is changed by them; if a row fails, there is no table either."""
    people("id,zip,rate,mixed,none,big\n1,01234,0.5,1,,99999999999999999999\n2,12345,2,x,,1\n")
    assert cli("import", "people.csv", "people", "--create").status == 0
    assert rows(shop, "SELECT * FROM people") == [
        (1, "01234", 0.5, "1", None, "99999999999999999999"),
        (2, "12345", 2.0, "x", None, "1"),
    ]
    assert "exists already" in cli("import", "people.csv", "people", "--create").err
    people("a,a\n1,2\n")
    assert cli("import", "people.csv", "fresh", "--create").status == 2
    assert rows(shop, "SELECT name FROM sqlite_schema WHERE name = 'fresh'") == []


def test_import_without_a_database(cli: Cli, configure: Callable[..., Path], people: Any) -> None:
    """A database that does not exist is not created by accident."""
    path = configure()
    people("a\n1\n")
    outcome = cli("import", "people.csv", "t", "--create")
    assert (outcome.status, "`python -m database init` creates it" in outcome.err) == (2, True)
    assert not path.exists()


JSONL_VALUES = [
    '"1.10"', '"12345"', '"007"', "1e400", "-1e999", "1e999", "9007199254740993", "0.5", "2.0", "-0.0", "1.10", '"a"', "5",
    "null", "3.14159265358979323846", "18446744073709551616", '{"a": [1.10, 1e400]}', '[ 1,2 ]', '"[1]"', '{"$base64": "AP8="}',
]  # fmt: skip
CSV_VALUES = ["1.10", "12345", "007", "1e400", "9007199254740993", "0.5", "5", "5.0", "+1", "1_0", " 7", "-0", "-0.0", "nan",
    "1e5", "\\x00ff", "\\xAB", "9e999", "٣", "99999999999999999999", "abc"]  # fmt: skip


def test_created_tables_give_back_what_stood_there(
    cli: Cli, shop: Path, people: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in pairs, and with the one value that matters behind the sample: what is exported is what was imported."""
    monkeypatch.setattr("database.cli.imports.SAMPLE", 5)

    def same(token: str, found: str) -> bool:
        if token[0] in "[{" and "$base64" not in token:  # documents are kept as their text
            return json.loads(found) == token
        if token in (
            "1e400",
            "3.14159265358979323846",
            "18446744073709551616",
        ):  # numbers that nothing but text can hold
            return json.loads(found) == token
        old, new = json.loads(token), json.loads(found)
        return type(old) is type(new) and repr(old) == repr(new)

    for number, one in enumerate(JSONL_VALUES):
        columns = [json.dumps(f"c{index}") for index in range(len(JSONL_VALUES))]
        first = "{" + ", ".join(f"{name}: {one}" for name in columns) + "}"
        second = "{" + ", ".join(f"{name}: {other}" for name, other in zip(columns, JSONL_VALUES, strict=True)) + "}"
        lines = [first, second] if number % 2 else [first] * 7 + [second]
        people("\n".join(lines), "values.jsonl")
        outcome = cli("import", "values.jsonl", f"j{number}", "--create")
        assert outcome.status == 0, outcome.err
        back = cli("export", f"j{number}", "--format", "jsonl").out.splitlines()
        assert len(back) == len(lines)
        for line, tokens in ((back[0], [one] * len(columns)), (back[-1], JSONL_VALUES)):
            found = re.findall(r'"c\d+": (.*?)(?=, "c\d+": |\}$)', line)
            wrong = [pair for pair in zip(tokens, found, strict=True) if not same(*pair)]
            assert wrong == [], one
    header = ",".join(f"c{index}" for index in range(len(CSV_VALUES)))
    for number, one in enumerate(CSV_VALUES):
        lines = [
            header,
            ",".join([one] * len(CSV_VALUES)),
            *[",".join([one] * len(CSV_VALUES))] * 7,
            ",".join(CSV_VALUES),
        ]
        text = "\n".join(lines if number % 2 else lines[:2] + lines[-1:]) + "\n"
        people(text, "values.csv")
        options = ["--batch", "7"] if number % 3 == 0 else []
        assert cli("import", "values.csv", f"c{number}", "--create", *options).status == 0
        assert cli("export", f"c{number}").out == text, one


def test_types_that_do_not_fit_what_comes_later(cli: Cli, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input cannot be read twice: a later value that the guessed type would change ends it, with its line."""
    text = "a\n" + "1\n" * 1001 + "007\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    outcome = cli("import", "-", "t", "--create")
    assert (outcome.status, "standard input:1003: column 'a' is INTEGER by its first 1,000 rows" in outcome.err) == (
        1,
        True,
    )
    assert rows(shop, "SELECT name FROM sqlite_schema WHERE name = 't'") == []


def test_faults_of_a_file_are_found_on_their_line(cli: Cli, shop: Path, people: Any) -> None:
    """What is not CSV, not JSON, nested too deeply or not of the encoding is named with its line, never with a traceback."""
    many = b"".join(b"%d,n%d\r\n" % (number, number) for number in range(10, 5010))
    deep = b"[" * 100_000 + b"]" * 100_000
    cases = [
        ("x.csv", b'id,name\n3,Cy\n4,"D"i\n', "x.csv: not CSV: ", "(x.csv:3)"),
        ("x.csv", b'id,name\n3,"Cy\n4,Di\n5,Ed\n', "x.csv: not CSV: ", "(x.csv:2)"),
        ("x.csv", b"id,name\r\n3,Cy\r\n" + many + b"4,\xff\r\n", "x.csv: not utf-8: ", "(x.csv:5003)"),
        ("x.csv", "id,name\n".encode("utf-16") + b"\x00\xd8", "x.csv: not utf-16", "(x.csv:2)"),
        ("x.jsonl", b'{"id": 1}\n{"name": "\xff"}\n', "x.jsonl: not utf-8: ", "(x.jsonl:2)"),
        ("x.jsonl", b'{"id": 1}\n\n{"name": ' + deep + b"}", "x.jsonl:3: not JSON", "nested too deeply"),
        ("x.jsonl", b'{"id": 1}\n{"name": ' + b"9" * 5000 + b"}", "x.jsonl:2: not JSON", "digits"),
    ]  # fmt: skip
    for name, content, *parts in cases:
        Path(name).write_bytes(content)
        options = ["--encoding", "utf-16"] if "utf-16" in parts[0] else []
        outcome = cli("import", name, "customer", *options)
        assert outcome.status == 1
        assert [part for part in parts if part not in outcome.err] == [], outcome.err
        assert "Traceback" not in outcome.err
    assert len(rows(shop, "SELECT * FROM customer")) == 2
