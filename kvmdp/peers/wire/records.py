"""The records of the notifier, version 1: 64 bytes each, little-endian, one a message of a SEQPACKET socket.

    offset  bytes  field    what
    0       2      version  1
    2       2      kind     of `Kind`, below
    4       4      epoch    of the session, from the hand-over; records of another are refused
    8       8      token    chosen by the asking side, comes back in the answer; one question a token at a time
    16      8      gpa      bytes, a multiple of the page size
    24      8      size     bytes, a multiple of the page size
    32      4      access   of `Access`
    36      4      origin   of `Origin`: what touched the memory
    40      4      number   which vCPU or device it was; 0xFFFFFFFF is unknown
    44      4      outcome  of `Outcome`, in DONE
    48      16     zero

| kind | from, to | what |
| --- | --- | --- |
| FAULT | device to machine, machine to handler | [gpa, gpa + size) is wanted; answered by DONE |
| RELEASE | the same | FAULT `token` is wanted no more: it ends as CANCELLED, unless its DONE is on its way |
| DONE | the other way | FAULT `token` has ended with `outcome` |
| INVALIDATE | machine to device | [gpa, gpa + size) is absent, its bit is cleared; ACK once no access is left in it |
| FREEZE | machine to device | no access at all from now on, until THAW; ACK once none is left |
| ACK | device to machine | INVALIDATE or FREEZE `token` is obeyed |
| THAW | machine to device | accesses may go on |
| DOORBELL | machine to device | the guest has rung: work in ring `number`, at `gpa`; answered by one COMPLETED |
| COMPLETED | device to machine | the device has finished `size` requests in all (a count, not bytes) |
| BYE | either | the session ends; nothing follows |

*Credits*, a number of the hand-over, bound what is outstanding: at most that many FAULTs without their DONE, one way,
and that many INVALIDATEs and FREEZEs without their ACK, the other. A RELEASE goes once a FAULT, a DOORBELL only after
the COMPLETED of the last one or, before that, once. So every answer finds room in its queue, an answerer never waits,
and two full queues cannot hold each other up. A peer that asks beyond its credits, or does not read, is cut off.

A handler's DONE repeats gpa and size of the FAULT; its outcome is PRESENT, the bytes are in RAM, or FAILED, they cannot
be had. Answers come in any order. A handler that takes the place of one that has died is sent the FAULTs that had no
DONE again, in its own session.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from kvmdp.errors import KvmdpError
from kvmdp.page import PAGE_SIZE, Access, Origin, Outcome

VERSION = 1
RECORD_SIZE = 64
UNKNOWN_NUMBER = 0xFFFFFFFF

_LAYOUT = struct.Struct("<HHIQQQIIII16s")
_RESERVED = bytes(16)


class RecordError(KvmdpError, ValueError):
    """What came is no record of this protocol; the message says why."""


class Kind(enum.IntEnum):
    """What a record is."""

    FAULT = 1
    RELEASE = 2
    DONE = 3
    INVALIDATE = 4
    ACK = 5
    FREEZE = 6
    THAW = 7
    BYE = 8
    DOORBELL = 9
    COMPLETED = 10


@dataclass(frozen=True, slots=True)
class Record:
    """One record; `pack` and `unpack` are its two directions. Which fields count is up to the kind."""

    kind: Kind
    token: int = 0
    gpa: int = 0
    size: int = 0
    access: Access = Access.UNKNOWN
    origin: Origin = Origin.DEVICE
    number: int = UNKNOWN_NUMBER
    outcome: Outcome = Outcome.PRESENT

    def pack(self, epoch: int) -> bytes:
        """Return the record's 64 bytes, for the session `epoch`."""
        return _LAYOUT.pack(
            VERSION,
            self.kind,
            epoch,
            self.token,
            self.gpa,
            self.size,
            self.access,
            self.origin,
            self.number,
            self.outcome,
            _RESERVED,
        )


def unpack(message: bytes, epoch: int) -> Record:
    """Return the record that a message holds. Raises RecordError for anything else, field by field."""
    if len(message) != RECORD_SIZE:
        raise RecordError(f"a message of {len(message)} bytes, where a record has {RECORD_SIZE}")
    version, kind, session, token, gpa, size, access, origin, number, outcome, reserved = _LAYOUT.unpack(
        message
    )
    if version != VERSION:
        raise RecordError(f"a record of version {version}, where version {VERSION} is spoken")
    if session != epoch:
        raise RecordError(f"a record of session {session}, where this is session {epoch}")
    if reserved != _RESERVED:
        raise RecordError("a record with reserved bits set")
    try:
        record = Record(
            Kind(kind),
            token,
            gpa,
            size,
            Access(access),
            Origin(origin),
            number,
            Outcome(outcome),
        )
    except ValueError as error:
        raise RecordError(f"a record with a field out of its range: {error}") from None
    if record.outcome is Outcome.TIMED_OUT:
        raise RecordError("a record with outcome TIMED_OUT, which no peer is told")
    if record.kind in (Kind.FAULT, Kind.INVALIDATE) and (gpa % PAGE_SIZE or size % PAGE_SIZE or not size):
        raise RecordError(f"a {record.kind.name} of {size} bytes at gpa {gpa:#x}, which are not whole pages")
    return record
