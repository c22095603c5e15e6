"""Commands run as a user runs them, each in a process and a session of its own, with a deadline.

What has not ended by then has its stacks written, and is ended.

Units: seconds.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time

import forked

_STACKS_SIGNAL = signal.SIGQUIT  # ends a process that has nothing to write its stacks
_START = """
import faulthandler, os, signal
# Python does not see faulthandler's handler: without one that it knows, the command would take the signal over.
signal.signal({number}, signal.SIG_IGN)
stacks = os.open({stacks!r}, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
faulthandler.register({number}, stacks, all_threads=True)
from kvmdp.cli.entry import entry
entry()
"""
_GRACE = 2.0
_DRAWN_OUT = 5.0  # for what is left of a session to end, after its first process


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended: its status as subprocess has it, and whether others of its session were left."""

    status: int
    hung: bool
    left: bool


class Fork:
    """`kvmdp ARGUMENTS` in the folder work of a folder; `name`.out and `name`.err there have its output.

    It makes its temporary files in the folder tmp beside work.
    """

    def __init__(self, arguments, folder, name, deadline):
        self._until = time.monotonic() + deadline
        code = _START.format(stacks=str(folder / f"{name}.stacks"), number=int(_STACKS_SIGNAL))
        with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
            self._process = forked.start(
                code,
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | {"TMPDIR": str(folder / "tmp")},
                cwd=folder / "work",
            )

    def interrupt(self):
        """Send SIGTERM to the command, unless it has ended by itself."""
        self._process.terminate()

    def has_ended(self):
        """Whether the command has ended."""
        return self._process.poll() is not None

    def finish(self):
        """Wait for the command and return its End."""
        try:
            self._process.wait(max(self._until - time.monotonic(), 0))
            hung = False
        except subprocess.TimeoutExpired:
            self._process.send_signal(_STACKS_SIGNAL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            hung = True
        return End(self._process.wait(), hung, _clear(self._process.pid))


def _clear(session):
    """End what is left of a session; returns whether anything was."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return False
    deadline = time.monotonic() + _DRAWN_OUT
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(session, 0)
            time.sleep(0.01)
    return True
