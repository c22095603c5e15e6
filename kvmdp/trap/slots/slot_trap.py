"""What the traps that work by memslot have in common: how their blocks of pages come together again.

Any of them can have a device view beside. That is the arrangement of the series that the design comes from: KVM_RUN
exits where a vCPU would have slept, and userfaultfd stays for accesses of user space. No page of the guest view has a
marker here, so the two sides know nothing of each other but when pages go (`kvmdp.trap.uffd.device_view` argues the
races). A device that sleeps on a page is let in by its reader, or woken by the claim's end.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence

from kvmdp.page import PAGE_SIZE
from kvmdp.paging.ports import ForMemslots, ForTraps
from kvmdp.trap.collapse import can_collapse, put_together
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.kind import Materials, TrapKind
from kvmdp.trap.slots.partial_slots import PartialRegions, check_slot_memory
from kvmdp.trap.slots.slot_map import Kind


class SlotTrap(TrapKind):
    """A trap whose absent pages are closed, or are in no memslot.

    Where every granule can have a memslot of its own they have, and are merged on request. Else RAM is `in_regions`:
    memslots are cut around pages as these come and go, and merged when a region is full.
    """

    by_memslot = True
    # While pages are revoked every vCPU is out of KVM_RUN. The device view's part of that is exact without.
    needs_quiesce = True
    # They are about vCPUs, whose faults are exits: a device can time its own accesses.
    latencies: Sequence[array[int]] = ()
    absent: frozenset[Kind | None]  # what absent pages lie in; None is no memslot

    @classmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed."""
        return cls(made_of)

    def __init__(self, made_of: Materials) -> None:
        check_slot_memory(made_of.slot_memory)
        self._slots = made_of.slots
        self._backing = made_of.backing
        self._slot_memory = made_of.slot_memory
        self._devices = made_of.devices
        self.device_view = None if made_of.devices is None else made_of.devices.view
        self._pager: ForMemslots | None = None
        self._partial: PartialRegions | None = None  # where RAM is in regions, while armed

    @property
    def granule(self) -> int:
        """Bytes that the trap flips as one."""
        return self._slots.granule

    @property
    def fill_view(self) -> memoryview:
        """The VMM view: no page of it ever traps."""
        return self._backing.vmm.view

    @property
    def ram_view(self) -> memoryview:
        """The VMM view."""
        return self._backing.vmm.view

    @property
    def populate(self) -> Callable[[int, int], None] | None:
        """What comes before a store in the VMM view."""
        return self._backing.populate if self._backing.refusable else None

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def arm(self, pager: ForTraps) -> None:
        """Give what is present open blocks, as large as can be; the absent is for the trap itself."""
        if self._devices is not None:
            self._devices.arm(pager)
        self._pager = pager
        self._slots.unmap()
        for first, count in pager.bitmap.present_runs().tolist():
            self._open(first, count)
        if self._slots.in_regions:
            self._partial = PartialRegions(
                self._slots, pager, self._backing.size // PAGE_SIZE, self._slot_memory
            )
            pager.jobs.add(self._partial)

    def _open(self, first: int, count: int, size: int | None = None) -> None:
        """Open a run that has no slots, as one or cut at the multiples of `size` pages."""
        for piece in self._slots.pieces(first, count, Kind.OPEN, size):
            self._slots.open(piece.first, piece.pages)

    @abstractmethod
    def admit(self, first: int, count: int) -> None:
        """Let vCPUs into absent pages; a device that sleeps on one is let in by its reader."""

    def revoke(self, first: int, count: int) -> None:
        """Shut out vCPUs and devices: when this returns none of them can store into the pages any more."""
        if self._devices is not None:
            self._devices.drop(first, count)
        self._shut_out(first, count)

    @abstractmethod
    def _shut_out(self, first: int, count: int) -> None:
        """Make vCPUs trap on present pages; none of them is in KVM_RUN."""

    def _changed(self, first: int, count: int) -> None:
        """Take note of other memslots around these pages."""
        if self._partial is not None:
            self._partial.changed(first, count)

    def _populate(self, first: int, count: int) -> None:
        """Enter a run of pages, just admitted, into the guest view's page table.

        KVM maps the neighbours of the page it was asked for along with it, if it finds them there. One page has
        none, and KVM's own fault enters it for the same price.
        """
        if count > 1:
            self._backing.guest.populate(first * PAGE_SIZE, count * PAGE_SIZE)

    @property
    def collapses(self) -> bool:
        """Memslots can always be put together."""
        return True

    def collapse(self, first: int, count: int) -> bool:
        """Put present pages together in the guest view, and their memslots with those around them.

        True if they have one memslot then. The guest view is plain memory: it is not what traps. A device view is
        entered page by page, as devices touch it. The pages stay present: while the slots are replaced, some at a time,
        no vCPU is in KVM_RUN.
        """
        assert self._pager is not None
        if self._backing.transparent and can_collapse(self._backing.guest):
            put_together(self._backing.guest, first, count, thp=self._backing.thp)
        self._slots.merge_upward(first, count, self._pager.gate.quiesced)
        self._changed(first, count)
        return self._slots.blocks_in(first, count) == 1

    def disarm(self) -> None:
        """Replace the blocks by one a region of the layout. No job is at work: no other thread is at the memslots."""
        if self._partial is not None:
            assert self._pager is not None
            self._pager.jobs.remove(self._partial)
            self._partial = None
        self._slots.unmap()
        self._slots.map_plain()
        if self._devices is not None:
            self._devices.disarm()

    def forget(self, first: int, count: int) -> None:
        """Free the memory behind absent pages."""
        self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def picture(self) -> Picture:
        """The memslots; no page table is involved."""
        return Picture(self._slots.blocks(), self.absent)

    def reassert(self, first: int, count: int) -> bool:
        """Do nothing: a slot does not go away by itself, and a reader that finds a page unmapped maps it."""
        return False

    def release_sleepers(self) -> None:
        """End the device view: a device that sleeps on an absent page wakes to an error. No vCPU sleeps here."""
        if self._devices is not None:
            self._devices.release()

    def settle(self, timeout: float) -> bool:
        """Do nothing: no vCPU waits for a thread; a device may be at a page for as long as the source takes."""
        return True

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Do nothing: a device view that has ended stays so."""

    def close(self) -> None:
        """End the device view, wait until no device is in an access, give back the slots' reserved addresses."""
        if self._devices is not None:
            self._devices.close()
        self._slots.close()
