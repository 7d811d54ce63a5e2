"""The pytest plugin, used as its users use it: whole small projects, each run by a pytest of its own."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests import programs

pytest_plugins = ["pytester"]

BACKENDS = """
    import pytest
    @pytest.fixture(scope="session", params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ])
    def anyio_backend(request):
        return request.param
"""
SETUP = """
    @pytest.fixture(scope="session")
    def database_setup():
        return "CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)"
"""
HEAD = """
    import anyio, pytest, threading
    from database.sqlite3 import close_all, configure, get_db, lifespan, transactional, transactional_readonly
    from database import errors
    pytestmark = pytest.mark.anyio

    async def names(db=get_db()):
        return [row["name"] for row in await db.fetch_all("SELECT name FROM job ORDER BY id")]

    async def add(name, db=get_db()):
        await db.execute("INSERT INTO job (name) VALUES (?)", (name,))
"""


class Project:
    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makeini("[pytest]\nfilterwarnings = error\n")

    def write(self, name: str, *parts: str) -> None:
        path = self.pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(textwrap.dedent(part) for part in parts))

    def passes(self, count: int, *arguments: str) -> None:
        self.run(*arguments).assert_outcomes(passed=count)

    def run(self, *arguments: str) -> pytest.RunResult:
        """Runs its tests in a process of their own."""
        status, out, err = programs.run([*programs.PYTEST, *arguments], self.pytester.path, timeout=300)
        return pytest.RunResult(status, out.splitlines(), err.splitlines(), 0)

    def leaves(self) -> list[str]:
        """Files that are there in the end, but for the sources."""
        return sorted(
            str(path.relative_to(self.pytester.path))
            for path in self.pytester.path.rglob("*.db*")
            if "pytest-of" not in str(path)
        )


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("DATABASE_CONFIG", raising=False)
    return Project(pytester)


def test_what_a_test_does_is_undone(project: Project) -> None:
    """Whatever is committed, left open or left running in one test, the next one finds the tables as they were set up."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "test_it.py",
        HEAD,
        """
        @pytest.mark.parametrize("kind", [
            "autocommit", "decorated", "manual", "left open", "cancelled", "script", "vacuum", "other tasks",
        ])
        async def test(db, kind):
            assert db is get_db()
            assert await names() == []
            assert not db.in_transaction
            if kind == "autocommit":
                await add("a")
            elif kind == "decorated":
                await transactional(add)("a")
                await transactional(offload=True)(add)("b")
                with pytest.raises(errors.ReadOnlyTransactionError):
                    await transactional_readonly(add)("c")
            elif kind == "manual":
                await db.begin()
                await add("a")
                await db.commit()
                await db.begin()
                await add("b")
                await db.rollback()
                assert await names() == ["a"]
            elif kind == "left open":
                await db.begin()
                await add("a")
            elif kind == "cancelled":
                with anyio.move_on_after(0.01):
                    await db.execute("INSERT INTO job (name) WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c"
                                     " WHERE x < 100000000) SELECT count(*) FROM c")
                await add("a")
                assert await names() == ["a"]
            elif kind == "script":
                await db.execute_script("DROP TABLE job; CREATE TABLE other (a)")
            elif kind == "vacuum":
                await add("a")
                await db.execute("VACUUM")
            else:
                async with db.transaction(), anyio.create_task_group() as group:
                    await add("a")
                    with db.detached():
                        assert await names() == []  # a reader of its own sees what is committed, as in production
                    group.start_soon(add, "b")
                assert len(await names()) == 2
        """,
    )
    project.passes(24)
    assert project.leaves() == []


