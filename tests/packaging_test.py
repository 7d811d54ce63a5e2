"""What is shipped: the wheel holds the package, all of it and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import database

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("hatchling")


def test_the_wheel(tmp_path: Path) -> None:
    """It contains `init.sql` and `py.typed`, nothing outside `database/`, and works from where it is unpacked."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("jobu_database-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert {"database/sqlite3/sql/init.sql", "database/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"database"}
    code = (
        "import anyio, database, pathlib; from database.sqlite3 import configure, get_db; print(database.__file__)\n"
        "configure({'database': {'sqlite': {'path': 'x.db'}}})\n"
        "async def main(): assert await get_db().fetch_value('SELECT count(*) FROM jobs') == 0\n"
        "anyio.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_source_distribution(tmp_path: Path) -> None:
    """It holds what it takes to test, check, document and release it, and nothing that was built; one version everywhere."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (sdist,) = tmp_path.glob("jobu_database-*.tar.gz")
    assert sdist.name == f"jobu_database-{database.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        ".ci/interpreters", ".ci/run", "Makefile", "mkdocs.yml", "config/database.yaml", "pyproject.toml", "LICENSE",
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "database/py.typed", "tests/conftest.py",
        "tests/packaging_test.py", "docs/index.md", "docs/examples/jobu.py",
    }  # fmt: skip
    assert not [
        name for name in names if "__pycache__" in name or ".venv" in name or name.startswith(("site/", "data/"))
    ]


def test_all_of_each_face() -> None:
    """What `__all__` names is there, and the engine-neutral face imports no engine."""
    import database
    import database.sqlite3

    for face in (database, database.sqlite3):
        assert all(hasattr(face, name) for name in face.__all__)
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = face.no_such_name
    code = "import sys, database; sys.exit(any(name.startswith('database.sqlite3') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
