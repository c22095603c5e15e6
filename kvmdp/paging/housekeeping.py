"""What is left to be done when a page has come or gone, with no claim held: memslots merged, a limit kept.

It may change what the trap has set up, and nothing in the ledger says so. So who is at it is counted instead, and who
switches demand paging off waits until nobody is (`DemandPager.disable`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmdp.interruption import undone
from kvmdp.waiting import Condition


class Housekeeping:
    """What is to be done (`works`), and who is at it.

    `mutex` is the pager's and guards that. `may_begin` is asked under it whether a thread may begin now.
    """

    def __init__(self, mutex: threading.RLock, may_begin: Callable[[], bool]) -> None:
        self.works: list[Callable[[], None]] = []
        self._mutex = mutex
        self._may_begin = may_begin
        self._keepers: list[object] = []  # one of each thread
        self._nobody = Condition(mutex)
        self._this_thread = threading.local()

    def keep(self) -> None:
        """Do what is to be done; nothing where this thread is at it already, or may not begin."""
        if getattr(self._this_thread, "keeps", False) or not self.works:
            return
        keeper = object()
        with undone(lambda: self._leave(keeper)):
            with self._mutex:
                if not self._may_begin():
                    return
                self._keepers.append(keeper)
            self._this_thread.keeps = True
            for work in self.works:
                work()

    def _leave(self, keeper: object) -> None:
        self._this_thread.keeps = False
        with self._mutex:
            if keeper in self._keepers:
                self._keepers.remove(keeper)
            if not self._keepers:
                self._nobody.notify_all()

    def await_nobody(self) -> None:
        """Wait, with the mutex held, until nobody is at it."""
        while self._keepers:
            self._nobody.wait()
