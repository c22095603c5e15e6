"""The entry point of the installed command; small, so that an interruption is answered from the start.

Loading the command takes a few tenths of a second. A KeyboardInterrupt in that time would be a traceback, or be
lost: importlib runs callbacks in which it can only be reported and dropped. So until the command begins its work,
when there is nothing yet to clean up, an interruption ends the process where it stands.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130


def entry() -> NoReturn:
    """Run the command and exit with its status."""
    on_interruption(leave)
    open_streams()
    from kvmdp.cli.main import main  # here, for this is what takes the time

    sys.exit(main(started=lambda: on_interruption(signal.default_int_handler)))


def open_streams() -> None:
    """See to it that there is a stdout and a stderr: Python has None where it was started with one closed."""
    # These stay open to the end.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def interruptions() -> set[signal.Signals]:
    """Return the signals that interrupt: a shell's background job ignores SIGINT, and goes on doing so."""
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return {signal.SIGTERM} if ignores else {signal.SIGTERM, signal.SIGINT}


def on_interruption(handler: signal._HANDLER) -> None:
    """Have `handler` called when this process is interrupted."""
    for number in interruptions():
        signal.signal(number, handler)


def leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """End the process here and now, as interrupted: a signal handler for when there is nothing to clean up."""
    try:
        os.write(2, b"kvmdp: interrupted\n")
    except OSError:
        pass  # stderr is closed: the status says it
    os._exit(_INTERRUPTED)
