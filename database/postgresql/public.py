"""The public functions of this engine: the engine-neutral ones, bound to its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from database import queries, registry
from database.decorators import make_decorator
from database.handle import Database
from database.postgresql.adapter import adapter
from database.queries import LoadedQueries

__all__ = ["get_db", "lifespan", "load_queries", "transactional", "transactional_readonly"]

ENGINE = "postgresql"


def get_db(name: str = "default") -> Database:
    """The database of that name: always the same object. Cheap, and callable at module level.

    Args:
        name: Its name in the configuration; `"default"` is the one that stands directly below `postgresql:`.
    """
    return registry.get_db(name, ENGINE)


def lifespan(app: object = None) -> AbstractAsyncContextManager[None]:
    """Opens all configured PostgreSQL databases, and closes all databases at the end.

    Args:
        app: Ignored; Starlette, FastAPI and Litestar give it when this serves as their `lifespan=`.
    """
    return registry.lifespan(app, ENGINE)


def load_queries(path: str | os.PathLike[str], record_classes: Mapping[str, Any] | None = None) -> LoadedQueries:
    """Loads an aiosql file, or a folder of them, with all operators (`^ $ ! <! *! #` and none).

    Args:
        path: The file or folder.
        record_classes: Classes by the names that `-- record_class:` comments give.

    Returns:
        aiosql's `Queries`. Type checkers take every name for a query of it; `python -m database.stubs` tells them more.

    Raises:
        ConfigurationError: It cannot be read, or aiosql cannot parse it.
    """
    return queries.load(path, adapter, record_classes)


transactional = make_decorator(get_db, readonly=False)
transactional_readonly = make_decorator(get_db, readonly=True)
