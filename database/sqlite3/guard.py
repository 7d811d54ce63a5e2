"""What may be sent over one connection: the authorizer, and what becomes of what it refuses.

SQLite asks it about every statement that it prepares (sqlite.org/c3ref/set_authorizer.html), whatever that is spelled like:

- BEGIN, COMMIT, SAVEPOINT and the like are the package's own, and nobody else's text may equal one of them.
- On a reader, and in a read-only transaction, whatever is no read is refused.
- What changes the connection instead of the database (a PRAGMA, ATTACH, a temporary table) is refused outside a
  transaction; put off, where others share the transaction, until it has one of its own (`Alone`); in one of its own it
  holds until the end, and then the connection is exchanged.
- What may leave a foreign key to be checked with the commit does not share a transaction either.

What comes out of `sqlite3`'s statement cache is not shown to the authorizer again; setting it anew has everything asked
about once more. All of this is on the connection's own thread.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any, Final

from database.engine.contract import Alone
from database.engine.statement import quoted
from database.sqlite3 import analysis
from database.sqlite3.failures import KEYS_STAY
from database.sqlite3.raw import Lent

__all__ = ["MARK", "Guard"]

MARK = f"--{os.urandom(8).hex()}"
"""The end of the package's own statements, which nobody can guess."""

_READ_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_WRITE_ACTIONS = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
_CHANGES: Final = frozenset(
    {
        sqlite3.SQLITE_ATTACH,
        sqlite3.SQLITE_DETACH,
        sqlite3.SQLITE_CREATE_TEMP_INDEX,
        sqlite3.SQLITE_CREATE_TEMP_TABLE,
        sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
        sqlite3.SQLITE_CREATE_TEMP_VIEW,
        sqlite3.SQLITE_DROP_TEMP_INDEX,
        sqlite3.SQLITE_DROP_TEMP_TABLE,
        sqlite3.SQLITE_DROP_TEMP_TRIGGER,
        sqlite3.SQLITE_DROP_TEMP_VIEW,
    }
)
"""What belongs to one connection; and PRAGMAs, of which it is looked which."""
_CREATIONS: Final = frozenset(
    {
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_CREATE_VTABLE,
    }
)
"""The same, where the schema is `temp`."""
_OF_TABLES: Final = frozenset(
    {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_CREATE_VTABLE,
        sqlite3.SQLITE_DROP_VTABLE,
        sqlite3.SQLITE_CREATE_TEMP_TABLE,
        sqlite3.SQLITE_CREATE_TEMP_VIEW,
    }
)
_SCHEMA_TABLES = frozenset({"sqlite_master", "sqlite_schema"})
_CONTROL_ACTIONS = frozenset({sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT})


_OF_THE_PROCESS: Final = frozenset(
    {"data_store_directory", "hard_heap_limit", "soft_heap_limit", "temp_store_directory"}
)
"""PRAGMAs whose value holds for every connection of this process: no other connection makes up for them."""

_WORDS: Final = {sqlite3.SQLITE_ATTACH: "ATTACH", sqlite3.SQLITE_DETACH: "DETACH"}


