"""`check`: is everything as it should be?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.text import Text

from database.cli.support import Status, Target, Verdict, choose, clean, err, fail, in_thread, out, out_json, run

__all__ = ["check"]

_MARKS = {"ok": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}


def check(target: Target, *, every: bool, quick: bool, strict: bool, as_json: bool) -> None:
    """Runs all checks on all databases; raises if any has found a fault."""
    configuration = target.configuration()
    if every:
        chosen = [(engine, each) for engine, named in configuration.engines.items() for each in named.values()]
    else:
        chosen = [choose(configuration, target.name)]
    results: list[dict[str, Any]] = []
    worst = 0
    several = len({engine for engine, _ in chosen}) > 1
    for engine, settings in chosen:
        if not as_json:
            note = f" ({engine})" if several else ""
            out().print(Text.assemble(("database ", "bold"), (clean(settings.name), "bold cyan"), note))
        findings: list[dict[str, str]] = []

        def show(finding: Any, findings: list[dict[str, str]] = findings) -> None:
            findings.append(asdict(finding))
            if not as_json:
                _print(finding)

        run(_check, engine, settings, quick, show)
        levels = [finding["level"] for finding in findings]
        verdict = "failed" if "failed" in levels else "warnings" if "warning" in levels else "ok"
        worst = max(worst, ("ok", "warnings", "failed").index(verdict))
        results.append({"name": settings.name, "engine": engine, "verdict": verdict, "findings": findings})
    verdict = ("ok", "warnings", "failed")[worst]
    if as_json:
        out_json({"verdict": verdict, "databases": results})
    else:
        words = {
            "ok": "everything is as it should be",
            "warnings": "works, with warnings",
            "failed": "something is wrong",
        }
        mark, style = _MARKS[{"ok": "ok", "warnings": "warning", "failed": "failed"}[verdict]]
        out().print(Text(f"{mark} {words[verdict]}", style=style))
    if worst == 2 or (strict and worst):
        raise Verdict


def _print(finding: Any) -> None:
    mark, style = _MARKS[finding.level]
    text = Text.assemble(
        (f"  {mark} ", style), f"{finding.name:<13} ", (clean(finding.text), style if finding.level == "failed" else "")
    )
    out().print(text, soft_wrap=True)
    if finding.hint:
        out().print(Text(f"{'':18}→ {clean(finding.hint)}", style="dim"), soft_wrap=True)


async def _check(engine: str, settings: Any, quick: bool, show: Callable[[Any], None]) -> None:
    module = f"database.{engine}.checkup"
    try:
        checkup = importlib.import_module(module).checkup
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        fail(f"`check` does not know the engine {engine} yet", status=Status.USAGE)

    def look(stopped: Callable[[], bool]) -> None:
        for finding in checkup(settings, quick=quick, stopped=stopped):
            if stopped():
                return
            show(finding)

    if err().is_terminal:
        with err().status("looking …"):
            await in_thread(look)
    else:
        await in_thread(look)
