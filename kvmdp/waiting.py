"""Waits of a thread that may be the main one, which an interruption may end at any moment (`kvmdp.interruption`).

What `threading` has for it takes and gives back its locks in Python. An interruption of the thread that waits can leave
a lock taken, for which others would wait for ever, or not taken where it should be.

Units: seconds.
"""

from __future__ import annotations

import queue
import threading


class Condition(threading.Condition):
    """A condition on an RLock, which is held after a wait whatever has interrupted that.

    It is the lock that is taken by `with`: the condition's own is a step of Python's, too. A thread that was
    interrupted may be listed as one that waits, so all are notified, never one.
    """

    def __init__(self, lock: threading.RLock) -> None:
        super().__init__(lock)
        self._rlock = lock

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as threading.Condition does."""
        try:
            return super().wait(timeout)
        except BaseException:
            try:
                self.notify(0)  # all it does is to find out whether the lock is held
            except RuntimeError:  # interrupted between giving it back and taking it again
                self._rlock.acquire()
            raise


class Latch:
    """An event for one thread that waits: is set by any thread, and stays so."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Wake the thread that waits, now or when it comes; never blocks."""
        self._words.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is set; False if that has not happened after `timeout` seconds."""
        try:
            self._words.get(timeout=timeout)
        except queue.Empty:
            return False
        self.set()
        return True
