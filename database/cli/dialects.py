"""What `import`, `export` and `shell` have to ask an engine otherwise than the other one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from database.cli.support import Status, fail, quote, remark
from database.cli.values import Document, Exact, fits, from_csv, json_text
from database.engine.statement import READ
from database.errors import QueryExecutionError
from database.session.database import Database
from database.sqlite3.analysis import split as sqlite_split

__all__ = ["Column", "Dialect", "dialect_of"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its name.
        type: As the table's definition, or the catalog, has it.
        generated: Whether it cannot be given a value.
        key: Whether it belongs to the primary key.
    """

    name: str
    type: str
    generated: bool
    key: bool


class Dialect(Protocol):
    """One engine's way."""

    @property
    def signed(self) -> bool:
        """Whether a REAL column keeps `-0.0`."""
        ...

    def named(self, name: str) -> Any:
        """SQL and parameters for: the table or view of that name, in its own spelling."""
        ...

    @property
    def tables(self) -> str:
        """SQL for the names of tables and views that are like `?`."""
        ...

    async def columns(self, db: Database, table: str) -> list[Column]:
        """A table's columns; none if there is no such table."""
        ...

    async def definitions(self, db: Database, name: str) -> list[str]:
        """How tables, views and indexes like that name were made."""
        ...

    async def banner(self, db: Database) -> str:
        """Where one is, for people."""
        ...

    def split(self, text: str) -> Iterator[str]:
        """The statements in a text."""
        ...

    def complete(self, text: str) -> bool:
        """Whether a text ends where a statement ends."""
        ...

    def insert(self, table: str, all_columns: Sequence[Column], columns: Sequence[Column], conflict: str) -> str:
        """The statement for a row; `conflict` is fail, ignore or replace."""
        ...

    async def bulk(self, db: Database, table: str, columns: Sequence[Column], conflict: str) -> str:
        """The COPY for many rows, where nothing can tell it from INSERTs; empty: there is none."""
        ...

    async def stored(self, db: Database, table: str, columns: Iterable[Column]) -> None:
        """After rows that brought their own keys: the next one that the database makes must be another."""
        ...

    def converter(self, column: Column, *, plain: bool) -> Callable[[Any], Any] | None:
        """What is done to a value (never None) before it is sent; `plain`: all are text, as in CSV."""
        ...

    def type(self, name: str) -> str:
        """How the type that `values.suiting` names is written here."""
        ...

    async def exact(self, db: Database, query: str, params: Any) -> tuple[str, list[str] | None]:
        """The query for CSV: the same rows, of which the text tells everything; and the columns' names, if it has others."""
        ...


