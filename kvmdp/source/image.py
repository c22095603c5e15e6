"""A raw memory image in a file or on a block device: byte n of the file is byte n of guest RAM.

Holes of the file are found with SEEK_DATA and SEEK_HOLE (lseek(2)) and never read.

Units: bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from kvmdp.errors import KvmdpError
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import SourceError, check_range, page_extents
from kvmdp.source.formats import recognise_file
from kvmdp.source.request import FetchRequest

# The read did not take place. EIO is not among them: by the time the kernel says so, it has made its own
# retries.
_TRANSIENT = frozenset({errno.EAGAIN, errno.EINTR})

_REFUSED = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a character device"}
_PIECE = 256 << 10  # bytes that are read at once, of a run of which the asker wants pieces
_WANTED = "give a regular file or a block device that holds raw memory"


class ImageError(KvmdpError, ValueError):
    """A path cannot serve as an image, for a reason its user can mend; the text is one sentence."""


class ImageSource:
    """The image at `path`; a `PageSource`.

    Attributes: `name`, the path; `size`, the file's size rounded up to whole pages; `tail_bytes`, how many
    bytes of the last page the file has if that is not all of them (the rest is zeros), else 0; `format`, what the file
    seems to be if that is not raw memory, else None: its bytes are taken as they are all the same.

    Size and holes are those of the moment of opening: what is appended later is never read, and a file that
    has become shorter is a `SourceError`. The content is read when it is asked for, so the file must stay as
    it is: `change` says whether it did.

    Raises `ImageError` if there is no such file, or it is empty, unreadable or of a kind that cannot be read
    at any offset.
    """

    concurrency = 4  # a disk of today serves more at once, and the host's read-ahead does the rest
    _flags = os.O_RDONLY

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._fd = _open(self.name, self._flags)
        try:
            self._opened = os.fstat(self._fd)
            self._file_size = os.lseek(self._fd, 0, os.SEEK_END)
            if not self._file_size:
                raise ImageError(f"image {self.name!r} is empty: there is nothing to page in")
            if _ends_before(self._fd, self._file_size):  # as files in /sys do
                raise ImageError(
                    f"image {self.name!r} is said to have {self._file_size} bytes and has less: {_WANTED}"
                )
            self.format = recognise_file(self._fd)
            self._extents = data_extents(self._fd, self._file_size)
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):  # as of files in /proc that are memory
                raise ImageError(
                    f"image {self.name!r} cannot be read at any place ({error.strerror}): {_WANTED}"
                ) from None
            raise
        self.tail_bytes = self._file_size % PAGE_SIZE
        self.size = -(-self._file_size // PAGE_SIZE) * PAGE_SIZE

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Read the pages straight into `destination`, a long run piece by piece.

        Raises `SourceError`: transient for EAGAIN and EINTR; permanent for any other error, and if the file
        ends before its size at opening.
        """
        offset, length = request.offset, destination.nbytes
        check_range(self, offset, length)
        wanted = min(length, self._file_size - offset)
        most = length if request.on_landed is None else _PIECE
        done = 0
        while done < wanted:
            try:
                count = os.preadv(self._fd, [destination[done : min(done + most, wanted)]], offset + done)
            except OSError as error:
                transient = error.errno in _TRANSIENT
                raise SourceError(self.name, offset, length, str(error), transient=transient) from error
            if count == 0:
                reason = (
                    f"the file ends at {offset + done:#x} and had {self._file_size} bytes when it was opened: it "
                    "changed while running; restore it and start again"
                )
                raise SourceError(self.name, offset, length, reason)
            done += count
            if request.on_landed is not None and done % PAGE_SIZE == 0:
                request.landed(done)
        if done < length:
            destination[done:] = bytes(length - done)

    def extents(self) -> list[tuple[int, int]]:
        """Return the sorted (offset, length) ranges of whole pages that the file has data in."""
        return list(self._extents)

    def change(self) -> str | None:
        """Return how the file has changed since it was opened, None if nothing shows that it has.

        A change shows by the file's size, its time of modification, or another file in its place. A store through a
        mapping of the file may not move that time (tmpfs), and two changes within one tick of the kernel's clock, some
        milliseconds, may bear the same.
        """
        before, now = self._opened, os.fstat(self._fd)
        if now.st_size != before.st_size:
            return f"it had {before.st_size} bytes and has {now.st_size}"
        if now.st_mtime_ns != before.st_mtime_ns:
            return "it was written to"
        try:
            there = Path(self.name).stat()
        except OSError:
            return None  # its name is gone; the file that was opened is as it was
        is_same = (there.st_dev, there.st_ino) == (before.st_dev, before.st_ino)
        return None if is_same else "another file has taken its place"

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WritableImageSource(ImageSource):
    """An image that takes pages back; its file never becomes longer. A `WritableSource`."""

    _flags = os.O_RDWR

    def store(self, offset: int, content: memoryview) -> None:
        """Write whole pages from `offset` on, of the last one what the file has. Raises `SourceError`."""
        check_range(self, offset, content.nbytes)
        wanted = min(content.nbytes, self._file_size - offset)
        done = 0
        while done < wanted:
            try:
                done += os.pwritev(self._fd, [content[done:wanted]], offset + done)
            except OSError as error:
                raise SourceError(self.name, offset, content.nbytes, str(error)) from error


def _open(path: str, flags: int) -> int:
    """Open the image; `ImageError` unless it is a regular file or a block device."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageError(f"image {path!r} does not exist: check the path") from None
    except PermissionError:
        wanted = "readable" if flags == os.O_RDONLY else "readable and writable"
        raise ImageError(f"image {path!r} is not {wanted} for this user: change its mode") from None
    except OSError as error:
        # ENXIO is what open(2) says of a socket.
        absent = "is a socket, or its device is absent"
        what = absent if error.errno == errno.ENXIO else f"cannot be opened ({error.strerror})"
        raise ImageError(f"image {path!r} {what}: {_WANTED}") from None
    mode = stat.S_IFMT(os.fstat(fd).st_mode)
    if mode not in (stat.S_IFREG, stat.S_IFBLK):
        os.close(fd)
        raise ImageError(f"image {path!r} is {_REFUSED.get(mode, 'no file')}: {_WANTED}")
    os.set_blocking(fd, True)
    return fd


def _ends_before(fd: int, size: int) -> bool:
    """Return whether a file has less than its size says."""
    try:
        return not os.pread(fd, 1, size - 1)
    except OSError:
        return False  # what cannot be read is told of when it is wanted


def data_extents(fd: int, size: int) -> list[tuple[int, int]]:
    """Return where a file of `size` bytes has data, in the form of `PageSource.extents` (SEEK_DATA, lseek(2))."""
    return page_extents(_data_ranges(fd, size))


def _data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, end) ranges of bytes in which the file has data."""
    ranges: list[tuple[int, int]] = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                break
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # block devices, file systems without holes
                return [(0, size)]
            raise
        ranges.append((start, min(end, size)))
    return ranges
