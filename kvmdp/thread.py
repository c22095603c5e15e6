"""A thread that can be joined however its start ended: an interruption may come at any moment of `start`.

`threading.Thread.start` waits for the new thread's first steps. A KeyboardInterrupt in that wait leaves a thread that
runs and that `join` refuses, "cannot join thread before it is started", or breaks the lock that is waited on. So
SIGINT, SIGTERM and SIGHUP are put off until the thread is started. Masking them would not do: another thread may take
the signal, and Python runs its handler in the main thread all the same.

Units: seconds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NoThreadError(RuntimeError):
    """No more threads can be started; the message says what to do."""


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
        with put_off():
            try:
                self._thread.start()
            except RuntimeError as error:
                raise NoThreadError(
                    f"{error}: raise the limit on processes (ulimit -u, or pids.max of the control group)"
                ) from None
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


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Have the signals that interrupt handled after the block; they are handled in the main thread alone.

    For what has to be noted where its owner finds it once it is there, such as a thread or a file, and is there soon.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    with contextlib.ExitStack() as stack:
        for number in _INTERRUPTING:
            # One that is handled before its handler is replaced, or once it is put back, keeps no other from that.
            stack.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, note)
        yield
    if came:
        signal.raise_signal(came[0])
