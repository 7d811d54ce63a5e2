"""Import time, and the first query of a new process: each measured in an interpreter of its own."""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .store import POINT, WrongAnswerError, name_of

ROOT = Path(__file__).parents[2]
NEVER_AT_IMPORT = ("trio", "uvloop", "psycopg", "psycopg_pool", "rich", "pydantic", "sqlalchemy")
"""What the package may use but has no business to import before it is needed."""

_OURS = f"""
async def main():
    configure({{"database": {{"sqlite": {{"path": sys.argv[1], "init_sql": ""}}}}}})
    row = await get_db().fetch_one({POINT!r}, (7,))
    await close_all()
    return row
"""
_AIOSQLITE = f"""
async def main():
    async with aiosqlite.connect(sys.argv[1]) as db, db.execute({POINT!r}, (7,)) as cursor:
        return await cursor.fetchone()
"""
_AIOSQLITEPOOL = f"""
async def main():
    pool = SQLiteConnectionPool(lambda: aiosqlite.connect(sys.argv[1]))
    async with pool.connection() as connection:
        row = await (await connection.execute({POINT!r}, (7,))).fetchone()
    await pool.close()
    return row
"""
_SQLALCHEMY = f"""
async def main():
    engine = create_async_engine("sqlite+aiosqlite:///" + sys.argv[1])
    async with engine.connect() as connection:
        row = (await connection.execute(text({POINT.replace("?", ":key")!r}), {{"key": 7}})).one()
    await engine.dispose()
    return row
"""
_RUN = "import asyncio; row = asyncio.run(main())"

PROGRAMS: dict[str, tuple[tuple[str, ...], str, str]] = {
    # name: modules it needs, its import, its first query (none: imports only)
    "anyio, aiosql, yaml": (("anyio", "aiosql", "yaml"), "import anyio, aiosql, yaml", ""),
    "raw": ((), "import sqlite3", f"row = sqlite3.connect(sys.argv[1]).execute({POINT!r}, (7,)).fetchone()"),
    "database": (
        ("database.sqlite3",),
        "from database.sqlite3 import close_all, configure, get_db",
        _OURS + _RUN,
    ),
    "aiosqlite": (("aiosqlite",), "import aiosqlite", _AIOSQLITE + _RUN),
    "aiosqlitepool": (
        ("aiosqlite", "aiosqlitepool"),
        "import aiosqlite; from aiosqlitepool import SQLiteConnectionPool",
        _AIOSQLITEPOOL + _RUN,
    ),
    "sqlalchemy": (
        ("aiosqlite", "sqlalchemy"),
        "from sqlalchemy import text; from sqlalchemy.ext.asyncio import create_async_engine",
        _SQLALCHEMY + _RUN,
    ),
}

_PROGRAM = """
import json, sys, time
start = time.perf_counter()
{imports}
imported = time.perf_counter()
unasked = sorted(set({never!r}) & set(sys.modules))
row = None
{query}
answered = time.perf_counter()
print(json.dumps([imported - start, answered - start, row and list(row), unasked]))
"""


def programs(names: set[str] | None = None) -> list[str]:
    """The programs that can run here, of those named."""
    return [
        name
        for name, (modules, _, _) in PROGRAMS.items()
        if (names is None or name in names or "," in name) and all(_found(module) for module in modules)
    ]


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@cache
def _compile() -> None:
    """Write this package's bytecode, as pip does with whatever it installs; the clone that is measured may have none."""
    compileall.compile_dir(ROOT / "database", quiet=2)


def run(name: str, path: Path) -> dict[str, float]:
    """Run one program once; its figures in milliseconds."""
    _compile()
    _, imports, query = PROGRAMS[name]
    program = _PROGRAM.format(imports=imports, query=query, never=NEVER_AT_IMPORT)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    imported, answered, row, unasked = json.loads(done.stdout)
    metrics = {"import_ms": imported * 1000, "unasked": float(len(unasked))}
    if query:
        if row != [7, name_of(7)]:
            raise WrongAnswerError(f"key 7: {row}")
        metrics["first_query_ms"] = answered * 1000
    return metrics
