"""The hand-over: what a machine gives a peer in another process when a session begins.

One message on a connected Unix SEQPACKET socket, from the machine to the peer, whichever of them had listened. (A
fault handler speaks first: `kvmdp.peers.wire.offer`.)

    offset  bytes  field
    0       8      magic, "KVMDPHND"
    8       4      version of the protocol, 1
    12      4      epoch of the session; no two sessions of a machine have the same
    16      4      role of the peer, of `Role`
    20      4      credits
    24      8      pages of RAM
    32      4      bytes of a page, 4096
    36      4      number of regions, n
    40      24 n   regions: gpa, bytes, offset in the RAM file; 8 bytes each

and with it three descriptors: the memory file of RAM, sealed against a change of its size; the present bitmap, which
only the machine can write (bit n of its 64-bit little-endian words is page n, in the order of the regions); the
notifier, a SEQPACKET socket that carries `kvmdp.peers.wire.records`. These and the connection are all a peer gets.

What is received is looked at before it is believed: a RAM file that could be cut would end the peer with a SIGBUS, a
notifier of another type would not tell it that the machine has closed its end.
"""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import itertools
import os
import socket
import struct
import threading
from dataclasses import dataclass

from kvmdp.abi.mman import F_GET_SEALS, F_SEAL_SHRINK
from kvmdp.errors import KvmdpError
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.wire.records import VERSION

CREDITS = 64

_MAGIC = b"KVMDPHND"
_HEADER = struct.Struct("<8sIIIIQII")
_REGION = struct.Struct("<QQQ")
_MAX_REGIONS = 64
_DESCRIPTORS = 3
_MAX_DESCRIPTORS = 16  # room for those that should not be there, so that they can be closed

_epochs = itertools.count(1)
_epochs_mutex = threading.Lock()


class HandoverError(KvmdpError):
    """What came is no hand-over of this protocol; the message says why."""


class Role(enum.IntEnum):
    """What the peer is."""

    DEVICE = 1
    HANDLER = 2


@dataclass(frozen=True, slots=True)
class Handover:
    """What a session begins with. `regions` are (gpa, bytes, offset in the RAM file)."""

    epoch: int
    role: Role
    credits: int
    pages: int
    regions: tuple[tuple[int, int, int], ...]

    @property
    def memory_bytes(self) -> int:
        """Bytes of RAM."""
        return self.pages * PAGE_SIZE


@dataclass(slots=True)
class Descriptors:
    """The descriptors of a hand-over; their receiver owns them."""

    ram: int
    bitmap: int
    notifier: int

    def close(self) -> None:
        """Close those that are still here; one that has been given away is -1."""
        for name in ("ram", "bitmap", "notifier"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def new_epoch() -> int:
    """Return an epoch that no session of this process has had."""
    with _epochs_mutex:
        return next(_epochs)


def send(connection: socket.socket, handover: Handover, descriptors: Descriptors) -> None:
    """Hand over; the caller keeps its own descriptors. Raises OSError."""
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        handover.epoch,
        handover.role,
        handover.credits,
        handover.pages,
        PAGE_SIZE,
        len(handover.regions),
    )
    message = header + b"".join(_REGION.pack(*region) for region in handover.regions)
    socket.send_fds(connection, [message], [descriptors.ram, descriptors.bitmap, descriptors.notifier])


def receive(connection: socket.socket) -> tuple[Handover, Descriptors]:
    """Take a hand-over. Raises HandoverError if something else comes (then nothing is kept), OSError.

    Waits for it as `connection` is set to wait.
    """
    message, ancillary, flags, _ = connection.recvmsg(
        _HEADER.size + _MAX_REGIONS * _REGION.size + 1,
        socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize),
        socket.MSG_CMSG_CLOEXEC,
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    try:
        handover = _parse(message)
        if flags & socket.MSG_CTRUNC or len(fds) != _DESCRIPTORS:
            raise HandoverError(f"a hand-over with {len(fds)} descriptors, where {_DESCRIPTORS} belong to it")
        received = Descriptors(*fds)
        _check_ram(received.ram, handover.memory_bytes)
        _check_notifier(received.notifier)
    except BaseException:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
    return handover, received


def _check_ram(fd: int, size: int) -> None:
    """Raise HandoverError unless `fd` is a memory file of at least `size` bytes that no process can cut."""
    try:
        sealed = fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK
    except OSError:  # EINVAL: no memfd
        sealed = 0
    if not sealed:
        raise HandoverError("RAM whose file is not sealed against shrinking, which could end this process")
    if os.fstat(fd).st_size < size:
        raise HandoverError(f"a RAM file with less than {size} bytes")


def _check_notifier(fd: int) -> None:
    """Raise HandoverError unless `fd` is a Unix SEQPACKET socket.

    Of the types that keep records apart, it alone tells the reader that the other end is closed: a receive from a
    DGRAM socket whose peer has gone waits for ever.
    """
    try:
        notifier = socket.socket(fileno=fd)
    except OSError:
        raise HandoverError("a notifier that is no socket") from None
    try:
        if (notifier.family, notifier.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise HandoverError(
                "a notifier that is no Unix SEQPACKET socket, and would not tell of the machine's end"
            )
    finally:
        notifier.detach()  # it stays the receiver's


def _parse(message: bytes) -> Handover:
    if not message:
        raise HandoverError("the connection was closed before the hand-over")
    if len(message) < _HEADER.size:
        raise HandoverError(f"a message of {len(message)} bytes, which is no hand-over")
    magic, version, epoch, role, credits, pages, page_size, count = _HEADER.unpack_from(message)
    if magic != _MAGIC:
        raise HandoverError("a message that does not begin as a hand-over does: is that socket kvmdp's?")
    if version != VERSION:
        raise HandoverError(f"a hand-over of version {version}, where version {VERSION} is spoken")
    if len(message) != _HEADER.size + count * _REGION.size or count > _MAX_REGIONS:
        raise HandoverError(f"a hand-over of {len(message)} bytes that announces {count} regions")
    if page_size != PAGE_SIZE:
        raise HandoverError(f"a hand-over with pages of {page_size} bytes, where they have {PAGE_SIZE}")
    regions = tuple(_REGION.iter_unpack(message[_HEADER.size :]))
    total = 0
    for gpa, size, offset in regions:
        if gpa % PAGE_SIZE or size % PAGE_SIZE or offset != total or not size:
            raise HandoverError(f"a hand-over whose region at gpa {gpa:#x} is not whole pages in file order")
        total += size
    if not total or total != pages * PAGE_SIZE:
        raise HandoverError(f"a hand-over of {pages} pages, with regions of {total} bytes")
    if not credits:
        raise HandoverError("a hand-over without credits, so that nothing could be asked")
    try:
        return Handover(epoch, Role(role), credits, pages, regions)
    except ValueError:
        raise HandoverError(f"a hand-over for role {role}, which there is none of") from None
