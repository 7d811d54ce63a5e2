"""The generated key of an INSERT, which PostgreSQL tells only by a RETURNING clause that is added to it.

Only where it changes nothing but that: RETURNING wants the right to read the key, rules and row-level security may
refuse it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from database.engine.statement import OTHER, READ, Result, Statement
from database.postgresql import analysis
from database.postgresql.plan import Plan

if TYPE_CHECKING:
    from database.postgresql.sending import Sender

__all__ = ["UNFIT_FOR_RETURNING", "done", "is_settled", "with_returning"]

UNFIT_FOR_RETURNING = (
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.FeatureNotSupported,
)
"""What the added clause can be to blame for; the statement is then run again without it."""

AGAIN_AFTER = 60.0
"""Seconds after which a table that had no key is looked at again: it may have got one."""

_KEY = Plan(
    "SELECT (SELECT quote_ident(a.attname) FROM pg_catalog.pg_index i JOIN pg_catalog.pg_attribute a"
    " ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] WHERE i.indrelid = c.oid AND i.indisprimary"
    " AND i.indnatts = 1 AND a.atttypid IN (20, 21, 23) AND NOT c.relhasrules"
    " AND has_column_privilege(c.oid, a.attnum, 'SELECT') AND NOT row_security_active(c.oid))"
    " FROM pg_catalog.pg_class c WHERE c.oid = to_regclass($1::text) AND c.relkind IN ('r', 'p')",
    None,
    1,
)
"""The column that is a table's primary key by itself, a whole number, and may be read by whoever may insert."""


def is_settled(plan: Plan) -> bool:
    """Whether `with_returning` knows its answer, and need not ask the server."""
    return bool(plan.returning) or (plan.returning is not None and time.monotonic() <= plan.look_again)


def with_returning(connection: Sender, plan: Plan, statement: Statement) -> str:
    """The statement's text with a RETURNING clause for its table's generated key; `""` if there is none."""
    if not is_settled(plan):
        insert = plan.insert
        assert insert is not None
        found = connection.run(_KEY, (insert.table,))
        if found.ntuples == 0:
            return ""  # no such table, yet
        column = (found.get_value(0, 0) or b"").decode()
        if not column:
            plan.returning = ""
            plan.look_again = time.monotonic() + AGAIN_AFTER
        else:
            marked = f"{statement.sql[: insert.end]} RETURNING {column}"
            if insert.upsert:
                marked += ", xmax = 0"  # an updated row has been locked by this very transaction
            plan.returning = analysis.analyse(marked + statement.sql[insert.end :]).hint.sql
    return plan.returning or ""


def done(statement: Statement, result: pq.abc.PGresult, transformer: Any) -> Result:
    """What a statement did. A row that came back tells the key of what was inserted last."""
    count = result.command_tuples
    if statement.kind == READ or count is None or statement.kind == OTHER:
        return Result(-1, None)
    key: int | None = None
    if statement.verb == "INSERT" and result.ntuples:
        transformer.set_pgresult(result)
        row = transformer.load_row(result.ntuples - 1, tuple)
        inserted = len(row) < 2 or statement.returns_rows or row[1] is True
        key = row[0] if inserted and type(row[0]) is int else None
    return Result(count, key)
