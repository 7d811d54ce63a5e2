"""Rows out of SQLite, parameters into it."""

from __future__ import annotations

import functools
import sqlite3
from array import array
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from itertools import chain, islice, repeat
from operator import length_hint
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from database.engine.adapting import NATIVE, NONE, Adapters, adapted
from database.engine.rows import table
from database.engine.statement import quoted
from database.sqlite3.analysis import placeholders

__all__ = ["Chunk", "Feed", "Row", "bind", "row_class"]


class _RowMethods:
    """What our rows can do more than the library's own."""

    __slots__ = ()

    if TYPE_CHECKING:

        def keys(self) -> list[str]: ...
        def __getitem__(self, key: Any, /) -> Any: ...
        def __iter__(self) -> Iterator[Any]: ...

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{name}={value!r}' for name, value in zip(self.keys(), self, strict=True))})"

    def _repr_html_(self) -> str:
        return table(self.keys(), [self])  # type: ignore[list-item]  # pyright: ignore

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
    columns = ", ".join(f"? AS {quoted(name)}" for name in names)
    connection = sqlite3.connect(":memory:")
    try:
        connection.row_factory = Row
        return cast("Row", connection.execute(f"SELECT {columns}", values).fetchone())
    finally:
        connection.close()


class Chunk:
    """Rows of a stream, each made when it is reached; nobody but the stream sees it.

    A list of rows, as `fetch_all` gives, holds rows and nothing else: what is written in C (orjson, msgspec, pydantic) looks
    into a list itself, and would find the tuples.
    """

    __slots__ = ("_as_row", "_tuples")

    def __init__(self, cursor: Any, tuples: list[tuple[Any, ...]], row_class: Any = Row) -> None:
        self._tuples = tuples
        self._as_row: Callable[[Any], Row] = functools.partial(row_class, cursor)

    def __len__(self) -> int:
        return len(self._tuples)

    def __iter__(self) -> Iterator[Row]:
        return map(self._as_row, self._tuples)


_is_native = NATIVE.issuperset


def _adapt(value: Any, adapters: Adapters = NONE) -> Any:
    """A value as SQLite stores it; what is unknown is left to `sqlite3` and its registered adapters.

    Not by `sqlite3.register_adapter`, which would change every other user of `sqlite3` in the process; and its own
    adapters for dates are deprecated from Python 3.12 on. The formats are theirs nevertheless.

    Raises:
        TypeError: `sqlite3` would store the bytes that it finds in the value's memory.
    """
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind in NATIVE:
        return value
    if adapters:
        made = adapted(value, adapters)
        if made is not None:
            return _adapt(made[0])  # as the package itself does it, so that no two functions call one another for ever
    if kind.__module__.partition(".")[0] in ("numpy", "pandas") and (kind, sqlite3.PrepareProtocol) not in _adapters:
        value = _plain(value, kind)
        if type(value) in NATIVE:
            return value
    if isinstance(value, Enum):
        return _adapt(value.value, adapters)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, (date, time_of_day)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, PurePath)):
        return str(value)
    if kind is memoryview:
        return value if value.c_contiguous else value.tobytes()
    if issubclass(kind, (str, bytes, bytearray, array, int, float)):
        return value
    if not hasattr(value, "__conform__") and (type(value), sqlite3.PrepareProtocol) not in _adapters:
        _refuse_memory(value)
    return value


_adapters: dict[tuple[type, type], Any] = sqlite3.adapters


