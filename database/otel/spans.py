"""Spans: one for each wait for an answer, with the figures that the worker has left in the request.

A span begins and ends where the caller waits (`Traced`, the caller's own task). Statements of an offloaded function never
wait: theirs is begun and ended on the worker's thread, in the copy of the caller's context in which the function runs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from time import perf_counter, time_ns
from typing import Any, Protocol, cast

from opentelemetry import metrics, trace

from database.driver.lease import Lease
from database.driver.request import COMMIT, MANY, SCRIPT, Request
from database.driver.worker import here
from database.engine.statement import Result, Statement
from database.errors import ConnectionPoolExhaustedError, DatabaseBusyError, QueryExecutionError
from database.logs import harmless, parameters_of
from database.otel.metrics import Attributes
from database.otel.summary import SUMMARY_LIMIT, sanitize, summarize

__all__ = ["Timing", "Traced", "Tracing"]

_TEXT_LIMIT = 8192
_SILENT = frozenset({"stream", "flush", "open", "the end of a stream"})


class Timing:
    """What the worker knows of a request: when it was over, how long it took, how long it waited for locks."""

    __slots__ = ("ended", "locked", "retried", "seconds", "worker")

    def __init__(self, seconds: float, worker: str) -> None:
        self.ended = perf_counter()
        self.seconds = seconds
        self.worker = worker
        self.locked = self.retried = 0.0
        current = here.worker
        if current is not None:
            self.locked, self.retried = current.locked, current.retried
            current.locked = current.retried = 0.0


class Traced:
    """Goes in front of a loop's class of requests: a span around each wait for an answer. Caller's task."""

    __slots__ = ()

    tracing: Tracing

    def __await__(self) -> Generator[Any, Any, Any]:
        wait = cast("Generator[Any, Any, Any]", super().__await__())  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        span = self.tracing.begin(cast("Request", self))
        if span is None:
            return (yield from wait)
        try:
            result: Any = yield from wait
        except BaseException as error:
            span.end(error)
            raise
        span.end(None)
        return result


class Owner(Protocol):
    """What spans ask of the instrumentation."""

    tracer: trace.Tracer
    duration: metrics.Histogram
    query_text: bool
    parameters: bool


class Tracing:
    """Begins spans for one pool."""

    __slots__ = ("_common", "_owner")

    def __init__(self, owner: Owner, common: Attributes) -> None:
        self._owner = owner
        self._common = common

    def begin(self, request: Request, *, ago: float = 0.0) -> Span | None:
        """A span for the request; None where it is not worth one. Raises nothing."""
        try:
            return self._begin(request, ago)
        except Exception:  # e.g. of somebody's sampler; the statement goes on
            _complain()
            return None

    def _begin(self, request: Request, ago: float) -> Span | None:
        label = request.label
        if label in _SILENT:
            return None
        name, described = _describe(request)
        described.update(self._common)
        attributes = dict(described)
        owner = self._owner
        statement = request.subject
        if owner.query_text:
            text = statement.sql if isinstance(statement, Statement) else statement if request.kind == SCRIPT else None
            if isinstance(text, str):
                parameters = parameters_of(request)
                attributes["db.query.text"] = (text if parameters else sanitize(text))[:_TEXT_LIMIT]
                if owner.parameters and parameters and request.kind != MANY:
                    attributes.update(_values(parameters))
        span = owner.tracer.start_span(
            name,
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
            start_time=time_ns() - round(ago * 1e9) if ago else None,
        )
        return Span(owner, span, request, described, ago)


def _complain() -> None:
    @harmless
    def again(_self: None) -> None:
        raise  # noqa: PLE0704  - the exception that is being handled

    again(None)


class Span:
    """A span under way, and the figures to be put into it."""

    __slots__ = ("_attributes", "_began", "_owner", "_request", "_span", "_wanted")

    def __init__(self, owner: Owner, span: trace.Span, request: Request, attributes: Attributes, ago: float) -> None:
        self._owner = owner
        self._span = span
        self._request = request
        self._attributes = attributes
        self._began = perf_counter() - ago
        home = request.home
        self._wanted = not isinstance(home, Lease) or home.worker is None
        """Whether a connection had to be waited for."""

    @harmless
    def end(self, error: BaseException | None) -> None:
        """The call is over."""
        span, request = self._span, self._request
        now = perf_counter()
        if error is None:
            if span.is_recording():
                rows = _rows(request.result)
                if rows is not None:
                    span.set_attribute("db.response.returned_rows", rows)
        else:
            for key, value in _of_error(error).items():
                self._attributes[key] = value
                span.set_attribute(key, value)
            span.set_status(trace.StatusCode.ERROR, str(error).partition("\n")[0] or type(error).__name__)
        pool_wait = self._split(error, now)
        self._owner.duration.record(now - self._began, self._attributes)
        if self._wanted and pool_wait is not None and request.home is not None:
            home = request.home
            pool = home.pool if isinstance(home, Lease) else getattr(home, "pool", None)
            observer = None if pool is None else pool.observer
            waited = getattr(observer, "waited", None)
            if waited is not None:
                readonly = home.readonly if isinstance(home, Lease) else home is pool.reads  # type: ignore[union-attr]
                waited(pool_wait, readonly=readonly)
        span.end()

    def _split(self, error: BaseException | None, now: float) -> float | None:
        """Says in the span what its time was spent on; gives the wait for a connection."""
        request, span = self._request, self._span
        timing: Timing | None = getattr(request, "trace", None)
        home = request.home
        if isinstance(home, Lease) and home.number is not None:
            span.set_attribute("database.transaction", home.number)
        if timing is None:
            if isinstance(error, ConnectionPoolExhaustedError):
                span.set_attribute("database.pool_wait", now - self._began)
                return now - self._began
            if isinstance(error, DatabaseBusyError):
                span.set_attribute("database.lock_wait", now - self._began)
            return None
        before = max(0.0, timing.ended - timing.seconds - self._began)
        locked = min(timing.locked, before)
        span.set_attribute("database.pool_wait", before - locked)
        span.set_attribute("database.lock_wait", locked + timing.retried)
        span.set_attribute("database.execution", max(0.0, timing.seconds - timing.retried))
        span.set_attribute("thread.name", timing.worker)
        return before - locked


def _describe(request: Request) -> tuple[str, Attributes]:
    """The span's name, and the attributes that the metric has as well: few and of few values."""
    statement = request.subject
    if isinstance(statement, Statement):
        operation, summary = statement.verb, summarize(statement.sql) or statement.verb
        if request.kind == MANY:
            attributes = _batch(operation, summary)
            rows = request.params
            if isinstance(rows, Sequence):
                attributes["db.operation.batch.size"] = len(rows)  # pyright: ignore[reportUnknownArgumentType]
            return str(attributes["db.query.summary"]), attributes
        return summary, {"db.operation.name": operation, "db.query.summary": summary}
    if request.kind >= COMMIT:
        verb = "COMMIT" if request.kind == COMMIT else "ROLLBACK"
        return verb, {"db.operation.name": verb, "db.query.summary": verb}
    if request.kind == MANY and isinstance(statement, list):
        items = cast("list[tuple[Statement, Any]]", statement)
        texts = {each.sql for each, _ in items}
        first = items[0][0]
        attributes = _batch(first.verb, summarize(first.sql)) if len(texts) == 1 else _batch("", "")
        attributes["db.operation.batch.size"] = len(items)
        return str(attributes["db.query.summary"]), attributes
    if request.kind == SCRIPT:
        name = "backup" if str(request.label).startswith("backup") else "script"
    else:
        function = getattr(statement, "function", statement)
        kind = "offload" if function is not statement else "run"
        name = f"{kind} {getattr(function, '__qualname__', type(function).__name__)}"
    return name, {"db.operation.name": name, "db.query.summary": name[:SUMMARY_LIMIT]}


def _batch(operation: str, summary: str) -> Attributes:
    return {
        "db.operation.name": f"BATCH {operation}".strip(),
        "db.query.summary": f"BATCH {summary}".strip()[:SUMMARY_LIMIT],
    }


def _of_error(error: BaseException) -> Attributes:
    """`error.type` is the database's own code where there is one, else the exception's class."""
    code = None
    if isinstance(error, QueryExecutionError):
        code = error.code_name or (None if error.code is None else str(error.code))
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    found: Attributes = {"error.type": code or name}
    if code is not None:
        found["db.response.status_code"] = code
    return found


def _rows(result: Any) -> int | None:
    if isinstance(result, Result):
        return None
    return len(result) if isinstance(result, list) else None  # pyright: ignore[reportUnknownArgumentType]


def _values(parameters: Any) -> Attributes:
    if isinstance(parameters, Mapping):
        named = dict[Any, Any](parameters)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(parameters, Sequence) and not isinstance(parameters, (str, bytes)):
        named = dict[Any, Any](enumerate(parameters))  # pyright: ignore[reportUnknownArgumentType]
    else:
        named = vars(parameters)
    return {f"db.query.parameter.{key}": str(value) for key, value in named.items()}
