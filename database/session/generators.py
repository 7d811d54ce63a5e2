"""Async generators that are left: who iterates over one and breaks off is at once back where he was before it.

A generator may hold a transaction over its `yield`; while it is iterated over, its consumer takes part in that. When the
consumer leaves the loop, by `break` or an error, Python closes the generator, but later, in a task of the event loop's
own. What the consumer executes until then would go into a transaction that is about to be rolled back: answered, and lost.

So a level that is begun in an async generator has that watched. The moment nobody refers to the generator any more, its
weak references die, before the event loop is told to close it; then the level ends: see `Level.left`.

What cannot be left in that way is not watched: the generator of an `@asynccontextmanager` is held by the `with` that uses
it. A generator that somebody still refers to may go on, and its consumer stays in what it holds.

Threads. A generator of a loop's tasks is iterated over on the loop's thread; where it is part of a cycle, the collector
finds it on any thread, and `Level.left` is written for that.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import weakref
from types import AsyncGeneratorType, FrameType
from typing import Any, Final, Protocol, TypeAlias

__all__ = ["Generators", "around", "enters", "watch"]

ASYNC_GENERATOR: Final = inspect.CO_ASYNC_GENERATOR
CONTEXTLIB: Final = contextlib.__file__

AnyGenerator: TypeAlias = AsyncGeneratorType[Any, Any]
Generators: TypeAlias = tuple[AnyGenerator, ...]


def enters(frame: FrameType) -> bool:
    """Whether what is begun in this frame may have to be watched: most frames are those of ordinary coroutines."""
    code = frame.f_code
    return bool(code.co_flags & ASYNC_GENERATOR) or code.co_name == "__aenter__" or code.co_filename == CONTEXTLIB


_known: weakref.WeakSet[AnyGenerator] = weakref.WeakSet()
"""Those that have begun something before: they are likely to do so again. A generator belongs to one thread at a time,
and is looked for by the one that runs it."""


def around(frame: FrameType | None, *, outlives: bool = False) -> Generators:
    """The async generators that end, when they are left, what is begun in this frame: its own, and those around it.

    What a context manager begins as it is entered (`__aenter__` of a unit of work, say, or a stack) goes on behind that.

    Args:
        frame: Where it is begun, on the thread that runs it.
        outlives: Whether it may go on when the coroutine of this frame has returned (`begin()`).
    """
    found: list[AnyGenerator] = []
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        flags = code.co_flags
        held = caller is not None and caller.f_code.co_filename == CONTEXTLIB
        if flags & ASYNC_GENERATOR:
            if not held and (generator := _generator(frame)) is not None:
                found.append(generator)
        elif code.co_filename == CONTEXTLIB:
            outlives = outlives or code.co_name == "enter_async_context"
        elif code.co_name in ("__aenter__", "__enter__"):
            outlives = True
        elif not (held and flags & inspect.CO_GENERATOR) and not (outlives and flags & inspect.CO_COROUTINE):
            break
        frame = caller
    return tuple(found)


def _generator(frame: FrameType) -> AnyGenerator | None:
    """The generator that a frame belongs to."""
    known: AnyGenerator | None = getattr(frame, "f_generator", None)  # from Python 3.14 on
    if known is not None:
        return known
    for generator in tuple(_known):
        if generator.ag_frame is frame:
            return generator
    for generation in range(3):  # the youngest first: it has mostly been made a moment ago
        for each in gc.get_objects(generation=generation):
            if type(each) is AsyncGeneratorType and each.ag_frame is frame:
                found: AnyGenerator = each  # pyright: ignore[reportUnknownVariableType]
                _known.add(found)
                return found
    return None


class Held(Protocol):
    """What a generator may hold over its `yield`: a `Level`."""

    watched: tuple[Any, ...]

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        ...

    def left(self) -> None:
        """The generator has been left. Any thread."""
        ...


def watch(level: Held, generators: Generators) -> None:
    """Has the level end when one of the generators is left."""
    held = weakref.ref(level)

    def left(_: weakref.ref[AnyGenerator]) -> None:
        found = held()
        if found is not None and not found.ended:
            found.left()

    level.watched = tuple(weakref.ref(generator, left) for generator in generators)
