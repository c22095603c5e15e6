"""What the traps that work by memslot have in common: how their blocks of pages come together again.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE, REGION
from kvmdp.paging.ports import ForMemslots
from kvmdp.size import format_size
from kvmdp.trap.collapse import can_collapse, put_together
from kvmdp.trap.inspect import Picture
from kvmdp.trap.slots.partial_slots import DEFAULT_SLOT_MEMORY, SLOT_BYTES, PartialRegions
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.slots.slot_map import Kind

Split = Literal["gap", "region"]
LEAST_SLOT_MEMORY = 2 * REGION * SLOT_BYTES  # room for a few regions in pieces


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """How RAM with too many granules for a memslot each is cut up, and how much kernel memory the pieces may take.

    `split`: at the first touch of an absent region "gap" cuts it around the page, in a stop of the vCPUs for each
    touch; "region" cuts it into granules, in one longer stop. `memory` is bytes.
    """

    split: Split = "gap"
    memory: int = DEFAULT_SLOT_MEMORY

    def __post_init__(self) -> None:
        if self.memory < LEAST_SLOT_MEMORY:
            raise ValueError(
                f"{format_size(self.memory)} of kernel memory for memslots: give at least "
                f"{format_size(LEAST_SLOT_MEMORY)}"
            )


class SlotTrap:
    """A trap whose absent pages are closed, or are in no memslot.

    Where every granule can have a memslot of its own they have, and are merged on request. Else RAM is `in_regions`:
    memslots are cut as pages come and go, and merged when a region is full.
    """

    latencies: Sequence[array[int]] = ()
    absent: frozenset[Kind | None]  # what absent pages lie in; None is no memslot

    def __init__(self, slots: RamSlots, backing: Backing, options: SlotOptions) -> None:
        self._slots = slots
        self._backing = backing
        self._options = options
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

    def arm(self, pager: ForMemslots) -> None:
        """Give what is present open blocks, as large as can be; the absent is for the trap itself."""
        self._pager = pager
        self._slots.unmap()
        for first, count in pager.bitmap.present_runs().tolist():
            self._open(first, count)
        if self._slots.in_regions:
            self._partial = PartialRegions(
                self._slots, pager, self._backing.size // PAGE_SIZE, self._options.memory
            )
            pager.jobs.add(self._partial)

    def _open(self, first: int, count: int, size: int | None = None) -> None:
        """Open a run that has no slots, as one or cut at the multiples of `size` pages."""
        for piece in self._slots.pieces(first, count, Kind.OPEN, size):
            self._slots.open(piece.first, piece.pages)

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

        True if they have one memslot then. The guest view is plain memory: it is not what traps. The pages stay
        present: while the slots are replaced, some at a time, no vCPU is in KVM_RUN.
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

    def forget(self, first: int, count: int) -> None:
        """Free the memory behind absent pages."""
        self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def picture(self) -> Picture:
        """The memslots; no page table is involved."""
        return Picture(self._slots.blocks(), self.absent)

    def reassert(self, first: int, count: int) -> bool:
        """Do nothing: a slot does not go away by itself."""
        return False

    def release_sleepers(self) -> None:
        """Do nothing: an access to an absent page is an exit, nobody sleeps."""

    def settle(self, timeout: float) -> bool:
        """Do nothing: the trap has no threads."""
        return True

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Do nothing, as `release_sleepers`."""

    def close(self) -> None:
        """Give back the slots' reserved addresses."""
        self._slots.close()
