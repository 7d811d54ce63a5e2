"""PostgreSQL: the public names, bound to this engine.

from database.postgresql import get_db, transactional, transactional_readonly
"""

from database.driver.pool import PoolStats
from database.engine.statement import Result, Row
from database.session.database import Database
from database.session.face import Face
from database.session.queries import load_queries
from database.session.registry import close_all, configure
from database.session.statements import TypedQuery
from database.session.stream import Stream
from database.session.transaction import Transaction

__all__ = [
    "Database",
    "PoolStats",
    "Result",
    "Row",
    "Stream",
    "Transaction",
    "TypedQuery",
    "close_all",
    "configure",
    "get_db",
    "lifespan",
    "load_queries",
    "transactional",
    "transactional_readonly",
]

_face = Face("postgresql")
get_db = _face.get_db
lifespan = _face.lifespan
transactional = _face.transactional
transactional_readonly = _face.transactional_readonly
