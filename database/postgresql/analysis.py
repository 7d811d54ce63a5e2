"""What PostgreSQL's grammar tells about a statement before it is run.

It is enough to route a statement, to bind its parameters, to refuse it, to split a script.

This is no parser. It looks at keywords outside strings, quoted names, comments and parentheses; the server has the last
word (a read-only transaction is READ ONLY there, whatever this module thought of a statement).

Placeholders. PostgreSQL knows `$1`. Here `:name` and `?` work as they do on SQLite, and psycopg's `%(name)s` and `%s` (what
aiosql's adapter makes of `:name`) as well; all become `$1`, `$2`, … A colon behind a word or a closing bracket is a slice
(`a[1:n]`), two of them are a cast. `??` stands for the operator `?`; `?|` and `?&` are operators as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

from database import errors
from database.engine.statement import CONTROL, OTHER, READ, WRITE, Statement

__all__ = ["Insert", "Plan", "analyse", "plan_of", "split"]

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
    | (?P<literal>\?\?|\?\|(?!\|)|\?&)
    | (?P<mark>\?)
    | %\((?P<format>[^)]+)\)s
    | (?P<percent>%%|%s\b)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<digits>\d[\w.]*)
    | (?P<sign>[();,=.*\[\]])
    """,
    re.VERBOSE | re.DOTALL,
)

_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
_READS = frozenset({"SELECT", "VALUES", "TABLE"})
_CONTROLS = frozenset(
    {
        *("BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE"),
        # These would change one connection of the pool, whichever that is, for all who come after.
        *("DEALLOCATE", "DISCARD", "LISTEN", "PREPARE", "RESET", "UNLISTEN"),
    }
)
_ROWS = frozenset({"CALL", "EXECUTE", "EXPLAIN", "FETCH", "SHOW"})


class Token(NamedTuple):
    """A word or a sign that counts."""

    kind: str
    """`word` (in capitals), `quoted`, `string`, `parameter`, `digits` or `sign`."""
    text: str
    depth: int
    start: int
    end: int


class Insert(NamedTuple):
    """What is known of an INSERT.

    Attributes:
        table: The table as it is written.
        end: Where a RETURNING clause would go.
        values: Whether the rows stand in the statement (VALUES), so that they are few.
        upsert: Whether it may update instead.
        columns: The columns as they are written, if all that the statement does is to put one placeholder into each:
            then rows can be sent by COPY.
    """

    table: str
    end: int
    values: bool
    upsert: bool
    columns: str | None


class Plan:
    """How a statement is sent. Cached with it, so what is found out about it is kept here.

    Attributes:
        sql: The text for the server, with `$1`, `$2`, …
        names: The parameters' names in order; None where they are positional.
        count: How many parameters there are.
        insert: What is known of it, if it is an INSERT.
        coercions: How parameters are converted, by their Python types; see `connection.py`.
        returning: The text with RETURNING for `lastrowid`; `""` if there is nothing to return, None if nobody has looked.
        seconds: How long it takes, roughly; None if nobody knows.
        uses: How often it has been executed.
    """

    __slots__ = ("coercions", "count", "insert", "names", "returning", "seconds", "sql", "uses")

    def __init__(self, sql: str, names: tuple[str, ...] | None, count: int) -> None:
        self.sql = sql
        self.names = names
        self.count = count
        self.insert: Insert | None = None
        self.coercions: dict[tuple[type, ...], Any] = {}
        self.returning: str | None = None
        self.seconds: float | None = None
        self.uses = 0

    def took(self, seconds: float) -> None:
        """Learns from one execution. Any worker's thread; a lost update does no harm."""
        known = self.seconds
        self.seconds = seconds if known is None else known + (seconds - known) * 0.2


def _end_of_comment(sql: str, position: int) -> int:
    depth = 1
    for match in re.compile(r"/\*|\*/").finditer(sql, position):
        depth += 1 if match.group() == "/*" else -1
        if depth == 0:
            return match.end()
    return len(sql)


