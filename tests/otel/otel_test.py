"""OpenTelemetry: spans as the conventions want them, where their time went, and what the pools measure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from database import errors, transactional
from tests.contract.support import Engine, add, eventually, gather, held, names

pytest.importorskip("opentelemetry.sdk")
from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from database import otel  # noqa: E402

pytestmark = pytest.mark.anyio


class Telemetry:
    """What has been exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.tracer = self.provider.get_tracer("test")

    def instrument(self, **options: Any) -> None:
        otel.instrument(self.provider, self.meters, **options)

    def spans(self, name: str = "") -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if name in span.name]

    def span(self, name: str) -> Any:
        (found,) = self.spans(name)
        return found

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
async def telemetry(anyio_backend: Any) -> AsyncIterator[Telemetry]:
    found = Telemetry()
    found.instrument()
    yield found
    otel.uninstrument()
    found.meters.shutdown()
    found.provider.shutdown()


@pytest.fixture
async def db(telemetry: Telemetry, make_db: Any) -> Any:
    handle = await make_db()
    telemetry.exporter.clear()
    return handle


async def test_a_statement_is_a_span(db: Any, telemetry: Telemetry, engine: Engine) -> None:
    """Name, kind and attributes are those of the conventions; the values of parameters are not among them."""
    await db.execute("INSERT INTO jobs (name) VALUES (:name)", {"name": "secret"})
    assert len(await db.fetch_all("SELECT name FROM jobs WHERE id < 7 AND name <> 'secret' -- hunter2")) == 0
    insert, select = telemetry.spans()
    assert insert.name == "INSERT jobs"
    assert insert.kind == trace.SpanKind.CLIENT
    common = {"db.system.name": "sqlite", "db.namespace": str(engine.path())}
    assert {
        **common, "db.operation.name": "INSERT", "db.query.summary": "INSERT jobs",
        "db.query.text": "INSERT INTO jobs (name) VALUES (:name)", "thread.name": "database-default-writer",
    }.items() <= insert.attributes.items()  # fmt: skip
    assert select.name == "SELECT jobs"
    assert select.attributes["db.query.text"] == "SELECT name FROM jobs WHERE id < ? AND name <> ?"
    assert select.attributes["db.response.returned_rows"] == 0
    assert "secret" not in str(insert.attributes) + str(select.attributes)


async def test_parameters_if_asked_for(telemetry: Telemetry, make_db: Any, queries: Any) -> None:
    """`parameters=True` shows their values, by name or by number; of queries called in aiosql's way as well."""
    telemetry.instrument(parameters=True)
    db = await make_db()
    telemetry.exporter.clear()
    await db.fetch_value("SELECT :a", {"a": 5})
    await db.fetch_value("SELECT ?", ("x",))
    await queries.get_job_by_id(db, id=7)
    found = [{key: value for key, value in span.attributes.items() if "parameter" in key} for span in telemetry.spans()]
    assert found == [
        {"db.query.parameter.a": "5"}, {"db.query.parameter.0": "x"}, {"db.query.parameter.id": "7"},
    ]  # fmt: skip


async def test_children_of_the_callers_span(db: Any, telemetry: Telemetry) -> None:
    """Whatever thread a statement runs on, its span is the child of the caller's, in offloaded functions too."""

    @transactional
    async def ordinary() -> None:
        await add(db, "a")

    @transactional(offload=True)
    async def offloaded() -> None:
        await add(db, "b")
        await names(db)

    async def nested() -> None:
        with telemetry.tracer.start_as_current_span("inner"):
            await names(db)

    with telemetry.tracer.start_as_current_span("outer"):
        await ordinary()
        await offloaded()
        await db.fetch_value("SELECT 1")
        await gather(nested)
    outer, inner = telemetry.span("outer"), telemetry.span("inner")
    by_name: dict[str, list[Any]] = {}
    for span in telemetry.spans():
        assert span.context.trace_id == outer.context.trace_id
        by_name.setdefault(span.name, []).append(span)
    assert sorted(by_name) == [
        "COMMIT", "INSERT jobs", "SELECT", "SELECT jobs", "inner",
        "offload test_children_of_the_callers_span.<locals>.offloaded", "outer",
    ]  # fmt: skip
    for name, spans in by_name.items():
        for span in spans:
            if name == "SELECT jobs" and span.parent.span_id == inner.context.span_id:
                continue
            assert name == "outer" or span.parent.span_id == outer.context.span_id
    assert [span.parent.span_id == inner.context.span_id for span in by_name["SELECT jobs"]].count(True) == 1
    for span in telemetry.spans():
        assert outer.start_time <= span.start_time <= span.end_time <= outer.end_time


