"""What `db.run` hands to a function of the user's: psycopg's own connection, on loan.

The function runs within the transaction that the package has open around it, behind the savepoint `run`. So that
libraries work unchanged, `commit()`, `rollback()` and `with connection:` work up to there: `commit()` sets the
savepoint anew, and `rollback()` goes back to it; nothing is permanent before the function has returned.

What is executed is looked at first, whatever it comes as (text, bytes, `psycopg.sql`): BEGIN, COMMIT and the like are
the package's own business, and what may leave something on the connection is noted, so that it is put right afterwards.
Who goes round that (with psycopg's own cursor classes, or libpq's functions) is found out when the function returns:
the savepoint is gone.

After the function the connection answers nobody any more: its cursors are closed, what was set on it is as before.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakSet

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap

from database import errors
from database.engine.statement import CONTROL, READ, Statement
from database.postgresql import analysis
from database.postgresql.failures import clean, control_error
from database.postgresql.plan import Plan, reshaped
from database.postgresql.values import bind, row_class

if TYPE_CHECKING:
    from types import TracebackType


__all__ = ["Cursor", "RawConnection", "ServerCursor", "rows"]

_INDEX = "_prepared_idx"
_SAVE = b"SAVEPOINT run"
_RELEASE = b"RELEASE SAVEPOINT run"
_UNDO = b"ROLLBACK TO SAVEPOINT run"

_KEPT = (
    *("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max"),
    *("_adapters", "_notice_handlers", "_notify_handlers"),
)
"""Attributes of the connection that are after a loan what they were before."""


@functools.lru_cache(maxsize=500)
def _read(text: str) -> tuple[Statement, ...]:
    """The statements of a text.

    Raises:
        DatabaseError: One of them cannot be sent, or would end the transaction.
    """
    analysis.check_text(text)
    statements = tuple(analysis.analyse(each) for each in analysis.split(text))
    for statement in statements:
        if statement.kind == CONTROL and not _is_savepoint(statement):
            raise control_error(statement.verb)
    return statements


def _is_savepoint(statement: Statement) -> bool:
    if statement.verb in ("SAVEPOINT", "RELEASE"):
        return True
    return statement.verb in ("ROLLBACK", "ABORT") and "TO" in analysis.words_of(statement.sql)


def _text(query: Any, context: AdaptContext) -> str:
    """The SQL text of whatever psycopg takes as a query."""
    if isinstance(query, str):
        return query
    if isinstance(query, (bytes, bytearray, memoryview)):
        return bytes(cast("bytes", query)).decode()
    if hasattr(query, "as_string"):
        return cast("str", query.as_string(context))
    raise psycopg.ProgrammingError(f"a query is text, bytes or psycopg.sql's, not {type(query).__name__}")


class Cursor(psycopg.RawCursor[Any]):
    """The cursor of the raw connection: takes the placeholders that the rest of the package takes."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """As psycopg's, with `:name` and `?` too. BEGIN, COMMIT and the like are the package's own business."""
        text, values = self._admitted(query, params)
        with self._vouched(params):
            return super().execute(cast("Any", text), values, **options)

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        """As psycopg's, with `:name` and `?` too."""
        text = _text(query, self)
        statements = _read(text)
        self._connection.note(statements)
        if len(statements) != 1:
            raise errors.QueryExecutionError("executemany() takes one statement; nothing was executed", sql=text)
        plan: Plan = statements[0].hint
        rows = [list(bind(plan, each)) for each in params_seq]
        with self._vouched(rows):
            super().executemany(cast("Any", plan.sql), rows, **options)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        """As psycopg's, with `:name` and `?` too."""
        text, values = self._admitted(query, params)
        return super().stream(cast("Any", text), values, **options)

    def copy(self, statement: Any, params: Any = None, **options: Any) -> Any:
        """As psycopg's: one COPY, and nothing else."""
        text = _text(statement, self)
        analysis.check_text(text)
        if len(list(analysis.split(text))) != 1 or analysis.words_of(text)[:1] != ["COPY"]:
            raise errors.QueryExecutionError("copy() takes one COPY; nothing was executed", sql=text)
        return super().copy(cast("Any", text), params, **options)

    @property
    def _connection(self) -> RawConnection:
        return cast("RawConnection", self.connection)

    def _admitted(self, query: Any, params: Any) -> tuple[str, Any]:
        text = _text(query, self)
        statements = _read(text)
        self._connection.note(statements)
        if len(statements) != 1:
            return text, params
        plan: Plan = statements[0].hint
        return plan.sql, list(bind(plan, params)) if plan.count else None

    @contextlib.contextmanager
    def _vouched(self, params: Any) -> Generator[None]:
        connection = self._connection
        before, connection.vouched = connection.vouched, True
        try:
            yield
        except psycopg.Error as error:
            clean(error, params)
            raise
        finally:
            connection.vouched = before


class ServerCursor(psycopg.RawServerCursor[Any]):
    """The same for a cursor with a name, which lives on the server."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """As psycopg's, with `:name` and `?` too."""
        text = _text(query, self)
        statements = _read(text)
        cast("RawConnection", self.connection).note(statements)
        if len(statements) != 1 or statements[0].kind != READ:
            raise errors.QueryExecutionError("a cursor with a name takes one SELECT; nothing was executed", sql=text)
        plan: Plan = statements[0].hint
        values = list(bind(plan, params)) if plan.count else None
        try:
            return super().execute(cast("Any", plan.sql), values, **options)
        except psycopg.Error as error:
            clean(error, params)
            raise


