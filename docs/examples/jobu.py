"""A small job service on `database`: reads a crontab, queues runs of its jobs, lets workers do them.

    python docs/examples/jobu.py --backend trio --jobs 1000 --workers 8 /etc/crontab

Nothing is executed: the handler is an echo. All else is as in a real service. One transaction brings the
crontab into the table `jobs` and queues the runs; each worker claims a run in one transaction and finishes it
in another; readers watch in read-only transactions, each a consistent snapshot. Ctrl-C ends it at any moment,
and the next start goes on with what was left. A database serves one such service at a time.

Exit status: 0 if everything adds up, 1 if not, 2 on wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import secrets
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import anyio
from anyio.abc import TaskStatus
from crontab import Crontab, Entry, read_crontab, split_command

from database import configure, errors, get_db, lifespan, load_queries, transactional, transactional_readonly

HERE = Path(__file__).parent
POLL_SECONDS = 0.05

db = get_db()
queries = load_queries(HERE / "jobu.sql")


# Records: what the tables hold.


@dataclass(frozen=True, slots=True)
class Job:
    """A row of `jobs`."""

    id: int
    name: str
    cron_expr: str
    handler: str
    enabled: int
    created_at: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a job, as the worker that claimed it sees it."""

    id: int
    job_id: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """The runs in the database at one moment."""

    queued: int
    running: int
    done: int
    failed: int
    total: int
    outputs: int

    @property
    def consistent(self) -> bool:
        """Whether the counts, taken by several statements, are of the same moment."""
        states = self.queued + self.running + self.done + self.failed
        return states == self.total and self.outputs == self.done


@dataclass(frozen=True, slots=True)
class Start:
    """What the service found, and made of it, when it started."""

    new: int
    changed: int
    unchanged: int
    disabled: int
    enqueued: int
    before: Statistics


# Business functions: what happens in which transaction.


@transactional
async def store_jobs(entries: list[Entry]) -> tuple[int, int, int, int]:
    """Makes the table what the crontab says; returns how many jobs are new, changed, unchanged, disabled."""
    before = await db.fetch_value(queries.count_jobs)
    rows = [{"name": e.name, "cron_expr": e.schedule, "handler": e.command} for e in entries]
    written = await db.execute_many(queries.upsert_job, rows)
    new = await db.fetch_value(queries.count_jobs) - before
    kept = {entry.name for entry in entries}
    enabled = [row["name"] for row in await db.fetch_all(queries.get_all_jobs, {"enabled": 1})]
    disabled = await db.execute_many(queries.disable_job, [{"name": name} for name in enabled if name not in kept])
    return new, written.rowcount - new, len(rows) - written.rowcount, disabled.rowcount


@transactional
async def enqueue_runs(count: int) -> int:
    """Queues so many runs, spread evenly over the enabled jobs; returns how many."""
    jobs = await db.fetch_all(queries.get_all_jobs, {"enabled": 1}, record_class=Job)
    rows = [{"job_id": job.id} for job in itertools.islice(itertools.cycle(jobs), count)]
    await db.execute_many(queries.enqueue_run, rows)
    return len(rows)


@transactional
async def start_up(entries: list[Entry], count: int) -> Start:
    """Brings the tables up to date, all in one transaction: the functions it calls take part in it."""
    new, changed, unchanged, disabled = await store_jobs(entries)
    await db.execute(queries.requeue_unfinished_runs)  # claimed by an earlier start that was interrupted
    before = await take_statistics()
    return Start(new, changed, unchanged, disabled, await enqueue_runs(count), before)


@transactional
async def claim_run(worker: str) -> tuple[Run, Job] | None:
    """Takes the oldest run that is queued; None when there is none."""
    run = await db.fetch_one(queries.claim_run, {"worker": worker}, record_class=Run)
    if run is None:
        return None
    job = await db.fetch_one(queries.get_job_by_id, {"id": run.job_id}, record_class=Job)
    assert job is not None, "the foreign key sees to it"
    return run, job


@transactional
async def finish_run(run: Run, worker: str, output: str) -> bool:
    """Stores the output; False when the run is no longer this worker's."""
    result = await db.execute(queries.finish_run, {"id": run.id, "worker": worker, "output": output})
    return result.rowcount == 1


@transactional_readonly
async def take_statistics() -> Statistics:
    """Counts the runs; the three statements see the same moment, however much is written meanwhile."""
    states = {row["state"]: row["runs"] for row in await db.fetch_all(queries.count_runs_by_state)}
    return Statistics(
        queued=states.get("queued", 0),
        running=states.get("running", 0),
        done=states.get("done", 0),
        failed=states.get("failed", 0),
        total=await db.fetch_value(queries.count_runs),
        outputs=await db.fetch_value(queries.count_outputs),
    )


@transactional_readonly
async def count_runs_by_worker(start: str) -> dict[str, int]:
    """How many runs the workers of this start have finished, as the database has it."""
    rows = await db.fetch_all(queries.count_runs_by_worker, {"start": start})
    return {row["worker"]: row["runs"] for row in rows}


