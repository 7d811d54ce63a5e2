"""OpenTelemetry (extra `otel`): a span for each statement, metrics of statements and pools.

    from database import otel

    otel.instrument()     # before the first use of a database; uses the global providers

Names follow OpenTelemetry's database conventions (opentelemetry.io/docs/specs/semconv/db/): stable for spans and for
`db.client.operation.duration`, in development for `db.client.connection.*`. What they have no name for stands below
`database.`.

Where a span's time went is in three attributes, in seconds: `database.pool_wait` (for a connection, or for the turn in
its queue), `database.lock_wait` (for another process's lock, or another pool's), `database.execution`. What is left of
the span's length is the way to the thread and back.

Threads. A span begins and ends where the caller waits for its answer (`_Traced`, the caller's own task), so it is
the child of whatever span is current there. Workers only leave the figures in the request (`_Observer.statement`),
before they answer it. Statements of an offloaded function never wait: theirs is begun and ended on the worker's thread,
in the copy of the caller's context in which the function runs. Gauges are read on the exporter's thread.

What is switched off costs nothing: a pool that is opened without `instrument()` has neither `_Traced` nor `_Observer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any, Final, cast

from database import logs
from database.driver import process as registry
from database.driver.lease import Lease
from database.driver.request import COMMIT, MANY, SCRIPT, Request
from database.driver.worker import here
from database.engine.statement import Result, Statement
from database.errors import ConnectionPoolExhaustedError, DatabaseBusyError, QueryExecutionError
from database.logs import LogObserver, harmless, parameters_of

try:
    from opentelemetry import metrics, trace
except ImportError as error:
    raise ImportError("database.otel needs opentelemetry-api: install the extra `otel` of this package") from error

if TYPE_CHECKING:
    from database.driver.observer import Observer
    from database.driver.pool import Pool

__all__ = ["instrument", "sanitize", "summarize", "uninstrument"]

NAME: Final = "jobu-database"
SCHEMA: Final = "https://opentelemetry.io/schemas/1.33.0"
SYSTEMS: Final = {"sqlite3": "sqlite"}

_TEXT_LIMIT = 8192
_SUMMARY_LIMIT = 255
_SILENT = frozenset({"stream", "flush", "open", "the end of a stream"})

Attributes = dict[str, str | int | float]


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    *,
    query_text: bool = True,
    parameters: bool = False,
) -> None:
    """Traces and measures all pools that are opened from now on. Calling it again replaces what was asked for before.

    Args:
        tracer_provider: Where spans go; None: the global provider.
        meter_provider: Where metrics go; None: the global provider.
        query_text: Whether spans carry the SQL. Literals in a statement without parameters are replaced by `?`.
        parameters: Whether spans carry the values of parameters (`db.query.parameter.<key>`). They may be secrets.
    """
    uninstrument()
    logs.instrumentation = _Instrumentation(
        trace.get_tracer(NAME, tracer_provider=tracer_provider, schema_url=SCHEMA),
        metrics.get_meter(NAME, meter_provider=meter_provider, schema_url=SCHEMA),
        query_text=query_text,
        parameters=parameters,
    )


def uninstrument() -> None:
    """Leaves pools that are opened from now on alone."""
    current, logs.instrumentation = logs.instrumentation, None
    if isinstance(current, _Instrumentation):
        current.active = False


class _Timing:
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


class _Instrumentation:
    """The instruments, and the providers behind them."""

    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter, *, query_text: bool, parameters: bool) -> None:
        self.active = True
        self.tracer = tracer
        self.query_text = query_text
        self.parameters = parameters
        self.duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10],
        )
        self.wait_time = meter.create_histogram(
            "db.client.connection.wait_time", unit="s", description="The time it took to obtain a connection."
        )
        self.use_time = meter.create_histogram(
            "db.client.connection.use_time", unit="s", description="The time for which a transaction held a connection."
        )
        self.timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            unit="{timeout}",
            description="Waits for a connection that ended in ConnectionPoolExhaustedError.",
        )
        self.commits = meter.create_counter(
            "database.commits", unit="{commit}", description="Transactions committed, each with one or more writes."
        )
        self.group_size = meter.create_histogram(
            "database.commit.writes",
            unit="{write}",
            description="Writes and units of work that shared a commit.",
            explicit_bucket_boundaries_advisory=[1, 2, 4, 8, 16, 32, 64],
        )
        self.rollbacks = meter.create_counter(
            "database.rollbacks", unit="{rollback}", description="Transactions rolled back."
        )
        for name, unit, description, read in _GAUGES:
            meter.create_observable_up_down_counter(
                name, [self._reader(read)], unit=unit, description=description
            )  # fmt: skip
        meter.create_observable_gauge(
            "database.wal.size", [self._reader(_wal)], unit="By", description="Length of the write-ahead log."
        )

    def _reader(
        self, read: Callable[[Pool], Iterable[tuple[float, Attributes]]]
    ) -> Callable[[metrics.CallbackOptions], Iterator[metrics.Observation]]:
        def callback(_options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            if not self.active:
                return
            sums: dict[tuple[tuple[str, Any], ...], float] = {}
            for pool in registry.pools():
                if isinstance(pool.observer, _Observer) and pool.observer.owner is self:
                    try:
                        found = list(read(pool))
                    except RuntimeError:  # a queue has changed while it was looked at, on another thread
                        continue
                    for value, attributes in found:
                        # Each event loop has a pool of its own: to the outside they are one.
                        key = tuple({**attributes, "db.client.connection.pool.name": pool.name}.items())
                        sums[key] = sums.get(key, 0) + value
            for key, value in sums.items():
                yield metrics.Observation(value, dict(key))

        return callback

    def observe(self, name: str, engine: str, description: str, observer: LogObserver) -> Observer:
        """See `logs.Instrumentation`."""
        return _Observer(
            self, observer, name, {"db.system.name": SYSTEMS.get(engine, engine), "db.namespace": description}
        )

    def opened(self, pool: Pool) -> None:
        """See `logs.Instrumentation`."""
        if isinstance(pool.observer, _Observer):
            # A class for each pool: its requests need no further slot to find their way here.
            parts = {"__slots__": (), "tracing": pool.observer.tracing}
            pool.request = type("TracedRequest", (_Traced, pool.request), parts)


class _Observer:
    """Reports to the log as before, leaves figures in the requests, and counts."""

    __slots__ = ("_attributes", "_log", "_threshold", "owner", "slow_transaction", "tracing")

    def __init__(self, owner: _Instrumentation, log: LogObserver, name: str, common: Attributes) -> None:
        self.owner = owner
        self.slow_transaction = log.slow_transaction
        self._log = log
        self._threshold: float | None = None
        self.tracing = _Tracing(owner, common)
        self._attributes: Mapping[str, str] = {"db.client.connection.pool.name": name}

    def threshold(self) -> float | None:
        """See `Observer`."""
        self._threshold = self._log.threshold()
        return 0.0

    def statement(self, request: Request, seconds: float, worker: str) -> None:
        """See `Observer`."""
        request.trace = timing = _Timing(seconds, worker)
        if request.home is None:
            self._inline(request, timing)
        if self._threshold is not None and seconds >= self._threshold:
            self._log.statement(request, seconds, worker)

    @harmless
    def _inline(self, request: Request, timing: _Timing) -> None:
        """A statement of an offloaded function: it is over already, and nobody waits for it on the loop's thread."""
        span = self.tracing.begin(request, ago=timing.seconds)
        if span is not None:
            span.end(request.error)

    def transaction(self, lease: Lease, outcome: str, seconds: float) -> None:
        """See `Observer`."""
        self._count(lease, outcome, seconds)
        self._log.transaction(lease, outcome, seconds)

    @harmless
    def _count(self, lease: Lease, outcome: str, seconds: float) -> None:
        attributes = {**self._attributes, "database.role": _role(readonly=lease.readonly)}
        self.owner.use_time.record(seconds, attributes)
        if outcome != "committed":
            self.owner.rollbacks.add(1, self._attributes)

    @harmless
    def committed(self, size: int) -> None:
        """See `Observer`."""
        self.owner.commits.add(1, self._attributes)
        self.owner.group_size.record(size, self._attributes)

    @harmless
    def waited(self, seconds: float, *, readonly: bool) -> None:
        """Somebody got a connection after that time."""
        self.owner.wait_time.record(seconds, {**self._attributes, "database.role": _role(readonly=readonly)})

    def holding(self, holder: str, number: int | None, *, readonly: bool, seconds: float, waiting: int) -> None:
        """See `Observer`."""
        self._log.holding(holder, number, readonly=readonly, seconds=seconds, waiting=waiting)

    def long_read(self, holder: str, seconds: float) -> None:
        """See `Observer`."""
        self._log.long_read(holder, seconds)

    def lost(self, where: str) -> None:
        """See `Observer`."""
        self._log.lost(where)

    def failure(self, error: BaseException) -> None:
        """See `Observer`."""
        if isinstance(error, ConnectionPoolExhaustedError) and not getattr(error, "reported", False):
            self.owner.timeouts.add(1, self._attributes)
        self._log.failure(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


def _role(*, readonly: bool) -> str:
    return "reader" if readonly else "writer"


class _Traced:
    """Goes in front of a loop's class of requests: a span around each wait for an answer. Caller's task."""

    __slots__ = ()

    tracing: _Tracing

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


class _Tracing:
    """Begins spans for one pool."""

    __slots__ = ("_common", "_owner")

    def __init__(self, owner: _Instrumentation, common: Attributes) -> None:
        self._owner = owner
        self._common = common

    def begin(self, request: Request, *, ago: float = 0.0) -> _Span | None:
        """A span for the request; None where it is not worth one. Raises nothing."""
        try:
            return self._begin(request, ago)
        except Exception:  # e.g. of somebody's sampler; the statement goes on
            _complain()
            return None

    def _begin(self, request: Request, ago: float) -> _Span | None:
        label = request.label
        if label in _SILENT:
            return None
        name, described = _describe(request)
        described.update(self._common)
        attributes = dict(described)
        owner = self._owner
        statement = request.sql
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
        return _Span(owner, span, request, described, ago)


def _complain() -> None:
    @harmless
    def again(_self: None) -> None:
        raise  # noqa: PLE0704  - the exception that is being handled

    again(None)


class _Span:
    """A span under way, and the figures to be put into it."""

    __slots__ = ("_attributes", "_began", "_owner", "_request", "_span", "_wanted")

    def __init__(
        self, owner: _Instrumentation, span: trace.Span, request: Request, attributes: Attributes, ago: float
    ) -> None:
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
            if isinstance(observer, _Observer):
                readonly = home.readonly if isinstance(home, Lease) else home is pool.reads  # type: ignore[union-attr]
                observer.waited(pool_wait, readonly=readonly)
        span.end()

    def _split(self, error: BaseException | None, now: float) -> float | None:
        """Says in the span what its time was spent on; gives the wait for a connection."""
        request, span = self._request, self._span
        timing: _Timing | None = getattr(request, "trace", None)
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
    statement = request.sql
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
    return name, {"db.operation.name": name, "db.query.summary": name[:_SUMMARY_LIMIT]}


def _batch(operation: str, summary: str) -> Attributes:
    return {
        "db.operation.name": f"BATCH {operation}".strip(),
        "db.query.summary": f"BATCH {summary}".strip()[:_SUMMARY_LIMIT],
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


# --- What the pools are doing; exporter's thread -----------------------------------------------------------------


def _count(pool: Pool) -> list[tuple[float, Attributes]]:
    stats = pool.stats()
    writers = 0 if pool.writer.session is None else 1
    return [
        (stats.readers_in_use, {"db.client.connection.state": "used", "database.role": "reader"}),
        (
            max(0, stats.readers_open - stats.readers_in_use),
            {"db.client.connection.state": "idle", "database.role": "reader"},
        ),
        (stats.writer_in_use, {"db.client.connection.state": "used", "database.role": "writer"}),
        (
            max(0, writers - stats.writer_in_use),
            {"db.client.connection.state": "idle", "database.role": "writer"},
        ),
    ]


def _max(pool: Pool) -> list[tuple[float, Attributes]]:
    return [(pool.size, {"database.role": "reader"}), (1, {"database.role": "writer"})]


def _pending(pool: Pool) -> list[tuple[float, Attributes]]:
    stats = pool.stats()
    return [(stats.waiting + stats.queued, {})]


def _wal(pool: Pool) -> list[tuple[float, Attributes]]:
    gauges = pool.backend.gauges()
    return [(gauges["wal.size"], {})] if "wal.size" in gauges else []


_GAUGES: Final = (
    ("db.client.connection.count", "{connection}", "Connections by what they are doing.", _count),
    ("db.client.connection.max", "{connection}", "The most connections there may be.", _max),
    ("db.client.connection.pending_requests", "{request}", "Statements and transactions that wait.", _pending),
)


# --- SQL ------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<string>  [xX]?'(?:[^']|'')*(?:'|\Z) )
    | (?P<name>    "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\] | [^\W\d]\w* )
    | (?P<variable>[:@$]\w+ | \?\d* )
    | (?P<number>  0[xX][0-9a-fA-F]+ | (?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)? )
    | (?P<space>   \s+ )
    | (?P<other>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
_OPERATIONS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})
_SCHEMA: Final = frozenset({"CREATE", "ALTER", "DROP"})
_SKIPPED: Final = frozenset({"TEMP", "TEMPORARY", "UNIQUE", "VIRTUAL", "IF", "NOT", "EXISTS", "OR"})


@lru_cache(2048)
def sanitize(sql: str) -> str:
    """The statement with `?` for its literals, and without its comments."""
    pieces: list[str] = []
    for token in _TOKEN.finditer(sql):
        kind = token.lastgroup
        if kind in ("string", "number"):
            pieces.append("?")
        elif kind == "comment":
            pieces.append(" ")
        else:
            pieces.append(token[0])
    return " ".join("".join(pieces).split())


@lru_cache(2048)
def summarize(sql: str) -> str:
    """What the statement does to what: `INSERT runs SELECT jobs`. Of few different values, so good to group by."""
    words = [
        (token.lastgroup, token[0]) for token in _TOKEN.finditer(sql) if token.lastgroup not in ("comment", "space")
    ]
    found: list[str] = []
    targets = False  # whether names that follow are targets: behind FROM, JOIN, INTO, …
    depth = 0
    listing: list[int] = []  # depths of the brackets in which a FROM clause goes on
    before = ""
    position = 0
    while position < len(words):
        kind, text = words[position]
        upper = text.upper()
        if kind == "name" and targets and upper not in ("SELECT", "LATERAL", *_SKIPPED):
            name = text
            while position + 2 < len(words) and words[position + 1][1] == "." and words[position + 2][0] == "name":
                name += "." + words[position + 2][1]
                position += 2
            found.append(name)
            targets = False
        elif kind == "name":
            if upper in _OPERATIONS and before not in ("DO", "OR", "FOR", "ON") and not (
                upper == "REPLACE" and position + 1 < len(words) and words[position + 1][1] == "("
            ):  # fmt: skip
                found.append(upper)
                targets = upper == "UPDATE"
            elif upper in _SCHEMA and not found:
                position += 1
                while position < len(words) and words[position][1].upper() in _SKIPPED:
                    position += 1
                if position < len(words):
                    found.append(f"{upper} {words[position][1].upper()}")
                    targets = True
            elif upper in ("FROM", "JOIN", "INTO"):
                targets = before != "DISTINCT"
                if upper == "FROM":
                    listing.append(depth)
            elif upper in ("WHERE", "GROUP", "ORDER", "SET", "VALUES", "LIMIT", "UNION", "RETURNING") and listing:
                if listing[-1] == depth:
                    listing.pop()
            elif not found and upper != "WITH" and position == 0:
                found.append(upper)
                targets = upper == "PRAGMA"
        elif text == "(":
            depth += 1
            targets = False
        elif text == ")":
            while listing and listing[-1] == depth:
                listing.pop()
            depth -= 1
        elif text == "," and listing and listing[-1] == depth:
            targets = True
        before = upper
        position += 1
    summary = " ".join(found)
    while len(summary) > _SUMMARY_LIMIT:
        found.pop()
        summary = " ".join(found)
    return summary
