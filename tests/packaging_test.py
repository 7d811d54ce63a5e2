"""What is shipped: the wheel holds the package, all of it and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import database

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as an installer would put it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("jobu_database-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """It contains `init.sql` and `py.typed`, beside `database/` only pytest's plugin, and works from where it is unpacked."""
    for name in ("database/sqlite3/sql/init.sql", "database/py.typed"):
        assert (unpacked / name).exists()
    assert {each.name for each in unpacked.iterdir() if each.suffix != ".dist-info"} == {
        "database",
        "jobu_database_pytest.py",
    }
    code = (
        "import anyio, database, pathlib; from database.sqlite3 import configure, get_db; print(database.__file__)\n"
        "configure({'database': {'sqlite': {'path': 'x.db'}}})\n"
        "async def main(): assert await get_db().fetch_value('SELECT count(*) FROM jobs') == 0\n"
        "anyio.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(unpacked)


TESTS = """
import database
def test_mine(): assert database.MINE == 1
"""


@pytest.mark.slow
def test_a_project_with_a_database_of_its_own(unpacked: Path, tmp_path: Path) -> None:
    """A `database.py` or `database/` of the project's stays its own; the plugin says so once, and only its fixtures fail."""
    quick = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:faker"]
    for name, file in (("module", "database.py"), ("package", "database/__init__.py")):
        project = tmp_path / name
        (project / file).parent.mkdir(parents=True)
        (project / file).write_text("MINE = 1\nsettings = errors = None\n")
        (project / "test_mine.py").write_text(TESTS)
        (project / "conftest.py").write_text("")
        environment = {**os.environ, "PYTHONPATH": str(unpacked)}
        commands = [["-m", "pytest"], ["-W", "error", "-m", "pytest", "-W", "error"]]
        for command in commands if name == "module" else commands[:1]:
            done = subprocess.run(
                [sys.executable, *command, *quick, "."],
                cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            text = done.stdout + done.stderr
            assert done.returncode == 0, text
            assert "1 passed" in text
            if command == commands[0]:
                assert "DatabaseShadowedWarning: the fixtures of jobu-database" in text
                assert "-p no:database" in text
        (project / "test_theirs.py").write_text("def test(db): pass\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *quick, "."],
            cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "1 passed, 1 warning, 1 error" in done.stdout, done.stdout
        assert f"what Python imports as `database` is {project / file}" in done.stdout
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "test_db.py").write_text(
        "from database.pytest_plugin import layer\nimport pytest, jobu_database_pytest\n"
        "def test(db, db_path): assert db.name == 'default' and layer is not None\n"
        "@pytest.fixture(scope='package')\ndef db_package(request): yield from layer(request)\n"
        "def test_mixed(db_package, db): assert db_package is db\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", *quick, "."],
        cwd=tmp_path / "plain", env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_messages_name_extras_and_no_index() -> None:
    """A missing extra is named; how the package is installed is for the docs to say, in one place."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
    named: set[str] = set()
    for file in (ROOT / "database").rglob("*.py"):
        text = file.read_text("utf-8")
        assert "pip install jobu" not in text, file
        assert "jobu-database[" not in text, file
        named |= set(re.findall(r"the extra `(\w+)`", text))
    assert {"cli", "elk", "otel", "postgresql"} <= named <= extras


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
