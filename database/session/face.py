"""The decorators for whatever engine the configuration names."""

from database.decorators import make_decorator
from database.registry import get_db

__all__ = ["transactional", "transactional_readonly"]

transactional = make_decorator(get_db, readonly=False)
transactional_readonly = make_decorator(get_db, readonly=True)
