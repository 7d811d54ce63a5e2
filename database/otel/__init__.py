"""OpenTelemetry (extra `otel`): a span for each statement, metrics of statements and pools.

    from database import otel

    otel.instrument()     # before the first use of a database; uses the global providers

Names follow OpenTelemetry's database conventions (opentelemetry.io/docs/specs/semconv/db/): stable for spans and for
`db.client.operation.duration`, in development for `db.client.connection.*`. What they have no name for stands below
`database.`.

Where a span's time went is in three attributes, in seconds: `database.pool_wait` (for a connection, or for the turn in
its queue), `database.lock_wait` (for another process's lock, or another pool's), `database.execution`. What is left of
the span's length is the way to the thread and back.

Threads. A span begins and ends where the caller waits for its answer (`Traced`, the caller's own task), so it is
the child of whatever span is current there. Workers only leave the figures in the request (`Observing.statement`),
before they answer it. Statements of an offloaded function never wait: theirs is begun and ended on the worker's thread,
in the copy of the caller's context in which the function runs. Gauges are read on the exporter's thread.

What is switched off costs nothing: a pool that is opened without `instrument()` has neither `Traced` nor `Observing`.
"""

from __future__ import annotations

try:
    from database.otel.instrumentation import instrument, uninstrument
    from database.otel.summary import sanitize, summarize
except ImportError as error:
    if (error.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ImportError("database.otel needs opentelemetry-api: install the extra `otel` of this package") from error

__all__ = ["instrument", "sanitize", "summarize", "uninstrument"]