async def test_errors(db: Any, telemetry: Telemetry) -> None:
    """A failed statement's span has the database's code; a cancelled one says so; both have the status ERROR."""
    await add(db, "a")
    telemetry.exporter.clear()
    with pytest.raises(errors.IntegrityError):
        await add(db, "a")
    (span,) = telemetry.spans()
    assert span.status.status_code == trace.StatusCode.ERROR
    assert span.attributes["error.type"] == span.attributes["db.response.status_code"] == "SQLITE_CONSTRAINT_UNIQUE"
    telemetry.exporter.clear()
    with anyio.move_on_after(0):
        await names(db)
    (span,) = telemetry.spans()
    assert span.attributes["error.type"].endswith(("CancelledError", "Cancelled"))
    durations = telemetry.points("db.client.operation.duration")
    (failed,) = (point.attributes for point in durations if "db.response.status_code" in point.attributes)
    assert failed["db.operation.name"] == "INSERT"
    assert failed["error.type"] == failed["db.response.status_code"] == "SQLITE_CONSTRAINT_UNIQUE"


def split(span: Any) -> tuple[float, float, float]:
    return tuple(span.attributes[f"database.{part}"] for part in ("pool_wait", "lock_wait", "execution"))  # type: ignore[return-value]


async def test_time_spent_waiting_for_the_writer(db: Any, telemetry: Telemetry) -> None:
    """What waits while another task holds the writer has waited for the pool; and no part exceeds the whole."""
    async with anyio.create_task_group() as group, held(db) as release:
        group.start_soon(add, db, "waits")
        await eventually(lambda: db.stats().queued == 1)
        await anyio.sleep(0.05)  # not to synchronise: this is the time that is measured
        release.set()
    span = telemetry.span("INSERT jobs")
    pool, lock, execution = split(span)
    assert pool >= 0.05
    assert lock == 0
    assert execution > 0
    # The clocks are two, and between them the thread may have had to wait for a processor.
    assert lock + pool <= (span.end_time - span.start_time) / 1e9 + 0.02


@pytest.mark.parametrize("kind", ["autocommit", "transaction"])
async def test_time_spent_waiting_for_a_lock(db: Any, telemetry: Telemetry, engine: Engine, kind: str) -> None:
    """What waits for another process's lock has waited for the lock."""
    (found,) = db.pools()

    async def write() -> None:
        if kind == "transaction":
            async with db.transaction():
                await add(db, "waits")
        else:
            await add(db, "waits")

    async with anyio.create_task_group() as group:
        with engine.locked():
            group.start_soon(write)
            await eventually(lambda: found.writer.locked > 0, "the first try has been refused")
    span = telemetry.span("INSERT jobs")
    pool, lock, execution = split(span)
    assert lock >= 0.015  # SQLite itself waits for 20 ms before it refuses
    assert execution > 0
    # The clocks are two, and between them the thread may have had to wait for a processor.
    assert lock + pool <= (span.end_time - span.start_time) / 1e9 + 0.02


async def test_exhaustion(telemetry: Telemetry, make_db: Any) -> None:
    """A wait for a connection that ends in an error is a span of its own, all of it pool wait; it is counted."""
    db = await make_db(pool_timeout=0.4)
    async with held(db):
        telemetry.exporter.clear()
        with pytest.raises(errors.ConnectionPoolExhaustedError):
            await add(db, "a")
    span = telemetry.span("INSERT jobs")
    assert span.attributes["error.type"] == "database.errors.ConnectionPoolExhaustedError"
    assert span.attributes["database.pool_wait"] >= 0.35  # the timer and the span have clocks of their own
    (point,) = telemetry.points("db.client.connection.timeouts")
    assert point.value == 1
    assert point.attributes == {"db.client.connection.pool.name": "default"}