class Guard:
    """A connection's rules; `Connection` is what lives by them."""

    __slots__ = (
        "_admitting",
        "_alone",
        "_changed",
        "_cursor",
        "_deferred",
        "_deferring",
        "_refused",
        "_restricted",
        "_rowids",
        "_schema_writable",
        "_schemas",
        "_shared",
        "_versions",
        "plain",
        "raw",
        "readonly",
    )

    raw: Lent
    _cursor: sqlite3.Cursor
    plain: bool
    """See `Connection`."""

    def __init__(self, *, readonly: bool) -> None:
        self.readonly = readonly
        self._admitting = False
        """Whether BEGIN, COMMIT and the like may be prepared: while this package itself sends them."""
        self._restricted = readonly
        self._schema_writable = False
        """Whether somebody may have switched on `writable_schema`."""
        self._shared = False
        """Whether others share the open transaction."""
        self._refused: str | None = None
        """What has just been refused because it changes one connection."""
        self._alone = False
        """Whether something has just been refused because others share the transaction."""
        self._changed = False
        """Whether the connection is to be exchanged when its transaction has ended."""
        self._rowids: dict[str, bool] = {}
        """Of INSERTs, by their text: whether the table has row ids."""
        self._schemas: tuple[str, ...] = ()
        """The database and the files that the configuration attaches, quoted; empty until they are asked for."""
        self._versions: list[int] = []
        """Their schemas' versions when these were looked through for foreign keys that are checked with the commit."""
        self._deferred: dict[str, frozenset[str | None]] = {}
        """Tables that such keys lead from or to, and their columns in them."""
        self._deferring = True
        """Whether statements may be prepared already that change such tables."""

    def share(self, shared: bool) -> None:
        """See `Connection`.

        A foreign key that is checked with the commit is checked for all members at once: one could make up for what
        another leaves behind. So what may leave something behind gets a transaction of its own. The authorizer sees it, if
        it is asked, and of statements that it has admitted before it is asked again.
        """
        self._shared = shared
        if not shared:
            return
        execute = self._cursor.execute
        if not self._schemas:
            with self.raw.as_text():
                names = [row[1] for row in execute("PRAGMA database_list").fetchall()]
            self._schemas = tuple(quoted(name) for name in names if name != "temp")
        versions = [execute(f"PRAGMA {schema}.schema_version").fetchall()[0][0] for schema in self._schemas]
        if versions != self._versions:
            with self.raw.as_text():
                self._deferred = _deferred(self.raw.plain_cursor(), self._schemas)
            self._versions = versions
            self._deferring = True
        if self._deferring and self._deferred:
            self._deferring = False
            self.raw.install()

    # For the connection, while it is lent: see `Keeper`

    def control(self, sql: str, cursor: Any = None) -> None:
        """See `Keeper`. Under a text that is nobody else's: what is cached is not shown to the authorizer again."""
        self._admitting = True
        try:
            text = f"{sql} {MARK}"
            if cursor is None:
                self._cursor.execute(text)
            else:
                self.raw.module.Cursor.execute(cursor, text)
        finally:
            self._admitting = False

    def alter(self) -> None:
        """See `Keeper`."""
        if self._shared:
            raise Alone
        self._changed = True
        self.plain = False

    def denied(self) -> bool:
        """See `Keeper`."""
        alone, self._alone = self._alone, False
        return alone

    def writes(self) -> bool:
        """See `Keeper`."""
        return not self._restricted

    def restrict(self, readonly: bool) -> None:
        """See `Connection`. Setting the authorizer anew has every cached statement checked again."""
        self._restricted = readonly
        self.raw.install()

    def _authorize(
        self, action: int, first: str | None, second: str | None, schema: str | None, _by: str | None
    ) -> int:
        if action in _READ_ACTIONS:
            return sqlite3.SQLITE_OK
        if action in _CONTROL_ACTIONS:
            return sqlite3.SQLITE_OK if self._admitting else sqlite3.SQLITE_DENY
        if self._admitting:
            return sqlite3.SQLITE_OK
        if not self._restricted:
            if self._deferred and action in _WRITE_ACTIONS and str(first).lower() in self._deferred:
                return self._defer(action, str(first).lower(), second)
            if action in _OF_TABLES:
                self._rowids.clear()
                if self._shared:  # with keys, perhaps, that are checked with the commit
                    self._alone = True
                    return sqlite3.SQLITE_DENY
                if action == sqlite3.SQLITE_DROP_TABLE and str(first).lower() in self.raw.protected:
                    self._refused = KEYS_STAY
                    return sqlite3.SQLITE_DENY
            if action == sqlite3.SQLITE_PRAGMA and second is not None and str(first).lower() == "writable_schema":
                self._schema_writable = True
            if action == sqlite3.SQLITE_PRAGMA or action in _CHANGES or (schema == "temp" and action in _CREATIONS):
                return self._judge(action, str(first).lower(), second)
            # Of `CREATE TRIGGER temp.name ON main.table`, nothing else tells that it is a temporary one.
            if action == sqlite3.SQLITE_INSERT and first == "sqlite_temp_master":
                return self._judge(action, "", None)
            return sqlite3.SQLITE_OK
        # Virtual tables and table-valued functions (FTS5, json_each, pragma_table_info) ask for writes that they never
        # do when they are first used: all of them to update the schema table, where they declare their columns, R*Tree
        # to change its own tables. A reader's file cannot be written, whatever is admitted here.
        if action in _WRITE_ACTIONS:
            if self.readonly:
                return sqlite3.SQLITE_DENY if schema == "temp" else sqlite3.SQLITE_OK
            if action == sqlite3.SQLITE_UPDATE and first in _SCHEMA_TABLES and not self._schema_writable:
                return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and first is not None:
            known = analysis.READ_PRAGMAS if second is None else analysis.ARGUMENT_PRAGMAS
            if first.lower() in known:
                return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def _defer(self, action: int, table: str, column: str | None) -> int:
        """What the authorizer says to a change that may leave a foreign key to be checked with the commit."""
        if action == sqlite3.SQLITE_UPDATE:
            columns = self._deferred[table]
            if str(column).lower() not in columns and None not in columns:
                return sqlite3.SQLITE_OK
        if self._shared:
            self._alone = True
            return sqlite3.SQLITE_DENY
        self._deferring = True
        return sqlite3.SQLITE_OK

    def _judge(self, action: int, first: str, second: str | None) -> int:
        """What the authorizer says to something that may change this connection."""
        if action == sqlite3.SQLITE_PRAGMA and (
            second is None or first in analysis.ARGUMENT_PRAGMAS or first in analysis.FILE_PRAGMAS
        ):
            return sqlite3.SQLITE_OK
        if not self.raw.in_transaction or (action == sqlite3.SQLITE_PRAGMA and first in _OF_THE_PROCESS):
            self._refused = first if action == sqlite3.SQLITE_PRAGMA else _WORDS.get(action, "temporary")
            return sqlite3.SQLITE_DENY
        if self._shared:
            self._alone = True
            return sqlite3.SQLITE_DENY
        if first != "defer_foreign_keys" or action != sqlite3.SQLITE_PRAGMA:  # that one ends with its transaction
            self._changed = True
        return sqlite3.SQLITE_OK


def _deferred(cursor: sqlite3.Cursor, schemas: tuple[str, ...]) -> dict[str, frozenset[str | None]]:
    """Tables with foreign keys that are checked with the commit, and the tables that these lead to, with the columns.

    Tables of the same name in several schemas count as one: at worst a statement gets a transaction of its own.
    """
    found: dict[str, set[str | None]] = {}
    for schema in schemas:
        cursor.execute(f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' AND sql LIKE '%DEFERRED%'")  # noqa: S608
        for (name,) in cursor.fetchall():
            for key in cursor.execute(f"PRAGMA {schema}.foreign_key_list({quoted(name)})").fetchall():
                found.setdefault(name.lower(), set()).add(key["from"].lower())
                found.setdefault(key["table"].lower(), set()).add(key["to"] and key["to"].lower())
    return {table: frozenset(columns) for table, columns in found.items()}