def test_functions_decorated_where_applications_decorate_them(project: Project) -> None:
    """Decorated when their module is imported, long before a test: they take part in the test's own database all the same."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "app.py",
        """
        from database.sqlite3 import get_db, transactional, transactional_readonly
        db = get_db()
        INSERT = "INSERT INTO job (name) VALUES (?)"

        @transactional
        async def create(*names, fail=False):
            assert db.in_transaction
            for name in names:
                await db.execute(INSERT, (name,))
            if fail:
                raise KeyError(names)

        @transactional(offload=True)
        async def offloaded(*names, fail=False):
            await create(*names, fail=fail)

        @transactional_readonly
        async def count():
            return await db.fetch_value("SELECT count(*) FROM job")
        """,
    )
    project.write(
        "test_it.py",
        HEAD,
        """
        import app
        @pytest.mark.parametrize("function", [app.create, app.offloaded])
        async def test(db, function):
            with pytest.raises(KeyError):
                await function("a", fail=True)
            assert await app.count() == 0
            await function("a")
            with pytest.raises(KeyError):
                async with db.transaction():
                    await add("b")
                    await function("c")  # in the transaction of its caller, not beside it
                    raise KeyError
            assert await names() == ["a"]
        """,
    )
    project.passes(6)
    assert project.leaves() == []


def test_commit_rollback_and_on_commit_as_in_production(project: Project) -> None:
    """Callbacks run after the commit, commit() makes permanent, a failure undoes its own level, as without the plugin."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "test_it.py",
        HEAD,
        """
        async def test(db):
            told = []

            @transactional
            async def inner(fail):
                await add("inner")
                db.on_commit(lambda: told.append("inner"))
                if fail:
                    raise LookupError

            @transactional(timeout=5, retries=2)
            async def outer(fail):
                await add("outer")
                await db.commit()
                db.on_commit(lambda: told.append("outer"))
                with pytest.raises(LookupError):
                    await inner(True)
                assert told == []
                if fail:
                    raise KeyError

            with pytest.raises(KeyError):
                await outer(True)
            assert await names() == ["outer"]
            assert told == []
            await db.execute("DELETE FROM job")
            await outer(False)
            assert told == ["outer"]
            await inner(False)
            assert told == ["outer", "inner"]
            with pytest.raises(errors.TransactionError):
                await db.commit()
            async with db.transaction(propagation="requires_new"):
                await add("new")
            assert db.stats().commits_total >= 3
        """,
    )
    project.passes(3)


def test_fixtures_of_every_scope(project: Project) -> None:
    """Asynchronous fixtures of each scope add to what narrower ones and tests see; with its scope, it is gone again."""
    project.write(
        "pkg/conftest.py",
        """
        import pytest
        from database.pytest_plugin import layer

        @pytest.fixture(scope="package")
        def db_package(request):
            yield from layer(request)

        @pytest.fixture(scope="package", autouse=True)
        async def of_package(db_package):
            await db_package.execute("INSERT INTO job (name) VALUES ('package')")
        """,
    )
    project.write("pkg/__init__.py", "")
    project.write(
        "conftest.py",
        BACKENDS,
        SETUP,
        """
        @pytest.fixture(scope="session", autouse=True)
        async def of_session(db_session):
            await db_session.execute("INSERT INTO job (name) VALUES ('session')")
            yield
            names = await db_session.fetch_all("SELECT name FROM job")
            assert [name for name, in names] == ["session"]
        """,
    )
    module = """
        @pytest.fixture(scope="module", autouse=True)
        async def of_module(db_module):
            async with db_module.transaction():
                await add("module")
            yield
            assert await names() == [*WIDER, "module"]

        @pytest.fixture
        async def of_function(db):
            await transactional(add)("function")
            yield
            assert (await names())[-1] == "test"

        class TestClass:
            @pytest.fixture(scope="class", autouse=True)
            async def of_class(self, db_class):
                await add("class")

            @pytest.mark.parametrize("number", range(2))
            async def test(self, of_function, db, number):
                assert await names() == [*WIDER, "module", "class", "function"]
                await add("test")

        @pytest.mark.parametrize("number", range(2))
        async def test(db, of_function, number):
            assert await names() == [*WIDER, "module", "function"]
            await add("test")

        async def test_the_module_itself(of_module):
            assert await names() == [*WIDER, "module"]
    """
    project.write("test_one.py", HEAD, 'WIDER = ["session"]\n', module)
    project.write("pkg/test_two.py", HEAD, 'WIDER = ["session", "package"]\n', module)
    project.passes(30)