def _scan(sql: str) -> Iterator[re.Match[str]]:
    position = 0
    while (match := _TOKEN.search(sql, position)) is not None:
        if match["block"] is not None:
            position = _end_of_comment(sql, match.end())
            continue
        position = match.end()
        if match["comment"] is None:
            yield match


def _tokens(sql: str) -> list[Token]:
    depth = 0
    tokens: list[Token] = []
    for match in _scan(sql):
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


def _translate(sql: str) -> Plan:
    """Turns placeholders into `$1`, `$2` and so on."""
    native = False
    formats = False
    for match in _scan(sql):
        kind = match.lastgroup
        native = native or kind in ("name", "number", "mark")
        formats = formats or kind == "format" or (kind == "percent" and match.group() == "%s")
    parts: list[str] = []
    names: dict[str, int] = {}
    positions = 0
    highest = 0
    last = 0
    for match in _scan(sql):
        kind = match.lastgroup
        replacement: str | None = None
        if kind == "literal" and match.group() == "??":
            replacement = "?"
        elif kind == "name" or (kind == "format" and not native):
            replacement = f"${names.setdefault(match[kind], len(names) + 1)}"
        elif kind == "mark" or (kind == "percent" and match.group() == "%s" and not native):
            positions += 1
            replacement = f"${positions}"
        elif kind == "number":
            highest = max(highest, int(match["number"]))
        elif kind == "percent" and match.group() == "%%" and formats and not native:
            replacement = "%"
        if replacement is not None:
            parts += [sql[last : match.start()], replacement]
            last = match.end()
    parts.append(sql[last:])
    if sum(map(bool, (names, positions, highest))) > 1:
        raise errors.QueryExecutionError("named and positional placeholders are mixed; nothing was executed", sql=sql)
    return Plan("".join(parts), tuple(names) if names else None, len(names) or positions or highest)


@lru_cache(maxsize=2000)
def plan_of(sql: str) -> Plan:
    """The plan of a statement that is sent through the raw connection."""
    return _translate(sql)


def analyse(sql: str) -> Statement:
    """Analyses one statement. An empty one has the verb `""`.

    Raises:
        QueryExecutionError: There are several in one text, or its placeholders are mixed.
    """
    tokens = _tokens(sql)
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    while tokens and tokens[0].text == ";":
        tokens.pop(0)
    words = [token.text for token in tokens if token.kind == "word" and token.depth == 0]
    verb = words[0] if words else ""
    if tokens and tokens[0].kind != "word":
        verb = next((token.text for token in tokens if token.kind == "word"), "?")  # (SELECT …) UNION …
    several = any(token.text == ";" and token.depth == 0 for token in tokens) and len(list(split(sql))) > 1
    if several and verb not in _CONTROLS:
        raise errors.QueryExecutionError(
            "several statements in one text: execute_script() takes those; nothing was executed", sql=sql
        )
    kind, returns_rows = OTHER, verb in _ROWS
    if verb == "WITH":
        verb = next((word for word in words[1:] if word in _READS or word in _WRITES), verb)
    if verb in _READS:
        kind, returns_rows = READ, True
        if verb == "SELECT" and "INTO" in words:
            kind, returns_rows = OTHER, False
        elif _locks_rows(words) or _writes_inside(tokens):
            kind = WRITE
    elif verb in _WRITES:
        kind, returns_rows = WRITE, "RETURNING" in words
    elif (
        verb in _CONTROLS or (verb == "SET" and words[1:2] != ["LOCAL"]) or words[:3] == ["SET", "LOCAL", "TRANSACTION"]
    ):
        kind, returns_rows = CONTROL, False
    elif verb == "EXPLAIN":
        rest = next((word for word in words[1:] if word in _READS or word in _WRITES), "")
        kind = READ if rest in _READS and not _writes_inside(tokens) else OTHER
    elif verb == "SHOW":
        kind = READ
    plan = _translate(sql)
    if verb == "INSERT":
        plan.insert = _insert(sql, tokens, plan, returning=returns_rows)
    return Statement(sql, verb, kind, returns_rows=returns_rows, hint=plan)


