"""How a command comes to its end, and what an interruption (SIGINT, SIGTERM, SIGHUP) does at each stage of it.

    loading          ends the process where it stands (`kvmdp.cli.entry`): there is nothing to clean up yet
    work             the first raises KeyboardInterrupt in the main thread: the command cleans up, and ends with 130.
                     More within a second are the same one: timeout(1) sends two, a terminal that is closed does, a
                     supervisor hands on what its child has had already. Later ones mean that it takes too long: the
                     process ends at once, after its last acts
    results          ends the process at once: all is cleaned up, and what is left of the results has no reader
    Python's end     ends the process at once, with the status that the command has come to

So from the start of the work there is one KeyboardInterrupt and no second, which would cut cleaning up short.

Units: seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from kvmdp.cli.entry import leave, on_interruption

SAME_SECONDS = 1.0  # in which a further signal is the same interruption

_last_acts: list[Callable[[], None]] = []


def run_to_end() -> NoReturn:
    """Load the command, run it, and exit with its status. Until it begins its work `leave` answers interruptions."""
    from kvmdp.cli.main import main  # here, for this is what takes the time

    status = main(started=lambda: on_interruption(Interruption()), settled=lambda: on_interruption(leave))
    # Python waits for threads now, which may take what it takes; what comes after that does not.
    on_interruption(lambda _number, _frame: os._exit(status))
    atexit.register(on_interruption, signal.SIG_IGN)
    sys.exit(status)


class Interruption:
    """A signal handler for the time of a command's work."""

    def __init__(self) -> None:
        self._began: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt the first time; later do nothing, or end the process."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            raise KeyboardInterrupt
        if now - self._began >= SAME_SECONDS:
            for act in reversed(_last_acts):
                with contextlib.suppress(OSError):  # the next one is done all the same
                    act()
            leave(number, frame)


@contextlib.contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """Have `act` done if an interruption ends the process at once during the block; it may raise OSError."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)
