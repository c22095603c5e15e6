"""One session with a fault handler, seen from the machine: its offer, the hand-over, records both ways, its end.

No state but the sockets: which faults are outstanding, and what a record means, is `kvmdp.peers.handler.source`'s.

Units: seconds, bytes.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Sequence

from kvmdp.errors import KvmdpError
from kvmdp.own_clock import OwnClock
from kvmdp.peers.wire import notifier, offer
from kvmdp.peers.wire.endpoint import EndpointError, Peer, connect
from kvmdp.peers.wire.handover import Handover, Role, new_epoch
from kvmdp.peers.wire.records import RECORD_SIZE, Kind, Record, unpack


class SessionEndedError(KvmdpError):
    """The handler has closed the session, or has died."""


class Session:
    """A handler that has made its offer. `offer` is what it offers, `peer` the process; `credits` is how many
    faults it may have outstanding.

    Arguments: the path it listens at; a descriptor that becomes readable when nothing is to be waited for any more;
    how long to wait for the offer, and by which clock. Raises EndpointError if there is none.
    """

    def __init__(self, path: str, wake: int, timeout: float, clock: OwnClock) -> None:
        self._wake = wake
        self._clock = clock
        self._began = False
        self._epoch = new_epoch()
        self._connection = connect(path)
        try:
            self.peer = Peer.of(self._connection)
        except BaseException:
            self._connection.close()
            raise
        try:
            self._notifier, self._theirs, self.credits = notifier.notifier_pair()
        except BaseException as error:
            self._connection.close()
            self.peer.close()
            if isinstance(error, OSError):
                raise EndpointError(f"cannot make a notifier for {path}: {error.strerror}") from None
            raise
        self._notifier.setblocking(False)
        try:
            self.offer = self._receive_offer(path, timeout)
        except BaseException:
            self.close()
            raise

    def _receive_offer(self, path: str, timeout: float) -> offer.Offer:
        ready = self._wait(timeout, self._connection.fileno(), self.peer.pidfd)
        if self._connection.fileno() not in ready:
            raise EndpointError(
                f"process {self.peer.pid}, which listens at {path}, has died before its offer"
                if self.peer.pidfd in ready
                else f"process {self.peer.pid}, which listens at {path}, has made no offer within {timeout:g} seconds: "
                "it is stopped or overloaded, or no handler"
            )
        try:
            return offer.receive(self._connection)
        except (offer.OfferError, OSError) as error:
            raise EndpointError(
                f"process {self.peer.pid}, which listens at {path}, is no handler that can be used ({error}): start "
                "kvmdp handler there"
            ) from None

    def hand_over(self, pages: int, regions: Sequence[tuple[int, int, int]], ram: int, bitmap: int) -> None:
        """Give the handler RAM, sealed, and a notifier.

        Raises SessionEndedError if it has gone since its offer; OSError if RAM cannot be sealed or sent: then it is
        not the handler that is to blame.
        """
        terms = Handover(self._epoch, Role.HANDLER, self.credits, pages, tuple(regions))
        self._began = True
        try:
            notifier.hand_over(self._connection, terms, ram, bitmap, self._theirs)
        except (BrokenPipeError, ConnectionResetError):
            raise SessionEndedError from None
        finally:
            self._theirs.close()
        self._connection.close()  # all else goes over the notifier

    def send(self, record: Record) -> None:
        """Send, without ever waiting.

        A handler that has gone is for `receive` to find, so that one place deals with it. One whose queue is full does
        not read it, for the credits leave room for all that may be outstanding: it will be found not to answer.
        """
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._notifier.send(record.pack(self._epoch))

    def receive(self, timeout: float) -> Record | None:
        """Return the next record; None after `timeout` seconds, or when nothing is to be waited for any more.

        Raises SessionEndedError, RecordError for what is no record, OSError. What a handler had sent before it died is
        returned first.
        """
        ready = self._poll(timeout, self._notifier.fileno(), self.peer.pidfd)
        if self._wake in ready or not ready:
            return None
        try:
            message = self._notifier.recv(RECORD_SIZE + 1)
        except BlockingIOError:
            raise SessionEndedError from None  # no message, so it was the pidfd: it has died
        except ConnectionResetError:
            raise SessionEndedError from None  # closed, with some of our records unread
        if not message:
            raise SessionEndedError
        return unpack(message, self._epoch)

    def wait_dead(self, timeout: float) -> bool:
        """Wait until the process has ended; False after `timeout` seconds, or when nothing is to be waited for."""
        return self.peer.pidfd in self._wait(timeout, self.peer.pidfd)

    def _wait(self, timeout: float, *descriptors: int) -> list[int]:
        """Do as `_poll`, with seconds of the clock."""
        until = self._clock.now() + timeout
        while not (
            ready := self._poll(min(until - self._clock.now(), self._clock.longest_wait), *descriptors)
        ):
            if self._clock.now() >= until:
                break
        return ready

    def _poll(self, timeout: float, *descriptors: int) -> list[int]:
        """Return which descriptors, or `wake`, are readable; none after `timeout` seconds."""
        poll = select.poll()
        for descriptor in (self._wake, *descriptors):
            poll.register(descriptor, select.POLLIN)
        return [descriptor for descriptor, _ in poll.poll(max(timeout, 0) * 1000)]

    def end(self) -> None:
        """Say that the session ends, if it has begun."""
        if self._began:
            self.send(Record(Kind.BYE))

    def close(self) -> None:
        """Close the connection, whatever the handler does; a second call does nothing."""
        self._connection.close()
        self._notifier.close()
        self._theirs.close()
        self.peer.close()
