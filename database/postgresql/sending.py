"""How a statement is sent: its parameters' types, its name on the server, what travels with it, and when it is sent again.

Types. The server takes a parameter's type from us, and refuses a statement whose types do not fit (an `int` for a
column of text). What it would have wanted is then asked for once and remembered with the plan (`Plan.coercions`), by
the Python types of the values. Whole numbers are `int4`, larger ones `int8`; a parameter that has been `int8` once
stays so (`Plan.wide`), or each mixture of sizes would be a statement of its own.

Names. A statement is prepared under a name from its fifth execution on. It is known here once the server has said that
PREPARE was fine, whatever became of the execution: names outlive a rollback. A name that is given up is deallocated.

What was learnt can become wrong: a table is altered under a running service. So an error of the kind that a wrong type
gives makes this module forget what it knows of the statement, and send it once more.
"""

from __future__ import annotations

import datetime
import json
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import pq
from psycopg.adapt import Loader, PyFormat, Transformer
from psycopg.types.json import JsonbDumper

from database import errors
from database.engine.adapting import Adapters
from database.engine.contract import BLOCKING, Steps
from database.engine.statement import Statement
from database.postgresql.analysis import names_of
from database.postgresql.failures import MISTYPED, STALE, made_from, mark_alone
from database.postgresql.levels import Levels
from database.postgresql.plan import Plan, reshaped
from database.postgresql.values import BindError, bind, coerced, coercion

if TYPE_CHECKING:
    from database.postgresql.raw import RawConnection
    from database.postgresql.settings import PostgresqlSettings

__all__ = ["Sender"]

PREPARED = 256
"""Statements that are kept prepared on the server, for each connection."""

_FATAL = pq.ExecStatus.FATAL_ERROR
_AUTO = PyFormat.AUTO

_INT2, _INT4, _INT8 = 21, 23, 20
_pack4 = struct.Struct("!i").pack
_pack8 = struct.Struct("!q").pack

_FOREIGN = """
SELECT bool_or(l.lanname NOT IN ('internal', 'c')) FROM pg_catalog.pg_proc p
LEFT JOIN pg_catalog.pg_aggregate a ON a.aggfnoid = p.oid
JOIN pg_catalog.pg_proc f ON f.oid IN (p.oid, a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggmtransfn, a.aggmfinalfn)
JOIN pg_catalog.pg_language l ON l.oid = f.prolang
WHERE p.proname = ANY(ARRAY(SELECT json_array_elements_text($1::json)))
HAVING bool_or(l.lanname NOT IN ('internal', 'c') OR f.provolatile = 'v')
"""
"""Whether any function of these names is written in SQL or in a procedural language, or is an aggregate made of such, so that
nobody knows what it does. False where there is none, but one of the server's own that may do something (it is VOLATILE); no
row where there is not even that.
"""

_HIDDEN = """
WITH written AS (
    SELECT oid, proname FROM pg_catalog.pg_proc WHERE pronamespace <> 'pg_catalog'::regnamespace
    AND (prokind = 'a' OR prolang NOT IN (SELECT oid FROM pg_catalog.pg_language WHERE lanname IN ('internal', 'c')))
)
SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relname = ANY($1::text[]) AND (relkind IN ('v', 'f') OR relrowsecurity)
        AND relnamespace NOT IN (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname IN ('pg_catalog', 'information_schema')))
    OR EXISTS (SELECT FROM written WHERE proname = ANY($1::text[]))
    OR EXISTS (SELECT FROM written JOIN pg_catalog.pg_operator o ON oprcode = written.oid
        WHERE strpos($2::text, oprname) > 0 AND (pg_operator_is_visible(o.oid) OR 'operator' = ANY($1::text[])))
    OR EXISTS (SELECT FROM written JOIN pg_catalog.pg_cast ON castfunc = written.oid
        JOIN pg_catalog.pg_type t ON t.oid = casttarget WHERE castcontext = 'i' OR typname = ANY($1::text[]))
    OR EXISTS (SELECT FROM pg_catalog.pg_type t JOIN pg_catalog.pg_constraint ON contypid = t.oid
        WHERE typname = ANY($1::text[]))
"""
"""Whether any of these names may be a view, a foreign table, a table with policies, a domain with a check, a function that is
written as `row.name` or has the name of one of the server's own; or whether an operator in the text, or a cast, calls such
a one.
"""

