"""What is known of a statement before it is run.

An engine analyses SQL text into `Statement`s (`database/sqlite3/analysis.py`); the handle routes by them and caches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

__all__ = ["CONTROL", "OTHER", "READ", "WHOLE", "WRITE", "WRITES", "Result", "Row", "Statement", "quoted"]

READ: Final = 0
"""Changes nothing: any reader may run it."""
WRITE: Final = 1
"""INSERT, UPDATE, DELETE: may share a transaction with others."""
OTHER: Final = 2
"""Changes the schema or the connection, or may not run in a transaction: the writer runs it alone."""
CONTROL: Final = 3
"""BEGIN, COMMIT, SAVEPOINT, …: the package's own business."""
WHOLE: Final = 4
"""A WRITE that would leave a part of itself behind when it fails: outside a transaction it needs one around it."""
WRITES: Final = frozenset({WRITE, WHOLE})
"""Both."""


def quoted(name: str) -> str:
    """An SQL identifier: whatever the name is, it stays a name."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class Statement:
    """An analysed statement.

    Attributes:
        sql: Its text.
        verb: Its first keyword in capitals, of the main clause where it begins with WITH.
        kind: READ, WRITE, OTHER, CONTROL or WHOLE.
        returns_rows: Whether it gives rows.
        hint: What the engine wants to be told when it executes the statement.
    """

    sql: str
    verb: str
    kind: int
    returns_rows: bool
    hint: Any = None


class Result(NamedTuple):
    """What a statement did.

    Attributes:
        rowcount: Rows changed; -1 where that means nothing (DDL, SELECT).
        lastrowid: The row id of the row that an INSERT added; None if it added none, or if that cannot be known.
    """

    rowcount: int
    lastrowid: int | None


class Row(Protocol):
    """A row: a sequence of values that also knows their names."""

    def __getitem__(self, key: Any, /) -> Any:
        """`row[0]`, `row[-1]`, `row[1:3]` or `row["name"]`."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The values."""
        ...

    def __len__(self) -> int:
        """The number of columns."""
        ...

    def keys(self) -> list[str]:
        """The columns' names."""
        ...
