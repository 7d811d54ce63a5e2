"""An HA stack as people run it: Patroni with etcd, two servers, synchronous replication. A switchover and a killed leader
under load: what was answered is there, what was told to be undone is not, and nothing is done twice.

`PATRONI` names Patroni's program where it is not on the path (pip install patroni[etcd3]); etcd comes with the system.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest

from database import errors
from database.postgresql import close_all, configure, get_db, transactional
from tests import watchdog
from tests.contract.support import eventually
from tests.postgresql.server import _as_user, _children, _dies_with_us, _home, _root, binaries, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PATIENCE = 180.0
"""Seconds against hanging: a leader's key lives for twenty, and servers start meanwhile."""

NODES = ("one", "two")
WORKERS = 6


@pytest.fixture(params=[pytest.param(("asyncio", {}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """One loop is enough here: the stack takes a minute."""
    return request.param


class Stack:
    """etcd, and Patroni for each node."""

    def __init__(self, patroni: str, etcd: str, place: Path) -> None:
        self.patroni = patroni
        self.home = _home() / "patroni"
        self.home.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        client, peer = free_port(), free_port()
        self.ports = {name: free_port() for name in NODES}
        self.rest = {name: free_port() for name in NODES}
        if _root():
            shutil.chown(self.home, "nobody")
        url, other = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self.start(
            "etcd",
            [etcd, "--data-dir", str(self.home / "etcd"), "--listen-client-urls", url, "--advertise-client-urls", url]
            + [
                "--listen-peer-urls",
                other,
                "--initial-advertise-peer-urls",
                other,
                "--initial-cluster",
                f"default={other}",
            ],
        )
        for name in NODES:
            (self.home / f"{name}.yml").write_text(json.dumps(self.configuration(name, client, place)))  # YAML, too
            self.start(name, [patroni, str(self.home / f"{name}.yml")])

    def configuration(self, name: str, etcd: int, place: Path) -> dict[str, Any]:
        rest = f"127.0.0.1:{self.rest[name]}"
        address = f"127.0.0.1:{self.ports[name]}"
        return {
            "scope": "test",
            "name": name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": f"127.0.0.1:{etcd}"},
            "bootstrap": {
                "dcs": {
                    "ttl": 20,
                    "loop_wait": 2,
                    "retry_timeout": 5,
                    "synchronous_mode": True,
                    "postgresql": {"use_pg_rewind": False, "parameters": {"max_connections": 60}},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"auth": "trust"}, "no-sync"],
            },
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(self.home / name),
                "bin_dir": str(place),
                "pgpass": str(self.home / f"{name}.pgpass"),
                "pg_hba": [
                    "local all all trust",
                    "host all all 127.0.0.1/32 trust",
                    "host replication all 127.0.0.1/32 trust",
                ],
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "replicator"},
                },
                "parameters": {"unix_socket_directories": str(self.home), "fsync": "off", "shared_buffers": "32MB"},
            },
        }

    def start(self, name: str, command: list[str]) -> None:
        with open(self.home / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.home,
                preexec_fn=_dies_with_us,
                start_new_session=True,
                env={**os.environ, "HOME": str(self.home)},
                **_as_user(),
            )
        watchdog.lasting.add(process.pid)
        self.processes[name] = process

    def state(self, name: str, of: str = "patroni") -> dict[str, Any]:
        """What Patroni says of a node; nothing if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest[name]}/{of}", timeout=2) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))
        except OSError:
            return {}

    def leader(self) -> str | None:
        return next((name for name in NODES if self.state(name).get("role") in ("primary", "master")), None)

    def is_whole(self) -> bool:
        """Whether there is a leader, and a replica that Patroni would make one."""
        leader = self.leader()
        members = self.state(leader, "cluster").get("members", []) if leader else []
        return any(each["role"] == "sync_standby" and each["state"] == "streaming" for each in members)

    def switch(self) -> bool:
        """Makes the other the leader; False while that is not ready."""
        leader = self.leader()
        other = next(name for name in NODES if name != leader)
        body = json.dumps({"leader": leader, "candidate": other}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.rest[str(leader)]}/switchover", body, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status == 200
        except urllib.error.HTTPError as error:
            if error.code in (412, 503):
                return False
            raise

    def kill(self, name: str) -> None:
        """The machine is gone: Patroni and all of its server's processes."""
        pid = self.processes[name].pid
        postmaster = int((self.home / name / "postmaster.pid").read_text().split()[0])
        for each in (pid, *_children(postmaster), postmaster):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.processes[name].wait(30)

    def stop(self) -> None:
        for name in NODES:
            with contextlib.suppress(OSError, ValueError, IndexError):
                self.kill(name)
        for process in self.processes.values():
            process.kill()
            process.wait(30)


