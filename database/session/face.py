"""The public names: bound to one engine, or to whichever engine the configuration gives a database."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from database.session import registry
from database.session.database import Database
from database.session.decorators import Decorator, make_decorator

__all__ = ["Face", "transactional", "transactional_readonly"]


class Face:
    """The functions that an engine's package offers."""

    def __init__(self, engine: str | None) -> None:
        self._engine = engine
        self.transactional: Decorator = make_decorator(self.get_db, readonly=False)
        self.transactional_readonly: Decorator = make_decorator(self.get_db, readonly=True)

    def get_db(self, name: str = "default") -> Database:
        """The database of that name: always the same object. Cheap, and callable at module level.

        Args:
            name: Its name in the configuration; `"default"` is the one that stands directly below the engine's section.
        """
        return registry.get_db(name, self._engine)

    def lifespan(self, app: object = None) -> AbstractAsyncContextManager[None]:
        """Opens all configured databases of this engine, and closes all databases at the end.

        Args:
            app: Ignored; Starlette, FastAPI and Litestar give it when this serves as their `lifespan=`.
        """
        return registry.lifespan(app, self._engine)


_neutral = Face(None)
transactional = _neutral.transactional
transactional_readonly = _neutral.transactional_readonly
