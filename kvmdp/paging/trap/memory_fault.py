"""The `memory-fault` trap: absent granules lie in memslots bound to a closed guest_memfd.

A vCPU access exits with KVM_EXIT_MEMORY_FAULT and the gpa, whatever the size of the host's pages, and absent
memory takes no user page tables. Documented for guest_memfd as an error return; that it is a clean, retryable
exit is how Linux 6.18 and later behave, which `kvmdp.machine.probe` proves before anyone relies on it.

Needs KVM_CAP_GUEST_MEMFD_FLAGS (6.18) with GUEST_MEMFD_FLAG_MMAP, and no privilege beyond /dev/kvm.
"""

from __future__ import annotations

from kvmdp.abi.kvm import GUEST_MEMFD_FLAG_MMAP, KVM_CAP_GUEST_MEMFD_FLAGS
from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.paging.fault import UnsupportedError
from kvmdp.paging.trap.base import Presence
from kvmdp.paging.trap.slots import RamSlots, SlotTrap


class MemoryFaultTrap(SlotTrap):
    """Absent granules are closed slots; admitting one replaces it by an ordinary slot.

    Between the delete and the create another vCPU finds no slot at all and exits with KVM_EXIT_MMIO; the run
    loop knows (`kvmdp.paging.vcpu`). Revoking makes a closed slot, for which every vCPU must be out of
    KVM_RUN (`kvmdp.paging.trap.slots` says why).
    """

    name = "memory-fault"
    needs_quiesce = True

    def __init__(self, vm: Vm, slots: RamSlots, backing: Backing) -> None:
        super().__init__(slots, backing)
        if not vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
            raise UnsupportedError(
                "the trap memory-fault needs guest_memfd with GUEST_MEMFD_FLAG_MMAP (KVM_CAP_GUEST_MEMFD_FLAGS), "
                "which this kernel's KVM lacks: use Linux 6.18 or later, or another trap"
            )

    def arm(self, presence: Presence) -> None:
        """Make one slot a granule: closed where it is absent, ordinary where it is present."""
        self._slots.unmap()
        absent: set[int] = set()
        for first, count in presence.bitmap.absent_runs().tolist():
            absent.update(self._slots.granules(first, count))
        self._slots.close_granules(sorted(absent))
        for first, count in presence.bitmap.present_runs().tolist():
            for number in self._slots.granules(first, count):
                self._slots.open(number)

    def admit(self, first: int, count: int) -> None:
        """Replace closed slots by ordinary ones."""
        for number in self._slots.granules(first, count):
            self._slots.delete(number)
            self._slots.open(number)
        self._populate(first, count)

    def revoke(self, first: int, count: int) -> None:
        """Replace ordinary slots by closed ones."""
        numbers = self._slots.granules(first, count)
        for number in numbers:
            self._slots.delete(number)
        self._slots.close_granules(numbers)