async def until(true: Callable[[], bool]) -> None:
    """Asks Patroni now and then, on another thread."""
    while not await anyio.to_thread.run_sync(true):
        await anyio.sleep(0.3)


@pytest.fixture
def stack() -> Iterator[Stack]:
    patroni = os.environ.get("PATRONI") or shutil.which("patroni")
    etcd = shutil.which("etcd")
    place = binaries()
    if patroni is None or etcd is None or isinstance(place, str):
        pytest.skip(
            "this takes Patroni (pip install patroni[etcd3], or PATRONI), etcd (apt install etcd-server) and a server"
        )
    stack = Stack(patroni, etcd, place)
    try:
        yield stack
    finally:
        stack.stop()


async def test_a_switchover_and_a_killed_leader(stack: Stack) -> None:
    """Callers with `retries` see nothing of it but COMMITs without an answer; each answered unit is there, and whole."""
    log = stack.home / "one.log"
    with anyio.fail_after(PATIENCE):
        await until(stack.is_whole)
    configure(
        {
            "database": {
                "postgresql": {
                    "host": "127.0.0.1,127.0.0.1",
                    "port": ",".join(str(stack.ports[name]) for name in NODES),
                    "dbname": "postgres",
                    "user": "postgres",
                    "pool_size": 4,
                    "init_sql": "",
                    "connect_timeout": 2,
                    "reconnect_timeout": 120,
                    "resolve_commits": True,
                }
            }
        }
    )
    db = get_db()
    await db.execute("CREATE TABLE note (id INT PRIMARY KEY, unit INT)")
    answered: set[int] = set()
    unknown: set[int] = set()
    told: list[BaseException] = []
    numbers = itertools.count(1)
    enough = anyio.Event()

    @transactional(retries=50)
    async def two(unit: int) -> None:
        insert = "INSERT INTO note (id, unit) VALUES (:id, :unit)"
        await db.execute(insert, {"id": 2 * unit, "unit": unit})
        await db.execute(insert, {"id": 2 * unit + 1, "unit": unit})

    async def work() -> None:
        while not enough.is_set():
            unit = next(numbers)
            try:
                await two(unit)
                answered.add(unit)
            except errors.DatabaseError as error:
                told.append(error)
                if getattr(error, "outcome", None) == "unknown":
                    unknown.add(unit)
                await anyio.sleep(0.05)

    async def more() -> None:
        """Work has gone on."""
        count = len(answered) + 100
        await eventually(lambda: len(answered) > count, f"the load goes on; {told[-3:]}", within=PATIENCE)

    try:
        with anyio.fail_after(4 * PATIENCE):
            async with anyio.create_task_group() as group:
                for _ in range(WORKERS):
                    group.start_soon(work)
                await more()
                first = stack.leader()
                await until(stack.switch)
                await until(lambda: stack.leader() not in (None, first))
                await more()
                await until(stack.is_whole)
                second = stack.leader()
                assert second is not None
                await anyio.to_thread.run_sync(stack.kill, second)
                await until(lambda: stack.leader() not in (None, second))
                await more()
                enough.set()
    finally:
        await close_all()
    leader = stack.leader()
    assert leader is not None, log.read_text()[-2000:]
    with psycopg.connect(f"host=127.0.0.1 port={stack.ports[leader]} user=postgres dbname=postgres") as connection:
        kept = dict(connection.execute("SELECT unit, count(*) FROM note GROUP BY unit").fetchall())
    assert set(kept.values()) == {2}
    assert answered <= set(kept), f"lost: {sorted(answered - set(kept))}"
    assert set(kept) <= answered | unknown, f"told to be undone: {sorted(set(kept) - answered - unknown)}"
    print(f"{len(answered)} answered, {len(unknown)} unknown, {len(told)} errors")
