"""Public types and generated stubs, as mypy and pyright see them: `typing_cases.py`, and the program that uses a stub, have
no error but on the lines that must have one. Each checker runs once over both: reading the package is what takes long.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from database import stubs
from tests.typing.stubs_test import app, command

__all__ = ["app"]

CASES = Path(__file__).with_name("typing_cases.py")
ROOT = CASES.parents[2]


@pytest.fixture
def folder(app: Path) -> Path:
    """What is checked, with nothing else beside it: the package is found as an installed one is."""
    assert stubs.main(command(app)) == 0
    shutil.copy(CASES, app.parent)
    return app.parent


def compare(folder: Path, found: dict[tuple[str, int], str]) -> None:
    """Holds that exactly the wanted lines are errors, and says what is not as it should be."""
    wanted = {
        (name, number)
        for name in (CASES.name, "use.py")
        for number, line in enumerate((folder / name).read_text().splitlines(), 1)
        if line.endswith("# error")
    }
    assert {name for name, _ in wanted} == {CASES.name, "use.py"}
    unexpected = [
        f"{name}:{line}: {text}" for (name, line), text in sorted(found.items()) if (name, line) not in wanted
    ]
    missing = [f"{name}:{line}: no error" for name, line in sorted(wanted - set(found))]
    assert not unexpected + missing, "\n".join(unexpected + missing)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy(folder: Path) -> None:
    """mypy, strict, knows the types of decorated functions and of records; it finds the stub itself clean, knows both ways
    of calling, and finds each mistake.
    """
    done = run(
        folder,
        "mypy",
        "--strict",
        "--no-error-summary",
        "--hide-error-context",
        "--follow-imports=silent",
        f"--config-file={ROOT / 'pyproject.toml'}",
        "--cache-dir=/dev/null",
        ".",
    )
    found = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"(.*?):(\d+): error: (.*)", line):
            found[match[1], int(match[2])] = match[3]
    assert found, done.stdout + done.stderr
    compare(folder, found)


@pytest.mark.slow  # as mypy
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright(folder: Path) -> None:
    """pyright, strict, does likewise."""
    settings = {
        "typeCheckingMode": "strict",
        "reportPrivateUsage": True,
        "reportUnusedExpression": False,
        "extraPaths": [str(ROOT)],
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run(folder, "pyright", "--pythonpath", sys.executable, "--outputjson")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright cannot run here: {done.stdout[-200:]}{done.stderr[-200:]}")
    found = {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"]
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    }
    assert report["summary"]["filesAnalyzed"] >= 6
    compare(folder, found)
