"""The documentation is true: its Python runs, its outputs are printed, its settings, queries and commands are real.

How blocks are run, by what they look like:

- A ```` ```python ```` block is a whole program, run under asyncio and trio.
- One that awaits at its top level is the inside of an `async def`: it finds `db` on a new database that has the
  packaged tables and two jobs, a second database `audit`, and the package's names imported.
- A block with `title="name.ext"` is that file. It is there for the blocks below it on the page, and is run itself if
  it is Python; `test_*.py` is run by pytest.
- A ```` ```py ```` block is Python that is only shown: it is compiled. A ```` ```console ```` block is a session: the lines
  that begin with `$ ` are commands.
- A translated page's Python is the original's but for its comments (`tests/docs/translations.py`), so it is not run again.
- A ```` ```text title="Output" ```` block is what the Python block above it prints; `…` stands for anything.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sqlite3
import subprocess
import tempfile
import textwrap
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from database import settings
from database.errors import ConfigurationError
from database.sqlite3 import load_queries
from tests import programs
from tests.docs import translations

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<text>.*?)^(?P=indent)``` *$", re.M | re.S
)
LANGUAGES = {"python", "py", "sh", "console", "sql", "yaml", "toml", "json", "text", "mermaid"}

SNIPPET = """\
import ast, pathlib, sys
import anyio
from database import errors
from database.sqlite3 import close_all, configure, get_db, lifespan, load_queries, transactional, transactional_readonly

JOBS = [("report", "0 6 * * *", "send"), ("backup", "@daily", "copy")]
configure({"database": {"sqlite": {"path": "jobu.db", "databases": {"audit": {"path": "audit.db"}}}}})
db = get_db()


async def main():
    await db.execute_many("INSERT INTO jobs (name, cron_expr, handler) VALUES (?, ?, ?)", JOBS)
    code = compile(pathlib.Path("snippet.txt").read_text("utf-8"), "app.py", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, globals())


anyio.run(main, backend=sys.argv[1])
"""


@dataclass(frozen=True)
class Block:
    page: Path
    number: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(DOCS) if DOCS in self.page.parents else self.page.name}-{self.number}"


def read_blocks(page: Path) -> list[Block]:
    blocks = []
    for number, match in enumerate(FENCE.finditer(page.read_text("utf-8")), 1):
        title = re.search(r'title="([^"]*)"', match["options"])
        text = textwrap.dedent(match["text"])
        blocks.append(Block(page, number, match["language"], title[1] if title else "", text))
    return blocks


BLOCKS = {page: read_blocks(page) for page in PAGES}


def blocks_in(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in BLOCKS[page] if block.language in languages]


def write_files(block: Block, folder: Path) -> None:
    """Writes the files that the page has shown up to here."""
    for each in BLOCKS[block.page][: block.number]:
        if each.title and each.title != "Output":
            file = folder / each.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(each.text, "utf-8")


def awaits_at_top(block: Block) -> bool:
    try:
        compile(block.text, str(block), "exec", optimize=0)  # with its assertions, also under PYTHONOPTIMIZE
    except SyntaxError:
        compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        return True
    return False


def on_backend(code: str, backend: str) -> str:
    code = re.sub(r"anyio\.run\(((?:(?!backend)[^()])*)\)", rf'anyio.run(\1, backend="{backend}")', code)
    return code.replace("TestClient(app)", f'TestClient(app, backend="{backend}")')


def expected_output(block: Block) -> str | None:
    after = BLOCKS[block.page][block.number :][:1]
    return after[0].text if after and after[0].title == "Output" else None


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("block", [each for each in blocks_in("python") if ".ko." not in each.page.name], ids=str)
def test_python(block: Block, backend: str, tmp_path: Path) -> None:
    """A block runs to its end without an error or a warning, and prints what the page says."""
    write_files(block, tmp_path)
    for file in tmp_path.rglob("*.py"):
        file.write_text(on_backend(file.read_text("utf-8"), backend), "utf-8")
    if block.title.startswith("test_"):
        command = [*programs.PYTEST, block.title]
    elif block.title:
        command = [block.title]
    elif awaits_at_top(block):
        (tmp_path / "snippet.txt").write_text(block.text, "utf-8")
        command = ["-c", SNIPPET, backend]
    else:
        command = ["-c", on_backend(block.text, backend)]
    status, out, err = programs.run(command, tmp_path)
    assert (status, err) == (0, ""), out + err
    expected = expected_output(block)
    if expected is not None:
        pattern = re.escape(expected.strip()).replace("…", ".*")
        assert re.fullmatch(pattern, out.strip(), re.S), out


@pytest.mark.parametrize("block", blocks_in("yaml", "json", "toml"), ids=str)
def test_data(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of settings is accepted as the configuration, unless its title says `broken`; any other can be read."""
    if block.language == "toml":
        data = tomllib.loads(block.text)
    elif block.language == "json":
        data = json.loads(block.text)
    else:
        data = yaml.safe_load(block.text)
    if block.language != "yaml" or "database" not in data:
        return
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: some settings take short paths only
        folder = Path(name)
        monkeypatch.chdir(folder)
        write_files(block, folder)
        for path in re.findall(r"[ \"](\./[\w./-]+)", block.text):  # what the settings name, if it must exist
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.suffix == ".sql":
                place.touch()
            elif not place.suffix:
                place.mkdir(exist_ok=True)
        (folder / "settings.yaml").write_text(block.text, "utf-8")
        accept(block)


def accept(block: Block) -> None:
    """Reads a block of settings, which lies in the working directory."""
    file = "settings.yaml"
    if "broken" in block.title:
        with pytest.raises(ConfigurationError):
            settings.configure(file)
        return
    settings.configure(file)
    try:
        assert settings.current().engines
    finally:
        settings.configure(None)


