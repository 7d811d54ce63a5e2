"""Where a transaction or a stream was begun, for messages and logs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType

from database.driver.wakeup import current_task, task_name

__all__ = ["Origin"]


class Origin:
    """Where a transaction was begun, described only when somebody asks."""

    __slots__ = ("_code", "_line", "_task", "_what")

    def __init__(self, what: str, code: CodeType | None = None, line: int = 0) -> None:
        self._what = what
        self._code = code
        self._line = line
        self._task: Callable[[], object | None] | None = None

    def set_task(self) -> None:
        """Remembers the running task, once; called when the transaction or the stream begins."""
        if self._task is None:
            task = current_task()
            self._task = _no_task if task is None else weakref.ref(task)

    def is_of(self, task: object | None) -> bool:
        """Whether it was begun by that task."""
        return self._task is not None and task is not None and self._task() is task

    def __call__(self) -> str:
        where = "" if self._code is None else f" at {self._code.co_filename}:{self._line} in {self._code.co_qualname}"
        task = "" if self._task is None else f" by task {task_name(self._task())!r}"
        return f"{self._what}{where}{task}"


def _no_task() -> None:
    return None
