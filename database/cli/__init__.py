"""The command-line tool: `python -m database`, or `jobu-database`. Needs the extra `cli`.

    app.py        the commands' names, options and help
    support.py    configuration, output, errors, exit statuses: what all commands share
    <command>.py  what a command does, imported when it is called

Whatever goes wrong ends in one readable block on stderr and an exit status (`support.Status`), never in a traceback,
unless it is a defect of this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = ("typer", "rich", "prompt_toolkit", "pygments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool.

    Args:
        arguments: Those of the command line; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    try:
        from database.cli import app  # noqa: PLC0415  - the extra may be missing

        return app.run(arguments)
    except KeyboardInterrupt:  # before the command began, or after its end
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        print(
            f"error: the command-line tool needs {error.name!r}, which is not installed\n"
            "  install the extra `cli` of this package, which brings all that it needs",
            file=sys.stderr,
        )
        return 2
