"""Tests; a package so that `tests/sqlite3` can never shadow the standard library's module."""

import sys

if "pytest" in sys.modules:  # benchmarks and programs of the tests do without
    # What the tests share asserts, too, also where the interpreter leaves assertions out (PYTHONOPTIMIZE).
    for _name in ("cli", "contract", "docs", "driver", "postgresql", "programs", "robustness", "sqlite3"):
        sys.modules["pytest"].register_assert_rewrite(f"tests.{_name}")
