"""Where the bytes of evicted pages go, and come back from: a file that takes a page for each that was ever evicted.

Units: bytes; offsets are into RAM, in the order of the RAM file, whole pages.
"""

from __future__ import annotations

import os

from kvmdp.shortage import ShortageError, of_errno
from kvmdp.source.base import SourceError
from kvmdp.source.image import data_extents
from kvmdp.source.request import FetchRequest
from kvmdp.temporary import REMEDY, temporary_folder, unnamed_file


class FileSink:
    """A `kvmdp.source.base.WritableSource` in an unnamed file, which goes with the process.

    `size` is RAM's, in bytes; `folder` is where the file is (default: that of temporary files).

    Pages that have come back keep their place in it, so that it grows to RAM's size at the most. To free each would be
    one more change of the file on the way of its fault, and most go again and would take a new place: a guest that is
    kept below its working set evicts what it has just brought back.

    Raises OSError if there can be none.
    """

    name = "the sink"
    concurrency = 4

    def __init__(self, size: int, folder: str | None = None) -> None:
        self.size = size
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

    def extents(self) -> list[tuple[int, int]]:
        """Return where pages have been stored: sorted (offset, length) ranges."""
        return data_extents(self._fd, os.fstat(self._fd).st_size)

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Read the pages. Raises SourceError."""
        offset, length, done = request.offset, len(destination), 0
        while done < length:
            try:
                count = os.preadv(self._fd, [destination[done:]], offset + done)
            except OSError as error:
                raise SourceError(self.name, offset, length, str(error)) from error
            if not count:
                raise SourceError(self.name, offset, length, "its file has become shorter")
            done += count

    def close(self) -> None:
        """Close the file, which frees it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
