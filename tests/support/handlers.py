"""Handlers for the tests: the real one in a process of its own, and one whose every message is the test's."""

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import forked

from kvmdp.peers.wire import handover, offer
from kvmdp.peers.wire.endpoint import Listener

MEMORY = 2 << 20
SEED = 11
_START = "from kvmdp.cli.entry import entry; entry()"


class HandlerProcess:
    """`kvmdp handler` at `path`, listening when this returns; killed at the end if it still runs.

    `prelude` is Python to be run before it.
    """

    def __init__(self, path, *options, prelude=""):
        arguments = ("handler", "--listen", path, *(options or ("--synthetic", f"{MEMORY},{SEED}")))
        self.process = forked.start(
            f"{prelude}\n{_START}",
            *arguments,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.pid = self.process.pid
        self.said = ""
        assert self.says("serving")

    def __repr__(self):
        return f"<handler that has said {self.said!r}>"

    def says(self, word):
        """Whether it says `word` on stderr, or has said it; it has a minute for that."""
        deadline = time.monotonic() + 60
        while word not in self.said:
            ready, _, _ = select.select([self.process.stderr], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(self.process.stderr.fileno(), 65536).decode() if ready else ""
            if not piece:
                return False
            self.said += piece
        return True

    def end(self, number=signal.SIGKILL):
        """Send it a signal and return its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.said += (rest or b"").decode()
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.process.stderr.closed:
            self.end()


@contextlib.contextmanager
def scripted(path, session, *, image_bytes=MEMORY):
    """Listen in a thread of this process; `session(notifier socket, terms, ram fd)` is the handler.

    Only descriptors are kept meanwhile: what it returns is awaited, then all is closed.
    """
    import socket

    errors = []

    def body():
        try:
            with listener.accept(60) as connection:
                offer.send(connection, offer.Offer(image_bytes, None))
                terms, descriptors = handover.receive(connection)
                with socket.socket(fileno=descriptors.notifier) as notifier:
                    descriptors.notifier = -1
                    try:
                        session(notifier, terms, descriptors.ram)
                    finally:
                        descriptors.close()
        except BaseException as error:
            errors.append(error)

    with Listener(str(path)) as listener:
        thread = threading.Thread(target=body)
        thread.start()
        try:
            yield
        finally:
            thread.join()
    if errors:
        raise errors[0]
