"""Leases whose transaction may be begun on the event loop's thread, while the worker whose connection it is goes on sleeping.

`worker.held` is the lease from before BEGIN until its end, so that a worker which is woken, by whomever, finds it, and attends
to it from then on. What runs on the loop's thread meanwhile is the subclass's business: reads of SQLite's (`inline_lease`), or
statements to a server (`stepped_lease`).

Threads. See "Lending" in `database.driver.worker`.
"""

from __future__ import annotations

from database.driver.lease import Holder, Lease
from database.driver.roles import Owner
from database.driver.worker import WAKE, Worker

__all__ = ["HeldLease"]


class HeldLease(Lease):
    """A lease that a sleeping worker may hold."""

    __slots__ = ("_begun", "_woken")

    def __init__(self, pool: Owner[Lease], holder: Holder, *, number: int | None, readonly: bool) -> None:
        super().__init__(pool, holder, number=number, readonly=readonly)
        self._begun = self._woken = False
        """Whether the transaction was begun on the loop's thread, and whether the worker takes it over or has been told to."""

    def abort(self, reason: str) -> None:
        """See `Lease`. Any thread."""
        super().abort(reason)
        self._hand_over()

    def _hand_over(self) -> None:
        """Wakes a worker that holds this asleep. Any thread."""
        worker = self.worker
        if worker is not None and worker.held is self and not self._woken:
            self._woken = True
            if worker.watched is not None and self.pool.waker.is_current():
                worker.look_away()
            worker.inbox.put(WAKE)

    # Worker thread

    def serve(self, worker: Worker) -> None:
        """Attends to this lease alone until it ends, also where it has been begun on the loop's thread."""
        if self._begun:
            self._woken = True
            worker.attend(snapshot=False)
            self._attend(worker, worker.connection)
        else:
            super().serve(worker)
