"""The disk in another process: the machine's side, which lets devices in, and the device's, which serves a session.

The guest sees one disk. Behind it is one device process at a time: when it has died, the next that connects is told of
every ring there is and goes on from what lies in RAM (`kvmdp.machine.disk` says why that is exact). Which ring was rung
stands in the DOORBELL: number of the vCPU, gpa of its ring.

Units: seconds; gpa in bytes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kvmdp.machine import guest_abi as guest
from kvmdp.machine.disk import DiskDevice, DiskFile
from kvmdp.machine.disk_ports import DiskPorts
from kvmdp.machine.machine import Machine
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.fault import CancelledError, FrozenError, PagingError, broken
from kvmdp.paging.remote import RemoteMemory
from kvmdp.paging.session import DeviceSession
from kvmdp.thread import JoinableThread
from kvmdp.wire import handover
from kvmdp.wire.endpoint import EndpointError, Listener

_TICK_SECONDS = 0.1
_THAW_SECONDS = 0.01


class RemoteDisk:
    """Lets device processes in at `listener`, one after the other; owns a thread, not the listener.

    `report(sentence)` is told who came and who died; it must not block. If there has been no device for `timeout`
    seconds the machine is paused with that as its error. A context manager; close it before the machine. Raises
    ValueError if RAM cannot be shared.
    """

    def __init__(
        self, machine: Machine, listener: Listener, timeout: float, report: Callable[[str], None]
    ) -> None:
        self._listener = listener
        self._timeout = timeout
        self._report = report
        self._server = machine.serve_devices(report)
        self._memory = GuestMemory(machine.layout, machine.backing, machine.pager)
        self._mutex = threading.Lock()  # guards the session
        self._came = threading.Event()
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
        deadline = time.monotonic() + self._timeout
        while not self._closed:
            if time.monotonic() >= deadline:
                raise PagingError(
                    f"paused: no device came to {self._listener.path} within {self._timeout:g} seconds: start "
                    f"kvmdp device --connect {self._listener.path} --file DISK, or give more time with --device-timeout"
                )
            try:
                connection = self._listener.accept(_TICK_SECONDS)
            except TimeoutError:
                continue
            try:
                session = self._server.serve(connection, self._completed)
            except (EndpointError, PagingError, OSError) as error:
                self._report(f"a device was refused: {error}")
                continue
            self._report(f"{session} serves the disk")
            return session
        return None

    def _attend(self, session: DeviceSession) -> None:
        with self._mutex:
            self._session = session
        self._came.set()
        for vcpu, ring in self.ports.known():
            session.ring(vcpu, ring)
        while not session.wait_ended(_TICK_SECONDS):
            if self._closed:
                return
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
        for _, ring in self.ports.known():
            try:
                header = self._memory.read(ring, guest.DISK_RING_COMPLETED + 8, nowait=True)
            except (PagingError, ValueError):
                return "an unknown number of requests outstanding"
            submitted = int.from_bytes(header[guest.DISK_RING_SUBMITTED :][:8], "little")
            requests += submitted - int.from_bytes(header[guest.DISK_RING_COMPLETED :][:8], "little")
        return f"{requests} request{'s' * (requests != 1)} outstanding"

    def _completed(self, count: int) -> None:
        # Which ring it was the record does not tell; a vCPU that is woken too early waits again.
        for vcpu, _ in self.ports.known():
            self.ports.notify(vcpu)

    def close(self) -> None:
        """Let nobody in any more and end the session; a second call does nothing."""
        self._closed = True
        self._thread.join()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_disk(connection: socket.socket, file: DiskFile) -> DiskDevice:
    """Be the disk of the machine at the other end of `connection`, from its hand-over to its BYE.

    Returns the device, for its counts. Raises HandoverError if that is no machine, PagingError if it dies, or a page
    cannot be had; ValueError for descriptors that are not what they should be; OSError. The connection and the file
    stay the caller's.
    """
    given, descriptors = handover.receive(connection)
    with RemoteMemory(given, descriptors) as memory:
        device = DiskDevice(memory, file)
        while (rung := memory.wait_doorbell()) is not None:
            try:
                _serve_thawed(device, rung.gpa)
            except CancelledError:
                continue  # the machine stops; its BYE is next
            memory.completed(device.requests)
        return device


def _serve_thawed(device: DiskDevice, ring: int) -> None:
    """Serve a ring, after a freeze if there is one."""
    while True:
        try:
            device.serve(ring)
            return
        except FrozenError:
            time.sleep(_THAW_SECONDS)
