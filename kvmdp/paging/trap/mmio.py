"""The `mmio` trap: absent granules lie in no memslot.

KVM takes an access there for device I/O: it emulates the instruction and exits with KVM_EXIT_MMIO, or with an
emulation failure for instructions its emulator does not know. So the access is *completed*, not retried
(`kvmdp.paging.vcpu`). Works on every kernel with memslots, needs nothing but /dev/kvm.
"""

from __future__ import annotations

from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.paging.trap.slot_trap import SlotTrap


class MmioTrap(SlotTrap):
    """Absent pages have no slot; admitting them makes one a granule, revoking them deletes it.

    Revoking needs no quiesce: KVM waits until no vCPU uses a slot before the delete returns, and an access
    after that exits like any other to an absent page. Where slots have been merged, the rest of such a slot is present
    and must not flicker while a vCPU looks: then revoking stops the vCPUs by itself.
    """

    name = "mmio"
    needs_quiesce = False
    absent = frozenset((None,))

    def admit(self, first: int, count: int) -> None:
        """Make the granules' slots, or one where RAM has too many granules."""
        size = None if self._slots.in_regions else self.granule // PAGE_SIZE
        with self._slots.claimed(first, count):
            self._open(first, count, size)
        self._populate(first, count)
        self._changed(first, count)

    def revoke(self, first: int, count: int) -> None:
        """Take the pages' slots away."""
        with self._slots.claimed(first, count):
            blocks = self._slots.overlapping(first, count)
            if any(block.without(first, first + count) for block in blocks):
                assert self._presence is not None
                with self._presence.quiesced():
                    self._slots.take_out(first, count)
            else:
                self._slots.take_out(first, count)
        self._changed(first, count)
