"""PostgreSQL's words and signs: what stands outside strings, quoted names and comments.

Placeholders. PostgreSQL knows `$1`. Here `:name` and `?` count as well, as on SQLite, and psycopg's `%(name)s` and `%s`. A
colon behind a word or a closing bracket is a slice (`a[1:n]`), two of them are a cast. `??` stands for the operator `?`;
`?|`, `?&` and `@?` are operators as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Token", "end_of_comment", "scan", "tokens_of"]

_TOKEN = re.compile(
    r"""
      (?P<comment>--[^\n]*)
    | (?P<block>/\*)                                            # nests, so its end is looked for by hand
    | (?P<string>[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)
               | (?:[uU]&|[bBxXnN])?'(?:[^']|'')*(?:'|\Z)
               | (?P<dollar>\$(?:[^\W\d]\w*)?\$).*?(?:(?P=dollar)|\Z))
    | (?P<quoted>(?:[uU]&)?"(?:[^"]|"")*(?:"|\Z))
    | (?P<cast>::)
    | (?<![\w\])]):(?P<name>[^\W\d]\w*)
    | \$(?P<number>\d+)
    | (?P<literal>(?<![-+*/<>=~!@\#%^&|`])@\?\??|\?\?|\?\|(?!\|)|\?&)
    | (?P<mark>\?)
    | %\((?P<format>[^)]+)\)s
    | (?P<percent>%%|%s\b)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<digits>\d[\w.]*)
    | (?P<sign>[();,=.*\[\]])
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A word or a sign that counts."""

    kind: str
    """`word` (in capitals), `quoted`, `string`, `parameter`, `digits` or `sign`."""
    text: str
    depth: int
    start: int
    end: int


def end_of_comment(sql: str, position: int) -> int:
    """Where a block comment ends that was opened before this position; they nest."""
    depth = 1
    for match in re.compile(r"/\*|\*/").finditer(sql, position):
        depth += 1 if match.group() == "/*" else -1
        if depth == 0:
            return match.end()
    return len(sql)


def scan(sql: str) -> Iterator[re.Match[str]]:
    """What counts in a text, comments left out; `lastgroup` says what it is."""
    position = 0
    while (match := _TOKEN.search(sql, position)) is not None:
        if match["block"] is not None:
            position = end_of_comment(sql, match.end())
            continue
        position = match.end()
        if match["comment"] is None:
            yield match


def tokens_of(sql: str) -> list[Token]:
    """Words and signs, with the depth of parentheses they stand at."""
    depth = 0
    tokens: list[Token] = []
    for match in scan(sql):
        kind = match.lastgroup or ""
        if kind == "dollar":
            kind = "string"
        text = match.group()
        start, end = match.span()
        if kind == "word":
            tokens.append(Token(kind, text.upper(), depth, start, end))
        elif kind == "sign":
            if text in ")]":
                depth -= 1
            tokens.append(Token(kind, text, depth, start, end))
            if text in "([":
                depth += 1
        elif kind in ("name", "number", "mark", "format", "percent"):
            tokens.append(Token("parameter", text, depth, start, end))
        elif kind not in ("cast", "literal"):
            tokens.append(Token(kind, text, depth, start, end))
    return tokens
