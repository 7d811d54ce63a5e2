"""The walk: a document's items go in, in the order of the schema, and a `Configuration` comes out.

An engine's section is one entry of `SECTIONS`: the key in the document, and the engine's package, whose module
`settings` says what may stand below it. It is imported when a document has such a section: defining the many settings
of a server takes time that a program which has none need not spend.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, cast

from database.errors import ConfigurationError
from database.settings.document import Item, MappingItem, open_document
from database.settings.model import DEFAULT, Configuration, LoggingSettings, Settings
from database.settings.rules import LOGGING_RULES, Section, apply
from database.settings.words import dotted, is_path, is_text, show

__all__ = ["DEFAULT_FILE", "ENVIRONMENT_VARIABLE", "SECTIONS", "discover", "load", "section"]

DEFAULT_FILE = "config/database.yaml"
ENVIRONMENT_VARIABLE = "DATABASE_CONFIG"

SECTIONS: dict[str, str | Section] = {"sqlite": "sqlite3", "postgresql": "postgresql"}

_EXAMPLE = 'configure({"database": {"sqlite": {"path": "./data/jobu.db"}}})'


def section(key: str) -> Section:
    """What may stand below an engine's key in the document."""
    found = SECTIONS[key]
    if isinstance(found, str):
        found = SECTIONS[key] = cast("Section", import_module(f"database.{found}.settings").SECTION)
    return found


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Configuration:
    """Reads a file or a mapping, as `configure()` is given it."""
    if isinstance(source, Mapping):
        return _read_document(MappingItem("configure(mapping)", (), source))
    path = os.fspath(source) if is_path(source) else source
    if not is_text(path) or not path:
        raise ConfigurationError(f"configure() takes a path, a mapping or None, not {show(path)}")
    return _load_file(path, "configure() names it")


def discover() -> Configuration:
    """Reads the file that counts where nothing was configured."""
    if path := os.environ.get(ENVIRONMENT_VARIABLE):
        return _load_file(path, f"{ENVIRONMENT_VARIABLE} names it: correct or unset it")
    return _load_file(
        DEFAULT_FILE,
        f"create it, set {ENVIRONMENT_VARIABLE} to another file, or call {_EXAMPLE} before the first use",
    )


def _load_file(path: str, advice: str) -> Configuration:
    with open_document(path, advice) as root:
        return _read_document(root)


def _read_document(root: Item) -> Configuration:
    fields = root.fields(["database"])
    if "database" not in fields:
        raise root.error("missing; all settings stand below it", "database")
    sections = fields["database"].fields(SECTIONS)
    if not sections:
        raise fields["database"].error(f"empty; expected one of {', '.join(SECTIONS)}")
    engines: dict[str, Mapping[str, Settings]] = {}
    patterns: dict[str, Mapping[str, Settings]] = {}
    for key, item in sections.items():
        found = section(key)
        databases = _read_section(found, item)
        engines[found.engine] = MappingProxyType({each: databases[each] for each in databases if "*" not in each})
        if len(engines[found.engine]) < len(databases):
            patterns[found.engine] = MappingProxyType({each: databases[each] for each in databases if "*" in each})
    return Configuration(MappingProxyType(engines), root.source, MappingProxyType(patterns))


def _read_section(section: Section, item: Item) -> dict[str, Settings]:
    fields = item.fields([*section.rules, "logging", "databases"])
    values, logging = _read_values(section, fields)
    others = fields["databases"].entries() if "databases" in fields else {}
    databases: dict[str, Settings] = {}
    places: dict[str, str] = {}  # identity -> the database that has it

    def add(name: str, item: Item, own: Mapping[str, Item], values: dict[str, Any], logging: dict[str, Any]) -> None:
        settings = section.build(name=name, **values, logging=LoggingSettings(**logging))
        databases[name] = settings
        identity = section.identity(settings)
        if identity is not None and (other := places.setdefault(identity, name)) != name:
            key = next(each for each in section.own if each in own)
            raise own[key].error(f"{name!r} and {other!r} are the same database, {identity!r}")
        if (fault := section.check(settings)) is not None:
            key, text = fault
            raise own[key].error(text) if key in own else fields[key].error(text)

    if any(key in fields for key in section.own):
        add(DEFAULT, item, fields, values, logging)
    elif not others:
        raise item.error("missing; without it, there must be `databases`", section.own[0])
    private = (*section.own, *section.private)
    inherited = {key: value for key, value in values.items() if key not in private or key in section.kept}
    for name, other in others.items():
        if name == DEFAULT:
            raise other.error(f"the database {DEFAULT!r} is configured by the keys of {dotted(item.keys)} itself")
        if not name.strip() or not name.isprintable():
            raise other.error("expected a name of printable characters")
        own = other.fields([*section.rules, "logging"])
        if not any(key in own for key in section.own):
            raise other.error("missing; it is what `databases` do not inherit", section.own[0])
        own_values, own_logging = _read_values(section, own)
        left = inherited
        for one, another in section.replaces:
            dropped = {another} if one in own else {one} if another in own else set[str]()
            left = {key: value for key, value in left.items() if key not in dropped}
        for key in section.merged:
            if key in left and key in own_values:
                own_values[key] = left[key] | own_values[key]
        add(name, other, own, left | own_values, logging | own_logging)
    return databases


def _read_values(section: Section, fields: Mapping[str, Item]) -> tuple[dict[str, Any], dict[str, Any]]:
    values = {key: apply(section.rules[key], item) for key, item in fields.items() if key in section.rules}
    logging = fields["logging"].fields(LOGGING_RULES) if "logging" in fields else {}
    return values, {key: apply(LOGGING_RULES[key], item) for key, item in logging.items()}
