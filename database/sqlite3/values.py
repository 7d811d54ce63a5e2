"""Rows out of SQLite, parameters into it."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from itertools import chain, islice
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

__all__ = ["Row", "Rows", "bind", "bind_many", "row_class"]


class _RowMethods:
    """What our rows can do more than the library's own."""

    __slots__ = ()

    if TYPE_CHECKING:

        def keys(self) -> list[str]: ...
        def __getitem__(self, key: Any, /) -> Any: ...
        def __iter__(self) -> Iterator[Any]: ...

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{name}={value!r}' for name, value in zip(self.keys(), self, strict=True))})"

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that column, or `default` if there is no such column."""
        try:
            return self[name]
        except IndexError:
            return default

    def values(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self)

    def items(self) -> ItemsView[str, Any]:
        """Names and values in order."""
        return dict(zip(self.keys(), self, strict=True)).items()

    def __contains__(self, value: object) -> bool:
        return value in tuple(self)

    def __reversed__(self) -> Iterator[Any]:
        return iter(tuple(self)[::-1])

    def index(self, value: Any, start: int = 0, stop: int = 2**31) -> int:
        """The first position of a value."""
        return tuple(self).index(value, start, stop)

    def count(self, value: Any) -> int:
        """How often a value occurs."""
        return tuple(self).count(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.keys(), tuple(self))


class Row(_RowMethods, sqlite3.Row):
    """A row: a sequence of values that also knows their names.

    `row[0]`, `row["name"]` (case does not matter), `row[1:3]`, `len(row)`, `dict(row)`, `Entity(**row)`, and iteration
    over the values.
    """

    __slots__ = ()


def row_class(base: type[Any]) -> type[Any]:
    """The same on top of the rows of a drop-in for `sqlite3`, whose cursors make no others."""
    found = type("Row", (_RowMethods, base), {"__slots__": (), "__module__": __name__, "__doc__": Row.__doc__})
    cast("Any", Sequence).register(found)
    return found


cast("Any", Sequence).register(Row)


def _unpickled(names: list[str], values: tuple[Any, ...]) -> Row:
    # A row can only be made by a cursor; this one knows nothing but names, which need quoting.
    columns = ", ".join(f'? AS "{name.replace(chr(34), chr(34) * 2)}"' for name in names)
    connection = sqlite3.connect(":memory:")
    try:
        connection.row_factory = Row
        return cast("Row", connection.execute(f"SELECT {columns}", values).fetchone())
    finally:
        connection.close()


def _settled(method: str) -> Any:
    of_list = getattr(list, method)

    def settled(self: Rows, *args: Any, **kwargs: Any) -> Any:
        for each in (self, *args):
            if isinstance(each, Rows):
                each.settle()
        return of_list(self, *args, **kwargs)

    return functools.update_wrapper(settled, of_list)


class Rows(list[Any]):
    """A list of rows that makes each `Row` when it is looked at.

    A `Row` is one more object for each row, and one that Python's garbage collector never lets out of its sight; plain
    tuples of numbers and texts it does. So a big result is kept as tuples: fetching it takes a third less time, walking
    through it included, and collections meanwhile do not stop the event loop. Whatever is more than iterating and
    indexing turns the whole into an ordinary list of rows first.
    """

    __slots__ = ("_as_row",)
    __hash__ = None  # pyright: ignore  - as a list

    def __init__(self, cursor: Any, tuples: Iterable[tuple[Any, ...]], row_class: Any = Row) -> None:
        super().__init__(tuples)
        self._as_row: Callable[[Any], Row] | None = functools.partial(row_class, cursor)
        """None when the list holds rows."""

    def settle(self) -> None:
        """Makes all the rows."""
        as_row = self._as_row
        if as_row is not None:
            self._as_row = None
            super().__setitem__(slice(None), map(as_row, super().__iter__()))

    def __iter__(self) -> Iterator[Any]:
        if self._as_row is None:
            return super().__iter__()
        return map(self._as_row, super().__iter__())

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if self._as_row is None:
            return found
        if isinstance(index, slice):
            return list(map(self._as_row, found))
        return self._as_row(found)

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self]

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)

    __add__ = _settled("__add__")
    __contains__ = _settled("__contains__")
    __delitem__ = _settled("__delitem__")
    __eq__ = _settled("__eq__")
    __ge__ = _settled("__ge__")
    __gt__ = _settled("__gt__")
    __iadd__ = _settled("__iadd__")
    __imul__ = _settled("__imul__")
    __le__ = _settled("__le__")
    __lt__ = _settled("__lt__")
    __mul__ = _settled("__mul__")
    __ne__ = _settled("__ne__")
    __repr__ = _settled("__repr__")
    __reversed__ = _settled("__reversed__")
    __rmul__ = _settled("__rmul__")
    __setitem__ = _settled("__setitem__")
    append = _settled("append")
    copy = _settled("copy")
    count = _settled("count")
    extend = _settled("extend")
    index = _settled("index")
    insert = _settled("insert")
    pop = _settled("pop")
    remove = _settled("remove")
    reverse = _settled("reverse")
    sort = _settled("sort")


_NATIVE = frozenset({int, float, str, bytes, type(None), bool, bytearray, memoryview})
_is_native = _NATIVE.issuperset


def _adapt(value: Any) -> Any:
    """A value as SQLite stores it; what is unknown is left to `sqlite3` and its registered adapters.

    Not by `sqlite3.register_adapter`, which would change every other user of `sqlite3` in the process; and its own
    adapters for dates are deprecated from Python 3.12 on. The formats are theirs nevertheless.
    """
    if type(value) in _NATIVE:
        return value
    if isinstance(value, Enum):
        return _adapt(value.value)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, (date, time_of_day)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, PurePath)):
        return str(value)
    return value


class _Attributes(dict[str, Any]):
    """An object's attributes as a mapping, looked up when SQLite asks for them.

    A dict, for `sqlite3` takes every other class with `__getitem__` for a sequence.
    """

    def __init__(self, subject: object) -> None:
        super().__init__()
        self._subject = subject

    def __missing__(self, name: str) -> Any:
        try:
            return _adapt(getattr(self._subject, name))
        except AttributeError:
            raise KeyError(name) from None


def bind(params: Any) -> Any:
    """Parameters in a form that `sqlite3` binds: a sequence, a mapping, or an object with attributes.

    Raises:
        TypeError: They are none of these.
    """
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    # Loops: for a handful of values they take less time than `_is_native` does to begin.
    if kind is dict:
        for value in params.values():
            if type(value) not in _NATIVE:
                return {name: _adapt(value) for name, value in params.items()}
        return params
    if kind is tuple or kind is list:
        for value in params:
            if type(value) not in _NATIVE:
                return [_adapt(value) for value in params]
        return params
    if params is None:
        return ()
    if isinstance(params, Mapping):
        mapping = cast("Mapping[str, Any]", params)
        return {name: _adapt(value) for name, value in mapping.items()}
    if isinstance(params, (sqlite3.Row, _RowMethods)):
        return {name: _adapt(value) for name, value in zip(params.keys(), params, strict=True)}
    if isinstance(params, (str, bytes, bytearray, memoryview, set, frozenset, int, float, complex, type)):
        shown = f"{kind.__name__}" if not isinstance(params, type) else f"the class {params.__name__}"
        raise TypeError(
            f"parameters must be a mapping, a sequence or an object with attributes, not {shown};"
            " a single value is written as (value,)"
        )
    if isinstance(params, Sequence):
        return [_adapt(value) for value in cast("Iterable[object]", params)]
    return _Attributes(cast("object", params))


MANY = 500
"""Rows that are looked at together."""


def bind_many(rows: Any) -> Iterator[Any]:
    """`bind` for every row, as they come; quicker than that where whole chunks of them need no attention."""
    return chain.from_iterable(_bound_chunks(iter(rows)))


def _bound_chunks(rows: Iterator[Any]) -> Iterator[Iterable[Any]]:
    while chunk := list(islice(rows, MANY)):
        kinds = set(map(type, chunk))
        values: Iterable[Any] | None = None
        if kinds <= _SEQUENCES:
            values = chain.from_iterable(chunk)
        elif kinds == _DICTS:
            values = chain.from_iterable(map(_values_of, chunk))
        yield chunk if values is not None and _is_native(map(type, values)) else map(bind, chunk)


_SEQUENCES: set[type] = {tuple, list}
_DICTS: set[type] = {dict}
_values_of: Callable[[Any], Iterable[Any]] = dict.values  # pyright: ignore
