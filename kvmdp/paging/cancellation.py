"""Calling off what another thread waits for."""

from __future__ import annotations

import threading
from typing import Protocol

from kvmdp.paging.claim import Wait, Waiter


class Withdrawing(Protocol):
    """The pager, as far as it concerns threads that wait."""

    def withdraw(self, waiter: Waiter) -> bool:
        """Call a wait off; False if it has ended by itself."""
        ...


class Cancellation:
    """Calls off, from another thread, what a thread waits for in `Admission.resolve`; for good."""

    def __init__(self, pager: Withdrawing) -> None:
        self._pager = pager
        self._mutex = threading.Lock()  # guards what follows
        self.cancelled = False
        self._wait: Wait | None = None

    def cancel(self) -> None:
        """Wake the thread if it waits, and let it wait no more."""
        with self._mutex:
            self.cancelled = True
            wait = self._wait
        if wait is not None:
            self._pager.withdraw(wait)

    def attend(self, wait: Wait) -> None:
        """Take note of what the thread is about to wait for."""
        with self._mutex:
            self._wait = wait
            cancelled = self.cancelled
        if cancelled:  # `cancel` came before it could see this one
            self._pager.withdraw(wait)
