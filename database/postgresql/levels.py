"""Transactions and their levels: BEGIN, SAVEPOINT and RELEASE are never sent by themselves.

They wait in `prefix` and go out with the next statement, in one round trip.

Failure inside a transaction. PostgreSQL refuses everything after an error until the transaction, or a savepoint, is rolled
back. On SQLite a failed statement undoes only itself, and so it is here: each statement of a transaction has the savepoint
`statement` before it, which costs no round trip of its own. Serialization failures and deadlocks are for the whole
transaction: it is rolled back at once, so that its locks are free, and the caller's `retries` run it again.

Facts this rests on (postgresql.org/docs/current): sql-set-transaction.html (a transaction may turn read-only at any time,
never back, except by the end of the savepoint in which it did); sql-begin.html.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from database import errors
from database.engine.contract import BLOCKING, Steps
from database.postgresql.failures import made_from, mark_outcome, outcome_of
from database.postgresql.settings import PostgresqlSettings
from database.postgresql.wire import Wire

if TYPE_CHECKING:
    from database.postgresql.raw import RawConnection

__all__ = ["Levels"]

RENEW_AGAIN = 10.0
"""Seconds after which a connection is tried to be made again for its age, if the server did not take another."""

_FATAL = pq.ExecStatus.FATAL_ERROR
_IDLE = pq.TransactionStatus.IDLE
_INERROR = pq.TransactionStatus.INERROR
_BAD = pq.ConnStatus.BAD

_INSTANCE = (
    b"extract(epoch FROM pg_postmaster_start_time())::text || ' '"
    b" || coalesce(extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())::text, '')"
)
"""Which life of which server this is. The statistics begin anew when it recovers from a crash."""

_TICKET = b"SELECT pg_current_xact_id_if_assigned()::text, " + _INSTANCE

_SAVE = b"SAVEPOINT statement"
_RELEASE = b"RELEASE SAVEPOINT statement"
_UNDO = b"ROLLBACK TO SAVEPOINT statement"


class Levels(Wire):
    """The open transaction and its savepoints."""

    __slots__ = (
        "began",
        "beginning",
        "fresh",
        "guarded",
        "lags",
        "local",
        "localised",
        "prefix",
        "readonly",
        "rereads",
        "restricted",
        "saved",
        "settings",
        "stained",
        "streams",
        "ticket",
    )

    def __init__(
        self,
        connect: Callable[[], RawConnection],
        settings: PostgresqlSettings,
        progress: Callable[[], bool],
        local: bytes | None = None,
    ) -> None:
        self.settings = settings
        self.local = local
        """What goes out behind BEGIN, where the connection cannot keep it: see `opening.local_settings`."""
        self.prefix: list[bytes] = []
        """What goes out before the next statement."""
        self.guarded = False
        """Whether transactions are read-only by default, for the time of one."""
        self.stained = False
        """Whether a statement may have left something on the connection that its next user must not find."""
        self.localised = False
        """Whether the transaction may have settings of its own (SET LOCAL), on which it depends how values are written."""
        self.ticket: tuple[Any, Any] | None = None
        """The number of the transaction whose COMMIT is under way, and of which instance of the server's."""
        super().__init__(connect, progress)

    def adopt(self, raw: RawConnection) -> None:
        """See `Wire`."""
        super().adopt(raw)
        self.stained = self.guarded = False
        self.forget()
        self.forget_names()

    def forget_names(self) -> None:
        """Nothing is prepared on the server."""
        raise NotImplementedError

    def read_anew(self) -> None:
        """Values may be written in another way from now on: another time zone, another style of dates."""
        raise NotImplementedError

    def localise(self) -> None:
        """The transaction has been given settings of its own, until its end or that of the savepoint before."""
        self.localised = True
        self.read_anew()

    def guard(self) -> None:
        """Before a function gets the connection in a read-only transaction: whatever transaction it may begin is so, too."""
        if not self.guarded and self.settings.pooler == "none":
            self.guarded = True
            setting = b"SET default_transaction_read_only = on"
            if self.readonly and self.prefix and self.prefix[0].startswith(b"BEGIN"):
                # Before that, so that a rollback does not undo it.
                prefix = self.prefix
                self.simple([setting])
                self.prefix = prefix
            else:
                self.prefix.append(setting)

    def put_right(self) -> None:
        """After a transaction, or a statement outside any, that may have left something: the connection as configured.

        Temporary tables, settings, advisory locks, LISTEN and cursors go; so do the prepared statements. What cannot be
        put right is made again.
        """
        try:
            if self.stained:
                self.stained = self.guarded = False
                self.forget_names()
                self.read_anew()
                self.simple([b"DISCARD ALL"])
            elif self.guarded:
                self.guarded = False
                self.simple([b"RESET default_transaction_read_only"])
        except psycopg.Error:
            self.abandon()

    def revive(self) -> None:
        """See `Wire`. Also makes a connection again that is old, or has not been used for so long that it may be gone."""
        now = time.monotonic()
        raw = self.raw
        if self._is_due(raw, now):
            self._renew(raw)
        self.raw.used_at = now
        super().revive()
        if self.stained or self.guarded:
            self.put_right()
            super().revive()

    def _is_due(self, raw: RawConnection, now: float) -> bool:
        """Whether it is old, or may be gone."""
        return now > raw.expires or now > raw.used_at + (self.settings.max_idle or math.inf)

    def _renew(self, old: RawConnection) -> None:
        """Another connection in place of this one; of what cannot be made again, the old one will do."""
        try:
            made = self.open()
        except errors.ConnectionFailedError:
            old.expires = time.monotonic() + RENEW_AGAIN
            old.used_at = time.monotonic()
            return
        old.session = None
        with contextlib.suppress(Exception):
            old.close()
        self.adopt(made)

    def forget(self) -> None:
        """No transaction is open."""
        self.began = False
        self.lags = False
        """Whether a statement may seem to take longer than it does: an event loop receives its answer when it comes to that."""
        self.beginning: list[bytes] | None = None
        """The BEGIN of a transaction in which nothing has succeeded yet but what only reads, at READ COMMITTED: until then,
        beginning anew undoes a failure, and nobody can tell.
        """
        self.rereads = False
        """Whether each statement has a snapshot of its own."""
        self.readonly = False
        self.restricted = 0
        self.saved = False
        """Whether the savepoint `statement` is set, or will be by `prefix`."""
        self.fresh = False
        """Whether nothing has been executed since it was set."""
        self.prefix = []
        if self.localised:
            self.localised = False
            self.read_anew()
        self.streams: dict[Any, list[Any] | tuple[bytes, Any, Any]] = {}
        """Rows that have been read already; or the cursor's name, and the statement with its parameters."""

    @property
    def in_transaction(self) -> bool:
        """See `Connection`."""
        return self.began

    def try_lock(self, seconds: float) -> bool:
        """See `Connection`. There is nothing to take: the server has locks of its own."""
        return True

    def unlock(self) -> None:
        """See `Connection`."""

    def begin(self, *, readonly: bool) -> None:
        """See `Connection`. Sent with the first statement; only a dead connection is noticed here."""
        self.revive()
        self._begin(readonly=readonly)

    def begin_unless(self, *, readonly: bool) -> bool:
        """See `Stepping`. Where nothing has to be put right or made again, and nobody hears of the server's notices."""
        now = time.monotonic()
        raw = self.raw
        if (
            self.began
            or self.struck
            or self.stained
            or self.guarded
            or self.pg.status == _BAD
            or self._is_due(raw, now)
            or raw.is_heard()
            or self.poll.readable()
        ):
            return False
        raw.used_at = now
        self._begin(readonly=readonly)
        self.lags = True
        return True

    def _begin(self, *, readonly: bool) -> None:
        self.began = True
        self.readonly = readonly
        # Only REPEATABLE READ gives one snapshot for all statements; a read-only transaction never fails for it.
        isolation = self.settings.isolation
        if readonly and isolation == "READ COMMITTED":
            isolation = "REPEATABLE READ"
        self.begin_with(_begin(isolation, readonly=readonly))

    def isolation(self, level: str) -> None:
        """Sets the isolation of the transaction that is about to begin."""
        if not self.prefix or not self.prefix[0].startswith(b"BEGIN"):
            raise errors.TransactionError("the isolation can only be chosen before the transaction's first statement")
        if self.readonly and level == "READ COMMITTED":
            level = "REPEATABLE READ"
        self.begin_with(_begin(level, readonly=self.readonly))

    def begin_with(self, beginning: bytes) -> None:
        """Makes this the BEGIN that goes out with the first statement."""
        opening = [beginning] if self.local is None else [beginning, self.local]
        self.prefix = [*opening, *self.prefix[len(opening) :]]
        self.beginning = opening if self.settings.statement_rollback else None
        self.rereads = b"READ COMMITTED" in beginning

    def commit(self) -> None:
        """See `Connection`."""
        self.walk(self.committing())

    def committing(self) -> Steps:
        """See `Stepping`."""
        prefix = self.prefix
        if prefix and prefix[0].startswith(b"BEGIN"):  # nothing has been executed
            self.forget()
            return
        self.ticket = None
        try:
            if self.settings.resolve_commits and not self.readonly:
                yield BLOCKING
                result = self._commit_with_ticket(prefix)
            else:
                result = yield from self.telling([*prefix, b"COMMIT"])
        except GeneratorExit:  # thrown away, in a forked child: the connection is not its own
            raise
        except BaseException as error:
            yield BLOCKING
            try:
                if isinstance(error, psycopg.Error) and self.lost(error):
                    outcome = "undone" if self.readonly else self._look_up()
                    if outcome == "committed":
                        return
                    mark_outcome(error, outcome)
                raise
            finally:
                self._committed()
        if self.stained or self.guarded:
            yield BLOCKING
        self._committed()
        if result.command_status == b"ROLLBACK":
            raise errors.TransactionError("the server has rolled the transaction back; nothing of it is kept")

    def _committed(self) -> None:
        if self.pg.transaction_status == _IDLE or self.pg.status == _BAD:
            self.forget()
            if self.stained or self.guarded:
                self.put_right()

    def _commit_with_ticket(self, parts: list[bytes]) -> pq.abc.PGresult:
        """COMMIT, and before it, in the same round trip, who we are: the server answers that before it commits."""
        pg = self.pg
        self.prefix = []
        self.begin_wait()
        answers: list[pq.abc.PGresult] = []
        try:
            pg.enter_pipeline_mode()
            for part in parts:
                pg.send_query_params(part, None)
            pg.send_query_params(_TICKET, None)
            pg.send_flush_request()
            pg.send_query_params(b"COMMIT", None)
            pg.pipeline_sync()
            self.flush()
            while len(answers) < len(parts) + 2:
                answer = self.answer()
                if len(answers) == len(parts) and answer.ntuples and answer.get_value(0, 0) is not None:
                    self.ticket = answer.get_value(0, 0), answer.get_value(0, 1)
                answers.append(answer)
                self.result()  # the None between two
            late = self.leave_pipeline()
        except BaseException:
            self.abandon()
            raise
        failed = next((answer for answer in answers if answer.status == _FATAL), late)
        if failed is not None:
            raise made_from(failed)
        return answers[-1]

    def _look_up(self) -> str:
        """What has become of the transaction whose COMMIT got no answer: asked of the server, on another connection.

        Only the instance that ran it may tell: after a crash or a failover the number may be another transaction's.
        """
        if self.ticket is None:
            return "unknown"
        number, instance = self.ticket
        self.ticket = None
        question = b"SELECT CASE WHEN %s = '%s' THEN pg_xact_status('%s'::xid8) END" % (_INSTANCE, instance, number)
        deadline = time.monotonic() + self.settings.reconnect_timeout
        pause = 0.005
        self.abandon()
        while True:
            try:
                if self.pg.status == _BAD:
                    self.reopen()
                answer = self.simple([question]).get_value(0, 0)
            except errors.ConnectionFailedError:
                return "unknown"
            except psycopg.Error as error:
                if not self.lost(error):
                    return "unknown"
            else:
                if answer == b"committed":
                    return "committed"
                if answer != b"in progress":  # None: another instance, or too long ago
                    return "undone" if answer == b"aborted" else "unknown"
            if time.monotonic() + pause > deadline:
                return "unknown"
            time.sleep(pause)
            pause = min(pause * 2, 0.5)

    def rollback(self) -> None:
        """See `Connection`."""
        self.forget()
        if self.pg.status != _BAD and self.pg.transaction_status != _IDLE:
            self.resolute = True
            try:
                self.simple([b"ROLLBACK"])
            finally:
                self.resolute = False
                if self.pg.status != _BAD and self.pg.transaction_status != _IDLE:
                    self.abandon()  # else whoever comes next would be in this transaction
        if self.stained or self.guarded:
            self.put_right()

    def drop_saved(self) -> None:
        """Levels nest like brackets, so the savepoint of the last statement goes before one is opened or closed."""
        if self.saved:
            if self.prefix[-1:] == [_SAVE]:
                self.prefix.pop()
            else:
                self.prefix.append(_RELEASE)
            self.saved = self.fresh = False

    def savepoint(self, number: int) -> None:
        """See `Connection`."""
        self.drop_saved()
        self.prefix.append(b"SAVEPOINT level_%d" % number)

    def release(self, number: int) -> None:
        """See `Connection`."""
        self.drop_saved()
        if self.prefix[-1:] == [b"SAVEPOINT level_%d" % number]:
            self.prefix.pop()
        else:
            self.prefix.append(b"RELEASE SAVEPOINT level_%d" % number)

    def undo(self, number: int) -> None:
        """See `Connection`."""
        opening = b"SAVEPOINT level_%d" % number
        if opening in self.prefix:
            del self.prefix[self.prefix.index(opening) :]
        else:  # whatever waits has happened inside the level
            self.prefix = [b"ROLLBACK TO SAVEPOINT level_%d" % number, b"RELEASE SAVEPOINT level_%d" % number]
        self.saved = self.fresh = False
        if self.localised:
            self.read_anew()

    def restrict(self, readonly: bool) -> None:
        """See `Connection`. A savepoint bounds it: at its end the transaction may write again."""
        self.drop_saved()
        if readonly:
            self.restricted += 1
            self.prefix += [b"SAVEPOINT restricted", b"SET TRANSACTION READ ONLY"]
        else:
            self.restricted = max(self.restricted - 1, 0)
            if b"SAVEPOINT restricted" in self.prefix:
                del self.prefix[self.prefix.index(b"SAVEPOINT restricted") :]
            else:
                # Not RELEASE: that would fail, had the last statement failed.
                self.prefix = [b"ROLLBACK TO SAVEPOINT restricted", b"RELEASE SAVEPOINT restricted"]
            if self.localised:
                self.read_anew()

    def save(self) -> None:
        """Before a statement of a transaction: whatever comes of it, the transaction goes on."""
        if not self.settings.statement_rollback or self.fresh:
            return
        if self.beginning is not None and (not self.prefix or self.prefix[-len(self.beginning) :] == self.beginning):
            return
        self.beginning = None
        if self.saved:
            self.prefix.append(_RELEASE)
        self.prefix.append(_SAVE)
        self.saved = self.fresh = True

    def succeeded(self) -> None:
        """Something has been executed that a failure of what comes must not undo."""
        self.fresh = False
        self.beginning = None

    def settle(self, error: BaseException) -> None:
        """After an error: makes the connection fit for what comes, without sending anything where that can wait."""
        if not self.began:
            return
        if self.pg.status == _BAD:
            if outcome_of(error) is None:
                mark_outcome(error, "undone")  # COMMIT was not sent
            self.forget()
            return
        status = self.pg.transaction_status
        if status == _INERROR:
            if str(getattr(error, "sqlstate", "")).startswith("40"):  # "transaction rollback", by the standard
                self.rollback()
            elif self.beginning is not None:
                self.prefix = [b"ROLLBACK", *self.beginning]
            elif not self.saved:
                self.rollback()
            else:
                self.prefix = [_UNDO]
                self.fresh = True
        elif status == _IDLE and not (self.prefix and self.prefix[0].startswith(b"BEGIN")):
            self.forget()

    def simple(self, parts: list[bytes]) -> pq.abc.PGresult:
        """Sends statements without parameters in one text; gives the last one's result."""
        result: pq.abc.PGresult = self.walk(self.telling(parts))
        return result

    def telling(self, parts: list[bytes]) -> Steps:
        """`simple` in steps."""
        if self.struck:
            yield BLOCKING
        self.begin_wait()
        self.prefix = []
        pg = self.pg
        pg.send_query(b";".join(parts))
        yield from self.flushing()
        last: pq.abc.PGresult | None = None
        failed: pq.abc.PGresult | None = None
        while (result := (yield from self.receiving())) is not None:
            last = result
            if result.status == _FATAL:
                failed = result
        if failed is not None:
            raise made_from(failed)
        assert last is not None
        return last

    def send_prefix(self) -> None:
        """Sends what waits, before psycopg's own functions are used."""
        if self.struck and not self.prefix:
            self.outlast_cancel()
        if self.prefix:
            parts = self.prefix
            try:
                self.simple(parts)
            except BaseException as error:
                if self.pg.status != _BAD:
                    self.rollback()
                self.settle(error)
                raise


def _begin(isolation: str, *, readonly: bool) -> bytes:
    return f"BEGIN ISOLATION LEVEL {isolation}{' READ ONLY' if readonly else ''}".encode()