def test_other_databases_and_other_configurations(project: Project) -> None:
    """Every configured database is copied; a module may have settings of its own; `configure()` cannot get round it."""
    project.write(
        "config/database.yaml",
        """
        database:
          sqlite:
            path: "./real/jobs.db"
            init_sql: "schema.sql"
            pool_size: 1
            databases:
              audit: {path: "./real/audit.db", synchronous: FULL}
        """,
    )
    project.write("schema.sql", "CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT);")
    project.write("conftest.py", BACKENDS)
    project.write(
        "test_all.py",
        HEAD,
        """
        audit = get_db("audit")

        @transactional(db=("default", "audit"))
        async def both():
            await add("a")
            await add("b", audit)

        @pytest.mark.parametrize("number", range(2))
        async def test(db, number):
            configure({"database": {"sqlite": {"path": "./real/other.db"}}})
            async with lifespan():
                await both()
                assert (await names(), await names(audit)) == (["a"], ["b"])
            assert (await names(), await names(audit)) == (["a"], ["b"])
            assert db.stats().pool_size == 1
            assert await db.fetch_value("PRAGMA synchronous") == 0
        """,
    )
    project.write(
        "test_own.py",
        HEAD,
        """
        @pytest.fixture(scope="module")
        def database_config():
            return {"database": {"sqlite": {"path": ":memory:", "pool_size": 3, "init_sql": ""}}}

        @pytest.fixture(scope="module")
        def database_setup():
            async def create(db):
                await db.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT)")
                await add("set up")
            return create

        @pytest.mark.parametrize("number", range(2))
        async def test(db, number):
            assert await names() == ["set up"]
            await add("more")
            assert db.stats().pool_size == 3
        """,
    )
    project.write("sql/0001_first.sql", "CREATE TABLE job (id INTEGER PRIMARY KEY);")
    project.write(
        "sql/0002_second.sql", "ALTER TABLE job ADD COLUMN name TEXT; INSERT INTO job (name) VALUES ('migrated');"
    )
    project.write(
        "test_migrated.py",
        HEAD,
        """
        from pathlib import Path

        @pytest.fixture(scope="module")
        def database_config():
            return {"database": {"sqlite": {"path": ":memory:", "init_sql": ""}}}

        @pytest.fixture(scope="module")
        def database_setup():
            return [Path("sql"), "INSERT INTO job (name) VALUES ('then')"]

        async def test(db):
            assert await names() == ["migrated", "then"]
        """,
    )
    project.passes(15)
    assert project.leaves() == []


