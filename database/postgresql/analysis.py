"""What PostgreSQL's grammar tells about a statement before it is run.

It is enough to route a statement, to bind its parameters, to refuse it, to split a script.

This is no parser. It looks at keywords outside strings, quoted names, comments and parentheses; the server has the last
word (a read-only transaction is READ ONLY there, whatever this module thought of a statement).

Placeholders. PostgreSQL knows `$1`. Here `:name` and `?` work as they do on SQLite, and psycopg's `%(name)s` and `%s` (what
aiosql's adapter makes of `:name`) as well; all become `$1`, `$2`, …

State of the connection. Connections are everybody's, so a statement that may leave something behind on its own (a temporary
table, a session's advisory lock, a setting) is known here: see `Plan.refusal` and `Plan.stains`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

from database import errors
from database.engine.statement import CONTROL, OTHER, READ, WRITE, Statement
from database.postgresql.plan import Insert, Plan
from database.postgresql.tokens import Token, end_of_comment, scan, tokens_of

__all__ = ["Made", "analyse", "check_text", "made_by", "names_of", "plan_of", "split", "words_of"]

HIGHEST_PARAMETERS: Final = 65535
"""The protocol counts parameters in sixteen bits."""

_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
_READS = frozenset({"SELECT", "VALUES", "TABLE"})
_CONTROLS = frozenset(
    {
        *("BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE"),
        # These would change one connection of the pool, whichever that is, for all who come after.
        *("DEALLOCATE", "DISCARD", "LISTEN", "LOAD", "PREPARE", "RESET", "UNLISTEN"),
    }
)
_ALONE = frozenset({"CALL", "VACUUM", "SHOW"})
_SHAPING = frozenset({"ALTER", "CREATE", "DO", "DROP", "CALL"})
_ROWS = frozenset({"CALL", "EXECUTE", "EXPLAIN", "FETCH", "SHOW"})

_HARMLESS = frozenset(
    # Words that stand before a parenthesis and are no functions, and the server's own functions that are called most: they
    # change nothing. Of all others the server is asked.
    """
    all and any array as between by case cast check columns conflict cube distinct else except exclude exists
    extract filter foreign from generated group grouping having ilike in index intersect interval into is isnull
    join key lateral like limit materialized multirange not notnull nullif offset on only or order over overlaps
    overlay partition position primary references returning rollup row select sets similar some substring table then
    trim tuple union unique using values when where window with within bit char character decimal float numeric time
    timestamp timestamptz varchar varying
    abs age array_agg array_append array_cat array_length array_position array_remove array_to_string avg bool_and
    bool_or btrim cardinality ceil ceiling char_length chr clock_timestamp coalesce concat concat_ws convert_from
    convert_to corr count cume_dist current_database current_setting current_schema date_bin date_part date_trunc
    decode dense_rank digest encode every exp first_value floor format gen_random_uuid generate_series
    generate_subscripts greatest initcap isfinite json_agg json_array_elements json_array_length json_build_array
    json_build_object json_each json_object_agg jsonb_agg jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
    jsonb_object_agg jsonb_object_keys jsonb_path_exists jsonb_path_query jsonb_pretty jsonb_set jsonb_strip_nulls
    jsonb_typeof justify_days lag last_value lead least left length ln log lower lpad ltrim make_date make_interval
    make_timestamp max md5 min mod now nth_value ntile nullif octet_length percent_rank percentile_cont
    percentile_disc pg_backend_pid pg_is_in_recovery pg_relation_size
    pg_sleep pg_table_size pg_total_relation_size pg_typeof pi
    plainto_tsquery power quote_ident quote_literal random rank regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table repeat replace reverse right round row_number row_to_json rpad rtrim
    setweight sign similarity split_part sqrt starts_with statement_timestamp stddev string_agg string_to_array
    strpos substr sum to_char to_date to_hex to_json to_jsonb to_number to_regclass to_timestamp to_tsquery
    to_tsvector transaction_timestamp translate trunc ts_headline ts_rank txid_current unnest upper uuid_generate_v4
    var_pop variance version websearch_to_tsquery width_bucket
    """.split()  # noqa: SIM905  - two hundred words
)

_TIED = frozenset({"age", "now", "transaction_timestamp", "txid_current", "current_setting"})
"""Of these, what tells of the transaction."""

_MOMENTS = frozenset({"CURRENT_DATE", "CURRENT_TIME", "CURRENT_TIMESTAMP", "LOCALTIME", "LOCALTIMESTAMP"})

_DOING = frozenset(
    [
        "nextval",
        "setval",
        "pg_notify",
        "lo_create",
        "lo_creat",
        "lo_unlink",
        "lo_import",
        "lo_put",
        "lo_from_bytea",
        "pg_logical_emit_message",
        "pg_advisory_xact_lock",
        "pg_advisory_xact_lock_shared",
        "pg_try_advisory_xact_lock",
        "pg_try_advisory_xact_lock_shared",
        "pg_cancel_backend",
        "pg_terminate_backend",
    ]
)
"""Functions of the server's own that do something, but leave nothing on the connection."""

