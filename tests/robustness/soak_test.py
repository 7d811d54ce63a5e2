"""The example service, over and over in one process: memory, threads and file descriptors stay flat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median

import pytest

from tests.robustness.support import FIGURES, ROOT, Program

SOAK_S = float(os.environ.get("SOAK_S", "20"))
"""Seconds for all event loops together; more by the environment variable."""

CODE = """
import contextlib, gc, io, json, sqlite3
sys.path.insert(0, sys.argv[2])
from pathlib import Path
settings.pop("init_sql")
configure({"database": {"sqlite": settings}})
import jobu

def options(number):
    backend, uvloop = [("asyncio", False), ("trio", False), ("asyncio", UVLOOP)][number % 3]
    return jobu.Options(
        crontab=Path(sys.argv[2]) / "sample.crontab", format="auto", backend=backend, uvloop=uvloop, jobs=400,
        workers=8, readers=3, seconds=0.0002, config=None,
    )

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1])

until = time.monotonic() + float(sys.argv[3])
number = 0
while time.monotonic() < until or number < 9:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = jobu.run(options(number))
    if status:
        sys.exit(f"run {number} ended with {status}: {said.getvalue()}")
    number += 1
    # What is done is cleared away, so that the work stays the same; from outside, as an administrator would.
    connection = sqlite3.connect(sys.argv[1])
    connection.execute("DELETE FROM job_runs")
    connection.commit()
    connection.close()
    gc.collect()
    wal = Path(sys.argv[1] + "-wal")
    print(json.dumps({
        "rss": resident(), "threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd")),
        "wal": wal.stat().st_size if wal.exists() else 0, "objects": len(gc.get_objects()),
    }), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_soak(tmp_path: Path) -> None:
    """The service on all event loops in turn, every run adding up: what it holds at the end it held after the first few."""
    import importlib.util

    uvloop = importlib.util.find_spec("uvloop") is not None
    code = f"UVLOOP = {uvloop}\n" + CODE
    path = tmp_path / "soak.db"
    ended = Program(code, path, str(ROOT / "docs" / "examples"), str(SOAK_S)).end(SOAK_S + 60).ok()
    assert ended.err == ""
    samples = [json.loads(line) for line in ended.out.splitlines()]
    warm, last = samples[len(samples) // 3 : len(samples) * 2 // 3], samples[-(len(samples) // 3) :]
    figures = {key: (median(each[key] for each in warm), median(each[key] for each in last)) for key in samples[0]}
    print(f"\nsoak: {len(samples)} runs of the service in {SOAK_S:g} s; median of the middle and of the last third:")
    for key, (before, after) in figures.items():
        print(f"  {key}: {before:,} -> {after:,}")
    FIGURES["runs of the service in the soak"] = len(samples)
    FIGURES["KiB that the soak's resident memory grew from its middle to its last third"] = int(
        figures["rss"][1] - figures["rss"][0]
    )
    FIGURES["threads and descriptors that the soak left over"] = int(
        samples[-1]["threads"] - samples[2]["threads"] + samples[-1]["fds"] - samples[2]["fds"]
    )
    assert figures["threads"][1] <= figures["threads"][0]
    assert figures["fds"][1] <= figures["fds"][0]
    assert samples[-1]["wal"] == 0
    assert figures["rss"][1] - figures["rss"][0] < 3_000, f"memory grows: {figures['rss']} KiB"
    assert figures["objects"][1] - figures["objects"][0] < 500, f"objects pile up: {figures['objects']}"
