"""The `userfaultfd` mode: absent pages are holes in the guest view; a vCPU that touches one sleeps in the kernel.

The baseline that the other traps are compared with. There is no exit of KVM_RUN: reader threads take the faults
from the descriptor, resolve them through the same pager, and the page's arrival wakes the sleeper. One descriptor
for all of RAM with any number of readers, or one a vCPU (`shards`).

Shared memory can be registered for MISSING faults alone, as the kernel's demand_paging_test does: then an absent page
is a hole of the memory file, for a page that the page cache holds does not trap. So marking it non-present moves its
bytes to the staging area and punches the hole, with every vCPU out of KVM_RUN, and a caller that discards shared memory
in this mode must do it by MADV_REMOVE: MADV_DONTNEED takes nothing out of the file.

Needs a userfaultfd that takes the kernel's own faults, since it is KVM that faults: a privilege.

A reader never waits for a claim: a fault on a page that another thread is at is parked until the claim ends, and is
then woken to fault again if it still has to. Why no wake-up is lost: a sleeper checks the page table after it has
queued itself and before it sleeps; so it either sees the page, or is in the queue when UFFDIO_CONTINUE, UFFDIO_COPY
or UFFDIO_WAKE empties it, or its event is still to be read.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable

from kvmdp.abi import userfaultfd as abi
from kvmdp.abi.mman import MADV_REMOVE
from kvmdp.errors import PagingError
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.claim import Waiter
from kvmdp.trap.inspect import InspectedTrap
from kvmdp.trap.kind import Materials
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.descriptor import supported_features
from kvmdp.trap.uffd.guest_view import UffdTrap
from kvmdp.trap.uffd.options import UffdOptions

_UNKNOWN = -1  # userfaultfd does not say which vCPU it was
NO_POISON = (
    "the trap userfaultfd cannot make a poisoned page a machine check here: this kernel's userfaultfd lacks poison "
    "markers (UFFDIO_POISON, Linux 6.6): use a newer kernel, or another trap"
)


class UserfaultfdTrap(UffdTrap):
    """Absent pages are not mapped; the faults go to readers.

    `latencies` has an array for each reader, filled by it: nanoseconds from the event's read to the sleeper's wake.
    """

    name = "userfaultfd"
    exits = False
    catches_shadow_walks = True  # KVM's own walk sleeps, as any access
    takes_uffd_options = True

    @classmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed. Raises UnsupportedError without the privilege that it needs."""
        return cls(made_of.slots, made_of.backing, made_of.uffd)

    def __init__(self, slots: RamSlots, backing: Backing, options: UffdOptions) -> None:
        super().__init__(
            slots,
            backing,
            abi.UFFD_FEATURE_EVENT_REMOVE,
            minor=backing.shared and options.mode != "missing",
            kernel_faults=True,
            readers=options.readers,
            shards=options.shards,
        )
        self.latencies: list[array[int]] = []

    def revoke(self, first: int, count: int) -> None:
        """Unmap present pages, whose bytes stay in the memory file or move to the staging area.

        What has been staged leaves the memory file too: it is dropped from private memory, punched out of shared.
        From the drop on an access sleeps; its event is parked, because the page is claimed, and woken when the
        claim ends.
        """
        self._regions.reopen(first, count)
        self._stage(first, count)
        self._unmap(first, count)

    def _unmap(self, first: int, count: int) -> None:
        if self._staging is None or not self._backing.shared:
            self._drop(first, count)
            return
        for start, number, _ in self._pieces(first, count):
            self._announce(start, number)
            self._view.advise(MADV_REMOVE, start * PAGE_SIZE, number * PAGE_SIZE)

    def release_sleepers(self) -> None:
        """Let go of every vCPU that sleeps on an absent page, so that it can leave KVM_RUN for good.

        A signal frees most sleepers, but not one whose fault was taken inside KVM's emulator.
        """
        if supported_features() & abi.UFFD_FEATURE_POISON:
            self.poison_absent()
        else:
            # Sleepers go on with pages of zeros, until they leave KVM_RUN; what comes of it is not looked at.
            self.unregister()

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Take the markers from absent pages, so that an access sleeps again; or register again, where there are none.

        A reader may set one behind this, for a fault from before the stop: then the access is an exit, which is as
        good a fault. No bytes are lost: absent pages have none in the guest view.
        """
        assert self._pager is not None
        has_markers = bool(supported_features() & abi.UFFD_FEATURE_POISON)
        if not has_markers:
            self.register()
            self._regions.registered()
        for first, count in absent:
            if has_markers:
                self._drop(first, count)
            else:
                self._unmap(first, count)

    def _release_sleeper(self, page: int) -> None:
        """Let go of the vCPU that sleeps on a page that does not come any more, for the machine is stopping.

        A revocation that was under way takes its marker from a page after `release_sleepers` has been there. A
        fault after that finds the machine cancelled, and no other thread will wake its sleeper.
        """
        uffd, hva = self._uffd_of(page), self._hva(page)
        if supported_features() & abi.UFFD_FEATURE_POISON:
            with self._regions.unless_plain(page, self._unit):
                uffd.poison(hva, self._unit_bytes)
        else:
            uffd.unregister(hva, self._unit_bytes)

    def _reader(self) -> Callable[[int, int], None]:
        latencies = array("Q")
        self.latencies.append(latencies)

        def serve(address: int, read: int) -> None:
            if self._serve(self._page_of(address)):
                latencies.append(time.perf_counter_ns() - read)

        return serve

    def _serve(self, page: int) -> bool:
        """Resolve a fault, or park it; True if the sleeper has been woken."""
        assert self._pager is not None
        uffd, hva = self._uffd_of(page), self._hva(page)
        outcome = self._pager.resolve_or_park(
            PageFault(page, Origin.VCPU, _UNKNOWN), Waiter(lambda: uffd.wake(hva, self._unit_bytes))
        )
        if outcome is Outcome.PRESENT:
            self._serve_present(page)
            return True
        if outcome is Outcome.CANCELLED:
            self._release_sleeper(page)
        elif outcome is Outcome.POISONED:
            self._poison(page)
        # Else parked, or never to be resolved: the source has failed, and the sleeper is let go of at the stop.
        return outcome is Outcome.ADMITTED

    def _poison(self, page: int) -> None:
        """Have a vCPU that sleeps on a poisoned page leave KVM_RUN with a SIGBUS: only its own thread can inject.

        If the page has been healed since, and mapped, it stays so, and the sleeper is woken. So it has been if the
        page's region has been collapsed since.
        """
        assert self._pager is not None
        if supported_features() & abi.UFFD_FEATURE_POISON:
            with self._regions.unless_plain(page, self._unit):
                self._uffd_of(page).poison(self._hva(page), self._unit_bytes)
        else:
            self._pager.abort(PagingError(NO_POISON))

    def _serve_present(self, page: int) -> None:
        """Map a present page that had gone from the page table, pinned so that no revocation ends meanwhile."""
        assert self._pager is not None
        uffd, hva = self._uffd_of(page), self._hva(page)
        if not self._pager.hold(page):
            uffd.wake(hva, self._unit_bytes)  # claimed since: it faults again, and finds the claim
            return
        try:
            with self._regions.unless_plain(page, self._unit):
                self._map_again(uffd, page, self._unit)
        finally:
            self._pager.release(page)
