"""The disk in another process: the machine's side, which lets devices in, and the device's, which serves a session.

The guest sees one disk. Behind it is one device process at a time, and others may wait for their turn. When the one has
died, the next is told of every ring there is and goes on from what lies in RAM (`kvmdp.machine.disk` says why that is
exact). Which ring was rung stands in the DOORBELL: number of the vCPU, gpa of its ring.

A device that lives but does not serve is cut off: one that has not finished a request, nor been brought a page, in a
time that it had to itself, since the guest rang. The next is served although it lives. Then no page can be taken away,
as always while such a process has RAM mapped; and if it comes to life again in the middle of a copy, it copies on.

Units: seconds; gpa in bytes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from kvmdp.closing import Closing
from kvmdp.errors import CancelledError, FrozenError, PagingError
from kvmdp.interruption import entered
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.disk import DiskDevice, DiskFile
from kvmdp.machine.disk_ports import DiskPorts
from kvmdp.machine.machine import Machine
from kvmdp.machine.service_watch import ServiceWatch
from kvmdp.own_clock import OwnClock
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.broken import broken
from kvmdp.peers.remote import RemoteMemory
from kvmdp.peers.session import DeviceSession
from kvmdp.peers.wire import handover
from kvmdp.peers.wire.endpoint import EndpointError, Listener, Peer
from kvmdp.peers.wire.handover import HandoverError
from kvmdp.peers.wire.lobby import Arrival, Lobby
from kvmdp.shortage import NoThreadError
from kvmdp.thread import JoinableThread
from kvmdp.waiting import Latch

_TICK_SECONDS = 0.1
HANDOVER_SECONDS: float = 60  # that a device waits for its turn


class RemoteDisk(Closing):
    """Lets device processes in at `listener`, one after the other; owns a thread, not the listener.

    `report(sentence)` is told which device came and which died; it must not block. A device that has not got on with
    its work for `timeout` seconds is cut off; if there has been none for `timeout` seconds the machine is paused with
    that as its error. A context manager; close it before the machine. Raises ValueError if RAM cannot be shared.
    """

    def __init__(
        self, machine: Machine, listener: Listener, timeout: float, report: Callable[[str], None]
    ) -> None:
        self._listener = listener
        self._timeout = timeout
        self._report = report
        self._lobby = Lobby(listener, "device", report)
        self._server = machine.serve_devices(report)
        self._memory = GuestMemory(machine.layout, machine.backing, machine.pager)
        self._mutex = threading.Lock()  # guards the session
        self._came = Latch()
        self._session: DeviceSession | None = None
        self._closed = False
        self.ports = DiskPorts(machine, self._rung)
        self._thread = JoinableThread(
            self._main, "devices", lambda error: machine.pager.abort(broken("the disk broke", error))
        )
        try:
            self._thread.start()
        except BaseException:  # an interruption: the thread may run
            self.close()
            raise

    def await_device(self, timeout: float) -> None:
        """Return once a device has come. Raises PagingError after `timeout` seconds."""
        if not self._came.wait(timeout):
            raise PagingError(f"no device came to {self._listener.path} within {timeout:g} seconds")

    def _rung(self, vcpu: int, ring: int) -> None:
        # The ring is listed already: a session that begins now, after this look, rings for it.
        with self._mutex:
            session = self._session
        if session is not None:
            session.ring(vcpu, ring)

    def _main(self) -> None:
        while (session := self._next_session()) is not None:
            self._attend(session)

    def _next_session(self) -> DeviceSession | None:
        """Wait for a device; None once this is closed. Raises PagingError if none comes."""
        clock = OwnClock(self._timeout)
        deadline = clock.now() + self._timeout
        while not self._closed:
            self._take_in([])
            if self._lobby.arrivals:
                session = self._begin(self._lobby.release(self._lobby.arrivals[0]))
                if session is not None:
                    return session
            else:
                self._await_arrival(min(_TICK_SECONDS, clock.longest_wait))
            if clock.now() >= deadline:
                raise PagingError(
                    f"paused: no device came to {self._listener.path} within {self._timeout:g} seconds: start "
                    f"kvmdp device --connect {self._listener.path} --file DISK, or give more time with --device-timeout"
                )
        return None

    def _take_in(self, served: list[int]) -> None:
        """Let in the devices that have connected, and forget those that have gone again."""
        for _ in self._lobby.take_in(served):
            pass  # a device says nothing before it is handed RAM
        self._lobby.forget_gone()

    def _await_arrival(self, seconds: float) -> None:
        poll = select.poll()
        if not self._lobby.is_short:  # or that would be told again and again
            poll.register(self._listener.socket, select.POLLIN)
        poll.poll(seconds * 1000)

    def _begin(self, arrival: Arrival) -> DeviceSession | None:
        """Begin a session with a device, None if it is refused."""
        with contextlib.closing(arrival):
            try:
                session = self._server.serve(arrival.connection, self._completed)
            except (EndpointError, PagingError, NoThreadError, OSError) as error:
                self._report(f"a device was refused: {error}")
                return None
        self._report(f"{session} serves the disk")
        return session

    def _attend(self, session: DeviceSession) -> None:
        with self._mutex:
            self._session = session
        self._came.set()
        for vcpu, ring in self.ports.known():
            session.ring(vcpu, ring)
        clock = OwnClock(self._timeout)
        watch = ServiceWatch(self._timeout, clock)
        while not session.wait_ended(min(_TICK_SECONDS, clock.longest_wait)):
            if self._closed:
                return
            self._take_in([session.peer.pid])
            progress = (session.steps, *(position and position[1] for position in self._positions()))
            if watch.look(session.rung, session.waits_for, progress):
                session.cut_off(f"it has not got on with the disk's work for {self._timeout:g} seconds")
        with self._mutex:
            self._session = None
        if not self._closed:
            self._report(
                f"{session.ending}, with {self._outstanding()}; waiting {self._timeout:g} seconds for another at "
                f"{self._listener.path}"
            )

    def _outstanding(self) -> str:
        """Say what the rings hold that is not completed."""
        requests = 0
        for position in self._positions():
            if position is None:
                return "an unknown number of requests outstanding"
            submitted, completed = position
            requests += submitted - completed
        return f"{requests} request{'s' * (requests != 1)} outstanding"

    def _positions(self) -> list[tuple[int, int] | None]:
        """Return how many requests of each ring have been submitted and completed; None where that is not present."""
        positions: list[tuple[int, int] | None] = []
        for _, ring in self.ports.known():
            try:
                header = self._memory.read(ring, guest.DISK_RING_COMPLETED + 8, nowait=True)
            except (PagingError, ValueError):
                positions.append(None)
            else:
                submitted = int.from_bytes(header[guest.DISK_RING_SUBMITTED :][:8], "little")
                positions.append(
                    (submitted, int.from_bytes(header[guest.DISK_RING_COMPLETED :][:8], "little"))
                )
        return positions

    def _completed(self, count: int) -> None:
        # Which ring it was the record does not tell; a vCPU that is woken too early waits again.
        for vcpu, _ in self.ports.known():
            self.ports.notify(vcpu)

    def close(self) -> None:
        """Let no device in any more and end the session; a second call does nothing."""
        self._closed = True
        self._thread.join()
        self._lobby.close()
        self._server.close()


def serve_disk(
    connection: socket.socket, machine: Peer, file: DiskFile, patience: float = HANDOVER_SECONDS
) -> DiskDevice:
    """Be the disk of `machine`, the process at the other end of `connection`, from its hand-over to its BYE.

    Returns the device, for its counts. Raises HandoverError if there is no hand-over within `patience` seconds, or what
    comes is none; PagingError if the machine dies, or a page cannot be had; ValueError for a bitmap that is none;
    OSError; NoThreadError. `connection` and `file` stay the caller's, `machine` does not.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(machine.close)
        given, descriptors = _await_hand_over(connection, machine, patience)
        memory = stack.enter_context(entered(RemoteMemory, given, descriptors, machine=machine))
        device = DiskDevice(memory, file)
        while (rung := memory.wait_doorbell()) is not None:
            try:
                _serve_thawed(device, memory, rung.gpa)
            except CancelledError:
                continue  # the machine stops; its BYE is next
            memory.completed(device.requests)
        return device


def _await_hand_over(
    connection: socket.socket, machine: Peer, patience: float
) -> tuple[handover.Handover, handover.Descriptors]:
    """Wait for the hand-over, or the machine's death. Raises HandoverError, OSError."""
    connection.setblocking(False)
    if not machine.wait_message(connection, patience):
        raise HandoverError(
            f"process {machine.pid} has not handed over its memory within {patience:g} seconds: it is stopped, or "
            "another device serves its disk; try again later, or give more time with --timeout"
        )
    try:
        return handover.receive(connection)
    except BlockingIOError:
        raise HandoverError(f"process {machine.pid} has died before the hand-over") from None


def _serve_thawed(device: DiskDevice, memory: RemoteMemory, ring: int) -> None:
    """Serve a ring, after a freeze if there is one."""
    while True:
        try:
            device.serve(ring)
            return
        except FrozenError:
            memory.await_thaw()
