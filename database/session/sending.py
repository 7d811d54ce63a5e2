"""Which way a statement goes: to the connection of the open transaction, or to the lane of the readers or the writer.

Every call costs one hop to a worker's thread and back, so everything before the hop is kept short: nothing but one
`Request` is made. What these functions give is awaited by their caller: a coroutine more would cost as much as they do.

Loop thread, but inside an `offload=True` function, where a statement is executed at once.
"""

from __future__ import annotations

from collections.abc import Awaitable
from sys import modules
from typing import TYPE_CHECKING, Any, cast

from database.driver.request import ALONE, MANY, SCRIPT, STATEMENT, UNIT, Request
from database.driver.wakeup import asyncio_loop, current_loop
from database.engine.adapting import AS_IS, PLAIN
from database.engine.statement import READ, WHOLE, WRITE, Statement
from database.session.binding import Binding
from database.session.level import Detached, Level, step_back
from database.session.propagation import Options, reading_pool, refuse_waiting_for_itself
from database.session.retry import attempts, note
from database.session.statements import still
from database.session.transaction import Transaction

if TYPE_CHECKING:
    from database.driver.pool import Pool

__all__ = ["reach", "send", "send_unit", "submit"]

_are_plain = PLAIN.issuperset


def send(
    binding: Binding, level: Level | None, operation: Any, statement: Statement, params: Any, extra: Any
) -> Awaitable[Any]:
    """Hands a statement over; gives what its answer is to be awaited from. `level` is the current one."""
    plain = False
    if type(params) is tuple:
        for value in params:  # pyright: ignore[reportUnknownVariableType]
            if type(value) not in PLAIN:  # pyright: ignore[reportUnknownArgumentType]
                params = still(params)
                break
        else:
            plain = extra is None
    elif params is None:
        plain = extra is None
    elif type(params) is dict and _are_plain(map(type, params.values())):  # pyright: ignore[reportUnknownArgumentType]
        params, plain = params.copy(), extra is None  # pyright: ignore[reportUnknownVariableType]
    else:
        params = still(params)
    if level is not None:
        if level.ended:
            level = step_back(binding.current, level)
        if isinstance(level, Transaction):
            if plain and level.pool.as_is:
                extra = AS_IS
                if level.pool.inline is not None and statement.kind == READ:
                    answer = level.read(operation, statement, params)
                    if answer is not None:
                        return answer
            request = level.pool.request(STATEMENT, operation, statement, params, extra)
            if statement.kind != READ:
                if level.readonly:
                    level.refuse_write(statement)
                if attempts:
                    note(request, level.root.attempt)
            return level.send(request)
    pool = binding.recent
    # As `current_loop`, without a call where nobody has imported trio
    if pool is None or pool.loop() is not (current_loop() if "trio" in modules else asyncio_loop()):
        pool = binding.pool()
    if plain and pool.as_is:
        extra = AS_IS
    if statement.kind == READ:
        if pool.inline is not None:
            return pool.inline.send(operation, statement, params, extra)
        request = pool.request(STATEMENT, operation, statement, params, extra)
        pool.reads.submit(request)
    else:
        if level is not None:
            refuse_waiting_for_itself(level, pool)
        kind = STATEMENT if statement.kind == WRITE else UNIT if statement.kind == WHOLE else ALONE
        request = pool.request(kind, operation, statement, params, extra)
        if attempts:
            note(request)
        pool.writes.submit(request)
    return request


def send_unit(
    binding: Binding, kind: int, operation: Any, what: Any, params: Any, extra: Any = None, *, label: object = None,
    readonly: bool = False, options: Options | None = None,
) -> Awaitable[Any]:  # fmt: skip
    """Hands several statements over as one; gives what their answer is to be awaited from."""
    level = binding.level()
    if isinstance(level, Transaction):
        if level.readonly and kind == MANY:
            level.refuse_write(cast("Statement", what[0][0] if isinstance(what, list) else what))
        pool = level.pool
    else:
        pool = reading_pool(binding, options) if readonly else binding.pool()
    return submit(level, pool, pool.request(kind, operation, what, params, extra, label), readonly=readonly)


def submit(level: Level | None, pool: Pool, request: Request, *, readonly: bool) -> Awaitable[Any]:
    """Hands a request over, within that level; gives what its answer is to be awaited from."""
    if isinstance(level, Transaction):
        if attempts and not (readonly or level.readonly):
            note(request, level.root.attempt)
        return level.send(request)
    if readonly:
        pool.reads.submit(request)
    else:
        if level is not None:
            refuse_waiting_for_itself(level, pool)
        if attempts:
            note(request)
        pool.writes.submit(request)
    return request


async def reach(binding: Binding) -> None:
    """Returns once the writer has been reached, and all that was sent to it before is done. Opens the pool if need be."""
    level = binding.level()
    pool = binding.pool()
    if isinstance(level, Detached):
        refuse_waiting_for_itself(level, pool)
    request = pool.request(SCRIPT, nothing, None, None, None, "open")
    pool.writes.submit(request)
    await request


def nothing(_connection: Any, _statement: Any, _params: Any, _extra: Any) -> None:
    """The operation of a request that only wants to be reached."""
