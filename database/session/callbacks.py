"""What was handed to `on_commit`: run on the loop's thread behind the commit, all of it, outside the transaction."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

__all__ = ["Callback", "run_callbacks"]

Callback = Callable[[], Any]


async def run_callbacks(callbacks: list[Callback]) -> None:
    """Runs all of them, whatever becomes of one; then raises the first error, one that is no `Exception` before others.

    A cancellation strikes the one that is running. Those behind it are not cancelled any more.
    """
    failure: BaseException | None = None
    # Cancelled a moment ago, when the commit could not be stopped any more: that is not meant for what runs behind it.
    shield = anyio.CancelScope(shield=anyio.current_effective_deadline() == -math.inf)
    with shield:
        for callback in callbacks:
            try:
                result = callback()
                if isinstance(result, Awaitable):
                    await result
            except BaseException as error:
                if isinstance(error, GeneratorExit):  # nothing can be awaited any more
                    raise
                if failure is None or (isinstance(failure, Exception) and not isinstance(error, Exception)):
                    failure = error
                if not isinstance(error, Exception):
                    shield.shield = True
    if failure is not None:
        if isinstance(failure, Exception):
            failure.add_note("raised by a function given to on_commit(); the transaction itself has been committed")
        raise failure
