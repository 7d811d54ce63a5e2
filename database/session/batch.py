"""`db.batch()`: many writes, sent together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from database.driver.request import MANY
from database.engine.statement import Statement
from database.errors import TransactionError
from database.session.binding import Binding
from database.session.sending import send_unit
from database.session.statements import still
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from types import TracebackType

    from database.session.statements import Query

__all__ = ["Batch"]


class Batch:
    """Collects writes and sends every `size` of them as one transaction. `async with` it."""

    __slots__ = ("_binding", "_closed", "_items", "_size", "count")

    def __init__(self, binding: Binding, size: int) -> None:
        self._binding = binding
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
        binding = self._binding
        statement = binding.statements.for_batch(query)
        level = binding.level()
        if isinstance(level, Transaction) and level.readonly:
            level.refuse_write(statement)
        self._items.append((statement, still(params)))
        if len(self._items) >= self._size:
            await self.flush()

    async def flush(self) -> None:
        """Sends what has been collected, and commits it if no transaction is open around the batch."""
        items, self._items = self._items, []
        if items:
            binding = self._binding
            await send_unit(binding, MANY, binding.connection.execute_batch, items, None, label="batch")
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
