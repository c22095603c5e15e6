"""A clock for deadlines that others have to meet: it stands still while this process does.

A process that is stopped (^Z, a debugger, SIGSTOP) or starved finds, when it runs again, that each deadline has passed
in which it heard nothing. That is not the fault of the process at the other end, whose answer may be there unread.

Units: seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LONGEST_WAIT = 0.5


class OwnClock:
    """Counts the time between two looks at it, but not much more than there may be. Any thread may look.

    A thread that waits for something by this clock looks again after `longest_wait` seconds at the latest, which is a
    small part of `patience`, the shortest time that is measured. Twice that may count, for a thread that comes late.
    While nothing is waited for, the clock may stand still.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest_wait = min(patience / 4, _LONGEST_WAIT)
        self._clock = clock
        self._mutex = threading.Lock()  # guards what follows
        self._last = clock()
        self._now = 0.0

    def now(self) -> float:
        """Return the seconds that have been counted."""
        with self._mutex:
            last, self._last = self._last, self._clock()
            self._now += min(self._last - last, 2 * self.longest_wait)
            return self._now