def _plain(value: Any, kind: type) -> Any:
    """A number, a text or a moment of numpy's or pandas' as Python's own; neither is imported for that."""
    name = kind.__name__
    if name in ("NaTType", "NAType", "MaskedConstant"):
        return None
    if name == "datetime64":
        text = str(value)
        if text == "NaT":
            return None
        if (
            len(text) > 10
        ):  # a moment, written as `datetime.isoformat(" ")` does, but for nanoseconds where there are some
            moment, _, fraction = text.replace("T", " ").partition(".")
            moment += ":00" * ((19 - len(moment)) // 3)
            fraction = fraction.ljust(6, "0").rstrip("0") if len(fraction) > 6 else fraction.rstrip("0")
            return f"{moment}.{fraction.ljust(6, '0')}" if fraction else moment
        if len(text) < 10:
            raise TypeError(f"a datetime64 of years or months ({text}) is no date: convert it to datetime64[D]")
        return text
    if name == "ndarray":
        if value.ndim:
            raise TypeError(
                "a numpy array cannot be stored as one value: use .tobytes(), or json.dumps(array.tolist())"
            )
        return _adapt(value.item())
    item = getattr(value, "item", None)
    if item is not None and kind.__module__.startswith("numpy") and name not in ("timedelta64", "void"):
        plain = item()
        if type(plain) is not kind:
            return plain
    return value


def _refuse_memory(value: object) -> None:
    try:
        memoryview(value).release()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except TypeError:
        return  # `sqlite3` refuses it, if the statement asks for it at all
    raise TypeError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} would be stored as the bytes of its memory:"
        " convert it to a number, a text or bytes"
    )


class _Attributes(dict[str, Any]):
    """An object's attributes as a mapping, looked up when SQLite asks for them.

    A dict, for `sqlite3` takes every other class with `__getitem__` for a sequence.
    """

    def __init__(self, subject: object, adapters: Adapters) -> None:
        super().__init__()
        self._subject = subject
        self._adapters = adapters

    def __missing__(self, name: str) -> Any:
        try:
            value = getattr(self._subject, name)
        except AttributeError:
            raise KeyError(name) from None
        return _adapt(value, self._adapters)


class _Named(dict[str, Any]):
    """Values by the names of columns, whose case does not matter, as in the row that they may come from."""

    def __missing__(self, name: str) -> Any:
        for known, value in self.items():
            if known.lower() == name.lower():
                return value
        raise KeyError(name)


def bind(params: Any, sql: str, adapters: Adapters = NONE) -> Any:
    """Parameters in a form that `sqlite3` binds: a sequence, a mapping, or an object with attributes.

    What is both (a NamedTuple, a `Row`) is taken as the placeholders of `sql` ask: by name, or by position.

    Raises:
        TypeError: They are none of these, or a value is of no use.
    """
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    # Loops: for a handful of values they take less time than `_is_native` does to begin.
    if kind is dict:
        for value in params.values():
            if type(value) not in NATIVE:
                return {name: _adapt(value, adapters) for name, value in params.items()}
        return params
    if kind is tuple or kind is list:
        for value in params:
            if type(value) not in NATIVE:
                return [_adapt(value, adapters) for value in params]
        return params
    if params is None:
        return ()
    if isinstance(params, Mapping):
        mapping = cast("Mapping[str, Any]", params)
        return {name: _adapt(value, adapters) for name, value in mapping.items()}
    names = _names(params)
    if names is not None and placeholders(sql):
        return _Named((name, _adapt(value, adapters)) for name, value in zip(names, params, strict=True))
    if isinstance(params, (str, bytes, bytearray, memoryview, set, frozenset, int, float, complex, type)):
        shown = f"{kind.__name__}" if not isinstance(params, type) else f"the class {params.__name__}"
        raise TypeError(
            f"parameters must be a mapping, a sequence or an object with attributes, not {shown};"
            " a single value is written as (value,)"
        )
    if names is not None or isinstance(params, Sequence):
        return [_adapt(value, adapters) for value in cast("Iterable[object]", params)]
    if hasattr(kind, "keys") and hasattr(
        kind, "__getitem__"
    ):  # no mapping by its class, but what `dict()` takes for one
        found: Any = params  # its attributes are others: a pandas Series has a `name`, whatever its labels are
        return {name: _adapt(found[name], adapters) for name in found.keys()}  # noqa: SIM118  - it may iterate over values
    return _Attributes(cast("object", params), adapters)


