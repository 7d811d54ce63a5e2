"""PostgreSQL: the public names, bound to this engine.

from database.postgresql import get_db, transactional, transactional_readonly
"""

from database.driver.pool import PoolStats
from database.handle import Database
from database.postgresql.public import get_db, lifespan, load_queries, transactional, transactional_readonly
from database.registry import close_all, configure
from database.statements import Result, Row
from database.transaction import Transaction

__all__ = [
    "Database",
    "PoolStats",
    "Result",
    "Row",
    "Transaction",
    "close_all",
    "configure",
    "get_db",
    "lifespan",
    "load_queries",
    "transactional",
    "transactional_readonly",
]
