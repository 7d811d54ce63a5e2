"""``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import charts, cold, report, store
from .contenders import BACKENDS, RAW_AND_OURS
from .growth import Growth
from .neighbours import NEIGHBOURS
from .runner import Results, Runner
from .workloads import QUICK, WORKLOADS, Plan

ALL_WORKLOADS = (*WORKLOADS, "cold")
BASE = tuple(contender.name for contender in RAW_AND_OURS)
PEERS = tuple(contender.name for contender in NEIGHBOURS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure this package beside raw sqlite3 and its neighbours. Every answer is checked.",
    )
    found.add_argument("--quick", action="store_true", help="everything once and briefly: shows that it works")
    found.add_argument("--only", nargs="+", choices=ALL_WORKLOADS, metavar="WORKLOAD", help=", ".join(ALL_WORKLOADS))
    found.add_argument(
        "--contenders", nargs="+", choices=BASE, default=list(BASE), metavar="NAME", help=", ".join(BASE)
    )
    found.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        metavar="NAME",
        help=f"without names: none; default: all that are installed of {', '.join(PEERS)}",
    )
    found.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        default=["asyncio"],
        metavar="LOOP",
        help=", ".join(BACKENDS),
    )
    found.add_argument("--rounds", type=int, default=None, help="default: 3, or 1 with --quick")
    found.add_argument("--seconds", type=float, default=None, help="of one contender in one round; default: 1")
    found.add_argument("--dir", type=Path, default=None, help="where the database files go; default: a real disk")
    found.add_argument("--growth", action="store_true", help="how cost grows, in place of the workloads")
    found.add_argument("--full", action="store_true", help="with --growth: tables of 10 million rows, too")
    found.add_argument("--json", type=Path, metavar="FILE", help="write all rounds")
    found.add_argument("--markdown", type=Path, metavar="FILE", help="write the report, which is printed otherwise")
    found.add_argument("--charts", type=Path, metavar="DIR", help="write SVG charts")
    found.add_argument(
        "--load", nargs="+", type=Path, metavar="FILE", help="measure nothing: report on JSON written before"
    )
    return found


def measure(arguments: argparse.Namespace) -> Results:
    """Run what was asked for."""
    plan = QUICK if arguments.quick else Plan()
    if arguments.seconds is not None:
        plan = Plan(seconds=arguments.seconds, bulk=plan.bulk, repeats=plan.repeats, slow_seconds=plan.slow_seconds)
    runner = Runner(
        store.working_folder(arguments.dir),
        plan=plan,
        contenders=[*arguments.contenders, *arguments.peers],
        backends=arguments.backend,
        rounds=arguments.rounds or (1 if arguments.quick else 3),
    )
    try:
        if arguments.growth:
            runner.results.growth = Growth(runner, quick=arguments.quick, full=arguments.full).run()
        else:
            for name in arguments.only or ALL_WORKLOADS:
                runner.run([name])
                save(runner.results, arguments.json)  # what is done is kept, should a later one be interrupted
    finally:
        runner.clean_up()
    return runner.results


def save(results: Results, file: Path | None) -> None:
    """Write all rounds, if a file is given."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(results.to_json())


def load(files: Sequence[Path]) -> Results:
    """Put runs of different workloads and of growth together; the first one's machine stands."""
    first, *others = (Results.from_json(file.read_text()) for file in files)
    for other in others:
        first.samples += other.samples
        first.growth += other.growth
    return first


def main(command: Sequence[str] | None = None) -> int:
    """Measure or load, then report; 1 if raw or this package answered wrongly or failed."""
    arguments = parser().parse_args(command)
    results = load(arguments.load) if arguments.load else measure(arguments)
    save(results, arguments.json)
    text = report.markdown(results)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text)
    else:
        print(text)
    if arguments.charts:
        charts.write(results, arguments.charts)
    neighbours = {*PEERS, *cold.PROGRAMS} - {*BASE}
    failed = [sample for sample in results.samples if sample.error and sample.contender not in neighbours]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