def states(telemetry: Telemetry) -> dict[tuple[str, str], int]:
    return {
        (point.attributes["database.role"], point.attributes["db.client.connection.state"]): point.value
        for point in telemetry.points("db.client.connection.count")
    }


async def test_pool_metrics(db: Any, telemetry: Telemetry, engine: Engine) -> None:
    """Connections by state, their maximum, who waits, waits and uses, commits and their sizes, the WAL's length."""
    await names(db)
    assert states(telemetry) == {
        ("reader", "used"): 0, ("reader", "idle"): 1, ("writer", "used"): 0, ("writer", "idle"): 1,
    }  # fmt: skip
    maximum = telemetry.points("db.client.connection.max")
    assert {point.attributes["database.role"]: point.value for point in maximum} == {"reader": 2, "writer": 1}
    async with anyio.create_task_group() as group, held(db) as release:
        group.start_soon(add, db, "a")
        await eventually(lambda: db.stats().queued == 1)
        assert states(telemetry)["writer", "used"] == 1
        (pending,) = telemetry.points("db.client.connection.pending_requests")
        assert pending.value == 1
        release.set()
    await db.execute("DROP TABLE child")  # with a deferred reference in the schema each write has its own commit
    before = sum(point.value for point in telemetry.points("database.commits"))
    await gather(*(lambda number=number: add(db, f"job {number}") for number in range(40)))
    (sizes,) = telemetry.points("database.commit.writes")
    assert sizes.max > 1
    assert sizes.count == telemetry.points("database.commits")[0].value > before
    uses = telemetry.points("db.client.connection.use_time")
    assert any(point.attributes["database.role"] == "writer" and point.sum > 0 for point in uses)
    waits = telemetry.points("db.client.connection.wait_time")
    assert {point.attributes["database.role"] for point in waits} == {"reader", "writer"}
    (wal,) = telemetry.points("database.wal.size")
    assert wal.value == engine.path().with_name("test.db-wal").stat().st_size > 0
    await db.close()
    assert states(telemetry) == {}


