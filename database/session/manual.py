"""Transactions without a block: `begin()`, `commit()`, `rollback()`, `flush()`, and what is to run behind the commit.

`commit()` and `rollback()` end a level that `begin()` opened; within a block or a decorated function they end what was
done so far, and the level goes on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable
from contextvars import copy_context
from functools import partial
from typing import Any, cast

from database.driver.observer import aside
from database.driver.request import STATEMENT
from database.driver.worker import here
from database.errors import TransactionError
from database.session.binding import Binding
from database.session.callbacks import Callback
from database.session.generators import Generators
from database.session.origin import Origin
from database.session.propagation import enter, run_behind, watch_generators
from database.session.retry import attempts, leave_behind
from database.session.sending import nothing, reach
from database.session.transaction import Transaction

__all__ = ["begin", "commit", "flush", "on_commit", "rollback"]


async def begin(binding: Binding, origin: Origin, generators: Generators, *, readonly: bool) -> Transaction:
    """Opens a level that lasts until it is ended, its task has gone, or one of the generators that it is begun in is left."""
    entered, _ = await enter(binding, origin, readonly=readonly, propagation="nested", manual=True)
    level = cast("Transaction", entered)
    if generators:
        watch_generators(level, generators)
    if level.connection is None:  # what is logged then has this context, whoever ends it
        level.watch = level.pool.waker.on_task_end(partial(copy_context().run, level.roll_back_unattended))
    return level


async def commit(binding: Binding) -> None:
    """See `Database.commit`."""
    level = _open_level(binding)
    if level is None:
        raise TransactionError("commit(): no transaction is open; call begin() first")
    if not level.manual:
        await level.commit()
        return
    try:
        await level.finish()
    except BaseException:
        _step_out(binding, level)
        await run_behind(binding, level.take_callbacks(), shield=True)
        raise
    _step_out(binding, level)
    await run_behind(binding, level.take_callbacks())


async def rollback(binding: Binding) -> None:
    """See `Database.rollback`."""
    found = binding.level()
    if isinstance(found, Transaction) and found.undone:
        return  # with the generator that it was begun in: clean-up code has nothing to do any more
    level = _open_level(binding)
    if level is None:
        return
    if not level.manual:
        await level.rollback()
        return
    try:
        await level.abandon()
    finally:
        _step_out(binding, level)


async def flush(binding: Binding) -> None:
    """See `Database.flush`."""
    level = _open_level(binding)
    if level is None:
        await reach(binding)
    elif level.root.lease is not None or level.connection is not None:
        await level.run(level.pool.request(STATEMENT, nothing, None, None, None, "flush"), in_turn=False)


def _open_level(binding: Binding) -> Transaction | None:
    """The level that this task is in.

    Raises:
        TransactionError: It has ended, or belongs to another event loop.
    """
    level = binding.level()
    if not isinstance(level, Transaction):
        return None
    if level.ended or level.is_elsewhere:
        raise level.refusal()
    return level


def _step_out(binding: Binding, level: Transaction) -> None:
    if binding.current.get() is level:
        binding.current.set(level.around)


def on_commit(binding: Binding, function: Callback) -> None:
    """See `Database.on_commit`."""
    level = _open_level(binding)
    if level is not None:
        level.on_commit(function)
        return
    if here.worker is not None:  # neither could it run on the loop from here, nor behind the commit of what runs here
        raise TransactionError(
            f"on_commit() of database {binding.name!r} was called on a database's own thread (in db.run, by a record class"
            " or the like), where no transaction of its task is open: nobody could say which commit is meant. Hand the"
            " function over behind the call, or use @transactional(offload=True)"
        )
    if attempts:
        leave_behind()
    result = function()
    if inspect.isawaitable(result):
        binding.pool().waker.spawn(partial(_await, binding.name, result))


async def _await(name: str, result: Awaitable[Any]) -> None:
    try:
        await result
    except Exception as error:  # nobody waits for it who could be told
        logger = logging.getLogger("database.transaction")
        aside(partial(logger.error, "database %s: an on_commit() function failed", name, exc_info=error))
