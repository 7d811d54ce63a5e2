"""What may be asked for: SQL text, or a query function of a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

__all__ = ["Query", "TypedQuery"]

T_co = TypeVar("T_co", covariant=True)

Query = str | Callable[..., Any]
"""SQL text, or a query function of `load_queries()`."""


class TypedQuery(Protocol[T_co]):
    """A query function of a file, as type checkers see it: `T_co` is what becomes of a row; see `database.stubs`."""

    @property
    def sql(self) -> str:
        """The statement."""
        ...

    @property
    def operation(self) -> Any:
        """What aiosql makes of its operator."""
        ...

    @property
    def record_class(self) -> Callable[..., T_co] | None:
        """What the file's `-- record_class:` names; None: rows stay rows."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Executes it."""
        ...