async def test_other_operations(db: Any, telemetry: Telemetry) -> None:
    """Scripts, functions, batches and streams are one span each, with names of few values."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("objects of the user's are nobody's to compare")

        __hash__ = None  # type: ignore[assignment]

    def work(connection: Any) -> None:
        connection.execute("INSERT INTO item (value) VALUES ('x')")

    await db.execute_script("CREATE TABLE t (a); INSERT INTO t VALUES ('hunter2')")
    await db.run(work)
    await db.execute_many("INSERT INTO item (value) VALUES (?)", [("a",), ("b",)])
    async with db.batch() as batch:
        for _ in range(3):
            await batch.execute("INSERT INTO item (value) VALUES (?)", ("a",))
    async with db.stream("SELECT * FROM item", chunk_size=2) as rows:
        assert len([row async for row in rows]) == 6
    with pytest.raises(LookupError):
        async with db.transaction():
            await db.fetch_value("PRAGMA user_version", default=Odd())
            raise LookupError
    assert [span.name for span in telemetry.spans()] == [
        "script", "run test_other_operations.<locals>.work", "BATCH INSERT item", "BATCH INSERT item", "SELECT item",
        "PRAGMA user_version", "ROLLBACK",
    ]  # fmt: skip
    sizes = [span.attributes.get("db.operation.batch.size") for span in telemetry.spans("BATCH")]
    assert sizes == [2, 3]
    assert telemetry.span("script").attributes["db.query.text"] == "CREATE TABLE t (a); INSERT INTO t VALUES (?)"


async def test_switched_off_there_is_nothing(telemetry: Telemetry, make_db: Any) -> None:
    """A pool that is opened without it consists of the plain parts: nothing is left to cost anything."""
    otel.uninstrument()
    db = await make_db()
    await names(db)
    (pool,) = db.pools()
    assert type(pool.observer).__module__ == "database.logs"
    assert pool.request is pool.waker.request
    assert telemetry.spans() == []
    assert telemetry.points("db.client.connection.count") == []


async def test_telemetry_that_fails_breaks_nothing(
    db: Any, telemetry: Telemetry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer, a span or an instrument that raises costs the telemetry, and no statement."""

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("telemetry is broken")

    (pool,) = db.pools()
    for name in ("duration", "wait_time", "use_time", "commits"):
        monkeypatch.setattr(getattr(pool.observer.owner, name), "add" if name == "commits" else "record", fail)
    await add(db, "a")
    monkeypatch.setattr(pool.observer.owner, "tracer", type("Broken", (), {"start_span": fail})())
    async with db.transaction():
        await add(db, "b")
    assert await names(db) == ["a", "b"]
    assert "telemetry is broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sql", "summary"),
    [
        ("SELECT * FROM songs", "SELECT songs"),
        ("select a.b, count(*) from main.songs s join \"the artists\" a on a.id = s.id where x = 'from y'",
         'SELECT main.songs "the artists"'),
        ("SELECT * FROM a, b AS x, (SELECT 1 FROM c), d WHERE a IN (1, 2)", "SELECT a b SELECT c d"),
        ("INSERT INTO shipping (id, b) SELECT id, b FROM orders", "INSERT shipping SELECT orders"),
        ("INSERT OR REPLACE INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = replace(b, 'x', 'y')", "INSERT t"),
        ("UPDATE t SET a = 1, b = 2 WHERE c IN (SELECT d FROM e)", "UPDATE t SELECT e"),
        ("DELETE FROM t -- FROM u\n WHERE /* JOIN v */ a IS DISTINCT FROM b", "DELETE t"),
        ("WITH c(x) AS (SELECT 1) SELECT x FROM c", "SELECT SELECT c"),
        ("CREATE UNIQUE INDEX IF NOT EXISTS i ON t (a)", "CREATE INDEX i"),
        ("DROP TABLE IF EXISTS t", "DROP TABLE t"),
        ("PRAGMA journal_mode = WAL", "PRAGMA journal_mode"),
        ("VACUUM", "VACUUM"),
        ("SELECT 1 FROM " + " JOIN ".join(f"table_{number:04}" for number in range(99)), None),
    ],
)  # fmt: skip
def test_summaries(sql: str, summary: str | None) -> None:
    """A summary names operations and what they are done to, and nothing that comes from data."""
    found = otel.summarize(sql)
    assert len(found) <= 255
    if summary is not None:
        assert found == summary


@pytest.mark.parametrize(
    ("sql", "sanitized"),
    [
        ("SELECT 'it''s', x'ff', 1.5e3, 0xFF, .5 FROM t2 WHERE a1 = :p1", "SELECT ?, ?, ?, ?, ? FROM t2 WHERE a1 = :p1"),
        ("SELECT \"a 'b' 1\", [c 2], `d 3` -- it's 5\nFROM t", "SELECT \"a 'b' 1\", [c 2], `d 3` FROM t"),
        ("SELECT 'never closed", "SELECT ?"),
        ("SELECT /* never closed", "SELECT"),
        ("SELECT ?1, ?, $x, @y", "SELECT ?1, ?, $x, @y"),
    ],
)  # fmt: skip
def test_sanitizing(sql: str, sanitized: str) -> None:
    """Literals and comments go; names, numbers within names and placeholders stay."""
    assert otel.sanitize(sql) == sanitized


def test_it_is_not_imported_unasked() -> None:
    """Who does not ask for telemetry does not pay for its import."""
    code = (
        "import sys, anyio; from database.sqlite3 import configure, get_db\n"
        "configure({'database': {'sqlite': {'path': ':memory:', 'init_sql': ''}}})\n"
        "async def main(): await get_db().fetch_value('SELECT 1')\n"
        "anyio.run(main); sys.exit(any('opentelemetry' in name or 'ecs_logging' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
