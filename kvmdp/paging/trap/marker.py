"""The `marker` trap: absent pages have a poison marker in the page table of the guest view.

A marker (UFFDIO_POISON) makes KVM's own fault on the page fail as if the page were broken hardware: KVM_RUN
returns EINTR with a SIGBUS (BUS_MCEERR_AR) pending whose address is the page's. The access is retried once
the marker has been replaced, by UFFDIO_CONTINUE (shared memory, filled through the VMM view) or UFFDIO_COPY
(anonymous memory, filled in a staging area).

Needs UFFD_FEATURE_POISON (Linux 6.6); a userfaultfd for user-mode faults alone will do, which needs no
privilege.

The guest view is registered MISSING as well as MINOR: with MISSING alone KVM's fault could map the page cache's
page behind our back. A reader thread serves what comes through: pages that reclaim or a collapse took out of
the page table while they were present.
"""

from __future__ import annotations

import os
import select
import threading

from kvmdp.abi import userfaultfd as abi
from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.memory.mapping import Mapping
from kvmdp.paging.fault import PagingError
from kvmdp.paging.trap.base import Presence
from kvmdp.paging.trap.slots import RamSlots
from kvmdp.paging.trap.uffd import Uffd, supported_features

_MESSAGES = 32


class MarkerTrap:
    """Absent pages are under markers; RAM has one plain memslot a region."""

    name = "marker"
    granule = PAGE_SIZE

    def __init__(self, _vm: Vm, slots: RamSlots, backing: Backing) -> None:
        self._slots = slots
        self._backing = backing
        self._guest = backing.guest
        wanted = abi.UFFD_FEATURE_POISON
        self._mode = abi.UFFDIO_REGISTER_MODE_MISSING
        if backing.shared:
            wanted |= abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM
            self._mode |= abi.UFFDIO_REGISTER_MODE_MINOR
        if supported_features() & abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM:
            # Not for its faults: with it, markers survive a collapse into a huge page.
            wanted |= abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            self._mode |= abi.UFFDIO_REGISTER_MODE_WP
        self._uffd = Uffd(wanted, kernel_faults=False)
        # Private memory cannot be written behind its markers: it is filled in a staging area of the same size,
        # of which only what is on its way takes memory.
        self._staging = None if backing.shared else Mapping.anonymous(backing.size)
        self._presence: Presence | None = None
        self._reader: threading.Thread | None = None
        self._wakeup = -1

    @property
    def needs_quiesce(self) -> bool:
        """Private pages must stand still while their bytes move to the staging area; shared ones need not."""
        return self._staging is not None

    @property
    def fill_view(self) -> memoryview:
        """The VMM view of shared memory, the staging area of private memory."""
        return (self._staging or self._backing.vmm).view

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def arm(self, presence: Presence) -> None:
        """Register the guest view, put markers on what is absent, start the reader."""
        if not self._slots.count:
            self._slots.map_plain()
        self._presence = presence
        self._uffd.register(self._guest.hva, self._guest.length, self._mode)
        for first, count in presence.bitmap.absent_runs().tolist():
            self._uffd.poison(self._guest.hva + first * PAGE_SIZE, count * PAGE_SIZE)
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reader = threading.Thread(target=self._read, name="marker-reader")
        self._reader.start()

    def disarm(self) -> None:
        """Unregister the guest view and stop the reader."""
        self._stop_reader()
        self._uffd.unregister(self._guest.hva, self._guest.length)

    def admit(self, first: int, count: int) -> None:
        """Replace markers by the pages' content."""
        offset, length = first * PAGE_SIZE, count * PAGE_SIZE
        if self._staging is None:
            self._uffd.continue_(self._guest.hva + offset, length)
        else:
            self._uffd.copy(self._guest.hva + offset, self._staging.hva + offset, length)
            self._staging.drop(offset, length)

    def revoke(self, first: int, count: int) -> None:
        """Put markers back over present pages, whose bytes stay in the memory file or move to the staging area.

        Shared memory, while vCPUs run: the drop takes the page from the guest, and from then on a vCPU's write
        faults. Until the marker is there such a fault is a MINOR one, which nobody answers (the reader finds
        the page not present), and the marker wakes it into its SIGBUS. Should the page come back between the
        two calls, the marker finds it mapped and both are made again. So when this returns no vCPU can have
        written after the drop that counted.
        """
        offset, length = first * PAGE_SIZE, count * PAGE_SIZE
        if self._staging is not None:
            self._staging.view[offset : offset + length] = self._guest.view[offset : offset + length]
        for start in range(offset, offset + length, PAGE_SIZE):
            while True:
                self._guest.drop(start, PAGE_SIZE)
                if self._uffd.poison(self._guest.hva + start, PAGE_SIZE):
                    break

    def reassert(self, first: int, count: int) -> None:
        """Admit pages again that are present and have trapped: the reader put a marker where none belongs.

        It can: it sees a fault, finds the page not admitted yet, and sets the marker after the admit, if the
        page was taken out of the page table once more between the two.
        """
        if self._staging is None:
            self.admit(first, count)

    def _read(self) -> None:
        try:
            self._serve_until_stopped()
        except Exception as error:
            if self._presence is not None:
                self._presence.abort(PagingError(f"the reader of the marker trap broke: {error!r}"))

    def _serve_until_stopped(self) -> None:
        messages = (abi.uffd_msg * _MESSAGES)()
        poll = select.poll()
        poll.register(self._uffd.fd, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while not any(fd == self._wakeup for fd, _ in poll.poll()):
            for index in range(self._uffd.read(messages)):
                message = messages[index]
                if message.event == abi.UFFD_EVENT_PAGEFAULT:
                    self._serve(message.arg.pagefault.address - self._guest.hva)

    def _serve(self, offset: int) -> None:
        """Answer a fault that came through: map the page if it is present, else put the marker there.

        The pin keeps the page present until it is mapped; without it a revocation could end between the look
        at the page's state and the call, and the guest would be let into a page it was shut out of.
        """
        assert self._presence is not None
        page = offset // PAGE_SIZE
        hva = self._guest.hva + page * PAGE_SIZE
        if not self._presence.hold(page):
            self._uffd.poison(hva, PAGE_SIZE)
            return
        try:
            if self._staging is None:
                self._uffd.continue_(hva, PAGE_SIZE)
            else:
                self._uffd.wake(hva, PAGE_SIZE)
        finally:
            self._presence.release(page)

    def _stop_reader(self) -> None:
        if self._reader is not None:
            os.eventfd_write(self._wakeup, 1)
            self._reader.join()
            os.close(self._wakeup)
            self._reader = None

    def close(self) -> None:
        """Stop the reader, close the userfaultfd, give back the staging area."""
        self._stop_reader()
        self._uffd.close()
        if self._staging is not None:
            self._staging.close()
        self._slots.close()