_STAINING = {
    "set_config": "set_config() would change one connection of the pool for all who come after: use `options` of the"
    " configuration for all connections, or set_config(…, true) or SET LOCAL within a transaction",
    **dict.fromkeys(
        (
            *("pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"),
            *("pg_advisory_unlock", "pg_advisory_unlock_shared", "pg_advisory_unlock_all"),
        ),
        "a session's advisory lock would stay with one connection of the pool: use pg_advisory_xact_lock() (or its like) within"
        " a transaction",
    ),
    **dict.fromkeys(("dblink_connect", "dblink_connect_u", "dblink_disconnect"), ""),
    "pg_replication_origin_session_setup": "",
}
_TEMPORARY = (
    "a temporary table would stay on one connection of the pool: make it within a transaction (`async with"
    " db.transaction()`), at whose end it goes"
)
_ENCODING = re.compile(r"[eE]?'client_encoding'", re.IGNORECASE)
_TEMPORARY_SCHEMA = re.compile(r"pg_temp(_\d+)?")
_HELD = "a cursor WITH HOLD would stay on one connection of the pool: `async with db.stream(…)` reads row by row"


def _translate(sql: str) -> Plan:
    """Turns placeholders into `$1`, `$2` and so on."""
    native = False
    formats = False
    for match in scan(sql):
        kind = match.lastgroup
        native = native or kind in ("name", "number", "mark")
        formats = formats or kind == "format" or (kind == "percent" and match.group() == "%s")
    parts: list[str] = []
    names: dict[str, int] = {}
    positions = 0
    highest = 0
    last = 0
    for match in scan(sql):
        kind = match.lastgroup
        replacement: str | None = None
        if kind == "literal" and match.group().endswith("??"):
            replacement = match.group()[:-1]
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
        QueryExecutionError: There are several in one text, its placeholders are mixed or too many, or it cannot be sent.
    """
    check_text(sql)
    tokens = tokens_of(sql)
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
        verb in _CONTROLS
        or (verb == "SET" and words[1:2] not in (["LOCAL"], ["CONSTRAINTS"]))
        or words[:3] == ["SET", "LOCAL", "TRANSACTION"]
    ):
        kind, returns_rows = CONTROL, False
    elif verb == "EXPLAIN":
        rest = next((word for word in words[1:] if word in _READS or word in _WRITES), "")
        kind = READ if rest in _READS and not _writes_inside(tokens) else OTHER
    elif verb == "SHOW":
        kind = READ
    elif verb == "COPY" and ("STDIN" in words or "STDOUT" in words):
        raise errors.QueryExecutionError(
            "COPY … FROM STDIN and TO STDOUT send their rows beside the text: use execute_many(), or psycopg's cursor.copy()"
            " in `db.run(function)`; a dump with data is restored by psql or pg_restore; nothing was executed",
            sql=sql,
        )
    plan = _translate(sql)
    if plan.count > HIGHEST_PARAMETERS:
        raise errors.QueryExecutionError(
            f"the statement has {plan.count:,} parameters, and PostgreSQL's protocol takes {HIGHEST_PARAMETERS:,}: give a list"
            " as one parameter (`= ANY(:ids)`, unnest), or use execute_many(); nothing was executed",
            sql=errors.shorten(sql),
        )
    plan.shapes = verb in _SHAPING
    plan.alone = verb in _ALONE or "CONCURRENTLY" in words or words[1:2] in (["DATABASE"], ["TABLESPACE"], ["SYSTEM"])
    _look_for_state(plan, tokens, words, verb)
    if kind == READ and verb in _READS and not (plan.calls or plan.acts or plan.stains):
        plan.suspects = _suspects(tokens)
    if verb == "INSERT":
        plan.insert = _insert(sql, tokens, plan, returning=returns_rows)
    return Statement(sql, verb, kind, returns_rows=returns_rows, hint=plan)


def check_text(sql: str) -> None:
    """Refuses text that cannot be sent as it is.

    Raises:
        QueryExecutionError: It holds a NUL, where the protocol would cut it off, or half of a UTF-16 pair.
    """
    if "\0" in sql:
        raise errors.QueryExecutionError(
            f"there is a NUL character in the SQL text (at position {sql.index(chr(0))}), where the server would stop reading;"
            " nothing was executed",
            sql=sql.replace("\0", "\\0"),
        )
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise errors.QueryExecutionError(
            f"the SQL text cannot be encoded as UTF-8: there is half of a surrogate pair at position {error.start};"
            " nothing was executed",
            sql=sql.encode("utf-8", "backslashreplace").decode(),
        ) from None


def _look_for_state(plan: Plan, tokens: list[Token], words: list[str], verb: str) -> None:
    """Finds out what the statement may leave behind, and which functions it calls."""
    if verb in ("DO", "CALL"):
        plan.stains = plan.acts = True
        return
    if verb == "CREATE" and any(word in ("FUNCTION", "PROCEDURE", "AGGREGATE") for word in words[:5]):
        plan.stains = any(map(_is_temporary_schema, tokens))
        plan.refusal = _TEMPORARY if plan.stains else None
        return
    if verb == "SET":  # LOCAL
        _localises(plan, tokens)
    made = verb == "CREATE" and "AS" not in words  # what stands before a parenthesis is a table, a type, a column
    unknown: list[str] = []
    before: Token | None = None
    for index, token in enumerate(tokens):
        name = _called(tokens, index)
        if name is not None:
            if name in _STAINING:
                plan.acts = True
                if name == "set_config":
                    _localises(plan, tokens)
                if name != "set_config" or not _is_local(tokens, index + 1):
                    plan.stains = True
                    plan.refusal = _STAINING[name] or None
            elif name in _DOING:
                plan.acts = True
            elif (
                (name not in _HARMLESS or _is_of_a_schema(tokens, index))
                and not made
                and (before is None or before.text not in ("INTO", "AS", "TABLE"))
            ):
                unknown.append(name)
        elif _is_temporary_schema(token) or (
            token.kind == "word"
            and token.text in ("TEMP", "TEMPORARY")
            and before is not None
            and before.text in ("CREATE", "REPLACE", "LOCAL", "GLOBAL", "INTO")
        ):
            plan.stains, plan.refusal = True, _TEMPORARY
        elif _name(token) == "pg_settings":
            if any(each.text == "UPDATE" for each in tokens):  # a view that sets what is written to it
                plan.stains, plan.refusal = True, _STAINING["set_config"].replace("set_config() ", "this ", 1)
        elif token.kind == "word" and token.text == "HOLD" and verb == "DECLARE":
            plan.stains, plan.refusal = True, _HELD
        before = token
    plan.calls = tuple(dict.fromkeys(unknown))


def _is_temporary_schema(token: Token) -> bool:
    return _TEMPORARY_SCHEMA.fullmatch(_name(token) or "") is not None


def _is_of_a_schema(tokens: list[Token], index: int) -> bool:
    """Whether a function is called by the name of a schema that is not the server's own."""
    if index < 2 or tokens[index - 1].text != ".":
        return False
    return _name(tokens[index - 2]) not in (None, "pg_catalog")