def _locks_rows(words: list[str]) -> bool:
    """FOR UPDATE and its like write into the rows that they lock."""
    return any(word == "FOR" and following in ("UPDATE", "NO", "SHARE", "KEY") for word, following in pairwise(words))


def _writes_inside(tokens: list[Token]) -> bool:
    """Whether a write stands in parentheses: WITH x AS (INSERT …) SELECT."""
    return any(
        token.kind == "word" and token.text in _WRITES and before.text == "(" for before, token in pairwise(tokens)
    )


def _insert(sql: str, tokens: list[Token], plan: Plan, *, returning: bool) -> Insert | None:
    start = next(index for index, token in enumerate(tokens) if token.text == "INSERT" and token.depth == 0)
    rest = tokens[start + 1 :]
    if not rest or rest[0].text != "INTO":
        return None
    position = 1
    while position < len(rest) and (rest[position].kind in ("word", "quoted") or rest[position].text == "."):
        position += 1
        if position < len(rest) and rest[position].text != "." and rest[position - 1].text != ".":
            break
    if position == 1:
        return None
    table = sql[rest[1].start : rest[position - 1].end]
    words = [token.text for token in rest if token.kind == "word" and token.depth == 0]
    upsert = "CONFLICT" in words and "UPDATE" in words
    columns: str | None = None
    if start == 0 and not returning and "CONFLICT" not in words:
        columns = _columns(sql, rest[position:], plan)
    return Insert(table, tokens[-1].end, "VALUES" in words, upsert, columns)


def _columns(sql: str, rest: list[Token], plan: Plan) -> str | None:
    """The text between the first parentheses of `(a, b) VALUES (:a, :b)`, if that is all there is."""
    shape = [token.text if token.kind in ("sign", "word") and token.depth == 0 else token.kind for token in rest]
    if shape[:1] != ["("] or ")" not in shape:
        return None
    close = shape.index(")")
    columns, values = shape[1:close], shape[close + 1 :]
    if values[:3] == ["OVERRIDING", "SYSTEM", "VALUE"]:  # which is what COPY does
        values = values[3:]
    count = (len(columns) + 1) // 2
    named = columns == [each for _ in range(count) for each in ("column", "sign")][:-1] or all(
        each in ("word", "quoted") if index % 2 == 0 else each == "sign" for index, each in enumerate(columns)
    )
    wanted = ["VALUES", "(", *[each for _ in range(count) for each in ("parameter", "sign")][:-1], ")"]
    if not named or values != wanted or count != plan.count:
        return None
    if plan.names is not None and len(set(plan.names)) != count:
        return None
    return sql[rest[0].end : rest[close].start]


def split(script: str) -> Iterator[str]:
    """The statements of a script, one by one. Bodies of functions (`BEGIN ATOMIC … END`) hold semicolons."""
    start = 0
    body = 0
    words: list[str] = []
    something = False
    depth = 0
    for match in _scan(script):
        kind, text = match.lastgroup, match.group()
        if kind == "sign" and text in "()":
            depth += 1 if text == "(" else -1
        if kind == "word":
            word = text.upper()
            if word == "ATOMIC" and words[-1:] == ["BEGIN"] and words[0] == "CREATE":
                body = 1
            elif body and word == "CASE":
                body += 1
            elif body and word == "END":
                body -= 1
            words.append(word)
        if text == ";" and kind == "sign" and body == 0 and depth <= 0:
            if something:
                yield script[start : match.start()]
            start = match.end()
            words, something, depth = [], False, 0
        else:
            something = True
    if something or _leftover(script[start:]):
        yield script[start:]


def _leftover(text: str) -> bool:
    """Whether a text holds anything but white space and comments."""
    position = 0
    kept: list[str] = []
    for match in re.compile(r"--[^\n]*|/\*").finditer(text):
        if match.start() < position:
            continue
        kept.append(text[position : match.start()])
        position = match.end() if match.group() != "/*" else _end_of_comment(text, match.end())
    kept.append(text[position:])
    return bool("".join(kept).strip(" \t\r\n;"))


HIGHEST_PARAMETERS: Final = 65535
"""The protocol counts parameters in sixteen bits."""
