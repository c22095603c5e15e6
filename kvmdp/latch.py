"""An event for one thread that waits, which an interruption may end at any moment.

threading.Event has a lock that it takes in Python. An interruption of the thread that waits can leave that lock taken,
and the thread that sets the event would wait for ever, or have it given back by a thread that has not got it.

Units: seconds.
"""

from __future__ import annotations

import queue


class Latch:
    """Is set by any thread, and stays so."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Wake the thread that waits, now or when it comes; never blocks."""
        self._words.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is set; False if that has not happened after `timeout` seconds. For one thread."""
        try:
            self._words.get(timeout=timeout)
        except queue.Empty:
            return False
        self.set()
        return True
