"""What SQLite's grammar tells about a statement before it is run: enough to route it, to refuse it, to split a script.

This is no parser. It looks at keywords outside strings, quoted names, comments and parentheses; SQLite itself has the
last word (the connection's authorizer refuses what a reader may not do, whatever this module thought of it).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from functools import lru_cache

from database.engine.statement import CONTROL, OTHER, READ, WHOLE, WRITE, Statement, quoted

__all__ = [
    "ARGUMENT_PRAGMAS",
    "FILE_PRAGMAS",
    "HINT_INSERT",
    "HINT_NONE",
    "HINT_UPSERT",
    "HINT_VACUUM",
    "HINT_WITH",
    "READ_PRAGMAS",
    "analyse",
    "control",
    "placeholders",
    "split",
    "target",
]

HINT_NONE = 0
HINT_INSERT = 1
"""Adds rows: `lastrowid` means something."""
HINT_UPSERT = 2
"""May update instead of insert, and then leaves SQLite's last row id as some other statement set it."""
HINT_VACUUM = 3
"""Begins and commits a transaction by itself, of which the authorizer is told."""
HINT_WITH = 4
"""Writes, but begins with WITH: `sqlite3` does not count what it changes."""

_TOKEN = re.compile(
    r"""
      --[^\n]*                       # comment to the end of the line
    | /\*.*?(?:\*/|\Z)               # comment
    | (?P<quoted>
        '[^']*+(?:''[^']*+)*+(?:'|\Z)        # string
      | "[^"]*+(?:""[^"]*+)*+(?:"|\Z)        # quoted names
      | `[^`]*+(?:``[^`]*+)*+(?:`|\Z)
      | \[[^\]]*(?:\]|\Z)
      )
    | (?P<parameter>[:@$\#][\w$]+(?:::[\w$]+)*|\?\d*)  # never keywords
    | (?P<word>[^\W\d][\w$]*)
    | (?P<mark>[();=,.])
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

FILE_PRAGMAS = frozenset(
    [
        "application_id",
        "auto_vacuum",
        "encoding",
        "incremental_vacuum",
        "journal_size_limit",
        "optimize",
        "page_size",
        "schema_version",
        "shrink_memory",
        "user_version",
        "wal_checkpoint",
    ]
)
"""Those whose new value belongs to the file, and those that do something to it: they change no connection."""


def _tokens(sql: str) -> Iterator[tuple[str, int]]:
    """Keywords in capitals, marks, and `"` for anything quoted, each with the depth of parentheses around it."""
    depth = 0
    for match in _TOKEN.finditer(sql):
        kind = match.lastgroup
        if kind == "word":
            yield match["word"].upper(), depth
        elif kind == "quoted":
            yield '"', depth
        elif kind == "mark":
            mark = match["mark"]
            depth -= mark == ")"
            yield mark, depth
            depth += mark == "("


_MARKS = frozenset('();=,."')


def analyse(sql: str) -> Statement:
    """Analyses one statement. An empty one has the verb `""`."""
    tokens = [token for token in _tokens(sql) if token[0] != ";"]
    outer = [word for word, depth in tokens if depth == 0 and word not in _MARKS]
    verb = outer[0] if outer else ""
    if verb == "EXPLAIN":
        rest = next((word for word in outer[1:] if word == "WITH" or word in _READS or word in _WRITES), "")
        if rest == "WITH":
            rest = _main_verb(tokens)
        return Statement(sql, verb, READ if rest in _READS else OTHER, returns_rows=True)
    first = verb
    if verb == "WITH":
        verb = _main_verb(tokens) or verb
    if verb in _READS:
        return Statement(sql, verb, READ, returns_rows=True)
    if verb in _WRITES:
        hint = HINT_NONE
        if first == "WITH":
            hint = HINT_WITH
        elif verb in ("INSERT", "REPLACE"):
            hint = HINT_UPSERT if "CONFLICT" in outer and "UPDATE" in outer else HINT_INSERT
        fails = "FAIL" in outer and outer[outer.index("FAIL") - 1] == "OR"  # which keeps what came before the failure
        return Statement(sql, verb, WHOLE if fails else WRITE, returns_rows="RETURNING" in outer, hint=hint)
    if verb in _CONTROLS:
        return Statement(sql, verb, CONTROL, returns_rows=False)
    if verb == "PRAGMA":
        return Statement(sql, verb, READ if _only_tells(tokens) else OTHER, returns_rows=True)
    return Statement(sql, verb, OTHER, returns_rows=False, hint=HINT_VACUUM if verb == "VACUUM" else HINT_NONE)


def _main_verb(tokens: list[tuple[str, int]]) -> str:
    """Of a statement with common table expressions, which may be called `replace`: the word behind the last of them."""
    before = ""
    for word, depth in tokens:
        if depth == 0:
            if before == ")" and (word in _READS or word in _WRITES):
                return word
            before = word
    return ""


def _only_tells(tokens: list[tuple[str, int]]) -> bool:
    words = [word.lower() for word, depth in tokens if depth == 0 and word not in _MARKS]
    name = words[-1] if len(words) <= 3 else ""  # PRAGMA [schema.]name; a value without quotes would be one more
    marks = {word for word, _ in tokens if word in ("(", "=")}
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


def _pieces(matches: Iterable[re.Match[str]]) -> Iterator[str]:
    """The tokens one after the other, names without their quotes."""
    for match in matches:
        kind = match.lastgroup
        if kind == "quoted":
            yield _unquoted(match["quoted"])
        elif kind is not None:
            yield match[kind]


def _unquoted(text: str) -> str:
    quote = "]" if text[0] == "[" else text[0]
    inner = text[1:-1] if len(text) > 1 and text[-1] == quote else text[1:]
    return inner if quote == "]" else inner.replace(quote * 2, quote)


def control(sql: str) -> tuple[str, str]:
    """What a text does to the transaction: (BEGIN, COMMIT, ROLLBACK, SAVEPOINT, RELEASE or ROLLBACK TO, the savepoint).

    ("PRAGMA", its name) where one is set; ("", "") for everything else, and for what SQLite would not understand.
    """
    pieces = [piece for piece in _pieces(_TOKEN.finditer(sql)) if piece != ";"]
    words = [piece.upper() for piece in pieces]
    verb = words[0] if words else ""
    if verb == "PRAGMA":
        if len(pieces) > 3 and pieces[2] == ".":
            del pieces[1:3]
        return ("PRAGMA", pieces[1].lower()) if len(pieces) > 2 and pieces[2] in ("=", "(") else ("", "")
    rest = words[1:]
    if verb == "BEGIN":
        if rest and rest[0] in ("DEFERRED", "IMMEDIATE", "EXCLUSIVE"):
            rest = rest[1:]
        return ("BEGIN", "") if rest in ([], ["TRANSACTION"]) else ("", "")
    if verb in ("COMMIT", "END"):
        return ("COMMIT", "") if rest in ([], ["TRANSACTION"]) else ("", "")
    if verb == "ROLLBACK":
        if rest and rest[0] == "TRANSACTION":
            rest = rest[1:]
        if not rest:
            return "ROLLBACK", ""
        verb, rest = "ROLLBACK TO", rest[1:] if rest[0] == "TO" else []
    elif verb not in ("SAVEPOINT", "RELEASE"):
        return "", ""
    if verb != "SAVEPOINT" and len(rest) == 2 and rest[0] == "SAVEPOINT":
        rest = rest[1:]
    return (verb, pieces[-1]) if len(rest) == 1 else ("", "")


@lru_cache(512)
def placeholders(sql: str) -> bool:
    """Whether all placeholders have names, so that parameters which are both mapping and sequence go by name."""
    found = [match["parameter"] for match in _TOKEN.finditer(sql) if match.lastgroup == "parameter"]
    return bool(found) and not any(each[0] == "?" for each in found)


def target(sql: str) -> str | None:
    """The table into which a statement inserts, quoted as SQL wants it, with its schema if that is named."""
    depth = 0
    matches = _TOKEN.finditer(sql)
    for match in matches:
        depth += (match["mark"] == "(") - (match["mark"] == ")")
        if depth == 0 and (match["word"] or "").upper() == "INTO":
            break
    else:
        return None
    pieces = _pieces(matches)
    name = next(pieces, None)
    if name is None:
        return None
    return f"{quoted(name)}.{quoted(next(pieces, ''))}" if next(pieces, None) == "." else quoted(name)