class _Sqlite:
    """See `Dialect`."""

    signed = False
    tables = (
        "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite^_%' ESCAPE '^'"
        " AND name LIKE ? ORDER BY name"
    )

    def named(self, name: str) -> Any:
        sql = "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE"
        return sql, (name,)

    async def columns(self, db: Database, table: str) -> list[Column]:
        rows = await db.fetch_all("SELECT name, type, hidden, pk FROM pragma_table_xinfo(?)", (table,))
        return [Column(row[0], row[1], row[2] in (2, 3), bool(row[3])) for row in rows]

    async def definitions(self, db: Database, name: str) -> list[str]:
        rows = await db.fetch_all(
            "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND (tbl_name LIKE ? OR name LIKE ?)"
            " ORDER BY tbl_name, type DESC",
            (name, name),
        )
        return [f"{row[0]};" for row in rows]

    async def banner(self, db: Database) -> str:
        row = await db.fetch_one("SELECT sqlite_version(), file FROM pragma_database_list WHERE name = 'main'")
        return f"SQLite {row[0]}, {row[1]}" if row is not None else "SQLite"

    def split(self, text: str) -> Iterator[str]:
        return sqlite_split(text)

    def complete(self, text: str) -> bool:
        return sqlite3.complete_statement(text)

    def insert(self, table: str, all_columns: Sequence[Column], columns: Sequence[Column], conflict: str) -> str:
        verb = {"fail": "INSERT", "ignore": "INSERT OR IGNORE", "replace": "INSERT OR REPLACE"}[conflict]
        what = "DEFAULT VALUES"
        if columns:
            what = f"({', '.join(quote(column.name) for column in columns)}) VALUES ({', '.join('?' * len(columns))})"
        return f"{verb} INTO {quote(table)} {what}"

    async def bulk(self, db: Database, table: str, columns: Sequence[Column], conflict: str) -> str:
        return ""

    async def stored(self, db: Database, table: str, columns: Iterable[Column]) -> None:
        pass

    def converter(self, column: Column, *, plain: bool) -> Callable[[Any], Any] | None:
        of_text = from_csv(column.type)
        if plain:
            return of_text
        numeric = of_text is not None and "BLOB" not in column.type.upper()

        def convert(value: Any) -> Any:
            if isinstance(value, Exact):
                return float(value) if numeric else str(value)
            if isinstance(value, Document) or (isinstance(value, int) and not numeric and not fits(value)):
                return str(value)
            return value

        return convert

    def type(self, name: str) -> str:
        return name

    async def exact(self, db: Database, query: str, params: Any) -> tuple[str, list[str] | None]:
        return query, None


