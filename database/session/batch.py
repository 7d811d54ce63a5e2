"""`db.batch()`: many writes, sent together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from database.engine.statement import Statement
from database.errors import TransactionError

if TYPE_CHECKING:
    from types import TracebackType

    from database.session.database import Database
    from database.session.statements import Query

__all__ = ["Batch"]


class Batch:
    """Collects writes and sends every `size` of them as one transaction. `async with` it."""

    __slots__ = ("_closed", "_database", "_items", "_size", "count")

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._size = size
        self._items: list[tuple[Statement, Any]] = []
        self._closed = False
        self.count = 0
        """Writes that have been executed so far."""

    async def __aenter__(self) -> Batch:
        return self

    async def execute(self, query: Query, params: Any = None) -> None:
        """Adds a write; every `size` of them are sent. Its outcome is known only then.

        Raises:
            QueryExecutionError: It is no INSERT, UPDATE or DELETE; or one of those now sent failed, and none of
                them is kept. Those committed before stay.
        """
        if self._closed:
            raise TransactionError("the batch is over: use it inside its `async with` block")
        self._items.append((self._database.batch_statement(query), _as_it_is(params)))
        if len(self._items) >= self._size:
            await self.flush()

    async def flush(self) -> None:
        """Sends what has been collected, and commits it if no transaction is open around the batch."""
        items, self._items = self._items, []
        if items:
            await self._database.send_batch(items)
            self.count += len(items)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Sends the rest; after an exception drops it."""
        self._closed = True
        if error is None:
            await self.flush()
        else:
            self._items.clear()


_FIXED: frozenset[type] = frozenset({int, float, str, bytes, bool, type(None)})
"""Types of values that stay what they are."""
_CHANGING = (bytearray, memoryview, list, dict, set)


def _as_it_is(params: Any) -> Any:
    """Parameters as they are now: they are sent later, and their owner may use the object again for the next ones."""
    kind: type[Any] = type(params)
    if kind is dict:
        for value in params.values():
            if type(value) not in _FIXED:
                return {name: _value(value) for name, value in params.items()}
        return params.copy()
    if kind is tuple or kind is list:
        for value in params:
            if type(value) not in _FIXED:
                return [_value(value) for value in params]
        return tuple(params)
    if params is None or isinstance(params, (str, bytes)):
        return params
    if isinstance(params, Mapping):
        return {name: _value(value) for name, value in params.items()}
    if isinstance(params, tuple):  # with names: only its own kind can say them
        return params if not any(isinstance(value, _CHANGING) for value in params) else copy.deepcopy(params)
    if isinstance(params, Sequence):
        if hasattr(params, "keys"):  # a row, which cannot be changed
            return params
        return [_value(value) for value in params]
    taken = copy.copy(params)
    for name, value in getattr(taken, "__dict__", {}).items():
        if isinstance(value, _CHANGING):
            object.__setattr__(taken, name, _value(value))
    return taken


def _value(value: Any) -> Any:
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return copy.deepcopy(value) if isinstance(value, _CHANGING) else value
