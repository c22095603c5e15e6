"""The `mmio` trap: absent granules lie in no memslot.

KVM takes an access there for device I/O: it emulates the instruction and exits with KVM_EXIT_MMIO, or with an
emulation failure for instructions its emulator does not know. So the access is *completed*, not retried
(`kvmdp.paging.complete`). Works on every kernel with memslots, needs nothing but /dev/kvm.
"""

from __future__ import annotations

from kvmdp.paging.trap.base import Presence
from kvmdp.paging.trap.slots import SlotTrap


class MmioTrap(SlotTrap):
    """Absent granules have no slot; admitting one makes it, revoking one deletes it.

    Revoking needs no quiesce: KVM waits until no vCPU uses a slot before the delete returns, and an access
    after that exits like any other to an absent page.
    """

    name = "mmio"
    needs_quiesce = False

    def arm(self, presence: Presence) -> None:
        """Make one slot a present granule, none for the absent."""
        self._slots.unmap()
        for first, count in presence.bitmap.present_runs().tolist():
            self.admit(first, count)

    def admit(self, first: int, count: int) -> None:
        """Make the granules' slots."""
        for number in self._slots.granules(first, count):
            self._slots.open(number)
        self._populate(first, count)

    def revoke(self, first: int, count: int) -> None:
        """Delete the granules' slots."""
        for number in self._slots.granules(first, count):
            self._slots.delete(number)