class _Postgresql:
    """See `Dialect`. Values go as text, and the server reads it: so all its types can be given."""

    signed = True
    tables = (
        "SELECT c.relname FROM pg_catalog.pg_class c WHERE c.relnamespace = current_schema()::regnamespace"
        " AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition AND c.relname LIKE ? ORDER BY 1"
    )

    def named(self, name: str) -> Any:
        sql = (
            "SELECT c.relname FROM pg_catalog.pg_class c WHERE c.relnamespace = current_schema()::regnamespace"
            " AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND lower(c.relname) = lower(CAST(:name AS text))"
            " ORDER BY c.relname <> :name LIMIT 1"
        )
        return sql, {"name": name}

    async def columns(self, db: Database, table: str) -> list[Column]:
        rows = await db.fetch_all(
            "SELECT a.attname, format_type(a.atttypid, -1), a.attgenerated <> '' OR a.attidentity = 'a',"
            " coalesce(a.attnum = ANY (i.indkey::int2[]), false)"
            " FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_index i ON i.indrelid = a.attrelid AND i.indisprimary"
            " WHERE a.attrelid = to_regclass(quote_ident(?)) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            (table,),
        )
        return [Column(*row) for row in rows]

    async def definitions(self, db: Database, name: str) -> list[str]:
        rows = await db.fetch_all(_DEFINITIONS, {"name": name})
        return [str(row[0]) for row in rows]

    async def banner(self, db: Database) -> str:
        row = await db.fetch_one("SELECT current_setting('server_version'), current_database(), current_schema()")
        version, database, schema = tuple(row) if row is not None else ("", "", "")
        return f"PostgreSQL {version}, database {database}, schema {schema}"

    def split(self, text: str) -> Iterator[str]:
        from database.postgresql.analysis import split  # noqa: PLC0415  - an extra

        return split(text)

    def complete(self, text: str) -> bool:
        # A word behind a complete text is a statement of its own; within a string or brackets it is not.
        return [piece.strip() for piece in self.split(f"{text}\nx")][-1:] == ["x"]

    def insert(self, table: str, all_columns: Sequence[Column], columns: Sequence[Column], conflict: str) -> str:
        what = "DEFAULT VALUES"
        if columns:
            marks = ", ".join(
                "?" if column.type == "bytea" else f"CAST(CAST(? AS text) AS {column.type})" for column in columns
            )
            what = f"({', '.join(quote(column.name) for column in columns)}) VALUES ({marks})"
        end = " ON CONFLICT DO NOTHING" if conflict == "ignore" else ""
        if conflict == "replace":
            key = [column for column in all_columns if column.key]
            if not key:
                fail(f"{table!r} has no primary key by which a row could be replaced", status=Status.USAGE)
            changes = ", ".join(f"{quote(each.name)} = excluded.{quote(each.name)}" for each in columns if not each.key)
            end = f" ON CONFLICT ({', '.join(quote(column.name) for column in key)}) DO"
            end += f" UPDATE SET {changes}" if changes else " NOTHING"
        return f"INSERT INTO {quote(table)} {what}{end}"

    async def bulk(self, db: Database, table: str, columns: Sequence[Column], conflict: str) -> str:
        # A value's text goes through its type's own input function either way. The rest is as for `execute_many`: see
        # `postgresql.bulk`.
        if conflict != "fail" or not columns or not await db.fetch_value(_PLAIN, {"table": table}):
            return ""
        return f"COPY {quote(table)} ({', '.join(quote(column.name) for column in columns)}) FROM STDIN"

    async def stored(self, db: Database, table: str, columns: Iterable[Column]) -> None:
        for column in columns:
            name = {"table": table, "name": column.name}
            sequence = await db.fetch_value("SELECT pg_get_serial_sequence(quote_ident(:table), :name)", name)
            if sequence is None:
                continue
            ahead = f"SELECT max({quote(column.name)}) FROM {quote(table)}"  # noqa: S608  - quoted
            try:
                async with db.transaction():  # a savepoint, for it may be refused
                    await db.fetch_value(
                        f"SELECT setval(CAST(CAST(:sequence AS text) AS regclass), ({ahead})) FROM {sequence} s"  # noqa: S608  - quoted by the server
                        f" WHERE ({ahead}) >= s.last_value + CASE WHEN s.is_called THEN 1 ELSE 0 END",
                        {"sequence": sequence},
                    )
            except QueryExecutionError as error:
                remark(f"the sequence {sequence} could not be advanced, so its next keys may be taken: {error.args[0]}")

    def converter(self, column: Column, *, plain: bool) -> Callable[[Any], Any] | None:
        if column.type == "bytea":
            blob = from_csv("BLOB")
            return lambda value: _bytes(blob(value) if blob is not None and type(value) is str else value)
        if column.type.endswith("[]"):
            return _array
        number = column.type in ("double precision", "real", "numeric")
        if plain:
            return _finite if number else None
        if column.type in ("json", "jsonb"):
            return lambda value: str(value) if isinstance(value, (Document, Exact)) else json_text(value)
        truths = ("true", "false") if column.type == "boolean" else ("1", "0")

        def convert(value: Any) -> Any:
            if isinstance(value, str):
                return _finite(str(value)) if number else str(value)
            if isinstance(value, bool):
                return truths[0 if value else 1]
            return repr(value) if isinstance(value, (int, float)) else json.loads(json_text(value))["$base64"]

        return convert

    def type(self, name: str) -> str:
        return {
            "INTEGER": "bigint",
            "REAL": "double precision",
            "NUMERIC": "numeric",
            "BLOB": "bytea",
            "TEXT": "text",
        }.get(name, "jsonb")

    async def exact(self, db: Database, query: str, params: Any) -> tuple[str, list[str] | None]:
        # JSON as the server writes it: of a value in Python nobody can tell the string "1" from the number, nor 1.10 from 1.1.
        statement = db.engine.analyse(query)
        pieces = list(self.split(query))
        if statement.kind != READ or statement.verb not in ("SELECT", "TABLE", "VALUES") or len(pieces) != 1:
            return query, None
        inner = pieces[0].strip().rstrip(";")

        def look(connection: Any) -> list[tuple[str, int]]:
            cursor = connection.execute(f"SELECT * FROM (\n{inner}\n) q LIMIT 0", params)  # noqa: S608  - the user's own query
            return [(column.name, column.type_code) for column in cursor.description]

        try:
            columns = await db.run(look, readonly=True)
        except QueryExecutionError:  # the export itself will say what is wrong with it
            return query, None
        if not any(oid in _JSON for _, oid in columns):
            return query, None
        names = [f"c{number}" for number in range(len(columns))]
        shown = [
            f"CAST({name} AS text)" if oid in _JSON else name for name, (_, oid) in zip(names, columns, strict=True)
        ]
        wrapped = f"SELECT {', '.join(shown)} FROM (\n{inner}\n) q({', '.join(names)})"  # noqa: S608  - the user's own query
        return wrapped, [name for name, _ in columns]