# The service: tasks around the business functions.


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    crontab: Path
    format: Literal["system", "user", "auto"]
    backend: Literal["asyncio", "trio"]
    uvloop: bool
    jobs: int
    workers: int
    readers: int
    seconds: float
    config: Path | None


@dataclass(slots=True)
class Report:
    """What happened, gathered while it happens."""

    start: Start
    executed: Counter[int] = field(default_factory=Counter)  # run id -> times
    finished: Counter[str] = field(default_factory=Counter)  # worker -> runs
    snapshots: int = 0
    inconsistent: int = 0

    @property
    def due(self) -> int:
        """How many runs this start has to do."""
        return self.start.before.queued + self.start.enqueued

    @property
    def total(self) -> int:
        """How many runs the database holds, from the start's end on."""
        return self.start.before.total + self.start.enqueued

    def done(self, now: Statistics) -> int:
        """How many of them are done."""
        return now.done - self.start.before.done


def echo(job: Job) -> str:
    """The handler of all jobs: says what cron would do."""
    line, data = split_command(job.handler)
    return f"{job.name}: {line}" if data is None else f"{job.name}: {line} <<< {data!r}"


async def work(worker: str, seconds: float, report: Report) -> None:
    """Does runs until none is queued."""
    while (claimed := await claim_run(worker)) or await db.fetch_value(queries.count_queued_runs):
        if claimed is None:  # another worker was quicker
            continue
        run, job = claimed
        report.executed[run.id] += 1
        await anyio.sleep(seconds)
        if await finish_run(run, worker, echo(job)):
            report.finished[worker] += 1


async def watch(finished: anyio.Event, report: Report, show: Callable[[int], None]) -> None:
    """Polls the statistics until the work is finished, and once more then."""
    last = False
    while not last:
        last = finished.is_set()
        now = await take_statistics()
        report.snapshots += 1
        report.inconsistent += not (now.consistent and now.total == report.total)
        show(report.done(now))
        with anyio.move_on_after(POLL_SECONDS):
            await finished.wait()


async def do_runs(start: str, options: Options, report: Report) -> None:
    """Lets the workers do all that is queued while the readers watch."""
    finished = anyio.Event()
    with progress_bar(report.due) as show:
        async with anyio.create_task_group() as readers:
            for _ in range(options.readers):
                readers.start_soon(watch, finished, report, show)
            async with anyio.create_task_group() as workers:
                for number in range(1, options.workers + 1):
                    workers.start_soon(work, f"{start}/{number}", options.seconds, report)
            finished.set()


@asynccontextmanager
async def stoppable() -> AsyncIterator[tuple[anyio.CancelScope, list[int]]]:
    """Yields a scope that the first SIGINT or SIGTERM cancels, and a list that has the signal's number then.

    Ctrl-C pressed twice means the same as once: what comes after the first is ignored to the end.
    """

    async def wait(*, task_status: TaskStatus[None]) -> None:
        try:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for signum in signals:
                    caught.append(signum)
                    scope.cancel()
        finally:
            if caught:
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    scope = anyio.CancelScope()
    caught: list[int] = []
    async with anyio.create_task_group() as tasks:
        if sys.platform != "win32":  # there, KeyboardInterrupt ends anyio.run
            await tasks.start(wait)
        yield scope, caught
        tasks.cancel_scope.cancel()


async def serve(options: Options, crontab: Crontab) -> int:
    """Runs the service once and prints what happened; returns the exit status."""
    start = secrets.token_hex(4)  # tells this start's workers from earlier ones in the database
    report: Report | None = None
    began = time.perf_counter()
    async with stoppable() as (scope, caught), lifespan():
        with scope:
            report = Report(await start_up(crontab.entries, options.jobs))
            await do_runs(start, options, report)
        seconds = time.perf_counter() - began
        now = await take_statistics()
        by_worker = await count_runs_by_worker(start)
        pool = asdict(db.stats())
    if caught or report is None:
        done = report.done(now) if report else 0
        left = now.queued + now.running
        print(f"jobu: interrupted: {done} runs done, {left} left for the next start", file=sys.stderr)
        return 128 + caught[0]
    print_report(options, crontab, report, now, seconds, pool)
    faults = find_faults(options, report, now, by_worker)
    for fault in faults:
        print(f"jobu: does not add up: {fault}", file=sys.stderr)
    if not faults:
        print("everything adds up")
    return 1 if faults else 0


def find_faults(options: Options, report: Report, now: Statistics, by_worker: dict[str, int]) -> list[str]:
    """Says what does not add up at the end."""
    due, done, executed = report.due, report.done(now), report.executed.total()
    again = [run for run, times in report.executed.items() if times > 1]
    checks = (
        (report.start.enqueued == options.jobs, "no job is enabled, so no run was enqueued"),
        (
            report.inconsistent == 0,
            f"{report.inconsistent} of {report.snapshots} snapshots were inconsistent",
        ),
        (due == done == executed, f"{due} runs were due, {executed} were executed, {done} are done"),
        (not again, f"{len(again)} runs were executed more than once, such as {again[:10]}"),
        (now.queued == now.running == 0, f"{now.queued} runs are still queued, {now.running} running"),
        (report.finished == by_worker, f"workers say {dict(report.finished)}, the database {by_worker}"),
    )
    return [fault for right, fault in checks if not right]


