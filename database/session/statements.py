"""What may be asked for: SQL text, or a query function of a file. Each is analysed once, and held against the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from copy import copy
from functools import lru_cache
from typing import Any, Final, Protocol, TypeVar, cast

from database.engine.adapting import BUFFERS, PLAIN
from database.engine.contract import Engine
from database.engine.statement import CONTROL, WRITES, Statement
from database.errors import QueryExecutionError

__all__ = ["Query", "Statements", "TypedQuery", "check_operation", "still"]

T_co = TypeVar("T_co", covariant=True)

Query = str | Callable[..., Any]
"""SQL text, or a query function of `load_queries()`."""

_LIMIT = 5000
"""Statements whose analysis is remembered; a program that sends more different texts starts anew."""
_CHARACTERS = 4_000_000
"""The same for what they hold: some programs put their data into the text."""


class Statements(dict[Any, Statement]):
    """A database's statements by their query, as far as they have been analysed: `known.get(q) or known.learn(q)`."""

    __slots__ = ("_characters", "_engine")

    def __init__(self, engine: Callable[[], Engine]) -> None:
        super().__init__()
        self._engine = engine
        self._characters = 0

    def learn(self, query: Query) -> Statement:
        """Analyses a statement the first time it is seen.

        Raises:
            QueryExecutionError: It is empty, or no statement.
        """
        engine = self._engine()
        sql = query if isinstance(query, str) else getattr(query, "sql", None)
        if not isinstance(sql, str):
            raise QueryExecutionError(
                f"a query is SQL text or a query function of load_queries(), not {type(query).__name__}"
            )
        statement = engine.analyse(sql)
        if not statement.verb:
            raise QueryExecutionError("the statement is empty", sql=sql)
        self._characters += len(sql)
        if len(self) >= _LIMIT or self._characters > _CHARACTERS:
            self.clear()
            self._characters = len(sql)
        self[query] = statement
        return statement

    def with_rows(self, method: str, query: Query) -> Statement:
        """The statement, if it gives rows.

        Raises:
            QueryExecutionError: It does not; nothing is executed.
        """
        statement = self.get(query) or self.learn(query)
        if not statement.returns_rows:
            raise self.unfit(method, statement)
        return statement

    def for_many(self, query: Query) -> Statement:
        """The statement, if it may be executed once for every row of parameters.

        Raises:
            QueryExecutionError: It may not.
        """
        statement = self.get(query) or self.learn(query)
        if type(query) is not str:
            check_operation("execute_many", query)
        if statement.kind not in WRITES or statement.returns_rows:
            if statement.kind == CONTROL:
                raise self.unfit("execute_many", statement)
            raise QueryExecutionError(
                "execute_many() takes an INSERT, UPDATE or DELETE without RETURNING; nothing was executed",
                sql=statement.sql,
            )
        return statement

    def for_batch(self, query: Query) -> Statement:
        """The statement, if it may stand in a batch.

        Raises:
            QueryExecutionError: It may not.
        """
        statement = self.get(query) or self.learn(query)
        if statement.kind == CONTROL:
            raise self.unfit("batch.execute", statement)
        if statement.kind not in WRITES:
            raise QueryExecutionError(
                f"a batch takes INSERT, UPDATE and DELETE, not {statement.verb}; nothing was executed",
                sql=statement.sql,
            )
        return statement

    def unfit(self, method: str, statement: Statement) -> BaseException:
        """Why a method does not take a statement that controls the transaction, or that gives no rows."""
        if statement.kind == CONTROL:
            return self._engine().control_error(statement.verb)
        return QueryExecutionError(
            f"{method}() needs a statement that returns rows, and this {statement.verb} does not: use execute()"
            f"{', or add a RETURNING clause' if statement.kind in WRITES else ''}; nothing was executed",
            sql=statement.sql,
        )


_READING: Final = frozenset({"SELECT", "SELECT_ONE", "SELECT_VALUE", "INSERT_RETURNING"})
_WRITING: Final = frozenset({"INSERT_RETURNING", "INSERT_UPDATE_DELETE", "INSERT_UPDATE_DELETE_MANY"})
_OPERATIONS: Final = {
    "execute": _WRITING,
    "execute_many": _WRITING,
    "fetch_one": _READING,
    "fetch_all": _READING,
    "fetch_value": _READING,
}
"""What aiosql calls the operators of the queries that a method takes."""
_METHODS: Final = {
    "INSERT_RETURNING": "execute()",
    "INSERT_UPDATE_DELETE": "execute()",
    "INSERT_UPDATE_DELETE_MANY": "execute_many()",
    "SCRIPT": "execute_script()",
    "SELECT": "fetch_all()",
    "SELECT_ONE": "fetch_one()",
    "SELECT_VALUE": "fetch_value()",
}


