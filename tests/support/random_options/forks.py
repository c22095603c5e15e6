"""Commands run as a user runs them, each in a process of its own, without the time that loading takes.

A server has loaded all commands and runs none itself: it forks. What it forks goes through `kvmdp.cli.entry.entry`, in
a session, a folder and with standard streams of its own, and ends as Python ends. The server waits for it, and after a
deadline has its stacks written and ends it.

Protocol: a line of JSON on the server's stdin is a request. Two lines on its stdout are the answer: that the command
has been started, and how it ended.

Units: seconds.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_SERVER = "from random_options.forks import serve; serve()"
_STACKS_SIGNAL = signal.SIGQUIT  # ends a process that has nobody to write its stacks
_GRACE = 2.0
_DRAWN_OUT = 5.0  # for what is left of a session to end, after its first process


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended: its status as subprocess has it, and whether others of its session were left."""

    status: int
    hung: bool
    left: bool


class Fork:
    """A server, and the one command that it runs at a time; a context manager."""

    def __init__(self):
        path = os.pathsep.join([str(_ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what has been read but not asked for would hide the end from `has_ended`
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
            start_new_session=True,
        )
        self._pid = None

    def start(self, arguments, folder, name, deadline):
        """Start `kvmdp ARGUMENTS` in the folder work of a folder; `name`.out and `name`.err there have its output.

        It makes its temporary files in the folder tmp beside work.
        """
        request = {"arguments": arguments, "folder": str(folder), "name": name, "deadline": deadline}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._pid = self._answer()["pid"]

    def interrupt(self):
        """Send SIGTERM to the command; it may have ended by itself, but has not been waited for."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)

    def has_ended(self):
        """Whether the command has ended."""
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def finish(self):
        """Wait for the command and return its End."""
        return End(**self._answer())

    def _answer(self):
        line = self._server.stdout.readline()
        assert line, "the server has died"
        return json.loads(line)

    def close(self):
        """End the server."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()


# In the server


def serve():
    """Serve until stdin ends; in a child, run the command."""
    from kvmdp.cli.main import build_parser

    build_parser()  # which loads every command
    import json.encoder  # and here what commands load when they need it
    import tempfile  # noqa: F401

    import kvmdp.bench.trace  # noqa: F401

    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            requests.close()
            os.close(answers)
            _become(request)
            from kvmdp.cli.entry import entry

            entry()
        _tell(answers, {"pid": pid})
        _tell(answers, dataclasses.asdict(_watch(pid, request["deadline"])))


def _tell(answers, words):
    os.write(answers, json.dumps(words).encode() + b"\n")


def _become(request):
    """Make this process what a shell would have started."""
    os.setsid()
    folder, name = Path(request["folder"]), request["name"]
    os.chdir(folder / "work")
    for number, path in enumerate((os.devnull, folder / f"{name}.out", folder / f"{name}.err")):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    stacks = os.open(folder / f"{name}.stacks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Python does not see faulthandler's handler: without one that it knows, the command would take the signal over.
    signal.signal(_STACKS_SIGNAL, signal.SIG_IGN)
    faulthandler.register(_STACKS_SIGNAL, stacks, all_threads=True)
    os.environ["TMPDIR"] = str(folder / "tmp")
    sys.argv = ["kvmdp", *request["arguments"]]


def _watch(pid, deadline):
    watch = os.pidfd_open(pid)
    try:
        hung = not select.select([watch], [], [], deadline)[0]
        if hung:
            os.kill(pid, _STACKS_SIGNAL)
            select.select([watch], [], [], _GRACE)
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(watch)
    return End(status, hung, _clear(pid))


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
