"""A database in one line, under asyncio and trio alike.

The names here are engine-neutral: the configuration says which engine a database is of. `database.sqlite3` offers the
same names bound to SQLite.

They are looked up when they are first used: pytest imports this package in every project that has it, for its plugin.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from database import errors
    from database.session.face import transactional, transactional_readonly
    from database.session.queries import load_queries
    from database.session.registry import close_all, configure, get_db, lifespan

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "close_all",
    "configure",
    "errors",
    "get_db",
    "lifespan",
    "load_queries",
    "transactional",
    "transactional_readonly",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "errors":
        found: Any = import_module("database.errors")
    else:
        module = "database.session.face" if name.startswith("transactional") else "database.session.registry"
        if name == "load_queries":
            module = "database.session.queries"
        found = getattr(import_module(module), name)
    globals()[name] = found  # asked only once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