def check_operation(method: str, query: Any) -> Callable[..., Any] | None:
    """Holds the operator of an aiosql query against the method; gives its record class.

    Raises:
        QueryExecutionError: They do not go together.
    """
    operation = getattr(query, "operation", None)
    name = getattr(operation, "name", "SELECT")
    if name not in _OPERATIONS[method]:
        raise QueryExecutionError(
            f"{method}() does not fit the query {getattr(query, '__name__', '?')!r}, which is declared as"
            f" {name.lower().replace('_', ' ')}: use {_METHODS.get(name, 'another method')}; nothing was executed",
            sql=getattr(query, "sql", None),
        )
    return getattr(query, "record_class", None)


_CHANGING: Final = frozenset({*BUFFERS, list, dict, set})
_fixed: Final = _CHANGING.isdisjoint  # a tenth of a microsecond for every statement
"""Values whose contents may be others by the time they are bound; which is when something is made of a list (`db.adapt`)."""
_are_plain: Final = PLAIN.issuperset

_UNTOUCHED: Final[tuple[type[Any], ...]] = (str, bytes, bytearray, memoryview, Set, type)
"""Refused when it is bound."""


def still(params: Any) -> Any:
    """Parameters as they are now: their owner may go on to change the object, and a worker binds them later.

    What holds them is copied; of the values, buffers and containers are. Other values that change are nobody's parameters.
    """
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    if kind is tuple:
        return params if _fixed(map(type, params)) else [_still(value) for value in params]
    if kind is dict:
        if _fixed(map(type, params.values())):
            return params.copy()
        return {name: _still(value) for name, value in params.items()}
    if kind is list:
        return params.copy() if _fixed(map(type, params)) else [_still(value) for value in params]
    if params is None:
        return None
    return _still_object(params)


def _still(value: Any) -> Any:
    try:
        return _copied(value)
    except RecursionError:  # a circle, or nested too deeply: whoever converts it will say so
        return value


def _copied(value: Any) -> Any:
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind in PLAIN:
        return value
    if kind is list:
        return value.copy() if _are_plain(map(type, value)) else [_copied(each) for each in value]
    if kind is dict:
        return (
            value.copy() if _are_plain(map(type, value.values())) else {n: _copied(each) for n, each in value.items()}
        )
    if kind is set:
        return value.copy()
    return bytes(cast("Any", value)) if isinstance(value, BUFFERS) else value


def _still_object(params: Any) -> Any:
    """The same for what is no plain container: an object with attributes, a mapping or a sequence of some class."""
    kind: type[Any] = type(params)  # pyright: ignore[reportUnknownVariableType]
    held: Any = cast("object", params)
    if isinstance(held, Mapping):
        return {name: _still(value) for name, value in cast("Mapping[str, Any]", held).items()}
    if isinstance(held, _UNTOUCHED):
        return cast("object", held)
    try:
        if isinstance(held, Sequence):
            values: Any = cast("object", held)
            if hasattr(kind, "keys") or hasattr(kind, "_fields"):  # it has names, which belong to its class
                if not issubclass(kind, tuple) or _fixed(map(type, values)):
                    return values  # a row, which never changes
                return cast("Any", tuple).__new__(kind, map(_still, values))
            return [_still(value) for value in values]
        copied = False
        try:
            found: Any = object.__new__(kind)  # takes a quarter of the time that `copy` does
        except TypeError:  # a class of C's
            found, copied = copy(held), True
        attributes: dict[str, Any] | None = getattr(held, "__dict__", None)
        if attributes is not None:
            if _fixed(map(type, attributes.values())):
                found.__dict__.update(attributes)
            else:
                found.__dict__.update((name, _still(value)) for name, value in attributes.items())
        for name in _slots(cast("Any", kind)):
            try:
                value = getattr(held, name)
            except AttributeError:  # it has none
                continue
            if type(value) in _CHANGING:
                value = _still(value)
            elif copied:
                continue
            (setattr if copied else object.__setattr__)(found, name, value)  # the latter, of a frozen class, too
        return found
    except Exception:  # a class that makes its objects in its own way: bound as it will be
        return cast("object", held)


@lru_cache(maxsize=1000)
def _slots(kind: type[Any]) -> tuple[str, ...]:
    """The attributes of a class's objects that are not in their `__dict__`."""
    found: list[str] = []
    for each in kind.__mro__:
        names: Any = vars(each).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name[:2] == "__" and name[-2:] != "__":
                found.append(f"_{each.__name__.lstrip('_')}{name}")
            elif name not in ("__dict__", "__weakref__"):
                found.append(name)
    return tuple(found)


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