# The command line.


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many runs are done: a bar on a terminal where rich is installed, else lines."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("runs", total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    shown = -1

    def show(done: int) -> None:
        nonlocal shown
        tenths = done * 10 // total if total else 10
        if tenths > shown:
            shown = tenths
            print(f"jobu: {done} of {total} runs done", file=sys.stderr, flush=True)

    yield show


def print_report(
    options: Options,
    crontab: Crontab,
    report: Report,
    now: Statistics,
    seconds: float,
    pool: dict[str, object],
) -> None:
    """Prints what happened."""
    start = report.start
    entries, variables, skipped = len(crontab.entries), len(crontab.settings), len(crontab.malformed)
    by_number = sorted((int(worker.rpartition("/")[2]), runs) for worker, runs in report.finished.items())
    workers = [f"{number}: {runs}" for number, runs in by_number]
    values = [f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in pool.items()]
    for label, text in (
        ("crontab", f"{options.crontab} ({crontab.format} format)"),
        ("", f"{entries} entries, {variables} variables, {skipped} lines skipped"),
        ("jobs", f"{start.new} new, {start.changed} changed, {start.unchanged} unchanged"),
        ("", f"{start.disabled} disabled that are no longer in the crontab"),
        ("runs", f"{start.enqueued} enqueued, {start.before.queued} left over from an earlier start"),
        ("states", f"{now.queued} queued, {now.running} running, {now.done} done, {now.failed} failed"),
        ("workers", ", ".join(workers) or "had nothing to do"),
        ("readers", f"{report.snapshots} snapshots, {report.inconsistent} inconsistent"),
        ("time", f"{seconds:.2f} s under {options.backend}{' on uvloop' if options.uvloop else ''}"),
        ("pool", " ".join(values)),
    ):
        print(textwrap.fill(text, 110, initial_indent=f"{label:9}", subsequent_indent=" " * 9))


def parse_arguments() -> Options:
    """Reads the command line; ends the process with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="jobu",
        description="Reads a crontab, queues runs of its jobs, and lets workers do them (as an echo).",
    )
    add = parser.add_argument
    add("crontab", nargs="?", type=Path, default=HERE / "sample.crontab", help="default: sample.crontab")
    add("--format", choices=("system", "user", "auto"), default="auto", help="system: with a user column")
    add("--backend", choices=("asyncio", "trio"), default="asyncio", help="default: asyncio")
    add("--uvloop", action="store_true", help="asyncio on uvloop")
    add("--jobs", type=int, default=200, metavar="N", help="runs to queue, over all jobs (default: 200)")
    add("--workers", type=int, default=4, metavar="N", help="tasks that do runs (default: 4)")
    add("--readers", type=int, default=2, metavar="N", help="tasks that poll statistics (default: 2)")
    add("--seconds", type=float, default=0.005, metavar="S", help="what a run takes (default: 0.005)")
    add("--config", type=Path, help="settings (default: DATABASE_CONFIG or config/database.yaml)")
    options = Options(**vars(parser.parse_args()))
    if options.jobs < 0 or options.workers < 1 or options.readers < 1:
        parser.error("--jobs takes a number from 0, --workers and --readers from 1 up")
    if not 0 <= options.seconds < math.inf:
        parser.error("--seconds takes a number from 0 up")
    if options.uvloop and options.backend != "asyncio":
        parser.error("--uvloop goes with --backend asyncio")
    for module, wanted in (("trio", options.backend == "trio"), ("uvloop", options.uvloop)):
        if wanted and importlib.util.find_spec(module) is None:
            parser.error(f"{module} is not installed: install the extra `{module}` of this package")
    return options


def run(options: Options) -> int:
    """Reads the crontab and runs the service; returns the exit status."""
    try:
        crontab = read_crontab(options.crontab, None if options.format == "auto" else options.format)
    except OSError as error:
        print(f"jobu: cannot read {options.crontab}: {error.strerror}", file=sys.stderr)
        return 1
    for malformed in crontab.malformed:
        print(f"{options.crontab}:{malformed.line}: skipped: {malformed.reason}", file=sys.stderr)
    if options.config:
        configure(options.config)
    backend_options = {"use_uvloop": True} if options.uvloop else {}
    return anyio.run(serve, options, crontab, backend=options.backend, backend_options=backend_options)


def main() -> int:
    """Does what the command line says; all errors of the database are handled here, in one place."""
    status = 1
    try:
        status = run(parse_arguments())
    except* errors.DatabaseError as group:
        for leaf in leaves(group):
            print(f"jobu: {leaf}", file=sys.stderr)
    except* KeyboardInterrupt:  # before the service was ready for signals
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("jobu: interrupted; the next start goes on with what is left", file=sys.stderr)
        status = 130
    return status


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The errors in a task group's error, however deep."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
