"""Which tests `make test` leaves out: those that repeat, on another event loop or engine, what the others have shown.

With `--quick`, a test function runs each of its cases (or itself, where it has none) on every engine it concerns, by turns
on one event loop and the next. It meets both kinds of them, asyncio and trio: asyncio's own loop and uvloop run the same
code of the package, and take turns from one function to the next, so that every kind of behaviour meets each. What is
about the loops themselves (how they wake up, end, cancel) is marked `every_loop`, and meets each in every function. What is
marked `any_loop` is not about event loops but about what a connection, a text or a file does, whichever awaits it: it runs
with one of them, and the tests of a file come by turns. What is marked `slow` is left to `make test-all`, which runs
everything everywhere.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

import pytest

LOOPS = ("anyio_backend", "backend")
"""Parameters that name an event loop: of a fixture, or of a test that starts a program."""


def _coordinates(item: pytest.Item) -> tuple[str, str, str]:
    """The case, the engine and the event loop of a test."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return "", "", ""
    params: dict[str, Any] = callspec.params
    engine = str(params.get("engine", ""))
    loop = next((_loop(params[name]) for name in LOOPS if name in params), "")
    case = f"-{callspec.id}-".replace(f"-{loop}-", "-", 1).replace(f"-{engine}-", "-", 1)
    return case, engine, loop


def _loop(param: Any) -> str:
    """The id of an event loop: `asyncio+uvloop` is AnyIO's ("asyncio", {"use_uvloop": True}), or the option of a command."""
    if isinstance(param, list):
        return f"{param[1]}+uvloop" if "--uvloop" in param else str(param[1])
    if isinstance(param, tuple):
        name, options = param
        return f"{name}+uvloop" if isinstance(options, dict) and options.get("use_uvloop") else str(name)
    return str(param)


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def repetitions(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items that `--quick` leaves out."""
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[_function(item)].append(item)
    out: list[pytest.Item] = []
    for name, group in functions.items():
        kept = _covering(group, zlib.crc32(name.encode()))  # so that not all begin with the same event loop
        out += [item for item in group if item not in kept]
    return out


def _covering(group: list[pytest.Item], turn: int) -> set[pytest.Item]:
    """Items of one function that hold every case with every engine, and every kind of event loop."""
    places: dict[tuple[str, str], list[tuple[str, pytest.Item]]] = defaultdict(list)
    for item in group:
        if item.get_closest_marker("slow") is None:
            case, engine, loop = _coordinates(item)
            places[case, engine].append((loop, item))
    kept: set[pytest.Item] = set()
    met: set[str] = set()
    for number, choices in enumerate(places.values()):
        loop, item = choices[(turn + number) % len(choices)]
        kept.add(item)
        met.add(loop)
    if any(item.get_closest_marker("any_loop") for item in kept):
        return kept
    every = any(item.get_closest_marker("every_loop") for item in kept)

    def new(loop: str) -> bool:
        return loop not in met and (every or not any(_kind(loop) == _kind(other) for other in met))

    for choices in places.values():  # the first engine's come first
        at = turn % len(choices)
        for loop, item in choices[at:] + choices[:at]:
            if new(loop):
                met.add(loop)
                kept.add(item)
    return kept


def _kind(loop: str) -> str:
    """Of which kind an event loop is."""
    return loop.partition("+")[0]
