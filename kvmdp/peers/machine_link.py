"""A device's end of the notifier: what it receives from the machine and sends to it, and how it learns of its end.

The end of a machine is its death, seen on its pidfd, or that it closes the notifier. Death alone does not always show
on the socket, for a child of the machine can hold its end open.

Nothing is waited for when sending: the queue has room for all that the credits allow. A machine that leaves it full
does not read.
"""

from __future__ import annotations

import contextlib
import select
import socket

from kvmdp.errors import KvmdpError
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.records import RECORD_SIZE, Record, unpack

_GONE = "the machine has closed the notifier, or died: its memory cannot be used any more"


class LinkEndedError(KvmdpError):
    """Nothing can be received any more; the message says why."""


class MachineLink:
    """Carries the records of session `epoch`; owns `notifier`, and `machine`, the process at its other end.

    One thread receives, any thread sends.
    """

    def __init__(self, notifier: socket.socket, epoch: int, machine: Peer) -> None:
        self._notifier = notifier
        self._epoch = epoch
        self._machine = machine
        self._events = select.poll()
        self._events.register(notifier, select.POLLIN)
        self._events.register(machine.pidfd, select.POLLIN)
        self._hangup = select.poll()
        self._hangup.register(notifier, 0)  # that both directions are closed is said unasked

    def send(self, record: Record) -> bool:
        """Send without waiting; False if the machine does not read. One that has gone is for the receiver to find."""
        # MSG_DONTWAIT, and not a property of the socket: the machine can change those.
        try:
            self._notifier.send(record.pack(self._epoch), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def receive(self, wait: bool = True) -> Record | None:
        """Return the next record; without `wait` None if there is none.

        Raises LinkEndedError, after all that had been sent before the end; RecordError for what is no record.
        """
        while True:
            ready = self._events.poll(None if wait else 0)
            try:
                message = self._notifier.recv(RECORD_SIZE + 1, socket.MSG_DONTWAIT)
            except ConnectionResetError:
                continue  # it has closed with records unread; what it had sent is still there
            except BlockingIOError:
                if any(descriptor == self._machine.pidfd for descriptor, _ in ready):
                    raise LinkEndedError(_GONE) from None
                if not wait:
                    return None
                continue
            except OSError as error:
                raise LinkEndedError(f"the notifier broke: {error.strerror}") from None
            if not message:
                raise LinkEndedError(_GONE)
            return unpack(message, self._epoch)

    def is_cut(self) -> bool:
        """Whether the machine has closed its end, at this moment: the receiver may not have come to that yet."""
        return bool(self._hangup.poll(0))

    def shut(self) -> None:
        """End both directions: wakes the receiver."""
        with contextlib.suppress(OSError):  # closed already, or by the machine
            self._notifier.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close notifier and pidfd, once nothing is received any more; a second call does nothing."""
        self._notifier.close()
        self._machine.close()
