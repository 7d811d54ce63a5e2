"""Rows out of PostgreSQL, parameters into it."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from typing import Any, ClassVar, cast
from uuid import UUID

from psycopg.types.numeric import Int2

from database.engine.adapting import NATIVE, NONE, Adapters, adapted
from database.engine.rows import table
from database.postgresql.plan import Plan

__all__ = ["BindError", "Row", "bind", "coerced", "coercion", "is_plain", "row_class"]


class BindError(TypeError):
    """The parameters do not fit the statement."""


class Row(tuple[Any, ...]):
    """A row: a sequence of values that also knows their names.

    `row[0]`, `row["name"]` (case does not matter), `row[1:3]`, `len(row)`, `dict(row)`, `Entity(**row)`, and iteration
    over the values.
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[dict[str, int]] = {}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            position = self.positions.get(key)
            if position is None:
                position = self.positions.get(key.lower())
                if position is None:
                    raise IndexError(f"no column is named {key!r}; there are {', '.join(self.names)}")
            key = position
        return super().__getitem__(key)

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{name}={value!r}' for name, value in zip(self.names, self, strict=True))})"

    def _repr_html_(self) -> str:
        return table(self.names, [self])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Row):
            return self.names == other.names and super().__eq__(other)
        return super().__eq__(other)

    def __hash__(self) -> int:
        return super().__hash__()

    def keys(self) -> list[str]:
        """The columns' names in order."""
        return list(self.names)

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
        return dict(zip(self.names, self, strict=True)).items()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.names, tuple(self))


def _unpickled(names: tuple[str, ...], values: tuple[Any, ...]) -> Row:
    return row_class(names)(values)


@lru_cache(maxsize=2000)
def row_class(names: tuple[str, ...]) -> type[Row]:
    """The class of rows with these columns; of columns with one name, the first is found by it."""
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        positions.setdefault(name, position)
    for position, name in enumerate(names):
        positions.setdefault(name.lower(), position)
    return type("Row", (Row,), {"__slots__": (), "names": names, "positions": positions})


_PLAIN = frozenset({int, float, str, bytes, type(None), bool, datetime})
is_plain = _PLAIN.issuperset
"""Whether all of these types are such that psycopg knows them, and their values never change."""


def _adapt(value: Any, adapters: Adapters = NONE) -> Any:
    """What the user says how to store, what psycopg has no adapter for, or would adapt otherwise than on SQLite."""
    if adapters and type(value) not in NATIVE:
        made = adapted(value, adapters)
        if made is not None:
            return _adapt(made[0])  # as the package itself does it, so that no two functions call one another for ever
    if isinstance(value, Enum):
        return _adapt(value.value, adapters)
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__name__ in (
        "NaTType",
        "NAType",
        "MaskedConstant",
    ):  # pandas has not been imported here, and need not be
        return None
    return value


def bind(plan: Plan, params: Any, adapters: Adapters = NONE) -> Sequence[Any]:
    """The values of a plan's parameters, in order: from a sequence, a mapping, or an object with attributes.

    Raises:
        BindError: They are none of these, not as many as there are placeholders, or one that is named is missing.
    """
    names = plan.names
    values: Sequence[Any]
    if names is not None:
        values = _named(names, params)
    else:
        kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
        if kind is tuple or kind is list:
            values = params
        elif params is None:
            values = ()
        elif isinstance(params, Mapping) or _no_parameters(params):
            if plan.count:
                raise (
                    _unfit(params)
                    if not isinstance(params, Mapping)
                    else BindError("positional placeholders take a sequence of values, not a mapping")
                )
            if not isinstance(params, Mapping):
                raise _unfit(params)
            values = ()
        elif isinstance(params, Sequence) or _is_row(params):
            values = list(cast("Iterable[Any]", params))
        elif plan.count == 0:
            values = ()
        else:
            raise BindError("positional placeholders take a sequence of values, not an object")
        if len(values) != plan.count:
            raise BindError(f"the statement has {plan.count} placeholders, and {len(values)} values were given")
    if not adapters and is_plain(map(type, values)):
        return values
    return [_adapt(value, adapters) for value in values]


def _is_row(params: Any) -> bool:
    """A row of another engine's: no mapping by its class, but one by what it can."""
    return hasattr(params, "keys") and hasattr(params, "__getitem__")


def _no_parameters(params: Any) -> bool:
    return isinstance(params, (str, bytes, bytearray, memoryview, set, frozenset, int, float, complex, type))


def _named(names: tuple[str, ...], params: Any) -> list[Any]:
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    if kind is dict or isinstance(params, (Mapping, Row)):
        try:
            return [params[name] for name in names]
        except LookupError:
            missing = [name for name in names if name not in params.keys()]  # noqa: SIM118  - a row has no `in` for names
            raise BindError(f"no value was given for {', '.join(f':{name}' for name in missing)}") from None
    if params is None:
        raise BindError(f"no value was given for {', '.join(f':{name}' for name in names)}")
    if _no_parameters(params):
        raise _unfit(params)
    if hasattr(params, "_fields"):  # a named tuple: what the SQL asks for counts
        return _attributes(names, params)
    if _is_row(params):
        return _named(names, dict(params))
    if isinstance(params, Sequence):  # as on SQLite: named placeholders take a sequence in the order of their names
        values = list(cast("Iterable[Any]", params))
        if len(values) != len(names):
            raise BindError(f"the statement has {len(names)} placeholders, and {len(values)} values were given")
        return values
    return _attributes(names, params)


def _attributes(names: tuple[str, ...], params: Any) -> list[Any]:
    try:  # once each: a property may do something
        return [getattr(params, name) for name in names]
    except AttributeError as error:
        if error.obj is not params or error.name not in names:
            raise  # out of a property of the user's
        raise BindError(f"no value was given for :{error.name}") from None


def _unfit(params: Any) -> BindError:
    shown = f"the class {params.__name__}" if isinstance(params, type) else type(params).__name__
    return BindError(
        f"parameters must be a mapping, a sequence or an object with attributes, not {shown};"
        " a single value is written as (value,)"
    )


# Where a parameter's type does not fit: SQLite stores anything anywhere, and code that comes from there relies on it.

_SMALL = 21
_INTEGERS = frozenset({20, 23})
_NUMBERS = frozenset({700, 701, 1700})
_TEXTS = frozenset({25, 1042, 1043, 19, 18})
_BOOLEAN = 16


def _as_text(value: Any) -> Any:
    """Only what has one way to be written; anything else is left to the server, which refuses it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, (date, time_of_day)):
        return value.isoformat()
    if isinstance(value, (int, float, Decimal, UUID)):
        return str(value)
    return value


def _as_integer(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _as_small_integer(value: Any) -> Any:
    value = _as_integer(value)
    return Int2(value) if type(value) is int and -32768 <= value <= 32767 else value


def _as_boolean(value: Any) -> Any:
    return bool(value) if isinstance(value, int) else value


def coercion(oid: int) -> Callable[[Any], Any] | None:
    """How a value becomes one of the type that the server wants; None where it is left as it is."""
    if oid in _TEXTS:
        return _as_text
    if oid == _SMALL:
        return _as_small_integer
    if oid in _INTEGERS or oid in _NUMBERS:
        return _as_integer
    if oid == _BOOLEAN:
        return _as_boolean
    return None


def coerced(values: Sequence[Any], known: Any) -> Sequence[Any]:
    """The values after `coercion`, where there is one for each."""
    if known is None:
        return values
    return [value if convert is None else convert(value) for value, convert in zip(values, known, strict=True)]
