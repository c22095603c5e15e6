"""The machine's side of the disk: doorbell and wait port, and the device thread that serves in this process.

A vCPU waits for the disk outside KVM_RUN and for a bounded time, so it holds up neither a quiescer nor a stop.

Units: seconds; gpa in bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmdp.closing import Closing
from kvmdp.errors import CancelledError, FrozenError
from kvmdp.kvm import Io, IoIn, IoOut
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.disk import DiskDevice, DiskFile
from kvmdp.machine.machine import Machine
from kvmdp.page import PAGE_SHIFT, Origin
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.broken import broken
from kvmdp.thread import JoinableThread

_LONGEST_WAIT = 0.1  # of a vCPU in the wait port


class DiskPorts:
    """Serves the disk's ports, a ring for each vCPU; `ring` is told (vCPU, gpa of its ring) of each doorbell.

    `ring` must not block. The device calls `notify` after each pass over a ring.

    No completion is missed: `notify` counts, and the wait port waits only while its vCPU has been told the count. The
    guest looks at its ring before it waits; what is completed after that is counted after that.
    """

    def __init__(self, machine: Machine, ring: Callable[[int, int], None]) -> None:
        vcpus = machine.options.vcpus
        self._ring = ring
        self._notified = threading.Condition()  # guards what follows
        self._counts = [0] * vcpus
        self._told = [0] * vcpus
        self._rings: dict[int, int] = {}
        machine.ports.add(guest.DISK_DOORBELL_PORT, self._doorbell)
        machine.ports.add(guest.DISK_WAIT_PORT, self._wait)

    def known(self) -> list[tuple[int, int]]:
        """Return (vCPU, gpa) of every ring that was ever rung, for a device that begins in the middle."""
        with self._notified:
            return list(self._rings.items())

    def notify(self, vcpu: int) -> None:
        """Say that requests of this vCPU's ring may have been completed."""
        with self._notified:
            self._counts[vcpu] += 1
            self._notified.notify_all()

    def _doorbell(self, vcpu: int, io: Io) -> None:
        if isinstance(io, IoIn):
            io.data[:] = bytes(len(io.data))
            return
        gpa = int.from_bytes(io.data[: io.size], "little") << PAGE_SHIFT
        with self._notified:
            self._rings[vcpu] = gpa
        self._ring(vcpu, gpa)

    def _wait(self, vcpu: int, io: Io) -> None:
        if isinstance(io, IoOut):
            return
        with self._notified:
            self._notified.wait_for(lambda: self._counts[vcpu] != self._told[vcpu], _LONGEST_WAIT)
            count = self._told[vcpu] = self._counts[vcpu]
        io.data[:] = (count.to_bytes(8, "little")[: io.size] * io.count)[: len(io.data)]


class DiskThread(Closing):
    """The disk in a thread of this process; owns the thread, not the file. A context manager.

    A page that cannot be had pauses the machine, as it does where a vCPU wants it.
    """

    def __init__(self, machine: Machine, file: DiskFile) -> None:
        self._pager = machine.pager
        memory = GuestMemory(machine.layout, machine.backing, machine.pager, Origin.DEVICE)
        self.device = DiskDevice(memory, file)
        self.ports = DiskPorts(machine, self._rung)
        self._work = threading.Condition()  # guards what follows
        self._waiting: dict[int, int] = {}
        self._closed = False
        self._thread = JoinableThread(
            self._main, "disk", lambda error: self._pager.abort(broken("the disk's thread broke", error))
        )
        try:
            self._thread.start()
        except BaseException:  # an interruption: the thread may run
            self.close()
            raise

    def _rung(self, vcpu: int, ring: int) -> None:
        with self._work:
            self._waiting[vcpu] = ring
            self._work.notify()

    def _main(self) -> None:
        try:
            while (item := self._next()) is not None:
                vcpu, ring = item
                self._serve(ring)
                self.ports.notify(vcpu)
        except CancelledError:
            return  # the machine stops

    def _next(self) -> tuple[int, int] | None:
        with self._work:
            self._work.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            vcpu = next(iter(self._waiting))  # the vCPU that has waited longest
            return vcpu, self._waiting.pop(vcpu)

    def _serve(self, ring: int) -> None:
        while True:
            try:
                self.device.serve(ring)
                return
            except FrozenError:
                self._pager.accesses.await_open(lambda: self._closed)
                if self._closed:
                    return

    def close(self) -> None:
        """End the thread; a second call does nothing. Not while vCPUs run, unless they do not wait for the disk."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._pager.accesses.wake()
        self._thread.join()
