"""Which waker a loop gets. Trio's is imported only where trio runs."""

from __future__ import annotations

from database.driver.wakeup.waker import Waker, in_trio

__all__ = ["create_waker"]


def create_waker() -> Waker:
    """The waker of the running event loop."""
    if in_trio():
        from database.driver.wakeup.on_trio import TrioWaker  # noqa: PLC0415  - only those who run trio have it

        return TrioWaker()
    from database.driver.wakeup.on_asyncio import AsyncioWaker  # noqa: PLC0415  - nor has trio this

    return AsyncioWaker()