_JSON = (114, 3802)
"""json and jsonb."""

_DEFINITIONS = """
SELECT CASE
    WHEN c.relkind IN ('i', 'I') THEN pg_get_indexdef(c.oid) || ';'
    WHEN c.relkind IN ('v', 'm') THEN 'CREATE ' || CASE c.relkind WHEN 'm' THEN 'MATERIALIZED ' ELSE '' END || 'VIEW '
        || quote_ident(c.relname) || ' AS' || chr(10) || pg_get_viewdef(c.oid)
    ELSE 'CREATE TABLE ' || quote_ident(c.relname) || ' (' || chr(10) || '    ' || (
        SELECT string_agg(line, ',' || chr(10) || '    ' ORDER BY place) FROM (
            SELECT a.attnum::int AS place, quote_ident(a.attname) || ' ' || format_type(a.atttypid, a.atttypmod)
                || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
                || CASE WHEN a.attidentity <> '' THEN ' GENERATED ' || CASE a.attidentity WHEN 'a' THEN 'ALWAYS' ELSE
                    'BY DEFAULT' END || ' AS IDENTITY'
                    WHEN a.attgenerated <> '' THEN ' GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') STORED'
                    ELSE coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '') END AS line
            FROM pg_catalog.pg_attribute a
            LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            UNION ALL
            SELECT 10000 + row_number() OVER (ORDER BY k.contype DESC, k.conname)::int,
                'CONSTRAINT ' || quote_ident(k.conname) || ' ' || pg_get_constraintdef(k.oid)
            FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'f', 'c', 'x')
        ) lines) || chr(10) || ')' || coalesce(' PARTITION BY ' || pg_get_partkeydef(c.oid), '') || ';' END
FROM pg_catalog.pg_class c LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
LEFT JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'i', 'I')
    AND (c.relname LIKE :name OR t.relname LIKE :name)
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = c.oid AND k.contype IN ('p', 'u', 'x'))
ORDER BY coalesce(t.relname, c.relname), i.indexrelid IS NOT NULL
"""
_PLAIN = """
SELECT c.relkind = 'r' AND NOT c.relhasrules AND NOT c.relrowsecurity
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 4 <> 0)
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint f WHERE f.conrelid = c.oid AND f.confrelid = c.oid AND f.contype = 'f')
FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(quote_ident(:table))
"""


def _finite(text: str) -> str:
    """Infinity, which `export` writes as a number that is too large (see `values`), in the server's own word."""
    return {"9e999": "Infinity", "-9e999": "-Infinity", "1e999": "Infinity", "-1e999": "-Infinity"}.get(text, text)


def _array(value: Any) -> str:
    """An array as the server reads it; `export` writes one as JSON does."""
    text = str(value)
    if not text.startswith("["):
        return text
    try:
        return _literal(json.loads(text))
    except ValueError:
        return text  # `[1:2]={…}` is the server's own, too


def _literal(value: Any) -> str:
    if isinstance(value, list):
        parts: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return f"{{{','.join(map(_literal, parts))}}}"
    if value is None:
        return "NULL"
    text = value if isinstance(value, str) else json_text(value)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _bytes(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def dialect_of(db: Database) -> Dialect:
    """The dialect of a database's engine."""
    return _Postgresql() if db.engine.name == "postgresql" else _Sqlite()
