"""What may be asked for: SQL text, or a query function of a file."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from copy import copy
from typing import Any, Final, Protocol, TypeVar, cast

__all__ = ["Query", "TypedQuery", "still"]

T_co = TypeVar("T_co", covariant=True)

Query = str | Callable[..., Any]
"""SQL text, or a query function of `load_queries()`."""


_CHANGING: Final = frozenset({bytearray, memoryview, array})
"""Values whose contents may be others by the time they are bound."""


_UNTOUCHED: Final[tuple[type[Any], ...]] = (Sequence, Set, type)
"""Immutable, like a row; or refused when it is bound."""


def still(params: Any) -> Any:
    """Parameters as they are now: whoever hands them over may go on to change the object, and a worker binds them later.

    What holds them is copied; of the values, buffers are. Other values that change are nobody's parameters.
    """
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    if kind is dict:
        for value in params.values():
            if type(value) in _CHANGING:
                return {name: _still(value) for name, value in params.items()}
        return params.copy()
    if kind is tuple or kind is list:
        for value in params:
            if type(value) in _CHANGING:
                return [_still(value) for value in params]
        return params if kind is tuple else params.copy()
    if params is None:
        return None
    return _still_object(params)


def _still(value: Any) -> Any:
    return bytes(value) if type(value) in _CHANGING else value


def _still_object(params: Any) -> Any:
    """The same for what is no plain container: an object with attributes, a mapping or a sequence of some class."""
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(params, Mapping):
        return {name: _still(value) for name, value in cast("Mapping[str, Any]", params).items()}
    if isinstance(params, _UNTOUCHED):
        return cast("object", params)
    try:
        attributes = getattr(params, "__dict__", None)
        if attributes is None:
            return copy(params)
        found: Any = object.__new__(kind)
        found.__dict__.update((name, _still(value)) for name, value in attributes.items())
        return found
    except Exception:  # a class that makes its objects in its own way: bound as it will be
        return params


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
