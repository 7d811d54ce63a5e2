"""Rows as records: instances of a `record_class`, whose fields get back what they were stored from.

What is known of a class is found out once, and kept: which of its fields are annotated with a type that a database stores as
something else (`datetime`, `date`, `time`, `Decimal`, `UUID`, an Enum, `bool`, a path, or an Optional of these). A class that
has none of them is made as ever, and pays nothing. Any thread may ask: at worst two find the same out at once.

A class that converts by itself is left to do so: pydantic's models and dataclasses, attrs fields that have a converter.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from time import perf_counter
from types import FunctionType, MemberDescriptorType, NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, cast, get_args, get_origin
from uuid import UUID

from database.engine.contract import Interrupted
from database.engine.statement import Statement
from database.errors import QueryExecutionError

__all__ = ["FIRST", "in_pieces", "is_generated", "of_statement", "records"]

Converter = Callable[[Any], Any]


class Misfit(QueryExecutionError):
    """A value does not fit the field that it is for."""

    outcome = "done"


def records(names: Sequence[str], rows: Iterable[Any], record_class: Any, *, before: int = 0) -> list[Any]:
    """One record for each row.

    Args:
        names: The columns'.
        rows: Their values.
        record_class: The class, or a function that takes the columns by their names.
        before: How many rows of this result have been made already, for messages.

    Raises:
        QueryExecutionError: A value does not fit the field that it is for; the error names column and row, not the value.
    """
    try:
        fields = _fields(record_class)
    except TypeError:  # it has no hash
        fields = _read(record_class)
    if not fields:
        return [record_class(**dict(zip(names, row, strict=True))) for row in rows]
    plan = [(position, *fields[name]) for position, name in enumerate(names) if name in fields]
    made: list[Any] = []
    for number, row in enumerate(rows, before + 1):
        values = list(row)
        for position, convert, expected in plan:
            value = values[position]
            if value is not None:
                try:
                    values[position] = convert(value)
                    continue
                except (ValueError, TypeError, ArithmeticError, LookupError):
                    pass  # outside of the clause, for the error would hold the value
                raise Misfit(
                    f"column {names[position]!r} of row {number} does not fit the field of {_name(record_class)}: it is"
                    f" annotated {expected}, and a value of type {type(value).__name__} is stored that makes none"
                )
        made.append(record_class(**dict(zip(names, values, strict=True))))
    return made


FIRST = 16
"""Records that are made before it is looked whether anybody still waits for them; then twice as many."""
SLOW = 0.005
"""Seconds after which it is only that many again."""


def in_pieces(make: Callable[[list[Any], int], list[Any]], rows: list[Any], gone: Callable[[], bool]) -> list[Any]:
    """Makes records of many rows: a class of the user's may take its time for each.

    Args:
        make: Makes records of some of them; is told how many come before these.
        rows: All of them.
        gone: Whether nobody waits any more.

    Raises:
        Interrupted: So it is.
    """
    made: list[Any] = []
    size, begun = FIRST, 0
    while True:
        began = perf_counter()
        made += make(rows[begun : begun + size], begun)
        begun += size
        if begun >= len(rows):
            return made
        size = FIRST if perf_counter() - began > SLOW else size * 2
        if gone():
            raise Interrupted


def is_generated(record_class: Any) -> bool:
    """Whether to make a record is to run nothing that its author has written: a NamedTuple, or a dataclass as it comes."""
    try:
        return _is_generated(record_class)
    except TypeError:  # it has no hash
        return False


@lru_cache(maxsize=1000)
def _is_generated(record_class: Any) -> bool:
    if type(record_class) is not type:  # no class, or one with a metaclass
        return False
    is_tuple = issubclass(record_class, tuple)
    kind = cast("Any", record_class)
    if is_tuple:
        return kind.__bases__ == (tuple,) and kind.__init__ is object.__init__ and _is_made(kind.__new__)
    parameters = kind.__dict__.get("__dataclass_params__")
    if parameters is None or kind.__new__ is not object.__new__ or hasattr(kind, "__post_init__"):
        return False
    if not _is_made(kind.__dict__.get("__init__")) or not (
        kind.__setattr__ is object.__setattr__ or (parameters.frozen and _is_made(kind.__setattr__))
    ):
        return False
    return all(
        each.default_factory is dataclasses.MISSING
        and type(inspect.getattr_static(kind, each.name, None)) in (MemberDescriptorType, type(each.default), NoneType)
        and not hasattr(each.default, "__set__")
        for each in dataclasses.fields(kind)
    )


def _is_made(function: Any) -> bool:
    """Whether a function's text stands in no file."""
    return isinstance(function, FunctionType) and function.__code__.co_filename.startswith("<")


def of_statement(error: BaseException, sql: Any, parameters: Any) -> BaseException:
    """The same error; where it is this module's, with the statement whose rows were made."""
    if isinstance(error, Misfit) and error.sql is None and isinstance(sql, Statement):
        error.sql, error.parameters = sql.sql, parameters
    return error


