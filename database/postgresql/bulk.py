"""Many rows by one call: in a pipeline, or by COPY where nothing can tell the difference.

What a row's values become is decided in one way for `execute`, `execute_many` and a batch: the types that psycopg gives
them, and where the server refuses those, what it wants instead (`sending.py`). For many rows that is asked once for
each mixture of Python types.

COPY is not INSERT: it fires statement triggers once, knows no rules and no row-level security, checks a table's
reference to itself at its end, and reads every value as text, so a zone is dropped where INSERT converts it, and a
number is rounded otherwise. So it is for plain tables only, and for pairs of a Python type and a column's type of which
the text says all (`_LOSSLESS`); from the first row on that holds anything else, the pipeline goes on.

Values are those of the moment at which a row is handed over, for generators use one list, dict or bytearray again and
again.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import psycopg
from psycopg import pq

from database.engine.adapting import BUFFERS
from database.engine.statement import Result, Statement
from database.postgresql.failures import MISTYPED, STALE, clean, made_from
from database.postgresql.plan import Insert, Plan
from database.postgresql.sending import Sender, is_reshaped, widen
from database.postgresql.values import bind, coerced, coercion, is_plain

__all__ = ["execute_batch", "execute_many"]

MANY = 500
"""Rows that are sent before the answers are looked at."""

COPY_FROM = 200
"""Rows from which COPY is worth asking for."""

_FATAL = pq.ExecStatus.FATAL_ERROR

_Sent = tuple[Any, tuple[int, ...], Any]


# Rows


def _rows(connection: Sender, plan: Plan, rows: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """The values of each row, for good. What the user's own iterator raises is marked as theirs."""
    source = iter(rows)
    count = plan.count if plan.names is None else -1
    adapters = connection.adapters
    while True:
        if connection.progress():
            raise psycopg.errors.QueryCanceled("the caller has gone")
        try:
            row = next(source)
        except StopIteration:
            return
        except BaseException as error:
            connection.theirs = error
            raise
        kind: type[Any] = type(row)  # pyright: ignore[reportUnknownVariableType]
        if (
            not adapters and kind is tuple and len(row) == count and is_plain(map(type, row))
        ):  # nothing of it can change
            yield row
        else:
            yield [bytes(value) if type(value) in BUFFERS else value for value in bind(plan, row, adapters)]


def execute_many(connection: Sender, statement: Statement, rows: Any) -> Result:
    """Runs a statement once for every row of parameters, within a transaction."""
    plan: Plan = statement.hint
    source = _rows(connection, plan, rows)
    chunk = list(itertools.islice(source, MANY))
    if not chunk:
        return Result(0, None)
    connection.admit(plan)
    if connection.began:
        connection.save()
    connection.send_prefix()
    total = 0
    try:
        insert = plan.insert
        if len(chunk) >= COPY_FROM and insert is not None and insert.columns is not None:
            columns = _columns_for_copy(connection, insert)
            if columns is not None:
                total, rest = _copy(connection, insert, columns, chunk, source)
                source = iter(rest)
                chunk = list(itertools.islice(source, MANY))
        asked: dict[tuple[type, ...], Any] = {}
        while chunk:
            total += _pipeline(connection, plan, asked, chunk, total)
            chunk = list(itertools.islice(source, MANY))
    except BaseException as error:
        connection.settle(error)
        raise
    connection.succeeded()
    return Result(total, None)


def _conversion(connection: Sender, plan: Plan, values: Sequence[Any]) -> Any:
    """How values of these Python types become what the server takes.

    Raises:
        psycopg.Error: The server does not take the statement, whatever the types.
    """
    sent = connection.dump(values, plan)
    refusal = connection.refusal_of(plan.sql, sent[1])
    if refusal is None:
        return None
    if refusal.sqlstate not in MISTYPED or not values:
        raise refusal
    connection.simple([b"SAVEPOINT asking"])
    wanted = connection.wanted_types(plan.sql)
    if isinstance(wanted, psycopg.Error):
        raise refusal
    connection.prefix.append(b"RELEASE SAVEPOINT asking")
    return tuple(map(coercion, wanted))


