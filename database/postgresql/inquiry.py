"""A connection that asks and changes nothing, for `check`, `stats` and `top`. Synchronous; used by one thread.

It is opened as the pool opens its own, so it goes through poolers, and whatever is wrong with opening one shows here. What
it asks runs in read-only transactions, which the server itself holds to that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import psycopg

from database.postgresql.opening import describe, open_connection
from database.postgresql.plan import Plan
from database.postgresql.settings import PostgresqlSettings

__all__ = ["Inquiry", "literals"]

LOCK_TIMEOUT = 3000
"""Milliseconds to wait for somebody's lock: who only looks must not stand in the way, nor wait for long."""

STOPPED_AGAIN = 0.1
"""Seconds between two looks at whether anybody still waits for the answer."""


class Inquiry:
    """Asks one server. `with` it."""

    def __init__(self, settings: PostgresqlSettings, stopped: Callable[[], bool]) -> None:
        """Connects.

        Args:
            settings: Of the database.
            stopped: Whether nobody waits for the answer any more; the server is then told to stop.

        Raises:
            ConnectionFailedError: There is no connection to be had.
        """
        self.place = describe(settings)
        asking = replace(
            settings,
            statement_rollback=True,
            isolation="READ COMMITTED",
            prepare_threshold=0,
            lock_timeout=min(settings.lock_timeout or LOCK_TIMEOUT, LOCK_TIMEOUT),
        )
        self._session = open_connection(asking, "shared", stopped, lambda: False)
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(stopped,), daemon=True, name="database-inquiry").start()
        try:
            version = self.value("SELECT current_setting('server_version_num')")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.version = int(version)
        """As the server counts: 150004."""

    def _watch(self, stopped: Callable[[], bool]) -> None:
        """A connection that waits asks nobody whether it shall go on before it is told to."""
        while not self._over.wait(STOPPED_AGAIN):
            if stopped():
                self._session.interrupt()

    def __enter__(self) -> Inquiry:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._over.set()
        with contextlib.suppress(psycopg.Error):
            self._session.rollback()
        self._session.close()

    @property
    def encrypted(self) -> bool:
        """Whether what is between here and the other end, a pooler or the server, is encrypted."""
        return bool(self._session.raw.pgconn.ssl_in_use)

    @property
    def session(self) -> Any:
        """The connection, for what else the package asks of one."""
        return self._session

    @property
    def socket(self) -> bool:
        """Whether it is a socket of this machine."""
        return self._session.raw.pgconn.host.startswith((b"/", b"@"))

    @property
    def address(self) -> str:
        """The address at the other end; empty for a socket."""
        pgconn = self._session.raw.pgconn
        return (pgconn.hostaddr or b"").decode(errors="replace")

    def snapshot(self) -> None:
        """What follows sees one moment."""
        self._session.begin(readonly=True)

    def release(self) -> None:
        """What follows sees what is there by then."""
        self._session.rollback()

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """The rows of a query.

        Raises:
            psycopg.Error: The server refuses; what follows may be asked all the same.
        """
        own = not self._session.began
        if own:
            self.snapshot()
        try:
            result = self._session.run(Plan(sql, None, len(values)), values, timed=False)
            return self._session.load(result, 0, result.ntuples, None)
        finally:
            if own:
                self.release()

    def row(self, sql: str, *values: Any) -> Any:
        """The first row, as there is one."""
        return self.rows(sql, *values)[0]

    def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row."""
        found = self.rows(sql, *values)
        return found[0][0] if found else None


def literals(names: Any) -> str:
    """Names of ours as SQL literals."""
    return ", ".join(f"'{name}'" for name in names)
