"""What the documentation says of the package in tables and lists is what the package has: settings, public names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from database import settings
from database.sqlite3 import Database

DOCS = Path(__file__).resolve().parents[2] / "docs"
LANGUAGES = ["", ".ko"]


def page(name: str, language: str) -> str:
    return (DOCS / f"{name}{language}.md").read_text("utf-8")


def section(text: str, anchor: str) -> str:
    """What stands below a heading of the second level; in the translation it has the original's anchor."""
    match = re.search(rf"^## (?:{anchor}|.*{{ #{anchor.lower()} }})\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert match, anchor
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables whose first cell is code."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in re.findall(r"^\| `.*\|$", text, re.M)]


def flat(section: dict[str, Any]) -> dict[str, Any]:
    """Keys as the documentation writes them, with the defaults."""
    [databases] = settings.read({"database": section}).engines.values()
    found = {each.name: getattr(databases["default"], each.name) for each in dataclasses.fields(databases["default"])}
    logging = found.pop("logging")
    found.update({f"logging.{each.name}": getattr(logging, each.name) for each in dataclasses.fields(logging)})
    del found["name"]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_keys_of_sqlite(language: str) -> None:
    """The configuration's page has every key, once, with its default, and no other."""
    found = flat({"sqlite": {"path": "x.db"}})
    listed = rows(section(page("guides/configuration", language), "Keys"))
    names = [row[0].strip("`") for row in listed]
    assert sorted(names) == sorted(found)
    for name, (_, default, *_) in zip(names, listed, strict=True):
        if name != "path":
            shown = yaml.safe_load(default.strip("`"))
            real = found[name]
            if isinstance(real, (tuple, frozenset)) or (not isinstance(real, (str, dict)) and hasattr(real, "items")):
                real = dict(real) if hasattr(real, "items") else list(real)
            assert shown == real, f"{name}: the page says {default}, the settings {real!r}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_keys_of_postgresql(language: str) -> None:
    """PostgreSQL's page has every key, and no other."""
    listed = rows(section(page("guides/postgresql", language), "Settings"))
    names = [name for row in listed for name in re.findall(r"`([\w.]+)`", row[0])]
    found = {name for name in flat({"postgresql": {"dbname": "x"}}) if not name.startswith("logging.")}
    assert sorted(names) == sorted(found | {"logging"})


MODULES = ["", "sqlite3", "postgresql", "errors", "logs", "elk", "otel", "stubs", "copy", "sandbox", "pytest_plugin"]
INSIDE = {
    "logs": {"Instrumentation", "LogObserver", "harmless", "say", "set_up"},
    "otel": {"sanitize", "summarize"},
    "stubs": {"default_output", "main"},
    "copy": {"NOTES", "Progress", "add_arguments", "find", "main", "run"},
    "sandbox": {"Setup"},
}
"""What those modules share with the rest of the package, and nobody else uses."""


def test_the_reference_has_every_public_name() -> None:
    """Each name in `__all__` of a public module has its place in the reference."""
    text = "\n".join(each.read_text("utf-8") for each in (DOCS / "reference").glob("*.md") if ".ko." not in each.name)
    missing = []
    for module in MODULES:
        full = f"database.{module}".rstrip(".")
        for name in set(importlib.import_module(full).__all__) - INSIDE.get(module, set()):
            if not re.search(
                rf"^(?:::: \S*\.{name}|#+ {name}\b.*|# `?{full}.{name}.*)$|\bdatabase\.{name}\b", text, re.M
            ):
                missing.append(f"{full}.{name}")
    assert not missing


def test_the_reference_has_every_method() -> None:
    """Each public method of `Database` stands in the reference, but for those that parts of the package use."""
    inside = {"call_aiosql", "engine", "pin", "pool", "pools"}
    text = page("reference/database", "")
    listed = set(re.findall(r"^(?:::: database\.sqlite3\.Database\.|### )(\w+)(?: \{.*)?$", text, re.M))
    public = {name for name, _ in inspect.getmembers(Database) if not name.startswith("_")}
    assert public - listed <= inside
    assert listed <= public


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_errors(language: str) -> None:
    """The errors' page has a heading for each error, in the order of the tree, which is that of the classes."""
    errors = importlib.import_module("database.errors")
    text = page("reference/errors", language)
    tree = re.findall(r"^( *)(\w+Error)", re.search(r"```text\n(DatabaseError.*?)```", text, re.S)[1], re.M)
    assert {name for _, name in tree} == set(errors.__all__)
    above: list[str] = []
    for indent, name in tree:
        depth = len(indent) // 4
        del above[depth:]
        if above:
            assert getattr(errors, above[-1]) in getattr(errors, name).__bases__
        above.append(name)
    assert [name for _, name in tree] == re.findall(r"^## (\w*Error)\b", text, re.M)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tree(language: str) -> None:
    """Each module that the tree in "How it works" names is there, in the folder it stands beside, and no folder is left out."""
    tree = re.search(r"```text\ndatabase/\n(.*?)```", page("guides/how-it-works", language), re.S)[1]
    package, folder, folders = DOCS.parent / "database", "", set()
    for line in tree.splitlines():
        names = line.strip("│├└─ ").split()
        if names[0].endswith("/"):
            folder = names.pop(0)
            folders.add(folder.rstrip("/"))
        for name in names:
            assert (package / folder / name).is_dir() or (package / folder / f"{name}.py").is_file(), folder + name
    assert folders == {each.name for each in package.iterdir() if (each / "__init__.py").is_file()}
