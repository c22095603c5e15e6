"""Python programs in processes of their own, without the time that loading numpy and kvmdp takes.

A server has loaded all of kvmdp's commands and runs none of them: it forks. What it forks has the arguments, standard
streams, environment, folder and umask that were asked for, leads a session of its own, and ends as Python ends. So all
is as `python -c` has it, but that modules have been loaded: a test of what happens until they are takes a fresh
interpreter, and so does one of what that leaves of a limited memory.

Protocol: a request is a datagram of JSON with four descriptors, of the standard streams and of a pipe for the answers.
The answers are two numbers: of the process once it is there, and what waitpid(2) says of its end.

Units: seconds.
"""

import contextlib
import gc
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
# In a child, `serve` returns the program. What that starts in another folder shall be this checkout's too.
_SERVER = f"""
import sys
sys.path[0] = {str(_HERE)!r}
import forked
sys.path[0] = {str(_ROOT)!r}
exec(forked.serve())
"""
_NUMBER = struct.Struct("i")
_MOST = 1 << 17  # bytes of a request

_server = None


@contextlib.contextmanager
def server():
    """Have what `start` starts forked, for the time of the block."""
    global _server
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Threads of numpy's linear algebra would not be forked; a command wants none either.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                stdin=theirs,
                cwd=_ROOT,
                env=environment,
                start_new_session=True,
            )
        _server = ours
        try:
            yield
        finally:
            _server = None
            ours.close()
            process.wait()


def start(
    code,
    *arguments,
    stdin=None,
    stdout=None,
    stderr=None,
    text=False,
    env=None,
    cwd=None,
    fresh=False,
    wrapper=(),
):
    """Start `python -c CODE ARGUMENTS` as subprocess.Popen does with these options; return a Popen or what is like one.

    It is forked, unless it is to be `fresh`, or a program is to start it, whose command line is `wrapper`.
    """
    arguments = [str(each) for each in arguments]
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    if _server is None or fresh or wrapper:
        command = [*wrapper, sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command, **streams, env=env, cwd=cwd, text=text or None, start_new_session=True
        )
    status = Path("/proc/self/status").read_text()
    request = {
        "code": code,
        "arguments": arguments,
        "environment": dict(os.environ if env is None else env),
        "folder": str(cwd or Path.cwd()),
        "umask": int(status.partition("\nUmask:")[2].split()[0], 8),
    }
    return Forked(_server, request, streams, text)


class Forked:
    """A process of the server's, with what tests use of a Popen."""

    def __init__(self, server, request, streams, text):
        self.returncode = None
        self.stdin = self.stdout = self.stderr = None
        self._text = text
        with contextlib.ExitStack() as theirs:
            passed = []
            for number, (name, wanted) in enumerate(streams.items()):
                if wanted == subprocess.PIPE:
                    reader, writer = os.pipe()
                    kept, given = (writer, reader) if name == "stdin" else (reader, writer)
                    theirs.callback(os.close, given)
                    setattr(self, name, os.fdopen(kept, ("w" if name == "stdin" else "r") + "b" * (not text)))
                elif wanted == subprocess.DEVNULL:
                    given = os.open(os.devnull, os.O_RDWR)
                    theirs.callback(os.close, given)
                elif wanted == subprocess.STDOUT:
                    given = passed[1]
                elif wanted is None:
                    given = number
                else:
                    given = wanted if isinstance(wanted, int) else wanted.fileno()
                passed.append(given)
            self._answers, answering = os.pipe()
            theirs.callback(os.close, answering)
            socket.send_fds(server, [json.dumps(request).encode()], [*passed, answering])
        self.pid = self._answer()

    def _answer(self):
        answer = os.read(self._answers, _NUMBER.size)
        assert answer, "the server has died"
        return _NUMBER.unpack(answer)[0]

    def poll(self):
        """Return the exit status, or None if it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        """Return the exit status; raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            self.returncode = os.waitstatus_to_exitcode(self._answer())
            os.close(self._answers)
        return self.returncode

    def communicate(self, timeout=None):
        """Return what is still to come from it, to its end; raises TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        said = {stream: b"" for stream in (self.stdout, self.stderr) if stream is not None}
        with selectors.DefaultSelector() as waiting:
            for stream in said:
                if not stream.closed:
                    waiting.register(stream, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(until and max(until - time.monotonic(), 0))
                if not ready:
                    raise subprocess.TimeoutExpired("a forked process", timeout)
                for key, _ in ready:
                    piece = os.read(key.fd, 65536)
                    said[key.fileobj] += piece
                    if not piece:
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()
        self.wait(until and max(until - time.monotonic(), 0))
        return tuple(
            (said[stream].decode() if self._text else said[stream]) if stream is not None else None
            for stream in (self.stdout, self.stderr)
        )

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


# In the server


def serve():
    """Fork for each request, until none can come any more; returns only in a child, the program that it is to run."""
    from kvmdp.cli.main import build_parser

    build_parser()  # which loads every command
    import tempfile  # noqa: F401  and here what commands load when they need it

    import kvmdp.bench.trace  # noqa: F401

    gc.freeze()  # else the collection at a child's end writes to all of them, which copies them: 30 ms
    requests = socket.socket(fileno=os.dup(0))
    children = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != requests.fileno():
                pid, answers = children.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                _tell(answers, os.waitpid(pid, 0)[1])
                os.close(answers)
                continue
            request, descriptors, _, _ = socket.recv_fds(requests, _MOST, 4)
            if not request:
                sys.exit()
            pid = os.fork()
            if not pid:
                requests.detach()
                return _become(json.loads(request), descriptors[:3])
            for each in descriptors[:3]:
                os.close(each)
            watch = os.pidfd_open(pid)
            children[watch] = pid, descriptors[3]
            poll.register(watch, select.POLLIN)
            _tell(descriptors[3], pid)


def _tell(answers, number):
    with contextlib.suppress(BrokenPipeError):
        os.write(answers, _NUMBER.pack(number))


def _become(request, streams):
    """Make this process what was asked for, and return its program."""
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for entry in [*Path("/proc/self/fd").iterdir()]:
        if int(entry.name) > 2:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(entry.name))
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c", *request["arguments"]]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        older = getattr(sys, name)
        stream = os.fdopen(number, older.mode, encoding=older.encoding, errors=older.errors, closefd=False)
        if name == "stderr":
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return compile(request["code"], "<string>", "exec")
