"""Mutants: a small fault is put into the package, and the tests must find it. `python -m tests.mutants -h`.

A copy of the checkout is changed, never the checkout itself. One run of the tests under coverage tells which of them execute
which line; a mutant is then shown to those that execute its line, quick ones first, until one fails or hangs. Not for
pytest to collect.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

TESTS = ["contract", "driver", "session", "sqlite3", "robustness"]
OPTIONS = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not postgresql"]
TRIAL = ["-x", "-o", "faulthandler_timeout=30", "-o", "faulthandler_exit_on_timeout=true"]  # a mutant may hang
HANG = 45  # seconds beyond its budget until a run is ended: longer than faulthandler waits for one test
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
Trace = dict[str, Any]


def changes(node: Any) -> Iterator[tuple[Any, Any, ast.expr | str]]:
    """What may be replaced, from which node to which, and by what."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=right) if type(op) in OPPOSITES:
            yield node, node, ast.Compare(left, [OPPOSITES[type(op)]()], right)
        case ast.BoolOp(op=op, values=[left, right]):
            yield from ((node, node, right), (node, node, left))
        case ast.BoolOp(op=op, values=values):
            for each in values:
                yield node, node, ast.BoolOp(op, [other for other in values if other is not each])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, node, operand
        case ast.IfExp(test=test):
            yield test, test, ast.UnaryOp(ast.Not(), test)
        case ast.If(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):  # they have a change of their own
            if not (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"):
                yield test, test, ast.UnaryOp(ast.Not(), test)
        case ast.Constant(value=bool() | int() | float() as value):
            yield node, node, ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.AugAssign():
            yield node, node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield node, node, "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield node, node, "return None"
        case ast.Break() | ast.Continue():
            yield node, node, "continue" if isinstance(node, ast.Break) else "break"
        case ast.With(items=[ast.withitem(context_expr=context, optional_vars=None)]):
            yield node, context, "if True"
        case ast.ExceptHandler(body=body):
            yield body[0], body[-1], "raise"


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """The line, what has been changed, and the text of the whole file."""
    data = source.encode()
    starts = [0, *itertools.accumulate(len(row) for row in data.splitlines(keepends=True))]
    for first, last, change in itertools.chain.from_iterable(map(changes, ast.walk(ast.parse(source)))):
        begin = starts[first.lineno - 1] + first.col_offset
        end = starts[last.end_lineno - 1] + last.end_col_offset
        before = data[begin:end].decode()
        text = change if isinstance(change, str) else f"({ast.unparse(change)})"
        more = "\n" * before.count("\n")  # every line keeps its number
        kept = text + more if isinstance(change, str) else text[:-1] + more + ")"
        changed = (data[:begin] + kept.encode() + data[end:]).decode()
        with contextlib.suppress(SyntaxError):  # in the middle of an f-string, or `raise` on the line of its handler
            compile(changed, "mutant", "exec")
            yield first.lineno, f"{' '.join(before.split())[:90]} -> {text[:90]}", changed


class Watched:
    """A plugin of pytest: tells what each test executes, and how long it takes."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.measured.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration


def trace(folders: list[str], file: Path) -> None:
    """Runs the tests once; writes down how long each took, and which executes which line."""
    measured = coverage.Coverage(data_file=None, source=["database"], branch=False, config_file=False)
    watched = Watched(measured)
    measured.start()
    pytest.main([*OPTIONS, "--quick", *folders], plugins=[watched])
    measured.stop()
    data = measured.get_data()
    number = {test: index for index, test in enumerate(watched.seconds)}
    lines = {
        os.path.relpath(path): {
            line: [number[test] for test in tests if test] for line, tests in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }
    file.write_text(json.dumps({"seconds": watched.seconds, "lines": lines}))


class Trials:
    """Mutants in a copy of the checkout."""

    def __init__(self, root: Path, known: Trace, seed: int, budget: float) -> None:
        self.root, self.known, self.budget = root, known, budget
        self.random = random.Random(seed)
        self.kills: dict[str, int] = defaultdict(int)
        self.changed = time.time() - 1e8

    def candidates(self, module: str, line: int) -> list[str]:
        """The tests that execute the line; where no test does by itself, for it runs on import, those of its module."""
        lines = self.known["lines"].get(module, {})
        here = [lines[str(number)] for number in statement(self.root / module, line) if str(number) in lines]
        numbers = {number for executed in here for number in executed}
        if here and not numbers:
            numbers = {number for executed in lines.values() for number in executed}
        seconds = self.known["seconds"]
        tests = [test for number, test in enumerate(seconds) if number in numbers]
        return sorted(tests, key=lambda test: (-self.kills[test], seconds[test] * self.random.random(), test))

    def run(self, module: str, line: int, text: str) -> str:
        """How it went: `killed by …`, `survived`, or `not executed`."""
        tests = self.candidates(module, line)
        if not tests:
            return "not executed"
        spent = itertools.accumulate(self.known["seconds"][test] for test in tests)
        tests = [test for test, seconds in zip(tests, spent, strict=True) if seconds < self.budget] or tests[:1]
        path = self.root / module
        original = path.read_text()
        self.write(path, text)
        try:
            for chunk in (tests[:20], tests[20:]):
                if chunk and (killer := self.killer(chunk)):
                    self.kills[killer] += 1
                    return f"killed by {killer}"
        finally:
            self.write(path, original)
        return "survived"

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        self.changed += 2  # what is compiled is told from what was by its time, in seconds, and its size
        os.utime(path, (self.changed, self.changed))

    def killer(self, tests: list[str]) -> str:
        """The test that fails; empty if none does."""
        arguments = self.root / ".trial"  # there may be more than a command line holds
        arguments.write_text("\n".join([*OPTIONS, *TRIAL, *tests]))
        output = self.root / ".output"
        with output.open("w") as file:
            ended = inside(self.root, ["-m", "pytest", f"@{arguments}"], self.budget + HANG, stdout=file, stderr=file)
        if ended == 0:
            return ""
        found = [line for line in output.read_text().splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
        return found[0].split(" - ")[0].split(" ", 1)[1] if found else f"a hang or an end ({ended})"


def inside(root: Path, arguments: list[str], limit: float | None = None, **more: Any) -> int | None:
    """Runs Python in the copy, and says how it ended; None if it did not in time. Nothing of it is left running."""
    environment = {**os.environ, "PYTHONPATH": str(root), "HANGING": "6"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=root, env=environment, start_new_session=True, **more)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def statement(path: Path, line: int) -> range:
    """The lines of the statement at this line; of a compound one, its head."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            if node.lineno <= line <= max(last, node.lineno):
                found = range(node.lineno, max(last, node.lineno) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", nargs="*", help="folders, files, or lines: database/driver/line.py:88")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sample", type=int, help="how many mutants; all, if not given")
    parser.add_argument("--budget", type=float, default=30, help="seconds of tests for each mutant")
    parser.add_argument("--tests", nargs="+", default=[f"tests/{name}" for name in TESTS])
    parser.add_argument("--known", type=Path, help="file that keeps which test executes what; made where it is missing")
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trace:
        trace(given.tests, given.trace)
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "copy"
            shutil.copytree(".", root, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*cache"))
            try_all(root, given)


def try_all(root: Path, given: argparse.Namespace) -> None:
    known_file = given.known.absolute() if given.known else root / ".known"
    if not known_file.exists():
        inside(root, ["-m", "tests.mutants", "--trace", str(known_file), "--tests", *given.tests])
    found = []
    for each in given.where:
        name, _, number = each.partition(":")
        for path in sorted(Path(name).rglob("*.py")) if Path(name).is_dir() else [Path(name)]:
            found += [(str(path), *mutant) for mutant in mutants(path.read_text()) if number in ("", str(mutant[0]))]
    if given.sample is not None:
        found = random.Random(given.seed).sample(found, min(given.sample, len(found)))
    trials = Trials(root, json.loads(known_file.read_text()), given.seed, given.budget)
    counts: dict[str, int] = defaultdict(int)
    for module, line, what, text in found:
        began = time.monotonic()
        outcome = trials.run(module, line, text)
        counts[outcome.partition(" by ")[0]] += 1
        print(f"{module}:{line}: {what}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
