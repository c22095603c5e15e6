"""Devices in other processes: they are handed RAM, the present bitmap and a notifier, and asked before pages go.

A device touches RAM by itself wherever the bitmap says that it is present; for the rest it asks on the notifier.
It is trusted with the RAM it was handed, into which it can write anything at any time, and with nothing else: it can
change neither the bitmap nor the size of RAM, and cannot hold the machine up (`kvmdp.peers.session`).

Why no write of a device is lost. The pager clears a page's bit, then calls `invalidate`, and touches the page's bytes
or trap only after that. A device that was listed by then has acknowledged, or is gone. One that was not is listed
before its hand-over is sent, under the same mutex, and so maps a bitmap in which the bit is clear already.

A device that was cut off and lives stays listed: as long as it has RAM mapped no page is taken away. It keeps no other
device out, but its own process begins no second session. What it still writes is a device's own: it is trusted with
the RAM it was handed.

Units: RAM pages, seconds of time.monotonic.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from kvmdp.errors import PagingError
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.pager import Pager
from kvmdp.paging.ports import Trap
from kvmdp.peers.requests import PeerCounters
from kvmdp.peers.session import DeviceSession
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.handover import Handover, Role, new_epoch
from kvmdp.peers.wire.notifier import hand_over, notifier_pair
from kvmdp.peers.wire.records import Kind
from kvmdp.trap.fits import Together, check

_PATIENCE_SECONDS = 10.0
_JOIN_SECONDS = 30.0
_MOST_LIVING = 16  # devices that were cut off and live: each costs a thread and two descriptors


def _ignore(_: int) -> None:
    """Take no note of what a device has completed."""


def check_shareable(backing: Backing, trap: Trap) -> None:
    """Raise ValueError if RAM cannot be handed to other processes, as `kvmdp.trap.fits` has it."""
    fills_elsewhere = trap.fill_view is not backing.vmm.view
    check(Together(backing, mode="missing" if fills_elsewhere else None, devices=True))


class DeviceServer:
    """Serves devices in other processes; owns their sessions. It is the pager's `peers`.

    Arguments: the machine's RAM; `report(sentence)`, told of every session that ends otherwise than with a BYE, from
    a thread that serves: it must not block; `patience`, how many seconds a device has to let go of a page.

    `counters` is of all sessions together. Raises ValueError if RAM cannot be shared.
    """

    def __init__(
        self,
        layout: GuestLayout,
        backing: Backing,
        pager: Pager,
        report: Callable[[str], None],
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        check_shareable(backing, pager.trap)
        self.counters = PeerCounters()
        self._layout = layout
        self._backing = backing
        self._pager = pager
        self._report = report
        self._patience = patience
        # One hand-over at a time. No thread that serves a fault or a revocation takes it.
        self._serving = threading.Lock()
        self._mutex = threading.Lock()  # guards what follows
        self._sessions: list[DeviceSession] = []
        self._frozen = False
        self._closed = False

    def serve(
        self, connection: socket.socket, on_completed: Callable[[int], None] = _ignore
    ) -> DeviceSession:
        """Begin a session with the process that is connected, and close the connection, in any case.

        `on_completed(count)` is called with each COMPLETED; it must not block. Raises EndpointError for another
        user's process, PagingError for one that was cut off before, NoThreadError, OSError.
        """
        with connection, self._serving, contextlib.ExitStack() as stack:
            peer = Peer.of(connection)
            stack.callback(peer.close)
            self._reap(peer.pid)
            notifier, theirs, credits = notifier_pair()
            stack.callback(notifier.close)
            with theirs:
                session = self._enlist(peer, notifier, credits, on_completed)
                stack.pop_all()  # the session has them
                regions = tuple((each.gpa, each.size, each.offset) for each in self._layout.regions)
                handed = Handover(session.epoch, Role.DEVICE, credits, self._layout.pages, regions)
                try:
                    session.start()
                    hand_over(connection, handed, self._backing.fd, self._pager.bitmap.fd, theirs)
                except BaseException:
                    self._close([session])
                    raise
        return session

    def _reap(self, pid: int) -> None:
        """Close the sessions that are over, for process `pid` to begin one. Raises PagingError if it may not."""
        with self._mutex:
            if self._closed:
                raise PagingError("the machine is stopping: no device can begin a session")
            sessions = tuple(self._sessions)
        over = [each for each in sessions if each.ending is not None]
        living = [each for each in over if not each.wait_gone(each.peer.pid == pid)]
        self._close([each for each in over if each not in living])
        if any(each.peer.pid == pid for each in living):
            raise PagingError(
                f"device process {pid} has left a session but has RAM mapped: end it before it begins another"
            )
        if len(living) >= _MOST_LIVING:
            raise PagingError(
                f"{len(living)} devices have left their sessions but have RAM mapped: end process "
                f"{living[0].peer.pid} and the others before another device begins"
            )

    def _enlist(
        self, peer: Peer, notifier: socket.socket, credits: int, on_completed: Callable[[int], None]
    ) -> DeviceSession:
        with self._mutex:
            session = DeviceSession(
                peer,
                notifier,
                new_epoch(),
                credits,
                self._layout,
                self._pager,
                self.counters,
                self._patience,
                lambda: self._frozen,
                self._report,
                on_completed,
            )
            if self._frozen:
                session.ask(Kind.FREEZE)
            self._sessions.append(session)
        return session

    # The pager's `peers`

    def invalidate(self, first: int, count: int, deadline: float | None) -> None:
        """Return when no device touches these pages any more; their bits are cleared. Raises BusyError."""
        with self._mutex:
            sessions = tuple(self._sessions)
        if not sessions:
            return
        for gpa, _, pages in self._layout.runs(first, count):
            self._ask(sessions, Kind.INVALIDATE, gpa, pages * PAGE_SIZE, deadline)

    def freeze(self, deadline: float | None) -> None:
        """Return when no device touches RAM any more; none will before `thaw`. Raises BusyError; `thaw` follows."""
        with self._mutex:
            self._frozen = True  # a device that comes from now on is told as it begins
            sessions = tuple(self._sessions)
        self._ask(sessions, Kind.FREEZE, 0, 0, deadline)

    def thaw(self) -> None:
        """Let devices go on."""
        with self._mutex:
            if not self._frozen:
                return
            self._frozen = False
            sessions = tuple(self._sessions)
        for session in sessions:
            session.tell(Kind.THAW)

    def _ask(
        self, sessions: tuple[DeviceSession, ...], kind: Kind, gpa: int, size: int, deadline: float | None
    ) -> None:
        """Ask all, then wait for all."""
        asked = [(session, session.ask(kind, gpa, size, deadline)) for session in sessions]
        for session, token in asked:
            session.await_ack(token, deadline)

    # The end

    def _close(self, sessions: list[DeviceSession]) -> None:
        """End sessions, all at once, and join their threads."""
        deadline = time.monotonic() + _JOIN_SECONDS
        for session in sessions:
            session.end()
        stuck = [session for session in sessions if not session.join(deadline)]
        with self._mutex:
            self._sessions = [each for each in self._sessions if each not in sessions]
        if stuck:
            raise PagingError(
                f"a fetch for {stuck[0]} did not end within {_JOIN_SECONDS:.0f} seconds: the source holds it"
            )

    def close(self) -> None:
        """End all sessions with a BYE and join their threads; a second call does nothing.

        Comes before RAM is unmapped and the pager closed; what the devices have mapped lives on as long as they do.
        """
        with self._mutex:
            self._closed = True
        with self._serving:
            self._close(list(self._sessions))
