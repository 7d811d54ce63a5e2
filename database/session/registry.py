"""The handles of this process, and their beginning and end: `get_db`, `configure`, `lifespan`, `close_all`."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from threading import Lock
from typing import Any

from database import logs, settings
from database.driver.pool import DRAIN_SECONDS
from database.session.database import Database

__all__ = ["close_all", "configure", "get_db", "handles", "lifespan"]

_handles: dict[tuple[str | None, str], Database] = {}
_lock = Lock()


def get_db(name: str = "default", engine: str | None = None) -> Database:
    """The handle of that name; always the same object. Reads no configuration and needs no event loop.

    Args:
        name: The database's name in the configuration.
        engine: The engine's package; None leaves it to the configuration.
    """
    handle = _handles.get((engine, name))
    if handle is not None:
        return handle
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  - users without type checkers
        raise TypeError(
            f"a database's name is a string, not {name!r}; @transactional without arguments has no parentheses"
        )
    with _lock:
        handle = _handles.get((engine, name))
        if handle is None:
            handle = _shared(name, engine) or Database(name, engine)
            _handles[engine, name] = handle
    return handle


def _shared(name: str, engine: str | None) -> Database | None:
    """The handle that was asked for by another way: with the engine named, or without."""
    others = [handle for (_, other), handle in _handles.items() if other == name]
    if engine is None:
        return others[0] if len(set(map(id, others))) == 1 else None
    return next((handle for handle in others if handle.pin(engine)), None)


def handles() -> list[Database]:
    """All handles that there are so far."""
    with _lock:
        return list(set(_handles.values()))


def configure(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    on_connect: Callable[[Any], object] | None = None,
) -> None:
    """Says where the configuration is: a YAML file's path, or a mapping of the same structure.

    The last call before the first use wins. After `close_all()` it may be called again. None goes back to the
    environment variable `DATABASE_CONFIG` and `config/database.yaml`.

    Args:
        source: A YAML file's path, a mapping, or None.
        on_connect: Called as `on_connect(connection)` with each new connection of each SQLite database, on the
            connection's own thread, before anybody uses it, and after what the configuration's `on_connect` names.

    Raises:
        ConfigurationError: It is wrong, cannot be read, or pools are open.
    """
    settings.configure(source, on_connect=on_connect)


async def close_all(drain: float = DRAIN_SECONDS) -> None:
    """Closes every database's pools: this event loop's, and those of loops that are not running any more.

    Pools of other running loops are closed by those: `close_all()` there, or their end.

    Args:
        drain: Seconds for which single statements that run already may go on; then they are interrupted.
    """
    for handle in set(_handles.values()):
        await handle.close(drain)
        for pool in handle.pools():
            if not pool.waker.running:
                pool.close_now()
    settings.forget()
    logs.tear_down()


@asynccontextmanager
async def _lifespan(engine: str | None) -> AsyncGenerator[None, None]:
    try:
        configuration = settings.current()
        for package, databases in configuration.engines.items():
            if engine in (None, package):
                for name in databases:
                    await get_db(name, engine).open()
        yield
    finally:
        await close_all()


def lifespan(app: object = None, engine: str | None = None) -> AbstractAsyncContextManager[None]:
    """Opens all configured databases, and closes them at the end: `async with lifespan(): ...`.

    Also serves as `lifespan=` of Starlette, FastAPI and Litestar, which call it with the application.
    """
    return _lifespan(engine)


def _forget_in_child() -> None:
    for handle in set(_handles.values()):
        handle.binding.forget_pools()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
