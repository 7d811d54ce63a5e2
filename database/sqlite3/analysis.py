"""What SQLite's grammar tells about a statement before it is run: enough to route it, to refuse it, to split a script.

This is no parser. It looks at keywords outside strings, quoted names, comments and parentheses; SQLite itself has the
last word (the connection's authorizer refuses what a reader may not do, whatever this module thought of it).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator

from database.engine.statement import CONTROL, OTHER, READ, WRITE, Statement

__all__ = ["HINT_INSERT", "HINT_NONE", "HINT_UPSERT", "HINT_VACUUM", "READ_PRAGMAS", "analyse", "split"]

HINT_NONE = 0
HINT_INSERT = 1
"""Adds rows: `lastrowid` means something."""
HINT_UPSERT = 2
"""May update instead of insert, and then leaves SQLite's last row id as some other statement set it."""
HINT_VACUUM = 3
"""Begins and commits a transaction by itself, of which the authorizer is told."""

_TOKEN = re.compile(
    r"""
      --[^\n]*                       # comment to the end of the line
    | /\*.*?(?:\*/|\Z)               # comment
    | '(?:[^']|'')*(?:'|\Z)          # string
    | "(?:[^"]|"")*(?:"|\Z)          # quoted names
    | `(?:[^`]|``)*(?:`|\Z)
    | \[[^\]]*(?:\]|\Z)
    | [:@$\#][\w$]+                  # parameters: never keywords
    | (?P<word>[^\W\d][\w$]*)
    | (?P<mark>[();=])
    """,
    re.VERBOSE | re.DOTALL,
)

_WRITES = frozenset({"INSERT", "REPLACE", "UPDATE", "DELETE"})
_READS = frozenset({"SELECT", "VALUES"})
_CONTROLS = frozenset({"BEGIN", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE"})

READ_PRAGMAS = frozenset(
    [
        "application_id",
        "auto_vacuum",
        "automatic_index",
        "busy_timeout",
        "cache_size",
        "cache_spill",
        "cell_size_check",
        "checkpoint_fullfsync",
        "collation_list",
        "compile_options",
        "data_version",
        "database_list",
        "defer_foreign_keys",
        "encoding",
        "foreign_key_check",
        "foreign_key_list",
        "foreign_keys",
        "freelist_count",
        "fullfsync",
        "function_list",
        "hard_heap_limit",
        "ignore_check_constraints",
        "index_info",
        "index_list",
        "index_xinfo",
        "integrity_check",
        "journal_mode",
        "journal_size_limit",
        "legacy_alter_table",
        "locking_mode",
        "max_page_count",
        "mmap_size",
        "module_list",
        "page_count",
        "page_size",
        "pragma_list",
        "query_only",
        "quick_check",
        "read_uncommitted",
        "recursive_triggers",
        "reverse_unordered_selects",
        "schema_version",
        "secure_delete",
        "soft_heap_limit",
        "synchronous",
        "table_info",
        "table_list",
        "table_xinfo",
        "temp_store",
        "threads",
        "trusted_schema",
        "user_version",
        "wal_autocheckpoint",
        "writable_schema",
    ]
)
"""Pragmas that only tell, when they are given no value."""

ARGUMENT_PRAGMAS = frozenset(
    [
        "foreign_key_check",
        "foreign_key_list",
        "index_info",
        "index_list",
        "index_xinfo",
        "integrity_check",
        "quick_check",
        "table_info",
        "table_list",
        "table_xinfo",
    ]
)
"""Those of them whose argument is a name or a limit, not a new value."""


def _tokens(sql: str) -> Iterator[tuple[str, int]]:
    """Keywords in capitals and the marks `;` and `=`, each with the depth of parentheses around it."""
    depth = 0
    for match in _TOKEN.finditer(sql):
        word = match["word"]
        if word is not None:
            yield word.upper(), depth
            continue
        mark = match["mark"]
        if mark == "(":
            yield mark, depth
            depth += 1
        elif mark == ")":
            depth -= 1
        elif mark is not None:
            yield mark, depth


def analyse(sql: str) -> Statement:
    """Analyses one statement. An empty one has the verb `""`."""
    tokens = [token for token in _tokens(sql) if token[0] not in ";"]
    outer = [word for word, depth in tokens if depth == 0 and word not in "(="]
    verb = outer[0] if outer else ""
    if verb == "EXPLAIN":
        rest = next((word for word in outer[1:] if word in _READS or word in _WRITES), "")
        return Statement(sql, verb, READ if rest in _READS else OTHER, returns_rows=True)
    if verb == "WITH":
        verb = next((word for word in outer[1:] if word in _READS or word in _WRITES), verb)
    if verb in _READS:
        return Statement(sql, verb, READ, returns_rows=True)
    if verb in _WRITES:
        hint = HINT_NONE
        if verb in ("INSERT", "REPLACE"):
            hint = HINT_UPSERT if "CONFLICT" in outer and "UPDATE" in outer else HINT_INSERT
        return Statement(sql, verb, WRITE, returns_rows="RETURNING" in outer, hint=hint)
    if verb in _CONTROLS:
        return Statement(sql, verb, CONTROL, returns_rows=False)
    if verb == "PRAGMA":
        return Statement(sql, verb, READ if _only_tells(tokens) else OTHER, returns_rows=True)
    return Statement(sql, verb, OTHER, returns_rows=False, hint=HINT_VACUUM if verb == "VACUUM" else HINT_NONE)


def _only_tells(tokens: list[tuple[str, int]]) -> bool:
    words = [word.lower() for word, depth in tokens if depth == 0 and word not in "(="]
    name = words[-1] if len(words) <= 3 else ""  # PRAGMA [schema.]name; a value without quotes would be one more
    marks = {word for word, _ in tokens if word in "(="}
    if "=" in marks:
        return False
    return name in (ARGUMENT_PRAGMAS if "(" in marks else READ_PRAGMAS)


def split(script: str) -> Iterator[str]:
    """The statements of a script, one by one; SQLite itself says where each is complete (triggers hold semicolons)."""
    start = 0
    for match in _TOKEN.finditer(script):
        if match["mark"] == ";":
            text = script[start : match.end()]
            if sqlite3.complete_statement(text):
                start = match.end()
                if any(word for word, _ in _tokens(text) if word != ";"):
                    yield text
    rest = script[start:]
    if any(word for word, _ in _tokens(rest) if word != ";") or _TOKEN.sub("", rest).strip():
        yield rest
