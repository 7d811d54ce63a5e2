"""The instruments, and the observer that feeds them beside the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics, trace

from database import logs
from database.driver import process
from database.errors import ConnectionPoolExhaustedError
from database.logs import LogObserver, harmless
from database.otel.metrics import GAUGES, Attributes, wal_size
from database.otel.spans import Timing, Traced, Tracing

if TYPE_CHECKING:
    from database.driver.lease import Lease
    from database.driver.observer import Observer
    from database.driver.pool import Pool
    from database.driver.request import Request
    from database.driver.roles import Owner

__all__ = ["Instrumentation", "instrument", "uninstrument"]

NAME: Final = "jobu-database"
SCHEMA: Final = "https://opentelemetry.io/schemas/1.33.0"
SYSTEMS: Final = {"sqlite3": "sqlite"}


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
    logs.instrumentation = Instrumentation(
        trace.get_tracer(NAME, tracer_provider=tracer_provider, schema_url=SCHEMA),
        metrics.get_meter(NAME, meter_provider=meter_provider, schema_url=SCHEMA),
        query_text=query_text,
        parameters=parameters,
    )


def uninstrument() -> None:
    """Leaves pools that are opened from now on alone."""
    current, logs.instrumentation = logs.instrumentation, None
    if isinstance(current, Instrumentation):
        current.active = False


class Instrumentation:
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
        for name, unit, description, read in GAUGES:
            meter.create_observable_up_down_counter(
                name, [self._reader(read)], unit=unit, description=description
            )  # fmt: skip
        meter.create_observable_gauge(
            "database.wal.size", [self._reader(wal_size)], unit="By", description="Length of the write-ahead log."
        )

    def _reader(
        self, read: Callable[[Owner[Any]], Iterable[tuple[float, Attributes]]]
    ) -> Callable[[metrics.CallbackOptions], Iterator[metrics.Observation]]:
        def callback(_options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            if not self.active:
                return
            sums: dict[tuple[tuple[str, Any], ...], float] = {}
            for pool in process.pools():
                if isinstance(pool.observer, Observing) and pool.observer.owner is self:
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
        return Observing(
            self, observer, name, {"db.system.name": SYSTEMS.get(engine, engine), "db.namespace": description}
        )

    def opened(self, pool: Pool) -> None:
        """See `logs.Instrumentation`."""
        if isinstance(pool.observer, Observing):
            # A class for each pool: its requests need no further slot to find their way here.
            parts = {"__slots__": (), "tracing": pool.observer.tracing}
            pool.request = type("TracedRequest", (Traced, pool.request), parts)


class Observing:
    """Reports to the log as before, leaves figures in the requests, and counts."""

    __slots__ = ("_attributes", "_log", "_threshold", "owner", "slow_transaction", "tracing")

    def __init__(self, owner: Instrumentation, log: LogObserver, name: str, common: Attributes) -> None:
        self.owner = owner
        self.slow_transaction = log.slow_transaction
        self._log = log
        self._threshold: float | None = None
        self.tracing = Tracing(owner, common)
        self._attributes: Mapping[str, str] = {"db.client.connection.pool.name": name}

    def threshold(self) -> float | None:
        """See `Observer`."""
        self._threshold = self._log.threshold()
        return 0.0

    def statement(self, request: Request, seconds: float, worker: str) -> None:
        """See `Observer`."""
        request.trace = timing = Timing(seconds, worker)
        if request.home is None:
            self._inline(request, timing)
        if self._threshold is not None and seconds >= self._threshold:
            self._log.statement(request, seconds, worker)

    @harmless
    def _inline(self, request: Request, timing: Timing) -> None:
        """A statement of an offloaded function: it is over already, and nobody waits for it on the loop's thread."""
        span = self.tracing.begin(request, ago=timing.seconds)
        if span is not None:
            span.end(request.error)

    def hears_of(self, seconds: float) -> bool:
        """See `Observer`."""
        return True

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
