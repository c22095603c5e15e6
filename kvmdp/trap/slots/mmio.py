"""The `mmio` trap: absent granules lie in no memslot.

KVM takes an access there for device I/O: it emulates the instruction and exits with KVM_EXIT_MMIO, or with an
emulation failure for instructions its emulator does not know. A load is called off and run again, a store is
completed (`kvmdp.vcpu.emulated`). Works on every kernel with memslots, needs nothing but /dev/kvm.
"""

from __future__ import annotations

from kvmdp.page import PAGE_SIZE
from kvmdp.trap.slots.slot_trap import SlotTrap


class MmioTrap(SlotTrap):
    """Absent pages have no slot; admitting them makes one a granule, revoking them deletes it.

    Either way every vCPU is out of KVM_RUN meanwhile: an access that has found no slot is KVM's emulator's already, and
    would go on in it, without an exit, if the slot were there by the time the emulator looks.
    """

    name = "mmio"
    catches_nested_walks = False  # to the CPU memory without a memslot is no memory
    absent = frozenset((None,))

    def admit(self, first: int, count: int) -> None:
        """Make the granules' slots, or one where RAM has too many granules."""
        size = None if self._slots.in_regions else self.granule // PAGE_SIZE
        assert self._pager is not None
        slots = self._slots
        claim = slots.claim(first, count)
        try:
            self._pager.gate.while_stopped(lambda: self._open(first, count, size))
        finally:
            slots.release(claim)
        self._populate(first, count)
        self._changed(first, count)

    def _shut_out(self, first: int, count: int) -> None:
        """Take the pages' slots away."""
        claim = self._slots.claim(first, count)
        try:
            self._slots.take_out(first, count)
        finally:
            self._slots.release(claim)
        self._changed(first, count)
