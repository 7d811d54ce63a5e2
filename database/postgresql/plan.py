"""How a statement is sent to PostgreSQL, and what is learnt about it while it is used again and again."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Insert", "Plan", "reshaped"]


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


_shapes = [0]
"""How often this process has seen a statement that may give a table another shape. Any thread; a lost update does no harm."""


def reshaped() -> None:
    """A statement has been executed that may have given a table another shape."""
    _shapes[0] += 1


class Plan:
    """How a statement is sent. Cached with it, so what is found out about it is kept here.

    Attributes:
        sql: The text for the server, with `$1`, `$2`, …
        names: The parameters' names in order; None where they are positional.
        count: How many parameters there are.
        insert: What is known of it, if it is an INSERT.
        coercions: How parameters are converted, by their Python types; see `connection.py`.
        returning: The text with RETURNING for `lastrowid`; `""` if there is nothing to return, None if nobody has looked.
        look_again: When a table without such a key is looked at again.
        seconds: How long it takes, roughly; None if nobody knows.
        many: Whether it may have more than one row; as it was the last time that only the first was wanted.
        uses: How often it has been executed.
        wide: Positions of parameters that have been larger than an `int4`, and are sent as `int8` since.
        calls: Functions that it calls and of which only the server knows whether they change anything.
        acts: Whether a function that it calls does something, so that it is never left half executed.
        stains: Whether the connection may be another one after it; it is then put right when the transaction ends.
        refusal: Why it is refused outside a transaction.
        alone: Whether it may not run within a transaction.
        nameless: Whether it is not prepared under a name any more.
        suspects: Names in it of which only the server knows whether something hides behind them that does more than to read;
            empty if it is certain that it does, or its answer depends on when the transaction has begun.
        innocent_until: Until when (`time.perf_counter()`) it is known that it reads and leaves no trace, not even in its
            transaction.
        shapes: Whether it may give a table another shape, so that what was learnt of other statements may be wrong; or `sets`.
        sets: Whether it gives the transaction a setting of its own, on which it may depend how values are written.
        harmless_until: Until when (`time.perf_counter()`) it is known that nothing is lost if only its first rows are computed.
        learnt_at: How many such statements there had been when something was learnt of this one.
    """

    __slots__ = (
        "acts",
        "alone",
        "calls",
        "coercions",
        "count",
        "harmless_until",
        "innocent_until",
        "insert",
        "learnt_at",
        "look_again",
        "many",
        "nameless",
        "names",
        "refusal",
        "returning",
        "seconds",
        "sets",
        "shapes",
        "sql",
        "stains",
        "suspects",
        "uses",
        "wide",
    )

    def __init__(self, sql: str, names: tuple[str, ...] | None, count: int) -> None:
        self.sql = sql
        self.names = names
        self.count = count
        self.insert: Insert | None = None
        self.coercions: dict[tuple[type, ...], Any] = {}
        self.returning: str | None = None
        self.look_again = 0.0
        self.seconds: float | None = None
        self.uses = 0
        self.wide: frozenset[int] = frozenset()
        self.calls: tuple[str, ...] = ()
        self.suspects: tuple[str, ...] = ()
        self.innocent_until = self.harmless_until = 0.0
        self.acts = self.alone = self.stains = self.shapes = self.sets = self.nameless = False
        self.many = True
        self.learnt_at = 0
        self.refusal: str | None = None

    def take_from(self, other: Plan) -> None:
        """Takes over what another plan, of the same statement, says of what it does."""
        self.calls, self.acts, self.stains = other.calls, other.acts, other.stains
        self.shapes, self.sets, self.alone = other.shapes, other.sets, other.alone

    def check_shapes(self) -> None:
        """Forgets what was learnt if a table may have another shape since."""
        count = _shapes[0]
        if self.learnt_at != count:
            self.learnt_at = count
            self.coercions = {}
            self.returning = None

    def took(self, seconds: float) -> None:
        """Learns from one execution. Any worker's thread; a lost update does no harm."""
        known = self.seconds
        self.seconds = seconds if known is None else known + (seconds - known) * 0.2
