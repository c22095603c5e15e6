"""The offer: what a fault handler says first on a new connection, so that the machine knows how much RAM to make.

One message on the connected Unix SEQPACKET socket, from the handler to the machine; the hand-over is the answer to it:

    offset  bytes  field
    0       8      magic, "KVMDPOFR"
    8       4      version of the protocol, 1
    12      4      zero
    16      8      bytes of the image, whole pages; RAM beyond them reads as zeros and is never asked for
    24      8      guest-physical address at which the hole begins of the machine that the image is of; 0 if it is of
                   none, and goes with any

Holes of the image are the handler's affair: it is asked for every page of the image, and writes zeros where it has no
data.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from kvmdp.errors import KvmdpError
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.wire.records import VERSION

_MAGIC = b"KVMDPOFR"
_LAYOUT = struct.Struct("<8sIIQQ")


class Offer(NamedTuple):
    """What is offered: bytes of the image, and where the hole begins of the machine that it is of, None if of none."""

    image_bytes: int
    low_ram_end: int | None


class OfferError(KvmdpError):
    """What came is no offer of this protocol; the message says why."""


def send(connection: socket.socket, offer: Offer) -> None:
    """Make an offer. Raises OSError."""
    connection.send(_LAYOUT.pack(_MAGIC, VERSION, 0, offer.image_bytes, offer.low_ram_end or 0))


def receive(connection: socket.socket) -> Offer:
    """Take an offer. Raises OfferError if something else comes, OSError."""
    message = connection.recv(_LAYOUT.size + 1)
    if not message:
        raise OfferError("the connection was closed before the offer")
    if len(message) != _LAYOUT.size:
        raise OfferError(f"a message of {len(message)} bytes, which is no offer")
    magic, version, zero, image_bytes, low_ram_end = _LAYOUT.unpack(message)
    if magic != _MAGIC:
        raise OfferError("a message that does not begin as an offer does")
    if version != VERSION:
        raise OfferError(f"an offer of version {version}, where version {VERSION} is spoken")
    if zero:
        raise OfferError(f"an offer with {zero:#x} in a field that is reserved, where zero belongs")
    if not image_bytes or image_bytes % PAGE_SIZE:
        raise OfferError(f"an offer of {image_bytes} bytes, which are not whole pages")
    if low_ram_end % PAGE_SIZE:
        raise OfferError(
            f"an offer of memory with a hole at {low_ram_end:#x}, which is not where a page begins"
        )
    return Offer(image_bytes, low_ram_end or None)