def _pipeline(
    connection: Sender, plan: Plan, asked: dict[tuple[type, ...], Any], chunk: list[Sequence[Any]], before: int
) -> int:
    sent: list[_Sent] = []
    for values in chunk:
        kinds = tuple(map(type, values))
        if kinds not in asked:
            asked[kinds] = _conversion(connection, plan, values)
        sent.append(connection.dump(coerced(values, asked[kinds]), plan))
    parts = connection.what_waits()
    pg = connection.pg
    text = plan.sql.encode()
    total = 0
    failed: tuple[int, pq.abc.PGresult] | None = None
    connection.begin_wait()
    try:
        pg.enter_pipeline_mode()
        for part in parts:
            pg.send_query_params(part, None)
        prepared: tuple[int, ...] | None = None
        expected: list[int] = [-1] * len(parts)
        for number, (payload, types, formats) in enumerate(sent):
            if types != prepared:
                pg.send_prepare(b"", text, types)
                expected.append(number)
                prepared = types
            pg.send_query_prepared(b"", payload, param_formats=formats)
            expected.append(number)
        pg.pipeline_sync()
        connection.flush()
        for number in expected:
            answer = connection.answer()
            if answer.status == _FATAL:
                failed = failed or (max(number, 0), answer)
            elif number >= 0:
                total += answer.command_tuples or 0
            connection.result()  # the None between two
        late = connection.leave_pipeline()
        if late is not None:
            failed = failed or (len(sent) - 1, late)
    except BaseException:
        connection.abandon()
        raise
    if failed is not None:
        number, answer = failed
        error = made_from(answer)
        clean(error, chunk[number])
        error.add_note(f"this was row {before + number + 1} of execute_many")
        raise error
    return total


# COPY

_LOSSLESS: dict[int, frozenset[type]] = {
    16: frozenset({bool}),
    17: frozenset({bytes}),
    20: frozenset({int}),
    21: frozenset({int}),
    23: frozenset({int}),
    25: frozenset({str}),
    701: frozenset({float}),
    1043: frozenset({str}),
    1082: frozenset({datetime.date}),
    1114: frozenset({datetime.datetime}),
    1184: frozenset({datetime.datetime}),
    1700: frozenset({decimal.Decimal}),
    2950: frozenset({uuid.UUID}),
}
"""Python types by the column's. With a length or precision (`atttypmod`) only `varchar`, which refuses what is longer."""

_TIMESTAMP, _TIMESTAMPTZ, _VARCHAR = 1114, 1184, 1043

_TABLE = Plan(
    "SELECT a.attname, a.atttypid::int8, a.atttypmod FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid ="
    " c.oid WHERE c.oid = to_regclass($1::text) AND a.attname = ANY(ARRAY(SELECT json_array_elements_text($2::json)))"
    " AND a.attnum > 0 AND NOT a.attisdropped"
    " AND a.attidentity <> 'a' AND a.attgenerated = '' AND c.relkind = 'r' AND NOT c.relhasrules AND NOT c.relrowsecurity"
    # INSERT among the events of the trigger (1 << 2)
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 4 <> 0)"
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint f WHERE f.conrelid = c.oid AND f.confrelid = c.oid"
    " AND f.contype = 'f')",
    None,
    2,
)
"""The columns of a plain table: their types, and nothing at all where anybody could tell COPY from INSERT."""


def _columns_for_copy(connection: Sender, insert: Insert) -> list[frozenset[type]] | None:
    """Which Python types each column takes by COPY; None where COPY is out of the question."""
    names = [
        each[1:-1].replace('""', '"') if each.startswith('"') else each.lower()
        for each in re.findall(r'"(?:[^"]|"")*"|[\w$]+', insert.columns or "")
    ]
    found = connection.run(_TABLE, (insert.table, json.dumps(names)), timed=False)
    transformer = connection.transformer
    transformer.set_pgresult(found)
    types: dict[str, frozenset[type]] = {}
    for name, oid, modifier in transformer.load_rows(0, found.ntuples, tuple):
        kinds: frozenset[type[Any]] = _LOSSLESS.get(oid, frozenset())
        if modifier != -1 and oid != _VARCHAR:
            kinds = frozenset()
        types[name] = kinds | {type(None)}
        if oid in (_TIMESTAMP, _TIMESTAMPTZ):
            types[name] = kinds | {type(None), _Zoned if oid == _TIMESTAMPTZ else _Zoneless}
    if len(types) != len(set(names)) or len(names) != len(set(names)):
        return None
    return [types[name] for name in names]


class _Zoned:
    """Stands for a `datetime` with a zone."""


class _Zoneless:
    """Stands for a `datetime` without one."""


def _fitting(columns: list[frozenset[type]]) -> Callable[[Sequence[Any]], bool]:
    """`_fits`, which remembers mixtures of types that do."""
    known: dict[tuple[type, ...], list[int]] = {}
    find = known.get

    def fits(values: Sequence[Any]) -> bool:
        texts = find(tuple(map(type, values)))
        if texts is not None:
            for position in texts:  # noqa: SIM110  - a generator for each row would cost more than all of this
                if "\0" in values[position]:
                    return False
            return True
        if not _fits(values, columns):
            return False
        kinds = tuple(map(type, values))
        if datetime.datetime not in kinds:  # of which not all do
            known[kinds] = [position for position, kind in enumerate(kinds) if kind is str]
        return True

    return fits


