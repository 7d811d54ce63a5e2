"""How types of the user's are stored: the functions that `db.adapt` was given.

They are the user's own code, so what one raises goes to the caller as it was raised. It comes out of the middle of binding,
through C code which makes something else of it: so it is remembered here until the connection translates the error. That
happens on the thread on which the function ran, hence one memory for each thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from threading import local
from typing import Any

__all__ = ["AS_IS", "BUFFERS", "NATIVE", "NONE", "PLAIN", "Adapters", "adapted", "taken"]

Adapters = Mapping[type, Callable[[Any], Any]]
"""The functions by the types that they take. It may grow meanwhile."""

NONE: Adapters = {}

NATIVE = frozenset({int, float, str, bytes, type(None), bool, bytearray})
"""What is stored as it is, and for which there can be no function."""

PLAIN = NATIVE - {bytearray}
"""Of these, those whose value nobody can change meanwhile."""

BUFFERS = (bytearray, memoryview, array)
"""Stored as their bytes, which may be others later."""


class _AsIs:
    def __repr__(self) -> str:
        return "AS_IS"


AS_IS = _AsIs()
"""In the place of a request's `extra`: its parameters (a tuple, a dict, None) hold plain values and are bound as they are,
and nothing of the user's has to be called for it."""


class _Raised(local):
    error: BaseException | None = None


_raised = _Raised()


def adapted(value: Any, adapters: Adapters) -> tuple[Any] | None:
    """What the function for the value's type, or for the nearest of those that it inherits from, makes of it.

    In a tuple, for None is a value; None where there is no function.
    """
    for each in type(value).__mro__:
        function = adapters.get(each)
        if function is not None:
            try:
                return (function(value),)
            except Exception as error:
                _raised.error = error
                raise
    return None


def taken() -> BaseException | None:
    """What a function has just raised on this thread; it is forgotten then."""
    error = _raised.error
    if error is not None:
        _raised.error = None
    return error
