"""The other side of `kvmdp.peers.handler.source`: serves the faults of machines in other processes from a source.

Several machines are served at the same time, so that none has to wait for another's end. One thread, the caller's,
waits for everything that is seldom: new connections, hand-overs, deaths, ends of sessions. It never waits for one
machine. Faults are taken by the workers of each session (`kvmdp.peers.handler.machine_session`).

    a process connects        gets a place (`kvmdp.peers.wire.lobby`) and the offer
    it says nothing           loses the place after `_PATIENCE_SECONDS`
    it hands over             becomes a session, in the same place
    it dies, or the notifier  the session ends: nothing is written into its RAM any more, and once each worker is done
    is closed, or it breaks   with the fill that it is at, the place is free
    the protocol
    this process lacks        the machine is refused, or given up, with a sentence; the others are served on
    threads, descriptors

Units: seconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import NoReturn

from kvmdp.closing import Closing
from kvmdp.peers.handler.machine_session import MachineSession
from kvmdp.peers.wire import handover, offer
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.peers.wire.handover import HandoverError
from kvmdp.peers.wire.lobby import Arrival, Lobby
from kvmdp.shortage import NoThreadError, in_words
from kvmdp.source.base import PageSource

_PATIENCE_SECONDS = 60.0  # from the offer to the hand-over: a large machine takes a while to make
_PAUSE_SECONDS = 0.1  # before it is tried again to let in what could not be let in


class PageServer(Closing):
    """Serves machines that connect to `listener` from `source`; both stay the caller's. A context manager.

    `report` is told in a sentence of each session's beginning and end, from any thread; it must not block.
    `low_ram_end` is the gpa at which the hole begins of the machine that the source is of, None if it is of none.
    Raises OSError.
    """

    def __init__(
        self,
        listener: Listener,
        source: PageSource,
        report: Callable[[str], None],
        low_ram_end: int | None = None,
    ) -> None:
        self._offered = offer.Offer(source.size, low_ram_end)
        self._listener = listener
        self._source = source
        self._report = report
        self._lobby = Lobby(listener, "machine", report)
        self._sessions: list[MachineSession] = []
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # a session's last worker has gone

    def run(self) -> NoReturn:
        """Serve for ever."""
        while True:
            self._wait()
            self._end_sessions()
            self._look_at_arrivals()
            self._take_in()

    def _wait(self) -> None:
        """Sleep until there is something to look at."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        if not self._lobby.is_short:  # or that would be told again and again
            poll.register(self._listener.socket, select.POLLIN)
        for arrival in self._lobby.arrivals:
            poll.register(arrival.connection, select.POLLIN)
            poll.register(arrival.peer.pidfd, select.POLLIN)
        for session in self._sessions:
            if not session.ending:  # or its death would be told again and again
                poll.register(session.peer.pidfd, select.POLLIN)
        poll.poll(self._longest_wait() * 1000)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ended)

    def _longest_wait(self) -> float:
        """Return when there is something to do although nothing happens, in seconds from now."""
        if self._lobby.is_short:
            return _PAUSE_SECONDS
        if not self._lobby.arrivals:
            return _PATIENCE_SECONDS
        return max(self._lobby.arrivals[0].since + _PATIENCE_SECONDS - time.monotonic(), 0)

    # Sessions

    def _end_sessions(self) -> None:
        """Close the sessions that are over, end those whose machine has died."""
        for session in [*self._sessions]:
            if not session.ending and session.peer.wait_dead(0):
                session.end()
            if session.over:
                self._sessions.remove(session)
                session.close()
                self._report(f"machine {session.peer.pid} has gone: {session.summary()}")

    # Arrivals

    def _take_in(self) -> None:
        """Let in the machines that have connected, and make them the offer."""
        for arrival in self._lobby.take_in([session.peer.pid for session in self._sessions]):
            self._attempt(arrival, self._offer)

    def _look_at_arrivals(self) -> None:
        for arrival in [*self._lobby.arrivals]:
            if arrival.peer.wait_message(arrival.connection, 0):
                self._attempt(arrival, self._begin)
            elif arrival.since + _PATIENCE_SECONDS <= time.monotonic():
                self._give_up(arrival, f"nothing was handed over within {_PATIENCE_SECONDS:g} seconds")

    def _attempt(self, arrival: Arrival, what: Callable[[Arrival], None]) -> None:
        """Do `what` for an arrival, and give it up if that fails: whatever it is, the others are served on."""
        try:
            what(arrival)
        except (HandoverError, NoThreadError) as error:
            self._give_up(arrival, str(error))
        except OSError as error:
            self._give_up(arrival, str(error.strerror))
        except Exception as error:  # a fault of ours
            self._give_up(arrival, f"serving it broke: {in_words(error)}")

    def _give_up(self, arrival: Arrival, why: str) -> None:
        self._lobby.dismiss(arrival)
        self._report(f"machine {arrival.peer.pid} was given up: {why}")

    def _offer(self, arrival: Arrival) -> None:
        offer.send(arrival.connection, self._offered)

    def _begin(self, arrival: Arrival) -> None:
        """Make a session of an arrival that has handed over, or died. Raises what `_attempt` deals with."""
        try:
            terms, descriptors = handover.receive(arrival.connection)
        except BlockingIOError:
            raise HandoverError("it has died before the hand-over") from None
        pid = arrival.peer.pid
        session = MachineSession(
            arrival.peer,
            terms,
            descriptors,
            self._source,
            lambda text: self._report(f"machine {pid}: {text}"),
            lambda: os.eventfd_write(self._ended, 1),
        )
        self._sessions.append(session)  # before it begins: an interruption must find it
        try:
            session.start()
        except NoThreadError:
            self._sessions.remove(session)
            session.close()
            raise
        self._lobby.release(arrival).connection.close()
        self._report(f"machine {pid} has come: session {terms.epoch}, {terms.memory_bytes >> 20} MiB of RAM")

    def close(self) -> None:
        """Turn all away, end all sessions; returns when each worker is done with the fill that it is at. Once."""
        self._lobby.close()
        for session in self._sessions:
            session.end()
        for session in self._sessions:
            session.close()
        os.close(self._ended)