class Owner(Protocol):
    """What a raw connection asks of the `Sender` that owns it."""

    stained: bool

    def drive(self, gen: Any) -> Any:
        """Runs one of psycopg's generators to its end, as statements of its own are."""

    def simple(self, parts: list[bytes]) -> Any:
        """Sends SQL of the package's own, and waits for it."""

    def localise(self) -> None:
        """The transaction has been given settings of its own."""


class RawConnection(psycopg.Connection[Any]):
    """psycopg's connection, whose waits the worker can leave, and which is the function's while that runs."""

    session: Owner | None = None
    """What sends statements on it; None while a function of the user's own has it, or it is given up."""
    expires = math.inf
    """When it is to be made again, by `time.monotonic()`."""
    used_at = math.inf
    """When it was used last."""
    lent = False
    """Whether anybody may use it at the moment."""
    vouched = False
    """Whether what is executed has been looked at."""
    savepoint = False
    """Whether the savepoint `run` is there, so that `commit()` and `rollback()` have a meaning."""

    @property
    def pgconn(self) -> pq.abc.PGconn:
        """Libpq's connection. What the function sends with its functions is looked at by nobody."""
        if self.lent and not self.vouched and self.session is not None:
            caller = sys._getframe(1).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]
            if not str(caller).startswith("psycopg"):
                self.session.stained = True
        return self._libpq

    @pgconn.setter
    def pgconn(self, made: pq.abc.PGconn) -> None:
        self._libpq = made

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Drives one of psycopg's generators as the session drives its own statements."""
        session = self.session
        if session is None:
            return super().wait(gen, interval, timeout)
        if not self.lent:
            gen.close()
            raise psycopg.ProgrammingError(
                "this connection was on loan while the function of `db.run` ran, and is the pool's again: return what was"
                " read, as a list, not the cursor"
            )
        if not self.vouched:
            session.stained = True  # by a cursor that is not ours, so nobody knows by what
        return session.drive(gen) if timeout is None else super().wait(gen, interval, timeout)

    def note(self, statements: Iterable[Statement]) -> None:
        """Remembers that one of these may leave something on the connection."""
        session = self.session
        if session is not None:
            for statement in statements:
                plan: Plan = statement.hint
                if plan.stains or plan.calls:
                    session.stained = True
                if plan.sets:
                    session.localise()
                elif plan.shapes:
                    reshaped()

    def cursor(self, *args: Any, **options: Any) -> Any:
        """As psycopg's; closed at the latest when the function returns."""
        made = super().cursor(*args, **options)
        cursors: WeakSet[Any] | None = self.__dict__.get("_cursors")
        if cursors is not None:
            cursors.add(made)
        return made

    def commit(self) -> None:
        """Keeps what was done so far, within the transaction that the package has open."""
        self._to_savepoint("commit", [_RELEASE, _SAVE])

    def rollback(self) -> None:
        """Undoes what was done since the function began, or since its last `commit()`."""
        self._to_savepoint("rollback", [_UNDO])

    def _to_savepoint(self, name: str, parts: list[bytes]) -> None:
        session = self.session
        if session is None or not self.lent or not self.savepoint:
            raise control_error(name.upper())
        if self._num_transactions:
            raise psycopg.ProgrammingError(
                f"Explicit {name}() forbidden within a Transaction context. (Transaction will be automatically"
                f" {'committed' if name == 'commit' else 'rolled back'} when the block ends.)"
            )
        session.simple(parts)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """As psycopg's within a pool: commits or rolls back, and stays open."""
        if self.session is None:
            super().__exit__(exc_type, exc_val, exc_tb)
        elif exc_type is None:
            self.commit()
        else:
            self.rollback()

    def close(self) -> None:
        """Does nothing while it is on loan: it is the pool's to close."""
        if self.session is None:
            super().close()

    def is_heard(self) -> bool:
        """Whether somebody hears of the server's notices and notifications."""
        return bool(self._notice_handlers or self._notify_handlers)

    # The loan

    def lend(self) -> None:
        """From now on a function of the user's has it, behind the savepoint."""
        attributes = self.__dict__
        attributes["_before"] = [(name, getattr(self, name)) for name in _KEPT]
        attributes["_cursors"] = WeakSet[Any]()
        self._adapters = AdaptersMap(self.adapters)
        self._notice_handlers = list(self._notice_handlers)
        self._notify_handlers = list(self._notify_handlers)
        self.lent = self.savepoint = True

    def take_back(self) -> None:
        """Ends the loan: nothing that the function has kept works any more, and the connection is as before."""
        attributes = self.__dict__
        self.vouched = True
        for cursor in list(attributes.pop("_cursors")):
            with contextlib.suppress(psycopg.Error):
                cursor.close()
        self.lent = self.savepoint = self.vouched = False
        for name, value in attributes.pop("_before"):
            setattr(self, name, value)
        self._num_transactions = 0
        self._pipeline = None
        if getattr(self._prepared, "_names", None):  # by a threshold of the function's: names that only psycopg knows
            names = self._prepared
            self._prepared = type(names)()
            setattr(self._prepared, _INDEX, getattr(names, _INDEX))  # the old ones go with the transaction
            if self.session is not None:
                self.session.stained = True


def rows(cursor: Any) -> Callable[[Sequence[Any]], Any]:
    """Psycopg's row factory that makes our rows."""
    description = cursor.description
    return row_class(tuple(column.name for column in description) if description else ())