def _name(record_class: Any) -> str:
    return getattr(record_class, "__qualname__", type(record_class).__qualname__)


@lru_cache(maxsize=1000)
def _fields(record_class: Any) -> Mapping[str, tuple[Converter, str]]:
    return _read(record_class)


def _read(record_class: Any) -> Mapping[str, tuple[Converter, str]]:
    """The fields that need a converter, by the name under which the class takes them."""
    if not inspect.isclass(record_class) or hasattr(record_class, "__pydantic_validator__"):
        return {}
    found: dict[str, tuple[Converter, str]] = {}
    for name, attribute in _taken(record_class):
        annotation = _annotation(record_class, attribute)
        wanted = _wanted(annotation)
        converter = None if wanted is None else _converter(wanted)
        if wanted is not None and converter is not None:
            found[name] = converter, wanted.__name__
    return found


def _taken(kind: Any) -> list[tuple[str, str]]:
    """What the class is made from: the name of each parameter, and that of the attribute which is annotated."""
    names = cast("tuple[str, ...] | None", getattr(kind, "_fields", None))
    if issubclass(kind, tuple) and isinstance(names, tuple):
        return [(name, name) for name in names]
    if (attributes := kind.__dict__.get("__attrs_attrs__")) is not None:
        return [
            (getattr(each, "alias", None) or each.name.lstrip("_"), each.name)
            for each in attributes
            if each.init and each.converter is None
        ]
    parameters = kind.__dict__.get("__dataclass_params__")
    if parameters is not None and parameters.init:
        return [(each.name, each.name) for each in dataclasses.fields(cast("Any", kind)) if each.init]
    return []


def _annotation(kind: type[Any], name: str) -> Any:
    """The annotation of one field; None where it cannot be told, as with a name that only type checkers import."""
    for each in kind.__mro__:
        try:
            annotations = inspect.get_annotations(each)
            if name in annotations:
                found = annotations[name]
                if isinstance(found, typing.ForwardRef):  # as in a NamedTuple
                    found = found.__forward_arg__
                if not isinstance(found, str):
                    return found
                holder = type("_", (), {"__annotations__": {"it": found}, "__module__": each.__module__})
                return typing.get_type_hints(holder, localns=dict(vars(each)), include_extras=True)["it"]
        except Exception:  # whatever evaluating a stranger's annotation raises
            return None
    return None


def _wanted(annotation: Any) -> type[Any] | None:
    """The class that a field is annotated with, be it optional."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):  # typing.NewType
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__"):  # `type X = …`
            annotation = annotation.__value__
        elif get_origin(annotation) in (Union, UnionType):
            others = [each for each in get_args(annotation) if each is not NoneType]
            if len(others) != 1:
                return None
            annotation = others[0]
        elif get_origin(annotation) is ClassVar or isinstance(annotation, dataclasses.InitVar):
            return None
        else:
            return annotation if inspect.isclass(annotation) else None


def _converter(wanted: type[Any]) -> Converter | None:
    if issubclass(wanted, Enum):
        return _enum(wanted)
    if wanted is bool:
        return _boolean
    if wanted in (datetime, date, time):
        return _moment(wanted)
    if wanted is Decimal:
        return _decimal
    if wanted is UUID:
        return _uuid
    if issubclass(wanted, PurePath):
        return _path(wanted)
    return None


def _boolean(value: Any) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, int) and 0 <= value <= 1:
        return value == 1
    raise ValueError


def _moment(wanted: type[Any]) -> Converter:
    read: Callable[[str], Any] = wanted.fromisoformat

    def convert(value: Any) -> Any:
        # A datetime is a date to Python, but not to who wrote `date`.
        return value if type(value) is wanted or (isinstance(value, wanted) and wanted is not date) else read(value)

    return convert


def _decimal(value: Any) -> Decimal:
    # A number of a NUMERIC column: SQLite keeps it as a float, of which the shortest text is what was stored.
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def _uuid(value: Any) -> UUID:
    if isinstance(value, UUID):
        return value
    return UUID(bytes=value) if isinstance(value, bytes) else UUID(value)


def _path(wanted: type[Any]) -> Converter:
    def convert(value: Any) -> Any:
        if isinstance(value, (str, PurePath)):
            return wanted(value)
        raise TypeError

    return convert


def _enum(wanted: type[Enum]) -> Converter:
    def stored(value: Any) -> Any:
        """A member's value as it is stored, where that is not the value itself."""
        if isinstance(value, Enum):
            return stored(value.value)
        if isinstance(value, datetime):
            return value.isoformat(" ")
        if isinstance(value, (date, time)):
            return value.isoformat()
        return str(value) if isinstance(value, (Decimal, UUID, PurePath)) else value

    others = {
        stored(member.value): member
        for member in wanted
        if isinstance(member.value, (Enum, date, time, Decimal, UUID, PurePath))
    }

    def convert(value: Any) -> Any:
        if isinstance(value, wanted):
            return value
        found = others.get(value)
        return wanted(value) if found is None else found

    return convert
