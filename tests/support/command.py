"""Runs the command line as a user does: in a process of its own, with nothing left of it afterwards."""

import contextlib
import dataclasses
import functools
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import forked
import pytest

TIMEOUT = 60  # seconds: a command that hangs fails its test, it does not hang the suite
_START = "from kvmdp.cli.entry import entry; entry()"
# A wrapper that takes from root what sets it above the permissions of files that are not its own.
_OVERRIDES = "-dac_override,-dac_read_search"
WITHOUT_OVERRIDE = ("setpriv", f"--inh-caps={_OVERRIDES}", f"--bounding-set={_OVERRIDES}")
NOBODY = 65534
# As a user's shell has them, whatever this one has: pytest's own must not leak in, output is buffered.
_UNSET = ("PYTHONUNBUFFERED", "COLUMNS", "LINES")


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self):
        """The one sentence that says why it failed, without the "kvmdp: " in front."""
        lines = [line for line in self.err.splitlines() if line.startswith("kvmdp: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n"), f"it is not the last thing said: {self.err}"
        return lines[0].removeprefix("kvmdp: ")

    @property
    def document(self):
        """The JSON document on stdout, which has nothing else on it."""
        return json.loads(self.out)


class Running:
    """A command that has been started; a context manager that never leaves it running.

    `prelude` is Python to be run before it, `wrapper` the command line of a program that is to start it. Modules have
    been loaded (tests/support/forked.py), unless it is to be `fresh` or has a wrapper.
    """

    def __init__(
        self,
        *arguments,
        prelude="",
        wrapper=(),
        fresh=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ):
        self._folder = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
        environment |= {"TMPDIR": self._folder.name, "TERM": "xterm"}
        self.process = forked.start(
            f"{prelude}\n{_START}",
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
            fresh=fresh,
            wrapper=wrapper,
        )
        self._seen = ""

    def wait_for_progress(self, text="pages present"):
        """Return when the command has said `text` on stderr: as `run` does, how many pages are present."""
        stderr = self.process.stderr
        deadline = time.monotonic() + TIMEOUT
        while text not in self._seen:
            ready, _, _ = select.select([stderr], [], [], deadline - time.monotonic())
            piece = os.read(stderr.fileno(), 65536).decode() if ready else ""
            assert piece, f"no progress came: {self._seen}"
            self._seen += piece

    def wait_until(self, condition):
        """Return when `condition()` holds; the command must not have ended before."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, "the command has ended"
            assert time.monotonic() < deadline, "what was waited for did not come"
            time.sleep(0.01)

    def finish(self):
        """Wait for the end; check that nothing is left behind and nothing like a traceback was said."""
        out, err = self.process.communicate(timeout=TIMEOUT)
        finished = Finished(
            self.process.returncode, (out or b"").decode(), self._seen + (err or b"").decode()
        )
        assert "Traceback" not in finished.err, finished.err
        assert "Exception ignored" not in finished.err, finished.err
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            raise AssertionError("the command left processes behind")
        assert not [*Path(self._folder.name).iterdir()], "the command left temporary files behind"
        return finished

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self._folder.cleanup()


def kvmdp(*arguments, **options):
    """Run a command to its end; `options` are those of `Running`."""
    with Running(*arguments, **options) as command:
        return command.finish()


def require_trap(trap):
    """Skip the test if the command says that this host cannot have the trap."""
    if reason := _lacks(trap):
        pytest.skip(reason)


@functools.cache
def _lacks(trap):
    done = kvmdp("run", "--memory", "2M", "--pages", 1, "--trap", trap)
    return done.error if done.status == 4 else None
