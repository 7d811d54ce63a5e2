"""Public types, as mypy and pyright see them: `typing_cases.py` has no error but on the lines that must have
one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("typing_cases.py")
ROOT = CASES.parents[2]


def wanted() -> set[int]:
    """Lines that must be errors."""
    return {number for number, line in enumerate(CASES.read_text().splitlines(), 1) if line.endswith("# error")}


def compare(found: dict[int, str]) -> None:
    """Holds that exactly the wanted lines are errors, and says what is not as it should be."""
    unexpected = [f"{CASES.name}:{number}: {text}" for number, text in sorted(found.items()) if number not in wanted()]
    missing = [f"{CASES.name}:{number}: no error" for number in sorted(wanted() - set(found))]
    assert not unexpected + missing, "\n".join(unexpected + missing)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy(tmp_path: Path) -> None:
    """mypy, strict, knows the types of decorated functions and of records."""
    done = run(
        "mypy",
        "--strict",
        "--no-error-summary",
        "--hide-error-context",
        "--cache-dir",
        str(tmp_path),
        str(CASES),
    )
    found = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"(.*?):(\d+): error: (.*)", line):
            assert Path(match[1]).name == CASES.name, line
            found[int(match[2])] = match[3]
    assert found, done.stdout + done.stderr
    compare(found)


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright() -> None:
    """pyright, strict, knows the types of decorated functions and of records."""
    done = run("pyright", "--pythonpath", sys.executable, "--outputjson", str(CASES))
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright cannot run here: {done.stdout[-200:]}{done.stderr[-200:]}")
    found = {
        each["range"]["start"]["line"] + 1: each["message"]
        for each in report["generalDiagnostics"]
        if each["severity"] == "error" and Path(each["file"]).name == CASES.name
    }
    assert report["summary"]["filesAnalyzed"] == 1
    compare(found)
