"""The `marker` trap: absent pages have a poison marker in the page table of the guest view.

A marker (UFFDIO_POISON) makes KVM's own fault on the page fail as if the page were broken hardware: KVM_RUN
returns EINTR with a SIGBUS (BUS_MCEERR_AR) pending whose address is the page's. The access is retried once the
marker has been replaced by the page (`kvmdp.trap.uffd.guest_view`).

Needs UFFD_FEATURE_POISON (Linux 6.6); a userfaultfd for user-mode faults alone will do, which needs no privilege.

A reader thread serves what comes through all the same: pages that reclaim or a collapse took out of the page table
while they were present. A userfaultfd for user-mode faults alone is not told of those, for it is KVM that faults:
KVM_RUN fails with EFAULT. What we take out of the page table ourselves is put back, or marked, while no vCPU is in
KVM_RUN (`needs_quiesce`); what the host takes out is put back after the EFAULT (`kvmdp.vcpu.faults`, `reassert`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import PagingError
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.ports import ForReaders
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.kind import Materials
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.descriptor import supported_features
from kvmdp.trap.uffd.guest_view import UffdTrap

# How often a page may come back between its drop and its marker. Each time a reader has to meet the moment between the
# two; this often in a row is no accident.
_MAX_RETURNS = 10_000


class MarkerTrap(UffdTrap):
    """Absent pages are under markers."""

    name = "marker"
    repeats = True

    @classmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed."""
        return cls(made_of.slots, made_of.backing)

    def __init__(self, slots: RamSlots, backing: Backing) -> None:
        # Write protection not for its faults: with it, markers survive a collapse into a huge page.
        protection = supported_features() & abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        super().__init__(
            slots, backing, abi.UFFD_FEATURE_POISON | protection, minor=backing.shared, kernel_faults=False
        )

    def arm(self, pager: ForReaders) -> None:
        """Register the guest view, start the reader, put markers on what is absent."""
        super().arm(pager)
        self.poison_absent()

    def revoke(self, first: int, count: int) -> None:
        """Put markers back over present pages, whose bytes stay in the memory file or move to the staging area.

        Shared memory, while vCPUs run: the drop takes the page from the guest, and from then on a vCPU's write
        faults. Until the marker is there such a fault is a MINOR one, which gets no answer (the reader finds
        the page not present), and the marker wakes it into its SIGBUS. Should the page come back between the
        two calls, the marker finds it mapped and both are made again. So when this returns no vCPU can have
        written after the drop that counted. Where the fault could not sleep no vCPU runs (`needs_quiesce`).
        """
        self._regions.reopen(first, count)
        if self._staging is not None:
            self._stage(first, count)
            self._drop(first, count)  # all at once, for it is announced to a reader
            for start, number, uffd in self._pieces(first, count):
                uffd.poison(self._hva(start), number * PAGE_SIZE)
            return
        for page in range(first, first + count, self._unit):
            self._shut_out(page)

    def _shut_out(self, page: int) -> None:
        """Put a marker where a page is mapped. Raises PagingError if it comes back each time before that."""
        uffd = self._uffd_of(page)
        for _ in range(_MAX_RETURNS):
            self._view.drop(page * PAGE_SIZE, self._unit_bytes)
            if uffd.poison(self._hva(page), self._unit_bytes):
                return
        raise PagingError(
            f"page {page} of the guest view is mapped again {_MAX_RETURNS} times in a row before it can be marked: "
            "something else maps guest memory in this process"
        )

    def picture(self) -> Picture:
        """All of RAM is in open memslots; what is absent is under markers."""
        return dataclasses.replace(super().picture(), markers=self.granule == PAGE_SIZE)

    def release_sleepers(self) -> None:
        """Do nothing: an access to an absent page is an exit, no vCPU sleeps."""

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Do nothing, as `release_sleepers`."""

    def _reader(self) -> Callable[[int, int], None]:
        return self._serve

    def _serve(self, address: int, _read: int) -> None:
        """Answer a fault that came through: map the page if it is present, else put the marker there.

        The pin keeps the page present until it is mapped; without it a revocation could end between the look
        at the page's state and the call, and the guest would be let into a page it was shut out of.
        """
        assert self._pager is not None
        page = self._page_of(address)
        uffd, hva = self._uffd_of(page), self._hva(page)
        if not self._pager.hold(page):
            with self._regions.unless_plain(page, self._unit):
                uffd.poison(hva, self._unit_bytes)
            return
        try:
            with self._regions.unless_plain(page, self._unit):
                self._map_again(uffd, page, self._unit)
        finally:
            self._pager.release(page)
