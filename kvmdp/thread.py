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
from kvmdp.shortage import starting_thread


class JoinableThread:
    """Does `work` in a thread called `name`, once `start` has been called; its maker joins it.

    `broke(error)` is called in that thread with whatever `work` raises. Others wait for what the thread would have
    done, so each maker says here how they come to know. It must not raise.
    """

    def __init__(self, work: Callable[[], object], name: str, broke: Callable[[BaseException], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # SystemExit too, which Python would pass over in silence
                broke(error)

        self._thread = threading.Thread(target=guarded, name=name)
        self._started = False

    def start(self) -> None:
        """Start the thread; once. Raises NoThreadError.

        An interruption is raised when the thread runs, or before there is one: whatever comes of it, it can be joined.
        """
        with Uninterrupted(), starting_thread():
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
    errors: list[BaseException] = []
    thread = JoinableThread(work, name, errors.append)
    try:
        thread.start()
    finally:
        thread.join()
    if errors:
        raise errors[0]