def _localises(plan: Plan, tokens: list[Token]) -> None:
    """The statement gives its transaction a setting; where tables are made then, they may be temporary ones."""
    for token in tokens:
        if token.text in ("CLIENT_ENCODING", "NAMES") or (token.kind == "string" and _ENCODING.fullmatch(token.text)):
            raise errors.QueryExecutionError(
                "client_encoding is UTF8, in which everything is sent; nothing was executed: what is to be stored in another"
                " encoding is bytea (convert_to)"
            )
    plan.shapes = plan.sets = True
    plan.stains = plan.stains or any(token.kind == "string" and "pg_temp" in token.text.lower() for token in tokens)


def _suspects(tokens: list[Token]) -> tuple[str, ...]:
    """The names in a statement that only reads, as far as its text tells; none if it tells of its transaction."""
    names: set[str | None] = set()
    for index, token in enumerate(tokens):
        if _called(tokens, index) in _TIED or (token.kind == "word" and token.text in _MOMENTS):
            return ()
        names.add(_name(token))
    return tuple(sorted(name for name in names if name is not None))


def names_of(sql: str) -> list[str]:
    """All names in a statement, its keywords among them, as the catalog has them."""
    return sorted({name for name in map(_name, tokens_of(sql)) if name is not None})


def _called(tokens: list[Token], index: int) -> str | None:
    """The name of the function whose call begins at that token."""
    return _name(tokens[index]) if index + 1 < len(tokens) and tokens[index + 1].text == "(" else None


