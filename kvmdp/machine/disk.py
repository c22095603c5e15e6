"""The disk: rings of requests in guest RAM, carried out on a file. Runs wherever there is a `MemoryAccess`.

guest/README.md, "Disk", is what a guest goes by. The same class serves in a thread of the machine and in a process of
its own, and keeps nothing between two passes over a ring: all there is to know lies in RAM.

Death and resumption. Requests are carried out strictly in the order of the ring, one at a time: bytes, then the
request's status, then the count of completed requests in the header, each store after the one before. A device that is
killed at whatever moment has completed exactly what that count says, and at most begun the one request after it. A
successor begins with that request again, and that is exact: until it is completed the guest touches neither its
buffers nor, through later requests, its sectors; a write stores the same bytes once more, a read fetches the same; and
the guest has not seen a status that was stored without the count. Two devices at once would not be exact, so a
successor is let in only after its predecessor's death is confirmed (`kvmdp.peers.wire.endpoint`).

Trust. Everything in the ring is the guest's to choose, and may change while it is read. A header or a request is
copied once and judged by that copy; a pass does at most `DISK_MAX_ENTRIES` requests of `DISK_MAX_BYTES` each; what
is wrong ends as a status, in the guest's RAM, and never as an exception here.

Units: bytes; sectors of 512 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator
from typing import Self

from kvmdp.closing import Closing
from kvmdp.errors import KvmdpError, PoisonedError
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.guest_abi import DiskStatus
from kvmdp.paging.access import MemoryAccess
from kvmdp.size import format_size
from kvmdp.source.formats import recognise_file
from kvmdp.temporary import unnamed_file

_RING = struct.Struct("<QIIIIQ")
_REQUEST = struct.Struct("<QIIQ")
_SEGMENT = struct.Struct("<QQ")
_COUNT_MASK = (1 << 64) - 1
_GIVE = "give a regular file that may be read and written (truncate -s 64M FILE makes one)"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(KvmdpError):
    """A file cannot be a disk; the message says why and what to do."""


class DiskFile(Closing):
    """The file that holds a disk's sectors; owns its descriptor. Sectors never written read as zeros.

    `size` is the disk's, in bytes: the file's, in whole sectors.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size // guest.DISK_SECTOR * guest.DISK_SECTOR

    @classmethod
    def open(cls, path: str, *, any_format: bool = False) -> Self:
        """Open an existing file for reading and writing. Raises DiskError.

        `any_format` takes also a file that seems to be no raw sectors, but an image in some format, or compressed: what
        is written would destroy that.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            missing = error.errno == errno.ENOENT
            remedy = f": make one with truncate -s 64M {path}" if missing else f": {_GIVE}"
            raise DiskError(f"cannot open the disk {path}: {error.strerror}{remedy}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DiskError(f"the disk {path} is not a regular file: {_GIVE}")
            if status.st_size < guest.DISK_SECTOR:
                raise DiskError(
                    f"the disk {path} has {status.st_size} bytes, less than one sector ({guest.DISK_SECTOR} bytes): "
                    f"give a larger one (truncate -s 64M {path})"
                )
            found = None if any_format else recognise_file(descriptor)
            if found is not None:
                raise DiskError(
                    f"the disk {path} is {found.title}, not raw sectors: {found.remedy(path)}; or have it taken as it "
                    "is with --disk-format raw"
                )
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def temporary(cls, size: int) -> Self:
        """Make a sparse file of `size` bytes that has no name, and is gone once it is closed. Raises OSError."""
        descriptor = unnamed_file("the sectors of a disk that has no file")
        try:
            os.ftruncate(descriptor, size)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def require(self, size: int, name: str) -> None:
        """Raise DiskError if the disk has less than `size` bytes; `name` is what to call it."""
        if self.size < size:
            raise DiskError(
                f"the disk {name} has {format_size(self.size)}, the workload needs {format_size(size)}: give a larger "
                f"one (truncate -s {format_size(size)} {name})"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes; those beyond the end of a file that has been cut meanwhile are zeros."""
        data = b""
        while len(data) < length:
            piece = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not piece:
                return data.ljust(length, b"\0")
            data = data + piece if data else piece
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`. Raises OSError."""
        with memoryview(data) as left:
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, left[done:], offset + done)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _RequestError(Exception):
    """A request, or a ring, that is not served."""

    def __init__(self, status: DiskStatus) -> None:
        super().__init__(status.name)
        self.status = status


class DiskDevice:
    """Serves rings in `memory` from `file`. One thread; neither of the two is owned.

    `requests` and `sectors` count what was carried out, whatever came of it.
    """

    def __init__(self, memory: MemoryAccess, file: DiskFile) -> None:
        self._memory = memory
        self._file = file
        self.requests = 0
        self.sectors = 0

    def serve(self, ring: int) -> int:
        """Carry out what is submitted now in the ring at gpa `ring`; returns how many requests that were.

        Raises what `MemoryAccess` raises if a page cannot be had; the ring can be served again then, from where it
        was left. A poisoned page is the guest's trouble, and ends as a status. What is not a ring at all is left
        untouched.
        """
        try:
            pending = self._pending(ring)
        except (ValueError, PoisonedError):
            return 0  # not in RAM, or lost: nowhere to complain
        except _RequestError as error:
            self._refuse(ring, error.status)
            return 0
        done = 0
        for index, request in pending:
            try:
                self._carry_out(request)
            except ValueError:  # the request itself is not in RAM
                self._refuse(ring, DiskStatus.ADDRESS)
                return done
            except PoisonedError:  # the request itself, or where its status goes
                self._refuse(ring, DiskStatus.POISON)
                return done
            try:
                self._memory.store64(ring + guest.DISK_RING_COMPLETED, (index + 1) & _COUNT_MASK)
            except PoisonedError:
                return done  # the guest meets it too
            self.requests += 1
            done += 1
        return done

    def _refuse(self, ring: int, status: DiskStatus) -> None:
        """Say in a ring's header why it is not served."""
        with contextlib.suppress(PoisonedError):  # the header is lost: the guest meets that too
            self._memory.store64(ring + guest.DISK_RING_STATUS, status)

    def _pending(self, ring: int) -> list[tuple[int, int]]:
        """Return (index, gpa) of the requests submitted and not completed.

        The magic is read last, for the guest writes it last and clears it first: where it stands, what was read
        before it is a whole header.
        """
        memory = self._memory
        if ring % 8:
            return []
        submitted = memory.load64(ring + guest.DISK_RING_SUBMITTED)
        completed = memory.load64(ring + guest.DISK_RING_COMPLETED)
        _, version, features, entries, _, requests = _RING.unpack(memory.read(ring, _RING.size))
        if memory.load64(ring) != guest.DISK_MAGIC:
            return []
        count = (submitted - completed) & _COUNT_MASK
        if version != guest.DISK_VERSION or features:
            raise _RequestError(DiskStatus.MALFORMED)
        if not 1 <= entries <= guest.DISK_MAX_ENTRIES or entries & (entries - 1) or count > entries:
            raise _RequestError(DiskStatus.MALFORMED)
        if requests % 8 or requests > _COUNT_MASK - entries * guest.DISK_REQUEST_SIZE:
            raise _RequestError(DiskStatus.ADDRESS)
        indices = [(completed + each) & _COUNT_MASK for each in range(count)]
        return [(index, requests + index % entries * guest.DISK_REQUEST_SIZE) for index in indices]

    def _carry_out(self, request: int) -> None:
        """Carry out one request and store its status.

        Raises ValueError if the request is not in RAM, PoisonedError if it is lost.
        """
        fields = _REQUEST.unpack(self._memory.read(request, _REQUEST.size))
        try:
            self._transfer(*fields)
            status = DiskStatus.OK
        except _RequestError as error:
            status = error.status
        except ValueError:
            status = DiskStatus.ADDRESS
        except PoisonedError:
            status = DiskStatus.POISON
        except OSError as error:
            status = DiskStatus.SPACE if error.errno in _FULL else DiskStatus.IO
        self._memory.store64(request + guest.DISK_REQUEST_STATUS, status)

    def _transfer(self, sector: int, operation: int, count: int, table: int) -> None:
        if operation not in (guest.DISK_READ, guest.DISK_WRITE) or not 1 <= count <= guest.DISK_MAX_SEGMENTS:
            raise _RequestError(DiskStatus.MALFORMED)
        segments = list(_SEGMENT.iter_unpack(self._memory.read(table, count * _SEGMENT.size)))
        length = sum(each for _, each in segments)
        if not length or length > guest.DISK_MAX_BYTES or length % guest.DISK_SECTOR:
            raise _RequestError(DiskStatus.MALFORMED)
        offset = sector * guest.DISK_SECTOR
        if offset + length > self._file.size:
            raise _RequestError(DiskStatus.RANGE)
        if operation == guest.DISK_WRITE:
            self._file.write(offset, self._memory.readv(segments))
        else:
            self._memory.writev(segments, self._file.read(offset, length))
        self.sectors += length // guest.DISK_SECTOR


@contextlib.contextmanager
def disk_file(path: str | None, size: int, *, any_format: bool = False) -> Iterator[DiskFile]:
    """Open the disk at `path`, or make a temporary one, of at least `size` bytes; `any_format` is as for a DiskFile.

    Raises DiskError, OSError.
    """
    if path is None:
        opened = DiskFile.temporary(max(size, guest.DISK_SECTOR))
    else:
        opened = DiskFile.open(path, any_format=any_format)
    with opened as file:
        file.require(size, str(path))
        yield file
