"""A thread that can be joined however its start ended: an interruption may come at any moment of `start`.

`threading.Thread.start` waits for the new thread's first steps. A KeyboardInterrupt in that wait leaves a thread that
runs and that `join` refuses, "cannot join thread before it is started", or breaks the lock that is waited on. So
interruptions are put off until the thread is started.

Units: seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmdp.interruption import Uninterrupted


class JoinableThread:
    """Does `work` in a thread called `name`, once `start` has been called; whoever makes it joins it."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._thread = threading.Thread(target=work, name=name)
        self._started = False

    def start(self) -> None:
        """Start the thread; once. Raises RuntimeError if there can be no more threads.

        An interruption is raised when the thread runs, or before there is one: whatever comes of it, it can be joined.
        """
        with Uninterrupted():
            self._thread.start()
            self._started = True

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if it runs on after `timeout` seconds, True at once if it never ran."""
        if not self._started:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()


def run_in_thread(work: Callable[[], None], name: str) -> None:
    """Do `work` in a thread called `name` and wait for its end; raises what it raised."""
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = JoinableThread(guarded, name)
    try:
        thread.start()
    finally:
        thread.join()
    if errors:
        raise errors[0]
