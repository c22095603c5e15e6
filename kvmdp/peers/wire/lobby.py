"""The lobby: processes that have connected and are not served yet. It is bounded, and open to the next that comes.

A connection costs two descriptors, whatever its process does with it. So there are so many *places*, for those that
wait and those that are served together, and each process has a *share* of them. A process beyond its share loses the
connection that has waited longest for the new one, which is the one that it is at. When all places are taken, the
connection that has waited longest leaves, of any process. Nothing that is served leaves: then the new one is refused.

Why a share of each process, and not of each user: peers belong to this user or to root, and what connects again and
again and never goes on is one process that is broken. One share keeps it from all places but those. Why the longest
wait leaves beyond that, and not the newest: the newest is a stranger, the oldest has had its chance. A process that
is not broken needs one connection, so it is turned away only if four others or more fill their shares at its expense.

One thread uses a lobby. Units: seconds of time.monotonic.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvmdp.peers.wire.endpoint import EndpointError, Listener, Peer

_Made = TypeVar("_Made")

PLACES = 64
SHARE = 16


@dataclass(slots=True, eq=False)
class Arrival:
    """A process that has connected; owns `connection`, which does not wait, and `peer`. `since` is when it came."""

    connection: socket.socket
    peer: Peer
    since: float

    def has_gone(self) -> bool:
        """Whether the process has ended, or has closed its end of the connection."""
        poll = select.poll()
        poll.register(self.peer.pidfd, select.POLLIN)
        poll.register(self.connection, 0)  # that it is closed is said unasked
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close both; a second call does nothing."""
        self.connection.close()
        self.peer.close()


class Lobby:
    """Takes in what connects to `listener`, which stays the caller's; owns the arrivals.

    `report(sentence)` is told of each that is not let in, or leaves for another; `name` is what to call them there.
    `is_short` is whether the last that came could not be let in for want of something: the listener stays readable.
    """

    def __init__(
        self,
        listener: Listener,
        name: str,
        report: Callable[[str], None],
        places: int = PLACES,
        share: int = SHARE,
    ) -> None:
        self.arrivals: list[Arrival] = []  # the one that came first is first
        self.is_short = False
        self._listener = listener
        self._name = name
        self._report = report
        self._places = places
        self._share = share

    def take_in(self, served: Sequence[int]) -> Iterator[Arrival]:
        """Let in what waits at the listener, and yield each; `served` are the pids that have places already.

        Does not wait, and ends after a number of them, for a process that connects all the time must not keep the
        caller here. Where this process lacks something to let one in, it says so once, and `is_short` is set until it
        lacks nothing.
        """
        try:
            for _ in range(self._places):
                arrival = self._welcome(self._spared(lambda: self._listener.accept(0)), served)
                if arrival is not None:
                    yield arrival
        except BlockingIOError:
            pass  # there are no more
        except OSError as error:
            if not self.is_short:
                self._report(f"no {self._name} can be let in at the moment: {error.strerror}")
            self.is_short = True
            return
        self.is_short = False

    def _spared(self, attempt: Callable[[], _Made]) -> _Made:
        """Return what `attempt` makes, where there are too few descriptors at the expense of those that wait."""
        while True:
            try:
                return attempt()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.arrivals:
                    raise
                self._turn_away(self.arrivals[0], str(error.strerror))

    def _welcome(self, connection: socket.socket, served: Sequence[int]) -> Arrival | None:
        """Give a connection a place, or close it."""
        try:
            connection.setblocking(False)
            peer = self._spared(lambda: Peer.of(connection))
        except BaseException as error:
            connection.close()
            if not isinstance(error, EndpointError):
                raise
            self._report(f"a {self._name} was refused: {error}")
            return None
        arrival = Arrival(connection, peer, time.monotonic())
        if not self._make_room(peer.pid, served):
            arrival.close()
            return None
        self.arrivals.append(arrival)
        return arrival

    def _make_room(self, pid: int, served: Sequence[int]) -> bool:
        """See to it that there is a place for process `pid`; False if nothing can leave for it."""
        own = [arrival for arrival in self.arrivals if arrival.peer.pid == pid]
        if len(own) + served.count(pid) >= self._share:
            leaving, why = own, f"process {pid} has {self._share} connections, its share"
        elif len(self.arrivals) + len(served) >= self._places:
            leaving, why = self.arrivals, f"all {self._places} places are taken"
        else:
            return True
        if not leaving:
            self._report(f"a {self._name} was refused: {why}, and all of them are served: try again later")
            return False
        self._turn_away(leaving[0], why)
        return True

    def _turn_away(self, arrival: Arrival, why: str) -> None:
        self._report(f"{self._name} {arrival.peer.pid} was turned away after the longest wait: {why}")
        self.dismiss(arrival)

    def forget_gone(self) -> None:
        """Close what has been closed at the other end."""
        for arrival in [each for each in self.arrivals if each.has_gone()]:
            self.dismiss(arrival)

    def release(self, arrival: Arrival) -> Arrival:
        """Let an arrival go to be served: it is the caller's from now on."""
        self.arrivals.remove(arrival)
        return arrival

    def dismiss(self, arrival: Arrival) -> None:
        """Close an arrival's connection."""
        self.release(arrival).close()

    def close(self) -> None:
        """Close all connections that wait; a second call does nothing."""
        while self.arrivals:
            self.dismiss(self.arrivals[0])