def test_connections_that_need_preparing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of an encrypted database, of what is attached to it, and copies of those copies while they are in use, have
    the same key, extensions and functions.
    """
    for needed in ("sqlcipher3", "sqlite_vec"):
        pytest.importorskip(needed)
    monkeypatch.setenv("TEST_KEY", "it's secret")
    project.write(
        "conftest.py",
        """
            import pytest, sqlcipher3

            # A key for what is attached is made in fewer rounds, too: by default it takes longer than all else.
            outside = sqlcipher3.connect(":memory:")
            outside.execute("PRAGMA cipher_default_kdf_iter = 2000")
            outside.close()

            @pytest.fixture(scope="session")
            def anyio_backend():
                return "asyncio"

            def prepare(connection):
                connection.create_function("shout", 1, str.upper)

            @pytest.fixture(scope="session")
            def database_config(tmp_path_factory):
                folder = tmp_path_factory.mktemp("real")
                return {"database": {"sqlite": {
                    "path": str(folder / "x.db"), "pool_size": 1, "init_sql": "", "module": "sqlcipher3", "key_env": "TEST_KEY",
                    "pragmas": {"kdf_iter": 1000, "cipher_page_size": 8192}, "extensions": ["sqlite_vec"],
                    "attach": {"archive": str(folder / "archive.db")}, "on_connect": prepare,
                }}}

            @pytest.fixture(scope="session")
            def database_setup():
                async def make(db):
                    await db.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT)")
                    await db.execute("CREATE TABLE archive.job (id INTEGER PRIMARY KEY, name TEXT)")
                    await db.execute("CREATE VIRTUAL TABLE place USING vec0(at float[2])")
                return make
        """,
    )
    project.write(
        "test_app.py",
        HEAD,
        """
            from pathlib import Path

            async def archived(db):
                return [row[0] for row in await db.fetch_all("SELECT shout(name) FROM archive.job ORDER BY id")]

            @pytest.fixture(scope="module")
            async def filled(anyio_backend, db_module):
                await add("a")
                await db_module.execute("INSERT INTO archive.job (name) VALUES ('a')")

            @pytest.mark.parametrize("time", [1, 2])
            async def test_a_copy_of_a_copy(filled, db, time):
                await add("b")
                await db.execute("INSERT INTO archive.job (name) VALUES ('b')")
                await db.execute("INSERT INTO place (rowid, at) VALUES (1, '[1, 2]')")
                assert (await names(), await archived(db)) == (["a", "b"], ["A", "B"])
                for row in await db.fetch_all("SELECT file FROM pragma_database_list"):
                    assert not Path(row[0]).read_bytes().startswith(b"SQLite format 3")
        """,
    )
    project.passes(2)


def test_the_file_variant(project: Project) -> None:
    """`db_file` is a file on the disk, as safe as configured, which others can open; `db_path` says where."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "test_it.py",
        HEAD,
        """
        import sqlite3

        @pytest.fixture(scope="session")
        def database_config():
            return {"database": {"sqlite": {"path": "jobs.db", "synchronous": "FULL", "init_sql": ""}}}

        @pytest.mark.parametrize("number", range(2))
        async def test(db_file, db_path, tmp_path, number):
            assert await names() == []
            await transactional(add)("a")
            assert db_path == tmp_path / "database" / "default.db"
            connection = sqlite3.connect(db_path)
            assert connection.execute("SELECT name FROM job").fetchall() == [("a",)]
            connection.close()
            assert await db_file.fetch_value("PRAGMA synchronous") == 2
            assert await db_file.fetch_value("PRAGMA journal_mode") == "wal"

        async def test_path_of_the_other(db, db_path):
            assert db_path.is_file()
        """,
    )
    project.passes(9)
    assert project.leaves() == []


