"""A trap of one's own: regions of 2 MiB are absent or present as a whole, and an absent one lies in no memslot.

KVM takes an access to memory without a memslot for one to a device, and leaves KVM_RUN with it. So a page is let in by
making a memslot around it, and shut out by deleting that. Here a fault brings 512 pages: it is dear, and there are few.

A trap is a class that says what it can do (`TrapKind`) and does what the pager asks of it (`kvmdp.paging.ports.Trap`
says when each method is called). `RamSlots` does the work with memslots. A trap that flips smaller pieces is better
made from `SlotTrap`, as `mmio` is: that keeps the number of memslots in bounds.

Run it on a machine with /dev/kvm:  python tests/examples/custom_trap.py [options of kvmdp run]
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence

from kvmdp.cli.main import main
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.ports import ForTraps, Quiescer
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.kind import Materials, TrapKind
from kvmdp.trap.registry import register
from kvmdp.trap.slots.ram_slots import region_size
from kvmdp.trap.slots.slot_map import Kind


class RegionTrap(TrapKind):
    """One memslot for each region of 2 MiB that is present."""

    name = "region"  # kvmdp run --trap region
    catches_nested_walks = False  # to the CPU memory without a memslot is no memory, not even for page tables
    needs_quiesce = True  # every vCPU is to be out of KVM_RUN while pages are revoked
    collapses = False  # a memslot a region is as large as pieces get here
    latencies: Sequence[array[int]] = ()  # no thread of its own serves faults

    @classmethod
    def unit(cls, layout: GuestLayout, backing: Backing | type[Backing], granule: int | None) -> int:
        """Return how many bytes come and go as one: 2 MiB, more in large RAM. Asked before there is a trap."""
        return region_size(layout)

    @classmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed."""
        return cls(made_of)

    def __init__(self, made_of: Materials) -> None:
        self._slots, self._backing = made_of.slots, made_of.backing
        self._gate: Quiescer | None = None
        self.granule = (
            self._slots.granule
        )  # bytes: what `region_size` says, for this trap is not `by_memslot`
        self.fill_view = self.ram_view = self._backing.vmm.view  # a mapping of RAM that never traps
        self.populate: Callable[[int, int], None] | None = (
            self._backing.populate if self._backing.refusable else None
        )

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def arm(self, pager: ForTraps) -> None:
        """Replace the memslots of plain RAM by those of the regions that are present. No vCPU runs."""
        self._gate = pager.gate
        self._slots.unmap()
        for first, count in pager.bitmap.present_runs().tolist():
            self._open(first, count)

    def disarm(self) -> None:
        """Make RAM plain again. No vCPU runs."""
        self._slots.unmap()
        self._slots.map_plain()

    def admit(self, first: int, count: int) -> None:
        """Let the guest into pages, whole regions, whose bytes are in place.

        While no vCPU is in KVM_RUN: one that has found no memslot may be about to look for it again.
        """
        assert self._gate is not None
        claim = self._slots.claim(first, count)
        try:
            self._gate.while_stopped(lambda: self._open(first, count))
        finally:
            self._slots.release(claim)

    def _open(self, first: int, count: int) -> None:
        for piece in self._slots.pieces(first, count, Kind.OPEN, self.granule // PAGE_SIZE):
            self._slots.open(piece.first, piece.pages)

    def revoke(self, first: int, count: int) -> None:
        """Shut the guest out of pages, whole regions, and keep their bytes. No vCPU runs."""
        claim = self._slots.claim(first, count)
        try:
            self._slots.take_out(first, count)
        finally:
            self._slots.release(claim)

    def forget(self, first: int, count: int) -> None:
        """Free the memory behind pages that are shut out."""
        self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def collapse(self, first: int, count: int) -> bool:
        """Do nothing: it is not called where `collapses` is False."""
        return False

    def reassert(self, first: int, count: int) -> bool:
        """Do nothing: a memslot does not go away by itself."""
        return False

    def release_sleepers(self) -> None:
        """Do nothing: no vCPU sleeps in the kernel, an access is an exit."""

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Do nothing, for the same reason."""

    def settle(self, timeout: float) -> bool:
        """Do nothing: no thread of its own is at a fault."""
        return True

    def picture(self) -> Picture:
        """Return what is set up, for the tests of invariants: absent pages lie in no memslot."""
        return Picture(self._slots.blocks(), frozenset((None,)))

    def close(self) -> None:
        """Give back what the trap holds."""
        self._slots.close()


if __name__ == "__main__":
    register(RegionTrap)
    sys.exit(main(["run", "--trap", "region", "--vcpus", "2", *sys.argv[1:]]))