@pytest.mark.parametrize("block", blocks_in("sql"), ids=str)
def test_sql(block: Block, tmp_path: Path) -> None:
    """Statements run, and queries are queries: SQLite prepares each, on the page's own schema or the packaged one."""
    write_files(block, tmp_path)
    if block.page.name.startswith(("postgresql", "moving-to-postgresql")):
        pytest.skip("another dialect")
    schemas = [file.read_text("utf-8") for file in tmp_path.rglob("schema.sql")]
    connection = sqlite3.connect(":memory:")
    connection.executescript("".join(schemas) or (ROOT / "database/sqlite3/sql/init.sql").read_text("utf-8"))
    if "-- name:" not in block.text:
        connection.executescript(block.text)
    else:
        file = tmp_path / "queries-of-block.sql"
        file.write_text(block.text, "utf-8")
        queries = load_queries(file)
        for name in queries.available_queries:
            connection.execute(f"EXPLAIN {getattr(queries, name).sql}", defaultdict(int))
    connection.close()


def test_shown_python_compiles() -> None:
    """Python that is not run is Python all the same."""
    for block in blocks_in("py"):
        compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", blocks_in("sh", "console"), ids=str)
def test_sh(block: Block) -> None:
    """Commands can be parsed; the targets, extras, groups and scripts that they name exist."""
    text = block.text
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    titles = {each.title for each in BLOCKS[block.page]}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        for word in words:
            if extras := re.fullmatch(r"(?:\.|\./[\w-]+|jobu-database)\[([\w,-]+)\]", word):
                assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"]), line
        for flag, group in zip(words, words[1:], strict=False):
            if flag == "--group":
                assert group in project["dependency-groups"], line
            if flag in ("python", "python3") and group.endswith(".py"):
                assert group in titles or (ROOT / group).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_checked(page: Path) -> None:
    """Each block says what it is, in a language that is checked; an odd fence would be skipped in silence."""
    assert {block.language for block in BLOCKS[page]} <= LANGUAGES
    assert page.read_text("utf-8").count("```") == 2 * len(BLOCKS[page])


TRANSLATED = [page for page in PAGES if page.name.endswith(".ko.md")]


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_translations_keep_pace(page: Path) -> None:
    """A translated page has the original's headings and code, and knows each paragraph of the original as it is now."""
    original = translations.original(page)
    ours, theirs = BLOCKS[page], BLOCKS[original]

    def shape(blocks: list[Block]) -> list[tuple[str, str]]:
        return [(block.language, block.title) for block in blocks]

    def headings(page: Path) -> list[str]:
        return re.findall(r"^(#+) ", FENCE.sub("", page.read_text("utf-8")), re.M)

    assert shape(ours) == shape(theirs)
    assert headings(page) == headings(original)
    if page.name != "README.ko.md":
        heads = re.findall(r"^#+ .*", FENCE.sub("", page.read_text("utf-8")), re.M)
        assert [head for head in heads if not re.search(r"\{ #\S+ \}$", head)] == [], (
            "headings need the English anchors"
        )
    for mine, other in zip(ours, theirs, strict=True):
        assert translations.skeleton(mine.language, mine.text) == translations.skeleton(other.language, other.text), (
            mine
        )
    assert not (changed := translations.changed(page)), (
        f"translate what has changed in {original.name}, then: python -m tests.docs.translations {page.relative_to(ROOT)}\n"
        + "\n".join(changed)
    )


def test_labels_are_translated() -> None:
    """Each label of the navigation has its Korean one, but for names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)
    [languages] = [plugin["i18n"]["languages"] for plugin in config["plugins"] if "i18n" in plugin]
    [translated] = [each["nav_translations"] for each in languages if each["locale"] == "ko"]

    def labels(entries: list[Any]) -> set[str]:
        found: set[str] = set()
        for entry in entries:
            for label, below in entry.items() if isinstance(entry, dict) else ():
                found |= {label, *(labels(below) if isinstance(below, list) else ())}
        return found

    assert labels(config["nav"]) == set(translated) | {"PostgreSQL", "Database"}


def test_a_changed_paragraph_is_noticed(tmp_path: Path) -> None:
    """A word changed in the original, or a paragraph more, less or moved, is named; a new line break is not."""
    page, ko = tmp_path / "a.md", tmp_path / "a.ko.md"
    text = "# A\n\nFirst words\nof it.\n\n```python\nx = 1\n```\n\n| a | b |\n| - | - |\n\nLast.\n"
    page.write_text(text, "utf-8")
    ko.write_text("# A\n", "utf-8")
    assert translations.changed(ko)
    translations.confirm(ko)
    translations.confirm(ko)
    assert not translations.changed(ko)
    page.write_text(text.replace("words\nof", "words of").replace("x = 1", "x = 2"), "utf-8")
    assert not translations.changed(ko)
    for before, after, named in (
        ("words", "word", "First word of it."),
        ("Last.\n", "Last.\n\nMore.\n", "More."),
        ("| b |", "| c |", "| a | c | | - | - |"),
        ("Last.\n", "", "paragraphs were taken out, or stand in another order"),
    ):
        page.write_text(text.replace(before, after), "utf-8")
        assert translations.changed(ko) == [named]
    same = "x = 1  # eins\ndef f():\n    'Doc.'\n"
    assert translations.skeleton("python", same) == translations.skeleton("python", "x = 1\ndef f():\n    'Anderes.'\n")
    assert translations.skeleton("python", same) != translations.skeleton("python", same.replace("1", "2"))
    assert translations.skeleton("yaml", "a: 1 # x") == translations.skeleton("yaml", "a: 1")