def _names(params: Any) -> Sequence[str] | None:
    """The names of the values, where they have both names and an order."""
    if isinstance(params, (sqlite3.Row, _RowMethods)):
        return params.keys()
    # SQLAlchemy's rows are no tuples, but have what a NamedTuple has.
    names: Any = getattr(cast("Any", params), "_fields", None) if isinstance(params, Sequence) else None
    return cast("tuple[str, ...]", names) if isinstance(names, tuple) else None


MANY = 500
"""Rows that are looked at together."""
FEW = 16
"""Rows whose values have to be converted first, by code of the user's perhaps, between two looks at whether anybody waits."""


class Feed:
    """The rows of `execute_many`, bound as `executemany` asks for them; knows at which it is.

    Rows of a list are looked at in chunks: quicker where whole chunks of them need no attention. What comes from an
    iterator is bound one by one, for a generator may use one object for all its rows; and between two of them, which may
    be long, it is asked whether anybody still waits.
    """

    __slots__ = ("_adapters", "_before", "_chunk", "_gone", "_last", "_rows", "_size", "_sql", "raised")

    def __init__(self, rows: Any, sql: str, gone: Callable[[], bool], adapters: Adapters = NONE) -> None:
        self._rows = rows
        self._adapters = adapters
        self._sql = sql
        self._gone = gone
        self._before = 0
        self._chunk: Iterator[Any] = iter(())
        self._size = 0
        self._last: Any = None
        self.raised: BaseException | None = None
        """What the caller's own iterator raised."""

    def __iter__(self) -> Iterator[Any]:
        if type(self._rows) is list or type(self._rows) is tuple:
            return chain.from_iterable(self._chunks())
        return self._one_by_one()

    @property
    def number(self) -> int:
        """The row that was asked for last, counted from 1."""
        return self._before + self._size - length_hint(self._chunk)

    def row(self) -> Any:
        """What was asked for last, as it was given."""
        return self._rows[self.number - 1] if self._size else self._last

    def _chunks(self) -> Iterator[Iterable[Any]]:
        sql = self._sql
        rows: Iterator[Any] = iter(self._rows)
        while chunk := list(islice(rows, MANY)):
            if self._gone():
                raise _interrupted()
            self._before += self._size
            self._size = len(chunk)
            self._chunk = iter(chunk)
            kinds = set(map(type, chunk))
            values: Iterable[Any] | None = None
            if kinds <= _SEQUENCES:
                values = chain.from_iterable(chunk)
            elif kinds == _DICTS:
                values = chain.from_iterable(map(_values_of, chunk))
            if values is not None and _is_native(map(type, values)):
                yield self._chunk
                continue
            for _ in range(0, len(chunk), FEW):
                if self._gone():
                    raise _interrupted()
                yield map(bind, islice(self._chunk, FEW), repeat(sql), repeat(self._adapters))

    def _one_by_one(self) -> Iterator[Any]:
        sql, gone = self._sql, self._gone
        try:
            rows = iter(self._rows)
        except BaseException as error:
            self.raised = error
            raise
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except BaseException as error:
                self.raised = error
                raise
            if gone():
                raise _interrupted()
            self._before += 1
            self._last = row
            yield bind(row, sql, self._adapters)


def _interrupted() -> sqlite3.OperationalError:
    """What SQLite says, had it been asked while a statement ran."""
    error = sqlite3.OperationalError("interrupted")
    error.sqlite_errorcode = sqlite3.SQLITE_INTERRUPT
    error.sqlite_errorname = "SQLITE_INTERRUPT"
    return error


_SEQUENCES: set[type] = {tuple, list}
_DICTS: set[type] = {dict}
_values_of: Callable[[Any], Iterable[Any]] = dict.values  # pyright: ignore