def test_tests_that_are_no_coroutines(project: Project) -> None:
    """Ordinary tests, whose code runs on event loops of its own or on other threads, are isolated likewise."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "test_it.py",
        HEAD.replace("pytestmark = pytest.mark.anyio", ""),
        """
        from anyio.from_thread import start_blocking_portal

        @pytest.mark.parametrize("backend", ["asyncio", "trio"])
        @pytest.mark.parametrize("number", range(2))
        def test_run(db, backend, number):
            async def main():
                assert await names() == []
                await add("a")
            anyio.run(main, backend=backend)
            async def again():
                return await names()
            assert anyio.run(again, backend=backend) == ["a"]

        @pytest.mark.parametrize("backend", ["asyncio", "trio"])
        @pytest.mark.parametrize("number", range(2))
        def test_portal(db, backend, number):
            with start_blocking_portal(backend) as portal:
                portal.call(add, "a")
                with start_blocking_portal(backend) as other:
                    assert other.call(names) == ["a"]

        @pytest.fixture(scope="module", params=["asyncio", "trio"])
        def server(request):
            with start_blocking_portal(request.param) as portal:
                yield portal

        @pytest.mark.parametrize("number", range(3))
        def test_server_that_outlives_the_test(server, db, number):
            assert server.call(names) == []
            server.call(add, "a")

        def test_no_thread_is_left():
            for thread in threading.enumerate():
                if thread.name.startswith("database-"):
                    thread.join(5)
                    assert not thread.is_alive(), thread.name
        """,
    )
    project.passes(15)


def test_misuse_is_explained(project: Project) -> None:
    """What cannot work ends in a message that says what to do: wrong order, both variants, a broken setup."""
    project.write("conftest.py", "import pytest\n", SETUP)
    project.write(
        "test_it.py",
        """
        import pytest

        def test_order(db, request):
            with pytest.raises(pytest.UsageError, match="db_module is requested when a layer of scope 'function' is open"):
                request.getfixturevalue("db_module")

        def test_both(db, request):
            with pytest.raises(pytest.UsageError, match="not both"):
                request.getfixturevalue("db_file")

        class TestBroken:
            @pytest.fixture(scope="session")
            def database_setup(self):
                return "SELEKT"

            @pytest.mark.xfail(raises=Exception, strict=True)
            def test(self, db):
                pass
        """,
    )
    result = project.run("-rx")
    result.assert_outcomes(passed=2, xfailed=1)
    project.write("config/database.yaml", "database: {sqlite: {pathh: x}}")
    result = project.run("-k", "test_both")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*config/database.yaml:1: database.sqlite.pathh: unknown key; did you mean 'path'?*"])


def test_it_keeps_out_of_the_way(project: Project) -> None:
    """A project with its own fixture `db` keeps it; one that does not use the plugin imports nothing but it."""
    project.write(
        "test_it.py",
        """
        import sys, pytest

        def test_not_imported():
            for name in ("database.session.database", "database.sqlite3", "database.sandbox", "aiosql", "yaml", "_sqlite3"):
                assert name not in sys.modules, name

        @pytest.fixture
        def db():
            return "mine"

        def test_own(db):
            assert db == "mine"

        @pytest.mark.anyio
        async def test_both(db, db_function, anyio_backend_name):
            assert await db_function.fetch_value("SELECT 1") == 1
        """,
    )
    project.pytester.runpytest_subprocess(*programs.PYTEST[2:], timeout=300).assert_outcomes(
        passed=4
    )  # a new interpreter


def test_a_loop_that_is_paused(project: Project) -> None:
    """A module's asynchronous fixture keeps its loop, and its pool, across the tests' layers; nothing of it is lost."""
    project.write("conftest.py", BACKENDS, SETUP)
    project.write(
        "test_it.py",
        HEAD,
        """
        import sqlite3
        from contextvars import Context

        @pytest.fixture(scope="module")
        async def service(db_module):
            async with db_module.transaction(readonly=True):  # keeps a connection, and its snapshot, over all tests
                await db_module.fetch_value("SELECT 1")
                await db_module.detached().__class__ and None
                yield "service"

        @pytest.fixture(scope="module", autouse=True)
        async def other(anyio_backend):
            yield

        @pytest.mark.parametrize("number", range(3))
        async def test(service, db, number):
            assert await names() == []
            await add("a")

        @pytest.mark.parametrize("number", range(2))
        def test_plain(service, db, db_path, number):
            thread = threading.Thread(target=lambda: Context().run(anyio.run, add, "a"))
            thread.start()
            thread.join()
            connection = sqlite3.connect(db_path)
            assert connection.execute("SELECT name FROM job").fetchall() == [("a",)]
            connection.close()
        """.replace("                await db_module.detached().__class__ and None\n", ""),
    )
    project.passes(15)


def test_the_guide(project: Project) -> None:
    """The guide's test modules pass as they stand there."""
    guide = Path(__file__).parents[2] / "docs" / "guides" / "pytest-plugin.md"
    modules = re.findall(r'```python title="(\w+\.py)"\n(.*?)```', guide.read_text("utf-8"), re.DOTALL)
    modules = [each for each in modules if each[0] in ("jobs.py", "conftest.py", "test_jobs.py")]
    for name, text in modules:
        project.write(name, text)
    assert len(modules) == 3
    project.passes(6)
    assert project.leaves() == []
