"""The entry point of the installed command; small, so that an interruption is answered from the start.

Loading the command takes a few tenths of a second. A KeyboardInterrupt in that time would be a traceback, or be
lost: importlib runs callbacks in which it can only be reported and dropped. So until the command begins its work,
when there is nothing yet to clean up, an interruption ends the process where it stands. `kvmdp.cli.ending` has what it
does from then on.
"""

from __future__ import annotations

import os
import select
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_INTERRUPTED = 130
_STDERR = 2


def entry() -> NoReturn:
    """Run the command and exit with its status."""
    on_interruption(leave)
    # numpy's linear algebra would start a thread for each CPU as it is loaded, of which this program has no use; where
    # it cannot have them it raises SIGINT.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from kvmdp.cli.streams import open_streams  # here and below, for loading is what takes the time

    open_streams()
    from kvmdp.cli.ending import run_to_end

    run_to_end()


def interruptions() -> set[signal.Signals]:
    """Return the signals that interrupt. One that was ignored from the start is none, and stays ignored.

    So a background job of a shell goes on at SIGINT, and what was started by nohup at SIGHUP.
    """
    return {number for number in INTERRUPTING if signal.getsignal(number) is not signal.SIG_IGN}


def on_interruption(handler: signal._HANDLER) -> None:
    """Have `handler` called when this process is interrupted."""
    for number in interruptions():
        signal.signal(number, handler)


def leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """End the process here and now, as interrupted: a signal handler for when there is nothing to clean up."""
    last_words("interrupted", _INTERRUPTED)


def last_words(sentence: str, status: int) -> NoReturn:
    """End the process here and now, with a sentence on stderr, when there is nothing to clean up."""
    try:
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        if poll.poll(0):  # a reader of stderr that takes nothing is not waited for
            os.write(_STDERR, f"kvmdp: {sentence}\n".encode(errors="replace"))
    except OSError:
        pass  # stderr is closed: the status says it
    os._exit(status)