INNOCENT_SECONDS = 60.0
"""How long it is believed that a table has not become a view."""

_NOTHING = datetime.timedelta()
_INTERVAL = 1186

_TIMES = (1082, 1083, 1114, 1184, _INTERVAL, 1266)
"""date, time, timestamp, timestamptz, interval, timetz."""


def _lenient(strict: Any, *, interval: bool) -> type[Loader]:
    class Lenient(Loader):
        """What Python's type cannot hold (infinity, BC, 24:00) or psycopg cannot read (other styles) is the server's text."""

        def __init__(self, oid: int, context: Any = None) -> None:
            super().__init__(oid, context)
            self._load: Callable[[Any], Any] = strict(oid, context).load

        def load(self, data: Any) -> Any:
            try:
                return self._load(data)
            except (psycopg.DataError, OverflowError, ValueError, NotImplementedError):
                return bytes(data).decode()

    class Interval(Lenient):
        """psycopg takes an infinite one for none at all."""

        def load(self, data: Any) -> Any:
            found = super().load(data)
            return bytes(data).decode() if found == _NOTHING and bytes(data)[-8:] == b"infinity" else found

    return Interval if interval else Lenient


class Sender(Levels):
    """One connection, as statements see it."""

    __slots__ = ("adapters", "dropped", "failing", "names", "prepared", "prepares", "theirs", "transformer")

    def __init__(
        self,
        connect: Callable[[], RawConnection],
        settings: PostgresqlSettings,
        progress: Callable[[], bool],
        local: bytes | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.adapters: Adapters = {} if adapters is None else adapters
        """How types of the user's are stored; of these, more may come later."""
        self.prepares = settings.pooler == "none" or settings.pooler_prepares
        self.names = 0
        self.failing: tuple[Statement, Any] | None = None
        """What has just failed, where the request does not say it: a write of a batch, a query called in aiosql's way."""
        self.theirs: BaseException | None = None
        """What code of the user's has raised, which goes to the caller as it is."""
        super().__init__(connect, settings, progress, local)

    def adopt(self, raw: RawConnection) -> None:
        """See `Wire`."""
        adapters = raw.adapters
        adapters.register_dumper(dict, JsonbDumper)
        for oid in _TIMES:
            adapters.register_loader(oid, _lenient(adapters.get_loader(oid, pq.Format.TEXT), interval=oid == _INTERVAL))
        self.transformer = Transformer(raw)
        super().adopt(raw)

    def forget_names(self) -> None:
        """See `Levels`."""
        self.prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.dropped: list[bytes] = []

    def read_anew(self) -> None:
        """See `Levels`. psycopg looks at the settings when it first meets a type, and never again."""
        self.transformer = Transformer(self.raw)

    def noticed(self, plan: Plan) -> None:
        """After a statement that may make wrong what is known here."""
        if not plan.sets:
            reshaped()
        elif self.began:
            self.localise()

    def dump(self, values: Sequence[Any], plan: Plan) -> tuple[Any, tuple[int, ...], Any]:
        """The values as they are sent: payload, types, formats."""
        if not values:
            return None, (), None
        transformer = self.transformer
        try:
            payload: Any = transformer.dump_sequence(values, [_AUTO] * len(values))
        except (TypeError, ValueError, RecursionError) as error:  # JSON in a circle, a number of too many digits
            if isinstance(error, UnicodeEncodeError):
                raise
            raise BindError(f"a parameter cannot be sent: {error}") from error
        types = transformer.types or ()
        formats = transformer.formats
        if _INT2 in types or (plan.wide and _INT4 in types):
            wide = plan.wide
            changed = list(types)
            for number, oid in enumerate(types):
                if oid in (_INT2, _INT4) and type(values[number]) is int:
                    if number in wide:
                        changed[number] = _INT8
                        payload[number] = _pack8(values[number])
                    elif oid == _INT2:
                        changed[number] = _INT4
                        payload[number] = _pack4(values[number])
            types = tuple(changed)
        return payload, types, formats

    # Which functions change something

    def look_at_calls(self, plan: Plan) -> None:
        """Asks the server, once a plan, whether it calls functions that may do anything at all."""
        names = plan.calls
        plan.calls = ()  # first: this is a statement, too
        try:
            found = self.run(
                _FOREIGN_PLAN, (json.dumps(names),)
            )  # no list: the user may have said how these are stored
        except BaseException:
            plan.calls = names
            raise
        if found.ntuples:
            plan.acts = True
            plan.stains = plan.stains or found.get_value(0, 0) == b"t"

    def look_at_names(self, plan: Plan) -> None:
        """Asks the server whether what a statement reads are tables, so that it does nothing but to read."""
        now = time.perf_counter()
        if self.run(_HIDDEN_PLAN, (list(plan.suspects), plan.sql)).get_value(0, 0) == b"f":
            plan.innocent_until = now + INNOCENT_SECONDS
        else:
            plan.suspects, plan.innocent_until = (), 0.0

    def only_reads(self, plan: Plan) -> bool:
        """Asks the server, now and then, whether nothing is lost if only the first rows of a SELECT are computed."""
        now = time.perf_counter()
        if now > plan.harmless_until:
            if self.run(_HIDDEN_PLAN, (names_of(plan.sql), plan.sql)).get_value(0, 0) != b"f":
                return False
            plan.harmless_until = now + INNOCENT_SECONDS
        return True

    def admit(self, plan: Plan) -> None:
        """Before a statement that may leave something on the connection."""
        if plan.calls:
            self.look_at_calls(plan)
        if plan.stains:
            pooled = self.settings.pooler != "none"  # whose the connection is then, nobody knows
            if plan.refusal is not None and (pooled or not self.began):
                raise errors.QueryExecutionError(f"{plan.refusal}; nothing was executed")
            self.stained = not pooled

    # One statement

    def run(self, plan: Plan, params: Any, sql: str | None = None, *, timed: bool = True) -> pq.abc.PGresult:
        """Executes a statement, in the open transaction or by itself.

        Args:
            plan: The statement's plan.
            params: Its parameters, as the caller gave them.
            sql: Another text than the plan's, with the same parameters.
            timed: Whether this tells how long the statement takes.
        """
        result: pq.abc.PGresult = self.walk(self.running(plan, params, sql, timed=timed))
        return result

    def running(self, plan: Plan, params: Any, sql: str | None = None, *, timed: bool = True) -> Steps:
        """`run` in steps."""
        values = bind(plan, params, self.adapters)
        plan.check_shapes()
        if not self.began:
            yield BLOCKING
            self.revive()
        if plan.calls or plan.stains:
            yield BLOCKING
            self.admit(plan)
        if self.began:
            if (
                plan.suspects
                and self.rereads
                and self.beginning is not None
                and sql is None
                and time.perf_counter() > plan.innocent_until - INNOCENT_SECONDS / 2
            ):
                yield BLOCKING
                self.look_at_names(plan)
            self.save()
        started = time.perf_counter()
        try:
            result = yield from self._insisting(plan, plan.sql if sql is None else sql, values)
        except GeneratorExit:  # thrown away, in a forked child: the connection is not its own
            raise
        except BaseException as error:
            yield BLOCKING
            if isinstance(error, psycopg.Error) and not self.began:
                mark_alone(error)
            self.settle(error)
            if self.stained and not self.began:
                self.put_right()
            raise
        if plan.shapes:
            self.noticed(plan)
        seconds = time.perf_counter() - started
        if timed and (not self.lags or (plan.seconds is not None and seconds < plan.seconds)):
            plan.took(seconds)
        if self.beginning is None or not self.rereads or sql is not None or started > plan.innocent_until:
            self.succeeded()
        if self.stained and not self.began:
            self.put_right()
        return result

    def _insisting(self, plan: Plan, text: str, values: Sequence[Any]) -> Steps:
        """Sends a statement; once more, if what is known of its types has become wrong, or was not known yet."""
        kinds = tuple(map(type, values))
        forgot = learnt = False
        while True:
            known = plan.coercions.get(kinds)
            try:
                return (yield from self._exchanging(text, values if known is None else coerced(values, known), plan))
            except psycopg.Error as error:
                state = error.sqlstate
                if self.lost(error):
                    raise
                yield BLOCKING
                stale = state in STALE and (known is not None or self.is_prepared(text))
                if not forgot and (stale or is_reshaped(error)):
                    forgot = True
                    plan.coercions.pop(kinds, None)
                    self.unprepare(text)
                    if self.settings.pooler != "none" and is_reshaped(error):
                        plan.nameless = (
                            True  # the pooler would give another name of ours to the same plan on the server
                        )
                elif not learnt and state in MISTYPED and kinds and known is None:
                    learnt = True
                else:
                    raise
                self.settle(error)
                if self.began and not self.prefix:
                    raise
                if learnt and state in MISTYPED and known is None and not self._learn(plan, text, kinds):
                    raise
                if self.began:
                    self.save()

    def _learn(self, plan: Plan, text: str, kinds: tuple[type, ...]) -> bool:
        wanted = self.wanted_types(text)
        if isinstance(wanted, psycopg.Error):
            return False
        plan.coercions[kinds] = tuple(map(coercion, wanted))
        return True

    def wanted_types(self, text: str) -> list[int] | psycopg.Error:
        """The types that the server wants for a statement's parameters, had they none of their own; or why it has none."""
        try:
            return self._described(text)
        except psycopg.Error as error:
            self.fresh = False
            self.settle(error)
            return error

    def _described(self, text: str) -> list[int]:
        """In one pipeline, for behind a pooler the next one is another server connection's."""
        parts = self.what_waits()
        if self.local is not None and not self.began:
            parts.append(self.local)
        pg = self.pg
        self.begin_wait()
        try:
            pg.enter_pipeline_mode()
            for part in parts:
                pg.send_query_params(part, None)
            pg.send_prepare(b"", text.encode())
            pg.send_describe_prepared(b"")
            pg.pipeline_sync()
            self.flush()
            answers = self.until_sync()
            pg.exit_pipeline_mode()
        except BaseException:
            self.abandon()
            raise
        for answer in answers:
            if answer.status == _FATAL:
                raise made_from(answer)
        return [answers[-1].param_type(number) for number in range(answers[-1].nparams)]

    def _expect(self) -> pq.abc.PGresult:
        """The last result of what was sent; raised, if it is an error."""
        last: pq.abc.PGresult | None = None
        while (result := self.result()) is not None:
            if last is None or last.status != _FATAL:
                last = result
        if last is None:
            raise psycopg.OperationalError("the server gave no answer")
        if last.status == _FATAL:
            raise made_from(last)
        return last

    def refusal_of(self, text: str, types: tuple[int, ...]) -> psycopg.Error | None:
        """Whether the server would take a statement with parameters of these types: within a transaction, which goes on."""
        self.simple([*self.prefix, b"SAVEPOINT asking"])
        pg = self.pg
        self.begin_wait()
        pg.send_prepare(b"", text.encode(), types)
        self.flush()
        try:
            self._expect()
        except psycopg.Error as error:
            if self.lost(error):
                raise
            self.simple([b"ROLLBACK TO SAVEPOINT asking", b"RELEASE SAVEPOINT asking"])
            return error
        self.prefix.append(b"RELEASE SAVEPOINT asking")
        return None

    # Names

    def is_prepared(self, text: str) -> bool:
        """Whether the server knows the statement by a name."""
        return any(key[0] == text for key in self.prepared)

    def unprepare(self, text: str) -> None:
        """Gives up the names of a statement."""
        for key in [key for key in self.prepared if key[0] == text]:
            self.dropped.append(self.prepared.pop(key))

    def name_for(self, key: tuple[str, tuple[int, ...]], plan: Plan) -> tuple[bytes | None, bool]:
        """The name under which a statement is prepared, and whether it still has to be."""
        threshold = self.settings.prepare_threshold
        plan.uses += 1
        if not threshold or plan.uses < threshold or not self.prepares or plan.nameless:
            return None, False
        name = self.prepared.get(key)
        if name is not None:
            return name, False
        self.names += 1
        return b"_db_%d" % self.names, True

    def keep_name(self, key: tuple[str, tuple[int, ...]], name: bytes) -> None:
        """PREPARE was fine."""
        prepared = self.prepared
        if len(prepared) >= PREPARED:
            self.dropped.append(prepared.pop(next(iter(prepared))))
        prepared[key] = name

    def what_waits(self) -> list[bytes]:
        """What is to be sent before the next statement."""
        parts: list[bytes] = self.prefix
        self.prefix = []
        if self.dropped and self.settings.pooler != "none":  # the pooler's own names are others
            self.dropped = []
        if self.dropped:
            parts = [*parts, *(b"DEALLOCATE " + name for name in self.dropped)]
            self.dropped = []
        return parts

    # Round trips

    def send(self, text: str, payload: Any, types: tuple[int, ...], formats: Any, name: bytes | None) -> None:
        """Sends one statement, prepared or not."""
        pg = self.pg
        if name is None:
            pg.send_query_params(text.encode(), payload, param_types=types, param_formats=formats)
        else:
            pg.send_query_prepared(name, payload, param_formats=formats)

    def _exchanging(self, text: str, values: Sequence[Any], plan: Plan) -> Steps:
        """Sends a statement with what waits before it, and gives its result."""
        payload, types, formats = self.dump(values, plan)
        key = (text, types)
        name, new = self.name_for(key, plan)
        parts = self.what_waits() if self.prefix or self.dropped else ()
        if self.local is not None and not self.began and not plan.alone:
            parts = (*parts, self.local)
        pg = self.pg
        if self.struck:
            yield BLOCKING
        self.begin_wait()
        if not parts and not new:
            self.send(text, payload, types, formats, name)
            yield from self.flushing()
            result: Any = yield from self.receiving()
            while (more := (yield from self.receiving())) is not None:
                result = more
            if result.status == _FATAL:
                raise made_from(result)
            if _INT8 in types:
                widen(plan, types, values)
            return result
        failed: pq.abc.PGresult | None = None
        try:
            pg.enter_pipeline_mode()
            for part in parts:
                pg.send_query_params(part, None)
            if new:
                pg.send_prepare(cast("bytes", name), text.encode(), types)
            self.send(text, payload, types, formats, name)
            pg.pipeline_sync()
            yield from self.flushing()
            for number in range(len(parts) + new):
                answer = yield from self.answering()
                if answer.status == _FATAL:
                    failed = answer
                    if number < len(parts):
                        self.saved = False  # what was to make the connection fit has failed: only a rollback is left
                elif number == len(parts) and failed is None:
                    self.keep_name(key, cast("bytes", name))
                yield from self.receiving()  # the None between two
            result = yield from self.answering()
            while (more := (yield from self.receiving())) is not None:
                result = more
            if result.status == _FATAL:
                failed = failed or result
            failed = (yield from self.leaving_pipeline()) or failed
        except GeneratorExit:
            raise
        except BaseException:
            self.abandon()
            raise
        if failed is not None:
            raise made_from(failed)
        if _INT8 in types:
            widen(plan, types, values)
        return result


def widen(plan: Plan, types: tuple[int, ...], values: Sequence[Any]) -> None:
    """After success: the parameters that were sent as `int8` are so from now on."""
    if _INT8 not in types:
        return
    wide = {number for number, oid in enumerate(types) if oid == _INT8 and type(values[number]) is int}
    if not wide <= plan.wide:
        plan.wide |= wide


def is_reshaped(error: psycopg.Error) -> bool:
    """Whether a table has another shape now than when the statement was prepared."""
    return error.sqlstate == "0A000" and "cached plan" in str(error)


_FOREIGN_PLAN = Plan(_FOREIGN, None, 1)
_HIDDEN_PLAN = Plan(_HIDDEN, None, 2)
