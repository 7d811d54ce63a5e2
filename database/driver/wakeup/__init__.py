"""From worker threads back to the event loop. The one package that knows asyncio and trio by name."""

from database.driver.wakeup.choice import create_waker
from database.driver.wakeup.waker import (
    Notice,
    Timer,
    Waker,
    asyncio_loop,
    current_loop,
    current_task,
    task_name,
)

__all__ = ["Notice", "Timer", "Waker", "asyncio_loop", "create_waker", "current_loop", "current_task", "task_name"]