def _name(token: Token) -> str | None:
    """A name, or a keyword, as the catalog has it; None: it is neither."""
    return token.text.lower() if token.kind == "word" else _unquoted(token.text) if token.kind == "quoted" else None


def _unquoted(text: str) -> str:
    """The name that is written in double quotes."""
    name = text.partition('"')[2][:-1].replace('""', '"')
    if text[:1] in "uU":  # U&"d\0061ta"
        name = re.sub(
            r"\\(?:\+([0-9a-fA-F]{6})|([0-9a-fA-F]{4}))", lambda match: chr(int(match[1] or match[2], 16)), name
        )
    return name


def _is_local(tokens: list[Token], opening: int) -> bool:
    """Whether the last argument of a call is the word TRUE."""
    depth = tokens[opening].depth
    for index in range(opening + 1, len(tokens)):
        if tokens[index].text == ")" and tokens[index].depth == depth:
            return [token.text for token in tokens[index - 2 : index]] == [",", "TRUE"]
    return False


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
    for match in scan(script):
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
        position = match.end() if match.group() != "/*" else end_of_comment(text, match.end())
    kept.append(text[position:])
    return bool("".join(kept).strip(" \t\r\n;"))


def words_of(sql: str) -> list[str]:
    """The unquoted words of a statement, in capitals."""
    return [token.text for token in tokens_of(sql) if token.kind == "word"]


class Made(NamedTuple):
    """What a CREATE statement makes, where it does nothing if that is there already."""

    kind: str
    schema: str | None
    name: str
    replaces: bool
    """CREATE OR REPLACE: what is there may still be another one."""
    body: str | None
    """A function's body."""


_MODIFIERS = frozenset({"UNLOGGED", "UNIQUE", "CONCURRENTLY", "MATERIALIZED", "OR", "REPLACE"})


def made_by(sql: str) -> Made | None:
    """What a statement of a schema's script makes; None where it is to be executed whatever is there."""
    tokens = tokens_of(sql)
    if not tokens or tokens[0].text != "CREATE":
        return None
    modifiers: set[str] = set()
    index = 1
    while index < len(tokens) and tokens[index].text in _MODIFIERS:
        modifiers.add(tokens[index].text)
        index += 1
    rest = tokens[index:]
    kind = rest[0].text if rest else ""
    replaces = "REPLACE" in modifiers
    if replaces and kind in ("FUNCTION", "TRIGGER"):
        rest = rest[1:]
    elif [token.text for token in rest[1:4]] == ["IF", "NOT", "EXISTS"]:
        rest = rest[4:]
    elif [token.text for token in rest[1:5]] == ["CONCURRENTLY", "IF", "NOT", "EXISTS"]:
        rest = rest[5:]
    else:
        return None
    names = [_identifier(sql, token) for token in rest[:3:2]]
    qualified = len(rest) > 2 and rest[1].text == "."
    schema, name = (names[0], names[1]) if qualified else (None, names[0] if names else None)
    if name is None or (qualified and schema is None):
        return None
    body = next((sql[token.start : token.end] for token in rest if token.kind == "string"), None)
    if body is not None and body.startswith("$"):
        quote = body[: body.index("$", 1) + 1]
        body = body[len(quote) : -len(quote)]
    return Made(kind, schema, name, replaces, body)


def _identifier(sql: str, token: Token) -> str | None:
    text = sql[token.start : token.end]
    if token.kind == "word":
        return text.lower()
    return text[1:-1].replace('""', '"') if token.kind == "quoted" else None
