"""Mutants: a small fault is put into the package, and the tests must find it. `python -m tests.mutants -h`.

A copy of the checkout is changed, never the checkout itself. One run of the tests under coverage tells which of them execute
which line; a mutant is then shown to those that execute its line, quick ones first, until one fails or hangs. Not for
pytest to collect.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
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
OPTIONS = ["-q", "--quick", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not postgresql"]
TRIAL = ["-x", "-o", "faulthandler_timeout=30", "-o", "faulthandler_exit_on_timeout=true"]  # a mutant may hang
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
Trace = dict[str, Any]


def changes(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node: another node, or `pass` and the like."""
    other: Any = copy.copy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITES:
            other.ops = [OPPOSITES[type(op)]()]
            yield other
        case ast.BoolOp(values=values):
            yield from (_one_or(node, [each for each in values if each is not left]) for left in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.IfExp(test=test):
            other.test = ast.UnaryOp(ast.Not(), test)
            yield other
        case ast.Constant(value=bool() | int() | float() as value):
            yield ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.AugAssign():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return None"
        case ast.Break() | ast.Continue():
            yield "continue" if isinstance(node, ast.Break) else "break"
        case ast.If(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):  # they have a change of their own
            yield "not"
        case ast.With(items=[ast.withitem(optional_vars=None)]):
            yield "if True"
        case ast.ExceptHandler():
            yield "raise"


def _one_or(node: ast.BoolOp, values: list[ast.expr]) -> ast.expr:
    return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """The line, what has been changed, and the text of the whole file."""
    data = source.encode()
    starts = [0]
    for row in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def span(first: Any, last: Any) -> tuple[int, int]:
        return starts[first.lineno - 1] + first.col_offset, starts[last.end_lineno - 1] + last.end_col_offset

    for node in ast.walk(ast.parse(source)):
        for change in changes(node):
            place: Any = node
            if isinstance(node, ast.If):
                begin, end = span(node.test, node.test)
                text = f"(not ({data[begin:end].decode()}))"
            elif isinstance(node, ast.With):
                begin, end = span(node, node.items[0].context_expr)
                text = "if True"
            elif isinstance(node, ast.ExceptHandler):
                begin, end = span(node.body[0], node.body[-1])
                text, place = "raise", node.body[0]
            elif isinstance(change, str):
                begin, end = span(node, node)
                text = change
            else:
                begin, end = span(node, node)
                text = f"({ast.unparse(change)})"
            before = data[begin:end].decode()
            more = before.count("\n") - text.count("\n")
            kept = text[:-1] + "\n" * more + ")" if text.endswith(")") else text + "\n" * more
            changed = (data[:begin] + kept.encode() + data[end:]).decode()
            try:
                compile(changed, "mutant", "exec")
            except SyntaxError:  # in the middle of an f-string, or `raise` on the line of its handler
                continue
            yield place.lineno, f"{' '.join(before.split())[:90]} -> {' '.join(text.split())[:90]}", changed


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
    pytest.main([*OPTIONS, *folders], plugins=[watched])
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
        path, left = self.root / module, self.budget
        original = path.read_text()
        self.write(path, text)
        try:
            for chunk in (tests[:20], tests[20:]):
                chosen: list[str] = []
                for test in chunk:
                    left -= self.known["seconds"][test]
                    if left > 0 or not chosen:
                        chosen.append(test)
                if chosen and (killer := self.killer(chosen)):
                    self.kills[killer] += 1
                    return f"killed by {killer}"
                if left <= 0:
                    break
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
        try:
            done = inside(self.root, ["-m", "pytest", f"@{arguments}"], capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            return "a hang that nothing ended"
        if done.returncode == 0:
            return ""
        found = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
        return found[0].split(" - ")[0].split(" ", 1)[1] if found else f"a hang or an end ({done.returncode})"


def inside(root: Path, arguments: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "HANGING": "6"}
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, check=False, **more)


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
            shutil.copytree(
                ".", root, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "site", ".*cache")
            )
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
