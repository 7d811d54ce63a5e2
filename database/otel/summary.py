"""What a statement does, in a few words; and its text without the values that stand in it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

__all__ = ["SUMMARY_LIMIT", "sanitize", "summarize"]

SUMMARY_LIMIT = 255
"""Characters of a summary, at the most."""

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<string>  [xX]?'(?:[^']|'')*(?:'|\Z) )
    | (?P<name>    "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\] | [^\W\d]\w* )
    | (?P<variable>[:@$]\w+ | \?\d* )
    | (?P<number>  0[xX][0-9a-fA-F]+ | (?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)? )
    | (?P<space>   \s+ )
    | (?P<other>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
_OPERATIONS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})
_SCHEMA: Final = frozenset({"CREATE", "ALTER", "DROP"})
_SKIPPED: Final = frozenset({"TEMP", "TEMPORARY", "UNIQUE", "VIRTUAL", "IF", "NOT", "EXISTS", "OR"})


@lru_cache(2048)
def sanitize(sql: str) -> str:
    """The statement with `?` for its literals, and without its comments."""
    pieces: list[str] = []
    for token in _TOKEN.finditer(sql):
        kind = token.lastgroup
        if kind in ("string", "number"):
            pieces.append("?")
        elif kind == "comment":
            pieces.append(" ")
        else:
            pieces.append(token[0])
    return " ".join("".join(pieces).split())


@lru_cache(2048)
def summarize(sql: str) -> str:
    """What the statement does to what: `INSERT runs SELECT jobs`. Of few different values, so good to group by."""
    words = [
        (token.lastgroup, token[0]) for token in _TOKEN.finditer(sql) if token.lastgroup not in ("comment", "space")
    ]
    found: list[str] = []
    targets = False  # whether names that follow are targets: behind FROM, JOIN, INTO, …
    depth = 0
    listing: list[int] = []  # depths of the brackets in which a FROM clause goes on
    before = ""
    position = 0
    while position < len(words):
        kind, text = words[position]
        upper = text.upper()
        if kind == "name" and targets and upper not in ("SELECT", "LATERAL", *_SKIPPED):
            name = text
            while position + 2 < len(words) and words[position + 1][1] == "." and words[position + 2][0] == "name":
                name += "." + words[position + 2][1]
                position += 2
            found.append(name)
            targets = False
        elif kind == "name":
            if upper in _OPERATIONS and before not in ("DO", "OR", "FOR", "ON") and not (
                upper == "REPLACE" and position + 1 < len(words) and words[position + 1][1] == "("
            ):  # fmt: skip
                found.append(upper)
                targets = upper == "UPDATE"
            elif upper in _SCHEMA and not found:
                position += 1
                while position < len(words) and words[position][1].upper() in _SKIPPED:
                    position += 1
                if position < len(words):
                    found.append(f"{upper} {words[position][1].upper()}")
                    targets = True
            elif upper in ("FROM", "JOIN", "INTO"):
                targets = before != "DISTINCT"
                if upper == "FROM":
                    listing.append(depth)
            elif upper in ("WHERE", "GROUP", "ORDER", "SET", "VALUES", "LIMIT", "UNION", "RETURNING") and listing:
                if listing[-1] == depth:
                    listing.pop()
            elif not found and upper != "WITH" and position == 0:
                found.append(upper)
                targets = upper == "PRAGMA"
        elif text == "(":
            depth += 1
            targets = False
        elif text == ")":
            while listing and listing[-1] == depth:
                listing.pop()
            depth -= 1
        elif text == "," and listing and listing[-1] == depth:
            targets = True
        before = upper
        position += 1
    summary = " ".join(found)
    while len(summary) > SUMMARY_LIMIT:
        found.pop()
        summary = " ".join(found)
    return summary
