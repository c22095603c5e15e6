"""The notifier as the machine makes it: a pair of sockets with room for all that may be outstanding, and the hand-over.

Room. A queue of a Unix socket is bounded by its sender's SO_SNDBUF, against which the kernel counts each message with
its own bookkeeping (`sk_buff` and data, 768 bytes for a record on x86-64). In one direction there are at most as many
unread records as these: a FAULT and a RELEASE, or an INVALIDATE or FREEZE and a THAW, a credit; an answer a credit of
the other direction; a few of DOORBELL, COMPLETED, BYE. So three records a credit and a few more always fit.

Units: bytes.
"""

from __future__ import annotations

import fcntl
import socket

from kvmdp.abi.mman import F_ADD_SEALS, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
from kvmdp.peers.wire import handover
from kvmdp.peers.wire.handover import CREDITS, Descriptors, Handover

_RECORD_COST = 1024  # a record in a queue, as the kernel counts it, rounded up
_OTHERS = 8  # records that no credit bounds
_RECORDS_PER_CREDIT = 3


def notifier_pair(credits: int = CREDITS) -> tuple[socket.socket, socket.socket, int]:
    """Return a notifier's two ends and its credits: `credits`, or as many as the queues have room for.

    The kernel bounds SO_SNDBUF by the sysctl net.core.wmem_max.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wanted = (_RECORDS_PER_CREDIT * credits + _OTHERS) * _RECORD_COST
    for end in (ours, theirs):
        if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < wanted:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
    room = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in (ours, theirs))
    fit = (room // _RECORD_COST - _OTHERS) // _RECORDS_PER_CREDIT
    return ours, theirs, max(1, min(credits, fit))


def seal(fd: int) -> None:
    """Seal a memory file that is going to be handed over: its size and its seals stay as they are.

    Without F_SEAL_SEAL a peer could add F_SEAL_FUTURE_WRITE, and no later peer could map RAM. Raises OSError if it is
    no memfd, or may not be sealed.
    """
    wanted = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
    if fcntl.fcntl(fd, F_GET_SEALS) & wanted != wanted:
        fcntl.fcntl(fd, F_ADD_SEALS, wanted)


def hand_over(
    connection: socket.socket, session: Handover, ram: int, bitmap: int, theirs: socket.socket
) -> None:
    """Seal RAM and the bitmap, and send them with the peer's end of the notifier. Raises OSError."""
    seal(ram)
    seal(bitmap)
    handover.send(connection, session, Descriptors(ram, bitmap, theirs.fileno()))
