"""The standard streams of a command: diagnostics on stderr, results on stdout.

    stderr   progress, remarks, the sentence that says why a command failed. Any thread writes here, also one that a
             guest waits for. So a write neither fails nor waits for long: what cannot be written is dropped, and the
             number of lines that were is said as soon as stderr takes something again.
    stdout   results. A write waits for its reader as long as it takes. What cannot be written is an error of the
             command, but not of the step that printed: `flush` raises it, when other results have got where they go.

Neither writes through a buffer of Python's: that would keep what was refused, and fail once more at the interpreter's
end, where no error can be caught.

Units: seconds, bytes.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
from collections.abc import Iterable

_STDOUT, _STDERR = 1, 2
_ROOM = 4096  # bytes that a pipe which is said to be writable takes without waiting (PIPE_BUF)
_CHUNK = 1 << 16
_PATIENCE_SECONDS = 1.0  # for the reader of stderr to make room
_COLUMNS = 80


class Diagnostics(io.TextIOBase):
    """stderr, the file `descriptor`, which stays the caller's. Threads may write at the same time.

    Characters that `encoding` lacks are written as escapes.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self.encoding = encoding
        # Guards what follows, and keeps lines whole. A signal's handler may write in the middle of another write.
        self._mutex = threading.RLock()
        self._lost = 0  # lines since the last that got through
        self._why = ""

    def write(self, text: str, /) -> int:
        """Write, or drop what cannot be written. Waits for a reader that is behind, once; until it takes something
        again what follows is dropped at once.
        """
        if text:
            with self._mutex:
                self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            if self._lost:
                self._put(f"{self._lost} lines could not be written here: {self._why}\n")
                self._lost = 0
            self._put(text)
        except OSError as error:
            self._lost += text.count("\n")
            self._why = error.strerror or str(error)

    def _put(self, text: str) -> None:
        """Write all of `text`. Raises OSError."""
        left = text.encode(self.encoding, "backslashreplace")
        while left:
            if not _has_room(self._descriptor, 0 if self._lost else _PATIENCE_SECONDS):
                raise BlockingIOError(errno.EAGAIN, "its reader took nothing")
            left = left[os.write(self._descriptor, left[:_ROOM]) :]

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether this is a terminal that is still there."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor


class Results(io.TextIOBase):
    """stdout, the file `descriptor`, which stays the caller's. For one thread.

    Characters that `encoding` lacks are written as escapes.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self.encoding = encoding
        self._terminal = os.isatty(descriptor)
        self._left = bytearray()
        self._broken = False
        self._failure: OSError | None = None  # not raised yet

    def write(self, text: str, /) -> int:
        """Take what is to be written. After a failure all is dropped."""
        self._left += text.encode(self.encoding, "backslashreplace")
        if len(self._left) >= _CHUNK or (self._terminal and "\n" in text):
            self._send()
        return len(text)

    def flush(self) -> None:
        """Write out everything. Raises OSError, once, if this or an earlier write has failed."""
        self._send()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _send(self) -> None:
        if self._broken:
            self._left.clear()
        while self._left:
            try:
                count = os.write(self._descriptor, self._left[:_CHUNK])
            except BlockingIOError:  # another process has made it so: results wait all the same
                _has_room(self._descriptor, None)
            except OSError as error:
                self._broken, self._failure = True, error
                self._left.clear()
            else:
                del self._left[:count]

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return self._terminal

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor


def _has_room(descriptor: int, timeout: float | None) -> bool:
    """Wait until a write goes through at once, or fails at once; False after `timeout` seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


_missing: set[int] = set()  # standard streams that this process was started without


def missing_streams() -> list[int]:
    """Return the standard streams, by number, that the command was started without."""
    return sorted(_missing)


def open_streams(missing: Iterable[int] = ()) -> None:
    """Replace `sys.stdout` and `sys.stderr`; a stream that this process was started without leads nowhere.

    `missing` are streams that the process which has started this one was itself started without.

    Its number does not stay free: the next file that is opened would get it, and what is meant for the stream.
    """
    _missing.update(missing)
    for number in range(_STDERR + 1):
        try:
            os.fstat(number)
        except OSError:
            _missing.add(number)
            # The lowest number that is free. Without a /dev/null, as in a bare root folder, a file in memory does.
            try:
                os.open(os.devnull, os.O_RDWR)
            except OSError:
                os.memfd_create("nowhere", 0)
    # Python has None for a stream that it was started without.
    encodings = [stream.encoding if stream is not None else "utf-8" for stream in (sys.stdout, sys.stderr)]
    sys.stdout, sys.stderr = Results(_STDOUT, encodings[0]), Diagnostics(_STDERR, encodings[1])


def terminal_columns() -> int:
    """Return the width of the terminal that stderr is; 80 where it does not know, or has gone."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS
