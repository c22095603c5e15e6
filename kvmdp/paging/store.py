"""Where the bytes of evicted pages go, and come back from: a file that takes a page for each that was ever evicted.

Units: bytes; offsets are into RAM, in the order of the RAM file, whole pages.
"""

from __future__ import annotations

import os
from typing import Protocol

from kvmdp.shortage import ShortageError, of_errno
from kvmdp.source.base import SourceError
from kvmdp.temporary import REMEDY, temporary_folder, unnamed_file


class Sink(Protocol):
    """Keeps pages. Called from several threads at once, for different pages."""

    def store(self, offset: int, content: memoryview) -> None:
        """Keep the pages from `offset` on. Raises OSError, ShortageError: what was there is not to be used then."""
        ...

    def fill(self, offset: int, destination: memoryview) -> None:
        """Write over every byte of `destination` what was stored there last. Raises SourceError."""
        ...

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        ...


class FileSink:
    """A `Sink` in an unnamed file in `folder` (default: that of temporary files), which goes with the process.

    Pages that have come back keep their place in it, so that it grows to RAM's size at the most. To free each would be
    one more change of the file on the way of its fault, and most go again and would take a new place: a guest that is
    kept below its working set evicts what it has just brought back.

    Raises OSError if there can be none.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or temporary_folder()
        self._fd = unnamed_file("evicted pages", self._folder)

    def store(self, offset: int, content: memoryview) -> None:
        """Write the pages."""
        done = 0
        while done < len(content):
            try:
                done += os.pwrite(self._fd, content[done:], offset + done)
            except OSError as error:
                if sentence := of_errno(error.errno or 0):
                    raise ShortageError(f"{error.strerror} where evicted pages go: {sentence}") from error
                raise OSError(
                    error.errno, f"{error.strerror} in {self._folder}, where evicted pages go: {REMEDY}"
                ) from None

    def fill(self, offset: int, destination: memoryview) -> None:
        """Read the pages."""
        length, done = len(destination), 0
        while done < length:
            try:
                count = os.preadv(self._fd, [destination[done:]], offset + done)
            except OSError as error:
                raise SourceError("the sink", offset, length, str(error)) from error
            if not count:
                raise SourceError("the sink", offset, length, "its file has become shorter")
            done += count

    def close(self) -> None:
        """Close the file, which frees it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
