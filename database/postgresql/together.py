"""Several statements of several callers, sent together: each behind its own Sync, so each its own transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import pq

from database.driver.request import Request
from database.engine.statement import READ
from database.postgresql.connection import Connection
from database.postgresql.failures import AGAIN, MISTYPED, STALE, Lost, made_from
from database.postgresql.plan import Plan
from database.postgresql.returning import UNFIT_FOR_RETURNING, done
from database.postgresql.sending import is_reshaped, widen
from database.postgresql.values import bind, coerced

__all__ = ["run_together"]

_OK = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK})
_FATAL = pq.ExecStatus.FATAL_ERROR


class _Sent:
    """One statement of a pipeline: what stands before it, and how it was sent."""

    __slots__ = ("formats", "key", "name", "new", "parts", "payload", "request", "values")

    def __init__(
        self, request: Request, key: tuple[str, tuple[int, ...]], values: Sequence[Any], payload: Any, formats: Any
    ) -> None:
        self.request = request
        self.values = values
        self.key = key
        self.payload = payload
        self.formats = formats
        self.name: bytes | None = None
        self.new = False
        self.parts: list[bytes] = []


def run_together(
    connection: Connection,
    requests: list[Request],
    begin: Callable[[Request], None],
    end: Callable[[Request, BaseException | None], None],
) -> list[Request]:
    """See `Backend.run_together`. A Sync behind each statement makes it a transaction of its own.

    Should one turn out to be slow, or wait for a lock, it is cancelled, so that it holds nobody else's answer back, and
    given back to be run alone; so is one that such a cancellation, or somebody else's, has hit by mistake, and one whose
    types or name the server did not take.
    """
    connection.revive()
    sent: list[_Sent] = []
    for request in requests:  # all values first: what raises within a pipeline costs the connection
        try:
            plan: Plan = request.subject.hint
            values = bind(plan, request.params, connection.adapters)
            plan.check_shapes()
            values = coerced(values, plan.coercions.get(tuple(map(type, values))))
            payload, types, formats = connection.dump(values, plan)
        except Exception as unfit:
            begin(request)
            end(request, unfit)
            continue
        text = plan.returning if request.operation is type(connection).execute and plan.returning else plan.sql
        sent.append(_Sent(request, (text, types), values, payload, formats))
    again: list[Request] = []
    position = 0
    try:
        _send(connection, sent)
        for position, each in enumerate(sent):
            request = each.request
            begin(request)
            connection.next_wait()
            connection.impatient = position + 1 < len(sent)
            started = time.perf_counter()
            answers = connection.until_sync()
            request.subject.hint.took(time.perf_counter() - started)
            failed = next((answer for answer in answers if answer.status == _FATAL), None)
            if each.new and len(answers) > len(each.parts) and answers[len(each.parts)].status in _OK:
                connection.keep_name(each.key, each.name or b"")
            if failed is None:
                widen(request.subject.hint, each.key[1], each.values)
                end(request, _deliver(connection, request, answers[-1]))
                continue
            error = made_from(failed)
            if (error.sqlstate == "57014" and not request.cancelled) or _is_to_be_run_alone(error, each):
                again.append(request)
            else:
                end(request, error)
        connection.pg.exit_pipeline_mode()
    except psycopg.Error as error:
        if not connection.lost(error):
            connection.abandon()
            raise
        for each in sent[position:]:  # who knows which of them the server has got to
            request = each.request
            if request.subject.kind == READ and not request.subject.hint.acts:
                again.append(request)
            else:
                lost = Lost(str(error).strip())
                begin(request)
                # In the package's words already: the connection is noticed to be dead before its next use, not here.
                translated = connection.translate(lost, request.subject, request.params)
                translated.__cause__ = lost
                end(request, translated)
    except BaseException:
        connection.abandon()
        raise
    finally:
        connection.impatient = False
    return again


def _send(connection: Connection, sent: list[_Sent]) -> None:
    pg = connection.pg
    parts = connection.what_waits()
    under_way: dict[tuple[str, tuple[int, ...]], bytes] = {}
    connection.begin_wait()
    pg.enter_pipeline_mode()
    for each in sent:
        text, types = each.key
        each.parts, parts = parts, []
        if connection.local is not None:
            each.parts = [*each.parts, connection.local]
        for part in each.parts:
            pg.send_query_params(part, None)
        each.name = under_way.get(each.key)  # should that PREPARE fail, this statement does as well, and is run alone
        if each.name is None:
            each.name, each.new = connection.name_for(each.key, each.request.subject.hint)
            if each.new and each.name is not None:
                under_way[each.key] = each.name
                pg.send_prepare(each.name, text.encode(), types)
        connection.send(text, each.payload, types, each.formats, each.name)
        pg.pipeline_sync()
    connection.flush()


def _deliver(connection: Connection, request: Request, result: pq.abc.PGresult) -> BaseException | None:
    """Makes the request's result of the server's."""
    try:
        operation = request.operation
        if operation is type(connection).fetch_all:
            request.result = connection.load(result, 0, result.ntuples, request.extra)
        elif operation is type(connection).fetch_one:
            rows = connection.load(result, 0, min(result.ntuples, 1), request.extra)
            request.result = rows[0] if rows else None
        elif operation is type(connection).fetch_value:
            request.result = connection.value(result, request.extra)
        else:
            request.result = done(request.subject, result, connection.transformer)
    except BaseException as error:  # a record class that refuses its columns
        return error
    return None


def _is_to_be_run_alone(error: psycopg.Error, sent: _Sent) -> bool:
    state = error.sqlstate
    return (
        state in MISTYPED
        or state in AGAIN
        or is_reshaped(error)
        or (sent.name is not None and state in STALE)
        or (sent.key[0] == sent.request.subject.hint.returning and isinstance(error, UNFIT_FOR_RETURNING))
    )
