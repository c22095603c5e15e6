"""How a command comes to its end, and what an interruption (SIGINT, SIGTERM, SIGHUP) does at each stage of it.

    loading          ends the process where it stands (`kvmdp.cli.entry`): there is nothing to clean up yet
    work             the first raises KeyboardInterrupt in the main thread: the command cleans up, and ends with 130.
                     More within a second are the same one: timeout(1) sends two, a terminal that is closed does, a
                     supervisor hands on what its child has had already. Later ones mean that it takes too long: the
                     process ends at once, after its last acts (`kvmdp.last_acts`)
    results          ends the process at once: all is cleaned up, and what is left of the results has no reader
    the last word    nothing until it is said, which is soon; then as below
    Python's end     ends the process at once, with the status that the command has come to

So from the start of the work there is one KeyboardInterrupt and no second, which would cut cleaning up short.

Other signals end a process by themselves, SIGQUIT and SIGXCPU among them. From the start of the work they still do, but
after its last acts; SIGXCPU, which tells of a limit, ends it with the sentence of that.

Units: seconds.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import NoReturn

from kvmdp.cli.entry import last_words, leave, on_interruption
from kvmdp.interruption import Interrupter
from kvmdp.last_acts import do_last_acts
from kvmdp.shortage import ShortageError, more_cpu_time, named, require_memory

SAME_SECONDS = 1.0  # in which a further signal is the same interruption

_FAILED, _LACKING = 1, 4
# What ends a process by default and is neither an interruption nor a fault of the process itself.
_DEADLY = (
    signal.SIGQUIT,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGXCPU,
    signal.SIGIO,
    signal.SIGPWR,
    signal.SIGSTKFLT,
)
# What loading takes at the least, in bytes of address space and of data. numpy's linear algebra ends the process by
# itself if it cannot have its share, or tries for ever.
_LOADING = (136 << 20, 80 << 20)


class Stages:
    """Is told how far a command has got; this one takes no notice."""

    def started(self) -> None:
        """All is loaded, the work begins."""

    def settled(self) -> None:
        """The work is over, results are written out: no KeyboardInterrupt is expected any more."""

    def ended(self) -> None:
        """The exit status is certain; what is left is to say why the command failed, if it did."""


NO_STAGES = Stages()


class HandledStages(Stages):
    """Has signals answered as it is right at each stage; `is_late` says whether an interruption came after the last.

    `taken` are signals that have a use already.
    """

    def __init__(self, taken: Collection[int] = ()) -> None:
        self.is_late = False
        self._taken = taken

    def started(self) -> None:
        """From now on there is something to clean up."""
        on_interruption(Interruption())
        for number in _DEADLY:
            if number not in self._taken and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _die)

    def settled(self) -> None:
        """From now on there is nothing to clean up."""
        on_interruption(_leave)

    def ended(self) -> None:
        """From now on nothing changes the status any more."""
        on_interruption(self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.is_late = True


def run_to_end(taken: Collection[int] = ()) -> NoReturn:
    """Load the command, run it, and exit with its status. Until it begins its work `leave` answers interruptions.

    `taken` are signals that have a use already.
    """
    main = _load()
    stages = HandledStages(taken)
    status = main(stages=stages)
    do_last_acts()
    # Python waits for threads now, which may take what it takes; what comes after that does not.
    on_interruption(lambda _number, _frame: os._exit(status))
    if stages.is_late:
        os._exit(status)
    atexit.register(on_interruption, signal.SIG_IGN)
    sys.exit(status)


def _load() -> Callable[..., int]:
    """Return the command's `main`; ends the process, with a sentence, if there is no memory to load it."""
    try:
        with named():
            require_memory(*_LOADING)
            from kvmdp.cli.main import main  # here, for this is what takes the time
    except ShortageError as error:
        last_words(str(error), _LACKING)
    return main


class Interruption(Interrupter):
    """A signal handler for the time of a command's work: a request to stop, that is taken where nothing breaks by it.

    What must not be cut short puts the first off (`kvmdp.interruption`), not the others.
    """

    def __init__(self) -> None:
        self._began: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt the first time, now or soon; later do nothing, or end the process."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            super().__call__(number, frame)
        elif now - self._began >= SAME_SECONDS:
            _leave(number, frame)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    do_last_acts()
    leave(number, frame)


def _die(number: int, _frame: FrameType | None) -> None:
    """End the process by a signal that ends it anyway."""
    do_last_acts()
    if number == signal.SIGXCPU:
        last_words(more_cpu_time(), _FAILED)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
