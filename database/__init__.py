"""A database in one line, under asyncio and trio alike.

The names here are engine-neutral: the configuration says which engine a database is of. `database.sqlite3` offers the
same names bound to SQLite.
"""

from database import errors
from database.neutral import transactional, transactional_readonly
from database.registry import close_all, configure, get_db, lifespan

__all__ = [
    "close_all",
    "configure",
    "errors",
    "get_db",
    "lifespan",
    "transactional",
    "transactional_readonly",
]