def _fits(values: Sequence[Any], columns: list[frozenset[type]]) -> bool:
    for value, kind, kinds in zip(values, map(type, values), columns, strict=True):
        if kind not in kinds:
            return False
        if kind is datetime.datetime and (_Zoneless if value.tzinfo is None else _Zoned) not in kinds:
            return False
        if kind is str and "\0" in value:
            return False
    return True


def _copy(
    connection: Sender,
    insert: Insert,
    columns: list[frozenset[type]],
    head: list[Sequence[Any]],
    source: Iterator[Sequence[Any]],
) -> tuple[int, Iterable[Sequence[Any]]]:
    """Copies rows as long as they fit; gives how many, and those that are left."""
    rows = itertools.chain(head, source)
    first = next(rows)
    if not _fits(first, columns):
        return 0, itertools.chain([first], rows)
    connection.send_prefix()
    left: Iterable[Sequence[Any]] = ()
    fits = _fitting(columns)
    raw = connection.raw
    raw.lent = raw.vouched = True
    try:
        # The names are the statement's own text, which the analysis has found to be names and nothing else.
        with psycopg.RawCursor(raw) as cursor:
            with cursor.copy(cast("Any", f"COPY {insert.table} ({insert.columns}) FROM STDIN")) as copy:
                write = copy.write_row
                write(first)
                for values in rows:
                    if not fits(values):
                        left = itertools.chain([values], rows)
                        break
                    write(values)
            return max(cursor.rowcount, 0), left
    except psycopg.Error as error:
        clean(error, head)
        raise
    finally:
        raw.lent = raw.vouched = False


# A batch: various statements


def execute_batch(connection: Sender, items: Any) -> int:
    """Runs (statement, parameters) pairs, within a transaction; gives how many."""
    try:
        return _batch(connection, items)
    except psycopg.Error as error:
        if connection.lost(error) or not (error.sqlstate in STALE or is_reshaped(error)):
            raise
        if connection.began and not connection.prefix:
            raise
        forgot = False
        for statement, _ in items:  # a table may have been altered since its types were learnt
            plan: Plan = statement.hint
            forgot = forgot or bool(plan.coercions) or connection.is_prepared(plan.sql)
            plan.coercions.clear()
            connection.unprepare(plan.sql)
        if not forgot:
            raise
    connection.failing = None
    return _batch(connection, items)


def _batch(connection: Sender, items: Any) -> int:
    sent: list[tuple[Statement, Any, _Sent, Sequence[Any]]] = []
    if connection.began:
        connection.save()
    for number, (statement, params) in enumerate(items):
        plan: Plan = statement.hint
        try:
            if number % 16 == 0 and connection.progress():  # code of the user's may take its time for each
                raise psycopg.errors.QueryCanceled("the caller has gone")
            plan.check_shapes()
            connection.admit(plan)
            values = bind(plan, params, connection.adapters)
            kinds = tuple(map(type, values))
            if values and kinds not in plan.coercions:
                plan.coercions[kinds] = _conversion(connection, plan, values)
            values = coerced(values, plan.coercions.get(kinds))
            sent.append((statement, params, connection.dump(values, plan), values))
        except Exception as error:
            connection.failing = statement, params
            error.add_note(f"this was write {number + 1} of the {len(items)} that a batch sent together")
            connection.settle(error)
            raise
    parts = connection.what_waits()
    pg = connection.pg
    failed: tuple[int, pq.abc.PGresult] | None = None
    try:
        connection.begin_wait()
        pg.enter_pipeline_mode()
        for part in parts:
            pg.send_query_params(part, None)
        for start in range(0, len(sent), MANY):
            group = sent[start : start + MANY]
            for statement, _params, (payload, types, formats), _values in group:
                plan = statement.hint
                connection.send(plan.sql, payload, types, formats, connection.prepared.get((plan.sql, types)))
            last = start + MANY >= len(sent)
            pg.pipeline_sync() if last else pg.send_flush_request()
            connection.flush()
            for number in range(-len(parts) if start == 0 else 0, len(group)):
                answer = connection.answer()
                if answer.status == _FATAL and failed is None:
                    failed = start + max(number, 0), answer
                connection.result()  # the None between two
        late = connection.leave_pipeline()
    except BaseException as error:
        connection.abandon()
        connection.settle(error)
        raise
    if late is not None and failed is None:
        failed = len(sent) - 1, late
    if failed is not None:
        number, answer = failed
        refusal = made_from(answer)
        connection.failing = sent[number][0], sent[number][1]
        refusal.add_note(f"this was write {number + 1} of the {len(items)} that a batch sent together")
        connection.settle(refusal)
        raise refusal
    for statement, _params, (_payload, types, _formats), values in sent:
        if statement.hint.shapes:
            connection.noticed(statement.hint)
        widen(statement.hint, types, values)
    connection.succeeded()
    return len(items)
