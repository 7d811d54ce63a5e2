"""Where `load_queries()` and the engine find aiosql's adapter for PostgreSQL; its import costs what a connection does."""

from __future__ import annotations

from typing import Any, cast

__all__ = ["adapter"]


def adapter() -> Any:
    """Makes aiosql's synchronous adapter."""
    from aiosql.adapters.pyformat import PyFormatAdapter  # noqa: PLC0415  - only those who use query files pay for it

    return cast("Any", PyFormatAdapter)()
