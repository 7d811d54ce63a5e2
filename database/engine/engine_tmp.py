"""What the engine-neutral part needs to know of an engine, and where it finds it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from database.driver.backend import Backend
from database.statements import Statement

__all__ = ["Engine", "load"]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's side of the bargain.

    Attributes:
        name: The package below `database`.
        analyse: Analyses SQL text.
        control_error: The error for BEGIN, COMMIT and the like sent as SQL text, by their verb.
        operations: The session class; its methods `execute`, `fetch_all`, … are what requests run.
        backend: Makes the driver's backend from a database's settings.
        adapter: aiosql's synchronous adapter for this engine.
        single_writer: Whether two write transactions on one database can only wait for each other.
        replica_backend: Makes the backend of the database's replicas; None (or it gives None) where there are none.
    """

    name: str
    analyse: Callable[[str], Statement]
    control_error: Callable[[str], BaseException]
    operations: Any
    backend: Callable[[Any], Backend]
    adapter: Any
    single_writer: bool
    replica_backend: Callable[[Any], Backend | None] | None = None


def load(name: str) -> Engine:
    """Imports an engine when it is first needed."""
    return cast("Engine", importlib.import_module(f"database.{name}.engine").ENGINE)
